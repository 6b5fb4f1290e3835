"""DSnoT: every line of what "faithful" means, and a slow version of the algorithm."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.calibration import InputStatistics
from intaglio.methods.base import Method
from intaglio.methods.weights.dsnot import DSnoT, Refined, refine, scaled_cycles, scaled_threshold
from intaglio.methods.weights.magnitude import Magnitude
from intaglio.methods.weights.sparsegpt import inverse_factor
from intaglio.methods.weights.sparsity_target import prune_mask
from intaglio.methods.weights.wanda import Wanda, wanda_score
from intaglio.modeling.anatomy import anatomy
from tests.alive import alive
from tests.families import tiny_model

EXAMPLES = ({"sparsity": 0.5}, {"pattern": "2:4"})
ALIVE = {
    "sparsity": 0.25,
    "pattern": alive("1:4", sparsity=None, pattern="2:4"),
    "ignore": ["layers.0.*"],
    "base": "magnitude",
    "refine": "mlp",
    "max_cycles": 3,
    "threshold": 5.0,
    "same_sign": False,
    "variance_power": 0.0,
    "dampening": alive(0.1, base="sparsegpt"),
}
IDS = torch.randint(8, 150, (6, 16), generator=torch.Generator().manual_seed(0))
BASES = ("magnitude", "wanda", "sparsegpt")


def layer(seed: int, rows: int = 6, inputs: int = 32, tokens: int = 80) -> tuple[torch.Tensor, InputStatistics]:
    generator = torch.Generator().manual_seed(seed)
    weight_RI = torch.randn(rows, inputs, generator=generator)
    x_NI = torch.randn(tokens, inputs, generator=generator) + torch.randn(inputs, generator=generator)
    statistics = InputStatistics(inputs, torch.device("cpu"), moments=True, hessian=True)
    statistics.update(x_NI, 4)
    return weight_RI, statistics


def refined(method: DSnoT, seed: int) -> tuple[Refined, torch.Tensor]:
    weight_RI, statistics = layer(seed)
    return method.mask(weight_RI, statistics), method.mask(weight_RI, statistics, refined=False).mask_RI


def mates_of(new: int, group: int, kept: list[int], used: set[int]) -> list[int]:
    """The kept entries of a group that can still be pruned."""
    start = new - new % group
    return [i for i in range(start, start + group) if i in kept and i not in used]


def slow(
    weight: torch.Tensor,
    mask: torch.Tensor,
    mu: torch.Tensor,
    var: torch.Tensor,
    key: torch.Tensor,
    group: int | None,
    cycles: int,
    threshold: float,
    same_sign: bool,
) -> torch.Tensor:
    """The algorithm row by row, with plain lists."""
    mask = mask.clone()
    inputs = range(weight.shape[1])
    for r in range(weight.shape[0]):
        c = [float(weight[r, i] * mu[i]) for i in inputs]
        g = [c[i] / float(var[i]) for i in inputs]
        error = first = float(torch.tensor([c[i] for i in inputs if mask[r, i]], dtype=torch.float64).sum())
        # max() and min() take the first of equals, as a stable sort in either direction does.
        grow_up = sorted((i for i in inputs if mask[r, i] and c[i] > 0), key=lambda i: -g[i])
        grow_down = sorted((i for i in inputs if mask[r, i] and c[i] < 0), key=lambda i: g[i])
        kept = sorted((i for i in inputs if not mask[r, i]), key=lambda i: float(key[r, i]))
        give_negative, give_positive = [i for i in kept if c[i] < 0], [i for i in kept if c[i] > 0]
        used: set[int] = set()
        for _ in range(cycles):
            if abs(error) <= threshold:
                break
            up = error > 0
            grow = grow_up if up else grow_down
            while group is not None and grow and not mates_of(grow[0], group, kept, used):
                grow.pop(0)
            if not grow:
                break
            new = grow.pop(0)
            if group is None:
                give = give_negative if up else give_positive
                if not give:
                    break
                old = give.pop(0)
            else:
                old = min(mates_of(new, group, kept, used), key=lambda i: float(key[r, i]))
                used.add(old)
            after = error + c[old] - c[new]
            if same_sign and (after > 0) - (after < 0) != (first > 0) - (first < 0):
                break
            mask[r, new], mask[r, old], error = False, True, after
    return mask


@settings(max_examples=60)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.25, 0.5, 0.75, (2, 4), (1, 4), (1, 8), (4, 8)]),
    st.integers(0, 20),
    st.booleans(),
    st.sampled_from([0.0, 0.5]),
)
def test_equals_the_slow_algorithm(
    seed: int, amount: float | tuple[int, int], cycles: int, same_sign: bool, threshold: float
) -> None:
    weight_RI, statistics = layer(seed, rows=4, inputs=24)
    score = wanda_score(weight_RI, statistics.square_I)
    mask = prune_mask(score, amount)
    group = amount[1] if isinstance(amount, tuple) else None
    found = refine(
        weight_RI,
        mask,
        statistics.sum_I,
        statistics.variance_I,
        prune_key_RI=score,
        group=group,
        cycles=cycles,
        threshold=threshold,
        variance_power=1.0,
        same_sign=same_sign,
    )
    expected = slow(
        weight_RI, mask, statistics.sum_I, statistics.variance_I, score, group, cycles, threshold, same_sign
    )
    assert torch.equal(found.mask_RI, expected)


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_the_variance_divides_by_its_power(power: float) -> None:
    weight_RI, statistics = layer(2, rows=4, inputs=24)
    score, variance_I = wanda_score(weight_RI, statistics.square_I), torch.logspace(-2, 2, 24).flip(0)
    options: dict[str, Any] = {"prune_key_RI": score, "group": None, "cycles": 5, "threshold": 0.0, "same_sign": False}
    masks = [
        refine(
            weight_RI, prune_mask(score, 0.5), statistics.sum_I, values_I, variance_power=exponent, **options
        ).mask_RI
        for values_I, exponent in ((variance_I, power), (variance_I**power, 1.0), (variance_I, 1.0))
    ]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_a_candidate_whose_group_is_used_up_is_skipped() -> None:
    """At 1:4 the best two candidates share a group whose one kept weight the first swap prunes; the third is next."""
    weight_RI = torch.tensor([[0.1, 3.0, 2.0, 4.0, 0.1, 1.0, 0.1, 5.0]])
    mask_RI = torch.tensor([[True, True, True, False, True, True, True, False]])
    key_RI, one_I = weight_RI.abs(), torch.ones(8)
    options: dict[str, Any] = {"threshold": 0.0, "variance_power": 1.0, "same_sign": False}
    sums_I = torch.tensor([1.0, 1, 1, 0.1, 1, 1, 1, 0.1])
    found = refine(weight_RI, mask_RI, sums_I, one_I, prune_key_RI=key_RI, group=4, cycles=2, **options)
    assert found.swaps_R.tolist() == [2]
    assert (~found.mask_RI).nonzero()[:, 1].tolist() == [1, 5]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"pattern": "2:4"}])
@pytest.mark.parametrize("off", [{"max_cycles": 0}, {"threshold": 1e30}])
def test_no_cycles_or_an_endless_threshold_give_the_base_mask(base: Any, amount: Any, off: Any) -> None:
    found, start = refined(DSnoT(base=base, **amount, **off), seed=3)
    assert torch.equal(found.mask_RI, start)
    moved, _ = refined(DSnoT(base=base, **amount, max_cycles=5, threshold=0.0, same_sign=False), seed=3)
    assert not torch.equal(moved.mask_RI, start)


def test_no_cycles_give_wandas_own_model() -> None:
    dense = tiny_model("llama")
    ours = DSnoT(sparsity=0.5, max_cycles=0).apply(Checkpoint(copy.deepcopy(dense)), IDS).model
    theirs = Wanda(sparsity=0.5).apply(Checkpoint(copy.deepcopy(dense)), IDS).model
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_magnitude_base_is_by_row() -> None:
    dense = tiny_model("llama")
    ours = DSnoT(sparsity=0.5, base="magnitude", max_cycles=0).apply(Checkpoint(copy.deepcopy(dense)), IDS).model
    theirs = Magnitude(sparsity=0.5, per="row").apply(Checkpoint(copy.deepcopy(dense))).model
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_ratio_zero_leaves_the_model_bitwise_equal() -> None:
    dense = tiny_model("llama")
    carved = DSnoT(sparsity=0.0).apply(Checkpoint(copy.deepcopy(dense)), IDS).model
    for (name, a), (_, b) in zip(dense.named_parameters(), carved.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from(["2:4", "1:4", "4:8", "0.5", "0.7"]), st.sampled_from(BASES))
def test_counts_and_patterns_hold_after_every_cycle(seed: int, amount: str, base: Any) -> None:
    given_: dict[str, Any] = {"pattern": amount} if ":" in amount else {"sparsity": float(amount)}
    for cycles in range(1, 12, 2):
        method = DSnoT(**given_, base=base, max_cycles=cycles, threshold=0.0, same_sign=False)
        found, start = refined(method, seed)
        assert torch.equal(found.mask_RI.sum(1), start.sum(1))
        # Each accepted cycle moves one entry each way, and no entry twice.
        assert torch.equal((found.mask_RI & ~start).sum(1), found.swaps_R)
        assert torch.equal((~found.mask_RI & start).sum(1), found.swaps_R)
        if ":" in amount:
            keep, of = map(int, amount.split(":"))
            assert ((~found.mask_RI).view(-1, of).sum(1) == keep).all()


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([0.5, 0.7]))
def test_with_the_same_sign_test_the_error_falls_and_never_crosses(seed: int, sparsity: float) -> None:
    last: Refined | None = None
    for cycles in range(8):
        method = DSnoT(sparsity=sparsity, max_cycles=cycles, threshold=0.0, same_sign=True)
        found, _ = refined(method, seed)
        assert torch.equal(found.error_R.sign() * found.error_before_R.sign() >= 0, torch.ones(6, dtype=torch.bool))
        if last is not None:
            moved = found.swaps_R > last.swaps_R
            assert (found.error_R.abs()[moved] < last.error_R.abs()[moved]).all()
            assert torch.equal(found.error_R[~moved], last.error_R[~moved])
        last = found


def test_without_the_test_an_error_may_cross_zero() -> None:
    crossed = False
    for seed in range(10):
        found, _ = refined(DSnoT(sparsity=0.5, max_cycles=3, threshold=0.0, same_sign=False), seed)
        crossed |= bool((found.error_R.sign() != found.error_before_R.sign()).any())
    assert crossed


def test_the_error_is_dense_minus_sparse_expected_output() -> None:
    weight_RI, statistics = layer(5)
    method = DSnoT(sparsity=0.5, max_cycles=4, threshold=0.0)
    found = method.mask(weight_RI, statistics)
    sparse = weight_RI.masked_fill(found.mask_RI, 0)
    expected = weight_RI @ statistics.sum_I - sparse @ statistics.sum_I
    torch.testing.assert_close(found.error_R, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_zero_mean_inputs_change_nothing(amount: dict[str, Any]) -> None:
    weight_RI, _ = layer(0)
    x_NI = torch.randn(40, 32, generator=torch.Generator().manual_seed(1)).double()
    statistics = InputStatistics(32, torch.device("cpu"), moments=True)
    statistics.update(torch.cat([x_NI, -x_NI]), 4)
    statistics._mean.zero_()  # what is left of a mean of opposite numbers is rounding
    method = DSnoT(**amount, threshold=0.0, max_cycles=10)
    assert torch.equal(method.mask(weight_RI, statistics).mask_RI, method.mask(weight_RI, statistics, False).mask_RI)


@pytest.mark.parametrize("same_sign", [True, False])
def test_worked_row(same_sign: bool) -> None:
    weight_RI = torch.tensor([[2.0, -1.0, 0.5, 1.0]])
    score_RI = wanda_score(weight_RI, torch.ones(4))
    mask_RI = prune_mask(score_RI, 0.5)
    assert mask_RI.tolist() == [[False, True, True, False]]
    found = refine(
        weight_RI,
        mask_RI,
        torch.tensor([0.2, 1.0, 1.0, -0.5]),
        torch.ones(4),
        prune_key_RI=score_RI,
        group=None,
        cycles=1,
        threshold=0.1,
        variance_power=1.0,
        same_sign=same_sign,
    )
    assert found.error_before_R.item() == pytest.approx(-0.5)
    if same_sign:
        assert torch.equal(found.mask_RI, mask_RI)
        assert found.swaps_R.item() == 0
    else:
        assert found.mask_RI.tolist() == [[True, False, True, False]]
        assert found.error_R.item() == pytest.approx(0.9)


def test_candidates_that_run_out_stop_a_row() -> None:
    """All pruned contributions are of one sign and few: the row stops there, without using an entry twice."""
    weight_RI = torch.tensor([[0.1, 0.2, 5.0, -4.0, 6.0, 7.0]])
    found = refine(
        weight_RI,
        torch.tensor([[True, True, False, False, False, False]]),
        torch.ones(6),
        torch.ones(6),
        prune_key_RI=weight_RI.abs(),
        group=None,
        cycles=50,
        threshold=0.0,
        variance_power=1.0,
        same_sign=False,
    )
    assert found.swaps_R.item() == 1
    assert found.mask_RI.tolist() == [[True, False, False, True, False, False]]


def test_constant_inputs_do_not_blow_up() -> None:
    weight_RI, statistics = layer(0)
    statistics._m2[:16] = 0.0
    found = DSnoT(sparsity=0.5, max_cycles=5, threshold=0.0).mask(weight_RI, statistics)
    assert torch.isfinite(found.error_R).all()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "bert", "phi3"])
def test_kept_weights_are_bitwise_the_dense_ones(family: str, base: Any) -> None:
    dense = tiny_model(family)
    carved = DSnoT(sparsity=0.5, base=base, max_cycles=3, threshold=0.0).apply(Checkpoint(copy.deepcopy(dense)), IDS)
    pairs = zip(anatomy(dense).all_linears(), anatomy(carved.model).all_linears(), strict=True)
    for (name, before), (_, after) in pairs:
        new = after.read()
        assert torch.equal(new[new != 0], before.read()[new != 0]), name
        assert ((new == 0).sum(1) == new.shape[1] // 2).all(), name


@pytest.mark.parametrize(("which", "other"), [("attention", "mlp"), ("mlp", "attention")])
def test_layers_that_are_not_refined_keep_the_base_mask(which: Any, other: str) -> None:
    dense = tiny_model("llama", layers=1)
    options: dict[str, Any] = {"sparsity": 0.5, "threshold": 0.0}
    base = DSnoT(**options, max_cycles=0).apply(Checkpoint(copy.deepcopy(dense)), IDS)
    some = DSnoT(**options, max_cycles=2, refine=which).apply(Checkpoint(copy.deepcopy(dense)), IDS)
    moved = set()
    for (_, a), (_, b) in zip(anatomy(base.model).all_linears(), anatomy(some.model).all_linears(), strict=True):
        if not torch.equal(a.read(), b.read()):
            moved.add(a.part)
    assert moved == {which}


def test_constants_scale_with_width_and_length() -> None:
    assert scaled_cycles(4096) == 50
    assert [scaled_cycles(i) for i in (32, 576, 1536, 11008)] == [1, 7, 19, 134]
    assert scaled_threshold(2048) == 0.1
    assert scaled_threshold(512) == pytest.approx(0.025)


def test_the_papers_values() -> None:
    plain = DSnoT.paper(sparsity=0.6)
    assert (plain.max_cycles, plain.threshold, plain.refine, plain.same_sign) == (50, 0.1, "attention", False)
    assert DSnoT.paper(pattern="2:4").same_sign is True
    assert DSnoT.paper(sparsity=0.6, max_cycles=5).max_cycles == 5
    assert isinstance(plain, Method)


def test_many_cycles_on_narrow_rows_are_warned_of() -> None:
    model = tiny_model("llama", layers=1)
    with pytest.warns(UserWarning, match="over 5 % of the 32 inputs"):
        DSnoT.paper(sparsity=0.5).apply(Checkpoint(copy.deepcopy(model)), IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DSnoT(sparsity=0.5).apply(Checkpoint(model), IDS)


def test_the_record_tells_what_the_refinement_did() -> None:
    checkpoint = DSnoT(sparsity=0.5, max_cycles=4, threshold=0.0).apply(Checkpoint(tiny_model("llama")), IDS)
    chosen = checkpoint.record.steps[-1].chosen
    assert chosen["swaps"] > 0
    assert chosen["error_after"] < chosen["error_before"]


def test_linears_that_share_an_input_share_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(hessian_II: torch.Tensor, dampening: float) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(hessian_II.shape)
        return inverse_factor(hessian_II, dampening)

    monkeypatch.setattr("intaglio.methods.weights.sparsegpt.inverse_factor", counted)
    DSnoT(sparsity=0.5, base="sparsegpt").apply(Checkpoint(tiny_model("llama", layers=2)), IDS)
    assert len(calls) == 2 * 4  # q, k and v; o; gate and up; down
