"""Small labelled images and networks that tests of mixing share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import Trainer, TrainingArguments

from intaglio.checkpoint import Checkpoint
from intaglio.trainer import EpochCollator, KeyedRNG, ObjectiveModule, train, training_rows
from intaglio.trainer.classification import Classification
from tests.trainer.helpers import LABELLED, checkpoint, same, weights

IMAGES = [
    {"pixel_values": torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(n)) + n % 3, "label": n % 3}
    for n in range(12)
]
"""Images of three classes, float32 [1, 4, 4]."""


def image_network() -> nn.Sequential:
    """A convolution and a linear layer, with weights of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def trained(method: Any, **more: Any) -> Any:
    """Weights and log of four steps with a modifier."""
    net = image_network()
    arguments: dict[str, Any] = {"steps": 4, "batch_size": 4, "log_every": 1, "learning_rate": 0.01, **more}
    result = train(Checkpoint(net), IMAGES, objective=Classification(), modifiers=[method], **arguments)
    return dict(net.state_dict()), [entry.parts for entry in result.history]


def trained_in_stock_trainer(method: Any, place: Path) -> Checkpoint:
    """A classifier of texts after two steps with a modifier in a stock Trainer, whose weights have changed."""
    ckpt, objective, rng = checkpoint("bert", layers=1), Classification(), KeyedRNG(0)
    rows = training_rows(objective, ckpt, LABELLED[:12], rng)
    before = weights(ckpt)

    module = ObjectiveModule(ckpt, objective, [method], rows, steps=2)
    collate = EpochCollator(objective, rng, ids=True)
    arguments = TrainingArguments(str(place), max_steps=2, remove_unused_columns=False, report_to=[], use_cpu=True,
                                  per_device_train_batch_size=4, logging_steps=1)  # fmt: skip
    trainer = Trainer(module, arguments, collate, rows, callbacks=[module.callback])
    trainer.train()
    reports = module.detach()

    assert np.isfinite(trainer.state.log_history[0]["loss"])
    assert "Mixed samples" in str(reports[method.slug])
    assert not same(before, weights(ckpt))
    return ckpt


def image_folder(place: Path, classes: tuple[str, ...]) -> Path:
    """A folder of four grey images of each class."""
    draws = np.random.default_rng(0)
    for name in classes:
        (place / name).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(draws.integers(0, 255, (8, 8), dtype=np.uint8)).save(place / name / f"{number}.png")
    return place
