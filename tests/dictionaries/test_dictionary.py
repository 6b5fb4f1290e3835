"""Dictionaries at inference, and their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from intaglio.dictionaries.baselines import L1SAE, BatchTopKSAE, GatedSAE, JumpReLUSAE, TopKSAE
from intaglio.dictionaries.dictionary import CONFIG, WEIGHTS, Dictionary, SparseDictionary
from intaglio.errors import IntaglioError
from intaglio.methods.activations.gba_sae import GBASAE
from intaglio.modeling.sites import Site

SIZES = {"width": 12, "tokens": 600, "batch_tokens": 50}
METHODS = {
    "standard": L1SAE(**SIZES),
    "topk": TopKSAE(k=3, **SIZES),
    "gated": GatedSAE(**SIZES),
    "jumprelu": JumpReLUSAE(l0=3.0, learning_rate=0.01, **SIZES),
    "batch": BatchTopKSAE(k=3, **SIZES),
    "gba": GBASAE(groups=2, adapt_every=1, **SIZES),
}


def data(rows: int = 300) -> torch.Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(0)) + 2


def tensors(**changes: Any) -> dict[str, torch.Tensor]:
    own = {
        "W_enc": torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]]),
        "W_dec": torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]),
        "b_dec": torch.tensor([1.0, 0.0]),
        "b_enc": torch.tensor([0.0, -1.0, 0.5]),
    }
    return own | changes


X = torch.tensor([[3.0, 2.0], [1.0, 4.0]])
"""Pre-activations (2, 1, .5) and (0, 3, -3.5)."""


def test_the_four_encoders() -> None:
    standard = SparseDictionary("standard", tensors())
    assert standard.encode(X).tolist() == [[2, 1, 0.5], [0, 3, 0]]
    assert standard.decode(standard.encode(X)).tolist() == [[3.5, 2.5], [1, 6]]
    topk = SparseDictionary("topk", tensors(), k=2)
    assert topk.encode(X).tolist() == [[2, 1, 0], [0, 3, 0]]
    jump = SparseDictionary("jumprelu", tensors(threshold=torch.tensor([2.0, 0.5, 0.4])))
    assert jump.encode(X).tolist() == [[0, 1, 0.5], [0, 3, 0]]
    gates = {"b_gate": torch.tensor([-1.0, -3.0, 5.0]), "b_mag": torch.tensor([1.0, 0.0, 0.0])}
    own = {name: tensor for name, tensor in tensors().items() if name != "b_enc"}
    gated = SparseDictionary("gated", own | gates | {"r_mag": torch.tensor([0.0, 1.0, 0.0])})
    assert gated.encode(X).tolist() == [[3, 0, 0], [0, pytest.approx(4 * torch.e), 0]]
    plain = SparseDictionary("standard", tensors(), subtracts=False)
    assert plain.encode(X).tolist() == [[3, 1, 1.5], [1, 3, 0]]
    assert (standard.inputs, standard.width) == (2, 3)
    assert standard.encode(X[None]).shape == (1, 2, 3)


@pytest.mark.parametrize("name", METHODS)
def test_a_trained_dictionary_comes_back_from_sae_lens_files(name: str, tmp_path: Path) -> None:
    """Equal codes after a round trip; BatchTopK and GBA are saved as jumprelu."""
    dictionary = METHODS[name].model_copy().fit_activations(data()).dictionary()
    own = SparseDictionary(dictionary.architecture, dictionary.tensors, dictionary.k, Site(3), about={"l0": 2.5})
    own.save(tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / CONFIG).read_text())
    expected = {"architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations"}
    assert expected <= config.keys()
    assert config["architecture"] == {"batch": "jumprelu", "gba": "jumprelu"}.get(name, name)
    assert config["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert ("k" in config) == (name == "topk")
    back = SparseDictionary.load(tmp_path / "sae")
    assert torch.equal(back.encode(data()), dictionary.encode(data()))
    assert torch.equal(back.decode(back.encode(data())), dictionary.decode(dictionary.encode(data())))
    assert (back.site, back.about, back.k) == (Site(3), {"l0": 2.5}, dictionary.k)
    assert isinstance(back, Dictionary)
    assert 0 < float((back.encode(data()) > 0).float().mean()) < 1


def saved(path: Path, **changes: Any) -> Path:
    SparseDictionary("standard", tensors(), site=Site(1)).save(path)
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | changes))
    return path


def test_files_of_sae_lens_itself_are_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", metadata={"hook_name": "blocks.7.hook_resid_post"}, apply_b_dec_to_input=False)
    back = SparseDictionary.load(path)
    assert (back.site, back.subtracts) == (Site(7), False)
    elsewhere = SparseDictionary.load(saved(tmp_path / "b", metadata={"hook_name": "blocks.7.attn.hook_z"}))
    assert elsewhere.site is None
    half = {name: tensor.half() for name, tensor in load_file(path / WEIGHTS).items()}
    save_file(half, path / WEIGHTS)
    assert SparseDictionary.load(path).encode(X).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "temporal"}, "architecture of .* is 'temporal'; accepted: standard, topk, gated, jumprelu"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations of .* is 'layer_norm'; accepted: none"),
        ({"reshape_activations": "hook_z"}, "reshape_activations"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm of .* is True; accepted: False"),
        ({"architecture": "jumprelu", "metadata": {}}, "the tensor threshold of the dictionary is missing"),
        ({"architecture": "topk", "metadata": {}, "k": 9}, "k of the dictionary is 9; 1 to 3 latents is accepted"),
        ({"architecture": "topk", "metadata": {}, "k": "9"}, "k of the dictionary is '9'; 1 to 3 latents is accepted"),
        ({"metadata": "none"}, "cfg.json is no configuration of sae_lens"),
        ({"metadata": {"intaglio": {"architecture": "standard"}}}, "metadata.intaglio of .*cfg.json is damaged"),
        ({"metadata": {"intaglio": "standard"}}, "metadata.intaglio of .*cfg.json is damaged"),
    ],
)
def test_what_it_cannot_be_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(IntaglioError, match=says):
        SparseDictionary.load(saved(tmp_path / "a", **changes))


def test_damaged_files_and_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IntaglioError, match="is no dictionary"):
        SparseDictionary.load(tmp_path)
    path = saved(tmp_path / "a")
    (saved(tmp_path / "list") / CONFIG).write_text("[]")
    with pytest.raises(IntaglioError, match=r"cfg\.json is no configuration of sae_lens"):
        SparseDictionary.load(tmp_path / "list")
    (path / WEIGHTS).write_bytes(b"cut")
    with pytest.raises(IntaglioError, match="is no dictionary"):
        SparseDictionary.load(path)
    with pytest.raises(IntaglioError, match=r"the tensor W_dec of the dictionary is \[3, 3\]; \[3, 2\] is expected"):
        SparseDictionary("standard", tensors(W_dec=torch.ones(3, 3)))
    with pytest.raises(IntaglioError, match="b_enc of the dictionary holds NaN"):
        SparseDictionary("standard", tensors(b_enc=torch.full((3,), torch.nan)))
    with pytest.raises(IntaglioError, match="the width 5, the dictionary was trained on 2"):
        SparseDictionary("standard", tensors()).encode(torch.ones(1, 5))
    with pytest.raises(IntaglioError, match="exists"):
        SparseDictionary("standard", tensors()).save(path)
