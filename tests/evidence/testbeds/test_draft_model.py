"""The draft model's bed on a tiny target in the place of SmolLM2."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds import cached_models, smollm2
from intaglio.evidence.testbeds.draft_model import DraftModelBed
from intaglio.speculative import Speculative
from intaglio.speculative.drafters import DraftModel
from tests.families import tiny_checkpoint_dir

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "sleeps"]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DraftModelBed:
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cached_models, "_loaded", {})
    smollm2._load.cache_clear()
    model = tiny_checkpoint_dir("llama", tmp_path / "tiny", layers=4)
    draws = random.Random(0)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(" ".join(draws.choice(WORDS) for _ in range(60)) for _ in range(40)))
    return DraftModelBed(model=str(model), texts=str(texts), samples=6, prompt=12, new=8, epochs=1, batch=2)


def test_the_draft_learns_from_what_the_target_says_and_drafts_for_it(small: DraftModelBed) -> None:
    texts = small.text()
    assert len(texts) == 6
    for example, prompt in zip(texts, small.prompts(), strict=True):
        size = len(prompt)
        assert example["input_ids"][:size] == prompt
        assert example["labels"] == [-100] * size + example["input_ids"][size:]
        assert size < len(example["input_ids"]) <= size + 8
    draft, target = small.load(), small.target()
    assert DraftModelBed(**vars(small)).load().model is draft.model
    assert (draft.config.num_hidden_layers, draft.config.vocab_size) == (2, target.config.vocab_size)
    decoder = Speculative(DraftModel(draft.model))
    ids = torch.tensor([small.prompts()[0]])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    expected = target.model.generate(ids, **options)  # type: ignore[operator]
    found = target.model.generate(ids, custom_generate=decoder, **options)  # type: ignore[operator]
    assert torch.equal(found, expected)
    assert decoder.statistics.nodes > 0


def test_it_begins_as_the_targets_first_and_last_layer(small: DraftModelBed) -> None:
    own, given = small.new_draft().model.state_dict(), small.target().model.state_dict()
    for name, tensor in own.items():
        assert torch.equal(tensor, given[name.replace("layers.1.", "layers.3.")])


def test_texts_that_are_too_short(small: DraftModelBed, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("one text\n\nanother text")
    with pytest.raises(IntaglioError, match="have no article of 96 characters to prompt with"):
        DraftModelBed(**vars(small) | {"texts": str(tmp_path / "short.txt")}).prompts()
