"""POINTS: the perplexity filter, the dual encoder, and the selection of data sets."""

from __future__ import annotations

import inspect
import math
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, Trainer, TrainingArguments

import intaglio
from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.training.points import (
    POINTS,
    DualEncoder,
    caption_perplexity,
    individual_select,
    perplexity,
    pixel_shuffle,
)
from intaglio.methods.training.points.perplexity import lowest, perplexities
from intaglio.modeling.partial_pass import HeadOnly
from intaglio.trainer import CausalLM, EpochCollator, KeyedRNG, train, training_rows
from intaglio.trainer.dataset import all_examples, as_example
from intaglio.trainer.tokenised_samples import read_samples
from tests.alive import alive
from tests.families import tiny_checkpoint_dir, tiny_tokenizer
from tests.trainer.helpers import TEXTS, checkpoint

EXAMPLES = ({"budget": 0.2}, {"budget": 0.2, "keep": "highest"})
PAIRS = [{"prompt": f"say {n} times", "answer": text} for n, text in enumerate(TEXTS[:6])]
ALIVE = {
    "budget": 0.5,
    "keep": "highest",
    "scorer": "test_another_model_scores",
    "length": alive(4),
    "chat": "test_the_chat_template_is_part_of_the_prompt",
    "batch_size": "test_batches_are_of_the_size_that_is_given",
}


def observe(method: POINTS) -> Any:
    ckpt = checkpoint(layers=1)
    return list(method.select([as_example(ckpt, n, t, keep_text=True) for n, t in enumerate(TEXTS)], ckpt, None,
                              method.budget, KeyedRNG(0)))  # fmt: skip


def uniform_model() -> Checkpoint:
    ckpt = checkpoint(layers=1)
    nn.init.zeros_(ckpt.model.lm_head.weight)  # type: ignore[union-attr, arg-type]
    return ckpt


def scored(method: POINTS, data: Any, ckpt: Checkpoint) -> list[float]:
    return method.scores(data, ckpt)


# --- Faithful means ---------------------------------------------------------------------------------------------------


def test_the_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    """ppl of uniform model = |V|."""
    ckpt = uniform_model()
    for data in (TEXTS[:3], PAIRS[:3]):
        assert scored(POINTS(), data, ckpt) == pytest.approx([ckpt.vocabulary] * 3, rel=1e-4)


def test_prompts_and_padding_are_not_scored() -> None:
    """ppl ignores prompt and pad tokens; batch and single scoring agree; a duplicate gets the same ppl."""
    ckpt = checkpoint(layers=1)
    data = [*PAIRS, PAIRS[0]]
    together = scored(POINTS(batch_size=7), data, ckpt)
    alone = [scored(POINTS(), [pair], ckpt)[0] for pair in data]
    assert together == pytest.approx(alone, rel=1e-4)
    assert together[0] == together[6]
    sample = read_samples([PAIRS[0]], ckpt, None, chat=True)[0]
    ids = torch.tensor([[*sample.prompt, *sample.answer]])
    labels = ids.clone()
    labels[:, : len(sample.prompt)] = -100
    with torch.no_grad():
        loss = ckpt.model(input_ids=ids, labels=labels).loss
    assert together[0] == pytest.approx(math.exp(float(loss)), rel=1e-4)


