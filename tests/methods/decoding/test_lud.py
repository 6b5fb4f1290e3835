"""LUD: units, rows with PADs, the beta rule and decoding as the method has them; lossless where it says so."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM
from transformers.generation.stopping_criteria import MaxTimeCriteria, StopStringCriteria
from transformers.generation.streamers import TextStreamer

from intaglio.checkpoint import Checkpoint, load
from intaglio.checkpoint.from_scratch import new
from intaglio.errors import IntaglioError
from intaglio.methods.decoding.lud import CAP, LUD, NOTE, TOKEN, data_layout
from intaglio.methods.decoding.lud.acceptance import RepeatsText, RepetitionGuard, accept_confident, repeats_id
from intaglio.methods.decoding.lud.lexical_units import confident, identify, remainders, spans, units, units_of
from intaglio.methods.decoding.lud.statistics import UnitStatistics
from intaglio.recipe.run import carve
from intaglio.recipe.schema import Recipe
from intaglio.speculative import Speculative, Step
from intaglio.trainer import CausalLM, KeyedRNG, train
from intaglio.trainer.causal_lm import IGNORED, packed
from tests.alive import alive, drafted, refused, taught
from tests.families import DECODERS, EOS, VOCAB, tiny_checkpoint_dir, tiny_model, tiny_tokenizer
from tests.speculative.toys import DESIGN_DECODERS, prompt, ragged, target
from tests.trainer.helpers import TEXTS, checkpoint, run, same, weights

# Lossless where it verifies, or is never sure enough; PAD is a token of the vocabulary, so that it decodes untrained.
EXAMPLES = (
    {"length": 24, "pad_token": 3, "alpha": 0.0, "verify": True, "beta": 0.0},
    {"length": 24, "pad_token": 3, "alpha": 0.0, "verify": True, "cap": 3, "layout": "truncated", "identify": "before"},
    {"length": 24, "pad_token": 3, "alpha": 0.0, "beta": 1.01, "pack": False},
)
BASE = {"length": 100, "pad_token": 3, "alpha": 0.0, "beta": 0.0, "verify": True}
ALIVE = {
    "alpha": 0.2,
    "cap": 3,
    "top1": alive(True, alpha=0.001),
    "identify": alive("before", alpha=0.006),
    "layout": "truncated",
    "places": "start",
    "anchors": 2,
    "weight": 0.5,
    "length": 48,
    "pack": False,
    "chat": False,
    "pad_token": 4,
    "grow": refused(False, pad_token=None),
    "beta": 1.01,
    "guard": "test_the_guard_stops_and_is_counted",
    "verify": False,
}


def observe(method: LUD) -> Any:
    pairs = [{"prompt": "the fox", "answer": text[10:30]} for text in TEXTS]
    return taught(method, pairs), drafted(method)


PAD = 3
DRAWS = KeyedRNG(0)
IDS = torch.randint(8, 150, (6, 16), generator=torch.Generator().manual_seed(0))
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14}


def lud(**fields: Any) -> LUD:
    return LUD(**{"pad_token": PAD, **fields})


def rows(*lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Packed rows of documents of these lengths."""
    found = []
    for number, sizes in enumerate(lengths):
        ids = torch.randint(8, 150, (sum(sizes),), generator=torch.Generator().manual_seed(number))
        found.append({"input_ids": ids, "labels": ids, "lengths": torch.tensor(sizes), "id": number, "epoch": 0})
    return found


# --- units -----------------------------------------------------------------------------------------------------------


def test_the_worked_example_of_units() -> None:
    assert identify((0.3, 0.95, 0.97, 0.5, 0.92), alpha=0.9, cap=8) == [(0, 2), (3, 4)]
    assert identify((0.3, 0.95, 0.97, 0.5, 0.92), alpha=0.9, cap=2) == [(0, 1), (2, 2), (3, 4)]
    assert identify((0.3, 0.95, 0.97, 0.5, 0.92), alpha=1.01, cap=8) == [(n, n) for n in range(5)]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30), st.integers(1, 5))
def test_units_are_the_longest_runs_that_fit(flags: list[tuple[bool, bool]], cap: int) -> None:
    joins, can = [join for join, _ in flags], [ok for _, ok in flags]
    found = units(joins, can, cap)
    assert [place for begin, end in found for place in range(begin, end + 1)] == [n for n, ok in enumerate(can) if ok]
    for begin, end in found:
        assert end - begin < cap
        assert all(joins[begin + 1 : end + 1])
        # Where it ends, a token may not join, or there is no room.
        after = end + 1
        assert after == len(flags) or not can[after] or not joins[after] or end - begin + 1 == cap


