"""Chimera (Zeng et al., 2024): a light drafter over the target's own hidden states and the tri-grams of all tokens.

    decoder = intaglio.load("out").decoder("chimera")       # after a recipe with fit: {chimera: {}}
    model.generate(**inputs, custom_generate=decoder)

- `drafting.py`: modules, masks, training loss
- `session.py`: drafting a tree, level by level
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field
from torch import Tensor, nn

from intaglio.methods.base import Workload
from intaglio.methods.decoding.chimera.model import ChimeraModel
from intaglio.methods.decoding.chimera.session import ChimeraSession
from intaglio.speculative.heads.base import TrainedHeads, blocks_of
from intaglio.speculative.heads.candidates import CandidateSampler
from intaglio.speculative.protocols import DecodingRun, Session
from intaglio.speculative.static_tree import CHIMERA, StaticTree


class Chimera(TrainedHeads, slug="chimera"):
    """Draft token by token with one decoder layer that reads the target's hidden states and tri-grams of tokens.

    With h_j the target's last hidden states (after its final norm) and e_i its input embeddings,

        u_i = P (g_i + SiLU(W g_i + b)),   g_i = [e_{i-2}; e_{i-1}; e_i]
        z^0 = F( u_{j+1} | h_0..h_j, u_1..u_{j+1} )
        logits_0 = C_0 [h_j; z^0]                                    of token j + 2; the target gives j + 1 itself

    and for each drafted token, as a node of depth m, with the tri-gram u' of its branch

        z^m = F( u' | h_0..h_j, z^0..z^{m-1} of its branch, u' ),    logits_m = C_m [h_j; z^m]

    F is one block of the target's architecture, with weights of its own; the target is frozen. Trained are W, b, P, F
    and C: sum_m CE(logits_m, token j + 2 + m), where head m reads the greedy guesses of the heads before it.

    For a large vocabulary C_m is the target's own output matrix, twice, and a change of low rank that the heads share:
    a full C_m would have 57 million entries for 49,152 tokens and a width of 576.

    Args:
        heads: M, heads for successive depths of the tree; deeper nodes use the last one. Default 4.
        rank: of the change that heads share; 0: none. Default: full matrices if they have no more than 2^20 entries
            together, else 32.
        head_sharing: one head for all depths, as the released code generates. Default false.
        start_from: `fresh` weights of F, or a `copy` of the target's block. Default `fresh`.
        feature: weight of MSE(h_{j+1}, z^0). Default 0, as in the released code; the paper has such a term.
        distil: weight of KL(target || head). Default 0, as in the released code; the paper has such a term.
        encoders: `all`; or for comparisons `no_trigram` (u of one token) or `no_context` (no F). Default `all`.
        learning_rate: peak learning rate, cosine to 0. Default 2e-4.
        seed: of the weights of heads that were never trained. Default 0.

    The other arguments (trees, sampling, text, training) are those of `intaglio.speculative.heads.base.TrainedHeads`.

    Raises:
        IntaglioError: heads of another checkpoint, and all that `Speculative` refuses.

    Source: Zeng et al., Chimera: A Lossless Decoding Method for Accelerating Large Language Models Inference by Fusing
    all Tokens, arXiv 2402.15758, and its released code (kafkayu/Chimera), which wins where the two differ. In the code
    the mask of the later heads hides even their own place; here each place sees its own branch, as the paper says.
    Under sampling candidates are drawn from the heads and verified by recursive rejection, so the output has
    the target's distribution; Medusa's typical acceptance, which the code's test uses, would change it and is not
    offered.
    """

    kinds = ("decoder", "drafter")
    summary = "drafts with one trained layer over the target's hidden states and token tri-grams; lossless"
    citation = (
        "Zeng et al., Chimera: A Lossless Decoding Method for Accelerating Large Language Models Inference by "
        "Fusing all Tokens, 2024"
    )
    url = "https://arxiv.org/abs/2402.15758"
    fitted = True

    level_cost: ClassVar[float] = 0.1  # measured with SmolLM2 on one core: F, the tri-grams and the output
    architecture: ClassVar[tuple[str, ...]] = ("heads", "rank", "head_sharing", "encoders")

    heads: Annotated[int, Field(ge=1, le=16)] = 4
    rank: Annotated[int, Field(ge=0, le=4096)] | None = None
    head_sharing: bool = False
    start_from: Literal["fresh", "copy"] = "fresh"
    feature: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    distil: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    encoders: Literal["all", "no_trigram", "no_context"] = "all"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the paper's settings, except full output matrices.

        The released code's tree of 25 nodes, the paper's feature and distillation losses, two epochs of rows of 1,024
        tokens and batches of 4 x 8.
        """
        constants: dict[str, Any] = {
            "heads": 4, "tree": [list(path) for path in StaticTree.from_paths(CHIMERA).paths[1:]], "feature": 1.0,
            "distil": 1.0, "epochs": 2.0, "length": 1024, "batch_size": 4, "accumulate": 8, "learning_rate": 2e-4,
            "warmup": 0.01,
        }  # fmt: skip
        return cls(**constants | overrides)

    @property
    def levels(self) -> int:
        """M."""
        return self.heads

    def make(self, model: nn.Module, seed: int, tokens_K: Tensor | None = None) -> ChimeraModel:
        """See `TrainedHeads.make`."""
        return ChimeraModel(
            model,
            heads=self.heads,
            rank=self.rank,
            start=self.start_from,
            encoders=self.encoders,
            sharing=self.head_sharing,
            feature=self.feature,
            distil=self.distil,
            tokens_K=tokens_K,
            seed=seed,
        )

    def begin(self, heads: Any, run: DecodingRun, sampler: CandidateSampler, tree: StaticTree) -> Session:
        """See `TrainedHeads.begin`."""
        return ChimeraSession(heads, run, sampler, tree)

    def head_flops(self, workload: Workload) -> float:
        """Count 2 M rows of F and M rows of logits per token, forward and backward, and the tri-grams."""
        head = self.draft_vocabulary(workload) * workload.hidden
        layer, trigram = workload.block_parameters / blocks_of(workload), 12.0 * workload.hidden**2
        return self.heads * (12.0 * layer + 4.0 * head + 6.0 * trigram)

    def head_bytes(self, workload: Workload) -> float:
        """Count about 30 states of the width for each of F's 2 M rows, and half as much for tri-grams."""
        return self.heads * (2 * 120.0 + 120.0) * workload.hidden


__all__ = ["Chimera"]
