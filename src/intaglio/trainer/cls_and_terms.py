"""Sentence vector joined with a vector over words (Liu et al., RetroMAE-2, ACL 2023); the objective `ClsAndTerms`.

    c = W_cls h_1        u_j = a(max_{i >= 2} head(h_i)_j)        s(q, p) = <c_q, c_p> + sum_{j in I_p} u_qj u_pj

I_p are the k largest entries of the passage; the query keeps all of its own. With c of 384 numbers and k = 384 a
passage has as many numbers as a dense vector of BERT.

The authors' published code fine-tunes the sentence vector alone; sizes and the absence of an activation follow the
paper as far as it is known.

Dimension letters: B queries, N texts, C numbers of the reduced sentence vector, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import Anatomy
from intaglio.modeling.partial_pass import HeadOnly, base_hidden
from intaglio.trainer.encoder_training import EncoderObjective
from intaglio.trainer.rng import generator


class ClsAndTerms(EncoderObjective, slug="cls_and_terms"):
    """Sentence vector, reduced, joined with the largest logits of the other tokens, for a masked language model.

    In a recipe: `train: {objective: {cls_and_terms: {}}, pairs: pairs.jsonl, steps: 500}`, after a pretraining by
    `dupmae`. Vectors are `[c, u]`, of C + V numbers.

    Source: Liu et al., RetroMAE-2, ACL 2023, arXiv 2305.02564, section 3.3.

    Args:
        temperature: T of info_nce. Default 1.
        cls_size: C, numbers of the reduced sentence vector. Default 384.
        terms: k, entries of u that a passage keeps; 0: the sentence vector alone; null: all. Default 384.
        activation: a, `none`, `relu` or `log1p_relu`. Default `none`.
    """

    kinds = ("objective", "encoder")
    summary = "trains an encoder whose vectors join the sentence vector with the text's largest word logits"

    temperature: Annotated[float, Field(gt=0)] = 1.0
    cls_size: Annotated[int, Field(ge=1)] = 384
    terms: Annotated[int, Field(ge=0)] | None = 384
    activation: Literal["none", "relu", "log1p_relu"] = "none"

    _head: HeadOnly = PrivateAttr(None)  # type: ignore[assignment]

    def check_parts(self, parts: Anatomy) -> None:
        """Refuse a model that is no masked language model, or a sentence vector that would not be reduced."""
        name, width = type(parts.model).__name__, int(parts.config.hidden_size)
        if parts.causal or parts.head is None:
            raise IntaglioError(f"cls_and_terms needs an encoder with its masked-language-model head; {name} is none")
        if self.cls_size > width:
            raise IntaglioError(f"cls_size is {self.cls_size}; the hidden states have {width} numbers")

    def build(self, checkpoint: Checkpoint, seed: int) -> nn.ModuleDict:
        """Return the reduction, drawn as the model's own matrices are."""
        width = int(checkpoint.config.hidden_size)
        self._head = HeadOnly(self._parts, frozen=False)
        reduction = nn.Linear(width, self.cls_size, bias=False)
        with torch.no_grad():
            reduction.weight.normal_(0.0, width**-0.5, generator=generator(seed, "cls_and_terms"))
        return nn.ModuleDict({"reduction": reduction})

    def dimensions(self, checkpoint: Checkpoint) -> int:
        """Return C + V."""
        return self.cls_size + checkpoint.vocabulary

    def embed(self, model: nn.Module, inputs: Mapping[str, Tensor], side: str) -> Tensor:
        """Return `[c, u]`, float32 [N, C + V], of a passage with its largest entries alone."""
        hidden_NLD = base_hidden(self._parts, {name: inputs[name] for name in ("input_ids", "attention_mask")})
        mask_NL = inputs["pool_mask"]
        logits_SV = self._head(hidden_NLD[:, 1:][mask_NL[:, 1:]][None])[0].float()
        words_NV = torch.stack([part.max(0).values for part in logits_SV.split(mask_NL[:, 1:].sum(1).tolist())])
        if self.activation != "none":
            words_NV = words_NV.relu()
        if self.activation == "log1p_relu":
            words_NV = words_NV.log1p()
        if side == "document" and self.terms is not None and self.terms < words_NV.shape[1]:
            top = words_NV.topk(self.terms, dim=1)
            words_NV = torch.zeros_like(words_NV).scatter(1, top.indices, top.values)
        sentence_NC = F.linear(hidden_NLD[:, 0].float(), self._reduction.weight)
        return torch.cat([sentence_NC, words_NV], dim=1)

    @property
    def _reduction(self) -> Any:
        return self._owned["reduction"]
