"""What the loop cannot honour is refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache, T5Config, T5ForConditionalGeneration, TextStreamer
from transformers.cache_utils import LinearAttentionLayer, QuantizedCache

from intaglio.errors import IntaglioError
from intaglio.masks import Bidirectional, clear_visibility, set_visibility
from intaglio.modeling.anatomy import CACHE
from intaglio.speculative import DecodingRun, Speculative, Step, TokenTree, TreePass, chain, root_only
from intaglio.speculative.drafters import DraftModel, NGramStore, PromptLookup
from intaglio.speculative.target_model import CachedModel
from tests.families import tiny_model, tiny_tokenizer
from tests.speculative.toys import Made, nothing, prompt, ragged, target


def run(model: Any, drafter: Any = None, **options: Any) -> Any:
    options = {"input_ids": prompt(5), "max_new_tokens": 4, "do_sample": False, **options}
    return model.generate(custom_generate=Speculative(drafter or nothing()), **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_beams": 2}, "num_beams is 2"),
        ({"use_cache": False}, "use_cache is False"),
        ({"cache_implementation": "static"}, "a StaticCache was given"),
        ({"cache_implementation": "offloaded"}, "the cache is offloaded"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens was given"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions is True"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states is True"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size is 2"),
        ({"max_new_tokens": 200}, "more than the model's context of 128"),
        ({"output_router_logits": True}, "output_router_logits"),
    ],
)
def test_options_of_generate(options: dict[str, Any], sentence: str) -> None:
    if "output_router_logits" in options:  # as any argument that generate would hand on to the model
        model = target("llama")
        decoder = Speculative(nothing())
        with pytest.raises(IntaglioError, match=sentence):
            decoder(model, prompt(3), [], [], _prepared(model), **{CACHE: DynamicCache()}, **options)
        return
    with pytest.raises(IntaglioError, match=sentence):
        run(target("gemma3"), **options)


def _prepared(model: Any) -> Any:
    config = model.generation_config
    config = type(config)(**{**config.to_dict(), "max_length": 8, "num_beams": 1, "do_sample": False})
    config.return_dict_in_generate = False
    return config


def test_an_assistant_or_a_streamer_given_to_generate_is_not_dropped_silently() -> None:
    model = target("llama")
    with pytest.raises(IntaglioError, match="an assistant_model was given"):
        run(model, assistant_model=tiny_model("llama", layers=1, dtype=torch.float64))
    with pytest.raises(IntaglioError, match="give it to the decoder"):
        run(model, streamer=TextStreamer(tiny_tokenizer("llama")))


def test_caches_whose_rows_cannot_be_kept() -> None:
    model = target("mistral_window")
    with pytest.raises(IntaglioError, match="a StaticCache was given"):
        run(model, **{CACHE: StaticCache(config=model.config, max_cache_len=20)})
    quantized = QuantizedCache.__new__(QuantizedCache)
    with pytest.raises(IntaglioError, match="a QuantizedCache was given"):
        CachedModel(model, quantized)
    hybrid = DynamicCache()
    hybrid.layers = [LinearAttentionLayer()]
    with pytest.raises(IntaglioError, match="the cache holds a LinearAttentionLayer"):
        CachedModel(model, hybrid)
    used = DynamicCache()
    model.generate(**ragged([3, 5]), **{CACHE: used}, do_sample=False, max_new_tokens=2, eos_token_id=None)
    inputs = ragged([6, 8])
    with pytest.raises(IntaglioError, match="a cache that holds tokens was given with 2 rows"):
        run(model, **{CACHE: used}, **inputs)
    recording = DynamicCache(config=model.config)
    run(model, **{CACHE: recording})
    recording.activate_past_recording()
    with pytest.raises(IntaglioError, match="already recording"):
        run(model, **{CACHE: recording}, input_ids=prompt(12))


def test_models_that_are_no_decoder_or_take_no_mask() -> None:
    with pytest.raises(IntaglioError, match="no causal language model"):
        CachedModel(tiny_model("bert"))
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(IntaglioError, match="encoder-decoder"):
        run(T5ForConditionalGeneration(config).eval(), input_ids=torch.tensor([[3, 4]]))
    model = tiny_model("llama", layers=1)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(IntaglioError, match="'flash_attention_2', which takes no tree mask"):
        CachedModel(model)
    ruled = tiny_model("llama", layers=1)
    set_visibility(ruled, Bidirectional())
    with pytest.raises(IntaglioError, match="visibility rules"):
        CachedModel(ruled)
    clear_visibility(ruled)
    CachedModel(ruled)
    other = tiny_model("qwen3", layers=1)
    other.config.layer_types = ["linear_attention"]
    with pytest.raises(IntaglioError, match="'linear_attention'"):
        CachedModel(other)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda row, ids, new, room: root_only((ids[-1] + 1) % 160), "Made proposed a tree with the root"),
        (lambda row, ids, new, room: chain(ids[-1], [160]), "Made proposed the token 160"),
        (lambda row, ids, new, room: TokenTree([], []), "no nodes"),
        (lambda row, ids, new, room: TokenTree([ids[-1], 4], [-1, 1]), "parents come before their children"),
    ],
)
def test_trees_that_do_not_fit(make: Any, sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence):
        run(target("llama"), Made(make))


class _Session:
    """Drafts nothing; in the target's pass it leaves one slot too many."""

    def __init__(self, trees: int) -> None:
        self.trees, self.last = trees, 0

    def propose(self, rows: Any, room: Any) -> list[TokenTree]:
        return [root_only(self.last)] * self.trees

    def observe(self, steps: list[Step]) -> None:
        self.last = steps[0].tokens[-1]

    def forward(self, call: TreePass) -> torch.Tensor:
        call.cached.forward(call.inputs)
        return call.cached.forward(call.inputs)


