"""STN: gates, perturbations and regularizers by the card, the order of steps, replays, stock models at the end."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.training.stn import STN, Hyperparameters, Regularizer, Transform, found_schedule
from intaglio.methods.training.stn.hyperparameters import inverse_softplus
from intaglio.methods.training.stn.layers import GatedLayer, GatedLSTM, HypernetInput
from intaglio.methods.training.stn.regularizers import (
    KINDS,
    brightness,
    contrast,
    cutout,
    dropout,
    hue,
    input_scale,
    locked_dropout,
    names_of,
    saturation,
)
from intaglio.methods.training.stn.session import Replay, SelfTuning
from intaglio.trainer import ModifierSession, TrainingRun, train
from intaglio.trainer.classification import Classification
from intaglio.trainer.dataset import hold_out
from intaglio.trainer.hf_trainer import HeldOutBatches
from intaglio.trainer.history import columns
from intaglio.trainer.protocols import Batch, Loss
from tests.alive import alive
from tests.families import tiny_model
from tests.trainer.helpers import checkpoint, run, same, weights

BASE = {"hyper_warmup": 0, "train_steps": 1, "regularizers": [{"kind": "dropout", "start": 0.2}]}
MANY = [{"kind": "weight_decay"}, {"kind": "drop_connect"}, {"kind": "activation", "at": ["*mlp"]}]
EXAMPLES = (
    BASE,
    {"hyper_warmup": 1, "tune_scales": False, "regularizers": MANY, "targets": ["*mlp*"], "gate_std": 0.0},
    {"schedule": {"step": [1.0, 2.0], "dropout": [0.1, 0.2]}},
)
ALIVE = {
    "regularizers": [{"kind": "dropout", "start": 0.3}],
    "targets": ["*mlp*"],
    "ignore": ["*up_proj"],
    "validation": 0.4,
    "train_steps": 2,
    "valid_steps": 2,
    "hyper_warmup": 2,
    "hyper_learning_rate": 0.1,
    "scale_learning_rate": 0.1,
    "scale": 1.0,
    "tune_scales": False,
    "entropy_weight": 1.0,
    "gate_std": 0.1,
    "schedule": alive({"step": [0.0], "dropout": [0.3]}),
}
PIXELS = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(1))
IMAGES = [{"pixel_values": pixels, "label": n % 3} for n, pixels in enumerate(PIXELS)]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def classify(model: nn.Module, data: Any = IMAGES, **more: Any) -> Any:
    settings = {"steps": 6, "batch_size": 4, "learning_rate": 0.1, "optimizer": "sgd", "log_every": 1, "warmup": 0}
    return train(Checkpoint(model), data, objective=Classification(), **{**settings, **more})


def attach(method: STN, model: nn.Module, loss: Callable[[Batch], Tensor] | None = None, **more: Any) -> Any:
    """A session outside the loop; `loss` of a batch, by default the model's mean square."""
    mean_square = lambda batch: model(batch["x"]).square().mean()  # noqa: E731
    compute = loss or mean_square
    held_out = more.pop("held_out", lambda n: {"x": torch.randn(5, 16, generator=torch.Generator().manual_seed(n))})
    run_ = TrainingRun(Checkpoint(model), 10, None, 0, lambda batch: Loss(compute(batch)), held_out=held_out, **more)
    return method.attach(run_)


def gated(layer: nn.Module, width: int = 2, std: float = 0.5) -> tuple[GatedLayer, HypernetInput]:
    state = HypernetInput(torch.zeros(1, width))
    return GatedLayer(layer, width, state, std, torch.Generator().manual_seed(0)), state


# --- gates -------------------------------------------------------------------------------------------------------


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(3, 4), lambda: torch.randn(5, 3)),
    "linear without bias": (lambda: nn.Linear(3, 4, bias=False), lambda: torch.randn(5, 6, 3)),
    "conv1d of GPT-2": (lambda: Conv1D(4, 3), lambda: torch.randn(5, 6, 3)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), lambda: torch.randn(5, 3, 6, 6)),
    "convolution in one dimension": (lambda: nn.Conv1d(3, 4, 3), lambda: torch.randn(5, 3, 6)),
    "embedding": (lambda: nn.Embedding(7, 4), lambda: torch.randint(7, (5, 6))),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_without_gates_the_output_is_the_plain_layers_exactly(kind: str) -> None:
    """U = 0 and e0 = 1: output equals the plain layer exactly; d(val loss)/dh = 0 exactly."""
    make, inputs = LAYERS[kind]
    layer, x = make(), inputs()
    wrapped, state = gated(layer, std=0.0)
    h_BH = torch.randn(5, 2, requires_grad=True)
    state.set(h_BH)
    out = wrapped(x)
    assert torch.equal(out, layer(x))
    (gradient,) = torch.autograd.grad(out.square().sum(), h_BH)
    assert torch.equal(gradient, torch.zeros(5, 2))


@pytest.mark.parametrize("kind", LAYERS)
def test_each_example_has_the_weight_of_its_own_hyperparameters(kind: str) -> None:
    """One-example check: output equals that of the layer with materialised row-gated weights (1e-6)."""
    make, inputs = LAYERS[kind]
    layer, x = make(), inputs()
    wrapped, state = gated(layer)
    with torch.no_grad():
        wrapped.scale.fill_(1.5)
    h_BH = torch.randn(5, 2)
    state.set(h_BH)
    out = wrapped(x)
    for n, h_H in enumerate(h_BH):
        baked = GatedLayer.bake(copy.deepcopy(wrapped), h_H)
        assert torch.allclose(out[n], baked(x[n : n + 1])[0], atol=1e-6)
    u = wrapped.gate_weight @ h_BH[0]
    if kind == "linear":
        weight = 1.5 * layer.weight + u[:4, None] * wrapped.hyper_weight
        assert torch.allclose(wrapped.effective(h_BH[0])[0], weight, atol=1e-6)
        assert torch.allclose(wrapped.effective(h_BH[0])[1], 1.5 * layer.bias + u[4:] * wrapped.hyper_bias, atol=1e-6)


