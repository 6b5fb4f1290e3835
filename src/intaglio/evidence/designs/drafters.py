"""Drafters that arms of `Replay` use: functions `(context, **settings) -> Drafter`.

Trained heads (`trained_heads`, `medusa`): a unit is a training of the heads, measured on all prompts. Every arm is
trained on the same text, which the target itself generated after the first tokens of training texts, for the same
number of steps, and verifies trees of as many nodes made from its own acceptance on held-out texts of that kind. Heads
are stored in bfloat16 and cached by choices.

Dimension letters: V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.attachments import Attachment, read_attachments
from intaglio.errors import IntaglioError
from intaglio.evidence.designs.replay import BEFORE_LOOP, TOKENS, Context, Text, continuations
from intaglio.evidence.testbeds.cache import cached, digest, preparation
from intaglio.evidence.testbeds.draft_model import DraftModelBed
from intaglio.evidence.testbeds.source_code import TOY, SourceCode
from intaglio.methods.decoding.aded import ADED
from intaglio.methods.decoding.dyspec import AcceptanceTable, DySpec
from intaglio.speculative.drafters.draft_model import DraftModel
from intaglio.speculative.drafters.medusa import Medusa, MedusaHeads
from intaglio.speculative.drafters.prompt_lookup import PromptLookup
from intaglio.speculative.drafters.rank_statistics import acceptance_by_rank, draft_ranks
from intaglio.speculative.heads.base import TrainedHeads, split, stored
from intaglio.speculative.heads.objective import measure_acceptance, train_heads
from intaglio.speculative.heads.self_generated_data import extract_prompts, generate_corpus
from intaglio.speculative.protocols import Drafter
from intaglio.speculative.static_tree import StaticTree, best_tree, widths_within
from intaglio.trainer.protocols import Example

NODES = 15
"""Drafted tokens that an arm may verify in a pass, where its settings have no other number."""
RANKS = 32
"""Candidates of a draft model that are counted; no node of a fitted tree has more children."""
FITTED_UNITS = 8
"""Units of the training set that fixed trees and acceptance tables are fitted on."""
BATCH = 8
"""Texts of a step in the training of heads."""
Tree = Literal["best", "widths", "chain"]
HEADS_CLAIM: dict[str, Any] = {
    "metric": TOKENS,
    "delta": 0.1,
    "unit_names": ("training of heads",),
    "looks": (5,),  # a training takes minutes
    "tune": {"learning_rate": (3e-4, 1e-3, 3e-3)},
    "metrics": (BEFORE_LOOP,),
    "equal": ("tokens",),
    "minutes": 60,
    "otherwise": "Medusa heads",
}
"""Fields that claims about trained heads share."""
HEADS_PARITY = (
    f"Equal parameters to within one percent, the same training text and steps, trees of {NODES} nodes made from the"
    " heads' own acceptance on held-out texts."
)


def prompt_lookup(context: Context, nodes: int = NODES, candidates: int = 1, length: int = NODES) -> PromptLookup:
    """Return prompt lookup: up to `candidates` continuations of the longest match, merged into a tree."""
    return PromptLookup(nodes=nodes, candidates=candidates, length=length)


def aded(context: Context, nodes: int = NODES, **fields: Any) -> Any:
    """Return ADED with every pass's nodes used; its table is counted in the test bed's training texts."""
    table = _table(context.bed)
    # Without costs: what is unlikely is verified too, as prompt lookup does.
    return ADED(nodes=nodes, draft_cost=0.0, token_cost=0.0, **fields).model_copy(
        update={"corpus": table, "tokenizer": context.target.tokenizer}
    )


@lru_cache(maxsize=2)
def _table(bed: Any) -> Any:
    target = bed.load()
    return ADED(corpus=bed.corpus(), tokenizer=target.tokenizer).table(target.model)


def fixed_tree(context: Context, nodes: int = NODES, tree: Tree = "best", draft: Any = None) -> DraftModel:
    """Return a draft model with the fixed tree that takes the fewest passes on the training prompts.

    `tree` is `chain`, `widths` (equally many children at every node of a level) or `best`: of these and Sequoia's trees
    of every depth. `draft` is SmolLM2's test bed by default; a small model of bytes drafts for itself.
    """
    draft = draft or _draft_bed(context.bed)
    shape = fitted_tree(context.bed, draft, nodes, tree, context.design.new).parents
    return DraftModel(draft.load().model, shape=shape)


def dyspec(context: Context, nodes: int = NODES, fitted: bool = False, draft: Any = None, **fields: Any) -> Any:
    """Return DySpec; `fitted` counts its chances of acceptance on the prompts that fixed trees are fitted on."""
    draft = draft or _draft_bed(context.bed)
    if fitted:
        fields["acceptance"] = _acceptance(context.bed, draft, nodes, context.design.new)
    return DySpec(draft=draft.load().model, budget=nodes, **fields)


def _draft_bed(bed: Any) -> Any:
    return bed if isinstance(bed, SourceCode) else DraftModelBed()


@lru_cache(maxsize=16)
def fitted_tree(bed: Any, draft: Any, nodes: int, tree: Tree, new: int) -> StaticTree:
    """Return the fixed tree with the fewest passes on the training prompts, counted exactly."""
    if tree == "chain":
        return StaticTree.from_widths((1,) * nodes)
    ranks = _ranks(bed, draft, new)
    trees = [StaticTree.from_widths(widths) for widths in widths_within(nodes)]
    if tree == "best":
        chances = tuple(acceptance_by_rank(ranks, RANKS))
        trees = [*(best_tree(chances, nodes, depth) for depth in (*range(2, 17), nodes)), *trees]
    return min(trees, key=lambda tree: sum(tree.replay(of_text) for of_text in ranks))


@lru_cache(maxsize=4)
def _ranks(bed: Any, draft: Any, new: int) -> list[list[int]]:
    return [draft_ranks(draft.load().model, text) for text in _training_texts(bed, new)]


@lru_cache(maxsize=4)
def _acceptance(bed: Any, draft: Any, nodes: int, new: int) -> AcceptanceTable:
    decoder = DySpec(draft=draft.load().model, budget=nodes)
    return decoder.fit_acceptance(bed.load().model, _training_texts(bed, new))


@lru_cache(maxsize=4)
def _training_texts(bed: Any, new: int) -> list[tuple[list[int], int]]:
    """Return the target's greedy texts after training prompts, each with the first position to draft."""
    target: Checkpoint = bed.load()
    units = (tuple(tuple(p.ids) for p in bed.source("train", index)) for index in range(FITTED_UNITS))
    texts: list[Text] = [text for prompts in units for text in continuations(target, prompts, new, False)]
    # The first new token is the prefill's: no tree is tried for it.
    return [([*text.prompt, *text.new], len(text.prompt) + 1) for text in texts]


