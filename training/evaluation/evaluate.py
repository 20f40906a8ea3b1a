"""Scores an ELM on the answers of a dataset, with the ECG and without it: `elm evaluate MODEL --data ...`, or `evaluate`."""

import hashlib
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from scipy.stats import t as student_t
from transformers import GenerationConfig

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.arguments import DataArguments, ELMParser, argument, json_fields
from elm_ecg.training.build import limit_threads, load_elm
from elm_ecg.training.command_line import run_command
from elm_ecg.training.data.loading import load_data
from elm_ecg.training.evaluation.answers import Answerer, Progress
from elm_ecg.training.evaluation.card import add_evaluation
from elm_ecg.training.evaluation.conditions import ASKED, BASELINE, CONDITIONS, ECG
from elm_ecg.training.evaluation.questions import (
    Question,
    candidate_answers,
    fingerprint_of,
    list_questions,
    most_frequent_answers,
)
from elm_ecg.training.evaluation.report import write_report
from elm_ecg.training.evaluation.results import (
    QUESTION_FIELDS,
    REPORT_FILE,
    SCHEMA_VERSION,
    SUMMARY_FILE,
    Results,
    as_percent,
    verdict,
    write_json,
)
from elm_ecg.training.evaluation.scores import METRIC_NAMES, Scorer, load_metrics
from elm_ecg.training.files import check_output_folder
from elm_ecg.training.model_files import find_model_file

logger = logging.getLogger(__name__)

ScoredBy = Literal["generation", "likelihood"]
METRICS = ("normalized_match", "token_f1", "closed_set")  # by default, beside exact_match
# options about data that are of training alone, and why
OF_TRAINING = {
    "perturb": "evaluation changes the ECGs itself, as --conditions says",
    "data_weights": "all rows are scored, each once",
}
PACKAGES = ("elm-ecg", "torch", "transformers", "accelerate", "datasets", "evaluate", "peft")
# fields of a generation config that would give other than one text to a prompt, or have an option of their own
NOT_GENERATION = (
    "max_new_tokens",
    "max_length",
    "num_return_sequences",
    "return_dict_in_generate",
    "cache_implementation",
)


def evaluate(
    model: ELMForConditionalGeneration,
    processor: ELMProcessor,
    dataset: Dataset | list[dict[str, Any]],
    *,
    conditions: Sequence[str] = ASKED,
    metrics: Sequence[str] = METRICS,
    bert_score_model: str | None = None,
    score: ScoredBy = "generation",
    candidates: Sequence[str] | None = None,
    training_dataset: Dataset | list[dict[str, Any]] | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 128,
    generation: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
    seed: int = 0,
    num_resamples: int = 2000,
    progress: Progress | None = None,
) -> Results:
    """Asks an ELM the questions of a dataset with the ECG and without it, and scores its answers. Writes no files.

        results = evaluate(model, processor, dataset, training_dataset=training_dataset)
        results["verdict"]  # "Exact match 87.0 [83.1, 90.9]% (...), better than ...: the model looks at the ECG."
        results["conditions"]["ecg"]["metrics"]["exact_match"]  # {"value": 0.87, "interval_95": [0.831, 0.909]}
        results["ecg_minus"]["swapped"]["exact_match"]  # {"difference": ..., "interval_95": ..., "p_value": ...}
        results.predictions[0]["ecg"]  # what it answered to the first question, with its ECG

    Args:
        model: on the device that it runs on; it is put into evaluation mode.
        dataset: rows with `messages` (a chat whose assistant turns are the right answers) and `ecg` (a dict with `array` [leads,
            samples], `sampling_rate`, `lead_names` and `unit`, the path of a file, or a list of these). Intervals are by
            `patient_id` where there is one, scores by `question_type`.
        conditions: some of `conditions.ASKED`; `ecg` is always among them.
        metrics: some of training/evaluation/metrics, beside exact match.
        bert_score_model: encoder of the metric bert_score.
        score: `generation`, what the model writes; `likelihood`, which of the candidate answers it finds likeliest.
        candidates: answers for `likelihood`. None: those that a type of question has here and in `training_dataset`.
        training_dataset: its most frequent answers are scored too, as a baseline without any model.
        batch_size, max_new_tokens: conversations answered at once, and the longest answer.
        generation, system_prompt: other options of `generate`, else greedy; and in place of the processor's, "" for none.
        seed, num_resamples: of random conditions, sampled answers and the bootstrap; and its resamples of patients.
        progress: keeps the answers in files, with which an interrupted evaluation goes on.

    Returns:
        What the module `results` describes; on processes other than the first nothing.

    Raises:
        ValueError: an argument is not as expected; the dataset has no assistant turn, or an ECG that cannot be read.
        ImportError: a metric needs a library that is not installed.
    """
    processor = processor.with_system_prompt(system_prompt)
    settings: dict[str, Any] = {
        "score": score,
        "generation": {"do_sample": False, "max_new_tokens": max_new_tokens, **(generation or {})},
        "candidates": candidates,
        "batch_size": batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "system_prompt": processor.system_prompt or None,
        "seed": seed,
        "num_resamples": num_resamples,
    }
    others = {"conditions": conditions, "metrics": metrics, "bert_score_model": bert_score_model}
    _check({**settings, **others, "max_new_tokens": max_new_tokens, "generation": generation or {}})
    # first, as what they lack should be known before the answers are made
    modules = load_metrics(["exact_match", *metrics])
    data = _as_dataset(dataset)
    questions = list_questions(data)
    if not questions:
        raise ValueError(f"The dataset has {len(data)} rows and no assistant turn to score.")
    training = [] if training_dataset is None else list_questions(_as_dataset(training_dataset))
    choices = candidate_answers(questions, training, candidates) if score == "likelihood" else None
    if progress is not None:
        facts = [choices, batch_size, settings["generation"], processor.system_prompt]
        progress.begin([fingerprint_of(questions), *facts])
    answerer = Answerer(model.eval(), processor, data, questions, choices, batch_size, settings["generation"], seed)
    answers, not_scored = _ask(answerer, [name for name in ASKED if name == ECG or name in conditions], progress)
    if not PartialState().is_main_process:  # one process scores and writes
        return Results()
    scorer = Scorer(questions, modules, num_resamples, seed, {"bert_score": {"model": bert_score_model}}, choices)
    return _summarise(answerer, scorer, answers, not_scored, training, settings)


