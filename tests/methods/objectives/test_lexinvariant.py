"""Lexinvariant draws the embeddings of every sequence anew: each line of what makes it faithful."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import intaglio
from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new, word_tokenizer
from intaglio.errors import IntaglioError
from intaglio.methods.objectives.lexinvariant import Lexinvariant, SequenceTables
from intaglio.modeling.hashed_rows import gaussian_rows, random_types
from intaglio.trainer import EpochCollator, KeyedRNG, ObjectiveModule, train, training_rows
from intaglio.trainer.causal_lm import causal_batch, next_token_loss
from tests.causal_lms import tiny_lm
from tests.families import DECODERS, PAD, tiny_tokenizer
from tests.plain_llama import llama
from tests.trainer.helpers import TEXTS, checkpoint, run

EXAMPLES = ({"length": 24}, {"length": 24, "random_ratio": 0.2})
BASE = {"length": 24}
ALIVE = {
    "random_ratio": 0.2,
    "logit_scale": 0.5,
    "embedding_std": 0.1,
    "chunk_rows": "test_the_loss_in_parts_is_the_whole_one",
    "length": 12,
    "pack": False,
}
DRAWS = KeyedRNG(0)
WORDS = ("<pad>", "<unk>", "a", "b", "c", "d", "e")


def words(width: int = 32, depth: int = 1, seed: int = 0) -> Checkpoint:
    tokenizer = word_tokenizer(WORDS, pad_token="<pad>", unk_token="<unk>")
    return new("llama", width=width, depth=depth, heads=2, context=32, tokenizer=tokenizer, seed=seed)


def prepared(ckpt: Checkpoint, **fields: Any) -> Lexinvariant:
    method = Lexinvariant(pack=False, **fields)
    list(method.prepare(ckpt, [], DRAWS))
    return method


def row(ids: Any, number: int = 0) -> dict[str, Any]:
    return {"input_ids": torch.as_tensor(ids), "id": number, "epoch": 0}


@dataclass(frozen=True)
class Relabelled(SequenceTables):
    """Tables E'[v] = E[pi(v)]."""

    pi: Any = None

    def noise(self, ids_BR: Tensor) -> Tensor:
        return super().noise(self.pi[ids_BR])


@torch.no_grad()
def logits(method: Lexinvariant, model: Any, ids: Tensor, pi: Any = None) -> Tensor:
    tables = method.sequence_tables(model, torch.arange(len(ids)))
    if pi is not None:
        tables = Relabelled(**{name: getattr(tables, name) for name in tables.__dataclass_fields__}, pi=pi)
    hidden = model.base_model(inputs_embeds=tables.inputs(ids), use_cache=False)[0]
    return tables.logits(hidden, torch.arange(model.config.vocab_size))


