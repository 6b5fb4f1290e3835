"""Continue on its test bed in miniature: each setting of an arm reaches model and decoding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from intaglio.errors import IntaglioError
from intaglio.evidence.designs.continuations import ENTROPY, HELD_OUT, OVERLAP, REPETITION, TTR, Continue
from intaglio.evidence.engine.claim import Arm, RunKey

DESIGN = replace(Continue().toy(steps=30), new=40)
KEY = RunKey("toy", 0)


def values(key: RunKey = KEY, **settings: Any) -> dict[str, Any]:
    return dict(DESIGN.run(Arm("x", settings), key, {}).values)


def test_texts_and_model_follow_the_stage(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path))
    original, fitted, early = (values(stage=stage) for stage in ("original", "fitted", "early"))
    assert original.keys() == {metric.name for metric in (TTR, REPETITION, OVERLAP, HELD_OUT, ENTROPY)}
    assert len({side[HELD_OUT.name] for side in (original, fitted)}) == 2
    assert early[HELD_OUT.name] <= min(original[HELD_OUT.name], fitted[HELD_OUT.name])
    assert values(stage="fitted", blocked=True)[OVERLAP.name] == 0

    narrow, matched = values(top_p=1e-6), values(matched=True)
    assert narrow == original  # the nucleus is the likeliest token
    wide, again, other = (values(RunKey("toy", index), top_p=0.9) for index in (0, 0, 1))
    assert wide == again
    assert wide[TTR.name] != narrow[TTR.name]
    assert other != wide
    assert matched[HELD_OUT.name] == original[HELD_OUT.name]
    assert matched[REPETITION.name] != original[REPETITION.name]
    with pytest.raises(IntaglioError, match="the settings top_k of the arm are no field"):
        values(top_k=3)
