"""The Hub datasets of the reference system: their keys, and their rows as chats."""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from elm_ecg.training.data.paths import confined
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
SAMPLING_RATE = 250  # hertz; the 250 of the keys
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
    """Rows with `messages`, `ecg` (the path of a file, or `noise` or `flatline`), `record_id` and `question_type`, of rows with
    `text`, `ecg_path` and `name`.

    Raises:
        ValueError: there are paths, but no `ecg_root`, or they lead out of it; a text is no chat.
        FileNotFoundError: the first file is not under `ecg_root`.
    """
    from datasets import Dataset, Features  # seconds to import, which `to_messages` does not need

    path = next((row["ecg_path"] for row in data.select_columns("ecg_path") if row["ecg_path"] not in LITERALS), None)
    if path is not None and ecg_root is None:
        raise ValueError(
            f"{name} names its ECGs as files, such as {path!r}; say under which folder they are with --ecg_root."
        )
    if path is not None and not (Path(ecg_root or "") / path).is_file():  # one file stands for all of them
        raise FileNotFoundError(f"{name} has the ECG {path!r}, but there is no such file under --ecg_root {ecg_root}.")
    length = re.search(r"-250-(\d+)$", name)  # the keys end in rate and samples
    num_samples = int(length.group(1)) if length else 2500  # at 250 Hz
    names = {"record_id": pa.string(), "question_type": pa.string(), "num_samples": pa.int32()}
    features = Features.from_arrow_schema(pa.schema({"messages": MESSAGES, "ecg": pa.string(), **names}))
    map_options: dict[str, Any] = {"fn_kwargs": {"root": ecg_root, "num_samples": num_samples}}
    if isinstance(data, Dataset):  # streamed ones show no progress and have no processes
        map_options |= {"num_proc": num_proc, "desc": f"chats of {name}"}
    return data.map(_from_row, with_indices=True, remove_columns=data.column_names, features=features, **map_options)


def _from_row(row: dict[str, Any], index: int, root: str | None, num_samples: int) -> dict[str, Any]:
    path = row["ecg_path"]
    literal = path in LITERALS  # each row has a recording of its own
    try:
        messages, question_type = to_messages(row["text"])
        ecg = path if literal else confined(path, root)
    except ValueError as error:
        raise ValueError(f"Row {index}: {error}") from error
    return {
        "messages": messages,
        "ecg": ecg,
        "record_id": f"{path} {index}" if literal else path,
        "question_type": question_type or row.get("name") or "all",
        "num_samples": num_samples,  # of `noise` and `flatline`
    }
