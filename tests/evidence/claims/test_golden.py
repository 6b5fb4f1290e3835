"""Golden numbers hold on this machine, with plain kernels too, and catch a changed mechanism."""

from __future__ import annotations

import dataclasses
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import intaglio.evidence.claims as claims
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.engine.golden import moved
from intaglio.evidence.engine.registration import load_claim
from intaglio.methods.activations.r_sparse import RSparse
from intaglio.methods.objectives.meap import MEAP
from intaglio.methods.training.paser import PASER
from intaglio.methods.weights.bip import BiP
from intaglio.methods.weights.lost import LOST
from intaglio.methods.weights.magnitude import Magnitude
from intaglio.trainer.causal_lm import IGNORED
from intaglio.trainer.protocols import Example

SLUGS = sorted(module.name for module in pkgutil.iter_modules(claims.__path__))
CPU = [slug for slug in SLUGS if load_claim(slug).golden]
LONGER = {"bert4rec", "bico", "bitnet", "combiner", "diverse_beam_search", "dupmae", "hidden_transfer",
          "layerwise_unmasking", "meap"}  # fmt: skip
"""Claims whose numbers take more than a few seconds; the slow tests check them."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path))


@pytest.mark.parametrize("slug", [pytest.param(slug, marks=pytest.mark.slow if slug in LONGER else ()) for slug in CPU])
def test_golden_numbers_hold(slug: str) -> None:
    assert moved(load_claim(slug)) == []


def changed(slug: str, arm: str, **settings: Any) -> Claim:
    """A claim whose method does something else; golden numbers stay."""
    claim = load_claim(slug)
    own = Arm(claim.arms[arm].what, {**claim.arms[arm].settings, **settings}, claim.arms[arm].tune)
    return dataclasses.replace(claim, arms={**claim.arms, arm: own}, golden={arm: claim.golden[arm]})


class OtherTargets(MEAP):
    """MEAP whose masked copy scores the tokens that are not masked."""

    def _copy(self, clean_T: Tensor, begin: int, count: int, rng: torch.Generator) -> Example:
        copy = super()._copy(clean_T, begin, count, rng)
        labels_T = clean_T.masked_fill(copy["labels"] != IGNORED, IGNORED)
        labels_T[:begin] = IGNORED
        return {**copy, "labels": labels_T}


@pytest.mark.parametrize(
    ("slug", "arm", "settings"),
    [
        ("dsnot", "wanda", {"method": Magnitude(sparsity=0.5)}),  # scores without the norm of the inputs
        ("lost", "lost", {"apply": LOST(rank=16, columns=4 / 64, within_rank=True), "gamma": 0.0}),
        ("meap", "meap", {"objective": OtherTargets(mode="finetuning", pack=False, chat=False)}),
        ("bip", "bip", {"modifiers": (BiP(sparsity=0.95, implicit=False),)}),
        ("r_sparse", "r_sparse", {"method": RSparse(sparsity=0.5, alpha="error", scale=False)}),
        ("paser", "paser", {"select": PASER(budget=0.1, embedding="tfidf", chat=False, clusters=1)}),
    ],
)
def test_a_changed_mechanism_moves_them(slug: str, arm: str, settings: dict[str, Any]) -> None:
    (message,) = moved(changed(slug, arm, **settings))
    assert arm in message


@pytest.mark.slow
@pytest.mark.parametrize("slug", CPU)
def test_golden_numbers_hold_with_plain_kernels(slug: str) -> None:
    code = f"from intaglio.evidence.engine.golden import *; assert moved(load_claim({slug!r})) == []"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
