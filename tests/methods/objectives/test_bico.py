"""BICO denoises with reflected rotations and trains a stock causal model: each line of what makes it faithful."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import intaglio
from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.masks import Bidirectional, Causal, temporary_visibility
from intaglio.masks.attention_interface import ATTENTION
from intaglio.methods.objectives.bico import BICO, reflected, reflected_scores
from intaglio.modeling.anatomy import attention, blocks
from intaglio.trainer import KeyedRNG
from intaglio.trainer.causal_lm import IGNORED, causal_batch, next_token_loss
from intaglio.trainer.rng import generator
from intaglio.trainer.stock_trainer import EpochCollator, training_rows
from tests.alive import refused
from tests.causal_lms import tiny_lm
from tests.families import tiny_model, tiny_tokenizer
from tests.trainer.helpers import TEXTS, checkpoint, run, same, weights

EXAMPLES = ({"length": 24}, {"length": 24, "denoise_ratio": 1.0, "attend_masked": True})
BASE = {"length": 24, "denoise_ratio": 0.7}
ALIVE = {
    "denoise_ratio": 0.0,
    "mask_ratio": 0.4,
    "flip": False,
    "bidirectional": False,
    "attend_masked": True,
    "mask_token": 3,
    "grow": refused(False),
    "length": 12,
}

DRAWS = KeyedRNG(0)
ROTARY = ("llama", "qwen3", "mistral_window", "gemma3", "phi3", "gpt_neox")


def prepared(family: str = "llama", **fields: Any) -> tuple[BICO, list[Any], Checkpoint]:
    """A method that always denoises, its rows, and the checkpoint."""
    ckpt = checkpoint(family)
    method = BICO(**{"length": 16, "denoise_ratio": 1.0, "mask_ratio": 0.3, **fields})
    return method, training_rows(method, ckpt, TEXTS, DRAWS), ckpt


def logits(method: BICO, model: Any, batch: Any) -> Tensor:
    """The logits of a loss."""
    with torch.no_grad():
        result: Tensor = method.loss(model, batch).outputs
    return result


def rotations(positions: int, width: int = 2) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, T, D] of 0..T-1; with a width of 2 theta is 1."""
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.cat([angles, angles], -1).cos()[None], torch.cat([angles, angles], -1).sin()[None]


def scores(query_TD: Tensor, key_TD: Tensor, flip: bool = True) -> Tensor:
    """Scores [T, T] of queries and keys that stand at their places."""
    cos, sin = rotations(*query_TD.shape)
    rotated = apply_rotary_pos_emb(query_TD[None, None], key_TD[None, None], cos, sin)
    if not flip:
        return (rotated[0] @ rotated[1].transpose(-1, -2))[0, 0]
    return reflected_scores(*rotated, lambda q, k: apply_rotary_pos_emb(q, k, cos, -sin))[0, 0]


def test_the_worked_numbers() -> None:
    """2-D, theta = 1: a key on the right scores as one on the left."""
    for query, key, m, n, stock, right, flipped in (
        ((1.0, 0.0), (0.0, 1.0), 1, 3, 0.909297, -0.909297, 0.909297),
        ((1.0, 2.0), (3.0, -1.0), 2, 5, -1.977833, -0.002152, -1.977833),
    ):
        queries, keys = torch.tensor(query).expand(6, 2), torch.tensor(key).expand(6, 2)
        assert scores(queries, keys)[n, m] == pytest.approx(stock, abs=1e-5)
        assert scores(queries, keys, flip=False)[m, n] == pytest.approx(right, abs=1e-5)
        assert scores(queries, keys)[m, n] == pytest.approx(flipped, abs=1e-5)


@given(st.integers(0, 10**6))
def test_a_key_on_the_right_scores_as_one_on_the_left(seed: int) -> None:
    """For any q, k, s_flip(query m, key n) with n > m equals the standard score of query n, key m."""
    vectors = torch.randn(2, 8, generator=generator(seed), dtype=torch.float64).float()
    queries, keys = (vector.expand(7, 8) for vector in vectors)
    found, stock = scores(queries, keys), scores(queries, keys, flip=False)
    assert torch.allclose(found, found.T, atol=1e-4)
    assert torch.equal(found.tril(), stock.tril())
    for distance in range(7):  # Toeplitz
        assert torch.allclose(found.diagonal(distance), found[0, distance].expand(7 - distance), atol=1e-4)


def test_next_token_batches_are_the_stock_model() -> None:
    """NTP branch is bit-identical to the stock model's loss. p_mask never changes the NTP branch."""
    for ratio in (0.01, 0.9):
        method, rows, ckpt = prepared(denoise_ratio=0.0, mask_ratio=ratio)
        batch, plain = method.collate(rows[:4], DRAWS), causal_batch(rows[:4])
        assert torch.equal(method.loss(ckpt.model, batch).total, next_token_loss(ckpt.model, plain).total)


