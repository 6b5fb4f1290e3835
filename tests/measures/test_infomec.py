"""InfoMEC: the worked examples of the card, invariances, the held-out variant, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.errors import IntaglioError
from intaglio.measures.infomec import infomec

BITS = np.array([(n // 2 % 2, n % 2) for n in range(200)])
S1, S2 = BITS.T


def scores(*columns: Any, sources: Any = BITS, discrete: bool = True, **more: Any) -> Any:
    return infomec(sources, np.stack(columns, 1), discrete=discrete, **more)


def test_latents_that_are_the_sources() -> None:
    """z = s -> M=1, E~1 (0.9998 at max_iter 100), C=1."""
    found = scores(S1, S2)
    assert (found.infom, found.infoc) == (pytest.approx(1), pytest.approx(1))
    assert 0.99 < found.infoe <= 1
    assert found.infoe_regression == pytest.approx(1)
    assert found.nmi.tolist() == [[pytest.approx(1), pytest.approx(0)], [pytest.approx(0), pytest.approx(1)]]
    assert (found.infom_gap, found.infoc_gap) == (pytest.approx(1), pytest.approx(1))
    assert found.undefined == ()


def test_a_latent_that_holds_both_sources() -> None:
    """z = (s1, 2*s1+s2) -> NMI [[1,1],[0,1]], M=0.5, C=0.5, E~1."""
    found = scores(S1, 2 * S1 + S2)
    assert np.allclose(found.nmi, [[1, 1], [0, 1]])
    assert (found.infom, found.infoc) == (pytest.approx(0.5), pytest.approx(0.5))
    assert found.infoe > 0.99
    assert (found.infom_gap, found.infoc_gap) == (pytest.approx(0.5), pytest.approx(0.5))


def test_one_code_twice() -> None:
    """z = (2*s1+s2) duplicated -> all-ones NMI, M=0, C=0, E~1."""
    found = scores(2 * S1 + S2, 2 * S1 + S2)
    assert np.allclose(found.nmi, 1)
    assert (found.infom, found.infoc) == (pytest.approx(0), pytest.approx(0))
    assert found.infoe > 0.99


def test_an_xor_latent_informs_about_nothing() -> None:
    """XOR: NMI column 0 -> 0/0, here no information and reported; E = 0.5."""
    found = scores(S1, S1 ^ S2)
    assert np.allclose(found.nmi, [[1, 0], [0, 0]])
    assert (found.infom, found.infoc) == (pytest.approx(0.5), pytest.approx(0.5))
    assert found.undefined == ("infom", "infoc")
    assert found.infoe == pytest.approx(0.5, abs=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(3)), st.integers(0, 99))
def test_order_names_and_constant_latents_do_not_matter(order: list[int], seed: int) -> None:
    """Permuting latents or relabelling their values changes nothing; adding a constant latent changes nothing."""
    draws = np.random.default_rng(seed)
    sources = draws.integers(0, 3, (90, 2))
    latents = np.stack([sources[:, 0], sources.sum(1), draws.integers(0, 4, 90)], 1)
    names = draws.permutation(10)
    other = np.concatenate([names[latents][:, order], np.full((90, 1), 7)], 1)
    before, after = (infomec(sources, z, discrete=True) for z in (latents, other))
    for name in ("infom", "infoc", "infom_gap", "infoc_gap"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), abs=1e-9)
    assert after.infoe == pytest.approx(before.infoe, abs=2e-3)
    assert after.active.tolist() == [True, True, True, False]
    assert -1e-9 <= before.infom <= 1
    assert -1e-9 <= before.infoc <= 1


def test_continuous_latents_are_read_by_distances_and_small_ones_are_inactive() -> None:
    noise = np.random.default_rng(0).normal(size=(200, 3))
    found = scores(S1 + 0.01 * noise[:, 0], 3 * S2 + 0.01 * noise[:, 1], 0.01 * noise[:, 2], discrete=False)
    assert found.active.tolist() == [True, True, False]
    assert found.infom > 0.9
    assert found.infoc > 0.9
    assert np.allclose(np.diag(found.nmi), 1, atol=0.1)
    kept = scores(S1 + 0.01 * noise[:, 0], S2 + noise[:, 1], discrete=False, prune_ratio=2.0)
    assert kept.active.tolist() == [False, True]


def test_explicitness_of_classifiers_that_have_not_seen_the_samples() -> None:
    draws = np.random.default_rng(1)
    sources, noise = draws.integers(0, 2, (60, 1)), draws.integers(0, 2, (60, 40))
    halves = [slice(0, 30), slice(30, 60)]
    own, other = ((sources[half], noise[half]) for half in halves)
    found = infomec(*own, discrete=True, held_out=other)
    assert found.infoe > 0.9  # random codes fit 30 samples
    assert found.infoe_held_out is not None
    assert found.infoe_held_out < 0.2
    assert infomec(*own, discrete=True).infoe_held_out is None
    same = infomec(*own, discrete=True, held_out=own)
    assert same.infoe_held_out == pytest.approx(same.infoe)


@pytest.mark.parametrize(
    ("sources", "latents", "says"),
    [
        (BITS[:, 0], BITS, r"the sources have the shape \[200\]"),
        (BITS, BITS[:9], r"the latents have the shape \[9, 2\]; \[200, Z\]"),
        (BITS, BITS + np.nan, "hold NaN or infinite values"),
        (BITS * [1, 0], BITS, "source 1 has one value"),
    ],
)
def test_what_does_not_fit_is_refused(sources: Any, latents: Any, says: str) -> None:
    with pytest.raises(IntaglioError, match=says) as caught:
        infomec(sources, latents, discrete=False)
    assert "\n" not in str(caught.value)


def test_new_values_of_held_out_sources_are_refused_and_one_source_has_no_modularity() -> None:
    with pytest.raises(IntaglioError, match="source 0 has held-out values that the other samples lack"):
        infomec(BITS, BITS, discrete=True, held_out=(BITS + 1, BITS))
    found = infomec(BITS[:, :1], BITS, discrete=True)
    assert (found.infom, found.undefined) == (0.0, ("infom",))
    dead = infomec(BITS, 0 * BITS, discrete=True)
    assert (dead.infom, dead.infoc, dead.undefined) == (0.0, 0.0, ("infom", "infoc"))
