"""What a run is told: budget, batches, optimizer, schedule. Validated once, for Python and for recipes alike."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from intaglio.errors import IntaglioError
from intaglio.methods.base import validation_sentence
from intaglio.trainer.lora import Lora

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """The numbers of a run; see `train` for what each means."""

    # strict: the word "3" is not taken for a number, nor true for 1.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    steps: Positive | None = None
    tokens: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Positive = 8
    accumulate: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    warmup: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)] = 0.05
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: Share = 0.9
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(ge=0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    lora: Lora | None = None
    freeze: bool = False
    keep_mask: bool = True
    patience: Positive | None = None
    watch: str = "loss"
    report_to: list[str] = Field(default_factory=list)
    log_directory: Annotated[str, Field(min_length=1)] | None = None
    log_every: Positive | None = None
    save_every: Positive | None = None
    evaluate_every: Positive | None = None

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            said = "none is given" if not given else f"{' and '.join(given)} are given"
            raise ValueError(f"exactly one of steps, tokens and epochs says how long to train; {said}")
        if isinstance(self.warmup, float) and self.warmup >= 1:
            raise ValueError(f"warmup is {self.warmup}; a share of the steps below 1, or a whole number of steps")
        if self.final_share and self.schedule != "cosine":
            raise ValueError(f"final_share is {self.final_share}; only the schedule cosine ends above zero by a share")
        if self.freeze and self.lora is not None:
            raise ValueError("freeze and lora are given; adapters freeze the model by themselves")
        return self

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Validate settings.

        Args:
            **given: fields.

        Raises:
            IntaglioError: names the field, its value and what is accepted.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            raise IntaglioError(validation_sentence(error, cls, given)) from None

    def warmup_steps(self, steps: int) -> int:
        """Steps over which the learning rate rises.

        Args:
            steps: of the run.
        """
        return min(steps, self.warmup if isinstance(self.warmup, int) else round(self.warmup * steps))
