"""The evaluation of dictionaries: what its three tests give on cases worked out by hand."""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import new, word_tokenizer
from intaglio.dictionaries.baselines import TopKSAE
from intaglio.dictionaries.dictionary import SparseDictionary
from intaglio.errors import IntaglioError
from intaglio.methods.probes.sae_eval import Bench, Node, NodeSpec, SAEEval, english, symbolic
from intaglio.methods.probes.sae_eval.baselines import principal_components
from intaglio.methods.probes.sae_eval.evaluate import Learned
from intaglio.methods.probes.sae_eval.interpretability import f1_scores, meanings, union_scores
from intaglio.methods.probes.sae_eval.patching import run
from intaglio.methods.probes.sae_eval.phenomena import mixture_losses, occlusion
from intaglio.methods.probes.sae_eval.sparse_control import feature_weights, greedy_edit, guided_edit
from intaglio.methods.probes.sae_eval.supervised import SupervisedDictionary
from intaglio.methods.probes.sae_eval.tasks import held_out_pair
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.sites import Site
from tests.families import tiny_model, tiny_tokenizer

NAMES, FILLERS = 6, 4
TASK = symbolic(NAMES, FILLERS)
SMALL = {"width": 16, "tokens": 400}
TOPK = {"topk_sae": {**SMALL, "k": 3}}
EXAMPLES = (
    {"task": "symbols", "train": 24, "test": 12, "dictionaries": [TOPK]},
    {"nodes": [{"layer": 0, "part": "z", "head": 1, "position": "s2"}, {"layer": 1}], "supervised": ["mean"]},
)
BASE = EXAMPLES[0]
ALIVE = {
    "task": "test_the_english_task_is_read_with_the_tokenizer",
    "nodes": [{"layer": 0}],
    "dictionaries": [{"l1_sae": SMALL}],
    "attached": "test_an_attached_dictionary_is_tested_at_its_site",
    "supervised": ["mse"],
    "components": 2,
    "random": False,
    "ks": [3],
    "unions": 1,
    "train": 30,
    "test": 14,
}


def model(seed: int = 0) -> Checkpoint:
    words = ("<pad>", "<s>", "->", *(f"n{i}" for i in range(30)), *(f"f{i}" for i in range(8)))
    roles = {"pad_token": "<pad>", "unk_token": "<pad>"}
    return new("llama", width=32, depth=2, heads=2, context=16, seed=seed, tokenizer=word_tokenizer(words, **roles))


@cache
def solved(sign: int = 1) -> Checkpoint:
    """A model whose logit differences on training and test prompts have a sign on average."""
    for own in range(60):
        ckpt = model(own)
        sets = [symbolic().prompts(60, seed, split) for seed in (0, 1) for split in ("train", "test")]
        if all(sign * run(anatomy(ckpt.model), prompts)[0].difference > 0.001 for prompts in sets):
            return ckpt
    raise AssertionError("no seed has such differences")


def observe(method: SAEEval) -> Any:
    ckpt = solved()
    return method.measure(ckpt, symbolic(), seed=0)


def bench(nodes: tuple[Node, ...] = (Node(Site(0)),), count: int = 40) -> Bench:
    parts, task = anatomy(model().model), symbolic()
    _, training = run(parts, task.prompts(60, 0), read=nodes)
    return Bench.from_prompts(parts, task, task.prompts(count, 0, "test"), training)


class Identity:
    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, codes: Tensor) -> Tensor:
        return codes


# --- prompts --------------------------------------------------------------------------------------------------------


def test_prompts_hold_the_names_in_the_order_of_their_position() -> None:
    prompts = TASK.prompts(50, 3)
    rows = torch.arange(50)
    io, s, pos = (prompts.attributes[name] for name in ("io", "s", "pos"))
    assert torch.equal(prompts.ids_NT[rows, prompts.positions["io"]], io + 3)
    for place in ("s1", "s2"):
        assert torch.equal(prompts.ids_NT[rows, prompts.positions[place]], s + 3)
    assert torch.equal(prompts.positions["s1+1"], prompts.positions["s1"] + 1)
    assert torch.equal(prompts.positions["io"] < prompts.positions["s1"], pos == 0)
    assert (prompts.ids_NT[rows, prompts.positions["end"]] == 2).all()
    assert torch.equal(prompts.answers_N2, torch.stack([io, s], 1) + 3)
    assert not (io == s).any()
    assert set(pos.tolist()) == {0, 1}
    assert set(prompts.ids_NT[:, 0].tolist()) == {1}
    assert torch.equal(TASK.prompts(50, 3).ids_NT, prompts.ids_NT)
    assert not torch.equal(TASK.prompts(50, 4).ids_NT, prompts.ids_NT)


