"""ECG files of WFDB, PhysioNet's format: a header NAME.hea and the signal files that it names."""

import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .ecg_formats_common import (
    MAX_FILE_BYTES,
    MAX_SAMPLES,
    NOTHING_GIVEN,
    PER_MILLIVOLT_IN_ANY_CASE,
    Given,
    content_lines,
    in_millivolts,
    library,
    select_signals,
    stated,
    to_number,
    to_sex,
)

# https://wfdb.io/spec/header-files.html

_MAX_HEADER_BYTES = 2**18
# the standard says 255; wfdb's patterns take time with the square of a line
_MAX_HEADER_LINE = 1000
# by format; 212 packs two samples into three bytes, 310 and 311 three into four
_BITS_PER_SAMPLE = {"8": 8, "16": 16, "24": 24, "32": 32, "61": 16, "80": 8, "160": 16, "212": 12, "310": 32 / 3}
_BITS_PER_SAMPLE["311"] = _BITS_PER_SAMPLE["310"]
_FLAC_FORMATS = ("508", "516", "524")  # compressed: their size says nothing about the number of samples
# integers of 16 bits, as in most large data sets: read here, as wfdb takes ten times as long over the header alone
_PLAIN_FORMAT, _PLAIN_GAP = "16", -(2**15)
# wfdb's patterns take what they know of a field, and the rest for the next one: of "1_000/mV" a gain of 1. The
# name of a signal may stand in the place of its gain
_FORMAT_FIELD = re.compile(r"\d+(x\d+)?(:\d+)?(\+\d+)?")
_GAIN_FIELD = re.compile(r"-?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?(\(-?\d+\))?(/\S*)?|(?![-.(\d]).*")
_DEFAULT_GAIN = 200.0  # counts in a unit, where a header says nothing or 0


def is_wfdb_header(content: bytes) -> bool:
    """A line `NAME[/SEGMENTS] SIGNALS [RATE [LENGTH [TIME [DATE]]]]`, and none of numbers after it, as in a table.

    What stands in the place of time and date may be anything: published headers write dates in many ways.
    """
    record, signal = [*content_lines(content[:4096]), b"", b""][:2]
    return bool(
        re.fullmatch(rb"[-\w]+(/\d+)?[ \t]+\d+([ \t]+[-+\d.eE/()]+([ \t]+\d+([ \t]+[^,;]*)?)?)?", record)
        and not re.fullmatch(rb"[-+\d.eE \t]+", signal)
    )


def wfdb_header(path: Path) -> Path | None:
    """The header of the WFDB record that `path` stands for: itself, its name without suffix, or one of its signals."""
    header = path.with_name(f"{path.name}.hea") if not path.exists() else path.with_suffix(".hea")
    if header == path or not header.is_file() or _fault_of(header, path):
        return None  # a header itself is told by its content
    return header


def header_fault(path: Path) -> str | None:
    """Why the header beside a file does not tell how to read it; None where there is none."""
    header = path.with_suffix(".hea")
    return _fault_of(header, path) if header != path and header.is_file() else None


def _fault_of(header: Path, path: Path) -> str | None:
    size = header.stat().st_size
    if size > _MAX_HEADER_BYTES:
        return f"{header.name} has {size} bytes; expected at most {_MAX_HEADER_BYTES}."
    content = header.read_bytes()
    lines = content_lines(content)
    if not is_wfdb_header(content):
        first = lines[0][:80].decode("latin-1") if lines else ""
        return f"{header.name} begins with {first!r}; expected NAME SIGNALS RATE LENGTH, then a line for each signal."
    files = [line.split()[0] for line in lines[1:]]  # the name of its file stands first
    if path.exists() and os.fsencode(path.name) not in files:
        named = ", ".join(dict.fromkeys(name[:60].decode("latin-1") for name in files[:6]))
        return f"{header.name} describes the signals of {named or 'no file'}, not of {path.name}."
    return None


def signal_files(header: Path) -> list[Path]:
    """The files that a header names, be they there or not; none where it cannot be read, or is no header."""
    try:
        content = header.read_bytes() if header.stat().st_size <= _MAX_HEADER_BYTES else b""
    except OSError:  # reading the record says why
        return []
    if not is_wfdb_header(content):
        return []
    names = dict.fromkeys(os.fsdecode(line.split()[0]) for line in content_lines(content)[1:])
    return [header.parent / Path(name).name for name in names]


