"""Hard negatives: ranked high, never relevant, within the window."""

from __future__ import annotations

import pytest

from intaglio.data.text_pairs import TextPair
from intaglio.errors import IntaglioError
from intaglio.methods.retrieval.kalm_v2 import KaLMV2
from intaglio.search.encoders import ObjectiveEncoder
from intaglio.search.hard_negatives import mine_hard_negatives
from intaglio.trainer.contrastive import Contrastive
from intaglio.trainer.mining import Mining
from tests.trainer.helpers import checkpoint

PAIRS = [
    TextPair("red fox", "the red fox runs"),
    TextPair("red fox", "a red fox, a red fox"),
    TextPair("brown dog", "the brown dog sleeps", ("a red dog",)),
    TextPair("blue river", "the blue river and the red fox and a dog"),
    TextPair("green tree", "a tree", ()),
]


def mined(**fields: object) -> dict[str, tuple[str, ...]]:
    found = mine_hard_negatives(PAIRS, Mining.model_validate(fields))
    return {pair.positive: pair.negatives for pair in found}


def test_negatives_are_ranked_and_not_relevant() -> None:
    negatives = mined()
    # Relevant to an equal query are both fox texts: neither is a negative of the other.
    assert negatives["the red fox runs"] == negatives["a red fox, a red fox"]
    assert not {"the red fox runs", "a red fox, a red fox"} & set(negatives["the red fox runs"])
    assert set(negatives["the red fox runs"]) == {"a red dog", "the blue river and the red fox and a dog"}
    # A pair's own negatives follow, once.
    assert negatives["the brown dog sleeps"][-1] == "a red dog"
    assert negatives["the brown dog sleeps"].count("a red dog") == 1


def test_the_window_and_the_count() -> None:
    every = mined()["the red fox runs"]
    assert mined(count=1)["the red fox runs"] == every[:1]
    assert mined(ranks=[2, 2])["the red fox runs"] == every[1:]


def test_the_margin_drops_what_scores_like_the_positive() -> None:
    assert mined(margin=1e-6)["the red fox runs"] == ()
    assert mined(margin=100.0) == mined()


def test_inconsistent_pairs_are_dropped() -> None:
    assert set(mined(consistency=1)) <= set(mined())
    assert "the brown dog sleeps" in mined(consistency=1)
    with pytest.raises(IntaglioError, match="no pair is left"):
        mine_hard_negatives([TextPair("zebra", "a tree"), TextPair("lion", "a dog")], Mining(consistency=1))


def test_sampled_negatives_are_of_the_window() -> None:
    """Seven hard negatives sampled from ranks 50-100: any of the window, not its first."""
    texts = [f"the fox number {n}" for n in range(20)]
    pairs = [TextPair(f"fox {n}", text, task="t", instruction="i", symmetric=True) for n, text in enumerate(texts)]
    window = mine_hard_negatives(pairs, Mining(ranks=(3, 12), count=10))
    drawn = [mine_hard_negatives(pairs, Mining(ranks=(3, 12), count=4, sample=True)) for _ in range(2)]
    assert drawn[0] == drawn[1]
    places = []
    for whole, pair in zip(window, drawn[0], strict=True):
        places.append([whole.negatives.index(text) for text in pair.negatives])
        assert len(set(places[-1])) == 4
        assert (pair.task, pair.instruction, pair.symmetric) == ("t", "i", True)
    assert {place for own in places for place in own} == set(range(10))
    assert len({tuple(own) for own in places}) > 10
    assert all(own == sorted(own) for own in places)


def test_the_query_itself_is_no_negative() -> None:
    pairs = [TextPair("a red fox", "the fox"), TextPair("the fox", "a red fox"), TextPair("a dog", "the dog")]
    assert [pair.negatives for pair in mine_hard_negatives(pairs)[:2]] == [(), ()]


def test_scored_pairs_are_refused() -> None:
    with pytest.raises(IntaglioError, match="a teacher's scores"):
        mine_hard_negatives([TextPair("q", "p", ("n",), (1.0, 0.0))])


def test_the_model_itself_mines_as_it_encodes() -> None:
    ckpt = checkpoint()
    method = Contrastive(query_length=2).setup(ckpt)
    found = mine_hard_negatives(PAIRS, Mining(count=1), encoder=ObjectiveEncoder(method, ckpt, "self"))
    assert [len(pair.negatives) for pair in found] == [1, 1, 2, 1, 1]


def test_the_pairs_own_instructions_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt = checkpoint()
    method = KaLMV2(query_length=24, document_length=24).setup(ckpt)
    prompts: set[tuple[str, str]] = set()
    own = KaLMV2._prompt

    def seen(self: KaLMV2, name: str, pair: TextPair | None = None) -> str:
        prompts.add((name, "" if pair is None else f"{pair.instruction}"))
        return own(self, name, pair)

    monkeypatch.setattr(KaLMV2, "_prompt", seen)
    pairs = [TextPair("red fox", "a fox", instruction="find animals"), TextPair("red", "a dog", instruction="find a")]
    mine_hard_negatives(pairs, Mining(count=1), encoder=ObjectiveEncoder(method, ckpt, "self"))
    assert {("query", "find animals"), ("query", "find a")} <= prompts
