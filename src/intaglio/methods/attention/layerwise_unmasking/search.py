"""Trying configurations: each is trained from the same checkpoint with the same settings; validation data choose."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from intaglio import atomic_io
from intaglio.checkpoint import Checkpoint, load
from intaglio.data.token_classification import Place, read_labelled
from intaglio.errors import IntaglioError
from intaglio.masks import Rule
from intaglio.masks.method import keep
from intaglio.methods.attention.layerwise_unmasking.grid import (
    check_decoder,
    configurations,
    group_count,
    unlocked_layers,
)
from intaglio.methods.base import Cost, Progress, Workload, no_progress
from intaglio.modeling.anatomy import anatomy
from intaglio.trainer.loop import train
from intaglio.trainer.settings import Settings
from intaglio.trainer.token_classification import TokenClassification, make_evaluator

if TYPE_CHECKING:
    from intaglio.methods.attention.layerwise_unmasking import LayerwiseUnmasking

ROW = 128
"""Tokens of a row in estimates."""
DONE, BEST = "done.json", "best"
Examples = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Trial:
    """One training of a search.

    Args:
        name: tells it from the others; the configuration where nothing else differs.
        bits: the configuration.
        settings: of the training, over those that all share.
        scores: on the validation data after the last step; empty before it ran.
        tokens: that passed in training.
        seconds: of training and scoring.
    """

    name: str
    bits: str
    settings: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        """The trial as plain data for a record; what was not set is left out."""
        return {name: value for name, value in asdict(self).items() if value != {}}


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        best: the trial with the least error; of equals the one with fewer groups unmasked, then the first.
        trials: all, in order.
    """

    best: Trial
    trials: tuple[Trial, ...]

    @property
    def bits(self) -> str:
        """The configuration that was kept."""
        return self.best.bits


def best_of(
    checkpoint: Checkpoint,
    examples: Examples,
    validation: Examples,
    trials: Sequence[Trial],
    rules: Callable[[str], Mapping[int, Rule]],
    *,
    objective: TokenClassification | None = None,
    directory: Path | None = None,
    resume: bool = False,
    progress: Progress = no_progress,
    **settings: Any,
) -> Found:
    """Train every trial from the same checkpoint, and leave the best one in it.

    Args:
        checkpoint: becomes the best trial: its model, trained, and its live parts.
        examples: labelled words to train on.
        validation: labelled words that choose.
        trials: what to try; all get the same data and steps.
        rules: the rules of all layers under a configuration.
        objective: how words are labelled. Default `TokenClassification()`.
        directory: where finished trials wait, so that a killed search goes on. Default: nowhere.
        resume: whether to go on with what is there.
        progress: called after each step of training.
        **settings: of `train`.

    Raises:
        IntaglioError: no trial is given, or as `train`.
    """
    if not trials:
        raise IntaglioError("a search needs at least one configuration to try")
    goal, score = (
        objective or TokenClassification(),
        make_evaluator(validation, batch_size=settings.get("batch_size", 8)),
    )
    done, best = _begun(directory, resume)
    for number, trial in enumerate(trials):
        if number < len(done):
            continue

        def told(step: int, steps: int, what: str, number: int = number, trial: Trial = trial) -> None:
            progress(number * steps + step, len(trials) * steps, f"trying {trial.name}: {what}")

        began = time.perf_counter()
        candidate = Checkpoint(
            copy.deepcopy(checkpoint.model), checkpoint.tokenizer, checkpoint.source,
            checkpoint.record.model_copy(deep=True),
        )  # fmt: skip
        keep(candidate, rules(trial.bits))
        place = None if directory is None else directory / f"trial-{number}"
        run = train(
            candidate, list(examples), objective=goal.model_copy(), directory=place, resume=resume, progress=told,
            **{**settings, **trial.settings},
        )  # fmt: skip
        scores = _scored(score, candidate)
        done.append(replace(trial, scores=scores, tokens=run.tokens, seconds=time.perf_counter() - began))
        if _rank(done[-1]) == min(map(_rank, done)) and _first_best(done) == number:
            best = candidate
            if directory is not None:
                candidate.save(directory / BEST, overwrite=True)
        if directory is not None:
            atomic_io.write_json(directory / DONE, {"trials": [asdict(one) for one in done]})
            _sweep(directory / f"trial-{number}")
    found = Found(done[_first_best(done)], tuple(done))
    assert best is not None  # some trial is the best
    checkpoint.model = best.model.to(checkpoint.device)
    checkpoint.record.live = best.record.live
    return found


def _scored(score: Callable[[Checkpoint], dict[str, float]], candidate: Checkpoint) -> dict[str, float]:
    was = candidate.model.training
    candidate.model.eval()
    try:
        return score(candidate)
    finally:
        candidate.model.train(was)


def _rank(trial: Trial) -> tuple[float, int]:
    return trial.scores["error"], trial.bits.count("1")


def _first_best(trials: Sequence[Trial]) -> int:
    return min(range(len(trials)), key=lambda number: (*_rank(trials[number]), number))


def _begun(directory: Path | None, resume: bool) -> tuple[list[Trial], Checkpoint | None]:
    """The finished trials and the best of them; what another search left is swept, if this one begins anew."""
    if directory is None:
        return [], None
    directory.mkdir(parents=True, exist_ok=True)
    if not resume:
        (directory / DONE).unlink(missing_ok=True)
        for place in [directory / BEST, *directory.glob("trial-*")]:
            shutil.rmtree(place, ignore_errors=True)
    if not (directory / DONE).is_file():
        return [], None
    try:
        trials = json.loads((directory / DONE).read_text(encoding="utf-8"))["trials"]
        return [Trial(**trial) for trial in trials], load(directory / BEST)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntaglioError(f"{directory} is damaged ({error}); start the search over") from error


