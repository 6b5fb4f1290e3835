"""Text encoders of the index, and the fingerprint of their embedding space.

Dimension letters: B batch, L sequence, D width, V vocabulary, N texts, P nonzero weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from intaglio.errors import IntaglioError, shorten

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from intaglio.data.text_pairs import TextPair

Pooling = Literal["mean", "cls", "last", "splade"]
DEFAULT_ENCODER = {"dense": "minilm", "hybrid": "minilm", "sparse": "splade-tiny"}
"""Encoder by kind of index."""
POOLINGS = ("mean", "cls", "last", "splade")
_BATCH_TOKENS = {"splade": 512}
"""Most tokens of a batch: a token of SPLADE has a logit for each word of the vocabulary."""


@dataclass(frozen=True)
class SparseVectors:
    """Sparse vectors in rows (CSR).

    Args:
        ptr: start of each row, int64 [N + 1].
        terms: term ids, int64 [P].
        weights: positive weights, float32 [P].
    """

    ptr: NDArray[np.int64]
    terms: NDArray[np.int64]
    weights: NDArray[np.float32]

    @classmethod
    def from_terms(cls, rows: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]]) -> SparseVectors:
        """Return rows given by their term ids and weights."""
        ptr = np.concatenate([[0], np.cumsum([len(terms) for terms, _ in rows])]).astype(np.int64)
        terms = [terms for terms, _ in rows] or [np.empty(0, np.int64)]
        return cls(ptr, np.concatenate(terms), np.concatenate([w for _, w in rows] or [np.empty(0, np.float32)]))

    @classmethod
    def from_rows(cls, rows: Sequence[NDArray[np.float32]]) -> SparseVectors:
        """Return rows given over the whole vocabulary."""
        places = [np.flatnonzero(row) for row in rows]
        return cls.from_terms([(place, row[place]) for place, row in zip(places, rows, strict=True)])

    def rows(self) -> Iterator[dict[int, float]]:
        """Yield each vector as weights by term id."""
        for start, stop in zip(self.ptr[:-1], self.ptr[1:], strict=True):
            yield dict(zip(self.terms[start:stop].tolist(), self.weights[start:stop].tolist(), strict=True))


class TextEncoder(Protocol):
    """What an index needs of an encoder; `CheckpointEncoder` is the usual one.

    Attributes:
        name: as the user wrote it.
        kind: "dense" or "sparse".
        dimensions: width of a vector, or size of the vocabulary.
        max_tokens: the context; longer documents are cut, longer queries refused.
    """

    name: str
    kind: Literal["dense", "sparse"]
    dimensions: int
    max_tokens: int

    @property
    def settings(self) -> dict[str, Any]:
        """Options that the vectors depend on (pooling, prompts), as JSON values."""
        ...

    @property
    def fingerprint(self) -> str:
        """Digest of weights, tokenizer and settings: equal for the same embedding space only."""
        ...

    def count_tokens(self, texts: Sequence[str], query: bool = False) -> list[int]:
        """Return the tokens of each text, with special tokens and the prompt."""
        ...

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32] | SparseVectors:
        """Return the vectors [N, D] or sparse vectors of queries."""
        ...

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32] | SparseVectors:
        """Return the vectors [N, D] or sparse vectors of documents."""
        ...

    def term(self, term: int) -> str:
        """Return the word of a term id (sparse only)."""
        ...


class CheckpointEncoder:
    """Pooled hidden states of any text checkpoint, or SPLADE weights of a masked language model.

        dense:  e = pool(h_1 .. h_L) / |pool(h_1 .. h_L)|
        splade: w_v = log(1 + max_l relu(logit_lv))                    (Formal et al., arXiv 2109.10086)

    Args:
        checkpoint: the model with its tokenizer.
        name: as the user wrote it.
        pooling: "mean", "cls", "last" or "splade". Default: that of the checkpoint's sentence-transformers files; else
            "last" for a causal model and "mean" for others.
        query_prompt: text before every query. Default "".
        document_prompt: text before every document. Default "".
        batch_size: most texts of a batch. Default 32.

    Raises:
        IntaglioError: no tokenizer, an unknown pooling, or SPLADE without a masked-language-model head.
    """

    def __init__(
        self,
        checkpoint: Any,
        name: str,
        pooling: Pooling | None = None,
        query_prompt: str = "",
        document_prompt: str = "",
        batch_size: int = 32,
    ) -> None:
        if checkpoint.tokenizer is None:
            raise IntaglioError(f"the encoder {name!r} has no tokenizer")
        pooling = pooling or _own_pooling(checkpoint, name)
        if pooling not in POOLINGS:
            raise IntaglioError(f"pooling is {pooling!r}; accepted: {', '.join(POOLINGS)}")
        if pooling == "splade" and not type(checkpoint.model).__name__.endswith("ForMaskedLM"):
            raise IntaglioError(f"the encoder {name!r} has no masked-language-model head, which splade pooling needs")
        self.name, self.pooling, self.batch_size = name, pooling, batch_size
        self.kind: Literal["dense", "sparse"] = "sparse" if pooling == "splade" else "dense"
        self.query_prompt, self.document_prompt = query_prompt, document_prompt
        self._checkpoint = checkpoint
        tokenizer = checkpoint.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        tokenizer.padding_side = "right"
        own = json.loads(checkpoint.companions.get("sentence_bert_config.json", b"{}")).get("max_seq_length")
        self.max_tokens = min(own or 1 << 30, checkpoint.context, 8192)
        self.dimensions = checkpoint.vocabulary if self.kind == "sparse" else int(checkpoint.config.hidden_size)
        self._fingerprint = ""

    @property
    def settings(self) -> dict[str, Any]:
        """The pooling, the prompts and the context."""
        return {
            "pooling": self.pooling,
            "query_prompt": self.query_prompt,
            "document_prompt": self.document_prompt,
            "max_tokens": self.max_tokens,
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the weights' fingerprint, the tokenizer and the settings."""
        if not self._fingerprint:
            from intaglio.checkpoint.fingerprint import fingerprint

            backend = getattr(self._checkpoint.tokenizer, "backend_tokenizer", None)
            # The padding and truncation of the last call are in the tokenizer's JSON.
            parts = json.loads(backend.to_str()) if backend else {"vocab": self._checkpoint.tokenizer.get_vocab()}
            parts = {key: value for key, value in parts.items() if key not in ("padding", "truncation")}
            content = json.dumps([fingerprint(self._checkpoint.model), parts, self.settings], sort_keys=True)
            self._fingerprint = hashlib.sha256(content.encode()).hexdigest()
        return self._fingerprint

    @property
    def weights(self) -> str:
        """The digest of the weights alone."""
        from intaglio.checkpoint.fingerprint import fingerprint

        return fingerprint(self._checkpoint.model)

    @property
    def reads_as_recorded(self) -> bool:
        """Whether texts are pooled as the checkpoint's files say and have no prompts; so a teacher reads them."""
        prompts = self.query_prompt + self.document_prompt
        return not prompts and self.pooling == _own_pooling(self._checkpoint, self.name)

    def count_tokens(self, texts: Sequence[str], query: bool = False) -> list[int]:
        """Return the tokens of each text, with special tokens and the prompt."""
        prompt = self.query_prompt if query else self.document_prompt
        return list(map(len, self._checkpoint.tokenizer([prompt + text for text in texts], verbose=False)["input_ids"]))

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32] | SparseVectors:
        """Encode queries."""
        return self._encode([self.query_prompt + text for text in texts])

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32] | SparseVectors:
        """Encode documents."""
        return self._encode([self.document_prompt + text for text in texts])

    def term(self, term: int) -> str:
        """Return the token of a term id."""
        return str(self._checkpoint.tokenizer.convert_ids_to_tokens(term))

    def _encode(self, texts: Sequence[str]) -> NDArray[np.float32] | SparseVectors:
        import torch

        encode = self._splade if self.kind == "sparse" else self._dense
        rows: list[Any] = [None] * len(texts)
        with torch.inference_mode():
            for batch in self._batches(texts):
                tokens = self._checkpoint.tokenizer(
                    [texts[i] for i in batch],
                    padding=True,
                    truncation=True,
                    max_length=self.max_tokens,
                    return_tensors="pt",
                ).to(self._checkpoint.device)
                for i, row in zip(batch, encode(tokens), strict=True):
                    rows[i] = row
        if self.kind == "dense":
            return np.stack(rows) if rows else np.empty((0, self.dimensions), np.float32)
        return SparseVectors.from_terms(rows)

    def _batches(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Yield the indices of batches of about the same length."""
        most = _BATCH_TOKENS.get(self.pooling, 8192)
        batch: list[int] = []
        lengths = self.count_tokens(texts) if len(texts) > 1 else [0] * len(texts)
        for i in sorted(range(len(texts)), key=lengths.__getitem__):
            if batch and (len(batch) >= self.batch_size or min(lengths[i], self.max_tokens) * (len(batch) + 1) > most):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _dense(self, tokens: Any) -> NDArray[np.float32]:
        from torch.nn.functional import normalize

        from intaglio.measures.embeddings import pool
        from intaglio.modeling.anatomy import anatomy
        from intaglio.modeling.partial_pass import final_hidden

        hidden_BLD = final_hidden(anatomy(self._checkpoint.model), tokens)
        pooled_BD = pool(hidden_BLD, tokens["attention_mask"].bool(), self.pooling)  # type: ignore[arg-type]
        result: NDArray[np.float32] = normalize(pooled_BD, dim=-1).cpu().numpy()
        return result

    def _splade(self, tokens: Any) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        logits_BLV = self._checkpoint.model(**tokens).logits.float()
        logits_BLV.masked_fill_(~tokens["attention_mask"].bool()[..., None], 0)
        for row_V in logits_BLV.amax(1).relu_().log1p_().cpu().numpy():
            terms = np.flatnonzero(row_V)
            yield terms, row_V[terms]


class ObjectiveEncoder(CheckpointEncoder):
    """A checkpoint read as its training objective reads texts: `intaglio.trainer.encoder_training.EncoderObjective`.

    Args:
        objective: the trained method, from `checkpoint.encoder()`.
        checkpoint: the model with its tokenizer.
        name: as the user wrote it.
        batch_size: most texts of a batch. Default 32.
        pairs: training pairs; their texts are read with the instruction of their first pair. Default: none.
    """

    def __init__(
        self, objective: Any, checkpoint: Any, name: str, batch_size: int = 32, pairs: Sequence[TextPair] = ()
    ) -> None:
        self.name, self.batch_size, self.pooling = name, batch_size, objective.slug
        self.kind = "sparse" if objective.sparse else "dense"
        self.max_tokens = objective.length("document")
        self.dimensions = objective.dimensions(checkpoint)
        self._objective, self._checkpoint, self._fingerprint = objective, checkpoint, ""
        self._pairs: dict[str, dict[str, TextPair]] = {"query": {}, "document": {}}
        for pair in pairs:
            self._pairs["query"].setdefault(pair.query, pair)
            for text in (pair.positive, *pair.negatives):
                self._pairs["document"].setdefault(text, pair)

    def of_pairs(self, pairs: Sequence[TextPair]) -> ObjectiveEncoder:
        """Return the encoder that reads the texts of training pairs as they are trained on."""
        return ObjectiveEncoder(self._objective, self._checkpoint, self.name, self.batch_size, pairs)

    @property
    def settings(self) -> dict[str, Any]:
        """The method with its fields, and a digest of its own modules."""
        from intaglio.checkpoint.fingerprint import fingerprint

        owned = self._objective.modules()
        own = fingerprint(owned) if owned.state_dict() else ""
        return {"method": {self._objective.slug: self._objective.model_dump(mode="json")}, "modules": own}

    @property
    def weights(self) -> str:
        """The digest of the weights and of the method's own modules."""
        digest: str = self._objective.digest(self._checkpoint.model)
        return digest

    @property
    def reads_as_recorded(self) -> bool:
        """Whether no field of the method differs from those that it was trained with."""
        trained = self._checkpoint.attachments[self._objective.slug].parameters
        same: bool = self._objective.model_dump() == type(self._objective)(**trained).model_dump()
        return same

    @property
    def extends(self) -> tuple[str, int] | None:
        """The `weights` and dimensions of the encoder among whose vectors it can be searched; None for most."""
        extends: tuple[str, int] | None = getattr(self._objective, "extends", None)
        return extends

    def count_tokens(self, texts: Sequence[str], query: bool = False) -> list[int]:
        """Return the tokens of each text; queries are cut, as in training."""
        counts = [self._objective.count_tokens(text, "query" if query else "document") for text in texts]
        return [min(count, self.max_tokens) for count in counts] if query else counts

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32] | SparseVectors:
        """Encode queries."""
        return self._vectors(texts, "query")

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32] | SparseVectors:
        """Encode documents."""
        return self._vectors(texts, "document")

    def _vectors(self, texts: Sequence[str], side: str) -> NDArray[np.float32] | SparseVectors:
        batches = [texts[start : start + self.batch_size] for start in range(0, len(texts), self.batch_size)]
        own = self._pairs[side]
        parts = [
            self._objective.encode(self._checkpoint, batch, side, pairs=[own.get(text) for text in batch]).numpy()
            for batch in batches
        ]
        if self.kind == "dense":
            return np.concatenate(parts) if parts else np.empty((0, self.dimensions), np.float32)
        return SparseVectors.from_rows([row for part in parts for row in part])


