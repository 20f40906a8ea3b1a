"""Runs a model on published benchmarks, with the ECG and without it: `elm benchmark MODEL --suite NAME ...`."""

import logging
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download

from elm_ecg.training.command_line import printable, run_command
from elm_ecg.training.evaluation.benchmarks.arguments import make_parser, parse
from elm_ecg.training.evaluation.benchmarks.chats import SuiteOptions
from elm_ecg.training.evaluation.benchmarks.contenders import Contender, FittingAnswerer, open_contender
from elm_ecg.training.evaluation.benchmarks.ecg_grounding import ECGGrounding
from elm_ecg.training.evaluation.benchmarks.ecg_qa import ECGQA
from elm_ecg.training.evaluation.benchmarks.ecg_reasoning import ECGReasoning
from elm_ecg.training.evaluation.benchmarks.ecgbench import ECGBench
from elm_ecg.training.evaluation.benchmarks.endpoint import Endpoint
from elm_ecg.training.evaluation.benchmarks.judge import JUDGE_FILE, KEY_VARIABLE, Judge
from elm_ecg.training.evaluation.benchmarks.ptbxl import PTBXL
from elm_ecg.training.evaluation.benchmarks.records import Asked, make_rows, read_places
from elm_ecg.training.evaluation.benchmarks.suite import Suite, SuiteScorer
from elm_ecg.training.evaluation.benchmarks.tables import write_tables
from elm_ecg.training.evaluation.card import add_evaluations
from elm_ecg.training.evaluation.conditions import ASKED, ECG
from elm_ecg.training.evaluation.evaluate import ask_conditions, facts_of, summarise
from elm_ecg.training.evaluation.progress import Progress
from elm_ecg.training.evaluation.questions import digest, fingerprint_of, list_questions
from elm_ecg.training.evaluation.report import write_report
from elm_ecg.training.evaluation.results import (
    EVALUATIONS,
    REPORT_FILE,
    RESULTS_FILE,
    SCHEMA_VERSION,
    Results,
    identity_of,
    move_old_results,
    read_results,
)
from elm_ecg.training.evaluation.scores import load_metrics
from elm_ecg.training.files import check_output_folder

logger = logging.getLogger(__name__)

OF_THINKING = 512  # tokens in which a model may think, beside those of an answer
SUITES: dict[str, Suite] = {
    suite.name: suite for suite in (ECGQA(), ECGReasoning(), ECGBench(), ECGGrounding(), PTBXL())
}


def parser() -> ArgumentParser:
    """The options of `elm benchmark`."""
    return make_parser(SUITES)


