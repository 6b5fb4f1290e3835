"""Drafters made to be wrong, right or odd on purpose, and tiny targets for them."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from intaglio.speculative import DecodingRun, Session, Step, TokenTree, by_row, chain, root_only
from tests.families import VOCAB, tiny_model

DESIGN_DECODERS = ("llama", "qwen3", "qwen3_window", "mistral", "mistral_window", "gemma3")


@functools.lru_cache
def target(family: str, implementation: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model of a decoder family; Qwen3's has one windowed layer of two, Gemma 3 three of four."""
    more: dict[str, Any] = {}
    if family == "qwen3_window":
        kinds = ["full_attention", "sliding_attention"]
        family, more = "qwen3", {"sliding_window": 8, "use_sliding_window": True, "layer_types": kinds}
    model = tiny_model(family, layers=4 if family == "gemma3" else 2, dtype=dtype, **more)
    model.set_attn_implementation(implementation)
    return model


@functools.lru_cache
def cousin(family: str, noise: float = 0.03, dtype: torch.dtype = torch.float64) -> Any:
    """The target with its weights moved a little: a draft model that is often right and often wrong."""
    model = copy.deepcopy(target(family, dtype=dtype))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return model


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def ragged(lengths: Sequence[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of these lengths, padded in front."""
    most = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), most), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : most - length] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


class _Row:
    def __init__(self, make: Callable[[list[int], int, int], TokenTree], seen: Sequence[int]) -> None:
        self._make = make
        self._ids = list(seen)
        self._start = len(seen)

    def observe(self, step: Step) -> None:
        self._ids += step.tokens

    def propose(self, room: int) -> TokenTree:
        return self._make(self._ids, len(self._ids) - self._start, room)


class Made:
    """A drafter from a function of (row index, tokens so far, new tokens so far, room)."""

    needs_hidden = False

    def __init__(self, make: Callable[[int, list[int], int, int], TokenTree]) -> None:
        self._make = make

    def start(self, run: DecodingRun) -> Session:
        rows = iter(range(len(run.prompts)))

        def begin(seen: Sequence[int]) -> _Row:
            row = next(rows)
            return _Row(lambda ids, new, room: self._make(row, ids, new, room), seen)

        return by_row(run, begin)


def nothing() -> Made:
    return Made(lambda row, ids, new, room: root_only(ids[-1]))


def wrong(answers: Sequence[Sequence[int]], length: int = 5) -> Made:
    """A chain that never holds the right token."""

    def make(row: int, ids: list[int], new: int, room: int) -> TokenTree:
        right = answers[row][new] if new < len(answers[row]) else 0
        return chain(ids[-1], [(right + 1) % VOCAB] * length)

    return Made(make)


def oracle(answers: Sequence[Sequence[int]], length: int = 5) -> Made:
    """A chain that holds the right tokens."""
    return Made(lambda row, ids, new, room: chain(ids[-1], answers[row][new : new + length]))


def mixed(answers: Sequence[Sequence[int]], seed: int, nodes: int = 12, right: float = 0.6) -> Made:
    """Random trees whose tokens are often those that would be right at their depth, so siblings repeat."""
    draws = random.Random(seed)

    def make(row: int, ids: list[int], new: int, room: int) -> TokenTree:
        return random_tree(draws, ids[-1], draws.randint(0, nodes), answers[row][new:], right)

    return Made(make)


def random_tree(
    draws: random.Random, root: int, nodes: int, answer: Sequence[int] = (), right: float = 0.0
) -> TokenTree:
    tokens, parents, depths = [root], [-1], [0]
    for node in range(1, nodes + 1):
        parent = draws.randrange(node)
        depth = depths[parent] + 1
        fits = depth <= len(answer) and draws.random() < right
        tokens.append(answer[depth - 1] if fits else draws.randrange(VOCAB))
        parents.append(parent)
        depths.append(depth)
    return TokenTree(tokens, parents)
