"""AWRS: exact weights and distributions on small vocabularies, and a stock model under enumerable constraints."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from intaglio.constraints import Choices, Constraint, Length, Predicate, Prefix, Regex, Vocabulary
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.random_language_models import Table, TableModel
from intaglio.methods.decoding.awrs import AWRS
from intaglio.methods.decoding.awrs.estimators import WeightedDraws, first_accepted, geometric, recursive, two_loop
from intaglio.methods.decoding.awrs.smc import CachedHistories, ancestors, effective_size
from tests.alive import alive
from tests.causal_lms import tiny_lm
from tests.families import EOS, VOCAB, tiny_model, tiny_tokenizer

LETTERS = "abc"
TOKENS = Vocabulary([b"", *(letter.encode() for letter in LETTERS)], [0])
"""Token 0 ends an output; the others are letters."""


def random_table(seed: int, size: int = 4, spread: float = 2.0) -> Table:
    """Next-token probabilities that depend on the last token and the length."""
    logits = np.random.default_rng(seed).normal(0, spread, (8, size, size))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return lambda row: probs[min(len(row), 7), row[-1] if row else 0]


def posterior(table: Table, accepts: Callable[[str], bool], most: int) -> tuple[float, dict[str, float]]:
    """P(constraint within `most` tokens, the end included), and the exact distribution given it."""
    joint: dict[str, float] = {}
    for length in range(most):
        for tokens in itertools.product(range(1, len(LETTERS) + 1), repeat=length):
            text = "".join(LETTERS[token - 1] for token in tokens)
            if accepts(text):
                steps = [table(tokens[:index])[token] for index, token in enumerate((*tokens, 0))]
                joint[text] = math.prod(steps)
    total = sum(joint.values())
    return total, {text: weight / total for text, weight in joint.items() if weight > 0}


class Enumerated:
    """Draws that follow a script of choices and record the probability of each."""

    def __init__(self, probs: Sequence[float], script: Sequence[int]) -> None:
        self._left = dict(enumerate(probs))
        self._probs = probs
        self._script = list(script)
        self.weight = 1.0
        self.open: list[int] | None = None

    def sample(self) -> int | None:
        left = [token for token, p in self._left.items() if p > 0]
        if not left:
            return None
        if not self._script:
            self.open = left
            raise _Open
        token = self._script.pop(0)
        self.weight *= self._left[token] / sum(self._left.values())
        return token

    def remove(self, token: int) -> None:
        self._left.pop(token, None)

    def probability(self, token: int) -> float:
        return self._probs[token]

    def failures(self, success: float) -> int:
        raise AssertionError("an enumeration has no geometric draws")


class _Open(Exception):
    """The script ended before the run."""


def outcomes(estimator: Any, probs: Sequence[float], accepted: set[int]) -> Iterator[tuple[float, int, float, int]]:
    """Every run of an estimator: its probability, token, weight and number of distinct checks."""
    scripts: list[list[int]] = [[]]
    while scripts:
        script = scripts.pop()
        draws, checked = Enumerated(probs, script), set()

        def accept(token: int, checked: set[int] = checked) -> bool:
            checked.add(token)
            return token in accepted

        try:
            token, weight = estimator(draws, accept)
        except _Open:
            assert draws.open is not None
            scripts += [[*script, token] for token in draws.open]
            continue
        yield draws.weight, token, weight, len(checked)


def moments(estimator: Any, probs: Sequence[float], accepted: set[int]) -> tuple[list[float], float, float]:
    """E[w 1{x = v}] for every v, the variance of w, and the mean number of checks."""
    per_token, square, checks = [0.0] * len(probs), 0.0, 0.0
    for chance, token, weight, count in outcomes(estimator, probs, accepted):
        if weight > 0:
            per_token[token] += chance * weight
        square += chance * weight**2
        checks += chance * count
    return per_token, square - sum(per_token) ** 2, checks


EXACT = [two_loop, recursive, lambda d, a: recursive(d, a, 2), lambda d, a: recursive(d, a, 3)]


@given(st.lists(st.integers(0, 20), min_size=2, max_size=5), st.sets(st.integers(0, 4)), st.sampled_from(EXACT))
@settings(max_examples=60, deadline=None)
def test_weights_are_unbiased_for_every_token(weights: list[int], accepted: set[int], estimator: Any) -> None:
    """E[w 1{x=v}] = p(v)1[v in A] exactly; enumerate draw orders on a 2-5 token vocabulary (estimators 1,2)."""
    total = sum(weights)
    if total == 0:
        return
    probs = [weight / total for weight in weights]
    per_token, _, _ = moments(estimator, probs, accepted)
    assert per_token == pytest.approx([p if v in accepted else 0 for v, p in enumerate(probs)], abs=2e-5)


@given(st.lists(st.integers(1, 20), min_size=2, max_size=5), st.sets(st.integers(0, 4)), st.sampled_from(EXACT[:2]))
@settings(max_examples=40, deadline=None)
def test_the_returned_token_has_the_masked_distribution(weights: list[int], accepted: set[int], estimator: Any) -> None:
    """Law of the returned token (given a success) is exactly p(.|A) in all three, and E[w | x=v] = Z0*p(A)."""
    probs = [weight / sum(weights) for weight in weights]
    mass = sum(p for v, p in enumerate(probs) if v in accepted)
    chance, weighted = defaultdict(float), defaultdict(float)
    for share, token, weight, _ in outcomes(estimator, probs, accepted):
        if weight > 0:
            chance[token] += share
            weighted[token] += share * weight
    for token in chance:
        assert chance[token] == pytest.approx(probs[token] / mass, abs=2e-5)
        assert weighted[token] / chance[token] == pytest.approx(mass, abs=2e-5)


def test_worked_numbers() -> None:
    """p=(.5,.3,.2), A={1,2}: est.1 variance .09375, est.2 .06; checks 2.23, 2.5. p=(.5,.5), A={0}: .09375 and 0."""
    per_token, variance, checks = moments(two_loop, (0.5, 0.3, 0.2), {1, 2})
    assert per_token == pytest.approx([0, 0.3, 0.2])
    assert (variance, checks) == (pytest.approx(0.09375), pytest.approx(2.23, abs=0.005))
    per_token, variance, checks = moments(recursive, (0.5, 0.3, 0.2), {1, 2})
    assert per_token == pytest.approx([0, 0.3, 0.2])
    assert (variance, checks) == (pytest.approx(0.06), pytest.approx(2.5))
    assert moments(two_loop, (0.5, 0.5), {0}) == ([pytest.approx(0.5), 0], pytest.approx(0.09375), pytest.approx(1.75))
    assert moments(recursive, (0.5, 0.5), {0}) == ([pytest.approx(0.5), 0], pytest.approx(0, abs=1e-12), 2)


def test_the_hand_path_of_the_papers_estimator() -> None:
    """Hand path, est.1, p=(.5 acc,.5 rej): outcomes w = 1 (prob .25), 1/2 (prob .25), 1/4 (prob .5); mean .5."""
    chances: dict[float, float] = defaultdict(float)
    for chance, _, weight, _ in outcomes(two_loop, (0.5, 0.5), {0}):
        chances[weight] += chance
    assert dict(chances) == {1.0: 0.25, 0.5: 0.25, 0.25: 0.5}


@given(st.lists(st.integers(1, 20), min_size=2, max_size=5), st.integers(0, 4))
@settings(max_examples=30, deadline=None)
def test_with_one_accepted_token_the_recursive_weight_is_its_probability(weights: list[int], only: int) -> None:
    """Single accepted token => est.2 is deterministic: w = p(v) always."""
    probs, only = [weight / sum(weights) for weight in weights], only % len(weights)
    for _, token, weight, _ in outcomes(recursive, probs, {only}):
        assert (token, weight) == (only, pytest.approx(probs[only]))


def test_the_recursive_estimator_ends_where_what_is_left_is_rounding() -> None:
    draws = Enumerated((1 - 1e-6, 1e-6), [0, 1])
    assert recursive(draws, lambda token: token == 1)[1] == 0


@pytest.mark.parametrize("estimator", [two_loop, recursive, geometric])
def test_accepting_all_gives_weight_one_and_nothing_gives_zero(estimator: Any) -> None:
    """C accepts everything: est.1/2/3 return w=1 and a plain LM sample. C accepts nothing: weight 0."""
    rng, probs = np.random.default_rng(0), np.array([0.5, 0.3, 0.2])
    runs = [estimator(WeightedDraws(probs, rng), lambda token: True) for _ in range(2000)]
    assert {weight for _, weight in runs} == {1.0}
    counts = np.bincount([token for token, _ in runs], minlength=3) / len(runs)
    assert np.abs(counts - probs).max() < 0.04
    token, weight = estimator(WeightedDraws(probs, rng), lambda token: False)
    assert (weight, 0 <= token < 3) == (0, True)


@pytest.mark.parametrize("limits", [{}, {"max_accepts": 5}, {"max_rejects": 2}, {"max_rejects": 3}])
def test_the_geometric_estimator_is_unbiased(limits: dict[str, int]) -> None:
    """... or average 10k draws at 2e-2 tolerance; max_rejects any value >=2 keeps unbiasedness (est. 2,3)."""
    rng, probs = np.random.default_rng(1), np.array([0.5, 0.3, 0.2])
    totals, squares, checks = np.zeros(3), 0.0, 0
    for _ in range(10_000):
        checked: set[int] = set()
        token, weight = geometric(
            WeightedDraws(probs, rng), lambda t, seen=checked: seen.add(t) or t in (1, 2), **limits
        )
        totals[token] += weight
        squares += weight**2
        checks += len(checked)
    assert totals / 10_000 == pytest.approx([0, 0.3, 0.2], abs=2e-2)
    variance = squares / 10_000 - (totals.sum() / 10_000) ** 2
    if not limits:
        assert (variance, checks / 10_000) == (pytest.approx(0.096, abs=0.01), pytest.approx(2.23, abs=0.04))
    elif limits == {"max_accepts": 5}:
        assert (variance, checks / 10_000) == (pytest.approx(0.030, abs=0.006), pytest.approx(2.88, abs=0.04))


def test_draws_have_the_order_of_sampling_without_replacement() -> None:
    rng, probs = np.random.default_rng(2), np.array([0.0, 0.6, 0.3, 0.1])
    counts: dict[tuple[int, ...], int] = defaultdict(int)
    for _ in range(4000):
        draws, order = WeightedDraws(probs, rng), []
        while (token := draws.sample()) is not None:
            draws.remove(token)
            order.append(token)
        counts[tuple(order)] += 1
    for order, count in counts.items():
        left, chance = 1.0, 1.0
        for token in order:
            chance *= probs[token] / left
            left -= probs[token]
        assert count / 4000 == pytest.approx(chance, abs=0.03)
    assert len(counts) == 6


def no_double(text: str) -> bool:
    return "aa" not in text and "bc" not in text


def ends_in_b(text: str) -> bool:
    return no_double(text) and text.endswith("b")


CONSTRAINT = Predicate(no_double, ends_in_b)


@pytest.mark.parametrize("fields", [
    {}, {"estimator": "two_loop"}, {"estimator": "recursive"}, {"estimator": "geometric"}, {"max_accepts": 5},
    {"max_rejects": 2}, {"prune": False}, {"resampling": "systematic", "ess_threshold": 0.9}, {"ess_threshold": 0.0},
])  # fmt: skip
def test_the_mean_weight_is_the_probability_of_the_constraint(fields: dict[str, Any]) -> None:
    """AWRS-SMC log-ML estimate: E[exp] = P(LM string valid) (unbiased), on a toy LM enumerable exactly."""
    table = random_table(3)
    expected, exact = posterior(table, ends_in_b, 4)
    rng, start = np.random.default_rng(4), Prefix.empty(CONSTRAINT, TOKENS)
    decoder, estimates, joint = AWRS(particles=6, **fields), [], defaultdict(lambda: np.zeros(400))
    for run in range(400):
        population = decoder.sample(TableModel(table), start, 4, rng)
        estimates.append(math.exp(population.log_probability))
        for text, log_weight in zip(population.texts, population.log_weights, strict=True):
            joint[text][run] += math.exp(log_weight) / 6
            assert log_weight == -math.inf or ends_in_b(text)
    assert abs(np.mean(estimates) - expected) < 4.5 * np.std(estimates) / 20
    assert np.std(estimates) < 4 * expected
    for text, share in exact.items():  # proper weights: each output's mean weight is its joint probability
        error = np.std(joint[text]) / 20
        assert abs(joint[text].mean() - share * expected) < 5 * error + 0.003 * expected


def test_without_weights_it_is_locally_constrained_decoding() -> None:
    """N=1, no resampling, proper_weights=False equals masked sampling in distribution."""
    table = random_table(5)
    # After two letters only an accepted text may end; the limit ends outputs without weight.
    constraint = Predicate(lambda text: len(text) <= 2 and "aa" not in text)
    counts: dict[str, float] = defaultdict(float)
    decoder, rng = AWRS(particles=1, proper_weights=False, ess_threshold=0.0), np.random.default_rng(6)
    start = Prefix.empty(constraint, TOKENS)
    for _ in range(4000):
        counts[decoder.sample(TableModel(table), start, 5, rng).texts[0]] += 1 / 4000

    def masked(row: tuple[int, ...]) -> np.ndarray:
        probs = np.array(table(row))
        text = "".join(LETTERS[token - 1] for token in row)
        probs *= [1, *(len(text) < 2 and "aa" not in text + letter for letter in LETTERS)]
        return probs / probs.sum()

    _, exact = posterior(masked, lambda text: len(text) <= 2 and "aa" not in text, 4)
    assert sum(abs(counts.get(text, 0) - p) for text, p in exact.items()) / 2 < 0.04


def test_it_corrects_what_locally_constrained_decoding_gets_wrong() -> None:
    """First token a (.9) or b (.1); after a only a .01 continuation is legal: True P(first=a | valid) = .0826."""
    rows: dict[tuple[int, ...], Sequence[float]] = {(): (0, 0.9, 0.1, 0), (1,): (0, 0.99, 0, 0.01), (2,): (1, 0, 0, 0)}
    table = lambda row: rows.get(row, (1, 0, 0, 0))  # noqa: E731
    constraint = Predicate(lambda text: text in ("", "a", "ac", "b"), lambda text: text in ("ac", "b"))
    start, share = Prefix.empty(constraint, TOKENS), {}
    for proper in (True, False):
        population = AWRS(particles=2000, proper_weights=proper, ess_threshold=0.5 if proper else 0.0).sample(
            TableModel(table), start, 4, np.random.default_rng(0)
        )
        share[proper] = sum(w for t, w in zip(population.texts, population.weights, strict=True) if t == "ac")
    assert share[True] == pytest.approx(0.009 / 0.109, abs=0.03)
    assert share[False] == pytest.approx(0.9, abs=0.03)


def test_a_proposal_is_corrected() -> None:
    table, other = random_table(7), random_table(8, spread=0.5)
    expected, _ = posterior(table, ends_in_b, 4)
    rng, start = np.random.default_rng(9), Prefix.empty(CONSTRAINT, TOKENS)
    estimates = [
        math.exp(AWRS(particles=8).sample(TableModel(table), start, 4, rng, TableModel(other)).log_probability)
        for _ in range(400)
    ]
    error = np.std(estimates) / 20
    assert abs(np.mean(estimates) - expected) < 4.5 * error
    assert error < 0.15 * expected


def test_particles_with_one_history_share_a_row() -> None:
    model = TableModel(random_table(10, spread=4.0))
    AWRS(particles=50).sample(model, Prefix.empty(CONSTRAINT, TOKENS), 5, np.random.default_rng(0))
    assert model.calls[0] == 1
    assert max(model.calls) <= 3 ** (len(model.calls) - 1)
    assert len(set(model.rows)) == len(model.rows)


@pytest.mark.parametrize("scheme", ["multinomial", "systematic"])
def test_ancestors_are_drawn_in_proportion_to_the_weights(scheme: Any) -> None:
    log_weights, rng = np.log([0.5, 0.25, 1e-300, 0.25]), np.random.default_rng(0)
    counts = sum(np.bincount(ancestors(log_weights, scheme, rng), minlength=4) for _ in range(3000)) / 3000
    assert counts == pytest.approx([2, 1, 0, 1], abs=0.1)
    if scheme == "systematic":
        assert (np.bincount(ancestors(log_weights, scheme, rng), minlength=4) == [2, 1, 0, 1]).all()
    assert effective_size(log_weights) == pytest.approx(1 / (0.25 + 2 / 16))
    assert effective_size(np.full(3, -math.inf)) == 0


PROMPT = [9, 30, 31, 32]
FORMS = [b""] * 4 + [bytes([97 + id % 26]) * (1 + id // 26) for id in range(VOCAB - 4)]
"""Byte forms of the tiny models' tokens: a, b, ..., z, aa, bb, ..."""
EXAMPLES: tuple[dict[str, Any], ...] = ({}, {"particles": 3, "estimator": "geometric", "max_accepts": 4})
ALIVE = {
    "particles": 3,
    "ess_threshold": 1.0,
    "resampling": alive("systematic", ess_threshold=1.0),
    "estimator": "geometric",
    "proper_weights": False,
    "max_accepts": alive(4, estimator="geometric"),
    "max_rejects": "test_max_rejects_ends_a_draw",
    "prune": "test_masks_save_checks",
    "return_all": True,
}


