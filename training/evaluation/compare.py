"""Which of several ELMs is better on the same questions: `elm compare A.json B.json [...]`."""

import argparse
import inspect
import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from elm_ecg.training.command_line import CommandLineParser
from elm_ecg.training.evaluation.bootstrap import (
    Difference,
    Estimate,
    auroc_of_candidates,
    difference,
    estimate,
    holm,
    resampled_sums,
)
from elm_ecg.training.evaluation.scores import METRICS
from elm_ecg.training.files import write_text

SCHEMA_VERSION = 1  # of the output
RESULTS_SCHEMA_VERSION = 3  # of the inputs
PREDICTIONS = "predictions.jsonl"
# what makes the data of results the same, and a line of predictions the same question
DATA_FIELDS = ("split", "fingerprint")
QUESTION_FIELDS = ("row", "turn", "record_id", "patient_id", "question_type", "question", "answer")
LEVEL = 0.05


@dataclass
class Evaluation:
    """What `elm evaluate` wrote about a model: its results, and a line for each question."""

    path: Path
    name: str
    results: dict[str, Any]
    questions: list[dict[str, Any]]


@dataclass
class Comparison:
    """The score of the first model minus that of the second, with its p-value among all comparisons."""

    models: tuple[str, str]
    metric: str
    difference: Difference
    adjusted_p_value: float | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "models": list(self.models),
            "metric": self.metric,
            **self.difference.to_dict(),
            "adjusted_p_value": self.adjusted_p_value,
        }


def read_evaluation(path: Path) -> Evaluation:
    """Reads a results file and the predictions beside it.

    Raises:
        ValueError: it is no results file of this schema, or the predictions are not those that it sums up.
        OSError: a file cannot be read.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); expected the evaluation_results.json of `elm evaluate`."
        ) from error
    version = results.get("schema_version") if isinstance(results, dict) else None
    if version != RESULTS_SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {version}; expected {RESULTS_SCHEMA_VERSION}. Write it anew with `elm evaluate`."
        )
    data = results.get("data")
    absent = [key for key in ("model", "num_questions", "data") if key not in results]
    absent += [f"data.{key}" for key in DATA_FIELDS if not isinstance(data, dict) or key not in data]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}; write it anew with `elm evaluate`.")
    predictions = path.with_name(PREDICTIONS)
    if not predictions.is_file():
        raise ValueError(f"There is no {PREDICTIONS} beside {path}; keep it there, where `elm evaluate` wrote it.")
    questions = []
    # not splitlines: answers may hold other separators of lines than this one
    for number, line in enumerate(predictions.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            question = json.loads(line)
        except ValueError as error:
            raise ValueError(f"Line {number} of {predictions} is not JSON: {error}") from error
        absent = [name for name in (*QUESTION_FIELDS, "ecg") if name not in question]
        if absent:
            raise ValueError(
                f"Line {number} of {predictions} lacks {', '.join(absent)}; write it anew with `elm evaluate`."
            )
        questions.append(question)
    if not questions or len(questions) != results["num_questions"]:
        raise ValueError(
            f"{predictions} holds {len(questions)} questions, and {path.name} is about {results['num_questions']}; expected "
            "both of one finished run of `elm evaluate`."
        )
    return Evaluation(path, results["model"], results, questions)


def require_same_questions(first: Evaluation, other: Evaluation) -> None:
    """
    Raises:
        ValueError: the models were evaluated on different data, and what differs.
    """
    against = f"{first.path} and {other.path} are not about the same questions"
    for key in DATA_FIELDS:
        one, two = first.results["data"][key], other.results["data"][key]
        if one != two:
            raise ValueError(f"{against}: the {key} of the data is {one!r} and {two!r}.")
    if len(first.questions) != len(other.questions):
        raise ValueError(f"{against}: they are {len(first.questions)} and {len(other.questions)}.")
    for number, pair in enumerate(zip(first.questions, other.questions, strict=True), start=1):
        for key in QUESTION_FIELDS:
            one, two = (question[key] for question in pair)
            if one != two:
                raise ValueError(f"{against}: in line {number} of their predictions {key} is {one!r} and {two!r}.")


def score(metric: str, predictions: list[str], references: list[str]) -> np.ndarray:
    """The score of each answer, [questions].

    Raises:
        ValueError: there is no such metric, it needs more than the answers, or it is not a mean over them.
    """
    if metric == "exact_match":
        # as the module of that name, which takes seconds to load
        pairs = zip(predictions, references, strict=True)
        return np.array([given.strip() == answer.strip() != "" for given, answer in pairs], dtype=float)
    if not (METRICS / metric / f"{metric}.py").is_file():
        known = sorted(
            {"exact_match", "auroc", *(path.stem for path in METRICS.glob("*/*.py") if path.stem == path.parent.name)}
        )
        raise ValueError(f"There is no metric {metric!r}; expected one of {', '.join(known)}.")
    import evaluate  # late: it imports PyTorch

    module = evaluate.load(str(METRICS / metric))
    parameters = inspect.signature(module._compute).parameters.values()
    needed = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    if needed - {"predictions", "references"}:
        raise ValueError(
            f"{metric} needs a {', '.join(sorted(needed - {'predictions', 'references'}))}; compare by another metric."
        )
    samples = np.asarray(module.compute(predictions=predictions, references=references)["samples"])
    if samples.ndim != 1 or samples.dtype.kind not in "bif":
        raise ValueError(f"{metric} is not a mean over the answers, so it cannot be compared answer by answer.")
    return samples.astype(float)


def auroc(evaluations: list[Evaluation], num_resamples: int, seed: int) -> list[tuple[float, np.ndarray]]:
    """The AUROC of each model with the ECG, as `elm evaluate --score likelihood` has it, and its replicates.

    Raises:
        ValueError: the models decided among other candidates, or among none; or there is no question type with two right answers.
    """
    candidates = []
    for evaluation in evaluations:
        if any("candidates" not in question for question in evaluation.questions):
            raise ValueError(
                f"{evaluation.path} has no likelihoods, of which auroc is made; evaluate with --score likelihood."
            )
        candidates.append([question["candidates"] for question in evaluation.questions])
        if candidates[-1] != candidates[0]:
            raise ValueError(
                f"{evaluations[0].path} and {evaluation.path} decide among different candidates; give both the same --candidates."
            )
    found = []
    for evaluation in evaluations:
        columns = [[question[name] for question in evaluation.questions] for name in ("question_type", "answer")]
        logs = [question["log_likelihoods"]["ecg"] for question in evaluation.questions]
        patients = [question["patient_id"] for question in evaluation.questions]
        figures = auroc_of_candidates(columns[0], candidates[0], columns[1], logs, patients, num_resamples, seed)
        if not figures:
            raise ValueError(f"{evaluation.path}: each type of questions has one right answer, so there is no AUROC.")
        found.append(figures[None])
    return found


def name_models(evaluations: list[Evaluation]) -> list[str]:
    """The models' names, with their places among the arguments where two are of one name."""
    names = [evaluation.name for evaluation in evaluations]
    if len(set(names)) == len(names):
        return names
    return [f"{place}: {name}" for place, name in enumerate(names, start=1)]


