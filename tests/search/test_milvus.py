"""The same documents in milvus-lite."""

from __future__ import annotations

from pathlib import Path

import pytest

from intaglio.errors import IntaglioError
from intaglio.search.milvus import MilvusIndex
from tests.search.fakes import BagOfWords
from tests.search.test_index import TEXTS, documents


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_milvus_lite_adds_updates_deletes_and_filters(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("milvus_lite")
    url, encoder = f"milvus://{tmp_path}/store.db/texts", BagOfWords(kind)
    with MilvusIndex(url, encoder, create=True) as index:
        assert index.add(documents()).added == 4
        report = index.add([*documents()[:3], {"id": "d", "text": "a cake"}])
        assert (report.added, report.updated, report.unchanged) == (0, 1, 3)
        (best, *_) = index.search("flour and water", k=2)
        assert (best.id, best.rank, best.text, best.metadata["year"]) == ("c", 1, TEXTS["c"], 2002)
        assert [hit.id for hit in index.search("mask", filters=["year>=2001", "lang=en"], k=1)] == ["b"]
        assert index.delete(["c"]) == 1
        assert "c" not in [hit.id for hit in index.search("flour and water")]
        with pytest.raises(IntaglioError, match="nothing was deleted"):
            index.delete(["zz"])
    with pytest.raises(IntaglioError, match=r"holds vectors of bag .*not of other"):
        MilvusIndex(url, BagOfWords(kind, name="other"))
    with MilvusIndex(url, encoder) as index:
        assert index.search("cake", k=1)[0].id == "d"


@pytest.mark.parametrize("url", ["http://x/y", "milvus://host:1", "milvus:///name"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(IntaglioError, match="accepted: milvus://host:port/name"):
        MilvusIndex(url, BagOfWords())
