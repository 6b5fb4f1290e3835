"""`ignore`: layers that a pruning step leaves alone, in every method."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.base import Carving
from intaglio.methods.registry import get_method
from intaglio.modeling.anatomy import anatomy
from tests.families import tiny_model

WAYS: dict[str, dict[str, Any]] = {"magnitude": {}, "wanda": {}, "dsnot": {}, "sparsegpt": {"block": 16}}
DATA = torch.arange(4 * 16).reshape(4, 16) % 32


def changed(slug: str, ignore: list[str], family: str = "llama", **fields: Any) -> dict[str, bool]:
    dense = tiny_model(family)
    method = get_method(slug)(ignore=ignore, **({"sparsity": 0.5} | WAYS[slug] | fields))
    carved = cast(Carving, method).apply(Checkpoint(copy.deepcopy(dense)), DATA).model
    pairs = zip(anatomy(dense).all_linears(), anatomy(carved).all_linears(), strict=True)
    return {name: not torch.equal(before.read(), after.read()) for (name, before), (_, after) in pairs}


@pytest.mark.parametrize("slug", WAYS)
def test_named_layers_keep_all_their_weights_and_the_others_do_not(slug: str) -> None:
    left = changed(slug, ["*.down_proj", "layers.0.*"])
    for name, other in left.items():
        assert other == (not name.endswith(".down_proj") and not name.startswith("layers.0.")), name


@pytest.mark.parametrize("slug", WAYS)
def test_a_part_of_a_fused_projection_is_named_as_it_is_shown(slug: str) -> None:
    name = next(name for name, _ in anatomy(tiny_model("phi3")).all_linears() if name.endswith("[k]"))
    left = changed(slug, [name], family="phi3")
    assert [other for other, touched in left.items() if not touched] == [name]


def test_a_pattern_needs_to_fit_only_what_is_pruned() -> None:
    linears = [("layers.0.a", 4, 6), ("layers.0.b", 4, 8)]
    with pytest.raises(IntaglioError, match="its 6 inputs"):
        get_method("wanda")(pattern="2:4").check(linears)  # type: ignore[attr-defined]
    get_method("wanda")(pattern="2:4", ignore=["*.a"]).check(linears)  # type: ignore[attr-defined]


@pytest.mark.parametrize("slug", WAYS)
def test_names_that_fit_nothing_or_everything_are_refused(slug: str) -> None:
    with pytest.raises(IntaglioError, match=r"ignore: '\*\.lm_head' names no layer of this model; its first is layers"):
        changed(slug, ["*.lm_head"])
    with pytest.raises(IntaglioError, match="ignore: names every layer"):
        changed(slug, ["*.mlp.*", "*.self_attn.*"])
