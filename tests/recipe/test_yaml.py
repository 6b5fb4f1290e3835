"""Reading YAML: plain data only, the place of every value, and one sentence for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from intaglio.errors import IntaglioError
from intaglio.recipe import yaml as recipe_yaml
from intaglio.recipe.yaml import MAX_DEPTH, Document, parse_yaml, read_yaml

# Characters that mean something to YAML, so that random text gets past the first token.
YAMLISH = st.text(st.sampled_from("ab01:-?[]{}#&*!|>'\"%@`,. \n\t\\~=<"), max_size=40)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
NESTED = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


def refusal(text: str) -> str:
    with pytest.raises(IntaglioError) as found:
        parse_yaml(text, "r.yaml")
    sentence = str(found.value)
    assert sentence.isprintable()
    return sentence


def test_every_value_knows_its_line() -> None:
    document = parse_yaml("# a recipe\nmodel: x\nsteps:\n  - wanda:\n      sparsity: 0.5\n  - dsnot: {base: wanda}\n")
    assert document.value == {"model": "x", "steps": [{"wanda": {"sparsity": 0.5}}, {"dsnot": {"base": "wanda"}}]}
    assert document.lines[("steps", 0, "wanda", "sparsity")] == 5
    assert document.where(("steps", 1, "dsnot", "base")) == "recipe, line 6, steps[1].dsnot.base"
    assert document.where(("steps", 0, "wanda", "nothing")) == "recipe, line 4, steps[0].wanda.nothing"
    assert document.where(()) == "recipe, line 2"
    assert Document("r", {}, {}).where(("a", 0)) == "r, a[0]"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),  # base 60 in YAML 1.1
        ("190:20:30", "190:20:30"),
        ("1e-1", 0.1),  # a word in YAML 1.1
        ("'1e-1'", "1e-1"),
        ("0.5", 0.5),
        ("5", 5),
        ("yes", True),
        (".nan", "nan"),
        ("'5'", "5"),
        ("~", None),
        ("", None),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    found = parse_yaml(f"x: {text}").value["x"]
    assert (str(found) if value == "nan" else found) == value


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: !!python/object/apply:os.system ['x']", "r.yaml, line 2: a tag of YAML is not accepted"),
        ("a: !!int 3", "r.yaml, line 1: a tag of YAML is not accepted"),
        ("a: &x 1\nb: *x", "r.yaml, line 1: an anchor of YAML is not accepted"),
        ("b: *x", "r.yaml, line 1: an alias of YAML is not accepted"),
        ("a: 1\nb: 2\na: 3", "r.yaml, line 3: the key 'a' is repeated"),
        ("a: {1: 2, '1': 3}", "r.yaml, line 1: the key '1' is repeated"),
        ("? [a]\n: b", "r.yaml, line 1: a key must be a word"),
        ("a: [1", "r.yaml, line 1 is not valid YAML: expected ',' or ']'"),
        ("\n\tx: 1", "r.yaml, line 2 is not valid YAML: found character '\\t'"),
        ("a\n---\nb", "r.yaml, line 2 is not valid YAML: but found another document"),
        ("a: \x01", "r.yaml is not valid YAML: special characters are not allowed"),
        ("a: =", "r.yaml, line 1: = cannot be read"),
        ("\na: 2001-02-30", "r.yaml, line 2: 2001-02-30 cannot be read: day is out of range"),
        ("a: " + "1" * 5000, "1... cannot be read: Exceeds the limit"),
        ("[" * 10_000, "r.yaml, line 1: it is nested too deeply, over 32 levels"),
        ("- " * (MAX_DEPTH + 1) + "a", "r.yaml, line 1: it is nested too deeply"),
        ("{a: " * 1000, "nested too deeply"),
    ],
)
def test_what_is_not_plain_data_is_refused(text: str, sentence: str) -> None:
    assert sentence in refusal(text)
    assert len(refusal(text)) < 250


def test_nesting_up_to_the_limit_is_read() -> None:
    parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH)


def test_tags_run_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    refusal(f"steps: !!python/object/apply:os.system ['touch {marker}']")
    refusal(f"!!python/object/new:os.system ['touch {marker}']")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\x93NUMPY\x01\x00v\x00{'descr'", "is not text: byte 0 is not UTF-8"),
        (b"GGUF\x03\x00\x00\x00", "is not valid YAML: special characters are not allowed"),
        (b"a: \xff", "is not text: byte 3 is not UTF-8"),
        (b"# " + b"x" * (2 << 20), "is over 1 MiB, too large for a recipe"),
    ],
)
def test_files_that_are_no_yaml(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(IntaglioError, match=sentence):
        read_yaml(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(IntaglioError, match=r"cannot read .*none.yaml: No such file or directory"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(IntaglioError, match="Is a directory"):
        read_yaml(tmp_path)


def test_the_limit_of_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_yaml, "MAX_BYTES", 100)
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: 1 #" + b"x" * 94)
    assert read_yaml(path).value == {"a": 1}
    path.write_bytes(b"a: 1 #" + b"x" * 95)
    with pytest.raises(IntaglioError, match="too large for a recipe"):
        read_yaml(path)


@given(st.text(max_size=60) | YAMLISH)
@example("\ud800")
@example("a: '\\ud800'")
@example('"\\ud800\\e\\n": 1')
@example("0x_")
@example("0b")
def test_any_text_gives_plain_data_or_one_sentence(text: str) -> None:
    document = document_or_sentence(text)
    if isinstance(document, str):
        assert document.isprintable()
        assert document.startswith("r.yaml")
    else:
        assert document.lines or document.value is None
        assert all(1 <= line <= text.count("\n") + text.count("\r") + 2 for line in document.lines.values())


def document_or_sentence(text: str) -> Document | str:
    try:
        return parse_yaml(text, "r.yaml")
    except IntaglioError as error:
        return str(error)


@settings(max_examples=50)
@given(NESTED)
def test_plain_data_comes_back(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump(value)).value == value
