"""Sparse attention against dense attention with SmolLM2 on a CPU: decoding, prefill, cache bytes, and the byte bound.

    python benchmarks/long_context/run.py                                  # decoding at 2,048, 4,096 and 7,500 tokens
    python benchmarks/long_context/run.py --lengths 7500 --sparsities 0.9 --rounds 3
    python benchmarks/long_context/run.py --prefill --lengths 7500
    python benchmarks/long_context/run.py --prepare                        # only read the prompts, which is not timed

*Decoding.* One dense pass over Wikipedia text gives queries, keys and values; each arm starts from a cache made of
them, and all arms alternate; a ratio is the median over the rounds. Dense attention runs on a preallocated cache, as
sparse attention does, and on stock `DynamicCache`, which copies itself for each token. The byte bound is the ratio of
the bytes that a token must read, the weights once and its keys and values (for Quest the page statistics too), dense
over sparse.

*Prefill* (`--prefill`). One pass without a cache: dense SDPA, block-sparse and vertical-slash.

Compressions free memory; Quest keeps the whole cache and its statistics.

Each length of decoding, and each pattern, length and sparsity of a prompt, is a part with a file of its own in the
output directory; a part with the same settings is not repeated. With one thread CPU time is measured, else wall time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save
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


def prompt_states(model: Any, ids: Any, out: Path) -> PromptStates:
    """Return the states of a prompt, from the output directory if they were kept there."""
    path = out / f"states-{ids.shape[1]}.safetensors"
    names = ("queries", "keys", "values", "scale")
    kept = load_file(path) if path.is_file() else {}
    if not kept or not torch.equal(kept["ids"], ids):
        read = read_prompt(model, ids)
        kept = {"ids": ids}
        for index, layer in enumerate(read.layers):
            kept |= {f"{name}.{index}": torch.as_tensor(x).contiguous() for name, x in zip(names, layer, strict=True)}
        atomic_io.write_bytes(path, save(kept))
    layers = (tuple(kept[f"{name}.{index}"] for name in names) for index in range((len(kept) - 1) // len(names)))
    return PromptStates(tuple((query, key, value, float(scale)) for query, key, value, scale in layers))


def clock() -> float:
    """Return CPU time of one thread, which varies little on a busy machine, or wall time of several."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


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
def decode(length: int, sparsities: list[float], rounds: int, out: Path) -> dict[str, Any]:
    """Alternate the arms and return seconds a token, bytes, and the share of the byte bound."""
    model, ids = prompt(length)
    layers = range(len(anatomy(model).blocks))
    states = prompt_states(model, ids, out)
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
                    begun = clock()
                    model(token, **{CACHE: cache}, use_cache=True)
                    if turn:
                        seconds[name].append(clock() - begun)
            finally:
                if policy is not None:
                    uninstall(model)
    check_quiet(seconds["dense, preallocated"], "dense decoding")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    dense_bytes = weights + read_bytes(arms["dense, preallocated"][1])
    rows = []
    for name, (_, cache) in arms.items():
        bound = dense_bytes / (weights + read_bytes(cache))
        ratio = paired_ratio(seconds["dense, preallocated"], seconds[name], STEPS)
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
    return {"length": length, "rows": rows}


def paired_ratio(dense: list[float], sparse: list[float], turn: int) -> float:
    """Return the median over the rounds of dense over sparse time, each the median of a turn's calls."""
    starts = range(0, len(dense), turn)
    return median(median(dense[i : i + turn]) / median(sparse[i : i + turn]) for i in starts)


@torch.inference_mode()
def prefill(length: int, sparsity: float, rounds: int, name: str) -> dict[str, Any]:
    """Alternate dense attention and a pattern over one prompt; return seconds of a pass and the measured sparsity."""
    model, ids = prompt(length)
    base = anatomy(model).base
    count = max(64, round(length * (1 - sparsity**0.5)))
    patterns = {
        "block_sparse": lambda: BlockSparse.at_sparsity(length, sparsity, BLOCK),
        "vertical_slash": lambda: VerticalSlash(columns=count, offsets=count),
    }
    arms = {"dense": None, f"{name} {sparsity:.0%}": patterns[name]()}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    measured = dict.fromkeys(arms, 0.0)
    for _ in range(rounds):
        for arm, pattern in arms.items():
            begun = clock()
            if pattern is None:
                base(ids, use_cache=False)
            else:
                with SparseFrontier(prefill=pattern).attached(model) as sparse:
                    base(ids, use_cache=False)
                measured[arm] = sparse.meter.prefill_sparsity
            seconds[arm].append(clock() - begun)
    check_quiet(seconds["dense"], "the dense pass")
    rows = [
        {"arm": a, "seconds": median(s), "ratio": paired_ratio(seconds["dense"], s, 1), "sparsity": measured[a]}
        for a, s in seconds.items()
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
    parser.add_argument("--prepare", action="store_true", help="read the prompts for decoding and keep their states")
    parser.add_argument("--patterns", default="block_sparse,vertical_slash", help="of --prefill, comma-separated")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="output directory")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(title(), flush=True)
    lengths = [int(word) for word in given.lengths.split(",")]
    sparsities = [float(word) for word in given.sparsities.split(",")]
    given.out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], dict[str, Any]]] = {}
    for length in lengths:
        if given.prepare:
            prompt_states(*prompt(length), given.out)
        elif not given.prefill:
            parts[f"decode-{length}"] = partial(decode, length, sparsities, given.rounds, given.out)
        else:
            parts |= {
                f"prefill-{length}-{pattern}-{sparsity:g}": partial(prefill, length, sparsity, given.rounds, pattern)
                for pattern in given.patterns.split(",")
                for sparsity in sparsities
            }
    for name, measure in parts.items():
        path = given.out / f"{name}.json"
        settings = {"machine": machine(), "sparsities": sparsities, "rounds": given.rounds}
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if known.get("settings") != settings:
            known = {"settings": settings, "run": measure()}
            atomic_io.write_text(path, json.dumps(known, indent=1) + "\n")
        print(markdown([known["run"]]), flush=True)


if __name__ == "__main__":
    try:
        main()
    except IntaglioError as error:
        sys.exit(f"error: {error}")
