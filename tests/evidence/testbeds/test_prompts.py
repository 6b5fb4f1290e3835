"""Prompts: split by source, seeded, of the requested length, and of their kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from intaglio.checkpoint import load
from intaglio.data.python_source import SourceFile
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds import prompts
from intaglio.evidence.testbeds.prompts import KINDS, Prompts
from intaglio.evidence.testbeds.smollm2 import BOUNDS, SmolLM2Wikipedia
from tests.families import tiny_checkpoint_dir

Make = Callable[..., Prompts]
PLAIN = {"kinds": ("article", "code")}


def module(number: int) -> SourceFile:
    text = "".join(
        f'def f{k}(x):\n    """Return the sum of x and {number} plus {k}."""\n'
        f"    total = x\n    total += {number}\n    total += {k}\n    return total\n\n\n"
        for k in range(2)
    )
    return SourceFile("one", f"one.m{number}", text, f"{number}")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Iterator[Make]:
    folder = tmp_path_factory.mktemp("bed")
    model = tiny_checkpoint_dir("llama", folder / "tiny", layers=1)
    checkpoint = load(model)
    checkpoint.tokenizer.chat_template = None
    checkpoint.save(folder / "plain")
    patch = pytest.MonkeyPatch()
    patch.setattr(prompts, "source_files", lambda packages: [module(number) for number in range(60)])
    for cache in (prompts._modules, prompts._functions, prompts._sources):
        cache.cache_clear()

    def bed(name: str = "tiny", **sizes: Any) -> Prompts:
        articles = SmolLM2Wikipedia(model=str(folder / name), texts=str(corpus_file))
        return Prompts(articles, packages=("one",), **({"tokens": 8, "passage": 200, "each": 1} | sizes))

    yield bed
    patch.undo()
    for cache in (prompts._modules, prompts._functions, prompts._sources):
        cache.cache_clear()


def test_every_kind_is_made_from_its_source(make: Make) -> None:
    tokenizer: Any = make().load().tokenizer
    (article,) = make(kinds=("article",)).source("evaluation", 0)
    assert any(tokenizer.decode(article.ids) in text for text in make().articles.part("evaluation").documents)
    (code,) = make(kinds=("code",)).source("evaluation", 0)
    texts = {file.module: file.text for file in make().modules("evaluation")}
    assert tokenizer.decode(code.ids) in texts[code.source]
    (explain,) = make(kinds=("explain",)).source("evaluation", 0)
    assert explain.source in texts
    assert "Return the sum" not in tokenizer.decode(explain.ids)  # the docstring would be the answer
    (summary,) = make(kinds=("summary",), passage=12).source("evaluation", 0)
    (retrieval,) = make(kinds=("retrieval",), passage=12).source("evaluation", 0)
    assert (summary.kind, retrieval.kind) == ("summary", "retrieval")
    assert len(retrieval.ids) > 3 * 12


def test_a_source_gives_its_kinds_in_turn_from_pieces_of_its_own(make: Make) -> None:
    bed = make(each=3, tokens=4, passage=120, kinds=("article", "code", "explain"))
    first, second = bed.source("evaluation", 0), bed.source("evaluation", 1)
    assert [prompt.kind for prompt in first] == ["article"] * 3
    assert [prompt.kind for prompt in second] == ["code", "explain", "code"]
    assert len({prompt.source for prompt in (*first, *second)}) == 2
    assert all(len(prompt.ids) == 4 for prompt in (*first, second[0], second[2]))
    assert len({prompt.ids for prompt in first}) == 3


def test_the_sets_share_no_article_and_no_module(make: Make) -> None:
    bed = make(**PLAIN)
    modules = {part: {file.module for file in bed.modules(part)} for part in BOUNDS}
    assert sum(map(len, modules.values())) == len(set.union(*modules.values())) == 60
    names = {part: {bed.source(part, index)[0].source for index in range(4)} for part in BOUNDS}
    assert sum(map(len, names.values())) == len(set.union(*names.values())) == 16
    learned = set(bed.corpus().documents)
    for part in ("validation", "pilot", "evaluation"):
        assert not learned & {file.text for file in bed.modules(part)}
        assert not learned & set(bed.articles.part(part).documents)


def test_prompts_follow_from_set_index_and_base_alone(make: Make) -> None:
    drawn = [make(**PLAIN).source("evaluation", index, 3) for index in range(4)]
    assert drawn == [make(**PLAIN).source("evaluation", index, 3) for index in range(4)]
    assert drawn != [make(**PLAIN).source("evaluation", index, 4) for index in range(4)]
    # Modules do not depend on whether articles are used too.
    assert make(kinds=("code",)).source("evaluation", 1, 3) == drawn[3]


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda make: make().source("test", 0), "there is no set 'test'"),
        (lambda make: make(**PLAIN).source("pilot", 500), "source 500 was requested; the pilot set has"),
        (lambda make: make("plain").source("pilot", 0), "the tokenizer has no chat template"),
    ],
)
def test_bad_requests_are_one_sentence(make: Make, ask: Callable[[Make], Any], sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence):
        ask(make)
    assert len(make("plain", **PLAIN).source("pilot", 1)) == 1
    assert len(KINDS) == 5
