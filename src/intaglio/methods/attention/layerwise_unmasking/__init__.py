"""LayerwiseUnmasking (Dukić and Šnajder, Looking Right is Sometimes Right, Findings of ACL 2024).

A decoder of n layers is cut into m groups of n/m, group 1 nearest the input. A configuration c_1..c_m of bits says from
which groups the causal mask is taken:

    M_lock[i, j]   = 0 if j <= i and key j is real, else -inf
    M_unlock[i, j] = 0 if key j is real,            else -inf
    layer l uses M_unlock if c_group(l) = 1, else M_lock

Weights, positions and parameters stay as they are; fine-tuning, mostly with a head that labels tokens
(`token_classification`), adapts the model to seeing to the right. Which configuration is best depends on the task: all
2^m are tried, and validation data choose.

- `grid`: groups, configurations and their layers.
- `search`: tries configurations and keeps the best.
- `adapt`: task-adaptive pretraining before.

Where paper and released code part: the code masks with the dtype's least number (here too, under eager attention) and
its fine-tuning loop drops all but the last batch of an accumulated step; that is not copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from intaglio.checkpoint import Checkpoint
from intaglio.masks import Bidirectional, IgnoreSlidingWindow, Rule, get_visibility
from intaglio.masks.method import keep
from intaglio.methods.attention.layerwise_unmasking.grid import (
    check_bits,
    check_decoder,
    configurations,
    group_count,
    unlocked_layers,
)
from intaglio.methods.attention.layerwise_unmasking.search import Found, Search, search
from intaglio.methods.base import Capability, Cost, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.modeling.anatomy import Anatomy, anatomy

__all__ = ["Found", "LayerwiseUnmasking", "Search", "configurations", "group_count", "search", "unlocked_layers"]


class LayerwiseUnmasking(Method, slug="layerwise_unmasking"):
    """Takes the causal mask off groups of layers, so that a decoder which labels tokens sees to the right there.

    The m bits of `configuration` stand for m groups of equally many layers, the leftmost for those nearest the input;
    1 takes the mask off. Padding stays masked. A layer with a sliding window sees as far to the right as to the left.
    The same configuration serves training and use: unmask first, then train. Put behind training, the step is the
    ablation that unmasks at inference only; expect little of it.

    The checkpoint becomes a live one (`intaglio.load` reads it) and no longer generates, as each new token would change
    what earlier ones saw. A configuration of zeros leaves the stock model, bit for bit.

    With `search`, configurations are trained one after the other on labelled words with the same settings, and the one
    that labels the validation words best is kept, trained as it is.

    Source: Dukić and Šnajder, Looking Right is Sometimes Right: Investigating the Capabilities of Decoder-only LLMs
    for Sequence Labeling, Findings of ACL 2024; code dd1497/llm-unmasking.

    Args:
        configuration: bits in quotes, such as `"0011"`. Default: the group nearest the output; with `search`, the best.
        groups: m, a divisor of the number of layers. Default: as many as there are bits; without bits the divisor
            nearest to 4 (the smaller of two).
        window: what layers with a sliding window see once unmasked: `symmetric` (default), as far to both sides, or
            `none`, everything.
        search: what to try, and on which data; see `Search`. Default: nothing is tried, and nothing is trained.

    Raises:
        IntaglioError: the groups do not divide the layers, bits and groups disagree, or the model is an encoder.
    """

    storage: ClassVar[Literal["runtime"]] = "runtime"
    needs_calibration: ClassVar[bool] = False
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"attention"})
    invalidates: ClassVar[frozenset[Capability]] = frozenset({"causal", "cache"})

    configuration: str | None = None
    groups: Annotated[int, Field(ge=1)] | None = None
    window: Literal["symmetric", "none"] = "symmetric"
    search: Search | None = None

    @field_validator("configuration", mode="before")
    @classmethod
    def _bits(cls, value: Any) -> Any:
        if value is not None and (not isinstance(value, str) or not value or set(value) - {"0", "1"}):
            raise ValueError(f'{value!r} is no configuration; bits in quotes are accepted, such as "0011"')
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.configuration is not None and self.groups not in (None, len(self.configuration)):
            raise ValueError(
                f"the configuration {self.configuration} has {len(self.configuration)} bits for {self.groups} groups"
            )
        if self.search is not None and self.configuration is not None:
            raise ValueError("configuration and search are given; one of them says which groups are unmasked")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Four groups, as for the paper's 32 layers.

        Args:
            overrides: fields that the caller sets.
        """
        return cls(**{"groups": 4, **overrides})

    @property
    def long(self) -> bool:
        """Whether it trains, and can go on after it was killed."""
        return self.search is not None

    def bits(self, depth: int) -> str:
        """The configuration for a model.

        Args:
            depth: its layers.

        Raises:
            IntaglioError: the groups do not divide the layers.
        """
        if self.configuration is not None:
            check_bits(self.configuration, depth)
            return self.configuration
        return "1".rjust(group_count(depth, self.groups), "0")

    def rules(self, parts: Anatomy, bits: str) -> dict[int, Rule]:
        """The rules of all layers under a configuration: those of a step before stay on locked layers.

        Args:
            parts: of the model.
            bits: the configuration.
        """
        wide = self.window == "none"
        rules: dict[int, Rule] = {
            layer: rule for layer, rule in get_visibility(parts.model).items() if rule not in _UNLOCKED
        }
        for layer in unlocked_layers(bits, len(parts.blocks)):
            rules[layer] = _UNLOCKED[1] if wide and parts.windows[layer] is not None else _UNLOCKED[0]
        return rules

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Accept any linears: they stay as they are."""

    def check_model(self, parts: Anatomy) -> None:
        """Refuse, before any work, an encoder and a depth that the groups do not divide.

        Args:
            parts: of the model.

        Raises:
            IntaglioError: says which.
        """
        check_decoder(parts)
        bits = self.bits(len(parts.blocks))
        if self.search is not None:
            self.search.bits(len(bits))

    def estimate(self, workload: Workload) -> Cost:
        """Return what a search takes; nothing without one.

        Args:
            workload: of the model.
        """
        return Cost() if self.search is None else self.search.estimate(workload, self.groups)

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        directory: Path | None = None,
        resume: bool = False,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Unmask groups of `checkpoint` and return it; with `search`, train it too.

        Args:
            checkpoint: a decoder, with its language-model head or one that labels tokens; changed in place.
            calibration: not used.
            seed: of a search: the head, the order of the data, dropout.
            batch_size: not used.
            directory: where a search keeps what it needs to go on after it was killed. Default: nowhere.
            resume: whether it goes on with what is there.
            progress: called after each step of training.

        Raises:
            IntaglioError: see the class.
        """
        parts = anatomy(checkpoint.model)
        self.check_model(parts)
        bits = self.bits(len(parts.blocks))
        if self.search is not None:
            self.search.run(
                checkpoint, self, len(bits), seed=seed, directory=directory, resume=resume, progress=progress
            )
            return checkpoint
        keep(checkpoint, self.rules(parts, bits))
        chosen = {"configuration": bits, "layers": unlocked_layers(bits, len(parts.blocks))}
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, chosen=chosen)
        return checkpoint


_UNLOCKED: tuple[Rule, Rule] = (Bidirectional(), IgnoreSlidingWindow(Bidirectional()))
