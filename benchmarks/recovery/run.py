"""Recovery of a pruned model per training token: on PASER's selection, on random pairs, and on the whole pool.

    python benchmarks/recovery/run.py                                   # SmolLM2 at 50 % and 2:4, three seeds
    python benchmarks/recovery/run.py --sparsities 50 --repeats 1 --tokens 2048 --candidates 100
    python benchmarks/recovery/run.py --model DIR --instructions pairs.jsonl --texts FILE

Every arm starts from the same pruned model and trains on the same number of tokens and steps with the same LoRA and
learning rate; `full` sees each pair once, the others repeat a share of the tokens. Measured are held-out answers of the
same kind and held-out prose, neither used for selection or training. Seeds determine the pool's order and the training;
the arms of a seed alternate. Reported are medians over seeds, and the time of selection and training. Writes
`results.json` and `results.md` as results arrive; `--json` prints the former. An interrupted run with the same
arguments continues.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import intaglio
from intaglio import atomic_io
from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.calibration import as_segments
from intaglio.data.segments import Segments
from intaglio.data.texts import load_texts
from intaglio.measures.language_modeling import Reference, quality, reference
from intaglio.methods.training.paser import PASER
from intaglio.trainer import CausalLM, train
from intaglio.trainer.causal_lm import causal_batch
from intaglio.trainer.data_selection import RandomExamples
from intaglio.trainer.instruction_data import load_pairs, train_eval_split
from intaglio.trainer.instruction_tuning import pair_document
from intaglio.trainer.protocols import Example
from intaglio.trainer.rng import KeyedRNG

HERE = Path(__file__).resolve().parent
ARMS = ("paser", "random", "full")
SPARSITIES = {"50": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
HELD_OUT = 0.05
BATCH = 8


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a pruned model wins back a token.")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--instructions", default="docstrings", help="a file of pairs; default: %(default)s")
    parser.add_argument("--texts", default="wikipedia", help="for calibration and evaluation; default: %(default)s")
    parser.add_argument("--embedding", default="minilm")
    parser.add_argument("--sparsities", default=",".join(SPARSITIES), help="of 50, 2:4; default: both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=160, help="pairs of a pool; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=8192, help="training tokens of each arm; default: %(default)s")
    parser.add_argument("--passes", type=int, default=2, help="over the selection; default: %(default)s")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row; default: %(default)s")
    parser.add_argument("--rows", type=int, default=4, help="of a step; default: %(default)s")
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--samples", type=int, default=16, help="evaluation segments; default: %(default)s")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--json", action="store_true", help="print results.json")
    return parser.parse_args()


def fitting(checkpoint: Checkpoint, pairs: Sequence[Example], length: int) -> list[Example]:
    """Return the pairs whose prompts leave room for an answer."""
    asked = checkpoint.tokenizer([pair["prompt"] for pair in pairs], verbose=False)["input_ids"]
    return [pair for pair, ids in zip(pairs, asked, strict=True) if len(ids) <= length // 2]


def cut_to(checkpoint: Checkpoint, pairs: Sequence[Example], tokens: int, length: int) -> list[Example]:
    """Return pairs of exactly `tokens` tokens in total; the last one is truncated."""
    documents: list[Example] = []
    left = tokens
    for number, pair in enumerate(pairs):
        documents.append(
            {name: value[:left] for name, value in pair_document(checkpoint, pair, number, length, chat=False).items()}
        )
        left -= len(documents[-1]["input_ids"])
        if not left:
            return documents
    sys.exit(f"the pairs are {left} tokens short of {tokens}; give more candidates or fewer tokens")


def chosen(
    arm: str, pool: list[Example], pruned: Checkpoint, dense: Checkpoint, seed: int, wanted: int, arguments: Any
):
    """Return the pairs of an arm with at least the wanted tokens, and the seconds of the selection."""
    begun = time.perf_counter()
    if arm != "paser":
        order = list(RandomExamples(budget=1.0).select(pool, pruned, None, 1.0, KeyedRNG(seed)))
        return [pool[n] for n in order], time.perf_counter() - begun
    paser = PASER(embedding=arguments.embedding, length=arguments.length, chat=False, batch_size=BATCH)
    looked = paser.look(pool, pruned, dense, seed=seed)
    rows = (pair_document(pruned, pair, n, arguments.length, chat=False) for n, pair in enumerate(pool))
    sizes = [len(row["input_ids"]) for row in rows]
    for count in range(1, len(pool) + 1):
        taken = paser.pick(looked, count, seed=seed).indices
        if sum(sizes[n] for n in taken) >= wanted:
            break
    return [pool[n] for n in taken], time.perf_counter() - begun


@torch.no_grad()
def answer_loss(checkpoint: Checkpoint, pairs: Sequence[Example], length: int) -> float:
    """Return the nats per token of the answers."""
    total, count = 0.0, 0
    for start in range(0, len(pairs), BATCH):
        part = pairs[start : start + BATCH]
        batch = causal_batch([pair_document(checkpoint, pair, n, length, chat=False) for n, pair in enumerate(part)])
        weight, target_BT = batch.pop("weight"), batch.pop("target").to(checkpoint.device)
        inputs = {name: value.to(checkpoint.device) for name, value in batch.items()}
        logits_BTV = checkpoint.model(**inputs, use_cache=False).logits.float()
        nll = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), reduction="sum")
        total, count = total + float(nll), count + weight
    return total / count


def measured(
    checkpoint: Checkpoint, prose: Segments, original: Reference, pairs: Sequence[Example], length: int
) -> dict[str, float]:
    """Return the log-perplexity of answers and prose, and the agreement with the original."""
    results = quality(checkpoint, prose, original, batch_size=BATCH)
    assert results.perplexity is not None
    assert results.top1_agreement is not None
    return {
        "answers, nats a token": answer_loss(checkpoint, pairs, length),
        "prose, nats a token": math.log(results.perplexity),
        "agreement": results.top1_agreement,
    }


def recovered(name: str, arguments: argparse.Namespace, had: Collection[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    """Yield every arm of every seed at one sparsity."""
    if len(had) == arguments.repeats * len(ARMS):
        return
    dense = intaglio.load(arguments.model, device=arguments.device, dtype="float32")
    calibration, held_out = load_texts(arguments.texts).split()
    length = arguments.length
    prose = as_segments(dense, held_out, arguments.samples, 2 * length, 0)
    original = reference(dense, prose, batch_size=BATCH)
    pairs, judged = train_eval_split(fitting(dense, load_pairs(arguments.instructions), length), HELD_OUT)
    judged = judged[: 4 * arguments.samples]
    pruned = Checkpoint(copy.deepcopy(dense.model), dense.tokenizer, dense.source)
    segments = as_segments(dense, calibration, arguments.samples, 2 * length, 0)
    intaglio.Wanda(**SPARSITIES[name]).apply(pruned, segments, batch_size=BATCH)
    before = measured(pruned, prose, original, judged, length)
    for seed in range(arguments.repeats):
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
        pool = [{**pairs[place], "id": n} for n, place in enumerate(order[: arguments.candidates])]
        for arm in ARMS[:: 1 if seed % 2 else -1]:
            if (seed, arm) in had:
                continue
            wanted = arguments.tokens // (1 if arm == "full" else arguments.passes)
            taken, choosing = chosen(arm, pool, pruned, dense, seed, wanted, arguments)
            done = Checkpoint(copy.deepcopy(pruned.model), pruned.tokenizer, pruned.source)
            begun = time.perf_counter()
            trained = train(
                done,
                cut_to(done, taken, wanted, length),
                objective=CausalLM(length=length),
                steps=arguments.tokens // (length * arguments.rows),
                batch_size=arguments.rows,
                learning_rate=arguments.rate,
                lora={"r": 8, "alpha": 16},
                seed=seed,
            )
            seconds = time.perf_counter() - begun
            done.model.eval()
            after = measured(done, prose, original, judged, length)
            print(f"{name}, seed {seed}, {arm}: {after}", file=sys.stderr)
            yield {
                "sparsity": name,
                "arm": arm,
                "seed": seed,
                "tokens": trained.tokens,
                "choosing, s": choosing,
                "training, s": seconds,
                **{f"{what}, before": value for what, value in before.items()},
                **after,
            }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return medians over seeds, and the recovery per thousand tokens."""
    results = []
    for sparsity in dict.fromkeys(row["sparsity"] for row in rows):
        for arm in ARMS:
            own = [row for row in rows if (row["sparsity"], row["arm"]) == (sparsity, arm)]
            if not own:  # of a run that is not through
                continue
            middle = {
                name: median(row[name] for row in own) for name in own[0] if name not in ("sparsity", "arm", "seed")
            }
            thousands = middle["tokens"] / 1000
            for what in ("answers, nats a token", "prose, nats a token", "agreement"):
                sign = 1 if what == "agreement" else -1
                gain = median(sign * (row[what] - row[f"{what}, before"]) for row in own)
                middle[f"{what.partition(',')[0]}, regained by a thousand tokens"] = gain / thousands
            results.append({"sparsity": sparsity, "arm": arm, **middle})
    return results


