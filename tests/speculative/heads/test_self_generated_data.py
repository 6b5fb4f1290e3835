"""Text that the model writes itself: resumed, cached, cut at its own stop token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.checkpoint import Checkpoint
from intaglio.data.texts import Corpus
from intaglio.errors import IntaglioError
from intaglio.speculative.heads.self_generated_data import (
    extract_prompts,
    generate_corpus,
    prompt_sources,
    truncate_at_stop,
)
from tests.families import EOS, tiny_model, tiny_tokenizer

PROMPTS = [[9, 30, 31], [32, 9], [30, 31, 32, 9], [40], [41, 42]]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path))
    return Checkpoint(tiny_model("llama", layers=1), tiny_tokenizer("llama"), "tiny")


def test_greedy_text_is_the_models_own(checkpoint: Checkpoint) -> None:
    found = generate_corpus(checkpoint, PROMPTS, tokens=6, temperature=0, batch_size=2)
    for prompt, example in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        model: Any = checkpoint.model
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)[0]
        assert example["input_ids"] == expected.tolist()
        assert example["labels"] == [-100] * len(prompt) + expected.tolist()[len(prompt) :]


def test_killed_it_goes_on_and_is_found_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    expected = generate_corpus(checkpoint, PROMPTS, tokens=5, batch_size=2, seed=1)
    (file,) = (tmp_path / "own-text").iterdir()
    whole = file.read_bytes()
    seen: list[int] = []

    def again(progress: Any = None) -> Any:
        return generate_corpus(
            checkpoint, PROMPTS, tokens=5, batch_size=2, seed=1, progress=lambda done, *_: seen.append(done)
        )

    assert again() == expected
    assert seen == []  # nothing was written again
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2]) + lines[2][:5])  # killed while the second batch was written
    assert again() == expected
    assert seen == [2, 3]
    assert file.read_bytes() == whole
    state = torch.random.get_rng_state()
    assert generate_corpus(checkpoint, PROMPTS, tokens=5, batch_size=2, seed=2) != expected
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(list((tmp_path / "own-text").iterdir())) == 2
    file.write_bytes(whole.replace(b'"seed":1', b'"seed":3'))
    with pytest.raises(IntaglioError, match="holds another text than its name implies"):
        again()


def test_a_text_ends_at_the_stop_token(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    assert truncate_at_stop([5, EOS, 7], [EOS]) == [5, EOS]
    assert truncate_at_stop([5, 7], [EOS]) == [5, 7]
    model: Any = checkpoint.model
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0
        model.lm_head.weight[EOS] += 50 * model.model.norm.weight  # whatever came, it stops
    found = generate_corpus(checkpoint, [[9, 30]] * 3, tokens=40, temperature=2.0)
    assert any(example["input_ids"][-1] == EOS for example in found)
    assert all(example["input_ids"].count(EOS) <= 1 for example in found)


def test_prompts_are_the_first_tokens_of_documents(checkpoint: Checkpoint) -> None:
    texts = Corpus("mine", ("the quick brown fox jumps", "a dog", "and then the dog sleeps in the sun"))
    found = extract_prompts(checkpoint, texts, 3, 2)
    assert len(found) == 2
    assert all(0 < len(ids) <= 3 for ids in found)
    assert found == extract_prompts(checkpoint, Corpus("other order", texts.documents[::-1]), 3, 2)
    chat = extract_prompts(checkpoint, texts, 3, 1, chat=True)[0]
    assert "assistant" in checkpoint.tokenizer.decode(chat)
    with pytest.raises(IntaglioError, match="has no tokenizer, so it can read no prompts"):
        extract_prompts(Checkpoint(checkpoint.model), texts, 3, 2)
    checkpoint.tokenizer.chat_template = None
    with pytest.raises(IntaglioError, match="has no chat template; leave chat out"):
        extract_prompts(checkpoint, texts, 3, 2, chat=True)


def test_long_documents_give_as_many_prompts_as_are_asked_for(checkpoint: Checkpoint) -> None:
    paragraphs = [f"the quick brown fox {' jumps' * number}" + " and then the dog sleeps" * 60 for number in range(9)]
    long, other = "\n\n".join(paragraphs[:6]), "\n\n".join(paragraphs[6:])
    texts = Corpus("articles", (long, other))
    assert prompt_sources(texts, 2) is texts  # there are enough documents
    pieces = prompt_sources(texts, 3)
    assert sorted(pieces.documents) == sorted(paragraphs)
    for most, count in ((2, 2), (3, 3), (7, 7), (99, 9)):
        assert len(extract_prompts(checkpoint, texts, 4, most)) == count
    assert len(extract_prompts(checkpoint, texts, 4, 7, chat=True)) == 2  # a user's turn is whole
    starts = extract_prompts(checkpoint, texts, 40, 7)
    whole = [checkpoint.tokenizer(text)["input_ids"][:40] for text in paragraphs]
    assert all(ids in whole for ids in starts)


def test_what_cannot_be_continued(checkpoint: Checkpoint) -> None:
    with pytest.raises(IntaglioError, match="there are no prompts to continue"):
        generate_corpus(checkpoint, [], tokens=4)
    with pytest.raises(IntaglioError, match="a prompt of 4 tokens and 500 new ones are more than the model's context"):
        generate_corpus(checkpoint, PROMPTS, tokens=500)
