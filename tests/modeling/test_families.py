from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from tests.families import (
    BOS,
    DECODERS,
    DESIGN_FAMILIES,
    ENCODERS,
    EOS,
    EXTRA_FAMILIES,
    FAMILIES,
    KV_HEADS,
    VOCAB,
    WIDTH,
    tiny_checkpoint_dir,
    tiny_model,
    tiny_tokenizer,
)

TEXT = "def area(width):\n\treturn 2 * width  # fox & dog? ~\\"


def test_groups_cover_the_families_once() -> None:
    assert set(DECODERS) | set(ENCODERS) == set(DESIGN_FAMILIES) | set(EXTRA_FAMILIES) == set(FAMILIES)
    assert not set(DECODERS) & set(ENCODERS)
    assert not set(DESIGN_FAMILIES) & set(EXTRA_FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_round_trip_keeps_the_logits(family: str, tmp_path: Path) -> None:
    model, path = tiny_model(family), tiny_checkpoint_dir(family, tmp_path / "model")
    auto = AutoModelForMaskedLM if FAMILIES[family].encoder else AutoModelForCausalLM
    loaded, tokenizer = auto.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    batch = tokenizer(TEXT, return_tensors="pt", return_token_type_ids=False)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert type(loaded) is type(model)
    assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer(family)(TEXT)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_model_is_what_the_table_says(family: str) -> None:
    spec, model = FAMILIES[family], tiny_model(family, layers=5, seed=3)
    ids_BT = torch.arange(5, 45)[None]
    logits_BTV = model(input_ids=ids_BT).logits
    assert logits_BTV.shape == (1, 40, VOCAB)
    assert logits_BTV.std() > 0.3  # far above rounding, so that a wrong mask shows
    assert not model.training
    assert model.config.num_hidden_layers == 5
    assert model.config.hidden_size == WIDTH
    assert getattr(model.config, "num_key_value_heads", KV_HEADS) == KV_HEADS
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == spec.tied
    # A change of the last token is seen by earlier positions in an encoder only.
    changed_BT = ids_BT.clone()
    changed_BT[0, -1] = 50
    moved_T = (model(input_ids=changed_BT).logits != logits_BTV).any(-1)[0]
    assert bool(moved_T[:-1].any()) == spec.encoder
    assert moved_T[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_seeds_decide_the_weights_and_leave_the_global_generator_alone(family: str) -> None:
    torch.manual_seed(0)
    first = tiny_model(family, seed=1)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)
    again, other = tiny_model(family, seed=1), tiny_model(family, seed=2)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    parameters = dict(other.named_parameters())
    assert all(not torch.equal(tensor, parameters[name]) for name, tensor in first.named_parameters())


def test_overrides_and_dtype() -> None:
    model = tiny_model("qwen3", dtype=torch.bfloat16, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    assert model.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert model.dtype == torch.bfloat16


@torch.no_grad()
def test_the_window_is_in_force() -> None:
    model, ids_BT = tiny_model("mistral_window", layers=2), torch.arange(5, 45)[None]
    changed_BT = ids_BT.clone()
    changed_BT[0, 0] = 50
    moved_T = (model(input_ids=changed_BT).logits != model(input_ids=ids_BT).logits).any(-1)[0]
    assert moved_T[:15].all()  # two windows of 8 reach 14 tokens back
    assert not moved_T[15:].any()


def test_gemma_slides_in_three_of_four_layers() -> None:
    assert tiny_model("gemma3").config.layer_types == ["sliding_attention"] * 3 + ["full_attention"]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_tokenizer(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    assert len(tokenizer) == VOCAB
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    assert max(ids) < VOCAB
    assert tokenizer.pad_token_id == 0
    assert len(tokenizer("the other")["input_ids"]) < len("the other")
    if FAMILIES[family].encoder:
        assert tokenizer(TEXT)["input_ids"] == [BOS, *ids, EOS]
        assert tokenizer.mask_token_id == 4
    else:
        assert tokenizer(TEXT)["input_ids"] == ids
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "the dog"}], add_generation_prompt=True, tokenize=False
        )
        assert text == "<s>user\nthe dog</s>\n<s>assistant\n"
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
