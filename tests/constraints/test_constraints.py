"""Constraints: what they accept, what they refuse in a sentence, and their conjunction."""

from __future__ import annotations

import json
import re
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.constraints import (
    Choices,
    Constraint,
    ConstraintProcessor,
    Grammar,
    JSONSchema,
    Length,
    Predicate,
    Prefix,
    Regex,
    SQLSelect,
    Vocabulary,
    check_output,
)
from intaglio.errors import IntaglioError
from tests.constraints.toys import LETTERS, VOCABULARY, draw
from tests.families import EOS, tiny_model, tiny_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMA = """
CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT, "order" TEXT, "a b" REAL);
CREATE TABLE posts (id INTEGER, user_id INTEGER, body TEXT);
CREATE VIEW recent AS SELECT id FROM posts;
"""


def accepts(constraint: Constraint, text: str) -> bool:
    """Whether a text, byte by byte, is a whole output."""
    ids = {form: id for id, form in enumerate(VOCABULARY.forms)}
    prefix = Prefix.empty(constraint, VOCABULARY)
    for byte in text.encode():
        token = ids[bytes([byte])]
        assert prefix.allows(token) == bool(prefix.mask()[token]) or not prefix.state.exact
        if not prefix.allows(token):
            return False
        prefix = prefix.extended(token)
    return prefix.complete()


@pytest.mark.parametrize("pattern", [
    r"\d+", r"[A-F0-9]{4}(-[A-F0-9]{4})*", r"(?i)abc|d", r"[^a-z\n]{2,3}", r"(ab|c)*?d?", r"\w\s\W\S\D", r"a/b#\"'",
])  # fmt: skip
def test_a_regular_expression_is_met_as_a_whole(pattern: str) -> None:
    for seed in range(20):
        text = draw(Regex(pattern), seed)
        assert text is not None
        assert re.fullmatch(pattern, text, re.ASCII)


def test_membership_is_that_of_re() -> None:
    constraint, pattern = Regex(r"(a|b)*c\d?"), re.compile(r"(a|b)*c\d?", re.ASCII)
    for text in ("", "c", "abac", "c5", "abc55", "acb", "d", "C"):
        assert accepts(constraint, text) == bool(pattern.fullmatch(text))


def test_a_json_text_is_valid_under_its_schema() -> None:
    seen = [draw(JSONSchema(PERSON), seed) for seed in range(40)]
    texts = [text for text in seen if text is not None]
    assert len(texts) >= 35
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
        assert text == json.dumps(json.loads(text), ensure_ascii=False) or "\\" in text
    assert accepts(JSONSchema(PERSON, flexible_whitespace=True), '{ "name":"a","age" : 3}')
    assert not accepts(JSONSchema(PERSON), '{ "name": "a", "age": 3}')


def test_choices_and_grammars_derive_their_strings() -> None:
    assert {draw(Choices(["yes", "no", 'a"b', "yesno"]), seed) for seed in range(60)} == {"yes", "no", 'a"b', "yesno"}
    nested = Grammar('start: "(" start ")" | "x"')
    for seed in range(10):
        text = draw(nested, seed)
        assert text is None or re.fullmatch(r"\(*x\)*", text)
        assert text is None or text.count("(") == text.count(")")


def test_statements_are_prepared_by_sqlite() -> None:
    connection = sqlite3.connect(":memory:")
    connection.executescript(SCHEMA)
    constraint = SQLSelect(SCHEMA)
    assert constraint.tables["users"] == ["id", "name", '"order"', '"a b"']
    assert set(constraint.tables) == {"users", "posts", "recent"}
    for seed in range(40):
        text = draw(constraint, seed, 400)
        if text is not None:
            connection.execute(text)
    for text in (
        "SELECT name FROM users WHERE id > 3 AND name LIKE 'A%' ORDER BY name DESC LIMIT 5",
        "SELECT COUNT(*) FROM users GROUP BY name HAVING COUNT(*) > 2",
        "SELECT users.name, SUM(posts.id) FROM users JOIN posts ON users.id = posts.user_id GROUP BY users.name",
        "SELECT DISTINCT body FROM posts WHERE (id BETWEEN 1 AND 5 OR user_id IN (1, 2)) AND body IS NOT NULL",
    ):
        assert accepts(constraint, text)
        connection.execute(text)
    for text in ("SELECT body FROM users", "SELECT nothing FROM users", "DROP TABLE users", "SELECT * FROM users; "):
        assert not accepts(constraint, text)


