"""Dry runs of recipes on interactions, labelled texts and images: a pass of the weightless model is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from intaglio.cli.app import app
from intaglio.errors import IntaglioError
from intaglio.recipe import plan as planning
from intaglio.recipe.counted_work import count_work, counted_pass
from intaglio.recipe.plan import Rates, plan
from intaglio.recipe.schema import Recipe
from intaglio.recipe.source import RunSpec
from tests.conftest import TinyDir
from tests.trainer.test_classification import folder

TRAIN: dict[str, Any] = {"steps": 10, "batch_size": 4, "evaluate_every": 5}
ITEMS = {"family": "bert", "width": 16, "depth": 1, "heads": 2, "context": 8, "tokenizer": "items"}


@pytest.fixture
def log(tmp_path: Path) -> str:
    rows = [f"u{user},i{item % 6},{time}" for user in range(6) for time, item in enumerate(range(user, user + 6))]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,time", *rows]))
    return str(tmp_path / "log.csv")


def work(train: dict[str, Any], **more: Any) -> Any:
    recipe = Recipe.from_dict({**more, "steps": [{"train": {**TRAIN, **train}}]})
    return count_work(RunSpec.from_args(recipe))


def test_a_pass_is_counted_by_operation() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(5 * 4 * 4, 2))
    batch = {"input": torch.zeros(1, 3, 4, 4, device="meta")}
    assert counted_pass(net, batch) == (2 * 16 * 5 * 3 * 9 + 2 * 80 * 2, 4 * (80 + 80 + 2))


def test_a_recommender_is_counted_with_its_rankings(log: str) -> None:
    step = {"objective": {"bert4rec": {"mask_ratio": 0.5}}, "interactions": log}
    found = work(step, new=ITEMS)
    assert type(found.model).__name__ == "BertForMaskedLM"
    assert found.model.device.type == "meta"
    position = 2 * 16 * 8  # six items, padding and mask
    body = counted_pass(found.model.base_model, {"inputs_embeds": torch.zeros(1, 8, 16, device="meta")})[0]
    assert found.step.flops == 3 * 40 * (body + 4 * position)
    assert found.measure_flops == (2 + 3) * 6 * (body + position)
    longer = work({**step, "steps": 30}, new=ITEMS)
    assert longer.step.flops == 3 * found.step.flops
    sampled = {"objective": {"sasrec": {"loss_type": "bce"}}, "interactions": log}
    causal = ITEMS | {"family": "gpt2"}
    whole = {**sampled, "objective": {"sasrec": {"loss_type": "softmax"}}}
    assert work(whole, new=causal).step.flops - work(sampled, new=causal).step.flops == 3 * 40 * 8 * position


def test_images_and_texts_are_counted(tiny_dir: TinyDir, tmp_path: Path) -> None:
    images, new = str(folder(tmp_path / "images")), {"family": "resnet", "width": 8, "depth": 2, "image_size": 8}
    plain = work({"classes": images}, new=new)
    wide = work({"classes": images}, new={**new, "image_size": 16})
    assert 3 < wide.step.flops / plain.step.flops < 5
    assert plain.measure_flops == 0
    mixed = work({"classes": images, "modifiers": [{"adamixup": {}}]}, new=new)
    assert mixed.step.flops == pytest.approx(1.5 * plain.step.flops)
    texts = tmp_path / "texts.jsonl"
    rows = [{"text": "the quick brown fox " * (number + 1), "label": "ab"[number % 2]} for number in range(8)]
    texts.write_text("\n".join(map(json.dumps, rows)))
    bert = {"model": str(tiny_dir("bert"))}
    whole = work({"classes": str(texts), "evaluate": 0.5}, **bert)
    assert whole.measure_flops > 0
    adapters = work({"classes": str(texts), "evaluate": 0.5, "lora": {"r": 2}}, **bert)
    assert adapters.step.flops == pytest.approx(2 / 3 * whole.step.flops)
    assert adapters.step.extra_bytes < whole.step.extra_bytes
    epochs = Recipe.from_dict({**bert, "steps": [{"train": {"classes": str(texts), "epochs": 5, "batch_size": 4}}]})
    whole = count_work(RunSpec.from_args(epochs))
    assert whole is not None
    assert whole.step.flops == pytest.approx(work({"classes": str(texts)}, **bert).step.flops)  # 40 rows both
    with pytest.raises(IntaglioError, match=r"takes texts; .* holds images"):
        work({"classes": images}, **bert)


def test_the_command_prints_the_estimate(log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "machine_rates", lambda device, dtype: Rates(1e9, 1e9, 1e9))
    recipe = {"new": ITEMS, "steps": [{"train": {**TRAIN, "objective": {"bert4rec": {}}, "interactions": log}}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = CliRunner().invoke(app, ["carve", "--recipe", str(tmp_path / "recipe.yaml"), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "new bert, estimated at 1 GFLOP/s" in " ".join(done.output.split())
    found = plan(Recipe.from_dict(recipe))
    assert found["seconds"] == pytest.approx(found["measure_seconds"] + found["steps"][0]["seconds"])
    assert found["memory_bytes"] > found["bytes"] > 0


def test_an_epoch_is_the_data_that_the_step_names(tmp_path: Path) -> None:
    """Hyperfitting's own samples and facts are counted; blocks that stay still cost a forward pass, or none if kept."""
    new = {"family": "llama", "width": 32, "depth": 4, "context": 64}

    def seconds(**train: Any) -> float:
        recipe = Recipe.from_dict({"new": new, "steps": [{"train": {"epochs": 2, **train}}]})
        return float(plan(recipe)["steps"][0]["seconds"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "machine_rates", lambda device, dtype: Rates(1e9, 1e9, 1e9))
        patch.setattr(planning, "read_texts", lambda recipe: (None, None))
        few, many = ({"hyperfitting": {"samples": count, "length": 16}} for count in (10, 30))
        assert seconds(objective=many) == pytest.approx(3 * seconds(objective=few))
        whole, upper = seconds(objective=few), seconds(objective=few, trainable_blocks=1)
        kept = {"hyperfitting": {"samples": 10, "length": 16, "cache_hidden": True}}
        assert whole > upper > seconds(objective=kept, trainable_blocks=1)
        facts = tmp_path / "facts.jsonl"
        rows = [{"subject": f"S{n:02}", "object": f"o {n:02}", "texts": [f"S{n:02} is o {n:02}."]} for n in range(12)]
        facts.write_text("\n".join(map(json.dumps, rows[:4])))
        four = seconds(objective={"bico": {"length": 16}}, facts=str(facts))
        facts.write_text("\n".join(map(json.dumps, rows)))
        assert seconds(objective={"bico": {"length": 16}}, facts=str(facts)) == pytest.approx(3 * four)
