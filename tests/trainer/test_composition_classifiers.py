"""Two modifiers and a selector in one step of a classifier: of images and of texts, with and without LoRA, resumed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.training.adamixup import AdaMixUp
from intaglio.methods.training.decoupled_mixup import DecoupledMixup
from intaglio.methods.training.elr import ELR
from intaglio.methods.training.orth_conv import OrthConv
from intaglio.methods.training.points import POINTS
from intaglio.methods.training.stn import STN
from intaglio.methods.weights.bip import BiP
from intaglio.recipe.schema import Recipe
from intaglio.trainer import KeyedRNG, ObjectiveModule, train, training_rows
from intaglio.trainer.classification import Classification
from tests.trainer.helpers import LABELLED, checkpoint, far, same, weights
from tests.trainer.test_classification import SETTINGS, image_model, squares
from tests.trainer.test_resume import Killed, killer
from tests.trainer.toys import ToySelector

TUNED = STN(hyper_warmup=0, train_steps=1, regularizers=[{"kind": "dropout", "start": 0.2}])
CASES: dict[str, dict[str, Any]] = {
    "images": {"modifiers": [ELR(), OrthConv()], "select": ToySelector(budget=0.75)},
    "mixed images": {"modifiers": [OrthConv(form="spectral_norm"), DecoupledMixup()],
                     "select": ToySelector(budget=0.75)},
    "two networks": {"modifiers": [ELR.plus(), OrthConv()], "select": ToySelector(budget=0.75)},
    "mixed texts": {"modifiers": [DecoupledMixup(), BiP(sparsity=0.5)], "select": POINTS(budget=0.5)},
    "adapters": {"modifiers": [ELR(), TUNED], "select": POINTS(budget=0.5), "lora": {"r": 2}},
}  # fmt: skip
PARTS = {"elr": "elr", "orth_conv": "orth", "bip": "mask_overlap"}
"""Lines that modifiers add to the training curve."""


def data(case: str) -> tuple[Checkpoint, list[dict[str, Any]]]:
    """An untrained model, and its examples."""
    if "images" in case or case == "two networks":
        return image_model(), squares()
    return checkpoint(layers=1), LABELLED[:16]


@pytest.mark.parametrize("case", CASES)
def test_two_modifiers_and_a_selector_share_a_step_and_resume_bit_for_bit(case: str, tmp_path: Path) -> None:
    arguments = {**SETTINGS, **CASES[case], "objective": Classification(), "save_every": 1}
    whole, examples = data(case)
    unbroken = train(whole, examples, **arguments)
    record = whole.record.steps[-1].chosen
    slugs = [modifier.slug for modifier in CASES[case]["modifiers"]]
    lines = [PARTS[slug] for slug in slugs if slug in PARTS and case != "mixed images"]
    assert set(lines) <= set(unbroken.history[-1].parts)
    if isinstance(CASES[case]["select"], POINTS):
        assert record["selection"]["chosen"] == 8
    if "elr" in slugs:
        rows = {"images": 9, "two networks": 9, "adapters": 6}[case]  # a fifth of eight texts is held out
        assert whole.attachments["elr"].tensors["targets"].shape[0] == rows
    with pytest.raises(Killed):
        train(data(case)[0], examples, directory=tmp_path, progress=killer(3), **arguments)
    again = data(case)[0]
    resumed = train(again, examples, directory=tmp_path, **arguments)
    assert resumed.history == unbroken.history
    assert resumed.reports == unbroken.reports
    assert same(weights(again), weights(whole))


SCRIPT = """
import os, sys
from safetensors.torch import save_file
from tests.trainer.helpers import weights
from tests.trainer.test_composition_classifiers import trained
from tests.trainer.test_resume import Killed, killer

case, out, directory, stop = sys.argv[1:]
try:
    ckpt = trained(case, directory=directory, **({"progress": killer(3)} if stop == "stop" else {}))
except Killed:
    sys.exit(0)
if os.environ["RANK"] == "0":
    tables = {name: value for part in ckpt.attachments.values() for name, value in part.tensors.items()}
    save_file({**weights(ckpt), **tables}, out)
