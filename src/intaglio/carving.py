"""Run a recipe: checkpoint in, checkpoint out, measured before and after; killed at any moment, it can be resumed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import torch
import yaml

from intaglio import report, writer
from intaglio.anatomy import Anatomy, anatomy
from intaglio.attachments import Fitting
from intaglio.checkpoint import (
    RECORD,
    Checkpoint,
    files_stamp,
    load,
    load_config,
    model_class,
    parse_device,
    parse_dtype,
)
from intaglio.data.segments import Segments, segments
from intaglio.data.texts import Corpus, calibration_and_held_out, load_texts
from intaglio.errors import IntaglioError
from intaglio.fresh import TRAINED, new
from intaglio.machine import versions, with_threads
from intaglio.measures.quality import ELEMENTS
from intaglio.measures.side import Yardstick
from intaglio.measures.speed import DECODE, PREFILL, REPEATS, WARM
from intaglio.method import Carving, ChecksModel, Cost, Method, Progress, Resumes, Workload, silent
from intaglio.recipe import Fit, Measure, Recipe, Step, accepted_fields, method_of

STATE = "state.json"
TRAINING = "training"
LAUNCH = 0.00025
"""Seconds that a block of one decoding step takes beside reading its weights."""
TIMED = 0.3
"""Seconds that each rate of the machine is timed for."""
TRIALS = "trial-*"
"""What a step that trains several times leaves in its directory."""


@dataclass(frozen=True)
class Data:
    """The token segments of a run.

    Args:
        calibration: what steps are calibrated on; None if no step needs it.
        held_out: what is measured on. No document is in both.
        texts: the documents that `calibration` is cut from: what fits and training see.
        sealed: hashes of the documents that `held_out` is cut from: nothing is trained on them.
    """

    calibration: Segments | None
    held_out: Segments
    texts: Corpus
    sealed: frozenset[str]


def read_texts(recipe: Recipe) -> tuple[Corpus, Corpus]:
    """What a recipe calibrates on and what it measures on; no document is in both.

    Args:
        recipe: names the texts.

    Raises:
        IntaglioError: missing or empty texts, or too few of them.
    """
    return calibration_and_held_out(load_texts(recipe.calibration.texts), load_texts(recipe.measure.texts))


def prepare_data(recipe: Recipe, checkpoint: Checkpoint, texts: tuple[Corpus, Corpus]) -> Data:
    """Cut calibration and held-out segments.

    Args:
        recipe: how many of which length.
        checkpoint: whose tokenizer and context are used.
        texts: from `read_texts`.

    Raises:
        IntaglioError: no tokenizer, or too few texts.
    """
    calibration, held_out = texts
    needed = any(not isinstance(step, Fit) and cast(Carving, step).needs_calibration for step in recipe.steps)
    return Data(
        held_out=held_out_segments(checkpoint, held_out, recipe.measure),
        calibration=segments(
            checkpoint.tokenizer,
            calibration,
            recipe.calibration.samples,
            min(recipe.calibration.length, checkpoint.context),
            recipe.seed,
        )
        if needed
        else None,
        texts=calibration,
        sealed=frozenset(held_out.hashes),
    )


def held_out_segments(checkpoint: Checkpoint, corpus: Any, wanted: Measure) -> Segments:
    """Segments to measure on: the same for every seed, so that runs can be compared.

    Args:
        checkpoint: whose tokenizer and context are used.
        corpus: held-out documents.
        wanted: samples and length.

    Raises:
        IntaglioError: no tokenizer, or too few texts.
    """
    if checkpoint.tokenizer is None:
        raise IntaglioError(f"{checkpoint.source} has no tokenizer, so no text can be measured")
    return segments(checkpoint.tokenizer, corpus, wanted.samples, min(wanted.length, checkpoint.context), seed=0)


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an output directory that is taken, before any work is done; see `writer.check_target`.

    Args:
        out: the directory that is to be made.
        overwrite: whether an earlier result may be replaced. Anything else that stands there may not.

    Raises:
        IntaglioError: it is taken, or cannot be written.
    """
    writer.check_target(out, overwrite)
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file():
        raise IntaglioError(f"{out} holds something that is no result of a carve (no {RECORD}); name another directory")


