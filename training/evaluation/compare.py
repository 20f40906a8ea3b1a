"""Which of several ELMs is better on the same questions, or which of several encoders in the same probe: `elm compare A.json B.json ...`."""

import argparse
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from elm_ecg.training.command_line import CommandLineParser, printable
from elm_ecg.training.data.schema import counted
from elm_ecg.training.evaluation.bootstrap import (
    MIN_PATIENTS,
    Difference,
    Estimate,
    auroc_of_candidates,
    difference,
    estimate,
    holm,
    p_in_words,
    resampled_sums,
)
from elm_ecg.training.evaluation.conditions import ASKED, CONDITIONS, ECG
from elm_ecg.training.evaluation.probe_results import Probe, read_probe, resample_scores
from elm_ecg.training.evaluation.results import (
    DATA_FIELDS,
    EVALUATIONS,
    PREDICTIONS_FILE,
    PROBE_FILE,
    PROBES,
    QUESTION_FIELDS,
    RESULTS_FILE,
    identity_of,
    read_predictions,
    read_results,
    results_in,
    write_json,
)
from elm_ecg.training.evaluation.scale import MetricScale, scales_of, title_of
from elm_ecg.training.evaluation.scores import METRIC_NAMES, is_path, load_metrics, name_of

SCHEMA_VERSION = 2  # of the output
LEVEL = 0.05


@dataclass
class EvaluatedModel:
    """What `elm evaluate` wrote about a model: its results, and a prediction for each question. It is compared by its answers in
    `condition`."""

    path: Path
    results: dict[str, Any]
    predictions: list[dict[str, Any]]
    condition: str = ECG

    def column(self, name: str) -> list[Any]:
        """A field of each prediction."""
        return [row[name] for row in self.predictions]


# all of one kind
Models = Sequence[EvaluatedModel | Probe]
# (model, metric) -> score, and in each resample
Measured = tuple[dict[tuple[str, str], float], dict[tuple[str, str], np.ndarray]]


@dataclass
class Comparison:
    """The score of the first model minus that of the second, with its p-value among all comparisons."""

    models: tuple[str, str]
    metric: str
    difference: Difference
    adjusted_p_value: float | None

    def to_dict(self) -> dict[str, Any]:
        """As the output has it."""
        return {
            "models": list(self.models),
            "metric": self.metric,
            **self.difference.to_dict(),
            "adjusted_p_value": self.adjusted_p_value,
        }


def read_model(path: Path, condition: str = ECG) -> EvaluatedModel | Probe:
    """Reads a results file and what lies beside it.

    Raises:
        ValueError: as `read_results` and `read_predictions`, or as `read_probe`; or there are no answers in this condition.
    """
    if "probe" in identity_of(path):
        if condition != ECG:
            raise ValueError(f"--condition {condition}: {path} is of `elm probe`, which shows all ECGs; leave it out.")
        return read_probe(path)
    results = read_results(path)
    if condition not in results["conditions"]:
        raise ValueError(
            f"--condition {condition}: {path} has {', '.join(results['conditions'])}; evaluate with --conditions {ECG} {condition}."
        )
    return EvaluatedModel(path, results, read_predictions(path, results), condition)


def find_results(places: list[Path]) -> list[Path]:
    """The results file of each place: a file, the folder of one, or the folder of a model, of whose evaluations the one counts that
    all others have too. Where not all have evaluations, the same of probes.

    Raises:
        ValueError: there is none, or several would do.
    """

    def found_as(file: str, folder: str) -> list[list[Path]]:
        return [[place] if not place.is_dir() else results_in(place, file, folder) for place in places]

    evaluations, probes = found_as(RESULTS_FILE, EVALUATIONS), found_as(PROBE_FILE, PROBES)
    found = probes if all(probes) and not all(evaluations) else evaluations
    for place, files in zip(places, found, strict=True):
        if not files:
            raise ValueError(
                f"{place} holds no {RESULTS_FILE}; evaluate with `elm evaluate`, or name the folder that it named. Encoders have a "
                f"{PROBE_FILE} of `elm probe`."
            )
    if all(len(files) == 1 for files in found):
        return [file for (file,) in found]
    # of equal data and settings these folders have one name, whatever the model
    named = [{file.parent.name: file for file in files} for files in found if len(files) > 1]
    common = sorted(set.intersection(*(set(names) for names in named)))
    single = {files[0].parent.name for files in found if len(files) == 1}
    common = [name for name in common if name in single] or common
    if len(common) != 1:
        listed = "; ".join(str(file.parent) for files in found for file in files)
        raise ValueError(
            f"Which evaluations? {len(common)} are of all these models; name the folder of one of each: {listed}."
        )
    return [{file.parent.name: file for file in files}[common[0]] if len(files) > 1 else files[0] for files in found]


