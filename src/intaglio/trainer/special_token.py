"""Special tokens: find a token that stands for no text by name or id, or add it with a row of its own.

Dimension letters: V vocabulary, D width.
"""

from __future__ import annotations

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
        index = _add(checkpoint, wanted, rows, seed, role) if known is None else int(known)
    for end in ("eos_token_id", "bos_token_id"):
        if tokenizer is not None and index == getattr(tokenizer, end, None):
            raise IntaglioError(f"{field} is {index}, which begins or ends texts; name a token that stands for no text")
    return _ban(model, index)


def _add(checkpoint: Checkpoint, name: str, rows: int, seed: int, role: str | None) -> int:
    tokenizer, model = checkpoint.tokenizer, checkpoint.model
    new = AddedToken(name, special=True, normalized=False)
    if role is None:
        tokenizer.add_tokens([new], special_tokens=True)
    else:
        tokenizer.add_special_tokens({role: new})
    index = int(tokenizer.convert_tokens_to_ids(name))
    if index >= rows:
        model.resize_token_embeddings(index + 1, mean_resizing=False)  # type: ignore[operator]
    known = min(rows, index)
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        noise_D = torch.randn(embedding.shape[1], generator=generator(seed, name)).to(embedding)
        if head is not None and head.weight is not embedding:
            head.weight[index] = head.weight[:known].float().mean(0)
        others_VD = embedding[:known].float()
        embedding[index] = others_VD.mean(0) + others_VD.std(0) * noise_D
    return index


def _ban(model: Any, token: int) -> int:
    """Suppress the token in generation: it is no target, so only the softmax trains its logit."""
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        settings.suppress_tokens = sorted({*(settings.suppress_tokens or ()), token})
    return token
