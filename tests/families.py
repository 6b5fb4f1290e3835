"""Tiny random-weight stock models of every family the tests run over, and a tokenizer to go with them.

Nothing is downloaded: configurations, weights and tokenizers are made in memory from a seed. The weights are large
(linears N(0, 0.2²), norms and biases 0.1 away from their neutral value) so that a mistake in a mask, an order or a
scale moves the logits by far more than rounding does.

    model = tiny_model("gemma3")             # Gemma3ForCausalLM, 4 layers, eval mode
    tokenizer = tiny_tokenizer("gemma3")     # byte-level BPE of 160 entries
    tiny_checkpoint_dir("gemma3", tmp_path)  # both, as `from_pretrained` reads them
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 160
WIDTH = 32
INTERMEDIATE = 48
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 8
MAX_POSITIONS = 128
WINDOW = 8
PAD, BOS, EOS, UNK, MASK = 0, 1, 2, 3, 4

_TEXT = (
    "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun\n"
    "def area(width, height):\n    return width * height\n"
    "she said that the other one is there, and there is no other thing in it\n"
    "what is the name of the river that runs through the town? it is in the north\n"
) * 3

_CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def _stock(layers: int) -> dict[str, Any]:
    """What most configurations call the sizes, and the special tokens of `tiny_tokenizer`."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def _grouped(layers: int, **more: Any) -> dict[str, Any]:
    return {
        **_stock(layers),
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "tie_word_embeddings": False,
        **more,
    }


def _gemma3(layers: int) -> dict[str, Any]:
    kinds = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(layers)]
    return _grouped(
        layers, tie_word_embeddings=True, sliding_window=WINDOW, layer_types=kinds, query_pre_attn_scalar=HEAD_DIM
    )


def _phi3(layers: int) -> dict[str, Any]:
    # Phi-3 has no head_dim field, and would read the place of the scaled rotary table from the original length.
    sizes = _grouped(layers, original_max_position_embeddings=MAX_POSITIONS, sliding_window=None)
    del sizes["head_dim"]
    return sizes


def _gpt_neox(layers: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return {**_stock(layers), "tie_word_embeddings": False, "rope_parameters": rope}


def _gpt2(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "n_positions": MAX_POSITIONS,
        "n_embd": WIDTH,
        "n_inner": INTERMEDIATE,
        "n_layer": layers,
        "n_head": HEADS,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def _modernbert(layers: int) -> dict[str, Any]:
    # local_attention counts both sides: 8 is four tokens to the left and four to the right.
    return {**_stock(layers), "local_attention": WINDOW, "cls_token_id": BOS, "sep_token_id": EOS}


@dataclass(frozen=True)
class Family:
    """One model family of the tests.

    Attributes:
        name: key in `FAMILIES`.
        model_type: transformers' name of the architecture.
        sizes: number of layers -> keyword arguments of the configuration.
        encoder: a masked language model that sees both sides; otherwise a causal decoder.
        windowed: some layer sees a sliding window only.
        tied: the output projection is the embedding table.
    """

    name: str
    model_type: str
    sizes: Callable[[int], dict[str, Any]] = field(repr=False)
    encoder: bool = False
    windowed: bool = False
    tied: bool = False


_ALL = (
    Family("llama", "llama", _grouped),
    Family("qwen3", "qwen3", _grouped),
    Family("mistral", "mistral", functools.partial(_grouped, sliding_window=None)),
    Family("mistral_window", "mistral", functools.partial(_grouped, sliding_window=WINDOW), windowed=True),
    Family("gemma3", "gemma3_text", _gemma3, windowed=True, tied=True),
    Family("bert", "bert", _stock, encoder=True, tied=True),
    Family("modernbert", "modernbert", _modernbert, encoder=True, windowed=True, tied=True),
    Family("llama_tied", "llama", functools.partial(_grouped, tie_word_embeddings=True), tied=True),
    Family("phi3", "phi3", _phi3),
    Family("gpt_neox", "gpt_neox", _gpt_neox),
    Family("gpt2", "gpt2", _gpt2, tied=True),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
EXTRA_FAMILIES = ("llama_tied", "phi3", "gpt_neox", "gpt2")
DESIGN_FAMILIES = tuple(name for name in FAMILIES if name not in EXTRA_FAMILIES)
FAST_FAMILIES = ("llama", "gemma3", "gpt2", "bert")
"""Families of the fast tests; the slow ones run over all."""
DECODERS = tuple(name for name, family in FAMILIES.items() if not family.encoder)
ENCODERS = tuple(name for name, family in FAMILIES.items() if family.encoder)


@torch.no_grad()
def _fill(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter anew from `seed`: matrices N(0, 0.2²), vectors their neutral value plus N(0, 0.1²)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # tied tensors come once
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            # The fresh value is neutral: ones in most norms, zeros in biases and in Gemma's (1 + weight) norms.
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(0.2 * noise)


def tiny_model(
    family: str, seed: int = 0, layers: int = 4, dtype: torch.dtype = torch.float32, **config_overrides: Any
) -> Any:
    """Return a stock model with random weights in eval mode: a causal LM, or a masked LM for encoders.

    Args:
        family: a name in `FAMILIES`.
        seed: of the weights; the global generator is neither read nor moved.
        layers: number of blocks. Default 4.
        dtype: of the weights, drawn in float32 first. Default float32.
        **config_overrides: fields of the configuration, over the family's own.
    """
    spec = FAMILIES[family]
    config = AutoConfig.for_model(spec.model_type, **{**spec.sizes(layers), **config_overrides})
    auto = AutoModelForMaskedLM if spec.encoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        model = auto.from_config(config)
    _fill(model, seed)
    return model.to(dtype).eval()


@functools.lru_cache
def _trained_tokenizer(encoder: bool) -> str:
    """Return the JSON of a byte-level BPE of at most `VOCAB` entries; bytes outside printable ASCII become unknown."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"] if encoder else ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token=special[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # ByteLevel writes space, newline and tab as these three letters, other printable ASCII as itself.
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "ĉ"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    if encoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", BOS), ("[SEP]", EOS)]
        )
    return tokenizer.to_str()


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 160 entries that reads ASCII without loss.

    Decoders: `<pad>` 0, `<s>` 1, `</s>` 2, `<unk>` 3, a chat template, no tokens added to a text. Encoders: `[PAD]`,
    `[CLS]`, `[SEP]`, `[UNK]`, `[MASK]` 0 to 4, and `[CLS] ... [SEP]` put round every text.

    Args:
        family: a name in `FAMILIES`.
    """
    encoder = FAMILIES[family].encoder
    backend = Tokenizer.from_str(_trained_tokenizer(encoder))
    if encoder:
        names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk", "mask")}
    else:
        names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=MAX_POSITIONS, clean_up_tokenization_spaces=False, **names
    )
    if not encoder:
        tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def tiny_checkpoint_dir(family: str, path: str | os.PathLike[str], **model_arguments: Any) -> Path:
    """Save model and tokenizer of `family` with `save_pretrained`, and return the directory.

    Args:
        family: a name in `FAMILIES`.
        path: the directory; made if it is not there.
        **model_arguments: passed to `tiny_model`.
    """
    path = Path(path)
    tiny_model(family, **model_arguments).save_pretrained(path)
    tiny_tokenizer(family).save_pretrained(path)
    return path
