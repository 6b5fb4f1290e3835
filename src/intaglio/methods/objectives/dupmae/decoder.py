"""The decoder of RetroMAE: one transformer layer whose queries know the sentence vector and their position alone.

    q_i = E(h)_i        k, v: h, E(x_1), .. E(x_{L-1})        A = softmax(Q K^T / sqrt(d) + M)
    o   = LN(q + W_o A V)        out = LN(o + FFN(o))

E adds positions and types and normalises, as the encoder's embeddings do; where these know no positions, the decoder
learns them. M hides a draw of words of each row, and the token itself.

Dimension letters: B texts, L tokens of a text, H heads, D width, K width of a head.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from intaglio.trainer.masked_lm import whole_word_mask
from intaglio.trainer.rng import generator

MASK_SETS = 256
"""Most draws of words of a text; each row takes one of them."""


def row_masks(begins_L: Tensor, special_L: Tensor, ratio: float, rng: torch.Generator) -> Tensor:
    """Return the columns that each row of the decoder sees, bool [L, L].

    Args:
        begins_L: tokens that begin a word.
        special_L: tokens that are never drawn, the sentence vector's place among them.
        ratio: share of the tokens that a row does not see, the token itself apart.
        rng: its source.
    """
    length = len(begins_L)
    sets = min(length, MASK_SETS)
    hidden_SL = torch.stack([whole_word_mask(begins_L, special_L, ratio, rng) for _ in range(sets)])
    hidden_LL = hidden_SL[torch.randint(sets, (length,), generator=rng)]
    return ~(hidden_LL | torch.eye(length, dtype=torch.bool))


class EnhancedDecoder(nn.Module):
    """One layer of the encoder's sizes with new weights.

    Args:
        config: the encoder's.
        seed: of the weights, drawn as BERT's.
        positions: rows of a table of positions of its own. Default 0: the encoder's embeddings add them.
    """

    def __init__(self, config: Any, seed: int, positions: int = 0) -> None:
        super().__init__()

        def named(default: Any, *names: str) -> Any:
            return next((getattr(config, name) for name in names if hasattr(config, name)), default)

        norm = partial(nn.LayerNorm, config.hidden_size, eps=named(1e-12, "layer_norm_eps", "norm_eps"))
        width, inner = int(config.hidden_size), int(config.intermediate_size)
        self.heads = int(config.num_attention_heads)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.into, self.out = nn.Linear(width, inner), nn.Linear(inner, width)
        self.attention_norm, self.output_norm = norm(), norm()
        self.activation = ACT2FN[named("gelu", "hidden_act", "hidden_activation")]
        self.dropout = nn.Dropout(named(0.0, "hidden_dropout_prob", "mlp_dropout"))
        self.attention_dropout = float(named(0.0, "attention_probs_dropout_prob", "attention_dropout"))
        self.positions = nn.Embedding(positions, width) if positions else None
        self.position_norm = norm() if positions else None
        rng = generator(seed, "dupmae")
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    module.weight.normal_(0.0, config.initializer_range, generator=rng)
                if isinstance(module, nn.Linear):
                    module.bias.zero_()

    def add_positions(self, states_BLD: Tensor) -> Tensor:
        """Return LN(states + positions); the states as they are where the encoder has added positions."""
        if self.positions is None or self.position_norm is None:
            return states_BLD
        known_BLD: Tensor = self.position_norm(states_BLD + self.positions.weight[: states_BLD.shape[1]])
        return known_BLD

    def forward(self, query_BLD: Tensor, context_BLD: Tensor, visible_BLL: Tensor) -> Tensor:
        """Return the outputs [B, L, D].

        Args:
            query_BLD: the sentence vector at every position.
            context_BLD: the sentence vector and the embeddings of the other tokens.
            visible_BLL: columns that a row sees; a row that sees none attends evenly, and is padding.
        """
        rows, length, width = query_BLD.shape
        shape = (rows, length, self.heads, width // self.heads)
        query_BHLK, key_BHLK, value_BHLK = (
            linear(states).view(shape).transpose(1, 2)
            for linear, states in ((self.query, query_BLD), (self.key, context_BLD), (self.value, context_BLD))
        )
        scores_BHLL = query_BHLK @ key_BHLK.transpose(-1, -2) / math.sqrt(shape[-1])
        scores_BHLL = scores_BHLL.masked_fill(~visible_BLL[:, None], torch.finfo(scores_BHLL.dtype).min)
        weights_BHLL = F.dropout(scores_BHLL.softmax(-1), self.attention_dropout, self.training)
        mixed_BLD = (weights_BHLL @ value_BHLK).transpose(1, 2).reshape(rows, length, width)
        hidden_BLD = self.attention_norm(query_BLD + self.dropout(self.output(mixed_BLD)))
        inner_BLD = self.out(self.activation(self.into(hidden_BLD)))
        return self.output_norm(hidden_BLD + self.dropout(inner_BLD))
