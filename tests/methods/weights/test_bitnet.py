"""The facts of BitNet b1.58 Reloaded: codes, scales, gradients, packing, and what a checkpoint does with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

import intaglio
from intaglio.errors import IntaglioError
from intaglio.measures.evaluate import Evaluator
from intaglio.methods.weights.bitnet import BitLinear, BitNet, PackedLinear, Quantization, pack_layers
from intaglio.methods.weights.bitnet.packing import pack, row_bytes, unpack
from intaglio.methods.weights.bitnet.quantization import (
    activation_codes,
    activation_scale,
    integer_range,
    straight_through,
    weight_codes,
    weight_scale,
)
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.replacement import count_parameters
from intaglio.recipe.schema import Recipe
from intaglio.speculative import Speculative
from intaglio.speculative.drafters import PromptLookup
from intaglio.trainer import CausalLM, Loss, ModifierSession, TrainingRun
from tests.alive import alive
from tests.families import DECODERS, tiny_model
from tests.trainer.helpers import TEXTS, checkpoint, run

EXAMPLES = (
    {},
    {
        "bits": 4,
        "scale": "max",
        "per": "row",
        "activation_bits": None,
        "norm": "layernorm",
        "learnable_norm": True,
        "targets": ["layers.0.*"],
    },
    {
        "norm": "rmsnorm",
        "strategy": "stochastic",
        "activation_range": 127,
        "keep": "shadow",
        "lambda_warmup": 0.5,
        "decay_until": 0.5,
    },
)
ALIVE = {
    "bits": 4.0,
    "scale": "mean",
    "per": "row",
    "activation_bits": 4,
    "activation_scale": "mean",
    "activation_range": 127,
    "norm": "rmsnorm",
    "learnable_norm": alive(True, norm="rmsnorm"),
    "strategy": "stochastic",
    "eps": alive(0.1, per="row", scale="median"),
    "targets": ["*.mlp.*"],
    "ignore": ["layers.0.mlp.*"],
    "keep": "shadow",
    "lambda_warmup": 1.0,
    "decay_until": 0.5,
}
W = torch.tensor([[0.9, -0.2], [0.05, -1.1]])
PLAIN = Quantization(norm="none")


def coded(weight: Tensor, **fields: Any) -> Tensor:
    config = Quantization(**fields)
    return weight_codes(weight * weight_scale(weight, config), config)


def layer(weight: Tensor, bias: bool = False, **fields: Any) -> BitLinear:
    found = BitLinear(weight.shape[1], weight.shape[0], bias, Quantization(**{"norm": "none", **fields}))
    found.weight.data = weight.clone()
    return found


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("bits", "limits"), [(1.58, (-1, 1)), (2, (-2, 1)), (3, (-4, 3)), (4, (-8, 7)), (8, (-128, 127))]
)
def test_ranges_come_from_bits(bits: float, limits: tuple[int, int]) -> None:
    assert integer_range(bits) == limits


def test_the_example_of_the_paper_s_two_scales() -> None:
    assert coded(W, scale="mean").tolist() == [[1, 0], [0, -1]]
    assert coded(W, scale="median").tolist() == [[1, -1], [0, -1]]
    assert float(1 / weight_scale(W, Quantization(scale="mean"))) == pytest.approx(0.5625)
    assert float(1 / weight_scale(W, Quantization())) == pytest.approx(0.2)  # the lower of the middle two


def test_activations_of_the_example() -> None:
    x = torch.tensor([[0.3, -1.2, 0.6]])
    scale = activation_scale(x, PLAIN)
    codes = activation_codes(x * scale, PLAIN)
    assert float(scale) == pytest.approx(106.6667, abs=1e-3)
    assert codes.tolist() == [[32, -128, 64]]
    torch.testing.assert_close(codes / scale, x)
    one = torch.tensor([[1.2]])
    assert activation_codes(one * activation_scale(one, PLAIN), PLAIN).item() == 127
    narrow = Quantization(activation_range=127)
    assert (activation_codes(one * activation_scale(one, narrow), narrow) / activation_scale(one, narrow)).item() == (
        pytest.approx(1.2)
    )


def test_zero_shares_of_gaussian_and_uniform_weights() -> None:
    gauss, even = drawn(400, 400), torch.rand(400, 400, generator=torch.Generator().manual_seed(0)) - 0.5
    for weight, scale, share in ((gauss, "mean", 0.310), (gauss, "median", 0.264), (even, "mean", 0.25)):
        assert float((coded(weight, scale=scale) == 0).float().mean()) == pytest.approx(share, abs=0.005)
    assert float((coded(even) == 0).float().mean()) == pytest.approx(0.25, abs=0.005)


def test_an_outlier_moves_the_mean_and_not_the_median() -> None:
    weight = drawn(32, 32)
    large = weight.clone()
    large.view(-1)[large.abs().argmax()] *= 1000
    assert torch.equal(coded(weight), coded(large))
    assert float((coded(large, scale="mean") == 0).float().mean()) > 0.9


MATRICES = st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(0, 1000))


@settings(max_examples=30, deadline=None)
@given(MATRICES, st.sampled_from([1.58, 2.0, 3.0, 4.0, 6.0, 8.0]))
def test_packing_loses_nothing(shape: tuple[int, int, int], bits: float) -> None:
    low, high = integer_range(bits)
    rows, inputs, seed = shape
    codes = torch.randint(low, high + 1, (rows, inputs), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, low, high)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, row_bytes(inputs, low, high))
    assert torch.equal(unpack(packed, inputs, low, high), codes.to(torch.int16))


@settings(max_examples=25, deadline=None)
@given(MATRICES, st.sampled_from(["median", "mean"]), st.sampled_from(["tensor", "row"]))
def test_codes_follow_order_and_signs(shape: tuple[int, int, int], scale: str, per: str) -> None:
    weight = drawn(shape[0], shape[1], seed=shape[2])
    found = coded(weight, scale=scale, per=per)
    assert set(found.unique().tolist()) <= {-1, 0, 1}
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(shape[2]))
    # A mean adds up in another order then, so a weight on the border may round the other way.
    assert (coded(weight[:, order], scale=scale, per=per) != found[:, order]).sum() <= (scale == "mean")
    signs = torch.where(drawn(*weight.shape, seed=shape[2] + 1) > 0, 1.0, -1.0)
    assert torch.equal(coded(weight * signs, scale=scale, per=per), found * signs)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.25, 4.0, 32.0]))
def test_outputs_scale_with_the_weight_and_not_with_normed_inputs(seed: int, factor: float) -> None:
    weight, x = drawn(6, 16, seed=seed), drawn(3, 16, seed=seed + 1)
    torch.testing.assert_close(layer(factor * weight)(x), factor * layer(weight)(x))
    for norm in ("layernorm", "rmsnorm"):
        with_norm = layer(weight, norm=norm)
        torch.testing.assert_close(with_norm(factor * x), with_norm(x), rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("fields", [{}, {"scale": "mean", "activation_range": 127}, {"norm": "layernorm"}])
def test_the_forward_is_the_formula(fields: dict[str, Any]) -> None:
    weight, x = drawn(7, 12), drawn(4, 12, seed=1)
    made = layer(weight, bias=True, **fields)
    x_n = F.layer_norm(x, (12,)) if fields.get("norm") else x
    top = fields.get("activation_range", 128)
    s_x = top / x_n.abs().amax(-1, keepdim=True)
    size = weight.abs()
    s_w = 1 / (size.mean() if fields.get("scale") == "mean" else size.median())
    x_q, w_q = (x_n * s_x).round().clamp(-128, 127), (weight * s_w).round().clamp(-1, 1)
    # The bias is not scaled by token, as it is in the authors' package.
    torch.testing.assert_close(made(x), x_q @ w_q.T / (s_w * s_x) + made.bias)


def test_without_strength_and_norm_it_is_a_linear_layer() -> None:
    made, x = layer(drawn(5, 8), bias=True), drawn(3, 8, seed=1)
    made.strength = 0.0
    assert torch.equal(made(x), F.linear(x, made.weight, made.bias))
    made.strength = 1e-4
    torch.testing.assert_close(made(x), F.linear(x, made.weight, made.bias), rtol=1e-2, atol=1e-2)
    half = straight_through(torch.tensor([0.4]), torch.tensor([0.0]), 0.5)
    assert float(half) == pytest.approx(0.2)


def test_gradients_pass_as_if_nothing_were_rounded_or_clamped() -> None:
    weight, x, upstream = 3 * drawn(5, 8), drawn(3, 8, seed=1), drawn(3, 5, seed=2)
    made = layer(weight, activation_bits=None)
    made(x).backward(upstream)
    assert made.weight.grad is not None
    torch.testing.assert_close(made.weight.grad, upstream.T @ x)
    made = layer(weight)
    x = x.requires_grad_()
    made(x).backward(upstream)
    with torch.no_grad():
        dequantized = activation_codes(x * activation_scale(x, PLAIN), PLAIN) / activation_scale(x, PLAIN)
    torch.testing.assert_close(made.weight.grad, upstream.T @ dequantized)
    torch.testing.assert_close(x.grad, upstream @ made.dense())
    assert not made.scale().requires_grad


CASES = [
    {},
    {"scale": "mean", "norm": "layernorm", "learnable_norm": True},
    {"per": "row", "norm": "rmsnorm", "learnable_norm": True},
    {"activation_bits": None},
    {"bits": 4.0, "activation_bits": 4, "activation_scale": "mean"},
    {"bits": 8.0, "activation_range": 127},
]


@pytest.mark.parametrize("fields", CASES)
def test_the_packed_layer_gives_what_training_evaluates(fields: dict[str, Any]) -> None:
    made, x = layer(drawn(6, 70), bias=True, **fields), drawn(9, 70, seed=1)
    made.eval()
    packed = PackedLinear.from_bit_linear(made)
    assert torch.equal(packed.codes(), made.codes())
    assert torch.equal(packed.dense(), made.dense())
    if made.config.activation_bits is None:
        torch.testing.assert_close(packed(x), made(x))
    else:  # sums of whole numbers are exact
        assert torch.equal(packed(x), made(x))
        assert torch.equal(made.train()(x), packed(x))
    x_grad = x.clone().requires_grad_()
    packed(x_grad).sum().backward()
    assert float(x_grad.grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert packed.packed_weights + packed.weight_packed.numel() == 6 * 70


def test_stochastic_rounding_is_that_of_its_draws_and_only_in_training() -> None:
    made = layer(drawn(200, 200), strategy="stochastic", activation_bits=None)
    scaled = made.scaled().detach()
    made.uniform = lambda like: torch.full_like(like, 0.5)
    eye = torch.eye(200)
    torch.testing.assert_close(made(eye).T * made.scale(), scaled.sign() * (scaled.abs() >= 0.5))
    made.uniform = lambda like: torch.rand(like.shape, generator=torch.Generator().manual_seed(7))
    inside = scaled.abs() < 1
    found = (made(eye).T * made.scale()).round().abs()[inside].mean()
    assert float(found) == pytest.approx(float(scaled.abs()[inside].mean()), abs=0.01)
    made.eval()
    torch.testing.assert_close(made(eye).T * made.scale(), made.codes())


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"bits": 1.0}, "greater than 1"),
        ({"bits": 9.0}, "less than or equal to 8"),
        ({"strategy": "stochastic", "bits": 4.0}, "ternary"),
        ({"learnable_norm": True}, "needs a norm"),
        ({"activation_range": 126}, "128 or 127"),
        ({"lambda_warmup": 2.0}, "less than or equal to 1"),
        ({"targets": []}, "at least 1"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        BitNet(**fields)


class Classes:
    """Cross-entropy of a network's outputs for three classes."""

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict()

    def collate(self, examples: Any, rng: Any) -> dict[str, Tensor]:
        return {name: torch.stack([torch.as_tensor(row[name]) for row in examples]) for name in ("x", "y")}

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        return Loss(F.cross_entropy(model(batch["x"]), batch["y"]))


