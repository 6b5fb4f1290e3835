"""Dimension letters: N documents, T tokens, Q questions, A tokens of an answer, V vocabulary."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from intaglio.checkpoint.from_scratch import new
from intaglio.errors import IntaglioError
from intaglio.evidence.worlds.haystack import BOS, BOUNDS, QUESTION, SPECIAL, Haystack, Needles, answered
from intaglio.trainer import train

WORLD = Haystack()
WORLDS = st.builds(
    Haystack,
    length=st.integers(90, 120),
    facts=st.integers(1, 6),
    questions=st.just(1),
    words=st.integers(2, 20),
    keys=st.integers(20, 40),
    key_tokens=st.just(2),
    values=st.integers(2, 20),
    value_tokens=st.integers(1, 4),
    language=st.integers(0, 3),
)


def spelled(world: Haystack, needles: Needles) -> list[list[str]]:
    return [[world.vocabulary[token] for token in row] for row in needles.segments.ids_NT.tolist()]


def facts_of(world: Haystack, row: list[str]) -> tuple[dict[tuple[str, ...], tuple[str, ...]], list[list[str]]]:
    """The facts and the questions with their answers, read back from the words alone."""
    size = world.key_tokens + world.value_tokens
    body = row[: row.index("?")]
    tail = row[row.index("?") :]
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    place = 0
    while place < len(body):
        if body[place].startswith("k"):
            fact = body[place : place + size]
            found[tuple(fact[: world.key_tokens])] = tuple(fact[world.key_tokens :])
            place += size
        else:
            assert body[place] == "<s>" if place == 0 else body[place].startswith("w")
            place += 1
    return found, [tail[i + 1 : i + 1 + size] for i in range(0, len(tail), 1 + size)]


@given(WORLDS, st.integers(0, 1000), st.sampled_from(sorted(BOUNDS)))
def test_every_document_says_what_it_is_asked(world: Haystack, seed: int, part: Any) -> None:
    needles = world.draw(part, 3, seed)
    assert needles.segments.ids_NT.shape == (3, world.length)
    sealed = set(world.sealed(part))
    for row, answer_QA in zip(spelled(world, needles), needles.answers_NQA.tolist(), strict=True):
        facts, questions = facts_of(world, row)
        assert len(facts) == world.facts
        (question,) = questions
        key, answer = tuple(question[: world.key_tokens]), tuple(question[world.key_tokens :])
        assert facts[key] == answer == tuple(world.vocabulary[token] for token in answer_QA[0])
        for other in facts:
            assert tuple(int(token[1:]) for token in other) in sealed
        # A key is known by any of its tokens.
        for place in range(world.key_tokens):
            assert len({other[place] for other in facts}) == world.facts


def test_several_questions() -> None:
    world = Haystack(questions=3, facts=5, value_tokens=2, length=80)
    needles = world.training(0, 20)
    assert needles.places_NQA.shape == (20, 3, 2)
    for row, answers in zip(spelled(world, needles), needles.answers_NQA.tolist(), strict=True):
        facts, questions = facts_of(world, row)
        assert len({tuple(question[:2]) for question in questions}) == 3
        for question, answer in zip(questions, answers, strict=True):
            assert facts[tuple(question[:2])] == tuple(question[2:]) == tuple(world.vocabulary[t] for t in answer)


def test_the_sets_share_no_key() -> None:
    parts = {part: set(WORLD.sealed(part)) for part in BOUNDS}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 32**2
    assert len(parts["train"]) > 500
    # Every token of the keys is learned, though a key of the evaluation is not.
    for place in range(2):
        assert {key[place] for key in parts["train"]} == set(range(32))


def test_a_document_follows_from_its_set_seed_and_index_alone() -> None:
    whole = WORLD.training(7, 20)
    pieces = [WORLD.training(7, 8, start=start) for start in (0, 8)]
    rows = torch.cat([piece.segments.ids_NT for piece in pieces])
    assert torch.equal(rows, whole.segments.ids_NT[:16])
    assert whole.names[:2] == ("train-7-0", "train-7-1")
    assert whole.segments.digest == Haystack().training(7, 20).segments.digest
    everything = [WORLD.draw(part, 50, seed) for part, seed in itertools.product(BOUNDS, range(3))]  # type: ignore[arg-type]
    rows = torch.cat([needles.segments.ids_NT for needles in everything])
    assert len({tuple(row) for row in rows.tolist()}) == len(rows) == 600


def test_stages_and_bases_have_documents_of_their_own() -> None:
    digests = {WORLD.documents(stage, base).segments.digest for stage in ("pilot", "run") for base in range(3)}  # type: ignore[arg-type]
    assert len(digests) == 6
    assert WORLD.documents("run").segments.n == 512
    assert WORLD.documents("pilot").segments.n == 256
    assert WORLD.validation(5).names[0] == "validation-0-0"


@pytest.mark.parametrize("length", [64, 100])
def test_depth_is_where_the_fact_stands(length: int) -> None:
    filler = length - 1 - 4 * 3 - 4
    for depth in (0.0, 0.25, 0.5, 1.0):
        needles = WORLD.documents("pilot", depth=depth, length=length)
        assert torch.equal(needles.depths_NQ, torch.full((256, 1), round(depth * filler) / filler, dtype=torch.float64))
        for row in spelled(WORLD, needles)[:20]:
            asked = row[row.index("?") + 1 : row.index("?") + 3]
            place = next(i for i in range(len(row)) if row[i : i + 2] == asked)
            assert sum(token.startswith("w") for token in row[:place]) == round(depth * filler)


def test_depth_moves_the_fact_and_nothing_else() -> None:
    free, deep = WORLD.documents("run"), WORLD.documents("run", depth=0.5)
    assert torch.equal(free.answers_NQA, deep.answers_NQA)
    for a, b in zip(spelled(WORLD, free), spelled(WORLD, deep), strict=True):
        assert [token for token in a if token[0] == "w"] == [token for token in b if token[0] == "w"]
        assert facts_of(WORLD, a) == facts_of(WORLD, b)
    # Where nothing is said, depths are uniform: mean 1/2, standard deviation of the mean 0.013.
    assert abs(float(free.depths_NQ.mean()) - 0.5) < 0.05
    assert float(free.depths_NQ.std()) == pytest.approx(12**-0.5, abs=0.03)


def test_the_filler_is_one_markov_chain_in_all_sets() -> None:
    def steps(needles: Needles) -> np.ndarray:
        count = np.zeros((16, 16))
        for row in spelled(WORLD, needles):
            path = [int(token[1:]) for token in row if token[0] == "w"]
            np.add.at(count, (path[:-1], path[1:]), 1)
        return count / count.sum(1, keepdims=True).clip(1)

    train, evaluation = steps(WORLD.training(0, 2000)), steps(WORLD.draw("evaluation", 2000, 1))
    assert float(np.abs(train - evaluation).max()) < 0.06
    other = steps(Haystack(language=1).training(0, 500))
    assert float(np.abs(train - other).max()) > 0.3
    # It can be learned, and it is not trivial: a word has on average between 1.5 and 8 likely successors.
    bits = -(train * np.log2(train.clip(1e-12))).sum(1).mean()
    assert 0.6 < bits < 3


def test_values_cannot_be_guessed() -> None:
    values = WORLD.training(0, 3200).answers_NQA.flatten()
    counts = torch.bincount(values - int(values.min()), minlength=16)
    # 3,200 over 16: 200 each, with a standard deviation of 14.
    assert int((counts - 200).abs().max()) < 70


class Oracle(nn.Module):
    """Says the answer at the right places, or a value that is wrong in the documents of `failing`."""

    def __init__(self, needles: Needles, failing: set[int], size: int) -> None:
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros(1))
        self.next = {tuple(row): [*row[1:], 0] for row in needles.segments.ids_NT.tolist()}
        self.rows = [tuple(row) for row in needles.segments.ids_NT.tolist()]
        self.failing, self.size = failing, size

    def forward(self, input_ids: Tensor) -> Any:
        said = []
        for row in input_ids.tolist():
            after = torch.tensor(self.next[tuple(row)])
            if self.rows.index(tuple(row)) in self.failing:
                after[-2] = 0
            said.append(nn.functional.one_hot(after, self.size).float())
        return SimpleNamespace(logits=torch.stack(said))


def test_accuracy_by_hand() -> None:
    world = Haystack(value_tokens=3, length=80)
    needles = world.training(0, 10)
    model = Oracle(needles, {2, 5}, len(world.vocabulary))
    right = answered(model, needles, batch_size=3)
    assert right.shape == (10, 1)
    assert right.flatten().nonzero().flatten().tolist() == [0, 1, 3, 4, 6, 7, 8, 9]  # one wrong token of three is wrong
    said = torch.cat([needles.segments.ids_NT[:, 1:], torch.zeros(10, 1, dtype=torch.int64)], dim=1)
    assert needles.right_NQ(said).all()
    assert not needles.right_NQ(torch.full_like(said, BOS)).any()


def test_labels_and_prompts() -> None:
    needles = Haystack(value_tokens=2, length=70).training(0, 4)
    ids, labels = needles.segments.ids_NT, needles.labels_NT
    assert torch.equal(labels != -100, torch.arange(70).expand(4, 70) >= 68)
    assert torch.equal(labels[:, 68:], ids[:, 68:])
    assert torch.equal(needles.prompts_NT, ids[:, :68])
    assert (needles.prompts_NT[:, 65] == QUESTION).all()


def test_the_tokenizer_reads_what_the_vocabulary_spells() -> None:
    tokenizer = WORLD.tokenizer()
    row = WORLD.training(0, 1).segments.ids_NT[0].tolist()
    text = " ".join(WORLD.vocabulary[token] for token in row)
    assert tokenizer(text)["input_ids"] == row
    assert tokenizer.decode(row) == text
    assert len(tokenizer) == len(WORLD.vocabulary) == len(SPECIAL) + 16 + 32 + 16
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id) == (0, 1, 3)
    assert tokenizer("something else")["input_ids"] == [4, 4]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"facts": 0}, "facts is 0; at least 1"),
        ({"questions": 5}, "questions is 5; there are 4 facts"),
        ({"keys": 7}, "keys is 7; at least 8"),
        ({"key_tokens": 1}, "key_tokens is 1; at least 2"),
        ({"length": 16}, "length is 16; facts and questions alone take 17 tokens"),
        ({"keys": 8}, r"keys is 8; the \w+ set then has \d+ keys, and 16 are needed"),
        ({"keys": 200, "key_tokens": 3}, "8,000,000 different keys; at most 1,000,000"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, int], sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence):
        Haystack(**settings)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(IntaglioError, match=r"depth is 1\.5; it must lie between"):
        WORLD.documents("run", depth=1.5)
    with pytest.raises(IntaglioError, match="length is 10; facts and questions alone take 17"):
        WORLD.documents("run", length=10)
    with pytest.raises(IntaglioError, match="0 documents were asked for"):
        WORLD.training(0, 0)
    with pytest.raises(IntaglioError, match="there is no set 'test'"):
        WORLD.draw("test", 1, 0)  # type: ignore[arg-type]


def test_settings_compare_by_their_fields() -> None:
    assert Haystack() == Haystack(length=64)
    assert len({Haystack(), Haystack(), Haystack(length=65)}) == 2
    assert asdict(Haystack())["key_tokens"] == 2


def test_a_new_model_reads_it_and_can_be_trained_on_it() -> None:
    needles = WORLD.training(0, 8)
    checkpoint = new("llama", width=16, depth=1, context=WORLD.length, tokenizer=WORLD.tokenizer())
    assert checkpoint.config.vocab_size == len(WORLD.vocabulary)
    assert answered(checkpoint.model, needles).shape == (8, 1)
    rows = [
        {"input_ids": ids, "labels": labels}
        for ids, labels in zip(needles.segments.ids_NT, needles.labels_NT, strict=True)
    ]
    for data in (needles.segments, rows):
        assert len(train(checkpoint, data, steps=1, batch_size=4).history) == 1
