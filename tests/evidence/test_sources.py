"""A record goes stale when what its code does has changed, and not when it is only written otherwise."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from intaglio.evidence import sources
from intaglio.methods.registry import PUBLISHED

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


FILES = {
    "__init__.py": "",
    "errors.py": "A = 1",
    "method.py": "from intaglio.methods.registry import X\nY = 1",
    "registry.py": "X = 1",
    "weights/__init__.py": "",
    "weights/one.py": "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
    "if TYPE_CHECKING:\n    from intaglio.types import T\n"
    "from intaglio.methods.weights import two\nfrom intaglio.errors import A\nimport json\nimport intaglio.effects\n"
    "def f(x: T) -> T:\n    from ..data import words\n    return words, two.used(x)\n",
    "weights/two.py": "import intaglio.methods.base\nfrom intaglio.shelf import Box\nimport math as m\nVALUE = 2\nOTHER = 2\n"
    "def used(x: Hint): return m.sqrt(VALUE) + Box.size + intaglio.methods.base.Y\n"
    "def unused(x): return OTHER + far\nfrom intaglio.far import far\nHint = int\nREGISTER = []\n",
    "types.py": "T = int",
    "data/__init__.py": "",
    "data/words.py": "W = 1",
    "shelf/__init__.py": "from intaglio.shelf.box import Box\nfrom intaglio.shelf.lid import Lid\n"
    "__all__ = ['Box', 'Lid']",
    "shelf/box.py": "class Base:\n    size = 1\nclass Box(Base):\n    depth = 1\nclass Crate: pass",
    "shelf/lid.py": "class Lid: pass",
    "effects.py": "E = 1",
    "far.py": "far = 1",
    "other.py": "O = 1",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name with a few modules, in the place of ours."""
    root = tmp_path / "intaglio"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(sources, "PACKAGE", root)
    return root


def test_what_is_reached(package: Path) -> None:
    assert set(sources.hashes(["intaglio.methods.weights.one"])) == {
        "intaglio.methods.weights.one",
        "intaglio.methods.weights.two",
        "intaglio.methods.base",
        "intaglio.data.words",
        "intaglio.shelf",
        "intaglio.shelf.box",
        "intaglio.effects",
    }
    assert {"intaglio.far", "intaglio.methods.weights.one"} <= set(sources.hashes(["intaglio.methods.weights"]))
    assert sources.hashes(["json", "intaglio.nowhere"]) == {}


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("data/words.py", "W = 1", "W = 2", "data.words"),  # named by an import inside a function: whole
        ("data/words.py", "W = 1", "# other\nW  =  1", ""),
        ("weights/two.py", "VALUE = 2", "VALUE = 3", "weights.two"),  # used by what is used
        ("weights/two.py", "OTHER = 2", "OTHER = 3", ""),
        ("weights/two.py", "OTHER + far", "OTHER - far", ""),
        ("weights/two.py", "Hint = int", "Hint = float", ""),  # for readers alone
        ("weights/two.py", "import math as m", "import cmath as m", "weights.two"),
        ("weights/two.py", "REGISTER = []", "REGISTER = []\nREGISTER.append(1)", "weights.two"),  # done at import
        ("weights/two.py", "REGISTER = []", "REGISTER = []\nif VALUE: OTHER = 9", "weights.two"),
        ("method.py", "Y = 1", "Y = 2", "method"),
        ("method.py", "Y = 1", "Y = 1\nZ = 1", ""),
        ("shelf/box.py", "size = 1", "size = 2", "shelf.box"),  # a base class, through a package's re-export
        ("shelf/box.py", "class Crate: pass", "class Crate: big = True", ""),
        ("shelf/lid.py", "pass", "shut = True", ""),
        ("effects.py", "E = 1", "E = 2", "effects"),  # imported, never named: for what it does
        ("far.py", "far = 1", "far = 2", ""),
        ("weights/one.py", "def f", "UNUSED = 1\ndef f", "weights.one"),  # a root counts whole
        ("other.py", "O = 1", "O = 2", ""),
        ("errors.py", "A = 1", "A = 2", ""),
    ],
)
def test_a_change_is_seen_where_it_is_reached(package: Path, file: str, old: str, new: str, changed: str) -> None:
    before = sources.hashes(["intaglio.methods.weights.one"])
    assert FILES[file].count(old) == 1
    (package / file).write_text(FILES[file].replace(old, new))
    sources._read.cache_clear()
    after = sources.hashes(["intaglio.methods.weights.one"])
    assert [name for name in before | after if before.get(name) != after.get(name)] == (
        [f"intaglio.{changed}"] if changed else []
    )


def test_another_origin_of_a_name_is_seen(package: Path) -> None:
    before = sources.hashes(["intaglio.methods.weights.one"])
    (package / "shelf" / "__init__.py").write_text("from intaglio.shelf.lid import Lid as Box")
    sources._read.cache_clear()
    after = sources.hashes(["intaglio.methods.weights.one"])
    assert before["intaglio.shelf"] != after["intaglio.shelf"]
    assert "intaglio.shelf.lid" in after
    assert "intaglio.shelf.box" not in after


def test_the_first_experiment_depends_on_its_mechanism_world_and_measure() -> None:
    found = sources.of_slug("dsnot")
    for module in ("evidence.dsnot", "evidence.worlds.smollm2", "weights.dsnot", "weights.amount", "measures.quality"):
        assert f"intaglio.{module}" in found
    assert "intaglio.data.wikitext" in found  # the bundled texts were made with it
    for module in ("registry", "evidence.run", "evidence.experiment", "trainer", "carving"):
        assert f"intaglio.{module}" not in found


@pytest.mark.parametrize(
    ("module", "old", "new", "stale"),
    [
        ("weights/dsnot.py", "max_cycles", "most_cycles", True),
        ("evidence/dsnot.py", "ERROR_TOKENS = 32", "ERROR_TOKENS = 33", True),
        ("evidence/worlds/smollm2.py", '"evaluation": (600, 1000)', '"evaluation": (601, 1000)', True),
        ("weights/pruning.py", "Pruning", "Pruned", True),
        ("data/wikitext.py", "def ", "def _", True),
        ("registry.py", "weights", "wait", False),
        ("evidence/statistics.py", "BOOTSTRAPS = 1999", "BOOTSTRAPS = 999", False),
        ("trainer/loop.py", "def train", "def drain", False),
    ],
)
def test_a_changed_mechanism_makes_the_committed_claim_stale(
    module: str, old: str, new: str, stale: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sources.of_slug("dsnot")
    shutil.copytree(sources.PACKAGE, tmp_path / "intaglio", ignore=shutil.ignore_patterns("__pycache__", "results"))
    changed = tmp_path / "intaglio" / module
    text = changed.read_text(encoding="utf-8")
    assert old in text
    changed.write_text(text.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(sources, "PACKAGE", tmp_path / "intaglio")
    assert (sources.of_slug("dsnot") != before) == stale


def test_every_method_can_be_hashed_without_torch() -> None:
    code = (
        "import sys; from intaglio.evidence import record, sources\n"
        f"[sources.of_slug(slug) for slug in {list(PUBLISHED)!r}]; "
        f"[record.shipped(slug) for slug in {list(PUBLISHED)!r}]\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