@pytest.mark.parametrize("family", DECODERS)
def test_it_is_equivariant(family: str) -> None:
    """Exact equivariance: logits(pi(x); E)[.., pi(v)] = logits(x; E')[.., v] with E'[v] = E[pi(v)]."""
    ckpt = checkpoint(family, layers=1)
    method = prepared(ckpt)
    method._excluded = ()
    pi = torch.randperm(ckpt.vocabulary, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(ckpt.vocabulary, (2, 12), generator=torch.Generator().manual_seed(2))
    left, right = logits(method, ckpt.model, pi[ids])[..., pi], logits(method, ckpt.model, ids, pi)
    assert right.std() > 1e-3
    assert torch.allclose(left, right, atol=1e-5)


def test_over_many_tables_permuted_sequences_are_equally_likely() -> None:
    """Mean log-prob of x and pi(x) over 500 draws agree within 3 standard errors."""
    ckpt = words()
    method = prepared(ckpt)
    found = []
    for number, ids in enumerate(([2, 3, 2, 3, 4, 2], [5, 2, 5, 2, 6, 5])):
        ids_BT = torch.tensor(ids).expand(500, -1)
        with torch.no_grad(), method.tables(ckpt.model, range(500 * number, 500 * (number + 1))):
            log_probs = ckpt.model(ids_BT).logits.log_softmax(-1)
        found.append(log_probs[:, :-1].gather(2, ids_BT[:, 1:, None]).sum((1, 2)))
    error = math.hypot(*(float(each.std()) / 500**0.5 for each in found))
    assert abs(float(found[0].mean() - found[1].mean())) < 3 * error


def test_tokens_not_seen_yet_are_equally_likely() -> None:
    """After one token a, all tokens != a have equal expected probability; at position 1 each is as likely as any."""
    ckpt = words()
    method = prepared(ckpt)
    with torch.no_grad(), method.tables(ckpt.model, range(4000)):
        probs = ckpt.model(torch.full((4000, 1), 2)).logits[:, -1].softmax(-1)
    mean, error = probs.mean(0), probs.std(0) / 4000**0.5
    others = [1, 3, 4, 5, 6]
    expected = mean[others].mean()
    assert ((mean[others] - expected).abs() < 4 * error[others]).all()
    assert mean[0] == 0  # padding
    assert abs(float(mean[2] - expected)) > 8 * float(error[2])


def test_no_parameter_has_a_row_for_each_token() -> None:
    """No parameter has a dimension equal to d (count check); parameter count independent of d."""
    counts = []
    for vocab in (263, 301):
        ckpt = new("llama", width=32, depth=1, context=32, vocab=vocab)
        prepared(ckpt)
        assert all(vocab not in p.shape for p in ckpt.model.parameters())
        counts.append(sum(p.numel() for p in ckpt.model.parameters()))
    assert counts[0] == counts[1]


def test_a_token_has_one_vector_in_a_sequence_and_another_in_the_next() -> None:
    """Same token, two positions, same sequence: identical input vectors; across sequences in a batch: different."""
    ckpt = words()
    method = prepared(ckpt)
    batch = method.collate([row([2, 3, 2]), row([2, 3, 2], 1)], DRAWS)
    x = method.sequence_tables(ckpt.model, batch["seeds"]).inputs(batch["input_ids"])
    assert torch.equal(x[:, 0], x[:, 2])
    assert not torch.isclose(x[0], x[1]).any()
    later = method.collate([{**row([2, 3, 2]), "epoch": 1}], DRAWS)
    assert later["seeds"][0] != batch["seeds"][0]


def test_no_gradient_flows_to_the_tables() -> None:
    """Gradient: nothing flows to E (leaf without grad); the scale and the network have one."""
    ckpt = words()
    method = prepared(ckpt)
    method.loss(ckpt.model, method.collate([row([2, 3, 2, 4])], DRAWS)).total.backward()
    tables = method.sequence_tables(ckpt.model, torch.tensor([1]))
    assert not tables.inputs(torch.tensor([[2]])).requires_grad
    assert not ckpt.model.get_input_embeddings().weight.requires_grad
    assert method.owned["readout"].scale.grad is not None
    assert all(p.grad is not None for p in ckpt.model.parameters())


@pytest.mark.parametrize("family", DECODERS)
def test_without_random_types_it_is_the_stock_model(family: str) -> None:
    """semi p=0 equals the standard tied model exactly given the same weights."""
    ckpt = checkpoint(family, layers=1)
    ids = torch.arange(12)[None] + 20
    method = prepared(ckpt, random_ratio=0.0)
    batch = method.collate([row(ids[0])], DRAWS)
    stock = next_token_loss(ckpt.model, causal_batch([row(ids[0])]))
    mine = method.loss(ckpt.model, batch)
    assert torch.allclose(mine.outputs, stock.outputs, atol=1e-5)
    assert torch.allclose(mine.total, stock.total, atol=1e-5)


@torch.no_grad()
def test_with_random_types_alone_it_is_the_lexinvariant_model() -> None:
    """p=1 equals the lexinvariant model for the same noise."""
    ckpt = words()
    ids = torch.tensor([[2, 3, 4, 2]])
    seeds, almost = torch.tensor([5]), 1 - 1e-12
    one, two = (SequenceTables(seeds, ckpt.model, ratio, (1.0, 1.0), 1.0) for ratio in (almost, 1.0))
    hidden = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(one.inputs(ids), two.inputs(ids))
    assert torch.equal(one.logits(hidden, torch.arange(7)), two.logits(hidden, torch.arange(7)))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_random_and_learned_rows_have_one_scale_and_a_type_is_random_throughout(family: str) -> None:
    """Match scales: learned rows must have the variance of the random rows; in both input and readout."""
    ckpt = checkpoint(family, layers=1)
    head = ckpt.model.lm_head.weight
    if family == "llama":  # untied
        with torch.no_grad():
            head *= 3
    method = prepared(ckpt, random_ratio=0.2)
    embedding = ckpt.model.get_input_embeddings()
    table = embedding(torch.arange(ckpt.vocabulary))
    ids = torch.arange(ckpt.vocabulary).expand(50, -1)
    tables = method.sequence_tables(ckpt.model, torch.arange(50))
    chosen = random_types(torch.arange(50)[:, None], ids, 0.2)
    x = tables.inputs(ids)
    assert abs(float(chosen.float().mean()) - 0.2) < 0.02
    assert torch.equal((x == table[None]).all(-1), ~chosen)
    rows = tables.readout(ids)
    assert torch.equal((rows == head[None]).all(-1), ~chosen)
    for random, learned in ((x[chosen], table), (rows[chosen], head)):
        assert float((random.std() / learned.std()).detach()) == pytest.approx(1, abs=0.05)
    own = prepared(ckpt, random_ratio=0.2, embedding_std=7.0).sequence_tables(ckpt.model, torch.arange(50)).inputs(ids)
    assert float(own[chosen].std()) == pytest.approx(7, rel=0.05)


@pytest.mark.parametrize(("kind", "more"), [("cohere", {"logit_scale": 0.1}), ("gptj", {}), ("gemma2", {})])
def test_logits_that_are_changed_after_the_head_go_with_random_rows_alone(kind: str, more: dict[str, Any]) -> None:
    """A scale, a bias and a cap: the trained model would not be the stock one."""
    if kind == "gemma2":
        more = {"final_logit_softcapping": 1.0}
    ckpt = Checkpoint(tiny_lm(kind, **more), tiny_tokenizer("llama"), "tiny")
    with pytest.raises(IntaglioError, match="adds a bias to its logits, scales or caps them"):
        run(ckpt, objective=Lexinvariant(length=24, random_ratio=0.2))
    run(ckpt, objective=Lexinvariant(length=24, pack=False), steps=1)


@pytest.mark.parametrize("kind", ["olmo2", "opt"])
def test_other_families_are_regularised(kind: str) -> None:
    for ratio in (1.0, 0.2):
        ckpt = Checkpoint(tiny_lm(kind), tiny_tokenizer("llama"), "tiny")
        result = run(ckpt, objective=Lexinvariant(length=24, random_ratio=ratio, pack=False), steps=2, lora={"r": 2})
        assert all(math.isfinite(line.loss) for line in result.history if line.loss is not None)


def test_while_evaluating_the_regulariser_is_off() -> None:
    ckpt = checkpoint("llama", layers=1)
    method = prepared(ckpt, random_ratio=0.5)
    batch = method.collate([row(torch.arange(20, 32))], DRAWS)
    on, off = (method.loss(ckpt.model.train(mode), batch).total for mode in (True, False))
    assert torch.allclose(off, next_token_loss(ckpt.model, causal_batch([row(torch.arange(20, 32))])).total, atol=1e-5)
    assert abs((on - off).item()) > 1e-3


def test_rows_are_standard_gaussians() -> None:
    """Entries iid N(0, 1)."""
    x = gaussian_rows(torch.arange(64)[:, None], torch.arange(64), 33).double()
    assert x.shape == (64, 64, 33)
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.var()) - 1) < 0.02
    assert abs(float((x.abs() > 1.959964).double().mean()) - 0.05) < 0.003
    for dimension in range(3):
        a, b = (x.narrow(dimension, start, x.shape[dimension] - 1) for start in (0, 1))
        assert abs(float((a * b).mean())) < 0.01
    assert abs(float((x[..., 0] * x[..., 1].square()).mean())) < 0.08


