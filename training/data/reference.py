"""The Hub datasets of the reference system: their keys, and their rows as chats."""

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from elm_ecg.training.data.reference_files import ReferenceFiles
from elm_ecg.training.data.schema import LITERALS, MESSAGES, ROLES

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

OWNER = "willxxy"
# family of datasets, with one dataset for each length of the ECGs (in samples at 250 Hz) -> its description
_BY_LENGTH = {
    "ecg-qa-ptbxl": "ECG-QA questions about PTB-XL",
    "ecg-qa-mimic-iv-ecg": "ECG-QA questions about MIMIC-IV-ECG",
    "pretrain-mimic": "texts about MIMIC-IV-ECG, for pretraining",
    "ecg-instruct-45k": "instructions of ECG-Instruct 45k",
    "ecg-instruct-pulse": "instructions of PULSE, ECGInstruct",
    "ecg-bench-pulse": "benchmark of PULSE, ECGBench",
}
# key, in which * stands for any suffix -> its description
DATASETS = {
    **{f"{name}-250-{length}": text for name, text in _BY_LENGTH.items() for length in (500, 1250, 2500)},
    "ecg-grounding-250-2500": "findings with their evidence, ECG-Grounding",
    "ecg-comp-*": "closed questions, scored by class",
    "ecg-comprehension-*": "comprehension of ECGs",
    "ecg-qa-cot": "ECG-QA with chains of thought",
    "base-ecg-r1": "ECG-R1, base",
    "rl-ecg-r1": "ECG-R1, reinforcement learning",
    "ecg-instruct-ecg-r1": "ECG-R1, instructions",
}
# of the rows that are made of those of its datasets
_SCHEMA = pa.schema(
    {
        "messages": MESSAGES,
        **dict.fromkeys(("ecg", "record_id", "patient_id", "question_type"), pa.string()),
        "num_samples": pa.int32(),
    }
)
# as the turns of its chats spell the roles, in small letters
ROLE_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant", **{role: role for role in ROLES}}


def is_key(name: str) -> bool:
    """Whether `name` is a key of the reference's datasets."""
    return any(fnmatchcase(name, pattern) for pattern in DATASETS)


def is_reference(data: "Dataset | IterableDataset") -> bool:
    """Whether a dataset has the columns of the reference's."""
    return {"text", "ecg_path"} <= set(data.column_names or []) and "messages" not in data.column_names


# where a text has the ECG, with the white space that follows
PLACEHOLDER = re.compile(r"<\s*(?:ecg|image)\s*>\s*", re.IGNORECASE)
# what a text may begin with, once or more often: the role of the one who speaks, or a colon that is left of it
# (white space stands in one place between two words, or a text of blanks would take time with its square)
_SPEAKER = re.compile(rf"\s*(?:(?:(?:{'|'.join([*ROLE_NAMES, 'q', 'a'])})\s*)?:\s*)+", re.IGNORECASE)


def clean(text: str) -> str:
    """Text as the reference has it: without `<ecg>` and `<image>` and the white space after them, without "user:", "Q:" and the like at
    its beginning, and with the word signal for the word image, but not for images.

    Other white space round the text stays, such as a line break before a removed tag.
    """
    text = PLACEHOLDER.sub("", text)  # `to_chat` puts the ECG in
    text = text[match.end() :] if (match := _SPEAKER.match(text)) else text
    # "IMAGE" becomes "Signal" there too
    return re.sub(r"\b(i)mage\b", lambda image: "Signal" if image[1] == "I" else "signal", text, flags=re.IGNORECASE)


