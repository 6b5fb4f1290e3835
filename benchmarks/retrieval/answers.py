"""A compressor for a small decoder, from its training to the answers of `intaglio ask`.

The language has entries of an address book, "city of name7: city3", four words each. Two copies of a Llama learn to
answer from up to eight entries in as many steps: one reads their tokens, the other one embedding an entry, by the
stages of `refrag`. Names and cities are paired anew in every row, so no answer is known without its context. Questions
are then asked of indexes with other pairs, by `ask` with and without `--compress`. A stopped training resumes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from typer.testing import CliRunner

from intaglio.checkpoint.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new, word_tokenizer
from intaglio.cli.app import app
from intaglio.methods.retrieval.refrag import Refrag
from intaglio.search import Index
from intaglio.trainer import CausalLM, train
from intaglio.trainer.causal_lm import IGNORED

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "Question:", "city", "of")
NAMES, CITIES = tuple(f"name{n}:" for n in range(32)), tuple(f"city{n}" for n in range(16))
SIZE = 4
"""Words of an entry, tokens of a chunk."""
ENTRIES, PASSAGE, ASKED = 8, 2, 8
"""Most entries of a context, entries of a passage, and questions of a training row."""
BATCH = 32
INDEXES = 4
"""Each has every name once."""
STEPS = {"decoder": 600, "reconstruction": 20, "continual": 20, "task": 560}
"""Optimizer steps of the plain decoder, and of the three stages with the compressor: as many in all."""


def decoder() -> Checkpoint:
    """Return an untrained Llama with a tokenizer of the language's words."""
    roles = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=False))
    tokenizer = word_tokenizer((*SPECIAL, *NAMES, *CITIES), **roles)
    tokenizer.chat_template = "<s> {{ messages[0]['content'] }}"
    return new("llama", width=64, depth=2, heads=4, context=128, tokenizer=tokenizer, initializer_range=0.1)


def book(draws: random.Random, count: int) -> list[tuple[str, str]]:
    """Return names, each with a city."""
    return [(name, draws.choice(CITIES)) for name in draws.sample(NAMES, count)]


def entries(pairs: list[tuple[str, str]]) -> str:
    """Return the text of some pairs."""
    return " ".join(f"city of {name} {city}" for name, city in pairs)


def rows(tokenizer: Any, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield contexts of up to `ENTRIES` entries with questions about them, drawn with repetition."""
    draws = random.Random(seed)
    for _ in range(count):
        pairs = book(draws, draws.randint(1, ENTRIES))
        asked = " ".join(f"Question: city of {name} {city} </s>" for name, city in draws.choices(pairs, k=ASKED))
        context, answer = (
            torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (entries(pairs), asked)
        )
        is_answer = torch.arange(len(answer)) % 6 >= SIZE
        labels = torch.where(is_answer, answer, IGNORED)
        yield {"before_ids": torch.tensor([1]), "passage_ids": [context], "answer_ids": answer, "labels": labels}


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of tokens, of which the answers are predicted."""
    context = torch.cat([row["before_ids"], *row["passage_ids"]])
    labels = torch.cat([torch.full_like(context, IGNORED), row["labels"]])
    return {"input_ids": torch.cat([context, row["answer_ids"]]), "labels": labels}


def trained(out: Path, steps: Mapping[str, int]) -> tuple[Path, Path]:
    """Train decoder and compressor unless they are there; return their directories."""
    known, fitted = out / "decoder", out / "fitted"
    if not known.exists():
        made = decoder()
        data = [plain(row) for row in rows(made.tokenizer, steps["decoder"] * BATCH, 0)]
        _train(made, data, CausalLM(pack=False), steps["decoder"], 2e-3, out / "training-decoder")
        made.save(known)
    if not fitted.exists():
        made = decoder()
        for number, stage in enumerate(("reconstruction", "continual", "task"), 1):
            data = list(rows(made.tokenizer, steps[stage] * BATCH, number))
            if stage == "reconstruction":
                data = [{"input_ids": row["passage_ids"][0]} for row in data]
            elif stage == "continual":
                data = [{"input_ids": plain(row)["input_ids"]} for row in data]
            method = Refrag(chunk_size=SIZE, expand=0.0, pooling="mean", order="context_first", stages=[stage],
                            length=SIZE * ENTRIES, target_length=6 * ASKED)  # fmt: skip
            _train(made, data, method, steps[stage], 2e-3, out / f"training-{stage}", freeze=stage == "reconstruction")
        made.save(fitted)
    return known, fitted


def _train(
    checkpoint: Checkpoint, data: list[Any], objective: Any, steps: int, rate: float, directory: Path, **more: Any
) -> None:
    if steps:
        train(checkpoint, data, objective=objective, steps=steps, batch_size=BATCH, learning_rate=rate,
              betas=(0.9, 0.95), directory=directory, **more)  # fmt: skip


def answers(out: Path, steps: Mapping[str, int] = STEPS) -> dict[str, dict[str, float]]:
    """Return the share of right answers, positions, and milliseconds to the first token of each prompt."""
    known, fitted = trained(out, steps)
    ways: dict[str, tuple[Path, list[str]]] = {
        "tokens": (known, []),
        "compressed": (fitted, ["--compress", str(SIZE), "--expand", "0"]),
        "compressed, the nearest quarter as tokens": (
            fitted, ["--compress", str(SIZE), "--expand", "0.25", "--expander", "cosine"]
        ),
        "tokens, the decoder of the compressor": (fitted, []),
    }  # fmt: skip
    replies: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    draws, right = random.Random("indexes"), dict.fromkeys(ways, 0)
    for number in range(INDEXES):
        pairs = book(draws, len(NAMES))
        path = out / f"index-{number}"
        if not path.exists():
            parts = [entries(pairs[low : low + PASSAGE]) for low in range(0, len(pairs), PASSAGE)]
            with Index.create(path, chunk=0) as index:
                index.add({"id": f"page{page}", "text": text} for page, text in enumerate(parts))
        for name, city in pairs:
            for way, (model, options) in ways.items():
                words = ["ask", str(path), f"city of {name}", str(model), "-k", str(ENTRIES // PASSAGE), *options]
                result = CliRunner().invoke(app, [*words, "--max-new-tokens", "4", "--json"])
                if result.exit_code:
                    raise SystemExit(result.stderr)
                replies[way].append(json.loads(result.stdout))
                right[way] += replies[way][-1]["answer"].strip() == city
    return {
        way: {
            "right": right[way] / len(own),
            "positions": median(row["positions"] for row in own),
            "milliseconds": 1000 * median(row["seconds_to_first_token"] for row in own),
        }
        for way, own in replies.items()
    }


def table(results: dict[str, dict[str, float]]) -> list[str]:
    """Return the results as Markdown."""
    names = ("right", "positions", "milliseconds")
    lines = ["", f"| answers about pairs never seen | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for way, row in results.items():
        lines.append(f"| {way} | " + " | ".join(f"{row[name]:.3g}" for name in names) + " |")
    return lines
