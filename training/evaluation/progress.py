"""The answers of an evaluation so far, in files from which one that was interrupted goes on."""

import hashlib
import json
from pathlib import Path
from typing import Any

from accelerate import PartialState

from elm_ecg.training.evaluation.questions import digest
from elm_ecg.training.evaluation.results import PARTIAL
from elm_ecg.training.files import write_text


class Progress:
    """The answers so far in files of `folder`, from which an interrupted evaluation goes on.

    A file begins with a digest of all that answers depend on, and each of its lines with a digest of that and of itself: answers to
    anything else are never taken, nor what a full disk, a crash or an editor made of a line.

    Args:
        facts: on which the answers depend: digests of model and data, versions, and settings of the command; what JSON can hold.
        process: each of several processes writes its own file, and reads all.
    """

    def __init__(self, folder: Path, facts: Any, process: int = 0) -> None:
        self.folder, self.facts, self.key = folder, facts, ""
        self.path = folder / f"{PARTIAL}.{process}.jsonl"

    def begin(self, settings: Any) -> None:
        """Takes over what an interrupted evaluation with the same facts and settings left; other files are replaced."""
        self.key = digest([self.facts, settings])
        state = PartialState()
        self.folder.mkdir(parents=True, exist_ok=True)  # only now, as what is found wrong before should leave no folder
        with state.main_process_first():  # it takes over all files before the other processes replace theirs
            answers = self.read() if state.is_main_process else {}  # one process takes over all
            write_text(
                self.path, "".join([f"{self.key}\n", *(self._line(*place, answers[place]) for place in answers)])
            )

    def read(self) -> dict[tuple[str, int], list[Any]]:
        """Name of the questions and batch -> its answers. Lines that are not whole are left out: they are asked again."""
        done = {}
        for path in sorted(self.folder.glob(f"{PARTIAL}.*.jsonl")):
            head, *lines = path.read_bytes().split(b"\n")
            if head != self.key.encode():  # answers of another model, data or settings
                continue
            for line in lines:
                check, _, content = line.partition(b" ")
                if check == self._check(content):
                    name, batch, answers = json.loads(content)
                    done[name, batch] = answers
        return done

    def add(self, name: str, batch: int, answers: list[Any]) -> None:
        """Keeps the answers of a batch."""
        with self.path.open("a", encoding="utf-8") as file:  # closed after each batch, so a crash loses no other
            file.write("\n" + self._line(name, batch, answers))  # a line that was cut before does not spoil this one

    def remove(self) -> None:
        """Removes the files of all processes, as everything is answered."""
        for path in self.folder.glob(f"{PARTIAL}.*.jsonl"):
            path.unlink()

    def _check(self, content: bytes) -> bytes:
        return hashlib.sha256(self.key.encode() + content).hexdigest()[:16].encode()

    def _line(self, name: str, batch: int, answers: list[Any]) -> str:
        content = json.dumps([name, batch, answers])  # ASCII
        return f"{self._check(content.encode()).decode()} {content}\n"