def test_any_module_takes_the_layers_trains_and_is_packed() -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    method = BitNet(scale="mean", ignore=["4"])
    replaced = network()
    first = replaced[0].weight
    assert method.replace(replaced) == ["0", "2"]
    assert (replaced[0].weight is first, replaced[0].norm) == (True, "layernorm")
    expected = replaced.eval()(drawn(64, 8))
    assert pack_layers(replaced) == ["0", "2"]
    assert torch.equal(replaced(drawn(64, 8)), expected)
    trained, rows = network(), [{"x": x, "y": i % 3} for i, x in enumerate(drawn(64, 8))]
    done = intaglio.train(trained, rows, objective=Classes(), modifiers=[method], steps=30, learning_rate=1e-2)
    assert done.history[-1].loss < done.history[0].loss
    assert [isinstance(layer, PackedLinear) for layer in trained] == [True, False, True, False, False]
    for method, match in (
        (BitNet(targets=["nowhere"]), "names no layer"),
        (BitNet(ignore=["*"]), "leave no layer of this model to replace"),
    ):
        with pytest.raises(IntaglioError, match=match):
            method.replace(nn.Sequential(nn.Linear(2, 2)))


IDS = torch.randint(8, 150, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@torch.no_grad()
def test_training_leaves_what_its_last_evaluation_saw(family: str, tmp_path: Path) -> None:
    ckpt = checkpoint(family, layers=1)
    seen: list[Tensor] = []

    def judge(done: intaglio.Checkpoint) -> dict[str, float]:
        seen.append(done.model(IDS).logits)
        return {"loss": 0.0}

    with torch.enable_grad():
        run(ckpt, modifiers=[BitNet(lambda_warmup=1.0)], evaluate=judge, evaluate_every=1, steps=3)
    assert ckpt.kind == "runtime"
    assert torch.equal(ckpt.model(IDS).logits, seen[-1])
    assert not torch.equal(seen[0], seen[-1])
    projections = [m for m in ckpt.model.modules() if isinstance(m, PackedLinear)]
    assert len(projections) == len(tiny_linears(family))
    # Each part of a fused weight has a scale of its own.
    assert len({float(m.weight_scale) for m in projections}) == len(projections)
    assert not any(p.grad is not None for p in ckpt.model.parameters())
    ckpt.save(tmp_path / "out")
    assert torch.equal(intaglio.load(tmp_path / "out").model(IDS).logits, seen[-1])


def tiny_linears(family: str, layers: int = 1) -> list[Any]:
    return anatomy(tiny_model(family, layers=layers)).all_linears()


def test_bytes_shrink_and_parameters_are_counted_as_weights() -> None:
    ckpt = checkpoint(layers=2)
    before, count = ckpt.bytes, count_parameters(ckpt.model)
    projections = sum(o * i for _, linear in tiny_linears("llama", 2) for o, i in [linear.shape])
    BitNet().apply(ckpt)
    assert count_parameters(ckpt.model) == count + len(tiny_linears("llama", 2))  # and a scale each
    # The widths of 32 and 48 are filled up to 64 columns, 16 bytes.
    rows = sum(linear.shape[0] for _, linear in tiny_linears("llama", 2))
    assert ckpt.bytes == before - 4 * projections + 16 * rows + 4 * len(tiny_linears("llama", 2))
    held = intaglio.Segments.of(IDS)
    side = Evaluator(checkpoint(layers=2), held, timed=False).measure(ckpt)
    assert (side["bytes"], side["parameters"]) == (ckpt.bytes, count_parameters(ckpt.model))


def test_shadow_weights_train_on_and_are_packed_later(tmp_path: Path) -> None:
    ckpt = checkpoint(layers=1)
    run(ckpt, modifiers=[BitNet(keep="shadow")], steps=2)
    ckpt.save(tmp_path / "shadow")
    again = intaglio.load(tmp_path / "shadow")
    assert sum(isinstance(m, BitLinear) for m in again.model.modules()) == 7
    with pytest.raises(IntaglioError, match="trained with scale: None; mean does not fit"):
        run(again, modifiers=[BitNet(scale="mean")], steps=1)
    before = {name: p.clone() for name, p in again.model.named_parameters()}
    run(again, modifiers=[BitNet(keep="shadow")], steps=2)
    assert all(not torch.equal(p, before[name]) for name, p in again.model.named_parameters() if p.ndim > 1)
    expected = again.model(IDS).logits
    BitNet().apply(again)
    assert torch.equal(again.model(IDS).logits, expected)
    assert again.record.live[0]["packed"] is True
    with pytest.raises(IntaglioError, match="packed codes of bitnet"):
        run(again, modifiers=[BitNet()], steps=1)
    # The rest of the model can be trained on; codes stay.
    codes = [m.weight_packed.clone() for m in again.model.modules() if isinstance(m, PackedLinear)]
    norm = again.model.model.norm.weight.clone()
    run(again, steps=2)
    assert not torch.equal(again.model.model.norm.weight, norm)
    left = [m.weight_packed for m in again.model.modules() if isinstance(m, PackedLinear)]
    assert all(torch.equal(a, b) for a, b in zip(codes, left, strict=True))


def test_zeros_of_a_pruning_stay_zeros_while_it_trains() -> None:
    ckpt = checkpoint(layers=1)
    intaglio.Magnitude(pattern="2:4").apply(ckpt)
    zeros = [linear.read() == 0 for _, linear in anatomy(ckpt.model).all_linears()]
    with pytest.raises(IntaglioError, match=r"half of .* is zero, so its median is 0"):
        run(ckpt, modifiers=[BitNet()], steps=1)
    run(ckpt, modifiers=[BitNet(scale="mean")], steps=3)
    layers = [m for m in ckpt.model.modules() if isinstance(m, PackedLinear)]
    assert all(bool((m.codes()[zero] == 0).all()) for m, zero in zip(layers, zeros, strict=True))


def test_decay_ends_at_its_step() -> None:
    found: list[float] = []

    class Spy(ModifierSession):
        def attach(self, run: TrainingRun) -> Spy:
            self.run = run
            return self

        def after_step(self, step: int) -> None:
            assert self.run.optimizer is not None
            found.append(max(group["weight_decay"] for group in self.run.optimizer.param_groups))

    run(checkpoint(layers=1), modifiers=[BitNet(decay_until=0.5), Spy()], steps=4, weight_decay=0.1)
    assert found == [0.1, 0.1, 0.0, 0.0]


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_it_generates_with_a_cache_and_drafts_without_loss(family: str) -> None:
    ckpt = checkpoint(family, layers=2)
    BitNet(bits=8.0, per="row").apply(ckpt)
    prompt = torch.tensor([[5, 9, 30, 5, 9, 30, 5, 9]])
    wanted = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    slow = ckpt.model.generate(prompt, use_cache=False, **wanted)
    assert torch.equal(ckpt.model.generate(prompt, **wanted), slow)
    decoder = Speculative(PromptLookup())
    assert torch.equal(ckpt.model.generate(prompt, custom_generate=decoder, **wanted), slow)


@torch.no_grad()
def test_half_precision_works(tmp_path: Path) -> None:
    ckpt = checkpoint(layers=2)
    BitNet().apply(ckpt)
    expected = ckpt.model(IDS).logits
    ckpt.save(tmp_path / "out")
    half = intaglio.load(tmp_path / "out", dtype="bfloat16")
    found = half.model(IDS).logits
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).abs().mean() / expected.abs().mean()) < 0.1
    whole = [m for m in half.model.modules() if isinstance(m, PackedLinear)]
    assert all(m.weight_packed.dtype == torch.uint8 for m in whole)


