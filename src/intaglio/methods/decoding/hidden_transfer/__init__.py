"""HiddenTransfer (Wu et al., 2024): pseudo states of future tokens, carried through the target's later blocks.

    decoder = intaglio.load("out").decoder("hidden_transfer")       # after a recipe with fit: {hidden_transfer: {}}
    model.generate(**inputs, custom_generate=decoder)

- `transfer.py`: trained maps, mask, training loss
- `passing.py`: drafting inside the target's pass
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field
from torch import Tensor, nn

from intaglio.errors import IntaglioError
from intaglio.methods.base import Workload
from intaglio.methods.decoding.hidden_transfer.heads import TransferHeads, check_layers, default_layers
from intaglio.methods.decoding.hidden_transfer.session import HiddenTransferSession
from intaglio.modeling.anatomy import anatomy
from intaglio.speculative.heads.base import TrainedHeads, blocks_of
from intaglio.speculative.heads.candidates import CandidateSampler
from intaglio.speculative.protocols import DecodingRun, Session
from intaglio.speculative.static_tree import StaticTree


class HiddenTransfer(TrainedHeads, slug="hidden_transfer"):
    """Guess k tokens ahead by states that start in the middle of the stack and are refined by the blocks above.

    After block t_i, for every node n of the tree that the pass verifies and each step i = 1..k,

        p_n,i = W_i h_n^{t_i}

    joins the pass at position n + i. In the blocks above it sees the context, n with its ancestors, p_n,j for j < i,
    and itself; the nodes do not see it, so the target's own logits are unchanged. The target's norm and head turn it
    into a guess of the token n + i + 1. The guesses at the last accepted node fill the next tree: no pass is spent on
    drafting. W_i = I + D_i with D_i = 0 at first; training moves only D, towards the model's own distribution:

        loss = sum_i mean_n KL( p(. | x_<=n+i) || q_i(. | x_<=n) )

    A pass carries up to 1 + k rows per node in its upper blocks. The first pass of a run has nothing to draft from.

    Args:
        ahead: k, tokens drafted ahead. Default 3.
        layers: transfer layers t_1 <= ... <= t_k, each the number of blocks before it; 0: the embedding; the number
            of blocks: a linear head. Default: spread from two thirds to five sixths of the stack.
        goal: target of the training: `model`, the model's own distribution as above, or `text`, the text's next tokens
            by cross-entropy. Default `model`.
        decay: weight of each step relative to the one before. Default 1.
        state: weight of the mean squared distance between p_n,i and the true state h_{n+i}^{t_i}. Default 0.
        draft_rows: nodes with pseudo states: `all` (default); or `path`, only the deepest path: fewer rows, and a pass
            without a draft after it fails.

    The other arguments (trees, sampling, text, training) are those of `intaglio.speculative.heads.base.TrainedHeads`.

    Raises:
        IntaglioError: transfer layers that the model does not have, heads of another checkpoint, and all that
            `Speculative` refuses.

    Source: Wu et al., Parallel Decoding via Hidden Transfer for Lossless Large Language Model Acceleration, 2024, arXiv
    2404.12022. No code was released: number of steps, layers, identity start, learning rate and data are choices that
    fit the abstract. Sampling verifies drawn candidates by recursive rejection (`drawn`), so the output has the
    target's distribution.
    """

    kinds = ("decoder", "drafter")
    summary = "drafts inside the target's pass, by trained maps to pseudo hidden states of future tokens; lossless"
    citation = "Wu et al., Parallel Decoding via Hidden Transfer for Lossless Large Language Model Acceleration, 2024"
    url = "https://arxiv.org/abs/2404.12022"
    fitted = True

    architecture: ClassVar[tuple[str, ...]] = ("ahead", "layers")
    needs_hidden: ClassVar[bool] = False

    ahead: Annotated[int, Field(ge=1, le=16)] = 3
    layers: list[int] | None = None
    goal: Literal["model", "text"] = "model"
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    state: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    draft_rows: Literal["all", "path"] = "all"

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the settings of the abstract, with Medusa's tree size of 64 nodes."""
        return cls(**{"ahead": 3, "nodes": 64, **overrides})

    @property
    def levels(self) -> int:
        """k."""
        return self.ahead

    def rows_per_node(self) -> float:
        """Count a node's own row, and its pseudo states in about the last quarter of the blocks."""
        return 1.0 + (self.ahead / 4 if self.draft_rows == "all" else 0.0)

    def transfer_layers(self, blocks: int) -> tuple[int, ...]:
        """Return the transfer layers in a model of so many blocks.

        Raises:
            IntaglioError: the model does not have them.
        """
        layers = default_layers(self.ahead, blocks) if self.layers is None else tuple(self.layers)
        check_layers(layers, self.ahead, blocks)
        return layers

    def make(self, model: nn.Module, seed: int, tokens_K: Tensor | None = None) -> TransferHeads:
        """Return maps that transfer states unchanged; `seed` is ignored."""
        layers = self.transfer_layers(len(anatomy(model).blocks))
        return TransferHeads(model, layers, goal=self.goal, decay=self.decay, state=self.state, tokens_K=tokens_K)

    def begin(self, heads: Any, run: DecodingRun, sampler: CandidateSampler, tree: StaticTree) -> Session:
        """See `TrainedHeads.begin`.

        Raises:
            IntaglioError: a tree that is deeper than the heads look.
        """
        if tree.depth > self.ahead:
            raise IntaglioError(f"the tree is {tree.depth} levels deep; the heads look {self.ahead} ahead")
        return HiddenTransferSession(heads, run, sampler, tree, self.draft_rows == "path")

    def head_flops(self, workload: Workload) -> float:
        """Count k rows per token in the upper third of the stack, forward and backward, and k + 1 rows of logits."""
        outside = workload.parameters - workload.block_parameters
        head = self.draft_vocabulary(workload) * workload.hidden
        return self.ahead * (2.0 * workload.block_parameters + 4.0 * head) + 2.0 * outside

    def head_bytes(self, workload: Workload) -> float:
        """Count about 20 states of the width for each of k rows in a third of the blocks."""
        return self.ahead * blocks_of(workload) / 3 * 80.0 * workload.hidden


__all__ = ["HiddenTransfer"]