def test_pairs_of_names_of_the_test_are_not_those_of_the_training() -> None:
    own = {split: TASK.prompts(400, 0, split) for split in ("train", "test")}
    pairs = {
        split: {
            tuple(sorted(pair)) for pair in zip(p.attributes["io"].tolist(), p.attributes["s"].tolist(), strict=True)
        }
        for split, p in own.items()
    }
    assert not pairs["train"] & pairs["test"]
    assert all(held_out_pair(b, a) for a, b in pairs["test"])
    assert pairs["train"] | pairs["test"] == set(itertools.combinations(range(NAMES), 2))
    for choice in ("first", "second"):
        values = {split: set(p.choices[choice].tolist()) for split, p in own.items()}
        assert values == {"train": {0, 1, 2, 3}, "test": {0, 1, 2, 3}}


def test_a_counterfactual_changes_one_attribute_and_keeps_everything_else() -> None:
    """Counterfactual for Pos must keep names and swap order."""
    prompts = TASK.prompts(60, 0)
    for attribute in ("io", "s", "pos"):
        other = TASK.counterfactual(prompts, attribute, 0)
        for name in ("io", "s", "pos"):
            same = other.attributes[name] == prompts.attributes[name]
            assert bool((~same).all() if name == attribute else same.all())
        assert all(torch.equal(other.choices[name], prompts.choices[name]) for name in prompts.choices)
        assert not (other.attributes["io"] == other.attributes["s"]).any()
    swapped = TASK.counterfactual(prompts, "pos", 0)
    assert torch.equal(swapped.ids_NT[:, [3, 2, 1, 4, 5, 6]], prompts.ids_NT[:, [1, 2, 3, 4, 5, 6]])


def test_properties() -> None:
    prompts = TASK.prompts(30, 0)
    kinds = TASK.properties(prompts)
    io, s, pos = (prompts.attributes[name] for name in ("io", "s", "pos"))
    assert torch.equal(kinds["io"]["io=2"], io == 2)
    assert torch.equal(kinds["s"]["s=1"], s == 1)
    assert torch.equal(kinds["pos"]["pos=1"], pos == 1)
    assert torch.equal(kinds["io x pos"]["io=2, pos=1"], (io == 2) & (pos == 1))
    assert torch.equal(kinds["s x pos"]["s=2, pos=0"], (s == 2) & (pos == 0))
    assert torch.equal(kinds["name"]["name=3"], (io == 3) | (s == 3))


def test_the_english_task_is_read_with_the_tokenizer() -> None:
    """Single-token names filtered by the tokenizer; templates of the test are not those of the training."""
    with pytest.raises(IntaglioError, match="the tokenizer has 0 names"):
        english(tiny_tokenizer("llama"))
    with pytest.raises(IntaglioError, match="the tokenizer has 0 names"):
        SAEEval().measure(Checkpoint(tiny_model("llama", layers=2), tiny_tokenizer("llama")))

    class Words:
        """Splits at spaces, each word a token; every word is known."""

        bos_token_id = None

        def __init__(self) -> None:
            self.ids: dict[str, int] = {}

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            parts = text.replace(".", " .").replace(",", " ,").split()
            return {"input_ids": [self.ids.setdefault(part, len(self.ids)) for part in parts]}

    tokenizer = Words()
    task = english(tokenizer)
    train, test = (task.prompts(20, 0, split) for split in ("train", "test"))
    spelled = {token: word for word, token in tokenizer.ids.items()}
    texts = [
        " ".join(spelled[int(i)] for i in row[:length])
        for p in (train, test)
        for row, length in zip(p.ids_NT, p.lengths_N, strict=True)
    ]
    assert all(text.startswith("Then , ") for text in texts)
    assert all("were working at" in text for text in texts[20:])
    assert not any("were working at" in text for text in texts[:20])
    assert len(set(train.lengths_N.tolist())) == 2
    for p in (train, test):
        rows = torch.arange(20)
        assert torch.equal(p.ids_NT[rows, p.positions["io"]], p.answers_N2[:, 0])
        assert torch.equal(p.ids_NT[rows, p.positions["s2"]], p.answers_N2[:, 1])
        assert torch.equal(p.positions["end"], p.lengths_N - 1)
    women = task.properties(test)["women"]["io in women"]
    assert torch.equal(women, test.attributes["io"] < 35)


