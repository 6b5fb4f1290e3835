"""What every registered encoder promises; a new one inherits this by being registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.checkpoint import Checkpoint, load
from intaglio.errors import IntaglioError
from intaglio.methods.registry import PUBLISHED, get_method
from intaglio.search import Index
from intaglio.search.encoders import load_encoder
from intaglio.trainer.encoder_training import EncoderObjective
from tests.examples import EXAMPLES, TEST_FILES
from tests.families import DECODERS, tiny_model
from tests.trainer.helpers import PAIRS, TEXTS, checkpoint, run

ENCODERS = [slug for slug, entry in PUBLISHED.items() if "encoder" in entry.kinds]
CASES = [(slug, index) for slug in ENCODERS for index in range(len(EXAMPLES[slug]))]
BATCH = [TEXTS[0], "a dog", TEXTS[3][:30]]


def example(slug: str, index: int) -> Any:
    return get_method(slug)(**EXAMPLES[slug][index])


def family(slug: str) -> str:
    return str(getattr(TEST_FILES[slug], "FAMILIES", DECODERS)[0])


@pytest.fixture(scope="module")
def trained() -> dict[tuple[str, int], Checkpoint]:
    """A checkpoint trained by each example."""
    made = {}
    for slug, index in CASES:
        made[slug, index] = checkpoint(family(slug), layers=1)
        run(made[slug, index], PAIRS, objective=example(slug, index), steps=2)
        made[slug, index].model.eval()
    return made


@pytest.mark.parametrize(("slug", "index"), CASES)
@pytest.mark.parametrize("side", ["query", "document"])
def test_a_vector_does_not_depend_on_its_batch(slug: str, index: int, side: str, trained: Any) -> None:
    ckpt = trained[slug, index]
    method = ckpt.encoder()
    assert isinstance(method, EncoderObjective)
    together = method.encode(ckpt, BATCH, side)
    alone = torch.cat([method.encode(ckpt, [text], side) for text in BATCH])
    assert torch.allclose(together, alone, atol=1e-5)
    assert together.shape == (3, method.dimensions(ckpt))


@pytest.mark.parametrize(("slug", "index"), CASES)
def test_what_is_saved_and_loaded_encodes_equally(slug: str, index: int, trained: Any, tmp_path: Path) -> None:
    ckpt = trained[slug, index]
    expected = ckpt.encoder().encode(ckpt, BATCH, "document")
    ckpt.save(tmp_path / "out")
    back = load(tmp_path / "out")
    assert back.encoder().model_dump() == example(slug, index).model_dump()
    assert torch.equal(back.encoder().encode(back, BATCH, "document"), expected)
    loaded = load_encoder(tmp_path / "out")
    assert loaded.fingerprint == load_encoder(tmp_path / "out").fingerprint
    vectors = back.as_sentence_transformer().encode_document(BATCH, convert_to_tensor=True)
    assert torch.allclose(vectors.to_dense() if vectors.is_sparse else vectors, expected, atol=1e-5)
    with Index.create(tmp_path / "index", kind=loaded.kind, encoder=loaded, chunk=0) as made:
        made.add({"id": str(n), "text": text} for n, text in enumerate(TEXTS[:6]))
    with Index.open(tmp_path / "index") as opened:  # loads the encoder by its recorded name and fields
        hits = {hit.id: hit.score for hit in opened.search("the dog sleeps", k=6)}
    query = back.encoder().encode(back, ["the dog sleeps"], "query")[0]
    scores = back.encoder().encode(back, TEXTS[:6], "document") @ query
    for number, score in hits.items():
        assert score == pytest.approx(float(scores[int(number)]), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("slug", "index"), CASES)
def test_chunks_change_no_gradient(slug: str, index: int) -> None:
    gradients = []
    for size in (None, 3):
        ckpt = checkpoint(family(slug), layers=1)
        method = get_method(slug)(**{**EXAMPLES[slug][index], "chunk_size": size})
        rows = [{**row, "id": n, "epoch": 0, "step": 1, "steps": 9} for n, row in enumerate(_rows(method, ckpt))]
        loss = method.loss(ckpt.model, method.collate(rows, _draws()))  # type: ignore[attr-defined]
        loss.total.backward()
        gradients.append([p.grad for p in ckpt.model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 3
    largest = max(float(gradient.abs().max()) for gradient in gradients[0])  # some are zero but for rounding
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * largest)


def _draws() -> Any:
    from intaglio.trainer import KeyedRNG

    return KeyedRNG(0)


def _rows(method: Any, ckpt: Checkpoint) -> Any:
    return list(method.prepare(ckpt, [dict(pair) for pair in PAIRS[:4]], _draws()))


@pytest.mark.parametrize("slug", [slug for slug in ENCODERS if get_method(slug).sparse])  # type: ignore[attr-defined]
def test_a_changed_vocabulary_is_refused(slug: str, trained: Any) -> None:
    ckpt = trained[slug, 0]
    other = Checkpoint(tiny_model(family(slug), layers=1, vocab_size=161), ckpt.tokenizer, "other", ckpt.record)
    other.attachments = ckpt.attachments
    with pytest.raises(IntaglioError, match="its vocabulary or width has changed") as caught:
        other.encoder()
    assert "\n" not in str(caught.value)
