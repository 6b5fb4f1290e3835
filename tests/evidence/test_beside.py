"""The code on record is taken out of the history, is the one on record by hash, and runs in a process of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from intaglio.errors import IntaglioError
from intaglio.evidence import beside, record, renew, sources
from intaglio.evidence.experiment import Unit
from intaglio.evidence.record import Record
from intaglio.evidence.run import prove
from tests.evidence.toy import Toy, toy

OLD = {
    "__init__.py": "",
    "machine.py": "from contextlib import nullcontext\n\ndef with_threads(count):\n    return nullcontext()\n",
    "evidence/__init__.py": "",
    "evidence/sources.py": "def of_slug(slug):\n    return {'intaglio.old': slug}\n",
    "evidence/experiment.py": (
        "from dataclasses import dataclass\n\n@dataclass\nclass Unit:\n    stage: str\n    index: int\n    base: int\n"
    ),
    "evidence/run.py": (
        "import json\nfrom pathlib import Path\n\nclass Said(dict):\n"
        "    def model_dump_json(self):\n        return json.dumps(self)\n\n"
        "def experiment_of(slug, tier):\n    return None\n\n"
        "def outcomes(experiment, tasks, workers):\n"
        "    print('a library speaks')\n"
        "    runs = json.loads(Path(__file__).with_name('results').joinpath('wanda.json').read_text())['runs']\n"
        "    for arm, unit in tasks:\n"
        "        yield Said(next(r for r in runs if (r['stage'], r['index'], r['arm']) == ('run', unit.index, arm)))\n"
    ),
}
"""A package as it may have looked when the record was made: its runs are those on record, whatever today's give."""


def git(root: Path, *words: str) -> None:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b.c")
    subprocess.run(["git", "-C", str(root), *identity, *words], check=True, capture_output=True)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a record in a repository whose last commit has code that gives its values."""
    document = prove("wanda", experiment=toy(), directory=tmp_path / "out", units=5)
    document["sources"] = {"intaglio.old": "wanda"}
    package = tmp_path / "repository" / "src" / "intaglio"
    for name, text in OLD.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    path = package / "evidence" / "results" / "wanda.json"
    path.parent.mkdir()
    path.write_text(json.dumps(document))
    (tmp_path / "repository" / "pyproject.toml").touch()
    git(tmp_path / "repository", "init", "--quiet")
    git(tmp_path / "repository", "add", ".")
    git(tmp_path / "repository", "commit", "--quiet", "-m", "Record")
    monkeypatch.setattr(record, "RESULTS", path.parent)
    monkeypatch.setattr(beside, "ROOT", tmp_path / "repository")
    monkeypatch.setattr(sources, "PACKAGE", package)
    return path


def found() -> Record:
    read = record.shipped("wanda")
    assert read is not None
    return read


def test_the_code_on_record_runs_in_its_own_process(shipped: Path) -> None:
    tasks = [(arm, Unit("run", 0)) for arm in ("method", "baseline")]
    with beside.code_of(found()) as code:
        runs = list(code.runs(found(), tasks, workers=1))
        assert (code.path / "intaglio" / "machine.py").read_text() == OLD["machine.py"]
    assert not code.path.exists()
    on_record = {run.key: run for run in found().runs}
    assert [run.arm for run in runs] == ["method", "baseline"]
    assert all(on_record[run.key] == run for run in runs)


def test_code_that_is_not_the_one_on_record_is_refused(shipped: Path) -> None:
    document = json.loads(shipped.read_text())
    document["sources"] = {"intaglio.old": "another"}
    shipped.write_text(json.dumps(document))
    with pytest.raises(IntaglioError, match="is not the one that the record names"), beside.code_of(found()):
        pass


def test_code_that_no_longer_runs_is_said_with_its_last_words(shipped: Path) -> None:
    broken = shipped.parent.parent / "run.py"
    broken.write_text("from transformers import Gone\n")
    git(shipped.parents[4], "commit", "--quiet", "-am", "Break")
    shipped.write_text(shipped.read_text() + "\n")
    git(shipped.parents[4], "commit", "--quiet", "-am", "Record again")
    with (
        beside.code_of(found()) as code,
        pytest.raises(IntaglioError, match=r"does not run with the libraries that are installed: ImportError"),
    ):
        list(code.runs(found(), [("method", Unit("run", 0))], workers=1))


def test_a_record_in_no_commit_is_said(shipped: Path) -> None:
    other = shipped.with_name("dsnot.json")
    other.write_text(json.dumps(json.loads(shipped.read_text()) | {"slug": "dsnot"}))
    read = record.shipped("dsnot")
    assert read is not None
    with pytest.raises(IntaglioError, match="is in no commit here"), beside.code_of(read):
        pass


def moved(shipped: Path) -> None:
    """Other values on record than any code gives here, as another machine would have left them."""
    document = json.loads(shipped.read_text())
    for one in document["runs"]:
        for values in one["outcome"]["values"].values():
            values.update({name: value + 1e-9 for name, value in values.items()})
    shipped.write_text(json.dumps(document))


def test_the_same_values_beside_it_renew_a_record_of_another_machine(
    shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "of_slug", lambda slug: {"intaglio.new": "1"})
    moved(shipped)
    before = json.loads(shipped.read_text())
    with pytest.raises(IntaglioError, match=r"does not give what is on record .* --beside compares"):
        renew.renew("wanda", experiment=toy())
    assert json.loads(shipped.read_text()) == before
    seen: list[tuple[int, int]] = []
    told = renew.renew("wanda", beside=True, experiment=toy(), progress=lambda d, t, w: seen.append((d, t)))
    after = json.loads(shipped.read_text())
    assert seen == [(k, 6) for k in range(1, 7)]
    assert {key for key in after if after[key] != before.get(key)} == {"sources", "renewed", "beside"}
    assert after["beside"] == told["beside"]
    assert len(after["beside"]) == 40
    assert after["sources"] == {"intaglio.new": "1"}


@pytest.mark.parametrize(
    ("runner", "sentence"),
    [
        (Toy(effect=1.1), "does not give what the code on record gives here"),
        (Toy(unfair=True), r"does not give what the code on record gives here \(other data\)"),
    ],
)
def test_other_values_beside_it_keep_it_stale(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, runner: Toy, sentence: str
) -> None:
    monkeypatch.setattr(sources, "of_slug", lambda slug: {"intaglio.new": "1"})
    content = shipped.read_bytes()
    with pytest.raises(IntaglioError, match=sentence):
        renew.renew("wanda", beside=True, experiment=toy(runner, settings={"effect": 1.0}))
    assert shipped.read_bytes() == content


def test_other_data_than_on_record_are_no_comparison(shipped: Path) -> None:
    read = found()
    one = read.runs[0]
    other = one.model_copy(update={"outcome": one.outcome.model_copy(update={"shared": {"data": "another"}})})
    with pytest.raises(IntaglioError, match="are not those on record, so nothing can be compared"):
        renew._check_data(one, other)
