"""CodeGen2: causal language modelling mixed with span corruption inside a file (Nijkamp et al., 2023).

The authors published checkpoints and a sampler, not the data pipeline: token names, layout and prompt are theirs; p,
the distributions of spans and the loss on the context are choices of this file, within what the paper says.

Source: Nijkamp et al., CodeGen2: Lessons for Training LLMs on Programming and Natural Languages, 2023,
arXiv 2305.02309. Span counts: Raffel et al., JMLR 2020 (T5). Poisson spans: Fried et al., ICLR 2023 (InCoder).

Dimension letters: B rows, T tokens of a document or row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.data.infill_format import END, MASK, SEPARATOR, Sentinels
from intaglio.errors import IntaglioError
from intaglio.masks import PrefixLM, temporary_visibility
from intaglio.measures.infilling import (
    fitted_hole,
    line_in_hole,
    line_log_probabilities,
    middle_line,
    with_line_break,
)
from intaglio.methods.base import Capability, Method, ModelAspect
from intaglio.trainer.causal_lm import (
    IGNORED,
    causal_batch,
    check_causal,
    cut,
    documents,
    filled,
    next_token_loss,
    packed_row,
    row_length,
)
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG
from intaglio.trainer.samples import Sample, Samples
from intaglio.trainer.special_token import reserve_tokens

NOISE, LENGTHS = (0.05, 0.5), (3.0, 64.0)
"""Ranges of the noise ratio, drawn uniformly, and of the mean span length, drawn log-uniformly, of each document."""

T5 = (0.15, 3.0)
"""Noise ratio and mean span length of T5."""

SHORTEST = 4
"""Fewest tokens of a document that is corrupted."""

LINES, SAMPLES, PART, HOLE = 24, 6, 40, "\u25ad"
"""Held-out lines that are scored and those that are filled and shown, lines of a part of a text that has one of them,
and the sign of their holes."""

Span = tuple[int, int]
Hole = tuple[str, str, str]
"""A prefix, the text of the hole, and a suffix."""


def corrupted(ids_T: Tensor, spans: Sequence[Span], sentinels: Sentinels) -> Tensor:
    """Return the corrupted layout of a document without its end of text, int64 [T + 3 spans + 2].

    Spans beyond the last mask stay in the text.
    """
    context: list[Tensor] = []
    answers: list[Tensor] = []
    last = 0
    end = torch.tensor([sentinels.end])
    for (start, stop), mask in zip(spans, sentinels.masks, strict=False):
        own = torch.tensor([mask])
        context += [ids_T[last:start], own]
        answers += [own, ids_T[start:stop], end]
        last = stop
    return torch.cat([*context, ids_T[last:], torch.tensor([sentinels.end_of_text, sentinels.separator]), *answers])


def restored(corrupted_T: Tensor, sentinels: Sentinels) -> Tensor:
    """Return the document of a corrupted layout, the inverse of `corrupted`."""
    ids: list[int] = corrupted_T.tolist()
    border = ids.index(sentinels.separator)
    answers: dict[int, list[int]] = {}
    rest = ids[border + 1 :]
    while rest:
        stop = rest.index(sentinels.end)
        answers[rest[0]] = rest[1:stop]
        rest = rest[stop + 1 :]
    whole = [token for context in ids[: border - 1] for token in answers.get(context, [context])]
    return torch.tensor(whole, dtype=torch.int64)


def span_counts(tokens: int, noise_ratio: float, mean_length: float, most: int) -> tuple[int, int]:
    """Return T5's numbers of noise tokens and of spans; with fewer than wanted spans, fewer noise tokens."""
    noise = min(max(round(tokens * noise_ratio), 1), tokens - 1)
    spans = min(max(1, round(noise / mean_length)), tokens - noise)
    if spans > most:
        spans, noise = most, min(noise, max(most, round(most * mean_length)))
    return noise, spans


def parts(total: int, count: int, rng: torch.Generator) -> list[int]:
    """Split a number into positive parts, all splits being equally likely."""
    cuts = (torch.randperm(total - 1, generator=rng)[: count - 1] + 1).sort().values.tolist()
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def draw_spans(tokens: int, noise: int, count: int, rng: torch.Generator, *, t5: bool) -> list[Span]:
    """Return spans of `noise` tokens in all, in order, with at least one token between two of them.

    T5 begins with text and ends with a span. Otherwise the text before the first and after the last may be empty.
    """
    lengths, kept = parts(noise, count, rng), tokens - noise
    gaps = parts(kept, count, rng) if t5 else parts(kept + 2, count + 1, rng)
    spans, place = [], 0 if t5 else -1
    for gap, length in zip(gaps, lengths, strict=False):
        spans.append((place + gap, place + gap + length))
        place += gap + length
    return spans


