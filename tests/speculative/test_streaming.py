"""What listens to a run: streamer, callback, statistics, drafters that read hidden states or make the pass."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from intaglio.speculative import DecodingRun, Speculative, Step, TokenTree, TreePass, chain, root_only
from tests.families import tiny_tokenizer
from tests.speculative.toys import Made, mixed, oracle, prompt, ragged, target


class _Notes(BaseStreamer):
    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ended += 1


def test_the_streamer_gets_the_prompt_then_each_block_then_the_end() -> None:
    model, ids = target("llama"), prompt(9)
    expected = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None)
    notes, steps = _Notes(), []
    decoder = Speculative(oracle(expected[:, 9:].tolist(), 4), streamer=notes, on_step=steps.append)
    model.generate(ids, custom_generate=decoder, do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert notes.puts[0] == ids[0].tolist()
    assert [len(block) for block in notes.puts[1:]] == [1, 5, 5, 1]
    assert [token for block in notes.puts[1:] for token in block] == expected[0, 9:].tolist()
    assert notes.ended == 1
    assert [(len(step.tokens), step.drafted, step.done) for step in steps] == [
        (1, 0, False), (5, 4, False), (5, 4, False), (1, 0, True),
    ]  # fmt: skip


def test_the_streamer_is_ended_when_the_run_fails() -> None:
    notes = _Notes()

    def fail(row: int, ids: list[int], new: int, room: int) -> TokenTree:
        raise RuntimeError("no draft today")

    with pytest.raises(RuntimeError, match="no draft today"):
        target("llama").generate(prompt(3), custom_generate=Speculative(Made(fail), streamer=notes), max_new_tokens=4)
    assert notes.ended == 1


def test_a_thread_may_read_the_text_as_it_comes() -> None:
    model, ids, tokenizer = target("llama"), prompt(9), tiny_tokenizer("llama")
    expected = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    decoder = Speculative(oracle(expected[:, 9:].tolist()), streamer=streamer)
    options = {"custom_generate": decoder, "do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs=options)
    thread.start()
    assert "".join(streamer) == tokenizer.decode(expected[0, 9:])
    thread.join()


class _Reading:
    """A drafter that checks what it is told against plain passes, and drafts inside the target's pass or not."""

    needs_hidden = True

    def __init__(self, model: Any, answers: list[list[int]], inside: bool) -> None:
        self.model, self.answers, self.inside = model, answers, inside

    def start(self, run: DecodingRun) -> Any:
        self.seen = [list(ids) for ids in run.prompts]
        self.starts = [len(ids) for ids in self.seen]
        self.steps = 0
        return _Inside(self) if self.inside else _Outside(self)


class _Outside:
    def __init__(self, drafter: _Reading) -> None:
        self.drafter = drafter

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> list[TokenTree]:
        trees = []
        for row in rows:
            ids = self.drafter.seen[row]
            new = len(ids) - self.drafter.starts[row]
            trees.append(chain(ids[-1], self.drafter.answers[row][new : new + 2]))
        return trees

    def observe(self, steps: Sequence[Step]) -> None:
        for step in steps:
            ids = self.drafter.seen[step.row]
            if step.tree is not None:
                assert [step.tree.tokens[node] for node in step.path] == [ids[-1], *step.tokens[:-1]]
                assert step.logits.shape == (len(step.tree), 160)
            read = ids if step.tree is None else [*ids, *step.tokens[:-1]]
            hidden = self.drafter.model.model(torch.tensor([read])).last_hidden_state[0]
            new = len(ids) if step.tree is None else len(step.tokens)
            assert step.hidden is not None
            torch.testing.assert_close(step.hidden, hidden[-new:], rtol=0, atol=5e-5)
            ids += step.tokens
            self.drafter.steps += 1


class _Inside(_Outside):
    """Makes the pass itself, with one more token behind each tree, which it then takes out of the cache again."""

    def forward(self, call: TreePass) -> torch.Tensor:
        cached, inputs = call.cached, call.inputs
        rows, nodes = inputs.tokens_BQ.shape
        tokens = torch.cat([inputs.tokens_BQ, torch.full((rows, 1), 7)], 1)
        positions = torch.cat([inputs.positions_BQ, inputs.positions_BQ[:, :1] + 1], 1)
        visible = torch.nn.functional.pad(inputs.visible_BQK, (0, 1, 0, 1))
        visible[:, -1] = visible[:, 0]  # it sees what the root sees, and itself
        visible[:, -1, -1] = True
        logits = cached.forward(type(inputs)(tokens, positions, visible, cached.masks(visible, positions)))
        cached.cache.crop(-1)
        if cached.hidden_BQD is not None:
            cached.hidden_BQD = cached.hidden_BQD[:, :nodes]
        return logits[:, :nodes]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_drafters_read_the_kept_hidden_states_and_may_make_the_pass(family: str, inside: bool) -> None:
    model = target(family)
    for inputs in ({"input_ids": prompt(9)}, ragged([4, 9, 7])):
        options = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": [33, 15], "pad_token_id": 0}
        expected = model.generate(**inputs, **options)
        answers = expected[:, inputs["input_ids"].shape[1] :].tolist()
        drafter = _Reading(model, answers, inside)
        decoder = Speculative(drafter)
        assert torch.equal(model.generate(**inputs, custom_generate=decoder, **options), expected)
        assert drafter.steps == decoder.statistics.row_passes


def test_the_statistics_add_up() -> None:
    model, inputs = target("llama"), ragged([4, 9])
    options = {"do_sample": False, "max_new_tokens": 14, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    decoder, steps = Speculative(mixed(expected[:, 9:].tolist(), seed=5)), []
    decoder.on_step = steps.append
    model.generate(**inputs, custom_generate=decoder, **options)
    found = decoder.statistics
    assert found.tokens == 28 == sum(len(step.tokens) for step in steps)
    assert found.accepted == sum(step.drafted for step in steps) == sum(found.lengths)
    assert found.nodes == sum(len(step.tree) - 1 for step in steps if step.tree is not None)
    assert found.row_passes == len(steps) == len(found.lengths) + 2
    assert found.tokens_per_pass == 28 / found.row_passes
    assert found.accepted_share == found.accepted / found.nodes
    assert found.drafted_share == found.accepted / 28
    assert min(found.model_seconds, found.drafter_seconds, found.loop_seconds) > 0
    assert found.as_dict()["tokens_per_pass"] == found.tokens_per_pass
    assert Speculative(Made(lambda *_: root_only(0))).statistics.as_dict()["tokens_per_pass"] == 0.0