def test_probabilities_are_the_models_and_documents_are_apart() -> None:
    model = tiny_model("llama", layers=2)
    (row,) = rows([7, 9])
    parts = row["input_ids"].split([7, 9])
    with torch.no_grad():
        laws = [model(part[None]).logits[0].softmax(-1) for part in parts]
    chances = [law[:-1].gather(1, part[1:, None])[:, 0].tolist() for law, part in zip(laws, parts, strict=True)]
    # Halfway between two probabilities, so that rounding decides nothing.
    middle = sum(sorted(chances[0] + chances[1])[6:8]) / 2
    for top1 in (False, True):
        expected = []
        for law, part, found in zip(laws, parts, chances, strict=True):
            best = law.argmax(-1)[:-1] == part[1:]
            expected += [False, *(p >= middle and (not top1 or bool(ok)) for p, ok in zip(found, best, strict=True))]
        (joins,) = confident(model, [row], middle, top1)
        assert joins.tolist() == expected
    assert not model.training


def test_only_what_is_learnt_has_units() -> None:
    (row,) = rows([5, 6])
    row["labels"] = row["labels"].clone()
    row["labels"][:2] = IGNORED
    found = units_of(row, torch.tensor([False] + [True] * 4 + [False] + [True] * 5), 3)
    assert found == [(2, 4), (5, 7), (8, 10)]
    # The second has no token of its document before it, so nothing to be read from.
    assert spans(row, found) == [(2, 4), (8, 10)]
    whole = units_of(row, torch.tensor([False] + [True] * 4 + [False] + [True] * 5), 11)
    assert whole == [(2, 4), (5, 10)]
    # From each place on: what is left, as many tokens as fit.
    assert remainders(row, whole, 3) == [(2, 4), (3, 4), (6, 8), (7, 9), (8, 10), (9, 10)]


# --- rows with PADs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DECODERS)
def test_pads_of_a_packed_row_are_those_of_a_row_of_their_own(family: str, implementation: str) -> None:
    model = tiny_model(family, layers=4 if family == "gemma3" else 2, dtype=torch.float64)
    model.set_attn_implementation(implementation)
    some, chosen = rows([4, 13], [9]), [[(2, 3), (7, 10), (12, 14)], [(1, 4)]]
    near = 1e-9 if implementation == "sdpa" else 1e-5  # the eager softmax is of float32
    batch = data_layout.packed(some, chosen, PAD)
    with torch.no_grad():
        logits = data_layout.logits(model, batch)
        for place, (row, found) in enumerate(zip(some, chosen, strict=True)):
            ids, slot = row["input_ids"], len(row["input_ids"])
            for document, first in zip(ids.split(row["lengths"].tolist()), [0, 4], strict=False):
                plain = model(document[None]).logits[0]
                assert torch.allclose(logits[place, first : first + len(document)], plain, atol=near)
            for begin, end in found:
                before = ids[4 if len(row["lengths"]) > 1 and begin > 4 else 0 : begin]
                for count in range(1, end - begin + 1):
                    alone = model(torch.cat([before, torch.full((count,), PAD)])[None]).logits[0, -1]
                    assert torch.allclose(logits[place, slot], alone, atol=near)
                    assert batch["pads"][place, slot] == ids[begin + count]
                    slot += 1


@pytest.mark.parametrize("family", DESIGN_DECODERS)
def test_both_layouts_have_the_same_loss_and_gradient(family: str) -> None:
    model = target(family)
    some, chosen = rows([4, 13], [9]), [[(2, 3), (7, 10), (12, 14)], []]
    found = []
    for batch in (data_layout.packed(some, chosen, PAD), data_layout.truncated(some, chosen, PAD, 3, 128)):
        loss = LUD(weight=0.7).loss(model, batch | {"unit_length": torch.tensor(1.0)})
        weights = [model.get_input_embeddings().weight, *model.base_model.layers[0].parameters()]
        found.append((loss.parts["next_token"], loss.parts["units"], *torch.autograd.grad(loss.total, weights)))
        assert batch["weight"] == 3 + 12 + 8
        assert loss.parts["pads"] == 1 + 3 + 2
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*found, strict=True))


