"""Write matrices, tokenizer and special-token ids into a checkpoint."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn

from intaglio.checkpoint import DTYPES, Checkpoint
from intaglio.checkpoint.resolve import silence_transformers
from intaglio.errors import IntaglioError
from intaglio.methods.registry import vocabulary_config_keys
from intaglio.methods.weights.omp_transplant.donor import Donor
from intaglio.modeling.anatomy import Anatomy, anatomy

_TOKEN_ID_FIELDS = (
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias",
    "forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id",
)  # fmt: skip
"""Settings of a generation config that hold token ids."""


def check_parts(parts: Anatomy) -> None:
    """Refuse a model whose embedding or head cannot be replaced row by row."""
    kind = parts.config.model_type
    weight = getattr(parts.embedding, "weight", None)
    if not isinstance(parts.embedding, nn.Embedding) or weight is None or weight.dtype not in DTYPES.values():
        raise IntaglioError(
            f"the embedding of {kind!r} is not a plain nn.Embedding, so its vocabulary cannot be replaced"
        )
    if getattr(parts.config, "hidden_size_per_layer_input", 0):
        raise IntaglioError(f"{kind!r} has per-layer token embeddings, which no donor has")
    head: Any = parts.head
    if head is None:
        return
    if not isinstance(head, nn.Linear) or head.weight.dtype not in DTYPES.values():
        raise IntaglioError(
            f"the head of {kind!r} is a {type(head).__name__}, not a plain linear layer, so its vocabulary cannot be "
            "replaced"
        )
    if head.weight.shape[0] != weight.shape[0]:
        raise IntaglioError(
            f"the head of {kind!r} has {head.weight.shape[0]:,} rows for {weight.shape[0]:,} embeddings, so it is "
            "fused with something else"
        )


@torch.no_grad()
def swap_vocabulary(
    checkpoint: Checkpoint, tokenizer: Any, donor: Donor, matrices: dict[Any, Tensor], suppressed: list[int]
) -> None:
    """Replace the vocabulary in place.

    `matrices` holds `embedding` [R, E] and, for an untied head, `head` [R, E]; a last column beyond the width is the
    head's bias. `suppressed` ids are never generated.
    """
    model: Any = checkpoint.model
    rows = len(matrices["embedding"])
    if rows != checkpoint.vocabulary:
        with silence_transformers():
            model.resize_token_embeddings(rows, mean_resizing=False)
    parts = anatomy(model)
    embedding: Any = parts.embedding
    head: Any = parts.head
    width = embedding.weight.shape[1]
    embedding.weight.copy_(matrices["embedding"][:, :width])
    if head is not None:
        own_RE = matrices.get("head", matrices["embedding"])
        if not parts.tied:
            head.weight.copy_(own_RE[:, : head.weight.shape[1]])
        if head.bias is not None:
            head.bias.copy_(own_RE[:, -1])
    ids = donor.ids
    for config in {id(c): c for c in (model.config, parts.config)}.values():
        config.vocab_size = rows
        for field, value in ids.items():
            # A config without this field does not get it, unless the donor has the token.
            if value is not None or hasattr(config, field):
                setattr(config, field, value)
        for key in vocabulary_config_keys():
            vars(config).pop(key, None)
    embedding.num_embeddings = rows
    pad = ids["pad_token_id"]
    embedding.padding_idx = pad if embedding.padding_idx is not None and isinstance(pad, int) else None
    _update_generation_config(model, donor, ids, suppressed)
    checkpoint.tokenizer = tokenizer


def _update_generation_config(model: Any, donor: Donor, ids: dict[str, Any], suppressed: list[int]) -> None:
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    for field in _TOKEN_ID_FIELDS:
        if getattr(settings, field, None) is not None:
            setattr(settings, field, None)
    for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
        own = getattr(donor.generation, field, None)
        setattr(settings, field, ids[field] if own is None else own)
    if suppressed:
        settings.suppress_tokens = suppressed


def single_digits(tokenizer: Any) -> Any:
    """Return a copy of a fast tokenizer that splits numbers digit by digit."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise IntaglioError("digits: single needs a fast tokenizer; the donor's tokenizer is a slow one")
    result = copy.deepcopy(tokenizer)
    backend = result.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    own = backend.pre_tokenizer
    # After the donor's own pre-tokenizer, so that its marks of spaces stay.
    backend.pre_tokenizer = digits if own is None else pre_tokenizers.Sequence([own, digits])
    return result
