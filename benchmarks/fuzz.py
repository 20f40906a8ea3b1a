"""Damaged recordings of every format: a reader may refuse them with a ValueError or OSError, and may do nothing else.

    OMP_NUM_THREADS=1 uv run python benchmarks/fuzz.py --mutations 30000

Each mutation of a whole file is read in a forked process, which may not take more than 5 s of CPU or 512 MiB of memory; a
crash of a library ends that process alone. Half of the time checksums are not compared, as whoever damages a file on purpose
would write the right ones. What was found is printed with its number: `--only NUMBER` makes and reads it again. The whole
files are the small ones of the tests, and those of `../shared/data` where they are.
"""

import argparse
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from ecg_files import WHOLE, npz_bytes

from elm_ecg import ecg_formats_binary, ecg_formats_wfdb
from elm_ecg.ecg_utils import STANDARD_LEADS, read_ecg
from elm_ecg.training.data.sources import find_records

ROOT = Path(__file__).resolve().parents[1]
MAX_SECONDS, MAX_BYTES = 5.0, 512 * 2**20
HARD_SECONDS, HARD_BYTES = 60, 6 * 2**30  # at which a process is stopped, whatever it does
FOLDERS = ("formats", "reported", "other_12lead")
NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "255",
    "65536",
    "2147483648",
    "99999999999999999999",
    "1e308",
    "1e-308",
    "nan",
    "inf",
    "",
]
WORDS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1]


class TimeUpError(BaseException):
    """Of the alarm; no `except Exception` of a reader catches it."""


