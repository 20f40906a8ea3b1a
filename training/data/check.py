"""What a dataset holds, and what is wrong with it: `elm data check`."""

import argparse
import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from tqdm import tqdm

from elm_ecg.ecg_utils import MAX_LIMB_LEAD_ERROR, as_record, lead_quality, limb_lead_error
from elm_ecg.training.command_line import printable
from elm_ecg.training.data.loading import FOLD_SPLIT, check_fold, ecgs_of, load_split, load_splits, to_chat, with_arrays
from elm_ecg.training.data.paths import LazyECG, file_of
from elm_ecg.training.data.records import is_stored
from elm_ecg.training.data.schema import LITERALS, ROLES, as_list, counted
from elm_ecg.training.files import resource, write_text

# kind of finding -> its meaning; one of these fails the check
ERRORS = {
    "shared_patients": "patients in several splits",
    "shared_records": "records in several splits",
    "shared_signals": "signals in several splits, equal in every sample",
    "missing_files": "files of ECGs that are not there",
    "unreadable_ecgs": "ECGs that cannot be read",
    "no_answer": "chats without an answer",
    "empty_answers": "chats with an empty answer",
    "unusable_chats": "chats that are malformed, without a question, or with another number of places than ECGs",
}
WARNINGS = {
    "unknown_patients": "rows without a patient: splits may share some unseen",
    "without_ecg": "rows without an ECG",
    "empty_questions": "chats with an empty question",
    "repeated_questions": "rows with a question that was asked about the same ECGs before",
    "contradictory_answers": "of these, rows with another answer",
    "copied_signals": "records that equal another one in every sample",
    "flagged_leads": "ECGs with flat, saturated, noisy or too large leads",
    "limb_leads": f"ECGs whose limb leads are more than {MAX_LIMB_LEAD_ERROR:g} mV off what I and II give",
}
TEMPLATE = resource("training/data/check.jinja")  # of what is printed
MAX_EXAMPLES = 5
SAMPLED_ROWS = 100  # of each split; their files are read even without --read_files
ANSWER_CHARACTERS = 200  # by which answers are told apart


