"""A shaper and a selector as methods, so that what is promised of registered ones is tested while there are few."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Annotated, Any, ClassVar

import pytest
import torch
from intaglio.methods.registry import PUBLISHED, Entry
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.nn.utils import parametrize

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.base import Method, ModelAspect, Progress, no_progress
from intaglio.trainer import Example, KeyedRNG, Loss, TrainingRun
from intaglio.trainer.sparsity_mask import linear_modules


class Mask(nn.Module):
    """A mask over a weight that can change while training."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class ToyShaper(Method, slug="toy_shaper"):
    """Zeroes the smallest weights of every MLP, more of them each step; halves the decay; steps a score of its own."""

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})

    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    pull: Annotated[float, Field(ge=0)] = 1e-3

    _run: TrainingRun | None = PrivateAttr(None)
    _masks: dict[str, Mask] = PrivateAttr(default_factory=dict)
    _score: Tensor = PrivateAttr(default_factory=lambda: torch.zeros(()))
    _seen: list[int] = PrivateAttr(default_factory=list)

    def attach(self, run: TrainingRun) -> None:
        self._run = run
        for name, module in linear_modules(run.checkpoint.model).items():
            if "mlp" in name:
                self._masks[name] = Mask(module.weight)
                parametrize.register_parametrization(module, "weight", self._masks[name])
        if not self._masks:
            raise IntaglioError("toy_shaper finds no MLP")

    def before_step(self, t: int, next_batch: dict[str, Any]) -> None:
        assert self._run is not None
        assert self._run.optimizer is not None
        self._run.optimizer.param_groups[-1]["weight_decay"] = 0.01 / t
        share = self.sparsity * t / self._run.steps
        for mask, weight in ((m, self._weight(name)) for name, m in self._masks.items()):
            cut = weight.detach().abs().flatten().sort(stable=True).indices[: int(share * weight.numel())]
            mask.mask.fill_(1.0).view(-1)[cut] = 0.0
        # A step of its own, on the batch to come: the upper level of a bilevel method.
        with torch.no_grad():
            self._score = self._score + self._run.loss({k: v for k, v in next_batch.items() if k != "id"}).total

    def on_step(self, t: int) -> None:
        self._seen.append(t)

    def extra_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Loss:
        size = sum(self._weight(name).square().mean() for name in self._masks)
        return Loss(self.pull * (1 + self._score) * size, {"size": size, "rows": float(len(batch["id"]))})

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self._weight(name) for name in self._masks], "lr": 5e-4}]

    def state_dict(self) -> dict[str, Any]:
        return {"score": self._score, "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._score, self._seen = state["score"], list(state["seen"])

    def detach(self, run: TrainingRun) -> None:
        for name in self._masks:
            parametrize.remove_parametrizations(run.checkpoint.model.get_submodule(name), "weight")
        self._masks.clear()

    def _weight(self, name: str) -> Tensor:
        assert self._run is not None
        linear: Any = self._run.checkpoint.model.get_submodule(name)
        return linear.parametrizations.weight.original


class ToySelector(Method, slug="toy_selector"):
    """A random choice among the longer half of the examples."""

    budget: Annotated[float, Field(gt=0, le=1)] = 0.25

    def select(
        self,
        dataset: Sequence[Example],
        model: Checkpoint,
        original: Checkpoint | None,
        budget: float,
        rng: KeyedRNG,
        *,
        progress: Progress = no_progress,
    ) -> Sequence[int]:
        assert original is None or original is not model
        size = [len(example.get("text", example.get("answer", ""))) for example in dataset]
        middle = sorted(size)[len(size) // 2]
        long = [n for n, length in enumerate(size) if length >= middle]
        chosen = torch.randperm(len(long), generator=rng({"id": "toy"}))[: max(1, int(budget * len(dataset)))]
        return [long[int(n)] for n in chosen]


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put both into the catalogue for the time of a test."""
    for cls, kind in ((ToyShaper, "modifier"), (ToySelector, "selector")):
        entry = Entry(cls.slug, "training", cls.__name__, (kind,), "a toy", "nobody", "nowhere")  # type: ignore[arg-type]
        module = ModuleType(entry.module)
        setattr(module, cls.__name__, cls)
        monkeypatch.setitem(PUBLISHED, cls.slug, entry)
        monkeypatch.setitem(sys.modules, entry.module, module)
