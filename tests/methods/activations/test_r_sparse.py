"""The facts of R-Sparse: sizes, thresholds, layers, and which tokens are sparse."""

from __future__ import annotations

import copy
import itertools
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from intaglio.environment import tuning
from intaglio.errors import IntaglioError
from intaglio.kernels import gather
from intaglio.measures.input_sparsity import count_inputs
from intaglio.methods.activations.r_sparse import RSparse, SparseLinear
from intaglio.methods.activations.r_sparse.budget import BudgetSpec
from intaglio.methods.activations.r_sparse.decomposition import low_rank_pair
from intaglio.methods.activations.r_sparse.layers import ALL, NONE, DensePrefill, InputRule, share_inputs
from intaglio.methods.activations.r_sparse.search import Search
from intaglio.methods.activations.r_sparse.thresholds import InputSample, scores, thresholds
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import capture, run_blocks
from intaglio.speculative.drafters.prompt_lookup import PromptLookup
from intaglio.speculative.loop import Speculative
from tests.alive import alive
from tests.methods.activations.helpers import IDS, PROMPT, carved, drawn, layers, masked, tiny
from tests.tuners import GivenTimes

EXAMPLES = (
    {"alpha": 0.9},
    {
        "sparsity": 0.3,
        "alpha": {"layers.0.*": 0.0, "layers.1.*": 0.4},
        "threshold": "topk",
        "strict": True,
        "ignore": ["layers.2.*"],
    },
    {"how": "teal", "tokens": 64},
)
ALIVE = {
    "targets": ["layers.0.*"],
    "ignore": ["layers.0.*"],
    "sparsity": 0.3,
    "alpha": 0.5,
    "search": Search(population=2, generations=1, segments=1),
    "how": alive("teal", alpha=1.0),
    "allocation": alive("greedy", how="teal", alpha=1.0),
    "scale": False,
    "low_rank": alive(False, search=None, rank=None, alpha=0.5),
    "rank": 2,
    "strict": True,
    "threshold": "topk",
    "mode": "decode",
    "fraction": alive(0.5, mode="last_fraction"),
    "tokens": 8,
}


