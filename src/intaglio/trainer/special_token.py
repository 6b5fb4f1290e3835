"""Special tokens: find tokens that stand for no text by name or id, or add them with rows of their own.

Dimension letters: V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.trainer.rng import generator


def reserve_token(
    checkpoint: Checkpoint,
    token: str | int | None,
    *,
    name: str,
    field: str,
    grow: bool,
    seed: int,
    role: str | None = None,
) -> int:
    """Return the id of a special token, adding it if necessary, and ban it from generation.

    A new input row is drawn from a normal distribution with the mean and deviation of the other rows: a row of zeros,
    or far from the others, learns slowly. Input and output stay tied if they were; an untied output row is the mean.

    Args:
        checkpoint: its tokenizer and model may grow by one.
        token: name or id; None for the tokenizer's own token of that role, or else `name`.
        name: name of the token where none is given.
        field: the user's name of the setting, for error messages.
        grow: whether a missing token may be added to the vocabulary.
        seed: seed of the new row.
        role: its role in tokenizers, such as `mask_token`, which an added token gets. Default: none.

    Raises:
        IntaglioError: it is missing and may not be added, its id is outside the vocabulary, or it begins or ends texts.
    """
    model: Any = checkpoint.model
    tokenizer = checkpoint.tokenizer
    rows = int(model.get_input_embeddings().weight.shape[0])
    if isinstance(token, int):
        if not 0 <= token < rows:
            raise IntaglioError(f"{field} is {token}; the model has ids from 0 to {rows - 1}")
        index = token
    elif tokenizer is None:
        raise IntaglioError(f"the checkpoint has no tokenizer; name a token that stands for no text by id: {field}: ID")
    else:
        wanted = token or (role and getattr(tokenizer, role)) or name
        known = tokenizer.get_vocab().get(wanted)
        if known is None and not grow:
            raise IntaglioError(f"the vocabulary has no token {wanted!r} and may not grow; name one of its own")
        index = _add(checkpoint, [wanted], seed, role)[0] if known is None else int(known)
    for end in ("eos_token_id", "bos_token_id"):
        if tokenizer is not None and index == getattr(tokenizer, end, None):
            raise IntaglioError(f"{field} is {index}, which begins or ends texts; name a token that stands for no text")
    return _ban(model, index)


def reserve_mask_token(checkpoint: Checkpoint, token: str | int | None, *, grow: bool, seed: int) -> int:
    """Return the id of the mask token: as given, the tokenizer's, or a new `<|mask|>`; see `reserve_token`."""
    return reserve_token(
        checkpoint, token, name="<|mask|>", field="mask_token", grow=grow, seed=seed, role="mask_token"
    )


def reserve_tokens(checkpoint: Checkpoint, names: Sequence[str], *, grow: bool, seed: int) -> list[int]:
    """Return the ids of several special tokens, adding the missing ones at once; see `reserve_token`.

    Raises:
        IntaglioError: there is no tokenizer, or tokens are missing and may not be added.
    """
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise IntaglioError(f"the checkpoint has no tokenizer, which the special tokens such as {names[0]!r} need")
    known = tokenizer.get_vocab()
    missing = [name for name in names if name not in known]
    if missing and not grow:
        raise IntaglioError(
            f"the vocabulary lacks {len(missing)} of {len(names)} special tokens, {missing[0]!r} first, and may not"
            " grow; take a tokenizer that has them, or set grow: true"
        )
    ids = {name: int(known[name]) for name in names if name in known}
    ids |= dict(zip(missing, _add(checkpoint, missing, seed), strict=True))
    return [_ban(checkpoint.model, ids[name]) for name in names]


def _add(checkpoint: Checkpoint, names: Sequence[str], seed: int, role: str | None = None) -> list[int]:
    tokenizer: Any = checkpoint.tokenizer
    model: Any = checkpoint.model
    rows = int(model.get_input_embeddings().weight.shape[0])
    new = [AddedToken(name, special=True, normalized=False) for name in names]
    if role is None:
        tokenizer.add_tokens(new, special_tokens=True)
    else:
        tokenizer.add_special_tokens({role: new[0]})
    added = [int(tokenizer.convert_tokens_to_ids(name)) for name in names]
    if max(added, default=0) >= rows:
        model.resize_token_embeddings(max(added) + 1, mean_resizing=False)
    known = min([rows, *added])
    embedding: Tensor = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    with torch.no_grad():
        others_VD = embedding[:known].float()
        mean_D, deviation_D = others_VD.mean(0), others_VD.std(0)
        for name, index in zip(names, added, strict=True):
            noise_D = torch.randn(embedding.shape[1], generator=generator(seed, name)).to(embedding)
            if head is not None and head.weight is not embedding:
                head.weight[index] = head.weight[:known].float().mean(0)
            embedding[index] = mean_D + deviation_D * noise_D
    return added


def _ban(model: Any, token: int) -> int:
    """Suppress the token in generation: it is no target, so only the softmax trains its logit."""
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        settings.suppress_tokens = sorted({*(settings.suppress_tokens or ()), token})
    return token
