"""`intaglio generate` under constraints: what it prints, and the sentence where it cannot."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from intaglio.cli.app import app
from tests.conftest import TinyDir

PROMPT = "the quick brown fox"
SCHEMA = {
    "type": "object", "properties": {"a": {"enum": ["the", "fox"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"], "additionalProperties": False,
}  # fmt: skip
TABLES = "create table fox (dog text, sun text)"


def run(*words: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["generate", *map(str, words)])
    assert result.exit_code == code, result.stderr
    return result


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "tables.sql").write_text(TABLES)
    (tmp_path / "words.lark").write_text('start: "the" (" fox" | " dog")')
    return tmp_path


@pytest.mark.parametrize("decoder", ["greedy", "sample", "prompt_lookup", "aded"])
def test_the_text_is_valid_and_streams(decoder: str, tiny_dir: TinyDir, files: Path) -> None:
    words = (
        tiny_dir("llama"),
        PROMPT,
        "--decoder",
        decoder,
        "--max-new-tokens",
        "60",
        "--regex",
        "[a-m]{2}( the){1,3}",
    )
    shown = run(*words)
    assert re.fullmatch("[a-m]{2}( the){1,3}", shown.stdout.strip("\n"))
    assert "tokens in" in shown.stderr
    document = json.loads(run(*words, "--json").stdout)
    assert document["text"] == shown.stdout.strip("\n")
    assert document["constraint"] == {"checks": 0, "log_probability": None}


def test_every_kind_of_constraint(tiny_dir: TinyDir, files: Path) -> None:
    words = (tiny_dir("llama"), PROMPT, "--max-new-tokens", "80")
    grammar = run(*words, "--grammar", files / "words.lark").stdout.strip()
    assert grammar in ("the fox", "the dog")
    assert run(*words, "--choices", " sun, river").stdout in ("sun\n", "river\n")
    document = run(*words, "--json-schema", files / "schema.json", "--decoder", "sample").stdout
    jsonschema.validate(json.loads(document), SCHEMA)
    connection = sqlite3.connect(":memory:")
    connection.execute(TABLES)
    result = CliRunner().invoke(app, ["generate", *map(str, words), "--sql", str(files / "tables.sql")])
    if result.exit_code == 0:
        connection.execute(result.stdout)
    else:
        assert "not complete after max_new_tokens = 80" in result.stderr or "no token" in result.stderr


def test_samples_have_weights(tiny_dir: TinyDir) -> None:
    words = (tiny_dir("llama"), PROMPT, "--regex", "(the|fox|dog)", "--samples", "12", "--max-new-tokens", "8")
    shown = run(*words)
    assert re.match(r"--- 1: weight [01]\.\d\d, particles \d+, length \d+\n(the|fox|dog)\n", shown.stdout)
    assert "log-probability of the constraint -" in shown.stderr
    document = json.loads(run(*words, "--json").stdout)
    assert sum(output["weight"] for output in document["outputs"]) == pytest.approx(1)
    assert sum(output["particles"] for output in document["outputs"]) <= 12
    assert document["constraint"]["log_probability"] < 0
    assert json.loads(run(*words, "--json").stdout)["outputs"] == document["outputs"]
    assert json.loads(run(*words, "--json", "--seed", "5").stdout)["outputs"] != document["outputs"]


BAD: list[tuple[list[str], str]] = [
    (["--regex", "("], "malformed"),
    (["--regex", "a", "--choices", "a,b"], "--regex and --choices are given; give one constraint"),
    (["--json-schema", "/nowhere.json"], "cannot be read"),
    (["--grammar", "/nowhere.lark"], "cannot be read"),
    (["--sql", "/nowhere.sql"], "cannot be read"),
    (["--choices", "a,,b"], "none of them empty"),
    (["--samples", "3"], "awrs needs a constraint"),
    (["--decoder", "awrs"], "awrs needs a constraint"),
    (["--decoder", "greedy", "--regex", "a", "--samples", "3"], "the decoder greedy does not draw; awrs does"),
    (["--regex", "a", "--samples", "3", "--set", "particles=2"], "--samples and --set particles are given"),
    (["--decoder", "aded", "--samples", "3", "--regex", "a"], "samples is 3, which the decoder aded does not draw"),
    (["--regex", "(fox ){30}", "--max-new-tokens", "4"], "not complete after max_new_tokens = 4 tokens: it ends in"),
    (["--json", "--regex", "(fox ){30}", "--max-new-tokens", "4"], "not complete after max_new_tokens = 4 tokens"),
    (
        ["--decoder", "prompt_lookup", "--regex", "(fox ){30}", "--max-new-tokens", "4"],
        "not complete after max_new_tokens = 4 tokens",
    ),
    (["--regex", "\u4e2d"], "no token of the vocabulary may begin"),
    (["--regex", "(fox ){30}", "--max-new-tokens", "4", "--samples", "3"], "none of 3 particles met the constraint"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "says"), BAD)
def test_what_cannot_be_met_is_one_sentence(words: list[str], says: str, tiny_dir: TinyDir) -> None:
    result = run(tiny_dir("llama"), PROMPT, "--max-new-tokens", "20", *words, code=2)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert says in line
    assert not result.stdout or "--json" not in words
    if result.stdout:  # what was streamed before ends its line
        assert result.stdout.endswith("\n")


def test_a_lossy_decoder_takes_no_constraint(tiny_dir: TinyDir) -> None:
    words = (
        tiny_dir("llama"),
        PROMPT,
        "--max-new-tokens",
        "9",
        "--decoder",
        "lud",
        "--set",
        "pad_token=5",
        "--regex",
        "a",
    )
    assert "which a constraint cannot follow" in run(*words, code=2).stderr
