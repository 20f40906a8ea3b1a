"""Small copies of the public sets of recordings, in the layouts in which their authors publish them."""

import csv
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from ecg_files import LEADS

MIMIC_LEADS = ["I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6"]


def signal(seed: int, rate: int = 500, seconds: float = 10.0) -> np.ndarray:
    """Millivolts [12, samples], to a microvolt: waves below 30 Hz, other ones in each lead, of which the limb leads agree."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(rate * seconds)) / rate
    waves = np.sin(2 * np.pi * (rng.uniform(1, 30, (8, 6, 1)) * time + rng.uniform(0, 1, (8, 6, 1)))).mean(axis=1)
    one, two, *chest = np.rint(1000 * waves)
    limbs = [one, two, two - one, -np.rint((one + two) / 2), np.rint(one - two / 2), np.rint(two - one / 2)]
    return np.stack([*limbs, *chest]) / 1000


def save_wfdb(path: Path, array: np.ndarray, rate: int = 500, leads: list[str] = LEADS, comments: str = "") -> None:
    """NAME.hea and NAME.dat, of 16 bits and 1 uV a count; NaN as the format writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    counts = np.where(np.isnan(array), -32768, np.rint(1000 * np.nan_to_num(array))).astype("<i2")
    path.with_name(f"{path.name}.dat").write_bytes(counts.T.tobytes())
    lines = [f"{path.name}.dat 16 1000.0(0)/mV 16 0 0 0 0 {lead}" for lead in leads]
    header = "\n".join([f"{path.name} {len(leads)} {rate} {array.shape[1]}", *lines])
    path.with_name(f"{path.name}.hea").write_text(f"{header}\n{comments}")


def save_table(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def ptbxl(root: Path, patients: dict[int, int]) -> Path:
    """PTB-XL with these records: ecg_id -> patient_id. Record n is `signal(n)`."""
    rows = []
    for record, patient in patients.items():
        files = {}
        for rate, suffix in ((100, "lr"), (500, "hr")):
            file = files[f"filename_{suffix}"] = f"records{rate}/{record // 1000:02d}000/{record:05d}_{suffix}"
            save_wfdb(root / file, signal(record, rate), rate, [lead.upper() for lead in LEADS])
        about = {
            "ecg_id": record,
            "patient_id": float(patient),
            "age": 56.0,
            "sex": record % 2,
            "strat_fold": record % 10 + 1,
        }
        codes = {"scp_codes": "{'NORM': 100.0, 'SR': 0.0}", "report": "sinusrhythmus, normales ekg"}
        rows.append(about | codes | files)
    save_table(root / "ptbxl_database.csv", *rows)
    statements = {"NORM": ("normal ECG", 1.0, "NORM"), "SR": ("sinus rhythm", "", "")}
    columns = ("", "description", "diagnostic", "diagnostic_class")
    save_table(
        root / "scp_statements.csv",
        *(dict(zip(columns, (code, *row), strict=True)) for code, row in statements.items()),
    )
    return root


def mimic_path(study: int, patient: int) -> str:
    return f"files/p{str(patient)[:4]}/p{patient}/s{study}/{study}"


def mimic(root: Path, patients: dict[int, int]) -> Path:
    """MIMIC-IV-ECG with these records: study_id -> subject_id. Record n is `signal(n)`, with aVF before aVL."""
    records, measurements = [], []
    for study, patient in patients.items():
        path = mimic_path(study, patient)
        save_wfdb(root / path, signal(study)[[LEADS.index(lead) for lead in MIMIC_LEADS]], leads=MIMIC_LEADS)
        ids = {"subject_id": patient, "study_id": study}
        records.append({**ids, "file_name": study, "ecg_time": "2180-07-23 08:44:00", "path": path})
        report = {f"report_{number}": "" for number in range(18)} | {"report_0": "Sinus rhythm", "report_1": "LVH, old"}
        measurements.append({**ids, "cart_id": 1, **report, "bandwidth": "0.005-150 Hz", "rr_interval": 659})
    save_table(root / "record_list.csv", *records)
    save_table(root / "machine_measurements.csv", *measurements)
    return root


def code_15(root: Path, patients: dict[int, int]) -> Path:
    """CODE-15% with these records: exam_id -> patient_id, in two files, of which a third one is missing. Record n is `signal(n)`,
    10.24 s of it."""
    rows = []
    root.mkdir(parents=True)
    for part in range(2):
        exams = list(patients)[part::2]
        with h5py.File(root / f"exams_part{part}.hdf5", "w") as file:
            file["exam_id"] = [*exams, 0]  # its last row holds nothing
            file["tracings"] = np.stack([*(signal(exam, 400, 10.24).T for exam in exams), np.zeros((4096, 12))]).astype(
                "f4"
            )
        rows += [
            {"exam_id": exam, "patient_id": patients[exam], "trace_file": f"exams_part{part}.hdf5"} for exam in exams
        ]
    rows.append({"exam_id": 99, "patient_id": 98, "trace_file": "exams_part2.hdf5"})
    said = dict.fromkeys(("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF", "normal_ecg"), False) | {"RBBB": True, "AF": True}
    save_table(root / "exams.csv", *({"age": 46, "is_male": True, **said, **row} for row in rows))
    return root


def challenge(root: Path, *names: str) -> Path:
    """The Challenge with these records of CPSC 2018; record A0001 is `signal(1)`."""
    comments = "# Age: 74\n# Sex: Male\n# Dx: 59118001,123\n# Rx: Unknown\n"
    for name in names:
        save_wfdb(root / "training" / "cpsc_2018" / "g1" / name, signal(int(name[1:])), comments=comments)
    return root


def csn(root: Path, *names: str) -> Path:
    """CSN with these records; record JS00001 is `signal(1)`."""
    for name in names:
        comments = "#Age: 85\n#Sex: Female\n#Dx: 164889003,59118001\n#Rx: Unknown\n"
        save_wfdb(root / "WFDBRecords" / "01" / "010" / name, signal(int(name[2:])), comments=comments)
    row = {"Acronym Name": "AFIB", "Full Name": "Atrial Fibrillation", "Snomed_CT": 164889003}
    save_table(root / "ConditionNames_SNOMED-CT.csv", row)
    return root
