"""Measurements of a model: functions `measure(measured) -> {name: value or {inner unit: value}}`."""

from __future__ import annotations

import math
from contextlib import ExitStack
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.designs.base import Measured, Values
from intaglio.evidence.engine.claim import Metric
from intaglio.evidence.testbeds.haystack import Needles, answers
from intaglio.measures import activation_sparsity as sparsity
from intaglio.measures.language_modeling import quality
from intaglio.modeling.anatomy import Linear, anatomy
from intaglio.modeling.partial_pass import final_hidden
from intaglio.modeling.replacement import ReplacedLinear

BITS = Metric("bits per byte", "bits")
LOG_PERPLEXITY = Metric("log-perplexity", "nats a token")
OUTPUT_ERROR = Metric("output error", "share", relative=True)
WEIGHT_BYTES = Metric("bytes of the weights", "bytes", continuous=False)
PROJECTION_BYTES = Metric("bytes of the projections", "bytes", continuous=False)
TOKEN_SPARSITY = Metric("token sparsity", "share", "higher", continuous=False)
CHUNK_SPARSITY = Metric("chunk sparsity", "share", "higher", continuous=False)
NEEDLE_SCORE = Metric("log-probability of the answer", "nats", "higher")
NEEDLES = Metric("answers found", "points", "higher", continuous=False)
LOOKUP = Metric("LookUp accuracy", "points", "higher", continuous=False)
PERMUTATION = Metric("Permutation accuracy", "points", "higher", continuous=False)
BATCH = 8
"""Documents measured at a time."""
CHUNK = 8
"""Tokens in a row that chunk sparsity looks at."""
ERROR_TOKENS = 32
"""Tokens of each document that output errors are taken on, the first left out."""


def bits_per_byte(measured: Measured) -> Values:
    """Return the mean over the documents' bytes of -log2 p, for a model of bytes; None where one is not finite."""
    losses = quality(measured.checkpoint, measured.documents.segments, batch_size=2 * BATCH).losses
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return {BITS.name: fmean(finite) / math.log(2) if len(finite) == len(losses) else None}


def log_perplexity(measured: Measured) -> Values:
    """Return the loss of each document in nats a token."""
    losses = quality(measured.checkpoint, measured.documents.segments, batch_size=BATCH).losses
    return {LOG_PERPLEXITY.name: dict(zip(measured.documents.names, losses, strict=True))}


def output_error(measured: Measured) -> Values:
    """Return the relative output error of the projections on the documents.

    Mean over the projections of Σ ||(W - Ŵ) x||² / Σ ||W x||², where x enters in the original model and the first
    token, an attention sink with a norm of its own, is left out.
    """
    assert measured.original is not None
    ids_NT = measured.documents.segments.ids_NT[:, : ERROR_TOKENS + 1]
    return {OUTPUT_ERROR.name: fmean(output_errors(measured.original, measured.checkpoint, ids_NT).values())}


@torch.no_grad()
def output_errors(original: Checkpoint, changed: Checkpoint, ids_NT: Tensor) -> dict[str, float]:
    """Return the relative output error of each projection; see `output_error`."""
    pairs = zip(anatomy(original.model).all_linears(), anatomy(changed.model).all_linears(), strict=True)
    change = {name: linear.read() - other.read() for (name, linear), (_, other) in pairs}
    error, whole = dict.fromkeys(change, 0.0), dict.fromkeys(change, 0.0)

    def hook(name: str, linear: Linear) -> Any:
        def capture(module: nn.Module, args: Any) -> None:
            x_NTI = args[0][:, 1:]
            error[name] += float((x_NTI @ change[name].T).double().square().sum())
            whole[name] += float((x_NTI @ linear.read().T).double().square().sum())

        return linear.module.register_forward_pre_hook(capture)

    with ExitStack() as hooks:
        for name, linear in anatomy(original.model).all_linears():
            hooks.enter_context(hook(name, linear))
        for ids_BT in ids_NT.split(BATCH):
            final_hidden(anatomy(original.model), {"input_ids": ids_BT.to(original.device)})
    return {name: error[name] / whole[name] for name in change}


def weight_bytes(measured: Measured) -> Values:
    """Return the bytes of all weights, and of the blocks' projections with their scales and biases."""
    blocks = anatomy(measured.checkpoint.model).blocks
    modules = (m for block in blocks for m in block.modules() if isinstance(m, (nn.Linear, ReplacedLinear)))
    own = {id(p): p for module in modules for p in module.parameters(recurse=False)}
    projections = sum(p.numel() * p.element_size() for p in own.values())
    return {WEIGHT_BYTES.name: float(measured.checkpoint.bytes), PROJECTION_BYTES.name: float(projections)}


def activation_sparsity(measured: Measured) -> Values:
    """Return the share of experts that are inactive for a token, and through `CHUNK` tokens in a row."""
    shares = sparsity.activation_sparsity(measured.checkpoint, measured.documents.segments, CHUNK, 2 * BATCH)
    if shares is None:
        return {TOKEN_SPARSITY.name: 0.0, CHUNK_SPARSITY.name: 0.0}
    return {TOKEN_SPARSITY.name: shares.token_sparsity, CHUNK_SPARSITY.name: shares.chunk_sparsity}


def needles(measured: Measured) -> Values:
    """Return the mean log-probability of the answers of a `Haystack`, and the share of them that is found."""
    documents: Needles = measured.bed.documents(measured.key.split, measured.key.base)
    correct_NQ, score_NQ = answers(measured.checkpoint.model, documents)
    return {NEEDLE_SCORE.name: float(score_NQ.mean()), NEEDLES.name: 100 * float(correct_NQ.float().mean())}
