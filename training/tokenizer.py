"""ECG-Byte tokenizers: `elm tokenizer train`, `inspect` and `import`."""

import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from huggingface_hub import ModelCardData
from tqdm import tqdm

from elm_ecg.ecg_utils import STANDARD_LEADS, ECGRecord, as_record, canonical_lead_names, read_ecg, resampling_ratio
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.tokenization_ecg_byte import FILE_NAME, ECGByteTokenizer, ecg_byte
from elm_ecg.training.arguments import DataArguments
from elm_ecg.training.command_line import CommandLineParser, printable, whole_number
from elm_ecg.training.data.loading import ecgs_of, load_ecgs
from elm_ecg.training.data.reference_files import Segment
from elm_ecg.training.figures import plot_tokens
from elm_ecg.training.files import new_folder, write_text
from elm_ecg.training.markdown import CARD, TAGS, citation, environment, make_card, on_hub, public_name, use_of
from elm_ecg.training.sharing.ecg_byte_import import ORDER_FILE, read_ecg_byte_pickle

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# measured: 4 of them are the float32 sample, the others are taken while merging
BYTES_PER_SAMPLE = 40 if ecg_byte is None else 20


def load_splits(args: argparse.Namespace, splits: Sequence[str], subset: float | None = None) -> list[Dataset]:
    """The ECGs of each split of `args.data`.

    Raises:
        ValueError: a split is in none of the datasets.
    """
    data_args = DataArguments(data=args.data, data_subset=subset, fold=args.fold, ecg_root=args.ecg_root)
    parts = []
    for split in splits:
        data = load_ecgs(data_args, split, args.seed if subset else 0)  # `inspect` has no --seed, and takes all rows
        if data is None:
            raise ValueError(f"--data {' '.join(args.data)} has no split {split!r}.")
        parts.append(data)
    return parts


def read_records(
    rows: Iterable[dict[str, Any]], lead_names: Sequence[str] | None, sampling_rate: float | None
) -> Iterator[ECGRecord]:
    """Each distinct record of the rows, prepared by `prepare`; chats repeat a record for every question.

    Raises:
        ValueError: an ECG is invalid or lacks a lead.
    """
    seen: set[str | Segment | bytes] = set()
    for index, row in enumerate(rows):
        for ecg in ecgs_of(row):
            if isinstance(ecg, str | Segment):  # of a file, which is read once
                if ecg in seen:
                    continue
                seen.add(ecg)
            try:
                record = as_record(ecg)
                content = repr((record.sampling_rate, record.lead_names)).encode() + record.array.tobytes()
                key = hashlib.sha256(content).digest()  # the same samples at another rate are another record
                if key in seen:
                    continue
                seen.add(key)
                record = prepare(record, lead_names, sampling_rate)
            except ValueError as error:
                raise ValueError(f"Row {index}, counted from 0: {error}") from error
            yield record


def prepare(record: ECGRecord, lead_names: Sequence[str] | None, sampling_rate: float | None) -> ECGRecord:
    """What the ECGFeatureExtractor makes of a record without normalization, but in its whole length.

    Args:
        lead_names: None for those that the record has, in standard order.
        sampling_rate: None for the record's own.
    """
    lead_names = lead_names or [name for name in STANDARD_LEADS if name in record.lead_names]
    rate = sampling_rate or record.sampling_rate
    whole = math.ceil(record.array.shape[1] * resampling_ratio(record.sampling_rate, rate))  # exact: a Fraction
    return ECGFeatureExtractor(rate, whole, lead_names).prepare(record)  # so long that it cuts nothing


def train(args: argparse.Namespace) -> None:
    """`elm tokenizer train`."""
    millivolt_range = None if args.millivolt_range is None else tuple(args.millivolt_range)
    settings = {
        "millivolt_range": millivolt_range,
        "across_leads": not args.within_leads,
        "sampling_rate": args.sampling_rate,
    }
    # faults of the settings and of the folder show before the data are read
    ECGByteTokenizer([], **settings)
    lead_names = canonical_lead_names(args.lead_names)
    with new_folder(args.output_dir) as folder:
        _train(args, folder, lead_names, settings)
    print(f"Tokenizer and card in {args.output_dir.resolve()}", flush=True)


