from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from intaglio.checkpoint import soup
from intaglio.checkpoint.soup import Soup, average, ema_update, greedy, maximum
from intaglio.errors import IntaglioError
from tests.families import tiny_model


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 4, generator=generator).to(dtype),
        "b": torch.randn(5, generator=generator).to(dtype),
        "steps": torch.tensor([1, 2, 3]),
        "mask": torch.tensor([0.0, -torch.inf]).to(dtype),
    }


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


weights = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-6)


@given(weights, st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
@settings(max_examples=60, deadline=None)
def test_the_average_of_identical_states_is_identical(numbers: list[float], seed: int, dtype: torch.dtype) -> None:
    one = state(seed, dtype)
    assert equal(average([state(seed, dtype) for _ in numbers], numbers), one)
    assert equal(average([one] * len(numbers)), one)


@given(weights, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_average_is_the_mean_in_any_order_and_scale(numbers: list[float], random: Any) -> None:
    states = [state(seed) for seed in range(len(numbers))]
    result = average(states, numbers)
    for name in ("a", "b"):
        stacked = torch.stack([s[name].double() for s in states])
        shares = torch.tensor(numbers, dtype=torch.float64) / sum(numbers)
        expected = (stacked * shares.view(-1, *[1] * (stacked.dim() - 1))).sum(0)
        torch.testing.assert_close(result[name].double(), expected, rtol=0, atol=1e-6)
    order = list(range(len(numbers)))
    random.shuffle(order)
    shuffled = average([states[i] for i in order], [numbers[i] * 3 for i in order])
    for name in ("a", "b"):
        torch.testing.assert_close(shuffled[name], result[name], rtol=0, atol=1e-6)
    assert torch.equal(result["mask"], torch.tensor([0.0, -torch.inf]))


def test_worked_example() -> None:
    two = average([{"x": torch.tensor([0.0, 4.0])}, {"x": torch.tensor([4.0, 0.0])}], [3, 1])
    assert two["x"].tolist() == [1.0, 3.0]
    first, second = {"x": torch.tensor([1.0])}, {"x": torch.tensor([9.0])}
    assert average([first, second], [0, 5])["x"].tolist() == [9.0]
    alone = average([first])
    alone["x"].zero_()
    assert first["x"].tolist() == [1.0]  # the result is new memory


def test_bfloat16_is_averaged_in_float32() -> None:
    values = [1.0, 1.0078125, 1.0078125]  # neighbours in bfloat16; their mean rounds to the upper one
    result = average([{"x": torch.tensor([value], dtype=torch.bfloat16)} for value in values])
    assert result["x"].dtype == torch.bfloat16
    assert result["x"].item() == 1.0078125


@pytest.mark.parametrize("shards", [1, 2])
def test_files_shards_and_state_dicts_agree(shards: int, tmp_path: Path) -> None:
    states = [state(seed) for seed in range(3)]
    paths: list[Any] = []
    for index, one in enumerate(states):
        path = tmp_path / str(index)
        path.mkdir()
        names = list(one)
        for shard in range(shards):
            save_file({name: one[name] for name in names[shard::shards]}, path / f"model-{shard}.safetensors")
        paths.append(path)
    expected = average(states, [1, 2, 3])
    for sources in (paths, [str(path) for path in paths], [states[0], *paths[1:]]):
        result = average(sources, [1, 2, 3])
        assert {name: tensor.tolist() for name, tensor in result.items()} == {
            name: tensor.tolist() for name, tensor in expected.items()
        }
    if shards == 1:
        single = average([paths[0] / "model-0.safetensors"])
        assert all(torch.equal(single[name], states[0][name]) for name in states[0])


def test_one_tensor_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = [{f"w{i}": torch.full((8,), float(i + seed)) for i in range(5)} for seed in range(3)]
    for index, one in enumerate(states):
        save_file(one, tmp_path / f"{index}.safetensors")
    order: list[str] = []
    read = soup._OnDisk.read
    monkeypatch.setattr(soup._OnDisk, "read", lambda self, name: order.append(name) or read(self, name))
    average([tmp_path / f"{index}.safetensors" for index in range(3)])
    steps = [name for index, name in enumerate(order) if index == 0 or order[index - 1] != name]
    assert sorted(steps) == [f"w{i}" for i in range(5)]  # all sources of one name before the next name


def test_a_sharded_checkpoint_with_an_index_and_tied_embeddings(tmp_path: Path) -> None:
    models = [tiny_model("llama_tied", seed=seed, layers=1) for seed in range(2)]
    for index, model in enumerate(models):
        model.save_pretrained(tmp_path / str(index), max_shard_size="15KB")
    assert (tmp_path / "0" / "model.safetensors.index.json").is_file()
    states = [model.state_dict() for model in models]
    expected = {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}
    sources: list[list[Any]] = [
        states, [tmp_path / "0", tmp_path / "1"], [states[0], tmp_path / "1"], [tmp_path / "0", states[1]],
    ]  # fmt: skip
    for given_sources in sources:
        result = average(given_sources)
        for name, tensor in result.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
        if "lm_head.weight" in result:
            assert result["lm_head.weight"] is result["model.embed_tokens.weight"]
    assert "lm_head.weight" in average(states)
    assert "lm_head.weight" not in average(sources[1])
    models[0].load_state_dict(average(states))
    assert models[0].lm_head.weight is models[0].model.embed_tokens.weight


def test_a_tie_in_one_source_only_is_none() -> None:
    shared = torch.ones(3)
    result = average([{"x": shared, "y": shared}, {"x": torch.zeros(3), "y": torch.full((3,), 2.0)}])
    assert result["x"].tolist() == [0.5] * 3
    assert result["y"].tolist() == [1.5] * 3
    with pytest.raises(IntaglioError, match="the tensor y of model 2 of 2 is missing in model 1 of 2"):
        average([{"x": shared}, {"x": torch.zeros(3), "y": torch.ones(3)}])


def test_refusals(tmp_path: Path) -> None:
    one = state(0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "model.safetensors.index.json").write_text("[]")
    (tmp_path / "twice").mkdir()
    for name in ("x", "y"):
        save_file({"w": torch.ones(1)}, tmp_path / "twice" / f"{name}.safetensors")
    cases: list[tuple[list[Any], list[float] | None, str]] = [
        ([], None, "nothing to average"),
        ([one, one], [1.0], "weights has 1 numbers for 2 checkpoints"),
        ([one, one], [1.0, -1.0], "weights is .* finite numbers from 0, not all 0"),
        ([one, one], [0.0, 0.0], "finite numbers from 0, not all 0"),
        ([one, one], [math.nan, 1.0], "finite numbers from 0"),
        ([one, {**one, "c": torch.ones(1)}], None, "the tensor c of model 2 of 2 is missing in model 1 of 2"),
        ([one, {"a": one["a"]}], None, "the tensor b of model 1 of 2 is missing in model 2 of 2"),
        ([one, {**one, "a": torch.ones(3, 5)}], None, r"tensor a has the shape \(3, 4\) in model 1 of 2 and \(3, 5\)"),
        ([one, {**one, "steps": torch.tensor([1, 2, 4])}], None, "tensor steps holds int64 values that differ"),
        ([tmp_path / "empty"], None, "a directory with one"),
        ([tmp_path / "absent"], None, "is neither a safetensors file"),
        ([tmp_path / "broken.safetensors"], None, "cannot be read as a safetensors file"),
        ([tmp_path / "index"], None, "is not a valid index"),
        ([tmp_path / "twice"], None, "holds the tensor w in two files"),
    ]
    for sources, numbers, words in cases:
        with pytest.raises(IntaglioError, match=words):
            average(sources, numbers)


def near(target: float) -> Any:
    return lambda parameters: -abs(parameters["x"].item() - target)


def test_greedy_takes_what_helps() -> None:
    # Best alone: 1.5 (1), whose mean with -1.0 (0) is 0.25: better; with 3.0 (2) it would be 7/6: worse.
    candidates = [{"x": torch.tensor(value)} for value in (-2.0, 1.5, 3.0)]
    result = greedy(candidates, near(0.0))
    assert result.chosen == (1, 0)
    assert result.state["x"].item() == -0.25
    assert result.score == -0.25
    assert [(trial.members, trial.kept) for trial in result.log] == [
        ((0,), False), ((1,), True), ((2,), False), ((1, 0), True), ((1, 0, 2), False),
    ]  # fmt: skip
    loss = greedy(candidates, lambda parameters: abs(parameters["x"].item()), higher_is_better=False)
    assert (loss.chosen, loss.score) == ((1, 0), 0.25)
    assert [trial.score for trial in loss.log] == [-trial.score for trial in result.log]
    assert greedy(candidates, lambda parameters: 1.0).chosen == (0, 1, 2)  # an equal score is no fall


values = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=6)


@given(values, st.floats(-100, 100), st.booleans())
@settings(max_examples=80, deadline=None)
def test_greedy_is_never_worse_than_the_best_candidate(numbers: list[float], target: float, higher: bool) -> None:
    candidates = [{"x": torch.tensor(number)} for number in numbers]
    sign = 1.0 if higher else -1.0
    score = near(target)
    result: Soup = greedy(candidates, lambda parameters: sign * score(parameters), higher)
    assert sign * result.score >= max(score(candidate) for candidate in candidates)
    assert result.score == sign * score(result.state)
    assert torch.equal(result.state["x"], average([candidates[i] for i in result.chosen])["x"])
    assert len(result.log) == 2 * len(candidates) - 1
    assert len(set(result.chosen)) == len(result.chosen)


def test_greedy_on_files_and_with_nan(tmp_path: Path) -> None:
    numbers = [math.nan, 2.0, 1.0]
    for index, number in enumerate(numbers):
        save_file({"x": torch.tensor([number])}, tmp_path / f"{index}.safetensors")
    paths = [tmp_path / f"{index}.safetensors" for index in range(3)]
    result = greedy(paths, near(1.4))
    assert result.chosen == (2, 1)
    with pytest.raises(IntaglioError, match="none of the 1 candidates of the soup has a numeric score"):
        greedy(paths[:1], near(0.0))
    with pytest.raises(IntaglioError, match="none of the 0 candidates"):
        greedy([], near(0.0))


def test_refusals_name_a_candidate_by_its_own_position() -> None:
    """The ranking and the choice leave candidates out, and the position of the others stays."""
    candidates: list[Any] = [{"x": torch.ones(1)}, {"x": torch.ones(2)}, {"x": torch.zeros(3)}]
    sizes = {1: 0.0, 2: 1.0, 3: 2.0}
    words = r"has the shape \(3,\) in model 3 of 3 and \(2,\) in model 2 of 3"
    for make in (partial(maximum, top=2), greedy):
        with pytest.raises(IntaglioError, match=words):
            make(candidates, lambda parameters: sizes[len(parameters["x"])])


def test_ema_on_modules_with_ties() -> None:
    mean, model = tiny_model("llama_tied", seed=0, layers=1), tiny_model("llama_tied", seed=1, layers=1)
    before = {name: tensor.clone() for name, tensor in mean.state_dict().items()}
    ema_update(mean, model, 0.75)
    for name, tensor in mean.state_dict().items():
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * model.state_dict()[name], rtol=0, atol=1e-6)
    assert mean.lm_head.weight is mean.model.embed_tokens.weight
    assert mean.lm_head.weight.requires_grad
    assert mean.lm_head.weight.grad is None


