"""Causal2vec: a Contextual token in front of an unmodified decoder; each line of what makes it faithful."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import processors
from torch import Tensor
from transformers import RobertaConfig, RobertaForMaskedLM

from intaglio.checkpoint import Checkpoint, load
from intaglio.errors import IntaglioError
from intaglio.evidence.baselines.late_concatenation import LateConcatenation
from intaglio.methods.retrieval.causal2vec import GROUP_TOKENS, SLOT, Causal2Vec, LightEncoder
from intaglio.trainer import train
from intaglio.trainer.contrastive import Contrastive
from intaglio.trainer.protocols import ModifierSession, TrainingRun
from intaglio.trainer.text_batches import side, text_batch
from tests.alive import alive
from tests.families import DECODERS, tiny_checkpoint_dir, tiny_tokenizer
from tests.trainer.helpers import PAIRS, TEXTS, checkpoint, run, same, weights
from tests.trainer.test_encoder_training import BASE_DEFAULTS, batch_of

_FOLDER = tempfile.TemporaryDirectory()
LIGHT, OTHER = (str(tiny_checkpoint_dir("bert", f"{_FOLDER.name}/{n}", layers=1, seed=n)) for n in (0, 1))
EXAMPLES = (
    {"light_encoder": LIGHT},
    {
        "light_encoder": LIGHT,
        "pooling": "mean",
        "ctx_position": "after_instruction",
        "instruction": "find it",
        "encoder_trained": False,
        "output_size": 8,
    },
)
ALIVE = {
    "variant": "bidirectional",
    "loss_type": "margin_mse",
    "temperature": 2.0,
    "teacher_temperature": alive(2.0, loss_type="distillation"),
    "num_negatives": 1,
    "chunk_size": "test_chunks_are_made",
    "query_length": 4,
    "document_length": 5,
    "query_prompt": "q: ",
    "document_prompt": "d: ",
    "normalize": False,
    "symmetric": True,
    "matryoshka": [8],
    "matryoshka_weights": alive([0.5], matryoshka=[8]),
    "matryoshka_per_step": alive(1, matryoshka=[8, 4]),
    "light_encoder": OTHER,
    "pooling": "ctx",
    "ctx_position": alive("after_instruction", query_prompt="q: "),
    "activation": "relu",
    "initial_norm": 2.0,
    "encoder_trained": False,
    "encoder_lr_ratio": 0.5,
    "projector_lr_ratio": 0.5,
    "encoder_reads": alive("whole", document_length=6),
    "encoder_instruction": alive(True, instruction="find it"),
    "instruction": "find it",
    "normalize_halves": True,
    "output_size": 8,
}
FEW = TEXTS[:3]
EOS = 2


def method(**fields: Any) -> Causal2Vec:
    return Causal2Vec(**{"light_encoder": LIGHT, **fields})


def ready(family: str = "llama", **fields: Any) -> tuple[Causal2Vec, Checkpoint]:
    ckpt = checkpoint(family, layers=2)
    return method(**fields).setup(ckpt), ckpt


def inputs_of(own: Causal2Vec, texts: Any = FEW, name: str = "document") -> dict[str, Tensor]:
    return text_batch([own.read(text, name) for text in texts])


def with_begin(ckpt: Checkpoint) -> Checkpoint:
    """Let a decoder's tokenizer put <s> before every text."""
    ckpt.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return ckpt


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_causality_is_kept_and_the_future_comes_through_the_token(family: str) -> None:
    """H at position t is unchanged when token t+1.. changes IF c is held fixed; and changes when c is recomputed."""
    own, _ = ready(family)
    inputs = inputs_of(own, ["the lazy A", "the lazy B"])
    c = own.context(inputs)[:1].expand(2, -1)
    fixed, slot = own.states(inputs, "document", c)
    changed = int((inputs["input_ids"][0] != inputs["input_ids"][1]).nonzero()[0])
    assert slot is not None
    assert slot.tolist() == [0, 0]
    assert torch.allclose(fixed[0, :changed], fixed[1, :changed], atol=1e-5)
    assert not torch.allclose(fixed[0, changed], fixed[1, changed], atol=1e-3)
    recomputed, _ = own.states(inputs, "document")
    assert not torch.allclose(recomputed[0, 1:changed], recomputed[1, 1:changed], atol=1e-4)