def poisson_spans(tokens: int, count: int, rng: torch.Generator) -> list[Span]:
    """Return InCoder's spans, whose ends are distinct places drawn uniformly."""
    ends = torch.randperm(tokens + 1, generator=rng)[: 2 * count].sort().values.tolist()
    return list(zip(ends[::2], ends[1::2], strict=True))


class CodeGen2(Method, slug="codegen2"):
    """Mixture of causal language modelling and span corruption, for a model that also fills holes.

        causal      x <eot>
        corrupted   x_0 <mask_1> x_1 <mask_2> x_2 <eot> <sep> <mask_1> s_1 <eom> <mask_2> s_2 <eom>

    Each document is corrupted with probability p, with new draws in each epoch: n disjoint spans s_k, with at least one
    token between two of them, move to the end, and a sentinel stands for each. Both layouts are trained by next-token
    prediction, so the model continues texts and fills holes. The prompt of a hole ends with `<sep> <mask_1>`, its
    answer with `<eom>`.

    In a recipe: `train: {objective: {codegen2: {}}, texts: src/, steps: 500}`. Then
    `intaglio generate OUT --prefix "def area(w, h):" --suffix "return a"`, or from Python `infill(checkpoint, [prefix,
    suffix])` of `intaglio.measures.infilling`. In a stock `transformers.Trainer`:

        method, rng = intaglio.CodeGen2(length=256), KeyedRNG(seed=0)    # and two names below: intaglio.trainer
        rows = training_rows(method, checkpoint, texts, rng)
        collate = EpochCollator(method, rng, labels=True)
        arguments = transformers.TrainingArguments("out", max_steps=100, remove_unused_columns=False)
        transformers.Trainer(checkpoint.model, arguments, collate, rows).train()

    Source: Nijkamp et al., CodeGen2, 2023, arXiv 2305.02309, section 3. Choices that it leaves open are listed in
    `intaglio.methods.objectives.codegen2`.

    Args:
        corruption_ratio: probability p that a document is corrupted. Default 0.5.
        spans: `uniform` (holes anywhere, T5's counts), `t5` (T5's allocation, whose last span ends the text) or
            `poisson` (1 + Poisson(1) spans with uniform ends, of InCoder). Default `uniform`.
        noise_ratio: share of a document's tokens in spans, in (0, 1); not for `poisson`. Default: drawn from 0.05 to
            0.5 for each document; 0.15 for `t5`.
        mean_span_length: tokens of a span on average, at least 1; not for `poisson`. Default: drawn log-uniformly from
            3 to 64 for each document; 3 for `t5`.
        sentinels: number K of masks, the most spans of a document. Default 16.
        loss_on: `all` tokens, or the `targets` after `<sep>`, with the whole of a causal document. Default: all; with
            prefix attention, the targets.
        drop_sentinel_loss: whether masks are not predicted, in the text and in the answers. Default False.
        attention: `causal`, or `prefix`: the text before the answers, or a random beginning of a causal document, is
            seen in both directions and not predicted (the paper's Prefix-LM, which did not help). Default `causal`.
        grow: whether missing special tokens are added to the vocabulary. Default True.
        length: tokens of a row. Default: the model's context, at most 1,024.
        pack: whether rows are filled with several documents, which do not see each other. Default True. A corrupted
            document that outgrows its place loses its last tokens in that epoch. Held-out documents are corrupted too,
            always alike.
    """

    kinds = ("objective",)
    summary = "trains a causal model to fill holes as well: spans of a file move to its end, marked by sentinels"
    citation = "Nijkamp et al., CodeGen2: Lessons for Training LLMs on Programming and Natural Languages, 2023"
    url = "https://arxiv.org/abs/2305.02309"

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights", "vocabulary"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"causal"})

    corruption_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    spans: Literal["uniform", "t5", "poisson"] = "uniform"
    noise_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    mean_span_length: Annotated[float, Field(ge=1)] | None = None
    sentinels: Annotated[int, Field(ge=1, le=1000)] = 16
    loss_on: Literal["all", "targets"] | None = None
    drop_sentinel_loss: bool = False
    attention: Literal["causal", "prefix"] = "causal"
    grow: bool = True
    length: Annotated[int, Field(ge=8)] | None = None
    pack: bool = True

    _tokens: Any = PrivateAttr(None)
    _bos_id: int | None = PrivateAttr(None)
    _length: int = PrivateAttr(0)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.attention == "prefix" and self.pack:
            raise ValueError("prefix attention needs rows of one document; set pack: false")
        if self.attention == "prefix" and self.loss_on == "all":
            raise ValueError("prefix attention sees the tokens before the answers; loss_on: targets is accepted")
        if self.spans == "poisson" and (self.noise_ratio is not None or self.mean_span_length is not None):
            raise ValueError("noise_ratio and mean_span_length do not apply to spans: poisson, whose ends are uniform")
        return self

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Find or add the special tokens, and cut or pack the documents into rows."""
        self._length = row_length(checkpoint, self.length)
        check_causal(checkpoint, packing=self.pack)
        stop = getattr(checkpoint.tokenizer, "eos_token_id", None)
        if checkpoint.tokenizer is not None and stop is None:
            raise IntaglioError("the tokenizer has no end-of-text token, which ends the context of a hole")
        self._bos_id = getattr(checkpoint.tokenizer, "bos_token_id", None)
        self._tokens = self._reserve(checkpoint, stop, rng.seed)
        whole = cut(documents(examples, checkpoint.vocabulary), self._length)
        return filled(whole, self._length) if self.pack else whole

    def _reserve(self, checkpoint: Checkpoint, stop: Any, seed: int) -> Any:
        names = [*(MASK.format(k + 1) for k in range(self.sentinels)), SEPARATOR, END]
        *masks, separator, end = reserve_tokens(checkpoint, names, grow=self.grow, seed=seed)
        return Sentinels(tuple(masks), separator, end, stop)

    def modules(self) -> nn.ModuleDict:
        """Return no modules."""
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return a causal batch of rows, some of whose documents are corrupted; `prefix`, int64 [B], with that mask."""
        rows, prefixes = zip(*(self._row(row, rng) for row in examples), strict=True)
        batch = causal_batch(rows)
        if self.attention == "prefix":
            batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
            batch["prefix"] = torch.tensor(prefixes)
        return batch

    def _row(self, row: Example, rng: KeyedRNG) -> tuple[Example, int]:
        """Return a row with its documents transformed, and the tokens of the last one's prefix."""
        source, count = rng(row, "codegen2"), len(row["input_ids"])
        labels_T = row["labels"] if row.get("labels") is not None else row["input_ids"]
        lengths = row["lengths"].tolist() if row.get("lengths") is not None else [count]
        spare = max(0, self._length - count) // len(lengths)
        pieces = zip(row["input_ids"].split(lengths), labels_T.split(lengths), strict=True)
        ids, labels, prefixes = zip(*(self._document(*piece, spare, source) for piece in pieces), strict=True)
        return {**row, **packed_row(ids, labels)}, prefixes[-1]

    def _document(
        self, ids_T: Tensor, labels_T: Tensor, spare: int, rng: torch.Generator
    ) -> tuple[Tensor, Tensor, int]:
        """Return the ids and labels of a document, corrupted or not, and the tokens of its prefix (0: causal)."""
        chosen = float(torch.rand(1, generator=rng)) < self.corruption_ratio
        changed = self._corrupt(ids_T, labels_T, len(ids_T) + spare, rng) if chosen else None
        if changed is not None:
            return changed
        if self.attention == "causal" or len(ids_T) < 2:
            return ids_T, labels_T, 0
        prefix = int(torch.randint(1, len(ids_T), (1,), generator=rng))
        return ids_T, _hidden(labels_T, prefix), prefix

    def _corrupt(
        self, ids_T: Tensor, labels_T: Tensor, room: int, rng: torch.Generator
    ) -> tuple[Tensor, Tensor, int] | None:
        """Return a corrupted document of at most `room` tokens, or None if it is too short."""
        begin = int(len(ids_T) > 0 and int(ids_T[0]) == self._bos_id)
        end = len(ids_T) - int(len(ids_T) > 0 and int(ids_T[-1]) == self._tokens.end_of_text)
        if torch.isin(ids_T, torch.tensor(self._tokens.added)).any():
            return None  # it could not be restored
        rearrange = self._rearrangement(begin, end - begin, room - begin, rng)
        if rearrange is None:
            return None
        layout_T, target_T = rearrange(ids_T), rearrange(labels_T)
        prefix = int((layout_T == self._tokens.border).nonzero()[0]) + 1
        if self.loss_on == "targets" or self.attention == "prefix":
            target_T = _hidden(target_T, prefix)
        if self.drop_sentinel_loss:
            target_T = target_T.masked_fill(torch.isin(layout_T, torch.tensor(self._tokens.masks)), IGNORED)
        return layout_T, target_T, prefix

    def _rearrangement(
        self, begin: int, tokens: int, room: int, rng: torch.Generator
    ) -> Callable[[Tensor], Tensor] | None:
        """Return the function from a document's ids or labels to the corrupted layout; None if it is too short.

        Spans are drawn from `tokens` tokens after the first `begin`; the result has at most `begin + room`.
        """
        drawn = self._spans(tokens, room, rng)
        if drawn is None:
            return None
        kept, spans = begin + drawn[0], [(start + begin, stop + begin) for start, stop in drawn[1]]
        return lambda row_T: corrupted(row_T[:kept], spans, self._tokens)

    def _spans(self, tokens: int, room: int, rng: torch.Generator) -> tuple[int, list[Span]] | None:
        """Return how many tokens of a document stay within `room`, and spans of them; None if too few."""
        if self.spans == "poisson":
            count = min(1 + int(torch.poisson(torch.ones(1), generator=rng)), self.sentinels, max(1, tokens // 8))
            tokens = min(tokens, room - 3 * count - 2)
            return None if tokens < max(SHORTEST, 2 * count) else (tokens, poisson_spans(tokens, count, rng))
        t5 = self.spans == "t5"
        drawn = torch.rand(2, generator=rng).tolist()
        noise_ratio, mean_length = self.noise_ratio, self.mean_span_length
        if noise_ratio is None:
            noise_ratio = T5[0] if t5 else NOISE[0] + drawn[0] * (NOISE[1] - NOISE[0])
        if mean_length is None:
            mean_length = T5[1] if t5 else LENGTHS[0] * math.exp(drawn[1] * math.log(LENGTHS[1] / LENGTHS[0]))
        if tokens < SHORTEST:
            return None
        _, count = span_counts(tokens, noise_ratio, mean_length, self.sentinels)
        tokens = min(tokens, room - 3 * count - 2)
        if tokens < SHORTEST:
            return None
        noise, count = span_counts(tokens, noise_ratio, mean_length, count)
        return tokens, draw_spans(tokens, noise, count, rng, t5=t5)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the next-token loss."""
        if "prefix" not in batch:
            return next_token_loss(model, batch)
        rest = {name: value for name, value in batch.items() if name != "prefix"}
        with temporary_visibility(model, PrefixLM(tuple(batch["prefix"].tolist()))):
            return next_token_loss(model, rest)

    def samples(self, checkpoint: Checkpoint, held_out: Sequence[str]) -> Samples:
        """Return lines of texts as the model fills them; without sentinels, as it continues the text before.

        Beside lines filled exactly, the geometric mean of the probabilities of the lines' tokens is given.
        """
        lines = [hole for text in held_out for part in parts_of(text) if (hole := middle_line(part)) is not None]
        holes = [fitted_hole(checkpoint, *with_line_break(*hole)) for hole in evenly_spaced(lines, LINES)]
        shown = [
            Sample(f"{prefix}{HOLE}{suffix}", line, line_in_hole(checkpoint, prefix, suffix))
            for prefix, line, suffix in evenly_spaced(holes, SAMPLES)
        ]
        exact = sum(sample.text.strip() == sample.expected.strip() for sample in shown)
        scores = {"lines filled exactly": 100 * exact / max(1, len(shown))}
        if holes:
            tokens = torch.cat([line_log_probabilities(checkpoint, *hole) for hole in holes])
            scores["probability of a token of the line (geometric mean)"] = 100 * math.exp(tokens.mean())
        return Samples(shown, scores)


def parts_of(text: str) -> list[str]:
    """Split a text into parts of `PART` lines."""
    lines = text.splitlines(keepends=True)
    return ["".join(lines[start : start + PART]) for start in range(0, len(lines), PART)]


def evenly_spaced(items: Sequence[Hole], most: int) -> Sequence[Hole]:
    """Return at most so many items, evenly spaced."""
    return [items[index * len(items) // most] for index in range(most)] if len(items) > most else items


def _hidden(labels_T: Tensor, prefix: int) -> Tensor:
    """Return a copy of the labels without those of the first tokens."""
    hidden_T = labels_T.clone()
    hidden_T[:prefix] = IGNORED
    return hidden_T
