"""Draft heads use the target's own logit transform: a scaling, a soft cap, a bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from intaglio.methods.decoding.chimera.model import ChimeraModel
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import final_hidden
from intaglio.speculative.drafters.medusa import MedusaHeads
from intaglio.speculative.heads.lm_head import TargetHead
from tests.families import VOCAB

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "gemma2": {"head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 2.0, "sliding_window": 8},
    "phi": {},
}
IDS = torch.tensor([[9, 30, 31, 32, 9, 30]])


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **FAMILIES[family])).double().eval()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.add_(torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("tokens", [None, torch.tensor([3, 9, 30, 31, 77])])
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_heads_predict_what_the_model_does(family: str, tokens: torch.Tensor | None) -> None:
    model = model_of(family)
    parts = anatomy(model)
    with torch.no_grad():
        expected = model(IDS).logits[0]
        hidden = final_hidden(parts, {"input_ids": IDS})[0]
    if tokens is not None:
        expected = expected[:, tokens]
    medusa = MedusaHeads(model, heads=1, tokens_K=tokens).double()
    chimera = ChimeraModel(model, heads=1, rank=0, start="copy", tokens_K=tokens).double()
    with torch.no_grad():
        states = torch.stack(medusa.states(hidden), 1)
        torch.testing.assert_close(medusa.score(states, TargetHead(parts, medusa.words))[:, 0], expected)
        found = chimera.score(hidden, torch.zeros_like(hidden), 0, TargetHead(parts, chimera.words))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_gradients_pass_the_transform(family: str) -> None:
    model = model_of(family)
    target = TargetHead(anatomy(model), MedusaHeads(model).words)
    raw = torch.randn(3, VOCAB, dtype=torch.float64, requires_grad=True)
    target.finish(raw).sum().backward()
    assert raw.grad is not None
    assert bool((raw.grad > 0).all())
    assert float(raw.grad.max()) < 1
