"""Sites of every family are read and replaced where they say."""

from __future__ import annotations

import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.sites import Site, check_site, hooked, read_sites, site_width
from tests.families import FAMILIES, tiny_model

IDS = torch.randint(8, 150, (2, 7), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS}
PARTS = ("residual", "attention", "mlp", "q", "k", "v", "z")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_site_of_every_family(family: str) -> None:
    """A site replaced by itself changes no bit; zeros there change the logits."""
    model = tiny_model(family, layers=2)
    parts = anatomy(model)
    expected = model(IDS).logits
    sites = tuple(Site(1, part) for part in PARTS)
    activations = read_sites(parts, sites, BATCH)
    for site in sites:
        x_BLD = activations[site]
        assert x_BLD.shape == (2, 7, site_width(parts, site))
        with hooked(parts, {site: lambda x_BLD: x_BLD.clone()}):
            assert torch.equal(model(IDS).logits, expected)
        with hooked(parts, {site: torch.zeros_like}):
            assert not torch.equal(model(IDS).logits, expected)
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gpt2", "bert"])
@torch.no_grad()
def test_the_projections_are_those_of_the_anatomy(family: str) -> None:
    """q, k and v equal x Wᵀ + b with the matrices of the anatomy, fused or not."""
    model = tiny_model(family, layers=1)
    parts = anatomy(model)
    by_role = {linear.role: linear for linear in parts.linears(0) if linear.part == "attention"}
    inputs: list[torch.Tensor] = []
    handle = by_role["q"].module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    activations = read_sites(parts, tuple(Site(0, part) for part in ("q", "k", "v")), BATCH)
    handle.remove()
    for role in ("q", "k", "v"):
        bias = by_role[role].read_bias()
        expected = inputs[0] @ by_role[role].read().T + (0 if bias is None else bias)
        torch.testing.assert_close(activations[Site(0, role)], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_head_is_a_slice_and_an_edit_reaches_it_alone() -> None:
    model = tiny_model("llama", layers=2)
    parts = anatomy(model)
    for part, heads in (("q", 4), ("k", 2), ("v", 2), ("z", 4)):
        own = [Site(1, part, head) for head in range(heads)]
        whole = read_sites(parts, (Site(1, part),), BATCH)[Site(1, part)]
        assert torch.equal(torch.cat([read_sites(parts, (site,), BATCH)[site] for site in own], -1), whole)
        assert site_width(parts, own[0]) == 8
        with hooked(parts, {own[1]: torch.zeros_like}):
            edited = read_sites(parts, (Site(1, part),), BATCH)[Site(1, part)]
        expected = whole.clone()
        expected[..., 8:16] = 0
        # A hook sees what earlier hooks left.
        assert torch.equal(edited, expected)


@torch.no_grad()
def test_a_fused_edit_reaches_the_rows_of_its_role_alone() -> None:
    model = tiny_model("gpt_neox", layers=1)
    parts = anatomy(model)
    sites = tuple(Site(0, part) for part in ("q", "k", "v"))
    before = read_sites(parts, sites, BATCH)
    with hooked(parts, {Site(0, "k"): torch.zeros_like}):
        after = read_sites(parts, sites, BATCH)
    assert not after[sites[1]].any()
    assert torch.equal(after[sites[0]], before[sites[0]])
    assert torch.equal(after[sites[2]], before[sites[2]])


def test_a_pass_ends_after_the_last_site() -> None:
    model = tiny_model("llama", layers=3)
    ran: list[int] = []
    for index, block in enumerate(anatomy(model).blocks):
        block.register_forward_hook(lambda module, args, output, index=index: ran.append(index))
    read_sites(anatomy(model), (Site(0), Site(1)), BATCH)
    assert ran == [0, 1]


@pytest.mark.parametrize(
    ("site", "says"),
    [
        (Site(5), "layer is 5; the model has the layers 0 to 1"),
        (Site(-1), "layer is -1"),
        (Site(1, "k", 2), "head is 2; k of layer 1 has the heads 0 to 1"),
        (Site(1, "residual", 0), "head is 0; the site residual is not split into heads"),
    ],
)
def test_what_is_not_there_is_refused(site: Site, says: str) -> None:
    with pytest.raises(IntaglioError, match=says):
        check_site(anatomy(tiny_model("llama", layers=2)), site)


def test_names() -> None:
    assert [site.name for site in (Site(3), Site(3, "mlp"), Site(0, "z", 2))] == [
        "layers.3",
        "layers.3.mlp",
        "layers.0.z.2",
    ]