@given(st.integers(0, 2**62), st.integers(0, 10**6), st.integers(1, 40))
def test_a_row_depends_on_nothing_but_its_key(seed: int, token: int, width: int) -> None:
    alone = gaussian_rows(torch.tensor(seed), torch.tensor(token), width)
    among = gaussian_rows(torch.tensor([[3], [seed]]), torch.tensor([7, token]), 40)
    assert torch.equal(alone, among[1, 1, :width])
    assert alone.isfinite().all()


@pytest.mark.parametrize("ratio", [1.0, 0.3])
@torch.no_grad()
def test_the_loss_is_that_of_a_plain_model_with_the_drawn_tables(ratio: float) -> None:
    """x_t = E_b[w_t], logits_t = s E_b LN(h_t); a type has its random row with probability p, else its learned one."""
    ckpt = checkpoint("llama", layers=2)
    method = prepared(ckpt, random_ratio=ratio)
    batch = method.collate([row(torch.arange(20, 32)), row(torch.arange(40, 52).flip(0), 1)], DRAWS)
    model, types, losses = ckpt.model.train(), torch.arange(ckpt.vocabulary), []
    for seed, ids in zip(batch["seeds"], batch["input_ids"], strict=True):
        noise, learned = gaussian_rows(seed, types, 32), [model.model.embed_tokens.weight, model.lm_head.weight]
        if ratio == 1:
            read, written = noise, 0.1 * noise
        else:
            random = random_types(seed, types, ratio)[:, None]
            read, written = (torch.where(random, noise * table.std(), table) for table in learned)
        logits = llama(model, read[ids][None])[0][0] @ written.T
        if ratio == 1:
            logits[:, PAD] = -math.inf
        losses.append(-logits.log_softmax(-1)[range(11), ids[1:]])
    assert float(method.loss(model, batch).total) == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_the_loss_in_parts_is_the_whole_one(ratio: float) -> None:
    """Generate only rows of tokens that occur plus, for the softmax, the full table in chunks."""
    found = []
    for chunk in (None, 50, 1):  # of padding alone a part has no probability
        ckpt = checkpoint("llama", layers=1)
        method = prepared(ckpt, random_ratio=ratio, chunk_rows=chunk)
        batch = method.collate([row(torch.arange(20, 32)), row(torch.arange(40, 47), 1)], DRAWS)
        loss = method.loss(ckpt.model.train(), batch).total
        loss.backward()
        found.append((loss.detach(), [p.grad for p in (*ckpt.model.parameters(), *method.owned.parameters())]))
    (whole, grads), *others = found
    for parts, other in others:
        assert torch.allclose(whole, parts, atol=1e-6)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, other, strict=True))


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_a_generation_holds_its_table(family: str) -> None:
    """Same E must be used for all steps of one generation and for the KV cache lifetime."""
    ckpt = checkpoint(family, layers=1)
    method = prepared(ckpt)
    prompt, seeds = torch.tensor([[20, 21, 22, 20], [30, 31, 32, 30]]), [7, 8]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with method.tables(ckpt.model, seeds):
        both = ckpt.model.generate(prompt, **options)
        again = ckpt.model(both, use_cache=False).logits
    assert torch.equal(again[:, 3:-1].argmax(-1), both[:, 4:])
    with method.tables(ckpt.model, seeds[1:]):
        beams = ckpt.model.generate(prompt[1:], num_return_sequences=2, num_beams=2, **options)
        assert torch.equal(ckpt.model.generate(prompt[1:], **options), both[1:])
    assert len(beams) == 2
    with pytest.raises(IntaglioError, match="seeds has 2 tables for 1 rows"), method.tables(ckpt.model, seeds):
        ckpt.model(prompt[:1])
    assert "forward" not in vars(ckpt.model.get_input_embeddings())


