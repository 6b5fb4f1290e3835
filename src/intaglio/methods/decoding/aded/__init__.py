"""ADED (Liu et al., AAAI 2025): lossless drafting by tree search over a tri-gram table that adapts while decoding.

model.generate(**inputs, custom_generate=ADED(corpus=texts))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BeforeValidator, Field, InstanceOf, PrivateAttr, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema
from transformers import PreTrainedTokenizerBase

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.attachments import Attachment
from intaglio.data.texts import Corpus
from intaglio.errors import IntaglioError
from intaglio.methods.base import Cost, Progress, Workload, no_progress
from intaglio.methods.decoding.aded.adaptive_table import AdaptiveTable
from intaglio.methods.decoding.aded.build import count_tokens, make_table, read_corpus
from intaglio.methods.decoding.aded.search import (
    best_first,
    full,
    greedy,
    mcts,
    most_visited,
    path_probs,
    trim,
)
from intaglio.methods.decoding.aded.trigram_table import ENTRIES, Table
from intaglio.speculative._utils import vocabulary_size
from intaglio.speculative.decoder_mixin import SpeculativeDecoder, tokenizer_of
from intaglio.speculative.pass_cost import FIXED, DraftPruner, PassCosts
from intaglio.speculative.protocols import DecodingRun, Session, Step
from intaglio.speculative.tree import TokenTree, root_only, trie

_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "minItems": 1, "items": {"type": "array", "items": {"type": "integer"}}}
_CORPUS = {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": {"type": "string"}}, _IDS, {"type": "null"}]}
_LEARNT = 100_000
"""Most learnt rows kept from run to run."""


class ADED(SpeculativeDecoder, slug="aded"):
    """Draft from a table M[(a, b)][c] of how likely c follows a, b; the target verifies, and updates the table.

    Every step, with s the tokens so far, the last one x* not yet read by the target:

    1. *Adapt.* For each tri-gram inside the last `window` tokens of s: M[(s_i, s_i+1)][s_i+2] += `boost`, at most
       `cap`.
    2. *Search* from the key (s_-2, x*), `iterations` times: descend by the largest

           PUCT = S/n + (c1 + ln((N + c2 + 1) / c2)) p sqrt(N) / (1 + n)        (infinite where n = 0)

       (S: sum of rewards, n: visits, p = M[parent's key][token], N: the parent's visits) down to a node that has no
       children yet or lies `length` keys deep; add all of its successors as children and continue in the last; from
       there draw tokens in proportion to M. The reward, 1 + the sum of M along the path, goes to the whole path.
    3. *Draft.* The `candidates` most visited nodes are candidate continuations, each with its most likely next token.
       They are trimmed and merged into a tree of at most `nodes` tokens. Of these, one pass of the target verifies as
       many as are expected to be worth their cost.

    The output is the target's own, whatever the table holds. The table of the corpus never changes: learnt rows belong
    to one row of one run (or to this object, with `carry_over`).

    The defaults are scaled to small targets on a CPU, where a pass over 16 tokens costs 1.5 to 2 passes over one: at
    most 15 nodes, and no more than are expected to be worth the cost of passes as it was measured on the processor at
    hand (`token_cost`; on a GPU, where rows cost nothing, set it to 0). A small tree holds few
    branches, so it goes deeper (`length`), and new text has to outrank the corpus sooner (`boost`). The whole prompt is
    learnt from, not only its end (`prompt`), and a successor seen once in the corpus is not certain (`discount`).
    `ADED.paper()` has the constants of the paper and its released code.

    Args:
        corpus: source of M: the name of a bundled corpus, a text file or a folder; a list of texts; a list of
            sequences of token ids; a `Table` or the file of one. Read at the first use. Default: none, so M holds only
            learnt rows.
        entries: most entries of the table; the rarest are dropped. Default 2,000,000 (at most 48 MB).
        discount: added to a row's total when the weights are computed: in a small corpus a successor seen once is not
            certain. Default 1; paper 0.
        top: successors of a row taken from the corpus, without renormalising; learnt rows may have more. Default 12.
        adaptive: whether the table learns. Default true.
        prompt: number of boosts for every tri-gram of the prompt before the first step. Default 3; paper 0: only the
            window at the end of the prompt is learnt.
        window: tokens whose tri-grams are boosted at a step. Default 16.
        boost: added to the weight of a tri-gram. Default 0.2; paper 0.04.
        cap: the largest weight by boosts. Default 3.
        carry_over: keep learnt rows from run to run, the newest 100,000. Default false.
        search: `mcts`; or a baseline: `greedy` (one chain), `full` (the whole table, level by level) or `best` (best
            first by the product of the probabilities). Default `mcts`.
        reward: `path` as above, or `official`: the released code looks up the token that the key already ends in, so
            nearly every reward is 1. Default `path`.
        iterations: iterations of the search. Default 64; paper 150.
        length: longest path in keys, root included, and so the longest draft in tokens. Default 8; paper 4.
        c1: weight of the priors. Default 32.
        c2: visits after which that weight begins to grow. Default 8.
        candidates: nodes taken from the search. Default 24.
        trim: `visits`: the candidates are merged in the order of their visits until there are `nodes`; `distinct`:
            candidates with many distinct tokens are dropped until these sum to `choices`, then the shortest are merged
            first, as in the paper. Default `visits`.
        choices: that sum under `trim: distinct`. Default 64.
        nodes: most drafted tokens of a tree. Default 15; paper 64.
        draft_cost: cost that any draft adds to a pass, in passes over one token. Default 0; without
            `prepack` about 0.35.
        token_cost: cost that each drafted token adds to a pass, in passes over one token, once for each row that shares
            the pass. The part of the tree with the most tokens expected by the table for the cost of its pass is
            verified, possibly none. The expectation is scaled by how much of it came true in the last steps. Default:
            as measured for passes of 1 to 16 tokens (`speculative.pass_cost`), 0.035 where nothing is measured; paper
            0: the whole tree.
        seed: seed of the search's draws, which differ by row. Default 0.
        tokenizer: tokenizer of the target, for a corpus of texts. Default: the one beside the target's weights.

    Raises:
        IntaglioError: (at the first use) a corpus of another tokenizer or vocabulary, texts without a tokenizer, and
            all that `Speculative` refuses.

    Source: Liu, Lei, Zhang and Xu, Adaptive Draft-Verification for Efficient Large Language Model Decoding, AAAI 2025,
    arXiv 2407.12021, with the released code's constants. Sampling verifies one draw per node (`verify.sampling`), so
    the output has the target's distribution.
    """

    kinds = ("decoder", "drafter")
    summary = "drafts by tree search over a tri-gram table updated from the target's output; lossless"
    citation = "Liu et al., Adaptive Draft-Verification for Efficient Large Language Model Decoding, AAAI 2025"
    url = "https://arxiv.org/abs/2407.12021"
    fitted = True

    corpus: Annotated[Any, BeforeValidator(read_corpus), WithJsonSchema(_CORPUS)] = None
    entries: Annotated[int, Field(ge=1, le=100_000_000)] = ENTRIES
    discount: Annotated[float, Field(ge=0, le=1000)] = 1.0
    top: Annotated[int, Field(ge=1, le=10_000)] = 12
    adaptive: bool = True
    prompt: Annotated[int, Field(ge=0, le=10_000)] = 3
    window: Annotated[int, Field(ge=3, le=10_000)] = 16
    boost: Annotated[float, Field(gt=0, le=100)] = 0.2
    cap: Annotated[float, Field(gt=0, le=100)] = 3.0
    carry_over: bool = False
    search: Literal["mcts", "greedy", "full", "best"] = "mcts"
    reward: Literal["path", "official"] = "path"
    iterations: Annotated[int, Field(ge=1, le=100_000)] = 64
    length: Annotated[int, Field(ge=1, le=64)] = 8
    c1: Annotated[float, Field(ge=0, le=1e6)] = 32.0
    c2: Annotated[float, Field(gt=0, le=1e6)] = 8.0
    candidates: Annotated[int, Field(ge=1, le=10_000)] = 24
    trim: Literal["visits", "distinct"] = "visits"
    choices: Annotated[int, Field(ge=1, le=10_000)] = 64
    nodes: Annotated[int, Field(ge=1, le=1024)] = 15
    draft_cost: Annotated[float, Field(ge=0, le=100)] = 0.0
    token_cost: Annotated[float, Field(ge=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    tokenizer: SkipJsonSchema[InstanceOf[PreTrainedTokenizerBase] | None] = Field(None, exclude=True, repr=False)

    _table: Table | None = PrivateAttr(None)
    _learnt: dict[int, dict[int, float]] = PrivateAttr(default_factory=dict)

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the constants of the paper and its released code."""
        constants: dict[str, Any] = {
            "discount": 0.0, "top": 12, "prompt": 0, "window": 16, "boost": 0.04, "cap": 3.0, "iterations": 150,
            "length": 4, "c1": 32.0, "c2": 8.0, "candidates": 24, "trim": "distinct", "choices": 64, "nodes": 64,
            "draft_cost": 0.0, "token_cost": 0.0,
        }  # fmt: skip
        return cls(**constants | overrides)

    def start(self, run: DecodingRun) -> Session:
        """Start a run; see `Drafter.start`.

        Raises:
            IntaglioError: the corpus cannot be read, or is another tokenizer's.
        """
        table, learnt = self.table(run.model), self._learnt if self.carry_over else None
        costs = run.costs() if self.token_cost is None else FIXED
        return ADEDSession([ADEDRow(self, table, prompt, learnt, costs) for prompt in run.prompts])

    def table(self, model: Any) -> Table:
        """Return the table of the corpus for a target, built at the first use and kept."""
        vocabulary = vocabulary_size(model)
        if self._table is None or self._table.vocabulary != vocabulary:
            tokenizer = self.tokenizer
            if tokenizer is None and self.corpus is not None:
                tokenizer = tokenizer_of(model)
            self._table, _ = make_table(self.corpus, vocabulary, tokenizer, self.entries, self.discount)
            self._learnt.clear()
        return self._table

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
        """Build the table and attach it to a checkpoint, whose weights stay unchanged.

        Args:
            checkpoint: a decoder with its tokenizer.
            texts: source of M, unless the field `corpus` is set.
            seed: written to the record; nothing is drawn.
            batch_size: ignored.
            directory: ignored: counting is too fast to be resumed.
            resume: ignored.
            progress: called as texts are read.

        Raises:
            IntaglioError: neither corpus nor texts, or one that cannot be read.
        """
        corpus = read_corpus(texts) if self.corpus is None else self.corpus
        if corpus is None:
            raise IntaglioError("aded has no corpus to count the table in; give it a corpus")
        vocabulary, tokenizer = vocabulary_size(checkpoint.model), self.tokenizer or checkpoint.tokenizer
        table, about = make_table(corpus, vocabulary, tokenizer, self.entries, self.discount, progress)
        named = self.corpus if isinstance(self.corpus, str) else None
        parameters = self.model_dump() | {"corpus": named}
        checkpoint.record_step(
            self.slug,
            parameters,
            seed=seed,
            chosen={**about, "rows": len(table), "entries": len(table.tokens_E), "bytes": table.bytes},
            verb="fit",
        )
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in table.arrays().items()}
        checkpoint.attach(self.slug, tensors, parameters, table.about())
        return checkpoint

    @classmethod
    def restore(cls, attachment: Attachment, checkpoint: Checkpoint, **fields: Any) -> Self:
        """Return the decoder that `fit` attached; `fields` override those of the fit.

        Raises:
            IntaglioError: the attachment is no table.
        """
        arrays = {name: tensor.numpy() for name, tensor in attachment.tensors.items()}
        table = Table.from_arrays(arrays, attachment.about, f"the attachment {attachment.slug}")
        given = {"corpus": table, "tokenizer": checkpoint.tokenizer}
        return cls(**attachment.parameters | given | fields)

    def estimate_fit(self, workload: Workload, texts: Corpus) -> Cost:
        """Estimate reading and counting: a few passes over the corpus's tokens, no matrix product."""
        tokens = count_tokens(texts if self.corpus is None else self.corpus)
        # Tokenising a token takes about as long as a selection over a hundred numbers.
        return Cost(sorted_elements=100.0 * tokens, extra_bytes=24 * min(tokens, 4 * self.entries))


