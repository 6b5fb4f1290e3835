"""The generation demo: SmolLM2 drafted, constrained, sampled with weights, and searched for different outputs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from intaglio import atomic_io
from intaglio.checkpoint import load
from intaglio.cli.demo_output import demo_directory
from intaglio.cli.generate import generate
from intaglio.constraints import JSONSchema, Regex

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"enum": ["London", "Paris", "Rome"]},
        "languages": {
            "type": "array",
            "items": {"enum": ["English", "French", "Italian"]},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["name", "age", "city", "languages"],
    "additionalProperties": False,
}
CODE = "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n    return"
PARTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Drafted by prompt lookup: the model's own greedy text in fewer passes", CODE,
     {"decoder": "prompt_lookup", "max_new_tokens": 64}),
    ("Constrained to a JSON Schema, and drafted", "Describe Ann, a nurse of 34 from Paris, as JSON.",
     {"decoder": "prompt_lookup", "constraint": JSONSchema(SCHEMA), "chat": True, "max_new_tokens": 96}),
    ("Sampled under a constraint, with weights (AWRS)", "Which colour is the sky? Answer in a word.",
     {"decoder": "awrs", "constraint": Regex("(Blue|Grey|Black|Red|Green)"), "chat": True, "samples": 16,
      "max_new_tokens": 16}),
    ("Several different outputs (diverse beam search)", "The best way to learn a language is",
     {"decoder": "diverse_beam_search", "max_new_tokens": 16}),
)  # fmt: skip
"""Title, prompt and options of each part."""


def demo(
    output: str | os.PathLike[str],
    *,
    device: str | None = None,
    seed: int = 0,
    show: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Generate once with every decoder of the demo.

    Args:
        output: directory of `report.json`.
        device: of the model.
        seed: of all draws.
        show: called with each part as soon as it is generated.

    Returns:
        `{parts: [result of generate + title, prompt], seconds}`.
    """
    started = time.time()
    with demo_directory(output) as temporary:
        checkpoint, parts = load("smollm2", device=device), []
        for title, prompt, options in PARTS:
            part = {"title": title, "prompt": prompt, **generate(checkpoint, prompt, seed=seed, **options)}
            parts.append(part)
            show(part)
        document = {"parts": parts, "seconds": time.time() - started}
        (temporary / "report.json").write_text(atomic_io.to_json(document), encoding="utf-8")
    return document