@dataclass(frozen=True)
class _Header:
    """What a header says, checked against its signal files.

    Args:
        lines: all that are no comments.
        comments: without their mark.
        frame_rate: frames per second.
        frames: their number, 0 where the header does not say it.
        files: name of each signal file, and the fields of its signals.
    """

    lines: list[bytes]
    comments: list[str]
    frame_rate: float
    frames: int
    files: list[tuple[str, list[dict[str, str]]]]

    @property
    def signals(self) -> list[dict[str, str]]:
        """The fields of all signals, in the order of the header."""
        return [signal for _, signals in self.files for signal in signals]

    @property
    def moment(self) -> list[str]:
        """What stands in the place of time and date."""
        return [field.decode("ascii") for field in self.lines[0].split()[4:]]


def _wfdb_header(path: Path) -> _Header:
    with path.open("rb") as file:
        content = file.read(_MAX_HEADER_BYTES + 1)  # one more shows that it is longer
    lines = content_lines(content)
    if len(content) > _MAX_HEADER_BYTES or max(map(len, lines)) > _MAX_HEADER_LINE:
        raise ValueError(f"its header is longer than {_MAX_HEADER_BYTES} bytes, or a line than {_MAX_HEADER_LINE}.")
    if not all(line.isascii() for line in lines):  # wfdb drops the mu of "μV"
        raise ValueError("its header holds other characters than ASCII; write a unit as mV or uV.")
    patterns = library("wfdb.io.header")  # wfdb's own, so that it reads what was checked here
    record = patterns.rx_record.match(lines[0].decode())
    if record["n_seg"]:
        segments = [line.split()[0].decode() for line in lines[1:6]]
        raise ValueError(f"it is a record of several segments ({', '.join(segments)} ...); read them one by one.")
    signals = []
    for line in map(bytes.decode, lines[1:]):
        match = patterns.rx_signal.match(line)
        _, wfdb_format, gain = [*line.split(), "", ""][:3]
        if match is None or not _FORMAT_FIELD.fullmatch(wfdb_format) or not _GAIN_FIELD.fullmatch(gain):
            raise ValueError(
                f"its line {line[:80]!r} describes no signal; expected the plain name of a file in the header's folder, a "
                "format such as 16, a gain such as 1000(0)/mV, and what follows."
            )
        signals.append(match.groupdict())
    if len(signals) != int(record["n_sig"]) or not signals:
        raise ValueError(f"its header announces {record['n_sig']} signals and describes {len(signals)}; it is cut.")
    if not content.endswith(b"\n") and len(lines[-1].split()) < len(lines[1].split()):
        raise ValueError("its header is cut in the last line.")
    files = [(name, list(parts)) for name, parts in groupby(signals, key=lambda signal: signal["file_name"])]
    if len({name for name, _ in files}) < len(files):  # wfdb would take one signal for another
        raise ValueError("its header describes the signals of one file in several places.")
    frames = int(record["sig_len"] or 0)
    for name, parts in files:
        _check_file(path.parent / name, parts, frames)
    comments = [line.strip(b" \t#") for line in map(bytes.strip, content.splitlines()) if line.startswith(b"#")]
    return _Header(
        lines,
        [comment.decode("utf-8", "replace") for comment in comments],
        float(record["fs"] or 250),  # the standard's default
        frames,
        files,
    )


