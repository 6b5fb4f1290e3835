"""Prompts: sealed, seeded, of the length that was asked for, and what they say they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from intaglio.checkpoint import load
from intaglio.data.python_source import SourceFile
from intaglio.errors import IntaglioError
from intaglio.evidence.worlds import prompts
from intaglio.evidence.worlds.prompts import BOUNDS, KINDS, Prompts
from intaglio.evidence.worlds.sealing import Part
from intaglio.evidence.worlds.smollm2 import SmolLM2Wikipedia
from tests.families import tiny_checkpoint_dir

PARTS: tuple[Part, ...] = ("train", "validation", "pilot", "evaluation")
Make = Callable[..., Prompts]


def module(number: int) -> SourceFile:
    text = "".join(
        f'def f{k}(x):\n    """Return the sum of x and {number} plus {k}."""\n'
        f"    total = x\n    total += {number}\n    total += {k}\n    return total\n\n\n"
        for k in range(2)
    )
    return SourceFile("one", f"one.m{number}", text, f"{number}")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Iterator[Make]:
    folder = tmp_path_factory.mktemp("world")
    model = tiny_checkpoint_dir("llama", folder / "tiny", layers=1)
    checkpoint = load(model)
    checkpoint.tokenizer.chat_template = None
    checkpoint.save(folder / "plain")
    patch = pytest.MonkeyPatch()
    patch.setattr(prompts, "source_files", lambda packages: [module(number) for number in range(60)])
    prompts._modules.cache_clear()
    prompts._functions.cache_clear()

    def world(name: str = "tiny", **sizes: int) -> Prompts:
        articles = SmolLM2Wikipedia(model=str(folder / name), texts=str(corpus_file))
        default = {"tokens": 8, "passage": 200, "each_run": 4, "each_pilot": 2}
        return Prompts(articles, packages=("one",), **(default | sizes))

    yield world
    patch.undo()
    prompts._modules.cache_clear()
    prompts._functions.cache_clear()


def short(make: Make, **sizes: int) -> Prompts:
    """Passages as short as the articles of the tests."""
    return make(**({"passage": 12} | sizes))


def test_every_kind_is_what_it_says(make: Make) -> None:
    world = make()
    tokenizer = world.load().tokenizer
    article, *_ = world.prompts("run", kinds=("article",))
    assert any(tokenizer.decode(article.ids) in text for text in world.articles.part("evaluation").documents)
    code, *_ = world.prompts("run", kinds=("code",))
    texts = {f"code {file.module}": file.text for file in world.modules("evaluation")}
    assert list(code.ids) == tokenizer(texts[code.name], add_special_tokens=False)["input_ids"][:8]
    explain, *_ = world.prompts("run", kinds=("explain",))
    said = tokenizer.decode(explain.ids)
    assert len(explain.name.split()) == 3
    assert "Return the sum" not in said  # the docstring would be the answer
    (found,) = short(make, each_run=1).prompts("run", kinds=("summary",))
    assert found.kind == "summary"
    (found,) = short(make, each_run=1, passages=3).prompts("run", kinds=("retrieval",))
    assert len(found.ids) > 3 * 12


def test_lengths_and_numbers(make: Make) -> None:
    world = make()
    for kind in ("article", "code"):
        assert [len(p.ids) for p in world.prompts("run", kinds=(kind,))] == [8] * 4  # type: ignore[arg-type]
    found = world.prompts("pilot", kinds=("code", "article"))
    assert [p.kind for p in found] == ["code", "code", "article", "article"]
    assert len({p.name for p in found}) == 4
    assert len(world.training(0, 5, kinds=("code",))) == 5


def test_the_sets_share_no_article_and_no_module(make: Make) -> None:
    world = make()
    modules = {part: {file.module for file in world.modules(part)} for part in PARTS}
    assert sum(map(len, modules.values())) == len(set.union(*modules.values())) == 60
    for kind in ("article", "code", "explain"):
        names = {
            part: {p.name for seed in range(5) for p in world.draw(part, 2, seed, (kind,))}  # type: ignore[arg-type]
            for part in PARTS
        }
        assert sum(map(len, names.values())) == len(set.union(*names.values()))
    learned = set(world.corpus().documents)
    for part in ("validation", "pilot", "evaluation"):
        assert not learned & {file.text for file in world.modules(part)}  # type: ignore[arg-type]
        assert not learned & set(world.articles.part(part).documents)  # type: ignore[arg-type]


def test_they_follow_from_stage_and_base_alone(make: Make) -> None:
    world, kinds = make(), ("article", "code", "explain")
    assert world.prompts("run", 3, kinds) == make().prompts("run", 3, kinds)  # type: ignore[arg-type]
    assert world.prompts("run", 3, kinds) != world.prompts("run", 4, kinds)  # type: ignore[arg-type]
    assert world.prompts("tuning", 0, ("code",)) == world.draw("validation", 2, 0, ("code",))
    # One kind does not depend on which others are asked for, and fewer are the first ones of more.
    assert world.prompts("run", 0, ("code",)) == world.prompts("run", 0, ("article", "code"))[4:]
    assert make(each_run=2).prompts("run", 0, ("code",)) == world.prompts("run", 0, ("code",))[:2]


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda world: world.prompts("run", kinds=("cod",)), "no kind of prompt 'cod'; did you mean code?"),
        (lambda world: world.draw("test", 1, 0), "there is no set 'test'"),
        (lambda world: world.draw("pilot", 0, 0), "0 prompts of each kind"),
        (lambda world: world.draw("pilot", 500, 0, ("code",)), "500 code prompts were asked for; the pilot set has"),
    ],
)
def test_bad_questions_are_one_sentence(make: Make, ask: Callable[[Prompts], Any], sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence):
        ask(make())


def test_without_a_template_there_is_no_chat(make: Make) -> None:
    assert len(make("plain").prompts("pilot", kinds=("code",))) == 2
    with pytest.raises(IntaglioError, match="is a chat turn, and the tokenizer has no template"):
        make("plain").prompts("pilot")


def test_sizes_are_checked() -> None:
    with pytest.raises(IntaglioError, match="0 passages"):
        Prompts(passages=0)
    assert set(BOUNDS) == set(PARTS)
    assert len(KINDS) == 5
