"""Discrete key-value bottleneck: heads, frozen keys, values with sparse gradients, and decoders of the values.

Dimension letters: B rows, N tokens of a row (1 where pooled), I lookups (B N), D encoder width, C codebooks, K pairs of
a codebook, H width of a key, T fetched pairs (top-k), V width of a value, L classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.errors import IntaglioError

SplitterName = Literal["random_projection", "chunk", "learned_projection"]
KeyInit = Literal["random", "kmeans"]
HeadName = Literal["voting", "linear", "mlp"]
LLOYD_ITERATIONS = 10
MAX_DISTANCES = 1 << 23
"""Most distances that are held at a time; codebooks are looked up in groups."""


class Splitter(nn.Module):
    """Split of an embedding into heads, one for each codebook: h_c = z P_c, or consecutive chunks of z.

    Args:
        name: `random_projection` (columns of unit length, a buffer), `chunk` (D = C H), or `learned_projection` (a
            bias-free linear map with torch's initial weights, a parameter that must be frozen before keys are
            initialised).
        dim_in: D.
        num_codebooks: C.
        dim_keys: H.
        generator: of the projection.

    Raises:
        IntaglioError: chunks that do not add up to D.
    """

    projection: Tensor

    def __init__(
        self, name: SplitterName, dim_in: int, num_codebooks: int, dim_keys: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.name, self.shape = name, (num_codebooks, dim_keys)
        if name == "chunk":
            if dim_in != num_codebooks * dim_keys:
                raise IntaglioError(
                    f"splitter is chunk with {num_codebooks} codebooks of width {dim_keys}, together "
                    f"{num_codebooks * dim_keys}; the encoder's width is {dim_in}"
                )
        elif name == "random_projection":
            drawn_CDH = torch.randn(num_codebooks, dim_in, dim_keys, generator=generator)
            self.register_buffer("projection", F.normalize(drawn_CDH, dim=1))
        else:
            drawn_CDH = torch.rand(num_codebooks, dim_in, dim_keys, generator=generator)
            self.projection = nn.Parameter((2 * drawn_CDH - 1) / dim_in**0.5)

    def forward(self, z_BND: Tensor) -> Tensor:
        """Return heads [B, C, N, H]."""
        if self.name == "chunk":
            return z_BND.unflatten(-1, self.shape).transpose(1, 2)
        return torch.einsum("bnd,cdh->bcnh", z_BND, self.projection)


@dataclass(frozen=True)
class Fetched:
    """Fetched pairs: values [B, C, T, N, V], keys [B, C, T, N, H], and three tensors [B, C, T, N].

    Those are the indices of the pairs, their squared distances, and their training fetches before this one.
    """

    values: Tensor
    keys: Tensor
    indices: Tensor
    distances: Tensor
    counts: Tensor


class DiscreteKeyValueBottleneck(nn.Module):
    """Nearest-key lookup in C codebooks of K key-value pairs (Träuble et al. 2023, section 2).

        j*_c = argmin_j |h_c - key_cj|²,    output = value_{c, j*_c}

    Only fetched values get a gradient, a sparse one; there is no straight-through estimator. Keys follow the heads by
    an exponential moving average until `freeze_keys`:

        n_j <- g n_j + (1 - g) count_j,   m_j <- g m_j + (1 - g) sum_{h -> j} h,   key_j = m_j / n'_j

    with n' smoothed by eps. As in the official code n starts at 0 and random keys' m at the key, so the first steps
    overshoot; after k-means m starts at key times count (there at 0, which shrinks the keys). Keys with n_j below
    `threshold_factor` of uniform use in a batch are replaced by random heads of the batch.

    Args:
        dim_in: D.
        num_codebooks: C.
        num_pairs: K.
        dim_keys: H.
        dim_values: V.
        topk: pairs that a head fetches once keys are frozen, T. Default 1.
        splitter: see `Splitter`. Default `random_projection`.
        key_init: `random` (normal) or `kmeans` (ten Lloyd iterations on the first batch). Default `random`.
        decay: g of the moving averages. Default 0.95.
        eps: smoothing of n. Default 1e-5.
        threshold_factor: of dead keys; 0 keeps them. Default 0.1.
        temperature: of Gumbel sampling of pairs; 0 (default) takes the nearest.
        value_std: standard deviation of the initial values; 0 (default): zeros.
        restrict_to_used: whether evaluation only fetches pairs that training has fetched, where a codebook has any.
            Default True.
        generator: of projections, keys, values and replaced keys. Default: seeded by 0.

    Raises:
        IntaglioError: sizes that do not fit.
    """

    keys: Tensor
    key_sums: Tensor
    cluster_size: Tensor
    use_counts: Tensor

    def __init__(
        self,
        dim_in: int,
        num_codebooks: int,
        num_pairs: int,
        dim_keys: int,
        dim_values: int,
        *,
        topk: int = 1,
        splitter: SplitterName = "random_projection",
        key_init: KeyInit = "random",
        decay: float = 0.95,
        eps: float = 1e-5,
        threshold_factor: float = 0.1,
        temperature: float = 0.0,
        value_std: float = 0.0,
        restrict_to_used: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if topk > num_pairs:
            raise IntaglioError(f"topk is {topk}; a codebook has {num_pairs} pairs")
        self.generator = generator or torch.Generator().manual_seed(0)
        self.topk, self.key_init, self.decay, self.eps = topk, key_init, decay, eps
        self.threshold_factor, self.temperature, self.restrict_to_used = threshold_factor, temperature, restrict_to_used
        self.num_codebooks, self.num_pairs = num_codebooks, num_pairs
        self.splitter = Splitter(splitter, dim_in, num_codebooks, dim_keys, self.generator)
        shape = num_codebooks, num_pairs
        keys_CKH = torch.randn(*shape, dim_keys, generator=self.generator)
        self.register_buffer("keys", keys_CKH)
        self.register_buffer("key_sums", keys_CKH.clone(), persistent=False)
        self.register_buffer("cluster_size", torch.zeros(shape), persistent=False)
        self.register_buffer("use_counts", torch.zeros(shape, dtype=torch.int64))
        drawn_PV = torch.randn(num_codebooks * num_pairs, dim_values, generator=self.generator)
        self.values = nn.Parameter(value_std * drawn_PV if value_std else torch.zeros_like(drawn_PV))
        """[C K, V], a row for each pair."""
        self.frozen = False
        self._seeded = key_init == "random"

    def heads(self, z: Tensor) -> Tensor:
        """Return the heads [B, C, N, H] of embeddings [B, D] or [B, N, D], in float32."""
        heads: Tensor = self.splitter((z[:, None] if z.ndim == 2 else z).float())
        return heads

    @torch.no_grad()
    def lookup(self, heads_BCNH: Tensor, *, restrict: bool = False) -> tuple[Tensor, Tensor]:
        """Return indices and squared distances [B, C, T, N] of the fetched pairs; T is 1 until keys are frozen.

        Args:
            heads_BCNH: from `heads`.
            restrict: whether pairs without a training fetch come after all others. Default False.
        """
        batch, _, tokens, _ = heads_BCNH.shape
        heads_CIH = heads_BCNH.float().transpose(0, 1).flatten(1, 2)
        group = max(1, MAX_DISTANCES // max(1, heads_CIH.shape[1] * self.num_pairs))
        parts = [
            self._nearest(heads, keys, used if restrict else None)
            for heads, keys, used in zip(
                heads_CIH.split(group), self.keys.split(group), (self.use_counts > 0).split(group), strict=True
            )
        ]
        indices, distances = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        shaped = [value.unflatten(1, (batch, tokens)).permute(1, 0, 3, 2) for value in (indices, distances)]
        return shaped[0], shaped[1]

    def _nearest(self, heads_CIH: Tensor, keys_CKH: Tensor, used_CK: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return indices and distances [C, I, T]; of equally near keys the first."""
        products_CIK = torch.baddbmm(keys_CKH.square().sum(-1)[:, None], heads_CIH, keys_CKH.mT, alpha=-2)
        distance_CIK = products_CIK + heads_CIH.square().sum(-1, keepdim=True)
        if used_CK is not None:
            kept_CK = used_CK | ~used_CK.any(1, keepdim=True)
            distance_CIK = torch.where(kept_CK[:, None], distance_CIK, distance_CIK.max() + 1)
        score_CIK = -distance_CIK
        if self.temperature:
            uniform_CIK = torch.rand(score_CIK.shape, generator=self.generator).clamp(min=1e-20).to(score_CIK.device)
            score_CIK = score_CIK / self.temperature - (-uniform_CIK.log()).clamp(min=1e-20).log()
        most = self.topk if self.frozen else 1
        index_CIT = score_CIK.argmax(-1, keepdim=True) if most == 1 else score_CIK.topk(most).indices
        return index_CIT, distance_CIK.gather(-1, index_CIT).clamp(min=0)

    def fetch(self, indices_BCTN: Tensor) -> Tensor:
        """Return values [B, C, T, N, V], whose gradient with respect to `values` is sparse."""
        return F.embedding(self._rows(indices_BCTN), self.values, sparse=True)

    def _rows(self, indices_BCTN: Tensor) -> Tensor:
        first_C = torch.arange(self.num_codebooks, device=indices_BCTN.device) * self.num_pairs
        return indices_BCTN + first_C[:, None, None]

    def count(self, indices_BCTN: Tensor) -> None:
        """Count fetches of training."""
        rows = self._rows(indices_BCTN).flatten()
        self.use_counts += torch.bincount(rows, minlength=self.use_counts.numel()).view_as(self.use_counts)

    def forward(self, z: Tensor) -> Fetched:
        """Fetch the pairs of embeddings [B, D] or [B, N, D]; with frozen keys, training counts its fetches."""
        indices, distances = self.lookup(self.heads(z), restrict=self.restrict_to_used and not self.training)
        rows = self._rows(indices)
        counts = self.use_counts.flatten()[rows]
        if self.training and self.frozen:
            self.count(indices)
        return Fetched(self.fetch(indices), self.keys.flatten(0, 1)[rows], indices, distances, counts)

    # --- keys -------------------------------------------------------------------------------------------------------

    def freeze_splitter(self) -> None:
        """Exclude the projection from training."""
        self.splitter.requires_grad_(False)

    def freeze_keys(self) -> None:
        """Keep keys and projection as they are for good."""
        self.freeze_splitter()
        self.frozen = True

    def init_keys(self, batches: Iterable[Tensor], epochs: int = 1) -> None:
        """Fit the keys to embeddings [B, D] or [B, N, D], read `epochs` times.

        Raises:
            IntaglioError: keys are frozen, or the projection is not.
        """
        if any(parameter.requires_grad for parameter in self.splitter.parameters()):
            raise IntaglioError("the learned projection is not frozen; keys are initialised after freeze_splitter()")
        for _ in range(epochs):
            for z in batches:
                self.update_keys(self.heads(z))

    @torch.no_grad()
    def update_keys(self, heads_BCNH: Tensor) -> None:
        """Move the keys towards the heads of a batch, and replace dead ones.

        Raises:
            IntaglioError: keys are frozen.
        """
        if self.frozen:
            raise IntaglioError("the keys are frozen; values learned with them would belong to other keys")
        heads_CIH = heads_BCNH.float().transpose(0, 1).flatten(1, 2)
        if not self._seeded:
            self._kmeans(heads_CIH)
        indices, _ = self.lookup(heads_BCNH)
        index_CI = indices[:, :, 0].transpose(0, 1).flatten(1)
        counts_CK, sums_CKH = _assigned(heads_CIH, index_CI, self.num_pairs)
        self.cluster_size.lerp_(counts_CK, 1 - self.decay)
        self.key_sums.lerp_(sums_CKH, 1 - self.decay)
        total_C1 = self.cluster_size.sum(1, keepdim=True)
        smoothed_CK = (self.cluster_size + self.eps) / (total_C1 + self.num_pairs * self.eps) * total_C1
        self.keys.copy_(self.key_sums / smoothed_CK[..., None])
        threshold = self.threshold_factor * heads_CIH.shape[1] / self.num_pairs
        dead_CK = self.cluster_size < threshold
        if dead_CK.any():
            self.keys.copy_(torch.where(dead_CK[..., None], self._drawn(heads_CIH), self.keys))

    def _drawn(self, heads_CIH: Tensor) -> Tensor:
        """Return random heads of a batch, one for each pair [C, K, H]."""
        shape = self.num_codebooks, self.num_pairs
        index_CK = torch.randint(heads_CIH.shape[1], shape, generator=self.generator).to(heads_CIH.device)
        return heads_CIH.gather(1, index_CK[..., None].expand(-1, -1, heads_CIH.shape[-1]))

    def _kmeans(self, heads_CIH: Tensor) -> None:
        """Set the keys by Lloyd's algorithm from random heads; empty clusters keep their mean."""
        self.keys.copy_(self._drawn(heads_CIH))
        for _ in range(LLOYD_ITERATIONS):
            index_CI = self.lookup(heads_CIH[None].permute(2, 1, 0, 3))[0][:, :, 0, 0].T
            counts_CK, sums_CKH = _assigned(heads_CIH, index_CI, self.num_pairs)
            means_CKH = sums_CKH / counts_CK.clamp(min=1)[..., None]
            self.keys.copy_(torch.where(counts_CK[..., None] > 0, means_CKH, self.keys))
        self.cluster_size.copy_(counts_CK)
        self.key_sums.copy_(self.keys * counts_CK[..., None])
        self._seeded = True

    def widen(self, dim_values: int) -> None:
        """Append columns of zeros to the values, up to a width; those of new classes."""
        zeros = self.values.new_zeros(len(self.values), dim_values - self.values.shape[1])
        self.values = nn.Parameter(torch.cat([self.values.detach(), zeros], dim=1))


