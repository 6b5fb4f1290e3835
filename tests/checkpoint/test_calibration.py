"""The walk: what statistics see, and that sums do not depend on how the data are cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.calibration import InputStatistics, SharedInputGroup, as_segments, calibrate_blocks
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from tests.families import FAMILIES, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
IDS = torch.randint(8, 150, (5, 12), generator=torch.Generator().manual_seed(0))


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 7), min_size=1, max_size=5), st.floats(-50, 50))
def test_moments_are_those_of_all_tokens_however_they_come(seed: int, sizes: list[int], shift: float) -> None:
    x_NI = torch.randn(sum(sizes), 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    statistics = InputStatistics(6, CPU, moments=True, hessian=True)
    for part in x_NI.split(sizes):
        statistics.update(part, 2)
    sequences = 2 * len(sizes)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(statistics.square_I.double(), x_NI.square().sum(0) / sequences, **close)
    torch.testing.assert_close(statistics.sum_I.double(), x_NI.sum(0) / sequences, **close)
    # Float32 inputs around 50 carry errors of 3e-6 each; the variance must not suffer from cancellation beyond that.
    torch.testing.assert_close(statistics.variance_I.double(), x_NI.var(0, unbiased=False), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(statistics.hessian_II.double(), 2 / sequences * x_NI.T @ x_NI, rtol=1e-4, atol=1e-2)
    assert statistics.mean_length == pytest.approx(sum(sizes) / sequences)


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_that_read_one_input_share_a_statistic_and_see_every_token(family: str) -> None:
    groups: list[SharedInputGroup] = []
    calibrate_blocks(
        Checkpoint(tiny_model(family)),
        Segments.of(IDS),
        statistic=lambda features, device: InputStatistics(features, device),
        carve=lambda index, group: groups.append(group) if index == 0 else None,
        batch_size=2,
    )
    shared = {linear.role: position for position, group in enumerate(groups) for linear in group.linears}
    assert shared["q"] == shared["k"] == shared["v"]
    if "gate" in shared:
        assert shared["gate"] == shared["up"]
    assert all(group.statistic.tokens == IDS.numel() for group in groups)
    assert all(group.statistic.sequences == len(IDS) for group in groups)


@pytest.mark.parametrize("family", ["llama", "gemma3", "bert", "modernbert"])
def test_padding_is_left_out(family: str) -> None:
    """Right-padded rows give the statistics of the unpadded ones."""
    padded, mask = IDS.clone(), torch.ones_like(IDS, dtype=torch.bool)
    padded[:, 9:], mask[:, 9:] = 0, False
    found = []
    for data in (Segments(padded, mask), Segments.of(IDS[:, :9])):
        seen: list[torch.Tensor] = []
        calibrate_blocks(
            Checkpoint(tiny_model(family)),
            data,
            statistic=lambda features, device: InputStatistics(features, device),
            carve=lambda index, group, seen=seen: seen.append(group.statistic.square_I),
        )
        found.append(seen)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "bert", "modernbert"])
def test_a_walk_that_only_looks_sees_the_same_in_one_pass(family: str) -> None:
    found, passes = [], []
    for edits in (True, False):
        seen: list[torch.Tensor] = []
        calls: list[tuple[int, int]] = []
        calibrate_blocks(
            Checkpoint(tiny_model(family, layers=3)),
            Segments.of(IDS),
            statistic=lambda features, device: InputStatistics(features, device),
            carve=lambda index, group, seen=seen: seen.append(group.statistic.square_I),
            progress=lambda done, total, what, calls=calls: calls.append((done, total)),
            edits=edits,
        )
        found.append(seen)
        assert calls[-1][0] == calls[-1][1] == len(calls)
        passes.append(len(calls))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert passes == [2 * 5, 2 * 3]  # two batches; the last block's output is needed by nobody


def test_progress_runs_to_its_end() -> None:
    calls: list[tuple[int, int]] = []
    calibrate_blocks(
        Checkpoint(tiny_model("llama")),
        Segments.of(IDS),
        statistic=lambda features, device: InputStatistics(features, device),
        carve=lambda index, group: None,
        batch_size=2,
        progress=lambda done, total, what: calls.append((done, total)),
    )
    assert [done for done, _ in calls] == list(range(1, 22))
    assert {total for _, total in calls} == {21}


def test_the_mode_of_the_model_is_put_back() -> None:
    model = tiny_model("llama").train()
    calibrate_blocks(
        Checkpoint(model),
        Segments.of(IDS),
        statistic=lambda features, device: InputStatistics(features, device),
        carve=lambda index, group: None,
    )
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_overflowing_activations_are_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(IntaglioError, match="after block 1 are not finite"):
        calibrate_blocks(
            Checkpoint(model),
            Segments.of(IDS),
            statistic=lambda features, device: InputStatistics(features, device),
            carve=lambda index, group: None,
        )


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (torch.tensor([[1, 2, 999]]), "token id 999 is outside the model's vocabulary of 160"),
        (torch.tensor([[-1, 2, 3]]), "token id -1 is outside"),
        (torch.zeros(1, 200, dtype=torch.long), "200 tokens are more than the model's context of 128"),
    ],
)
def test_ids_that_do_not_fit_are_refused(ids: torch.Tensor, sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence):
        as_segments(Checkpoint(tiny_model("llama")), ids, 1, 8, 0)


def test_texts_need_a_tokenizer_and_are_cut_to_the_context() -> None:
    texts = ["the quick brown fox jumps over the lazy dog " * 40]
    with pytest.raises(IntaglioError, match="no tokenizer"):
        as_segments(Checkpoint(tiny_model("llama")), texts, 2, 16, 0)
    data = as_segments(Checkpoint(tiny_model("llama"), tiny_tokenizer("llama")), texts, 2, 512, 0)
    assert data.ids_NT.shape == (2, 128)
