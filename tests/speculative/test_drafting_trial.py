"""Drafts end where they are measured to lose, go on where they win, and the text is the target's own in both cases."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from intaglio.cli.tune import _heads
from intaglio.environment import tuning
from intaglio.environment.tuning import Tuner
from intaglio.methods.registry import get_method
from intaglio.speculative import DecodingRun, Session, Speculative, TokenTree, chain, root_only
from intaglio.speculative.drafting_trial import PASSES, PLAIN, on_trial, pass_ratio
from intaglio.speculative.pass_cost import SIZES, PassCosts
from tests.speculative.toys import Made, prompt, target
from tests.tuners import GivenTimes

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FREE = PassCosts(tuple((size, 1.0) for size in SIZES))
NEW = 3 * PASSES


class Drafts(Made):
    """Drafts the right next token at a cost, on trial; a pass without drafts takes a second."""

    def __init__(self, text: list[int], seconds: float, ran: float = 1.0) -> None:
        super().__init__(lambda row, ids, new, room: self._make_tree(ids, room))
        self.text, self.seconds, self.ran, self.now = text, seconds, ran, 0.0
        self.trees: list[int] = []

    def _make_tree(self, ids: list[int], room: int) -> TokenTree:
        self.now += self.seconds
        return chain(ids[-1], [self.text[len(ids)]]) if room else root_only(ids[-1])

    def clock(self) -> tuple[float, float]:
        self.now += 1.0
        return self.now, self.ran * self.now

    def start(self, run: DecodingRun) -> Session:
        session = on_trial(super().start(run), run, "drafting x", "n=1 drafts all the same", self.clock)
        propose = session.propose

        def counted(*given: Any) -> Any:
            trees = propose(*given)
            self.trees += map(len, trees)
            return trees

        session.propose = counted  # type: ignore[method-assign]
        return session


@pytest.mark.parametrize(("seconds", "pays"), [(0.9, True), (1.2, False)])
def test_drafts_end_where_a_pass_takes_longer_than_its_tokens_are_worth(seconds: float, pays: bool) -> None:
    model, ids = target("llama"), prompt(6)
    expected = model.generate(ids, max_new_tokens=NEW, **GREEDY)
    decoder = Speculative(Drafts(expected[0].tolist(), seconds))
    with tuning.using(tuner := Tuner()):
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, custom_generate=decoder, **GREEDY), expected)
        assert pass_ratio("drafting x") == pytest.approx(1 + seconds)
        assert pass_ratio("drafting y") is None
    assert tuner.used["drafting x"] == pytest.approx({"no drafts": 1.0, "drafts": 1 + seconds})
    trees = decoder.drafter.trees  # type: ignore[attr-defined]
    assert trees[: PLAIN + PASSES] == [1] * PLAIN + [2] * PASSES
    assert set(trees[PLAIN + PASSES : -1]) == {2 if pays else 1}
    note = f"drafting ended after {PLAIN + PASSES} passes, of which the last {PASSES} ran at 0.91 times the speed of "
    assert decoder.statistics.note == ("" if pays else f"{note}passes without drafts (n=1 drafts all the same)")


def test_known_times_are_not_measured_again_and_those_of_a_busy_machine_not_kept() -> None:
    model, ids = target("llama"), prompt(6)
    expected = model.generate(ids, max_new_tokens=NEW, **GREEDY)
    for known, kept in ((3.0, 3.0), (None, None)):
        decoder = Speculative(Drafts(expected[0].tolist(), 0.1, ran=0.5))
        with tuning.using(tuner := Tuner()):
            if known:
                tuner.keep("drafting x", {"no drafts": 1.0, "drafts": known})
            assert torch.equal(model.generate(ids, max_new_tokens=NEW, custom_generate=decoder, **GREEDY), expected)
            assert pass_ratio("drafting x") == kept
            assert tuner.busy == (not known)
        trees = decoder.drafter.trees  # type: ignore[attr-defined]
        assert trees[:PLAIN] == [2 if known else 1] * PLAIN
        assert (trees[PASSES + PLAIN] == 1) == bool(known)
        assert bool(decoder.statistics.note) == bool(known)


def test_a_fixed_table_keeps_what_it_has(tmp_path: Any) -> None:
    path = tmp_path / "table.json"
    path.write_text('{"times": {"a": {"no drafts": 1.0, "drafts": 2.0}}}')
    with tuning.using(tuner := Tuner(path, measured=False)):
        assert pass_ratio("a") == 2
        tuner.keep("b", {"no drafts": 1.0, "drafts": 2.0})
        assert pass_ratio("b") is None
    assert pass_ratio("a") is None  # off


@pytest.mark.parametrize("slug", ["chimera", "hidden_transfer"])
@pytest.mark.parametrize("rows", [1, 2])
def test_trained_heads_go_by_the_time_of_their_own_passes(slug: str, rows: int) -> None:
    model, ids = target("llama"), torch.cat([prompt(6, seed) for seed in range(rows)])
    expected = model.generate(ids, max_new_tokens=24, **GREEDY)
    decoder: Any = get_method(slug)(untrained=True)
    with tuning.using(tuner := GivenTimes(passes=dict.fromkeys(SIZES, 1.0))):
        assert torch.equal(model.generate(ids, max_new_tokens=24, custom_generate=decoder, **GREEDY), expected)
        assert decoder.statistics.nodes > 0
        tree = decoder.static_tree(rows, FREE)
        tuner.keep(key := decoder.drafting_key(model, tree, rows), {"no drafts": 1.0, "drafts": 99.0})
        assert decoder.expected_speed(tree, rows, FREE) > 1 > decoder.expected_speed(tree, rows, FREE, key)
        assert torch.equal(model.generate(ids, max_new_tokens=24, custom_generate=decoder, **GREEDY), expected)
    assert decoder.statistics.nodes == 0
    assert decoder.statistics.note.startswith("nothing was drafted: on this processor")


@pytest.mark.parametrize("slug", ["chimera", "hidden_transfer"])
def test_tune_measures_passes_with_drafts_ahead(slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "BUSY", 1.0)  # times are kept on a busy machine as well
    decoder: Any
    model, decoder = target("llama"), get_method(slug)(untrained=True)
    checkpoint: Any = SimpleNamespace(model=model, decoder=lambda name: decoder)
    with tuning.using(tuner := GivenTimes(passes=dict.fromkeys(SIZES, 1.0))):
        found = _heads(slug, checkpoint, FREE)
        (key,) = (key for key in tuner.used if key.startswith(f"drafting {slug} LlamaForCausalLM"))
        ratio = pass_ratio(key)
        assert ratio is not None
        assert found["speed"] == pytest.approx(decoder.static_tree(1, FREE).expected(decoder.acceptance) / ratio)
        passes = decoder.statistics.passes
        assert passes >= 1 + PLAIN + PASSES
        assert _heads(slug, checkpoint, FREE) == found
    assert decoder.statistics.passes == passes  # no second run
