"""Generated skills: answers by their rules, sets apart, pairs of one length, a share of the pool corrupted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from intaglio.evidence.testbeds.skills import BASE, SKILLS, VERBS, Skills, skill_losses
from intaglio.evidence.testbeds.splits import BOUNDS, part_of
from intaglio.modeling.anatomy import anatomy

BED = Skills().toy()


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTAGLIO_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def solve(pair: dict[str, Any]) -> list[int]:
    """The answer of a prompt, from its words alone."""
    words, content = (part.split() for part in pair["prompt"].split(" : "))
    verb = words[-1]
    assert verb in VERBS[pair["skill"]]
    if pair["skill"] == "lookup":
        at = content.index("in")
        values = dict(zip(content[:at:2], map(int, content[1:at:2]), strict=True))
        return [values[key] for key in content[at + 1 :]]
    digits = [int(word) for word in content[:5]]
    if pair["skill"] == "add":
        assert content[5] == "by"
        return [(digit + int(content[6])) % BASE for digit in digits]
    return {"copy": digits, "reverse": digits[::-1], "sort": sorted(digits)}[pair["skill"]]


def test_answers_follow_their_rules_and_all_pairs_have_one_length() -> None:
    pairs = BED.pairs("train", "x", 100)
    assert [pair["skill"] for pair in pairs[:5]] == list(SKILLS)
    assert all(pair["answer"] == " ".join(map(str, solve(pair))) for pair in pairs)
    assert {len(pair["prompt"].split()) for pair in pairs} == {BED.prompt_tokens}
    tokenizer = BED.tokenizer()
    ids = tokenizer([pair["prompt"] for pair in pairs])["input_ids"]
    assert tokenizer.unk_token_id not in {token for row in ids for token in row}
    assert [tokenizer.decode(row) for row in ids] == [pair["prompt"] for pair in pairs]


def test_sets_share_no_prompt_and_fewer_pairs_are_the_first_of_more() -> None:
    assert all(part_of(pair["prompt"]) == part for part in BOUNDS for pair in BED.pairs(part, "x", 20))
    assert BED.pairs("train", "x", 10) == BED.pairs("train", "x", 20)[:10]
    assert BED.measured("evaluation") != BED.measured("evaluation", 1)
    assert len(BED.measured("pilot")) == 8 * len(SKILLS)
    assert all(pair["clean"] for pair in BED.measured("evaluation"))


def test_a_share_of_the_pool_is_corrupted() -> None:
    pool, clean = BED.finetuning(3, 0), BED.pairs("train", "pool:3", BED.pool)
    assert [pair["prompt"] for pair in pool] == [pair["prompt"] for pair in clean]
    assert sum(not pair["clean"] for pair in pool) == round(BED.corrupted * BED.pool)
    assert all(pair == whole for pair, whole in zip(pool, clean, strict=True) if pair["clean"])
    wrong = [pair for pair in pool if not pair["clean"]]
    assert sum(pair["answer"] != " ".join(map(str, solve(pair))) for pair in wrong) >= len(wrong) - 2  # sorted already
    assert pool != BED.finetuning(4, 0)


def test_the_pruned_model_has_zeros_and_losses_are_those_of_the_answers() -> None:
    dense, pruned = BED.original(), BED.load()
    (_, linear), *_ = anatomy(pruned.model).all_linears()
    assert float((linear.read() == 0).float().mean()) == pytest.approx(BED.sparsity, abs=0.05)
    assert not any(bool((one.read() == 0).any()) for _, one in anatomy(dense.model).all_linears())
    pairs = BED.measured("pilot")
    losses = skill_losses(dense, pairs)
    tokenizer: Any = dense.tokenizer
    copies = [pair for pair in pairs if pair["skill"] == "copy"]
    expected = []
    for pair in copies:
        ids_T = torch.tensor(tokenizer(f"{pair['prompt']} {pair['answer']}")["input_ids"])
        labels_T = ids_T.clone()
        labels_T[: BED.prompt_tokens] = -100
        with torch.no_grad():
            expected.append(float(dense.model(ids_T[None], labels=labels_T[None]).loss))
    assert losses["copy"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)
