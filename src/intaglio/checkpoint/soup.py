"""Parameter averaging: uniform, weighted, maximum and greedy model soups, and an exponential moving average.

A soup is the mean of the parameters of models that were fine-tuned from one checkpoint (Wortsman et al. 2022, "Model
soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time"). Sources
are state dicts in memory, `.safetensors` files or checkpoint directories; those on disk are read one tensor at a time.
The candidates of POINTS (Liu et al. 2024) differ in the data set that was added to a common base set.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from intaglio.checkpoint.sharding import INDEX, read_index
from intaglio.errors import IntaglioError

Source = Mapping[str, Tensor] | str | os.PathLike[str]
Tensors = nn.Module | Mapping[str, Tensor]


class NamedState(dict[str, Tensor]):
    """State dict with the name of its model for messages."""

    def __init__(self, state: Mapping[str, Tensor], name: str) -> None:
        super().__init__(state)
        self.name = name


_Storage = tuple[Any, ...]
COUNTER = "num_batches_tracked"
"""Buffer of batch normalisation that counts steps; models of different length differ in it, and the largest is kept."""


class _InMemory:
    """Tensors of a state dict."""

    def __init__(self, state: Mapping[str, Tensor], label: str) -> None:
        self.label = label
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self._state = state

    def read(self, name: str) -> Tensor:
        return self._state[name].detach()

    def storage(self, name: str) -> _Storage:
        """Return a key that is equal for names of the same tensor."""
        return _storage(self._state[name])


class _OnDisk:
    """Lazily read tensors of one or several safetensors files."""

    def __init__(self, files: Iterable[Path], label: str, stack: ExitStack) -> None:
        self.label = label
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._handles: dict[str, Any] = {}
        for file in files:
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise IntaglioError(f"{file} cannot be read as a safetensors file: {error}") from None
            for name in handle.keys():  # noqa: SIM118 - the handle is not a mapping
                if name in self._handles:
                    raise IntaglioError(f"{label} holds the tensor {name} in two files")
                self._handles[name] = handle
                self.shapes[name] = tuple(handle.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor

    def storage(self, name: str) -> _Storage:
        """Return the name: a file holds every tensor once."""
        return (name,)


_Reader = _InMemory | _OnDisk


def _storage(tensor: Tensor) -> _Storage:
    if tensor.device.type == "meta":
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _files(path: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint."""
    if path.is_file():
        return [path]
    index = path / f"model{INDEX}"
    if index.is_file():
        return [path / name for name in sorted(set(read_index(index).values()))]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise IntaglioError(f"{path} is neither a safetensors file nor a directory with one")
    return files


def _named(sources: Sequence[Source]) -> list[Source]:
    """Name the state dicts without a name by their position, so that a part of the sources keeps the names."""
    return [
        NamedState(source, f"model {n} of {len(sources)}")
        if isinstance(source, Mapping) and not isinstance(source, NamedState)
        else source
        for n, source in enumerate(sources, 1)
    ]


def _open(sources: Sequence[Source], stack: ExitStack) -> list[_Reader]:
    return [
        _InMemory(source, source.name)
        if isinstance(source, NamedState)
        else _OnDisk(_files(Path(source)), str(source), stack)  # type: ignore[arg-type]
        for source in _named(sources)
    ]


