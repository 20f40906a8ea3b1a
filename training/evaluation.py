"""Scores an ELM on the answers of a test split, with the ECG and without it: `elm evaluate MODEL --data ...`."""

import hashlib
import json
import logging
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, List
from tqdm import tqdm

from ecg_utils import as_record
from modeling_elm import ELMForConditionalGeneration
from processing_elm import ELMProcessor
from training.arguments import DataArguments, ELMParser
from training.build import load_elm
from training.cards import add_evaluation
from training.data import ecgs_of, load_data, to_chat
from training.files import write_text
from training.plots import plot_exact_match

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
# what becomes of the ECG of each question
CONDITIONS = {
    "ecg": "as recorded",
    "zeroed": "every sample zero",
    "swapped": "another patient's",
    "left_out": "question alone",
}
BASELINE = "most_frequent"  # the answer that training data suggest without any model
METRICS = Path(__file__).parent / "metrics"  # modules of `evaluate`
PARTIAL = "predictions.partial"  # what is answered so far, a file for each process


@dataclass
class EvaluationArguments(DataArguments):
    """What is scored, and how."""

    model_name_or_path: str = field(
        default="", metadata={"help": "Saved ELM or LoRA adapter: local folder or Hub id; also the first argument."}
    )
    split: str = field(default="test", metadata={"help": "Split of the data that is scored."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where the results go. Default: the model's folder, or ./evaluation."}
    )
    batch_size: int = field(default=32, metadata={"help": "Answers generated at once."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer, in tokens."})
    dtype: str = field(default="auto", metadata={"help": "Of the model: auto, float32, bfloat16 or float16."})
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that prepare datasets of the reference."}
    )
    seed: int = field(default=0, metadata={"help": "Of the swapped ECGs and of the bootstrap."})
    num_resamples: int = field(default=2000, metadata={"help": "Bootstrap resamples of patients."})
    metrics: list[str] = field(
        default_factory=list,
        metadata={
            "choices": sorted(path.stem for path in METRICS.glob("*/*.py") if path.stem == path.parent.name),
            "help": 'Scores beside exact match; those of words need `pip install "elm-ecg[metrics]"`.',
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


@dataclass
class Question:
    """One assistant turn of a row: what was said before it and what it says."""

    row: int
    turn: int
    question: str
    answer: str
    question_type: str
    patient_id: str


def list_questions(data: Dataset) -> list[Question]:
    """Every assistant turn of the data.

    `question_type` of a row is one string or a list with one for each of its answers; a row without `patient_id` counts
    as a patient of its own, and one about the ECGs of several patients as of the first of them.
    """
    columns = [name for name in ("messages", "question_type") if name in data.column_names]
    patients = _patients(data)
    questions = []
    for index, row in enumerate(data.with_format(None).select_columns(columns)):
        kinds = row.get("question_type") or "all"
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if not row["messages"]:
            raise ValueError(f"Row {index} has no messages.")
        answered = sum(message["role"] == "assistant" for message in row["messages"])
        types = iter(kinds if len(kinds) == answered else kinds[:1] * answered)
        chat = [{**message, "content": _text(message["content"])} for message in row["messages"]]
        for turn, message in enumerate(chat):
            if message["role"] == "assistant":
                asked = chat[turn - 1]["content"] if turn else ""
                questions.append(
                    Question(index, turn, asked, message["content"].strip(), next(types), patients[index][0])
                )
    return questions


def most_frequent_answers(questions: list[Question], training: list[Question]) -> list[str]:
    """For each question the answer that the same words had most often in training; for words that were never asked that of
    questions of their type, or of all. Of answers that are as frequent it is the first in alphabetical order."""
    counts: dict[Any, Counter[str]] = defaultdict(Counter)
    for question in training:
        for key in ((question.question_type, question.question), question.question_type, None):
            counts[key][question.answer] += 1
    best = {key: min(found, key=lambda answer: (-found[answer], answer)) for key, found in counts.items()}
    keys = [((q.question_type, q.question), q.question_type, None) for q in questions]
    return [next(best[key] for key in places if key in best) for places in keys]


def _text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def other_patients(patients: list[tuple[str, ...]], seed: int) -> np.ndarray:
    """For each row, with the patients of its ECGs, the index of a row of other patients, each used about as often as any other."""
    order = np.random.default_rng(seed).permutation(len(patients))
    others = np.empty(len(patients), dtype=int)
    for place, row in enumerate(order):
        following = (order[(place + step) % len(order)] for step in range(1, len(order)))
        other = next((other for other in following if not set(patients[other]) & set(patients[row])), None)
        if other is None:
            raise ValueError(
                f"All {len(patients)} rows have an ECG of the patients {', '.join(patients[row])}: no other ECG to swap in."
            )
        others[row] = other
    return others


def rows_to_swap(data: Dataset, seed: int) -> np.ndarray:
    """For each row the index of the one whose ECGs are swapped in: of other patients, and as many; of rows without ECG itself.

    Raises:
        ValueError: a row has no such other.
    """
    others = np.arange(len(data))
    patients, num_ecgs = _patients(data), _num_ecgs(data)
    for number in set(num_ecgs.tolist()) - {0}:
        rows = np.flatnonzero(num_ecgs == number)
        others[rows] = rows[other_patients([patients[row] for row in rows], seed)]
    return others


class Progress:
    """The answers so far in files of `folder`, from which an interrupted evaluation goes on.

    Args:
        key: of all that the answers depend on; files of another one are replaced.
        process: each of several processes writes its own file, and reads all.
    """

    def __init__(self, folder: Path, key: str, process: int = 0) -> None:
        self.folder, self.key = folder, key
        self.path = folder / f"{PARTIAL}.{process}.jsonl"

    def read(self) -> dict[tuple[str, int], list[str]]:
        """Condition and batch -> its answers. A line that was being written when the process ended is left out."""
        done = {}
        for path in sorted(self.folder.glob(f"{PARTIAL}.*.jsonl")):
            head, *lines = path.read_text(encoding="utf-8").split("\n")
            if head != self.key:
                continue
            for line in lines[:-1]:  # what follows the last line end is nothing, or cut
                condition, batch, answers = json.loads(line)
                done[condition, batch] = answers
        return done

    def begin(self, done: dict[tuple[str, int], list[str]]) -> None:
        """A file that holds `done`, whole lines all."""
        write_text(self.path, "".join([f"{self.key}\n", *(self._line(*place, done[place]) for place in done)]))

    def add(self, condition: str, batch: int, answers: list[str]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(condition, batch, answers))

    def remove(self) -> None:
        for path in self.folder.glob(f"{PARTIAL}.*.jsonl"):
            path.unlink()

    @staticmethod
    def _line(condition: str, batch: int, answers: list[str]) -> str:
        return json.dumps([condition, batch, answers]) + "\n"


@torch.inference_mode()
def answer_questions(
    model: ELMForConditionalGeneration,
    processor: ELMProcessor,
    data: Dataset,
    questions: list[Question],
    condition: str,
    args: EvaluationArguments,
    progress: Progress | None = None,
) -> list[str]:
    """The model's answer to every question, from the gold history before it; of several processes each gives its share of them.

    The batches are the same whatever the number of processes, and where an interrupted evaluation goes on: so are the answers.
    """
    swapped = condition == "swapped" and processor.takes_ecgs
    others = rows_to_swap(data, args.seed) if swapped else np.arange(len(data))
    # chats of about one length share a batch, so little of it is padding
    order = sorted(range(len(questions)), key=lambda i: (questions[i].turn, len(questions[i].question), i))
    batches = [order[start : start + args.batch_size] for start in range(0, len(order), args.batch_size)]
    state = PartialState()
    done = (
        {}
        if progress is None
        else {batch: texts for (name, batch), texts in progress.read().items() if name == condition}
    )
    state.wait_for_everyone()  # nobody adds to a file that another one reads
    mine = [batch for batch in range(len(batches)) if batch not in done][state.process_index :: state.num_processes]
    found: dict[int, list[str]] = {}
    bar = tqdm(
        total=len(questions), desc=f"ECG {CONDITIONS[condition]}", unit="answer", disable=not state.is_main_process
    )
    bar.update(sum(map(len, done.values())))
    with bar:
        for batch in mine:
            found[batch] = _answer(
                model, processor, data, [questions[i] for i in batches[batch]], condition, args, others
            )
            if progress is not None:
                progress.add(condition, batch, found[batch])
            bar.update(len(found[batch]) * state.num_processes)
    for part in gather_object([found]):
        done |= part
    answers = [""] * len(questions)
    for batch, indices in enumerate(batches):
        for index, text in zip(indices, done[batch], strict=True):
            answers[index] = text
    return answers


def _answer(
    model: ELMForConditionalGeneration,
    processor: ELMProcessor,
    data: Dataset,
    questions: list[Question],
    condition: str,
    args: EvaluationArguments,
    others: np.ndarray,
) -> list[str]:
    with_ecg = condition != "left_out" and processor.takes_ecgs
    chats = []
    for question in questions:
        row = data[question.row]
        if others[question.row] != question.row:
            row = {**row, "ecg": data[int(others[question.row])]["ecg"]}
        if condition == "zeroed" and with_ecg:
            records = [as_record(ecg) for ecg in ecgs_of(row)]
            row = {**row, "ecg": [replace(record, array=np.zeros_like(record.array)) for record in records]}
        turn = question.turn - len(row["messages"])  # from the end: a system prompt may come first
        chats.append(to_chat(row, args.system_prompt, with_ecg)[:turn])
    inputs: Any = processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    inputs = inputs.to(model.device)
    output: Any = model.generate(  # type: ignore[misc]  # wants attributes that no model declares
        **inputs,
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,  # some language models ask for one, which is not greedy
    )
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]


def _patients(data: Dataset) -> list[tuple[str, ...]]:
    """The patients of each row's ECGs."""
    patients = data["patient_id"] if "patient_id" in data.column_names else [None] * len(data)
    several = [patient if isinstance(patient, list) else [patient] for patient in patients]
    named = [tuple(str(patient) for patient in group if patient not in (None, "")) for group in several]
    return [names or (f"row {row}",) for row, names in enumerate(named)]


def _num_ecgs(data: Dataset) -> np.ndarray:
    if "ecg" not in data.column_names:
        return np.zeros(len(data), dtype=int)
    tables = data.select_columns("ecg").with_format("arrow").iter(1000)
    columns = [table["ecg"] for table in tables]
    if isinstance(data.features["ecg"], List):
        return np.concatenate([pc.list_value_length(column).fill_null(0) for column in columns])
    return np.concatenate([pc.is_valid(column) for column in columns]).astype(int)


def bootstrap_interval(
    values: np.ndarray, patients: list[str], num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of the mean of `values`, resampling patients (their questions are not independent).

    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    _, cluster = np.unique(patients, return_inverse=True)
    counts, sums = np.bincount(cluster), np.bincount(cluster, weights=values)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=num_resamples)
    low, high = np.quantile(draws @ sums / (draws @ counts), [0.025, 0.975])
    return float(low), float(high)


def summarise(
    questions: list[Question], answers: dict[str, list[str]], num_resamples: int, seed: int
) -> dict[str, Any]:
    """Exact match of each condition, over all and by question type, and what is lost without the ECG."""
    patients = [question.patient_id for question in questions]
    kinds = np.array([question.question_type for question in questions])
    correct = {
        condition: np.array([given == q.answer for given, q in zip(texts, questions, strict=True)], dtype=float)
        for condition, texts in answers.items()
    }
    conditions = {}
    for condition, scores in correct.items():
        low, high = bootstrap_interval(scores, patients, num_resamples, seed)
        conditions[condition] = {
            "exact_match": float(scores.mean()),
            "interval_95": [low, high],
            "by_question_type": {str(kind): float(scores[kinds == kind].mean()) for kind in np.unique(kinds)},
        }
    differences = {}
    for condition in [name for name in correct if name != "ecg"]:
        lost = correct["ecg"] - correct[condition]
        low, high = bootstrap_interval(lost, patients, num_resamples, seed)
        differences[condition] = {"difference": float(lost.mean()), "interval_95": [low, high]}
    return {
        "num_questions": len(questions),
        "num_patients": len(set(patients)),
        "questions_by_type": {str(kind): int((kinds == kind).sum()) for kind in np.unique(kinds)},
        "conditions": conditions,
        "ecg_minus": differences,
    }


def add_metrics(
    results: dict[str, Any],
    questions: list[Question],
    answers: dict[str, list[str]],
    modules: dict[str, evaluate.Metric],
    args: EvaluationArguments,
) -> None:
    """Writes what each of `modules` says of each condition into `results`."""
    references = [question.answer for question in questions]
    for name, module in modules.items():
        options = {"model": args.bert_score_model} if name == "bert_score" else {}
        for condition, texts in answers.items():
            scores = module.compute(predictions=texts, references=references, **options)
            found = {key: value for key, value in scores.items() if key != "samples"}
            results["conditions"][condition].setdefault("metrics", {})[name] = found


def in_words(results: dict[str, Any]) -> str:
    """One line that says whether the model looks at the ECG."""
    score = results["conditions"]["ecg"]["exact_match"]
    worst = min(results["ecg_minus"].values(), key=lambda row: row["interval_95"][0])
    verdict = (
        "better than without the ECG: the model looks at it"
        if worst["interval_95"][0] > 0
        else "not shown to be better than without the ECG: the model may not look at it"
    )
    losses = ", ".join(
        f"{100 * row['difference']:+.1f} [{100 * row['interval_95'][0]:.1f}, {100 * row['interval_95'][1]:.1f}] over {name}"
        for name, row in results["ecg_minus"].items()
    )
    return f"Exact match {100 * score:.1f}% ({losses} points), {verdict}."


def _key(args: EvaluationArguments, model: ELMForConditionalGeneration, questions: list[Question]) -> str:
    """A digest of what the answers depend on."""
    weights = sorted(Path(args.model_name_or_path).rglob("*.safetensors"))
    facts = {
        "model": [args.model_name_or_path, getattr(model.config, "_commit_hash", None), args.dtype],
        "weights": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in weights],
        "data": [
            args.data,
            args.data_weights,
            args.data_subset,
            args.split,
            args.fold,
            args.ecg_root,
            args.system_prompt,
        ],
        "settings": [args.batch_size, args.max_new_tokens, args.seed],
        "questions": [list(vars(question).values()) for question in questions],
    }
    return _digest(facts)


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def parse(argv: list[str] | None = None) -> EvaluationArguments:
    (args,) = ELMParser(EvaluationArguments, prog="elm evaluate").parse_args_and_config(argv)
    if not args.model_name_or_path:
        raise ValueError("Which model? Give its folder or Hub id as --model_name_or_path.")
    if args.perturb is not None:
        raise ValueError("Evaluation perturbs the ECG itself, in every way, next to the score; leave --perturb out.")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    state = PartialState(cpu=not torch.cuda.is_available())
    model, processor = load_elm(args.model_name_or_path, dtype=args.dtype)
    model.to(state.device)  # type: ignore[arg-type]  # a wrapped method
    model.eval()
    with state.main_process_first():
        data = load_data(args, args.split, args.seed, args.dataset_num_proc)
    if data is None:
        raise ValueError(f"--data {' '.join(args.data)} has no split {args.split!r}.")
    folder = Path(args.output_dir or args.model_name_or_path)
    if args.output_dir is None and not folder.is_dir():
        folder = Path("evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    questions = list_questions(data)
    progress = Progress(folder, _key(args, model, questions), state.process_index)
    with state.main_process_first():  # it takes over what an interrupted evaluation left
        progress.begin(progress.read() if state.is_main_process else {})
    # now, as a library or WordNet that is not there should be told before the answers
    modules = {name: evaluate.load(str(METRICS / name), keep_in_memory=True) for name in args.metrics}
    conditions = list(CONDITIONS)
    try:
        rows_to_swap(data, args.seed)
    except ValueError as error:
        logger.warning("ECGs are not swapped: %s", error)
        conditions.remove("swapped")
    answers = {
        condition: answer_questions(model, processor, data, questions, condition, args, progress)
        for condition in conditions
    }
    if not state.is_main_process:
        return {}
    train_data = load_data(replace(args, data_subset=None), "train", args.seed, args.dataset_num_proc)
    asked = [] if train_data is None or args.split == "train" else list_questions(train_data)
    if asked:
        answers[BASELINE] = most_frequent_answers(questions, asked)
    results = {
        "schema_version": SCHEMA_VERSION,
        "model": Path(args.model_name_or_path).name,
        "data": {
            "names": [Path(name).name for name in args.data],
            "split": args.split,
            "fold": args.fold,
            "fingerprint": _digest([list(vars(question).values()) for question in questions]),
        },
        "settings": {
            "decoding": "greedy",
            "max_new_tokens": args.max_new_tokens,
            "seed": args.seed,
            "num_resamples": args.num_resamples,
        },
        **summarise(questions, answers, args.num_resamples, args.seed),
    }
    add_metrics(results, questions, answers, modules, args)
    write_text(folder / "evaluation_results.json", json.dumps(results, indent=2) + "\n")
    records = data["record_id"][:] if "record_id" in data.column_names else [None] * len(data)
    predictions = [
        {
            "row": question.row,
            "turn": question.turn,
            "record_id": records[question.row],
            "patient_id": question.patient_id,
            "question_type": question.question_type,
            "question": question.question,
            "answer": question.answer,
            **{condition: texts[index] for condition, texts in answers.items()},
        }
        for index, question in enumerate(questions)
    ]
    write_text(folder / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions))
    plot_exact_match(results, folder / "exact_match.png")
    add_evaluation(folder, results)
    progress.remove()
    print(in_words(results))
    print(f"Results, predictions and plot in {folder.resolve()}", flush=True)
    return results


if __name__ == "__main__":
    main()
