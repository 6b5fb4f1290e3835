"""Anatomy: parts of every family, checked against the models' own forward."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import Linear, anatomy, linears
from intaglio.modeling.partial_pass import HeadOnly, capture, final_hidden, run_blocks
from intaglio.modeling.replacement import ReplacedMLP
from tests.families import DECODERS, FAMILIES, VOCAB, tiny_model

IDS = torch.randint(8, 150, (3, 14), generator=torch.Generator().manual_seed(0))
LEFT, RIGHT = torch.ones_like(IDS), torch.ones_like(IDS)
LEFT[0, :5] = 0
RIGHT[1, -4:] = 0
BATCHES = {
    "plain": {"input_ids": IDS},
    "left": {"input_ids": IDS, "attention_mask": LEFT},
    "right": {"input_ids": IDS, "attention_mask": RIGHT},
}


@pytest.mark.parametrize("padding", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_walking_the_blocks_is_the_models_own_forward(family: str, padding: str) -> None:
    parts = anatomy(tiny_model(family))
    inputs = capture(parts, BATCHES[padding])
    inputs.hidden_BLD = run_blocks(parts, 0, 2, inputs)
    hidden_BLD = run_blocks(parts, 2, len(parts.blocks), inputs)
    if parts.final_norm is not None:
        hidden_BLD = parts.final_norm(hidden_BLD)
    assert torch.equal(hidden_BLD, final_hidden(parts, BATCHES[padding]))


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_leaves_the_model_as_it_was(family: str) -> None:
    model = tiny_model(family)
    before = model(IDS).logits
    capture(anatomy(model), BATCHES["left"])
    assert torch.equal(model(IDS).logits, before)
    assert not any("forward" in vars(block) for block in anatomy(model).blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_alone_gives_the_models_logits_even_after_the_blocks_changed(family: str) -> None:
    model = tiny_model(family)
    parts = anatomy(model)
    with torch.no_grad():
        expected = model(IDS).logits
        hidden_BLD, head = final_hidden(parts, {"input_ids": IDS}), HeadOnly(parts)
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert torch.equal(head.logits(hidden_BLD), expected)
    assert not torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_block_is_in_exactly_one_linear(family: str) -> None:
    parts = anatomy(tiny_model(family))
    for index, block in enumerate(parts.blocks):
        found = parts.linears(index)
        expected = sum(p.numel() for p in block.parameters() if p.dim() > 1)
        assert sum(out * into for out, into in (linear.shape for linear in found)) == expected
        assert len({linear.name for linear in found}) == len(found)
        assert {linear.part for linear in found} == {"attention", "mlp"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_reads_what_it_wrote_and_touches_nothing_else(family: str) -> None:
    model = tiny_model(family)
    linear = anatomy(model).linears(1)[1]
    others = [(n, other.read().clone()) for n, other in anatomy(model).all_linears() if n != f"layers.1.{linear.name}"]
    new = torch.randn(linear.shape, generator=torch.Generator().manual_seed(1))
    linear.write(new)
    assert torch.equal(linear.read(), new)
    now = dict(anatomy(model).all_linears())
    assert all(torch.equal(now[name].read(), value) for name, value in others)


@pytest.mark.parametrize(
    ("family", "module", "names"),
    [
        ("phi3", "self_attn", ("self_attn.qkv_proj[q]", "self_attn.qkv_proj[k]", "self_attn.qkv_proj[v]")),
        ("gpt_neox", "attention", tuple(f"attention.query_key_value[{r}]" for r in "qkv")),
        ("gpt2", "attn", tuple(f"attn.c_attn[{r}]" for r in "qkv")),
        ("modernbert", "attn", tuple(f"attn.Wqkv[{r}]" for r in "qkv")),
    ],
)
def test_fused_q_k_and_v_are_what_attention_gets(
    family: str, module: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero one part of the fused weight and bias: exactly that operand of the attention function becomes zero."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen: list[tuple[torch.Tensor, ...]] = []

    def spy(owner, query, key, value, mask, **kwargs):  # type: ignore[no-untyped-def]
        seen.append((query, key, value))
        return stock(owner, query, key, value, mask, **kwargs)

    for position, name in enumerate(names):
        model = tiny_model(family, layers=1)
        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)
        linear = {x.name: x for x in anatomy(model).linears(0)}[name]
        linear.write(torch.zeros(linear.shape))
        bias = getattr(linear.module, "bias", None)
        if bias is not None:
            with torch.no_grad():
                bias[linear.rows] = 0
        seen.clear()
        with torch.no_grad():
            model(IDS)
        zero = [not operand.any() for operand in seen[0]]
        assert zero == [index == position for index in range(3)], name
        monkeypatch.undo()


def test_gate_and_up_of_phi3_are_told_apart() -> None:
    model = tiny_model("phi3", layers=1)
    up = {x.name: x for x in anatomy(model).linears(0)}["mlp.gate_up_proj[up]"]
    gate_up = anatomy(model).blocks[0].mlp.gate_up_proj.weight
    assert torch.equal(up.read(), gate_up[len(gate_up) // 2 :])


def test_windows_ties_and_sides() -> None:
    expected = {"mistral_window": (8,) * 4, "gemma3": (8, 8, 8, None), "llama": (None,) * 4}
    for family, windows in expected.items():
        assert anatomy(tiny_model(family)).windows == windows
    for family, spec in FAMILIES.items():
        parts = anatomy(tiny_model(family))
        assert parts.causal == (family in DECODERS)
        assert parts.tied == spec.tied
        assert parts.embedding.weight.shape[0] == VOCAB
        assert parts.head is not None


def test_stacked_experts_are_refused_in_one_sentence() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from intaglio.errors import IntaglioError

    config = AutoConfig.for_model(
        "mixtral", vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, head_dim=8, max_position_embeddings=32,
    )  # fmt: skip
    parts = anatomy(AutoModelForCausalLM.from_config(config))
    with pytest.raises(
        IntaglioError, match=r"'mixtral' is not supported: its blocks hold .* which is not a linear layer"
    ):
        parts.all_linears()


def test_linears_come_in_the_order_of_the_modules() -> None:
    model = tiny_model("llama")
    names = [linear.name for linear in linears(anatomy(model).blocks[0], model.config)]
    expected = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert names == expected


def test_blocks_that_share_weights_are_refused() -> None:
    model = tiny_model("llama", layers=2)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(IntaglioError, match=r"'llama' is not supported: its blocks share weights \(mlp.up_proj\)"):
        anatomy(model).all_linears()
    model = tiny_model("llama", layers=2)
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(IntaglioError, match="its blocks share weights"):
        anatomy(model).all_linears()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_mlp_by_its_projections_is_the_models_own(family: str) -> None:
    parts = anatomy(tiny_model(family, layers=1))
    mlp, block = parts.mlp(0), parts.blocks[0]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    expected = x
    for name in filter(None, (mlp.where.passed, mlp.where.place)):
        expected = block.get_submodule(name)(expected)

    def product(linear: Linear, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, linear.read(), linear.read_bias())

    z = ACT2FN[mlp.activation](product(mlp.into, x))
    if mlp.factor is not None:
        z = z * product(mlp.factor, x)
    torch.testing.assert_close(product(mlp.out, z), expected)
    assert (mlp.dropout > 0) == (family == "gpt2")


def test_an_mlp_that_was_replaced_is_no_mlp_and_hides_nothing_else() -> None:
    class Nothing(ReplacedMLP):
        slug = "nothing"

        def __init__(self) -> None:
            super().__init__(32)
            self.weight = torch.nn.Parameter(torch.zeros(32, 32))

    model = tiny_model("llama", layers=1)
    model.model.layers[0].mlp = Nothing()
    parts = anatomy(model)
    assert [linear.role for linear in parts.linears(0)] == ["q", "k", "v", "o"]
    with pytest.raises(IntaglioError, match="not the model's own: nothing replaced mlp"):
        parts.mlp(0)
