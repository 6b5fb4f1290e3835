"""Search against scipy, bm25s, numpy, Seismic and milvus-lite, on documents with Zipfian terms.

    python benchmarks/search/run.py                  100,000 documents; about ten minutes on two cores
    python benchmarks/search/run.py --documents 5000 --only bm25
    python benchmarks/search/run.py --out results.json     resumes after the parts that are done

- sparse: exact top 10 of 200 terms a document and 30 a query, against scipy's row product (X q) and inverted product
  (q X^T); Seismic (approximate) and milvus-lite in an environment of their own (`peer-requirements.txt`), if they
  install
- BM25: top 10 of 6 words, against bm25s, which cannot be updated, in its numpy and numba forms
- updates: seconds to add 10,000 documents to an index, its size beside the raw text, and a query with its hits
- dense: exact top 10 of 384 dimensions, against numpy's product with argpartition
- graph: usearch against the exact product, on clustered vectors

Times are the medians over queries of the best of three, one thread each; all in one process, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import bm25s  # noqa: E402
import numpy as np  # noqa: E402
import scipy.sparse as sp  # noqa: E402

from intaglio.search import Document, Index, ann, dense  # noqa: E402
from intaglio.search.lexical import BM25, Analyzer, LexicalSearch, Postings, term_key  # noqa: E402

HERE = Path(__file__).parent
TERMS, QUERIES, K, DIMENSIONS = 30_000, 100, 10, 384


def zipfian(rng: np.random.Generator, rows: int, most: int) -> list[np.ndarray]:
    """Draw distinct Zipfian terms for each row."""
    cumulative = np.cumsum(1 / np.arange(1, TERMS + 1))
    result = []
    for _ in range(rows):
        drawn = np.searchsorted(cumulative / cumulative[-1], rng.random(int(2.2 * most)))
        terms = np.unique(np.minimum(drawn, TERMS - 1))
        result.append(np.sort(rng.choice(terms, most, replace=False)) if len(terms) > most else terms)
    return result


def median_ms(functions: dict[str, Callable[[Any], Any]], queries: Sequence[Any]) -> dict[str, float]:
    """Return the median over queries of each function's best of three, in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for query in queries:
        best = dict.fromkeys(functions, np.inf)
        for _ in range(3):
            for name, function in functions.items():
                started = time.perf_counter()
                function(query)
                best[name] = min(best[name], time.perf_counter() - started)
        for name, seconds in best.items():
            times[name].append(seconds)
    return {name: 1e3 * float(np.median(own)) for name, own in times.items()}


def top(scores: np.ndarray, k: int = K) -> np.ndarray:
    index = np.argpartition(-scores, k)[:k]
    return index[np.argsort(-scores[index])]


def sparse(rng: np.random.Generator, documents: int, peers: bool) -> dict[str, Any]:
    rows = zipfian(rng, documents, 200)
    ptr = np.cumsum([0, *map(len, rows)])
    terms = np.concatenate(rows)
    weights = rng.uniform(0.1, 2.1, len(terms)).astype(np.float32)
    lists = LexicalSearch([Postings.from_vectors(ptr, terms, weights)], [None], [documents], None)
    matrix = sp.csr_matrix((weights, terms, ptr), shape=(documents, TERMS))
    inverted = matrix.T.tocsr()
    queries = [(own, rng.uniform(0.1, 2.1, len(own)).astype(np.float32)) for own in zipfian(rng, QUERIES, 30)]

    def ours(query: Any) -> np.ndarray:
        return lists.search(dict(zip(query[0].tolist(), query[1].tolist(), strict=True)), K)[1]

    def row_product(query: Any) -> np.ndarray:
        vector = np.zeros(TERMS, np.float32)
        vector[query[0]] = query[1]
        return top(matrix @ vector)

    def inverted_product(query: Any) -> np.ndarray:
        result = sp.csr_matrix((query[1], query[0], [0, len(query[0])]), shape=(1, TERMS)) @ inverted
        return result.indices[top(result.data)]

    truth = [row_product(query) for query in queries]
    recall = np.mean([len(set(ours(query)) & set(best)) / K for query, best in zip(queries, truth, strict=True)])
    functions = {"intaglio": ours, "scipy rows": row_product, "scipy inverted": inverted_product}
    result: dict[str, Any] = {"recall": float(recall), "ms": median_ms(functions, queries)}
    faster = min(result["ms"]["scipy rows"], result["ms"]["scipy inverted"])
    result["times the faster of scipy"] = faster / result["ms"]["intaglio"]
    if peers:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder, "data.npz")
            flat = {"query_ptr": np.cumsum([0, *(len(q[0]) for q in queries)]), "truth": np.stack(truth)}
            flat |= {"query_terms": np.concatenate([q[0] for q in queries])}
            flat |= {"query_weights": np.concatenate([q[1] for q in queries])}
            np.savez(data, ptr=ptr, terms=terms, weights=weights, **flat)
            result["peers"] = peer_results(data)
    return result


