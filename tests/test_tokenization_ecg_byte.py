import copy
import json
import os
import pickle
import subprocess
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tokenizers import Tokenizer, models, trainers
from torch.utils.data import DataLoader
from transformers.utils import logging

from elm_ecg import tokenization_ecg_byte
from elm_ecg.tokenization_ecg_byte import (
    ALPHABET,
    FILE_NAME,
    ECGByteTokenizer,
    PythonTokenizer,
    _quantize,
    train_in_python,
)
from loopback_hub import LoopbackHub, run_on_hub

RANGE = (0.0, 26.0)  # of `ecg_of`: symbol i is the millivolts from i to i + 1
MERGES = ["aa", "ab", "aaab", "zz", "mmmmmmmmmmmmmmmmmmmm", "mmm", "za"]


@pytest.fixture(scope="class", params=["rust", "python"])
def backend(request):
    """Either implementation behind `ECGByteTokenizer`."""
    if request.param == "rust":
        pytest.importorskip("ecg_byte", reason="the extension is not installed: uv run --extra symbolic pytest")
        yield tokenization_ecg_byte.ecg_byte
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenization_ecg_byte, "ecg_byte", None)
            yield None


@pytest.fixture(scope="module")
def golden_merges(shared: Path) -> list[str]:
    return [merge for merge, _ in json.loads((shared / "golden/seed_ecg_byte_10000.json").read_text())["merges"]]


@pytest.fixture(scope="module")
def ptbxl(shared: Path) -> np.ndarray:
    """The first 200 PTB-XL records, float32 [200, 12, 2500] in millivolts at 250 Hz."""
    return np.load(shared / "data/ptbxl/raw500.npz")["ecg"][:200, :, ::2].astype(np.float32) / np.float32(1000)


@pytest.fixture(scope="module")
def walks() -> np.ndarray:
    """Random walks, which stay at a symbol for a while as ECGs do: float32 [16, 12, 500]."""
    return np.random.default_rng(0).normal(size=(16, 12, 500)).cumsum(axis=2).astype(np.float32)


@pytest.fixture(scope="module")
def merges(walks: np.ndarray) -> list[str]:
    return train_in_python(walks[:2], 200)


def ecg_of(*leads: str) -> np.ndarray:
    """An ECG whose symbols over `RANGE` are these strings, one a lead."""
    return np.array([[ord(symbol) - ord("a") + 0.5 for symbol in lead] for lead in leads], dtype=np.float32)


def spelled(tokenizer: ECGByteTokenizer, ids: np.ndarray) -> str:
    return "".join(tokenizer.symbols(token_id) for token_id in ids)


def naive_symbols(ecg: np.ndarray, millivolt_range: tuple[float, float] | None) -> list[str]:
    """The symbols of each lead, value by value."""
    if millivolt_range is None:
        low, high, epsilon = ecg.min(), ecg.max(), np.float32(1e-6)
    else:
        (low, high), epsilon = map(np.float32, millivolt_range), np.float32(0)

    def symbol(value: np.float32) -> str:
        normalized = min(max((value - low) / (high - low + epsilon), np.float32(0)), np.float32(1))
        return ALPHABET[min(int(np.float32(26) * normalized), 25)]

    with np.errstate(over="ignore"):
        return ["".join(map(symbol, lead)) for lead in ecg]


def naive_ids(leads: list[str], merges: list[str], across_leads: bool) -> list[int]:
    """Greedy longest match from the left, by trying every token."""
    longest_first = sorted(merges, key=len, reverse=True)
    ids = []
    for symbols in ["".join(leads)] if across_leads else leads:
        place = 0
        while place < len(symbols):
            token = next((merge for merge in longest_first if symbols.startswith(merge, place)), symbols[place])
            ids.append(256 + merges.index(token) if len(token) > 1 else ord(token))
            place += len(token)
    return ids


def naive_merges(parts: list[str], num_merges: int, min_frequency: int) -> list[str]:
    """Byte-pair encoding by its definition: all pairs counted anew for each merge."""
    sequences = [list(part.encode()) for part in parts]
    symbols_of = {ord(symbol): symbol for symbol in ALPHABET}
    merges: list[str] = []
    while len(merges) < num_merges:
        counts = Counter(pair for sequence in sequences for pair in pairwise(sequence))
        if not counts or max(counts.values()) < min_frequency:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(symbols_of[best[0]] + symbols_of[best[1]])
        symbols_of[255 + len(merges)] = merges[-1]
        for sequence in sequences:
            place = 0
            while place < len(sequence) - 1:
                if (sequence[place], sequence[place + 1]) == best:
                    sequence[place : place + 2] = [255 + len(merges)]
                place += 1
    return merges


class AddedTokens:
    """The ids by Hugging Face tokenizers, whose added tokens are matched leftmost, then longest."""

    def __init__(self, merges: list[str]):
        self.tokenizer = Tokenizer(models.WordLevel({}, unk_token="?"))
        self.tokenizer.add_tokens([*ALPHABET, *merges])
        self.ids = np.array([*ALPHABET.encode(), *range(256, 256 + len(merges))])

    def encode(self, symbols: str) -> list[int]:
        return self.ids[self.tokenizer.encode(symbols).ids].tolist()


