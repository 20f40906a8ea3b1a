"""What an ELM answers about any number of ECGs, or holds of them: `elm predict MODEL RECORD ... --question TEXT`."""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import zip_longest
from typing import Any

import torch
from accelerate import PartialState
from scipy.special import softmax
from tqdm import tqdm

from elm_ecg.chat_template_elm import THINK_OPEN
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.command_line import printable, run_command
from elm_ecg.training.data.schema import counted
from elm_ecg.training.digest import digest_of_folder, folder_of
from elm_ecg.training.evaluation.answers import Answerer, NotFiniteError
from elm_ecg.training.evaluation.conditions import CONDITIONS, ECG
from elm_ecg.training.evaluation.predict_arguments import parse
from elm_ecg.training.evaluation.predict_features import check_features, features_of
from elm_ecg.training.evaluation.predict_files import ANSWER_SCHEMA, FEATURE_SCHEMA, Parts
from elm_ecg.training.evaluation.predict_records import (
    ReadRecord,
    Row,
    Rows,
    read_questions,
    read_record,
    rows_of_data,
    rows_of_files,
)
from elm_ecg.training.evaluation.questions import Question, digest
from elm_ecg.training.load import limit_threads, load_elm
from elm_ecg.training.model_files import find_model_file

logger = logging.getLogger(__name__)

BATCHES = 8  # of a part: little is done again after an interruption, and rows of about one length share a batch
PACKAGES = ("elm-ecg", "torch", "transformers", "numpy", "scipy")


@dataclass
class Predictor:
    """Asks an ELM about rows of records.

    Args:
        candidates: answers to choose from by likelihood; None: the model writes its answers.
        features: one of `FEATURES` in place of answers.
        generation: options of `generate`.
        seed: of sampled answers.
    """

    model: ELMForConditionalGeneration
    processor: ELMProcessor
    candidates: list[str] | None
    features: str | None
    batch_size: int
    generation: dict[str, Any]
    seed: int

    def lines(self, part: int, rows: list[Row], read: dict[int, ReadRecord]) -> list[dict[str, Any]]:
        """What is written about the rows of a part: a line for each turn that is asked for.

        Args:
            part: its number, by which what is random is drawn.
            read: the records of the rows, by their numbers.
        """
        lines: list[dict[str, Any]] = []
        questions: list[tuple[Question, dict[str, Any]]] = []
        chats: list[dict[str, Any]] = []
        for row in rows:
            record = read[row.number]
            error = record.error or self._fault(row, record)
            of_row = [
                {"record": row.record, "question": _question(row, turn), "notices": record.notices}
                for turn in row.turns
            ]
            if error is None:
                asked = [Question(len(chats), turn, _question(row, turn), "", "", "") for turn in row.turns]
                questions += [(question, line) for question, line in zip(asked, of_row, strict=True)]
                chats.append({"messages": row.messages, "ecg": record.ecgs, "record_id": str(row.number)})
            else:
                for line in of_row:
                    line["error"] = error
            lines += of_row
        if questions:
            self._fill(part, chats, questions)
        return lines

    def _fault(self, row: Row, record: ReadRecord) -> str | None:
        """Why a row cannot be asked, though its record was read."""
        if self.features in ("encoder", "connector") and len(record.ecgs) != 1:
            return f"The row has {counted(len(record.ecgs), 'ECG')}; features are of one."
        return None

    def _fill(self, part: int, chats: list[dict[str, Any]], questions: list[tuple[Question, dict[str, Any]]]) -> None:
        """Writes answers or features into the lines of the questions, or why there are none."""
        candidates = None if self.candidates is None else [self.candidates] * len(questions)
        asked = [question for question, _ in questions]
        options = (candidates, self.batch_size, self.generation, self.seed)
        answerer = Answerer(self.model, self.processor, chats, asked, *options)  # type: ignore[arg-type]  # rows in memory
        for place, batch in enumerate(answerer.batches):
            for indices, values in self._answered(answerer, batch, part * BATCHES + place):
                for index, value in zip(indices, values, strict=True):
                    questions[index][1].update(value)

    def _answered(
        self, answerer: Answerer, batch: list[list[int]], number: int
    ) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
        """Indices of questions, and what is written about them. Where a row of the batch is at fault, each is asked by itself."""
        try:
            yield [index for row in batch for index in row], self._values(answerer, batch, number)
        except NotFiniteError:
            raise
        except ValueError as error:
            if len(batch) == 1:
                yield batch[0], [{"error": " ".join(str(error).split())}] * len(batch[0])
                return
            for row in batch:
                yield from self._answered(answerer, [row], number)

    def _values(self, answerer: Answerer, batch: list[list[int]], number: int) -> list[dict[str, Any]]:
        if self.features is not None:
            return [{"features": row} for row in features_of(answerer, batch, self.features)]
        answers = answerer.answer_batch(batch, CONDITIONS[ECG], number)
        if self.candidates is None:
            return [{"answer": answer} for answer in answers]
        shares = softmax(answers, axis=1)
        return [{"answer": self.candidates[row.argmax()], "shares": row.tolist()} for row in shares]