def require_same_questions(first: EvaluatedModel, other: EvaluatedModel) -> None:
    """
    Raises:
        ValueError: the models were evaluated on different data; it says what differs.
    """
    problem = f"{first.path} and {other.path} are not about the same questions"
    for key in DATA_FIELDS:  # not `names`: copies of a dataset have the same questions
        one, two = first.results["data"][key], other.results["data"][key]
        if one != two:
            raise ValueError(f"{problem}: the {key} of the data is {one!r} and {two!r}.")
    if len(first.predictions) != len(other.predictions):
        raise ValueError(f"{problem}: they are {len(first.predictions)} and {len(other.predictions)}.")
    for number, pair in enumerate(zip(first.predictions, other.predictions, strict=True), start=1):
        for key in QUESTION_FIELDS:
            one, two = (row[key] for row in pair)
            if one != two:
                raise ValueError(f"{problem}: in line {number} of their predictions {key} is {one!r} and {two!r}.")


def require_same_probe(first: Probe, other: Probe) -> None:
    """
    Raises:
        ValueError: two encoders were probed on different records, labels or draws of training patients; it says what differs.
    """
    problem = f"{first.path} and {other.path} are not of the same probe"
    for part, keys in (("data", ("fingerprint", "training_fingerprint")), ("settings", ("draws", "seed"))):
        for key in keys:
            one, two = first.results[part][key], other.results[part][key]
            if one != two:
                raise ValueError(f"{problem}: the {key} of the {part} is {one!r} and {two!r}.")


def score(metric: str, predictions: list[str], references: list[str]) -> np.ndarray:
    """The score of each answer, [questions].

    Raises:
        ValueError: there is no such metric, it needs more than the answers, or it is not a mean over them.
    """
    if metric == "exact_match":
        # as the module of that name, which takes seconds to load
        pairs = zip(predictions, references, strict=True)  # an empty reference is matched by no answer
        return np.array([answer.strip() == right.strip() != "" for answer, right in pairs], dtype=float)
    if metric not in METRIC_NAMES and not is_path(metric):
        known = ", ".join(sorted(["auroc", *METRIC_NAMES]))
        raise ValueError(f"There is no metric {metric!r}; expected one of {known}, or the path of one of your own.")
    module = load_metrics([metric])[name_of(metric)]
    parameters = inspect.signature(module._compute).parameters.values()  # `compute` itself takes **kwargs
    needed = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    needed -= {"predictions", "references"}
    if needed:
        raise ValueError(f"{metric} needs a {', '.join(sorted(needed))}; compare by another metric.")
    scores: Any = module.compute(predictions=predictions, references=references)
    samples = np.asarray(scores["samples"])
    if samples.ndim != 1 or samples.dtype.kind not in "bif":  # bleu4 has counts, closed_set pairs of labels
        raise ValueError(f"{metric} is not a mean over the answers, so it cannot be compared answer by answer.")
    return samples.astype(float)


