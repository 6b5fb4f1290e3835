"""Diverse beam search against stock beam search of equal width, with SmolLM2 on a CPU.

    python benchmarks/control/beams.py                                  # six beams; one, three and six groups
    python benchmarks/control/beams.py --beams 6 --tokens 32 --rounds 3

Each round runs every arm on the same prompts in alternation, after one round that is not counted. Reported are the
median of the seconds a token of each arm and its ratio to stock `generate(num_beams=...)`, the ratio taken in each
round. All arms run the same number of passes over as many beams; end-of-text is not accepted before the last token.
With one thread, seconds are CPU time. `out/beams.json` is written after each round.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from intaglio import atomic_io
from intaglio.evidence.testbeds.prompts import Prompts
from intaglio.methods.decoding.diverse_beam_search import DiverseBeamSearch


def arms(beams: int) -> dict[str, Any]:
    """Return the decoder of each arm; None is stock beam search."""
    groups = [count for count in (1, 2, 3, beams) if beams % count == 0]
    hamming = {f"diverse, {count} groups": DiverseBeamSearch(num_beam_groups=count) for count in groups}
    kinds: list[Any] = ["cumulative", "ngram", "embedding"]
    others = {f"{kind}, {beams} groups": DiverseBeamSearch(dissimilarity=kind) for kind in kinds}
    return {"stock": None, **hamming, **others}


def measure(beams: int, tokens: int, rounds: int, prompts: int, threads: int) -> dict[str, Any]:
    """Return the seconds a token of each arm in each round."""
    torch.set_num_threads(threads)
    bed = Prompts(kinds=("article",), each=1)
    checkpoint = bed.load()
    model: Any = checkpoint.model
    ids = [torch.tensor([bed.source("train", index)[0].ids]) for index in range(prompts)]
    options = {"num_beams": beams, "num_return_sequences": beams, "do_sample": False, "pad_token_id": 0}
    limits = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    seconds: dict[str, list[float]] = {name: [] for name in arms(beams)}
    clock = time.process_time if threads == 1 else time.perf_counter
    result: dict[str, Any] = {
        "beams": beams,
        "tokens": tokens,
        "prompts": prompts,
        "threads": threads,
        "seconds": seconds,
    }
    for number in range(rounds + 1):
        for name, decoder in arms(beams).items():
            start = clock()
            for row in ids:
                given = {**options, **limits, "attention_mask": torch.ones_like(row)}
                model.generate(row, **given, custom_generate=decoder)
            if number:
                seconds[name].append((clock() - start) / (tokens * prompts))
        if number:
            atomic_io.write_text(Path(__file__).parent / "out" / "beams.json", json.dumps(result, indent=1))
    return result


def table(result: dict[str, Any]) -> str:
    """Return the medians and ratios as a table."""
    stock = result["seconds"]["stock"]
    size = f"{result['prompts']} prompts of {result['tokens']} new tokens, {result['threads']} threads"
    lines = [f"{result['beams']} beams, {size}", "", "| arm | ms a token | against stock |", "| --- | --- | --- |"]
    for name, seconds in result["seconds"].items():
        ratio = median(own / base for own, base in zip(seconds, stock, strict=True))
        lines.append(f"| {name} | {1000 * median(seconds):.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("beams", 6), ("tokens", 32), ("rounds", 3), ("prompts", 2), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    print(table(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
