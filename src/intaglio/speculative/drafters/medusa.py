"""Medusa heads: residual blocks on the last hidden state, each head for one position further ahead.

    x_m = h_n + SiLU(W_m h_n + b_m)   (for each of `layers`, one after the other)
    logits_m = C_m x_m                predicts token n + 2 + m; the model itself predicts n + 1

The baseline of every method with trained heads: same training, same trees, same rule under sampling.

Source: Cai et al., Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, ICML 2024 (heads:
section 2.1; Medusa-1, the model frozen: section 2.2.1; the exact rule instead of typical acceptance, which loses).

Dimension letters: B rows, T tokens of a row, R states, K heads, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import HeadOnly, final_hidden
from intaglio.speculative._utils import check_count
from intaglio.speculative.drafters.dynamic_tree import draft_probs_fn
from intaglio.speculative.heads.candidates import CandidateSampler
from intaglio.speculative.heads.lm_head import DraftLMHead, DraftVocabulary, TargetHead
from intaglio.speculative.heads.multi_token_loss import Goal, multi_token_loss
from intaglio.speculative.protocols import DecodingRun, Session, Step
from intaglio.speculative.static_tree import StaticTree, best_tree, default_acceptance
from intaglio.speculative.tree import TokenTree, root_only
from intaglio.trainer.protocols import Batch, Loss


class MedusaHeads(nn.Module):
    """The heads; W and b start at 0, so that an untrained head predicts what the model itself does.

    Args:
        model: the target.
        heads: K. Default 3.
        layers: residual blocks of a head. Default 1.
        rank: of the change of the output matrix that the heads share; 0: none; None: each head has a full matrix of
            its own. Default 0.
        goal: `text` (cross-entropy, as in the paper) or `model` (KL divergence). Default `text`.
        decay: weight of each head relative to the one before. Default 0.8, as in the paper.
        tokens_K: tokens that may be guessed; see `DraftVocabulary`. Default: all.
        seed: of the initial low-rank change.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        heads: int = 3,
        layers: int = 1,
        rank: int | None = 0,
        goal: Goal = "text",
        decay: float = 0.8,
        tokens_K: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_count("heads", heads)
        check_count("layers", layers)
        parts = anatomy(model)
        if parts.head is None:
            raise IntaglioError(f"{type(model).__name__} has no output head, so nothing can be guessed for it")
        weight_VD: Tensor = parts.head.weight  # type: ignore[assignment]
        width = weight_VD.shape[1]
        self.heads, self.goal, self.decay = heads, goal, decay
        self.weights_KLDD = nn.Parameter(torch.zeros(heads, layers, width, width))
        self.biases_KLD = nn.Parameter(torch.zeros(heads, layers, width))
        self.words = DraftVocabulary(weight_VD, tokens_K)
        generator = torch.Generator().manual_seed(seed)
        self.vocabulary = DraftLMHead(self.words.matrix(weight_VD), heads, 1, rank, generator)
        self.ranks = 1  # candidates of each head that `loss` counts

    def states(self, hidden: Tensor) -> list[Tensor]:
        """Return the state of each head from last hidden states after the final norm [..., D], of the same shape."""
        states = []
        for weights_LDD, biases_LD in zip(self.weights_KLDD, self.biases_KLD, strict=True):
            state = hidden.to(weights_LDD.dtype)
            for weight_DD, bias_D in zip(weights_LDD, biases_LD, strict=True):
                state = state + F.silu(F.linear(state, weight_DD, bias_D))
            states.append(state)
        return states

    def score(self, states_RKD: Tensor, target: TargetHead) -> Tensor:
        """Return logits [R, K, W] of the tokens that may be guessed."""
        return torch.stack([self.vocabulary(x_RD, m, target) for m, x_RD in enumerate(states_RKD.unbind(1))], 1)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the weighted sum of the heads' losses; see `multi_token_loss`."""
        parts = anatomy(model)
        target, head = TargetHead(parts, self.words), HeadOnly(parts, frozen=False)
        hidden_BTD = final_hidden(parts, {"input_ids": batch["input_ids"]})
        return multi_token_loss(
            batch,
            self.states(hidden_BTD),
            hidden_BTD,
            lambda states_RKD: self.score(states_RKD, target),
            lambda hidden_RD: head.logits(hidden_RD[:, None])[:, 0],
            list(self.vocabulary.parameters()),
            goal=self.goal,
            ranks=self.ranks,
            weights=[self.decay**m for m in range(self.heads)],
            words=self.words,
        )


class Medusa:
    """Drafts with Medusa heads over the target's last hidden state.

    Args:
        heads: trained (`intaglio.speculative.heads.objective.train_heads`) or untrained.
        tree: the static tree. Default: 15 nodes.
        drawn: under sampling, whether candidates are drawn from the heads and verified by recursive rejection
            (default), or are the most likely ones.
        temperature: of the heads when they draw. Default None: the target's.
    """

    needs_hidden = True

    def __init__(
        self,
        heads: MedusaHeads,
        tree: StaticTree | None = None,
        *,
        drawn: bool = True,
        temperature: float | None = None,
    ) -> None:
        self.heads = heads
        self.tree = best_tree(default_acceptance(heads.heads), 15) if tree is None else tree
        self.drawn = drawn
        self.temperature = temperature

    def start(self, run: DecodingRun) -> Session:
        """Start a run; see `Drafter.start`.

        Raises:
            IntaglioError: heads of a model of another width or vocabulary.
        """
        weight_VD: Tensor = run.model.get_output_embeddings().weight
        width = self.heads.weights_KLDD.shape[-1]
        if weight_VD.shape[1] != width:
            raise IntaglioError(
                f"the heads are for a model of width {width}; the target's is {weight_VD.shape[1]}, so they belong to "
                "another checkpoint"
            )
        heads = self.heads.to(device=run.model.device, dtype=run.model.dtype).eval()
        to_probs = draft_probs_fn(run, self.temperature)
        sampler = CandidateSampler(to_probs, run.sampling and self.drawn, run.generator, heads.words)
        target = TargetHead(anatomy(run.model), heads.words)
        return LastHiddenSession(
            lambda hidden_RD: heads.score(torch.stack(heads.states(hidden_RD), 1), target), sampler, self.tree
        )


class LastHiddenSession:
    """A session that drafts from the target's last hidden state alone.

    Args:
        score: from hidden states [R, D] to the logits [R, K, W] of each level.
        sampler: takes candidates.
        tree: the static tree.
    """

    def __init__(self, score: Callable[[Tensor], Tensor], sampler: CandidateSampler, tree: StaticTree) -> None:
        self._score, self._sampler, self._tree = score, sampler, tree
        self._last: dict[int, tuple[int, Tensor]] = {}  # by row: the last token, and the state that predicted it

    def observe(self, steps: Sequence[Step]) -> None:
        """Keep each row's last state."""
        for step in steps:
            assert step.hidden is not None
            self._last[step.row] = (step.tokens[-1], step.hidden[-1])

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> list[TokenTree]:
        """See `Session.propose`."""
        roots = [self._last[row][0] for row in rows]
        if not max(room):
            return [root_only(root) for root in roots]
        logits_RKV = self._score(torch.stack([self._last[row][1] for row in rows]))
        return [
            self._sampler.cartesian(root, logits_KV, self._tree, most)
            for root, logits_KV, most in zip(roots, logits_RKV, room, strict=True)
        ]


__all__ = ["Medusa", "MedusaHeads"]
