"""Encoders against sentence-transformers: equal poolings and losses, training speed, and a table of quality.

    python benchmarks/retrieval/run.py                 about half an hour on two cores
    python benchmarks/retrieval/run.py --only parity speed
    python benchmarks/retrieval/run.py --only latency --context 512

- parity: SPLADE pooling, FLOPS, InfoNCE and margin MSE on the same logits and vectors; they agree to 1e-6
- speed: training pairs a second at equal batch and length, one thread, alternated in fresh processes; at least 1.0
- quality: docstring retrieval in Python's standard library by BM25, MiniLM, SPLADE-tiny and SmolLM2 as SPLADE after a
  short run, with terms and milliseconds a query; without a verdict
- throughput: texts a second of SmolLM2 with a Contextual token (causal2vec) against last-token pooling and echo, at
  equal tokens of text in a batch; at most 1.15 times the time of last-token pooling, at least 1.6 times echo's speed
- upgrade: MiniLM's queries among the vectors of a small encoder trained on sympy alone, by BT2 and by Procrustes; nDCG
  of new/old and of new/new, for several weights of BT2's alignment; without a verdict
- latency: SmolLM2's time to first token with compressed passages, embeddings cached and not, against the plain prompt;
  the compressor is untrained, so this is of speed only. At 2,048 tokens with the cache at least 8 times
- answers: a small decoder with a compressor, trained here, answers questions by `intaglio ask`, from passages as tokens
  and as one embedding per four tokens; see `answers.py`; without a verdict

Needs sentence-transformers (`pip install 'intaglio[encoders]'`). Writes `out/results.json` and `out/results.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import answers
import throughput
import torch

from intaglio import atomic_io
from intaglio.checkpoint import load
from intaglio.data.text_pairs import TextPair, load_text_pairs
from intaglio.evidence.testbeds.encoder_versions import EncoderVersions
from intaglio.methods.retrieval.bt2 import BT2, CachedPairs
from intaglio.methods.retrieval.mistral_splade import MistralSplade
from intaglio.methods.retrieval.mistral_splade.functional import flops, quadratic_ramp, splade_weights
from intaglio.search import load_encoder
from intaglio.search.encoders import SparseVectors
from intaglio.trainer import train
from intaglio.trainer.lora import Lora
from intaglio.trainer.ranking_losses import info_nce, margin_mse
from intaglio.trainer.retrieval_evaluation import RetrievalTask, ranking_quality

HERE = Path(__file__).resolve().parent
EQUAL, LEAST_FASTER = 1e-6, 1.0
"""Targets: largest relative difference of a value, and pairs a second over the peer's."""
LEAST_SOONER = {2048: 8.0}
"""Least ratio of the times to the first token, plain prompt over cached embeddings, by tokens of context."""
PARTS = ("parity", "speed", "quality", "throughput", "upgrade", "latency", "answers")
SEED = 0
WEIGHTS = (1.0, 5.0, 25.0)
"""Of BT2's alignment."""
CHARACTERS = 384
"""Of the texts of the timed trainings, more than a row holds."""


