"""Progressive N:M: masks, schedules, gradients, and what is left in the checkpoint."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from intaglio.errors import IntaglioError
from intaglio.methods.objectives.meap import MEAP
from intaglio.methods.weights.magnitude import Magnitude
from intaglio.methods.weights.progressive_nm import ProgressiveNM, Schedule, keep_mask
from intaglio.methods.weights.progressive_nm.masked_weights import (
    LAMBDA,
    MaskedWeights,
    PrunedLayer,
    straight_through,
)
from intaglio.methods.weights.progressive_nm.parametrization import Part, ProgressiveMask
from intaglio.methods.weights.prunable_layers import prunable_layers
from intaglio.methods.weights.sparsity_target import lowest_of_groups, pruned_count
from intaglio.modeling.anatomy import anatomy
from intaglio.recipe.schema import Recipe
from intaglio.trainer import Example, KeyedRNG, Loss, TrainingRun
from tests.alive import alive
from tests.families import tiny_model
from tests.trainer.helpers import checkpoint, run, same, weights

EXAMPLES = (
    {"pattern": "1:8"},
    {"pattern": "2:4", "recipe": "sr-ste", "targets": ["mlp", "q", "k", "v", "o"], "attention": "1:4"},
    {"pattern": "1:4", "recipe": "custom", "custom": {"0": "3:4", "1": "2:4"}, "masked_momentum": True, "dense": 0.0},
    {"sparsity": 0.75, "recipe": "mdgf-linear", "masked_momentum": True, "along": "outputs", "finetune": 0.4},
)
ALIVE = {
    "sparsity": alive(0.75, pattern=None, sparsity=0.5),
    "pattern": "1:4",
    "ignore": ["layers.0.mlp.up_proj"],
    "recipe": "mdgf-linear",
    "targets": ["mlp", "q"],
    "attention": alive("1:4", targets=["mlp", "q"]),
    "dense": 0.5,
    "finetune": 0.5,
    "decay": 0.1,
    "gradient": "ste",
    "sr_decay": alive(0.1, recipe="sr-ste"),
    "custom": alive({"2": "2:4"}, recipe="custom", custom={"1": "2:4"}),
    "along": "outputs",
    "masked_momentum": alive(True, recipe="mdgf-linear", dense=0.25, finetune=0.5),
}
RECIPES: list[Any] = ["mdgf-exp", "mdgf-linear", "sdgf-stepwise", "sdgf-geometric", "sdgf-densify", "ste", "sr-ste"]
PATTERNS = [(1, 2), (2, 4), (3, 4), (1, 8), (7, 8), (1, 16), (2, 16), (5, 16), (1, 32), (3, 32)]


def linear(weight: Any, *, bias: bool = False) -> nn.Linear:
    tensor = torch.tensor(weight) if not isinstance(weight, Tensor) else weight
    made = nn.Linear(tensor.shape[1], tensor.shape[0], bias=bias)
    made.weight.data.copy_(tensor)
    return made


def masked_weights(
    model: nn.Module,
    n: int = 1,
    m: int = 4,
    recipe: Any = "mdgf-exp",
    *,
    grad: Any = "chain",
    sr_decay: float = LAMBDA,
    ignore: tuple[str, ...] = (),
    steps: int = 100,
    **more: Any,
) -> MaskedWeights:
    schedule = Schedule((n, m), steps, recipe, **more)
    layers = [PrunedLayer(name, module, (Part(schedule),)) for name, module in prunable_layers(model, ignore)]
    return MaskedWeights(layers, "inputs", *straight_through(recipe, grad, sr_decay))


def original(layer: nn.Module) -> nn.Parameter:
    found: Any = layer.parametrizations.weight  # type: ignore[union-attr]
    return found.original


# Masks


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PATTERNS), st.integers(0, 1000), st.sampled_from([0.25, 1.0, 1e-3]), st.booleans())
def test_a_mask_keeps_exactly_n_of_every_m_the_same_as_a_stable_sort(
    pattern: tuple[int, int], seed: int, grain: float, half: bool
) -> None:
    keep, of = pattern
    weight = torch.randn(6, 2 * of, generator=torch.Generator().manual_seed(seed))
    weight = (weight / grain).round() * grain  # with ties
    weight = weight.bfloat16() if half else weight
    mask = keep_mask(weight, pattern)
    assert bool((mask.view(-1, of).sum(1) == keep).all())
    assert torch.equal(mask, ~lowest_of_groups(weight.abs(), keep, of))
    assert torch.equal(mask, keep_mask(weight * 4, pattern))
    assert torch.equal(mask, keep_mask(weight * torch.sign(torch.randn(weight.shape)).to(weight.dtype), pattern))
    assert torch.equal(keep_mask(weight.T, pattern, axis=0), mask.T)


@pytest.mark.parametrize("pattern", [(1, 257), (2, 4), (1, 16)])
def test_where_all_are_equal_the_last_of_a_group_are_kept(pattern: tuple[int, int]) -> None:
    keep, of = pattern
    weight = torch.ones(2, 3 * of)
    weight[0, :of] = torch.arange(of)
    expected = torch.zeros(of, dtype=torch.bool)
    expected[-keep:] = True
    assert torch.equal(keep_mask(weight, pattern), expected.repeat(2, 3))


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 0.99), st.integers(0, 100))
def test_a_share_is_of_the_whole_tensor(sparsity: float, seed: int) -> None:
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed))
    mask = keep_mask(weight, sparsity)
    assert int((~mask).sum()) == pruned_count(60, sparsity)
    if mask.any() and not mask.all():
        assert weight.abs()[~mask].max() <= weight.abs()[mask].min()


def test_groups_of_a_convolution_run_along_its_channels() -> None:
    weight = torch.randn(3, 8, 2, 2)
    mask = keep_mask(weight, (1, 4))
    assert bool((mask.permute(0, 2, 3, 1).reshape(-1, 4).sum(1) == 1).all())


# Schedules


def test_frames_are_those_of_the_paper() -> None:
    def frames(recipe: Any, n: int, m: int) -> list[Any]:
        return Schedule((n, m), 100, recipe).patterns()

    assert frames("sdgf-stepwise", 1, 8) == [(7, 8), (4, 8), (2, 8), (1, 8)]
    assert frames("sdgf-stepwise", 2, 4) == [(3, 4), (2, 4)]
    assert frames("sdgf-geometric", 1, 8) == [(8, 64), (4, 32), (2, 16), (1, 8)]
    assert frames("sdgf-densify", 1, 8) == [(1, 64), (1, 32), (1, 16), (1, 8)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(RECIPES),
    st.integers(1, 400),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.sampled_from([(1, 4), (2, 4), (1, 16)]),
)
def test_phases_are_ranges_of_steps(
    recipe: Any, steps: int, dense: float, finetune: float, amount: tuple[int, int]
) -> None:
    schedule = Schedule(amount, steps, recipe, dense, finetune)
    moments = [schedule.at(t) for t in range(1, steps + 1)]
    order = ["dense", "tightening", "sparse"]
    assert [m.phase for m in moments] == sorted((m.phase for m in moments), key=order.index)
    assert sum(m.phase == "dense" for m in moments) == min(steps, round(dense * steps))
    assert all(0 <= m.z <= 1 for m in moments)
    assert [m.z for m in moments] == sorted((m.z for m in moments), reverse=True)
    assert all(m.z == 0 and m.amount == amount for m in moments if m.phase == "sparse")
    assert schedule.at(steps + 1) == schedule.at(10 * steps + 1)
    if recipe.startswith("sdgf") and schedule.span >= len(schedule.patterns()):
        seen = [m.amount for m in moments if m.phase == "tightening"]
        assert [a for n, a in enumerate(seen) if n == 0 or seen[n - 1] != a] == schedule.patterns()
        counts = [seen.count(pattern) for pattern in schedule.patterns()]
        assert max(counts) - min(counts) <= 1


def test_z_falls_as_the_recipe_says() -> None:
    for steps in (100, 1000):
        linear_, exponential = (Schedule((1, 4), steps, recipe, 0.1, 0.2) for recipe in ("mdgf-linear", "mdgf-exp"))
        begin, end = steps // 10 + 1, steps - steps // 5
        assert linear_.at(begin - 1).z == linear_.at(begin).z == exponential.at(begin).z == 1
        assert 0 < linear_.at(end).z < 2 / (0.7 * steps)
        assert exponential.at(end).z == pytest.approx(0.01, rel=0.1)
        assert linear_.at(end + 1).z == exponential.at(end + 1).z == 0
    given_ = Schedule((1, 4), 10**6, "mdgf-exp", 0, 0, decay=1e-4)
    assert given_.at(10_001).z == pytest.approx(math.exp(-1))
    assert Schedule((1, 4), 10**6, "mdgf-linear", 0, 0, decay=8e-4).at(1001).z == pytest.approx(0.2)


def test_custom_frames_begin_at_shares_and_steps() -> None:
    frames = {0.1: (7, 8), 30: (4, 8)}
    schedule = Schedule((1, 8), 100, "custom", 0.0, 0.5, frames=frames)
    found = [(m.phase, m.amount) for m in (schedule.at(t) for t in (1, 10, 11, 30, 31, 50, 51))]
    assert found == [
        ("dense", (1, 8)), ("dense", (1, 8)), ("tightening", (7, 8)), ("tightening", (7, 8)), ("tightening", (4, 8)),
        ("tightening", (4, 8)), ("sparse", (1, 8)),
    ]  # fmt: skip


def test_work_counts_what_the_products_need() -> None:
    def work(recipe: Any, t: int, gradient: Any = "chain") -> float:
        return Schedule((1, 16), 100, recipe, 0.1 if "gf" in recipe else 0.0, 0.2).work(t, gradient)

    assert work("ste", 1) == work("sr-ste", 100) == pytest.approx((2 / 16 + 1) / 3)
    assert work("mdgf-exp", 1) == work("mdgf-exp", 80) == 1  # no weight is zero while z > 0
    assert work("mdgf-exp", 81) == pytest.approx(1 / 16)
    assert work("mdgf-exp", 81, "ste") == work("ste", 1)
    assert work("sdgf-stepwise", 11) == pytest.approx(15 / 16)


# One weight


def test_the_worked_example() -> None:
    weight, ones = [[0.5, -0.1, 0.3, -0.9]], torch.ones(1, 4)
    grads: dict[Any, Tensor] = {}
    for grad in ("chain", "ste"):
        layer = linear(weight)
        schedule = Schedule((1, 4), 100, "mdgf-linear", 0, 0, decay=0.4)
        mask = ProgressiveMask((Part(schedule),), 1, 0, grad)  # type: ignore[arg-type]
        parametrize.register_parametrization(layer, "weight", mask)
        mask.set(2)
        assert mask.keep(layer.weight).tolist() == [[False, False, False, True]]
        torch.testing.assert_close(layer.weight.detach(), torch.tensor([[0.3, -0.06, 0.18, -0.9]]))
        (layer.weight * ones).sum().backward()
        grads[grad] = original(layer).grad
    torch.testing.assert_close(grads["chain"], torch.tensor([[0.6, 0.6, 0.6, 1.0]]))
    torch.testing.assert_close(grads["ste"], ones)
    layer = linear(weight)
    masked_weights(layer_model := nn.Sequential(layer), recipe="sr-ste")
    layer_model[0].weight.sum().backward()
    torch.testing.assert_close(
        original(layer).grad, torch.tensor([[1 + 1e-4, 1 - 2e-5, 1 + 6e-5, 1.0]]), rtol=0, atol=1e-7
    )


class ReferenceSRSTE(torch.autograd.Function):
    """SR-STE from its published equation: forward m w, backward g + lambda (1 - m) w."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, n: int, m: int, pull: float) -> Tensor:
        order = weight.abs().reshape(-1, m).argsort(dim=1, stable=True)[:, : m - n]
        mask = torch.ones(weight.numel() // m, m).scatter_(1, order, 0.0).reshape(weight.shape)
        ctx.save_for_backward(weight, mask)
        ctx.pull = pull
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, mask = ctx.saved_tensors
        return gradients[0] + ctx.pull * (1 - mask) * weight, None, None, None


@pytest.mark.parametrize("pattern", [(2, 4), (1, 8), (1, 16)])
@pytest.mark.parametrize("pull", [0.0, 2e-4, 0.1])
def test_sr_ste_is_its_published_equation(pattern: tuple[int, int], pull: float) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(8, 32), torch.randn(5, 32)
    peer = weight.clone().requires_grad_()
    layer = linear(weight)
    model = nn.Sequential(layer)
    masked_weights(model, *pattern, "sr-ste", steps=4, sr_decay=pull).set(1)
    for w, out in ((peer, x @ ReferenceSRSTE.apply(peer, *pattern, pull).T), (original(layer), model(x))):
        out.square().sum().backward()
        assert w.grad is not None
    torch.testing.assert_close(original(layer).grad, peer.grad)
    torch.testing.assert_close(model(x), x @ ReferenceSRSTE.apply(peer, *pattern, pull).T)


def grads_of(recipe: Any, **more: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    layer, x = linear(torch.randn(4, 16)), torch.randn(3, 16)
    masked_weights(nn.Sequential(layer), recipe=recipe, **more).set(more.pop("t", 100))
    out = layer(x)
    out.square().sum().backward()
    assert original(layer).grad is not None
    return out.detach(), original(layer).grad  # type: ignore[return-value]


def test_limits_in_which_recipes_are_one_another() -> None:
    out, grad = grads_of("ste")
    for recipe, more in (
        ("sr-ste", {"sr_decay": 0.0}),
        ("mdgf-linear", {"grad": "ste"}),  # z = 0 in fine-tuning
        ("sdgf-stepwise", {"grad": "ste"}),
    ):
        other = grads_of(recipe, **more)
        assert torch.equal(other[0], out)
        assert torch.equal(other[1], grad)
    frozen = grads_of("mdgf-linear")
    assert torch.equal(frozen[0], out)
    torch.manual_seed(1)
    assert torch.equal(frozen[1], grad * keep_mask(torch.randn(4, 16), (1, 4)))


def test_a_huge_c_is_ste_after_one_step() -> None:
    torch.manual_seed(0)
    layer, plain = linear(torch.randn(4, 16)), linear(torch.zeros(4, 16))
    plain.weight.data.copy_(layer.weight.data)
    decayed = masked_weights(nn.Sequential(layer), grad="ste", decay=1e6, dense=0.0, finetune=0.0)
    masked_weights(nn.Sequential(plain), recipe="ste").set(2)
    decayed.set(1)
    assert torch.equal(layer.weight, original(layer))
    decayed.set(2)
    assert torch.equal(layer.weight, plain.weight)


@pytest.mark.parametrize("recipe", RECIPES)
def test_dense_where_nothing_is_pruned_yet_and_where_n_is_m(recipe: Any) -> None:
    torch.manual_seed(0)
    layer = linear(torch.randn(4, 32), bias=True)
    plain, x = copy.deepcopy(layer), torch.randn(3, 32)
    masked_weights(nn.Sequential(layer), 1, 4, recipe, dense=0.1).set(10)
    assert torch.equal(layer(x), plain(x))
    full = copy.deepcopy(plain)
    whole = masked_weights(nn.Sequential(full), 4, 4, recipe)
    for t in (1, 50, 100):
        whole.set(t)
        assert torch.equal(full(x), plain(x))
    whole.bake()
    assert torch.equal(full(x), plain(x))


def test_stepwise_masks_of_a_fixed_weight_are_nested() -> None:
    layer = linear(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    nm = masked_weights(nn.Sequential(layer), 1, 8, "sdgf-stepwise")
    seen = []
    for t in (10, 30, 50, 70, 90):
        nm.set(t)
        seen.append(nm.masks()["0"])
    assert [int(mask.sum()) for mask in seen] == [448, 256, 128, 64, 64]
    assert all(bool((later & ~earlier).sum() == 0) for earlier, later in pairwise(seen))


def test_chain_leaves_pruned_weights_where_they_are_once_z_is_zero() -> None:
    torch.manual_seed(0)
    layer, x = linear(torch.randn(4, 16)), torch.randn(20, 16)
    model = nn.Sequential(layer)
    nm = masked_weights(model, finetune=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    nm.set(60)
    before, mask = original(layer).detach().clone(), nm.masks()["0"]
    for t in range(60, 70):
        nm.set(t)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(original(layer)[~mask], before[~mask])
    assert not torch.equal(original(layer)[mask], before[mask])


@pytest.mark.parametrize("masked", [False, True])
def test_momentum_moves_pruned_weights_unless_it_is_masked(masked: bool) -> None:
    torch.manual_seed(0)
    layer, x = linear(torch.randn(4, 16)), torch.randn(20, 16)
    model = nn.Sequential(layer)
    nm = masked_weights(model, finetune=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0)
    for t in range(45, 56):
        nm.set(t)
        if t == 51:
            before, mask = original(layer).detach().clone(), nm.masks()["0"]
            assert nm.now.z == 0
        if masked and nm.now.z == 0:
            nm.mask_momentum(optimizer)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(original(layer)[~mask], before[~mask]) is masked
    assert nm.pruned_moment(optimizer) is not None
    assert nm.pruned_moment(torch.optim.SGD(model.parameters(), lr=1.0)) is None


# Whole models


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3)
        self.hidden = nn.Linear(16, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.conv(x).amax((2, 3))).relu())


@pytest.mark.parametrize("recipe", RECIPES)
def test_any_module_is_trained_and_baked(recipe: Any) -> None:
    torch.manual_seed(0)
    model = Net()
    kinds = [type(module) for module in model.modules()]
    parameters = {id(parameter) for parameter in model.parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wide = recipe in ("sdgf-geometric", "sdgf-densify")
    nm = masked_weights(model, 1, 2 if wide else 4, recipe, steps=6, ignore=("head", *(["conv"] if wide else [])))
    x, y = torch.randn(4, 8, 6, 6), torch.randint(10, (4,))
    for t in range(1, 7):
        nm.set(t)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    live = model.eval()(x)
    masks = nm.masks()
    nm.bake()
    assert torch.equal(model(x), live)
    assert [type(module) for module in model.modules()] == kinds
    assert {id(parameter) for parameter in model.parameters()} == parameters
    for name, mask in masks.items():
        assert torch.equal(model.get_submodule(name).weight != 0, mask)
    assert bool((model.head.weight != 0).all())


def test_while_evaluating_the_model_is_the_sparse_one() -> None:
    model = Net()
    nm = masked_weights(model, ignore=("head",))
    nm.set(1)
    assert (nm.now.z, nm.zeros) == (1.0, 0.0)
    x = torch.randn(2, 8, 6, 6)
    sparse, dense = model.eval()(x), model.train()(x)
    assert not torch.equal(sparse, dense)
    nm.bake()
    assert torch.equal(model(x), sparse)


@pytest.mark.parametrize("along", ["inputs", "outputs"])
def test_fused_layers_get_the_masks_of_their_projections(along: Any) -> None:
    for family in ("phi3", "gpt2", "gpt_neox", "llama"):
        model = tiny_model(family, layers=1)
        dense = dict(anatomy(copy.deepcopy(model)).all_linears())
        method = ProgressiveNM(pattern="2:4", targets=["mlp", "q", "v"], attention="1:4", along=along)
        ckpt = checkpoint(family, layers=1)
        whole = TrainingRun(ckpt, 10, 4, 0, lambda batch: None)  # type: ignore[arg-type, return-value]
        method.attach(whole).detach()
        for name, linear_ in anatomy(ckpt.model).all_linears():
            before, after = dense[name].read(), linear_.read()
            if linear_.part == "attention" and linear_.role not in ("q", "v"):
                assert torch.equal(before, after), name
            else:
                amount = (1, 4) if linear_.part == "attention" else (2, 4)
                keep = keep_mask(before, amount, 1 if along == "inputs" else 0)
                assert torch.equal(after, before * keep), name


def test_a_run_leaves_a_stock_checkpoint_with_exactly_n_of_m(tmp_path: Path) -> None:
    ckpt = checkpoint()
    before = weights(ckpt)
    done = run(ckpt, modifiers=[ProgressiveNM(pattern="1:8", ignore=["layers.0.mlp.up_proj"])], weight_decay=0.1)
    assert [line.parts["z"] for line in done.history][-2:] == [0.0, 0.0]
    assert done.history[-1].parts["sparsity"] == 0.875
    assert done.history[-1].parts["second moment where pruned"] > 0
    ckpt.save(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(8, 150, (2, 12))
    assert torch.equal(stock(ids).logits, ckpt.model(ids).logits)
    for name, linear_ in anatomy(stock).all_linears():
        kept = (linear_.read().reshape(-1, 8) != 0).sum(1)
        pruned = linear_.part == "mlp" and name != "layers.0.mlp.up_proj"
        assert kept.unique().tolist() == ([1] if pruned else [8]), name
    assert set(before) == set(weights(ckpt))


def test_biases_are_kept_and_trained() -> None:
    ckpt = checkpoint("gpt2", layers=1)
    name = "transformer.h.0.mlp.c_fc.bias"
    before = weights(ckpt)[name]
    run(ckpt, modifiers=[ProgressiveNM(pattern="1:8")], steps=3)
    after = weights(ckpt)[name]
    assert not torch.equal(before, after)
    assert bool((after != 0).all())


def test_lambda_is_added_once_a_step_however_many_batches_it_has() -> None:
    found = []
    for accumulate in (1, 4):
        ckpt = checkpoint(layers=1)
        method = ProgressiveNM(pattern="1:8", recipe="sr-ste", sr_decay=0.5)
        session = method.attach(TrainingRun(ckpt, 10, 4, 0, lambda batch: None, accumulate))  # type: ignore[arg-type, return-value]
        session.before_step(1, {})
        layer = anatomy_free(ckpt.model)
        for _ in range(accumulate):
            (layer.weight.sum() / accumulate).backward()  # what Trainer's division makes of each batch
        found.append(original(layer).grad)
    torch.testing.assert_close(found[0], found[1])


def anatomy_free(model: nn.Module) -> nn.Linear:
    found = model.get_submodule("model.layers.0.mlp.up_proj").train()
    assert isinstance(found, nn.Linear)
    return found


def test_it_goes_with_meap() -> None:
    ckpt = checkpoint()
    done = run(ckpt, objective=MEAP(length=24), modifiers=[ProgressiveNM(pattern="2:4")], steps=4)
    assert done.history[-1].parts["z"] == 0
    for _, linear_ in anatomy(ckpt.model).all_linears():
        if linear_.part == "mlp":
            assert bool(((linear_.read().reshape(-1, 4) != 0).sum(1) == 2).all())


def test_gradient_checkpointing_changes_nothing() -> None:
    found = []
    for wanted in (False, True):
        ckpt = checkpoint()
        run(ckpt, modifiers=[ProgressiveNM(pattern="1:8")], steps=3, gradient_checkpointing=wanted)
        found.append(weights(ckpt))
    assert same(*found)


def test_the_weights_are_stock_after_an_error_too() -> None:
    ckpt = checkpoint()

    def dies(done: int, total: int, what: str) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(ckpt, modifiers=[ProgressiveNM(pattern="1:8")], progress=dies)
    assert not any(parametrize.is_parametrized(module) for module in ckpt.model.modules())


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give either sparsity or pattern"),
        ({"pattern": "4:4"}, "keeps 4 of 4"),
        ({"pattern": "1:8", "recipe": "custom"}, "belongs to the recipe custom and to no other"),
        ({"pattern": "1:8", "custom": {"0": "2:8"}}, "belongs to the recipe custom and to no other"),
        ({"pattern": "1:8", "recipe": "custom", "custom": {"1.5": "2:8"}}, "custom has the start '1.5'"),
        ({"pattern": "1:8", "recipe": "custom", "custom": {"0": "9:8"}}, "keeps 9 of 8"),
        ({"pattern": "3:8", "recipe": "sdgf-stepwise"}, "halves what is kept, and the pattern 3:8"),
        ({"sparsity": 0.5, "recipe": "sdgf-densify"}, "tightens a pattern; give pattern"),
        ({"pattern": "1:8", "dense": 0.6, "finetune": 0.6}, "together they are at most 1"),
        ({"pattern": "1:8", "attention": "1:4"}, "targets has none of q, k, v and o"),
        ({"pattern": "1:8", "targets": []}, "at least 1 item"),
        ({"pattern": "1:8", "decay": -1.0}, "greater than or equal to 0"),
    ],
)
def test_fields_that_contradict_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ProgressiveNM(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"pattern": "1:5"},
            r"the pattern 1:5 does not fit layers.0.mlp.gate_proj: its 32 inputs are not a multiple of 5",
        ),
        (
            {"pattern": "1:8", "recipe": "sdgf-geometric"},
            "the pattern 8:64, a frame of sdgf-geometric, does not fit layers.0.mlp.gate_proj",
        ),
        ({"pattern": "1:8", "ignore": ["*.lm_head"]}, r"ignore: '\*\.lm_head' names no layer"),
        ({"pattern": "1:8", "ignore": ["*"]}, "names every layer"),
    ],
)
def test_a_model_that_it_does_not_fit_is_refused_before_it_is_touched(fields: dict[str, Any], message: str) -> None:
    ckpt = checkpoint()
    with pytest.raises(IntaglioError, match=message):
        run(ckpt, modifiers=[ProgressiveNM(**fields)])
    with pytest.raises(IntaglioError, match=message):  # and from the configuration alone
        train_step(fields).check_model(anatomy(ckpt.model))
    assert not any(parametrize.is_parametrized(module) for module in ckpt.model.modules())


