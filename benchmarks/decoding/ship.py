"""Add trained heads to the package: measured on held-out prompts, in bfloat16, at most 24 MB.

    intaglio carve -r recipes/chimera-heads.yaml -o out
    python benchmarks/decoding/ship.py out                            # into the package
    python benchmarks/decoding/ship.py out --prompts 4 --new 16 --into DIR

The prompts are those of `prompts.py`; the recipes train on none of their articles, if the heads were trained on the
texts named by `--texts`. The heads are valid for exactly this model, loaded in float32, bfloat16 or float16.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import prompts
import torch
from once import once

import intaglio
from intaglio.checkpoint import bundled
from intaglio.checkpoint.attachments import Attachment, read_attachments
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.checkpoint.record import read_record
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.methods.registry import get_method
from intaglio.speculative.heads.base import TrainedHeads


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ship trained heads with the package.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="a checkpoint with trained heads attached")
    parser.add_argument("--slug", help="whose heads; default: the only ones there")
    parser.add_argument("--model", help="their model; default: the source of DIR")
    parser.add_argument("--texts", default="wikipedia", help="bundled name, file or directory; default: %(default)s")
    parser.add_argument("--prompts", type=int, default=20, help="number, spread over the kinds; default: %(default)s")
    parser.add_argument("--new", type=int, default=64, help="new tokens; default: %(default)s")
    parser.add_argument("--nodes", type=int, default=15, help="of a tree while measured; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--into", type=Path, default=bundled.ROOT, help="default: in the package")
    return parser.parse_args()


def _heads(directory: Path, slug: str | None) -> Attachment:
    """Return the trained heads attached in a directory."""
    there = {
        name: results
        for name, results in read_attachments(directory).items()
        if issubclass(get_method(name), TrainedHeads)
    }
    if slug is not None and slug not in there:
        raise IntaglioError(f"{directory} has no heads of {slug}; {did_you_mean(slug, there)}")
    if slug is None and len(there) != 1:
        raise IntaglioError(
            f"{directory} has the heads of {', '.join(there) or 'nothing'}; name one method with --slug"
        )
    return there[slug or next(iter(there))]


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    results = bundled.to_bfloat16(_heads(arguments.directory, arguments.slug))
    # How large a tree is, is for who drafts to say; what is recorded is measured with one of `--nodes` nodes.
    results = replace(results, parameters=results.parameters | {"nodes": None, "tree": None})
    record = read_record(arguments.directory)
    model = arguments.model or (record.source if record is not None else "")
    checkpoint = intaglio.load(model)
    if fingerprint(checkpoint.model) != results.about.get("model"):
        raise IntaglioError(
            f"the heads in {arguments.directory} belong to other weights than those of {model} as it is"
        )
    method = get_method(results.slug)
    decoder = method.restore(results, checkpoint, nodes=arguments.nodes)  # type: ignore[attr-defined]
    tokens: dict[str, int] = defaultdict(int)
    passes: dict[str, int] = defaultdict(int)
    chosen = prompts.chosen(prompts.prompts(checkpoint.tokenizer, arguments.texts), arguments.prompts)
    for number, prompt in enumerate(chosen, start=1):
        run = once(checkpoint, [prompt["ids"]], arguments.new, {"custom_generate": decoder})
        tokens[prompt["kind"]] += run["new_tokens"]
        passes[prompt["kind"]] += run["row_passes"]
        rate = run["new_tokens"] / run["row_passes"]
        print(f"{number}/{len(chosen)}, {prompt['kind']}: {run['seconds']:.1f} s, {rate:.2f} tokens a pass", flush=True)
    acceptance = {
        "prompts": len(chosen),
        "new_tokens": arguments.new,
        "nodes": len(decoder.static_tree()),
        "tokens_a_pass": round(sum(tokens.values()) / sum(passes.values()), 4),
        "kinds": {kind: round(tokens[kind] / passes[kind], 4) for kind in tokens},
    }
    item = bundled.write_bundled(results, Path(model).name, acceptance, arguments.into)
    print(f"{results.slug}, in {item.folder}: {item.sentence()}")


if __name__ == "__main__":
    try:
        main()
    except IntaglioError as error:
        sys.exit(f"error: {error}")