class CompatibleEncoder:
    """An encoder with a head, such that its first dimensions are compared with vectors of an older encoder.

    Args:
        base: the encoder below the head.
        head: maps its vectors [N, H] to vectors [N, D]; see `intaglio.methods.retrieval.bt2`.
        settings_of_head: {"method", "arm", "file", "digest"}, which the index records.
    """

    kind: Literal["dense", "sparse"] = "dense"

    def __init__(self, base: TextEncoder, head: Any, settings_of_head: Mapping[str, str]) -> None:
        self.base, self._head, self._about = base, head, dict(settings_of_head)
        self.name, self.max_tokens, self.dimensions = base.name, base.max_tokens, int(head.dimensions)
        self.fingerprint = hashlib.sha256(f"{base.fingerprint} {self._about['digest']}".encode()).hexdigest()

    @classmethod
    def restore(cls, base: TextEncoder, folder: Path, about: Mapping[str, str]) -> CompatibleEncoder:
        """Return the encoder of a head that is kept in an index.

        Raises:
            IntaglioError: the file of the head is missing or damaged, or belongs to another encoder.
        """
        from intaglio.methods.registry import get_method

        method: Any = get_method(about["method"])
        head = method.load_head(folder / about["file"])
        if head.sizes.inputs != base.dimensions:
            raise IntaglioError(
                f"the index {folder} was upgraded to an encoder of {head.sizes.inputs} dimensions, and {base.name} has"
                f" {base.dimensions}; vectors of two spaces are never mixed: give the encoder of the upgrade"
            )
        return cls(base, head, about)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the base, and the head."""
        return {**self.base.settings, "head": self._about}

    def count_tokens(self, texts: Sequence[str], query: bool = False) -> list[int]:
        """Return the tokens of each text."""
        return self.base.count_tokens(texts, query)

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode queries."""
        return self.map(self.base.encode_queries(texts))

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode documents."""
        return self.map(self.base.encode_documents(texts))

    def map(self, vectors_NH: Any) -> NDArray[np.float32]:
        """Return the vectors of the head for vectors of the base."""
        import torch

        with torch.inference_mode():
            result: NDArray[np.float32] = self._head(
                torch.from_numpy(np.asarray(vectors_NH, np.float32))
            ).vectors.numpy()
        return result

    def term(self, term: int) -> str:
        """Dense vectors have no terms."""
        raise NotImplementedError


def _own_pooling(checkpoint: Any, name: str) -> Pooling:
    """Return the pooling of the sentence-transformers files, or the default for the model's class."""
    from intaglio.measures.embeddings import recorded_pooling

    modules = json.loads(checkpoint.companions.get("modules.json", b"[]"))
    if name == "splade-tiny" or any(str(module.get("type", "")).endswith("SpladePooling") for module in modules):
        return "splade"
    last = type(checkpoint.model).__name__.endswith("ForCausalLM")
    return recorded_pooling(checkpoint.companions, name) or ("last" if last else "mean")


