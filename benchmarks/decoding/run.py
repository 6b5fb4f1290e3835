"""Every drafter against stock `generate` and its assisted modes, alternated on the same prompts.

    python benchmarks/decoding/run.py                                 # twenty prompts, 64 new tokens, greedy
    python benchmarks/decoding/run.py --batch 1,4 --temperatures 0,0.6
    python benchmarks/decoding/run.py --prompts 4 --new 8 --draft none --modes greedy,aded
    python benchmarks/decoding/run.py --nodes 0                       # each method with the tree size that it chooses
    python benchmarks/decoding/run.py --lud DIR                       # with a model trained by recipes/lud.yaml
    python benchmarks/decoding/run.py --device cuda --dtype bfloat16  # against a loop with CUDA graphs

Two sets of prompts: *mixed*, of four kinds, many of whose continuations repeat themselves, and *plain*, chat turns and
beginnings of articles whose greedy text repeats no eight tokens. A stock call is timed again and again through the run,
and no results are written if its time wandered by more than 10 %.

Trees have the same number of nodes in every mode with such a setting (`--nodes`); `draft_model` drafts a chain of five,
and `undrafted` is our loop without drafts. `hidden_transfer` and `chimera` use heads attached to the model or bundled
with the package, `medusa` those in `--medusa DIR`; a mode without its heads, draft or model is skipped with a message.
Transformers' assisted modes take no batches, so for `--batch 4` the only comparison is stock `generate` (`greedy`,
which samples above temperature 0). On a CUDA device short passes are launch-bound, so the baseline there is `captured`:
stock `generate` with a static cache and compiled passes.

Each finished run is a line of `runs.jsonl` in the output directory and is not repeated, so an interrupted benchmark
continues. Writes `results.json` and `results.md`, with the processor. Run it on a quiet machine; on a busy one use
`--threads 1`, which measures CPU time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import prompts
import table
import torch
import transformers
from once import Run as Timed
from once import gap, once

import intaglio
from intaglio import atomic_io
from intaglio.checkpoint import stat_fingerprint
from intaglio.checkpoint.attachments import Attachment, read_attachments
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.draft_model import DraftModelBed
from intaglio.methods.decoding.aded import ADED
from intaglio.methods.decoding.dyspec import DySpec
from intaglio.methods.decoding.lud import LUD
from intaglio.speculative._utils import vocabulary_size
from intaglio.speculative.drafters.draft_model import DraftModel
from intaglio.speculative.drafters.medusa import Medusa, MedusaHeads
from intaglio.speculative.drafters.ngrams import NGramStore
from intaglio.speculative.drafters.prompt_lookup import PromptLookup
from intaglio.speculative.drafters.undrafted import Undrafted
from intaglio.speculative.loop import Speculative
from intaglio.speculative.prepacked_linear import MIN_NEW_TOKENS
from intaglio.speculative.static_tree import best_tree, default_acceptance

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from machine import check_quiet, machine, title  # noqa: E402

SOURCE = HERE.parents[1] / "src" / "intaglio"
# What a run of ours depends on: when one of these changes, finished runs no longer count.
CODE = ("methods/decoding/**/*.py", "speculative/**/*.py", "environment/*.py")
STOCK = (table.BASE, table.CAPTURED, "prompt_lookup_num_tokens", "assistant_model")
OURS = ("undrafted", "aded", "prompt_lookup", "draft_model", "dyspec", "lud", "hidden_transfer", "chimera", "medusa")
MORE = ("aded-best", "aded-no-corpus", "dyspec-ngrams")
SETS = ("mixed", "plain")
REFERENCE = 16
"""New tokens of the stock call that is repeated through the run to see whether the machine was quiet."""
WITH_DRAFT = ("assistant_model", "draft_model", "dyspec")


@dataclass(frozen=True)
class Mode:
    """A generation mode."""

    options: Callable[[], dict[str, Any]]
    checkpoint: Any
    key: str = ""
    batches: bool = True
    lossless: bool = True
    compiles: bool = False


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decoding: drafters against the modes of transformers.")
    parser.add_argument("--model", default="smollm2", help="checkpoint directory or bundled name")
    parser.add_argument("--texts", default="wikipedia", help="bundled name, file or directory")
    parser.add_argument(
        "--draft", default="smollm2-draft", help="directory of a draft model; none leaves out the modes that need one; "
        "default: two layers trained on SmolLM2 output, made once (about 20 minutes) and cached",
    )  # fmt: skip
    parser.add_argument("--lud", help="directory of a model trained with the objective lud")
    parser.add_argument("--medusa", help="directory whose attachments hold Medusa heads for the model")
    parser.add_argument("--modes", default=",".join([*STOCK, *OURS]),
                        help=f"comma-separated; default: %(default)s; also: {', '.join(MORE)}")  # fmt: skip
    parser.add_argument("--batch", default="1", help="prompts at a time, comma-separated; default: %(default)s")
    parser.add_argument("--temperatures", default="0", help="comma-separated; 0 is greedy; default: %(default)s")
    parser.add_argument("--nodes", type=int, default=15,
                        help="drafted tokens of a tree; 0: each its own default; default: %(default)s")  # fmt: skip
    parser.add_argument("--kinds", default=",".join(prompts.KINDS), help="of prompts; default: %(default)s")
    parser.add_argument("--context", type=int, default=1500, help="tokens of a retrieval prompt; default: %(default)s")
    parser.add_argument("--prompts", type=int, default=20, help="number, spread over the kinds; default: %(default)s")
    parser.add_argument("--sets", default=",".join(SETS), help="of prompts: mixed, of four kinds; plain, whose greedy "
                        "text repeats no 8 tokens; default: %(default)s")  # fmt: skip
    parser.add_argument("--new", type=int, default=64, help="new tokens; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    parser.add_argument("--dtype", help="of the target and the drafts; default: the checkpoint's own")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    return parser.parse_args()


class Journal:
    """Log of finished runs, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: dict[str, Timed] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                # The process was stopped while it wrote the last line: that run is done again.
                print("a half-written line of runs.jsonl is ignored", file=sys.stderr)
                continue
            self.done[entry["key"]] = entry

    def append(self, entry: Timed) -> None:
        """Append a finished run."""
        self.done[entry["key"]] = entry
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            if file.tell() and not self._path.read_bytes().endswith(b"\n"):
                file.write("\n")
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _modes(arguments: argparse.Namespace, checkpoint: Any) -> dict[str, Mode]:
    """The available modes; expensive parts are built once."""
    wanted = list(dict.fromkeys([table.BASE, *_listed("--modes", arguments.modes, [*STOCK, *OURS, *MORE])]))
    code = _digest(sorted(path for pattern in CODE for path in SOURCE.glob(pattern)))
    ours = f"{code} {arguments.nodes}"
    draft = None
    if arguments.draft != "none" and {*wanted} & {*WITH_DRAFT}:
        draft = (
            DraftModelBed().load(_say) if arguments.draft == "smollm2-draft" else _load(arguments.draft, arguments)
        ).model.to(checkpoint.device, checkpoint.model.dtype)
    aded = None
    if {"aded", "aded-best"} & {*wanted}:
        size = {"nodes": arguments.nodes} if arguments.nodes else {}
        aded = ADED(corpus=prompts.corpus(arguments.texts), tokenizer=checkpoint.tokenizer, **size)
        aded.table(checkpoint.model)
    collected: dict[str, Mode] = {}
    for mode in wanted:
        try:
            collected[mode] = _mode(mode, arguments, checkpoint, ours, draft, aded)
        except IntaglioError as error:
            print(f"{mode} is left out: {error}", flush=True)
    return collected


