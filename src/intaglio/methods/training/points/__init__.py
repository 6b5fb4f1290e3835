"""POINTS (Liu et al. 2024): an affordable recipe for vision-language models, its parts usable alone.

    ppl(s) = exp(-(1/N) sum_i log P(w_i | image, prompt, w_<i))    over the N tokens of a caption; the lowest 20 % stay
    greedy soup: models tuned on D + d_i, best first, join the mean while its validation score does not fall

- here: `POINTS`, the perplexity filter as a selector for any texts or pairs; `individual_select`.
- `perplexity`: perplexities of samples; `caption_perplexity` for models that read images.
- `vision`: `DualEncoder` and `pixel_shuffle`.
- `data.image_tiles`: CATTY tiling, which keeps aspect ratios, and the tiling of InternVL 1.5.
- `checkpoint.soup`, `intaglio soup`: uniform, maximum and greedy soups of models tuned on different data sets.

The authors' filter drops the last position of a row, a line break after the end token, rounds probabilities to bfloat16
and cuts a chat header of 14 tokens; here the answer and its end token are scored in float32. Their soup script averages
uniformly; the greedy soup follows the paper's text. Training of the OCR encoder and the rewriting of captions by a
language model are ordinary training and generation.

Source: Liu et al., POINTS: Improving Your Vision-language Model with Affordable Strategies, arXiv 2409.04828; code
WePOINTS/WePOINTS.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import Field

from intaglio.checkpoint import Checkpoint, load
from intaglio.errors import IntaglioError, shorten
from intaglio.methods.base import Capability, Method, Progress, no_progress
from intaglio.methods.training.points.perplexity import caption_perplexity, lowest, perplexities
from intaglio.methods.training.points.vision import DualEncoder, pixel_shuffle
from intaglio.trainer.dataset import as_example
from intaglio.trainer.protocols import Example, Selection
from intaglio.trainer.rng import KeyedRNG
from intaglio.trainer.tokenised_samples import Sample, read_samples

__all__ = ["POINTS", "DualEncoder", "caption_perplexity", "individual_select", "perplexities", "pixel_shuffle"]

T = TypeVar("T")
SHOWN = 3
"""Examples in the report at each end of the order."""


class POINTS(Method, slug="points"):
    """Selector that keeps the training examples with the lowest perplexity under a language model.

        ppl(s) = exp(-(1/N) sum_i log P(w_i | prompt, w_<i))

    In a recipe: `train: {select: {points: {budget: 0.2}}, ...}`. Pairs are scored on their answers, texts on every
    token after the first. In a stock `Trainer`:

        checkpoint = intaglio.load("smollm2")
        examples = all_examples(checkpoint, texts)
        chosen = POINTS().select(examples, checkpoint, None, 0.2, KeyedRNG(0))
        rows = training_rows(CausalLM(length=256), checkpoint, [texts[n] for n in chosen], KeyedRNG(0))
        Trainer(checkpoint.model, arguments, EpochCollator(CausalLM(), KeyedRNG(0), labels=True), rows).train()

    Low perplexity means common knowledge; the highest fifth holds rare facts such as serial numbers, and also damaged
    text. The scorer must not have been trained on the pool: what a model has memorised looks common to it.

    Args:
        budget: share of the examples that are kept, above 0 and at most 1. Default 0.2, the paper's.
        keep: whether those of `lowest` (default) or `highest` perplexity are kept, for comparison.
        scorer: model that scores: a bundled name, a directory or a hub id. Default: the model to be trained.
        length: tokens of an example that are read. Default: the scorer's context, at most 1,024.
        chat: whether prompts are put into the scorer's chat template, if it has one. Default true.
        batch_size: examples of a forward pass. Default 8.

    Raises:
        IntaglioError: (while selecting) an example is malformed, the scorer cannot be loaded or is no causal model, or
            a prediction is not finite.

    Source: Liu et al., POINTS, arXiv 2409.04828, section 3.2.
    """

    kinds = ("selector",)
    summary = "keeps the training examples that a language model finds least surprising; with soups and image tiles"
    citation = (
        "Liu et al., POINTS: Improving Your Vision-language Model with Affordable Strategies, arXiv 2409.04828, 2024"
    )
    url = "https://arxiv.org/abs/2409.04828"

    requires: ClassVar[frozenset[Capability]] = frozenset({"causal", "tokenizer"})
    compares: ClassVar[bool] = False

    budget: Annotated[float, Field(gt=0, le=1)] = 0.2
    keep: Literal["lowest", "highest"] = "lowest"
    scorer: Annotated[str, Field(min_length=1)] | None = None
    length: Annotated[int, Field(ge=2)] | None = None
    chat: bool = True
    batch_size: Annotated[int, Field(ge=1)] = 8

    def select(
        self,
        dataset: Sequence[Example],
        model: Checkpoint,
        original: Checkpoint | None,
        budget: float,
        rng: KeyedRNG,
        *,
        progress: Progress = no_progress,
    ) -> Selection:
        """Return the indices of the examples that are kept, in ascending order, and a summary."""
        scorer = model if self.scorer is None else load(self.scorer, device=model.device)
        samples = self._samples(dataset, scorer)
        if not samples:
            raise IntaglioError("points chooses among examples, and there are none; give training data")
        scores = perplexities(samples, scorer, batch_size=self.batch_size, progress=progress)
        kept = sorted(lowest(scores, budget, self.keep == "highest"))
        facts = {"examples": len(scores), "chosen": len(kept), "keep": self.keep}
        order = [n for n in lowest(scores, 1.0) if scores[n] < float("inf")]
        if not order:
            return Selection(kept, facts)
        of_all, of_kept = ([scores[n] for n in order if n in among] for among in (set(order), set(kept)))
        marks = {"least": of_all[0], "median": statistics.median(of_all), "greatest": of_all[-1]}
        marks |= {"median of the chosen": statistics.median(of_kept)} if of_kept else {}
        ends = dict.fromkeys([*order[:SHOWN], *order[-SHOWN:]])
        table = [
            {"example": shorten(samples[n].words), "perplexity": scores[n], "chosen": "yes" if n in kept else "no"}
            for n in ends
        ]
        bars = {"title": "Perplexities of the training examples", "axis": "perplexity", "items": marks}
        return Selection(kept, {**facts, "clusters": table, "bars": bars})

    def scores(
        self, examples: Sequence[Example], scorer: Checkpoint, *, progress: Progress = no_progress
    ) -> list[float]:
        """Return the perplexity of each example, infinite where nothing is scored."""
        return perplexities(self._samples(examples, scorer), scorer, batch_size=self.batch_size, progress=progress)

    def _samples(self, examples: Sequence[Example], scorer: Checkpoint) -> list[Sample]:
        """Tokenise examples for the scorer."""
        rows = []
        for number, example in enumerate(examples):
            if self.scorer is not None and isinstance(example, dict) and "input_ids" in example:
                if "text" not in example:
                    raise IntaglioError(f"example {number} has only token ids; the scorer {self.scorer} needs its text")
                example = {name: value for name, value in example.items() if name != "input_ids"}
            rows.append(as_example(scorer, number, example, keep_text=True))
        return read_samples(rows, scorer, self.length, chat=self.chat)


def individual_select(
    candidates: Sequence[T], score: Callable[[list[T]], float], base: Sequence[T] = ()
) -> tuple[list[T], float]:
    """Return the data sets of POINTS's Individual Select: each is added to the set if the score rises.

    Args:
        candidates: data sets d_1..d_k, in the order in which they are tried.
        score: trains on a list of data sets and returns a validation score, higher being better. It is called once
            for each candidate, and once for the base if there is any.
        base: data sets that are always used. Default: none.

    Returns:
        The chosen data sets, those of the base first, and their score.
    """
    chosen = list(base)
    best = score(chosen) if chosen else -float("inf")
    for candidate in candidates:
        value = score([*chosen, candidate])
        if value > best:
            chosen, best = [*chosen, candidate], value
    return chosen, best
