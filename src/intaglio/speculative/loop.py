"""The loop that every speculative decoder runs through: draft a tree, verify it in one pass of the target, emit, keep.

    decoder = Speculative(PromptLookup())
    model.generate(**inputs, custom_generate=decoder, max_new_tokens=128)
    decoder.statistics.tokens_per_pass

A pass of the target reads the last token emitted and a tree of guesses after it. The default acceptance policy is
lossless: greedy output equals stock greedy `generate` up to floating point (a pass over several tokens rounds otherwise
than a pass over one, so two logits that are nearly tied may change places); sampled output has the target's
distribution for every tree (`sampling.py`). A session may bring a policy of its own (`AcceptingSession`).

Dimension letters: B rows, P prompt tokens, Q nodes of a row, L tokens of a row, N nodes, V vocabulary, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.speculative.acceptance import AcceptancePolicy, TokenSelector, verify_tree
from intaglio.speculative.chain_model import CachedChainModel, open_cached_model
from intaglio.speculative.outputs import SpeculativeOutput, active_rows, build_output, collect_rows, streaming
from intaglio.speculative.pass_cost import pass_costs
from intaglio.speculative.prepacked_linear import prepacked
from intaglio.speculative.protocols import AcceptingSession, DecodingRun, Drafter, ForwardSession, Step, TreePass
from intaglio.speculative.request import FiltersDrafts, Request, read_request
from intaglio.speculative.sequences import SequenceState, stop_together
from intaglio.speculative.statistics import Statistics
from intaglio.speculative.target_model import stack
from intaglio.speculative.tree import TokenTree, root_only


class Speculative:
    """Speculative decoding as a `custom_generate` callable of stock `generate`.

    Accepts decoders with full or sliding attention under SDPA or eager attention, any batch size with left padding
    (of models that read only chains, such as recurrent ones, one row without padding: `chain_model`), greedy
    decoding or sampling, every logits processor and stopping criterion that `generate` builds or gets (stop strings
    as `stopping_criteria=[StopStringCriteria(tokenizer, ...)]`, since `generate` does not pass the tokenizer on). A
    cache given to `generate` is filled and continued (one row).

    Args:
        drafter: source of the guesses.
        streamer: receives the prompt, each block of tokens as it is accepted, and the end; one row only. The argument
            of `generate` with the same name never reaches a custom decoder: pass it here.
        on_step: called with each row's `Step` after every pass, the prefill first.
        generator: source of the draws. Default None: torch's global generator, as in stock `generate`.
        prepack: the products of the linear layers in passes on a CPU. True: from copies of the weights laid out for a
            few tokens at a time, wherever possible (as much memory again as the weights take; kept for the next call).
            False: stock ones. Default None: from 32 new tokens on those that the first use on a machine measured to be
            the fastest for the layer and the number of tokens: stock, from a copy if there is memory for it, or our own
            from the weights as they lie.

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
        self.statistics = self._new_statistics()

    def _new_statistics(self) -> Statistics:
        make: Callable[[], Statistics] = getattr(self.drafter, "new_statistics", Statistics)
        return make()

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor | SpeculativeOutput:
        """Generate; called by `model.generate(..., custom_generate=self)`.

        Args:
            model: the target.
            input_ids: prompts [B, P].
            logits_processor: as `generate` built it.
            stopping_criteria: as `generate` built them.
            generation_config: the merged config.
            **model_kwargs: model arguments that `generate` prepared.

        Returns:
            prompts and continuations [B, L], or a `SpeculativeOutput`.

        Raises:
            IntaglioError: an option that the loop cannot honour, or a drafter that does not fit.
        """
        request = read_request(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        self.statistics = self._new_statistics()
        with streaming(self.streamer, request.ids_BP), torch.inference_mode():
            generation = _Generation(self, model, request)
            ids_BL = generation.run()
        selector = generation.selector
        return build_output(request, generation.cached, ids_BL, self.statistics, selector.scores, selector.logits)


class _Generation:
    """One call of `generate`."""

    def __init__(self, decoder: Speculative, model: Any, request: Request) -> None:
        self._began = time.perf_counter()
        self._decoder = decoder
        self._request = request
        self._counts = decoder.statistics
        self._model = model
        weights = prepacked(model, decoder.prepack, request.room)
        rows = len(request.ids_BP)
        self._costs = partial(pass_costs, model, rows, weights)
        self.cached = open_cached_model(model, request, decoder.drafter.needs_hidden, weights)
        shape = (rows, request.max_length)
        self._ids_BL = torch.full(shape, request.pad, device=request.ids_BP.device)
        self._rows = [SequenceState(index, buffer_L, request) for index, buffer_L in enumerate(self._ids_BL)]
        self.selector = TokenSelector(request, decoder.generator)
        self._session = self._timed(decoder.drafter.start, self._decoding_run())
        self._forward = self._session.forward if isinstance(self._session, ForwardSession) else None
        if self._forward is not None and isinstance(self.cached, CachedChainModel):
            raise IntaglioError(f"{self.cached.refusal}; {type(decoder.drafter).__name__} drafts inside such passes")
        self._accept: AcceptancePolicy = verify_tree
        self._filters = [processor for processor in request.processors if isinstance(processor, FiltersDrafts)]
        if isinstance(self._session, AcceptingSession):  # it may emit what no pass has verified
            self._accept, self._filters = self._session.accept, []

    def _decoding_run(self) -> DecodingRun:
        request = self._request
        prompts = request.ids_BP.tolist()
        if request.mask_BP is not None:
            masks = request.mask_BP.tolist()
            prompts = [
                [t for t, on in zip(ids, mask, strict=True) if on] for ids, mask in zip(prompts, masks, strict=True)
            ]
        return DecodingRun(
            model=self._model,
            prompts=tuple(tuple(ids) for ids in prompts),
            sampling=bool(request.config.do_sample),
            config=request.config,
            limit=request.room,
            generator=self._decoder.generator,
            prepack=self._decoder.prepack,
            costs=self._costs,
            branches=not isinstance(self.cached, CachedChainModel),
            statistics=self._counts,
        )

    def _timed(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call the drafter and add the time to its account."""
        start = time.perf_counter()
        with self.cached.linears:  # heads that draft call the target's own last linear
            result = function(*args)
        self._counts.drafter_seconds += time.perf_counter() - start
        return result

    def run(self) -> Tensor:
        """Generate, and return the padded rows [B, L]."""
        self._prefill()
        for rows in active_rows(self._rows, self.cached):
            self._pass(rows)
        ids_BL = collect_rows(self._request, self.cached, self._rows, self._ids_BL, self._counts)
        self._counts.seconds = time.perf_counter() - self._began
        return ids_BL

    def _prefill(self) -> None:
        start = time.perf_counter()
        logits_BV = self.cached.prefill(self._request.ids_BP, self._request.mask_BP)
        self._counts.record_pass(len(self._rows), start, self._model.device)
        self.selector.prepare(logits_BV[:, None])
        steps = []
        for row in self._rows:
            logits_1V = logits_BV[row.index][None]
            (first,) = verify_tree(self.selector, row, row.index, root_only(row.last), logits_1V)
            row.unread = first.tokens
            hidden_BPD = self.cached.hidden_BQD
            hidden = None if hidden_BPD is None else hidden_BPD[row.index, self.cached.pads[row.index] :]
            steps.append(Step(row.index, first.tokens, 0, None, (), hidden, logits_1V, row.done))
        self._report(steps)

    def _draft(self, rows: Sequence[SequenceState]) -> list[TokenTree]:
        """Return a checked tree for every row, no deeper than it can use."""
        room = [row.remaining - 1 for row in rows]
        trees: Sequence[TokenTree] = self._timed(self._session.propose, [row.index for row in rows], room)
        name, last_id = type(self._decoder.drafter).__name__, self.cached.vocabulary - 1
        if len(trees) != len(rows):
            raise IntaglioError(f"{name} proposed {len(trees)} trees for {len(rows)} rows; one per row is needed")
        for tree, row in zip(trees, rows, strict=True):
            if list(tree.tokens[: len(row.unread)]) != row.unread:
                raise IntaglioError(
                    f"{name} proposed a tree with the root {tree.tokens[0]}; the last token emitted is {row.unread[0]}"
                )
            if max(tree.tokens) > last_id:
                raise IntaglioError(
                    f"{name} proposed the token {max(tree.tokens)}; the target's vocabulary ends at {last_id}"
                )
        for each in self._filters:
            trees = [
                tree.filtered(each.allowed_nodes(row.ids[0].tolist(), tree.tokens, tree.parents))
                for tree, row in zip(trees, rows, strict=True)
            ]
        return [self.cached.fit(tree, len(row.unread), most) for tree, row, most in zip(trees, rows, room, strict=True)]

    def _pass(self, rows: list[SequenceState]) -> None:
        """Draft, verify, emit and keep, once."""
        trees = self._draft(rows)
        inputs = self.cached.prepare_inputs(*stack(trees))
        start = time.perf_counter()
        if self._forward is None:
            logits_BQV = self.cached.forward(inputs)
        else:
            indices = [row.index for row in rows]
            with self.cached.linears:
                logits_BQV = self._forward(TreePass(self._model, indices, trees, inputs, self.cached))
        self._counts.record_pass(len(rows), start, self._model.device)
        self.cached.commit(inputs)
        self.selector.prepare(logits_BQV)
        steps, kept = [], []
        for index, (row, tree) in enumerate(zip(rows, trees, strict=True)):
            logits_NV = logits_BQV[index, : len(tree)]
            accepted = self._accept(self.selector, row, index, tree, logits_NV)
            for part in accepted:
                hidden_BQD = self.cached.hidden_BQD
                hidden = None if hidden_BQD is None else hidden_BQD[index, part.path]
                done = row.done and part is accepted[-1]
                steps.append(Step(row.index, part.tokens, part.drafted, tree, part.path, hidden, logits_NV, done))
            kept.append([node for part in accepted for node in part.path])
            tokens = [token for part in accepted for token in part.tokens]
            row.unread = tokens[len(kept[-1]) - len(row.unread) :]
            drafted = sum(part.drafted for part in accepted)
            self._counts.nodes += sum(part.tried for part in accepted)
            self._counts.accepted += drafted
            self._counts.lengths.append(drafted)
        self.cached.keep_rows(kept)
        self._report(steps)

    def _report(self, steps: list[Step]) -> None:
        """Pass the steps to the session, the streamer and the callback."""
        if self._request.together:
            stop_together(self._rows)
        self._timed(self._session.observe, steps)
        for step in steps:
            if self._decoder.streamer is not None:
                self._decoder.streamer.put(torch.tensor(step.tokens))
            if self._decoder.on_step is not None:
                self._decoder.on_step(step)
