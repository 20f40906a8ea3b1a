"""CPU time of reading a record of a large data set: `read_ecg` against the library of its format alone.

    OMP_NUM_THREADS=1 uv run python benchmarks/readers.py

Records of 12 leads x 10 s are made and read in turn: WFDB of format 16 as MIMIC-IV-ECG's, and one HDF5 file as of CODE-15%, whose
20,000 `exam_id` are there, but only so many tracings as are read. `read_ecg` checks what it reads (checksums, units, leads, gaps);
the libraries read only.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import wfdb

from elm_ecg.ecg_utils import STANDARD_LEADS, read_ecg


def make_counts(seed: int) -> np.ndarray:
    """int16 [5000, 12] whose limb leads agree."""
    counts = np.cumsum(np.random.default_rng(seed).integers(-5, 6, (5000, 12)), axis=0)
    i, ii = counts[:, 0], counts[:, 1]
    counts[:, 2:6] = np.stack([ii - i, -(i + ii) // 2, (2 * i - ii) // 2, (2 * ii - i) // 2], axis=1)
    return counts.astype("<i2")


def write_wfdb(folder: Path, name: str, counts: np.ndarray) -> Path:
    sums = counts.sum(axis=0, dtype=np.int64) % 2**16
    lines = [f"{name} 12 500 5000 10:15:00 25/09/2180"] + [
        f"{name}.dat 16 200.0(0)/mV 16 0 {first} {checksum} 0 {lead}"
        for first, checksum, lead in zip(counts[0], sums, STANDARD_LEADS, strict=True)
    ]
    (folder / f"{name}.dat").write_bytes(counts.tobytes())
    (folder / f"{name}.hea").write_text("\n".join(lines) + "\n")
    return folder / f"{name}.hea"


def write_code(path: Path, num_tracings: int, num_ids: int, seed: int) -> list[int]:
    ids = np.random.default_rng(seed).permutation(4_000_000)[:num_ids]
    with h5py.File(path, "w") as file:
        file["exam_id"] = ids
        tracings = file.create_dataset("tracings", (num_ids, 4096, 12), "f4", chunks=(1, 4096, 12), compression="gzip")
        for row in range(num_tracings):
            tracings[row] = make_counts(seed + row)[:4096] / 200
    return ids[:num_tracings].tolist()


def milliseconds(works: dict[str, Callable[[], None]], repeats: int, num_records: int) -> dict[str, float]:
    """Median CPU time of a record, by turns, after a first time that does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if repeat:
                times[name].append((time.process_time() - start) / num_records * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100, help="of each format; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        headers = [write_wfdb(folder, f"r{number}", make_counts(args.seed + number)) for number in range(args.records)]
        part = folder / "exams_part0.hdf5"
        ids = write_code(part, args.records, 20_000, args.seed)

        def wfdb_alone() -> None:
            for header in headers:
                wfdb.rdrecord(str(header.with_suffix("")))

        def wfdb_read() -> None:
            for header in headers:
                read_ecg(header)

        def hdf5_alone() -> None:
            for row in range(args.records):
                with h5py.File(part) as file:
                    file["tracings"][row]

        def hdf5_read() -> None:
            for exam_id in ids:
                read_ecg(f"{part}#{exam_id}")

        works = {"wfdb": wfdb_alone, "WFDB": wfdb_read, "h5py": hdf5_alone, "HDF5": hdf5_read}
        times = milliseconds(works, args.repeats, args.records)
    print("| format | library, ms a record | read_ecg | ratio |\n| --- | --- | --- | --- |")
    for form, library in (("WFDB", "wfdb"), ("HDF5", "h5py")):
        print(f"| {form} | {library} {times[library]:.2f} | {times[form]:.2f} | {times[library] / times[form]:.2f} |")


if __name__ == "__main__":
    main()
