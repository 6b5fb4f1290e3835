"""The one lossless verify loop: every drafter runs through it.

    decoder = Speculative(PromptLookup())
    model.generate(**inputs, custom_generate=decoder, max_new_tokens=128)
    decoder.statistics.tokens_per_pass

A pass of the target reads the last token emitted and a tree of guesses behind it at once. The walk down the tree emits
the tokens that the target itself would have, one or more a pass. Greedy output equals stock greedy `generate` up to
floating point: a pass over several tokens rounds otherwise than a pass over one, so two logits that are nearly tied may
change places. Sampled output has the target's law for every tree (`sampling.py`).

Dimension letters: B rows, P prompt tokens, Q nodes of a row, L tokens of a row, N nodes, V vocabulary, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.speculative.acceptance import Chooser, walk
from intaglio.speculative.outputs import SpeculativeOutput, as_asked, gathered, going, streaming
from intaglio.speculative.prepacked_linear import prepacked
from intaglio.speculative.protocols import Drafter, Pass, PassingSession, Run, Step
from intaglio.speculative.request import Request, read_request
from intaglio.speculative.sequences import Row, end_together
from intaglio.speculative.statistics import Statistics
from intaglio.speculative.target_model import Reader, stack
from intaglio.speculative.tree import TokenTree, root_only


class Speculative:
    """Lossless speculative decoding as a `custom_generate` callable of stock `generate`.

    Decoders of every stock kind with full or sliding attention under SDPA or eager attention, any batch size with
    padding in front, greedy or sampling, with every logits processor and stopping criterion that `generate` builds or
    is given (stop strings as `stopping_criteria=[StopStringCriteria(tokenizer, ...)]`, since `generate` keeps the
    tokenizer to itself). A cache given to `generate` is filled and continued (one row).

    Args:
        drafter: where guesses come from.
        streamer: gets the prompt, each block of tokens as it is accepted, and the end; one row only. `generate` has an
            argument of the same name that never reaches a custom decoder: give it here.
        on_step: called with each row's `Step` after every pass, the prefill first; `step.drafted` of the tokens were
            drafted.
        generator: what draws come from. Default None: torch's global generator, as in stock `generate`.
        prepack: whether the passes on a CPU use copies of the linears' weights, laid out for a few tokens at a time (as
            much memory again as the weights take; they are kept for the next call). True: wherever that can be done.
            False: never, as stock `generate`. Default None: from 32 new tokens on, if there is memory for them.

    Attributes:
        statistics: of the last run.
    """

    def __init__(
        self,
        drafter: Drafter,
        *,
        streamer: Any = None,
        on_step: Callable[[Step], None] | None = None,
        generator: torch.Generator | None = None,
        prepack: bool | None = None,
    ) -> None:
        self.drafter = drafter
        self.streamer = streamer
        self.on_step = on_step
        self.generator = generator
        self.prepack = prepack
        self.statistics = Statistics()

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor | SpeculativeOutput:
        """Called by `model.generate(..., custom_generate=self)`.

        Args:
            model: the target.
            input_ids: the prompts [B, P].
            logits_processor: as `generate` made them.
            stopping_criteria: as `generate` made them.
            generation_config: the merged one.
            **model_kwargs: what `generate` prepared for the model.

        Returns:
            the prompts and their continuations [B, L], or a `SpeculativeOutput`.

        Raises:
            IntaglioError: something that the loop cannot honour, or a drafter that does not fit.
        """
        request = read_request(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        rows = request.ids_BP.shape[0]
        config = generation_config
        if rows > 1 and config.return_dict_in_generate and (config.output_scores or config.output_logits):
            raise IntaglioError(
                f"output_scores or output_logits was asked for with {rows} rows, which end after unlike numbers of "
                "passes; it is accepted with one row"
            )
        with streaming(self.streamer, request.ids_BP), torch.inference_mode():
            state = _State(self, model, request)
            ids_BL = state.run()
        return as_asked(request, ids_BL, self.statistics, state.chooser.scores, state.chooser.logits)


class _State:
    """One run of the loop.

    Args:
        decoder: drafter, streamer, callback, generator.
        model: the target.
        request: what was asked for.
    """

    def __init__(self, decoder: Speculative, model: Any, request: Request) -> None:
        self._began = time.perf_counter()
        self._decoder = decoder
        self._request = request
        self._counts = decoder.statistics = Statistics()
        self._model = model
        own = prepacked(model, decoder.prepack, request.room)
        self._reader = Reader(model, request.cache, hidden=decoder.drafter.needs_hidden, prepacked=own)
        shape = (request.ids_BP.shape[0], request.max_length)
        self._ids_BL = torch.full(shape, request.pad, device=request.ids_BP.device)
        self._rows = [Row(index, buffer_L, request) for index, buffer_L in enumerate(self._ids_BL)]
        self.chooser = Chooser(request, decoder.generator)
        self._vocabulary = self._reader.vocabulary
        self._session = self._timed(decoder.drafter.start, self._as_run())
        self._forward = self._session.forward if isinstance(self._session, PassingSession) else None

    def _as_run(self) -> Run:
        request = self._request
        real = request.ids_BP.tolist()
        if request.mask_BP is not None:
            shown = request.mask_BP.tolist()
            real = [[t for t, on in zip(ids, row, strict=True) if on] for ids, row in zip(real, shown, strict=True)]
        return Run(
            model=self._model,
            prompts=tuple(tuple(ids) for ids in real),
            sampling=bool(request.config.do_sample),
            config=request.config,
            limit=request.room,
            generator=self._decoder.generator,
            prepack=self._decoder.prepack,
        )

    def _timed(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call the drafter, on its own account."""
        start = time.perf_counter()
        with self._reader.linears:  # heads that draft call the target's own last linear
            found = function(*args)
        self._counts.drafter_seconds += time.perf_counter() - start
        return found

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
        self.chooser.prepare(logits_BV[:, None])
        steps = []
        for row in self._rows:
            logits_NV = logits_BV[row.index][None]
            tokens, _, _ = walk(self.chooser, row, row.index, root_only(row.last), logits_NV)
            hidden_BPD = self._reader.hidden_BQD
            hidden = None if hidden_BPD is None else hidden_BPD[row.index, self._reader.pads[row.index] :]
            steps.append(Step(row.index, tokens, 0, None, (), hidden, logits_NV, row.done))
        self._tell(steps)

    def _draft(self, rows: Sequence[Row]) -> list[TokenTree]:
        """A checked tree for every row."""
        rooms = [row.left - 1 for row in rows]
        trees: Sequence[TokenTree] = self._timed(self._session.propose, [row.index for row in rows], rooms)
        if len(trees) != len(rows):
            raise IntaglioError(
                f"{self._drafter} proposed {len(trees)} trees for {len(rows)} rows; one a row is needed"
            )
        for tree, row in zip(trees, rows, strict=True):
            if tree.tokens[0] != row.last:
                raise IntaglioError(
                    f"{self._drafter} proposed a tree with the root {tree.tokens[0]}; the last token emitted is "
                    f"{row.last}"
                )
            if max(tree.tokens) >= self._vocabulary:
                raise IntaglioError(
                    f"{self._drafter} proposed the token {max(tree.tokens)}; the target's vocabulary ends at "
                    f"{self._vocabulary - 1}"
                )
        return [tree.cut(room) for tree, room in zip(trees, rooms, strict=True)]

    @property
    def _drafter(self) -> str:
        return type(self._decoder.drafter).__name__

    def _pass(self, rows: list[Row]) -> None:
        """Draft, verify, emit and keep, once."""
        trees = self._draft(rows)
        inputs = self._reader.lay(*stack(trees))
        start = time.perf_counter()
        if self._forward is None:
            logits_BQV = self._reader.run(inputs)
        else:
            indices = [row.index for row in rows]
            with self._reader.linears:
                logits_BQV = self._forward(Pass(self._model, indices, trees, inputs, self._reader))
        self._counts.book(len(rows), start, self._model.device)
        self._reader.added(inputs)
        self.chooser.prepare(logits_BQV)
        steps, kept = [], []
        for place, (row, tree) in enumerate(zip(rows, trees, strict=True)):
            logits_NV = logits_BQV[place, : len(tree)]
            tokens, drafted, path = walk(self.chooser, row, place, tree, logits_NV)
            hidden_BQD = self._reader.hidden_BQD
            hidden = None if hidden_BQD is None else hidden_BQD[place, path]
            steps.append(Step(row.index, tokens, drafted, tree, path, hidden, logits_NV, row.done))
            kept.append(path)
            self._counts.nodes += len(tree) - 1
            self._counts.accepted += drafted
            self._counts.lengths.append(drafted)
        self._reader.keep(kept)
        self._tell(steps)

    def _tell(self, steps: list[Step]) -> None:
        """Hand the pass's tokens to everyone who listens."""
        if self._request.together:
            end_together(self._rows)
        self._timed(self._session.observe, steps)
        for step in steps:
            if self._decoder.streamer is not None:
                self._decoder.streamer.put(torch.tensor(step.tokens))
            if self._decoder.on_step is not None:
                self._decoder.on_step(step)
