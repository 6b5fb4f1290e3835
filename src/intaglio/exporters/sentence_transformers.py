"""Export of trained encoders as sentence-transformers models of stock modules.

A learned-sparse decoder becomes `Transformer(transformer_task="text-generation")` and `SpladePooling`; its logit scale
and the terms that may not be used are baked into an untied head, as rows times the scale and rows of zeros.

Dimension letters: D width, V vocabulary.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intaglio.atomic_io import to_json
from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.retrieval.mistral_splade import MistralSplade
from intaglio.trainer.contrastive import SENTENCE_TRANSFORMERS, PooledObjective

FORMAT = "sentence-transformers"
POOLING = "1_SpladePooling"


def write(checkpoint: Checkpoint, directory: Path) -> None:
    """Write an encoder into an existing directory.

    Raises:
        IntaglioError: it was not trained as an encoder, or stock modules cannot compute its vectors.
        OSError: the disk refuses.
    """
    method = checkpoint.encoder()
    if method.variant == "echo":
        raise IntaglioError(
            "stock modules of sentence-transformers read a text once, and variant echo reads it twice; in Python,"
            " intaglio.load(MODEL).as_sentence_transformer() gives the encoder"
        )
    if isinstance(method, PooledObjective):
        stock = checkpoint  # its files are there since the training
    elif isinstance(method, MistralSplade):
        stock = _splade(method, checkpoint)
    else:
        raise IntaglioError(
            f"stock modules of sentence-transformers cannot compute vectors of {method.slug}; in Python,"
            " intaglio.load(MODEL).as_sentence_transformer() gives the encoder"
        )
    stock.write_files(directory)


def _splade(method: MistralSplade, checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose logits are those that `SpladePooling` reads."""
    _check_fields(method)
    model: Any = copy.deepcopy(checkpoint.model)
    head: Any = model.get_output_embeddings()
    _check_scaling(method, model.config)
    own: Any = method.modules()["splade"]
    rows_VD = head.weight
    if method.head == "embeddings":
        rows_VD = model.get_input_embeddings().weight
    factor_V = own.terms_V.to(rows_VD) * method.scale
    with torch.no_grad():
        head.weight = torch.nn.Parameter(rows_VD * factor_V[:, None])
        if getattr(head, "bias", None) is not None:
            head.bias = torch.nn.Parameter(head.bias * (0 if method.head == "embeddings" else factor_V))
    model.config.tie_word_embeddings = False
    causal = method._parts.causal
    if causal:
        _check_padding(model)
    stock = Checkpoint(model, checkpoint.tokenizer, checkpoint.source, companions=_companions(method, causal))
    stock.record.steps = list(checkpoint.record.steps)
    return stock


def _check_fields(method: MistralSplade) -> None:
    """Refuse what `SpladePooling` does not compute; pruning is an argument of its search."""
    for name, stock in (("merge_forms", "none"), ("threshold", None), ("query_expansion", True)):
        if getattr(method, name) != stock:
            raise IntaglioError(
                f"{name} is {getattr(method, name)!r}, which stock modules of sentence-transformers do not compute; in"
                " Python, intaglio.load(MODEL).as_sentence_transformer() gives the encoder"
            )


def _check_scaling(method: MistralSplade, config: Any) -> None:
    """Refuse heads after which logits are capped: a scale before the cap is another one."""
    cap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    if cap and (method.scale != 1 or method.head == "embeddings"):
        raise IntaglioError(
            f"the model caps its logits at {cap}, so logit_scale and head cannot be baked into its head"
        )


@torch.no_grad()
def _check_padding(model: Any) -> None:
    """Refuse a decoder whose states change with padding on the left, where sentence-transformers puts it."""
    ids = torch.tensor([[0, 1, 2, 3]], device=model.device)
    mask = torch.tensor([[0, 1, 1, 1]], device=model.device)
    padded: Tensor = model(input_ids=ids, attention_mask=mask).logits[:, 1:]
    plain: Tensor = model(input_ids=ids[:, 1:]).logits
    if not torch.allclose(padded.float(), plain.float(), rtol=1e-2, atol=1e-2 * float(plain.abs().max())):
        raise IntaglioError(
            f"the family {model.config.model_type!r} numbers positions from the start of a row, and"
            " sentence-transformers pads decoders on the left; in Python,"
            " intaglio.load(MODEL).as_sentence_transformer() gives the encoder"
        )


def _companions(method: MistralSplade, causal: bool) -> dict[str, bytes]:
    """Return the files of the modules."""
    transformer: dict[str, Any] = {
        "transformer_task": "text-generation" if causal else "fill-mask",
        "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
        "module_output_name": "token_embeddings",
        "query_length": method.length("query"),
        "document_length": method.length("document"),
    }
    if causal:
        transformer["processing_kwargs"] = {"text": {"logits_to_keep": 0}}  # of every token
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{SENTENCE_TRANSFORMERS}.Transformer"},
        {"idx": 1, "name": "1", "path": POOLING, "type": "sentence_transformers.sparse_encoder.models.SpladePooling"},
    ]
    pooling = {"pooling_strategy": method.pooling, "activation_function": "relu", "embedding_dimension": None}
    settings = {
        "model_type": "SparseEncoder",
        "prompts": {"query": method.query_prompt, "document": method.document_prompt},
        "similarity_fn_name": "dot",
    }
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": transformer,
        "config_sentence_transformers.json": settings,
        f"{POOLING}/config.json": pooling,
    }
    return {name: to_json(content).encode() for name, content in files.items()}
