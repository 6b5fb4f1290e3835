from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intaglio.data.docstrings import Kind, Pair, pairs, words
from intaglio.data.python_source import SourceFile, source_files

SOURCE = '''
"""A module."""

def plain(x, y):
    """Return the larger of the two given numbers.

    Both are compared with the usual order, and where they are equal to one another the first of them is returned.
    """
    # Compare.
    if x >= y:
        return x
    return y

class Box:
    """Hold any number of things until they are asked for.

    What was put in last comes out first, unless somebody has turned the whole box over in the meantime.
    """

    @property
    def weight(self):
        """Sum up the weights of all things inside."""
        total = 0
        for thing in self.things:
            total += thing.weight
        return total

    async def close(self):
        r\'\'\'Wait until nobody uses the box, then close it.\'\'\'
        def inner():
            """Say that this very box is free now."""
            return 1
        await self.free(inner)
        self.open = False
        return None

if True:
    def guarded(a):
        """Do something under a condition of the interpreter."""
        b = a
        c = b
        return c
'''


def of(source: str, kind: Kind = "code") -> dict[str, Pair]:
    return {pair.name: pair for pair in pairs([SourceFile("p", "p.m", source, "0")], kind)}


def function(
    summary: str = "Return the larger of two given numbers.", body: str = "a = 1\n    b = 2\n    return a"
) -> str:
    return f'def f():\n    """{summary}"""\n    {body}\n'


def test_code() -> None:
    found = of(SOURCE)
    assert list(found) == ["plain", "Box.weight", "Box.close", "guarded"]
    assert found["plain"].query == "Return the larger of the two given numbers."
    assert found["plain"].document == (
        "def plain(x, y):\n    # Compare.\n    if x >= y:\n        return x\n    return y"
    )
    assert found["Box.weight"].document.startswith("def weight(self):\n    total = 0\n")
    assert found["Box.close"].document == (
        "async def close(self):\n    def inner():\n        return 1\n    await self.free(inner)\n"
        "    self.open = False\n    return None"
    )
    assert (found["plain"].package, found["plain"].module) == ("p", "p.m")


def test_text() -> None:
    found = of(SOURCE, "text")
    assert list(found) == ["plain", "Box"]
    assert found["Box"].query == "Hold any number of things until they are asked for."
    assert found["Box"].document.startswith("What was put in last comes out first")


@pytest.mark.parametrize(
    "source",
    [
        function("Return it."),
        function("max(a, b, *, key=None) -> the larger one of both"),
        function("See the other function for what this one does."),
        function("Deprecated since the last version of this library."),
        function(">>> f(1) gives the larger one of both numbers"),
        function("word " * 100),
        function(body="return 1"),
        function(body="# Return the LARGER of two, given numbers!\n    a = 1\n    return a"),
        function("A summary with \\ud800 half a character in it."),
        'def f(): "Return the larger of the two numbers."; a = 1; b = 2; return a\n',
        'def f():\n    "Return the larger of the two numbers."; a = 1\n    b = 2\n    return a\n',
        'def f():\n    """Return the larger of two given numbers."""\n    def g():\n        """Only words."""\n'
        "    a = 1\n    return a\n",
        "def f():\n    a = 1\n    b = 2\n    return a\n",
        "def f(:\n",
        "\0",
    ],
)
def test_what_is_left_out(source: str) -> None:
    assert of(source) == {}


def test_the_borderline_is_kept() -> None:
    assert list(of(function())) == ["f"]
    assert list(of(function("Return four words here."))) == ["f"]


def test_an_id_is_of_everything_that_a_pair_says() -> None:
    pair = Pair("p", "m", "f", "query", "document")
    others = [Pair("p", *fields) for fields in (("n", "f", "query", "document"), ("m", "g", "query", "document"))]
    others += [Pair("p", "m", "f", "query 2", "document"), Pair("p", "m", "f", "query", "document 2")]
    assert len({pair.id, *(other.id for other in others)}) == 5
    assert pair.id == Pair("p", "m", "f", "query", "document").id


@given(st.text())
def test_words_do_not_depend_on_case_and_signs(text: str) -> None:
    assert words(text) == words(f"  {text}! ") == words(words(text))


def docstrings(document: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(document)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found = ast.get_docstring(node)
            if found is not None:
                yield found


def test_real_source_gives_functions_without_docstrings() -> None:
    files = [file for file in source_files() if file.module.partition(".")[0] in ("asyncio", "email", "json", "random")]
    found = list(pairs(files, "code"))
    assert len(found) > 200
    for pair in found:
        assert list(docstrings(pair.document)) == [], pair.name
        assert words(pair.query) not in words(pair.document)
    # The same in another order of files.
    assert {pair.id for pair in pairs(files[::-1], "code")} == {pair.id for pair in found}
    texts = list(pairs(files, "text"))
    assert len(texts) > 100
    assert not any(words(pair.query) in words(pair.document) for pair in texts)
