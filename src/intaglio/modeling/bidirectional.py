"""Decoders that see later tokens, by `is_causal=False` in their config, which transformers' masks read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import Anatomy


def _configs(parts: Anatomy) -> list[Any]:
    """Return the model's config objects, each once."""
    return list({id(config): config for config in (parts.model.config, parts.base.config, parts.config)}.values())


@contextmanager
def temporary_causality(parts: Anatomy, is_causal: bool) -> Iterator[None]:
    """Set a model's `is_causal` inside the context."""
    configs = _configs(parts)
    before = [getattr(config, "is_causal", None) for config in configs]
    try:
        for config in configs:
            config.is_causal = is_causal
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            if value is None:
                del config.is_causal
            else:
                config.is_causal = value


def make_bidirectional(parts: Anatomy) -> None:
    """Let a decoder see later tokens, wherever its checkpoint is loaded; encoders stay as they are.

    Attention code that ignores the setting would stay causal in silence, so a trial pass checks it.

    Raises:
        IntaglioError: the model still sees earlier tokens alone; its config is unchanged then.
    """
    if not parts.causal:
        return
    with temporary_causality(parts, False):
        if not _sees_later_tokens(parts):
            raise IntaglioError(
                f"the model family {parts.config.model_type!r} ignores is_causal=False, so it cannot be made"
                " bidirectional; variant: plain is accepted"
            )
    for config in _configs(parts):
        config.is_causal = False


@torch.no_grad()
def _sees_later_tokens(parts: Anatomy) -> bool:
    """Return whether another last token changes an earlier state, with and without padding."""
    modes = [(module, module.training) for module in parts.base.modules()]
    parts.base.eval()
    try:
        ids = torch.zeros((2, 4), dtype=torch.long, device=next(parts.base.parameters()).device)
        ids[1, -1] = 1
        masks = (torch.ones_like(ids), torch.tensor([[0, 1, 1, 1]] * 2, device=ids.device))
        states = [parts.base(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state for mask in masks]
    finally:
        for module, mode in modes:
            module.training = mode
    return not any(bool((hidden[0, 1] == hidden[1, 1]).all()) for hidden in states)
