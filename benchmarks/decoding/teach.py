"""Prompts from which SmolLM2 generates training text for draft heads: chat turns, articles, code, summaries.

    python benchmarks/decoding/teach.py teach.jsonl                   # one prompt per line, 800 of them
    intaglio carve smollm2 -r benchmarks/decoding/chimera.yaml -o out  # its `texts:` names teach.jsonl
    python benchmarks/decoding/ship.py out

They contain nothing of a prompt in `prompts.py`: articles are those that are not held out, modules are inside packages
of the standard library, and chat turns ask about the subjects of these articles.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import intaglio
from intaglio.data.python_source import source_files
from intaglio.data.texts import cut_at_blank_lines, load_texts
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.splits import keyed

ASKED = (
    "Explain what {} is and why it matters.",
    "What should I know about {}?",
    "Write a short email that tells a colleague about {}.",
    "Compare {} with {}.",
    "Tell me about {}, step by step.",
    "Give me three facts about {}.",
    "Write a short story in which {} has a part.",
    "How would you explain {} to a child?",
)
ARTICLE, CODE, SUMMARY = 100, 100, 140
"""Characters of each."""


def prompts(tokenizer: object, texts: str, count: int) -> Iterator[str]:
    """Yield `count` prompts, alternating between the four kinds, as text that includes the chat template's tokens."""
    kept, _ = load_texts(texts).split()
    pieces = [piece for text in kept.documents for piece in cut_at_blank_lines(text) if len(piece) > 400]
    names = [name for text in kept.documents if (name := _subject(text))]
    modules = [file.text for file in source_files() if "." in file.module and len(file.text) > 1000]

    def turn(text: str) -> str:
        chat = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)  # type: ignore[attr-defined]

    for place in range(count):
        draw = keyed("teach", str(place))
        kind, number = place % 4, place // 4
        if kind == 0:
            asked, item, other = ASKED[number % len(ASKED)], names[draw % len(names)], names[draw // 7 % len(names)]
            yield turn(asked.format(item, other))
        elif kind == 1:
            yield pieces[draw % len(pieces)][:ARTICLE]
        elif kind == 2:
            text = modules[draw % len(modules)]
            start = text.rfind("\n", 0, draw // 7 % (len(text) - CODE) + 1) + 1
            yield text[start : start + CODE]
        else:
            yield turn(f"Summarize this text.\n\n{pieces[draw % len(pieces)][:SUMMARY]}")


def _subject(text: str) -> str:
    """Return the subject of an article: the words before its first verb, if they are few."""
    first = text.split(". ")[0].split(" is ")[0].split(" are ")[0].split(" was ")[0].split("(")[0].strip()
    article, _, rest = first.partition(" ")
    first = f"{article.lower()} {rest}" if article in ("A", "An", "The") else first
    return first if 0 < len(first.split()) <= 4 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Write prompts that heads are taught with.")
    parser.add_argument("path", type=Path, metavar="FILE", help="output: one JSON object per line")
    parser.add_argument("--model", default="smollm2", help="whose chat template; default: %(default)s")
    parser.add_argument("--texts", default="wikipedia", help="default: %(default)s")
    parser.add_argument("--count", type=int, default=800, help="default: %(default)s")
    arguments = parser.parse_args()
    tokenizer = intaglio.load(arguments.model).tokenizer
    lines = [json.dumps({"text": text}) for text in prompts(tokenizer, arguments.texts, arguments.count)]
    arguments.path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (IntaglioError, OSError) as error:
        sys.exit(f"error: {error}")