def test_initial_weights_are_those_of_the_code() -> None:
    """W_h uniform within 1 / sqrt(fan_in), 0.1 for embeddings; U normal with 0.01; e0 = 1."""
    wrapped, _ = gated(nn.Linear(400, 50), width=100, std=0.01)
    assert float(wrapped.hyper_weight.abs().max()) == pytest.approx(400**-0.5, rel=0.01)
    assert float(wrapped.gate_weight.std()) == pytest.approx(0.01, rel=0.05)
    assert wrapped.gate_weight.shape == (100, 100)
    assert float(wrapped.scale) == 1
    table, _ = gated(nn.Embedding(200, 20))
    assert float(table.hyper_weight.abs().max()) == pytest.approx(0.1, rel=0.01)
    channels, _ = gated(nn.Conv2d(16, 32, 5))
    assert float(channels.hyper_weight.abs().max()) == pytest.approx((16 * 25) ** -0.5, rel=0.01)


@pytest.mark.parametrize(("layers", "batch_first", "both"), [(1, True, False), (2, False, False), (2, True, True)])
def test_a_gated_lstm_is_the_stock_one_without_gates(layers: int, batch_first: bool, both: bool) -> None:
    lstm = nn.LSTM(3, 4, num_layers=layers, batch_first=batch_first, bidirectional=both)
    state = HypernetInput(torch.zeros(1, 2))
    draws = torch.Generator().manual_seed(0)
    wrapped = GatedLSTM(lstm, lambda layer: GatedLayer(layer, 2, state, 0.0, draws))
    x = torch.randn(5, 6, 3) if batch_first else torch.randn(6, 5, 3)
    start = tuple(torch.randn(layers * (1 + both), 5, 4) for _ in range(2))
    for hx in (None, start):
        out, (h, c) = wrapped(x, hx)
        expected, (h_stock, c_stock) = lstm(x, hx)
        assert torch.allclose(out, expected, atol=1e-6)
        assert torch.allclose(h, h_stock, atol=1e-6)
        assert torch.allclose(c, c_stock, atol=1e-6)


def test_a_gated_lstm_has_the_dropout_of_the_stock_one_between_its_layers() -> None:
    lstm = nn.LSTM(3, 4, num_layers=2, dropout=1.0)
    draws = torch.Generator().manual_seed(0)
    wrapped = GatedLSTM(lstm, lambda layer: GatedLayer(layer, 2, HypernetInput(torch.zeros(1, 2)), 0.0, draws))
    x, outputs = torch.randn(6, 5, 3), []
    for mode in (True, False):
        outputs.append(wrapped.train(mode)(x)[0])
        assert torch.allclose(outputs[-1], lstm.train(mode)(x)[0], atol=1e-6)
    assert not torch.allclose(*outputs, atol=1e-3)


def test_the_gates_of_an_lstm_are_those_of_the_example_and_are_baked() -> None:
    torch.manual_seed(0)
    lstm, state = nn.LSTM(3, 4, batch_first=True), HypernetInput(torch.zeros(1, 2))
    draws = torch.Generator().manual_seed(0)
    wrapped = GatedLSTM(lstm, lambda layer: GatedLayer(layer, 2, state, 0.5, draws))
    x, h_BH = torch.randn(3, 6, 3), torch.randn(3, 2)
    state.set(h_BH)
    out = wrapped(x)[0]
    before = lstm.weight_hh_l0.detach().clone()
    baked = wrapped.bake(h_BH[1])
    assert baked is lstm
    assert not torch.equal(before, lstm.weight_hh_l0)
    assert torch.allclose(lstm(x[1:2])[0][0], out[1], atol=1e-6)


def test_flattened_rows_take_the_gates_of_their_example() -> None:
    wrapped, state = gated(nn.Linear(3, 4))
    x = torch.randn(5, 6, 3)
    state.set(torch.randn(5, 2))
    assert torch.allclose(wrapped(x.flatten(0, 1)), wrapped(x).flatten(0, 1), atol=1e-6)
    with pytest.raises(IntaglioError, match="input of 7 rows for 5 examples; stn needs the batch first"):
        wrapped(torch.randn(7, 3))


# --- hyperparameters ---------------------------------------------------------------------------------------------


def test_transforms_are_those_of_the_card() -> None:
    """project(): bounded transform maps 0 to the midpoint; s_logit inverts it; softplus(inv_softplus(0.5)) = 0.5."""
    zero = torch.zeros(1)
    assert float(Transform(0.0, 0.9).project(zero)) == pytest.approx(0.45)
    assert float(Transform(2.0, 4.0).project(zero)) == pytest.approx(3.0)
    assert float(Transform(1.0).project(zero)) == pytest.approx(1 + math.log(2))
    assert float(Transform().project(torch.tensor(-7.5))) == -7.5
    assert float(Transform(0.0, 5.0, discrete=True).project(zero)) == 2
    assert float(F.softplus(torch.tensor(inverse_softplus(0.5)))) == pytest.approx(0.5)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([kind.transform for kind in KINDS.values()]), st.floats(-8, 8))
def test_the_inverse_of_a_transform_gives_its_value_back(transform: Transform, h: float) -> None:
    value = float(transform.project(torch.tensor([h], dtype=torch.float64)))
    again = float(transform.project(torch.tensor([transform.inverse(value)], dtype=torch.float64)))
    assert again == pytest.approx(value, abs=1e-9)


