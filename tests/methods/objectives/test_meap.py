"""MEAP hides inputs and nothing else: each line of what makes it faithful."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import intaglio
from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.objectives.meap import MEAP, attention_shift, draw_positions, mask_count, mask_inputs, masked
from intaglio.trainer import CausalLM, KeyedRNG
from intaglio.trainer.causal_lm import causal_batch, next_token_loss, targets
from intaglio.trainer.instruction_data import load_pairs
from intaglio.trainer.rng import generator
from tests.alive import alive, refused, taught
from tests.families import VOCAB, tiny_model, tiny_tokenizer
from tests.trainer.helpers import TEXTS, checkpoint, run, same, weights

EXAMPLES = ({"length": 24}, {"length": 24, "shared_positions": True, "cycle": 2})
BASE = {"length": 64}
ALIVE = {
    "mode": "finetuning",
    "ratio": 0.4,
    "enabled": False,
    "mask_token": 3,
    "grow": refused(False),
    "keep_bos": False,
    "shared_positions": True,
    "cycle": alive(1, shared_positions=True),
    "short": alive(2, mode="finetuning"),
    "length": 48,
    "pack": False,
    "chat": alive(False, mode="finetuning"),
}


def observe(method: MEAP) -> Any:
    texts = [f"<s>{text}" for text in TEXTS]
    pairs = [{"prompt": "the fox", "answer": text[10:30]} for text in TEXTS]
    return taught(method, pairs if method.mode == "finetuning" else texts)


DRAWS = KeyedRNG(0)
IDS = torch.randint(8, 150, (12, 16), generator=torch.Generator().manual_seed(0))
MASK = VOCAB  # the row that is added


def prepared(ckpt: Checkpoint, data: Any = IDS, **fields: Any) -> tuple[MEAP, list[dict[str, Any]]]:
    """A method and its rows."""
    method = MEAP(**{"length": 16, **fields})
    examples = [
        {"input_ids": row, "id": n} if not isinstance(row, dict) else {**row, "id": n} for n, row in enumerate(data)
    ]
    return method, [
        {**row, "id": n, "epoch": 0, "step": 0} for n, row in enumerate(method.prepare(ckpt, examples, DRAWS))
    ]


def worked_example() -> tuple[dict[str, Any], Checkpoint]:
    """x = (5, 6, 7, 8, 9) with position 1 hidden."""
    ckpt = checkpoint()
    mask = prepared(ckpt)[0].mask_id
    clean = torch.arange(5, 10)
    return {"input_ids": masked(clean, torch.tensor([1]), mask), "labels": clean}, ckpt


@pytest.mark.parametrize(
    ("inputs", "ratio", "count"), [(4096, 0.15, 614), (2048, 0.15, 307), (10, 0.15, 1), (10, 0.001, 1), (51, 0.1, 5)]
)
def test_the_count_is_the_floor_and_at_least_one(inputs: int, ratio: float, count: int) -> None:
    assert mask_count(inputs, ratio) == count


def test_switched_off_it_is_the_stock_loss_and_gradient() -> None:
    ckpt = checkpoint()
    method, rows = prepared(ckpt, enabled=False)
    plain = CausalLM(length=16)
    found = []
    for objective in (method, plain):
        loss = objective.loss(ckpt.model, objective.collate(rows[:4], DRAWS)).total
        gradients = torch.autograd.grad(loss, list(ckpt.model.parameters()))
        found.append((loss, gradients))
    stock = ckpt.model(input_ids=IDS[:4], labels=IDS[:4]).loss
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][0], stock, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(*(gradients for _, gradients in found), strict=True))


def test_switched_off_it_trains_like_next_token_prediction() -> None:
    one, two = checkpoint(), checkpoint()
    prepared(one)
    prepared(two)
    run(one, objective=MEAP(length=24, enabled=False))
    run(two)
    assert same(weights(one), weights(two))


@given(st.integers(1, 60), st.floats(0.01, 0.99), st.integers(0, 10**6))
def test_positions_are_distinct_and_never_the_last_input(inputs: int, ratio: float, seed: int) -> None:
    row = {"input_ids": torch.arange(5, 6 + inputs), "id": seed, "epoch": 0}
    found = MEAP(ratio=ratio, length=128).positions(row, DRAWS).tolist()
    assert len(set(found)) == len(found) == min(mask_count(inputs, ratio), max(0, inputs - 1))
    assert found == sorted(found)
    assert all(0 <= place <= inputs - 2 for place in found)


def test_bos_is_spared_if_asked_and_padding_always() -> None:
    ckpt = checkpoint()
    short, long = [1, 7, 8, 9, 10], [1, *range(20, 35)]
    for keep in (True, False):
        method, rows = prepared(ckpt, [{"input_ids": short}, {"input_ids": long}], pack=False, ratio=0.9, keep_bos=keep)
        batch = method.collate(rows, DRAWS)
        assert (batch["input_ids"][:, 0] == 1).all() == keep
        assert batch["input_ids"][0, 5:].tolist() == [0] * 11
        assert (batch["input_ids"][0, 3:5]).tolist() == [9, 10]


def test_targets_are_the_clean_ids_and_none_is_lost() -> None:
    ckpt = checkpoint()
    method, rows = prepared(ckpt, ratio=0.5)
    masked, clean = method.collate(rows, DRAWS), causal_batch(rows)
    assert torch.equal(masked["target"], clean["target"])
    assert masked["weight"] == clean["weight"] == 12 * 15
    assert torch.equal(masked["target"][:, :-1], IDS[:, 1:])
    where = masked["input_ids"] == method.mask_id
    assert where.sum(1).tolist() == [7] * 12
    assert torch.equal(masked["input_ids"][~where], clean["input_ids"][~where])


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral_window", "gemma3"])
def test_no_mask_is_felt_before_it(family: str) -> None:
    model = tiny_model(family, layers=2)
    clean = IDS[0]
    with torch.no_grad():
        plain = model(clean[None]).logits[0]
        early = model(masked(clean, torch.tensor([4, 9]), 3)[None]).logits[0]
        late = model(masked(clean, torch.tensor([4, 12]), 3)[None]).logits[0]
    assert torch.equal(plain[:4], early[:4])
    assert torch.equal(early[:9], late[:9])
    assert not torch.equal(plain[4:9], early[4:9])


def test_hidden_tokens_get_no_input_gradient_and_the_mask_row_does() -> None:
    row, ckpt = worked_example()
    loss = next_token_loss(ckpt.model, causal_batch([row])).total
    (gradient,) = torch.autograd.grad(loss, ckpt.model.get_input_embeddings().weight)
    assert ckpt.model.lm_head.weight is not ckpt.model.get_input_embeddings().weight
    assert not gradient[6].any()
    # The last token of the row is a target only.
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == [5, 7, 8, MASK]
    clean = next_token_loss(ckpt.model, causal_batch([{"input_ids": torch.arange(5, 10)}])).total
    (gradient,) = torch.autograd.grad(clean, ckpt.model.get_input_embeddings().weight)
    assert gradient[6].any()
    assert not gradient[MASK].any()


def test_the_worked_example() -> None:
    row, ckpt = worked_example()
    batch = causal_batch([row])
    assert batch["input_ids"][0, :4].tolist() == [5, MASK, 7, 8]
    assert batch["target"][0].tolist() == [6, 7, 8, 9, -100]
    assert batch["weight"] == 4
    clean = torch.arange(5, 10)[None]
    with torch.no_grad():
        terms = [ckpt.model(ids).logits[0].log_softmax(-1) for ids in (batch["input_ids"], clean)]
    assert torch.equal(terms[0][0, 6], terms[1][0, 6])
    expected = -sum(terms[0][t, 6 + t] for t in range(4)) / 4
    assert torch.allclose(next_token_loss(ckpt.model, batch).total, expected, atol=1e-6)


def test_as_a_transform_it_goes_before_any_causal_model() -> None:
    ckpt, rng = checkpoint(), generator("transform")
    special = torch.zeros_like(IDS, dtype=torch.bool)
    special[:, 0] = True
    special[0, 10:] = True
    masked = mask_inputs(IDS, 3, ratio=0.3, rng=rng, special_BT=special)
    where = masked != IDS
    assert where.sum(1).tolist() == [2] + [4] * 11  # of 8 and of 14 inputs with a target
    assert not where[:, [0, 14, 15]].any()
    assert not where[0, 8:].any()
    loss = ckpt.model(input_ids=masked, labels=IDS).loss
    rows = [{"input_ids": row, "labels": clean} for row, clean in zip(masked, IDS, strict=True)]
    assert torch.allclose(loss, next_token_loss(ckpt.model, causal_batch(rows)).total, atol=1e-6)
    assert mask_inputs(IDS[:, :2], 3, ratio=0.5, rng=rng).equal(IDS[:, :2])


def test_each_position_is_hidden_equally_often() -> None:
    inputs, draws = 20, 6000
    counts: Counter[int] = Counter()
    row = {"input_ids": torch.arange(inputs + 1)}
    for example in range(draws):
        counts.update(MEAP().positions({**row, "id": example, "epoch": 0}, DRAWS).tolist())
    expected = draws * mask_count(inputs, 0.15) / (inputs - 1)
    assert set(counts) == set(range(inputs - 1))
    deviation = expected**0.5
    assert all(abs(count - expected) < 5 * deviation for count in counts.values())


def test_positions_are_drawn_in_each_epoch_for_each_example() -> None:
    row = {"input_ids": torch.arange(101)}
    found = [tuple(MEAP().positions({**row, "id": i, "epoch": e}, DRAWS).tolist()) for i in range(3) for e in range(3)]
    assert len(set(found)) == 9


def test_packed_documents_are_drawn_one_by_one() -> None:
    row = {"input_ids": torch.arange(5, 65), "lengths": torch.tensor([20, 4, 1, 35]), "id": 0, "epoch": 0}
    found = MEAP(ratio=0.5).positions(row, DRAWS)
    counts = [int(((found >= a) & (found < b)).sum()) for a, b in ((0, 20), (20, 24), (24, 25), (25, 60))]
    assert counts == [9, 1, 0, 17]
    assert not set(found.tolist()) & {18, 19, 22, 23, 24, 58, 59}


def test_shared_positions_are_those_of_the_step_and_come_again() -> None:
    method = MEAP.paper()
    assert (method.shared_positions, method.cycle, method.keep_bos) == (True, 51, False)

    def at(example: int, step: int) -> tuple[int, ...]:
        row = {"input_ids": torch.arange(65), "id": example, "epoch": 0, "step": step}
        return tuple(method.positions(row, DRAWS).tolist())

    assert at(0, 3) == at(1, 3) == at(2, 54)
    assert len({at(0, step) for step in range(60)}) == 51


def test_nothing_is_hidden_while_evaluating() -> None:
    ckpt = checkpoint()
    method, rows = prepared(ckpt)
    held_out = KeyedRNG(0, training=False)
    assert torch.equal(method.collate(rows, held_out)["input_ids"], IDS)
    done = run(ckpt, IDS, objective=MEAP(length=16), evaluate=IDS, steps=1, learning_rate=1e-9, batch_size=12)
    with torch.no_grad():
        clean = next_token_loss(ckpt.model, causal_batch(rows)).total
    assert done.history[-1].evaluation["loss"] == pytest.approx(float(clean), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_vocabulary_grows_by_a_typical_row(family: str, tmp_path: Path) -> None:
    ckpt = checkpoint(family)
    before = ckpt.model.get_input_embeddings().weight.clone()
    tied = ckpt.model.get_output_embeddings().weight is ckpt.model.get_input_embeddings().weight
    method, _ = prepared(ckpt)
    after = ckpt.model.get_input_embeddings().weight
    assert method.mask_id == MASK == ckpt.tokenizer.mask_token_id
    assert torch.equal(after[:VOCAB], before)
    assert 0.5 < float((after[MASK].norm() / before.norm(dim=1).mean()).detach()) < 2.0
    head = ckpt.model.get_output_embeddings().weight
    assert (head is after) == tied
    if not tied:
        assert torch.allclose(head[MASK], head[:VOCAB].mean(0), atol=1e-6)
    assert ckpt.model.generation_config.suppress_tokens == [MASK]
    ckpt.save(tmp_path / "out")
    back = intaglio.load(tmp_path / "out")
    assert back.tokenizer.mask_token == "<|mask|>"
    assert prepared(back)[0].mask_id == MASK
    assert back.model.get_input_embeddings().weight.shape[0] == VOCAB + 1


def test_the_mask_token_is_never_generated() -> None:
    ckpt = checkpoint()
    method, _ = prepared(ckpt)
    with torch.no_grad():
        ckpt.model.lm_head.weight[method.mask_id] = ckpt.model.lm_head.weight[7] * 100
    ids = ckpt.model.generate(IDS[:4], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert not (ids == method.mask_id).any()


def test_a_token_that_is_there_is_used() -> None:
    fresh = intaglio.new("llama", width=32, depth=1, context=64)
    assert prepared(fresh)[0].mask_id == 259
    assert fresh.model.get_input_embeddings().weight.shape[0] == 260
    ckpt = checkpoint()
    assert prepared(ckpt, mask_token=7)[0].mask_id == 7
    assert prepared(ckpt, mask_token="<unk>")[0].mask_id == 3
    assert ckpt.model.get_input_embeddings().weight.shape[0] == VOCAB


class Words:
    """A tokenizer of one token a word, `w5` for 5."""

    bos_token_id, eos_token_id, mask_token, chat_template = 1, 2, "w3", None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def get_vocab(self) -> dict[str, int]:
        return {f"w{n}": n for n in range(VOCAB)}


def pair(prompt: int, answer: int) -> dict[str, str]:
    """A pair of so many words each."""
    return {
        "prompt": " ".join(f"w{5 + n}" for n in range(prompt)),
        "answer": " ".join(f"w{40 + n}" for n in range(answer)),
    }


@pytest.mark.parametrize(("answer", "samples", "count"), [(1, 1, 0), (50, 1, 0), (51, 2, 5), (70, 2, 7)])
def test_long_answers_come_twice(answer: int, samples: int, count: int) -> None:
    ckpt = Checkpoint(tiny_model("llama", layers=1), Words())
    method, rows = prepared(ckpt, [pair(9, answer)], mode="finetuning", length=128, pack=False)
    assert len(rows) == samples
    clean = rows[0]
    ids = [*range(5, 14), *range(40, 40 + answer), 2]
    assert clean["input_ids"].tolist() == ids
    assert clean["labels"].tolist() == [-100] * 9 + ids[9:]
    assert targets(clean).tolist() == [-100] * 8 + ids[9:] + [-100]
    for copy in rows[1:]:
        where = copy["input_ids"] == method.mask_id
        assert int(where.sum()) == count == int((copy["labels"] != -100).sum())
        assert torch.equal(copy["labels"][where], clean["input_ids"][where])
        assert torch.equal(copy["input_ids"][~where], clean["input_ids"][~where])
        places = where.nonzero().flatten().tolist()
        assert 9 <= min(places) <= max(places) < 9 + answer
        assert (targets(copy) != -100).nonzero().flatten().tolist() == [place - 1 for place in places]
        assert method.collate(rows, DRAWS)["input_ids"][1].tolist() == copy["input_ids"].tolist()


def test_masks_of_answers_are_static_and_absent_from_evaluation() -> None:
    ckpt = Checkpoint(tiny_model("llama", layers=1), Words())
    data = [{**pair(3, 60), "id": n} for n in range(2)]
    method = MEAP(mode="finetuning", length=128, pack=False)
    one, two = (list(method.prepare(ckpt, data, DRAWS)) for _ in range(2))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[1]["input_ids"], one[3]["input_ids"])
    assert len(list(method.prepare(ckpt, data, KeyedRNG(0, training=False)))) == 2
    off = MEAP(mode="finetuning", length=128, pack=False, enabled=False)
    assert len(list(off.prepare(ckpt, data, DRAWS))) == 2


def test_packed_pairs_are_never_cut() -> None:
    ckpt = Checkpoint(tiny_model("llama", layers=1), Words())
    _, rows = prepared(ckpt, [pair(5, 20), pair(5, 60), pair(5, 10)], mode="finetuning", length=100)
    assert [row["lengths"].tolist() for row in rows] == [[26, 66], [66, 16]]


def test_a_prompt_goes_into_the_chat_template() -> None:
    ckpt = checkpoint()
    data = [{"instruction": "name the river", "input": "in the town", "output": "the north"}]
    _, rows = prepared(ckpt, data, mode="finetuning", length=100, pack=False)
    text = ckpt.tokenizer.decode(rows[0]["input_ids"])
    assert text == "<s>user\nname the river\nin the town</s>\n<s>assistant\nthe north</s>"
    learnt = rows[0]["input_ids"][rows[0]["labels"] != -100]
    assert ckpt.tokenizer.decode(learnt) == "the north</s>"
    _, rows = prepared(ckpt, data, mode="finetuning", length=100, pack=False, chat=False)
    assert ckpt.tokenizer.decode(rows[0]["input_ids"]) == "name the river\nin the townthe north</s>"


def test_long_answers_are_cut_to_fit_and_long_prompts_refused() -> None:
    ckpt = Checkpoint(tiny_model("llama", layers=1), Words())
    _, rows = prepared(ckpt, [pair(9, 80)], mode="finetuning", length=40, pack=False)
    assert len(rows[0]["input_ids"]) == 40
    with pytest.raises(IntaglioError, match="its prompt is 39 tokens; from 1 to 38 fit beside an answer"):
        prepared(ckpt, [pair(39, 3)], mode="finetuning", length=40)


def test_fine_tuning_trains_in_the_loop() -> None:
    ckpt = checkpoint()
    before = weights(ckpt)
    data = [{"prompt": "what is the name", "answer": text} for text in TEXTS]
    done = run(ckpt, data, objective=MEAP(mode="finetuning", length=96, short=5), steps=3, lora={"r": 2})
    assert done.steps == 3
    assert not same(before, weights(ckpt))


def test_attention_leaves_hidden_tokens_by_exact_numbers() -> None:
    ckpt = checkpoint()
    method, _ = prepared(ckpt)
    positions = torch.tensor([3, 8])
    nothing = attention_shift(ckpt.model, masked(IDS[0], positions, method.mask_id), positions, method.mask_id)
    assert nothing == {"decay": 0.0, "variance": 0.0}
    found = attention_shift(ckpt.model, IDS[0], positions, method.mask_id)
    assert ckpt.model.config._attn_implementation == "sdpa"

    def mean(ids: torch.Tensor, key: int) -> float:
        ckpt.model.set_attn_implementation("eager")
        layers = ckpt.model(ids[None], output_attentions=True).attentions
        ckpt.model.set_attn_implementation("sdpa")
        return float(torch.stack([layer[0, :, key:, key].double().mean() for layer in layers]).mean())

    masked_ids = masked(IDS[0], positions, method.mask_id)
    expected = sum(1 - mean(masked_ids, key) / mean(IDS[0], key) for key in (3, 8)) / 2
    assert found["decay"] == pytest.approx(expected, rel=1e-6)


def test_draws_take_all_where_there_are_few() -> None:
    assert draw_positions(torch.tensor([4, 9]), 5, generator("x")).tolist() == [4, 9]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"grow": False}, "the vocabulary has no token '<|mask|>' and may not grow"),
        ({"mask_token": "<m>", "grow": False}, "has no token '<m>' and may not grow"),
        ({"mask_token": VOCAB}, f"mask_token is {VOCAB}; the model has ids from 0 to {VOCAB - 1}"),
        ({"mode": "finetuning"}, "has no prompt and answer"),
    ],
)
def test_bad_input_is_one_sentence(fields: dict[str, Any], sentence: str) -> None:
    import re

    with pytest.raises(IntaglioError, match=re.escape(sentence)) as caught:
        prepared(checkpoint(), **fields)
    assert "\n" not in str(caught.value)


def test_fields_out_of_range_and_missing_tokenizers_are_refused() -> None:
    for fields in ({"ratio": 0.0}, {"ratio": 1.0}, {"mode": "other"}, {"cycle": 0}):
        with pytest.raises(ValidationError):
            MEAP(**fields)
    bare = Checkpoint(tiny_model("llama", layers=1))
    with pytest.raises(IntaglioError, match="name a token that stands for no text by id: mask_token: ID"):
        prepared(bare)
    assert prepared(bare, mask_token=3)[0].mask_id == 3
    with pytest.raises(IntaglioError, match="needs a causal decoder"):
        prepared(Checkpoint(tiny_model("bert", layers=1), tiny_tokenizer("bert")))


def test_instruction_files_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"

    def read(*lines: str) -> list[dict[str, Any]]:
        file.write_text("\n".join(lines), encoding="utf-8")
        return load_pairs(file)

    good = json.dumps({"prompt": "a", "answer": "b"})
    assert (
        read(good, "", json.dumps({"instruction": "a", "input": "", "output": "b"}))
        == [{"prompt": "a", "answer": "b"}] * 2
    )
    for lines, sentence in (
        ((), "are empty"),
        ((good, "{"), "line 2 of .* is not JSON"),
        ((good, "3"), "line 2 of .* is 3; an object with prompt and answer"),
        ((good, "", '{"prompt": "a"}'), "line 3 of .* has no prompt and answer .*; it has: prompt"),
        (('{"prompt": 3, "answer": "b"}',), "line 1 of .*: its prompt is 3; only a string"),
        (('{"prompt": "a", "answer": " "}',), "line 1 of .*: its answer is empty"),
    ):
        with pytest.raises(IntaglioError, match=sentence) as caught:
            read(*lines)
        assert "\n" not in str(caught.value)
    with pytest.raises(IntaglioError, match="cannot read the instructions"):
        load_pairs(tmp_path / "none.jsonl")