def test_who_sees_whom() -> None:
    (row,) = rows([2, 4])
    batch = data_layout.packed([row, *rows([3])], [[(3, 5)], []], PAD)
    seen = data_layout.visible(batch)[0].int().tolist()
    #                 two documents  PADs of the anchor at 2
    assert seen == [[1, 0, 0, 0, 0, 0, 0, 0],
                    [1, 1, 0, 0, 0, 0, 0, 0],
                    [0, 0, 1, 0, 0, 0, 0, 0],
                    [0, 0, 1, 1, 0, 0, 0, 0],
                    [0, 0, 1, 1, 1, 0, 0, 0],
                    [0, 0, 1, 1, 1, 1, 0, 0],
                    [0, 0, 1, 0, 0, 0, 1, 0],
                    [0, 0, 1, 0, 0, 0, 1, 1]]  # fmt: skip
    assert batch["position_ids"][0].tolist() == [0, 1, 0, 1, 2, 3, 1, 2]
    assert batch["input_ids"][0, 6:].tolist() == [PAD, PAD]
    assert batch["pads"][0].tolist() == [IGNORED] * 6 + row["input_ids"][4:6].tolist()


def test_a_truncated_row_ends_with_pads_and_only_the_unit_has_targets() -> None:
    (row,) = rows([2, 6])
    batch = data_layout.truncated([row], [[(4, 5)]], PAD, 3, 128)
    assert batch["input_ids"][1].tolist() == [*row["input_ids"][2:4].tolist(), PAD, PAD, PAD, 0, 0, 0]
    assert batch["pads"][1].tolist() == [IGNORED, IGNORED, int(row["input_ids"][5])] + [IGNORED] * 5
    assert (batch["target"][1] == IGNORED).all()


def prepared(ckpt: Checkpoint, data: Any = IDS, **fields: Any) -> tuple[LUD, list[dict[str, Any]]]:
    method = lud(**{"length": 16, "alpha": 0.0, **fields})
    examples = [{**(row if isinstance(row, dict) else {"input_ids": row}), "id": n} for n, row in enumerate(data)]
    made = method.prepare(ckpt, examples, DRAWS)
    return method, [{**row, "id": n, "epoch": 0, "step": 0} for n, row in enumerate(made)]


def test_found_during_training_or_before_it_the_first_loss_is_the_same() -> None:
    found = []
    for when in ("during", "before"):
        for layout in ("packed", "truncated"):
            ckpt = checkpoint()
            method, made = prepared(ckpt, identify=when, layout=layout, alpha=0.01, anchors=3)
            batch = method.collate(made, DRAWS)
            assert batch["weight"] == 6 * 15
            found.append(method.loss(ckpt.model, batch))
    assert len({round(loss.total.item(), 4) for loss in found}) == 1
    assert all(set(loss.parts) == {"next_token", "units", "pads", "unit_length"} for loss in found)
    assert found[0].parts["pads"] > 0
    assert found[0].parts["unit_length"] > 1
    assert torch.allclose(found[0].total, found[0].parts["next_token"] + found[0].parts["units"])


def test_anchors_are_drawn_anew_each_epoch() -> None:
    ckpt = checkpoint()
    method, made = prepared(ckpt, identify="before", anchors=1, cap=2)
    first, again = (method.collate(made, DRAWS)["position_ids"] for _ in range(2))
    later = method.collate([{**row, "epoch": 1} for row in made], DRAWS)["position_ids"]
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_without_units_it_trains_like_next_token_prediction() -> None:
    one, two = checkpoint(), checkpoint()
    done = run(one, objective=lud(length=24, alpha=1.01))
    run(two, objective=CausalLM(length=24))
    assert same(weights(one), weights(two))
    assert all(line.parts["units"] == 0 == line.parts["pads"] for line in done.history)
    assert all(line.parts["next_token"] == pytest.approx(line.loss) for line in done.history)


def test_answers_have_units_and_prompts_have_none() -> None:
    ckpt = checkpoint()
    pairs = [{"prompt": "what is the name of it?", "answer": "the quick brown fox"}] * 3
    method, made = prepared(ckpt, pairs, length=64, identify="before", chat=False)
    assert len(made) == 2  # whole pairs fill a row
    for row in made:
        learnt = row["labels"] != IGNORED
        for begin, end in row["units"].tolist():
            assert learnt[begin : end + 1].all()
        assert int(row["counts"][0]) == int(learnt.sum())
    batch = method.collate(made, DRAWS)
    assert batch["weight"] == sum(int((row["labels"] != IGNORED).sum()) for row in made)


def test_a_token_is_added_noted_and_never_said(tmp_path: Path) -> None:
    ckpt = checkpoint("gemma3")
    run(ckpt, objective=LUD(length=24, alpha=0.0, cap=3), steps=2)
    ckpt.save(tmp_path / "out")
    back = load(tmp_path / "out")
    assert getattr(back.model.config, NOTE) == {"pad": VOCAB, "cap": 3, "vocabulary": VOCAB + 1}
    assert back.tokenizer.convert_tokens_to_ids(TOKEN) == VOCAB
    assert back.model.generation_config.suppress_tokens == [VOCAB]
    ids, decoder = prompt(6), LUD(beta=0.0)
    found = back.model.generate(ids, **GREEDY, custom_generate=decoder)
    assert VOCAB not in found
    assert max(decoder.statistics.spans) == 3
    assert torch.equal(
        back.model.generate(ids, **GREEDY, custom_generate=LUD(verify=True, beta=0.0)),
        back.model.generate(ids, **GREEDY),
    )


