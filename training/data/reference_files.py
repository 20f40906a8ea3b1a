"""The ECGs that the reference's datasets name: `.npy` files as it made them, or segments of the recordings that these were made of."""

import hashlib
import math
import os
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from elm_ecg.ecg_utils import read_ecg
from elm_ecg.training.data.downloads import DOWNLOADS, Found, code_exams, find_downloads, read_rows
from elm_ecg.training.data.paths import LazyECG, confined, file_of, segment_location, split_segment
from elm_ecg.training.data.schema import LITERALS
from elm_ecg.training.data.tables import identifier

SAMPLING_RATE = 250  # hertz, of all of the reference's ECGs
# .../SET/preprocessed_SAMPLES/NAME_INDEX.npy
_ECG_PATH = re.compile(r"(?:.*/)?([^/]+)/preprocessed_(\d+)/([^/]+)_(\d+)\.npy")
# how the sets call their records
_PTBXL_NAME = re.compile(r"(records(?:100|500))_(\d+)_((\d+)_[lh]r)")
_MIMIC_NAME = re.compile(r"files_(p\d+)_p(\d+)_(s\d+)_(\d+)")


class Segment(LazyECG):
    """A segment of a record; `location` is as of `segment_location`."""

    def read(self) -> dict[str, Any]:
        """Its file, cut."""
        path, index, num_samples = split_segment(self.location) or (self.location, 0, 0)
        record = read_ecg(path)
        total = math.floor(record.array.shape[1] * SAMPLING_RATE / record.sampling_rate)
        start, end = index * num_samples, (index + 1) * num_samples
        if not start < end <= total:
            raise ValueError(
                f"{path} has {total} samples at {SAMPLING_RATE} Hz, and the row names segment {index}, counted from 0, of "
                f"{num_samples} samples: the record is another one than that of the dataset, or shorter."
            )
        array = _interpolated(record.array, total, start, end)
        members = {"array": array, "sampling_rate": SAMPLING_RATE, "lead_names": record.lead_names}
        return {**members, "unit": "mV", "metadata": dict(record.metadata)}


class ECGFile(NamedTuple):
    """Where an ECG is.

    Args:
        location: a file, or the segment of a record; None where there is none.
        patient: who was recorded; None where nothing tells.
        wanted: what was looked for beside a file of its own.
    """

    location: str | None = None
    patient: str | None = None
    wanted: str = ""


