"""DupMAE (Liu et al. 2023): an encoder pretrained for retrieval, by two decodings of what it reads.

RetroMAE (v1) has no L_bow, and queries of the decoder that are h plus the position, not normalised. Unlike in the
authors' code, unknown tokens are never masked, predicted or counted, as they restore nothing of the text. After the
pretraining the decoder is of no use; it is kept as an attachment, so that pretraining can go on.

Source: Liu et al., RetroMAE-2: Duplex Masked Auto-Encoder For Pre-Training Retrieval-Oriented Language Models, ACL
2023, arXiv 2305.02564; code: staoxiao/RetroMAE. RetroMAE: Xiao et al., EMNLP 2022, arXiv 2205.12035.

Dimension letters: B texts, L tokens of a text, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Self

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.objectives.dupmae.decoder import EnhancedDecoder, row_masks
from intaglio.trainer.causal_lm import IGNORED
from intaglio.trainer.encoder_training import recomputed
from intaglio.trainer.masked_lm import MaskedLM
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG

OWNED = "decoder"
BOW_WEIGHT = 0.1
"""Weight of L_bow by default."""


def bag_loss(pooled_BV: Tensor, weights_BV: Tensor) -> Tensor:
    """Return -mean_b sum_t w_bt log softmax(u_b)_t."""
    return -(weights_BV * pooled_BV.float().log_softmax(-1)).sum(-1).mean()


def bag_weights(ids_BL: Tensor, counted_BL: Tensor, vocabulary: int) -> Tensor:
    """Return 1/n for each token that occurs among the n counted ones, however often, float32 [B, V].

    A text without any has weights of zero.
    """
    share_B = 1 / counted_BL.sum(1).clamp(min=1)
    source_BL = counted_BL.float() * share_B[:, None]
    return torch.zeros(len(ids_BL), vocabulary, device=ids_BL.device).scatter_reduce(1, ids_BL, source_BL, "amax")


def count_own_positions(model: Any, embeddings: Any) -> int:
    """Return how many positions the decoder has to learn: 0 where the encoder's embeddings have a table of them.

    Raises:
        IntaglioError: embeddings narrower than the hidden states, or without token types beside positions.
    """
    width = model.config.hidden_size
    tables = [getattr(embeddings, name, None) for name in ("position_embeddings", "token_type_embeddings")]
    if all(getattr(table, "embedding_dim", None) == width for table in tables):
        return 0
    reads_vectors = embeddings is not None and "inputs_embeds" in inspect.signature(embeddings.forward).parameters
    if tables[0] is None and reads_vectors and model.get_input_embeddings().embedding_dim == width:
        return int(model.config.max_position_embeddings)
    raise IntaglioError(
        "dupmae needs an encoder whose embeddings are as wide as its hidden states, with positions and token types, as"
        f" in BERT and RoBERTa, or without positions, as in ModernBERT; {type(model).__name__} has others"
    )


class DupMAE(MaskedLM, slug="dupmae"):
    """Pretraining of an encoder for retrieval: masked words, the text from its sentence vector, and its bag of words.

        L = L_enc + L_dec + w L_bow        h: the state of [CLS] of the masked text

        L_enc   masked words of the encoder's own text
        L_dec   every token from h, its position and about half of the words, by one new layer
        L_bow   -sum_t w_t log softmax(max_{i >= 1} head(h_i))_t        w_t = 1/n for each token t that occurs

    In a recipe: `train: {objective: {dupmae: {length: 128}}, texts: docs/, steps: 1000}`, on a masked language model or
    from scratch (`new: {family: bert, ...}`). Fine-tune the result on pairs by `contrastive` (`pooling: cls`) or
    `cls_and_terms`, which joins the sentence vector with the words that L_bow has trained.

    The decoder embeds h and the words as the encoder embeds words, positions included. An encoder with rotary or
    relative positions, such as ModernBERT, has no table of them; then the decoder learns one of its own.

    Source: Liu et al., RetroMAE-2, ACL 2023, arXiv 2305.02564. The authors train 8 epochs of Wikipedia and BooksCorpus
    with AdamW at 1e-4, warm-up of a tenth, weight decay 0.01, 512 tokens.

    Args:
        mask_ratio: share of the encoder's tokens that are masked, whole words. Default 0.30.
        decoder_mask_ratio: share of the tokens that a row of the decoder does not see. Default 0.50; 1 shows it h and
            its position alone.
        decoder_weight: of L_dec; 0 leaves it out. Default 1.
        bow_weight: w of L_bow; 0 leaves it out. Default: 0.1, and 0 for RetroMAE.
        retromae: whether this is RetroMAE v1: no L_bow, queries that are not normalised. Default False.
        chunk_size: texts whose logits over all positions are held at a time for L_bow. Default 8.
        length: tokens of a row. Default: the model's context, at most 1,024.
    """

    kinds = ("objective",)
    summary = "pretrains an encoder for retrieval: its sentence vector restores the text, its states the bag of words"
    citation = "Liu et al., RetroMAE-2: Duplex Masked Auto-Encoder For Pre-Training Retrieval-Oriented Language Models,"
    citation += " ACL 2023"
    url = "https://arxiv.org/abs/2305.02564"

    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.30
    decoder_mask_ratio: Annotated[float, Field(gt=0, le=1)] = 0.50
    decoder_weight: Annotated[float, Field(ge=0)] = 1.0
    bow_weight: Annotated[float, Field(ge=0)] | None = None
    retromae: bool = False
    chunk_size: Annotated[int, Field(ge=1)] = 8

    _owned: nn.ModuleDict = PrivateAttr(None)  # type: ignore[assignment]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.retromae and self.bow_weight:
            raise ValueError("retromae has no bag of words; leave bow_weight out")
        return self

    @property
    def _bow(self) -> float:
        return (0.0 if self.retromae else BOW_WEIGHT) if self.bow_weight is None else self.bow_weight

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Cut the texts to rows; take up the decoder of an earlier pretraining, or draw a new one."""
        rows = super().prepare(checkpoint, examples, rng)
        positions = count_own_positions(checkpoint.model, getattr(self._parts.base, "embeddings", None))
        decoder = EnhancedDecoder(checkpoint.config, rng.seed, positions).to(checkpoint.device)
        attachment = checkpoint.attachments.get(self.slug)
        if attachment is not None:
            decoder.load_state_dict({name.removeprefix(f"{OWNED}."): v for name, v in attachment.tensors.items()})
        if rng.training or self._owned is None:
            self._owned = nn.ModuleDict({OWNED: decoder})
        return rows

    def modules(self) -> nn.ModuleDict:
        """Return the decoder, unless it is left out."""
        return self._owned if self.decoder_weight and self._owned is not None else nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return the batch of masked language modelling with `ids` [B, L], `visible` [B, L, L] and `targets` [B, L]."""
        batch = super().collate(examples, rng)
        length = batch["input_ids"].shape[1]
        rows = [example["input_ids"] for example in examples]
        ids_BL = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        visible_BLL = torch.zeros(len(rows), length, length, dtype=torch.bool)
        if self.decoder_weight:
            for number, (example, ids_L) in enumerate(zip(examples, rows, strict=True)):
                drawn = rng(example, "dupmae")
                own_LL = row_masks(self._begins_V[ids_L], self._special_V[ids_L], self.decoder_mask_ratio, drawn)
                visible_BLL[number, : len(ids_L), : len(ids_L)] = own_LL
        predicted_BL = batch["attention_mask"].bool() & ~self._special_V[ids_BL]
        targets_BL = ids_BL.masked_fill(~predicted_BL, IGNORED)
        # Micro-batches of a step count by their texts: the parts have other numbers of targets each.
        return {**batch, "ids": ids_BL, "visible": visible_BLL, "targets": targets_BL, "weight": len(rows)}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the sum of the parts."""
        hidden_BLD = self.hidden(batch)
        total = self.prediction_loss(hidden_BLD, batch["target"])
        parts: dict[str, Any] = {"encoder": total}
        if self.decoder_weight:
            parts["decoder"] = self.prediction_loss(self.decoded(hidden_BLD[:, 0], batch), batch["targets"])
            total = total + self.decoder_weight * parts["decoder"]
        if self._bow:
            counted_BL = batch["targets"] != IGNORED
            weights_BV = bag_weights(batch["ids"], counted_BL, len(self._special_V))
            parts["bag_of_words"] = bag_loss(self.pooled_logits(hidden_BLD, batch["attention_mask"]), weights_BV)
            total = total + self._bow * parts["bag_of_words"]
        return Loss(total, parts)

    def decoded(self, sentence_BD: Tensor, batch: Batch) -> Tensor:
        """Return the decoder's outputs [B, L, D] for sentence vectors."""
        embeddings: Any = self._parts.base.embeddings
        decoder: Any = self._owned[OWNED].train(self._parts.base.training)
        repeated_BLD = sentence_BD[:, None].expand(-1, batch["ids"].shape[1], -1)
        if self.retromae:
            positions = embeddings.position_embeddings if decoder.positions is None else decoder.positions
            first = 0 if positions.padding_idx is None else positions.padding_idx + 1  # RoBERTa counts from there
            query_BLD = repeated_BLD + positions.weight[first : first + repeated_BLD.shape[1]]
        else:
            query_BLD = decoder.add_positions(embeddings(inputs_embeds=repeated_BLD))
        words_BLD = decoder.add_positions(embeddings(input_ids=batch["ids"]))
        context_BLD = torch.cat([sentence_BD[:, None], words_BLD[:, 1:]], dim=1)
        output: Tensor = decoder(query_BLD, context_BLD, batch["visible"])
        return output

    def pooled_logits(self, hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the largest logit of each token over the positions after [CLS], padding apart, [B, V]."""

        def run(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
            logits_SV = self._head(hidden_BLD[:, 1:][mask_BL[:, 1:].bool()][None])[0]
            lengths = mask_BL[:, 1:].sum(1).tolist()
            return torch.stack([part.max(0).values for part in logits_SV.split(lengths)])

        size = self.chunk_size
        chunks = zip(hidden_BLD.split(size), mask_BL.split(size), strict=True)
        return torch.cat([recomputed(run, *chunk) for chunk in chunks])
