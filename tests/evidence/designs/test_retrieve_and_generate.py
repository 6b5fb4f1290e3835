"""Retrieve and Generate with toy arms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import pytest

from intaglio.evidence.designs.encoders import as_it_is
from intaglio.evidence.designs.generate import DISTINCT, Generate
from intaglio.evidence.designs.retrieve import MRR, NDCG, Retrieve, per_query, ranking_loss
from intaglio.evidence.engine.claim import Arm, RunKey
from intaglio.evidence.testbeds.prompts import Prompts

KEY = RunKey("look", 0)


def word_overlap(context: Any, weight: float = 1.0) -> Any:
    def search(queries: Mapping[str, str], documents: Mapping[str, str]) -> dict[str, dict[str, float]]:
        return {
            query: {
                name: weight * len(set(text.split()) & set(document.split())) for name, document in documents.items()
            }
            for query, text in queries.items()
        }

    return search


def test_retrieval_is_measured_for_each_query(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path))
    design = Retrieve().toy()
    result = design.run(Arm("words", {"retriever": word_overlap}), KEY, {})
    data = design.bed.retrieval("evaluation")
    assert result.values[MRR.name].keys() == result.values[NDCG.name].keys() == data.queries.keys()  # type: ignore[union-attr]
    assert result.parity == {"data": data.digest}
    reverse = design.run(Arm("the least alike", {"retriever": word_overlap, "weight": -1.0}), KEY, {})
    means = [fmean(one.values[MRR.name].values()) for one in (result, reverse)]  # type: ignore[union-attr, arg-type]
    assert means[0] > means[1]


def test_metrics_by_hand() -> None:
    scores = {"a": 3.0, "b": 2.0, "c": 1.0}
    relevant = [{"b": 1}, {"x": 1}, {"a": 1}, {"c": 1, "a": 2}]
    by_query = {str(number): scores for number in range(len(relevant))}
    judged = {str(number): grades for number, grades in enumerate(relevant)}
    assert list(per_query(by_query, judged, MRR).values()) == [0.5, 0.0, 1.0, 1.0]
    gains = [0.6309, 0.0, 1.0, (2 + 0.5) / (2 + 0.6309)]
    assert list(per_query(by_query, judged, NDCG).values()) == pytest.approx(gains, abs=1e-4)
    assert per_query({"0": {"b": 1.0, "a": 1.0}}, {"0": {"a": 1}}, MRR) == {"0": 1.0}


def test_the_ranking_loss_is_a_softmax_over_all_documents() -> None:
    scores = {"q": {"a": 1.0, "b": 2.0}}  # c has no score, which counts as 0
    expected = math.log(math.exp(1) + math.exp(2) + 1) - 2
    assert ranking_loss(scores, {"q": {"b": 1}}, ["a", "b", "c"]) == pytest.approx(expected)


def test_a_retriever_may_add_values(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path))

    def counted(context: Any) -> Any:
        context.values["terms"] = 3.0
        return word_overlap(context)

    result = Retrieve().toy().run(Arm("words", {"retriever": counted}), KEY, {})
    assert result.values["terms"] == 3.0
    bm25 = Retrieve().toy().run(Arm("BM25", {"retriever": as_it_is}), KEY, {"learning_rate": 1.0})
    assert 0 < fmean(bm25.values[MRR.name].values()) <= 1  # type: ignore[union-attr]


def repeat(model: Any, prompt: tuple[int, ...], seed: int, times: int) -> list[list[int]]:
    return [list(prompt[:4]) * times, [seed]]


def test_outputs_are_scored_for_each_prompt() -> None:
    design = Generate().toy()
    once, twice = (design.run(Arm("x", {"generator": repeat}), KEY, {"times": times}) for times in (1, 2))
    assert len(once.values[DISTINCT.name]) == 8  # type: ignore[arg-type]
    assert once.parity == twice.parity
    for name, share in once.values[DISTINCT.name].items():  # type: ignore[union-attr]
        assert twice.values[DISTINCT.name][name] < share <= 1  # type: ignore[index, operator]
    assert Generate(Prompts()) == Generate()
