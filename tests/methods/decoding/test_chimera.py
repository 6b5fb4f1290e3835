"""Chimera: the card's exact facts, and that no token changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.methods.decoding.chimera import Chimera
from intaglio.methods.decoding.chimera.model import (
    BranchEncoder,
    ChimeraModel,
    branch_visible,
    source_block,
    trigram_at,
    trigrams,
)
from intaglio.methods.decoding.chimera.session import ChimeraSession
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import final_hidden
from intaglio.speculative.heads.candidates import CandidateSampler
from intaglio.speculative.heads.lm_head import TargetHead
from intaglio.speculative.heads.objective import freeze, head_batch
from intaglio.speculative.protocols import DecodingRun, Step
from intaglio.speculative.static_tree import CHIMERA, StaticTree
from tests.alive import alive, fitted_and_drafted, refused
from tests.families import DECODERS, tiny_model
from tests.speculative.distributions import check_law
from tests.speculative.toys import ragged, target

# Heads that were never trained draft badly, but must not change a token.
HEADS = {"untrained": True, "steps": 2, "batch_size": 2, "prompt": 4, "length": 16}
EXAMPLES = (
    HEADS,
    {**HEADS, "heads": 2, "rank": 2, "head_sharing": True, "start_from": "copy", "feature": 1.0, "distil": 1.0},
    {**HEADS, "tree": [[0], [1], [0, 0]], "encoders": "no_context", "own_text": False},
)
ALIVE = {
    "nodes": 3,
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
    "seed": 1,
    "heads": 2,
    "rank": 2,
    "head_sharing": True,
    "start_from": "copy",
    "feature": 1.0,
    "distil": 1.0,
    "encoders": "no_trigram",
}
observe = fitted_and_drafted
IDS = [9, 30, 31, 32, 9, 30, 31, 32, 9, 30, 12, 40]
FAMILIES = ("llama", "qwen3_window", "mistral_window", "gemma3", "gpt2")


def draft_of(model: Any, **more: Any) -> ChimeraModel:
    """Modules that are trained, as far as chance goes, in the model's dtype."""
    draft, rng = ChimeraModel(model, seed=1, **more), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return draft.to(next(model.parameters()).dtype).eval()


def chain(model: Any, draft: ChimeraModel, ids: Sequence[int]) -> BranchEncoder:
    row = torch.tensor([list(ids)])
    parts = anatomy(model)
    with torch.no_grad():
        return BranchEncoder(draft, parts, final_hidden(parts, {"input_ids": row}), row)


def session(model: Any, draft: ChimeraModel, prompts: Sequence[Sequence[int]], tree: str = CHIMERA) -> ChimeraSession:
    run = DecodingRun(model, tuple(map(tuple, prompts)), False, model.generation_config, 50)
    return ChimeraSession(
        draft, run, CandidateSampler(lambda logits: logits.softmax(-1), False), StaticTree.from_paths(tree)
    )


def step(row: int, tokens: Sequence[int], hidden: torch.Tensor) -> Step:
    return Step(row, list(tokens), 0, None, (), hidden, torch.zeros(1), False)


# --- the modules -----------------------------------------------------------------------------------------------------


def test_trigrams_at_the_edges() -> None:
    assert trigrams(torch.tensor([[7, 8, 9, 3]])).tolist() == [[[7, 7, 7], [7, 8, 8], [7, 8, 9], [8, 9, 3]]]
    assert [trigram_at([7, 8, 9, 3], place) for place in range(4)] == [(7, 7, 7), (7, 8, 8), (7, 8, 9), (8, 9, 3)]
    assert trigrams(torch.tensor([[7]])).tolist() == [[[7, 7, 7]]]


