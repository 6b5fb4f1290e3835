"""KaLMV2 (Zhao et al. 2026): bidirectional mean-pooled embeddings of a decoder, with weighted and mixed negatives.

The authors' code has the loss without w and h, expanded negatives, Matryoshka sizes, batches of one task, and the
mining of negatives. Sources leave open whether gradients flow through w and h, the number of h, T', and gamma: those
are options here. The template of instructions is the code's, with more spaces than the paper's. Unlike the code, texts
that are known to be relevant to a query are left out of its denominator, the window of ranks counts the other texts
alone, and the consistency filter keeps exactly `consistency` ranks (the code: one more).

Source: Zhao et al., KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile Embedding Model, ICLR
2026, arXiv 2506.20923; code: HITsz-TMG/KaLM-Embedding. Mixing in embedding space: Kalantidis et al., 2020, arXiv
2010.01028 (MoCHi).

Dimension letters: B queries, N documents, S mixed negatives, M own negatives of a query, D dimensions of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from intaglio.data.text_pairs import TextPair
from intaglio.measures.embeddings import Pooling
from intaglio.trainer.batch_gathering import gathered
from intaglio.trainer.contrastive import PooledObjective
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.ranking_losses import info_nce
from intaglio.trainer.rng import KeyedRNG

INSTRUCTION = "Instruct: {} \n Query: "
"""Text before a query, as in the authors' evaluation."""
SMALLEST_MISS = 1e-6
"""Least 1 - p under a gradient, which is infinite at 0 for gamma < 1."""


def focal_weight(log_prob_B: Tensor, gamma: float, *, detach: bool = True) -> Tensor:
    """Return (1 - p)^gamma of log-probabilities, float32 [B]."""
    miss_B = -torch.expm1(log_prob_B.detach() if detach else log_prob_B)
    return miss_B.clamp(min=0.0 if detach else SMALLEST_MISS) ** gamma


def pair_mixed(first_SD: Tensor, second_SD: Tensor, share_S: Tensor) -> Tensor:
    """Return unit(share first + (1 - share) second), [S, D]."""
    return F.normalize(torch.lerp(second_SD, first_SD, share_S[:, None]), dim=-1)


def list_mixed(scores_SN: Tensor, own_SN: Tensor, document_ND: Tensor, temperature: float) -> Tensor:
    """Return unit(sum_k alpha_k n_k) over each row's own documents, [S, D]."""
    alpha_SN = (scores_SN / temperature).masked_fill(~own_SN, -torch.inf).softmax(1)
    return F.normalize(alpha_SN @ document_ND, dim=-1)


def beta_2_2(count: int, draws: Generator) -> Tensor:
    """Return draws from Beta(2, 2): medians of three uniform numbers, float32 [count]."""
    return torch.rand(count, 3, generator=draws).median(1).values


def mixable(owner_N: Tensor, excluded_BN: Tensor) -> Tensor:
    """Return True at a query's own negatives, without texts that are known to be relevant to it, bool [B, N]."""
    query_B1 = torch.arange(len(excluded_BN), device=owner_N.device)[:, None]
    own_BN = (owner_N == query_B1) & ~excluded_BN
    own_BN[:, : len(excluded_BN)] = False
    return own_BN