def train_step(fields: dict[str, Any], **more: Any) -> Any:
    document = {"steps": [{"train": {"steps": 2, "modifiers": [{"progressive_nm": fields}], **more}}]}
    (step,) = Recipe.from_dict(document).steps
    return step


def test_lora_and_frozen_weights_are_refused_in_one_sentence() -> None:
    for more in ({"lora": {"r": 2}}, {"freeze": True}):
        with pytest.raises(IntaglioError, match="progressive_nm trains the weights themselves") as caught:
            train_step({"pattern": "1:8"}, **more)
        assert "\n" not in str(caught.value)
        ckpt = checkpoint()
        with pytest.raises(IntaglioError, match="trains whole weights, which lora and freeze hold still"):
            run(ckpt, modifiers=[ProgressiveNM(pattern="1:8")], **more)


class Squares:
    """Regression of a network's outputs to zero."""

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> dict[str, Any]:
        return {"x": torch.stack([example["x"] for example in examples])}

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Loss:
        return Loss(model(batch["x"]).square().mean())


def trained(model: nn.Module, **fields: Any) -> Any:
    data = [{"x": torch.randn(8, 6, 6)} for _ in range(8)]
    return run(model, data, objective=Squares(), modifiers=[ProgressiveNM(**fields)], steps=10)


