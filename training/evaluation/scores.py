"""The scores of an evaluation: each metric under each condition with its interval by patient, and the difference that the ECG makes."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
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
from elm_ecg.training.evaluation.scale import MetricScale, title_of
from elm_ecg.training.evaluation.verdict import gives_one_answer
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


def is_path(metric: str) -> bool:
    """Whether a metric is one of the user's own, in a file or folder, and not the name of one of ours."""
    return metric not in METRIC_NAMES and (metric.endswith(".py") or "/" in metric or Path(metric).is_dir())


def name_of(metric: str) -> str:
    """The name that a metric has in results: that of its file or folder, without its place."""
    return file_of(metric).stem if is_path(metric) else metric


def file_of(metric: str) -> Path:
    """The module of a metric of the user's own; a folder holds one of its own name."""
    path = Path(metric)
    return path / f"{path.resolve().name}.py" if path.is_dir() else path


def load_metrics(metrics: Sequence[str]) -> "dict[str, Metric]":
    """The modules of metrics, given by their names or, of the user's own, by the path of a module of `evaluate`.

    Raises:
        ValueError: there is no such metric, or one of the user's own is not what `check_contract` says.
        ImportError, OSError: a library that it needs, or WordNet, is not there.
    """
    for metric in metrics:
        if not is_path(metric) and metric not in METRIC_NAMES:
            raise ValueError(
                f"There is no metric {metric!r}; expected some of {', '.join(METRIC_NAMES)}, or the path of one of your own, such as "
                f"./{metric}.py."
            )
    import evaluate

    # no cache files
    return {
        name_of(metric): _load_own(metric)
        if is_path(metric)
        else evaluate.load(str(METRICS / metric), keep_in_memory=True)
        for metric in metrics
    }


def _load_own(metric: str) -> "Metric":
    import evaluate

    file = file_of(metric)
    if not file.is_file():
        raise ValueError(f"There is no metric {metric}: no file {file}. A folder holds a file of its own name.")
    if name_of(metric) in (*METRIC_NAMES, "auroc"):
        raise ValueError(f"The metric {metric} has the name of one of ours, {name_of(metric)}; give its file another.")
    try:
        module = evaluate.load(str(file.resolve()), keep_in_memory=True)
    except Exception as error:  # whatever it does as it is imported
        raise ValueError(
            f"The metric {metric} cannot be loaded ({type(error).__name__}: {error}); expected a module of `evaluate` with one class "
            "that is a PairMetric or TextMetric of elm_ecg.training.evaluation.text."
        ) from error
    if not isinstance(getattr(module, "scale", None), MetricScale):
        raise ValueError(
            f"The metric {metric} does not say what its numbers mean; give its class a scale, such as `scale = MetricScale(unit="
            '"bpm", high=None, higher_is_better=False)` of elm_ecg.training.evaluation.scale.'
        )
    return module


def check_contract(name: str, module: "Metric", references: list[str]) -> None:
    """Tries a metric of the user's own on the right answers, and on empty ones, before the model is asked.

    `compute(predictions=..., references=...)` gives a dict with `samples`, a finite number for each pair, and under the metric's name
    their mean; both within the range of its `scale`. Or the module has a `statistic` (see `bleu4`), which makes the score of the
    sums of the samples.

    Raises:
        ValueError: it does not; says which of these.
    """
    for texts, words in ((references, "the right answers"), ([""] * len(references), "empty answers")):
        try:
            scores: Any = module.compute(predictions=texts, references=references)
        except Exception as error:  # whatever it does
            raise ValueError(f"The metric {name} fails on {words}: {type(error).__name__}: {error}") from error
        # PairMetric writes its class's name, in words with underscores
        key = next((key for key in (name, module.name) if isinstance(scores, dict) and key in scores), None)
        if key is None or "samples" not in scores:
            raise ValueError(f"The metric {name} gives {scores!r:.80}; expected a dict with {name} and samples.")
        try:
            samples, value = np.asarray(scores["samples"], dtype=float), float(scores[key])
        except (ValueError, TypeError) as error:
            raise ValueError(f"The metric {name} gives samples or a score that are no numbers: {error}") from error
        own_statistic = hasattr(module, "statistic")
        if len(samples) != len(texts) or samples.ndim != 1 + own_statistic or not np.isfinite(samples).all():
            raise ValueError(
                f"The metric {name} gives samples of the shape {samples.shape} for {len(texts)} pairs; expected a finite number for "
                "each, or a row of numbers where the module has a statistic."
            )
        expected = float(module.statistic(samples.sum(axis=0))) if own_statistic else float(samples.mean())
        if not np.isclose(value, expected, rtol=1e-6, atol=1e-9):
            raise ValueError(
                f"The metric {name} gives {value:g} on {words}, and its samples make {expected:g}; expected their mean, or a "
                "statistic that makes the score of their sums."
            )
        low, high = module.scale.low, module.scale.high
        if (low is not None and value < low) or (high is not None and value > high):
            raise ValueError(
                f"The metric {name} gives {value:g} on {words}, outside the range {low} to {high} of its scale."
            )


