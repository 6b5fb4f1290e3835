"""The command `classify`."""

from __future__ import annotations

import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from intaglio.cli.console import (
    Device,
    Json,
    Model,
    handle_errors,
    out,
    print_json,
    print_out,
    progress_bar,
    read_argument,
)
from intaglio.errors import IntaglioError, printable, shorten

if TYPE_CHECKING:
    from intaglio.checkpoint import Checkpoint

SHOWN = 60
"""Characters of a text in the table."""


@handle_errors
def classify(
    model: Model,
    texts: Annotated[
        str | None,
        typer.Argument(
            metavar="INPUTS",
            help="A .jsonl file of objects with text (and label, for accuracy), a file of one text a line, or -; for a"
            " model of images an image, a folder of images (or of folders by class, for accuracy), or an .npz file.",
        ),
    ] = None,
    learn: Annotated[
        str | None, typer.Option(metavar="FILE", help="Learn labelled texts or images first, also of new classes.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="(--learn) The directory to make. [default: MODEL itself]"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="(--learn) Seed of the order of the examples.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="(--learn) Replace the output.")] = False,
    device: Device = None,
    json: Json = False,
) -> None:
    """Classify texts or images with a trained or attached classifier. Teach an attached one more with --learn."""
    if texts is None and learn is None:
        raise IntaglioError("INPUTS are missing; give texts or images to classify, or labelled ones with --learn FILE")
    if learn is None and (output is not None or overwrite):
        raise IntaglioError("--output and --overwrite belong to --learn; classifying writes nothing")
    from intaglio.atomic_io import check_target
    from intaglio.checkpoint import load
    from intaglio.modeling.classifier import is_image_model

    if learn is not None:
        if output is None and not Path(model).is_dir():
            raise IntaglioError(f"{model} is no directory that could be changed; name an output with -o DIR")
        if output is not None:
            check_target(output, overwrite)
    images = texts is not None and _names_images(texts)
    rows: list[dict[str, Any]] = [] if texts is None else _read_images(texts) if images else _read(texts)
    checkpoint = load(model, device=device)
    kind = "image" if is_image_model(checkpoint.config) else "text"
    if texts is not None and images != (kind == "image"):
        raise IntaglioError(f"{model} takes {kind}s; {texts} holds {'images' if images else 'texts'}")
    method = _classifier(checkpoint, model, learn is not None)
    document: dict[str, Any] = {"model": model, "method": method.slug}
    with progress_bar() as progress:
        if learn is not None:
            known = set(method.classes)
            method.learn(checkpoint, learn, seed=seed, progress=progress)
            saved = checkpoint.save(output, overwrite) if output else checkpoint.save_attachment(method.slug)
            added = [name for name in method.classes if name not in known]
            document |= {"learned": learn, "new_classes": added, "checkpoint": str(saved)}
        probs = method.classify(checkpoint, [row if images else row["text"] for row in rows], progress=progress)
    shown = [{**row, "image": str(row["index"])} if images else row for row in rows]
    document[f"{kind}s"] = [
        {**{name: row[name] for name in (kind, "label") if name in row}, "class": max(prob, key=prob.__getitem__),
         "probs": prob}
        for row, prob in zip(shown, probs, strict=True)
    ]  # fmt: skip
    labelled = [row for row in document[f"{kind}s"] if "label" in row]
    if labelled:
        document["accuracy"] = sum(row["class"] == row["label"] for row in labelled) / len(labelled)
    if json:
        print_json(document)
        return
    _print(document, labelled, kind)


def _print(document: dict[str, Any], labelled: list[dict[str, Any]], kind: str) -> None:
    if "learned" in document:
        names = ", ".join(document["new_classes"]) or "none"
        print_out(
            printable(f"learned {document['learned']}; new classes: {names}; checkpoint: {document['checkpoint']}")
        )
    if not document[f"{kind}s"]:
        return
    table = Table("class", "probability", *(["label"] if labelled else []), kind, box=SIMPLE_HEAD)
    for row in document[f"{kind}s"]:
        given = [Text(printable(row.get("label", "")))] if labelled else []
        text = Text(printable(shorten(" ".join(row[kind].split()), SHOWN)))
        table.add_row(Text(printable(row["class"])), f"{row['probs'][row['class']]:.3f}", *given, text)
    out.print(table)
    if labelled:
        print_out(f"accuracy: {document['accuracy']:.1%} of {len(labelled):,} {kind}s with a label")


class _Trained:
    """A classifier of whole texts or images, as a `train` step with `classes` makes it."""

    slug = "classification"

    def classify(self, checkpoint: Checkpoint, inputs: Sequence[Any], *, progress: Any) -> list[dict[str, float]]:
        """Return the probability of every class for each text or image."""
        from intaglio.modeling.token_classifier import label_names
        from intaglio.trainer.classification import predict

        names = label_names(checkpoint.model)
        examples = [{"text": item} if isinstance(item, str) else item for item in inputs]
        if not examples:
            return []
        return [dict(zip(names, row, strict=True)) for row in predict(checkpoint, examples).tolist()]


def _classifier(checkpoint: Checkpoint, model: str, learns: bool) -> Any:
    """Return the attached classifier, or the model itself."""
    from intaglio.methods.registry import METHODS
    from intaglio.modeling.classifier import is_whole_input_classifier

    attached = [slug for slug in checkpoint.attachments if "classifier" in METHODS[slug].kinds]
    if attached:
        return checkpoint.fitted(attached[0])
    reads = checkpoint.tokenizer is not None or checkpoint.image_processor is not None
    if not is_whole_input_classifier(checkpoint.model) or not reads:
        raise IntaglioError(
            f"nothing is attached to {model} that classifies texts or images, nor does it do so; a recipe with the step"
            " train: {classes: FILE} or fit: {dkvb: {labels: FILE}} makes a classifier"
        )
    if learns:
        raise IntaglioError(f"{model} cannot learn more by itself; train it by a recipe with classes")
    return _Trained()


def _names_images(inputs: str) -> bool:
    """Return whether inputs are a folder, an array file or an image."""
    kind, _ = mimetypes.guess_type(inputs)
    return Path(inputs).is_dir() or inputs.endswith(".npz") or (kind or "").startswith("image/")


def _read_images(inputs: str) -> list[dict[str, Any]]:
    from intaglio.data.labelled_images import load_images

    rows = load_images(inputs)
    return [{**row, "label": str(row["label"])} if "label" in row else row for row in rows]


def _read(texts: str) -> list[dict[str, str]]:
    """Return the texts, with their labels where a .jsonl file has them."""
    if texts.endswith(".jsonl"):
        from intaglio.data.json_lines import json_lines

        rows = []
        for place, value in json_lines(texts, "texts", "text"):
            fields = {name: value[name] for name in ("text", "label") if isinstance(value, dict) and name in value}
            if "text" not in fields or not all(isinstance(field, str) for field in fields.values()):
                raise IntaglioError(f"{place} is not an object with text and, if wanted, label, both strings")
            rows.append(fields)
        return rows
    content = read_argument(texts if texts == "-" else f"@{texts}")
    lines = [{"text": line} for line in content.splitlines() if line.strip()]
    if not lines:
        raise IntaglioError(f"the texts {texts} are empty; one text a line is needed")
    return lines
