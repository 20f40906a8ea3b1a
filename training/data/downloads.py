"""Public sets of recordings as their authors publish them: where a download lies, which records it has, and what is said of each."""

import ast
import csv
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from elm_ecg.ecg_formats_common import to_number, to_sex
from elm_ecg.training.data.tables import identifier
from elm_ecg.training.files import resource

logger = logging.getLogger(__name__)

# of the Challenge's sources, in `training`; its `ptb` and `ptb-xl` are left out here, as other folders have these names too
CHALLENGE_FOLDERS = ("cpsc_2018", "cpsc_2018_extra", "georgia", "chapman_shaoxing", "ningbo", "st_petersburg_incart")
# columns of CODE-15%'s exams.csv -> what they say
CODE_LABELS = {
    "1dAVb": "first-degree AV block",
    "RBBB": "right bundle branch block",
    "LBBB": "left bundle branch block",
    "SB": "sinus bradycardia",
    "ST": "sinus tachycardia",
    "AF": "atrial fibrillation",
    "normal_ecg": "normal ECG",
}
# the Challenge and CSN name a record by its source and a number, which no other record has
HEADER_NAME = re.compile(r"[A-Z]+\d+")
_HEADER_FACT = re.compile(r"#\s*(age|sex|dx)\s*:\s*(.*?)\s*", re.IGNORECASE)
# folders that hold no download: hidden ones, what the reference made, and those with the records of PTB-XL and MIMIC-IV-ECG
_NO_DOWNLOAD = re.compile(r"\..*|preprocessed_\d+|records[15]00|p\d{4}")


@dataclass
class Listing:
    """The records of a download by their ids; 800,000 fit in memory, as each is a text and a dict.

    Args:
        locations: id -> what `as_record` reads.
        about: id -> what the source says: `patient_id`, `strat_fold`, `age` (years), `sex` (male or female), `report`, `codes` (as
            the source writes them) and `labels` (their names in words, one for each), of which a record has what is known.
    """

    locations: dict[str, str] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, record: str, location: str, **facts: Any) -> None:
        """Adds a record with what is known of it; ValueError if it is there already."""
        if record in self.locations:
            raise ValueError(f"Two records are called {record}: {self.locations[record]} and {location}; expected one.")
        self.locations[record] = location
        self.about[record] = {name: value for name, value in facts.items() if value is not None}


@dataclass(frozen=True)
class Download:
    """A public set of recordings.

    Args:
        title: as its authors call it.
        markers: files or folders, any of which stands in its root.
        license: as the Hub spells it.
        attribution: what to cite.
        listing: its records, of a root and the sampling rate that is wanted, or None for any.
        alias: finds in another name of a record the part that tells its id.
    """

    title: str
    markers: tuple[str, ...]
    license: str
    attribution: str
    listing: Callable[[Path, float | None], Listing]
    alias: str

    def record_of(self, name: str) -> str | None:
        """The id of the record that a path or another name means, whether it is there or not; None where it is no name of this set."""
        match = re.fullmatch(self.alias, name)
        if match is None or match.lastindex is None:
            return None
        part = match[match.lastindex]
        return str(int(part)) if part.isdecimal() else part


def read_rows(table: Path, *columns: str) -> Iterator[Any]:
    """Two or more columns of a CSV file of any length: a tuple of texts for each row.

    Raises:
        ValueError: the file is not there, lacks a column, or is damaged.
    """
    if not table.is_file():
        raise ValueError(f"There is no {table.name} in {table.parent}; fetch it too, as it says what the records are.")
    with table.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        try:
            header = next(lines, [])
            if missing := [name for name in columns if name not in header]:
                raise ValueError(f"it has no column {', '.join(missing)}, but {', '.join(header)}")
            pick = itemgetter(*map(header.index, columns))
            for row in filter(None, lines):
                if len(row) != len(header):
                    raise ValueError(f"line {lines.line_num} has {len(row)} cells, and the header {len(header)}")
                yield pick(row)
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f"Cannot read {table}: {error}. It is cut, or of another version: fetch it anew."
            ) from error


def _patient(text: str) -> str | None:
    # one text for all records of a patient
    return sys.intern(identifier(text)) if text.strip() else None


def _age(text: str) -> int | float | None:
    age = to_number(text)
    return int(age) if age is not None and age == int(age) else age


def _ptbxl(root: Path, resample: float | None) -> Listing:
    statements = dict(read_rows(root / "scp_statements.csv", "", "description"))  # the column of the codes has no name
    columns = ("ecg_id", "patient_id", "age", "sex", "report", "scp_codes", "strat_fold")
    listing = Listing()
    # 100 and 500 Hz
    file_name = "filename_lr" if resample == 100 else "filename_hr"
    for row in read_rows(root / "ptbxl_database.csv", *columns, file_name):
        record, patient, age, sex, report, scp_codes, fold, file = row
        try:
            # a dict as Python writes it, with single quotes, so no JSON
            codes = list(map(str, dict(ast.literal_eval(scp_codes))))
        except (ValueError, SyntaxError, TypeError) as error:
            raise ValueError(f"The scp_codes of ecg_id {record} are {scp_codes!r}; expected a dict.") from error
        listing.add(
            identifier(record),
            f"{root}/{file}.hea",
            patient_id=_patient(patient),
            strat_fold=_age(fold),
            age=_age(age),
            sex={"0": "male", "1": "female"}.get(identifier(sex)),
            report=report.strip() or None,
            codes=codes,
            labels=[statements.get(code, code) for code in codes],
        )
    return listing


