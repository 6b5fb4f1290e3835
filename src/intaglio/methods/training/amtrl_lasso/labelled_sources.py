"""Source tasks from files of labelled texts, embedded by a frozen encoder as they are drawn.

Dimension letters: N texts, D width of the embeddings, P principal components, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from intaglio.data.labelled_texts import LabelledTexts, load_labelled_texts
from intaglio.errors import IntaglioError
from intaglio.methods.training.amtrl_lasso.representation import Samples
from intaglio.trainer.rng import generator


@dataclass(frozen=True)
class Inputs:
    """Standardised principal components of embeddings, and a constant: `x = [(z - mean) P, 1]`."""

    mean_D: np.ndarray
    projection_DP: np.ndarray

    @classmethod
    def fitted(cls, z_ND: np.ndarray, components: int) -> Inputs:
        """Return the components of some embeddings, at most as many as embeddings or dimensions."""
        mean_D = z_ND.mean(0)
        _, singular, rows = np.linalg.svd(z_ND - mean_D, full_matrices=False)
        kept = min(components, int((singular > 1e-6 * singular[0]).sum()))
        return cls(mean_D, rows[:kept].T / (singular[:kept] / np.sqrt(len(z_ND))))

    def __call__(self, z_ND: np.ndarray) -> np.ndarray:
        """Return the inputs of embeddings [N, P + 1]."""
        return np.hstack([(z_ND - self.mean_D) @ self.projection_DP, np.ones((len(z_ND), 1))])


class Pool:
    """The texts of a source, embedded as they are drawn."""

    def __init__(
        self, texts: LabelledTexts, order: Sequence[int], embed: Callable[[Sequence[str]], np.ndarray]
    ) -> None:
        self.texts, self.order, self._embed = texts, order, embed
        self.available: int | None = len(texts)
        self.inputs: Inputs | None = None
        self._known_ND: np.ndarray | None = None

    def embedded(self, count: int) -> np.ndarray:
        """Return the embeddings of the first texts [count, D]."""
        known = 0 if self._known_ND is None else len(self._known_ND)
        if count > known:
            new_ND = self._embed([self.texts.texts[n] for n in self.order[known:count]])
            self._known_ND = new_ND if self._known_ND is None else np.concatenate([self._known_ND, new_ND])
        assert self._known_ND is not None  # count is above 0
        return self._known_ND[:count]

    def draw(self, count: int) -> Samples:
        """Return the first samples."""
        assert self.inputs is not None  # set before the algorithm draws
        labels = [self.texts.labels[n] for n in self.order[:count]]
        classes = self.texts.classes
        heads = classes[:1] if len(classes) == 2 else classes  # the second would be the negative of the first
        return Samples(self.inputs(self.embedded(count)), signs(labels, heads))


def read_classes(path: str) -> LabelledTexts:
    """Return the labelled texts of a file with at least two classes."""
    read = load_labelled_texts(path)
    if len(read.classes) < 2:
        raise IntaglioError(f"the labelled texts {path!r} have one class; at least two are needed")
    return read


def drawing_order(seed: int, name: str, texts: LabelledTexts) -> list[int]:
    """Return the order in which the texts of a source are drawn."""
    return torch.randperm(len(texts), generator=generator(seed, "amtrl_lasso", name)).tolist()


def signs(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Return the labels as 1 for a text's class and -1 for the others, [N, C]."""
    return np.where(np.array(labels)[:, None] == np.array(classes)[None], 1.0, -1.0)
