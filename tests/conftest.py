"""What every test runs under: no network, no cache of the user's, one thread; and small checkpoints and texts to share.

Fast tests see an empty `INTAGLIO_HOME`, so that none can come to need the bundled assets; tests marked `slow` see the
user's own cache.
"""

from __future__ import annotations

import gc
import json
import os
import random
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read when the library is imported, so before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["INTAGLIO_TUNING"] = "off"

import pytest
import torch
from hypothesis import settings

from tests.families import FAMILIES, FAST_FAMILIES, tiny_checkpoint_dir

TinyDir = Callable[[str], Path]

_EMPTY_HOME = tempfile.TemporaryDirectory(prefix="intaglio-empty-")  # removed when the session ends
_USERS_HOME = os.environ.get("INTAGLIO_HOME")
_SENTENCE = (
    "the quick brown fox jumps over a lazy dog and then it sleeps in the sun and she said that the other one is there "
    "what is the name of that river which runs through the town in the north return width times height"
)

# Machines that run tests are shared: a deadline an example would fail at random.
settings.register_profile("intaglio", deadline=None, print_blob=True)
settings.load_profile("intaglio")
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Close the network for the whole session; Unix sockets and this machine's own address stay open."""
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] != "127.0.0.1":
            raise AssertionError(f"a test tried to connect to {address}")
        connect(self, address)

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        if host != "127.0.0.1":
            raise AssertionError(f"a test tried to look up {host}")
        return getaddrinfo(host, *arguments, **options)

    socket.socket.connect = guarded  # type: ignore[method-assign]
    socket.getaddrinfo = resolve


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the families that resemble another to the slow tests, and further examples to one family."""
    for item in items:
        given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        family = given.get("family")
        if isinstance(family, str) and family in FAMILIES:
            further = isinstance(given.get("index"), int) and given["index"] > 0
            if family not in (FAST_FAMILIES[:1] if further else FAST_FAMILIES):
                item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Choose the cache before any fixture of the test is made, those of the session included."""
    if item.get_closest_marker("slow") is None:
        os.environ["INTAGLIO_HOME"] = _EMPTY_HOME.name
    elif _USERS_HOME is None:
        os.environ.pop("INTAGLIO_HOME", None)
    else:
        os.environ["INTAGLIO_HOME"] = _USERS_HOME


@pytest.fixture(autouse=True, scope="module")
def _garbage_put_aside() -> None:
    """Put what is loaded out of the collector's reach: recipes and trainers collect garbage often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _threads_stay() -> Iterator[None]:
    """A resumed carve sets torch's threads; no test may change those of the next."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> TinyDir:
    """`tiny_dir("llama")`: a directory with a tiny checkpoint of that family, made once; tests must not change it."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tiny_checkpoint_dir(family, tmp_path_factory.mktemp("tiny") / family, layers=2)
        return made[family]

    return make


@pytest.fixture(scope="session")
def paragraphs() -> list[str]:
    """400 different short paragraphs that the tiny tokenizers read without loss."""
    draw, words = random.Random(0), _SENTENCE.split()
    return [f"{n}: {' '.join(draw.choices(words, k=draw.randint(15, 40)))}." for n in range(400)]


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory, paragraphs: list[str]) -> Path:
    """The paragraphs as a `.jsonl` file, a document each."""
    path = tmp_path_factory.mktemp("texts") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs), encoding="utf-8")
    return path
