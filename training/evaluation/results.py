"""The files of an evaluation: their names, their places and their schema.

`elm evaluate` puts the results of a model in a local folder into `MODEL/evaluation/DATA-SPLIT-SCORE-8 hexadecimal digits/`,
where the digits stand for the content of the data and all settings: the same evaluation replaces its own files, and no other. With
`--output_dir` they go there, unless results of something else are there. What training or a change of the weights leaves behind
moves to `MODEL/old_results/1`, `2`, ....

`RESULTS_FILE` is a JSON object (scores and differences are shares, 0.5 for 50%, unless `metrics` says otherwise; what the data do not
say is null):
    schema_version, model, packages: what was evaluated, and with which versions.
    model_revision: the digest of the model by `training/digest.py`: of all files of `model_files`, or of the model in memory.
    model_commit: its commit, if it is on the Hub.
    evaluation: the name of its place, which tells evaluations apart.
    data: `names`, `split`, `fold`, `fingerprint`, a digest of the questions, the right answers, the patients and the samples of the
        ECGs, and `training_fingerprint`, one of the training split's questions and answers, which the baseline is from.
    settings: those of `elm evaluate`.
    num_questions, num_patients, questions_by_type.
    metrics: name -> the fields of its `MetricScale`; main_metric: the one of the verdict and the plots.
    conditions: condition -> `metrics`, `by_question_type` (type -> metrics), `one_answer` (as `gives_one_answer` has it) and, where
        right answers have tags, `parts` (tag -> metrics); metrics: name -> `value`, `interval_95` and details.
    ecg_minus: condition -> metric -> `difference`, `interval_95`, `p_value`, and `p_value_at_floor` where it is the least that so many
        resamples can show.
    not_scored: condition or metric -> why it is not there.
    verdict: a sentence that says whether the model looks at the ECG.
    predictions_sha256: of the file beside.
`PREDICTIONS_FILE` has a JSON object for each question: `QUESTION_FIELDS`, the answer of each condition by its name, and where
answers were decided by likelihood `candidates` and `log_likelihoods` (condition -> one for each candidate). Of a model with
`explicit_thinking`, which stands among the settings, these answers are what scores of them (`scored_answer`), and `written` has the whole
texts, by the same names.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from elm_ecg.training.evaluation.conditions import ECG
from elm_ecg.training.files import write_text

SCHEMA_VERSION = 4
RESULTS_FILE = "evaluation_results.json"
PREDICTIONS_FILE = "predictions.jsonl"
REPORT_FILE = "report.html"
SUMMARY_FILE = "evaluation_summary.json"  # of several runs
EVALUATIONS = "evaluation"  # folder in that of a model, with one for each evaluation
PROBE_FILE = "probe_results.json"  # of `elm probe`, see `probe_results`
PROBES = "probe"  # folder in that of an encoder, with one for each probe
OLD_RESULTS = "old_results"
PARTIAL = "predictions.partial"  # the answers so far, a file for each process
REQUIRED = ["model", "model_revision", "data", "num_questions", "num_patients", "metrics", "main_metric"]
REQUIRED += ["settings", "conditions", "verdict", "predictions_sha256"]
# what makes the data of two results the same, and two lines of predictions the same question
DATA_FIELDS = ("split", "fingerprint")
QUESTION_FIELDS = ("row", "turn", "record_id", "patient_id", "question_type", "question", "answer")


class Results(dict[str, Any]):
    """What `RESULTS_FILE` holds, and as `predictions` what `PREDICTIONS_FILE` holds."""

    def __init__(self, scores: Mapping[str, Any] | None = None, predictions: Iterable[dict[str, Any]] = ()) -> None:
        super().__init__(scores or {})
        self.predictions = list(predictions)

    def save(self, folder: Path) -> None:
        """Writes both files; the results name the content of the predictions, so that those of two runs cannot be mixed."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.predictions)
        self["predictions_sha256"] = hashlib.sha256(lines.encode()).hexdigest()
        write_text(folder / PREDICTIONS_FILE, lines)
        write_json(folder / RESULTS_FILE, self)


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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); expected the {RESULTS_FILE} of `elm evaluate`.") from error
    version = results.get("schema_version") if isinstance(results, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {version}, of another version of elm-ecg; expected {SCHEMA_VERSION}. Write it anew with "
            "`elm evaluate`, or move it away."
        )
    data = results.get("data")
    absent = [key for key in REQUIRED if key not in results]
    absent += [f"data.{key}" for key in DATA_FIELDS if not isinstance(data, dict) or key not in data]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}; write it anew with `elm evaluate`.")
    return results


