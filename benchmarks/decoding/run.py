"""Decoding: ADED against stock greedy, prompt lookup and assisted generation, alternated on the same prompts.

    python benchmarks/decoding/run.py --out bench-out                 # twenty prompts, 128 new tokens, three repeats
    python benchmarks/decoding/run.py --prompts 4 --repeats 1 --new 32 --modes greedy,aded
    python benchmarks/decoding/run.py --draft none                    # without the modes that need a draft model

Every finished run is a line of `runs.jsonl` in the output directory; a run that is there already is not done again, so
a stopped benchmark goes on where it was. `results.json` and `results.md` are written at the end. Run it on a quiet
machine; on a busy one give `--threads 1`, and speed is told in CPU time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prompts
import table
import torch
import transformers

import intaglio
from intaglio import writer
from intaglio.cli.generating import count_passes
from intaglio.decoding.aded import ADED
from intaglio.decoding.dyspec import DySpec
from intaglio.errors import IntaglioError
from intaglio.evidence.worlds.smollm2_draft import SmolLM2Draft
from intaglio.verify.drafters.draft_model import DraftModel
from intaglio.verify.drafters.lookup import PromptLookup
from intaglio.verify.loop import Speculative

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src" / "intaglio"
# What a run of ours depends on: when one of these changes, finished runs no longer count.
CODE = ("decoding/aded/*.py", "decoding/dyspec/*.py", "verify/**/*.py")
STOCK = ("greedy", "prompt_lookup_num_tokens", "assistant_model")
OURS = ("aded", "aded-best", "aded-no-corpus", "prompt_lookup", "draft_model", "dyspec")
WITH_DRAFT = ("assistant_model", "draft_model", "dyspec")

Run = dict[str, Any]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decoding: ADED against the modes of transformers.")
    parser.add_argument("--model", default="smollm2", help="checkpoint directory or bundled name")
    parser.add_argument("--texts", default="wikipedia", help="bundled name, file or folder")
    parser.add_argument(
        "--draft", default="smollm2-draft", help="directory of a draft model; none leaves out the modes that need one; "
        "default: two layers trained on what SmolLM2 says itself, made once (about 20 minutes) and found again",
    )  # fmt: skip
    parser.add_argument("--modes", default=",".join([*STOCK, *OURS]), help="separated by commas; default: %(default)s")
    parser.add_argument("--prompts", type=int, default=20, help="how many, spread over the four kinds")
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "out")
    return parser.parse_args()


class Journal:
    """The finished runs: one JSON line each.

    Args:
        path: the file; made when the first run is done.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: dict[str, Run] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                # The process was stopped while it wrote the last line: that run is done again.
                print("a half-written line of runs.jsonl is ignored", file=sys.stderr)
                continue
            self.done[entry["key"]] = entry

    def append(self, entry: Run) -> None:
        """Add one finished run.

        Args:
            entry: with its `key`.
        """
        self.done[entry["key"]] = entry
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            if file.tell() and not self._path.read_bytes().endswith(b"\n"):
                file.write("\n")
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _modes(arguments: argparse.Namespace, checkpoint: Any) -> dict[str, Callable[[], dict[str, Any]]]:
    """What each mode hands to `generate`; whatever is slow to make is made once."""
    wanted = arguments.modes.split(",")
    if unknown := sorted({*wanted} - {*STOCK, *OURS}):
        raise IntaglioError(f"the mode {unknown[0]!r} is unknown; accepted: {', '.join([*STOCK, *OURS])}")
    draft = _draft(arguments.draft) if {*wanted} & {*WITH_DRAFT} else None
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "greedy": dict,
        "prompt_lookup_num_tokens": lambda: {"prompt_lookup_num_tokens": 10},
        "assistant_model": lambda: {"assistant_model": draft},
        "aded-no-corpus": lambda: {"custom_generate": ADED()},
        "prompt_lookup": lambda: {"custom_generate": Speculative(PromptLookup())},
        "draft_model": lambda: {"custom_generate": Speculative(DraftModel(draft))},
        "dyspec": lambda: {"custom_generate": DySpec(draft=draft)},
    }
    if {"aded", "aded-best"} & {*wanted}:
        aded = ADED(corpus=prompts.corpus(arguments.texts), tokenizer=checkpoint.tokenizer)
        aded.table(checkpoint.model)
        made["aded"] = lambda: {"custom_generate": aded}
        best = aded.model_copy(update={"search": "best"})
        made["aded-best"] = lambda: {"custom_generate": best}
    return {mode: made[mode] for mode in wanted if draft is not None or mode not in WITH_DRAFT}


