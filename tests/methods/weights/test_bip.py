"""BiP: the facts of the paper, one by one, on masked models and as a training modifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.errors import IntaglioError
from intaglio.methods.weights.bip import BiP, MaskedModel, upper_gradient
from intaglio.methods.weights.bip.masked_model import Masked, score_gradients, score_rate
from intaglio.methods.weights.bip.masks import magnitude_masks, unit_scores
from intaglio.methods.weights.bip.prunable_units import _heads, find_layers, find_units
from intaglio.methods.weights.topk import keep_largest
from intaglio.modeling.anatomy import anatomy
from intaglio.trainer import Example, KeyedRNG, Loss
from intaglio.trainer.sparsity_mask import linear_modules
from tests.alive import alive
from tests.families import DECODERS, tiny_model
from tests.trainer.helpers import checkpoint, far, run, same, weights

EXAMPLES = (
    {"sparsity": 0.5},
    {"sparsity": 0.5, "kind": "neuron", "implicit": False, "schedule": "cosine"},
    {"sparsity": 0.25, "kind": "head", "scope": "layer", "normalise": False, "clip": 1.0, "implicit": "released"},
)
ALIVE = {
    "sparsity": 0.25,
    "kind": "neuron",
    "scope": "layer",
    "gamma": 0.5,
    "implicit": False,
    "lr_mask": 0.2,
    "momentum": 0.5,
    "schedule": "cosine",
    "normalise": False,
    "clip": alive(0.01, normalise=False),
    "every": 2,
    "until": 0.5,
    "guard": alive(False, sparsity=0.998),
    "tied": True,
    "p": alive(1.0, kind="neuron"),
    "ignore": ["layers.0.mlp.*"],
}


def mlp(seed: int = 0, widths: tuple[int, ...] = (6, 9, 8, 3)) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for into, out in pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet(groups: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=groups),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(shape: tuple[int, ...] = (6,), size: int = 8, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(size, *shape, generator=draws)
        yield x, (x.flatten(1)[:, 0] > 0).long() + (x.flatten(1)[:, 1] > 0).long()


class Pruner:
    """Steps of both levels in a loop of its own."""

    def __init__(
        self,
        net: nn.Module,
        keep: float,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        **more: Any,
    ) -> None:
        self.net, self.lr_mask = net, more.pop("lr_mask", 0.1)
        self.masked = MaskedModel(net, 1 - keep, **{"momentum": more.pop("momentum_mask", 0.9), **more})
        self.sgd = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)

    @property
    def masks(self) -> dict[str, Tensor]:
        return self.masked.masks

    def lower(self, batch: Any) -> None:
        loss_fn(self.net, batch).backward()
        self.sgd.step()
        self.sgd.zero_grad()

    def upper(self, batch: Any) -> None:
        with self.masked.gradient_probe() as leaves:
            gradients = score_gradients(loss_fn(self.net, batch), leaves)
        self.masked.learn(gradients, self.lr_mask)

    def step(self, batch_a: Any, batch_b: Any) -> None:
        self.lower(batch_a)
        self.upper(batch_b)


def kept(pruner: Pruner) -> int:
    return sum(int(mask.sum()) for mask in pruner.masks.values())


def test_all_kept_is_plain_sgd_bit_for_bit() -> None:
    net, plain = mlp(), mlp()
    pruner = Pruner(net, 1.0, lr=0.1, lr_mask=5.0, weight_decay=1e-3)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    a, b = batches(seed=1), batches(seed=2)
    for _ in range(5):
        batch = next(a)
        pruner.step(batch, next(b))
        sgd.zero_grad()
        loss_fn(plain, batch).backward()
        sgd.step()
    assert all(mask.all() for mask in pruner.masks.values())
    pruner.masked.bake()
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(torch.equal(x, y) for x, y in zip(net.parameters(), plain.parameters(), strict=True))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 99), keep=st.integers(3, 100), gamma=st.sampled_from([0.01, 1.0, 50.0]))
def test_the_kept_count_is_exact_after_each_step(seed: int, keep: int, gamma: float) -> None:
    net, share = mlp(seed), Fraction(keep, 100)
    pruner = Pruner(net, float(share), gamma=gamma, lr=0.1, lr_mask=1.0)
    total = sum(module.weight.numel() for module in net if isinstance(module, nn.Linear))
    wanted = total - int((1 - share) * total)
    assert kept(pruner) == wanted
    source = batches(seed=seed)
    for _ in range(2):
        pruner.step(next(source), next(source))
        assert kept(pruner) == wanted
    assert all(mask.any() for mask in pruner.masks.values())
    pruner.masked.bake()
    assert sum(int((module.weight != 0).sum()) for module in net if isinstance(module, nn.Linear)) <= wanted


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_upper_gradient_of_a_linear_loss_is_the_total_derivative(gamma: float) -> None:
    c, mask = torch.randn(7, dtype=torch.float64), torch.tensor([1, 0, 1, 1, 0, 1, 0]).bool()
    theta = -(mask * c) / gamma  # the lower level's optimum for l = c . z
    # l(m, theta*(m)) = c . (m * -(m c) / gamma), so its derivative is -2 m c^2 / gamma.
    m = mask.double().requires_grad_()
    (total,) = torch.autograd.grad((c * m * (-(m * c) / gamma)).sum(), m)
    assert torch.allclose(upper_gradient(theta, c, mask, gamma), total)
    assert torch.allclose(total, -2 * mask * c**2 / gamma)


def test_the_upper_gradient_at_the_lower_optimum_and_in_the_limit() -> None:
    theta, mask, gamma = torch.randn(9, dtype=torch.float64), torch.arange(9) % 3 > 0, 0.3
    g = torch.where(mask, -gamma * theta, torch.randn(9, dtype=torch.float64))
    found = upper_gradient(theta, g, mask, gamma)
    assert torch.allclose(found[mask], 2 * (theta * g)[mask])
    assert torch.equal(found[~mask], (theta * g)[~mask])
    plain = upper_gradient(theta, g, mask, 1.0, implicit=False)
    assert torch.equal(plain, theta * g)
    assert torch.allclose(upper_gradient(theta, g, mask, 1e12), plain)


def test_one_backward_at_z_gives_every_term() -> None:
    net, gamma = mlp().double(), 0.7
    x, y = next(batches())
    pruner = Pruner(net, 0.4, gamma=gamma, lr_mask=1.0, momentum_mask=0.0)
    layers = {name: net.get_submodule(name) for name in pruner.masks}
    m = {name: mask.double().requires_grad_() for name, mask in pruner.masks.items()}
    theta = {n: layer.parametrizations.weight.original.detach().clone().requires_grad_() for n, layer in layers.items()}
    h = x.double()
    for name, layer in layers.items():
        h = F.linear(h, m[name] * theta[name], layer.bias)
        h = h.relu() if name != "4" else h
    loss = F.cross_entropy(h, y)
    of_m = torch.autograd.grad(loss, list(m.values()), retain_graph=True)
    of_theta = torch.autograd.grad(loss, list(theta.values()))
    before = {name: score.detach().clone() for name, score in pruner.masked.scores.items()}
    pruner.upper((x.double(), y))
    for name, by_m, by_theta in zip(layers, of_m, of_theta, strict=True):
        dz = by_m / theta[name].detach()
        wanted = (by_m - dz * by_theta / gamma) * before[name].sign()
        assert torch.allclose(before[name] - pruner.masked.scores[name].detach(), wanted, atol=1e-10)
    # Nothing but the scores has moved, and no gradient is left behind.
    assert all(torch.equal(layer.parametrizations.weight.original, theta[n]) for n, layer in layers.items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_first_mask_is_that_of_global_magnitude() -> None:
    net = mlp()
    flat = torch.cat([net[i].weight.detach().abs().flatten() for i in (0, 2, 4)])
    cut = flat.sort().values[int(0.7 * len(flat)) - 1]
    expected = {str(i): net[i].weight.detach().abs() > cut for i in (0, 2, 4)}
    pruner = Pruner(net, 0.3)
    assert all(torch.equal(pruner.masks[name], mask) for name, mask in expected.items())
    # The scores are a copy: the weights may move and the scores do not.
    before = {name: score.detach().clone() for name, score in pruner.masked.scores.items()}
    pruner.lower(next(batches()))
    assert all(torch.equal(before[name], score) for name, score in pruner.masked.scores.items())


def test_pruned_weights_only_decay_and_their_scores_still_learn() -> None:
    net = mlp()
    pruner = Pruner(net, 0.3, lr=0.1, momentum=0.0, weight_decay=0.01, lr_mask=3.0)
    before = {name: weight.detach().clone() for name, weight in pruner.masked.weights.items()}
    first, source = pruner.masks, batches()
    pruner.lower(next(source))
    for name, mask in first.items():
        after = pruner.masked.weights[name].detach()
        assert torch.allclose(after[~mask], before[name][~mask] * (1 - 0.1 * 0.01))
        assert not torch.equal(after[mask], before[name][mask])
    scores = {name: score.detach().clone() for name, score in pruner.masked.scores.items()}
    for _ in range(10):
        pruner.upper(next(source))
    moved = [(scores[n] != s.detach())[~first[n]].any() for n, s in pruner.masked.scores.items()]
    assert all(moved)
    assert any((pruner.masks[name] & ~mask).any() for name, mask in first.items())  # some came back


@given(seed=st.integers(0, 10_000), double=st.booleans(), turned=st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_masked_product_and_its_gradient_are_those_of_a_filled_copy(seed: int, double: bool, turned: bool) -> None:
    draws = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    shape = (int(torch.randint(1, 9, (), generator=draws)), 5)
    weight, kept = torch.randn(shape, generator=draws, dtype=dtype), torch.rand(shape, generator=draws) > 0.5
    if turned:
        weight, kept = weight.T, kept.T
    weight.requires_grad_()
    z = Masked(kept)(weight)
    assert torch.equal(z, weight.masked_fill(~kept, 0))
    (gradient,) = torch.autograd.grad(z, weight, 3 * weight.detach())
    assert torch.equal(gradient, 3 * weight.detach().masked_fill(~kept, 0))


def test_what_is_pruned_is_saved_as_plus_zero() -> None:
    net = mlp()
    pruner = Pruner(net, 0.2)
    masks = pruner.masks
    pruner.masked.bake()
    for name, mask in masks.items():
        weight = net.get_submodule(name).weight
        assert not mask.all()
        assert not weight[~mask].any()
        assert not weight[~mask].signbit().any()


def test_the_signs_of_scores_do_not_matter() -> None:
    a, b = (Pruner(mlp(), 0.4, lr_mask=0.5) for _ in range(2))
    with torch.no_grad():
        for score in b.masked.scores.values():
            score.neg_()
    source = list(zip(range(6), batches(), strict=False))
    for _, batch in source:
        a.upper(batch)
        b.upper(batch)
    for name in a.masks:
        assert torch.equal(a.masks[name], b.masks[name])
        assert torch.equal(a.masked.scores[name], -b.masked.scores[name])


def test_the_released_codes_two_slips_can_be_had() -> None:
    net, gamma = mlp(), 0.1
    pruner = Pruner(net, 0.5, gamma=gamma, lr_mask=1.0, momentum_mask=0.0, implicit="released", tied=True)
    name, source = "2", batches()
    score, theta = pruner.masked.scores[name], pruner.masked.weights[name]
    assert score.data_ptr() == theta.data_ptr()
    pruner.lower(next(source))
    assert torch.equal(score, theta)
    with pruner.masked.gradient_probe() as leaves:
        g = torch.autograd.grad(loss_fn(net, batch := next(source)), leaves[name])[0]
    own, before = theta.detach() * g * score.detach().sign(), score.detach().clone()
    pruner.upper(batch)
    assert torch.allclose(before - score.detach(), own - own * own / gamma)
    pruner.lower(next(source))
    pruner.masked.refresh()
    cut = torch.cat([w.detach().abs().flatten() for w in pruner.masked.weights.values()]).sort().values
    assert all(
        (pruner.masked.weights[n].detach().abs() > cut[len(cut) // 2 - 1]).eq(m).all() for n, m in pruner.masks.items()
    )


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.integers(0, 4), min_size=2, max_size=40), cut=st.integers(1, 39), data=st.data())
def test_the_largest_are_kept_and_of_equal_ones_the_last(values: list[int], cut: int, data: Any) -> None:
    place, count = data.draw(st.integers(1, len(values) - 1)), data.draw(st.integers(0, len(values) - 1))
    whole = torch.tensor(values, dtype=torch.float32)
    found = torch.cat(keep_largest([whole[:place], whole[place:]], count))
    gone = set(sorted(range(len(values)), key=lambda i: (values[i], i))[:count])
    assert found.tolist() == [i not in gone for i in range(len(values))]


def test_a_global_ranking_does_not_empty_a_layer() -> None:
    net = mlp()
    with torch.no_grad():
        net[2].weight.mul_(1e-6)
    layers = find_layers(net)
    scores = {layer.tensor: net.get_submodule(layer.tensor).weight.detach() for layer in layers}
    bare, none = magnitude_masks(scores, layers, 0.9, guard=False)
    assert not bare["2"].any()
    assert none == ()
    assert magnitude_masks(scores, layers, 0.9)[1] == ("2",)  # the guard is the default
    found = Pruner(net, 0.1)
    assert found.masked.rescued == ("2",)
    assert int(found.masks["2"].sum()) == 1
    assert found.masks["2"].view(-1)[scores["2"].abs().argmax()]
    assert kept(found) == sum(int(mask.sum()) for mask in bare.values())
    with pytest.raises(IntaglioError, match="leaves 2 weights for 3 layers; at least one weight a layer is needed"):
        Pruner(mlp(), 0.012, scope="global")


def test_scope_layer_counts_in_each_layer() -> None:
    pruner = Pruner(mlp(), 0.3, scope="layer")
    source = batches()
    pruner.step(next(source), next(source))
    for mask in pruner.masks.values():
        assert int(mask.sum()) == mask.numel() - int(Fraction(7, 10) * mask.numel())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["filter", "channel"])
def test_filters_and_channels_go_by_their_norm_the_same_share_in_each_layer(kind: Any, groups: int) -> None:
    net = convnet(groups)
    pruner = Pruner(net, 0.55, kind=kind, lr_mask=1.0)
    assert set(pruner.masks) == {"0", "3"}  # linear layers and batch norm stay dense
    source = batches((4, 6, 6))
    for step in range(3):
        if step:
            pruner.step(next(source), next(source))
        for units in pruner.masked.units:
            (member,) = units.members
            mask, score = pruner.masks[member.tensor], pruner.masked.scores[member.tensor].detach()
            if kind == "filter":
                lying, norms = mask.flatten(1), score.flatten(1).norm(dim=1)
            else:
                by_group = [part.transpose(0, 1).flatten(1) for part in mask.chunk(member.module.groups)]
                of_group = [part.transpose(0, 1).flatten(1) for part in score.chunk(member.module.groups)]
                lying, norms = torch.cat(by_group), torch.cat(of_group).norm(dim=1)
            whole = lying.all(1)
            assert torch.equal(whole, lying.any(1))
            assert int(whole.sum()) == units.count - int(Fraction(45, 100) * units.count)
            assert norms[whole].min() >= norms[~whole].max()
            assert torch.allclose(unit_scores(pruner.masked.scores, units).float(), norms)
    pruner.masked.bake()
    assert type(net[0]) is nn.Conv2d
    assert net[8].weight.all()
    assert net[1].weight.all()


@pytest.mark.parametrize("family", DECODERS)
def test_neurons_go_with_everything_that_is_theirs(family: str) -> None:
    model = tiny_model(family, layers=1)
    ids = torch.arange(3, 19)[None]
    scored = MaskedModel(model, 0.5, kind="neuron")
    (units,) = scored.units
    zero = {n: ~m for n, m in scored.masks.items()}
    scored.bake()
    assert sum(int(z.sum()) for z in zero.values()) == sum(z.numel() for z in zero.values()) // 2
    # A neuron that is zero everywhere says nothing: what is left of its rows does not matter.
    with torch.no_grad():
        before = model(ids).logits
        for member in units.members[:-1]:
            weight = member.module.weight
            weight.masked_fill_(zero[member.tensor], 0.37)
        down = units.members[-1]
        assert torch.equal(down.module.weight == 0, zero[down.tensor] | (down.module.weight == 0))
        assert torch.allclose(model(ids).logits, before, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_heads_go_with_their_queries_and_outputs(family: str) -> None:
    model = tiny_model(family, layers=1)
    ids = torch.arange(3, 19)[None]
    scored = MaskedModel(model, 0.5, kind="head")
    (units,) = scored.units
    assert units.count == model.config.num_attention_heads
    zero = {n: ~m for n, m in scored.masks.items()}
    scored.bake()
    out = units.members[-1]
    assert int(zero[out.tensor].sum()) == zero[out.tensor].numel() // 2
    with torch.no_grad():
        before = model(ids).logits
        for tensor, mask in zero.items():
            if tensor != out.tensor:
                model.get_submodule(tensor).weight.masked_fill_(mask, 0.37)
        assert torch.allclose(model(ids).logits, before, atol=1e-6)


def test_normalised_gradients_have_the_scale_of_the_kept_weights() -> None:
    theta, g = torch.randn(40, 30), torch.randn(40, 30) * 1e-4
    net = nn.Sequential(nn.Linear(30, 40, bias=False))
    net[0].weight.data.copy_(theta)
    scored = MaskedModel(net, 0.5, normalise=True)
    mask = scored.masks["0"]
    size = theta[mask].square().mean().sqrt()
    even = g / g.square().mean().sqrt() * size
    wanted = upper_gradient(theta, even, mask, 1.0) * theta.sign()
    assert torch.allclose(scored._score_gradient("0", g), wanted, atol=1e-5)
    assert torch.allclose(scored._score_gradient("0", g * 1e3), wanted, atol=1e-5)
    clipped = MaskedModel(mlp(), 0.5, clip=0.1)
    name, weight = next(iter(clipped.weights.items()))
    for factor, norm in ((1e-3, None), (1e3, 0.1)):
        raw = torch.ones_like(weight) * factor
        size = raw if norm is None else raw / raw.norm() * norm
        wanted = upper_gradient(weight.detach(), size, clipped.masks[name], 1.0) * weight.detach().sign()
        assert torch.allclose(clipped._score_gradient(name, raw), wanted)


def test_the_rate_of_the_scores() -> None:
    assert [score_rate("step", share) for share in (0.0, 0.74, 0.75, 0.89, 0.9, 1.0)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert score_rate("constant", 0.99) == 1
    assert [score_rate("cosine", share) for share in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.5, 0], abs=1e-6)


def test_scores_learn_on_fixed_weights() -> None:
    net = mlp()
    dense = net[2].weight.detach().clone()
    pruner = Pruner(net, 0.4, lr_mask=1.0, implicit=False)
    source = batches()
    for _ in range(5):
        pruner.upper(next(source))
    assert torch.equal(pruner.masked.weights["2"], dense)
    mask = pruner.masks["2"]
    pruner.masked.bake()
    assert torch.equal(net[2].weight, dense * mask)


class Classify:
    """Cross-entropy of vectors."""

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> dict[str, Any]:
        return {name: torch.stack([example[name] for example in examples]) for name in ("x", "y")}

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Loss:
        return Loss(loss_fn(model, (batch["x"], batch["y"])))


def examples(shape: tuple[int, ...] = (6,), count: int = 64) -> list[dict[str, Tensor]]:
    x, y = next(batches(shape, count))
    return [{"x": one, "y": label} for one, label in zip(x, y, strict=True)]


FREE = {"objective": Classify(), "batch_size": 8, "steps": 20, "warmup": 0, "optimizer": "sgd", "learning_rate": 0.1}


def test_any_module_is_pruned_while_it_trains() -> None:
    net = mlp()
    done = run(net, examples(), modifiers=[BiP(sparsity=0.7)], **FREE)
    assert [type(module) for module in net] == [type(module) for module in mlp()]
    zeros, total = (sum(int(f(net[i].weight)) for i in (0, 2, 4)) for f in ((lambda w: (w == 0).sum()), Tensor.numel))
    assert zeros == int(Fraction(7, 10) * total)
    assert done.history[-1].loss < done.history[0].loss
    assert done.history[-1].parts["mask_overlap"] < 1
    assert net.training


def test_filters_of_a_convolutional_network_go_as_a_whole() -> None:
    net = convnet()
    run(net, examples((4, 6, 6)), modifiers=[BiP(sparsity=0.5, kind="filter")], **FREE)
    for layer in (net[0], net[3]):
        gone = (layer.weight.flatten(1) == 0).all(1)
        assert int(gone.sum()) == len(gone) // 2


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"kind": "filter"}, "kind is 'filter', but Sequential has no Conv2d; accepted: unstructured"),
        ({"kind": "head"}, "kind is 'head', which needs a transformer of Hugging Face, not Sequential"),
        ({"ignore": ["7"]}, "ignore: '7' names no layer of this model; its first is 0"),
        ({"ignore": ["*"]}, "ignore: names every layer"),
    ],
)
def test_settings_that_a_module_does_not_fit_are_one_sentence(fields: dict[str, Any], sentence: str) -> None:
    net = mlp()
    with pytest.raises(IntaglioError, match=sentence) as caught:
        run(net, examples(), modifiers=[BiP(**fields)], **FREE)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in net] == [type(module) for module in mlp()]


@pytest.mark.parametrize(
    "fields",
    [
        {"sparsity": 1.0}, {"sparsity": float("nan")}, {"kind": "rows"}, {"scope": "block"}, {"gamma": 0.0},
        {"clip": 1.0, "normalise": True}, {"p": 0.5}, {"lr_mask": -1.0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        BiP(**fields)


def test_models_that_do_not_fit_are_one_sentence() -> None:
    with pytest.raises(IntaglioError, match="ReLU has no linear layer and no convolution"):
        Pruner(nn.ReLU(), 0.5)
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    tied["head"].weight = tied["embedding"].weight  # type: ignore[assignment]
    with pytest.raises(IntaglioError, match=r"head\.weight is tied to embedding\.weight; name it in ignore, or untie"):
        Pruner(tied, 0.5)
    frozen = mlp()
    frozen[2].weight.requires_grad_(False)
    with pytest.raises(IntaglioError, match=r"2\.weight is frozen, and bip retrains the weights"):
        Pruner(frozen, 0.5)
    with pytest.raises(IntaglioError, match=r"0\.weight is torch\.bfloat16, too coarse"):
        Pruner(mlp().bfloat16(), 0.5)
    broken = mlp()
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.nan
    with pytest.raises(IntaglioError, match="a score is not finite"):
        Pruner(broken, 0.5)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(IntaglioError, match=r"0\.weight is parametrized already"):
        Pruner(normed, 0.5)


def test_a_gradient_that_is_not_finite_stops_the_scores() -> None:
    masked = MaskedModel(mlp(), 0.5)
    with masked.gradient_probe() as leaves:
        gradients = score_gradients((leaves["0"] * 0).sum().sqrt(), leaves)
    with pytest.raises(IntaglioError, match="the gradient of the scores is not finite"):
        masked.learn(gradients, 0.1)


ROOM = {"steps": 6, "batch_size": 2, "warmup": 0, "learning_rate": 1e-3}


def shaped(family: str = "llama", **fields: Any) -> tuple[Any, Any]:
    ckpt = checkpoint(family, layers=1)
    done = run(ckpt, modifiers=[BiP(**{"sparsity": 0.6, **fields})], **ROOM)
    return ckpt, done


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_training_leaves_the_exact_share_of_zeros(family: str) -> None:
    ckpt, done = shaped(family)
    matrices = [module.weight for module in linear_modules(ckpt.model).values()]
    zeros, total = (sum(int(f(w)) for w in matrices) for f in (lambda w: (w == 0).sum(), lambda w: w.numel()))
    assert zeros == int(Fraction(6, 10) * total)
    moved = [line.parts["mask_overlap"] for line in done.history]
    assert moved[0] == 1.0  # the first step begins under the mask of magnitude
    assert 0.5 < moved[-1] < 1.0


def test_a_resting_mask_is_one_shot_magnitude_and_takes_no_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MaskedModel, "gradient_probe", lambda self: pytest.fail("no upper step is due"))
    dense, (ckpt, done) = checkpoint(layers=1), shaped(lr_mask=0.0)
    assert {line.parts["mask_overlap"] for line in done.history} == {1.0}
    layers = find_layers(dense.model)
    stored = {layer.tensor: layer.module.weight.detach() for layer in layers}  # type: ignore[union-attr]
    masks, _ = magnitude_masks(stored, layers, 0.6)
    after = weights(ckpt)
    assert all(torch.equal(after[f"{name}.weight"] != 0, mask) for name, mask in masks.items())


def test_when_the_scores_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    plain = MaskedModel.learn
    monkeypatch.setattr(MaskedModel, "learn", lambda self, g, rate: (rates.append(rate), plain(self, g, rate)))
    shaped(lr_mask=1.0)
    assert rates == [1, 1, 1, 1, 1]  # never before the first step; of six steps five are followed by another
    rates.clear()
    shaped(lr_mask=1.0, every=2)
    assert rates == [1, 1]
    rates.clear()
    shaped(lr_mask=1.0, until=0.5)
    assert rates == [1, 1, 1]


def test_the_two_levels_look_at_different_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from intaglio.methods.weights.bip import _Session as Session
    from intaglio.trainer import CausalLM

    seen: list[tuple[str, bytes]] = []
    level = "lower"
    loss, before = CausalLM.loss, Session.before_step

    def spied(self: Any, model: Any, batch: Any) -> Any:
        seen.append((level, batch["input_ids"].numpy().tobytes()))
        return loss(self, model, batch)

    def stepping(self: Any, t: int, batch: Any) -> None:
        nonlocal level
        level = "upper"
        before(self, t, batch)
        level = "lower"

    monkeypatch.setattr(CausalLM, "loss", spied)
    monkeypatch.setattr(Session, "before_step", stepping)
    shaped()
    assert [name for name, _ in seen] == ["lower", *["upper", "lower"] * 5]
    trained: set[bytes] = set()
    for name, ids in seen:
        assert name == "lower" or ids not in trained  # the weights have never been trained on it
        trained |= {ids} if name == "lower" else set()


def test_everything_kept_is_plain_training() -> None:
    ckpt, _ = shaped(sparsity=0.0)
    plain = checkpoint(layers=1)
    run(plain, **ROOM)
    assert far(weights(ckpt), weights(plain)) == 0


def test_the_released_codes_scores_are_the_weights_and_resume() -> None:
    ckpt, _ = shaped(tied=True, implicit="released", normalise=False, lr_mask=1e-4)
    again, _ = shaped(tied=True, implicit="released", normalise=False, lr_mask=1e-4)
    assert same(weights(ckpt), weights(again))


def test_zeros_of_an_earlier_step_stay() -> None:
    ckpt = checkpoint(layers=1)
    with torch.no_grad():
        for module in linear_modules(ckpt.model).values():
            module.weight[:, ::4] = 0
    run(ckpt, modifiers=[BiP(sparsity=0.6)], **ROOM)
    assert not any(module.weight[:, ::4].any() for module in linear_modules(ckpt.model).values())


@pytest.mark.parametrize(
    ("fields", "more", "sentence"),
    [
        ({}, {"lora": {"r": 2}}, "which lora keeps as they are; leave lora out"),
        ({"ignore": ["layers.9.*"]}, {}, r"ignore: 'layers\.9\.\*' names no layer of this model"),
        ({"sparsity": 0.9999}, {}, "weights for 7 layers; at least one weight a layer is needed"),
    ],
)
def test_a_model_that_it_does_not_fit_is_one_sentence(fields: Any, more: Any, sentence: str) -> None:
    ckpt = checkpoint(layers=1)
    before = weights(ckpt)
    with pytest.raises(IntaglioError, match=sentence):
        run(ckpt, modifiers=[BiP(**{"sparsity": 0.5, **fields})], **{**ROOM, **more})
    assert same(before, weights(ckpt))


def test_a_recipe_refuses_what_would_keep_the_weights() -> None:
    from intaglio.recipe.schema import Recipe

    for more, word in (({"lora": {"r": 2}}, "lora"), ({"freeze": True}, "freeze")):
        step = {"train": {"steps": 1, "modifiers": [{"bip": {"sparsity": 0.5}}], **more}}
        with pytest.raises(IntaglioError, match=f"bip trains the weights themselves, and {word}"):
            Recipe.from_dict({"steps": [step]})


def test_heads_need_queries_keys_values_and_one_output() -> None:
    parts = anatomy(tiny_model("llama", layers=1))
    attention = [linear for linear in parts.linears(0) if linear.part == "attention"]
    assert _heads(attention, parts.config) is not None
    assert all(_heads(attention[:n] + attention[n + 1 :], parts.config) is None for n in range(4))
    assert _heads([*attention, attention[-1]], parts.config) is None
    parts.config.num_attention_heads = 3
    assert _heads(attention, parts.config) is None


def test_grouped_heads_leave_keys_and_values() -> None:
    (units, *_) = find_units(tiny_model("llama", layers=1), "head")
    assert [member.tensor.rpartition(".")[2] for member in units.members] == ["q_proj", "o_proj"]


def test_an_estimate_counts_the_upper_passes() -> None:
    from intaglio.methods.base import Workload
    from intaglio.trainer.recipe_step import Train

    workload = Workload(((64, 64), (128, 64)), 20_000, 30_000, 64, 1000, 100, 4)
    plain = Train(steps=10, batch_size=2, length=32).estimate(workload)
    for fields, factor in (({}, 2.0), ({"every": 2}, 1.5), ({"until": 0.25}, 1.25), ({"lr_mask": 0.0}, 1.0)):
        modifiers = [{"bip": {"sparsity": 0.5, **fields}}]
        cost = Train(steps=10, batch_size=2, length=32, modifiers=modifiers).estimate(workload)
        assert cost.flops == pytest.approx(factor * plain.flops)
        assert cost.extra_bytes > plain.extra_bytes
        assert cost.sorted_elements >= 64 * 64 + 128 * 64
