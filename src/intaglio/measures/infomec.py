"""InfoMEC: modularity, explicitness and compactness of latents by mutual information (Hsu et al., NeurIPS 2023).

    NMI[i, j] = I(s_i; z_j) / H(s_i)
    InfoM = (mean_j max_i NMI / sum_i NMI - 1/S) / (1 - 1/S)        over active latents j
    InfoC = (mean_i max_j NMI / sum_j NMI - 1/A) / (1 - 1/A)        over sources i
    InfoE = mean_i (H0_i - H_i) / H0_i                              H_i: cross-entropy of a logistic regression on all z

As in the official file, except that 0/0 counts as no information (there NaN) and is reported. InfoM averages over
active latents alone, so a model with few of them is rewarded: read the number of active latents and InfoC beside it.

Dimension letters: N samples, S sources, Z latents, A active latents.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.errors import IntaglioError

if TYPE_CHECKING:
    from numpy.typing import NDArray

NEIGHBORS = 10
"""Neighbours of the estimator for continuous latents."""
ITERATIONS = 100
"""Most iterations of a logistic regression."""
PRUNE_RATIO = 20.0


@dataclass(frozen=True)
class InfoMEC:
    """Scores of latents.

    Args:
        infom: modularity: each latent informs about one source.
        infoe: explicitness: a linear classifier reads each source from all latents, on the samples it was fitted to.
        infoc: compactness: each source is in one latent.
        infoe_held_out: explicitness on held-out samples, None without such. It can be negative.
        infoe_regression: explicitness as R² of a linear regression on ordinal sources.
        infom_gap: mean difference of the two largest NMI of an active latent.
        infoc_gap: mean difference of the two largest NMI of a source.
        nmi: NMI, float64 [S, Z].
        active: whether each latent varies, bool [Z].
        undefined: scores that had 0/0 in them.
    """

    infom: float
    infoe: float
    infoc: float
    infoe_held_out: float | None
    infoe_regression: float
    infom_gap: float
    infoc_gap: float
    nmi: NDArray[np.float64]
    active: NDArray[np.bool_]
    undefined: tuple[str, ...]


def infomec(
    sources: Any,
    latents: Any,
    *,
    discrete: bool,
    held_out: tuple[Any, Any] | None = None,
    prune_ratio: float = PRUNE_RATIO,
) -> InfoMEC:
    """Return InfoM, InfoE, InfoC and their parts.

    Args:
        sources: true factors, discrete [N, S].
        latents: latents [N, Z].
        discrete: whether latents take few values (mutual information by counting), or are continuous (by the distances
            of ten neighbours).
        held_out: further sources and latents, for InfoE of classifiers that have not seen them. Default None.
        prune_ratio: continuous latents whose range is below the largest by this ratio are inactive. Default 20.

    Raises:
        IntaglioError: scikit-learn is not installed, arrays that do not fit, or a source with one value.
    """
    labels_NS, latents_NZ = _labels(sources), np.asarray(latents)
    _check(labels_NS, latents_NZ, "latents")
    nmi_SZ = normalized_mutual_information(labels_NS, latents_NZ, discrete=discrete)
    range_Z = latents_NZ.max(0) - latents_NZ.min(0)
    active_Z = range_Z > 0 if discrete else range_Z > range_Z.max() / prune_ratio
    pruned_SA = nmi_SZ[:, active_Z]
    infom, bare_m = _ratio(pruned_SA.T)
    infoc, bare_c = _ratio(pruned_SA)
    score = None
    if held_out is not None:
        test = _labels(held_out[0], sources), np.asarray(held_out[1])
        _check(*test, "held-out latents")
        score = explicitness(labels_NS, latents_NZ, discrete=discrete, held_out=test)
    return InfoMEC(
        infom,
        explicitness(labels_NS, latents_NZ, discrete=discrete),
        infoc,
        score,
        explicitness_regression(np.asarray(sources), latents_NZ, discrete=discrete),
        _gap(pruned_SA.T),
        _gap(pruned_SA),
        nmi_SZ,
        active_Z,
        tuple(name for name, bare in (("infom", bare_m), ("infoc", bare_c)) if bare),
    )


def normalized_mutual_information(
    labels_NS: NDArray[np.int64], latents_NZ: NDArray[Any], *, discrete: bool
) -> NDArray[np.float64]:
    """Return I(s_i; z_j) / H(s_i), float64 [S, Z]."""
    metrics, feature_selection = _sklearn("metrics"), _sklearn("feature_selection")
    if not discrete:
        latents_NZ = _sklearn("preprocessing").StandardScaler().fit_transform(latents_NZ.astype(np.float64))
    nmi_SZ = np.empty((labels_NS.shape[1], latents_NZ.shape[1]))
    for i, label_N in enumerate(labels_NS.T):
        for j, latent_N in enumerate(latents_NZ.T):
            if discrete:
                nmi_SZ[i, j] = metrics.mutual_info_score(label_N, np.unique(latent_N, return_inverse=True)[1])
            else:
                nmi_SZ[i, j] = feature_selection.mutual_info_classif(
                    latent_N[:, None], label_N, discrete_features=False, n_neighbors=NEIGHBORS, random_state=0
                )[0]
        nmi_SZ[i] /= metrics.mutual_info_score(label_N, label_N)
    return nmi_SZ


def explicitness(
    labels_NS: NDArray[np.int64],
    latents_NZ: NDArray[Any],
    *,
    discrete: bool,
    held_out: tuple[NDArray[np.int64], NDArray[Any]] | None = None,
) -> float:
    """Return InfoE: the share of each source's cross-entropy that logistic regression on the latents removes.

    The regression is unregularised, of at most 100 iterations, with balanced classes, so that the entropy without
    latents is log K for K classes. With `held_out` it is scored on those samples.
    """
    encoder, inputs_NF = _inputs(latents_NZ, discrete)
    test_labels, test = (labels_NS, inputs_NF) if held_out is None else (held_out[0], encoder.transform(held_out[1]))
    shares = []
    for label_N, test_N in zip(labels_NS.T, test_labels.T, strict=True):
        zeros, few = np.zeros((len(label_N), 1)), np.zeros((len(test_N), 1))
        null = _cross_entropy(zeros, label_N, few, test_N)
        shares.append((null - _cross_entropy(inputs_NF, label_N, test, test_N)) / null)
    return float(np.mean(shares))


def explicitness_regression(sources_NS: NDArray[Any], latents_NZ: NDArray[Any], *, discrete: bool) -> float:
    """Return the mean R² of a linear regression of each standardised source on the latents."""
    linear_model, preprocessing = _sklearn("linear_model"), _sklearn("preprocessing")
    _, inputs_NF = _inputs(latents_NZ, discrete)
    scaled_NS = preprocessing.StandardScaler().fit_transform(_labels(sources_NS).astype(np.float64))
    return float(
        np.mean([linear_model.LinearRegression().fit(inputs_NF, s_N).score(inputs_NF, s_N) for s_N in scaled_NS.T])
    )


def _inputs(latents_NZ: NDArray[Any], discrete: bool) -> tuple[Any, Any]:
    """Return an encoder of latents and its output: one-hot if discrete, else standardised."""
    preprocessing = _sklearn("preprocessing")
    encoder = preprocessing.OneHotEncoder(handle_unknown="ignore") if discrete else preprocessing.StandardScaler()
    return encoder, encoder.fit_transform(latents_NZ)


def _cross_entropy(inputs_NF: Any, label_N: Any, test_NF: Any, test_N: Any) -> float:
    model = _sklearn("linear_model").LogisticRegression(C=np.inf, class_weight="balanced", max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the iterations are limited on purpose
        model.fit(inputs_NF, label_N)
    return float(_sklearn("metrics").log_loss(test_N, model.predict_proba(test_NF), labels=model.classes_))


def _ratio(nmi: NDArray[np.float64]) -> tuple[float, bool]:
    """Return the scaled mean over rows of largest over sum, and whether 0/0 occurred (a row without information)."""
    rows, columns = nmi.shape
    if not rows or columns < 2:
        return 0.0, True
    total = nmi.sum(1)
    bare = total <= 0
    share = np.where(bare, 1 / columns, nmi.max(1) / np.where(bare, 1, total))
    return float((share.mean() - 1 / columns) / (1 - 1 / columns)), bool(bare.any())


def _gap(nmi: NDArray[np.float64]) -> float:
    rows, columns = nmi.shape
    if not rows or columns < 2:
        return 0.0
    ordered = np.sort(nmi, axis=1)
    return float((ordered[:, -1] - ordered[:, -2]).mean())


def _labels(sources: Any, known: Any = None) -> NDArray[np.int64]:
    """Return discrete sources as integers from 0, numbered by the values of `known`. Default: by their own."""
    array = np.asarray(sources)
    if array.ndim != 2:
        raise IntaglioError(f"the sources have the shape {list(array.shape)}; [N, S] is accepted")
    values = [np.unique(column) for column in np.asarray(sources if known is None else known).T]
    for number, (own, column) in enumerate(zip(values, array.T, strict=True)):
        if len(own) < 2:
            raise IntaglioError(f"source {number} has one value; a source of information needs two")
        if not np.isin(column, own).all():
            raise IntaglioError(f"source {number} has held-out values that the other samples lack")
    return np.stack([np.searchsorted(own, column) for own, column in zip(values, array.T, strict=True)], axis=1)


def _check(labels_NS: NDArray[np.int64], latents_NZ: NDArray[Any], what: str) -> None:
    if latents_NZ.ndim != 2 or len(latents_NZ) != len(labels_NS) or not latents_NZ.shape[1]:
        raise IntaglioError(
            f"the {what} have the shape {list(latents_NZ.shape)}; [{len(labels_NS)}, Z], as many rows as sources, is "
            "accepted"
        )
    if not np.isfinite(latents_NZ).all():
        raise IntaglioError(f"the {what} hold NaN or infinite values; only finite ones are accepted")


def _sklearn(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"sklearn.{module}")
    except ImportError:
        raise IntaglioError("InfoMEC needs the package scikit-learn: pip install 'intaglio[evidence]'") from None


__all__ = ["InfoMEC", "explicitness", "explicitness_regression", "infomec", "normalized_mutual_information"]
