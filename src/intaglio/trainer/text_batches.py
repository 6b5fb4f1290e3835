"""Batches of texts as encoders read them: token ids, their padding, and the tokens that are pooled.

Dimension letters: N texts, L tokens of a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Read(NamedTuple):
    """Token ids of a text as the model reads them, and the first and the end of those that are pooled.

    `further` has the token ids that other modules read, by name.
    """

    ids: list[int]
    start: int
    stop: int
    further: tuple[tuple[str, list[int]], ...] = ()


def side(batch: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Return the inputs of one side of a batch: `input_ids`, `attention_mask` and `pool_mask`, each [N, L]."""
    return {key.removeprefix(f"{name}_"): value for key, value in batch.items() if key.startswith(f"{name}_")}


def text_batch(texts: Sequence[Read]) -> dict[str, Tensor]:
    """Return texts padded on the right: `input_ids`, `attention_mask` (int64) and `pool_mask` (bool), each [N, L].

    Further ids become `NAME_input_ids` and `NAME_attention_mask`.
    """
    batch = _padded([text.ids for text in texts])
    place_L = torch.arange(batch["input_ids"].shape[1])
    start_N1, stop_N1 = (torch.tensor(values)[:, None] for values in zip(*(text[1:3] for text in texts), strict=True))
    batch["pool_mask"] = (place_L >= start_N1) & (place_L < stop_N1)
    for number, (name, _) in enumerate(texts[0].further):
        batch |= {f"{name}_{key}": ids for key, ids in _padded([text.further[number][1] for text in texts]).items()}
    return batch


def _padded(rows: Sequence[list[int]]) -> dict[str, Tensor]:
    ids_NL = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True)
    length_N1 = torch.tensor([len(ids) for ids in rows])[:, None]
    return {"input_ids": ids_NL, "attention_mask": (torch.arange(ids_NL.shape[1]) < length_N1).to(torch.int64)}


def chunks_of(inputs: Mapping[str, Tensor], size: int | None) -> Iterator[dict[str, Tensor]]:
    """Yield the inputs of `size` texts at a time (None: all), without columns that are padding in all of them."""
    rows = len(inputs["input_ids"])
    for start in range(0, rows, size or rows):
        chunk = {name: value[start : start + (size or rows)] for name, value in inputs.items()}
        longest = {
            name.removesuffix("attention_mask"): int(mask_NL.sum(1).max())
            for name, mask_NL in chunk.items()
            if name.endswith("attention_mask")
        }
        yield {
            name: value[:, : longest[max((prefix for prefix in longest if name.startswith(prefix)), key=len)]]
            for name, value in chunk.items()
        }


def plain_tokens(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text without special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and after a text."""
    inner, whole = plain_tokens(tokenizer, "a"), list(tokenizer("a", verbose=False)["input_ids"])
    begin = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    return whole[:begin], whole[begin + len(inner) :]
