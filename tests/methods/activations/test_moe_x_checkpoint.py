"""MoE-X in a checkpoint: what the experts begin as, that a model of them is a model like any other, how it trains."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from typer.testing import CliRunner

import intaglio
from intaglio.checkpoint import Checkpoint
from intaglio.cli.app import app
from intaglio.errors import IntaglioError
from intaglio.exporters import export
from intaglio.masks import visible
from intaglio.methods.activations.moe_x import MoELayer, MoEX, expert_statistics, moe_layers
from intaglio.methods.attention.layerwise_unmasking import LayerwiseUnmasking
from intaglio.methods.base import Workload
from intaglio.methods.weights.bitnet import BitNet
from intaglio.methods.weights.drop_blocks import DropBlocks
from intaglio.methods.weights.wanda import Wanda
from intaglio.modeling.anatomy import anatomy
from intaglio.recipe.plan import plan
from intaglio.recipe.schema import Recipe
from intaglio.trainer import CausalLM, Loss, TrainingRun
from tests.families import FAMILIES, tiny_checkpoint_dir, tiny_model
from tests.trainer.helpers import TEXTS, checkpoint, run, same, weights

IDS = torch.randint(8, 150, (3, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(ckpt: Checkpoint) -> Tensor:
    found: Tensor = ckpt.model(IDS).logits
    return found


def upcycled(family: str = "llama", seed: int = 0, layers: int = 2, **fields: Any) -> Checkpoint:
    return MoEX(**{"experts": 4, **fields}).apply(checkpoint(family, layers=layers), seed=seed)


def layers_of(ckpt: Checkpoint) -> list[MoELayer]:
    return list(moe_layers(ckpt.model).values())


# what the experts begin as


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_without_noise_are_the_model_that_was_there(family: str) -> None:
    plain = checkpoint(family)
    for fields in ({}, {"router": "linear"}, {"gates": "all"}):
        found = upcycled(family, activation="own", noise=0.0, **fields)
        assert len(layers_of(found)) == 2
        torch.testing.assert_close(logits(found), logits(plain), atol=2e-4, rtol=1e-3)


def test_a_relu_model_is_upcycled_as_it_is_and_another_gets_relus() -> None:
    relu = Checkpoint(tiny_model("gpt2", layers=2, activation_function="relu"))
    before = logits(relu)
    torch.testing.assert_close(logits(MoEX(noise=0.0).apply(relu)), before, atol=2e-4, rtol=1e-3)
    as_relu = Checkpoint(tiny_model("llama", layers=2, hidden_act="relu"))
    torch.testing.assert_close(logits(upcycled(noise=0.0)), logits(as_relu), atol=2e-4, rtol=1e-3)
    assert not torch.allclose(logits(upcycled(noise=0.0)), logits(checkpoint()), atol=1e-2)


@torch.no_grad()
def test_a_gate_that_is_dropped_leaves_the_other_projection() -> None:
    parts = anatomy(checkpoint().model)
    (layer, *_) = layers_of(upcycled(gated="drop", noise=0.0))
    up, down = parts.blocks[0].mlp.up_proj.weight, parts.blocks[0].mlp.down_proj.weight  # type: ignore[union-attr]
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    assert layer.factor is None
    torch.testing.assert_close(layer(x), torch.relu(x @ up.T) @ down.T, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_noise_reset_and_split_by_their_numbers() -> None:
    gate = anatomy(checkpoint().model).blocks[0].mlp.gate_proj.weight  # type: ignore[union-attr]
    (noisy, *_), (again, *_), (other, *_) = (layers_of(upcycled(noise=0.1, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(noisy.encoder, again.encoder)
    assert not torch.equal(noisy.encoder, other.encoder)
    error = (noisy.encoder - gate) / gate.std(correction=0)
    assert float(error.std()) == pytest.approx(0.1, rel=0.1)
    assert all(not torch.equal(noisy.encoder[0], noisy.encoder[e]) for e in (1, 2, 3))
    (drawn, *_) = layers_of(upcycled(noise=0.0, reset=0.25, activation="own"))
    torch.manual_seed(9)  # which no draw depends on
    (again, *_) = layers_of(upcycled(noise=0.0, reset=0.25, activation="own"))
    assert torch.equal(drawn.encoder, again.encoder)
    changed_EF = (drawn.encoder != gate).any(-1)
    assert changed_EF.sum(1).tolist() == [12] * 4  # a quarter of 48
    assert len({tuple(row.tolist()) for row in changed_EF}) == 4
    down = anatomy(checkpoint().model).blocks[0].mlp.down_proj.weight  # type: ignore[union-attr]
    assert torch.equal((drawn.decoder != down).any(1), changed_EF)
    assert float(drawn.encoder[changed_EF].std()) == pytest.approx(float(gate.std()), rel=0.1)
    (split, *_) = layers_of(upcycled(noise=0.0, start="split", active=4))
    assert split.encoder.shape == (4, 12, 32)
    assert torch.equal(split.encoder.flatten(0, 1), gate)
    assert torch.equal(split.decoder.transpose(0, 1).flatten(1), 4 * down)


@torch.no_grad()
def test_all_slices_of_a_split_mlp_under_even_gates_are_the_mlp() -> None:
    plain = checkpoint("gpt_neox")
    found = upcycled("gpt_neox", start="split", active=4, activation="own", noise=0.0, temperature=1e9)
    torch.testing.assert_close(logits(found), logits(plain), atol=2e-4, rtol=1e-3)


def test_some_blocks_alone_and_what_the_record_says() -> None:
    ckpt = MoEX(experts=4, layers=[1]).apply(checkpoint(layers=3))
    assert list(moe_layers(ckpt.model)) == ["model.layers.1.mlp"]
    chosen = ckpt.record.steps[-1].chosen
    assert chosen == {"layers": 1, "units": [48], "parameters": 4 * 3 * 32 * 48, "active_parameters": 2 * 3 * 32 * 48}
    assert sum(p.numel() for p in layers_of(ckpt)[0].parameters()) == chosen["parameters"]


# a model like any other


@pytest.mark.parametrize("family", ["llama", "gpt2", "modernbert", "bert", "phi3"])
def test_saved_and_loaded(family: str, tmp_path: Path) -> None:
    ckpt = upcycled(family, router="linear" if family == "gpt2" else "sparsity")
    ckpt.save(tmp_path / "out")
    back = intaglio.load(tmp_path / "out")
    assert torch.equal(logits(back), logits(ckpt))
    assert [layer.config for layer in layers_of(back)] == [layer.config for layer in layers_of(ckpt)]
    # Where an expert has one token, the last bit hangs on where its matrix begins in memory.
    assert all(p.data_ptr() % 64 == 0 for layer in layers_of(back) for p in layer.parameters())
    half = intaglio.load(tmp_path / "out", dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert bool(torch.isfinite(logits(half)).all())


def test_it_generates_with_a_cache_as_without_and_is_unmasked() -> None:
    ckpt = upcycled()
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    ids = torch.arange(8, 14)[None]
    with_cache, without = (ckpt.model.generate(ids, use_cache=use, **how) for use in (True, False))
    assert torch.equal(with_cache, without)
    LayerwiseUnmasking(groups=2, configuration="01").apply(ckpt)
    assert bool(visible(ckpt.model, 6)[1].all())


def test_what_can_come_before_and_behind(tmp_path: Path) -> None:
    pruned = Wanda(sparsity=0.5).apply(checkpoint(), IDS)
    found = MoEX(experts=2, noise=0.0).apply(pruned)
    assert float((layers_of(found)[0].encoder == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    for step in ({"wanda": {"sparsity": 0.5}}, {"lost": {}}, {"moe_x": {}}, {"train": {"steps": 1, "lora": {}}}):
        with pytest.raises(IntaglioError, match="cannot follow moe_x: it needs linear_weights"):
            Recipe.from_dict({"steps": [{"moe_x": {}}, step]})
    on = [{"moe_x": {}}, {"train": {"steps": 1, "modifiers": [{"moe_x": {"experts": None}}]}}]
    assert len(Recipe.from_dict({"steps": on}).steps) == 2
    with pytest.raises(IntaglioError, match="drop_blocks cannot follow moe_x"):
        DropBlocks(layers=[0]).apply(upcycled())
    with pytest.raises(IntaglioError, match="is not the model's own"):
        MoEX().apply(BitNet(bits=4.0, scale="max").apply(checkpoint()))
    with pytest.raises(IntaglioError, match="moe_x") as caught:
        export(upcycled(), tmp_path / "out")
    assert "\n" not in str(caught.value)


# training


def test_training_moves_every_expert_and_logs_what_they_do() -> None:
    ckpt = checkpoint("gpt2")
    done = run(ckpt, modifiers=[MoEX(experts=4)], steps=6, batch_size=4)
    assert len(layers_of(ckpt)) == 2
    assert ckpt.kind == "runtime"
    assert all(not layer.watched and layer.routed is None for layer in layers_of(ckpt))
    fresh_weights = weights(upcycled("gpt2"))
    assert all(not torch.equal(weights(ckpt)[n], v) for n, v in fresh_weights.items() if ".mlp." in n)
    parts = done.history[-1].parts
    assert set(parts) == {"expert balance", "load entropy", "L0", "expected L0", "silent units"}
    assert 1 <= parts["expert balance"] < 4.01
    assert 0 < parts["load entropy"] <= 1
    assert 0 < parts["L0"] < 2 * 48
    assert len(ckpt.record.steps) == 1  # the training, whose shaper made them


def test_the_balance_loss_evens_the_loads() -> None:
    def entropy(balance: float) -> float:
        ckpt = upcycled(noise=0.5, router="linear", active=1, gates="all")
        for layer in layers_of(ckpt):
            assert layer.router is not None
            layer.router.data.mul_(20)
        fields = {"steps": 30, "learning_rate": 0.01, "batch_size": 4, "schedule": "constant"}
        run(ckpt, modifiers=[MoEX(experts=None, balance=balance)], **fields)
        found = expert_statistics(ckpt, IDS)
        return sum(one["load_entropy"] for one in found.values()) / len(found)

    assert entropy(1.0) > entropy(0.0) + 0.05


def test_padding_counts_for_nothing() -> None:
    ckpt = upcycled()
    session = MoEX(experts=None, balance=1.0).attach(TrainingRun(ckpt, 1, None, 0, lambda batch: Loss(torch.zeros(()))))
    mask = torch.ones_like(IDS)
    mask[:, 8:] = 0

    def balance(ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        ckpt.model(ids, attention_mask=attention_mask)
        found = session.extra_loss(ckpt.model, {"attention_mask": attention_mask}, None)
        assert found is not None
        return found.total

    torch.testing.assert_close(balance(IDS, mask), balance(IDS[:, :8], None))
    assert session.extra_loss(ckpt.model, {}, None) is None  # no pass since


def test_gradient_checkpointing_and_accumulation_train_the_same() -> None:
    found = []
    for more in ({}, {"gradient_checkpointing": True}):
        ckpt = checkpoint()
        run(ckpt, modifiers=[MoEX(experts=3, balance=0.1)], steps=2, accumulate=2, **more)
        found.append(weights(ckpt))
    assert max(float((found[0][n] - found[1][n]).abs().max()) for n in found[0]) < 1e-5


def test_experts_that_are_there_are_trained_on(tmp_path: Path) -> None:
    ckpt = upcycled()
    before = weights(ckpt)
    run(ckpt, modifiers=[MoEX(experts=None)], steps=2)
    assert not same(weights(ckpt), before)
    ckpt.save(tmp_path / "out")
    back = intaglio.load(tmp_path / "out")
    assert torch.equal(logits(back), logits(ckpt))
    run(back, steps=1)  # without the shaper, too
    assert [step.slug for step in back.record.steps] == ["moe_x", "train", "train"]


def test_a_masked_objective_trains_them_too() -> None:
    ckpt = checkpoint("mistral_window")
    run(
        ckpt,
        data=[*TEXTS, "a short one"],
        objective=CausalLM(length=24, pack=False),
        modifiers=[MoEX(experts=2)],
        steps=2,
    )
    assert len(layers_of(ckpt)) == 2


# looking on


def test_the_monitor_by_hand() -> None:
    ckpt = upcycled(noise=0.3)
    found = expert_statistics(ckpt, IDS, batch_size=2)
    assert list(found) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    inputs: list[Tensor] = []
    layer = layers_of(ckpt)[0]
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    logits(ckpt)
    handle.remove()
    with torch.no_grad():
        fired_TEF = torch.einsum("td,efd->tef", inputs[0], layer.encoder) > 0
        chosen_TE = layer.features(inputs[0]).unflatten(-1, (4, 48)).ne(0).any(-1)
        active_TEF = fired_TEF & chosen_TE[..., None]
    one = found["model.layers.0.mlp"]
    assert one["load"] == pytest.approx((chosen_TE.double().mean(0) / 2).tolist())
    assert one["l0"] == pytest.approx(float(active_TEF.sum()) / IDS.numel())
    assert one["dead_units"] == pytest.approx(float((~active_TEF.any(0)).double().mean()))
    assert one["expected_l0"] == pytest.approx(one["l0"], rel=0.35)
    with pytest.raises(IntaglioError, match="has no experts of moe_x"):
        expert_statistics(checkpoint(), IDS)


def test_inspect_shows_it(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(TEXTS * 250), encoding="utf-8")
    upcycled().save(tmp_path / "live")
    found = CliRunner().invoke(app, ["inspect", str(tmp_path / "live"), "--experts", str(texts)])
    assert found.exit_code == 0
    assert "model.layers.1.mlp" in found.stdout
    assert "evenness" in found.stdout
    found = CliRunner().invoke(app, ["inspect", str(tmp_path / "live"), "--experts", str(texts), "--json"])
    layers = json.loads(found.stdout)["layers"]
    assert set(layers["model.layers.0.mlp"]) == {"load", "load_entropy", "l0", "expected_l0", "dead_units"}
    for words, sentence in (
        ([str(tiny_checkpoint_dir("llama", tmp_path / "plain")), "--experts", str(texts)], "has no experts of moe_x"),
        ([str(tmp_path / "live"), "--experts", str(texts), "--masks"], "--masks and --experts are given; give one"),
    ):
        refused = CliRunner().invoke(app, ["inspect", *words])
        assert refused.exit_code == 2
        assert sentence in refused.stderr


# bad input


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"experts": 2, "active": 3}, "active is 3 of 2 experts"),
        ({"experts": None, "noise": 0.1}, "experts is null and noise is given"),
        ({"experts": 0}, "greater than or equal to 1"),
        ({"reset": 1.5}, "less than or equal to 1"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"layers": []}, "at least 1 item"),
    ],
)
def test_fields_that_fit_nothing(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        MoEX(**fields)


class NormedMLP(nn.Module):
    """An MLP with something in it that no expert has."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.norm = nn.LayerNorm(32)


