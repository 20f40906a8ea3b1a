"""Scores an ELM on the answers of a test split, with the ECG and without it: `elm evaluate MODEL --data ...`."""

import hashlib
import json
import logging
import statistics
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import evaluate
import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from scipy.stats import t as student_t
from transformers import GenerationConfig

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.arguments import DataArguments, ELMParser, json_fields
from elm_ecg.training.build import limit_threads, load_elm
from elm_ecg.training.data.loading import load_data
from elm_ecg.training.evaluation.answers import CONDITIONS, RANDOM_CONDITIONS, Answerer, Progress
from elm_ecg.training.evaluation.questions import (
    Question,
    candidate_answers,
    list_questions,
    most_frequent_answers,
    rows_to_swap,
)
from elm_ecg.training.evaluation.report import write_report
from elm_ecg.training.evaluation.scores import BASELINE, METRIC_NAMES, Scorer, in_words, load_metrics
from elm_ecg.training.files import write_text
from elm_ecg.training.sharing.cards import add_evaluation

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 3
PACKAGES = ("elm-ecg", "torch", "transformers", "accelerate", "datasets", "evaluate", "peft")
# fields of a generation config that would give other than one text to a prompt, or have an option of their own
NOT_GENERATION = (
    "max_new_tokens",
    "max_length",
    "num_return_sequences",
    "return_dict_in_generate",
    "cache_implementation",
)


