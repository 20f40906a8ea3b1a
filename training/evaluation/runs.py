"""The figures of an evaluation over several runs: folds, or seeds."""

import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import t as student_t

from elm_ecg.training.evaluation.conditions import CONDITIONS
from elm_ecg.training.evaluation.results import SCHEMA_VERSION
from elm_ecg.training.evaluation.verdict import LOOKS

NOTE = (
    "The t-intervals take the runs as independent. Folds share most of their training data, and seeds all of the test data, so that "
    "the intervals are narrower than those of independent studies."
)


def over_runs(runs: Sequence[dict[str, Any]], seeds: list[int], samples: bool) -> dict[str, Any]:
    """Mean, standard deviation and 95% t-interval of each score over the runs, folds times seeds; and how many of their verdicts are for
    the model.

    Where no seed changes the answers of a condition, its runs of one fold are the same one, and count once. Runs that all give one
    value say nothing of how much others would differ: they have no standard deviation and no interval.
    """
    scores: dict[str, dict[str, Any]] = {}
    for condition in runs[0]["conditions"]:
        random = samples or CONDITIONS[condition].random
        counted = [run for run in runs if random or run["settings"]["seed"] == seeds[0]]
        for metric in runs[0]["conditions"][condition]["metrics"]:
            of_runs = [run["conditions"].get(condition, {}).get("metrics", {}).get(metric, {}) for run in counted]
            values = [row["value"] for row in of_runs if row.get("value") is not None]
            if not values:  # undefined in every run
                continue
            mean, row = statistics.fmean(values), scores.setdefault(condition, {})
            row[metric] = {"mean": mean, "std": None, "interval_95": None, "num_runs": len(values)}
            if len(set(values)) > 1:
                deviation = statistics.stdev(values)  # of a sample: by n - 1
                half = float(student_t.ppf(0.975, len(values) - 1)) * deviation / len(values) ** 0.5
                row[metric] |= {"std": deviation, "interval_95": [mean - half, mean + half]}
    looks = sum(LOOKS in run["verdict"] for run in runs)
    return {
        "schema_version": SCHEMA_VERSION,
        "runs": [
            {"fold": run["data"]["fold"], "seed": run["settings"]["seed"], "model_revision": run["model_revision"]}
            for run in runs
        ],
        "metrics": runs[0]["metrics"],
        "main_metric": runs[0]["main_metric"],
        "note": NOTE,
        "conditions": scores,
        "verdict": f"The verdict of {looks} of the {len(runs)} runs is that {LOOKS}.",
    }
