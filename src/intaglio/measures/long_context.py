"""Nine long-context tasks of the Sparse Frontier study: generators of a requested length, prompts and scores.

| task | needs | score |
| --- | --- | --- |
| `niah` | a few values among many key-value sentences | share of right values |
| `vt` | the chain of variables that holds a value | intersection over union |
| `cwe` | the words that occur most | intersection over union |
| `retrieval` | facts of several chapters of a story | share of right answers |
| `multi_hop` | the item acquired before another | right or wrong |
| `filtering` | the chapters without a purchase | intersection over union |
| `qa` | a passage of a user's document | F1 of the sets of words |
| `quality`, `toefl` | a user's document and lettered choices | right or wrong, as a set of letters |

The last two differ in their documents alone, so both are `MultipleChoice` on a file. An empty or unparsable answer is
wrong.
The question comes before and after the context, or only after it.

Source: Nawrot et al., The Sparse Frontier, 2025, arXiv 2504.17768; code PiotrNawrot/sparse-frontier, whose scores of
`multi_hop` and `filtering` skip empty answers; here they count as 0. Its story templates are replaced by short ones.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal, Protocol

from intaglio.data.json_lines import json_lines
from intaglio.errors import IntaglioError

Condition = Literal["before and after", "after"]
CONDITIONS: tuple[Condition, ...] = ("before and after", "after")
Count = Callable[[str], int]
"""Number of tokens of a text."""
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class TaskSample:
    """A context, the question about it, the form of the answer and the gold answer.

    Args:
        intro: what the context is.
        context: text of about the requested length.
        question: about the context.
        form: of the answer.
        gold: right answers; what they mean is the task's.
        score: of an answer, 0 to 1.
    """

    intro: str
    context: str
    question: str
    form: str
    gold: tuple[str, ...]
    score: Callable[[str], float] = field(repr=False)

    def parts(self, condition: Condition, explain: bool) -> tuple[str, str]:
        """Return the prompt up to the end of the context, and from the question on."""
        asked = f"\n\nQuestion: {self.question}" if condition == "before and after" else ""
        steps = "First explain in a sentence how you know. Then write" if explain else "Write"
        return (
            f"{self.intro}{asked}\n\n<context>\n{self.context}\n</context>\n",
            f"\nQuestion: {self.question}\n{steps} the answer as <answer>{self.form}</answer>\n",
        )


def extracted(text: str) -> str:
    """Return the tagged answer of an output, or "" without a tag."""
    match = _ANSWER.search(text)
    return match[1].strip() if match else ""


def items(answer: str) -> set[str]:
    """Return the words of an answer's lines, without numbers of a list, in lower case."""
    lines = (re.sub(r"^\s*\d+[.:)]\s+", "", line) for line in answer.splitlines())
    return {word for line in lines for word in re.findall(r"[\w-]+", line.lower())}


def overlap(answer: set[str], gold: set[str]) -> float:
    """Return the intersection over union; 0 of an empty answer."""
    return len(answer & gold) / len(answer | gold) if answer else 0.0


def numbered(answer: str) -> dict[int, str]:
    """Return the lines of a numbered list, the first of each number; a single plain line is number 1."""
    lines: dict[int, str] = {}
    for line in answer.splitlines():
        match = re.match(r"\s*(\d+)[.:)]\s*(.+?)\s*$", line)
        if match:
            lines.setdefault(int(match[1]), match[2])
    return lines or ({1: answer.strip()} if answer.strip() else {})


def normal(text: str) -> str:
    """Return a text in lower case, without articles at its start, end punctuation and double spaces."""
    return re.sub(r"^(the|an|a)\s+", "", " ".join(text.lower().split())).strip(" .")


class LongContextTask(Protocol):
    """A generator of samples; equal random states give equal samples."""

    name: ClassVar[str]

    def sample(self, rng: Random, tokens: int, count: Count) -> TaskSample:
        """Return a sample whose context has at most `tokens` tokens, and nearly as many."""
        ...


