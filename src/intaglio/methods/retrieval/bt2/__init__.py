"""BT2 (Zhou et al. 2023): vectors of a new encoder that can be searched among those of the old one.

Source: Zhou et al., BT^2: Backward-compatible Training with Basis Transformation, ICCV 2023, arXiv 2211.03989; code:
YifeiZhou02/BT-2.

Dimension letters: B queries, N documents, M old dimensions, D dimensions of a vector.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint, load
from intaglio.data.text_pairs import as_pair
from intaglio.errors import IntaglioError
from intaglio.measures.embeddings import Pooling, pool, recorded_pooling
from intaglio.methods.base import Progress, no_progress
from intaglio.methods.registry import get_method
from intaglio.methods.retrieval.bt2.fitting import CachedPairs, dump_head, fit, load_head
from intaglio.methods.retrieval.bt2.functional import cosine_loss
from intaglio.methods.retrieval.bt2.heads import Arm, CompatibleHead, HeadOutput, Sizes, new_head
from intaglio.modeling.partial_pass import base_hidden
from intaglio.trainer.contrastive import Contrastive
from intaglio.trainer.encoder_training import SIDES, EncoderObjective
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.ranking_losses import accuracy, info_nce
from intaglio.trainer.rng import KeyedRNG


class BT2(EncoderObjective, slug="bt2"):
    """Backward-compatible encoder: its vectors are searched among those of an older encoder, without re-encoding them.

        phi = normalize(b[:n])    o = normalize(W relu(b))    e = normalize(o[:r])     b: features of the text
        u = [e, P (C phi)]        old' = Q u[:m]              new = [old', u[m:]]      P, Q orthogonal

        L = task(phi) + l2 influence(bhat, old) + l3 (1 - cos(bhat, old)) + l1 (1 - cos(phi, phi_new'))
        bhat = old' / |old'|          <new(x), new(y)> = C^2 <phi(x), phi(y)> + <e(x), e(y)>

    Of a new vector the first m coordinates are searched among old vectors, all n + r among new ones. With classes, as
    in the paper, the task is cross-entropy on W phi and the influence cross-entropy on bhat A^T, row k of A the mean
    old vector of class k. On pairs of texts, which is our generalisation, both are InfoNCE: of phi, and of bhat against
    the old vectors of the batch's documents. As in the authors' code o is normalised before it is cut, and again after.

    `intaglio index upgrade INDEX --encoder NEW` trains the head alone, on vectors of both encoders. In a recipe the
    encoder is trained as well: `train: {objective: {bt2: {old: minilm, old_dims: 384}}, pairs: pairs.jsonl}`.

    Source: Zhou et al., BT^2: Backward-compatible Training with Basis Transformation, ICCV 2023, arXiv 2211.03989. The
    authors train image classifiers with Adam at 1e-3.

    Args:
        arm: `bt2`; `bct`, one vector with the influence loss alone (Shen et al., CVPR 2020); `bct_distill`, the same
            with a projection that imitates the independent encoder; `naive`, old and new dimensions side by side;
            `procrustes`, a rotation of cached vectors, which `index upgrade` computes. Default `bt2`.
        old: the old encoder, a bundled name or a directory. Default: the checkpoint as it is before training.
        independent: phi_new', an encoder of the new data that need not be compatible, likewise. Default: none, which
            leaves its loss out.
        old_dims: m, dimensions of the old vectors. Default: the hidden size, or the width of cached vectors.
        new_dims: n, dimensions of phi. Default: the hidden size, or the width of cached vectors.
        extra_dims: r, dimensions of old information that are added, at most m. Default 32.
        scale: C, the weight of new information. Default 2.
        independent_weight: l1. Default 1.
        influence_weight: l2, BCT's alpha. Default 10.
        alignment_weight: l3. Default 5.
        influence_temperature: temperature of the influence. Default 1: as in the paper, its scores stay within -1 and
            1, for which the weights were chosen.
        pooling: `mean`, `cls` or `last`. Default: `last` for a causal decoder that reads a text as it is, else `mean`.

    Raises:
        IntaglioError: n + r is below m, the old encoder has other dimensions, or `procrustes` is to be trained.
    """

    kinds = ("objective", "encoder")
    summary = "trains a text encoder whose vectors can be searched among those of an older one, without re-indexing"
    citation = "Zhou et al., BT^2: Backward-compatible Training with Basis Transformation, ICCV 2023"
    url = "https://arxiv.org/abs/2211.03989"

    arm: Arm = "bt2"
    old: Annotated[str, Field(min_length=1)] | None = None
    independent: Annotated[str, Field(min_length=1)] | None = None
    old_dims: Annotated[int, Field(ge=1)] | None = None
    new_dims: Annotated[int, Field(ge=1)] | None = None
    extra_dims: Annotated[int, Field(ge=0)] = 32
    scale: Annotated[float, Field(gt=0)] = 2.0
    independent_weight: Annotated[float, Field(ge=0)] = 1.0
    influence_weight: Annotated[float, Field(ge=0)] = 10.0
    alignment_weight: Annotated[float, Field(ge=0)] = 5.0
    influence_temperature: Annotated[float, Field(gt=0)] = 1.0
    pooling: Pooling | None = None

    _teachers: dict[str, tuple[Checkpoint, EncoderObjective]] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _old_is_known(self) -> Self:
        if self.variant != "plain" and self.old is None:
            raise ValueError(f"old is missing; name the old encoder with variant {self.variant}")
        return self

    @property
    def normalize(self) -> bool:
        """False: vectors of BT2 have the length sqrt(C^2 + 1)."""
        return False

    def sizes(self, inputs: int, old: int | None = None) -> Sizes:
        """Return the sizes of a head for inputs [N, inputs] and old vectors [N, old]."""
        m = self.old_dims or old or inputs
        return Sizes(inputs, m, self.new_dims or inputs, min(self.extra_dims, m), self.scale)

    def build(self, checkpoint: Checkpoint, seed: int) -> nn.ModuleDict:
        """Return the head, and the digest of the old encoder's weights, which training fills in."""
        if self.arm == "procrustes":
            raise IntaglioError("the arm procrustes is not trained; `index upgrade --method procrustes` computes it")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = new_head(self.arm, self.sizes(int(checkpoint.config.hidden_size)))
        owned = nn.ModuleDict({"head": head, "old": nn.Module()})
        owned["old"].register_buffer("weights", torch.zeros(32, dtype=torch.uint8))
        return owned

    @property
    def head(self) -> CompatibleHead:
        """The head."""
        head: CompatibleHead = self._owned["head"]  # type: ignore[assignment]
        return head

    @property
    def extends(self) -> tuple[str, int]:
        """The digest of the old encoder's weights, and its dimensions: what the first coordinates can query."""
        weights: Any = self._owned["old"].weights
        return bytes(weights.tolist()).hex(), self.head.old_dimensions

    def dimensions(self, checkpoint: Checkpoint) -> int:
        """Return D."""
        return self.head.dimensions

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Tokenise the pairs, and add the vectors of the old and of the independent encoder, unit norm."""
        examples = list(examples)
        if "old" not in self._teachers:
            self._teachers["old"] = _teacher(self.old, checkpoint)
            if self.independent is not None:
                self._teachers["independent"] = _teacher(self.independent, checkpoint)
        rows = list(super().prepare(checkpoint, examples, rng))
        pairs = [as_pair(example, f"example {number} of the pairs") for number, example in enumerate(examples)]
        texts = {
            "query": list(dict.fromkeys(pair.query for pair in pairs)),
            "document": list(dict.fromkeys(text for pair in pairs for text in (pair.positive, *pair.negatives))),
        }
        for name, (teacher, method) in self._teachers.items():
            known = {
                side: dict(
                    zip(texts[side], F.normalize(method.encode(teacher, texts[side], side), dim=-1), strict=True)
                )
                for side in SIDES
            }
            self._check_width(name, known["query"][pairs[0].query].shape[0])
            for row, pair in zip(rows, pairs, strict=True):
                row[f"{name}_query"] = known["query"][pair.query]
                row[f"{name}_documents"] = torch.stack([known["document"][t] for t in (pair.positive, *pair.negatives)])
        old, method = self._teachers["old"]
        weights: Any = self._owned["old"].weights
        weights.copy_(torch.tensor(list(bytes.fromhex(method.digest(old.model)))))
        return rows

    def _check_width(self, name: str, width: int) -> None:
        sizes = self.sizes(int(self._checkpoint.config.hidden_size))
        wanted = sizes.old if name == "old" else sizes.new
        if width != wanted:
            field = "old_dims" if name == "old" else "new_dims"
            raise IntaglioError(f"the {name} encoder gives vectors of {width} dimensions, not {wanted}; set {field}")

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return both sides of a batch, and `old_*` and `independent_*`, float32 [B, M] and [N, M]."""
        batch = super().collate(examples, rng)
        places = list(zip(batch["owner"].tolist(), batch["place"].tolist(), strict=True))
        for name in ("old", "independent"):
            if f"{name}_query" in examples[0]:
                batch[f"teacher_{name}_query"] = torch.stack([row[f"{name}_query"] for row in examples])
                documents = [examples[row][f"{name}_documents"][place] for row, place in places]
                batch[f"teacher_{name}_document"] = torch.stack(documents)
        return batch

    def embed(self, model: nn.Module, inputs: Mapping[str, Tensor], side: str) -> Tensor:
        """Return the vectors and the part that the task is trained on, side by side."""
        output = self._forward(inputs)
        return torch.cat([output.vectors, output.task], 1)

    def searched(self, model: nn.Module, inputs: Mapping[str, Tensor], side: str) -> Tensor:
        """Return the vectors, float32 [N, D]."""
        return self._forward(inputs).vectors

    def _forward(self, inputs: Mapping[str, Tensor]) -> HeadOutput:
        hidden_NLH = base_hidden(self._parts, {name: inputs[name] for name in ("input_ids", "attention_mask")})
        output: HeadOutput = self.head(pool(hidden_NLH, inputs["pool_mask"], self.pooling or self.default_pooling))
        return output

    def compare(self, query_BD: Tensor, document_ND: Tensor, batch: Batch) -> Loss:
        """Return the loss of a batch."""
        width = self.head.dimensions
        query, document = (HeadOutput(both[:, :width], both[:, width:]) for both in (query_BD, document_ND))
        task = self.ranking_loss(query.task @ document.task.T, batch)
        known = {n: tuple(batch[f"teacher_{n}_{s}"] for s in SIDES) for n in self._known(batch)}
        return self.total(self.head, query, document, task, known, batch["excluded"])

    @staticmethod
    def _known(batch: Batch) -> list[str]:
        return [name for name in ("old", "independent") if f"teacher_{name}_query" in batch]

    def total(
        self,
        head: CompatibleHead,
        query: HeadOutput,
        document: HeadOutput,
        task: Tensor,
        teachers: Mapping[str, tuple[Tensor, ...]],
        excluded_BN: Tensor,
        influence: Tensor | None = None,
    ) -> Loss:
        """Return L on pairs.

        Args:
            head: gives the old block of vectors.
            query: outputs of the queries.
            document: outputs of the documents; document i belongs to query i.
            task: the task's loss.
            teachers: vectors of queries and documents by the `old` and perhaps the `independent` encoder.
            excluded_BN: True where a document is left out of a query's influence.
            influence: replaces the influence on pairs, where there are classes. Default: InfoNCE.
        """
        block_BM, block_NM = (head.old_block(side.vectors) for side in (query, document))
        old_BM, old_NM = teachers["old"]
        if influence is None:
            influence = info_nce(block_BM @ old_NM.T / self.influence_temperature, excluded_BN)
        total = task + self.influence_weight * influence
        parts = {"task": task, "influence": influence, "accuracy": accuracy(query.task @ document.task.T)}
        if self.arm in ("bt2", "naive"):
            parts["alignment"] = (cosine_loss(block_BM, old_BM) + cosine_loss(block_NM, old_NM)) / 2
            total = total + self.alignment_weight * parts["alignment"]
        if "independent" in teachers and self.arm in ("bt2", "naive", "bct_distill"):
            imitating = getattr(head, "to_independent", None) or nn.Identity()
            losses = [
                cosine_loss(imitating(o.task), t)
                for o, t in zip((query, document), teachers["independent"], strict=True)
            ]
            parts["imitation"] = (losses[0] + losses[1]) / 2
            total = total + self.independent_weight * parts["imitation"]
        return Loss(total, parts)

    def fit_head(
        self,
        pairs: CachedPairs,
        *,
        steps: int = 500,
        learning_rate: float = 1e-3,
        batch_size: int = 128,
        seed: int = 0,
        progress: Progress = no_progress,
    ) -> CompatibleHead:
        """Train a head on cached vectors of the old and of any new encoder; `procrustes` is computed.

        Args:
            pairs: vectors of both sides by both encoders, perhaps with classes.
            steps: optimizer steps. Default 500.
            learning_rate: the highest of a cosine schedule of Adam. Default 1e-3.
            batch_size: pairs of a step. Default 128.
            seed: of the start and of the order. Default 0.
            progress: called after each step.

        Raises:
            IntaglioError: n + r is below m, or `new_dims` is not the width of the new vectors.
        """
        return fit(self, pairs, steps, learning_rate, batch_size, seed, progress)

    @staticmethod
    def cached_pairs(*vectors: Tensor) -> CachedPairs:
        """Return the pairs of `fit_head` from vectors in the order of the fields of `CachedPairs`."""
        return CachedPairs(*vectors)

    def dump_head(self, head: CompatibleHead) -> bytes:
        """Return a head with its sizes as a safetensors file."""
        return dump_head(self.arm, head)

    @staticmethod
    def load_head(path: Path) -> CompatibleHead:
        """Read a file of `dump_head`."""
        return load_head(path)


def _teacher(name: str | None, checkpoint: Checkpoint) -> tuple[Checkpoint, EncoderObjective]:
    """Return an encoder as it was trained, or by its pooling; None: a frozen copy of the checkpoint."""
    if name is None:
        loaded = Checkpoint(
            copy.deepcopy(checkpoint.model), checkpoint.tokenizer, checkpoint.source, checkpoint.record,
            attachments=dict(checkpoint.attachments),
        )  # fmt: skip
        loaded.companions = dict(checkpoint.companions)
    else:
        loaded = load(name, device=str(checkpoint.device))
    loaded.model.eval().requires_grad_(False)
    if any("encoder" in get_method(slug).kinds for slug in loaded.attachments):
        method: EncoderObjective = loaded.encoder()
    else:
        method = Contrastive(pooling=recorded_pooling(loaded.companions, loaded.source))
    if method.sparse:
        raise IntaglioError(f"the old encoder {name!r} is sparse; a dense one is needed")
    return loaded, method


__all__ = ["BT2", "CachedPairs"]
