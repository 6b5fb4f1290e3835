"""Mixing: rows, shares and boxes, at the inputs, at embeddings and at hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from intaglio.errors import IntaglioError
from intaglio.trainer.classification import classifier_outputs
from intaglio.trainer.mixing import (
    Mix,
    Mixing,
    cut_boxes,
    draw_rows,
    draw_shares,
    mixed_forward,
    mixed_inputs,
    mixed_targets,
    mixing_layers,
    soft_cross_entropy,
)
from intaglio.trainer.rng import generator
from tests.families import tiny_model

PIXELS = torch.rand(5, 3, 8, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 1, 0])


def mix(folds: int = 2, count: int = 5, alpha: float = 1.0, **more: Any) -> Mix:
    rng = generator(0, "mix")
    return Mix(draw_rows(count, folds, rng), draw_shares(count, folds, alpha, rng, **more))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 4), nn.ReLU(), nn.Linear(4, 3))


@pytest.mark.parametrize("folds", [2, 3, 4])
def test_each_row_is_the_weighted_sum_of_its_examples(folds: int) -> None:
    made = mix(folds, per_example=True)
    for row, (rows, shares) in enumerate(zip(made.rows_BK.tolist(), made.shares_BK.tolist(), strict=True)):
        assert rows[0] == row
        wanted = sum(share * PIXELS[other] for share, other in zip(shares, rows, strict=True))
        torch.testing.assert_close(made.combine(PIXELS)[row], wanted)


def test_targets_have_the_shares_of_their_classes() -> None:
    made = Mix(torch.tensor([[0, 1], [1, 3]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    wanted = torch.tensor([[0.75, 0.25, 0.0], [0.0, 1.0, 0.0]])
    assert torch.equal(mixed_targets(made, LABELS, 3), wanted)
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(soft_cross_entropy(logits, wanted), -(wanted * logits.log_softmax(1)).sum(1))


@given(st.integers(1, 9), st.integers(2, 4), st.floats(0.05, 20), st.booleans(), st.booleans())
def test_shares_are_a_distribution(count: int, folds: int, alpha: float, each: bool, sort: bool) -> None:
    shares = draw_shares(count, folds, alpha, generator(count), per_example=each, largest_first=sort)
    assert shares.shape == (count, folds)
    assert bool((shares >= 0).all())
    torch.testing.assert_close(shares.sum(1), torch.ones(count))
    assert not sort or bool((shares[:, :1] >= shares).all())
    assert each or bool((shares == shares[0]).all())


def test_alpha_concentrates_the_shares() -> None:
    spread = [draw_shares(4000, 2, alpha, generator(0), per_example=True).std() for alpha in (0.2, 1.0, 50.0)]
    assert spread[0] > 0.35 > spread[1] > 0.25 > 0.1 > spread[2]  # sd of Beta: 0.42, 0.29, 0.05


def test_rows_of_a_batch_share_a_draw_unless_each_has_its_own() -> None:
    assert len(set(mix().shares_BK[:, 0].tolist())) == 1
    assert len(set(mix(per_example=True).shares_BK[:, 0].tolist())) == 5


def test_partners_are_permutations() -> None:
    rows = draw_rows(6, 3, generator(3))
    assert [sorted(column.tolist()) for column in rows.T] == [list(range(6))] * 3
    assert rows[:, 0].tolist() == list(range(6))
    assert not torch.equal(rows[:, 1], rows[:, 2])


@given(st.floats(0, 1), st.integers(0, 10**6))
def test_a_box_has_the_share_of_its_area_and_the_partners_pixels(share: float, seed: int) -> None:
    shares = torch.tensor([share, 1 - share]).expand(5, 2)
    made = cut_boxes(draw_rows(5, 2, generator(seed)), shares, (8, 6), generator(seed, "box"))
    assert made.pasted_BHW is not None
    area = made.pasted_BHW[0].sum() / 48
    torch.testing.assert_close(made.shares_BK, torch.stack([1 - area, area]).expand(5, 2))
    # A box of the whole image, sqrt(1 - lam) of each side, before it is cut at the border.
    assert made.pasted_BHW[0].sum() <= (1 - share) * 48 + 1e-4
    inside, changed = made.pasted_BHW[:, None], made.combine(PIXELS)
    assert torch.equal(changed, torch.where(inside, PIXELS[made.rows_BK[:, 1]], PIXELS))


def test_a_box_lies_around_a_uniform_centre() -> None:
    """The authors' box: half of int(side sqrt(1 - lam)) to both sides of a pixel, cut at the border."""
    made = cut_boxes(draw_rows(300, 2, generator(0)), draw_shares(300, 2, 1.0, generator(1), per_example=True), (8, 6),
                     generator(2))  # fmt: skip
    assert made.pasted_BHW is not None
    columns = made.pasted_BHW.any(1).float().mean(0)
    assert bool((columns > 0.2).all())
    full = cut_boxes(draw_rows(2, 2, generator(0)), torch.tensor([[0.0, 1.0]] * 2), (8, 8), generator(5))
    assert full.pasted_BHW is not None
    sides = sorted(int(full.pasted_BHW[0].any(axis).sum()) for axis in (0, 1))
    assert 4 <= sides[0] <= sides[1] <= 8