class _Drafter:
    needs_hidden = False

    def __init__(self, trees: int) -> None:
        self.trees = trees

    def start(self, run: DecodingRun) -> _Session:
        return _Session(self.trees)


def test_sessions_that_break_the_contract() -> None:
    with pytest.raises(IntaglioError, match="_Drafter proposed 2 trees for 1 rows"):
        run(target("llama"), _Drafter(2))
    with pytest.raises(IntaglioError, match="leaves the trees' nodes in it and nothing else"):
        run(target("llama"), _Drafter(1))


def test_a_streamer_or_scores_for_several_rows() -> None:
    inputs = ragged([3, 5])
    decoder = Speculative(nothing(), streamer=TextStreamer(tiny_tokenizer("llama")))
    with pytest.raises(IntaglioError, match="a streamer was given with 2 rows"):
        target("llama").generate(**inputs, custom_generate=decoder, max_new_tokens=3)
    with pytest.raises(IntaglioError, match="output_scores or output_logits is set with 2 rows"):
        run(target("llama"), return_dict_in_generate=True, output_scores=True, **inputs)


def test_drafters_that_do_not_fit() -> None:
    model = target("llama")
    with pytest.raises(IntaglioError, match="knows 150 token ids and the target 160"):
        run(model, DraftModel(tiny_model("llama", layers=1, vocab_size=150)))
    with pytest.raises(IntaglioError, match="the draft model's context is 8 tokens; this run may need 9"):
        run(model, DraftModel(tiny_model("llama", layers=1, max_position_embeddings=8)))
    with pytest.raises(IntaglioError, match="counted over 150 token ids; the target has 160"):
        run(model, NGramStore.build([[1, 2, 3]], 150))
    for settings in ({"nodes": 0}, {"longest": 0}, {"length": 0}, {"candidates": 0}):
        with pytest.raises(IntaglioError, match="is 0; it must be at least 1"):
            PromptLookup(**settings)
    for widths, sentence in (((), "the number of widths is 0"), ((2, 0), "a width is 0")):
        with pytest.raises(IntaglioError, match=sentence):
            DraftModel(model, widths)
    with pytest.raises(IntaglioError, match=r"confidence is 1.5"):
        DraftModel(model, confidence=1.5)
    with pytest.raises(IntaglioError, match=r"temperature is 0.0"):
        DraftModel(model, temperature=0.0)


def test_a_draft_model_with_nan_logits() -> None:
    broken = tiny_model("llama", layers=1)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    for sampling in (False, True):
        with pytest.raises(IntaglioError, match="logits are NaN or infinite"):
            run(target("llama"), DraftModel(broken), do_sample=sampling)
