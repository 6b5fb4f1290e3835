"""Lexical unit decoding without verification: what the slots are sure of is emitted in the pass that predicts it.

The verify loop emits only what the target has chosen, so this is a loop of its own, made of that loop's parts: what
`generate` asked for and what is refused, rows that end, the cache and its masks, and the choice of a token are the
same. A pass reads the tokens emitted by the last one, and k - 1 PADs behind them. It also says, for each of these
tokens but the first, what the unaided model would have said in its place: so the agreement costs no pass.

Dimension letters: B rows, P prompt tokens, L tokens of a row, Q tokens and PADs of a row in a pass, V vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.methods.decoding.lud.accept import Repeats, accepted
from intaglio.methods.decoding.lud.slots import confidence, context_of, with_slots, within
from intaglio.methods.decoding.lud.statistics import UnitStatistics
from intaglio.speculative.acceptance import Chooser
from intaglio.speculative.outputs import gathered, going
from intaglio.speculative.prepacked_linear import prepacked
from intaglio.speculative.protocols import Step
from intaglio.speculative.request import Request
from intaglio.speculative.sequences import Row, end_together
from intaglio.speculative.target_model import Reader, stack
from intaglio.speculative.tree import chain, root_only

_ALONE = root_only(0)  # choosing asks for a tree; nothing here has children


@dataclass(frozen=True, eq=False)
class Settings:
    """How units are decoded.

    Args:
        pad: id of PAD.
        slots: PADs of a row in a pass, k - 1.
        beta: least confidence of what is taken.
        stop: the guard against repetition.
        generator: what first tokens are drawn from when sampling.
        streamer: gets the tokens of each pass.
        on_step: called with the model's own token of each pass and row, then with what the slots gave, if anything.
        prepack: as in `Speculative`.
    """

    pad: int
    slots: int
    beta: float
    stop: Repeats
    generator: torch.Generator | None = None
    streamer: Any = None
    on_step: Any = None
    prepack: bool | None = None


@dataclass(eq=False)
class _Prefix:
    """What choosing asks of a row, of a row as it was."""

    ids: Tensor
    index: int
    scores: Any = None


class Spans:
    """One run.

    Args:
        settings: how.
        model: the model.
        request: what `generate` asked for.
        counts: gets what the run costs.

    Raises:
        IntaglioError: scores were asked for, or a model that `Reader` refuses.
    """

    def __init__(self, settings: Settings, model: Any, request: Request, counts: UnitStatistics) -> None:
        self._began = time.perf_counter()
        self._settings, self._model, self._request, self._counts = settings, model, request, counts
        config = request.config
        if config.return_dict_in_generate and (config.output_scores or config.output_logits):
            raise IntaglioError(
                "output_scores or output_logits was asked for; what a slot says is no score of the model's, so lexical "
                "units give none"
            )
        own = prepacked(model, settings.prepack, request.room)
        self._reader = Reader(model, request.cache, prepacked=own)
        self._context = context_of(model)
        self._ids_BL = torch.full((len(request.ids_BP), request.max_length), request.pad, device=request.ids_BP.device)
        self._rows = [Row(index, buffer_L, request) for index, buffer_L in enumerate(self._ids_BL)]
        self._first = Chooser(request, settings.generator)
        # Slots are never drawn from: what they say of the second token does not know which first one was drawn.
        self._likeliest = Chooser(replace(request, config=_greedy(config)), None) if config.do_sample else self._first
        self._unread: dict[int, list[int]] = {}

    def run(self) -> Tensor:
        """Generate, and return the padded rows [B, L]."""
        self._prefill()
        for rows in going(self._rows, self._reader):
            self._pass(rows)
        found_BL = gathered(self._request, self._rows, self._ids_BL, self._counts)
        self._counts.seconds = time.perf_counter() - self._began
        return found_BL

    def _prefill(self) -> None:
        start = time.perf_counter()
        logits_BV = self._reader.prefill(self._request.ids_BP, self._request.mask_BP)
        self._counts.book(len(self._rows), start, self._model.device)
        self._first.prepare(logits_BV[:, None])
        for row in self._rows:
            token, _ = self._first.choose(row, row.index, _ALONE, 0, logits_BV[row.index])
            row.append(token)
            self._unread[row.index] = [token]
        self._tell(self._rows, {row.index: logits_BV[row.index][None] for row in self._rows})

    def _pass(self, rows: list[Row]) -> None:
        unread = [self._unread[row.index] for row in rows]
        last = [len(tokens) - 1 for tokens in unread]
        slots, reader = self._settings.slots, self._reader
        room = [self._context - 1 - length + pad for length, pad in zip(reader.lengths, reader.pads, strict=True)]
        read = stack([chain(tokens[0], tokens[1:]) for tokens in unread])
        arrays = within(with_slots(read, np.array(last)[:, None], self._settings.pad, slots), room)
        start = time.perf_counter()
        logits_BQV = reader.extend(*arrays)
        self._counts.book(len(rows), start, self._model.device)
        reader.keep([range(len(tokens)) for tokens in unread])
        for chooser in {self._first, self._likeliest}:
            chooser.prepare(logits_BQV)
        first = read[0].shape[1]
        told = {}
        for place, (row, tokens) in enumerate(zip(rows, unread, strict=True)):
            logits_QV = logits_BQV[place]
            self._check(row, place, tokens, logits_QV)
            places = [last[place], *range(first, first + slots)]
            emitted: list[int] = []
            for token in accepted(self._slots(row, place, places, logits_QV), self._settings.beta, self._settings.stop):
                row.append(token)
                emitted.append(token)
                if row.done:
                    break
            self._unread[row.index] = emitted
            self._counts.nodes += slots
            self._counts.accepted += len(emitted) - 1
            self._counts.lengths.append(len(emitted) - 1)
            told[row.index] = logits_QV[places[: len(emitted)]]
        self._tell(rows, told)

    def _slots(self, row: Row, place: int, places: Sequence[int], logits_QV: Tensor) -> Iterator[tuple[int, float]]:
        """Token and confidence of each slot, each chosen when the row holds the ones before it."""
        for number, slot in enumerate(places):
            chooser = self._likeliest if number else self._first
            token, _ = chooser.choose(row, place, _ALONE, slot, logits_QV[slot])
            yield token, confidence(logits_QV[slot], token)

    def _check(self, row: Row, place: int, tokens: Sequence[int], logits_QV: Tensor) -> None:
        """Hold what was taken from slots against what the unaided model says, now that it has read it."""
        for number, token in enumerate(tokens[1:]):
            before = _Prefix(row.ids[:, : row.length - len(tokens) + number + 1], row.index)
            said, _ = self._likeliest.choose(before, place, _ALONE, number, logits_QV[number])  # type: ignore[arg-type]
            self._counts.checked += 1
            self._counts.agreed += said == token

    def _tell(self, rows: Sequence[Row], logits: dict[int, Tensor]) -> None:
        if self._request.together:
            end_together(self._rows)
        settings = self._settings
        for row in rows:
            tokens, said_NV = self._unread[row.index], logits[row.index]
            if settings.streamer is not None:
                settings.streamer.put(torch.tensor(tokens))
            if settings.on_step is not None:
                more = len(tokens) > 1
                settings.on_step(Step(row.index, tokens[:1], 0, None, (), None, said_NV[:1], row.done and not more))
                if more:
                    taken = Step(row.index, tokens[1:], len(tokens) - 1, None, (), None, said_NV[1:], row.done)
                    settings.on_step(taken)


def _greedy(config: Any) -> Any:
    """The configuration of one who chooses the most likely token."""
    found = copy.copy(config)
    found.do_sample = False
    return found