def observe(method: RSparse) -> Any:
    ckpt = method.apply(tiny(), IDS, batch_size=2)
    said = ckpt.model.generate(IDS[:1, :8], max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    return said.logits, ckpt.record.steps[-1].chosen


# sizes


SHAPES = st.tuples(st.integers(1, 300), st.integers(1, 300))


@settings(max_examples=60)
@given(SHAPES, st.floats(0, 0.99), st.floats(0, 1))
def test_what_is_read_stays_in_the_budget_unless_a_layer_is_too_small(
    shape: tuple[int, int], sparsity: float, alpha: float
) -> None:
    outputs, inputs = shape
    strict = BudgetSpec(strict=True).split("x", outputs, inputs, sparsity, alpha)
    assert strict.read == strict.channels * outputs + strict.rank * (inputs + outputs)
    assert not strict.overspent
    found = BudgetSpec().split("x", outputs, inputs, sparsity, alpha)
    assert found.rank <= min(shape)
    assert not found.overspent or found.channels == 1 or found.rank == 1


def test_the_worked_example_overspends_and_says_so() -> None:
    found = BudgetSpec().split("x", 6, 8, 0.5, 0.5)
    assert (found.channels, found.rank, found.read, found.budget, found.overspent) == (2, 1, 26, 24, True)
    strict = BudgetSpec(strict=True).split("x", 6, 8, 0.5, 0.5)
    assert (strict.channels, strict.rank, strict.overspent) == (2, 0, False)


def test_the_ends_of_alpha_and_real_shapes() -> None:
    assert (BudgetSpec().split("x", 100, 200, 0.5, 1.0).channels, BudgetSpec().split("x", 100, 200, 0.5, 1.0).rank) == (
        100,
        0,
    )
    low = BudgetSpec().split("x", 100, 200, 0.5, 0.0)
    assert (low.channels, low.share, low.rank) == (0, 0.0, 33)  # 100 * 200 / 2 / 300
    # Keys of grouped-query attention are narrower than they are deep: not the rank of a square.
    assert BudgetSpec().split("k", 192, 576, 0.5, 0.8).rank == (192 * 576 // 2 - 230 * 192) // (192 + 576)
    alone = BudgetSpec(low_rank=False).split("x", 100, 200, 0.5, 0.9)
    assert (alone.channels, alone.rank) == (90, 0)
    with pytest.raises(IntaglioError, match=r"^rank is 101, above the width of x, 100 x 200: at most 100 is accepted$"):
        BudgetSpec(rank=101).split("x", 100, 200, 0.5, 0.9)


# thresholds


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(1, 9), st.floats(0.001, 1), st.integers(0, 99))
def test_the_share_that_is_kept_is_the_one_asked_for_to_one_score(n: int, width: int, share: float, seed: int) -> None:
    score = scores(drawn(n, width, seed=seed), None)
    (limit,) = thresholds(score, [share])
    kept = int((score > limit).sum())
    assert share * score.numel() <= kept + 1e-6
    assert kept <= share * score.numel() + 1
    assert thresholds(score, [1.0, 0.0]) == [ALL, NONE]


def test_tokens_are_taken_evenly_and_all_of_few() -> None:
    for total, wanted in ((10, 3), (7, 7), (5, 50)):
        sample = InputSample(total, wanted)
        for part in torch.arange(total).view(-1, 1).float().split(2):
            sample.update(part, 1)
        found = sample.inputs("x").flatten().tolist()
        assert len(found) == min(total, wanted)
        assert found == sorted(found)
        assert max(b - a for a, b in itertools.pairwise(found)) <= total / wanted + 1
    broken = InputSample(2, 2)
    broken.update(torch.tensor([[1.0], [float("nan")]]), 1)
    with pytest.raises(IntaglioError, match="an input of q_proj on the calibration text is NaN or infinite") as caught:
        broken.inputs("q_proj")
    assert "\n" not in str(caught.value)


def test_realised_on_calibration_is_what_was_asked_for() -> None:
    checkpoint = tiny()
    plain = {name: m for name, m in checkpoint.model.named_modules() if isinstance(m, nn.Linear)}
    RSparse(alpha=0.8).apply(checkpoint, IDS, batch_size=3)
    assert checkpoint.record.steps[-1].chosen["kept"] == pytest.approx(0.4, abs=1e-3)
    # Thresholds are of the dense model's inputs: those of the first block's are the same in the sparse one.
    with count_inputs(checkpoint.model) as tallies, torch.no_grad():
        checkpoint.model(IDS)
    for name in ("q", "k", "v"):
        one = tallies[f"model.layers.0.self_attn.{name}_proj"]
        assert one.seen == IDS.numel() * 32
        assert abs(one.kept - 0.4 * one.seen) <= 1
    q, k = (layers(checkpoint)[f"model.layers.0.self_attn.{name}_proj"] for name in ("q", "k"))
    assert q.rule.threshold != k.rule.threshold  # one input, another mask each
    assert torch.equal(q.norms(), plain["model.layers.0.self_attn.q_proj"].weight.norm(dim=0))


# the layer


@settings(max_examples=25)
@given(st.integers(0, 999), st.floats(0, 4))
def test_at_full_rank_any_mask_gives_the_dense_output(seed: int, threshold: float) -> None:
    weight, x, bias = drawn(6, 8, seed=seed), drawn(3, 8, seed=seed + 1), drawn(6, seed=seed + 2)
    layer = SparseLinear.from_weight(weight, bias, InputRule(threshold), low_rank_pair(weight, 6))
    torch.testing.assert_close(layer(x), F.linear(x, weight, bias), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked(layer, x), F.linear(x, weight, bias), rtol=1e-4, atol=1e-5)


def test_nothing_left_out_is_dense_and_only_a_low_rank_is_the_truncation() -> None:
    weight, x = drawn(6, 8), drawn(5, 8, seed=1)
    (everything,) = thresholds(scores(x, None), [1.0])
    assert torch.equal(
        SparseLinear.from_weight(weight, None, InputRule(everything, scaled=False))(x), F.linear(x, weight)
    )
    U, S, V = torch.linalg.svd(weight.double(), full_matrices=False)
    for rank in range(1, 6):
        layer = SparseLinear.from_weight(weight, None, InputRule(None), low_rank_pair(weight, rank))
        truncated = (U[:, :rank] * S[:rank]) @ V[:rank]
        torch.testing.assert_close(layer(x).double(), x.double() @ truncated.T, rtol=1e-5, atol=1e-5)
        # For isotropic inputs the mean squared error is the sum of the squared singular values of the tail.
        lost = (F.linear(torch.eye(8), weight) - masked(layer, torch.eye(8))).square().sum()
        torch.testing.assert_close(float(lost), float(S[rank:].square().sum()), rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(st.integers(0, 999), st.integers(1, 7))
def test_the_score_minimises_the_bound_on_the_error(seed: int, count: int) -> None:
    weight, x = drawn(5, 8, seed=seed), drawn(1, 8, seed=seed + 1)
    layer = SparseLinear.from_weight(weight, None, InputRule(None, channels=count))
    keep = layer.kept(x)
    assert int(keep.sum()) == count
    parts = x.abs() * layer.norms()
    bound = float(parts[~keep].sum())
    assert float((masked(layer, x) - F.linear(x, weight)).norm()) <= bound * (1 + 1e-4) + 1e-6
    assert bound == pytest.approx(float(parts.flatten().sort().values[: 8 - count].sum()), rel=1e-5)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rule", [InputRule(1.5), InputRule(0.7, scaled=False), InputRule(None, channels=5), InputRule(None)]
)
@torch.no_grad()
def test_few_tokens_give_what_many_give(rule: InputRule, dtype: torch.dtype, transposed: bool, rank: int) -> None:
    weight, bias = drawn(7, 12).to(dtype), drawn(7, seed=1).to(dtype)
    pair = low_rank_pair(weight, rank) if rank else None
    layer = SparseLinear.from_weight(weight, bias, rule, pair, transposed)
    x = drawn(2, 9, 12, seed=2).to(dtype)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    whole = layer(x)
    for token in range(9):
        torch.testing.assert_close(layer(x[:, token : token + 1]), whole[:, token : token + 1], **close)
    torch.testing.assert_close(layer(x[0, 0]), whole[0, 0], **close)
    assert layer(x[:, :0]).shape == (2, 0, 7)


@torch.no_grad()
def test_columns_follow_the_weight_and_are_not_made_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SparseLinear.from_weight(drawn(4, 6), None, InputRule(0.5))
    x = drawn(1, 6, seed=1)
    before = layer(x)
    layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), masked(layer, x))
    assert not torch.equal(layer(x), before)
    assert layer.double()(x.double()).dtype == torch.float64  # no kernel: zeros are multiplied
    poor = SparseLinear.from_weight(drawn(4, 6), None, InputRule(0.5))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10})())
    assert torch.equal(poor(x), masked(poor, x))
    assert poor._prepare().weight_IO is None


