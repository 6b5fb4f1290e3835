"""Time a peer on the sparse vectors of `run.py`; prints one line of JSON."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

K = 10


def seismic(data: dict[str, np.ndarray]) -> tuple[list[float], list[set[int]]]:
    """Search with the parameters of Seismic's documentation."""
    from seismic import SeismicDataset, SeismicIndex, get_seismic_string

    kind, dataset = get_seismic_string(), SeismicDataset()
    for row, (start, stop) in enumerate(zip(data["ptr"][:-1], data["ptr"][1:], strict=True)):
        names = np.array([str(term) for term in data["terms"][start:stop]], dtype=kind)
        dataset.add_document(str(row), names, data["weights"][start:stop])
    index = SeismicIndex.build_from_dataset(dataset)
    times, results = [], []
    for number, (start, stop) in enumerate(zip(data["query_ptr"][:-1], data["query_ptr"][1:], strict=True)):
        names = np.array([str(term) for term in data["query_terms"][start:stop]], dtype=kind)
        began = time.perf_counter()
        hits = index.search(str(number), names, data["query_weights"][start:stop], K, 10, 0.7)
        times.append(time.perf_counter() - began)
        results.append({int(row[2]) for row in hits})
    return times, results


def milvus_lite(data: dict[str, np.ndarray]) -> tuple[list[float], list[set[int]]]:
    """Search a sparse inverted index by inner product."""
    from pymilvus import DataType, MilvusClient

    with tempfile.TemporaryDirectory() as folder:
        client = MilvusClient(str(Path(folder, "milvus.db")))
        schema = client.create_schema()
        schema.add_field("row", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.SPARSE_FLOAT_VECTOR)
        fields = client.prepare_index_params()
        fields.add_index("vector", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
        client.create_collection("rows", schema=schema, index_params=fields)

        def vector(terms: np.ndarray, weights: np.ndarray) -> dict[int, float]:
            return dict(zip(terms.tolist(), weights.tolist(), strict=True))

        bounds = list(zip(data["ptr"][:-1], data["ptr"][1:], strict=True))
        for low in range(0, len(bounds), 1000):
            rows = enumerate(bounds[low : low + 1000], low)
            client.insert(
                "rows", [{"row": r, "vector": vector(data["terms"][a:b], data["weights"][a:b])} for r, (a, b) in rows]
            )
        times, results = [], []
        for a, b in zip(data["query_ptr"][:-1], data["query_ptr"][1:], strict=True):
            query = vector(data["query_terms"][a:b], data["query_weights"][a:b])
            began = time.perf_counter()
            (hits,) = client.search("rows", [query], anns_field="vector", limit=K, search_params={"metric_type": "IP"})
            times.append(time.perf_counter() - began)
            results.append({int(hit["row"]) for hit in hits})
        return times, results


def main() -> None:
    """Print median milliseconds and recall."""
    peer = {"seismic": seismic, "milvus-lite": milvus_lite}[sys.argv[1]]
    with np.load(sys.argv[2]) as file:
        data = dict(file)
    times, results = peer(data)
    recall = np.mean([len(own & set(best)) / K for own, best in zip(results, data["truth"].tolist(), strict=True)])
    print(json.dumps({"ms": 1e3 * float(np.median(times)), "recall": float(recall)}))


if __name__ == "__main__":
    main()
