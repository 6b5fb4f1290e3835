"""What holds for every registered claim and every committed record."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from intaglio.evidence.engine import record as records
from intaglio.evidence.engine.claim import Claim
from intaglio.evidence.engine.record import is_stale
from intaglio.evidence.engine.registration import load_claim
from intaglio.evidence.engine.statistics import MAX_DIVERGED, spread, verdicts

REGISTERED = sorted(path.stem for path in records.CLAIMS.glob("[a-z]*.py"))
RECORDS = records.all_committed()
CURRENT = [slug for slug in RECORDS if slug in REGISTERED and not is_stale(RECORDS[slug], load_claim(slug))]
SPOTS = sorted(CURRENT, key=lambda slug: RECORDS[slug].cost["all"])[:2]
"""The cheapest records of registered claims as they stand."""
SPOT_SECONDS = 90
"""Time limit of a spot check, so that the slow suite stays bounded."""


@pytest.mark.parametrize("slug", REGISTERED)
def test_a_claim_is_its_methods_and_has_golden_numbers_of_baseline_and_method(slug: str) -> None:
    claim = load_claim(slug)
    assert isinstance(claim, Claim)
    assert claim.slug == slug
    assert claim.tier == "gpu" or {claim.baseline, claim.method} <= claim.golden.keys()


@pytest.mark.parametrize("slug", RECORDS)
def test_effect_interval_and_verdict_follow_from_a_records_differences(slug: str) -> None:
    record = RECORDS[slug]
    if record.effect is None or record.interval is None:
        assert record.verdict == "untestable here"
        return
    seen = spread(np.array(record.differences), record.delta, record.crossed)
    reach = float(seen.half_width(1 - record.level))
    assert record.effect == pytest.approx(float(seen.effect), rel=1e-3, abs=1e-3 * record.delta)
    assert record.interval == pytest.approx(
        (seen.effect - reach, seen.effect + reach), rel=1e-3, abs=1e-3 * record.delta
    )
    if max(record.arms[arm].diverged for arm in (record.baseline, record.method)) <= MAX_DIVERGED:
        assert record.verdict == verdicts(*record.interval, record.delta, record.kind)  # type: ignore[arg-type]
    assert record.advice


def test_two_records_are_spot_checked_at_most() -> None:
    assert 0 < len(SPOTS) <= 2
    assert not any(is_stale(RECORDS[slug], load_claim(slug)) for slug in SPOTS)


@pytest.mark.slow
@pytest.mark.parametrize("slug", SPOTS)
def test_spot_checks_are_printed_and_never_fail(slug: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "intaglio", "prove", slug, "--spot"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SPOT_SECONDS)
        line = done.stdout.strip() or done.stderr.strip()
    except subprocess.TimeoutExpired:
        line = f"{slug}: no spot check: it takes more than {SPOT_SECONDS} s, with the models that it trains first"
    with capsys.disabled():
        print(f"\n{line}")