def _mode(mode: str, arguments: argparse.Namespace, checkpoint: Any, ours: str, draft: Any, aded: Any) -> Mode:
    size = {"nodes": arguments.nodes} if arguments.nodes else {}
    if mode in WITH_DRAFT and draft is None:
        raise IntaglioError("there is no draft model; give one with --draft")
    if mode == "greedy":
        return Mode(dict, checkpoint)
    if mode == table.CAPTURED:
        if checkpoint.device.type != "cuda":
            raise IntaglioError("graphs are captured on a CUDA device; name one with --device")
        return Mode(lambda: {"cache_implementation": "static"}, checkpoint, compiles=True)
    if mode == "prompt_lookup_num_tokens":
        return Mode(lambda: {"prompt_lookup_num_tokens": 10}, checkpoint, batches=False)
    if mode == "assistant_model":
        return Mode(lambda: {"assistant_model": draft}, checkpoint, arguments.draft, batches=False)
    if mode == "lud":
        if arguments.lud is None:
            raise IntaglioError("there is no model trained with the objective lud; give one with --lud")
        tuned = _load(arguments.lud, arguments)
        lud = LUD(tokenizer=tuned.tokenizer)
        return Mode(_with(lud), tuned, f"{ours} {stat_fingerprint(arguments.lud)}", lossless=False)
    if mode in ("hidden_transfer", "chimera"):
        decoder = checkpoint.decoder(mode, **size)
        return Mode(_with(decoder), checkpoint, f"{ours} {_of_heads(decoder._heads, decoder.static_tree())}")
    if mode == "medusa":
        heads, shape = _medusa(arguments, checkpoint)
        return Mode(_with(Speculative(Medusa(heads, shape))), checkpoint, f"{ours} {_of_heads(heads, shape)}")
    made: dict[str, Callable[[], Any]] = {
        "aded": lambda: aded,
        "aded-best": lambda: aded.model_copy(update={"search": "best"}),
        "aded-no-corpus": lambda: ADED(**size),
        "undrafted": lambda: Speculative(Undrafted()),
        "prompt_lookup": lambda: Speculative(PromptLookup(**size)),
        "draft_model": lambda: Speculative(DraftModel(draft)),
        "dyspec-ngrams": lambda: DySpec(
            draft=NGramStore.build(
                checkpoint.tokenizer(prompts.corpus(arguments.texts), verbose=False)["input_ids"],
                vocabulary_size(checkpoint.model),
            ),
            tokenizer=checkpoint.tokenizer,
            budget=arguments.nodes or None,
        ),
        "dyspec": lambda: DySpec(draft=draft, budget=arguments.nodes or None),
    }
    return Mode(_with(made[mode]()), checkpoint, f"{ours} {arguments.draft if mode in WITH_DRAFT else ''}")


