"""The report of an evaluation: one HTML file with its pictures inside, every number of which is in the results."""

import base64
import html
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from elm_ecg.ecg_drawing import ECGPaper, draw_ecg, page_height, page_width
from elm_ecg.ecg_utils import as_record
from elm_ecg.training.data.loading import ecgs_of
from elm_ecg.training.evaluation.scores import main_metric, with_interval
from elm_ecg.training.figures import LABELS, confusion_plot, differences_plot, scores_plot
from elm_ecg.training.files import write_text

NUM_EXAMPLES = 10
NUM_WRONG_ANSWERS = 15
PICTURE_WIDTH = 1100  # pixels
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b;background:#fff}
h2{margin-top:2.5rem}img{max-width:100%;height:auto}figure{margin:1.5rem 0}figcaption{color:#555}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem 1rem .25rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #ddd}
td.number{text-align:right}td.number,td.score{white-space:nowrap}.scroll{overflow-x:auto}.notice{border-left:4px solid #D55E00;padding:.2rem 1rem}
.verdict{font-weight:600}td,p,figcaption{overflow-wrap:break-word}td:first-child{min-width:7rem}
td:nth-child(2):last-child{overflow-wrap:anywhere}
"""


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def figure(content: bytes, caption: str, kind: str = "image/svg+xml") -> str:
    """A picture inside the page, with what it shows."""
    text = html.escape(caption)
    return f'<figure><img src="{_data_uri(content, kind)}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _cell_class(text: str, is_number: bool) -> str:
    """Numbers are aligned, and a score and its interval stand in one line."""
    return " class=number" if is_number else " class=score" if re.fullmatch(r"[-+.,\d\s\[\]]+", text) else ""


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = ()) -> str:
    """
    Args:
        numbers: columns that are aligned as numbers.
    """
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{_cell_class(str(cell), place in numbers)}>{html.escape(str(cell))}</td>"
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _title(metric: str) -> str:
    return "AUROC" if metric == "auroc" else metric.replace("_", " ")


def _scores(results: dict[str, Any]) -> str:
    metrics = list(results["conditions"]["ecg"]["metrics"])
    rows = [
        [LABELS[name], *(with_interval(row["metrics"][m]) if m in row["metrics"] else "" for m in metrics)]
        for name, row in results["conditions"].items()
    ]
    page = table(["ECG", *map(_title, metrics)], rows)
    for part in results["conditions"]["ecg"].get("parts", {}):
        of_part = [
            [LABELS[name], *(with_interval(row["parts"][part][m]) for m in row["parts"][part])]
            for name, row in results["conditions"].items()
        ]
        page += f"<h3>What stands in &lt;{part}&gt;</h3>"
        page += table(["ECG", *map(_title, results["conditions"]["ecg"]["parts"][part])], of_part)
    closed = results["conditions"]["ecg"]["metrics"].get("closed_set")
    if closed:
        figures = [name for name in ("balanced_accuracy", "macro_f1") if name in closed]
        rows = [
            [LABELS[name], *(with_interval(row["metrics"]["closed_set"][figure]) for figure in figures)]
            for name, row in results["conditions"].items()
        ]
        page += "<h3>Closed questions, mean over their types</h3>" + table(["ECG", *map(_title, figures)], rows)
    return page


def _statements(results: dict[str, Any]) -> str:
    """The statements of answers that are lists, missed and extra."""
    lists = results["conditions"]["ecg"]["metrics"].get("set_f1")
    if lists is None:
        return ""
    rows = [(kind, name, number) for kind in ("missed", "extra") for name, number in lists[kind].items()]
    return "<h3>Statements missed and extra, with its ECG</h3>" + table(["", "statement", "times"], rows, [2])


def _types(results: dict[str, Any]) -> str:
    metric = main_metric(results)
    scored = {name: row for name, row in results["conditions"].items() if metric in row["metrics"]}
    rows = []
    for kind, number in results["questions_by_type"].items():
        of_kind = [row["by_question_type"][kind].get(metric) for row in scored.values()]
        shown = ["" if row is None else with_interval(row) for row in of_kind]
        rows.append([kind.replace("_", " "), number, *shown])
    return table(["question type", "questions", *(LABELS[name] for name in scored)], rows, [1])


def _differences(results: dict[str, Any]) -> str:
    rows = []
    for other, metrics in results["ecg_minus"].items():
        for metric, row in metrics.items():
            p = row["p_value"]
            shown = "undefined" if p is None else f"{p:.4f}"
            rows.append([LABELS[other], _title(metric), with_interval(row, "difference", "+"), shown])
    return table(["with its ECG, minus", "metric", "difference", "p"], rows, [3])


def wrong_answers(predictions: list[dict[str, Any]]) -> list[tuple[str, str, str, int]]:
    """The commonest wrong answers with the ECG: type of the question, right answer, answer given, how often."""
    pairs = Counter(
        (row["question_type"], row["answer"], row["ecg"]) for row in predictions if row["ecg"] != row["answer"]
    )
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return [(*pair, number) for pair, number in ordered[:NUM_WRONG_ANSWERS]]


def examples(predictions: list[dict[str, Any]], number: int = NUM_EXAMPLES) -> list[dict[str, Any]]:
    """Predictions of different types and rows, right and wrong ones in turn, as far as there are."""
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = defaultdict(list)
    for row in predictions:
        groups[row["question_type"], row["ecg"] != row["answer"]].append(row)
    chosen: list[dict[str, Any]] = []
    queues = [groups[key] for key in sorted(groups)]
    while len(chosen) < number and any(queues):
        for queue in queues:
            rows = {row["row"] for row in chosen}
            if queue and len(chosen) < number:
                fresh = next((place for place, row in enumerate(queue) if row["row"] not in rows), 0)
                chosen.append(queue.pop(fresh))
    return chosen


def _example(prediction: dict[str, Any], data: Dataset) -> str:
    lines = [("question", prediction["question"]), ("right answer", prediction["answer"])]
    lines += [(LABELS[name], prediction[name]) for name in LABELS if name in prediction]
    pictures = ""
    ecgs = ecgs_of(data[prediction["row"]])
    for place, ecg in enumerate(ecgs):
        name = f"ECG {place + 1} of {len(ecgs)}" if len(ecgs) > 1 else "The ECG"
        try:
            record = as_record(ecg)
        except (ValueError, OSError) as error:
            pictures += f"<p>{name} cannot be drawn: {html.escape(str(error))}</p>"
            continue
        paper = ECGPaper(layout="6x2")
        seconds = record.array.shape[1] / record.sampling_rate
        height = round(PICTURE_WIDTH * page_height(paper, record.lead_names) / page_width(paper, seconds))
        content = io.BytesIO()
        draw_ecg(record, height, PICTURE_WIDTH, paper).quantize(64).save(content, "PNG", optimize=True)
        pictures += figure(content.getvalue(), f"{name} of record {prediction['record_id']}", "image/png")
    heading = f"<h3>{html.escape(prediction['question_type'])}, {'right' if prediction['ecg'] == prediction['answer'] else 'wrong'}</h3>"
    return heading + table(["", ""], lines) + pictures


def write_report(
    path: Path,
    results: dict[str, Any],
    predictions: list[dict[str, Any]],
    data: Dataset,
    title: str | None = None,
    notice: str = "",
    pictures: Sequence[tuple[bytes, str]] = (),
) -> None:
    """Writes a page that needs nothing beside it.

    Args:
        data: the rows that `predictions` are about, for the ECGs of the examples.
        notice: beside that it is no medical device.
        pictures: SVG and what it shows, shown before the examples.
    """
    metric = main_metric(results)
    source = results["data"]
    facts = [
        ("model", f"{results['model']} ({results['model_revision']})"),
        ("data", f"{', '.join(source['names'])}, split {source['split']}"),
        ("fold", source["fold"]),
        ("questions", results["num_questions"]),
        ("patients", results["num_patients"]),
        ("scored by", results["settings"]["score"]),
        ("dtype", results["settings"]["dtype"]),
        ("seed", results["settings"]["seed"]),
        ("bootstrap resamples", results["settings"]["num_resamples"]),
        ("packages", ", ".join(f"{name} {version}" for name, version in results["packages"].items())),
    ]
    not_scored = [(LABELS.get(name, name), reason) for name, reason in results["not_scored"].items()]
    confusions = "".join(
        figure(
            confusion_plot(rows["closed_set"]),
            f"{kind.replace('_', ' ')}: how often each right answer (row) got each answer (column), with its ECG.",
        )
        for kind, rows in results["conditions"]["ecg"]["by_question_type"].items()
        if "closed_set" in rows
    )
    wrong = wrong_answers(predictions)
    heading = title or f"Evaluation of {results['model']}"
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(heading)}</title><style>{STYLE}</style>
<h1>{html.escape(heading)}</h1>
<p class="notice">Research software, not a medical device: no answer may be used for the care of a patient. {html.escape(notice)}</p>
<p class="verdict">{html.escape(results["verdict"])}</p>
{table(["", ""], [row for row in facts if row[1] is not None])}
<h2>Scores</h2>
<p>In percent, in brackets 95% intervals by patient. An empty answer is wrong.</p>
{_scores(results)}
{table(["not scored", "why"], not_scored) if not_scored else ""}
<h2>By type of question</h2>
{figure(scores_plot(results, metric), f"{_title(metric)} by type of question and by what became of the ECG.")}
{_types(results)}
<h2>Does it look at the ECG?</h2>
{figure(differences_plot(results, metric), f"What the ECG adds to {_title(metric)}, in points; paired, by patient.")}
{_differences(results)}
{"<h2>Closed questions</h2>" + confusions if confusions else ""}
<h2>Most frequent wrong answers</h2>
{table(["question type", "right answer", "answer given", "times"], wrong, [3]) if wrong else "<p>None.</p>"}
{_statements(results)}
{"".join(figure(content, caption) for content, caption in pictures)}
<h2>Examples</h2>
{"".join(_example(row, data) for row in examples(predictions))}
</html>
"""
    write_text(path, page)