@torch.no_grad()
def test_the_state_of_the_token_does_not_depend_on_the_decoders_tokens() -> None:
    """H[0] does not depend on the LLM tokens: with c fixed, two different texts give identical H[0]."""
    own, _ = ready()
    c = own.context(inputs_of(own))[:1].expand(3, -1)
    hidden, _ = own.states(inputs_of(own, ["the fox", "a dog sleeps", "sun"]), "document", c)
    assert torch.allclose(hidden[:, 0], hidden[:1, 0].expand(3, -1), atol=1e-6)


@torch.no_grad()
def test_a_constant_token_is_a_soft_prompt() -> None:
    """With c constant the model equals ordinary prompt-tuned last-token pooling with a one-token soft prompt."""
    own, ckpt = ready(pooling="eos")
    prompt = torch.linspace(-1, 1, 32)
    projector: Any = own.modules()["projector"]
    projector.out.weight.zero_()
    projector.out.bias.copy_(prompt)
    for text, vector in zip(FEW, own.embed(ckpt.model, inputs_of(own), "document"), strict=True):
        ids = torch.tensor([[*ckpt.tokenizer(text)["input_ids"], EOS]])
        embeds = torch.cat([prompt[None, None], ckpt.model.get_input_embeddings()(ids)], 1)
        last = ckpt.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1][0, -1]
        assert torch.allclose(vector, F.normalize(last, dim=-1), atol=1e-5)


@torch.no_grad()
def test_without_the_token_it_is_last_token_pooling() -> None:
    """With the slot removed and pooling=eos it equals plain last-token embedding exactly; masked, to 1e-5 (RoPE)."""
    own, ckpt = ready(ctx_position="none", pooling="eos")
    vectors = own.encode(ckpt, FEW, "document")
    plain = Contrastive(pooling="last").setup(ckpt)
    assert torch.allclose(vectors, plain.encode(ckpt, [f"{text}</s>" for text in FEW], "document"), atol=1e-6)
    assert not own.modules()
    assert own.lr_ratios == {}
    other, _ = ready()
    inputs = inputs_of(other, FEW[:1])
    mask = inputs["attention_mask"].clone()
    mask[0, 0] = 0
    embeds = ckpt.model.get_input_embeddings()(inputs["input_ids"])
    output = ckpt.model(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True)
    assert torch.allclose(F.normalize(output.hidden_states[-1][0, -1], dim=-1), vectors[0], atol=1e-5)


@torch.no_grad()
def test_vectors_join_both_states() -> None:
    """Output shape [B, 2d]; norm 1; first half equals ctx-only pooling before the joint normalisation."""
    own, ckpt = ready()
    inputs = inputs_of(own)
    hidden, _ = own.states(inputs, "document")
    last = inputs["attention_mask"].sum(1) - 1
    ctx, eos = hidden[:, 0], hidden[torch.arange(3), last]
    assert inputs["input_ids"][torch.arange(3), last].tolist() == [EOS] * 3
    vectors = own.embed(ckpt.model, inputs, "document")
    assert vectors.shape == (3, 64)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3))
    assert torch.allclose(vectors, F.normalize(torch.cat([ctx, eos], 1), dim=1), atol=1e-6)
    text = hidden[0, 1 : last[0]].mean(0)
    unit = {"ctx": ctx[0], "eos": eos[0], "mean": text}
    for pooling, expected in unit.items():
        other, _ = ready(pooling=pooling)
        vector = other.embed(ckpt.model, inputs, "document")[0]
        assert torch.allclose(vector, F.normalize(expected, dim=0), atol=1e-5)
    halves, _ = ready(normalize_halves=True)
    expected = torch.cat([F.normalize(ctx, dim=1), F.normalize(eos, dim=1)], 1) / 2**0.5
    assert torch.allclose(halves.embed(ckpt.model, inputs, "document"), expected, atol=1e-6)


@torch.no_grad()
def test_the_output_layer_begins_as_a_projection_onto_orthogonal_directions() -> None:
    own, ckpt = ready(output_size=8)
    rows = own.modules()["output"].weight
    assert torch.allclose(rows @ rows.T, torch.eye(8), atol=1e-5)
    whole, _ = ready(normalize=False)
    vectors = whole.embed(ckpt.model, inputs_of(own), "document")
    assert torch.allclose(own.embed(ckpt.model, inputs_of(own), "document"), F.normalize(vectors @ rows.T), atol=1e-5)
    assert (own.dimensions(ckpt), whole.dimensions(ckpt)) == (8, 64)