def test_the_two_lowest_of_ten_stay_and_all_of_them_by_a_budget_of_one() -> None:
    """keep=1 keeps everything; keep=.2 of 10 -> 2 items with lowest ppl."""
    ckpt = checkpoint(layers=1)
    examples = all_examples(ckpt, TEXTS[:10])
    assert examples is not None
    scores = scored(POINTS(), examples, ckpt)
    ranked = sorted(range(10), key=lambda n: scores[n])
    for fields, budget, expected in (({}, 0.2, ranked[:2]), ({"keep": "highest"}, 0.2, ranked[-2:]), ({}, 1.0, ranked)):
        chosen = POINTS(**fields).select(examples, ckpt, None, budget, KeyedRNG(0))
        assert list(chosen) == sorted(expected)
        assert chosen.metadata["keep"] == fields.get("keep", "lowest")
    assert chosen.metadata["examples"] == chosen.metadata["chosen"] == 10
    assert chosen.metadata["bars"]["items"]["least"] == min(scores)
    assert [row["perplexity"] for row in chosen.metadata["clusters"]] == sorted(scores)[:3] + sorted(scores)[-3:]
    few = POINTS().select(examples, ckpt, None, 0.2, KeyedRNG(0)).metadata
    assert [row["chosen"] for row in few["clusters"]] == ["yes", "yes", "no", "no", "no", "no"]
    assert few["clusters"][0]["example"] == TEXTS[ranked[0]][:57] + "..."
    assert few["bars"]["items"]["median of the chosen"] == pytest.approx((scores[ranked[0]] + scores[ranked[1]]) / 2)


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=20), st.floats(0.01, 1))
def test_the_lowest_are_never_above_the_rest(scores: list[float], share: float) -> None:
    kept = lowest(scores, share)
    assert len(kept) == max(1, int(share * len(scores) + 1e-9))
    rest = [score for n, score in enumerate(scores) if n not in kept]
    assert max(scores[n] for n in kept) <= min(rest, default=math.inf)
    assert sorted(lowest(scores, share, highest=True)) == sorted(lowest([-score for score in scores], share))


def test_captions_are_scored_by_labels() -> None:
    """ppl(s) = exp(-(1/N) sum log P) over CAPTION tokens only, per sample, not a mean over the batch."""
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, 2, 3, 4], [-100] * 5])
    log_probs = logits.log_softmax(-1)
    first = math.exp(-float(log_probs[0, 1, 3] + log_probs[0, 2, 4]) / 2)
    second = math.exp(-sum(float(log_probs[1, n, n + 1]) for n in range(4)) / 4)
    assert caption_perplexity(logits, labels).tolist() == pytest.approx([first, second, math.inf])


def test_pixel_shuffle_is_a_permutation_of_neighbours() -> None:
    """Pixel shuffle is invertible; 576x1024 -> 144x4096; sum of squares preserved."""
    features = torch.randn(2, 576, 1024)
    shuffled = pixel_shuffle(features)
    assert shuffled.shape == (2, 144, 4096)
    torch.testing.assert_close(shuffled.square().sum(), features.square().sum())
    assert torch.equal(shuffled.flatten().sort().values, features.flatten().sort().values)
    grid = torch.arange(16.0).reshape(1, 16, 1)  # a 4 x 4 grid, row by row
    assert pixel_shuffle(grid)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert pixel_shuffle(grid, factor=4).shape == (1, 1, 16)
    for tokens, factor in ((15, 2), (16, 3)):
        with pytest.raises(IntaglioError, match=f"{tokens} tokens form no square grid whose side {factor} divides"):
            pixel_shuffle(torch.zeros(1, tokens, 2), factor)


def encoder(seed: int, width: int = 16, layers: int = 3) -> CLIPVisionModel:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(hidden_size=width, intermediate_size=16, num_hidden_layers=layers,
                              num_attention_heads=2, image_size=16, patch_size=4)  # fmt: skip
    return CLIPVisionModel(config).eval()


