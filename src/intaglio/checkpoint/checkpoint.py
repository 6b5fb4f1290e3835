"""The `Checkpoint` class, and saving."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from intaglio import atomic_io
from intaglio.checkpoint.attachments import FOLDER, Attachment
from intaglio.checkpoint.bundled import bundled_heads
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.checkpoint.record import RECORD, Record, StepRecord
from intaglio.checkpoint.resolve import LIVE_TYPE, LIVE_WEIGHTS, silence_transformers, weights_digest
from intaglio.environment import versions
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.methods.base import Fittable
from intaglio.methods.registry import METHODS, PUBLISHED, get_method, list_fitted
from intaglio.modeling.anatomy import context_length


class Checkpoint:
    """A model with its tokenizer or image processor and its record, the object that every method is applied to.

    Args:
        model: a Hugging Face model, on its device, in its dtype.
        tokenizer: its tokenizer, or None (then data must be token ids).
        source: its origin, for the record.
        record: earlier steps; None: none.
        attachments: fitted results by slug; None: none.
        directory: where weights and attachments were read from, if from a directory.
        companions: further files to save, by path; see `read_companions`.
        image_processor: of a model of images, instead of a tokenizer; None: none.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        source: str = "",
        record: Record | None = None,
        attachments: dict[str, Attachment] | None = None,
        directory: Path | None = None,
        companions: dict[str, bytes] | None = None,
        image_processor: Any = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.source = source
        self.record = record or Record(source=source)
        self.attachments = attachments or {}
        self.companions = companions or {}
        self._directory = directory

    @property
    def kind(self) -> Literal["standalone", "runtime"]:
        """`baked`: the stock loader suffices; `live`: only `intaglio.load` restores all of it."""
        return "runtime" if self.record.live else "standalone"

    @property
    def config(self) -> Any:
        """The text config."""
        return self.model.config.get_text_config()  # type: ignore[operator, union-attr]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    @property
    def context(self) -> int:
        """The longest input in tokens."""
        return context_length(self.model)

    @property
    def vocabulary(self) -> int:
        """Rows of the token embedding; a tokenizer may know fewer tokens."""
        rows = self._embedding_rows
        if rows is None:
            raise IntaglioError(f"a model of type {self.config.model_type!r} has no token embedding: it reads no text")
        return rows

    @property
    def _embedding_rows(self) -> int | None:
        try:
            weight = getattr(self.model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
        except (AttributeError, NotImplementedError):  # models of images; plain modules
            return None
        return None if weight is None else int(weight.shape[0])

    @property
    def bytes(self) -> int:
        """Size of the weights in bytes, shared tensors counted once."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def record_step(
        self,
        slug: str,
        parameters: dict[str, Any],
        *,
        seed: int = 0,
        calibration: dict[str, Any] | None = None,
        chosen: dict[str, Any] | None = None,
        verb: Literal["carve", "fit"] = "carve",
    ) -> None:
        """Append a finished step to the record."""
        self.record.steps.append(
            StepRecord(
                slug=slug, parameters=parameters, seed=seed, calibration=calibration, chosen=chosen or {}, verb=verb
            )
        )
        self.record.versions = versions()
        self.record.threads = torch.get_num_threads()
        self.record.dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")

    def set_runtime_state(self, slug: str, part: dict[str, Any] | None) -> None:
        """Set a method's data to restore after loading, replacing its earlier data."""
        others = [known for known in self.record.live if known.get("slug") != slug]
        self.record.live = others + ([] if part is None else [{"slug": slug, **part}])

    def attach(
        self, slug: str, tensors: dict[str, Tensor], parameters: dict[str, Any], about: dict[str, Any] | None = None
    ) -> None:
        """Attach a fitted result; called right after `note`."""
        step, rows = len(self.record.steps) - 1, self._embedding_rows
        self.attachments[slug] = Attachment(slug, tensors, parameters, step, about or {}, vocabulary=rows or 0)

    def decoder(self, slug: str, **fields: Any) -> Any:
        """Return a decoder with its fitted parts, ready for `generate(custom_generate=...)`.

        Without an attachment, the heads bundled with the package are used if they belong to these very weights.
        """
        method = get_method(slug)
        if not (method.fitted and {"decoder", "drafter"} & set(method.kinds)):
            known = [s for s, entry in PUBLISHED.items() if entry.fitted and {"decoder", "drafter"} & set(entry.kinds)]
            raise IntaglioError(f"{slug} is no decoder that is fitted to a checkpoint; {did_you_mean(slug, known)}")
        return self.fitted(slug, **fields)

    def fitted(self, slug: str, **fields: Any) -> Any:
        """Return a method with the parts that a `fit` step attached; `fields` override those of the fit.

        Raises:
            IntaglioError: the method is not one that is fitted, nothing of it is attached, or what is attached belongs
                to other weights.
        """
        method = get_method(slug)
        if not method.fitted:
            raise IntaglioError(f"{slug} is not fitted to a checkpoint; {did_you_mean(slug, list_fitted())}")
        if slug in self.attachments:
            attachment = self.attachments[slug]
            self._check_base(attachment)
        else:
            attachment = self._shipped(slug)
        restored: Fittable = cast(type[Fittable], method).restore(attachment, self, **fields)
        return restored

    def encoder(self, slug: str | None = None, **fields: Any) -> Any:
        """Return the text encoder that the checkpoint was trained as, ready for `encode`.

        Args:
            slug: its method. Default: the last one that was trained.
            fields: override those that it was trained with.

        Raises:
            IntaglioError: it was trained as no such encoder, or the weights or the vocabulary have changed since.
        """
        trained = [slug for slug in self.attachments if "encoder" in get_method(slug).kinds]
        if slug is None and trained:
            slug = max(trained, key=lambda known: self.attachments[known].step)
        if slug not in trained:
            raise IntaglioError(
                f"{self.source or 'this checkpoint'} was not trained as an encoder; a recipe with the step"
                " train: {objective: {contrastive: {}}, pairs: FILE} does that"
                if slug is None
                else f"{self.source or 'this checkpoint'} was not trained by {slug}; {did_you_mean(slug, trained)}"
            )
        self._check_base(self.attachments[slug])
        method: Any = get_method(slug)
        unknown = next((name for name in fields if name not in method.model_fields), None)
        if unknown is not None:
            raise IntaglioError(f"{slug} has no field {unknown!r}; {did_you_mean(unknown, method.model_fields)}")
        return method.restore(self.attachments[slug], self, **fields)

    def as_sentence_transformer(self, slug: str | None = None, **fields: Any) -> Any:
        """Return the encoder as a `SentenceTransformer`, or a `SparseEncoder` if it is sparse; see `encoder`."""
        return self.encoder(slug, **fields).as_sentence_transformer()

    def _shipped(self, slug: str) -> Attachment:
        """Return the bundled heads of a method for this very model."""
        heads = bundled_heads(slug)
        if heads and not any(step.verb == "carve" for step in self.record.steps):
            own = fingerprint(self.model)
            for head in heads:
                if head.matches(own):
                    return head.attachment()
        models = ", ".join(head.model for head in heads)
        others = f"; the bundled heads, for unchanged {models}, belong to other weights" if heads else ""
        raise IntaglioError(
            f"nothing of {slug} is attached to {self.source or 'this checkpoint'}; a recipe with the step "
            f"fit: {{{slug}: {{}}}} does that{others}"
        )

    def _check_base(self, attachment: Attachment) -> None:
        later = [
            step.slug
            for step in self.record.steps[attachment.step + 1 :]
            if step.verb == "carve" and not (step.slug in METHODS and get_method(step.slug).keeps_fits)
        ]
        if later:
            raise IntaglioError(
                f"the attachment {attachment.slug} was fitted before {later[0]} changed the weights; fit it again"
            )
        if self._directory is not None and attachment.base not in ("", weights_digest(self._directory)):
            known, rows = attachment.vocabulary, self._embedding_rows
            why = f"a vocabulary of {known:,} tokens, and the weights beside it have {rows:,}"
            if not known or known == rows:
                why = "other weights than those beside it"
            raise IntaglioError(f"the attachment {attachment.slug} of {self._directory} belongs to {why}; fit it again")

    def check_ids(self, ids: Tensor) -> None:
        """Refuse token ids without an embedding, and rows longer than the context."""
        rows, low, high = self.vocabulary, int(ids.min()), int(ids.max())
        if low < 0 or high >= rows:
            raise IntaglioError(f"token id {high if high >= rows else low} is outside the model's vocabulary of {rows}")
        if ids.shape[-1] > self.context:
            raise IntaglioError(f"{ids.shape[-1]} tokens are more than the model's context of {self.context}")

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write a Hugging Face checkpoint and `intaglio.json`, atomically.

        A baked checkpoint is an ordinary one. A live one has a `model_type` of its own, so that the stock loader raises
        an error instead of running another model; `intaglio.load` reads it.

        Args:
            path: the directory to create.
            overwrite: replace an existing directory. Default False.

        Raises:
            IntaglioError: the directory exists or cannot be written.
        """
        with atomic_io.directory(path, overwrite) as temporary:
            self.write_files(temporary)
        return Path(path)

    def save_attachment(self, slug: str) -> Path:
        """Replace an attachment and the record in the directory that the checkpoint was read from, atomically each.

        Raises:
            IntaglioError: it was not read from a directory, or the file cannot be written.
        """
        if self._directory is None:
            raise IntaglioError("the checkpoint was not read from a directory; save it to one")
        attachment = self.attachments[slug] = self.attachments[slug].of(weights_digest(self._directory))
        with tempfile.TemporaryDirectory() as temporary:
            attachment.write(Path(temporary))
            content = Path(temporary, f"{slug}.safetensors").read_bytes()
        atomic_io.write_bytes(self._directory / FOLDER / f"{slug}.safetensors", content)
        atomic_io.write_json(self._directory / RECORD, self.record.model_dump())
        return self._directory

    def write_files(self, directory: Path) -> None:
        """Write the checkpoint's files into an existing directory (the writer's temporary one)."""
        with silence_transformers():
            try:
                self.model.save_pretrained(directory)  # type: ignore[operator]
            except SafetensorError as error:
                # safetensors hides the errno in its own exception; the writer turns OSError into a sentence.
                raise OSError(0, str(error)) from error
            for processor in (self.tokenizer, self.image_processor):
                if processor is not None:
                    processor.save_pretrained(directory)
        for place, content in self.companions.items():
            (directory / place).parent.mkdir(exist_ok=True)
            (directory / place).write_bytes(content)
        if self.kind == "runtime":
            _hide_from_stock(directory)
        if self.attachments:
            base = weights_digest(directory)
            self.attachments = {slug: attachment.of(base) for slug, attachment in self.attachments.items()}
            (directory / FOLDER).mkdir()
            for attachment in self.attachments.values():
                attachment.write(directory / FOLDER)
        (directory / RECORD).write_text(atomic_io.to_json(self.record.model_dump()), encoding="utf-8")


def _hide_from_stock(directory: Path) -> None:
    """Give a saved checkpoint the model type and file names of a live one."""
    file = directory / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model_type"] = LIVE_TYPE + config["model_type"]
    file.write_text(atomic_io.to_json(config), encoding="utf-8")
    for name, other in (
        ("model.safetensors", LIVE_WEIGHTS),
        ("model.safetensors.index.json", f"{LIVE_WEIGHTS}.index.json"),
    ):
        if (directory / name).is_file():
            (directory / name).rename(directory / other)