@pytest.mark.parametrize(
    ("family", "position"), [("llama", "first"), ("gpt2", "after_bos"), ("llama", "after_instruction")]
)
@torch.no_grad()
def test_padding_on_either_side_gives_the_same_vectors(family: str, position: Any) -> None:
    """Right- and left-padded batches give the same embedding (mask includes the slot; position_ids from the mask)."""
    ckpt = with_begin(checkpoint(family, layers=1))
    own = method(ctx_position=position, query_prompt="q: ").setup(ckpt)
    inputs = inputs_of(own, ["a dog", TEXTS[0]], "query")
    shift = int((1 - inputs["attention_mask"][0]).sum())
    left = {name: value.clone() for name, value in inputs.items()}
    for name in ("input_ids", "attention_mask", "pool_mask"):
        left[name][0] = inputs[name][0].roll(shift)
    assert shift > 0
    vectors = (own.embed(ckpt.model, batch, "query") for batch in (inputs, left))
    assert torch.allclose(*vectors, atol=1e-5)


@pytest.mark.parametrize("pooling", ["ctx", "eos"])
def test_both_halves_train_encoder_and_projector(pooling: Any) -> None:
    """Loss from the ctx half alone reaches B and g; from the eos half alone also, and vanishes if slot is masked."""
    own, ckpt = ready(pooling=pooling)
    inputs = inputs_of(own)
    for masked in (False, True) if pooling == "eos" else (False,):
        own.modules().zero_grad()
        if masked:
            c = own.context(inputs)
            embeds = torch.cat([c[:, None], own._parts.embedding(inputs["input_ids"][:, 1:])], 1)
            mask = inputs["attention_mask"].clone()
            mask[:, 0] = 0
            output = ckpt.model(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True)
            output.hidden_states[-1][:, 1:].sum().backward()
        else:
            own.embed(ckpt.model, inputs, "document")[:, 0].sum().backward()
        own_modules = own.modules()
        for part in (own_modules["light_encoder"], own_modules["projector"]):
            largest = max(float(p.grad.abs().max()) for p in part.parameters() if p.grad is not None)
            assert largest < 1e-9 if masked else largest > 1e-6


@pytest.mark.parametrize("family", DECODERS)
def test_a_zero_token_is_safe(family: str) -> None:
    """Zero-init of W2,b2 gives c = 0: finite output, no NaN (RMSNorm of the zero vector is safe)."""
    own, ckpt = ready(family, initial_norm=0.0)
    loss = own.loss(ckpt.model, batch_of(own, ckpt))
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert float(loss.parts["context_norm"]) == 0
    assert all(bool(p.grad.isfinite().all()) for p in own.modules().parameters() if p.grad is not None)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_the_token_begins_at_the_norm_of_embeddings(family: str) -> None:
    """Match the mean embedding norm at init (scale W2) and log it; Gemma scales its embeddings."""
    own, ckpt = ready(family)
    mean = own._parts.embedding(torch.arange(160)).norm(dim=1).mean()
    assert 0.7 < float(own.context(inputs_of(own, TEXTS)).norm(dim=1).mean() / mean) < 1.4
    parts = own.loss(ckpt.model, batch_of(own, ckpt)).parts
    documents = side(batch_of(own, ckpt), "document")
    assert float(parts["context_norm"]) == pytest.approx(float(own.context(documents).norm(dim=1).mean() / mean))
    twice, _ = ready(family, initial_norm=2.0)
    assert torch.allclose(twice.context(inputs_of(own)), 2 * own.context(inputs_of(own)), atol=1e-5)


def test_the_context_token_is_the_projected_mean_of_the_encoder() -> None:
    """z = meanpool(B(x)), c = W2 act(W1 z + b1) + b2; act GELU or ReLU."""
    for name, act in (("gelu", F.gelu), ("relu", F.relu)):
        own, _ = ready(activation=name)
        light, projector = load(LIGHT), own.modules()["projector"]
        ids = torch.tensor([light.tokenizer(TEXTS[0])["input_ids"]])
        z = light.model.base_model(ids).last_hidden_state[0].mean(0)
        c = projector.out(act(projector.into(z)))
        assert torch.allclose(own.context(inputs_of(own, TEXTS[:1]))[0], c, atol=1e-5)


