"""Loading by name: config, class, weights, tokenizer, and their consistency."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
)
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

from intaglio.checkpoint.attachments import read_attachments
from intaglio.checkpoint.checkpoint import Checkpoint
from intaglio.checkpoint.quantizer_hook import quantizer_kwargs, remove_quantizer_state
from intaglio.checkpoint.record import RECORD, Record, hub_record, read_record
from intaglio.checkpoint.resolve import (
    BUNDLED,
    LIVE_TYPE,
    LIVE_WEIGHTS,
    check_directory,
    read_extra_files,
    resolve,
    silence_transformers,
    split_revision,
)
from intaglio.errors import IntaglioError, did_you_mean, first_line
from intaglio.methods.base import RestoresRuntime
from intaglio.methods.registry import get_method
from intaglio.modeling.classifier import is_image_model, names_classifier, whole_input_class
from intaglio.modeling.token_classifier import classifier_class, is_classifier

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
LEAST_USED = 2 / 3
"""Least share of the embeddings covered by a model's own tokenizer: padding is a few percent."""
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


def load(
    x: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Checkpoint:
    """Load a checkpoint: weights (safetensors only), tokenizer or image processor, and record.

    Args:
        x: a bundled name (`smollm2`, `minilm`, `splade-tiny`, `efficientnet-lite0`), a directory, or a hub id
            (`user/name`, pinned: `user/name@revision`).
        revision: branch, tag or commit of a hub id, instead of `@`. Default: the main branch.
        dtype: of the weights, a name or a torch dtype. Default: the checkpoint's own.
        device: a device name. Default: the CPU.

    Returns:
        The model in evaluation mode, with its tokenizer or image processor (None if it has none), record and
        attachments.

    Raises:
        IntaglioError: something is missing, damaged, unsupported or refused (pickles, remote code).
    """
    name = os.fspath(x)
    target, torch_dtype = parse_device(device), parse_dtype(dtype)
    _, revision = split_revision(x, revision)
    source, config = load_config(x, revision)
    cls = model_class(config, name)
    live = vars(config).get("transformers_weights") is not None
    local = Path(source) if Path(source).is_dir() else None
    record = hub_record(source, revision) if live and local is None else read_record(local) if local else None
    rebuild = quantizer_kwargs(name, record.live) if live and record is not None else {}
    with silence_transformers():
        try:
            model, info = cls.from_pretrained(
                source,
                config=config,
                revision=revision,
                dtype=torch_dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **rebuild,
            )
        except (MemoryError, IntaglioError):
            raise
        except Exception as error:  # as in `load_config`
            raise IntaglioError(f"the weights of {name!r} cannot be loaded: {first_line(error)}") from error
    _check_info(name, info, model.state_dict().keys())
    if any("pooler" in key for key in info.get("missing_keys", ())):
        model.pooler = None  # its random weights would be saved
    model.eval()
    vars(model.config).pop("transformers_weights", None)
    if rebuild:
        remove_quantizer_state(model)
    origin = name
    if local is None and revision is not None:
        # Decoders find the model's tokenizer by this name.
        origin = model.name_or_path = f"{source}@{revision}"
    checkpoint = Checkpoint(
        model,
        None if is_image_model(config) else load_tokenizer(source, revision),
        origin,
        record,
        read_attachments(local) if local else None,
        local,
        read_extra_files(source, revision),
        load_image_processor(source, revision) if is_image_model(config) else None,
    )
    checkpoint.record.source = checkpoint.record.source or origin
    _check_tensors(checkpoint, name)
    model.to(target)
    _restore_live(checkpoint, name, live)
    return checkpoint


def load_config(x: str | os.PathLike[str], revision: str | None = None) -> tuple[str, Any]:
    """Return what to load from (without a revision) and the config of a model."""
    name, revision = split_revision(x, revision)
    source, local = resolve(name)
    if local:
        check_directory(Path(source))
    elif revision is None and "/" not in source:
        names = ", ".join(BUNDLED)
        raise IntaglioError(
            f"the model {source!r} is no directory and no bundled name ({names}); a hub id is user/name"
        )
    with silence_transformers():
        try:
            config = _live_config(source, revision)
            if config is None:
                config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        except (MemoryError, IntaglioError):
            raise
        except Exception as error:  # transformers raises many types for damaged files
            reason = first_line(error)
            if "trust_remote_code" in str(error):
                reason = "it needs its own code (auto_map in its config.json), which is never run"
            what = "cannot be read" if local else "is no directory here and cannot be had from the hub"
            raise IntaglioError(f"the model {os.fspath(x)!r} {what}: {reason}") from error
    return source, config


def load_record(x: str | os.PathLike[str]) -> Record | None:
    """Return the record of a checkpoint, read without its weights, or None."""
    source, _ = load_config(x)
    if Path(source).is_dir():
        return read_record(Path(source))
    with silence_transformers():
        return hub_record(source, split_revision(x)[1], needed=False)


def _live_config(source: str, revision: str | None) -> Any:
    """Return the config of a live checkpoint with its real type and files; None for any other."""
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


def model_class(config: Any, name: str) -> type[Any]:
    """Return the transformers class for a config, with the head that the checkpoint names."""
    if is_classifier(config):
        return classifier_class(config)
    if names_classifier(config):
        return whole_input_class(config)
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING):
        # The last mapping includes audio models.
        other = not hasattr(config, "vocab_size") and not is_image_model(config)
        if type(config) not in mapping or (mapping is MODEL_MAPPING and other):
            continue
        cls = mapping[type(config)]
        cls = cls[0] if isinstance(cls, tuple) else cls
        listed = getattr(config, "architectures", None) or []
        # BERT is in the causal mapping too: the checkpoint's own architecture decides.
        if mapping is MODEL_MAPPING or not listed or any(arch == cls.__name__ for arch in listed):
            return cls
    raise IntaglioError(
        f"the model {name!r} has the type {config.model_type!r}, which the auto classes of transformers do not load as "
        "a model of texts or images"
    )


