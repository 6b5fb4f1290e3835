"""A checkpoint's files: where a name leads, what is refused unread, what lies beside the weights."""

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

BUNDLED = ("smollm2", "minilm")
LIVE_TYPE, LIVE_WEIGHTS = "intaglio_", "live.safetensors"
"""What goes before the `model_type` of a live checkpoint, and what its weights are called: neither the automatic
classes of transformers nor those of one family find what they look for."""
_SENTENCES = ("config_sentence_transformers.json", "sentence_bert_config.json")
_FOLDER = re.compile(r"\w[\w-]*")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def split_revision(x: str | os.PathLike[str], revision: str | None = None) -> tuple[str, str | None]:
    """A model's name without the revision that pins it, and that revision: `user/name@revision` taken apart.

    Args:
        x: a bundled name, a directory or a hub id, pinned or not.
        revision: the same, given apart. Default: none.

    Returns:
        The name, and the revision or None.

    Raises:
        IntaglioError: two revisions that differ, none after the @, or one of what has no revisions.
    """
    text = os.fspath(x)
    name, at, pin = text.partition("@")
    told = repr(shorten(text))
    # A path may have an @ of its own, a hub id cannot.
    if not at or os.path.exists(text) or text.startswith((".", "~", os.sep)) or name.count("/") > 1:
        if revision is not None and (os.path.isdir(text) or text in BUNDLED):
            what = "directory" if os.path.isdir(text) else "bundled name"
            raise IntaglioError(f"the model {told} is a {what}, which has no revision {revision!r}; only a hub id has")
        return text, revision
    if not pin.strip():
        raise IntaglioError(f"the model {told} names no revision after its @; accepted: user/name@revision")
    if os.path.isdir(name) or name in BUNDLED:
        what = "directory" if os.path.isdir(name) else "bundled name"
        raise IntaglioError(f"the model {told} is a {what} with a revision; only a hub id has one (user/name@revision)")
    if revision not in (None, pin):
        raise IntaglioError(f"the model {told} is given together with another revision, {revision!r}; name one of them")
    return name, pin


def resolve(x: str | os.PathLike[str]) -> tuple[str, bool]:
    """What to hand to transformers, and whether it is a local directory.

    Args:
        x: a bundled name, a directory or a hub id, without a revision.

    Raises:
        IntaglioError: it is empty, a file, or a path that leads nowhere.
    """
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
    """Refuse a directory that is no safetensors checkpoint, before transformers tries to read it.

    Args:
        path: of the directory.

    Raises:
        IntaglioError: it lacks a file, or has a damaged one; its weights are pickles.
    """
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
    """What makes a checkpoint a model of sentence-transformers: its modules' list, settings and small weights.

    A carved one stays such a model. Other kinds of checkpoints have none of these files.

    Args:
        source: a directory or a hub id.
        revision: of a hub id.

    Raises:
        IntaglioError: the list of modules cannot be read.
    """

    def read(place: str) -> bytes | None:
        with silence_transformers():
            file = cached_file(
                source,
                place,
                revision=revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        return None if file is None else Path(file).read_bytes()

    modules = read("modules.json")
    if modules is None:
        return {}
    try:
        folders = [str(module["path"]) for module in json.loads(modules) if module["path"]]
    except (ValueError, KeyError, TypeError) as error:
        raise IntaglioError(f"modules.json of {source!r} is no list of modules: {first_line(error)}") from error
    # Names only: a path that leads out of the checkpoint is not followed.
    inside = [folder for folder in folders if _FOLDER.fullmatch(folder)]
    places = [*_SENTENCES, *(f"{folder}/{name}" for folder in inside for name in ("config.json", "model.safetensors"))]
    found = {place: content for place in places for content in [read(place)] if content is not None}
    return {"modules.json": modules, **found}


def weights_digest(directory: Path) -> str:
    """sha256 over the safetensors files of a checkpoint directory, in the order of their names.

    Args:
        directory: holds `*.safetensors`.
    """
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def stat_fingerprint(x: str | os.PathLike[str]) -> str:
    """What tells a model's files from other ones without reading them: names, sizes and times of change.

    Args:
        x: as in `load`. A hub id has no files here, and gives an empty text.
    """
    name, _ = split_revision(x)
    source, local = resolve(name)
    if not local:
        return ""
    files = sorted(file for file in Path(source).iterdir() if file.is_file())
    told = [(file.name, found.st_size, found.st_mtime_ns) for file in files for found in [file.stat()]]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Silence progress bars, load reports and retries; what matters in them is checked and raised here."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with silence_loggers("transformers", "huggingface_hub"):
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
