"""SmolLM2 in float32: greedy output equals stock greedy up to near ties, over 200 prompts. Needs the bundled assets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import intaglio
from intaglio.data.texts import load_texts
from intaglio.methods.decoding.aded import ADED
from intaglio.speculative import Speculative
from intaglio.speculative.drafters import NGramStore
from tests.speculative.toys import mixed

pytestmark = pytest.mark.slow

PROMPTS, ROWS, LENGTH, NEW = 200, 8, 24, 12
GAP = 1e-3


@torch.no_grad()
def test_first_differences_occur_only_at_near_ties() -> None:
    checkpoint = intaglio.load("smollm2")
    model = checkpoint.model
    texts = [checkpoint.tokenizer(text, verbose=False)["input_ids"] for text in load_texts("wikipedia").documents[:40]]
    store = NGramStore.build(texts[20:], model.config.vocab_size)
    aded = ADED(corpus=texts[20:])
    shown = torch.tensor([token for text in texts[:20] for token in text])
    # Prompts from all over the first twenty articles; the store has counted the others.
    prompts = shown[: len(shown) // PROMPTS * PROMPTS].reshape(PROMPTS, -1)[:, :LENGTH]
    differences, passes, tokens = [], 0, 0
    for start in range(0, PROMPTS, ROWS):
        ids = prompts[start : start + ROWS]
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}
        expected = model.generate(ids, **options)
        # By turns what a corpus knows, what is learnt too, and trees that hold the right tokens often.
        right = mixed(expected[:, LENGTH:].tolist(), seed=start, nodes=6, right=0.8)
        drafters: list[Any] = [store, aded, right]
        # With weights laid out beforehand, as in longer runs: these products round otherwise than the stock ones.
        decoder = Speculative(drafters[start // ROWS % 3], prepack=True)
        found = model.generate(ids, custom_generate=decoder, **options)
        passes, tokens = passes + decoder.statistics.row_passes, tokens + decoder.statistics.tokens
        for ours, stock in zip(found, expected, strict=True):
            unlike = (ours != stock).nonzero()
            if len(unlike):
                place = int(unlike[0])
                top = model(stock[None, :place]).logits[0, -1].topk(2).values
                differences.append(float(top[0] - top[1]))
    print(f"{len(differences)} of {PROMPTS} prompts differ, at gaps {differences}; {tokens / passes:.2f} a pass")
    assert all(gap < GAP for gap in differences)
    assert tokens / passes > 1.2