def _scratch_path(out: Path) -> Path:
    return out.absolute().parent / f".{out.name}.carving"


def _finished(out: Path, digest: str) -> dict[str, Any] | None:
    """The report of the very same run, if it has ended; what it left when it was killed at its end is swept."""
    try:
        document: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
        if document["digest"] != digest:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    shutil.rmtree(_scratch_path(out), ignore_errors=True)
    return document


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """The directory beside OUT where finished steps wait, locked against a second run."""
    path = _scratch_path(out)
    with writer.locked(path / "lock", f"another carve to {out} is running"):
        try:
            yield path
        finally:
            if not _worth_keeping(path):
                shutil.rmtree(path, ignore_errors=True)


def _worth_keeping(scratch: Path) -> bool:
    """Whether a step is finished, or training has saved its state."""
    state = _read_state(scratch)
    begun = (f"{TRAINING}-*/checkpoint-*", f"{TRAINING}-*/{TRIALS}")
    return state is not None and (state["done"] > 0 or any(path for how in begun for path in scratch.glob(how)))


def _read_state(scratch: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((scratch / STATE).read_text(encoding="utf-8"))
        return {"digest": str(state["digest"]), "done": int(state["done"]), "threads": int(state["threads"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _start(scratch: Path, out: Path, digest: str, steps: int, resume: bool, overwrite: bool) -> tuple[int, int | None]:
    """How many steps are done already, and with how many threads; leftovers of no use are refused or cleared."""
    state = _read_state(scratch)
    if state is None:
        return 0, None
    if resume:
        if state["digest"] != digest:
            raise IntaglioError(
                f"the interrupted carve to {out} was of another recipe, model, text, device, dtype or version; "
                "run it without resume and with overwrite to start over"
            )
        return min(state["done"], steps), state["threads"]
    if not overwrite:
        raise IntaglioError(
            f"an interrupted carve to {out} has finished {state['done']} of {steps} steps; "
            "resume it, or overwrite it to start over"
        )
    shutil.rmtree(scratch / f"step-{state['done']}", ignore_errors=True)
    (scratch / STATE).unlink(missing_ok=True)
    return 0, None


def check_fit(steps: tuple[Step, ...], parts: Anatomy, name: str) -> None:
    """Refuse, before any work, a model that a step does not fit.

    Args:
        steps: of the recipe.
        parts: of the model.
        name: of the model, for the sentence.

    Raises:
        IntaglioError: names the step and the layer.
    """
    named = [(full, *linear.shape) for full, linear in parts.all_linears()]
    for step in steps:
        if "causal" in method_of(step).requires and not parts.causal:
            raise IntaglioError(f"{step.slug} needs a model that generates; {name} is an encoder")
        if not isinstance(step, Fit):
            cast(Carving, step).check(named)
            if isinstance(step, ChecksModel):
                step.check_model(parts)


def apply_step(
    step: Step,
    checkpoint: Checkpoint,
    recipe: Recipe,
    data: Data,
    progress: Progress,
    directory: Path | None = None,
    resume: bool = False,
    original: Callable[[], Checkpoint] | None = None,
) -> None:
    """Apply one step of a recipe in place.

    Args:
        step: a carving, a fit, or training.
        checkpoint: edited, or attached to.
        recipe: for seed and batch size.
        data: for calibration.
        progress: called as it goes on.
        directory: where training keeps what it needs to go on after it was killed. Default: nowhere.
        resume: whether training goes on with what is there. Default False.
        original: loads the checkpoint as it was before the recipe, for selectors that compare.
    """
    if _trains(step):
        cast(Any, step).apply(
            checkpoint,
            data.texts,
            seed=recipe.seed,
            held_out_hashes=data.sealed,
            original=original,
            directory=directory,
            resume=resume,
            progress=progress,
        )
        return
    options: dict[str, Any] = {
        "seed": recipe.seed, "batch_size": recipe.calibration.batch_size, "progress": progress
    }  # fmt: skip
    if _goes_on(step):
        options |= {"directory": directory, "resume": resume}
    if isinstance(step, Fit):
        cast(Fitting, step.method).fit(checkpoint, data.texts, **options)
    else:
        cast(Carving, step).apply(checkpoint, data.calibration, **options)


def carve(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
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
    name, fresh = _name(recipe, model), _is_new(recipe, model)
    texts = read_texts(recipe)
    stamp = "" if fresh else files_stamp(name)
    identity = [name, stamp, *(corpus.digest for corpus in texts), str(device), str(dtype), versions()]
    digest = recipe.digest(json.dumps(identity))
    if resume and (finished := _finished(out, digest)) is not None:
        return finished
    check_output(out, overwrite)
    with _scratch(out) as scratch:
        done, threads = _start(scratch, out, digest, len(recipe.steps), resume, overwrite)
        with with_threads(threads):
            again = partial(_begin, recipe, texts[0], model, device, dtype)
            checkpoint = again()
            check_fit(recipe.steps, anatomy(checkpoint.model), name)
            data = prepare_data(recipe, checkpoint, texts)
            yardstick = make_yardstick(checkpoint, data.held_out, recipe.measure, progress)
            before = yardstick.measure(checkpoint)
            notes = [] if fresh else blind_guess(checkpoint, before)
            seconds: list[float | None] = [None] * done
            if done:
                del checkpoint  # two models at once may not fit
                checkpoint = load(scratch / f"step-{done}", device=device, dtype=dtype)
                checkpoint.source = name
            for index, step in enumerate(recipe.steps[done:], start=done):
                start = time.time()
                if _goes_on(step):  # it resumes by itself, if the state says that there is something to resume
                    _note(scratch, index, digest)
                training = scratch / f"{TRAINING}-{index}"
                apply_step(step, checkpoint, recipe, data, progress, training, resume, again)
                seconds.append(time.time() - start)
                _put_aside(checkpoint, scratch, index + 1, digest)
            # Nobody wants to know how far a trained model agrees with the random weights it began as.
            after = yardstick.measure(checkpoint, alone=fresh)
            document = {
                **_document(recipe, checkpoint, name, data, before, after, seconds),
                "digest": digest,
                "seconds": time.time() - begun,
                "notes": notes,
            }
        _finish(out, scratch / f"step-{len(recipe.steps)}", document, overwrite)
        shutil.rmtree(scratch, ignore_errors=True)
    return document


def _is_new(recipe: Recipe, model: str | None) -> bool:
    return model is None and recipe.new is not None


def _name(recipe: Recipe, model: str | None) -> str:
    """What is carved, in words: the model on the command line, or else the recipe's."""
    name = recipe.model if model is None else model
    if name is None and recipe.new is not None:
        return f"new {recipe.new.family}"
    if name is None:
        raise IntaglioError("no model is given: name one on the command line or in the recipe")
    return name


def _begin(recipe: Recipe, texts: Corpus, model: str | None, device: str | None, dtype: str | None) -> Checkpoint:
    """What the steps begin with: a checkpoint that is loaded, or a model from scratch."""
    if recipe.new is None or model is not None:
        return load(_name(recipe, model), device=device, dtype=dtype)
    fields = recipe.new.model_dump()
    if recipe.new.tokenizer == "texts":  # of those that are calibrated on alone
        fields["tokenizer"] = texts
    made = new(**fields, seed=recipe.seed % 2**32)
    kind = parse_dtype(dtype)
    made.model.to(parse_device(device), kind if isinstance(kind, torch.dtype) else None)
    return made


def _skeleton(recipe: Recipe, model: str | None) -> Any:
    """The model without its weights."""
    with torch.device("meta"):
        if recipe.new is None or model is not None:
            name = _name(recipe, model)
            _, config = load_config(name)
            return model_class(config, name)(config)
        fields = recipe.new.model_dump() | {"tokenizer": "bytes"}
        if recipe.new.tokenizer == "texts":
            fields["vocab"] = recipe.new.vocab or TRAINED
        return new(**fields).model


def make_yardstick(
    original: Checkpoint, held_out: Segments, wanted: Measure, progress: Progress = silent, repeats: int = REPEATS
) -> Yardstick:
    """What a recipe's `measure` asks for.

    Args:
        original: what agreement is with.
        held_out: what is measured on.
        wanted: batch size, and whether speed is timed.
        progress: called after each batch.
        repeats: counted runs of the timing.
    """
    return Yardstick(
        original, held_out, batch_size=wanted.batch_size, timed=wanted.speed, repeats=repeats, progress=progress
    )


def blind_guess(checkpoint: Checkpoint, side: dict[str, Any]) -> list[str]:
    """A note on a model that knows less of the text than nothing, which no trained model with its own tokenizer does.

    Args:
        checkpoint: what was measured, before anything was done to it.
        side: its measurements.
    """
    perplexity, rows = side["perplexity"], checkpoint.vocabulary
    if perplexity is None or perplexity <= rows:
        return []
    return [
        f"Before anything was done the model predicted the held-out text worse than a blind guess among its {rows:,} "
        f"tokens would (perplexity {perplexity:,.0f}): it is not trained, or its tokenizer is another model's."
    ]


def _put_aside(checkpoint: Checkpoint, scratch: Path, done: int, digest: str) -> None:
    """Save the state after a step; the state file names it only when it is whole."""
    checkpoint.save(scratch / f"step-{done}", overwrite=True)
    _note(scratch, done, digest)
    shutil.rmtree(scratch / f"step-{done - 1}", ignore_errors=True)
    shutil.rmtree(scratch / f"{TRAINING}-{done - 1}", ignore_errors=True)


def _note(scratch: Path, done: int, digest: str) -> None:
    """Write how many steps are done."""
    writer.write_json(scratch / STATE, {"digest": digest, "done": done, "threads": torch.get_num_threads()})


def _trains(step: Step) -> bool:
    return step.slug == "train"


def _goes_on(step: Step) -> bool:
    """Whether a step keeps a state of its own while it runs, and goes on with that."""
    return _trains(step) or isinstance(step, Fit) or (isinstance(step, Resumes) and step.long)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _finish(out: Path, last: Path, document: dict[str, Any], overwrite: bool) -> None:
    with writer.directory(out, overwrite) as temporary:
        shutil.copytree(last, temporary, copy_function=_link_or_copy, dirs_exist_ok=True)
        (temporary / "report.json").write_text(writer.to_json(document), encoding="utf-8")
        (temporary / "report.html").write_text(report.carve_page(document), encoding="utf-8")


def defaults(method: Method) -> dict[str, Any]:
    """The default of each of a method's fields, so that a report can show what was set.

    Args:
        method: of a step.
    """
    fields = type(method).model_fields
    return {name: fields[name].get_default(call_default_factory=True) for name in accepted_fields(type(method))}


def what_was_done(steps: tuple[Step, ...]) -> str:
    """The steps in a few words: `carved by wanda, dsnot; fitted aded`.

    Args:
        steps: of the recipe.
    """
    fitted = ", ".join(step.slug for step in steps if isinstance(step, Fit))
    carved = ", ".join(step.slug for step in steps if not isinstance(step, Fit) and not _trains(step))
    trained = any(map(_trains, steps))
    return "; ".join(
        [f"carved by {carved}"] * bool(carved) + ["trained"] * trained + [f"fitted {fitted}"] * bool(fitted)
    )


def provenance(checkpoint: Checkpoint, wanted: Measure, held_out: Segments) -> dict[str, Any]:
    """What every report says about how it was measured.

    Args:
        checkpoint: gives device and dtype.
        wanted: what was asked for.
        held_out: what was measured on.
    """
    return {
        "measure": {
            "texts": wanted.texts,
            "samples": held_out.n,
            "length": held_out.length,
            "digest": held_out.digest,
        },
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "device": str(checkpoint.device),
        "dtype": str(next(checkpoint.model.parameters()).dtype).removeprefix("torch."),
    }


def _document(
    recipe: Recipe,
    checkpoint: Checkpoint,
    name: str,
    data: Data,
    before: dict[str, Any],
    after: dict[str, Any],
    seconds: list[float | None],
) -> dict[str, Any]:
    made = checkpoint.record.steps[-len(recipe.steps) :]
    return {
        "format": report.FORMAT,
        "title": f"{name} {what_was_done(recipe.steps)}",
        "model": name,
        "kind": checkpoint.kind,
        "steps": [
            _with_curve(record.model_dump()) | {"defaults": defaults(method_of(step)), "seconds": took}
            for record, step, took in zip(made, recipe.steps, seconds, strict=True)
        ],
        "before": before,
        "after": after,
        **provenance(checkpoint, recipe.measure, data.held_out),
        "recipe": yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True),
    }


def _with_curve(step: dict[str, Any]) -> dict[str, Any]:
    """A step's record with its training curves, see `intaglio.curves`, beside what it chose rather than in it."""
    curve = step["chosen"].pop("curve", None)
    return step if curve is None else step | {"curve": curve}


def compare(
    a: str,
    b: str,
    *,
    wanted: Measure | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure two checkpoints on the same held-out text; `b`'s agreement is with `a`.

    With equal tokenizers both see the same tokens. With different ones, tokens and agreement are not comparable: each
    is measured on its own tokens of the same documents, agreement is None, and bits per byte is the fair number.

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
    yardstick = make_yardstick(first, held_out_segments(first, held_out, wanted), wanted, progress)
    side_a = yardstick.measure(first)
    about = provenance(first, wanted, yardstick.held_out)
    del first
    second = load(b, device=device, dtype=dtype)
    side_b = yardstick.measure(second, held_out_segments(second, held_out, wanted))
    return {
        "format": report.FORMAT,
        "title": f"{a} beside {b}",
        "a": {"model": a, **side_a},
        "b": {"model": b, **side_b},
        **about,
    }


def plan(
    recipe: Recipe, *, model: str | None = None, device: str | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """What a carve would do and take, from the model's configuration alone: no weights are read.

    Args:
        recipe: what would be done.
        model: what would be carved; wins over the recipe's.
        device: where.
        dtype: of the weights. Default: the checkpoint's own.

    Returns:
        `{model, parameters, bytes, steps: [{slug, verb, parameters, seconds, memory_bytes}], measure_seconds, seconds,
        memory_bytes, libraries_bytes, gflops}`. Seconds come from work timed on this machine just now. Memory is the
        peak beside `libraries_bytes`, which the process holds already.

    Raises:
        IntaglioError: as `carve` would, as far as can be told without weights.
    """
    name = _name(recipe, model)
    where, wanted = parse_device(device), parse_dtype(dtype)
    skeleton = _skeleton(recipe, model)
    kind = wanted if isinstance(wanted, torch.dtype) else (getattr(skeleton.config, "dtype", None) or torch.float32)
    parts = anatomy(skeleton)
    check_fit(recipe.steps, parts, name)
    texts, _ = read_texts(recipe)
    length = min(recipe.calibration.length, int(getattr(parts.config, "max_position_embeddings", 1 << 30)))
    parameters = sum(p.numel() for p in skeleton.parameters())
    element = torch.empty(0, dtype=kind).element_size()
    workload = Workload(
        linears=tuple(linear.shape for _, linear in parts.all_linears()),
        block_parameters=sum(p.numel() for block in parts.blocks for p in block.parameters()),
        parameters=parameters,
        hidden=int(parts.config.hidden_size),
        tokens=recipe.calibration.samples * length,
        batch_tokens=recipe.calibration.batch_size * length,
        element_size=element,
    )
    rates = machine_rates(where, kind)
    measure_seconds, held, measuring = _measuring(recipe.measure, workload, parts, rates)
    steps: list[dict[str, Any]] = []
    for step in recipe.steps:
        cost = _estimate(step, workload, texts)
        took = cost.flops / rates.flops + cost.sorted_elements / rates.elements
        memory = held + cost.extra_bytes
        fields = method_of(step).model_dump()
        steps.append(
            {"slug": step.slug, "verb": _verb(step), "parameters": fields, "seconds": took, "memory_bytes": memory}
        )
    return {
        "model": name,
        "parameters": parameters,
        "bytes": parameters * element,
        "tokens": workload.tokens,
        "steps": steps,
        "measure_seconds": measure_seconds,
        "seconds": measure_seconds + sum(step["seconds"] for step in steps),
        "memory_bytes": max([measuring, *(step["memory_bytes"] for step in steps)]),
        "libraries_bytes": psutil.Process().memory_info().rss,
        "gflops": rates.flops / 1e9,
    }


def _measuring(wanted: Measure, workload: Workload, parts: Anatomy, rates: Rates) -> tuple[float, int, int]:
    """Seconds of measuring before and after; bytes that are held all the time, and at the peak of measuring."""
    width, element = workload.hidden, workload.element_size
    length = min(wanted.length, int(getattr(parts.config, "max_position_embeddings", None) or wanted.length))
    tokens = wanted.samples * length
    held = workload.parameters * element
    peak = held
    # The blocks run for the reference, before and after.
    flops = 3 * 2.0 * workload.block_parameters * tokens
    if parts.causal:
        vocabulary = int(parts.config.vocab_size)
        flops += 4 * 2.0 * vocabulary * width * tokens  # the original's predictions and the model's own, twice
        held += (vocabulary + tokens) * width * element  # the head's copy and the original's hidden states
        # Logits of one segment; of a piece of it log-probabilities of both models and what their divergence takes.
        peak = held + 4 * vocabulary * (length + 6 * min(length, max(1, ELEMENTS // vocabulary)))
    seconds = flops / rates.flops
    if wanted.speed:
        passes = 2 * (REPEATS + 1)
        seconds += passes * 2.0 * workload.block_parameters * PREFILL / rates.flops
        if parts.causal:
            step = workload.parameters * element / rates.bytes + LAUNCH * len(parts.blocks)
            seconds += 2 * (REPEATS * DECODE + WARM) * step
    return seconds, held, peak


def _verb(step: Step) -> str:
    return "train" if _trains(step) else "fit" if isinstance(step, Fit) else "carve"


def _estimate(step: Step, workload: Workload, texts: Corpus) -> Cost:
    if isinstance(step, Fit):
        return cast(Fitting, step.method).estimate_fit(workload, texts)
    return cast(Carving, step).estimate(workload)


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Args:
        flops: floating-point operations of a transformer's pass.
        elements: elements that pass through a selection.
        bytes: bytes of weights that a matrix-vector product reads.
    """

    flops: float
    elements: float
    bytes: float


def machine_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Time a matrix product, a selection and a matrix-vector product, each for a fraction of a second.

    Args:
        device: where.
        dtype: of the products.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 768, generator=generator).to(device, dtype)
    y = torch.randn(768, 768, generator=generator).to(device, dtype)
    score = torch.randn(256, 768, generator=generator).to(device)
    matrix = torch.ones(4096, 4096, dtype=dtype, device=device)  # beyond most caches
    vector = torch.ones(4096, dtype=dtype, device=device)

    def best(work: Callable[[], Any]) -> float:
        # The best of many: on a busy machine most of them are interrupted.
        found, begun = float("inf"), time.perf_counter()
        while time.perf_counter() - begun < TIMED:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found = min(found, time.perf_counter() - start)
        return found

    # A transformer's pass reaches about half of what a lone product does.
    return Rates(
        flops=0.5 * 2 * 512 * 768 * 768 / best(lambda: x @ y),
        elements=score.numel() / best(lambda: score.kthvalue(384, dim=1)),
        bytes=matrix.numel() * matrix.element_size() / best(lambda: matrix @ vector),
    )