def test_models_that_do_not_fit_are_refused_in_a_sentence_and_left_as_they_were() -> None:
    odd = checkpoint()
    odd.model.model.layers[1].mlp = NormedMLP(odd.model.model.layers[1].mlp)
    cases: list[tuple[Checkpoint, dict[str, Any], str]] = [
        (odd, {}, "the MLP of the model family 'llama' is not understood"),
        (
            checkpoint(),
            {"experts": 5, "start": "split"},
            "experts is 5, which does not divide the 48 units of layers.0.mlp",
        ),
        (checkpoint(), {"layers": [0, 2]}, "layers names 2; the model has blocks 0 to 1"),
        (checkpoint(), {"layers": [1, 1]}, "layers names 1 twice"),
        (checkpoint(), {"experts": None}, "experts is null, which trains those that a model has"),
        (upcycled(), {}, "the model has experts of moe_x already"),
    ]
    for ckpt, fields, words in cases:
        before, steps = copy.deepcopy(ckpt.model.state_dict()), len(ckpt.record.steps)
        with pytest.raises(IntaglioError, match=words) as caught:
            MoEX(**fields).apply(ckpt)
        assert "\n" not in str(caught.value)
        assert same(ckpt.model.state_dict(), before)
        assert len(ckpt.record.steps) == steps


