"""Hidden Transfer: the card's exact facts, and that no token changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers.cache_utils import DynamicCache

from intaglio.errors import IntaglioError
from intaglio.methods.decoding.hidden_transfer import HiddenTransfer
from intaglio.methods.decoding.hidden_transfer.heads import (
    TransferHeads,
    default_layers,
    pseudo_positions,
    pseudo_visible,
    record_states,
)
from intaglio.methods.decoding.hidden_transfer.session import deepest_path, run_with_pseudo_states
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import HeadOnly, after_blocks
from intaglio.speculative.heads.objective import freeze, head_batch
from intaglio.speculative.target_model import CachedModel, stack
from intaglio.speculative.tree import TokenTree, root_only
from tests.alive import alive, fitted_and_drafted, refused
from tests.families import DECODERS, VOCAB, tiny_model
from tests.speculative.distributions import check_law
from tests.speculative.toys import ragged, target

# Heads that were never trained draft badly, but must not change a token.
HEADS = {"untrained": True, "steps": 2, "batch_size": 2, "prompt": 4, "length": 16}
EXAMPLES = (
    HEADS,
    {**HEADS, "ahead": 2, "layers": [0, 1], "draft_rows": "path", "goal": "text", "decay": 0.9, "state": 0.1},
    {**HEADS, "tree": [[0], [1], [0, 0]], "drawn": False, "own_text": False},
)
ALIVE = {
    "nodes": 5,
    "tree": [[0], [1]],
    "token_cost": 0.5,
    "drawn": False,
    "draft_temperature": 5.0,
    "vocabulary": 40,
    "own_text": False,
    "samples": 1,
    "prompt": 2,
    "text_temperature": 2.0,
    "text_batch": 1,
    "chat": True,
    "length": 12,
    "epochs": alive(3.0, steps=None),
    "steps": 3,
    "batch_size": 1,
    "accumulate": 2,
    "learning_rate": 1e-2,
    "warmup": 0.5,
    "precision": "bfloat16",
    "save_every": "test_trained_heads:test_a_killed_fit_resumes_to_the_same_bytes",
    "untrained": refused(False),
    "ahead": 2,
    "layers": [0, 1, 1],
    "goal": "text",
    "decay": 0.5,
    "state": 0.1,
    "draft_rows": "path",
}
observe = fitted_and_drafted
PROMPT = [9, 30, 31, 32, 9, 30, 31, 32, 9, 30, 12, 40]
TREE = TokenTree([40, 5, 6, 7, 8], [-1, 0, 0, 1, 3])
FAMILIES = ("llama", "qwen3_window", "mistral_window", "gemma3")


def heads_of(model: Any, layers: list[int], spread: float = 0.1) -> TransferHeads:
    """Maps that are trained, as far as chance goes, in the model's dtype."""
    heads = TransferHeads(model, layers)
    torch.nn.init.normal_(heads.change_kDD, std=spread, generator=torch.Generator().manual_seed(1))
    return heads.to(next(model.parameters()).dtype)


@torch.inference_mode()
def passed(model: Any, heads: TransferHeads, ids: list[int], tree: TokenTree, cache: Any = None) -> Any:
    """Nodes and pseudo states after a pass over a tree behind a prompt, whose last token is the root."""
    cached = CachedModel(model, cache)
    cached.prefill(torch.tensor([ids[:-1]]))
    inputs = cached.prepare_inputs(*stack([tree]))
    return (*run_with_pseudo_states(anatomy(model), heads, cached, inputs, [range(len(tree))]), cached, inputs)


def guesses(model: Any, heads: TransferHeads, ids: list[int]) -> torch.Tensor:
    """Pseudo states of the last place as training makes them [k, D]."""
    cached, parts = CachedModel(model, hidden=True), anatomy(model)
    with torch.no_grad():
        with record_states(parts, heads.layers) as states:
            cached.prefill(torch.tensor([ids]))
        return torch.stack([step[0, -1] for step in heads.refine(parts, cached, states)])


# --- masks and states ------------------------------------------------------------------------------------------------


