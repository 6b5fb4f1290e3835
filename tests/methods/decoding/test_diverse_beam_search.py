"""Diverse beam search: the card's limits and its worked example, exactly, and each dissimilarity by its formula."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import LogitsProcessor, MambaConfig, MambaForCausalLM
from transformers.cache_utils import StaticCache
from transformers.generation.streamers import TextStreamer

from intaglio.errors import IntaglioError
from intaglio.methods.decoding.diverse_beam_search import (
    Chosen,
    DiverseBeamSearch,
    check_groups,
    cumulative,
    embedding,
    hamming,
    ngram,
)
from intaglio.modeling.anatomy import CACHE
from tests.alive import alive
from tests.families import DECODERS, tiny_model, tiny_tokenizer

EXAMPLES = ({"num_beams": 4, "num_beam_groups": 2}, {"num_beams": 3, "dissimilarity": "ngram", "accumulate": "raw"})
BASE = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 2.0}
ALIVE = {
    "num_beams": 6,
    "num_beam_groups": 4,
    "diversity_penalty": 0.0,
    "dissimilarity": "cumulative",
    "ngram_size": alive(1, dissimilarity="ngram"),
    "temperature": alive(0.2, dissimilarity="cumulative"),
    "accumulate": alive("raw", diversity_penalty=0.2),
    "length_penalty": 0.0,
    "order": "groups",
    "num_return_sequences": 2,
}
IDS = torch.randint(8, 150, (3, 6), generator=torch.Generator().manual_seed(1))
STOPS = [5, *range(20, 100, 10)]
"""Enough end-of-text tokens that beams end early."""
A, B, C = 10, 11, 12


def observe(method: Any) -> Any:
    return decode(method, eos_token_id=STOPS, max_new_tokens=8), method.outputs


def decode(method: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    model = tiny_model("llama", layers=2)
    given = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 3, **options}
    out: torch.Tensor = model.generate(ids, **given, custom_generate=method)
    return out


def stock(num_beams: int, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    given = {"num_beams": num_beams, "num_return_sequences": num_beams, **options}
    return decode(None, ids, **given)


class Table(LogitsProcessor):
    """Replaces the model by a table: probabilities of the next token by the tokens after the prompt."""

    def __init__(self, probs: dict[tuple[int, ...], dict[int, float]]) -> None:
        self._probs = probs

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        table = torch.full_like(scores, -math.inf)
        for row, ids in enumerate(input_ids[:, 2:].tolist()):
            for token, p in self._probs[tuple(ids)].items():
                table[row, token] = math.log(p)
        return table


WORKED = {
    (): {A: 0.5, B: 0.3, C: 0.2},
    (A,): {A: 0.6, B: 0.3, C: 0.1},
    (B,): {A: 0.2, B: 0.5, C: 0.3},
}


def tabled(probs: dict[tuple[int, ...], dict[int, float]], new: int, **fields: Any) -> tuple[list[list[int]], Any]:
    method = DiverseBeamSearch(order="groups", length_penalty=0.0, **fields)
    out = decode(method, torch.tensor([[9, 9]]), logits_processor=[Table(probs)], max_new_tokens=new)
    return out[:, 2:].tolist(), method.outputs


# --- Faithful means --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("options", [{}, {"eos_token_id": STOPS}, {"eos_token_id": STOPS, "early_stopping": True}])
def test_without_penalty_every_group_is_plain_beam_search(groups: int, options: dict[str, Any]) -> None:
    """lambda=0: every group returns exactly what beam search with B' beams returns (with G=B the greedy sequence)."""
    width = 6 // groups
    expected = stock(width, **options)
    out = decode(
        DiverseBeamSearch(num_beams=6, num_beam_groups=groups, diversity_penalty=0.0, order="groups"), **options
    )
    by_group = out.view(3, groups, width, -1)
    for group in range(groups):
        assert torch.equal(by_group[:, group].flatten(0, 1), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length_penalty": 0.0, "eos_token_id": STOPS},
        {"early_stopping": True, "eos_token_id": STOPS},
        {"early_stopping": "never", "length_penalty": 2.0, "eos_token_id": STOPS},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"num_return_sequences": 1, "eos_token_id": STOPS},
    ],
)
@pytest.mark.parametrize("accumulate", ["augmented", "raw"])
def test_one_group_is_plain_beam_search_id_for_id(accumulate: str, options: dict[str, Any]) -> None:
    """G=1: equals plain beam search with B beams for any lambda."""
    method = DiverseBeamSearch(num_beam_groups=1, diversity_penalty=3.0, accumulate=accumulate)
    given = {"num_beams": 4, "num_return_sequences": 4, **options}
    assert torch.equal(decode(method, **given), stock(4, **options))


