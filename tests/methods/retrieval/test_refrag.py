"""Refrag: each line of what makes it faithful, its stages, and its refusals."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from intaglio.checkpoint import load
from intaglio.errors import IntaglioError
from intaglio.methods.retrieval import refrag
from intaglio.methods.retrieval.refrag import Passage, Refrag, generate_answer, policy_training
from intaglio.methods.retrieval.refrag.functional import (
    advantages,
    clipped_loss,
    curriculum_weights,
    draw_length,
    lengths,
    pick_log_probs,
    sample_picks,
)
from intaglio.methods.retrieval.refrag.passages import choose_expanded, chunk_losses, mixed_prompt
from intaglio.methods.retrieval.refrag.training_rows import question_parts
from intaglio.recipe.schema import Recipe
from intaglio.trainer import KeyedRNG, train
from intaglio.trainer.dataset import as_example
from tests.alive import alive
from tests.trainer.helpers import TEXTS, checkpoint, same, weights

SMALL: dict[str, Any] = {"chunk_size": 4, "encoder_width": 16, "encoder_depth": 1, "length": 16, "target_length": 8,
                         "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "stages": ["continual"]}  # fmt: skip
EXAMPLES = (SMALL,)
POLICY = {"stages": ["policy"], "expand": 0.5, "learning_rate": 0.05}
ALIVE = {
    "chunk_size": 8,
    "tail": "tokens",
    "encoder": alive("embedding", encoder_width=None),
    "encoder_width": 32,
    "encoder_depth": 2,
    "pooling": "mean",
    "projection": alive("identity", encoder_width=32),
    "match_scale": True,
    "order": "context_first",
    "stages": ["reconstruction"],
    "questions": "test_a_file_of_questions_trains_the_task",
    "length": 8,
    "target_length": 4,
    "curriculum": False,
    "steps": 1,
    "batch_size": 1,
    "learning_rate": 1e-2,
    "expand": 0.5,
    "expander": "random",
    "group_size": alive(3, **POLICY),
    "clip": alive(0.001, **POLICY, updates=3),
    "updates": alive(1, **POLICY),
}
QUESTIONS = [
    {"question": f"what does number {n} do", "answer": "it jumps", "passages": [TEXTS[n], TEXTS[n + 1]]}
    for n in range(4)
]


def observe(method: Refrag) -> Any:
    """Fit to texts, and answer a question from two passages."""
    ckpt = checkpoint(layers=1)
    method.fit(ckpt, TEXTS[:6], seed=1)
    ready = ckpt.fitted("refrag")
    passages = ready.compress(ckpt, TEXTS[:2])
    prompt = ready.prompt(ckpt, "which fox jumps", passages, seed=3)
    ids = generate_answer(ckpt, prompt, 2)
    return ckpt.attachments["refrag"].tensors, prompt.ids, prompt.slots, prompt.chunks, prompt.expanded, ids


def ready(family: str = "llama", **fields: Any) -> tuple[Any, Refrag]:
    """A tiny decoder, and an untrained method of chunks of 4 tokens."""
    ckpt = checkpoint(family, layers=2)
    return ckpt, Refrag(**{**SMALL, **fields}).untrained(ckpt)


@torch.no_grad()
def logits(ckpt: Any, prompt: Any) -> Tensor:
    return ckpt.model(inputs_embeds=prompt.embeddings(ckpt.model)).logits[0]  # type: ignore[no-any-return]


def words(count: int, seed: int = 0) -> Tensor:
    return torch.randint(8, 150, (count,), generator=torch.Generator().manual_seed(seed))


def rows(ckpt: Any, method: Refrag, data: Any = TEXTS) -> list[Any]:
    made = method.prepare(ckpt, [as_example(ckpt, n, item) for n, item in enumerate(data)], KeyedRNG(0))
    return [{**row, "id": n, "epoch": 0, "step": 0, "steps": 1} for n, row in enumerate(made)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_all_chunks_expanded_is_the_plain_decoder(family: str) -> None:
    """p=1 (all expanded): identical logits to the plain decoder on tokens (atol 1e-5)."""
    ckpt, method = ready(family, expand=1.0)
    passages = method.compress(ckpt, [words(10), words(7, 1)])
    prompt = method.prompt(ckpt, (words(3, 2), words(2, 3)), passages)
    tokens = torch.cat([words(3, 2), words(10), words(7, 1), words(2, 3)])
    assert torch.equal(prompt.ids, tokens)
    with torch.no_grad():
        assert torch.allclose(logits(ckpt, prompt), ckpt.model(tokens[None]).logits[0], atol=1e-5)


def test_without_chunks_the_plain_decoder_reads_the_question() -> None:
    """L=0: plain decoder on the question."""
    ckpt, method = ready()
    prompt = method.prompt(ckpt, (words(3), words(2, 1)), [])
    with torch.no_grad():
        expected = ckpt.model(torch.cat([words(3), words(2, 1)])[None]).logits[0]
    assert torch.allclose(logits(ckpt, prompt), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_chunks_of_one_token_by_the_decoders_embeddings_are_the_plain_decoder(family: str) -> None:
    """Oracle sanity: k=1, E = decoder embedding lookup, phi = identity reproduces the plain decoder."""
    fields = {"chunk_size": 1, "encoder": "embedding", "encoder_width": None, "projection": "identity", "expand": 0.0}
    ckpt, method = ready(family, **fields)
    prompt = method.prompt(ckpt, (words(3), words(2, 1)), method.compress(ckpt, [words(9, 2)]))
    assert (prompt.slots >= 0).sum() == 9
    with torch.no_grad():
        expected = ckpt.model(torch.cat([words(3), words(9, 2), words(2, 1)])[None]).logits[0]
    assert torch.allclose(logits(ckpt, prompt), expected, atol=1e-5)


@pytest.mark.parametrize(("expanded", "positions"), [((), 64), (range(8), 184)])
def test_the_number_of_positions(expanded: Any, positions: int) -> None:
    """Length formula: q=32, s=512, k=16, p=0 -> 64 positions; p=.25 (8 of 32 chunks) -> 32+24+128=184."""
    passage = Passage(words(512), torch.zeros(32, 2), torch.zeros(32, 2))
    prompt = mixed_prompt(words(20), [passage], words(12), 16, "encode", tuple(expanded))
    assert len(prompt) == positions
    rate = Refrag(chunk_size=16, expand=len(expanded) / 32).rate()
    assert rate == pytest.approx(512 / (positions - 32))


def test_an_expanded_chunk_stays_between_its_neighbours() -> None:
    """Order preserved: expanded chunk i sits between neighbours i-1 and i+1."""
    passage = Passage(words(12), torch.zeros(3, 2), torch.zeros(3, 2))
    prompt = mixed_prompt(words(1, 1), [passage, passage], words(1, 2), 4, "encode", (1, 3))
    assert prompt.slots.tolist() == [-1, 0, -1, -1, -1, -1, 2, -1, -1, -1, -1, 4, 5, -1]
    assert torch.equal(prompt.ids[2:6], words(12)[4:8])
    assert torch.equal(prompt.ids[7:11], words(12)[:4])


def test_swapping_two_embeddings_changes_the_output() -> None:
    ckpt, method = ready(expand=0.0)
    (passage,) = method.compress(ckpt, [words(12)])
    swapped = Passage(passage.ids, passage.states, passage.embeddings[[1, 0, 2]])
    outputs = [logits(ckpt, method.prompt(ckpt, (words(1), words(2, 1)), [p]))[-1] for p in (passage, swapped)]
    assert not torch.allclose(*outputs, atol=1e-3)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_passage_is_the_same_alone_and_in_a_batch(pooling: str) -> None:
    """Cache: embeddings of a passage equal whether encoded alone or in a batch (mask padding)."""
    ckpt, method = ready(pooling=pooling)
    texts = [words(10), words(4, 1), words(3, 2)]
    together = method.compress(ckpt, texts)
    for passage, text in zip(together, texts, strict=True):
        (alone,) = method.compress(ckpt, [text])
        assert torch.allclose(passage.embeddings, alone.embeddings, atol=1e-6)
        assert torch.allclose(passage.states, alone.states, atol=1e-6)


@pytest.mark.parametrize(("tail", "chunks", "positions"), [("encode", 3, 3), ("tokens", 2, 4)])
def test_a_shorter_last_chunk(tail: str, chunks: int, positions: int) -> None:
    """Ragged tail: last chunk shorter than k is padded inside the encoder or kept as tokens."""
    ckpt, method = ready(tail=tail, expand=0.0)
    (passage,) = method.compress(ckpt, [words(10)])
    assert len(passage.embeddings) == chunks
    prompt = method.prompt(ckpt, (words(0), words(0)), [passage])
    assert len(prompt) == positions
    assert prompt.ids[2:].tolist() == ([0] if tail == "encode" else words(10)[8:].tolist())


@pytest.mark.parametrize("stage", ["reconstruction", "continual"])
def test_what_each_stage_trains(stage: str) -> None:
    """Stage A: decoder gradients are None, encoder/phi gradients non-zero; stage B all non-zero."""
    ckpt, method = checkpoint(layers=1), Refrag(**{**SMALL, "stages": [stage]})
    batch = method.collate(rows(ckpt, method)[:3], KeyedRNG(0))
    if stage == "reconstruction":
        with pytest.raises(IntaglioError, match="set freeze: true"):
            method.loss(ckpt.model, batch)
        ckpt.model.requires_grad_(False)
    method.loss(ckpt.model, batch).total.backward()
    trained = ("encoder", "projection")
    own = [p for name, p in method.compressor.named_parameters() if name.startswith(trained)]  # type: ignore[union-attr]
    assert sum(p.grad is not None and bool(p.grad.any()) for p in own) > len(own) - 3  # keys have biases without effect
    for name, parameter in ckpt.model.named_parameters():
        assert (parameter.grad is None) == (stage == "reconstruction"), name
        assert parameter.grad is None or parameter.grad.any(), name


def test_the_targets_of_each_stage() -> None:
    """Loss mask: only o tokens (B) or reconstructed tokens (A); no loss on chunk positions."""
    for stage, answer in (("reconstruction", slice(0, 16)), ("continual", slice(16, 24))):
        ckpt, method = checkpoint(layers=1), Refrag(**{**SMALL, "stages": [stage], "curriculum": False})
        (row, *_) = rows(ckpt, method)
        batch = method.collate([row], KeyedRNG(0))
        expected = row["document"][answer]
        first = 1 + 4 - 1  # BOS, four chunks; the last of them predicts
        assert batch["slots"][0].tolist() == [-1, 0, 1, 2, 3, *[-1] * (len(expected) - 1)]
        assert batch["input_ids"][0, 0] == ckpt.tokenizer.bos_token_id
        assert batch["target"][0].tolist() == [-100] * first + expected.tolist()
        assert batch["weight"] == len(expected)
        assert torch.equal(batch["chunk_ids"][:, 1:].flatten(), row["document"][:16])
        assert batch["chunk_ids"][:, 0].tolist() == [160] * 4  # a class token of its own


def test_the_curriculum_moves_from_short_to_long() -> None:
    """Start with 1 chunk, grow 1,2,4,...; the mass moves geometrically from short to long."""
    assert lengths(256) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert lengths(6) == [1, 2, 4, 6]
    first, last = curriculum_weights(9, 0.0), curriculum_weights(9, 1.0)
    assert torch.allclose(first[1:] / first[:-1], torch.full((8,), 0.5, dtype=torch.float64))
    assert torch.allclose(last[1:] / last[:-1], torch.full((8,), 2.0, dtype=torch.float64))
    means = [float(curriculum_weights(9, step / 18) @ torch.arange(9.0).double()) for step in range(18)]
    assert means == sorted(means)
    assert len({round(mean, 6) for mean in means}) == 9
    draws = torch.Generator().manual_seed(0)
    assert {draw_length(6, 0.5, draws) for _ in range(99)} == {1, 2, 4, 6}


def test_rows_follow_the_curriculum_of_their_step() -> None:
    ckpt, method = checkpoint(layers=1), Refrag(**SMALL)
    made = rows(ckpt, method)[:30]
    early, late = (
        int((method.collate([{**row, "step": step, "steps": 100} for row in made], KeyedRNG(0))["slots"] >= 0).sum())
        for step in (0, 99)
    )
    assert early < 0.75 * late


def test_a_text_needs_a_chunk_and_for_the_next_tokens_one_more() -> None:
    ckpt = checkpoint(layers=1)
    texts = [{"input_ids": words(count)} for count in (3, 4, 5)]
    for stage, kept in (("reconstruction", [4, 5]), ("continual", [5])):
        made = Refrag(**{**SMALL, "stages": [stage]}).prepare(ckpt, texts, KeyedRNG(0))
        assert [len(row["document"]) for row in made] == kept


def test_the_stages_have_the_papers_learning_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW, lr 2e-4 (A), 5e-5 (B), 2e-5 (D), 4% warm-up."""
    rates: dict[str, Any] = {}

    def trained(*args: Any, objective: Refrag, learning_rate: float, warmup: float, **more: Any) -> Any:
        rates[objective.stages[0]] = (learning_rate, warmup)
        return SimpleNamespace(history=[])

    monkeypatch.setattr(refrag, "train", trained)
    monkeypatch.setattr(
        refrag, "train_policy", lambda *a, learning_rate, **k: rates.update(policy=learning_rate) or [0.0]
    )
    stages = ["reconstruction", "continual", "task", "policy"]
    Refrag(**{**SMALL, "learning_rate": None, "stages": stages}).fit(checkpoint(layers=1), QUESTIONS)
    rest = {"continual": (5e-5, 0.04), "task": (2e-5, 0.04), "policy": 1e-4}
    assert rates == {"reconstruction": (2e-4, 0.04), **rest}


