"""Sites: named activations of a model that can be read and replaced during a pass.

    with hooked(anatomy(model), {Site(5): record}):
        model(ids)

Dimension letters: B batch, L sequence, D width of the site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import Anatomy, Linear, attention, feed_forward
from intaglio.modeling.partial_pass import run_base

SitePart = Literal["residual", "attention", "mlp", "q", "k", "v", "z"]
"""`residual`: the output of a block; `attention`, `mlp`: of its parts; `q`, `k`, `v`: of the projections, before
rotary positions and norms by head; `z`: the input of the attention's output projection, the heads side by side."""

Edit = Callable[[Tensor], Tensor | None]
"""Takes a site's activations [B, L, D]; returns others in their place, or None to leave them."""


@dataclass(frozen=True)
class Site:
    """An activation of a model.

    Args:
        layer: index of the block, from 0.
        part: see `SitePart`. Default `residual`.
        head: (q, k, v, z) one head's slice. Default None: all heads.
    """

    layer: int
    part: SitePart = "residual"
    head: int | None = None

    @property
    def name(self) -> str:
        """The site in a word, such as `layers.5.z.3`."""
        part = "" if self.part == "residual" else f".{self.part}"
        return f"layers.{self.layer}{part}{'' if self.head is None else f'.{self.head}'}"


def check_site(parts: Anatomy, site: Site) -> None:
    """Refuse a site that a model does not have.

    Raises:
        IntaglioError: names the layer, part or head, and what the model has.
    """
    depth = len(parts.blocks)
    if not 0 <= site.layer < depth:
        raise IntaglioError(f"layer is {site.layer}; the model has the layers 0 to {depth - 1}")
    if site.part in ("q", "k", "v", "z"):
        heads = _heads(parts, site, _projection(parts, site))
        if site.head is not None and not 0 <= site.head < heads:
            raise IntaglioError(
                f"head is {site.head}; {site.part} of layer {site.layer} has the heads 0 to {heads - 1}"
            )
    elif site.head is not None:
        raise IntaglioError(f"head is {site.head}; the site {site.part} is not split into heads, q, k, v and z are")


def _projection(parts: Anatomy, site: Site) -> Linear:
    attention_linears = [linear for linear in parts.linears(site.layer) if linear.part == "attention"]
    if site.part == "z":  # families call it o_proj, dense or c_proj
        matching = [linear for linear in attention_linears if linear.role not in ("q", "k", "v")][-1:]
    else:
        matching = [linear for linear in attention_linears if linear.role == site.part]
    if not matching:
        raise IntaglioError(
            f"the model family {parts.config.model_type!r} has no projection for {site.part} in layer {site.layer}; "
            "residual, attention and mlp are sites of every model"
        )
    return matching[0]


def _heads(parts: Anatomy, site: Site, linear: Linear) -> int:
    config = parts.config
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return (linear.shape[1] if site.part == "z" else linear.shape[0]) // size


def site_width(parts: Anatomy, site: Site) -> int:
    """Return the number of features of a site."""
    if site.part in ("residual", "attention", "mlp"):
        return int(parts.config.hidden_size)
    linear = _projection(parts, site)
    width = linear.shape[1] if site.part == "z" else linear.shape[0]
    return width if site.head is None else width // _heads(parts, site, linear)


@dataclass(frozen=True)
class _Tap:
    """Module of a site, whether its input is read instead of its output, and the site's columns (None: all)."""

    module: nn.Module
    reads_input: bool = False
    columns: Tensor | None = None


def _tap(parts: Anatomy, site: Site) -> _Tap:
    check_site(parts, site)
    block = parts.blocks[site.layer]
    if site.part == "residual":
        return _Tap(block)
    if site.part == "attention":
        return _Tap(attention(block))
    if site.part == "mlp":
        return _Tap(block.get_submodule(feed_forward(block, parts.config).place))
    linear = _projection(parts, site)
    reads = site.part == "z"
    columns = None if reads else linear.rows
    if site.head is not None:
        columns = torch.arange(linear.shape[1] if reads else linear.shape[0]) if columns is None else columns
        columns = columns.chunk(_heads(parts, site, linear))[site.head]
    return _Tap(linear.module, reads, columns)


@contextmanager
def hooked(parts: Anatomy, edits: Mapping[Site, Edit]) -> Iterator[None]:
    """Call a function with the activations of each site in every pass inside the context.

    Args:
        parts: the model's anatomy.
        edits: a function for each site; they run in the order of the mapping where sites share a module.

    Raises:
        IntaglioError: the model does not have a site.
    """
    taps = [(_tap(parts, site), edit) for site, edit in edits.items()]
    handles = [_register(tap, edit) for tap, edit in taps]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_hook(parts: Anatomy, site: Site, edit: Edit) -> Any:
    """Call a function with the activations of a site in every pass from now on; return the handle that ends it.

    Raises:
        IntaglioError: the model does not have the site.
    """
    return _register(_tap(parts, site), edit)


def _register(tap: _Tap, edit: Edit) -> Any:
    if tap.reads_input:

        def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
            new = _edited(args[0], tap.columns, edit)
            return None if new is None else (new, *args[1:])

        return tap.module.register_forward_pre_hook(before)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        new = _edited(whole, tap.columns, edit)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return tap.module.register_forward_hook(after)


def _edited(whole_BLD: Tensor, columns: Tensor | None, edit: Edit) -> Tensor | None:
    if columns is None:
        return edit(whole_BLD)
    at = columns.to(whole_BLD.device)
    new = edit(whole_BLD[..., at])
    if new is None:
        return None
    edited = whole_BLD.clone()
    edited[..., at] = new.to(edited.dtype)
    return edited


class _Seen(Exception):
    """Ends a pass once all sites were read."""


@torch.no_grad()
def read_sites(parts: Anatomy, sites: tuple[Site, ...], batch: Mapping[str, Tensor]) -> dict[Site, Tensor]:
    """Return the activations [B, L, D] of sites for a batch; the pass ends after the last of them.

    Raises:
        IntaglioError: the model does not have a site.
    """
    seen: dict[Site, Tensor] = {}

    def reader(site: Site) -> Edit:
        def read(x_BLD: Tensor) -> None:
            seen[site] = x_BLD.detach()
            if len(seen) == len(sites):
                raise _Seen

        return read

    device = next(parts.base.parameters()).device
    with hooked(parts, {site: reader(site) for site in sites}), suppress(_Seen):
        run_base(parts, {name: value.to(device) for name, value in batch.items()})
    return seen
