"""The files of a probe, their schema, its scores and its verdict.

`elm probe` puts the results of an encoder in a local folder into `ENCODER/probe/DATA-8 hexadecimal digits/`, where the digits stand for
the records, their labels and all settings: the same probe replaces its own files, and no other.

`PROBE_FILE` is a JSON object (AUROCs and their differences are shares, 0.85 for 85%; what the data do not say is null):
    schema_version, model, packages: what was probed, and with which versions.
    model_revision: the digest of its folder by `training/digest.py`; model_commit: its commit, if it is on the Hub.
    probe: the name of its place, which tells probes apart.
    data: `names`, `split` (test), `fold`, `fingerprint`, a digest of the test split: its records, patients, labels and samples, and
        `training_fingerprint`, the same of the training and the validation split.
    settings: `shares`, `draws`, `seed`, `num_resamples`, `label_columns`, `min_records`, and how records are prepared (`extractor`).
    num_records, num_patients: of each split. labels: label -> split -> how many records have it.
    left_out: what was left out -> how many, or which.
    metrics: metric -> the fields of its `MetricScale`. A metric is the AUROC with a share of the training patients, `auroc_10%`, or
        without any, `auroc_zero_shot`: that of a contrastive encoder whose ECGs are compared with `prompts` (label -> texts).
    models: model (`encoder`, `random`, the same encoder with random weights, and `cnn`, a plain CNN) -> metric ->
        `macro`, the mean over the labels: `value`, `interval_95`, and `of_draws`, its value for each draw of patients;
        `labels`: label -> `value` and `interval_95`; `strengths`: of regularisation (`C` of scikit-learn), chosen for each draw.
    encoder_minus: other model -> metric -> `difference` of the macro AUROC, `interval_95`, `p_value`, `p_value_at_floor`.
    verdict: a sentence that says whether pretraining has helped.
    records_sha256, scores_sha256: of the files beside.
`PROBE_RECORDS_FILE` has a JSON object for each test record: `record_id`, `patient_id` and `labels`, those that it has.
`PROBE_SCORES_FILE` has the tensor `labels` [records, labels] (1, 0, or -1 where nobody knows), and for each model and metric
`MODEL/METRIC` [draws, records, labels].

Intervals are by test patient, see `bootstrap`. Values are means over the draws, in each resample too: that other training patients
would give others is seen in `of_draws`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from elm_ecg.training.evaluation.bootstrap import difference, estimate, resampled_auroc
from elm_ecg.training.evaluation.results import PROBE_FILE, write_json
from elm_ecg.training.evaluation.scale import MetricScale
from elm_ecg.training.files import atomic_path, read_json, write_text

PROBE_SCHEMA = 1
PROBE_RECORDS_FILE = "probe_records.jsonl"
PROBE_SCORES_FILE = "probe_scores.safetensors"
ZERO_SHOT = "auroc_zero_shot"
UNKNOWN = -1  # of a label in `labels`
# models beside the encoder, and what they are called
OTHERS = {"random": "the same encoder with random weights", "cnn": "a plain CNN"}
NO_ANSWER = "nothing can be said"  # where there is no interval
REQUIRED = ("model", "model_revision", "data", "metrics", "models", "verdict", "records_sha256", "scores_sha256")

# metric -> [draws, records, labels]
Scores = Mapping[str, np.ndarray]


def metric_of(share: float) -> str:
    """The name of the AUROC with a share of the training patients: `auroc_10%`."""
    return f"auroc_{100 * share:g}%"


def metric_title(metric: str) -> str:
    """In words: `AUROC with 10% of the training patients`."""
    if metric == ZERO_SHOT:
        return "AUROC without training, by text prompts"
    return f"AUROC with {metric.removeprefix('auroc_')} of the training patients"


@dataclass
class ResampledScores:
    """AUROCs of a model by a metric, as they are and in each resample of the patients.

    Args:
        macro, macro_replicates: mean over the labels and draws, and [resamples].
        of_draws: the macro AUROC of each draw.
        labels, label_replicates: [labels], means over the draws, and [resamples, labels].
    """

    macro: float
    macro_replicates: np.ndarray
    of_draws: list[float]
    labels: np.ndarray
    label_replicates: np.ndarray


def resample_scores(
    scores: np.ndarray, labels: np.ndarray, patients: Sequence[str], num_resamples: int, seed: int
) -> ResampledScores:
    """AUROCs of scores [draws, records, labels]. In a resample without a record with or without a label, its macro AUROC is the mean
    over the others."""
    num_draws, num_records, num_labels = scores.shape
    columns = scores.transpose(1, 0, 2).reshape(num_records, -1)
    known = np.tile(labels != UNKNOWN, num_draws)
    truth = np.tile(np.maximum(labels, 0), num_draws)
    values, replicates = resampled_auroc(columns, truth, patients, num_resamples, seed, asked=known)
    values = values.reshape(num_draws, num_labels)
    # of equal patients and seeds the resamples are equal, so that a label is undefined in all draws and models at once
    of_labels = replicates.reshape(-1, num_draws, num_labels).mean(axis=1)
    defined = np.isfinite(of_labels)
    macro = np.where(defined, of_labels, 0).sum(axis=1) / np.where(defined.any(axis=1), defined.sum(axis=1), np.nan)
    return ResampledScores(float(values.mean()), macro, values.mean(axis=1).tolist(), values.mean(axis=0), of_labels)


def summarise(
    scores: Mapping[str, Scores],
    names: Sequence[str],
    labels: np.ndarray,
    patients: Sequence[str],
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """`metrics`, `models` and `encoder_minus` of the results.

    Args:
        scores: model -> metric -> scores [draws, records, labels].
        names: of the labels.
        labels: [records, labels], 1, 0 or `UNKNOWN`.
    """
    resampled = {
        model: {metric: resample_scores(array, labels, patients, num_resamples, seed) for metric, array in rows.items()}
        for model, rows in scores.items()
    }
    own = resampled["encoder"]
    return {
        "metrics": {metric: MetricScale(title=metric_title(metric)).to_dict() for metric in own},
        "models": {
            model: {
                metric: {
                    "macro": {**estimate(row.macro, row.macro_replicates).to_dict(), "of_draws": row.of_draws},
                    "labels": {
                        name: estimate(row.labels[column], row.label_replicates[:, column]).to_dict()
                        for column, name in enumerate(names)
                    },
                }
                for metric, row in rows.items()
            }
            for model, rows in resampled.items()
        },
        "encoder_minus": {
            model: {
                metric: difference(
                    own[metric].macro - row.macro, own[metric].macro_replicates - row.macro_replicates
                ).to_dict()
                for metric, row in rows.items()
            }
            for model, rows in resampled.items()
            if model != "encoder"
        },
    }


def verdict(results: Mapping[str, Any]) -> str:
    """Whether pretraining has helped: at each share, whether the interval of the difference to random weights is clear of zero."""
    answers, parts = [], []
    for metric, row in results["encoder_minus"]["random"].items():
        if row["interval_95"] is None:
            answers.append(NO_ANSWER)
        else:
            low, high = row["interval_95"]
            answers.append("yes" if low > 0 else "no, it has harmed" if high < 0 else "not shown")
        gain = MetricScale().with_interval(row, "difference", "+")
        parts.append(f"with {metric.removeprefix('auroc_')} of the training patients {gain} points ({answers[-1]})")
    short = "In part" if "yes" in answers else "Not shown"
    if len(set(answers)) == 1:
        short = answers[0][0].upper() + answers[0][1:]
    return (
        f"Has pretraining helped? {short}. Macro AUROC over the same encoder with random weights: {', '.join(parts)}."
    )


def save_probe(
    folder: Path,
    results: dict[str, Any],
    records: list[dict[str, Any]],
    labels: np.ndarray,
    scores: Mapping[str, Scores],
) -> None:
    """Writes the three files; the results, which come last, name the content of the others."""
    tensors = {f"{model}/{metric}": array for model, rows in scores.items() for metric, array in rows.items()}
    # safetensors writes the memory as it lies, of a transposed array in another order
    stored = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in tensors.items()}
    content = save({"labels": np.ascontiguousarray(labels, dtype=np.int8), **stored})
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    results["records_sha256"] = hashlib.sha256(lines.encode()).hexdigest()
    results["scores_sha256"] = hashlib.sha256(content).hexdigest()
    write_text(folder / PROBE_RECORDS_FILE, lines)
    with atomic_path(folder / PROBE_SCORES_FILE) as temporary:
        temporary.write_bytes(content)
    write_json(folder / PROBE_FILE, results)


def read_probe_results(path: Path) -> dict[str, Any]:
    """What `PROBE_FILE` holds (ValueError: it is none of this schema)."""
    results = read_json(path)
    if results.get("schema_version") != PROBE_SCHEMA:
        raise ValueError(
            f"{path} has schema_version {results.get('schema_version')}, of another version of elm-ecg; expected {PROBE_SCHEMA}. Write it "
            "anew with `elm probe`, or move it away."
        )
    if absent := [name for name in REQUIRED if name not in results]:
        raise ValueError(f"{path} lacks {', '.join(absent)}; write it anew with `elm probe`.")
    return results


@dataclass
class Probe:
    """A probe that was read: its results, its test records, their labels [records, labels], and the encoder's scores."""

    path: Path
    results: dict[str, Any]
    predictions: list[dict[str, Any]]
    labels: np.ndarray
    scores: dict[str, np.ndarray]

    def column(self, name: str) -> list[Any]:
        """A field of each test record."""
        return [record[name] for record in self.predictions]


def read_probe(path: Path) -> Probe:
    """A probe's results with the files beside.

    Raises:
        ValueError: as `read_probe_results`; a file beside is missing, damaged, or of another probe.
    """
    results = read_probe_results(path)
    contents = {}
    for name, key in ((PROBE_RECORDS_FILE, "records_sha256"), (PROBE_SCORES_FILE, "scores_sha256")):
        file = path.with_name(name)
        if not file.is_file():
            raise ValueError(f"There is no {name} beside {path}; keep it there, where `elm probe` wrote it.")
        contents[name] = file.read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != results[key]:
            raise ValueError(
                f"{file} is not what {path.name} is about: it was changed, or `elm probe` was ended while it wrote. Run it again."
            )
    try:
        records = [json.loads(line) for line in contents[PROBE_RECORDS_FILE].split(b"\n")[:-1]]
        tensors = load_file(path.with_name(PROBE_SCORES_FILE))
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"The files of {path} are damaged ({error}); write them anew with `elm probe`.") from error
    scores = {name.removeprefix("encoder/"): array for name, array in tensors.items() if name.startswith("encoder/")}
    return Probe(path, results, records, tensors["labels"], {name: scores[name] for name in results["metrics"]})
