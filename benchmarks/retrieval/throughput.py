"""Texts a second of encoders from one decoder, at equal tokens of text in a batch.

The decoder is SmolLM2, the light encoder MiniLM, both as they are: training changes no time. A batch has as many tokens
of text at every length, so a batch of short texts has more of them. Ways are alternated, and medians reported.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from intaglio.checkpoint import load
from intaglio.data.text_pairs import load_text_pairs
from intaglio.methods.retrieval.causal2vec import Causal2Vec
from intaglio.trainer.contrastive import Contrastive
from intaglio.trainer.encoder_training import EncoderObjective

WAYS = ("last token", "causal2vec", "echo")
MOST_OF_LAST_TOKEN, LEAST_OF_ECHO = 1.15, 1.6
"""Targets: time of a text over that of last-token pooling, and texts a second over those of echo."""


def ways(length: int) -> dict[str, EncoderObjective]:
    """Return the encoders that read texts of a length."""
    sizes: dict[str, Any] = {"query_length": 32, "document_length": length}
    return {
        "last token": Contrastive(pooling="last", **sizes),
        "causal2vec": Causal2Vec(**sizes),
        "echo": Contrastive(variant="echo", pooling="mean", **sizes),
    }


def throughput(lengths: Sequence[int], batch_tokens: int, runs: int) -> dict[str, dict[str, float]]:
    """Return for each length the texts a second of each way, and the two ratios that have targets."""
    checkpoint = load("smollm2")
    whole = "\n".join(pair.positive for pair in load_text_pairs("docstrings")[:2000]).split()
    rows = {}
    for length in lengths:
        # A word has at least a token, so every text fills its row.
        texts = [" ".join(whole[n * length : (n + 1) * length]) for n in range(max(1, batch_tokens // length))]
        methods = {name: method.setup(checkpoint) for name, method in ways(length).items()}
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for run in range(runs + 1):
            for name, method in methods.items():
                start = time.perf_counter()
                method.encode(checkpoint, texts, "document", batch_size=len(texts))
                if run:  # the first is a warm-up
                    seconds[name].append(time.perf_counter() - start)
        rates = {name: len(texts) / median(seconds[name]) for name in WAYS}
        ratios = {
            "time over last token": rates["last token"] / rates["causal2vec"],
            "speed over echo": rates["causal2vec"] / rates["echo"],
        }
        rows[str(length)] = {**rates, **ratios, "threads": torch.get_num_threads()}
    return rows


def missed(rows: dict[str, dict[str, float]]) -> list[str]:
    """Return the lengths at which a target is missed."""
    return [
        f"throughput at {length} tokens"
        for length, row in rows.items()
        if row["time over last token"] > MOST_OF_LAST_TOKEN or row["speed over echo"] < LEAST_OF_ECHO
    ]


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Return the rows as Markdown."""
    names = (*WAYS, "time over last token", "speed over echo")
    lines = [f"| texts a second, tokens of a text | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for length, row in rows.items():
        lines.append(f"| {length} | {' | '.join(f'{row[name]:.2f}' for name in names)} |")
    return lines
