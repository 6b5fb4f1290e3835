"""Soups of checkpoints: models averaged by a metric on a validation split, and measured on another one."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from torch import Tensor

from intaglio import atomic_io
from intaglio.checkpoint import Checkpoint, load, load_config, load_record
from intaglio.checkpoint.loading import load_tokenizer, unlike_tokens
from intaglio.checkpoint.resolve import resolve, split_revision
from intaglio.checkpoint.soup import NamedState, Score, Soup, Source, average, greedy, maximum, uniform, weight_cosine
from intaglio.data.labelled_examples import load_labelled_examples
from intaglio.data.segments import segments
from intaglio.data.text_pairs import load_text_pairs
from intaglio.data.texts import document_hash, load_texts
from intaglio.data.token_classification import read_labelled
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.measures.language_modeling import quality
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.classifier import is_whole_input_classifier
from intaglio.trainer.classification import make_evaluator as classes_evaluator
from intaglio.trainer.encoder_training import EncoderObjective
from intaglio.trainer.retrieval_evaluation import retrieval_evaluator
from intaglio.trainer.token_classification import make_evaluator

Mode = Literal["greedy", "maximum", "uniform"]
RELATED = 0.5
"""Least cosine between the weights of models that were fine-tuned from one checkpoint."""
ADAPTER = "adapter_config.json"

Measured = Callable[[Checkpoint], float]


@dataclass(frozen=True)
class Sizes:
    """Size of the text that perplexity is measured on: segments, and tokens of a segment."""

    samples: int = 64
    length: int = 512


@dataclass(frozen=True)
class Split:
    """Data for a metric: a function of a checkpoint, and the hashes of the examples."""

    name: str
    measure: Measured
    hashes: frozenset[str]

    def check_apart(self, other: Split, role: str) -> None:
        """Refuse examples that another split holds as well."""
        shared = self.hashes & other.hashes
        if shared:
            raise IntaglioError(
                f"{len(shared)} of the {len(self.hashes)} examples of {self.name} are in the {role} split {other.name}"
                " as well; give data that are not"
            )


def _texts(name: str, metric: str, checkpoint: Checkpoint, sizes: Sizes) -> Split:
    corpus = load_texts(name)
    length = min(sizes.length, checkpoint.context)
    data = segments(checkpoint.tokenizer, corpus, sizes.samples, length, seed=0, fewer=True)
    key = metric.replace(" ", "_")

    def measure(checkpoint: Checkpoint) -> float:
        value = getattr(quality(checkpoint, data), key)
        return float("nan") if value is None else value

    return Split(name, measure, frozenset(corpus.hashes))


def _pairs(name: str, metric: str, checkpoint: Checkpoint, sizes: Sizes) -> Split:
    pairs = load_text_pairs(name)
    encoder: EncoderObjective = checkpoint.encoder()
    evaluate = retrieval_evaluator(encoder, pairs)
    hashes = (document_hash(f"{pair.query}\n{pair.positive}") for pair in pairs)
    return Split(name, lambda checkpoint: evaluate(checkpoint)[metric], frozenset(hashes))


def _labels(name: str, metric: str, checkpoint: Checkpoint, sizes: Sizes) -> Split:
    if is_whole_input_classifier(checkpoint.model):
        whole = load_labelled_examples(name)
        score = classes_evaluator(whole.rows)
        return Split(name, lambda checkpoint: score(checkpoint)[metric], frozenset(whole.hashes))
    examples = read_labelled(name)
    evaluate = make_evaluator(examples)
    hashes = frozenset(document_hash(repr(sorted(example.items()))) for example in examples)
    return Split(name, lambda checkpoint: evaluate(checkpoint)[metric], hashes)


@dataclass(frozen=True)
class SoupMetric:
    """A metric by name: how its data are read, and its direction."""

    read: Callable[[str, str, Checkpoint, Sizes], Split]
    higher_is_better: bool = True


METRICS: dict[str, SoupMetric] = {
    "perplexity": SoupMetric(_texts, higher_is_better=False),
    "bits_per_byte": SoupMetric(_texts, higher_is_better=False),
    "nDCG@10": SoupMetric(_pairs),
    "MRR@10": SoupMetric(_pairs),
    "accuracy": SoupMetric(_labels),
    "macro_f1": SoupMetric(_labels),
}
"""Data: texts for language models, pairs for text encoders, labelled texts, images or words for classifiers."""


def soup(
    models: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    mode: Mode = "greedy",
    metric: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    training: str | None = None,
    top: int = 3,
    sizes: Sizes = Sizes(),
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Average checkpoints that were fine-tuned from one, and save the result as a checkpoint.

    Args:
        models: bundled names, directories or hub ids, at least two.
        output: directory to make.
        mode: `greedy` (default) adds models, best first, while the validation metric does not fall; `maximum` takes the
            mean of the best `top`; `uniform` that of all.
        metric: a key of `METRICS`; needed for greedy and maximum.
        validation: data of the metric, on which models are chosen: texts, a file of pairs, or labelled examples.
        test: other data of the same kind, on which the soup and every model are measured for the report. Default: none.
        training: data that the models were trained on, of the same kind; refused if the others share an example.
            Default: what the models' records name.
        top: models of a maximum soup. Default 3.
        sizes: text that perplexities are measured on.
        device: where to load the models. Default: the CPU.
        overwrite: replace the output. Default False.
        progress: called after each measurement.

    Returns:
        Plain data: mode, metric, splits, `models` with their `validation` and `test` values and whether each is in the
        soup, `trials` in order, `score` and `test_score` of the soup, and `notes`; None where nothing was measured.

    Raises:
        IntaglioError: a name, metric or mode is unknown, shapes differ, or splits overlap.
    """
    names = [os.fspath(model) for model in models]
    higher = _check(names, mode, metric, validation, test, top)
    atomic_io.check_target(Path(output), overwrite)
    checkpoint = load(names[0], device=device)
    sources, notes = _sources(names, checkpoint, device)
    splits = _splits(metric, checkpoint, sizes, validation, test, training, names)
    validated, tested = splits.get("validation"), splits.get("test")
    done, most = 0, 2 * len(names) * (validated is not None) + (len(names) + 1) * (tested is not None)

    def measured(split: Split) -> Score:
        def score(state: dict[str, Tensor]) -> float:
            nonlocal done
            _fill(checkpoint, state)
            value = split.measure(checkpoint)
            done += 1
            progress(done, max(done, most), f"measuring on {split.name}")
            return value

        return score

    result = _soup(sources, mode, top, higher, None if validated is None else measured(validated))
    on_test: list[float | None] = [None] * (len(names) + 1)
    if tested is not None:
        on_test = [_number(measured(tested)(average([source]))) for source in sources]
        on_test.append(_number(measured(tested)(result.state)))
    _fill(checkpoint, result.state)
    _record(checkpoint, {"models": names, "mode": mode, "metric": metric, "top": top}, result, validation, test)
    checkpoint.save(output, overwrite)
    alone = {trial.members[0]: _number(trial.score) for trial in result.log if len(trial.members) == 1}
    rows = [
        {"model": name, "validation": alone.get(n), "test": on_test[n], "in_soup": n in result.chosen}
        for n, name in enumerate(names)
    ]
    trials = [{"models": list(t.members), "score": _number(t.score), "kept": t.kept} for t in result.log]
    measures = {"validation": validation, "test": test, "higher_is_better": higher}
    totals = {"score": _number(result.score), "test_score": on_test[-1]}
    return {"mode": mode, "metric": metric, **measures, "models": rows, "trials": trials, **totals,
            "checkpoint": os.fspath(output), "notes": notes}  # fmt: skip


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _check(
    names: Sequence[str], mode: str, metric: str | None, validation: str | None, test: str | None, top: int
) -> bool:
    """Refuse arguments that do not fit together; return whether higher values of the metric are better."""
    if len(names) < 2:
        raise IntaglioError(f"a soup of {len(names)} model is given; two or more are accepted")
    twice = next((name for n, name in enumerate(names) if name in names[:n]), None)
    if twice is not None:
        raise IntaglioError(f"the model {twice} is given twice; give each once")
    if mode not in get_args(Mode):
        raise IntaglioError(f"mode is {mode!r}; {did_you_mean(mode, get_args(Mode))}")
    if metric is not None and metric not in METRICS:
        raise IntaglioError(f"there is no metric named {metric!r}; {did_you_mean(metric, METRICS)}")
    if mode != "uniform" and (metric is None or validation is None):
        raise IntaglioError(f"a {mode} soup chooses by a metric on validation data; give both metric and validation")
    if metric is None and (validation is not None or test is not None):
        raise IntaglioError(f"data are given without a metric; accepted: {', '.join(METRICS)}")
    if mode == "maximum" and not 1 <= top <= len(names):
        raise IntaglioError(f"top is {top}; a number from 1 to the {len(names)} models is accepted")
    return metric is None or METRICS[metric].higher_is_better