def load_encoder(
    name: str | os.PathLike[str],
    *,
    pooling: Pooling | None = None,
    query_prompt: str = "",
    document_prompt: str = "",
    device: str | None = None,
    batch_size: int = 32,
    fields: Mapping[str, Any] | None = None,
) -> CheckpointEncoder:
    """Load an encoder.

    A checkpoint that was trained as an encoder by Intaglio is read as it was trained, unless `pooling` is given.

    Args:
        name: a bundled name (`minilm`, `splade-tiny`), a checkpoint directory, or a hub id.
        pooling: see `CheckpointEncoder`.
        query_prompt: text before every query. Default "".
        document_prompt: text before every document. Default "".
        device: device of the model. Default: the CPU.
        batch_size: most texts of a batch. Default 32.
        fields: override fields of the method by which it was trained as an encoder. Default: none.

    Raises:
        IntaglioError: the checkpoint cannot be loaded or encodes no text, or has no such fields.
    """
    from intaglio.checkpoint import load
    from intaglio.methods.registry import get_method

    checkpoint = load(name, device=device)
    if pooling is None and any("encoder" in get_method(slug).kinds for slug in checkpoint.attachments):
        if query_prompt or document_prompt:
            raise IntaglioError(f"the encoder {os.fspath(name)!r} has the prompts that it was trained with; give none")
        return ObjectiveEncoder(checkpoint.encoder(**(fields or {})), checkpoint, os.fspath(name), batch_size)
    if fields:
        raise IntaglioError(f"the encoder {os.fspath(name)!r} was not trained by a method, so it has no {min(fields)}")
    return CheckpointEncoder(checkpoint, os.fspath(name), pooling, query_prompt, document_prompt, batch_size)