def _sweep(place: Path) -> None:
    """Leave an empty directory where a finished trial kept its state."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(exist_ok=True)


def search(
    checkpoint: Checkpoint,
    examples: Examples,
    validation: Examples,
    *,
    method: LayerwiseUnmasking | None = None,
    tried: Sequence[str] | None = None,
    objective: TokenClassification | None = None,
    directory: Path | None = None,
    resume: bool = False,
    progress: Progress = no_progress,
    **settings: Any,
) -> Found:
    """Find the groups whose unmasking labels validation words best, and leave the checkpoint unmasked and trained so.

        found = search(ckpt, train_examples, validation_examples, epochs=5, learning_rate=2e-4, lora={"r": 64})
        found.bits                                    # such as "0011"

    The score of the chosen one on the validation words is the best of many and so too good: report it on others.

    Args:
        checkpoint: a decoder; becomes the best trial.
        examples: labelled words to train on; see `intaglio.data.token_classification`.
        validation: others that choose: by strict F1 of entities for IOB2 tags, else by macro-F1.
        method: gives groups and window. Default `LayerwiseUnmasking()`.
        tried: configurations. Default: all.
        objective: how words are labelled. Default `TokenClassification()`.
        directory: where a killed search goes on. Default: nowhere.
        resume: whether to go on with what is there. Default False.
        progress: called after each step of training.
        **settings: of `intaglio.train`: `steps` or `epochs`, `batch_size`, `learning_rate`, `lora`, `seed` ...

    Raises:
        IntaglioError: the model is an encoder, a configuration does not fit, or as `train`.
    """
    from intaglio.methods.attention.layerwise_unmasking import LayerwiseUnmasking

    parts, how = anatomy(checkpoint.model), method or LayerwiseUnmasking()
    check_decoder(parts)
    groups = group_count(len(parts.blocks), how.groups)
    bits = checked(tried, groups)
    found = best_of(
        checkpoint, examples, validation, [Trial(one, one) for one in bits], lambda one: how.rules(parts, one),
        objective=objective, directory=directory, resume=resume, progress=progress, **settings,
    )  # fmt: skip
    chosen = {
        "configuration": found.bits,
        "layers": unlocked_layers(found.bits, len(parts.blocks)),
        "trials": [trial.plain() for trial in found.trials],
    }
    checkpoint.record_step(how.slug, how.model_dump(), seed=settings.get("seed", 0), chosen=chosen)
    return found


def checked(tried: Sequence[str] | None, groups: int) -> tuple[str, ...]:
    """Return the configurations to try.

    Args:
        tried: as asked for; None for all.
        groups: of the model.

    Raises:
        IntaglioError: none is given, one has another number of bits, or one is given twice.
    """
    if tried is None:
        return configurations(groups)
    wrong = [one for one in tried if len(one) != groups or set(one) - {"0", "1"}]
    if wrong or not tried or len(set(tried)) < len(tried):
        what = f"{wrong[0]!r} is no configuration" if wrong else "a list of different configurations is needed"
        raise IntaglioError(f"configurations: {what}; {groups} bits are accepted, such as {'1'.rjust(groups, '0')}")
    return tuple(tried)


class Search(Settings):
    """A search as part of a recipe: the settings of `intaglio.train`, and what is tried on which data.

    Args:
        labels: a file of labelled words, one JSON object a line, to train on.
        validation: another one, which chooses.
        configurations: bits to try. Default: all.
        place: which token of a word has its label. Default `first`.
        dropout: before the head, while training. Default 0.1.
        length: the most tokens of a row. Default: the model's context, at most 1,024.
    """

    labels: Annotated[str, Field(min_length=1)]
    validation: Annotated[str, Field(min_length=1)]
    configurations: list[str] | None = None
    place: Place = "first"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    length: Annotated[int, Field(ge=2)] | None = None

    def bits(self, groups: int) -> tuple[str, ...]:
        """The configurations to try.

        Args:
            groups: of the model.

        Raises:
            IntaglioError: one does not fit.
        """
        return checked(self.configurations, groups)

    def estimate(self, workload: Workload, groups: int | None) -> Cost:
        """Return about what the trainings take: 6 operations a parameter and token.

        Args:
            workload: of the model; a row counts as 128 tokens, an epoch as the calibration tokens.
            groups: of the model; None counts as 4.
        """
        trials = len(self.configurations) if self.configurations else 2 ** (groups or 4)
        tokens: float = self.tokens or (self.steps or 0) * self.batch_size * self.accumulate * (self.length or ROW)
        if self.epochs is not None:
            tokens = self.epochs * workload.tokens
        memory = (2 * workload.element_size + 16) * workload.parameters
        return Cost(flops=6.0 * workload.parameters * tokens * trials, extra_bytes=memory)

    def run(
        self,
        checkpoint: Checkpoint,
        method: LayerwiseUnmasking,
        groups: int,
        *,
        seed: int,
        directory: Path | None,
        resume: bool,
        progress: Progress,
    ) -> Found:
        """Search as the recipe says.

        Args:
            checkpoint: becomes the best trial.
            method: gives the rules of a configuration.
            groups: of the model.
            seed: of every training, where the settings have none of their own.
            directory: for going on.
            resume: whether to.
            progress: called after each step.
        """
        settings = {name: getattr(self, name) for name in Settings.model_fields}
        objective = TokenClassification(place=self.place, dropout=self.dropout, length=self.length)
        return search(
            checkpoint, read_labelled(self.labels), read_labelled(self.validation), method=method,
            tried=self.bits(groups), objective=objective, directory=directory, resume=resume, progress=progress,
            **{**settings, "seed": self.seed or seed},
        )  # fmt: skip
