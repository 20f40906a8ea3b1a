"""`elm data build`: a dataset of `build.make_plan` as parquet files and a card, part by part.

    OUTPUT/README.md                                    the card
    OUTPUT/data/train-00000-of-00002.parquet            rows: questions, and the names of their ECGs
    OUTPUT/records/train-00000-of-00002.parquet         records, each once
    OUTPUT/.unfinished/                                 the same, and what was found of each part, until all parts are done

A part is written once it is whole, so that a build that was killed goes on with the next; machines that share the work write
different parts, whose names are the same as if one had written all.
"""

import argparse
import gc
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData

from elm_ecg.training.command_line import printable
from elm_ecg.training.data.arguments import BuildArguments
from elm_ecg.training.data.build import Plan, make_plan
from elm_ecg.training.data.downloads import DOWNLOADS
from elm_ecg.training.data.parts import Found, Part, ecg_table, in_processes, read_part
from elm_ecg.training.data.schema import RECORDS, WORK, counted
from elm_ecg.training.files import atomic_path, check_output_folder, ending_on_sigterm, naming, read_json, write_text
from elm_ecg.training.markdown import CARD, TAGS, citation, make_card, use_of

# the Hub's names of sizes, by the number of rows that they end before
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
ROWS = "data"
FINISHED = ".finished"  # what `WORK` is called while it is removed
PLAN, DONE = "plan.json", "parts"  # in `WORK`: what is being built, and what was found of each part that is done


def write_part(
    part: Part, folder: Path, options: BuildArguments, row_schema: pa.Schema, ecg_schema: pa.Schema
) -> Found:
    """Writes the records and rows of a part, each a file, and last what was found.

    Of amplitudes the differences from one to the next are packed: smaller and faster than what zstd alone makes of them. Compressed after
    that they would be smaller by a fifteenth, and take a fourth longer to write. A row group of records has the same place as that of
    the rows about them, unless a recording has more windows than a row group takes.
    """
    found = Found()
    of_records: dict[str, Any] = {
        "compression": "none",
        "data_page_size": 2**16,  # less than the cache holds
        "use_dictionary": False,  # pyarrow takes no `column_encoding` beside dictionaries
        "column_encoding": {"array.list.element": "DELTA_BINARY_PACKED"},
        "write_statistics": ["id"],
    }
    paths = [folder / kind / f"{part.name}.parquet" for kind in (RECORDS, ROWS)]
    with (
        atomic_path(paths[0]) as records_path,
        atomic_path(paths[1]) as rows_path,
        pq.ParquetWriter(records_path, ecg_schema, **of_records) as records,
        pq.ParquetWriter(rows_path, row_schema, compression="zstd") as rows,
    ):
        for block in read_part(part, options, found):
            for writer, table in (
                (records, ecg_table(block.ecgs, ecg_schema)),
                (rows, pa.Table.from_pylist(block.rows, row_schema)),
            ):
                if len(table):  # `datasets` reads no file that begins with an empty row group
                    writer.write_table(table)
    for path, number in zip(paths, (found.ecgs, found.rows), strict=True):
        if not number:  # nor an empty file
            path.unlink()
    write_text(folder / DONE / f"{part.name}.json", json.dumps(found.as_dict(), ensure_ascii=False))
    return found