@pytest.mark.parametrize("family", DECODERS)
def test_one_group_is_plain_beam_search_on_every_family(family: str) -> None:
    model = tiny_model(family, layers=2)
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 14, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    given = {"attention_mask": mask, "do_sample": False, **options}
    expected = model.generate(IDS, **given)
    assert torch.equal(model.generate(IDS, **given, custom_generate=DiverseBeamSearch(num_beam_groups=1)), expected)


def test_sampling_draws_within_groups_and_one_group_is_stock_beam_sampling() -> None:
    options: dict[str, Any] = {"do_sample": True, "num_beams": 4, "num_return_sequences": 4, "top_k": 0}
    torch.manual_seed(0)
    expected = decode(None, **options)
    torch.manual_seed(0)
    assert torch.equal(decode(DiverseBeamSearch(num_beam_groups=1), **options), expected)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(decode(DiverseBeamSearch(num_beam_groups=2, diversity_penalty=1.0), **options))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("dissimilarity", ["hamming", "cumulative", "ngram", "embedding"])
def test_the_first_group_never_depends_on_the_penalty(dissimilarity: str) -> None:
    """Group 1 is always unaffected by lambda (equals beam search of width B')."""
    expected = stock(2, eos_token_id=STOPS)
    for penalty in (0.3, 30.0):
        fields: dict[str, Any] = {"diversity_penalty": penalty, "dissimilarity": dissimilarity, "order": "groups"}
        out = decode(DiverseBeamSearch(num_beams=6, num_beam_groups=3, **fields), eos_token_id=STOPS)
        first = out.view(3, 3, 2, -1)[:, 0].flatten(0, 1)
        assert torch.equal(first[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("accumulate", ["augmented", "raw"])
def test_with_an_endless_penalty_all_groups_differ_at_every_step(accumulate: str) -> None:
    """lambda -> infinity, G=B: at each step all groups pick different tokens; at t=1 the g-th most probable."""
    method = DiverseBeamSearch(num_beams=5, diversity_penalty=1e4, accumulate=accumulate, order="groups")
    new = decode(method).view(3, 5, -1)[:, :, 6:]
    for prompt in new:
        assert all(len(set(step.tolist())) == 5 for step in prompt.T)
    with torch.no_grad():
        first = tiny_model("llama", layers=2)(IDS).logits[:, -1].topk(5).indices
    assert torch.equal(new[:, :, 0], first)


def test_later_groups_do_not_change_earlier_ones() -> None:
    """Permutation of later groups cannot change earlier ones."""
    few, many = (
        decode(DiverseBeamSearch(num_beams=groups, diversity_penalty=1.0, order="groups"), eos_token_id=STOPS)
        for groups in (3, 6)
    )
    few, many = few.view(3, 3, -1), many.view(3, 6, -1)[:, :3]
    length = min(few.shape[2], many.shape[2])
    assert torch.equal(few[..., :length], many[..., :length])


def test_the_worked_example() -> None:
    """Worked (G=B=2, B'=1): lambda=.5 gives a duplicate of augmented score -2.204, raw -1.204; lambda=1 gives b b."""
    rows, outputs = tabled(WORKED, 2, num_beams=2, diversity_penalty=0.5)
    assert rows == [[A, A], [A, A]]
    assert (outputs[1].score, outputs[1].log_prob) == (pytest.approx(-2.204, abs=1e-3), pytest.approx(-1.204, abs=1e-3))
    rows, outputs = tabled(WORKED, 2, num_beams=2, diversity_penalty=1.0)
    assert rows == [[A, A], [B, B]]
    assert (outputs[1].score, outputs[1].log_prob) == (pytest.approx(-1.897, abs=1e-3), pytest.approx(-1.897, abs=1e-3))
    flip = math.log(0.5 / 0.3)
    for penalty, token in ((flip - 1e-3, A), (flip + 1e-3, B)):
        assert tabled(WORKED, 1, num_beams=2, diversity_penalty=penalty)[0][1] == [token]


def test_two_earlier_beams_count_twice() -> None:
    """Count semantics: two earlier beams choosing v means penalty 2*lambda."""
    probs = {(): {A: 0.5, B: 0.3, C: 0.2}}
    twice = math.log(0.5 / 0.3) / 2  # the third of three groups leaves a when 2 lambda exceeds log(.5 / .3)
    for penalty, token in ((twice - 1e-3, A), (twice + 1e-3, B)):
        rows, _ = tabled(probs, 1, num_beams=3, diversity_penalty=penalty)
        assert rows == [[A], [A], [token]]


def test_an_ended_group_adds_no_counts() -> None:
    """Finished/padded beams of earlier groups must not add counts for PAD after EOS; the EOS itself counts once."""
    end = 5
    probs = {
        (): {A: 0.6, B: 0.4},
        (A,): {end: 0.9, A: 0.1},
        (B,): {end: 0.6, A: 0.4},
        (A, A): {A: 0.9, B: 0.1},
        (B, A): {A: 0.55, B: 0.45},
    }

    def run(penalty: float) -> tuple[list[list[int]], Any]:
        method = DiverseBeamSearch(order="groups", length_penalty=0.0, num_beams=2, diversity_penalty=penalty)
        ids = torch.tensor([[9, 9]])
        options = {"eos_token_id": end, "pad_token_id": A, "max_new_tokens": 3}
        out = decode(method, ids, logits_processor=[Table(probs)], **options)
        return out[:, 2:].tolist(), method.outputs

    rows, outputs = run(0.5)
    # At t=2 the first group ends, so group 2 prefers a to its own end (.6 e^-.5 < .4). At t=3 the first group is over:
    # neither its padding (a) nor what its spare beam would choose (a) is penalised, so a keeps .55 to .45.
    assert rows == [[A, end, A], [B, A, A]]
    assert outputs[1].score == pytest.approx(math.log(0.4 * 0.4 * 0.55), abs=1e-5)
    assert [output.length for output in outputs] == [2, 3]


# --- Dissimilarities --------------------------------------------------------------------------------------------------


def earlier(*groups: list[list[int]]) -> list[Chosen]:
    return [Chosen(torch.tensor([rows]), torch.ones(1, len(rows))) for rows in groups]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=4, max_size=4), st.integers(1, 3))