def test_at_first_u_is_a_projection_and_the_head_is_the_models_own() -> None:
    model = target("llama")
    draft, parts = ChimeraModel(model).double(), anatomy(model)
    ids = torch.tensor([[7, 8, 9]])
    embedded = parts.embedding(ids).flatten()
    torch.testing.assert_close(draft.embed(parts, ids)[0], draft.trigram.down.weight @ embedded)
    weight = parts.head.weight  # type: ignore[union-attr]
    h, z = torch.randn(2, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for depth in (0, 3, 7):
        torch.testing.assert_close(draft.score(h, z, depth, TargetHead(parts, draft.words)), (h + z) @ weight.T)
    low = ChimeraModel(model, rank=4).double()
    torch.testing.assert_close(low.score(h, z, 1, TargetHead(parts, draft.words)), (h + z) @ weight.T)
    assert {name for name, _ in low.vocabulary.named_parameters()} == {"out_Vr", "in_MrX"}


def test_with_the_true_hidden_state_the_first_head_says_what_the_model_says_next() -> None:
    model = target("llama")
    draft, parts = ChimeraModel(model).double(), anatomy(model)
    weight = parts.head.weight  # type: ignore[union-attr]
    with torch.no_grad():
        draft.vocabulary.full_MVX[0] = torch.cat([torch.zeros_like(weight), weight], 1)
        output = model(torch.tensor([IDS]), output_hidden_states=True)
        hidden = output.hidden_states[-1][0]
        found = draft.score(hidden[:-1], hidden[1:], 0, TargetHead(parts, draft.words))
    torch.testing.assert_close(found, output.logits[0, 1:])


def test_masks() -> None:
    assert branch_visible(2, 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]]
    # H H U U | Z0 Z0 U'1 U'1
    assert branch_visible(2, 1).int().tolist() == [
        [0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1, 0, 1],
    ]  # fmt: skip
    last = branch_visible(2, 2).int().tolist()[-1]
    assert last == [1, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_estimate_sees_all_that_came_before_and_nothing_later(family: str) -> None:
    model = target(family)
    draft = draft_of(model)
    j = 8
    first = chain(model, draft, IDS).step()
    changed = [*IDS]
    changed[j + 2] = 77
    torch.testing.assert_close(chain(model, draft, changed).step()[0, : j + 1], first[0, : j + 1], rtol=0, atol=1e-12)
    for place in (j + 1, j - 5):  # the token whose state is estimated, and one far behind
        changed = [*IDS]
        changed[place] = 77
        assert float((chain(model, draft, changed).step()[0, j] - first[0, j]).detach().abs().max()) > 1e-6


def test_the_layer_is_one_that_sees_everything_if_there_is_one() -> None:
    assert source_block(anatomy(tiny_model("gemma3", layers=4))) == 3
    assert source_block(anatomy(tiny_model("mistral_window", layers=2))) == 0
    window = draft_of(target("mistral_window"))
    assert window.window == 8
    before = chain(target("mistral_window"), window, IDS).step()
    changed = [77, *IDS[1:]]
    # Eleven places behind: outside the layer's window, but in the target's own hidden states.
    assert (
        float((chain(target("mistral_window"), window, changed).step()[0, -1] - before[0, -1]).detach().abs().max()) > 0
    )


# --- a pass at a time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_drafting_makes_the_estimates_of_training(family: str, implementation: str) -> None:
    model = target(family, implementation)
    draft, parts = draft_of(model), anatomy(model)
    with torch.no_grad():
        hidden = final_hidden(parts, {"input_ids": torch.tensor([IDS])})[0]
        other = final_hidden(parts, {"input_ids": torch.tensor([IDS[::-1]])})[0]
    atol = 1e-9 if implementation == "sdpa" else 1e-5
    # Two rows of unlike lengths, read in pieces: a prompt, and then what passes gave.
    drafting = session(model, draft, [IDS[:4], IDS[::-1][:2]], "0 00 000 0000")
    with torch.no_grad():
        drafting.observe([step(0, IDS[4:5], hidden[:4]), step(1, IDS[::-1][2:3], other[:2])])
        drafting.propose([0, 1], [4, 4])
        drafting.observe([step(0, IDS[5:8], hidden[4:7]), step(1, IDS[::-1][3:4], other[2:3])])
        drafting.propose([0, 1], [4, 4])
        drafting.observe([step(0, IDS[8:], hidden[7:11]), step(1, IDS[::-1][4:5], other[3:4])])
        trees = drafting.propose([0, 1], [4, 4])
        for tree, ids in zip(trees, (IDS, IDS[::-1][:5]), strict=True):
            whole, guesses = chain(model, draft, ids), None
            last = hidden[10] if tree is trees[0] else other[3]
            for depth in range(4):
                z = whole.step(guesses)
                token = draft.score(last[None], z[0, -1:], depth, TargetHead(parts, draft.words)).argmax(-1)
                assert tree.tokens[depth + 1] == int(token)
                every = draft.score(
                    hidden[: len(ids) - 1] if tree is trees[0] else other[: len(ids) - 1],
                    z[0],
                    depth,
                    TargetHead(parts, draft.words),
                )
                guesses = every.argmax(-1)[None]
        drafting.observe([step(0, [5], hidden[:1]), step(1, IDS[::-1][5:6], other[4:5])])
        drafting.propose([1], [2])  # the first row has ended
        drafting.observe([step(1, IDS[::-1][6:8], other[5:7])])
        last = drafting._read()[0]
        torch.testing.assert_close(last, chain(model, draft, IDS[::-1][:8]).step()[0, -1], rtol=0, atol=atol)


def test_branches_do_not_see_each_other() -> None:
    model = target("llama")
    draft, parts = draft_of(model), anatomy(model)
    with torch.no_grad():
        hidden = final_hidden(parts, {"input_ids": torch.tensor([IDS])})[0]
        trees = []
        for words in ("0 1 2 00 01 10 11 20 000 100 200", "0 1 10 100 2"):
            drafting = session(model, draft, [IDS[:-1]], words)
            drafting.observe([step(0, IDS[-1:], hidden[:-1])])
            trees.append(drafting.propose([0], [3])[0])
    whole = {tuple(trees[0].tokens[n] for n in trees[0].path(node)) for node in range(len(trees[0]))}
    part = {tuple(trees[1].tokens[n] for n in trees[1].path(node)) for node in range(len(trees[1]))}
    assert part < whole
    assert len(trees[0]) == 12


# --- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_cross_entropy_on_the_heads_own_guesses() -> None:
    model = target("llama")
    draft, parts = draft_of(model, heads=3, feature=0.5, distil=0.25), anatomy(model)
    labels = torch.tensor(IDS)
    labels[:3] = -100
    with torch.no_grad():
        found = draft.loss(model, head_batch([{"input_ids": torch.tensor(IDS), "labels": labels}]))
        output = model(torch.tensor([IDS]), output_hidden_states=True)
        hidden, said = output.hidden_states[-1][0], output.logits[0].log_softmax(-1)
        expected, whole, guesses = 0.0, chain(model, draft, IDS), None
        n = len(IDS)
        for m in range(3):
            z = whole.step(guesses)[0]
            logits = draft.score(hidden[:-1], z, m, TargetHead(parts, draft.words))
            guesses = logits.argmax(-1)[None]
            q = logits.log_softmax(-1)
            scored = [j for j in range(1, n - 1) if j + 2 + m < n and j + 2 + m >= 3]
            expected -= sum(float(q[j, IDS[j + 2 + m]]) for j in scored) / len(scored)
            taught = [j for j in range(1, n - 1) if j + 1 + m < n and j + 2 + m >= 3]
            kl = [float((said[j + 1 + m].exp() * (said[j + 1 + m] - q[j])).sum()) for j in taught]
            expected += 0.25 * sum(kl) / len(kl)
            if m == 0:
                rows = [j for j in range(n - 1) if j + 2 >= 3]
                expected += 0.5 * float((hidden[1:][rows] - z[rows]).square().mean())
    assert float(found.total) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"rank": 4},
        {"sharing": True},
        {"encoders": "no_context"},
        {"encoders": "no_trigram"},
        {"start": "copy"},
    ],
)
def test_everything_of_the_draft_is_trained_and_nothing_of_the_model(more: dict[str, Any]) -> None:
    model = tiny_model("qwen3", layers=2)
    draft = draft_of(model, heads=2, **more)
    with freeze(model):
        found = draft.loss(model, head_batch([{"input_ids": torch.tensor(IDS)}] * 2))
        found.total.backward()
        assert all(parameter.grad is None for parameter in model.parameters())
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
    assert (draft.layer is None) == (more.get("encoders") == "no_context")