@dataclass
class Finding:
    """How often something was found, and the first examples."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(example)


@dataclass
class SplitReport:
    """What a split holds."""

    rows: int = 0
    records: int = 0
    patients: int = 0
    # sampling rate, leads and length -> how many of the rows' ECGs; of files those that are read
    rates: Counter[str] = field(default_factory=Counter)
    leads: Counter[str] = field(default_factory=Counter)
    seconds: Counter[float] = field(default_factory=Counter)
    answers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # by type of question
    flags: Counter[str] = field(default_factory=Counter)  # lead and what is wrong with it -> how many different ECGs

    def as_dict(self) -> dict[str, Any]:
        """For JSON; answers and lengths as a summary."""
        lengths = sorted(self.seconds.elements())
        return {
            "rows": self.rows,
            "records": self.records,
            "patients": self.patients,
            "rates": dict(self.rates.most_common()),
            "leads": dict(self.leads.most_common()),
            "seconds": {"shortest": lengths[0], "median": lengths[len(lengths) // 2], "longest": lengths[-1]}
            if lengths
            else {},
            "answers": {
                kind: {
                    "answers": counts.total(),
                    "different": len(counts),
                    "shares": {answer: round(count / counts.total(), 4) for answer, count in counts.most_common(5)},
                }
                for kind, counts in sorted(self.answers.items())
            },
            "flags": dict(self.flags.most_common()),
        }


class Checker:
    """Looks at one row after the other. Of signals and questions it keeps digests, so that a large dataset fits in memory."""

    def __init__(self) -> None:
        self.findings: dict[str, Finding] = defaultdict(Finding)
        self.splits: dict[str, SplitReport] = defaultdict(SplitReport)
        self.notices: Counter[str] = Counter()  # of the records' metadata -> how many different ECGs
        # kind -> patient, record or signal -> the splits that it is in
        self.splits_of: dict[str, dict[Any, set[str]]] = {"patients": {}, "records": {}, "signals": {}}
        self.names: dict[bytes, str] = {}  # signal -> the first record that has it
        self.copies: set[str] = set()
        self.files: dict[str, bytes | None] = {}  # file -> its signal; None where the file is missing or damaged
        self.facts: dict[bytes, tuple[str, str, float]] = {}  # signal -> rate, leads and seconds
        self.answers: dict[bytes, bytes] = {}  # ECGs and question -> the first answer to it

    def add(self, row: dict[str, Any], split: str, index: int, read_files: bool = True) -> None:
        """Looks at a row.

        Args:
            index: of the row in its split.
            read_files: read ECGs that are files; False only checks that the files exist.
        """
        where = f"{split} {index}"
        report = self.splits[split]
        report.rows += 1
        patients = _present(row.get("patient_id"))
        for patient in patients:
            report.patients += self._is_new("patients", patient, split)
        if not patients:
            self.findings["unknown_patients"].add(where)
        ecgs = ecgs_of(row)
        if not ecgs:
            self.findings["without_ecg"].add(where)
        if isinstance(row.get("ecg"), str) and row["ecg"] in LITERALS:
            ecgs = []  # it is made for the row, and equal in others
        records = _present(row.get("record_id")) or [ecg for ecg in ecgs if isinstance(ecg, str)]
        for record in records if ecgs else ():  # noise and flatline are no records
            report.records += self._is_new("records", record, split)
        names = records if len(records) == len(ecgs) else [""] * len(ecgs)
        keys = []
        for ecg, name in zip(ecgs, names, strict=True):
            if isinstance(ecg, str | LazyECG):
                # what the dataset stores itself is read in any case
                signal = self._file(ecg, name, split, where, read_files or is_stored(str(ecg)))
            else:
                signal = self._ecg(ecg, name, split, where)
            if signal is not None:
                rate, leads, seconds = self.facts[signal]
                report.rates[rate] += 1
                report.leads[leads] += 1
                report.seconds[seconds] += 1
            keys.append(signal or str(ecg).encode())  # a file that is not read is known by its path
        if "messages" in row:  # a dataset for pretraining has none
            self._chat(row, b" ".join(keys), report, where)

    def _is_new(self, kind: str, name: Any, split: str) -> bool:
        """Notes that a patient, record or signal is in a split; whether it was not there before."""
        splits = self.splits_of[kind].setdefault(name, set())
        first = split not in splits
        splits.add(split)
        return first

    def _file(self, ecg: str | LazyECG, name: str, split: str, where: str, read: bool) -> bytes | None:
        path = str(ecg)
        if path not in self.files:  # many rows may name one file: it is read once
            if not Path(file_of(path)).is_file():
                self.findings["missing_files"].add(f"{where}: {path}")
                self.files[path] = None
            elif read:  # else not noted, so that a later row may still read it
                self.files[path] = self._ecg(ecg, name, split, where)
        signal = self.files.get(path)
        if signal in self.splits_of["signals"]:  # None is not, nor are flat ECGs
            self._is_new("signals", signal, split)
        return signal

    def _ecg(self, ecg: Any, name: str, split: str, where: str) -> bytes | None:
        """The digest of its signal; None where it cannot be read."""
        try:
            record = as_record(ecg)
        except (ValueError, OSError) as error:
            self.findings["unreadable_ecgs"].add(f"{where}: {error}")
            return None
        rate, leads = f"{record.sampling_rate:g} Hz", f"{len(record.lead_names)}: {' '.join(record.lead_names)}"
        # to a microvolt, as some hold floats and others integers
        microvolts = np.rint(1000 * record.array).astype(np.int32)
        signal = _digest(f"{rate} {leads} ".encode() + microvolts.tobytes())  # another rate or lead makes another ECG
        if signal not in self.facts:  # each different ECG is judged once, however many rows have it
            self.facts[signal] = rate, leads, record.array.shape[1] / record.sampling_rate
            self.notices.update(record.metadata.get("notices", ()))
            flags = lead_quality(record)
            for lead, of_lead in flags.items():
                self.splits[split].flags.update(f"{lead} {flag}" for flag in of_lead)
            if flags:
                self.findings["flagged_leads"].add(f"{where}: {', '.join(flags)}")
            if (off := limb_lead_error(record)) > MAX_LIMB_LEAD_ERROR:
                self.findings["limb_leads"].add(f"{where}: {off:.2g} mV")
        if np.ptp(microvolts):  # all flat ECGs are equal, and no copies of each other
            self._is_new("signals", signal, split)
            first = self.names.setdefault(signal, name)
            if name != first and name not in self.copies:  # a record of several rows is no copy of itself
                self.copies.add(name)
                self.findings["copied_signals"].add(f"{first} and {name}")
        return signal

    def _chat(self, row: dict[str, Any], ecgs: bytes, report: SplitReport, where: str) -> None:
        try:
            chat = to_chat(row)
        except ValueError as error:
            self.findings["unusable_chats"].add(f"{where}: {error}")
            return
        texts: dict[str, list[str]] = {role: [] for role in ROLES}
        for turn in chat:
            texts[turn["role"]].append(" ".join(part.get("text") or "" for part in turn["content"]).strip())
        answers = texts["assistant"]
        if not answers:
            self.findings["no_answer"].add(where)
            return
        if not all(answers):
            self.findings["empty_answers"].add(where)
        if not all(texts["user"]):
            self.findings["empty_questions"].add(where)
        kinds = _present(row.get("question_type")) or ["all"]
        for number, answer in enumerate(answers):
            kind = kinds[number] if len(kinds) == len(answers) else kinds[0]  # one for each answer, or for all
            words = " ".join(answer.split())
            words = words if len(words) <= ANSWER_CHARACTERS else f"{words[:ANSWER_CHARACTERS]}..."
            report.answers[str(kind)][words] += 1
        question = _digest(ecgs + json.dumps(texts["user"]).encode())
        answered = _digest(json.dumps(answers).encode())
        if ecgs and question in self.answers:  # rows without ECGs may well ask the same
            self.findings["repeated_questions"].add(where)
            if self.answers[question] != answered:
                self.findings["contradictory_answers"].add(where)
        self.answers.setdefault(question, answered)

    def finish(self) -> None:
        """Finds what is in several splits, once all rows were seen."""
        for kind, splits_of in self.splits_of.items():
            for name, splits in splits_of.items():
                if len(splits) > 1:
                    label = (self.names[name] or "without record_id") if kind == "signals" else name
                    self.findings[f"shared_{kind}"].add(f"{label} ({', '.join(sorted(splits))})")


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()  # 128 bits: no two of millions are equal by chance


def _present(value: Any) -> list[Any]:
    """A value or list of values without those that are None."""
    return [item for item in as_list(value) if item is not None]


def check(args: argparse.Namespace) -> None:
    """Reads every row of a dataset, and says what it holds and what is wrong with it.

    Raises:
        ValueError: it has one of `ERRORS`, or cannot be loaded.
    """
    stored = load_splits(args.data)
    check_fold(args.fold, {args.data: stored})
    keys = [str(key) for key in stored]
    folds = [FOLD_SPLIT.fullmatch(key) for key in keys]
    # nothing is read of other folds than that of --fold
    of_fold = [fold is None or args.fold in (None, int(fold[1])) for fold in folds]
    names = [fold[2] if fold else key for key, fold in compress(zip(keys, folds, strict=True), of_fold)]
    missing = [split for split in args.splits or () if split not in names]
    if missing:
        raise ValueError(f"{args.data} has no split {', '.join(missing)}; it has {', '.join(keys)}.")
    checker = Checker()
    for split in args.splits or names:
        data = with_arrays(load_split(args.data, split, "ecg", args.fold, args.ecg_root, stored))
        step = 1 if args.read_files else max(1, len(data) // SAMPLED_ROWS)  # 1: the files of all rows
        for index, row in enumerate(tqdm(data, desc=split, unit="row")):
            checker.add(row, split, index, read_files=index % step == 0)
    checker.finish()
    meanings = WARNINGS | ERRORS
    findings = {kind: checker.findings[kind] for kind in meanings if kind in checker.findings}
    errors = {kind: finding for kind, finding in findings.items() if kind in ERRORS}
    splits = {split: report.as_dict() for split, report in checker.splits.items()}
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True)
    page = template.render(
        splits=splits, findings=findings, errors=errors, meanings=meanings, notices=checker.notices, counted=counted
    )
    print(printable(page), end="")
    if args.output is not None:
        content = {
            "data": args.data,
            "errors": {kind: vars(finding) for kind, finding in errors.items()},
            "warnings": {kind: vars(finding) for kind, finding in findings.items() if kind in WARNINGS},
            "notices": checker.notices,
            "splits": splits,
        }
        write_text(args.output, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    if errors:  # last, when all that was found is printed and written
        counts = "; ".join(f"{ERRORS[kind]} ({finding.count:,})" for kind, finding in errors.items())
        raise ValueError(f"{args.data} has errors: {counts}.")
    print(f"{args.data}: no errors, {counted(len(findings), 'kind')} of warnings.", flush=True)