def whole_files() -> list[tuple[str, str, dict[str, bytes]]]:
    """Format, name of the file that is read, and the contents of all files of the record."""
    files = [(name, "a", {"a": content}) for name, content in WHOLE.items()]
    counts = np.arange(600, dtype="<i2")
    lines = [b"r 2 100 300", *(b"r.dat 16 1000(0)/mV 16 0 0 0 0 " + lead for lead in (b"I", b"II"))]
    files.append(("hea", "r.hea", {"r.hea": b"\n".join(lines) + b"\n", "r.dat": counts.tobytes()}))
    files.append(("npz of several", "a.npz", {"a.npz": npz_bytes(ecg=np.ones((2, 12, 9)), id=[1, 2], unit="uV")}))
    for folder in FOLDERS:
        for path in sorted((ROOT.parent / "shared/data" / folder).rglob("*")):
            if not path.is_file() or path.stat().st_size > 2**20 or path.suffix in (".md", ".dat", ".xyz", ".npz"):
                continue
            names = {path.name}
            if path.suffix == ".hea":
                names |= {line.split()[0] for line in path.read_text().splitlines()[1:] if line.strip()}
            contents = {
                name: (path.parent / name).read_bytes() for name in sorted(names) if (path.parent / name).is_file()
            }
            name = f"{path.name}#1169160" if path.suffix == ".hdf5" else path.name
            if path.suffix != ".csv" or folder == "reported":  # others are tables about records
                files.append((path.suffix.strip("."), name, contents))
    return files


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """The content with one to three kinds of damage."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        if data:
            KINDS[rng.integers(len(KINDS))](data, rng)
    return bytes(data)


def _place(data: bytearray, rng: np.random.Generator) -> int:
    """Any byte; half of the time one near the beginning, where headers are."""
    return int(rng.integers(min(len(data), 2000) if rng.random() < 0.5 else len(data)))


def _flip(data: bytearray, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(1, 9)):
        data[_place(data, rng)] ^= 1 << int(rng.integers(8))


def _cut(data: bytearray, rng: np.random.Generator) -> None:
    del data[_place(data, rng) :]


def _delete(data: bytearray, rng: np.random.Generator) -> None:
    start = _place(data, rng)
    del data[start : start + int(rng.integers(1, 200))]


def _insert(data: bytearray, rng: np.random.Generator) -> None:
    start = _place(data, rng)
    data[start:start] = rng.bytes(int(rng.integers(1, 200)))


def _repeat(data: bytearray, rng: np.random.Generator) -> None:
    start = _place(data, rng)
    piece = bytes(data[start : start + int(2 ** rng.uniform(0, 10))])
    data[start:start] = piece * int(min(2 ** rng.uniform(0, 17), 2**21 / len(piece)))


def _word(data: bytearray, rng: np.random.Generator) -> None:
    size, start = int(rng.choice([1, 2, 4, 8])), _place(data, rng) // 2 * 2
    word = WORDS[rng.integers(len(WORDS))] % 256**size
    data[start : start + size] = word.to_bytes(size, "little" if rng.random() < 0.7 else "big")


def _number(data: bytearray, rng: np.random.Generator) -> None:
    start = _place(data, rng)
    if match := re.compile(rb"[-+]?\d[\d.]*").search(data, start, start + 2000):
        data[match.start() : match.end()] = NUMBERS[rng.integers(len(NUMBERS))].encode()


def _structure(data: bytearray, rng: np.random.Generator) -> None:
    """Deletes, doubles or moves what stands from one tag of XML to another, or from one line to another."""
    mark = b"<" if b"</" in data[-200:] else b"\n"
    start = end = data.find(mark, _place(data, rng))
    for _ in range(rng.integers(1, 5)):
        end = data.find(mark, end + 1)
    if not 0 <= start < end:
        return
    piece, kind = bytes(data[start:end]), rng.integers(3)
    if kind != 1:
        del data[start:end]
    if kind != 0:
        place = data.find(mark, _place(data, rng))
        data[place:place] = piece


KINDS = [_flip, _flip, _cut, _delete, _insert, _repeat, _word, _word, _number, _number, _structure]


def without_checksums() -> None:
    """Readers of this process compare none from here on."""
    ecg_formats_binary._check_crc = lambda *_: None
    ecg_formats_wfdb._check_samples = lambda *_: None
    zipfile.ZipExtFile._update_crc = lambda *_: None


def read(name: str, contents: dict[str, bytes], rng: np.random.Generator, folder: Path) -> None:
    """Reads a record as some caller would; raises what the reader raises."""
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    kind = rng.integers(4)
    if kind == 0 and len(contents) == 1:
        find_records(folder / next(iter(contents)))
    elif kind == 1:
        read_ecg(folder / name, lead_names=STANDARD_LEADS, unit="uV")
    else:
        read_ecg(folder / name, sampling_rate=500 if kind == 2 else None, long_gaps=kind == 3)


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) * 1024


def mutation(number: int, seed: int, files: list) -> tuple[str, str, dict[str, bytes], np.random.Generator]:
    rng = np.random.default_rng([seed, number])
    kinds = sorted({kind for kind, *_ in files})
    kind = kinds[number % len(kinds)]  # each format as often
    of_kind = [file for file in files if file[0] == kind]
    _, name, contents = of_kind[rng.integers(len(of_kind))]
    victim = list(contents)[rng.integers(len(contents))] if rng.random() < 0.3 else name.partition("#")[0]
    return kind, name, {**contents, victim: mutated(contents[victim], rng)}, rng


def work(numbers: range, seed: int, files: list, present: mmap, output: Any) -> None:
    """What a process does: reads the mutations, and writes a line for each: number, format, and what came of it."""

    def time_up(*_: Any) -> None:
        raise TimeUpError

    signal.signal(signal.SIGPROF, time_up)  # of CPU time: others may keep the machine busy
    signal.signal(signal.SIGALRM, time_up)  # of one that waits for ever
    resource.setrlimit(resource.RLIMIT_AS, (HARD_BYTES, HARD_BYTES))  # above it a MemoryError, not a full machine
    with tempfile.TemporaryDirectory() as temporary:
        for number in numbers:
            present[:8] = number.to_bytes(8, "little")
            kind, name, contents, rng = mutation(number, seed, files)
            if rng.random() < 0.5 and number % 2:
                without_checksums()  # for the rest of this process, which is short
            Path("/proc/self/clear_refs").write_text("5")
            before, start = peak_bytes(), time.process_time()
            signal.setitimer(signal.ITIMER_PROF, HARD_SECONDS)
            signal.alarm(20 * HARD_SECONDS)
            outcome = "read"
            try:
                read(name, contents, rng, Path(temporary))
            except (ValueError, OSError):
                outcome = "refused"
            except TimeUpError:
                outcome = "TIME"
            except BaseException as error:
                outcome = f"{type(error).__name__}: {traceback.extract_tb(error.__traceback__)[-1].name}: {str(error)[:100]!r}"
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            seconds, size = time.process_time() - start, peak_bytes() - before
            if seconds > MAX_SECONDS:
                outcome = f"TIME {seconds:.1f} s"
            if size > MAX_BYTES:
                outcome = f"MEMORY {size / 2**20:.0f} MiB"
            output.write(f"{number}\t{kind}\t{outcome}\n")
            output.flush()


def run(numbers: range, seed: int, files: list, chunk: int = 200) -> dict[str, Counter[str]]:
    """What came of the mutations, by format."""
    outcomes: dict[str, Counter[str]] = {}
    start = numbers.start
    while start < numbers.stop:
        part = range(start, min(start + chunk, numbers.stop))
        present = mmap(-1, 8)
        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    work(part, seed, files, present, output)
                    code = 0
                finally:
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            output.seek(0)
            lines = [line.rstrip("\n").split("\t", 2) for line in output]
        start = part.stop
        if status:  # the reader took the process down with it
            number = int.from_bytes(present[:8], "little")
            lines.append([str(number), mutation(number, seed, files)[0], f"CRASH {status}"])
            start = number + 1
        for number, kind, outcome in lines:
            counts = outcomes.setdefault(kind, Counter())
            if outcome not in ("read", "refused"):
                print(f"mutation {number} of {kind}: {outcome}", flush=True)
                outcome = outcome.split()[0].rstrip(":")
            counts[outcome] += 1
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=30_000, help="default: %(default)s")
    parser.add_argument("--first", type=int, default=0, help="number of the first; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--only", type=int, metavar="NUMBER", help="read this mutation in this process, with its traceback"
    )
    args = parser.parse_args()
    files = whole_files()
    if args.only is not None:
        kind, name, contents, rng = mutation(args.only, args.seed, files)
        if rng.random() < 0.5 and args.only % 2:
            without_checksums()
        print(f"{kind}: {name}, { ({file: len(content) for file, content in contents.items()}) } bytes", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            read(name, contents, rng, Path(folder))
        return
    outcomes = run(range(args.first, args.first + args.mutations), args.seed, files)
    columns = [
        "read",
        "refused",
        *sorted({name for counts in outcomes.values() for name in counts} - {"read", "refused"}),
    ]
    print("| format | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 1) + "|")
    for kind, counts in sorted(outcomes.items()):
        print(f"| {kind} | " + " | ".join(str(counts[name]) for name in columns) + " |")
    total = sum(counts.total() for counts in outcomes.values())
    found = sum(counts.total() - counts["read"] - counts["refused"] for counts in outcomes.values())
    print(
        f"{total:,} damaged files: {found} with another exception, over {MAX_SECONDS:g} s or over {MAX_BYTES / 2**20:g} MiB."
    )


if __name__ == "__main__":
    main()
