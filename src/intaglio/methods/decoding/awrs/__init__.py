"""AWRS (Lipkin et al., COLM 2025): sample under any constraint, checking a few tokens, with unbiased weights.

decoder = AWRS(constraint=Predicate(balanced))
ids = model.generate(**inputs, custom_generate=decoder, max_new_tokens=64)
decoder.populations[0].weights, decoder.populations[0].log_probability
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import ConfigDict, Field, InstanceOf, PrivateAttr, model_validator
from pydantic.json_schema import SkipJsonSchema
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.generation.utils import GenerateDecoderOnlyOutput

from intaglio.constraints import Constraint, Prefix, Vocabulary, dead_end
from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Method
from intaglio.methods.decoding.awrs.estimators import (
    GEOMETRIC_FROM,
    Accept,
    Draw,
    Draws,
    first_accepted,
    geometric,
    recursive,
    two_loop,
)
from intaglio.methods.decoding.awrs.smc import CachedHistories, NextTokens, ParticleFilter, Population, Resampling
from intaglio.modeling.anatomy import anatomy
from intaglio.speculative._utils import vocabulary_size
from intaglio.speculative.cache import holds_tokens
from intaglio.speculative.decoder_mixin import tokenizer_of
from intaglio.speculative.request import Request, read_request

__all__ = ["AWRS", "AWRSOutput", "NextTokens", "Population", "WeightedOutput"]


@dataclass(frozen=True)
class WeightedOutput:
    """A distinct output of a population.

    Args:
        weight: its share of the posterior, between 0 and 1.
        particles: number of particles that hold it.
        length: new tokens, the end token included.
    """

    weight: float
    particles: int
    length: int


@dataclass
class AWRSOutput(GenerateDecoderOnlyOutput):
    """Stock output of `return_dict_in_generate=True` with the particles of every row.

    Attributes:
        populations: weighted outputs of each row.
    """

    populations: tuple[Population, ...] | None = None


class AWRS(Method, slug="awrs"):
    """Sequential Monte Carlo over a constrained language model, by adaptive weighted rejection sampling.

    The target is the model's distribution given that the output meets a constraint C, not the distribution of
    locally constrained decoding (LCD), which masks every step and ignores how much probability the mask removed. At
    each step, with p the model's next-token distribution (after every logits processor, without the tokens that cheap
    masks exclude), A the tokens that C accepts and Z0 the mass left by pruning, a particle draws (x, w) with

        E[w 1{x = v}] = Z0 p(v) 1[v in A]     for every token v,

    and multiplies its weight by w. Only visited tokens are checked, a few per step, each at most once. Estimators:

    - `two_loop` (the paper's): draw without replacement to the first accepted x, after n1 rejects of mass R1; then
      again, x included, to an accepted token after n2 rejects: w = Z0 (1 - R1) / (n1 + n2 + 1).
    - `recursive`: w = Z0 prod (1 - q_i) over the rejects, q_i their shares of the remaining mass, times q_x unless the
      next token in the order is accepted too.
    - `geometric`: rejects with replacement are simulated by geometric draws; after a accepts and r rejects
      w = Z0 min(`max_accepts` - 1, a) / (a + r - 1).

    Particles whose effective number (sum W)^2 / sum W^2 falls below `ess_threshold` N are resampled, and all get the
    mean weight. The last of `max_new_tokens` is forced to be the end token, so outputs that need more have weight 0.
    The mean weight of all N is an unbiased estimate of P(the model's output meets C within the limit).

    All particles run in one forward pass per step; those with the same history share a row, the prompt is read once,
    and the cache is reordered on resampling. `generate` returns an output per row, drawn in proportion to the weights.
    It always draws; `do_sample=True` adds temperature, top-k and top-p to the target.

    Args:
        constraint: constraint on the new tokens' text, from `intaglio.constraints`; required by `generate`.
        particles: number N for each row. Default 5.
        ess_threshold: share of N, 0 to 1; 0 never resamples. Default 0.5.
        resampling: `multinomial` or `systematic`. Default `multinomial`.
        estimator: `two_loop`, `recursive`, `geometric`, or `auto`: geometric if `max_accepts` > 2 or the largest
            probability is at least 2/3, else recursive. Default `auto`.
        proper_weights: False takes the first accepted token with weight 1: LCD without a mask. Default True.
        max_accepts: (geometric) accepted tokens of an estimate, at least 2; more of them lower its variance. Default 2.
        max_rejects: (not `two_loop`) rejected tokens of an estimate after which it ends, at least 2 (1 without
            weights); weights stay unbiased, with more zeros. Default: no limit.
        prune: whether cheap masks (grammars, lengths, special tokens) exclude tokens first. Default True.
        return_all: whether `generate` returns all distinct outputs of each row, the heaviest first, instead of a draw.
            Default False.
        proposal: another causal model with the same vocabulary, which tokens are drawn from; weights are corrected.
            Default: the model itself.
        tokenizer: of the model. Default: the tokenizer beside the model's weights.
        vocabulary: byte forms of the tokens, instead of a tokenizer.
        generator: source of the draws. Default: torch's global generator.

    Attributes:
        populations: weighted particles of each row of the last call.
        outputs: weights and lengths of the returned sequences of the last call.

    Raises:
        IntaglioError: (in `generate`) no constraint, an unsuitable tokenizer, a constraint that cannot be compiled, a
            predicate that fails, stopping criteria other than end tokens and lengths, or no output that meets the
            constraint.

    Source: Lipkin, LeBrun, Vigly et al., Fast Controlled Generation from Language Models with Adaptive Weighted
    Rejection Sampling, COLM 2025, arXiv 2504.05410; `recursive` and `geometric` as in genlm-control, whose authors
    replaced `two_loop` by them.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    kinds = ("decoder",)
    summary = "samples under any constraint by checking a few tokens, with weights that correct the distribution"
    citation = (
        "Lipkin et al., Fast Controlled Generation from Language Models with Adaptive Weighted Rejection Sampling, "
        "COLM 2025"
    )
    url = "https://arxiv.org/abs/2504.05410"
    requires: ClassVar[frozenset[Capability]] = frozenset({"causal", "cache", "tokenizer"})
    sample_fields: ClassVar[frozenset[str]] = frozenset({"particles", "return_all"})

    constraint: SkipJsonSchema[InstanceOf[Constraint] | None] = Field(None, exclude=True, repr=False)
    particles: Annotated[int, Field(ge=1, le=100_000)] = 5
    ess_threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    resampling: Resampling = "multinomial"
    estimator: Literal["auto", "two_loop", "recursive", "geometric"] = "auto"
    proper_weights: bool = True
    max_accepts: Annotated[int, Field(ge=2)] = 2
    max_rejects: Annotated[int, Field(ge=1)] | None = None
    prune: bool = True
    return_all: bool = False
    proposal: SkipJsonSchema[InstanceOf[nn.Module] | None] = Field(None, exclude=True, repr=False)
    tokenizer: SkipJsonSchema[InstanceOf[PreTrainedTokenizerBase] | None] = Field(None, exclude=True, repr=False)
    vocabulary: SkipJsonSchema[InstanceOf[Vocabulary] | None] = Field(None, exclude=True, repr=False)
    generator: SkipJsonSchema[InstanceOf[torch.Generator] | None] = Field(None, exclude=True, repr=False)

    _populations: tuple[Population, ...] = PrivateAttr(())
    _outputs: tuple[WeightedOutput, ...] = PrivateAttr(())

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.proper_weights and self.max_rejects == 1:
            raise ValueError("max_rejects is 1; with proper weights it must be at least 2")
        if self.estimator == "two_loop" and self.max_rejects is not None:
            raise ValueError("max_rejects belongs to the estimators recursive and geometric, not to two_loop")
        if self.estimator in ("two_loop", "recursive") and self.max_accepts > 2:
            raise ValueError(f"max_accepts belongs to the estimator geometric, not to {self.estimator}")
        if not self.proper_weights and (self.estimator != "auto" or self.max_accepts > 2):
            raise ValueError("without proper weights nothing is estimated; leave estimator and max_accepts out")
        return self

    @property
    def populations(self) -> tuple[Population, ...]:
        """Weighted particles of each row of the last call."""
        return self._populations

    @property
    def outputs(self) -> tuple[WeightedOutput, ...]:
        """Weights and lengths of the returned sequences of the last call."""
        return self._outputs

    def constrained(self, constraint: Constraint, vocabulary: Vocabulary, samples: int | None) -> Self:
        """Return the decoder with a constraint and a vocabulary; `samples` is N, and all distinct outputs are returned.

        Args:
            constraint: of the new tokens' text.
            vocabulary: byte forms of the model's tokens.
            samples: number of particles. None: `particles` and `return_all` as they are.
        """
        own: dict[str, Any] = {} if samples is None else {"particles": samples, "return_all": True}
        return self.model_copy(update={"constraint": constraint, "vocabulary": vocabulary, **own})

    def draw(self, draws: Draws, accept: Accept, largest: float = 0.0) -> Draw:
        """Draw a token and the estimate of the accepted share by the chosen estimator.

        Args:
            draws: of the normalised distribution.
            accept: check of a token.
            largest: its largest probability.

        Returns:
            token and w; w is 0 for a failure, whose token was rejected.
        """
        rejects = float("inf") if self.max_rejects is None else self.max_rejects
        if not self.proper_weights:
            return first_accepted(draws, accept, rejects)
        if self.estimator == "two_loop":
            return two_loop(draws, accept)
        by_default = self.estimator == "auto" and (self.max_accepts > 2 or largest >= GEOMETRIC_FROM)
        if by_default or self.estimator == "geometric":
            return geometric(draws, accept, self.max_accepts, rejects)
        return recursive(draws, accept, rejects)

    def sample(
        self,
        model: NextTokens,
        start: Prefix,
        max_tokens: int,
        rng: np.random.Generator,
        proposal: NextTokens | None = None,
    ) -> Population:
        """Run the particles over any language model.

        Args:
            model: log-weights of next tokens.
            start: the empty output under the constraint.
            max_tokens: most new tokens, the end token included.
            rng: source of the draws.
            proposal: another model to draw from.

        Returns:
            weighted outputs.
        """
        run = ParticleFilter(
            model, start, self.draw, self.particles, max_tokens, self.ess_threshold, self.resampling,
            self.proper_weights, self.prune, rng, proposal,
        )  # fmt: skip
        return run()

    @torch.inference_mode()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor | AWRSOutput:
        """Generate; called by `model.generate(..., custom_generate=self)`.

        Returns:
            prompts and outputs [B, L] (with `return_all`, several rows for a prompt), padded after the end, or an
            `AWRSOutput`.
        """
        request = read_request(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        start = self._start(model, request)
        seed = int(torch.randint(2**63 - 1, (), generator=self.generator))
        rng = np.random.default_rng(seed)
        rows, outputs = [], []
        self._populations = ()
        for index, ids_P in enumerate(request.ids_BP):
            ids = ids_P if request.mask_BP is None else ids_P[request.mask_BP[index].bool()]
            make = partial(CachedHistories, prompt=ids.tolist(), request=request)
            proposal = None if self.proposal is None else make(self.proposal)
            population = self.sample(make(model), start, request.room, rng, proposal)
            self._populations += (population,)
            samples = population.distinct()
            if not samples:
                raise IntaglioError(
                    f"none of {self.particles} particles met the constraint within max_new_tokens = {request.room}; "
                    f"the longest ends in {population.dead_end[-60:]!r}; give more tokens, more particles or a wider "
                    "constraint"
                )
            if not self.return_all:
                samples = [samples[int(rng.choice(len(samples), p=[weight for _, weight, _ in samples]))]]
            rows += [torch.cat([ids_P, ids_P.new_tensor(tokens)]) for tokens, _, _ in samples]
            outputs += [WeightedOutput(weight, count, len(tokens)) for tokens, weight, count in samples]
        self._outputs = tuple(outputs)
        ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=request.pad)
        if not generation_config.return_dict_in_generate:
            return ids_BL.clone()
        return AWRSOutput(sequences=ids_BL.clone(), populations=self._populations)

    def _start(self, model: Any, request: Request) -> Prefix:
        """Return the empty output, after checks of the arguments."""
        if self.constraint is None:
            raise IntaglioError("awrs has no constraint; give it one (AWRS(constraint=...), or --regex, --json-schema)")
        parts = anatomy(model)
        if not parts.causal or parts.head is None:
            raise IntaglioError(f"{model.config.model_type} is no causal language model; awrs needs a decoder")
        if request.criteria:
            raise IntaglioError(
                f"a stopping criterion {type(request.criteria[0]).__name__} was given; awrs ends at end tokens and "
                "lengths alone"
            )
        if holds_tokens(request.cache):
            raise IntaglioError("a cache that holds tokens was given; awrs reads the prompt itself")
        size = vocabulary_size(model)
        if self.proposal is not None and vocabulary_size(self.proposal) != size:
            raise IntaglioError(
                f"the proposal has {vocabulary_size(self.proposal)} tokens and the model {size}; the same vocabulary "
                "is needed"
            )
        vocabulary = self.vocabulary
        if vocabulary is None:
            vocabulary = Vocabulary.from_tokenizer(self.tokenizer or tokenizer_of(model), size, request.stops)
        start = Prefix.empty(self.constraint, vocabulary)
        if self.prune and not start.mask().any():
            raise IntaglioError(dead_end(start))
        return start
