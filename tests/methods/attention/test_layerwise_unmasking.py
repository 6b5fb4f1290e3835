"""Layer-wise unmasking against the facts of its card: masks, gradients, configurations, and what cannot be asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from intaglio.checkpoint import Checkpoint, load
from intaglio.errors import IntaglioError
from intaglio.masks import Bidirectional, Causal, Window, get_visibility, visible
from intaglio.masks.method import Visibility
from intaglio.methods.attention.layerwise_unmasking import (
    LayerwiseUnmasking,
    configurations,
    group_count,
    search,
    unlocked_layers,
)
from intaglio.methods.attention.layerwise_unmasking.search import DONE, Trial, best_of
from intaglio.methods.attention.layerwise_unmasking.tapt import adapt
from intaglio.modeling.anatomy import anatomy, blocks
from intaglio.modeling.token_classifier import to_classifier
from intaglio.trainer import train
from intaglio.trainer.token_classification import TokenClassification, make_evaluator, predict
from tests.alive import alive, carved
from tests.families import DECODERS, ENCODERS, FAMILIES, WINDOW, tiny_model, tiny_tokenizer

EXAMPLES = ({"configuration": "01"}, {"configuration": "0110", "window": "none"}, {"groups": 2})
BASE = {"configuration": "01"}
ALIVE = {
    "configuration": "11",
    "groups": alive(1, configuration=None),
    "window": "none",
    "search": "test_a_search_keeps_the_best_and_leaves_it_trained",
}


def observe(method: LayerwiseUnmasking) -> Any:
    return carved(method, "mistral_window")


T = 12
IDS = torch.randint(8, 150, (2, T), generator=torch.Generator().manual_seed(3))
DESIGN_DECODERS = [name for name in DECODERS if name not in ("llama_tied", "gpt2")]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "sleeps", "sun", "town", "river"]


def tiny(family: str = "llama", **more: Any) -> Checkpoint:
    return Checkpoint(tiny_model(family, **more), tiny_tokenizer(family), "tiny")


def unmasked(bits: str, family: str = "llama", **more: Any) -> Checkpoint:
    return LayerwiseUnmasking(configuration=bits).apply(tiny(family, **more))


def examples(count: int, seed: int) -> list[dict[str, Any]]:
    """A word's label says how the word behind it begins: to the causal model a guess."""
    drawn = torch.randint(len(WORDS), (count, 9), generator=torch.Generator().manual_seed(seed)).tolist()
    found = []
    for row in drawn:
        words = [WORDS[n] for n in row]
        labels = ["early" if after[0] < "l" else "late" for after in words[1:]] + [None]
        found.append({"words": words, "labels": labels})
    return found


SETTINGS: dict[str, Any] = {"steps": 3, "batch_size": 4, "learning_rate": 1e-3}


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_all_bits_zero_is_the_stock_model_bit_for_bit(family: str, base: str) -> None:
    stock, ours = tiny_model(family, attn_implementation=base), unmasked("00", family, attn_implementation=base)
    right = torch.nn.functional.pad(IDS, (0, 5))
    mask = torch.nn.functional.pad(torch.ones_like(IDS), (0, 5))
    for inputs in ({"input_ids": IDS}, {"input_ids": right, "attention_mask": mask}):
        a, b = stock.base_model(**inputs), ours.model.base_model(**inputs)
        assert torch.equal(a.last_hidden_state, b.last_hidden_state)
    alone = stock.base_model(input_ids=IDS).last_hidden_state
    padded = ours.model.base_model(input_ids=right, attention_mask=mask).last_hidden_state[:, :T]
    torch.testing.assert_close(padded, alone, rtol=0, atol=2e-5)
    assert ours.kind == "standalone"
    assert ours.record.steps[-1].chosen == {"configuration": "00", "layers": []}


@pytest.mark.parametrize("family", [name for name in DECODERS if not FAMILIES[name].windowed])
@torch.no_grad()
def test_all_bits_one_is_a_stock_forward_with_a_mask_that_shows_everything(family: str) -> None:
    everything = torch.ones(2, 1, T, T, dtype=torch.bool)
    expected = tiny_model(family)(input_ids=IDS, attention_mask=everything, use_cache=False).logits
    assert torch.equal(unmasked("1111", family).model(input_ids=IDS).logits, expected)


