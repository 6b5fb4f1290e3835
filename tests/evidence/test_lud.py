"""The plumbing of LUD's claim, end to end on a model that is too small to learn anything."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.evidence import lud
from intaglio.evidence.continuing import Generated
from intaglio.evidence.experiment import Unit
from intaglio.evidence.lud import AGREED, ARMS, BETAS, COUNTED, RATE, SAME, TUNED, Continue, Decoded, docstrings
from intaglio.evidence.run import experiment_of, prove
from intaglio.evidence.worlds import trained
from intaglio.evidence.worlds.made import CHOICES
from intaglio.evidence.worlds.source_code import SourceCode
from intaglio.methods.decoding.lud import LUD

METRICS = {lud.COUNTED, lud.RATE, lud.FRESH, lud.AGREEMENT, lud.SAME, lud.PROSE, lud.SECONDS, lud.NATS}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def small(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Continue:
    """A runner on 60 made-up files, with a cache of its own."""
    root = cache / "source"
    root.mkdir(exist_ok=True)
    draw = random.Random(0)
    for number in range(60):
        words = " ".join(draw.choice(["alpha", "beta", "gamma", "value"]) for _ in range(6))
        (root / f"m{number}.py").write_text(f'"""{words} {number}."""\n{words.split()[0]} = {number}\n')
    monkeypatch.setenv("INTAGLIO_HOME", str(cache))
    monkeypatch.setattr(trained, "THREADS", 1)
    monkeypatch.setattr(lud, "BETAS", (0.0, 0.99))
    world = SourceCode(
        folder=str(root), width=16, depth=1, context=32, steps=2, batch=2, documents_run=4, documents_pilot=2, tokens=24
    )
    return Continue(world, steps=2, prompt=8, new=6, trials=1)


def test_end_to_end(small: Continue, tmp_path: Path) -> None:
    quick = dataclasses.replace(lud.experiment(small), pilot_runs=2, most_runs=2)
    document = prove("lud", experiment=quick, directory=tmp_path)
    assert document["verdict"] in ("holds", "fails", "underpowered", "inconclusive")
    assert set(document["arms"]) == set(ARMS)
    assert len(document["secondaries"]) == 12
    for found in document["runs"]:
        values = {name: value["prompt"] for name, value in found["outcome"]["values"].items()}
        assert set(values) == METRICS
        assert 1 <= values[COUNTED] <= values[RATE] <= 4
        if found["arm"] in ("unaided", "plain", "verified"):
            assert values[SAME] == values[lud.AGREEMENT] == 1
        if found["arm"] in ("unaided", "plain"):
            assert values[RATE] == 1
        assert found["outcome"]["cost"]["tokens"] == 2 * 2 * lud.SEEN


def test_arms_share_prompts_and_runs_do_not(small: Continue) -> None:
    one, other = (small(arm, Unit("run", 1), 0) for arm in ("unaided", "untrained"))
    assert one.shared == other.shared
    assert not set(one.shared.values()) & set(small("unaided", Unit("run", 2), 0).shared.values())
    with pytest.raises(IntaglioError, match="prompt 4 was asked for; the world has 4"):
        small("unaided", Unit("run", 4), 0)


def test_what_is_tuned_and_what_is_not(small: Continue) -> None:
    base, plain, tuned = small.world.trained(), small.model("plain"), small.model("lud")
    rows: Any = [ckpt.model.get_input_embeddings().weight.shape[0] for ckpt in (base, plain, tuned)]  # type: ignore[operator]
    assert rows[1] == rows[2] == rows[0] + 1
    assert hasattr(tuned.model.config, "lexical_units")
    assert not hasattr(plain.model.config, "lexical_units")
    assert tuned.record.steps[-1].parameters["steps"] == 2
    # As many tokens, PADs counted.
    assert small.tuned("plain").record.steps[-1].parameters["steps"] == 2 * lud.SEEN // lud.LENGTH


def test_the_threshold_is_kept_and_chosen_by_what_is_claimed(small: Continue, cache: Path) -> None:
    found = small.threshold("lud")
    (kept,) = (
        file.with_name("threshold.json")
        for file in cache.glob(f"worlds/lud_threshold-*/{CHOICES}")
        if json.loads(file.read_text())["arm"] == "lud"
    )
    said = json.loads(kept.read_text())
    means = dict(said["means"])
    assert said["beta"] == found == max(means, key=lambda beta: (means[beta], beta))
    assert set(means) == set(lud.BETAS)
    assert small.decoder("lud").threshold == found  # type: ignore[union-attr]
    assert small.decoder("unaided") is None
    verified = small.decoder("verified")
    assert isinstance(verified, LUD)
    assert (verified.verify, verified.threshold) == (True, 0.3)


def test_agreement_is_with_the_same_models_own_choice(small: Continue) -> None:
    target, prompt = small.model("lud"), list(b"value = ")
    decoder = small._decoder("lud", beta=0.0)
    found = lud.run(target, decoder, prompt, 12)
    alone = target.model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
    )[0, 8:].tolist()
    same = next((n for n, (a, b) in enumerate(zip(found.text.ids, alone, strict=True)) if a != b), 12)
    assert found.alike == same / 12
    assert found.agreement >= found.alike
    assert found.text.rate() == (12 - 1) / (decoder.statistics.passes - 1)
    assert found.text.rows == 8 + decoder.statistics.nodes + 12 - decoder.statistics.lengths[-1] - 1


def test_a_text_that_agrees_too_little_counts_as_one_token_a_pass() -> None:
    text = Generated((0,) * 7, (1, 3, 3), 0, 1.0)
    assert Decoded(text, AGREED, 1.0).counted == 3
    assert Decoded(text, AGREED - 0.001, 1.0).counted == 1


def test_the_longest_docstring_of_a_file() -> None:
    texts = (
        '"""short"""\n',
        'def f():\n    r"""a longer one\n    of two lines"""\n\nx = "not one at all, long as it is"\n',
    )
    assert docstrings(texts, ("a", "b"), 8) == {"b": 'r"""a longer one\n    of two lines"""'}


def test_the_claim() -> None:
    chosen = experiment_of("lud")
    assert (chosen.baseline, chosen.method, chosen.delta, chosen.tier) == ("unaided", "lud", 0.2, "cpu")
    assert (chosen.metric, chosen.direction, chosen.design, chosen.factors) == (
        COUNTED,
        "higher",
        "independent",
        ("prompt",),
    )
    assert AGREED == 0.97
    assert set(BETAS) == {0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99}
    assert {arm.model for arm in ARMS.values()} == set(TUNED)
    there = pickle.loads(pickle.dumps(chosen))
    assert (there.digest, there.run_unit) == (chosen.digest, chosen.run_unit)
