from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from intaglio.data.docstrings import Pair, words
from intaglio.data.python_source import SourceFile
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds import docstrings
from intaglio.evidence.testbeds.docstrings import Docstrings
from intaglio.evidence.testbeds.splits import BOUNDS, Part, part_of

SIZES = {"training_pairs": 40, "queries_run": 10, "queries_pilot": 5, "documents_run": 20, "documents_pilot": 8}
TOPICS = ("apple", "basin", "cedar", "delta", "ember", "flint", "grove", "haven", "inlet", "jewel", "knoll", "linen")


def source(package: str, module: int) -> SourceFile:
    """Five functions; of each module the last is another module's."""
    functions = []
    for number in range(5):
        place = module * 5 + number if number < 4 else 999
        topic = f"{TOPICS[place % 12]} {TOPICS[place // 12 % 12]} number{place} of {package}"
        functions.append(
            f'def f{number}():\n    """Return the {topic}.\n\n    Long words about {topic} follow here until there'
            f' are enough of them, because a short text is no document at all.\n    """\n'
            f"    {package} = number{place}\n    x = {place}\n    return x\n"
        )
    return SourceFile(package, f"{package}.m{module}", "\n".join(functions), f"{package}{module}")


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two packages of sixty modules in the place of installed ones."""
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(docstrings, "source_files", lambda names: [source(names[0], module) for module in range(60)])
    docstrings._of_package.cache_clear()
    docstrings._collected.cache_clear()
    yield
    monkeypatch.undo()
    docstrings._of_package.cache_clear()
    docstrings._collected.cache_clear()


def bed(**changes: object) -> Docstrings:
    return Docstrings(
        **{"training_packages": ("one", "two"), "evaluation_packages": ("one", "two"), **SIZES, **changes}
    )  # type: ignore[arg-type]


def everything(of: Docstrings) -> dict[Part, tuple[Pair, ...]]:
    return {part: of.pairs(part) for part in BOUNDS}


@pytest.mark.parametrize("kind", ["code", "text"])
def test_the_sets_share_no_module_no_query_and_no_document(kind: str) -> None:
    sets = everything(bed(document=kind))
    assert all(sets.values())
    for shared in (lambda pair: pair.module, lambda pair: words(pair.query), lambda pair: words(pair.document)):
        values = [{shared(pair) for pair in pairs} for pairs in sets.values()]
        assert sum(map(len, values)) == len(set.union(*values))
    for part, pairs in sets.items():
        assert {part_of(pair.module) for pair in pairs} == {part}
    # Four functions of 60 modules in two packages, and one that all modules of a package have.
    assert sum(map(len, sets.values())) == 2 * (60 * 4 + 1)


def test_the_order_of_packages_and_files_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = bed()
    found, digest = everything(first), first.digest
    docstrings._of_package.cache_clear()
    docstrings._collected.cache_clear()
    monkeypatch.setattr(docstrings, "_of_package", lambda package, kind: tuple(reversed(list(_pairs(package, kind)))))
    assert everything(bed(training_packages=("two", "one"))) == found
    assert bed(evaluation_packages=("two", "one")).digest == digest


def _pairs(package: str, kind: docstrings.Kind) -> Iterator[Pair]:
    yield from docstrings.pairs([source(package, module) for module in range(60)], kind)


def test_training_and_retrieval_follow_from_seeds() -> None:
    here = bed()
    assert here.training(3) == bed().training(3)
    assert len({here.training(seed) for seed in range(10)}) == 10
    assert set(here.training(0)) <= set(here.pairs("train"))
    assert bed(training_pairs=10).training(0) == here.training(0)[:10]
    digests = {here.retrieval(part, base).digest for part in ("pilot", "evaluation") for base in range(5)}
    assert len(digests | {here.retrieval("validation", base).digest for base in (0, 1)}) == 12


def test_retrieval_is_in_the_form_of_metrics() -> None:
    here = bed()
    for found, part, queries, documents in (
        (here.retrieval("evaluation"), "evaluation", 10, 20),
        (here.retrieval("pilot"), "pilot", 5, 8),
        (here.retrieval("validation"), "validation", 5, 8),
    ):
        inside = {pair.id: pair for pair in here.pairs(part)}  # type: ignore[arg-type]
        assert (len(found.queries), len(found.documents)) == (queries, documents)
        assert found.relevant.keys() == found.queries.keys()
        for query, relevant in found.relevant.items():
            assert relevant == {f"d{query[1:]}": 1}
            assert found.queries[query] == inside[query[1:]].query
        assert all(inside[name[1:]].document == text for name, text in found.documents.items())
        # The place of a document says nothing about whether it is asked for.
        assert list(found.documents) == sorted(found.documents)


def test_other_packages_are_asked_than_learned() -> None:
    away = bed(training_packages=("one",), evaluation_packages=("two",))
    assert {pair.package for pair in away.training(0)} == {"one"}
    assert {
        name
        for text in away.retrieval("evaluation").documents.values()
        for name in ("one", "two")
        if f"of {name}" in text
    } == {"two"}
    assert not {pair.module for pair in away.pairs("train")} & {pair.module for pair in away.pairs("evaluation")}


def test_pairs_are_found_again_without_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = bed().pairs("train")
    docstrings._of_package.cache_clear()
    docstrings._collected.cache_clear()
    monkeypatch.setattr(docstrings, "pairs", lambda files, kind: pytest.fail("parsed again"))
    assert bed().pairs("train") == before


def test_the_digest_says_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = bed().digest
    assert bed(document="code").digest != before
    assert bed(training_pairs=1).digest == before
    docstrings._of_package.cache_clear()
    docstrings._collected.cache_clear()
    monkeypatch.setattr(docstrings, "source_files", lambda names: [source(names[0], module) for module in range(1, 60)])
    assert bed().digest != before


def test_too_few_pairs_and_unknown_sets_are_one_sentence() -> None:
    with pytest.raises(IntaglioError, match=r"5000 training pairs were requested; there are \d+"):
        bed(training_pairs=5000).training(0)
    with pytest.raises(IntaglioError, match="there is no set 'test'"):
        bed().pairs("test")  # type: ignore[arg-type]


def test_settings_compare_by_their_fields() -> None:
    assert Docstrings() == Docstrings(document="text")
    assert len({Docstrings(), Docstrings(), Docstrings(document="code")}) == 2
    assert asdict(Docstrings())["training_packages"] == ("sympy", "torch")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["code", "text"])
def test_the_real_packages(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from intaglio.evidence.testbeds.docstrings import Docstrings\n"
        f"bed = Docstrings(document={kind!r})\n"
        "assert not {p.module for p in bed.pairs('train')} & {p.module for p in bed.pairs('evaluation')}\n"
        "print(bed.digest, bed.training(0)[0].id, bed.retrieval('evaluation').digest)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert len(runs[0].split()) == 3
