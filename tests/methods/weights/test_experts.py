"""One-shot pruning of mixtures: each expert by the tokens routed to it, stacked parameters, routers left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.measures.weight_sparsity import count_zeros
from intaglio.methods.weights.dsnot import DSnoT
from intaglio.methods.weights.magnitude import Magnitude
from intaglio.methods.weights.sparsegpt import SparseGPT
from intaglio.methods.weights.wanda import Wanda
from intaglio.modeling.anatomy import anatomy
from tests.causal_lms import tiny_lm

IDS = torch.randint(8, 150, (4, 24), generator=torch.Generator().manual_seed(0))


def mixture(family: str, **more: Any) -> Checkpoint:
    return Checkpoint(tiny_lm(family, **more), None, "tiny")


def first_experts(model: Any) -> Any:
    return next(module for module in model.modules() if hasattr(module, "gate_up_proj"))


def routed(model: Any) -> tuple[Tensor, Tensor]:
    """Inputs [N, D] of the first experts, and the experts [N, K] of each token."""
    calls: list[Any] = []
    handle = first_experts(model).register_forward_pre_hook(lambda module, args: calls.append(args))
    with torch.no_grad():
        for rows in IDS.split(2):
            model(rows)
    handle.remove()
    count = len(IDS) // 2
    return torch.cat([args[0].reshape(-1, args[0].shape[-1]) for args in calls[:count]]), torch.cat(
        [args[1] for args in calls[:count]]
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_an_experts_mask_is_wandas_on_the_tokens_routed_to_it(family: str) -> None:
    """Rows are outputs, whether the parameter holds [E, O, I] or, as gpt-oss, [E, I, O]."""
    checkpoint = mixture(family)
    x_ND, chosen_NK = routed(mixture(family).model)
    experts = first_experts(checkpoint.model)
    dense = {name: parameter.detach().clone() for name, parameter in experts.named_parameters()}
    Wanda(sparsity=0.5).apply(checkpoint, IDS, batch_size=2)
    transposed = family == "gpt_oss"
    for expert in range(experts.num_experts):
        x_TD = x_ND[(chosen_NK == expert).any(1)]
        inputs = {"gate_up_proj": x_TD}
        if not transposed:
            gate, up = (x_TD @ dense["gate_up_proj"][expert].T).chunk(2, -1)
            inputs["down_proj"] = torch.nn.functional.silu(gate) * up
        for name, x_TI in inputs.items():
            weight_OI = dense[name][expert].T if transposed else dense[name][expert]
            score_OI = weight_OI.abs() * x_TI.double().square().sum(0).float().sqrt()
            kept = score_OI >= score_OI.sort(1).values[:, [weight_OI.shape[1] // 2]]
            pruned = getattr(experts, name)[expert]
            torch.testing.assert_close(pruned.T if transposed else pruned, weight_OI * kept, rtol=0, atol=0)


METHODS = (Wanda(pattern="2:4"), SparseGPT(pattern="2:4"), DSnoT(pattern="2:4"), Magnitude(pattern="2:4"))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.slug)
@pytest.mark.parametrize("family", ["qwen3_moe", "jetmoe", "gpt_oss"])
def test_every_expert_has_the_sparsity_and_the_router_stays(method: Any, family: str) -> None:
    checkpoint = mixture(family)
    before = {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}
    runs_experts = checkpoint.model.get_experts_implementation()
    method.apply(checkpoint, IDS, batch_size=2)
    counts = count_zeros(checkpoint).counts
    assert len([name for name in counts if ".experts." in name or "_linear[" in name]) >= 2 * 2 * 4
    assert {zeros / size for zeros, size in counts.values()} == {0.5}
    routers = [name for name in before if ".gate." in name or "router" in name]
    assert routers
    assert all(torch.equal(before[name], checkpoint.model.state_dict()[name]) for name in routers)
    assert checkpoint.model.get_experts_implementation() == runs_experts


def test_an_expert_without_a_token_is_named_and_can_be_left_out() -> None:
    with pytest.raises(IntaglioError, match=r"no calibration token reached mlp\.experts\.gate_up_proj\[\d\].*leave it"):
        Wanda(sparsity=0.5).apply(mixture("qwen3_moe"), IDS[:1, :1])
    checkpoint = mixture("qwen3_moe")
    before = first_experts(checkpoint.model).down_proj.clone()
    Wanda(sparsity=0.5, ignore=["*.experts.*"]).apply(checkpoint, IDS[:1, :1])
    assert torch.equal(first_experts(checkpoint.model).down_proj, before)


def test_padding_is_refused_as_experts_get_it_like_tokens() -> None:
    mask = torch.ones_like(IDS)
    mask[0, -3:] = 0
    with pytest.raises(IntaglioError, match="padding is routed to experts like tokens"):
        Wanda(sparsity=0.5).apply(mixture("qwen3_moe"), Segments(IDS, mask.bool()))


def test_methods_that_replace_modules_refuse_experts() -> None:
    parts = anatomy(tiny_lm("qwen3_moe"))
    with pytest.raises(IntaglioError, match=r"its blocks hold mlp.experts.gate_up_proj \(4, 96, 32\)"):
        parts.all_linears()
    names = [name for name, _ in parts.all_linears(experts=True)]
    assert "layers.1.mlp.experts.down_proj[3]" in names
    assert not any("gate." in name for name in names)


def test_cross_attention_that_never_runs_is_no_projection() -> None:
    names = [linear.name for linear in anatomy(tiny_lm("bart")).linears(0)]
    assert [name for name in names if "attn" in name] == [
        f"self_attn.{x}" for x in ("k_proj", "v_proj", "q_proj", "out_proj")
    ]