@torch.no_grad()
def test_the_light_encoder_reads_texts_of_like_length_together() -> None:
    own, _ = ready()
    light = own._light.eval()
    inputs = inputs_of(own, [TEXTS[0] if n % 3 == 0 else "the fox" for n in range(30)])
    ids, mask = inputs["light_input_ids"], inputs["light_attention_mask"]
    shapes: list[torch.Size] = []
    light.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    grouped = light(ids, mask)
    assert sum(shape.numel() for shape in shapes) < int(mask.sum()) + GROUP_TOKENS < ids.numel()
    assert torch.allclose(grouped, light._mean(ids, mask), atol=1e-6)


def test_the_decoder_reads_one_position_more_than_the_text() -> None:
    """FLOPs: sequence length is L+1, independent of B's length."""
    own, ckpt = ready(encoder_reads="whole", document_length=6)
    lengths = []
    own._parts.base.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    own.encode(ckpt, TEXTS[:1], "document")
    assert lengths == [7]


def test_a_cut_text_keeps_its_end_token_and_the_encoder_sees_no_more() -> None:
    """Two tokenizers: truncate consistently; tokenizers that do not append EOS: add it, truncation keeps it."""
    own, ckpt = ready(document_length=6)
    read = own.read(TEXTS[0], "document")
    assert read.ids[-1] == EOS
    assert (len(read.ids), read.start, read.stop) == (7, 1, 6)
    light = own.modules()["light_encoder"]
    seen = ckpt.tokenizer.decode(read.ids[1:6])
    assert TEXTS[0].startswith(seen)
    assert read.further == (("light", light.ids(seen)),)  # type: ignore[operator]
    whole, _ = ready(document_length=6, encoder_reads="whole")
    assert whole.read(TEXTS[0], "document").further == (("light", light.ids(TEXTS[0])),)  # type: ignore[operator]
    assert own.count_tokens(TEXTS[0], "document") == len(ckpt.tokenizer(TEXTS[0])["input_ids"]) + 1


def test_the_light_encoder_reads_no_more_than_its_tokenizer_allows() -> None:
    light = load(LIGHT)
    light.tokenizer.model_max_length = 7
    assert len(LightEncoder(light.model.base_model, light.tokenizer, True).ids(TEXTS[0])) == 7


@torch.no_grad()
def test_a_half_precision_decoder_reads_the_float32_token() -> None:
    ckpt = checkpoint(layers=1)
    ckpt.model.bfloat16()
    assert method().encode(ckpt, FEW, "document").isfinite().all()


def test_own_modules_are_drawn_from_the_seed() -> None:
    ckpt = checkpoint(layers=1)
    one, other = (method(output_size=8).setup(ckpt, seed).modules() for seed in (0, 1))
    for name in ("projector.into", "output"):
        assert not torch.equal(one.get_parameter(f"{name}.weight"), other.get_parameter(f"{name}.weight"))


@torch.no_grad()
def test_a_light_roberta_reads_its_whole_context(tmp_path: Path) -> None:
    """Two tokenizers: truncate consistently. Positions of RoBERTa begin after its padding id."""
    sizes: dict[str, Any] = {"vocab_size": 160, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**sizes, intermediate_size=32, max_position_embeddings=20, pad_token_id=1)
    RobertaForMaskedLM(config).save_pretrained(tmp_path)
    tiny_tokenizer("bert").save_pretrained(tmp_path)
    own, ckpt = ready(light_encoder=str(tmp_path), encoder_reads="whole")
    assert load(tmp_path).context == 18
    assert len(own.read(TEXTS[0], "document").further[0][1]) == 18
    assert own.encode(ckpt, TEXTS[:1], "document").isfinite().all()


