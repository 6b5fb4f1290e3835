"""Run a recipe: checkpoint in, checkpoint out, measured before and after; killed at any moment, it can be resumed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from intaglio import report, writer
from intaglio.anatomy import Anatomy, anatomy
from intaglio.attachments import Fitting
from intaglio.checkpoint import RECORD, Checkpoint, load, load_config, model_class, parse_device, parse_dtype
from intaglio.data.segments import Segments, segments
from intaglio.data.texts import Corpus, calibration_and_held_out, load_texts
from intaglio.errors import IntaglioError
from intaglio.machine import versions
from intaglio.masks import predicts_next
from intaglio.measures.quality import Reference, reference
from intaglio.measures.side import measure
from intaglio.method import Carving, ChecksModel, Cost, Method, Progress, Resumes, Workload, silent
from intaglio.recipe import Fit, Measure, Recipe, Step, accepted_fields, method_of

STATE = "state.json"
TRAINING = "training"
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


def prepare_data(recipe: Recipe, checkpoint: Checkpoint) -> Data:
    """Cut calibration and held-out segments; no document is in both.

    Args:
        recipe: names the texts.
        checkpoint: whose tokenizer and context are used.

    Raises:
        IntaglioError: no tokenizer, missing or empty texts, or too few of them.
    """
    if checkpoint.tokenizer is None:
        raise IntaglioError(f"{checkpoint.source} has no tokenizer, so no text can be measured")
    calibration, held_out = calibration_and_held_out(
        load_texts(recipe.calibration.texts), load_texts(recipe.measure.texts)
    )
    needed = any(not isinstance(step, Fit) and cast(Carving, step).needs_calibration for step in recipe.steps)
    return Data(
        calibration=segments(
            checkpoint.tokenizer,
            calibration,
            recipe.calibration.samples,
            min(recipe.calibration.length, checkpoint.context),
            recipe.seed,
        )
        if needed
        else None,
        held_out=held_out_segments(checkpoint, held_out, recipe.measure),
        texts=calibration,
        sealed=frozenset(held_out.hashes),
    )


def held_out_segments(checkpoint: Checkpoint, corpus: Any, wanted: Measure) -> Segments:
    """Segments to measure on: the same for every seed, so that runs can be compared.

    Args:
        checkpoint: whose tokenizer and context are used.
        corpus: held-out documents.
        wanted: samples and length.
    """
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
    """The report of a run that was killed between the appearance of OUT and the end; its leftovers are swept."""
    state = _read_state(_scratch_path(out))
    if state is None or state["digest"] != digest or not (out / "report.json").is_file():
        return None
    shutil.rmtree(_scratch_path(out), ignore_errors=True)
    document: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
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


def _start(scratch: Path, out: Path, digest: str, steps: int, resume: bool, overwrite: bool) -> int:
    """How many steps are done already; leftovers that cannot be used are refused or cleared."""
    state = _read_state(scratch)
    if state is None:
        return 0
    if resume:
        if state["digest"] != digest:
            raise IntaglioError(
                f"the interrupted carve to {out} was of another recipe, model, device, dtype or version; "
                "run it without resume and with overwrite to start over"
            )
        torch.set_num_threads(state["threads"])
        return min(state["done"], steps)
    if not overwrite:
        raise IntaglioError(
            f"an interrupted carve to {out} has finished {state['done']} of {steps} steps; "
            "resume it, or overwrite it to start over"
        )
    shutil.rmtree(scratch / f"step-{state['done']}", ignore_errors=True)
    (scratch / STATE).unlink(missing_ok=True)
    return 0


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
    able = predicts_next(parts)
    for step in steps:
        if "causal" in method_of(step).requires and not able:
            what = "is an encoder" if not parts.causal else "labels tokens or sees later ones"
            raise IntaglioError(f"{step.slug} needs a model that generates; {name} {what}")
        # A rule may be taken back by a step; a head is not.
        able = able or ("attention" in method_of(step).changes and parts.causal and parts.head is not None)
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
    """
    if _trains(step):
        cast(Any, step).apply(
            checkpoint,
            data.texts,
            seed=recipe.seed,
            held_out=data.held_out,
            held_out_hashes=data.sealed,
            directory=directory,
            resume=resume,
            progress=progress,
        )
        return
    run: Any = cast(Fitting, step.method).fit if isinstance(step, Fit) else cast(Carving, step).apply
    run(
        checkpoint,
        data.texts if isinstance(step, Fit) else data.calibration,
        seed=recipe.seed,
        batch_size=recipe.calibration.batch_size,
        progress=progress,
        **({"directory": directory, "resume": resume} if _goes_on(step) else {}),
    )


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
        resume: go on after the last finished step of an interrupted run.
        overwrite: replace an earlier result that is there, and discard an interrupted run.
        progress: called as work goes on.

    Returns:
        What `report.json` holds.

    Raises:
        IntaglioError: one sentence on what cannot be done; then `out` is as it was.
    """
    begun = time.time()
    out = Path(out)
    name = recipe.model if model is None else model
    if name is None:
        raise IntaglioError("no model is given: name one on the command line or in the recipe")
    digest = recipe.digest(json.dumps([name, str(device), str(dtype), versions()]))
    if resume and (finished := _finished(out, digest)) is not None:
        return finished
    check_output(out, overwrite)
    with _scratch(out) as scratch:
        done = _start(scratch, out, digest, len(recipe.steps), resume, overwrite)
        checkpoint = load(name, device=device, dtype=dtype)
        check_fit(recipe.steps, anatomy(checkpoint.model), name)
        data = prepare_data(recipe, checkpoint)
        original, before = _before(checkpoint, data, recipe, progress)
        rows = _vocabulary(checkpoint)
        seconds: list[float | None] = [None] * done
        if done:
            checkpoint = load(scratch / f"step-{done}", device=device, dtype=dtype)
            checkpoint.source = name
        for index, step in enumerate(recipe.steps[done:], start=done):
            start = time.time()
            if _goes_on(step):  # it resumes by itself, if the state says that there is something to resume
                _note(scratch, index, digest)
            apply_step(step, checkpoint, recipe, data, progress, scratch / f"{TRAINING}-{index}", resume)
            seconds.append(time.time() - start)
            _put_aside(checkpoint, scratch, index + 1, digest)
        after = measure(
            checkpoint,
            data.held_out,
            original if _vocabulary(checkpoint) == rows else None,  # there is no agreement between two vocabularies
            batch_size=recipe.measure.batch_size,
            timed=recipe.measure.speed,
            progress=progress,
        )
        document = _document(recipe, checkpoint, name, data, before, after, seconds, time.time() - begun)
        _finish(out, scratch / f"step-{len(recipe.steps)}", document, overwrite)
        shutil.rmtree(scratch, ignore_errors=True)
    return document


def _before(checkpoint: Checkpoint, data: Data, recipe: Recipe, progress: Progress) -> tuple[Reference, dict[str, Any]]:
    wanted = recipe.measure
    original = reference(checkpoint, data.held_out, wanted.batch_size)
    side = measure(
        checkpoint, data.held_out, original, batch_size=wanted.batch_size, timed=wanted.speed, progress=progress
    )
    return original, side


def _put_aside(checkpoint: Checkpoint, scratch: Path, done: int, digest: str) -> None:
    """Save the state after a step; the state file names it only when it is whole."""
    checkpoint.save(scratch / f"step-{done}", overwrite=True)
    _note(scratch, done, digest)
    shutil.rmtree(scratch / f"step-{done - 1}", ignore_errors=True)
    shutil.rmtree(scratch / f"{TRAINING}-{done - 1}", ignore_errors=True)


def _vocabulary(checkpoint: Checkpoint) -> int:
    return int(checkpoint.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def _note(scratch: Path, done: int, digest: str) -> None:
    """Write how many steps are done."""
    writer.write_json(scratch / STATE, {"digest": digest, "done": done, "threads": torch.get_num_threads()})


def _trains(step: Step) -> bool:
    return step.slug == "train"


def _goes_on(step: Step) -> bool:
    """Whether a step keeps a state of its own while it runs, and goes on with that."""
    return _trains(step) or (isinstance(step, Resumes) and step.long)


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
    total: float,
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
        "seconds": total,
    }


def _with_curve(step: dict[str, Any]) -> dict[str, Any]:
    """A step's record with its training curve, `[[step, loss], ...]`, beside what it chose rather than in it."""
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
    first = load(a, device=device, dtype=dtype)
    _, held_out = load_texts(wanted.texts).split()
    if first.tokenizer is None:
        raise IntaglioError(f"{a} has no tokenizer, so no text can be measured")
    data_a = held_out_segments(first, held_out, wanted)
    original = reference(first, data_a, wanted.batch_size)
    options: dict[str, Any] = {"batch_size": wanted.batch_size, "timed": wanted.speed, "progress": progress}
    side_a = measure(first, data_a, original, **options)
    about = provenance(first, wanted, data_a)
    del first
    second = load(b, device=device, dtype=dtype)
    if second.tokenizer is None:
        raise IntaglioError(f"{b} has no tokenizer, so no text can be measured")
    data_b = held_out_segments(second, held_out, wanted)
    same = data_a.digest == data_b.digest and (original.head is not None) == predicts_next(anatomy(second.model))
    side_b = measure(second, data_b, original if same else None, **options)
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
        memory_bytes, gflops}`. Seconds come from a product and a selection timed on this machine just now.

    Raises:
        IntaglioError: as `carve` would, as far as can be told without weights.
    """
    name = recipe.model if model is None else model
    if name is None:
        raise IntaglioError("no model is given: name one on the command line or in the recipe")
    where, wanted = parse_device(device), parse_dtype(dtype)
    _, config = load_config(name)
    kind = wanted if isinstance(wanted, torch.dtype) else (getattr(config, "dtype", None) or torch.float32)
    with torch.device("meta"):
        skeleton = model_class(config, name)(config)
    parts = anatomy(skeleton)
    check_fit(recipe.steps, parts, name)
    texts, _ = calibration_and_held_out(load_texts(recipe.calibration.texts), load_texts(recipe.measure.texts))
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
    flops_per_s, elements_per_s = machine_rates(where, kind)
    measured = recipe.measure.samples * min(recipe.measure.length, length)
    measure_seconds = 2 * 2.0 * (parameters + workload.block_parameters) * measured / flops_per_s
    steps = []
    for step in recipe.steps:
        cost = _estimate(step, workload, texts)
        took = cost.flops / flops_per_s + cost.sorted_elements / elements_per_s
        memory = parameters * element + cost.extra_bytes
        fields = method_of(step).model_dump()
        steps.append(
            {"slug": step.slug, "verb": _verb(step), "parameters": fields, "seconds": took, "memory_bytes": memory}
        )
    # Beyond the weights: one float32 table of logits and its log-softmax, twice (the original's too), and the head's
    # copy.
    head = parts.config.vocab_size * workload.hidden * element
    measuring = parameters * element + head + 4 * (1 << 26)
    return {
        "model": name,
        "parameters": parameters,
        "bytes": parameters * element,
        "tokens": workload.tokens,
        "steps": steps,
        "measure_seconds": measure_seconds,
        "seconds": measure_seconds + sum(step["seconds"] for step in steps),
        "memory_bytes": max([measuring, *(step["memory_bytes"] for step in steps)]),
        "gflops": flops_per_s / 1e9,
    }


def _verb(step: Step) -> str:
    return "train" if _trains(step) else "fit" if isinstance(step, Fit) else "carve"


def _estimate(step: Step, workload: Workload, texts: Corpus) -> Cost:
    if isinstance(step, Fit):
        return cast(Fitting, step.method).estimate_fit(workload, texts)
    return cast(Carving, step).estimate(workload)


def machine_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Floating-point operations a second of a matrix product, and elements a second of a selection, timed now.

    Args:
        device: where.
        dtype: of the product.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 768, generator=generator).to(device, dtype)
    y = torch.randn(768, 768, generator=generator).to(device, dtype)
    score = torch.randn(256, 768, generator=generator).to(device)

    def best(work: Any) -> float:
        found = float("inf")
        for _ in range(5):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found = min(found, time.perf_counter() - start)
        return found

    # A transformer's pass reaches about half of what a lone product does.
    flops = 0.5 * 2 * 512 * 768 * 768 / best(lambda: x @ y)
    return flops, score.numel() / best(lambda: score.kthvalue(384, dim=1))
