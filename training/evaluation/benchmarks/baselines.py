"""Other people's models on the same questions: language models that are told the ECG in words, and models that are shown it drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from tqdm import tqdm

from elm_ecg.ecg_drawing import ECGPaper, draw_ecg, page_height, page_width
from elm_ecg.ecg_utils import ECGRecord, as_record
from elm_ecg.training.data.loading import ecgs_of, to_chat
from elm_ecg.training.evaluation.answers import Answerer
from elm_ecg.training.evaluation.benchmarks.measurements import in_words, measure
from elm_ecg.training.evaluation.conditions import CONDITIONS, Condition
from elm_ecg.training.evaluation.progress import Progress
from elm_ecg.training.evaluation.questions import Question, rows_to_swap

ORDINALS = ("first", "second", "third", "fourth", "fifth")
PICTURE_WIDTH = 1100  # pixels of a drawn ECG of 10 s, about 100 in an inch of paper
# a chat with parts of the types `text` and `image`, each with its content
Message = dict[str, Any]


def shown_records(
    data: Dataset, place: int, condition: Condition, others: np.ndarray | None, seed: int
) -> list[ECGRecord]:
    """The records of a row as a condition shows them; none where it leaves them out.

    Args:
        others: for each row the one whose ECGs are swapped in.
    """
    if not condition.shows_ecg:
        return []
    source = int(others[place]) if condition.swapped and others is not None else place
    records = [as_record(ecg) for ecg in ecgs_of(data[source])]
    if condition.change is None:
        return records
    # the same in whatever batch or process, as of `Answerer`
    rng = np.random.default_rng([seed, place])
    return [replace(record, array=condition.change(record.array, rng)) for record in records]


def described(records: Sequence[ECGRecord]) -> str:
    """What is measured on records, in words, a paragraph for each."""
    names = [
        f"The {ORDINALS[place]} ECG" if place < len(ORDINALS) else f"ECG {place + 1}" for place in range(len(records))
    ]
    names = names if len(records) > 1 else ["The ECG"]
    return "".join(f"{name}: {in_words(measure(record))}\n" for name, record in zip(names, records, strict=True))


def drawn(record: ECGRecord) -> Image.Image:
    """A record on ECG paper in the layout 3x4 of `elm plot`."""
    paper = ECGPaper(layout="3x4")
    seconds = record.array.shape[1] / record.sampling_rate
    height = round(PICTURE_WIDTH * page_height(paper, record.lead_names) / page_width(paper, seconds))
    return draw_ecg(record, height, PICTURE_WIDTH, paper)


class DescribingAnswerer(Answerer):
    """Asks a language model without ECGs, to which each ECG is told in words."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._said: dict[Any, str] = {}  # many rows are about one record

    def _row(self, place: int, condition: Condition) -> dict[str, Any]:
        row = self.data[place]
        if not condition.shows_ecg:
            return row
        source = int(self._others[place]) if condition.swapped and self._others is not None else place
        # random changes differ by row
        key = (
            condition.name,
            *map(str, ecgs_of(self.data[source])),
            place if condition.change and condition.random else None,
        )
        if key not in self._said:
            self._said[key] = described(shown_records(self.data, place, condition, self._others, self.seed))
        messages = [dict(message) for message in row["messages"]]
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = self._said[key] + first["content"]
        return {**row, "messages": messages}


@dataclass
class ChatAnswerer:
    """Asks a model that takes chats with pictures, each question after the right answers to those before it.

    Args:
        reply: gives the texts that the model writes to some chats.
        describe: tell the ECGs in words, in place of showing them.
        system_prompt: the first message of each chat; None or empty: there is none.
    """

    data: Dataset
    questions: list[Question]
    reply: Callable[[list[list[Message]]], list[str]]
    batch_size: int
    seed: int
    describe: bool = False
    system_prompt: str | None = None
    notices: dict[str, set[tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._shown: dict[tuple[str, int], list[Message]] = {}

    def ask(self, name: str, progress: Progress | None = None) -> tuple[list[str], str | None]:
        """The answers to all questions under a condition, or none and why; as `Answerer.ask`."""
        condition, others = CONDITIONS[name], None
        if condition.swapped:
            try:
                others = rows_to_swap(self.data, self.seed)
            except ValueError as error:
                return [], str(error)
        if condition.random:
            name = f"{name} {self.seed}"
        state = PartialState()
        starts = range(0, len(self.questions), self.batch_size)
        done = {} if progress is None else {start: row for (of, start), row in progress.read().items() if of == name}
        state.wait_for_everyone()
        mine = [start for start in starts if start not in done][state.process_index :: state.num_processes]
        answered: dict[int, list[str]] = {}
        bar = tqdm(total=len(self.questions), desc=condition.label, unit="answer", disable=not state.is_main_process)
        bar.update(sum(map(len, done.values())))
        with bar:
            for start in mine:
                asked = self.questions[start : start + self.batch_size]
                answered[start] = self.reply([self._chat(question, condition, others) for question in asked])
                if progress is not None:
                    progress.add(name, start, answered[start])
                bar.update(len(asked) * state.num_processes)
        for part in gather_object([answered]):
            done |= part
        return [answer for start in starts for answer in done[start]], None

    def _chat(self, question: Question, condition: Condition, others: np.ndarray | None) -> list[Message]:
        key = (condition.name, question.row)
        if key not in self._shown:  # the questions of a row follow each other
            records = shown_records(self.data, question.row, condition, others, self.seed)
            self._shown = {key: self._parts(records)}
        chat = to_chat(self.data[question.row], with_ecg=False)[: question.turn]
        first = next(message for message in chat if message["role"] == "user")
        first["content"] = [*self._shown[key], *first["content"]]
        system = [{"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}]
        return (system if self.system_prompt else []) + chat

    def _parts(self, records: Sequence[ECGRecord]) -> list[Message]:
        """The parts of a message that show records, or tell of them."""
        if self.describe and records:
            return [{"type": "text", "text": described(records)}]
        return [{"type": "image", "image": drawn(record)} for record in records]
