"""Tiles of images: CATTY by the card's numbers, its invariants, and the tiling of InternVL."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate

from intaglio.data.image_tiles import plan_tiles, tile_image
from intaglio.errors import IntaglioError


@pytest.mark.parametrize(
    ("size", "grid", "resized", "corners"),
    [
        ((336, 336), (1, 1), (336, 336), [(0, 0)]),
        ((672, 336), (2, 1), (672, 336), [(0, 0), (336, 0)]),
        ((1000, 600), (4, 2), (1120, 672), [(x, y) for y in (0, 336) for x in (0, 261, 522, 783)]),
        ((600, 1000), (2, 4), (672, 1120), [(x, y) for y in (0, 261, 522, 783) for x in (0, 336)]),
        ((1200, 500), (3, 1), (806, 336), [(0, 0), (235, 0), (470, 0)]),
        ((800, 790), (3, 2), (680, 672), [(x, y) for y in (0, 336) for x in (0, 172, 344)]),
        ((1344, 1344), (2, 2), (672, 672), [(x, y) for y in (0, 336) for x in (0, 336)]),
    ],
)
def test_catty_by_the_cards_numbers(size: Any, grid: Any, resized: Any, corners: Any) -> None:
    """CATTY outputs (checked): grid, resized image, strides 336, 261, 235, 172."""
    plan = plan_tiles(*size)
    assert plan is not None
    assert (plan.grid, plan.size, list(plan.corners), plan.stretched) == (grid, resized, corners, None)


sides = st.integers(40, 3000)


@given(sides, sides, st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_the_image_is_covered_and_keeps_its_ratio(width: int, height: int, most: int) -> None:
    """Tiles = cols*rows <= M; they cover all but at most cols-2 / rows-2 px; |W'/H' - W/H| only from int rounding."""
    plan = plan_tiles(width, height, 64, most)
    assert plan is not None
    columns, rows = plan.grid
    assert len(plan.corners) == len(set(plan.corners)) == columns * rows <= most
    for axis, count in enumerate(plan.grid):
        last = max(corner[axis] for corner in plan.corners)
        rest = plan.size[axis] - last - 64
        assert 0 <= rest <= max(0, count - 2)
        starts = sorted({corner[axis] for corner in plan.corners})
        assert all(b - a <= 64 for a, b in itertools.pairwise(starts))
    if plan.stretched is None:
        short = min(plan.size)
        assert abs(max(plan.size) - max(width, height) / min(width, height) * short) < 1 + 1e-6


@given(sides, sides)
@settings(max_examples=40, deadline=None)
def test_a_transposed_image_has_the_transposed_grid(width: int, height: int) -> None:
    """Transpose symmetry of the tile grid (where ratios tie, the nearest differs by side)."""
    wide, tall = plan_tiles(width, height, 64, 2), plan_tiles(height, width, 64, 2)
    assert wide is not None
    assert tall is not None
    assert wide.grid == tall.grid[::-1]
    assert wide.size == tall.size[::-1]


def test_long_images_are_stretched_or_refused() -> None:
    plan = plan_tiles(1000, 100, 64, 8)
    assert plan is not None
    assert (plan.grid, plan.stretched, plan.size) == ((8, 1), (800, 100), (512, 64))
    upright = plan_tiles(100, 1000, 64, 8)
    assert upright is not None
    assert (upright.grid, upright.stretched) == ((1, 8), (100, 800))
    assert plan_tiles(1000, 100, 64, 8, stretch=False) is None
    assert tile_image(Image.new("RGB", (1000, 100)), 64, stretch=False) is None
    assert plan_tiles(800, 100, 64, 8, stretch=False) is not None


def test_internvls_tiles_are_disjoint_and_distort_more() -> None:
    """DHR's ratio error is larger for any ar not in the table; 800x790 uses 6 tiles vs 1 or 4."""
    dhr, catty = plan_tiles(800, 790, mode="dhr"), plan_tiles(800, 790)
    assert dhr is not None
    assert catty is not None
    assert (dhr.grid, dhr.size) == ((2, 2), (672, 672))
    assert list(dhr.corners) == [(0, 0), (336, 0), (0, 336), (336, 336)]
    errors = [abs(plan.size[0] / plan.size[1] - 800 / 790) for plan in (dhr, catty)]
    assert errors[0] > 4 * errors[1]
    long = plan_tiles(5000, 100, mode="dhr")
    assert long is not None
    assert (long.grid, long.stretched) == ((8, 1), None)


