"""MEAP: mask a few input tokens, then predict every next token as usual (Zhuang et al., ICML 2025).

Source: Zhuang et al., Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More, ICML 2025,
arXiv 2502.07490.

Dimension letters: T tokens of a row, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.methods.base import Capability, Method, ModelAspect
from intaglio.trainer.causal_lm import (
    IGNORED,
    causal_batch,
    check_causal,
    cut,
    documents,
    filled,
    next_token_loss,
    packed,
    row_length,
    starts,
)
from intaglio.trainer.instruction_data import tokenize_pair
from intaglio.trainer.instruction_tuning import as_document
from intaglio.trainer.preserve_state import preserve_modes
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG, generator
from intaglio.trainer.special_token import reserve_mask_token

PRETRAINING, FINETUNING = 0.15, 0.10
"""The paper's shares of masked tokens."""

SHORT = 50
"""Longest answer without a masked copy."""


def mask_count(inputs: int, ratio: float) -> int:
    """Return M = max(1, floor(T P)), the number of masked tokens."""
    return max(1, int(inputs * ratio))


def draw_positions(eligible: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Return distinct positions drawn uniformly, in order, int64 [at most count]."""
    chosen = torch.randperm(len(eligible), generator=rng)[:count]
    return eligible[chosen].sort().values


def masked(ids_T: Tensor, positions: Tensor, mask_id: int) -> Tensor:
    """Return a copy of the ids with the mask token at some positions, int64 [T]."""
    masked_T = ids_T.clone()
    masked_T[positions] = mask_id
    return masked_T


def mask_inputs(
    ids_BT: Tensor, mask_id: int, *, ratio: float, rng: torch.Generator, special_BT: Tensor | None = None
) -> Tensor:
    """Return masked inputs, int64 [B, T]: the method as a transform before any causal model.

        model(input_ids=mask_inputs(ids, mask_id, ratio=0.15, rng=rng), labels=ids)

    The stock models shift labels themselves, so of n tokens the first n - 1 are inputs with a target; M of the first
    n - 2 are masked, in each row independently.

    Args:
        ids_BT: token ids, int64 [B, T].
        mask_id: id of the mask token.
        ratio: share P of the inputs to mask.
        rng: the source of positions.
        special_BT: True at special tokens and padding, which are never masked. Default: none.
    """
    if special_BT is None:
        special_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    rows = []
    for ids_T, special_T in zip(ids_BT, special_BT, strict=True):
        real = (~special_T).nonzero().flatten()
        rows.append(masked(ids_T, draw_positions(real[:-2], mask_count(len(real) - 1, ratio), rng), mask_id))
    return torch.stack(rows)


class MEAP(Method, slug="meap"):
    """Mask-enhanced autoregressive prediction, for pretraining and for supervised fine-tuning.

        L(theta) = -(1/T) sum_t log p_theta(x_{t+1} | m(x)_1 .. m(x)_t)

    `m` puts [MASK] on M = max(1, floor(T P)) positions of the T inputs, drawn in each epoch, never the last. Nothing
    else changes: attention stays causal, every target stays, and nothing is masked at inference. For fine-tuning, each
    answer of more than 50 tokens appears twice: clean, and as a copy in which a tenth of its tokens is masked and only
    those are predicted.

    In a recipe: `train: {objective: {meap: {}}, steps: 500}` or, on instruction pairs,
    `train: {objective: {meap: {mode: finetuning}}, instructions: pairs.jsonl, steps: 500}`. From Python:
    `intaglio.train(checkpoint, texts, objective=intaglio.MEAP(), steps=500)`.

    Source: Zhuang et al., Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More, ICML 2025.

    Args:
        mode: `pretraining` (texts) or `finetuning` (instruction pairs: `prompt` and `answer`). Default `pretraining`.
        ratio: share P of masked tokens, in (0, 1). Default: 0.15, in fine-tuning 0.10 (of an answer). At least one
            token is masked.
        enabled: False trains on the same rows without masks, as plain next-token prediction. Default True.
        mask_token: the mask token, by name or id. Default: the tokenizer's, or else a new token.
        grow: whether a missing token is added to the vocabulary (its row starts like an average token's). Default
            True.
        keep_bos: whether a begin-of-text token is never masked, as it is an attention sink. Default True.
        shared_positions: whether all rows of an optimizer step mask the same positions, as in the authors' code.
            Default False: each document of each row has its own.
        cycle: with shared positions, number of optimizer steps after which they repeat. Default: never.
        short: longest answer, in tokens, without a masked copy. Default 50.
        length: tokens of a row. Default: the model's context, at most 1,024.
        pack: whether rows are filled with several documents that do not see each other (in fine-tuning, pairs are
            never cut). Default True.
        chat: whether prompts are put into the tokenizer's chat template, if it has one. Default True.
    """

    kinds = ("objective",)
    summary = "masks a small share of the input tokens during training, then predicts every next token as usual"
    citation = "Zhuang et al., Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More, ICML 2025"
    url = "https://arxiv.org/abs/2502.07490"

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights", "vocabulary"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"causal"})

    mode: Literal["pretraining", "finetuning"] = "pretraining"
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    enabled: bool = True
    mask_token: str | int | None = None
    grow: bool = True
    keep_bos: bool = True
    shared_positions: bool = False
    cycle: Annotated[int, Field(ge=1)] | None = None
    short: Annotated[int, Field(ge=0)] = SHORT
    length: Annotated[int, Field(ge=2)] | None = None
    pack: bool = True
    chat: bool = True

    _mask_id: int = PrivateAttr(-1)
    _bos_id: int | None = PrivateAttr(None)

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the authors' settings: positions shared by the rows of a step, 51 patterns in turn, BOS not kept."""
        return cls(**{"shared_positions": True, "cycle": 51, "keep_bos": False, **overrides})

    @property
    def share(self) -> float:
        """The share of masked tokens, by default that of the mode."""
        if self.ratio is not None:
            return self.ratio
        return PRETRAINING if self.mode == "pretraining" else FINETUNING

    @property
    def mask_id(self) -> int:
        """The id of the mask token, after `prepare`."""
        return self._mask_id

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Find or add the mask token, and cut or pack the examples into rows."""
        length = row_length(checkpoint, self.length)
        check_causal(checkpoint, packing=self.pack)
        self._mask_id = reserve_mask_token(checkpoint, self.mask_token, grow=self.grow, seed=rng.seed)
        self._bos_id = getattr(checkpoint.tokenizer, "bos_token_id", None) if self.keep_bos else None
        if self.mode == "finetuning":
            samples = self._samples(checkpoint, examples, length, rng)
            return filled(samples, length) if self.pack else samples
        vocabulary = checkpoint.vocabulary
        whole = documents(examples, vocabulary)
        return packed(whole, length) if self.pack else cut(whole, length)

    def _samples(
        self, checkpoint: Checkpoint, examples: Iterable[Example], length: int, rng: KeyedRNG
    ) -> Iterator[Example]:
        """Yield each pair clean and, if its answer is long, masked."""
        for number, example in enumerate(examples):
            prompt, answer, stop = tokenize_pair(checkpoint, example, number, length, chat=self.chat)
            clean = as_document(prompt, [*answer, *stop])
            yield clean
            if rng.training and self.enabled and len(answer) > self.short:
                source = rng({**example, "epoch": 0}, "meap")
                yield self._copy(clean["input_ids"], len(prompt), len(answer), source)

    def _copy(self, clean_T: Tensor, begin: int, count: int, rng: torch.Generator) -> Example:
        """Return a copy in which some tokens of the answer are masked, and only those are predicted."""
        answer = torch.arange(begin, begin + count)
        positions = draw_positions(answer, mask_count(count, self.share), rng)
        labels = torch.full_like(clean_T, IGNORED)
        labels[positions] = clean_T[positions]
        return {"input_ids": masked(clean_T, positions, self._mask_id), "labels": labels}

    def modules(self) -> nn.ModuleDict:
        """Return no modules."""
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return a causal batch, masked in pretraining, but not while evaluating."""
        if self.mode == "finetuning" or not self.enabled or not rng.training:
            return causal_batch(examples)
        return causal_batch([self._hide(example, rng) for example in examples])

    def _hide(self, row: Example, rng: KeyedRNG) -> Example:
        positions = self.positions(row, rng)
        clean_T = row["input_ids"]
        labels_T = row["labels"] if row.get("labels") is not None else clean_T
        return {**row, "input_ids": masked(clean_T, positions, self._mask_id), "labels": labels_T}

    def positions(self, row: Example, rng: KeyedRNG) -> Tensor:
        """Return the masked positions of a row, int64, in order.

        Of a document of T + 1 tokens, the first T are inputs with a target; M of positions 0 to T-2 are masked.
        """
        if self.shared_positions:
            step = row.get("step", 0)
            source = generator(rng.seed, "meap", step if self.cycle is None else step % self.cycle)
            bounds = [(0, len(row["input_ids"]))]
        else:
            source = rng(row, "meap")
            first = starts(row).tolist()
            bounds = list(zip(first, [*first[1:], len(row["input_ids"])], strict=True))
        return torch.cat([self._in_document(row["input_ids"], a, b, source) for a, b in bounds])

    def _in_document(self, ids_T: Tensor, begin: int, end: int, source: torch.Generator) -> Tensor:
        inputs = end - begin - 1  # the last token is a target only
        eligible = torch.arange(begin, max(begin, end - 2))
        if self._bos_id is not None:
            eligible = eligible[ids_T[eligible] != self._bos_id]
        return draw_positions(eligible, mask_count(inputs, self.share), source)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the next-token loss."""
        return next_token_loss(model, batch)


@torch.no_grad()
def attention_shift(model: Any, ids_T: Tensor, positions: Tensor, mask_id: int) -> dict[str, float]:
    """Return the paper's two diagnostics of attention under masked tokens.

    A key's attention A is the mean of its weights over layers, heads and later queries. `decay` is the mean over masked
    keys of (A_clean - A_masked) / A_clean; `variance` is Var(A_masked) - Var(A_clean) over the other keys.
    """
    before = model.config._attn_implementation
    with preserve_modes(model):
        model.eval()
        model.set_attn_implementation("eager")  # the others do not return their weights
        try:
            clean_T, masked_T = (_received(model, ids) for ids in (ids_T, masked(ids_T, positions, mask_id)))
        finally:
            model.set_attn_implementation(before)
    seen = torch.ones(len(ids_T), dtype=torch.bool)
    seen[positions] = False
    decay = ((clean_T - masked_T) / clean_T)[~seen].mean()
    return {"decay": float(decay), "variance": float(masked_T[seen].var() - clean_T[seen].var())}


def _received(model: Any, ids_T: Tensor) -> Tensor:
    """Return the mean attention that each token receives from later tokens, float64 [T]."""
    output = model(input_ids=ids_T[None].to(model.device), output_attentions=True, use_cache=False)
    weights_TT = torch.stack([layer[0].double().mean(0) for layer in output.attentions]).mean(0).cpu()
    queries_T = torch.arange(len(ids_T), 0, -1)
    return weights_TT.sum(0) / queries_T