def test_similarities_agree_with_loops(rows: list[list[int]], n: int) -> None:
    own, first, second = rows[0], rows[1:3], rows[3:]
    before = torch.tensor([[own[:3]]])
    groups = earlier(first, second)
    table = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    def total(items: list[int]) -> torch.Tensor:
        return table[torch.tensor(items)].sum(0)

    for token in range(6):
        candidate = [*own[:3], token]
        assert hamming(before, groups, 6)[0, 0, token] == sum(row[3] == token for row in (*first, *second))
        expected = sum(
            math.exp(-sum(a != b for row in group for a, b in zip(candidate, row, strict=True)) / 0.7)
            for group in (first, second)
        )
        assert float(cumulative(before, groups, 6, 0.7)[0, 0, token]) == pytest.approx(expected, rel=1e-5)
        count = sum(row[i : i + n] == candidate[-n:] for row in (*first, *second) for i in range(5 - n))
        assert ngram(before, groups, 6, n)[0, 0, token] == count
        cosine = sum(
            float(torch.cosine_similarity(total(candidate[-n:]), total(row[-n:]), dim=0)) for row in (*first, *second)
        )
        assert float(embedding(before, groups, 6, n, table, table.square().sum(-1))[0, 0, token]) == pytest.approx(
            cosine, abs=1e-4
        )