def reach(checkpoint: Checkpoint, layer: int, position: int) -> list[bool]:
    """Whether the hidden state behind a layer depends at a position on each input position."""
    parts = anatomy(checkpoint.model)
    embeds = parts.embedding(IDS[:1]).detach().requires_grad_()
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = parts.blocks[layer].register_forward_hook(keep)
    checkpoint.model(inputs_embeds=embeds)
    handle.remove()
    # A random direction: the sum of a normalised state would not depend on anything.
    weight = torch.randn(kept[0].shape[-1], generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((kept[0][0, position] * weight).sum(), embeds)
    return (gradient[0].abs().sum(-1) != 0).tolist()


@pytest.mark.parametrize("family", DESIGN_DECODERS)
def test_the_jacobian_looks_right_from_the_first_unlocked_layer_on_and_nowhere_below(family: str) -> None:
    at, past = 4, [True] * 5
    window = FAMILIES[family].windowed
    locked = unmasked("0000", family)
    for layer in range(4):
        assert reach(locked, layer, at) == past + [False] * (T - 5)
    for bits, first in (("0100", 1), ("0001", 3), ("1000", 0)):
        checkpoint = unmasked(bits, family)
        for layer in range(4):
            found = reach(checkpoint, layer, at)
            assert found[:5] == past
            if layer < first:
                assert found[5:] == [False] * (T - 5)
            elif not window:  # full reach at once
                assert found[5:] == [True] * (T - 5)
            else:
                assert found[5]


def test_configurations_are_the_papers() -> None:
    four = configurations(4)
    assert len(four) == 2**4
    assert (four[0], four[1], four[15]) == ("0000", "0001", "1111")
    assert four[5] == "0101"
    assert unlocked_layers(four[5], 32) == [*range(8, 16), *range(24, 32)]
    assert four[8] == "1000"
    assert unlocked_layers(four[8], 32) == list(range(8))
    assert unlocked_layers(four[1], 32) == list(range(24, 32))


@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_every_layer_follows_the_bit_of_its_group(groups: int, size: int, data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from(configurations(groups)))
    layers = set(unlocked_layers(bits, groups * size))
    assert all((layer in layers) == (bits[layer // size] == "1") for layer in range(groups * size))
    assert len(layers) == size * bits.count("1")


def test_mask_arithmetic() -> None:
    seen = visible(unmasked("01").model, 3)[:, 0].sum(-1).tolist()
    assert seen == [[1, 2, 3]] * 2 + [[3, 3, 3]] * 2


def test_padded_keys_have_a_weight_of_zero_in_both_masks() -> None:
    checkpoint = unmasked("01", attn_implementation="eager")
    mask = torch.ones_like(IDS)
    mask[0, 7:] = 0
    mask[1, :3] = 0
    weights = checkpoint.model(input_ids=IDS, attention_mask=mask, output_attentions=True).attentions
    for layer in weights:
        assert (layer[0, :, :7, 7:] == 0).all()
        assert (layer[1, :, 3:, :3] == 0).all()
    assert (weights[3][0, :, :7, :7] > 0).all()


def test_all_configurations_have_the_same_parameters() -> None:
    counts = set()
    for bits in configurations(2):
        checkpoint = unmasked(bits)
        to_classifier(checkpoint, ["early", "late"])
        counts.add(sum(p.numel() for p in checkpoint.model.parameters()))
    assert len(counts) == 1


def test_labels_never_enter_the_inputs() -> None:
    rows = examples(4, 0)
    flipped = [
        {
            **row,
            "labels": [None if label is None else {"early": "late", "late": "early"}[label] for label in row["labels"]],
        }
        for row in rows
    ]
    batches = []
    for data in (rows, flipped):
        checkpoint, goal = unmasked("01"), TokenClassification(labels=["early", "late"])
        from intaglio.trainer import KeyedRNG

        made = list(goal.prepare(checkpoint, [{**row, "id": n} for n, row in enumerate(data)], KeyedRNG(0)))
        batches.append(goal.collate(made, KeyedRNG(0)))
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    assert torch.equal(batches[0]["attention_mask"], batches[1]["attention_mask"])
    assert not torch.equal(batches[0]["target"], batches[1]["target"])


def test_windows_are_symmetric_or_none() -> None:
    for window, seen in (("symmetric", [WINDOW] * 3), ("none", [T] * 3)):
        checkpoint = LayerwiseUnmasking(configuration="1", window=window).apply(tiny("mistral_window"))  # type: ignore[arg-type]
        counts = visible(checkpoint.model, T)[0, 0].sum(-1)
        assert [int(counts[0]), int(counts[0]), int(counts[0])] == seen
        assert load(_saved(checkpoint)).record == checkpoint.record


def _saved(checkpoint: Checkpoint) -> Path:
    import tempfile

    path = Path(tempfile.mkdtemp()) / "out"
    checkpoint.save(path)
    return path


@pytest.mark.parametrize(("depth", "groups"), [(32, 4), (30, 3), (28, 4), (8, 4), (2, 2), (7, 1), (26, 2), (1, 1)])
def test_the_default_groups_divide_the_layers(depth: int, groups: int) -> None:
    assert group_count(depth) == groups


def test_defaults_and_paper() -> None:
    assert LayerwiseUnmasking().apply(tiny()).record.steps[-1].chosen["configuration"] == "0001"
    assert LayerwiseUnmasking(groups=2).bits(4) == "01"
    assert LayerwiseUnmasking.paper().groups == 4
    assert LayerwiseUnmasking.paper(configuration="0011") == LayerwiseUnmasking(groups=4, configuration="0011")


def test_rules_of_a_step_before_stay_on_locked_layers() -> None:
    checkpoint = tiny()
    Visibility(rule={"sliding": {"window": 3}}).apply(checkpoint)
    LayerwiseUnmasking(configuration="01").apply(checkpoint)
    sliding = Causal() & Window(3)
    assert get_visibility(checkpoint.model) == {0: sliding, 1: sliding, 2: Bidirectional(), 3: Bidirectional()}
    LayerwiseUnmasking(configuration="10").apply(checkpoint)  # in place of the configuration before
    assert get_visibility(checkpoint.model) == {0: Bidirectional(), 1: Bidirectional()}


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_is_refused(family: str) -> None:
    for refused in (
        lambda: unmasked("01", family),
        lambda: search(tiny(family), examples(4, 0), examples(4, 1), **SETTINGS),
    ):
        with pytest.raises(IntaglioError, match=r"unmasking an encoder changes nothing: .* sees both ways already"):
            refused()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"groups": 3}, "3 groups do not divide the 4 layers of the model; accepted: 1, 2, 4"),
        ({"configuration": "011"}, "3 groups do not divide the 4 layers"),
    ],
)
def test_groups_that_do_not_divide_the_depth_are_refused(fields: dict[str, Any], words: str) -> None:
    checkpoint = tiny()
    with pytest.raises(IntaglioError, match=words):
        LayerwiseUnmasking(**fields).apply(checkpoint)
    assert checkpoint.record.steps == []
    assert get_visibility(checkpoint.model) == {}


