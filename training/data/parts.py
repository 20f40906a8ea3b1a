"""A part of a dataset: some records of one split and the questions about them, which one process reads and writes."""

import gc
import os
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import Value, parent_process
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from elm_ecg.ecg_utils import ZERO_CROSSINGS, ECGRecord, as_record, cut_windows, resample, window_starts
from elm_ecg.training.data.arguments import BuildArguments
from elm_ecg.training.data.questions import QuestionRow
from elm_ecg.training.data.schema import stored_name

PART_RECORDS = 512  # what a killed process has to do again, at most; 10 s at 500 Hz: 30 MB
# limits of a row group, which is what a reader of a stream holds in memory at once
ROW_GROUP_RECORDS = 100
ROW_GROUP_BYTES = 32 * 2**20

Result = TypeVar("Result")
_read_records: Any = None  # of a process of a pool: the counter that its parent shows


@dataclass(frozen=True)
class Part:
    """What one process has to know of its records and questions."""

    split: str
    number: int  # from 0
    of: int  # how many parts the split has
    locations: Mapping[str, Any]  # record -> what `as_record` reads
    questions: list[QuestionRow]  # whose first record is one of these
    about: Mapping[str, Mapping[str, Any]]  # record -> what is stored beside it
    in_rows: tuple[str, ...]  # which of this the rows of the questions have too
    several: bool  # rows are lists of ECGs
    # of the questions that compare: record of another part -> name of that part and location
    elsewhere: Mapping[str, tuple[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As files of several parts are called on the Hub: train-00003-of-00012."""
        return part_name(self.split, self.number, self.of)


def part_name(split: str, number: int, of: int) -> str:
    """The name of a part of a split."""
    return f"{split}-{number:05d}-of-{of:05d}"


@dataclass
class Found:
    """What a part holds, and what was left out of it; as JSON it says that the part is done."""

    rows: int = 0
    ecgs: int = 0
    rates: Counter[str] = field(default_factory=Counter)  # of the ECGs, as those below
    leads: Counter[str] = field(default_factory=Counter)
    seconds: Counter[float] = field(default_factory=Counter)
    notices: Counter[str] = field(default_factory=Counter)  # sentence -> how many records it is about
    unreadable: dict[str, str] = field(default_factory=dict)  # record -> why
    gaps: dict[str, int] = field(default_factory=dict)  # record -> its windows with a gap
    without: list[str] = field(default_factory=list)  # records of which nothing is stored

    def add(self, other: "Found") -> None:
        """Takes over what another part holds."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(value, int):
                setattr(self, name, mine + value)
            elif isinstance(value, list):
                mine.extend(value)
            else:
                mine.update(value)  # counters add up

    def as_dict(self) -> dict[str, Any]:
        """For JSON, whose keys are texts."""
        return {**vars(self), "seconds": list(self.seconds.items())}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Found":
        """Of `as_dict`."""
        counts = {name: Counter(content[name]) for name in ("rates", "leads", "notices")}
        return cls(**{**content, **counts, "seconds": Counter(dict(content["seconds"]))})


class Block(NamedTuple):
    """Successive records, as many as a row group has, and the rows about them."""

    ecgs: list[dict[str, Any]]  # `id`, the members of `schema.ECG`, and what is said of the record
    rows: list[dict[str, Any]]  # `ecg` is the path of what is stored, or a list of these


class RecordECGs(NamedTuple):
    """What a record gives: its ECG, or windows with the second in which each begins; notices; how many windows have a gap."""

    windows: list[tuple[float, dict[str, Any]]]
    notices: tuple[str, ...] = ()
    num_gaps: int = 0


def read_ecgs(location: Any, options: BuildArguments) -> RecordECGs:
    """The ECGs that a record gives: itself, or its windows without a gap.

    Raises:
        ValueError: it cannot be read, or exceeds what 16-bit microvolts hold.
        OSError: likewise.
    """
    has_windows, whole = options.window is not None, options.resample is None
    record = as_record(location, options.sampling_rate, options.lead_names, options.unit, has_windows, whole)
    if record.array.dtype != np.int16:
        record = _in_microvolts(record, options.resample)
    windows, num_gaps = [record], 0
    if options.window is not None:
        windows = cut_windows(record, options.window, options.stride)
        num_gaps = len(window_starts(record, options.window, options.stride)) - len(windows)
    about = {"sampling_rate": record.sampling_rate, "lead_names": list(record.lead_names), "unit": "uV"}
    ecgs = [(window.metadata.get("start_second", 0.0), {"array": window.array, **about}) for window in windows]
    return RecordECGs(ecgs, record.metadata.get("notices", ()), num_gaps)


def _in_microvolts(record: ECGRecord, rate: float | None) -> ECGRecord:
    """A record of millivolts as int16 microvolts, at that sampling rate or its own; ValueError if 16 bits do not hold them."""
    rate = record.sampling_rate if rate is None else rate
    # filters and normalisation are the model's business: a dataset keeps what was recorded
    microvolts = 1000 * resample(record.array, record.sampling_rate, rate)  # from millivolts
    np.rint(microvolts, out=microvolts)
    limits = np.iinfo(np.int16)  # beyond them, `astype(np.int16)` would wrap around
    if microvolts.min() < limits.min or microvolts.max() > limits.max:
        raise ValueError(
            f"It reaches {abs(microvolts).max() / 1000:.6g} mV, and 16-bit microvolts hold at most 32.767 mV; is its "
            "unit right (--unit)?"
        )
    # what is filled into a gap reaches as far as the filter of resampling
    reach = 0.0 if rate == record.sampling_rate else ZERO_CROSSINGS / min(rate, record.sampling_rate)
    gaps = [(start - reach, end + reach) for start, end in record.metadata.get("gaps", ())]
    metadata = {**record.metadata, "gaps": gaps}
    return replace(record, array=microvolts.astype(np.int16), sampling_rate=rate, metadata=metadata)


def read_part(part: Part, options: BuildArguments, found: Found) -> Iterator[Block]:
    """The records of a part with the rows about them, block by block; counts in `found` what there is and is not.

    Raises:
        ValueError: a record cannot be read, and `skip_unreadable` is not set.
    """
    place = {record: index for index, record in enumerate(part.locations)}
    questions = defaultdict(list)
    for question in part.questions:  # rows follow when the last of their records was read
        questions[max((r for r in question.records if r in place), key=place.__getitem__)].append(question)
    windows: dict[str, list[float]] = {}  # record -> where those that are stored begin
    ecgs: list[dict[str, Any]] = []
    size = 0
    pending: list[str] = []  # records that are read, whose rows are to follow

    def is_full() -> bool:
        return len(ecgs) >= ROW_GROUP_RECORDS or size >= ROW_GROUP_BYTES

    for record, location in part.locations.items():
        read = _read(record, location, options, found)
        windows[record] = [start for start, _ in read.windows]
        found.notices.update(set(read.notices))
        if read.num_gaps:
            found.gaps[record] = read.num_gaps
        if not read.windows:
            found.without.append(record)
        for start, ecg in read.windows:
            if is_full():  # of the windows of a long recording; the rows about them follow when all are known
                yield Block(ecgs, _rows(part, pending, questions, windows, options, found))
                ecgs, size, pending = [], 0, []
            found.ecgs += 1
            found.rates[f"{ecg['sampling_rate']:g} Hz"] += 1
            found.leads[" ".join(ecg["lead_names"])] += 1
            found.seconds[ecg["array"].shape[1] / ecg["sampling_rate"]] += 1
            key = _key(record, start if options.window is not None else None)
            ecgs.append({"id": key, "start_second": start, **ecg, **part.about.get(record, {})})
            size += ecg["array"].nbytes
        pending.append(record)
        if _read_records is not None:
            with _read_records.get_lock():
                _read_records.value += 1
        if is_full():
            yield Block(ecgs, _rows(part, pending, questions, windows, options, found))
            ecgs, size, pending = [], 0, []
    if pending:
        yield Block(ecgs, _rows(part, pending, questions, windows, options, found))


def _read(record: str, location: Any, options: BuildArguments, found: Found) -> RecordECGs:
    try:
        return read_ecgs(location, options)
    except (ValueError, OSError) as error:
        if not options.skip_unreadable:
            raise ValueError(
                f"Cannot read the record {record}: {error} (--skip_unreadable leaves such out.)"
            ) from error
        found.unreadable[record] = str(error)
        return RecordECGs([])


def _key(record: str, start: float | None) -> str:
    """How what is stored of a record is called: a window by where it begins."""
    # recordings of days have windows that begin at 100000.5 s, which are more digits than `:g` writes
    return record if start is None else f"{record}@{start:.12g}"


def _rows(
    part: Part,
    records: list[str],
    questions: Mapping[str, list[QuestionRow]],
    windows: dict[str, list[float]],
    options: BuildArguments,
    found: Found,
) -> list[dict[str, Any]]:
    """The rows of the questions that can be asked once these were read; of a record cut into windows as many as it has."""
    rows: list[dict[str, Any]] = []
    for question in (question for record in records for question in questions[record]):
        for record in question.records:
            if record not in windows:  # of another part, which stores it
                read = _read(record, part.elsewhere[record][1], options, Found()) if options.skip_unreadable else None
                windows[record] = [0.0] if read is None else [start for start, _ in read.windows]
        if all(windows[record] for record in question.records):
            starts = windows[question.records[0]] if options.window is not None else [None]
            rows += [_row(part, question, start) for start in starts]
    found.rows += len(rows)
    return rows


def _row(part: Part, question: QuestionRow, start: float | None) -> dict[str, Any]:
    places = []
    for record in question.records:
        name = part.name if record in part.locations else part.elsewhere[record][0]
        places.append(stored_name(name, _key(record, start)))
    about = [part.about.get(record, {}) for record in question.records]
    columns: dict[str, Any] = {
        "ecg": places,
        "record_id": list(question.records),
        "start_second": [start],
        "patient_id": list(question.patients),
        **{name: [values.get(name) for values in about] for name in part.in_rows if name != "patient_id"},
    }
    if not part.several:
        columns = {name: values[0] for name, values in columns.items()}
    return {**columns, "messages": question.messages, **question.columns}


def ecg_table(ecgs: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """The ECGs of a block as a table. Each array is a chunk of its own: it is not copied, and what is made of it when it is encoded
    stays in the cache."""
    types = {name: schema.field(name).type for name in schema.names}
    columns = {name: pa.array([ecg.get(name) for ecg in ecgs], types[name]) for name in types if name != "array"}
    signals = [
        pa.ListArray.from_arrays(np.array([0, ecg["array"].size], np.int32), ecg["array"].ravel(), types["array"])
        for ecg in ecgs
    ]
    columns["array"] = pa.chunked_array(signals, types["array"])
    return pa.table(columns, schema=schema)


def in_processes(
    work: Callable[[Part], Result], parts: Iterable[Part], num_proc: int, watch: Callable[[int], Any]
) -> Iterator[tuple[Part, Result]]:
    """Each part with what `work` gives for it, as soon as it is done.

    Args:
        num_proc: processes; 1 works in this one.
        watch: called now and then with the number of records that were read since.

    Raises:
        ValueError: as `work`; or a process was killed, as where memory is short.
    """
    if num_proc == 1:
        _keep_memory()
        for part in parts:
            result = work(part)
            watch(len(part.locations))
            yield part, result
        return
    counter = Value("q", 0)
    shown = 0
    with ProcessPoolExecutor(num_proc, initializer=_start_process, initargs=(counter,)) as pool:
        todo, pending = iter(parts), dict[Future[Result], Part]()
        try:
            while True:
                # few ahead: each part that waits holds its questions
                while len(pending) < 2 * num_proc and (one := next(todo, None)) is not None:
                    pending[pool.submit(work, one)] = one
                if not pending:
                    return
                done, _ = wait(pending, 0.5, FIRST_COMPLETED)
                now = counter.get_obj().value  # without its lock, which a process that was killed may hold
                watch(now - shown)
                shown = now
                for future in done:
                    yield pending.pop(future), future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                "A process that read records was killed, perhaps for want of memory. The same command goes on from here; a smaller "
                "--num_proc needs less memory."
            ) from error
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            # nobody waits for parts that have begun, as for those of an error
            for process in list(pool._processes.values()):  # private: before Python 3.14 there is no public way
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _start_process(counter: Any) -> None:
    global _read_records
    _read_records = counter
    gc.freeze()  # the plan is no garbage, and looking through it again and again takes time, and memory as its pages are copied
    _keep_memory()
    os.environ["OMP_NUM_THREADS"] = "1"  # of PyTorch, where a process imports it
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # its threads do not survive a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the main process, and that ends this one
    Thread(target=_end_with_parent, daemon=True).start()


def _keep_memory() -> None:
    """Has the memory of a block of records serve the next one: the C library of Linux else gives it back to the system, and takes it
    anew page by page. It keeps twice the size of the largest array that it has seen freed, of those below 32 MiB."""
    np.empty(31 * 2**20, np.uint8)


def _end_with_parent() -> None:
    """Ends this process after the one that started it, which cannot do so if it was killed."""
    parent = parent_process()
    assert parent is not None  # this is a process of a pool
    parent.join()
    os._exit(1)
