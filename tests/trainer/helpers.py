"""Small models and runs that the tests of the trainer share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.trainer import CausalLM, TrainResult, train
from intaglio.trainer.classification import Classification
from tests.families import tiny_model, tiny_tokenizer

TEXTS = [f"the quick brown fox number {n} jumps over the lazy dog and sleeps in the sun" for n in range(30)]
PAIRS = [
    {"query": f"number {n} fox", "positive": text, "negatives": [TEXTS[(n + 7) % 30], TEXTS[(n + 11) % 30]]}
    for n, text in enumerate(TEXTS[:12])
]
LABELLED = [{"text": text, "label": ("dog", "fox", "sun")[n % 3]} for n, text in enumerate(TEXTS)]
ARGUMENTS: dict[str, Any] = {"steps": 8, "batch_size": 2, "log_every": 1, "learning_rate": 1e-3, "warmup": 2}


def checkpoint(family: str = "llama", layers: int = 2, **more: Any) -> Checkpoint:
    """A tiny random model with its tokenizer."""
    return Checkpoint(tiny_model(family, layers=layers, **more), tiny_tokenizer(family), "tiny")


def run(ckpt: Any, data: Any = None, **more: Any) -> TrainResult:
    """A short run of next-token training on rows of 24 tokens."""
    data = TEXTS if data is None else data
    return train(ckpt, data, **{"objective": CausalLM(length=24), **ARGUMENTS, **more})


def suited(modifier: Any) -> dict[str, Any]:
    """Arguments of `run` by which a modifier trains: labelled texts where it is for classifiers."""
    return {"data": LABELLED, "objective": Classification()} if modifier.trains_on == "classes" else {}


def weights(ckpt: Checkpoint) -> dict[str, Tensor]:
    """A copy of the weights."""
    return {name: value.clone() for name, value in ckpt.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two copies are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The greatest difference of two copies."""
    return max(float((a[name] - b[name]).abs().max()) for name in a)