def test_a_row_that_is_too_short_has_no_loss() -> None:
    model = tiny_model("llama", layers=1)
    draft = draft_of(model)
    for length in (2, 3):
        loss = draft.loss(model, head_batch([{"input_ids": torch.tensor(IDS[:length])}])).total
        assert loss.item() == 0
        loss.backward()


def test_steps_bring_the_loss_down() -> None:
    model = tiny_model("llama", layers=1)
    draft = ChimeraModel(model, heads=2)
    batch = head_batch([{"input_ids": torch.tensor(IDS)}])
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3)
    losses = []
    with freeze(model):
        for _ in range(12):
            optimizer.zero_grad()
            loss = draft.loss(model, batch).total
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_output_is_stock_for_random_modules(family: str) -> None:
    model = tiny_model(family, layers=2, dtype=torch.float64)
    inputs = ragged([6, 9, 4])
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    steps: list[Any] = []
    decoder = Chimera.paper(untrained=True, on_step=steps.append)
    decoder._heads, decoder._about = draft_of(model), {"model": fingerprint(model)}
    found = model.generate(**inputs, do_sample=False, max_new_tokens=12, custom_generate=decoder)
    assert torch.equal(found, expected)
    assert all(1 <= len(step.tokens) <= 6 for step in steps)
    assert max(len(step.tree) for step in steps if step.tree is not None) == 26