@dataclass
class EvaluationArguments(DataArguments):
    """What is scored, and how."""

    model_name_or_path: str = field(
        default="",
        metadata={
            "help": "Saved ELM or LoRA adapter: local folder or Hub id; also the first argument. {fold} in it stands for the fold."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    split: str = field(default="test", metadata={"help": "Split of the data that is scored."})
    fold: list[int] | None = field(  # type: ignore[assignment]  # one of them, or several
        default=None,
        metadata={"help": "Folds of datasets that have splits such as fold1_train and fold1_test; each is a run."},
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the results go. Default: the model's folder, or ./evaluation."}
    )
    score: Literal["generation", "likelihood"] = field(
        default="generation",
        metadata={
            "help": "generation: what the model writes. likelihood: which of the candidate answers it finds likeliest, with the "
            "AUROC of their shares."
        },
    )
    candidates: list[str] | None = field(
        default=None,
        metadata={
            "help": "Answers that --score likelihood decides among. Default: those that a type of question has in the training "
            "and in the scored split."
        },
    )
    conditions: list[str] = field(
        default_factory=lambda: list(CONDITIONS),
        metadata={
            "choices": list(CONDITIONS),
            "help": "What is shown of the ECG; ecg, as recorded, is always among them.",
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Conversations answered at once."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer, in tokens."})
    generation_kwargs: str | None = field(
        default=None,
        metadata={"help": 'JSON with other options of `generate`, such as {"num_beams": 4}. Default: greedy decoding.'},
    )
    dtype: str = field(default="auto", metadata={"help": "Of the model: auto, float32, bfloat16 or float16."})
    torch_compile: bool = field(default=False, metadata={"help": "Compile the model with torch.compile."})
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that prepare datasets of the reference."}
    )
    seed: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Of noise, swapped ECGs, sampled answers and the bootstrap; of several, each is a run."},
    )
    num_resamples: int = field(default=2000, metadata={"help": "Bootstrap resamples of patients."})
    metrics: list[str] = field(
        default_factory=lambda: ["normalized_match", "token_f1", "closed_set"],
        metadata={
            "choices": METRIC_NAMES,
            "help": 'Scores beside exact match; bleu4, rouge_l, meteor and bert_score need `pip install "elm-ecg[metrics]"`.',
        },
    )
    bert_score_model: str | None = field(
        default=None, metadata={"help": "Encoder of bert_score that it knows, such as roberta-large."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "max_new_tokens", "num_resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1.")
        if "bert_score" in self.metrics and self.bert_score_model is None:
            raise ValueError(
                "--metrics bert_score compares what an encoder makes of the answers; name it with --bert_score_model."
            )
        for name in ("seed", "fold"):
            values = getattr(self, name) or []
            if len(set(values)) < len(values):
                raise ValueError(f"--{name} {' '.join(map(str, values))} names one twice.")
        if self.candidates and self.score != "likelihood":
            raise ValueError("--candidates are what --score likelihood decides among; add that, or leave them out.")
        self.generation = json_fields("generation_kwargs", self.generation_kwargs)
        unknown = [name for name in self.generation if name in NOT_GENERATION or not hasattr(GenerationConfig(), name)]
        if unknown:
            raise ValueError(
                f"--generation_kwargs has {', '.join(unknown)}; expected options of `generate` that leave one text to a question, "
                "and --max_new_tokens as an option of its own."
            )
        if self.generation and self.score == "likelihood":
            raise ValueError("--generation_kwargs with --score likelihood, which generates nothing; leave them out.")
        self.metrics = list(dict.fromkeys(["exact_match", *self.metrics]))
        self.conditions = [name for name in CONDITIONS if name == "ecg" or name in self.conditions]

    @property
    def samples(self) -> bool:
        """Whether answers are drawn at random."""
        return bool(self.generation.get("do_sample", False))

    def data_of(self, fold: int | None, **changes: Any) -> DataArguments:
        return DataArguments(
            **{f.name: getattr(self, f.name) for f in fields(DataArguments)} | {"fold": fold} | changes
        )


def revision_of(model: ELMForConditionalGeneration, name_or_path: str) -> str:
    """The commit of a model on the Hub, or a digest of the weights in a local folder."""
    if not Path(name_or_path).is_dir():
        return str(getattr(model.config, "_commit_hash", None))
    digest = hashlib.sha256()
    for path in sorted(Path(name_or_path).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def fingerprint_of(questions: list[Question]) -> str:
    return _digest([list(vars(question).values()) for question in questions])


def parse(argv: list[str] | None = None) -> EvaluationArguments:
    (args,) = ELMParser(EvaluationArguments, prog="elm evaluate").parse_args_and_config(argv)
    if not args.model_name_or_path:
        raise ValueError("Which model? Give its folder or Hub id as --model_name_or_path.")
    if args.perturb is not None:
        raise ValueError("Evaluation perturbs the ECG itself, in every way, next to the score; leave --perturb out.")
    return args


def output_folder(args: EvaluationArguments) -> Path:
    own = Path(args.model_name_or_path)
    return Path(args.output_dir) if args.output_dir else own if own.is_dir() else Path("evaluation")


@dataclass
class Fold:
    """All that is asked about one fold, or about data without folds."""

    args: EvaluationArguments
    number: int | None
    name_or_path: str
    model: ELMForConditionalGeneration
    processor: ELMProcessor
    folder: Path

    def __post_init__(self) -> None:
        args, state = self.args, PartialState()
        with state.main_process_first():
            data = load_data(args.data_of(self.number), args.split, args.seed[0], args.dataset_num_proc)
            train_data = load_data(
                args.data_of(self.number, data_subset=None), "train", args.seed[0], args.dataset_num_proc
            )
        if data is None:
            raise ValueError(f"--data {' '.join(args.data)} has no split {args.split!r}.")
        self.data: Dataset = data
        self.questions = list_questions(data)
        if not self.questions:
            raise ValueError(
                f"The split {args.split!r} of --data {' '.join(args.data)} has {len(data)} rows and no assistant turn to score."
            )
        self.training = [] if train_data is None or args.split == "train" else list_questions(train_data)
        self.candidates = None
        if args.score == "likelihood":
            self.candidates = candidate_answers(self.questions, self.training, args.candidates)
        self.revision = revision_of(self.model, self.name_or_path)
        facts = [
            SCHEMA_VERSION,
            self.revision,
            [args.dtype, args.torch_compile, args.system_prompt, args.batch_size],
            [args.max_new_tokens, args.generation, self.candidates],
            [args.data, args.ecg_root, fingerprint_of(self.questions)],
        ]
        self.progress = Progress(self.folder, _digest(facts), state.process_index)

    def run(self, seed: int, folder: Path, modules: dict[str, evaluate.Metric]) -> dict[str, Any]:
        """Asks everything with one seed, and on the main process scores the answers and writes the results to `folder`."""
        args = self.args
        not_scored: dict[str, str] = {}
        others = None
        if "swapped" in args.conditions:
            try:
                others = rows_to_swap(self.data, seed)
            except ValueError as error:
                not_scored["swapped"] = str(error)
        answerer = Answerer(
            self.model,
            self.processor,
            self.data,
            self.questions,
            candidates=self.candidates,
            batch_size=args.batch_size,
            generation={"max_new_tokens": args.max_new_tokens, **args.generation},
            system_prompt=args.system_prompt,
            seed=seed,
            others=others,
        )
        asked: dict[str, list[Any]] = {}
        for condition in args.conditions:
            if condition in not_scored:
                continue
            # what no seed changes is asked once for all of them
            name = f"{condition} {seed}" if args.samples or condition in RANDOM_CONDITIONS else condition
            found, reason = answerer.ask(condition, name, self.progress)
            if reason is None:
                asked[condition] = found
            else:
                not_scored[condition] = reason
        if not PartialState().is_main_process:
            return {}
        for condition, reason in not_scored.items():
            logger.warning("ECG %s: not scored. %s", CONDITIONS[condition], reason)
        likelihoods, answers = None, asked
        if self.candidates is not None:
            likelihoods = asked
            answers = {
                condition: [names[int(np.argmax(row))] for names, row in zip(self.candidates, rows, strict=True)]
                for condition, rows in asked.items()
            }
        if self.training:
            answers = {**answers, BASELINE: most_frequent_answers(self.questions, self.training)}
        options = {"bert_score": {"model": args.bert_score_model}}
        scorer = Scorer(self.questions, modules, args.num_resamples, seed, options, self.candidates)
        if "closed_set" in modules and not scorer.closed:
            not_scored["closed_set"] = "No type of question has a few different answers."
        results: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "model": Path(self.name_or_path).name,
            "model_revision": self.revision,
            "data": {
                "names": [Path(name).name for name in args.data],
                "split": args.split,
                "fold": self.number,
                "fingerprint": fingerprint_of(self.questions),
            },
            "settings": {
                "score": args.score,
                "generation": {"do_sample": False, "max_new_tokens": args.max_new_tokens, **args.generation},
                "candidates": args.candidates,
                "batch_size": args.batch_size,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "torch_compile": args.torch_compile,
                "system_prompt": args.system_prompt,
                "data_subset": args.data_subset,
                "seed": seed,
                "num_resamples": args.num_resamples,
            },
            "packages": {name: version(name) for name in PACKAGES},
            **scorer.summarise(answers, likelihoods),
            "not_scored": not_scored,
        }
        results["verdict"] = in_words(results)
        predictions = self._predictions(answers, likelihoods)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "evaluation_results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
        write_text(folder / "predictions.jsonl", lines)
        write_report(folder / "report.html", results, predictions, self.data)
        add_evaluation(folder, results)
        print(results["verdict"])
        print(f"Results, predictions and report in {folder.resolve()}", flush=True)
        return results

    def _predictions(
        self, answers: dict[str, list[str]], likelihoods: dict[str, list[list[float]]] | None
    ) -> list[dict[str, Any]]:
        """A line for each question."""
        records = self.data["record_id"][:] if "record_id" in self.data.column_names else [None] * len(self.data)
        predictions = []
        for index, question in enumerate(self.questions):
            line = {
                "row": question.row,
                "turn": question.turn,
                "record_id": records[question.row],
                "patient_id": question.patient_id,
                "question_type": question.question_type,
                "question": question.question,
                "answer": question.answer,
                **{condition: texts[index] for condition, texts in answers.items()},
            }
            if likelihoods is not None and self.candidates is not None:
                line["candidates"] = self.candidates[index]
                line["log_likelihoods"] = {condition: rows[index] for condition, rows in likelihoods.items()}
            predictions.append(line)
        return predictions


def over_runs(runs: list[dict[str, Any]], seeds: list[int], samples: bool) -> dict[str, Any]:
    """Mean, standard deviation and 95% t-interval of each score over the runs, folds times seeds.

    Where no seed changes the answers of a condition, its runs of one fold are the same one, and count once.
    """
    scores: dict[str, dict[str, Any]] = {}
    for condition in runs[0]["conditions"]:
        random = samples or condition in RANDOM_CONDITIONS
        counted = [run for run in runs if random or run["settings"]["seed"] == seeds[0]]
        for metric in runs[0]["conditions"][condition]["metrics"]:
            found = [run["conditions"].get(condition, {}).get("metrics", {}).get(metric, {}) for run in counted]
            values = [row["value"] for row in found if row.get("value") is not None]
            if not values:
                continue
            mean, row = statistics.fmean(values), scores.setdefault(condition, {})
            row[metric] = {"mean": mean, "std": None, "interval_95": None, "num_runs": len(values)}
            if len(values) > 1:
                deviation = statistics.stdev(values)
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


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Returns the results of a single run, of several the figures over them; on processes other than the first nothing."""
    args = parse(argv)
    modules = load_metrics(args.metrics)  # first, as what it lacks should be told before the answers are made
    state = PartialState(cpu=not torch.cuda.is_available())
    folder = output_folder(args)
    folds: list[int | None] = [None] if args.fold is None else [*args.fold]
    if len(args.seed) > 1 and not args.samples:
        logger.warning(
            "Nothing but noise and swapped ECGs depends on the seed, as answers are not sampled: the others are asked once, for %s.",
            ", ".join(f"seed {seed}" for seed in args.seed),
        )
    runs, progresses = [], []
    model = processor = None
    for number in folds:
        name = args.model_name_or_path.replace("{fold}", str(number))
        if model is None or processor is None or name != args.model_name_or_path:
            model, processor = load_elm(name, revision=args.model_revision, dtype=args.dtype)
            model.to(state.device)  # type: ignore[arg-type]  # a wrapped method
            limit_threads(model, state.device)
            model.eval()
            if args.torch_compile:
                model.compile(dynamic=True)
        of_fold = folder / f"fold{number}" if len(folds) > 1 else folder
        of_fold.mkdir(parents=True, exist_ok=True)
        fold = Fold(args, number, name, model, processor, of_fold)
        progresses.append(fold.progress)
        with state.main_process_first():  # it takes over what an interrupted evaluation left
            fold.progress.begin(fold.progress.read() if state.is_main_process else {})
        for seed in args.seed:
            runs.append(fold.run(seed, of_fold / f"seed{seed}" if len(args.seed) > 1 else of_fold, modules))
    if not state.is_main_process:
        return {}
    for progress in progresses:
        progress.remove()
    if len(runs) == 1:
        return runs[0]
    summary = over_runs(runs, args.seed, args.samples)
    write_text(folder / "evaluation_summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    for condition, metrics in summary["conditions"].items():
        row = metrics["exact_match"]
        spread = "" if row["std"] is None else f", standard deviation {100 * row['std']:.1f}"
        print(f"{condition}: exact match {100 * row['mean']:.1f}% over {row['num_runs']} runs{spread}")
    print(f"Figures over the runs in {(folder / 'evaluation_summary.json').resolve()}", flush=True)
    return summary


if __name__ == "__main__":
    main()