def test_pads_row_is_trained() -> None:
    ckpt = checkpoint("llama")
    method, made = prepared(ckpt, pad_token=None)
    method.loss(ckpt.model, method.collate(made, DRAWS)).total.backward()
    assert ckpt.model.get_input_embeddings().weight.grad[VOCAB].any()


# --- the rule --------------------------------------------------------------------------------------------------------


def never(previous: int, token: int) -> bool:
    return False


@pytest.mark.parametrize(
    ("sure", "tokens", "taken"),
    [
        ((0.55, 0.9, 0.95, 0.6), (1, 2, 3, 4), 1),
        ((0.95, 0.85, 0.7, 0.99), (1, 2, 3, 4), 2),
        ((0.9, 0.9, 0.9, 0.9), (5, 7, 7, 2), 2),
        ((0.9, 0.9, 0.9, 0.9), (5, 6, 7, 2), 4),
        ((0.8,), (5,), 1),
    ],
)
def test_the_worked_examples_of_the_rule(sure: Sequence[float], tokens: Sequence[int], taken: int) -> None:
    assert list(accept_confident(zip(tokens, sure, strict=True), 0.8, repeats_id)) == list(tokens[:taken])


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1)), min_size=1, max_size=6), st.floats(0, 1.1))
def test_lower_thresholds_never_take_less(slots: list[tuple[int, float]], beta: float) -> None:
    strict = list(accept_confident(slots, beta, never))
    most = next((n for n, (_, sure) in enumerate(slots) if sure < beta), len(slots))
    assert strict == [token for token, _ in slots[: max(1, most)]]
    for stop in (never, repeats_id):
        lengths = [len(list(accept_confident(slots, limit, stop))) for limit in (beta, beta / 2, 0.0)]
        assert lengths == sorted(lengths)


def test_what_repeats() -> None:
    texts = dict(enumerate(["a", " a", "return", "returns", " return(", "r", " ", "\n", "turn"]))
    repeats = RepeatsText(SimpleNamespace(decode=lambda ids: texts[ids[0]]))
    assert [pair for pair in itertools.product(texts, texts) if repeats(*pair)] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (2, 3), (2, 4), (3, 3), (4, 4), (5, 5), (6, 6), (7, 7), (8, 8)
    ]  # fmt: skip
    counts = UnitStatistics()
    assert [RepetitionGuard(repeats_id, stops, counts)(5, 5) for stops in (True, False)] == [True, False]
    assert not RepetitionGuard(repeats_id, True, counts)(5, 6)
    assert (counts.confident, counts.repeated, counts.duplicated_share) == (3, 2, pytest.approx(2 / 3))


# --- decoding --------------------------------------------------------------------------------------------------------


def slowly(model: Any, ids: torch.Tensor, new: int, beta: float, cap: int, stop: Any) -> tuple[list[int], list[int]]:
    """The words of the method, a whole forward pass each step; new tokens and the spans behind the first token."""
    seen, lengths = ids[0].tolist(), []
    end = len(seen) + new
    while len(seen) < end:
        slots = cap if lengths or len(seen) > ids.shape[1] else 1
        with torch.no_grad():
            logits = model(torch.tensor([[*seen, *[PAD] * (slots - 1)]])).logits[0, len(seen) - 1 :]
        sure, tokens = logits.float().softmax(-1).max(-1)
        taken = list(accept_confident(zip(tokens.tolist(), sure.tolist(), strict=True), beta, stop))
        if len(seen) > ids.shape[1]:
            lengths.append(min(len(taken), end - len(seen)))
        seen = (seen + taken)[:end]
        if EOS in seen[ids.shape[1] :]:
            seen = seen[: seen.index(EOS, ids.shape[1]) + 1]
            lengths[-1] -= sum(lengths) + 1 - (len(seen) - ids.shape[1])
            break
    return seen, lengths


