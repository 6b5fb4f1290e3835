"""ApplyPretrained (Yoshida, TTIC 2024): recurrence, RUM-SUNDAE, optimized caches and exact search for trained models.

    model.generate(**inputs, custom_generate=intaglio.ApplyPretrained(window=32))               # hso
    intaglio.train(ckpt, texts, objective=intaglio.ApplyPretrained(technique="recurrence"), steps=500)
    ckpt.decoder("apply_pretrained", target_length=12)             # after fit: technique: conditional_beam

- `hidden_state_optimization.py`: `hso_score`, `hso_prefill`, `hso_classify`
- `recurrence.py`: windows that hand on a state
- `seq2seq.py`: non-autoregressive decoder from a masked language model
- `conditional_search.py`: `exact_mode`, `conditional_beam_search`; `prefix_classifier.py`: the learned attribute
- `training_rows.py`: rows and batches of what is trained; `init.py`: first weights
- `decode_loop.py`: token-by-token decoding
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import ConfigDict, Field, InstanceOf, PrivateAttr
from pydantic.json_schema import SkipJsonSchema
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.attachments import Attachment, to_store
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.data.texts import load_texts
from intaglio.errors import IntaglioError
from intaglio.methods.base import Cost, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.methods.decoding.apply_pretrained.conditional_search import (
    CachedPrefixes,
    ModeSearch,
    SearchedText,
    conditional_beam_search,
    exact_mode,
)
from intaglio.methods.decoding.apply_pretrained.decode_loop import decode
from intaglio.methods.decoding.apply_pretrained.hidden_state_optimization import (
    CacheOptimizer,
    hso_classify,
    hso_prefill,
    hso_score,
    next_logits,
)
from intaglio.methods.decoding.apply_pretrained.prefix_classifier import (
    LabelAttribute,
    LengthAttribute,
    PrefixClassifier,
)
from intaglio.methods.decoding.apply_pretrained.recurrence import WindowedModel, WindowRecurrence, check_layers
from intaglio.methods.decoding.apply_pretrained.seq2seq import MlmSeq2Seq, sundae_decode, sundae_loss
from intaglio.methods.decoding.apply_pretrained.training_rows import (
    class_batch,
    labelled_rows,
    labelled_texts,
    length_rows,
    sequence_batch,
    sequence_pairs,
)
from intaglio.modeling.anatomy import anatomy
from intaglio.speculative.heads.self_generated_data import extract_prompts, generate_corpus, stop_ids
from intaglio.speculative.outputs import streaming
from intaglio.trainer.causal_lm import causal_batch, check_causal, cross_entropy, cut, documents
from intaglio.trainer.loop import train
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG

ARCHITECTURE = {
    "recurrence": ("slots", "feed_state", "slot_bias"),
    "seq2seq": ("max_target", "cross_attention"),
    "conditional_beam": ("attribute", "max_remaining", "classifier_width"),
}
"""Fields that decide the shapes of each technique's trained network."""

Positive = Annotated[int, Field(ge=1)]


