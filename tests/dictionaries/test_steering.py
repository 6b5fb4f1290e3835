"""Steering: what it adds, alone and together, after a save and a load, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.checkpoint import Checkpoint, load
from intaglio.dictionaries.baselines import TopKSAE
from intaglio.dictionaries.dictionary import SparseDictionary
from intaglio.dictionaries.sources import find_dictionary
from intaglio.dictionaries.steering import Steer
from intaglio.errors import IntaglioError
from intaglio.methods.activations.gba_sae import GBASAE
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.sites import Site, read_sites
from intaglio.recipe.run import carve
from intaglio.recipe.schema import Recipe
from tests.conftest import TinyDir
from tests.families import DECODERS, tiny_model, tiny_tokenizer

IDS = torch.randint(8, 150, (11, 9), generator=torch.Generator().manual_seed(0))


def fitted(family: str = "llama", site: str = "residual") -> tuple[Checkpoint, SparseDictionary]:
    ckpt = Checkpoint(tiny_model(family, layers=2), tiny_tokenizer(family), "tiny")
    method = GBASAE(layer=0, site=site, width=24, tokens=200, batch_tokens=16, groups=3, adapt_every=2)
    method.fit(ckpt, IDS)
    return ckpt, method.dictionary()


def activations(ckpt: Checkpoint, site: Site) -> torch.Tensor:
    return read_sites(anatomy(ckpt.model), (site,), {"input_ids": IDS})[site]


def feature_of(dictionary: SparseDictionary) -> int:
    highest = dictionary.about["max_activation"]
    return highest.index(max(highest))


@pytest.mark.parametrize("site", ["residual", "mlp", "z"])
def test_a_step_adds_the_scaled_direction_at_every_token(site: str) -> None:
    ckpt, dictionary = fitted(site=site)
    feature = feature_of(dictionary)
    before = activations(ckpt, Site(0, site))
    Steer(feature=feature, scale=-2.0).apply(ckpt)
    push = -2.0 * dictionary.about["max_activation"][feature] * dictionary.decoder_MD[feature]
    torch.testing.assert_close(activations(ckpt, Site(0, site)) - before, push.expand_as(before), atol=1e-4, rtol=1e-4)


def test_the_default_scale_is_one() -> None:
    ckpt, dictionary = fitted()
    feature = feature_of(dictionary)
    before = activations(ckpt, Site(0))
    Steer(feature=feature).apply(ckpt)
    push = dictionary.about["max_activation"][feature] * dictionary.decoder_MD[feature]
    torch.testing.assert_close(activations(ckpt, Site(0)) - before, push.expand_as(before), atol=1e-4, rtol=1e-4)


def test_clamping_replaces_the_code() -> None:
    ckpt, dictionary = fitted()
    feature = feature_of(dictionary)
    before = activations(ckpt, Site(0))
    code = dictionary.encode(before)[..., feature, None]
    assert bool((code > 0).any())
    Steer(feature=feature, scale=0, mode="clamp").apply(ckpt)
    expected = before - code * dictionary.decoder_MD[feature]
    torch.testing.assert_close(activations(ckpt, Site(0)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_steps_add_up_and_come_back_after_a_load(family: str, tmp_path: Path) -> None:
    ckpt, dictionary = fitted(family)
    feature = feature_of(dictionary)
    plain = ckpt.model(IDS).logits
    for step in (Steer(feature=feature, scale=1.5), Steer(feature=feature, scale=0.5, mode="clamp")):
        step.apply(ckpt)
    with torch.no_grad():
        steered = ckpt.model(IDS).logits
    assert not torch.equal(steered, plain)
    assert ckpt.kind == "runtime"
    ckpt.save(tmp_path / "out")
    back = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(back.model(IDS).logits, steered)
    assert back.fitted("gba_sae").dictionary().width == 24
    Steer(feature=feature).apply(back)
    assert back.record.live == [{"slug": "steer", "count": 3}]


def test_it_follows_a_fit_in_a_recipe_and_other_steps_do_not() -> None:
    fit = {"fit": {"gba_sae": {"layer": 0}}}
    recipe = Recipe.from_dict({"steps": [fit, {"steer": {"feature": 3, "scale": 2.0}}]})
    assert recipe.steps[1] == Steer(feature=3, scale=2.0)
    assert Recipe.from_dict(recipe.dump()) == recipe
    with pytest.raises(IntaglioError, match="magnitude cannot follow the fit of gba_sae"):
        Recipe.from_dict({"steps": [fit, {"magnitude": {"sparsity": 0.5}}]})
    assert Steer.keeps_fits
    assert not GBASAE.keeps_fits


def test_a_dictionary_by_name_and_from_a_directory(tmp_path: Path) -> None:
    ckpt, dictionary = fitted()
    dictionary.save(tmp_path / "sae")
    name, other = find_dictionary(ckpt, str(tmp_path / "sae"))
    assert name == str(tmp_path / "sae")
    assert torch.equal(other.decoder_MD, dictionary.decoder_MD)
    assert find_dictionary(ckpt)[0] == find_dictionary(ckpt, "gba_sae.layers.0")[0] == "gba_sae.layers.0"
    plain = SparseDictionary(dictionary.architecture, dictionary.tensors, site=dictionary.site)
    plain.save(tmp_path / "plain")  # without measurements the strength is 1
    before = activations(ckpt, Site(0))
    Steer(feature=1, scale=3.0, dictionary=str(tmp_path / "plain")).apply(ckpt)
    push = (3.0 * dictionary.decoder_MD[1]).expand_as(before)
    torch.testing.assert_close(activations(ckpt, Site(0)) - before, push, atol=1e-4, rtol=1e-4)


def test_the_first_dictionary_is_that_of_the_first_fit_after_a_load_too(tmp_path: Path) -> None:
    ckpt = Checkpoint(tiny_model("llama", layers=2), tiny_tokenizer("llama"), "tiny")
    for method in (TopKSAE(layer=0, width=24, k=3, tokens=50), GBASAE(layer=0, width=24, tokens=50)):
        method.fit(ckpt, IDS)
    ckpt.save(tmp_path / "out")
    for one in (ckpt, load(tmp_path / "out")):
        assert find_dictionary(one)[0] == "topk_sae.layers.0"


def test_two_fits_of_a_name_are_told_apart_by_their_step() -> None:
    ckpt = Checkpoint(tiny_model("llama", layers=2), tiny_tokenizer("llama"), "tiny")
    TopKSAE(layer=0, width=24, k=3, tokens=50).fit(ckpt, IDS)
    GBASAE(layer=0, width=24, tokens=50, beside=[{"topk_sae": {"width": 16, "k": 2}}]).fit(ckpt, IDS)
    with pytest.raises(IntaglioError, match=r"name topk_sae/topk_sae\.layers\.0 and gba_sae/topk_sae\.layers\.0"):
        find_dictionary(ckpt, "topk_sae.layers.0")
    assert find_dictionary(ckpt, "topk_sae/topk_sae.layers.0")[1].width == 24
    assert find_dictionary(ckpt, "gba_sae/topk_sae.layers.0")[1].width == 16
    assert find_dictionary(ckpt)[0] == "topk_sae/topk_sae.layers.0"
    assert find_dictionary(ckpt, "gba_sae.layers.0")[0] == "gba_sae.layers.0"


def refused(ckpt: Checkpoint, says: str, **fields: Any) -> None:
    before = ckpt.model(IDS).logits
    steps = len(ckpt.record.steps)
    with pytest.raises(IntaglioError, match=says) as caught:
        Steer(**fields).apply(ckpt)
    assert "\n" not in str(caught.value)
    assert len(ckpt.record.steps) == steps
    assert torch.equal(ckpt.model(IDS).logits, before)


def test_what_it_cannot_do_is_one_sentence(tmp_path: Path) -> None:
    ckpt, dictionary = fitted()
    bare = Checkpoint(tiny_model("llama", layers=2), tiny_tokenizer("llama"), "tiny")
    refused(bare, "no dictionary is attached to tiny; a step such as fit", feature=0)
    refused(bare, "no dictionary is attached to tiny; and x is no directory with cfg.json", feature=0, dictionary="x")
    refused(ckpt, "feature is 24; gba_sae.layers.0 has the features 0 to 23", feature=24)
    refused(ckpt, "has no dictionary 'other'", feature=0, dictionary="other")
    dictionary.about["max_activation"][5] = 0.0
    dictionary.save(tmp_path / "dead")
    refused(ckpt, "feature 5 of .* fired for no held-out token", feature=5, dictionary=str(tmp_path / "dead"))
    SparseDictionary(dictionary.architecture, dictionary.tensors).save(tmp_path / "nowhere")
    refused(ckpt, "does not name the activation", feature=0, dictionary=str(tmp_path / "nowhere"))
    SparseDictionary(dictionary.architecture, dictionary.tensors, site=Site(0, "q", 1)).save(tmp_path / "narrow")
    refused(ckpt, "reads 32 features; layers.0.q.1 of tiny has 8", feature=0, dictionary=str(tmp_path / "narrow"))
    with torch.no_grad():
        next(ckpt.model.parameters()).add_(1)
    refused(ckpt, "was trained on tiny, whose weights are not those of tiny", feature=0)


def test_a_steered_checkpoint_without_its_attachment_is_refused(tmp_path: Path) -> None:
    ckpt, _ = fitted()
    Steer(feature=feature_of(_)).apply(ckpt)
    ckpt.save(tmp_path / "out")
    (tmp_path / "out" / "attachments" / "steer.safetensors").unlink()
    with pytest.raises(IntaglioError, match=r"is steered, and its attachments/steer.safetensors is missing"):
        load(tmp_path / "out")


def test_a_recipe_fits_steers_and_writes_a_runtime_checkpoint(tiny_dir: TinyDir, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(f"the quick brown fox number {i} jumps over the lazy dog {i}" for i in range(400)))
    data = {"texts": str(texts), "samples": 4, "length": 16}
    fit = {"topk_sae": {"layer": 1, "width": 4, "k": 3, "tokens": 200, "length": 16, "batch_tokens": 20}}
    recipe = {"model": str(tiny_dir("llama")), "calibration": data, "measure": {**data, "speed": False}}

    def steer(out: Path, **fields: Any) -> None:
        carve(Recipe.from_dict({**recipe, "steps": [{"fit": fit}, {"steer": fields}]}), out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TopKSAE, "fit", lambda *args, **fields: pytest.fail("fitted before the check"))
        with pytest.raises(IntaglioError, match=r"feature is 4; topk_sae.layers.1 has the features 0 to 3"):
            steer(tmp_path / "out", feature=4)
        with pytest.raises(IntaglioError, match=r"has no dictionary 'gba_sae.layers.1'"):
            steer(tmp_path / "out", feature=0, dictionary="gba_sae.layers.1")
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]
    steer(tmp_path / "out", feature=2)
    back = load(tmp_path / "out")
    assert [(step.slug, step.verb) for step in back.record.steps] == [("topk_sae", "fit"), ("steer", "carve")]
    assert back.kind == "runtime"
    strength = back.record.steps[1].chosen["strength"]
    row_D = back.fitted("topk_sae").dictionary().decoder_MD[2]
    steered, plain = (activations(one, Site(1)) for one in (back, load(tiny_dir("llama"))))
    torch.testing.assert_close(steered - plain, (strength * row_D).expand_as(plain), atol=1e-4, rtol=1e-4)
