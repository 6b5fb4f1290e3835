"""R-Sparse in a checkpoint: what its fields do, the baselines, the search, composition, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

import intaglio
from intaglio.checkpoint import RECORD, Checkpoint, load
from intaglio.errors import IntaglioError
from intaglio.measures.evaluate import Evaluator
from intaglio.measures.input_sparsity import count_inputs, input_sparsity
from intaglio.methods.activations.r_sparse import RSparse, SparseLinear, decomposition, measure_bytes_read
from intaglio.methods.activations.r_sparse.budget import BudgetSpec
from intaglio.methods.activations.r_sparse.decomposition import low_rank_pair
from intaglio.methods.activations.r_sparse.layer_options import ALPHAS, OptionSpec
from intaglio.methods.activations.r_sparse.layers import DensePrefill
from intaglio.methods.weights.wanda import Wanda
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import capture, run_blocks
from intaglio.recipe.schema import Recipe
from intaglio.speculative.drafters.prompt_lookup import PromptLookup
from intaglio.speculative.loop import Speculative
from tests.families import tiny_checkpoint_dir
from tests.methods.activations.helpers import IDS, PROMPT, carved, drawn, layers, tiny


def test_the_defaults_the_paper_s_and_the_baselines() -> None:
    paper = RSparse.paper()
    assert paper.search is not None
    assert (paper.sparsity, paper.tokens, paper.mode, paper.fraction) == (0.5, 512, "last_fraction", 0.1)
    assert (paper.scale, RSparse().scale) == (None, True)
    assert paper.search.population == 32
    assert RSparse.teal(sparsity=0.4) == RSparse(how="teal", sparsity=0.4)
    assert RSparse.cats().how == "cats"
    assert RSparse().search is None


@torch.no_grad()
def test_teal_is_plain_magnitude_and_has_a_threshold_of_its_own() -> None:
    teal, end, scaled = (
        carved(fields={"how": "teal"}),
        carved(fields={"alpha": 1.0, "scale": None}),
        carved(fields={"low_rank": False, "alpha": 1.0}),
    )
    for one, two, three in zip(*(layers(c).values() for c in (teal, end, scaled)), strict=True):
        assert one.rule == two.rule
        assert one.rank == two.rank == three.rank == 0
        assert not one.rule.scaled
        assert three.rule.scaled
        assert one.rule.threshold != three.rule.threshold
    x = drawn(3, 32)
    layer = next(iter(layers(teal).values()))
    assert torch.equal(layer.kept(x), x.abs() > layer.rule.threshold)
    assert torch.equal(teal.model(IDS).logits, end.model(IDS).logits)


def test_alphas_by_name_and_layers_left_alone() -> None:
    alphas = {"layers.0.self_attn.q_proj": 0.0, "*.mlp.*": 1.0, "*": 0.95}
    fields = {"alpha": alphas, "scale": None, "ignore": ["layers.1.*"]}
    checkpoint = carved(fields=fields)
    found = layers(checkpoint)
    assert len(found) == 7
    q, k, up = (found[f"model.layers.0.{name}_proj"] for name in ("self_attn.q", "self_attn.k", "mlp.up"))
    assert (q.rule.threshold, q.rank) == (None, 8)  # 32 * 32 / 2 / 64
    assert (k.rule.scaled, k.rank) == (True, 1)
    assert (up.rule.scaled, up.rank) == (False, 0)
    chosen = checkpoint.record.steps[-1].chosen
    assert chosen["grid"]["values"]["layers.0.self_attn.q_proj"] == 0.0
    assert chosen["channels_and_rank"]["mlp.up_proj"] == [16, 0]
    assert "layers.0.self_attn.k_proj" in chosen["overspent"]
    assert "grid" not in carved().record.steps[-1].chosen


@torch.no_grad()
def test_alpha_by_output_error_is_the_least_error_of_each_projection() -> None:
    chosen = carved(fields={"alpha": "error", "sparsity": 0.7})
    grid = chosen.record.steps[-1].chosen["grid"]["values"]
    assert set(grid.values()) <= set(ALPHAS)
    assert len(grid) == len(layers(chosen))
    for name, linear in anatomy(tiny().model).all_linears():
        x_NI = torch.randn(64, linear.shape[1], generator=torch.Generator().manual_seed(0))
        options = OptionSpec(BudgetSpec(), 0.7, True, False).options(name, linear, x_NI, ALPHAS)
        y_NO, errors = x_NI @ linear.read().T, {}
        for alpha in ALPHAS:
            layer = SparseLinear.from_weight(linear.read(), None, *options.at(alpha))
            errors[alpha] = float(((layer(x_NI) - y_NO).square().sum(1) / y_NO.square().sum(1)).mean())
        assert errors[options.least_error(linear, x_NI)] == pytest.approx(min(errors.values()), rel=1e-5)


def test_topk_keeps_so_many_of_every_token() -> None:
    checkpoint = carved(fields={"threshold": "topk", "alpha": 0.75})
    x = drawn(40, 32)
    assert layers(checkpoint)["model.layers.0.mlp.up_proj"].kept(x).sum(1).tolist() == [12] * 40
    assert checkpoint.record.steps[-1].chosen["kept"] == pytest.approx(0.375)  # 12 of 32 inputs, 18 of 48


@torch.no_grad()
def test_the_greedy_allocation_reads_as_little_and_is_nearer() -> None:
    fields = {"how": "teal", "sparsity": 0.4}
    uniform, greedy = carved(fields=fields), carved(fields={**fields, "allocation": "greedy"})
    values = greedy.record.steps[-1].chosen["grid"]["values"]
    assert len(set(values.values())) > 2
    assert greedy.record.steps[-1].chosen["read"] <= 0.6
    assert greedy.record.steps[-1].chosen["read"] >= 0.55
    base = anatomy(tiny().model)
    inputs = capture(base, {"input_ids": IDS[:4]})
    dense = run_blocks(base, 0, 1, inputs)
    errors = [float((run_blocks(anatomy(c.model), 0, 1, inputs) - dense).square().sum()) for c in (greedy, uniform)]
    assert errors[0] < errors[1]


# CATS


@torch.no_grad()
def test_cats_is_the_feed_forward_with_its_gates_cut() -> None:
    base, sparse = tiny(), carved(fields={"how": "cats", "sparsity": 0.2})
    chosen = sparse.record.steps[-1].chosen
    part = sparse.record.live[0]
    assert set(part["cuts"]) == {f"model.layers.{n}.mlp.act_fn" for n in range(2)}
    mlp, cut = base.model.model.layers[0].mlp, sparse.model.model.layers[0].mlp
    x = drawn(30, 32)
    a = F.silu(mlp.gate_proj(x))
    a = torch.where(a.abs() > part["cuts"]["model.layers.0.mlp.act_fn"], a, 0)
    torch.testing.assert_close(cut(x), mlp.down_proj(a * mlp.up_proj(x)), rtol=1e-5, atol=1e-5)
    # Two thirds of a gated feed-forward can be left out; attention and gates are read whole.
    attention, half = 32 * 32 * 2 + 16 * 32 * 2, 2 * 48 * 32
    assert chosen["units_off"] == pytest.approx(0.2 * (attention + 1.5 * half) / half)
    with count_inputs(sparse.model) as tallies:
        sparse.model(IDS)
    shares = {name: one.left_out for name, one in tallies.items()}
    assert 1 - measure_bytes_read(sparse, shares).share == pytest.approx(0.2, abs=0.05)
    with pytest.raises(IntaglioError, match=r"and cats leaves out less than 0\.4 of these weights") as caught:
        carved(fields={"how": "cats", "sparsity": 0.5})
    assert "\n" not in str(caught.value)


def test_what_a_token_reads() -> None:
    dense = measure_bytes_read(tiny())
    assert dense.read == dense.dense == (4.0 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32),) * 2
    checkpoint = carved(fields={"alpha": 0.5, "sparsity": 0.25})
    with count_inputs(checkpoint.model) as tallies, torch.no_grad():
        checkpoint.model(IDS)
    found = measure_bytes_read(checkpoint, {name: one.left_out for name, one in tallies.items()})
    assert found.dense == dense.dense
    assert found.share == pytest.approx(checkpoint.record.steps[-1].chosen["read"], abs=0.05)
    assert measure_bytes_read(checkpoint).share > 1  # nothing left out: weights and factors


# search


SEARCH = {"population": 4, "generations": 2, "segments": 2, "step": 0.25}


def searched(**more: Any) -> Checkpoint:
    return RSparse(search=SEARCH, sparsity=0.6).apply(tiny(layers=1), IDS, batch_size=3, seed=3, **more)


def test_a_search_follows_from_its_seed_goes_on_and_is_no_worse_than_what_it_began_with(tmp_path: Path) -> None:
    whole = searched(directory=tmp_path)
    chosen = whole.record.steps[-1].chosen
    best = chosen["loss_by_generation"]
    assert best == sorted(best, reverse=True)
    assert len(best) == 3
    assert chosen["evaluations"] == 8
    assert set(chosen["grid"]["values"].values()) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    journal = json.loads((tmp_path / "search.json").read_text())
    assert best[-1] == min(journal["losses"].values())
    # What was killed half way, and what begins anew, end in the same record.
    half = dict(list(journal["losses"].items())[:3])
    (tmp_path / "search.json").write_text(json.dumps({**journal, "losses": half}))
    calls: list[int] = []
    resumed = searched(directory=tmp_path, resume=True, progress=lambda done, total, what: calls.append(total))
    assert resumed.record.steps == searched().record.steps == whole.record.steps
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
    assert calls.count(8) == 8
    assert RSparse(search=SEARCH).long
    assert not RSparse().long


def test_a_journal_of_another_search_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(json.dumps({"key": "other", "losses": {"0 0 0 0 0 0 0": -5.0}}))
    assert searched(directory=tmp_path, resume=True).record.steps == searched().record.steps


# composition


@torch.no_grad()
def test_on_a_pruned_model_and_what_cannot_follow(tmp_path: Path) -> None:
    checkpoint = tiny()
    Wanda(sparsity=0.5).apply(checkpoint, IDS)
    zeros = {name: m.weight == 0 for name, m in checkpoint.model.named_modules() if isinstance(m, nn.Linear)}
    RSparse().apply(checkpoint, IDS)
    for name, layer in layers(checkpoint).items():
        assert torch.equal(layer.weight == 0, zeros[name])
    checkpoint.save(tmp_path / "out")
    back = load(tmp_path / "out")
    how = {"do_sample": False, "max_new_tokens": 6}
    assert torch.equal(back.model.generate(PROMPT, **how), checkpoint.model.generate(PROMPT, **how))
    assert not any(p.requires_grad for layer in layers(back).values() for p in layer.parameters())
    for steps in ([{"bitnet": {}}, {"r_sparse": {}}], [{"r_sparse": {}}, {"wanda": {"sparsity": 0.5}}]):
        with pytest.raises(IntaglioError, match=r"cannot follow .*: it needs linear_weights"):
            Recipe.from_dict({"steps": steps})
    with pytest.raises(IntaglioError, match="no projection of this model is a plain matrix"):
        RSparse().apply(back, IDS)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["decode", "last_fraction"])
def test_a_copy_and_a_reload_keep_their_phase(mode: str, tmp_path: Path) -> None:
    checkpoint = carved(fields={"mode": mode})
    expected = checkpoint.model(IDS).logits
    twin = copy.deepcopy(checkpoint.model)
    checkpoint.model.generate(PROMPT, do_sample=False, max_new_tokens=2)  # leaves a phase behind
    assert torch.equal(twin(IDS).logits, expected)
    assert torch.equal(checkpoint.model(IDS).logits, expected)
    checkpoint.save(tmp_path / "out")
    back = load(tmp_path / "out")
    assert torch.equal(back.model(IDS).logits, expected)
    assert sum(isinstance(hook, DensePrefill) for hook in anatomy(back.model).base._forward_pre_hooks.values()) == 1


def test_half_precision_and_another_one(tmp_path: Path) -> None:
    checkpoint = carved(dtype=torch.bfloat16)
    assert {p.dtype for p in checkpoint.model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert bool(checkpoint.model(IDS).logits.isfinite().all())
    carved().save(tmp_path / "out")
    for dtype in ("bfloat16", "float16", "float64"):
        assert load(tmp_path / "out", dtype=dtype).model.dtype == getattr(torch, dtype)


def test_the_report_tells_what_is_left_out() -> None:
    checkpoint = tiny()
    evaluator = Evaluator(checkpoint, intaglio.Segments.of(IDS), timed=False)
    assert evaluator.measure(checkpoint)["activation_sparsity"] is None
    RSparse().apply(checkpoint, IDS)
    assert evaluator.measure(checkpoint)["activation_sparsity"] == pytest.approx(0.5, abs=0.1)
    RSparse(mode="decode").apply(dense := tiny(), IDS)
    assert evaluator.measure(dense)["activation_sparsity"] == 0.0  # the texts are prompts, which stay dense
    assert all(module.tally is None for module in layers(checkpoint).values())
    assert input_sparsity({}) is None


def test_decompositions_are_kept_by_the_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path))
    monkeypatch.setattr(decomposition, "MIN_SIDE", 4)
    weight = drawn(6, 9)
    first = low_rank_pair(weight, 2, 4)
    (file,) = (tmp_path / decomposition.FOLDER).iterdir()
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: pytest.fail("it is kept"))
    again = low_rank_pair(weight, 3)
    assert all(torch.equal(a, b[:2]) for a, b in zip(first, again, strict=True))
    monkeypatch.undo()
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path))
    monkeypatch.setattr(decomposition, "MIN_SIDE", 4)
    file.write_bytes(b"damaged")
    assert all(torch.equal(a, b) for a, b in zip(first, low_rank_pair(weight, 2, 4), strict=True))
    monkeypatch.setenv("INTAGLIO_HOME", str(file))  # a cache that cannot be written
    assert torch.equal(low_rank_pair(weight, 2)[0], first[0])


# bad input


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({"alpha": 1.5}, "less than or equal to 1"),
        ({"how": "teal", "alpha": 0.5}, "how is 'teal', which has no alpha"),
        ({"how": "cats", "threshold": "topk"}, "how is 'cats', which has no threshold"),
        ({"allocation": "greedy"}, "allocation: greedy belongs to how: teal"),
        ({"fraction": 0.5}, "fraction belongs to mode: last_fraction"),
        ({"low_rank": False, "rank": 3}, "low_rank is false, so there is no rank"),
        ({"low_rank": False, "alpha": "error"}, "low_rank is false, so alpha is a number"),
        ({"alpha": "error", "search": {}}, "alpha: error and search are two ways to choose alpha"),
        ({"search": {"population": 1}}, "greater than or equal to 2"),
    ],
)
def test_fields_that_are_wrong(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        RSparse(**fields)


@pytest.mark.parametrize(
    ("family", "fields", "says"),
    [
        ("llama", {"rank": 40}, r"^rank is 40, above the width of layers.0.self_attn.q_proj, 32 x 32: at most 32"),
        ("llama", {"targets": ["*.nothing"]}, r"^targets: '\*.nothing' names no layer of this model"),
        ("llama", {"alpha": {"*.nothing": 0.5}}, r"^alpha: '\*.nothing' names no layer of this model"),
        ("llama", {"ignore": ["*"]}, "^targets and ignore leave no layer of this model"),
        ("phi3", {"ignore": ["layers.0.mlp.gate_up_proj[[]up]"]}, "are one module of this model; name both or neither"),
        ("bert", {"search": {}}, "^search needs the loss of the next token, which this model does not predict$"),
        ("bert", {"mode": "decode"}, "^mode is decode, and this model generates nothing after a prompt$"),
        ("gpt2", {"how": "cats", "sparsity": 0.1}, "^how is cats, which needs gate, up and down projections"),
    ],
)
def test_models_that_do_not_fit(family: str, fields: dict[str, Any], says: str) -> None:
    checkpoint = tiny(family)
    with pytest.raises(IntaglioError, match=says) as caught:
        RSparse(**fields).apply(checkpoint, IDS)
    assert "\n" not in str(caught.value)
    assert checkpoint.record.steps == []
    assert not layers(checkpoint)


def test_activations_that_are_no_numbers_are_refused() -> None:
    checkpoint = tiny()
    with torch.no_grad():
        checkpoint.model.model.embed_tokens.weight[int(IDS[0, 0])] = float("inf")
    with pytest.raises(IntaglioError, match=r"an input of layers\.0\.self_attn\.q_proj on the calibration text is NaN"):
        RSparse().apply(checkpoint, IDS)
    assert not layers(checkpoint)


def test_thresholds_of_another_model_are_refused(tmp_path: Path) -> None:
    carved().save(tmp_path / "one")
    carved(seed=1).save(tmp_path / "other")
    (tmp_path / "one" / RECORD).write_bytes((tmp_path / "other" / RECORD).read_bytes())
    with pytest.raises(IntaglioError, match="were calibrated on another model than the one beside it") as caught:
        load(tmp_path / "one")
    assert "\n" not in str(caught.value)


def test_a_record_that_names_what_is_not_there_is_refused(tmp_path: Path) -> None:
    carved().save(tmp_path / "one")
    record = json.loads((tmp_path / "one" / RECORD).read_text())
    record["live"][0]["layers"]["layers.9.nowhere"] = record["live"][0]["layers"].pop("layers.0.mlp.up_proj")
    (tmp_path / "one" / RECORD).write_text(json.dumps(record))
    with pytest.raises(IntaglioError, match=r"the model has no projection named layers\.9\.nowhere"):
        load(tmp_path / "one")


def test_in_a_recipe_with_a_merged_adapter_before_it(corpus_file: Path, tmp_path: Path) -> None:
    from intaglio.recipe.run import carve

    model = tiny_checkpoint_dir("llama", tmp_path / "model", layers=1)
    recipe = Recipe.from_dict(
        {
            "model": str(model),
            "calibration": {"texts": str(corpus_file), "samples": 4, "length": 16},
            "measure": {"texts": str(corpus_file), "samples": 2, "length": 16, "speed": False},
            "steps": [
                {"train": {"steps": 1, "batch_size": 2, "length": 16, "lora": {"r": 2}}},
                {"r_sparse": {"search": {"population": 2, "generations": 1, "segments": 1}}},
            ],
        }
    )
    document = carve(recipe, tmp_path / "out")
    assert document["kind"] == "runtime"
    assert document["after"]["activation_sparsity"] > 0.3
    assert document["steps"][1]["chosen"]["evaluations"] == 3
    names = [name for name, _ in anatomy(tiny(layers=1).model).all_linears()]
    assert list(document["steps"][1]["grid"]["values"]) == names
    assert "Share of the budget for channels" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    model, how = load(tmp_path / "out").model, {"do_sample": False, "max_new_tokens": 5}
    drafted = model.generate(PROMPT, custom_generate=Speculative(PromptLookup()), **how)
    assert torch.equal(drafted, model.generate(PROMPT, **how))