# --- patching -------------------------------------------------------------------------------------------------------


def test_patching_with_itself_changes_no_bit_and_all_nodes_are_patched_together() -> None:
    """Patching a with itself leaves logits bit-identical."""
    parts = anatomy(model().model)
    prompts = TASK.prompts(70, 0)
    nodes = (Node(Site(0), "s2"), Node(Site(0), "end"), Node(Site(1, "z", 1), "end"))
    clean, own = run(parts, prompts, read=nodes)
    again, _ = run(parts, prompts, own)
    assert torch.equal(again.difference_N, clean.difference_N)
    assert torch.equal(again.token_N, clean.token_N)
    zero = {node: torch.zeros_like(x_ND) for node, x_ND in own.items()}
    _, seen = run(parts, prompts, zero, nodes)
    assert torch.equal(seen[nodes[0]], own[nodes[0]])  # as they were before patching
    both = run(parts, prompts, {node: zero[node] for node in nodes[:2]})[0]
    assert not torch.equal(both.difference_N, run(parts, prompts, {nodes[0]: zero[nodes[0]]})[0].difference_N)
    logits = parts.model(input_ids=prompts.ids_NT).logits[torch.arange(70), prompts.lengths_N - 1]
    expected = logits.gather(1, prompts.answers_N2)
    torch.testing.assert_close(clean.difference_N, expected[:, 0] - expected[:, 1], atol=1e-4, rtol=1e-4)
    assert torch.equal(clean.token_N, logits.argmax(1))


# --- test 1 ---------------------------------------------------------------------------------------------------------


def test_sufficiency_and_necessity_of_the_identity_and_of_the_mean() -> None:
    """Identity: sufficiency 1, necessity 1. Constant: sufficiency = LD_mean/LD_clean, recovered 0, necessity 0."""
    own = bench((Node(Site(0)), Node(Site(0), "s2")))
    identity = own.scores(own.activations)
    assert [identity[name] for name in ("sufficiency", "recovered", "necessity")] == pytest.approx([1, 1, 1], abs=1e-4)
    constant = own.scores({node: mean.expand_as(own.activations[node]) for node, mean in own.means.items()})
    assert constant["sufficiency"] == pytest.approx(own.ablated.difference / own.clean.difference, rel=1e-4)
    assert [constant["recovered"], constant["necessity"]] == pytest.approx([0, 0], abs=1e-3)


# --- supervised dictionaries ------------------------------------------------------------------------------------------


def balanced(names: int = 3) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
    cells = list(itertools.product(range(names), range(names), range(2))) * 2
    columns = torch.tensor(cells).T
    attributes = dict(zip(("io", "s", "pos"), columns, strict=True))
    x_ND = torch.randn(len(cells), 5, generator=torch.Generator().manual_seed(0))
    return x_ND, attributes, {"io": names, "s": names, "pos": 2}


def test_mean_and_least_squares_codes_agree_on_balanced_attributes() -> None:
    """Balanced factorial: equal reconstructions; mean codes weighted by counts sum to 0 per attribute."""
    x_ND, attributes, sizes = balanced()
    mean, mse = (SupervisedDictionary.from_activations(x_ND, attributes, sizes, kind) for kind in ("mean", "mse"))
    torch.testing.assert_close(mean.reconstruct(attributes), mse.reconstruct(attributes), atol=1e-5, rtol=1e-4)
    for name, code in mean.codes.items():
        counts = attributes[name].bincount().float()
        assert float((counts @ code).abs().max()) < 1e-4
    expected = x_ND[attributes["io"] == 1].mean(0) - x_ND.mean(0)
    torch.testing.assert_close(mean.codes["io"][1], expected, atol=1e-5, rtol=1e-5)


