"""List the committed records whose code has changed since; exits with 0 in any case."""

from __future__ import annotations

import sys

from intaglio.evidence.record import Record, all_shipped, stale_parts


def report(records: dict[str, Record]) -> str:
    """Return a line for each stale record, or a line stating that there is none."""
    stale = {slug: parts for slug, record in records.items() if (parts := stale_parts(record))}
    if not stale:
        return f"evidence: {len(records)} committed records, none is stale"
    lines = [
        f"evidence: STALE {slug} ({records[slug].verdict} on {records[slug].made}): {', '.join(parts)} changed since;"
        f" `intaglio prove {slug} --renew` clears it if the values are the same"
        for slug, parts in stale.items()
    ]
    return "\n".join(lines)


def main() -> int:
    """Print the report."""
    print(report(all_shipped()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