def peer_results(data: Path) -> dict[str, Any]:
    """Run the peers in their own environment."""
    place = HERE / ".venv-peer"
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
    for requirement in (HERE / "peer-requirements.txt").read_text().split():
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", requirement], check=False)
    result = {}
    for peer in ("seismic", "milvus-lite"):
        done = subprocess.run(
            [str(python), str(HERE / "worker_peer.py"), peer, str(data)], capture_output=True, text=True, check=False
        )
        lines = done.stdout.strip().splitlines()
        failed = (done.stderr.strip().splitlines() or ["no output"])[-1]
        result[peer] = json.loads(lines[-1]) if done.returncode == 0 and lines else {"failed": failed}
    return result


def drawn_texts(rng: np.random.Generator, documents: int) -> tuple[list[str], list[str]]:
    """Draw documents of 100 to 300 Zipfian words, and queries of 6."""
    words = np.array([f"w{i}" for i in range(TERMS)])
    cumulative = np.cumsum(1 / np.arange(1, TERMS + 1))

    def draw(lengths: np.ndarray) -> list[str]:
        drawn = np.minimum(np.searchsorted(cumulative / cumulative[-1], rng.random(int(lengths.sum()))), TERMS - 1)
        return [" ".join(words[own]) for own in np.split(drawn, np.cumsum(lengths)[:-1])]

    return draw(rng.integers(100, 300, documents)), draw(np.full(QUERIES, 6))


def bm25(rng: np.random.Generator, documents: int) -> dict[str, Any]:
    texts, queries = drawn_texts(rng, documents)
    analyzer = Analyzer("none")
    postings = Postings.from_texts(texts, analyzer)
    lists = LexicalSearch([postings], [None], [documents], BM25(1.5, 0.75))
    tokens = bm25s.tokenize(texts, stopwords=[], show_progress=False)
    peers = {}
    for backend in ("numpy", "numba"):
        peer = bm25s.BM25(method="lucene", backend=backend)
        peer.index(tokens, show_progress=False)
        peers[backend] = peer

    def ours(query: Any) -> tuple[np.ndarray, np.ndarray]:
        terms = [term_key(term) for term in query]
        return lists.search({key: float(terms.count(key)) for key in terms}, K)

    def theirs(backend: str) -> Callable[[Any], Any]:
        peer = peers[backend]
        return lambda query: peer.retrieve([query], k=K, show_progress=False, n_threads=1)

    split = [query.split() for query in queries]
    error = 0.0
    for query in split:
        best = theirs("numpy")(query)[1][0]
        error = max(error, float(np.abs(np.sort(best)[::-1] - ours(query)[0]).max()))
    functions = {"intaglio": ours, "bm25s numpy": theirs("numpy"), "bm25s numba": theirs("numba")}
    result: dict[str, Any] = {"greatest difference of scores": error, "ms": median_ms(functions, split)}
    faster = min(result["ms"]["bm25s numpy"], result["ms"]["bm25s numba"])
    result["share of the faster bm25s"] = result["ms"]["intaglio"] / faster
    return result


