"""Masked language modelling of whole words; the objective `MaskedLM`.

    -mean_{t masked} log p(x_t | x with 80 % of the masked tokens as [MASK], 10 % random, 10 % as they are)

Source: Devlin et al., BERT, NAACL 2019.

Dimension letters: B rows, L tokens of a row, M masked tokens of a batch, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.data.vocabulary_terms import word_beginnings
from intaglio.errors import IntaglioError
from intaglio.methods.base import Method, ModelAspect
from intaglio.modeling.anatomy import Anatomy, anatomy
from intaglio.modeling.partial_pass import HeadOnly, base_hidden
from intaglio.trainer.causal_lm import IGNORED, documents, row_length
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG
from intaglio.trainer.text_batches import special_tokens
from intaglio.trainer.token_classification import padded

MASKED, RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that become the mask token and random tokens; the others stay."""


def whole_word_mask(begins_L: Tensor, special_L: Tensor, ratio: float, rng: torch.Generator) -> Tensor:
    """Return masked tokens, bool [L]: whole words in random order, at most `ratio` of the row, at least one word.

    Args:
        begins_L: tokens that begin a word.
        special_L: tokens that are never masked, and end a word.
        ratio: share of all L tokens.
        rng: its source.
    """
    word_L = (begins_L | special_L | torch.cat([special_L.new_ones(1), special_L[:-1]])).cumsum(0) - 1
    words = word_L[~special_L].unique()
    sizes = torch.bincount(word_L, minlength=int(word_L[-1]) + 1).tolist()
    wanted = max(1, round(len(begins_L) * ratio))
    taken, chosen = 0, list[int]()
    for word in words[torch.randperm(len(words), generator=rng)].tolist():
        if taken + sizes[word] <= wanted or not chosen:
            chosen.append(word)
            taken += sizes[word]
        if taken >= wanted:
            break
    return torch.isin(word_L, torch.tensor(chosen, dtype=torch.int64))


class MaskedLM(Method, slug="masked_lm"):
    """Masked language modelling of whole words, for an encoder with its head.

    Args:
        mask_ratio: share of the tokens of a row that are predicted. Default 0.15.
        length: tokens of a row, special ones included; longer texts are cut. Default: the model's context, at most
            1,024.
    """

    kinds: ClassVar[tuple[Any, ...]] = ("objective",)
    summary = "trains an encoder to predict masked words"

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})
    storage: ClassVar[Literal["standalone"]] = "standalone"

    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.15
    length: Annotated[int, Field(ge=4)] | None = None

    _parts: Anatomy = PrivateAttr(None)  # type: ignore[assignment]
    _head: HeadOnly = PrivateAttr(None)  # type: ignore[assignment]
    _begins_V: Tensor = PrivateAttr(None)  # type: ignore[assignment]
    _special_V: Tensor = PrivateAttr(None)  # type: ignore[assignment]
    _mask_id: int = PrivateAttr(-1)

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Cut the texts to rows, each between the tokenizer's special tokens."""
        name, tokenizer = type(checkpoint.model).__name__, checkpoint.tokenizer
        parts = anatomy(checkpoint.model)
        if parts.causal or parts.head is None:
            what = "is a causal decoder" if parts.causal else "has none"
            raise IntaglioError(f"masked language modelling needs an encoder with its head, and {name} {what}")
        if tokenizer is None or tokenizer.mask_token_id is None:
            raise IntaglioError("masked language modelling needs a tokenizer with a mask token")
        self._parts, self._head, self._mask_id = parts, HeadOnly(parts, frozen=False), tokenizer.mask_token_id
        self._begins_V = word_beginnings(tokenizer, checkpoint.vocabulary)
        special = [token for token in tokenizer.all_special_ids if token < checkpoint.vocabulary]
        self._special_V = torch.zeros(checkpoint.vocabulary, dtype=torch.bool)
        self._special_V[special] = True
        begin, end = special_tokens(tokenizer)
        return self._rows(checkpoint, examples, begin, end)

    def _rows(
        self, checkpoint: Checkpoint, examples: Iterable[Example], begin: list[int], end: list[int]
    ) -> Iterator[Example]:
        room = row_length(checkpoint, self.length) - len(begin) - len(end)
        if room < 1:
            raise IntaglioError(f"length is {self.length}; the special tokens alone are {len(begin) + len(end)}")
        stop = checkpoint.tokenizer.eos_token_id
        around = torch.tensor([*begin, *end, *([] if stop is None else [stop])])
        for example in documents(examples, checkpoint.vocabulary):
            ids = example["input_ids"]
            ids = ids[~torch.isin(ids, around)]
            for piece in ids.split(room):
                if len(piece):
                    yield {"input_ids": torch.cat([torch.tensor(begin), piece, torch.tensor(end)]).long()}

    def modules(self) -> nn.ModuleDict:
        """Return no modules."""
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return `input_ids`, `attention_mask` and `target` [B, L], padded on the right."""
        hidden = [self._hide(example["input_ids"], rng(example, "masked_lm")) for example in examples]
        batch = padded([ids_L for ids_L, _ in hidden])
        target_BL = nn.utils.rnn.pad_sequence([t for _, t in hidden], batch_first=True, padding_value=IGNORED)
        return {**batch, "target": target_BL, "weight": int((target_BL != IGNORED).sum())}

    def _hide(self, ids_L: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return a row with masked words, and its targets."""
        special_L = self._special_V[ids_L]
        masked_L = whole_word_mask(self._begins_V[ids_L], special_L, self.mask_ratio, rng)
        draw_L = torch.rand(len(ids_L), generator=rng)
        random_L = torch.randint(len(self._special_V), (len(ids_L),), generator=rng)
        changed_L = torch.where(draw_L < MASKED, self._mask_id, torch.where(draw_L < MASKED + RANDOM, random_L, ids_L))
        return torch.where(masked_L, changed_L, ids_L), ids_L.masked_fill(~masked_L, IGNORED)

    def hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden states of the masked rows, [B, L, D]."""
        return base_hidden(self._parts, {name: batch[name] for name in ("input_ids", "attention_mask")})

    def prediction_loss(self, hidden_BLD: Tensor, target_BL: Tensor) -> Tensor:
        """Return the mean cross-entropy of the targets; 0 where there is none."""
        known_BL = target_BL != IGNORED
        logits_MV = self._head(hidden_BLD[known_BL][None])[0].float()
        return F.cross_entropy(logits_MV, target_BL[known_BL], reduction="sum") / known_BL.sum().clamp(min=1)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the mean negative log-likelihood of the masked tokens, in nats."""
        return Loss(self.prediction_loss(self.hidden(batch), batch["target"]))