def _fill(needed: Sequence[str], more: Callable[[int], str], tokens: int, count: Count, what: str) -> list[str]:
    """Return the needed pieces and as many others as fit.

    Raises:
        IntaglioError: the needed ones alone are too long.
    """
    room = tokens - sum(count(f" {piece}") for piece in needed)
    if room < 0:
        raise IntaglioError(f"a context of {tokens} tokens is too short for {what}; {tokens - room} are needed")
    others: list[str] = []
    while (piece := more(len(others))) and (room := room - count(f" {piece}")) >= 0:
        others.append(piece)
    return [*needed, *others]


def _fresh(rng: Random, used: set[str], make: Callable[[], str]) -> str:
    while (text := make()) in used:
        pass
    used.add(text)
    return text


@dataclass(frozen=True)
class NeedleInAHaystack:
    """Queried keys among random key-value sentences of the same form.

    Args:
        queries: keys in the question. Default 4.
        parts: groups of 8 letters and digits of a key and of a value; 0 gives keys and values of 4 digits, which
            small models can copy. Default 4.
    """

    name: ClassVar[str] = "niah"
    queries: int = 4
    parts: int = 4

    def _code(self, rng: Random) -> str:
        if not self.parts:
            return "".join(rng.choices(string.digits, k=4))
        groups = ("".join(rng.choices(string.ascii_lowercase + string.digits, k=8)) for _ in range(self.parts))
        return "-".join(groups)

    def sample(self, rng: Random, tokens: int, count: Count) -> TaskSample:
        """Return key-value sentences in random order, and a question for some of the keys."""
        used: set[str] = set()

        def sentence() -> tuple[str, str, str]:
            key, value = (_fresh(rng, used, lambda: self._code(rng)) for _ in "kv")
            return key, value, f"The value for key {key} is: {value}."

        asked = [sentence() for _ in range(self.queries)]
        limit = 4000 if not self.parts else 1 << 30  # of 10,000 codes two are used a sentence
        sentences = _fill(
            [text for *_, text in asked], lambda n: sentence()[2] if n < limit else "", tokens, count, "the needles"
        )
        rng.shuffle(sentences)
        gold = tuple(value for _, value, _ in asked)

        def score(answer: str) -> float:
            lines = numbered(extracted(answer))
            return sum(
                value in re.findall(r"[\w-]+", lines.get(i, "").lower()) for i, value in enumerate(gold, 1)
            ) / len(gold)

        return TaskSample(
            "The context holds keys and their values.",
            " ".join(sentences),
            f"What are the values for the keys {', '.join(key for key, *_ in asked)}, in this order?",
            "\n".join(f"{i}. VALUE" for i in range(1, self.queries + 1)),
            gold,
            score,
        )


@dataclass(frozen=True)
class VariableTracking:
    """Chains of variable assignments in noise; asked are the variables that hold the first chain's number.

    Args:
        chains: chains of assignments. Default 8.
        hops: copies after the number of each chain. Default 4.
    """

    name: ClassVar[str] = "vt"
    NOISE: ClassVar[str] = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    chains: int = 8
    hops: int = 4

    def sample(self, rng: Random, tokens: int, count: Count) -> TaskSample:
        """Return assignments in random order among noise."""
        used: set[str] = set()
        names = [
            [_fresh(rng, used, lambda: "".join(rng.choices(string.ascii_uppercase, k=5))) for _ in range(self.hops + 1)]
            for _ in range(self.chains)
        ]
        values = rng.sample(range(10_000, 100_000), self.chains)
        lines = [
            f"VAR {name} = {value if i == 0 else f'VAR {chain[i - 1]}'}"
            for chain, value in zip(names, values, strict=True)
            for i, name in enumerate(chain)
        ]
        lines = _fill(lines, lambda n: self.NOISE, tokens, count, "the chains")
        rng.shuffle(lines)
        gold = tuple(names[0])
        return TaskSample(
            "The context assigns numbers to variables, or variables to variables, in any order.",
            " ".join(lines),
            f"Which variables resolve to the value {values[0]}, directly or through other variables?",
            "NAME NAME ...",
            gold,
            lambda answer: overlap(items(extracted(answer)) - {"var"}, {name.lower() for name in gold}),
        )


