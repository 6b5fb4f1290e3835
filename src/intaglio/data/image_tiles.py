"""Tiling of images for encoders of one square input size: CATTY (POINTS, Liu et al. 2024) and InternVL 1.5's tiling.

Both choose a grid of at most M tiles by the image's aspect ratio. CATTY resizes the image in proportion until its short
side spans the grid, and slides a window over it, so that tiles overlap instead of being stretched:

- grid: of the ratios columns / rows of all grids with columns * rows <= M, those at most W / H for upright images and
  at least W / H for wide ones are kept, and the nearest to W / H is taken; of its grids the one whose number of tiles
  is nearest to (W / S) (H / S), the first of equals
- size: width = columns S and height = int(H / W * width) for upright images; height = rows S and width = int(W / H *
  height) for others
- stride: (width - S) // (columns - 1), or S for a single column; likewise for rows; tiles row by row

The paper prints the scale inverted; the code, which multiplies by grid side over image side, is right.

Source: Liu et al., POINTS: Improving Your Vision-language Model with Affordable Strategies, arXiv 2409.04828, section
3.1; code WePOINTS/WePOINTS. Chen et al., How Far Are We to GPT-4V? (InternVL 1.5), arXiv 2404.16821.

Dimension letters: C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from intaglio.errors import IntaglioError

Mode = Literal["catty", "dhr"]
BILINEAR = 2
"""Pillow's number of the filter."""


@dataclass(frozen=True)
class TilePlan:
    """Geometry of an image's tiles.

    Args:
        grid: columns and rows.
        size: width and height that the image is resized to.
        corners: left and top of each tile, row by row.
        stretched: width and height that an image longer than M : 1 is stretched to first; None for others.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    corners: tuple[tuple[int, int], ...]
    stretched: tuple[int, int] | None = None


@lru_cache
def _grids(max_tiles: int) -> dict[float, list[tuple[int, int]]]:
    """Return the grids of at most `max_tiles` tiles by their ratio, in order of their tiles."""
    grids: dict[float, list[tuple[int, int]]] = {}
    for tiles in range(1, max_tiles + 1):
        for columns in range(1, tiles + 1):
            if tiles % columns == 0:
                grids.setdefault(columns * columns / tiles, []).append((columns, tiles // columns))
    return grids


def plan_tiles(
    width: int, height: int, tile_size: int = 336, max_tiles: int = 8, mode: Mode = "catty", *, stretch: bool = True
) -> TilePlan | None:
    """Return where the tiles of an image lie.

    Args:
        width, height: pixels of the image.
        tile_size: side S of a tile. Default 336.
        max_tiles: M. Default 8.
        mode: `catty` (default), or `dhr`, InternVL's: the nearest ratio on either side, the image of any ratio
            stretched to the grid, disjoint tiles.
        stretch: (catty) whether an image longer than M : 1 is stretched to that ratio first, as the paper does.
            Default True.

    Returns:
        The plan, or None for an image longer than M : 1 that is not to be stretched.

    Raises:
        IntaglioError: a size is not positive, or the mode is unknown.
    """
    for name, value in {"width": width, "height": height, "tile_size": tile_size, "max_tiles": max_tiles}.items():
        if value < 1:
            raise IntaglioError(f"{name} is {value}; a number from 1 on is accepted")
    if mode not in ("catty", "dhr"):
        raise IntaglioError(f"mode is {mode!r}; accepted: catty, dhr")
    grids = _grids(max_tiles)
    if mode == "dhr":
        columns, rows = _nearest(grids, grids, width, height, tile_size)
        size, steps = (columns * tile_size, rows * tile_size), (tile_size, tile_size)
        return TilePlan((columns, rows), size, _corners(columns, rows, steps))
    stretched = None
    if not 1 / max_tiles <= width / height <= max_tiles:
        if not stretch:
            return None
        width, height = (max_tiles * height, height) if width > height else (width, max_tiles * width)
        stretched = (width, height)
    ratio = width / height
    ratios = [r for r in grids if ratio == 1 or (r <= ratio if ratio < 1 else r >= ratio)]
    grid = _nearest(grids, ratios, width, height, tile_size)
    if width < height:
        size = (grid[0] * tile_size, int(height / width * (grid[0] * tile_size)))
    else:
        size = (int(width / height * (grid[1] * tile_size)), grid[1] * tile_size)
    across, down = ((side - tile_size) // max(1, count - 1) for side, count in zip(size, grid, strict=True))
    # Of an almost square image rounding can leave no room for a second tile; the code then takes one.
    columns, rows = (grid[0] if across else 1, grid[1] if down else 1)
    return TilePlan((columns, rows), size, _corners(columns, rows, (across, down)), stretched)


def _corners(columns: int, rows: int, steps: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    return tuple((column * steps[0], row * steps[1]) for row in range(rows) for column in range(columns))


def _nearest(
    grids: dict[float, list[tuple[int, int]]], ratios: Iterable[float], width: int, height: int, tile_size: int
) -> tuple[int, int]:
    """Return the grid of the nearest ratio whose number of tiles is nearest to the image's area."""
    nearest = min(ratios, key=lambda ratio: abs(ratio - width / height))
    tiles = (width / tile_size) * (height / tile_size)
    return min(grids[nearest], key=lambda grid: abs(grid[0] * grid[1] - tiles))


