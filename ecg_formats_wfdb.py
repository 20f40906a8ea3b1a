"""ECG files of WFDB, PhysioNet's format: a header NAME.hea and the signal files that it names."""

import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from .ecg_formats_common import (
    MAX_FILE_BYTES,
    MAX_SAMPLES,
    NOTHING_GIVEN,
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


def _wfdb_signals(header: Path) -> tuple[list[bytes], float, list[dict[str, str]]]:
    """Lines, frames per second and the fields of a header's signal lines, checked against the signal files."""
    with header.open("rb") as file:
        content = file.read(_MAX_HEADER_BYTES + 1)  # one more shows that it is longer
    lines = content_lines(content)
    if len(content) > _MAX_HEADER_BYTES or max(map(len, lines)) > _MAX_HEADER_LINE:
        raise ValueError(f"its header is longer than {_MAX_HEADER_BYTES} bytes, or a line than {_MAX_HEADER_LINE}.")
    if not all(line.isascii() for line in lines):  # wfdb drops the mu of "μV"
        raise ValueError("its header holds other characters than ASCII; write a unit as mV or uV.")
    if "::" in str(header.absolute()):  # fsspec, below wfdb, would take it for a chain of addresses
        raise ValueError("its path holds '::'; rename the folder.")
    patterns = library("wfdb.io.header")  # wfdb's own, so that it reads what was checked here
    record = patterns.rx_record.match(lines[0].decode())
    if record["n_seg"]:
        segments = [line.split()[0].decode() for line in lines[1:6]]
        raise ValueError(f"it is a record of several segments ({', '.join(segments)} ...); read them one by one.")
    signals = []
    for line in map(bytes.decode, lines[1:]):
        match = patterns.rx_signal.match(line)
        if match is None:
            raise ValueError(
                f"its line {line[:80]!r} describes no signal; expected the plain name of a file in the header's folder, a "
                "format, and what follows."
            )
        signals.append(match.groupdict())
    if len(signals) != int(record["n_sig"]) or not signals:
        raise ValueError(f"its header announces {record['n_sig']} signals and describes {len(signals)}; it is cut.")
    if not content.endswith(b"\n") and len(lines[-1].split()) < len(lines[1].split()):
        raise ValueError("its header is cut in the last line.")
    frames = int(record["sig_len"] or 0)  # 0: not stated
    groups = [(name, list(parts)) for name, parts in groupby(signals, key=lambda signal: signal["file_name"])]
    if len({name for name, _ in groups}) < len(groups):  # wfdb would take one signal for another
        raise ValueError("its header describes the signals of one file in several places.")
    for name, parts in groups:
        file = header.parent / name
        if not file.is_file():
            raise ValueError(f"its signal file {name!r} is not beside the header; fetch it too.")
        size, wfdb_format = file.stat().st_size, parts[0]["fmt"]
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{name} has {size} bytes; expected at most {MAX_FILE_BYTES / 2**20:g} MiB.")
        per_frame = sum(int(signal["samps_per_frame"] or 1) for signal in parts)  # a fast signal has several
        skew = max(int(signal["skew"] or 0) for signal in parts)
        if wfdb_format in _BITS_PER_SAMPLE:
            required = math.ceil(frames * per_frame * _BITS_PER_SAMPLE[wfdb_format] / 8)
            required += int(parts[0]["byte_offset"] or 0)
            if required > size:
                raise ValueError(f"{name} is cut: it has {size} bytes, the header claims {required}.")
        elif wfdb_format not in _FLAC_FORMATS:
            raise ValueError(f"{name} is of format {wfdb_format!r}, which wfdb does not read.")
        elif not 0 < frames * per_frame <= MAX_SAMPLES:
            raise ValueError(f"{name} unpacks to {frames * per_frame} samples; expected 1 to {MAX_SAMPLES}.")
        if skew * per_frame > max(size, frames * per_frame):
            raise ValueError(f"{name} has a skew of {skew} frames, more than it holds.")
    return content.splitlines(), float(record["fs"] or 250), signals  # 250: the standard's default


@contextmanager
def _readable(header: Path, lines: list[bytes]) -> Iterator[str]:
    """The record's path without suffix, as wfdb takes it: that of a copy where it could not read the time or date."""
    place = next(index for index, line in enumerate(lines) if line.strip() and not line.lstrip().startswith(b"#"))
    fields = lines[place].split()
    if len(fields) <= 4 or _is_moment([field.decode("latin-1") for field in fields[4:]]):
        yield str(header.absolute().with_suffix(""))
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = [*lines[:place], b" ".join(fields[:4]), *lines[place + 1 :]]
        (Path(folder) / "record.hea").write_bytes(b"\n".join(copy) + b"\n")
        for name in {line.split()[0].decode("latin-1") for line in content_lines(b"\n".join(lines[place + 1 :]))}:
            file = (header.parent / name).absolute()
            try:
                (Path(folder) / name).symlink_to(file)
            except OSError:  # Windows asks for a right
                shutil.copyfile(file, Path(folder) / name)
        yield str(Path(folder) / "record")


def _is_moment(fields: list[str]) -> bool:
    """Whether these are a time, and perhaps a date, in the only form that the standard has."""
    time, *date = fields
    layout = "%H:%M:%S.%f" if "." in time else "%H:%M:%S"
    try:
        datetime.strptime(" ".join([time, *date]), " ".join([layout, "%d/%m/%Y"][: len(fields)]))
    except ValueError:
        return False
    return True


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


def read_wfdb(header: Path, given: Given = NOTHING_GIVEN) -> dict[str, Any]:
    """A WFDB record; its header is checked before the library wfdb reads the signal files, its checksums after."""
    lines, frame_rate, signals = _wfdb_signals(header)
    names = [signal["sig_name"].strip() for signal in signals]
    units = [signal["units"] or "mV" for signal in signals]  # the standard's default
    rates = [frame_rate * int(signal["samps_per_frame"] or 1) for signal in signals]
    chosen = select_signals(names, units, rates, given)
    with _readable(header, lines) as path:
        record = library("wfdb").rdrecord(path, channels=chosen.rows, smooth_frames=False, physical=False)
    for row, samples in zip(chosen.rows, record.e_d_signal, strict=True):
        _check_samples(names[row] or str(row), signals[row], samples)
    record.dac(expanded=True, inplace=True)  # to physical units
    comments = [comment.strip() for comment in record.comments]
    facts = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in comments)}
    metadata = stated(
        age=to_number(facts.get("age", "")),
        sex=to_sex(facts.get("sex", "")),
        dx=facts.get("dx"),
        date=record.base_date and record.base_date.isoformat(),
        comments=comments,
        left_out=chosen.left_out,
    )
    return {
        "array": np.stack(
            [in_millivolts(signal, unit) for signal, unit in zip(record.e_p_signal, chosen.units, strict=True)]
        ),
        "sampling_rate": rates[chosen.rows[0]],
        "lead_names": chosen.lead_names if any(chosen.lead_names) else None,
        "unit": "mV",
        "metadata": {"format": "WFDB", **metadata},
    }
