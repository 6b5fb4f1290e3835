"""BERT4Rec masks items and leaks none: each line of what makes it faithful."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments

import intaglio
from intaglio.data.item_sequences import Question
from intaglio.errors import IntaglioError
from intaglio.measures.ranking import ranking_metrics
from intaglio.methods.objectives.bert4rec import BERT4Rec, mask_count
from intaglio.methods.objectives.next_item import (
    NextItemModel,
    Popularity,
    item_names,
    ranks,
    recommend,
    window_starts,
)
from intaglio.trainer import KeyedRNG, train
from tests.families import ENCODERS
from tests.methods.objectives.recommenders import recommender, sequences, walks
from tests.trainer.helpers import checkpoint

EXAMPLES = ({"length": 24}, {"length": 24, "static_copies": 2})
FAMILIES = ENCODERS
ALIVE = {
    "mask_ratio": 0.6,
    "max_predictions": 1,
    "mask_prob": 0.2,
    "last_only_ratio": 1.0,
    "static_copies": 2,
    "length": 8,
    "window_step": "test_windows_follow_the_step",
    "mask_token": 7,
}
DRAWS = KeyedRNG(0)
ITEMS = walks()
MASK = ITEMS.mask


def observe(method: BERT4Rec) -> Any:
    ckpt = checkpoint("bert", layers=1)
    result = intaglio.train(ckpt, [{"input_ids": list(range(8 + n, 38 + n))} for n in range(20)], objective=method,
                            steps=3, batch_size=4, warmup=0, learning_rate=1e-2)  # fmt: skip
    return ckpt.model.state_dict(), [(row.loss, row.parts) for row in result.history]


def prepared(**fields: Any) -> BERT4Rec:
    """A method that knows its mask token."""
    method = BERT4Rec(length=8, **fields)
    list(method.prepare(recommender(ITEMS), [], DRAWS))
    return method


def row(ids: Any, number: int = 0) -> dict[str, Any]:
    return {"input_ids": torch.as_tensor(ids), "id": number, "epoch": 0}


@pytest.mark.parametrize(
    ("items", "ratio", "most", "count"),
    [(200, 0.2, 40, 40), (7, 0.2, None, 1), (50, 0.6, 30, 30), (1, 0.2, None, 1), (25, 0.1, None, 3), (50, 0.6, 9, 9)],
)
def test_counts(items: int, ratio: float, most: int | None, count: int) -> None:
    """n=200, rho=.2 -> 40; n=7 -> 1; n=50, rho=.6, max_pred 30 -> 30; n=1 -> 1; a half is rounded up."""
    assert mask_count(items, ratio, most) == count


@given(st.integers(2, 60), st.floats(0.05, 1.0), st.integers(0, 10**6))
def test_exactly_m_positions_become_the_mask(items: int, ratio: float, number: int) -> None:
    """Exactly m positions differ from the input (all equal [MASK]) when mask_prob = 1.0."""
    method = BERT4Rec(mask_ratio=ratio, last_only_ratio=0)
    method._mask_id = MASK
    clean = torch.arange(100, 100 + items)
    hidden = method.hide(row(clean, number), DRAWS)
    changed = (hidden["input_ids"] != clean).nonzero().flatten()
    assert torch.equal(changed, hidden["positions"])
    assert len(changed) == mask_count(items, ratio)
    assert (hidden["input_ids"][changed] == MASK).all()
    assert torch.equal(hidden["target"], clean[changed])


@torch.no_grad()
def test_a_masked_item_does_not_leak() -> None:
    """Changing the item at a masked position changes labels but leaves the logits bit-identical."""
    ckpt, method = recommender(ITEMS), prepared(last_only_ratio=0.0, mask_ratio=0.3)
    one = method.hide(row([1, 2, 3, 4, 5, 6]), DRAWS)
    other = torch.tensor([1, 2, 3, 4, 5, 6])
    other[one["positions"]] = 9
    two = method.hide(row(other), DRAWS)
    batches = [method.collate([masked], DRAWS) for masked in (one, two)]
    logits = [method.loss(ckpt.model, batch).outputs for batch in batches]
    assert torch.equal(*logits)
    assert not torch.equal(batches[0]["target"], batches[1]["target"])


def test_the_loss_is_that_of_the_masked_positions_alone() -> None:
    """Labels of unmasked positions never affect the loss: it equals the stock model's with -100 elsewhere."""
    ckpt, method = recommender(ITEMS), prepared()
    rows = [row([1, 2, 3, 4, 5, 6, 7, 8]), row([3, 2, 1], 1)]
    batch = method.collate([method.hide(one, DRAWS) for one in rows], DRAWS)
    labels = torch.full_like(batch["input_ids"], -100)
    labels.view(-1)[batch["positions"]] = batch["target"]
    stock = ckpt.model(batch["input_ids"], batch["attention_mask"], labels=labels).loss
    count = len(batch["target"])
    assert torch.allclose(method.loss(ckpt.model, batch).total, stock * count / (count + 1e-5), atol=1e-6)
    assert batch["weight"] == count


