"""Checkpoints as encoders of an index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import intaglio
from intaglio.errors import IntaglioError
from intaglio.measures.embeddings import pool
from intaglio.search import Index, load_encoder
from intaglio.search.encoders import SparseVectors
from tests.conftest import TinyDir

TEXTS = ["the quick brown fox", "a lazy dog sleeps in the sun and then it jumps", "she said"]


def test_dense_vectors_are_pooled_and_normalised(tiny_dir: TinyDir) -> None:
    path = tiny_dir("bert")
    encoder = load_encoder(path, pooling="mean", batch_size=2)
    vectors = encoder.encode_documents(TEXTS)
    assert isinstance(vectors, np.ndarray)
    assert vectors.shape == (3, encoder.dimensions)
    checkpoint = intaglio.load(path)
    for text, vector in zip(TEXTS, vectors, strict=True):
        tokens = checkpoint.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = checkpoint.model(**tokens, output_hidden_states=True).hidden_states[-1]
        expected = torch.nn.functional.normalize(pool(hidden, None), dim=-1)[0]
        assert torch.allclose(torch.from_numpy(vector), expected, atol=1e-5)


def test_splade_weights_are_the_log_of_the_greatest_logit(tiny_dir: TinyDir) -> None:
    path = tiny_dir("bert")
    encoder = load_encoder(path, pooling="splade")
    vectors = encoder.encode_queries(TEXTS)
    assert isinstance(vectors, SparseVectors)
    assert encoder.kind == "sparse"
    checkpoint = intaglio.load(path)
    for text, row in zip(TEXTS, vectors.rows(), strict=True):
        with torch.no_grad():
            logits = checkpoint.model(**checkpoint.tokenizer(text, return_tensors="pt")).logits[0]
        expected = torch.log1p(logits.relu()).amax(0)
        assert {key for key, weight in row.items() if weight > 1e-5} == set((expected > 1e-5).nonzero()[:, 0].tolist())
        assert [row[key] for key in row] == pytest.approx(expected[list(row)].tolist(), abs=1e-5)


def test_the_fingerprint_is_of_weights_pooling_and_prompts(tiny_dir: TinyDir) -> None:
    path = tiny_dir("bert")
    encoder = load_encoder(path)
    before = encoder.fingerprint
    encoder.encode_documents(TEXTS)  # leaves padding in the tokenizer
    assert load_encoder(path).fingerprint == before == encoder.fingerprint
    assert load_encoder(path, pooling="cls").fingerprint != before
    assert load_encoder(path, query_prompt="query: ").fingerprint != before


def test_an_encoder_that_changed_on_disk_is_refused(tiny_dir: TinyDir, tmp_path: Path) -> None:
    checkpoint = intaglio.load(tiny_dir("llama"))
    checkpoint.save(tmp_path / "model")
    with Index.create(tmp_path / "index", kind="dense", encoder=tmp_path / "model") as index:
        index.add([{"id": str(i), "text": text} for i, text in enumerate(TEXTS)])
        assert index.search(TEXTS[1], k=1)[0].id == "1"
        assert index.info()["encoder"]["pooling"] == "last"
    with torch.no_grad():
        for parameter in checkpoint.model.parameters():
            parameter.mul_(1.5)
    checkpoint.save(tmp_path / "model", overwrite=True)
    with Index.open(tmp_path / "index") as index:
        with pytest.raises(IntaglioError, match="vectors of two spaces are never mixed"):
            index.search("fox")
        assert len(index) == 3


def test_what_cannot_encode_is_refused(tiny_dir: TinyDir) -> None:
    with pytest.raises(IntaglioError, match="has no masked-language-model head"):
        load_encoder(tiny_dir("llama"), pooling="splade")
    with pytest.raises(IntaglioError, match="pooling is 'max'; accepted: mean, cls, last, splade"):
        load_encoder(tiny_dir("llama"), pooling="max")  # type: ignore[arg-type]