def test_ended_beams_weigh_nothing() -> None:
    none = [Chosen(torch.tensor([[[1, 2], [3, 2]]]), torch.zeros(1, 2))]
    before = torch.tensor([[[1]]])
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for value in (hamming(before, none, 4), cumulative(before, none, 4, 1.0), ngram(before, none, 4, 2),
                  embedding(before, none, 4, 1, table, table.square().sum(-1))):  # fmt: skip
        assert not value.any()


# --- Outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", ["augmented", "raw"])
def test_reported_log_probs_are_the_models_and_scores_follow(accumulate: str) -> None:
    method = DiverseBeamSearch(
        num_beams=6, num_beam_groups=3, diversity_penalty=1.0, accumulate=accumulate, length_penalty=1.0
    )
    out = decode(method, eos_token_id=STOPS)
    with torch.no_grad():
        log_probs = tiny_model("llama", layers=2)(out).logits.log_softmax(-1)
    chosen = log_probs[:, 5:-1].gather(2, out[:, 6:, None])[..., 0]
    for row, hypothesis in zip(chosen, method.outputs, strict=True):
        assert hypothesis.log_prob == pytest.approx(float(row[: hypothesis.length].sum()), abs=1e-3)
        plain = hypothesis.log_prob / hypothesis.length
        if accumulate == "raw" or hypothesis.group == 0:
            assert hypothesis.score == pytest.approx(plain, abs=1e-4)
        else:
            assert hypothesis.score < plain + 1e-4


def test_orders_are_permutations_of_each_other() -> None:
    def run(order: Any) -> tuple[torch.Tensor, Any]:
        method = DiverseBeamSearch(num_beams=6, num_beam_groups=3, diversity_penalty=1.0, order=order)
        return decode(method, eos_token_id=STOPS).view(3, 6, -1), method.outputs

    groups, interleaved, pooled = (run(order) for order in ("groups", "interleaved", "log_prob"))
    assert [output.group for output in groups[1][:6]] == [0, 0, 1, 1, 2, 2]
    assert [output.group for output in interleaved[1][:6]] == [0, 1, 2, 0, 1, 2]
    assert torch.equal(interleaved[0], groups[0][:, [0, 2, 4, 1, 3, 5]])
    ranks = [output.log_prob / output.length for output in pooled[1][:6]]
    assert ranks == sorted(ranks, reverse=True)
    assert all(a.score >= b.score for a, b in pairwise(groups[1][:2]))


def test_the_former_options_of_generate_are_accepted_and_the_output_holds_groups() -> None:
    options = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 2.0, "num_return_sequences": 4}
    by_field = decode(DiverseBeamSearch(num_beams=4, num_beam_groups=2, diversity_penalty=2.0))
    assert torch.equal(decode(DiverseBeamSearch(), **options), by_field)
    by_interleaving = DiverseBeamSearch()
    whole: Any = decode(by_interleaving, **options, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(whole.sequences, by_field)
    assert whole.group_ids.tolist() == [0, 1, 0, 1] * 3
    hypotheses = by_interleaving.outputs
    assert whole.log_probs.tolist() == [output.log_prob for output in hypotheses]
    assert whole.sequences_scores.tolist() == pytest.approx([output.score for output in hypotheses], abs=1e-5)
    assert (whole.beam_indices[:, 0] // 2 % 2).tolist() == whole.group_ids.tolist()  # two beams a group, two groups
    assert torch.equal(decode(DiverseBeamSearch(), **{**options, "num_return_sequences": 1}).unique(dim=0), by_field[::4].unique(dim=0))  # fmt: skip  # noqa: E501


def test_encoder_decoders_are_searched_too() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ).eval()
    options: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 6, "do_sample": False}
    ids = IDS % 60
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, custom_generate=DiverseBeamSearch(num_beam_groups=1)), expected)
    by_field = DiverseBeamSearch(num_beams=4, diversity_penalty=1e4, order="groups")
    out = model.generate(ids, max_new_tokens=6, do_sample=False, custom_generate=by_field).view(3, 4, -1)
    assert all(len(set(step.tolist())) == 4 for prompt in out[:, :, 1:] for step in prompt.T)