def updates(rng: np.random.Generator, documents: int) -> dict[str, Any]:
    """Time adds and queries of an index, with its text and ids, and measure its size."""
    texts, queries = drawn_texts(rng, documents)
    result: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Index.create(Path(folder, "index"), language="none", chunk=0) as index,
    ):
        rows = [Document(str(i), own) for i, own in enumerate(texts)]
        last = min(10_000, documents // 2)
        started = time.perf_counter()
        index.add(rows[:-last])
        result["seconds to build"] = time.perf_counter() - started
        result[f"seconds to add the last {last}"] = index.add(rows[-last:]).seconds
        sizes = index.info()["bytes"]
        result["bytes"] = {**sizes, "share of the text": sizes["total"] / max(sizes["text"], 1)}
        result["ms of Index.search"] = median_ms({"index": lambda query: index.search(query, K)}, queries)["index"]
    return result


def dense_vectors(rng: np.random.Generator, documents: int) -> dict[str, Any]:
    vectors = rng.standard_normal((documents, DIMENSIONS), np.float32)
    queries = rng.standard_normal((QUERIES, DIMENSIONS), np.float32)
    functions = {
        "intaglio": lambda query: dense.search([vectors], [None], query[None], K),
        "numpy": lambda query: top(vectors @ query),
    }
    same = all((functions["intaglio"](q)[0][1] == functions["numpy"](q)).all() for q in queries)
    result: dict[str, Any] = {"same rows": bool(same), "ms": median_ms(functions, queries)}
    result["times numpy"] = result["ms"]["numpy"] / result["ms"]["intaglio"]
    return result


def graph(rng: np.random.Generator, documents: int) -> dict[str, Any]:
    """Compare approximate with exact search on vectors of 64 clusters."""
    centres = rng.standard_normal((64, DIMENSIONS), np.float32)
    vectors = centres[rng.integers(0, 64, documents)] + rng.standard_normal((documents, DIMENSIONS), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = vectors[rng.choice(documents, QUERIES)] + 0.02 * rng.standard_normal((QUERIES, DIMENSIONS), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vectors.usearch")
        started = time.perf_counter()
        ann.build({"dense.vectors": vectors}, file)
        result: dict[str, Any] = {"seconds to build": time.perf_counter() - started, "bytes": file.stat().st_size}
        rows = ann.load({"dense.vectors": vectors}, file)
        functions = {
            "exact": lambda query: dense.search([vectors], [None], query[None], K),
            "graph": lambda query: ann.search([rows], [None], query[None], K),
        }
        shared = [len({*functions["exact"](q)[0][1]} & {*functions["graph"](q)[0][1]}) / K for q in queries]
        return {**result, "recall": float(np.mean(shared)), "ms": median_ms(functions, queries)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--no-peers", action="store_true", help="leave out Seismic and milvus-lite")
    parser.add_argument("--only", choices=["sparse", "bm25", "updates", "dense", "graph"])
    parser.add_argument("--out", type=Path, help="JSON file of results; parts that are in it are not run again")
    options = parser.parse_args()
    parts = {
        "sparse": lambda rng: sparse(rng, options.documents, not options.no_peers),
        "bm25": lambda rng: bm25(rng, options.documents),
        "updates": lambda rng: updates(rng, options.documents),
        "dense": lambda rng: dense_vectors(rng, options.documents),
        "graph": lambda rng: graph(rng, options.documents),
    }
    results = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    for name, part in parts.items():
        if options.only in (None, name) and name not in results:
            results[name] = part(np.random.default_rng(0))
            print(json.dumps({name: results[name]}, indent=2), flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