def _sources(names: Sequence[str], first: Checkpoint, device: str | None) -> tuple[list[Source], list[str]]:
    """Return the weights of the models, on disk where the loader takes them unchanged, and warnings."""
    for name in names:
        if Path(name, ADAPTER).is_file():
            raise IntaglioError(f"{name} holds an adapter, whose factors cannot be averaged; merge it into its model")
        record = load_record(name)
        if ([] if record is None else record.live) != first.record.live:
            raise IntaglioError(f"{name} and {names[0]} need different modules at run time; a soup needs equal ones")
        labels = getattr(load_config(name)[1], "id2label", None)
        if labels != getattr(first.model.config, "id2label", None):
            raise IntaglioError(f"{name} and {names[0]} have different labels; a soup needs equal ones in one order")
        if first.tokenizer is not None:
            _check_tokenizers(name, load_tokenizer(resolve(name)[0]), names[0], first.tokenizer)
    fitted = next((slug for slug, part in first.attachments.items() if part.tensors), None)
    if fitted is not None:
        raise IntaglioError(f"{names[0]} has the attachment {fitted} with weights of its own; average models without")
    sources: list[Source] = []
    known = set(first.model.state_dict())
    for name in names:
        place, local = resolve(split_revision(name)[0])
        if local and _tensor_names(place) <= known:
            sources.append(place)
        else:
            sources.append(NamedState(load(name, device=device).model.state_dict(), name))
    notes = []
    for name, other in zip(names[1:], sources[1:], strict=True):
        cosine = weight_cosine(sources[0], other)
        if cosine is not None and cosine < RELATED:
            notes.append(
                f"{name} and {names[0]} seem to come from different initialisations (the cosine of their weights is"
                f" {cosine:.2f}); the mean of unrelated models is useless"
            )
            warnings.warn(notes[-1], stacklevel=3)
    return sources, notes


