"""Prompts of five kinds for a chat model, and the text that resembles them: for what speeds up or steers generation.

Every prompt is made from something that was sealed by its hash: a Wikipedia article (as in `smollm2`) or a module of
the standard library. So no two sets share an article or a module, and `corpus` has those of the training set alone.

    world = Prompts()
    for prompt in world.prompts("run", kinds=("article", "code")):
        model.generate(torch.tensor([prompt.ids]), custom_generate=decoder)

- `article`: the beginning of an article, to go on from.
- `code`: the beginning of a module, to go on from.
- `explain`: a function of a module and the question what it does, as a chat turn.
- `summary`: a passage and the request to summarise it, as a chat turn.
- `retrieval`: passages of several articles and a question about one of them, as a chat turn: a long prompt whose answer
  stands in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, get_args

from intaglio.checkpoint import Checkpoint
from intaglio.data.docstrings import pairs
from intaglio.data.python_source import STANDARD_LIBRARY, SourceFile, source_files
from intaglio.data.texts import Corpus
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.evidence.experiment import Stage
from intaglio.evidence.worlds.sealing import MEASURED, Bounds, Part, check_count, check_part, draw, part_of
from intaglio.evidence.worlds.smollm2 import Part as Articles
from intaglio.evidence.worlds.smollm2 import SmolLM2Wikipedia

Kind = Literal["article", "code", "explain", "summary", "retrieval"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BOUNDS: Bounds = {"train": (0, 400), "validation": (400, 500), "pilot": (500, 600), "evaluation": (600, 1000)}
"""Which remainders of a module's hash are in which set; those of articles are the same."""
_ARTICLES: dict[Part, Articles] = {
    "train": "fitting", "validation": "validation", "pilot": "pilot", "evaluation": "evaluation",
}  # fmt: skip
_TURNS = frozenset({"explain", "summary", "retrieval"})