def test_a_training_row_may_fill_the_context() -> None:
    ckpt, method = checkpoint(layers=1), Refrag(**{**SMALL, "stages": ["task"]})
    (row, *_) = rows(ckpt, method, QUESTIONS)
    method._context = method.batch([row], [()])["input_ids"].shape[1]
    method.batch([row], [()])
    method._context -= 1
    with pytest.raises(IntaglioError, match="a training row takes"):
        method.batch([row], [()])


@given(st.lists(st.floats(-4, 4), min_size=2, max_size=6), st.integers(0, 99), st.data())
def test_the_policy_never_picks_a_chunk_twice(scores: list[float], seed: int, data: Any) -> None:
    """Policy: never picks a chunk twice."""
    count = data.draw(st.integers(1, len(scores)))
    picks = sample_picks(torch.tensor(scores), count, 5, torch.Generator().manual_seed(seed))
    assert picks.shape == (5, count)
    assert all(len(set(row)) == count for row in picks.tolist())


@given(st.lists(st.floats(-4, 4), min_size=3, max_size=5))
def test_the_log_probability_of_ordered_picks(scores: list[float]) -> None:
    """Log-prob of an ordered pick = sum of masked log-softmaxes; with equal scores P(ordered pair) = 1/(L(L-1))."""
    scores_L, count = torch.tensor(scores, dtype=torch.float64), len(scores)
    pairs = list(itertools.permutations(range(count), 2))
    log_probs = pick_log_probs(scores_L, torch.tensor(pairs))
    for (i, j), value in zip(pairs, log_probs.tolist(), strict=True):
        rest = sum(math.exp(s) for n, s in enumerate(scores) if n != i)
        assert value == pytest.approx(scores[i] - float(scores_L.logsumexp(0)) + scores[j] - math.log(rest))
    assert float(log_probs.exp().sum()) == pytest.approx(1.0)
    equal = pick_log_probs(torch.zeros(count), torch.tensor(pairs))
    assert torch.allclose(equal.exp(), torch.full((len(pairs),), 1 / (count * (count - 1))), atol=1e-6)