@pytest.mark.parametrize("family", DESIGN_DECODERS)
def test_it_says_what_whole_passes_say(family: str) -> None:
    model = target(family)
    for seed, beta, cap in ((0, 0.0, 4), (1, 0.4, 3), (2, 0.6, 2)):
        ids, decoder = prompt(5 + seed, seed), lud(beta=beta, cap=cap)
        found = model.generate(ids, do_sample=False, max_new_tokens=17, custom_generate=decoder)
        expected, lengths = slowly(model, ids, 17, beta, cap, repeats_id)
        assert found[0].tolist() == expected
        counts = decoder.statistics
        assert [length + 1 for length in counts.lengths] == lengths
        assert sum(span * count for span, count in counts.spans.items()) == len(expected) - ids.shape[1] - 1
        assert counts.passes == len(lengths) + 1
        assert counts.tokens == len(expected) - ids.shape[1]


@pytest.mark.parametrize("fields", [{"beta": 1.01}, {"cap": 1}, {"verify": True, "beta": 0.0}, {"verify": True}])
@pytest.mark.parametrize("family", DESIGN_DECODERS)
def test_it_is_stock_for_rows_of_unlike_length(family: str, fields: dict[str, Any]) -> None:
    model, batch = target(family), ragged([9, 4, 12])
    options = {**GREEDY, "repetition_penalty": 1.2}
    decoder = lud(**fields)
    assert torch.equal(model.generate(**batch, **options, custom_generate=decoder), model.generate(**batch, **options))
    if not decoder.verify:
        assert decoder.statistics.spans == {1: len(decoder.statistics.lengths)}
    assert decoder.statistics.agreement == 1


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_batch_says_what_its_rows_say(family: str) -> None:
    model, batch = target(family), ragged([9, 4, 12])
    decoder, lengths = lud(beta=0.0), []
    found = model.generate(**batch, **GREEDY, custom_generate=decoder)
    for row, mask, whole in zip(batch["input_ids"], batch["attention_mask"], found, strict=True):
        ids = row[mask.bool()][None]
        alone = lud(beta=0.0)
        expected = model.generate(ids, **GREEDY, custom_generate=alone)[0, ids.shape[1] :].tolist()
        assert whole[len(row) :].tolist()[: len(expected)] == expected
        lengths += alone.statistics.lengths
    assert sorted(decoder.statistics.lengths) == sorted(lengths)


def test_pads_leave_slot_one_alone_and_are_not_kept() -> None:
    for family in DESIGN_DECODERS:
        model, ids = target(family), prompt(9)
        with torch.no_grad():
            plain, with_pads = model(ids).logits, model(torch.cat([ids, torch.full((1, 3), PAD)], 1)).logits
        assert torch.allclose(plain[:, -1], with_pads[:, 8], atol=1e-5)
    kept: Any = None
    for verify in (False, True):
        found = target("llama").generate(
            ids, **GREEDY, custom_generate=lud(beta=0.0, verify=verify), return_dict_in_generate=True
        )
        kept = found.get("cache", found.get("past_key_values"))
        length = kept.get_seq_length()
        assert found.sequences.shape[1] - 4 <= length < found.sequences.shape[1]
        with torch.no_grad():
            fresh = target("llama")(found.sequences[:, :length], use_cache=True)
        fresh = fresh.get("cache", fresh.get("past_key_values"))
        assert torch.allclose(kept.layers[-1].keys, fresh.layers[-1].keys, atol=1e-9)


def test_agreement_is_what_the_unaided_model_says() -> None:
    model, ids, decoder = target("llama"), prompt(8), lud(beta=0.0, guard="none")
    found = model.generate(ids, do_sample=False, max_new_tokens=40, eos_token_id=None, custom_generate=decoder)
    counts = decoder.statistics
    with torch.no_grad():
        said = model(found).logits[0].argmax(-1)[:-1]
    agrees = (said == found[0, 1:])[ids.shape[1] - 1 :].tolist()
    seen = counts.tokens - counts.lengths[-1]  # the last pass's are not read again
    assert counts.checked == counts.accepted - counts.lengths[-1]
    assert counts.agreement == pytest.approx(sum(agrees[:seen]) / seen)
    assert 0 < counts.agreement < 1
    assert counts.threshold == 0
    assert counts.speed_up == counts.tokens_per_pass > 2
    assert json.loads(json.dumps(counts.as_dict()))["agreement"] == counts.agreement
    assert {"threshold", "agreement", "speed_up"} <= set(counts.as_dict())
    assert UnitStatistics(tokens=10, accepted=6, checked=5, agreed=3).agreement == pytest.approx(7 / 9)


@pytest.mark.parametrize("verify", [False, True])
def test_a_draw_is_stocks_where_one_token_comes_at_a_time(verify: bool) -> None:
    model, batch = target("llama"), ragged([9, 4])
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "top_k": 20, "max_new_tokens": 12}
    torch.manual_seed(7)
    expected = model.generate(**batch, **options)
    torch.manual_seed(7)
    assert torch.equal(model.generate(**batch, **options, custom_generate=lud(beta=1.01, verify=verify)), expected)