@dataclass(frozen=True)
class Prompt:
    """What a model goes on from.

    Args:
        kind: which of the five.
        name: of the article or module that it is made from, and of the kind: no other prompt of its draw has it.
        ids: its tokens.
    """

    kind: Kind
    name: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Prompts:
    """The world: how many prompts, and how long.

    Args:
        articles: gives the model, whose tokenizer is used, and the articles. Default SmolLM2 with Wikipedia.
        packages: whose modules are taken. Default the standard library.
        tokens: of an `article` or `code` prompt. Default 64.
        passage: tokens of a passage in a `summary`, and the most of a function in an `explain`. Default 300.
        passages: of a `retrieval`, each of another article. Default 3.
        each_run: prompts of each kind in a run. Default 8.
        each_pilot: in a pilot, and for validation. Default 4.

    Raises:
        IntaglioError: a number is below 1.
    """

    articles: SmolLM2Wikipedia = field(default_factory=SmolLM2Wikipedia)
    packages: tuple[str, ...] = (STANDARD_LIBRARY,)
    tokens: int = 64
    passage: int = 300
    passages: int = 3
    each_run: int = 8
    each_pilot: int = 4

    def __post_init__(self) -> None:
        for name in ("tokens", "passage", "passages", "each_run", "each_pilot"):
            check_count(name, getattr(self, name))

    def load(self) -> Checkpoint:
        """The model, one object a process: copy it before it is carved."""
        return self.articles.load()

    def prompts(self, stage: Stage, base: int = 0, kinds: Sequence[Kind] = KINDS) -> tuple[Prompt, ...]:
        """What every run of a stage is measured on: equally many of each kind, one kind after the other.

        Args:
            stage: pilots have articles and modules of their own, and so has tuning.
            base: another seed base gives other prompts of the set.
            kinds: which. Default all.

        Raises:
            IntaglioError: a kind is unknown, or the set has too few articles or modules for it.
        """
        return self.draw(MEASURED[stage], self.each_run if stage == "run" else self.each_pilot, base, kinds)

    def training(self, seed: int, count: int, kinds: Sequence[Kind] = KINDS) -> tuple[Prompt, ...]:
        """Prompts to learn from, such as those that a model's own text is made with.

        Args:
            seed: decides them.
            count: of each kind.
            kinds: which. Default all.

        Raises:
            IntaglioError: as for `prompts`.
        """
        return self.draw("train", count, seed, kinds)

    def draw(self, part: Part, count: int, seed: int, kinds: Sequence[Kind] = KINDS) -> tuple[Prompt, ...]:
        """Prompts of a set.

        Args:
            part: which set.
            count: of each kind.
            seed: decides articles, modules and functions.
            kinds: which. Default all.

        Raises:
            IntaglioError: as for `prompts`.
        """
        check_part(part, BOUNDS)
        check_count("prompts of each kind", count)
        for kind in kinds:
            if kind not in KINDS:
                raise IntaglioError(f"there is no kind of prompt {kind!r}; {did_you_mean(kind, KINDS)}")
            if kind in _TURNS and not self.load().tokenizer.chat_template:
                raise IntaglioError(f"the kind of prompt {kind!r} is a chat turn, and the tokenizer has no template")
        return tuple(prompt for kind in kinds for prompt in self._of_kind(kind, part, count, f"{kind} {part}:{seed}"))

    def corpus(self) -> Corpus:
        """The articles and modules of the training set: what a drafter's table may be counted in."""
        texts = self.articles.part("fitting").documents
        return Corpus("articles and modules (train)", (*texts, *(file.text for file in self.modules("train"))))

    def modules(self, part: Part) -> tuple[SourceFile, ...]:
        """The modules of a sealed set.

        Args:
            part: which.
        """
        check_part(part, BOUNDS)
        return _modules(self.packages, part)

    def _of_kind(self, kind: Kind, part: Part, count: int, key: str) -> list[Prompt]:
        tokenizer = self.load().tokenizer
        what = f"{part} texts for the kind {kind}"
        if kind == "explain":
            functions = dict(_functions(self.packages, part))
            names = [f"{functions_of} {name}" for functions_of, name in functions]
            found = list(functions.values())
        elif kind == "code":
            files = self.modules(part)
            names, found = [file.module for file in files], [file.text for file in files]
        else:
            corpus = self.articles.part(_ARTICLES[part])
            names, found = [digest[:12] for digest in corpus.hashes], list(corpus.documents)
        least = {"article": self.tokens, "code": self.tokens, "explain": 1}.get(kind, self.passage)
        most = self.tokens if kind in ("article", "code") else self.passage
        # In the order of the draw, until there are enough that are long enough (and no function that is too long).
        wanted = count * self.passages if kind == "retrieval" else count
        drawn: list[tuple[str, list[int]]] = []
        for place in draw(f"prompts {key}", names, len(names), what):
            ids = tokenizer(found[place], add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= least and (kind != "explain" or len(ids) <= most):
                drawn.append((names[place], ids[:most]))
            if len(drawn) == wanted:
                break
        # Passages of a retrieval may come back in another one's, beside other articles.
        if len(drawn) < (max(count, self.passages) if kind == "retrieval" else count):
            raise IntaglioError(f"{count} {kind} prompts were asked for; the {part} set has texts for {len(drawn)}")
        return [self._written(kind, tokenizer, drawn, place) for place in range(count)]

    def _written(self, kind: Kind, tokenizer: Any, drawn: Sequence[tuple[str, list[int]]], place: int) -> Prompt:
        name, ids = drawn[place]
        if kind in ("article", "code"):
            return Prompt(kind, f"{kind} {name}", tuple(ids))
        text = tokenizer.decode(ids)
        if kind == "explain":
            text = f"What does this function do?\n\n```python\n{text}\n```"
        elif kind == "summary":
            text = f"Summarize this text.\n\n{text}"
        else:
            others = [drawn[(place + step * len(drawn) // self.passages) % len(drawn)] for step in range(self.passages)]
            asked = " ".join(text.split()[:8])
            texts = [tokenizer.decode(of_other) for _, of_other in sorted(others)]
            question = f'What does the text that begins with "{asked}" say? Answer with sentences of it.'
            text = "\n\n".join([*texts, question])
        turn = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )
        return Prompt(kind, f"{kind} {name}", tuple(turn["input_ids"]))


@lru_cache(maxsize=8)
def _modules(packages: tuple[str, ...], part: Part) -> tuple[SourceFile, ...]:
    found = sorted(source_files(packages), key=lambda file: file.module)
    return tuple(file for file in found if part_of(file.module, BOUNDS) == part)


@lru_cache(maxsize=8)
def _functions(packages: tuple[str, ...], part: Part) -> tuple[tuple[tuple[str, str], str], ...]:
    """`((module, name), code without docstring)` of the documented functions of a set's modules."""
    return tuple(((pair.module, pair.name), pair.document) for pair in pairs(_modules(packages, part), "code"))
