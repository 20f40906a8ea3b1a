"""`elm data build`: a dataset of `build.make_plan` as parquet files and a card, in a new folder."""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData

from elm_ecg.training.command_line import printable
from elm_ecg.training.data.arguments import BuildArguments
from elm_ecg.training.data.build import ROW_GROUP_BYTES, Plan, make_plan, row_groups
from elm_ecg.training.data.downloads import DOWNLOADS
from elm_ecg.training.data.schema import as_list, counted
from elm_ecg.training.files import check_output_folder, new_folder
from elm_ecg.training.markdown import CARD, TAGS, citation, make_card, use_of

# the Hub's names of sizes, by the number of rows that they end before
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
SHARD_BYTES = 500 * 10**6


def write_split(folder: Path, split: str, groups: Iterator[pa.Table], schema: pa.Schema) -> None:
    """Writes the row groups into `SPLIT-00000-of-0000N.parquet`, as many files as it takes.

    The bytes of the amplitudes are separated before they are compressed, which makes files a quarter smaller; Arrow reads
    that from version 17 on.
    """
    ecg = "ecg.list.element" if pa.types.is_list(schema.field("ecg").type) else "ecg"  # Parquet's path of it
    options: dict[str, Any] = {
        "compression": "zstd",
        "compression_level": 3,
        "use_dictionary": False,  # pyarrow takes no `column_encoding` beside dictionaries
        "column_encoding": {f"{ecg}.array.list.element.list.element": "BYTE_STREAM_SPLIT"},
        "data_page_size": ROW_GROUP_BYTES,  # compression sees the repetitions of a page
    }
    group = next(groups, None)  # before any file is opened: a split without rows has none
    paths: list[Path] = []
    while group is not None:
        paths.append(folder / f"{split}-{len(paths):05d}.parquet")
        with pq.ParquetWriter(paths[-1], schema, **options) as writer:
            while group is not None and paths[-1].stat().st_size < SHARD_BYTES:
                writer.write_table(group)
                group = next(groups, None)
    for path in paths:
        path.rename(path.with_stem(f"{path.stem}-of-{len(paths):05d}"))  # N is known only now


@dataclass
class Summary:
    """What a split holds; `rates`, `leads` and `seconds` are of the ECGs of all rows."""

    rows: int = 0
    records: set[str] = field(default_factory=set)
    patients: set[str | None] = field(default_factory=set)
    rates: Counter[str] = field(default_factory=Counter)
    leads: Counter[str] = field(default_factory=Counter)
    seconds: set[float] = field(default_factory=set)

    def watch(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows as they are, counted as they pass."""
        for row in rows:
            self.rows += 1
            self.records.update(as_list(row["record_id"]))
            self.patients.update(as_list(row.get("patient_id")))
            for ecg in as_list(row["ecg"]):
                self.rates[f"{ecg['sampling_rate']:g} Hz"] += 1
                self.leads[" ".join(ecg["lead_names"])] += 1
                self.seconds.add(ecg["array"].shape[1] / ecg["sampling_rate"])
            yield row

    @property
    def num_patients(self) -> int | None:
        """How many patients there are; None if the patient of a record is unknown."""
        return None if None in self.patients else len(self.patients)


def write_card(path: Path, args: argparse.Namespace, plan: Plan, summaries: Mapping[str, Summary]) -> None:
    """The card of a dataset, from `model_cards/dataset.md`.

    Args:
        args: those of `build`.
        summaries: of the splits that have rows.
    """
    name = args.output_dir.resolve().name
    source = DOWNLOADS.get(args.source)
    licence = args.license or (source.license if source else None)
    num_rows = sum(summary.rows for summary in summaries.values())
    lengths = sorted(set.union(*(summary.seconds for summary in summaries.values())))
    # no `configs`: files have the names of their splits, and with it `datasets` takes folders of one name for the same data
    metadata = DatasetCardData(
        pretty_name=args.name,
        license=licence,
        task_categories=["question-answering"],
        tags=[*TAGS, "medical", "elm"],
        size_categories=next((size for limit, size in SIZES.items() if num_rows < limit), "n>10M"),
    )
    card = make_card(
        "dataset.md",
        metadata,
        title=args.name or name,
        args=args,
        attribution=args.attribution or ([source.attribution] if source else []),
        licence=licence,
        plan=plan,
        summaries=summaries,
        rates=_shares(summary.rates for summary in summaries.values()),
        leads=_shares(summary.leads for summary in summaries.values()),
        lengths=lengths if len(lengths) == 1 else [lengths[0], lengths[-1]],
        columns={column.name: _type_name(column.type) for column in plan.schema},
        use=use_of("dataset", name, split=next(iter(summaries))),
        citation=citation(args.name or name, "dataset"),
        versions={package: version(package) for package in ("elm-ecg", "datasets")},
    )
    card.save(path)


def _shares(counts: Iterable[Counter[str]]) -> str:
    total = sum(counts, Counter())
    if len(total) == 1:
        return next(iter(total))
    return ", ".join(f"{name} ({count / total.total():.1%})" for name, count in total.most_common(10))


def _type_name(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list of {_type_name(kind.value_type)}"
    return f"{{{', '.join(member.name for member in kind)}}}" if pa.types.is_struct(kind) else str(kind)


def build(args: argparse.Namespace) -> None:
    """Makes a dataset of records and questions, with its card, in a new folder; says what it holds.

    Raises:
        ValueError: as `build_dataset`; or the folder is there and not empty.
    """
    options = BuildArguments(**{option.name: getattr(args, option.name) for option in fields(BuildArguments)})
    check_output_folder(args.output_dir, new=True)  # before all is read
    plan = make_plan(args.records, args.questions, options)
    summaries = {split: Summary() for split in plan.questions}
    with new_folder(args.output_dir) as folder:  # replaces `output_dir` if all goes well
        data = folder / "data"
        data.mkdir()
        for split, summary in summaries.items():
            write_split(data, split, row_groups(summary.watch(plan.rows(split)), plan.schema), plan.schema)
        summaries = {split: summary for split, summary in summaries.items() if summary.rows}
        plan.check_rows(bool(summaries))
        write_card(folder / CARD, args, plan, summaries)
        size = sum(file.stat().st_size for file in data.iterdir())
    for remark in plan.remarks():
        print(printable(remark))
    for split, summary in summaries.items():
        patients = "patients unknown" if summary.num_patients is None else counted(summary.num_patients, "patient")
        print(f"{split:<11} {counted(summary.rows, 'row')}, {counted(len(summary.records), 'record')}, {patients}")
    print(
        f"Split by {plan.split_by}, {size / 1e6:,.1f} MB: dataset and card in {args.output_dir.resolve()}", flush=True
    )