"""


def trained(case: str, **more: Any) -> Checkpoint:
    """Train a case on a model without batch statistics, which differ between processes."""
    ckpt, examples = (image_model("vit"), squares()) if case == "images" else data(case)
    arguments = {**SETTINGS, **CASES[case], "objective": Classification(), "save_every": 1, **more}
    train(ckpt, examples, **arguments)
    return ckpt


@pytest.mark.slow
@pytest.mark.parametrize("case", ["images"])
def test_two_processes_stopped_and_resumed_are_one(case: str, tmp_path: Path) -> None:
    """ELR's table is that of all rows; mixed cases are left out, as partners are rows of one process."""
    out, script = tmp_path / "out.safetensors", tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script), case]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    for stop in ("stop", "go on"):
        arguments = [str(out), str(tmp_path / "run"), stop]
        subprocess.run([*command, *arguments], check=True, env=environment, capture_output=True)
        assert out.exists() == (stop == "go on")
    alone = trained(case)
    saved = load_file(out)
    for part in alone.attachments.values():
        for name, value in part.tensors.items():
            assert far({name: saved.pop(name)}, {name: value}) < 1e-5
    assert far(saved, weights(alone)) < 1e-4  # AdamW at a rate of 1e-2 widens rounding


@pytest.mark.parametrize("case", ["images", "mixed texts"])
def test_each_modifier_has_a_part_in_the_result(case: str) -> None:
    results = []
    for left_out in (None, 0, 1):
        ckpt, examples = data(case)
        kept = [m for number, m in enumerate(CASES[case]["modifiers"]) if number != left_out]
        arguments = {**SETTINGS, **CASES[case], "modifiers": kept, "keep_mask": False}
        train(ckpt, examples, objective=Classification(), **arguments)
        results.append(weights(ckpt))
    assert not any(same(results[a], results[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(
    "modifiers",
    [[ELR(), DecoupledMixup()], [AdaMixUp(), ELR.plus()], [DecoupledMixup(), AdaMixUp()]],
    ids=lambda given: "+".join(modifier.slug for modifier in given),
)
def test_two_that_set_the_targets_are_refused_everywhere(modifiers: list[Any]) -> None:
    """ELR's targets are those of single examples, which mixed batches do not show."""
    slugs = [modifier.slug for modifier in modifiers]
    message = f"{slugs[0]} and {slugs[1]} both set the targets of a batch"
    ckpt, goal = image_model(), Classification()
    before = weights(ckpt)
    with pytest.raises(IntaglioError, match=message) as caught:
        train(ckpt, squares(), objective=goal, modifiers=modifiers, **SETTINGS)
    assert "\n" not in str(caught.value)
    assert same(before, weights(ckpt))
    rows = training_rows(goal, ckpt, squares(), KeyedRNG(0))
    with pytest.raises(IntaglioError, match=message):
        ObjectiveModule(ckpt, goal, modifiers, rows)
    named = [{slug: {}} for slug in slugs]
    with pytest.raises(IntaglioError, match=message) as caught:
        Recipe.from_dict({"steps": [{"train": {"classes": "x.jsonl", "steps": 1, "modifiers": named}}]})
    assert "\n" not in str(caught.value)


def test_what_edits_the_weights_stands_alone_and_a_penalty_does_not() -> None:
    def step(*modifiers: dict[str, Any], **more: Any) -> Recipe:
        fields = {"classes": "x.jsonl", "steps": 1, "modifiers": list(modifiers), **more}
        return Recipe.from_dict({"steps": [{"train": fields}]})

    for beside in ({"elr": {}}, {"decoupled_mixup": {}}, {"bip": {}}):
        step({"orth_conv": {}}, beside)
        assert step(beside, {"orth_conv": {"form": "kernel"}}).steps[0].changes == {"weights"}
    step({"decoupled_mixup": {}}, {"bip": {}}, select={"points": {}})
    with pytest.raises(IntaglioError, match="orth_conv and bip both change the weights"):
        step({"orth_conv": {"form": "spectral_norm"}}, {"bip": {}})
    with pytest.raises(IntaglioError, match="orth_conv trains the weights themselves, and lora"):
        step({"elr": {}}, {"orth_conv": {}}, lora={"r": 2})


@pytest.mark.parametrize("settings", [{"freeze": True}, {"lora": {"r": 2, "targets": ["q_proj"]}}])
def test_a_penalty_on_weights_that_are_not_trained_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(IntaglioError, match="orth_conv regularises weights that are not trained"):
        train(image_model("vit"), squares(), objective=Classification(), modifiers=[OrthConv()],
              **SETTINGS, **settings)  # fmt: skip
