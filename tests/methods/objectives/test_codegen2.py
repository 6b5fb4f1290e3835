"""CodeGen2 moves spans and loses nothing: each line of what makes it faithful, prompts of holes, and FIM beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

import intaglio
from intaglio.checkpoint import Checkpoint
from intaglio.data.infill_format import FillInMiddle, Sentinels, infill_format
from intaglio.errors import IntaglioError
from intaglio.evidence.baselines.fim import FillInMiddleTraining
from intaglio.masks import PrefixLM, set_visibility, visible
from intaglio.measures.infilling import infill, infill_prompt, line_in_hole, line_log_probabilities, with_line_break
from intaglio.methods.objectives.codegen2 import (
    CodeGen2,
    corrupted,
    draw_spans,
    parts,
    poisson_spans,
    restored,
    span_counts,
)
from intaglio.trainer import KeyedRNG
from intaglio.trainer.causal_lm import IGNORED, causal_batch, next_token_loss, targets
from intaglio.trainer.rng import generator
from intaglio.trainer.stock_trainer import EpochCollator, training_rows
from tests.alive import alive, refused
from tests.families import EOS, VOCAB, tiny_model, tiny_tokenizer
from tests.plain_llama import llama
from tests.trainer.helpers import TEXTS, checkpoint, run, same, weights

EXAMPLES = ({"length": 48, "corruption_ratio": 0.8}, {"length": 48, "attention": "prefix", "pack": False})
BASE = {"length": 128, "corruption_ratio": 0.8}
ALIVE = {
    "corruption_ratio": 0.2,
    "spans": "poisson",
    "noise_ratio": 0.4,
    "mean_span_length": 5.0,
    "sentinels": alive(1, noise_ratio=0.4, mean_span_length=1.0),
    "loss_on": "targets",
    "drop_sentinel_loss": True,
    "attention": alive("prefix", pack=False),
    "grow": refused(False),
    "length": 32,
    "pack": False,
}

DRAWS = KeyedRNG(0)
TOKENS = Sentinels(masks=(100, 101, 102, 103), separator=110, end=111, end_of_text=EOS)


def prepared(data: Any = TEXTS, kind: type[CodeGen2] = CodeGen2, **fields: Any) -> tuple[Any, list[Any], Checkpoint]:
    """A method, its rows, and the checkpoint whose vocabulary has grown."""
    ckpt, method = checkpoint(layers=1), kind(**{"length": 64, "pack": False, "corruption_ratio": 1.0, **fields})
    return method, training_rows(method, ckpt, data, DRAWS), ckpt


def layouts(method: CodeGen2, rows: list[Any], rng: KeyedRNG = DRAWS) -> list[Tensor]:
    """The documents of a batch, without padding."""
    batch = method.collate(rows, rng)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return [ids[keep.bool()] for ids, keep in zip(batch["input_ids"], mask, strict=True)]


@given(st.integers(4, 300), st.integers(0, 10**6), st.sampled_from(["uniform", "t5", "poisson"]))
def test_nothing_is_lost(tokens: int, seed: int, spans: str) -> None:
    """Lossless: decode(transform(x)) == x for every x and every sampled span set."""
    ids = torch.randint(5, 90, (tokens,), generator=generator(seed))
    method = CodeGen2(spans=spans, sentinels=4)
    method._tokens = TOKENS
    drawn = method._spans(tokens, 10**6, generator("spans", seed))
    assert drawn is not None
    assert drawn[0] == tokens
    layout = corrupted(ids, drawn[1], TOKENS)
    assert torch.equal(restored(layout, TOKENS), ids)
    noise, count = sum(b - a for a, b in drawn[1]), len(drawn[1])
    assert len(layout) == tokens - noise + count + 2 + noise + 2 * count
    used = [token for token in layout.tolist() if token in TOKENS.masks]
    assert used == [*TOKENS.masks[:count]] * 2
    assert layout.tolist().count(TOKENS.separator) == 1
    assert layout.tolist().count(TOKENS.end) == count
    assert all(a < b for a, b in drawn[1])
    assert all(b < c for (_, b), (c, _) in zip(drawn[1], drawn[1][1:], strict=False))


def test_the_worked_example() -> None:
    """x = a b c d e f, spans {b c}, {e}: length 6 + 3*2 + 2 = 14."""
    found = corrupted(torch.arange(10, 16), [(1, 3), (4, 5)], TOKENS)
    one, two, stop = 100, 101, TOKENS.end
    assert found.tolist() == [10, one, 13, two, 15, EOS, 110, one, 11, 12, stop, two, 14, stop]


def test_spans_beyond_the_last_mask_stay_in_the_text() -> None:
    few = Sentinels((100,), 110, 111, EOS)
    found = corrupted(torch.arange(10, 16), [(1, 2), (4, 5)], few)
    assert found.tolist() == [10, 100, 12, 13, 14, 15, EOS, 110, 100, 11, 111]


def test_counts_of_t5() -> None:
    """n=568 tokens, r=.15, mean 3 -> noise 85, spans 28; kept 483."""
    assert span_counts(568, 0.15, 3.0, 1000) == (85, 28)
    spans = draw_spans(568, 85, 28, generator("t5"), t5=True)
    assert len(spans) == 28
    assert sum(b - a for a, b in spans) == 85
    assert spans[0][0] >= 1
    assert spans[-1][1] == 568
    assert span_counts(568, 0.15, 3.0, 10) == (30, 10)


@given(st.integers(1, 80), st.data())
def test_parts_are_positive_and_add_up(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, total))
    found = parts(total, count, generator(total, count))
    assert len(found) == count
    assert sum(found) == total
    assert min(found) >= 1


def test_poisson_spans_are_as_many_as_wanted() -> None:
    assert poisson_spans(5, 3, generator("all")) == [(0, 1), (2, 3), (4, 5)]


def test_holes_may_be_anywhere() -> None:
    starts = {draw_spans(9, 2, 1, generator("where", n), t5=False)[0] for n in range(200)}
    assert starts == {(a, a + 2) for a in range(8)}


def test_without_corruption_it_is_next_token_prediction() -> None:
    """p_corrupt = 0 gives exactly the causal LM batch and loss; p_corrupt = 1 gives only corrupted ones."""
    for pack in (False, True):
        method, rows, ckpt = prepared(corruption_ratio=0.0, pack=pack)
        found, plain = method.collate(rows[:4], DRAWS), causal_batch(rows[:4])
        assert found.keys() == plain.keys()
        assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(plain[name])) for name in plain)
        assert torch.equal(method.loss(ckpt.model, found).total, next_token_loss(ckpt.model, plain).total)
    method, rows, _ = prepared(corruption_ratio=1.0)
    assert all(method._tokens.separator in ids.tolist() for ids in layouts(method, rows))


def test_documents_are_corrupted_as_often_as_wanted() -> None:
    """Empirical frequency within binomial error of p."""
    method, rows, _ = prepared(corruption_ratio=0.3)
    many = [{**rows[0], "id": n} for n in range(2000)]
    count = sum(method._tokens.separator in ids.tolist() for ids in layouts(method, many))
    assert abs(count - 600) < 4 * (2000 * 0.3 * 0.7) ** 0.5


def test_spans_come_from_their_own_document() -> None:
    """Within-file: after packing, no target token's span comes from another file."""
    data = [{"input_ids": torch.full((20,), 10 + n)} for n in range(6)]
    method, rows, _ = prepared(data, pack=True, spans="t5")
    for row in rows:
        found = method._row(row, DRAWS)[0]
        assert len(row["lengths"]) > 1
        for piece in found["input_ids"].split(found["lengths"].tolist()):
            assert len({token for token in piece.tolist() if 10 <= token < 16}) == 1
            assert method._tokens.separator in piece.tolist()


