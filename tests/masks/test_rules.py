from __future__ import annotations

import itertools
import json
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.masks import (
    And,
    AttentionSinks,
    Bidirectional,
    BlockDiagonal,
    Causal,
    Dilated,
    ExplicitMask,
    Not,
    Or,
    PrefixLM,
    Rule,
    Window,
    rule_from_dict,
)

B, H, L = 2, 3, 7


def table(rule: Rule) -> Tensor:
    """The whole rule by broadcasting, bool [B, H, L, L]."""
    b, h, position = torch.arange(B), torch.arange(H), torch.arange(L)
    seen = rule(b[:, None, None, None], h[None, :, None, None], position[:, None], position)
    assert seen.dtype == torch.bool
    return seen.expand(B, H, L, L)


def scalar(rule: Rule, b: int, h: int, q: int, kv: int) -> bool:
    return bool(rule(*(torch.tensor(index) for index in (b, h, q, kv))))


def expected(rule: Rule, b: int, h: int, q: int, kv: int) -> bool:
    """The definition of each rule in plain Python, one element at a time."""
    match rule:
        case And():
            return all(expected(part, b, h, q, kv) for part in rule.rules)
        case Or():
            return any(expected(part, b, h, q, kv) for part in rule.rules)
        case Not():
            return not expected(rule.rule, b, h, q, kv)
        case Causal():
            return kv in range(q + 1)
        case Bidirectional():
            return True
        case Window():
            return kv in range(q - rule.size + 1, q + rule.size)
        case Dilated():
            return any(kv in (q - i * rule.step, q + i * rule.step) for i in range(rule.size))
        case PrefixLM():
            prefix = rule.prefix[b] if isinstance(rule.prefix, tuple) else rule.prefix
            return kv in range(max(q + 1, prefix))
        case AttentionSinks():
            return kv in range(rule.count)
        case BlockDiagonal():
            ids: Any = rule.document_ids.tolist()
            row = ids[b] if isinstance(ids[0], list) else ids
            return row[q] == row[kv]
        case ExplicitMask():
            return rule.visible.expand(B, H, L, L)[b, h, q, kv].item() is True
    raise AssertionError(rule)


def bools(*shape: int) -> st.SearchStrategy[Tensor]:
    size = torch.Size(shape).numel()
    return st.lists(st.booleans(), min_size=size, max_size=size).map(lambda values: torch.tensor(values).view(shape))


counts = st.integers(1, L)
simple = st.one_of(
    st.just(Causal()),
    st.just(Bidirectional()),
    counts.map(Window),
    st.builds(Dilated, counts, st.integers(1, 4)),
    st.one_of(st.integers(0, L), st.tuples(*[st.integers(0, L)] * B)).map(PrefixLM),
    counts.map(AttentionSinks),
    st.lists(st.integers(0, 3), min_size=L, max_size=L).map(lambda ids: BlockDiagonal(torch.tensor(ids))),
    st.lists(st.lists(st.integers(0, 3), min_size=L, max_size=L), min_size=B, max_size=B).map(
        lambda ids: BlockDiagonal(torch.tensor(ids))
    ),
    st.one_of(bools(L, L), bools(H, L, L), bools(1, L, L), bools(B, 1, L, L)).map(ExplicitMask),
)
rules = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
        inner.map(lambda rule: ~rule),
    ),
    max_leaves=4,
)


@given(rules)
@settings(max_examples=60, deadline=None)
def test_broadcasting_is_the_definition_element_by_element(rule: Rule) -> None:
    seen = table(rule)
    for index in itertools.product(range(B), range(H), range(L), range(L)):
        assert seen[index].item() is expected(rule, *index), index
    spots = [(0, 0, 0, 0), (1, 2, 6, 0), (1, 0, 0, 6), (0, 1, 3, 4)]
    assert all(scalar(rule, *index) is expected(rule, *index) for index in spots)  # as a kernel's tracing calls it


@given(rules, rules)
@settings(max_examples=60, deadline=None)
def test_algebra(first: Rule, second: Rule) -> None:
    assert torch.equal(table(first & second), table(first) & table(second))
    assert torch.equal(table(first | second), table(first) | table(second))
    assert torch.equal(table(~first), ~table(first))
    assert torch.equal(table(~(first & second)), table(~first | ~second))
    assert torch.equal(table(~(first | second)), table(~first & ~second))
    assert ~~first == first


@given(rules)
@settings(max_examples=80, deadline=None)
def test_plain_data_and_pickle_give_the_rule_back(rule: Rule) -> None:
    data = json.loads(json.dumps(rule.to_dict()))
    for copy in (rule_from_dict(data), pickle.loads(pickle.dumps(rule))):
        assert copy == rule
        assert hash(copy) == hash(rule)
        assert torch.equal(table(copy), table(rule))
    assert rule.to("cpu") is rule


@given(rules)
@settings(max_examples=100, deadline=None)
def test_what_a_rule_says_of_itself_is_true(rule: Rule) -> None:
    seen = table(rule)
    if not rule.is_noncausal:
        assert not seen.triu(1).any()
    if not rule.per_head:
        assert torch.equal(seen, seen[:, :1].expand_as(seen))
    if rule.shift_invariant:
        assert torch.equal(seen[..., 1:, 1:], seen[..., :-1, :-1])


