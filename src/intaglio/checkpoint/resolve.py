"""Files of a checkpoint: name resolution, refused formats, digests, further files beside the weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from intaglio.checkpoint.sharding import INDEX, read_index
from intaglio.data import assets
from intaglio.environment import silence_loggers
from intaglio.errors import IntaglioError, first_line, shorten

BUNDLED = ("smollm2", "minilm", "splade-tiny", "efficientnet-lite0")
ITEMS = "items.json"
"""Titles of a recommender's items, by name."""

LIVE_TYPE, LIVE_WEIGHTS = "intaglio_", "live.safetensors"
"""Prefix of a live checkpoint's `model_type`, and its weight file name: the stock loaders recognise neither."""
_SENTENCE_TRANSFORMERS_FILES = ("config_sentence_transformers.json", "sentence_bert_config.json")
_FOLDER = re.compile(r"\w[\w-]*")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def split_revision(x: str | os.PathLike[str], revision: str | None = None) -> tuple[str, str | None]:
    """Split `user/name@revision` into the name and the revision (or None)."""
    text = os.fspath(x)
    name, at, pin = text.partition("@")
    shown = repr(shorten(text))
    # A path may contain @, a hub id cannot.
    if not at or os.path.exists(text) or text.startswith((".", "~", os.sep)) or name.count("/") > 1:
        if revision is not None and (os.path.isdir(text) or text in BUNDLED):
            what = "directory" if os.path.isdir(text) else "bundled name"
            raise IntaglioError(
                f"the model {shown} is a {what}, which has no revision {revision!r}; only a hub id has one"
            )
        return text, revision
    if not pin.strip():
        raise IntaglioError(f"the model {shown} names no revision after its @; accepted: user/name@revision")
    if os.path.isdir(name) or name in BUNDLED:
        what = "directory" if os.path.isdir(name) else "bundled name"
        raise IntaglioError(
            f"the model {shown} is a {what} with a revision; only a hub id has one (user/name@revision)"
        )
    if revision not in (None, pin):
        raise IntaglioError(f"the model {shown} is given with another revision, {revision!r}; give only one")
    return name, pin


def resolve(x: str | os.PathLike[str]) -> tuple[str, bool]:
    """Return the path or hub id for transformers, and whether it is a local directory."""
    text = os.fspath(x)
    if not text.strip():
        raise IntaglioError("the model's name is empty; accepted: a bundled name, a directory, a hub id (user/name)")
    path = Path(text)
    try:
        is_directory, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise IntaglioError(f"the model {shorten(text)!r} cannot be read: {error.strerror}") from error
    if is_directory:
        return str(path), True
    if text in BUNDLED:
        return str(assets.path(text)), True
    if exists:
        raise IntaglioError(f"the model {text} is a file; give the directory that holds it, with its config.json")
    if text.startswith((".", "~", os.sep)) or text.count("/") > 1:
        raise IntaglioError(f"the model {text!r} does not exist: no such directory")
    return text, False


def check_directory(path: Path) -> None:
    """Refuse a directory that is not a safetensors checkpoint, before transformers reads it."""
    if not (path / "config.json").is_file():
        raise IntaglioError(f"{path} is not a checkpoint: it has no config.json")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
        if pickles:
            raise IntaglioError(
                f"{path} holds its weights as a pickle ({pickles[0]}), which can run code when it is read; "
                "convert it to safetensors first"
            )
        raise IntaglioError(f"{path} holds no weights: no *.safetensors file")
    for index in path.glob(f"*{INDEX}"):
        read_index(index)
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                handle.keys()
        except (SafetensorError, OSError) as error:
            raise IntaglioError(f"{file} is damaged or truncated: {error}") from error


def read_extra_files(source: str, revision: str | None = None) -> dict[str, bytes]:
    """Read the sentence-transformers files of a checkpoint (module list, settings, small weights), if any.

    A recommender's directory has the titles of its items.

    They are saved again, so that the result stays a sentence-transformers model.
    """

    def read(path: str) -> bytes | None:
        with silence_transformers():
            file = cached_file(
                source,
                path,
                revision=revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        return None if file is None else Path(file).read_bytes()

    items = Path(source) / ITEMS
    extra = {ITEMS: items.read_bytes()} if items.is_file() else {}
    modules = read("modules.json")
    if modules is None:
        return extra
    try:
        folders = [str(module["path"]) for module in json.loads(modules) if module["path"]]
    except (ValueError, KeyError, TypeError) as error:
        raise IntaglioError(f"modules.json of {source!r} is not a list of modules: {first_line(error)}") from error
    # Plain names only: a path out of the checkpoint is not followed.
    safe = [folder for folder in folders if _FOLDER.fullmatch(folder)]
    paths = [
        *_SENTENCE_TRANSFORMERS_FILES,
        *(f"{folder}/{name}" for folder in safe for name in ("config.json", "model.safetensors")),
    ]
    contents = {path: content for path in paths for content in [read(path)] if content is not None}
    return {"modules.json": modules, **contents, **extra}


def weights_digest(directory: Path) -> str:
    """Return the sha256 over the safetensors files of a checkpoint directory, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def stat_fingerprint(x: str | os.PathLike[str]) -> str:
    """Return a fingerprint of a model's files without reading them: names, sizes and modification times."""
    name, _ = split_revision(x)
    source, local = resolve(name)
    if not local:
        return ""
    files = sorted(file for file in Path(source).iterdir() if file.is_file())
    stats = [(file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Silence progress bars, load reports and retries of transformers; errors are checked and raised here."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with silence_loggers("transformers", "huggingface_hub"):
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
