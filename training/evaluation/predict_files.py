"""What `elm predict` writes: parts that a run which goes on finds again, and of all of them one file.

A part is a Parquet file that is whole or not there. The file that is made of them is the same whichever process wrote a part, and
whether the run was interrupted.
"""

import csv
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from elm_ecg.training.files import UNFINISHED, atomic_path, write_text

KEY_FILE = "key.txt"
Tables = Callable[[], Iterator[pa.Table]]  # reads the parts, one after the other
ANSWER_SCHEMA = pa.schema(
    {
        "record": pa.string(),
        "question": pa.string(),
        "answer": pa.string(),
        "shares": pa.list_(pa.float64()),  # of the candidates
        "notices": pa.list_(pa.string()),
        "error": pa.string(),
    }
)
FEATURE_SCHEMA = pa.schema(
    {
        "record": pa.string(),
        "question": pa.string(),
        "features": pa.list_(pa.float32()),
        "notices": pa.list_(pa.string()),
        "error": pa.string(),
    }
)


class Parts:
    """The parts of an output file, in the folder `OUTPUT.unfinished` beside it.

    Args:
        output: the file that is made in the end.
        key: a digest of all that its content depends on.
        number: of parts.
    """

    def __init__(self, output: Path, key: str, number: int) -> None:
        self.output, self.key, self.number = output, key, number
        self.folder = output.with_name(output.name + UNFINISHED)

    def begin(self) -> None:
        """Makes the folder, or takes over what an interrupted run of the same command left.

        Raises:
            ValueError: another command left it.
        """
        self.folder.mkdir(exist_ok=True)
        path = self.folder / KEY_FILE
        if not path.is_file():
            write_text(path, self.key)
        elif path.read_text(encoding="utf-8") != self.key:
            raise ValueError(
                f"{self.folder} is what another command left unfinished: other records, questions, weights, settings or versions. Repeat "
                "that command, name another --output, or remove the folder."
            )

    def path(self, part: int) -> Path:
        """Where a part is."""
        return self.folder / f"part-{part:06d}.parquet"

    def missing(self) -> list[int]:
        """The parts that are not there."""
        return [part for part in range(self.number) if not self.path(part).is_file()]

    def write(self, part: int, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
        """Writes a part; what a row lacks is null."""
        with atomic_path(self.path(part)) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema), temporary)

    def tables(self) -> Iterator[pa.Table]:
        """The parts, one after the other."""
        for part in range(self.number):
            yield pq.read_table(self.path(part))

    def finish(self, candidates: Sequence[str] | None) -> None:
        """Makes the output of the parts, and removes them."""
        write = {".jsonl": _write_json_lines, ".csv": _write_csv, ".npz": _write_npz, ".parquet": _write_parquet}
        with atomic_path(self.output) as temporary:
            write[self.output.suffix.lower()](temporary, self.tables, candidates)
        self.remove()

    def remove(self) -> None:
        """Removes the parts."""
        shutil.rmtree(self.folder)


def _write_json_lines(path: Path, tables: Tables, candidates: Sequence[str] | None) -> None:
    with path.open("w", encoding="utf-8") as file:
        for table in tables():
            for row in table.to_pylist():
                if row["shares"] is not None and candidates is not None:
                    row["shares"] = dict(zip(candidates, row["shares"], strict=True))
                line = {name: value for name, value in row.items() if value not in (None, [])}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _write_csv(path: Path, tables: Tables, candidates: Sequence[str] | None) -> None:
    names = candidates or []
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["record", "question", "answer", *(f"share of {name}" for name in names), "notices", "error"])
        for table in tables():
            for row in table.to_pylist():
                shares = row["shares"] or [None] * len(names)
                notices = " ".join(row["notices"] or ())
                lines.writerow([row["record"], row["question"], row["answer"], *shares, notices, row["error"]])


def _write_parquet(path: Path, tables: Tables, candidates: Sequence[str] | None) -> None:
    with pq.ParquetWriter(path, FEATURE_SCHEMA) as file:
        for table in tables():
            file.write_table(table)


def _write_npz(path: Path, tables: Tables, candidates: Sequence[str] | None) -> None:
    """`features` float32 [rows, width], NaN where there are none, and `record`, `question` and `error`, texts [rows]."""
    columns = ("record", "question", "error")
    texts = {name: [text for table in tables() for text in table[name].to_pylist()] for name in columns}
    if not any(texts["question"]):  # of an encoder alone
        del texts["question"]
    # list_value_length of a null is null
    width = max((pc.max(pc.list_value_length(table["features"])).as_py() or 0 for table in tables()), default=0)
    with zipfile.ZipFile(path, "w") as archive:

        def member(name: str) -> Any:
            # ZipInfo without a time: the same content is the same file
            return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)

        with member("features") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(texts["record"]), width)}
            np.lib.format.write_array_header_1_0(file, header)
            for table in tables():
                rows = [[np.nan] * width if row is None else row for row in table["features"].to_pylist()]
                file.write(np.asarray(rows, "<f4").tobytes())
        for name, values in texts.items():
            with member(name) as file:
                np.lib.format.write_array(file, np.array([value or "" for value in values], dtype=str))
