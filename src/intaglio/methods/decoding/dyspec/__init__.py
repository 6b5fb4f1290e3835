"""DySpec (Xiong et al., World Wide Web Journal 2025): a draft tree that grows where it expects to be accepted.

    model.generate(**inputs, custom_generate=DySpec(draft=small, budget=32))

- `growth.py`: the two algorithms: a heap of slots, and a threshold level by level
- `residual.py`: a distribution without the tokens of earlier siblings
- `acceptance.py`: the optional acceptance estimate, learnt during the run or beforehand
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Field, InstanceOf, PrivateAttr, WithJsonSchema, model_validator
from pydantic.json_schema import SkipJsonSchema
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from intaglio.checkpoint import Checkpoint, load
from intaglio.data.texts import load_texts
from intaglio.errors import IntaglioError
from intaglio.methods.decoding.dyspec.calibration import Acceptance, AcceptanceTable, count_acceptance
from intaglio.methods.decoding.dyspec.residual import Residual
from intaglio.methods.decoding.dyspec.tree_growth import TreeGrower
from intaglio.speculative._utils import context_length, vocabulary_size
from intaglio.speculative.decoder_mixin import SpeculativeDecoder, tokenizer_of
from intaglio.speculative.drafters.draft_model import open_draft
from intaglio.speculative.drafters.dynamic_tree import (
    Draft,
    DraftStats,
    DynamicTreeSession,
    Growth,
    PartialTree,
    draft_probs_fn,
    probs_fn,
)
from intaglio.speculative.drafters.ngrams import NGramStore
from intaglio.speculative.drafters.rank_statistics import Text, continuation_probs
from intaglio.speculative.protocols import DecodingRun, Session, Step

_ACCEPTED = "a model's name or directory, a model, a checkpoint, an n-gram store or the file of one"
_PAPER_TEMPERATURE = 0.6
_BUDGET = 15


def _read_draft(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, (str, PreTrainedModel, Checkpoint, NGramStore)):
        raise ValueError(f"a draft cannot be {type(value).__name__}; accepted: {_ACCEPTED}")
    if value == "":
        raise ValueError(f"the draft is empty; accepted: {_ACCEPTED}")
    return value


def _read_table(value: Any) -> Any:
    """Return the content of a JSON file if a path is given."""
    if not isinstance(value, (str, os.PathLike)):
        return value
    try:
        return json.loads(Path(value).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the table {str(value)!r}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError(f"{str(value)!r} is no JSON file with a table from fit_acceptance") from None


class DySpec(SpeculativeDecoder, slug="dyspec"):
    """Spend a budget of nodes where a draft's own probabilities predict that they will be accepted.

    A *slot* is a position for one more child of a node; its value v is the estimated probability that verification
    reaches it, 1 for the first below the last token emitted. Filling it with a token y, where R is the draft's
    distribution D at the node without the tokens of its earlier children, gives two slots:

        the first child of y:       v R[y]
        the next child of the node: v (1 - R[y])

    *heap* (algorithm 1): fill the most valuable slot of the tree until it has `budget` nodes. A slot is worth no
    more than the one that it came from, so this is the tree with the largest sum of values.

    *threshold* (algorithm 2): level by level, fill every slot with v >= `threshold`; at most `budget` nodes. One draft
    pass a level: for large budgets.

    One pass of the target verifies the tree. Under sampling, tokens are drawn from R, and verified against the very
    same D (`verify.sampling`, without replacement), so the output has the target's distribution; a greedy
    target's output is its own, token by token.

    Differences from the paper: the slots of algorithm 1 are found level by level, the same ones in as many draft passes
    as the tree is deep, instead of one for each node. And if the target is greedy, a node's children are by default its
    most likely tokens in order instead of draws; a slot is then worth v R[y], since y is known before it costs
    anything. `DySpec.paper()` draws, as the paper does.

    Args:
        draft: a model's bundled name, directory or hub id, a model or a `Checkpoint` with the target's vocabulary; or
            an `NGramStore` or its `.safetensors` file.
        ngram: `draft` names texts (bundled, a file, a folder, a dataset), over which n-grams are counted at the first
            use. Default false.
        algorithm: `heap` or `threshold`. Default `heap`.
        budget: most drafted nodes of a tree; at most the rest of the context. Default: 15, so that a pass reads 16
            tokens, or the rest of the context; paper 64.
        threshold: (threshold) least value of a slot, above 0, at most 1. Default: 1 / `budget`; paper 0.001 at 768
            nodes.
        depth: most drafted tokens in a row. Default: as many as nodes.
        temperature: of the draft, above 0. Default: the target's if it samples; the paper's 0.6 if it is greedy.
        top_k: of the draft: only the k most likely tokens. Default: the target's if it samples, else all.
        top_p: of the draft: only the smallest set with this probability, above 0, at most 1. Default likewise.
        draw: `sample` draws children from D; `top` takes the most likely (then one draw of the target decides among
            them, which keeps its distribution too); `auto` samples if the target does. Default `auto`; paper `sample`.
        calibrate: use, instead of R[y], how often tokens of such a probability were accepted earlier in the run.
            Not in the paper. Default false.
        carry_over: (calibrate) keep the learnt counts from run to run. Default false.
        acceptance: counts from `fit_acceptance`, or a JSON file of them, used likewise from the first step on; with
            `calibrate`, learnt counts are added to them. Not in the paper. Default: none.
        order: of the nodes in the pass: `grown`, or `blocks`: depth first, so that a block-sparse attention kernel can
            skip blocks. Default `grown`.
        seed: of the draws for a greedy target, for each row apart. Default 0.
        tokenizer: the target's, to compare with the draft's and to read texts with. Default: the one beside the
            target's weights.

    Raises:
        IntaglioError: (at the first use) a draft that cannot be loaded, has another tokenizer or vocabulary or too
            short a context, a budget beyond the rest of the context, and all that `Speculative` refuses.

    Source: Xiong, Zhang, Li, Wu and Zou, DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure, World
    Wide Web Journal 2025, arXiv 2410.11744, algorithms 1 to 3. Its printed algorithm 2 continues while v < t and
    draws from a normal distribution; both are read as misprints.
    """

    kinds = ("decoder", "drafter")
    summary = "grows a draft model's token tree where the draft model expects acceptance; lossless"
    citation = (
        "Xiong et al., DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure, World Wide Web "
        "Journal 2025"
    )
    url = "https://arxiv.org/abs/2410.11744"

    draft: Annotated[Any, BeforeValidator(_read_draft), WithJsonSchema({"type": "string", "minLength": 1})]
    ngram: bool = False
    algorithm: Literal["heap", "threshold"] = "heap"
    budget: Annotated[int, Field(ge=1, le=4096)] | None = None
    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    depth: Annotated[int, Field(ge=1, le=4096)] | None = None
    temperature: Annotated[float, Field(gt=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    draw: Literal["auto", "sample", "top"] = "auto"
    calibrate: bool = False
    carry_over: bool = False
    acceptance: Annotated[AcceptanceTable | None, BeforeValidator(_read_table)] = None
    order: Literal["grown", "blocks"] = "grown"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    tokenizer: SkipJsonSchema[InstanceOf[PreTrainedTokenizerBase] | None] = Field(None, exclude=True, repr=False)

    _opened: tuple[Any, Any] | None = PrivateAttr(None)
    _calls: DraftStats = PrivateAttr(default_factory=DraftStats)
    _learnt: Acceptance = PrivateAttr()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.threshold is not None and self.algorithm != "threshold":
            raise ValueError("threshold belongs to algorithm: threshold; the heap stops at the budget")
        if self.ngram and not isinstance(self.draft, str):
            raise ValueError("ngram counts over texts that draft names; give it their name")
        if self.carry_over and not self.calibrate:
            raise ValueError("carry_over keeps what calibrate learns; give both")
        self._learnt = Acceptance(self.acceptance)
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the paper's constants: 64 nodes, draws at temperature 0.6; for the threshold 768 nodes and 0.001."""
        large = overrides.get("algorithm") == "threshold"
        constants: dict[str, Any] = {"budget": 64, "temperature": _PAPER_TEMPERATURE, "draw": "sample"}
        return cls(**constants | ({"budget": 768, "threshold": 0.001} if large else {}) | overrides)

    @property
    def calls(self) -> DraftStats:
        """Work of the draft in the last `generate` call."""
        return self._calls

    def start(self, run: DecodingRun) -> Session:
        """Start a run; see `Drafter.start`.

        Raises:
            IntaglioError: a draft or a budget that does not fit.
        """
        budget = self._budget(run)
        draft = open_draft(self._open(run.model), run)
        self._calls = draft.calls
        return _Session(self, run, draft, budget, self._learnt if self.carry_over else Acceptance(self.acceptance))

    def fit_acceptance(self, target: Any, texts: Sequence[Text]) -> AcceptanceTable:
        """Count, in the draft's order of a node's children, how often tokens of each probability are the right ones.

            table = decoder.fit_acceptance(model, texts)
            DySpec(draft=small, acceptance=table)
            Path("table.json").write_text(table.model_dump_json())      # and then acceptance="table.json"

        One pass of the draft per text. At each of the target's tokens, as many children as the budget allows are tried.

        Args:
            target: a causal language model.
            texts: token ids that it generated greedily, each with the number of prompt tokens in front.

        Raises:
            IntaglioError: no texts, one without a prompt or without a continuation, or a draft that cannot be loaded.
        """
        draft = self._open(target)
        to_probs = probs_fn(self._draft_temperature(False), self.top_k, self.top_p)
        draws = torch.Generator(target.device).manual_seed(self.seed)
        return count_acceptance(
            ((continuation_probs(draft, text, to_probs), text[0][text[1] :]) for text in texts),
            self.budget or _BUDGET,
            lambda probs_V: Residual(probs_V, self.draw == "sample", draws),
        )

    def _draft_temperature(self, sampling: bool) -> float | None:
        """Return the draft's temperature; None for the target's."""
        return _PAPER_TEMPERATURE if self.temperature is None and not sampling else self.temperature

    def _budget(self, run: DecodingRun) -> int:
        """Return the budget, checked against the rest of the context."""
        context = context_length(run.model)
        longest = max(map(len, run.prompts))
        left = None if context is None else context - longest
        if self.budget is None:
            return _BUDGET if left is None else min(_BUDGET, left)
        if left is not None and self.budget > left:
            raise IntaglioError(
                f"the budget is {self.budget} nodes; a prompt of {longest} tokens leaves room for {left} in the "
                f"context of {context}"
            )
        return self.budget

    def _open(self, target: Any) -> Any:
        """Return the draft as a model or a store, loaded once for a target."""
        if isinstance(self.draft, (PreTrainedModel, NGramStore)):
            return self.draft
        if self._opened is None or self._opened[0] is not target:
            self._opened = target, self._load(target)
        return self._opened[1]

    def _load(self, target: Any) -> Any:
        if self.ngram:
            texts, tokenizer = load_texts(self.draft), self.tokenizer or tokenizer_of(target)
            if tokenizer is None:
                raise IntaglioError(
                    f"the draft {self.draft!r} is text and the target's tokenizer is not known; give tokenizer="
                )
            ids = tokenizer(list(texts.documents), add_special_tokens=False, verbose=False)["input_ids"]
            return NGramStore.build(ids, vocabulary_size(target))
        if isinstance(self.draft, str) and self.draft.endswith(".safetensors"):
            return NGramStore.load(self.draft)
        draft = self.draft
        if not isinstance(draft, Checkpoint):
            draft = load(draft, device=target.device, dtype=target.dtype)
        own, wanted = draft.tokenizer, self.tokenizer or tokenizer_of(target)
        if own is not None and wanted is not None and own.get_vocab() != wanted.get_vocab():
            raise IntaglioError(
                f"the draft model {draft.source} has another tokenizer than the target; a draft model has the target's"
            )
        return draft.model


