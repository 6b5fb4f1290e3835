"""Regularizers of STN, each with a strength of its own for every example.

Hooks apply them in training passes for which `HypernetInput.values_BH` is set, and nowhere else.

Dimension letters: B examples, H hyperparameters, T time steps, C channels (Y and X pixels), N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from intaglio.errors import IntaglioError
from intaglio.methods.training.stn.hyperparameters import Transform
from intaglio.methods.training.stn.layers import GatedLayer, GatedLSTM, HypernetInput, for_rows
from intaglio.modeling.targets import check_patterns, select_layers

RegularizerName = Literal[
    "dropout", "locked_dropout", "embedding_dropout", "drop_connect", "weight_decay", "activation", "temporal",
    "brightness", "contrast", "saturation", "hue", "input_scale", "cutout_length", "cutout_holes",
]  # fmt: skip
"""A hyperparameter that STN tunes; see `Regularizer`."""

CUTOUT_LENGTH = 8.0
"""Side of the squares where it is not tuned, but their number is."""
GRAY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luminance."""


@dataclass(frozen=True)
class Kind:
    """Range, default start and scope of a hyperparameter; `shared` ones have one value for a batch."""

    transform: Transform
    start: float
    shared: bool = False
    image: bool = False


_SHARE = Transform(0.0, 0.9)
_JITTER = Kind(Transform(0.0, 1.0), 0.05, image=True)
KINDS: Mapping[str, Kind] = {
    "dropout": Kind(_SHARE, 0.05),
    "locked_dropout": Kind(_SHARE, 0.05),
    "embedding_dropout": Kind(_SHARE, 0.05, shared=True),
    "drop_connect": Kind(_SHARE, 0.05, shared=True),
    "weight_decay": Kind(Transform(), -9.0, shared=True),
    "activation": Kind(Transform(0.0), 0.05, shared=True),
    "temporal": Kind(Transform(0.0), 0.05, shared=True),
    "brightness": _JITTER,
    "contrast": _JITTER,
    "saturation": _JITTER,
    "hue": Kind(Transform(0.0, 0.5), 0.05, image=True),
    "input_scale": Kind(Transform(0.0, 0.3), 0.05, image=True),
    "cutout_length": Kind(Transform(0.0, 25.0, discrete=True), 4.0, image=True),
    "cutout_holes": Kind(Transform(0.0, 5.0, discrete=True), 1.0, image=True),
}