def test_each_row_with_its_own_share_has_its_own_box() -> None:
    made = cut_boxes(draw_rows(9, 2, generator(0)), draw_shares(9, 2, 1.0, generator(1), per_example=True), (32, 32),
                     generator(2))  # fmt: skip
    assert len({tuple(row.tolist()) for row in made.shares_BK}) > 4


def test_the_rate_of_mixed_batches() -> None:
    counts = {rate: sum(Mixing(mixing_rate=rate).draw(4, generator(n)) is not None for n in range(400))
              for rate in (0.0, 0.25, 1.0)}  # fmt: skip
    assert counts[0.0] == 0
    assert counts[1.0] == 400
    assert 60 < counts[0.25] < 140


def test_fields_decide_the_draw() -> None:
    draws = {
        name: Mixing(**fields).draw(5, generator(7), (8, 6))
        for name, fields in {
            "plain": {}, "alpha": {"alpha": 9.0}, "folds": {"folds": 3}, "each": {"per_example": True},
            "cutmix": {"mix": "cutmix"},
        }.items()
    }  # fmt: skip
    plain = draws.pop("plain")
    assert plain is not None
    for other in draws.values():
        assert other is not None
        assert other.shares_BK.tolist() != plain.shares_BK.tolist()


def test_layers_are_drawn_for_hidden_states_alone() -> None:
    drawn = {Mixing(mix="manifold").draw_layer(generator(n)) for n in range(50)}
    assert drawn == {0, 1, 2}
    assert {Mixing(mix="manifold", layers=[1, 4]).draw_layer(generator(n)) for n in range(50)} == {1, 4}
    assert {Mixing(layers=[1, 4]).draw_layer(generator(n)) for n in range(9)} == {0}


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_hidden_states_are_mixed_at_the_layer(layer: int) -> None:
    net, made = network(), mix()
    inputs = {"pixel_values": PIXELS}
    with mixed_forward(net, inputs, made, layer):
        mixed = net(mixed_inputs(inputs, made, layer)["pixel_values"])
    hidden = net[layer:](made.average(net[:layer](PIXELS)))
    torch.testing.assert_close(mixed, hidden)
    assert torch.equal(net(PIXELS), network()(PIXELS))  # no hook is left