class ReferenceFiles:
    """The files below `--ecg_root`: folders are listed, and tables are read, when a row needs them first.

    Args:
        root: the folder of `--ecg_root`.
        digest: of all that `check` found. It is in the pickle, by which `datasets` knows whether it has made the same rows before.
    """

    def __init__(self, root: str, digest: str = "") -> None:
        self.root = root
        self.digest = digest
        # folder -> its files, and whether they are links
        self._folders: dict[str, dict[str, bool]] = {}
        self._of_sets = {
            "ptb_xl": self._ptbxl_file,
            "mimic_iv": self._mimic_file,
            "code15": self._code_file,
            "cpsc": self._header_file,
            "csn": self._csn_file,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return ReferenceFiles, (self.root, self.digest)

    @cached_property
    def _found(self) -> Found:
        # absolute, as `confined` puts the root before other paths
        return find_downloads(Path(os.path.abspath(self.root)))

    @cached_property
    def _ptbxl_patients(self) -> dict[str, str]:
        root = self._found.roots.get("ptb-xl")
        rows = read_rows(root / "ptbxl_database.csv", "ecg_id", "patient_id") if root else ()
        return {identifier(record): identifier(patient) for record, patient in rows if patient}

    @cached_property
    def _code_exams(self) -> dict[str, tuple[str, str]]:
        root = self._found.roots.get("code-15")
        return {exam: (patient, location) for exam, patient, location in (code_exams(root) if root else ())}

    def check(self, name: str, paths: Iterable[tuple[str, int]]) -> None:
        """Looks for all ECGs of a dataset.

        Args:
            name: of the dataset.
            paths: each different `ecg_path`, and how many rows name it.

        Raises:
            FileNotFoundError: an ECG is not there.
        """
        digest = hashlib.sha256()
        rows, missing, first = 0, 0, None
        for path, count in paths:
            rows += count
            if path in (None, *LITERALS):
                continue
            try:
                file = self._find(path)
            except ValueError:
                # `locate` raises it for the row, whose number is known there
                return
            digest.update(repr(file).encode())
            # files of their own were listed, of records only the place is known
            if file.location is None or (file.wanted and not os.path.isfile(file_of(file.location))):
                missing += count
                first = first or (path, file)
        if first is not None:
            raise FileNotFoundError(
                f"{name} has {self._missing(*first)} It is so for {missing:,} of the {rows:,} rows that were looked at."
            )
        self.digest = digest.hexdigest()

    def locate(self, path: str) -> tuple[str, str | None]:
        """Where the ECG of an `ecg_path` is, as `_resolved` reads it, and its patient, None where that is unknown.

        Raises:
            ValueError: the path leads out of the root, or a table of a download is damaged.
            FileNotFoundError: the ECG is not there, as far as that is known without a look at its file.
        """
        file = self._find(path)
        if file.location is None:
            raise FileNotFoundError(f"It has {self._missing(path, file)}")
        return confined(file.location, self.root) if file.wanted else file.location, file.patient

    def _missing(self, path: str, file: ECGFile) -> str:
        nor = f", nor {file.wanted}" if file.wanted else ""
        return f"the ECG {path!r}, but there is no such file under --ecg_root {self.root}{nor} (links that lead out of it are not followed)."

    def _find(self, path: str) -> ECGFile:
        """The file of an `ecg_path` where that is there, else the place of its segment, whether that is there or not."""
        match = _ECG_PATH.fullmatch(path)
        of_set = self._of_sets.get(match[1]) if match else None
        record = of_set(match[3]) if match and of_set else ECGFile()
        folder, name = os.path.split(path)
        if folder not in self._folders:
            self._folders[folder] = _files_in(os.path.dirname(confined(path, self.root)))
        is_link = self._folders[folder].get(name)
        if is_link is not None:
            whole = confined(path, self.root) if is_link else os.path.join(self.root, path)
            return ECGFile(whole, record.patient)
        if record.location is None or match is None:
            return record
        return record._replace(location=segment_location(record.location, int(match[4]), int(match[2])))

    def _ptbxl_file(self, name: str) -> ECGFile:
        parts = _PTBXL_NAME.fullmatch(name)
        if parts is None:
            return ECGFile()
        rate, thousand, file, number = parts.groups()
        return self._in_download("ptb-xl", f"{rate}/{thousand}/{file}.hea", self._ptbxl_patients.get(str(int(number))))

    def _mimic_file(self, name: str) -> ECGFile:
        parts = _MIMIC_NAME.fullmatch(name)
        if parts is None:
            return ECGFile()
        group, patient, study, file = parts.groups()
        return self._in_download("mimic-iv-ecg", f"files/{group}/p{patient}/{study}/{file}.hea", patient)

    def _in_download(self, source: str, file: str, patient: str | None) -> ECGFile:
        root, download = self._found.roots.get(source), DOWNLOADS[source]
        if root is None:
            return ECGFile(
                None, patient, f"a folder with {download.markers[0]} of {download.title}, which has the record"
            )
        return ECGFile(f"{root}/{file}", patient, f"{file} in {root}")

    def _code_file(self, name: str) -> ECGFile:
        patient, location = self._code_exams.get(name, (None, None))
        # the same numbers are those of patients of PTB-XL, and some datasets hold both
        patient = patient and f"CODE-15 {identifier(patient)}"
        return ECGFile(location, patient, f"exam_id {name} in an exams.csv of CODE-15% and in the file that it names")

    def _header_file(self, name: str) -> ECGFile:
        return ECGFile(self._found.headers.get(name), None, f"{name}.hea in a folder below")

    def _csn_file(self, name: str) -> ECGFile:
        # each of its patients has one record
        return self._header_file(name)._replace(patient=name)


def _interpolated(array: np.ndarray, total: int, start: int, end: int) -> np.ndarray:
    """Samples `start` to `end` of the `total` that the reference makes of a record: the same numbers as in its `.npy` files.

    It lays a cubic spline through the samples, without a filter, and takes the first and the last of the old and of the new samples for
    simultaneous. So 10 s at 500 Hz end 2 ms early: `ecg_utils.resample`, which does neither, would give another record.

    Args:
        array: float32 [leads, samples], the whole record.
    """
    from scipy.interpolate import make_interp_spline  # late: most data do without

    places = np.linspace(0, array.shape[1] - 1, total)[start:end]
    return make_interp_spline(np.arange(array.shape[1]), array, axis=1)(places).astype(np.float32)


def _files_in(folder: str) -> dict[str, bool]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_symlink() for entry in entries}
    except OSError:
        # there is none, or it may not be read
        return {}
