"""A suite's scores as a table for a paper: Markdown and LaTeX, a row for each model and for what it is shown of the ECG. Of a suite with many scores
these are the rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elm_ecg.training.data.schema import counted
from elm_ecg.training.evaluation.benchmarks.suite import Suite
from elm_ecg.training.evaluation.compare import table_lines, told_apart
from elm_ecg.training.evaluation.conditions import CONDITIONS, ECG
from elm_ecg.training.evaluation.scale import scales_of, title_of
from elm_ecg.training.files import write_text

MARKDOWN_FILE, LATEX_FILE = "table.md", "table.tex"
MAX_COLUMNS = 7  # of scores with intervals a page is not wide enough for more
_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def cells_of(suite: Suite, runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The header and the rows: model, what it is shown, and each of the suite's own scores that a run has, with its interval."""
    names = [name for name in suite.scales if any(name in run["metrics"] for run in runs)]
    rows = [["model", "shown", *(_heading(suite, name) for name in names)]]
    for run in runs:
        scales = scales_of(run)
        for condition, scores in run["conditions"].items():
            row = [run["model"], CONDITIONS[condition].label]
            for name in names:
                found = scores["metrics"].get(name)
                row.append("" if found is None else scales[name].with_interval(found))
            rows.append(row)
    return rows


def type_cells_of(suite: Suite, runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The scores of each type of question with the ECG, a column for each model, by the suite's first score that tells types apart; none
    where none does."""
    of_types = list(runs[0]["conditions"][ECG]["by_question_type"].values())
    name = next((name for name in suite.scales if sum(name in row for row in of_types) > 1), None)
    if name is None:
        return []
    # by likelihood a type is a single label, whose AUROC is no mean
    title = title_of(name) if suite.score == "likelihood" else suite.scales[name].title
    rows = [["type of question", "questions", *(f"{run['model']}, {title}" for run in runs)]]
    for kind, number in runs[0]["questions_by_type"].items():
        found = [run["conditions"][ECG]["by_question_type"].get(kind, {}).get(name) for run in runs]
        cells = ["" if row is None else suite.scales[name].with_interval(row) for row in found]
        rows.append([kind, f"{number:,}", *cells])
    return rows


def named(results: Mapping[Path, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results, by their paths; the `model` of each is its name in the tables, where no two have the same."""
    runs = results.values()
    names = [f"{run['model']} (ECG in words)" if run["settings"]["describe"] else run["model"] for run in runs]
    return [{**run, "model": name} for run, name in zip(runs, told_apart(names, [*results]), strict=True)]


def _heading(suite: Suite, name: str) -> str:
    return suite.scales[name].heading


def caption_of(suite: Suite, run: Mapping[str, Any]) -> str:
    """What the table shows, and of how many questions."""
    shares = (
        "Scores in percent where no other unit is said"
        if any(s.factor > 1 for s in suite.scales.values())
        else "Scores"
    )
    split = f", split {run['data']['split']}" if suite.has_splits else ""
    asked = "chosen by likelihood" if run["settings"]["score"] == "likelihood" else "generated"
    judge = run["suite"].get("judge")
    judged = "" if judge is None else f" Judged by {judge['model']}."
    return (
        f"{suite.title} ({suite.paper}){split}: {counted(run['num_questions'], 'question')} about "
        f"{counted(run['num_patients'], 'patient')}, answers {asked}. {shares}, in brackets their 95% intervals by patient, where the patients are enough for one.{judged}"
    )


def notes_of(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the scores of each model leave out, and what counts as wrong unasked."""
    return [f"{run['model']}, {what}: {number:,}." for run in runs for what, number in run["suite"]["left_out"].items()]


def to_latex(cells: Sequence[Sequence[str]], caption: str, num_heads: int = 1) -> str:
    """A table with the rules of the package booktabs.

    Args:
        num_heads: rows of the heading.
    """
    lines = [" & ".join(map(_escaped, row)) + r" \\" for row in cells]
    columns = "".join("l" if place < 3 - num_heads else "r" for place in range(len(cells[0])))
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{_escaped(caption)}}}",
            f"\\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            *lines[:num_heads],
            r"\midrule",
            *lines[num_heads:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def write_tables(folder: Path, suite: Suite, results: Mapping[Path, Mapping[str, Any]]) -> str:
    """Writes both files, with the runs of other models below the first; the Markdown.

    Args:
        results: of the runs, by their paths.
    """
    runs = named(results)
    cells, caption, notes = cells_of(suite, runs), caption_of(suite, runs[0]), notes_of(runs)
    if len(cells[0]) == 2:
        notes.append("None of the scores can be had of these questions: they are too few.")
    turned = MAX_COLUMNS < len(cells[0]) > len(cells)
    if turned:  # the model and what it is shown are two rows of the heading, which Markdown has as one and the first of the others
        cells = [list(column) for column in zip(*cells, strict=True)]
    lines = [caption, "", *table_lines(cells[0], cells[1:])]
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    if by_type := type_cells_of(suite, runs):
        lines += ["", "By type of question, with the ECG.", "", *table_lines(by_type[0], by_type[1:])]
    text = "\n".join(lines) + "\n"
    write_text(folder / MARKDOWN_FILE, text)
    write_text(folder / LATEX_FILE, to_latex(cells, " ".join([caption, *notes]), num_heads=1 + turned))
    return text
