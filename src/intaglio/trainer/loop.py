"""`train`: the training entry point for Python and recipes."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.attachments import to_store
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.methods.base import Progress, no_progress
from intaglio.trainer import resume as run_state
from intaglio.trainer.causal_lm import CausalLM
from intaglio.trainer.data_selection import Original, SelectedExamples, choose
from intaglio.trainer.dataset import Rows, read_rows
from intaglio.trainer.encoder_training import EncoderObjective
from intaglio.trainer.fsdp import unshard
from intaglio.trainer.hf_trainer import (
    Collator,
    Evaluate,
    HeldOutBatches,
    IntaglioTrainer,
    TrainingCallback,
    TrainingModule,
    moved,
)
from intaglio.trainer.history import LogEntry, columns, history
from intaglio.trainer.lora import adapted, last_blocks
from intaglio.trainer.modified_loss import check_modifiers, session_reports
from intaglio.trainer.preserve_state import preserve_grads, preserve_modes, preserve_rng, without_dropout
from intaglio.trainer.progress_report import ProgressReport
from intaglio.trainer.protocols import Loss, ModifierSession, Objective, Selector, TrainingModifier, TrainingRun
from intaglio.trainer.rng import EVALUATION, KeyedRNG
from intaglio.trainer.settings import Settings
from intaglio.trainer.sparsity_mask import SparsityMask


@dataclass(frozen=True)
class TrainResult:
    """Result of a training run.

    Args:
        history: its log lines, those before a resume included.
        steps: optimizer steps.
        tokens: tokens trained on, without padding.
        seconds: wall time, time before a resume included.
        reports: results of the modifiers, by slug.
    """

    history: tuple[LogEntry, ...]
    steps: int
    tokens: int
    seconds: float
    reports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def train(
    model: Checkpoint | nn.Module,
    data: Any,
    *,
    objective: Objective | None = None,
    modifiers: Sequence[TrainingModifier] = (),
    select: Selector | None = None,
    original: Original = None,
    evaluate: Callable[[Any], Mapping[str, float]] | Any = None,
    directory: str | os.PathLike[str] | None = None,
    resume: bool = True,
    note: bool = True,
    progress: Progress = no_progress,
    **settings: Any,
) -> TrainResult:
    """Train a model in place; a checkpoint gets a line in its record.

    The same arguments give the same weights, bit for bit on a CPU; so does a run that was killed and is called again
    with the same `directory`. Nothing random is drawn from global generators but dropout, whose state is kept.

    Args:
        model: a checkpoint, or any `nn.Module` with an objective that fits it. Its mode and `requires_grad` are
            restored.
        data: texts, examples (dicts with `input_ids`, perhaps `labels`, or with whatever the objective reads), token
            ids [N, T], `Segments`, a `Corpus` or a name for `load_texts`: these are held in memory and reshuffled
            each epoch. Anything else that yields examples (a `datasets` data set, a generator) is read as it goes, and
            may be larger than memory.
        objective: what is predicted. Default `CausalLM()`.
        modifiers: training modifiers, called in this order; their results are baked in at the end. Default: none.
        select: chooses among the examples first (they must be in memory). Default: all of them.
        original: the checkpoint before it was compressed, for a selector that compares; or a function that loads it, so
            that it is in memory only until the examples are chosen. Default: none.
        evaluate: held-out data, on which the mean of the objective's loss is taken; or a function of `model` that
            returns numbers by name. Default: none.
        directory: where a run keeps what it needs to resume after it was killed, and `progress.html`, a page with the
            curves so far. Default: nowhere.
        resume: whether to resume the run in `directory`, if there is one (its arguments, data and model must be the
            same). False starts over. Default True.
        note: whether the run is noted in the record and the objective's modules are attached to the checkpoint. A
            `fit`, which leaves the weights alone and attaches its own result, passes False. Default True.
        progress: called after each optimizer step.
        steps: length of the run in optimizer steps; exactly one of steps, tokens and epochs is given.
        tokens: the same in tokens of the rows, rounded to whole steps.
        epochs: the same in passes over data in memory, rounded up to whole steps.
        batch_size: rows of a batch, over all processes. Default 8.
        homogeneous_ratio: share of a batch whose rows have the same `task`, a name in each example; the rest is
            exchanged between batches. Rows that fill no batch are left out of an epoch. Default: tasks do not matter.
        gradient_accumulation_steps: batches of an optimizer step. Default 1.
        learning_rate: the highest. Default 3e-4.
        schedule: `cosine` (default), `linear` (both to zero) or `constant`, after the warm-up.
        min_lr_ratio: share of the learning rate that `cosine` ends at. Default 0.
        warmup: steps (a whole number) or share of the steps (below 1) in which the rate rises from 0. Default 0.05.
        optimizer: `adamw` (default) or `sgd`.
        momentum: of SGD. Default 0.9.
        betas: of AdamW. Default (0.9, 0.999).
        weight_decay: of matrices. Default 0.
        max_grad_norm: largest norm of the gradient; 0: any. Default 1.
        seed: of the order of the data, of the objective's draws and of dropout. Default 0.
        precision: `float32` (default) or `bfloat16` (autocast; the weights stay float32).
        gradient_checkpointing: whether activations are recomputed for the gradient, to save memory. Default False.
        lora: `Lora` or its fields: train low-rank adapters alone and merge them at the end. Default: all weights.
        freeze: whether the model stays as it is, and only the modules of objective and modifiers are trained. Default
            False.
        trainable_blocks: number of the last transformer blocks that are trained, with `lora` by adapters in them alone;
            everything else stays as it is. Default: the whole model.
        keep_mask: whether the zeros of pruned linear layers stay zeros (with `modifiers`, which may choose zeros of
            their own, only under LoRA). Default True.
        early_stopping_patience: evaluations in a row without a new minimum of `metric_for_best_model` after which the
            run stops. Default: never.
        metric_for_best_model: the name of that value. Default `loss`.
        stop_at_loss: training loss at which the run stops, in nats, compared with the mean over each `log_every` steps.
            Default: never.
        report_to: other receivers of Trainer's log, such as `tensorboard` or `wandb`. Default: none.
        log_directory: of TensorBoard. Default: `runs`, in `directory` if there is one.
        log_every: steps between two lines of the history. Default: a hundredth of the steps.
        save_every: steps between two states in `directory`. Default: a tenth of the steps.
        evaluate_every: steps between two evaluations. Default: a tenth of the steps. The last step is always evaluated.

    The modules of an objective with a slug become the checkpoint's attachment of that name.

    Returns:
        The history, and the cost of the run.

    Raises:
        IntaglioError: a setting or an example is wrong, the model cannot be trained so, `directory` holds another run,
            or the loss is not finite (the step is named; states already saved stay).
    """
    modifiers = settings.pop("shape", modifiers)
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint(model)
    if objective is None:
        if not isinstance(checkpoint.model, PreTrainedModel):
            raise IntaglioError(f"objective is missing; training {type(checkpoint.model).__name__} needs one")
        objective = CausalLM()
    options = Settings.from_arguments(**settings)
    _check(checkpoint, objective, modifiers, options)
    digest = "" if directory is None else run_state.model_digest(checkpoint.model)
    if options.lora is not None:
        options.lora.check(checkpoint.model)  # refused before any work
    if options.trainable_blocks is not None:
        last_blocks(checkpoint.model, options.trainable_blocks)  # likewise
    rng, path = KeyedRNG(options.seed), None if directory is None else Path(directory)
    choice = choose(checkpoint, data, select, original, options.seed, path if resume else None, digest, progress)
    known = _vocabulary(checkpoint)
    rows = read_rows(checkpoint, data if choice is None else choice.examples, objective, rng)
    share = max((getattr(modifier, "held_out_share", 0.0) for modifier in modifiers), default=0.0)
    rows, held_out = rows.hold_out(share, rng) if share else (rows, [])
    network = checkpoint.model  # only now: an objective may have given it another head
    arguments = {
        "objective": run_state.describe(objective),
        "modifiers": [run_state.describe(modifier) for modifier in modifiers],
        "select": None if select is None else run_state.describe(select),
        **options.model_dump(mode="json"),
    }
    steps = _steps(options, rows)
    identity = {"format": 1, "model": digest, "data": rows.digest, "arguments": arguments | {"steps": steps}}
    length = None if rows.table is None else len(rows.table)
    run = TrainingRun(
        checkpoint,
        steps,
        length,
        options.seed,
        _too_early,
        options.gradient_accumulation_steps,
        rows.table or (),
        options.weight_decay,
        objective,
    )
    if held_out:
        run.held_out = HeldOutBatches(held_out, objective, options.seed, options.batch_size, checkpoint.device)
    with ExitStack() as stack:
        for context in (preserve_modes(network), preserve_grads(network), preserve_rng()):
            stack.enter_context(context)
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="intaglio-train-"))
        trainer_arguments = _arguments(
            checkpoint,
            options,
            steps,
            path or Path(scratch),
            saved=path is not None,
            unused=getattr(objective, "leaves_parameters", False),
        )
        resumed = None if path is None else _claim(path, identity, resume)
        if path is not None and choice is not None and trainer_arguments.should_save:
            choice.save(path)
        stack.enter_context(_tensorboard_directory(options, path))
        evaluator = _evaluator(model, checkpoint, evaluate, objective, options)
        if options.freeze:
            network.requires_grad_(False)
        last = options.trainable_blocks
        if last is not None:
            network.requires_grad_(False)
            for block in last_blocks(network, last):
                block.requires_grad_(True)
        added = sorted(_vocabulary(checkpoint) - known)
        context = adapted(
            network, options.lora, keep_mask=options.keep_mask, seed=options.seed, blocks=last, new_tokens=added
        )
        stack.enter_context(context)
        stack.enter_context(_checkpointing(network, options.gradient_checkpointing))
        if getattr(objective, "disables_dropout", False):
            stack.enter_context(without_dropout(network))
        default = [SparsityMask()] if options.keep_mask and options.lora is None else []
        module = TrainingModule(run, objective, _attach(stack, run, modifiers or default))
        if not any(p.requires_grad for p in module.parameters()):
            raise IntaglioError("nothing is left to train: every parameter is frozen, and the objective owns none")
        trainer = IntaglioTrainer(
            module,
            options,
            path,
            args=trainer_arguments,
            train_dataset=rows.slots(
                steps * options.step_rows, options.step_rows, rng, options.batch_size, options.homogeneous_ratio
            ),
            data_collator=Collator(objective, rng),
        )
        page = None
        if path is not None and trainer.args.should_save:
            page = ProgressReport(path, checkpoint.source, arguments)
        evaluate_every = options.evaluate_every or max(1, steps // 10)
        trainer.add_callback(TrainingCallback(trainer, progress, evaluator, evaluate_every, page))
        trainer.run(resumed)
        unshard(module)  # before modifiers and adapters bake
        reports = session_reports(modifiers or default, module.sessions)
        attached = [session.attachment() for session in module.sessions]
        lines = history(trainer.state.log_history)
        result = TrainResult(lines, trainer.state.global_step, trainer.total_tokens(), trainer.totals.seconds, reports)
    if note and checkpoint is model:
        _record(checkpoint, objective, arguments, options.seed, rows, result, choice)
        for modifier, tensors in zip(modifiers or default, attached, strict=True):
            if tensors:
                _attach_tensors(checkpoint, modifier, tensors)
    return result


def _record(
    checkpoint: Checkpoint,
    objective: Objective,
    arguments: dict[str, Any],
    seed: int,
    rows: Rows,
    result: TrainResult,
    choice: SelectedExamples | None,
) -> None:
    """Append the run to the record, and attach the modules of the objective."""
    checkpoint.record_step(
        "train",
        run_state.plain(arguments),
        seed=seed,
        chosen={
            "data": {"digest": rows.digest, "rows": None if rows.table is None else len(rows.table)},
            "steps": result.steps,
            "tokens": result.tokens,
            "curve": columns(result.history),
            **({"modifiers": run_state.plain(result.reports)} if result.reports else {}),
            **({} if choice is None else choice.record()),
        },
    )
    if choice is not None:
        checkpoint.record.steps[-1].timings = dict(choice.metadata.get("seconds") or {})
    owned = objective.modules().state_dict()
    # An encoder's fields are needed, even if it owns nothing.
    if hasattr(objective, "slug") and (owned or "encoder" in getattr(objective, "kinds", ())):
        about = objective.attachment_data() if isinstance(objective, EncoderObjective) else {}
        _attach_tensors(checkpoint, objective, owned, about)


def _attach_tensors(
    checkpoint: Checkpoint, part: Any, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None
) -> None:
    """Attach tensors to the checkpoint under the slug of an objective or modifier."""
    checkpoint.attach(part.slug, to_store(tensors), run_state.describe(part)[part.slug], dict(about or {}))


def _vocabulary(checkpoint: Checkpoint) -> set[int]:
    """Return the token ids that the tokenizer knows."""
    return set() if checkpoint.tokenizer is None else set(checkpoint.tokenizer.get_vocab().values())


def _too_early(batch: Any) -> Loss:
    raise IntaglioError("the loss of a batch is available once every modifier is attached")


def _attach(stack: ExitStack, run: TrainingRun, modifiers: Sequence[TrainingModifier]) -> list[ModifierSession]:
    """Attach modifiers; the stack detaches their sessions in the opposite order, after an error too."""
    sessions = []
    for modifier in modifiers:
        sessions.append(modifier.attach(run))
        stack.callback(sessions[-1].detach)
    return sessions


@contextmanager
def _tensorboard_directory(settings: Settings, directory: Path | None) -> Iterator[None]:
    """Set the directory of TensorBoard's callback, which reads the environment."""
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
def _checkpointing(model: Any, enabled: bool) -> Iterator[None]:
    """Switch gradient checkpointing on, and off again if it was off."""
    # The second name is that of older releases, deprecated since.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if not enabled or getattr(model, f"is_{name}_checkpointing", False):
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise IntaglioError(f"{type(model).__name__} has no gradient checkpointing; leave gradient_checkpointing out")
    getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    try:
        yield
    finally:
        getattr(model, f"{name}_checkpointing_disable")()


