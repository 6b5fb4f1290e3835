"""Importing costs nothing, and the static catalogue says what the files say."""

from __future__ import annotations

import ast
import inspect
import re
import socket
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from intaglio.methods.registry import AREAS, METHODS, PUBLISHED, Entry, get_method

import intaglio
from intaglio.methods.base import Carving, Method

PACKAGE = Path(intaglio.__file__).parent
HEAVY = (
    "numba",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "numpy",
    "scipy",
    "pandas",
    "safetensors",
    "tokenizers",
)
NEEDS = {
    "intaglio.kernels.ternary_numba": "numba",
    "intaglio.kernels.ternary_simd": "numba",
    "intaglio.kernels.numba_pointers": "numba",
    "intaglio.kernels.gather_numba": "numba",
    "intaglio.kernels.gather_triton": "triton",
    "intaglio.kernels.sparse_experts_numba": "numba",
    "intaglio.kernels.sparse_experts_triton": "triton",
    "intaglio.kernels.ternary_triton": "triton",
}
"""Modules around a package that need not be installed; nothing but a look for that package leads to them."""
NAMES = (
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)
MODULES = sorted(name for name in NAMES if name not in NEEDS or find_spec(NEEDS[name]))


def loaded_after(code: str) -> set[str]:
    """The top-level packages that a bare Python has loaded after running this."""
    # The last line of stdout: the code itself may print.
    report = f"{code}\nimport sys\nprint()\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import intaglio",
        "import intaglio; dir(intaglio); intaglio.IntaglioError",
        "import intaglio.methods.registry, intaglio.errors, intaglio.atomic_io, intaglio.data.assets, intaglio.data.texts",
        "import sys; sys.argv = ['intaglio', '--help']\n"
        "try:\n    from intaglio.cli.app import main; main()\nexcept SystemExit:\n    pass",
        "import sys; sys.argv = ['intaglio', 'list', '--json']\n"
        "try:\n    from intaglio.cli.app import main; main()\nexcept SystemExit:\n    pass",
    ],
    ids=["import", "dir", "light modules", "--help", "list --json"],
)
def test_nothing_heavy_is_loaded_before_it_is_used(code: str) -> None:
    assert loaded_after(code).isdisjoint(HEAVY)


def test_the_check_sees_what_is_loaded() -> None:
    assert "numpy" in loaded_after("import numpy")


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    assert len(set(intaglio.__all__)) == len(intaglio.__all__)
    assert set(intaglio.__dir__()) == set(intaglio.__all__)
    for name in intaglio.__all__:
        found = getattr(intaglio, name)
        assert found.__name__ == name
        assert inspect.isclass(found) or inspect.isfunction(found)  # and no module of that name in its place
        assert found.__doc__
        assert inspect.getmodule(found).__doc__


def test_public_functions_win_over_modules_whatever_was_imported() -> None:
    for module in MODULES:
        import_module(module)
    for name in intaglio.__all__:
        assert not inspect.ismodule(getattr(intaglio, name)), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'intaglio' has no attribute 'Wnda'"):
        _ = intaglio.Wnda


@pytest.mark.parametrize("module", MODULES)
def test_every_module_and_public_name_has_a_docstring(module: str) -> None:
    found = import_module(module)
    assert found.__doc__
    for name, value in vars(found).items():
        ours = getattr(value, "__module__", None) == module and not name.startswith("_")
        if ours and (inspect.isclass(value) or inspect.isfunction(value)):
            assert inspect.getdoc(value), f"{module}.{name}"


@pytest.mark.parametrize("entry", PUBLISHED.values(), ids=lambda entry: entry.slug)
def test_the_catalogue_agrees_with_the_file(entry: Entry) -> None:
    assert PUBLISHED[entry.slug] is entry
    assert entry.area in AREAS
    assert entry.kinds
    method = get_method(entry.slug)
    assert issubclass(method, Method)
    assert (method.slug, method.__name__, method.__module__) == (entry.slug, entry.name, entry.module)
    assert method.entry() is entry
    assert method.__bases__[-1] is Method
    # A reader who knows the paper finds the code: method, authors, venue and year stand in the first line.
    first = import_module(entry.module).__doc__.splitlines()[0]
    author, year = entry.citation.split()[0], entry.citation[-4:]
    assert first.startswith(entry.name)
    assert re.search(rf"\({author} .*{year}\)", first)
    assert entry.citation.partition(", ")[2].partition(":")[0] in " ".join(method.__doc__.split())  # the title
    assert entry.url.startswith("https://")
    assert entry.summary[0].islower()
    if "carving" in entry.kinds:
        assert isinstance(method.model_construct(), Carving)


def methods_in(path: Path) -> list[tuple[str, str]]:
    """The `(class name, slug)` of every method that a file defines, read without importing it."""
    classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    return [
        (node.name, keyword.value.value)
        for node in classes
        for keyword in node.keywords
        if keyword.arg == "slug" and isinstance(keyword.value, ast.Constant)
    ]


def test_every_method_of_every_room_is_in_the_catalogue() -> None:
    found = {
        slug: (room, name)
        for room in AREAS
        for path in (PACKAGE / room).rglob("*.py")
        for name, slug in methods_in(path)
    }
    shared = {
        slug: (room, entry.name)
        for slug, entry in METHODS.items()
        for room in [entry.module.split(".")[1]]
        if room in AREAS
    }
    assert found == {slug: (entry.area, entry.name) for slug, entry in PUBLISHED.items()} | shared


def test_the_catalogue_is_in_order() -> None:
    assert list(PUBLISHED) == sorted(PUBLISHED)
    assert len({entry.name for entry in PUBLISHED.values()}) == len(PUBLISHED)


def test_the_network_is_closed() -> None:
    with pytest.raises(AssertionError, match="a test tried to"):
        socket.create_connection(("127.0.0.1", 9))
    with pytest.raises(AssertionError, match="a test tried to"):
        socket.socket().connect(("127.0.0.1", 9))