class _Session(DynamicTreeSession):
    """A run: grows a tree for each row and step, and learns acceptance if `calibrate` is set."""

    def __init__(self, settings: DySpec, run: DecodingRun, draft: Draft, budget: int, acceptance: Acceptance) -> None:
        to_probs = draft_probs_fn(run, settings._draft_temperature(run.sampling), settings.top_k, settings.top_p)
        super().__init__(draft, to_probs, self._begin, depth_first=settings.order == "blocks")
        self._settings = settings
        self._run = run
        self._budget = budget
        self._drawn = settings.draw == "sample" or (settings.draw == "auto" and run.sampling)
        self._acceptance = acceptance
        self._growers: dict[int, TreeGrower] = {}
        # The user's generator is the target's; a greedy target's draft draws from its own.
        self._generators: dict[int, torch.Generator] = {}

    def _begin(self, row: int, tree: PartialTree) -> Growth:
        settings = self._settings
        grower = self._growers[row] = TreeGrower(
            nodes=self._budget,
            depth=min(tree.room, settings.depth or self._budget),
            drawn=self._drawn,
            generator=self._run.generator if self._run.sampling else self._own_generator(row),
            acceptance=self._acceptance if settings.calibrate or settings.acceptance is not None else float,
        )
        if settings.algorithm == "heap":
            return grower.heap(tree)
        return grower.threshold(tree, 1 / self._budget if settings.threshold is None else settings.threshold)

    def _own_generator(self, row: int) -> torch.Generator:
        if row not in self._generators:
            self._generators[row] = torch.Generator(self._run.model.device).manual_seed(self._settings.seed)
        return self._generators[row]

    def observe(self, steps: Sequence[Step]) -> None:
        """See `Session.observe`; learn acceptance if `calibrate` is set."""
        for step in steps if self._settings.calibrate else ():
            if step.tree is not None:
                shares = [self._growers[step.row].shares[node] for node in self.order_of(step.row)]
                self._acceptance.learn(step.tree, step.path, step.tokens, step.drafted, shares)
        super().observe(steps)


__all__ = ["AcceptanceTable", "DySpec"]