@pytest.mark.parametrize("family", ROTARY)
def test_masked_tokens_do_not_leak(family: str) -> None:
    """No leak: the original id and the mask's row change no logits that do not begin at a masked token."""
    method, rows, ckpt = prepared(family)
    batch = method.collate(rows[:3], DRAWS)
    masked = batch["input_ids"] == method._mask_id
    assert masked.any()
    before = logits(method, ckpt.model, batch)
    changed = [{**row, "input_ids": torch.where(m[: len(row["input_ids"])], 77, row["input_ids"])}
               for row, m in zip(rows[:3], masked, strict=True)]  # fmt: skip
    again = method.collate([{**row, "labels": row["input_ids"]} for row in changed], DRAWS)
    assert torch.equal(logits(method, ckpt.model, again), before)
    with torch.no_grad():
        ckpt.model.get_input_embeddings().weight[method._mask_id] += 1.0
    after = logits(method, ckpt.model, batch)
    tied = ckpt.model.get_input_embeddings().weight is ckpt.model.get_output_embeddings().weight
    kept = torch.arange(before.shape[-1]) != (method._mask_id if tied else -1)
    clean = batch["attention_mask"].bool()
    assert torch.equal(after[clean][:, kept], before[clean][:, kept])
    assert not torch.equal(after[masked][:, kept], before[masked][:, kept])


def test_no_weight_falls_on_masked_or_padded_keys() -> None:
    """Attention weight on any masked or padded key is exactly 0 in every layer and head."""
    method, rows, ckpt = prepared(length=24)
    short = {**rows[1], "input_ids": rows[1]["input_ids"][:9], "labels": rows[1]["labels"][:9]}
    batch = method.collate([rows[0], short], DRAWS)
    seen: list[Tensor] = []
    with temporary_visibility(ckpt.model, Bidirectional()), reflected(ckpt.model):
        for module in map(attention, blocks(ckpt.model)):
            module.__dict__[ATTENTION] = Recording(module.__dict__[ATTENTION], seen)
        ckpt.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    hidden = (batch["attention_mask"] == 0)[:, None, None, :]
    assert len(seen) == 2
    for weights_BHTT in seen:
        assert (weights_BHTT.masked_select(hidden) == 0).all()
        assert torch.allclose(weights_BHTT.sum(-1), torch.ones(()), atol=1e-5)
        assert (weights_BHTT.masked_select(~hidden) > 0).all()


class Recording:
    """An attention function that keeps its weights."""

    def __init__(self, own: Any, seen: list[Tensor]) -> None:
        self.own, self.seen, self.handle = own, seen, own.handle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output, weights_BHTT = self.own(*args, **kwargs)
        self.seen.append(weights_BHTT)
        return output, weights_BHTT


@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_right_context_is_used(bidirectional: bool) -> None:
    """For i in K, d logits[i-1] / d E[x_j] nonzero for some unmasked j > i; zero under causal attention."""
    method, rows, ckpt = prepared(bidirectional=bidirectional)
    batch = method.collate(rows[:1], DRAWS)
    embedded = ckpt.model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    place = int((batch["target"][0] != IGNORED).nonzero()[0])
    inputs = {**batch, "inputs_embeds": embedded}
    del inputs["input_ids"]
    method.loss(ckpt.model, inputs).outputs[0, place].sum().backward()
    assert embedded.grad is not None
    later = embedded.grad[0, place + 2 :][batch["attention_mask"][0, place + 2 :].bool()]
    assert bool(later.any()) == bidirectional
    assert embedded.grad[0, :place].any()


def test_without_bidirectional_attention_masked_keys_are_removed() -> None:
    """bidirectional=off: the denoise forward equals a causal forward with masked keys removed."""
    method, rows, ckpt = prepared(bidirectional=False)
    batch = method.collate(rows[:1], DRAWS)
    kept = batch["attention_mask"][0].bool()
    places = torch.arange(len(kept))[kept][None]
    found = logits(method, ckpt.model, batch)[0, kept]
    ones = torch.ones_like(places)
    with torch.no_grad():
        stock = ckpt.model(batch["input_ids"][:, kept], position_ids=places, attention_mask=ones, use_cache=False)
    assert torch.allclose(found, stock.logits[0], atol=1e-4)


@pytest.mark.parametrize("family", ROTARY)
def test_the_flip_changes_scores_on_the_right_alone(family: str) -> None:
    method, rows, ckpt = prepared(family)
    plain = method.model_copy(update={"flip": False})
    batch = method.collate(rows[:2], DRAWS)
    found, other = logits(method, ckpt.model, batch), logits(plain, ckpt.model, batch)
    assert not torch.allclose(found, other, atol=1e-3)
    ids = batch["input_ids"][:, :1]
    one = {"input_ids": ids, "target": torch.full_like(ids, 7), "attention_mask": torch.ones_like(ids), "denoise": True}
    assert torch.allclose(logits(method, ckpt.model, one), logits(plain, ckpt.model, one), atol=1e-4)