@given(st.text(st.sampled_from("abz1 é€"), max_size=6), st.integers(0, 4), st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_an_intersection_accepts_what_all_accept(text: str, least: int, more: int) -> None:
    parts = [
        Length(least, least + more),
        Length(maximum=9, unit="tokens"),
        Regex(r"[a-z1 é€]*"),
        Predicate(lambda prefix: "zz" not in prefix, lambda whole: not whole.endswith("1")),
    ]
    encodable = all(bytes([byte]) in VOCABULARY.forms for byte in text.encode())
    if encodable:
        whole = parts[0] & parts[1] & (parts[2] & parts[3])
        assert accepts(whole, text) == all(accepts(part, text) for part in parts)
        assert (accepts(parts[0], text), accepts(parts[3], text)) == (
            least <= len(text) <= least + more,
            "zz" not in text and not text.endswith("1"),
        )


def test_a_predicate_sees_whole_characters() -> None:
    seen: list[str] = []

    def note(text: str) -> bool:
        seen.append(text)
        return True

    prefix = Prefix.empty(Predicate(note, note), VOCABULARY)
    for form, complete in ((b"\xc3", False), (b"\xa9", True), (b"\xe2\x82", False), (b"\xac", True), (b"a", True)):
        token = VOCABULARY.forms.index(form)
        assert prefix.allows(token)
        prefix = prefix.extended(token)
        assert prefix.complete() == complete
        assert prefix.allows(VOCABULARY.forms.index(b"\xa9")) != complete  # a continuation byte never comes first
    assert set(seen) == {"", "é", "é€", "é₩", "é€a"}


def test_a_predicate_is_interrupted_in_any_thread() -> None:
    def hang(text: str) -> bool:
        while text:
            time.sleep(0.001)
        return True

    def attempt() -> None:
        with pytest.raises(IntaglioError, match=r"for the prefix '\w' took longer than time_limit = 0.05 s"):
            Prefix.empty(Predicate(hang, time_limit=0.05), VOCABULARY).allows(VOCABULARY.forms.index(b"a"))
        outcomes.append(True)

    outcomes: list[bool] = []
    attempt()
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert outcomes == [True, True]


def test_backtracking_of_re_is_interrupted() -> None:
    slow = Predicate(lambda text: not text or bool(re.fullmatch(r"(a|aa)+$", "a" * 60 + "b")), time_limit=0.1)
    with pytest.raises(IntaglioError, match="took longer"):
        Prefix.empty(slow, VOCABULARY).allows(VOCABULARY.forms.index(b"a"))


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: Regex("("), "malformed: missing"),
    (lambda: Regex("(?=a)b"), "look-around"),
    (lambda: Regex(r"(a)\1"), "backreferences"),
    (lambda: Regex("[[:alpha:]]"), "malformed: Possible nested set"),
    (lambda: Regex("(?u)a"), "ASCII and UNICODE flags are incompatible"),
    (lambda: Regex("\ud800"), "surrogates not allowed"),
    (lambda: Grammar("start: x"), 'unknown name: "x"'),
    (lambda: Choices([]), "at least one string"),
    (lambda: Choices(["a", ""]), "none of them empty"),
    (lambda: Length(3, 2), "the length is 3 to 2"),
    (lambda: Length(unit="words"), "accepted: characters, tokens"),
    (lambda: JSONSchema({"$ref": "http://x/y.json"}), "refers to 'http://x/y.json'"),
    (lambda: JSONSchema({"items": [{"$ref": "other.json#/a"}]}), "only references inside"),
    (lambda: JSONSchema({"$ref": "#/definitions/x"}), "does not exist"),
    (lambda: JSONSchema({"$schema": 3}), r"malformed at \$\.\$schema: 3 is not a string"),
    (lambda: JSONSchema({"type": "foo"}), r"malformed at \$\.type"),
    (lambda: JSONSchema({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable"),
    (lambda: JSONSchema({"not": {"type": "string"}}), "Unimplemented keys"),
    (lambda: JSONSchema("/nowhere/a.json"), "cannot be read"),
    (lambda: JSONSchema(False), "an object is accepted"),  # type: ignore[arg-type]
    (lambda: SQLSelect("ATTACH 'x.db' AS y"), "not authorized"),
    (lambda: SQLSelect("CREATE TABLE a (b); INSERT INTO a VALUES (1)"), "not authorized"),
    (lambda: SQLSelect("SELEC"), "syntax error"),
    (lambda: SQLSelect(""), "creates no table"),
    (lambda: SQLSelect.from_file("/nowhere/a.sql"), "cannot be read"),
    (lambda: Predicate("a"), "a function of a string"),  # type: ignore[arg-type]
    (lambda: Predicate(lambda text: True, time_limit=0), "time_limit is 0"),
    (lambda: draw(Predicate(lambda text: False), 0), "rejects the empty prefix"),
    (lambda: draw(Predicate(lambda text: text == "" or bool(1 / 0)), 0), "for the prefix .* raised Zero"),
    (lambda: draw(Predicate(lambda text: None), 0), "returned None; True or False"),
    (lambda: draw(Predicate(lambda text: len(text) != 1), 0, vocabulary=LETTERS), "is not monotone: it rejects"),
    (lambda: draw(Predicate(lambda text: text in ("", "a"), lambda text: text == "a"), 0, vocabulary=LETTERS), ""),
    (lambda: draw(Regex("a") & Regex("b"), 0), "no token of the vocabulary may begin"),
    (lambda: draw(Regex("abc") & Length(maximum=2), 0), "no token may follow 'ab'"),
    (lambda: Vocabulary([b"a"], []), "no token ends an output"),
    (lambda: Vocabulary.from_tokenizer(None, 3, [1]), "fast tokenizer"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_cannot_be_met_is_one_sentence(case: int) -> None:
    make, says = REFUSED[case]
    if not says:  # a monotone predicate is not refused
        assert make() == "a"
        return
    with pytest.raises(IntaglioError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_complete_text_that_is_rejected_as_a_prefix_is_reported() -> None:
    odd = Predicate(lambda text: text == "", lambda text: True)
    prefix = Prefix(VOCABULARY, odd.start(VOCABULARY).extended(VOCABULARY.forms.index(b"a")))
    with pytest.raises(IntaglioError, match="is complete, but rejected as a prefix"):
        prefix.complete()


def test_a_malformed_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text("{")
    with pytest.raises(IntaglioError, match=rf"{path} is not JSON"):
        JSONSchema(path)


def processor(constraint: Constraint, prompt: int, greedy: bool = True) -> ConstraintProcessor:
    tokenizer = tiny_tokenizer("llama")
    return ConstraintProcessor(constraint, Vocabulary.from_tokenizer(tokenizer, 160, [EOS]), prompt, greedy)


@pytest.mark.parametrize("sampling", [False, True])
def test_a_predicate_and_its_mask_generate_alike(sampling: bool) -> None:
    """Greedy search checks tokens from the best down; a mask of the same language gives the same ids."""
    model, ids = tiny_model("llama", layers=2, dtype=torch.float64), torch.tensor([[9, 30, 31], [30, 9, 8]])
    letters = re.compile("[a-m ]{0,9}")
    pair = (Regex(r"[a-m ]{0,9}"), Predicate(lambda text: letters.fullmatch(text) is not None))
    outputs, checks = [], []
    for constraint in pair:
        torch.manual_seed(3)
        each = processor(constraint, 3, not sampling)
        outputs.append(
            model.generate(ids, logits_processor=[each], max_new_tokens=12, do_sample=sampling, eos_token_id=EOS)
        )
        checks.append(each.checks)
    assert torch.equal(*outputs)
    assert checks[0] == 0
    assert 0 < checks[1] <= 160 * 24
    for row in outputs[0][:, 3:].tolist():
        assert letters.fullmatch(check_output(each, row))


def test_an_unfinished_output_is_reported() -> None:
    each = processor(Regex("[a-z]{300}"), 0)
    with pytest.raises(IntaglioError, match="not complete after max_new_tokens = 2 tokens"):
        check_output(each, tiny_tokenizer("llama")("the th", add_special_tokens=False)["input_ids"][:2])


def test_a_text_may_end_where_the_vocabulary_cannot_go_on() -> None:
    letters = Vocabulary([b"", b"a", b"b"], [0])
    prefix = Prefix.empty(Regex("a\u4e2d?"), letters).extended(1)
    assert prefix.mask().tolist() == [True, False, False]
    assert not Prefix.empty(Regex("\u4e2d"), letters).mask().any()


def test_masks_exclude_special_tokens_and_unused_ids() -> None:
    tokenizer = tiny_tokenizer("llama")
    vocabulary = Vocabulary.from_tokenizer(tokenizer, 170, [EOS])
    mask = Prefix.empty(Regex("(?s).*"), vocabulary).mask()
    assert mask[EOS]
    assert not mask[[id for id in tokenizer.all_special_ids if id != EOS]].any()
    assert not mask[160:].any()
    ids = tokenizer("the quick brown fox", add_special_tokens=False)["input_ids"]
    assert b"".join(vocabulary.forms[id] for id in ids) == b"the quick brown fox"
    assert np.array_equal(vocabulary.characters_V[ids], [len(vocabulary.forms[id]) for id in ids])
