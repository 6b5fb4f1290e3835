"""The layer: experts without a gate, a router that says how much of each is taken.

Dimension letters: B any leading dimensions, T tokens, D width, E experts, H inner features of an expert, F = E H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.kernels import sparse_experts
from intaglio.methods.activations.blockffn.routing import Form, scores
from intaglio.modeling.replacement import ReplacedMLP


class BlockFFNLayer(ReplacedMLP):
    """A feed-forward layer of E experts of width H, of which each token takes those that its router opens.

        raw = x Wr^T,   score = RMSNorm(ReLU(raw)) with a gain g (see `routing`)
        u = SiLU(x Wup^T), seen as [T, E, H], times score [T, E, 1]
        y = u Wdown^T

    Under `torch.no_grad` a few tokens (`intaglio.kernels.sparse_experts.MOST_ROWS`) read the weights of the experts that some
    of them takes, and no others. Wdown lies transposed, so that an expert is a run of rows in both matrices.

    Args:
        width: D.
        form: experts, their width and the router.

    Attributes:
        router: Wr [E, D]; None where the form asks no router.
        gain: g [E]; None where the form has none.
        up: Wup [F, D].
        down: Wdown, transposed [F, D].
        watched: whether the next passes with a gradient leave `raw` behind. Default False.
        raw: the router's output [B, E] of the last such pass.
    """

    slug = "blockffn"

    def __init__(self, width: int, form: Form) -> None:
        super().__init__(width)
        self.form = form
        inner = form.experts * form.expert_width
        self.router = None if form.router == "none" else nn.Parameter(torch.empty(form.experts, width))
        self.gain = nn.Parameter(torch.empty(form.experts)) if form.has_gain else None
        self.up = nn.Parameter(torch.empty(inner, width))
        self.down = nn.Parameter(torch.empty(inner, width))
        self.watched = False
        self.raw: Tensor | None = None

    @torch.no_grad()
    def draw(self, std: float, generator: torch.Generator, router_std: float | None = None) -> None:
        """Begin anew: matrices normal, g one.

        Args:
            std: of the matrices.
            generator: of the draws, on the CPU.
            router_std: of the router. Default: as the others.
        """
        for weight, spread in ((self.router, router_std or std), (self.up, std), (self.down, std)):
            if weight is not None:
                weight.copy_(spread * torch.randn(weight.shape, generator=generator))
        if self.gain is not None:
            self.gain.fill_(1.0)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return y [B, D].

        Args:
            x_BD: the input.
        """
        raw_BE = self._raw(x_BD)
        if self.watched and torch.is_grad_enabled():
            self.raw = raw_BE
        score_TE = scores(raw_BE, self.form, self.gain).flatten(0, -2)
        y_TD = sparse_experts.apply(x_BD.reshape(-1, self.width), self.up, self.down, score_TE)
        return y_TD.view(x_BD.shape)

    @torch.no_grad()
    def active(self, x_BD: Tensor) -> Tensor:
        """Which experts a token takes, bool [B, E]; see the base.

        Args:
            x_BD: the input.
        """
        # A gain may cross zero; what counts is what is computed with.
        return scores(self._raw(x_BD), self.form, self.gain) != 0

    def _raw(self, x_BD: Tensor) -> Tensor:
        """The router's output [B, E]; zeros where there is no router."""
        if self.router is None:
            return x_BD.new_zeros((*x_BD.shape[:-1], self.form.experts))
        return F.linear(x_BD, self.router)

    def extra_repr(self) -> str:
        """Sizes and router."""
        return f"width={self.width}, form={self.form}"


__all__ = ["BlockFFNLayer"]
