"""Scores an ELM on the answers of a dataset, with the ECG and without it: `elm evaluate MODEL --data ...`, or `evaluate`."""

import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from elm_ecg.ecg_utils import as_record
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.command_line import run_command
from elm_ecg.training.data.schema import counted
from elm_ecg.training.digest import digest_of_folder, digest_of_model, files_of_model, folder_of
from elm_ecg.training.evaluation.answers import Answerer
from elm_ecg.training.evaluation.arguments import METRICS, EvaluationArguments, ScoredBy, check_settings, parse
from elm_ecg.training.evaluation.attributions import require_captum
from elm_ecg.training.evaluation.card import add_evaluations
from elm_ecg.training.evaluation.conditions import ASKED, BASELINE, CONDITIONS, ECG
from elm_ecg.training.evaluation.explain import explain_prediction
from elm_ecg.training.evaluation.progress import Progress
from elm_ecg.training.evaluation.questions import (
    Question,
    candidate_answers,
    digest,
    digest_of_questions,
    fingerprint_of,
    list_questions,
    most_frequent_answers,
    without_thinking,
)
from elm_ecg.training.evaluation.report import write_report
from elm_ecg.training.evaluation.results import (
    EVALUATIONS,
    QUESTION_FIELDS,
    REPORT_FILE,
    RESULTS_FILE,
    SCHEMA_VERSION,
    SUMMARY_FILE,
    Results,
    identity_of,
    move_old_results,
    write_json,
)
from elm_ecg.training.evaluation.runs import over_runs
from elm_ecg.training.evaluation.scale import scales_of
from elm_ecg.training.evaluation.scores import Scorer, check_contract, file_of, is_path, load_metrics, name_of
from elm_ecg.training.evaluation.thinking import scored_answer
from elm_ecg.training.evaluation.verdict import verdict
from elm_ecg.training.files import check_output_folder
from elm_ecg.training.load import limit_threads, load_elm
from elm_ecg.training.model_files import find_model_file

logger = logging.getLogger(__name__)

PACKAGES = ("elm-ecg", "torch", "transformers", "accelerate", "datasets", "evaluate", "peft")


