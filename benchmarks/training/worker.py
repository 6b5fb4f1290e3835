"""One loop, one training, one line of JSON: milliseconds a step, peak memory, last loss.

    python benchmarks/training/worker.py --loop ours --size small

All loops train the same weights on the same rows in the same order with the same optimizer: fused AdamW, a constant
rate, the gradient clipped to norm 1, float32. The last loss says whether they did the same.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import intaglio
from intaglio.measures.memory import peak_memory
from intaglio.trainer import CausalLM, Draws, train

SIZES: dict[str, dict[str, int]] = {
    "small": {"width": 144, "depth": 4, "batch": 4, "length": 64, "steps": 220, "skip": 20},  # 1M parameters
    "large": {"width": 384, "depth": 8, "batch": 4, "length": 256, "steps": 5, "skip": 1},  # 14M
}
RATE = 1e-3


class Clock:
    """Notes when each step ends; the wall and the processor's time of the process.

    Args:
        skip: first steps that do not count.
    """

    def __init__(self, skip: int) -> None:
        self._skip, self._marks = skip, [(time.perf_counter(), time.process_time())]

    def tick(self, *_: Any) -> None:
        """End a step."""
        self._marks.append((time.perf_counter(), time.process_time()))

    def milliseconds(self) -> tuple[float, float]:
        """Medians over the steps: wall, processor."""
        kept = self._marks[self._skip :]
        spans = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(kept)]
        return 1000 * median(s[0] for s in spans), 1000 * median(s[1] for s in spans)


def bare(model: Any, ids_NT: torch.Tensor, size: dict[str, int], clock: Clock) -> float:
    """What anybody would write in ten lines."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others}], lr=RATE, betas=(0.9, 0.999), weight_decay=0.0, fused=True
    )
    model.train()
    every, losses = max(1, size["steps"] // 100), []
    for step in range(size["steps"]):
        batch = ids_NT[step * size["batch"] : (step + 1) * size["batch"]]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        losses.append(loss.detach())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
    return float(torch.stack(losses[-every:]).mean())  # as the others log it


class Ticking(TrainerCallback):
    """Tells the clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """See the class."""
        self._clock.tick()


class InOrder(Trainer):
    """The stock Trainer without shuffling."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


def stock(model: Any, ids_NT: torch.Tensor, size: dict[str, int], clock: Clock) -> float:
    """`transformers.Trainer` with its own loss."""
    arguments = TrainingArguments(
        output_dir="unused", use_cpu=True, max_steps=size["steps"], per_device_train_batch_size=size["batch"],
        learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=1.0, logging_steps=max(1, size["steps"] // 100),
        save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids_NT]
    trainer = InOrder(model=model, args=arguments, train_dataset=rows, callbacks=[Ticking(clock)])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return float([line["loss"] for line in trainer.state.log_history if "loss" in line][-1])


def ours(model: Any, ids_NT: torch.Tensor, size: dict[str, int], clock: Clock) -> float:
    """`intaglio.train`."""
    order = Draws(0).order(len(ids_NT), 0)
    rows = torch.empty_like(ids_NT)
    rows[order] = ids_NT  # so that its order is that of the others
    done = train(
        intaglio.Checkpoint(model), rows, objective=CausalLM(size["length"], pack=False), steps=size["steps"],
        batch_size=size["batch"], learning_rate=RATE, schedule="constant", warmup=0, progress=clock.tick,
    )  # fmt: skip
    return done.history[-1].loss


LOOPS = {"bare": bare, "trainer": stock, "ours": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description="One training by one loop.")
    parser.add_argument("--loop", choices=LOOPS, required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = SIZES[arguments.size]
    model = intaglio.new("llama", width=size["width"], depth=size["depth"], context=size["length"]).model
    draws = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(256, (size["steps"] * size["batch"], size["length"]), generator=draws)
    clock = Clock(size["skip"])
    with peak_memory(torch.device("cpu")) as peak:
        loss = LOOPS[arguments.loop](model, ids_NT, size, clock)
    wall, processor = clock.milliseconds()
    found = {
        "loop": arguments.loop,
        "size": arguments.size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "ms": wall,
        "cpu_ms": processor,
        "peak_bytes": peak.bytes,
        "loss": loss,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
