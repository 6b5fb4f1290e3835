"""Small models of stock architectures with random weights, and tokenizers of bytes or trained on texts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

from intaglio.checkpoint import Checkpoint
from intaglio.data.texts import Corpus, load_texts
from intaglio.errors import IntaglioError, did_you_mean, shorten

SPECIAL = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>", "mask_token": "<|mask|>"}
BYTES = 256
TRAINED = 4096
"""Default size of a vocabulary that is trained on texts."""

TIED = 65536
"""Largest vocabulary with tied embeddings."""


@dataclass(frozen=True)
class Family:
    """Requirements of an architecture's config beyond the sizes.

    `feed_forward` is the default ratio of inner width to width; `extra` returns further fields for `(context, depth,
    head size)`; `inner` is the config's name of the inner width, `dropouts` those of its dropout rates; `grouped` says
    whether several heads may share keys and values.
    """

    model_type: str
    feed_forward: float
    encoder: bool = False
    extra: Callable[[int, int, int], dict[str, Any]] = lambda context, depth, head: {"head_dim": head}
    inner: str = "intermediate_size"
    dropouts: tuple[str, ...] = ("attention_dropout",)
    grouped: bool = True


def _gemma3(context: int, depth: int, head: int) -> dict[str, Any]:
    # Five layers with a window, then one with full attention; a shallow model has full attention in its last layer.
    full = {index for index in range(depth) if index % 6 == 5} or {depth - 1}
    kinds = ["full_attention" if index in full else "sliding_attention" for index in range(depth)]
    window = max(8, context // 4)
    return {"head_dim": head, "query_pre_attn_scalar": head, "layer_types": kinds, "sliding_window": window}


def _modernbert(context: int, depth: int, head: int) -> dict[str, Any]:
    return {"local_attention": max(8, context // 8 // 2 * 2)}


FAMILIES = {
    "llama": Family("llama", 8 / 3),
    "qwen3": Family("qwen3", 3.0),
    "mistral": Family("mistral", 3.5, extra=lambda context, depth, head: {"head_dim": head, "sliding_window": None}),
    "gemma3": Family("gemma3_text", 6.0, extra=_gemma3),
    "gpt2": Family(
        "gpt2",
        4.0,
        extra=lambda context, depth, head: {},
        inner="n_inner",
        dropouts=("embd_pdrop", "resid_pdrop", "attn_pdrop"),
        grouped=False,
    ),
    "bert": Family(
        "bert",
        4.0,
        encoder=True,
        extra=lambda context, depth, head: {},
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        grouped=False,
    ),
    "modernbert": Family(
        "modernbert",
        1.5,
        encoder=True,
        extra=_modernbert,
        dropouts=("embedding_dropout", "mlp_dropout", "attention_dropout"),
        grouped=False,
    ),
}


def _stages(width: int, depth: int) -> dict[str, Any]:
    return {"hidden_sizes": [width << stage for stage in range(depth)], "depths": [2] * depth}


def _resnet(width: int, depth: int, heads: int | None, side: int) -> dict[str, Any]:
    return {**_stages(width, depth), "embedding_size": width, "layer_type": "basic"}


def _convnext(width: int, depth: int, heads: int | None, side: int) -> dict[str, Any]:
    return {
        **_stages(width, depth), "num_stages": depth, "image_size": side, "patch_size": max(1, side // 8)
    }  # fmt: skip


def _vit(width: int, depth: int, heads: int | None, side: int) -> dict[str, Any]:
    heads = _heads(width) if heads is None else heads
    if width % heads:
        raise IntaglioError(f"width is {width}, which is not a multiple of heads, {heads}")
    return {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth,
        "num_attention_heads": heads, "image_size": side, "patch_size": max(1, side // 8),
    }  # fmt: skip


IMAGE_FAMILIES = {"convnext": _convnext, "resnet": _resnet, "vit": _vit}
"""Models of images: the fields of each config for `(width, depth, heads, side)`."""


def new_image_model(
    family: str,
    *,
    width: int,
    depth: int,
    heads: int | None = None,
    image_size: int = 32,
    num_channels: int = 3,
    seed: int = 0,
    **overrides: Any,
) -> Checkpoint:
    """Create a model of images with random weights and without a head; the objective `classification` adds one.

    Args:
        family: `resnet`, `convnext` or `vit`.
        width: channels of the first stage, each later stage having twice as many; of ViT, of the hidden state.
        depth: stages of two residual layers each; of ViT, layers.
        heads: (ViT) attention heads. Default: as `new`.
        image_size: pixels of a side, to which the image processor scales every image. Default 32.
        num_channels: 1 (grey) or 3 (colours). Default 3.
        seed: of the weights. Default 0.
        **overrides: fields of the config, such as `patch_size` (default: an eighth of the side) or `depths`.

    Returns:
        The model in evaluation mode with its image processor.

    Raises:
        IntaglioError: an unknown family or field, or sizes that do not fit each other.
    """
    if family not in IMAGE_FAMILIES:
        raise IntaglioError(f"there is no family {family!r} of images; {did_you_mean(str(family), IMAGE_FAMILIES)}")
    sizes = {"width": width, "depth": depth, "image_size": image_size, "num_channels": num_channels}
    for name, value in (sizes | ({} if heads is None else {"heads": heads})).items():
        _check_size(name, value)
    if num_channels not in (1, 3):
        raise IntaglioError(f"num_channels is {num_channels}; images have 1 (grey) or 3 (colours)")
    if heads is not None and family != "vit":
        raise IntaglioError(f"heads is {heads}; {family} has no attention")
    try:
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil  # needs Pillow
    except (ImportError, NameError):
        raise IntaglioError("models of images need the package Pillow: pip install 'intaglio[images]'") from None
    fields = IMAGE_FAMILIES[family](width, depth, heads, image_size)
    model = _model(family, AutoModel, fields | {"num_channels": num_channels}, overrides, seed)
    processor = ViTImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=[0.5] * num_channels,
        image_std=[0.5] * num_channels,
    )
    return Checkpoint(model, source=f"new {family}", image_processor=processor)


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise IntaglioError(f"{name} is {shorten(repr(value))}; it must be a whole number of at least 1")


def new(
    family: str,
    *,
    width: int,
    depth: int,
    vocab: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    context: int = 512,
    seed: int = 0,
    tokenizer: Any = "bytes",
    **overrides: Any,
) -> Checkpoint:
    """Create a model of a stock architecture with random weights, to train from scratch.

    The weights are drawn by transformers' own rule from `seed`; the global generator is unchanged. The stock loader
    reads the result of `Checkpoint.save`.

    Args:
        family: `llama`, `qwen3`, `mistral` (without a window), `gemma3` (text), `gpt2`, `bert` or `modernbert`.
        width: of the hidden state, a multiple of `heads`.
        depth: number of layers.
        vocab: rows of the embedding, at least the tokenizer's entries; with texts as `tokenizer`, the size of the
            trained vocabulary. Default: the tokenizer's size; 4,096 for texts.
        heads: attention heads. Default: head size 64 from a width of 512 on, 32 below.
        kv_heads: key-value heads, a divisor of `heads`. Default: `heads`.
        context: longest input in tokens. Default 512.
        seed: of the weights. Default 0.
        tokenizer: `bytes` (256 bytes and four special tokens; reads any text without loss), a tokenizer, or texts to
            train a byte-level BPE on (any argument of `load_texts`). Default `bytes`.
        **overrides: fields of the config, overriding the family's (inner width, windows, ties ...).

    Returns:
        The model in evaluation mode with its tokenizer.

    Raises:
        IntaglioError: an unknown family or field, or sizes that do not fit each other.
    """
    if family not in FAMILIES:
        raise IntaglioError(f"there is no family {family!r}; {did_you_mean(str(family), FAMILIES)}")
    sizes = {"width": width, "depth": depth, "vocab": vocab, "heads": heads, "kv_heads": kv_heads, "context": context}
    for name, value in sizes.items():
        if value is not None:
            _check_size(name, value)
    heads = _heads(width) if heads is None else heads
    if width % heads or width // heads % 2:
        raise IntaglioError(f"width is {width}, which is not an even multiple of heads, {heads}")
    if heads % (kv_heads or heads):
        raise IntaglioError(f"kv_heads is {kv_heads}, which does not divide heads, {heads}")
    spec = FAMILIES[family]
    if not spec.grouped and kv_heads not in (None, heads):
        raise IntaglioError(f"kv_heads is {kv_heads}; {family} has as many as heads, {heads}")
    tokens = _tokenizer(tokenizer, vocab, context, spec.encoder)
    rows = _rows(tokens, vocab)
    fields = {
        "vocab_size": rows,
        "hidden_size": width,
        spec.inner: -(-round(width * spec.feed_forward) // 8) * 8,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": rows <= TIED,
        **{f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ("pad", "bos", "eos")},
        **({"num_key_value_heads": kv_heads or heads} if spec.grouped else {}),
        **spec.extra(context, depth, width // heads),
    }
    if spec.encoder:
        fields |= {"cls_token_id": tokens.cls_token_id, "sep_token_id": tokens.sep_token_id}
    auto = AutoModelForMaskedLM if spec.encoder else AutoModelForCausalLM
    model = _model(spec.model_type, auto, fields, overrides, seed)
    return Checkpoint(model, tokens, source=f"new {family}")


def _heads(width: int) -> int:
    """Return the number of heads whose even size is nearest to the default."""
    target = 64 if width >= 512 else 32
    divisors = [heads for heads in range(1, width + 1) if width % heads == 0 and width // heads % 2 == 0]
    if not divisors:
        raise IntaglioError(f"width is {width}; it must be even")
    return min(divisors, key=lambda heads: (abs(width // heads - target), heads))


def _model(model_type: str, auto: Any, fields: dict[str, Any], overrides: dict[str, Any], seed: int) -> Any:
    plain = AutoConfig.for_model(model_type)
    unknown = [name for name in overrides if not hasattr(plain, name)]
    if unknown:
        known = [name for name in plain.to_dict() if not name.startswith("_")]
        raise IntaglioError(f"{model_type} has no field {unknown[0]!r}; {did_you_mean(unknown[0], known)}")
    try:
        config = AutoConfig.for_model(model_type, **{**fields, **overrides})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return auto.from_config(config).eval()
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise IntaglioError(f"a {model_type} of these sizes cannot be created: {reason}") from error


def _rows(tokenizer: Any, vocab: int | None) -> int:
    entries = max(tokenizer.get_vocab().values(), default=-1) + 1
    if vocab is not None and vocab < entries:
        raise IntaglioError(f"vocab is {vocab}; the tokenizer has {entries} entries, and vocab must be at least that")
    return vocab or entries


def _tokenizer(wanted: Any, vocab: int | None, context: int, encoder: bool) -> Any:
    if hasattr(wanted, "get_vocab"):
        return wanted
    if isinstance(wanted, str) and wanted == "bytes":
        return byte_tokenizer(context, encoder=encoder)
    if isinstance(wanted, (str, os.PathLike, Corpus)) or (isinstance(wanted, Sequence) and wanted):
        return trained_tokenizer(load_texts(wanted), TRAINED if vocab is None else vocab, context, encoder=encoder)
    raise IntaglioError(f"tokenizer is {shorten(repr(wanted))}; accepted: bytes, texts to train one on, a tokenizer")


def byte_letters() -> list[str]:
    """Return the letter by which byte-level tokenizers write each of the 256 bytes.

    Printable bytes are written as themselves, the others as the letters from U+0100 on, in order (Radford et al.,
    Language Models are Unsupervised Multitask Learners, 2019).
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(BYTES)]