class ApplyPretrained(Method, slug="apply_pretrained"):
    """Four techniques for a pretrained model, chosen by `technique`.

    `hso` (decoder): H <- H - step dL/dH for the cached keys and values H after each window of the prompt, the weights
    frozen; see `hidden_state_optimization`.

    `recurrence` (objective and decoder): windows of T tokens; a network of the window's mean hidden state gives one
    more key and value to the next window, so that a state of fixed size replaces the cache; see `recurrence`. A `train`
    step trains model and network, a `fit` step the network alone.

    `seq2seq` (objective): RUM-SUNDAE, an encoder and a bidirectional decoder with cross-attention from one masked
    language model, trained to denoise its own samples; see `seq2seq`. `transduce` decodes.

    `conditional_beam` (decoder): beam search by log p(x_1..x_t) + gamma log q(a | x_1..x_t), q a prefix classifier that
    a `fit` step trains; see `conditional_search` and `prefix_classifier`.

    `exact_mode` (decoder): the most likely text, or with `target_length` the most likely one of that length, by
    depth-first search; a warning is given if the node budget ends before the proof.

    Args:
        technique: see above. Default `hso`.
        window: (hso, recurrence) tokens of a window. Default 64.
        rule: (hso) `rms`, `sgd` or `adam`; see `CacheOptimizer`. Default `rms`.
        step_size: (hso) step size. Default 0.001.
        window_steps: (hso) updates on each window. Default 1.
        update_own: (hso) whether a window's own states are updated too. Default false.
        memory: (hso) most cached states; the oldest are dropped. Default: no limit.
        state_layer: (recurrence) block l_out whose output is averaged. Default: the last.
        insert_layer: (recurrence) block l_ins whose attention sees the state. Default: the middle one.
        slots: (recurrence) keys and values of a state. Default 1.
        feed_state: (recurrence) whether the network reads the earlier state too. Default false.
        slot_bias: (recurrence) start of the learned bias b on the slots' logits; null: no state, b = -inf. Default -5.
        detach: (recurrence) whether no gradient flows into earlier windows. Default false.
        recompute: (recurrence) whether a window's activations are recomputed for the gradient, so that memory holds
            those of a single window. Default true.
        unroll: (seq2seq) denoised drafts of a training step; 1 is plain denoising. Default 2.
        mask_share: (seq2seq) share of the replaced tokens that become the mask token, not a random one. Default 0.
        cross_attention: (seq2seq) `copy` of the self-attention or `random`. Default `copy`.
        max_target: (seq2seq) longest target in tokens. Default 128.
        length_weight: (seq2seq) weight of the length head's loss. Default 0.1.
        decode_steps: (seq2seq) most refinements. Default 10.
        decode_temperature: (seq2seq) of the drafts. Default 0.3.
        update_share: (seq2seq) share of the positions that a refinement redraws. Default 0.5.
        candidate_lengths: (seq2seq) lengths tried, the most likely. Default 4.
        drafts: (seq2seq) drafts of each length. Default 1.
        draft_start: (seq2seq) `random` tokens or the `mask` token. Default `random`.
        attribute: (conditional_beam) `length`, the text has `target_length` tokens; or `label`, it is of class 1 of the
            `labels`. Default `length`.
        target_length: (conditional_beam, exact_mode) tokens of the text, the end token left out. Default: for
            exact_mode any length.
        beams: (conditional_beam) number of beams; (exact_mode) those of the search that gives the first bounds.
            Default 4.
        top_k: (conditional_beam) candidates of each beam, at least twice the beams. Default: twice the beams.
        gamma: (conditional_beam) weight of log q; 0 is plain beam search. Default 1.
        node_budget: (exact_mode) most prefixes read. Default 10,000.
        labels: (fit, label) file with a JSON object a line: `prompt`, `answer`, `label` 0 or 1.
        max_remaining: (fit, length) longest remaining length that has a class of its own. Default 64.
        classifier_width: (fit, conditional_beam) width of the hidden layer; 0: linear. Default 128.
        own_text: (fit, length) whether the classifier is trained on texts that the model continues itself, on whose
            prefixes it is used, or on the texts. Default true.
        samples: (fit, length) most texts. Default 500.
        prompt: (fit, length) tokens that the model continues. Default 16.
        length: tokens of a training row, those of generated texts included. Default: four windows for recurrence, else
            128, or the context if it is shorter.
        steps: (fit) optimizer steps. Default 300.
        batch_size: (fit) rows of a batch. Default 8.
        learning_rate: (fit) peak learning rate. Default 1e-3.

    Raises:
        IntaglioError: a model, text or option that the technique cannot use.

    Source: Yoshida, Making the Most of your Model: Methods for Finetuning and Applying Pretrained Transformers, thesis,
    TTIC 2024, arXiv 2408.16241, with arXiv 2008.07027 (recurrence), 2112.08653 (hidden states), 2311.08817 (search). No
    official code was published; constants that the abstracts do not give are ours.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, use_attribute_docstrings=True)
    kinds = ("objective", "decoder")
    summary = (
        "adds recurrence, non-autoregressive decoding, an optimized cache or conditional search to a trained model"
    )
    citation = (
        "Yoshida, Making the Most of your Model: Methods for Finetuning and Applying Pretrained Transformers, thesis, "
        "TTIC 2024"
    )
    url = "https://arxiv.org/abs/2408.16241"
    fitted = True
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})

    technique: Literal["hso", "recurrence", "seq2seq", "conditional_beam", "exact_mode"] = "hso"
    window: Positive = 64
    rule: Literal["rms", "sgd", "adam"] = "rms"
    step_size: Annotated[float, Field(ge=0)] = 0.001
    window_steps: Positive = 1
    update_own: bool = False
    memory: Positive | None = None
    state_layer: Annotated[int, Field(ge=0)] | None = None
    insert_layer: Annotated[int, Field(ge=0)] | None = None
    slots: Positive = 1
    feed_state: bool = False
    slot_bias: float | None = -5.0
    detach: bool = False
    recompute: bool = True
    unroll: Positive = 2
    mask_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    cross_attention: Literal["copy", "random"] = "copy"
    max_target: Positive = 128
    length_weight: Annotated[float, Field(ge=0)] = 0.1
    decode_steps: Positive = 10
    decode_temperature: Annotated[float, Field(ge=0)] = 0.3
    update_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    candidate_lengths: Positive = 4
    drafts: Positive = 1
    draft_start: Literal["random", "mask"] = "random"
    attribute: Literal["length", "label"] = "length"
    target_length: Positive | None = None
    beams: Positive = 4
    top_k: Positive | None = None
    gamma: Annotated[float, Field(ge=0)] = 1.0
    node_budget: Positive = 10_000
    labels: str | None = None
    max_remaining: Positive = 64
    classifier_width: Annotated[int, Field(ge=0)] = 128
    own_text: bool = True
    samples: Positive = 500
    prompt: Positive = 16
    length: Annotated[int, Field(ge=2)] | None = None
    steps: Positive = 300
    batch_size: Positive = 8
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    streamer: SkipJsonSchema[InstanceOf[BaseStreamer] | None] = Field(None, exclude=True, repr=False)
    """Receives prompt and tokens; `generate` passes none to a custom decoder."""

    _network: Any = PrivateAttr(None)
    _vocabulary: int = PrivateAttr(0)
    _mask_id: int | None = PrivateAttr(None)

    @property
    def cache_optimizer(self) -> CacheOptimizer:
        """The update rule of `hso`."""
        return CacheOptimizer(self.rule, self.step_size, self.window_steps, self.update_own, self.memory)

    @property
    def network(self) -> Any:
        """The trained network, after `prepare` or `restore`; None before."""
        return self._network

    # --- training ---------------------------------------------------------------------------------------------------

    def make(self, model: Any, seed: int) -> nn.Module:
        """Return the untrained network of the technique for a model."""
        width = int(model.config.get_text_config().hidden_size)
        if self.technique == "recurrence":
            check_layers(anatomy(model), self.state_layer, self.insert_layer)
            return WindowRecurrence(width, self.slots, self.feed_state, self.slot_bias, seed)
        if self.technique == "seq2seq":
            return MlmSeq2Seq(model, self.max_target, self.cross_attention, seed)
        if self.technique == "conditional_beam":
            classes = 2 if self.attribute == "label" else self.max_remaining + 1
            embedded = model.get_input_embeddings().weight.shape[1]
            return PrefixClassifier(width, embedded, classes, self.classifier_width, seed)
        raise IntaglioError(
            f"the technique {self.technique} trains nothing; recurrence, seq2seq and conditional_beam do"
        )

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Make the network, and rows of the examples."""
        self._check_model(checkpoint)
        if rng.training or self._network is None:
            self._network = self.make(checkpoint.model, rng.seed).to(checkpoint.device)
        self._vocabulary = checkpoint.vocabulary
        self._mask_id = getattr(checkpoint.tokenizer, "mask_token_id", None)
        length = self._length(checkpoint)
        if self.technique == "recurrence":
            return cut(documents(examples, checkpoint.vocabulary), length)
        if self.technique == "seq2seq":
            self._network.mask_id = self._mask_id
            return sequence_pairs(checkpoint, examples, self.max_target)
        if self.attribute == "label":
            return labelled_rows(checkpoint, examples, length)
        return length_rows(examples, length, self.max_remaining + 1, stop_ids(checkpoint.model))

    def _check_model(self, checkpoint: Checkpoint) -> None:
        if self.technique != "seq2seq":
            check_causal(checkpoint, packing=False)
        if self.technique == "recurrence" and self.window > checkpoint.context:
            raise IntaglioError(f"window is {self.window}; the model's context is {checkpoint.context}")
        if self.mask_share and getattr(checkpoint.tokenizer, "mask_token_id", None) is None:
            raise IntaglioError(f"mask_share is {self.mask_share}, but the tokenizer has no mask token")

    def _length(self, checkpoint: Checkpoint) -> int:
        if self.technique == "recurrence":  # positions restart in each window
            return self.length or 4 * self.window
        length = self.length or min(128, checkpoint.context)
        if length > checkpoint.context:
            raise IntaglioError(f"length is {length}; the model's context is {checkpoint.context}")
        return length

    def modules(self) -> nn.ModuleDict:
        """Return the network, which is trained with the model."""
        return nn.ModuleDict({} if self._network is None else {"network": self._network})

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return the batch of the technique's loss."""
        if self.technique == "recurrence":
            return causal_batch(examples)
        if self.technique == "seq2seq":
            return sequence_batch(examples, rng, self._vocabulary, self._mask_id, self.mask_share)
        return class_batch(examples)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of the technique."""
        if self.technique == "recurrence":
            logits_BTV = self.windowed(model).logits(batch["input_ids"], self.window, batch.get("attention_mask"))
            total = cross_entropy(logits_BTV, batch["target"])
            if not total.requires_grad:  # a frozen model, and rows of a single window, which get no state
                total = total + 0.0 * sum(p.sum() for p in self._network.parameters())
            return Loss(total, outputs=logits_BTV)
        if self.technique == "seq2seq":
            denoising, length = sundae_loss(self._network, model, batch, self.unroll, int(batch["seed"]))
            return Loss(denoising + self.length_weight * length, {"denoising": denoising, "length": length})
        return Loss(self._network.loss(model, batch["input_ids"], batch["target"]))

    def windowed(self, model: Any) -> WindowedModel:
        """Return a model read in windows with the trained recurrence."""
        layers = check_layers(anatomy(model), self.state_layer, self.insert_layer)
        return WindowedModel(model, self._network, layers, detach=self.detach, recompute=self.recompute)

    def fit(
        self,
        checkpoint: Checkpoint,
        texts: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        directory: Path | None = None,
        resume: bool = False,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Train the network of `recurrence` or `conditional_beam` on the frozen model and attach it.

        Args:
            checkpoint: a decoder with its tokenizer.
            texts: a name for `load_texts`, texts or a corpus; not read where `labels` is given.
            seed: of the network, of generated texts and of the order of the rows.
            batch_size: ignored; the field of that name is used.
            directory: for the state of a run that can be resumed. Default: none.
            resume: whether to continue from that state. Default False.
            progress: called as text is generated and after each optimizer step.

        Raises:
            IntaglioError: no texts, a technique that trains nothing or the weights too, or as `intaglio.train`.
        """
        if self.technique == "seq2seq":
            raise IntaglioError(
                "seq2seq trains the encoder too; use a train step with objective: {apply_pretrained: ...}"
            )
        if self.technique == "recurrence" and self.slot_bias is None:
            raise IntaglioError("slot_bias is null, so no window gets a state and nothing can be fitted")
        self.make(checkpoint.model, seed)  # a technique or setting that does not fit: refused before any work
        self._check_model(checkpoint)
        trained = train(
            checkpoint,
            self._examples(checkpoint, texts, seed, progress),
            objective=self,
            freeze=True,
            note=False,
            keep_mask=False,
            directory=directory,
            resume=resume,
            progress=progress,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=seed % (1 << 32),
        )
        tensors = to_store(self._network.state_dict(), "network.")
        loss = [row.loss for row in trained.history if row.loss is not None]
        chosen = {"steps": trained.steps, "tokens": trained.tokens, "loss": loss[-1] if loss else None}
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, chosen=chosen, verb="fit")
        checkpoint.attach(self.slug, tensors, self.model_dump(), {"model": fingerprint(checkpoint.model)})
        return checkpoint

    def _examples(self, checkpoint: Checkpoint, texts: Any, seed: int, progress: Progress) -> Any:
        """Return the training data of `fit`."""
        if self.technique == "conditional_beam" and self.attribute == "label":
            if self.labels is not None:
                return labelled_texts(self.labels)
            if not (isinstance(texts, Sequence) and texts and isinstance(texts[0], Mapping)):
                raise IntaglioError("labels is missing; the attribute label is learned from labelled texts")
        if texts is None:
            raise IntaglioError(f"{self.technique} is trained on texts; give {self.slug} some")
        if self.technique == "recurrence" or not self.own_text or self.attribute == "label":
            return texts
        length = self._length(checkpoint)
        if length <= self.prompt:
            raise IntaglioError(f"prompt is {self.prompt} and length {length}; generated tokens need a larger length")
        prompts = extract_prompts(checkpoint, load_texts(texts), self.prompt, self.samples)
        tokens = length - max(map(len, prompts), default=0)
        return generate_corpus(checkpoint, prompts, tokens=tokens, temperature=1.0, seed=seed, progress=progress)

    @classmethod
    def restore(cls, attachment: Attachment, checkpoint: Checkpoint, **fields: Any) -> Self:
        """Return the method with the network that was trained.

        Args:
            attachment: of the checkpoint.
            checkpoint: owner of the network.
            **fields: override those of the training, except what decides the network.

        Raises:
            IntaglioError: a field that the network was not trained with, or an attachment of another model.
        """
        technique = attachment.parameters["technique"]
        for name in ("technique", *ARCHITECTURE[technique]):
            trained = attachment.parameters.get(name)
            if name in fields and fields[name] != trained:
                raise IntaglioError(f"{name} is {fields[name]}; the attachment was trained with {trained}")
        method = cls(**attachment.parameters | fields)
        network: Any = method.make(checkpoint.model, 0)
        own = {f"network.{name}": value.shape for name, value in network.state_dict().items()}
        if own != {name: value.shape for name, value in attachment.tensors.items()}:
            raise IntaglioError(
                f"the attachment {attachment.slug} does not fit {type(checkpoint.model).__name__}; it belongs to "
                "another checkpoint"
            )
        network.load_state_dict({name.removeprefix("network."): v for name, v in attachment.tensors.items()})
        method._network = network.requires_grad_(False).eval().to(checkpoint.device)
        method._mask_id = getattr(checkpoint.tokenizer, "mask_token_id", None)
        if technique == "seq2seq":
            network.mask_id = method._mask_id
        return method

    @classmethod
    def for_checkpoint(cls, checkpoint: Checkpoint, **fields: Any) -> ApplyPretrained:
        """Return the decoder with the checkpoint's trained network if the technique has one."""
        attachment = checkpoint.attachments.get(cls.slug)
        attached = "hso" if attachment is None else attachment.parameters["technique"]
        trained = fields.get("technique", attached) in ARCHITECTURE and fields.get("gamma") != 0
        if attachment is None or not trained:
            return cls(**fields)  # decoding explains what to train, if it must
        decoder: ApplyPretrained = checkpoint.decoder(cls.slug, **fields)
        return decoder

    def estimate_fit(self, workload: Workload, texts: Any) -> Cost:
        """Estimate the passes of the frozen model and of the network, and generating the texts."""
        length = self.length or (4 * self.window if self.technique == "recurrence" else 128)
        tokens = self.steps * self.batch_size * length
        # Gradients of the recurrence flow through the later windows; generating costs about ten times reading.
        passes = 4.0 if self.technique == "recurrence" else 2.0
        generated = self.samples * length if self.own_text and self.technique == "conditional_beam" else 0
        flops = workload.parameters * (passes * tokens + 20.0 * generated)
        return Cost(flops=flops, extra_bytes=int(self.batch_size * length * workload.hidden * 4 * 12))

    def losses(self, model: Any, ids_BT: Tensor) -> Tensor:
        """Return the `hso` losses of rows; see `hso_score`."""
        return hso_score(model, ids_BT, self.window, self.cache_optimizer)

    # --- decoding ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Generate; called by `model.generate(..., custom_generate=self)`."""
        parts = anatomy(model)
        if not parts.causal or parts.head is None:
            raise IntaglioError(f"{type(model).__name__} is no causal language model; transduce decodes with seq2seq")
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise IntaglioError("the prompts are padded; apply_pretrained reads rows of equal length")
        if generation_config.num_beams != 1:
            raise IntaglioError(f"num_beams is {generation_config.num_beams}; the number of beams is the field beams")
        stepwise = self.technique in ("hso", "recurrence")
        if generation_config.do_sample and not stepwise:
            raise IntaglioError(
                f"sampling is requested of {self.technique}, which is deterministic; leave temperature, top_k and top_p"
                " out, or set do_sample=False"
            )
        with streaming(self.streamer, input_ids):
            if stepwise:
                step = self._next_logits(model, input_ids)
                ids_BL = decode(step, input_ids, logits_processor, stopping_criteria, generation_config, self.streamer)
            else:
                ids_BL = self._searched(model, input_ids, logits_processor, generation_config)
        return GenerateDecoderOnlyOutput(sequences=ids_BL) if generation_config.return_dict_in_generate else ids_BL

    def _next_logits(self, model: Any, input_ids: Tensor) -> Any:
        """Return a function from growing rows to the logits of their next token."""
        if self.technique == "recurrence":
            self._require_network()
            return self.windowed(model).next_logits(self.window)
        if input_ids.shape[1] == 1:
            raise IntaglioError("the prompt has a single token; hidden state optimization reads at least 2")
        cache = hso_prefill(model, input_ids, self.window, self.cache_optimizer)
        return partial(next_logits, model, cache, memory=self.memory)

    def _require_network(self) -> None:
        if self._network is None:
            raise IntaglioError(
                f"{self.technique} has no trained network; a recipe with fit: {{{self.slug}: {{technique: "
                f"{self.technique}}}}} trains it, and load(...).decoder({self.slug!r}) has it"
            )

    def _searched(self, model: Any, input_ids: Tensor, processors: Any, config: Any) -> Tensor:
        """Return prompts and their texts, padded on the right."""
        ends = [] if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).flatten().tolist()
        most = int(config.max_length) - input_ids.shape[1]
        if not ends:
            raise IntaglioError("the model has no end token; a search compares texts that end, so set eos_token_id")
        if self.target_length is not None and self.target_length >= most:
            raise IntaglioError(
                f"target_length is {self.target_length}; with its end token it needs max_new_tokens of at least "
                f"{self.target_length + 1}, and {most} is given"
            )
        rows = []
        for row in input_ids:
            text = self._text(model, row.tolist(), processors, ends, most)
            rows.append(torch.tensor([*row.tolist(), *text.ids], device=row.device))
            if self.streamer is not None:
                self.streamer.put(rows[-1][len(row) :].cpu())
        pad = ends[0] if config.pad_token_id is None else config.pad_token_id
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)

    def _text(self, model: Any, prompt: list[int], processors: Any, ends: list[int], most: int) -> SearchedText:
        if self.technique == "conditional_beam":
            attribute = self._attribute(model, ends)
            scored = CachedPrefixes(model, prompt, processors)
            return conditional_beam_search(
                scored, ends, most, beams=self.beams, attribute=attribute, top_k=self.top_k, gamma=self.gamma
            )[0]
        search = self.search_modes(model, prompt, processors, ends, most - 1)
        if not search.proven:
            warnings.warn(f"not proven to be the mode: the search stopped after {search.nodes} prefixes", stacklevel=2)
        text = search.modes.get(self.target_length)
        if text is None:
            raise IntaglioError(f"no text ended within {search.nodes} prefixes; raise node_budget or beams")
        return text

    def _attribute(self, model: Any, ends: Sequence[int]) -> LengthAttribute | LabelAttribute | None:
        if not self.gamma:
            return None
        self._require_network()
        embedding = model.get_input_embeddings()
        if self.attribute == "label":
            return LabelAttribute(self._network, embedding)
        if self.target_length is None:
            raise IntaglioError("target_length is missing; the attribute length needs the number of tokens")
        return LengthAttribute(self.target_length, ends, self._network, embedding)

    def search_modes(
        self, model: Any, prompt: Sequence[int], processors: Any, ends: Sequence[int], max_length: int
    ) -> ModeSearch:
        """Return the result of `exact_mode` with a beam search's texts as first bounds."""
        lengths = None if self.target_length is None else [self.target_length]
        forced = None if self.target_length is None else LengthAttribute(self.target_length, ends)
        scored = CachedPrefixes(model, prompt, processors)
        bounds = conditional_beam_search(
            scored, ends, max_length + 1, beams=self.beams, attribute=forced, top_k=self.top_k
        )
        return exact_mode(scored, ends, max_length, lengths=lengths, bounds=bounds, node_budget=self.node_budget)

    def transduce(
        self, checkpoint: Checkpoint, sources: Sequence[Any], *, seed: int = 0
    ) -> list[tuple[list[int], float]]:
        """Return the target ids of each source, and their mean log-probability, with a trained `seq2seq`.

        Args:
            checkpoint: the trained encoder.
            sources: texts, or token ids.
            seed: of the drafts. Default 0.

        Raises:
            IntaglioError: nothing was trained, or a text without a tokenizer.
        """
        self._require_network()
        results = []
        for number, source in enumerate(sources):
            if isinstance(source, str):
                if checkpoint.tokenizer is None:
                    raise IntaglioError("the checkpoint has no tokenizer; give token ids")
                source = checkpoint.tokenizer(source, verbose=False)["input_ids"]
            results.append(
                sundae_decode(
                    self._network,
                    checkpoint.model,
                    torch.as_tensor(source, device=checkpoint.device),
                    steps=self.decode_steps,
                    temperature=self.decode_temperature,
                    update_share=self.update_share,
                    lengths=self.candidate_lengths,
                    samples=self.drafts,
                    start=self.draft_start,
                    seed=seed + number,
                )
            )
        return results


__all__ = [
    "ApplyPretrained",
    "CacheOptimizer",
    "conditional_beam_search",
    "exact_mode",
    "hso_classify",
    "hso_prefill",
    "hso_score",
]