def few_letters(text: str) -> bool:
    return all(a <= b for a, b in itertools.pairwise(text)) and len(text) <= 6


LETTERS_ONLY = Predicate(few_letters) & Length(minimum=2)


def observe(method: AWRS, constraint: Constraint = LETTERS_ONLY, model: Any = None, **options: Any) -> Any:
    """Outputs, weights and checks of two rows."""
    model = tiny_model("llama", layers=2, dtype=torch.float64) if model is None else model
    decoder = method.model_copy(update={"constraint": constraint, "vocabulary": Vocabulary(FORMS, [EOS])})
    torch.manual_seed(0)
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    settings = {"max_new_tokens": 8, "eos_token_id": EOS, "pad_token_id": 0, **options}
    output = model.generate(ids, custom_generate=decoder, **settings)
    return output, [(p.tokens, p.log_weights, p.checks, p.passes, p.resampled) for p in decoder.populations]


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_window", "gpt_neox", "mamba2", "falcon_h1"])
def test_the_cached_model_is_the_model(family: str) -> None:
    """Log-probabilities with a shared, reordered cache are those of a whole forward pass; so are recurrent states'."""
    if family in ("mamba2", "falcon_h1"):
        model = tiny_lm(family).double()
    else:
        model = tiny_model(family, layers=4 if family == "gemma3" else 2, dtype=torch.float64)

    class Plain:
        def processors(self, ids: Any, scores: Any) -> Any:
            return scores

    cached: Any = CachedHistories(model, PROMPT, Plain())  # type: ignore[arg-type]
    rows = [PROMPT]
    with torch.inference_mode():
        got = cached.start()
        for parents, tokens in (([0, 0, 0], [5, 6, 7]), ([2, 0, 0], [8, 9, 8]), ([1, 1], [5, 6]), ([0], [7])):
            expected = model(torch.tensor(rows), use_cache=False).logits[:, -1].float().double().log_softmax(-1)
            assert np.abs(got - expected.numpy()).max() < 1e-5
            rows = [[*rows[parent], token] for parent, token in zip(parents, tokens, strict=True)]
            got = cached.extend(parents, tokens)