@dataclass(frozen=True)
class HeadTraining:
    """Number, prompt and length of the texts that the target generates, and the training that all arms share."""

    texts: int = 400
    prompt: int = 32
    length: int = 160
    steps: int = 300
    batch_size: int = BATCH

    def examples(self, bed: Any) -> list[Example]:
        """Return the text, generated once and cached."""
        target, corpus = bed.load(), bed.part("train")
        prompts = extract_prompts(target, corpus, self.prompt, self.texts)
        if len(prompts) < self.texts:
            raise IntaglioError(f"the training set gives {len(prompts)} prompts; {self.texts} are needed")
        with preparation():
            return generate_corpus(target, prompts, tokens=self.length - self.prompt)


def head_training(bed: Any, batch_size: int = BATCH) -> HeadTraining:
    """Return the training of a test bed's heads, a few steps for one in miniature."""
    return HeadTraining(8, 8, 24, 2, 4) if bed.packages == (TOY,) else HeadTraining(batch_size=batch_size)


def trained_heads(
    context: Context,
    method: TrainedHeads,
    learning_rate: float = 1e-3,
    batch_size: int = BATCH,
    nodes: int = NODES,
    **fields: Any,
) -> Drafter:
    """Return a method's heads, trained with the seed of the unit."""
    training = head_training(context.bed, batch_size)
    chosen = method.model_copy(update={
        **fields, "learning_rate": learning_rate, "steps": training.steps, "batch_size": training.batch_size,
        "length": training.length,
    })  # fmt: skip

    def fit(shadow: Checkpoint, examples: list[Example], scratch: Path) -> Attachment:
        chosen.fit(shadow, examples, seed=context.key.seed, directory=scratch, resume=True)
        (attachment,) = shadow.attachments.values()
        return attachment

    choices = {"method": {method.slug: chosen.model_dump()}}
    attachment = _cached_heads(context, training, choices, fit)
    return cast(Drafter, type(chosen).restore(attachment, context.target, nodes=nodes))