def write(out: Path, asked: dict[str, str], rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """Write the results so far as JSON and as a table; return both."""
    medians = summary(rows)
    document = {"medians": medians, "runs": list(rows), "arguments": asked}
    names = list(medians[0])
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join(["---"] * len(names)) + " |"]
    lines += [
        "| " + " | ".join(v if isinstance(v, str) else f"{v:,.4g}" for v in row.values()) + " |" for row in medians
    ]
    table = "\n".join(lines)
    atomic_io.write_json(out / "results.json", document)
    (out / "results.md").write_text(table + "\n", encoding="utf-8")
    return document, table


def main() -> None:
    arguments = _arguments()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    asked = {name: str(value) for name, value in vars(arguments).items() if name not in ("out", "json")}
    there = json.loads((out / "results.json").read_text("utf-8")) if (out / "results.json").is_file() else {}
    rows: list[dict[str, Any]] = there["runs"] if there.get("arguments") == asked else []
    for name in arguments.sparsities.split(","):
        had = {(row["seed"], row["arm"]) for row in rows if row["sparsity"] == name}
        for row in recovered(name, arguments, had):
            rows.append(row)
            write(out, asked, rows)
    document, table = write(out, asked, rows)
    print(json.dumps(document) if arguments.json else table)


if __name__ == "__main__":
    main()