def _check(settings: Mapping[str, Any], prefix: str = "") -> None:
    """Refuses settings before anything is asked.

    Args:
        settings: arguments of `evaluate`, or options of the command, named with the `prefix`.

    Raises:
        ValueError: one is not as expected, or does not go with another.
    """
    for name in ("batch_size", "max_new_tokens", "num_resamples"):
        if settings[name] < 1:
            raise ValueError(f"{prefix}{name} is {settings[name]}; it must be at least 1.")
    if min(np.atleast_1d(settings["seed"])) < 0:
        raise ValueError(f"{prefix}seed is {settings['seed']}; it must be at least 0.")
    known = {"conditions": ASKED, "metrics": METRIC_NAMES, "score": get_args(ScoredBy)}
    for name, expected in known.items():
        values = [settings[name]] if name == "score" else settings[name]
        unknown = [value for value in values if value not in expected]
        if unknown:
            raise ValueError(f"{prefix}{name} has {', '.join(unknown)}; expected some of {', '.join(expected)}.")
    if "bert_score" in settings["metrics"] and settings["bert_score_model"] is None:
        raise ValueError(
            f"{prefix}metrics bert_score compares what an encoder makes of the answers; name it with {prefix}bert_score_model."
        )
    if settings["candidates"] and settings["score"] != "likelihood":
        raise ValueError(
            f"{prefix}candidates are what {prefix}score likelihood decides among; add that, or leave them out."
        )
    generation, name = settings["generation"], "--generation_kwargs" if prefix else "generation"
    unknown = [key for key in generation if key in NOT_GENERATION or not hasattr(GenerationConfig(), key)]
    if unknown:
        raise ValueError(
            f"{name} has {', '.join(unknown)}; expected options of `generate` that leave one text to a question, and "
            f"{prefix}max_new_tokens apart."
        )
    if generation and settings["score"] == "likelihood":
        raise ValueError(f"{name} with {prefix}score likelihood, which generates nothing; leave them out.")


def _as_dataset(rows: Dataset | list[dict[str, Any]]) -> Dataset:
    """The rows with their ECGs as NumPy arrays: lists of Python numbers would take longer to make than the ECG to process."""
    if not isinstance(rows, Dataset | list):
        raise ValueError(
            f"The dataset is a {type(rows).__name__}; expected a `datasets.Dataset`, one split, or a list of rows."
        )
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    if "messages" not in data.column_names:
        raise ValueError(f"The dataset has the columns {data.column_names}; expected messages and ecg.")
    return data.with_format("numpy", columns=["ecg"], output_all_columns=True) if "ecg" in data.column_names else data