def _load(name: str, arguments: argparse.Namespace) -> Any:
    return intaglio.load(name, device=arguments.device, dtype=arguments.dtype)


def _with(decoder: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"custom_generate": decoder}


def _medusa(arguments: argparse.Namespace, checkpoint: Any) -> tuple[MedusaHeads, Any]:
    """Load Medusa heads, with their configuration inferred from the tensors."""
    attached = read_attachments(Path(arguments.medusa)) if arguments.medusa else checkpoint.attachments
    collected: Attachment | None = attached.get("medusa")
    if collected is None:
        raise IntaglioError("there are no heads; name a directory whose attachments hold some with --medusa")
    tensors = collected.tensors
    count, layers = tensors["weights_KLDD"].shape[:2]
    full, change = tensors.get("vocabulary.full_MVX"), tensors.get("vocabulary.out_Vr")
    rank = None if full is not None else 0 if change is None else change.shape[1]
    words = tensors.get("words.tokens_K")
    heads = MedusaHeads(checkpoint.model, heads=count, layers=layers, rank=rank, tokens_K=words)
    try:
        heads.load_state_dict(tensors)
    except RuntimeError as error:
        raise IntaglioError("the heads belong to another model than this") from error
    heads.to(checkpoint.device, checkpoint.model.dtype)
    chances = collected.about.get("chances") or default_acceptance(count)
    return heads.requires_grad_(False), best_tree(chances, arguments.nodes)


