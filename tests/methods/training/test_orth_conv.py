"""Orthogonal convolutions: L_orth and its identity, spectra by FFT, the modifier and its baselines."""

from __future__ import annotations

import inspect
import io
import json
import math
import textwrap
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from intaglio import report
from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new_image_model
from intaglio.cli import inspect as inspect_views
from intaglio.cli.app import app
from intaglio.cli.inspect import spectrum_table
from intaglio.errors import IntaglioError
from intaglio.measures.conv_spectrum import layer_spectra, spread
from intaglio.methods.training.orth_conv import OrthConv
from intaglio.modeling.convolutions import Kernel, convolutions, gram_distance
from intaglio.trainer import train
from intaglio.trainer.classification import Classification
from intaglio.trainer.protocols import Loss, TrainingRun
from tests.families import tiny_checkpoint_dir
from tests.trainer.helpers import checkpoint

EXAMPLES = ({"linear": True}, {"linear": True, "form": "spectral_norm"})
BASE: dict[str, Any] = {}
ALIVE = {
    "regularization_weight": 1.0,
    "form": "kernel",
    "squared": False,
    "linear": True,
    "padding": 1,
    "skip_first": True,
    "ignore": ["2"],
}
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
RO = [(3, 4, 3, 1), (4, 4, 3, 1), (8, 2, 3, 2), (6, 2, 3, 2)]
CO = [(9, 2, 3, 2), (6, 4, 3, 1)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kernel(m: int, c: int, k: int, s: int, seed: int = 0, sides: int = 2, groups: int = 1) -> Kernel:
    weights = torch.randn(groups, m, c, *(k,) * sides, generator=generator(seed), dtype=torch.float64)
    return Kernel(weights, (s,) * sides)


def matrix(one: Kernel, size: int) -> Tensor:
    """The matrix of a convolution with circular padding, by convolving the identity."""
    weights, sides = one.groups_GMCk, len(one.sides)
    groups = len(weights)
    basis = torch.eye(groups * weights.shape[2] * size**sides, dtype=weights.dtype).unflatten(1, (-1, *(size,) * sides))
    pads = list(chain.from_iterable((0, side - 1) for side in reversed(one.sides)))
    padded = F.pad(basis, pads, mode="circular")
    return CONVOLVE[sides](padded, weights.flatten(0, 1), stride=one.stride, groups=groups).flatten(1).T


def circular(images: Tensor, weight: Tensor) -> Tensor:
    pad = weight.shape[-1] // 2
    return F.conv2d(F.pad(images, (pad,) * 4, mode="circular"), weight)


def dirac(channels: int, k: int = 3) -> Tensor:
    return nn.init.dirac_(torch.empty(channels, channels, k, k, dtype=torch.float64))


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")
        second = nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular")
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(96, 10))


ROWS = [{"pixel_values": torch.rand(1, 8, 8, generator=generator(n)), "label": n % 10} for n in range(12)]


def trained(model: nn.Module, method: OrthConv | None, **more: Any) -> Any:
    arguments: dict[str, Any] = {
        "steps": 4,
        "batch_size": 4,
        "optimizer": "sgd",
        "momentum": 0.0,
        "schedule": "constant",
    }
    arguments |= {"learning_rate": 0.05, "warmup": 0, "max_grad_norm": 0, "log_every": 1, **more}
    modifiers = [] if method is None else [method]
    return train(Checkpoint(model), ROWS, objective=Classification(), modifiers=modifiers, **arguments)


def observe(method: OrthConv) -> Any:
    model = net()
    result = trained(model, method)
    return model.state_dict(), [(row.loss, row.parts) for row in result.history]


