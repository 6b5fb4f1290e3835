"""Infilling by a model: prompts of holes, their answers, and the middle lines of texts by which it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.data.infill_format import Sentinels, check_holes, infill_format
from intaglio.errors import IntaglioError
from intaglio.measures.generated_text import greedy_answers

SHOWN, ANSWER = 400, 32
"""Most characters on each side of a middle line, most tokens of its answer."""


def middle_line(text: str) -> tuple[str, str, str] | None:
    """Return the line nearest to the middle of a text that has at least 8 letters, with the text on both sides."""
    lines = text.splitlines(keepends=True)
    order = sorted(range(1, len(lines) - 1), key=lambda index: (abs(2 * index - len(lines)), index))
    index = next((index for index in order if len(lines[index].strip()) >= 8), None)
    if index is None:
        return None
    line = lines[index].rstrip("\n")
    return "".join(lines[:index])[-SHOWN:], line, lines[index][len(line) :] + "".join(lines[index + 1 :])[:SHOWN]


def with_line_break(prefix: str, line: str, suffix: str) -> tuple[str, str, str]:
    """Return a hole that begins at the end of the text before it, with the line break and the indentation inside.

    Tokenizers of code join a line break and the indentation after it, so that a prefix that ends in a line break ends
    in tokens that are rarely followed by an indented line.
    """
    before = prefix.rstrip() or prefix
    return before, prefix[len(before) :] + line, suffix


def fitted_hole(checkpoint: Checkpoint, prefix: str, line: str, suffix: str) -> tuple[str, str, str]:
    """Return a hole with no more text around it than the context has room for."""
    tokens = len(checkpoint.tokenizer(prefix + suffix, verbose=False)["input_ids"])
    share = min(1.0, 0.9 * (checkpoint.context - ANSWER - 8) / max(1, tokens))
    return prefix[len(prefix) - int(share * len(prefix)) :], line, suffix[: int(share * len(suffix))]


def line_in_hole(checkpoint: Checkpoint, prefix: str, suffix: str) -> str:
    """Return the text that a model fills in; of a model without sentinels, its continuation of the line."""
    if Sentinels.from_tokenizer(checkpoint.tokenizer) is not None:
        return infill(checkpoint, [prefix, suffix], max_new_tokens=ANSWER)[0]
    ids = checkpoint.tokenizer(prefix, return_tensors="pt", verbose=False)["input_ids"].to(checkpoint.device)
    answer = greedy_answers(checkpoint, ids, ANSWER)[0]
    text = answer.lstrip()
    return answer[: len(answer) - len(text)] + text.partition("\n")[0]


@torch.no_grad()
def line_log_probabilities(checkpoint: Checkpoint, prefix: str, line: str, suffix: str) -> Tensor:
    """Return the log-probability of each token of a line in a hole, float32 [T], in nats.

    A model without sentinels sees the prefix alone.
    """
    tokenizer: Any = checkpoint.tokenizer
    line_T = tokenizer(line, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    if Sentinels.from_tokenizer(tokenizer) is None:
        prompt_1T = tokenizer(prefix, return_tensors="pt", verbose=False)["input_ids"]
    else:
        prompt_1T, _ = infill_prompt(checkpoint, [prefix, suffix], max_new_tokens=len(line_T))
    ids_1T = torch.cat([prompt_1T, line_T[None]], 1).to(checkpoint.device)
    model: Any = checkpoint.model
    log_probs_TV = model(input_ids=ids_1T).logits[0, prompt_1T.shape[1] - 1 : -1].float().log_softmax(-1)
    return log_probs_TV.gather(-1, line_T.to(checkpoint.device)[:, None])[:, 0].cpu()


def _until(ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    return list(takewhile(lambda token: token not in stops, ids))


def infill_prompt(
    checkpoint: Checkpoint, pieces: Sequence[str], *, max_new_tokens: int, answers: Sequence[Sequence[int]] = ()
) -> tuple[Tensor, dict[str, Any]]:
    """Return the prompt of the next hole, int64 [1, T], and the arguments of `generate` by which it ends at `<eom>`.

    Args:
        checkpoint: a model trained by `codegen2`, or with fill-in-the-middle tokens.
        pieces: the text around the holes: two, a prefix and a suffix, for one hole.
        max_new_tokens: room for the answer.
        answers: token ids of the earlier holes' answers. Default: none.

    Raises:
        IntaglioError: the model cannot fill holes or not so many, or the text is too long for its context.
    """
    form = infill_format(checkpoint.tokenizer, checkpoint.source)
    check_holes(form, pieces)
    # Text that spells a special token is ordinary text; only the first piece may begin with a begin-of-text token.
    tokens = [
        checkpoint.tokenizer(
            piece, add_special_tokens=index == 0, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]
        for index, piece in enumerate(pieces)
    ]
    if tokens[0][-1:] == [checkpoint.tokenizer.eos_token_id]:
        tokens[0] = tokens[0][:-1]
    prompt = form.prompt(tokens, answers)
    if len(prompt) + max_new_tokens > checkpoint.context:
        raise IntaglioError(
            f"the prefix is {len(tokens[0])} tokens and the text after it {len(prompt) - len(tokens[0])}; with"
            f" max_new_tokens, {max_new_tokens}, they must fit in the context of {checkpoint.context}"
        )
    settings = getattr(checkpoint.model, "generation_config", None)
    known = getattr(settings, "eos_token_id", None)
    stops = {form.end, checkpoint.tokenizer.eos_token_id, *([known] if isinstance(known, int) else known or ())}
    banned = {*(getattr(settings, "suppress_tokens", None) or ()), *form.added} - stops
    ending = {"eos_token_id": sorted(stops), "pad_token_id": checkpoint.tokenizer.eos_token_id}
    return torch.tensor([prompt]), {**ending, "suppress_tokens": sorted(banned)}


def infill(checkpoint: Checkpoint, pieces: Sequence[str], *, max_new_tokens: int = 128, **options: Any) -> list[str]:
    """Fill the holes between pieces of text, in order, each with the earlier answers in its prompt.

    Args:
        checkpoint: a model trained by `codegen2`, or with fill-in-the-middle tokens.
        pieces: the text around the holes: two, a prefix and a suffix, for one hole.
        max_new_tokens: most tokens of an answer. Default 128.
        **options: further arguments of `generate`. Default: greedy.

    Returns:
        The text of each hole.

    Raises:
        IntaglioError: as `infill_prompt`.
    """
    answers: list[list[int]] = []
    model: Any = checkpoint.model
    while not answers or len(answers) < len(pieces) - 1:
        ids, stopping = infill_prompt(checkpoint, pieces, max_new_tokens=max_new_tokens, answers=answers)
        ids = ids.to(checkpoint.device)
        given = {"do_sample": False, "max_new_tokens": max_new_tokens, **stopping, **options}
        new = model.generate(ids, attention_mask=torch.ones_like(ids), **given)[0, ids.shape[1] :].tolist()
        answers.append(_until(new, given["eos_token_id"]))
    return [checkpoint.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