def test_least_squares_codes_explain_dependent_attributes() -> None:
    x_ND, attributes, sizes = balanced()
    rows = (attributes["pos"] == 0) | (attributes["io"] == 0)
    truth = {name: torch.randn(size, 5, generator=torch.Generator().manual_seed(size)) for name, size in sizes.items()}
    own = {name: values[rows] for name, values in attributes.items()}
    x_ND = torch.stack([truth[name][values] for name, values in own.items()]).sum(0)
    errors = [
        float((SupervisedDictionary.from_activations(x_ND, own, sizes, kind).reconstruct(own) - x_ND).abs().max())
        for kind in ("mean", "mse")
    ]
    assert errors[1] < 1e-4
    assert errors[0] > 0.1


def test_an_edit_is_its_own_inverse_and_weights_sum_to_one() -> None:
    """Supervised edit is its own inverse (v->v'->v). Weights sum to 1."""
    x_ND, attributes, sizes = balanced()
    own = SupervisedDictionary.from_activations(x_ND, attributes, sizes)
    before, after = attributes["io"], (attributes["io"] + 1) % 3
    edited = own.edit(x_ND, "io", before, after)
    torch.testing.assert_close(edited - x_ND, own.codes["io"][after] - own.codes["io"][before])
    torch.testing.assert_close(own.edit(edited, "io", after, before), x_ND)
    total = torch.stack([own.weight(attributes, name) for name in attributes]).sum(0)
    torch.testing.assert_close(total, torch.ones(len(x_ND)), atol=1e-4, rtol=1e-4)


def test_an_edit_by_projection_removes_what_is_there() -> None:
    x_ND, attributes, sizes = balanced()
    own = SupervisedDictionary.from_activations(x_ND, attributes, sizes)
    before, after = attributes["io"], (attributes["io"] + 1) % 3
    rest = own.edit(x_ND, "io", before, after, projection=True) - own.codes["io"][after] - own.mean_D
    assert float((rest * own.codes["io"][before]).sum(1).abs().max()) < 1e-4
    exact = own.mean_D + own.codes["io"][before]
    torch.testing.assert_close(
        own.edit(exact, "io", before, after, projection=True),
        own.edit(exact, "io", before, after),
        atol=1e-5,
        rtol=1e-5,
    )


def test_codes_of_an_independent_site_shrink_with_the_number_of_prompts() -> None:
    """Attribute-independent noise site: mean codes -> 0 at rate 1/sqrt(n_v)."""
    norms = []
    for count in (400, 6400):
        draws = torch.Generator().manual_seed(count)
        values = {"io": torch.arange(count) % 4}
        x_ND = torch.randn(count, 50, generator=draws)
        norms.append(float(SupervisedDictionary.from_activations(x_ND, values, {"io": 4}).codes["io"].norm()))
    assert 3.2 < norms[0] / norms[1] < 4.8


# --- test 2 ---------------------------------------------------------------------------------------------------------


def standard(seed: int = 0, latents: int = 10, width: int = 6) -> SparseDictionary:
    draws = torch.Generator().manual_seed(seed)
    rows = torch.randn(latents, width, generator=draws)
    zeros = torch.zeros(latents)
    tensors = {"W_enc": rows.T.contiguous(), "W_dec": rows, "b_dec": torch.zeros(width), "b_enc": zeros}
    return SparseDictionary("standard", tensors)


def pairs(count: int = 20, width: int = 6) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(7)
    return torch.randn(count, width, generator=draws), torch.randn(count, width, generator=draws)


def test_one_greedy_edit_is_the_best_of_all() -> None:
    """Greedy k=1 equals brute force."""
    own, (source, target) = standard(), pairs()
    edited, _ = greedy_edit(source, target, own, own.decoder_MD, 1)
    change = own.encode(target) - own.encode(source)
    for row in range(len(source)):
        options = [source[row] + change[row, j] * own.decoder_MD[j] for j in range(10)]
        best = min(options, key=lambda option: float((target[row] - option).norm()))
        torch.testing.assert_close(edited[row], best, atol=1e-5, rtol=1e-4)


