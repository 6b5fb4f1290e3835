"""Sparse attention against dense attention with SmolLM2 on a CPU: decoding, prefill, cache bytes, and the byte bound.

    python benchmarks/long_context/run.py                                  # decoding at 2,048, 4,096 and 7,500 tokens
    python benchmarks/long_context/run.py --lengths 7500 --sparsities 0.9 --rounds 3
    python benchmarks/long_context/run.py --prefill --lengths 7500

*Decoding.* One dense pass over Wikipedia text gives queries, keys and values; each arm starts from a cache made of
them, and all arms alternate. Dense attention runs on a preallocated cache, as sparse attention does, and on stock
`DynamicCache`, which copies itself for each token. The byte bound is the ratio of the bytes that a token must read, the
weights once and its keys and values (for Quest the page statistics too), dense over sparse.

*Prefill* (`--prefill`). One pass without a cache: dense SDPA, block-sparse and vertical-slash.

Compressions free memory; Quest keeps the whole cache and its statistics.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from intaglio import atomic_io
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.smollm2 import SmolLM2Wikipedia
from intaglio.methods.attention.sparse_frontier import SparseFrontier, cache_bytes
from intaglio.methods.attention.sparse_frontier.cache import AdaSnapKV, Quest, SnapKV, SparseLayer
from intaglio.methods.attention.sparse_frontier.installation import install, uninstall
from intaglio.methods.attention.sparse_frontier.prefill import BlockSparse, VerticalSlash
from intaglio.methods.attention.sparse_frontier.prompt_states import PromptStates, read_prompt
from intaglio.modeling.anatomy import CACHE, anatomy
from intaglio.speculative.cache import preallocated_cache

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from machine import check_quiet, machine, title  # noqa: E402

STEPS = 4
"""Tokens of an arm's turn."""
BLOCK = 64
"""Tokens of a block of block-sparse attention."""


def prompt(tokens: int) -> Any:
    """Return the model, and token ids [1, N] of Wikipedia text."""
    bed = SmolLM2Wikipedia(documents_pilot=8, tokens=1024)
    ids = bed.documents("pilot").segments.ids_NT.flatten()[:tokens]
    if len(ids) < tokens:
        raise IntaglioError(f"the texts hold {len(ids)} tokens and {tokens} were requested")
    return bed.load().model, ids[None]


def dense_cache(states: PromptStates, preallocated: bool) -> Any:
    """Return a stock cache that holds the prompt."""
    cache = preallocated_cache() if preallocated else DynamicCache()
    for index, (_, key, value, _) in enumerate(states.layers):
        cache.update(key[None], value[None], index)
    return cache