def test_scaled_rotations_are_reflected_too() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    model = tiny_model("llama", layers=1, rope_parameters=scaling)
    assert model.model.rotary_emb.attention_scaling != 1.0
    ids = torch.full((1, 6), 9)
    seen: list[Tensor] = []
    with torch.no_grad(), temporary_visibility(model, Bidirectional()), reflected(model):
        module = attention(blocks(model)[0])
        module.__dict__[ATTENTION] = Recording(module.__dict__[ATTENTION], seen)
        model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    odds = seen[0][0, 0].log()
    for distance in range(1, 6):  # up to each row's normalisation, equal distances score alike
        right = float(odds[0, distance] - odds[0, 0])
        left = float(odds[distance, 0] - odds[distance, distance])
        assert right == pytest.approx(left, abs=1e-4)


@pytest.mark.parametrize("kind", ["smollm3", "phi", "olmo2", "opt"])
def test_other_families_are_denoised(kind: str) -> None:
    """Rotations are turned where a layer has any: SmolLM3 skips some, Phi turns a part of the width, OPT has none."""
    ckpt = Checkpoint(tiny_lm(kind), tiny_tokenizer("llama"), "tiny")
    method = BICO(length=16, denoise_ratio=1.0, mask_ratio=0.3)
    rows = training_rows(method, ckpt, TEXTS, DRAWS)
    batch = method.collate(rows[:2], DRAWS)
    plain = logits(method.model_copy(update={"flip": False}), ckpt.model, batch)
    assert torch.allclose(logits(method, ckpt.model, batch), plain, atol=1e-3) == (kind == "opt")


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gemma2", {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 1}),
        ("granite", {"attention_multiplier": 2.0}),
    ],
)
def test_below_the_diagonal_scores_are_the_stock_ones(kind: str, more: dict[str, Any]) -> None:
    """For j <= i use standard RoPE scores: scaled, and capped where the family caps them."""
    model = tiny_lm(kind, **more)
    model.set_attn_implementation("eager")
    ids = torch.arange(20, 32)[None]
    with torch.no_grad():
        stock = model(ids, use_cache=False).logits
        with temporary_visibility(model, Causal()), reflected(model):
            found = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    assert torch.allclose(found, stock, atol=1e-4)


def test_attention_dropout_is_the_models() -> None:
    method, rows, ckpt = prepared()
    batch = method.collate(rows[:2], DRAWS)
    for module in map(attention, blocks(ckpt.model)):
        module.attention_dropout = 0.5
    one, two = (logits(method, ckpt.model.train(mode), batch) for mode in (True, False))
    assert not torch.allclose(one, two, atol=1e-3)


def test_the_mask_row_follows_from_the_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        ckpt = checkpoint()
        training_rows(BICO(), ckpt, TEXTS, KeyedRNG(seed))
        found.append(ckpt.model.get_input_embeddings().weight[-1].detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_positions_do_not_depend_on_what_is_masked() -> None:
    """Positions are plain arange(T); OPT would count them by the mask."""
    ckpt = Checkpoint(tiny_lm("opt"), tiny_tokenizer("llama"), "tiny")
    method = BICO(length=16, denoise_ratio=1.0, mask_ratio=0.3)
    batch = method.collate(training_rows(method, ckpt, TEXTS, DRAWS)[:2], DRAWS)
    seen: list[Tensor] = []
    handle = ckpt.model.model.decoder.embed_positions.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    logits(method, ckpt.model, batch)
    handle.remove()
    assert torch.equal(seen[0], torch.arange(16).expand(2, -1))


@pytest.mark.parametrize("kind", ["cohere2", "exaone4"])
def test_rotations_that_cannot_be_turned_are_refused(kind: str) -> None:
    """Layers without rotations must not be turned: equal tokens would score unlike on the left and right."""
    config = {"layer_types": ["sliding_attention", "full_attention"]}
    ckpt = Checkpoint(tiny_lm(kind, **config), tiny_tokenizer("llama"), "tiny")
    with pytest.raises(IntaglioError, match="rotations cannot be turned; set flip: false"):
        run(ckpt, objective=BICO(length=16))
    run(ckpt, objective=BICO(length=16, flip=False, denoise_ratio=1.0), steps=1)


def test_the_model_is_stock_after_each_loss() -> None:
    method, rows, ckpt = prepared()
    ids = rows[0]["input_ids"][None]
    with torch.no_grad():
        before = ckpt.model(ids).logits
        method.loss(ckpt.model, method.collate(rows[:2], DRAWS))
        assert torch.equal(ckpt.model(ids).logits, before)
    assert ckpt.model.config._attn_implementation == "sdpa"
    assert not any(ATTENTION in module.__dict__ or module._forward_pre_hooks for module in ckpt.model.modules())
    assert ckpt.model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] == ids.shape[1] + 2