class Regularizer(BaseModel):
    """A hyperparameter to tune: the strength of one regularizer.

    | kind | value r | effect |
    | --- | --- | --- |
    | dropout | 0 to 0.9 | drops inputs of the layers `at` |
    | locked_dropout | 0 to 0.9 | the same with one mask for all time steps (the second dimension) |
    | embedding_dropout | 0 to 0.9, shared | drops words of the embeddings `at` |
    | drop_connect | 0 to 0.9, shared | drops weights of the gated layers `at` |
    | weight_decay | any, shared | adds exp(r) / 2 times the squared weights of the gated layers `at` |
    | activation, temporal | above 0, shared | add r times the mean square of outputs of `at`, or of their differences |
    | brightness, contrast, saturation | 0 to 1 | blend with black, the mean gray or gray, factors 1 - r to 1 + r |
    | hue | 0 to 0.5 | shifts the hue by up to r turns |
    | input_scale | 0 to 0.3 | multiplies images by a factor from 1 / (1 + r) to 1 + r |
    | cutout_length, cutout_holes | 0 to 24, 0 to 4 | side in pixels, and number, of squares set to zero |

    Shared kinds have one perturbation for a batch, the others one for each example. Images are the first input of the
    model, float, [B, C, Y, X] with values 0 to 1 for the jitters.

    Args:
        kind: of the table.
        at: modules it acts on, by name or shell pattern. Default: every gated layer; `embedding_dropout`: every
            embedding; needed for `activation` and `temporal`. No choice for images.
        start: value r to begin with. Default 0.05; weight_decay -9, cutout_length 4, cutout_holes 1.
        name: in reports and schedules. Default: the kind, numbered where there are several.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    kind: RegularizerName
    at: list[Annotated[str, Field(min_length=1)]] | None = None
    start: float | None = None
    name: Annotated[str, Field(min_length=1)] | None = None

    @property
    def first(self) -> float:
        """The value to begin with."""
        return KINDS[self.kind].start if self.start is None else self.start


def names_of(regularizers: Sequence[Regularizer]) -> list[str]:
    """Return the names of regularizers in reports and schedules."""
    kinds, names = [item.kind for item in regularizers], []
    for n, item in enumerate(regularizers):
        number = f" {kinds[:n].count(item.kind) + 1}" if kinds.count(item.kind) > 1 else ""
        names.append(item.name or item.kind + number)
    return names


Modify = Callable[[Tensor, Tensor], Tensor]
"""Returns an input `x` under the values of its rows, [N] or, for all alike, [1]."""


def dropout(x: Tensor, p_N: Tensor, locked: bool = False) -> Tensor:
    """Return rows with elements zeroed with their own probabilities, and the rest scaled to keep the mean."""
    p = p_N.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    shape = (x.shape[0], 1, *x.shape[2:]) if locked and x.ndim > 2 else x.shape
    return x * (torch.rand(shape, dtype=x.dtype, device=x.device) >= p) / (1 - p)


def locked_dropout(x: Tensor, p_N: Tensor) -> Tensor:
    """Return rows under dropout with one mask for all time steps."""
    return dropout(x, p_N, locked=True)


def _factor(x: Tensor, r_N: Tensor) -> Tensor:
    """Draw factors between 1 - r and 1 + r [B, 1, 1, 1]."""
    drawn_B = 1 + r_N * (2 * torch.rand(len(x), device=x.device) - 1)
    return drawn_B.reshape(-1, 1, 1, 1)


def _gray(x_BCYX: Tensor) -> Tensor:
    weights = x_BCYX.new_tensor(GRAY).reshape(1, 3, 1, 1)
    return (x_BCYX * weights).sum(1, keepdim=True) if x_BCYX.shape[1] == 3 else x_BCYX.mean(1, keepdim=True)


def brightness(x: Tensor, r_N: Tensor) -> Tensor:
    """Return images blended with black."""
    return (x * _factor(x, r_N)).clamp(0, 1)


def contrast(x: Tensor, r_N: Tensor) -> Tensor:
    """Return images blended with their mean gray."""
    factor, mean = _factor(x, r_N), _gray(x).mean(dim=(2, 3), keepdim=True)
    return (factor * x + (1 - factor) * mean).clamp(0, 1)


def saturation(x: Tensor, r_N: Tensor) -> Tensor:
    """Return images blended with their gray version."""
    factor = _factor(x, r_N)
    return (factor * x + (1 - factor) * _gray(x)).clamp(0, 1)


def hue(x: Tensor, r_N: Tensor) -> Tensor:
    """Return images whose hue, of hue, saturation and value, is shifted by up to r turns either way."""
    shift = _factor(x, r_N)[:, :, 0, 0, None] - 1  # [B, 1, 1]
    value, lowest = x.amax(1), x.amin(1)
    chroma = value - lowest
    safe = chroma.clamp_min(1e-12)
    red, green, blue = x.unbind(1)
    sixth = torch.where(
        value == red,
        (green - blue) / safe % 6,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    turned = sixth + 6 * shift
    return torch.stack([_channel(turned, offset, value, chroma) for offset in (5, 3, 1)], dim=1)


def _channel(sixth: Tensor, offset: int, value: Tensor, chroma: Tensor) -> Tensor:
    k = (offset + sixth) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def input_scale(x: Tensor, r_N: Tensor) -> Tensor:
    """Return rows times factors drawn between 1 / (1 + r) and 1 + r."""
    low, high = 1 / (1 + r_N), 1 + r_N
    drawn_N = low + (high - low) * torch.rand(len(x), device=x.device)
    return x * drawn_N.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def cutout(x: Tensor, length_N: Tensor, holes_N: Tensor) -> Tensor:
    """Return images with squares set to zero, whose centres are drawn and whose parts outside are cut off."""
    count, _, height, width = x.shape
    keep = torch.ones(count, 1, height, width, dtype=torch.bool, device=x.device)
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    length = length_N.expand(count).reshape(-1, 1)
    for hole in range(int(holes_N.max())):
        centres = torch.rand(2, count, 1, device=x.device)
        inside = [
            (place >= start) & (place < start + length)
            for place, start in (
                (rows, (centres[0] * height).floor() - (length / 2).floor()),
                (columns, (centres[1] * width).floor() - (length / 2).floor()),
            )
        ]
        drilled = (holes_N.expand(count) > hole).reshape(-1, 1, 1)
        keep &= ~(inside[0][:, :, None] & inside[1][:, None, :] & drilled)[:, None]
    return x * keep


INPUTS: Mapping[str, Modify] = {"dropout": dropout, "locked_dropout": locked_dropout}
IMAGES: Mapping[str, Modify] = {
    "brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue, "input_scale": input_scale,
}  # fmt: skip


class Hooks:
    """The hooks of all regularizers on a model; `remove` takes them off.

    Args:
        model: the model, its layers gated.
        regularizers: in the order in which images are changed.
        layers: the gated layers by name.
        state: values and penalties of the pass.

    Raises:
        IntaglioError: `at` is missing, names no module, or a module that the kind does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        regularizers: Sequence[Regularizer],
        layers: Mapping[str, GatedLayer | GatedLSTM],
        state: HypernetInput,
    ) -> None:
        self.model, self.state, self.gated = model, state, layers
        self.handles: list[Any] = []
        self.decayed: list[tuple[int, list[GatedLayer]]] = []
        try:
            for n, item in enumerate(regularizers):
                self._add(n, item)
        except IntaglioError:
            self.remove()
            raise
        images = [(n, item.kind) for n, item in enumerate(regularizers) if KINDS[item.kind].image]
        if images:
            self.handles.append(model.register_forward_pre_hook(self._on_images(images), with_kwargs=True))

    def _add(self, n: int, item: Regularizer) -> None:
        """Put the hooks of hyperparameter n on its modules."""
        if KINDS[item.kind].image:
            if item.at is not None:
                raise IntaglioError(f"regularizers: {item.kind} acts on the images; leave at out")
        elif item.kind in ("drop_connect", "weight_decay"):
            chosen = _chosen(self._weights(), item)
            if item.kind == "drop_connect":
                self.state.drop_connect |= {id(layer): n for layer in chosen}
            else:
                self.decayed.append((n, chosen))
        elif item.kind in INPUTS:
            for module in _chosen(self.gated if item.at is None else self._outer(), item):
                self.handles.append(module.register_forward_pre_hook(self._before(n, INPUTS[item.kind])))
        elif item.kind == "embedding_dropout":
            embeddings = {name: module for name, module in self._outer().items() if _is_embedding(module)}
            for module in _chosen(embeddings, item):
                self.handles.append(module.register_forward_hook(self._after_embedding(n)))
        elif item.at is None:
            raise IntaglioError(f"regularizers: {item.kind} needs at, the modules whose outputs it penalises")
        else:
            for module in _chosen(self._outer(), item):
                self.handles.append(module.register_forward_hook(self._penalise(n, item.kind == "temporal")))

    def _outer(self) -> dict[str, nn.Module]:
        """Return the modules of the model by name, without those inside gated layers."""
        inside = tuple(f"{name}." for name in self.gated)
        return {name: module for name, module in self.model.named_modules() if not name.startswith(inside)}

    def _weights(self) -> dict[str, GatedLayer]:
        """Return the gated layers by name, of an LSTM its inner ones."""
        return {
            f"{name}.{inner}" if inner else name: part
            for name, layer in self.gated.items()
            for inner, part in layer.named_modules()
            if isinstance(part, GatedLayer)
        }

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def penalty(self) -> Tensor | float:
        """Return the penalties of the pass, weight decay included, as a term of the loss."""
        values_BH = self.state.values_BH
        if values_BH is None:
            return 0.0
        total: Tensor | float = sum(self.state.penalties)
        for n, layers in self.decayed:
            # Gates are linear, so that the mean of the examples' weights is the weight for the mean input.
            h_H = self.state.h_BH.mean(0)
            total = total + values_BH[0, n].exp() / 2 * sum(layer.effective(h_H)[0].square().sum() for layer in layers)
        return total

    def _active(self, module: nn.Module) -> bool:
        return module.training and self.state.values_BH is not None

    def _values(self, n: int, x: Tensor) -> Tensor:
        assert self.state.values_BH is not None  # checked by `_active`
        return for_rows(self.state.values_BH[:, n], x)

    def _before(self, n: int, modify: Modify) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if not self._active(module):
                return None
            if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
                raise IntaglioError("regularizers: dropout needs modules with a tensor of floats as first input")
            return (modify(args[0], self._values(n, args[0])), *args[1:])

        return hook

    def _after_embedding(self, n: int) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...], out: Tensor) -> Any:
            if not self._active(module):
                return None
            p = self._values(n, out)[0]
            keep_V = (torch.rand(len(module.weight), device=out.device) >= p) / (1 - p)
            return out * keep_V[args[0]][..., None].to(out.dtype)

        return hook

    def _penalise(self, n: int, temporal: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if self._active(module):
                x = out[0] if isinstance(out, tuple) else out
                x = x[:, 1:] - x[:, :-1] if temporal else x
                self.state.penalties.append(self._values(n, x)[0] * x.float().square().mean())

        return hook

    def _on_images(self, images: Sequence[tuple[int, str]]) -> Callable[..., Any]:
        at = {kind: n for n, kind in images}

        def hook(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self._active(model):
                return None
            name = None if args else next((k for k, v in kwargs.items() if isinstance(v, Tensor) and v.ndim == 4), None)
            x = args[0] if args else kwargs.get(name or "")
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 4:
                raise IntaglioError(
                    f"regularizers: {images[0][1]} needs images [batch, channels, height, width] of floats"
                )
            for n, kind in images:
                if kind in ("saturation", "hue") and x.shape[1] != 3:
                    raise IntaglioError(f"regularizers: {kind} needs images of three colours, not {x.shape[1]}")
                if kind in IMAGES:
                    x = IMAGES[kind](x, self._values(n, x))
            if "cutout_length" in at or "cutout_holes" in at:
                x = cutout(x, *[
                    self._values(at[kind], x) if kind in at else x.new_tensor([fixed])
                    for kind, fixed in (("cutout_length", CUTOUT_LENGTH), ("cutout_holes", 1.0))
                ])  # fmt: skip
            return ((x, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: x})

        return hook


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module.elementary if isinstance(module, GatedLayer) else module, nn.Embedding)


def _chosen(named: Mapping[str, Any], item: Regularizer) -> list[Any]:
    names = [name for name in named if name]
    if not names:
        raise IntaglioError(f"regularizers: the model has no module for {item.kind}")
    check_patterns(names, {f"regularizers: {item.kind}: at": item.at or []})
    return [named[names[n]] for n in select_layers(names, item.at, [])]
