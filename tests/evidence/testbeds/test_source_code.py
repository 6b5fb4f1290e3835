"""Dimension letters: N windows, T bytes of a window."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds import cached_models, source_code
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.evidence.testbeds.splits import BOUNDS, part_of
from intaglio.measures.language_modeling import quality

END = 258
NAMES = ["alpha", "beta", "gamma", "delta", "value", "count", "total", "index", "name", "item", "ä"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 files of made-up source, one of them twice."""
    root = tmp_path_factory.mktemp("source") / "made_up"
    root.mkdir()
    draw = random.Random(0)
    for number in range(120):
        lines = [f"# File {number}."] + [
            f"{draw.choice(NAMES)} = {draw.choice(NAMES)} + {draw.randint(0, 99)}" for _ in range(draw.randint(2, 30))
        ]
        (root / f"m{number}.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (root / "twice.py").write_bytes((root / "m0.py").read_bytes())
    return root


@pytest.fixture
def small(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SourceCode:
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cached_models, "_loaded", {})
    return SourceCode(
        folder=str(folder), width=16, depth=1, context=32, steps=6, batch=4, samples=4, documents_run=8,
        documents_pilot=4, tokens=40,
    )  # fmt: skip


def test_the_sets_are_all_files_and_share_none(small: SourceCode, folder: Path) -> None:
    sets = {part: small.part(part) for part in BOUNDS}
    assert all(len(corpus) for corpus in sets.values())
    documents = [document for corpus in sets.values() for document in corpus.documents]
    assert len(documents) == len(set(documents)) == 120
    assert set(documents) == {path.read_text(encoding="utf-8") for path in folder.glob("m*.py")}
    for part, corpus in sets.items():
        assert {part_of(name) for name in corpus.hashes} == {part}


def test_the_name_of_a_file_decides_nothing(small: SourceCode, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    for place, path in enumerate(sorted(folder.iterdir(), reverse=True)):
        (other / f"z{place:03}.py").write_bytes(path.read_bytes())
    moved = replace(small, folder=str(other))
    assert moved.digest == small.digest
    for part in BOUNDS:
        assert moved.part(part).documents == small.part(part).documents
    assert moved.training(1).digest == small.training(1).digest
    assert moved.documents("evaluation").segments.digest == small.documents("evaluation").segments.digest
    (other / "z000.py").write_text("X = 1\n")
    assert replace(small, folder=str(other / "..") + "/elsewhere").digest != small.digest


def test_training_windows_are_pieces_of_training_files(small: SourceCode) -> None:
    segments = small.training(0)
    assert segments.ids_NT.shape == (6 * 4, 32)
    documents = [document.encode() for document in small.part("train").documents]
    ended = 0
    for row in segments.ids_NT.tolist():
        pieces = [bytes(piece) for piece in _split(row, END)]
        ended += len(pieces) > 1
        assert all(any(piece in document for document in documents) for piece in pieces)
        # Between two ends a whole file stands.
        assert all(piece in documents for piece in pieces[1:-1])
    assert ended
    assert len({small.training(seed).digest for seed in range(10)}) == 10
    more = replace(small, steps=9).training(0)
    assert torch.equal(more.ids_NT[:24], segments.ids_NT)


def _split(row: list[int], end: int) -> list[list[int]]:
    pieces: list[list[int]] = [[]]
    for token in row:
        if token == end:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return pieces


@pytest.mark.parametrize(
    ("part", "take", "shape"),
    [
        ("evaluation", lambda bed, seed: bed.documents("evaluation", seed), (8, 40)),
        ("pilot", lambda bed, seed: bed.documents("pilot", seed), (4, 40)),
        ("validation", lambda bed, seed: bed.documents("validation", seed), (4, 40)),
        ("train", lambda bed, seed: bed.calibration(seed), (4, 32)),
    ],
)
def test_windows_are_of_different_files_of_their_set(
    small: SourceCode, part: Any, take: Callable[[SourceCode, int], Any], shape: tuple[int, int]
) -> None:
    corpus = small.part(part)
    texts = {name[:12]: text.encode() for name, text in zip(corpus.hashes, corpus.documents, strict=True)}
    for seed in range(3):
        windows = take(small, seed)
        assert windows.segments.ids_NT.shape == shape
        assert len(set(windows.names)) == shape[0]
        for name, row in zip(windows.names, windows.segments.ids_NT.tolist(), strict=True):
            assert bytes(row) in texts[name]
    assert len({take(small, seed).segments.digest for seed in range(6)}) == 6
    assert take(small, 4).segments.digest == take(replace(small), 4).segments.digest


def test_a_new_model_fits_the_bed(small: SourceCode) -> None:
    model: Any = small.new(3).model
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (16, 1)
    assert small.new(3).context == 40
    assert small.new(3, width=32).config.hidden_size == 32
    assert small.new(3).tokenizer.eos_token_id == END
    same = small.new(3).model.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, same[name]) for name, value in small.new(4).model.state_dict().items())


