"""`elm data build` at scale: as fast as reading allows, in memory that does not grow, each record once, in any number of shards.

    python benchmarks/data_build.py make FOLDER [--records 20000]      # WFDB records in MIMIC-IV-ECG's layout, with its two tables
    python benchmarks/data_build.py build FOLDER                       # beside the reader alone, on both cores
    python benchmarks/data_build.py once FOLDER [--questions 400000]   # many questions about each record: size, and a pass over them

Figures are seconds of wall time within one run, beside others of CPU time, which other work on the machine changes less, and MiB of the
largest process.
"""

import argparse
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

# this folder has a benchmark named as the package `ecg_byte`: the package is to be found first
sys.path.append(sys.path.pop(0))

from elm_ecg.ecg_utils import as_record
from elm_ecg.training.data.synthetic import make_record

LEADS = ["I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6"]  # MIMIC's order
KINDS = 50  # different recordings, which are shifted for each record


def make(folder: Path, number: int, seed: int) -> None:
    """Records of 12 x 5000 samples, with MIMIC-IV-ECG's tables of them."""
    rng = np.random.default_rng(seed)
    kinds = []
    for index in range(KINDS):
        ecg = make_record(index, seed)["ecg"]
        array = np.asarray(ecg["array"], float) * (1 if ecg["unit"] == "uV" else 1000)  # microvolts
        rows = dict(zip(ecg["lead_names"], array, strict=True))
        of_leads = np.stack([rows[lead] for lead in LEADS])
        kinds.append(np.stack([np.interp(np.linspace(0, 1, 5000), np.linspace(0, 1, len(x)), x) for x in of_leads]))
    records, measurements = [], []
    for index in tqdm(range(number), unit="record"):
        subject, study = 10_000_000 + index // 5, 40_000_000 + index
        path = f"files/p{str(subject)[:4]}/p{subject}/s{study}/{study}"
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.normal(0, 5, (12, 5000))
        samples = np.clip(np.rint((np.roll(kinds[index % KINDS], index, axis=1) + noise) / 5), -32767, 32767).astype(
            "<i2"
        )
        samples.T.tofile(place.with_suffix(".dat"))  # 200 a millivolt, as MIMIC has them
        lines = [f"{study} 12 500 5000"]
        for lead, of_lead in zip(LEADS, samples, strict=True):
            checksum = int(of_lead.sum(dtype=np.int64)) & 0xFFFF
            checksum -= 0x10000 * (checksum >= 0x8000)
            lines.append(f"{study}.dat 16 200/mV 16 0 {of_lead[0]} {checksum} 0 {lead}")
        place.with_suffix(".hea").write_text("\n".join(lines) + "\n")
        about = {"subject_id": subject, "study_id": study}
        records.append({**about, "file_name": study, "ecg_time": "2150-01-01 00:00:00", "path": path})
        reports = dict.fromkeys((f"report_{i}" for i in range(18)), "")
        reports |= {"report_0": "Sinus rhythm", "report_1": "Normal ECG"}
        measurements.append({**about, "cart_id": 1, "ecg_time": "2150-01-01 00:00:00", **reports})
    for name, rows in (("record_list", records), ("machine_measurements", measurements)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def read_all(paths: list[Path]) -> int:
    return sum(as_record(path).array.size for path in paths)


def only_read(folder: Path, processes: int) -> float:
    """Seconds in which the reader alone reads all records."""
    paths = sorted(folder.rglob("*.hea"))
    start = time.perf_counter()
    with ProcessPoolExecutor(processes) as pool:
        for _ in pool.map(read_all, [paths[i : i + 200] for i in range(0, len(paths), 200)]):
            pass
    return time.perf_counter() - start


def command(folder: Path, output: Path, *options: str) -> tuple[float, float]:
    """Seconds and MiB of an `elm data build` in a process of its own."""
    shutil.rmtree(output, ignore_errors=True)
    code = (
        "import resource, sys; from elm_ecg.training.dataset_commands import main; main(sys.argv[1:]);"
        "print(*(resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))"
    )
    start = time.perf_counter()
    arguments = ["build", str(folder), "--output_dir", str(output), *options]
    run = subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    return seconds, max(map(float, run.stdout.split()[-2:]))


def cpu_seconds() -> float:
    """Of the processes that this one has started, and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def build(folder: Path, processes: int, repeats: int) -> None:
    """How fast records become a dataset, against how fast they are read; files are in the page cache, as the disk is not what is measured."""
    options = ["--source", "mimic-iv-ecg", "--no_questions", "--num_proc", str(processes)]
    number = len(list(folder.rglob("*.hea")))
    only_read(folder, processes)
    for _ in range(repeats):
        begun = cpu_seconds()
        alone = only_read(folder, processes)
        between = cpu_seconds()
        seconds, mebibytes = command(folder, folder.parent / "built", *options)
        share = (between - begun) / (cpu_seconds() - between)
        print(
            f"{number} records, {processes} processes: read alone {number / alone:.0f}/s, built {number / seconds:.0f}/s, "
            f"{alone / seconds:.2f} of it, {share:.2f} by CPU seconds; at most {mebibytes:.0f} MiB in one process",
            flush=True,
        )


def once(folder: Path, num_questions: int, num_inline: int, processes: int) -> None:
    """Many questions about each record: how large the dataset is, and how fast its rows are read in random order, beside the first of
    them in the form of before, each with its array."""
    from elm_ecg.training.data import records
    from elm_ecg.training.data.loading import load_dataset

    studies = [path.stem for path in sorted(folder.rglob("*.hea"))]
    place = folder.parent / "questions.jsonl"
    with place.open("w") as file:
        for index in range(num_questions):
            question = f"Is the rate above {40 + index % 97} beats per minute?"
            row = {"record": studies[index % len(studies)], "question": question, "answer": ["yes", "no"][index % 2]}
            file.write(json.dumps(row) + "\n")
    output = folder.parent / "asked"
    options = ["--source", "mimic-iv-ecg", "--questions", str(place), "--num_proc", str(processes)]
    seconds, mebibytes = command(folder, output, *options, "--shares", "1", "0", "0")
    sizes = {part: sum(file.stat().st_size for file in (output / part).iterdir()) for part in ("records", "data")}
    print(
        f"{num_questions} questions about {len(studies)} records: built in {seconds:.0f} s, at most {mebibytes:.0f} MiB in one process; "
        f"{sum(sizes.values()) / sizes['records']:.3f} of the size of the records ({sizes['records'] / 1e6:.0f} MB)",
        flush=True,
    )
    data: Any = load_dataset(str(output), "train").shuffle(seed=0)
    rows = data.select(range(min(len(data), num_inline)))
    inline = written_inline(rows, folder.parent / "inline")
    forms = {
        "inline": (inline.shuffle(seed=1), [Path(file["filename"]) for file in inline.cache_files]),
        "stored once": (rows.shuffle(seed=1), list(Path(records.cache_of(output / records.RECORDS)).rglob("*.arrow"))),
    }
    for state in ("cold", "warm", "warm"):
        for name, (part, files) in forms.items():
            if state == "cold":
                records.forget()  # pages that are mapped stay
                forget_pages(files)
            print(f"{name}, {len(part)} rows, {state}: {reading(part)}", flush=True)
    print(f"stored once, all {len(data)} rows: {reading(data)}")


def written_inline(rows: Any, place: Path) -> Any:
    """The rows with their arrays, as datasets were before, in Arrow files."""
    import pyarrow as pa
    from datasets import Dataset, Features

    from elm_ecg.training.data.loading import ecgs_of, with_arrays
    from elm_ecg.training.data.schema import ECG

    schema = rows.data.schema.remove_metadata()
    schema = schema.set(schema.get_field_index("ecg"), pa.field("ecg", ECG))

    def generate() -> Any:
        for row in rows:
            ecg = ecgs_of(row)[0]
            yield {**row, "ecg": {**ecg, "array": list(ecg["array"])}}

    shutil.rmtree(place, ignore_errors=True)
    features = Features.from_arrow_schema(schema)
    return with_arrays(Dataset.from_generator(generate, features, cache_dir=str(place)))


def forget_pages(files: list[Path]) -> None:
    """Has the system read these files from the disk the next time."""
    for path in files:
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading(rows: Any) -> str:
    """How long it takes to read the ECG of each row."""
    from elm_ecg.training.data.loading import ecgs_of

    begun, cpu = time.perf_counter(), time.process_time()
    for row in rows:
        ecgs_of(row)[0]["array"].sum()
    begun, cpu = time.perf_counter() - begun, time.process_time() - cpu
    return f"{1e6 * cpu / len(rows):.0f} us of CPU a row, {1e6 * begun / len(rows):.0f} by the clock"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=("make", "build", "once"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--questions", type=int, default=400_000)
    parser.add_argument(
        "--inline", type=int, default=20_000, help="rows of once that are written with their arrays too"
    )
    parser.add_argument("--num_proc", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3, help="of build")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.work == "make":
        make(args.folder, args.records, args.seed)
    elif args.work == "build":
        build(args.folder, args.num_proc, args.repeats)
    else:
        once(args.folder, args.questions, args.inline, args.num_proc)


if __name__ == "__main__":
    main()
