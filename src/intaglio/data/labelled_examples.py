"""Examples of a classifier, texts or images, each with a class and an index."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from intaglio.data.labelled_images import LabelledImages, load_labelled_images
from intaglio.data.labelled_texts import LabelledTexts, load_labelled_texts
from intaglio.data.texts import hub_rows
from intaglio.errors import IntaglioError, did_you_mean


@dataclass(frozen=True, eq=False)
class LabelledExamples:
    """Texts or images with their classes.

    Args:
        kind: `text` or `image`: the key of the input in an example.
        rows: examples `{text or image, label, index, hash}`; the hash is that of the input without its label.
        name: their origin, for messages.
        skipped: broken image files that were left out.
    """

    kind: Literal["text", "image"]
    rows: tuple[dict[str, Any], ...]
    name: str
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.rows)

    @property
    def classes(self) -> tuple[str, ...]:
        """The different labels, sorted."""
        return tuple(sorted({row["label"] for row in self.rows}))

    @property
    def hashes(self) -> tuple[str, ...]:
        """The hash of each text or image."""
        return tuple(row["hash"] for row in self.rows)

    @property
    def digest(self) -> str:
        """SHA-256 over the examples with their labels in their order."""
        pairs = zip(self.hashes, self.rows, strict=True)
        return hashlib.sha256("\n".join(f"{key} {row['label']!r}" for key, row in pairs).encode()).hexdigest()


def load_labelled_examples(source: Any, *, skip_broken: bool = False) -> LabelledExamples:
    """Return the texts or images of a classifier.

    Args:
        source: images as `load_labelled_images` takes them (a folder, an `.npz` file), texts as
            `load_labelled_texts` takes them (a `.jsonl` file, a bundled name), a data set of the hub
            (`user/name[:split]`) with `label` and `text` or `image`, or examples of either.
        skip_broken: whether image files that cannot be decoded are left out. Default False.

    Raises:
        IntaglioError: it cannot be read, an example is malformed, or an index repeats.
    """
    hub_name = os.fspath(source) if _is_hub_id(source) else None
    if hub_name is not None:
        hub, _, split = hub_name.partition(":")
        numbered = enumerate(hub_rows(hub, split or "train", "label"))
        source = [{"index": str(number), **row, "label": str(row["label"])} for number, row in numbered]
    kind: Literal["text", "image"] = "text"
    skipped: tuple[str, ...] = ()
    if isinstance(source, LabelledTexts) or _is_text(source):
        if skip_broken:
            raise IntaglioError("skip_broken is for images; malformed texts are always refused")
        texts = load_labelled_texts(source)
        inputs, labels, name = texts.texts, texts.labels, texts.name
        names = texts.index or tuple(map(str, range(len(texts))))
        hashes = tuple(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest() for text in inputs)
    else:
        images = source if isinstance(source, LabelledImages) else load_labelled_images(source, skip_broken=skip_broken)
        inputs, labels, name = images.images, images.labels, images.name
        names, hashes, kind, skipped = images.index, images.hashes, "image", images.skipped
    columns = zip(inputs, labels, names, hashes, strict=True)
    rows = tuple({kind: value, "label": label, "index": own, "hash": key} for value, label, own, key in columns)
    result = LabelledExamples(kind, rows, hub_name or name, skipped)
    _check_index(result)
    return result


def _is_hub_id(source: Any) -> bool:
    """Return whether a source is `user/name`, and nothing here has that name."""
    if not isinstance(source, (str, os.PathLike)):
        return False
    name, path = os.fspath(source), Path(source).expanduser()
    return name.count("/") == 1 and not path.suffix and not name.startswith((".", "~", "/")) and not path.exists()


def _is_text(source: Any) -> bool:
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        return not path.is_dir() and path.suffix != ".npz"
    first = next(iter(source), None) if isinstance(source, (list, tuple)) else None
    return isinstance(first, Mapping) and "text" in first


def _check_index(examples: LabelledExamples) -> None:
    name, count = Counter(row["index"] for row in examples.rows).most_common(1)[0]
    if count > 1:
        raise IntaglioError(f"the index {name} occurs {count} times in {examples.name}; every example needs its own")


def check_classes(examples: LabelledExamples) -> None:
    """Refuse training examples of a single class."""
    if len(examples.classes) < 2:
        raise IntaglioError(
            f"every example of {examples.name} has the label {examples.classes[0]!r}; at least two classes are needed"
        )


def check_labels(validation: LabelledExamples, classes: Sequence[str]) -> None:
    """Refuse validation examples of classes that are not trained on."""
    for label in validation.classes:
        if label not in classes:
            raise IntaglioError(
                f"the validation {validation.name} has the label {label!r}; {did_you_mean(label, classes)}"
            )


def check_validation(training: LabelledExamples, validation: LabelledExamples) -> int:
    """Refuse a validation split that is the training split; return the number of examples that are in both."""
    if training.kind != validation.kind:
        raise IntaglioError(f"validation holds {validation.kind}s and classes holds {training.kind}s; give one kind")
    known = set(training.hashes)
    shared = sum(key in known for key in validation.hashes)
    if shared == len(validation):
        raise IntaglioError(
            f"every example of the validation {validation.name} is a training example too; give examples of its own"
        )
    return shared
