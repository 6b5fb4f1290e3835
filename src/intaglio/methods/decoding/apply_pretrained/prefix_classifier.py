"""Prefix classifiers q(a | x_1..x_t) on a frozen language model, and their use in conditional search.

    q(a | x_1..x_t, x_{t+1}) = sigmoid or softmax( W_2 GELU(W_1 [LN(h_t); LN(e(x_{t+1}))]) )

h_t is the model's last hidden state of the prefix and e the input embedding of the candidate, so that a candidate costs
a pass of the classifier and none of the model. Trained on every prefix of labelled texts.

Dimension letters: B rows, T tokens, N prefixes, K candidate tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.methods.decoding.apply_pretrained.conditional_search import Tokens
from intaglio.methods.decoding.apply_pretrained.init import draw_linears
from intaglio.modeling.anatomy import anatomy
from intaglio.trainer.causal_lm import IGNORED


class PrefixClassifier(nn.Module):
    """Classifier of a prefix and a candidate token.

    Args:
        width: D of the hidden states.
        embedding_width: of the input embeddings.
        classes: C; of a length, classes 0 to C - 2 are the tokens that remain and the last is C - 1 or more.
        hidden: width of its hidden layer. Default 128; 0: a linear classifier.
        seed: of the initial weights. Default 0.
    """

    def __init__(self, width: int, embedding_width: int, classes: int, hidden: int = 128, seed: int = 0) -> None:
        super().__init__()
        self.norm_hidden, self.norm_embedding = nn.LayerNorm(width), nn.LayerNorm(embedding_width)
        total = width + embedding_width
        first = [nn.Linear(total, hidden), nn.GELU()] if hidden else []
        self.layers = nn.Sequential(*first, nn.Linear(hidden or total, classes))
        draw_linears(self.layers, seed, "prefix classifier")

    @property
    def classes(self) -> int:
        """C."""
        last: Any = self.layers[-1]
        return int(last.out_features)

    def forward(self, hidden_ND: Tensor, embedding_NKD: Tensor) -> Tensor:
        """Return log-probabilities [N, K, C] of the classes for each candidate."""
        dtype = self.norm_hidden.weight.dtype
        embedded = self.norm_embedding(embedding_NKD.to(dtype))
        hidden = self.norm_hidden(hidden_ND.to(dtype))[:, None].expand(-1, embedded.shape[1], -1)
        log_probs: Tensor = self.layers(torch.cat([hidden, embedded], -1)).log_softmax(-1)
        return log_probs

    def loss(self, model: Any, ids_BT: Tensor, class_BT: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats over prefixes of two and more tokens; the model gets no gradient.

        Args:
            model: the language model.
            ids_BT: right-padded token ids.
            class_BT: class of each prefix x_1..x_t, -100 where it is unknown.
        """
        with torch.no_grad():
            hidden_BTD = anatomy(model).base(input_ids=ids_BT, use_cache=False).last_hidden_state
            embedding_BTD = model.get_input_embeddings()(ids_BT)
        log_probs = self(hidden_BTD[:, :-1].flatten(0, 1), embedding_BTD[:, 1:].flatten(0, 1)[:, None])[:, 0]
        targets = class_BT[:, 1:].flatten()
        total = F.nll_loss(log_probs, targets, ignore_index=IGNORED, reduction="sum")
        return total / (targets != IGNORED).sum().clamp(min=1)


def remaining_classes(length: int, complete: bool, classes: int) -> Tensor:
    """Return the class of each prefix of a text, int64 [length]: the tokens that remain before its end.

    Args:
        length: tokens of the text, an end token included if it is complete.
        complete: whether the text ends there. Of a text that was cut off the remaining length is only known to exceed
            that of the text: -100 unless that is the last class.
        classes: C.
    """
    remaining_T = torch.arange(length - 1, -1, -1) - (1 if complete else 0)
    class_T = remaining_T.clamp(max=classes - 1)
    if complete:
        class_T[-1] = IGNORED  # the prefix with the end token; its value is exact
        return class_T
    return torch.where(remaining_T >= classes - 1, class_T, IGNORED)


@dataclass(frozen=True)
class LengthAttribute:
    """Attribute "the text has `length` tokens"; ending a text decides it.

    Args:
        length: n, the end token left out.
        end_tokens: tokens that end a text.
        network: classifier of the remaining length. Default None: log q = 0 until the text is too long.
        embedding: the model's input embedding, for the network.
    """

    length: int
    end_tokens: Collection[int]
    network: PrefixClassifier | None = None
    embedding: nn.Module | None = None

    @torch.no_grad()
    def __call__(self, prefixes: Sequence[Tokens], hidden_ND: Tensor | None, tokens_NK: Tensor) -> Tensor:
        """Return log q of each extension, [N, K]."""
        length, device = len(prefixes[0]), tokens_NK.device
        remaining = self.length - length - 1
        ends_NK = torch.isin(tokens_NK, torch.tensor(list(self.end_tokens), device=device))
        value_NK = torch.zeros(tokens_NK.shape, device=device)
        if remaining < 0:
            value_NK.fill_(-torch.inf)
        elif self.network is not None and self.embedding is not None and hidden_ND is not None:
            log_probs_NKC = self.network(hidden_ND, self.embedding(tokens_NK))
            value_NK = log_probs_NKC[..., min(remaining, self.network.classes - 1)].float()
        return value_NK.masked_fill(ends_NK, 0.0 if length == self.length else -torch.inf)


@dataclass(frozen=True)
class LabelAttribute:
    """Attribute "the text belongs to class 1", by a trained classifier; for prefixes and for whole texts."""

    network: PrefixClassifier
    embedding: nn.Module

    @torch.no_grad()
    def __call__(self, prefixes: Sequence[Tokens], hidden_ND: Tensor | None, tokens_NK: Tensor) -> Tensor:
        """Return log q of each extension, [N, K]."""
        assert hidden_ND is not None
        log_q: Tensor = self.network(hidden_ND, self.embedding(tokens_NK))[..., 1]
        return log_q.float()