def _train(args: argparse.Namespace, folder: Path, lead_names: Sequence[str], settings: dict[str, Any]) -> None:
    splits = load_splits(args, args.split, args.data_subset)
    rows = tqdm(chain.from_iterable(splits), total=sum(map(len, splits)), desc="Reading", unit="row")
    prepared = list(read_records(rows, lead_names, args.sampling_rate))
    records = [record.array for record in prepared]
    for notice, number in Counter(notice for record in prepared for notice in record.metadata["notices"]).items():
        print(printable(f"{notice} ({number:,} of {len(records):,} records)"))
    num_samples = sum(record.size for record in records)
    read = f"{len(records):,} records of {len(lead_names)} leads at {args.sampling_rate:g} Hz, {num_samples:,} samples in all"
    print(f"{read}; they and their merging take about {_size(BYTES_PER_SAMPLE * num_samples)} of memory.", flush=True)
    # scaled to its own range, a flat record is the lowest symbol throughout, which other records hardly hold: without one
    # among the records, it would become one token for each sample
    flat = [np.zeros_like(record) for record in records[:1]] if settings["millivolt_range"] is None else []
    tokenizer = ECGByteTokenizer.train(
        [*records, *flat], num_merges=args.num_merges, min_frequency=args.min_frequency, **settings
    )
    if len(tokenizer.merges) < args.num_merges:
        print(f"No other pair occurs {args.min_frequency} times: {len(tokenizer.merges):,} merges.")
    compression = num_samples / sum(map(len, tokenizer.encode_batch(records)))
    names = ", ".join(f"`{public_name(name)}`" for name in args.data)
    _save(
        folder,
        args.output_dir.resolve().name,
        tokenizer,
        datasets=[name for name in args.data if on_hub(name)],
        ecg_input=f"{', '.join(lead_names)} at {args.sampling_rate:g} Hz, in millivolts",
        data=f"{names} ({', '.join(args.split)}): {read}{', and one flat record' if flat else ''}",
        compression=f"{compression:.1f} samples for each token, over these records",
        rights=_rights(splits),
    )
    peak = f" Peak memory of the process: {_size(_peak_memory())}." if resource else ""
    print(f"{len(tokenizer.merges):,} merges, {compression:.1f} samples for each token.{peak}")


def import_pickle(args: argparse.Namespace) -> None:
    """`elm tokenizer import`."""
    with new_folder(args.output_dir) as folder:
        pickled, ids = read_ecg_byte_pickle(args.file)
        tokenizer = ECGByteTokenizer(pickled.merges, sampling_rate=args.sampling_rate)
        rate = "a rate that its file does not state" if args.sampling_rate is None else f"{args.sampling_rate:g} Hz"
        _save(
            folder,
            args.output_dir.resolve().name,
            tokenizer,
            datasets=[],
            ecg_input=f"leads and samples at {rate}, in millivolts",
            data=f"unknown: imported from `{args.file.name}`, a file of the reference system",
            compression="not measured",
            rights="Those of the file that it was imported from.",
        )
        write_text(folder / ORDER_FILE, json.dumps(ids) + "\n")
    print(f"{len(tokenizer.merges):,} merges. Tokenizer and card in {args.output_dir.resolve()}")


def _save(folder: Path, name: str, tokenizer: ECGByteTokenizer, datasets: list[str], **parts: str) -> None:
    """Writes the tokenizer and its card, in which it has this name."""
    card = make_card(
        "tokenizer.md",
        ModelCardData(datasets=datasets or None, tags=[*TAGS, "ecg-byte", "tokenizer"]),
        model_name=name,
        use=use_of("tokenizer", name),
        num_merges=f"{len(tokenizer.merges):,}",
        longest=f"{tokenizer.token_lengths.max():,}",
        normalization=_normalization(tokenizer),
        borders=_borders(tokenizer),
        environment=environment(("numpy", "datasets", "elm-ecg")),
        citation=citation(name, "tokenizer"),
        **parts,
    )
    (folder / FILE_NAME).write_text(tokenizer.to_json(), encoding="utf-8")
    card.save(folder / CARD)