def to_messages(text: str) -> tuple[list[dict[str, str]], str | None]:
    """The chat that the column `text` holds as JSON, and the type of its question where it says so.

    It is a list of turns with `from` and `value`, or with `role` and `content`; the triple [type, question, answers] of
    ECG-QA, whose answers are joined with "; "; or a bare string, which becomes the answer to an ECG without words.

    Raises:
        ValueError: it is none of these.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = text  # plain text, no JSON: an answer as it stands
    except RecursionError:
        content = None  # lists in lists in lists, as no chat has
    if isinstance(content, str):
        return _chat([("user", ""), ("assistant", content)]), None
    match content:
        case [str(question_type), str(question), answers] if isinstance(answers, str | list):
            answer = answers if isinstance(answers, str) else "; ".join(map(str, answers))  # `set_f1` parts them again
            return _chat([("user", question), ("assistant", answer)]), question_type
        case [dict(), *_] if all(isinstance(turn, dict) for turn in content):
            turns = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in content]
            if all(str(role).lower() in ROLE_NAMES and isinstance(words, str) for role, words in turns):
                return _chat([(ROLE_NAMES[role.lower()], words) for role, words in turns]), None
    raise ValueError(
        f"The text {text[:200]!r} is no chat; expected JSON of turns with 'from' ({', '.join(ROLE_NAMES)}) and 'value', of turns "
        "with 'role' and 'content', [type, question, answers], or a string."
    )


def _chat(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": clean(words)} for role, words in turns]


def from_reference(
    data: "Dataset | IterableDataset", name: str, ecg_root: str | None, num_proc: int | None = None
) -> "Dataset | IterableDataset":
    """Rows with `messages`, `ecg`, `record_id`, `patient_id` and `question_type`, of rows with `text`, `ecg_path` and `name`.

    The `ecg` is `noise` or `flatline`, the path of a file below `ecg_root`, or where that is not there the segment of the record that it
    was made of, in a download below `ecg_root` (see `reference_files`). The patient is that of the record, None where nothing tells.

    Raises:
        ValueError: there are paths, but no `ecg_root`, or they lead out of it; a text is no chat.
        FileNotFoundError: an ECG is not there; of a stream the first one.
    """
    from datasets import Dataset, Features  # seconds to import, which `to_messages` does not need

    column = data.select_columns("ecg_path")
    path = next((row["ecg_path"] for row in column if row["ecg_path"] not in (None, *LITERALS)), None)
    if path is not None and ecg_root is None:
        raise ValueError(
            f"{name} names its ECGs as files, such as {path!r}; say under which folder they are with --ecg_root."
        )
    files = ReferenceFiles(ecg_root or "")
    if path is not None:
        # a stream is not read twice: its first path stands for all of them
        files.check(name, _counted_paths(column) if isinstance(data, Dataset) else [(path, 1)])
    length = re.search(r"-250-(\d+)$", name)  # the keys end in rate and samples
    num_samples = int(length.group(1)) if length else 2500  # at 250 Hz
    map_options: dict[str, Any] = {
        "batched": True,
        "with_indices": True,
        "remove_columns": data.column_names,
        "features": Features.from_arrow_schema(_SCHEMA),
        "fn_kwargs": {"files": files, "num_samples": num_samples},
    }
    if isinstance(data, Dataset):  # streamed ones show no progress and have no processes
        map_options |= {"num_proc": num_proc, "desc": f"chats of {name}"}
    return data.with_format("arrow").map(_from_rows, **map_options).with_format(None)


def _counted_paths(column: "Dataset") -> Iterator[tuple[str, int]]:
    """Each different path of a dataset of one column, and how many rows have it."""
    counts = pc.value_counts(column.with_format("arrow")[:]["ecg_path"])
    for start in range(0, len(counts), 10_000):  # as Python's objects, all at once would take much memory
        for count in counts[start : start + 10_000].to_pylist():
            yield count["values"], count["counts"]


def _from_rows(table: pa.Table, indices: list[int], files: ReferenceFiles, num_samples: int) -> pa.Table:
    """Rows as of `from_reference`. Tables keep their types: of rows, a stream would guess those of a few, null where no patient is known."""
    rows = []
    for row, index in zip(table.to_pylist(), indices, strict=True):
        path = row["ecg_path"]
        literal = path in LITERALS  # each row has a recording of its own
        try:
            if path is None or row["text"] is None:
                raise ValueError("It has no ecg_path or no text; expected a path, noise or flatline, and a chat.")
            messages, question_type = to_messages(row["text"])
            ecg, patient = (path, None) if literal else files.locate(path)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"Row {index}: {error}") from error
        rows.append(
            {
                "messages": messages,
                "ecg": ecg,
                "record_id": f"{path} {index}" if literal else path,
                "patient_id": patient,
                "question_type": question_type or row.get("name") or "all",
                "num_samples": num_samples,  # of `noise` and `flatline`
            }
        )
    return pa.Table.from_pylist(rows, _SCHEMA)
