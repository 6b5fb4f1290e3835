"""`train`: the one way in which Intaglio trains a model."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.methods.base import Progress, no_progress
from intaglio.trainer import resume as run_state
from intaglio.trainer.causal_lm import CausalLM
from intaglio.trainer.data_selection import Original, choose
from intaglio.trainer.dataset import Rows, read_rows
from intaglio.trainer.fsdp import unshard
from intaglio.trainer.hf_trainer import Collator, Evaluate, IntaglioTrainer, TrainingCallback, TrainingModule
from intaglio.trainer.history import LogEntry, columns, history
from intaglio.trainer.lora import adapted
from intaglio.trainer.preserve_state import preserve_grads, preserve_modes, preserve_rng
from intaglio.trainer.progress_report import ProgressReport
from intaglio.trainer.protocols import Loss, Objective, Selector, TrainingModifier, TrainingRun
from intaglio.trainer.rng import EVALUATION, KeyedRNG
from intaglio.trainer.settings import Settings
from intaglio.trainer.sparsity_mask import SparsityMask


@dataclass(frozen=True)
class TrainResult:
    """What a run did.

    Args:
        history: its log lines, those before a resume included.
        steps: optimizer steps.
        tokens: tokens that passed, padding not counted.
        seconds: of wall time, over all processes that worked on the run one after the other.
    """

    history: tuple[LogEntry, ...]
    steps: int
    tokens: int
    seconds: float


def train(
    checkpoint: Checkpoint,
    data: Any,
    *,
    objective: Objective | None = None,
    shape: Sequence[TrainingModifier] = (),
    select: Selector | None = None,
    original: Original = None,
    evaluate: Callable[[Checkpoint], Mapping[str, float]] | Any = None,
    directory: str | os.PathLike[str] | None = None,
    resume: bool = True,
    note: bool = True,
    progress: Progress = no_progress,
    **settings: Any,
) -> TrainResult:
    """Train a checkpoint's model in place, and append a line to its record.

    The same arguments give the same weights, bit for bit on a CPU; so does a run that was killed and is called again
    with the same `directory`. Nothing random is drawn from global generators but dropout, whose state is kept.

    Args:
        checkpoint: its model is trained where it is; its mode and `requires_grad` are left as they were.
        data: texts, examples (dicts with `input_ids`, perhaps `labels`, or with whatever the objective reads), token
            ids [N, T], `Segments`, a `Corpus` or a name for `load_texts`: these are held in memory and shuffled anew
            each epoch. Anything else that yields examples (a `datasets` data set, a generator) is read as it goes, and
            may be larger than memory.
        objective: what is predicted. Default `CausalLM()`.
        shape: shapers, called in this order; what they made is baked in at the end. Default: none.
        select: chooses among the examples first (they must be in memory). Default: all of them.
        original: the checkpoint before it was carved, for a selector that compares; or what loads it, so that it is
            in memory only until the examples are chosen. Default: none.
        evaluate: held-out data, on which the mean of the objective's loss is taken; or a function of the checkpoint
            that returns numbers by name. Default: none.
        directory: where a run keeps what it needs to go on after it was killed, and `progress.html`, an early report
            with the curves so far. Default: nowhere.
        resume: whether to go on with the run in `directory`, if there is one (its arguments, data and model must be
            the same). False starts anew. Default True.
        note: whether the run is noted in the record and what the objective owns is attached to the checkpoint. A `fit`,
            which leaves the weights alone and attaches what it trained itself, says False. Default True.
        progress: called after each optimizer step.
        steps: how long to train, in optimizer steps; exactly one of steps, tokens and epochs is given.
        tokens: the same in tokens of the rows, rounded to whole steps.
        epochs: the same in passes over data in memory, rounded up to whole steps.
        batch_size: rows that pass at a time, over all processes. Default 8.
        accumulate: batches of an optimizer step. Default 1.
        learning_rate: at its highest. Default 3e-4.
        schedule: `cosine` (default), `linear` (both to zero) or `constant`, after the warm-up.
        final_share: of the learning rate, at the end of `cosine`. Default 0.
        warmup: steps (a whole number) or share of the steps (below 1) in which the rate rises from 0. Default 0.05.
        optimizer: `adamw` (default) or `sgd`.
        momentum: of SGD. Default 0.9.
        betas: of AdamW. Default (0.9, 0.999).
        weight_decay: of matrices. Default 0.
        clip: largest norm of the gradient; 0: any. Default 1.
        seed: of the order of the data, of the objective's draws and of dropout. Default 0.
        precision: `float32` (default) or `bfloat16` (autocast; the weights stay float32).
        gradient_checkpointing: whether activations are computed again for the gradient, which saves memory. Default
            False.
        lora: `Lora` or its fields: trains low-rank adapters alone and merges them at the end. Default: all weights.
        freeze: whether the model stays as it is, and only what the objective and the shapers own is trained. Default
            False.
        keep_mask: whether the zeros of pruned linear layers stay zeros (with `shape`, which may choose zeros of its
            own, only under LoRA). Default True.
        patience: stop after so many evaluations in a row without a new least value of `watch`. Default: never.
        watch: the name of that value. Default `loss`.
        report_to: where Trainer sends the log too, such as `tensorboard` or `wandb`. Default: nowhere.
        log_directory: of TensorBoard. Default: `runs`, in `directory` if there is one.
        log_every: steps between two lines of the history. Default: a hundredth of the steps.
        save_every: steps between two states in `directory`. Default: a tenth of the steps.
        evaluate_every: steps between two evaluations. Default: a tenth of the steps. The last step is always one.

    An objective with a slug that owns modules leaves their tensors behind as the checkpoint's attachment of that name.

    Returns:
        The history and what the run cost.

    Raises:
        IntaglioError: a setting or an example is wrong, the model cannot be trained so, `directory` holds another run,
            or the loss is not finite (the step is named; states already saved stay).
    """
    goal: Objective = CausalLM() if objective is None else objective
    chosen = Settings.of(**settings)
    shapers = [*shape] or ([SparsityMask()] if chosen.keep_mask and chosen.lora is None else [])
    _check(checkpoint, goal, shapers, chosen)
    model, before = checkpoint.model, "" if directory is None else run_state.model_digest(checkpoint.model)
    if chosen.lora is not None:
        chosen.lora.check(model)  # refused before any work
    draws = KeyedRNG(chosen.seed)
    path = None if directory is None else Path(directory)
    choice = choose(checkpoint, data, select, original, chosen.seed, path if resume else None, before, progress)
    rows = read_rows(checkpoint, data if choice is None else choice.examples, goal, draws)
    model = checkpoint.model  # an objective may have given it another head
    arguments = {
        "objective": run_state.describe(goal),
        "shape": [run_state.describe(shaper) for shaper in shape],
        "select": None if select is None else run_state.describe(select),
        **chosen.model_dump(mode="json"),
    }
    steps = _steps(chosen, rows)
    identity = {"format": 1, "model": before, "data": rows.digest, "arguments": arguments | {"steps": steps}}
    folder = tempfile.TemporaryDirectory(prefix="intaglio-train-")
    length = None if rows.table is None else len(rows.table)
    run = TrainingRun(checkpoint, steps, length, chosen.seed, _not_yet, chosen.accumulate)
    with preserve_modes(model), preserve_grads(model), preserve_rng(), folder as scratch, ExitStack() as stack:
        trainer_arguments = _arguments(checkpoint, chosen, steps, path or Path(scratch), saved=path is not None)
        begun = None if path is None else _claim(path, identity, resume)
        if path is not None and choice is not None and trainer_arguments.should_save:
            choice.put_aside(path)
        stack.enter_context(_logged_to(chosen, path))
        judge = _judge(checkpoint, evaluate, goal, chosen)
        if chosen.freeze:
            model.requires_grad_(False)
        stack.enter_context(adapted(model, chosen.lora, keep_mask=chosen.keep_mask, seed=chosen.seed))
        stack.enter_context(_checkpointing(model, chosen.gradient_checkpointing))
        stack.enter_context(_attached(run, shapers))
        step_rows = chosen.batch_size * chosen.accumulate
        workplace = TrainingModule(run, goal, shapers)
        if not any(p.requires_grad for p in workplace.parameters()):
            raise IntaglioError("nothing is left to train: every parameter is frozen, and the objective owns none")
        loop = IntaglioTrainer(
            workplace,
            chosen,
            path,
            args=trainer_arguments,
            train_dataset=rows.slots(steps * step_rows, step_rows, draws),
            data_collator=Collator(goal, draws),
        )
        early = (
            None if path is None or not loop.args.should_save else ProgressReport(path, checkpoint.source, arguments)
        )
        loop.add_callback(TrainingCallback(loop, progress, judge, chosen.evaluate_every or max(1, steps // 10), early))
        loop.run(begun)
        unshard(workplace)  # before shapers and adapters bake
        done = TrainResult(
            history(loop.state.log_history), loop.state.global_step, loop.total_tokens(), loop.sums.seconds
        )
    if note:
        checkpoint.record_step(
            "train",
            run_state.plain(arguments),
            seed=chosen.seed,
            chosen={
                "data": {"digest": rows.digest, "rows": run.rows},
                "steps": done.steps,
                "tokens": done.tokens,
                "curve": columns(done.history),
                **({} if choice is None else choice.noted()),
            },
        )
        if choice is not None:
            checkpoint.record.steps[-1].timings = dict(choice.told.get("seconds") or {})
        _attach_owned(checkpoint, goal)
    return done


def _not_yet(batch: Any) -> Loss:
    raise IntaglioError("the loss of a batch can be asked for once every shaper is attached")


def _attach_owned(checkpoint: Checkpoint, objective: Objective) -> None:
    """Keep what the objective owns with the weights it was trained beside."""
    owned, slug = objective.modules().state_dict(), getattr(objective, "slug", None)
    if owned and slug is not None:
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in owned.items()}
        checkpoint.attach(slug, tensors, run_state.describe(objective)[slug])


@contextmanager
def _attached(run: TrainingRun, shapers: Sequence[TrainingModifier]) -> Iterator[None]:
    """Attach shapers, and detach those that were, in the opposite order."""
    with ExitStack() as stack:
        for shaper in shapers:
            shaper.attach(run)
            stack.callback(shaper.detach, run)
        yield


@contextmanager
def _logged_to(settings: Settings, directory: Path | None) -> Iterator[None]:
    """Tell TensorBoard's callback where to write: it reads the environment."""
    name = "TENSORBOARD_LOGGING_DIR"
    before = os.environ.get(name)
    if settings.log_directory is not None or before is None:
        os.environ[name] = settings.log_directory or str((directory or Path()) / "runs")
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextmanager
def _checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Switch gradient checkpointing on, and off again if it was."""
    # The second name is that of older releases, deprecated since.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if not wanted or getattr(model, f"is_{name}_checkpointing"):
        yield
        return
    if not model.supports_gradient_checkpointing:
        raise IntaglioError(f"{type(model).__name__} has no gradient checkpointing; leave gradient_checkpointing out")
    getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    try:
        yield
    finally:
        getattr(model, f"{name}_checkpointing_disable")()


def _check(
    checkpoint: Checkpoint, objective: Objective, shapers: Sequence[TrainingModifier], settings: Settings
) -> None:
    wrong = [shaper for shaper in shapers if not isinstance(shaper, TrainingModifier)]
    if wrong:
        raise IntaglioError(f"shape holds {type(wrong[0]).__name__}; a shaper has attach, on_step and the others")
    if not isinstance(objective, Objective):
        raise IntaglioError(f"objective is {type(objective).__name__}; it needs modules, collate and loss")
    half = [n for n, p in checkpoint.model.named_parameters() if p.requires_grad and p.dtype.itemsize < 4]
    if half and settings.lora is None and not settings.freeze:
        raise IntaglioError(
            f"{half[0]} is {checkpoint.model.get_parameter(half[0]).dtype}, too coarse for small updates; load the "
            "model with dtype='float32' (and train with precision='bfloat16' for speed)"
        )
    reporters = get_available_reporting_integrations()
    unknown = [name for name in settings.report_to if name not in reporters]
    if unknown:
        raise IntaglioError(
            f"report_to names {unknown[0]!r}, which is not installed; {did_you_mean(unknown[0], reporters)}"
        )
    if (
        os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes", "on")
        and checkpoint.device.type == "cpu"
    ):
        raise IntaglioError(
            "FSDP is asked for on CPUs, where accelerate runs DDP in silence; leave ACCELERATE_USE_FSDP out or use GPUs"
        )
    if settings.batch_size % _processes():
        raise IntaglioError(
            f"batch_size is {settings.batch_size}; it must be a multiple of the {_processes()} processes"
        )


def _processes() -> int:
    """How many processes `torchrun` or `accelerate launch` started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _steps(settings: Settings, rows: Rows) -> int:
    step_rows = settings.batch_size * settings.accumulate
    if settings.steps is not None:
        return settings.steps
    if settings.tokens is not None:
        return max(1, round(settings.tokens / (rows.mean * step_rows)))
    assert settings.epochs is not None  # one of the three is given
    if rows.table is None:
        raise IntaglioError("epochs needs data of known length; give a list, or say how long by steps or tokens")
    return max(1, math.ceil(settings.epochs * len(rows.table) / step_rows))


