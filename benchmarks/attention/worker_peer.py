"""Worker for a peer in its own environment: stock transformers, llm2vec or billm; prints one JSON line."""

from __future__ import annotations

import os
from typing import Any

import common


def main() -> None:
    arguments = common.worker_options("Times a peer.").parse_args()
    # billm reads it while it is imported, for the whole process.
    os.environ["BiLLM_START_INDEX"] = str(arguments.start)  # noqa: SIM112 (its own spelling)

    def make() -> Any:
        import torch

        options = {"torch_dtype": torch.float32, "attn_implementation": "sdpa"}
        if arguments.variant == "stock":
            from transformers import LlamaModel

            return LlamaModel.from_pretrained(arguments.model, **options)
        if arguments.variant == "llm2vec":
            from llm2vec.models import LlamaBiModel

            return LlamaBiModel.from_pretrained(arguments.model, **options)
        from billm import LlamaModel as Bidirectional

        return Bidirectional.from_pretrained(arguments.model, **options)

    common.report(make, arguments)


if __name__ == "__main__":
    main()
