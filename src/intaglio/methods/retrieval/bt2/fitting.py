"""Training of a head on cached vectors, and its file.

Dimension letters: P pairs, T distinct texts, H inputs, M old dimensions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.checkpoint.attachments import decode_metadata, encode_metadata
from intaglio.errors import IntaglioError
from intaglio.methods.base import Progress
from intaglio.methods.retrieval.bt2.functional import procrustes, pseudo_classifier
from intaglio.methods.retrieval.bt2.heads import CompatibleHead, HeadOutput, Rotation, Sizes, new_head
from intaglio.trainer.ranking_losses import info_nce

if TYPE_CHECKING:
    from intaglio.methods.retrieval.bt2 import BT2

WARMUP = 0.05
"""Share of the steps in which the rate rises."""


@dataclass(frozen=True)
class CachedPairs:
    """Queries and documents by both encoders, float32.

    Old vectors are normalised, but for the class means, which keep their length as in the authors' code: in a series
    of updates it is that of BT2's vectors.

    Args:
        query_PH: inputs of the head, vectors of the new encoder; a document may be its own query.
        document_PH: those of the documents.
        query_old_PM: the old encoder's.
        document_old_PM: those of the documents.
        document_P: number of the document, by which equal ones are known.
        labels_P: classes of the queries. Default: none, and the pairs are contrasted.
    """

    query_PH: Tensor
    document_PH: Tensor
    query_old_PM: Tensor
    document_old_PM: Tensor
    document_P: Tensor
    labels_P: Tensor | None = None


@torch.enable_grad()
def fit(
    method: BT2, pairs: CachedPairs, steps: int, learning_rate: float, batch_size: int, seed: int, progress: Progress
) -> CompatibleHead:
    """Return a head trained on cached vectors; see `BT2.fit_head`."""
    sizes = method.sizes(pairs.query_PH.shape[1], pairs.query_old_PM.shape[1])
    if sizes.old != pairs.query_old_PM.shape[1]:
        raise IntaglioError(f"old_dims is {sizes.old}; the old vectors have {pairs.query_old_PM.shape[1]} dimensions")
    if sizes.new != sizes.inputs and method.arm in ("bt2", "naive", "bct_distill") and method.independent_weight:
        raise IntaglioError(
            f"new_dims is {sizes.new}, and the new vectors have {sizes.inputs} dimensions; set independent_weight=0, or"
            " leave new_dims out"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = new_head(method.arm, sizes)
        labels_P = pairs.labels_P
        classes = 0 if labels_P is None else int(labels_P.max()) + 1
        classifier = torch.nn.Linear(_task_width(head, pairs), classes, bias=False) if classes else None
    if isinstance(head, Rotation):
        texts = [
            torch.cat(both)
            for both in ((pairs.query_PH, pairs.document_PH), (pairs.query_old_PM, pairs.document_old_PM))
        ]
        head.matrix_HD.copy_(procrustes(texts[0], F.normalize(texts[1], dim=-1)))
        return head.eval()
    old_KM = None if labels_P is None else pseudo_classifier(pairs.query_old_PM, labels_P, classes)
    parameters = [*head.parameters(), *(classifier.parameters() if classifier else ())]
    optimizer = torch.optim.Adam(parameters, learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if not len(order):
            order = torch.randperm(len(pairs.query_PH), generator=generator)
        chosen, order = order[:batch_size], order[batch_size:]
        loss = _loss(method, head, pairs, chosen, classifier, old_KM)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1, steps, "training")
    return head.eval()


def _loss(
    method: BT2, head: CompatibleHead, pairs: CachedPairs, chosen: Tensor, classifier: Any, old_KM: Tensor | None
) -> Tensor:
    """Return L of a batch of pairs."""
    inputs = [side[chosen] for side in (pairs.query_PH, pairs.document_PH)]
    both = head(torch.cat(inputs))  # at once, as the rotations are computed for each call
    query, document = (HeadOutput(*parts) for parts in zip(both.vectors.chunk(2), both.task.chunk(2), strict=True))
    old = tuple(F.normalize(side[chosen], dim=-1) for side in (pairs.query_old_PM, pairs.document_old_PM))
    number_B = pairs.document_P[chosen]
    excluded_BB = (number_B[:, None] == number_B).fill_diagonal_(False)
    teachers = {"old": old, "independent": tuple(inputs)}
    if classifier is None:
        task = info_nce(query.task @ document.task.T / method.temperature, excluded_BB)
        return method.total(head, query, document, task, teachers, excluded_BB).total
    assert pairs.labels_P is not None
    assert old_KM is not None
    label_B = pairs.labels_P[chosen]
    task = F.cross_entropy(classifier(query.task), label_B)
    logits_BK = head.old_block(query.vectors) @ old_KM.T / method.influence_temperature
    return method.total(head, query, document, task, teachers, excluded_BB, F.cross_entropy(logits_BK, label_B)).total


def _task_width(head: CompatibleHead, pairs: CachedPairs) -> int:
    with torch.no_grad():
        return int(head(pairs.query_PH[:1]).task.shape[1])


def _rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate: linear warm-up, then half a cosine."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return float(0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * (step - warmup) / max(1, steps - warmup))))


def dump_head(arm: str, head: CompatibleHead) -> bytes:
    """Return a head as a safetensors file."""
    from safetensors.torch import save

    about = {"arm": arm, "sizes": dataclasses.asdict(head.sizes)}
    tensors = {name: tensor.contiguous() for name, tensor in head.state_dict().items()}
    return bytes(save(tensors, encode_metadata(about)))


def load_head(path: Path) -> CompatibleHead:
    """Read a head.

    Raises:
        IntaglioError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = decode_metadata(file.metadata())
            head = new_head(about["arm"], Sizes(**about["sizes"]))
            head.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
        raise IntaglioError(f"the head {path} is missing or damaged: {str(error).splitlines()[0]}") from error
    return head.eval().requires_grad_(False)
