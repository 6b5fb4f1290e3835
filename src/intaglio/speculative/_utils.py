"""Checks and model limits shared by the loop and the drafters."""

from __future__ import annotations

from typing import Any

from intaglio.errors import IntaglioError


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise an `IntaglioError` that names the setting unless it is at least `least`."""
    if value < least:
        raise IntaglioError(f"{name} is {value}; it must be at least {least}")


def vocabulary_size(model: Any) -> int:
    """Return the number of token ids that a model embeds."""
    return int(model.get_input_embeddings().num_embeddings)


def context_length(model: Any) -> int | None:
    """Return the most tokens that a model reads; None where its configuration sets no limit."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if length is None else int(length)
