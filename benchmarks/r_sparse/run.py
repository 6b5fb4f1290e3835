"""Gathered columns against dense products and the memory-bandwidth bound, and decoding with SmolLM2, on a CPU.

    python benchmarks/r_sparse/run.py                                # the named shapes, one and two threads
    python benchmarks/r_sparse/run.py --shapes 4096x4096 --left-out 0.5 --threads 1 --seconds 20
    python benchmarks/r_sparse/run.py --decode --tokens 64 --rounds 5

*Products.* A weight in->out and one row of activations, drawn for each call so that other columns are read each time:
`F.linear` in float32 and bfloat16, and the product from the columns whose inputs exceed the threshold that skips a
given share. All alternate over copies of the weight that far exceed the last-level cache. The byte bound is the bytes
of the required columns over the best read bandwidth measured in the same rotation. With one thread, times are the
thread's CPU time, which other processes affect least; otherwise wall time.

*Decoding* (`--decode`). SmolLM2 continues prompts with stock `generate`: the dense and the sparse models in
alternation, in tokens per second after the prompt, and the same in our loop without drafts, whose dense layers use the
products measured to be fastest; with held-out perplexity with all tokens sparse and the share of the projection weights
that these tokens read. CATS cannot skip half of this model's weights, so there are rows at 30 % too.
Wanda's zeros are stored and read; its row shows the quality of a static mask.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch.nn import functional as F

from intaglio import atomic_io
from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.smollm2 import SmolLM2Wikipedia
from intaglio.kernels import gather
from intaglio.measures.input_sparsity import count_inputs, input_sparsity
from intaglio.measures.language_modeling import quality
from intaglio.methods.activations.r_sparse import RSparse, measure_bytes_read
from intaglio.methods.base import Carving
from intaglio.methods.weights.wanda import Wanda
from intaglio.speculative import Speculative
from intaglio.speculative.drafters import Undrafted
from intaglio.speculative.prepacked_linear import MIN_NEW_TOKENS

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from bandwidth import CACHE, Call, in_turns  # noqa: E402
from machine import check_quiet, machine, title  # noqa: E402

SHAPES = ("576x576", "576x1536", "1536x576", "4096x4096", "4096x14336", "14336x4096")
ROWS = 17
"""Rows of activations that calls go through."""

ARMS: dict[str, Carving | None] = {
    "dense": None,
    "R-Sparse 50 %": RSparse(sparsity=0.5),
    "TEAL 50 %, uniform": RSparse.teal(sparsity=0.5),
    "TEAL 50 %, greedy": RSparse.teal(sparsity=0.5, allocation="greedy"),
    "Wanda 50 %": Wanda(sparsity=0.5),
    "R-Sparse 30 %": RSparse(sparsity=0.3),
    "TEAL 30 %, uniform": RSparse.teal(sparsity=0.3),
    "CATS 30 %": RSparse.cats(sparsity=0.3),
}
PROMPT = "The river rises in the hills to the north of the town and"


def variants(inputs: int, outputs: int, shares: list[float]) -> dict[str, tuple[Call, float]]:
    """Return the calls to alternate, each with the bytes of weights that it must read."""
    draws = torch.Generator().manual_seed(0)
    weight_IO = torch.randn(inputs, outputs, generator=draws)
    x_R1I = [torch.randn(1, inputs, generator=draws) for _ in range(ROWS)]
    results: dict[str, tuple[Call, float]] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        weight = weight_IO.to(dtype)
        copies = [weight.clone() for _ in range(max(2, -(-4 * CACHE // weight.nbytes)))]
        rows = [copy.T.contiguous() for copy in copies[:2]] if len(copies) < 3 else [c.T.contiguous() for c in copies]
        xs = [x.to(dtype) for x in x_R1I]

        def dense(i: int, rows: Any = rows, xs: Any = xs) -> Any:
            return F.linear(xs[i % ROWS], rows[i % len(rows)])

        results[f"{name}, dense"] = (dense, float(weight.nbytes))
        for share in shares:
            limit = float(torch.cat(x_R1I).abs().flatten().quantile(share))

            def sparse(i: int, copies: Any = copies, xs: Any = xs, limit: float = limit) -> Any:
                return gather.rows(xs[i % ROWS], copies[i % len(copies)], limit, None, None, None, None)

            results[f"{name}, {share:.0%} left out"] = (sparse, (1 - share) * weight.nbytes)
    return results


def measure(shape: str, shares: list[float], threads: int, seconds: float) -> dict[str, Any]:
    """Alternate all calls for some seconds and return their times."""
    inputs, outputs = map(int, shape.split("x"))
    calls = variants(inputs, outputs, shares)
    times, turn, speed = in_turns({name: call for name, (call, _) in calls.items()}, threads, seconds)
    check_quiet(times["float32, dense"], f"the dense product, {shape}, {threads} threads")
    return {
        "shape": shape, "threads": threads, "turns": turn, "read_gb_s": speed / 1e9,
        "median_us": {name: 1e6 * median(times[name]) for name in calls},
        "least_us": {name: 1e6 * min(times[name]) for name in calls},
        "bound_us": {name: 1e6 * size / speed for name, (_, size) in calls.items()},
    }  # fmt: skip


def decode(arms: str, tokens: int, rounds: int, documents: int, samples: int) -> list[dict[str, Any]]:
    """Return perplexity and speed of the dense model and of the arms that begin so, measured in alternation."""
    bed = SmolLM2Wikipedia(samples=samples, documents_pilot=documents)
    base, calibration, texts = bed.load(), bed.calibration(0).segments, bed.documents("pilot").segments
    models: dict[str, Checkpoint] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, arm in ARMS.items():
        if arm is not None and not name.startswith(arms):
            continue
        checkpoint = Checkpoint(copy.deepcopy(base.model), base.tokenizer, base.source)
        if arm is not None:
            cast(Carving, arm).apply(checkpoint, calibration, batch_size=8)
        with count_inputs(checkpoint.model) as tallies:
            summary = quality(checkpoint, texts, batch_size=8)
        share = measure_bytes_read(checkpoint, {module: tally.left_out for module, tally in tallies.items()}).share
        results[name] = {
            "perplexity": summary.perplexity,
            "read": share,
            "left_out": input_sparsity(tallies),
            "seconds": [],
            "loop_seconds": [],
        }
        models[name] = checkpoint
    ids = base.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    ways: dict[str, dict[str, Any]] = {
        "seconds": {},
        "loop_seconds": {"custom_generate": Speculative(Undrafted())},
    }
    for turn in range(rounds + 1):
        for name, checkpoint in models.items():
            for key, options in ways.items():
                # Both long enough for the loop to choose its products, so that their prompts take the same time.
                begun = _generated(checkpoint, ids, MIN_NEW_TOKENS, **options)
                seconds = _generated(checkpoint, ids, MIN_NEW_TOKENS + tokens, **options) - begun
                if turn:
                    results[name][key].append(seconds)
    check_quiet(results["dense"]["seconds"], "dense decoding")
    dense = median(results["dense"]["seconds"])
    return [
        {
            "arm": name,
            **item,
            "tokens_per_s": tokens / median(item["seconds"]),
            "ratio": dense / median(item["seconds"]),
            "loop_ratio": dense / median(item["loop_seconds"]),
        }
        for name, item in results.items()
    ]


def _generated(checkpoint: Checkpoint, ids: torch.Tensor, tokens: int, **options: Any) -> float:
    """Return the seconds of generating `tokens` tokens, including the prompt."""
    start = time.perf_counter()
    generate = cast(Callable[..., Any], checkpoint.model.generate)
    fixed = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
    generate(ids, attention_mask=torch.ones_like(ids), **fixed, **options)
    return time.perf_counter() - start


def markdown(runs: list[dict[str, Any]], decoded: list[dict[str, Any]]) -> str:
    """Return the results as Markdown tables."""
    lines: list[str] = []
    for threads in dict.fromkeys(run["threads"] for run in runs):
        some = [run for run in runs if run["threads"] == threads]
        speed = median(run["read_gb_s"] for run in some)
        names = [name for name in some[0]["median_us"] if "left out" in name]
        lines += [
            f"Threads: {threads}; memory read at {speed:.0f} GB/s. Times faster than dense (medians), and the share of",
            "the byte bound that the fastest call reaches:",
            "",
            f"| weight | {' | '.join(names)} |",
            "| --- " * (1 + len(names)) + "|",
        ]
        for run in some:
            cells = []
            for name in names:
                dense = run["median_us"][f"{name.partition(',')[0]}, dense"]
                bound = run["bound_us"][name] / run["least_us"][name]
                cells.append(f"{dense / run['median_us'][name]:.1f}, {bound:.0%}")
            lines.append(f"| {run['shape']} | {' | '.join(cells)} |")
        lines.append("")
    if decoded:
        lines += [
            "| SmolLM2 | perplexity, all tokens sparse | weights read | tokens/s | over dense | loop over dense |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {item['arm']} | {item['perplexity']:.1f} | {item['read']:.0%} | {item['tokens_per_s']:.1f} "
            f"| {item['ratio']:.2f} | {item['loop_ratio']:.2f} |"
            for item in decoded
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="inputs x outputs, comma-separated")
    parser.add_argument("--left-out", default="0.5,0.7,0.9", help="shares of the inputs, comma-separated")
    parser.add_argument("--threads", default="1,2", help="comma-separated; decoding takes the last")
    parser.add_argument("--seconds", type=float, default=8.0, help="measuring time of each shape")
    parser.add_argument("--decode", action="store_true", help="SmolLM2 end to end, instead of products")
    parser.add_argument("--arms", default="", help="beginning of the names of the arms that decode; default: all")
    parser.add_argument("--tokens", type=int, default=64, help="of a generation")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per arm")
    parser.add_argument("--documents", type=int, default=11, help="evaluated for perplexity")
    parser.add_argument("--samples", type=int, default=16, help="calibration segments")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="output directory")
    given = parser.parse_args()
    print(title(), flush=True)
    runs: list[dict[str, Any]] = []
    decoded: list[dict[str, Any]] = []
    threads = [int(count) for count in given.threads.split(",")]
    if given.decode:
        torch.set_num_threads(threads[-1])
        decoded = decode(given.arms, given.tokens, given.rounds, given.documents, given.samples)
        print(json.dumps(decoded), flush=True)
    else:
        for count in threads:
            for shape in given.shapes.split(","):
                runs.append(measure(shape, [float(share) for share in given.left_out.split(",")], count, given.seconds))
                print(json.dumps(runs[-1]), flush=True)
    about = {"machine": machine()}
    name = "decode" if given.decode else "results"
    atomic_io.write_text(
        given.out / f"{name}.json", json.dumps({**about, "runs": runs, "decode": decoded}, indent=1) + "\n"
    )
    atomic_io.write_text(given.out / f"{name}.md", markdown(runs, decoded))
    print(markdown(runs, decoded))


if __name__ == "__main__":
    try:
        main()
    except IntaglioError as error:
        sys.exit(f"error: {error}")