def test_mixed_precision_trains() -> None:
    ckpt = checkpoint(layers=1)
    done = run(ckpt, modifiers=[BitNet()], steps=2, precision="bfloat16")
    assert all(torch.isfinite(torch.tensor(line.loss)) for line in done.history)


def test_at_eight_bits_little_changes() -> None:
    model = tiny_model("llama", layers=2)
    ckpt = intaglio.Checkpoint(copy.deepcopy(model), None, "tiny")
    BitNet(bits=8.0, activation_bits=None).apply(ckpt)
    with torch.no_grad():
        expected, found = model(IDS).logits, ckpt.model(IDS).logits
    assert float((found - expected).abs().mean() / expected.abs().mean()) < 0.05


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (BitNet(targets=["*.nowhere"]), r"targets: '.*nowhere' names no layer"),
        (BitNet(ignore=["layers.9.*"]), r"ignore: 'layers\.9\..' names no layer"),
        (BitNet(ignore=["layers.*"]), "leave no layer"),
    ],
)
def test_names_that_are_none(method: BitNet, match: str) -> None:
    ckpt = checkpoint(layers=1)
    with pytest.raises(IntaglioError, match=match):
        method.apply(ckpt)
    with pytest.raises(IntaglioError, match=match):
        method.check([(name, *linear.shape) for name, linear in anatomy(ckpt.model).all_linears()])
    assert ckpt.record.steps == []


