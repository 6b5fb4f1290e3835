"""Stock beam search over groups of beams that choose in order, each with a penalty on what earlier groups chose.

Each group is a batch item of transformers' beam search, which keeps its finished hypotheses and its stopping rule; only
the scores from which continuations are chosen change. All beams go through the model in one pass a step.

Dimension letters: N prompts, G groups, I = N G items, B beams of a group, K candidates of an item, V vocabulary,
L tokens of a row, R rows, T new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import CACHES


@dataclass(frozen=True)
class Chosen:
    """Extensions that a group chose at a step, for one prompt a row.

    Args:
        ids_NKT: new tokens of its B best candidates, the step's included.
        active_NK: 1.0 where they count; 0.0 where the search of the group has ended.
    """

    ids_NKT: Tensor
    active_NK: Tensor


Similarity = Callable[[Tensor, Sequence[Chosen], int], Tensor]
"""`(ids_NBT, earlier, V) -> similarity` of each beam, extended by each token, to the earlier groups: [N, B or 1, V]."""


def expanded(model: Any, beams: int, input_ids: Tensor, model_kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return prompts and model arguments with a row for each beam.

    Raises:
        IntaglioError: `generate` made or filled a cache for one row a prompt.
    """
    cache = next((model_kwargs[name] for name in CACHES if model_kwargs.get(name) is not None), None)
    plain = getattr(cache, "self_attention_cache", cache)  # that of an encoder-decoder
    if cache is not None and (not isinstance(plain, DynamicCache) or any(map(_filled, plain.layers))):
        raise IntaglioError(
            f"a {type(cache).__name__} that is static or holds tokens has one row a prompt; give num_beams to generate"
        )
    rows: tuple[Tensor, dict[str, Any]] = model._expand_inputs_for_generation(
        expand_size=beams, is_encoder_decoder=model.config.is_encoder_decoder, input_ids=input_ids, **model_kwargs
    )
    return rows


def _filled(layer: Any) -> bool:
    """Return whether a layer of a cache holds states; those of linear attention have no length."""
    states = getattr(layer, "is_conv_states_initialized", {}) | getattr(layer, "is_recurrent_states_initialized", {})
    return getattr(layer, "is_initialized", False) or any(states.values())


@dataclass(frozen=True)
class _Step:
    """Candidates of a step: local beam, token, log-probability and penalty of each [I, K]."""

    beams_IK: Tensor
    tokens_IK: Tensor
    log_probs_IK: Tensor
    penalties_IK: Tensor