def write_card(path: Path, args: argparse.Namespace, plan: Plan, found: Mapping[str, Found]) -> None:
    """The card of a dataset, from `model_cards/dataset.md`.

    Args:
        args: those of `build`.
        found: of the splits that have rows.
    """
    name = args.output_dir.resolve().name
    source = None if plan.source is None else DOWNLOADS[plan.source]
    licence = args.license or (source.license if source else None)
    num_rows = sum(of_split.rows for of_split in found.values())
    lengths = sorted(set().union(*(of_split.seconds for of_split in found.values())))
    # no `configs`: files have the names of their splits, and with it `datasets` takes folders of one name for the same data
    metadata = DatasetCardData(
        pretty_name=args.name,
        license=licence,
        task_categories=["question-answering"] if "messages" in plan.row_schema.names else None,
        tags=[*TAGS, "medical", "elm"],
        size_categories=next((size for limit, size in SIZES.items() if num_rows < limit), "n>10M"),
    )
    card = make_card(
        "dataset.md",
        metadata,
        title=args.name or name,
        args=args,
        attribution=args.attribution or ([source.attribution] if source else []),
        source=source,
        licence=licence,
        plan=plan,
        found=found,
        patients={split: plan.num_patients(split) for split in found},
        rates=_shares(of_split.rates for of_split in found.values()),
        leads=_shares(of_split.leads for of_split in found.values()),
        lengths=lengths if len(lengths) == 1 else [lengths[0], lengths[-1]],
        columns={column.name: _type_name(column.type) for column in plan.row_schema},
        record_columns={column.name: _type_name(column.type) for column in plan.ecg_schema},
        use=use_of("dataset", name, split=next(iter(found)), has_chats="messages" in plan.row_schema.names),
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
    """Makes a dataset of records and questions, with its card; says what it holds. Goes on where it was interrupted.

    Raises:
        ValueError: as `build_dataset`; or the folder is there and holds something else.
    """
    options = BuildArguments(**{option.name: getattr(args, option.name) for option in fields(BuildArguments)})
    output = args.output_dir.resolve()
    work = output / WORK
    new = not work.is_dir()
    _check_output(args, output, new)  # before all is read
    plan = make_plan(args.records, args.questions, options)
    gc.freeze()  # neither it nor the modules are garbage: they are looked through no more, not even when the process ends
    names = [name for split in plan.questions for name in plan.part_names(split)]
    with ending_on_sigterm(), naming(output):
        _begin(work, plan, output)
        try:
            mine = names if args.shard is None else names[args.shard[0] - 1 :: args.shard[1]]
            _write_parts(work, plan, mine, options)
            parts = {name: found for name in names if (found := _found(work, name, options)) is not None}
            if not work.is_dir():
                print(f"Another shard has ended the dataset in {output}.", flush=True)
                return
            if len(parts) < len(names):
                print(
                    f"{len(parts)} of {counted(len(names), 'part')} are in {output}. Once those of all shards are in one folder, the last "
                    "of them, or the same command without --shard, ends the dataset.",
                    flush=True,
                )
                return
            size = _end(output, work, args, plan, parts)
        except ValueError:
            if new and args.shard is None and not any(_found(work, name, options) for name in names):  # nothing is lost
                shutil.rmtree(work)
                with suppress(OSError):  # where a disk is mounted, or of a folder of others
                    output.rmdir()
            raise
    for remark in plan.remarks():
        print(printable(remark))
    for split, found in plan.found.items():
        number = plan.num_patients(split)
        patients = "patients unknown" if number is None else counted(number, "patient")
        print(f"{split:<11} {counted(found.rows, 'row')}, {counted(plan.num_records(split), 'record')}, {patients}")
    print(f"Split by {plan.split_by}, {size / 1e6:,.1f} MB: dataset and card in {output}", flush=True)


def _check_output(args: argparse.Namespace, output: Path, new: bool) -> None:
    """ValueError if the dataset cannot be written there, or would be read when the command is repeated."""
    if new and args.shard is not None and (output / CARD).is_file():
        raise ValueError(
            f"--output_dir {output} holds a dataset. If it is what the other shards have ended, nothing is left to do; else name another."
        )
    check_output_folder(args.output_dir, new=new)
    # of a public set, tables say which files are records
    sources = {"RECORDS": [args.records] if args.source is None else [], "--questions": args.questions or []}
    for name, paths in sources.items():
        for path in paths:
            if path.is_dir() and output.is_relative_to(path.resolve()):
                raise ValueError(
                    f"--output_dir {output} is in the folder of {name}, {path}, so that its files would be read as such; name another."
                )


def _begin(work: Path, plan: Plan, output: Path) -> None:
    """Makes the folder of what is not finished, or finds it.

    Raises:
        ValueError: something else was begun there.
    """
    fingerprint = {"plan": plan.fingerprint(), "elm-ecg": version("elm-ecg")}
    if not (work / PLAN).is_file():
        for name in (RECORDS, ROWS, DONE):
            (work / name).mkdir(parents=True, exist_ok=True)
        write_text(work / PLAN, json.dumps(fingerprint))
    elif read_json(work / PLAN) != fingerprint:
        raise ValueError(
            f"{output} holds the beginning of another dataset: other records, questions, tables or options, or another version of "
            f"elm-ecg. Repeat the command that began it, name another --output_dir, or remove {work}."
        )


def _found(work: Path, name: str, options: BuildArguments) -> Found | None:
    """What a part holds; None where it is not done, or not whole: a folder may be copied before that, or a disk have lost something."""
    try:
        found = Found.from_dict(read_json(work / DONE / f"{name}.json"))
        for kind, number in ((RECORDS, found.ecgs), (ROWS, found.rows)):
            file = f"{kind}/{name}.parquet"
            if number and number not in (_num_rows(work / file), _num_rows(work.parent / file)):  # may just be moved
                return None
    except (ValueError, OSError, KeyError, TypeError):
        return None
    return None if found.unreadable and not options.skip_unreadable else found


def _num_rows(path: Path) -> int | None:
    return pq.read_metadata(path).num_rows if path.is_file() else None


def _write_parts(work: Path, plan: Plan, names: list[str], options: BuildArguments) -> None:
    """Those of the parts that are not done yet."""
    write = partial(write_part, folder=work, options=options, row_schema=plan.row_schema, ecg_schema=plan.ecg_schema)
    todo = [name for name in names if _found(work, name, options) is None]
    with plan.progress(names, todo) as bar:
        for _ in in_processes(write, plan.parts(todo), options.num_proc, bar.update):
            pass


def _end(output: Path, work: Path, args: argparse.Namespace, plan: Plan, parts: Mapping[str, Found]) -> int:
    """Makes a dataset of the parts; its size in bytes. What was begun and killed goes on; several shards may do it at the same time."""
    for name, found in parts.items():
        plan.found[name.split("-")[0]].add(found)
    plan.check_rows()
    # a split without rows has no files, which `datasets` could not read
    plan.found = {split: found for split, found in plan.found.items() if found.rows}
    kept = {f"{name}.parquet" for split in plan.found for name in plan.part_names(split)}
    for kind in (RECORDS, ROWS):
        with suppress(FileNotFoundError):  # moved before the process was killed, or by another shard
            for file in (work / kind).iterdir():
                if file.name not in kept:  # of such a split, or what a killed process left
                    file.unlink(missing_ok=True)
            os.replace(work / kind, output / kind)
    write_card(output / CARD, args, plan, plan.found)
    finished = output / FINISHED
    with suppress(FileNotFoundError):
        os.replace(work, finished)  # at once, as what is there counts as unfinished while it has this folder
    shutil.rmtree(finished, ignore_errors=True)
    return sum(file.stat().st_size for kind in (RECORDS, ROWS) for file in (output / kind).iterdir())
