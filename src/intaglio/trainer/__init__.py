"""Training loop on `transformers.Trainer`: any objective that fits a model, exact resume.

    import intaglio
    from intaglio.trainer import CausalLM, train

    ckpt = intaglio.new("llama", width=128, depth=4, context=256)
    result = train(ckpt, texts, objective=CausalLM(length=256), steps=500, batch_size=16, directory="run/")
    print(result.history[-1].loss)

- `loop`: `train` and its result.
- `settings`: the settings of a run, validated.
- `protocols`: objectives, training modifiers, selectors.
- `causal`, `instruct`, `labels`: the objectives `CausalLM`, `InstructionTuning` and `token_classification`.
- `rows`, `pairs`: from a user's data to rows, in memory or as a stream; instruction pairs.
- `draws`: randomness keyed by (seed, epoch, example id).
- `lora`, `zeros`: adapters through PEFT; zeros of pruned layers stay zeros.
- `select`: data selection and its random baseline.
- `stock`: `transformers.Trainer` with the loss of an objective and exact resume.
- `state`, `history`, `early`: the directory of a resumable run, its log, its progress page.
- `keep`, `sharded`: restoring context managers; FSDP helpers.
"""

from __future__ import annotations

from intaglio.trainer.causal_lm import CausalLM
from intaglio.trainer.history import LogEntry
from intaglio.trainer.instruction_tuning import InstructionTuning
from intaglio.trainer.loop import TrainResult, train
from intaglio.trainer.lora import Lora
from intaglio.trainer.protocols import (
    Batch,
    Example,
    Loss,
    ModifierSession,
    Objective,
    Prepares,
    Selection,
    Selector,
    TrainingModifier,
    TrainingRun,
)
from intaglio.trainer.rng import KeyedRNG

__all__ = [
    "Batch",
    "CausalLM",
    "Example",
    "InstructionTuning",
    "KeyedRNG",
    "LogEntry",
    "Lora",
    "Loss",
    "ModifierSession",
    "Objective",
    "Prepares",
    "Selection",
    "Selector",
    "TrainResult",
    "TrainingModifier",
    "TrainingRun",
    "train",
]
