"""Stage C: the expansion policy, trained by GRPO on the frozen decoder and compressor.

Dimension letters: G sampled sets, P picks of a set, L chunks of a context, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.methods.base import Progress
from intaglio.methods.retrieval.refrag.compressor import Compressor
from intaglio.methods.retrieval.refrag.functional import (
    advantages,
    clipped_loss,
    expansion_count,
    pick_log_probs,
    sample_picks,
)
from intaglio.methods.retrieval.refrag.passages import mixed_embeddings
from intaglio.trainer import resume as run_state
from intaglio.trainer.causal_lm import IGNORED
from intaglio.trainer.protocols import Batch, Example
from intaglio.trainer.rng import KeyedRNG, generator

MAX_GRAD_NORM = 1.0
TENSORS = "policy.safetensors"
"""Weights and moments in a saved state."""

Collate = Callable[[Sequence[Example], Sequence[Sequence[int]]], Batch]
"""Makes a batch of rows, each with the chunks that stay tokens."""


@torch.no_grad()
def rewards(model: Any, batch: Batch, embeddings_ND: Tensor) -> Tensor:
    """Return the mean log-likelihood of each row's targets, -log-perplexity, [G]; every row has the same chunks."""
    inputs = mixed_embeddings(model, batch["input_ids"], batch["slots"], embeddings_ND)
    logits_GTV = model(inputs_embeds=inputs, attention_mask=batch["attention_mask"], use_cache=False).logits.float()
    target_GT = batch["target"]
    losses_GT = F.cross_entropy(logits_GTV.transpose(1, 2), target_GT, ignore_index=IGNORED, reduction="none")
    return -losses_GT.sum(1) / (target_GT != IGNORED).sum(1)


def train_policy(
    checkpoint: Checkpoint,
    compressor: Compressor,
    rows: Sequence[Example],
    collate: Collate,
    *,
    share: float,
    groups: int,
    clip: float,
    updates: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    data: str,
    directory: Path | None,
    resume: bool,
    progress: Progress,
) -> list[float]:
    """Train policy and score in place, and return the mean reward of each step.

    A context's sets are sampled by the policy before the step. Each of the step's updates minimises the clipped loss
    against the probabilities at sampling, averaged over the contexts of a batch. There is no critic and no KL term.

    Args:
        checkpoint: the decoder.
        compressor: owns the policy; the rest of it stays as it is.
        rows: contexts with the tokens to predict.
        collate: makes batches of a context with one of its sets a row.
        share: share p of the chunks that stay tokens.
        groups: sets G of a context.
        clip: of the probability ratio.
        updates: optimizer updates of a step.
        steps: batches of contexts.
        batch_size: contexts of a step.
        learning_rate: of AdamW.
        seed: of the order of the rows and of the sets.
        data: digest of the rows.
        directory: for the state after each tenth of the steps; None: nothing is saved.
        resume: whether to continue from the state in `directory`.
        progress: called after each step.

    Raises:
        IntaglioError: `directory` holds another run.
    """
    model, device = checkpoint.model, checkpoint.device
    compressor.eval()  # without dropout: its states are those of the cache
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    trained = [*compressor.policy.parameters(), *compressor.score.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    order, begin, curve = KeyedRNG(seed), 0, []
    if directory is not None:
        arguments = {"share": share, "groups": groups, "clip": clip, "updates": updates, "steps": steps,
                     "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}  # fmt: skip
        digest = run_state.model_digest(nn.ModuleList([model, compressor]))
        identity = {"format": 1, "model": digest, "data": data, "arguments": arguments}
        begin = run_state.start(directory, identity, resume=resume)
        if begin:
            curve = _restore(run_state.checkpoint_path(directory, begin), trained, optimizer)
    for step in range(begin, steps):
        sampled = []
        for place in range(step * batch_size, (step + 1) * batch_size):
            epoch, position = divmod(place, len(rows))
            row = rows[int(order.permutation(len(rows), epoch)[position])]
            whole = {
                name: value.to(device) for name, value in collate([row], [()]).items() if isinstance(value, Tensor)
            }
            with torch.no_grad():
                states_LE = compressor.states(whole["chunk_ids"], whole["chunk_mask"], embedding)
                scores_L = compressor.scores(states_LE)
            picks = expansion_count(len(states_LE), share)
            if picks == len(states_LE):
                continue  # every set is the whole context
            picks_GP = sample_picks(scores_L, picks, groups, generator(seed, "picks", step, place)).to(device)
            batch = _moved(collate([row] * groups, picks_GP.tolist()), device)
            # The rows share a context: their tables repeat the same chunks.
            table_ND = compressor.project(states_LE, embedding).detach().repeat(groups, 1)
            reward_G = rewards(model, batch, table_ND)
            with torch.no_grad():
                old_G = pick_log_probs(scores_L, picks_GP)
            sampled.append((states_LE, picks_GP, old_G, advantages(reward_G), float(reward_G.mean())))
        for _ in range(updates if sampled else 0):
            losses = [
                clipped_loss(pick_log_probs(compressor.scores(states), picks), old, gain, clip)
                for states, picks, old, gain, _ in sampled
            ]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            optimizer.step()
        curve.append(sum(item[-1] for item in sampled) / len(sampled) if sampled else 0.0)
        if directory is not None and ((step + 1) % max(1, steps // 10) == 0 or step + 1 == steps):
            moments = optimizer.state_dict()["state"]
            _save(directory, step + 1, {"weights": trained, "optimizer": moments, "curve": curve})
        progress(step + 1, steps, "refrag: policy")
    optimizer.zero_grad()
    return curve


def _save(directory: Path, step: int, state: Mapping[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    plain = run_state.split(state, tensors)
    path = run_state.checkpoint_path(directory, step)
    path.mkdir(exist_ok=True)
    save_file(tensors, path / TENSORS)
    run_state.finish(directory, step, plain)


@torch.no_grad()
def _restore(path: Path, trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
    """Restore weights and moments, and return the curve so far."""
    state = run_state.join(run_state.read_state(path), load_file(path / TENSORS))
    for parameter, value in zip(trained, state["weights"], strict=True):
        parameter.copy_(value)
    moments = {int(number): value for number, value in state["optimizer"].items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    curve: list[float] = state["curve"]
    return curve


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