def test_all_features_of_an_exact_reconstruction_give_the_whole_change() -> None:
    """k = all features with exact reconstruction reproduces the ground-truth patch."""
    source, target = pairs()
    rows = torch.cat([torch.eye(6), -torch.eye(6)])
    tensors = {"W_enc": rows.T.contiguous(), "W_dec": rows, "b_dec": torch.zeros(6), "b_enc": torch.zeros(12)}
    exact = SparseDictionary("standard", tensors)
    whole, removed = greedy_edit(source, target, exact, exact.decoder_MD, 12)
    torch.testing.assert_close(whole, target, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(removed, torch.ones(20), atol=1e-4, rtol=1e-4)
    more, _ = greedy_edit(source, target, exact, exact.decoder_MD, 99)
    assert torch.equal(more, whole)


def test_a_round_in_which_every_change_would_do_harm_leaves_the_edit_as_it_is() -> None:
    """As in the authors' code, features without a change take part in each round, so the distance does not rise."""
    own, (source, target) = standard(), pairs()
    change = own.encode(target) - own.encode(source)
    assert bool((change == 0).any(1).all())
    edits = [greedy_edit(source, target, own, own.decoder_MD, k)[0] for k in range(11)]
    distances = torch.stack([(target - edited).norm(dim=1) for edited in edits])
    assert torch.equal(edits[0], source)
    assert bool((distances.diff(dim=0) <= 1e-5).all())
    whole = source + change @ own.decoder_MD
    assert bool(((target - whole).norm(dim=1) > distances[10] + 0.1).any())
    dense = SparseDictionary("standard", {**own.tensors, "W_enc": 0 * own.tensors["W_enc"], "b_enc": torch.ones(10)})
    assert torch.equal(greedy_edit(source, target, dense, dense.decoder_MD, 3)[0], source)


def test_an_edit_changes_a_feature_once_even_if_more_of_it_would_help() -> None:
    tensors = {"W_enc": 0.25 * torch.eye(6), "W_dec": torch.eye(6), "b_dec": torch.zeros(6), "b_enc": torch.zeros(6)}
    weak, target = SparseDictionary("standard", tensors), torch.tensor([[4.0, 0, 0, 0, 0, 0]])
    for k in (1, 2, 3):
        assert torch.equal(greedy_edit(torch.zeros(1, 6), target, weak, weak.decoder_MD, k)[0], target / 4)


def test_the_weights_of_features_sum_to_one() -> None:
    own, (source, _) = standard(), pairs()
    codes = own.encode(source)
    weights = feature_weights(codes, own.decoder_MD)
    torch.testing.assert_close(weights.sum(1), torch.ones(20), atol=1e-4, rtol=1e-4)
    shift = own.decode(codes)[3]
    expected = codes[3, 5] * float(own.decoder_MD[5] @ shift) / float(shift @ shift)
    assert float(weights[3, 5]) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    assert bool(((codes == 0) <= (weights == 0)).all())


def test_a_guided_edit_exchanges_the_features_of_both_values() -> None:
    """Remove the k active features with highest F1 for the source value, add those for the target value."""
    own, (source, target) = standard(), pairs(1)
    codes_s, codes_t = own.encode(source)[0], own.encode(target)[0]
    active_s, active_t = codes_s.nonzero()[:, 0].tolist(), codes_t.nonzero()[:, 0].tolist()
    scores = torch.zeros(2, 10)
    scores[0, active_s[1]], scores[0, active_s[0]] = 0.9, 0.5
    scores[1, active_t[0]] = 0.8
    inactive = next(j for j in range(10) if j not in active_s)
    scores[0, inactive] = 1.0
    value = torch.tensor([0]), torch.tensor([1])
    edited = guided_edit(source, target, own, own.decoder_MD, 1, scores, *value)[0]
    expected = source[0] - codes_s[active_s[1]] * own.decoder_MD[active_s[1]]
    expected = expected + codes_t[active_t[0]] * own.decoder_MD[active_t[0]]
    torch.testing.assert_close(edited, expected, atol=1e-5, rtol=1e-4)
    everything = guided_edit(source, target, own, own.decoder_MD, 99, scores, *value)[0]
    whole = source[0] - own.decode(codes_s) + own.decode(codes_t)
    torch.testing.assert_close(everything, whole, atol=1e-4, rtol=1e-4)


# --- test 3 ---------------------------------------------------------------------------------------------------------


def test_f1() -> None:
    """|A|=10,|F|=8,overlap 6 -> P .75, R .6, F1 .6667; NaN F1 for dead features (set to -inf)."""
    holds = torch.zeros(20, 1, dtype=torch.bool)
    holds[:10] = True
    active = torch.zeros(20, 2, dtype=torch.bool)
    active[4:12, 0] = True
    scores = f1_scores(active, holds)
    assert float(scores[0, 0]) == pytest.approx(2 / 3)
    assert float(scores[0, 1]) == -torch.inf


def test_an_f1_above_the_bound_needs_precision_and_recall() -> None:
    """F1 >= .8 implies P,R >= .667."""
    for size in range(1, 30):
        for overlap in range(min(size, 20) + 1):
            if 2 * overlap / (20 + size) >= 0.8:
                assert min(overlap / 20, overlap / size) >= 2 / 3 - 1e-9


def test_unions_join_values_in_decreasing_order_of_their_f1() -> None:
    values = torch.tensor([0] * 6 + [1] * 6 + [2] * 6 + [3] * 6)
    holds = torch.nn.functional.one_hot(values).bool()
    active = torch.zeros(24, 2, dtype=torch.bool)
    active[:12, 0] = True
    active[11, 0] = False
    assert float(f1_scores(active, holds)[:, 0].max()) == pytest.approx(12 / 17)
    for most, expected in ((1, 12 / 17), (2, 22 / 23), (4, 22 / 23)):
        assert float(union_scores(active, holds, most)[0]) == pytest.approx(expected)
    assert float(union_scores(active, holds, 2)[1]) == -torch.inf
    twelve = torch.nn.functional.one_hot(torch.arange(12).repeat(2)).bool()
    assert float(union_scores(torch.ones(24, 1, dtype=torch.bool), twelve)[0]) == pytest.approx(40 / 44)  # of ten


def test_meanings_name_the_best_kind() -> None:
    prompts = TASK.prompts(300, 0)
    kinds = TASK.properties(prompts)
    io, pos = prompts.attributes["io"], prompts.attributes["pos"]
    columns = [io == 1, pos == 1, (io == 2) & (pos == 0), (io == 0) | (io == 3), torch.zeros(300, dtype=torch.bool)]
    columns.append(torch.arange(300) % 7 == 0)
    read = meanings(torch.stack(columns, 1), kinds, 3)
    names = [read.kinds[int(kind)] for kind in read.kind_M[:4]]
    assert names == ["io", "pos", "io x pos", "io, union"]
    assert read.interpretable_M.tolist() == [True] * 4 + [False] * 2
    assert read.share() == pytest.approx(4 / 5)
    assert {name: count for name, count in read.counts().items() if count} == dict.fromkeys(names, 1)


# --- everything together ----------------------------------------------------------------------------------------------


def test_the_identity_passes_every_test_of_a_learned_dictionary() -> None:
    own = bench()
    (node,) = own.activations
    width = own.activations[node].shape[1]
    results = own.learned({node: Learned(Identity(), torch.eye(width))}, [1, width], unions=1)
    assert results["sufficiency"] == pytest.approx(1, abs=1e-4)
    assert results["l0"] == width
    for attribute, truth in results["edit"].items():
        assert truth[width]["agreement"] == 1, attribute
        assert truth[width]["removed"] == pytest.approx(1, abs=1e-3)
    assert results["guided"]["io"][width] == 1
    # Every feature is always active, so none stands for a property, and nothing is left of the model's answer.
    assert results["interpretable"] == 0
    assert results["sufficiency_of_interpretable"] == pytest.approx(
        run(own.parts, own.prompts, {node: torch.zeros_like(own.activations[node])})[0].difference
        / own.clean.difference,
        rel=1e-3,
    )


def test_agreement_is_with_the_most_likely_token_of_the_ground_truth() -> None:
    own = bench()
    (node,) = own.activations
    other, targets, truth = own.counterfactuals["io"]
    assert own.agreement("io", targets) == 1
    assert own.unedited()["io"] == pytest.approx(float((truth.token_N == own.clean.token_N).double().mean()))
    assert not torch.equal(targets[node], own.activations[node])
    assert len(other) == len(own.prompts)


def test_a_supervised_edit_swaps_the_old_value_for_the_new_one_in_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    own, sizes = bench((Node(Site(0)), Node(Site(1)))), {"io": 30, "s": 30, "pos": 2}
    draws, edits = torch.Generator().manual_seed(0), {}
    fitted = {
        node: SupervisedDictionary(mean, {name: torch.randn(size, 32, generator=draws) for name, size in sizes.items()})
        for node, mean in own.means.items()
    }
    monkeypatch.setattr(Bench, "agreement", lambda self, name, edited: edits.update({name: edited}) or len(edits))
    results = own.supervised(fitted)
    assert results["edit"] == {"io": 1, "s": 2, "pos": 3}
    for name, (other, _, _) in own.counterfactuals.items():
        before, after = own.prompts.attributes[name], other.attributes[name]
        for node, x_ND in own.activations.items():
            code = fitted[node].codes[name]
            torch.testing.assert_close(edits[name][node], x_ND - code[before] + code[after])
    assert sum(results["removed"].values()) == pytest.approx(1, abs=1e-4)


def test_shuffled_labels_are_the_control_of_interpretability() -> None:
    """Compare with label-shuffled control (without unions, which reach a high F1 by chance on so few prompts)."""
    own = bench()
    (node,) = own.activations
    pos = torch.nn.functional.one_hot(own.prompts.attributes["pos"], 2).float()

    class Order(Identity):
        def encode(self, x: Tensor) -> Tensor:
            return pos

        def decode(self, codes: Tensor) -> Tensor:
            return codes @ torch.ones(2, 32)

    results = own.learned({node: Learned(Order(), torch.ones(2, 32))}, [1], unions=1)
    assert results["interpretable"] == 1
    assert results["interpretable_shuffled"] == 0
    assert results["meanings"]["pos"] == 2
    assert results["weight_of_interpretable"] == pytest.approx(1, abs=1e-4)


def test_principal_components_are_signed_halves() -> None:
    x_ND = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(1.0, 7.0))
    own = principal_components(x_ND, 2)
    centred = x_ND - x_ND.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False)[2][:2]
    expected = centred @ axes.T @ axes + x_ND.mean(0)
    torch.testing.assert_close(own.decode(own.encode(x_ND)), expected, atol=1e-4, rtol=1e-4)
    assert (own.encode(x_ND) > 0).sum(1).tolist() == [2] * 50
    with pytest.raises(IntaglioError, match="components is 9; 50 activations of width 6 have fewer"):
        principal_components(x_ND, 9)


