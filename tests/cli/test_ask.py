"""The commands `ask` and `index compress`."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from intaglio.cli import ask
from intaglio.methods.retrieval.refrag import Refrag
from intaglio.search import Hit, Index
from tests.cli.test_search import outcome, refused, run
from tests.trainer.helpers import TEXTS, checkpoint

FIELDS: dict[str, Any] = {"chunk_size": 4, "encoder_width": 16, "encoder_depth": 1, "length": 16, "target_length": 8,
                          "steps": 1, "batch_size": 2, "stages": ["continual"], "expand": 0.2}  # fmt: skip
QUESTION = "which fox"
LIMIT = ["--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index, a fitted model and a plain one."""
    folder = tmp_path_factory.mktemp("ask")
    ckpt = checkpoint(layers=1)
    ckpt.save(folder / "plain")
    Refrag(**FIELDS).fit(ckpt, TEXTS[:6])
    ckpt.save(folder / "fitted")
    _index(folder / "index")
    return folder


def _index(path: Path) -> None:
    with Index.create(path, chunk=0) as index:
        index.add({"id": f"doc{n}", "text": text[:36], "title": f"Fox {n}"} for n, text in enumerate(TEXTS[:4]))


def answered(*words: Any) -> Any:
    return json.loads(run("ask", *words, *LIMIT, "--json").stdout)


def test_an_answer_names_its_sources_and_its_time(made: Path) -> None:
    result = run("ask", made / "index", QUESTION, made / "plain", "-k", 2, *LIMIT)
    assert [line.split(",")[0] for line in result.stdout.splitlines()[-2:]] == ["[1] doc0  Fox 0", "[2] doc1  Fox 1"]
    assert "time to first token:" in result.stderr
    assert "plain prompt" not in result.stderr


def test_passages_are_compressed_once_and_give_the_same_answer(made: Path, tmp_path: Path) -> None:
    _index(tmp_path / "index")
    words = [tmp_path / "index", QUESTION, made / "fitted", "--compress", 4, "-k", 2]
    first, second = answered(*words), answered(*words)
    assert (first["compressed"]["cached"], second["compressed"]["cached"]) == (0, 2)
    assert first["answer"] == second["answer"]
    assert first["positions"] < first["plain_positions"]
    assert first["seconds_to_first_token"] > 0
    assert first["plain_seconds_to_first_token"] > 0
    shown = run("ask", *words, *LIMIT).stderr
    assert "2 of 2 passages from the cache" in shown
    assert "plain prompt" in shown
    with Index.open(tmp_path / "index") as index:
        index.add([{"id": "doc0", "text": f"{TEXTS[9][:36]} which"}])
    third = answered(*words)
    assert third["compressed"]["cached"] == 1  # the changed document is compressed again
    with sqlite3.connect(tmp_path / "index" / "index.db") as db:
        assert db.execute("SELECT count(*) FROM passage_tensors").fetchone() == (2,)


def test_all_expanded_is_the_plain_answer(made: Path) -> None:
    words = [made / "index", QUESTION, made / "fitted", "-k", 2]
    plain = answered(*words, "--compress", 4, "--expand", 1)
    assert plain["positions"] == plain["plain_positions"]
    assert answered(*words, "--compress", 4, "--expand", 0)["positions"] < plain["positions"]


def test_an_index_is_compressed_ahead(made: Path, tmp_path: Path) -> None:
    _index(tmp_path / "index")
    assert "4 passages compressed, 0 were" in run("index", "compress", tmp_path / "index", made / "fitted").stdout
    again = json.loads(run("index", "compress", tmp_path / "index", made / "fitted", "--json").stdout)
    assert (again["passages"], again["compressed"]) == (4, 0)
    words = [tmp_path / "index", QUESTION, made / "fitted", "--compress", 4, "-k", 2]
    assert answered(*words)["compressed"]["cached"] == 2
    # The losses that a perplexity expander needs are added to what is cached.
    assert answered(*words, "--expander", "low_perplexity")["compressed"]["cached"] == 2
    with Index.open(tmp_path / "index") as index:
        hits = index.search(QUESTION, 2)
        method = Refrag(**FIELDS)
        assert method.slug == "refrag"
        assert {hit.id for hit in hits} == {"doc0", "doc1"}


def test_an_index_is_compressed_in_batches(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = 0, []
    passages = Index.passages

    def counted(index: Index) -> Iterator[Hit]:
        nonlocal read
        for hit in passages(index):
            read += 1
            yield hit

    def compressed(cache: Any, method: Any, checkpoint: Any, hits: list[Hit]) -> tuple[list[Any], int]:
        seen.append((read, [hit.id for hit in hits]))
        return [], 0

    monkeypatch.setattr(Index, "passages", counted)
    monkeypatch.setattr(ask, "_compressed", compressed)
    monkeypatch.setattr(ask, "BATCH", 3)
    assert "4 passages compressed" in run("index", "compress", made / "index", made / "fitted").stdout
    assert seen == [(3, ["doc0", "doc1", "doc2"]), (4, ["doc3"])]


def test_passages_that_do_not_fit_are_left_out(made: Path) -> None:
    result = json.loads(run("ask", made / "index", QUESTION, made / "plain", "--max-new-tokens", 40, "--json").stdout)
    assert 1 <= len(result["sources"]) < 4
    assert result["positions"] <= 88
    shown = run("ask", made / "index", QUESTION, made / "plain", "--max-new-tokens", 40).stderr
    assert f"{4 - len(result['sources'])} passages do not fit into the context" in shown


def test_what_is_refused_in_one_sentence(made: Path, tmp_path: Path) -> None:
    index, plain, fitted = made / "index", made / "plain", made / "fitted"
    assert "nothing of refrag is attached" in refused("ask", index, QUESTION, plain, "--compress", 4)
    assert "--compress is 8" in refused("ask", index, QUESTION, fitted, "--compress", 8)
    assert "belong to --compress" in refused("ask", index, QUESTION, fitted, "--expand", 0.5)
    assert "expander" in refused("ask", index, QUESTION, fitted, "--compress", 4, "--expander", "best")
    assert "the question takes" in refused("ask", index, f"fox {'why ' * 150}", plain)
    assert "no passage of" in refused("ask", index, "zebra", plain)
    assert "no index" in refused("ask", made, QUESTION, plain)
    assert "nothing of refrag is attached" in refused("index", "compress", index, plain)
    _index(tmp_path / "index")
    with sqlite3.connect(tmp_path / "index" / "index.db") as db:
        db.execute("UPDATE documents SET text = ?", (zlib.compress(b" " * 36),))
    sentence = refused("ask", tmp_path / "index", QUESTION, fitted, "--compress", 4)
    assert "has no text of" in sentence
    assert outcome("ask", tmp_path / "index", QUESTION, fitted, "--compress", 0).exit_code == 2
