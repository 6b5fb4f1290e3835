"""Contrastive training of dense text encoders: the base `DenseEncoder` and the objective `Contrastive`.

    v = pool(h_1 .. h_L) / |pool(h_1 .. h_L)|        L = sum_m weight_m loss(v[:m] / |v[:m]|)

Dimension letters: B queries, N documents, D dimensions of a vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from intaglio.atomic_io import to_json
from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.measures.embeddings import Pooling, pool
from intaglio.modeling.anatomy import Anatomy
from intaglio.modeling.partial_pass import base_hidden
from intaglio.trainer.encoder_training import SIDES, EncoderObjective, accuracy
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG

SENTENCE_TRANSFORMERS = "sentence_transformers.models"
POOLING_MODES = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
"""Names in the files of sentence-transformers."""


class DenseEncoder(EncoderObjective):
    """Base of dense encoders: vectors of unit length, scores in both directions, Matryoshka sizes.

    Args:
        normalize: whether vectors have unit length. Default True.
        symmetric: whether info_nce also ranks the queries of each positive. Default False.
        matryoshka: sizes m of prefixes that are trained as vectors of their own. Default: the whole vector alone.
        matryoshka_weights: weight of each size in the loss. Default: 1 each.
    """

    normalize: bool = True
    symmetric: bool = False
    matryoshka: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None
    matryoshka_weights: list[Annotated[float, Field(ge=0)]] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        sizes, weights = self.matryoshka, self.matryoshka_weights
        if weights is not None and len(weights) != len(sizes or ()):
            raise ValueError(f"matryoshka_weights has {len(weights)} numbers for {len(sizes or ())} sizes")
        if self.symmetric and self.loss_type == "margin_mse":
            raise ValueError("symmetric belongs to info_nce; leave it out with margin_mse")
        return self

    def vector_size(self, hidden_size: int) -> int:
        """Return the dimensions of a vector; by default those of a hidden state."""
        return hidden_size

    def dimensions(self, checkpoint: Checkpoint) -> int:
        """Return `vector_size` for a checkpoint."""
        return self.vector_size(int(checkpoint.config.hidden_size))

    def check_parts(self, parts: Anatomy) -> None:
        """Refuse sizes beyond that of a vector."""
        width = self.vector_size(int(parts.config.hidden_size))
        beyond = [size for size in self.matryoshka or () if size > width]
        if beyond:
            raise IntaglioError(f"matryoshka has the size {beyond[0]}; the model's vectors have {width} dimensions")

    def _unit(self, vectors_ND: Tensor) -> Tensor:
        return F.normalize(vectors_ND, dim=-1) if self.normalize else vectors_ND

    def compare(self, query_BD: Tensor, document_ND: Tensor, batch: Batch) -> Loss:
        """Return the loss, summed over the Matryoshka sizes."""
        sizes = self.matryoshka or [query_BD.shape[1]]
        total, parts = query_BD.new_zeros(()), {}
        for size, weight in zip(sizes, self.matryoshka_weights or [1.0] * len(sizes), strict=True):
            scores_BN = self._unit(query_BD[:, :size]) @ self._unit(document_ND[:, :size]).T
            total = total + weight * self.ranking_loss(scores_BN, batch, symmetric=self.symmetric)
            parts[f"accuracy_{size}" if self.matryoshka else "accuracy"] = accuracy(scores_BN)
        return Loss(total, parts)


class Contrastive(DenseEncoder, slug="contrastive"):
    """Contrastive training of a dense text encoder, on pairs or triplets.

    In a recipe: `train: {objective: {contrastive: {}}, pairs: pairs.jsonl, evaluate: 0.1, steps: 500}`. The result
    loads in sentence-transformers, unless it reads texts twice.

    Sources: van den Oord et al., 2018 (InfoNCE); Gao et al., 2021, arXiv 2101.06983 (gradient caching); Hofstätter et
    al., 2020, arXiv 2010.02666 (margin MSE); Kusupati et al., NeurIPS 2022 (Matryoshka).

    Args:
        pooling: `mean`, `cls` or `last`, over the pooled tokens. Default: `last` for a causal decoder that reads a text
            as it is, else `mean`.
    """

    kinds = ("objective", "encoder")
    summary = "trains a dense text encoder on pairs, against the other documents of the batch"

    pooling: Pooling | None = None

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Tokenise the pairs; the checkpoint becomes a sentence-transformers model."""
        rows = super().prepare(checkpoint, examples, rng)
        if rng.training and self.variant != "echo":
            checkpoint.companions |= self._companions(checkpoint)
        return rows

    @property
    def _how(self) -> Pooling:
        last = self._parts.causal and self.variant == "plain"
        return self.pooling or ("last" if last else "mean")

    def _companions(self, checkpoint: Checkpoint) -> dict[str, bytes]:
        """Return the files by which sentence-transformers loads the encoder."""
        kinds = ["Transformer", "Pooling", *(["Normalize"] if self.normalize else [])]
        paths = ["" if kind == "Transformer" else f"{number}_{kind}" for number, kind in enumerate(kinds)]
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": f"{SENTENCE_TRANSFORMERS}.{kind}"}
            for number, (kind, path) in enumerate(zip(kinds, paths, strict=True))
        ]
        pooling: dict[str, Any] = {"word_embedding_dimension": self.dimensions(checkpoint)}
        pooling |= {f"pooling_mode_{mode}": how == self._how for how, mode in POOLING_MODES.items()}
        prompts = {"query": self.query_prompt, "document": self.document_prompt}
        settings = {"prompts": prompts, "similarity_fn_name": "cosine" if self.normalize else "dot"}
        files = {
            "modules.json": modules,
            "sentence_bert_config.json": {"max_seq_length": max(map(self.length, SIDES))},
            "config_sentence_transformers.json": settings,
            f"{paths[1]}/config.json": pooling,
        }
        return {name: to_json(content).encode() for name, content in files.items()}

    def embed(self, model: nn.Module, inputs: Mapping[str, Tensor], side: str) -> Tensor:
        """Return the pooled hidden states, float32 [N, D]."""
        hidden_NLD = base_hidden(self._parts, {name: inputs[name] for name in ("input_ids", "attention_mask")})
        return self._unit(pool(hidden_NLD, inputs["pool_mask"], self._how))