def test_a_trained_model_is_trained_once_and_found_again(small: SourceCode, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(cached_models, "train", _counted(cached_models.train, calls))
    steps: list[int] = []
    first = small.trained(progress=lambda done, total, what: steps.append(done))
    assert small.trained() is first is small.load()
    assert steps[-1] == 6
    cached_models._loaded.clear()
    again = small.trained()
    assert again is not first
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in first.model.state_dict().items())
    # What it is measured on does not decide it.
    assert replace(small, documents_run=3, samples=2).trained() is again
    assert calls == [1]
    assert first.tokenizer.eos_token_id == END
    assert first.record.steps[-1].slug == "train"
    small.trained(seed=1)
    replace(small, steps=7).trained()
    assert len(calls) == 3
    assert torch.get_num_threads() == 1


def _counted(train: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def counted(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        return train(*arguments, **more)

    return counted


def test_training_helps(small: SourceCode) -> None:
    longer = replace(small, steps=40)
    windows = longer.documents("evaluation").segments
    fresh, done = quality(longer.new(0), windows).losses, quality(longer.trained(), windows).losses
    assert sum(done) < 0.8 * sum(fresh)


def test_a_killed_training_resumes_to_the_same_weights(
    small: SourceCode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bed = replace(small, steps=20)

    def kill(done: int, total: int, what: str) -> None:
        if done == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bed.trained(progress=kill)
    steps: list[int] = []
    resumed = bed.trained(progress=lambda done, total, what: steps.append(done))
    assert steps == list(range(11, 21))  # a state is kept every second step
    assert not list(tmp_path.glob("home/testbeds/*.scratch"))
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path / "another"))
    unbroken = bed.trained()
    assert unbroken is not resumed
    state = unbroken.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.model.state_dict().items())


def test_a_killed_training_of_another_version_of_the_library_starts_again(small: SourceCode, tmp_path: Path) -> None:
    bed = replace(small, steps=20)

    def kill(done: int, total: int, what: str) -> None:
        if done == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bed.trained(progress=kill)
    (file,) = tmp_path.glob("home/testbeds/*.scratch/run.json")
    saved = json.loads(file.read_text())
    saved["arguments"]["removed_option"] = 1
    file.write_text(json.dumps(saved))
    steps: list[int] = []
    bed.trained(progress=lambda done, total, what: steps.append(done))
    assert steps == list(range(1, 21))
    assert not list(tmp_path.glob("home/testbeds/*.scratch"))


def test_too_little_source_is_one_sentence(small: SourceCode) -> None:
    with pytest.raises(IntaglioError, match=r"8 evaluation files of 5000 bytes were requested; there are 0"):
        replace(small, tokens=5000).documents("evaluation")
    with pytest.raises(IntaglioError, match=r"the training files have \d+ bytes; a window of 1000000 is needed"):
        replace(small, context=1_000_000).training(0)
    with pytest.raises(IntaglioError, match="there is no set 'test'"):
        small.part("test")  # type: ignore[arg-type]


def test_settings_compare_by_their_fields() -> None:
    assert SourceCode() == SourceCode(width=128)
    assert len({SourceCode(), SourceCode(), SourceCode(width=64)}) == 2
    assert asdict(SourceCode())["packages"] == ("stdlib",)


def test_the_real_source_is_enough_for_the_defaults() -> None:
    bed = SourceCode()
    sizes = {part: len(bed.part(part)) for part in BOUNDS}
    assert sum(sizes.values()) > 400
    for part in ("validation", "pilot"):
        assert bed.documents(part).segments.ids_NT.shape == (bed.documents_pilot, 256)
    assert bed.documents("evaluation").segments.ids_NT.shape == (bed.documents_run, 256)
    source_code._stream.cache_clear()


@pytest.mark.slow
def test_the_cached_model_has_learned() -> None:
    bed = SourceCode()
    losses = quality(bed.trained(), bed.documents("evaluation").segments, batch_size=16).losses
    bits = sum(losses) / len(losses) / 0.6931471805599453
    assert 1.7 < bits < 2.3