@pytest.mark.parametrize(("family", "both"), [("bert", True), ("gpt2", False)])
def test_it_is_bidirectional(family: str, both: bool) -> None:
    """d logits[i] / d E[x_j] is nonzero for some j > i; with a causal mask substituted it is exactly 0."""
    model = recommender(ITEMS, family).model
    states = model.get_input_embeddings()(torch.arange(1, 7)[None]).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs_embeds=states).logits[0, 2].sum(), states)
    assert gradient[0, :3].any()
    assert bool(gradient[0, 3:].any()) == both


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    """Appending pads changes real-position logits by < 1e-5."""
    model = recommender(ITEMS).model
    ids, mask = torch.tensor([[1, 2, 3, MASK, 0, 0, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]])
    alone = model(ids[:, :4]).logits
    assert torch.allclose(model(ids, mask).logits[:, :4], alone, atol=1e-5)


def test_a_uniform_model_has_the_loss_log_v() -> None:
    """With E=0, o=0 loss = log V exactly."""
    ckpt, method = recommender(ITEMS), prepared(last_only_ratio=1.0)
    with torch.no_grad():
        ckpt.model.get_output_embeddings().weight.zero_()
        ckpt.model.get_output_embeddings().bias.zero_()
    batch = method.collate([row([1, 2, 3])], DRAWS)
    assert method.loss(ckpt.model, batch).total.item() == pytest.approx(math.log(ITEMS.vocabulary), rel=2e-5)
    assert ckpt.model.get_output_embeddings().weight is ckpt.model.get_input_embeddings().weight


def test_last_only_matches_the_layout_of_inference() -> None:
    """Last-only mode: exactly one label per window, at the last real position; matches the inference layout."""
    method = prepared(last_only_ratio=1.0, mask_prob=0.0)
    batch = method.collate([row([1, 2, 3]), row([4, 5, 6, 7, 8], 1)], DRAWS)
    assert batch["positions"].tolist() == [2, 5 + 4]
    assert batch["target"].tolist() == [3, 8]
    predictor = NextItemModel.from_checkpoint(recommender(ITEMS))
    for number, history in enumerate(([1, 2], [4, 5, 6, 7])):
        assert predictor._row(history).tolist() == batch["input_ids"][number, : len(history) + 1].tolist()
    assert predictor._row(list(range(1, 12))).tolist() == [5, 6, 7, 8, 9, 10, 11, MASK]


def test_metrics_of_the_card() -> None:
    """Ranks (0, 3, 12) -> HR@10 = 2/3, NDCG@10 = (1 + 1/log2 5 + 0)/3 = 0.47689."""
    found = ranking_metrics(torch.tensor([0, 3, 12]))
    assert found["HR@10"] == pytest.approx(2 / 3)
    assert found["NDCG@10"] == pytest.approx(0.47689, abs=5e-6)
    assert found["MRR"] == pytest.approx((1 + 1 / 4 + 1 / 13) / 3)


def test_windows_of_the_card() -> None:
    """len 450, L 200, prop 0.5 -> starts 0, 50, 150, 250; union of windows covers every position."""
    assert window_starts(450, 200, 0.5) == [0, 50, 150, 250]


@given(st.integers(1, 300), st.integers(2, 50), st.floats(0.01, 1.0))
def test_windows_cover_every_position(items: int, length: int, step: float) -> None:
    starts = window_starts(items, length, step)
    assert starts == sorted(set(starts))
    assert {p for start in starts for p in range(start, min(items, start + length))} == set(range(items))
    assert starts[-1] == max(0, items - length)


def test_windows_follow_the_step() -> None:
    rows = [{"input_ids": torch.arange(1, 21), "id": 0}]
    counts = [len(BERT4Rec(length=8, window_step=step).windows(rows)) for step in (0.25, 0.5, 1.0)]
    assert counts == [7, 4, 3]
    assert len(BERT4Rec(length=8).windows(rows, training=False)) == 1
    made = [list(BERT4Rec(window_step=step).prepare(recommender(ITEMS), rows, DRAWS)) for step in (0.25, 0.5, 1.0)]
    assert [len(windows) for windows in made] == counts


