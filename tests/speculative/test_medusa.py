"""Medusa heads: what the baseline of trained heads promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import final_hidden
from intaglio.speculative import Speculative
from intaglio.speculative.drafters.medusa import Medusa, MedusaHeads
from intaglio.speculative.heads.lm_head import TargetHead
from intaglio.speculative.heads.objective import head_batch, measure_acceptance, train_heads
from intaglio.speculative.static_tree import StaticTree
from tests.families import DECODERS, tiny_model, tiny_tokenizer
from tests.speculative.distributions import check_law
from tests.speculative.toys import ragged, target

IDS = [9, 30, 31, 32, 9, 30, 31, 32, 9, 30, 12, 40]


def test_an_untrained_head_says_what_the_model_says() -> None:
    model = target("llama")
    heads = MedusaHeads(model, heads=2, layers=2, rank=3).double()
    hidden = final_hidden(anatomy(model), {"input_ids": torch.tensor([IDS])})
    states = torch.stack(heads.states(hidden), 2)[0]
    found = heads.score(states, TargetHead(anatomy(model), heads.words))
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(found[:, 0], expected)
    torch.testing.assert_close(found[:, 1], expected)


def test_the_loss_weighs_later_heads_less() -> None:
    model = target("llama")
    heads = MedusaHeads(model, heads=2, decay=0.5).double()
    found = heads.loss(model, head_batch([{"input_ids": torch.tensor(IDS)}]))
    with torch.no_grad():
        q = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    each = [-sum(q[n, IDS[n + k]] for n in range(len(IDS) - k)) / (len(IDS) - k) for k in (2, 3)]
    assert found.total.item() == pytest.approx(float(each[0] + 0.5 * each[1]), abs=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_output_is_stock_before_and_after_a_short_training(family: str) -> None:
    model = tiny_model(family, layers=2)
    checkpoint = Checkpoint(model, tiny_tokenizer(family), "tiny")
    heads = MedusaHeads(model, heads=3, rank=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    how: dict[str, Any] = {"steps": 2, "batch_size": 2, "learning_rate": 1e-2}
    done, noted = train_heads(checkpoint, heads, [{"input_ids": IDS}] * 4, settings={}, **how)
    assert done.steps == 2
    assert noted["steps"] == 2
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert checkpoint.record.steps == []
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert float(heads.weights_KLDD.detach().abs().max()) > 0
    inputs = ragged([6, 9, 4])
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=10)
    loop = Speculative(Medusa(heads, StaticTree.from_paths("0 1 00 000")))
    found = model.double().generate(**inputs, do_sample=False, max_new_tokens=10, custom_generate=loop)
    assert torch.equal(found, model.generate(**inputs, do_sample=False, max_new_tokens=10))
    assert expected.shape[0] == 3


def test_chances_are_measured() -> None:
    checkpoint = Checkpoint(tiny_model("llama", layers=1), tiny_tokenizer("llama"), "tiny")
    heads = MedusaHeads(checkpoint.model, heads=2)
    chances = measure_acceptance(checkpoint, heads, [{"input_ids": IDS}, {"input_ids": IDS[::-1]}], 12, ranks=4)
    assert len(chances) == 2
    assert all(len(level) == 4 and 0 <= min(level) <= max(level) <= 1 for level in chances)
    assert heads.ranks == 1


def test_sampling_keeps_the_law() -> None:
    check_law(lambda model: Speculative(Medusa(MedusaHeads(model, heads=2), StaticTree.from_paths("0 1 2 00 01 10"))))


def test_heads_of_another_width_are_refused() -> None:
    heads = MedusaHeads(tiny_model("llama", layers=1))
    wide = tiny_model("llama", layers=1, hidden_size=64)
    with pytest.raises(IntaglioError, match="for a model of width 32; the target's is 64, so they belong to another"):
        wide.generate(torch.tensor([IDS]), max_new_tokens=2, custom_generate=Speculative(Medusa(heads)))
    with pytest.raises(IntaglioError, match="heads is 0"):
        MedusaHeads(wide, heads=0)