def resolve_encoder(encoder: str | os.PathLike[str] | TextEncoder, options: Mapping[str, Any]) -> TextEncoder:
    """Load an encoder by name; a directory's path is made absolute."""
    if not isinstance(encoder, (str, os.PathLike)):
        if options:
            raise IntaglioError("the options of an encoder are given with its name, not with an object")
        return encoder
    name = os.fspath(encoder)
    return load_encoder(os.path.abspath(name) if os.path.isdir(name) else name, **options)


def describe_encoder(encoder: TextEncoder) -> dict[str, Any]:
    """Return what the index records of an encoder."""
    return {
        "name": encoder.name,
        "kind": encoder.kind,
        "dimensions": encoder.dimensions,
        "fingerprint": encoder.fingerprint,
        **encoder.settings,
    }


def check_space(
    path: str | os.PathLike[str],
    recorded: Mapping[str, Any],
    encoder: str | os.PathLike[str] | TextEncoder | None,
    device: str | None = None,
) -> TextEncoder:
    """Return an index's encoder (by default the recorded one); that of another space is refused."""
    if encoder is None or isinstance(encoder, (str, os.PathLike)):
        options = {name: recorded[name] for name in ("pooling", "query_prompt", "document_prompt") if name in recorded}
        if "method" in recorded:
            options["fields"] = next(iter(recorded["method"].values()))
        encoder = resolve_encoder(encoder or recorded["name"], {**options, "device": device})
    if "head" in recorded and not isinstance(encoder, CompatibleEncoder):
        encoder = CompatibleEncoder.restore(encoder, Path(path), recorded["head"])
    if encoder.fingerprint != recorded["fingerprint"]:
        known, given = describe_setting(recorded), describe_setting(describe_encoder(encoder))
        raise IntaglioError(
            f"the index {path} holds vectors of {known}, not of {given}; vectors of two spaces are never mixed: give"
            " the same encoder, or build another index"
        )
    return encoder


def check_context(encoder: TextEncoder, queries: Sequence[str]) -> None:
    """Refuse queries beyond the encoder's context."""
    for query, count in zip(queries, encoder.count_tokens(queries, query=True), strict=True):
        if count > encoder.max_tokens:
            raise IntaglioError(
                f"the query {shorten(query)!r} has {count} tokens; the encoder {encoder.name} reads"
                f" {encoder.max_tokens}"
            )


def describe_setting(value: Any) -> str:
    """Return a setting of an index as words of a sentence."""
    if not isinstance(value, dict):
        return str(value)
    if "fingerprint" in value:
        kind = f"{value['pooling']} pooling, " if "pooling" in value else ""
        return f"{value['name']} ({value['kind']}, {kind}{value['dimensions']} dimensions, {value['fingerprint'][:12]})"
    return ", ".join(f"{name} {item}" for name, item in value.items())


__all__ = [
    "DEFAULT_ENCODER",
    "CheckpointEncoder",
    "CompatibleEncoder",
    "ObjectiveEncoder",
    "SparseVectors",
    "TextEncoder",
    "check_context",
    "check_space",
    "describe_encoder",
    "describe_setting",
    "load_encoder",
    "resolve_encoder",
]
