"""Importing costs nothing, and every public name is there with a docstring."""

from __future__ import annotations

import inspect
import socket
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import intaglio

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
    "llguidance",
    "jsonschema",
)
NEEDS = {
    "intaglio.kernels.ternary_numba": "numba",
    "intaglio.kernels.ternary_simd": "numba",
    "intaglio.kernels.numba_pointers": "numba",
    "intaglio.kernels.gather_numba": "numba",
    "intaglio.kernels.gather_triton": "triton",
    "intaglio.kernels.postings_numba": "numba",
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
        "import intaglio.methods.registry, intaglio.recipe.schema, intaglio.errors, intaglio.atomic_io\n"
        "import intaglio.data.assets, intaglio.data.texts",
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


def test_the_network_is_closed() -> None:
    with pytest.raises(AssertionError, match="a test tried to"):
        socket.create_connection(("192.0.2.1", 9))
    with pytest.raises(AssertionError, match="a test tried to"):
        socket.socket().connect(("192.0.2.1", 9))
