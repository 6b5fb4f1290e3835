"""LayerwiseUnmasking (Dukić and Šnajder, Looking Right is Sometimes Right, Findings of ACL 2024).

A decoder of n layers is divided into m groups of n/m, group 1 nearest the input. A configuration c_1..c_m of bits names
the groups without a causal mask:

    M_lock[i, j]   = 0 if j <= i and key j is real, else -inf
    M_unlock[i, j] = 0 if key j is real,            else -inf
    layer l uses M_unlock if c_group(l) = 1, else M_lock

Weights, positions and parameters stay as they are; fine-tuning, mostly with a labelling head (`token_classification`),
adapts the model to right context. The best configuration depends on the task: all 2^m are tried on validation data.

- `grid`: groups, configurations and their layers.
- `search`: search over configurations.
- `adapt`: task-adaptive pretraining.

Where paper and released code differ: the code masks with the dtype's least number (here too, under eager attention) and
its fine-tuning loop drops all but the last batch of an accumulated step; that is not copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from intaglio.checkpoint import Checkpoint
from intaglio.masks import Bidirectional, IgnoreSlidingWindow, Rule, get_visibility
from intaglio.masks.method import keep
from intaglio.methods.attention.layerwise_unmasking.configurations import (
    check_bits,
    check_decoder,
    configurations,
    group_count,
    unlocked_layers,
)
from intaglio.methods.attention.layerwise_unmasking.search import Search, SearchResult, run_search
from intaglio.methods.base import Capability, Cost, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.modeling.anatomy import Anatomy, anatomy

__all__ = [
    "LayerwiseUnmasking",
    "Search",
    "SearchResult",
    "configurations",
    "group_count",
    "search",
    "unlocked_layers",
]


class LayerwiseUnmasking(Method, slug="layerwise_unmasking"):
    """Remove the causal mask from groups of layers, so that a decoder that labels tokens uses right context there.

    The m bits of `configuration` stand for m groups of equally many layers, the leftmost for those nearest the input;
    1 removes the mask. Padding stays masked. A layer with a sliding window sees as far to the right as to the left.
    Training and inference use the same configuration: unmask first, then train. After training, the step is the
    ablation that unmasks at inference only; expect little of it.

    The checkpoint needs `intaglio.load` and no longer generates, as each new token would change the states of earlier
    ones. A configuration of zeros leaves the stock model, bit for bit.

    With `search`, configurations are trained one after the other on labelled words with the same settings, and the best
    on the validation words is kept, as trained.

    Source: Dukić and Šnajder, Looking Right is Sometimes Right: Investigating the Capabilities of Decoder-only LLMs
    for Sequence Labeling, Findings of ACL 2024; code dd1497/llm-unmasking.

    Args:
        configuration: bits in quotes, such as `"0011"`. Default: the group nearest the output; with `search`, the best.
        groups: m, a divisor of the number of layers. Default: as many as there are bits; without bits the divisor
            nearest to 4 (the smaller of two).
        window: range of unmasked layers with a sliding window: `symmetric` (default), as far to both sides, or `none`,
            everything.
        search: configurations and data to try, see `Search`. Default: no search and no training.

    Raises:
        IntaglioError: the groups do not divide the layers, bits and groups disagree, or the model is an encoder.
    """

    kinds = ("carving", "visibility")
    summary = (
        "removes the causal mask from groups of layers, so that a decoder labels tokens with context on both sides"
    )
    citation = (
        "Dukić and Šnajder, Looking Right is Sometimes Right: Investigating the Capabilities of Decoder-only LLMs "
        "for Sequence Labeling, Findings of ACL 2024"
    )
    url = "https://arxiv.org/abs/2401.14556"

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
            raise ValueError("configuration and search are given; give one of the two")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return four groups, as for the paper's 32 layers."""
        return cls(**{"groups": 4, **overrides})

    @property
    def long(self) -> bool:
        """Whether the step trains, and so can resume after it was killed."""
        return self.search is not None

    def bits(self, depth: int) -> str:
        """Return the configuration for a model of `depth` layers."""
        if self.configuration is not None:
            check_bits(self.configuration, depth)
            return self.configuration
        return "1".rjust(group_count(depth, self.groups), "0")

    def rules(self, parts: Anatomy, bits: str) -> dict[int, Rule]:
        """Return the rules of all layers under a configuration; locked layers keep those of an earlier step."""
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
        """Refuse, before any work, an encoder and a depth that the groups do not divide."""
        check_decoder(parts)
        bits = self.bits(len(parts.blocks))
        if self.search is not None:
            self.search.bits(len(bits))

    def estimate(self, workload: Workload) -> Cost:
        """Return the cost of a search; nothing without one."""
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
        """Unmask groups of `checkpoint` and return it; with `search`, train it too."""
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


def search(
    checkpoint: Checkpoint,
    examples: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    *,
    method: LayerwiseUnmasking | None = None,
    tried: Sequence[str] | None = None,
    **arguments: Any,
) -> SearchResult:
    """Find the configuration that labels validation words best, and leave the checkpoint unmasked and trained so.

        result = search(ckpt, train_examples, validation_examples, epochs=5, learning_rate=2e-4, lora={"r": 64})
        result.bits                                    # such as "0011"

    The score of the best configuration on the validation words is a maximum and so biased: report it on other data.

    Args:
        checkpoint: a decoder; becomes the best trial.
        examples: labelled words to train on; see `intaglio.data.token_classification`.
        validation: others for the choice: by strict F1 of entities for IOB2 tags, else by macro-F1.
        method: gives groups and window. Default `LayerwiseUnmasking()`.
        tried: configurations. Default: all.
        **arguments: `objective` (default `TokenClassification()`), `directory` and `resume` of a killed search,
            `progress`, and settings of `intaglio.train`: `steps` or `epochs`, `batch_size`, `learning_rate`, `lora` ...

    Raises:
        IntaglioError: the model is an encoder, a configuration does not fit, or as `train`.
    """
    return run_search(checkpoint, examples, validation, method or LayerwiseUnmasking(), tried, **arguments)