def test_each_position_is_masked_equally_often() -> None:
    """Over many draws each of n positions is masked with frequency m/n."""
    items, draws, method = 12, 6000, prepared(last_only_ratio=0.0, mask_ratio=0.25)
    counts: Counter[int] = Counter()
    for number in range(draws):
        counts.update(method.hide(row(range(1, items + 1), number), DRAWS)["positions"].tolist())
    expected = draws * 3 / items
    assert all(abs(counts[p] - expected) < 5 * expected**0.5 for p in range(items))


def test_an_eleventh_of_the_windows_masks_the_last_item_alone() -> None:
    method, draws = prepared(mask_ratio=0.5), 5000
    found = [method.hide(row(range(1, 9), number), DRAWS)["positions"].tolist() for number in range(draws)]
    share = sum(positions == [7] for positions in found) / draws
    assert abs(share - 1 / 11) < 5 * (10 / 121 / draws) ** 0.5


def test_chosen_items_that_are_not_masked_stay_or_change_equally_often() -> None:
    """if mask_prob < 1: with prob mask_prob -> [MASK], else half keep, half random item."""
    method = prepared(last_only_ratio=0.0, mask_ratio=1.0, mask_prob=0.5)
    rows = [method.hide(row([1, 2, 3, 4, 5, 6, 7, 8], number), DRAWS) for number in range(1000)]
    ids = torch.cat([one["input_ids"] for one in rows])
    clean = torch.cat([one["target"] for one in rows])
    assert ids.min() >= 1
    # A random item is the original once in twelve.
    for share, expected in (((ids == MASK), 0.5), ((ids == clean), 0.25 * 13 / 12)):
        assert abs(float(share.double().mean()) - expected) < 0.03


def test_static_copies_are_those_of_the_official_generator() -> None:
    """dupe_factor statically re-masked copies of each window + 1 last-only copy."""
    method = BERT4Rec(length=8, static_copies=3, mask_ratio=0.5)
    data = [{"input_ids": list(range(1, 13)), "id": 0}]
    one, two = (list(method.prepare(recommender(ITEMS), data, DRAWS)) for _ in range(2))
    assert len(one) == 2 * 4
    assert [len(copy["positions"]) for copy in one] == [4, 4, 4, 1] * 2
    assert len({tuple(copy["input_ids"].tolist()) for copy in one}) == 8
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, two, strict=True))
    again = {**one[0], "id": 0, "epoch": 5}
    assert torch.equal(method.collate([again], DRAWS)["input_ids"][0], one[0]["input_ids"])