def test_verified_draws_are_stocks_draws() -> None:
    model, ids = target("llama"), prompt(9)
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.3, "max_new_tokens": 30, "eos_token_id": None}
    for seed in range(3):
        torch.manual_seed(seed)
        expected = model.generate(ids, **options)
        torch.manual_seed(seed)
        decoder = lud(beta=0.0, verify=True, guard="none")
        assert torch.equal(model.generate(ids, **options, custom_generate=decoder), expected)
        assert decoder.statistics.nodes > 30


def test_only_the_first_slot_is_drawn() -> None:
    model, ids = target("llama"), prompt(8)
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 24, "eos_token_id": None}
    found = []
    for seed in (0, 0, 1):
        steps: list[Step] = []
        decoder = lud(beta=0.0, on_step=steps.append, generator=torch.Generator().manual_seed(seed))
        ids_1L = model.generate(ids, **options, custom_generate=decoder)
        found.append(ids_1L)
        place = ids.shape[1]
        for step in steps:
            if step.drafted:
                # Read from what was there before the pass, never from the token that was drawn in it.
                before = torch.cat([ids_1L[:, : place - 1], torch.full((1, 3), PAD)], 1)
                with torch.no_grad():
                    slots = model(before).logits[0, -3:].argmax(-1).tolist()
                assert list(step.tokens) == slots[: step.drafted]
            place += len(step.tokens)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("verify", [False, True])
def test_what_ends_a_row_ends_it_inside_a_span(verify: bool) -> None:
    model, ids = target("llama"), prompt(8)
    free = model.generate(ids, **GREEDY, eos_token_id=None, custom_generate=lud(beta=0.0, verify=verify))[0].tolist()
    stop = free[ids.shape[1] + 2]  # the second of a span
    found = model.generate(ids, **GREEDY, eos_token_id=[stop], custom_generate=lud(beta=0.0, verify=verify))
    assert found[0].tolist() == free[: free.index(stop, ids.shape[1]) + 1]
    tokenizer = tiny_tokenizer("llama")
    text = tokenizer.decode(free[ids.shape[1] + 4])
    criteria = [StopStringCriteria(tokenizer, text), MaxTimeCriteria(60.0)]
    for limits in ({"stopping_criteria": criteria}, {"max_new_tokens": 6}, {"max_length": 11}):
        options = {**GREEDY, "eos_token_id": None, **limits}
        if "max_length" in limits:
            del options["max_new_tokens"]
        found = model.generate(ids, **options, custom_generate=lud(beta=0.0, verify=verify))[0].tolist()
        assert len(ids[0]) < len(found) < len(free)
        assert found == free[: len(found)]


def test_rows_without_stop_tokens_end_together_as_stock() -> None:
    model, batch = target("llama"), ragged([9, 4])
    tokenizer = tiny_tokenizer("llama")
    options = {**GREEDY, "eos_token_id": None}
    free = model.generate(**batch, **options)
    text = tokenizer.decode(free[0, 14])
    for decoder in (lud(beta=1.01), lud(verify=True)):
        criteria = [StopStringCriteria(tokenizer, text)]
        expected = model.generate(**batch, **options, stopping_criteria=criteria)
        assert torch.equal(
            model.generate(**batch, **options, stopping_criteria=criteria, custom_generate=decoder), expected
        )