def test_the_dual_encoder_fuses_patches_of_the_penultimate_layer() -> None:
    """Fusion alpha=1 equals the single-encoder model exactly; identical encoders -> any alpha gives the same."""
    a, b = encoder(0), encoder(1)
    pixels = torch.randn(2, 3, 16, 16)
    both = DualEncoder(a, b, 12)
    with torch.no_grad():
        own, other = (one(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:] for one in (a, b))
        torch.testing.assert_close(both.features(pixels), 0.5 * own + 0.5 * other)
        assert torch.equal(DualEncoder(a, b, 12, fusion_weight=1.0).features(pixels), own)
        assert torch.equal(DualEncoder(a, b, 12, fusion_weight=0.0).features(pixels), other)
        torch.testing.assert_close(DualEncoder(a, a, 12, fusion_weight=0.3).features(pixels), own)
        last = a(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        assert torch.equal(DualEncoder(a, b, 12, fusion_weight=1.0, layer=-1).features(pixels), last)
        tokens = both(pixels)
        assert tokens.shape == (2, 4, 12)
        into, _, out = both.projector
        assert torch.equal(tokens, out(F.gelu(into(pixel_shuffle(both.features(pixels))))))
        assert DualEncoder(a, b, 12, factor=4)(pixels).shape == (2, 1, 12)
    with pytest.raises(IntaglioError, match=r"fusion_weight is 1.5; a number from 0 to 1"):
        DualEncoder(a, b, 12, fusion_weight=1.5)
    with pytest.raises(IntaglioError, match="hidden sizes are 16 and 8"):
        DualEncoder(a, encoder(0, width=8), 12)


def test_individual_select_keeps_what_raises_the_score() -> None:
    """Individual Select: add one dataset at a time, keep if the average rises."""
    gains, calls = {"a": 2, "b": -1, "c": 0, "d": 1}, []

    def score(chosen: list[str]) -> float:
        calls.append(list(chosen))
        return sum(gains[name] for name in chosen)

    assert individual_select(["b", "c", "d"], score, ["a"]) == (["a", "d"], 3)
    assert calls == [["a"], ["a", "b"], ["a", "c"], ["a", "d"]]
    assert individual_select(["b", "d"], score) == (["b", "d"], 0)


# --- The selector -----------------------------------------------------------------------------------------------------


def test_another_model_scores(tmp_path: Path) -> None:
    other = tiny_checkpoint_dir("llama", tmp_path / "scorer", layers=1, seed=5)
    tokenizer = tiny_tokenizer("llama")  # unlike the model's, it puts <s> before every text
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save_pretrained(other)
    ckpt = checkpoint(layers=1)
    examples = all_examples(ckpt, TEXTS[:6])
    assert examples is not None
    method = POINTS(scorer=str(other))
    chosen = method.select(examples, ckpt, None, 0.5, KeyedRNG(0))
    scores = scored(POINTS(), TEXTS[:6], intaglio.load(str(other)))
    assert list(chosen) == sorted(lowest(scores, 0.5))
    assert chosen.metadata["bars"]["items"]["least"] == pytest.approx(min(scores))
    assert scored(method, examples, intaglio.load(str(other))) == pytest.approx(scores)
    misleading = [{"text": text, "input_ids": [9, 10], "id": n} for n, text in enumerate(TEXTS[:6])]
    assert scored(method, misleading, intaglio.load(str(other))) == pytest.approx(scores)
    with pytest.raises(IntaglioError, match=r"example 0 has only token ids; the scorer .* needs its text"):
        method.select([{"input_ids": [9, 10], "id": 0}], ckpt, None, 0.5, KeyedRNG(0))


def test_the_chat_template_is_part_of_the_prompt() -> None:
    ckpt = checkpoint(layers=1)
    ckpt.tokenizer.chat_template = "{% for m in messages %}the quick {{ m.content }} dog{% endfor %}"
    with_chat, without = (scored(POINTS(chat=chat), PAIRS, ckpt) for chat in (True, False))
    assert with_chat != pytest.approx(without)


def test_batches_are_of_the_size_that_is_given() -> None:
    ckpt, sizes = checkpoint(layers=1), []
    hook = ckpt.model.get_input_embeddings().register_forward_pre_hook(  # type: ignore[operator]
        lambda module, args: sizes.append(len(args[0]))
    )
    calls: list[tuple[int, int]] = []
    POINTS(batch_size=4).scores(TEXTS[:10], ckpt, progress=lambda done, total, what: calls.append((done, total)))
    hook.remove()
    assert sizes == [4, 4, 2]
    assert calls == [(4, 10), (8, 10), (10, 10)]


def test_a_choice_has_batches_of_like_lengths_and_a_part_of_the_logits_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ckpt, shapes, rows = checkpoint(layers=1), [], []
    texts = [text[: 20 + 7 * n % 10 * 3] for n, text in enumerate(TEXTS[:10])]
    expected = scored(POINTS(), texts, ckpt)
    ckpt.model.get_input_embeddings().register_forward_pre_hook(  # type: ignore[operator]
        lambda module, args: shapes.append(tuple(args[0].shape))
    )
    compute = HeadOnly.logits
    monkeypatch.setattr(perplexity, "ELEMENTS", 5 * ckpt.vocabulary)
    monkeypatch.setattr(HeadOnly, "logits", lambda head, x: rows.append(x.shape[1]) or compute(head, x))
    chosen = POINTS(batch_size=3).select(texts, ckpt, None, 0.2, KeyedRNG(0))
    assert [count for count, _ in shapes] == [3, 3, 3, 1]
    assert [width for _, width in shapes] == sorted(width for _, width in shapes)
    assert len({width for _, width in shapes}) > 1
    assert max(rows) == 5
    assert list(chosen) == sorted(lowest(expected, 0.2))
    assert chosen.metadata["clusters"][0]["example"] == texts[expected.index(min(expected))]


def test_texts_of_one_token_come_last_and_modes_are_kept() -> None:
    ckpt = checkpoint(layers=1)
    ckpt.model.train()
    rows = [{"input_ids": [9], "id": 0}, {"input_ids": [9, 10, 11], "id": 1}]
    modes: list[bool] = []
    ckpt.model.get_input_embeddings().register_forward_hook(  # type: ignore[operator]
        lambda module, args, out: modes.append(module.training)
    )
    scores = scored(POINTS(), rows, ckpt)
    assert modes == [False]  # dropout is off
    assert scores[0] == math.inf
    assert scores[1] < math.inf
    assert ckpt.model.training
    alone = POINTS().select(rows[:1], ckpt, None, 1.0, KeyedRNG(0))
    assert list(alone) == [0]
    assert alone.metadata == {"examples": 1, "chosen": 1, "keep": "lowest"}


def test_refusals() -> None:
    bert = checkpoint("bert", layers=1)
    with pytest.raises(IntaglioError, match="does not predict the next token; a causal model does"):
        perplexities(read_samples([{"input_ids": [9, 10], "text": "a", "id": 0}], bert, None, chat=True), bert)
    with pytest.raises(IntaglioError, match="points chooses among examples, and there are none"):
        POINTS().select([], checkpoint(layers=1), None, 0.2, KeyedRNG(0))
    broken = checkpoint(layers=1)
    nn.init.constant_(broken.model.lm_head.weight, float("nan"))  # type: ignore[union-attr, arg-type]
    with pytest.raises(IntaglioError, match="points: a prediction is not finite"):
        scored(POINTS(), TEXTS[:1], broken)
    for budget in (0.0, 1.1):
        with pytest.raises(ValueError, match="budget"):
            POINTS(budget=budget)


def test_it_selects_in_a_training_run() -> None:
    ckpt = checkpoint(layers=1)
    examples = all_examples(ckpt, TEXTS)
    assert examples is not None
    expected = POINTS().select(examples, checkpoint(layers=1), None, 0.2, KeyedRNG(0))
    train(ckpt, TEXTS, objective=CausalLM(length=24), select=POINTS(), steps=1, batch_size=2)
    step = ckpt.record.steps[-1]
    assert step.chosen["selection"]["chosen"] == len(expected) == 6


def test_the_five_lines_of_a_stock_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = inspect.getdoc(POINTS) or ""
    code = textwrap.dedent(lines[lines.index("    checkpoint = intaglio.load") : lines.index("\n\nLow perplexity")])
    assert len(code.strip().splitlines()) == 5
    ckpt = checkpoint(layers=1)
    before = {name: value.clone() for name, value in ckpt.model.state_dict().items()}
    monkeypatch.setattr(intaglio, "load", lambda name: ckpt)
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    names = {"intaglio": intaglio, "all_examples": all_examples, "POINTS": POINTS, "KeyedRNG": KeyedRNG, "texts": TEXTS,
             "training_rows": training_rows, "CausalLM": lambda length=24: CausalLM(length=min(length, 24)),
             "EpochCollator": EpochCollator, "Trainer": Trainer, "arguments": arguments}  # fmt: skip
    exec(code, names)
    assert len(names["chosen"]) == 6  # type: ignore[arg-type]
    assert any(not torch.equal(before[name], value) for name, value in ckpt.model.state_dict().items())