def _check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return a weight for each source, summing to 1."""
    if not count:
        raise IntaglioError("there is nothing to average; one or more checkpoints are accepted")
    if weights is None:
        return [1.0 / count] * count
    if len(weights) != count:
        raise IntaglioError(f"weights has {len(weights)} numbers for {count} checkpoints; one for each is accepted")
    if any(not math.isfinite(weight) or weight < 0 for weight in weights) or not sum(weights):
        raise IntaglioError(f"weights is {list(weights)}; finite numbers from 0, not all 0, are accepted")
    return [weight / sum(weights) for weight in weights]


def _aliases(readers: Sequence[_Reader]) -> dict[str, str]:
    """Map names that share a tensor with another in every source that has them to that other name."""
    everywhere = [name for name in readers[0].shapes if all(name in reader.shapes for reader in readers)]
    aliases: dict[str, str] = {}
    kept: dict[tuple[_Storage, ...], str] = {}
    for name in everywhere:
        other = kept.setdefault(tuple(reader.storage(name) for reader in readers), name)
        if other != name:
            aliases[name] = other
    # A tied tensor has only one name in a file: its other names may be missing, but must be tied where present.
    for name in {name for reader in readers for name in reader.shapes} - set(everywhere):
        holders = [reader for reader in readers if name in reader.shapes]
        same = (other for other in kept.values() if all(r.storage(other) == r.storage(name) for r in holders))
        other = next(same, name)
        if other != name:
            aliases[name] = other
    return aliases


def _check_names(readers: Sequence[_Reader], aliases: Mapping[str, str]) -> list[str]:
    """Return the names of all tensors in the first source's order; refuse mismatches."""
    first = readers[0]
    for reader in readers[1:]:
        for reader_a, other in ((first, reader), (reader, first)):
            missing = next((name for name in reader_a.shapes if name not in other.shapes and name not in aliases), None)
            if missing is not None:
                raise IntaglioError(f"the tensor {missing} of {reader_a.label} is missing in {other.label}")
        for name, shape in reader.shapes.items():
            own = first.shapes.get(name, shape)
            if own != shape:
                raise IntaglioError(
                    f"the tensor {name} has the shape {own} in {first.label} and {shape} in {reader.label}"
                )
    return list(dict.fromkeys(name for reader in readers for name in reader.shapes))