def test_packed_documents_do_not_see_each_other_and_keep_their_place() -> None:
    method, rows, ckpt = prepared([text[:20] for text in TEXTS], pack=True)
    batch = method.collate(rows[:2], DRAWS)
    assert (batch["position_ids"] == 0).sum() > 2
    assert (batch["input_ids"] == method._tokens.separator).sum() > 2
    assert batch["input_ids"].shape[1] <= 64
    assert torch.isfinite(method.loss(ckpt.model, batch).total)


@pytest.mark.parametrize("dropped", [False, True])
def test_the_targets_after_the_separator_are_counted(dropped: bool) -> None:
    """loss_on="targets": number of loss terms = noise + 2n, minus n if sentinels are excluded."""
    method, rows, _ = prepared(loss_on="targets", drop_sentinel_loss=dropped)
    for row in rows[:8]:
        found = method._row(row, DRAWS)[0]
        layout = found["input_ids"].tolist()
        tail = layout[layout.index(method._tokens.separator) + 1 :]
        count = tail.count(method._tokens.end)
        noise = len(tail) - 2 * count
        assert int((targets(found) != IGNORED).sum()) == noise + 2 * count - dropped * count


def test_masks_are_not_predicted_from_the_text_before_them() -> None:
    method, rows, _ = prepared(drop_sentinel_loss=True)
    found = method._row(rows[0], DRAWS)[0]
    masks = torch.isin(found["input_ids"], torch.tensor(method._tokens.masks))
    assert (found["labels"][masks] == IGNORED).all()
    assert torch.equal(found["labels"][~masks], found["input_ids"][~masks])