def compare(
    evaluations: list[Evaluation], metrics: list[str], num_resamples: int, seed: int
) -> tuple[dict[str, dict[str, Estimate]], list[Comparison]]:
    """Scores with the ECG, and their differences between all pairs of models: intervals by patient, p-values adjusted by
    Holm's method over all pairs and metrics.

    Returns:
        model -> metric -> score; and for each pair, in the order of the models, a comparison for each metric.

    Raises:
        ValueError: as `score` and `require_same_questions`.
    """
    for other in evaluations[1:]:
        require_same_questions(evaluations[0], other)
    questions = evaluations[0].questions
    references = [question["answer"] for question in questions]
    names = name_models(evaluations)
    columns = {
        (name, metric): score(metric, [question["ecg"] for question in evaluation.questions], references)
        for name, evaluation in zip(names, evaluations, strict=True)
        for metric in metrics
        if metric != "auroc"
    }
    # all of them in one pass, beside the number of questions
    samples = np.column_stack([*columns.values(), np.ones(len(questions))])
    sums = resampled_sums(samples, [question["patient_id"] for question in questions], num_resamples, seed)
    values = dict(zip(columns, samples[:, :-1].mean(axis=0), strict=True))
    replicates = dict(zip(columns, (sums[:, :-1] / sums[:, -1:]).T, strict=True))
    if "auroc" in metrics:
        for name, figure in zip(names, auroc(evaluations, num_resamples, seed), strict=True):
            values[name, "auroc"], replicates[name, "auroc"] = figure

    scores = {
        name: {metric: estimate(values[name, metric], replicates[name, metric]) for metric in metrics} for name in names
    }
    differences = {
        (pair, metric): difference(
            values[pair[0], metric] - values[pair[1], metric], replicates[pair[0], metric] - replicates[pair[1], metric]
        )
        for pair in combinations(names, 2)
        for metric in metrics
    }
    # of one patient alone, none has a p-value
    p_values = [row.p_value for row in differences.values() if row.p_value is not None]
    adjusted = holm(p_values) if p_values else [None] * len(differences)
    return scores, [
        Comparison(pair, metric, row, p_value)
        for ((pair, metric), row), p_value in zip(differences.items(), adjusted, strict=True)
    ]


