"""Contrastive training of dense text encoders: bases, and the objective `Contrastive`.

    v = pool(h_1 .. h_L) / |pool(h_1 .. h_L)|        L = sum_m weight_m loss(v[:m] / |v[:m]|)

Dimension letters: B queries, N documents, D dimensions of a vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from intaglio.atomic_io import to_json
from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.measures.embeddings import Pooling, pool
from intaglio.modeling.anatomy import Anatomy
from intaglio.modeling.partial_pass import base_hidden
from intaglio.trainer.encoder_training import SIDES, EncoderObjective
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.ranking_losses import accuracy
from intaglio.trainer.rng import KeyedRNG

SENTENCE_TRANSFORMERS = "sentence_transformers.models"
POOLING_MODES = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
"""Names in the files of sentence-transformers."""


class DenseObjective(EncoderObjective):
    """Base of dense encoders with Matryoshka sizes; a subclass may replace `contrast`.

    Args:
        matryoshka: sizes m of prefixes that are trained as vectors of their own. Default: the whole vector alone.
        matryoshka_weights: weight of each size in the loss. Default: 1 each.
        matryoshka_per_step: sizes of a batch, drawn anew for each. Default: all.
    """

    matryoshka: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None
    matryoshka_weights: list[Annotated[float, Field(ge=0)]] | None = None
    matryoshka_per_step: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        sizes, weights, drawn = self.matryoshka or [], self.matryoshka_weights, self.matryoshka_per_step
        if weights is not None and len(weights) != len(sizes):
            raise ValueError(f"matryoshka_weights has {len(weights)} numbers for {len(sizes)} sizes")
        if drawn is not None and drawn > len(sizes):
            raise ValueError(f"matryoshka_per_step is {drawn}, and matryoshka has {len(sizes)} sizes")
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

    @property
    def _unit_length(self) -> bool:
        return True

    def _unit(self, vectors_ND: Tensor) -> Tensor:
        return F.normalize(vectors_ND, dim=-1) if self._unit_length else vectors_ND

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Add `sizes`, the places of the Matryoshka sizes that are drawn for a training batch."""
        batch = super().collate(examples, rng)
        if self.matryoshka_per_step is not None and rng.training:
            order = torch.randperm(len(self.matryoshka or ()), generator=rng(examples[0], "sizes"))
            batch["sizes"] = sorted(order[: self.matryoshka_per_step].tolist())
        return batch

    def compare(self, query_BD: Tensor, document_ND: Tensor, batch: Batch) -> Loss:
        """Return the loss, summed over the Matryoshka sizes."""
        sizes = self.matryoshka or [query_BD.shape[1]]
        weights = self.matryoshka_weights or [1.0] * len(sizes)
        total, parts = query_BD.new_zeros(()), {}
        for place in batch.get("sizes", range(len(sizes))):
            size = sizes[place]
            loss, scores_BN = self.contrast(self._unit(query_BD[:, :size]), self._unit(document_ND[:, :size]), batch)
            total = total + weights[place] * loss
            if "sizes" not in batch:  # else parts would differ from step to step
                parts[f"accuracy_{size}" if self.matryoshka else "accuracy"] = accuracy(scores_BN)
        return Loss(total, parts)

    def contrast(self, query_BD: Tensor, document_ND: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of vectors of one size, and their scores [B, N]."""
        scores_BN = query_BD @ document_ND.T
        return self.ranking_loss(scores_BN, batch), scores_BN


class SymmetricObjective(DenseObjective):
    """Base of dense encoders that may rank in both directions.

    Args:
        normalize: whether vectors have unit length. Default True.
        symmetric: whether info_nce also ranks the queries of each positive. Default False.
    """

    normalize: bool = True
    symmetric: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.symmetric and self.loss_type != "info_nce":
            raise ValueError(f"symmetric belongs to info_nce; leave it out with {self.loss_type}")
        return self

    @property
    def _unit_length(self) -> bool:
        return self.normalize

    def contrast(self, query_BD: Tensor, document_ND: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of vectors of one size, of the queries too if it is symmetric."""
        scores_BN = query_BD @ document_ND.T
        return self.ranking_loss(scores_BN, batch, symmetric=self.symmetric), scores_BN


class PooledObjective(DenseObjective):
    """Base of encoders whose vectors are pooled hidden states.

    The result loads in sentence-transformers, unless it reads texts twice.

    Args:
        pooling: `mean`, `cls` or `last`, over the pooled tokens. Default: `last` for a causal decoder that reads a text
            as it is, else `mean`.
    """

    pooling: Pooling | None = None

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Tokenise the pairs; the checkpoint becomes a sentence-transformers model."""
        rows = super().prepare(checkpoint, examples, rng)
        if rng.training and self.variant != "echo":
            checkpoint.companions |= self._companions(checkpoint)
        return rows

    @property
    def _how(self) -> Pooling:
        return self.pooling or self.default_pooling

    def _companions(self, checkpoint: Checkpoint) -> dict[str, bytes]:
        """Return the files by which sentence-transformers loads the encoder."""
        kinds = ["Transformer", "Pooling", *(["Normalize"] if self._unit_length else [])]
        paths = ["" if kind == "Transformer" else f"{number}_{kind}" for number, kind in enumerate(kinds)]
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": f"{SENTENCE_TRANSFORMERS}.{kind}"}
            for number, (kind, path) in enumerate(zip(kinds, paths, strict=True))
        ]
        pooling: dict[str, Any] = {"word_embedding_dimension": self.dimensions(checkpoint)}
        pooling |= {f"pooling_mode_{mode}": how == self._how for how, mode in POOLING_MODES.items()}
        prompts = {name: self._prompt(name) for name in SIDES}
        settings = {"prompts": prompts, "similarity_fn_name": "cosine" if self._unit_length else "dot"}
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


class Contrastive(PooledObjective, SymmetricObjective, slug="contrastive"):
    """Contrastive training of a dense text encoder, on pairs or triplets.

    In a recipe: `train: {objective: {contrastive: {}}, pairs: pairs.jsonl, evaluate: 0.1, steps: 500}`.

    Sources: van den Oord et al., 2018 (InfoNCE); Gao et al., 2021, arXiv 2101.06983 (gradient caching); Hofstätter et
    al., 2020, arXiv 2010.02666 (margin MSE); Kusupati et al., NeurIPS 2022 (Matryoshka).
    """

    kinds = ("objective", "encoder")
    summary = "trains a dense text encoder on pairs, against the other documents of the batch"