def test_the_prefix_mask_is_causal_to_full() -> None:
    """Prefix mask with prefix_len 0 is the causal mask; with prefix_len T all ones."""
    model = tiny_model("llama", layers=1)
    for prefix, expected in ((0, torch.ones(6, 6).tril().bool()), (6, torch.ones(6, 6).bool())):
        set_visibility(model, PrefixLM(prefix))
        assert torch.equal(visible(model, 6)[0, 0], expected)


def test_prefix_attention_reads_the_text_both_ways_and_predicts_what_follows() -> None:
    method, rows, ckpt = prepared(attention="prefix", spans="t5")
    batch = method.collate(rows[:3], DRAWS)
    first_target = (batch["target"] != IGNORED).int().argmax(1)
    assert torch.equal(first_target, batch["prefix"] - 1)
    seen = []
    handle = ckpt.model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    method.loss(ckpt.model, batch)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    last = int(batch["prefix"][0]) - 3
    changed["input_ids"][0, last] = (changed["input_ids"][0, last] + 1) % 90
    method.loss(ckpt.model, changed)
    handle.remove()
    assert not torch.equal(seen[0][0, 0], seen[1][0, 0])
    assert torch.equal(seen[0][1], seen[1][1])
    assert ckpt.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attention", ["causal", "prefix"])
@torch.no_grad()
def test_the_loss_is_that_of_a_plain_model_on_the_layout(attention: str) -> None:
    """Corrupted: pre <mask_1> suf <eot> <sep> <mask_1> s_1 <eom>; allowed[i,j] = (j <= i) or (j < prefix_len)."""
    method, rows, ckpt = prepared(attention=attention)
    model, tokens, losses = ckpt.model, method._tokens, []
    batch = method.collate(rows[:3], DRAWS)
    for layout in layouts(method, rows[:3]):
        ids = layout.tolist()
        prefix = ids.index(tokens.separator) + 1
        at = torch.arange(len(ids))
        seen = at[None] <= at[:, None]
        if attention == "prefix":
            seen = seen | (at[None] < prefix)
        log_probs = (
            llama(model, model.model.embed_tokens.weight[layout][None], seen=seen)[0][0] @ model.lm_head.weight.T
        )
        nll = -log_probs.log_softmax(-1)[at[:-1], layout[1:]]
        losses.append(nll[prefix - 1 :] if attention == "prefix" else nll)
    assert float(method.loss(model, batch).total) == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)


def test_prefix_attention_is_refused_with_gradient_checkpointing() -> None:
    method = CodeGen2(length=48, attention="prefix", pack=False)
    with pytest.raises(IntaglioError, match="gradient checkpointing repeats layers"):
        run(checkpoint(layers=1), objective=method, gradient_checkpointing=True)


def test_the_prompt_is_the_beginning_of_the_training_layout() -> None:
    """Infill prompt is a strict prefix of the training layout for n = 1 with the same prefix/suffix."""
    _, _, ckpt = prepared()
    form = infill_format(ckpt.tokenizer, "tiny")
    prefix, hole, suffix = (ckpt.tokenizer(text)["input_ids"] for text in ("the quick", " brown", " fox jumps"))
    ids, options = infill_prompt(ckpt, ["the quick", " fox jumps"], max_new_tokens=8)
    whole = torch.tensor([*prefix, *hole, *suffix])
    layout = corrupted(whole, [(len(prefix), len(prefix) + len(hole))], form).tolist()
    assert layout[: ids.shape[1]] == ids[0].tolist()
    assert len(layout) == ids.shape[1] + len(hole) + 1
    assert options["eos_token_id"] == sorted({form.end, EOS})
    assert options["suppress_tokens"] == sorted({*form.masks, form.separator})


def test_text_that_spells_a_sentinel_is_text() -> None:
    _, _, ckpt = prepared()
    ids, _ = infill_prompt(ckpt, ["<mask_2>", "<sep>"], max_new_tokens=8)
    form = infill_format(ckpt.tokenizer, "tiny")
    assert form.masks[1] not in ids[0].tolist()
    assert ids[0].tolist().count(form.separator) == 1