@pytest.mark.parametrize("verify", [False, True])
def test_streaming_and_the_callback(verify: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer, steps = tiny_model("llama", layers=2), tiny_tokenizer("llama"), []
    decoder = lud(beta=0.0, verify=verify, streamer=TextStreamer(tokenizer, skip_prompt=True), on_step=steps.append)
    found = model.generate(prompt(9), **GREEDY, custom_generate=decoder)
    new = found[0, 9:].tolist()
    assert [token for step in steps for token in step.tokens] == new
    assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
    assert sum(step.drafted for step in steps) == decoder.statistics.accepted
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(new).rstrip("\n")


def test_the_guard_stops_and_is_counted() -> None:
    model, ids = target("llama"), prompt(8)
    options = {**GREEDY, "max_new_tokens": 41, "eos_token_id": None}

    class Same:
        """Every token has the text of every other."""

        def decode(self, ids: list[int]) -> str:
            return "x"

    found = {}
    for guard in ("text", "id", "none"):
        decoder = lud(beta=0.0, guard=guard).model_copy(update={"tokenizer": Same()})
        whole = model.generate(ids, **options, custom_generate=decoder)[0, ids.shape[1] :].tolist()
        found[guard] = decoder.statistics, whole
    assert found["text"][0].spans == {1: 40}
    assert found["text"][0].duplicated_share == 1
    counts, whole = found["none"]
    assert counts.spans == {4: 10}
    assert (counts.confident, counts.repeated) == (30, 30)
    counts, whole = found["id"]
    place = 1
    for length in counts.lengths:
        span = whole[place : place + length + 1]
        assert all(one != other for one, other in itertools.pairwise(span))
        place += length + 1
    assert counts.repeated >= sum(length < 3 for length in counts.lengths[:-1]) > 0


def test_at_the_end_of_the_context() -> None:
    for family in ("gpt2", "llama"):
        model = tiny_model(family, layers=2, dtype=torch.float64)
        ids = prompt(120)
        options = {**GREEDY, "max_new_tokens": 8, "eos_token_id": None}
        expected = model.generate(ids, **options)
        for fields in ({"beta": 1.01, "cap": 8}, {"verify": True, "beta": 0.0, "cap": 8}):
            assert torch.equal(model.generate(ids, **options, custom_generate=lud(**fields)), expected)


def test_it_can_be_the_drafter_of_a_loop_of_ones_own() -> None:
    model, ids = target("qwen3"), prompt(8)
    loop = Speculative(lud())  # a drafter is verified, whatever the field says
    assert torch.equal(model.generate(ids, **GREEDY, custom_generate=loop), model.generate(ids, **GREEDY))


@pytest.mark.slow
def test_training_makes_it_sure_and_right() -> None:
    """Eight letters in a circle: each tells all that follow."""
    texts = [("abcdefgh" * 6)[start : start + 31] for start in range(8)]
    ckpt = new("llama", width=32, depth=2, context=64)
    arguments: dict[str, Any] = {"steps": 250, "batch_size": 8, "learning_rate": 2e-2, "log_every": 10}
    done = train(ckpt, texts, objective=LUD(length=32, alpha=0.5, anchors=8), **arguments)
    first, last = done.history[0].parts, done.history[-1].parts
    assert last["unit_length"] > 3 > 2 > first["unit_length"]
    assert last["units"] < 0.1
    ids = ckpt.tokenizer("abcdefgh", return_tensors="pt")["input_ids"][:, -8:]
    decoder = LUD(beta=0.8)
    ckpt.model.generate(ids, do_sample=False, max_new_tokens=40, eos_token_id=None, custom_generate=decoder)
    # Trained models reach 0.86 to 1, untrained ones about an eighth.
    assert decoder.statistics.agreement > 0.6
    assert decoder.statistics.speed_up > 2


def test_a_recipe_makes_a_checkpoint_that_decodes(tmp_path: Path, corpus_file: Path) -> None:
    source = tiny_checkpoint_dir("qwen3", tmp_path / "tiny", layers=1)
    texts = {"texts": str(corpus_file), "samples": 2, "length": 16}
    objective = {"lud": {"alpha": 0.0, "length": 16}}
    recipe = Recipe.from_dict(
        {
            "calibration": texts,
            "measure": texts | {"speed": False},
            "steps": [{"train": {"objective": objective, "steps": 2}}],
        }
    )
    carve(recipe, tmp_path / "out", model=str(source))
    back, decoder = load(tmp_path / "out"), LUD(beta=0.0)
    assert back.kind == "standalone"
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generate(
        prompt(6), **GREEDY, custom_generate=decoder
    )
    assert torch.equal(found, back.model.generate(prompt(6), **GREEDY, custom_generate=LUD(beta=0.0)))
    assert decoder.statistics.speed_up > 1


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"beta": -0.1}, "greater than or equal to 0"),
        ({"beta": 2.5}, "less than or equal to 2"),
        ({"alpha": 3.0}, "less than or equal to 2"),
        ({"cap": 0}, "greater than or equal to 1"),
        ({"cap": 65}, "less than or equal to 64"),
        ({"anchors": 0}, "greater than or equal to 1"),
        ({"guard": "words"}, "'text', 'id' or 'none'"),
        ({"layout": "rows"}, "'packed' or 'truncated'"),
        ({"weight": -1.0}, "greater than or equal to 0"),
    ],
)
def test_settings_that_are_wrong(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        LUD(**fields)


def noted(**changes: Any) -> Any:
    model = tiny_model("llama", layers=1)
    setattr(model.config, NOTE, {"pad": PAD, "cap": 3, "vocabulary": VOCAB, **changes})
    return model


@pytest.mark.parametrize("verify", [False, True])
def test_models_that_are_wrong(verify: bool) -> None:
    untrained, tokenizer = tiny_model("llama", layers=1), tiny_tokenizer("llama")
    flash = noted()
    flash.config._attn_implementation = "flash_attention_2"
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (untrained, {}, "has no PAD token that was trained for lexical units; train it with the objective lud"),
        (untrained, {"pad_token": VOCAB}, f"pad_token is {VOCAB}; the model has ids from 0 to {VOCAB - 1}"),
        (untrained, {"pad_token": "<unk>"}, "pad_token is '<unk>' and no tokenizer is known"),
        (untrained, {"pad_token": "<none>", "tokenizer": tokenizer}, "pad_token is '<none>', which the tokenizer"),
        (noted(vocabulary=99), {}, f"has {VOCAB} token ids and was trained for lexical units with 99; its vocabulary"),
        (noted(), {"cap": 4}, "cap is 4; the model was trained with units of at most 3 tokens"),
        (noted(), {"pad_token": 5}, "pad_token has the id 5; the model was trained with 3"),
        (noted(pad="x"), {}, "lexical_units in the model's configuration is damaged"),
        (flash, {}, "flash_attention_2"),
    ]
    for model, fields, says in refused:
        with pytest.raises(IntaglioError, match=says) as caught:
            model.generate(prompt(4), **GREEDY, custom_generate=LUD(verify=verify, **fields))
        assert "\n" not in str(caught.value)
    named = LUD(verify=verify, pad_token="<unk>", tokenizer=tokenizer)
    assert noted().generate(prompt(4), **GREEDY, custom_generate=named).shape[1] > 4