def _check_file(file: Path, signals: list[dict[str, str]], frames: int) -> None:
    """ValueError where a signal file is not there, or does not hold so many frames of these signals."""
    name = file.name
    if not file.is_file():
        raise ValueError(f"its signal file {name!r} is not beside the header; fetch it too.")
    size, wfdb_format = file.stat().st_size, signals[0]["fmt"]
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{name} has {size} bytes; expected at most {MAX_FILE_BYTES / 2**20:g} MiB.")
    if file.suffix.lower() == ".mat":
        with file.open("rb") as mat:
            version = re.match(rb"MATLAB (\d\.\d)", mat.read(10))
        if version:  # its head would be taken for samples
            raise ValueError(
                f"{name} is of MATLAB {version[1].decode()}, and headers describe MATLAB 4; save it with -v4."
            )
    per_frame = sum(_samples_per_frame(signal) for signal in signals)
    skew = max(int(signal["skew"] or 0) for signal in signals)
    if wfdb_format in _BITS_PER_SAMPLE:
        required = math.ceil(frames * per_frame * _BITS_PER_SAMPLE[wfdb_format] / 8)
        required += int(signals[0]["byte_offset"] or 0)
        if required > size:
            raise ValueError(f"{name} is cut: it has {size} bytes, the header claims {required}.")
    elif wfdb_format not in _FLAC_FORMATS:
        raise ValueError(f"{name} is of format {wfdb_format!r}, which wfdb does not read.")
    elif not 0 < frames * per_frame <= MAX_SAMPLES:
        raise ValueError(f"{name} unpacks to {frames * per_frame} samples; expected 1 to {MAX_SAMPLES}.")
    if skew * per_frame > max(size, frames * per_frame):
        raise ValueError(f"{name} has a skew of {skew} frames, more than it holds.")


def _samples_per_frame(signal: dict[str, str]) -> int:
    """A fast signal has several in each frame."""
    samples = int(signal["samps_per_frame"] or 1)
    if not samples:
        raise ValueError(f"{signal['file_name']} has 0 samples of a signal in each frame; expected 1 or more.")
    return samples


def _plain_counts(folder: Path, header: _Header, rows: list[int]) -> list[np.ndarray]:
    """Counts of signals, each [samples]. All are of `_PLAIN_FORMAT`, none is skewed."""
    counts, frames = [], header.frames
    for name, signals in header.files:
        ends = np.cumsum([0, *map(_samples_per_frame, signals)])
        data = np.fromfile(
            folder / name, "<i2", frames * ends[-1] if frames else -1, offset=int(signals[0]["byte_offset"] or 0)
        )
        frames = frames or len(data) // ends[-1]  # of the first file, where the header does not say it
        if not frames:
            raise ValueError(f"{name} holds no samples.")
        if len(data) < frames * ends[-1]:
            raise ValueError(f"{name} is cut: it holds {len(data)} samples, expected {frames * ends[-1]}.")
        table = data[: frames * ends[-1]].reshape(frames, -1)
        counts += [np.ascontiguousarray(table[:, start:end]).reshape(-1) for start, end in pairwise(ends)]
    return [counts[row] for row in rows]


def _scale(signal: dict[str, str]) -> tuple[float, float]:
    """Counts in a unit, and the count that is 0."""
    return float(signal["adc_gain"] or 0) or _DEFAULT_GAIN, float(signal["baseline"] or signal["adc_zero"] or 0)


def _plain_values(counts: np.ndarray, signal: dict[str, str]) -> np.ndarray:
    """Values in the signal's unit [samples], NaN in gaps."""
    gain, baseline = _scale(signal)
    values = (counts - baseline) / gain
    values[counts == _PLAIN_GAP] = np.nan
    return values


def _plain_microvolts(counts: list[np.ndarray], signals: list[dict[str, str]], units: list[str]) -> np.ndarray | None:
    """Int16 [signals, samples], to which the millivolts of `_plain_values` would be rounded: these are off by a millionth at most.

    None where a count is no whole number of microvolts, 16 bits do not hold them, or there is a gap.
    """
    table = np.stack(counts)
    factors, baselines = [], []
    for signal, unit, low, high in zip(signals, units, table.min(axis=1), table.max(axis=1), strict=True):
        gain, baseline = _scale(signal)
        factor = 1000 / gain / PER_MILLIVOLT_IN_ANY_CASE[unit.strip().casefold()]
        ends = [(int(count) - baseline) * factor for count in (low, high)]
        whole = factor.is_integer() and 0 < abs(factor) < 2**15
        if low == _PLAIN_GAP or not whole or not all(-(2**15) <= end < 2**15 for end in ends):
            return None
        factors.append([int(factor)])
        baselines.append([int(baseline)])
    # what exceeds 16 bits on the way wraps around, and back: the results do not
    table -= np.array(baselines).astype(np.int16)
    table *= np.array(factors).astype(np.int16)
    return table