def in_words(comparisons: list[Comparison]) -> str:
    """One line that says which of two models is better, from their comparisons by each metric."""
    first, second = comparisons[0].models
    parts = []
    for row in comparisons:
        metric, gain = row.metric.replace("_", " "), row.difference.value or 0.0
        if row.adjusted_p_value is None:
            parts.append(f"nothing can be said of {metric}: all questions are about one patient")
        elif row.adjusted_p_value < LEVEL:
            better, worse = (first, second) if gain > 0 else (second, first)
            parts.append(f"{better} is better than {worse} by {abs(100 * gain):.1f} points of {metric}")
        else:
            parts.append(f"not shown to differ in {metric}")
    return f"{first} and {second}: {'; '.join(parts)}."


def to_markdown(
    evaluations: list[Evaluation], scores: dict[str, dict[str, Estimate]], comparisons: list[Comparison]
) -> str:
    """Tables of the scores and of the differences, and a line in plain words for each pair."""
    metrics = list(scores[next(iter(scores))])
    questions = evaluations[0].questions
    num_patients = len({question["patient_id"] for question in questions})
    rows = [
        [name, *(_percent(row[metric]) for metric in metrics), str(evaluation.path)]
        for (name, row), evaluation in zip(scores.items(), evaluations, strict=True)
    ]
    lines = [
        f"{len(questions)} questions about {num_patients} patients. Scores in percent, differences in points, in brackets "
        "their 95% intervals by patient.",
        "",
        *_table(["model", *metrics, "results"], rows),
        "",
        *_table(
            ["first", "second", "metric", "first - second", "p", f"p, Holm of {len(comparisons)}"],
            [
                [
                    *row.models,
                    row.metric,
                    _percent(row.difference, "+"),
                    _p(row.difference.p_value),
                    _p(row.adjusted_p_value),
                ]
                for row in comparisons
            ],
        ),
        "",
    ]
    pairs = [comparisons[start : start + len(metrics)] for start in range(0, len(comparisons), len(metrics))]
    return "\n".join([*lines, *(f"- {in_words(pair)}" for pair in pairs)])


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    cells = [[text.replace("|", r"\|") for text in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"| {' | '.join(f'{text:<{width}}' for text, width in zip(row, widths, strict=True))} |" for row in cells]
    return [lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]]


def _percent(row: Estimate | Difference, sign: str = "") -> str:
    assert row.value is not None  # a mean is always defined
    if row.low is None or row.high is None:
        return f"{100 * row.value:{sign}.1f}"
    return f"{100 * row.value:{sign}.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]"


def _p(value: float | None) -> str:
    if value is None:
        return "none"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def whole_number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = CommandLineParser(
        prog="elm compare", usage="elm compare A.json B.json [...] [options]", description=__doc__
    )
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="FILE.json",
        help=f"evaluation_results.json of `elm evaluate`, with {PREDICTIONS} beside it",
    )
    parser.add_argument(
        "--metric",
        nargs="+",
        default=["exact_match"],
        metavar="NAME",
        help="exact_match, a metric of training/evaluation/metrics that is a mean over the answers, or auroc (of --score likelihood); "
        "default: exact_match",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the comparison, as JSON")
    parser.add_argument(
        "--num_resamples",
        type=whole_number,
        default=10_000,  # p-values of many comparisons have to be small
        help="bootstrap resamples of patients; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap; default: %(default)s")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    paths = [path.resolve() for path in args.results]
    if len(set(paths)) < len(paths) or len(paths) < 2:
        raise ValueError(f"The files are {', '.join(map(str, args.results))}; expected at least two, all different.")
    if args.output is not None and (args.output.suffix != ".json" or args.output.resolve() in paths):
        raise ValueError(f"--output is {args.output}; expected a FILE.json that is none of those compared.")
    if args.output is not None and not args.output.parent.is_dir():
        raise ValueError(f"--output is {args.output}; there is no folder {args.output.parent}.")
    metrics = list(dict.fromkeys(args.metric))
    evaluations = [read_evaluation(path) for path in args.results]
    scores, comparisons = compare(evaluations, metrics, args.num_resamples, args.seed)
    print(to_markdown(evaluations, scores, comparisons))
    if args.output is None:
        return
    output = {
        "schema_version": SCHEMA_VERSION,
        "data": evaluations[0].results["data"],
        "num_questions": len(evaluations[0].questions),
        "num_patients": len({question["patient_id"] for question in evaluations[0].questions}),
        "settings": {
            "condition": "ecg",
            "num_resamples": args.num_resamples,
            "seed": args.seed,
            "adjustment": f"Holm, {len(comparisons)} comparisons",
        },
        "models": {name: {metric: value.to_dict() for metric, value in row.items()} for name, row in scores.items()},
        "comparisons": [comparison.to_dict() for comparison in comparisons],
    }
    write_text(args.output, json.dumps(output, indent=2, allow_nan=False) + "\n")
    print(f"\nComparison in {args.output.resolve()}", flush=True)


if __name__ == "__main__":
    main()
