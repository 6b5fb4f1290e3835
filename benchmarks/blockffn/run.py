"""Expert layers against the dense product and the memory-bandwidth bound, and decoding with them, on a CPU.

    python benchmarks/blockffn/run.py                                  # the named shapes, one token and eight
    python benchmarks/blockffn/run.py --shapes 768x48x64 --dtypes float32 --seconds 2 --decode 0

An expert layer processes one token, or a chunk of eight whose experts form a union of a given size. Alternated are the
layer's product (`experts.apply`), the same in plain torch (copying the rows of the union), and the full product with
zero scores, the cost of a dense MLP of that width. The copies of the weights exceed the last-level cache, so each call
reads from memory. The byte bound is the bytes of the union over torch's read bandwidth, measured in the same rotation.

Then a small model with random weights, whose routers activate a given share of the experts, generates tokens plainly
and with prompt lookup through the verify loop: the time with kernels against that with the dense product.

With one thread, times are the thread's CPU time, which other processes affect least; otherwise wall time. Reported are
the minimum over calls and ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numba
import torch

import intaglio
from intaglio import atomic_io
from intaglio.kernels import sparse_experts
from intaglio.methods.activations.blockffn import BlockFFN
from intaglio.speculative import Speculative
from intaglio.speculative.drafters.prompt_lookup import PromptLookup

HERE = Path(__file__).resolve().parent
SHAPES = ("768x48x64", "1280x40x128", "4096x64x256")
CACHE = 96 << 20
"""Bytes of all copies of a layer together, at the least; the last cache has 32 MiB."""
READ = 64 << 20
"""Bytes of one turn of the reader."""
ALONE, UNION = 0.2, 0.3
"""Shares of the experts that one token takes, and that eight take together."""

Call = Callable[[int], Any]


def taken(tokens: int, count: int, draws: torch.Generator) -> torch.Tensor:
    """Return scores [tokens, count]: one token uses a fifth of the experts, each of a chunk two fifths of the union."""
    score = torch.zeros(tokens, count)
    union = max(1, round((ALONE if tokens == 1 else UNION) * count))
    each = union if tokens == 1 else max(1, round(0.4 * union))
    for token in range(tokens):
        # Shifted along, so that together they take all of the union and none beside it.
        places = (torch.arange(each) + token * union // tokens) % union
        score[token, places] = torch.rand(each, generator=draws) + 0.1
    return score


def layer(shape: str, tokens: int, dtype: torch.dtype) -> tuple[dict[str, Call], int]:
    """Return the calls to alternate for `shape` (width x experts x inner width), and the bytes of the union."""
    width, count, inner = map(int, shape.split("x"))
    draws = torch.Generator().manual_seed(0)
    score = taken(tokens, count, draws)
    x = torch.randn(tokens, width, generator=draws).to(dtype)
    weights = (0.02 * torch.randn(2, count * inner, width, generator=draws)).to(dtype)
    copies = [weights.clone() for _ in range(-(-CACHE // weights.nbytes))]

    def over(call: Callable[..., Any]) -> Call:
        return lambda i: call(x, *copies[i % len(copies)], score)

    results = {
        "experts": over(sparse_experts.apply),
        "torch": over(sparse_experts.gathered),
        "dense": over(sparse_experts.masked),
    }
    return results, weights.nbytes * int((score != 0).any(0).sum()) // count


def turns(calls: dict[str, Call], threads: int, seconds: float) -> dict[str, list[float]]:
    """Return the seconds of every call, alternated for at least `seconds` and five rounds."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    began, turn = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or turn < 5:
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            calls[name](turn)
            times[name].append(clock() - start)
        turn += 1
    return times


