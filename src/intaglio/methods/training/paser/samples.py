"""What is looked at of an example: its tokens, cut as they would be trained on, and its words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.trainer.causal_lm import row_length
from intaglio.trainer.dataset import as_ids
from intaglio.trainer.instruction_data import NAMES, prompt_and_answer, tokenize_pair
from intaglio.trainer.protocols import Example


@dataclass(frozen=True)
class Sample:
    """An example, read.

    Args:
        prompt: token ids of what is asked; empty where the example is a plain text.
        answer: token ids of what is learnt, the token that ends it among them; of a plain text all of its tokens.
        tokens: that are trained on, prompt and answer, before anything is cut.
        instruction: what is asked, in words; a plain text itself.
        words: all of it.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    tokens: int
    instruction: str
    words: str


def read_samples(
    examples: Sequence[Example], checkpoint: Checkpoint, length: int | None, *, chat: bool
) -> list[Sample]:
    """Read examples as they will be trained on.

    Args:
        examples: pairs, texts or token ids.
        checkpoint: its tokenizer is used.
        length: most tokens that are scored of an example; None: the model's context, at most 1,024. Of a pair the end
            of the answer goes, and the beginning of a prompt that takes more than half.
        chat: whether prompts are put into the tokenizer's chat template, if it has one.

    Raises:
        IntaglioError: an example is malformed, its prompt leaves no room for an answer in the model's context, or it is
            token ids without a tokenizer that could read them.
    """
    most = row_length(checkpoint, length)
    return [_read(checkpoint, example, number, most, chat) for number, example in enumerate(examples)]


def _read(checkpoint: Checkpoint, example: Example, number: int, most: int, chat: bool) -> Sample:
    what = f"example {number} of the training data"
    if any(question in example and reply in example for question, reply in NAMES):
        question, reply = prompt_and_answer(example, what)
        asked, said, stop = tokenize_pair(checkpoint, example, number, row_length(checkpoint, None), chat=chat)
        learnt = [*said, *stop]
        kept = learnt[: max(most - len(asked), most // 2)]
        prompt = asked[max(0, len(asked) + len(kept) - most) :]
        return Sample(tuple(prompt), tuple(kept), len(asked) + len(learnt), question, f"{question}\n{reply}")
    if "input_ids" not in example:
        known = ", ".join(sorted(key for key in example if key != "id")) or "nothing"
        raise IntaglioError(f"{what} is neither a pair nor a text; it has: {known}")
    ids = as_ids(example["input_ids"], what)
    checkpoint.check_ids(ids[:most])
    text = example.get("text")
    if text is None and checkpoint.tokenizer is None:
        raise IntaglioError(f"{what} is token ids alone, and there is no tokenizer that could tell what they say")
    if text is None:
        text = checkpoint.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
    return Sample((), tuple(ids[:most].tolist()), len(ids), text, text)