def test_weights_without_a_scale_and_half_of_a_fused_module_are_refused() -> None:
    ckpt = checkpoint("phi3", layers=1)
    with pytest.raises(IntaglioError, match="are one module of this model; name both or neither"):
        BitNet(ignore=["*qkv_proj[[]q]"]).apply(ckpt)
    linear = anatomy(ckpt.model).linears(0)[0]
    linear.write(torch.zeros(linear.shape))
    with pytest.raises(IntaglioError, match="all zeros"):
        BitNet().apply(ckpt)
    linear.write(torch.full(linear.shape, float("nan")))
    with pytest.raises(IntaglioError, match="not finite"):
        BitNet().apply(ckpt)
    assert ckpt.record.steps == []
    assert not any(isinstance(m, BitLinear) for m in ckpt.model.modules())


STEP = {"train": {"steps": 1, "modifiers": [{"bitnet": {}}]}}


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ([STEP, {"wanda": {"sparsity": 0.5}}], "wanda cannot follow train: it needs linear_weights"),
        ([{"bitnet": {}}, {"magnitude": {"sparsity": 0.5}}], "magnitude cannot follow bitnet"),
        ([{"bitnet": {}}, {"train": {"steps": 1, "lora": {}}}], "train cannot follow bitnet"),
        ([{"bitnet": {}}, STEP], "train cannot follow bitnet"),
        (
            [{"train": {"steps": 1, "lora": {}, "modifiers": [{"bitnet": {}}]}}],
            "lora adapts plain matrices, and bitnet",
        ),
    ],
)
def test_impossible_orders_are_refused_from_the_declarations(steps: list[Any], match: str) -> None:
    with pytest.raises(IntaglioError, match=match):
        Recipe.from_dict({"steps": steps})