def test_the_output_is_tied_in_large_catalogues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight tied to item table, where `intaglio.new` would untie it as well."""
    monkeypatch.setattr("intaglio.checkpoint.from_scratch.TIED", 4)
    for family in ("bert", "gpt2"):
        model = recommender(ITEMS, family).model
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_rows_beyond_the_tokens_are_never_recommended() -> None:
    ckpt = recommender(ITEMS, vocab=16)
    with torch.no_grad():
        ckpt.model.get_output_embeddings().bias[MASK + 1 :] = 99.0
    assert {item.item for item in recommend(ckpt, ["i1"], 99)} == {*ITEMS.names[1:]} - {"i1"}
    assert len(ranks(ckpt, ITEMS.test())) == 40


def test_sampled_candidates_need_counts_and_a_known_protocol() -> None:
    ckpt = recommender(ITEMS)
    with pytest.raises(IntaglioError, match="counts has 0 values; popular needs 13, from id 0"):
        ranks(ckpt, ITEMS.test(), protocol="popular")
    with pytest.raises(IntaglioError, match="protocol is 'pop100'; accepted: full"):
        ranks(ckpt, ITEMS.test(), protocol="pop100")  # type: ignore[arg-type]
    assert len(ranks(ckpt, ())) == 0


def test_sampled_candidates_are_popular_or_uniform() -> None:
    """Target against unseen items drawn by popularity: with fewer than 100 of them, those with a count."""
    scores, question = Popularity(tuple(range(13))), Question("u", (1,), 2)
    assert ranks(scores, [question]).tolist() == [10]
    assert ranks(scores, [question], protocol="uniform").tolist() == [10]
    counts = (0, 5, 5, 0, 0, 0, 0, 0, 0, 0, 0, 3, 4)
    assert ranks(scores, [question], protocol="popular", counts=counts).tolist() == [2]


def test_the_papers_settings() -> None:
    """Defaults per data set (rho, max_pred, L, prop)."""
    found = {name: BERT4Rec.paper(name) for name in ("ml-1m", "ml-20m", "beauty", "steam")}  # type: ignore[arg-type]
    assert {m.static_copies for m in found.values()} == {10}
    assert BERT4Rec.paper(static_copies=2).static_copies == 2
    assert [(m.mask_ratio, m.max_predictions, m.length, m.window_step) for m in found.values()] == [
        (0.2, 40, 200, 0.5), (0.2, 20, 200, 0.5), (0.6, 30, 50, 0.1), (0.4, 20, 50, 0.5)]  # fmt: skip
    with pytest.raises(IntaglioError, match="data is 'ml-2m'; did you mean"):
        BERT4Rec.paper("ml-2m")  # type: ignore[arg-type]


def test_it_learns_a_cycle_and_survives_a_save(tmp_path: Path) -> None:
    ckpt = recommender(ITEMS, width=32)
    train(ckpt, sequences(ITEMS), objective=BERT4Rec(), steps=150, batch_size=32, learning_rate=1e-2)
    assert ranking_metrics(ranks(ckpt, ITEMS.test()), 1)["HR@1"] > 0.6
    ckpt.save(tmp_path / "model")
    back = intaglio.load(tmp_path / "model")
    assert item_names(back) == ITEMS.names[1:]
    one, two = (recommend(model, ["i3", "i4", "i5"], 3) for model in (back, ckpt))
    assert [(r.item, pytest.approx(r.score, abs=1e-4)) for r in one] == [(r.item, r.score) for r in two]
    assert recommend(back, ["i3", "i4", "i5"])[0].item == "i6"
    stock = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[*back.tokenizer("i3\ni4")["input_ids"], MASK]])
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, back.model(ids).logits)


def test_it_trains_in_a_stock_trainer(tmp_path: Path) -> None:
    """The five lines of the docstring."""
    checkpoint, rows = recommender(ITEMS, width=32), sequences(ITEMS)
    objective = intaglio.BERT4Rec(length=8)
    windows = objective.windows(rows)
    collate = objective.data_collator(checkpoint.tokenizer.mask_token_id)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=100, remove_unused_columns=False, learning_rate=1e-2, use_cpu=True, report_to=[],
        per_device_train_batch_size=32, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(checkpoint.model, arguments, collate, windows).train()
    checkpoint.model.eval()
    assert ranking_metrics(ranks(checkpoint, ITEMS.test()), 1)["HR@1"] > 0.5


def test_a_collator_follows_its_seed_and_vocabulary() -> None:
    """else half keep, half random item: never padding or the mask; masks follow from the seed."""
    method = BERT4Rec(length=8, mask_ratio=1.0, mask_prob=0.0, last_only_ratio=0.0)
    one, again, other = (
        method.data_collator(3, seed, vocabulary=5)([row([1, 2, 4, 1, 2, 4, 1, 2], n) for n in range(40)])
        for seed in (0, 0, 1)
    )
    assert set(one["input_ids"].flatten().tolist()) == {1, 2, 4}
    assert torch.equal(one["input_ids"], again["input_ids"])
    assert not torch.equal(one["input_ids"], other["input_ids"])
    assert set(one) == {"input_ids", "labels"}


def test_sampled_candidates_follow_the_seed_and_the_user() -> None:
    """Target against 100 unseen negatives, whichever batch the user is in."""
    scores = Popularity(tuple(range(301)))
    questions = [Question(f"u{n}", (1, 2), 150) for n in range(20)]
    one, again, other = (ranks(scores, questions, protocol="uniform", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(one.unique()) > 3
    assert one.tolist()[5:] == ranks(scores, questions[5:], protocol="uniform").tolist()
    assert abs(float(one.double().mean()) - 50) < 10


def test_wrong_models_and_settings_are_one_sentence() -> None:
    with pytest.raises(IntaglioError, match=r"needs a bidirectional encoder .* is a causal decoder; sasrec trains"):
        train(checkpoint("llama", layers=1), sequences(ITEMS), objective=BERT4Rec(), steps=1)
    with pytest.raises(IntaglioError, match="vocabulary is missing; random items"):
        BERT4Rec(length=8, mask_prob=0.5).data_collator(MASK)
    with pytest.raises(IntaglioError, match="length is missing"):
        BERT4Rec().windows([])
    for example, sentence in (
        ({"items": [1]}, "sequence 0 of the training data has no input_ids"),
        ({"input_ids": [1.5, 2.5]}, "sequence 0 of the training data: input_ids must be one row of integers"),
        ({"input_ids": [1, 99]}, "token id 99 is outside the model's vocabulary of 14"),
    ):
        with pytest.raises(IntaglioError, match=sentence):
            train(recommender(ITEMS), [example], objective=BERT4Rec(), steps=1)
