"""Token ids, timing and options shared by both sides; imports only torch and safetensors."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

KINDS = ("forward", "step")
HIDDEN = "hidden"


def token_ids(vocabulary: int, tokens: int) -> Tensor:
    """Return the token ids of both sides, int64 [1, tokens]."""
    return torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))


def timed(model: Any, ids: Tensor, kind: str) -> float:
    """Return the seconds of a pass: `forward` without gradients, or `step` with those of all weights (no optimizer)."""
    model.train(kind == "step")
    begun = time.perf_counter()
    if kind == "forward":
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    else:
        model(input_ids=ids, use_cache=False).last_hidden_state.square().mean().backward()
    seconds = time.perf_counter() - begun
    model.zero_grad(set_to_none=True)
    return seconds


def worker_options(what: str) -> argparse.ArgumentParser:
    """Return the argument parser of a worker."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--variant", required=True)
    parser.add_argument("--start", type=int, default=0, help="first bidirectional layer")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hidden", type=Path, help="where the hidden states go")
    return parser


def report(make: Callable[[], Any], arguments: argparse.Namespace) -> None:
    """Make the model, time it, and print one JSON line."""
    torch.set_num_threads(arguments.threads)
    model = make()
    ids = token_ids(model.config.vocab_size, arguments.tokens)
    if arguments.hidden is not None:
        model.eval()
        with torch.no_grad():
            hidden = model(input_ids=ids, use_cache=False).last_hidden_state
        save_file({HIDDEN: hidden.contiguous()}, arguments.hidden)
    results = {}
    for kind in KINDS:
        timed(model, ids, kind)  # not counted
        results[kind] = statistics.median(timed(model, ids, kind) for _ in range(arguments.repeats))
    print(json.dumps(results))
