"""Models from scratch are stock models, and their tokenizers lose nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

import intaglio
from intaglio.checkpoint.from_scratch import FAMILIES, byte_tokenizer, new
from intaglio.errors import IntaglioError

BYTES = byte_tokenizer(64)
TEXTS = ["the quick brown fox jumps over the lazy dog", "the dog sleeps in the sun and the fox is there"] * 5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_model_is_what_the_stock_loader_reads(family: str, tmp_path: Path) -> None:
    ckpt = intaglio.new(family, width=32, depth=2, context=64)
    ckpt.save(tmp_path / "out")
    auto = AutoModelForMaskedLM if FAMILIES[family].encoder else AutoModelForCausalLM
    stock = auto.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(3, 43)[None]
    assert type(stock) is type(ckpt.model)
    assert torch.equal(stock(ids).logits, ckpt.model(ids).logits)
    again = intaglio.load(tmp_path / "out")
    assert again.context == 64
    assert again.model.config.num_hidden_layers == 2
    assert again.model.config.hidden_size == 32
    assert not ckpt.model.training


@given(st.text(max_size=40))
def test_the_byte_tokenizer_reads_bytes(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    assert ids == list(text.encode("utf-8"))
    assert BYTES.decode(ids) == text


def test_a_reloaded_tokenizer_is_stock_and_reads_the_same(tmp_path: Path) -> None:
    text = "x'll <|eos|> \t\r\n\x00 é 日本 🎉 <|pad|> "
    for tokenizer in ("bytes", TEXTS):
        ckpt = new("llama", width=32, depth=1, tokenizer=tokenizer)
        path = tmp_path / f"{len(tokenizer)}"
        ckpt.save(path)
        stock = AutoTokenizer.from_pretrained(path)
        assert type(stock).__module__.startswith("transformers")
        ids = stock(text)["input_ids"]
        assert ids == ckpt.tokenizer(text)["input_ids"]
        assert stock.decode(ids) == text
        assert not set(stock.all_special_ids) & set(ids)
        names = [stock.pad_token, stock.bos_token, stock.eos_token, stock.mask_token]
        assert names == ["<|pad|>", "<|bos|>", "<|eos|>", "<|mask|>"]


def test_encoders_put_texts_between_their_marks() -> None:
    ckpt = new("bert", width=32, depth=1)
    assert ckpt.tokenizer("ab")["input_ids"] == [257, 97, 98, 258]
    assert ckpt.tokenizer("a", "b")["input_ids"] == [257, 97, 258, 98, 258]


def test_a_vocabulary_is_trained_on_texts() -> None:
    ckpt = new("llama", width=32, depth=1, vocab=270, tokenizer=TEXTS)
    assert len(ckpt.tokenizer) == 270 == ckpt.model.get_input_embeddings().weight.shape[0]
    assert len(ckpt.tokenizer("the fox")["input_ids"]) < len("the fox")
    again = new("llama", width=32, depth=1, tokenizer=ckpt.tokenizer, vocab=300)
    assert again.model.config.vocab_size == 300
    assert again.model.config.eos_token_id == ckpt.tokenizer.eos_token_id


def test_the_seed_decides_and_the_global_generator_stays() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, two, three = (new("qwen3", width=32, depth=1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected)
    a, b, c = (ckpt.model.state_dict()["lm_head.weight"] for ckpt in (one, two, three))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_sizes_scale() -> None:
    small = new("llama", width=64, depth=1).model.config
    assert (small.num_attention_heads, small.intermediate_size, small.vocab_size) == (2, 176, 260)
    assert small.tie_word_embeddings
    wide = new("qwen3", width=512, depth=1, kv_heads=2).model.config
    assert (wide.num_attention_heads, wide.num_key_value_heads, wide.head_dim) == (8, 2, 64)
    gemma = new("gemma3", width=32, depth=7, context=64).model.config
    assert [kind[:4] for kind in gemma.layer_types] == [*["slid"] * 5, "full", "slid"]
    assert gemma.sliding_window == 16
    changed = new("llama", width=32, depth=1, tie_word_embeddings=False, intermediate_size=40).model
    assert changed.lm_head.weight is not changed.model.embed_tokens.weight
    assert changed.config.intermediate_size == 40


@pytest.mark.parametrize(
    ("family", "sizes", "sentence"),
    [
        ("lama", {}, "no family 'lama'; did you mean llama?"),
        ("llama", {"width": 0}, "width is 0; it must be a whole number of at least 1"),
        ("llama", {"width": 33}, "width is 33; it must be even"),
        ("llama", {"depth": 1.5}, "depth is 1.5; it must be a whole number"),
        ("llama", {"heads": 5}, "width is 32, which is not an even multiple of heads, 5"),
        ("llama", {"heads": 32}, "width is 32, which is not an even multiple of heads, 32"),
        ("llama", {"heads": 4, "kv_heads": 3}, "kv_heads is 3, which does not divide heads, 4"),
        ("bert", {"heads": 4, "kv_heads": 2}, "kv_heads is 2; bert has as many as heads, 4"),
        ("llama", {"vocab": 100}, "vocab is 100; the tokenizer has 260 entries"),
        ("llama", {"vocab": 100, "tokenizer": TEXTS}, "needs at least 260 entries"),
        ("llama", {"tokenizer": 3}, "tokenizer is 3; accepted: bytes, texts to train one on, a tokenizer"),
        ("llama", {"tokenizer": "no-such-texts"}, "no file, no folder"),
        ("llama", {"hidden_act": "nope"}, "a llama of these sizes cannot be created"),
        ("llama", {"sliding_windo": 3}, "llama has no field 'sliding_windo'"),
    ],
)
def test_bad_sizes_are_one_sentence(family: str, sizes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence) as caught:
        new(family, **{"width": 32, "depth": 1, **sizes})
    assert "\n" not in str(caught.value)
