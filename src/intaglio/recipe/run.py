"""Run a recipe: checkpoint in, checkpoint out, measured before and after; and compare two checkpoints."""

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
from intaglio.recipe.compatibility import check_history
from intaglio.recipe.data import held_out_segments, make_evaluator, prepare_data, read_texts
from intaglio.recipe.report_document import environment, make_document, new_tokens_note
from intaglio.recipe.resume import (
    TRAINING,
    check_output,
    finish,
    finished_report,
    note_done,
    put_aside,
    scratch_directory,
    start_or_resume,
)
from intaglio.recipe.schema import Measure, Recipe
from intaglio.recipe.source import is_new, load_source, name_of, warn_if_worse_than_uniform
from intaglio.recipe.steps import apply_step, check_fit, goes_on, retokenizes


def _let_go() -> None:
    """Give back to the machine what a step has freed, so that the next one has it and none is charged with it."""
    gc.collect()  # an optimizer and its schedule hold each other, and all their moments
    with suppress(OSError, AttributeError, TypeError):  # other C libraries than glibc have no such call
        ctypes.CDLL(None).malloc_trim(0)


def carve(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Load, measure, run the steps, measure again, and write checkpoint and report.

    After each step the checkpoint is put aside, so a run that was killed resumes after the last finished step and ends
    with the same weights, config and tokenizer files as an unbroken one.

    Args:
        recipe: what to do.
        out: the directory to make.
        model: what to carve; wins over the recipe's.
        device: where to work. Default: the CPU.
        dtype: of the weights. Default: the checkpoint's own.
        resume: go on after the last finished step of an interrupted run; one that has ended is left as it is.
        overwrite: replace an earlier result that is there, and discard an interrupted run.
        progress: called as work goes on.

    Returns:
        What `report.json` holds.

    Raises:
        IntaglioError: one sentence on what cannot be done; then `out` is as it was.
    """
    begun = time.time()
    out = Path(out)
    name, fresh = name_of(recipe, model), is_new(recipe, model)
    check_history(recipe, model)
    texts = read_texts(recipe)
    stamp = "" if fresh else stat_fingerprint(name)
    identity = [name, stamp, *(corpus.digest for corpus in texts), str(device), str(dtype), versions()]
    digest = recipe.digest(json.dumps(identity))
    if resume and (finished := finished_report(out, digest)) is not None:
        return finished
    check_output(out, overwrite)
    with scratch_directory(out) as scratch:
        done, threads = start_or_resume(scratch, out, digest, len(recipe.steps), resume, overwrite)
        with torch_threads(threads):
            again = partial(load_source, recipe, texts[0], model, device, dtype)
            checkpoint = again()
            check_fit(recipe.steps, anatomy(checkpoint.model), name, checkpoint.tokenizer)
            first = checkpoint.tokenizer
            data = prepare_data(recipe, checkpoint, texts)
            evaluator = make_evaluator(checkpoint, data.held_out, recipe.measure, progress)
            before = evaluator.measure(checkpoint)
            notes = [] if fresh else warn_if_worse_than_uniform(checkpoint, before)
            seconds: list[float | None] = [None] * done
            if done:
                del checkpoint  # two models at once may not fit
                checkpoint = load(scratch / f"step-{done}", device=device, dtype=dtype)
                checkpoint.source = name
                if retokenizes(recipe.steps[:done]):
                    data = prepare_data(recipe, checkpoint, texts)
            for index, step in enumerate(recipe.steps[done:], start=done):
                start = time.time()
                if goes_on(step):  # it resumes by itself, if the state says that there is something to resume
                    note_done(scratch, index, digest)
                training = scratch / f"{TRAINING}-{index}"
                apply_step(step, checkpoint, recipe, data, progress, training, resume, again)
                _let_go()
                seconds.append(time.time() - start)
                put_aside(checkpoint, scratch, index + 1, digest)
                if retokenizes((step,)):  # ids mean something else now
                    data = prepare_data(recipe, checkpoint, texts)
            # Nobody wants to know how far a trained model agrees with the random weights it began as.
            after = evaluator.measure(checkpoint, data.held_out, alone=fresh)
            notes += new_tokens_note(recipe.steps, first, checkpoint, data.held_out)
            document = {
                **make_document(recipe, checkpoint, name, data, before, after, seconds),
                "digest": digest,
                "seconds": time.time() - begun,
                "notes": notes,
            }
        finish(out, scratch / f"step-{len(recipe.steps)}", document, overwrite)
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

    With equal tokenizers both see the same tokens. With different ones, tokens and agreement are not comparable: each
    is measured on its own tokens of the same documents, agreement is None, perplexities are told without a verdict,
    and bits per byte is the fair number.

    Args:
        a: the first checkpoint.
        b: the second.
        wanted: what to measure on. Default: 16 segments of 512 tokens of the bundled Wikipedia.
        device: where to work.
        dtype: of the weights.
        progress: called as work goes on.

    Returns:
        `{a: side, b: side, ...}` as `report.compare_page` takes it.
    """
    wanted = wanted or Measure()
    _, held_out = load_texts(wanted.texts).split()
    first = load(a, device=device, dtype=dtype)
    evaluator = make_evaluator(first, held_out_segments(first, held_out, wanted), wanted, progress)
    side_a = evaluator.measure(first)
    about = environment(first, wanted, evaluator.held_out)
    del first
    second = load(b, device=device, dtype=dtype)
    side_b = evaluator.measure(second, held_out_segments(second, held_out, wanted))
    return {
        "format": report.FORMAT,
        "title": f"{a} beside {b}",
        "a": {"model": a, **side_a},
        "b": {"model": b, **side_b},
        **about,
    }