def test_perturbations_are_of_each_example_or_shared_and_their_entropy_is_the_gaussians() -> None:
    """Entropy at sigma = 1, H = 1: 1.4189. Hyperparameters flagged minibatch=False share row 0."""
    one = Hyperparameters([Transform()], [0.0], [], 1.0)
    assert float(one.entropy()) == pytest.approx(1.4189, abs=1e-4)
    two = Hyperparameters([Transform(), Transform()], [1.0, 2.0], [1], 0.5)
    noise = torch.randn(4, 2)
    h_BH = two.perturbed(noise)
    assert torch.allclose(h_BH[:, 0], 1 + 0.5 * noise[:, 0])
    assert torch.allclose(h_BH[:, 1], (2 + 0.5 * noise[0, 1]).expand(4))


# --- regularizers ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 0.9))
def test_dropout_of_examples_keeps_the_mean_and_leaves_rows_without_alone(p: float) -> None:
    """Per-example dropout with p in [0, 0.9): mean preserved; rows with p = 0 untouched."""
    torch.manual_seed(0)
    x = torch.ones(2, 40_000)
    out = dropout(x, torch.tensor([p, 0.0]))
    assert torch.equal(out[1], x[1])
    assert float(out[0].mean()) == pytest.approx(1, abs=0.08)
    kept = out[0][out[0] != 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - p)))
    assert float((out[0] == 0).float().mean()) == pytest.approx(p, abs=0.02)


def test_locked_dropout_drops_the_same_units_at_all_times() -> None:
    out = locked_dropout(torch.ones(3, 7, 50), torch.tensor([0.5, 0.5, 0.5]))
    assert torch.equal(out, out[:, :1].expand(3, 7, 50))
    assert not torch.equal(out[0], out[1])
    flat = locked_dropout(torch.ones(3, 50), torch.tensor([0.5, 0.5, 0.5]))  # the second dimension is of units here
    assert all(len(row.unique()) == 2 for row in flat)


def colours(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(3))


def test_jitters_of_strength_zero_change_nothing() -> None:
    x, none = colours(), torch.zeros(4)
    for jitter in (brightness, contrast, saturation, hue, input_scale):
        assert torch.allclose(jitter(x, none), x, atol=1e-5)


def test_jitters_keep_what_they_should() -> None:
    x, r = colours(), torch.full((4,), 0.5)
    for jitter in (brightness, contrast, saturation, hue, input_scale):
        torch.manual_seed(0)
        out = jitter(x, r)
        assert not torch.allclose(out, x, atol=1e-2)
    for seed in range(5):
        torch.manual_seed(seed)
        shifted = hue(x, r)
        assert torch.allclose(shifted.amax(1), x.amax(1), atol=1e-5)  # value and chroma stay
        assert torch.allclose(shifted.amin(1), x.amin(1), atol=1e-5)
        torch.manual_seed(seed)
        factor = input_scale(x, r) / x
        assert torch.allclose(factor, factor[:, :1, :1, :1].expand_as(factor), atol=1e-5)
        assert float(factor.min()) >= 1 / 1.5 - 1e-5
        assert float(factor.max()) <= 1.5 + 1e-5
    gray = x.mean(1, keepdim=True).expand(4, 3, 5, 5)
    assert torch.allclose(saturation(gray, r), gray, atol=1e-5)
    flat = torch.full((4, 3, 5, 5), 0.3)
    assert torch.allclose(contrast(flat, r), flat, atol=1e-5)


@pytest.mark.parametrize(("drawn", "pixel", "factor"), [(1.0, [0.0, 1.0, 0.0], 4 / 3), (0.0, [0.0, 0.0, 1.0], 2 / 3)])
def test_a_red_pixel_turned_by_a_third_is_green_or_blue(
    monkeypatch: pytest.MonkeyPatch, drawn: float, pixel: list[float], factor: float
) -> None:
    """Hue shifts and factors reach r to both sides."""
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.full((1,), drawn))
    red, third = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1), torch.tensor([1 / 3])
    assert torch.allclose(hue(red, third).flatten(), torch.tensor(pixel), atol=1e-5)
    assert torch.allclose(brightness(red / 2, third), factor * red / 2)


def test_ranges_and_starts_are_those_of_the_card() -> None:
    """Dropout (0, 0.9), hue (0, 0.5), others (0, 1), input scaling (0, 0.3); cutout length 0 to 24, holes 0 to 4."""
    ranges = {name: (kind.transform.low, kind.transform.high, kind.start) for name, kind in KINDS.items()}
    dropouts = ("dropout", "locked_dropout", "embedding_dropout", "drop_connect")
    jitters = ("brightness", "contrast", "saturation")
    assert ranges == {
        **dict.fromkeys(dropouts, (0.0, 0.9, 0.05)),
        **dict.fromkeys(jitters, (0.0, 1.0, 0.05)),
        **dict.fromkeys(("activation", "temporal"), (0.0, None, 0.05)),
        "weight_decay": (None, None, -9.0),
        "hue": (0.0, 0.5, 0.05),
        "input_scale": (0.0, 0.3, 0.05),
        "cutout_length": (0.0, 25.0, 4.0),
        "cutout_holes": (0.0, 5.0, 1.0),
    }
    assert [name for name, kind in KINDS.items() if kind.transform.discrete] == ["cutout_length", "cutout_holes"]
    shared = {"embedding_dropout", "drop_connect", "weight_decay", "activation", "temporal"}
    assert {name for name, kind in KINDS.items() if kind.shared} == shared


