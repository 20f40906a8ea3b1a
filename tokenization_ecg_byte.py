"""ECG-Byte: ECGs as byte-pair tokens over 26 amplitudes (Han et al. 2024, arXiv 2412.14373).

A record's millivolts become letters a (lowest) to z (highest), its leads one string after another, and that string the
longest known tokens from the left. The package `ecg_byte`, written in Rust, does this where it is installed; this file
does the same without it, fifty times slower.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import PushToHubMixin, cached_file
from transformers.utils.logging import tqdm

try:
    import ecg_byte
except ImportError:
    ecg_byte = None  # type: ignore[assignment]

FILE_NAME = "ecg_byte.json"
VERSION = 1
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
FIRST_SYMBOL_ID = ord("a")  # a symbol's id is its byte
FIRST_MERGE_ID = 256  # behind all bytes
EPSILON = np.float32(1e-6)  # of the reference; a flat record becomes the symbol a
KEYS = ("format", "version", "alphabet", "normalization", "millivolt_range", "across_leads", "sampling_rate", "merges")


def _as_float(value: Any) -> float:
    """NaN for what is no number, or more than a float holds."""
    if isinstance(value, bool) or not isinstance(value, Real):  # bool is a Real to Python
        return math.nan
    try:
        return float(value)
    except OverflowError:  # whole numbers of JSON have any length
        return math.nan


def _check_merges(merges: Sequence[str]) -> None:
    places: dict[str, int] = {}
    for place, merge in enumerate(merges):
        unknown = merge.strip(ALPHABET)  # from the first unknown symbol on
        if unknown:
            raise ValueError(f"merge {place} ({merge!r}) holds {unknown[0]!r}; symbols are a to z")
        if len(merge) < 2:
            raise ValueError(
                f"merge {place} ({merge!r}) has {len(merge)} symbol{'s' * (len(merge) != 1)}; expected at least 2"
            )
        if merge in places:
            raise ValueError(f"merge {place} ({merge!r}) is also merge {places[merge]}")
        places[merge] = place


def _check_range(millivolt_range: Any) -> tuple[float, float]:
    pair = [_as_float(value) for value in millivolt_range] if isinstance(millivolt_range, (list, tuple)) else []
    with np.errstate(over="ignore"):
        limits = np.array(pair, np.float32)  # as they are used: a range may vanish, or become infinite, in float32
    if len(pair) != 2 or not -np.inf < limits[0] < limits[1] < np.inf:
        raise ValueError(
            f"millivolt_range is {millivolt_range!r}; expected two finite numbers, low < high, with normalization 'millivolt'"
        )
    return pair[0], pair[1]  # as written, so that saving and loading change nothing


def _check_rate(sampling_rate: Any) -> float:
    rate = _as_float(sampling_rate)
    if not 0 < rate < math.inf:
        raise ValueError(f"sampling_rate is {sampling_rate!r}; expected a positive number or null")
    return rate


def _check_settings(millivolt_range: Any, sampling_rate: Any) -> tuple[tuple[float, float] | None, float | None]:
    return (
        None if millivolt_range is None else _check_range(millivolt_range),
        None if sampling_rate is None else _check_rate(sampling_rate),
    )


def _parse(text: str) -> dict[str, Any]:
    """The arguments of a tokenizer from its file; ValueError says what is wrong with it."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter for lists nested too deeply
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("expected a JSON object")
    for key in KEYS:
        if key not in content:
            raise ValueError(f"missing key {key!r}")
    for key in content:
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}")
    if content["format"] != "ecg_byte":
        raise ValueError(f"format is {content['format']!r}; expected 'ecg_byte'")
    if type(content["version"]) is not int or content["version"] != VERSION:  # true == 1 and 1.0 == 1
        raise ValueError(f"version is {content['version']!r}; this code reads version {VERSION}")
    if content["alphabet"] != ALPHABET:
        raise ValueError(f"alphabet is {content['alphabet']!r}; expected {ALPHABET!r}")
    normalization, millivolt_range = content["normalization"], content["millivolt_range"]
    if normalization not in ("minmax", "millivolt"):
        raise ValueError(f"normalization is {normalization!r}; expected 'minmax' or 'millivolt'")
    if normalization == "millivolt":
        _check_range(millivolt_range)
    elif millivolt_range is not None:
        raise ValueError(f"millivolt_range is {millivolt_range!r}; expected null with normalization 'minmax'")
    if content["sampling_rate"] is not None:
        _check_rate(content["sampling_rate"])
    if not isinstance(content["across_leads"], bool):
        raise ValueError(f"across_leads is {content['across_leads']!r}; expected true or false")
    if not isinstance(content["merges"], list):
        raise ValueError(f"merges is {content['merges']!r}; expected a list of [string, id]")
    merges = []
    for place, entry in enumerate(content["merges"]):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and type(entry[1]) is int):
            raise ValueError(f"merge {place} is {entry!r}; expected [string, id]")
        merge, token_id = entry
        if token_id != FIRST_MERGE_ID + place:
            raise ValueError(f"merge {place} ({merge!r}) has id {token_id}; expected {FIRST_MERGE_ID + place}")
        merges.append(merge)
    return {key: content[key] for key in ("millivolt_range", "across_leads", "sampling_rate")} | {"merges": merges}


