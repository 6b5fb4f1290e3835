"""Dictionaries by name: those attached to a checkpoint, or a directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.dictionaries.dictionary import CONFIG, SparseDictionary
from intaglio.dictionaries.sparse_autoencoder import SparseAutoencoder, attached_dictionaries
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.methods.base import Method
from intaglio.modeling.anatomy import anatomy, blocks
from intaglio.modeling.sites import check_site, site_width


def find_dictionary(checkpoint: Checkpoint, name: str | None = None) -> tuple[str, SparseDictionary]:
    """Return a dictionary of a checkpoint and its name.

    Args:
        checkpoint: the model.
        name: of an attached dictionary, or a directory of `SparseDictionary.save` or sae_lens. Where two `fit` steps
            trained one of the same name, that of the step comes first: `gba_sae/topk_sae.layers.15`. Default: the
            first attached one.

    Raises:
        IntaglioError: there is none, several have the name, or it belongs to another model.
    """
    if name is not None and (Path(name) / CONFIG).is_file():
        dictionary = SparseDictionary.load(name).to(checkpoint.device)
        _check_owner(checkpoint, name, dictionary)
        return name, dictionary
    attached = _attached(checkpoint)
    name, key = _chosen(attached, name, checkpoint)
    _check_owner(checkpoint, name, attached[key])
    return name, attached[key]


def check_feature(checkpoint: Checkpoint, name: str | None, feature: int, fits: Sequence[Method]) -> None:
    """Refuse a feature that its dictionary does not have, before the dictionary is fitted.

    Args:
        checkpoint: the model, with what is attached to it.
        name: of the dictionary; see `find_dictionary`.
        feature: index of the latent.
        fits: methods that will be fitted before the feature is used.

    Raises:
        IntaglioError: there will be no such dictionary or feature.
    """
    if name is not None and (Path(name) / CONFIG).is_file():
        return check_index(name, feature, SparseDictionary.load(name).width)
    trained = [method for method in fits if isinstance(method, SparseAutoencoder)]
    replaced = {method.slug for method in trained}
    widths = {key: one.width for key, one in _attached(checkpoint).items() if key[0] not in replaced}
    for method in trained:
        jobs = method.jobs(len(blocks(checkpoint.model)), 0)
        widths |= {(method.slug, key): job.method.width for key, job in jobs.items()}
    name, chosen = _chosen(widths, name, checkpoint)
    check_index(name, feature, widths[chosen])


def check_index(name: str, feature: int, width: int) -> None:
    """Refuse a feature outside a dictionary."""
    if feature >= width:
        raise IntaglioError(f"feature is {feature}; {name} has the features 0 to {width - 1}")


def _attached(checkpoint: Checkpoint) -> dict[tuple[str, str], SparseDictionary]:
    """Return the attached dictionaries by the slug of their fit and their name, in the order of the fits."""
    return {
        (attachment.slug, key): dictionary
        for attachment in sorted(checkpoint.attachments.values(), key=lambda attachment: attachment.step)
        if "dictionaries" in attachment.about
        for key, dictionary in attached_dictionaries(attachment, checkpoint).items()
    }


def _chosen(
    known: Mapping[tuple[str, str], Any], name: str | None, checkpoint: Checkpoint
) -> tuple[str, tuple[str, str]]:
    """Return the name and the key of the dictionary that `name` means; see `find_dictionary`."""
    counts = Counter(key for _, key in known)
    named = {key if counts[key] == 1 else f"{slug}/{key}": (slug, key) for slug, key in known}
    named |= {f"{slug}/{key}": (slug, key) for slug, key in known}
    source = checkpoint.source or "this checkpoint"
    if not named:
        what = (
            f"and {name} is no directory with {CONFIG}"
            if name
            else "a step such as fit: {gba_sae: {width: 2048}} trains one"
        )
        raise IntaglioError(f"no dictionary is attached to {source}; {what}")
    name = next(iter(named)) if name is None else name
    if counts[name] > 1:
        several = " and ".join(full for full in named if full.endswith(f"/{name}"))
        raise IntaglioError(f"{source} has several dictionaries {name!r}: name {several}")
    if name not in named:
        raise IntaglioError(f"{source} has no dictionary {name!r}; {did_you_mean(name, named)}")
    return name, named[name]


def _check_owner(checkpoint: Checkpoint, name: str, dictionary: SparseDictionary) -> None:
    """Refuse a dictionary of another model: by the weights' fingerprint, or by the width of its site."""
    own = dictionary.about.get("fingerprints")
    source = checkpoint.source or "this checkpoint"
    if own is not None and fingerprint(checkpoint.model) not in own:
        trained = dictionary.about.get("model") or "another model"
        raise IntaglioError(f"the dictionary {name} was trained on {trained}, whose weights are not those of {source}")
    if dictionary.site is not None:
        parts = anatomy(checkpoint.model)
        check_site(parts, dictionary.site)
        width = site_width(parts, dictionary.site)
        if width != dictionary.inputs:
            raise IntaglioError(
                f"the dictionary {name} reads {dictionary.inputs} features; {dictionary.site.name} of {source} has "
                f"{width}"
            )