def run_suite(
    args: Namespace, suite: Suite, asked: Asked, contender: Contender, folder: Path, fingerprint: str
) -> Results:
    """Asks the model all questions of a suite and scores its answers; on processes other than the first nothing.

    Args:
        fingerprint: of the questions, as `fingerprint_of` has it.
        folder: that keeps the answers so far.
    """
    questions = list_questions(asked.data)
    choices = [list(turn.options) for turn in asked.turns] if suite.score == "likelihood" else None
    needed = suite.max_new_tokens + (OF_THINKING if contender.thinks else 0)
    generation = {"do_sample": False, "max_new_tokens": args.max_new_tokens or needed}
    answerer = contender.make_answerer(asked.data, questions, choices, generation)
    progress = Progress(folder, [SCHEMA_VERSION, suite.name], PartialState().process_index)
    shown = [fingerprint, choices, args.batch_size, generation, contender.system_prompt]
    progress.begin([contender.revision, contender.dtype, type(answerer).__name__, args.describe, shown])
    conditions = [name for name in ASKED if name == ECG or name in args.conditions]
    answers, not_scored = ask_conditions(answerer, conditions, progress)
    if not PartialState().is_main_process:
        return Results()
    modules = load_metrics(["exact_match"])
    judge = _judge_of(args, suite, folder)
    scorer = SuiteScorer(
        questions,
        modules,
        args.num_resamples,
        args.seed,
        {},
        choices,
        [question.answer for question in questions] if contender.thinks else None,
        suite=suite,
        turns=asked.turns,
        chats=asked.chats,
        judge=judge,
    )
    settings = {**vars(args), "score": suite.score, "generation": generation, "candidates": None}
    settings |= {
        "dtype": contender.dtype,
        "system_prompt": contender.system_prompt,
        "explicit_thinking": contender.thinks,
    }
    facts = facts_of(contender.name, contender.revision, asked.data, fingerprint, [], settings)
    facts["data"] |= {"names": [suite.name], "split": args.split if suite.has_splits else None}
    facts["settings"] |= {"describe": args.describe, "show_options": args.show_options, "limit": args.limit}
    left_out = dict(asked.left_out)
    if isinstance(answerer, FittingAnswerer):
        left_out["questions too long for the model's context, which count as wrong"] = answerer.fits.count(False)
        logger.warning(
            "%s: %s of %s questions are too long for the model's context; they count as wrong.",
            suite.name,
            f"{answerer.fits.count(False):,}",
            f"{len(questions):,}",
        )
    facts["suite"] = {"name": suite.name, "title": suite.title, "paper": suite.paper, "left_out": left_out}
    results = summarise(answerer, scorer, answers, not_scored, [], facts, suite.main_metric)
    if judge is not None:
        results["suite"]["judge"] = judge.as_json()
        if judge.unread:
            logger.warning(
                "%s: %s replies of the judge have no score, and are left out.", suite.name, f"{len(judge.unread):,}"
            )
    points = scorer.points([row[ECG] for row in results.predictions])
    for place, row in enumerate(results.predictions):
        row["suite"] = {name: samples[place].tolist() for name, samples in points.items() if samples[place, 1]}
    return results


def _judge_of(args: Namespace, suite: Suite, folder: Path) -> Judge | None:
    """The judge of the command line, of a suite that has something to judge."""
    if args.judge_url is None or suite.judge_prompt is None:
        return None
    endpoint = Endpoint(args.judge_url, args.judge_model, "judge_url", KEY_VARIABLE)
    return Judge(endpoint, folder / JUDGE_FILE, suite.judge_prompt, suite.is_judged, suite.judged_share)


def _check_likelihoods(args: Namespace, contender: Contender, suites: Sequence[Suite]) -> None:
    """Refuses (ValueError) a suite that is decided by likelihood, of a model that does not tell them."""
    for suite in suites:
        if suite.score == "likelihood" and (contender.thinks or not contender.likelihoods):
            why = "thinks before it answers" if contender.thinks else "does not say"
            raise ValueError(
                f"--suite {suite.name} is decided by how likely a model finds its answers, and {args.model} {why}; leave the suite out."
            )


def _place_of(args: Namespace, suite: Suite, fingerprint: str) -> str:
    """The name by which results are told from others of the same model, as `elm evaluate` has it."""
    names = ["split", "show_options", "conditions", "describe", "endpoint", "limit", "batch_size", "max_new_tokens"]
    names += ["system_prompt", "dtype", "seed", "num_resamples", "judge_url", "judge_model"]
    digits = digest([*(getattr(args, name) for name in names), fingerprint])[:8]
    return f"{suite.name}-{args.split}-{suite.score}-{digits}"


def _own_folder(args: Namespace) -> Path | None:
    """The model's folder here; None of one on the Hub, or behind an endpoint, where a folder of that name is no affair of this run."""
    folder = Path(args.model)
    return folder if args.endpoint is None and folder.is_dir() else None