@dataclass(frozen=True)
class CommonWords:
    """A numbered list in which a few words occur much more often than the others.

    Args:
        words: frequent words. Default 10.
        frequency: of each of them. Default 30.
        rare: frequency of every other word. Default 3.
    """

    name: ClassVar[str] = "cwe"
    words: int = 10
    frequency: int = 30
    rare: int = 3

    def sample(self, rng: Random, tokens: int, count: Count) -> TaskSample:
        """Return words in random order."""
        used: set[str] = set()

        def word() -> str:
            return _fresh(
                rng,
                used,
                lambda: "".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(rng.choice((2, 3)))),
            )

        gold = tuple(word() for _ in range(self.words))
        listed = [w for w in gold for _ in range(self.frequency)]
        number = count("\n1000. ")
        room = tokens - sum(number + count(f" {w}") for w in listed)
        if room < 0:
            raise IntaglioError(
                f"a context of {tokens} tokens is too short for the words of {self.name}; {tokens - room} are needed"
            )
        while (room := room - self.rare * (number + count(f" {(other := word())}"))) >= 0 and len(used) < 3_000:
            listed += [other] * self.rare
        rng.shuffle(listed)
        return TaskSample(
            "The context is a numbered list of words.",
            "\n".join(f"{i}. {w}" for i, w in enumerate(listed, 1)),
            f"Which {self.words} words occur {self.frequency} times each? All others occur {self.rare} times each.",
            "\n".join(f"{i}. WORD" for i in range(1, self.words + 1)),
            gold,
            lambda answer: overlap(items(extracted(answer)), set(gold)),
        )


_PLACES = ("harbour", "library", "observatory", "vineyard", "monastery", "market", "lighthouse", "quarry", "garden")
_ADJECTIVES = ("old", "northern", "quiet", "royal", "sunken", "golden", "narrow", "hidden", "grey", "upper", "windy")
_NAMES = ("Mara", "Tomas", "Ilse", "Bruno", "Petra", "Anselm", "Greta", "Hugo", "Lena", "Oskar", "Rosa", "Viktor")
_TRADES = ("baker", "pilot", "weaver", "miller", "doctor", "painter", "smith", "clerk", "singer", "farmer", "printer")
_MATERIALS = ("silver", "copper", "amber", "oak", "ivory", "glass", "velvet", "marble", "crystal", "bronze", "leather")
_THINGS = (
    "compass",
    "lantern",
    "flute",
    "mirror",
    "goblet",
    "whistle",
    "dagger",
    "ledger",
    "mask",
    "ring",
    "telescope",
)
_ASIDES = (
    "The weather changed twice that day, and nobody spoke of it.",
    "Arion wrote a short letter home and did not send it.",
    "A cart passed slowly, and its driver waved.",
    "In the evening the lamps were lit early.",
    "Arion counted the remaining coins and was content.",
    "Rain fell on the road until noon.",
)


@dataclass(frozen=True)
class _Chapter:
    number: int
    place: str
    person: str
    item: str
    buys: bool

    def text(self, aside: str) -> str:
        bought = (
            f"Before leaving, Arion bought the {self.item}." if self.buys else "Arion looked around and bought nothing."
        )
        return (
            f"Chapter {self.number}. Arion travelled to the {self.place}. {aside} There Arion met {self.person}, and "
            f"they talked for an hour. {bought}"
        )


def _story(rng: Random, tokens: int, count: Count, least: int, without: int = 0) -> tuple[list[_Chapter], str]:
    """Return the chapters of a story and its text; `without` of them have no purchase."""
    places, persons, things = (
        [f"{a} {b}" for a in first for b in second]
        for first, second in (
            (_ADJECTIVES, _PLACES),
            (_NAMES, tuple(f"the {t}" for t in _TRADES)),
            (_MATERIALS, _THINGS),
        )
    )
    for pool in (places, persons, things):
        rng.shuffle(pool)
    most = min(map(len, (places, persons, things)))
    chapters: list[_Chapter] = []
    asides: list[str] = []
    room = tokens
    while len(chapters) < most:
        n = len(chapters)
        chapter, aside = _Chapter(n + 1, places[n], persons[n], things[n], True), " ".join(rng.sample(_ASIDES, 2))
        room -= count(f"\n\n{chapter.text(aside)}")
        if room < 0:
            break
        chapters.append(chapter)
        asides.append(aside)
    if len(chapters) < least:
        raise IntaglioError(f"a context of {tokens} tokens holds {len(chapters)} chapters; {least} are needed")
    empty = set(rng.sample(range(len(chapters)), without))
    chapters = [_Chapter(c.number, c.place, c.person, c.item, i not in empty) for i, c in enumerate(chapters)]
    return chapters, "\n\n".join(c.text(aside) for c, aside in zip(chapters, asides, strict=True))


