"""Replaced projections and MLPs: planned, refused, seen by the anatomy, merged, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import intaglio
from intaglio.checkpoint.replacement import ReplacesLinears
from intaglio.errors import IntaglioError
from intaglio.methods import registry
from intaglio.methods.base import Method
from intaglio.methods.registry import Entry
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.replacement import (
    FusedLinears,
    ReplacedLinear,
    ReplacedMLP,
    merge_linears,
    module_names,
    replace_modules,
)
from intaglio.modeling.targets import projections, replace_linears, replace_mlps
from tests.families import FAMILIES, tiny_model


def tiny(family: str) -> intaglio.Checkpoint:
    return intaglio.Checkpoint(tiny_model(family), None, family)


class Signs(ReplacedLinear):
    slug = "signs"

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.positive = nn.Parameter(torch.zeros(outputs, inputs, dtype=torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(()))

    @classmethod
    def of(cls, weight_OI: Tensor) -> Signs:
        found = cls(weight_OI.shape[1], weight_OI.shape[0])
        found.positive.data = (weight_OI > 0).to(torch.uint8)
        found.scale.data = weight_OI.abs().mean()
        return found

    def dense(self) -> Tensor:
        return (2 * self.positive.float() - 1) * self.scale.float()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().to(x.dtype).T


class AsSigns(ReplacesLinears, Method, slug="signs"):
    module_types: ClassVar[tuple[type[ReplacedLinear], ...]] = (Signs,)

    @classmethod
    def build_empty(cls, part: Mapping[str, Any], model: nn.Module) -> None:
        replace_modules(model, {name: Signs(*sizes) for name, sizes in part["modules"].items()})

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: intaglio.Checkpoint) -> None:
        assert all(isinstance(checkpoint.model.get_submodule(name), Signs) for name in part["modules"])


@pytest.fixture
def signs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.METHODS, "signs", Entry("signs", "", "AsSigns", __name__, ("carving",), ""))


def carve(checkpoint: intaglio.Checkpoint, mlp_only: bool = False) -> list[str]:
    parts, names = anatomy(checkpoint.model), module_names(checkpoint.model)
    found = {
        names[id(linear.module)]: Signs.of(linear.read())
        for _, linear in parts.all_linears()
        if linear.rows is None and not (mlp_only and linear.part == "attention")
    }
    replace_modules(checkpoint.model, found)
    checkpoint.record_step("signs", {})
    checkpoint.set_runtime_state("signs", {"modules": {n: [m.in_features, m.out_features] for n, m in found.items()}})
    return list(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_replaced_projections_are_saved_and_read_again(family: str, signs: None, tmp_path: Any) -> None:
    checkpoint = tiny(family)
    names = carve(checkpoint)
    parts = anatomy(checkpoint.model)
    listed = {id(linear.module) for _, linear in parts.all_linears()}
    assert not any(isinstance(module, ReplacedLinear) and id(module) in listed for module in checkpoint.model.modules())
    ids = torch.arange(8)[None]
    before = checkpoint.model(input_ids=ids)[0]
    checkpoint.save(tmp_path / "out")
    again = intaglio.load(tmp_path / "out")
    assert again.kind == "runtime"
    assert torch.equal(again.model(input_ids=ids)[0], before)
    module = again.model.get_submodule(names[0])
    assert module.positive.dtype == torch.uint8
    assert not again.model.is_quantized
    assert not hasattr(again.model.config, "quantization_config")
    again.save(tmp_path / "twice")
    assert (tmp_path / "twice" / "live.safetensors").read_bytes() == (tmp_path / "out/live.safetensors").read_bytes()


def test_loading_in_half_precision_leaves_whole_numbers_alone(signs: None, tmp_path: Any) -> None:
    checkpoint = tiny("llama")
    names = carve(checkpoint, mlp_only=True)
    checkpoint.save(tmp_path / "out")
    module = intaglio.load(tmp_path / "out", dtype="bfloat16").model.get_submodule(names[0])
    assert (module.positive.dtype, module.scale.dtype) == (torch.uint8, torch.bfloat16)


def test_a_part_that_does_not_fit_is_one_sentence(signs: None, tmp_path: Any) -> None:
    checkpoint = tiny("llama")
    carve(checkpoint)
    checkpoint.record.live = [{"slug": "signs", "modules": {"model.nowhere.at_all": [8, 8]}}]
    checkpoint.save(tmp_path / "out")
    with pytest.raises(IntaglioError, match="no module model"):
        intaglio.load(tmp_path / "out")


def test_joined_parts_give_the_rows_of_the_fused_module() -> None:
    whole = torch.randn(6, 4)
    rows = [torch.tensor([0, 2, 4]), torch.tensor([5, 1, 3])]
    joined = FusedLinears([Signs.of(whole[places]) for places in rows], rows)
    dense = joined.dense()
    for part, places in zip(joined.parts, rows, strict=True):
        assert torch.equal(dense[places], part.dense())
    x = torch.randn(3, 4)
    torch.testing.assert_close(joined(x), x @ dense.T)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@torch.no_grad()
def test_merging_gives_stock_layers_with_the_same_matrix(family: str) -> None:
    model = tiny_model(family)
    names = [name for name, _ in projections(model)]
    made = replace_linears(model, names, lambda name, linear: Signs.of(linear.read()))
    assert list(made) == names
    assert projections(model) == []
    ids = torch.arange(8)[None]
    before = model(input_ids=ids).logits
    merged = merge_linears(model, (Signs,))
    assert [name for name, _ in projections(model)] == names
    assert len(merged) == len({name.partition("[")[0] for name in names})
    torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"targets": ["*.nowhere"]}, r"targets: '\*\.nowhere' names no layer of this model; its first is layers\.0"),
        ({"ignore": ["*"]}, "targets and ignore leave no layer of this model to replace"),
        ({"ignore": ["*qkv_proj[[]q]"]}, "are one module of this model; name both or neither"),
    ],
)
def test_targets_that_do_not_fit_are_refused_in_a_sentence(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(IntaglioError, match=match):
        AsSigns(**fields).plan(tiny_model("phi3"))


def test_a_model_without_plain_projections_is_refused() -> None:
    model = tiny_model("llama")
    replace_linears(model, AsSigns().plan(model), lambda name, linear: Signs.of(linear.read()))
    with pytest.raises(IntaglioError, match="no projection of this model is a plain matrix, so signs has nothing"):
        AsSigns().plan(model)
    with pytest.raises(IntaglioError, match="the model has no projection named layers"):
        replace_linears(model, ["layers.9.mlp.up_proj"], lambda name, linear: Signs(1, 1))
    AsSigns.check_restored(model, len(AsSigns.modules_of(model)))
    with pytest.raises(IntaglioError, match="layers of signs, and its record names 3"):
        AsSigns.check_restored(model, 3)


def test_any_module_has_projections_and_tied_ones_are_refused() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5)))
    assert AsSigns().plan(net) == ["1.0", "1.1"]
    net[1][1].weight = net[0].weight
    assert AsSigns(ignore=["1.1"]).plan(net) == ["1.0"]
    with pytest.raises(IntaglioError, match=r"0 and 1\.1 share one weight, so they cannot be replaced"):
        AsSigns().plan(net)


def test_training_beside_adapters_or_frozen_weights_is_refused() -> None:
    method, net = AsSigns(), nn.Linear(2, 2)
    method.refuse_frozen(net)
    with pytest.raises(IntaglioError, match="signs trains weights of the layers that it replaces; leave lora and"):
        method.refuse_frozen(net.requires_grad_(False))
    adapted = nn.Linear(2, 2)
    adapted.peft_config = {"default": {}}  # type: ignore[assignment]
    with pytest.raises(IntaglioError, match="leave lora and freeze out"):
        method.refuse_frozen(adapted)


class Doubles(ReplacedMLP):
    slug = "doubles"

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.weight = nn.Parameter(torch.zeros(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x @ self.weight


class AsDoubles(Method, slug="doubles"):
    @classmethod
    def build_empty(cls, part: Mapping[str, Any], model: nn.Module) -> None:
        replace_mlps(model, lambda index, parts: Doubles(part["width"]))

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: intaglio.Checkpoint) -> None:
        assert sum(isinstance(module, Doubles) for module in checkpoint.model.modules()) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_replaced_mlps_are_saved_and_read_again(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setitem(registry.METHODS, "doubles", Entry("doubles", "", "AsDoubles", __name__, ("carving",), ""))
    checkpoint = tiny(family)
    parts = anatomy(checkpoint.model)
    attention = [name for name, linear in parts.all_linears() if linear.part == "attention"]
    torch.manual_seed(0)
    made = replace_mlps(checkpoint.model, lambda index, parts: Doubles(parts.config.hidden_size))
    assert list(made) == [0, 1, 2, 3]
    for module in made.values():
        nn.init.normal_(module.weight, std=0.2)
    parts = anatomy(checkpoint.model)
    assert [name for name, _ in parts.all_linears()] == attention
    with pytest.raises(IntaglioError, match="not the model's own: doubles replaced"):
        parts.feed_forwards()
    checkpoint.record_step("doubles", {})
    checkpoint.set_runtime_state("doubles", {"width": parts.config.hidden_size})
    ids = torch.arange(8)[None]
    before = checkpoint.model(input_ids=ids)[0]
    checkpoint.save(tmp_path / "out")
    assert torch.equal(intaglio.load(tmp_path / "out").model(input_ids=ids)[0], before)