def _draft(name: str) -> Any:
    if name == "none":
        return None
    return (SmolLM2Draft().load(_say) if name == "smollm2-draft" else intaglio.load(name)).model


def _say(done: int, total: int, what: str) -> None:
    if done == total or not done % 50:
        print(f"the draft model: {what}, {done} of {total}", file=sys.stderr)


def _run(checkpoint: Any, ids: list[int], new: int, options: dict[str, Any]) -> Run:
    """One call of `generate`, timed."""
    prompt = torch.tensor([ids])
    greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    pad = checkpoint.tokenizer.pad_token_id or checkpoint.tokenizer.eos_token_id or 0
    with count_passes(checkpoint.model) as passes:
        start, begun = time.perf_counter(), time.process_time()
        whole = checkpoint.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, pad_token_id=pad, **greedy, **options
        )
        seconds, cpu = time.perf_counter() - start, time.process_time() - begun
    found = whole[0, len(ids) :].tolist()
    run: Run = {"seconds": seconds, "cpu_seconds": cpu, "new_tokens": len(found), "passes": passes[0], "ids": found}
    statistics = getattr(options.get("custom_generate"), "statistics", None)
    if statistics is not None:
        run |= {
            "passes": statistics.passes,
            "rows": statistics.nodes + statistics.row_passes,
            "accepted_share": statistics.accepted_share,
            "drafting_share": statistics.drafter_seconds / statistics.seconds,
            "loop_share": statistics.loop_seconds / statistics.seconds,
        }
    return run


def _chosen(all_prompts: list[prompts.Prompt], count: int) -> list[prompts.Prompt]:
    """The first prompts of each kind in turn."""
    by_kind = [[prompt for prompt in all_prompts if prompt["kind"] == kind] for kind in prompts.KINDS]
    return [prompt for group in zip(*by_kind, strict=True) for prompt in group][:count]


def _digest(paths: list[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    checkpoint = intaglio.load(arguments.model)
    modes = _modes(arguments, checkpoint)
    code = _digest(sorted(path for pattern in CODE for path in SOURCE.glob(pattern)))
    settings = {"model": arguments.model, "texts": arguments.texts, "new": arguments.new, "threads": arguments.threads,
                "torch": torch.__version__, "transformers": transformers.__version__}  # fmt: skip
    journal = Journal(arguments.out / "runs.jsonl")
    kept = []
    for prompt in _chosen(prompts.prompts(checkpoint.tokenizer, arguments.texts), arguments.prompts):
        for repeat in range(arguments.repeats):
            # Alternated, and begun with another mode each time, so that no mode has the machine's better moments.
            names = list(modes)
            for mode in [*names[repeat % len(names) :], *names[: repeat % len(names)]]:
                own = code if mode in OURS else ""
                draft = arguments.draft if mode in WITH_DRAFT else ""
                key = json.dumps([prompt["ids"], mode, repeat, own, draft, settings])
                key = hashlib.sha256(key.encode()).hexdigest()[:24]
                if key not in journal.done:
                    run = _run(checkpoint, prompt["ids"], arguments.new, modes[mode]())
                    about = {"key": key, "kind": prompt["kind"], "prompt": prompt["name"], "mode": mode}
                    journal.append({**about, "repeat": repeat, **run})
                    rate = run["new_tokens"] / run["passes"]
                    print(f"{prompt['kind']}: {mode}, {run['seconds']:.1f} s, {rate:.2f} tokens a pass", flush=True)
                kept.append(journal.done[key])
    # One thread's CPU time is the same on a busy machine, nearly.
    found = table.results(kept, clock="cpu_seconds" if arguments.threads == 1 else "seconds")
    writer.write_json(arguments.out / "results.json", {"settings": settings, "modes": found})
    writer.write_text(arguments.out / "results.md", table.markdown(found))
    print(table.markdown(found))


if __name__ == "__main__":
    try:
        main()
    except IntaglioError as error:
        sys.exit(f"error: {error}")