def points_of(metric: str, model: EvaluatedModel) -> np.ndarray:
    """The points of each answer, and how many could be had, [questions, 2]: by a metric, or by a score of a benchmark's suite.

    Raises:
        ValueError: as `score`; or it is a score of the suite that is no ratio of sums, or not asked for of answers with the ECG.
    """
    if any(metric in row.get("suite", {}) for row in model.predictions):
        if model.condition != ECG:
            raise ValueError(
                f"--metric {metric} is a score of the benchmark, which {model.path} has of answers with the ECG alone; leave "
                f"--condition {model.condition} out, or compare by another metric."
            )
        return np.array([row.get("suite", {}).get(metric, (0.0, 0.0)) for row in model.predictions], dtype=float)
    if "suite" in model.results and metric not in METRIC_NAMES and metric in model.results["metrics"]:
        raise ValueError(f"{metric} is not a mean over the answers, so it cannot be compared answer by answer.")
    scores = score(metric, model.column(model.condition), model.column("answer"))
    return np.stack([scores, np.ones(len(scores))], axis=1)


def scale_of(metric: str, models: Models) -> MetricScale:
    """The scale of a metric: as the results have it, or where it was not scored there, as its module says."""
    name = name_of(metric)
    for model in models:
        if isinstance(model, Probe):
            return scales_of(model.results)[metric]
        if name in model.results["metrics"]:
            return scales_of(model.results)[name]
    if metric in ("exact_match", "auroc"):  # shares; without loading their modules
        return MetricScale(title=title_of(metric))
    scale = load_metrics([metric])[name].scale
    return replace(scale, title=scale.title or title_of(name))


def auroc(models: list[EvaluatedModel], num_resamples: int, seed: int) -> list[tuple[float, np.ndarray]]:
    """The AUROC of each model in its condition, as `elm evaluate --score likelihood` has it, and its replicates.

    Raises:
        ValueError: the models decided among other candidates, or among none; or there is no question type with two right answers.
    """
    scores = []
    for model in models:
        if any("candidates" not in row for row in model.predictions):
            raise ValueError(
                f"{model.path} has no likelihoods, which auroc is made of; evaluate with --score likelihood."
            )
        if model.column("candidates") != models[0].column("candidates"):  # other candidates make another AUROC
            raise ValueError(
                f"{models[0].path} and {model.path} decide among different candidates; give both the same --candidates."
            )
        scores_by_type = auroc_of_candidates(
            model.column("question_type"),
            model.column("candidates"),
            model.column("answer"),
            [logs[model.condition] for logs in model.column("log_likelihoods")],
            model.column("patient_id"),
            num_resamples,
            seed,
        )
        if not scores_by_type:
            raise ValueError(f"{model.path}: each type of questions has one right answer, so there is no AUROC.")
        scores.append(scores_by_type[None])  # None: mean over the types
    return scores


def _by_kind(models: Models) -> tuple[list[Probe], list[EvaluatedModel]]:
    """The probes among the models, and the others; ValueError if there are both."""
    probes = [model for model in models if isinstance(model, Probe)]
    others = [model for model in models if not isinstance(model, Probe)]
    if probes and others:
        raise ValueError(
            f"{probes[0].path} is of `elm probe`, and {others[0].path} of `elm evaluate`; compare those of one kind."
        )
    return probes, others


def metrics_of(models: Models, asked: list[str] | None) -> list[str]:
    """The metrics by which models are compared: those that were asked for; else exact match, of benchmarks with the ECG the suite's own
    scores, or of probes all that they have.

    Raises:
        ValueError: a probe lacks a metric, or they have none in common.
    """
    probes, evaluated = _by_kind(models)
    if not probes:
        default = []
        if "suite" in evaluated[0].results and evaluated[0].condition == ECG:
            suite = {name for row in evaluated[0].predictions for name in row.get("suite", {})}
            default = [name for name in evaluated[0].results["metrics"] if name in suite]
            default = default or [evaluated[0].results["main_metric"]]
        return list(dict.fromkeys(asked or default or ["exact_match"]))
    common = [metric for metric in probes[0].results["metrics"] if all(metric in probe.scores for probe in probes)]
    for metric in asked or ():
        if metric not in common:
            raise ValueError(
                f"--metric {metric}: not all of these probes have it; they have {', '.join(common) or 'none'} in common."
            )
    if not common:
        raise ValueError(
            "These probes have no share of the training patients in common; run `elm probe` with the same --shares."
        )
    return list(dict.fromkeys(asked or common))