def hugging_face_merges(parts: list[str], num_merges: int, min_frequency: int = 2) -> list[str]:
    """By Hugging Face tokenizers. Counts, ties and runs ("aaa") are dealt with as here, so that all merges are equal."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=26 + num_merges,
        min_frequency=min_frequency,
        initial_alphabet=list(ALPHABET),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(parts, trainer)
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)[26:]


def runs(symbols: str, longest: int, **sizes: int) -> st.SearchStrategy[str]:
    """Strings as ECGs make them: the same symbol again and again."""
    run = st.tuples(st.sampled_from(symbols), st.integers(1, longest))
    return st.lists(run, min_size=1, **sizes).map(lambda parts: "".join(symbol * count for symbol, count in parts))


@st.composite
def leads_of_symbols(draw: st.DrawFn) -> list[str]:
    symbols = draw(runs("abz", 40, max_size=30))
    num_leads = draw(st.integers(1, min(4, len(symbols))))
    samples = len(symbols) // num_leads
    return [symbols[lead * samples : (lead + 1) * samples] for lead in range(num_leads)]


@st.composite
def ecgs(draw: st.DrawFn) -> np.ndarray:
    """Arrays of any float type, shape, order in memory and magnitude, from the smallest float32 to the largest."""
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 70)))
    unit = draw(hnp.arrays(np.float64, shape, elements=st.floats(-1, 1) | st.sampled_from([-1.0, 0.0, 1.0])))
    scale = draw(st.sampled_from([1, 0, 1e-45, 1e-40, 1e-9, 1e-6, 1e4, 1e30, 3e38]))
    ecg = unit * scale + draw(st.sampled_from([0, 0, 1e-45, -3, 6e4]))
    types = [np.float64, np.float32, ">f4"] + ([np.float16] if np.abs(ecg).max() < 65504 else [])
    ecg = ecg.astype(draw(st.sampled_from(types)))
    changes = [ecg, ecg.T, ecg[:, ::-1], ecg[::-1, ::2], np.asfortranarray(ecg), np.repeat(ecg, 2, axis=1)[:, 1::2]]
    return draw(st.sampled_from(changes))


class TestGolden:
    @pytest.fixture(scope="class")
    def tokenizer(self, backend, golden_merges):
        return ECGByteTokenizer(golden_merges)

    @pytest.mark.parametrize("index", range(5))
    def test_ids_and_symbols(self, tokenizer, index, shared):
        ecg = np.load(shared / "golden/ecg_byte_signals.npz")["ecg"][index]
        expected = json.loads((shared / "golden/ecg_byte_expected.json").read_text())
        ids = tokenizer.encode(ecg)
        assert ids.tolist() == expected["token_ids"][index]
        symbols = spelled(tokenizer, ids)
        assert symbols.startswith(expected["symbols_head"][index])
        assert zlib.crc32(symbols.encode()) == expected["symbols_crc32"][index]

    def test_ids_are_those_of_hugging_face_tokenizers(self, tokenizer, golden_merges, ptbxl):
        added_tokens = AddedTokens(golden_merges)
        for ecg in ptbxl:
            assert tokenizer.encode(ecg).tolist() == added_tokens.encode(_quantize(ecg, None).decode())

    def test_sizes(self, tokenizer):
        assert tokenizer.vocab_size == len(tokenizer.token_ids) == 10_026
        assert tokenizer.token_ids[[0, 25, 26, -1]].tolist() == [97, 122, 256, 10_255]
        assert tokenizer.token_lengths.max() == 1024
        assert "10000 merges" in repr(tokenizer)


class TestEncode:
    @given(leads_of_symbols(), st.lists(runs("abz", 40, max_size=4), max_size=5), st.booleans(), st.data())
    def test_longest_match(self, backend, leads, others, across_leads, data):
        symbols = "".join(leads)
        places = st.tuples(st.integers(0, len(symbols) - 1), st.integers(2, 80))
        parts = [symbols[start : start + length] for start, length in data.draw(st.lists(places, max_size=20))]
        merges = list(dict.fromkeys(merge for merge in parts + others if len(merge) > 1))
        expected = naive_ids(leads, merges, across_leads)
        assert ECGByteTokenizer(merges, RANGE, across_leads).encode(ecg_of(*leads)).tolist() == expected
        assert not across_leads or AddedTokens(merges).encode(symbols) == expected

    @given(
        ecgs(),
        st.none() | st.sampled_from([(-1, 1), (0, 1e-45), (-3e-39, 1e30), (-1.7e38, 1.7e38), (2, 3)]),
        st.booleans(),
    )
    def test_any_array(self, backend, ecg, millivolt_range, across_leads):
        tokenizer = ECGByteTokenizer(MERGES, millivolt_range, across_leads)
        single = ecg.astype(np.float32)
        with np.errstate(over="ignore"):
            overflows = millivolt_range is None and not np.isfinite(single.max() - single.min())
        if overflows:
            with pytest.raises(ValueError, match="overflows float32; expected millivolts"):
                tokenizer.encode(ecg)
        else:
            expected = naive_ids(naive_symbols(single, millivolt_range), MERGES, across_leads)
            ids = tokenizer.encode(ecg)
            assert ids.tolist() == expected
            assert ids.dtype == np.uint32

    def test_a_symbol_for_each_level(self, backend):
        ecg = np.linspace(0, 1, 26 * 100, dtype=np.float32)[None]
        ids = ECGByteTokenizer([]).encode(ecg)
        assert np.bincount(ids)[97:].tolist() == [100] * 26
        assert (np.diff(ids.astype(int)) >= 0).all()

    def test_tiny_ranges(self, backend):
        """1e-6 mV are added to the range, and to nothing else."""
        tokenizer = ECGByteTokenizer([])
        assert tokenizer.encode(np.array([[0, 1e-6]])).tolist() == [ord("a"), ord("n")]
        below_16 = np.nextafter(np.float32(16), np.float32(0))
        assert tokenizer.encode(np.array([[below_16, 16]])).tolist() == [ord("a"), ord("m")]

    def test_constant_record(self, backend):
        assert ECGByteTokenizer(["aaaa"]).encode(np.full((2, 5), -0.3)).tolist() == [256, 256, 97, 97]

    def test_lists_tensors_and_read_only_arrays(self, backend):
        ecg = ecg_of("abz", "aab")
        ecg.setflags(write=False)
        tokenizer = ECGByteTokenizer(MERGES, RANGE)
        expected = [256 + MERGES.index(merge) for merge in ("ab", "za", "ab")]
        for form in (ecg, ecg.tolist(), ecg.astype(np.float64), ecg.astype(np.float16), torch.from_numpy(ecg.copy())):
            assert tokenizer.encode(form).tolist() == expected

    def test_across_leads(self, backend):
        ecg = ecg_of("ba", "ab")
        assert ECGByteTokenizer(["aa"], RANGE).encode(ecg).tolist() == [98, 256, 98]
        assert ECGByteTokenizer(["aa"], RANGE, across_leads=False).encode(ecg).tolist() == [98, 97, 97, 98]

    def test_a_fixed_range_keeps_the_amplitude(self, backend, ptbxl, golden_merges):
        fixed, minmax = ECGByteTokenizer(golden_merges, (-5, 5)), ECGByteTokenizer(golden_merges)
        for ecg in ptbxl[:3]:
            assert fixed.encode(ecg).tolist() != fixed.encode(2 * ecg).tolist()
            once, twice = (np.frombuffer(spelled(minmax, minmax.encode(x)).encode(), np.uint8) for x in (ecg, 2 * ecg))
            assert (once != twice).mean() < 1e-3  # the 1e-6 mV beside the range weigh half as much

    def test_batch(self, backend, walks, merges):
        records = [*walks, walks[0][:3], walks[1][:, :7], ecg_of("abc")]
        tokenizer = ECGByteTokenizer(merges)
        expected = [tokenizer.encode(ecg).tolist() for ecg in records]
        for num_threads in (1, 2, None):
            assert [ids.tolist() for ids in tokenizer.encode_batch(records, num_threads)] == expected
        assert [ids.tolist() for ids in tokenizer.encode_batch(walks)] == expected[: len(walks)]
        assert tokenizer.encode_batch([]) == []
        with pytest.raises(ValueError, match="num_threads is 0; it must be at least 1, or None for all cores"):
            tokenizer.encode_batch(records, 0)

    def test_threads_of_python(self, backend, walks, merges):
        tokenizer = ECGByteTokenizer(merges)
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(tokenizer.encode, walks))
        assert [ids.tolist() for ids in results] == [tokenizer.encode(ecg).tolist() for ecg in walks]

    @pytest.mark.parametrize(
        ("ecg", "message"),
        [
            (np.zeros(5), r"shape \[5\]; expected \[leads, samples\], not empty"),
            (np.zeros((1, 12, 5)), r"shape \[1, 12, 5\]; expected"),
            (np.zeros((12, 0)), r"shape \[12, 0\]; expected \[leads, samples\], not empty"),
            (np.zeros((0, 12)), r"shape \[0, 12\]; expected"),
            (np.zeros((2, 5), np.int16), "dtype int16; expected floats in millivolts"),
            (np.zeros((2, 5), bool), "dtype bool; expected floats"),
            (np.zeros((2, 5), complex), "dtype complex128; expected floats"),
            (np.full((2, 5), "x"), "dtype <U1; expected floats"),
            (np.array([[0, np.nan]]), "The ECG holds NaN or infinite values; expected finite millivolts"),
            (np.array([[np.nan] * 100]), "holds NaN or infinite"),
            (np.array([[np.inf, 0]]), "holds NaN or infinite"),
            (np.array([[0] * 99 + [-np.inf]]), "holds NaN or infinite"),
            (np.array([[0, 1e300]]), "holds NaN or infinite"),
            (np.array([[-3e38, 3e38]]), "overflows float32; expected millivolts"),
        ],
    )
    def test_errors(self, backend, ecg, message):
        tokenizer = ECGByteTokenizer(MERGES)
        for use in (tokenizer.encode, lambda ecg: tokenizer.encode_batch([ecg_of("ab"), ecg]), ECGByteTokenizer.train):
            with pytest.raises(ValueError, match=message):
                use([ecg] if use == ECGByteTokenizer.train else ecg)


class TestDecode:
    @given(ecgs(), st.sampled_from([None, (-1, 1), (0, 6e4), (-0.5, 1e-3)]))
    def test_error_is_at_most_a_symbol(self, backend, ecg, millivolt_range):
        assume(abs(float(ecg.max())) < 1e38 and abs(float(ecg.min())) < 1e38)
        tokenizer = ECGByteTokenizer(MERGES, millivolt_range)
        low, high = tokenizer.value_range(ecg)
        decoded = tokenizer.decode(tokenizer.encode(ecg), low, high, len(ecg))
        assert decoded.dtype == np.float32
        rounding = 1e-6 * max(abs(low), abs(high)) + 1e-6
        np.testing.assert_allclose(decoded, np.clip(ecg, low, high), rtol=0, atol=(high - low) / 26 + rounding)

    @given(
        st.lists(st.sampled_from([*range(97, 123), *range(256, 256 + len(MERGES))]), max_size=50),
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
    def test_levels(self, backend, ids, low, high):
        assume(np.isfinite(low - high) and abs(low - high) < 3e38)
        tokenizer = ECGByteTokenizer(MERGES)
        low, high = np.float32(low), np.float32(high)
        levels = [np.float32(ALPHABET.index(symbol)) / np.float32(25) for symbol in spelled(tokenizer, ids)]
        expected = np.array([level * (high - low) + low for level in levels], dtype=np.float32)
        assert tokenizer.decode(ids, low, high).tobytes() == expected.tobytes()

    def test_a_fixed_range_is_known(self, backend):
        ecg = ecg_of("za", "mm")
        tokenizer = ECGByteTokenizer(MERGES, RANGE)
        decoded = tokenizer.decode(tokenizer.encode(ecg), num_leads=2)
        np.testing.assert_allclose(decoded, np.float32([[26, 0], [12.48, 12.48]]), rtol=1e-6)
        np.testing.assert_array_equal(tokenizer.decode(tokenizer.encode(ecg * 100), num_leads=2)[1], [26, 26])

    def test_real_records(self, backend, ptbxl, golden_merges):
        tokenizer = ECGByteTokenizer(golden_merges)
        for ecg in ptbxl[:10]:
            low, high = tokenizer.value_range(ecg)
            assert (low, high) == (ecg.min(), ecg.max())
            decoded = tokenizer.decode(tokenizer.encode(ecg), low, high, 12)
            assert np.abs(decoded - ecg).max() <= (high - low) / 26 + 2e-6

    def test_value_range(self, backend):
        ecg = np.array([[0.1, -0.7], [0.3, 0.2]])
        assert ECGByteTokenizer([]).value_range(ecg) == (np.float32(-0.7), np.float32(0.3))
        assert ECGByteTokenizer([], (-5, 5)).value_range(ecg) == (-5, 5)

    def test_nothing(self, backend):
        assert ECGByteTokenizer([]).decode([], 0, 1, 12).shape == (12, 0)

    @pytest.mark.parametrize(
        ("ids", "num_leads", "message"),
        [
            ([97, 5], None, "id 5 at 1 is no token; the last is 262"),
            ([97, 123], None, "id 123 at 1 is no token; the last is 262"),
            ([97, 255], None, "id 255 at 1 is no token"),
            ([263], None, "id 263 at 0 is no token"),
            ([2**32 - 1], None, "id 4294967295 at 0 is no token"),
            ([97, -1], None, r"lie in \[-1, 97\]; the largest token is 262"),
            ([2**32 + 97], None, "lie in"),
            (np.array([2**64 - 1], np.uint64), None, "lie in"),
            ([97.0], None, r"shape \[1\] and dtype float64; expected whole numbers \[tokens\]"),
            ([[97]], None, r"shape \[1, 1\] and dtype int64; expected whole numbers"),
            ([97, 256], 2, "3 samples, which 2 leads do not share equally"),
            ([97], 0, "0 leads do not share"),
        ],
    )
    def test_errors(self, backend, ids, num_leads, message):
        with pytest.raises(ValueError, match=message):
            ECGByteTokenizer(MERGES).decode(ids, 0, 1, num_leads)

    def test_missing_range(self, backend):
        for limits in ({}, {"low": 0}, {"high": 1}):
            with pytest.raises(
                ValueError, match=r"its own range.*give low and high in millivolts, as value_range\(ecg\)"
            ):
                ECGByteTokenizer(MERGES).decode([97], **limits)

    @pytest.mark.parametrize("token_id", [-1, 0, 96, 123, 255, 256 + len(MERGES)])
    def test_symbols_of_no_token(self, backend, token_id):
        with pytest.raises(ValueError, match=f"{token_id} is no token; they are 97 to 122 and 256 to 262"):
            ECGByteTokenizer(MERGES).symbols(token_id)


class TestOffsets:
    @given(leads_of_symbols(), st.booleans())
    def test_tokens_cover_the_record(self, backend, leads, across_leads):
        tokenizer = ECGByteTokenizer(MERGES, RANGE, across_leads)
        samples = len(leads[0])
        ids = tokenizer.encode(ecg_of(*leads))
        offsets = tokenizer.offsets(ids, samples)
        symbols, place = "".join(leads), 0
        for token_id, (lead, first, last) in zip(ids, offsets.tolist(), strict=True):
            assert lead * samples + first == place
            assert 0 <= first < samples
            assert symbols[place : lead * samples + last + 1] == tokenizer.symbols(token_id)
            assert across_leads or last < samples
            place = lead * samples + last + 1
        assert place == len(symbols)

    def test_a_token_in_three_leads(self, backend):
        tokenizer = ECGByteTokenizer(["abcdef", "zz"], RANGE)
        ids = tokenizer.encode(ecg_of("zza", "bcd", "efz"))
        assert tokenizer.offsets(ids, 3).tolist() == [[0, 0, 1], [0, 2, 7], [2, 2, 2]]


class TestTrain:
    @given(st.lists(leads_of_symbols(), min_size=1, max_size=4), st.integers(1, 30), st.integers(1, 4), st.booleans())
    def test_merges(self, backend, records, num_merges, min_frequency, across_leads):
        arrays = [ecg_of(*leads) for leads in records]
        parts = ["".join(leads) for leads in records] if across_leads else [lead for leads in records for lead in leads]
        options = {"millivolt_range": RANGE, "across_leads": across_leads, "min_frequency": min_frequency}
        merges = ECGByteTokenizer.train(arrays, num_merges, **options, show_progress=False).merges
        assert merges == naive_merges(parts, num_merges, min_frequency)
        assert merges == hugging_face_merges(parts, num_merges, min_frequency)
        assert len(set(merges)) == len(merges)

    @pytest.mark.parametrize("across_leads", [True, False])
    def test_real_records(self, backend, ptbxl, across_leads):
        records = ptbxl[:2]
        tokenizer = ECGByteTokenizer.train(records, 300, across_leads=across_leads, show_progress=False)
        symbols = [_quantize(ecg, None).decode() for ecg in records]
        leads = [part[start : start + 2500] for part in symbols for start in range(0, 30_000, 2500)]
        assert tokenizer.merges == hugging_face_merges(symbols if across_leads else leads, 300)
        ids = tokenizer.encode(records[0])
        assert len(ids) < 30_000 / 6

    def test_ties_go_to_the_smallest_ids(self, backend):
        tokenizer = ECGByteTokenizer.train([ecg_of("zyzybaba")], 10, RANGE, show_progress=False)
        assert tokenizer.merges == ["ba", "zy"]

    def test_no_pair_across_borders(self, backend):
        records = [ecg_of("ab", "ab")] * 3
        options = {"millivolt_range": RANGE, "show_progress": False, "num_merges": 9}
        assert ECGByteTokenizer.train(records, **options).merges == ["ab", "abab"]
        assert ECGByteTokenizer.train(records, **options, across_leads=False).merges == ["ab"]

    def test_rare_pairs_are_left(self, backend):
        records = [ecg_of("abababcdcd")]
        for min_frequency, merges in ((4, []), (3, ["ab"]), (2, ["ab", "cd", "abab"])):
            tokenizer = ECGByteTokenizer.train(
                records, millivolt_range=RANGE, min_frequency=min_frequency, show_progress=False
            )
            assert tokenizer.merges == merges

    def test_a_generator_and_the_settings(self, backend, walks):
        options = {"num_merges": 50, "millivolt_range": (-20, 20), "across_leads": False, "show_progress": False}
        tokenizer = ECGByteTokenizer.train((ecg for ecg in walks[:3]), sampling_rate=250, **options)
        assert tokenizer.merges == ECGByteTokenizer.train(walks[2::-1], **options).merges
        assert len(tokenizer.merges) == 50
        assert (tokenizer.millivolt_range, tokenizer.across_leads, tokenizer.sampling_rate) == ((-20, 20), False, 250)

    def test_progress(self, backend, walks, capsys):
        ECGByteTokenizer.train(walks[:1], 40)
        assert "Merging: 100%" in capsys.readouterr().err
        ECGByteTokenizer.train(walks[:1], 40, show_progress=False)
        assert capsys.readouterr().err == ""

    def test_an_interrupt_ends_training(self, backend, walks):
        calls = []

        def interrupt(done: int, frequency: int) -> None:
            calls.append((done, frequency))
            raise KeyboardInterrupt

        train = train_in_python if backend is None else backend.train
        with pytest.raises(KeyboardInterrupt):
            train(list(walks), 10_000, progress=interrupt)
        assert len(calls) == 1

    @pytest.mark.parametrize(
        ("records", "options", "message"),
        [
            ([], {}, "no record to train on"),
            ([ecg_of("ab")], {"num_merges": 0}, "num_merges is 0; it must be at least 1"),
            ([ecg_of("ab")], {"min_frequency": -1}, "min_frequency is -1; it must be at least 1"),
            ([ecg_of("ab")], {"millivolt_range": (1, 1)}, r"millivolt_range is \(1, 1\); expected two finite numbers"),
            ([ecg_of("ab")], {"sampling_rate": -1}, "sampling_rate is -1; expected a positive number"),
        ],
    )
    def test_errors(self, backend, records, options, message):
        with pytest.raises(ValueError, match=message):
            ECGByteTokenizer.train(records, **options)


def test_bars_that_are_turned_off(capsys):
    """By transformers, whose bar then counts nothing."""
    logging.disable_progress_bar()
    try:
        assert ECGByteTokenizer.train([ecg_of("zyzybaba")], 10, RANGE).merges
    finally:
        logging.enable_progress_bar()
    assert "Merging" not in capsys.readouterr().err


def test_rust_and_python_train_alike(ptbxl):
    extension = pytest.importorskip("ecg_byte", reason="the extension is not installed: uv run --extra symbolic pytest")
    for options in ({}, {"millivolt_range": (-2.0, 2.0), "across_leads": False, "min_frequency": 40}):
        assert extension.train(list(ptbxl[:2]), 200, **options) == train_in_python(ptbxl[:2], 200, **options)


def content(**changes) -> dict:
    """What a small file holds, with changes; a change to `...` leaves the key out."""
    whole = {
        "format": "ecg_byte",
        "version": 1,
        "alphabet": ALPHABET,
        "normalization": "millivolt",
        "millivolt_range": [-5.0, 5.0],
        "across_leads": True,
        "sampling_rate": 250.0,
        "merges": [["aa", 256], ["aab", 257], ["zz", 258]],
    } | changes
    return {key: value for key, value in whole.items() if value is not ...}


@st.composite
def changed_files(draw: st.DrawFn) -> str:
    """Small files with other values, and with other characters here and there."""
    numbers = st.integers() | st.integers(0, 3) | st.floats() | st.floats(0, 5)
    likely = {
        "normalization": st.sampled_from(["minmax", "millivolt"]),
        "millivolt_range": st.none() | st.lists(numbers, min_size=2, max_size=2),
        "sampling_rate": st.none() | numbers,
        "merges": st.lists(st.text("ab", max_size=4), max_size=3).map(
            lambda merges: [[merge, 256 + place] for place, merge in enumerate(merges)]
        ),
    }
    scalars = st.none() | st.booleans() | numbers | st.text(max_size=4)
    values = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=6,
    )
    keys = st.sampled_from([*content(), "other"])
    changes = st.fixed_dictionaries({}, optional=likely) | st.dictionaries(keys, values | st.just(...), max_size=2)
    text = json.dumps(content(**draw(changes)))
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(text)))
        new = draw(st.text('0123456789.eE+-[]{}:,"\\ \n abzNu', max_size=3) | st.text(max_size=2))
        text = text[:start] + new + text[start + draw(st.integers(0, 3)) :]
    return text


def load(text: str | bytes, folder: Path) -> ECGByteTokenizer:
    path = folder / "tokenizer.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return ECGByteTokenizer.from_pretrained(path)


class TestFile:
    @pytest.mark.parametrize("millivolt_range", [None, (-5, 5.0)])
    def test_round_trip(self, backend, tmp_path, millivolt_range):
        tokenizer = ECGByteTokenizer(MERGES, millivolt_range, across_leads=False, sampling_rate=np.float32(250))
        assert tokenizer.save_pretrained(tmp_path / "new" / "folder") == [str(tmp_path / "new" / "folder" / FILE_NAME)]
        path = tmp_path / "new" / "folder" / FILE_NAME
        assert path.stat().st_mode & 0o777 == 0o644
        assert json.loads(path.read_text()) == content(
            normalization="minmax" if millivolt_range is None else "millivolt",
            millivolt_range=None if millivolt_range is None else [-5, 5],
            across_leads=False,
            merges=[[merge, 256 + place] for place, merge in enumerate(MERGES)],
        )
        for source in (path, str(path), path.parent, str(path.parent)):
            loaded = ECGByteTokenizer.from_pretrained(source)
            assert (loaded.merges, loaded.millivolt_range) == (MERGES, millivolt_range)
            assert (loaded.across_leads, loaded.sampling_rate) == (False, 250)
            assert loaded.to_json() == path.read_text()

    def test_text(self, backend):
        """A line for each merge, and the same file by both implementations."""
        assert ECGByteTokenizer(["aa", "ab"], (-5, 5), sampling_rate=250).to_json() == (
            '{\n "format": "ecg_byte",\n "version": 1,\n "alphabet": "abcdefghijklmnopqrstuvwxyz",\n'
            ' "normalization": "millivolt",\n "millivolt_range": [\n  -5.0,\n  5.0\n ],\n "across_leads": true,\n'
            ' "sampling_rate": 250.0,\n "merges": [\n["aa", 256],\n["ab", 257]\n]}\n'
        )

    def test_fresh_process(self, backend, tmp_path, walks, merges):
        tokenizer = ECGByteTokenizer(merges, sampling_rate=250)
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "pickled").write_bytes(pickle.dumps(tokenizer))
        np.save(tmp_path / "ecg.npy", walks[0])
        code = """