def _question(row: Row, turn: int) -> str:
    """What is asked before a turn."""
    content = row.messages[turn - 1]["content"] if turn else ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def predict(predictor: Predictor, rows: Rows, parts: Parts, size: int) -> None:
    """Writes the parts that are missing; of several processes each its share of them.

    Args:
        size: rows of a part.
    """
    state = PartialState()
    missing = parts.missing()
    mine = missing[state.process_index :: state.num_processes]
    schema = ANSWER_SCHEMA if predictor.features is None else FEATURE_SCHEMA
    known: dict[Any, list[str]] = {}

    def read(part: int) -> tuple[list[Row], dict[int, ReadRecord]]:
        places = range(part * size, min((part + 1) * size, rows.number))
        of_part = [rows.row(place) for place in places]
        numbers = dict.fromkeys(row.number for row in of_part)  # a record is read once for all questions about it
        return of_part, {
            number: read_record(rows, number, predictor.processor.feature_extractor, known) for number in numbers
        }

    bar = tqdm(total=rows.number, desc="Predicting", unit="row", disable=not state.is_main_process)
    bar.update(rows.number - sum(min(size, rows.number - part * size) for part in missing))
    # the next part is read while the model works on this one
    with bar, ThreadPoolExecutor(1) as reader:
        following = reader.submit(read, mine[0]) if mine else None
        for part, after in zip_longest(mine, mine[1:]):  # none is left of a run that ended before its file was made
            assert following is not None
            of_part, records = following.result()
            following = None if after is None else reader.submit(read, after)
            with torch.inference_mode():
                parts.write(part, predictor.lines(part, of_part, records), schema)
            bar.update(min(len(of_part) * state.num_processes, rows.number - int(bar.n)))  # the others are about as far
    state.wait_for_everyone()


def _rows(args: argparse.Namespace) -> Rows:
    """What the command line asks."""
    from elm_ecg.training.arguments import DataArguments  # imports TRL, which takes seconds

    questions: list[tuple[str | None, str]] = [(None, text) for text in args.question or ()]
    if args.questions is not None:
        questions = read_questions(args.questions)
    elif args.features in ("encoder", "connector"):
        questions = [(None, "")]
    if args.records:
        described = {name: getattr(args, name) for name in ("sampling_rate", "lead_names", "unit")}
        return rows_of_files(args.records, questions, described)
    data = DataArguments(data=args.data, fold=args.fold, ecg_root=args.ecg_root)
    with PartialState().main_process_first():  # it fills the cache of `datasets`, which the others then read
        return rows_of_data(data, args.split, questions)


def _told(parts: Parts, num_records: int, features: bool) -> str:
    """How many answers there are, and how many lines have none; each distinct notice is logged once, with its lines.

    Raises:
        ValueError: no line has any; nothing stays of the parts.
    """
    lines = faults = 0
    first = None
    notices: Counter[str] = Counter()
    for table in parts.tables():
        notices.update(notice for of_line in table["notices"].to_pylist() for notice in of_line or ())
        errors = table["error"].drop_null()
        lines, faults = lines + len(table), faults + len(errors)
        first = first or (errors[0].as_py() if len(errors) else None)
    records = counted(num_records, "record")
    if lines == faults:
        parts.remove()
        raise ValueError(f"There is no answer about any of {records}, and nothing is written; the first error: {first}")
    for notice, number in notices.items():
        logger.warning("%s (%s)", printable(notice), counted(number, "line"))
    told = f"{counted(lines - faults, 'vector' if features else 'answer')} about {records}"
    return told if not faults else f"{told}; {counted(faults, 'line')} without, as `error` there says: {first}"


def main(argv: list[str] | None = None) -> None:
    """Asks, and writes the file."""
    args = parse(argv)
    state = PartialState(cpu=not torch.cuda.is_available())  # no MPS, which accelerate would take
    find_model_file(args.model, ["adapter_config.json", "config.json"], args.revision)
    rows = _rows(args)
    if not rows.number:
        raise ValueError("There is nothing to ask: no record has a question.")
    model, processor = load_elm(args.model, args.revision, args.trust_remote_code, dtype=args.dtype)
    model.to(state.device).eval()  # type: ignore[arg-type]  # a wrapped method
    limit_threads(model, state.device)
    if not processor.takes_ecgs:
        raise ValueError(f"The model {args.model} is text-only: it takes no ECG.")
    said = next((answer for answer in args.candidates or () if not answer.startswith(THINK_OPEN)), None)
    if processor.explicit_thinking and said is not None:
        raise ValueError(
            f"--candidates {said!r} does not begin with <think> and a new line, with which {args.model} begins each answer; leave --candidates out."
        )
    if args.features is not None:
        check_features(model, args.features)
    if args.truncation is not None:
        processor.feature_extractor.truncation = args.truncation
    processor = processor.with_system_prompt(args.system_prompt)
    generation = {"max_new_tokens": args.max_new_tokens, **args.generation}
    settings: list[Any] = [args.candidates, args.features, args.batch_size, generation, args.seed]
    # all that a line depends on; the content of the files counts by their size and time, as reading takes long
    facts = [
        digest_of_folder(folder_of(args.model, args.revision)),
        processor.system_prompt,
        processor.feature_extractor.truncation,
        str(model.dtype),
        rows.facts,
    ]
    device = [state.device.type, getattr(model.config, "_attn_implementation", None), *map(version, PACKAGES)]
    size = args.batch_size * BATCHES
    parts = Parts(args.output, digest([facts, device, settings]), -(-rows.number // size))
    if state.is_main_process:
        parts.begin()
    state.wait_for_everyone()
    predict(Predictor(model, processor, *settings), rows, parts, size)
    if state.is_main_process:
        told = _told(parts, rows.num_records, args.features is not None)
        parts.finish(args.candidates)
        print(printable(f"{told.removesuffix('.')}. In {args.output.resolve()}"), flush=True)


if __name__ == "__main__":  # as `accelerate launch` and `torchrun` start it
    sys.exit(run_command("elm predict", main))