def test_a_gradient_reaches_the_input_and_no_weight() -> None:
    layer, x = SparseLinear.from_weight(drawn(4, 6), None, InputRule(0.5)), drawn(1, 6, seed=1).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, layer.kept(x))
    assert not any(p.requires_grad for p in layer.parameters())


@torch.no_grad()
def test_what_is_no_number_shows() -> None:
    x = torch.tensor([[float("nan"), 1.0, 2.0]])
    for layer in (SparseLinear.from_weight(torch.ones(2, 3), None, InputRule(9.0)),):
        assert bool(layer(x).isnan().all())
        assert bool(masked(layer, x).isnan().all())


# which tokens are sparse


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_of_a_dense_prompt_are_those_of_the_base_model_bit_for_bit(family: str) -> None:
    for fields, dense in (({"mode": "decode"}, 16), ({"mode": "last_fraction", "fraction": 0.25}, 12)):
        base, sparse = tiny(family), carved(family, fields)
        a, b = anatomy(base.model), anatomy(sparse.model)
        inputs, others = capture(a, {"input_ids": IDS}), capture(b, {"input_ids": IDS})
        expected, found = run_blocks(a, 0, 1, inputs), run_blocks(b, 0, 1, others)
        assert torch.equal(found[:, :dense], expected[:, :dense])
        assert dense == 16 or not torch.equal(found[:, dense:], expected[:, dense:])
    assert torch.equal(carved(family, {"mode": "decode"}).model(IDS).logits, tiny(family).model(IDS).logits)


