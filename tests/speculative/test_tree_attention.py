"""Families whose attention does not follow the mask draft chains, so that output is never silently wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from intaglio.modeling.anatomy import anatomy, attention
from intaglio.speculative import Speculative
from intaglio.speculative.drafters import PromptLookup
from intaglio.speculative.target_model import TreeRefused, check_tree_attention
from tests.families import VOCAB, tiny_model
from tests.speculative.toys import prompt

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}


def gpt_neo(*kinds: str) -> Any:
    """A tiny GPT-Neo, which hides cache slots outside a window of 6 by a buffer of its own in local layers."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, window_size=6,
        max_position_embeddings=128, attention_types=[[list(kinds), 1]], attn_implementation="eager",
    )  # fmt: skip
    return GPTNeoForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["global", "local"])
def test_gpt_neo_is_lossless(kind: str) -> None:
    model, ids = gpt_neo("global", kind), prompt(9).repeat(1, 3)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, custom_generate=Speculative(PromptLookup()), **GREEDY), expected)


def test_gpt_neo_with_local_layers_reads_no_tree() -> None:
    with pytest.raises(TreeRefused, match="of gpt_neo hides cache slots by its own buffer"):
        check_tree_attention(gpt_neo("global", "local"), 64)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_unknown_family_that_masks_by_slot_reads_no_tree_and_drafts_losslessly(implementation: str) -> None:
    model: Any = tiny_model("llama", layers=2)
    model.set_attn_implementation(implementation)

    def by_slot(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        if mask is not None and mask.shape[2] > 1:
            new, slots = mask.shape[2:]
            seen = torch.ones(new, slots, dtype=torch.bool).tril(slots - new)[None, None]
            kwargs["attention_mask"] = (
                seen if mask.dtype == torch.bool else torch.zeros_like(mask).masked_fill(~seen, -1e9)
            )
        return args, kwargs

    for block in anatomy(model).blocks:
        attention(block).register_forward_pre_hook(by_slot, with_kwargs=True)
    with pytest.raises(TreeRefused, match="hidden states of llama in a branch of a tree differ"):
        check_tree_attention(model, 64)
    expected = model.generate(prompt(9), **GREEDY)
    assert torch.equal(model.generate(prompt(9), custom_generate=Speculative(PromptLookup()), **GREEDY), expected)


def test_the_check_runs_once_per_model() -> None:
    model: Any = tiny_model("llama", layers=2)
    calls: list[int] = []
    anatomy(model).base.register_forward_pre_hook(lambda *_: calls.append(1))
    counts = []
    for _ in range(2):
        decoder = Speculative(PromptLookup())
        calls.clear()
        model.generate(prompt(9), custom_generate=decoder, **GREEDY)
        counts.append(len(calls) - decoder.statistics.passes)
    assert counts == [4, 0]
