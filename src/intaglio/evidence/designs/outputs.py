"""Generators of several outputs for `designs.generate.Generate`: functions `(model, prompt, seed, **settings)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from intaglio.checkpoint import Checkpoint
from intaglio.methods.decoding.diverse_beam_search import DiverseBeamSearch

COUNT = 6
"""Outputs of a prompt, and beams in all."""
NEW = 16
"""Most new tokens."""


def beam_search(
    model: Checkpoint, prompt: Sequence[int], seed: int, length_penalty: float = 1.0, early_stopping: bool = False
) -> list[list[int]]:
    """Return the hypotheses of stock beam search."""
    return _generate(model, prompt, seed, num_beams=COUNT, length_penalty=length_penalty, early_stopping=early_stopping)


def diverse_beams(
    model: Checkpoint, prompt: Sequence[int], seed: int, groups: int = COUNT, penalty: float = 0.5, **fields: Any
) -> list[list[int]]:
    """Return the hypotheses of diverse beam search."""
    method = DiverseBeamSearch(num_beam_groups=groups, diversity_penalty=penalty, **fields)
    return _generate(model, prompt, seed, num_beams=COUNT, custom_generate=method)


def samples(model: Checkpoint, prompt: Sequence[int], seed: int) -> list[list[int]]:
    """Return independent samples at temperature 1."""
    return _generate(model, prompt, seed, do_sample=True, top_k=0)


def written(
    model: Checkpoint, prompt: Sequence[int], seed: int, write: Callable[[Sequence[int]], list[list[int]]]
) -> list[list[int]]:
    """Return outputs that a function writes from the prompt, as an oracle does."""
    return write(prompt)


def _generate(model: Checkpoint, prompt: Sequence[int], seed: int, **options: Any) -> list[list[int]]:
    generate: Any = model.model.generate
    stop = model.tokenizer.eos_token_id
    ids = torch.tensor([list(prompt)], device=model.device)
    given = {"max_new_tokens": NEW, "num_return_sequences": COUNT, "do_sample": False, "pad_token_id": stop}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = generate(ids, attention_mask=torch.ones_like(ids), **{**given, "eos_token_id": stop, **options})
    new = rows[:, ids.shape[1] :].tolist()
    return [row[: row.index(stop) + 1] if stop in row else row for row in new]
