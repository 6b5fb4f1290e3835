"""Sampled output has the target's law: exactly for each rule, and by the first two tokens of many runs."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from intaglio.errors import IntaglioError
from intaglio.speculative import Speculative, TokenTree, sampling
from intaglio.speculative import acceptance as walking
from intaglio.speculative.acceptance import verify_tree
from intaglio.speculative.drafters import DraftModel
from intaglio.speculative.sampling import rejection_sample
from tests.families import tiny_model
from tests.speculative.toys import mixed, prompt, target, wrong

V = 6
DRAWS = 40_000
WARPS: dict[str, LogitsProcessorList] = {
    "temperature": LogitsProcessorList([TemperatureLogitsWarper(0.7)]),
    "top_k": LogitsProcessorList([TemperatureLogitsWarper(1.3), TopKLogitsWarper(5)]),
    "top_p": LogitsProcessorList([TopPLogitsWarper(0.85)]),
}


def logits_of(seed: int, scale: float) -> torch.Tensor:
    """Logits [V, V] of a Markov chain: row a holds those of the token after a."""
    return scale * torch.randn(V, V, generator=torch.Generator().manual_seed(seed))


def p_value(counts: np.ndarray, law: np.ndarray) -> float:
    """Chi-square of counts against a law of the same shape, cells expected below five times pooled."""
    expected = law.reshape(-1) / law.sum() * counts.sum()
    found = counts.reshape(-1)
    assert not found[expected == 0].any(), "a token came up that the target never gives"
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    found = np.append(found[~rare], found[rare].sum())
    keep = expected > 0
    return float(stats.chisquare(found[keep], expected[keep]).pvalue)


class Toy:
    """A Markov target and a Markov draft, and the loop's own walk and rules between them, without a model's passes.

    It is selector and row of the walk at once: the target's law after each token is worked out beforehand.
    """

    def __init__(self, warp: str, widths: tuple[int, ...], drawn: bool, replace: bool = False) -> None:
        scores = WARPS[warp](torch.zeros(V, 1, dtype=torch.long), logits_of(0, 1.0))
        self.p = torch.softmax(scores, -1)
        self.laws = self.p.tolist()
        # The draft resembles the target, and gives tokens that the warped target never does.
        draft = logits_of(0, 1.0) + logits_of(1, 1.5)
        self.q = torch.softmax(draft, -1)
        self.weights = self.q.tolist()
        self.best = draft.argsort(-1, descending=True).tolist()
        self.widths, self.drawn_children, self.replace = widths, drawn, replace
        self.random = random.Random(0)
        self.generator = torch.Generator().manual_seed(0)
        self.done, self.tokens = False, [0]

    def append(self, token: int) -> None:
        self.tokens.append(token)

    def uses_draft_probs(self, tree: TokenTree, node: int) -> bool:
        return tree.q is not None

    def select(self, row: Any, place: int, tree: TokenTree, node: int, logits: Any) -> tuple[int, int | None]:
        law = self.p[tree.tokens[node]]
        if tree.q is not None and tree.children[node]:
            return walking.rejection_sample(tree, node, law, self.generator)
        return self.random.choices(range(V), self.laws[tree.tokens[node]])[0], None

    def children(self, token: int, width: int) -> list[int]:
        if not self.drawn_children:
            return self.best[token][:width]
        if self.replace:
            return self.random.choices(range(V), self.weights[token], k=width)
        weights, found = list(self.weights[token]), []
        for _ in range(width):
            found += self.random.choices(range(V), weights)
            weights[found[-1]] = 0.0
        return found

    def tree(self, root: int) -> TokenTree:
        tokens, parents, level = [root], [-1], [0]
        for width in self.widths:
            below = []
            for node in level:
                for token in self.children(tokens[node], width):
                    below.append(len(tokens))
                    tokens.append(token)
                    parents.append(node)
            level = below
        q = {node: self.q[token] for node, token in enumerate(tokens)} if self.drawn_children else None
        return TokenTree(tokens, parents, q, self.replace)

    def counts(self, draws: int = DRAWS) -> np.ndarray:
        """How often each pair of first tokens came after token 0."""
        found = np.zeros((V, V), dtype=np.int64)
        for _ in range(draws):
            self.tokens = [0]
            while len(self.tokens) < 3:
                verify_tree(self, self, 0, self.tree(self.tokens[-1]), [None] * 99)  # type: ignore[arg-type]
            found[self.tokens[1], self.tokens[2]] += 1
        return found

    @property
    def law(self) -> np.ndarray:
        target: np.ndarray = self.p.double().numpy()
        return target[0][:, None] * target


@pytest.mark.parametrize(
    ("warp", "widths", "drawn", "replace"),
    [
        ("temperature", (1, 2), True, False),
        pytest.param("temperature", (3, 2), True, False, marks=pytest.mark.slow),
        pytest.param("temperature", (2, 2), True, True, marks=pytest.mark.slow),
        pytest.param("temperature", (1, 1, 1), True, False, marks=pytest.mark.slow),
        pytest.param("temperature", (3, 2), False, False, marks=pytest.mark.slow),
        pytest.param("top_k", (3, 2), True, False, marks=pytest.mark.slow),
        pytest.param("top_k", (2, 2), True, True, marks=pytest.mark.slow),
        pytest.param("top_k", (3, 2), False, False, marks=pytest.mark.slow),
        pytest.param("top_p", (3, 2), True, False, marks=pytest.mark.slow),
        pytest.param("top_p", (2, 2), True, True, marks=pytest.mark.slow),
        pytest.param("top_p", (5,), True, False, marks=pytest.mark.slow),
        pytest.param("top_p", (3, 2), False, False, marks=pytest.mark.slow),
    ],
)
def test_the_first_two_tokens_have_the_targets_joint_law(
    warp: str, widths: tuple[int, ...], drawn: bool, replace: bool
) -> None:
    toy = Toy(warp, widths, drawn, replace)
    assert p_value(toy.counts(), toy.law) > 1e-4


def accepts_too_often(tree: TokenTree, node: int, p: torch.Tensor, generator: Any) -> tuple[int, int | None]:
    """As `rejection_sample`, with every probability of acceptance raised by a quarter."""
    raised = p.clone()
    raised[[tree.tokens[child] for child in tree.children[node]]] *= 1.25
    return rejection_sample(tree, node, raised, generator)


def ignores_the_residual(tree: TokenTree, node: int, p: torch.Tensor, generator: Any) -> tuple[int, int | None]:
    """As `rejection_sample`, but what is left after the rejections is drawn from the target's whole law."""
    token, child = rejection_sample(tree, node, p, generator)
    return (token, child) if child is not None else (int(torch.multinomial(p, 1, generator=generator)), None)


