"""Search over configurations: each is trained from the same checkpoint, and the best on validation data is kept."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from intaglio import atomic_io
from intaglio.checkpoint import Checkpoint, load
from intaglio.data.token_classification import Place, read_labelled
from intaglio.errors import IntaglioError
from intaglio.masks import Rule
from intaglio.masks.method import keep
from intaglio.methods.attention.layerwise_unmasking.configurations import (
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

ROW = 128
"""Tokens of a row in estimates."""
DONE, BEST = "done.json", "best"
Examples = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Trial:
    """One training of a search."""

    name: str
    bits: str
    settings: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        """Return the trial as plain data for a record, without empty fields."""
        return {name: value for name, value in asdict(self).items() if value != {}}


@dataclass(frozen=True)
class SearchResult:
    """The best trial, and all of them."""

    best: Trial
    trials: tuple[Trial, ...]

    @property
    def bits(self) -> str:
        """The configuration of the best trial."""
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
) -> SearchResult:
    """Train every trial from the same checkpoint, which becomes the best one: its model, and its parts of the record.

    Finished trials are saved in `directory`, so that a killed search resumes.
    """
    if not trials:
        raise IntaglioError("a search needs at least one configuration to try")
    goal = objective or TokenClassification()
    score = make_evaluator(validation, batch_size=settings.get("batch_size", 8))
    done, best = _resumed(directory, resume)
    for number, trial in enumerate(trials):
        if number < len(done):
            continue

        def report(step: int, steps: int, what: str, number: int = number, trial: Trial = trial) -> None:
            progress(number * steps + step, len(trials) * steps, f"trying {trial.name}: {what}")

        began = time.perf_counter()
        candidate = Checkpoint(
            copy.deepcopy(checkpoint.model), checkpoint.tokenizer, checkpoint.source,
            checkpoint.record.model_copy(deep=True),
        )  # fmt: skip
        keep(candidate, rules(trial.bits))
        trial_directory = None if directory is None else directory / f"trial-{number}"
        run = train(
            candidate, list(examples), objective=goal.model_copy(), directory=trial_directory, resume=resume,
            progress=report, **{**settings, **trial.settings},
        )  # fmt: skip
        scores = _score(score, candidate)
        done.append(replace(trial, scores=scores, tokens=run.tokens, seconds=time.perf_counter() - began))
        if _rank(done[-1]) == min(map(_rank, done)) and _first_best(done) == number:
            best = candidate
            if directory is not None:
                candidate.save(directory / BEST, overwrite=True)
        if directory is not None:
            atomic_io.write_json(directory / DONE, {"trials": [asdict(item) for item in done]})
            _sweep(directory / f"trial-{number}")
    assert best is not None  # some trial is the best
    checkpoint.model = best.model.to(checkpoint.device)
    checkpoint.record.live = best.record.live
    return SearchResult(done[_first_best(done)], tuple(done))


def _score(score: Callable[[Checkpoint], dict[str, float]], candidate: Checkpoint) -> dict[str, float]:
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


def _resumed(directory: Path | None, resume: bool) -> tuple[list[Trial], Checkpoint | None]:
    """Return the finished trials and the best model; a search that starts over removes the files of another."""
    if directory is None:
        return [], None
    directory.mkdir(parents=True, exist_ok=True)
    if not resume:
        (directory / DONE).unlink(missing_ok=True)
        for path in [directory / BEST, *directory.glob("trial-*")]:
            shutil.rmtree(path, ignore_errors=True)
    if not (directory / DONE).is_file():
        return [], None
    try:
        trials = json.loads((directory / DONE).read_text(encoding="utf-8"))["trials"]
        return [Trial(**trial) for trial in trials], load(directory / BEST)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntaglioError(f"{directory} is damaged ({error}); start the search over") from error


def _sweep(path: Path) -> None:
    """Empty the directory of a finished trial."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(exist_ok=True)


def run_search(
    checkpoint: Checkpoint,
    examples: Examples,
    validation: Examples,
    method: Any,
    tried: Sequence[str] | None,
    **arguments: Any,
) -> SearchResult:
    """Search with the groups and rules of a `LayerwiseUnmasking`, and record the step; see `search`."""
    parts = anatomy(checkpoint.model)
    check_decoder(parts)
    bits = checked(tried, group_count(len(parts.blocks), method.groups))
    trials = [Trial(word, word) for word in bits]
    result = best_of(checkpoint, examples, validation, trials, lambda word: method.rules(parts, word), **arguments)
    chosen = {
        "configuration": result.bits,
        "layers": unlocked_layers(result.bits, len(parts.blocks)),
        "trials": [trial.plain() for trial in result.trials],
    }
    checkpoint.record_step(method.slug, method.model_dump(), seed=arguments.get("seed", 0), chosen=chosen)
    return result


def checked(tried: Sequence[str] | None, groups: int) -> tuple[str, ...]:
    """Return the configurations to try, by default all."""
    if tried is None:
        return configurations(groups)
    wrong = [bits for bits in tried if len(bits) != groups or set(bits) - {"0", "1"}]
    if wrong or not tried or len(set(tried)) < len(tried):
        what = f"{wrong[0]!r} is no configuration" if wrong else "a list of different configurations is needed"
        raise IntaglioError(f"configurations: {what}; {groups} bits are accepted, such as {'1'.rjust(groups, '0')}")
    return tuple(tried)


class Search(Settings):
    """A search in a recipe: the settings of `intaglio.train`, configurations and data.

    Args:
        labels: a file of labelled words, one JSON object a line, to train on.
        validation: another such file, for the choice.
        configurations: bits to try. Default: all.
        place: the token of a word that carries its label. Default `first`.
        dropout: before the head, while training. Default 0.1.
        length: maximum tokens of a row. Default: the model's context, at most 1,024.
    """

    labels: Annotated[str, Field(min_length=1)]
    validation: Annotated[str, Field(min_length=1)]
    configurations: list[str] | None = None
    place: Place = "first"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    length: Annotated[int, Field(ge=2)] | None = None

    def bits(self, groups: int) -> tuple[str, ...]:
        """Return the configurations to try."""
        return checked(self.configurations, groups)

    def estimate(self, workload: Workload, groups: int | None) -> Cost:
        """Return the estimated cost of all trainings: 6 operations a parameter and token."""
        trials = len(self.configurations) if self.configurations else 2 ** (groups or 4)
        tokens: float = self.tokens or (self.steps or 0) * self.step_rows * (self.length or ROW)
        if self.epochs is not None:
            tokens = self.epochs * workload.tokens
        memory = (2 * workload.element_size + 16) * workload.parameters
        return Cost(flops=6.0 * workload.parameters * tokens * trials, extra_bytes=memory)

    def run(
        self,
        checkpoint: Checkpoint,
        method: Any,
        groups: int,
        *,
        seed: int,
        directory: Path | None,
        resume: bool,
        progress: Progress,
    ) -> SearchResult:
        """Run the search with the settings of the recipe."""
        settings = {name: getattr(self, name) for name in Settings.model_fields}
        objective = TokenClassification(place=self.place, dropout=self.dropout, length=self.length)
        return run_search(
            checkpoint, read_labelled(self.labels), read_labelled(self.validation), method, self.bits(groups),
            objective=objective, directory=directory, resume=resume, progress=progress,
            **{**settings, "seed": self.seed or seed},
        )  # fmt: skip