def tile_image(
    image: Any,
    tile_size: int = 336,
    max_tiles: int = 8,
    mode: Mode = "catty",
    *,
    stretch: bool = True,
    thumbnail: bool = True,
) -> list[Any] | None:
    """Return the tiles of an image row by row, and last a thumbnail: the whole image squashed to a tile.

        tiles = tile_image(Image.open("page.png"))
        pixels = processor(images=tiles, return_tensors="pt")  # a stock image processor of 336 pixels

    Args:
        image: a Pillow image, or a float tensor [C, H, W].
        tile_size: side S of a tile in pixels. Default 336.
        max_tiles: M, without the thumbnail. Default 8.
        mode: see `plan_tiles`.
        stretch: see `plan_tiles`.
        thumbnail: whether a thumbnail is appended, of the resized image (catty) or the original (dhr). Default True.

    Returns:
        Images of the kind that was given, columns * rows and the thumbnail; None as in `plan_tiles`.

    Raises:
        IntaglioError: the image is neither, has no pixels, or as in `plan_tiles`.
    """
    if isinstance(image, Tensor):
        if image.ndim != 3 or not image.is_floating_point():
            raise IntaglioError(
                f"the image is a tensor {tuple(image.shape)} of {image.dtype}; float [C, H, W] is accepted"
            )
        height, width = image.shape[1:]
    elif hasattr(image, "resize") and hasattr(image, "crop"):
        width, height = image.size
    else:
        raise IntaglioError(f"the image is {type(image).__name__}; a Pillow image or a tensor [C, H, W] is accepted")
    plan = plan_tiles(width, height, tile_size, max_tiles, mode, stretch=stretch)
    if plan is None:
        return None
    whole = _resized(image if plan.stretched is None else _resized(image, plan.stretched), plan.size)
    tiles = [_cut(whole, left, top, tile_size) for left, top in plan.corners]
    small = _resized(image if mode == "dhr" else whole, (tile_size, tile_size))
    return [*tiles, small] if thumbnail else tiles


def _resized(image: Any, size: tuple[int, int]) -> Any:
    """Resize to (width, height)."""
    if not isinstance(image, Tensor):
        return image.resize(size, resample=BILINEAR)
    return F.interpolate(image[None], size=(size[1], size[0]), mode="bilinear", antialias=True)[0]


def _cut(image: Any, left: int, top: int, side: int) -> Any:
    if isinstance(image, Tensor):
        return image[:, top : top + side, left : left + side]
    return image.crop((left, top, left + side, top + side))