def test_holes_are_filled_in_order_and_end_at_their_token() -> None:
    method, _, ckpt = prepared()
    calls: list[Any] = []

    def generate(ids: Tensor, **options: Any) -> Tensor:
        calls.append((ids[0].tolist(), options))
        answer = [20 + len(calls), method._tokens.end, 55]
        return torch.cat([ids, torch.tensor([answer])], 1)

    ckpt.model.generate = generate
    found = infill(ckpt, ["a", "b", "c"], max_new_tokens=5)
    assert found == [ckpt.tokenizer.decode([21]), ckpt.tokenizer.decode([22])]
    first, second = (ids for ids, _ in calls)
    assert second == [*first, 21, method._tokens.end, method._tokens.masks[1]]
    assert calls[0][1]["max_new_tokens"] == 5


def test_a_trained_model_fills_holes_and_never_writes_sentinels() -> None:
    ckpt = checkpoint(layers=1)
    run(ckpt, objective=CodeGen2(length=64, pack=False), steps=2)
    form = infill_format(ckpt.tokenizer, "tiny")
    assert set(form.added) <= set(ckpt.model.generation_config.suppress_tokens)
    assert len(infill(ckpt, ["the quick", "fox", "jumps"], max_new_tokens=6)) == 2
    assert ckpt.model.get_input_embeddings().weight.shape[0] == VOCAB + 18


def test_noise_and_span_lengths_are_drawn_for_each_document() -> None:
    """Rate r ~ U(0.05, 0.5), length scale log-uniform(3, 64)."""
    method = CodeGen2(sentinels=1000)
    method._tokens = TOKENS
    drawn = [method._spans(2000, 10**6, generator("lengths", n)) for n in range(400)]
    spans = [one[1] for one in drawn if one is not None]
    noise = [sum(b - a for a, b in one) / 2000 for one in spans]
    mean = [share * 2000 / len(one) for share, one in zip(noise, spans, strict=True)]
    assert 0.049 < min(noise) < 0.06
    assert 0.48 < max(noise) < 0.501
    assert 2.9 < min(mean) < 3.2
    assert 58 < max(mean) < 100


def test_poisson_spans_are_one_and_more() -> None:
    method = CodeGen2(spans="poisson")
    method._tokens = TOKENS
    counts = [len(method._spans(2000, 10**6, generator("poisson", n))[1]) for n in range(400)]  # type: ignore[index]
    assert min(counts) == 1
    assert sum(counts) / 400 == pytest.approx(2, abs=0.25)


def test_poisson_spans_need_two_ends_each(monkeypatch: pytest.MonkeyPatch) -> None:
    method = CodeGen2(spans="poisson")
    method._tokens = TOKENS
    monkeypatch.setattr(torch, "poisson", lambda rates, generator: torch.tensor([9.0]))  # ten spans
    assert method._spans(200, 40, generator("poisson")) is None  # 8 tokens have room beside their sentinels
    kept, spans = method._spans(200, 52, generator("poisson"))  # type: ignore[misc]
    assert (kept, len(spans)) == (20, 10)


def test_a_document_with_room_is_whole_and_a_full_one_loses_its_end() -> None:
    method, rows, _ = prepared([{"input_ids": torch.arange(20, 40)}, {"input_ids": torch.arange(20, 84)}])
    short, full = layouts(method, rows)
    assert torch.equal(restored(short, method._tokens), torch.arange(20, 40))
    whole = restored(full, method._tokens)
    assert len(full) <= 64
    assert torch.equal(whole, torch.arange(20, 84)[: len(whole)])
    begun = {"input_ids": torch.tensor([1, *range(20, 83)]), "id": 0}
    assert len(layouts(method, [begun])[0]) <= 64