def test_generate_samples_the_constrained_model() -> None:
    """A stock model, two-letter outputs enumerated: log P(constraint) and the posterior."""
    model, vocabulary = tiny_model("llama", layers=1, dtype=torch.float64), Vocabulary(FORMS, [EOS])
    allowed = [id for id in range(VOCAB) if FORMS[id] in (b"a", b"b", b"c")]
    with torch.no_grad():
        first = model(torch.tensor([PROMPT])).logits[0, -1].float().double().softmax(-1)
        then = model(torch.tensor([[*PROMPT, id] for id in allowed])).logits[:, -1].float().double().softmax(-1)
    exact = sum(float(first[id] * then[row, EOS]) for row, id in enumerate(allowed))
    decoder = AWRS(particles=400, constraint=Choices(["a", "b", "c"]), vocabulary=vocabulary)
    estimates = []
    for seed in range(6):
        torch.manual_seed(seed)
        model.generate(torch.tensor([PROMPT]), custom_generate=decoder, max_new_tokens=4, eos_token_id=EOS)
        estimates.append(math.exp(decoder.populations[0].log_probability))
    assert np.mean(estimates) == pytest.approx(exact, rel=0.15)


def test_rows_padding_and_output_objects() -> None:
    model = tiny_model("llama", layers=2)
    decoder = AWRS(constraint=Regex("[a-c]{2,4}"), vocabulary=Vocabulary(FORMS, [EOS]), particles=4)
    ids, mask = torch.tensor([[0, 0, *PROMPT[:2]], PROMPT]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    torch.manual_seed(0)
    output = model.generate(
        ids, attention_mask=mask, custom_generate=decoder, max_new_tokens=6, eos_token_id=EOS, pad_token_id=0,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert len(output.populations) == 2
    assert torch.equal(output.sequences[:, :4], ids)
    for row in output.sequences[:, 4:].tolist():
        text = b"".join(FORMS[id] for id in row[: row.index(EOS)]).decode()
        assert 2 <= len(text) <= 4
        assert set(text) <= set("abc")
        assert not any(row[row.index(EOS) + 1 :])


def test_masks_save_checks() -> None:
    """Pruning: tokens that masks exclude are never checked, and the target is the same."""
    constraint = Predicate(few_letters) & Regex("[a-d]*")
    checks = [sum(p[2] for p in observe(AWRS(prune=prune), constraint)[1]) for prune in (True, False)]
    assert checks[0] < checks[1]


def test_sampling_options_change_the_target() -> None:
    """The log-weight of the first step is the log-probability of the allowed tokens under the warped model."""
    model, ids = tiny_model("llama", layers=1, dtype=torch.float64), torch.tensor([PROMPT])
    decoder = AWRS(constraint=Choices(["a"]), vocabulary=Vocabulary(FORMS, [EOS]), particles=1)
    for temperature in (1.0, 3.0):
        torch.manual_seed(0)
        options = {"do_sample": True, "temperature": temperature, "top_k": 0}
        output = model.generate(ids, custom_generate=decoder, max_new_tokens=4, eos_token_id=EOS, **options)
        with torch.no_grad():
            log_probs = (model(output).logits[0].float().double() / temperature).log_softmax(-1)
        allowed = [id for id in range(VOCAB) if FORMS[id] == b"a"]
        expected = float(log_probs[len(PROMPT) - 1, allowed].logsumexp(-1) + log_probs[len(PROMPT), EOS])
        assert decoder.populations[0].log_weights[0] == pytest.approx(expected, abs=1e-5)


def test_generate_draws_from_the_proposal_and_corrects() -> None:
    """With a separate proposal q: Z0 is q's, and log p(x) - log q(x) is added."""
    models = [tiny_model("llama", layers=layers, dtype=torch.float64) for layers in (1, 2)]
    decoder = AWRS(constraint=Choices(["a", "b"]), vocabulary=Vocabulary(FORMS, [EOS]), particles=1, proposal=models[1])
    torch.manual_seed(0)
    output = models[0].generate(torch.tensor([PROMPT]), custom_generate=decoder, max_new_tokens=4, eos_token_id=EOS)
    with torch.no_grad():
        p_LV, q_LV = (model(output).logits[0].float().double().log_softmax(-1) for model in models)
    at, token = len(PROMPT) - 1, int(output[0, len(PROMPT)])
    allowed = [FORMS.index(b"a"), FORMS.index(b"b")]
    expected = q_LV[at, allowed].logsumexp(-1) + p_LV[at, token] - q_LV[at, token] + p_LV[at + 1, EOS]
    assert token in allowed
    assert decoder.populations[0].log_weights[0] == pytest.approx(float(expected), abs=1e-5)


def test_a_given_tokenizer_and_a_given_generator_are_used() -> None:
    model, drawn = tiny_model("llama", layers=1), []
    for seed in (1, 1, 2):
        torch.manual_seed(len(drawn))
        generator = torch.Generator().manual_seed(seed)
        decoder = AWRS(constraint=Regex("[a-z]{3}"), tokenizer=tiny_tokenizer("llama"), generator=generator)
        model.generate(torch.tensor([PROMPT]), custom_generate=decoder, max_new_tokens=6, eos_token_id=EOS)
        drawn.append(decoder.populations[0].texts)
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_padded_row_is_its_prompt_alone() -> None:
    model, weights = tiny_model("llama", layers=1, dtype=torch.float64), []
    for pads in (0, 3):
        ids = torch.tensor([[0] * pads + PROMPT])
        decoder = AWRS(constraint=Regex("[a-c]{2}"), vocabulary=Vocabulary(FORMS, [EOS]))
        torch.manual_seed(0)
        options = {"attention_mask": (torch.arange(ids.shape[1]) >= pads).long()[None], "pad_token_id": 0}
        model.generate(ids, custom_generate=decoder, max_new_tokens=4, eos_token_id=EOS, **options)
        weights.append(decoder.populations[0].log_weights)
    assert weights[0] == pytest.approx(weights[1], abs=1e-9)


def test_the_returned_output_is_drawn_in_proportion_to_the_weights() -> None:
    model, vocabulary = tiny_model("llama", layers=1), Vocabulary(FORMS, [EOS])
    decoder = AWRS(constraint=Choices(["a", "b"]), vocabulary=vocabulary, particles=100, ess_threshold=0.0)
    options = {"max_new_tokens": 4, "eos_token_id": EOS, "do_sample": True, "temperature": 0.1, "top_k": 0}
    weights, returned = [], []
    for seed in range(40):
        torch.manual_seed(seed)
        output = model.generate(torch.tensor([PROMPT]), custom_generate=decoder, **options)
        shares = dict(zip(decoder.populations[0].texts, [0.0] * 100, strict=True))
        for text, weight in zip(decoder.populations[0].texts, decoder.populations[0].weights, strict=True):
            shares[text] += float(weight)
        weights.append(shares.get("a", 0.0))
        returned.append(int(output[0, len(PROMPT)]) == FORMS.index(b"a"))
    assert abs(np.mean(weights) - 0.5) > 0.25
    assert np.mean(returned) == pytest.approx(np.mean(weights), abs=0.2)


def test_without_weights_max_rejects_ends_a_draw() -> None:
    decoder, rng = AWRS(proper_weights=False, max_rejects=1), np.random.default_rng(0)
    draws = [decoder.draw(WeightedDraws(np.full(4, 0.25), rng), lambda token: token == 3) for _ in range(100)]
    assert 5 < sum(weight == 1 for _, weight in draws) < 60


def test_a_recurrent_model_generates_under_a_constraint() -> None:
    decoder = AWRS(constraint=Regex("[a-c]{2,4}"), vocabulary=Vocabulary(FORMS, [EOS]))
    model = tiny_lm("mamba2")
    model.generate(torch.tensor([PROMPT]), custom_generate=decoder, max_new_tokens=6, eos_token_id=EOS, pad_token_id=0)
    assert any(decoder.populations[0].weights)


def test_what_it_cannot_do_is_one_sentence() -> None:
    model, vocabulary = tiny_model("llama", layers=1), Vocabulary(FORMS, [EOS])
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"constraint": None}, {}, "has no constraint"),
        ({}, {"num_beams": 2}, "num_beams is 2"),
        ({"constraint": Regex("a") & Regex("b")}, {}, "no token of the vocabulary may begin"),
        ({"constraint": Predicate(lambda text: len(text) < 2, lambda text: False)}, {}, "none of 5 particles met"),
        (
            {"constraint": Predicate(lambda text: text == "" or bool(1 / 0))},
            {},
            r"for the prefix '\w+'.*division by zero",
        ),
        ({"constraint": Predicate(lambda text: False)}, {}, "rejects the empty prefix"),
        ({"vocabulary": None}, {}, "fast tokenizer"),
        ({"proposal": tiny_model("llama", layers=1, vocab_size=VOCAB + 8)}, {}, "the same vocabulary is needed"),
        ({}, {"stopping_criteria": [lambda ids, scores, **_: torch.zeros(len(ids), dtype=torch.bool)]}, "criterion"),
        ({}, {"eos_token_id": None}, "no token ends an output"),
    ]
    for fields, options, says in cases:
        decoder = AWRS(**{"constraint": Regex("a*"), "vocabulary": vocabulary} | fields)
        if options.get("eos_token_id", EOS) is None:
            decoder = decoder.model_copy(update={"vocabulary": None, "tokenizer": None})
            says = "no token ends an output|fast tokenizer"
        with pytest.raises(IntaglioError, match=says) as caught:
            model.generate(
                torch.tensor([PROMPT]), custom_generate=decoder, **{"max_new_tokens": 4, "eos_token_id": EOS} | options
            )
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [
    {"max_rejects": 1}, {"estimator": "two_loop", "max_rejects": 3}, {"estimator": "recursive", "max_accepts": 3},
    {"proper_weights": False, "estimator": "geometric"}, {"max_accepts": 1}, {"ess_threshold": 1.5},
])  # fmt: skip
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AWRS(**fields)


def test_first_accepted_ends_after_max_rejects() -> None:
    draws = WeightedDraws(np.array([0.5, 0.5]), np.random.default_rng(0))
    assert first_accepted(draws, lambda token: False, 1)[1] == 0


@pytest.mark.parametrize("estimator", ["recursive", "geometric"])
def test_max_rejects_ends_a_draw(estimator: Any) -> None:
    """With a single accepted token of four, a draw fails after two rejects, and never without a limit."""
    failures = {}
    for limit in (None, 2):
        decoder, rng = AWRS(estimator=estimator, max_rejects=limit), np.random.default_rng(0)
        draws = [decoder.draw(WeightedDraws(np.full(4, 0.25), rng), lambda token: token == 3) for _ in range(200)]
        failures[limit] = sum(weight == 0 for _, weight in draws)
    assert failures[None] == 0
    assert failures[2] > 20