def _rights(parts: list[Dataset]) -> str:
    """Licences and citations of the datasets, each once."""
    licences = dict.fromkeys(part.info.license.strip() for part in parts if part.info.license)  # a set has no order
    citations = dict.fromkeys(part.info.citation.strip() for part in parts if part.info.citation)
    texts = [*licences, *(f"```\n{citation}\n```" for citation in citations)]
    return "\n\n".join(texts) or "The datasets name neither."


def _normalization(tokenizer: ECGByteTokenizer) -> str:
    if tokenizer.millivolt_range is None:
        return "`minmax`: the amplitudes divide the range of each record, so its height in millivolts is lost"
    low, high = tokenizer.millivolt_range
    return f"`millivolt`: the amplitudes divide {low:g} to {high:g} mV, and what lies outside is clipped"


def _borders(tokenizer: ECGByteTokenizer) -> str:
    return f"{'run on' if tokenizer.across_leads else 'never run'} from one lead into the next"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _peak_memory() -> int:
    """Bytes that the process has held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, KiB on Linux


@dataclass
class Usage:
    """How a tokenizer fares on records.

    Args:
        num_symbols, num_tokens: int [records].
        counts: int [ids], how often each token comes up.
        mean_square: of the error of what the tokens decode to, over all samples, in square millivolts.
        worst: the largest error of a sample, in millivolts.
    """

    num_symbols: np.ndarray
    num_tokens: np.ndarray
    counts: np.ndarray
    mean_square: float
    worst: float


def measure(tokenizer: ECGByteTokenizer, records: Iterable[np.ndarray]) -> Usage:
    """Encodes and decodes records, float32 [leads, samples] in millivolts."""
    counts = np.zeros(len(tokenizer.token_lengths), dtype=np.int64)  # also of ids that are no token
    num_symbols, num_tokens, squares, worst = [], [], 0.0, 0.0
    for record in records:
        ids, decoded = _there_and_back(tokenizer, record)
        error = np.abs(decoded - record)  # [leads, samples] in millivolts
        counts += np.bincount(ids, minlength=len(counts))
        num_symbols.append(record.size)
        num_tokens.append(len(ids))
        squares += float(np.square(error, dtype=np.float64).sum())  # float32 would lose digits
        worst = max(worst, float(error.max()))
    return Usage(np.array(num_symbols), np.array(num_tokens), counts, squares / sum(num_symbols), worst)


def _there_and_back(tokenizer: ECGByteTokenizer, record: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids = tokenizer.encode(record)
    return ids, tokenizer.decode(ids, *tokenizer.value_range(record), num_leads=len(record))  # minmax: ids lack it


def inspect(args: argparse.Namespace) -> None:
    """`elm tokenizer inspect`."""
    if args.output.suffix not in (".png", ".svg"):
        raise ValueError(f"--output is {args.output}; expected a file that ends with .png or .svg.")
    if args.ecg is None and (args.sampling_rate or args.unit or args.lead_names):
        raise ValueError("--sampling_rate, --unit and --lead_names describe the file of --ecg; name one.")
    if not Path(args.tokenizer).exists():
        from elm_ecg.training.model_files import find_model_file  # late: it imports PyTorch, for a better error

        find_model_file(args.tokenizer, [FILE_NAME], label="The tokenizer")
    tokenizer = ECGByteTokenizer.from_pretrained(args.tokenizer)
    rate = tokenizer.sampling_rate
    print(args.tokenizer)
    _print_rows(
        {
            "vocabulary": f"26 amplitudes and {len(tokenizer.merges):,} merges",
            "normalisation": _normalization(tokenizer),
            "tokens": _borders(tokenizer),
            "sampling rate": "unknown, so records are taken at their own" if rate is None else f"{rate:g} Hz",
            "token length": _lengths(tokenizer.token_lengths[tokenizer.token_ids], rate),  # other ids have length 0
        }
    )
    records = []
    if args.ecg is not None:
        record = read_ecg(args.ecg, args.sampling_rate, args.lead_names, args.unit)
        records.append(prepare(record, None, rate))
        for notice in records[0].metadata["notices"]:
            print(printable(f"  {notice}"))
    if args.data is not None:
        rows = chain.from_iterable(load_splits(args, [args.split]))
        some = islice(read_records(rows, None, rate), args.max_records)  # distinct records, not rows
        records += tqdm(some, total=args.max_records, desc="Reading", unit="record")
        if not records:
            raise ValueError(f"--data {' '.join(args.data)} ({args.split}) has no ECG.")
    if not records:
        print("How it fares on records: --ecg FILE, or --data DATASET.")
        return
    print(f"{len(records):,} record{'s' if len(records) > 1 else ''}")
    _print_usage(tokenizer, measure(tokenizer, [record.array for record in records]))
    _draw(tokenizer, records[0], "First record" if args.ecg is None else args.ecg.name, args.output)
    print(f"Picture of its tokens in {args.output.resolve()}", flush=True)


def _print_usage(tokenizer: ECGByteTokenizer, usage: Usage) -> None:
    ratios = usage.num_symbols / usage.num_tokens
    used = np.flatnonzero(usage.counts)
    _print_rows(
        {
            "compression": f"{ratios.mean():.1f} symbols a token ({ratios.min():.1f} to {ratios.max():.1f})",
            "tokens": f"{usage.num_tokens.mean():,.0f} a record ({usage.num_tokens.min():,} to {usage.num_tokens.max():,})",
            "vocabulary used": f"{len(used):,} of {tokenizer.vocab_size:,} tokens ({len(used) / tokenizer.vocab_size:.1%})",
            "token length": _lengths(
                np.repeat(tokenizer.token_lengths[used], usage.counts[used]), tokenizer.sampling_rate
            ),
            "error": f"{np.sqrt(usage.mean_square):.4f} mV RMS, at most {usage.worst:.4f} mV",
        }
    )
    print("  most frequent tokens")
    for token_id in used[np.argsort(-usage.counts[used], kind="stable")][:10]:  # of equals the smallest id first
        share = usage.counts[token_id] / usage.counts.sum()
        print(
            f"    {token_id:>6} {usage.counts[token_id]:>9,} {share:>6.1%}  {_runs(tokenizer.symbols(int(token_id)))}"
        )


def _draw(tokenizer: ECGByteTokenizer, record: ECGRecord, name: str, path: Path) -> None:
    ids, decoded = _there_and_back(tokenizer, record.array)
    num_leads, num_samples = record.array.shape
    error = np.sqrt(np.square(decoded - record.array, dtype=np.float64).mean())
    title = (
        f"{name}: {len(ids):,} tokens for {num_leads} x {num_samples:,} samples, "
        f"{record.array.size / len(ids):.1f} symbols a token, error {error:.3f} mV RMS"
    )
    offsets = tokenizer.offsets(ids, num_samples)
    plot_tokens(record.array, decoded, offsets, record.sampling_rate, record.lead_names, path, title)


def _print_rows(rows: dict[str, str]) -> None:
    for label, text in rows.items():
        print(f"  {label:<17}{text}")


def _lengths(lengths: np.ndarray, sampling_rate: float | None) -> str:
    figures = np.array([lengths.mean(), np.median(lengths), lengths.max()])
    text = "mean {:.1f}, median {:.0f}, longest {:,.0f} symbols".format(*figures)
    if sampling_rate is not None:
        text += " ({:,.0f}, {:,.0f}, {:,.0f} ms)".format(*(1000 * figures / sampling_rate))  # a symbol is a sample
    return text


def _runs(symbols: str, at_most: int = 12) -> str:
    """The symbols "mmmmn" as "4m n"; only the first runs of a long token."""
    lengths = [(len(list(run)), symbol) for symbol, run in groupby(symbols)]
    text = " ".join(f"{length if length > 1 else ''}{symbol}" for length, symbol in lengths[:at_most])
    return f"{text} ..." if len(lengths) > at_most else text


def _add_data_options(command: argparse.ArgumentParser, required: bool) -> None:
    data_help = "datasets as of `elm sft`; only their column `ecg` is read, and each distinct record once"
    command.add_argument("--data", nargs="+", required=required, help=data_help)
    command.add_argument("--fold", type=int, help="fold of datasets that have splits such as fold1_train")
    command.add_argument(
        "--ecg_root", metavar="FOLDER", help="folder of the ECG files that a dataset names; default: its own folder"
    )


def make_parser() -> argparse.ArgumentParser:
    """The options of the three commands."""
    parser = CommandLineParser(prog="elm tokenizer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("train", help="learn a tokenizer from the ECGs of datasets")
    command.set_defaults(work=train)
    _add_data_options(command, required=True)
    command.add_argument("--output_dir", type=Path, required=True, help=f"new folder of {FILE_NAME} and its card")
    command.add_argument(
        "--num_merges", type=whole_number, default=10_000, help="how many to learn; default: %(default)s"
    )
    command.add_argument(
        "--millivolt_range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="millivolts that the 26 amplitudes divide; default: the range of each record, as in the reference",
    )
    command.add_argument("--within_leads", action="store_true", help="no token runs from one lead into the next")
    command.add_argument("--sampling_rate", type=float, default=250, help="Hz to resample to; default: %(default)s")
    command.add_argument(
        "--lead_names",
        nargs="+",
        default=STANDARD_LEADS,
        help="leads and their order; default: I II III aVR aVL aVF V1 ... V6",
    )
    command.add_argument("--split", nargs="+", default=["train"], help="splits of the data; default: train")
    command.add_argument("--data_subset", type=float, help="share of the rows, in (0, 1], chosen at random by --seed")
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument(
        "--min_frequency", type=whole_number, default=2, help="rarer pairs are not merged; default: %(default)s"
    )

    command = commands.add_parser("inspect", help="settings of a tokenizer, and how it fares on ECGs, with a picture")
    command.set_defaults(work=inspect)
    command.add_argument("tokenizer", help=f"folder or Hub id that holds {FILE_NAME}, or such a file")
    command.add_argument("--ecg", type=Path, metavar="FILE", help="a record, of any format that read_ecg reads")
    command.add_argument(
        "--sampling_rate", type=float, metavar="HZ", help="sampling rate of --ecg, where the file does not state it"
    )
    command.add_argument("--unit", help="unit of --ecg, where the file does not state it: mV, uV or V")
    command.add_argument(
        "--lead_names", nargs="+", help="leads of the rows of --ecg, where the file does not state them"
    )
    _add_data_options(command, required=False)
    command.add_argument("--split", default="test", help="split of the data; default: %(default)s")
    command.add_argument(
        "--max_records", type=whole_number, default=200, help="records of the data that are read; default: %(default)s"
    )
    command.add_argument(
        "--output",
        type=Path,
        default=Path("tokens.png"),
        metavar="FILE",
        help="picture, .png or .svg, of --ecg or else of the first record of the data; default: %(default)s",
    )

    command = commands.add_parser("import", help="a tokenizer from the reference system's pickle")
    command.set_defaults(work=import_pickle)
    command.add_argument("file", type=Path, metavar="FILE.pkl", help="it is read without being executed")
    command.add_argument("--output_dir", type=Path, required=True, help=f"new folder of {FILE_NAME} and its card")
    command.add_argument(
        "--sampling_rate", type=float, help="Hz of the records that it was trained on, which the file does not state"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs `elm tokenizer`."""
    args = make_parser().parse_args(argv)
    args.work(args)