import pickle, sys
if sys.argv[1] == "python":
    sys.modules["ecg_byte"] = None  # as if not installed
import numpy as np
from elm_ecg.tokenization_ecg_byte import ECGByteTokenizer
tokenizer = ECGByteTokenizer.from_pretrained(".")
with open("pickled", "rb") as file:
    pickled = pickle.load(file)
assert pickled.to_json() == tokenizer.to_json()
assert type(tokenizer._backend).__module__ == ("elm_ecg.tokenization_ecg_byte" if sys.argv[1] == "python" else "ecg_byte")
ids = tokenizer.encode(np.load("ecg.npy"))
assert (pickled.encode(np.load("ecg.npy")) == ids).all()
print(ids.tolist())
"""
        command = [sys.executable, "-c", code, "python" if backend is None else "rust"]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        assert json.loads(process.stdout) == tokenizer.encode(walks[0]).tolist()

    @pytest.mark.parametrize("broken", ["os.replace", "elm_ecg.tokenization_ecg_byte.ECGByteTokenizer.to_json"])
    def test_a_failing_write_leaves_the_old_file(self, backend, tmp_path, monkeypatch, broken):
        old = ECGByteTokenizer(["aa"])
        old.save_pretrained(tmp_path)

        def fail(*_: object) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(broken, fail)
        with pytest.raises(OSError, match="No space left"):
            ECGByteTokenizer(["bb"]).save_pretrained(tmp_path)
        assert ECGByteTokenizer.from_pretrained(tmp_path).merges == ["aa"]
        assert os.listdir(tmp_path) == [FILE_NAME]

    def test_nothing_there(self, backend, tmp_path):
        with pytest.raises(OSError, match=r"Repo id must be|is not a local folder"):
            ECGByteTokenizer.from_pretrained(tmp_path / "nowhere")
        with pytest.raises(OSError, match=f"does not appear to have a file named {FILE_NAME}"):
            ECGByteTokenizer.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            *(({key: ...}, f"missing key '{key}'") for key in content()),
            ({"merge": []}, "unknown key 'merge'"),
            ({"format": "bpe"}, "format is 'bpe'; expected 'ecg_byte'"),
            ({"version": 2}, "version is 2; this code reads version 1"),
            ({"version": 1.0}, r"version is 1\.0; this code reads version 1"),
            ({"version": True}, "version is .*; this code reads version 1"),
            ({"alphabet": "abc"}, f"alphabet is 'abc'; expected '{ALPHABET}'"),
            ({"normalization": "zscore"}, "normalization is 'zscore'; expected 'minmax' or 'millivolt'"),
            ({"normalization": "minmax"}, "millivolt_range is .*; expected null with normalization 'minmax'"),
            *(
                (
                    {"millivolt_range": value},
                    "millivolt_range is .*; expected two finite numbers, low < high, with norm",
                )
                for value in ([1, 1], [5, -5], [1], [1, 2, 3], ["1", "2"], [0, 1e39], [1, 1 + 1e-9])
            ),
            ({"millivolt_range": [False, True]}, "millivolt_range is .*; expected two finite"),
            ({"millivolt_range": None}, "millivolt_range is .*; expected two finite"),
            ({"millivolt_range": {"low": 0}}, "millivolt_range is .*; expected two finite"),
            ({"sampling_rate": 0}, "sampling_rate is 0; expected a positive number or null"),
            ({"sampling_rate": -250.0}, r"sampling_rate is -250\.0; expected a positive number or null"),
            ({"sampling_rate": "250"}, "sampling_rate is '250'; expected a positive number or null"),
            ({"sampling_rate": True}, "sampling_rate is .*; expected a positive number or null"),
            ({"across_leads": 1}, "across_leads is 1; expected true or false"),
            ({"merges": {}}, r"merges is {}; expected a list of \[string, id\]"),
            ({"merges": [["aa", 256], "ab"]}, r"merge 1 is 'ab'; expected \[string, id\]"),
            ({"merges": [["aa"]]}, r"merge 0 is .*; expected \[string, id\]"),
            ({"merges": [["aa", 256, 1]]}, r"merge 0 is .*; expected \[string, id\]"),
            ({"merges": [["aa", 256.0]]}, r"merge 0 is .*; expected \[string, id\]"),
            ({"merges": [["aa", True]]}, r"merge 0 is .*; expected \[string, id\]"),
            ({"merges": [[["a", "a"], 256]]}, r"merge 0 is .*; expected \[string, id\]"),
            ({"merges": [["aa", 256], ["ab", 300]]}, r"merge 1 \('ab'\) has id 300; expected 257"),
            ({"merges": [["aa", -256]]}, r"merge 0 \('aa'\) has id -256; expected 256"),
            ({"merges": [["aB", 256]]}, r"merge 0 \('aB'\) holds 'B'; symbols are a to z"),
            ({"merges": [["a\u00e9a", 256]]}, r"merge 0 \('a\u00e9a'\) holds '\u00e9'; symbols are a to z"),
            ({"merges": [["aa", 256], ["b", 257]]}, r"merge 1 \('b'\) has 1 symbol; expected at least 2"),
            ({"merges": [["", 256]]}, r"merge 0 \(''\) has 0 symbols?; expected at least 2"),
            ({"merges": [["aa", 256], ["b" * 9, 257], ["aa", 258]]}, r"merge 2 \('aa'\) is also merge 0"),
        ],
    )
    def test_messages(self, backend, changes, message, tmp_path):
        with pytest.raises(ValueError, match=rf"tokenizer\.json is no ECG-Byte tokenizer: {message}"):
            load(json.dumps(content(**changes)), tmp_path)

    @pytest.mark.parametrize("text", ["[]", "1", "null", '"text"'])
    def test_no_object(self, backend, text, tmp_path):
        with pytest.raises(ValueError, match="expected a JSON object"):
            load(text, tmp_path)

    @pytest.mark.parametrize(
        "text",
        [
            b"",
            b"\x00" * 100,
            b"\x89PNG",
            b"{} {}",
            b"[" * 100_000,
            json.dumps(content()).encode() + b"}",
            "\ufeff".encode() + json.dumps(content()).encode(),
            json.dumps(content()).encode("utf-16"),
            json.dumps(content()).replace("250.0", "1" * 5000).encode(),
            json.dumps(content()).replace("zz", r"\ud800").encode(),
            json.dumps(content()).replace("250.0", "NaN").encode(),
            json.dumps(content()).replace("5.0", "1e999").encode(),
            json.dumps(content()).replace("5.0", "1" * 400).encode(),
            json.dumps(content()).replace(" ", "\u00a0").encode(),
        ],
    )
    def test_damaged(self, backend, text, tmp_path):
        with pytest.raises(ValueError, match=r"tokenizer\.json is no ECG-Byte tokenizer: "):
            load(text, tmp_path)

    def test_truncated(self, backend):
        text = json.dumps(content())
        from_json = ECGByteTokenizer([])._backend.from_json
        assert from_json(text).merges == ["aa", "aab", "zz"]
        for length in range(len(text)):
            with pytest.raises(ValueError, match="not valid JSON: "):
                from_json(text[:length])

    @given(changed_files())
    def test_any_text_is_read_alike(self, backend, text):
        """A tokenizer or a ValueError, and the same from both implementations."""

        def read(implementation):
            try:
                tokenizer = implementation.from_json(text)
            except ValueError:
                return None
            return tokenizer.merges, tokenizer.millivolt_range, tokenizer.across_leads, tokenizer.sampling_rate

        assert read(type(ECGByteTokenizer([])._backend)) == read(PythonTokenizer)

    @pytest.mark.parametrize("twice", ['"version": 1', '"version": 2', '"merges": []'])
    def test_the_last_of_equal_keys_counts(self, backend, twice, tmp_path):
        tokenizer = load(json.dumps(content()).replace("{", f"{{{twice}, ", 1), tmp_path)
        assert tokenizer.merges == ["aa", "aab", "zz"]


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"merges": ["aa", "A"]}, r"merge 1 \('A'\) holds 'A'; symbols are a to z"),
            ({"merges": ["a"]}, r"merge 0 \('a'\) has 1 symbol; expected at least 2"),
            ({"merges": ["aa", "bb", "aa"]}, r"merge 2 \('aa'\) is also merge 0"),
            ({"millivolt_range": (1, 0)}, r"millivolt_range is \(1, 0\); expected two finite numbers, low < high"),
            ({"millivolt_range": 5}, "millivolt_range is 5; expected two finite numbers"),
            ({"millivolt_range": (0, np.nan)}, "expected two finite numbers"),
            ({"sampling_rate": 0}, "sampling_rate is 0; expected a positive number"),
            ({"sampling_rate": np.inf}, "sampling_rate is inf; expected a positive number"),
            ({"sampling_rate": True}, "sampling_rate is True; expected a positive number"),
        ],
    )
    def test_errors(self, backend, arguments, message):
        with pytest.raises(ValueError, match=message):
            ECGByteTokenizer(**{"merges": []} | arguments)

    def test_numbers_become_floats(self, backend):
        tokenizer = ECGByteTokenizer([], [np.float32(-1), 2], sampling_rate=np.int64(500))
        assert repr(tokenizer) == (
            "ECGByteTokenizer(0 merges, millivolt_range=(-1.0, 2.0), across_leads=True, sampling_rate=500.0)"
        )


class TestWorkers:
    @pytest.mark.parametrize(
        "duplicate", [copy.copy, copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))]
    )
    def test_copies(self, backend, duplicate):
        tokenizer = ECGByteTokenizer(MERGES, (-5, 5), across_leads=False, sampling_rate=100)
        again = duplicate(tokenizer)
        assert again is not tokenizer
        assert again.to_json() == tokenizer.to_json()
        ecg = ecg_of("abzza", "mmmaa")
        assert again.encode(ecg).tolist() == tokenizer.encode(ecg).tolist()

    def test_data_loader_after_threads(self, backend, walks, merges):
        """A forked worker has no threads of its parent's, and must not wait for them."""
        tokenizer = ECGByteTokenizer(merges)
        expected = [ids.tolist() for ids in tokenizer.encode_batch(walks, num_threads=2)]
        loader = DataLoader(
            walks,
            batch_size=4,
            num_workers=2,
            multiprocessing_context="fork",
            collate_fn=lambda ecgs: tokenizer.encode_batch(ecgs, num_threads=2),
            timeout=30,
        )
        assert [ids.tolist() for batch in loader for ids in batch] == expected


