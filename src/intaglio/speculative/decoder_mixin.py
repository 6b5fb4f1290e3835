"""Base of the methods that decode speculatively: a callable for stock `generate(custom_generate=...)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from pydantic import ConfigDict, Field, InstanceOf, PrivateAttr
from pydantic.json_schema import SkipJsonSchema
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from intaglio.checkpoint import load_tokenizer
from intaglio.methods.base import Capability, Method, ModelAspect
from intaglio.speculative.loop import Speculative
from intaglio.speculative.outputs import SpeculativeOutput
from intaglio.speculative.protocols import DecodingRun, Drafter, Session, Step
from intaglio.speculative.statistics import Statistics


class SpeculativeDecoder(Method):
    """A method that drafts: calling it runs the speculative loop with itself as the drafter.

    A subclass implements `start` (`protocols.Drafter`).
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, use_attribute_docstrings=True)
    requires: ClassVar[frozenset[Capability]] = frozenset({"causal", "cache", "tokenizer"})
    changes: ClassVar[frozenset[ModelAspect]] = frozenset()
    needs_hidden: ClassVar[bool] = False

    streamer: SkipJsonSchema[InstanceOf[BaseStreamer] | None] = Field(None, exclude=True, repr=False)
    """Receives prompt and tokens; `generate` passes none to a custom decoder."""
    on_step: SkipJsonSchema[Callable[[Step], None] | None] = Field(None, exclude=True, repr=False)
    """Called with each row's `Step` after every pass."""
    generator: SkipJsonSchema[InstanceOf[torch.Generator] | None] = Field(None, exclude=True, repr=False)
    """Source of the draws (sampling). Default: torch's global generator."""
    prepack: SkipJsonSchema[bool | None] = Field(None, exclude=True, repr=False)
    """Whether passes on a CPU use weights laid out beforehand; see `Speculative`. Default: if it pays."""

    _statistics: Statistics = PrivateAttr(default_factory=Statistics)

    @property
    def lossless(self) -> bool:
        """Whether the output is the target's own."""
        return True

    @property
    def statistics(self) -> Statistics:
        """Cost of the last `generate` call."""
        return self._statistics

    def new_statistics(self) -> Statistics:
        """Return empty statistics for a run."""
        return Statistics()

    def start(self, run: DecodingRun) -> Session:
        """Start a run; see `Drafter.start`."""
        raise NotImplementedError

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor | SpeculativeOutput:
        """Generate; called by `model.generate(..., custom_generate=self)`. See `Speculative`."""
        loop = Speculative(
            cast(Drafter, self),
            streamer=self.streamer,
            on_step=self.on_step,
            generator=self.generator,
            prepack=self.prepack,
        )
        try:
            return loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)
        finally:
            self._statistics = loop.statistics


def tokenizer_of(target: Any) -> Any:
    """Return the tokenizer beside a target's weights; None if there is none."""
    source = str(getattr(target, "name_or_path", ""))
    return load_tokenizer(source) if source else None
