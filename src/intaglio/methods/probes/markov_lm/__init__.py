"""MarkovLM (Zhang, arXiv 2507.19247, 2025): a language model's step as Markov kernels, measured.

    intaglio.MarkovLM().measure(ckpt, "wikipedia")         # or intaglio inspect MODEL --diagnostics TEXTS
    kernels = as_kernels(ckpt)                             # encode: ids -> h, head: h -> next-token distribution

- `finite.py`: exact quantities of finite kernels; `geometry.py`: Fisher metric, kernels, alignment
- `surplus.py`: probes for the information surplus; `reference.py`: distributions that are not the model's own
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from intaglio.checkpoint import Checkpoint, load
from intaglio.checkpoint.bundled import bundled_heads
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.data.texts import Corpus, load_texts
from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Method, Progress, no_progress
from intaglio.methods.probes.markov_lm import geometry
from intaglio.methods.probes.markov_lm.finite import categorical_entropy
from intaglio.methods.probes.markov_lm.geometry import KernelName
from intaglio.methods.probes.markov_lm.reference import model_distributions, ngram_distributions
from intaglio.methods.probes.markov_lm.surplus import Positions, surplus_terms
from intaglio.methods.registry import PUBLISHED
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import HeadOnly, final_hidden

LINEAR_TOLERANCE = 1e-3
"""Relative difference of logits up to which a head counts as linear."""
LOGIT_ELEMENTS = 1 << 24
PARTS = (6, 8)
"""Of ten texts, those for training probes end at the first, those for validation at the second."""
BINS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0)
"""Edges of the entropy histogram, in nats."""


@dataclass(frozen=True)
class Kernels:
    """A language model's step as two kernels.

    Args:
        encode: token ids [B, L] -> hidden states [B, L, D], after the final norm: the deterministic kernel.
        head: hidden states [..., D] -> next-token distributions [..., V]: the stochastic kernel.
    """

    encode: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]


def as_kernels(checkpoint: Checkpoint) -> Kernels:
    """Return a causal model as kernels, whose composition is its softmax.

    Raises:
        IntaglioError: the model has no output head.
    """
    parts = anatomy(checkpoint.model)
    head = HeadOnly(parts, frozen=False)

    def distributions(hidden: Tensor) -> Tensor:
        flat = head.logits(hidden.reshape(1, -1, hidden.shape[-1]))[0]
        return flat.float().softmax(-1).reshape(*hidden.shape[:-1], -1)

    return Kernels(lambda ids_BL: final_hidden(parts, {"input_ids": ids_BL}), distributions)


@dataclass(frozen=True)
class _Text:
    """Windows of tokens: hidden states [N, L, D], ids [N, L], and the part of each window's text."""

    hidden_NLD: Tensor
    ids_NL: Tensor
    part_N: Tensor


