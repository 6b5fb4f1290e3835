"""Every causal-LM class of transformers: load, draft, inspect and prune work, or are refused in one sentence."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.modeling.anatomy import anatomy
from tests.causal_lms import OPERATIONS, model_types, outcomes, tiny_lm

# What the sample must give: the operations that are refused, with a part of the sentence.
SAMPLE: dict[str, dict[str, str]] = {
    "bart": {},
    "bloom": {"masks": "does not call transformers' attention interface"},
    "cohere": {},
    "doge": {"masks": "changes its masks in its own code"},
    "falcon": {"masks": "does not call transformers' attention interface"},
    "gemma2": {},
    "gpt_neo": {"masks": "does not call transformers'"},
    "gpt_oss": {},
    "jamba": {
        "draft": "nor does it read several tokens at once",
        "wanda": "no calibration token reached mamba.dt_proj",
    },
    "llama4": {"wanda": "its blocks hold feed_forward.experts.gate_up_proj (4, 32, 96), which is not a linear layer"},
    "mixtral": {},
    "opt": {},
    "qwen3_next": {},
    "trocr": {"masks": "does not call transformers'"},
    "xglm": {"masks": "does not call transformers'"},
    "xlnet": dict.fromkeys(OPERATIONS, "no list of transformer blocks could be identified in it"),
}
# Of the classes that can be built: at least this share works.
LEAST = {"load": 0.95, "draft": 0.8, "masks": 0.78, "wanda": 0.8}


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_sample_works_or_is_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    found = outcomes(kind, tmp_path / "model")
    refused = {name: sentence for name, sentence in found.items() if sentence != "works"}
    assert set(refused) == set(SAMPLE[kind]), refused
    for name, part in SAMPLE[kind].items():
        assert part in refused[name]


def test_qk_norms_by_head_are_no_linear_layers() -> None:
    parts = anatomy(tiny_lm("cohere", use_qk_norm=True))
    assert {linear.name.rpartition(".")[2] for linear in parts.linears(0)} == {
        *(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    }


@pytest.mark.parametrize(
    "more", [{}, {"multi_query": False}, {"new_decoder_architecture": True, "num_kv_heads": 2}], ids=str
)
def test_the_fused_rows_of_falcon_are_those_that_it_splits(more: dict[str, Any]) -> None:
    parts = anatomy(tiny_lm("falcon", **more))
    attention: Any = parts.blocks[0].self_attention
    rows = attention.query_key_value.weight.shape[0]
    split = attention._split_heads(torch.arange(rows).view(1, 1, rows))
    for linear, part in zip(parts.linears(0)[:3], split, strict=True):
        assert linear.rows is not None
        assert set(linear.rows.tolist()) == set(part.flatten().tolist())


def test_a_masked_pass_of_falcons_mlp_is_its_own() -> None:
    parts = anatomy(tiny_lm("falcon"))
    own: Any = parts.blocks[0].mlp
    mlp, x = parts.mlp(0), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    z = torch.nn.functional.gelu(x @ mlp.into.read().T)
    torch.testing.assert_close(z @ mlp.out.read().T, own(x))


@pytest.mark.slow
def test_every_class_works_or_is_refused_in_one_sentence(tmp_path: Path) -> None:
    works, built, failed = Counter[str](), 0, {}
    for kind in model_types():
        try:
            tiny_lm(kind)
        except Exception:  # it cannot be built from its configuration alone
            continue
        built += 1
        try:
            found = outcomes(kind, tmp_path / kind)
        except Exception as error:
            failed[kind] = f"{type(error).__name__}: {error}"
            continue
        works.update(name for name, outcome in found.items() if outcome == "works")
        assert all("\n" not in outcome for outcome in found.values()), found
    print(f"of {built} classes work: {', '.join(f'{name} {works[name]}' for name in ('load', *OPERATIONS))}")
    assert not failed
    assert built > 150
    for name, least in LEAST.items():
        assert works[name] >= least * built, (name, works[name], built)
