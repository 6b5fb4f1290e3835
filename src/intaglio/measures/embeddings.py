"""Pooled embeddings of an encoder (or of a decoder's last hidden state).

Dimension letters: B batch, L sequence, D width, N texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import final_hidden

Pooling = Literal["mean", "cls", "last"]


def pool(hidden_BLD: Tensor, mask_BL: Tensor | None, how: Pooling = "mean") -> Tensor:
    """Return the pooled embedding of each text, float32 [B, D], not normalised."""
    hidden_BLD = hidden_BLD.float()
    if mask_BL is None:
        mask_BL = torch.ones(hidden_BLD.shape[:2], dtype=torch.bool, device=hidden_BLD.device)
    if how == "mean":
        weight_BL1 = mask_BL[..., None].float()
        return (hidden_BLD * weight_BL1).sum(1) / weight_BL1.sum(1).clamp(min=1)
    position_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    excluded = mask_BL.shape[1] if how == "cls" else -1
    index_BL = torch.where(mask_BL, position_L, excluded)
    index_B = (index_BL.amin(1) if how == "cls" else index_BL.amax(1)).clamp(0, mask_BL.shape[1] - 1)
    return hidden_BLD[torch.arange(len(index_B), device=index_B.device), index_B]


def recorded_pooling(companions: Mapping[str, bytes], name: str) -> Pooling | None:
    """Return the pooling of a checkpoint's sentence-transformers files; None without them.

    Raises:
        IntaglioError: it is another than the three supported.
    """
    for module in json.loads(companions.get("modules.json", b"[]")):
        if str(module.get("type", "")).endswith(".Pooling"):
            config = json.loads(companions.get(f"{module['path']}/config.json", b"{}"))
            known = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}
            used = [how for key, how in known.items() if config.get(f"pooling_mode_{key}")]
            if len(used) != 1:
                raise IntaglioError(f"the pooling of {name!r} is not supported; choose pooling: mean, cls, last")
            return cast(Pooling, used[0])
    return None


@torch.no_grad()
def embeddings(checkpoint: Checkpoint, data: Segments, how: Pooling = "mean", batch_size: int = 8) -> Tensor:
    """Embed every segment; float32 [N, D] on the CPU, not normalised."""
    parts = anatomy(checkpoint.model)
    result = []
    for batch in data.batches(batch_size):
        hidden_BLD = final_hidden(parts, batch)
        mask = batch.get("attention_mask")
        result.append(pool(hidden_BLD, None if mask is None else mask.bool().to(hidden_BLD.device), how).cpu())
    return torch.cat(result)


@torch.no_grad()
def embed_texts(
    checkpoint: Checkpoint,
    texts: Sequence[str],
    how: Pooling | None = "mean",
    *,
    max_length: int = 256,
    batch_size: int = 32,
    progress: Progress = no_progress,
    label: str = "embedding",
) -> Tensor:
    """Embed texts; float32 [N, D] on the CPU, not normalised.

    Args:
        checkpoint: the model with its tokenizer.
        texts: the texts; texts of similar length share a batch.
        how: pooling of the last hidden states; None: `last` for causal models, else `mean`. Default "mean".
        max_length: tokens of a text that are read, at most the model's context. Default 256.
        batch_size: texts of a batch. Default 32.
        progress: called after each batch with `label`.

    Raises:
        IntaglioError: the checkpoint has no tokenizer.
    """
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise IntaglioError(f"the encoder {checkpoint.source!r} has no tokenizer, so it reads no text")
    parts, most = anatomy(checkpoint.model.eval()), min(max_length, checkpoint.context)
    how = how or ("last" if parts.causal else "mean")
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=most, verbose=False)["input_ids"]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    order = sorted(range(len(texts)), key=lambda row: len(ids[row]))
    vectors: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, padding_side="right", return_tensors="pt")
        mask_BL = batch["attention_mask"]
        hidden_BLD = final_hidden(parts, {"input_ids": batch["input_ids"], "attention_mask": mask_BL})
        pooled_BD = pool(hidden_BLD, mask_BL.bool().to(hidden_BLD.device), how).cpu()
        vectors.update(zip(rows, pooled_BD, strict=True))
        progress(min(start + batch_size, len(order)), len(order), label)
    return torch.stack([vectors[row] for row in range(len(texts))])
