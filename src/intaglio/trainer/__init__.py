"""Training loop on `transformers.Trainer`: any objective that fits a model, exact resume.

    import intaglio
    from intaglio.trainer import CausalLM, train

    ckpt = intaglio.new("llama", width=128, depth=4, context=256)
    result = train(ckpt, texts, objective=CausalLM(length=256), steps=500, batch_size=16, directory="run/")
    print(result.history[-1].loss)

- `loop`: `train` and its result.
- `settings`: the settings of a run, validated.
- `protocols`: objectives, training modifiers, selectors.
- `causal_lm`, `instruction_tuning`, `token_classification`, `classification`: objectives.
- `encoder_training`, `contrastive`, `cls_and_terms`: text encoders on pairs; `mining`, `retrieval_evaluation`: their
  hard negatives and held-out retrieval; `term_explanation`, `sentence_transformer`: what is done with the result.
- `masked_lm`: masked language modelling of whole words.
- `dataset`, `instruction_data`: from a user's data to rows, in memory or as a stream; instruction pairs.
- `rng`: randomness keyed by (seed, epoch, example id).
- `lora`, `sparsity_mask`: adapters through PEFT; zeros of pruned layers stay zeros.
- `data_selection`, `tokenised_samples`: data selection and its random baseline; samples as selectors score them.
- `hf_trainer`: `transformers.Trainer` with the loss of an objective and exact resume.
- `stock_trainer`, `samples`: rows and collators for a stock `Trainer`; outputs before and after for the report.
- `modified_loss`, `mixing`, `gathering`: a loss with modifiers; pairs of mixed rows; rows of all processes.
- `shown_examples`, `label_report`: training rows and suspicious labels as the report shows them.
- `resume`, `history`, `progress_report`: the directory of a resumable run, its log, its progress page.
- `preserve_state`, `fsdp`: restoring context managers; FSDP helpers.
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
from intaglio.trainer.stock_trainer import EpochCollator, ObjectiveModule, training_rows

__all__ = [
    "Batch",
    "CausalLM",
    "EpochCollator",
    "Example",
    "InstructionTuning",
    "KeyedRNG",
    "LogEntry",
    "Lora",
    "Loss",
    "ModifierSession",
    "Objective",
    "ObjectiveModule",
    "Prepares",
    "Selection",
    "Selector",
    "TrainResult",
    "TrainingModifier",
    "TrainingRun",
    "train",
    "training_rows",
]