@pytest.mark.parametrize(
    ("tuned", "start", "least", "most"), [("cutout_holes", 1.0, 16, 64), ("cutout_length", 3.0, 1, 9)]
)
def test_one_of_length_and_number_is_tuned_and_the_other_stays(tuned: str, start: float, least: int, most: int) -> None:
    """A tuned number has squares of side 8, a tuned side a single square."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    session = attach(STN(regularizers=[Regularizer(kind=tuned, start=start)], scale=1e-3), model)  # type: ignore[arg-type]
    seen: list[Tensor] = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    session.change_batch(model, {"id": torch.arange(50)})
    model(torch.ones(50, 1, 20, 20))
    dropped = (seen[0] == 0).sum((1, 2, 3))
    assert int(dropped.max()) == most
    assert int(dropped.min()) >= least


def test_cutout_drills_so_many_squares_of_that_side() -> None:
    torch.manual_seed(0)
    x = torch.ones(200, 1, 20, 20)
    none = cutout(x, torch.tensor([4.0]), torch.tensor([0.0]))
    assert torch.equal(none, x)
    dropped = (cutout(x, torch.tensor([4.0]), torch.tensor([1.0])) == 0).sum((1, 2, 3))
    assert int(dropped.max()) == 16
    assert int(dropped.min()) >= 4
    each = torch.cat([torch.zeros(100), torch.full((100,), 3.0)])
    twice = (cutout(x, torch.full((200,), 4.0), each) == 0).sum((1, 2, 3))
    assert int(twice[:100].max()) == 0
    assert int(twice.max()) > 16


PARTS: dict[str, dict[str, Any]] = {
    "dropout": {"at": ["3"]},
    "locked_dropout": {},
    "drop_connect": {"at": ["1"]},
    "weight_decay": {},
    "activation": {"at": ["2"]},
    "temporal": {"at": ["2"]},
    "input_scale": {},
    "brightness": {},
    "contrast": {},
    "cutout_length": {},
    "cutout_holes": {},
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_regularizer_acts_in_training_passes_alone(kind: str) -> None:
    """Hyper step: eval mode, no regularisers or augmentation."""
    model, x = net(), torch.rand(6, 1, 4, 4)
    start = {"cutout_length": 3.0, "cutout_holes": 2.0, "weight_decay": 0.0}.get(kind, 0.25)
    item = Regularizer(kind=kind, start=start, **PARTS[kind])  # type: ignore[arg-type]
    session = attach(STN(regularizers=[item], gate_std=0.0), model)
    plain = model(x)
    session.before_step(1, {})

    def passed(train_mode: bool) -> tuple[Tensor, float]:
        session.change_batch(model, {"id": torch.arange(6)})
        model.train(train_mode)
        torch.manual_seed(0)
        out = model(x)
        return out, float(session.extra_loss(model, {}, None).total)

    out, penalty = passed(True)
    if kind in ("weight_decay", "activation", "temporal"):
        assert torch.equal(out, plain)
        assert penalty > 0
    else:
        assert not torch.allclose(out, plain)
        assert penalty == 0
    resting, penalty = passed(False)
    assert torch.equal(resting, plain)
    assert kind == "weight_decay" or penalty == 0
    session.after_step(1)
    model.train()
    assert torch.equal(model(x), plain)
    assert float(session.extra_loss(model, {}, None).total) == 0


def test_a_pattern_meets_a_gated_layer_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 3))
    session = attach(STN(regularizers=[Regularizer(kind="dropout", start=0.5, at=["*0*"])], scale=1e-3), model)
    inputs: list[Tensor] = []
    layer: Any = model[0]
    watch = layer.elementary.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    session.change_batch(model, {"id": torch.arange(50)})
    model(torch.ones(50, 200))
    watch.remove()
    assert float((inputs[0] == 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(inputs[0], inputs[1])
    session.detach()
    assert not model[0]._forward_pre_hooks


def test_penalties_are_the_squares_that_the_card_names() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    items = [Regularizer(kind=k, start=0.0 if k == "weight_decay" else 1.5, at=["0"]) for k in
             ("weight_decay", "activation", "temporal")]  # fmt: skip
    session = attach(STN(regularizers=items, scale=1e-6, gate_std=0.0), model)
    session.before_step(1, {})
    session.change_batch(model, {"id": torch.arange(2)})
    x = torch.randn(2, 5, 3)
    out = model(x)
    decay = model[0].weight.square().sum() / 2
    steps = (out[:, 1:] - out[:, :-1]).square().mean()
    total = decay + 1.5 * out.square().mean() + 1.5 * steps
    assert float(session.extra_loss(model, {}, None).total) == pytest.approx(float(total), rel=1e-4)


def test_the_weight_that_decays_is_the_mean_of_the_examples_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    items = [Regularizer(kind="weight_decay", start=0.0), Regularizer(kind="dropout")]
    session = attach(STN(regularizers=items, gate_std=0.5), model)
    session.change_batch(model, {"id": torch.arange(4)})
    layer: Any = model[0]
    mean = torch.stack([layer.effective(h_H)[0] for h_H in session.state.h_BH]).mean(0)
    expected = session.state.values_BH[0, 0].exp() / 2 * mean.square().sum()
    assert float(session.extra_loss(model, {}, None).total) == pytest.approx(float(expected), rel=1e-5)


def test_words_of_an_embedding_are_dropped_in_all_places() -> None:
    model = nn.Sequential(nn.Embedding(9, 4))
    items = [Regularizer(kind="embedding_dropout", start=0.5)]
    session = attach(STN(regularizers=items, scale=1e-3), model)
    session.before_step(1, {})
    session.change_batch(model, {"id": torch.arange(3)})
    ids = torch.arange(9).expand(3, 9)
    out = model(ids)
    dropped = (out == 0).all(-1)
    session.after_step(1)
    torch.testing.assert_close(out[~dropped], 2 * model(ids)[~dropped], rtol=0.01, atol=1e-3)  # kept words, 1 / (1 - p)
    assert torch.equal(dropped, dropped[:1].expand(3, 9))
    assert 0 < int(dropped[0].sum()) < 9


def test_one_mask_of_weights_holds_for_all_time_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(3, 4, batch_first=True))
    items = [Regularizer(kind="drop_connect", start=0.5, at=["0.hidden_layers.0"])]
    session = attach(STN(regularizers=items, gate_std=0.0), model)
    layer: Any = model[0].hidden_layers[0]
    masks: list[Tensor] = []
    kept = session.state.weight_mask
    session.state.weight_mask = lambda *a: masks.append(kept(*a)) or masks[-1]
    session.before_step(1, {})
    session.change_batch(model, {"id": torch.arange(2)})
    model(torch.randn(2, 6, 3))
    own = [mask for mask in masks if mask is not None]
    assert len(own) == 6
    assert all(mask is own[0] for mask in own)
    assert layer.weight.shape == own[0].shape
    kept_value = 1 / (1 - float(session.state.values_BH[0, 0]))
    assert sorted({round(float(value), 4) for value in own[0].flatten()}) == [0.0, round(kept_value, 4)]
    session.change_batch(model, {"id": torch.arange(2)})
    model(torch.randn(2, 6, 3))
    assert masks[-1] is not own[0]


# --- steps -------------------------------------------------------------------------------------------------------


def tensors(session: Any) -> dict[str, Tensor]:
    return {"h": session.hyper.h_H.detach().clone(), "s": session.hyper.s_H.detach().clone()}


def test_a_train_step_leaves_the_hyperparameters_and_a_hyper_step_the_weights() -> None:
    """Train step leaves h, s bit-unchanged; hyper step leaves phi and the optimizer state of phi unchanged."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    session = attach(STN(gate_std=0.5, hyper_warmup=0), model)
    optimizer = torch.optim.Adam(model.parameters())
    model.train()
    before = tensors(session)
    session.before_step(1, {})
    session.change_batch(model, {"id": torch.arange(5)})
    loss = model(torch.randn(5, 16)).square().mean() + session.extra_loss(model, {}, None).total
    loss.backward()
    optimizer.step()
    assert same(tensors(session), before)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]))
    session.hyper_step()
    after = (model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()])
    assert same(dict(state[0]), dict(after[0]))
    assert str(state[1]) == str(after[1])
    assert all(torch.equal(a, b) for a, b in zip(state[2], after[2], strict=True))
    assert not same(tensors(session), before)
    assert model.training