@pytest.mark.parametrize(
    ("rule", "right", "invariant"),
    [
        (Causal(), False, True),
        (Bidirectional(), True, True),
        (Window(1), False, True),
        (Window(2), True, True),
        (Causal() & Window(5), False, True),
        (Causal() & (Window(5) | AttentionSinks(2)), False, False),
        (Causal() | AttentionSinks(1), False, False),
        (AttentionSinks(2), True, False),
        (PrefixLM(1), False, False),
        (PrefixLM((1, 2)), True, False),
        (BlockDiagonal(torch.arange(4)), False, False),
        (BlockDiagonal(torch.tensor([0, 1, 0])), True, False),
        (ExplicitMask(torch.ones(3, 3).tril()), False, False),
        (ExplicitMask(torch.eye(3).flip(0)), True, False),
    ],
)
def test_direction_and_shift(rule: Rule, right: bool, invariant: bool) -> None:
    assert (rule.is_noncausal, rule.shift_invariant) == (right, invariant)


def test_worked_examples() -> None:
    position = torch.arange(5)
    zero = torch.zeros(1, 1, dtype=torch.long)

    def rows(rule: Rule) -> list[str]:
        return ["".join(".x"[int(seen)] for seen in row) for row in rule(zero, zero, position[:, None], position)]

    assert rows(Causal() & Window(2)) == ["x....", "xx...", ".xx..", "..xx.", "...xx"]
    assert rows(Causal() & Dilated(2, 2)) == ["x....", ".x...", "x.x..", ".x.x.", "..x.x"]
    assert rows(PrefixLM(3)) == ["xxx..", "xxx..", "xxx..", "xxxx.", "xxxxx"]
    assert rows(Causal() & (Window(1) | AttentionSinks(1))) == ["x....", "xx...", "x.x..", "x..x.", "x...x"]
    assert rows(Causal() & BlockDiagonal(torch.tensor([0, 0, 1, 1, 1]))) == [
        "x....",
        "xx...",
        "..x..",
        "..xx.",
        "..xxx",
    ]


def test_equality_is_by_value() -> None:
    assert ExplicitMask(torch.eye(3)) == ExplicitMask(torch.eye(3).bool())
    assert ExplicitMask(torch.eye(3)) != ExplicitMask(torch.ones(3, 3))
    assert ExplicitMask(torch.eye(3)) != BlockDiagonal(torch.arange(3))
    assert Causal() & Window(2) == And((Causal(), Window(2)))
    assert (Causal() & Window(2)) & AttentionSinks(1) == And((Causal(), Window(2), AttentionSinks(1)))  # kept flat
    assert Window(2) != Window(3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Window(0), "size of the rule 'window' is 0; a whole number from 1"),
        (lambda: Window(True), "size of the rule 'window' is True"),
        (lambda: Dilated(3, 0), "step of the rule 'dilated' is 0"),
        (lambda: AttentionSinks(1.5), "count of the rule 'sinks' is 1.5"),
        (lambda: PrefixLM(-1), "prefix of the rule 'prefix_lm' is -1"),
        (lambda: PrefixLM(()), "prefix of the rule 'prefix_lm' is ()"),
        (lambda: BlockDiagonal(torch.zeros(1, 1, 1)), r"document_ids .* has the shape \(1, 1, 1\)"),
        (lambda: ExplicitMask(torch.ones(2, 3)), r"visible .* has the shape \(2, 3\)"),
        (lambda: ExplicitMask([[1, 0], [1]]), "visible of the rule 'arbitrary' is no table of numbers"),
        (lambda: And((Causal(),)), "two or more rules are accepted"),
        (lambda: Causal() & 3, "a rule is combined with another rule, not with 3"),
        (lambda: rule_from_dict({"kind": "windw", "size": 3}), "no visibility rule of the kind 'windw'; did you mean"),
        (lambda: rule_from_dict({"size": 3}), "no visibility rule of the kind None"),
        (lambda: rule_from_dict({"kind": "window", "width": 3}), "the rule 'window' takes size, not width"),
        (lambda: rule_from_dict({"kind": "window", "size": "3"}), "size of the rule 'window' is '3'"),
        (lambda: rule_from_dict({"kind": "causal", "size": 3}), "the rule 'causal' takes no fields, not size"),
        (lambda: rule_from_dict({"kind": "and", "rules": 3}), "takes a list named rules"),
        (lambda: rule_from_dict({"kind": "not"}), "the rule 'not' takes rule, not nothing"),
    ],
)
def test_refusals(make: Any, words: str) -> None:
    with pytest.raises(IntaglioError, match=words):
        make()


def test_checks_compare_rows_heads_and_length() -> None:
    rule = Causal() & ~ExplicitMask(torch.ones(2, 4, 8, 8))
    rule.check(2, 4, 8)
    for sizes, words in [((3, 4, 8), "2 rows"), ((2, 5, 8), "4 heads"), ((2, 4, 9), "covers 8 positions")]:
        with pytest.raises(IntaglioError, match=words):
            rule.check(*sizes)
    with pytest.raises(IntaglioError, match="2 rows, and the input has 1"):
        (PrefixLM((1, 2)) | Causal()).check(1, 1, 0)
    with pytest.raises(IntaglioError, match="2 rows"):
        BlockDiagonal(torch.zeros(2, 8)).check(1, 4, 8)
    ExplicitMask(torch.ones(1, 1, 8, 8)).check(5, 5, 8)