def _mimic(root: Path, resample: float | None) -> Listing:
    listing = Listing()
    for patient, study, path in read_rows(root / "record_list.csv", "subject_id", "study_id", "path"):
        listing.add(study, f"{root}/{path}.hea", patient_id=_patient(patient))
    reports: dict[str, str] = {}  # many are the same, and are held once
    columns = [f"report_{number}" for number in range(18)]
    for study, *sentences in read_rows(root / "machine_measurements.csv", "study_id", *columns):
        report = "; ".join(filter(None, map(str.strip, sentences)))
        if report and study in listing.about:
            listing.about[study]["report"] = reports.setdefault(report, report)
    return listing


def code_exams(root: Path) -> Iterator[tuple[str, str, str]]:
    """The `exam_id`, `patient_id` and location of each record of CODE-15% of which the file is there."""
    files = set(os.listdir(root))
    for exam, patient, file in read_rows(root / "exams.csv", "exam_id", "patient_id", "trace_file"):
        if file in files:
            yield exam, patient, f"{root}/{file}#{exam}"


def _code(root: Path, resample: float | None) -> Listing:
    listing = Listing()
    there = {exam: (patient, location) for exam, patient, location in code_exams(root)}
    for exam, age, is_male, *cells in read_rows(root / "exams.csv", "exam_id", "age", "is_male", *CODE_LABELS):
        if exam not in there:
            continue
        patient, location = there[exam]
        codes = [code for code, cell in zip(CODE_LABELS, cells, strict=True) if cell.strip().lower() == "true"]
        listing.add(
            exam,
            location,
            patient_id=_patient(patient),
            age=_age(age),
            sex={"true": "male", "false": "female"}.get(is_male.strip().lower()),
            codes=codes,
            labels=[CODE_LABELS[code] for code in codes],
        )
    return listing


def _challenge(root: Path, resample: float | None) -> Listing:
    return _of_headers([root / name for name in (*CHALLENGE_FOLDERS, "ptb", "ptb-xl")], snomed_names())


def _csn(root: Path, resample: float | None) -> Listing:
    names, table = snomed_names(), root / "ConditionNames_SNOMED-CT.csv"
    if table.is_file():
        names |= {code.strip(): name.strip() for code, name in read_rows(table, "Snomed_CT", "Full Name")}
    listing = _of_headers([root / "WFDBRecords"], names)
    for record, facts in listing.about.items():
        # each of its patients has one record (Zheng et al. 2022, doi 10.13026/wgex-er52)
        facts["patient_id"] = record
    return listing


def snomed_names() -> dict[str, str]:
    """Code of SNOMED CT -> name of the diagnosis, of the 133 that the Challenge of 2021 lists (github.com/physionetchallenges/evaluation-2021)."""
    return dict(read_rows(resource("training/data/snomed_ct.csv"), "code", "name"))


def _of_headers(folders: Iterable[Path], names: Mapping[str, str]) -> Listing:
    """The WFDB records below the folders; their headers say age, sex and codes."""
    listing = Listing()
    unnamed: Counter[str] = Counter()
    for header in (header for folder in folders for header in wfdb_headers(folder)):
        text = header.read_text(encoding="latin-1")
        matches = map(_HEADER_FACT.fullmatch, text.splitlines())
        facts = {match[1].lower(): match[2] for match in matches if match}
        sex = to_sex(facts.get("sex", ""))
        codes = [code.strip() for code in facts.get("dx", "").split(",") if code.strip().isdecimal()]
        unnamed.update(code for code in codes if code not in names)
        listing.add(
            header.stem,
            str(header),
            age=_age(facts.get("age", "")),
            sex=sex if sex in ("male", "female") else None,
            codes=[sys.intern(code) for code in codes],
            labels=[names.get(code, sys.intern(code)) for code in codes],
        )
    if unnamed:
        logger.warning(
            "%s codes of SNOMED CT have no name here, and stand as they are (in records): %s",
            len(unnamed),
            ", ".join(f"{code} ({count:,})" for code, count in unnamed.most_common(10)),
        )
    return listing


def wfdb_headers(folder: Path) -> Iterator[Path]:
    """The headers below a folder that are called as the Challenge and CSN call theirs, in the order of their names."""
    for place, _, files in _walk(folder):
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix == ".hea" and HEADER_NAME.fullmatch(stem):
                yield place / file