class GroupedSearch:
    """The model as stock beam search sees it: every group a batch item, chosen for in order.

    It stands in for `self` of `GenerationMixin._beam_search` and replaces three of its functions; the rest is the
    model's.

    Args:
        model: causal or encoder-decoder.
        groups: G, at most one a beam.
        width: B, beams of a group.
        penalty: factor of the similarity that is taken from the scores of an extension, in nats.
        similarity: of extensions to the groups that chose before.
        raw: whether running scores leave the penalties out. Default False.
    """

    def __init__(
        self, model: Any, groups: int, width: int, penalty: float, similarity: Similarity, raw: bool = False
    ) -> None:
        self._model, self._groups, self._width = model, groups, width
        self._penalty, self._similarity, self._raw = penalty, similarity, raw
        self._running_IB = self._ended_I = torch.empty(0)  # scores of the beams; which groups' searches have ended
        self._steps: list[_Step] = []
        self.prompt_length = 0

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the model."""
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        """Run the model."""
        return self._model(**inputs)

    def _get_top_k_continuations(
        self,
        accumulated_log_probs: Tensor,
        running_sequences: Tensor,
        running_beam_indices: Tensor,
        cur_len: int,
        decoder_prompt_len: int,
        num_beams: int,
        **rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the candidates of every group: scores [I, K], tokens [I, K, L], beam indices [I, K, T]."""
        groups, step = self._groups, cur_len - decoder_prompt_len
        self.prompt_length = decoder_prompt_len
        items = len(accumulated_log_probs)
        device = accumulated_log_probs.device
        if not self._steps:
            self._running_IB = torch.zeros(items, num_beams, device=device)
            self._ended_I = torch.zeros(items, dtype=torch.bool, device=device)
        log_probs_IBV = accumulated_log_probs.view(items, num_beams, -1)
        vocabulary = log_probs_IBV.shape[-1]
        rows_N = torch.arange(items // groups, device=device)
        earlier: list[Chosen] = []
        parts: list[tuple[Tensor, ...]] = []
        for group in range(groups):
            own = slice(group, None, groups)
            scores_NBV = plain_NBV = log_probs_IBV[own]
            if earlier and self._penalty:
                before_NBT = running_sequences[own, :, decoder_prompt_len:cur_len]
                scores_NBV = plain_NBV - self._penalty * self._similarity(before_NBT, earlier, vocabulary)
            top_NK, ids_NKL, indices_NKT = self._model._get_top_k_continuations(
                accumulated_log_probs=scores_NBV.reshape(len(rows_N), -1),
                running_sequences=running_sequences[own],
                running_beam_indices=running_beam_indices[own],
                cur_len=cur_len,
                decoder_prompt_len=decoder_prompt_len,
                num_beams=num_beams,
                **{**rest, "batch_size": len(rows_N)},
            )
            beams_NK = indices_NKT[:, :, step].long() - rows_N[:, None] * num_beams
            indices_NKT[:, :, step] = beams_NK + (rows_N[:, None] * groups + group) * num_beams
            tokens_NK = ids_NKL[:, :, cur_len]
            plain_NK = plain_NBV.flatten(1).gather(1, beams_NK * vocabulary + tokens_NK)
            active_NB = (~self._ended_I[own, None]).float().expand(-1, num_beams)
            earlier.append(Chosen(ids_NKL[:, :num_beams, decoder_prompt_len : cur_len + 1], active_NB))
            parts.append((top_NK, ids_NKL, indices_NKT, beams_NK, tokens_NK, plain_NK))
        top_IK, ids_IKL, indices_IKT, beams_IK, tokens_IK, plain_IK = (
            torch.stack(part, 1).flatten(0, 1) for part in zip(*parts, strict=True)
        )
        log_probs_IK = plain_IK - self._running_IB.gather(1, beams_IK)
        self._steps.append(_Step(beams_IK, tokens_IK, log_probs_IK, plain_IK - top_IK))
        return plain_IK if self._raw else top_IK, ids_IKL, indices_IKT

    def _get_running_beams_for_next_iteration(self, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the best candidates that continue, in the order in which they were chosen."""
        running: tuple[Tensor, Tensor, Tensor]
        if self._raw:
            hits_IK = given["next_token_hits_stopping_criteria"]
            kept_IB = hits_IK.long().sort(dim=1, stable=True).indices[:, : given["num_beams"]]
            scores_IK = given["topk_log_probs"] - 1e9 * hits_IK.float()
            values = (given["topk_running_sequences"], scores_IK, given["topk_running_beam_indices"])
            running = tuple(self._gather_beams(value, kept_IB) for value in values)
        else:
            running = self._model._get_running_beams_for_next_iteration(**given)
        self._running_IB = running[1]
        return running

    def _check_early_stop_heuristic(self, **given: Any) -> Tensor:
        """Return which groups may still improve; raw scores are not in descending order, so their best is taken."""
        given["running_beam_scores"] = given["running_beam_scores"].max(dim=1, keepdim=True).values
        improvable_I1: Tensor = self._model._check_early_stop_heuristic(**given)
        full_I = given["is_sent_finished"].all(1) & (given["early_stopping"] is True)
        self._ended_I = ~improvable_I1[:, 0] | full_I
        return improvable_I1

    def totals(self, ids_RT: Tensor, indices_RT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probability, penalty and length of each hypothesis [R], added up along its beams."""
        items_R = torch.arange(len(indices_RT), device=indices_RT.device) // self._width
        log_probs_R, penalties_R = (torch.zeros(len(indices_RT), device=indices_RT.device) for _ in range(2))
        for t, step in enumerate(self._steps[: indices_RT.shape[1]]):
            beam_R1 = torch.where(indices_RT[:, t] < 0, -1, indices_RT[:, t] % self._width)[:, None]
            same_RK = (step.beams_IK[items_R] == beam_R1) & (step.tokens_IK[items_R] == ids_RT[:, t, None])
            log_probs_R += torch.where(same_RK, step.log_probs_IK[items_R], 0.0).sum(1)
            penalties_R += torch.where(same_RK, step.penalties_IK[items_R], 0.0).sum(1)
        return log_probs_R, penalties_R, (indices_RT >= 0).sum(1)