@pytest.mark.parametrize(("position", "place"), [("first", 0), ("after_bos", 1), ("after_instruction", -1)])
def test_places_of_the_token(position: Any, place: int) -> None:
    """`ctx_position` in {first, after_bos, after_instruction}; BOS stays, before or after c."""
    ckpt = with_begin(checkpoint(layers=1))
    own = method(ctx_position=position, instruction="find it").setup(ckpt)
    prompt = ckpt.tokenizer("Instruct: find it\nQuery: ", add_special_tokens=False)["input_ids"]
    before = [1, *prompt]
    slot = len(before) if place < 0 else place
    read = own.read("a dog", "query")
    body = ckpt.tokenizer("a dog", add_special_tokens=False)["input_ids"]
    assert read.ids == [*before[:slot], SLOT, *before[slot:], *body, EOS]
    _, places = own.states(inputs_of(own, ["a dog"], "query"), "query")
    assert places is not None
    assert places.tolist() == [slot]
    assert own.read("a dog", "document").ids[:3] == ([SLOT, 1, body[0]] if place == 0 else [1, SLOT, body[0]])


def test_the_instruction_is_for_queries_and_the_encoder_reads_it_on_request() -> None:
    """Instruction template (queries only); whether B also sees the instruction: an option, default text only."""
    own, _ = ready(instruction="find it")
    shown, _ = ready(instruction="find it", encoder_instruction=True)
    light = own.modules()["light_encoder"]
    prompt = "Instruct: find it\nQuery: "
    assert own.read("a dog", "query").further[0][1] == light.ids("a dog")  # type: ignore[operator]
    assert shown.read("a dog", "query").further[0][1] == light.ids(f"{prompt}a dog")  # type: ignore[operator]
    assert shown.read("a dog", "document").further[0][1] == light.ids("a dog")  # type: ignore[operator]


class Rates(ModifierSession):
    """Notes the learning rates of an optimizer's groups."""

    def __init__(self, run: TrainingRun, rates: dict[int, float]) -> None:
        self.run, self.rates = run, rates

    def attach(self, run: TrainingRun) -> Rates:
        return Rates(run, self.rates)

    def before_step(self, step: int, batch: Any) -> None:
        assert self.run.optimizer is not None
        for group in self.run.optimizer.param_groups:
            self.rates |= {id(parameter): group["lr"] for parameter in group["params"]}


def test_parts_have_learning_rates_of_their_own() -> None:
    """Separate parameter groups for B, g, LoRA."""
    own, ckpt = ready(encoder_lr_ratio=0.1, projector_lr_ratio=0.5)
    rates: dict[int, float] = {}
    watch = Rates(None, rates)  # type: ignore[arg-type]
    run(ckpt, PAIRS, objective=own, steps=1, warmup=0, learning_rate=1e-3, modifiers=[watch], lora={"r": 2})
    modules = own.modules()
    for name, rate in (("light_encoder", 1e-4), ("projector", 5e-4)):
        assert [rates.pop(id(p)) for p in modules[name].parameters()] == [
            pytest.approx(rate) for _ in modules[name].parameters()
        ]
    assert set(rates.values()) == {1e-3}


def test_a_frozen_decoder_is_the_base_model_and_a_frozen_encoder_has_no_dropout() -> None:
    """KV-cache/generation still works with the base model: weights equal base when LoRA is off."""
    own, ckpt = ready(encoder_trained=False)
    before = weights(ckpt)
    light = {name: value.clone() for name, value in own.modules()["light_encoder"].state_dict().items()}
    projector = own.modules()["projector"].into.weight.clone()
    own.modules().train()
    assert not any(module.training for module in own.modules()["light_encoder"].modules())
    run(ckpt, PAIRS, objective=own, freeze=True)
    assert same(weights(ckpt), before)
    assert all(torch.equal(value, light[name]) for name, value in own.modules()["light_encoder"].state_dict().items())
    assert not torch.equal(own.modules()["projector"].into.weight, projector)


def test_the_trained_folder_contains_the_encoder(tmp_path: Path) -> None:
    light = shutil.copytree(LIGHT, tmp_path / "light")
    ckpt = checkpoint(layers=1)
    own = Causal2Vec(light_encoder=str(light))
    run(ckpt, PAIRS, objective=own, steps=2)
    expected = own.encode(ckpt, FEW, "query")
    ckpt.save(tmp_path / "out")
    shutil.rmtree(light)
    back = load(tmp_path / "out")
    state = torch.random.get_rng_state()
    assert torch.equal(back.encoder().encode(back, FEW, "query"), expected)
    assert torch.equal(torch.random.get_rng_state(), state)
    for trained in (True, False):
        light_encoder = back.encoder(encoder_trained=trained).modules()["light_encoder"]
        assert all(parameter.requires_grad == trained for parameter in light_encoder.parameters())
    with pytest.raises(IntaglioError, match=r"light_encoder is 'minilm', and the encoder was trained with '.*light'"):
        back.encoder(light_encoder="minilm")
    with pytest.raises(IntaglioError, match=r"was trained without output\.weight; leave out fields that"):
        back.encoder(output_size=8)


