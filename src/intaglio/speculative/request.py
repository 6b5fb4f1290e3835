"""What a call of `generate` asks for, checked: everything that the loop could not honour is refused in one sentence.

Dimension letters: B rows, P prompt tokens.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import CACHES
from intaglio.speculative.cache import check_cache, is_windowed, roomy

_KNOWN = frozenset({"attention_mask", "position_ids", *CACHES, "use_cache", "logits_to_keep"})


@dataclass(frozen=True, eq=False)
class Request:
    """One call of `generate`.

    Args:
        ids_BP: the prompts, padded in front.
        mask_BP: 1 at real tokens, or None.
        cache: what the target's rows go to.
        config: the merged generation config.
        processors: logits processors, called once for each token emitted.
        stops: token ids that end a row.
        criteria: other stopping criteria, called with a row [1, L] after each token.
        max_length: most tokens of a row, the prompt and its padding included.
        pad: token id behind rows that ended early.
        together: no stop token ends rows, so stock `generate` lets every row go on until the last one has met a
            criterion.
    """

    ids_BP: Tensor
    mask_BP: Tensor | None
    cache: DynamicCache
    config: Any
    processors: Any
    stops: frozenset[int]
    criteria: tuple[Any, ...]
    max_length: int
    pad: int
    together: bool

    @property
    def room(self) -> int:
        """Most new tokens of a row."""
        return self.max_length - self.ids_BP.shape[1]


def _dropped() -> dict[str, Any]:
    """Arguments of `generate` that it keeps from a custom decoder without a word, as far as they were given.

    An assistant would be ignored, and a streamer would never be ended, so that who reads it waits for ever. The only
    place where they can still be seen is the caller's own frame.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == "transformers.generation.utils":
            names = ("assistant_model", "streamer")
            return {name: frame.f_locals[name] for name in names if frame.f_locals.get(name) is not None}
        frame = frame.f_back
    return {}


def _check_mode(config: Any) -> None:
    dropped = _dropped()
    if "assistant_model" in dropped:
        raise IntaglioError(
            "an assistant_model was given beside a speculative decoder; give it to the decoder as its draft model"
        )
    if "streamer" in dropped:
        raise IntaglioError("a streamer was given to generate, which does not hand it on; give it to the decoder")
    if config.num_beams > 1:
        raise IntaglioError(
            f"num_beams is {config.num_beams}; speculative decoding follows one beam, so only 1 is accepted"
        )
    if config.prompt_lookup_num_tokens is not None:
        raise IntaglioError("prompt_lookup_num_tokens was given beside a speculative decoder; use one of the two")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise IntaglioError(f"generate was asked for {mode.value}; speculative decoding is greedy or samples")
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name):
            raise IntaglioError(f"{name} is True; a pass over a tree has no such output for a single token")
    if getattr(config, "prefill_chunk_size", None) is not None:
        raise IntaglioError(f"prefill_chunk_size is {config.prefill_chunk_size}; the prompt is read in one pass here")


def _cache(given: Any, rows: int, use_cache: Any) -> DynamicCache:
    """The cache to fill: the given one where its rows can be kept, else one of our own."""
    check_cache(None if use_cache is False else given)
    if rows > 1:
        if given.get_seq_length():
            raise IntaglioError(f"a cache that holds tokens was given with {rows} rows; it is accepted with one row")
        # Rows of unlike lengths leave holes, which a cache of the window cannot have, and nobody else could read.
        return roomy()
    if not (is_windowed(given) or getattr(given, "_is_user_defined", False)):
        return roomy()
    if is_windowed(given) and any(
        layer.is_initialized and layer.record_past for layer in given.layers if layer.is_sliding
    ):
        raise IntaglioError(
            "the windowed cache is already recording; give an empty one or one that a generate call left"
        )
    return given


def _context(model: Any) -> int | None:
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if found is None else int(found)


def read_request(
    model: Any, input_ids: Tensor, processors: Any, criteria: Any, config: Any, given: dict[str, Any]
) -> Request:
    """Check a call of `generate` and sort its arguments.

    Args:
        model: the target.
        input_ids: the prompts [B, P].
        processors: `logits_processor`.
        criteria: `stopping_criteria`.
        config: `generation_config`.
        given: every other model argument that `generate` prepared.

    Raises:
        IntaglioError: beams, an assistant or a streamer given to `generate`, another kind of cache, arguments that
            cannot be handed on, or more tokens than the context holds.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise IntaglioError(f"{model.config.model_type} is an encoder-decoder; speculative decoding needs a decoder")
    _check_mode(config)
    for name, value in given.items():
        if name not in _KNOWN and value is not None:
            raise IntaglioError(f"generate was given {name}, which speculative decoding does not hand on to the model")
    rows, length = input_ids.shape
    cache = _cache(next((given[name] for name in CACHES if name in given), None), rows, given.get("use_cache"))
    stops: set[int] = set()
    limits, others = [int(config.max_length)], []
    for criterion in criteria:
        if type(criterion) is EosTokenCriteria:
            stops.update(int(token) for token in criterion.eos_token_id.reshape(-1).tolist())
        elif type(criterion) is MaxLengthCriteria:
            limits.append(int(criterion.max_length))
        else:
            others.append(criterion)
    context = _context(model)
    if context is not None and min(limits) > context:
        raise IntaglioError(
            f"a prompt of {length} tokens and {min(limits) - length} new ones need more than the model's context of "
            f"{context}"
        )
    pad = getattr(config, "_pad_token_tensor", None)
    return Request(
        ids_BP=input_ids.to(model.device),
        mask_BP=None if given.get("attention_mask") is None else given["attention_mask"].to(model.device),
        cache=cache,
        config=config,
        processors=processors,
        stops=frozenset(stops),
        criteria=tuple(others),
        max_length=min(limits),
        pad=0 if pad is None else int(pad),
        together=rows > 1 and not stops and bool(others),
    )