class ADEDSession:
    """A session over all rows."""

    def __init__(self, rows: list[ADEDRow]) -> None:
        self._rows = rows

    def propose(self, rows: Sequence[int], room: Sequence[int]) -> list[TokenTree]:
        """See `Session.propose`."""
        return [self._rows[row].propose(most, len(rows)) for row, most in zip(rows, room, strict=True)]

    def observe(self, steps: Sequence[Step]) -> None:
        """See `Session.observe`."""
        for step in steps:
            self._rows[step.row].observe(step)


class ADEDRow:
    """Drafts for one row.

    Args:
        settings: the method.
        table: of the corpus.
        prompt: token ids.
        learnt: rows learnt earlier, changed in place. Default None: none.
        costs: of passes, where the settings give no `token_cost`. Default: fixed.
    """

    def __init__(
        self,
        settings: ADED,
        table: Table,
        prompt: Sequence[int],
        learnt: dict[int, dict[int, float]] | None = None,
        costs: PassCosts = FIXED,
    ) -> None:
        self.table = AdaptiveTable(table, settings.top, learnt, None if learnt is None else _LEARNT)
        self._settings = settings
        if settings.adaptive and settings.prompt:
            self.table.adapt(prompt, settings.boost * settings.prompt, settings.cap)
        self._ids = list(prompt[-settings.window :])
        self._rng = Random(settings.seed)
        self._pruner, self._costs = DraftPruner(), costs

    def observe(self, step: Step) -> None:
        """Take in the emitted tokens."""
        self._ids = [*self._ids, *step.tokens][-self._settings.window :]
        self._pruner.observe(step.drafted)

    def propose(self, room: int, rows: int = 1) -> TokenTree:
        """Adapt, search and draft at most `room` levels in a pass that `rows` rows share.

        A drafted token adds a slot to every row of the pass, so its cost grows with them.
        """
        settings = self._settings
        if settings.adaptive:
            self.table.adapt(self._ids, settings.boost, settings.cap)
        if room < 1 or len(self._ids) < 2:
            return root_only(self._ids[-1])
        tree = trie(self._ids[-1], self.paths(), settings.nodes)
        if len(tree) == 1 or (settings.token_cost == 0 and not settings.draft_cost):
            return tree
        return self._pruner.prune(tree, path_probs(self.table, self._root, tree), lambda k: self._cost(k, rows))

    def _cost(self, drafted: int, rows: int) -> float:
        """Return the cost of a pass over so many drafted tokens of each row, in passes over the root alone."""
        settings = self._settings
        if settings.token_cost is None:
            return settings.draft_cost + self._costs.cost(1 + drafted, rows)
        return 1 + settings.draft_cost + settings.token_cost * rows * drafted

    @property
    def _root(self) -> int:
        return self._ids[-2] * self.table.vocabulary + self._ids[-1]

    def paths(self) -> list[tuple[int, ...]]:
        """Return the continuations to verify, in the order in which they are merged."""
        settings, table, root = self._settings, self.table, self._root
        if table.row(root) is None:
            return []
        if settings.search == "greedy":
            paths = greedy(table, root, settings.length)
        elif settings.search == "full":
            paths = full(table, root, settings.length, settings.nodes)
        elif settings.search == "best":
            paths = best_first(table, root, settings.length, settings.nodes)
        else:
            tree = mcts(
                table,
                root,
                iterations=settings.iterations,
                length=settings.length,
                c1=settings.c1,
                c2=settings.c2,
                reward=settings.reward,
                rng=self._rng,
            )
            paths = most_visited(table, tree, settings.candidates)
        return trim(paths, settings.choices) if settings.trim == "distinct" else paths


__all__ = ["ADED", "Table"]