def test_the_mask_of_the_example() -> None:
    real = torch.ones((1, 2, 2), dtype=torch.bool).tril()
    assert pseudo_visible(real, 1)[0].int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 1]]
    two = pseudo_visible(real, 2)[0].int().tolist()
    assert two == [[1, 0, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 0, 1, 0, 1, 0], [1, 1, 0, 1, 0, 1]]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_nodes_do_not_notice(family: str, implementation: str) -> None:
    model = target(family, implementation)
    heads = heads_of(model, [1, 1, 2])
    atol = 1e-9 if implementation == "sdpa" else 1e-5  # stock eager attention takes its softmax in float32
    for cache in (None, DynamicCache(config=model.config)):
        plain = CachedModel(model, copy.deepcopy(cache))
        with torch.inference_mode():
            plain.prefill(torch.tensor([PROMPT[:-1]]))
            expected = plain.forward(plain.prepare_inputs(*stack([TREE])))[0]
        real, _, cached, _ = passed(model, heads, PROMPT, TREE, cache)
        with torch.inference_mode():
            torch.testing.assert_close(after_blocks(anatomy(model), real[0]), expected, rtol=0, atol=atol)
        for mine, theirs in zip(cached.cache.layers, plain.cache.layers, strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys, rtol=0, atol=atol)
            torch.testing.assert_close(mine.values, theirs.values, rtol=0, atol=atol)
            assert mine.get_seq_length() == theirs.get_seq_length() == len(PROMPT) - 1 + len(TREE)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "phi3"])
def test_training_and_passes_make_the_same_states(family: str) -> None:
    model = target(family)
    heads = heads_of(model, [0, 1, 2])
    _, pseudo, _, _ = passed(model, heads, PROMPT, TREE, DynamicCache(config=model.config))
    for node in range(len(TREE)):
        ids = [*PROMPT[:-1], *(TREE.tokens[place] for place in TREE.path(node))]
        torch.testing.assert_close(pseudo[0, :, node], guesses(model, heads, ids), rtol=0, atol=1e-9)


def test_rows_of_unlike_lengths_make_the_same_states() -> None:
    model = target("gemma3")
    heads = heads_of(model, [1, 2])
    inputs = ragged([4, 9])
    cached = CachedModel(model)
    with torch.inference_mode():
        cached.prefill(**{f"{name.partition('_')[0].replace('input', 'ids')}_BP": v for name, v in _named(inputs)})
        trees = [TREE, root_only(7)]
        owners = [deepest_path(tree) for tree in trees]
        _, pseudo = run_with_pseudo_states(anatomy(model), heads, cached, cached.prepare_inputs(*stack(trees)), owners)
    for row, (tree, own) in enumerate(zip(trees, owners, strict=True)):
        real = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        for place, node in enumerate(own):
            ids = [*real, *(tree.tokens[n] for n in tree.path(node))]
            torch.testing.assert_close(pseudo[row, :, place], guesses(model, heads, ids), rtol=0, atol=1e-9)


