"""The BlockFFN layer: experts without a gate, and a router that gives each a score.

Dimension letters: B any leading dimensions, T tokens, D width, E experts, H inner features of an expert, F = E H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.kernels import sparse_experts
from intaglio.methods.activations.blockffn.router import BlockFFNConfig, scores
from intaglio.modeling.replacement import ReplacedMLP


class BlockFFNLayer(ReplacedMLP):
    """A feed-forward layer of E experts of width H, of which each token takes those that its router opens.

        raw = x Wr^T,   score = RMSNorm(ReLU(raw)) with a gain g (see `router`)
        u = SiLU(x Wup^T), seen as [T, E, H], times score [T, E, 1]
        y = u Wdown^T

    Under `torch.no_grad` a few tokens (`kernels.sparse_experts.MOST_ROWS`) read the weights of the experts that some
    of them takes, and no others. Wdown lies transposed, so that an expert is a run of rows in both matrices.

    Args:
        width: D.
        config: experts, their width and the router.

    Attributes:
        router: Wr [E, D]; None where the config has no router.
        gain: g [E]; None where the config has none.
        up: Wup [F, D].
        down: Wdown, transposed [F, D].
        watched: whether passes with a gradient store `raw`. Default False.
        raw: the router's output [B, E] of the last such pass.
    """

    slug = "blockffn"

    def __init__(self, width: int, config: BlockFFNConfig) -> None:
        super().__init__(width)
        self.config = config
        inner = config.experts * config.expert_width
        self.router = None if config.router == "none" else nn.Parameter(torch.empty(config.experts, width))
        self.gain = nn.Parameter(torch.empty(config.experts)) if config.has_gain else None
        self.up = nn.Parameter(torch.empty(inner, width))
        self.down = nn.Parameter(torch.empty(inner, width))
        self.watched = False
        self.raw: Tensor | None = None

    @torch.no_grad()
    def draw(self, std: float, generator: torch.Generator, router_std: float | None = None) -> None:
        """Initialise: matrices normal, g one.

        Args:
            std: standard deviation of the matrices.
            generator: of the draws, on the CPU.
            router_std: standard deviation of the router. Default: `std`.
        """
        for weight, spread in ((self.router, router_std or std), (self.up, std), (self.down, std)):
            if weight is not None:
                weight.copy_(spread * torch.randn(weight.shape, generator=generator))
        if self.gain is not None:
            self.gain.fill_(1.0)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return y [B, D]."""
        raw_BE = self._raw(x_BD)
        if self.watched and torch.is_grad_enabled():
            self.raw = raw_BE
        score_TE = scores(raw_BE, self.config, self.gain).flatten(0, -2)
        y_TD = sparse_experts.apply(x_BD.reshape(-1, self.width), self.up, self.down, score_TE)
        return y_TD.view(x_BD.shape)

    @torch.no_grad()
    def active_units(self, x_BD: Tensor) -> Tensor:
        """Return which experts a token takes, bool [B, E]; see the base."""
        # A gain may cross zero, so the scores themselves are compared.
        return scores(self._raw(x_BD), self.config, self.gain) != 0

    def _raw(self, x_BD: Tensor) -> Tensor:
        """Return the router's output [B, E]; zeros where there is no router."""
        if self.router is None:
            return x_BD.new_zeros((*x_BD.shape[:-1], self.config.experts))
        return F.linear(x_BD, self.router)

    def extra_repr(self) -> str:
        """Return sizes and router."""
        return f"width={self.width}, config={self.config}"
