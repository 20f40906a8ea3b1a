"""Questions made of what records are labelled with: PTB-XL's diagnostic superclasses, and labels of any data set by templates."""

import ast
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from elm_ecg.training.data.arguments import QUESTION_KINDS
from elm_ecg.training.data.questions import QuestionRow, listed_cell
from elm_ecg.training.data.sources import PTBXL_TABLE
from elm_ecg.training.data.tables import identifier, read_table
from elm_ecg.training.files import resource

# superclass of PTB-XL's SCP-ECG statements -> what is asked
SUPERCLASSES = {
    "NORM": "Is this a normal ECG?",
    "MI": "Does this ECG show myocardial infarction?",
    "STTC": "Does this ECG show ST or T wave changes?",
    "CD": "Does this ECG show a conduction disturbance?",
    "HYP": "Does this ECG show hypertrophy?",
}
# kind of question -> its wordings
WORDINGS: dict[str, list[str]] = yaml.safe_load(resource("training/data/labels.yaml").read_text(encoding="utf-8"))
KIND = "single-"  # before the kind of a question, as ECG-QA calls those about one ECG
NONE = "none"  # the answer where there is no label, as ECG-QA has it
SEPARATOR = "; "  # of the labels of an answer, as of ECG-QA's lists
PARTNERS = 20  # with how many others a label is compared at most: the pairs of hundreds of labels would be too many
# as tables write that a record has a label, and that it has not
FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def superclass_questions(folder: Path) -> tuple[list[QuestionRow], int]:
    """Yes/no questions about the five diagnostic superclasses of PTB-XL's records, and how many records have none of these.

    A record is of a superclass if its `scp_codes` name a diagnostic statement of it, however likely: a likelihood of 0 means
    that it is unknown, and PTB-XL's benchmark counts them all (Strodthoff et al. 2020, https://arxiv.org/abs/2004.13701).
    Records of no superclass are left out: nobody has judged them, so "no" to all five might be wrong.

    Raises:
        ValueError: a table lacks a column, or `scp_codes` are no dict.
    """
    # the column of the codes has an empty name
    statements = read_table(folder / "scp_statements.csv", ("", "diagnostic", "diagnostic_class"))
    classes = {row[""]: row["diagnostic_class"] for row in statements if row["diagnostic"]}  # not of form or rhythm
    questions, without = [], 0
    for row in read_table(folder / PTBXL_TABLE, ("ecg_id", "scp_codes")):
        try:
            codes = dict(ast.literal_eval(row["scp_codes"]))  # written by Python with single quotes, so no JSON
        except (ValueError, SyntaxError, TypeError) as error:
            raise ValueError(
                f"The scp_codes of ecg_id {row['ecg_id']} are {row['scp_codes']!r}; expected a dict."
            ) from error
        superclasses = {classes[code] for code in codes if code in classes}
        without += not superclasses
        for superclass, question in SUPERCLASSES.items() if superclasses else ():
            answer = "yes" if superclass in superclasses else "no"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            questions.append(QuestionRow((identifier(row["ecg_id"]),), turns, columns={"question_type": superclass}))
    return questions, without


def read_labels(
    metadata: Mapping[str, Mapping[str, Any]], columns: Sequence[str]
) -> dict[str, dict[str, list[str] | None]]:
    """The labels of records, as `label_questions` takes them, from columns of a table.

    A column either holds 1 for the records that have the label of its name and 0 for the others (also true and false, yes and
    no), or the labels themselves: a list, in JSON where the cell is a text, or names separated by semicolons, by commas if none of
    its cells has a semicolon; "none" stands for no label. A record has the labels of all columns. None are known (None) of a record
    without a value in one of the former columns, or in all of the latter: "no" might be wrong.

    Args:
        metadata: record -> column -> value.

    Raises:
        ValueError: a column holds 0 beside something else than 1.
    """
    labels: dict[str, list[str] | None] = dict.fromkeys(metadata)
    unknown: set[str] = set()
    for column in columns:
        cells = {record: None if _is_empty(row.get(column)) else row[column] for record, row in metadata.items()}
        texts = {identifier(cell).lower() for cell in cells.values() if not isinstance(cell, list | tuple | None)}
        is_flag = (
            bool(texts) and texts <= {*FLAGS} and not any(isinstance(cell, list | tuple) for cell in cells.values())
        )
        if "0" in texts and not is_flag:
            others = ", ".join(sorted(texts - {"0", "1"})[:3])
            raise ValueError(
                f"The label column {column} holds 0 and {others}; expected 0 and 1, or the names of labels."
            )
        separator = ";" if any(";" in text for text in texts) else ","
        for record, cell in cells.items():
            if cell is None:
                unknown |= {record} if is_flag else set()
            elif is_flag:
                labels[record] = [*(labels[record] or ()), *([column] if FLAGS[identifier(cell).lower()] else ())]
            else:
                labels[record] = [*(labels[record] or ()), *_names(cell, separator)]
    return {record: {"labels": None if record in unknown else of_record} for record, of_record in labels.items()}


