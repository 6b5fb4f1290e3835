"""Build the table from a corpus: a name or a file, texts, token ids, or an existing table."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from intaglio.data.texts import Corpus, load_texts
from intaglio.errors import IntaglioError
from intaglio.methods.base import Progress, no_progress
from intaglio.methods.decoding.aded.trigram_table import Table

_BATCH = 64
"""Documents tokenised at a time."""
_CHARACTERS = 4
"""Characters of an average English token."""
ACCEPTED = "texts (a name, a file, a folder, a list of strings), lists of token ids, or a table"


def read_corpus(value: Any) -> Any:
    """Check a corpus without reading files.

    Args:
        value: None, a name or path, a list of strings, a `Corpus`, a list of sequences of token ids, or a `Table`.

    Returns:
        None, a string, a `Corpus`, a `Table`, a list of strings, or a list of lists of integers.

    Raises:
        ValueError: another type, or an empty corpus.
    """
    if value is None or isinstance(value, (Corpus, Table)):
        return value
    if isinstance(value, (str, os.PathLike)):
        if not os.fspath(value):
            raise ValueError(f"the corpus is empty; accepted: {ACCEPTED}")
        return os.fspath(value)
    items = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(items, (list, tuple)):
        raise ValueError(f"a corpus cannot be {type(value).__name__}; accepted: {ACCEPTED}")
    if not items:
        raise ValueError(f"the corpus is empty; accepted: {ACCEPTED}")
    if all(isinstance(item, str) for item in items):
        return list(items)
    return [_token_ids(item, index) for index, item in enumerate(items)]


def _token_ids(item: Any, index: int) -> list[int]:
    item = item.tolist() if hasattr(item, "tolist") else item
    if not isinstance(item, (list, tuple)) or not all(type(token) is int for token in item):
        raise ValueError(f"corpus[{index}] is neither a text nor token ids; accepted: {ACCEPTED}")
    return list(item)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def make_table(
    corpus: Any, vocabulary: int, tokenizer: Any, entries: int, discount: float, progress: Progress = no_progress
) -> tuple[Table, dict[str, Any]]:
    """Build, read or take over the table of a corpus from `read_corpus`.

    Args:
        corpus: checked by `read_corpus`.
        vocabulary: number of token ids of the target.
        tokenizer: the target's, or None if it is unknown (then texts are refused).
        entries: most entries of a new table.
        discount: of a new table.
        progress: called as texts are tokenised.

    Returns:
        the table, and `{texts, documents, digest}` of a corpus of texts, `{sequences}` of token ids, or nothing.

    Raises:
        IntaglioError: texts without a tokenizer, another tokenizer than the target's, or a corpus that cannot be read.
    """
    digest = "" if tokenizer is None else tokenizer_digest(tokenizer)
    about: dict[str, Any] = {}
    if corpus is None:
        return Table.empty(vocabulary), about
    if isinstance(corpus, str) and corpus.endswith(".safetensors"):
        corpus = Table.load(corpus)
    if isinstance(corpus, Table):
        _check_table(corpus, vocabulary, digest)
        return corpus, about
    if isinstance(corpus, (str, Corpus)) or isinstance(corpus[0], str):
        texts = load_texts(corpus)
        if tokenizer is None:
            raise IntaglioError(
                f"the corpus {texts.name!r} is text and the target's tokenizer is not known; give tokenizer= or token "
                "ids"
            )
        highest = max(tokenizer.get_vocab().values())
        if highest >= vocabulary:
            raise IntaglioError(
                f"the tokenizer of the corpus has ids up to {highest}; the target has {vocabulary}, so it is another "
                "model's tokenizer"
            )
        about = {"texts": texts.name, "documents": len(texts), "digest": texts.digest}
        read = _tokenise(texts, tokenizer, progress)
        return Table.build(read, vocabulary, entries=entries, discount=discount, tokenizer=digest), about
    return Table.build(corpus, vocabulary, entries=entries, discount=discount), {"sequences": len(corpus)}


def count_tokens(corpus: Any) -> int:
    """Estimate the tokens of a corpus without a tokenizer: one for four characters."""
    if corpus is None or isinstance(corpus, Table) or (isinstance(corpus, str) and corpus.endswith(".safetensors")):
        return 0
    if isinstance(corpus, (str, Corpus)) or isinstance(corpus[0], str):
        return sum(map(len, load_texts(corpus).documents)) // _CHARACTERS
    return sum(map(len, corpus))


def _check_table(table: Table, vocabulary: int, tokenizer: str) -> None:
    if table.vocabulary != vocabulary:
        raise IntaglioError(
            f"the table was counted over {table.vocabulary} token ids; the target has {vocabulary}, so it was made "
            "with another tokenizer"
        )
    if table.tokenizer and tokenizer and table.tokenizer != tokenizer:
        raise IntaglioError("the table was counted with another tokenizer than the target's; build it with that one")


def _tokenise(texts: Corpus, tokenizer: Any, progress: Progress) -> Iterator[Sequence[int]]:
    for start in range(0, len(texts), _BATCH):
        progress(start, len(texts), "aded: reading texts")
        batch = list(texts.documents[start : start + _BATCH])
        yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