def test_pruned_before_and_unmasked_after_is_accepted() -> None:
    Recipe.from_dict({"steps": [{"wanda": {"sparsity": 0.4}}, STEP, {"layerwise_unmasking": {"configuration": "01"}}]})


def test_pruning_and_adapters_behind_it_are_one_sentence_in_python() -> None:
    ckpt = checkpoint(layers=1)
    BitNet().apply(ckpt)
    with pytest.raises(IntaglioError, match="no plain projections"):
        intaglio.Magnitude(sparsity=0.5).apply(ckpt)
    with pytest.raises(IntaglioError, match="no linear layer left to adapt"):
        run(ckpt, lora={"r": 2})
    with pytest.raises(IntaglioError, match="leave lora and freeze out"):
        run(checkpoint(layers=1), modifiers=[BitNet()], lora={"r": 2})


def test_checks_of_a_training_step_reach_the_shaper() -> None:
    recipe = Recipe.from_dict(
        {"steps": [{"train": {"steps": 1, "modifiers": [{"bitnet": {"ignore": ["*.nowhere"]}}]}}]}
    )
    (step,) = recipe.steps
    linears = [(name, *linear.shape) for name, linear in tiny_linears("llama")]
    with pytest.raises(IntaglioError, match="names no layer"):
        step.check(linears)  # type: ignore[union-attr]


def test_a_shadow_model_learns() -> None:
    ckpt = checkpoint(layers=2)
    done = run(ckpt, TEXTS, objective=CausalLM(length=24), modifiers=[BitNet()], steps=40, learning_rate=3e-3)
    assert done.history[-1].loss < 0.7 * done.history[0].loss


def test_transformers_have_no_inner_norm_but_in_the_paper_and_other_modules_a_layer_norm() -> None:
    model, network = tiny_model("llama", layers=1), nn.Sequential(nn.Linear(2, 2))
    norms = [BitNet.paper().quantization(model).norm, BitNet().quantization(model).norm]
    assert [*norms, BitNet().quantization(network).norm] == ["layernorm", "none", "layernorm"]