def test_training_that_does_not_fit() -> None:
    with pytest.raises(IntaglioError, match="experts is null, and the model has none to train on"):
        run(checkpoint(), modifiers=[MoEX(experts=None)], steps=1)
    with pytest.raises(IntaglioError, match="leave lora and freeze out"):
        run(checkpoint(), modifiers=[MoEX()], steps=1, freeze=True)
    with pytest.raises(IntaglioError, match="leave one of the two out"):
        Recipe.from_dict({"steps": [{"train": {"steps": 1, "modifiers": [{"moe_x": {}}], "lora": {}}}]})


def test_the_cost_of_more_experts(tmp_path: Path) -> None:
    workload = Workload(((32, 32), (48, 32), (48, 32), (32, 48)), 9000, 20000, 32, 512, 64, 4)
    dense = 3 * 32 * 48
    assert MoEX(experts=8).estimate(workload).extra_bytes == 7 * dense * 4
    assert MoEX(experts=8, start="split").estimate(workload).extra_bytes == 0
    few, many = (MoEX(experts=4, active=k).training_cost(workload, 10, 64, 1e6) for k in (1, 4))
    assert many.flops - few.flops == pytest.approx(10 * 6 * 3 * dense * 64)
    assert MoEX(experts=None).training_cost(workload, 10, 64, 1e6).flops == 0
    model = str(tiny_checkpoint_dir("llama", tmp_path / "model", layers=1))
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(TEXTS * 20), encoding="utf-8")
    steps = [{"moe_x": {"experts": 4}}, {"train": {"steps": 1, "modifiers": [{"moe_x": {"experts": None}}]}}]
    recipe = {
        "calibration": {"texts": str(texts), "samples": 2, "length": 16},
        "measure": {"texts": str(texts)},
        "steps": steps,
    }
    planned = plan(Recipe.from_dict(recipe), model=model)
    assert [step["slug"] for step in planned["steps"]] == ["moe_x", "train"]
    for wrong, words in (
        ({"layers": [3]}, "layers names 3"),
        ({"experts": 7, "start": "split"}, "does not divide the 48"),
    ):
        with pytest.raises(IntaglioError, match=words):
            plan(Recipe.from_dict({**recipe, "steps": [{"moe_x": wrong}]}), model=model)
