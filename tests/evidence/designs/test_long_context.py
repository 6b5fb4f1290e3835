"""Long needles and their design, on a small model of bytes."""

from __future__ import annotations

import itertools

import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.evidence.claims.sparse_frontier import CLAIM
from intaglio.evidence.designs.long_context import BYTES, RETRIEVAL, SCORE, SPARSITY
from intaglio.evidence.engine.claim import Arm, RunKey
from intaglio.evidence.testbeds import long_needles
from intaglio.evidence.testbeds.long_needles import LongNeedles
from intaglio.methods.attention.sparse_frontier import installed

DESIGN = CLAIM.design.toy(**CLAIM.toy)
BED: LongNeedles = DESIGN.bed
KEY = RunKey("toy", 0)


def test_documents_hold_each_fact_once_and_questions_lack_the_answer() -> None:
    text = BED.load().tokenizer.decode
    document = BED.document("pilot", 3)
    whole = text(document.ids[0])
    assert BED.shortest <= document.ids.shape[1] <= BED.longest
    assert len(document.questions) == BED.needles
    for question, answer in document.questions:
        fact = text(torch.cat([question, answer], 1)[0])
        assert whole.count(fact) == 1
        assert whole.count(text(question[0])) == 1
        assert len(text(answer[0]).strip()) > 0
    assert torch.equal(BED.document("pilot", 3).ids, document.ids)
    assert not torch.equal(BED.document("pilot", 4).ids, document.ids)
    assert not torch.equal(BED.document("evaluation", 3).ids, document.ids)


def test_windows_become_a_single_text(monkeypatch: pytest.MonkeyPatch) -> None:
    start = BED.load().tokenizer("=", add_special_tokens=False)["input_ids"][0]  # in the code, and in no fact
    assert BED.document("pilot", 3).ids[0].tolist().count(start) > 1
    monkeypatch.setattr(long_needles, "special_affixes", lambda tokenizer: ([start], []))
    ids = BED.document("pilot", 3).ids[0].tolist()
    assert ids[0] == start
    assert start not in ids[1:]


def test_filler_that_is_too_short_is_refused() -> None:
    with pytest.raises(IntaglioError, match=r"a document takes 9[0-9]{3} besides its facts"):
        LongNeedles(BED.source, 10_000, 10_000, 2).document("pilot", 0)


def test_dense_attention_is_a_plain_pass() -> None:
    result = DESIGN.run(CLAIM.arms["dense"], KEY, {})
    model, document = BED.load().model, BED.document(KEY.split, KEY.seed)
    for number, (question, answer) in enumerate(document.questions):
        ids = torch.cat([document.ids, question, answer], 1)
        with torch.no_grad():
            log_probs = model(ids).logits[0, -answer.shape[1] - 1 : -1].float().log_softmax(-1)
        expected = float(log_probs.gather(1, answer.T).sum())
        assert result.values[SCORE.name][str(number)] == pytest.approx(expected, abs=1e-3)  # type: ignore[index]
        right = bool((log_probs.argmax(-1) == answer[0]).all())
        assert result.values[RETRIEVAL.name][str(number)] == 100 * right  # type: ignore[index]
    assert result.values[SPARSITY.name] == 0
    assert installed(model) is None


def test_arms_share_the_document_and_differ_in_what_they_read() -> None:
    results = {name: DESIGN.run(arm, KEY, {}) for name, arm in CLAIM.arms.items()}
    assert len({result.parity["document"] for result in results.values()}) == 1
    scores = {name: torch.tensor(list(result.values[SCORE.name].values())) for name, result in results.items()}  # type: ignore[union-attr]
    for one, other in itertools.combinations(scores, 2):
        assert not torch.allclose(scores[one], scores[other], atol=1e-4), (one, other)
    for name, result in results.items():
        assert (result.values[SPARSITY.name] > 0.5) == (name != "dense")  # type: ignore[operator]
    sizes = {name: result.values[BYTES.name] for name, result in results.items()}
    assert sizes["snapkv"] < sizes["dense"] < sizes["quest"]  # type: ignore[operator]
    half = DESIGN.run(Arm("", {"policy": "quest", "sparsity": 0.5}), KEY, {})
    assert half.values[SPARSITY.name] < results["quest"].values[SPARSITY.name]  # type: ignore[operator]
