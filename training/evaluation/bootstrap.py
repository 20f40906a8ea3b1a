"""95% intervals and p-values by a bootstrap over patients: questions about one patient are not independent of each other.

Patients are drawn with replacement, each with all of its questions (Efron and Tibshirani 1993, An Introduction to the
Bootstrap, chapter 13: percentile intervals). The draws depend on the patients, the number of resamples and the seed
alone, so whatever is computed on the same questions is paired.

What the data do not say is None, never NaN:
    the score, its interval and its p-value, where the score is undefined, as an AUROC of one class alone;
    the interval and the p-value, where there are fewer than `MIN_PATIENTS`, or where the score is undefined in more than a
    tenth of the resamples, as with fewer than about three patients of a class. Otherwise such resamples are left out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

ODDS_DECIMALS = 4  # of log-odds; float32 gives equal inputs in other batches the same within 1e-5
NUM_RESAMPLES = 2000
MAX_UNDEFINED = 0.1
# percentile intervals of fewer are far too narrow, and p-values as small as the resamples allow (2 patients: 3 different means)
MIN_PATIENTS = 10
# numbers held at once, 1 MiB: it fits the cache, and memory does not grow with the resamples
CHUNK_SIZE = 2**17
# of a difference of scores of about 1
ROUNDING_ERROR = 1e-9

# column sums [..., k] -> scores [...]
Statistic = Callable[[np.ndarray], np.ndarray]


class Estimate(NamedTuple):
    """A score and its 95% interval."""

    value: float | None
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, Any]:
        """As the results have it."""
        return {"value": self.value, "interval_95": _interval(self.low, self.high)}


class Difference(NamedTuple):
    """A difference of two scores on the same questions, its 95% interval and its two-sided p-value."""

    value: float | None
    low: float | None
    high: float | None
    p_value: float | None
    at_floor: bool = False  # no resample was on the other side: p may be smaller than so many can show

    def to_dict(self) -> dict[str, Any]:
        """As the results have it."""
        row = {"difference": self.value, "interval_95": _interval(self.low, self.high), "p_value": self.p_value}
        return {**row, "p_value_at_floor": True} if self.at_floor else row


def _interval(low: float | None, high: float | None) -> list[float] | None:
    return None if low is None or high is None else [low, high]


def clusters(patients: Sequence[Any]) -> tuple[np.ndarray, int]:
    """The patient of each question as a number [n], in the order of the sorted names, and how many patients there are.

    Args:
        patients: [n] names or numbers; a tuple or list where the ECGs are of several patients, of whom the first counts.

    Raises:
        ValueError: there is no question, or one has no patient.
    """
    names = [(*patient, None)[0] if isinstance(patient, tuple | list) else patient for patient in patients]
    if not names:
        raise ValueError("There are no questions; expected at least one.")
    if None in names:
        raise ValueError(
            f"Question {names.index(None)}, counted from 0, has no patient; give it a name of its own, such as its row."
        )
    unique, numbers = np.unique(np.array(names, dtype=str), return_inverse=True)
    return numbers, len(unique)


def _num_drawn(num_patients: int, num_resamples: int) -> int:
    """0 where so few patients do not show how patients differ."""
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; it must be at least 1.")
    return num_resamples if num_patients >= MIN_PATIENTS else 0


def _draws(num_patients: int, num_resamples: int, seed: int, width: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Some resamples at a time: which, and how often each patient is in them, [resamples, num_patients].

    Args:
        width: numbers that the caller holds for each resample.
    """
    rng = np.random.default_rng(seed)
    at_once = max(1, CHUNK_SIZE // width)
    for start in range(0, num_resamples, at_once):
        num = min(at_once, num_resamples - start)
        drawn = rng.integers(num_patients, size=(num, num_patients))  # by row: equal in chunks of any size
        drawn += num_patients * np.arange(num)[:, None]  # numbers of their own for each resample, for bincount
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        yield slice(start, start + num), counts.astype(float)  # BLAS multiplies no integers


def resampled_sums(
    samples: Any, patients: Sequence[Any], num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """The column sums of each resample: all that scores on these questions need, in one pass.

    Args:
        samples: [n, k], or [n] for one column.
        patients: [n], as `clusters` takes them.

    Returns:
        [num_resamples, k]; [0, k] of fewer patients than `MIN_PATIENTS`.

    Raises:
        ValueError: the lengths differ, a sample is not finite, `num_resamples` is less than 1; as `clusters`.
    """
    columns = _as_columns(samples, patients)
    numbers, num_patients = clusters(patients)
    order = np.argsort(numbers, kind="stable")
    starts = np.searchsorted(numbers[order], np.arange(num_patients))  # first row of each patient, as `reduceat` wants
    # on so fine a grid that sums are exact: they must not hang on their order, which is another with more threads
    largest = num_patients * np.add.reduceat(np.abs(columns[order]), starts).max(axis=0)
    steps = 2.0 ** (52 - np.ceil(np.log2(np.maximum(largest, 1))))  # float64 has 53 bits of mantissa
    sums = np.add.reduceat(np.round(columns[order] * steps) / steps, starts)
    resampled = np.empty((_num_drawn(num_patients, num_resamples), sums.shape[1]))
    for where, counts in _draws(num_patients, len(resampled), seed, width=num_patients):
        resampled[where] = counts @ sums  # exact, so independent of how BLAS orders it
    return resampled


def estimate(value: float, replicates: np.ndarray) -> Estimate:
    """A score with the percentile interval of its values in the resamples, [num_resamples]."""
    if not np.isfinite(value):
        return Estimate(None, None, None)
    defined = _defined(replicates)
    if defined is None:
        return Estimate(float(value), None, None)
    low, high = np.quantile(defined, [0.025, 0.975])  # percentile bootstrap
    return Estimate(float(value), float(low), float(high))


def difference(value: float, replicates: np.ndarray) -> Difference:
    """A difference of scores with its percentile interval and p-value, from the differences d in each resample.

    p = min(1, 2 min(#(d <= 0) + 1, #(d >= 0) + 1) / (num_resamples + 1)): twice the share of resamples on the far side of
    no difference, which inverts the percentile interval. The 1 counts the data themselves among the resamples, so that p
    is never 0 (Davison and Hinkley 1997, Bootstrap Methods and their Application, chapter 4); it is at least
    2 / (num_resamples + 1), where `at_floor` says so.
    """
    score, defined = estimate(value, replicates), _defined(replicates)
    if score.value is None or defined is None:
        return Difference(*score, None)
    fewer = min((defined <= ROUNDING_ERROR).sum(), (defined >= -ROUNDING_ERROR).sum())  # ties count on both sides
    return Difference(*score, min(1.0, 2 * (int(fewer) + 1) / (len(defined) + 1)), at_floor=int(fewer) == 0)


def p_in_words(p_value: float | None, at_floor: bool = False) -> str:
    """A p-value for a table: `0.031`, `< 0.001` where it is less or the resamples show no smaller one, `none`."""
    if p_value is None:
        return "none"
    if at_floor:  # rounded up, so that it holds
        return f"< {min(1.0, (math.floor(1000 * p_value + 1e-9) + 1) / 1000):.3f}"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _defined(replicates: np.ndarray) -> np.ndarray | None:
    finite = replicates[np.isfinite(replicates)]
    enough = len(finite) > 0 and len(finite) >= (1 - MAX_UNDEFINED) * len(replicates)
    return finite if enough else None


def _as_columns(samples: Any, patients: Sequence[Any]) -> np.ndarray:
    columns = np.asarray(samples, dtype=float)
    if columns.ndim == 1:
        columns = columns[:, None]
    if columns.ndim != 2 or len(columns) != len(patients):
        raise ValueError(
            f"The samples are {np.shape(samples)}; expected a row for each of the {len(patients)} questions."
        )
    faults = np.flatnonzero(~np.isfinite(columns).all(axis=1))
    if len(faults):
        raise ValueError(
            f"Sample {faults[0]}, counted from 0, is {columns[faults[0]].tolist()}; expected finite numbers. Leave out "
            "questions that have no score."
        )
    return columns


def class_counts(references: Sequence[str], predictions: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Samples [n, 3 * classes] of closed questions: whether each class is the reference, the prediction, and both.

    A prediction that is none of the classes is wrong, and in the third part nowhere.

    Raises:
        ValueError: a reference is none of the classes; the lengths differ.
    """
    if len(references) != len(predictions):
        raise ValueError(f"There are {len(references)} references and {len(predictions)} predictions; expected pairs.")
    for reference in references:
        if reference not in classes:
            raise ValueError(f"The reference {reference!r} is none of the classes {', '.join(classes)}.")
    true, predicted = (np.array(texts, dtype=str)[:, None] == np.array(classes) for texts in (references, predictions))
    return np.hstack([true, predicted, true & predicted]).astype(float)


def balanced_accuracy(counts: np.ndarray) -> np.ndarray:
    """Mean recall over the classes that occur, from sums of `class_counts`, [..., 3 * classes] -> [...]."""
    true, _, hits = np.split(counts, 3, axis=-1)
    return _mean_where(true > 0, hits, true)


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur or are predicted, from sums of `class_counts`, [..., 3 * classes] -> [...]."""
    true, predicted, hits = np.split(counts, 3, axis=-1)
    return _mean_where(true + predicted > 0, 2 * hits, true + predicted)


def _mean_where(occurs: np.ndarray, numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return (numerator / np.where(occurs, denominator, 1)).sum(axis=-1) / occurs.sum(axis=-1)  # absent classes: 0 / 1


def resampled_auroc(
    scores: Any,
    labels: Any,
    patients: Sequence[Any],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    asked: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC of each class, in which ties count half: [classes], and in each resample of `resampled_sums`, [num_resamples, classes];
    NaN where one side is missing.

    Args:
        scores: [n] or [n, classes]; higher speaks for the class.
        labels: of the same shape; 1 where the class is there, else 0.
        patients: [n], as `clusters` takes them.
        asked: of the same shape; False where a question is not about the class. None: all are about all.

    Raises:
        ValueError: the shapes differ, a score is NaN, a label is neither 0 nor 1, `num_resamples` is less than 1; as `clusters`.
    """
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels)
    if scores.shape != labels.shape or scores.ndim not in (1, 2) or len(scores) != len(patients):
        raise ValueError(
            f"Scores are {scores.shape} and labels {labels.shape}; expected both alike, a row for each of the "
            f"{len(patients)} questions."
        )
    if np.isnan(scores).any():
        raise ValueError(f"The scores of {int(np.isnan(scores).sum())} of {scores.size} are NaN; expected numbers.")
    others = labels[(labels != 0) & (labels != 1)]
    if len(others):
        raise ValueError(f"A label is {others[0]}; expected 1 where the class is there, else 0.")
    scores, labels = scores.reshape(len(scores), -1), labels.reshape(len(labels), -1).astype(bool)
    asked = np.ones_like(labels) if asked is None else asked.reshape(labels.shape)

    numbers, num_patients = clusters(patients)
    functions = [
        _auroc_by_weight(score[about], label[about], numbers[about])
        for score, label, about in zip(scores.T, labels.T, asked.T, strict=True)
    ]
    value = np.concatenate([function(np.ones((num_patients, 1))) for function in functions])  # each patient once
    replicates = np.empty((_num_drawn(num_patients, num_resamples), len(functions)))
    for where, counts in _draws(num_patients, len(replicates), seed, width=len(scores)):
        weights = np.ascontiguousarray(counts.T)  # [patients, resamples]: rows of it are picked
        for column, function in enumerate(functions):
            replicates[where, column] = function(weights)
    return value, replicates


def auroc_of_candidates(
    types: Sequence[str],
    candidates: Sequence[Sequence[str]],
    references: Sequence[str],
    likelihoods: Sequence[Sequence[float]],
    patients: Sequence[Any],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str | None, tuple[float, np.ndarray]]:
    """AUROC of P(candidate) against all others: the mean over the candidates of a type of questions, and of that over the types.

    Args:
        types: of each question.
        candidates: of each question the answers among which it was decided, those of its type.
        references: right answers.
        likelihoods: of each question the log-likelihood of each candidate.

    Returns:
        Type, or None for all -> value and replicates, in the resamples of `resampled_sums`. Without types that have only one right
        answer; empty if there are no others.
    """
    columns: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = []
    for kind in sorted(set(types)):
        rows = np.array([row for row, other in enumerate(types) if other == kind])
        names = candidates[rows[0]]  # all questions of a type have the same
        logs = np.array([likelihoods[row] for row in rows])
        # of two candidates one says all
        for place in range(len(names))[len(names) == 2 :]:
            labels = np.array([references[row] == names[place] for row in rows])
            if labels.any() and not labels.all():  # else there is no AUROC
                scores, truth, asked = (np.zeros(len(types)) for _ in range(3))
                # log-odds tell apart what rounds to the same share; equal inputs differ by rounding errors alone
                others = np.delete(logs, place, axis=1)
                top = others.max(axis=1)  # taken out before `exp`, which would underflow
                odds = logs[:, place] - top - np.log(np.exp(others - top[:, None]).sum(axis=1))
                scores[rows] = np.round(odds, ODDS_DECIMALS)
                truth[rows], asked[rows] = labels, 1
                columns.append((kind, scores, truth, asked))
    if not columns:
        return {}
    kinds = np.array([kind for kind, *_ in columns])
    scores, truth, asked = (np.stack(part, axis=1) for part in list(zip(*columns, strict=True))[1:])
    values, replicates = resampled_auroc(scores, truth, patients, num_resamples, seed, asked=asked.astype(bool))
    aurocs: dict[str | None, tuple[float, np.ndarray]] = {
        kind: (float(values[kinds == kind].mean()), replicates[:, kinds == kind].mean(axis=1))
        for kind in dict.fromkeys(kinds.tolist())
    }
    all_values, all_replicates = zip(*aurocs.values(), strict=True)
    aurocs[None] = (float(np.mean(all_values)), np.mean(all_replicates, axis=0))
    return aurocs


def _auroc_by_weight(scores: np.ndarray, labels: np.ndarray, numbers: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The AUROC as a function of how often each patient counts, [num_patients, resamples] -> [resamples].

    It is the share of pairs of a positive and a negative in which the positive has the higher score: the sorted negatives'
    weights are cumulated once, and each positive looks up how many lie below it.
    """
    negative_scores = np.sort(scores[~labels])
    negatives = numbers[~labels][np.argsort(scores[~labels])]
    positives = numbers[labels]
    below = np.searchsorted(negative_scores, scores[labels], side="left")  # negatives below each positive
    not_above = np.searchsorted(negative_scores, scores[labels], side="right")  # or equal to it: ties count half

    def auroc(weights: np.ndarray) -> np.ndarray:
        cumulated = np.zeros((len(negatives) + 1, weights.shape[1]))  # row i: of the i lowest negatives
        np.cumsum(weights[negatives], axis=0, out=cumulated[1:])
        of_positives = weights[positives]
        wins = (of_positives * (cumulated[below] + cumulated[not_above])).sum(axis=0) / 2
        with np.errstate(invalid="ignore"):  # 0 / 0, so NaN, where a class was not drawn
            return wins / (of_positives.sum(axis=0) * cumulated[-1])

    return auroc


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several tests, adjusted so that the chance of any false finding stays below the level.

    Holm 1979, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6.

    Raises:
        ValueError: one is not within 0 and 1.
    """
    p = np.asarray(p_values, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():  # `not` refuses NaN too
        raise ValueError(f"The p-values are {p.tolist()}; expected numbers from 0 to 1.")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))  # times m, ..., 1
    return adjusted.tolist()
