"""Families that read no trees: the first path of each is verified, and the output is stock greedy's."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import CACHE
from intaglio.speculative import Speculative, Step, TokenTree
from intaglio.speculative.chain_model import REREAD, CachedChainModel
from intaglio.speculative.drafters import DraftModel
from tests.causal_lms import tiny_lm
from tests.speculative.toys import Made, mixed, oracle, prompt, wrong

# Positions from the cache's length; alibi; a buffer by slot; chunks; an indexer; recurrent, hybrid, convolutions.
FAMILIES = ("bart", "bloom", "gpt_neo", "llama4", "deepseek_v32", "mamba2", "qwen3_next", "falcon_h1", "lfm2_moe")
NEW = 40


@functools.lru_cache
def target(family: str) -> Any:
    model = tiny_lm(family).double()
    if any(model.get_experts_implementation().values()):
        model.set_experts_implementation("eager")  # the others take no float64
    return model


def run(family: str, drafter: Any, **options: Any) -> tuple[Any, list[Step]]:
    steps: list[Step] = []
    decoder = Speculative(drafter, on_step=steps.append, prepack=False)
    options = {"input_ids": prompt(6), "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    return target(family).generate(custom_generate=decoder, **options), steps


@functools.lru_cache
def stock(family: str) -> list[int]:
    ids = target(family).generate(prompt(6), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return ids[0, 6:].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_chains_are_lossless_however_many_tokens_are_accepted(family: str) -> None:
    answer = stock(family)
    for drafter in (mixed([answer], seed=0), oracle([answer]), wrong([answer])):
        ids, steps = run(family, drafter)
        assert ids[0, 6:].tolist() == answer
        trees = [step.tree for step in steps[1:] if step.tree is not None]
        assert all(list(tree.parents) == list(range(-1, len(tree) - 1)) for tree in trees)
    assert len(steps) == NEW  # nothing of what is wrong is accepted
    assert len(run(family, oracle([answer]))[1]) < NEW // 4


@pytest.mark.parametrize("family", ["bart", "qwen3_next"])
def test_a_recurrent_state_is_caught_up_with_before_too_much_is_read_again(family: str) -> None:
    """Each wrong draft leaves one more token to read again; a pass without a draft reads them for good."""
    lengths = [len(step.tree) for step in run(family, wrong([stock(family)]))[1][1:30] if step.tree is not None]
    alone = [place for place, length in enumerate(lengths) if length == 1]
    assert alone == (list(range(REREAD, 29, REREAD + 1)) if family == "qwen3_next" else [])


@pytest.mark.parametrize("family", ["llama4", "qwen3_next", "falcon_h1"])
def test_the_cache_is_the_one_that_stock_leaves(family: str) -> None:
    out, _ = run(family, wrong([stock(family)]), max_new_tokens=12, return_dict_in_generate=True)
    assert out.sequences[0, 6:].tolist() == stock(family)[:12]
    more = target(family).generate(
        out.sequences, **{CACHE: out[CACHE]}, max_new_tokens=10, do_sample=False, eos_token_id=None
    )
    assert more[0, 6:].tolist() == stock(family)[:22]


def test_a_chain_keeps_the_draft_distribution_of_its_nodes() -> None:
    cached = CachedChainModel(target("bart"), _cache("bart"), "no trees")
    q = {node: torch.full((4,), 0.25 + node) for node in (0, 1, 2)}
    tree = TokenTree([5, 6, 7, 8, 9], [-1, 0, 0, 1, 2], q)
    chain = cached.fit(tree, 1, 5)
    assert (list(chain.tokens), list(chain.parents)) == ([5, 6, 8], [-1, 0, 1])
    assert chain.q == {0: q[0], 1: q[1]}
    assert list(cached.fit(tree, 1, 1).tokens) == [5, 6]
    assert list(cached.fit(tree, 2, 0).tokens) == [5, 6]


def _cache(family: str) -> Any:
    out = target(family).generate(prompt(3), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    return out[CACHE]


def test_what_takes_trees_or_rows_is_refused() -> None:
    drafter = mixed([stock("bart")] * 2, seed=0)
    with pytest.raises(IntaglioError, match=r"differ from those in a chain .* for one row without padding"):
        run("bart", drafter, input_ids=prompt(6).repeat(2, 1))
    with pytest.raises(IntaglioError, match="for one row without padding"):
        run("bart", drafter, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]))
    with pytest.raises(IntaglioError, match="bart cannot read trees that branch, as a draft model grows them"):
        run("bart", DraftModel(target("bart")))
    with pytest.raises(IntaglioError, match=r"holds a LinearAttentionLayer.* Inside drafts inside such passes"):
        run("mamba2", Inside(lambda row, ids, new, room: TokenTree([ids[-1]], [-1])))
    with pytest.raises(IntaglioError, match="the cache holds the whole prompt or an unknown part of it"):
        run("mamba2", drafter, **{CACHE: _cache("mamba2")})


class Inside(Made):
    """A drafter whose session makes the pass."""

    def start(self, run: Any) -> Any:
        session: Any = super().start(run)
        session.forward = lambda call: call.cached.forward(call.inputs)
        return session


def test_a_family_that_reads_several_tokens_otherwise_than_single_ones_is_refused() -> None:
    with pytest.raises(IntaglioError, match="nor does it read several tokens at once as it reads one after the other"):
        run("mamba", oracle([[1] * NEW]))
