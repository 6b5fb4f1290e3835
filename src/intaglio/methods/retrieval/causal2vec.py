"""Causal2Vec (Lin et al. 2025): a Contextual token from a light encoder in front of an unmodified decoder.

No official code was at hand. Sources leave a, the place of c beside the begin token, and the encoder's view of the
instruction open, so these are options here.

Source: Lin et al., Causal2Vec: Improving Decoder-only LLMs as Versatile Embedding Models, 2025, arXiv 2507.23386.

Dimension letters: N texts, L positions, D width of the decoder, K width of the light encoder, M dimensions of a vector.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers import CONFIG_MAPPING, AutoModel

from intaglio.checkpoint import Checkpoint, load
from intaglio.checkpoint.loading import load_tokenizer
from intaglio.data.text_pairs import TextPair
from intaglio.errors import IntaglioError
from intaglio.measures.embeddings import pool
from intaglio.modeling.anatomy import Anatomy, anatomy, context_length
from intaglio.modeling.partial_pass import base_hidden
from intaglio.trainer.contrastive import SymmetricObjective
from intaglio.trainer.encoder_training import SIDES
from intaglio.trainer.protocols import Batch, Loss
from intaglio.trainer.rng import generator
from intaglio.trainer.text_batches import Read, chunks_of, plain_tokens, special_tokens

INSTRUCTION = "Instruct: {task}\nQuery: "
"""Text before a query with an instruction."""
SLOT = 0
"""Token id that stands for the Contextual token; its embedding is never read."""
GROUP_TOKENS = 256
"""Tokens that a light encoder reads at a time on a CPU."""
PROBES, PROBE_TOKENS, MOST_ROWS = 64, 8, 4096
"""Random texts, their tokens, and embeddings of the decoder from which the first norm of c is set."""


class LightEncoder(nn.Module):
    """Light bidirectional encoder B: the mean of its last hidden states.

    Args:
        model: the encoder without a head.
        tokenizer: its tokenizer.
        trained: whether it is trained; otherwise it stays in evaluation mode.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, trained: bool) -> None:
        super().__init__()
        self.model, self.tokenizer, self.trained = model.float(), tokenizer, trained
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # type: ignore[assignment]  # never read
        self.requires_grad_(trained)
        self.width = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.max_length = min(context_length(model), tokenizer.model_max_length)

    @classmethod
    def from_name(cls, name: str, trained: bool) -> Self:
        """Load a checkpoint.

        Raises:
            IntaglioError: it cannot be loaded, has no tokenizer, or is a decoder.
        """
        checkpoint = load(name)
        parts = anatomy(checkpoint.model)
        if checkpoint.tokenizer is None or parts.causal:
            lack = "is a decoder" if parts.causal else "has no tokenizer"
            raise IntaglioError(f"light_encoder is {name!r}, which {lack}; a text encoder such as minilm is accepted")
        return cls(parts.base, checkpoint.tokenizer, trained)

    @classmethod
    def from_data(cls, data: Mapping[str, Any], trained: bool) -> Self:
        """Build the encoder of `data`, with random weights."""
        config = CONFIG_MAPPING[data["config"]["model_type"]].from_dict(data["config"])
        with torch.random.fork_rng(devices=[]):
            model = AutoModel.from_config(config)
        with tempfile.TemporaryDirectory() as folder:
            for name, text in data["tokenizer"].items():
                Path(folder, name).write_text(text, encoding="utf-8")
            return cls(model, load_tokenizer(folder), trained)

    def data(self) -> dict[str, Any]:
        """Return config and tokenizer as JSON values, from which `from_data` builds the encoder."""
        config: Any = self.model.config
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            files = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}
        values = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
        return {"config": {**values, "dtype": "float32"}, "tokenizer": files}

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, cut to the encoder's context."""
        length = self.max_length
        return list(self.tokenizer(text, truncation=True, max_length=length, verbose=False)["input_ids"])

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen encoder has no dropout."""
        return super().train(mode and self.trained)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return z, float32 [N, K], of texts padded on the right.

        On a CPU, texts of like length are read together outside of training: padding would cost as much as text.
        """
        if self.training or input_ids.device.type != "cpu":
            return self._mean(input_ids, attention_mask)
        order_N = attention_mask.sum(1).argsort()
        ordered = {"input_ids": input_ids[order_N], "attention_mask": attention_mask[order_N]}
        groups = chunks_of(ordered, max(1, GROUP_TOKENS // input_ids.shape[1]))
        return torch.cat([self._mean(**group) for group in groups])[order_N.argsort()]

    def _mean(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden_NLK = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pool(hidden_NLK, attention_mask.bool())


class Projector(nn.Module):
    """MLP g from the light encoder to the decoder's embeddings: c = W2 a(W1 z + b1) + b2."""

    def __init__(self, inputs: int, outputs: int, activation: Literal["gelu", "relu"], seed: int) -> None:
        super().__init__()
        self.into, self.out = skip_init(nn.Linear, inputs, outputs), skip_init(nn.Linear, outputs, outputs)
        self.activation = F.gelu if activation == "gelu" else F.relu
        draws = generator(seed, "causal2vec", "projector")
        with torch.no_grad():
            for layer in (self.into, self.out):
                layer.weight.normal_(0.0, layer.in_features**-0.5, generator=draws)
                layer.bias.zero_()

    def forward(self, z_NK: Tensor) -> Tensor:
        """Return c, float32 [N, D]."""
        return self.out(self.activation(self.into(z_NK)))


class Causal2Vec(SymmetricObjective, slug="causal2vec"):
    """Text encoder from an unmodified decoder that reads a Contextual token of a light encoder before each text.

        z   = mean(B(x))                                       B: the light encoder
        c   = W2 a(W1 z + b1) + b2                             the projector; c is the Contextual token
        H   = F([c; bos; instruction; x_1 .. x_n; eos])        F: the decoder, causal as it was
        v   = [H_c; H_eos] / |[H_c; H_eos]|

    Every token can attend to c, a summary of the whole text, so the decoder keeps its causal mask; n + 1 positions are
    read instead of the 2n of an echoed text.

    In a recipe: `train: {objective: {causal2vec: {}}, pairs: pairs.jsonl, lora: {r: 16}, steps: 500}`, then `intaglio
    index DOCS -o INDEX --encoder OUT`, or `intaglio.load(OUT).as_sentence_transformer()`. OUT contains the light
    encoder. Plain last-token pooling is `ctx_position="none"` with `pooling="eos"`; echoed texts and the bidirectional
    mask with mean pooling are variants of `contrastive`.

    Source: Lin et al., Causal2Vec, 2025, arXiv 2507.23386. It leaves a, the place of c and the text that B reads open.
    The authors train LoRA adapters of Mistral-7B with E5-base-v2 on public retrieval data, with hard negatives, up to
    512 tokens.

    Args:
        light_encoder: B, a bundled name, a directory or a hub id of a text encoder. Default `minilm`.
        pooling: `concat` of the states of the Contextual and the end token, `ctx` or `eos` alone, or `mean` over the
            tokens of the text. Default `concat`, of twice the width.
        ctx_position: place of c: `first`, `after_bos`, `after_instruction` (directly before the text), or `none`: no
            Contextual token. Default `first`.
        activation: a of the projector, `gelu` or `relu`. Default `gelu`.
        initial_norm: norm of c before training, over the mean norm of the decoder's token embeddings; 0 sets W2 to
            zero. Default 1.
        encoder_trained: whether B is trained too. Default True.
        encoder_lr_ratio: learning rate of B over that of the run. Default 0.1.
        projector_lr_ratio: learning rate of the projector over that of the run. Default 1.
        encoder_reads: text that B reads: `cut` as the decoder's, or `whole` up to the context of B. Default `cut`.
        encoder_instruction: whether B also reads the prompt or instruction. Default False.
        instruction: task of the queries, put into `Instruct: {task}\\nQuery: {text}`. Default: none.
        normalize_halves: whether both halves of `concat` have unit length before the whole. Default False.
        output_size: M, by a linear layer trained on the pooled vector. Default: none, and M is D, or 2 D for `concat`.
    """

    kinds = ("objective", "encoder")
    summary = "makes a text encoder of an unmodified decoder, which reads a light encoder's summary before each text"
    citation = "Lin et al., Causal2Vec: Improving Decoder-only LLMs as Versatile Embedding Models, 2025"
    url = "https://arxiv.org/abs/2507.23386"

    light_encoder: Annotated[str, Field(min_length=1)] = "minilm"
    pooling: Literal["concat", "ctx", "eos", "mean"] = "concat"
    ctx_position: Literal["first", "after_bos", "after_instruction", "none"] = "first"
    activation: Literal["gelu", "relu"] = "gelu"
    initial_norm: Annotated[float, Field(ge=0)] = 1.0
    encoder_trained: bool = True
    encoder_lr_ratio: Annotated[float, Field(gt=0)] = 0.1
    projector_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    encoder_reads: Literal["cut", "whole"] = "cut"
    encoder_instruction: bool = False
    instruction: Annotated[str, Field(min_length=1)] | None = None
    normalize_halves: bool = False
    output_size: Annotated[int, Field(ge=1)] | None = None

    _data: dict[str, Any] = PrivateAttr(default_factory=dict)
    _around: dict[str, tuple[list[int], list[int], list[int]]] = PrivateAttr(default_factory=dict)
    _embedding_norm: float = PrivateAttr(1.0)
    _norm: Tensor | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.variant == "echo":
            raise ValueError("variant is 'echo', which belongs to contrastive; plain and bidirectional are accepted")
        if not self.contextual and self.pooling in ("concat", "ctx"):
            raise ValueError(
                f"pooling is {self.pooling!r}, which needs a Contextual token; with ctx_position none, eos and mean are"
                " accepted"
            )
        if self.instruction is not None and self.query_prompt:
            raise ValueError("instruction and query_prompt are given; give one text before the queries")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the authors' encoder and lengths."""
        sizes = {"query_length": 512, "document_length": 512}
        return cls(**{"light_encoder": "intfloat/e5-base-v2", **sizes, **overrides})

    @property
    def contextual(self) -> bool:
        """Whether there is a Contextual token."""
        return self.ctx_position != "none"

    @property
    def reads_light(self) -> bool:
        """Whether the light encoder reads the texts."""
        return self.contextual

    @property
    def lr_ratios(self) -> dict[str, float]:
        """Learning rates of light encoder and projector."""
        ratios = {"light_encoder": self.encoder_lr_ratio, "projector": self.projector_lr_ratio}
        return {name: ratio for name, ratio in ratios.items() if name in self.modules()}

    def vector_size(self, hidden_size: int) -> int:
        """Return M."""
        return self.output_size or self._pooled_size(hidden_size)

    def _pooled_size(self, hidden_size: int) -> int:
        return 2 * hidden_size if self.pooling == "concat" else hidden_size

    def check_parts(self, parts: Anatomy) -> None:
        """Refuse an encoder in the decoder's place."""
        super().check_parts(parts)
        if not parts.causal:
            raise IntaglioError(
                f"causal2vec adds a Contextual token to a decoder, and {type(parts.model).__name__} is an encoder; the"
                " objective contrastive trains encoders"
            )

    def room(self, checkpoint: Checkpoint, name: str) -> int:
        """Return the tokens that the context holds beside the Contextual token."""
        return super().room(checkpoint, name) - self.contextual

    def build(self, checkpoint: Checkpoint, seed: int) -> nn.ModuleDict:
        """Return light encoder, projector and output layer."""
        begin, end = _begin_and_end(checkpoint.tokenizer)
        for name in SIDES:
            self._around[name] = (begin, plain_tokens(checkpoint.tokenizer, self._prompt(name)), end)
            taken = sum(map(len, self._around[name]))
            if taken >= self.length(name):
                raise IntaglioError(
                    f"{name}_length is {self.length(name)}, and prompt and special tokens take {taken}; a length that"
                    " holds the text too is needed"
                )
        owned = nn.ModuleDict(self._context_modules(seed) if self.reads_light else {})
        if self.output_size is not None:
            pooled = self._pooled_size(int(checkpoint.config.hidden_size))
            output = skip_init(nn.Linear, pooled, self.output_size, bias=False)
            nn.init.orthogonal_(output.weight, generator=generator(seed, "causal2vec", "output"))
            owned["output"] = output
        return owned

    def _context_modules(self, seed: int) -> dict[str, nn.Module]:
        """Return the light encoder, and a projector whose c has the first norm on random tokens."""
        if self._data:
            light = LightEncoder.from_data(self._data, self.encoder_trained)
        else:
            light = LightEncoder.from_name(self.light_encoder, self.encoder_trained)
        embedding: Any = self._parts.embedding
        vocabulary, width = embedding.weight.shape
        projector = Projector(light.width, width, self.activation, seed)
        rows = torch.linspace(0, vocabulary - 1, min(vocabulary, MOST_ROWS), device=embedding.weight.device).long()
        tokens = sorted(set(light.tokenizer.get_vocab().values()) - set(light.tokenizer.all_special_ids))
        draws = torch.randint(len(tokens), (PROBES, PROBE_TOKENS), generator=generator(seed, "causal2vec", "probes"))
        ids = torch.tensor(tokens)[draws]
        with torch.no_grad():
            self._embedding_norm = float(embedding(rows).float().norm(dim=-1).mean())
            norm = projector(light.eval()(ids, torch.ones_like(ids))).norm(dim=-1).mean()
            projector.out.weight *= self.initial_norm * self._embedding_norm / norm
        return {"light_encoder": light, "projector": projector}

    def attachment_data(self) -> dict[str, Any]:
        """Return config and tokenizer of the light encoder."""
        if not self.reads_light:
            return {}
        return {"light_encoder": {"name": self.light_encoder, **self._light.data()}}

    def restore_data(self, data: Mapping[str, Any]) -> None:
        """Take over the stored light encoder, which no other can replace.

        Raises:
            IntaglioError: `light_encoder` names another.
        """
        self._data = dict(data.get("light_encoder", {}))
        name = self._data.get("name", self.light_encoder)
        if self.light_encoder != name:
            raise IntaglioError(f"light_encoder is {self.light_encoder!r}, and the encoder was trained with {name!r};"
                                " leave the field out")  # fmt: skip

    @property
    def _light(self) -> LightEncoder:
        light: LightEncoder = self._owned["light_encoder"]  # type: ignore[assignment]
        return light

    def _prompt(self, name: str, pair: TextPair | None = None) -> str:
        if name == "query" and self.instruction is not None:
            return INSTRUCTION.format(task=self.instruction)
        return super()._prompt(name, pair)

    def _slot(self, name: str) -> int:
        """Return the place of the Contextual token among a side's tokens."""
        begin, prompt, _ = self._around[name]
        return {"first": 0, "after_bos": len(begin)}.get(self.ctx_position, len(begin) + len(prompt))

    def read(self, text: str, name: str, pair: TextPair | None = None) -> Read:
        """Return the tokens as the decoder reads them, a place for c among them, and those of the light encoder."""
        begin, prompt, end = self._around[name]
        body, seen = _cut(self._checkpoint.tokenizer, text, self.length(name) - len(begin) - len(prompt) - len(end))
        if not body:
            raise IntaglioError(f"the {name} {text[:40]!r} has no tokens; both sides of a pair need text")
        before = [*begin, *prompt]
        if self.contextual:
            before.insert(self._slot(name), SLOT)
        return Read([*before, *body, *end], len(before), len(before) + len(body), self._further(text, seen, name))

    def _further(self, text: str, seen: str, name: str) -> tuple[tuple[str, list[int]], ...]:
        """Return the light encoder's tokens."""
        if not self.reads_light:
            return ()
        before = self._prompt(name) if self.encoder_instruction else ""
        return (("light", self._light.ids(before + (text if self.encoder_reads == "whole" else seen))),)

    def count_tokens(self, text: str, name: str) -> int:
        """Return the tokens of a text of a side with those around it, before it is cut."""
        return sum(map(len, self._around[name])) + len(plain_tokens(self._checkpoint.tokenizer, text))

    def summaries(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return z, float32 [N, K]."""
        return self._light(inputs["light_input_ids"], inputs["light_attention_mask"])

    def context(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return c, float32 [N, D]."""
        c_ND: Tensor = self._owned["projector"](self.summaries(inputs))
        self._norm = c_ND.detach().norm(dim=-1).mean() / self._embedding_norm
        return c_ND

    def states(
        self, inputs: Mapping[str, Tensor], side: str, c_ND: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the decoder's hidden states [N, L, D] and the place of c in each row, int64 [N], None without it.

        Args:
            inputs: see `intaglio.trainer.encoder_training.side`, padded on either side.
            side: `query` or `document`.
            c_ND: the Contextual tokens. Default: those of the light encoder.
        """
        mask_NL = inputs["attention_mask"]
        embeds_NLD: Tensor = self._parts.embedding(inputs["input_ids"])
        slot_N = None
        if self.contextual:
            c_ND = self.context(inputs) if c_ND is None else c_ND
            slot_N = mask_NL.argmax(1) + self._slot(side)
            here_NL1 = (torch.arange(mask_NL.shape[1], device=mask_NL.device) == slot_N[:, None])[..., None]
            embeds_NLD = torch.where(here_NL1, c_ND[:, None].to(embeds_NLD.dtype), embeds_NLD)
        position_NL = (mask_NL.cumsum(1) - 1).clamp(min=0)
        batch = {"inputs_embeds": embeds_NLD, "attention_mask": mask_NL, "position_ids": position_NL}
        return base_hidden(self._parts, batch), slot_N

    def embed(self, model: nn.Module, inputs: Mapping[str, Tensor], side: str) -> Tensor:
        """Return the pooled states, float32 [N, M]."""
        hidden_NLD, slot_N = self.states(inputs, side)
        if self.pooling == "mean":
            halves = [pool(hidden_NLD, inputs["pool_mask"])]
        else:
            halves = [pool(hidden_NLD, inputs["attention_mask"].bool(), "last")]
        if slot_N is not None and self.pooling in ("concat", "ctx"):
            context_ND = hidden_NLD[torch.arange(len(slot_N), device=slot_N.device), slot_N].float()
            halves = [context_ND, *halves] if self.pooling == "concat" else [context_ND]
        if self.normalize_halves:
            halves = [F.normalize(half_ND, dim=-1) for half_ND in halves]
        vectors_NM = torch.cat(halves, dim=-1)
        return self._unit(vectors_NM if self.output_size is None else self._owned["output"](vectors_NM))

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of a batch; `context_norm` is the mean norm of the last c over that of token embeddings."""
        result = super().loss(model, batch)
        norm = {} if self._norm is None else {"context_norm": self._norm}
        return Loss(result.total, {**result.parts, **norm}, result.outputs)


def _begin_and_end(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens before and after a text; the end token is added where the tokenizer has none."""
    begin, end = special_tokens(tokenizer)
    if not end and tokenizer.eos_token_id is None:
        raise IntaglioError("the tokenizer has no end-of-text token; set its eos_token, whose state is pooled")
    return begin, end or [int(tokenizer.eos_token_id)]


def _cut(tokenizer: Any, text: str, most: int) -> tuple[list[int], str]:
    """Return the first tokens of a text, and the text that they stand for."""
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = list(read["input_ids"])
    if len(ids) <= most:
        return ids, text
    if not tokenizer.is_fast:
        return ids[:most], tokenizer.decode(ids[:most])
    return ids[:most], text[: read["offset_mapping"][most - 1][1]]