def test_texts_are_mixed_at_their_embeddings_and_see_both() -> None:
    model: Any = tiny_model("bert", layers=1).eval()
    ids = torch.randint(8, 150, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    made = Mix(torch.tensor([[0, 1], [1, 0], [2, 2]]), torch.tensor([[0.6, 0.4], [1.0, 0.0], [0.5, 0.5]]))
    seen = mixed_inputs({"input_ids": ids, "attention_mask": mask}, made)["attention_mask"]
    assert seen.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    embedded = made.average(model.get_input_embeddings()(ids) * mask[..., None])
    with mixed_forward(model, {"input_ids": ids, "attention_mask": mask}, made):
        mixed = model(input_ids=ids, attention_mask=seen).logits
    torch.testing.assert_close(mixed, model(inputs_embeds=embedded, attention_mask=seen).logits)


@pytest.mark.parametrize("pad", [0, 7])
def test_decoders_read_a_mixed_text_at_its_last_token(pad: int) -> None:
    ids = torch.randint(8, 150, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    made = Mix(torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.6, 0.4], [1.0, 0.0]]))
    body: Any = tiny_model("llama", layers=1)
    config = type(body.config)(**{**body.config.to_dict(), "pad_token_id": pad, "num_labels": 3})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    with mixed_forward(model, inputs, made):
        logits, features = classifier_outputs(model, mixed_inputs(inputs, made))
    embedded = made.average(model.get_input_embeddings()(ids) * mask[..., None])
    hidden = model.model(inputs_embeds=embedded, attention_mask=made.visible(mask)).last_hidden_state[:, 4]
    assert features is not None
    torch.testing.assert_close(features, hidden)
    torch.testing.assert_close(logits, model.score(hidden))


def test_padding_takes_the_tokens_of_the_first_partner_that_has_one() -> None:
    ids = torch.tensor([[1, 2, 0, 0], [3, 4, 5, 0], [6, 7, 8, 9]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    rows = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2]])
    shares = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.2, 0.3], [0.5, 0.5, 0.0]])
    filled = Mix(rows, shares).tokens(ids, mask)
    assert filled.tolist() == [[1, 2, 5, 9], [1, 2, 8, 9], [3, 4, 5, 0]]


def test_rows_that_stay_are_equal_bit_for_bit() -> None:
    assert torch.equal(Mix.unmixed(5).average(PIXELS), PIXELS)
    padded = Mix(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]])).padded(5)
    assert torch.equal(padded.average(PIXELS)[1:], PIXELS[1:])
    torch.testing.assert_close(padded.average(PIXELS)[0], (PIXELS[0] + PIXELS[1]) / 2)


def test_shares_carry_a_gradient() -> None:
    shares = torch.tensor([[0.3, 0.7]], requires_grad=True)
    Mix(torch.tensor([[0, 1]]), shares).average(PIXELS).sum().backward()
    grad: Any = shares.grad
    torch.testing.assert_close(grad, torch.stack([PIXELS[0].sum(), PIXELS[1].sum()])[None])


def average_of_texts(fields: dict[str, Any]) -> Tensor:
    made = Mixing(**fields).draw(2, generator(0))
    assert made is not None
    return made.average(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"mixing_rate": 1.5}, "less than or equal to 1"),
        ({"alpha": 0.0}, "greater than 0"),
        ({"folds": 1}, "greater than or equal to 2"),
        ({"mix": "cutmix", "folds": 3}, "pastes one image into another; folds is 3"),
        ({"layers": []}, "at least 1 item"),
        ({"mix": "cutmix"}, "needs images; texts take mixup or manifold"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        average_of_texts(fields)


def at_layer(model: nn.Module, layer: int) -> None:
    with mixed_forward(model, {}, mix(), layer):
        pass


def test_a_missing_layer_is_named() -> None:
    with pytest.raises(IntaglioError, match="layers names 9; this model has blocks 1 to 3, and 0 for its inputs"):
        at_layer(network(), 9)


def test_layers_that_are_recomputed_are_refused() -> None:
    model: Any = tiny_model("bert", layers=2)
    assert len(mixing_layers(model)) == 2
    model.gradient_checkpointing_enable()
    with pytest.raises(IntaglioError, match=r"gradient checkpointing runs blocks again"):
        at_layer(model, 1)