def _check(
    checkpoint: Checkpoint, objective: Objective, modifiers: Sequence[TrainingModifier], settings: Settings
) -> None:
    for modifier in modifiers:
        if not isinstance(modifier, TrainingModifier):
            raise IntaglioError(f"modifiers holds {type(modifier).__name__}; a training modifier has attach")
    check_modifiers(modifiers)
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
            "FSDP is requested on CPUs, where accelerate silently runs DDP; leave ACCELERATE_USE_FSDP out or use GPUs"
        )
    if settings.batch_size % _processes():
        raise IntaglioError(
            f"batch_size is {settings.batch_size}; it must be a multiple of the {_processes()} processes"
        )


def _processes() -> int:
    """Return the number of processes that `torchrun` or `accelerate launch` started, 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _steps(settings: Settings, rows: Rows) -> int:
    if settings.steps is not None:
        return settings.steps
    if settings.tokens is not None:
        return max(1, round(settings.tokens / (rows.mean * settings.step_rows)))
    assert settings.epochs is not None  # one of the three is given
    if rows.table is None:
        raise IntaglioError("epochs needs data of known length; give a list, or say how long by steps or tokens")
    return max(1, math.ceil(settings.epochs * len(rows.table) / settings.step_rows))


def _claim(directory: Path, identity: dict[str, Any], resume: bool) -> Path | None:
    """Claim the directory, and return the saved state to resume. The first process does it and informs the others."""
    outcome: list[Any] = [None, None]
    if int(os.environ.get("RANK", "0")) == 0:
        try:
            outcome[0] = run_state.start(directory, identity, resume=resume)
        except IntaglioError as error:
            outcome[1] = error
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(outcome)
    step, refusal = outcome
    if refusal is not None:
        raise refusal
    return run_state.checkpoint_path(directory, step) if step else None


def _arguments(
    checkpoint: Checkpoint, settings: Settings, steps: int, directory: Path, *, saved: bool, unused: bool
) -> TrainingArguments:
    cosine = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": settings.min_lr_ratio}}
    plain = {"linear": "linear", "constant": "constant_with_warmup"}
    device = checkpoint.device.type
    arguments = TrainingArguments(
        output_dir=str(directory),
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and _processes() > 1 else None,
        ddp_find_unused_parameters=unused,
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size // _processes(),
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps(steps),
        max_grad_norm=settings.max_grad_norm,
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


def _evaluator(
    model: Checkpoint | nn.Module, checkpoint: Checkpoint, evaluate: Any, objective: Objective, settings: Settings
) -> Evaluate | None:
    """Return the evaluation function: in evaluation mode, without gradients, global generators restored."""
    if evaluate is None:
        return None
    if callable(evaluate):

        def metrics() -> Mapping[str, float]:
            values: Mapping[str, float] = evaluate(model)
            return values
    else:
        held_out = list(read_rows(checkpoint, evaluate, objective, KeyedRNG(settings.seed, training=False)).read())

        def metrics() -> Mapping[str, float]:
            return {"loss": _held_out_loss(checkpoint, held_out, objective, settings)}

    def evaluator() -> Mapping[str, float]:
        with torch.no_grad(), preserve_modes(checkpoint.model), preserve_rng():
            checkpoint.model.eval()
            return metrics()

    return evaluator


def _held_out_loss(checkpoint: Checkpoint, rows: list[Any], objective: Objective, settings: Settings) -> float:
    """Return the weighted mean of the objective's loss over batches of held-out rows."""
    collate, total, weights = Collator(objective, KeyedRNG(settings.seed, training=False)), 0.0, 0.0
    examples = [{**row, "id": n, "epoch": EVALUATION, "step": 0} for n, row in enumerate(rows)]
    for start in range(0, len(examples), settings.batch_size):
        made = collate(examples[start : start + settings.batch_size])
        batch = moved(made["batch"], checkpoint.device)
        total += float(objective.loss(checkpoint.model, batch).total) * made["weight"]
        weights += made["weight"]
    return total / weights if weights else 0.0