def _folder_of(args: Namespace, suite: Suite, place: str, revision: str) -> Path:
    if args.output_dir is None:
        own = _own_folder(args)
        return (own / EVALUATIONS if own is not None else Path(EVALUATIONS) / Path(args.model).name) / place
    folder = args.output_dir / suite.name
    found = identity_of(folder / RESULTS_FILE) if (folder / RESULTS_FILE).is_file() else None
    if found is not None and (found.get("evaluation"), found.get("model_revision")) != (place, revision):
        raise ValueError(
            f"--output_dir {args.output_dir} holds the results of another model, data or settings in {suite.name}, which are not overwritten: "
            "name another folder, or move them away."
        )
    return folder


def _others(args: Namespace, suite: Suite, results: Results) -> dict[Path, dict[str, Any]]:
    """The results of --beside that are of the same suite and questions, by their paths."""
    files = [folder / RESULTS_FILE for folder in args.beside]
    files += [folder / suite.name / RESULTS_FILE for folder in args.beside]
    found = {file.resolve(): read_results(file) for file in files if file.is_file()}
    same = {file: run for file, run in found.items() if run["data"]["fingerprint"] == results["data"]["fingerprint"]}
    if args.beside and not same:
        logger.warning("--beside: none of these folders holds results of %s about the same questions.", suite.name)
    return same


def _texts_of(suite: Suite, place: str | None) -> Path | None:
    if place is not None or suite.hub is None:
        return None if place is None else Path(place)
    return Path(snapshot_download(suite.hub, repo_type="dataset", allow_patterns=["*.json", "*.jsonl", "*.parquet"]))


def main(argv: Sequence[str] | None = None) -> dict[str, Results]:
    """Suite -> its results; on processes other than the first nothing."""
    args, chosen = parse(None if argv is None else list(argv), SUITES)
    state = PartialState(cpu=not torch.cuda.is_available())
    if args.output_dir is not None:
        check_output_folder(args.output_dir)
    for folder in args.beside:
        if not folder.is_dir():
            raise ValueError(f"--beside {folder}: there is no such folder.")
    places = read_places(args.records, args.metadata)
    options = SuiteOptions(args.split, args.show_options)
    everything: dict[str, Results] = {}
    with tempfile.TemporaryDirectory(prefix="elm-benchmark-") as temporary:
        asked: dict[str, Asked] = {}
        for name, place in chosen.items():  # all of them, before the model is loaded
            suite = SUITES[name]
            asked[name] = make_rows(
                suite.chats(_texts_of(suite, place), places, options), places, Path(temporary), args.limit, args.seed
            )
            if state.is_main_process:
                for what, number in asked[name].left_out.items():
                    logger.warning("%s: left out: %s (%s)", name, what, f"{number:,}")
        contender = open_contender(args)
        _check_likelihoods(args, contender, [SUITES[name] for name in asked])
        own = _own_folder(args) if args.output_dir is None else None
        if own is not None and state.is_main_process:
            move_old_results(own, keep=contender.revision)
        for name, of_suite in asked.items():
            suite = SUITES[name]
            fingerprint = fingerprint_of(of_suite.data, list_questions(of_suite.data))
            place_name = _place_of(args, suite, fingerprint)
            folder = _folder_of(args, suite, place_name, contender.revision)
            results = run_suite(args, suite, of_suite, contender, folder, fingerprint)
            if not state.is_main_process:
                continue
            results["evaluation"] = place_name
            results.save(folder)
            write_report(
                folder / REPORT_FILE, results, results.predictions, of_suite.data, f"{contender.name} on {suite.title}"
            )
            runs = {(folder / RESULTS_FILE).resolve(): results, **_others(args, suite, results)}
            print(printable(write_tables(folder, suite, runs)))
            print(f"Results, predictions, report and tables in {folder.resolve()}")
            print(results["verdict"], flush=True)
            Progress(folder, None).remove()
            if own is not None:
                add_evaluations(own, contender.revision)
            everything[name] = results
    return everything


if __name__ == "__main__":  # as `accelerate launch` and `torchrun` start it
    sys.exit(run_command("elm benchmark", main))
