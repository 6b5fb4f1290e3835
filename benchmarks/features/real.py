"""GBA and TopK dictionaries of SmolLM2's middle layer, two seeds of each in one pass: the table on GBA's page.

    python benchmarks/features/real.py                     # an interrupted run continues

Trains the dictionaries of `recipes/gba-sae.yaml` and writes their measures on held-out text to
`docs/methods/measured/gba_sae.json`. No verdict: there is one model and one layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from intaglio import atomic_io, load, load_texts
from intaglio.dictionaries.sparse_autoencoder import SparseAutoencoder
from intaglio.environment import processor, releases
from intaglio.modeling.anatomy import blocks
from intaglio.recipe.schema import Recipe, fitted_methods

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MEASURES = {
    "loss recovered": "loss_recovered",
    "FVU": "fvu",
    "L0": "l0",
    "alive": "alive",
    "in both seeds": "shared_latents",
    "in both seeds, strongest tenth": "shared_strongest",
}
"""Columns of the table, with their names in `about`."""


def cell(name: str, value: float) -> str:
    """Return a measure as text: L0 with a decimal, FVU with three, shares in percent."""
    return f"{value:.1f}" if name == "l0" else f"{value:.3f}" if name == "fvu" else f"{value:.1%}".replace("%", " %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "gba-sae.yaml")
    parser.add_argument("--state", type=Path, default=HERE / "out" / "real", help="of a run that continues")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "methods" / "measured" / "gba_sae.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe.read(arguments.recipe)
    (method,) = fitted_methods(recipe.steps)
    assert isinstance(method, SparseAutoencoder)
    checkpoint = load(str(recipe.model))
    arguments.state.mkdir(parents=True, exist_ok=True)
    resume = any(arguments.state.iterdir())
    method.fit(checkpoint, load_texts(recipe.calibration.texts), directory=arguments.state, resume=resume)
    jobs = method.jobs(len(blocks(checkpoint.model)), 0)
    rows = []
    for name, job in jobs.items():
        about = method.dictionaries[name].about
        rows.append([job.method.slug, str(job.seed), *(cell(key, about[key]) for key in MEASURES.values())])
    document = {
        "title": f"{checkpoint.source}, output of block {next(iter(jobs.values())).site.layer}",
        "text": (
            f"{method.width:,} latents, {method.tokens:,} activations of {recipe.calibration.texts}, all dictionaries"
            " in one pass of the model; measured on held-out segments. A latent is in both seeds if the other seed's"
            " dictionary has one with a cosine above 0.9. One model and one layer: no verdict."
        ),
        "columns": ["dictionary", "seed", *MEASURES],
        "rows": rows,
        "command": "python benchmarks/features/real.py",
        "processor": processor(),
        "versions": releases(),
    }
    atomic_io.write_json(arguments.output, document)
    for row in [document["columns"], *rows]:
        print(" | ".join(row))


if __name__ == "__main__":
    main()
