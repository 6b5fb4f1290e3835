"""BlockFFN in a training: layers put in, trained, saved, trained on, and a model of them among other methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.checkpoint import Checkpoint, load
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.measures.activation_sparsity import activation_sparsity
from intaglio.measures.evaluate import Evaluator
from intaglio.methods.activations.blockffn import BlockFFN
from intaglio.methods.attention.layerwise_unmasking import LayerwiseUnmasking
from intaglio.methods.weights.drop_blocks import DropBlocks
from intaglio.methods.weights.lost import LOST
from intaglio.methods.weights.wanda import Wanda
from intaglio.modeling.anatomy import anatomy
from intaglio.recipe.schema import Recipe
from intaglio.speculative import Speculative
from intaglio.speculative.drafters.prompt_lookup import PromptLookup
from intaglio.trainer import CausalLM
from tests.families import tiny_model
from tests.speculative.toys import prompt
from tests.trainer.helpers import checkpoint, run, same, weights

SMALL: dict[str, Any] = {"experts": 6, "expert_width": 4}
IDS = torch.randint(8, 150, (4, 16), generator=torch.Generator().manual_seed(0))


def last(history: Any) -> dict[str, float]:
    return dict(history[-1].parts)


def test_training_then_the_same_logits_after_a_reload_and_training_on(tmp_path: Path) -> None:
    ckpt = checkpoint()
    parts = last(run(ckpt, modifiers=[BlockFFN(**SMALL)], steps=3).history)
    assert set(parts) == {
        "token sparsity", "chunk sparsity", "locality", "chunk firing", "chunk weight"
    }  # fmt: skip
    assert parts["chunk weight"] == pytest.approx(0.05)
    assert parts["chunk sparsity"] <= parts["token sparsity"]
    assert len(BlockFFN.modules_of(ckpt.model)) == 2
    assert all(layer.raw is None and not layer.watched for layer in BlockFFN.modules_of(ckpt.model).values())
    with torch.no_grad():
        expected = ckpt.model(IDS).logits
    ckpt.save(tmp_path / "out")
    back = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(back.model(IDS).logits, expected)
    assert back.kind == "runtime"
    before = weights(back)
    run(back, modifiers=[BlockFFN()], steps=2, precision="bfloat16")  # sizes as they are there
    assert not same(before, weights(back))
    assert before.keys() == weights(back).keys()
    with pytest.raises(IntaglioError, match="experts is 5, and the layers of the model were made with experts: 6"):
        run(back, modifiers=[BlockFFN(experts=5)], steps=2)
    assert back.record.live == ckpt.record.live


def test_the_first_step_is_the_objectives_loss_and_what_is_added() -> None:
    base, more = (
        run(checkpoint(layers=1), modifiers=[BlockFFN(**SMALL, **fields)], steps=1)
        for fields in ({"locality": 0.0, "chunk_weight": 0.0}, {"locality": 0.5, "chunk_weight": 0.25})
    )
    parts = last(more.history)
    added = 0.5 * parts["locality"] + 0.25 * parts["chunk firing"]
    assert more.history[-1].loss == pytest.approx(base.history[-1].loss + added, abs=1e-5)
    assert "locality" not in last(base.history)


def test_gradient_accumulation_and_checkpointing_change_nothing() -> None:
    data = Segments(torch.randint(8, 150, (8, 24), generator=torch.Generator().manual_seed(0)))

    def after(**more: Any) -> Any:
        ckpt = checkpoint(layers=1)
        run(ckpt, data, modifiers=[BlockFFN(**SMALL, locality=0.1, chunk_weight=0.5)], steps=2, **more)
        return weights(ckpt)

    whole = after(batch_size=4)
    for other in (after(batch_size=2, accumulate=2), after(batch_size=4, gradient_checkpointing=True)):
        for name, value in whole.items():
            torch.testing.assert_close(other[name], value, atol=2e-5, rtol=1e-3)


def test_a_larger_weight_makes_chunks_sparser_and_the_routers_may_have_a_rate_of_their_own() -> None:
    data = Segments(IDS)

    def after(weight: float) -> Checkpoint:
        ckpt = checkpoint(layers=1)
        method = BlockFFN(**SMALL, adapt=False, locality=0.0, chunk=4, chunk_weight=weight, router_rate=0.02)
        run(ckpt, data, modifiers=[method], steps=40, learning_rate=1e-3, objective=CausalLM(length=16))
        return ckpt

    loose, tight = after(0.0), after(20.0)
    was, now = activation_sparsity(loose, data, 4), activation_sparsity(tight, data, 4)
    assert was is not None
    assert now is not None
    assert now.chunk_sparsity > was.chunk_sparsity + 0.1
    assert set(now.layers) == {"model.layers.0.mlp"}
    with torch.no_grad():  # what was measured is what is computed
        layer = tight.model.model.layers[0].mlp
        x = torch.randn(3, 5, layer.width)
        assert torch.equal(layer.active_units(x), layer.active_units(2 * x))


@pytest.mark.parametrize("fields", [{"router": "topk", "k": 2}, {"router": "remoe", "k": 2}, {"router": "none"}])
def test_the_other_routers_train(fields: dict[str, Any]) -> None:
    ckpt = checkpoint(layers=1)
    parts = last(run(ckpt, modifiers=[BlockFFN(**SMALL, **fields)], steps=3).history)
    if fields["router"] == "topk":
        assert parts["token sparsity"] == pytest.approx(1 - 2 / 6)
        assert 0.9 < parts["balance"] < 6
    if fields["router"] == "remoe":
        assert parts["penalty weight"] != 1e-8
    found = activation_sparsity(ckpt, Segments(IDS))
    assert found is not None
    assert (found.token_sparsity == 0) == (fields["router"] == "none")


def test_sizes_by_default_are_those_of_the_mlp() -> None:
    parts = anatomy(tiny_model("llama", layers=1, intermediate_size=80))
    config = BlockFFN(experts=6).layer_config(parts)
    assert (config.experts, config.expert_width) == (6, round(3 * 80 / 2 / 6)) == (6, 20)
    assert BlockFFN(experts=6, width=18).layer_config(parts).expert_width == 3
    assert BlockFFN().layer_config(parts).experts == 48
    # The paper's: 1.5 times an inner width of 8/3 d, which is 4 d.
    assert (BlockFFN.paper().experts, BlockFFN.paper().expert_width, BlockFFN.paper().chunk) == (48, 64, 64)


def test_the_same_seed_draws_the_same_and_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    a, b, other = (tiny_model("llama", layers=2) for _ in range(3))
    for model, seed in ((a, 0), (b, 0), (other, 1)):
        BlockFFN(**SMALL).replace(model, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    first, again, another = (BlockFFN.modules_of(model)["model.layers.0.mlp"] for model in (a, b, other))
    assert torch.equal(first.up, again.up)
    assert not torch.equal(first.up, another.up)
    assert not torch.equal(first.up, BlockFFN.modules_of(a)["model.layers.1.mlp"].up)
    assert 0.01 < float(first.up.detach().std()) < 0.03
    # A router's output has the paper's scale at every width: std 0.1 at 256, so 1.6 over the root of the width.
    ckpt = checkpoint(layers=1)
    run(ckpt, modifiers=[BlockFFN(experts=40)], steps=1, learning_rate=1e-6)
    router = BlockFFN.modules_of(ckpt.model)["model.layers.0.mlp"].router
    assert router is not None
    assert float(router.detach().std()) == pytest.approx(1.6 / 32**0.5, rel=0.1)


def test_what_does_not_fit_is_one_sentence() -> None:
    def refused(match: str, ckpt: Checkpoint, **more: Any) -> None:
        with pytest.raises(IntaglioError, match=match) as caught:
            run(ckpt, modifiers=[BlockFFN(**SMALL, **more.pop("fields", {}))], steps=1, **more)
        assert "\n" not in str(caught.value)

    refused(
        "chunk is 64 tokens, longer than the rows of 24; set a shorter one", checkpoint(layers=1), fields={"chunk": 64}
    )
    refused("leave lora and freeze out", checkpoint(layers=1), freeze=True)
    replaced = checkpoint(layers=1)
    LOST().apply(replaced)
    refused("not the model's own: lost replaced", replaced)
    with pytest.raises(IntaglioError, match="the model has 0 layers of blockffn, and its record names 1"):
        BlockFFN.restore_runtime({}, checkpoint(layers=1))


def test_what_can_follow_is_known_before_a_model_loads() -> None:
    train: dict[str, Any] = {"train": {"steps": 1, "modifiers": [{"blockffn": {}}]}}
    prune, lost = {"wanda": {"sparsity": 0.5}}, {"lost": {}}
    Recipe.from_dict({"steps": [train, train]})
    Recipe.from_dict({"steps": [prune, train, prune]})
    for steps, sentence in (
        ([{"blockffn": {}}], "'blockffn' is a method, but not a step of a recipe"),
        ([lost, train], "train cannot follow lost: it needs linear_weights"),
        ([{"train": {**train["train"], "lora": {"r": 2}}}], "blockffn trains the weights themselves, and lora"),
        ([{"train": {**train["train"], "freeze": True}}], "blockffn trains the weights themselves, and freeze"),
        ([{"train": {**train["train"], "trainable_blocks": 1}}], "blockffn trains the weights themselves, and train"),
        ([{"train": {"steps": 1, "modifiers": [{"blockffn": {"experts": 5, "width": 7}}]}}], "5 experts do not divide"),
    ):
        with pytest.raises(IntaglioError, match=sentence) as caught:
            Recipe.from_dict({"steps": steps})
        assert "\n" not in str(caught.value)


def test_a_model_of_experts_is_a_model_like_any_other(tmp_path: Path) -> None:
    ckpt = checkpoint()
    run(ckpt, modifiers=[BlockFFN(**SMALL)], steps=2)
    experts = {name: value for name, value in weights(ckpt).items() if ".mlp." in name}
    Wanda(sparsity=0.5).apply(ckpt, IDS)
    linears = anatomy(ckpt.model).all_linears()
    assert all(float((linear.read() == 0).float().mean()) == 0.5 for _, linear in linears)
    assert {linear.part for _, linear in linears} == {"attention"}
    assert same(experts, {name: value for name, value in weights(ckpt).items() if ".mlp." in name})
    side = Evaluator(ckpt, Segments(IDS), timed=False).measure(ckpt)
    assert 0 <= side["chunk_sparsity"] < side["token_sparsity"] < 1
    with pytest.raises(IntaglioError, match="cannot follow blockffn"):
        DropBlocks(layers=[0]).apply(ckpt)
    ids, options = prompt(12), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = ckpt.model.generate(ids, **options)
    drafted = ckpt.model.generate(ids, custom_generate=Speculative(PromptLookup()), **options)
    assert torch.equal(drafted, expected)
    LayerwiseUnmasking(configuration="01").apply(ckpt)
    with torch.no_grad():
        logits = ckpt.model(IDS).logits
    ckpt.save(tmp_path / "out")
    for dtype in ("float32", "bfloat16"):
        back = load(tmp_path / "out", dtype=dtype)
        tolerance = 0.0 if dtype == "float32" else 0.5
        torch.testing.assert_close(
            back.model(IDS).logits.float(), logits, atol=tolerance, rtol=0.1 if tolerance else 0.0
        )


def test_encoders_have_a_place_for_it_too() -> None:
    model = tiny_model("bert", layers=2)
    BlockFFN(**SMALL, init_std=0.2).replace(model)
    assert list(BlockFFN.modules_of(model)) == [f"bert.encoder.layer.{n}.output.dense" for n in (0, 1)]
    model(IDS).logits.sum().backward()
    assert all(layer.up.grad is not None for layer in BlockFFN.modules_of(model).values())
    with torch.device("meta"):
        empty = tiny_model("bert", layers=2)
    BlockFFN.build_empty({"slug": "blockffn", "experts": 6, "expert_width": 4}, empty)
    assert len(BlockFFN.modules_of(empty)) == 2


def test_rows_that_the_objective_does_not_pass_on_are_refused() -> None:
    class Halves(CausalLM):
        def loss(self, model: Any, batch: Any) -> Any:
            return super().loss(
                model, {**batch, "input_ids": batch["input_ids"][:, :8], "target": batch["target"][:, :8]}
            )

    with pytest.raises(IntaglioError, match="passes the batch's own rows"):
        run(checkpoint(layers=1), IDS, objective=Halves(length=16), modifiers=[BlockFFN(**SMALL)], steps=1)
