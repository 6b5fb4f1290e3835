"""MistralSplade (Doshi et al. 2024): SPLADE from a decoder, which reads each text twice.

The authors published no code; sources differ on R and on the head, so both are options here.

Sources: Doshi et al., Mistral-SPLADE: LLMs for better Learned Sparse Retrieval, 2024, arXiv 2408.11119; Formal et al.,
2021, arXiv 2109.10086 (SPLADE v2); Springer et al., 2024, arXiv 2402.15449 (echo); Xu et al., CSPLADE, 2025, arXiv
2504.10816 (adaptation, bidirectional masks); Zeng et al., 2025 (logit scale).

Dimension letters: B queries, N documents, L tokens of a text, S pooled tokens of all texts, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.data.vocabulary_terms import token_texts, usable_terms
from intaglio.errors import DivergedError, IntaglioError
from intaglio.methods.retrieval.mistral_splade.functional import (
    REGULARIZERS,
    Forms,
    Regularizer,
    merged,
    nonzero_terms,
    pruned,
    quadratic_ramp,
    splade_weights,
    surface_forms,
)
from intaglio.modeling.anatomy import Anatomy
from intaglio.modeling.bidirectional import temporary_causality
from intaglio.modeling.partial_pass import HeadOnly, base_hidden
from intaglio.trainer.causal_lm import IGNORED
from intaglio.trainer.encoder_training import SIDES, EncoderObjective, check_embedding_width, recomputed
from intaglio.trainer.protocols import Batch, Loss
from intaglio.trainer.ranking_losses import accuracy
from intaglio.trainer.text_batches import chunks_of, side


class SpladeHead(nn.Module):
    """Additions of SPLADE to a model: the terms that may be used, the tokens that stand for others, the threshold b.

    Args:
        terms_V: tokens that may be terms, bool.
        standing_V: token that stands for each token, int64.
        threshold: b at the start; None: no threshold.
    """

    terms_V: Tensor
    standing_V: Tensor

    def __init__(self, terms_V: Tensor, standing_V: Tensor, threshold: float | None) -> None:
        super().__init__()
        self.register_buffer("terms_V", terms_V)
        self.register_buffer("standing_V", standing_V)
        self.threshold = None if threshold is None else nn.Parameter(torch.tensor(float(threshold)))


class MistralSplade(EncoderObjective, slug="mistral_splade"):
    """Learned-sparse encoder over the vocabulary, from any language model with a head.

        w_v = max_{t in S} log(1 + relu(s Z_tv - b))       Z = head(F(x)), S: tokens of the second copy
        L   = InfoNCE(<w_q, w_d> / T) + lambda_q(t) R(w_q) + lambda_d(t) R(w_d)
        lambda(t) = lambda min(1, t / T0)^2        R_flops = sum_v (mean_i w_iv)^2        R_l1 = mean_i sum_v w_iv

    In a recipe: `train: {objective: {mistral_splade: {}}, pairs: pairs.jsonl, lora: {r: 16, alpha: 8, dropout: 0.1},
    steps: 500}`, then `intaglio index DOCS -o INDEX --encoder OUT`. Variants `plain` (unidirectional) and
    `bidirectional` are exported by `intaglio export OUT --format sentence-transformers`; every variant gives
    `intaglio.load(OUT).as_sentence_transformer()`.

    Source: Doshi et al., Mistral-SPLADE, 2024, arXiv 2408.11119. The authors train Mistral-7B by LoRA (r 16, alpha 8,
    dropout 0.1) on the public data of sentence-transformers, up to 256 tokens.

    Args:
        variant: `echo` reads a text twice and pools the second copy; `plain` and `bidirectional` read it as it is,
            the latter with later tokens in sight. Default `echo`.
        temperature: T. Default 1, as scores are products of whole vectors.
        pooling: `max`, or `sum` over the pooled tokens, as in the first SPLADE. Default `max`.
        head: `own`, the model's, or `embeddings`, Z = H E^T with the input embeddings. Default `own`.
        logit_scale: s, or `width` for D^(-1/4). Logits of decoders are large before training. Default 1.
        threshold: b before training, which is then learned. Default: none.
        query_weight: lambda_q. Default 1e-3.
        document_weight: lambda_d, of positives and negatives together. Default 1e-3.
        query_regularizer: R of queries, `l1` or `flops`. Default `flops`.
        document_regularizer: R of documents. Default `flops`.
        regularizer_warmup: T0 as a share of the steps. Default 1/3.
        adaptation: share of the steps, at the start, that train next-token prediction and the regularisers instead of
            the ranking, for a decoder whose vectors collapse otherwise. Default 0.
        merge_forms: tokens whose weights are merged by their maximum: those that differ in `space` around the word, or
            in its `case` as well; `none`. Default `none`.
        query_expansion: False keeps only weights of a query's own tokens. Default True.
        query_terms: most terms of a query when searched. Default: all.
        document_terms: most terms of a document when searched. Default: all.
        min_weight: smallest weight when searched. Default 0.
    """

    kinds = ("objective", "encoder")
    summary = "makes a learned-sparse encoder over the vocabulary from a decoder that reads each text twice"
    citation = "Doshi et al., Mistral-SPLADE: LLMs for better Learned Sparse Retrieval, 2024"
    url = "https://arxiv.org/abs/2408.11119"

    sparse: ClassVar[bool] = True

    variant: Literal["plain", "echo", "bidirectional"] = "echo"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    pooling: Literal["max", "sum"] = "max"
    head: Literal["own", "embeddings"] = "own"
    logit_scale: Annotated[float, Field(gt=0)] | Literal["width"] = 1.0
    threshold: float | None = None
    query_weight: Annotated[float, Field(ge=0)] = 1e-3
    document_weight: Annotated[float, Field(ge=0)] = 1e-3
    query_regularizer: Regularizer = "flops"
    document_regularizer: Regularizer = "flops"
    regularizer_warmup: Annotated[float, Field(ge=0, le=1)] = 1 / 3
    adaptation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    merge_forms: Forms = "none"
    query_expansion: bool = True
    query_terms: Annotated[int, Field(ge=1)] | None = None
    document_terms: Annotated[int, Field(ge=1)] | None = None
    min_weight: Annotated[float, Field(ge=0)] = 0.0

    _head: HeadOnly | None = PrivateAttr(None)

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the authors' length of 256 tokens for queries too."""
        return cls(**{"query_length": 256, **overrides})

    def check_parts(self, parts: Anatomy) -> None:
        """Refuse a model without the head that is asked for, and to adapt one that predicts no next token."""
        name = type(parts.model).__name__
        if parts.head is None and self.head == "own":
            raise IntaglioError(f"mistral_splade needs a language-model head, and {name} has none; load its full model")
        if self.head == "embeddings":
            check_embedding_width(parts, "head: embeddings")
        if self.adaptation and not (parts.causal and parts.head is not None):
            raise IntaglioError(f"adaptation trains next-token prediction, and {name} is no decoder with a head")

    def build(self, checkpoint: Checkpoint, seed: int) -> nn.ModuleDict:
        """Return the head: usable terms, merged forms, threshold."""
        texts = token_texts(checkpoint.tokenizer, checkpoint.vocabulary)
        terms_V = usable_terms(checkpoint.tokenizer, texts)
        self._head = None if self._parts.head is None else HeadOnly(self._parts, frozen=False)
        standing_V = surface_forms(texts, terms_V, self.merge_forms)
        return nn.ModuleDict({"splade": SpladeHead(terms_V, standing_V, self.threshold)})

    @property
    def scale(self) -> float:
        """The number s, for the model at hand."""
        return int(self._parts.config.hidden_size) ** -0.25 if self.logit_scale == "width" else self.logit_scale

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Return scaled logits less the threshold, float32 [S, V]."""
        if self.head == "embeddings":
            logits_SV = F.linear(hidden_SD, self._parts.embedding.weight)  # type: ignore[arg-type]
        else:
            assert self._head is not None  # checked by `check_parts`
            logits_SV = self._head(hidden_SD[None])[0]
        scaled_SV = logits_SV.float() * self.scale
        threshold = self._splade.threshold
        return scaled_SV if threshold is None else scaled_SV - threshold

    @property
    def _splade(self) -> SpladeHead:
        head: SpladeHead = self._owned["splade"]  # type: ignore[assignment]
        return head

    def embed(self, model: nn.Module, inputs: Mapping[str, Tensor], side: str) -> Tensor:
        """Return the term weights, float32 [N, V]."""
        pool_NL = inputs["pool_mask"]
        hidden_NLD = base_hidden(self._parts, {name: inputs[name] for name in ("input_ids", "attention_mask")})
        # Logits of other tokens are not computed.
        weights_NV = splade_weights(self.logits(hidden_NLD[pool_NL]), pool_NL.sum(1).tolist(), self.pooling)
        weights_NV = weights_NV * self._splade.terms_V
        if self.merge_forms != "none":
            weights_NV = merged(weights_NV, self._splade.standing_V)
        if side == "query" and not self.query_expansion:
            own_NL = self._splade.standing_V[inputs["input_ids"]]
            weights_NV = weights_NV * torch.zeros_like(weights_NV).scatter_reduce(1, own_NL, pool_NL.float(), "amax")
        return weights_NV

    def searched(self, model: nn.Module, inputs: Mapping[str, Tensor], side: str) -> Tensor:
        """Return the pruned weights."""
        count = self.query_terms if side == "query" else self.document_terms
        return pruned(self.embed(model, inputs, side), count, self.min_weight)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the ranking loss, or while adapting the next-token loss, with the regularisers."""
        weights = {name: self.vectors(model, side(batch, name), name) for name in SIDES}
        penalty, parts = self._penalty(weights, batch)
        if batch["step"] < self.adaptation * batch["steps"]:
            ranking = self._next_token_loss(model, batch)
            parts["next_token"] = ranking
        else:
            scores_BN = weights["query"] @ weights["document"].T
            ranking = self.ranking_loss(scores_BN, batch)
            parts["accuracy"] = accuracy(scores_BN)
        return Loss(ranking + penalty, parts)

    def _penalty(self, weights: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the regularisers' part of the loss, and what is logged of the vectors.

        Raises:
            DivergedError: all vectors of a side are zero.
        """
        steps = batch["steps"]
        ramp = quadratic_ramp(batch["step"], self.regularizer_warmup * steps)
        strength = {"query": self.query_weight, "document": self.document_weight}
        kind = {"query": self.query_regularizer, "document": self.document_regularizer}
        total: Tensor = next(iter(weights.values())).new_zeros(())
        parts: dict[str, Tensor | float] = {}
        for name, vectors_NV in weights.items():
            nnz_N = nonzero_terms(vectors_NV)
            if steps and not bool(nnz_N.any()):
                raise DivergedError(
                    f"sparsity collapsed at step {batch['step'] + 1}: every {name} vector is zero, which has no"
                    f" gradient; lower {name}_weight or the learning rate, or raise regularizer_warmup"
                )
            value = REGULARIZERS[kind[name]](vectors_NV)
            total = total + ramp * strength[name] * value
            parts |= {f"{name}_terms": nnz_N.mean(), f"{name}_least_terms": nnz_N.min(), f"{name}_penalty": value}
        return total, parts

    def _next_token_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the next-token loss under the causal mask, over both sides; of doubled texts over the first copy."""
        sums = [
            self._next_token_sum(model, chunk, recompute=self.chunk_size is not None)
            for name in SIDES
            for chunk in chunks_of(side(batch, name), self.chunk_size)
        ]
        total, count = torch.stack(sums).sum(0)
        return total / count.clamp(min=1)

    def _next_token_sum(self, model: nn.Module, inputs: Mapping[str, Tensor], *, recompute: bool) -> Tensor:
        """Return the sum of the losses and the number of targets, float32 [2]."""

        def run(inputs: Mapping[str, Tensor]) -> Tensor:
            seen_NL = inputs["attention_mask"].bool()
            if self.variant == "echo":
                seen_NL = seen_NL & ~inputs["pool_mask"] & (inputs["pool_mask"].cumsum(1) == 0)
            with temporary_causality(self._parts, True):
                taken = {name: inputs[name] for name in ("input_ids", "attention_mask")}
                logits_NLV = model(**taken, use_cache=False).logits
            target_NL = F.pad(inputs["input_ids"].masked_fill(~seen_NL, IGNORED)[:, 1:], (0, 1), value=IGNORED)
            target = target_NL.flatten()
            total = F.cross_entropy(logits_NLV.flatten(0, 1).float(), target, ignore_index=IGNORED, reduction="sum")
            return torch.stack([total, (target != IGNORED).sum().float()])

        total: Tensor = recomputed(run, inputs) if recompute else run(inputs)
        return total
