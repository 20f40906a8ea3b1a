"""PTB-XL's benchmark of superclasses, subclasses, form and rhythm (Strodthoff et al. 2020, IEEE JBHI 25(5), arXiv:2004.13701).

Macro AUROC of each of the four groups of statements on fold 10, as Table II has it, over the labels that some of its records have and some
have not. As there, a statement counts whatever its likelihood, a diagnostic one as its superclass and its subclass, and a group is asked about
the records that have a label of it. The score of a label is the likelihood of "yes" against "no" to a question about it. In a resample
of patients the macro AUROC is the mean over the labels that are defined there.

There are no texts: the labels are those of PTB-XL's own folder, or of the columns `superclass`, `subclass`, `form` and `rhythm` of
--metadata (names of labels, separated by spaces). `scp_statements.csv` is in that folder, or beside the records or the table.
"""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from elm_ecg.training.data.labels import SUPERCLASSES, WORDINGS
from elm_ecg.training.data.splits import FOLDS
from elm_ecg.training.evaluation.benchmarks.chats import Chat, SuiteOptions, Turn
from elm_ecg.training.evaluation.benchmarks.records import RecordPlaces
from elm_ecg.training.evaluation.benchmarks.suite import Suite
from elm_ecg.training.evaluation.scale import MetricScale

GROUPS = ("superclass", "subclass", "form", "rhythm")
STATEMENTS = "scp_statements.csv"
# subclasses that are no statements, in the words of Wagner et al. 2020 (Scientific Data 7:154)
SUBCLASSES = {
    "STTC": "ST/T changes",
    "AVB": "AV block",
    "ISCA": "ischemia in anterior leads",
    "ISCI": "ischemia in inferior leads",
}
ANSWERS = ("no", "yes")


class PTBXL(Suite):
    """The statements of PTB-XL's test fold, asked one by one."""

    name, title = "ptbxl", "PTB-XL"
    paper = "https://arxiv.org/abs/2004.13701"
    needs_texts = False
    has_splits = True
    score = "likelihood"
    main_metric = "auroc"
    scales = {f"auroc_{group}": MetricScale(title=f"macro AUROC, {group}", unit="", decimals=3) for group in GROUPS} | {
        "auroc": MetricScale(title="macro AUROC, all labels", unit="", decimals=3)
    }

    def chats(self, place: Path | None, records: RecordPlaces, options: SuiteOptions) -> Iterator[Chat]:
        """A chat for each record and label; see `Suite.chats`."""
        file = records.file(STATEMENTS) if place is None else place / STATEMENTS
        if file is None or not file.is_file():
            raise ValueError(
                f"--suite ptbxl needs {STATEMENTS} of PTB-XL beside the --records; or say ptbxl=FOLDER that holds it."
            )
        statements = read_statements(file)
        labels = {
            record: of_record
            for record, about in records.about.items()
            if options.split in ("all", FOLDS.get(int(float(about.get("strat_fold") or 0))))
            and any((of_record := labels_of(about, statements)).values())
        }
        if not labels:
            raise ValueError(
                f"--suite ptbxl: no record of the split {options.split!r} has labels. Give --records PTB-XL's own folder, or --metadata a table "
                f"with strat_fold, {', '.join(GROUPS)}."
            )
        for group in GROUPS:
            asked = {record: names[group] for record, names in labels.items() if names[group]}
            known = sorted(set().union(*asked.values()))
            # AUROC needs both answers
            known = [name for name in known if not all(name in names for names in asked.values())]
            for record, names in asked.items():
                for name in known:
                    answer = ANSWERS[name in names]
                    yield Chat(
                        (record,), (Turn(question_of(group, name, statements), answer, f"{group} {name}", ANSWERS),)
                    )

    def group_of(self, question_type: str) -> str | None:
        """The score of a group; see `Suite.group_of`."""
        return f"auroc_{question_type.partition(' ')[0]}"


def read_statements(file: Path) -> dict[str, dict[str, str]]:
    """Code, without underscores at its ends -> its row of PTB-XL's table of statements.

    Raises:
        ValueError: the table lacks a column.
    """
    with file.open(newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    columns = ("", "description", "diagnostic", "form", "rhythm", "diagnostic_class", "diagnostic_subclass")
    if missing := [name for name in columns if not rows or name not in rows[0]]:
        raise ValueError(f"{file} lacks the columns {', '.join(map(repr, missing))}; fetch it anew from PTB-XL.")
    return {row[""].strip("_"): row for row in rows}


def labels_of(about: Mapping[str, object], statements: Mapping[str, Mapping[str, str]]) -> dict[str, set[str]]:
    """The labels of a record in each group: of the columns of that name, or of its `codes`."""
    if any(group in about for group in GROUPS):
        return {group: {name.strip("_") for name in str(about.get(group) or "").split()} for group in GROUPS}
    codes = about.get("codes")
    found: dict[str, set[str]] = {group: set() for group in GROUPS}
    for code in codes if isinstance(codes, list) else ():
        row = statements.get(str(code).strip("_"))
        if row is None:
            continue
        if row["diagnostic"]:
            found["superclass"].add(row["diagnostic_class"])
            found["subclass"].add(row["diagnostic_subclass"].strip("_"))
        for group in ("form", "rhythm"):
            if row[group]:
                found[group].add(row[""].strip("_"))
    return found


def question_of(group: str, name: str, statements: Mapping[str, Mapping[str, str]]) -> str:
    """What is asked about a label."""
    if group == "superclass" and name in SUPERCLASSES:
        return SUPERCLASSES[name]
    if group == "subclass" and name == "NORM":
        return SUPERCLASSES[name]
    words = [SUBCLASSES.get(part) or _described(part, statements) for part in name.split("/")]
    return WORDINGS["verify"][0].format(label=" or ".join(words))


def _described(code: str, statements: Mapping[str, Mapping[str, str]]) -> str:
    return statements[code]["description"] if code in statements else code