def read_predictions(path: Path, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of the predictions beside a results file.

    Args:
        path: of the results file.
        results: that are in it.

    Raises:
        ValueError: there are none, one is no prediction, or they are not those that the results are about.
    """
    predictions = path.with_name(PREDICTIONS_FILE)
    if not predictions.is_file():
        raise ValueError(f"There is no {PREDICTIONS_FILE} beside {path}; keep it there, where `elm evaluate` wrote it.")
    content, rows = predictions.read_bytes(), []
    # not splitlines: answers may hold other separators of lines than this one
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Line {number} of {predictions} is not JSON: {error}") from error
        absent = [name for name in (*QUESTION_FIELDS, ECG) if name not in row]
        if absent:
            raise ValueError(
                f"Line {number} of {predictions} lacks {', '.join(absent)}; write it anew with `elm evaluate`."
            )
        rows.append(row)
    if not rows or len(rows) != results["num_questions"]:
        raise ValueError(
            f"{predictions} holds {len(rows)} questions, and {path.name} is about {results['num_questions']}; expected both of one "
            "finished run of `elm evaluate`."
        )
    if hashlib.sha256(content).hexdigest() != results["predictions_sha256"]:
        raise ValueError(
            f"{predictions} is not what {path.name} is about: it was changed, or `elm evaluate` was ended while it wrote. Run it again."
        )
    return rows


def results_in(folder: Path, file: str = RESULTS_FILE, place: str = EVALUATIONS) -> list[Path]:
    """The results files of the folder of a model: its own, and those of the folders in `EVALUATIONS`; of probes, with `PROBE_FILE` and
    `PROBES`."""
    return [path for path in (folder / file, *sorted(folder.glob(f"{place}/*/{file}"))) if path.is_file()]


def results_of(folder: Path, revision: str) -> list[tuple[Path, dict[str, Any]]]:
    """The results in the folder of a model that are of the weights that are there, with their paths.

    Args:
        revision: the digest of the folder.

    Raises:
        ValueError: as `read_results`.
    """
    paths = [path for path in results_in(folder) if identity_of(path).get("model_revision") == revision]
    return [(path, read_results(path)) for path in paths]


def move_old_results(folder: Path, keep: str | None = None) -> Path | None:
    """Moves the results in a model's folder aside, into `old_results/1`, `2`, ... of it, and says so: they are of other weights.

    Training calls it before it writes new weights where older ones are.

    Args:
        keep: a digest of a model: its results stay, and answers of evaluations that were interrupted.

    Returns:
        Where they are now; None if there are none.
    """
    files = [folder / name for name in (RESULTS_FILE, PREDICTIONS_FILE, REPORT_FILE, SUMMARY_FILE)]
    groups = [[path for path in [*files, *folder.glob(f"{PARTIAL}.*.jsonl")] if path.is_file()]]
    groups += [[path] for place in (EVALUATIONS, PROBES) for path in sorted(folder.glob(f"{place}/*")) if path.is_dir()]
    runs = [*folder.glob("fold[0-9]*"), *folder.glob("seed[0-9]*")]  # of an --output_dir that was the model's folder
    groups += [[path] for path in sorted(runs) if path.is_dir() and any(path.rglob(RESULTS_FILE))]
    old = [path for group in groups if group and not (keep and _may_stay(group, keep)) for path in group]
    if not old:
        return None
    numbers = (number for number in range(1, 10**6) if not (folder / OLD_RESULTS / str(number)).exists())
    place = folder / OLD_RESULTS / str(next(numbers))
    for path in old:
        target = place / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    for name in (EVALUATIONS, PROBES):
        if (folder / name).is_dir() and not any((folder / name).iterdir()):
            (folder / name).rmdir()
    print(f"Earlier results are of other weights; they are now in {place}", flush=True)
    return place


def _may_stay(group: list[Path], keep: str) -> bool:
    names = (RESULTS_FILE, PROBE_FILE)
    found = [path for path in group if path.name in names]
    found += [file for path in group if path.is_dir() for name in names for file in path.rglob(name)]
    return all(identity_of(path).get("model_revision") == keep for path in found)


def identity_of(path: Path) -> dict[str, Any]:
    """What a file of results says it is of, whatever its version: `evaluation` and `model_revision`; nothing of a damaged one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