def _of_heads(heads: Any, shape: Any) -> str:
    total = hashlib.sha256(repr(shape.paths).encode())
    for tensor in heads.state_dict().values():
        total.update(tensor.float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def _say(done: int, total: int, what: str) -> None:
    if done == total or not done % 50:
        print(f"the draft model: {what}, {done} of {total}", file=sys.stderr)


def _listed(option: str, words: str, accepted: list[str]) -> list[str]:
    collected = words.split(",")
    if unknown := [word for word in collected if word not in accepted]:
        raise IntaglioError(f"{option} has {unknown[0]!r}; accepted: {', '.join(accepted)}")
    return collected


def _numbers(option: str, words: str, kind: Callable[[str], Any], least: float) -> list[Any]:
    try:
        collected = [kind(word) for word in words.split(",")]
    except ValueError:
        raise IntaglioError(f"{option} has {words!r}, which should be numbers with commas") from None
    if min(collected) < least:
        raise IntaglioError(f"{option} has {min(collected)}; from {least:g} on is accepted")
    return collected


def _digest(paths: list[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def main() -> None:
    arguments = _arguments()
    batches = _numbers("--batch", arguments.batch, int, 1)
    temperatures = _numbers("--temperatures", arguments.temperatures, float, 0)
    kinds = _listed("--kinds", arguments.kinds, list(prompts.KINDS))
    sets = _listed("--sets", arguments.sets, list(SETS))
    torch.set_num_threads(arguments.threads)
    checkpoint = _load(arguments.model, arguments)
    modes = _modes(arguments, checkpoint)
    settings = {"model": arguments.model, "files": stat_fingerprint(arguments.model), "texts": arguments.texts,
                "new": arguments.new, "threads": arguments.threads, "torch": torch.__version__,
                "transformers": transformers.__version__, "processor": machine()["processor"],
                "instructions": machine()["instructions"]}  # fmt: skip
    print(title(), flush=True)
    if checkpoint.device.type != "cpu":
        settings |= {"device": torch.cuda.get_device_name(checkpoint.device), "dtype": str(checkpoint.model.dtype)}
    # One thread's CPU time is the same on a busy machine, nearly.
    clock = "cpu_seconds" if arguments.threads == 1 and checkpoint.device.type == "cpu" else "seconds"
    base = table.CAPTURED if table.CAPTURED in modes else table.BASE
    journal, tables, texts = Journal(arguments.out / "runs.jsonl"), [], [f"Machine: {title()}\n"]
    all_prompts = prompts.prompts(checkpoint.tokenizer, arguments.texts, arguments.context)
    mixed = prompts.chosen(all_prompts, arguments.prompts, kinds)
    for mode in modes.values():
        # Not counted: the first call of a model measures its choices and lays its weights out.
        once(mode.checkpoint, [mixed[0]["ids"]], MIN_NEW_TOKENS, mode.options())
    stock = partial(_alternated, arguments, journal, {table.BASE: modes[table.BASE]}, settings=settings)
    reference = _Reference(journal, settings, clock, partial(once, checkpoint, [mixed[0]["ids"]], REFERENCE, {}))
    chosen = {"mixed": mixed} if "mixed" in sets else {}
    if "plain" in sets:
        chosen["plain"] = list(_plain(checkpoint.tokenizer, arguments, stock))
    for name, some_prompts in chosen.items():
        for temperature in temperatures:
            for batch in batches:
                some = {name: mode for name, mode in modes.items() if batch == 1 or mode.batches}
                groups = prompts.groups(some_prompts, batch)
                runs = []
                for number, group in enumerate(groups):
                    where = f"{number + 1}/{len(groups)}"
                    runs += _alternated(arguments, journal, some, group, temperature, where, settings)
                    reference.measure()
                collected = table.results(runs, clock, base)
                tables.append({"set": name, "prompts": len(some_prompts), "batch": batch, "temperature": temperature,
                               "base": base, "modes": collected})  # fmt: skip
                texts += [
                    f"Prompts: {name}, {len(some_prompts)}\n",
                    table.markdown(collected, batch, temperature, base),
                ]
    check_quiet(reference.seconds, f"stock generate, {REFERENCE} tokens")
    summary = {name: getattr(arguments, name) for name in ("nodes", "context", "repeats")}
    document = {"machine": machine(), "settings": settings | summary, "tables": tables}
    atomic_io.write_json(arguments.out / "results.json", document)
    atomic_io.write_text(arguments.out / "results.md", "\n".join(texts))
    print("\n" + "\n".join(texts))


class _Reference:
    """Times of the same stock call through the run, kept in the journal with the runs."""

    def __init__(self, journal: Journal, settings: dict[str, Any], clock: str, call: Callable[[], Timed]) -> None:
        self._journal, self._clock, self._call = journal, clock, call
        self._key = "reference " + hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]
        self.seconds = [run[clock] for key, run in journal.done.items() if key.startswith(self._key)]
        self.measure()

    def measure(self) -> None:
        """Time the call once more."""
        run = self._call()
        self.seconds.append(run[self._clock])
        times = {name: run[name] for name in ("seconds", "cpu_seconds")}
        self._journal.append({"key": f"{self._key} {len(self.seconds)}", **times})


def _plain(
    tokenizer: Any, arguments: argparse.Namespace, stock: Callable[..., list[Timed]]
) -> Iterator[prompts.Prompt]:
    """Yield as many prompts as requested whose greedy text has no loop."""
    left = arguments.prompts
    for prompt in prompts.candidates(tokenizer, arguments.texts):
        if not left:
            return
        (run,) = stock([prompt], 0.0, "looking for loops")
        if not prompts.loops(run["ids"][0]):
            left -= 1
            yield prompt


def _alternated(
    arguments: argparse.Namespace,
    journal: Journal,
    modes: dict[str, Mode],
    group: list[prompts.Prompt],
    temperature: float,
    where: str,
    settings: dict[str, Any],
) -> list[Timed]:
    """Return the runs of a batch of prompts, from the log or newly measured."""
    rows, name = [prompt["ids"] for prompt in group], " + ".join(prompt["name"] for prompt in group)
    about = {"kind": group[0]["kind"], "prompt": name, "batch": len(rows), "temperature": temperature}
    kept: list[Timed] = []
    for repeat in range(arguments.repeats):
        # Begun with another mode each time, so that no mode has the machine's better moments.
        names = list(modes)
        for mode in [*names[repeat % len(names) :], *names[: repeat % len(names)]]:
            item = modes[mode]
            key = json.dumps([rows, mode, repeat, item.key, temperature, settings])
            key = hashlib.sha256(key.encode()).hexdigest()[:24]
            if key not in journal.done:
                if item.compiles:
                    once(item.checkpoint, rows, arguments.new, item.options(), temperature, seed=repeat)
                run = once(item.checkpoint, rows, arguments.new, item.options(), temperature, seed=repeat)
                journal.append({"key": key, **about, "mode": mode, "repeat": repeat, **run})
                rate = run["new_tokens"] / run["row_passes"]
                print(
                    f"batch {len(rows)}, temperature {temperature:g}, {where}, {about['kind']}: {mode}, "
                    f"{run['seconds']:.1f} s, {rate:.2f} tokens a pass",
                    flush=True,
                )
            kept.append(dict(journal.done[key]))
    if not temperature:
        stock = next(run for run in kept if run["mode"] == table.BASE)
        for run in kept:
            if modes[run["mode"]].lossless:
                part = partial(gap, modes[table.BASE].checkpoint)
                run["gaps"] = [
                    part(*three) for three in zip(rows, stock["ids"], run["ids"], strict=True) if three[1] != three[2]
                ]
    return kept


if __name__ == "__main__":
    try:
        main()
    except IntaglioError as error:
        sys.exit(f"error: {error}")
