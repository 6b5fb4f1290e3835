"""The one training loop: any objective that fits a model, resumed exactly, on `transformers.Trainer`.

    import intaglio
    from intaglio.trainer import CausalLM, train

    ckpt = intaglio.new("llama", width=128, depth=4, context=256)
    done = train(ckpt, texts, objective=CausalLM(length=256), steps=500, batch_size=16, directory="run/")
    print(done.history[-1].loss)

- `loop`: `train`, and what it returns.
- `settings`: the numbers of a run, validated.
- `protocols`: what an objective, a shaper and a selector are.
- `causal`: rows for next-token prediction, packed without leaks; the objective `CausalLM`.
- `instruct`: the answers of pairs; the objective `InstructionTuning`.
- `labels`: words with labels; the objective `token_classification`.
- `rows`: from a user's data to rows, in memory or as a stream.
- `pairs`: instruction pairs, from a file too.
- `draws`: randomness keyed by (seed, epoch, example id).
- `lora`: adapters through PEFT, merged at the end; zeros of pruned layers stay.
- `zeros`: the same for full training.
- `select`: a selector's choice among the examples, and the choice at random.
- `keep`: what is left as it was found.
- `stock`: `transformers.Trainer` with our loss and trustworthy checkpoints.
- `sharded`: plain tensors out of what FSDP has spread, and back.
- `state`: the directory of a resumable run.
- `history`, `early`: what a run logged; a page that shows it while the run goes on.
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
    "Objective",
    "Prepares",
    "Selection",
    "Selector",
    "TrainResult",
    "TrainingModifier",
    "TrainingRun",
    "train",
]
