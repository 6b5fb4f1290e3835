"""Settings of a training run: budget, batches, optimizer, schedule. Validated once, for Python and recipes alike."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from intaglio.errors import IntaglioError
from intaglio.methods.base import validation_sentence
from intaglio.trainer.lora import Lora

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


def _alias(name: str, old: str) -> Any:
    """Accept the spelling that recipes and records used before, beside the field's name."""
    return Field(validation_alias=AliasChoices(name, old))


class Settings(BaseModel):
    """Settings of a run; see `train` for their meaning."""

    # strict: the word "3" is not taken for a number, nor true for 1.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    steps: Positive | None = None
    tokens: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Positive = 8
    homogeneous_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    gradient_accumulation_steps: Annotated[Positive, _alias("gradient_accumulation_steps", "accumulate")] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: Annotated[float, Field(ge=0, le=1), _alias("min_lr_ratio", "final_share")] = 0.0
    warmup: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)] = 0.05
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: Share = 0.9
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0), _alias("max_grad_norm", "clip")] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    lora: Lora | None = None
    freeze: bool = False
    trainable_blocks: Positive | None = None
    keep_mask: bool = True
    early_stopping_patience: Annotated[Positive | None, _alias("early_stopping_patience", "patience")] = None
    metric_for_best_model: Annotated[str, _alias("metric_for_best_model", "watch")] = "loss"
    stop_at_loss: Annotated[float, Field(gt=0)] | None = None
    report_to: list[str] = Field(default_factory=list)
    log_directory: Annotated[str, Field(min_length=1)] | None = None
    log_every: Positive | None = None
    save_every: Positive | None = None
    evaluate_every: Positive | None = None

    @model_validator(mode="after")
    def _valid_budget(self) -> Self:
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            number = "none is given" if not given else f"{' and '.join(given)} are given"
            raise ValueError(f"exactly one of steps, tokens and epochs sets the length of training; {number}")
        if isinstance(self.warmup, float) and self.warmup >= 1:
            raise ValueError(f"warmup is {self.warmup}; a share of the steps below 1, or a whole number of steps")
        if self.min_lr_ratio and self.schedule != "cosine":
            raise ValueError(f"min_lr_ratio is {self.min_lr_ratio}; only the schedule cosine ends above zero")
        if self.freeze and self.lora is not None:
            raise ValueError("freeze and lora are given; adapters freeze the model by themselves")
        if self.freeze and self.trainable_blocks is not None:
            raise ValueError("freeze and trainable_blocks are given; give one of them")
        return self

    @classmethod
    def from_arguments(cls, **given: Any) -> Self:
        """Validate settings; an IntaglioError names the field, its value and what is accepted."""
        try:
            return cls(**given)
        except ValidationError as error:
            raise IntaglioError(validation_sentence(error, cls, given)) from None

    @property
    def step_rows(self) -> int:
        """Rows of an optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    def warmup_steps(self, steps: int) -> int:
        """Return the steps over which the learning rate rises, in a run of `steps`."""
        return min(steps, self.warmup if isinstance(self.warmup, int) else round(self.warmup * steps))
