"""`prove`, `show` and `list` on the command line: answers, and refusals of one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from intaglio.cli.app import app
from intaglio.evidence import record, run
from intaglio.evidence.run import prove
from tests.evidence.toy import Toy, toy

KEYS = {"slug", "verdict", "effect", "interval", "delta", "units", "arms", "cost"}


def said(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(found: Any, part: str) -> None:
    assert found.exit_code == 2
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    assert part in found.stderr


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of records with one of Wanda in it, which decides nothing."""
    folder = tmp_path / "results"
    folder.mkdir()
    document = prove("wanda", experiment=toy(Toy(0.5, noise=4.0)), directory=tmp_path / "out", units=8)
    (folder / "wanda.json").write_text(json.dumps(document))
    monkeypatch.setattr(record, "RESULTS", folder)
    return folder


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("dsnott",), "no method named 'dsnott'; did you mean dsnot?"),
        (("magnitude",), "magnitude has no experiment yet"),
        (("dsnot", "--units", "0"), "units is 0; an interval needs at least 2"),
        (("dsnot", "--tier", "gpu"), "not made for the tier gpu; accepted: cpu"),
        (("dsnot", "--tier", "tpu"), "the tier 'tpu' is unknown; accepted: cpu, gpu"),
        (("dsnot", "--seed-base", "-1"), "the seed base is -1"),
        (("dsnot", "--renew", "--units", "3"), "leave out the other options"),
    ],
)
@pytest.mark.parametrize("json", [(), ("--json",)])
def test_prove_refuses_in_one_sentence(
    words: tuple[str, ...], sentence: str, json: tuple[str, ...], tmp_path: Path
) -> None:
    refused(said("prove", *words, *json, "-o", tmp_path / "out"), sentence)
    assert not (tmp_path / "out").exists()


def test_a_machine_without_the_tier_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "experiment_of", lambda slug, tier=None: toy(tier="gpu"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(said("prove", "wanda", "-o", tmp_path), "the tier gpu needs a CUDA device, and this machine has none")


def test_a_record_of_the_gpu_tier_names_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Abacus 9000")
    document = prove("wanda", experiment=toy(tier="gpu"), directory=tmp_path, units=4)
    assert (document["tier"], document["versions"]["device"]) == ("gpu", "Abacus 9000")
    assert document["command"] == "intaglio prove wanda --seed-base 0 --tier gpu --units 4"
    assert (tmp_path / "wanda-seed0-gpu-units4" / "result.json").is_file()
    assert "device" not in prove("wanda", experiment=toy(), directory=tmp_path, units=4)["versions"]


def test_the_tier_is_the_claims_if_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for tiers in (("gpu", "cpu"), ("cpu",)):
        monkeypatch.setattr("intaglio.evidence.dsnot.EXPERIMENTS", {tier: toy(tier=tier) for tier in tiers})
        assert run.experiment_of("dsnot").tier == tiers[0]
        assert run.experiment_of("dsnot", "cpu").tier == "cpu"


def test_prove_prints_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "experiment_of", lambda slug, tier=None: toy(Toy(0.5, noise=4.0)))
    words = ("prove", "wanda", "--units", "6", "--seed-base", "3", "-o", tmp_path)
    found = json.loads(said(*words, "--json").stdout)
    assert set(found) >= KEYS
    assert (found["slug"], found["units"], found["seed_base"]) == ("wanda", 6, 3)
    assert found == json.loads((tmp_path / "wanda-seed3-units6" / "result.json").read_text())
    plain = " ".join(said(*words).stdout.split())
    assert "underpowered" in plain
    assert "0.3 was aimed at. By the spread of this run that would take about" in plain
    assert f"results: {tmp_path}" in plain


def test_show_and_list_read_the_committed_record(committed: Path) -> None:
    path = committed / "wanda.json"
    document = json.loads(path.read_text())
    rows = {row["slug"]: row["verdict"] for row in json.loads(said("list", "--json").stdout)}
    assert rows["wanda"] == "underpowered"
    assert rows["magnitude"] is None
    shown = json.loads(said("show", "wanda", "--json").stdout)
    assert (shown["verdict"], shown["stale"]) == ("underpowered", [])
    assert shown["evidence"]["interval"] == document["interval"]
    assert "runs" not in shown["evidence"]
    text = said("show", "wanda").stdout
    assert "twice" in text  # a secondary
    assert "Stale" not in text
    assert "(stale)" not in said("list").stdout
    path.write_text(json.dumps(document | {"sources": {}}))
    assert "Stale: " in said("show", "wanda").stdout
    assert "(stale)" in said("list").stdout


def test_show_says_what_there_is_without_a_record(committed: Path) -> None:
    assert "its claim was not stated as an experiment yet" in " ".join(said("show", "magnitude").stdout.split())
    text = " ".join(said("show", "dsnot").stdout.split())  # registered, and its record is not in this folder
    assert "not yet run. On SmolLM2-135M" in text
    assert "`intaglio prove dsnot` runs it." in text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "no record of Intaglio, or a damaged one"),
        ('{"slug": "wanda"}', "no record of Intaglio, or a damaged one: claim: Field required"),
        ("foreign", "is the record of 'wanda', not of 'magnitude'"),
    ],
)
def test_a_corrupt_or_foreign_record_is_one_sentence(committed: Path, content: str, part: str) -> None:
    text = (committed / "wanda.json").read_text() if content == "foreign" else content
    (committed / "magnitude.json").write_text(text)
    refused(said("show", "magnitude"), part)
    refused(said("list", "--json"), part)