# --- Faithful means ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*RO, *CO])
def test_the_loss_times_the_outputs_is_the_distance_of_the_matrix(shape: tuple[int, int, int, int]) -> None:
    """||Kmat Kmat^T - I||_F^2 = N^2 L_orth, (M,C,k,S,input 8x8), four RO and two CO, all equal (N = 8/S)."""
    one = kernel(*shape)
    assert (one.rows <= one.columns) == (shape in RO)
    expected = gram_distance(matrix(one, 8))  # the smaller Gram matrix
    torch.testing.assert_close((8 // shape[3]) ** 2 * one.orthogonality_loss(), expected, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize(("sides", "groups", "k", "s"), [(1, 1, 3, 1), (1, 3, 4, 2), (2, 2, 3, 1), (3, 1, 2, 1)])
def test_the_identity_in_other_dimensions_and_in_groups(sides: int, groups: int, k: int, s: int) -> None:
    one, size = kernel(2, 3, k, s, sides=sides, groups=groups), 8 if sides < 3 else 4
    expected = gram_distance(matrix(one, size))
    torch.testing.assert_close((size // s) ** sides * one.orthogonality_loss(), expected, rtol=1e-10, atol=1e-9)


def test_a_dilated_kernel_is_one_with_zeros_between_its_taps() -> None:
    """Grouped/dilated convs need per-group autocorrelation."""
    module = nn.Conv2d(4, 6, 3, dilation=2, groups=2, padding=2, padding_mode="circular", bias=False).double()
    one = Kernel.from_module(module)
    assert one.sides == (5, 5)
    assert one.exact
    inputs = torch.eye(4 * 81, dtype=torch.float64).unflatten(1, (4, 9, 9))
    expected = gram_distance(module(inputs).flatten(1).T.detach())
    torch.testing.assert_close(81 * one.orthogonality_loss(), expected, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(
        one.singular_values(9), torch.linalg.svdvals(module(inputs).flatten(1)), rtol=0, atol=1e-9
    )


def test_a_dirac_kernel_and_its_multiples() -> None:
    """Dirac, M = C, S = 1: L_orth = 0 exactly; scaled by c: M (c^2-1)^2; c = 2, M = 3 gives 27."""
    one = Kernel(dirac(3)[None], (1, 1))
    assert float(one.orthogonality_loss()) == 0
    assert torch.equal(matrix(Kernel(dirac(3, 1)[None], (1, 1)), 4), torch.eye(48, dtype=torch.float64))
    assert float(Kernel(2 * dirac(3)[None], (1, 1)).orthogonality_loss()) == pytest.approx(27)


@pytest.mark.parametrize(("m", "c"), [(3, 5), (5, 3), (4, 4)])
def test_a_kernel_of_one_tap_is_a_matrix(m: int, c: int) -> None:
    """1x1 kernel, S=1: L_orth = ||W W^T - I||_F^2 (RO) and = ||W^T W - I||_F^2 in CO."""
    one = kernel(m, c, 1, 1)
    w = one.groups_GMCk[0, :, :, 0, 0]
    expected = (w @ w.T if m <= c else w.T @ w) - torch.eye(min(m, c), dtype=torch.float64)
    torch.testing.assert_close(one.orthogonality_loss(), expected.square().sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("m", [5, 8, 11])
def test_patches_reduce_to_the_matrix_form(m: int) -> None:
    """k=S (patchify): A is 1x1; L_orth reduces to the matrix form on W reshaped (M, C k^2)."""
    one = kernel(m, 2, 2, 2)
    assert one.autocorrelation().shape == (1, m, m, 1, 1)
    torch.testing.assert_close(
        one.orthogonality_loss(), gram_distance(one.groups_GMCk[0].flatten(1)), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("shape", [RO[0], CO[1], RO[2]])
def test_invariant_to_mixes_of_channels_and_to_shifts_in_the_window(shape: tuple[int, int, int, int]) -> None:
    """Invariant to a left orthogonal mix of output channels, to input-channel mixes; to shifts of the support."""
    m, c, _, s = shape
    small = torch.randn(m, c, 2, 2, generator=generator(), dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator(n), dtype=torch.float64))[0] for n in (m, c))
    mixed = torch.einsum("om,mcij,cd->odij", left, small, right)
    variants = [small, mixed, *(F.pad(small, pads) for pads in ((0, 1, 0, 1), (1, 0, 1, 0), (1, 0, 0, 1)))]
    losses = torch.stack([Kernel(one[None], (s, s)).orthogonality_loss() for one in variants[:2]])
    torch.testing.assert_close(losses, losses[:1].expand(2), rtol=1e-10, atol=1e-10)
    losses = torch.stack([Kernel(one[None], (s, s)).orthogonality_loss() for one in variants[2:]])
    torch.testing.assert_close(losses, losses[:1].expand(3), rtol=1e-10, atol=1e-10)


def test_no_loss_keeps_lengths_at_every_size_and_zero_padding_loses_energy_at_borders() -> None:
    """L_orth = 0 implies ||conv(x)|| = ||x|| for all x (CO) under circular padding, any size; not zero padding."""
    weight = torch.zeros(4, 2, 3, 3, dtype=torch.float64)  # channels shifted to different neighbours
    for out, (channel, i, j) in enumerate([(0, 0, 1), (1, 2, 2)]):
        weight[out, channel, i, j] = 1
    one = Kernel(weight[None], (1, 1))
    assert float(one.orthogonality_loss()) == 0
    for size in (5, 8, 13):
        images = torch.randn(3, 2, size, size, generator=generator(size), dtype=torch.float64)
        torch.testing.assert_close(circular(images, weight).norm(), images.norm())
        assert float(F.conv2d(images, weight, padding=1).norm()) < 0.98 * float(images.norm())


def test_descent_reaches_orthogonality_but_for_the_square_case() -> None:
    """Adam lr .01, double: (8,2,3,2) reaches 1e-30, singular values 1 at 16x16; (4,4,3,1) is stuck near .08."""

    def fitted(m: int, c: int, k: int, s: int) -> Kernel:
        weight = nn.Parameter(0.3 * kernel(m, c, k, s).groups_GMCk)
        optimizer = torch.optim.Adam([weight], lr=0.03)
        for _ in range(250):
            optimizer.zero_grad()
            Kernel(weight, (s, s)).orthogonality_loss().backward()
            optimizer.step()
        return Kernel(weight.detach(), (s, s))

    wide, square = fitted(8, 2, 3, 2), fitted(4, 4, 3, 1)
    assert float(wide.orthogonality_loss()) < 1e-4
    for size in (8, 16):
        values = wide.singular_values(size)
        assert float((values - 1).abs().max()) < 1e-2
    assert float(square.orthogonality_loss()) > 1e-3


shapes = st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


@given(shapes, st.integers(0, 99), st.floats(0.05, 2))
@settings(max_examples=40, deadline=None)
def test_never_negative_and_the_band_holds_every_singular_value(
    shape: tuple[int, int, int, int], seed: int, scale: float
) -> None:
    """The CO form with the subtraction must be >= 0 up to rounding; err_s^2 <= alpha L_orth at any size."""
    drawn = kernel(*shape, seed=seed)
    one = Kernel(scale * drawn.groups_GMCk, drawn.stride)
    loss = float(one.orthogonality_loss())
    assert loss >= -1e-9
    error = math.sqrt(one.spectral_bound() * max(0.0, loss))
    for size in (6, 12):
        values = one.singular_values(size)
        assert float((values.square() - 1).abs().max()) <= error + 1e-7


@given(shapes, st.integers(0, 99), st.sampled_from([(1, 1), (2, 1), (2, 3)]))
@settings(max_examples=25, deadline=None)
def test_singular_values_by_fft_are_those_of_the_matrix(
    shape: tuple[int, int, int, int], seed: int, more: tuple[int, int]
) -> None:
    """2-D FFT of the zero-padded kernel; for stride S fold S^2 aliased frequencies into an M x C S^2 matrix."""
    sides, groups = more
    one = kernel(*shape, seed=seed, sides=sides, groups=groups)
    values, expected = one.singular_values(6), torch.linalg.svdvals(matrix(one, 6))
    torch.testing.assert_close(values, expected[: len(values)], rtol=0, atol=1e-8)
    assert len(values) == groups * (6 // shape[3]) ** sides * min(one.rows, one.columns)


def test_different_strides_and_sides_in_each_dimension() -> None:
    one = Kernel(torch.randn(1, 5, 2, 3, 2, generator=generator(), dtype=torch.float64), (2, 1))
    expected = torch.linalg.svdvals(matrix(one, 6))
    torch.testing.assert_close(one.singular_values(6), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(18 * one.orthogonality_loss(), gram_distance(matrix(one, 6)), rtol=1e-9, atol=1e-9)
    assert one.reach == (2, 1)


def test_existence() -> None:
    """An orthogonal convolution exists iff RO: M <= C k^2; CO: S <= k."""
    cases = [
        ((9, 1, 3, 4), True),
        ((10, 1, 3, 4), False),
        ((5, 1, 2, 2), True),
        ((17, 1, 3, 4), False),
        ((3, 4, 3, 1), True),
    ]
    assert [kernel(*shape).can_be_orthogonal for shape, _ in cases] == [possible for _, possible in cases]


# --- The modifier -----------------------------------------------------------------------------------------------------


def test_a_step_of_descent_by_hand_adds_lambda_times_the_sum_over_layers() -> None:
    model, other = net(), net()
    result = trained(model, OrthConv(regularization_weight=0.3), steps=1, batch_size=12)
    pixels, labels = torch.stack([row["pixel_values"] for row in ROWS]), torch.tensor([row["label"] for row in ROWS])
    penalty = torch.stack([Kernel.from_module(other[n]).orthogonality_loss() for n in (0, 2)]).sum()
    loss = F.cross_entropy(other(pixels), labels) + 0.3 * penalty
    loss.backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert b.grad is not None
        torch.testing.assert_close(a, b - 0.05 * b.grad, rtol=0, atol=1e-5)
    assert result.history[0].parts["orth"] == pytest.approx(float(penalty.detach()), rel=1e-4)
    assert result.history[0].loss == pytest.approx(float(loss.detach()), rel=1e-4)


def test_the_penalty_narrows_the_spectrum_and_the_reshaped_kernel_does_not_bound_it() -> None:
    spreads = {}
    for form in ("convolution", "kernel"):
        model = net()[:3]
        for _ in range(150):
            penalty = OrthConv(form=form).penalty(model)
            model.zero_grad()
            penalty.backward()
            with torch.no_grad():
                for parameter in (model[0].weight, model[2].weight):
                    parameter -= 0.05 * parameter.grad
        spreads[form] = spread(layer_spectra(model, 32))
    assert spreads["convolution"] < 0.1
    assert spreads["kernel"] > 0.5


def test_forms_of_a_layer() -> None:
    convolution, linear = nn.Conv2d(4, 6, 3, groups=2), nn.Linear(3, 5)
    kernels = convolution.weight.unflatten(0, (2, 3)).flatten(2)
    expected = sum(gram_distance(own) for own in kernels)
    torch.testing.assert_close(OrthConv(form="kernel").layer_penalty(convolution), expected)
    w = linear.weight
    torch.testing.assert_close(OrthConv().layer_penalty(linear), (w.T @ w - torch.eye(3)).square().sum())
    plain, root = (OrthConv(squared=squared).layer_penalty(convolution) for squared in (True, False))
    torch.testing.assert_close(root, plain.sqrt())


def test_the_norm_itself_has_no_gradient_at_zero() -> None:
    """Unsquared norm has an undefined gradient at 0."""
    layer = nn.Conv2d(3, 3, 3, bias=False)
    layer.weight = nn.Parameter(dirac(3).float())
    value = OrthConv(squared=False).layer_penalty(layer)
    value.backward()
    assert float(value.detach()) == 0
    assert layer.weight.grad is not None
    assert float(layer.weight.grad.abs().max()) == 0


def test_wangs_padding_leaves_shifts_out() -> None:
    """Padding of the autocorrelation: P = floor((k-1)/S)*S, not k//2."""
    layer, wang = nn.Conv2d(3, 3, 3), OrthConv.wang()
    assert Kernel.from_module(layer).reach == (2, 2)
    assert Kernel.from_module(layer).autocorrelation(1).shape[-1] == 3
    with torch.no_grad():
        assert float(wang.layer_penalty(layer)) < float(OrthConv(squared=False).layer_penalty(layer))
    assert (wang.squared, wang.padding, wang.skip_first) == (False, 1, True)
    assert [name for name, _ in wang.layers(net())] == ["2"]
    assert OrthConv.wang(padding=2).padding == 2


@pytest.mark.parametrize("stride", [1, 2])
def test_wangs_identity_stands_where_their_code_puts_it(stride: int) -> None:
    """The code's target is zero but for an identity at floor(shifts / 2) of both dimensions."""
    layer = nn.Conv2d(3, 5, 3, stride=stride)
    shifts = F.conv2d(layer.weight, layer.weight, stride=stride, padding=1)
    target = torch.zeros_like(shifts)
    target[:, :, shifts.shape[-1] // 2, shifts.shape[-1] // 2] = torch.eye(5)
    torch.testing.assert_close(OrthConv.wang().layer_penalty(layer), (shifts - target).norm())


def test_layers_are_left_out_by_name_and_linear_layers_join() -> None:
    assert [name for name, _ in OrthConv().layers(net())] == ["0", "2"]
    assert [name for name, _ in OrthConv(ignore=["0"]).layers(net())] == ["2"]
    assert [name for name, _ in OrthConv(linear=True, ignore=["2"]).layers(net())] == ["0", "5"]


def test_spectral_norm_divides_and_bakes() -> None:
    model = net()
    names = model.state_dict().keys()
    trained(model, OrthConv(form="spectral_norm"), steps=20)
    assert model.state_dict().keys() == names
    for n in (0, 2):
        assert type(model[n]) is nn.Conv2d
        norm = torch.linalg.matrix_norm(model[n].weight.detach().flatten(1), 2)
        assert float(norm) == pytest.approx(1, abs=0.05)


def test_the_division_is_drawn_from_the_seed_and_baked_as_it_was_evaluated() -> None:
    x, outputs, state = ROWS[0]["pixel_values"][None], [], torch.get_rng_state()
    for seed in (0, 0, 1):
        model = net()
        session = OrthConv(form="spectral_norm").attach(TrainingRun(Checkpoint(model), 1, None, seed, Loss))
        assert torch.equal(torch.get_rng_state(), state)
        for n in (0, 2):
            model[n].parametrizations.weight.original.data.mul_(torch.arange(9).reshape(3, 3))
        outputs.append(model.eval()(x))
        model.train()
        torch.randn(1)
        state = torch.get_rng_state()
        session.detach()
        assert torch.equal(model.eval()(x), outputs[-1])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"regularization_weight": -1.0}, "greater than or equal to 0"),
        ({"form": "conv"}, "'convolution', 'kernel' or 'spectral_norm'"),
        ({"form": "kernel", "padding": 1}, "padding belongs to the form convolution"),
        ({"form": "spectral_norm", "squared": False}, "squared belongs to a penalty"),
    ],
)
def test_fields_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OrthConv(**fields)


def test_a_model_without_convolutions_is_refused() -> None:
    with pytest.raises(IntaglioError, match="orth_conv has nothing to regularise in LlamaForCausalLM"):
        train(checkpoint(layers=1), ["one text of a few words"], modifiers=[OrthConv()], steps=1)
    with pytest.raises(IntaglioError, match="ignore: 'x' names no layer of this model"):
        trained(net(), OrthConv(ignore=["x"]))
    with pytest.raises(IntaglioError, match="nothing to regularise in Sequential"):
        trained(net(), OrthConv(ignore=["*"]))


def test_the_five_lines_of_a_stock_trainer(tmp_path: Path) -> None:
    lines = inspect.getdoc(OrthConv) or ""
    code = textwrap.dedent(lines[lines.index("    class Regularized") : lines.index("\n\nThe identity")])
    assert len(code.strip().splitlines()) == 5
    regularizer = OrthConv(regularization_weight=0.3)
    names: dict[str, Any] = {"Trainer": Trainer, "regularizer": regularizer}
    exec(code, names)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(pixels)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    ours, model = net(), Model()
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=12, learning_rate=0.05, lr_scheduler_type="constant",
        optim="sgd", max_grad_norm=0.0, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    rows = [{"pixels": row["pixel_values"], "labels": row["label"]} for row in ROWS]
    names["Regularized"](model, arguments, train_dataset=rows).train()
    trained(ours, regularizer, steps=1, batch_size=12)
    for a, b in zip(model.net.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# --- The audit --------------------------------------------------------------------------------------------------------


def test_spectra_of_a_model_say_size_loss_and_exactness() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=3, padding=1), nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular"),
        nn.Conv2d(4, 2, 1), nn.Linear(3, 2), nn.Conv1d(2, 40, 3, stride=4),
    )  # fmt: skip
    layers = layer_spectra(model, 8)
    assert [layer.size for layer in layers] == [9, 8, 8, None, 8]
    assert [layer.exact for layer in layers] == [False, True, True, True, True]
    assert [layer.possible for layer in layers] == [True, True, True, True, False]
    assert [layer.kind for layer in layers] == ["convolution"] * 3 + ["linear", "convolution"]
    whole, one = Kernel.from_module(model[1]), layers[1]
    values = whole.singular_values(8)
    assert (one.minimum, one.maximum) == pytest.approx((float(values[-1]), float(values[0])))
    assert one.minimum < one.median < one.maximum
    assert one.curve[0] == one.maximum
    assert one.curve[-1] == one.minimum
    assert one.loss == pytest.approx(float(whole.orthogonality_loss()), rel=1e-5)
    error = math.sqrt(whole.spectral_bound() * one.loss)
    assert one.band == pytest.approx((math.sqrt(max(0.0, 1 - error)), math.sqrt(1 + error)), rel=1e-5)
    linear = layers[3]
    expected = torch.linalg.svdvals(model[3].weight.double())
    assert (linear.minimum, linear.maximum) == pytest.approx((float(expected[-1]), float(expected[0])))
    assert spread(layers) == pytest.approx(sum(layer.maximum - layer.minimum for layer in layers) / 5)


def test_the_size_must_fit() -> None:
    for size in (2, 7):
        with pytest.raises(
            IntaglioError, match=f"size is {size}; a multiple of the stride 2 from the kernel's side 3 on"
        ):
            kernel(2, 2, 3, 2).singular_values(size)
    with pytest.raises(IntaglioError, match="Sequential has neither convolutions nor linear layers"):
        layer_spectra(nn.Sequential(nn.ReLU()), 8)
    broken = nn.Conv2d(1, 1, 1)
    nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(IntaglioError, match="the weight of 0 holds values that are not finite"):
        layer_spectra(nn.Sequential(broken), 8)


def test_a_stock_resnet_is_trained_saved_and_inspected(tmp_path: Path) -> None:
    ckpt = new_image_model("resnet", width=8, depth=2, image_size=8, num_channels=1)
    rows = [{"image": np.full((8, 8), 20 * n, dtype=np.uint8), "label": str(n % 2)} for n in range(8)]
    before = OrthConv().penalty(ckpt.model)
    modifiers = [OrthConv(regularization_weight=1.0)]
    train(ckpt, rows, objective=Classification(), modifiers=modifiers, steps=12, batch_size=4, learning_rate=1e-2)
    assert float(OrthConv().penalty(ckpt.model)) < 0.5 * float(before)
    (table,) = ckpt.record.steps[-1].chosen["modifiers"]["orth_conv"]["tables"]
    first = layer_spectra(ckpt.model, 8)[0]
    assert table["rows"][0] == [
        first.name,
        *(f"{v:.3f}" for v in (first.loss, first.minimum, first.median, first.maximum)),
    ]
    assert len(table["rows"]) == len(OrthConv().layers(ckpt.model))
    ckpt.save(tmp_path / "out")
    said = CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--spectrum", "--size", "8", "--json"])
    layers = {layer["name"]: layer for layer in json.loads(said.stdout)["layers"]}
    kernels = dict(convolutions(ckpt.model))
    assert layers.keys() >= kernels.keys()
    assert not layers["resnet.embedder.embedder.convolution"]["exact"]
    losses = {name: float(Kernel.from_module(kernels[name]).orthogonality_loss()) for name in kernels}
    assert {name: layers[name]["loss"] for name in kernels} == pytest.approx(losses, rel=1e-3, abs=1e-5)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--spectrum", "-o", str(tmp_path / "page.html")])
    assert f"page: {tmp_path / 'page.html'}" in shown.stdout
    assert (tmp_path / "page.html").is_file()


def test_inspect_writes_a_page_and_a_table(tmp_path: Path) -> None:
    model = tiny_checkpoint_dir("llama", tmp_path / "model", layers=1)
    page = tmp_path / "spectrum.html"
    document = inspect_views.spectrum(str(model), 8, page, None)
    assert json.loads(json.dumps(document)) == json.loads(json.dumps(document, allow_nan=False))
    assert len(document["layers"]) == 8
    names = [layer["name"] for layer in document["layers"]]
    text = page.read_text(encoding="utf-8")
    assert all(name[-33:] in text for name in names)
    assert text.count("<svg") == 1
    assert spectrum_table(document).row_count == 8
    assert report.spectrum_summary(document) in text.replace("&#39;", "'")
    with pytest.raises(IntaglioError, match=r"the page .*\.svg must be an \.html file"):
        inspect_views.spectrum(str(model), 8, tmp_path / "x.svg", None)


def test_the_table_of_a_terminal_shows_the_ends_of_names_and_whole_numbers() -> None:
    names = [f"efficientnet.encoder.blocks.{n}.depthwise_conv.depthwise_conv" for n in (0, 15)]
    layer = {"shape": [1152, 192, 1, 1], "stride": [1, 1], "loss": 5.53e5, "minimum": 0.1, "median": 1.2,
             "maximum": 17.2, "band": [0, 20], "exact": False, "possible": True, "spread": 17.1}  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(spectrum_table({"model": "m", "size": 16, "layers": [{**layer, "name": name} for name in names]}))
    text = console.export_text()
    assert text.count("17.200") == 2 + 1
    assert all(f"{name[-30:]} " in text for name in names)
