"""Arguments of a `generate` call, checked: every option that the loop cannot honour is refused in one sentence.

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
from intaglio.speculative._utils import context_length
from intaglio.speculative.cache import check_cache, is_windowed, other_layer, preallocated_cache

_KNOWN = frozenset({"attention_mask", "position_ids", *CACHES, "use_cache", "logits_to_keep"})


@dataclass(frozen=True, eq=False)
class Request:
    """One call of `generate`.

    Args:
        ids_BP: prompts, padded on the left.
        mask_BP: 1 at real tokens, or None.
        cache: cache of the target, to read trees with.
        given: the cache that `generate` made or got, to read chains with.
        config: the merged generation config.
        processors: logits processors, called once per emitted token.
        stops: token ids that end a row.
        criteria: other stopping criteria, called with a row [1, L] after each token.
        max_length: most tokens of a row, the prompt and its padding included.
        pad: token id after the end of rows that ended early.
        together: no stop token ends rows, so stock `generate` lets every row go on until the last one has met a
            criterion.
    """

    ids_BP: Tensor
    mask_BP: Tensor | None
    cache: DynamicCache
    given: DynamicCache
    config: Any
    processors: Any
    stops: frozenset[int]
    criteria: tuple[Any, ...]
    max_length: int
    pad: int
    together: bool

    @property
    def keeps_cache(self) -> bool:
        """Whether the cache outlives the call: the user's own, or part of the output object."""
        return bool(self.config.return_dict_in_generate or getattr(self.cache, "_is_user_defined", False))

    @property
    def room(self) -> int:
        """Most new tokens of a row."""
        return self.max_length - self.ids_BP.shape[1]


def _dropped() -> dict[str, Any]:
    """Return the given arguments of `generate` that it silently keeps from a custom decoder.

    An assistant would be ignored, and a streamer would never end, so that its cached waits for ever. They can be seen
    only in the caller's own frame.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == "transformers.generation.utils":
            names = ("assistant_model", "streamer")
            return {name: frame.f_locals[name] for name in names if frame.f_locals.get(name) is not None}
        frame = frame.f_back
    return {}


def _check_mode(config: Any, rows: int) -> None:
    dropped = _dropped()
    if "assistant_model" in dropped:
        raise IntaglioError(
            "an assistant_model was given beside a speculative decoder; give it to the decoder as its draft model"
        )
    if "streamer" in dropped:
        raise IntaglioError("a streamer was given to generate, which does not pass it on; give it to the decoder")
    if config.num_beams > 1:
        raise IntaglioError(
            f"num_beams is {config.num_beams}; speculative decoding follows one beam, so only 1 is accepted"
        )
    if config.prompt_lookup_num_tokens is not None:
        raise IntaglioError("prompt_lookup_num_tokens was given beside a speculative decoder; use one of the two")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise IntaglioError(f"the generation mode is {mode.value}; speculative decoding is greedy or samples")
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name):
            raise IntaglioError(f"{name} is True; a pass over a tree has no such output for a single token")
    if rows > 1 and config.return_dict_in_generate and (config.output_scores or config.output_logits):
        raise IntaglioError(
            f"output_scores or output_logits is set with {rows} rows, which end after different numbers of passes; it "
            "is accepted with one row"
        )
    if getattr(config, "prefill_chunk_size", None) is not None:
        raise IntaglioError(f"prefill_chunk_size is {config.prefill_chunk_size}; the prompt is read in one pass here")


def _cache(given: Any, rows: int, use_cache: Any) -> DynamicCache:
    """Return the cache to fill with trees: the given one if that is windowed or the user's, else a new one."""
    check_cache(None if use_cache is False else given)
    if other_layer(given) is not None:
        return given
    if rows > 1:
        if given.get_seq_length():
            raise IntaglioError(f"a cache that holds tokens was given with {rows} rows; it is accepted with one row")
        # Rows of different lengths leave holes, which a windowed cache cannot have and no other code could read.
        return preallocated_cache()
    if not (is_windowed(given) or getattr(given, "_is_user_defined", False)):
        return preallocated_cache()
    if is_windowed(given) and any(
        layer.is_initialized and layer.record_past for layer in given.layers if getattr(layer, "is_sliding", False)
    ):
        raise IntaglioError(
            "the windowed cache is already recording; give an empty one or one that a generate call left"
        )
    return given


def read_request(
    model: Any, input_ids: Tensor, processors: Any, criteria: Any, config: Any, given: dict[str, Any]
) -> Request:
    """Check a call of `generate` and sort its arguments; `given` holds the other model arguments that it prepared.

    Raises:
        IntaglioError: beams, an assistant or a streamer given to `generate`, another kind of cache, arguments that
            cannot be passed on, or more tokens than the context holds.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise IntaglioError(f"{model.config.model_type} is an encoder-decoder; speculative decoding needs a decoder")
    _check_mode(config, len(input_ids))
    for name, value in given.items():
        if name not in _KNOWN and value is not None and value != {}:
            raise IntaglioError(f"generate was given {name}, which speculative decoding does not pass on to the model")
    rows, length = input_ids.shape
    own = next((given[name] for name in CACHES if name in given), None)
    cache = _cache(own, rows, given.get("use_cache"))
    stops: set[int] = set()
    limits, others = [int(config.max_length)], []
    for criterion in criteria:
        if type(criterion) is EosTokenCriteria:
            stops.update(int(token) for token in criterion.eos_token_id.reshape(-1).tolist())
        elif type(criterion) is MaxLengthCriteria:
            limits.append(int(criterion.max_length))
        else:
            others.append(criterion)
    context = context_length(model)
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
        given=own,
        config=config,
        processors=processors,
        stops=frozenset(stops),
        criteria=tuple(others),
        max_length=min(limits),
        pad=0 if pad is None else int(pad),
        together=rows > 1 and not stops and bool(others),
    )