def byte_tokenizer(context: int, *, encoder: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the 256 bytes: byte b is id b; the special tokens start at 256."""
    backend = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(byte_letters())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _wrap(backend, context, encoder)


def word_tokenizer(vocabulary: Sequence[str], **roles: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words separated by white space, whose ids are their places in the vocabulary.

    `roles` are `pad_token`, `unk_token` (needed) and so on; nothing is added to a text.
    """
    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=roles["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def trained_tokenizer(texts: Corpus, vocab: int, context: int, *, encoder: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on texts; it reads any text without loss."""
    least = BYTES + len(SPECIAL)
    if vocab < least:
        raise IntaglioError(f"vocab is {vocab}; a tokenizer trained on texts needs at least {least} entries")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab - len(SPECIAL), initial_alphabet=byte_letters(), show_progress=False)
    backend.train_from_iterator(texts.documents, trainer)
    return _wrap(backend, context, encoder)


def _wrap(backend: Tokenizer, context: int, encoder: bool) -> PreTrainedTokenizerFast:
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL.values()))
    special = dict(SPECIAL)
    if encoder:
        special |= {"cls_token": SPECIAL["bos_token"], "sep_token": SPECIAL["eos_token"]}
        begin, end = SPECIAL["bos_token"], SPECIAL["eos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}",
            pair=f"{begin} $A {end} $B:1 {end}:1",
            special_tokens=[(token, backend.token_to_id(token)) for token in (begin, end)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        # Text that spells a special token is ordinary text.
        split_special_tokens=True,
        **special,
    )