@given(st.floats(0, 1), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_ema_follows_the_geometric_sum(decay: float, steps: int) -> None:
    mean, target = {"x": torch.zeros(1, dtype=torch.float64)}, {"x": torch.ones(1, dtype=torch.float64)}
    for _ in range(steps):
        ema_update(mean, target, decay)
    assert mean["x"].item() == pytest.approx(1 - decay**steps, abs=1e-12)


def test_ema_edges_and_refusals() -> None:
    mean, target = state(0), {**state(1, torch.bfloat16), "steps": torch.tensor([7, 8, 9])}
    ema_update(mean, target, 1.0)
    assert torch.equal(mean["a"], state(0)["a"])
    assert mean["steps"].tolist() == [7, 8, 9]
    ema_update({name: mean[name] for name in ("a", "b")}, {name: target[name] for name in ("a", "b")}, 0.0)
    assert torch.equal(mean["a"], target["a"].float())
    for decay in (-0.1, 1.1, math.nan):
        with pytest.raises(IntaglioError, match=r"decay is .*; a number from 0 to 1"):
            ema_update(mean, target, decay)
    with pytest.raises(IntaglioError, match="the tensor b of the average is missing in the model"):
        ema_update(mean, {"a": target["a"]}, 0.5)
    with pytest.raises(IntaglioError, match=r"the shape \(3, 4\) in the average and \(2,\) in the model"):
        ema_update(mean, {**target, "a": torch.ones(2)}, 0.5)
