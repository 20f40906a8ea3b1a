"""The scores of an evaluation: each metric under each condition with its interval by patient, and the difference that the ECG makes."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
from elm_ecg.training.files import resource

# `elm compare` needs only the metrics' names: these imports would take 15 seconds (PyTorch) and 3 (`datasets`)
if TYPE_CHECKING:
    from evaluate import Metric

    from elm_ecg.training.evaluation.questions import Question

METRICS = resource("training/evaluation/metrics")  # modules of `evaluate`
METRIC_NAMES = sorted(path.stem for path in METRICS.glob("*/*.py") if path.stem == path.parent.name)
MAX_CLASSES = 20  # of a closed question
NUM_STATEMENTS = 20  # that are listed as missed or extra, the most frequent
PARTS = ("think", "answer")  # of answers that reason, in tags of these names


@dataclass
class Figure:
    """One score as a statistic of the sums of its samples.

    Args:
        samples: [questions, k]; rows of questions that it is not about are zero.
        details: what else the results hold about it.
    """

    samples: np.ndarray
    statistic: Statistic
    details: dict[str, Any] = field(default_factory=dict)


# scope (None for all questions, else a question type), metric, and a figure of it or "value"
Key = tuple[str | None, str, str]


def load_metrics(names: Sequence[str]) -> "dict[str, Metric]":
    """The modules of these metrics.

    Raises:
        ValueError: there is no such metric.
        ImportError, OSError: a library that it needs, or WordNet, is not there.
    """
    for name in names:
        if name not in METRIC_NAMES:
            raise ValueError(f"There is no metric {name!r}; expected some of {', '.join(METRIC_NAMES)}.")
    import evaluate

    return {name: evaluate.load(str(METRICS / name), keep_in_memory=True) for name in names}  # no cache files


def closed_types(questions: "Sequence[Question]") -> list[str]:
    """The types of questions with 2 to `MAX_CLASSES` different right answers, each right twice or more on average."""
    answers: dict[str, Counter[str]] = {}
    for question in questions:
        answers.setdefault(question.question_type, Counter())[question.answer.casefold()] += 1
    few = {kind: min(MAX_CLASSES, counts.total() // 2) for kind, counts in answers.items()}
    return [kind for kind, counts in sorted(answers.items()) if 2 <= len(counts) <= few[kind]]


def part_of(text: str, part: str) -> str:
    """The text within the tags of `part` (`think` or `answer`); without tags the answer is what follows the thinking."""
    inside = re.search(rf"<{part}>(.*?)(?:</{part}>|$)", text, re.DOTALL)  # `$`: cut off by max_new_tokens
    if inside:
        return inside[1].strip()
    return text.rpartition("</think>")[2].strip() if part == "answer" else ""


@dataclass
class Scorer:
    """Scores the answers to the same questions under several conditions.

    Args:
        modules: metrics, by their names in training/evaluation/metrics.
        options: metric -> what else its `compute` takes.
        candidates: [questions] answers among which each question was decided, if by their likelihood.
    """

    questions: "list[Question]"
    modules: "dict[str, Metric]"
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
        """The scores of all conditions, as `results` describes them: `conditions`, `ecg_minus`, and how many questions and
        patients there are.

        Args:
            answers: condition -> texts; `ecg` first.
            likelihoods: condition -> log-likelihood of each candidate of each question.
        """
        conditions: dict[str, Any] = {}
        replicated: dict[str, dict[str, tuple[float, np.ndarray]]] = {}
        for condition, texts in answers.items():
            figures = self._figures(texts)
            scores = self._resample(figures)
            if likelihoods and condition in likelihoods:
                scores |= self._auroc(likelihoods[condition])
            rows: dict[str | None, dict[str, Any]] = {}
            for key, (value, replicates) in scores.items():
                scope, metric, name = key
                score = estimate(value, replicates).to_dict()
                row = rows.setdefault(scope, {}).setdefault(metric, {})
                row |= score if name == "value" else {name: score}
                if key in figures:  # AUROC has none
                    row |= figures[key].details
            conditions[condition] = {
                "metrics": rows[None],
                "by_question_type": {kind: rows[kind] for kind in self.types if kind in rows},
            }
            parts = {part: rows[f"<{part}>"] for part in PARTS if f"<{part}>" in rows}
            if parts:
                conditions[condition]["parts"] = parts
            replicated[condition] = {
                metric: scores[None, metric, "value"]
                for scope, metric, name in scores
                if scope is None and name == "value"
            }
        first, *others = answers  # `ecg`, and what it is compared with
        differences = {
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
            "ecg_minus": differences,
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
                of_kind = (self.kinds == kind)[:, None]
                figures[kind, name, "value"] = Figure(whole.samples * of_kind, whole.statistic)  # others add 0
            for part in PARTS:
                rows = [i for i, reference in enumerate(self.references) if f"<{part}>" in reference]
                right = [part_of(self.references[i], part) for i in rows]
                if not rows or not all(right):  # no metric takes an empty reference
                    continue
                of_part = self._figure(module, [part_of(texts[i], part) for i in rows], right, name)
                samples = np.zeros((len(texts), of_part.samples.shape[1]))
                samples[rows] = of_part.samples
                figures[f"<{part}>", name, "value"] = Figure(samples, of_part.statistic)
        return figures

    def _figure(self, module: "Metric", texts: list[str], references: list[str], name: str) -> Figure:
        scores: Any = module.compute(predictions=texts, references=references, **self.options.get(name, {}))
        samples = np.asarray(scores["samples"], dtype=float)
        details: dict[str, Any] = {}
        if "pairs" in scores:  # of a metric of answers that are lists of statements
            details = {key: scores[key] for key in ("precision", "recall")}
            for key in ("missed", "extra"):
                counts = Counter(statement for pair in scores["pairs"] for statement in pair[key])
                details[key] = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:NUM_STATEMENTS])
        if hasattr(module, "statistic"):  # no mean over the answers, such as BLEU
            return Figure(samples, module.statistic)
        return Figure(np.stack([samples, np.ones_like(samples)], axis=1), _mean, details)  # scores, and their number

    def _closed(self, module: "Metric", texts: list[str]) -> dict[Key, Figure]:
        """Accuracy, balanced accuracy and macro F1 of each type of closed questions, and of all types together."""
        figures: dict[Key, Figure] = {}
        all_counts: list[np.ndarray] = []
        right_and_all = np.zeros((len(texts), 2))
        for kind in self.closed:
            rows = np.flatnonzero(self.kinds == kind)
            scores: Any = module.compute(
                predictions=[texts[row] for row in rows], references=[self.references[row] for row in rows]
            )
            right, answered = zip(*scores["samples"], strict=True)
            counts = np.zeros((len(texts), 3 * len(scores["labels"])))  # as `class_counts` has them
            counts[rows] = class_counts(right, answered, scores["labels"])
            all_counts.append(counts)
            hits = np.zeros((len(texts), 2))
            hits[rows] = np.stack([np.equal(right, answered), np.ones(len(rows))], axis=1)
            right_and_all += hits
            details = {name: scores[name] for name in ("labels", "per_class", "confusion_matrix")}
            figures[kind, "closed_set", "value"] = Figure(hits, _mean, details)
            figures[kind, "closed_set", "balanced_accuracy"] = Figure(counts, balanced_accuracy)
            figures[kind, "closed_set", "macro_f1"] = Figure(counts, macro_f1)
        if figures:
            ends = np.cumsum([counts.shape[1] for counts in all_counts])[:-1]  # `hstack` below loses where types end
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
        scores = auroc_of_candidates(
            self.kinds.tolist(),
            self.candidates,
            self.references,
            likelihoods,
            self.patients,
            self.num_resamples,
            self.seed,
        )
        return {(kind, "auroc", "value"): score for kind, score in scores.items()}


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _mean_over_types(function: Statistic, ends: np.ndarray) -> Statistic:
    return lambda sums: np.mean([function(part) for part in np.split(sums, ends, axis=-1)], axis=0)