def test_models_without_attention_are_searched_too() -> None:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=160, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(IDS, **options, num_beams=4, num_return_sequences=4)
    method = DiverseBeamSearch(num_beams=4, num_beam_groups=1)
    assert torch.equal(model.generate(IDS, **options, custom_generate=method), expected)


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "options", "sentence"),
    [
        (
            {},
            {"num_beams": 4, "num_beam_groups": 3},
            "num_beam_groups is 3 and num_beams 4; each group has as many beams",
        ),
        ({}, {"num_beams": 2, "num_beam_groups": 4}, "num_beam_groups is 4 and num_beams 2; at most one group a beam"),
        ({"num_beams": 4}, {"num_beams": 6}, "num_beams is 4 for the decoder and 6 for generate; give one"),
        ({}, {"do_sample": True, "num_return_sequences": 3}, "num_return_sequences is 3 and generate has one beam"),
        ({"num_return_sequences": 5}, {}, "num_return_sequences is 5; from 1 to num_beams, 4, is accepted"),
        ({}, {"penalty_alpha": 0.6, "top_k": 4}, "the generation mode is contrastive_search"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields: dict[str, Any], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence) as caught:
        decode(DiverseBeamSearch(**fields), **options)
    assert "\n" not in str(caught.value)


def test_a_streamer_and_a_full_cache_are_refused() -> None:
    model = tiny_model("llama", layers=2)
    with pytest.raises(IntaglioError, match="a streamer was given to generate; diverse beam search cannot use it"):
        decode(DiverseBeamSearch(), IDS[:1], streamer=TextStreamer(tiny_tokenizer("llama")))
    cache = StaticCache(model.config, max_cache_len=32)
    with pytest.raises(IntaglioError, match="has one row a prompt; give num_beams to generate"):
        decode(DiverseBeamSearch(), **{CACHE: cache})


@pytest.mark.parametrize(
    ("kind", "size"), [("hamming", {}), ("ngram", {"ngram_size": 2}), ("embedding", {"ngram_size": 1})]
)
def test_the_default_penalty_is_half_a_nat_and_n_is_two_or_one(kind: Any, size: dict[str, int]) -> None:
    given: dict[str, Any] = {"num_beams": 6, "num_beam_groups": 3, "dissimilarity": kind}
    plain, written = DiverseBeamSearch(**given), DiverseBeamSearch(**given, diversity_penalty=0.5, **size)
    assert torch.equal(decode(plain), decode(written))
    assert plain.outputs == written.outputs


def test_fields_are_checked_before_any_model_loads() -> None:
    for fields in ({"num_beams": 4, "num_beam_groups": 3}, {"ngram_size": 2}, {"diversity_penalty": -1.0},
                   {"temperature": 0.0}, {"order": "best"}):  # fmt: skip
        with pytest.raises(ValidationError):
            DiverseBeamSearch(**fields)
    with pytest.raises(ValueError, match="a divisor of 4"):
        check_groups(4, 8)
    assert DiverseBeamSearch.paper(num_beams=10, num_beam_groups=5).length_penalty == 0.0
