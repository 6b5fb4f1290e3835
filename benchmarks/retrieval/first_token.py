"""Time to first token with compressed passages, in a fresh process: prints a table as JSON.

    python benchmarks/retrieval/first_token.py --context 512 1024 2048 --runs 5

SmolLM2 reads contexts of Wikipedia as tokens, and as one embedding per chunk of 16 with an untrained Refrag: untrained,
speed only. `cached` looks the embeddings up; `encoded` computes them first. Alternated, medians.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch

from intaglio.checkpoint import load
from intaglio.data.texts import load_texts
from intaglio.methods.retrieval.refrag import Refrag, generate_answer
from intaglio.methods.retrieval.refrag.passages import token_prompt
from intaglio.methods.retrieval.refrag.training_rows import question_parts, text_ids

QUESTION = "Which of these events came first?"
PASSAGE = 256
"""Tokens of a passage."""


def first_token(context: int, runs: int, chunk_size: int, model: str) -> dict[str, float]:
    """Return seconds to the first token and positions for a context of so many tokens."""
    checkpoint = load(model)
    method = Refrag(chunk_size=chunk_size, expand=0.0).untrained(checkpoint)
    text = "\n".join(load_texts("wikipedia").documents[:40])
    ids = text_ids(checkpoint, text[: 12 * context])[:context]
    if len(ids) < context:
        raise SystemExit(f"the texts have {len(ids)} tokens; {context} are needed")
    passages, question = list(ids.split(PASSAGE)), question_parts(checkpoint, QUESTION, method.order)
    cache = method.compress(checkpoint, passages)
    sides: dict[str, Callable[[], int]] = {
        "plain": lambda: len(generate_answer(checkpoint, token_prompt(question[0], passages, question[1]), 1)),
        "cached": lambda: len(generate_answer(checkpoint, method.prompt(checkpoint, question, cache), 1)),
        "encoded": lambda: len(
            generate_answer(checkpoint, method.prompt(checkpoint, question, method.compress(checkpoint, passages)), 1)
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(runs + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: median(values) for name, values in seconds.items()}
    return {
        "context": context,
        "positions": len(method.prompt(checkpoint, question, cache)),
        **medians,
        "cached_ratio": medians["plain"] / medians["cached"],
        "encoded_ratio": medians["plain"] / medians["encoded"],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--chunk-size", type=int, default=16)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(json.dumps([first_token(context, given.runs, given.chunk_size, given.model) for context in given.context]))


if __name__ == "__main__":
    main()
