"""MEAP: hides a few input tokens, then predicts every next token as usual (Zhuang et al., ICML 2025).

    L(theta) = -(1/T) sum_t log p_theta(x_{t+1} | m(x)_1 .. m(x)_t)

`m` puts [MASK] on M = max(1, floor(T P)) positions of the T inputs, drawn anew each epoch, never on the last. Nothing
else changes: attention stays causal, every target stays, and nothing is masked at inference. For fine-tuning, each
answer of more than 50 tokens comes twice: clean, and as a copy in which a tenth of its tokens is hidden and only those
are predicted (from what stands before each).

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
from intaglio.trainer.special_token import reserve_token

TOKEN = "<|mask|>"
"""The mask token's name where it has to be added."""

PRETRAINING, FINETUNING = 0.15, 0.10
"""The paper's shares of hidden tokens."""

SHORT = 50
"""Answers of at most so many tokens have no copy with hidden tokens."""


def mask_count(inputs: int, ratio: float) -> int:
    """Return M = max(1, floor(T P)), how many tokens are hidden.

    Args:
        inputs: T, positions that have a target.
        ratio: P.
    """
    return max(1, int(inputs * ratio))


def draw_positions(eligible: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Return distinct positions drawn uniformly, in order, int64 [at most count].

    Args:
        eligible: positions to choose from, int64.
        count: how many; all of them where there are not more.
        rng: source of the draw.
    """
    chosen = torch.randperm(len(eligible), generator=rng)[:count]
    return eligible[chosen].sort().values


def hidden(ids_T: Tensor, positions: Tensor, mask_id: int) -> Tensor:
    """Return a copy of the ids with the mask token at some positions, int64 [T].

    Args:
        ids_T: token ids.
        positions: which to hide.
        mask_id: id of the mask token.
    """
    masked_T = ids_T.clone()
    masked_T[positions] = mask_id
    return masked_T


def mask_inputs(
    ids_BT: Tensor, mask_id: int, *, ratio: float, rng: torch.Generator, special_BT: Tensor | None = None
) -> Tensor:
    """Return inputs with tokens hidden, int64 [B, T]: the method as a transform before any causal model.

        model(input_ids=mask_inputs(ids, mask_id, ratio=0.15, rng=rng), labels=ids)

    The stock models shift labels themselves, so of n tokens the first n - 1 are inputs with a target; M of the first
    n - 2 are hidden, each row its own.

    Args:
        ids_BT: clean ids, one document a row.
        mask_id: id of the mask token.
        ratio: share P of the inputs that is hidden.
        rng: source of the draws.
        special_BT: True where nothing may be hidden and nothing is counted: padding, begin of text. Default: nowhere.
    """
    if special_BT is None:
        special_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    rows = []
    for ids_T, special_T in zip(ids_BT, special_BT, strict=True):
        real = (~special_T).nonzero().flatten()
        rows.append(hidden(ids_T, draw_positions(real[:-2], mask_count(len(real) - 1, ratio), rng), mask_id))
    return torch.stack(rows)


class MEAP(Method, slug="meap"):
    """Mask-enhanced autoregressive prediction, for pretraining and for supervised fine-tuning.

    In a recipe: `train: {objective: {meap: {}}, steps: 500}` or, on instruction pairs,
    `train: {objective: {meap: {mode: finetuning}}, instructions: pairs.jsonl, steps: 500}`. From Python:
    `intaglio.train(checkpoint, texts, objective=intaglio.MEAP(), steps=500)`.

    Source: Zhuang et al., Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More, ICML 2025.

    Args:
        mode: `pretraining` (texts) or `finetuning` (instruction pairs: `prompt` and `answer`). Default `pretraining`.
        ratio: share P of the tokens that are hidden, in (0, 1). Default: 0.15, in fine-tuning 0.10 (of an answer). At
            least one token is hidden whatever the share is.
        enabled: False trains on the same rows without hiding anything, as plain next-token prediction. Default True.
        mask_token: the token that hides others, by name or id. Default: the tokenizer's mask token, or else a new one.
        grow: whether a token that the vocabulary lacks is added to it (its row starts like an average token's).
            Default True.
        keep_bos: whether a begin-of-text token is never hidden, as attention leans on it. Default True.
        shared_positions: whether all rows of an optimizer step hide the same positions, as the authors' code has it.
            Default False: each document of each row has its own.
        cycle: with shared positions, after how many optimizer steps they come again. Default: never.
        short: answers of at most so many tokens are not doubled. Default 50.
        length: tokens of a row. Default: the model's context, at most 1,024.
        pack: whether rows are filled with several documents that do not see each other (in fine-tuning, pairs are
            never cut). Default True.
        chat: whether prompts are put into the tokenizer's chat template, if it has one. Default True.
    """

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
        """As the authors' code trains: positions shared by all rows of a step, 51 patterns in turn, BOS not spared.

        Args:
            overrides: fields that the caller sets.
        """
        return cls(**{"shared_positions": True, "cycle": 51, "keep_bos": False, **overrides})

    @property
    def share(self) -> float:
        """The share of hidden tokens, the default of the mode where none is set."""
        if self.ratio is not None:
            return self.ratio
        return PRETRAINING if self.mode == "pretraining" else FINETUNING

    @property
    def mask_id(self) -> int:
        """The id of the mask token, once `prepare` has found or made it."""
        return self._mask_id

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Find or make the mask token, and cut or pack the examples into rows.

        Args:
            checkpoint: a causal decoder; its vocabulary grows by the mask token if it lacks it.
            examples: texts or ids in pretraining, instruction pairs in fine-tuning.
            rng: draws the hidden tokens of answers, once.

        Raises:
            IntaglioError: the model is no causal decoder, the mask token is missing and may not be added, or an
                example is malformed.
        """
        length = row_length(checkpoint, self.length)
        check_causal(checkpoint, packing=self.pack)
        self._mask_id = reserve_token(
            checkpoint,
            self.mask_token,
            name=TOKEN,
            field="mask_token",
            grow=self.grow,
            seed=rng.seed,
            role="mask_token",
        )
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
        """Each pair clean and, if its answer is long, with hidden tokens."""
        for number, example in enumerate(examples):
            prompt, answer, stop = tokenize_pair(checkpoint, example, number, length, chat=self.chat)
            clean = as_document(prompt, [*answer, *stop])
            yield clean
            if rng.training and self.enabled and len(answer) > self.short:
                source = rng({**example, "epoch": 0}, "meap")
                yield self._copy(clean["input_ids"], len(prompt), len(answer), source)

    def _copy(self, clean_T: Tensor, begin: int, count: int, rng: torch.Generator) -> Example:
        """A copy in which some tokens of the answer are hidden, and only those are predicted."""
        answer = torch.arange(begin, begin + count)
        positions = draw_positions(answer, mask_count(count, self.share), rng)
        labels = torch.full_like(clean_T, IGNORED)
        labels[positions] = clean_T[positions]
        return {"input_ids": hidden(clean_T, positions, self._mask_id), "labels": labels}

    def modules(self) -> nn.ModuleDict:
        """None."""
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return a causal batch, in pretraining with tokens hidden; nothing is hidden while evaluating.

        Args:
            examples: rows.
            rng: draws the positions, anew each epoch.
        """
        if self.mode == "finetuning" or not self.enabled or not rng.training:
            return causal_batch(examples)
        return causal_batch([self._hide(example, rng) for example in examples])

    def _hide(self, row: Example, rng: KeyedRNG) -> Example:
        positions = self.positions(row, rng)
        clean_T = row["input_ids"]
        labels_T = row["labels"] if row.get("labels") is not None else clean_T
        return {**row, "input_ids": hidden(clean_T, positions, self._mask_id), "labels": labels_T}

    def positions(self, row: Example, rng: KeyedRNG) -> Tensor:
        """Return which positions of a row are hidden, int64, in order.

        Of a document of T + 1 tokens, the first T are inputs with a target; M of positions 0 to T-2 are hidden.

        Args:
            row: `input_ids`, and `lengths` if it is packed.
            rng: draws them.
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
        """Return the next-token loss.

        Args:
            model: the model.
            batch: from `collate`.
        """
        return next_token_loss(model, batch)


@torch.no_grad()
def attention_shift(model: Any, ids_T: Tensor, positions: Tensor, mask_id: int) -> dict[str, float]:
    """Return how hiding tokens moves the attention of a model: the paper's two diagnostics.

    A key's attention A is the mean of its weights over layers, heads and the queries behind it. `decay` is the mean
    over hidden keys of (A_clean - A_hidden) / A_clean; `variance` is Var(A_hidden) - Var(A_clean) over the other keys.

    Args:
        model: a causal model.
        ids_T: the clean text, int64 [T].
        positions: which of its tokens are hidden, int64.
        mask_id: id of the mask token.
    """
    before = model.config._attn_implementation
    with preserve_modes(model):
        model.eval()
        model.set_attn_implementation("eager")  # the others do not return their weights
        try:
            clean_T, masked_T = (_received(model, ids) for ids in (ids_T, hidden(ids_T, positions, mask_id)))
        finally:
            model.set_attn_implementation(before)
    seen = torch.ones(len(ids_T), dtype=torch.bool)
    seen[positions] = False
    decay = ((clean_T - masked_T) / clean_T)[~seen].mean()
    return {"decay": float(decay), "variance": float(masked_T[seen].var() - clean_T[seen].var())}


def _received(model: Any, ids_T: Tensor) -> Tensor:
    """What attention each token receives from those behind it, float64 [T]."""
    output = model(input_ids=ids_T[None].to(model.device), output_attentions=True, use_cache=False)
    weights_TT = torch.stack([layer[0].double().mean(0) for layer in output.attentions]).mean(0).cpu()
    behind_T = torch.arange(len(ids_T), 0, -1)
    return weights_TT.sum(0) / behind_T