def _check_tokenizers(name: str, own: Any, first_name: str, first: Any) -> None:
    """Refuse tokenizers in which an id stands for different tokens; one may have more tokens, or be missing."""
    unlike = {} if own is None else unlike_tokens(first, own)
    if unlike:
        id, (wanted, token) = next(iter(unlike.items()))
        raise IntaglioError(
            f"{name} and {first_name} have different tokenizers ({len(unlike):,} ids stand for other tokens, first {id}"
            f" for {token!r} and {wanted!r}); a soup needs equal ones"
        )


def _tensor_names(place: str) -> set[str]:
    """Return the names of the tensors of a checkpoint directory."""
    names: set[str] = set()
    for file in Path(place).glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            names |= set(handle.keys())
    return names


def _splits(
    metric: str | None,
    checkpoint: Checkpoint,
    sizes: Sizes,
    validation: str | None,
    test: str | None,
    training: str | None,
    models: Sequence[str],
) -> dict[str, Split]:
    """Read the data of a metric, and refuse overlaps."""
    if metric is None:
        return {}
    given = {"validation": validation, "test": test, "training": training}
    read = METRICS[metric].read
    splits = {role: read(name, metric, checkpoint, sizes) for role, name in given.items() if name is not None}
    for role, split in splits.items():
        for other, held in splits.items():
            if list(given).index(role) < list(given).index(other):
                split.check_apart(held, other)
    for model in models:
        trained = _trained_on(model)
        for role in ("validation", "test"):
            if given[role] is not None and os.path.realpath(str(given[role])) in trained:
                raise IntaglioError(
                    f"the {role} split {given[role]} is what {model} was trained on by its record; give held-out data"
                )
    return splits


def _trained_on(model: str) -> set[str]:
    """Return the paths (or names) of the data that a model's record says it was trained on."""
    record = load_record(model)
    steps = [] if record is None else record.steps
    data = [step.chosen.get("data") for step in steps if step.slug == "train"]
    return {os.path.realpath(part["source"]) for part in data if isinstance(part, dict) and part.get("source")}


def _soup(sources: Sequence[Source], mode: Mode, top: int, higher: bool, score: Score | None) -> Soup:
    if score is None:
        return Soup(average(sources), tuple(range(len(sources))), float("nan"), ())
    if mode == "greedy":
        return greedy(sources, score, higher)
    return maximum(sources, score, top, higher) if mode == "maximum" else uniform(sources, score)


@torch.no_grad()
def _fill(checkpoint: Checkpoint, state: dict[str, Tensor]) -> None:
    """Copy averaged weights into the model; a tied tensor may be there under one of its names."""
    own = checkpoint.model.state_dict()
    for name, value in state.items():
        own[name].copy_(value)


def _record(
    checkpoint: Checkpoint, fields: dict[str, Any], result: Soup, validation: str | None, test: str | None
) -> None:
    """Note the soup in the record; encoders, whose fields alone are attached, stay attached."""
    chosen = {"models": list(result.chosen), "validation": validation, "test": test}
    checkpoint.record_step("soup", fields, chosen=chosen)
    for slug, part in list(checkpoint.attachments.items()):
        checkpoint.attach(slug, part.tensors, part.parameters, part.about)