@pytest.mark.parametrize("pack", [True, False])
def test_rows_and_seed_reach_the_checks(pack: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr("intaglio.methods.objectives.codegen2.check_causal", lambda c, *, packing: seen.append(packing))
    found = []
    for seed in (0, 1):
        ckpt = checkpoint(layers=1)
        training_rows(CodeGen2(length=64, pack=pack), ckpt, TEXTS, KeyedRNG(seed))
        found.append(ckpt.model.get_input_embeddings().weight[VOCAB:])
    assert seen == [pack, pack]
    assert not torch.isclose(*found).any()


def test_epochs_are_corrupted_anew_and_batches_do_not_matter() -> None:
    method, rows, _ = prepared()
    first = layouts(method, rows[:4])
    later = layouts(method, [{**row, "epoch": 1} for row in rows[:4]])
    assert not any(torch.equal(a, b) for a, b in zip(first, later, strict=True))
    assert torch.equal(layouts(method, rows[3:4])[0], first[3])


def test_which_documents_are_corrupted_is_drawn_from_their_own_seed() -> None:
    method, rows, _ = prepared(corruption_ratio=0.5)
    many = [{**rows[0], "id": n} for n in range(40)]
    first = layouts(method, many)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        assert all(map(torch.equal, first, layouts(method, many)))


def test_samples_score_the_middle_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    from intaglio.methods.objectives import codegen2

    written, given = iter(["x = 1\n", "other", "\n  x = 1"]), []
    monkeypatch.setattr(codegen2, "middle_line", lambda text: None if text == "none" else ("a\n", "  x = 1", "\nb"))
    monkeypatch.setattr(codegen2, "line_in_hole", lambda _, *hole: given.append(hole) or next(written))
    monkeypatch.setattr(codegen2, "line_log_probabilities", lambda _, *hole: torch.tensor([0.5, 0.125]).log())
    samples = CodeGen2().samples(checkpoint(), ["first", "none", "second", "third"])
    exact, probability = samples.scores.values()
    assert (exact, probability) == (pytest.approx(200 / 3), pytest.approx(25))
    assert given == 3 * [("a", "\nb")]
    assert [sample.text for sample in samples.shown] == ["x = 1\n", "other", "\n  x = 1"]
    assert CodeGen2().samples(checkpoint(), ["none"]).scores == {"lines filled exactly": 0}


def test_held_out_lines_are_spread_over_the_texts() -> None:
    from intaglio.methods.objectives.codegen2 import evenly_spaced, parts_of

    text = "".join(f"{n}\n" for n in range(85))
    assert [part.splitlines()[0] for part in parts_of(text)] == ["0", "40", "80"]
    assert "".join(parts_of(text)) == text
    assert evenly_spaced(range(10), 4) == [0, 2, 5, 7]
    assert list(evenly_spaced(range(3), 4)) == [0, 1, 2]


def test_a_line_is_scored_in_its_hole() -> None:
    plain, (_, _, filling) = checkpoint(), prepared()
    tokenizer = plain.tokenizer
    line = tokenizer("x = 1", add_special_tokens=False)["input_ids"]
    for ckpt in (plain, filling):
        before = tokenizer("a")["input_ids"]
        if ckpt is filling:
            before = infill_prompt(ckpt, ["a", "b"], max_new_tokens=8)[0][0].tolist()
        with torch.no_grad():
            log_probs_TV = ckpt.model(input_ids=torch.tensor([[*before, *line]])).logits[0].log_softmax(-1)
        expected = [float(log_probs_TV[len(before) + i - 1, token]) for i, token in enumerate(line)]
        assert line_log_probabilities(ckpt, "a", "x = 1", "b").tolist() == pytest.approx(expected, abs=1e-5)


def test_a_hole_takes_the_line_break_before_it() -> None:
    assert with_line_break("a:\n  ", "b", "\nc") == ("a:", "\n  b", "\nc")
    assert with_line_break("\n", "b", "\nc") == ("\n", "b", "\nc")


def test_a_model_without_sentinels_continues_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intaglio.measures.infilling.greedy_answers", lambda *_: ["\n    return a\n    b = 1\n"])
    assert line_in_hole(checkpoint(), "def f():", "\n") == "\n    return a"


def test_short_documents_and_those_with_sentinels_stay_causal() -> None:
    method, _, ckpt = prepared(length=12)
    long = training_rows(method, ckpt, [{"input_ids": torch.arange(20, 60)}], DRAWS)
    assert all(len(ids) <= 12 for ids in layouts(method, long))
    short = {"input_ids": torch.tensor([7, 8, 9, EOS]), "id": 0}
    marked = {"input_ids": torch.tensor([7, 8, 9, 10, 11, method._tokens.end]), "id": 0}
    for row in (short, marked):
        assert torch.equal(layouts(method, [row])[0], row["input_ids"])


def test_labels_of_the_user_move_with_their_tokens() -> None:
    data = [
        {"input_ids": torch.arange(20, 50), "labels": torch.arange(20, 50).masked_fill(torch.arange(30) < 15, -100)}
    ]
    method, rows, _ = prepared(data)
    found = method._row(rows[0], DRAWS)[0]
    for token, label in zip(found["input_ids"].tolist(), found["labels"].tolist(), strict=True):
        assert label == (IGNORED if 20 <= token < 35 else token)


def test_it_trains_in_a_stock_trainer(tmp_path: Path) -> None:
    """The five lines of the docstring."""
    checkpoint_, texts = checkpoint(layers=1), TEXTS
    before = weights(checkpoint_)
    method, rng = intaglio.CodeGen2(length=64), KeyedRNG(seed=0)
    rows = training_rows(method, checkpoint_, texts, rng)
    collate = EpochCollator(method, rng, labels=True)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, remove_unused_columns=False, report_to=[], use_cpu=True, disable_tqdm=True
    )
    transformers.Trainer(checkpoint_.model, arguments, collate, rows).train()
    assert not same(before, weights(checkpoint_))


