"""Training of several dictionaries in one pass of a model: streamed, resumable, measured on held-out text.

Dimension letters: N activations, B batch, L sequence, D width, M latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.data.segments import Segments
from intaglio.dictionaries.activations import (
    ActivationStream,
    check_sites,
    kept_tokens,
    split_held_out,
    token_segments,
)
from intaglio.dictionaries.dictionary import Dictionary, SparseDictionary
from intaglio.dictionaries.training import DictionaryMethod, TrainingRun
from intaglio.errors import IntaglioError
from intaglio.masks import predicts_next
from intaglio.measures.dictionaries import Reconstruction, shared_latents, strongest
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import Anatomy, anatomy
from intaglio.modeling.sites import Site, hooked, read_sites
from intaglio.trainer.resume import checkpoint_path, describe, finish, join, read_state, split, start

TENSORS = "state.safetensors"
STRONGEST = 0.1
"""Share of latents, those with the highest activations, whose agreement between seeds is noted too."""


@dataclass(frozen=True)
class Job:
    """One dictionary to train: its method, the site that it reads, and the seed of its start."""

    method: DictionaryMethod
    site: Site
    seed: int


def num_batches(tokens: int, batch_tokens: int) -> int:
    """Return the optimizer steps of a chunk: batches of nearly equal size, none above `batch_tokens`."""
    return math.ceil(tokens / batch_tokens)


def _train_on(run: TrainingRun, chunk_ND: Tensor) -> None:
    for batch_BD in chunk_ND.tensor_split(num_batches(len(chunk_ND), run.method.batch_tokens)):
        run.update(batch_BD)


def fit_dictionaries(
    checkpoint: Checkpoint,
    jobs: Mapping[str, Job],
    texts: Any,
    *,
    tokens: int,
    length: int = 256,
    skip: int = 1,
    buffer: int = 32_768,
    seed: int = 0,
    batch_size: int = 4,
    directory: Path | None = None,
    resume: bool = False,
    progress: Progress = no_progress,
) -> dict[str, SparseDictionary]:
    """Train dictionaries on the activations of one pass of a model.

    Args:
        checkpoint: gives the activations; it stays unchanged.
        jobs: the dictionaries by name.
        texts: a name for `load_texts`, texts, a corpus, or token ids [N, L].
        tokens: activations in training.
        length: tokens of a segment. Default 256.
        skip: first tokens of a segment that are left out. Default 1.
        buffer: activations of a chunk. Default 32,768.
        seed: of the order of the text. Default 0.
        batch_size: segments of a pass. Default 4.
        directory: for the state of a run that can be resumed. Default: none.
        resume: whether to continue from that state. Default False.
        progress: called after each batch of each pass.

    Returns:
        The dictionaries by name, with `fvu`, `l0`, `alive`, `loss_recovered` (models that predict tokens),
        `shared_latents` and `shared_strongest` (several seeds; of all latents, and of the tenth with the highest codes)
        and `max_activation` [M] of the held-out text in `about`.

    Raises:
        IntaglioError: no texts, a site that the model does not have, or activations or losses that are not finite.
    """
    parts, model = anatomy(checkpoint.model), checkpoint.model
    sites = tuple(dict.fromkeys(job.site for job in jobs.values()))
    check_sites(parts, sites)
    data, held_out = split_held_out(token_segments(checkpoint, texts, tokens, length, skip, seed))
    was_training = model.training
    model.eval()
    try:
        stream = ActivationStream(parts, sites, data, tokens, buffer, skip, batch_size, seed)
        identity = {
            "jobs": {name: [describe(job.method), job.site.name, job.seed] for name, job in jobs.items()},
            "model": fingerprint(model),
            "data": data.digest,
            "settings": [tokens, buffer, skip, batch_size, seed],
        }
        runs = _run(stream, jobs, identity, directory, resume, progress)
        dictionaries = {name: run.dictionary() for name, run in runs.items()}
        window = max(1, tokens // 5)
        for name, dictionary in dictionaries.items():
            # Loaded in float16, the model rounds otherwise.
            own = [fingerprint(model), fingerprint(model, torch.float16)]
            dictionary.about.update(model=checkpoint.source, fingerprints=own)
            dictionary.about["alive"] = runs[name].alive(window)
        measure(checkpoint, dictionaries, held_out, skip=skip, batch_size=batch_size)
    finally:
        model.train(was_training)
    _note_shared(jobs, dictionaries)
    return dictionaries


def _run(
    stream: ActivationStream,
    jobs: Mapping[str, Job],
    identity: dict[str, Any],
    directory: Path | None,
    resume: bool,
    progress: Progress,
) -> dict[str, TrainingRun]:
    """Train on every chunk of a stream, from the last saved one on."""
    done = 0 if directory is None else start(directory, identity, resume=resume)
    sizes = [stream.size(index) for index in range(len(stream))]

    def begin(name: str, first_ND: Tensor) -> TrainingRun:
        job = jobs[name]
        steps = sum(num_batches(size, job.method.batch_tokens) for size in sizes)
        return TrainingRun(job.method, first_ND, job.seed, steps, job.site)

    runs: dict[str, TrainingRun] = {}
    if done and directory is not None:
        device = next(stream.parts.base.parameters()).device
        for name, state in _read(checkpoint_path(directory, done)).items():
            runs[name] = begin(name, state["parameters"]["b_dec"][None].to(device))
            runs[name].restore(state)
    for index in range(done, len(stream)):
        chunk = stream.chunk(index, progress)
        for name, job in jobs.items():
            if name not in runs:
                runs[name] = begin(name, chunk[job.site])
            _train_on(runs[name], chunk[job.site])
        if directory is not None:
            _save(directory, index + 1, {name: run.saved() for name, run in runs.items()})
    return runs


def _save(directory: Path, step: int, state: dict[str, Any]) -> None:
    path = checkpoint_path(directory, step)
    path.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    plain = split(state, tensors)
    save_file(tensors, path / TENSORS)
    finish(directory, step, plain)


def _read(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = join(read_state(path), load_file(path / TENSORS))
    return state


def fit_activations(
    methods: Mapping[str, tuple[DictionaryMethod, int]], x_ND: Tensor, progress: Progress = no_progress
) -> dict[str, SparseDictionary]:
    """Train dictionaries on activations in memory.

    Args:
        methods: `(method, seed)` by name; each sees `tokens` activations, in an order of its seed.
        x_ND: activations.
        progress: called after each pass over them.

    Raises:
        IntaglioError: there are no activations, or activations or losses are not finite.
    """
    if x_ND.dim() != 2 or not len(x_ND):
        raise IntaglioError(f"activations have the shape {list(x_ND.shape)}; [activations, width] is accepted")
    if not torch.isfinite(x_ND).all():
        bad = int((~torch.isfinite(x_ND).all(1)).nonzero()[0])
        raise IntaglioError(f"the activations hold NaN or infinite values in row {bad}")
    dictionaries = {}
    for name, (method, seed) in methods.items():
        sizes = [min(len(x_ND), method.tokens - done) for done in range(0, method.tokens, len(x_ND))]
        steps = sum(num_batches(size, method.batch_tokens) for size in sizes)
        run = TrainingRun(method, x_ND.float(), seed, steps)
        for index, size in enumerate(sizes):
            order = torch.from_numpy(np.random.default_rng([seed, 2, index]).permutation(len(x_ND))[:size])
            _train_on(run, x_ND[order.to(x_ND.device)].float())
            progress(index + 1, len(sizes), name)
        dictionaries[name] = run.dictionary()
        dictionaries[name].about["alive"] = run.alive(max(1, method.tokens // 5))
    return dictionaries


# --- measurements -------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    checkpoint: Checkpoint,
    dictionaries: Mapping[str, SparseDictionary],
    data: Segments,
    *,
    skip: int = 1,
    batch_size: int = 4,
) -> None:
    """Measure dictionaries on segments and write the results into their `about`."""
    parts = anatomy(checkpoint.model)
    measured = {name: Reconstruction() for name in dictionaries}
    highest: dict[str, Tensor] = {}
    sites = tuple(dict.fromkeys(dictionary.site for dictionary in dictionaries.values() if dictionary.site))
    for batch in data.batches(batch_size):
        activations = read_sites(parts, sites, batch)
        for name, dictionary in dictionaries.items():
            assert dictionary.site is not None
            x_ND = kept_tokens(activations[dictionary.site], batch, skip)
            codes_NM = dictionary.encode(x_ND)
            measured[name].update(x_ND, codes_NM, dictionary.decode(codes_NM))
            top_M = codes_NM.amax(0)
            highest[name] = top_M if name not in highest else torch.maximum(highest[name], top_M)
    for name, dictionary in dictionaries.items():
        dictionary.about.update(fvu=measured[name].fvu, l0=measured[name].l0)
        dictionary.about["max_activation"] = [float(f"{value:.6g}") for value in highest[name].tolist()]
        if predicts_next(parts):
            assert dictionary.site is not None
            recovered = loss_recovered(parts, dictionary, dictionary.site, data, skip=skip, batch_size=batch_size)
            if recovered is not None:
                dictionary.about["loss_recovered"] = recovered


@torch.no_grad()
def loss_recovered(
    parts: Anatomy, dictionary: Dictionary, site: Site, data: Segments, *, skip: int = 1, batch_size: int = 4
) -> float | None:
    """Return (L_mean - L_dictionary) / (L_mean - L_clean), with the site replaced at all tokens but the first `skip`.

    L is the loss of the next token; L_mean has the mean activation of the segments in the site, L_dictionary the
    reconstructions. None where the site does not matter, L_mean = L_clean.

    Args:
        parts: the model's anatomy; it predicts the next token.
        dictionary: gives the reconstructions.
        site: what is replaced.
        data: the segments.
        skip: first tokens that stay as they are. Default 1.
        batch_size: segments of a pass. Default 4.
    """
    total, count = torch.zeros(()), 0
    for batch in data.batches(batch_size):
        x_ND = kept_tokens(read_sites(parts, (site,), batch)[site], batch, skip)
        total, count = total.to(x_ND.device) + x_ND.double().sum(0), count + len(x_ND)
    mean_D = (total / count).float()

    def replaced(x_BLD: Tensor, new_BLD: Tensor) -> Tensor:
        return torch.cat([x_BLD[:, :skip], new_BLD[:, skip:].to(x_BLD.dtype)], dim=1)

    losses = []
    for edit in (
        lambda x_BLD: None,
        lambda x_BLD: replaced(x_BLD, dictionary.decode(dictionary.encode(x_BLD))),
        lambda x_BLD: replaced(x_BLD, mean_D.expand_as(x_BLD)),
    ):
        with hooked(parts, {site: edit}):
            losses.append(next_token_loss(parts, data, batch_size))
    clean, patched, ablated = losses
    return None if ablated == clean else (ablated - patched) / (ablated - clean)


@torch.no_grad()
def next_token_loss(parts: Anatomy, data: Segments, batch_size: int = 4) -> float:
    """Return the mean loss of the next token in nats, with the hooks that the model has."""
    total, count = 0.0, 0
    device = next(parts.base.parameters()).device
    for batch in data.batches(batch_size):
        ids_BL = batch["input_ids"].to(device)
        mask = None if "attention_mask" not in batch else batch["attention_mask"].to(device)
        logits_BLV = parts.model(input_ids=ids_BL, attention_mask=mask, use_cache=False).logits
        for row, logits_LV in enumerate(logits_BLV):  # a row at a time: the float32 logits of all are large
            kept = slice(None) if mask is None else mask[row, 1:].bool()
            losses_L = F.cross_entropy(logits_LV[:-1].float(), ids_BL[row, 1:], reduction="none")[kept]
            total, count = total + float(losses_L.sum()), count + len(losses_L)
    return total / count


def _note_shared(jobs: Mapping[str, Job], dictionaries: Mapping[str, SparseDictionary]) -> None:
    """Note the share of latents that all seeds of a method have on a site."""
    groups: dict[tuple[str, Site], list[SparseDictionary]] = {}
    for name, job in jobs.items():
        described = repr(sorted(job.method.model_dump().items(), key=lambda item: item[0]))
        groups.setdefault((job.method.slug + described, job.site), []).append(dictionaries[name])
    for group in groups.values():
        if len(group) > 1:
            for index, dictionary in enumerate(group):
                others: Sequence[SparseDictionary] = [*group[:index], *group[index + 1 :]]
                decoders = [other.decoder_MD for other in (dictionary, *others)]
                top_M = strongest(torch.tensor(dictionary.about["max_activation"]), STRONGEST)
                dictionary.about["shared_latents"] = shared_latents(decoders)
                dictionary.about["shared_strongest"] = shared_latents(decoders, counted_M=top_M.to(decoders[0].device))