def _mean(name: str, readers: Sequence[_Reader], weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return the weighted mean of a tensor as a running mean, which reproduces equal inputs bit for bit."""
    first = readers[0].read(name)
    if name.rpartition(".")[2] == COUNTER:
        return torch.stack([reader.read(name).to(first.device) for reader in readers]).amax(0)
    if not (first.is_floating_point() or first.is_complex()):
        for reader in readers[1:]:
            if not torch.equal(reader.read(name).to(first.device), first):
                raise IntaglioError(
                    f"the tensor {name} holds {str(first.dtype).removeprefix('torch.')} values that differ between "
                    f"{readers[0].label} and {reader.label}; only equal ones can be kept"
                )
        return first.clone()
    mean: Tensor | None = None
    total = 0.0
    for reader, weight in zip(readers, weights, strict=True):
        if not weight:
            continue
        value = reader.read(name)
        value = value.to(device=first.device, dtype=torch.promote_types(value.dtype, dtype))
        total += weight
        # Equal values are kept rather than computed, so that infinities in masks survive.
        mean = value if mean is None else torch.where(value == mean, mean, mean + (value - mean) * (weight / total))
    assert mean is not None  # the weights sum to 1
    return mean.to(first.dtype, copy=True)


@torch.no_grad()
def average(
    sources: Sequence[Source], weights: Sequence[float] | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return the weighted mean of the parameters of several checkpoints: `sum_i w_i theta_i`.

    Names that share a tensor in the sources (tied embeddings) share one in the result; a file, which holds such a
    tensor under one of its names only, matches a state dict with both. Of sources on disk one tensor is in memory at a
    time. New tensors have the dtype and device of the first source, files are on the CPU.
    """
    shares = _check_weights(weights, len(sources))
    with ExitStack() as stack:
        readers = _open(sources, stack)
        aliases = _aliases(readers)
        names = _check_names(readers, aliases)
        result = {name: _mean(name, readers, shares, dtype) for name in names if name not in aliases}
        return {name: result[aliases.get(name, name)] for name in names}


@dataclass(frozen=True)
class Trial:
    """A scored soup: the indices of its candidates, its score, and whether it became the current soup."""

    members: tuple[int, ...]
    score: float
    kept: bool


@dataclass(frozen=True)
class Soup:
    """Result of `greedy`, `maximum` or `uniform`.

    Args:
        state: parameters.
        chosen: indices of the candidates, best first where they were scored.
        score: of the soup.
        log: every scored model in order: each candidate alone, then the soups.
    """

    state: dict[str, Tensor]
    chosen: tuple[int, ...]
    score: float
    log: tuple[Trial, ...]


Score = Callable[[dict[str, Tensor]], float]


def _ranked(candidates: Sequence[Source], score: Score, sign: float) -> tuple[list[float], list[int]]:
    """Return the candidates' own scores, and their indices, best first, without those whose score is NaN."""
    alone = [float(score(average([candidate]))) for candidate in candidates]
    order = sorted((i for i in range(len(alone)) if not math.isnan(alone[i])), key=lambda i: -sign * alone[i])
    if not order:
        raise IntaglioError(f"none of the {len(alone)} candidates of the soup has a numeric score")
    return alone, order


def greedy(candidates: Sequence[Source], score: Score, higher_is_better: bool = True) -> Soup:
    """Return the greedy soup (Wortsman et al. 2022, recipe 1): add candidates one at a time while the score holds.

    The candidates are ranked by their own score. Starting with the best, each is added to the mean if the score does
    not fall. So the soup is never worse than the best candidate on the score used for the choice; report it on other
    data. A candidate whose score is NaN is left out.
    """
    sign, candidates = 1.0 if higher_is_better else -1.0, _named(candidates)
    alone, order = _ranked(candidates, score, sign)
    log = [Trial((i,), alone[i], i == order[0]) for i in range(len(alone))]
    chosen: tuple[int, ...] = (order[0],)
    best = alone[order[0]]
    state = average([candidates[order[0]]])
    for index in order[1:]:
        members = (*chosen, index)
        mixed = average([candidates[i] for i in members])
        result = float(score(mixed))
        kept = sign * result >= sign * best
        log.append(Trial(members, result, kept))
        if kept:
            chosen, best, state = members, result, mixed
    return Soup(state, chosen, best, tuple(log))


def maximum(candidates: Sequence[Source], score: Score, top: int, higher_is_better: bool = True) -> Soup:
    """Return the mean of the `top` candidates with the best scores of their own; all that have one if they are fewer.

    Raises:
        IntaglioError: `top` is below 1, or no candidate has a numeric score.
    """
    if top < 1:
        raise IntaglioError(f"top is {top}; a number of models from 1 on is accepted")
    candidates = _named(candidates)
    alone, order = _ranked(candidates, score, 1.0 if higher_is_better else -1.0)
    chosen = tuple(order[:top])
    return _mixed(candidates, chosen, score, [Trial((i,), alone[i], i in chosen) for i in range(len(alone))])


def uniform(candidates: Sequence[Source], score: Score) -> Soup:
    """Return the mean of all candidates, with its score and theirs."""
    alone = [float(score(average([candidate]))) for candidate in candidates]
    members = tuple(range(len(candidates)))
    return _mixed(candidates, members, score, [Trial((i,), alone[i], True) for i in members])


def _mixed(candidates: Sequence[Source], chosen: tuple[int, ...], score: Score, log: list[Trial]) -> Soup:
    state = average([candidates[i] for i in chosen])
    result = float(score(state))
    return Soup(state, chosen, result, (*log, Trial(chosen, result, True)))


@torch.no_grad()
def weight_cosine(first: Source, second: Source) -> float | None:
    """Return the cosine between the matrices and kernels of two models, all of them as one vector.

    Models that were fine-tuned from one checkpoint have a cosine near 1, models of different initialisations one near
    0, and their mean is useless. None where there is no matrix, or one of the vectors is zero.

    Raises:
        IntaglioError: names or shapes differ.
    """
    with ExitStack() as stack:
        readers = _open((first, second), stack)
        aliases = _aliases(readers)
        names = [name for name in _check_names(readers, aliases) if name not in aliases]
        dot, norms = 0.0, [0.0, 0.0]
        for name in names:
            a, b = (reader.read(name).flatten().double() for reader in readers)
            if len(readers[0].shapes[name]) > 1:
                dot += float(a @ b)
                norms = [norms[0] + float(a @ a), norms[1] + float(b @ b)]
    return dot / math.sqrt(norms[0] * norms[1]) if all(norms) else None


@torch.no_grad()
def ema_update(average: Tensors, model: Tensors, decay: float) -> None:
    """Update a running average in place: `average <- decay * average + (1 - decay) * model`.

    Integer and bool tensors are copied. A tensor under two names is updated once. Keep the average in float32: in
    bfloat16 the steps of a decay near 1 are rounded away.
    """
    if not 0.0 <= decay <= 1.0:
        raise IntaglioError(f"decay is {decay}; a number from 0 to 1 is accepted")
    target = average.state_dict() if isinstance(average, nn.Module) else average
    source = model.state_dict() if isinstance(model, nn.Module) else model
    _check_names([_InMemory(target, "the average"), _InMemory(source, "the model")], {})
    done: set[_Storage] = set()
    for name, mean in target.items():
        if _storage(mean) in done:
            continue
        done.add(_storage(mean))
        value = source[name].to(device=mean.device, dtype=mean.dtype)
        if mean.is_floating_point() or mean.is_complex():
            mean.lerp_(value, 1.0 - decay)
        else:
            mean.copy_(value)