def test_what_the_loop_refuses_is_refused_here() -> None:
    model, ids = target("llama"), prompt(5)
    streamer = TextStreamer(tiny_tokenizer("llama"))
    refused: list[tuple[dict[str, Any], LUD, str]] = [
        ({"num_beams": 2}, lud(), "num_beams is 2"),
        ({"streamer": streamer}, lud(), "give it to the decoder"),
        ({"max_new_tokens": 500}, lud(), "context"),
        ({"return_dict_in_generate": True, "output_scores": True}, lud(), "lexical units have none"),
    ]
    for options, decoder, says in refused:
        with pytest.raises(IntaglioError, match=says):
            model.generate(ids, **{**GREEDY, **options}, custom_generate=decoder)
    with pytest.raises(IntaglioError, match="a streamer was given with 2 rows"):
        model.generate(ids.repeat(2, 1), **GREEDY, custom_generate=lud(streamer=streamer))


def test_training_that_is_wrong() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"pad_token": VOCAB}, f"pad_token is {VOCAB}; the model has ids from 0 to {VOCAB - 1}"),
        ({"pad_token": "<none>", "grow": False}, "the vocabulary has no token '<none>' and may not grow"),
        ({"pad_token": EOS}, "pad_token is 2, which begins or ends texts"),
        ({"length": 1000}, "length is 1000"),
    ]
    for fields, says in refused:
        with pytest.raises(IntaglioError, match=says):
            run(checkpoint(), objective=LUD(**{"length": 24, **fields}))
    with pytest.raises(IntaglioError, match="no tokenizer; name a token that stands for no text by id: pad_token: ID"):
        run(Checkpoint(tiny_model("llama", layers=1)), IDS, objective=LUD(length=16))
    stream = ({"input_ids": row} for row in IDS.repeat(60, 1))
    with pytest.raises(IntaglioError, match="units are identified before training"):
        run(checkpoint(layers=1), stream, objective=lud(length=16, identify="before"), steps=150)


def test_a_stream_is_trained_on_where_units_are_found_on_the_way() -> None:
    ckpt = checkpoint(layers=1)
    done = run(ckpt, ({"input_ids": row} for row in IDS.repeat(60, 1)), objective=lud(length=16, alpha=0.0), steps=3)
    assert done.history[-1].parts["pads"] > 0


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=4))
def test_rows_come_back_from_their_tensors(sizes: list[int]) -> None:
    some = list(packed(({**row, "labels": row["input_ids"]} for row in rows(*([size] for size in sizes))), 12))
    for row, back in zip(some, data_layout.as_rows(data_layout.as_tensors(some)), strict=True):
        assert all(torch.equal(row[name], back[name]) for name in ("input_ids", "labels", "lengths"))


def test_the_default_cap_is_the_trained_one() -> None:
    assert LUD()._tuned(noted())[1] == 3
    assert LUD(cap=2)._tuned(noted())[1] == 2
    assert lud()._tuned(tiny_model("llama", layers=1)) == (PAD, CAP)