def test_chunks_are_made() -> None:
    own, ckpt = ready(chunk_size=3)
    batch, rows = batch_of(own, ckpt), []
    own._parts.base.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    own.loss(ckpt.model, batch)
    assert rows == [3, 1, 3, 3, 3, 3]


@torch.no_grad()
def test_late_concatenation_adds_no_token() -> None:
    """B||F late concatenation: embedding of B concatenated with last-token of F, no injected token."""
    ckpt = checkpoint(layers=1)
    late = LateConcatenation(light_encoder=LIGHT).setup(ckpt)
    vectors = late.encode(ckpt, FEW, "document")
    last = method(ctx_position="none", pooling="eos").setup(ckpt).encode(ckpt, FEW, "document")
    z = F.normalize(late.summaries(inputs_of(late)), dim=1)
    assert torch.allclose(vectors, torch.cat([last, z], 1) / 2**0.5, atol=1e-5)
    assert set(late.modules()) == {"light_encoder"}
    assert late.dimensions(ckpt) == 64


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"variant": "echo"}, "variant is 'echo', which belongs to contrastive; plain and bidirectional are accepted"),
        ({"ctx_position": "none"}, "pooling is 'concat', which needs a Contextual token"),
        ({"instruction": "x", "query_prompt": "y"}, "instruction and query_prompt are given"),
        ({"document_length": 128}, "document_length is 128, and the model's context of 128 tokens holds 127"),
        ({"query_length": 3, "query_prompt": "a long prompt"}, "query_length is 3, and prompt and special tokens take"),
        ({"light_encoder": "DECODER"}, "which is a decoder; a text encoder such as minilm is accepted"),
        ({"light_encoder": "no-such"}, "the model 'no-such' is no directory and no bundled name"),
        ({"matryoshka": [65]}, "the size 65; the model's vectors have 64 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    if fields.get("light_encoder") == "DECODER":
        fields = {"light_encoder": str(tiny_checkpoint_dir("llama", tmp_path / "decoder", layers=1))}
    with pytest.raises((IntaglioError, ValueError), match=says):
        train(checkpoint(layers=1), PAIRS, objective=method(**fields), steps=1)


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(IntaglioError, match="BertForMaskedLM is an encoder; the objective contrastive trains encoders"):
        train(checkpoint("bert", layers=1), PAIRS, objective=method(), steps=1)
    ckpt = checkpoint(layers=1)
    ckpt.tokenizer.eos_token = None
    with pytest.raises(IntaglioError, match="the tokenizer has no end-of-text token; set its eos_token"):
        train(ckpt, PAIRS, objective=method(), steps=1)
    with pytest.raises(IntaglioError, match="example 0 of the pairs: its query is empty"):
        train(checkpoint(layers=1), [{**PAIRS[0], "query": "  "}], objective=method(), steps=1)


def test_the_papers_settings() -> None:
    own = Causal2Vec.paper()
    assert (own.light_encoder, own.query_length, own.document_length) == ("intfloat/e5-base-v2", 512, 512)


def test_defaults() -> None:
    assert Causal2Vec().model_dump() == {
        **BASE_DEFAULTS, "temperature": 0.05, "normalize": True, "symmetric": False, "matryoshka": None,
        "matryoshka_weights": None, "matryoshka_per_step": None, "light_encoder": "minilm", "pooling": "concat",
        "ctx_position": "first", "activation": "gelu", "initial_norm": 1.0, "encoder_trained": True,
        "encoder_lr_ratio": 0.1, "projector_lr_ratio": 1.0, "encoder_reads": "cut", "encoder_instruction": False,
        "instruction": None, "normalize_halves": False, "output_size": None,
    }  # fmt: skip