def _packed_signals(path: Path, header: _Header, rows: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Counts of signals of any format, and their values in the signal's unit; each [samples]."""
    if "::" in str(path.absolute()):  # fsspec, below wfdb, would take it for a chain of addresses
        raise ValueError("its path holds '::'; rename the folder.")
    with _readable(path, header) as name:
        record = library("wfdb").rdrecord(name, channels=rows, smooth_frames=False, physical=False)
    return record.e_d_signal, record.dac(expanded=True)


@contextmanager
def _readable(path: Path, header: _Header) -> Iterator[str]:
    """The record's path without suffix, as wfdb takes it: that of a copy where it could not read the time or date."""
    if not header.moment or _moment(header.moment):
        yield str(path.absolute().with_suffix(""))
        return
    with tempfile.TemporaryDirectory() as folder:
        lines = [b" ".join(header.lines[0].split()[:4]), *header.lines[1:]]
        (Path(folder) / "record.hea").write_bytes(b"\n".join(lines) + b"\n")
        for name, _ in header.files:
            file = (path.parent / name).absolute()
            try:
                (Path(folder) / name).symlink_to(file)
            except OSError:  # Windows asks for a right
                shutil.copyfile(file, Path(folder) / name)
        yield str(Path(folder) / "record")


def _moment(fields: list[str]) -> datetime | None:
    """A time, and perhaps a date, in the only form that the standard has; None of any other."""
    layout = "%H:%M:%S.%f" if "." in fields[0] else "%H:%M:%S"
    try:
        return datetime.strptime(" ".join(fields), " ".join([layout, "%d/%m/%Y"][: len(fields)]))
    except ValueError:
        return None


def _check_samples(name: str, signal: dict[str, str], samples: np.ndarray) -> None:
    """ValueError where the samples are not those that the header was written for.

    0 is how writers leave a checksum, and a first sample, out. A skewed signal is read from elsewhere than where it was summed up.
    """
    if int(signal["skew"] or 0):
        return
    checksum, expected = int(samples.sum()) % 2**16, int(signal["checksum"] or 0)
    if expected:
        if checksum != expected % 2**16:
            raise ValueError(
                f"the samples of {name!r} have the checksum {checksum}, its header says {expected % 2**16}: one of the two "
                "files is damaged, or of another version. Fetch both anew; if you changed the samples yourself, write 0 for "
                "the checksum."
            )
    elif int(signal["init_value"] or 0) and len(samples) and int(signal["init_value"]) != samples[0]:
        raise ValueError(
            f"{name!r} begins with {samples[0]}, its header says {signal['init_value']}: one of the two files is damaged, or "
            "of another version."
        )


def read_wfdb(path: Path, given: Given = NOTHING_GIVEN) -> dict[str, Any]:
    """A WFDB record by its header, which is checked before the signal files are read, its checksums after."""
    header = _wfdb_header(path)
    signals = header.signals
    names = [signal["sig_name"].strip() for signal in signals]
    units = [signal["units"] or "mV" for signal in signals]  # the standard's default
    rates = [header.frame_rate * _samples_per_frame(signal) for signal in signals]
    chosen = select_signals(names, units, rates, given)
    read = [signals[row] for row in chosen.rows]
    plain = all(signal["fmt"] == _PLAIN_FORMAT and not int(signal["skew"] or 0) for signal in signals)
    if plain:
        counts = _plain_counts(path.parent, header, chosen.rows)
    else:
        counts, values = _packed_signals(path, header, chosen.rows)
    for row, of_row in zip(chosen.rows, counts, strict=True):
        _check_samples(names[row] or str(row), signals[row], of_row)
    array = _plain_microvolts(counts, read, chosen.units) if plain and given.microvolts else None
    unit = "mV" if array is None else "uV"
    if array is None:
        values = list(map(_plain_values, counts, read)) if plain else values
        array = np.stack([in_millivolts(of_row, own) for of_row, own in zip(values, chosen.units, strict=True)])
    facts = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in header.comments)}
    moment = _moment(header.moment) if len(header.moment) == 2 else None  # a time alone is no date
    metadata = stated(
        age=to_number(facts.get("age", "")),
        sex=to_sex(facts.get("sex", "")),
        dx=facts.get("dx"),
        date=moment and moment.date().isoformat(),
        comments=header.comments,
        left_out=chosen.left_out,
    )
    return {
        "array": array,
        "sampling_rate": rates[chosen.rows[0]],
        "lead_names": chosen.lead_names if any(chosen.lead_names) else None,
        "unit": unit,
        "metadata": {"format": "WFDB", **metadata},
    }