def _claim(directory: Path, identity: dict[str, Any], resume: bool) -> Path | None:
    """Claim the directory; of several processes the first does, and tells the others what it found."""
    found: list[Any] = [None, None]
    if int(os.environ.get("RANK", "0")) == 0:
        try:
            found[0] = run_state.start(directory, identity, resume=resume)
        except IntaglioError as error:
            found[1] = str(error)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found)
    if found[1] is not None:
        raise IntaglioError(found[1])
    return run_state.checkpoint_path(directory, found[0]) if found[0] else None


def _arguments(
    checkpoint: Checkpoint, settings: Settings, steps: int, directory: Path, *, saved: bool
) -> TrainingArguments:
    cosine = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": settings.final_share}}
    plain = {"linear": "linear", "constant": "constant_with_warmup"}
    device = checkpoint.device.type
    arguments = TrainingArguments(
        output_dir=str(directory),
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and _processes() > 1 else None,
        ddp_find_unused_parameters=False,
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size // _processes(),
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps(steps),
        max_grad_norm=settings.clip,
        bf16=settings.precision == "bfloat16",
        seed=settings.seed,
        logging_steps=settings.log_every or max(1, steps // 100),
        logging_nan_inf_filter=False,
        save_strategy="steps" if saved else "no",
        save_steps=settings.save_every or max(1, steps // 10),
        # One data loader a process, each with its own share of the batches.
        accelerator_config={"dispatch_batches": False},
        dataloader_pin_memory=device == "cuda",
        remove_unused_columns=False,
        report_to=settings.report_to,
        disable_tqdm=True,
        **(cosine if settings.schedule == "cosine" else {"lr_scheduler_type": plain[settings.schedule]}),
    )
    if device == "cuda":
        arguments._n_gpu = 1  # several visible GPUs would be wrapped in DataParallel
    return arguments


def _judge(checkpoint: Checkpoint, evaluate: Any, objective: Objective, settings: Settings) -> Evaluate | None:
    """What is called to evaluate: in evaluation mode, without gradients, global generators untouched."""
    if evaluate is None:
        return None
    if callable(evaluate):

        def numbers() -> Mapping[str, float]:
            found: Mapping[str, float] = evaluate(checkpoint)
            return found
    else:
        held_out = list(read_rows(checkpoint, evaluate, objective, KeyedRNG(settings.seed, training=False)).read())

        def numbers() -> Mapping[str, float]:
            return {"loss": _held_out_loss(checkpoint, held_out, objective, settings)}

    def judged() -> Mapping[str, float]:
        with torch.no_grad(), preserve_modes(checkpoint.model), preserve_rng():
            checkpoint.model.eval()
            return numbers()

    return judged


def _held_out_loss(checkpoint: Checkpoint, rows: list[Any], objective: Objective, settings: Settings) -> float:
    """The mean of the objective's loss over batches of held-out rows, by their weights."""
    collate, total, weights = Collator(objective, KeyedRNG(settings.seed, training=False)), 0.0, 0.0
    for start in range(0, len(rows), settings.batch_size):
        part = [
            {**row, "id": start + n, "epoch": EVALUATION, "step": 0}
            for n, row in enumerate(rows[start : start + settings.batch_size])
        ]
        made = collate(part)
        batch = {
            name: value.to(checkpoint.device) if isinstance(value, torch.Tensor) else value
            for name, value in made["batch"].items()
        }
        total += float(objective.loss(checkpoint.model, batch).total) * made["weight"]
        weights += made["weight"]
    return total / weights if weights else 0.0