def test_hub(tmp_path):
    code = """
from elm_ecg.tokenization_ecg_byte import ECGByteTokenizer
tokenizer = ECGByteTokenizer(["aa", "ab"], (-5, 5), sampling_rate=250)
tokenizer.push_to_hub("first")
tokenizer.save_pretrained("folder", push_to_hub=True, repo_id="group/second", revision="v1", commit_message="Second")
for repo, options in (("user/first", {}), ("group/second", {"revision": "v1"})):
    assert ECGByteTokenizer.from_pretrained(repo, **options).to_json() == tokenizer.to_json()
for repo, options, error in (
    ("user/none", {}, "user/none is not a local folder and is not a valid model identifier"),
    ("group/second", {}, "does not appear to have a file named ecg_byte.json"),
    ("user/first", {"revision": "v2"}, "v2 is not a valid git identifier"),
):
    try:
        ECGByteTokenizer.from_pretrained(repo, **options)
    except OSError as caught:
        assert error in str(caught), caught
    else:
        raise AssertionError(repo)
print(tokenizer.to_json(), end="")
"""
    with LoopbackHub() as hub:
        text = run_on_hub(code, hub, tmp_path)
        assert hub.files("user/first")[FILE_NAME].decode() == text
        assert hub.files("group/second", "v1")[FILE_NAME].decode() == text
