"""What makes a drafter of the catalogue a decoder: a callable for stock `generate(custom_generate=...)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, PrivateAttr
from pydantic.json_schema import SkipJsonSchema
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from intaglio.speculative.loop import Speculative
from intaglio.speculative.outputs import SpeculativeOutput
from intaglio.speculative.protocols import Drafter, Step
from intaglio.speculative.statistics import Statistics


class Drafting(BaseModel):
    """The part of a drafting method that is the same for all: it is called, and runs the verify loop with itself.

    A method that mixes it in has `needs_hidden` and `start` of its own (`protocols.Drafter`).

    Args:
        streamer: gets prompt and tokens; `generate` hands none to a custom decoder.
        on_step: called with each row's `Step` after every pass.
        generator: what draws come from (sampling). Default: torch's global generator.
        prepack: whether passes on a CPU use copies of the weights that are laid out beforehand; see `Speculative`.
            Default None: where it pays.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    streamer: SkipJsonSchema[InstanceOf[BaseStreamer] | None] = Field(None, exclude=True, repr=False)
    on_step: SkipJsonSchema[Callable[[Step], None] | None] = Field(None, exclude=True, repr=False)
    generator: SkipJsonSchema[InstanceOf[torch.Generator] | None] = Field(None, exclude=True, repr=False)

    prepack: SkipJsonSchema[bool | None] = Field(None, exclude=True, repr=False)

    _statistics: Statistics = PrivateAttr(default_factory=Statistics)

    @property
    def statistics(self) -> Statistics:
        """What the last `generate` call cost."""
        return self._statistics

    def loop(self) -> Speculative:
        """The verify loop with this as its drafter."""
        return Speculative(
            cast(Drafter, self),
            streamer=self.streamer,
            on_step=self.on_step,
            generator=self.generator,
            prepack=self.prepack,
        )

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor | SpeculativeOutput:
        """Called by `model.generate(..., custom_generate=self)`; see `Speculative`.

        Args:
            model: the target.
            input_ids: the prompts [B, P].
            logits_processor: as `generate` made them.
            stopping_criteria: as `generate` made them.
            generation_config: the merged one.
            **model_kwargs: what `generate` prepared for the model.
        """
        loop = self.loop()
        try:
            return loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)
        finally:
            self._statistics = loop.statistics
