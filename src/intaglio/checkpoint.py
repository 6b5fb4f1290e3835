"""Checkpoint: a model, its tokenizer, and the record of what was done to it (`intaglio.json`)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from intaglio import writer
from intaglio.attachments import FOLDER, Attachment, Fitting, read_attachments
from intaglio.catalogue import ENTRIES
from intaglio.classifier import classifier_class, is_classifier
from intaglio.data import assets
from intaglio.errors import IntaglioError, did_you_mean, shorten
from intaglio.machine import silenced, versions
from intaglio.method import Live, get

RECORD = "intaglio.json"
LIVE_TYPE, LIVE_WEIGHTS = "intaglio_", "live.safetensors"
"""What goes before the `model_type` of a live checkpoint, and what its weights are called: neither the automatic
classes of transformers nor those of one family find what they look for."""
BUNDLED = ("smollm2", "minilm")
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
LEAST_USED = 2 / 3
"""Share of the embeddings that a model's own tokenizer has tokens for, at least: padding is a few percent of them."""
_SENTENCES = ("config_sentence_transformers.json", "sentence_bert_config.json")
_FOLDER = re.compile(r"\w[\w-]*")
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


class StepRecord(BaseModel):
    """What one step did: enough to do it again.

    Args:
        slug: the method.
        parameters: its hyperparameters, defaults written out.
        seed: the seed it was given.
        calibration: digest, samples, length and batch size of its calibration data, or None.
        chosen: values the method derived from the model in hand (scaled thresholds, zero fractions ...).
        verb: `carve`, which edits the model, or `fit`, which attaches something to it.
    """

    model_config = ConfigDict(extra="forbid")

    slug: str
    parameters: dict[str, Any]
    seed: int = 0
    calibration: dict[str, Any] | None = None
    chosen: dict[str, Any] = Field(default_factory=dict)
    verb: Literal["carve", "fit"] = "carve"