def test_any_module_is_trained_by_the_modifier() -> None:
    model = Net()
    done = trained(model, pattern="1:4", ignore=["head"])
    assert done.history[-1].parts["z"] == 0
    assert done.history[-1].parts["sparsity"] == 0.75
    for weight in (model.conv.weight.movedim(1, -1), model.hidden.weight):
        assert bool(((weight.reshape(-1, 4) != 0).sum(1) == 1).all())
    assert bool((model.head.weight != 0).all())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "1:3"}, "does not fit conv: its 8 inputs are not a multiple of 3"),
        (
            {"pattern": "1:4", "ignore": ["nothing"]},
            "ignore: 'nothing' names no layer of this model",
        ),
        ({"pattern": "1:4", "ignore": ["*"]}, "names every layer"),
        ({"pattern": "1:4", "targets": ["q"]}, r"targets is \['q'\], which is for transformers, not Net"),
    ],
)
def test_a_module_that_it_does_not_fit_is_refused_in_one_sentence(fields: dict[str, Any], message: str) -> None:
    model = Net()
    with pytest.raises(IntaglioError, match=message):
        trained(model, **fields)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_a_shared_weight_is_refused() -> None:
    model = tiny_model("gemma3", layers=1)
    with pytest.raises(IntaglioError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        masked_weights(model)
    masked_weights(model, ignore=("lm_head",))


@pytest.mark.slow
def test_a_compiled_model_follows_z() -> None:
    torch.manual_seed(0)
    layer, x = linear(torch.randn(4, 16)), torch.randn(3, 16)
    nm = masked_weights(nn.Sequential(layer))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for t in (20, 40, 60, 90):
        nm.set(t)
        assert torch.equal(compiled(x), layer(x))


def test_a_second_parametrization_is_refused() -> None:
    model = Net()
    masked_weights(model, ignore=("head",))
    with pytest.raises(IntaglioError, match=r"conv\.weight is parametrized already"):
        masked_weights(model, ignore=("head",))


def test_the_paper_ships_these_constants() -> None:
    assert ProgressiveNM.paper().decay == 1e-4
    assert ProgressiveNM.paper(recipe="mdgf-linear", pattern="1:8").decay == 8e-4
    shipped = ProgressiveNM.paper()
    assert (shipped.pattern, shipped.dense, shipped.finetune, shipped.gradient) == ("1:32", 0.0, 0.0, "ste")


def test_a_pruned_model_may_be_trained_on_with_new_zeros() -> None:
    ckpt = Magnitude(pattern="2:4").apply(checkpoint())
    run(ckpt, modifiers=[ProgressiveNM(pattern="1:8")], steps=3)
    for _, linear_ in anatomy(ckpt.model).all_linears():
        assert bool(((linear_.read().reshape(-1, 8) != 0).sum(1) <= (1 if linear_.part == "mlp" else 8)).all())