def test_a_measurement_has_every_arm_and_both_baselines() -> None:
    labels: list[str] = []
    document = SAEEval(**BASE).measure(solved(), symbolic(), progress=lambda done, total, label: labels.append(label))
    assert re.fullmatch(r"\d+% of the training prompts are right", labels[0])  # before any dictionary is trained
    assert labels[1:] == ["topk_sae", "topk_sae, frozen decoder"]
    assert list(document["dictionaries"]) == [
        "supervised, mean", "supervised, mse", "topk_sae", "topk_sae, frozen decoder", "principal components",
    ]  # fmt: skip
    assert document["nodes"] == ["layers.1 at end"]
    assert set(document["unedited"]) == {"io", "s", "pos"}
    learned = document["dictionaries"]["topk_sae"]
    assert document["dictionaries"]["topk_sae, frozen decoder"] != learned
    assert document["dictionaries"]["principal components"]["l0"] == 3
    assert {"guided", "interpretable", "interpretable_shuffled", "weight_of_interpretable"} <= learned.keys()
    assert list(learned["edit"]["io"]) == [1, 2, 4]


def test_an_attached_dictionary_is_tested_at_its_site(tmp_path: Any) -> None:
    ckpt = solved()
    given = standard(width=32)
    SparseDictionary("standard", given.tensors, site=Site(0, "mlp")).save(tmp_path / "sae")
    method = SAEEval(**BASE | {"attached": str(tmp_path / "sae"), "random": False, "dictionaries": [], "components": 0})
    document = method.measure(ckpt, symbolic())
    assert list(document["dictionaries"]) == ["supervised, mean", "supervised, mse", str(tmp_path / "sae")]
    assert document["nodes"] == ["layers.1 at end"]