class Record(BaseModel):
    """The content of `intaglio.json`.

    Args:
        format: of this file.
        source: what the checkpoint was loaded from.
        steps: what was done to it, in order.
        versions: of the libraries, when it was last carved.
        threads: of torch, which decide the last bits of some sums.
        dtype: of the weights.
        live: parts that must be put back after a load; empty for a baked checkpoint.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    source: str = ""
    steps: list[StepRecord] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
    threads: int = 0
    dtype: str = ""
    live: list[dict[str, Any]] = Field(default_factory=list)


class Checkpoint:
    """A model with its tokenizer and its record; what every method is applied to.

    Args:
        model: a Hugging Face model, on its device, in its dtype.
        tokenizer: its tokenizer, or None (then only token ids can be given as data).
        source: where it came from, for the record.
        record: what was done to it before; None: nothing.
        attachments: what was fitted to it, by slug; None: nothing.
        directory: where weights and attachments were read from, if from a directory.
        companions: other files that are saved beside the weights, by their path; see `read_companions`.
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
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.source = source
        self.record = record or Record(source=source)
        self.attachments = attachments or {}
        self.companions = companions or {}
        self._directory = directory

    @property
    def kind(self) -> Literal["baked", "live"]:
        """`baked`: the stock loader suffices; `live`: only `intaglio.load` puts all of it back."""
        return "live" if self.record.live else "baked"

    @property
    def config(self) -> Any:
        """The configuration of the text part."""
        return self.model.config.get_text_config()  # type: ignore[operator, union-attr]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def context(self) -> int:
        """The longest input in tokens."""
        return int(getattr(self.config, "max_position_embeddings", None) or 1 << 30)

    @property
    def vocabulary(self) -> int:
        """Rows of the token embedding; a tokenizer may know fewer tokens."""
        return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]

    @property
    def bytes(self) -> int:
        """Bytes of the weights, shared tensors counted once."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def note(
        self,
        slug: str,
        parameters: dict[str, Any],
        *,
        seed: int = 0,
        calibration: dict[str, Any] | None = None,
        chosen: dict[str, Any] | None = None,
        verb: Literal["carve", "fit"] = "carve",
    ) -> None:
        """Append a finished step to the record.

        Args:
            slug: the method.
            parameters: its hyperparameters.
            seed: the seed it was given.
            calibration: what identifies its calibration data.
            chosen: values it derived.
            verb: whether it edited the model (`carve`, default) or attached something to it (`fit`).
        """
        self.record.steps.append(
            StepRecord(
                slug=slug, parameters=parameters, seed=seed, calibration=calibration, chosen=chosen or {}, verb=verb
            )
        )
        self.record.versions = versions()
        self.record.threads = torch.get_num_threads()
        self.record.dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")

    def keep_live(self, slug: str, part: dict[str, Any] | None) -> None:
        """Note what must be put back after a load, in the place of what the same method noted before.

        Args:
            slug: the method, a `Live` one.
            part: data for its `put_back`, ready for JSON; None: nothing.
        """
        others = [known for known in self.record.live if known.get("slug") != slug]
        self.record.live = others + ([] if part is None else [{"slug": slug, **part}])

    def attach(
        self, slug: str, tensors: dict[str, Tensor], parameters: dict[str, Any], about: dict[str, Any] | None = None
    ) -> None:
        """Keep what a method fitted to these weights; called right after `note`.

        Args:
            slug: the method; what it attached before is replaced.
            tensors: the content.
            parameters: its hyperparameters.
            about: what else it wants to know when it reads it again.
        """
        self.attachments[slug] = Attachment(slug, tensors, parameters, len(self.record.steps) - 1, about or {})

    def decoder(self, slug: str, **fields: Any) -> Any:
        """A decoder with what was fitted to this checkpoint, ready for `generate(custom_generate=...)`.

        Args:
            slug: the method, such as `aded`.
            **fields: win over the hyperparameters that it was fitted with.

        Raises:
            IntaglioError: no such decoder, nothing was fitted, or it was fitted to other weights.
        """
        method = get(slug)
        if not (ENTRIES[slug].fitted and {"decoder", "drafter"} & set(ENTRIES[slug].kinds)):
            known = [s for s, entry in ENTRIES.items() if entry.fitted and {"decoder", "drafter"} & set(entry.kinds)]
            raise IntaglioError(f"{slug} is no decoder that is fitted to a checkpoint; {did_you_mean(slug, known)}")
        if slug not in self.attachments:
            raise IntaglioError(
                f"nothing of {slug} is attached to {self.source or 'this checkpoint'}; a recipe with the step "
                f"fit: {{{slug}: {{}}}} does that"
            )
        self._check_base(self.attachments[slug])
        restored: Fitting = cast(type[Fitting], method).restore(self.attachments[slug], self, **fields)
        return restored

    def _check_base(self, attachment: Attachment) -> None:
        later = [step.slug for step in self.record.steps[attachment.step + 1 :] if step.verb == "carve"]
        if later:
            raise IntaglioError(
                f"the attachment {attachment.slug} was fitted before {later[0]} changed the weights; fit it again"
            )
        if self._directory is not None and attachment.base not in ("", weights_digest(self._directory)):
            raise IntaglioError(
                f"the attachment {attachment.slug} of {self._directory} belongs to other weights than those beside it; "
                "fit it again"
            )

    def check_ids(self, ids: Tensor) -> None:
        """Refuse token ids that the model has no embedding for, or more of them in a row than it takes.

        Args:
            ids: int64 [..., L].

        Raises:
            IntaglioError: says which id or which length.
        """
        rows, low, high = self.vocabulary, int(ids.min()), int(ids.max())
        if low < 0 or high >= rows:
            raise IntaglioError(f"token id {high if high >= rows else low} is outside the model's vocabulary of {rows}")
        if ids.shape[-1] > self.context:
            raise IntaglioError(f"{ids.shape[-1]} tokens are more than the model's context of {self.context}")

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write a Hugging Face checkpoint and `intaglio.json`, atomically.

        A baked one is an ordinary one. A live one has a `model_type` of its own, so that the stock loader stops with an
        error in the place of running another model; `intaglio.load` reads it.

        Args:
            path: the directory to make.
            overwrite: replace one that is there. Default False.

        Raises:
            IntaglioError: the directory is taken or the disk refuses.
        """
        with writer.directory(path, overwrite) as temporary:
            self.write_files(temporary)
        return Path(path)

    def write_files(self, directory: Path) -> None:
        """Write the checkpoint's files into a directory that is already there (the writer's temporary one).

        Args:
            directory: receives weights, config, generation config, tokenizer, attachments and record.

        Raises:
            OSError: the disk refuses.
        """
        with _quiet():
            try:
                self.model.save_pretrained(directory)  # type: ignore[operator]
            except SafetensorError as error:
                # safetensors hides the errno in its own exception; the writer turns OSError into a sentence.
                raise OSError(0, str(error)) from error
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(directory)
        for place, content in self.companions.items():
            (directory / place).parent.mkdir(exist_ok=True)
            (directory / place).write_bytes(content)
        if self.kind == "live":
            _hide_from_stock(directory)
        if self.attachments:
            base = weights_digest(directory)
            self.attachments = {slug: attachment.of(base) for slug, attachment in self.attachments.items()}
            (directory / FOLDER).mkdir()
            for attachment in self.attachments.values():
                attachment.write(directory / FOLDER)
        (directory / RECORD).write_text(writer.to_json(self.record.model_dump()), encoding="utf-8")


