"""Which files the rows of a dataset may name: those of one folder. A dataset of a stranger may name any file of this machine."""

import os
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any

import pyarrow as pa

from elm_ecg.ecg_formats import record_path
from elm_ecg.training.data.schema import LITERALS, STORED

_SEGMENT = re.compile(r"(.+)#segment=(\d+),(\d+)", re.DOTALL)


def segment_location(path: str, index: int, num_samples: int) -> str:
    """The place of one segment of a record, as a text that a row can hold.

    Args:
        path: of the record, as `read_ecg` takes it.
        index: of the segment, from 0; they follow each other without overlap.
        num_samples: of a segment, at the sampling rate of the reference's datasets.
    """
    return f"{path}#segment={index},{num_samples}"


def split_segment(location: str) -> tuple[str, int, int] | None:
    """Path, index and number of samples of what `segment_location` wrote; None for any other path."""
    match = _SEGMENT.fullmatch(location)
    return match and (match[1], int(match[2]), int(match[3]))


def file_of(location: str) -> str:
    """The file that a location is in, without the record or segment of it that it names."""
    if stored := STORED.search(location):
        return location[: stored.end("file")]
    segment = split_segment(location)
    return str(record_path(segment[0] if segment else location)[0])


class LazyECG(Mapping[str, Any]):
    """An ECG that lies somewhere, as a dict of it that `as_record` takes: what is there is read when the dict is looked into.

    Args:
        location: by which two are equal.
    """

    def __init__(self, location: str) -> None:
        self.location = location

    @abstractmethod
    def read(self) -> dict[str, Any]:
        """`array` [leads, samples], `sampling_rate`, `lead_names` and `unit`."""

    @cached_property
    def _members(self) -> dict[str, Any]:
        return self.read()

    def __str__(self) -> str:
        return self.location

    def __hash__(self) -> int:
        return hash(self.location)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LazyECG) and self.location == other.location

    def __getitem__(self, name: str) -> Any:
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


def confined(path: str, root: str | None) -> str:
    """The path of an ECG that a row names, if the file is in the folder `root` or below it, links followed.

    Args:
        path: relative to `root`, or absolute.
        root: None where no folder is known, so that no file may be read.

    Raises:
        ValueError: the file is elsewhere.
    """
    if root is None:
        raise ValueError(f"The ECG is the file {path!r}; say under which folder such files are with --ecg_root.")
    whole = os.path.join(root, path)  # an absolute path stays what it is
    file = file_of(whole) if "#" in path else whole
    target, folder = os.path.realpath(file), _real(root)
    if os.path.commonpath((folder, target)) != folder:
        leads_to = "" if target == file else f", which leads to {target}"
        raise ValueError(
            f"The ECG is the file {path!r}{leads_to}, outside of {root}: no other files are read. Name the folder that holds it "
            "with --ecg_root, if you trust the dataset."
        )
    return whole


@lru_cache
def _real(root: str) -> str:
    return os.path.realpath(root)


def confined_rows(table: pa.Table, indices: list[int], root: str | None, stored: str | None = None) -> pa.Table:
    """The rows with the paths of their column `ecg` as `confined` gives them; ValueError, which names the row, if one is elsewhere.

    Args:
        root: as of `confined`.
        stored: the folder or address that stored records are in, with what separates it from their files.

    Tables keep their types: of rows, a stream would guess those of a few anew, null where none of them has an ECG.
    """

    def place(ecg: Any) -> Any:
        if isinstance(ecg, dict) and ecg.get("path") is not None:
            return {**ecg, "path": place(ecg["path"])}
        if isinstance(ecg, str) and stored is not None and STORED.fullmatch(ecg):
            return f"{stored}{ecg}"
        return confined(ecg, root) if isinstance(ecg, str) and ecg not in LITERALS else ecg

    column = table.schema.get_field_index("ecg")
    rows = table["ecg"].to_pylist()
    for number, ecg in enumerate(rows):
        try:
            rows[number] = [place(one) for one in ecg] if isinstance(ecg, list) else place(ecg)
        except ValueError as error:
            raise ValueError(f"Row {indices[number]}: {error}") from error
    return table.set_column(column, "ecg", pa.array(rows, table.schema.field(column).type))
