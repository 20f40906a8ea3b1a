"""What a benchmark suite is: where its chats come from, and how its answers are scored."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from elm_ecg.training.evaluation.arguments import ScoredBy
from elm_ecg.training.evaluation.benchmarks.chats import Chat, SuiteOptions, Turn
from elm_ecg.training.evaluation.benchmarks.judge import Judge
from elm_ecg.training.evaluation.benchmarks.records import RecordPlaces
from elm_ecg.training.evaluation.scale import MetricScale
from elm_ecg.training.evaluation.scores import Figure, Key, Scorer


class Suite(ABC):
    """A published benchmark.

    `name` is what `--suite` takes, `paper` where it was published, `hub` its dataset on the Hub if it has one,
    `needs_texts` whether it is more than the labels of the records, `has_splits` whether `--split` chooses among its rows, `score` how it is
    answered, `max_new_tokens` the longest answer, `main_metric` the one of the verdict, and `scales` the scale of each of its own scores,
    in the order of its table. `judge_prompt` is what a language model is told that judges answers, if any are judged, and `judged_metric` the
    score that comes of it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    hub: ClassVar[str | None] = None
    needs_texts: ClassVar[bool] = True
    has_splits: ClassVar[bool] = False
    score: ClassVar[ScoredBy] = "generation"
    max_new_tokens: ClassVar[int] = 128
    main_metric: ClassVar[str]
    scales: ClassVar[dict[str, MetricScale]]
    judge_prompt: ClassVar[str | None] = None
    judged_metric: ClassVar[str | None] = None

    @abstractmethod
    def chats(self, place: Path | None, records: RecordPlaces, options: SuiteOptions) -> Iterator[Chat]:
        """The chats of the suite.

        Args:
            place: the file or folder that its texts are in; None for a suite that is made of the records' labels.
            records: those that are there, and what is known of them.

        Raises:
            ValueError: the files are not those of the suite.
        """

    def points(self, turns: Sequence[Turn], chats: Sequence[int], answers: Sequence[str]) -> dict[str, np.ndarray]:
        """The suite's own scores that are ratios of sums: metric -> [turns, 2], points and how many could be had by each turn.

        Args:
            turns: of all chats, one after the other.
            chats: of each turn, the number of its chat.
            answers: what the model said in each.
        """
        return {}

    def figures(self, turns: Sequence[Turn], answers: Sequence[str]) -> dict[Key, Figure]:
        """The suite's own scores that are no ratios of sums, such as a macro F1."""
        return {}

    def is_judged(self, turn: Turn) -> bool:
        """Whether a judge is asked about the answers to a question."""
        return self.judge_prompt is not None

    def judged_share(self, said: dict[str, Any]) -> float | None:
        """The score of an answer, from 0 to 1, by the JSON object that a judge says; None where it tells none."""
        return None

    def group_of(self, question_type: str) -> str | None:
        """The score in which the AUROCs of a type of question are averaged; None where there are none."""
        return None


def ratio(sums: np.ndarray) -> np.ndarray:
    """Points divided by how many could be had, [..., 2] -> [...]."""
    return sums[..., 0] / sums[..., 1]


@dataclass
class SuiteScorer(Scorer):
    """Scores answers as `elm evaluate` does, and by a suite's own scores beside.

    Args:
        suite, turns, chats: as `Suite.points` takes them; a turn for each of the questions.
        judge: that is asked too, of a suite with `judge_prompt`.
    """

    suite: Suite | None = None
    turns: Sequence[Turn] = ()
    chats: Sequence[int] = ()
    judge: Judge | None = None

    def points(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """As `Suite.points`, with the judged score."""
        assert self.suite is not None
        points = self.suite.points(self.turns, self.chats, texts)
        if self.judge is not None and self.suite.judged_metric is not None:
            judged = self.judge.points(self.turns, texts)
            if judged[:, 1].any():
                points[self.suite.judged_metric] = judged
        return points

    def _figures(self, texts: list[str], written: list[str]) -> dict[Key, Figure]:
        assert self.suite is not None
        figures = super()._figures(texts, written)
        for name, samples in self.points(texts).items():
            figures[None, name, "value"] = Figure(samples, ratio)
            for kind in self.types:
                of_kind = samples * (self.kinds == kind)[:, None]
                if of_kind[:, 1].any():
                    figures[kind, name, "value"] = Figure(of_kind, ratio)
        return figures | self.suite.figures(self.turns, texts)

    def _scale(self, name: str) -> MetricScale:
        assert self.suite is not None
        return self.suite.scales[name] if name in self.suite.scales else super()._scale(name)

    def _auroc(self, likelihoods: list[list[float]]) -> dict[Key, tuple[float, np.ndarray]]:
        assert self.suite is not None
        scores = super()._auroc(likelihoods)
        groups: dict[str, list[tuple[float, np.ndarray]]] = {}
        for (kind, _, _), row in scores.items():
            if kind is not None and (group := self.suite.group_of(kind)) is not None:
                groups.setdefault(group, []).append(row)
        if groups:
            groups["auroc"] = [row for rows in groups.values() for row in rows]
        return scores | {(None, group, "value"): macro_auroc(rows) for group, rows in groups.items()}


def macro_auroc(rows: Sequence[tuple[float, np.ndarray]]) -> tuple[float, np.ndarray]:
    """The mean of the AUROCs of several labels, and in each resample the mean over those that are defined there, as `elm probe` has it: of
    a label that one patient has there is none in a third of the resamples.

    Args:
        rows: of each label the value and the replicates [num_resamples].
    """
    replicates = np.stack([row for _, row in rows])
    defined = np.isfinite(replicates)
    number = defined.sum(axis=0)
    sums = np.where(defined, replicates, 0).sum(axis=0)
    return float(np.mean([value for value, _ in rows])), sums / np.where(number > 0, number, np.nan)