def test_an_almost_square_image_of_one_tile() -> None:
    plan = plan_tiles(65, 66, 64, 2)
    assert plan is not None
    assert (plan.grid, plan.size, plan.corners) == ((1, 1), (64, 64), ((0, 0),))


def gradient(width: int, height: int) -> torch.Tensor:
    """An image whose channels hold x and y."""
    x, y = torch.arange(width) / width, torch.arange(height) / height
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.zeros(height, width)])


def resized(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return interpolate(image[None], size=(height, width), mode="bilinear", antialias=True)[0]


def test_tiles_come_row_by_row_and_the_thumbnail_last() -> None:
    """Thumbnail position (last); every tile S x S; tensors are [H, W]."""
    image = gradient(100, 60)
    tiles = tile_image(image, 32, 8)
    assert tiles is not None
    assert [tuple(tile.shape) for tile in tiles] == [(3, 32, 32)] * 9
    lefts, tops = ([float(tile[channel].mean()) for tile in tiles[:8]] for channel in (0, 1))
    assert lefts[:4] == sorted(lefts[:4])
    assert all(abs(a - b) < 1e-3 for a, b in zip(lefts[:4], lefts[4:], strict=True))
    assert max(tops[:4]) < min(tops[4:])
    assert float(tiles[-1][0, 0, -1] - tiles[-1][0, 0, 0]) > 0.9
    assert len(tile_image(image, 32, 8, thumbnail=False) or []) == 8
    assert len(tile_image(image, 32, 2, thumbnail=False) or []) == 2
    other = tile_image(image, 32, 8, "dhr")
    assert other is not None
    for thumbnail, whole in ((tiles[-1], resized(image, 64, 106)), (other[-1], image)):
        assert torch.equal(thumbnail, resized(whole, 32, 32))


def test_pillow_images_and_tensors_give_nearly_the_same_tiles() -> None:
    tensor = (gradient(100, 60) * 255).round()
    image = Image.fromarray(tensor.permute(1, 2, 0).to(torch.uint8).numpy())
    for mode in ("catty", "dhr"):
        pictures, tensors = (tile_image(one, 32, 8, mode) for one in (image, tensor))  # type: ignore[arg-type]
        assert pictures is not None
        assert tensors is not None
        assert [picture.size for picture in pictures] == [(32, 32)] * len(tensors)
        for picture, other in zip(pictures, tensors, strict=True):
            pixels = torch.tensor(list(picture.tobytes())).reshape(32, 32, 3).permute(2, 0, 1)
            assert float((pixels - other).abs().max()) <= 2


def test_a_long_image_is_stretched_before_it_is_resized() -> None:
    calls: list[tuple[int, int]] = []

    class Recorded:
        size = (1000, 100)

        def resize(self, size: tuple[int, int], resample: int) -> Recorded:
            assert resample == 2
            calls.append(size)
            return self

        def crop(self, box: tuple[int, int, int, int]) -> Recorded:
            return self

    tile_image(Recorded(), 64, 8)
    assert calls == [(800, 100), (512, 64), (64, 64)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plan_tiles(0, 5), "width is 0; a number from 1 on"),
        (lambda: plan_tiles(5, 5, max_tiles=0), "max_tiles is 0"),
        (lambda: plan_tiles(5, 5, mode="other"), "mode is 'other'; accepted: catty, dhr"),  # type: ignore[arg-type]
        (lambda: tile_image([1]), "the image is list; a Pillow image or a tensor"),
        (lambda: tile_image(torch.zeros(5, 5)), r"the image is a tensor \(5, 5\) of torch.float32; float \[C, H, W\]"),
        (lambda: tile_image(torch.zeros(3, 5, 5, dtype=torch.uint8)), "of torch.uint8"),
    ],
)
def test_bad_images(call: Any, words: str) -> None:
    with pytest.raises(IntaglioError, match=words):
        call()
