"""`SparseAutoencoder`: the base of methods that train a dictionary on a model's activations."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, field_validator
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.attachments import Attachment
from intaglio.data.texts import Corpus
from intaglio.dictionaries.dictionary import Architecture, SparseDictionary
from intaglio.dictionaries.fitting import Job, fit_activations, fit_dictionaries
from intaglio.dictionaries.training import TrainingRun
from intaglio.errors import IntaglioError, did_you_mean, shorten
from intaglio.methods.base import Cost, Kind, Method, Progress, Workload, no_progress, validation_sentence
from intaglio.methods.registry import get_method, list_methods
from intaglio.modeling.anatomy import blocks
from intaglio.modeling.sites import Site, SitePart

_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kKmMbB])")
_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9}
_OF_THE_PASS = ("tokens", "length", "skip", "buffer")
_INHERITED = ("layer", "site", "width", "batch_tokens", "seeds", "warmup", "decay", *_OF_THE_PASS)
"""Fields that the entries of `beside` have from their method."""


def read_count(value: Any) -> Any:
    """Return the number of a word such as `300k` or `1.5M`; other values unchanged."""
    match = _COUNT.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return int(value) if isinstance(value, str) and value.isdecimal() else value
    return round(float(match[1]) * _UNITS[match[2].lower()])


def checked_entries(field: str, value: list[dict[str, dict[str, Any]]]) -> list[dict[str, dict[str, Any]]]:
    """Return the value of a field that lists dictionaries to train, each as `{SLUG: fields}`.

    Raises:
        ValueError: an entry does not name one method of this base.
    """
    accepted = [slug for slug in list_methods("dictionary") if issubclass(get_method(slug), SparseAutoencoder)]
    for entry in value:
        if len(entry) != 1 or next(iter(entry)) not in accepted:
            given = shorten(repr(", ".join(entry)))
            raise ValueError(f"{field} names {given}, not one dictionary; {did_you_mean(given, accepted)}")
    return value


def method_of_entry(field: str, entry: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]) -> SparseAutoencoder:
    """Return the method of an entry; `shared` are fields that it need not name.

    Raises:
        IntaglioError: a field of it is wrong.
    """
    ((slug, fields),) = entry.items()
    cls, values = get_method(slug), {**shared, **fields}
    try:
        method: Any = cls(**values)
    except ValidationError as error:
        raise IntaglioError(f"{field}.{slug}.{validation_sentence(error, cls, values)}") from error
    made: SparseAutoencoder = method
    return made


Count = Annotated[int, BeforeValidator(read_count, json_schema_input_type=int | str), Field(ge=1)]


class SparseAutoencoder(Method):
    """Base of methods that train a sparse dictionary on activations.

    Args:
        layer: block that is read, from 0, or several. Default: the middle one.
        site: `residual` (the block's output, default), `attention`, `mlp`, `q`, `k`, `v` or `z`.
        width: latents M. Default 2,048.
        tokens: activations in training, such as 300000 or `300k`. Default 1,000,000.
        length: tokens of a segment. Default 256.
        skip: first tokens of a segment that are left out, since those of an attention sink are outliers. Default 1.
        batch_tokens: activations of an optimizer step. Default 512.
        buffer: activations that are shuffled together; a state is saved after each such chunk. Default 32,768.
        learning_rate: of Adam. Default: the method's own.
        warmup: optimizer steps in which the rate rises. Default: 1,000, at most a tenth of all.
        decay: share of the steps, at the end, in which the rate falls to 0. Default 0.2.
        seeds: dictionaries with starts of their own, trained in the same pass. Default 1.
        beside: further dictionaries trained in the same pass, such as `[{topk_sae: {k: 32}}]`. They have this method's
            tokens, length, skip and buffer, and its layer, site, width, batch_tokens, seeds, warmup and decay unless
            they name their own.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ()
    fitted: ClassVar[bool] = True
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    unit_norm: ClassVar[tuple[str, ...]] = ("W_dec",)
    """Trained matrices whose rows keep norm 1."""
    projects_gradient: ClassVar[bool] = True
    """Whether the gradient's part along each such row is removed."""
    max_grad_norm: ClassVar[float | None] = None

    layer: int | Annotated[list[int], Field(min_length=1)] | None = None
    site: SitePart = "residual"
    width: Annotated[int, Field(ge=2, le=10_000_000)] = 2048
    tokens: Count = 1_000_000
    length: Annotated[int, Field(ge=8, le=1_000_000)] = 256
    skip: Annotated[int, Field(ge=0, le=1_000)] = 1
    batch_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 512
    buffer: Annotated[int, Field(ge=1, le=100_000_000)] = 32_768
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    warmup: Annotated[int, Field(ge=0)] | None = None
    decay: Annotated[float, Field(ge=0, le=1)] = 0.2
    seeds: Annotated[int, Field(ge=1, le=64)] = 1
    beside: list[dict[str, dict[str, Any]]] = Field(default_factory=list)

    _dictionaries: dict[str, SparseDictionary] = PrivateAttr(default_factory=dict)

    @field_validator("beside")
    @classmethod
    def _check_beside(cls, value: list[dict[str, dict[str, Any]]]) -> list[dict[str, dict[str, Any]]]:
        for entry in checked_entries("beside", value):
            ((slug, fields),) = entry.items()
            for name in (*_OF_THE_PASS, "beside"):
                if name in fields:
                    raise ValueError(f"{slug} names {name}, which is that of the whole pass; leave it out")
        return value

    # --- what a method defines ----------------------------------------------------------------------------------------

    @property
    def rate(self) -> float:
        """The learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-4 / math.sqrt(self.width / 2**14)

    def new_parameters(self, inputs: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the trained tensors, `b_dec` excepted."""
        raise NotImplementedError

    def new_state(self) -> dict[str, Tensor]:
        """Return the tensors that no gradient changes."""
        return {}

    def loss(self, run: TrainingRun, x_BD: Tensor) -> Tensor:
        """Return the loss of a batch of scaled activations, and note which latents fired."""
        raise NotImplementedError

    def after_step(self, run: TrainingRun, x_BD: Tensor) -> None:
        """Change parameters or state after an optimizer step; default nothing."""

    def finished(self, run: TrainingRun) -> tuple[Architecture, dict[str, Tensor], int]:
        """Return the architecture, tensors and k of the dictionary, in the scale of the training."""
        raise NotImplementedError

    def warmup_steps(self, steps: int) -> int:
        """Return the steps in which the learning rate rises."""
        return min(1000, steps // 10) if self.warmup is None else self.warmup

    # --- fitting ------------------------------------------------------------------------------------------------------

    def sites(self, depth: int) -> tuple[Site, ...]:
        """Return the sites of a model with so many blocks."""
        layers = [depth // 2] if self.layer is None else [self.layer] if isinstance(self.layer, int) else self.layer
        return tuple(Site(layer, self.site) for layer in dict.fromkeys(layers))

    def companions(self) -> list[SparseAutoencoder]:
        """Return the methods of `beside`.

        Raises:
            IntaglioError: a field of one is wrong.
        """
        own = {name: getattr(self, name) for name in _INHERITED}
        return [method_of_entry("beside", entry, own) for entry in self.beside]

    def jobs(self, depth: int, seed: int) -> dict[str, Job]:
        """Return the dictionaries to train, by name: `SLUG.SITE`, with a number from the second seed on."""
        jobs: dict[str, Job] = {}
        for method in (self, *self.companions()):
            for site in method.sites(depth):
                for replica in range(method.seeds):
                    base = f"{method.slug}.{site.name}" + (f".seed{replica}" if replica else "")
                    name = base
                    while name in jobs:
                        name = f"{base}.{len(jobs)}"
                    jobs[name] = Job(method, site, seed + replica)
        return jobs

    def fit(
        self,
        checkpoint: Checkpoint,
        texts: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        directory: Path | None = None,
        resume: bool = False,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Train the dictionaries and attach them to a checkpoint, whose weights stay unchanged.

        The same arguments give the same dictionaries; so does a killed run that resumes in the same `directory`.

        Args:
            checkpoint: gives the activations.
            texts: a name for `load_texts`, texts, a corpus, or token ids [N, L].
            seed: of the order of the text and of the start; further seeds count from it.
            batch_size: segments of a pass of the model. Default 4.
            directory: for the state of a run that can be resumed. Default: none.
            resume: whether to continue from that state. Default False.
            progress: called after each batch of each pass.

        Raises:
            IntaglioError: no texts, a layer that the model does not have, or activations or losses that are not finite.
        """
        jobs = self.jobs(_depth(checkpoint), seed)
        dictionaries = fit_dictionaries(
            checkpoint,
            jobs,
            texts,
            tokens=self.tokens,
            length=self.length,
            skip=self.skip,
            buffer=self.buffer,
            seed=seed,
            batch_size=batch_size,
            directory=directory,
            resume=resume,
            progress=progress,
        )
        parameters = self.model_dump()
        measured = {
            name: {key: value for key, value in dictionary.about.items() if isinstance(value, float)}
            for name, dictionary in dictionaries.items()
        }
        checkpoint.record_step(self.slug, parameters, seed=seed, chosen=measured, verb="fit")
        tensors = {
            f"{name}:{key}": tensor.cpu().clone()
            for name, dictionary in dictionaries.items()
            for key, tensor in dictionary.tensors.items()
        }
        settings = [[name, dictionary.settings()] for name, dictionary in dictionaries.items()]  # JSON sorts mappings
        checkpoint.attach(self.slug, tensors, parameters, {"dictionaries": settings})
        self._dictionaries = dict(dictionaries)
        return checkpoint

    def fit_activations(self, x_ND: Tensor, *, seed: int = 0, progress: Progress = no_progress) -> Self:
        """Train one dictionary on activations in memory and return the method with it.

        Args:
            x_ND: activations, float32; passes over them are repeated until `tokens` were seen.
            seed: of the order and of the start. Default 0.
            progress: called after each pass.

        Raises:
            IntaglioError: activations or losses are not finite.
        """
        self._dictionaries = {self.slug: fit_activations({self.slug: (self, seed)}, x_ND, progress)[self.slug]}
        return self

    @property
    def dictionaries(self) -> Mapping[str, SparseDictionary]:
        """The trained dictionaries by name."""
        return self._dictionaries

    def dictionary(self, name: str | None = None) -> SparseDictionary:
        """Return a trained dictionary.

        Args:
            name: as in `dictionaries`. Default: the first one.

        Raises:
            IntaglioError: nothing is trained, or there is no such name.
        """
        if not self._dictionaries:
            raise IntaglioError(f"{self.slug} has no dictionary yet; fit trains it")
        name = next(iter(self._dictionaries)) if name is None else name
        if name not in self._dictionaries:
            raise IntaglioError(f"there is no dictionary {name!r}; {did_you_mean(name, self._dictionaries)}")
        return self._dictionaries[name]

    def encode(self, x_ND: Tensor) -> Tensor:
        """Return the codes [N, M] of the first dictionary."""
        return self.dictionary().encode(x_ND)

    def decode(self, codes_NM: Tensor) -> Tensor:
        """Return the reconstructions [N, D] of the first dictionary."""
        return self.dictionary().decode(codes_NM)

    @classmethod
    def restore(cls, attachment: Attachment, checkpoint: Checkpoint, **fields: Any) -> Self:
        """Return the method with the dictionaries that `fit` attached; `fields` override those of the fit.

        Raises:
            IntaglioError: the attachment is no dictionary, or one of another model.
        """
        method = cls(**attachment.parameters | fields)
        method._dictionaries = attached_dictionaries(attachment, checkpoint)
        return method

    def estimate_fit(self, workload: Workload, texts: Corpus) -> Cost:
        """Estimate the model's passes up to the deepest site, and three dense products a dictionary."""
        jobs = self.jobs(workload.blocks, 0)
        share = (1 + max(job.site.layer for job in jobs.values())) / max(workload.blocks, 1)
        flops = 2.0 * workload.block_parameters * share * self.tokens
        flops += sum(2.0 * 3 * workload.hidden * job.method.width * self.tokens for job in jobs.values())
        sites = {job.site for job in jobs.values()}
        kept = 8 * len(sites) * min(self.buffer, self.tokens) * workload.hidden
        trained = sum(4 * 8 * workload.hidden * job.method.width for job in jobs.values())
        return Cost(flops=flops, extra_bytes=kept + trained)


def attached_dictionaries(attachment: Attachment, checkpoint: Checkpoint) -> dict[str, SparseDictionary]:
    """Return the dictionaries of an attachment, on the checkpoint's device.

    Raises:
        IntaglioError: it holds none, or they do not fit the model.
    """
    settings = attachment.about.get("dictionaries")
    if not isinstance(settings, list) or not settings:
        raise IntaglioError(f"the attachment {attachment.slug} holds no dictionary")
    result = {}
    for name, values in settings:
        prefix = f"{name}:"
        tensors = {
            key.removeprefix(prefix): tensor for key, tensor in attachment.tensors.items() if key.startswith(prefix)
        }
        result[name] = SparseDictionary.from_parts(values, tensors).to(checkpoint.device)
    return result


def _depth(checkpoint: Checkpoint) -> int:
    return len(blocks(checkpoint.model))