def measure(shape: str, tokens: int, dtype: torch.dtype, threads: int, seconds: float) -> dict[str, Any]:
    """Measure one shape (width x experts x inner width of an expert)."""
    calls, size = layer(shape, tokens, dtype)
    words = torch.ones(READ // 4)
    with torch.no_grad():
        times = turns({**calls, "read": lambda i: words.sum()}, threads, seconds)
    least = {name: min(taken) for name, taken in times.items()}
    middle = {name: median(taken) for name, taken in times.items()}
    speed = READ / least["read"]
    return {
        "shape": shape, "tokens": tokens, "dtype": str(dtype).removeprefix("torch."), "threads": threads,
        "turns": len(times["dense"]), "read_gb_s": speed / 1e9, "bound_us": 1e6 * size / speed,
        "least_us": {name: 1e6 * least[name] for name in calls},
        "median_us": {name: 1e6 * middle[name] for name in calls},
        "dense_over_experts": middle["dense"] / middle["experts"],
        "share_of_bound": size / speed / least["experts"],
    }  # fmt: skip


def model(width: int, depth: int, share: float) -> Any:
    """Return a model with random experts, with routers shifted so that about this share of them is active."""
    checkpoint = intaglio.new("llama", width=width, depth=depth, context=512)
    layers = BlockFFN(experts=48, router_std=0.02).replace(checkpoint.model)
    ids = torch.randint(0, 256, (1, 256), generator=torch.Generator().manual_seed(0))
    for item in layers.values():
        with torch.no_grad():
            seen: list[torch.Tensor] = []
            handle = item.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
            checkpoint.model(ids)
            handle.remove()
            # A direction that all inputs share bends every output down until the share is left.
            mean = seen[0].flatten(0, 1).mean(0)
            raw = seen[0].flatten(0, 1) @ item.router.T
            item.router -= raw.quantile(1 - share) * mean / mean.square().sum()
    return checkpoint.model


def decoding(width: int, depth: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Measure decoding and drafting with the kernels and with the dense product, alternated."""
    llm, times = model(width, depth, ALONE), dict[str, list[float]]()
    ids = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(1)).repeat(1, 4)
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    most, outputs = sparse_experts.MOST_ROWS, {}
    for repeat in range(repeats + 1):  # the first warms up
        for way, rows in (("kernels", most), ("dense", 0)):
            for kind in ("decode", "drafting"):
                sparse_experts.MOST_ROWS = rows
                more = {} if kind == "decode" else {"custom_generate": Speculative(PromptLookup())}
                start = time.perf_counter()
                outputs[kind, way] = llm.generate(ids, **options, **more)
                if repeat:
                    times.setdefault(f"{kind}, {way}", []).append(time.perf_counter() - start)
    sparse_experts.MOST_ROWS = most
    middle = {name: median(taken) for name, taken in times.items()}
    return {
        "width": width, "depth": depth, "tokens": tokens, "repeats": repeats, "seconds": middle,
        "same_tokens": {
            kind: bool(torch.equal(outputs[kind, "kernels"], outputs[kind, "dense"])) for kind in ("decode", "drafting")
        },
        "dense_over_experts": {
            kind: middle[f"{kind}, dense"] / middle[f"{kind}, kernels"] for kind in ("decode", "drafting")
        },
    }  # fmt: skip


def markdown(runs: list[dict[str, Any]], decoded: dict[str, Any] | None) -> str:
    """Return the results as Markdown tables."""
    lines = [
        "| width x experts x inner | tokens | dtype | threads | experts µs | of the byte bound | dense over it |"
        " torch over it |",
        "| --- " * 8 + "|",
    ]
    for run in runs:
        copied = run["median_us"]["torch"] / run["median_us"]["experts"]
        lines.append(
            f"| {run['shape']} | {run['tokens']} | {run['dtype']} | {run['threads']} | "
            f"{run['least_us']['experts']:.0f} | {100 * run['share_of_bound']:.0f} % | "
            f"{run['dense_over_experts']:.2f} | {copied:.2f} |"
        )
    if decoded is not None:
        lines += ["", "| | dense over experts |", "| --- | --- |"]
        lines += [f"| {kind} | {ratio:.2f} |" for kind, ratio in decoded["dense_over_experts"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="width x experts x inner, comma-separated")
    parser.add_argument("--tokens", default="1,8", help="in a call, comma-separated")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time of each")
    parser.add_argument("--decode", type=int, default=64, help="tokens to generate; 0 skips decoding")
    parser.add_argument("--width", type=int, default=768, help="of the decoding model")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "out", help="output directory")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    numba.set_num_threads(min(given.threads, numba.config.NUMBA_NUM_THREADS))
    runs = []
    for shape in given.shapes.split(","):
        for dtype in given.dtypes.split(","):
            for tokens in map(int, given.tokens.split(",")):
                runs.append(measure(shape, tokens, getattr(torch, dtype), given.threads, given.seconds))
                print(json.dumps(runs[-1]), flush=True)
    decoded = decoding(given.width, given.depth, given.decode, given.repeats) if given.decode else None
    about = {"torch": torch.__version__, "numba": numba.__version__, "alone": ALONE, "union": UNION}
    given.out.mkdir(parents=True, exist_ok=True)
    atomic_io.write_json(given.out / "results.json", {**about, "runs": runs, "decoding": decoded})
    atomic_io.write_text(given.out / "results.md", markdown(runs, decoded))
    print(markdown(runs, decoded))


if __name__ == "__main__":
    main()
