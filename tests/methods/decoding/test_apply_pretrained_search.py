"""Apply-pretrained: exact modes and conditional beam search on language models that can be enumerated."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.methods.decoding.apply_pretrained import ApplyPretrained
from intaglio.methods.decoding.apply_pretrained.conditional_search import (
    CachedPrefixes,
    Tokens,
    conditional_beam_search,
    exact_mode,
)
from intaglio.methods.decoding.apply_pretrained.prefix_classifier import (
    LengthAttribute,
    PrefixClassifier,
    remaining_classes,
)
from intaglio.methods.decoding.apply_pretrained.training_rows import length_rows
from tests.families import DECODERS, tiny_model
from tests.trainer.helpers import checkpoint

END, MOST = 2, 6
IDS = torch.randint(8, 150, (2, 12), generator=torch.Generator().manual_seed(0))


class Letters:
    """A random language model over two letters and an end token, with at most six letters: 127 texts."""

    def __init__(self, seed: int, end: float = 0.38) -> None:
        draws = torch.Generator().manual_seed(seed)
        self.rows = {}
        for length in range(MOST + 1):
            for prefix in itertools.product((0, 1), repeat=length):
                a = float(torch.rand((), generator=draws)) * 0.8 + 0.1
                stop = (
                    1.0
                    if length == MOST
                    else end
                    if not length
                    else 0.05 + 0.2 * float(torch.rand((), generator=draws))
                )
                self.rows[prefix] = torch.tensor([a * (1 - stop), (1 - a) * (1 - stop), stop]).log()

    def __call__(self, prefixes: Sequence[Tokens]) -> tuple[Tensor, None]:
        return torch.stack([self.rows[prefix] for prefix in prefixes]), None

    def log_prob(self, text: Tokens) -> float:
        steps = [self.rows[text[:n]][token] for n, token in enumerate((*text, END))]
        return float(sum(step.double() for step in steps))

    @property
    def texts(self) -> list[Tokens]:
        return [text for n in range(MOST + 1) for text in itertools.product((0, 1), repeat=n)]

    def length_probs(self, prefix: Tokens) -> list[float]:
        """P(length = n | prefix) for each n."""
        total = [0.0] * (MOST + 1)
        start = sum(float(self.rows[prefix[:n]][token].double()) for n, token in enumerate(prefix))
        for text in self.texts:
            if text[: len(prefix)] == prefix:
                total[len(text)] += math.exp(self.log_prob(text) - start)
        return total

    def exactly(self, length: int) -> Any:
        """log q of every extension, exact."""

        def log_q(prefixes: Sequence[Tokens], hidden: Tensor | None, tokens: Tensor) -> Tensor:
            values = [
                [
                    (0.0 if len(prefix) == length else -math.inf)
                    if token == END
                    else -math.inf
                    if len(prefix) == MOST
                    else math.log(max(self.length_probs((*prefix, token))[length], 1e-300))
                    for token in row
                ]
                for prefix, row in zip(prefixes, tokens.tolist(), strict=True)
            ]
            return torch.tensor(values, dtype=torch.float64)

        return log_q


def best(model: Letters, length: int | None = None) -> Tokens:
    return max((t for t in model.texts if length is None or len(t) == length), key=model.log_prob)


def test_the_letters_are_a_distribution() -> None:
    model = Letters(0)
    assert len(model.texts) == 127
    assert sum(math.exp(model.log_prob(text)) for text in model.texts) == pytest.approx(1, abs=1e-6)
    assert best(model) == ()
    assert model.log_prob(()) == pytest.approx(-0.967, abs=1e-3)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.02, 0.5))
def test_the_exact_modes_are_those_of_enumeration(seed: int, end: float) -> None:
    """exact_mode agrees with brute force, of any length and of each."""
    model = Letters(seed, end)
    search = exact_mode(model, [END], MOST)
    assert search.proven
    assert search.modes[None].log_prob == pytest.approx(model.log_prob(best(model)), abs=1e-5)
    lengths = exact_mode(model, [END], MOST, lengths=range(MOST + 1))
    assert lengths.proven
    for n, mode in lengths.modes.items():
        assert mode.log_prob == pytest.approx(model.log_prob(best(model, n)), abs=1e-5)
    assert lengths.modes.keys() == set(range(MOST + 1))
    assert search.nodes <= lengths.nodes <= 127


def test_the_mode_is_noise_where_clean_texts_are_many() -> None:
    """1024 equally likely outputs and noise e=0.01 on "": P("")=0.01 > 0.99/1024=0.00097."""

    def model(prefixes: Sequence[Tokens]) -> tuple[Tensor, None]:
        rows = {0: [0.495, 0.495, 0.01], 10: [0.0, 0.0, 1.0]}
        return torch.tensor([rows.get(len(prefix), [0.5, 0.5, 0.0]) for prefix in prefixes]).log(), None

    search = exact_mode(model, [END], 10)
    assert search.proven
    assert search.modes[None].tokens == ()
    assert math.exp(search.modes[None].log_prob) == pytest.approx(0.01)
    (text,) = exact_mode(model, [END], 10, lengths=[10]).modes.values()
    assert math.exp(text.log_prob) == pytest.approx(0.99 / 1024)


@pytest.mark.parametrize("seed", range(5))
def test_conditional_beams_find_the_modes_of_each_length(seed: int) -> None:
    """Conditional beam with exact q found every exact length-conditional mode while plain beam returned empty."""
    model = Letters(seed)
    for beams in (2, 4):
        assert conditional_beam_search(model, [END], MOST + 1, beams=beams)[0].tokens == ()
    for length in range(MOST + 1):
        (text, *_) = conditional_beam_search(model, [END], MOST + 1, beams=64, attribute=model.exactly(length))
        assert text.tokens == best(model, length)
        for beams in (1, 2, 4):
            texts = conditional_beam_search(model, [END], MOST + 1, beams=beams, attribute=model.exactly(length))
            assert {len(text.tokens) for text in texts} == {length}
            assert texts[0].score == pytest.approx(model.log_prob(texts[0].tokens), abs=1e-5)


def test_the_probability_of_an_attribute_is_a_martingale() -> None:
    """Per-step P(a|prefix) is a martingale under sampling (test the average)."""
    model = Letters(3)
    for prefix in ((), (0,), (1, 0), (0, 1, 1)):
        row = model.rows[prefix].double().exp().tolist()
        for n in range(MOST + 1):
            after = [model.length_probs((*prefix, token))[n] for token in (0, 1)]
            ended = 1.0 if len(prefix) == n else 0.0
            average = row[0] * after[0] + row[1] * after[1] + row[2] * ended
            assert average == pytest.approx(model.length_probs(prefix)[n], abs=1e-6)


def test_bounds_prune_and_a_budget_ends_the_proof() -> None:
    model = Letters(1, end=0.02)
    free = exact_mode(model, [END], MOST)
    beam = conditional_beam_search(model, [END], MOST + 1, beams=8)
    bounded = exact_mode(model, [END], MOST, bounds=beam)
    assert bounded.modes[None].log_prob == pytest.approx(free.modes[None].log_prob, abs=1e-6)
    assert bounded.nodes <= free.nodes < 127
    mode = free.modes[None]
    reached = [model.log_prob(text) - float(model.rows[text][END]) for text in model.texts]
    again = exact_mode(model, [END], MOST, bounds=[mode])
    assert again.nodes == sum(log_prob > mode.log_prob for log_prob in reached)
    short = exact_mode(model, [END], MOST, bounds=beam, node_budget=bounded.nodes - 1)
    assert not short.proven
    assert short.nodes == bounded.nodes - 1
    assert exact_mode(model, [END], MOST, bounds=beam, node_budget=bounded.nodes).proven
    with pytest.raises(IntaglioError, match="from 0 to max_length"):
        exact_mode(model, [END], MOST, lengths=[7])


@pytest.mark.parametrize("family", DECODERS)
def test_without_an_attribute_it_is_stock_beam_search(family: str) -> None:
    """q = 1 -> ordinary beam."""
    model = tiny_model(family, layers=2, dtype=torch.float64)
    model.generation_config.eos_token_id = [2, *range(20, 50)]
    options: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "repetition_penalty": 1.1, "pad_token_id": 5}
    stock = model.generate(IDS, **options, num_beams=3, length_penalty=0.0, early_stopping="never")
    ours = ApplyPretrained(technique="conditional_beam", gamma=0.0, beams=3)
    assert torch.equal(model.generate(IDS, **options, custom_generate=ours), stock)


@torch.no_grad()
def test_the_cached_model_follows_any_path() -> None:
    model = tiny_model("qwen3", layers=2, dtype=torch.float64)
    prompt = IDS[0].tolist()
    cached = CachedPrefixes(model, prompt)
    calls = [[()], [(5,), (6,), (7,)], [(6, 1), (6, 2)], [(6, 1, 9)], [(6,)], [(8, 8, 8), (6, 1, 4)]]
    for prefixes in calls:
        log_probs, hidden = cached(prefixes)
        ids = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
        expected = model(ids, output_hidden_states=True)
        assert torch.allclose(log_probs, expected.logits[:, -1].float().log_softmax(-1), atol=1e-5)
        assert torch.allclose(hidden, expected.hidden_states[-1][:, -1], atol=1e-8)


def test_a_text_of_a_length_has_it() -> None:
    """Returned text always satisfies a 0/1 attribute."""
    ckpt = checkpoint()
    fields = {"technique": "conditional_beam", "length": 24, "prompt": 4, "samples": 4, "steps": 2, "batch_size": 2}
    ApplyPretrained(**fields).fit(ckpt, ["the quick brown fox", "and then the dog sleeps in the sun"])
    for length in (1, 3, 6):
        for technique in ({}, {"technique": "exact_mode", "node_budget": 20}):
            decoder = ApplyPretrained.for_checkpoint(ckpt, target_length=length, beams=2, **technique)
            with pytest.warns(UserWarning, match="not proven") if technique and length > 1 else nullcontext():
                ids = ckpt.model.generate(IDS[:1], max_new_tokens=8, do_sample=False, custom_generate=decoder)
            assert ids.shape[1] == 12 + length + 1
            assert int(ids[0, -1]) == END
            assert END not in ids[0, 12:-1].tolist()
    decoder = ckpt.decoder("apply_pretrained")
    with pytest.raises(IntaglioError, match="target_length is missing"):
        ckpt.model.generate(IDS[:1], max_new_tokens=8, do_sample=False, custom_generate=decoder)


def test_a_mode_of_a_model_is_proven() -> None:
    model = tiny_model("llama", layers=1)
    with torch.no_grad():
        log_probs = model(IDS[:1]).logits[0, -1].log_softmax(-1)
    decoder = ApplyPretrained(technique="exact_mode", node_budget=500, beams=2)
    search = decoder.search_modes(model, IDS[0].tolist(), None, [END], 1)
    assert search.proven
    pairs = torch.tensor([[*IDS[0].tolist(), token] for token in range(160)])
    with torch.no_grad():
        second = model(pairs).logits[:, -1].log_softmax(-1)[:, END] + log_probs
    second[END] = log_probs[END]
    assert search.modes[None].log_prob == pytest.approx(float(second.max()), abs=1e-4)


def test_no_text_is_one_sentence() -> None:
    model = tiny_model("llama", layers=1)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    decoder = ApplyPretrained(technique="exact_mode")
    with pytest.raises(IntaglioError, match="no end token"):
        model.generate(IDS[:1], max_new_tokens=4, do_sample=False, custom_generate=decoder)

    def impossible(prefixes: Sequence[Tokens], hidden: Tensor | None, tokens: Tensor) -> Tensor:
        return torch.full(tokens.shape, -math.inf)

    with pytest.raises(IntaglioError, match="has the attribute"):
        conditional_beam_search(Letters(0), [END], 4, beams=2, attribute=impossible)


def test_remaining_lengths_are_classes() -> None:
    assert remaining_classes(5, True, 3).tolist() == [2, 2, 1, 0, -100]
    assert remaining_classes(5, False, 3).tolist() == [2, 2, 2, -100, -100]
    examples = [{"input_ids": [7, 8, 9]}, {"input_ids": [7, 8, 9, 2], "labels": [-100, 8, 9, 2]}]
    whole, own = length_rows(examples, 10, 4, [2])
    assert whole["input_ids"].tolist() == [7, 8, 9, 2]
    assert whole["classes"].tolist() == [2, 1, 0, -100]
    assert own["classes"].tolist() == [-100, 1, 0, -100]


def test_a_classifier_of_lengths_decides_at_the_end() -> None:
    network = PrefixClassifier(8, 8, 5, hidden=0)
    attribute = LengthAttribute(3, [END], network, torch.nn.Embedding(10, 8))
    hidden, tokens = torch.randn(1, 8), torch.tensor([[5, 6, END]])
    early = attribute([(1,)], hidden, tokens)[0]
    assert early[2] == -math.inf
    assert (early[:2] < 0).all()
    assert early[:2].isfinite().all()
    due = attribute([(1, 1, 1)], hidden, tokens)[0]
    assert due.tolist() == [-math.inf, -math.inf, 0.0]


def test_a_label_steers_the_beam(tmp_path: Path) -> None:
    """A classifier of texts that hold an `e`, trained on prefixes, makes such texts likelier."""
    ckpt = checkpoint()
    words = [f"{a}{b}{c}" for a in "abcdef" for b in "xyz" for c in "klm"]
    lines = [{"prompt": "say", "answer": word, "label": int("e" in word)} for word in words]
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    fields = {"technique": "conditional_beam", "attribute": "label", "labels": str(path)}
    ApplyPretrained(**fields, steps=150, learning_rate=3e-3).fit(ckpt, seed=1)
    attachment = ckpt.attachments["apply_pretrained"]
    assert attachment.tensors["network.layers.2.weight"].shape == (2, 128)
    decoder = ckpt.decoder("apply_pretrained", gamma=20.0, top_k=160)
    prompt = ckpt.tokenizer("say")["input_ids"]
    _, hidden = CachedPrefixes(ckpt.model, prompt)([()])
    letters = {letter: ckpt.tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in "abcdef"}
    tokens = torch.tensor([list(letters.values())])
    log_q = decoder._attribute(ckpt.model, [END])([()], hidden, tokens)[0]
    assert list(letters)[int(log_q.argmax())] == "e"
    assert ckpt.record.steps[-1].chosen["loss"] < 0.4
    for wrong, says in (('{"label": 2}', "line 1"), ("x", "not JSON"), ("", "are empty")):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(IntaglioError, match=says):
            ApplyPretrained(**fields).fit(checkpoint())