def test_the_gradient_of_a_hyper_step_is_that_of_the_best_response() -> None:
    """Gradient wrt h with no regulariser equals (d L_V / d w) . (d w_phi / d h) by finite differences."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double(), torch.randn(5, 16).double()
    state = HypernetInput(torch.zeros(1, 2).double())
    for name in ("0", "2"):
        layer = GatedLayer(model.get_submodule(name), 2, state, 0.5, torch.Generator().manual_seed(0)).double()
        model.set_submodule(name, layer)

    def loss(h_H: Tensor) -> Tensor:
        state.set(h_H[None])
        return model(x).square().mean()

    h_H = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(h_H), h_H)
    for n in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[n] = 1e-5
        slope = float(loss(h_H.detach() + step) - loss(h_H.detach() - step)) / 2e-5
        assert float(gradient[n]) == pytest.approx(slope, rel=1e-6)
    # The same gradient by way of the materialised weights.
    weights_ = [model.get_submodule(name).effective(h_H) for name in ("0", "2")]  # type: ignore[operator]
    hidden = torch.tanh(F.linear(x, *weights_[0]))
    (other,) = torch.autograd.grad(F.linear(hidden, *weights_[1]).square().mean(), h_H)
    assert torch.allclose(gradient, other, rtol=1e-9)


def test_the_scales_get_the_gradient_of_loss_and_entropy() -> None:
    model = nn.Sequential(nn.Linear(16, 3))
    wide = attach(STN(gate_std=0.0, entropy_weight=1.0, scale_learning_rate=0.1), model)
    wide.hyper_step()
    assert float(wide.hyper.sigma_H) > 0.5
    still = attach(STN(gate_std=0.0, entropy_weight=1.0, tune_scales=False), nn.Sequential(nn.Linear(16, 3)))
    still.hyper_step()
    assert float(still.hyper.sigma_H) == pytest.approx(0.5)


def test_hyper_steps_have_rates_and_perturbations_of_their_own() -> None:
    fields = {"hyper_learning_rate": 0.01, "scale_learning_rate": 0.1, "gate_std": 0.5}
    session, inputs = attach(STN(**fields), nn.Sequential(nn.Linear(16, 3))), []
    plain = session.run.loss
    session.run.loss = lambda batch: inputs.append(session.state.h_BH.detach()) or plain(batch)
    before = tensors(session)
    session.hyper_step()
    after = tensors(session)
    # Adam's first step has the length of the rate.
    assert float((after["h"] - before["h"]).abs()) == pytest.approx(0.01, rel=1e-3)
    assert float((after["s"] - before["s"]).abs()) == pytest.approx(0.1, rel=1e-3)
    session.hyper_step()
    noise = [(inputs[0] - before["h"]) / F.softplus(before["s"]), (inputs[1] - after["h"]) / F.softplus(after["s"])]
    assert not torch.allclose(noise[0], noise[1], atol=1e-3)
    assert len(set(inputs[0].flatten().tolist())) == 5  # one for each example


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({"hyper_warmup": 0}, [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]),
        ({"hyper_warmup": 4}, [0, 0, 0, 0, 0, 1, 1, 2, 2, 3]),
        ({"hyper_warmup": 0.4}, [0, 0, 0, 0, 0, 1, 1, 2, 2, 3]),
        ({"hyper_warmup": 0, "train_steps": 3, "valid_steps": 2}, [0, 0, 2, 2, 2, 4, 4, 4, 6, 6]),
    ],
)
def test_hyper_steps_follow_the_warm_up_and_the_train_steps(fields: dict[str, Any], taken: list[int]) -> None:
    """After W warm-up steps: repeat T_train train steps, then T_valid hyper steps."""
    session = attach(STN(**fields), nn.Sequential(nn.Linear(16, 3)))
    seen, numbers = [], []
    draw = session.run.held_out
    session.run.held_out = lambda n: numbers.append(n) or draw(n)
    for step in range(1, 11):
        session.before_step(step, {})
        session.after_step(step)
        seen.append(session.hyper_steps)
    assert seen == taken
    assert numbers == list(range(taken[-1]))


def test_perturbations_are_keyed_by_step_and_example() -> None:
    items = [Regularizer(kind="dropout"), Regularizer(kind="weight_decay")]
    session = attach(STN(regularizers=items), nn.Sequential(nn.Linear(16, 3)))

    def drawn(step: int, ids: list[int]) -> Tensor:
        session.before_step(step, {})
        session.change_batch(session.run.model, {"id": torch.tensor(ids)})
        return session.state.h_BH

    first = drawn(1, [4, 7, 9])
    assert torch.equal(drawn(1, [9, 4])[:, 0], first[[2, 0], 0])
    assert torch.equal(drawn(1, [9])[0, 1], first[0, 1])
    assert len(set(first[:, 0].tolist())) == 3
    assert not torch.equal(drawn(2, [4, 7, 9]), first)
    assert not first.requires_grad


def test_rows_held_out_are_tuned_on_and_never_trained_on() -> None:
    trained, tuned = set(), set()

    class Watching(STN, slug="watching"):
        def attach(self, run: TrainingRun) -> ModifierSession:
            session: Any = super().attach(run)
            assert run.rows == 9
            plain = run.held_out
            run.held_out = lambda n: tuned.update(_names(plain(n))) or plain(n)  # type: ignore[misc]
            before = session.change_batch
            session.change_batch = lambda model, batch: trained.update(_names(batch)) or before(model, batch)
            return session

    classify(net(), steps=9, modifiers=[Watching(validation=0.25, hyper_warmup=0, train_steps=1)])
    assert len(trained) == 9
    assert len(tuned) == 3
    assert not trained & tuned


def test_held_out_batches_pass_through_all_rows_in_new_orders() -> None:
    batches = HeldOutBatches(IMAGES[:7], Classification(), 3, 3, torch.device("cpu"))
    passes = [[_names(batches(number)) for number in range(start, start + 3)] for start in (0, 3)]
    assert [[len(names) for names in some] for some in passes] == [[3, 3, 1]] * 2
    assert set().union(*passes[0]) == set().union(*passes[1]) == _names({"pixel_values": PIXELS[:7]})
    assert passes[0] != passes[1]
    assert torch.equal(batches(4)["labels"], batches(4)["labels"])
    splits = [hold_out(IMAGES, 0.25, seed) for seed in (0, 1)]
    assert splits[0] != splits[1]
    assert sorted([*splits[0][0], *splits[0][1]]) == list(range(12))


def _names(batch: Mapping[str, Any]) -> set[float]:
    return set(batch["pixel_values"][:, 0, 0, 0].tolist())


# --- whole runs --------------------------------------------------------------------------------------------------


def test_the_baked_network_is_the_tuned_one_at_the_final_hyperparameters() -> None:
    """Evaluate with h unperturbed. No retraining is needed: the network at the end is the tuned model."""
    model, ends = net(), []
    fields = {"gate_std": 0.3, "hyper_warmup": 0, "hyper_learning_rate": 0.1}
    evaluate = lambda ckpt: ends.append(ckpt.model(PIXELS).clone()) or {"x": 0.0}  # noqa: E731
    result = classify(model, modifiers=[STN(**fields)], evaluate=evaluate, evaluate_every=6)  # type: ignore[arg-type]
    assert [type(part) for part in model] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
    assert torch.allclose(model.eval()(PIXELS), ends[-1], atol=1e-5)
    values = [line.parts["stn dropout"] for line in result.history]
    assert values[0] == pytest.approx(0.05)
    assert len(set(values)) > 2
    assert set(result.history[0].parts) == {"accuracy", "stn dropout", "stn scale of dropout"}
    (table,) = result.reports["stn"]["tables"]
    (row,) = table["rows"]
    assert row[:2] == ["dropout", "0.05"]
    assert float(row[2]) != 0.05
    assert len(table["headings"]) == len(row) == 4


def test_a_schedule_is_read_from_a_checkpoint_and_replayed_on_a_plain_network(tmp_path: Path) -> None:
    fields = {**BASE, "hyper_learning_rate": 0.3}
    ckpt = checkpoint(layers=1)
    history = run(ckpt, modifiers=[STN(**fields)], steps=4).history
    schedule = found_schedule(ckpt)
    assert schedule == found_schedule(columns(history))
    assert schedule == found_schedule(str(ckpt.save(tmp_path / "out")))
    assert list(schedule) == ["step", "dropout"]
    assert schedule["dropout"] == [line.parts["stn dropout"] for line in history]
    kept = {"regularizers": BASE["regularizers"]}
    replays = [run(checkpoint(layers=1), modifiers=[STN(schedule=where, **kept)], steps=4).history
               for where in (schedule, str(tmp_path / "out"))]  # fmt: skip
    assert replays[0] == replays[1]
    assert [line.parts["stn dropout"] for line in replays[0]] == pytest.approx(schedule["dropout"])


def test_a_replay_takes_the_line_of_its_step_and_trains_plain_weights() -> None:
    model = net()
    method = STN(schedule={"step": [2, 4], "dropout": [0.3, 0.6]})
    assert (method.held_out_share, STN(validation=0.3).held_out_share) == (0, 0.3)  # a replay trains on all rows
    session = attach(method, model)
    assert isinstance(session, Replay)
    assert sorted(dict(model.named_parameters())) == [f"{n}.elementary.{p}" for n in (1, 3) for p in ("bias", "weight")]
    values = []
    for step in range(1, 7):
        session.before_step(step, {})
        session.change_batch(model, {"id": torch.arange(3)})
        values.append(float(session.state.values_BH))
        session.after_step(step)
    assert values == pytest.approx([0.3, 0.3, 0.6, 0.6, 0.6, 0.6])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    session.detach()
    assert [torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)] == [True] * 4


@pytest.mark.parametrize("settings_", [{"lora": {"r": 2}}, {"freeze": True}])
def test_it_trains_beside_adapters_and_frozen_weights(settings_: dict[str, Any]) -> None:
    ckpt = checkpoint(layers=1)
    before, kinds = weights(ckpt), [type(module) for module in ckpt.model.modules()]
    result = run(ckpt, modifiers=[STN(**BASE)], steps=3, **settings_)
    assert [type(module) for module in ckpt.model.modules()] == kinds
    changed = [name for name, value in weights(ckpt).items() if not torch.equal(value, before[name])]
    assert changed
    assert all("proj" in name for name in changed)
    assert all(math.isfinite(line.loss) for line in result.history)


class Words(nn.Module):
    """A small language model on an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(9, 4), nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0])


