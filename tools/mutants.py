"""Mutation test of the methods: change one thing at a time, and see whether the method's own tests notice.

    python tools/mutants.py                       # the seeded sample of 150; at least 85 % must be killed
    python tools/mutants.py --resume              # go on with a run that was stopped
    python tools/mutants.py --only lost --list    # the mutants of one method, not run

A mutant swaps an operator, drops a keyword argument, or changes a default or a preset. It is compiled in memory, in a
fork that has torch loaded, and its method's tests run with `-x`; a failure or a timeout kills it. Mutants that change
nothing a test could see stand in `mutants_equivalent.txt` with the reason, and are not counted.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
METHODS = SOURCE / "intaglio" / "methods"
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.txt")
FIELDS = "tests/test_conformance_fields.py"
MORE_TESTS = {slug: ["tests/methods/decoding/test_trained_heads.py"] for slug in ("chimera", "hidden_transfer")}
PRELOADED = (
    "hypothesis", "peft", "pytest", "scipy.stats", "sklearn.cluster", "sklearn.decomposition", "torch._dynamo",
    "tokenizers", "transformers.trainer", "transformers.generation.utils",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen3", "mistral", "gemma3", "phi3", "bert",
      "modernbert", "gpt_neox", "gpt2")),
)  # fmt: skip
SHARED = {"one_shot": "wanda", "prunable": "bip", "topk": "topk", "sparsity_target": "sparsity_target"}
"""Modules of an area that belong to no method alone, and the tests that stand for them."""
LEAST = 0.85

BINARY: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
COMPARE: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
PRESETS = ("paper", "released", "uniform", "top", "teal", "cats", "switch", "low_rank", "cola", "sltrain")


@dataclass(frozen=True)
class Mutant:
    """A change of one module: `edit` is the path of its node in the tree, `name` describes it without line numbers."""

    path: Path
    line: int
    name: str
    edit: tuple[Any, ...]

    @property
    def module(self) -> str:
        """Name of the module that it changes."""
        return ".".join(self.path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")

    @property
    def slug(self) -> str:
        """The method that it belongs to."""
        slug = self.path.relative_to(METHODS).with_suffix("").parts[1]
        return SHARED.get(slug, slug)

    def compile(self) -> Any:
        """Return the code of the changed module."""
        tree = ast.parse(self.path.read_text(encoding="utf-8"))
        *steps, change = self.edit
        node: Any = tree
        for step in steps:
            node = node[step] if isinstance(step, int) else getattr(node, step)
        change(node)
        return compile(ast.fix_missing_locations(tree), str(self.path), "exec")


def mutants(path: Path) -> Iterator[Mutant]:
    """Yield every mutant of a file."""
    counts: dict[str, int] = {}
    for line, scope, what, edit in _edits(ast.parse(path.read_text(encoding="utf-8")), (), ""):
        name = f"{path.relative_to(METHODS)} {scope}: {what}"
        counts[name] = counts.get(name, 0) + 1
        yield Mutant(path, line, name if counts[name] == 1 else f"{name} #{counts[name]}", edit)


def _edits(node: Any, at: tuple[Any, ...], scope: str) -> Iterator[tuple[int, str, str, tuple[Any, ...]]]:
    """Yield `(line, scope, description, edit)` of a node and those in it."""
    bounds = isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Annotated"
    if bounds or isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert):
        return
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        scope = f"{scope}.{node.name}".lstrip(".")
    for what, change in _changes(node, scope):
        yield getattr(node, "lineno", 0), scope, what, (*at, change)
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST):
                yield from _edits(child, (*at, field, index) if isinstance(value, list) else (*at, field), scope)


def _changes(node: Any, scope: str) -> Iterator[tuple[str, Any]]:
    """Yield the changes of one node: a description and a function that makes it."""
    text = ast.unparse(node) if isinstance(node, ast.expr) else ""
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in BINARY:
        yield f"operator in {ast.unparse(node)}", _set("op", BINARY[type(node.op)]())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        yield f"operator in {text}", _set("ops", [COMPARE[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.BoolOp):
        yield f"operator in {text}", _set("op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield f"operator in {text}", _set("op", ast.UAdd())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield f"operator in {text}", _set("operand", ast.UnaryOp(ast.Not(), node.operand))
    elif isinstance(node, ast.Call):
        for n, keyword in enumerate(node.keywords):
            if keyword.arg not in (None, "description", "progress", "stacklevel", "default_factory", "strict"):
                yield f"no {keyword.arg} in {text}", _drop(n)
    elif isinstance(node, ast.AnnAssign) and _other(node.value) is not None:
        yield f"default of {ast.unparse(node.target)}: {ast.unparse(node.value)}", _set("value", _other(node.value))
    elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper() and _other(node.value) is not None:
        yield f"default {ast.unparse(node)}", _set("value", _other(node.value))
    elif isinstance(node, ast.arguments):
        for field in ("defaults", "kw_defaults"):
            for n, value in enumerate(getattr(node, field)):
                if _other(value) is not None:
                    yield f"default {n} of {field} {ast.unparse(value)}", _item(field, n, _other(value))
    elif isinstance(node, ast.Dict) and scope.rpartition(".")[2] in PRESETS:
        for n, key in enumerate(node.keys):
            if isinstance(key, ast.Constant):
                yield f"preset without {key.value}", _pop(n)


def _other(value: Any) -> ast.expr | None:
    """Return another value for a number or a truth value."""
    if not isinstance(value, ast.Constant) or type(value.value) not in (int, float, bool):
        return None
    old = value.value
    return ast.Constant(not old if isinstance(old, bool) else old + 1 if isinstance(old, int) else old * 2 or 0.5)


def _set(field: str, value: Any) -> Any:
    return lambda node: setattr(node, field, value)


def _drop(n: int) -> Any:
    return lambda node: node.keywords.pop(n)


def _item(field: str, n: int, value: Any) -> Any:
    return lambda node: getattr(node, field).__setitem__(n, value)


def _pop(n: int) -> Any:
    return lambda node: (node.keys.pop(n), node.values.pop(n))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports the changed module instead of the file."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant, self._code = mutant, mutant.compile()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self._mutant.module:
            return None
        file = self._mutant.path
        package = [str(file.parent)] if file.name == "__init__.py" else None
        spec = importlib.util.spec_from_file_location(fullname, file, loader=self, submodule_search_locations=package)
        return spec

    def get_code(self, fullname: str) -> Any:
        return self._code

    def get_source(self, fullname: str) -> str:
        return self._mutant.path.read_text(encoding="utf-8")


def tests_of(slug: str) -> list[str]:
    """Return the test files of a method."""
    files = [*ROOT.glob(f"tests/methods/*/test_{slug}.py"), *ROOT.glob(f"tests/methods/*/test_{slug}_*.py")]
    return [*(str(file.relative_to(ROOT)) for file in files), *MORE_TESTS.get(slug, [])]


def run_tests(mutant: Mutant, log: Path, limit: int) -> int:
    """Fork a process that runs a mutant's tests, and return its id; it exits with 0 if all passed."""
    child = os.fork()
    if child:
        return child
    signal.setitimer(signal.ITIMER_PROF, limit)  # processor time: a busy machine kills no mutant
    signal.alarm(10 * limit)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    failed = True
    try:
        import pytest

        sys.meta_path.insert(0, _Finder(mutant))
        options = ["-x", "-q", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
        results = [int(pytest.main([*options, *some])) for some in ([FIELDS, "-k", mutant.slug], tests_of(mutant.slug))]
        failed = not {*results} <= {0, 5}  # 5: no test of that name
    finally:
        sys.stdout.flush()
        os._exit(int(failed))


def run_all(chosen: list[Mutant], jobs: int, limit: int, logs: Path, resume: bool) -> dict[str, str]:
    """Return the outcome of every mutant: killed, timeout or survived; `logs` keeps those that are known."""
    kept = logs / "outcomes.txt"
    lines = kept.read_text(encoding="utf-8").splitlines() if resume and kept.exists() else []
    known = {name: outcome for outcome, name in (line.split(" | ", 1) for line in lines)}
    outcomes = {mutant.name: known[mutant.name] for mutant in chosen if mutant.name in known}
    kept.write_text("".join(f"{outcome} | {name}\n" for name, outcome in outcomes.items()), encoding="utf-8")
    running: dict[int, Mutant] = {}
    waiting = [(number, mutant) for number, mutant in enumerate(chosen) if mutant.name not in outcomes]
    while waiting or running:
        while waiting and len(running) < jobs:
            number, mutant = waiting.pop(0)
            running[run_tests(mutant, logs / f"{number}.log", limit)] = mutant
        pid, status = os.wait()
        mutant = running.pop(pid)
        timeout = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
        outcomes[mutant.name] = "timeout" if timeout else "killed" if status else "survived"
        with kept.open("a", encoding="utf-8") as file:
            file.write(f"{outcomes[mutant.name]} | {mutant.name}\n")
        print(
            f"{len(outcomes):4d}/{len(chosen)} {outcomes[mutant.name]:8s} line {mutant.line} {mutant.name}", flush=True
        )
    return outcomes


def equivalents() -> dict[str, str]:
    """Return the reason of each mutant that changes nothing."""
    lines = EQUIVALENT.read_text(encoding="utf-8").splitlines() if EQUIVALENT.exists() else []
    return dict(line.split(" | ") for line in lines if line and not line.startswith("#"))


def main() -> None:
    """Run the sample and print the survivors and the share that was killed; exit with 1 below 85 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=150, help="mutants in the sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", help="mutants whose name contains this")
    parser.add_argument("--shard", default="1/1", help="run the n-th of m parts of the sample")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--limit", type=int, default=300, help="processor seconds for the tests of a mutant")
    parser.add_argument("--logs", type=Path, default=Path("build/mutants"), help="folder for the tests' output")
    parser.add_argument("--resume", action="store_true", help="keep the outcomes in the folder of logs")
    parser.add_argument("--list", action="store_true", help="print the sample and run nothing")
    given = parser.parse_args()
    os.chdir(ROOT)
    files = sorted(path for path in METHODS.rglob("*.py") if len(path.relative_to(METHODS).parts) > 1)
    files = [path for path in files if path.parent.parent != METHODS or path.name != "__init__.py"]
    every = [mutant for path in files for mutant in mutants(path)]
    sample = random.Random(given.seed).sample(every, min(given.count, len(every)))
    if given.only:
        sample = [mutant for mutant in every if given.only in mutant.name]
    part, parts = map(int, given.shard.split("/"))
    known = equivalents()
    chosen = [mutant for mutant in sample[part - 1 :: parts] if mutant.name not in known]
    if given.list:
        print(
            *(f"{mutant.slug:20s} {mutant.line:4d} {mutant.name}" for mutant in chosen),
            f"{len(every)} in all",
            sep="\n",
        )
        return
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(SOURCE))
    for name in PRELOADED:
        importlib.import_module(name)
    given.logs.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    outcomes = run_all(chosen, given.jobs, given.limit, given.logs, given.resume)
    killed = sum(outcome != "survived" for outcome in outcomes.values())
    print(*(f"survived: {name}" for name, outcome in outcomes.items() if outcome == "survived"), sep="\n")
    skipped = len(sample[part - 1 :: parts]) - len(chosen)
    print(
        f"{killed} of {len(outcomes)} killed ({killed / max(1, len(outcomes)):.0%}), {skipped} equivalent, "
        f"{time.monotonic() - began:.0f} s"
    )
    raise SystemExit(killed < LEAST * len(outcomes))


if __name__ == "__main__":
    main()