def parity() -> dict[str, float]:
    """Return the largest relative difference of each function from sentence-transformers'."""
    from sentence_transformers.sparse_encoder.losses import (
        FlopsLoss,
        SparseMarginMSELoss,
        SparseMultipleNegativesRankingLoss,
    )
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    rng = torch.Generator().manual_seed(0)
    lengths = [5, 9, 12, 3]
    logits_NLV = 4 * torch.randn(4, 12, 2000, generator=rng)
    mask_NL = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    flat_SV = logits_NLV[mask_NL.bool()]
    differences = {}
    for how in ("max", "sum"):
        features = {"token_embeddings": logits_NLV.clone(), "attention_mask": mask_NL}
        peer = SpladePooling(how).eval()(features)["sentence_embedding"]
        differences[f"pooling, {how}"] = _difference(splade_weights(flat_SV, lengths, how), peer)  # type: ignore[arg-type]
    weights = splade_weights(flat_SV, lengths)
    queries, documents = 0.1 * weights[:2], 0.1 * weights
    differences["FLOPS"] = _difference(flops(weights), FlopsLoss(None).compute_loss_from_embeddings(weights))
    none = torch.zeros(2, 4, dtype=torch.bool)
    ranking = SparseMultipleNegativesRankingLoss(None, scale=0.5)
    peer = ranking.compute_loss_from_embeddings([queries, documents[:2], documents[2:]], None)
    differences["InfoNCE"] = _difference(info_nce(queries @ documents.T / 2, none), peer)
    queries, documents = queries.double(), documents.double()
    teacher = torch.tensor([3.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    margins = torch.stack([teacher[:2] - teacher[2:]], 1)
    peer = SparseMarginMSELoss(None).compute_loss_from_embeddings([queries, documents[:2], documents[2:]], margins)
    own = margin_mse(queries @ documents.T, torch.tensor([0, 1, 0, 1]), teacher)
    differences["margin MSE"] = _difference(own, peer)
    differences["schedule"] = max(abs(quadratic_ramp(step, 30) - min(1, step / 30) ** 2) for step in range(40))
    return differences


def _difference(own: torch.Tensor, peer: torch.Tensor) -> float:
    return float((own - peer).abs().max() / peer.abs().max())


def speed(runs: int, steps: int, out: Path) -> dict[str, dict[str, float]]:
    """Return pairs a second of both sides, medians over alternated processes, and their ratio."""
    results = {}
    # Texts that fill a row, so that padding is the same however a batch is drawn.
    every = [pair for pair in load_text_pairs("docstrings") if len(pair.positive) > CHARACTERS][:400]
    file = out / "pairs.jsonl"
    lines = [json.dumps(TextPair(pair.positive[:CHARACTERS], pair.positive).row()) + "\n" for pair in every]
    atomic_io.write_text(file, "".join(lines))
    for kind in ("dense", "sparse"):
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(runs):
            for side, own in rates.items():
                command = [sys.executable, str(HERE / "worker.py"), side, kind, str(file), "--steps", str(steps)]
                lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
                own.append(json.loads(lines[-1])["pairs_per_second"])
        medians = {side: median(own) for side, own in rates.items()}
        results[kind] = {**medians, "ratio": medians["ours"] / medians["theirs"]}
    return results


def quality(steps: int, documents: int, queries: int, out: Path) -> dict[str, dict[str, float]]:
    """Return nDCG@10, MRR@10, terms and milliseconds a query of each retriever; a stopped training resumes."""
    every = load_text_pairs("docstrings")
    held_out, pairs = every[:documents], every[documents:]
    task = RetrievalTask(held_out)
    rows = {"BM25": _bm25(task, queries)}
    for name in ("minilm", "splade-tiny"):
        encoder = load_encoder(name)
        rows[name] = _measured(task, queries, encoder.encode_queries, encoder.encode_documents)
    checkpoint = load("smollm2")
    method = MistralSplade(
        logit_scale="width", query_length=32, document_length=64, query_weight=1e-2, document_weight=1e-2,
        query_terms=64, document_terms=256,
    )  # fmt: skip
    rows_of_training = [TextPair(pair.query, pair.positive).row() for pair in pairs]
    train(checkpoint, rows_of_training, objective=method, steps=steps, batch_size=8, learning_rate=2e-4, warmup=0.1,
          lora=Lora(r=16, alpha=8, dropout=0.1), directory=out / "smollm2-splade")  # fmt: skip
    checkpoint.model.eval()
    rows[f"SmolLM2 as SPLADE, {steps} steps"] = _measured(
        task,
        queries,
        lambda texts: method.encode(checkpoint, texts, "query"),
        lambda texts: method.encode(checkpoint, texts, "document"),
    )
    return rows


def upgrade() -> dict[str, dict[str, float]]:
    """Return nDCG@10 of new/old and new/new of each way to upgrade an index, with its seconds."""
    bed = EncoderVersions()
    data, pairs = bed.retrieval("pilot"), CachedPairs(*bed.cached_pairs(SEED))
    names, queries = list(data.documents), list(data.queries.values())
    relevant = [[names.index(name) for name in data.relevant[query]] for query in data.queries]
    new_QH, new_NH = bed.new_vectors(queries), bed.new_vectors(list(data.documents.values()))
    old_QM, old_NM = (
        bed.old_vectors(SEED, queries, "query"),
        bed.old_vectors(SEED, list(data.documents.values()), "document"),
    )

    def ndcg(queries: torch.Tensor, documents: torch.Tensor) -> float:
        return ranking_quality(queries @ documents.T, relevant)["nDCG@10"]

    rows = {
        "old encoder": {"old/old": ndcg(old_QM, old_NM)},
        "encode again": {"new/new": ndcg(new_QH, new_NH)},
    }
    methods = {"Procrustes": BT2(arm="procrustes")}
    methods |= {f"BT2, alignment {weight:g}": BT2(alignment_weight=weight) for weight in WEIGHTS}
    for name, method in methods.items():
        start = time.perf_counter()
        head = method.fit_head(pairs)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            query_QD, document_ND = head(new_QH).vectors, head(new_NH).vectors
        quality = {"new/old": ndcg(head.old_block(query_QD), old_NM), "new/new": ndcg(query_QD, document_ND)}
        rows[name] = {**quality, "seconds": seconds}
    return rows


def _measured(
    task: RetrievalTask, count: int, queries: Callable[[Any], Any], documents: Callable[[Any], Any]
) -> dict[str, float]:
    """Return the row of an encoder; time is that of encoding a query alone and scoring all documents."""
    document_ND = _dense(documents(task.documents))
    chosen = task.queries[:count]
    scores, seconds, terms = [], [], []
    for text in chosen:
        start = time.perf_counter()
        query_D = _dense(queries([text]), document_ND.shape[1])[0]
        scores.append(document_ND @ query_D)
        seconds.append(time.perf_counter() - start)
        terms.append(int((query_D != 0).sum()))
    return {
        **ranking_quality(torch.stack(scores), task.relevant[:count]),
        "query_terms": sum(terms) / len(terms),
        "document_terms": float((document_ND != 0).sum(1).float().mean()),
        "milliseconds": 1000 * median(seconds),
    }


def _dense(vectors: Any, width: int = 0) -> torch.Tensor:
    """Return vectors as a matrix."""
    if not isinstance(vectors, SparseVectors):
        return torch.as_tensor(vectors)
    width = width or int(vectors.terms.max()) + 1
    matrix = torch.zeros(len(vectors.ptr) - 1, width)
    for row, terms in enumerate(vectors.rows()):
        for term, weight in terms.items():
            if term < width:
                matrix[row, term] = weight
    return matrix


def _bm25(task: RetrievalTask, count: int) -> dict[str, float]:
    import tempfile

    from intaglio.search import Index

    with tempfile.TemporaryDirectory() as folder, Index.create(Path(folder) / "index", chunk=0) as index:
        index.add({"id": str(number), "text": text} for number, text in enumerate(task.documents))
        scores_QN, seconds = torch.zeros(count, len(task.documents)), []
        for row, text in enumerate(task.queries[:count]):
            start = time.perf_counter()
            hits = index.search(text, len(task.documents))
            seconds.append(time.perf_counter() - start)
            for hit in hits:
                scores_QN[row, int(hit.id)] = hit.score
    return {**ranking_quality(scores_QN, task.relevant[:count]), "milliseconds": 1000 * median(seconds)}


def latency(contexts: list[int], runs: int) -> list[dict[str, float]]:
    """Return the times to the first token for contexts of some lengths, from a fresh process."""
    words = ["--context", *map(str, contexts), "--runs", str(runs)]
    command = [sys.executable, str(HERE / "first_token.py"), *words]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    rows: list[dict[str, float]] = json.loads(lines[-1])
    return rows


def page(results: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = ["# Encoders against sentence-transformers", ""]
    if "parity" in results:
        lines += ["| same inputs | largest relative difference |", "| --- | --- |"]
        lines += [f"| {name} | {value:.1e} |" for name, value in results["parity"].items()] + [""]
    if "speed" in results:
        lines += ["| training, pairs a second | ours | sentence-transformers | ratio |", "| --- | --- | --- | --- |"]
        for name, row in results["speed"].items():
            lines.append(f"| {name} | {row['ours']:.1f} | {row['theirs']:.1f} | {row['ratio']:.2f} |")
        lines.append("")
    if "quality" in results:
        names = ("nDCG@10", "MRR@10", "query_terms", "document_terms", "milliseconds")
        lines += [f"| docstrings of the standard library | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
        for name, row in results["quality"].items():
            lines.append(f"| {name} | " + " | ".join(f"{row[key]:.3g}" if key in row else "" for key in names) + " |")
        lines.append("")
    if "throughput" in results:
        lines += ["", *throughput.table(results["throughput"])]
    if "upgrade" in results:
        names = ("old/old", "new/old", "new/new", "seconds")
        lines += [f"| docstrings, nDCG@10 of query/document | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
        for name, row in results["upgrade"].items():
            lines.append(f"| {name} | " + " | ".join(f"{row[key]:.3f}" if key in row else "" for key in names) + " |")
    if "latency" in results:
        names = ("positions", "plain", "cached", "cached_ratio", "encoded", "encoded_ratio")
        lines += ["", f"| tokens of context (SmolLM2, seconds; untrained, speed only) | {' | '.join(names)} |"]
        lines.append("| --- |" + " --- |" * len(names))
        for row in results["latency"]:
            lines.append(f"| {row['context']:,} | " + " | ".join(f"{row[name]:.3g}" for name in names) + " |")
    if "answers" in results:
        lines += answers.table(results["answers"])
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the parts, write the results, and fail where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of a timed training")
    parser.add_argument("--training", type=int, default=40, help="steps of SmolLM2")
    parser.add_argument("--documents", type=int, default=600, help="of the table of quality")
    parser.add_argument("--queries", type=int, default=200, help="of the table of quality")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 256], help="tokens of a timed text")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="tokens of text in a timed batch")
    parser.add_argument("--context", type=int, nargs="+", default=[512, 1024, 2048], help="tokens, of latency")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    if "parity" in given.only:
        results["parity"] = parity()
    if "speed" in given.only:
        results["speed"] = speed(given.runs, given.steps, given.out)
    if "quality" in given.only:
        results["quality"] = quality(given.training, given.documents, given.queries, given.out)
    if "throughput" in given.only:
        results["throughput"] = throughput.throughput(given.lengths, given.batch_tokens, given.runs)
    if "upgrade" in given.only:
        results["upgrade"] = upgrade()
    if "latency" in given.only:
        results["latency"] = latency(given.context, given.runs)
    if "answers" in given.only:
        results["answers"] = answers.answers(given.out / "answers")
    atomic_io.write_json(given.out / "results.json", results)
    (given.out / "results.md").write_text(page(results), encoding="utf-8")
    print(page(results))
    missed = [name for name, value in results.get("parity", {}).items() if value > EQUAL]
    missed += [f"speed, {name}" for name, row in results.get("speed", {}).items() if row["ratio"] < LEAST_FASTER]
    missed += throughput.missed(results.get("throughput", {}))
    missed += [
        f"latency at {row['context']:,} tokens"
        for row in results.get("latency", ())
        if row["cached_ratio"] < LEAST_SOONER.get(int(row["context"]), 0.0)
    ]
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
