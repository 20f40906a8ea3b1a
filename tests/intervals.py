"""Intervals of one score alone, in the shortest way: what the tests compare with other libraries, and results with."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from elm_ecg.training.evaluation.bootstrap import (
    NUM_RESAMPLES,
    Difference,
    Estimate,
    Statistic,
    difference,
    estimate,
    resampled_auroc,
    resampled_sums,
)


def mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def replicates_of(
    samples: Any, patients: Sequence[Any], statistic: Statistic | None, num_resamples: int, seed: int
) -> tuple[float, np.ndarray]:
    """A statistic of the sums of [n, k] samples, or the mean of [n], and what it is in each resample."""
    columns = np.asarray(samples, dtype=float)
    if statistic is None:
        columns, statistic = np.stack([columns, np.ones_like(columns)], axis=1), mean
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(statistic(columns.sum(axis=0))), statistic(resampled_sums(columns, patients, num_resamples, seed))


def bootstrap(
    samples: Any,
    patients: Sequence[Any],
    statistic: Statistic | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    return estimate(*replicates_of(samples, patients, statistic, num_resamples, seed))


def paired_difference(
    a: Any,
    b: Any,
    patients: Sequence[Any],
    statistic: Statistic | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Difference:
    (of_a, replicates_a), (of_b, replicates_b) = (
        replicates_of(samples, patients, statistic, num_resamples, seed) for samples in (a, b)
    )
    return difference(of_a - of_b, replicates_a - replicates_b)


def bootstrap_auroc(
    scores: Any, labels: Any, patients: Sequence[Any], num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Estimate:
    """The mean over the classes."""
    value, replicates = resampled_auroc(scores, labels, patients, num_resamples, seed)
    return estimate(value.mean(), replicates.mean(axis=1))


def paired_auroc_difference(
    a: Any, b: Any, labels: Any, patients: Sequence[Any], num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Difference:
    of_a, replicates_a = resampled_auroc(a, labels, patients, num_resamples, seed)
    of_b, replicates_b = resampled_auroc(b, labels, patients, num_resamples, seed)
    return difference((of_a - of_b).mean(), (replicates_a - replicates_b).mean(axis=1))
