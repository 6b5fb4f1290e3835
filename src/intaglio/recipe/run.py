"""Run a recipe: load, measure, apply the steps, measure again, write; and compare two checkpoints."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from intaglio import report
from intaglio.checkpoint import load, stat_fingerprint
from intaglio.data.texts import load_texts
from intaglio.environment import torch_threads, versions
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import anatomy
from intaglio.recipe.classifier import attach_classifier, attaches_image_classifier, classes_step, train_classifier
from intaglio.recipe.compatibility import check_history
from intaglio.recipe.data import held_out_segments, make_evaluator, prepare_data, read_texts
from intaglio.recipe.recommender import interactions_step, train_recommender
from intaglio.recipe.report_document import environment, make_document, new_tokens_note
from intaglio.recipe.resume import (
    TRAINING,
    check_output,
    finished_report,
    publish,
    save_step,
    scratch_directory,
    start_or_resume,
    write_state,
)
from intaglio.recipe.schema import Measure, Recipe
from intaglio.recipe.source import RunSpec, load_source, warn_if_worse_than_uniform
from intaglio.recipe.steps import apply_step, check_data, check_fit, check_uses, is_resumable, replaces_tokenizer


def _free_memory() -> None:
    """Return freed memory to the machine, so that the next step neither lacks it nor is charged for it."""
    gc.collect()  # an optimizer and its schedule reference each other, and all their moments
    with suppress(OSError, AttributeError, TypeError):  # other C libraries than glibc have no such call
        ctypes.CDLL(None).malloc_trim(0)


def carve(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Load, measure, run the steps, measure again, and write checkpoint and report.

    The checkpoint is saved after each step, so a killed run resumes after the last finished step and ends with the
    same weights, config and tokenizer files as an uninterrupted one.

    Args:
        recipe: the steps.
        out: the directory to make.
        model: source of the run; overrides the recipe's.
        device: where to work. Default: the CPU.
        dtype: of the weights. Default: the checkpoint's own.
        seed: overrides the recipe's.
        resume: resume an interrupted run after its last finished step; leave a finished one unchanged.
        overwrite: replace an earlier result, and discard an interrupted run.
        progress: called after each unit of work.

    Returns:
        The content of `report.json`.

    Raises:
        IntaglioError: one sentence on what cannot be done; `out` is then unchanged.
    """
    begun = time.time()
    out = Path(out)
    spec = RunSpec.from_args(recipe, model, device, dtype, seed)
    recipe, name = spec.recipe, spec.source_name
    if interactions_step(recipe) is not None:
        return train_recommender(spec, out, resume=resume, overwrite=overwrite, progress=progress)
    if classes_step(recipe) is not None:
        return train_classifier(spec, out, resume=resume, overwrite=overwrite, progress=progress)
    if attaches_image_classifier(spec):
        return attach_classifier(spec, out, resume=resume, overwrite=overwrite, progress=progress)
    check_history(spec)
    texts = read_texts(recipe)
    stamp = "" if spec.from_scratch else stat_fingerprint(name)
    digest = recipe.digest(json.dumps([*spec.identity(), stamp, *(corpus.digest for corpus in texts), versions()]))
    if resume and (finished := finished_report(out, digest)) is not None:
        return finished
    check_output(out, overwrite)
    with scratch_directory(out) as scratch:
        done, threads = start_or_resume(scratch, out, digest, len(recipe.steps), resume, overwrite)
        with torch_threads(threads):
            original = partial(load_source, spec, texts[0])
            checkpoint = original()
            check_fit(recipe.steps, anatomy(checkpoint.model), name, checkpoint.tokenizer)
            check_uses(recipe.steps, checkpoint)
            check_data(recipe.steps[done:])
            tokenizer = checkpoint.tokenizer
            data = prepare_data(recipe, checkpoint, texts)
            evaluator = make_evaluator(checkpoint, data.held_out, recipe.measure, progress)
            before = evaluator.measure(checkpoint)
            notes = [] if spec.from_scratch else warn_if_worse_than_uniform(checkpoint, before)
            seconds: list[float | None] = [None] * done
            if done:
                del checkpoint  # two models at once may not fit
                checkpoint = load(scratch / f"step-{done}", device=spec.device, dtype=spec.dtype)
                checkpoint.source = name
                if replaces_tokenizer(*recipe.steps[:done]):
                    data = prepare_data(recipe, checkpoint, texts)
            for index, step in enumerate(recipe.steps[done:], start=done):
                start = time.time()
                if is_resumable(step):  # it resumes by itself, if the state names this step
                    write_state(scratch, index, digest)
                apply_step(step, checkpoint, recipe, data, progress, scratch / f"{TRAINING}-{index}", resume, original)
                _free_memory()
                seconds.append(time.time() - start)
                save_step(checkpoint, scratch, index + 1, digest)
                if replaces_tokenizer(step):
                    data = prepare_data(recipe, checkpoint, texts)
            # Agreement of a trained model with its random initial weights means nothing.
            after = evaluator.measure(checkpoint, data.held_out, alone=spec.from_scratch)
            notes += new_tokens_note(recipe.steps, tokenizer, checkpoint, data.held_out)
            document = {
                **make_document(recipe, checkpoint, name, data, before, after, seconds),
                "digest": digest,
                "seconds": time.time() - begun,
                "notes": notes,
            }
        publish(out, scratch / f"step-{len(recipe.steps)}", document, overwrite)
        shutil.rmtree(scratch, ignore_errors=True)
    return document


def compare(
    a: str,
    b: str,
    *,
    wanted: Measure | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measure two checkpoints on the same held-out text; `b`'s agreement is with `a`.

    With equal tokenizers both are measured on the same tokens. With different ones, tokens and agreement are not
    comparable: each is measured on its own tokens of the same documents, agreement is None, perplexities are reported
    without a verdict, and bits per byte is the fair number.

    Args:
        a: the first checkpoint.
        b: the second.
        wanted: texts and sizes of the measurements. Default: 16 segments of 512 tokens of the bundled Wikipedia.
        device: where to work. Default: the CPU.
        dtype: of the weights. Default: each checkpoint's own.
        progress: called after each unit of work.

    Returns:
        `{a: side, b: side, ...}`, as `report.compare_page` takes it.
    """
    measure = wanted or Measure()
    _, held_out = load_texts(measure.texts).split()
    first = load(a, device=device, dtype=dtype)
    evaluator = make_evaluator(first, held_out_segments(first, held_out, measure), measure, progress)
    side_a = evaluator.measure(first)
    conditions = environment(first, measure, evaluator.held_out)
    del first
    second = load(b, device=device, dtype=dtype)
    side_b = evaluator.measure(second, held_out_segments(second, held_out, measure))
    return {
        "format": report.FORMAT,
        "title": f"{a} beside {b}",
        "a": {"model": a, **side_a},
        "b": {"model": b, **side_b},
        **conditions,
    }