def test_too_many_groups_have_no_list_of_configurations() -> None:
    with pytest.raises(IntaglioError, match=r"17 groups have 2\^17 configurations; from 1 to 16"):
        configurations(17)


def test_a_search_keeps_the_best_and_leaves_it_trained(tmp_path: Path) -> None:
    data, validation = examples(40, 0), examples(20, 1)
    checkpoint = tiny()
    found = search(
        checkpoint, data, validation, method=LayerwiseUnmasking(groups=2), tried=["01", "11"], steps=10, batch_size=8,
        learning_rate=4e-3, seed=1,
    )  # fmt: skip
    assert [trial.name for trial in found.trials] == ["01", "11"]
    assert found.best.scores["error"] == min(trial.scores["error"] for trial in found.trials)
    assert sorted(get_visibility(checkpoint.model)) == unlocked_layers(found.bits, 4)
    assert make_evaluator(validation)(checkpoint) == found.best.scores
    step = checkpoint.record.steps[-1]
    assert step.slug == "layerwise_unmasking"
    assert step.chosen["configuration"] == found.bits
    assert [trial["bits"] for trial in step.chosen["trials"]] == ["01", "11"]
    assert step.seed == 1
    checkpoint.save(tmp_path / "out")
    back = load(tmp_path / "out")
    assert predict(back, validation[:3]) == predict(checkpoint, validation[:3])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "early", "1": "late"}


