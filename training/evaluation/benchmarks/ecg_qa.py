"""ECG-QA: questions about one ECG or two by 70 templates (Oh et al. 2023, NeurIPS Datasets and Benchmarks, arXiv:2306.15681).

An answer is a set of the template's answers, and it is right where the set is: the exact match accuracy of section 4.1 of version 3, "Evaluation
metrics", for each type of question as in section 4.4 and appendix C.2. Of a text, as that of a language model, the set is taken as in the authors'
own experiments with language models (section 4.3 and appendix C.1.3; `llm_modeling/llm_modeling.py` of https://github.com/Jwoo5/ecg-qa): all
answers of the template that are named in it, in lower case. Where they name options in the prompt, `--show_options` does. No answer at all is
the answer "none" of the authors' labels (README there, "Run QA Experiments"); of a text it has to be said. How it is computed is from their
code, as of the paper's text its contents and abstract were to be had.

Texts: the folder `ecgqa/ptbxl` or `ecgqa/mimic-iv-ecg` of that repository, or one below it such as `ecgqa/ptbxl/paraphrased`, or
files of the same rows. The template's answers are in `answers_for_each_template.csv`, in that folder or above it.
"""

import ast
import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from elm_ecg.training.data.questions import QuestionRow, read_questions
from elm_ecg.training.evaluation.benchmarks.chats import Chat, SuiteOptions, Turn
from elm_ecg.training.evaluation.benchmarks.records import RecordPlaces
from elm_ecg.training.evaluation.benchmarks.suite import Suite
from elm_ecg.training.evaluation.scale import MetricScale

NONE = "none"  # the answer where nothing of what is asked for is there
SEPARATOR = "; "  # of the parts of an answer, as `read_questions` joins them
CLASSES_FILE = "answers_for_each_template.csv"
LEVELS_ABOVE = 3  # folders above the texts in which that file is looked for


class ECGQA(Suite):
    """ECG-QA on PTB-XL or MIMIC-IV-ECG."""

    name, title = "ecg-qa", "ECG-QA"
    paper = "https://arxiv.org/abs/2306.15681"
    has_splits = True
    main_metric = "set_match"
    scales = {"set_match": MetricScale(title="exact match of answer sets")}

    def chats(self, place: Path | None, records: RecordPlaces, options: SuiteOptions) -> Iterator[Chat]:
        """A chat for each question; see `Suite.chats`."""
        assert place is not None
        classes = read_classes(place)
        rows: Iterable[QuestionRow] = _rows(place, options.split)
        if not classes:
            rows = list(rows)
            classes = classes_of(rows)
        for row in rows:
            question, answer = (turn["content"] for turn in row.messages)
            known = classes.get(_template(row))
            if known is None:
                raise ValueError(
                    f"--suite ecg-qa={place}: a question has template_id {_template(row)}, of which {CLASSES_FILE} says no answers; "
                    "give texts that go with it, or move it away."
                )
            kind = str(row.columns.get("question_type") or "all")
            yield Chat(row.records, (Turn(_asked(question, known, options), answer, kind, known),))

    def points(self, turns: Sequence[Turn], chats: Sequence[int], answers: Sequence[str]) -> dict[str, np.ndarray]:
        """Whether each set of answers is the right one."""
        finders = {options: named_in(options) for options in {turn.options for turn in turns}}
        right = [
            _as_set(turn.answer) == set(finders[turn.options].findall(answer.lower()))
            for turn, answer in zip(turns, answers, strict=True)
        ]
        return {"set_match": np.stack([np.array(right, dtype=float), np.ones(len(right))], axis=1)}


def _rows(place: Path, split: str) -> Iterator[QuestionRow]:
    files: list[Path] = [place]
    if place.is_dir():  # its tables of answers and of ECGs are no questions
        files = sorted(file for file in place.rglob("*.json*") if file.suffix in (".json", ".jsonl"))
    if not files:
        raise ValueError(
            f"--suite ecg-qa={place} holds no JSON; give the folder of ECG-QA's texts, such as ecgqa/ptbxl/template."
        )
    splits = set()
    found = False
    for file in files:
        folder_split = file.parent.name if file != place else None
        for row in read_questions(file):
            of_row = row.split or _SPLITS.get(folder_split or "")
            splits.add(of_row)
            if split == "all" or of_row == split:
                found = True
                yield row
    if not found:
        named = ", ".join(sorted(name or "no split" for name in splits))
        raise ValueError(f"--split {split}: the questions in {place} are of {named}; name one of these, or all.")


_SPLITS = {"train": "train", "valid": "validation", "test": "test"}  # folders of the repository


def _template(row: QuestionRow) -> int | None:
    return row.columns.get("template_id")


def _asked(question: str, known: Sequence[str], options: SuiteOptions) -> str:
    if not options.show_options:
        return question
    return f"{question}\nOptions: {', '.join(known)}\nAnswer with those of the options that apply, and nothing else."


def _as_set(answer: str) -> set[str]:
    return {part.strip().lower() for part in answer.split(SEPARATOR)}


def read_classes(place: Path) -> dict[int | None, tuple[str, ...]]:
    """The answers of each template, from `CLASSES_FILE` beside the texts or above them; none where it is not there.

    Raises:
        ValueError: the file is damaged.
    """
    folder = (place if place.is_dir() else place.parent).absolute()
    for parent in (folder, *folder.parents[:LEVELS_ABOVE]):
        file = parent / CLASSES_FILE
        if file.is_file():
            try:
                with file.open(newline="", encoding="utf-8") as table:
                    rows = list(csv.DictReader(table))
                return {int(row["template_id"]): tuple(map(str, ast.literal_eval(row["classes"]))) for row in rows}
            except (ValueError, SyntaxError, KeyError, TypeError, csv.Error) as error:
                raise ValueError(f"{file} is damaged ({error}); fetch it anew.") from error
    return {}


def classes_of(rows: Sequence[QuestionRow]) -> dict[int | None, tuple[str, ...]]:
    """The answers of each template that the questions have, and none: where no file says them."""
    found: Mapping[int | None, set[str]] = defaultdict(lambda: {NONE})
    for row in rows:
        found[_template(row)] |= _as_set(row.messages[-1]["content"])
    return {template: tuple(sorted(answers)) for template, answers in found.items()}


def named_in(options: Sequence[str]) -> re.Pattern[str]:
    """Finds the options in a text in lower case, as whole words; of those that begin alike the longest."""
    longest_first = sorted({*(option.lower() for option in options), NONE}, key=lambda text: (-len(text), text))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