def test_an_attached_dictionary_without_a_site_is_tested_at_the_first_node(tmp_path: Any) -> None:
    standard(width=32).save(tmp_path / "sae")
    nodes = [NodeSpec(layer=0), NodeSpec(layer=1, position="s2")]
    fields = {"nodes": nodes, "random": False, "dictionaries": [], "components": 0}
    method = SAEEval(**BASE | fields | {"attached": str(tmp_path / "sae")})
    document = method.measure(solved(), symbolic())
    assert document["nodes"] == ["layers.0 at end", "layers.1 at s2"]
    SparseDictionary("standard", standard(width=32).tensors, site=Site(0)).save(tmp_path / "sited")
    sited = SAEEval(**BASE | fields | {"attached": str(tmp_path / "sited")}).measure(solved(), symbolic())
    assert document["dictionaries"][str(tmp_path / "sae")] == sited["dictionaries"][str(tmp_path / "sited")]
    standard(width=6).save(tmp_path / "narrow")
    with pytest.raises(IntaglioError, match=r"narrow reads 6 features and does not name its site; layers.0 has 32"):
        SAEEval(**BASE | fields | {"attached": str(tmp_path / "narrow")}).measure(solved(), symbolic())


def test_what_cannot_be_measured_is_one_sentence() -> None:
    bert = Checkpoint(tiny_model("bert", layers=1), tiny_tokenizer("bert"))
    with pytest.raises(IntaglioError, match="needs the next token"):
        SAEEval().measure(bert)
    with pytest.raises(IntaglioError, match="the checkpoint has no tokenizer"):
        SAEEval().measure(Checkpoint(model().model))
    few = Checkpoint(tiny_model("llama", layers=1, vocab_size=20))
    with pytest.raises(IntaglioError, match="token id 40 is outside the model's vocabulary of 20"):
        SAEEval(task="symbols").measure(few)
    with pytest.raises(IntaglioError, match="layer is 9; the model has the layers 0 to 1"):
        SAEEval(nodes=[NodeSpec(layer=9)]).measure(model(), TASK)
    with pytest.raises(IntaglioError, match=r"dictionaries.topk_sae.*width is 2 and k is 3"):
        SAEEval(dictionaries=[{"topk_sae": {"width": 2, "k": 3}}]).measure(model(), TASK)
    with pytest.raises(ValidationError, match="dictionaries names 'wanda', not one dictionary"):
        SAEEval(dictionaries=[{"wanda": {}}])
    broken = model()
    anatomy(broken.model).final_norm.weight.data[0] = torch.nan
    with pytest.raises(IntaglioError, match="the model fails the task: its mean logit difference is nan"):
        SAEEval(**BASE).measure(broken, symbolic())
    with pytest.raises(IntaglioError, match="the model fails the task: its mean logit difference is -"):
        SAEEval(**BASE | {"train": 60}).measure(solved(-1), symbolic())