class MarkovLM(Method, slug="markov_lm"):
    """Diagnostics of a language model's steps as Markov kernels: h = encode(context), p = softmax(W h).

        H_D(p) = D(P(Y, Y) || P of two draws)               entropies: Shannon (KL), 1 - sum p² (TV), Rényi
        I(H; W_t .. W_{t+K-1}) = I(H; W_t) + Surplus_K      the resource of multi-token drafting
        g(h) = W^T (diag p - p p^T) W                       pullback Fisher metric
        CKA(h h^T, K),  K(x, x') = sum sqrt(p_x p_x')       alignment with a predictive kernel
        CE = -E <W_w, h> + E log Z(h)                       alignment + uniformity

    W_t is the token predicted from h_t; h is the head's input, after the final norm. The paper gives definitions and no
    estimators; these are ours. That training aligns h with K (its Theorem 7.6) is argued there, not proven: a
    hypothesis that the numbers test. K comes from a reference: a kernel of the model's own distributions is circular.

    Args:
        contexts: contexts of kernels and metric. Default 256.
        length: tokens of a window. Default 128.
        tokens: tokens that are read; a tenth or two of them serve estimates, the rest trains probes. Default 16,000.
        kernel: `bhattacharyya` (default), `hellinger`, `linear`, `jensen_shannon` or `prototype`.
        beta: of `hellinger` and `jensen_shannon`. Default 1.
        reference: distributions of the kernel: `ngram` (default), counted in the training texts, or a model of the same
            tokenizer.
        renyi_order: a of Rényi's divergence; the entropy has order 2 - a. Default 0.5.
        directions: leading directions of subspaces and of the metric's spectrum. Default 10.
        extra_tokens: tokens after the first whose surplus is estimated, K - 1. Default 1; 0: no probes.
        vocabulary: most frequent tokens that the probes tell apart. Default 1,000.
        probe_width: hidden width of the probes. Default 128.
        probe_epochs: most passes of a probe over its positions. Default 20.

    Raises:
        IntaglioError: (in `measure`) no tokenizer, no causal head or one that is not linear, or too little text.

    Source: Zhang, A Markov Categorical Framework for Language Modeling, arXiv 2025 (2507.19247), sections 4 to 7, A.9.
    """

    kinds = ("probe",)
    summary = "measures a model's certainty, what its states know of later tokens, and how they align with predictions"
    citation = "Zhang, A Markov Categorical Framework for Language Modeling, arXiv 2025"
    url = "https://arxiv.org/abs/2507.19247"

    requires: ClassVar[frozenset[Capability]] = frozenset({"causal"})

    contexts: Annotated[int, Field(ge=4)] = 256
    length: Annotated[int, Field(ge=8)] = 128
    tokens: Annotated[int, Field(ge=256)] = 16_000
    kernel: KernelName = "bhattacharyya"
    beta: Annotated[float, Field(gt=0)] = 1.0
    reference: Annotated[str, Field(min_length=1)] = "ngram"
    renyi_order: Annotated[float, Field(gt=0, lt=2)] = 0.5
    directions: Annotated[int, Field(ge=1)] = 10
    extra_tokens: Annotated[int, Field(ge=0, le=4)] = 1
    vocabulary: Annotated[int, Field(ge=2)] = 1000
    probe_width: Annotated[int, Field(ge=1)] = 128
    probe_epochs: Annotated[int, Field(ge=1)] = 20

    @torch.no_grad()
    def measure(
        self,
        checkpoint: Checkpoint,
        texts: Any,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = no_progress,
    ) -> dict[str, Any]:
        """Return the diagnostics of a model on some texts, ready for JSON; everything in nats.

        Args:
            checkpoint: a causal language model with its tokenizer.
            texts: a name for `load_texts`, texts or a corpus; six tenths train probes and n-grams.
            seed: of the chosen contexts and of the probes. Default 0.
            batch_size: windows of a pass. Default 4.
            progress: called after each pass and probe.

        Raises:
            IntaglioError: see the class.
        """
        parts = anatomy(checkpoint.model.eval())
        if not parts.causal or parts.head is None:
            raise IntaglioError(
                f"{type(checkpoint.model).__name__} predicts no next tokens; diagnostics need a causal LM"
            )
        if self.renyi_order == 1:
            raise IntaglioError("renyi_order is 1; the order-1 divergence is KL, whose entropy is reported anyway")
        corpus = load_texts(texts)
        text = self._read(checkpoint, corpus, batch_size, progress)
        head_VD, bias_V = linear_head(checkpoint, text.hidden_NLD[0])
        kernels = as_kernels(checkpoint)
        steps = self._steps(text, kernels, head_VD, bias_V)
        chosen = self._contexts(text, seed)
        hidden_ND, probs_NV, contexts = self._chosen(text, kernels, chosen)
        result = {
            "texts": corpus.name,
            "tokens": int(text.ids_NL.numel()),
            "contexts": len(chosen),
            "steps": steps,
            "fisher": self._fisher(head_VD, probs_NV),
            "alignment": self._alignment(checkpoint, text, head_VD, hidden_ND, probs_NV, contexts, seed),
            "surplus": self._surplus(checkpoint, text, seed, progress),
            "drafts": draft_acceptance(checkpoint),
            "parameters": self.model_dump(),
        }
        return result

    def _read(self, checkpoint: Checkpoint, corpus: Corpus, batch_size: int, progress: Progress) -> _Text:
        """Return windows of the texts with their hidden states; the windows of a text are in one part."""
        if checkpoint.tokenizer is None:
            raise IntaglioError("the checkpoint has no tokenizer, so diagnostics cannot read texts")
        if self.length > checkpoint.context:
            raise IntaglioError(f"length is {self.length}; the model's context is {checkpoint.context}")
        windows: tuple[list[Tensor], ...] = ([], [], [])
        most = [max(1, round(self.tokens / self.length * share)) for share in (0.6, 0.2, 0.2)]
        for document, digest in zip(corpus.documents, corpus.hashes, strict=True):
            place = int(digest[:8], 16) % 10
            part = 0 if place < PARTS[0] else 1 if place < PARTS[1] else 2
            if all(len(own) >= count for own, count in zip(windows, most, strict=True)):
                break
            if len(windows[part]) < most[part]:
                ids = torch.tensor(checkpoint.tokenizer(document, verbose=False)["input_ids"], dtype=torch.int64)
                windows[part].extend(ids[: len(ids) // self.length * self.length].view(-1, self.length))
        windows = tuple(own[:count] for own, count in zip(windows, most, strict=True))
        empty = [name for name, own in zip(("training", "validation", "held-out"), windows, strict=True) if not own]
        if empty:
            raise IntaglioError(
                f"the texts {corpus.name!r} have no {empty[0]} text of {self.length} tokens; more texts are needed"
            )
        ids_NL = torch.stack([window for own in windows for window in own])
        checkpoint.check_ids(ids_NL)
        part_N = torch.tensor([part for part, own in enumerate(windows) for _ in own])
        hidden = []
        kernels = as_kernels(checkpoint)
        for start in range(0, len(ids_NL), batch_size):
            hidden.append(kernels.encode(ids_NL[start : start + batch_size]).float().cpu())
            if not torch.isfinite(hidden[-1]).all():
                raise IntaglioError(f"the hidden states hold NaN or infinite values in batch {start // batch_size}")
            progress(min(start + batch_size, len(ids_NL)), len(ids_NL), "markov_lm: reading")
        return _Text(torch.cat(hidden), ids_NL, part_N)

    def _steps(self, text: _Text, kernels: Kernels, head_VD: Tensor, bias_V: Tensor | None) -> dict[str, Any]:
        """Return the loss and the mean entropies on held-out texts, and the two terms of the loss."""
        held_out = text.part_N == 2
        hidden_ND = text.hidden_NLD[held_out, :-1].flatten(0, 1)
        next_N = text.ids_NL[held_out, 1:].flatten()
        group = max(1, LOGIT_ELEMENTS // len(head_VD))
        nats, shannon, gini, renyi, score = [], [], [], [], []
        for hidden_BD, next_B in zip(hidden_ND.split(group), next_N.split(group), strict=True):
            probs_BV = kernels.head(hidden_BD).cpu()
            nats.append(-probs_BV.gather(1, next_B[:, None])[:, 0].clamp(min=1e-30).log())
            shannon.append(categorical_entropy(probs_BV))
            gini.append(categorical_entropy(probs_BV, "tv"))
            renyi.append(categorical_entropy(probs_BV, "renyi", self.renyi_order))
            bias_B = 0.0 if bias_V is None else bias_V[next_B]
            score.append((head_VD[next_B] * hidden_BD).sum(1) + bias_B)
        entropy_N, loss = torch.cat(shannon), float(torch.cat(nats).mean())
        edges = torch.tensor(BINS)
        counts = torch.bincount(torch.bucketize(entropy_N, edges[1:-1]), minlength=len(BINS) - 1)
        alignment = float(torch.cat(score).mean())
        return {
            "loss": loss,
            "entropy": float(entropy_N.mean()),
            "entropy_gap": float(entropy_N.mean()) - loss,
            "gini": float(torch.cat(gini).mean()),
            "renyi": float(torch.cat(renyi).mean()),
            "alignment": -alignment,
            "uniformity": loss + alignment,
            "histogram": [[BINS[i], BINS[i + 1], int(count)] for i, count in enumerate(counts)],
        }

    def _contexts(self, text: _Text, seed: int) -> list[tuple[int, int]]:
        """Return the window and the place of random held-out contexts, of three tokens at least."""
        windows = (text.part_N == 2).nonzero()[:, 0].tolist()
        places = [(window, place) for window in windows for place in range(2, self.length)]
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed)).tolist()
        return [places[index] for index in order[: self.contexts]]

    def _chosen(
        self, text: _Text, kernels: Kernels, chosen: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, list[list[int]]]:
        """Return hidden states [N, D], next-token distributions [N, V] and tokens of contexts."""
        windows, places = (torch.tensor(column) for column in zip(*chosen, strict=True))
        hidden_ND = text.hidden_NLD[windows, places]
        contexts = [text.ids_NL[window, : place + 1].tolist() for window, place in chosen]
        return hidden_ND, kernels.head(hidden_ND).cpu(), contexts

    def _fisher(self, head_VD: Tensor, probs_NV: Tensor) -> dict[str, Any]:
        """Return spectra of the metric: its mean over contexts, and those of single contexts."""
        mean_DD = geometry.mean_fisher_metric(head_VD, probs_NV).double()
        spectrum_D = torch.linalg.eigvalsh(mean_DD).flip(0).clamp(min=0)
        single = [
            torch.linalg.eigvalsh(geometry.fisher_metric(head_VD, probs_V).double()).clamp(min=0)
            for probs_V in probs_NV[:: max(1, len(probs_NV) // 16)]
        ]
        cumulative = spectrum_D.cumsum(0) / spectrum_D.sum().clamp(min=1e-30)
        counts = sorted({min(1 << power, len(cumulative)) for power in range(len(cumulative).bit_length() + 1)})
        return {
            "trace": float(spectrum_D.sum()),
            "largest": [float(value) for value in spectrum_D[: self.directions]],
            "participation_ratio": geometry.participation_ratio(spectrum_D),
            "context_participation_ratio": sum(map(geometry.participation_ratio, single)) / len(single),
            "leading_shares": [[count, float(cumulative[count - 1])] for count in counts],
        }

    def _alignment(
        self,
        checkpoint: Checkpoint,
        text: _Text,
        head_VD: Tensor,
        hidden_ND: Tensor,
        probs_NV: Tensor,
        contexts: list[list[int]],
        seed: int,
    ) -> dict[str, Any]:
        """Return the alignment of hidden states with the reference's kernel, and with a permuted one."""
        distributions_NV = self._distributions(checkpoint, text, contexts, probs_NV.shape[1])
        kernel, own = (
            geometry.predictive_kernel(distributions, self.kernel, self.beta, head_VD).double()
            for distributions in (distributions_NV, probs_NV)
        )
        hidden_ND = hidden_ND.double()
        metric_DD = geometry.mean_fisher_metric(head_VD, probs_NV).double()
        weighted_ND = geometry.fisher_weighted(hidden_ND, metric_DD)
        order_N = torch.randperm(len(kernel), generator=torch.Generator().manual_seed(seed + 1))
        permuted = kernel[order_N][:, order_N]
        known_ND = text.hidden_NLD[text.part_N == 0].flatten(0, 1).double()
        white_ND = geometry.whiten(hidden_ND, known_ND.mean(0), known_ND.T.cov())
        vectors_DM = torch.linalg.eigh(metric_DD).eigenvectors[:, -self.directions :].flip(1)
        features_NM = hidden_ND @ vectors_DM
        variance_M = features_NM.var(0, correction=0).clamp(min=1e-30)
        energies = [geometry.dirichlet_energy(kernel, feature_N) for feature_N in features_NM.T]
        similar = hidden_ND @ hidden_ND.T
        return {
            "reference": self.reference,
            "cka": geometry.kernel_alignment(similar, kernel),
            "fisher_weighted_cka": geometry.kernel_alignment(weighted_ND @ weighted_ND.T, kernel),
            "permuted_cka": geometry.kernel_alignment(similar, permuted),
            "own_cka": geometry.kernel_alignment(similar, own),
            "subspace_overlap": geometry.subspace_overlap(hidden_ND, kernel, self.directions),
            "permuted_overlap": geometry.subspace_overlap(hidden_ND, permuted, self.directions),
            "functional": geometry.spectral_functional(white_ND, kernel),
            "permuted_functional": geometry.spectral_functional(white_ND, permuted),
            "dirichlet": [energy / float(v) for energy, v in zip(energies, variance_M, strict=True)],
        }

    def _distributions(self, checkpoint: Checkpoint, text: _Text, contexts: list[list[int]], vocabulary: int) -> Tensor:
        if self.reference == "ngram":
            return ngram_distributions(text.ids_NL[text.part_N == 0].flatten(), contexts, vocabulary)
        return model_distributions(load(self.reference, device=str(checkpoint.device)), contexts, vocabulary)

    def _surplus(self, checkpoint: Checkpoint, text: _Text, seed: int, progress: Progress) -> list[dict[str, Any]]:
        """Return the terms of the surplus; h_t is read where W_t is still to come."""
        if not self.extra_tokens:
            return []
        last = self.length - 1 - self.extra_tokens  # h at place i predicts token i + 1
        if last < 1:
            raise IntaglioError(
                f"extra_tokens is {self.extra_tokens} and length {self.length}; longer windows are needed"
            )
        tokens = [text.ids_NL[:, 1 + j : 1 + j + last].flatten() for j in range(self.extra_tokens + 1)]
        positions = Positions(
            text.hidden_NLD[:, :last].flatten(0, 1), torch.stack(tokens, dim=1), text.part_N.repeat_interleave(last)
        )
        embedding: Any = checkpoint.model.get_input_embeddings()  # type: ignore[operator]
        with torch.enable_grad():
            terms = surplus_terms(
                positions,
                embedding.weight.detach().cpu(),
                vocabulary=self.vocabulary,
                width=self.probe_width,
                epochs=self.probe_epochs,
                seed=seed,
                progress=progress,
            )
        return [{"token": j, "surplus": term.surplus, **vars(term)} for j, term in enumerate(terms, start=1)]


@torch.no_grad()
def linear_head(checkpoint: Checkpoint, hidden_LD: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return W [V, D] and the bias of a model's head, with a constant logit scale multiplied into both.

    Args:
        checkpoint: a causal language model.
        hidden_LD: hidden states to check it with.

    Raises:
        IntaglioError: logits are no linear function of the hidden state, such as soft-capped ones.
    """
    parts = anatomy(checkpoint.model)
    module: Any = parts.head
    weight_VD, bias = module.weight.detach().float().cpu(), getattr(module, "bias", None)
    bias_V = None if bias is None else bias.detach().float().cpu()
    logits_LV = HeadOnly(parts, frozen=False).logits(hidden_LD[None].to(checkpoint.device, module.weight.dtype))[0]
    logits_LV, plain_LV = logits_LV.float().cpu(), F.linear(hidden_LD, weight_VD, bias_V)
    scale = float((logits_LV * plain_LV).sum() / plain_LV.square().sum().clamp(min=1e-30))
    tolerance = LINEAR_TOLERANCE if weight_VD.dtype == module.weight.dtype else 0.05
    if float((logits_LV - scale * plain_LV).norm()) > tolerance * float(logits_LV.norm()):
        raise IntaglioError(
            f"the logits of {type(checkpoint.model).__name__} are not linear in its hidden state (soft-capped?); "
            "the diagnostics of its head need that"
        )
    return scale * weight_VD, None if bias_V is None else scale * bias_V


def draft_acceptance(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the measured acceptance of the bundled draft heads that belong to a model."""
    slugs = [slug for slug, entry in PUBLISHED.items() if entry.fitted and "drafter" in entry.kinds]
    heads = [head for slug in slugs for head in bundled_heads(slug)]
    own = fingerprint(checkpoint.model) if heads else ""
    return [
        {"slug": head.slug, "tokens_a_pass": head.acceptance["tokens_a_pass"], "prompts": head.acceptance["prompts"]}
        for head in heads
        if head.matches(own)
    ]


__all__ = ["Kernels", "MarkovLM", "as_kernels", "draft_acceptance", "linear_head"]
