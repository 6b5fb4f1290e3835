"""The tokens that heads may guess: which they are, the way there and back, and that no text depends on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intaglio import load
from intaglio.checkpoint import Checkpoint
from intaglio.cli.generate import generate
from intaglio.errors import IntaglioError
from intaglio.methods.base import Method
from intaglio.methods.decoding.chimera import Chimera
from intaglio.methods.decoding.hidden_transfer import HiddenTransfer
from intaglio.speculative.drafters.medusa import Medusa, MedusaHeads
from intaglio.speculative.heads.lm_head import DraftVocabulary, build_draft_vocabulary
from intaglio.speculative.heads.multi_token_loss import multi_token_loss
from intaglio.speculative.loop import Speculative
from intaglio.trainer.causal_lm import IGNORED
from tests.families import tiny_checkpoint_dir
from tests.speculative.distributions import check_law

KINDS: list[type[Any]] = [Chimera, HiddenTransfer]


def test_the_most_frequent_tokens_and_then_the_lowest_ids() -> None:
    found = build_draft_vocabulary([[7, 7, 9], [9, 7, 3, 5, 5]], 12, 3)
    assert found is not None
    assert found.tolist() == [5, 7, 9]
    more = build_draft_vocabulary([[7, 7]], 12, 4)
    assert more is not None
    assert more.tolist() == [0, 1, 2, 7]
    assert build_draft_vocabulary([[7]], 12, 12) is build_draft_vocabulary([[7]], 12, None) is None
    default = build_draft_vocabulary([], 49_152, None)
    assert default is not None
    assert default.tolist() == list(range(8192))


@given(st.lists(st.integers(0, 29), min_size=1, max_size=29, unique=True), st.integers(0, 2**31))
def test_there_and_back(chosen: list[int], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    tokens_K, weight_VD = torch.tensor(sorted(chosen)), torch.randn(30, 4, generator=rng)
    words, x_RD = DraftVocabulary(weight_VD, tokens_K), torch.randn(3, 4, generator=rng)
    logits_RK = x_RD @ words.matrix(weight_VD).T
    whole_RV = x_RD @ weight_VD.T
    torch.testing.assert_close(words.narrow(whole_RV), logits_RK)
    wide_RV = words.wide(logits_RK)
    assert torch.equal(words.narrow(wide_RV), logits_RK)
    assert int(torch.isinf(wide_RV).sum()) == 3 * (30 - len(chosen))
    assert torch.equal(words.indices(words.tokens(torch.arange(len(chosen)))), torch.arange(len(chosen)))
    others = torch.tensor([IGNORED, *(set(range(30)) - set(chosen))])
    assert (words.indices(others) == IGNORED).all()


def test_all_tokens_lead_nowhere() -> None:
    words, x = DraftVocabulary(), torch.randn(2, 5)
    assert words.wide(x) is words.narrow(x) is words.matrix(x) is x
    assert not words.state_dict()


def test_a_token_that_may_not_be_guessed_is_a_wrong_guess() -> None:
    words, batch = DraftVocabulary(torch.eye(4), torch.tensor([1, 3])), {
        "scored": torch.ones(1, 4, dtype=torch.bool), "target": torch.tensor([[1, 3, 0, 3]])}  # fmt: skip
    logits = torch.randn(1, 4, 2)  # the "states" are logits
    hidden = torch.randn(1, 4, 4)
    found = multi_token_loss(
        batch, [logits], hidden, lambda x: x, lambda x: x, [], goal="text", weights=[1.0], words=words
    )
    # Places 1 to 3 are guessed from places 0 to 2; token 0, at place 2, cannot be.
    expected = torch.nn.functional.cross_entropy(logits[0, [0, 2]], torch.tensor([1, 1]), reduction="sum") / 3
    torch.testing.assert_close(found.total, expected)
    right = sum(int(logits[0, at].argmax() == 1) for at in (0, 2)) / 3
    assert float(found.parts["right_1"]) == pytest.approx(right)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_guess_few_tokens(kind: type[Any], tmp_path: Path) -> None:
    model = tiny_checkpoint_dir("llama", tmp_path / "model", layers=3)
    checkpoint: Checkpoint = load(model)
    fields = {"vocabulary": 24, "samples": 4, "length": 24, "prompt": 4, "text_batch": 2, "steps": 2, "batch_size": 2}
    kind(**fields).fit(checkpoint, ["the quick brown fox jumps over the lazy dog"] * 4)
    own = checkpoint.attachments[kind.slug].tensors["words.tokens_K"]
    assert own.dtype == torch.int64
    assert len(own) == 24
    checkpoint.save(tmp_path / "out")
    again = load(tmp_path / "out")
    steps: list[Any] = []
    decoder = again.decoder(kind.slug, on_step=steps.append)
    ids = torch.tensor([[20, 30, 40, 21, 31]])
    stock = again.model.generate(ids, max_new_tokens=20, do_sample=False)  # type: ignore[operator]
    found = again.model.generate(ids, max_new_tokens=20, do_sample=False, custom_generate=decoder)  # type: ignore[operator]
    assert torch.equal(found, stock)
    drafted = {token for step in steps if step.tree is not None for token in step.tree.tokens[1:]}
    assert drafted
    assert drafted <= set(own.tolist())
    said = generate(again, "the quick", decoder=kind.slug, max_new_tokens=6)["token_ids"]
    assert said == generate(again, "the quick", max_new_tokens=6)["token_ids"]
    with pytest.raises(IntaglioError, match=r"vocabulary is 25; the heads of .* were fitted with 24"):
        again.decoder(kind.slug, vocabulary=25)


@pytest.mark.parametrize("kind", KINDS)
def test_the_law_does_not_depend_on_them(kind: type[Method]) -> None:
    check_law(lambda model: kind(untrained=True, vocabulary=5, tree=[[0], [1], [0, 0]]))


def test_the_law_does_not_depend_on_them_with_medusa() -> None:
    def decoder(model: Any) -> Speculative:
        return Speculative(Medusa(MedusaHeads(model, heads=2, tokens_K=torch.tensor([1, 2, 5, 7]))))

    check_law(decoder)


def test_another_models_are_refused(tmp_path: Path) -> None:
    checkpoint = load(tiny_checkpoint_dir("llama", tmp_path / "model", layers=3))
    fields = {"vocabulary": 24, "samples": 2, "length": 16, "prompt": 4, "text_batch": 2, "steps": 1, "batch_size": 2}
    HiddenTransfer(**fields).fit(checkpoint, ["the quick brown fox jumps over the lazy dog"] * 2)  # type: ignore[arg-type]
    checkpoint.attachments["hidden_transfer"].tensors["words.tokens_K"][-1] = 10_000
    with pytest.raises(IntaglioError, match="belongs to another checkpoint"):
        checkpoint.decoder("hidden_transfer")