# --- phenomena --------------------------------------------------------------------------------------------------------


def test_the_larger_attribute_occludes_the_smaller() -> None:
    """IO features are learned, S features missed; shrinking IO by a - alpha*u_IO raises the count of S features."""
    draws = torch.Generator().manual_seed(0)
    values = {name: torch.randint(0, 4, (600,), generator=draws) for name in ("io", "s")}
    rows = torch.nn.functional.normalize(torch.randn(2, 4, 24, generator=draws), dim=2)
    x_ND = 4 * rows[0][values["io"]] + rows[1][values["s"]] + 0.02 * torch.randn(600, 24, generator=draws)
    properties = {name: {f"{name}={value}": own == value for value in range(4)} for name, own in values.items()}
    codes = SupervisedDictionary.from_activations(x_ND, values, {"io": 4, "s": 4})
    method = TopKSAE(width=8, k=1, tokens=20_000, batch_tokens=100, learning_rate=0.02)
    counts = occlusion(x_ND, values, properties, codes, method, shares=(0.0, 1.0))
    assert counts[0.0]["io"] >= 3
    assert counts[0.0]["s"] == 0
    assert counts[1.0]["io"] == 0
    assert counts[1.0]["s"] >= 3


def test_many_random_features_beat_the_two_that_generated_the_data() -> None:
    """In a 2-component Gaussian mixture toy a many-feature random SAE beats the 2-feature ideal in total loss."""
    ideal, few = mixture_losses(4)
    same, many = mixture_losses(3000)
    assert few.total > many.total
    assert same.total > many.total
    assert ideal.penalty == pytest.approx(0.1 * 3, rel=0.1)
    assert ideal.error == pytest.approx(9, rel=0.1)  # the noise of the other nine dimensions
    doubled, _ = mixture_losses(4, l1=0.2)
    assert doubled.penalty == pytest.approx(2 * ideal.penalty)
    assert mixture_losses(4, seed=1)[0] != ideal
    assert mixture_losses(4, distance=5.0)[0].penalty == pytest.approx(0.5, rel=0.1)
    assert mixture_losses(4, width=5)[0].error == pytest.approx(4, rel=0.1)
