"""VDR (Zhou et al. 2024): vectors whose every dimension is a word, by contrast with sparse and bag-of-token views.

Source: Zhou et al., Retrieval-based Disentangled Representation Learning with Natural Language Supervision, ICLR 2024,
arXiv 2212.07699; code: jzhoubu/vsearch.

Dimension letters: B queries, N documents, L tokens of a text, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.data.vocabulary_terms import token_texts, usable_terms, word_beginnings
from intaglio.methods.retrieval.vdr.functional import (
    bag_of_tokens,
    contrastive_mask,
    pooled_activations,
    sparse_mask,
)
from intaglio.modeling.anatomy import Anatomy, anatomy
from intaglio.modeling.partial_pass import base_hidden
from intaglio.trainer.encoder_training import SIDES, EncoderObjective, check_embedding_width
from intaglio.trainer.protocols import Batch, Loss
from intaglio.trainer.ranking_losses import accuracy
from intaglio.trainer.text_batches import side

View = Literal["sparse", "dense", "tokens"]


class VDR(EncoderObjective, slug="vdr"):
    """Vocabulary-disentangled encoder: every dimension of a vector is a word that explains the match.

        v_j  = max_t a(LN(h_t) . E_j)        a(z) = elu(z) + 1        E: the input embeddings, LN: a layer norm
        v_s  = v * (topk(v) or bow(x))       bow(x)_j = 1 where token j occurs in x
        SVDR: L = (C(q_s, p) + C(q, p_s) + C(bow_q, p) + C(q, bow_p)) / 4
        VDR:  L = (C(q_s, p) + C(bow_q, p)) / 2

    q and p are the dense vectors v of a query and its passage, q_s and p_s their sparse views v_s, bow_q and bow_p
    their bags of tokens. C is the cross-entropy of the scores over documents plus that over the queries of the
    positives. As in the authors' code the two are added; the paper halves them. Unlike there, padding is never pooled.

    In a recipe: `train: {objective: {vdr: {}}, pairs: pairs.jsonl, negatives: {}, steps: 500}`, then `intaglio index
    DOCS -o INDEX --encoder OUT`; with `--set document_view=tokens` documents are searched as sets of tokens, without a
    pass of the model. `intaglio inspect OUT --terms TEXT` shows the words of a text, and with `--against TEXT` what
    each adds to a score.

    Source: Zhou et al., Retrieval-based Disentangled Representation Learning with Natural Language Supervision, ICLR
    2024, arXiv 2212.07699; differences from their code are listed in `intaglio.methods.retrieval.vdr`. The authors
    train BERT with Adam at 2e-5, batches of 32 a GPU, one BM25 negative a query, gradients cut at a norm of 2.

    Args:
        temperature: T of both cross-entropies. Default 1, as scores are products of whole vectors.
        semi_parametric: whether documents are also trained as bags of tokens (SVDR). Default True.
        terms: k, the largest entries that the sparse view keeps; 0: the text's own tokens alone; null: all. Default
            768.
        lexical: whether the sparse view always keeps the text's own tokens. Default True.
        pooled_positions: the mean of so many largest positions is pooled; 1 is their maximum. Default 1.
        normalize: whether vectors and bags have unit length. Default False.
        bag_losses: whether texts are contrasted as bags of tokens at all; False leaves the sparse views alone, as an
            ablation. Default True.
        contrastive_mask: whether words that occur in no text of the batch are distributed over its texts, as negatives
            of the others. Default False.
        shared: whether queries and documents share the weights. Default True: one checkpoint is one encoder; the
            authors train two, the second of which is kept beside the first.
        whole_words: whether only tokens that begin a word are dimensions. Default False.
        query_view: view of queries when searched: `sparse`, `dense` or `tokens`. Default `sparse`.
        document_view: view of documents when searched, likewise. Default `sparse`.
        official_pad_pooling: whether padding is pooled, as in the authors' code; for parity alone. Default False.
    """

    kinds = ("objective", "encoder")
    summary = "trains a text encoder whose every dimension is a word, also against texts as plain sets of tokens"
    citation = "Zhou et al., Retrieval-based Disentangled Representation Learning with Natural Language Supervision,"
    citation += " ICLR 2024"
    url = "https://arxiv.org/abs/2212.07699"

    sparse: ClassVar[bool] = True

    temperature: Annotated[float, Field(gt=0)] = 1.0
    semi_parametric: bool = True
    terms: Annotated[int, Field(ge=0)] | None = 768
    lexical: bool = True
    pooled_positions: Annotated[int, Field(ge=1)] = 1
    normalize: bool = False
    bag_losses: bool = True
    contrastive_mask: bool = False
    shared: bool = True
    whole_words: bool = False
    query_view: View = "sparse"
    document_view: View = "sparse"
    official_pad_pooling: bool = False

    _sides: dict[str, Anatomy] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.contrastive_mask and not self.bag_losses:
            raise ValueError("contrastive_mask deals words to bags; leave it out, or bag_losses at true")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the authors' settings: separate weights, queries of 128 tokens, one negative a query."""
        return cls(**{"shared": False, "query_length": 128, "num_negatives": 1, **overrides})

    def check_parts(self, parts: Anatomy) -> None:
        """Refuse embeddings of another width than the hidden states."""
        check_embedding_width(parts, self.slug)

    def build(self, checkpoint: Checkpoint, seed: int) -> nn.ModuleDict:
        """Return the layer norms, the usable dimensions, and the documents' encoder if it is separate."""
        width = int(checkpoint.config.hidden_size)
        owned = nn.ModuleDict({"query_norm": nn.LayerNorm(width)})
        self._sides = dict.fromkeys(SIDES, self._parts)
        if not self.shared:
            owned["document"] = copy.deepcopy(self._parts.base)
            owned["document_norm"] = nn.LayerNorm(width)
            self._sides["document"] = anatomy(owned["document"])
        texts = token_texts(checkpoint.tokenizer, checkpoint.vocabulary)
        terms_V = usable_terms(checkpoint.tokenizer, texts)
        if self.whole_words:
            terms_V &= word_beginnings(checkpoint.tokenizer, checkpoint.vocabulary)
        owned["vocabulary"] = nn.Module()
        owned["vocabulary"].register_buffer("terms_V", terms_V)
        return owned

    @property
    def _terms_V(self) -> Tensor:
        terms_V: Tensor = self._owned["vocabulary"].terms_V  # type: ignore[assignment]
        return terms_V

    def embed(self, model: nn.Module, inputs: Mapping[str, Tensor], side: str) -> Tensor:
        """Return the dense view, float32 [N, V], zero at tokens that are no words."""
        parts = self._sides[side]
        norm = self._owned["query_norm" if self.shared or side == "query" else "document_norm"]
        hidden_NLD = base_hidden(parts, {name: inputs[name] for name in ("input_ids", "attention_mask")})
        words_VD: Any = parts.embedding.weight
        pool_NL = inputs["pool_mask"]
        if self.official_pad_pooling:
            pool_NL = torch.ones_like(pool_NL)
        logits_SV = F.linear(norm(hidden_NLD[pool_NL].float()).to(words_VD.dtype), words_VD).float()
        vectors_NV = pooled_activations(logits_SV, pool_NL.sum(1).tolist(), self.pooled_positions) * self._terms_V
        return F.normalize(vectors_NV, dim=-1) if self.normalize else vectors_NV

    def bag(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the bags of tokens of texts, float32 [N, V]."""
        bag_NV = bag_of_tokens(inputs["input_ids"], inputs["pool_mask"], self._terms_V)
        return F.normalize(bag_NV, dim=-1) if self.normalize else bag_NV

    def sparse_view(self, vectors_NV: Tensor, bag_NV: Tensor) -> Tensor:
        """Return vectors at their largest entries and at the text's own tokens; the mask has no gradient."""
        return vectors_NV * sparse_mask(vectors_NV, self.terms, bag_NV if self.lexical else None)

    def searched(self, model: nn.Module, inputs: Mapping[str, Tensor], side: str) -> Tensor:
        """Return the view of a side; `tokens` needs no pass of the model."""
        view = self.query_view if side == "query" else self.document_view
        if view == "tokens":
            return self.bag(inputs)
        vectors_NV = self.embed(model, inputs, side)
        return vectors_NV if view == "dense" else self.sparse_view(vectors_NV, self.bag(inputs))

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the mean of the contrasts between views."""
        query_BV, document_NV = (self.vectors(model, side(batch, name), name) for name in SIDES)
        bag_BV, bag_NV = (self.bag(side(batch, name)) for name in SIDES)
        sparse_BV = self.sparse_view(query_BV, bag_BV)
        contrasts = [self._contrast(sparse_BV, document_NV, batch)]
        if self.semi_parametric:
            contrasts.append(self._contrast(query_BV, self.sparse_view(document_NV, bag_NV), batch))
        if self.contrastive_mask:
            bag_BV, document_NV = contrastive_mask(bag_BV, document_NV, self._terms_V)
            bag_NV, query_BV = contrastive_mask(bag_NV, query_BV, self._terms_V)
        if self.bag_losses:
            contrasts.append(self._contrast(bag_BV, document_NV, batch))
            if self.semi_parametric:
                contrasts.append(self._contrast(query_BV, bag_NV, batch))
        parts = {"accuracy": accuracy(sparse_BV @ document_NV.T), "lexical_accuracy": accuracy(bag_BV @ document_NV.T)}
        return Loss(torch.stack(contrasts).mean(), parts)

    def _contrast(self, query_BV: Tensor, document_NV: Tensor, batch: Batch) -> Tensor:
        """Return C: over documents plus over queries."""
        loss = self.ranking_loss(query_BV @ document_NV.T, batch, symmetric=True)
        return 2 * loss if self.loss_type == "info_nce" else loss
