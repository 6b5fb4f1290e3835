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

from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.haystack import BOS, SPECIAL, Haystack, Needles, answers
from intaglio.evidence.testbeds.splits import BOUNDS
from intaglio.trainer import train

BED = Haystack()
BEDS = st.builds(
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


def spelled(bed: Haystack, needles: Needles) -> list[list[str]]:
    return [[bed.vocabulary[token] for token in row] for row in needles.segments.ids_NT.tolist()]


def facts_of(bed: Haystack, row: list[str]) -> tuple[dict[tuple[str, ...], tuple[str, ...]], list[list[str]]]:
    """The facts and the questions with their answers, read back from the words alone."""
    size = bed.key_tokens + bed.value_tokens
    body = row[: row.index("?")]
    tail = row[row.index("?") :]
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    place = 0
    while place < len(body):
        if body[place].startswith("k"):
            fact = body[place : place + size]
            found[tuple(fact[: bed.key_tokens])] = tuple(fact[bed.key_tokens :])
            place += size
        else:
            assert body[place] == "<s>" if place == 0 else body[place].startswith("w")
            place += 1
    return found, [tail[i + 1 : i + 1 + size] for i in range(0, len(tail), 1 + size)]


@given(BEDS, st.integers(0, 1000), st.sampled_from(sorted(BOUNDS)))
def test_every_document_says_what_it_is_asked(bed: Haystack, seed: int, part: Any) -> None:
    needles = bed.draw(part, 3, seed)
    assert needles.segments.ids_NT.shape == (3, bed.length)
    keys = set(bed.keys_of(part))
    for row, answer_QA in zip(spelled(bed, needles), needles.answers_NQA.tolist(), strict=True):
        facts, questions = facts_of(bed, row)
        assert len(facts) == bed.facts
        (question,) = questions
        key, answer = tuple(question[: bed.key_tokens]), tuple(question[bed.key_tokens :])
        assert facts[key] == answer == tuple(bed.vocabulary[token] for token in answer_QA[0])
        for other in facts:
            assert tuple(int(token[1:]) for token in other) in keys
        # A key is known by any of its tokens.
        for place in range(bed.key_tokens):
            assert len({other[place] for other in facts}) == bed.facts


def test_several_questions() -> None:
    bed = Haystack(questions=3, facts=5, value_tokens=2, length=80)
    needles = bed.draw("train", 20, 0)
    assert needles.positions_NQA.shape == (20, 3, 2)
    for row, expected in zip(spelled(bed, needles), needles.answers_NQA.tolist(), strict=True):
        facts, questions = facts_of(bed, row)
        assert len({tuple(question[:2]) for question in questions}) == 3
        for question, answer in zip(questions, expected, strict=True):
            assert facts[tuple(question[:2])] == tuple(question[2:]) == tuple(bed.vocabulary[t] for t in answer)


def test_the_sets_share_no_key() -> None:
    parts = {part: set(BED.keys_of(part)) for part in BOUNDS}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 32**2
    assert len(parts["train"]) > 500
    # Every token of the keys is learned, though a key of the evaluation is not.
    for place in range(2):
        assert {key[place] for key in parts["train"]} == set(range(32))


def test_a_document_follows_from_its_set_seed_and_index_alone() -> None:
    whole = BED.draw("train", 20, 7)
    assert torch.equal(BED.draw("train", 8, 7).segments.ids_NT, whole.segments.ids_NT[:8])
    assert whole.names[:2] == ("train-7-0", "train-7-1")
    assert whole.segments.digest == Haystack().draw("train", 20, 7).segments.digest
    everything = [BED.draw(part, 50, seed) for part, seed in itertools.product(BOUNDS, range(3))]
    rows = torch.cat([needles.segments.ids_NT for needles in everything])
    assert len({tuple(row) for row in rows.tolist()}) == len(rows) == 600


def test_stages_and_bases_have_documents_of_their_own() -> None:
    digests = {BED.documents(part, base).segments.digest for part in ("pilot", "evaluation") for base in range(3)}
    assert len(digests) == 6
    assert BED.documents("evaluation").segments.n == 512
    assert BED.documents("pilot").segments.n == 256
    assert BED.documents("validation", 5).names[0] == "validation-5-0"


def test_facts_stand_at_uniform_depths() -> None:
    depths_NQ = BED.documents("evaluation").depths_NQ
    assert abs(float(depths_NQ.mean()) - 0.5) < 0.05  # the standard deviation of the mean is 0.013
    assert float(depths_NQ.std()) == pytest.approx(12**-0.5, abs=0.03)


def test_the_filler_is_one_markov_chain_in_all_sets() -> None:
    def steps(needles: Needles) -> np.ndarray:
        count = np.zeros((16, 16))
        for row in spelled(BED, needles):
            path = [int(token[1:]) for token in row if token[0] == "w"]
            np.add.at(count, (path[:-1], path[1:]), 1)
        return count / count.sum(1, keepdims=True).clip(1)

    train, evaluation = steps(BED.draw("train", 2000, 0)), steps(BED.draw("evaluation", 2000, 1))
    assert float(np.abs(train - evaluation).max()) < 0.06
    other = steps(Haystack(language=1).draw("train", 500, 0))
    assert float(np.abs(train - other).max()) > 0.3
    # It can be learned, and it is not trivial: a word has on average between 1.5 and 8 likely successors.
    bits = -(train * np.log2(train.clip(1e-12))).sum(1).mean()
    assert 0.6 < bits < 3


def test_values_cannot_be_guessed() -> None:
    values = BED.draw("train", 3200, 0).answers_NQA.flatten()
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
        logits = []
        for row in input_ids.tolist():
            after = torch.tensor(self.next[tuple(row)])
            if self.rows.index(tuple(row)) in self.failing:
                after[-2] = 0
            logits.append(nn.functional.one_hot(after, self.size).float())
        return SimpleNamespace(logits=torch.stack(logits))


def test_accuracy_by_hand() -> None:
    bed = Haystack(value_tokens=3, length=80)
    needles = bed.draw("train", 10, 0)
    model = Oracle(needles, {2, 5}, len(bed.vocabulary))
    right, scores = answers(model, needles, batch_size=3)
    assert (scores.flatten() > -60)[[0, 1, 3, 4]].all()
    assert right.shape == (10, 1)
    assert right.flatten().nonzero().flatten().tolist() == [0, 1, 3, 4, 6, 7, 8, 9]  # one wrong token of three is wrong
    predicted = torch.cat([needles.segments.ids_NT[:, 1:], torch.zeros(10, 1, dtype=torch.int64)], dim=1)
    assert needles.correct_NQ(predicted).all()
    assert not needles.correct_NQ(torch.full_like(predicted, BOS)).any()


def test_the_tokenizer_reads_what_the_vocabulary_spells() -> None:
    tokenizer = BED.tokenizer()
    row = BED.draw("train", 1, 0).segments.ids_NT[0].tolist()
    text = " ".join(BED.vocabulary[token] for token in row)
    assert tokenizer(text)["input_ids"] == row
    assert tokenizer.decode(row) == text
    assert len(tokenizer) == len(BED.vocabulary) == len(SPECIAL) + 16 + 32 + 16
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id) == (0, 1, 3)
    assert tokenizer("something else")["input_ids"] == [4, 4]


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(IntaglioError, match="length is 10; facts and questions alone take 17 tokens"):
        Haystack(length=10).documents("evaluation")
    with pytest.raises(IntaglioError, match="0 documents were requested"):
        BED.draw("train", 0, 0)
    with pytest.raises(IntaglioError, match="there is no set 'test'"):
        BED.draw("test", 1, 0)  # type: ignore[arg-type]


def test_settings_compare_by_their_fields() -> None:
    assert Haystack() == Haystack(length=64)
    assert len({Haystack(), Haystack(), Haystack(length=65)}) == 2
    assert asdict(Haystack())["key_tokens"] == 2


def test_a_new_model_reads_it_and_can_be_trained_on_it() -> None:
    needles = BED.draw("train", 8, 0)
    checkpoint = Haystack(width=16, depth=1).new(0)
    assert checkpoint.config.vocab_size == len(BED.vocabulary)
    assert [result.shape for result in answers(checkpoint.model, needles)] == [(8, 1), (8, 1)]
    assert len(train(checkpoint, needles.segments, steps=1, batch_size=4).history) == 1