def forgets_earlier_siblings(tree: TokenTree, node: int, p: torch.Tensor, generator: Any) -> tuple[int, int | None]:
    """As `rejection_sample`, but as though siblings had been drawn with replacement."""
    return rejection_sample(TokenTree(tree.tokens, tree.parents, tree.q, True), node, p, generator)


@pytest.mark.parametrize("broken", [accepts_too_often, ignores_the_residual, forgets_earlier_siblings])
def test_the_same_test_rejects_a_broken_verifier(broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walking, "rejection_sample", broken)
    toy = Toy("temperature", (3,), True)
    assert p_value(toy.counts(4_000), toy.law) < 1e-4


class _Scripted:
    """Stands for the uniform draw: notes the probability of acceptance and decides as it was told."""

    def __init__(self, accept: bool) -> None:
        self.accept, self.chance = accept, math.nan

    def __mul__(self, draft: float) -> _Scripted:
        self.draft = float(draft)
        return self

    def __lt__(self, rest: float) -> bool:
        self.chance = min(1.0, float(rest) / self.draft)
        return self.accept


def exact_law(p: torch.Tensor, q: torch.Tensor, width: int, replace: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The law [V] of `rejection_sample` over all draws of `width` children, by running every branch of it."""
    total = np.zeros(len(p))
    weights = q.double().numpy() / float(q.double().sum())
    for children in itertools.product(range(len(p)), repeat=width):
        drawn, left = 1.0, 1.0
        for token in children:
            drawn *= weights[token] / max(left, 1e-300)
            left -= 0.0 if replace else weights[token]
        if drawn <= 0 or (not replace and len(set(children)) < width):
            continue
        tree = TokenTree([0, *children], [-1] + [0] * width, {0: q}, replace)
        scripts = [_Scripted(False) for _ in children]
        rest: list[np.ndarray] = []
        draws = iter(scripts)
        monkeypatch.setattr(sampling, "_level", lambda _, draws=draws: next(draws))
        monkeypatch.setattr(sampling, "_sample_residual", lambda law, _, rest=rest: rest.append(law) or 0)
        sampling.rejection_sample(tree, 0, p, None)
        reached = drawn
        for token, script in zip(children, scripts, strict=True):
            total[token] += reached * script.chance
            reached *= 1 - script.chance
        total += reached * rest[0]
    return total


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_rule_gives_exactly_the_targets_law(width: int, replace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    laws = torch.softmax(torch.randn(2, 5, generator=torch.Generator().manual_seed(width)).double(), -1)
    without = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0], dtype=torch.float64)
    for p, q in ((laws[0], laws[1]), (without, laws[1]), (laws[0], without), (laws[0], laws[0])):
        np.testing.assert_allclose(exact_law(p, q, width, replace, monkeypatch), p.numpy(), rtol=0, atol=1e-12)


def test_a_chain_is_accepted_as_often_as_the_laws_overlap() -> None:
    """One drawn child is accepted with probability sum min(p, q): ordinary speculative sampling."""
    toy = Toy("temperature", (1,), True)
    accepted = 0
    for _ in range(4_000):
        tree = toy.tree(0)
        _, child = rejection_sample(tree, 0, toy.p[0], toy.generator)
        accepted += child is not None
    overlap = float(np.minimum(toy.p[0].numpy(), toy.q[0].numpy()).sum())
    assert abs(accepted / 4_000 - overlap) < 4 * math.sqrt(overlap * (1 - overlap) / 4_000)


def test_equal_laws_accept_the_first_child_always_and_leave_nothing_out() -> None:
    law = torch.softmax(torch.arange(5.0), -1)
    generator = torch.Generator().manual_seed(0)
    for token in range(5):
        tree = TokenTree([0, token, (token + 1) % 5], [-1, 0, 0], {0: law})
        assert rejection_sample(tree, 0, law, generator) == (token, 1)
    # Every token as a child, without replacement: one of them is always accepted.
    for order in itertools.islice(itertools.permutations(range(5)), 40):
        tree = TokenTree([0, *order], [-1, 0, 0, 0, 0, 0], {0: torch.full((5,), 0.2)})
        assert rejection_sample(tree, 0, law, generator)[1] is not None


def test_draft_probabilities_that_cannot_be_true_are_refused() -> None:
    law = torch.tensor([0.5, 0.5, 0.0])
    target_law, generator = torch.tensor([0.0, 0.0, 1.0]), torch.Generator()
    for tokens, parents in (([0, 2], [-1, 0]), ([0, 1, 1], [-1, 0, 0])):
        with pytest.raises(IntaglioError, match="has no probability left among its siblings"):
            rejection_sample(TokenTree(tokens, parents, {0: law}), 0, target_law, generator)
    with pytest.raises(IntaglioError, match="cover 3 tokens; the target has 4"):
        rejection_sample(TokenTree([0, 1], [-1, 0], {0: law}), 0, torch.ones(4) / 4, generator)


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 5, "repetition_penalty": 1.2}, {"top_p": 0.6}])
def test_trees_without_chance_give_the_very_tokens_that_stock_sampling_draws(options: dict[str, Any]) -> None:
    """One draw a token, from the same law in the same order, so the seed decides the same way."""
    model, inputs = target("llama"), {"input_ids": prompt(9)}
    for seed in range(3):
        torch.manual_seed(seed)
        expected = model.generate(**inputs, do_sample=True, max_new_tokens=20, eos_token_id=[2, 5], **options)
        right = expected[:, 9:].tolist()
        for drafter in (mixed(right, seed), wrong(right)):
            torch.manual_seed(seed)
            found = model.generate(
                **inputs, custom_generate=Speculative(drafter), do_sample=True, max_new_tokens=20,
                eos_token_id=[2, 5], **options,
            )  # fmt: skip
            assert torch.equal(found, expected)


def test_a_generator_decides_the_draws_and_the_global_one_is_left_alone() -> None:
    model, draft = target("llama"), target("mistral")
    before = torch.get_rng_state()
    found = []
    for seed in (1, 1, 2):
        decoder = Speculative(DraftModel(draft, (2, 1)), generator=torch.Generator().manual_seed(seed))
        options = {"do_sample": True, "max_new_tokens": 12, "temperature": 1.0, "top_k": 0, "eos_token_id": None}
        found.append(model.generate(prompt(5), custom_generate=decoder, **options))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"temperature": 0.8}, {"top_k": 6}, {"top_p": 0.8}])
def test_a_draft_model_in_the_whole_loop_keeps_the_joint_law(options: dict[str, Any]) -> None:
    model = tiny_model("llama", layers=1, vocab_size=12, eos_token_id=None, dtype=torch.float32)
    draft = tiny_model("llama", layers=1, vocab_size=12, eos_token_id=None, seed=1)
    options = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0, **options}
    ids = torch.tensor([[5, 7, 3]])
    found = np.zeros((12, 12), dtype=np.int64)
    decoder = Speculative(DraftModel(draft, (2, 2)), generator=torch.Generator().manual_seed(0))
    for _ in range(40):
        # The first new token is the prefill's, so the pair that the tree decides are the second and the third.
        rows = model.generate(ids, custom_generate=decoder, max_new_tokens=3, num_return_sequences=1_000, **options)
        np.add.at(found, (rows[:, 4].numpy(), rows[:, 5].numpy()), 1)
    assert decoder.statistics.accepted > 0
    assert p_value(found, _joint(model, ids, options)) > 1e-4


@torch.no_grad()
def _joint(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> np.ndarray:
    """Law [V, V] of the second and third new token, by summing over the first."""
    warps = LogitsProcessorList()
    if "temperature" in options:
        warps.append(TemperatureLogitsWarper(options["temperature"]))
    if options["top_k"]:
        warps.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warps.append(TopPLogitsWarper(options["top_p"]))

    def law(batch: torch.Tensor) -> torch.Tensor:
        return torch.softmax(warps(batch, model(batch).logits[:, -1]).double(), -1)

    vocabulary = 12
    first = law(ids)[0]
    one = torch.cat([ids.expand(vocabulary, -1), torch.arange(vocabulary)[:, None]], 1)
    second = law(one)
    two = torch.cat([one.repeat_interleave(vocabulary, 0), torch.arange(vocabulary).repeat(vocabulary)[:, None]], 1)
    third = law(two).reshape(vocabulary, vocabulary, vocabulary)
    return torch.einsum("a,ab,abc->bc", first, second, third).numpy()