def _assigned(heads_CIH: Tensor, index_CI: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Return the number [C, K] and the sum [C, K, H] of the heads assigned to each key."""
    codebooks, _, width = heads_CIH.shape
    ones_CI = torch.ones_like(index_CI, dtype=heads_CIH.dtype)
    counts_CK = heads_CIH.new_zeros(codebooks, pairs).scatter_add_(1, index_CI, ones_CI)
    wide_CIH = index_CI[..., None].expand(-1, -1, width)
    return counts_CK, heads_CIH.new_zeros(codebooks, pairs, width).scatter_add_(1, wide_CIH, heads_CIH)


class VotingHead(nn.Module):
    """Decoder without parameters: logits = mean over codebooks and tokens of the sum of the fetched values."""

    def forward(self, values_BCTNV: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Return logits [B, V]; `mask_BN` is True at real tokens."""
        return _token_mean(values_BCTNV.sum(2).mean(1), mask_BN)


class ProbeHead(nn.Module):
    """Linear decoder of the codebooks' values side by side, or one with a hidden ReLU layer.

    Args:
        num_codebooks: C.
        dim_values: V.
        classes: L.
        hidden: width of the hidden layer; 0 (default): linear.
        generator: of the weights. Default: seeded by 0.
    """

    def __init__(
        self, num_codebooks: int, dim_values: int, classes: int, hidden: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = [num_codebooks * dim_values, *([hidden] if hidden else []), classes]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.utils.skip_init(nn.Linear, before, after), nn.ReLU()]
            with torch.no_grad():
                for parameter in layers[-2].parameters():
                    parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) / before**0.5)
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, values_BCTNV: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Return logits [B, L]; `mask_BN` is True at real tokens."""
        side_by_side = values_BCTNV.sum(2).transpose(1, 2).flatten(2)
        logits: Tensor = self.layers(_token_mean(side_by_side, mask_BN))
        return logits


def _token_mean(values_BNV: Tensor, mask_BN: Tensor | None) -> Tensor:
    if mask_BN is None:
        return values_BNV.mean(1)
    return (values_BNV * mask_BN[..., None]).sum(1) / mask_BN.sum(1, keepdim=True).clamp(min=1)


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale gradients, sparse ones included, to a joint norm of at most `max_norm`; 0 leaves them."""
    given = [parameter for parameter in parameters if parameter.grad is not None]
    for parameter in given:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
    dense = [p.grad.values() if p.grad.is_sparse else p.grad for p in given if p.grad is not None]
    norm = float(sum(float(gradient.square().sum()) for gradient in dense)) ** 0.5
    if max_norm and norm > max_norm:
        for gradient in dense:
            gradient.mul_(max_norm / (norm + 1e-6))