class NextWord:
    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict()

    def collate(self, examples: Any, rng: Any) -> dict[str, Any]:
        return {"ids": torch.stack([example["ids"] for example in examples])}

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Loss:
        logits = model(batch["ids"][:, :-1])
        return Loss(F.cross_entropy(logits.flatten(0, 1), batch["ids"][:, 1:].flatten()))


def test_an_lstm_trains_under_all_its_regularizers() -> None:
    torch.manual_seed(0)
    model = Words()
    items = [
        Regularizer(kind="embedding_dropout"),
        Regularizer(kind="locked_dropout", at=["rnn"], name="input dropout"),
        Regularizer(kind="locked_dropout", at=["head"], name="output dropout"),
        Regularizer(kind="drop_connect", at=["rnn.hidden_layers.*"]),
        Regularizer(kind="activation", at=["rnn"]),
        Regularizer(kind="temporal", at=["rnn"]),
    ]
    rows = [{"ids": torch.randint(9, (7,), generator=torch.Generator().manual_seed(n))} for n in range(12)]
    method = STN.lstm(regularizers=items, hyper_warmup=0, train_steps=1)
    result = train(Checkpoint(model), rows, objective=NextWord(), modifiers=[method], steps=4, batch_size=3,
                   log_every=1, learning_rate=0.05)  # fmt: skip
    assert type(model.rnn) is nn.LSTM
    assert model.rnn(torch.randn(1, 2, 4))[0].shape == (1, 2, 6)
    first, last = result.history[0].parts, result.history[-1].parts
    assert set(first) == {f"stn {name}" for name in names_of(items)}
    assert all(first[name] != last[name] for name in first)


