"""The features demo: a small sparse dictionary on SmolLM2, its page, and a text steered with one of its features."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from intaglio import atomic_io, report
from intaglio.checkpoint import Checkpoint, load
from intaglio.cli.demo_output import demo_directory
from intaglio.data.texts import load_texts
from intaglio.dictionaries.baselines import TopKSAE
from intaglio.dictionaries.dictionary import SparseDictionary
from intaglio.dictionaries.features import describe_features
from intaglio.dictionaries.steering import Push
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.sites import hooked

MODEL, TEXTS = "smollm2", "wikipedia"
LAYER, WIDTH, ACTIVE, TOKENS, READ = 9, 1024, 32, 60_000, 16_384
BATCH, RATE = 128, 3e-3
"""Small batches and a high rate: a TopK dictionary is sparse from its first step, and 60,000 activations are few."""
PROMPT = "The most important thing about the town is"
SCALES = (0, 2, 4)
"""Of the steered texts, in units of the feature's highest code."""


def demo(
    output: str | os.PathLike[str], *, device: str | None = None, seed: int = 0, progress: Progress = no_progress
) -> dict[str, Any]:
    """Train a dictionary on the bundled model, write the page of its features, and steer with one of them.

    Returns:
        The content of `report.json`: `{features, measures, steered, sentence, seconds}`.
    """
    started = time.time()
    with demo_directory(output, "dictionary") as temporary:
        checkpoint = load(MODEL, device=device)
        training, held_out = load_texts(TEXTS).split()
        method = TopKSAE(layer=LAYER, width=WIDTH, k=ACTIVE, tokens=TOKENS, batch_tokens=BATCH, learning_rate=RATE)
        method.fit(checkpoint, training, seed=seed, batch_size=8, progress=progress)
        ((name, dictionary),) = method.dictionaries.items()
        dictionary.save(temporary / "dictionary")
        features = describe_features(checkpoint, name, dictionary, held_out, tokens=READ, batch_size=8)
        features["texts"] = TEXTS
        example = _example(features)
        feature, highest = example["id"], example["highest"]
        measures = {key: value for key, value in dictionary.about.items() if isinstance(value, float)}
        document = {
            "features": features,
            "measures": measures,
            "sentence": (
                f"{TOKENS:,} activations of layer {LAYER}: {measures['fvu']:.0%} of the variance unexplained, "
                f"{measures['l0']:.0f} active latents, {measures['loss_recovered']:.0%} of the loss recovered"
            ),
            "steered": [
                {
                    "label": f"feature {feature} x {scale}",
                    "text": _steered(checkpoint, dictionary, feature, scale * highest),
                }
                for scale in SCALES
            ],
            "seconds": time.time() - started,
        }
        (temporary / "report.json").write_text(atomic_io.to_json(document), encoding="utf-8")
        (temporary / "report.html").write_text(report.features_page(features), encoding="utf-8")
    return document


def _example(features: dict[str, Any]) -> dict[str, Any]:
    """Return the feature whose contexts peak most consistently at one token, among those that fire for few tokens."""
    rare = [row for row in features["features"] if row["rate"] < 0.02 and len(row["contexts"]) > 3]

    def agreement(row: dict[str, Any]) -> int:
        peaks = [ids[levels.index(max(levels))] for ids, levels in row["contexts"]]
        return max(map(peaks.count, peaks))

    best: dict[str, Any] = max(rare or features["features"], key=agreement)
    return best


@torch.no_grad()
def _steered(checkpoint: Checkpoint, dictionary: SparseDictionary, feature: int, amount: float) -> str:
    """Return a greedy continuation while a feature is added."""
    inputs = checkpoint.tokenizer(PROMPT, return_tensors="pt").to(checkpoint.device)
    push = Push.from_feature(dictionary, feature, amount)
    with hooked(anatomy(checkpoint.model), {push.site: push}):
        ids = checkpoint.model.generate(**inputs, do_sample=False, max_new_tokens=24)  # type: ignore[operator]
    text: str = checkpoint.tokenizer.decode(ids[0], skip_special_tokens=True)
    return text
