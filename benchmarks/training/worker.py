"""Train with one loop and print one line of JSON: milliseconds per step, peak memory, last loss.

    python benchmarks/training/worker.py --loop ours --size small
    python benchmarks/training/worker.py --loop ours --size small --between

With `--between`, the loop and a bare one alternate step by step in one process, and the median of the paired
differences is reported too: on a busy machine it varies far less than the difference of two medians.

All loops train the same weights on the same rows in the same order with the same optimizer: fused AdamW, constant
learning rate, gradient norm clipped at 1, float32. Equal last losses show that they did the same.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import intaglio
from intaglio.measures.memory import peak_memory
from intaglio.trainer import CausalLM, KeyedRNG, train

SIZES: dict[str, dict[str, int]] = {
    "small": {"width": 144, "depth": 4, "batch": 4, "length": 64, "steps": 220, "skip": 20},  # 1M parameters
    "large": {"width": 384, "depth": 8, "batch": 4, "length": 256, "steps": 5, "skip": 1},  # 14M
}
RATE = 1e-3


class Bare:
    """A bare training loop."""

    def __init__(self, model: Any, ids_NT: torch.Tensor, size: dict[str, int]) -> None:
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": others}], lr=RATE, betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )
        self._model, self._batches = model.train(), iter(ids_NT.split(size["batch"]))
        self.losses: list[torch.Tensor] = []

    def step(self) -> None:
        """Train one step on the next rows."""
        batch = next(self._batches)
        loss = self._model(input_ids=batch, labels=batch, use_cache=False).loss
        self.losses.append(loss.detach())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


class Clock:
    """Clock of step ends, in wall and CPU time."""

    def __init__(self, skip: int, between: Bare | None = None) -> None:
        self._skip, self._between = skip, between
        self._spans: list[tuple[float, ...]] = []
        self._bare: list[tuple[float, ...]] = []
        self._began = _now()

    def tick(self, *_: Any) -> None:
        """Record the end of a step."""
        self._spans.append(_since(self._began))
        if self._between is not None:
            began = _now()
            self._between.step()
            self._bare.append(_since(began))
        self._began = _now()

    def summary(self) -> dict[str, float]:
        """Return median milliseconds per step, wall and CPU, and their excess over the paired bare step."""
        kept = self._spans[self._skip :]
        results = {name: 1000 * median(span[i] for span in kept) for i, name in enumerate(("ms", "cpu_ms"))}
        pairs = list(zip(kept, self._bare[self._skip :], strict=False))
        for i, name in enumerate(("above_bare_ms", "cpu_above_bare_ms") if pairs else ()):
            results[name] = 1000 * median(span[i] - bare[i] for span, bare in pairs)
        return results


def _now() -> tuple[float, float]:
    # The processor's time takes long to read on some machines: read outside of what is timed, here and in `_since`.
    processor = time.process_time()
    return time.perf_counter(), processor


def _since(began: tuple[float, float]) -> tuple[float, ...]:
    wall = time.perf_counter() - began[0]
    return wall, time.process_time() - began[1]


def bare(model: Any, ids_NT: torch.Tensor, size: dict[str, int], clock: Clock) -> float:
    """Run `Bare` to the end."""
    loop, every = Bare(model, ids_NT, size), max(1, size["steps"] // 100)
    for _ in range(size["steps"]):
        loop.step()
        clock.tick()
    return float(torch.stack(loop.losses[-every:]).mean())  # as the others log it


class Ticking(TrainerCallback):
    """Callback for the clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Record the end of a step."""
        self._clock.tick()


class InOrder(Trainer):
    """Stock Trainer without shuffling."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


def stock(model: Any, ids_NT: torch.Tensor, size: dict[str, int], clock: Clock) -> float:
    """Run `transformers.Trainer` with its own loss."""
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
    order = KeyedRNG(0).permutation(len(ids_NT), 0)
    rows = torch.empty_like(ids_NT)
    rows[order] = ids_NT  # so that its order is that of the others
    done = train(
        intaglio.Checkpoint(model), rows, objective=CausalLM(size["length"], pack=False), steps=size["steps"],
        batch_size=size["batch"], learning_rate=RATE, schedule="constant", warmup=0, progress=clock.tick,
    )  # fmt: skip
    return done.history[-1].loss


LOOPS = {"bare": bare, "trainer": stock, "ours": ours}


def _new(size: dict[str, int]) -> Any:
    return intaglio.new("llama", width=size["width"], depth=size["depth"], context=size["length"]).model


def main() -> None:
    parser = argparse.ArgumentParser(description="One training by one loop.")
    parser.add_argument("--loop", choices=LOOPS, required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--between", action="store_true", help="a step of a bare loop after each of this one's")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = SIZES[arguments.size]
    model = _new(size)
    draws = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(256, (size["steps"] * size["batch"], size["length"]), generator=draws)
    clock = Clock(size["skip"], Bare(_new(size), ids_NT, size) if arguments.between else None)
    with peak_memory(torch.device("cpu")) as peak:
        loss = LOOPS[arguments.loop](model, ids_NT, size, clock)
    results = {
        "loop": arguments.loop,
        "size": arguments.size,
        "between": arguments.between,
        "parameters": sum(p.numel() for p in model.parameters()),
        **clock.summary(),
        "peak_bytes": peak.bytes,
        "loss": loss,
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