def test_it_tunes_in_a_stock_trainer_in_five_lines(tmp_path: Path) -> None:
    """The five lines of the docstring."""
    model = tiny_model("llama", layers=1)
    ids = torch.randint(8, 150, (12, 10), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids[:8]]
    held_out_batches = [{"input_ids": ids[8:], "labels": ids[8:]}]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    items = [Regularizer(kind="dropout"), Regularizer(kind="weight_decay", start=0.0)]
    tuner = STN(hyper_warmup=1, train_steps=1, regularizers=items).callback(model, held_out_batches)
    penalised = model(**held_out_batches[0]).loss
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[tuner])  # type: ignore[arg-type]
    trainer.train()
    tuner.detach()
    model.save_pretrained(tmp_path / "tuned")
    log = [line for line in trainer.state.log_history if "loss" in line]
    assert log[0]["loss"] > float(penalised) + 1  # the squared weights are in the loss
    assert tuner.session.hyper_steps == 3
    assert tuner.session.step == 4
    assert log[0]["stn dropout"] != log[-1]["stn dropout"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert [type(a) for a in again.modules()] == [type(b) for b in tiny_model("llama", layers=1).modules()]
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_a_callback_has_a_seed_and_perturbs_every_micro_batch_anew() -> None:
    batch = {"input_ids": torch.arange(9, 19)[None], "labels": torch.arange(9, 19)[None]}
    gates = []
    for seed in (0, 0, 1):
        model = tiny_model("llama", layers=1)
        tuner = STN(hyper_warmup=0).callback(model, [batch], seed=seed)
        gates.append(next(iter(tuner.session.layers.values())).gate_weight.detach())
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])
    tuner.session.before_step(1, {})
    inputs = []
    for _ in range(2):
        model.train()(**batch)
        inputs.append(tuner.session.state.h_BH)
    assert not torch.equal(inputs[0], inputs[1])


def test_a_callback_takes_the_batches_in_turn_after_a_share_of_the_steps() -> None:
    batches = [{"x": torch.tensor(n)} for n in range(2)]
    session: Any = STN(hyper_warmup=0.5).callback(net(), batches, steps=4).session
    assert session.warmup == 2
    assert [int(session.run.held_out(n)["x"]) for n in range(3)] == [0, 1, 0]


def test_settings_of_the_lstm_are_those_of_the_authors() -> None:
    """LSTM: hyper lr 0.01, sigma0 1.0, scales not tuned."""
    method = STN.lstm(validation=0.3)
    changed = {"scale": 1.0, "tune_scales": False, "hyper_learning_rate": 0.01, "validation": 0.3}
    assert method == STN(**changed)  # type: ignore[arg-type]


def test_a_session_goes_on_from_its_state() -> None:
    def session() -> Any:
        torch.manual_seed(0)
        return attach(STN(gate_std=0.5, hyper_learning_rate=0.1), nn.Sequential(nn.Linear(16, 3)))

    first, second = session(), session()
    for _ in range(3):
        first.hyper_step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for one in (first, second):
        one.hyper_step()
    assert same(tensors(first), tensors(second))
    assert second.hyper_steps == 4