@pytest.mark.parametrize(("family", "std"), [("llama", 0.5), ("gemma3", None), ("gpt_neox", None)])
def test_a_stored_table_makes_a_stock_checkpoint(family: str, std: float | None, tmp_path: Path) -> None:
    ckpt = checkpoint(family, layers=1)
    run(ckpt, objective=Lexinvariant(length=24, embedding_std=std), steps=3)
    ckpt.save(tmp_path / "trained")
    back = intaglio.load(tmp_path / "trained")
    method = Lexinvariant.from_checkpoint(back, chunk_rows=50)
    assert (method.chunk_rows, method.embedding_std) == (50, std)
    ids = torch.tensor([[20, 21, 22, 20]])
    with torch.no_grad(), method.tables(back.model, [3]):
        expected = back.model(ids).logits
    assert method.scale.item() != pytest.approx(0.1, abs=1e-6)  # type: ignore[union-attr]
    method.store_table(back, seed=3).save(tmp_path / "stored")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    kept = [token for token in range(back.vocabulary) if token not in method._excluded]
    assert torch.allclose(stock(ids).logits[..., kept], expected[..., kept], atol=1e-4)
    with pytest.raises(IntaglioError, match="no logit scale is attached"):
        Lexinvariant.from_checkpoint(back)


def test_probabilities_are_means_over_tables() -> None:
    ckpt = words()
    method = prepared(ckpt)
    ids = torch.tensor([[2, 3, 2], [4, 5, 4]])
    singles = [method.probs(ckpt.model, ids, seed=seed) for seed in (0, 2, 4)]
    assert torch.allclose(method.probs(ckpt.model, ids, draws=3), torch.stack(singles).mean(0))
    assert not torch.allclose(singles[0], singles[1])
    with pytest.raises(IntaglioError, match="draws is 0; at least 1"):
        method.probs(ckpt.model, ids, draws=0)