def medusa(
    context: Context,
    like: TrainedHeads,
    heads: int,
    goal: str = "text",
    decay: float = 1.0,
    learning_rate: float = 1e-3,
    batch_size: int = BATCH,
    nodes: int = NODES,
) -> Medusa:
    """Return Medusa heads with as many parameters as a method's, trained with the seed of the unit."""
    training = head_training(context.bed, batch_size)
    target, examples, seed = context.target, training.examples(context.bed), context.key.seed
    tokens_K = like.words(target, examples)
    budget = sum(p.numel() for p in like.make(target.model, seed, tokens_K).parameters())
    sizes = medusa_sizes(target.model, heads, budget, None if tokens_K is None else len(tokens_K))

    def new() -> MedusaHeads:
        return MedusaHeads(target.model, heads=heads, goal=goal, decay=decay, tokens_K=tokens_K, seed=seed, **sizes)  # type: ignore[arg-type]

    def fit(shadow: Checkpoint, examples: list[Example], scratch: Path) -> Attachment:
        module = new()
        trained_on, held_out = split(examples)
        train_heads(
            shadow, module, trained_on, settings={"medusa": {**sizes, "goal": goal, "decay": decay}},
            length=training.length, directory=scratch, resume=True, steps=training.steps,
            batch_size=training.batch_size, learning_rate=learning_rate, warmup=0.01, seed=seed,
        )  # fmt: skip
        chances = measure_acceptance(shadow, module, held_out, training.length)
        return Attachment("medusa", stored(module), {}, 0, {"chances": chances})

    choices = {"medusa": {**sizes, "heads": heads, "goal": goal, "decay": decay, "learning_rate": learning_rate}}
    attachment = _cached_heads(context, training, choices, fit)
    module = new()
    module.load_state_dict(attachment.tensors)
    return Medusa(module, best_tree(attachment.about["chances"], nodes))


def _cached_heads(context: Context, training: HeadTraining, choices: dict[str, Any], fit: Any) -> Attachment:
    target = context.target
    examples = training.examples(context.bed)
    key = {
        **choices,
        "training": asdict(training),
        "text": digest([list(map(int, example["input_ids"])) for example in examples]),
        "seed": context.key.seed,
    }

    def build(folder: Path, scratch: Path) -> None:
        attachment = fit(Checkpoint(target.model, target.tokenizer, target.source), examples, scratch)
        (folder / "attachments").mkdir()
        attachment.write(folder / "attachments")

    (attachment,) = read_attachments(cached("draft_heads", key, build)).values()
    return attachment


def medusa_sizes(model: Any, heads: int, budget: int, vocabulary: int | None = None) -> dict[str, int]:
    """Return layers and rank of Medusa heads with nearly as many parameters as a budget allows, and no more.

    As many layers as fit beside an output change of rank 32 if the budget allows one; the rest widens the rank.
    """
    weight_VD: Tensor = model.get_output_embeddings().weight
    rows, width = weight_VD.shape
    layer, rank = heads * (width**2 + width), (vocabulary or rows) + heads * width
    reserved = 32 * rank if budget - layer >= 32 * rank else 0
    layers = max(1, (budget - reserved) // layer)
    return {"layers": int(layers), "rank": int(max(0, (budget - layers * layer) // rank))}
