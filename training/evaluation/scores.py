"""The scores of an evaluation: each metric under each condition with its interval by patient, and what is lost without the ECG."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import evaluate
import numpy as np

from elm_ecg.training.evaluation.bootstrap import (
    Statistic,
    auroc_of_candidates,
    balanced_accuracy,
    class_counts,
    difference,
    estimate,
    macro_f1,
    resampled_sums,
)
from elm_ecg.training.evaluation.questions import Question
from elm_ecg.training.files import resource

METRICS = resource("training/evaluation/metrics")  # modules of `evaluate`
METRIC_NAMES = sorted(path.stem for path in METRICS.glob("*/*.py") if path.stem == path.parent.name)
BASELINE = "most_frequent"  # the answer that training data suggest without any model
MAX_CLASSES = 20  # of a closed question
NUM_STATEMENTS = 20  # that are told as missed most often
PARTS = ("think", "answer")  # of answers that reason, in tags of these names
LOST = {
    "zeroed": "the ECG zeroed",
    "noise": "noise in its place",
    "swapped": "another patient's",
    "left_out": "none",
    BASELINE: "the most frequent answer",
}


@dataclass
class Figure:
    """One score as a statistic of the sums of its samples.

    Args:
        samples: [questions, k]; rows of questions that it is not about are zero.
        details: what else is told of it.
    """

    samples: np.ndarray
    statistic: Statistic
    details: dict[str, Any] = field(default_factory=dict)


# scope (None for all questions, else a question type), metric, and a figure of it or "value"
Key = tuple[str | None, str, str]


def load_metrics(names: Sequence[str]) -> dict[str, evaluate.Metric]:
    """The modules of these metrics.

    Raises:
        ValueError: there is no such metric.
        ImportError, OSError: a library that it needs, or WordNet, is not there.
    """
    for name in names:
        if name not in METRIC_NAMES:
            raise ValueError(f"There is no metric {name!r}; expected some of {', '.join(METRIC_NAMES)}.")
    return {name: evaluate.load(str(METRICS / name), keep_in_memory=True) for name in names}


def closed_types(questions: Sequence[Question]) -> list[str]:
    """The types of questions whose right answers are a few, each given twice or more in the mean."""
    answers: dict[str, Counter[str]] = {}
    for question in questions:
        answers.setdefault(question.question_type, Counter())[question.answer.casefold()] += 1
    few = {kind: min(MAX_CLASSES, counts.total() // 2) for kind, counts in answers.items()}
    return [kind for kind, counts in sorted(answers.items()) if 2 <= len(counts) <= few[kind]]


def part_of(text: str, part: str) -> str:
    """What stands in the tags of `part` (`think` or `answer`); an answer without tags is what follows the thinking."""
    found = re.search(rf"<{part}>(.*?)(?:</{part}>|$)", text, re.DOTALL)
    if found:
        return found[1].strip()
    return text.rpartition("</think>")[2].strip() if part == "answer" else ""


@dataclass
class Scorer:
    """Scores the answers to the same questions under several conditions.

    Args:
        modules: metrics, by their names in training/evaluation/metrics.
        options: metric -> what else its `compute` takes.
        candidates: [questions] answers among which each question was decided, if by their likelihood.
    """

    questions: list[Question]
    modules: dict[str, evaluate.Metric]
    num_resamples: int
    seed: int
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    candidates: list[list[str]] | None = None

    def __post_init__(self) -> None:
        self.patients = [question.patient_id for question in self.questions]
        self.references = [question.answer for question in self.questions]
        self.kinds = np.array([question.question_type for question in self.questions])
        self.types: list[str] = [str(kind) for kind in np.unique(self.kinds)]
        self.closed = closed_types(self.questions) if "closed_set" in self.modules else []

    def summarise(
        self, answers: dict[str, list[str]], likelihoods: dict[str, list[list[float]]] | None = None
    ) -> dict[str, Any]:
        """
        Args:
            answers: condition -> texts; `ecg` first.
            likelihoods: condition -> log-likelihood of each candidate of each question.

        Returns:
            `conditions`: each with `metrics`, `by_question_type` and, where right answers have tags, `parts` (metric -> `value`,
            `interval_95` and details); `ecg_minus`: condition -> metric -> difference with interval and p-value; and how many
            questions and patients there are.
        """
        conditions: dict[str, Any] = {}
        replicated: dict[str, dict[str, tuple[float, np.ndarray]]] = {}
        for condition, texts in answers.items():
            figures = self._figures(texts)
            found = self._resample(figures)
            if likelihoods and condition in likelihoods:
                found |= self._auroc(likelihoods[condition])
            rows: dict[str | None, dict[str, Any]] = {}
            for (scope, metric, name), (value, replicates) in found.items():
                score = estimate(value, replicates).to_dict()
                row = rows.setdefault(scope, {}).setdefault(metric, {})
                key = (scope, metric, name)
                row |= score if name == "value" else {name: score}
                if key in figures:
                    row |= figures[key].details
            conditions[condition] = {
                "metrics": rows[None],
                "by_question_type": {kind: rows[kind] for kind in self.types if kind in rows},
            }
            parts = {part: rows[f"<{part}>"] for part in PARTS if f"<{part}>" in rows}
            if parts:
                conditions[condition]["parts"] = parts
            replicated[condition] = {
                metric: found[None, metric, "value"]
                for scope, metric, name in found
                if scope is None and name == "value"
            }
        first, *others = answers
        lost = {
            other: {
                metric: difference(
                    value - replicated[other][metric][0], replicates - replicated[other][metric][1]
                ).to_dict()
                for metric, (value, replicates) in replicated[first].items()
                if metric in replicated[other]
            }
            for other in others
        }
        return {
            "num_questions": len(self.questions),
            "num_patients": len(set(self.patients)),
            "questions_by_type": {kind: int((self.kinds == kind).sum()) for kind in self.types},
            "conditions": conditions,
            "ecg_minus": lost,
        }

    def _figures(self, texts: list[str]) -> dict[Key, Figure]:
        figures: dict[Key, Figure] = {}
        for name, module in self.modules.items():
            if name == "closed_set":
                figures |= self._closed(module, texts)
                continue
            whole = self._figure(module, texts, self.references, name)
            figures[None, name, "value"] = whole
            for kind in self.types:
                inside = (self.kinds == kind)[:, None]
                figures[kind, name, "value"] = Figure(whole.samples * inside, whole.statistic)
            for part in PARTS:
                rows = [i for i, reference in enumerate(self.references) if f"<{part}>" in reference]
                right = [part_of(self.references[i], part) for i in rows]
                if not rows or not all(right):
                    continue
                of_part = self._figure(module, [part_of(texts[i], part) for i in rows], right, name)
                samples = np.zeros((len(texts), of_part.samples.shape[1]))
                samples[rows] = of_part.samples
                figures[f"<{part}>", name, "value"] = Figure(samples, of_part.statistic)
        return figures

    def _figure(self, module: evaluate.Metric, texts: list[str], references: list[str], name: str) -> Figure:
        scores = module.compute(predictions=texts, references=references, **self.options.get(name, {}))
        samples = np.asarray(scores["samples"], dtype=float)
        details: dict[str, Any] = {}
        if "pairs" in scores:  # of answers that are lists
            details = {key: scores[key] for key in ("precision", "recall")}
            for key in ("missed", "extra"):
                counts = Counter(statement for pair in scores["pairs"] for statement in pair[key])
                details[key] = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:NUM_STATEMENTS])
        if hasattr(module, "statistic"):  # no mean over the answers
            return Figure(samples, module.statistic)
        return Figure(np.stack([samples, np.ones_like(samples)], axis=1), _mean, details)

    def _closed(self, module: evaluate.Metric, texts: list[str]) -> dict[Key, Figure]:
        figures: dict[Key, Figure] = {}
        all_counts: list[np.ndarray] = []
        right_and_all = np.zeros((len(texts), 2))
        for kind in self.closed:
            rows = np.flatnonzero(self.kinds == kind)
            found = module.compute(
                predictions=[texts[row] for row in rows],
                references=[self.references[row] for row in rows],
            )
            right, given = zip(*found["samples"], strict=True)
            counts = np.zeros((len(texts), 3 * len(found["labels"])))
            counts[rows] = class_counts(right, given, found["labels"])
            all_counts.append(counts)
            hits = np.zeros((len(texts), 2))
            hits[rows] = np.stack([np.equal(right, given), np.ones(len(rows))], axis=1)
            right_and_all += hits
            details = {name: found[name] for name in ("labels", "per_class", "confusion_matrix")}
            figures[kind, "closed_set", "value"] = Figure(hits, _mean, details)
            figures[kind, "closed_set", "balanced_accuracy"] = Figure(counts, balanced_accuracy)
            figures[kind, "closed_set", "macro_f1"] = Figure(counts, macro_f1)
        if figures:
            ends = np.cumsum([counts.shape[1] for counts in all_counts])[:-1]
            joint = np.hstack(all_counts)
            figures[None, "closed_set", "value"] = Figure(right_and_all, _mean)
            for name, function in (("balanced_accuracy", balanced_accuracy), ("macro_f1", macro_f1)):
                figures[None, "closed_set", name] = Figure(joint, _mean_over_types(function, ends))
        return figures

    def _resample(self, figures: dict[Key, Figure]) -> dict[Key, tuple[float, np.ndarray]]:
        """The value of each figure, and its value in each resample of the patients."""
        samples = np.hstack([figure.samples for figure in figures.values()])
        ends = np.cumsum([figure.samples.shape[1] for figure in figures.values()])[:-1]
        sums = np.split(samples.sum(axis=0), ends)
        resampled = np.split(resampled_sums(samples, self.patients, self.num_resamples, self.seed), ends, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):  # a type that is not drawn has no score
            return {
                key: (float(figure.statistic(total)), figure.statistic(drawn))
                for (key, figure), total, drawn in zip(figures.items(), sums, resampled, strict=True)
            }

    def _auroc(self, likelihoods: list[list[float]]) -> dict[Key, tuple[float, np.ndarray]]:
        assert self.candidates is not None
        found = auroc_of_candidates(
            self.kinds.tolist(),
            self.candidates,
            self.references,
            likelihoods,
            self.patients,
            self.num_resamples,
            self.seed,
        )
        return {(kind, "auroc", "value"): figure for kind, figure in found.items()}


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _mean_over_types(function: Statistic, ends: np.ndarray) -> Statistic:
    return lambda sums: np.mean([function(part) for part in np.split(sums, ends, axis=-1)], axis=0)


def main_metric(results: dict[str, Any]) -> str:
    """What the plots and the verdict are about."""
    return "auroc" if "auroc" in results["conditions"]["ecg"]["metrics"] else "exact_match"


def as_percent(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:.1f}"


def with_interval(row: dict[str, Any], key: str = "value", sign: str = "") -> str:
    """A score or difference in percent with its interval."""
    if row[key] is None:
        return "undefined"
    text = f"{100 * row[key]:{sign}.1f}"
    if row["interval_95"] is None:
        return text
    low, high = row["interval_95"]
    return f"{text} [{100 * low:.1f}, {100 * high:.1f}]"


def in_words(results: dict[str, Any]) -> str:
    """One line that says whether the model looks at the ECG."""
    metric = main_metric(results)
    name = {"auroc": "AUROC", "exact_match": "Exact match"}[metric]
    score = with_interval(results["conditions"]["ecg"]["metrics"][metric])
    lost = {other: rows[metric] for other, rows in results["ecg_minus"].items() if metric in rows}
    intervals = {other: row["interval_95"] for other, row in lost.items()}
    if not lost or None in intervals.values():
        return (
            f"{name} {score}%: nothing can be said of what the ECG adds; too few patients, or nothing to compare with."
        )
    if set(lost) <= {BASELINE}:
        return f"{name} {score}%: it was asked with its ECG alone, so nothing can be said of whether it looks at it."
    listed = ", ".join(f"{with_interval(row, 'difference', '+')} over {LOST[other]}" for other, row in lost.items())
    not_better = [LOST[other] for other, (low, _) in intervals.items() if low <= 0]
    verdict = (
        f"not shown to be better than with {' or '.join(not_better)}: the model may not look at the ECG"
        if not_better
        else "better than all that does without: the model looks at the ECG"
    )
    return f"{name} {score}% ({listed}), {verdict}."
