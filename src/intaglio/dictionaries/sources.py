"""Dictionaries by name: those attached to a checkpoint, or a directory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.dictionaries.dictionary import CONFIG, SparseDictionary
from intaglio.dictionaries.sparse_autoencoder import attached_dictionaries
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.modeling.anatomy import anatomy
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
    attached = {
        (attachment.slug, key): dictionary
        for attachment in sorted(checkpoint.attachments.values(), key=lambda attachment: attachment.step)
        if "dictionaries" in attachment.about
        for key, dictionary in attached_dictionaries(attachment, checkpoint).items()
    }
    counts = Counter(key for _, key in attached)
    named = {key if counts[key] == 1 else f"{slug}/{key}": attached[slug, key] for slug, key in attached}
    named |= {f"{slug}/{key}": dictionary for (slug, key), dictionary in attached.items()}
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
    _check_owner(checkpoint, name, named[name])
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
