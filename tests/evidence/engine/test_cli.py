"""`prove`, `show` and `list` on the command line: results, and one sentence for bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from intaglio.cli.app import app
from intaglio.evidence.engine import pending, run, spot
from intaglio.evidence.engine import record as records
from intaglio.evidence.engine.run import prove

from .toy import Noise, toy_claim

KEYS = {"slug", "verdict", "effect", "interval", "delta", "units", "arms", "cost"}


def invoke(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(output: Any, part: str) -> None:
    assert output.exit_code == 2, output.output
    assert output.stdout == ""
    assert output.stderr.startswith("error: ")
    assert output.stderr.count("\n") == 1
    assert part in output.stderr


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of records with one of Wanda, and a claim of DSnoT that has not been run."""
    folder = tmp_path / "records"
    records.write_record(prove("wanda", claim=toy_claim(1.3), directory=tmp_path / "out"), folder / "wanda.json")
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "dsnot.py").touch()
    monkeypatch.setattr(records, "RECORDS", folder)
    monkeypatch.setattr(records, "CLAIMS", tmp_path / "claims")
    return folder


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("dsnott",), "no method named 'dsnott'; did you mean dsnot?"),
        (("magnitude",), "magnitude has no evidence yet"),
        (("wanda", "--tier", "tpu"), "the tier 'tpu' is unknown; accepted: cpu, gpu"),
        ((), "prove takes the slug of one method"),
        (("wanda", "dsnot"), "prove takes the slug of one method"),
        (("wanda", "--pending"), "prove takes the slug of one method"),
        (("magnitude", "--spot"), "magnitude has no evidence yet"),
    ],
)
@pytest.mark.parametrize("json", [(), ("--json",)])
def test_prove_refuses_in_one_sentence(
    words: tuple[str, ...], sentence: str, json: tuple[str, ...], tmp_path: Path
) -> None:
    refused(invoke("prove", *words, *json, "-o", tmp_path / "out"), sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--units", "2"), "units is 2; accepted: 3 to 10,000"),
        (("--seed-base", "-1"), "the seed base is -1"),
        (("--workers", "0"), "workers is 0"),
        (("--record", "--units", "5"), "--record takes neither --units nor another --seed-base"),
    ],
)
def test_prove_refuses_options_out_of_range(
    options: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_claim", lambda slug, tier=None: toy_claim())
    refused(invoke("prove", "wanda", *options, "-o", tmp_path / "out"), sentence)


def test_prove_prints_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_claim", lambda slug, tier=None: toy_claim(design=Noise(2.0)))
    words = ("prove", "wanda", "--units", "6", "--seed-base", "3", "-o", tmp_path)
    document = json.loads(invoke(*words, "--json").stdout)
    assert set(document) >= KEYS
    assert (document["slug"], document["units"], document["seed_base"]) == ("wanda", 6, 3)
    assert document == json.loads((tmp_path / "wanda-v1-seed3-units6" / "result.json").read_text())
    text = " ".join(invoke(*words).stdout.split())
    assert "better (method): the method" in text
    assert "wanda: undecided." in text
    assert f"results: {tmp_path}" in text


def test_show_and_list_give_verdict_effect_and_alternative(committed: Path) -> None:
    rows = {row["slug"]: row["verdict"] for row in json.loads(invoke("list", "--json").stdout)}
    assert (rows["wanda"], rows["magnitude"]) == ("worse", None)
    shown = json.loads(invoke("show", "wanda", "--json").stdout)
    assert shown["verdict"] == shown["evidence"]["verdict"] == "worse"
    assert "differences" not in shown["evidence"]
    assert "take plain training" in " ".join(invoke("show", "wanda").stdout.split())
    listed = invoke("list").stdout
    assert "worse" in listed
    assert "registered" in listed
    assert "registered, not yet run; `intaglio prove dsnot`" in " ".join(invoke("show", "dsnot").stdout.split())
    assert "no evidence yet" in invoke("show", "magnitude").stdout


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "is not a record of Intaglio, or is damaged"),
        ('{"slug": "wanda"}', "is not a record of Intaglio, or is damaged: its format is not 2"),
        ("foreign", "is the record of 'wanda', not of 'magnitude'"),
    ],
)
def test_a_damaged_or_foreign_record_is_one_sentence(committed: Path, content: str, part: str) -> None:
    text = (committed / "wanda.json").read_text() if content == "foreign" else content
    (committed / "magnitude.json").write_text(text)
    refused(invoke("show", "magnitude"), part)
    refused(invoke("list", "--json"), part)


def test_show_marks_a_record_of_an_earlier_version(committed: Path) -> None:
    earlier = replace(records.read_record(committed / "wanda.json"), slug="dsnot", version=1)
    records.write_record(earlier, committed / "dsnot.json")
    text = " ".join(invoke("show", "dsnot").stdout.split())
    assert "The claim was: The method" in text
    assert "This record is of version 1 of the claim; version" in text


def test_spot_prints_a_sentence_for_each_record(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot, "load_claim", lambda slug: toy_claim(1.3))
    assert "inside the 99 % prediction interval" in " ".join(invoke("prove", "wanda", "--spot").stdout.split())
    (document,) = json.loads(invoke("prove", "wanda", "--spot", "--json").stdout)
    assert (document["slug"], document["inside"]) == ("wanda", True)


def test_pending_prints_a_sentence_for_each_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "prove_pending", lambda minutes, workers: iter([f"wanda: {minutes:g} {workers}"]))
    assert invoke("prove", "--pending", "--minutes", "7", "--workers", "2").stdout == "wanda: 7 2\n"
    assert json.loads(invoke("prove", "--pending", "--json").stdout) == ["wanda: 60 1"]
