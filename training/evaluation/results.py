"""The files of an evaluation: their names, their schema, and how their numbers are put into words.

`RESULTS_FILE` is a JSON object (scores and differences are shares, 0.5 for 50%; what the data do not say is null):
    schema_version, model, model_revision, packages: what was evaluated, and with which versions.
    data: `names`, `split`, `fold`, and `fingerprint`, a digest of the questions.
    settings: those of `elm evaluate`.
    num_questions, num_patients, questions_by_type.
    conditions: condition -> `metrics`, `by_question_type` (type -> metrics) and, where right answers have tags, `parts`
        (tag -> metrics); metrics: name -> `value`, `interval_95` and details.
    ecg_minus: condition -> metric -> `difference`, `interval_95`, `p_value`.
    not_scored: condition or metric -> why it is not there.
    verdict: a sentence that says whether the model looks at the ECG.
`PREDICTIONS_FILE` has a JSON object for each question: `QUESTION_FIELDS`, the answer of each condition by its name, and where
answers were decided by likelihood `candidates` and `log_likelihoods` (condition -> one for each candidate).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from elm_ecg.training.evaluation.conditions import BASELINE, CONDITIONS, ECG
from elm_ecg.training.files import write_text

SCHEMA_VERSION = 3
RESULTS_FILE = "evaluation_results.json"
PREDICTIONS_FILE = "predictions.jsonl"
REPORT_FILE = "report.html"
SUMMARY_FILE = "evaluation_summary.json"  # of several runs
REQUIRED = ("model", "data", "num_questions", "conditions", "verdict")
# what makes the data of two results the same, and two lines of predictions the same question
DATA_FIELDS = ("split", "fingerprint")
QUESTION_FIELDS = ("row", "turn", "record_id", "patient_id", "question_type", "question", "answer")


class Results(dict[str, Any]):
    """What `RESULTS_FILE` holds, and as `predictions` what `PREDICTIONS_FILE` holds."""

    def __init__(self, scores: Mapping[str, Any] | None = None, predictions: Iterable[dict[str, Any]] = ()) -> None:
        super().__init__(scores or {})
        self.predictions = list(predictions)

    def save(self, folder: Path) -> None:
        """Writes both files."""
        write_json(folder / RESULTS_FILE, self)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.predictions)
        write_text(folder / PREDICTIONS_FILE, lines)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes an object of results, which holds no NaN."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")  # JSON has no NaN


def read_results(path: Path) -> dict[str, Any]:
    """What a results file holds.

    Raises:
        ValueError: it is no results file of this schema.
        OSError: it cannot be read.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected the {RESULTS_FILE} of `elm evaluate`.") from error
    version = results.get("schema_version") if isinstance(results, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {version}; expected {SCHEMA_VERSION}. Write it anew with `elm evaluate`."
        )
    data = results.get("data")
    absent = [key for key in REQUIRED if key not in results]
    absent += [f"data.{key}" for key in DATA_FIELDS if not isinstance(data, dict) or key not in data]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}; write it anew with `elm evaluate`.")
    return results


def read_predictions(path: Path, num_questions: int) -> list[dict[str, Any]]:
    """The lines of the predictions beside a results file.

    Args:
        path: of the results file.
        num_questions: that it sums up.

    Raises:
        ValueError: there are none, one is no prediction, or they are not as many.
    """
    predictions = path.with_name(PREDICTIONS_FILE)
    if not predictions.is_file():
        raise ValueError(f"There is no {PREDICTIONS_FILE} beside {path}; keep it there, where `elm evaluate` wrote it.")
    rows = []
    # not splitlines: answers may hold other separators of lines than this one
    for number, line in enumerate(predictions.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"Line {number} of {predictions} is not JSON: {error}") from error
        absent = [name for name in (*QUESTION_FIELDS, ECG) if name not in row]
        if absent:
            raise ValueError(
                f"Line {number} of {predictions} lacks {', '.join(absent)}; write it anew with `elm evaluate`."
            )
        rows.append(row)
    if not rows or len(rows) != num_questions:
        raise ValueError(
            f"{predictions} holds {len(rows)} questions, and {path.name} is about {num_questions}; expected both of one "
            "finished run of `elm evaluate`."
        )
    return rows


def main_metric(results: Mapping[str, Any]) -> str:
    """The metric of the plots and the verdict."""
    return "auroc" if "auroc" in results["conditions"][ECG]["metrics"] else "exact_match"


def title_of(metric: str) -> str:
    """The name of a metric in texts."""
    return "AUROC" if metric == "auroc" else metric.replace("_", " ")


def as_percent(value: float | None, sign: str = "") -> str:
    """A share in percent; `sign` as in a format specification."""
    return "undefined" if value is None else f"{100 * value:{sign}.1f}"


def with_interval(row: Mapping[str, Any], key: str = "value", sign: str = "") -> str:
    """A score or difference in percent, with its interval where it has one: `87.5 [80.0, 95.0]`."""
    text = as_percent(row[key], sign)
    if row[key] is None or row["interval_95"] is None:
        return text
    return f"{text} [{', '.join(map(as_percent, row['interval_95']))}]"


def verdict(results: Mapping[str, Any]) -> str:
    """A sentence that says whether the model looks at the ECG, by the main metric."""
    metric = main_metric(results)
    title = title_of(metric)
    score = f"{title[0].upper()}{title[1:]} {with_interval(results['conditions'][ECG]['metrics'][metric])}%"
    gains = {name: rows[metric] for name, rows in results["ecg_minus"].items() if metric in rows}
    intervals = {name: row["interval_95"] for name, row in gains.items()}
    if not gains or None in intervals.values():  # None: one patient alone, or undefined in too many resamples
        return f"{score}: nothing can be said of what the ECG adds; too few patients, or nothing to compare with."
    if set(gains) <= {BASELINE}:  # the model itself was not asked without its ECG
        return f"{score}: it was asked with its ECG alone, so nothing can be said of whether it looks at it."
    phrases = {name: CONDITIONS[name].phrase for name in gains}
    listed = ", ".join(f"{with_interval(row, 'difference', '+')} over {phrases[name]}" for name, row in gains.items())
    not_better = [phrases[name] for name, (low, _) in intervals.items() if low <= 0]  # not surely above 0
    if not_better:
        conclusion = f"not shown to be better than with {' or '.join(not_better)}: the model may not look at the ECG"
    else:
        conclusion = "better than all that does without: the model looks at the ECG"
    return f"{score} ({listed}), {conclusion}."