def closed_types(questions: "Sequence[Question]") -> list[str]:
    """The types of questions with 2 to `MAX_CLASSES` different right answers, as `closed_set` tells labels apart, each right twice or
    more on average."""
    from elm_ecg.training.evaluation.text import closed_label

    answers: dict[str, Counter[str]] = {}
    for question in questions:
        answers.setdefault(question.question_type, Counter())[closed_label(question.answer)] += 1
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
        whole: [questions] the right answers with what they think, of questions without; None where nothing was taken out.
    """

    questions: "list[Question]"
    modules: "dict[str, Metric]"
    num_resamples: int
    seed: int
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    candidates: list[list[str]] | None = None
    whole: list[str] | None = None

    def __post_init__(self) -> None:
        self.patients = [question.patient_id for question in self.questions]
        self.references = [question.answer for question in self.questions]
        self.kinds = np.array([question.question_type for question in self.questions])
        self.types: list[str] = [str(kind) for kind in np.unique(self.kinds)]
        self.closed = closed_types(self.questions) if "closed_set" in self.modules else []

    def summarise(
        self,
        answers: dict[str, list[str]],
        likelihoods: dict[str, list[list[float]]] | None = None,
        written: dict[str, list[str]] | None = None,
    ) -> dict[str, Any]:
        """The scores of all conditions, as `results` describes them: `metrics`, `conditions`, `ecg_minus`, and how many questions
        and patients there are.

        Args:
            answers: condition -> texts; `ecg` first.
            likelihoods: condition -> log-likelihood of each candidate of each question.
            written: condition -> texts with what they think, where it was taken out of `answers`.
        """
        conditions: dict[str, Any] = {}
        replicated: dict[str, dict[str, tuple[float, np.ndarray]]] = {}
        for condition, texts in answers.items():
            figures = self._figures(texts, (written or {}).get(condition, texts))
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
                "one_answer": gives_one_answer(self.questions, texts),
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
            "metrics": {name: self._scale(name).to_dict() for name in conditions[first]["metrics"]},
            "conditions": conditions,
            "ecg_minus": differences,
        }

    def _scale(self, name: str) -> MetricScale:
        scale = self.modules[name].scale if name in self.modules else MetricScale()  # auroc has no module
        return replace(scale, title=scale.title or title_of(name))

    def _figures(self, texts: list[str], written: list[str]) -> dict[Key, Figure]:
        figures: dict[Key, Figure] = {}
        # what was taken out has a score of its own
        tagged, parts = (self.references, PARTS) if self.whole is None else (self.whole, PARTS[:1])
        for name, module in self.modules.items():
            if name == "closed_set":
                figures |= self._closed(module, texts)
                continue
            whole = self._figure(module, texts, self.references, name)
            figures[None, name, "value"] = whole
            for kind in self.types:
                of_kind = (self.kinds == kind)[:, None]
                figures[kind, name, "value"] = Figure(whole.samples * of_kind, whole.statistic)  # others add 0
            for part in parts:
                rows = [i for i, reference in enumerate(tagged) if f"<{part}>" in reference]
                right = [part_of(tagged[i], part) for i in rows]
                if not rows or not all(right):  # no metric takes an empty reference
                    continue
                of_part = self._figure(module, [part_of(written[i], part) for i in rows], right, name)
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
