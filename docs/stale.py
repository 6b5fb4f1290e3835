"""List the committed records of another version of their claim; exits with 0 in any case."""

from __future__ import annotations

import sys

from intaglio.evidence.engine.record import Record, all_committed, is_registered, is_stale
from intaglio.evidence.engine.registration import load_claim


def report(records: dict[str, Record]) -> str:
    """Return a line for each stale record, or a line stating that there is none."""
    claims = {slug: load_claim(slug) for slug in records if is_registered(slug)}
    stale = {slug: claim for slug, claim in claims.items() if is_stale(records[slug], claim)}
    if not stale:
        return f"evidence: {len(records)} committed records, none is stale"
    return "\n".join(
        f"evidence: {slug} is stale: its record is of version {records[slug].version} of the claim, which is now"
        f" version {claim.version}; `intaglio prove {slug} --record` replaces it"
        for slug, claim in stale.items()
    )


def main() -> int:
    """Print the report."""
    print(report(all_committed()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