class KaLMV2(PooledObjective, slug="kalm_v2"):
    """Dense encoder from a decoder without its causal mask, trained with weighted queries and mixed negatives.

        p_i = exp(s(q_i, p_i) / T) / Z_i        w_i = (1 - p_i)^gamma        L = mean_i -w_i log p_i
        pair-wise:  h = unit(lambda n_a + (1 - lambda) n_b),  lambda ~ Beta(2, 2)
        list-wise:  h = unit(sum_k alpha_k n_k),  alpha = softmax(s(q_i, n_k) / T')

    s is the cosine of mean-pooled states that see the whole text. Z_i sums over the query's positive, the other
    positives and the hard negatives of the whole batch, and the mixed negatives h of the query's own n_1 .. n_M.

    In a recipe: `train: {objective: {kalm_v2: {}}, pairs: pairs.jsonl, negatives: {encoder: self, ranks: [50, 100],
    count: 7, sample: true, consistency: 50}, homogeneous_ratio: 1.0, steps: 500}`, with `task`, `instruction` and
    `symmetric` in the pairs where tasks differ. The result loads in sentence-transformers and in `intaglio index DOCS
    -o INDEX --encoder OUT`. `intaglio soup OUT1 OUT2 -o OUT --mode uniform` averages trainings from one checkpoint. A
    second stage with `loss_type: distillation` fits a larger teacher's scores.

    Source: Zhao et al., KaLM-Embedding-V2, ICLR 2026, arXiv 2506.20923; choices that it leaves open are listed in
    `intaglio.methods.retrieval.kalm_v2`. The authors train Qwen2-0.5B at 1e-5 with a warm-up of a tenth, one epoch,
    batches of 48 a GPU, bfloat16.

    Args:
        variant: `bidirectional`, or `plain` with the causal mask. Default `bidirectional`.
        pooling: `mean`, `cls` or `last`. Default `mean`.
        temperature: T. Default 0.01, as in the authors' script; their class has 0.02.
        focal_gamma: gamma; 0: all queries weigh the same. Default 0.5.
        detach_weight: whether w has no gradient. Default True.
        pair_mixes: pair-wise mixed negatives of a query with two or more negatives. Default: as many as it has.
        list_mix: whether a query with two negatives has a list-wise mixed one. Default True.
        list_temperature: T'. Default: T.
        share_mixed: whether mixed negatives serve all queries of the batch, not only their own. Default False.
        detach_mixed: whether mixed negatives have no gradient, as in MoCHi. Default False.
        expanded_negatives: whether other queries are negatives of a query, and other positives of its positive.
            Default False.
        gather_negatives: whether the processes of a distributed run share their documents. Default True.
        instruction: task of the queries, which is put before them; a training pair's own `instruction` replaces it.
            Default "".
        instruct_documents: whether documents get the instruction too, for symmetric tasks; a training pair with its
            own instruction decides by its `symmetric`. Default False.

    Weights, mixing and expanded negatives act on info_nce.
    """

    kinds = ("objective", "encoder")
    summary = (
        "makes a dense encoder of a decoder without its causal mask, weighting hard queries, mixing hard negatives"
    )
    citation = "Zhao et al., KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile Embedding"
    citation += " Model, ICLR 2026"
    url = "https://arxiv.org/abs/2506.20923"

    variant: Literal["plain", "bidirectional"] = "bidirectional"
    pooling: Pooling = "mean"
    temperature: Annotated[float, Field(gt=0)] = 0.01
    focal_gamma: Annotated[float, Field(ge=0)] = 0.5
    detach_weight: bool = True
    pair_mixes: Annotated[int, Field(ge=0)] | None = None
    list_mix: bool = True
    list_temperature: Annotated[float, Field(gt=0)] | None = None
    share_mixed: bool = False
    detach_mixed: bool = False
    expanded_negatives: bool = False
    gather_negatives: bool = True
    instruction: str = ""
    instruct_documents: bool = False

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the authors' sizes of a text and of a vector, for a hidden size of 896, and seven negatives."""
        fields: dict[str, Any] = {
            "num_negatives": 7,
            "query_length": 512,
            "document_length": 512,
            "matryoshka": [896, 512, 256, 128, 64],
            "matryoshka_weights": [1.0, 0.3, 0.2, 0.1, 0.1],
        }
        return cls(**{**fields, **overrides})

    def _prompt(self, name: str, pair: TextPair | None = None) -> str:
        instruction, both = self.instruction, self.instruct_documents
        if pair is not None and pair.instruction is not None:
            instruction, both = pair.instruction, pair.symmetric
        prompt = super()._prompt(name)
        return INSTRUCTION.format(instruction) + prompt if instruction and (name == "query" or both) else prompt

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Add the drawn pairs of negatives: places `pair_first` and `pair_second` of documents, and `pair_share`."""
        batch = super().collate(examples, rng)
        own_BN = mixable(batch["owner"], batch["excluded"])
        drawn = [
            self._pairs(own_N.nonzero().flatten(), rng(example, "mixing"))
            for own_N, example in zip(own_BN, examples, strict=True)
        ]
        names = ("pair_first", "pair_second", "pair_share")
        return {
            **batch,
            **{name: torch.cat(parts) for name, parts in zip(names, zip(*drawn, strict=True), strict=True)},
        }

    def _pairs(self, own_M: Tensor, draws: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return pairs of distinct negatives of a query, each pair equally likely, with their shares."""
        negatives = len(own_M)
        count = negatives if self.pair_mixes is None else self.pair_mixes
        if negatives < 2 or self.loss_type != "info_nce":
            count = 0
        first_S = torch.randint(max(negatives, 1), (count,), generator=draws)
        second_S = first_S + torch.randint(1, max(negatives, 2), (count,), generator=draws)
        return own_M[first_S], own_M[second_S % max(negatives, 1)], beta_2_2(count, draws)

    def compare(self, query_BD: Tensor, document_ND: Tensor, batch: Batch) -> Loss:
        """Return the loss of this process's batch, or of all processes' batches."""
        if self.gather_negatives and torch.is_grad_enabled():
            query_BD, document_ND, batch = gathered(query_BD, document_ND, batch)
        return super().compare(query_BD, document_ND, batch)

    def contrast(self, query_BD: Tensor, document_ND: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the focal loss over documents and further negatives, and the scores of the documents."""
        scores_BN = query_BD @ document_ND.T
        if self.loss_type != "info_nce":
            return self.ranking_loss(scores_BN, batch), scores_BN
        blocks = [(scores_BN, batch["excluded"]), *self._mixed(query_BD, document_ND, scores_BN, batch)]
        if self.expanded_negatives:
            blocks += self._expanded(query_BD, document_ND, batch["excluded"])
        logits, excluded = (torch.cat(parts, dim=1) for parts in zip(*blocks, strict=True))
        logits = logits / self.temperature
        if not self.focal_gamma:
            return info_nce(logits, excluded), scores_BN
        loss_B = info_nce(logits, excluded, reduction="none")
        return (focal_weight(-loss_B, self.focal_gamma, detach=self.detach_weight) * loss_B).mean(), scores_BN

    def _mixed(
        self, query_BD: Tensor, document_ND: Tensor, scores_BN: Tensor, batch: Batch
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield scores of mixed negatives, and where they are left out: of other queries, or made of relevant texts."""
        excluded_BN, owner_N = batch["excluded"], batch["owner"]
        query_B1 = torch.arange(len(query_BD), device=owner_N.device)[:, None]
        first_S, second_S = batch["pair_first"], batch["pair_second"]
        if len(first_S):
            mixed_SD = pair_mixed(document_ND[first_S], document_ND[second_S], batch["pair_share"])
            left_out = excluded_BN[:, first_S] | excluded_BN[:, second_S]
            yield query_BD @ self._given(mixed_SD).T, left_out if self.share_mixed else owner_N[first_S] != query_B1
        own_BN = mixable(owner_N, excluded_BN)
        rows_S = (own_BN.sum(1) >= 2).nonzero().flatten()
        if self.list_mix and len(rows_S):
            own_SN, temperature = own_BN[rows_S], self.list_temperature or self.temperature
            mixed_SD = list_mixed(scores_BN[rows_S], own_SN, document_ND, temperature)
            left_out = excluded_BN.float() @ own_SN.float().T > 0
            yield query_BD @ self._given(mixed_SD).T, left_out if self.share_mixed else rows_S != query_B1

    def _given(self, mixed_SD: Tensor) -> Tensor:
        return mixed_SD.detach() if self.detach_mixed else mixed_SD

    def _expanded(self, query_BD: Tensor, document_ND: Tensor, excluded_BN: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield scores among queries and among positives; left out are pairs of which a text is relevant to both."""
        positive_BD = document_ND[: len(query_BD)]
        relevant_BB = excluded_BN[:, : len(query_BD)]
        left_out = relevant_BB | relevant_BB.T | torch.eye(len(query_BD), dtype=torch.bool, device=query_BD.device)
        for side_BD in (query_BD, positive_BD):
            yield side_BD @ side_BD.T, left_out