def ridge_problem() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(5)
    w = torch.randn(20, generator=draws) * 0.5
    made = []
    for count in (30, 200, 2000):
        x = torch.randn(count, 20, generator=draws)
        made += [x, x @ w + 1.2 * torch.randn(count, generator=draws)]
    return tuple(made)  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("start", [5.5, -4.0])
def test_on_ridge_both_starts_close_most_of_the_gap(start: float) -> None:
    """STN on ridge with log-penalty h must close most of the test gap to the grid optimum."""
    x, y, x_valid, y_valid, x_test, y_test = ridge_problem()

    def best(log_penalty: float) -> Tensor:
        return torch.linalg.solve(x.T @ x + math.exp(log_penalty) * torch.eye(20), x.T @ y)

    def error(w: Tensor) -> float:
        return float((x_test @ w - y_test).square().mean())

    optimum = min(error(best(value / 10)) for value in range(-40, 60))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 1, bias=False))
    items = [Regularizer(kind="weight_decay", start=start)]
    method = STN(regularizers=items, tune_scales=False, hyper_warmup=200, hyper_learning_rate=0.01)
    loss = lambda batch: (model(batch["x"])[:, 0] - y_valid).square().mean()  # noqa: E731
    session = attach(method, model, loss, held_out=lambda n: {"x": x_valid})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(1, 4001):
        session.before_step(step, {})
        session.change_batch(model, {"id": torch.arange(30)})
        total = (model(x)[:, 0] - y).square().sum() / 2 + session.extra_loss(model, {}, None).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        session.after_step(step)
    session.detach()
    before = error(best(start))
    assert before - error(model[0].weight[0].detach()) > 0.5 * (before - optimum)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"regularizers": [{"kind": "dropout", "start": 0.95}]}, "start is 0.95; it must be above 0 and below 0.9"),
        ({"regularizers": [{"kind": "cutout_holes", "start": -1.0}]}, "start is -1; it must be at least 0 and below 5"),
        ({"regularizers": [{"kind": "dropout", "name": "step"}]}, "holds the name 'step'"),
        ({"regularizers": [{"kind": "dropout", "name": "a"}, {"kind": "hue", "name": "a"}]}, "holds the name 'a'"),
        ({"schedule": {"step": [1.0], "hue": [0.1]}}, "these are needed: step, dropout"),
        ({"schedule": {"step": [2.0, 1.0], "dropout": [0.1, 0.1]}}, "steps in increasing order"),
        ({"schedule": {"step": [], "dropout": []}}, "at least one row"),
    ],
)
def test_a_field_that_does_not_fit_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        STN(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ["nothing"]}, "targets: 'nothing' names no layer of this model; its first is 1"),
        ({"ignore": ["*"]}, "ignore names every layer"),
        ({"validation": 0.01}, "a share of 0.01 of 12 rows leaves 0 held out"),
        ({"regularizers": [{"kind": "activation"}]}, "activation needs at, the modules whose outputs it penalises"),
        ({"regularizers": [{"kind": "dropout", "at": ["x"]}]}, "dropout: at: 'x' names no layer"),
        ({"regularizers": [{"kind": "brightness", "at": ["1"]}]}, "brightness acts on the images; leave at out"),
        ({"regularizers": [{"kind": "hue"}]}, "hue needs images of three colours, not 1"),
        ({"regularizers": [{"kind": "embedding_dropout"}]}, "the model has no module for embedding_dropout"),
        ({"schedule": "nowhere"}, "schedule: nowhere holds no training with stn"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_left_as_it_was(fields: dict[str, Any], message: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(IntaglioError, match=message):
        classify(model, modifiers=[STN(**fields)])
    assert [type(part) for part in model] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
    assert not model[1]._forward_pre_hooks
    if "three colours" not in message:
        assert same(dict(model.state_dict()), dict(before))


def test_other_refusals() -> None:
    tied = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    tied[1].weight = tied[0].weight
    with pytest.raises(IntaglioError, match="0 and 1 share one weight"):
        attach(STN(), tied)
    with pytest.raises(IntaglioError, match="cannot gate an LSTM with proj_size 2"):
        attach(STN(), nn.Sequential(nn.LSTM(3, 4, proj_size=2)))
    with pytest.raises(IntaglioError, match="Sequential has no linear layer"):
        attach(STN(), nn.Sequential(nn.PReLU()))
    packed = nn.Sequential(nn.LSTM(3, 4))
    attach(STN(), packed)
    with pytest.raises(IntaglioError, match="a batch of padded sequences, three dimensions"):
        packed(torch.randn(5, 3))
    images = nn.Sequential(nn.Linear(3, 3))
    session = attach(STN(regularizers=[Regularizer(kind="input_scale")]), images)
    session.change_batch(images, {"id": torch.arange(2)})
    with pytest.raises(IntaglioError, match="input_scale needs images"):
        images(torch.randn(2, 3))
    with pytest.raises(IntaglioError, match="needs data in memory; give a list"):
        classify(net(), (row for row in IMAGES), modifiers=[STN()])
    bare = TrainingRun(Checkpoint(net()), 1, None, 0, lambda batch: Loss(torch.zeros(())))
    with pytest.raises(IntaglioError, match=r"needs held-out batches to tune on; in a stock Trainer use STN\.callback"):
        STN().attach(bare)
    with pytest.raises(IntaglioError, match="held_out is empty"):
        STN().callback(net())
    with pytest.raises(IntaglioError, match=r"hyper_warmup is 0\.05, a share; give steps"):
        STN().callback(net(), [{}])
    assert isinstance(attach(STN(), net()), SelfTuning)