def name_models(models: Models) -> list[str]:
    """The models' names, which are different; see `told_apart`."""
    return told_apart([model.results["model"] for model in models], [model.path for model in models])


def told_apart(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Names of which those that are the same have in brackets where the paths of their results differ.

    Args:
        paths: of the results, all different.
    """
    differing = [""] * len(names)
    for name in {name for name in names if names.count(name) > 1}:
        places = [place for place, other in enumerate(names) if other == name]
        parts = [paths[place].resolve().parts for place in places]
        start = _num_shared(parts)
        end = _num_shared([part[start:][::-1] for part in parts])
        for place, part in zip(places, parts, strict=True):
            differing[place] = "/".join(part[start : len(part) - end])
    return [f"{name} ({part})" if part else name for name, part in zip(names, differing, strict=True)]


def _num_shared(parts: Iterable[Sequence[str]]) -> int:
    """How many of the first parts are the same in all paths."""
    return sum(1 for _ in takewhile(lambda same: len(set(same)) == 1, zip(*parts, strict=False)))


def _of_answers(
    models: list[EvaluatedModel], names: list[str], metrics: list[str], num_resamples: int, seed: int
) -> Measured:
    for other in models[1:]:
        require_same_questions(models[0], other)
    # of each model and metric the points of each question, and how many could be had
    columns = {
        (name, metric): points_of(metric, model)
        for name, model in zip(names, models, strict=True)
        for metric in metrics
        if metric != "auroc"
    }
    values, replicates = {}, {}
    if columns:
        # all of them in one pass
        samples = np.hstack(list(columns.values()))
        sums = resampled_sums(samples, models[0].column("patient_id"), num_resamples, seed)
        with np.errstate(divide="ignore", invalid="ignore"):  # questions that are not drawn have no score
            values = dict(zip(columns, (samples.sum(axis=0)[::2] / samples.sum(axis=0)[1::2]).tolist(), strict=True))
            replicates = dict(zip(columns, (sums[:, ::2] / sums[:, 1::2]).T, strict=True))
    if "auroc" in metrics:
        for name, value_and_replicates in zip(names, auroc(models, num_resamples, seed), strict=True):
            values[name, "auroc"], replicates[name, "auroc"] = value_and_replicates
    return values, replicates


def _of_probes(models: list[Probe], names: list[str], metrics: list[str], num_resamples: int, seed: int) -> Measured:
    values, replicates = {}, {}
    for other in models[1:]:
        require_same_probe(models[0], other)
    patients, labels = models[0].column("patient_id"), models[0].labels
    for name, model in zip(names, models, strict=True):
        for metric in metrics:
            resampled = resample_scores(model.scores[metric], labels, patients, num_resamples, seed)
            values[name, metric], replicates[name, metric] = resampled.macro, resampled.macro_replicates
    return values, replicates


def compare(
    models: Models, metrics: list[str], num_resamples: int, seed: int
) -> tuple[dict[str, dict[str, Estimate]], list[Comparison]]:
    """Scores of answers, or of probes, and their differences between all pairs of models: intervals by patient, p-values adjusted by
    Holm's method over all pairs and metrics.

    Returns:
        model -> metric -> score; and for each pair, in the order of the models, a comparison for each metric.

    Raises:
        ValueError: as `score` and `require_same_questions`; of probes, as `require_same_probe`.
    """
    names = name_models(models)
    probes, evaluated = _by_kind(models)
    if probes:
        values, replicates = _of_probes(probes, names, metrics, num_resamples, seed)
    else:
        values, replicates = _of_answers(evaluated, names, metrics, num_resamples, seed)
    scores = {
        name: {metric: estimate(values[name, metric], replicates[name, metric]) for metric in metrics} for name in names
    }
    differences = {
        (pair, metric): difference(
            values[pair[0], metric] - values[pair[1], metric], replicates[pair[0], metric] - replicates[pair[1], metric]
        )
        for pair in combinations(names, 2)  # each pair once, in the order of the models
        for metric in metrics
    }
    # there is no p-value for one patient, nor for an AUROC of too few patients with one of the answers
    p_values = [row.p_value for row in differences.values() if row.p_value is not None]
    adjusted = iter(holm(p_values) if p_values else [])
    return scores, [
        Comparison(pair, metric, row, None if row.p_value is None else next(adjusted))
        for (pair, metric), row in differences.items()
    ]


def in_words(comparisons: list[Comparison], scales: dict[str, MetricScale]) -> str:
    """One line that says which of two models is better, from their comparisons by each metric."""
    first, second = comparisons[0].models
    parts = []
    for row in comparisons:
        scale, gain = scales[row.metric], row.difference.value or 0.0
        if row.adjusted_p_value is None:
            parts.append(f"nothing can be said of {scale.title}: there are too few patients")
        elif row.adjusted_p_value < LEVEL:
            better, worse = (first, second) if (gain > 0) == scale.higher_is_better else (second, first)
            parts.append(f"{better} is better than {worse} by {scale.gain(gain)}")
        else:
            parts.append(f"not shown to differ in {scale.title}")
    return f"{first} and {second}: {'; '.join(parts)}."


def warnings_of(models: Models) -> list[str]:
    """What a reader of the comparison should know before all numbers."""
    notes = []
    ways = {model.results["settings"]["score"]: model.path for model in _by_kind(models)[1]}
    if len(ways) > 1:
        notes.append(
            "Some of these answers were generated and some chosen by likelihood among candidates, which is easier: a difference may be "
            f"one of the ways to ask, not of the models ({', '.join(f'{path} by {way}' for way, path in ways.items())})."
        )
    patients = len(set(models[0].column("patient_id")))
    if patients < MIN_PATIENTS:
        notes.append(
            f"The {_things(models)}s are {_of(models)} {counted(patients, 'patient')}: fewer than {MIN_PATIENTS} do not show how patients "
            "differ, so there are no intervals and no p-values."
        )
    return notes


def _things(models: Models) -> str:
    return "record" if isinstance(models[0], Probe) else "question"


def _of(models: Models) -> str:
    return "of" if isinstance(models[0], Probe) else "about"


def to_markdown(
    models: Models,
    scores: dict[str, dict[str, Estimate]],
    comparisons: list[Comparison],
    scales: dict[str, MetricScale],
) -> str:
    """Tables of the scores and of the differences, and a line in plain words for each pair."""
    metrics = list(scores[next(iter(scores))])
    num_patients = len(set(models[0].column("patient_id")))
    rows = [
        [name, *(scales[metric].with_interval(row[metric].to_dict()) for metric in metrics), str(model.path)]
        for (name, row), model in zip(scores.items(), models, strict=True)
    ]
    differences = []
    for row in comparisons:
        gain = scales[row.metric].with_interval(row.difference.to_dict(), "difference", "+")
        p_values = [
            p_in_words(value, row.difference.at_floor) for value in (row.difference.p_value, row.adjusted_p_value)
        ]
        differences.append([*row.models, row.metric, gain, *p_values])
    units = [f"{scale.title} in {scale.unit}" for scale in scales.values() if scale.factor == 1 and scale.unit]
    exceptions = f" But {', '.join(units)}." if units else ""
    shown = [CONDITIONS[model.condition] for model in _by_kind(models)[1][:1] if model.condition != ECG]
    lines = [
        *(f"Answers in the condition {condition.name}: {condition.description}." for condition in shown),
        f"{counted(len(models[0].predictions), _things(models))} {_of(models)} {counted(num_patients, 'patient')}. Scores in percent, differences "
        f"in points, in brackets their 95% intervals by patient.{exceptions}",
        *warnings_of(models),
        "",
        *table_lines(
            ["model", *(name if scales[name].factor > 1 else scales[name].heading for name in metrics), "results"], rows
        ),
        "",
        *table_lines(
            ["first", "second", "metric", "first - second", "p", f"p, Holm of {len(comparisons)}"], differences
        ),
        "",
    ]
    pairs = [comparisons[start : start + len(metrics)] for start in range(0, len(comparisons), len(metrics))]
    return "\n".join([*lines, *(f"- {in_words(pair, scales)}" for pair in pairs)])


def table_lines(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table whose columns stand below each other."""
    cells = [[text.replace("|", r"\|") for text in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"| {' | '.join(f'{text:<{width}}' for text, width in zip(row, widths, strict=True))} |" for row in cells]
    return [lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]]


def make_parser() -> argparse.ArgumentParser:
    """The options of `elm compare`."""
    parser = CommandLineParser(prog="elm compare", usage="elm compare A.json B.json ... [options]", description=__doc__)
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="FILE.json",
        help=f"{RESULTS_FILE} of `elm evaluate`, with {PREDICTIONS_FILE} beside it; the folder of both; or the folder of a model, with the "
        "one evaluation that all have; or all of these of `elm probe`",
    )
    parser.add_argument(
        "--metric",
        nargs="+",
        metavar="NAME",
        help="exact_match, a metric of training/evaluation/metrics or the path of your own that is a mean over the answers, or auroc (of "
        "--score likelihood); default: exact_match. Of probes auroc_10%% and the like, or auroc_zero_shot; default: all",
    )
    condition = "what the models were shown of the ECG when they gave the answers that are compared, one of --conditions of `elm evaluate`; "
    condition += "default: %(default)s"
    parser.add_argument("--condition", choices=ASKED, default=ECG, help=condition)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the comparison, as JSON")
    parser.add_argument(
        "--num_resamples",
        type=int,
        default=10_000,  # p-values of many comparisons have to be small
        help="bootstrap resamples of patients; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap; default: %(default)s")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Prints the comparison, and with --output writes it.

    Raises:
        ValueError: an option is not as expected; as `read_model` and `compare`.
    """
    args = make_parser().parse_args(argv)
    args.results = find_results(args.results)
    paths = [path.resolve() for path in args.results]
    if len(set(paths)) < len(paths) or len(paths) < 2:
        raise ValueError(f"The files are {', '.join(map(str, args.results))}; expected at least two, all different.")
    if args.output is not None and (args.output.suffix != ".json" or args.output.resolve() in paths):
        raise ValueError(f"--output is {args.output}; expected a FILE.json that is none of those compared.")
    if args.output is not None and not args.output.parent.is_dir():
        raise ValueError(f"--output is {args.output}; there is no folder {args.output.parent}.")
    if args.num_resamples < 1:
        raise ValueError(f"--num_resamples is {args.num_resamples}; it must be at least 1.")
    models: Any = [read_model(path, args.condition) for path in args.results]
    metrics = metrics_of(models, args.metric)
    scores, comparisons = compare(models, metrics, args.num_resamples, args.seed)
    scales = {metric: scale_of(metric, models) for metric in metrics}
    print(printable(to_markdown(models, scores, comparisons, scales)))
    if args.output is None:
        return
    output = {
        "schema_version": SCHEMA_VERSION,
        "data": models[0].results["data"],
        f"num_{_things(models)}s": len(models[0].predictions),
        "num_patients": len(set(models[0].column("patient_id"))),
        "settings": {
            **({} if isinstance(models[0], Probe) else {"condition": args.condition}),
            "num_resamples": args.num_resamples,
            "seed": args.seed,
            "adjustment": f"Holm, {len(comparisons)} comparisons",
        },
        "warnings": warnings_of(models),
        "metrics": {metric: scale.to_dict() for metric, scale in scales.items()},
        "models": {name: {metric: value.to_dict() for metric, value in row.items()} for name, row in scores.items()},
        "comparisons": [comparison.to_dict() for comparison in comparisons],
    }
    write_json(args.output, output)
    print(f"\nComparison in {args.output.resolve()}", flush=True)
