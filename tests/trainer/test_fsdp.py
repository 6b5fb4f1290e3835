"""FSDP2 over two processes is one process: the same losses and weights, resumed, with adapters, and stock at the end.

Accelerate runs FSDP on accelerators alone, and DDP in its place on CPUs; what it would do there is done here by hand,
over gloo: its state says FSDP and has its plugin. From there on it is accelerate's and Trainer's own code.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.checkpoint import Checkpoint
from intaglio.methods.weights.lost import LOST
from tests.trainer.helpers import checkpoint, far, run, same, weights
from tests.trainer.test_loop import Owning
from tests.trainer.test_modifiers import half_zero, zeros

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("llama", {}),
    "tied": ("llama_tied", {}),
    "adapters": ("llama", {"lora": {"r": 2}}),
    "owned modules": ("gemma3", {"objective": Owning}),
    "replaced": ("llama", {}),
}
SETTINGS: dict[str, Any] = {"batch_size": 4, "gradient_accumulation_steps": 2, "steps": 6, "save_every": 2}

SCRIPT = """
import os, sys, torch
torch.set_num_threads(1)
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import Trainer
from intaglio.trainer import loop as loops
from tests.trainer.helpers import run, weights
from tests.trainer.test_resume import Killed
from tests.trainer.test_fsdp import arguments_of, made

out, how, directory, case = sys.argv[1:]
stock = Trainer.create_accelerator_and_postprocess
def sharded(trainer):
    stock(trainer)
    state = trainer.accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=case == "tied"
    )
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.is_fsdp_enabled = True
Trainer.create_accelerator_and_postprocess = sharded

modules = []
class Watched(loops.TrainingModule):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        modules.append(self)
loops.TrainingModule = Watched

def look(done, total, what):
    assert all(isinstance(p, DTensor) for p in modules[0].parameters())
    blocks = modules[0].model.get_submodule("model.layers")
    assert all(type(block).__name__.startswith("FSDP") for block in blocks)
    if how == "killed" and done == 3:
        raise Killed

ckpt = made(case)
kinds = [type(module) for module in ckpt.model.modules()]
try:
    done = run(ckpt, directory=directory, progress=look, **arguments_of(case))
except Killed:
    torch.distributed.barrier()
    os._exit(0)
assert not any(isinstance(p, DTensor) for p in ckpt.model.parameters())
assert [type(module) for module in ckpt.model.modules()] == kinds
ckpt.model(torch.arange(3, 20)[None])
if os.environ["RANK"] == "0":
    save_file({name: value.clone() for name, value in weights(ckpt).items()}, out)
    print(done.tokens, *[line.loss for line in done.history])
"""


def made(case: str) -> Checkpoint:
    """What is trained."""
    family = CASES[case][0]
    return LOST(rank=4).apply(checkpoint(family)) if case == "replaced" else half_zero(family)


def arguments_of(case: str) -> dict[str, Any]:
    """What `run` takes."""
    more = {name: value() if callable(value) else value for name, value in CASES[case][1].items()}
    return {**SETTINGS, **more}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_sharded_processes_are_one(case: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out, script = tmp_path / "out.safetensors", tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    for how in ("killed", "resumed"):
        words = [*command, str(out), how, str(tmp_path / "run"), case]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    alone = made(case)
    pattern = zeros(alone)
    one = run(alone, **arguments_of(case))
    there = load_file(out)
    assert far(there, {name: value for name, value in weights(alone).items() if name in there}) < 1e-5
    tokens, *losses = done.stdout.split()
    assert int(tokens) == one.tokens
    assert [float(loss) for loss in losses] == pytest.approx([line.loss for line in one.history], abs=1e-5)
    kept = {name: value == 0 for name, value in there.items() if name in pattern}
    assert same(kept, {name: pattern[name] for name in kept})


def test_plain_tensors_pass_as_they_are() -> None:
    from intaglio.trainer.fsdp import full_tensor, is_sharded, shard_like, unshard

    ckpt = half_zero("llama")
    before, value = weights(ckpt), torch.arange(3.0)
    assert full_tensor(value) is value
    assert shard_like(value, value) is value
    unshard(ckpt.model)
    assert not is_sharded(ckpt.model)
    assert same(before, weights(ckpt))