def _named(inputs: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [("ids", inputs["input_ids"]), ("mask", inputs["attention_mask"])]


def test_from_the_embedding_a_pseudo_state_is_the_token_read_again() -> None:
    model = target("llama")
    heads = TransferHeads(model, [0, 0]).double()
    states = guesses(model, heads, PROMPT)
    with torch.no_grad():
        found = after_blocks(anatomy(model), states)
        expected = model(torch.tensor([[*PROMPT, PROMPT[-1], PROMPT[-1]]])).logits[0, -2:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_behind_the_last_block_it_is_a_linear_head() -> None:
    model = target("llama")
    heads = heads_of(model, [2])
    parts = anatomy(model)
    with torch.no_grad(), record_states(parts, [2]) as states:
        model(torch.tensor([PROMPT]))
    last = states[2][0, -1]
    with torch.no_grad():
        expected = parts.head(parts.final_norm(last + heads.change_kDD[0] @ last))  # type: ignore[misc]
        torch.testing.assert_close(after_blocks(parts, guesses(model, heads, PROMPT))[0], expected, rtol=0, atol=1e-9)


# --- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_divergence_from_what_the_model_says_later() -> None:
    model = target("llama")
    heads = heads_of(model, [1, 1])
    rows = [{"input_ids": torch.tensor(PROMPT)}, {"input_ids": torch.tensor(PROMPT[::-1][:9])}]
    batch = head_batch(rows)
    with torch.no_grad():
        found = heads.loss(model, batch)
        sums, counts = torch.zeros(2), torch.zeros(2)
        for row in rows:
            ids = row["input_ids"].tolist()
            said = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            for n in range(len(ids)):
                drafted = after_blocks(anatomy(model), guesses(model, heads, ids[: n + 1])).log_softmax(-1)
                for i in (1, 2):
                    if n + i < len(ids):
                        sums[i - 1] += (said[n + i].exp() * (said[n + i] - drafted[i - 1])).sum().float()
                        counts[i - 1] += 1
    torch.testing.assert_close(found.total.double(), (sums / counts).sum().double(), rtol=0, atol=1e-5)
    assert set(found.parts) == {"loss_1", "loss_2", "right_1", "right_2"}


def test_only_the_maps_are_trained_and_padding_counts_for_nothing() -> None:
    model = tiny_model("gemma3", layers=2)
    rows = [{"input_ids": torch.tensor(PROMPT)}, {"input_ids": torch.tensor(PROMPT[:5])}]
    grads = []
    for batches in ([rows], [[rows[0]], [rows[1]]]):
        heads = heads_of(model, [1])
        weights = [11, 4]  # n + 1 < N
        with freeze(model):
            losses = [heads.loss(model, head_batch(batch)).total for batch in batches]
            total = losses[0] if len(losses) == 1 else sum(w * x for w, x in zip(weights, losses, strict=True)) / 15
            total.backward()
            assert all(parameter.grad is None for parameter in model.parameters())
        grads.append(heads.change_kDD.grad)
        assert float(grads[-1].abs().max()) > 0
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-6)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_state_loss_is_zero_where_pseudo_states_are_true() -> None:
    model = target("llama")
    same = torch.full((1, 6), 9)  # from the embedding, a repeated token's state is the next one's
    heads = TransferHeads(model, [0], state=1.0).double()
    found = heads.loss(model, head_batch([{"input_ids": same[0]}]))
    assert found.parts["state"].item() == 0
    other = TransferHeads(model, [1], state=1.0).double()
    assert other.loss(model, head_batch([{"input_ids": torch.tensor(PROMPT)}])).parts["state"].item() > 0


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_output_is_stock_for_random_maps(family: str) -> None:
    model = tiny_model(family, layers=2, dtype=torch.float64)
    inputs = ragged([6, 9, 4])
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    for rows in ("all", "path"):
        decoder = HiddenTransfer(untrained=True, draft_rows=rows, layers=[0, 1, 2], nodes=9)
        decoder._heads = heads_of(model, [0, 1, 2])
        decoder._about = {"model": _mark(model)}
        steps: list[Any] = []
        assert torch.equal(
            model.generate(**inputs, do_sample=False, max_new_tokens=12, custom_generate=_heard(decoder, steps)),
            expected,
        )
        assert all(1 <= len(step.tokens) <= 4 for step in steps)


def _mark(model: Any) -> str:
    from intaglio.checkpoint.fingerprint import fingerprint

    return fingerprint(model)


def _heard(decoder: HiddenTransfer, steps: list[Any]) -> HiddenTransfer:
    heard = decoder.model_copy(update={"on_step": steps.append})
    heard._heads, heard._about = decoder._heads, decoder._about
    return heard


def test_a_model_that_repeats_itself_is_drafted_right() -> None:
    # From the embedding a pseudo state reads the token again, so where the model repeats it, every draft is right.
    model = tiny_model("gemma3", layers=1, dtype=torch.float64)
    ids = torch.tensor([PROMPT])
    answer = model.generate(ids, do_sample=False, max_new_tokens=24, eos_token_id=None)[0, -12:].tolist()
    assert len(set(answer)) == 1  # this one does
    decoder = HiddenTransfer(untrained=True, layers=[0, 0, 0], tree=[[0], [0, 0], [0, 0, 0]])
    again = torch.tensor([[*PROMPT, *answer]])
    model.generate(again, do_sample=False, max_new_tokens=13, eos_token_id=None, custom_generate=decoder)
    # The prefill gives one, the first pass has no draft, and then come four at a time.
    assert decoder.statistics.lengths == [0, 3, 3, 2]


def test_where_the_deepest_path_fails_a_pass_goes_without_a_draft() -> None:
    tree = TokenTree([9, 1, 2, 3, 4], [-1, 0, 0, 1, 2])
    assert deepest_path(tree) == [0, 1, 3]
    model = tiny_model("llama", layers=2, dtype=torch.float64)
    ids = torch.tensor([PROMPT])
    steps: list[Any] = []
    decoder = HiddenTransfer(untrained=True, draft_rows="path", on_step=steps.append)
    model.generate(ids, do_sample=False, max_new_tokens=24, eos_token_id=None, custom_generate=decoder)
    before, seen = None, []
    for step in steps[1:]:
        if before is not None:
            failed = before.path[-1] not in deepest_path(before.tree)
            seen.append(failed)
            assert (len(step.tree) == 1) == (failed or step.done)  # the last pass has no room
        before = step
    assert True in seen
    assert False in seen


def test_sampling_keeps_the_law() -> None:
    check_law(lambda model: HiddenTransfer(untrained=True, nodes=6, layers=[0, 1, 1]))


# --- settings --------------------------------------------------------------------------------------------------------


def test_untrained_maps_are_the_identity_whatever_the_seed() -> None:
    model = tiny_model("llama", layers=2)
    made = [HiddenTransfer(untrained=True).make(model, seed).change_kDD for seed in (0, 1)]
    assert not made[0].any()
    assert torch.equal(*made)


def test_default_layers_rise_through_the_upper_middle() -> None:
    assert default_layers(3, 30) == (20, 22, 25)
    assert default_layers(1, 4) == (3,)
    assert HiddenTransfer().transfer_layers(32) == (21, 24, 27)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"layers": [1, 5, 2]}, "layers has the transfer layer 5; the model has 2 blocks, so 0 to 2 is accepted"),
        ({"layers": [2, 1, 1]}, r"layers is \[2, 1, 1\]; transfer layers must not decrease"),
        ({"layers": [1]}, "layers has 1 transfer layers for 3 steps; one per step is needed"),
        ({"ahead": 1, "tree": [[0], [0, 0]]}, "the tree is 2 levels deep; the heads look 1 ahead"),
    ],
)
def test_what_the_model_does_not_have(fields: dict[str, Any], says: str) -> None:
    model = tiny_model("llama", layers=2)
    with pytest.raises(IntaglioError, match=says):
        model.generate(
            torch.tensor([PROMPT]), max_new_tokens=4, custom_generate=HiddenTransfer(untrained=True, **fields)
        )


def test_settings_that_are_wrong() -> None:
    for fields in ({"ahead": 0}, {"draft_rows": "last"}, {"decay": 0.0}, {"layers": ["a"]}, {"nodes": 0}):
        with pytest.raises(ValidationError):
            HiddenTransfer(**fields)


def test_the_head_is_the_models_own() -> None:
    model = target("gemma3")
    parts = anatomy(model)
    with torch.no_grad(), record_states(parts, [4]) as states:
        output = model(torch.tensor([PROMPT]), output_hidden_states=True)
        found = after_blocks(parts, states[4][0])
        torch.testing.assert_close(found, output.logits[0], rtol=0, atol=1e-12)
        again = HeadOnly(parts, frozen=False).logits(output.hidden_states[-1])[0]
    torch.testing.assert_close(again, output.logits[0], rtol=0, atol=1e-12)
    assert found.shape == (len(PROMPT), VOCAB)


def test_pseudo_states_stay_within_the_models_context() -> None:
    cached = CachedModel(tiny_model("gpt2", n_positions=32))
    positions = pseudo_positions(torch.tensor([[29, 31]]), 3, cached)
    assert positions.tolist() == [[30, 31, 31, 31, 31, 31]]
