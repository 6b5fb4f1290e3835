"""Calibration draws and evaluation windows of articles, on a tiny model instead of SmolLM2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.prompts import Prompts
from intaglio.evidence.testbeds.smollm2 import BOUNDS, SmolLM2Wikipedia
from tests.families import tiny_checkpoint_dir

Small = Callable[..., SmolLM2Wikipedia]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Small:
    model = tiny_checkpoint_dir("llama", tmp_path_factory.mktemp("bed") / "tiny", layers=1)

    def make(**sizes: int) -> SmolLM2Wikipedia:
        default = {"samples": 4, "length": 24, "documents_run": 6, "documents_pilot": 4, "tokens": 20}
        return SmolLM2Wikipedia(model=str(model), texts=str(corpus_file), **(default | sizes))

    return make


def test_the_sets_share_no_article_and_calibration_uses_no_measured_one(small: Small) -> None:
    bed = small()
    sets = {part: set(bed.part(part).documents) for part in BOUNDS}
    assert sum(map(len, sets.values())) == len(set.union(*sets.values()))
    names = {part: {name[:12] for name in bed.part(part).hashes} for part in BOUNDS}
    for seed in range(5):
        assert set(bed.calibration(seed).names) <= names["train"] | names["validation"]
        assert set(bed.calibration(seed, "validation").names) <= names["train"]
        for part in ("validation", "pilot", "evaluation"):
            assert set(bed.documents(part, seed).names) <= names[part]


def test_windows_follow_from_the_seed_and_have_their_length(small: Small) -> None:
    assert small().calibration(1).segments.digest == small().calibration(1).segments.digest
    assert len({small().calibration(seed).segments.digest for seed in range(5)}) == 5
    assert small().calibration(0).segments.ids_NT.shape == (4, 24)
    assert small().documents("evaluation").segments.ids_NT.shape == (6, 20)
    assert small().documents("pilot").segments.ids_NT.shape == (4, 20)


def test_too_few_long_articles_are_one_sentence(small: Small) -> None:
    with pytest.raises(IntaglioError, match=r"6 evaluation articles of 5000 tokens were requested; there are 0"):
        small(tokens=5000).documents("evaluation")
    with pytest.raises(IntaglioError, match="there is no set 'test'"):
        small().part("test")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_real_sources_give_two_hundred_prompts() -> None:
    bed = Prompts()
    drawn = [prompt for index in range(40) for prompt in bed.source("evaluation", index)]
    assert len({prompt.ids for prompt in drawn}) == len(drawn) == 200
    assert len({prompt.source for prompt in drawn}) == 40
    assert len(bed.source("pilot", 5)) == len(bed.source("validation", 5)) == 5
