"""A modifier and a selector as methods, to test the promises of registered ones."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Annotated, Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.base import Method, ModelAspect, Progress, no_progress
from intaglio.methods.registry import METHODS, PUBLISHED, Entry
from intaglio.trainer import Example, KeyedRNG, Loss, ModifierSession, TrainingRun
from intaglio.trainer.sparsity_mask import linear_modules


class Mask(nn.Module):
    """A mask over a weight that can change while training."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class ToyModifier(Method, slug="toy_modifier"):
    """Zeroes the smallest weights of every MLP, more of them each step; halves the decay; steps a score of its own."""

    kinds = ("modifier",)
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})

    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    pull: Annotated[float, Field(ge=0)] = 1e-3

    def attach(self, run: TrainingRun) -> ToySession:
        return ToySession(self, run)


class ToySession(ModifierSession):
    def __init__(self, method: ToyModifier, run: TrainingRun) -> None:
        self.method, self.run, self.score = method, run, torch.zeros(())
        self.seen: list[int] = []
        self.masks: dict[str, Mask] = {}
        for name, module in linear_modules(run.model).items():
            if "mlp" in name:
                self.masks[name] = Mask(module.weight)
                parametrize.register_parametrization(module, "weight", self.masks[name])
        if not self.masks:
            raise IntaglioError("toy_modifier finds no MLP")

    def before_step(self, step: int, batch: dict[str, Any]) -> None:
        assert self.run.optimizer is not None
        self.run.optimizer.param_groups[-1]["weight_decay"] = 0.01 / step
        share = self.method.sparsity * step / self.run.steps
        for mask, weight in ((m, self._weight(name)) for name, m in self.masks.items()):
            cut = weight.detach().abs().flatten().sort(stable=True).indices[: int(share * weight.numel())]
            mask.mask.fill_(1.0).view(-1)[cut] = 0.0
        # A step of its own, on the next batch: the upper level of a bilevel method.
        with torch.no_grad():
            self.score = self.score + self.run.loss({k: v for k, v in batch.items() if k != "id"}).total

    def after_step(self, step: int) -> None:
        self.seen.append(step)

    def extra_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Loss:
        size = sum(self._weight(name).square().mean() for name in self.masks)
        return Loss(self.method.pull * (1 + self.score) * size, {"size": size, "rows": float(len(batch["id"]))})

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self._weight(name) for name in self.masks], "lr": 5e-4}]

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.score, self.seen = state["score"], list(state["seen"])

    def detach(self) -> None:
        for name in self.masks:
            parametrize.remove_parametrizations(self.run.model.get_submodule(name), "weight")

    def _weight(self, name: str) -> Tensor:
        linear: Any = self.run.model.get_submodule(name)
        return linear.parametrizations.weight.original


class ToySelector(Method, slug="toy_selector"):
    """A random choice among the longer half of the examples."""

    kinds = ("selector",)
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
    for cls, kind in ((ToyModifier, "modifier"), (ToySelector, "selector")):
        entry = Entry(cls.slug, "training", cls.__name__, f"intaglio.toys.{cls.slug}", (kind,), "a toy", "nobody")  # type: ignore[arg-type]
        module = ModuleType(entry.module)
        setattr(module, cls.__name__, cls)
        monkeypatch.setitem(PUBLISHED, cls.slug, entry)
        monkeypatch.setitem(METHODS, cls.slug, entry)
        monkeypatch.setitem(sys.modules, entry.module, module)
