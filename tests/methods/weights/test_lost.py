"""LOST: what its parts begin as, what they give, what they cost, and that a model of them is a model like any other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.checkpoint import Checkpoint, load
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.masks import visible
from intaglio.methods.attention.layerwise_unmasking import LayerwiseUnmasking
from intaglio.methods.base import Workload
from intaglio.methods.weights.lost import LOST, ElementsLinear, LayerSizes, LostLinear, merge
from intaglio.methods.weights.lost.init import Decomposition, random_pair
from intaglio.methods.weights.lost.layers import LostLinearConfig
from intaglio.methods.weights.lost.saliency import column_gradients
from intaglio.methods.weights.lost.sizing import SizeSpec
from intaglio.methods.weights.sparsity_target import pruned_count
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.replacement import FusedLinears
from intaglio.recipe.schema import Recipe
from intaglio.speculative import Speculative
from intaglio.speculative.drafters.prompt_lookup import PromptLookup
from tests.alive import alive
from tests.families import tiny_model, tiny_tokenizer
from tests.speculative.toys import prompt, target
from tests.trainer.helpers import checkpoint, run, same, weights
from tests.trainer.test_resume import Killed, killer

EXAMPLES = (
    {},
    {"activation": "identity", "rank": {"layers.1.*": 9, "*": 0.5}, "columns": 3, "columns_by": "l1", "inverse": True},
    {"adapter": True, "alpha": 2.0, "columns_by": "random", "column_values": "complement", "ignore": ["layers.1.*"]},
    {"elements": 0.1, "activation": "identity", "init": "zero", "gamma": [0.25, 1.0], "rank": 8, "within_rank": True},
)
ALIVE = {
    "targets": ["layers.0.*"],
    "ignore": ["layers.0.*"],
    "rank": 3,
    "columns": 5,
    "elements": alive(0.1, activation="identity"),
    "gamma": 0.5,
    "complement_rank": alive(2, columns=5),
    "activation": "identity",
    "columns_by": alive("random", columns=5),
    "inverse": alive(True, columns=5),
    "column_values": alive("complement", columns=5),
    "init": "kaiming",
    "budget": 0.3,
    "within_rank": alive(True, columns=5),
    "adapter": True,
    "alpha": alive(2.0, adapter=True),
    "merge": "test_a_trained_model_is_saved_read_unmasked_drafted_for_and_merged",
}
IDENTITY: dict[str, Any] = {"activation": "identity"}
IDS = torch.randint(8, 150, (4, 16), generator=torch.Generator().manual_seed(0))


def matrix(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def replaced(weight_OI: Tensor, bias: Tensor | None = None, seed: int = 0, **fields: Any) -> Any:
    """Return the module that replaces one linear layer."""
    outputs, inputs = weight_OI.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, dtype=weight_OI.dtype)
    layer.weight.data.copy_(weight_OI)
    if bias is not None:
        layer.bias.data.copy_(bias)
    box = nn.ModuleDict({"x": layer})
    LOST(**fields).replace(box, seed=seed)
    return box["x"]


SHAPES = st.tuples(st.integers(2, 9), st.integers(2, 9))


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.floats(0, 1), st.integers(0, 99))
def test_full_rank_and_all_columns_are_the_weight_whatever_gamma_is(
    shape: tuple[int, int], gamma: float, seed: int
) -> None:
    weight, bias = matrix(*shape, seed), matrix(1, shape[0], seed + 1)[0]
    module = replaced(weight, bias, rank=1.0, columns=1.0, gamma=gamma, **IDENTITY)
    assert (module.rank, len(module.columns)) == (min(shape), shape[1])
    x = matrix(5, shape[1], seed + 2)
    torch.testing.assert_close(module(x), F.linear(x, weight, bias))


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(1, 9), st.integers(0, 99))
def test_the_pair_alone_is_the_best_approximation_of_its_rank(shape: tuple[int, int], rank: int, seed: int) -> None:
    weight, rank = matrix(*shape, seed), min(rank, *shape)
    module = replaced(weight, rank=rank, gamma=1.0, **IDENTITY)
    error = (weight - module.B @ module.A).square().sum()
    torch.testing.assert_close(error, torch.linalg.svdvals(weight)[rank:].square().sum(), atol=1e-9, rtol=1e-6)
    # Each factor has the square root of a singular value in it, on its own side.
    torch.testing.assert_close(module.A.square().sum(1), torch.linalg.svdvals(weight)[:rank])
    torch.testing.assert_close(module.B.square().sum(0), torch.linalg.svdvals(weight)[:rank])


def test_gamma_one_does_not_look_at_the_columns_and_gamma_zero_at_nothing_else() -> None:
    x = matrix(4, 7, 1).requires_grad_(True)
    module = replaced(matrix(5, 7), rank=2, columns=3, gamma=1.0)
    module(x).square().sum().backward()
    assert not module.up.weight.grad[:, 2:].any()
    assert module.up.weight.grad[:, :2].any()
    module, x.grad = replaced(matrix(5, 7), rank=2, columns=3, gamma=0.0), None
    module(x).square().sum().backward()
    outside = sorted(set(range(7)) - set(module.columns.tolist()))
    assert not x.grad[:, outside].any()
    assert x.grad[:, module.columns].all()
    assert not module.down.weight.grad.any()


def test_the_worked_example() -> None:
    weight, x = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.ones(1, 3)
    fields: dict[str, Any] = {"rank": 1, "complement_rank": 1, "columns": 1, "gamma": 0.7, **IDENTITY}
    module = replaced(weight, **fields)
    torch.testing.assert_close(module.B @ module.A, torch.diag(torch.tensor([3.0, 0.0, 0.0])))
    complement = Decomposition.from_weight(weight).complement(1, 1)
    torch.testing.assert_close(complement, torch.diag(torch.tensor([0.0, 2.0, 0.0])))
    assert module.columns.tolist() == [1]
    assert module.Ws.tolist() == [[0.0], [2.0], [0.0]]
    torch.testing.assert_close(module(x), torch.tensor([[2.1, 0.6, 0.0]]))
    inverse = replaced(weight, inverse=True, **fields)
    assert inverse.columns.tolist() == [2]
    torch.testing.assert_close(inverse(x), torch.tensor([[2.1, 0.0, 0.3]]))
    # The activation stands between the factors.
    silu = replaced(weight, **{**fields, "activation": "silu"})
    torch.testing.assert_close(silu(x), 0.7 * F.silu(x @ silu.A.T) @ silu.B.T + 0.3 * x[:, [1]] @ silu.Ws.T)


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(1, 8), st.integers(1, 12), st.booleans(), st.integers(0, 99))
def test_the_complement(shape: tuple[int, int], rank: int, triples: int, inverse: bool, seed: int) -> None:
    weight, rank = matrix(*shape, seed), min(rank, *shape)
    found = Decomposition.from_weight(weight)
    complement = found.complement(rank, triples, inverse)
    tail = found.S_n[found.tail(rank, triples, inverse)]
    assert len(tail) == min(triples, min(shape) - rank)
    assert len(tail) == 0 or float(tail[-1]) == float(found.S_n[-1] if inverse else found.S_n[rank + len(tail) - 1])
    l2, l1 = (found.norms(rank, triples, by, inverse) for by in ("l2", "l1"))  # type: ignore[arg-type]
    torch.testing.assert_close(complement.square().sum(), tail.square().sum(), atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(l2.square().sum(), tail.square().sum(), atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(l2, complement.norm(dim=0), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(l1, complement.norm(1, dim=0), atol=1e-7, rtol=1e-6)
    if triples >= min(shape) - rank:
        A, B = found.pair(rank)
        torch.testing.assert_close(complement, weight - B @ A, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("by", ["l2", "l1", "random"])
def test_columns_are_those_of_the_largest_scores_and_their_values_the_weights_own(by: Any) -> None:
    weight = matrix(20, 30)
    fields: dict[str, Any] = {"rank": 5, "columns": 0.2, "complement_rank": 7, "columns_by": by}
    module, again = replaced(weight, **fields), replaced(weight, **fields)
    chosen = module.columns.tolist()
    assert chosen == sorted(set(chosen)) == again.columns.tolist()
    assert len(chosen) == 6
    assert torch.equal(module.Ws, weight[:, chosen])
    other = replaced(weight, seed=1, **fields).columns.tolist()
    if by == "random":
        assert other != chosen
    else:
        assert other == chosen
        score = Decomposition.from_weight(weight).norms(5, 7, by)
        left = [place for place in range(30) if place not in chosen]
        assert score[chosen].min() > score[left].max()
        complement = replaced(weight, column_values="complement", **fields)
        torch.testing.assert_close(complement.Ws, Decomposition.from_weight(weight).complement(5, 7)[:, chosen])


def test_counts_are_exact() -> None:
    found = SizeSpec(32, 0.05).layer_sizes("x", 128, 128, 512)
    assert found == LayerSizes(128, 128, 32, 6)
    assert (found.parameters, found.dense) == (32 * 256 + 6 * 128, 16384) == (8960, 16384)
    module = replaced(torch.randn(10, 20), torch.zeros(10), rank=3, columns=2)
    assert module.trained_parameters == 3 * 30 + 2 * 10
    assert sum(p.numel() for p in module.parameters()) == module.trained_parameters + 10
    elements = replaced(torch.randn(10, 20), rank=3, elements=0.1, **IDENTITY)
    assert elements.trained_parameters == 3 * 30 + 20 == sum(p.numel() for p in elements.parameters())
    assert SizeSpec(3, 0.01).layer_sizes("x", 10, 20, 20).columns == 1  # a share is one column at the least
    assert SizeSpec(3, 0).layer_sizes("x", 10, 20, 20).columns == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(20, 60), st.integers(20, 60), st.integers(8, 20), st.integers(0, 6), st.floats(0.3, 1.0))
def test_columns_paid_for_out_of_the_rank_or_a_budget(
    outputs: int, inputs: int, rank: int, columns: int, budget: float
) -> None:
    within = SizeSpec(rank, columns, within_rank=True).layer_sizes("x", outputs, inputs, 64)
    assert within.parameters <= rank * (inputs + outputs) < within.parameters + inputs + outputs
    spec = SizeSpec(columns=columns, budget=budget)
    if pruned_count(inputs * outputs, budget) - columns * outputs < inputs + outputs:
        with pytest.raises(IntaglioError, match="leaves nothing for the rank of x"):
            spec.layer_sizes("x", outputs, inputs, 64)
        return
    share = spec.layer_sizes("x", outputs, inputs, 64)
    assert share.parameters <= budget * inputs * outputs + 1e-6
    cut = share.rank == min(inputs, outputs)
    assert cut or share.parameters + inputs + outputs > budget * inputs * outputs - 1e-6


def test_the_gradient_of_the_factors_is_gamma_times_that_of_a_plain_pair() -> None:
    module = replaced(matrix(6, 9), rank=3, columns=2, gamma=0.3, **IDENTITY)
    A, B = (factor.detach().clone().requires_grad_(True) for factor in (module.A, module.B))
    x, upstream = matrix(4, 9, 1), matrix(4, 6, 2)
    (x @ A.T @ B.T).backward(upstream)
    module(x).backward(upstream)
    torch.testing.assert_close(module.down.weight.grad, 0.3 * A.grad)
    torch.testing.assert_close(module.up.weight.grad[:, :3], 0.3 * B.grad)


@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_matrix_gives_the_same_and_one_with_an_activation_raises(bias: bool) -> None:
    given_bias = torch.randn(6, dtype=torch.float64) if bias else None
    x = torch.randn(3, 9)
    for fields in (
        {"columns": 2, **IDENTITY},
        {"columns": 0, **IDENTITY},
        {"elements": 0.2, **IDENTITY},
        {"adapter": True, "alpha": 3.0, "columns": 2, **IDENTITY},
    ):
        module = replaced(matrix(6, 9).float(), given_bias, rank=3, **fields)
        box = nn.ModuleDict({"x": module})
        expected = module(x)
        assert merge(box) == ["x"]
        assert type(box["x"]) is nn.Linear
        assert all(p.requires_grad for p in box.parameters())
        torch.testing.assert_close(box["x"](x), expected)
    silu = nn.ModuleDict({"x": replaced(matrix(6, 9).float(), rank=3)})
    with pytest.raises(IntaglioError, match="silu between them is no matrix, so it cannot be merged"):
        merge(silu)
    assert isinstance(silu["x"], LostLinear)
    assert merge(nn.ModuleDict({"x": nn.Linear(2, 2)})) == []


def test_an_adapter_adds_its_parts_to_a_frozen_weight() -> None:
    weight, bias, x = matrix(6, 9), matrix(1, 6, 1)[0], matrix(4, 9, 2)
    module = replaced(weight, bias, rank=4, columns=2, gamma=0.7, adapter=True, alpha=2.0)
    parts = 0.7 * F.silu(x @ module.A.T) @ module.B.T + 0.3 * x[:, module.columns] @ module.Ws.T
    torch.testing.assert_close(module(x), F.linear(x, weight, bias) + 2.0 / 4 * parts)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {"down.weight", "up.weight"}


def test_factors_that_look_at_no_weight() -> None:
    draws = torch.Generator().manual_seed(0)
    A, B = random_pair(300, 500, 16, "cola", draws)
    for factor in (A, B):
        assert float(factor.std()) == pytest.approx(16**-0.25 * 800**-0.25, rel=0.05)
    A, B = random_pair(300, 500, 16, "kaiming", draws)
    assert float(A.abs().max()) == pytest.approx(300**-0.5, rel=0.01)
    assert float(B.abs().max()) == pytest.approx(16**-0.5, rel=0.01)
    A, B = random_pair(300, 500, 16, "zero", draws)
    assert A.any()
    assert not B.any()


def test_single_weights_are_sltrains_layer_and_its_gradient_that_of_the_matrix() -> None:
    method = LOST.sltrain(rank=4)
    module = replaced(matrix(8, 12), **method.model_dump())
    assert isinstance(module, ElementsLinear)
    assert len(module.places) == int(0.03 * 96)
    assert float(module.values.detach().abs().max()) <= 12**-0.5
    module.up.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    S = torch.zeros(96, dtype=torch.float64)
    S[module.places] = module.values.detach()
    x = matrix(5, 12, 1).view(1, 5, 12)
    torch.testing.assert_close(module(x), x @ (0.25 * module.B @ module.A + S.view(8, 12)).T)
    torch.testing.assert_close(
        module.dense().double(), 0.25 * module.B @ module.A + S.view(8, 12), atol=1e-5, rtol=1e-5
    )
    tensors = (x, module.up.weight, module.down.weight, module.values)

    def forward(x: Tensor, up: Tensor, down: Tensor, values: Tensor) -> Tensor:
        named = {"up.weight": up, "down.weight": down, "values": values}
        return torch.func.functional_call(module, named, (x,))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(forward, tuple(t.detach().requires_grad_(True) for t in tensors))


def test_baselines_are_what_they_are_called() -> None:
    weight, x = matrix(8, 12), matrix(5, 12, 1)
    plain = replaced(weight, **LOST.low_rank(rank=3).model_dump())
    torch.testing.assert_close(plain(x), x @ plain.A.T @ plain.B.T)
    svd = replaced(weight, **LOST.low_rank("svd", rank=3).model_dump())
    torch.testing.assert_close(svd(x), x @ (Decomposition.from_weight(weight).pair(3)[1] @ svd.A).T)
    cola = replaced(weight, **LOST.cola(rank=3).model_dump())
    torch.testing.assert_close(cola(x), F.silu(x @ cola.A.T) @ cola.B.T)
    assert plain.columns is svd.columns is cola.columns is None
    assert (LOST.paper().rank, LOST.paper().complement_rank) == (128, 256)
    assert LOST().size_spec.layer_sizes("x", 512, 1376, 512).rank == LOST.paper().rank
    assert LOST().init_config(512, 0).triples == LOST.paper().complement_rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_kept(dtype: torch.dtype) -> None:
    wide = matrix(12, 20)
    module = replaced(wide.to(dtype), rank=5, columns=2)
    assert {p.dtype for p in module.parameters()} == {dtype}
    exact = Decomposition.from_weight(wide.to(dtype)).pair(5)
    torch.testing.assert_close(
        (module.B.double() @ module.A.double()), (exact[1] @ exact[0]).double(), atol=0.05, rtol=0
    )


def test_no_number_is_drawn_from_the_global_generator() -> None:
    ckpt, before = checkpoint(), torch.random.get_rng_state()
    LOST(init="cola", columns_by="random", **IDENTITY).apply(ckpt)
    LOST(merge=True).apply(ckpt)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_fused_projections_have_factors_of_their_own() -> None:
    model = tiny_model("phi3", layers=1)
    alone = {name: linear.read().clone() for name, linear in anatomy(model).all_linears()}
    LOST(rank=5, columns=2).apply(Checkpoint(model, None))
    fused = model.get_submodule("model.layers.0.self_attn.qkv_proj")
    assert isinstance(fused, FusedLinears)
    assert len(fused.parts) == 3
    for part, role in zip(fused.parts, "qkv", strict=True):
        expected = replaced(alone[f"layers.0.self_attn.qkv_proj[{role}]"], rank=5, columns=2, complement_rank=16)
        assert torch.equal(part.A, expected.A)
        assert part.columns.tolist() == expected.columns.tolist()
    with pytest.raises(IntaglioError, match=r"qkv_proj\[k\] and layers.0.self_attn.qkv_proj\[q\] are one module"):
        LOST(targets=["*[[]k]"]).apply(Checkpoint(tiny_model("phi3"), None))


def test_columns_by_the_gradient_of_the_loss() -> None:
    model = tiny_model("llama", layers=1)
    ckpt = Checkpoint(copy.deepcopy(model), None)
    parts = anatomy(model)
    found = column_gradients(model, parts.all_linears(), Segments.of(IDS), batch_size=4)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    model(IDS, labels=IDS).loss.backward()
    for name, linear in parts.all_linears():
        torch.testing.assert_close(found[name], linear.module.weight.grad.norm(dim=0))  # type: ignore[operator,union-attr]
    method = LOST(columns_by="gradient", columns=3)
    assert method.needs_calibration
    assert not LOST().needs_calibration
    method.apply(ckpt, IDS)
    module = ckpt.model.get_submodule("model.layers.0.mlp.down_proj")
    best = found["layers.0.mlp.down_proj"].topk(3).indices.sort().values
    assert torch.equal(module.columns, best)
    assert ckpt.record.steps[-1].calibration is not None
    with pytest.raises(IntaglioError, match="calibration data is missing"):
        method.apply(Checkpoint(tiny_model("llama"), None))
    with pytest.raises(IntaglioError, match="a model that predicts the next token"):
        method.apply(Checkpoint(tiny_model("bert"), None), IDS)


def test_a_checkpoint_shrinks_by_what_its_record_says() -> None:
    ckpt = checkpoint()
    before = sum(p.numel() for p in ckpt.model.parameters())
    LOST(rank=4, columns=2).apply(ckpt)
    chosen = ckpt.record.steps[-1].chosen
    after = sum(p.numel() for p in ckpt.model.parameters())
    assert before - after == chosen["dense_parameters"] - chosen["parameters"] > 0
    assert ckpt.bytes == 4 * after
    assert chosen["rank_and_sparse"]["mlp.down_proj"] == [4, 2]
    assert anatomy(ckpt.model).all_linears() == []


@pytest.mark.parametrize("fields", [{}, {"adapter": True}, LOST.sltrain(rank=4).model_dump()])
def test_training_moves_the_parts_alone_and_resumes_exactly(fields: dict[str, Any], tmp_path: Path) -> None:
    ckpt = checkpoint()
    LOST(**fields).apply(ckpt)
    before, other = weights(ckpt), copy.deepcopy(ckpt)
    run(ckpt, weight_decay=0.1)
    moved = {name for name, value in weights(ckpt).items() if not torch.equal(value, before[name])}
    down_up = {name for name in before if name.endswith((".down.weight", ".up.weight", ".values"))}
    fixed = {name for name in before if name.endswith((".columns", ".places", "_proj.weight"))}
    assert down_up <= moved
    assert not fixed & moved
    if fields.get("adapter"):
        assert moved == down_up
    with pytest.raises(Killed):
        run(other, weight_decay=0.1, directory=tmp_path / "run", save_every=2, progress=killer(5))
    resumed = Checkpoint(copy.deepcopy(other.model), other.tokenizer, "tiny", other.record)
    resumed.model.load_state_dict(before)
    run(resumed, weight_decay=0.1, directory=tmp_path / "run", save_every=2)
    assert same(weights(resumed), weights(ckpt))


def test_a_trained_model_is_saved_read_unmasked_drafted_for_and_merged(tmp_path: Path) -> None:
    ckpt = checkpoint()
    LOST(**IDENTITY).apply(ckpt)
    run(ckpt)
    ckpt.save(tmp_path / "live")
    back = load(tmp_path / "live")
    assert torch.equal(back.model(IDS).logits, ckpt.model(IDS).logits)
    inputs = {"input_ids": prompt(11)}
    expected = back.model.generate(**inputs, do_sample=False, max_new_tokens=20, pad_token_id=0)
    decoder = Speculative(PromptLookup())
    found = back.model.generate(**inputs, custom_generate=decoder, do_sample=False, max_new_tokens=20, pad_token_id=0)
    assert torch.equal(found, expected)
    with pytest.raises(IntaglioError, match="no projection of this model is a plain matrix"):
        LOST().apply(back)
    unmasked = load(tmp_path / "live")
    LayerwiseUnmasking(configuration="01").apply(unmasked)
    unmasked.save(tmp_path / "unmasked")
    both = load(tmp_path / "unmasked")
    assert not torch.equal(both.model(IDS).logits, ckpt.model(IDS).logits)
    assert torch.equal(both.model(IDS).logits, unmasked.model(IDS).logits)
    assert torch.equal(visible(both.model, 16), visible(unmasked.model, 16))
    assert {part["slug"] for part in both.record.live} == {"lost", "visibility"}
    logits = back.model(IDS).logits
    LOST(merge=True).apply(back)
    torch.testing.assert_close(back.model(IDS).logits, logits, atol=1e-4, rtol=1e-4)
    back.save(tmp_path / "standalone")
    assert back.kind == "standalone"
    stock = type(back.model).from_pretrained(tmp_path / "standalone").eval()
    assert torch.equal(stock(IDS).logits, back.model(IDS).logits)
    with pytest.raises(IntaglioError, match="this checkpoint has no projection of lost"):
        LOST(merge=True).apply(back)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_drafts_for_it_are_lossless(family: str) -> None:
    model = target(family)
    ckpt = Checkpoint(model, tiny_tokenizer(family), family)
    LOST(rank=0.5).apply(ckpt)
    inputs = {"input_ids": prompt(11)}
    options: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    expected = model.generate(**inputs, **options)
    for prepack in (False, True):
        decoder = Speculative(PromptLookup(), prepack=prepack)
        assert torch.equal(model.generate(**inputs, custom_generate=decoder, **options), expected)


def test_frozen_stays_frozen_after_a_reload(tmp_path: Path) -> None:
    ckpt = checkpoint()
    LOST(adapter=True, **IDENTITY).apply(ckpt)
    expected = ckpt.model(IDS).logits
    ckpt.save(tmp_path / "out")
    back = load(tmp_path / "out")
    trained = {name for name, p in back.model.named_parameters() if p.requires_grad}
    assert trained == {
        name for name, _ in back.model.named_parameters() if name.endswith((".down.weight", ".up.weight"))
    }
    LOST(merge=True).apply(back)
    assert all(p.requires_grad for p in back.model.parameters())
    torch.testing.assert_close(back.model(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_some_projections_can_stay_and_be_replaced_later(tmp_path: Path) -> None:
    ckpt = checkpoint()
    LOST(targets=["*.mlp.*"], rank={"*.down_proj": 3, "*": 5}).apply(ckpt)
    left = {name for name, _ in anatomy(ckpt.model).all_linears()}
    assert left
    assert all(".self_attn." in name for name in left)
    assert ckpt.model.get_submodule("model.layers.0.mlp.down_proj").rank == 3
    assert ckpt.model.get_submodule("model.layers.0.mlp.up_proj").rank == 5
    LOST(rank=2, **IDENTITY, ignore=["*.k_proj"]).apply(ckpt)
    ckpt.save(tmp_path / "out")
    back = load(tmp_path / "out")
    assert torch.equal(back.model(IDS).logits, ckpt.model(IDS).logits)
    assert len(back.record.live) == 1
    with pytest.raises(IntaglioError, match="silu between them"):
        LOST(merge=True).apply(back)


def test_the_linear_layers_of_any_module_can_be_replaced() -> None:
    net = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 3)))
    sizes = LOST(rank=0.5, columns=2, ignore=["2.1"]).replace(net)
    assert {name: (size.rank, size.columns) for name, size in sizes.items()} == {"0": (4, 2), "2.0": (10, 2)}
    assert isinstance(net[2][1], nn.Linear)
    net(torch.randn(5, 8)).sum().backward()
    with pytest.raises(IntaglioError, match="merge is true, which replaces nothing"):
        LOST(merge=True).replace(net)
    with pytest.raises(IntaglioError, match="columns_by is gradient, which needs a checkpoint"):
        LOST(columns_by="gradient", columns=1).replace(nn.Sequential(nn.Linear(4, 4)))
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    with pytest.raises(IntaglioError, match="0 and 1 share one weight"):
        LOST(rank=2).replace(shared)
    with pytest.raises(IntaglioError, match="no projection of this model is a plain matrix, so lost has nothing"):
        LOST().replace(nn.Sequential(nn.ReLU()))


def test_what_does_not_fit_is_one_sentence() -> None:
    bad: dict[str, dict[str, Any]] = {
        "names no layer of this model; its first is layers.0": {"targets": ["*.nowhere"]},
        r"rank: '\*.nowhere' names no layer": {"rank": {"*.nowhere": 3}},
        "leave no layer of this model to replace": {"ignore": ["*"]},
        "which leaves nothing for the rank of layers.0.self_attn.q_proj beside 320 numbers": {
            "rank": 4, "columns": 10, "within_rank": True,
        },
        "rank is 33, above 32, the most that a projection of this model can have": {"rank": 33},
        "rank is 900, above 32": {"rank": {"*.mlp.*": 900, "*": 4}},
        "budget is 0.01, which leaves nothing": {"budget": 0.01},
        "columns is 500, but layers.0.self_attn.q_proj has only 32 inputs": {"columns": 500},
        "has only 1024 weights": {"elements": 5000, **IDENTITY},
    }  # fmt: skip
    for sentence, fields in bad.items():
        ckpt = checkpoint()
        before = weights(ckpt)
        with pytest.raises(IntaglioError, match=sentence) as caught:
            LOST(**fields).apply(ckpt)
        assert "\n" not in str(caught.value)
        assert same(before, weights(ckpt))
    broken = checkpoint()
    broken.model.get_parameter("model.layers.0.mlp.up_proj.weight").data[0, 0] = float("nan")
    with pytest.raises(IntaglioError, match="a weight holds NaN"):
        LOST().apply(broken)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rank": 3, "budget": 0.5}, "budget and rank are given"),
        ({"columns": 2, "elements": 3}, "columns and elements are given"),
        ({"elements": 3}, "which the activation silu leaves no room for"),
        ({"init": "zero", "columns": 0}, "gives nothing that a gradient could reach"),
        ({"alpha": 2.0}, "alpha belongs to an adapter"),
        ({"merge": True, "gamma": 0.5}, "merge and gamma are given"),
        ({"gamma": 1.5}, "1.5 is no gamma"),
        ({"gamma": [1.0]}, "is no gamma"),
        ({"columns": 1.5}, "1.5 is no amount"),
        ({"rank": True}, "True is no rank"),
        ({"rank": {"*": 0}}, "0 is no rank"),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        LOST(**fields)


def test_what_can_follow_is_known_before_a_model_loads() -> None:
    plain, silu = {"lost": {**IDENTITY}}, {"lost": {}}
    back, prune, train = {"lost": {"merge": True}}, {"wanda": {"sparsity": 0.5}}, {"train": {"steps": 1}}
    Recipe.from_dict({"steps": [plain, train, back, prune]})
    Recipe.from_dict({"steps": [silu, train, {"layerwise_unmasking": {}}]})
    Recipe.from_dict({"steps": [prune, silu, train, {"fit": {"aded": {}}}]})
    for steps, sentence in (
        ([silu, train, back], "lost cannot follow lost: it needs matrix_products"),
        ([plain, train, prune], "wanda cannot follow lost: it needs linear_weights"),
        ([plain, plain], "lost cannot follow lost: it needs linear_weights"),
    ):
        with pytest.raises(IntaglioError, match=sentence):
            Recipe.from_dict({"steps": steps})


def test_adapters_of_peft_find_nothing_to_adapt() -> None:
    ckpt = checkpoint()
    LOST().apply(ckpt)
    with pytest.raises(IntaglioError, match="its projections were replaced"):
        run(ckpt, lora={"r": 2})


def test_a_layer_has_no_bias_unless_one_is_given() -> None:
    layers = [LostLinear(4, 3, 2, 1, LostLinearConfig(0.7, 0.3), **given) for given in ({}, {"bias": True})]
    assert [layer.up.bias is not None for layer in layers] == [False, True]
    assert not layers[0].transposed


def test_the_estimate_counts_decompositions_and_the_gradient() -> None:
    workload = Workload(((64, 64), (128, 64)), 20_000, 30_000, 64, 1000, 100, 4)
    svd = 22.0 * 64**2 * (64 + 128)
    plain = LOST(columns_by="l2").estimate(workload)
    assert (plain.flops, plain.extra_bytes) == (svd, 16 * 128 * 64)
    graded = LOST(columns_by="gradient").estimate(workload)
    assert graded.flops == svd + 6.0 * 30_000 * 1000
    assert graded.extra_bytes == 16 * 128 * 64 + 20_000 * 4 + 64 * 100 * 64
    assert LOST(merge=True).estimate(workload).flops == 0
