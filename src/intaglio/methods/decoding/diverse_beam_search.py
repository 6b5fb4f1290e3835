"""DiverseBeamSearch (Vijayakumar et al., AAAI 2018): beams in groups, each penalised for repeating earlier groups.

Source: Vijayakumar et al., Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence Models, AAAI 2018,
arXiv 1610.02424; code ashwinkalyan/dbs.

Dimension letters: N prompts, G groups, B beams of a group, K candidates of an item, V vocabulary, L tokens of a row,
R rows, T new tokens, J earlier candidates, n tokens of an n-gram, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode

from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Method
from intaglio.speculative.beam_groups import Chosen, GroupedSearch, Similarity, expanded
from intaglio.speculative.request import dropped_arguments

NUM_BEAMS = 4
"""Beams where neither the decoder nor `generate` sets them."""

_DEFAULTS: dict[str, float] = {"num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0}
"""Options that `generate` fills in where they are not given, so that these values count as not set."""
_MODES = {
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.GROUP_BEAM_SEARCH,
}


def hamming(ids_NBT: Tensor, earlier: Sequence[Chosen], vocabulary: int) -> Tensor:
    """Return how many beams of earlier groups chose each token at this step [N, 1, V]."""
    tokens_NJ = torch.cat([chosen.ids_NKT[:, :, -1] for chosen in earlier], 1)
    active_NJ = torch.cat([chosen.active_NK for chosen in earlier], 1)
    return active_NJ.new_zeros(len(tokens_NJ), vocabulary).scatter_add_(1, tokens_NJ, active_NJ)[:, None]


def cumulative(ids_NBT: Tensor, earlier: Sequence[Chosen], vocabulary: int, temperature: float) -> Tensor:
    """Return the sum over earlier groups h of exp(-m_h / temperature) [N, B, V].

    m_h counts the positions, this step's included, at which an extended beam differs from the beams of h.
    """
    total = torch.zeros((), device=ids_NBT.device)
    for chosen in earlier:
        before_NKT = chosen.ids_NKT[:, None, :, :-1]
        differ_NBK = (ids_NBT[:, :, None] != before_NKT).sum(-1) * chosen.active_NK[:, None]
        now_N1V = chosen.active_NK.sum(1)[:, None, None] - hamming(ids_NBT, [chosen], vocabulary)
        present_N11 = chosen.active_NK.amax(1)[:, None, None]
        total = total + present_N11 * torch.exp(-(differ_NBK.sum(-1)[:, :, None] + now_N1V) / temperature)
    return total


def ngram(ids_NBT: Tensor, earlier: Sequence[Chosen], vocabulary: int, size: int) -> Tensor:
    """Return how often the n-gram that each extension completes occurs in the beams of earlier groups [N, B, V]."""
    count_NBV = earlier[0].active_NK.new_zeros(*ids_NBT.shape[:2], vocabulary)
    length = ids_NBT.shape[2]
    if length + 1 < size:
        return count_NBV
    last_NB11 = ids_NBT[:, :, None, None, length + 1 - size :]
    for chosen in earlier:
        windows_NKTn = chosen.ids_NKT.unfold(2, size, 1)
        same_NBKT = (windows_NKTn[:, None, :, :, :-1] == last_NB11).all(-1) * chosen.active_NK[:, None, :, None]
        ends_NBKT = windows_NKTn[:, None, :, :, -1].expand_as(same_NBKT)
        count_NBV.scatter_add_(2, ends_NBKT.flatten(2), same_NBKT.flatten(2))
    return count_NBV


def embedding(
    ids_NBT: Tensor, earlier: Sequence[Chosen], vocabulary: int, size: int, table_VD: Tensor, squares_V: Tensor
) -> Tensor:
    """Return the sum over earlier beams of the cosine between n-grams [N, B, V].

    An n-gram is the sum of its tokens' embeddings; compared are the one that an extension completes and the last one of
    each earlier beam. `squares_V` are the squared norms of the embeddings.
    """
    table_VD, squares_V = table_VD[:vocabulary], squares_V[:vocabulary]
    length = ids_NBT.shape[2]
    before_NBD = table_VD[ids_NBT[:, :, max(0, length + 1 - size) :]].sum(2)
    ids_NJT = torch.cat([chosen.ids_NKT for chosen in earlier], 1)[:, :, -size:]
    target_NJD = torch.nn.functional.normalize(table_VD[ids_NJT].sum(2), dim=-1)
    active_NJ = torch.cat([chosen.active_NK for chosen in earlier], 1)
    sum_ND = (target_NJD * active_NJ[:, :, None]).sum(1)  # the cosines add up, so their targets may first
    dots_NBV = (before_NBD @ sum_ND[:, :, None]) + (sum_ND @ table_VD.T)[:, None]
    squares_NBV = before_NBD.square().sum(-1, keepdim=True) + squares_V
    if size > 1:
        squares_NBV = squares_NBV + 2 * before_NBD @ table_VD.T
    return dots_NBV / squares_NBV.clamp(min=1e-12).sqrt()


@dataclass(frozen=True)
class Hypothesis:
    """An output of the last run.

    Args:
        group: number of its group, from 0.
        log_prob: sum of the log-probabilities of its new tokens, as the logits processors left them.
        score: by which its group ranks it: without penalties if these are not accumulated, divided by
            length ** length_penalty.
        length: new tokens, without padding.
    """

    group: int
    log_prob: float
    score: float
    length: int


class DiverseBeamSearch(Method, slug="diverse_beam_search"):
    """Beam search in groups that choose different tokens, as a `custom_generate` callable of stock `generate`.

        Y_g[t] = argmax over B' distinct extensions of
                 sum_b score(y_b[t]) - penalty * sum_{h<g} similarity(y_b[t], Y_h[t])

    At each step the groups choose in order; a group sees what the groups before it chose at the same step, so the first
    is plain beam search of its width. The search itself is stock: each group is a batch item of transformers' beam
    search, which keeps its finished hypotheses and its stopping rule, and only the scores from which continuations are
    chosen change. All beams go through the model in one pass a step.

        outputs = model.generate(**inputs, max_new_tokens=64, num_return_sequences=6, num_beams=6, num_beam_groups=3,
                                 custom_generate=intaglio.DiverseBeamSearch(diversity_penalty=0.5))

    The options of the former built-in group beam search are accepted, from `generate` or as fields, as are every logits
    processor, stopping criterion, `length_penalty`, `early_stopping`, encoder-decoder models, padding on the left and
    sampling (`do_sample=True` draws within each group). With one group the output is stock beam search, id for id. Two
    details of the released code differ: it forbids the unknown token (`suppress_tokens` of `generate` does that), and
    its groups shrink as their beams finish, where stock beam search keeps as many beams.

    A group ranks and keeps its own finished hypotheses. At each step the tokens of its B' best candidates count, an
    end-of-text token too; a group whose search has ended adds no more. With `return_dict_in_generate` the output
    also holds `group_ids` and `log_probs`, [rows].

    Source: Vijayakumar et al., Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence Models, AAAI 2018.

    Args:
        num_beams: beams B in all. Default: those of `generate`, or 4.
        num_beam_groups: groups G, a divisor of B; 1 is plain beam search. Default: that of `generate`, or one a beam.
        diversity_penalty: λ, at least 0, in nats. Default: that of `generate`, or 0.5 (the paper's range for hamming is
            0.2 to 0.8).
        dissimilarity: that of two beams, by the similarity that is penalised. `hamming` (default): the same token at
            the same step. `cumulative`: exp(-m / `temperature`) for m positions so far that differ. `ngram`: how often
            the n-gram that a token completes is in earlier groups, at any position. `embedding`: cosine of the summed
            input embeddings of the last n-grams.
        ngram_size: n. Default: 2 for `ngram`, 1 for `embedding`.
        temperature: of `cumulative`, above 0. Default 1 (the paper names no value).
        accumulate: running score of a beam: `augmented` by the penalties (default, as in the released code) or `raw`,
            where penalties only choose the step's extensions.
        length_penalty: exponent of the length by which a finished score is divided; 0 is the paper's, without any.
            Default: that of `generate`, where 1 is usual.
        order: of a prompt's outputs: `interleaved` (default: the best of each group, then the second best), `groups`
            (group after group) or `log_prob` (by log-probability over length ** length_penalty, without penalties).
        num_return_sequences: outputs of a prompt. Default: that of `generate` if it sets `num_beams`, else B.

    Raises:
        IntaglioError: (in `generate`) groups that do not divide the beams, options that contradict each other, another
            generation mode, a streamer or an assistant.
    """

    kinds = ("decoder",)
    summary = "splits beam search into groups and penalises tokens that earlier groups chose, for several good outputs"
    citation = (
        "Vijayakumar et al., Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence Models, AAAI 2018"
    )
    url = "https://arxiv.org/abs/1610.02424"

    requires: ClassVar[frozenset[Capability]] = frozenset({"causal"})

    num_beams: Annotated[int, Field(ge=1)] | None = None
    num_beam_groups: Annotated[int, Field(ge=1)] | None = None
    diversity_penalty: Annotated[float, Field(ge=0)] | None = None
    dissimilarity: Literal["hamming", "cumulative", "ngram", "embedding"] = "hamming"
    ngram_size: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    accumulate: Literal["augmented", "raw"] = "augmented"
    length_penalty: float | None = None
    order: Literal["interleaved", "groups", "log_prob"] = "interleaved"
    num_return_sequences: Annotated[int, Field(ge=1)] | None = None

    _outputs: tuple[Hypothesis, ...] = PrivateAttr(())

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.num_beams is not None:
            check_groups(self.num_beams, self.num_beam_groups or 1)
        if self.ngram_size is not None and self.dissimilarity not in ("ngram", "embedding"):
            raise ValueError(f"ngram_size belongs to ngram and embedding; dissimilarity is {self.dissimilarity}")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the settings of the released code: no length penalty, group after group."""
        return cls(**{"length_penalty": 0.0, "order": "groups", **overrides})

    @property
    def outputs(self) -> tuple[Hypothesis, ...]:
        """The hypotheses of the last run, one a row of its output."""
        return self._outputs

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Generate; called by `model.generate(..., custom_generate=self)`.

        Args:
            model: a causal or encoder-decoder model.
            input_ids: prompts, each repeated `num_beams` times if `generate` sets it [N or N G B, L].
            logits_processor: as `generate` built it.
            stopping_criteria: as `generate` built them.
            generation_config: the merged config.
            **model_kwargs: model arguments that `generate` prepared.

        Returns:
            prompts and continuations [N * num_return_sequences, L], or the stock beam search output.
        """
        plan = self._plan(generation_config)
        if generation_config.num_beams == 1 and plan.beams > 1:
            input_ids, model_kwargs = expanded(model, plan.beams, input_ids, model_kwargs)
        config, width = copy.copy(generation_config), plan.beams // plan.groups
        config.num_beams = config.num_return_sequences = width
        config.return_dict_in_generate = True
        if self.length_penalty is not None:
            config.length_penalty = self.length_penalty
        similarity, raw = self._similarity(model), self.accumulate == "raw"
        search = GroupedSearch(model, plan.groups, width, plan.penalty, similarity, raw)
        output = type(model)._beam_search(
            search, input_ids, logits_processor, stopping_criteria, config, **model_kwargs
        )
        return self._arranged(output, search, config, plan, generation_config.return_dict_in_generate)

    def _plan(self, config: Any) -> _Plan:
        """Settle beams, groups, penalty and number of outputs between the fields and the generation config."""
        for name in dropped_arguments():
            raise IntaglioError(f"a {name} was given to generate; diverse beam search cannot use it")
        mode = config.get_generation_mode()
        if mode not in _MODES:
            raise IntaglioError(f"the generation mode is {mode.value}; diverse beam search searches or samples beams")
        own = {name: getattr(self, name) for name in _DEFAULTS}
        stock = {name: getattr(config, name, None) for name in own}
        stock |= {name: None for name, default in _DEFAULTS.items() if stock[name] == default}
        for name, value in own.items():
            if None not in (value, stock[name]) and value != stock[name]:
                raise IntaglioError(f"{name} is {value} for the decoder and {stock[name]} for generate; give one")
        merged = {name: stock[name] if value is None else value for name, value in own.items()}
        beams = NUM_BEAMS if merged["num_beams"] is None else merged["num_beams"]
        groups = beams if merged["num_beam_groups"] is None else merged["num_beam_groups"]
        penalty = 0.5 if merged["diversity_penalty"] is None else merged["diversity_penalty"]
        try:
            check_groups(beams, groups)
        except ValueError as error:
            raise IntaglioError(str(error)) from None
        returned = config.num_return_sequences or 1
        if stock["num_beams"] is None and returned > 1:
            raise IntaglioError(
                f"num_return_sequences is {returned} and generate has one beam; give num_beams to generate too, or "
                "num_return_sequences to the decoder"
            )
        if self.num_return_sequences is not None:
            returned = self.num_return_sequences
        elif stock["num_beams"] is None:
            returned = beams
        if returned > beams:
            raise IntaglioError(f"num_return_sequences is {returned}; from 1 to num_beams, {beams}, is accepted")
        return _Plan(beams, groups, float(penalty), returned)

    def _similarity(self, model: Any) -> Similarity:
        size = self.ngram_size or (2 if self.dissimilarity == "ngram" else 1)
        if self.dissimilarity == "cumulative":
            return lambda ids, earlier, vocabulary: cumulative(ids, earlier, vocabulary, self.temperature)
        if self.dissimilarity == "ngram":
            return lambda ids, earlier, vocabulary: ngram(ids, earlier, vocabulary, size)
        if self.dissimilarity == "embedding":
            table_VD = model.get_input_embeddings().weight.detach().float()
            squares_V = table_VD.square().sum(-1)
            return lambda ids, earlier, vocabulary: embedding(ids, earlier, vocabulary, size, table_VD, squares_V)
        return hamming

    def _arranged(self, output: Any, search: GroupedSearch, config: Any, plan: _Plan, whole: bool) -> Any:
        """Order and crop the rows [N G B, L], and note their hypotheses."""
        prompt, width = search.prompt_length, plan.beams // plan.groups
        indices_RT = output.beam_indices
        log_probs_R, penalties_R, lengths_R = search.totals(output.sequences[:, prompt:], indices_RT)
        scale_R = lengths_R.clamp(min=1).float() ** config.length_penalty
        paid_R = 0 if self.accumulate == "raw" else penalties_R
        rows_NGB = torch.arange(len(indices_RT), device=indices_RT.device).view(-1, plan.groups, width)
        if self.order == "interleaved":
            rows_NR = rows_NGB.transpose(1, 2).flatten(1)
        elif self.order == "groups":
            rows_NR = rows_NGB.flatten(1)
        else:
            pooled_NR = (log_probs_R / scale_R).view(-1, plan.beams)
            rows_NR = rows_NGB.flatten(1).gather(1, pooled_NR.argsort(dim=1, descending=True, stable=True))
        kept_R = rows_NR[:, : plan.returned].flatten()
        groups_R = kept_R // width % plan.groups
        columns = (log_probs_R, (log_probs_R - paid_R) / scale_R, lengths_R)
        self._outputs = tuple(
            Hypothesis(*values)
            for values in zip(*(x.tolist() for x in (groups_R, *(v[kept_R] for v in columns))), strict=True)
        )
        length = int(lengths_R[kept_R].max())
        sequences_RL = output.sequences[kept_R, : prompt + length]
        if not whole:
            return sequences_RL
        output.sequences, output.beam_indices = sequences_RL, indices_RT[kept_R, :length]
        if output.sequences_scores is not None:
            output.sequences_scores = output.sequences_scores[kept_R]
        output["group_ids"], output["log_probs"] = groups_R, log_probs_R[kept_R]
        return output


def check_groups(beams: int, groups: int) -> None:
    """Raise a `ValueError` unless the groups divide the beams."""
    if groups > beams or beams % groups:
        limit = "at most one group a beam" if groups > beams else "each group has as many beams"
        raise ValueError(f"num_beam_groups is {groups} and num_beams {beams}; {limit}, so give a divisor of {beams}")


@dataclass(frozen=True)
class _Plan:
    """Beams in all, groups, penalty and outputs of a prompt."""

    beams: int
    groups: int
    penalty: float
    returned: int
