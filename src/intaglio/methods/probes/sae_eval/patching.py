"""Activations of prompts at nodes, and passes with others in their place.

Dimension letters: N prompts, B batch, L sequence, D width of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intaglio.methods.probes.sae_eval.tasks import Prompts
from intaglio.modeling.anatomy import Anatomy
from intaglio.modeling.sites import Edit, Site, hooked

BATCH = 64


@dataclass(frozen=True)
class Node:
    """A site at a position of the prompt: `io`, `s1`, `s1+1`, `s2` or `end`."""

    site: Site
    position: str = "end"

    @property
    def name(self) -> str:
        """The node in two words, such as `layers.5 at end`."""
        return f"{self.site.name} at {self.position}"


Activations = Mapping[Node, Tensor]
"""`{node: [N, D]}`."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """Logit difference of indirect object and subject [N], and the most likely next token [N]."""

    difference_N: Tensor
    token_N: Tensor

    @property
    def difference(self) -> float:
        """Mean logit difference."""
        return float(self.difference_N.double().mean())

    @property
    def accuracy(self) -> float:
        """Share of prompts with a positive logit difference."""
        return float((self.difference_N > 0).double().mean())

    def agreement(self, other: Outcome) -> float:
        """Share of prompts with the same most likely next token."""
        return float((self.token_N == other.token_N).double().mean())


@torch.no_grad()
def run(
    parts: Anatomy, prompts: Prompts, patches: Activations | None = None, read: Sequence[Node] = ()
) -> tuple[Outcome, dict[Node, Tensor]]:
    """Run prompts and return what the model answers, and the activations of nodes as they were before patching.

    All patches are in place in the same pass.

    Args:
        parts: the model's anatomy; it predicts the next token.
        prompts: padded on the right, which a causal model does not see.
        patches: activations [N, D] that replace those of nodes. Default: none.
        read: nodes to return. Default: none.
    """
    device = next(parts.base.parameters()).device
    outcomes, collected = [], {node: [] for node in read}  # type: ignore[var-annotated]
    for start in range(0, len(prompts), BATCH):
        rows = slice(start, start + BATCH)
        ids_BT = prompts.ids_NT[rows].to(device)
        index_B = torch.arange(len(ids_BT), device=device)

        def edit_of(site: Site, rows: slice = rows, index_B: Tensor = index_B) -> Edit:
            def edit(x_BLD: Tensor) -> Tensor | None:
                for node in read:
                    if node.site == site:
                        collected[node].append(
                            x_BLD[index_B, prompts.positions[node.position][rows].to(device)].float()
                        )
                changed = {node: new for node, new in (patches or {}).items() if node.site == site}
                if not changed:
                    return None
                new_BLD = x_BLD.clone()
                for node, new_ND in changed.items():
                    places_B = prompts.positions[node.position][rows].to(device)
                    new_BLD[index_B, places_B] = new_ND[rows].to(new_BLD)
                return new_BLD

            return edit

        sites = dict.fromkeys(node.site for node in (*read, *(patches or {})))
        with hooked(parts, {site: edit_of(site) for site in sites}):
            logits_BTV = parts.model(input_ids=ids_BT, use_cache=False).logits
        last_BV = logits_BTV[index_B, prompts.lengths_N[rows].to(device) - 1].float()
        both_B2 = last_BV.gather(1, prompts.answers_N2[rows].to(device))
        outcomes.append((both_B2[:, 0] - both_B2[:, 1], last_BV.argmax(1)))
    outcome = Outcome(*(torch.cat(column).cpu() for column in zip(*outcomes, strict=True)))
    return outcome, {node: torch.cat(values) for node, values in collected.items()}