def _quantize(ecg: np.ndarray, millivolt_range: tuple[float, float] | None) -> bytes:
    """Symbols of float32 [leads, samples], lead after lead."""
    low, high = ecg.min(), ecg.max()  # of all leads; NaN shows in them
    if not np.isfinite([low, high]).all():
        raise ValueError("The ECG holds NaN or infinite values; expected finite millivolts.")
    with np.errstate(over="ignore"):
        if millivolt_range is None:
            width = high - low + EPSILON
        else:
            low, high = np.float32(millivolt_range[0]), np.float32(millivolt_range[1])
            width = high - low
        if not np.isfinite(width):
            raise ValueError(f"The range from {low} to {high} mV overflows float32; expected millivolts.")
        normalized = np.clip((ecg - low) / width, 0, 1)  # infinite far beyond a fixed range
    indices = np.minimum(np.floor(normalized * np.float32(26)), 25).astype(np.uint8)  # 1.0 belongs to z
    return (indices + np.uint8(FIRST_SYMBOL_ID)).tobytes()


class PythonTokenizer:
    """What `ecg_byte.Tokenizer` does, in Python: the fallback, and the oracle of the tests."""

    def __init__(
        self,
        merges: Sequence[str],
        millivolt_range: tuple[float, float] | None = None,
        across_leads: bool = True,
        sampling_rate: float | None = None,
    ):
        self.millivolt_range, self.sampling_rate = _check_settings(millivolt_range, sampling_rate)
        _check_merges(merges)
        self.merges = list(merges)
        self.across_leads = across_leads
        self._symbols = dict(enumerate(self.merges, FIRST_MERGE_ID)) | {ord(symbol): symbol for symbol in ALPHABET}
        # each node maps a byte to the next node, and None to the id of the token that ends there
        self._trie: dict[int | None, Any] = {}
        for token_id, symbols in self._symbols.items():
            node = self._trie
            for byte in symbols.encode():
                node = node.setdefault(byte, {})
            node[None] = token_id

    @classmethod
    def from_json(cls, text: str) -> "PythonTokenizer":
        """A tokenizer from the content of its file; ValueError says what is wrong with it."""
        return cls(**_parse(text))

    def encode(self, ecg: np.ndarray) -> np.ndarray:
        """Token ids, uint32 [tokens], of float32 [leads, samples] in millivolts."""
        symbols = _quantize(ecg, self.millivolt_range)
        length = len(symbols) if self.across_leads else ecg.shape[1]  # of a piece that no token leaves
        parts = [symbols[start : start + length] for start in range(0, len(symbols), length)]
        return np.array([token_id for part in parts for token_id in self._longest_matches(part)], dtype=np.uint32)

    def _longest_matches(self, symbols: bytes) -> list[int]:
        ids, start = [], 0
        while start < len(symbols):
            node, token_id, end = self._trie[symbols[start]], symbols[start], start + 1  # a symbol is a token
            for place in range(start + 1, len(symbols)):
                node = node.get(symbols[place])
                if node is None:
                    break
                if None in node:  # a longer token ends here
                    token_id, end = node[None], place + 1
            ids.append(token_id)
            start = end
        return ids

    def encode_batch(self, ecgs: Sequence[np.ndarray], num_threads: int | None = None) -> list[np.ndarray]:
        """`encode` of each, one after the other whatever `num_threads` is."""
        return [self.encode(ecg) for ecg in ecgs]

    def decode(self, ids: np.ndarray, low: float, high: float) -> np.ndarray:
        """float32 [samples of all leads] from uint32 [tokens]; ValueError for an id that is no token."""
        for place, token_id in enumerate(ids.tolist()):
            if token_id not in self._symbols:
                raise ValueError(f"id {token_id} at {place} is no token; the last is {255 + len(self.merges)}")
        symbols = "".join([self._symbols[token_id] for token_id in ids.tolist()]).encode()
        levels = np.arange(26, dtype=np.float32) / np.float32(25)  # a is the lowest value, z the highest
        levels = levels * (np.float32(high) - np.float32(low)) + np.float32(low)
        return levels[np.frombuffer(symbols, np.uint8) - np.uint8(FIRST_SYMBOL_ID)]


