"""Names and their roles: exact on a worked example, sealed by file, the same in every draw."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from intaglio.data.identifier_roles import PASSAGE, ROLES, STRING, lines, passages
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds import cached_models
from intaglio.evidence.testbeds.identifier_roles import IdentifierRoles
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.evidence.testbeds.splits import BOUNDS

SOURCE = '''"""A docstring."""
import os.path as p
from a import (b,
    c as d)  # a comment

@decorate(key=1)
class Shape(Base):
    size: int = 0

    async def area(self, *many, unit="m", **more) -> float:
        "another"
        x, y = self.side.get(name=unit), f"{hidden} {names}"
        x += many[0].scale(lambda k: k, **more)
        é = x if y else None
        for i in range(x): print(i, sep=p.sep)
        global other
        del y
        return é.x
'''
EXPECTED = [
    ("os", "import"), ("path", "import"), ("p", "import"),
    ("a", "import"), ("b", "import"), ("c", "import"), ("d", "import"),
    ("decorate", "call"), ("key", "keyword"),
    ("Shape", "definition"), ("Base", "load"),
    ("size", "store"), ("int", "load"),
    ("area", "definition"), ("self", "parameter"), ("many", "parameter"), ("unit", "parameter"), ("more", "parameter"),
    ("float", "load"),
    ("x", "store"), ("y", "store"), ("self", "load"), ("side", "attribute"), ("get", "call"), ("name", "keyword"),
    ("unit", "load"),
    ("x", "store"), ("many", "load"), ("scale", "call"), ("k", "parameter"), ("k", "load"), ("more", "load"),
    ("é", "store"), ("x", "load"), ("y", "load"),
    ("i", "store"), ("range", "call"), ("x", "load"), ("print", "call"), ("i", "load"), ("sep", "keyword"),
    ("p", "load"), ("sep", "attribute"),
    ("other", None), ("y", None),
    ("é", "load"), ("x", "attribute"),
]  # fmt: skip


def named(example: dict[str, Any]) -> list[tuple[str, str | None]]:
    text = example["passage"]
    return [(text[start:end], label) for (start, end), label in zip(example["spans"], example["labels"], strict=True)]


def test_a_worked_example() -> None:
    found = list(lines(SOURCE))
    assert [pair for line in found for pair in named(_as_example(line))] == EXPECTED
    assert found[0].text == "\n import os . path as p"  # lines of nothing but strings are left out
    assert found[1].text == "\n from a import ( b , c as d )"
    assert f"f{STRING}" not in "".join(line.text for line in found)
    assert "hidden" not in "".join(line.text for line in found)
    assert found[4].text == "\n  size : int = 0"
    (passage,) = passages(found[:2])
    assert named(passage) == EXPECTED[:7]
    with pytest.raises(SyntaxError):
        list(lines("def ("))


def _as_example(line: Any) -> dict[str, Any]:
    return {
        "passage": line.text,
        "spans": [name[:2] for name in line.names],
        "labels": [name[2] for name in line.names],
    }


def test_passages_are_whole_lines() -> None:
    found = list(lines(SOURCE * 4))
    cut = list(passages(found))
    assert "".join(example["passage"] for example in cut) == "".join(line.text for line in found)
    assert all(len(example["passage"]) <= PASSAGE for example in cut)
    assert [pair for example in cut for pair in named(example)] == EXPECTED * 4


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> IdentifierRoles:
    return small_world(tmp_path, monkeypatch)


def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> IdentifierRoles:
    """A bed of made-up files whose tiny model trains in a moment."""
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cached_models, "_loaded", {})
    root, draw = tmp_path / "made_up", random.Random(0)
    root.mkdir()
    names = ["alpha", "beta", "gamma", "delta", "value", "count", "total"]
    for number in range(90):
        body = [f"import {draw.choice(names)}_{number}", f"class C{number}:", f"  def f(self, {draw.choice(names)}):"]
        for _ in range(draw.randint(3, 9)):
            a, b, c = draw.choices(names, k=3)
            body.append(f"    {a} = {b}({c}={a}.{b})")
        (root / f"m{number}.py").write_text("\n".join(body) + "\n", encoding="utf-8")
    return IdentifierRoles(
        SourceCode(folder=str(root)), vocabulary=300, width=16, depth=4, context=128, steps=3, batch=2
    )


def test_sets_share_no_file_and_draws_are_the_same_everywhere(small: IdentifierRoles) -> None:
    drawn = {part: small.examples(part, 4, 0) for part in BOUNDS}
    texts = [example["passage"] for examples in drawn.values() for example in examples]
    assert len(set(texts)) == len(texts)
    assert small.examples("train", 4, 0) == drawn["train"]
    assert small.examples("train", 2, 0) == drawn["train"][:2]
    assert small.examples("train", 4, 1) != drawn["train"]
    counts = Counter(label for example in small.examples("train", 20, 0) for label in example["labels"])
    assert set(counts) <= {*ROLES, None}
    assert len(counts) >= 7
    with pytest.raises(IntaglioError, match="passages of pilot files were requested; there are"):
        small.examples("pilot", 10_000, 0)
    with pytest.raises(IntaglioError, match="there is no set 'test'"):
        small.examples("test", 1, 0)  # type: ignore[arg-type]


def test_no_token_reaches_into_two_words(small: IdentifierRoles) -> None:
    tokenizer = small.tokenizer()
    for example in small.examples("evaluation", 5, 0):
        coded = tokenizer(example["passage"], add_special_tokens=False, return_offsets_mapping=True)
        text = example["passage"]
        for start, end in coded["offset_mapping"]:
            assert len(text[start:end].split()) <= 1
        assert tokenizer.decode(coded["input_ids"]) == text


def test_the_model_is_trained_once_and_found_again(small: IdentifierRoles) -> None:
    first = small.trained()
    assert small.trained() is first
    assert first.context == 128
    windows = small.training(0)
    assert (windows.n, windows.length) == (6, 128)
    assert windows.digest == small.training(0).digest != small.training(1).digest
