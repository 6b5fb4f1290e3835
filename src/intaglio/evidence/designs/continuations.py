"""Design that continues held-out texts with a fine-tuned or the original model: `Continue`.

Settings of an arm: `stage`, the model that continues (`original`, `fitted`, or `early`, the fitted run's state of the
least held-out loss); `top_p`, nucleus sampling instead of greedy decoding; `matched`, sampling at the temperature that
gives the entropy of the fitted model; `blocked`, n-grams of the training set are forbidden.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import fmean
from typing import Any

from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.evidence.designs.base import BedDesign, Configured, Settings, training_cost
from intaglio.evidence.engine.claim import Arm, Metric, Result, RunKey
from intaglio.evidence.testbeds.cached_models import copied
from intaglio.evidence.testbeds.smollm2 import SmolLM2Wikipedia
from intaglio.measures.generated_text import (
    NGramIndex,
    continue_texts,
    entropy_matched_temperature,
    predictive_entropy,
    repetition,
    type_token_ratio,
)
from intaglio.measures.language_modeling import quality
from intaglio.measures.memory import peak_memory
from intaglio.methods.training.hyperfitting import CitationBlocker, Hyperfitting
from intaglio.modeling.anatomy import blocks
from intaglio.trainer import train

TTR = Metric("type-token ratio", "share", "higher", continuous=False)
REPETITION = Metric("repeated bigrams", "share", continuous=False)
OVERLAP = Metric("copied 5-grams", "share", continuous=False)
HELD_OUT = Metric("held-out loss", "nats a token")
ENTROPY = Metric("predictive entropy", "nats")
BATCH = 16


@dataclass(frozen=True)
class Continue(BedDesign):
    """Fit the last `blocks` to a draw of `bed.calibration`, and continue `prefix` tokens of held-out documents.

    Args:
        bed: model and texts; each document's window begins with a prefix.
        blocks: last blocks that are trained.
        steps: updates.
        learning_rate: of them.
        prefix: tokens that are continued.
        new: new tokens.
        checks: measurements of the held-out loss during training.
    """

    bed: Any = field(default_factory=lambda: SmolLM2Wikipedia(samples=8, length=96, documents_run=16))
    blocks: int = 3
    steps: int = 40
    learning_rate: float = 1e-3
    prefix: int = 32
    new: int = 128
    checks: int = 8

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Continue the documents with the model of an arm and measure texts and model."""
        own = Configured(arm, settings)
        stage, top_p = own.pop("stage", "original"), own.pop("top_p")
        blocked, matched = own.pop("blocked", False), own.pop("matched", False)
        own.check()
        data = self.bed.calibration(key.seed, key.split).segments
        held_out = self.bed.documents(key.split, key.base).segments
        with peak_memory(self.bed.load().device) as spent:
            model = self._model(stage, key)
            temperature = self._temperature(model, held_out, key) if matched else None
        rows = data.ids_NT.tolist()
        processors = [CitationBlocker(rows)] if blocked else []
        sampling = {"top_p": top_p, "temperature": temperature, "seed": key.seed}
        texts = continue_texts(model, held_out.ids_NT[:, : self.prefix], self.new, processors=processors, **sampling)
        values = {**_of_texts(texts, NGramIndex(rows)), **_of_model(model, held_out)}
        tokens = 0 if stage == "original" else self.steps * data.ids_NT.numel()
        return Result(values, training_cost(model, tokens, spent), {"data": data.digest, "held out": held_out.digest})

    def _model(self, stage: str, key: RunKey) -> Checkpoint:
        model: Checkpoint = self.bed.load()
        if stage == "original":
            return model
        model = copied(model)
        fitted = _fitted(self, key.seed, key.split, key.base)
        for block, state in zip(blocks(model.model)[-self.blocks :], fitted[stage], strict=True):
            block.load_state_dict(state)
        return model

    def _temperature(self, model: Checkpoint, held_out: Segments, key: RunKey) -> float:
        entropy = predictive_entropy(self._model("fitted", key), held_out, BATCH)
        return entropy_matched_temperature(model, held_out, entropy, BATCH)

    def toy(self, **changes: Any) -> Any:
        """Return the design on the test bed in miniature."""
        sizes = {"blocks": 1, "steps": 6, "prefix": 8, "new": 12, "checks": 2}
        return dataclasses.replace(self, bed=self.bed.toy(**changes), **sizes)


@lru_cache(maxsize=1)
def _fitted(design: Continue, seed: int, split: Any, base: int) -> Mapping[str, list[dict[str, Tensor]]]:
    """Return the trained blocks at the end of a run, and at its least held-out loss."""
    model = copied(design.bed.load())
    data, held_out = (design.bed.calibration(seed, split).segments, design.bed.documents(split, base).segments)
    least, early = math.inf, _state(model, design.blocks)

    def check(trained: Any) -> dict[str, float]:
        nonlocal least, early
        loss = fmean(quality(trained, held_out, batch_size=BATCH).losses)
        if loss < least:
            least, early = loss, _state(trained, design.blocks)
        return {"loss": loss}

    check(model)
    method = Hyperfitting(length=data.length, cache_hidden=True)
    settings = Hyperfitting.train_settings(
        objective=method,
        learning_rate=design.learning_rate,
        trainable_blocks=design.blocks,
        evaluate=check,
        evaluate_every=max(1, design.steps // design.checks),
        seed=seed % 2**32,
        steps=design.steps,
    )
    settings.pop("epochs")
    train(model, data, **settings)
    return {"fitted": _state(model, design.blocks), "early": early}


def _state(model: Checkpoint, count: int) -> list[dict[str, Tensor]]:
    return [
        {name: value.detach().clone() for name, value in block.state_dict().items()}
        for block in blocks(model.model)[-count:]
    ]


def _of_texts(texts: Sequence[Sequence[int]], training: NGramIndex) -> dict[str, float]:
    return {
        TTR.name: fmean(type_token_ratio(ids) for ids in texts),
        REPETITION.name: fmean(repetition(ids) for ids in texts),
        OVERLAP.name: fmean(training.overlap(ids) for ids in texts),
    }


def _of_model(model: Checkpoint, held_out: Segments) -> dict[str, float]:
    losses = quality(model, held_out, batch_size=BATCH).losses
    return {HELD_OUT.name: fmean(losses), ENTROPY.name: predictive_entropy(model, held_out, BATCH)}