def _is_empty(cell: Any) -> bool:
    return (
        cell is None or (isinstance(cell, float) and math.isnan(cell)) or (isinstance(cell, str) and not cell.strip())
    )


def _names(cell: Any, separator: str) -> list[str]:
    if isinstance(cell, list | tuple):
        parts = list(cell)
    else:
        parts = listed_cell(cell) if str(cell).startswith("[") else str(cell).split(separator)
    return [identifier(part) for part in parts if part != [] and str(part).strip()]  # `listed_cell` gives [[]] for "[]"


def labelled(about: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The records that have `labels`, which may be none; ValueError if no record has them."""
    records = [record for record, row in about.items() if row.get("labels") is not None]
    if not records:
        raise ValueError(
            f"--make_questions: none of the {len(about):,} records has labels. Those of public sets are known with --source, but for "
            "MIMIC-IV-ECG, which has none; of others name the columns of the table of --metadata that hold them with --label_columns."
        )
    return records


def label_questions(
    about: Mapping[str, Mapping[str, Any]],
    kinds: Iterable[str] = QUESTION_KINDS,
    seed: int = 0,
    min_records: int = 10,
    split_of: Mapping[str, str] | None = None,
) -> tuple[list[QuestionRow], dict[str, int]]:
    """Questions about the labels of records by templates, as ECG-QA has them (Oh et al. 2023, https://arxiv.org/abs/2306.15681).

    - `verify`: whether the ECG shows a label. Of each label as many records with it as without are asked, as many as there are.
    - `choose`: which of two labels it shows. The answer is one of them, the other, both or none; of each pair as many records
      are asked for each of these, fewer of both where there are fewer. In all there are about as many as records.
    - `query`: what it shows: all of its labels in the alphabet's order, or none.

    The same records, labels and seed give the same questions, in whatever order the records are.

    Args:
        about: record -> a row whose `labels` are a list of names, empty where the record has none; without it, or where it is
            None, nobody has judged the record, and it is left out.
        kinds: of `QUESTION_KINDS`.
        min_records: that a label needs to be asked about. Answers to `query` name rarer ones too.
        split_of: record -> its split; the answers are then balanced in each split. None: in all records together.

    Returns:
        The questions, with `question_type` and `attribute`, the list of labels asked about; and what was left out -> how many.

    Raises:
        ValueError: no record has labels, or there is nothing to ask of a kind.
    """
    labels = {record: tidied(about[record]["labels"]) for record in sorted(labelled(about))}
    counts = Counter(label for of_record in labels.values() for label in of_record)
    asked = sorted(label for label, number in counts.items() if number >= min_records)
    splits = defaultdict(list)
    for record in labels:
        splits[split_of.get(record, "") if split_of else ""].append(record)
    wanted = [kind for kind in QUESTION_KINDS if kind in {*kinds}]
    rows: list[QuestionRow] = []
    for number, split in enumerate(sorted(splits)):
        rng = np.random.default_rng([seed, number])
        maker = _Maker({record: labels[record] for record in splits[split]}, asked, rng)
        made = [row for kind in wanted for row in getattr(maker, kind)()]
        # the questions about a record in any order
        rows += [made[index] for index in rng.permutation(len(made)).tolist()]
    left_out = {
        "records without labels": len(about) - len(labels),
        f"labels of fewer than {min_records} records (--min_records)": len(counts) - len(asked),
    }
    there = {row.columns["question_type"] for row in rows}
    if absent := [kind for kind in wanted if KIND + kind not in there]:
        raise ValueError(
            f"--make_questions {' '.join(absent)}: there is nothing to ask about {len(asked)} of {len(counts)} labels, which at least "
            f"{min_records} of {len(labels):,} records have (--min_records). verify needs records with and without a label, choose two "
            "labels that are not always together."
        )
    return rows, left_out


def tidied(labels: Iterable[Any]) -> list[str]:
    """The labels of a record in the alphabet's order, each once; a semicolon would part them in an answer, so it does here."""
    texts = (" ".join(part.split()) for label in labels for part in str(label).split(";"))
    return sorted({text for text in texts if text and text.lower() != NONE})


class _Maker:
    """Makes questions about the records of a split.

    Args:
        labels: record -> its labels, in the order in which the records are drawn.
        asked: labels that are asked about.
    """

    def __init__(self, labels: Mapping[str, list[str]], asked: Sequence[str], rng: np.random.Generator) -> None:
        self.labels, self.asked, self.rng = labels, asked, rng
        # rows share what they have in common, as there may be millions
        self.records = [(record,) for record in labels]
        positions = defaultdict(list)
        for index, of_record in enumerate(labels.values()):
            for label in of_record:
                positions[label].append(index)
        self.having = [np.array(positions[label], dtype=int) for label in asked]  # of each label, rising

    def verify(self) -> Iterator[QuestionRow]:
        for label, having in zip(self.asked, self.having, strict=True):
            lacking = np.delete(np.arange(len(self.records)), having)
            number = min(len(having), len(lacking))
            columns = {"question_type": KIND + "verify", "attribute": [label]}
            wordings = [wording.format(label=label) for wording in WORDINGS["verify"]]
            for among, answer in ((having, "yes"), (lacking, "no")):
                yield from self._ask(self._draw(among, number), wordings, answer, columns)

    def choose(self) -> Iterator[QuestionRow]:
        pairs = self._pairs()
        limit = math.ceil(len(self.records) / (4 * len(pairs))) if pairs else 0  # four answers
        for one, other in pairs:
            shown = np.zeros(len(self.records), dtype=np.int8)  # of each record: 1 for the one label, 2 for the other
            shown[self.having[one]] += 1
            shown[self.having[other]] += 2
            neither, only_first, only_second, both = (np.flatnonzero(shown == value) for value in range(4))
            number = min(limit, len(only_first), len(only_second), len(neither) or limit)
            a, b = self.asked[one], self.asked[other]
            columns = {"question_type": KIND + "choose", "attribute": [a, b]}
            # each label stands first as often as second
            orders = [dict(zip("ab", order, strict=True)) for order in ((a, b), (b, a))]
            wordings = [wording.format(**order) for wording, order in product(WORDINGS["choose"], orders)]
            answers = ((only_first, a), (only_second, b), (both, f"{a}{SEPARATOR}{b}"), (neither, NONE))
            for among, answer in answers:
                yield from self._ask(self._draw(among, min(number, len(among))), wordings, answer, columns)

    def query(self) -> Iterator[QuestionRow]:
        columns = {"question_type": KIND + "query", "attribute": None}
        by_answer = defaultdict(list)
        for index, of_record in enumerate(self.labels.values()):
            by_answer[SEPARATOR.join(of_record) or NONE].append(index)
        for answer, indices in by_answer.items():
            yield from self._ask(indices, WORDINGS["query"], answer, columns)

    def _pairs(self) -> list[tuple[int, int]]:
        """Pairs of labels, each label with equally many others: in a random circle, those at most `PARTNERS` / 2 away."""
        number = len(self.asked)
        circle = self.rng.permutation(number).tolist()
        steps = range(1, min(number // 2, PARTNERS // 2) + 1)
        pairs = ((circle[start], circle[(start + step) % number]) for step in steps for start in range(number))
        return sorted({(min(pair), max(pair)) for pair in pairs})

    def _draw(self, among: np.ndarray, number: int) -> list[int]:
        return self.rng.choice(among, number, replace=False, shuffle=False).tolist()

    def _ask(
        self, indices: Sequence[int], wordings: Sequence[str], answer: str, columns: Mapping[str, Any]
    ) -> Iterator[QuestionRow]:
        said = {"role": "assistant", "content": answer}
        chats = [[{"role": "user", "content": wording}, said] for wording in wordings]
        for index, wording in zip(indices, self.rng.integers(len(wordings), size=len(indices)).tolist(), strict=True):
            yield QuestionRow(self.records[index], chats[wording], columns=columns)