_STORY = "The context is a story in chapters."


@dataclass(frozen=True)
class StoryRetrieval:
    """Questions for the place, the person or the item of a chapter.

    Args:
        queries: questions. Default 16.
    """

    name: ClassVar[str] = "retrieval"
    queries: int = 16

    def sample(self, rng: Random, tokens: int, count: Count) -> TaskSample:
        """Return a story and questions about some chapters."""
        chapters, text = _story(rng, tokens, count, self.queries)
        questions, gold = [], []
        for i, chapter in enumerate(rng.sample(chapters, self.queries), 1):
            what, answer = rng.choice(
                (
                    ("Where did Arion travel", chapter.place),
                    ("Whom did Arion meet", chapter.person),
                    ("What did Arion buy", chapter.item),
                )
            )
            questions.append(f"{i}. {what} in chapter {chapter.number}?")
            gold.append(answer)

        def score(answer: str) -> float:
            lines = numbered(extracted(answer))
            return sum(normal(lines.get(i, "")) == normal(g) for i, g in enumerate(gold, 1)) / len(gold)

        form = "\n".join(f"{i}. ANSWER" for i in range(1, self.queries + 1))
        return TaskSample(_STORY, text, " ".join(questions), form, tuple(gold), score)


@dataclass(frozen=True)
class StoryMultiHop:
    """The last item that was bought before another one."""

    name: ClassVar[str] = "multi_hop"

    def sample(self, rng: Random, tokens: int, count: Count) -> TaskSample:
        """Return a story and an item whose predecessor is asked for."""
        chapters, text = _story(rng, tokens, count, 2)
        place = rng.randrange(1, len(chapters))
        gold = chapters[place - 1].item
        return TaskSample(
            _STORY,
            text,
            f"What was the last item that Arion bought before the {chapters[place].item}?",
            "ITEM",
            (gold,),
            lambda answer: float(normal(extracted(answer)) == gold),
        )


@dataclass(frozen=True)
class StoryFiltering:
    """The chapters without a purchase.

    Args:
        chapters: how many there are. Default 3.
    """

    name: ClassVar[str] = "filtering"
    chapters: int = 3

    def sample(self, rng: Random, tokens: int, count: Count) -> TaskSample:
        """Return a story in which some chapters have no purchase."""
        chapters, text = _story(rng, tokens, count, self.chapters + 1, self.chapters)
        gold = tuple(str(chapter.number) for chapter in chapters if not chapter.buys)
        return TaskSample(
            _STORY,
            text,
            f"In which {self.chapters} chapters did Arion buy nothing?",
            "NUMBER, NUMBER, ...",
            gold,
            lambda answer: overlap(set(re.findall(r"\d+", extracted(answer))), set(gold)),
        )


@dataclass(frozen=True)
class QuestionedDocument:
    """A user's document with a question; `choices` are the options of a lettered question, else empty."""

    context: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


def read_documents(path: str | Path) -> list[QuestionedDocument]:
    """Read documents from JSON lines `{"context", "question", "answer"}`, with `choices` and letters as the answer.

    Raises:
        IntaglioError: a line without these keys, an answer that names no choice, or a single document.
    """
    needed = '{"context": ..., "question": ..., "answer": ...}, and for letters "choices": [...]'
    documents = []
    for where, value in json_lines(path, "documents", needed):
        row: dict[str, Any] = value if isinstance(value, dict) else {}
        answer, choices = row.get("answer"), row.get("choices", [])
        answers: list[Any] = answer if isinstance(answer, list) else [answer]
        texts = [row.get("context"), row.get("question"), *answers, *(choices if isinstance(choices, list) else [None])]
        if not all(isinstance(text, str) and text.strip() for text in texts) or not answers:
            raise IntaglioError(f"{where} is no document with a question; lines are {needed}")
        letters = string.ascii_uppercase[: len(choices)]
        if choices and not set("".join(answers).upper()) <= set(letters):
            raise IntaglioError(f"{where}: the answer {''.join(answers)!r} is none of the letters {letters}")
        documents.append(QuestionedDocument(row["context"], row["question"], tuple(answers), tuple(choices)))
    if len({document.context for document in documents}) < 2:
        raise IntaglioError(f"{path} holds one context; another one is needed to pack it to a length")
    return documents