def test_outputs_before_masked_tokens_predict_them() -> None:
    method, rows, _ = prepared()
    batch = method.collate(rows[:4], DRAWS)
    masked = batch["input_ids"] == method._mask_id
    assert not masked[:, 0].any()
    assert torch.equal(batch["target"][:, :-1] != IGNORED, masked[:, 1:])
    for row, ids, target in zip(rows, batch["input_ids"], batch["target"], strict=False):
        clean = row["input_ids"]
        places = (target != IGNORED).nonzero().flatten()
        assert torch.equal(target[places], clean[places + 1])
        rest = ids != method._mask_id
        assert torch.equal(ids[: len(clean)][rest[: len(clean)]], clean[rest[: len(clean)]])


def test_masks_and_coins_are_drawn_with_their_probabilities() -> None:
    """Label count per denoise batch ~ Binomial(#eligible, 0.15); coin ~ Bernoulli(0.5)."""
    method, rows, _ = prepared(mask_ratio=0.15, denoise_ratio=0.5)
    many = [{**rows[0], "id": n} for n in range(1000)]
    denoised = [batch for row in many for batch in [method.collate([row], DRAWS)] if "denoise" in batch]
    assert abs(len(denoised) - 500) < 4 * math.sqrt(250)
    always = method.model_copy(update={"denoise_ratio": 1.0})
    count = int((always.collate(many, DRAWS)["target"] != IGNORED).sum())
    eligible = int(method._eligible(rows[0]).sum())
    assert eligible == 15
    assert abs(count - 150 * eligible) < 4 * math.sqrt(1000 * eligible * 0.15 * 0.85)


def test_special_tokens_and_tokens_without_a_label_stay() -> None:
    method, rows, _ = prepared(mask_ratio=0.95)
    row = {**rows[0], "input_ids": torch.tensor([9, 1, 10, 2, 11, 12]), "labels": torch.tensor([9, 1, 10, 2, 11, -100])}
    row["lengths"] = torch.tensor([6])
    assert method._eligible(row).tolist() == [False, False, True, False, True, False]


def test_a_batch_without_a_draw_masks_a_single_token() -> None:
    method, rows, ckpt = prepared(mask_ratio=1e-9)
    batch = method.collate(rows[:3], DRAWS)
    assert int((batch["target"] != IGNORED).sum()) == 1
    assert torch.isfinite(method.loss(ckpt.model, batch).total)
    nothing = {"input_ids": torch.tensor([1, 2]), "id": 0, "lengths": torch.tensor([2])}
    batch = method.collate([{**nothing, "labels": nothing["input_ids"]}], DRAWS)
    assert "denoise" not in batch
    assert torch.isfinite(method.loss(ckpt.model, batch).total)


def test_held_out_rows_are_never_denoised() -> None:
    method, rows, _ = prepared()
    assert "denoise" not in method.collate(rows[:3], KeyedRNG(0, training=False))


def test_it_trains_in_a_stock_trainer(tmp_path: Path) -> None:
    """The five lines of the docstring."""
    checkpoint_, texts = checkpoint(layers=1), TEXTS
    before = weights(checkpoint_)
    method, rng = intaglio.BICO(), KeyedRNG(seed=0)

    class Denoising(transformers.Trainer):
        compute_loss = lambda self, model, inputs, **_: method.loss(model, inputs).total  # noqa: E731

    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, remove_unused_columns=False, report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = training_rows(method, checkpoint_, texts, rng)
    Denoising(checkpoint_.model, arguments, EpochCollator(method, rng), rows).train()
    assert not same(before, weights(checkpoint_))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_adapters_are_trained_too(family: str) -> None:
    ckpt = checkpoint(family, layers=1)
    run(ckpt, objective=BICO(length=24, denoise_ratio=1.0, mask_token=3), steps=2, lora={"r": 2})
    assert not same(weights(ckpt), weights(checkpoint(family, layers=1)))
    assert type(ckpt.model) is type(tiny_model(family, layers=1))


def test_bad_input_is_one_sentence() -> None:
    cases = [
        (lambda: run(checkpoint(layers=1), objective=BICO(length=24), gradient_checkpointing=True),
         "gradient checkpointing repeats layers"),
        (lambda: prepared(mask_token=10**6), "mask_token is 1000000; the model has ids from"),
    ]  # fmt: skip
    for call, sentence in cases:
        with pytest.raises(IntaglioError, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValidationError):
        BICO(mask_ratio=0.0)