def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """Return the tokenizer of a checkpoint, or None."""
    source, revision = split_revision(source, revision)
    path = Path(source)
    if path.is_dir() and not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        return None
    with silence_transformers():
        try:
            return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        except MemoryError:
            raise
        except Exception as error:  # as in `load_config`
            raise IntaglioError(f"the tokenizer of {source!r} cannot be loaded: {first_line(error)}") from error


def unlike_tokens(first: Any, second: Any) -> dict[int, tuple[str, str]]:
    """Return the ids that stand for different tokens in two tokenizers, ascending, with both tokens."""
    ours, theirs = ({id: token for token, id in side.get_vocab().items()} for side in (first, second))
    return {id: (ours[id], theirs[id]) for id in sorted(ours.keys() & theirs.keys()) if ours[id] != theirs[id]}


def load_image_processor(source: str, revision: str | None = None) -> Any:
    """Return the image processor of a checkpoint, or None; it is Pillow's, so that results do not depend on others."""
    source, revision = split_revision(source, revision)
    if Path(source).is_dir() and not (Path(source) / IMAGE_PROCESSOR_NAME).is_file():
        return None
    with silence_transformers():
        try:
            return AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=False, backend="pil")
        except MemoryError:
            raise
        except Exception as error:  # as in `load_config`
            raise IntaglioError(f"the image processor of {source!r} cannot be loaded: {first_line(error)}") from error


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | Literal["auto"]:
    """Return a torch dtype from its name; None means the checkpoint's own."""
    if dtype is None or dtype == "auto":
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise IntaglioError(f"the dtype {dtype!r} is unknown; {did_you_mean(dtype, DTYPES)}")
    return DTYPES[dtype]


def parse_device(device: str | torch.device | None) -> torch.device:
    """Return a torch device that this machine has; None means the CPU."""
    if device is None:
        return torch.device("cpu")
    try:
        result = torch.device(device)
    except RuntimeError:
        raise IntaglioError(f"the device {device!r} is unknown; accepted: cpu, cuda, cuda:N, mps") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(result.type, False) or (
        result.type == "cuda" and (result.index or 0) >= torch.cuda.device_count()
    ):
        raise IntaglioError(f"the device {device} is not available on this machine")
    return result


def _restore_live(checkpoint: Checkpoint, name: str, live: bool) -> None:
    """Restore the live parts of a record through their methods, by slug."""
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
        method = get_method(slug) if isinstance(slug, str) else None
        if method is None or not isinstance(method, RestoresRuntime):
            raise IntaglioError(f"the checkpoint {name!r} has a live part of {slug!r}, which is no live method")
        try:
            cast(type[RestoresRuntime], method).restore_runtime(part, checkpoint)
        except (KeyError, TypeError, ValueError) as error:
            raise IntaglioError(f"the live part of {slug} in {name!r} cannot be put back: {error}") from error


def _check_info(name: str, info: dict[str, Any], model_keys: Iterable[str]) -> None:
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get("mismatched_keys", ()))
    if mismatched:
        raise IntaglioError(f"the weights of {name!r} do not fit its config.json: {mismatched[0]} has another shape")
    missing = sorted(info.get("missing_keys", ()))
    # Many masked-LM encoders lack a pooler, which is unused here; anything else would be random.
    missing = [key for key in missing if "pooler" not in key]
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise IntaglioError(f"the weights of {name!r} are incomplete: {missing[0]}{more} not in its files")
    # Some families' files hold unused tensors; those of further layers are an error.
    known = {_INDEX.sub("#", key) for key in model_keys}
    unexpected = sorted(key for key in info.get("unexpected_keys", ()) if _INDEX.sub("#", key) in known)
    if unexpected:
        raise IntaglioError(f"the weights of {name!r} do not fit its config.json: it has no place for {unexpected[0]}")


def _check_tensors(checkpoint: Checkpoint, name: str) -> None:
    for key, parameter in checkpoint.model.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and not torch.isfinite(parameter.detach().sum()):
            # The sum of finite values can overflow in half precision: check element-wise before refusing.
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