def policies(length: int, sparsities: list[float]) -> dict[str, Any]:
    """Return the policies by the names of their rows."""
    result: dict[str, Any] = {}
    for sparsity in sparsities:
        budget = round((1 - sparsity) * length)
        result[f"quest {sparsity:.0%}"] = Quest(budget=budget // 16 * 16)
        result[f"snapkv {sparsity:.0%}"] = SnapKV(budget=budget)
        result[f"ada_snapkv {sparsity:.0%}"] = AdaSnapKV(budget=budget)
    return result


def read_bytes(cache: Any) -> int:
    """Return the bytes of keys, values and statistics that a token reads."""
    total = 0
    for layer in cache.layers:
        if not isinstance(layer, SparseLayer):
            total += layer.keys.nbytes + layer.values.nbytes
            continue
        for sequence in layer.sequences:
            row = sum(2 * buffer.keys[0, 0].nbytes * buffer.length * len(buffer.keys) for buffer in sequence.buffers)
            if sequence.selected is not None:
                buffer = sequence.buffers[0]
                rows = sequence.selected.numel() * buffer.unit
                row = 2 * buffer.keys[0, 0].nbytes * rows + sum(e.nbytes for e in sequence.extremes or ())
            total += row
    return total


@torch.inference_mode()
def decode(length: int, sparsities: list[float], rounds: int) -> dict[str, Any]:
    """Alternate the arms and return seconds a token, bytes, and the share of the byte bound."""
    model, ids = prompt(length)
    layers = range(len(anatomy(model).blocks))
    begun = time.perf_counter()
    states = read_prompt(model, ids)
    read = time.perf_counter() - begun
    arms: dict[str, tuple[Any, Any]] = {
        "dense, preallocated": (None, dense_cache(states, True)),
        "dense, DynamicCache": (None, dense_cache(states, False)),
    }
    arms |= {name: (policy, states.cache(policy)) for name, policy in policies(length, sparsities).items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    token = ids[:, -1:]
    for turn in range(rounds + 1):
        for name, (policy, cache) in arms.items():
            if policy is not None:
                install(model, None, policy, [], layers)
            try:
                for _ in range(STEPS):
                    begun = time.perf_counter()
                    model(token, **{CACHE: cache}, use_cache=True)
                    if turn:
                        seconds[name].append(time.perf_counter() - begun)
            finally:
                if policy is not None:
                    uninstall(model)
    check_quiet(seconds["dense, preallocated"], "dense decoding")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    dense_bytes, dense = weights + read_bytes(arms["dense, preallocated"][1]), median(seconds["dense, preallocated"])
    rows = []
    for name, (_, cache) in arms.items():
        bound = dense_bytes / (weights + read_bytes(cache))
        ratio = dense / median(seconds[name])
        rows.append(
            {
                "arm": name,
                "ms": 1e3 * median(seconds[name]),
                "ratio": ratio,
                "bound": bound,
                "share": ratio / bound,
                "cache_bytes": cache_bytes(cache),
            }
        )
    return {"length": length, "prefill_seconds": read, "rows": rows}


@torch.inference_mode()
def prefill(length: int, sparsities: list[float], rounds: int, patterns: list[str]) -> dict[str, Any]:
    """Alternate the arms over one prompt and return the seconds of a pass and the measured sparsity."""
    model, ids = prompt(length)
    base = anatomy(model).base
    arms: dict[str, Any] = {"dense": None}
    for sparsity in sparsities:
        count = max(64, round(length * (1 - sparsity**0.5)))
        made = {
            "block_sparse": BlockSparse.at_sparsity(length, sparsity, BLOCK),
            "vertical_slash": VerticalSlash(columns=count, offsets=count),
        }
        arms |= {f"{name} {sparsity:.0%}": made[name] for name in patterns}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    measured = dict.fromkeys(arms, 0.0)
    for _ in range(rounds):
        for name, pattern in arms.items():
            begun = time.perf_counter()
            if pattern is None:
                base(ids, use_cache=False)
            else:
                with SparseFrontier(prefill=pattern).attached(model) as sparse:
                    base(ids, use_cache=False)
                measured[name] = sparse.meter.prefill_sparsity
            seconds[name].append(time.perf_counter() - begun)
    dense = median(seconds["dense"])
    rows = [
        {"arm": name, "seconds": median(s), "ratio": dense / median(s), "sparsity": measured[name]}
        for name, s in seconds.items()
    ]
    return {"length": length, "rows": rows}


def markdown(runs: list[dict[str, Any]]) -> str:
    """Return the results as Markdown tables."""
    lines: list[str] = []
    for run in runs:
        if "bound" in run["rows"][0]:
            lines += [
                f"{run['length']:,} tokens in the cache:",
                "",
                "| attention | ms a token | over dense | byte bound | share of the bound | cache, MB |",
                "| --- | --- | --- | --- | --- | --- |",
            ]
            lines += [
                f"| {r['arm']} | {r['ms']:.1f} | {r['ratio']:.2f} | {r['bound']:.2f} | {r['share']:.0%} "
                f"| {r['cache_bytes'] / 1e6:.0f} |"
                for r in run["rows"]
            ]
        else:
            lines += [
                f"A prompt of {run['length']:,} tokens:",
                "",
                "| attention | seconds | over dense | measured sparsity |",
                "| --- | --- | --- | --- |",
            ]
            lines += [
                f"| {r['arm']} | {r['seconds']:.1f} | {r['ratio']:.2f} | {r['sparsity']:.1%} |" for r in run["rows"]
            ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,4096,7500", help="tokens, comma-separated")
    parser.add_argument("--sparsities", default="0.5,0.8,0.9", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each arm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", action="store_true", help="the prompt, instead of decoding")
    parser.add_argument("--patterns", default="block_sparse,vertical_slash", help="of --prefill, comma-separated")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="output directory")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(title(), flush=True)
    sparsities = [float(word) for word in given.sparsities.split(",")]
    runs = []
    for length in map(int, given.lengths.split(",")):
        if given.prefill:
            runs.append(prefill(length, sparsities, given.rounds, given.patterns.split(",")))
        else:
            runs.append(decode(length, sparsities, given.rounds))
        print(markdown(runs[-1:]), flush=True)
    name = "prefill" if given.prefill else "decode"
    atomic_io.write_text(given.out / f"{name}.json", json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")
    atomic_io.write_text(given.out / f"{name}.md", markdown(runs))


if __name__ == "__main__":
    try:
        main()
    except IntaglioError as error:
        sys.exit(f"error: {error}")
