"""A record goes stale when what its code does has changed, and not when it is only written otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from intaglio.catalogue import ENTRIES
from intaglio.evidence import sources

PLAIN = '''"""Says what it is."""
from __future__ import annotations
CUT = 0.5

def refine(x: float, twice: bool = False) -> float:
    """Cut."""
    # A comment.
    return x - CUT if not twice else 2 * (x - CUT)

class Box:
    """A box."""
    inside = None
'''
SAME = [
    PLAIN.replace('"""Says what it is."""', '"""Says it in\n\nother words."""'),
    PLAIN.replace('    """Cut."""\n', ""),
    PLAIN.replace("    # A comment.\n", "\n\n    # Another comment.\n"),
    PLAIN.replace("2 * (x - CUT)", "(2 * (x\n        - CUT))"),
    PLAIN.replace("0.5", "0.50"),
]
OTHER = [
    PLAIN.replace("0.5", "0.25"),
    PLAIN.replace("x - CUT if", "x + CUT if"),
    PLAIN.replace("twice: bool = False", "twice: bool = True"),
    PLAIN.replace("inside = None", "inside = 0"),
    PLAIN.replace("inside = None", "inside: None"),
    PLAIN.replace("def refine", "def refined"),
    PLAIN.replace('"""A box."""\n    inside = None', '"""A box."""\n    "A box."\n    inside = None'),
]


@pytest.mark.parametrize("text", SAME)
def test_writing_it_otherwise_keeps_the_hash(text: str) -> None:
    assert text != PLAIN
    assert sources.tree_hash(text) == sources.tree_hash(PLAIN)


@pytest.mark.parametrize("text", OTHER)
def test_doing_something_else_changes_the_hash(text: str) -> None:
    assert text != PLAIN
    assert sources.tree_hash(text) != sources.tree_hash(PLAIN)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name with a few modules, in the place of ours."""
    root = tmp_path / "intaglio"
    files = {
        "__init__.py": "",
        "errors.py": "A = 1",
        "method.py": "from intaglio.catalogue import X",
        "catalogue.py": "X = 1",
        "weights/__init__.py": "",
        "weights/one.py": "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from intaglio.types import T\n"
        "from intaglio.weights import two\nfrom intaglio.errors import A\nimport json\n"
        "def f():\n    from ..data import words\n    return words\n",
        "weights/two.py": "import intaglio.method\nVALUE = 2",
        "types.py": "T = int",
        "data/__init__.py": "",
        "data/words.py": "W = 1",
        "other.py": "O = 1",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(sources, "PACKAGE", root)
    return root


def test_what_is_reached_by_imports(package: Path) -> None:
    assert set(sources.hashes(["intaglio.weights.one"])) == {
        "intaglio.weights.one",
        "intaglio.weights",
        "intaglio.weights.two",
        "intaglio.method",
        "intaglio.data",
        "intaglio.data.words",
    }
    assert {"intaglio.weights.one", "intaglio.weights.two"} <= set(sources.hashes(["intaglio.weights"]))
    assert sources.hashes(["json", "intaglio.nowhere"]) == {}


def test_a_changed_constant_far_below_is_seen(package: Path) -> None:
    before = sources.hashes(["intaglio.weights.one"])
    (package / "data" / "words.py").write_text("# other\nW  =  1")
    sources._read.cache_clear()
    assert sources.hashes(["intaglio.weights.one"]) == before
    (package / "data" / "words.py").write_text("W = 2")
    sources._read.cache_clear()
    after = sources.hashes(["intaglio.weights.one"])
    assert [name for name in before if before[name] != after[name]] == ["intaglio.data.words"]
    (package / "other.py").write_text("O = 2")
    (package / "errors.py").write_text("A = 2")
    sources._read.cache_clear()
    assert sources.hashes(["intaglio.weights.one"]) == after


def test_the_first_experiment_depends_on_its_mechanism_world_and_measure() -> None:
    found = sources.of_slug("dsnot")
    for module in ("evidence.dsnot", "evidence.worlds.smollm2", "weights.dsnot", "weights.amount", "measures.quality"):
        assert f"intaglio.{module}" in found
    assert "intaglio.catalogue" not in found
    assert "intaglio.evidence.run" not in found


def test_every_method_can_be_hashed_without_torch() -> None:
    code = (
        "import sys; from intaglio.evidence import record, sources\n"
        f"[sources.of_slug(slug) for slug in {list(ENTRIES)!r}]; [record.shipped(slug) for slug in {list(ENTRIES)!r}]\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