def train_in_python(
    records: Iterable[np.ndarray],
    num_merges: int,
    millivolt_range: tuple[float, float] | None = None,
    across_leads: bool = True,
    min_frequency: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """What `ecg_byte.train` does, by counting all pairs anew for each merge."""
    border = -1  # between records, and between leads unless tokens may run across them
    pieces = []
    for record in records:
        symbols = np.frombuffer(_quantize(record, millivolt_range), np.uint8).reshape(record.shape).astype(np.int64)
        pieces += [np.append(part, border) for part in ([symbols.ravel()] if across_leads else symbols)]
    tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    symbols_of = {ord(symbol): symbol for symbol in ALPHABET}
    merges: list[str] = []
    while len(merges) < num_merges:
        inside = (tokens[:-1] != border) & (tokens[1:] != border)
        pairs, counts = np.unique((tokens[:-1] << 32 | tokens[1:])[inside], return_counts=True)  # a pair in one number
        if not len(counts) or counts.max() < min_frequency:
            break
        best = int(counts.argmax())  # the first of equals, which is the smallest pair
        left, right = int(pairs[best]) >> 32, int(pairs[best]) & 0xFFFFFFFF
        token_id = FIRST_MERGE_ID + len(merges)
        # a new string: equal stretches are always cut alike, so no other pair has made it before
        symbols_of[token_id] = symbols_of[left] + symbols_of[right]
        merges.append(symbols_of[token_id])
        starts = np.flatnonzero((tokens[:-1] == left) & (tokens[1:] == right))
        if left == right:  # "aaa" holds the pair twice: take every second place of a run
            run_starts = np.flatnonzero(np.diff(starts, prepend=-2) != 1)  # -2: a run may begin at 0
            run_lengths = np.diff(run_starts, append=len(starts))
            starts = starts[(np.arange(len(starts)) - np.repeat(run_starts, run_lengths)) % 2 == 0]
        tokens[starts] = token_id
        tokens = np.delete(tokens, starts + 1)  # the right halves of the pairs
        if progress is not None:
            progress(len(merges), int(counts[best]))
    return merges


class ECGByteTokenizer(PushToHubMixin):
    """ECGs in millivolts to token ids and back.

    The id of a single symbol is its byte, 97 to 122; that of merge i is 256 + i.

    Args:
        merges: strings of symbols a to z, all different, in the order of their ids.
        millivolt_range: (low, high) of the fixed range that the symbols a to z divide; what lies outside is clipped to
            it. None: the range of each record, as in the reference, which loses its amplitude.
        across_leads: whether a token may run from the end of one lead into the next, as in the reference.
        sampling_rate: of the records it was trained on, in hertz, where known.

    Raises:
        ValueError: a merge or the range is invalid.
    """

    def __init__(
        self,
        merges: Sequence[str],
        millivolt_range: tuple[float, float] | None = None,
        across_leads: bool = True,
        sampling_rate: float | None = None,
    ):
        backend = PythonTokenizer if ecg_byte is None else ecg_byte.Tokenizer
        millivolt_range, sampling_rate = _check_settings(millivolt_range, sampling_rate)
        self._set(backend(list(merges), millivolt_range, across_leads, sampling_rate))

    def _set(self, backend: Any) -> None:
        self._backend = backend
        self.merges: list[str] = backend.merges
        self.millivolt_range: tuple[float, float] | None = backend.millivolt_range
        self.across_leads: bool = backend.across_leads
        self.sampling_rate: float | None = backend.sampling_rate
        # symbols of every id; 0 for those that are no token
        self.token_lengths = np.zeros(FIRST_MERGE_ID + len(self.merges), dtype=np.int64)
        self.token_lengths[FIRST_SYMBOL_ID : FIRST_SYMBOL_ID + len(ALPHABET)] = 1
        self.token_lengths[FIRST_MERGE_ID:] = [len(merge) for merge in self.merges]

    @property
    def token_ids(self) -> np.ndarray:
        """The ids that stand for symbols, int64 [vocab_size], in increasing order."""
        return np.flatnonzero(self.token_lengths)

    @property
    def vocab_size(self) -> int:
        """Symbols and merges; ids are up to 230 more, as there are gaps below and above the symbols."""
        return len(ALPHABET) + len(self.merges)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.merges)} merges, millivolt_range={self.millivolt_range}, "
            f"across_leads={self.across_leads}, sampling_rate={self.sampling_rate})"
        )

    def __reduce__(self) -> tuple:  # processes of a DataLoader get a copy
        return type(self), (self.merges, self.millivolt_range, self.across_leads, self.sampling_rate)

    def symbols(self, token_id: int) -> str:
        """The symbols, a to z, that a token stands for."""
        if not (0 <= token_id < len(self.token_lengths) and self.token_lengths[token_id]):
            raise ValueError(f"{token_id} is no token; they are 97 to 122 and 256 to {len(self.token_lengths) - 1}.")
        return chr(token_id) if token_id < FIRST_MERGE_ID else self.merges[token_id - FIRST_MERGE_ID]

    def encode(self, ecg: Any) -> np.ndarray:
        """Token ids of one ECG.

        Args:
            ecg: floats [leads, samples] in millivolts.

        Returns:
            uint32 [tokens]

        Raises:
            ValueError: the ECG is of another shape, empty, not of floats, or not finite.
        """
        return self._backend.encode(_as_millivolts(ecg))

    def encode_batch(self, ecgs: Sequence[Any] | np.ndarray, num_threads: int | None = None) -> list[np.ndarray]:
        """`encode` of each ECG, in parallel where the Rust package is installed.

        Args:
            num_threads: at most so many at once; None for all cores.

        Raises:
            ValueError: an ECG is invalid, or `num_threads` is below 1.
        """
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; it must be at least 1, or None for all cores.")
        return self._backend.encode_batch([_as_millivolts(ecg) for ecg in ecgs], num_threads)

    def value_range(self, ecg: Any) -> tuple[float, float]:
        """What `decode` needs beside the ids: the lowest and highest millivolt of the ECG, or the fixed range."""
        if self.millivolt_range is not None:
            return self.millivolt_range
        ecg = _as_millivolts(ecg)
        return float(ecg.min()), float(ecg.max())

    def decode(
        self, ids: Any, low: float | None = None, high: float | None = None, num_leads: int | None = None
    ) -> np.ndarray:
        """Millivolts of token ids.

        Each value is off by at most (high - low) / 26, the width of a symbol, beside 1e-6 mV and the rounding of
        float32, and by what a fixed range has clipped.

        Args:
            ids: whole numbers [tokens].
            low, high: as `value_range` gives them; only a tokenizer with a fixed range knows them itself.
            num_leads: rows of the result.

        Returns:
            float32 [num_leads, samples]; [samples of all leads] where num_leads is None.

        Raises:
            ValueError: an id is no token, the range is missing, or the symbols do not fill the leads.
        """
        if low is None or high is None:
            if self.millivolt_range is None:
                raise ValueError(
                    "The tokenizer scales each record to its own range, which the ids do not tell; give low and high "
                    "in millivolts, as value_range(ecg) says them."
                )
            low, high = self.millivolt_range
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):  # an empty list becomes float64
            raise ValueError(
                f"The ids have shape {list(ids.shape)} and dtype {ids.dtype}; expected whole numbers [tokens]."
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < 2**32:  # else uint32 would wrap round
            raise ValueError(
                f"The ids lie in [{ids.min()}, {ids.max()}]; the largest token is {len(self.token_lengths) - 1}."
            )
        values = self._backend.decode(ids.astype(np.uint32), low, high)
        if num_leads is None:
            return values
        if num_leads < 1 or len(values) % num_leads:
            raise ValueError(f"The ids stand for {len(values)} samples, which {num_leads} leads do not share equally.")
        return values.reshape(num_leads, -1)

    def offsets(self, ids: np.ndarray, num_samples: int) -> np.ndarray:
        """Where each token stands in a record of `num_samples` per lead.

        Returns:
            int64 [tokens, 3]: the number of its lead, and its first and last sample in that lead. A token that runs on
            into the next lead has a last sample of `num_samples` or more.
        """
        ends = np.cumsum(self.token_lengths[ids])  # in symbols from the record's first, lead after lead
        starts = ends - self.token_lengths[ids]
        first_of_lead = starts - starts % num_samples
        return np.stack([starts // num_samples, starts - first_of_lead, ends - 1 - first_of_lead], axis=1)

    @classmethod
    def train(
        cls,
        records: Iterable[Any],
        num_merges: int = 10_000,
        millivolt_range: tuple[float, float] | None = None,
        across_leads: bool = True,
        sampling_rate: float | None = None,
        min_frequency: int = 2,
        show_progress: bool = True,
    ) -> "ECGByteTokenizer":
        """Byte-pair encoding of the records: the most frequent pair of neighbours becomes a token, again and again.

        Ties go to the pair of the smallest ids; no pair crosses the border of a record. The same records give the same
        tokenizer.

        Args:
            records: ECGs, floats [leads, samples] in millivolts.
            num_merges: tokens beside the 26 symbols. Fewer come out where no pair is left that is `min_frequency` times
                there.
            millivolt_range, across_leads, sampling_rate: of the tokenizer.

        Raises:
            ValueError: there is no record, one is invalid, or `num_merges` or `min_frequency` is below 1.
        """
        arrays = [_as_millivolts(record) for record in records]
        if not arrays:
            raise ValueError("There is no record to train on.")
        for name, value in (("num_merges", num_merges), ("min_frequency", min_frequency)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        millivolt_range, sampling_rate = _check_settings(millivolt_range, sampling_rate)
        train = train_in_python if ecg_byte is None else ecg_byte.train
        shown = 0
        with tqdm(total=num_merges, desc="Merging", unit="merge", disable=not show_progress) as bar:

            def report(done: int, frequency: int) -> None:
                nonlocal shown
                # `done` counts from the start, `update` adds; a bar that transformers has turned off has no count
                bar.update(done - shown)
                bar.set_postfix(frequency=frequency, refresh=False)
                shown = done

            merges = train(arrays, num_merges, millivolt_range, across_leads, min_frequency, report)
            bar.update(len(merges) - shown)  # Rust reports a few times a second
        return cls(merges, millivolt_range, across_leads, sampling_rate)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "ECGByteTokenizer":
        """A saved tokenizer.

        Args:
            pretrained_model_name_or_path: folder or Hub id that holds `ecg_byte.json`, or the path of such a file.
            kwargs: where and how on the Hub (`revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`, ...).

        Raises:
            OSError: there is no such file.
            ValueError: the file is damaged, or of another version.
        """
        path = Path(pretrained_model_name_or_path)
        if not path.is_file():
            path = Path(str(cached_file(pretrained_model_name_or_path, FILE_NAME, **kwargs)))  # no None: it raises
        backend = PythonTokenizer if ecg_byte is None else ecg_byte.Tokenizer
        tokenizer = cls.__new__(cls)  # `__init__` would make a second backend
        try:
            tokenizer._set(backend.from_json(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} is no ECG-Byte tokenizer: {error}.") from error
        return tokenizer

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Writes `ecg_byte.json` into the folder, whole or not at all.

        Args:
            push_to_hub: also send it to the Hub, to `repo_id` of `kwargs` or else the folder's name.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE_NAME
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{FILE_NAME}-")  # `os.replace` needs one file system
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json())
            os.chmod(temporary, 0o644)  # mkstemp's are the owner's alone
            os.replace(temporary, path)
        except BaseException:  # Ctrl+C too
            os.unlink(temporary)
            raise
        if push_to_hub:
            kwargs.pop("max_shard_size", None)
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return [str(path)]

    def to_json(self) -> str:
        """The content of `ecg_byte.json`, a line for each merge."""
        head = {
            "format": "ecg_byte",
            "version": VERSION,
            "alphabet": ALPHABET,
            "normalization": "minmax" if self.millivolt_range is None else "millivolt",
            "millivolt_range": self.millivolt_range,
            "across_leads": self.across_leads,
            "sampling_rate": self.sampling_rate,
        }
        lines = ",\n".join(f'["{merge}", {FIRST_MERGE_ID + place}]' for place, merge in enumerate(self.merges))
        return f'{json.dumps(head, indent=1)[:-2]},\n "merges": [\n{lines}\n]}}\n'  # [:-2]: less newline and brace


def _as_millivolts(ecg: Any) -> np.ndarray:
    """float32 [leads, samples] in one piece of memory."""
    array = np.asarray(ecg)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"The ECG has shape {list(array.shape)}; expected [leads, samples], not empty.")
    if array.dtype.kind != "f":
        raise ValueError(f"The ECG has dtype {array.dtype}; expected floats in millivolts.")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and encoding says so
        return np.ascontiguousarray(array, dtype=np.float32)


__all__ = ["ECGByteTokenizer"]
