"""What a dataset of chats about ECGs is made of: splits, roles, the Arrow types of its columns, and names of stored records."""

import re
from typing import Any

import numpy as np
import pyarrow as pa

SPLITS = ("train", "validation", "test")
ROLES = ("system", "user", "assistant")
LITERALS = ("noise", "flatline")  # in place of a file: the ECG is made when its row is read
MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
# microvolts as integers take half the space of floats, and are what most recorders store
ECG = pa.struct(
    {
        "array": pa.list_(pa.list_(pa.int16())),  # [leads][samples]
        "sampling_rate": pa.float32(),  # hertz; devices may have fractions
        "lead_names": pa.list_(pa.string()),
        "unit": pa.string(),
    }
)
# in files of records, lead after lead: lists in lists take longer to write and to read, and so do values that may be missing
STORED_ARRAY = pa.field("array", pa.list_(pa.field("element", pa.int16(), nullable=False)), nullable=False)
# Of a dataset that stores each record once: `data/train-00000-of-00002.parquet` has its rows, whose ECGs are named so that they
# read as paths in its folder
RECORDS = "records"
WORK = ".unfinished"  # the folder in it where a dataset is being built
STORED = re.compile(rf"(?P<file>{RECORDS}/[^/#]+\.parquet)#(?P<id>.+)", re.DOTALL)


def stored_name(part: str, record: str) -> str:
    """How rows name a stored record: `records/train-00000-of-00002.parquet#17`."""
    return f"{RECORDS}/{part}.parquet#{record}"


def as_list(value: Any) -> list[Any]:
    """The items of a list, tuple or array; any other value as the only item."""
    return list(value) if isinstance(value, list | tuple | np.ndarray) else [value]


def counted(number: int, noun: str) -> str:
    """A number of things: "1 row", "1,000 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
