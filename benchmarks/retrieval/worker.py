"""One training of an encoder, in a fresh process: prints pairs a second as JSON.

    python benchmarks/retrieval/worker.py SIDE KIND PAIRS --steps 12

SIDE is `ours` or `theirs` (sentence-transformers' trainer), KIND is `dense` (MiniLM) or `sparse` (SPLADE-tiny), PAIRS a
file from `run.py`. Both get the same pairs in batches of the same size and length; the first steps are not counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from intaglio.checkpoint import load
from intaglio.data.text_pairs import load_text_pairs
from intaglio.methods.retrieval.mistral_splade import MistralSplade
from intaglio.trainer import train
from intaglio.trainer.contrastive import Contrastive

LENGTH, SKIPPED, RATE, PENALTY = 64, 3, 2e-5, 1e-3


def ours(kind: str, pairs: list[dict[str, Any]], steps: int, batch: int) -> list[float]:
    """Return the times at which steps end."""
    lengths: dict[str, Any] = {"query_length": LENGTH, "document_length": LENGTH}
    if kind == "dense":
        model, objective = "minilm", Contrastive(pooling="mean", temperature=0.05, **lengths)
    else:
        weights = {"query_weight": PENALTY, "document_weight": PENALTY, "regularizer_warmup": 0.0}
        model, objective = "splade-tiny", MistralSplade(variant="plain", **lengths, **weights)  # type: ignore[assignment]
    times: list[float] = []
    arguments: dict[str, Any] = {"steps": steps, "batch_size": batch, "learning_rate": RATE}
    train(load(model), pairs, objective=objective, progress=lambda *_: times.append(time.perf_counter()), **arguments)
    return times


def theirs(kind: str, pairs: list[dict[str, Any]], steps: int, batch: int) -> list[float]:
    """Return the times at which steps end, by the trainer of sentence-transformers."""
    import sentence_transformers as st
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            times.append(time.perf_counter())

    data = Dataset.from_list([{"anchor": pair["query"], "positive": pair["positive"]} for pair in pairs])
    with tempfile.TemporaryDirectory() as folder:
        load({"dense": "minilm", "sparse": "splade-tiny"}[kind]).save(f"{folder}/model")
        arguments: dict[str, Any] = {"output_dir": f"{folder}/out", "max_steps": steps, "learning_rate": RATE,
                                     "per_device_train_batch_size": batch, "save_strategy": "no", "report_to": [],
                                     "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}  # fmt: skip
        trainer: Any
        if kind == "dense":
            model = st.SentenceTransformer(f"{folder}/model", device="cpu")
            model.max_seq_length = LENGTH
            loss: Any = MultipleNegativesRankingLoss(model, scale=20.0)
            trainer = st.SentenceTransformerTrainer(
                model, st.SentenceTransformerTrainingArguments(**arguments), data, loss=loss, callbacks=[Clock()]
            )
        else:
            sparse = st.SparseEncoder(f"{folder}/model", device="cpu")
            sparse.max_seq_length = LENGTH
            ranking = SparseMultipleNegativesRankingLoss(sparse, scale=1.0)
            loss = SpladeLoss(sparse, ranking, document_regularizer_weight=PENALTY, query_regularizer_weight=PENALTY)
            trainer = st.SparseEncoderTrainer(
                sparse, st.SparseEncoderTrainingArguments(**arguments), data, loss=loss, callbacks=[Clock()]
            )
        trainer.train()
    return times


def main() -> None:
    """Train, and print pairs a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("ours", "theirs"))
    parser.add_argument("kind", choices=("dense", "sparse"))
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pairs = [pair.row() for pair in load_text_pairs(given.pairs)]
    side = ours if given.side == "ours" else theirs
    times = side(given.kind, pairs, given.steps, given.batch)
    seconds = times[-1] - times[SKIPPED - 1]
    print(json.dumps({"pairs_per_second": given.batch * (given.steps - SKIPPED) / seconds}))


if __name__ == "__main__":
    main()
