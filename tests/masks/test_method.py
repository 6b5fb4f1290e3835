"""Named rules, the step that sets them, what windows do to them, and checkpoints that keep them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intaglio.checkpoint import LIVE_WEIGHTS, Checkpoint, load, weights_digest
from intaglio.errors import IntaglioError
from intaglio.masks import (
    AttentionSinks,
    Bidirectional,
    BlockDiagonal,
    BlockLocal,
    Causal,
    Dilated,
    ExplicitMask,
    IgnoreSlidingWindow,
    PrefixLM,
    Rule,
    Window,
    get_visibility,
    is_noncausal,
    visible,
)
from intaglio.masks.method import Visibility, as_data, from_data, layer_numbers
from intaglio.masks.registry import describe, read_rule
from tests.families import FAMILIES, tiny_model, tiny_tokenizer

L = 12
IDS = torch.arange(8, 8 + L)[None]
NAMED: list[tuple[Any, Rule, str, bool]] = [
    ("causal", Causal(), "causal", False),
    ("bidirectional", Bidirectional(), "bidirectional", True),
    ({"prefix_lm": {"prefix": 3}}, PrefixLM(3), "prefix lm (prefix 3)", True),
    ({"sliding": {"window": 4}}, Causal() & Window(4), "sliding (window 4)", False),
    (
        {"sliding": {"window": 4, "sinks": 2}},
        Causal() & (Window(4) | AttentionSinks(2)),
        "sliding (window 4, sinks 2)",
        False,
    ),
    ({"sliding": {"window": 4, "causal": False}}, Window(4), "window (size 4)", True),
    ({"dilated": {"size": 3, "step": 2}}, Causal() & Dilated(3, 2), "dilated (size 3, step 2)", False),
    ({"blocks": {"size": 4}}, Causal() & BlockLocal(4), "blocks (size 4)", False),
    ({"blocks": {"size": 4, "causal": False}}, BlockLocal(4), "blocks (size 4)", True),
    (
        {"packed": {"lengths": [5, 7]}},
        Causal() & BlockDiagonal(torch.tensor([0] * 5 + [1] * 7)),
        "packed (lengths 5, 7)",
        False,
    ),
    ({"arbitrary": {"visible": np.eye(12).tolist()}}, ExplicitMask(torch.eye(12)), "arbitrary (12 positions)", False),
    ({"and": ["bidirectional", {"not": "causal"}]}, Bidirectional() & ~Causal(), "bidirectional & not causal", True),
    (
        {"or": ["causal", {"and": [{"blocks": {"size": 2, "causal": False}}, "bidirectional"]}]},
        Causal() | (BlockLocal(2) & Bidirectional()),
        "causal | (blocks (size 2) & bidirectional)",
        True,
    ),
    ({"kind": "sinks", "count": 2}, AttentionSinks(2), "sinks (count 2)", True),
    (
        IgnoreSlidingWindow(Bidirectional()),
        IgnoreSlidingWindow(Bidirectional()),
        "bidirectional, beyond the window",
        True,
    ),
]


@pytest.mark.parametrize(("value", "rule", "name", "right"), NAMED, ids=[case[2] for case in NAMED])
def test_rules_by_name(value: Any, rule: Rule, name: str, right: bool) -> None:
    found = read_rule(value)
    assert found == rule
    assert describe(found) == name
    assert found.is_noncausal == right
    assert read_rule(json.loads(json.dumps(found.to_dict()))) == found
    step = Visibility(rule=value)
    assert step.made == rule
    assert Visibility.model_validate(step.model_dump()) == step
    assert ("causal" in step.invalidates) == right


def test_every_rule_of_a_recipe_sees_what_it_says() -> None:
    for value, rule, *_ in NAMED:
        checkpoint = Visibility(layers=[1], rule=value).apply(Checkpoint(tiny_model("llama"), None, "tiny"))
        zero, n = torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.arange(L)
        expected = rule(zero, zero, n[None, None, :, None], n[None, None, None, :])[0, 0].expand(L, L)
        assert torch.equal(visible(checkpoint.model, L)[1, 0], expected)
        assert visible(checkpoint.model, L)[0, 0].sum(-1).tolist() == list(range(1, L + 1))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("casual", "there is no visibility rule 'casual'; did you mean causal?"),
        (3, "a visibility rule is a name with its fields, such as sliding"),
        ({}, "is a name with its fields"),
        ({"causal": {}, "blocks": {}}, "one name is needed"),
        ({"sliding": {}}, "the rule 'sliding' cannot be made of nothing; it takes window"),
        ({"sliding": [4]}, "the fields of the rule 'sliding' must be a mapping"),
        ({"sliding": {"window": 4, "causal": "no"}}, "causal of the rule 'sliding' is 'no'"),
        ({"sliding": {"window": 0}}, "size of the rule 'window' is 0"),
        ({"blocks": {"size": True}}, "size of the rule 'blocks' is True"),
        ({"packed": {"lengths": []}}, "a list of lengths from 1"),
        ({"packed": {"lengths": [2, 0]}}, "a list of lengths from 1"),
        ({"and": ["causal"]}, "joins a list of two or more rules"),
        ({"or": "causal"}, "joins a list of two or more rules"),
        ({"arbitrary": {}}, "takes visible, a table, or file"),
        ({"arbitrary": {"visible": [[1], [1]]}}, r"has the shape \(2, 1\)"),
        ({"arbitrary": {"visible": [[1, 0], [1]]}}, "is no table of numbers"),
        ({"arbitrary": {"file": "/nowhere.npy"}}, "cannot be read from /nowhere.npy: No such file"),
        ({"kind": "window"}, "takes size, not nothing"),
    ],
)
def test_what_is_no_rule_is_refused(value: Any, words: str) -> None:
    with pytest.raises(IntaglioError, match=words) as caught:
        read_rule(value)
    assert "\n" not in str(caught.value)


def test_tables_from_files(tmp_path: Path) -> None:
    table = np.tril(np.ones((4, 4), dtype=bool))
    np.save(tmp_path / "t.npy", table)
    (tmp_path / "t.json").write_text(json.dumps(table.astype(int).tolist()))
    for name in ("t.npy", "t.json"):
        assert read_rule({"arbitrary": {"file": str(tmp_path / name)}}) == ExplicitMask(torch.from_numpy(table))
    np.save(tmp_path / "p.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(IntaglioError, match=r"cannot be read from .*p\.npy"):  # never a pickle
        read_rule({"arbitrary": {"file": str(tmp_path / "p.npy")}})


@given(st.integers(1, 9), st.integers(1, 20))
def test_blocks(size: int, length: int) -> None:
    zero, n = torch.zeros((), dtype=torch.int64), torch.arange(length)
    seen = BlockLocal(size)(zero, zero, n[:, None], n[None, :])
    assert seen.tolist() == [[q // size == k // size for k in range(length)] for q in range(length)]


def test_when_rules_settle_and_how_far_they_reach() -> None:
    for rule, settled, reach in (
        (Causal(), 0, None),
        (Bidirectional(), None, None),
        (Window(4), None, 4),
        (Window(1), 0, 1),
        (PrefixLM(3), 3, 3),
        (PrefixLM((1, 5)), 5, 5),
        (PrefixLM(1), 0, None),
        (AttentionSinks(2), 2, math.inf),
        (Dilated(3, 4), None, 9),
        (BlockLocal(4), None, 4),
        (Causal() & Window(4), 0, 4),
        (Causal() & (Window(4) | AttentionSinks(2)), 0, math.inf),
        (PrefixLM(3) | AttentionSinks(5), 5, math.inf),
        (PrefixLM(3) | Bidirectional(), None, 3),
        (PrefixLM(3) & Bidirectional(), 3, 3),
        (ExplicitMask(torch.eye(4)), 0, 1),
        (ExplicitMask(torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1]])), 0, 3),
        (ExplicitMask(torch.zeros(2, 2)), 0, None),
        (~Causal(), None, None),
        (IgnoreSlidingWindow(Causal()), None, None),
    ):
        assert (rule.prefix_stable_after, rule.extent) == (settled, reach), rule


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ("all", [0, 1, 2, 3]),
        (2, [2]),
        (-1, [3]),
        ([0, -1, 3], [0, 3]),
        ("2:", [2, 3]),
        (":-3", [0]),
        ("::2", [0, 2]),
        ("1:3", [1, 2]),
    ],
)
def test_layers(layers: Any, found: list[int]) -> None:
    assert layer_numbers(layers, 4) == found
    checkpoint = Visibility(layers=layers, rule="bidirectional").apply(Checkpoint(tiny_model("llama"), None, "tiny"))
    assert sorted(get_visibility(checkpoint.model)) == found


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (4, "names the layer 4; the model has the layers 0 to 3"),
        ([-5], "names the layer -5"),
        ("4:", "which names no layer of the model"),
        ([], "which names no layer of the model"),
        ("::0", "accepted: all, numbers, or a slice"),
        ("two", "accepted: all, numbers, or a slice"),
        ([True], "names the layer True"),
    ],
)
def test_layers_that_are_not_there(layers: Any, words: str) -> None:
    with pytest.raises(IntaglioError, match=words):
        layer_numbers(layers, 4)


def test_steps_add_up_and_stock_takes_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_model("llama"), tiny_tokenizer("llama"), "tiny")
    stock = checkpoint.model(IDS).logits
    Visibility(layers="2:", rule="bidirectional").apply(checkpoint)
    Visibility(layers=[0, 3], rule={"sliding": {"window": 3}}).apply(checkpoint)
    rules = {0: Causal() & Window(3), 2: Bidirectional(), 3: Causal() & Window(3)}
    assert get_visibility(checkpoint.model) == rules == from_data(as_data(rules))
    assert [len(group["layers"]) for group in as_data(rules)] == [2, 1]
    assert len(checkpoint.record.live) == 1
    checkpoint.save(tmp_path / "live")
    back = load(tmp_path / "live")
    assert get_visibility(back.model) == rules
    assert torch.equal(back.model(IDS).logits, checkpoint.model(IDS).logits)
    assert is_noncausal(back.model)
    Visibility(rule="stock").apply(back)
    assert back.kind == "standalone"
    assert torch.equal(back.model(IDS).logits, stock)
    back.save(tmp_path / "standalone")
    assert (tmp_path / "standalone" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "standalone" / "config.json").read_text())["model_type"] == "llama"


def test_a_live_directory(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_model("llama"), tiny_tokenizer("llama"), "tiny")
    checkpoint.save(tmp_path / "stock")
    Visibility(rule="bidirectional").apply(checkpoint)
    checkpoint.save(tmp_path / "live")
    names = {path.name for path in (tmp_path / "live").iterdir()}
    assert LIVE_WEIGHTS in names
    assert "model.safetensors" not in names
    assert json.loads((tmp_path / "live" / "config.json").read_text())["model_type"] == "intaglio_llama"
    assert weights_digest(tmp_path / "live") == weights_digest(tmp_path / "stock")
    twice = load(tmp_path / "live")
    twice.save(tmp_path / "twice")
    for path in (tmp_path / "live").iterdir():
        if path.name == "tokenizer_config.json":  # transformers notes in it where it was read from
            continue
        assert (tmp_path / "twice" / path.name).read_bytes() == path.read_bytes(), path.name
    sharded = tmp_path / "sharded"
    checkpoint.save(sharded)
    (sharded / LIVE_WEIGHTS).unlink()
    checkpoint.model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")  # type: ignore[operator]
    for part in (tmp_path / "parts").glob("model*"):
        part.rename(sharded / part.name.replace("model.safetensors.index", f"{LIVE_WEIGHTS}.index"))
    assert torch.equal(load(sharded).model(IDS).logits, checkpoint.model(IDS).logits)
    (sharded / "model-00001-of-00004.safetensors").unlink(missing_ok=True)
    next(iter(sharded.glob("model-*"))).unlink()
    with pytest.raises(IntaglioError, match=r"is incomplete: model-.* is missing"):
        load(sharded)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"sliding": {"window": 9}}, "reaches over 9 positions, and layer 0 has a sliding window of 8"),
        ({"sliding": {"window": 4, "sinks": 1}}, "reaches over any distance"),
        ({"dilated": {"size": 3, "step": 4}}, "reaches over 9 positions"),
        ({"prefix_lm": {"prefix": 9}}, "reaches over 9 positions"),
        ({"blocks": {"size": 9}}, "reaches over 9 positions"),
        ({"arbitrary": {"visible": torch.ones(9, 9).tolist()}}, "reaches over 9 positions"),
    ],
)
@pytest.mark.parametrize("family", ["mistral_window", "gemma3"])
def test_a_rule_wider_than_the_window_is_refused(family: str, rule: Any, words: str) -> None:
    checkpoint = Checkpoint(tiny_model(family), None, "tiny")
    with pytest.raises(IntaglioError, match=words) as caught:
        Visibility(rule=rule).apply(checkpoint)
    assert "\n" not in str(caught.value)
    assert get_visibility(checkpoint.model) == {}
    if family == "gemma3":  # its last layer sees everything
        Visibility(layers=[3], rule=rule).apply(checkpoint)
        assert sorted(get_visibility(checkpoint.model)) == [3]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_keeps_its_rules(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_model(family), tiny_tokenizer(family), "tiny")
    rule = "causal" if FAMILIES[family].encoder else "bidirectional"
    Visibility(layers="1:", rule=rule).apply(checkpoint)
    checkpoint.save(tmp_path / "out")
    back = load(tmp_path / "out")
    assert torch.equal(back.model(IDS).logits, checkpoint.model(IDS).logits)
    assert back.record == checkpoint.record