def test_the_saved_table_follows_from_the_seed() -> None:
    found = []
    for seed in (0, 1):
        ckpt = words()
        list(Lexinvariant(pack=False).prepare(ckpt, [], KeyedRNG(seed)))
        found.append(ckpt.model.get_input_embeddings().weight)
    assert torch.equal(found[0], gaussian_rows(torch.tensor(0), torch.arange(7), 32))
    assert not torch.isclose(*found).any()


def cycles(count: int, shift: int = 0) -> list[dict[str, Any]]:
    """Sequences a b a b ... of two of the words."""
    rows = []
    for number in range(count):
        a, b = torch.randperm(5, generator=torch.Generator().manual_seed(number + shift))[:2].tolist()
        rows.append({"input_ids": [a + 2, b + 2] * 6})
    return rows


def test_it_learns_in_context_and_tells_no_symbols_apart() -> None:
    """Cipher invariance: mean test loss on text and on per-sequence enciphered text coincide within noise."""
    ckpt, method = words(depth=2), Lexinvariant(pack=False)
    data = [{"input_ids": [2, 3] * 6}, {"input_ids": [4, 5] * 6}] * 32
    train(ckpt, data, objective=method, steps=150, batch_size=16, learning_rate=1e-2)
    found = []
    for ids in ([2, 3] * 6, [6, 4] * 6):  # the second pair was never seen
        probs = method.probs(ckpt.model, torch.tensor([ids] * 64), seed=99)
        found.append(probs[:, 6:-1].gather(2, torch.tensor([ids[7:]] * 64)[..., None]).mean().item())
    assert found[0] > 0.8
    assert found[0] == pytest.approx(found[1], abs=0.08)


def test_it_trains_in_a_stock_trainer(tmp_path: Path) -> None:
    """The five lines of the docstring."""
    checkpoint, texts = words(), [" ".join("abcde"[n % 5] for n in range(k, k + 12)) for k in range(20)]
    objective, rng = intaglio.Lexinvariant(length=12), KeyedRNG(seed=0)
    rows = training_rows(objective, checkpoint, texts, rng)
    model, collate = ObjectiveModule(checkpoint.model, objective), EpochCollator(objective, rng)
    arguments = TrainingArguments(
        str(tmp_path), remove_unused_columns=False, save_strategy="no", max_steps=60, learning_rate=1e-2, use_cpu=True,
        report_to=[], per_device_train_batch_size=16, disable_tqdm=True, logging_steps=20,
    )  # fmt: skip
    trainer = Trainer(model, arguments, collate, rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert float(objective.scale) != pytest.approx(0.1, abs=1e-6)


def test_a_pretrained_model_keeps_its_loss_under_the_regulariser_when_evaluated() -> None:
    ckpt = checkpoint("llama", layers=1)
    before = copy.deepcopy(ckpt.model.state_dict())
    result = run(ckpt, objective=Lexinvariant(length=24, random_ratio=0.2), evaluate=TEXTS, evaluate_every=1)
    assert all(math.isfinite(line.loss) for line in result.history)
    assert not torch.equal(ckpt.model.state_dict()["lm_head.weight"], before["lm_head.weight"])
    assert "lexinvariant" not in ckpt.attachments
