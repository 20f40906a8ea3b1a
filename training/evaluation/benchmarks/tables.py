"""A suite's scores as a table for a paper: Markdown and LaTeX, a row for each model and for what it is shown of the ECG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elm_ecg.training.data.schema import counted
from elm_ecg.training.evaluation.benchmarks.suite import Suite
from elm_ecg.training.evaluation.compare import table_lines
from elm_ecg.training.evaluation.conditions import CONDITIONS, ECG
from elm_ecg.training.evaluation.scale import scales_of
from elm_ecg.training.files import write_text

MARKDOWN_FILE, LATEX_FILE = "table.md", "table.tex"
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
            row = [_model(run), CONDITIONS[condition].label]
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
    rows = [["type of question", "questions", *(f"{_model(run)}, {suite.scales[name].title}" for run in runs)]]
    for kind, number in runs[0]["questions_by_type"].items():
        found = [run["conditions"][ECG]["by_question_type"].get(kind, {}).get(name) for run in runs]
        cells = ["" if row is None else suite.scales[name].with_interval(row) for row in found]
        rows.append([kind, f"{number:,}", *cells])
    return rows


def _model(run: Mapping[str, Any]) -> str:
    return f"{run['model']} (ECG in words)" if run["settings"]["describe"] else run["model"]


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
        f"{counted(run['num_patients'], 'patient')}, answers {asked}. {shares}, in brackets their 95% intervals by patient.{judged}"
    )


def to_latex(cells: Sequence[Sequence[str]], caption: str) -> str:
    """A table with the rules of the package booktabs."""
    lines = [
        " & ".join("".join(_LATEX.get(character, character) for character in cell) for cell in row) for row in cells
    ]
    head, *rows = (f"{line} \\\\" for line in lines)
    escaped = "".join(_LATEX.get(character, character) for character in caption)
    body = [r"\toprule", head, r"\midrule", *rows, r"\bottomrule"]
    columns = "ll" + "r" * (len(cells[0]) - 2)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{escaped}}}",
            f"\\begin{{tabular}}{{{columns}}}",
            *body,
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def write_tables(folder: Path, suite: Suite, runs: Sequence[Mapping[str, Any]]) -> str:
    """Writes both files, with the runs of other models below the first; the Markdown."""
    cells, caption = cells_of(suite, runs), caption_of(suite, runs[0])
    lines = [caption, "", *table_lines(cells[0], cells[1:])]
    if by_type := type_cells_of(suite, runs):
        lines += ["", "By type of question, with the ECG.", "", *table_lines(by_type[0], by_type[1:])]
    text = "\n".join(lines) + "\n"
    write_text(folder / MARKDOWN_FILE, text)
    write_text(folder / LATEX_FILE, to_latex(cells, caption))
    return text
