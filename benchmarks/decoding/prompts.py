"""Twenty prompts of four kinds, a corpus like two of them without anything of a prompt, and prompts without loops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from intaglio.data.python_source import source_files
from intaglio.data.texts import load_texts
from intaglio.errors import IntaglioError

CHAT = (
    "Explain how a binary search works and when it is better than a linear one.",
    "What should I keep in mind when I plant tomatoes on a balcony?",
    "Write a polite email that asks a landlord to repair the heating.",
    "Compare travelling by train with travelling by plane.",
    "Tell me how bread is made, step by step.",
)
CODE = ("calendar", "configparser", "fractions", "shelve", "textwrap")
"""Modules of the standard library whose first tokens are the prompts; the corpus is without them."""
KINDS = ("chat", "code", "summary", "retrieval")
EACH = 5

GRAM = 8
"""Tokens whose repetition counts as a loop."""
QUESTIONS = (
    "Describe a rainy afternoon in a small coastal town.",
    "Why do leaves change their colour in autumn?",
    "Write a letter from a grandfather to his grandson who moves abroad.",
    "How does a bicycle stay upright?",
    "Invent a dialogue between a baker and a customer who has lost a ring.",
    "What is the difference between weather and climate?",
    "Summarize the plot of a detective story of your own.",
    "How would you teach a child to tell the time?",
    "Write a review of a restaurant that was better than expected.",
    "Explain why the sky is blue in simple words.",
    "Describe the first day at a new job.",
    "What happened to the Roman roads after the empire fell?",
    "Write a short speech for the opening of a library.",
    "How do bees decide where to build a new nest?",
    "Tell a story about two friends who find an old map.",
    "What makes a good teacher?",
    "Explain how vaccines work.",
    "Describe your favourite season and why you like it.",
    "Write a complaint about a train that was late.",
    "How did people preserve food before refrigerators?",
)
"""Chat turns among which those without loops are chosen."""

Prompt = dict[str, Any]


def prompts(tokenizer: Any, texts: str = "wikipedia", context: int = 1500) -> list[Prompt]:
    """Return `{kind, name, ids}` of each prompt.

    Raises:
        IntaglioError: too few held-out articles of 400 tokens.
    """
    _, held_out = load_texts(texts).split()
    articles = [tokenizer(text, verbose=False)["input_ids"] for text in held_out.documents]
    articles = [ids for ids in articles if len(ids) >= 400]
    if len(articles) < EACH + 3:
        raise IntaglioError(f"the texts {texts!r} have {len(articles)} held-out articles of 400 tokens; 8 are needed")
    others = articles[EACH:]

    modules = {file.module: file.text for file in source_files()}
    results = [{"kind": "chat", "name": text, "ids": turn(tokenizer, text)} for text in CHAT]
    results += [
        {"kind": "code", "name": name, "ids": tokenizer(modules[name], verbose=False)["input_ids"][:160]}
        for name in CODE
    ]
    for place in range(EACH):
        text = tokenizer.decode(articles[place][:350])
        results.append(
            {"kind": "summary", "name": text[:40], "ids": turn(tokenizer, f"Summarize this text.\n\n{text}")}
        )
    pieces = max(3, -(-context // 500))
    for place in range(EACH):
        # Beginnings spread over the articles, so that no two prompts are the same where there are few.
        group = [others[(place * len(others) // EACH + more) % len(others)] for more in range(pieces)]
        parts = [tokenizer.decode(ids[: context // pieces]) for ids in group]
        question = f"What does the text say about {parts[1][:40].strip()}? Answer with sentences of the text."
        results.append(
            {
                "kind": "retrieval",
                "name": f"{place + 1}: {parts[1][:40]}",
                "ids": turn(tokenizer, "\n\n".join([*parts, question])),
            }
        )
    return results


def candidates(tokenizer: Any, texts: str = "wikipedia") -> Iterator[Prompt]:
    """Yield chat turns and beginnings of held-out articles in turn, for a set of prompts without loops."""
    _, held_out = load_texts(texts).split()
    articles = (tokenizer(text, verbose=False)["input_ids"] for text in held_out.documents)
    beginnings = [ids[:48] for ids in articles if len(ids) >= 400]
    for place in range(max(len(QUESTIONS), len(beginnings))):
        if place < len(QUESTIONS):
            yield {"kind": "chat", "name": QUESTIONS[place], "ids": turn(tokenizer, QUESTIONS[place])}
        if place < len(beginnings):
            name = tokenizer.decode(beginnings[place])[:40]
            yield {"kind": "article", "name": name, "ids": beginnings[place]}


def loops(ids: Sequence[int]) -> bool:
    """Return whether a text repeats any `GRAM` tokens."""
    grams = [tuple(ids[place : place + GRAM]) for place in range(len(ids) - GRAM + 1)]
    return len(set(grams)) < len(grams)


def turn(tokenizer: Any, text: str) -> list[int]:
    """Return a user's turn in the chat template, and the beginning of the answer's."""
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    return ids


def corpus(texts: str = "wikipedia") -> list[str]:
    """Return the documents of the table: the articles and modules that no prompt is taken from."""
    articles, _ = load_texts(texts).split()
    return [*articles.documents, *(file.text for file in source_files() if file.module not in CODE)]


def chosen(results: list[Prompt], count: int, kinds: Sequence[str] = KINDS) -> list[Prompt]:
    """Return the first prompts, alternating between the kinds."""
    by_kind = [[prompt for prompt in results if prompt["kind"] == kind] for kind in kinds]
    return [prompt for group in zip(*by_kind, strict=True) for prompt in group][:count]


def groups(results: list[Prompt], rows: int) -> list[list[Prompt]]:
    """Batches of prompts of one kind, the kinds in turn; what fills no batch is left out, unless a kind fills none:
    then its prompts stand in it several times.
    """
    batches: list[tuple[int, list[Prompt]]] = []
    for kind in dict.fromkeys(prompt["kind"] for prompt in results):
        own = [prompt for prompt in results if prompt["kind"] == kind]
        if len(own) < rows:
            own = [own[place % len(own)] for place in range(rows)]
        batches += [(at, own[at : at + rows]) for at in range(0, len(own) - rows + 1, rows)]
    return [batch for _, batch in sorted(batches, key=lambda pair: pair[0])]