def test_picks_are_drawn_with_their_probability() -> None:
    scores = torch.tensor([1.0, 0.0, -0.5])
    picks = sample_picks(scores, 2, 20_000, torch.Generator().manual_seed(0))
    for pair in itertools.permutations(range(3), 2):
        share = float((picks == torch.tensor(pair)).all(1).double().mean())
        assert share == pytest.approx(float(pick_log_probs(scores, torch.tensor([pair])).exp()), abs=0.015)


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=8))
def test_advantages_of_a_group_sum_to_zero(rewards: list[float]) -> None:
    """Advantages of a group sum to 0; equal rewards give zero gradient."""
    assert float(advantages(torch.tensor(rewards, dtype=torch.float64)).sum()) == pytest.approx(0, abs=1e-6)
    assert advantages(torch.tensor([1.0, 5.0])).tolist() == [-1.0, 1.0]  # (r - mean) / std
    scores = torch.zeros(4, requires_grad=True)
    log_probs = pick_log_probs(scores, torch.tensor([[0, 1], [2, 3]]))
    clipped_loss(log_probs, log_probs.detach(), advantages(torch.full((2,), rewards[0])), 0.2).backward()
    assert not scores.grad.any()  # type: ignore[union-attr]


def test_the_ratio_is_clipped() -> None:
    ratio, gain = torch.tensor([2.0, 2.0, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    for n, expected in enumerate([-1.2, 2.0, -0.5, 0.8]):
        loss = clipped_loss(ratio.log()[n : n + 1], torch.zeros(1), gain[n : n + 1], 0.2)
        assert float(loss) == pytest.approx(expected)


def test_the_policy_learns_what_the_reward_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    def third(model: Any, batch: Any, embeddings: Any) -> Tensor:  # of four chunks, the third stayed tokens
        kept = [[2 not in (slot - 4 * g for slot in row) for g in [n]] for n, row in enumerate(batch["slots"].tolist())]
        return torch.tensor([float(row[0]) for row in kept])

    monkeypatch.setattr(policy_training, "rewards", third)
    ckpt = checkpoint(layers=1)
    fields = {**SMALL, **POLICY, "expand": 0.25, "steps": 12, "learning_rate": 0.01}
    texts = ["".join(TEXTS[0])] * 2
    Refrag(**fields).fit(ckpt, texts)
    method = ckpt.fitted("refrag")
    (row, *_) = rows(ckpt, Refrag(**SMALL), texts)
    (passage,) = method.compress(ckpt, [row["document"][:16]])
    assert choose_expanded([passage], 0.25, "policy", compressor=method.compressor) == (2,)


def test_the_policy_picks_its_share_for_each_set_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def counted(model: Any, batch: Any, embeddings: Any) -> Tensor:
        seen.append((batch["slots"] >= 0).sum(1).tolist())
        return torch.zeros(len(batch["slots"]))

    monkeypatch.setattr(policy_training, "rewards", counted)
    Refrag(**{**SMALL, **POLICY, "group_size": 3, "steps": 1, "batch_size": 1}).fit(checkpoint(layers=1), TEXTS[:1])
    assert seen == [[2, 2, 2]]  # half of the four chunks stay tokens


def test_the_reward_is_the_mean_log_likelihood_of_the_targets() -> None:
    """RL reward must be per-token mean: r = - log-perplexity of the tokens that follow."""
    ckpt, method = checkpoint(layers=1), Refrag(**SMALL)
    batch = method.collate(rows(ckpt, method)[:1], KeyedRNG(0))
    own: Any = method.compressor
    embedding = ckpt.model.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        table = own.project(own.states(batch["chunk_ids"], batch["chunk_mask"], embedding), embedding)
        reward = policy_training.rewards(ckpt.model, batch, table)
        assert float(reward) == pytest.approx(-float(method.loss(ckpt.model, batch).total), rel=1e-5)


def test_a_stopped_policy_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    fields = {**SMALL, **POLICY, "steps": 4}
    whole, stopped = checkpoint(layers=1), checkpoint(layers=1)
    seen: list[int] = []

    def stop(step: int, *_: Any) -> None:
        seen.append(step)
        if step == 3:
            raise KeyboardInterrupt

    Refrag(**fields).fit(whole, TEXTS[:4])
    with pytest.raises(KeyboardInterrupt):
        Refrag(**fields).fit(stopped, TEXTS[:4], directory=tmp_path, progress=stop)
    Refrag(**fields).fit(stopped, TEXTS[:4], directory=tmp_path, resume=True, progress=stop)
    assert seen == [1, 2, 3, 4]
    assert same(whole.attachments["refrag"].tensors, stopped.attachments["refrag"].tensors)
    with pytest.raises(IntaglioError, match="a run with another updates"):
        Refrag(**fields | {"updates": 1}).fit(checkpoint(layers=1), TEXTS[:4], directory=tmp_path, resume=True)


def test_the_expanders() -> None:
    _, method = ready()
    states = torch.eye(4)
    passage = Passage(words(16), states, torch.zeros(4, 2), torch.tensor([0.3, 0.9, 0.1, 0.5]))
    chosen = {
        name: choose_expanded([passage], 0.5, name, compressor=method.compressor, question_E=question)  # type: ignore[arg-type]
        for name, question in (("high_perplexity", None), ("low_perplexity", None), ("cosine", states[2] + states[1]))
    }
    assert chosen == {"high_perplexity": (1, 3), "low_perplexity": (0, 2), "cosine": (1, 2)}
    drawn = {choose_expanded([passage], 0.5, "random", compressor=method.compressor, seed=n) for n in range(40)}  # type: ignore[arg-type]
    assert len(drawn) == 6
    assert choose_expanded([passage], 0.01, "random", compressor=method.compressor)  # type: ignore[arg-type]
    with pytest.raises(IntaglioError, match="expander is 'rand'; did you mean random"):
        choose_expanded([passage], 0.5, "rand", compressor=method.compressor)  # type: ignore[arg-type]


def test_the_perplexity_of_a_chunk_is_given_the_passage_before_it() -> None:
    ckpt, method = ready(expander="high_perplexity")
    (passage,) = method.compress(ckpt, [words(10)])
    row = torch.cat([torch.tensor([ckpt.tokenizer.bos_token_id]), words(10)])
    with torch.no_grad():
        nll = -ckpt.model(row[None, :-1]).logits[0].log_softmax(-1).gather(1, row[1:, None])[:, 0]
    expected = torch.stack([nll[:4].mean(), nll[4:8].mean(), nll[8:].mean()])
    assert torch.allclose(passage.losses, expected, atol=1e-5)  # type: ignore[arg-type]
    bare = Passage(passage.ids, passage.states, passage.embeddings)
    with pytest.raises(IntaglioError, match="compress with losses=True"):
        method.prompt(ckpt, "why", [bare])
    with torch.no_grad():
        nll = -ckpt.model(words(10)[None, :-1]).logits[0].log_softmax(-1).gather(1, words(10)[1:, None])[:, 0]
    without = chunk_losses(ckpt, words(10), words(0), 4, 3)  # no BOS: the first token counts 0
    expected = torch.stack([nll[:3].sum() / 4, nll[3:7].mean(), nll[7:].mean()])
    assert torch.allclose(without, expected, atol=1e-5)


def test_the_question_chooses_by_cosine() -> None:
    ckpt, method = ready(expander="cosine", expand=0.34)
    passages = method.compress(ckpt, [words(12)])
    for number in range(3):
        chunk = words(12)[4 * number : 4 * number + 4]
        assert method.prompt(ckpt, (words(0), chunk), passages).expanded == (number,)
    two = method.model_copy(update={"expand": 0.67})
    for pair in itertools.combinations(range(3), 2):  # a longer question's state is the mean of its chunks'
        asked = torch.cat([words(12)[4 * n : 4 * n + 4] for n in pair])
        assert two.prompt(ckpt, (words(0), asked), passages).expanded == pair


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("match_scale", [True, False])
def test_chunk_embeddings_begin_at_the_scale_of_token_embeddings(family: str, match_scale: bool) -> None:
    """Pitfall: phi's output norm must match the token embeddings', Gemma's scale included."""
    ckpt, method = ready(family, match_scale=match_scale)
    (passage,) = method.compress(ckpt, [words(40)])
    with torch.no_grad():
        tokens = ckpt.model.get_input_embeddings()(torch.arange(8, 150))
    ratio = float(passage.embeddings.square().mean().sqrt() / tokens.square().mean().sqrt())
    assert 0.9 < ratio < 1.1 if match_scale else 0.4 < ratio < 2.5


def test_an_answer_has_the_tokens_that_are_asked_for() -> None:
    ckpt, method = ready()
    passages = method.compress(ckpt, [TEXTS[0]])
    ids = generate_answer(ckpt, method.prompt(ckpt, "why", passages), 3)
    assert len(ids) <= 3
    expected = ckpt.tokenizer.decode(ids, skip_special_tokens=True)
    assert method.answer(ckpt, "why", passages, max_new_tokens=3) == expected


def test_order_of_question_and_passages() -> None:
    ckpt = checkpoint()
    first, last = (question_parts(ckpt, "why", order) for order in ("question_first", "context_first"))  # type: ignore[arg-type]
    assert "Question: why" in ckpt.tokenizer.decode(first[0])
    assert "Question: why" in ckpt.tokenizer.decode(last[1])
    assert "Question" not in ckpt.tokenizer.decode(first[1]) + ckpt.tokenizer.decode(last[0])


def test_training_step_by_step_goes_on_from_the_last_compressor() -> None:
    ckpt = checkpoint(layers=1)
    fields = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3}
    before = weights(ckpt)
    train(ckpt, TEXTS, objective=Refrag(**{**SMALL, "stages": ["reconstruction"]}), freeze=True, **fields)
    assert same(weights(ckpt), before)
    first = ckpt.attachments["refrag"].tensors
    train(ckpt, TEXTS, objective=Refrag(**SMALL), **fields)
    assert not same(weights(ckpt), before)
    second = ckpt.attachments["refrag"].tensors
    fresh = Refrag(**SMALL).make(checkpoint(layers=1), 0)[0].state_dict()
    name = "projection.0.weight"
    moved = float((second[f"compressor.{name}"] - first[f"compressor.{name}"]).abs().max())
    assert 0 < moved < 0.01 < float((fresh[name]).abs().max())
    Refrag(**{**SMALL, **POLICY}).fit(ckpt, TEXTS)
    third = ckpt.attachments["refrag"].tensors
    changed = {key.split(".")[1] for key in third if not torch.equal(third[key], second[key])}
    assert changed == {"policy", "score"}


def test_a_frozen_decoder_learns_to_repeat_the_chunks() -> None:
    ckpt = checkpoint(layers=1)
    fields = {**SMALL, "stages": ["reconstruction"], "learning_rate": 1e-2, "length": 4, "encoder_width": 32}
    losses = []
    for steps in (1, 50):
        ckpt.attachments.clear()
        Refrag(**{**fields, "steps": steps}).fit(ckpt, TEXTS[:2])
        losses.append(ckpt.record.steps[-1].chosen["loss"]["reconstruction"])
    assert losses[1] < losses[0] - 0.6


def test_a_file_of_questions_trains_the_task(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    made = []
    fields = {**SMALL, "stages": ["task", "policy"], "order": "context_first"}
    for source, data in (({"questions": str(path)}, None), ({}, QUESTIONS)):
        ckpt = checkpoint(layers=1)
        Refrag(**fields, **source).fit(ckpt, data)
        made.append(ckpt.attachments["refrag"].tensors)
    assert same(*made)
    method = Refrag(**{**fields, "stages": ["task"]})
    (row, *_) = rows(ckpt, method, QUESTIONS)
    assert "Question: what does number 0 do" in ckpt.tokenizer.decode(row["after"])
    batch = method.collate([row], KeyedRNG(0))
    end = ckpt.tokenizer.eos_token_id
    labels = batch["target"][0][batch["target"][0] != -100].tolist()
    assert labels == [*ckpt.tokenizer(" it jumps", add_special_tokens=False)["input_ids"], end]
    lengths_ = row["passages"].tolist()
    assert any(length % 4 for length in lengths_)
    for tail, chunks in (("encode", sum(-(-n // 4) for n in lengths_)), ("tokens", sum(n // 4 for n in lengths_))):
        method = Refrag(**{**fields, "stages": ["task"], "tail": tail})
        batch = method.collate(rows(ckpt, method, QUESTIONS)[:1], KeyedRNG(0))
        assert int((batch["slots"] >= 0).sum()) == chunks == len(batch["chunk_ids"])


def test_a_pretrained_encoder_reads_text(tmp_path: Path) -> None:
    checkpoint("bert", layers=1).save(tmp_path / "encoder")
    ckpt = checkpoint(layers=1)
    fields = {**SMALL, "encoder": str(tmp_path / "encoder"), "encoder_width": None}
    Refrag(**fields).fit(ckpt, TEXTS[:4])
    ckpt.save(tmp_path / "out")
    back = load(tmp_path / "out")
    expected, own = (c.fitted("refrag").compress(c, [TEXTS[0]])[0] for c in (ckpt, back))
    assert torch.equal(expected.embeddings, own.embeddings)
    batch = Refrag(**fields).untrained(ckpt)._reader([words(4)])[0]
    text = ckpt.tokenizer.decode(words(4))
    assert batch[0].tolist() == checkpoint("bert").tokenizer(text)["input_ids"]


def test_cached_tensors_come_back_unless_they_are_of_another_text() -> None:
    ckpt, method = ready()
    (passage,) = method.compress(ckpt, [TEXTS[0]])
    back = method.from_cache(ckpt, TEXTS[0], passage.tensors())
    assert back is not None
    assert torch.equal(back.ids, passage.ids)
    assert method.from_cache(ckpt, TEXTS[0] * 2, passage.tensors()) is None
    assert method.from_cache(ckpt, TEXTS[0], {}) is None
    other = ready(tail="tokens")[1]
    assert method.space(ckpt) != other.space(ckpt)
    assert method.space(ckpt) != ready(pooling="mean")[1].space(ckpt)
    assert method.space(ckpt) != method.untrained(ckpt, seed=1).space(ckpt)
    mean = {"encoder": "embedding", "encoder_width": None}  # no weights of the encoder depend on the chunk size
    assert len({ready(chunk_size=size, **mean)[1].space(ckpt) for size in (4, 8)}) == 2


def test_what_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(IntaglioError, match="a multiple of chunk_size, 16"):
        Recipe.from_dict({"steps": [{"fit": {"refrag": {"length": 100}}}]})
    with pytest.raises(IntaglioError, match="encoder_width is of a new encoder"):
        Recipe.from_dict({"steps": [{"fit": {"refrag": {"encoder": "minilm", "encoder_width": 16}}}]})
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "why", "answer": "so", "passages": []}\n')
    ckpt = checkpoint(layers=1)
    bare = checkpoint(layers=1)
    bare.tokenizer = None
    checkpoint("bert", layers=1).save(tmp_path / "encoder")
    checkpoint(layers=1).save(tmp_path / "decoder")
    text = {**SMALL, "encoder_width": None}
    refused: list[tuple[Any, dict[str, Any], Any, str]] = [
        (ckpt, {"stages": ["task"]}, TEXTS, "questions is missing"),
        (ckpt, {"stages": ["task"], "questions": str(path)}, None, "with question, answer and passages"),
        (ckpt, {}, None, "is trained on texts"),
        (ckpt, {"length": 96, "target_length": 120}, TEXTS, "the model's context is 128"),
        (ckpt, {"stages": ["policy"], "expand": 0.0}, TEXTS, "expand is 0"),
        (ckpt, {**text, "encoder": "embedding", "projection": "identity"}, TEXTS, "no weights"),
        (ckpt, {"projection": "identity"}, TEXTS, "width is 16 and the decoder's is 32"),
        (ckpt, {**text, "encoder": str(tmp_path / "decoder")}, TEXTS, "an encoder is needed"),
        (ckpt, {"stages": ["task"]}, [{**QUESTIONS[0], "answer": "it jumps " * 60}], "a training row takes"),
        (bare, {**text, "encoder": str(tmp_path / "encoder")}, [words(30)], "a tokenizer of its own"),
        (checkpoint("bert", layers=1), {}, TEXTS, "needs a causal decoder"),
    ]
    for target, fields, data, says in refused:
        with pytest.raises(IntaglioError, match=says) as caught:
            Refrag(**{**SMALL, **fields}).fit(target, data)
        assert "\n" not in str(caught.value)
        assert target.record.steps == []
    with pytest.raises(IntaglioError, match="a train step takes one of"):
        train(ckpt, TEXTS, objective=Refrag(**{**SMALL, "stages": ["continual", "task"]}), steps=1)
    with pytest.raises(IntaglioError, match="has not been fitted"):
        Refrag().compress(ckpt, ["text"])


@pytest.mark.parametrize("stage", ["continual", "policy"])
def test_a_row_may_fill_the_context_and_no_more(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    ckpt, lengths = checkpoint(layers=1), []
    batch = Refrag.batch

    def noted(self: Refrag, *args: Any) -> Any:
        made = batch(self, *args)
        lengths.append(made["input_ids"].shape[1])
        return made

    monkeypatch.setattr(Refrag, "batch", noted)
    bos = ckpt.tokenizer.bos_token_id is not None
    # 24 chunks; the policy keeps the tokens of 6 of them; the last target is predicted and not read.
    target = ckpt.context - bos - 24 - (6 * 3 if stage == "policy" else 0) + 1
    fields = {**SMALL, "stages": [stage], "expand": 0.25, "length": 96, "curriculum": False}
    Refrag(**{**fields, "target_length": target}).fit(ckpt, [" ".join(TEXTS)])
    assert max(lengths) == ckpt.context
    with pytest.raises(IntaglioError, match=f"take {ckpt.context + 1} positions"):
        Refrag(**{**fields, "target_length": target + 1}).fit(checkpoint(layers=1), [" ".join(TEXTS)])


def test_what_does_not_fit_the_fit_is_refused() -> None:
    ckpt = checkpoint(layers=1)
    Refrag(**SMALL).fit(ckpt, TEXTS[:4])
    assert ckpt.fitted("refrag", expand=0.3, expander="random").expand == 0.3
    with pytest.raises(IntaglioError, match="chunk_size cannot change after the fit"):
        ckpt.fitted("refrag", chunk_size=8)
    with pytest.raises(IntaglioError, match="chunk_size is 8; the attachment refrag was trained with 4"):
        Refrag(**{**SMALL, "chunk_size": 8}).fit(ckpt, TEXTS[:4])
    with pytest.raises(IntaglioError, match="passage 2 has no text"):
        ckpt.fitted("refrag").compress(ckpt, ["text", " "])
    other = checkpoint(layers=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    other.attachments = ckpt.attachments
    with pytest.raises(IntaglioError, match="it belongs to another checkpoint"):
        other.fitted("refrag")
    method = ckpt.fitted("refrag")
    prompt = method.prompt(ckpt, "why", method.compress(ckpt, [TEXTS[0]]))
    with pytest.raises(IntaglioError, match="max_new_tokens is 128"):
        generate_answer(ckpt, prompt)


def test_the_papers_settings() -> None:
    made = Refrag.paper(batch_size=2)
    assert (made.encoder, made.batch_size) == ("FacebookAI/roberta-large", 2)
    assert (made.length, made.target_length) == (2048, 2048)