@pytest.mark.parametrize("pack", [True, False])
def test_a_stock_batch_has_the_objectives_loss(pack: bool) -> None:
    method, rows, ckpt = prepared([text[:20] for text in TEXTS], pack=pack)
    own, stock = EpochCollator(method, DRAWS), EpochCollator(method, DRAWS, labels=True)
    for _ in range(2):  # epochs
        batch, labelled = own(rows[:3]), stock(rows[:3])
        assert torch.equal(batch["input_ids"], labelled["input_ids"])
        with torch.no_grad():
            assert torch.allclose(ckpt.model(**labelled).loss, method.loss(ckpt.model, batch).total, atol=1e-5)
    assert not torch.equal(own(rows[:3])["input_ids"], batch["input_ids"])


def test_fill_in_the_middle_moves_the_middle() -> None:
    for spm in (0.0, 1.0):
        method, rows, ckpt = prepared(kind=FillInMiddleTraining, spm_ratio=spm)
        form = infill_format(ckpt.tokenizer, "tiny")
        assert isinstance(form, FillInMiddle)
        for row, layout in zip(rows[:6], layouts(method, rows[:6]), strict=True):
            ids, text = layout.tolist(), row["input_ids"].tolist()
            middle = ids.index(form.middle)
            start, stop = ids.index(form.prefix), ids.index(form.suffix)
            assert len(ids) == min(len(text) - 1, 60) + 4
            if spm:
                assert (start, stop) == (0, 1)
                whole = [*ids[middle + 1 : -1], *ids[2:middle]]
            else:
                whole = [*ids[1:stop], *ids[middle + 1 : -1], *ids[stop + 1 : middle]]
            assert ids[-1] == EOS
            assert whole == text[: len(whole)]
        prompt = FillInMiddle(1, 2, 3, 4, spm=bool(spm)).prompt([[7], [8]])
        assert prompt == ([1, 2, 8, 3, 7] if spm else [1, 7, 2, 8, 3])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"attention": "prefix"}, "set pack: false"),
        ({"attention": "prefix", "pack": False, "loss_on": "all"}, "loss_on: targets is accepted"),
        ({"spans": "poisson", "noise_ratio": 0.1}, "do not apply to spans: poisson"),
        ({"corruption_ratio": 1.5}, "less than or equal to 1"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        CodeGen2(**fields)


def test_bad_input_is_one_sentence() -> None:
    plain = checkpoint(layers=1)
    cases = [
        (lambda: prepared(grow=False), "lacks 18 of 18 special tokens, '<mask_1>' first, and may not grow"),
        (lambda: infill(plain, ["a", "b"]), "cannot fill holes: its tokenizer has neither"),
        (lambda: prepared([{"input_ids": [5, 6, 7, 8]}], kind=_Bare), "has no tokenizer"),
    ]
    _, _, ckpt = prepared()
    cases += [
        (lambda: infill(ckpt, ["a", "b " * 100]), "must fit in the context of 128"),
        (lambda: infill(ckpt, ["a"]), "0 holes are to be filled; the model knows 1 to 16"),
    ]
    no_end = Checkpoint(tiny_model("llama", layers=1), tiny_tokenizer("llama"))
    no_end.tokenizer.eos_token = None
    cases.append((lambda: training_rows(CodeGen2(), no_end, TEXTS, DRAWS), "has no end-of-text token"))
    for call, sentence in cases:
        with pytest.raises(IntaglioError, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)


class _Bare(CodeGen2):
    """CodeGen2 on a checkpoint that has lost its tokenizer."""

    def prepare(self, checkpoint: Checkpoint, *more: Any) -> Any:
        checkpoint.tokenizer = None
        return super().prepare(checkpoint, *more)