def _packed(
    rng: Random, chosen: QuestionedDocument, others: Sequence[QuestionedDocument], tokens: int, count: Count
) -> str:
    """Return the chosen document among others, in random order."""
    distinct = list(dict.fromkeys(d.context for d in others if d.context != chosen.context))
    rng.shuffle(distinct)
    texts = _fill([chosen.context], lambda n: distinct[n] if n < len(distinct) else "", tokens, count, "the document")
    rng.shuffle(texts)
    return "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, 1))


def word_f1(answer: str, gold: str) -> float:
    """Return the F1 of the sets of words, without articles and punctuation."""
    given, wanted = (
        {w for w in re.findall(r"\w+", text.lower()) if w not in {"a", "an", "the"}} for text in (answer, gold)
    )
    common = len(given & wanted)
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


@dataclass(frozen=True)
class OpenQuestion:
    """Open questions about a user's documents, each packed with others to the length."""

    name: ClassVar[str] = "qa"
    documents: tuple[QuestionedDocument, ...]

    def sample(self, rng: Random, tokens: int, count: Count) -> TaskSample:
        """Return a document among others, and its question."""
        chosen = rng.choice([document for document in self.documents if not document.choices])
        return TaskSample(
            "The context holds documents.",
            _packed(rng, chosen, self.documents, tokens, count),
            chosen.question,
            "ANSWER",
            chosen.answers,
            lambda answer: max(word_f1(extracted(answer), gold) for gold in chosen.answers),
        )


@dataclass(frozen=True)
class MultipleChoice:
    """Lettered questions about a user's documents, as in QuALITY (one letter) and TOEFL (one or several)."""

    name: ClassVar[str] = "choice"
    documents: tuple[QuestionedDocument, ...]

    def sample(self, rng: Random, tokens: int, count: Count) -> TaskSample:
        """Return a document among others, and its question with choices."""
        chosen = rng.choice([document for document in self.documents if document.choices])
        letters = string.ascii_uppercase[: len(chosen.choices)]
        lines = (f"{letter}. {text}" for letter, text in zip(letters, chosen.choices, strict=True))
        gold = "".join(sorted("".join(chosen.answers).upper()))

        def score(answer: str) -> float:
            letters_given = re.findall(rf"\b[{letters}]+\b", extracted(answer).upper())
            return float("".join(sorted(set("".join(letters_given)))) == gold)

        return TaskSample(
            "The context holds documents.",
            _packed(rng, chosen, self.documents, tokens, count),
            "\n".join([chosen.question, *lines]),
            "LETTER",
            (gold,),
            score,
        )


SMALL: tuple[Any, ...] = (
    NeedleInAHaystack(queries=1, parts=0),
    VariableTracking(chains=3, hops=1),
    CommonWords(words=3, frequency=20, rare=1),
    StoryRetrieval(queries=1),
    StoryMultiHop(),
    StoryFiltering(chapters=1),
)
"""Generated tasks at sizes that models of a hundred million parameters can begin to solve."""
PAPER: tuple[Any, ...] = (
    NeedleInAHaystack(),
    VariableTracking(),
    CommonWords(),
    StoryRetrieval(),
    StoryMultiHop(),
    StoryFiltering(),
)
"""Generated tasks at the paper's sizes."""


def tasks(small: bool, documents: Sequence[QuestionedDocument] = ()) -> list[Any]:
    """Return the generated tasks, and those on documents that have questions of their kind."""
    given = tuple(documents)
    return [
        *(SMALL if small else PAPER),
        *([OpenQuestion(given)] if any(not d.choices for d in given) else []),
        *([MultipleChoice(given)] if any(d.choices for d in given) else []),
    ]