def _hide_from_stock(directory: Path) -> None:
    """Give a saved checkpoint the type and the file names of a live one."""
    file = directory / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model_type"] = LIVE_TYPE + config["model_type"]
    file.write_text(writer.to_json(config), encoding="utf-8")
    for name, other in (
        ("model.safetensors", LIVE_WEIGHTS),
        ("model.safetensors.index.json", f"{LIVE_WEIGHTS}.index.json"),
    ):
        if (directory / name).is_file():
            (directory / name).rename(directory / other)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars, load reports and retries; what matters in them is checked and raised here."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with silenced("transformers", "huggingface_hub"):
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


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


def files_stamp(x: str | os.PathLike[str]) -> str:
    """What tells a model's files from other ones without reading them: names, sizes and times of change.

    Args:
        x: as in `load`. A hub id has no files here, and gives an empty text.
    """
    source, local = _resolve(x)
    if not local:
        return ""
    files = sorted(file for file in Path(source).iterdir() if file.is_file())
    told = [(file.name, found.st_size, found.st_mtime_ns) for file in files for found in [file.stat()]]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _resolve(x: str | os.PathLike[str]) -> tuple[str, bool]:
    """What to hand to transformers, and whether it is a local directory."""
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


def _check_directory(path: Path) -> None:
    """Refuse a directory that is no safetensors checkpoint, before transformers tries to read it."""
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
    for index in path.glob("*.safetensors.index.json"):
        try:
            shards = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise IntaglioError(
                f"{index} is not a valid index of shards: no weight_map can be read from it ({_first_line(error)})"
            ) from error
        missing = sorted(shards - {file.name for file in files})
        if missing:
            raise IntaglioError(f"{path} is incomplete: {missing[0]} is missing")
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                handle.keys()
        except (SafetensorError, OSError) as error:
            raise IntaglioError(f"{file} is damaged or truncated: {error}") from error


def _read_record(path: Path) -> Record | None:
    file = path / RECORD
    if not file.is_file():
        return None
    try:
        return Record.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in [".".join(str(part) for part in first["loc"])] if part)
        raise IntaglioError(f"{file} is not a record of Intaglio: {place}{first['msg']}") from error


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | Literal["auto"]:
    """Return a torch dtype from its name; None means the checkpoint's own.

    Args:
        dtype: `float32`, `bfloat16`, `float16`, `float64`, a torch dtype, or None.

    Raises:
        IntaglioError: another name.
    """
    if dtype is None or dtype == "auto":
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise IntaglioError(f"the dtype {dtype!r} is unknown; {did_you_mean(dtype, DTYPES)}")
    return DTYPES[dtype]