def test_sampling_keeps_the_law() -> None:
    check_law(lambda model: Chimera(untrained=True, nodes=6, heads=2), rows=200)


def test_a_prompt_of_one_token_and_a_cache_that_goes_on() -> None:
    from transformers.cache_utils import DynamicCache

    from intaglio.modeling.anatomy import CACHE

    model = tiny_model("llama", layers=2, dtype=torch.float64)
    for ids in (IDS[:1], IDS[:2]):
        prompt = torch.tensor([ids])
        expected = model.generate(prompt, do_sample=False, max_new_tokens=8)
        decoder = Chimera(untrained=True)
        assert torch.equal(model.generate(prompt, do_sample=False, max_new_tokens=8, custom_generate=decoder), expected)
    cache = DynamicCache()
    prompt = torch.tensor([IDS])
    part = model.generate(prompt, do_sample=False, max_new_tokens=4, eos_token_id=None, **{CACHE: cache})
    expected = model.generate(prompt, do_sample=False, max_new_tokens=12, eos_token_id=None)
    found = model.generate(
        part, do_sample=False, max_new_tokens=8, eos_token_id=None, custom_generate=decoder, **{CACHE: cache}
    )
    assert torch.equal(found, expected)


def test_the_tree_of_the_released_code() -> None:
    shape = Chimera.paper().static_tree()
    assert (len(shape), shape.depth, shape.widths) == (25, 5, (4, 3, 3, 3, 2))
    assert all(path[:-1] == () or path[:-1] in shape.paths for path in shape.paths)
    assert (Chimera.paper().learning_rate, Chimera.paper().heads, Chimera.paper().length) == (2e-4, 4, 1024)


def test_settings_that_are_wrong() -> None:
    for fields in ({"heads": 0}, {"start_from": "warm"}, {"rank": -1}, {"tree": [[-1]]}, {"encoders": "none"}):
        with pytest.raises(ValidationError):
            Chimera(**fields)
