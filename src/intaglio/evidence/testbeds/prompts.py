"""Prompts of five kinds for a chat model, clustered by the article or module that they are made from.

A source is a Wikipedia article (split as in `smollm2`) or a module of the standard library; no two sets share one. The
sources of a set alternate, an article and a module in turn, and each gives `each` prompts, so 40 sources give 200.

- `article`, `code`: a piece of the source, to continue.
- `summary`: a passage and the request to summarise it, as a chat turn.
- `retrieval`: passages of several articles and a question about one of them: a long prompt that contains its answer.
- `explain`: a function and the question what it does, as a chat turn.
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
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.smollm2 import BOUNDS, SmolLM2Wikipedia
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.evidence.testbeds.splits import Part, Prompt, check_part, draw, keyed, part_of

Kind = Literal["article", "summary", "retrieval", "code", "explain"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_OF_MODULES = frozenset({"code", "explain"})
_CHAT = frozenset({"summary", "retrieval", "explain"})


@dataclass(frozen=True)
class Prompts:
    """Number, kinds and lengths of the prompts.

    Without kinds of articles or of modules, all sources are of the other. The kinds take turns in the `each` prompts of
    a source. `passage` limits the tokens of a passage or function; a `retrieval` has `passages`, each from another
    article.
    """

    articles: SmolLM2Wikipedia = field(default_factory=SmolLM2Wikipedia)
    packages: tuple[str, ...] = (STANDARD_LIBRARY,)
    kinds: tuple[Kind, ...] = KINDS
    each: int = 5
    tokens: int = 64
    passage: int = 300
    passages: int = 3

    def load(self) -> Checkpoint:
        """Return the model, one shared object a process: copy it before changing it."""
        return self.articles.load()

    def toy(self, **changes: Any) -> SourceCode:
        """Return a small model of bytes with the same interface."""
        return self.articles.toy(**changes)

    def source(self, part: Part, index: int, base: int = 0) -> tuple[Prompt, ...]:
        """Return the prompts of the source at an index of a set; another base gives another order and other pieces."""
        check_part(part, BOUNDS)
        if _CHAT & set(self.kinds) and not self.load().tokenizer.chat_template:
            raise IntaglioError("a kind of prompt is a chat turn, and the tokenizer has no chat template")
        groups = [_sources(self, part, base, modules) for modules in (False, True) if self._own(modules)]
        place, group = index // len(groups), groups[index % len(groups)]
        if place >= len(group):
            raise IntaglioError(f"source {index} was requested; the {part} set has {len(group)} of its kind")
        modules = bool(self._own(True)) and (len(groups) == 1 or index % 2 == 1)
        kinds = self._own(modules)
        chosen = [kinds[number % len(kinds)] for number in range(self.each)]
        return tuple(
            Prompt(kind, group[place][0], tuple(self._ids(kind, group, place, number, f"{part}:{base}")))
            for number, kind in enumerate(chosen)
        )

    def corpus(self) -> Corpus:
        """Return the articles and modules of the training set, which tables of drafters may be counted in."""
        texts = self.articles.part("train").documents
        return Corpus("articles and modules (train)", (*texts, *(file.text for file in self.modules("train"))))

    def modules(self, part: Part) -> tuple[SourceFile, ...]:
        """Return the modules of a set."""
        check_part(part, BOUNDS)
        return _modules(self.packages, part)

    def _own(self, modules: bool) -> list[Kind]:
        return [kind for kind in self.kinds if (kind in _OF_MODULES) == modules]

    def _ids(self, kind: Kind, group: Sequence[tuple[str, Any]], place: int, number: int, key: str) -> Sequence[int]:
        """Token ids of the prompt `number` of the source at `place`."""
        name, ids = group[place]
        tokenizer: Any = self.load().tokenizer

        def piece(ids: Sequence[int], length: int) -> list[int]:
            """Return a random window of the part of the source that belongs to this prompt alone."""
            share = len(ids) // self.each
            start = number * share + keyed(f"prompts {key}:{number}", name) % (share - length + 1)
            return list(ids[start : start + length])

        if kind in ("article", "code"):
            return piece(ids, self.tokens)
        if kind == "explain":
            functions = _functions(self.packages, name, self.passage, self.load)
            code = functions[number // len(self._own(True)) % len(functions)]
            text = f"What does this function do?\n\n```python\n{code}\n```"
        elif kind == "summary":
            text = f"Summarize this text.\n\n{tokenizer.decode(piece(ids, self.passage))}"
        else:
            own = tokenizer.decode(piece(ids, self.passage))
            others = [group[(place + step) % len(group)][1] for step in range(1, self.passages)]
            passages = sorted([own, *(tokenizer.decode(piece(other, self.passage)) for other in others)])
            start = " ".join(own.split()[:8])
            question = f'What does the text that begins with "{start}" say? Answer with sentences of it.'
            text = "\n\n".join([*passages, question])
        return chat_turn(tokenizer, text)


def chat_turn(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a user's turn, up to where the answer begins."""
    turn = [{"role": "user", "content": text}]
    encoded: Any = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


@lru_cache(maxsize=16)
def _sources(bed: Prompts, part: Part, base: int, modules: bool) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """`(name, token ids)` of the sources that are long enough, in the order of the draw."""
    kinds = bed._own(modules)
    if modules:
        texts = {file.module: file.text for file in bed.modules(part)}
    else:
        corpus = bed.articles.part(part)
        texts = {name[:12]: text for name, text in zip(corpus.hashes, corpus.documents, strict=True)}
    piece = bed.passage if {"summary", "retrieval"} & set(kinds) else bed.tokens
    tokenizer, names, sources = bed.load().tokenizer, list(texts), []
    for index in draw(f"prompts {part}:{base}", names, len(names), f"{part} sources") if names else ():
        ids = tuple(tokenizer(texts[names[index]], add_special_tokens=False, verbose=False)["input_ids"])
        functions = _functions(bed.packages, names[index], bed.passage, bed.load) if "explain" in kinds else None
        if len(ids) >= bed.each * piece and (functions is None or len(functions) >= max(1, bed.each // len(kinds))):
            sources.append((names[index], ids))
    return tuple(sources)


@lru_cache(maxsize=8)
def _modules(packages: tuple[str, ...], part: Part) -> tuple[SourceFile, ...]:
    files = sorted(source_files(packages), key=lambda file: file.module)
    return tuple(file for file in files if part_of(file.module, BOUNDS) == part)


@lru_cache(maxsize=1024)
def _functions(packages: tuple[str, ...], module: str, most: int, load: Any) -> tuple[str, ...]:
    """Code without docstrings of a module's documented functions, those of at most `most` tokens."""
    tokenizer = load().tokenizer
    files = [file for file in source_files(packages) if file.module == module]
    codes = [pair.document for pair in pairs(files, "code")]
    return tuple(code for code in codes if len(tokenizer(code, add_special_tokens=False)["input_ids"]) <= most)
