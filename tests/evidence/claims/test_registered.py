"""What holds for every registered claim and every committed record."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.evidence.engine import record as records
from intaglio.evidence.engine.claim import Claim
from intaglio.evidence.engine.record import is_stale
from intaglio.evidence.engine.registration import load_claim
from intaglio.evidence.engine.spot import spot
from intaglio.evidence.engine.statistics import MAX_DIVERGED, spread, verdicts

REGISTERED = sorted(path.stem for path in records.CLAIMS.glob("[a-z]*.py"))
RECORDS = records.all_committed()


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


@pytest.mark.slow
@pytest.mark.parametrize("slug", sorted(set(RECORDS) & set(REGISTERED))[:2])
def test_spot_checks_are_printed_and_never_fail(slug: str, capsys: pytest.CaptureFixture[str]) -> None:
    if is_stale(RECORDS[slug], load_claim(slug)):
        pytest.skip("the record is of another version of the claim")
    with capsys.disabled():
        print(f"\n{spot(slug).sentence()}")