def evaluate(
    model: ELMForConditionalGeneration,
    processor: ELMProcessor,
    dataset: Dataset | list[dict[str, Any]],
    *,
    conditions: Sequence[str] | str = ASKED,
    metrics: Sequence[str] | str = METRICS,
    main_metric: str | None = None,
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
        dataset: rows with `messages` (a chat whose assistant turns are the right answers) and `ecg` (an `ECGRecord`, a dict with
            `array` [leads, samples], `sampling_rate`, `lead_names` and `unit`, the path of a file, or a list of these). Intervals
            are by `patient_id` where there is one, scores by `question_type`.
        conditions: one or some of `conditions.ASKED`; `ecg` is always among them.
        metrics: one or some of training/evaluation/metrics, beside exact match, or the paths of metrics of your own.
        main_metric: of the verdict and the plots; one that is scored. None: `auroc` where there is one, else `exact_match`.
        bert_score_model: encoder of the metric bert_score.
        score: `generation`, what the model writes; `likelihood`, which of the candidate answers it finds likeliest.
        candidates: answers for `likelihood`. None: those that a type of question has here and in `training_dataset`.
        training_dataset: its most frequent answers are scored too, as a baseline without any model. None or empty: no baseline.
        batch_size, max_new_tokens: conversations answered at once, and the longest answer.
        generation, system_prompt: other options of `generate`, else greedy; and in place of the processor's, "" for none.
        seed, num_resamples: of random conditions, sampled answers and the bootstrap; and its resamples of patients.
        progress: keeps the answers in files, with which an interrupted evaluation goes on.

    Returns:
        What the module `results` describes; on processes other than the first nothing.

    Raises:
        ValueError: an argument is not as expected; the dataset has no assistant turn, or an ECG that cannot be read; the model
            gives NaN.
        ImportError: a metric needs a library that is not installed.
    """
    settings: dict[str, Any] = {
        "score": score,
        "conditions": _as_list(conditions),
        "metrics": _as_list(metrics),
        "bert_score_model": bert_score_model,
        "main_metric": main_metric,
        "candidates": None if candidates is None else _as_list(candidates),
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "generation": dict(generation or {}),
        "system_prompt": system_prompt,
        "seed": seed,
        "num_resamples": num_resamples,
    }
    check_settings(settings)
    data = _as_dataset(dataset, "dataset")
    training = None if training_dataset is None else _as_dataset(training_dataset, "training_dataset")
    return _evaluate(model, processor, data, training, settings, progress)


def _as_list(names: Sequence[str] | str) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _evaluate(
    model: ELMForConditionalGeneration,
    processor: ELMProcessor,
    data: Dataset,
    training_data: Dataset | None,
    settings: Mapping[str, Any],
    progress: Progress | None,
    revision: str | None = None,
    fingerprint: str | None = None,
    prefix: str = "",
) -> Results:
    """As `evaluate`, of settings that were checked.

    Args:
        revision, fingerprint: digests of the model and of the data, where they are known.
        prefix: of options in messages; none, of arguments.
    """
    score, batch_size, seed = settings["score"], settings["batch_size"], settings["seed"]
    # first, as what they lack should be known before the answers are made
    modules = load_metrics(["exact_match", *settings["metrics"]])
    questions = list_questions(data)
    if not questions:
        raise ValueError(f"The dataset has {counted(len(data), 'row')} and no assistant turn to score.")
    scored = without_thinking(questions) if processor.explicit_thinking else questions
    for metric in filter(is_path, settings["metrics"]):
        check_contract(name_of(metric), modules[name_of(metric)], [question.answer for question in scored])
    training = [] if training_data is None else list_questions(training_data)
    choices = candidate_answers(questions, training, settings["candidates"], prefix) if score == "likelihood" else None
    generation = {"do_sample": False, "max_new_tokens": settings["max_new_tokens"], **settings["generation"]}
    revision = revision or _on_first(lambda: digest_of_model(model, processor))
    processor = processor.with_system_prompt(settings["system_prompt"])  # that of the model counts to its revision
    fingerprint = fingerprint or _on_first(lambda: fingerprint_of(data, questions))
    packages = {name: version(name) for name in PACKAGES}
    if progress is not None:
        # all that an answer depends on: the digests hold what the model, its processor and the ECGs are
        device = [str(model.dtype), model.device.type, getattr(model.config, "_attn_implementation", None)]
        shown = [fingerprint, choices, batch_size, generation, processor.system_prompt]
        progress.begin([revision, packages, device, shown])
    answerer = Answerer(model.eval(), processor, data, questions, choices, batch_size, generation, seed)
    answers, not_scored = ask_conditions(
        answerer, [name for name in ASKED if name == ECG or name in settings["conditions"]], progress
    )
    if not PartialState().is_main_process:  # one process scores and writes
        return Results()
    options = {"bert_score": {"model": settings["bert_score_model"]}}
    whole = [question.answer for question in questions] if processor.explicit_thinking else None
    scorer = Scorer(scored, modules, settings["num_resamples"], seed, options, choices, whole)
    facts = facts_of(
        Path(model.name_or_path or "").name,
        revision,
        data,
        fingerprint,
        training,
        {
            **settings,
            "generation": generation,
            "dtype": dtype_of(model),
            "system_prompt": processor.system_prompt or None,
            "explicit_thinking": processor.explicit_thinking,
        },
    )
    facts["model_commit"] = getattr(model.config, "_commit_hash", None)
    training = without_thinking(training) if processor.explicit_thinking else training
    return summarise(answerer, scorer, answers, not_scored, training, facts, settings["main_metric"])


def facts_of(
    model: str, revision: str, data: Dataset, fingerprint: str, training: list[Question], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What results hold beside the scores, as the module `results` describes it.

    Args:
        model, revision: its name and digest.
        data, fingerprint: what was asked, and its digest.
        training: the questions that the baseline is from.
        settings: `dtype` and those of `evaluate`, of which the ones that results name are taken.
    """
    names = ["score", "generation", "candidates", "batch_size", "dtype", "system_prompt", "seed", "num_resamples"]
    names.append("explicit_thinking")
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "model_revision": revision,
        "model_commit": None,
        "model_files": None,
        "evaluation": None,
        "data": {
            "names": [],
            "split": data.split and str(data.split),
            "fold": None,
            "fingerprint": fingerprint,
            "training_fingerprint": digest_of_questions(training) if training else None,
        },
        "settings": {name: settings[name] for name in names},
        "packages": {name: version(name) for name in PACKAGES},
    }


def dtype_of(model: ELMForConditionalGeneration) -> str:
    """Of its weights, such as `float32`."""
    return str(model.dtype).removeprefix("torch.")