def test_a_phase_counts_the_front_of_what_has_no_cache() -> None:
    phase = DensePrefill("last_fraction", 0.1)
    phase(nn.Identity(), (torch.zeros(2, 20),), {})
    assert phase.dense == 18
    phase(nn.Identity(), (), {"inputs_embeds": torch.zeros(2, 1, 4)})
    assert phase.dense == 0


def test_empty_layers_have_the_precision_of_the_model() -> None:
    (part,) = carved(dtype=torch.bfloat16).record.live
    empty = tiny(dtype=torch.bfloat16)
    RSparse.build_empty(part, empty.model)
    kinds = {tensor.dtype for layer in layers(empty).values() for tensor in layer.parameters()}
    assert kinds == {torch.bfloat16}


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"mode": "decode"}, {"mode": "last_fraction"}, {"threshold": "topk"}])
def test_drafts_are_verified_by_the_model_that_decodes(fields: dict[str, Any]) -> None:
    model = carved(fields=fields, dtype=torch.float64).model
    how = {"do_sample": False, "max_new_tokens": 14}
    alone = model.generate(PROMPT, **how)
    assert torch.equal(model.generate(PROMPT, custom_generate=Speculative(PromptLookup()), **how), alone)
    dense = tiny(dtype=torch.float64).model.generate(PROMPT, **how)
    assert not torch.equal(alone, dense)
    if fields.get("mode") == "decode":
        assert alone[0, len(PROMPT[0])] == dense[0, len(PROMPT[0])]  # the first token is the dense prompt's