# the end of a path: a suffix, as of a file or a picture
_SUFFIX = r"(?:[-.][^/]*)?"
_HEADER_ALIAS = rf"(?:.*/)?({HEADER_NAME.pattern}){_SUFFIX}"
_PHYSIONET = "Goldberger et al., PhysioNet, Circulation 101:e215, 2000, doi 10.1161/01.CIR.101.23.e215."
DOWNLOADS = {
    "ptb-xl": Download(
        "PTB-XL",
        ("ptbxl_database.csv",),
        "cc-by-4.0",
        "PTB-XL 1.0.3 (CC BY 4.0): Wagner et al., PhysioNet 2022, doi 10.13026/kfzx-aw45; Wagner et al., Scientific Data 7:154, 2020, "
        f"doi 10.1038/s41597-020-0495-6; {_PHYSIONET}",
        _ptbxl,
        rf"(?:.*/)?(\d+)_[lh]r{_SUFFIX}|(\d+)",
    ),
    "mimic-iv-ecg": Download(
        "MIMIC-IV-ECG",
        ("record_list.csv",),
        "odbl",
        f"MIMIC-IV-ECG 1.0 (ODbL 1.0): Gow et al., PhysioNet 2023, doi 10.13026/4nqg-sb35; {_PHYSIONET}",
        _mimic,
        # eight digits: those of a study
        rf"(?:.*/)?s?(\d{{8}}){_SUFFIX}",
    ),
    "code-15": Download(
        "CODE-15%",
        ("exams.csv",),
        "cc-by-4.0",
        "CODE-15% (CC BY 4.0): Ribeiro et al., Zenodo 2021, doi 10.5281/zenodo.4916206; Ribeiro et al., Nature Communications 11:1760, "
        "2020, doi 10.1038/s41467-020-15432-4; Lima et al., Nature Communications 12:5117, 2021, doi 10.1038/s41467-021-25351-7.",
        _code,
        # in the folder of another set, the same number is another record
        rf"(?:(?:.*/)?(?:exams_part\d+(?:\.hdf5)?#|code[-_]?15[^/]*/(?:.*/)?))?(\d+){_SUFFIX}",
    ),
    "challenge": Download(
        "PhysioNet/CinC Challenge 2020 and 2021",
        CHALLENGE_FOLDERS,
        "cc-by-4.0",
        "PhysioNet/CinC Challenge 2020 and 2021 (CC BY 4.0): Perez Alday et al., Physiological Measurement 41:124003, 2020, doi "
        "10.1088/1361-6579/abc960; Reyna et al., Computing in Cardiology 2021, doi 10.23919/CinC53138.2021.9662687; of CPSC 2018: Liu et "
        f"al., Journal of Medical Imaging and Health Informatics 8:1368, 2018, doi 10.1166/jmihi.2018.2442; {_PHYSIONET}",
        _challenge,
        _HEADER_ALIAS,
    ),
    "csn": Download(
        "Chapman-Shaoxing-Ningbo",
        ("WFDBRecords",),
        "cc-by-4.0",
        "Chapman-Shaoxing-Ningbo 1.0.0 (CC BY 4.0): Zheng et al., PhysioNet 2022, doi 10.13026/wgex-er52; Zheng et al., Scientific Data "
        "7:48, 2020, doi 10.1038/s41597-020-0386-x; Zheng et al., Scientific Reports 10:2898, 2020, doi 10.1038/s41598-020-59821-7; "
        f"{_PHYSIONET}",
        _csn,
        _HEADER_ALIAS,
    ),
}


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As `os.walk`, in the order of names, without the folders that hold no download; links to folders are not followed."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _NO_DOWNLOAD.fullmatch(name))
        yield Path(place), folders, files


def find_root(source: str, folder: Path) -> Path:
    """The root of a download: the folder itself, or one below it.

    Args:
        source: one of `DOWNLOADS`.

    Raises:
        ValueError: it is not there, or there are several.
    """
    download, found = DOWNLOADS[source], []
    for place, folders, files in _walk(folder):
        if not {*folders, *files}.isdisjoint(download.markers):
            found.append(place)
            folders.clear()  # what is below belongs to it
    if not found:
        raise ValueError(
            f"There is no {download.title} in {folder}: neither it nor a folder below it holds {' or '.join(download.markers)}. Give the "
            f"folder of the download, or leave out --source {source}."
        )
    if len(found) > 1:
        raise ValueError(
            f"{download.title} is in {folder} {len(found)} times: {found[0]}, {found[1]}. Name one of them."
        )
    return found[0]


@dataclass
class Found:
    """What lies below a folder: the root of each download, and the headers of records of the Challenge and CSN by their names.

    Of what is there twice, the first counts.
    """

    roots: dict[str, Path] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


def find_downloads(folder: Path) -> Found:
    """All that a folder and those below it hold of `DOWNLOADS`."""
    found = Found()
    tables = {name: download.markers[0] for name, download in DOWNLOADS.items() if download.markers[0].endswith(".csv")}
    for place, folders, files in _walk(folder):
        names = set(files)
        if roots := [source for source, table in tables.items() if table in names]:
            for source in roots:
                found.roots.setdefault(source, place)
            folders.clear()
            continue
        for stem, suffix in map(os.path.splitext, sorted(files)):
            if suffix == ".hea" and HEADER_NAME.fullmatch(stem):
                found.headers.setdefault(stem, f"{place}/{stem}.hea")
    return found