def test_of_equals_the_one_with_fewer_groups_unmasked_is_kept() -> None:
    rows = [{"words": ["a", "b"], "labels": ["x", "y"]}] * 4
    found = search(tiny(), rows, rows, method=LayerwiseUnmasking(groups=2), tried=["11", "01"], steps=1)
    errors = {trial.bits: trial.scores["error"] for trial in found.trials}
    least = min(errors.values())
    tied = [bits for bits, error in errors.items() if error == least]
    assert found.bits == min(tied, key=lambda bits: (bits.count("1"), ["11", "01"].index(bits)))


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_a_killed_search_resumes(tmp_path: Path, at: int) -> None:
    data, validation = examples(12, 0), examples(6, 1)
    arguments: dict[str, Any] = {"method": LayerwiseUnmasking(groups=1), "save_every": 1, **SETTINGS}
    whole = tiny()
    search(whole, data, validation, **arguments)
    seen: list[int] = []

    def kill(done: int, total: int, what: str) -> None:
        seen.append(done)
        assert total == 6
        assert what.startswith("trying ")
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        search(tiny(), data, validation, directory=tmp_path / "s", progress=kill, **arguments)
    assert (tmp_path / "s" / DONE).is_file() == (at > 3)
    seen.clear()
    again = tiny()
    found = search(
        again,
        data,
        validation,
        directory=tmp_path / "s",
        resume=True,
        progress=lambda d, t, w: seen.append(d),
        **arguments,
    )
    assert seen[0] >= at
    assert len(found.trials) == 2
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    (tmp_path / "s" / DONE).write_text("{")
    with pytest.raises(IntaglioError, match="is damaged"):
        search(tiny(), data, validation, directory=tmp_path / "s", resume=True, **arguments)


@pytest.mark.parametrize(
    ("tried", "words"),
    [
        (["0"], "'0' is no configuration; 2 bits are accepted, such as 01"),
        (["0x"], "'0x' is no configuration"),
        ([], "a list of different configurations is needed"),
        (["01", "01"], "a list of different configurations is needed"),
    ],
)
def test_what_cannot_be_tried_is_refused(tried: list[str], words: str) -> None:
    with pytest.raises(IntaglioError, match=words):
        search(tiny(), examples(4, 0), examples(4, 1), method=LayerwiseUnmasking(groups=2), tried=tried, **SETTINGS)
    with pytest.raises(IntaglioError, match="needs at least one configuration"):
        best_of(tiny(), examples(4, 0), examples(4, 1), [], lambda bits: {}, **SETTINGS)


def test_trials_may_differ_in_their_settings() -> None:
    trials = [Trial("slow", "00", {"learning_rate": 1e-9}), Trial("fast", "00", {"learning_rate": 1e-2})]
    checkpoint = tiny()
    found = best_of(checkpoint, examples(40, 0), examples(20, 1), trials, lambda bits: {}, steps=5, batch_size=8)
    assert [trial.settings for trial in found.trials] == [trial.settings for trial in trials]
    assert found.trials[0].tokens == found.trials[1].tokens > 0
    assert found.trials[0].scores != found.trials[1].scores
    assert checkpoint.record.steps == []  # each trial has a record of its own


def test_unmasking_at_inference_only_needs_no_training() -> None:
    checkpoint = tiny()
    train(checkpoint, examples(12, 0), objective=TokenClassification(), **SETTINGS)
    before = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    LayerwiseUnmasking(configuration="01").apply(checkpoint)
    assert all(torch.equal(value, before[name]) for name, value in checkpoint.model.state_dict().items())
    assert [step.slug for step in checkpoint.record.steps] == ["train", "layerwise_unmasking"]
    assert len(predict(checkpoint, examples(2, 1))) == 2


def test_task_adaptation_is_causal_unless_the_authors_loop_is_asked_for() -> None:
    checkpoint = unmasked("01")
    rules = get_visibility(checkpoint.model)
    history = adapt(checkpoint, examples(12, 0), **SETTINGS).history
    assert get_visibility(checkpoint.model) == rules
    stock = tiny()
    assert adapt(stock, examples(12, 0), **SETTINGS).history == history  # it was trained as the causal model
    seeing = unmasked("01")
    assert adapt(seeing, examples(12, 0), unlocked=True, **SETTINGS).history != history
    assert seeing.kind == "runtime"
    with pytest.raises(IntaglioError, match="sees later tokens"):
        train(seeing, ["the quick brown fox"] * 4, **SETTINGS)


def test_a_later_set_attn_implementation_is_caught() -> None:
    checkpoint = unmasked("01")
    checkpoint.model.set_attn_implementation("eager")  # type: ignore[operator]
    with pytest.raises(IntaglioError, match="drops the visibility rules"):
        checkpoint.model(input_ids=IDS)


def test_generation_is_refused_also_after_a_reload() -> None:
    for checkpoint in (unmasked("01"), load(_saved(unmasked("01")))):
        with pytest.raises(IntaglioError, match="this model cannot generate: layer 2 sees later tokens"):
            checkpoint.model.generate(IDS, max_new_tokens=2)  # type: ignore[operator]


def test_blocks_hold_the_rules_and_nothing_else_changes() -> None:
    checkpoint = unmasked("0010")
    held = [any("intaglio_rule" in module.__dict__ for module in block.modules()) for block in blocks(checkpoint.model)]
    assert held == [False, False, True, False]