def parse_device(device: str | torch.device | None) -> torch.device:
    """Return a torch device that this machine has; None means the CPU.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, `mps`, or None.

    Raises:
        IntaglioError: an unknown name, or a device that is not there.
    """
    if device is None:
        return torch.device("cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise IntaglioError(f"the device {device!r} is unknown; accepted: cpu, cuda, cuda:N, mps") from None
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here.get(found.type, False) or (found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()):
        raise IntaglioError(f"the device {device} is not available on this machine")
    return found


def load_config(x: str | os.PathLike[str], revision: str | None = None) -> tuple[str, Any]:
    """Resolve a model's name and read its configuration alone.

    Args:
        x: a bundled name, a directory or a hub id.
        revision: of a hub id.

    Returns:
        What to load from, and the configuration.

    Raises:
        IntaglioError: there is no such model, or it is no safetensors checkpoint of a known family.
    """
    source, local = _resolve(x)
    if local:
        _check_directory(Path(source))
    elif revision is None and "/" not in source:
        names = ", ".join(BUNDLED)
        raise IntaglioError(
            f"the model {source!r} is no directory and no bundled name ({names}); a hub id is user/name"
        )
    with _quiet():
        try:
            config = _live_config(source, revision)
            if config is None:
                config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        except (MemoryError, IntaglioError):
            raise
        except Exception as error:  # a damaged file makes transformers raise whatever it stumbles over
            reason = _first_line(error)
            if "trust_remote_code" in str(error):
                reason = "it brings code of its own (auto_map in its config.json), which is never run here"
            what = "cannot be read" if local else "is no directory here and cannot be had from the hub"
            raise IntaglioError(f"the model {os.fspath(x)!r} {what}: {reason}") from error
    return source, config


def _live_config(source: str, revision: str | None) -> Any:
    """The configuration of a live checkpoint, with the type and the files that it really has; None for any other."""
    values, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    kind = values.get("model_type")
    if not isinstance(kind, str) or not kind.startswith(LIVE_TYPE):
        return None
    values["model_type"] = kind.removeprefix(LIVE_TYPE)
    if values["model_type"] not in CONFIG_MAPPING:
        raise IntaglioError(f"the model type {values['model_type']!r} is not known to the installed transformers")
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    sharded = cached_file(
        source, f"{LIVE_WEIGHTS}.index.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    config.transformers_weights = LIVE_WEIGHTS if sharded is None else f"{LIVE_WEIGHTS}.index.json"
    return config


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    # Validators put the reason on the second line; a lone key or number says nothing without the error's name.
    text = " ".join(line.strip() for line in lines[:2]) if lines[0].endswith(":") else lines[0].rstrip(". ")
    return text if " " in text else f"{type(error).__name__}: {text}".removesuffix(": ")


def model_class(config: Any, name: str) -> type[Any]:
    """The transformers class for a configuration: with the head that the checkpoint says it has.

    Args:
        config: from `load_config`.
        name: of the model, for the sentence.

    Raises:
        IntaglioError: no text model of transformers has this configuration.
    """
    if is_classifier(config):
        return classifier_class(config)
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING):
        # The last table has models of images and sound too.
        if type(config) not in mapping or (mapping is MODEL_MAPPING and not hasattr(config, "vocab_size")):
            continue
        found = mapping[type(config)]
        found = found[0] if isinstance(found, tuple) else found
        listed = getattr(config, "architectures", None) or []
        # A BERT is in the causal table too; what the checkpoint itself says it is decides.
        if mapping is MODEL_MAPPING or not listed or any(arch == found.__name__ for arch in listed):
            return found
    raise IntaglioError(
        f"the model {name!r} has the type {config.model_type!r}, which is no text model of transformers"
    )


def load(
    x: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Checkpoint:
    """Load a checkpoint: weights (safetensors only), tokenizer and record.

    Args:
        x: a bundled name (`smollm2`, `minilm`), a directory, or a hub id (`user/name`).
        revision: branch, tag or commit of a hub id. Default: its main branch.
        dtype: of the weights, a name or a torch dtype. Default: the checkpoint's own.
        device: where to put it. Default: the CPU.

    Returns:
        The model in evaluation mode, with its tokenizer (None if it has none), record and attachments.

    Raises:
        IntaglioError: one sentence on what is missing, damaged, unsupported or refused (pickles, remote code).
    """
    name = os.fspath(x)
    target, wanted = parse_device(device), parse_dtype(dtype)
    source, config = load_config(x, revision)
    cls = model_class(config, name)
    with _quiet():
        try:
            model, info = cls.from_pretrained(
                source,
                config=config,
                revision=revision,
                dtype=wanted,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except MemoryError:
            raise
        except Exception as error:  # as for the configuration
            raise IntaglioError(f"the weights of {name!r} cannot be loaded: {_first_line(error)}") from error
    _check_info(name, info, model.state_dict().keys())
    if any("pooler" in key for key in info.get("missing_keys", ())):
        model.pooler = None  # it got random weights, which would be saved
    model.eval()
    live = vars(model.config).pop("transformers_weights", None) is not None
    local = Path(source) if Path(source).is_dir() else None
    record = _hub_record(source, revision) if live and local is None else _read_record(local) if local else None
    checkpoint = Checkpoint(
        model,
        load_tokenizer(source, revision),
        name,
        record,
        read_attachments(local) if local else None,
        local,
        read_companions(source, revision),
    )
    checkpoint.record.source = checkpoint.record.source or name
    _check_tensors(checkpoint, name)
    model.to(target)
    _put_live_back(checkpoint, name, live)
    return checkpoint


def _hub_record(source: str, revision: str | None) -> Record | None:
    file = cached_file(source, RECORD, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if file is None else _read_record(Path(file).parent)


def _put_live_back(checkpoint: Checkpoint, name: str, live: bool) -> None:
    """Put the live parts of a record back: the one place where this module reaches up to methods, by their slugs."""
    parts = checkpoint.record.live
    if live != bool(parts):
        words = ("is marked as live", "names no live part"), ("names live parts", "is not marked as live")
        has, lacks = words[0 if live else 1]
        raise IntaglioError(
            f"the checkpoint {name!r} is incomplete: its {'config.json' if live else RECORD} {has} and its "
            f"{RECORD if live else 'config.json'} {lacks}"
        )
    for part in parts:
        slug = part.get("slug")
        method = get(slug) if isinstance(slug, str) else None
        if method is None or not isinstance(method, Live):
            raise IntaglioError(f"the checkpoint {name!r} has a live part of {slug!r}, which is no live method")
        try:
            cast(type[Live], method).put_back(part, checkpoint)
        except (KeyError, TypeError, ValueError) as error:
            raise IntaglioError(f"the live part of {slug} in {name!r} cannot be put back: {error}") from error


def _check_info(name: str, info: dict[str, Any], model_keys: Iterable[str]) -> None:
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get("mismatched_keys", ()))
    if mismatched:
        raise IntaglioError(f"the weights of {name!r} do not fit its config.json: {mismatched[0]} has another shape")
    missing = sorted(info.get("missing_keys", ()))
    # A pooler is missing from many masked-LM encoders and feeds nothing here; anything else would be random.
    missing = [key for key in missing if "pooler" not in key]
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise IntaglioError(f"the weights of {name!r} are incomplete: {missing[0]}{more} not in its files")
    # Some families leave tensors in their files that nothing needs; a whole layer more than the model has is another
    # matter.
    known = {_INDEX.sub("#", key) for key in model_keys}
    left = sorted(key for key in info.get("unexpected_keys", ()) if _INDEX.sub("#", key) in known)
    if left:
        raise IntaglioError(f"the weights of {name!r} do not fit its config.json: it has no place for {left[0]}")


def read_companions(source: str, revision: str | None = None) -> dict[str, bytes]:
    """What makes a checkpoint a model of sentence-transformers: its modules' list, settings and small weights.

    A carved one stays such a model. Other kinds of checkpoints have none of these files.

    Args:
        source: a directory or a hub id.
        revision: of a hub id.

    Raises:
        IntaglioError: the list of modules cannot be read.
    """

    def read(place: str) -> bytes | None:
        with _quiet():
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
        raise IntaglioError(f"modules.json of {source!r} is no list of modules: {_first_line(error)}") from error
    # Names only: a path that leads out of the checkpoint is not followed.
    inside = [folder for folder in folders if _FOLDER.fullmatch(folder)]
    places = [*_SENTENCES, *(f"{folder}/{name}" for folder in inside for name in ("config.json", "model.safetensors"))]
    found = {place: content for place in places for content in [read(place)] if content is not None}
    return {"modules.json": modules, **found}


def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """The tokenizer of a checkpoint, or None where it has none.

    Args:
        source: a directory or a hub id.
        revision: of a hub id.

    Raises:
        IntaglioError: it cannot be read.
    """
    path = Path(source)
    if path.is_dir() and not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        return None
    with _quiet():
        try:
            return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        except MemoryError:
            raise
        except Exception as error:  # as for the configuration
            raise IntaglioError(f"the tokenizer of {source!r} cannot be loaded: {_first_line(error)}") from error


def _check_tensors(checkpoint: Checkpoint, name: str) -> None:
    for key, parameter in checkpoint.model.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and not torch.isfinite(parameter.detach().sum()):
            # The sum of finite values can overflow in half precision: look closely before refusing.
            if torch.isfinite(parameter.detach()).all():
                continue
            raise IntaglioError(f"the weights of {name!r} hold NaN or infinite values: {key}")
    if checkpoint.tokenizer is not None:
        rows, highest = checkpoint.vocabulary, max(checkpoint.tokenizer.get_vocab().values(), default=-1)
        if highest >= rows:
            raise IntaglioError(
                f"the tokenizer of {name!r} does not match its model: its ids go up to {highest}, the model has {rows} "
                "embeddings"
            )
        if highest + 1 < LEAST_USED * rows:
            raise IntaglioError(
                f"the tokenizer of {name!r} does not match its model: it knows {highest + 1} tokens, the model has "
                f"{rows} embeddings"
            )