def _on_first(function: Callable[[], Any]) -> Any:
    """What the function gives in the first process, in all of them."""
    values = [function() if PartialState().is_main_process else None]
    return broadcast_object_list(values)[0]


def _as_dataset(rows: Dataset | list[dict[str, Any]], name: str) -> Dataset:
    """The rows with their ECGs as NumPy arrays: lists of Python numbers would take longer to make than the ECG to process."""
    if not isinstance(rows, Dataset | list):
        raise ValueError(
            f"{name} is a {type(rows).__name__}; expected a `datasets.Dataset`, one split, or a list of rows."
        )
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(_without_records(rows))
    if len(data) and "messages" not in data.column_names:
        raise ValueError(f"{name} has the columns {data.column_names}; expected messages and ecg.")
    return data.with_format("numpy", columns=["ecg"], output_all_columns=True) if "ecg" in data.column_names else data


def _without_records(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in which the ECGs are dicts where any of them is an `ECGRecord`, which a table cannot hold; files beside it are read."""

    def ecgs_in(row: dict[str, Any]) -> list[Any]:
        ecg = row.get("ecg")
        return list(ecg) if isinstance(ecg, list | tuple) else [] if ecg is None else [ecg]

    def as_dict(ecg: Any) -> dict[str, Any]:
        record = as_record(ecg)
        fields = {"array": record.array, "sampling_rate": float(record.sampling_rate), "unit": "mV"}
        notices = list(record.metadata.get("notices", ()))
        return {**fields, "lead_names": list(record.lead_names), "metadata": {"notices": notices}}

    # by name, as `as_record` knows it: the class of a Hub repo is another
    if not any(type(ecg).__name__ == "ECGRecord" for row in rows for ecg in ecgs_in(row)):
        return rows
    return [
        {
            **row,
            "ecg": [as_dict(ecg) for ecg in ecgs_in(row)]
            if isinstance(row["ecg"], list | tuple)
            else as_dict(row["ecg"]),
        }
        if ecgs_in(row)
        else row
        for row in rows
    ]


def ask_conditions(
    answerer: Any, conditions: Sequence[str], progress: Progress | None
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Condition -> its answers, and condition -> why it has none.

    Args:
        answerer: an `Answerer`, or what asks another kind of model and has its `ask` and `notices`.
    """
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


def summarise(
    answerer: Any,
    scorer: Scorer,
    asked: dict[str, list[Any]],
    not_scored: dict[str, str],
    training: list[Question],
    facts: dict[str, Any],
    main_metric: str | None,
) -> Results:
    """The results of the answers; with candidates, of their log-likelihoods.

    Args:
        answerer: as of `ask_conditions`; its `data` are the rows of the questions.
        facts: what else the results hold.
    """
    answers, likelihoods, candidates, questions = asked, {}, scorer.candidates, scorer.questions
    if candidates is not None:
        likelihoods = asked
        answers = {
            condition: [names[int(np.argmax(row))] for names, row in zip(candidates, rows, strict=True)]
            for condition, rows in asked.items()
        }
    written = answers if scorer.whole is not None else {}
    for condition, texts in written.items():
        pairs = zip(texts, scorer.whole or [], strict=True)
        answers = {**answers, condition: [scored_answer(text, reference) for text, reference in pairs]}
    if training:
        answers = {**answers, BASELINE: most_frequent_answers(questions, training)}
    if "closed_set" in scorer.modules and not scorer.closed:
        not_scored["closed_set"] = "No type of question has a few different answers."
    data = answerer.data
    results = {**facts, **scorer.summarise(answers, likelihoods, written), "not_scored": not_scored}
    scored = results["conditions"][ECG]["metrics"]
    if main_metric is not None and main_metric not in scored:
        logger.warning(
            "%s is not scored, so it is not the main metric: no type of question is such that it can be.", main_metric
        )
        not_scored.setdefault(main_metric, "No type of question is such that it can be.")
        main_metric = None
    results["main_metric"] = main_metric or ("auroc" if "auroc" in scored else "exact_match")
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
        if scorer.whole is not None:
            prediction["written"] = {"answer": scorer.whole[index]} | {
                name: texts[index] for name, texts in written.items()
            }
        predictions.append(prediction)
    return Results(results, predictions)


def output_folder(args: EvaluationArguments) -> Path:
    """The folder in which results go: that of --output_dir, of a local model, or ./evaluation."""
    own = Path(args.model_name_or_path)
    return Path(args.output_dir) if args.output_dir else own if own.is_dir() else Path("evaluation")


def place_of(args: EvaluationArguments, fingerprints: Sequence[str]) -> str:
    """The name by which an evaluation is told from others of the same model: `DATA-SPLIT-SCORE-8 hexadecimal digits`.

    Args:
        fingerprints: of all data that it is about. The digits stand for these, and for all options that change what is in the
            results.
    """
    names = [
        "score",
        "split",
        "fold",
        "seed",
        "conditions",
        "bert_score_model",
        "main_metric",
        "candidates",
        "batch_size",
    ]
    names += ["max_new_tokens", "generation", "dtype", "torch_compile", "system_prompt", "num_resamples", "data_subset"]
    settings = [getattr(args, name) for name in names]
    own = [file_of(metric).read_text(encoding="utf-8") for metric in args.metrics if is_path(metric)]
    digits = digest([settings, sorted(map(name_of, args.metrics)), own, list(fingerprints)])[:8]
    data = "+".join(re.sub(r"[^\w.-]+", "_", Path(name).name) for name in args.data)[:80]
    return f"{data}-{args.split}-{args.score}-{digits}"


def _require_free(path: Path, evaluation: str, revision: str | None = None) -> None:
    """ValueError if a file of results is of another evaluation than that which is about to write it."""
    if not path.is_file():
        return
    found = identity_of(path)
    if found.get("evaluation") == evaluation and (revision is None or found.get("model_revision") == revision):
        return
    what = "weights" if found.get("evaluation") == evaluation else "data or settings"
    raise ValueError(
        f"--output_dir {path.parent} holds the results of other {what} ({found.get('evaluation')}, model "
        f"{str(found.get('model_revision'))[:19]}), which are not overwritten: name another folder, or move them away."
    )


def _load_data(args: EvaluationArguments, fold: int | None) -> tuple[Dataset, Dataset | None, str]:
    """The scored and the training split, and the fingerprint of the first."""
    with PartialState().main_process_first():  # it fills the cache of `datasets`, which the others then read
        data = args.load(fold, args.split)
        training_data = None if args.split == "train" else args.load(fold, "train", data_subset=None)
    if data is None:
        raise ValueError(f"--data {' '.join(args.data)} has no split {args.split!r}.")
    questions = list_questions(data)
    if args.score == "likelihood":  # a ValueError tells of candidates that cannot be decided among
        training = [] if training_data is None else list_questions(training_data)
        candidate_answers(questions, training, args.candidates, "--")
    return data, training_data, _on_first(lambda: fingerprint_of(data, questions))


def _evaluate_fold(
    args: EvaluationArguments,
    fold: int | None,
    model: ELMForConditionalGeneration,
    processor: ELMProcessor,
    name: str,
    loaded: tuple[Dataset, Dataset | None, str],
    folder: Path,
    evaluation: str,
) -> list[Results]:
    """The results of each seed, written into `folder`."""
    state = PartialState()
    data, training_data, fingerprint = loaded
    place = folder_of(name, args.model_revision)
    revision = _on_first(lambda: digest_of_folder(place))
    folders = {seed: folder / f"seed{seed}" if len(args.seed) > 1 else folder for seed in args.seed}
    own = Path(args.model_name_or_path)
    if state.is_main_process:
        if args.output_dir:
            for path in folders.values():
                _require_free(path / RESULTS_FILE, evaluation, revision)
        else:
            for path in [own] if own.is_dir() else folders.values():
                move_old_results(path, keep=revision)
    state.wait_for_everyone()
    progress = Progress(folder, [SCHEMA_VERSION, args.torch_compile], state.process_index)
    runs = []
    for seed in args.seed:
        settings = {**vars(args), "seed": seed}
        results = _evaluate(
            model, processor, data, training_data, settings, progress, revision, fingerprint, prefix="--"
        )
        runs.append(results)
        if state.is_main_process:
            files = [path.relative_to(place).as_posix() for path in files_of_model(place)]
            results |= {"model": Path(name).name, "model_files": files, "evaluation": evaluation}
            results["data"] |= {"names": [Path(name).name for name in args.data], "split": args.split, "fold": fold}
            results["settings"] |= {"torch_compile": args.torch_compile, "data_subset": args.data_subset}
            explain = None
            if args.explain_examples and processor.takes_ecgs:
                explain = partial(explain_prediction, model, processor.with_system_prompt(args.system_prompt))
            _write(folders[seed], results, data, explain)
            if own.is_dir():
                add_evaluations(own, revision)
    return runs


def _write(folder: Path, results: Results, data: Dataset, explain: Callable[..., Any] | None) -> None:
    folder.mkdir(exist_ok=True)
    results.save(folder)
    write_report(folder / REPORT_FILE, results, results.predictions, data, explain=explain)
    print(f"Results, predictions and report in {folder.resolve()}")
    print(results["verdict"], flush=True)


def main(argv: list[str] | None = None) -> Results:
    """Returns the results of a single run, or the figures over several; on processes other than the first nothing."""
    args = parse(argv)
    load_metrics(args.metrics)  # what they lack should be known before the model is loaded
    if args.explain_examples:
        require_captum()
    state = PartialState(cpu=not torch.cuda.is_available())  # no MPS, which accelerate would take
    folds: list[int | None] = [None] if args.fold is None else [*args.fold]
    names = {fold: args.model_name_or_path.replace("{fold}", str(fold)) for fold in folds}
    check_output_folder(output_folder(args))
    for name in names.values():
        find_model_file(name, ["adapter_config.json", "config.json"], args.model_revision)
    loaded = {fold: _load_data(args, fold) for fold in folds}  # likewise before the model
    fingerprints = [fingerprint for _, _, fingerprint in loaded.values()]
    if len(set(fingerprints)) < len(folds) and len(set(names.values())) == 1:
        raise ValueError(
            f"--fold {' '.join(map(str, folds))}: some of these have the same rows in the split {args.split!r}, so they would be one run "
            "counted several times. Leave --fold out of data without folds."
        )
    # the baseline, and candidates for likelihoods, are from the training split
    training = [digest_of_questions(list_questions(rows)) for _, rows, _ in loaded.values() if rows is not None]
    evaluation = place_of(args, [*fingerprints, *training])
    folder = output_folder(args)
    if not args.output_dir:  # those of a model that is not here are told apart by its name too
        here = Path(args.model_name_or_path).is_dir()
        model_name = Path(args.model_name_or_path.replace("{fold}", "")).name
        folder = folder / EVALUATIONS / evaluation if here else folder / model_name / evaluation
    folders = {fold: folder / f"fold{fold}" if len(folds) > 1 else folder for fold in folds}
    if args.output_dir:
        _require_free(folder / SUMMARY_FILE, evaluation)
    if len(args.seed) > 1 and not args.samples:
        random = " and ".join(name for name in args.conditions if CONDITIONS[name].random)
        logger.warning(
            "Answers are not sampled, so that the seed changes %s: what it does not change is asked once, for %s.",
            f"only {random}" if random else "nothing",
            ", ".join(f"seed {seed}" for seed in args.seed),
        )
    runs: list[Results] = []
    model = processor = None
    for fold, name in names.items():
        if model is None or processor is None or name != args.model_name_or_path:  # else it is kept
            model, processor = load_elm(name, args.model_revision, args.trust_remote_code, dtype=args.dtype)
            model.to(state.device)  # type: ignore[arg-type]  # a wrapped method
            limit_threads(model, state.device)
            if args.torch_compile:
                # batches differ in length; the head is no part of it, as it computes in two ways
                model.model.compile(dynamic=True)
        runs += _evaluate_fold(args, fold, model, processor, name, loaded[fold], folders[fold], evaluation)
    if not state.is_main_process:
        return Results()
    # only now: an evaluation that is interrupted in a later fold keeps the answers of the earlier ones
    for fold_folder in folders.values():
        Progress(fold_folder, None).remove()  # facts do not matter here
    if len(runs) == 1:
        return runs[0]
    summary = Results({"evaluation": evaluation, **over_runs(runs, args.seed, args.samples)})
    write_json(folder / SUMMARY_FILE, summary)
    metric = summary["main_metric"]
    scale = scales_of(summary)[metric]
    for condition, metrics in summary["conditions"].items():
        row = metrics.get(metric)
        if row is None:  # undefined in every run
            continue
        spread = "" if row["std"] is None else f", standard deviation {scale.number(row['std'])}"
        mean = scale.with_unit(scale.number(row["mean"]))
        print(f"{condition}: {scale.title} {mean} over {counted(row['num_runs'], 'run')}{spread}")
    print(f"Figures over the runs in {(folder / SUMMARY_FILE).resolve()}. {summary['note']}")
    print(summary["verdict"], flush=True)
    return summary


if __name__ == "__main__":  # as `accelerate launch` and `torchrun` start it
    sys.exit(run_command("elm evaluate", main))
