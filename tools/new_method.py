"""Write the skeleton of a method and of its test file: `make new-method SLUG=row_norm AREA=weights`.

The skeleton passes lint and is in no table until its `kinds` are set; its one test fails with what is left to do.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from intaglio.methods.registry import AREAS, METHODS, area_package

ROOT = Path(__file__).resolve().parent.parent

METHOD = '''"""{name} (AUTHOR et al., VENUE YEAR): what it does, in one clause."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from intaglio.checkpoint import Checkpoint
from intaglio.methods.base import BASE_IMPORTS


class {name}(Method, slug="{slug}"):
    """What it computes, with its equation.

    Args:
        FIELD: meaning, shape, unit and default of each field.

    Raises:
        IntaglioError: (in `apply`) when.

    Source: AUTHORS, TITLE, VENUE YEAR, section.
    """

    kinds = ()  # such as ("carving",), whose protocol follows; those of other kinds are in trainer and speculative
    summary = ""
    citation = ""
    url = ""

    storage: ClassVar[Literal["standalone"]] = "standalone"
    needs_calibration: ClassVar[bool] = True
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({{"weights"}})

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Refuse linear layers that do not fit."""

    def estimate(self, workload: Workload) -> Cost:
        """Estimate the cost of `apply`."""
        raise NotImplementedError

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Edit `checkpoint` in place, record the step and return it."""
        raise NotImplementedError
'''.replace("BASE_IMPORTS", "Cost, Method, ModelAspect, Progress, Workload, no_progress")

TEST = '''"""{name}: what its paper promises."""

from __future__ import annotations

from intaglio.methods.registry import METHODS

EXAMPLES = ({{}},)
"""Fields of the instances that the conformance suite applies."""
ALIVE: dict[str, object] = {{}}
"""For each field a value that changes the first example's result; see `tests/alive.py`."""


def test_it_is_in_the_catalogue() -> None:
    todo = "write its file and tests, set kinds, summary, citation and url, and run `make catalogue readme pins`"
    assert "{slug}" in METHODS, f"{slug} is a skeleton: {{todo}}"
'''


def write_skeleton(slug: str, area: str, root: Path = ROOT) -> list[Path]:
    """Write both files below `root` and return their paths.

    Raises:
        ValueError: the slug or the area does not fit, or a file is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", slug):
        raise ValueError(f"SLUG is {slug!r}; lower-case letters, digits and _ are accepted, a letter first")
    if area not in AREAS:
        raise ValueError(f"AREA is {area!r}; accepted: {', '.join(AREAS)}")
    method = Path("src", *area_package(area).split("."), f"{slug}.py")
    test = Path("tests", "methods", area, f"test_{slug}.py")
    name = "".join(part.capitalize() for part in slug.split("_"))
    if slug in METHODS or (root / method).exists() or (root / method).with_suffix("").exists():
        raise ValueError(f"SLUG is {slug!r}; there is such a method already")
    texts = {method: METHOD, test: TEST}
    for path, docstring in ((method, f'"""Methods by area: {AREAS[area]}."""\n'), (test, "")):
        init = path.with_name("__init__.py")
        if not (root / init).exists():
            texts[init] = docstring
    for path, text in texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        filled = text.format(name=name, slug=slug) if path in (method, test) else text
        (root / path).write_text(filled, encoding="utf-8")
    return [root / path for path in texts]


def main() -> None:
    """Read slug and area from the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slug")
    parser.add_argument("area")
    given = parser.parse_args()
    try:
        for path in write_skeleton(given.slug, given.area):
            print(path.relative_to(ROOT))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