def _ask(
    answerer: Answerer, conditions: Sequence[str], progress: Progress | None
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Condition -> its answers, and condition -> why it has none."""
    asked, not_scored = {}, {}
    for name in conditions:
        answers, reason = answerer.ask(name, progress)
        if reason is None:
            asked[name] = answers
        else:
            not_scored[name] = reason
    if PartialState().is_main_process:
        for name, reason in not_scored.items():
            logger.warning("%s: not scored. %s", CONDITIONS[name].label, reason)
        for notice, records in answerer.notices.items():
            logger.warning("%s (records: %d)", notice, len(records))
    return asked, not_scored


def _summarise(
    answerer: Answerer,
    scorer: Scorer,
    asked: dict[str, list[Any]],
    not_scored: dict[str, str],
    training: list[Question],
    settings: dict[str, Any],
) -> Results:
    """The results of the answers; with candidates, of their log-likelihoods."""
    answers, likelihoods, candidates, questions = asked, {}, scorer.candidates, scorer.questions
    if candidates is not None:
        likelihoods = asked
        answers = {
            condition: [names[int(np.argmax(row))] for names, row in zip(candidates, rows, strict=True)]
            for condition, rows in asked.items()
        }
    if training:
        answers = {**answers, BASELINE: most_frequent_answers(questions, training)}
    if "closed_set" in scorer.modules and not scorer.closed:
        not_scored["closed_set"] = "No type of question has a few different answers."
    model, data = answerer.model, answerer.data
    results: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": Path(model.name_or_path or "").name,
        "model_revision": getattr(model.config, "_commit_hash", None),
        "data": {
            "names": [],
            "split": data.split and str(data.split),
            "fold": None,
            "fingerprint": fingerprint_of(questions),
        },
        "settings": settings,
        "packages": {name: version(name) for name in PACKAGES},
        **scorer.summarise(answers, likelihoods),
        "not_scored": not_scored,
    }
    results["verdict"] = verdict(results)
    records = data["record_id"][:] if "record_id" in data.column_names else [None] * len(data)
    predictions: list[dict[str, Any]] = []
    for index, question in enumerate(questions):
        fields_of_row = {**vars(question), "record_id": records[question.row]}
        prediction = {name: fields_of_row[name] for name in QUESTION_FIELDS}
        prediction |= {condition: texts[index] for condition, texts in answers.items()}
        if candidates is not None:
            prediction["candidates"] = candidates[index]
            prediction["log_likelihoods"] = {name: rows[index] for name, rows in likelihoods.items()}
        predictions.append(prediction)
    return Results(results, predictions)


@dataclass
class EvaluationArguments(DataArguments):
    """What is scored, and how."""

    model_name_or_path: str = argument(
        "",
        "Saved ELM or LoRA adapter: local folder or Hub id; also the first argument. {fold} in it stands for the fold.",
    )
    model_revision: str = argument("main", "Branch, tag or commit of a model on the Hub.")
    split: str = argument("test", "Split of the data that is scored.")
    fold: list[int] | None = argument(  # type: ignore[assignment]  # one of them, or several
        None, "Folds of datasets that have splits such as fold1_train and fold1_test; each is a run."
    )
    output_dir: str | None = argument(None, "Where the results go. Default: the model's folder, or ./evaluation.")
    score: ScoredBy = argument(
        "generation",
        "generation: what the model writes. likelihood: which of the candidate answers it finds likeliest, with the "
        "AUROC of their shares.",
    )
    candidates: list[str] | None = argument(
        None,
        "Answers that --score likelihood decides among. Default: those that a type of question has in the training "
        "and in the scored split.",
    )
    conditions: list[str] = argument(
        list(ASKED),
        f"What is shown of the ECG ({'; '.join(f'{name}, {CONDITIONS[name].description}' for name in ASKED)}). "
        "ecg is always among them.",
        choices=list(ASKED),
    )
    batch_size: int = argument(32, "Conversations answered at once.")
    max_new_tokens: int = argument(128, "Longest answer, in tokens.")
    generation_kwargs: str | None = argument(
        None, 'JSON with other options of `generate`, such as {"num_beams": 4}. Default: greedy decoding.'
    )
    dtype: str = argument("auto", "Of the model: auto, float32, bfloat16 or float16.")
    torch_compile: bool = argument(False, "Compile the model with torch.compile.")
    dataset_num_proc: int | None = argument(None, "Processes that prepare datasets of the reference.")
    seed: list[int] = argument(
        [0], "Of noise, swapped ECGs, sampled answers and the bootstrap; of several, each is a run."
    )
    num_resamples: int = argument(2000, "Bootstrap resamples of patients.")
    metrics: list[str] = argument(
        list(METRICS),
        'Scores beside exact match; bleu4, rouge_l, meteor and bert_score need `pip install "elm-ecg[metrics]"`.',
        choices=METRIC_NAMES,
    )
    bert_score_model: str | None = argument(None, "Encoder of bert_score that it knows, such as roberta-large.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.generation = json_fields("generation_kwargs", self.generation_kwargs)
        _check(vars(self), "--")
        for name in ("seed", "fold"):
            values = getattr(self, name) or []
            if len(set(values)) < len(values):
                raise ValueError(f"--{name} {' '.join(map(str, values))} names one twice.")

    @property
    def samples(self) -> bool:
        """Whether answers are drawn at random."""
        return bool(self.generation.get("do_sample", False))

    def load(self, fold: int | None, split: str, **changes: Any) -> Dataset | None:
        """A split of the data, of one `fold` if it has folds; None if it has no such split."""
        values = {option.name: getattr(self, option.name) for option in fields(DataArguments)}
        arguments = DataArguments(**values | {"fold": fold} | changes)  # one fold, where `self.fold` may list several
        return load_data(arguments, split, self.seed[0], self.dataset_num_proc)  # one subset for all seeds


def revision_of(model: ELMForConditionalGeneration, name_or_path: str) -> str:
    """The commit of a model on the Hub, or a digest of the weights in a local folder."""
    if not Path(name_or_path).is_dir():
        return str(getattr(model.config, "_commit_hash", None))
    digest = hashlib.sha256()
    for path in sorted(Path(name_or_path).glob("*.safetensors")):  # weights alone: this command writes the card itself
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def parse(argv: list[str] | None = None) -> EvaluationArguments:
    """The arguments of `elm evaluate`.

    Raises:
        ValueError: no model is named, or an option is not as expected.
    """
    parser = ELMParser(EvaluationArguments, prog="elm evaluate")
    parser.refuse(OF_TRAINING)
    (args,) = parser.parse_args_and_config(argv)
    if not args.model_name_or_path:
        raise ValueError("Which model? Give its folder or Hub id as --model_name_or_path.")
    if "{fold}" in args.model_name_or_path and args.fold is None:
        raise ValueError(
            f"Which fold is {{fold}} in {args.model_name_or_path}? Say it with --fold, such as --fold 1 2."
        )
    return args


def output_folder(args: EvaluationArguments) -> Path:
    """The folder of the results: that of --output_dir, of a local model, or ./evaluation."""
    own = Path(args.model_name_or_path)
    return Path(args.output_dir) if args.output_dir else own if own.is_dir() else Path("evaluation")


def over_runs(runs: Sequence[dict[str, Any]], seeds: list[int], samples: bool) -> dict[str, Any]:
    """Mean, standard deviation and 95% t-interval of each score over the runs, folds times seeds.

    Where no seed changes the answers of a condition, its runs of one fold are the same one, and count once.
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
            if len(values) > 1:  # runs are taken as independent, though folds share training data
                deviation = statistics.stdev(values)  # of a sample: by n - 1
                half = float(student_t.ppf(0.975, len(values) - 1)) * deviation / len(values) ** 0.5
                row[metric] |= {"std": deviation, "interval_95": [mean - half, mean + half]}
    return {
        "schema_version": SCHEMA_VERSION,
        "runs": [
            {"fold": run["data"]["fold"], "seed": run["settings"]["seed"], "model_revision": run["model_revision"]}
            for run in runs
        ],
        "conditions": scores,
    }


def _load_fold(args: EvaluationArguments, fold: int | None) -> tuple[Dataset, Dataset | None]:
    """The split that is scored, and where there is one that of training."""
    with PartialState().main_process_first():  # it fills the cache of `datasets`, which the others then read
        data = args.load(fold, args.split)
        training_data = None if args.split == "train" else args.load(fold, "train", data_subset=None)
    if data is None:
        raise ValueError(f"--data {' '.join(args.data)} has no split {args.split!r}.")
    return data, training_data


def _evaluate_fold(
    args: EvaluationArguments,
    fold: int | None,
    data: Dataset,
    training_data: Dataset | None,
    model: ELMForConditionalGeneration,
    processor: ELMProcessor,
    name: str,
    folder: Path,
) -> list[Results]:
    """The results of each seed, written into `folder`."""
    state = PartialState()
    revision = revision_of(model, name)
    folder.mkdir(parents=True, exist_ok=True)
    # answers of an interrupted run count only for the same facts, and settings of `evaluate`
    facts = [SCHEMA_VERSION, revision, args.dtype, args.torch_compile, args.data, args.ecg_root]
    progress = Progress(folder, facts, state.process_index)
    runs = []
    names = ("conditions", "metrics", "bert_score_model", "score", "candidates", "batch_size", "max_new_tokens")
    options: dict[str, Any] = {name: getattr(args, name) for name in (*names, "system_prompt", "num_resamples")}
    for seed in args.seed:
        results = evaluate(
            model,
            processor,
            data,
            training_dataset=training_data,
            generation=args.generation,
            seed=seed,
            progress=progress,
            **options,
        )
        runs.append(results)
        if state.is_main_process:
            results |= {"model": Path(name).name, "model_revision": revision}
            results["data"] |= {"names": [Path(name).name for name in args.data], "split": args.split, "fold": fold}
            results["settings"] |= {"torch_compile": args.torch_compile, "data_subset": args.data_subset}
            _write(folder / f"seed{seed}" if len(args.seed) > 1 else folder, results, data)
    return runs


def _write(folder: Path, results: Results, data: Dataset) -> None:
    folder.mkdir(exist_ok=True)
    results.save(folder)
    write_report(folder / REPORT_FILE, results, results.predictions, data)
    add_evaluation(folder, results)
    print(results["verdict"])
    print(f"Results, predictions and report in {folder.resolve()}", flush=True)


def main(argv: list[str] | None = None) -> Results:
    """Returns the results of a single run, or the figures over several; on processes other than the first nothing."""
    args = parse(argv)
    load_metrics(args.metrics)  # what they lack should be known before the model is loaded
    state = PartialState(cpu=not torch.cuda.is_available())  # no MPS, which accelerate would take
    folder = output_folder(args)
    folds: list[int | None] = [None] if args.fold is None else [*args.fold]
    folders = {fold: folder / f"fold{fold}" if len(folds) > 1 else folder for fold in folds}
    if len(args.seed) > 1 and not args.samples:
        logger.warning(
            "Answers are not sampled, so that only %s depend on the seed: the others are asked once, for %s.",
            " and ".join(name for name in args.conditions if CONDITIONS[name].random) or "no conditions",
            ", ".join(f"seed {seed}" for seed in args.seed),
        )
    # what is wrong with these should be known before a model is loaded, too
    check_output_folder(folder)
    models = {fold: args.model_name_or_path.replace("{fold}", str(fold)) for fold in folds}
    for name in set(models.values()):
        find_model_file(name, ["adapter_config.json", "config.json"], args.model_revision)
    data = {fold: _load_fold(args, fold) for fold in folds}
    runs: list[Results] = []
    model = processor = None
    for fold in folds:
        name = models[fold]
        if model is None or processor is None or name != args.model_name_or_path:  # else it is kept
            model, processor = load_elm(name, revision=args.model_revision, dtype=args.dtype)
            model.to(state.device)  # type: ignore[arg-type]  # a wrapped method
            limit_threads(model, state.device)
            if args.torch_compile:
                model.compile(dynamic=True)  # batches differ in length
        runs += _evaluate_fold(args, fold, *data[fold], model, processor, name, folders[fold])
    if not state.is_main_process:
        return Results()
    # only now: an evaluation that is interrupted in a later fold keeps the answers of the earlier ones
    for fold_folder in folders.values():
        Progress(fold_folder, None).remove()  # facts do not matter here
    if len(runs) == 1:
        return runs[0]
    summary = Results(over_runs(runs, args.seed, args.samples))
    write_json(folder / SUMMARY_FILE, summary)
    for condition, metrics in summary["conditions"].items():
        row = metrics["exact_match"]
        spread = "" if row["std"] is None else f", standard deviation {as_percent(row['std'])}"
        print(f"{condition}: exact match {as_percent(row['mean'])}% over {row['num_runs']} runs{spread}")
    print(f"Figures over the runs in {(folder / SUMMARY_FILE).resolve()}", flush=True)
    return summary


if __name__ == "__main__":  # as `accelerate launch` and `torchrun` start it
    sys.exit(run_command("elm evaluate", main))