@torch.no_grad()
@pytest.mark.parametrize(("alpha", "calls"), [(0.9, [1] * 7), (1.0, [(1, 3), (1, 1), (1, 2), (1, 1)])])
def test_generating_uses_the_kernel_and_not_for_prompts(
    alpha: float, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a low rank, q, k and v share a call, and gate and up."""
    rows: list[Any] = []
    plain, shared = gather.rows, gather.shared_input
    monkeypatch.setattr(gather, "rows", lambda x, *rest: rows.append(len(x)) or plain(x, *rest))

    def noted(parts: Any) -> Any:
        call = shared(parts)

        class Noted:
            worth = staticmethod(call.worth)

            def __call__(self, x: Any, threads: int) -> Any:
                rows.append((x.shape[:-1].numel(), len(parts)))
                return call(x, threads)

        return Noted()

    monkeypatch.setattr(gather, "shared_input", noted)
    model = carved(fields={"alpha": alpha}).model
    model.generate(PROMPT, do_sample=False, max_new_tokens=3)
    if gather.kernel(torch.zeros(1, 2), torch.float32):
        assert rows == calls * 2 * 2


@torch.no_grad()
@pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
@pytest.mark.parametrize("winner", ["dense", "gathered 1", "shared 1", "nothing"])
def test_the_measured_choice_is_used_and_gives_the_same_text(winner: str) -> None:
    how = {"do_sample": False, "max_new_tokens": 6}
    expected = carved(fields={"alpha": 1.0}).model.generate(PROMPT, **how)
    model = carved(fields={"alpha": 1.0}).model
    with tuning.using(given := GivenTimes(winner)):
        assert torch.equal(model.generate(PROMPT, **how), expected)
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear)]
    threads = {layer._prepare().threads[1] for layer in sparse}
    assert threads == {1 if winner == "gathered 1" else 0}
    shared = {layer.shared._threads[1] for layer in sparse if len(layer.shared._layers) > 1}
    assert shared == {1 if winner == "shared 1" else 0}
    assert all(" rows " in key and ("kept" in key or key.startswith("linear ")) for key in given.used)


@torch.no_grad()
@pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
def test_the_dense_head_uses_the_product_measured_to_be_fastest_in_passes_over_few_tokens() -> None:
    how = {"do_sample": False, "max_new_tokens": 6}
    model: Any = carved(fields={"alpha": 1.0}).model
    expected, head, seen = model.generate(PROMPT, **how), model.get_output_embeddings(), []
    head.register_forward_hook(lambda module, args, output: seen.append("forward" in vars(module)))
    with tuning.using(given := GivenTimes("direct 1")):
        assert torch.equal(copy.deepcopy(model).generate(PROMPT, **how), expected)
        assert torch.equal(model.generate(PROMPT, **how), expected)
        assert "linear 32x160 float32 rows 1 threads 1" in given.used
        assert seen[-6:] == [True] * 6
        model(IDS)  # many tokens
        assert seen[-1:] == [False]
    assert torch.equal(model.generate(PROMPT, **how), expected)  # off
    assert seen[-6:] == [False] * 6
    assert "forward" not in vars(head)


@torch.no_grad()
@pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
def test_a_shared_output_is_that_of_the_layer_as_it_is_now() -> None:
    holder = nn.Module()
    layers = [SparseLinear.from_weight(drawn(4, 6, seed=seed), None, InputRule(0.5)) for seed in range(3)]
    for name, layer in zip(("q_proj", "k_proj", "v_proj"), layers, strict=True):
        holder.add_module(name, layer)
    share_inputs(holder)
    q, k, v = layers
    x, other = drawn(1, 6, seed=5), drawn(1, 6, seed=6)
    for change in (lambda: None, lambda: k.weight.mul_(2), lambda: setattr(k, "rule", InputRule(0.1))):
        torch.testing.assert_close(q(x), masked(q, x))
        change()
        torch.testing.assert_close(k(x), masked(k, x))
        torch.testing.assert_close(v(other), masked(v, other))  # not the tensor that q was called with
        torch.testing.assert_close(q(x), masked(q, x))
        torch.testing.assert_close(v(x), masked(v, x))


@torch.no_grad()
def test_a_copy_of_a_model_shares_calls_of_its_own() -> None:
    model = carved(fields={"alpha": 1.0}).model
    expected = model(PROMPT[:, :1]).logits
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    del model
    assert torch.equal(other(PROMPT[:, :1]).logits, expected)
    sparse = [module for module in other.modules() if isinstance(module, SparseLinear)]
    assert len({id(layer.shared) for layer in sparse}) == 8
    assert all(layer in layer.shared._layers for layer in sparse)


def test_mutated_splits_stay_on_the_grid_and_reach_its_ends() -> None:
    search, draws = Search(mutation=1.0, step=0.25), torch.Generator().manual_seed(0)
    genes = search._mutated(tuple(range(5)) * 40, draws)
    assert (min(genes), max(genes)) == (0, 4)
    assert search._mutated((2,) * 40, draws) != (2,) * 40
    assert Search(mutation=0.0)._mutated((2,) * 40, draws) == (2,) * 40
