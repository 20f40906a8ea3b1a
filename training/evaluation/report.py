"""The report of an evaluation: one HTML file with its pictures inside. All of its numbers are in the results."""

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from datasets import Dataset

from elm_ecg.ecg_drawing import ECGPaper, draw_ecg, page_height, page_width
from elm_ecg.ecg_utils import as_record
from elm_ecg.training.data.loading import ecgs_of
from elm_ecg.training.data.schema import counted
from elm_ecg.training.evaluation.bootstrap import MIN_PATIENTS, p_in_words
from elm_ecg.training.evaluation.conditions import CONDITIONS, ECG
from elm_ecg.training.evaluation.explain import Explanation, draw
from elm_ecg.training.evaluation.scale import SHARE, MetricScale, scales_of, title_of
from elm_ecg.training.figures import confusion_plot, differences_plot, scores_plot
from elm_ecg.training.files import resource, write_text

TEMPLATE = "report.html.jinja"
NUM_EXAMPLES = 10
NUM_WRONG_ANSWERS = 15
PICTURE_WIDTH = 1100  # pixels


def picture(content: bytes, caption: str, kind: str = "image/svg+xml") -> dict[str, str]:
    """A picture that stands inside the page, and what it shows."""
    return {"uri": f"data:{kind};base64,{base64.b64encode(content).decode()}", "caption": caption}


def score_tables(results: Mapping[str, Any]) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """Heading, and condition -> metric -> score: of the whole answers, of their tagged parts, and of closed questions."""
    conditions = results["conditions"]
    tables = [("", {name: row["metrics"] for name, row in conditions.items()})]
    for part in conditions[ECG].get("parts", {}):
        tables.append((f"What stands in <{part}>", {name: row["parts"][part] for name, row in conditions.items()}))
    if "balanced_accuracy" in conditions[ECG]["metrics"].get("closed_set", {}):
        closed = {name: row["metrics"]["closed_set"] for name, row in conditions.items()}
        rows = {name: {key: row[key] for key in ("balanced_accuracy", "macro_f1")} for name, row in closed.items()}
        tables.append(("Closed questions, mean over their types", rows))
    return tables


def alike(rows: Mapping[str, Mapping[str, Any]], scales: Mapping[str, MetricScale]) -> list[list[str]]:
    """The metrics of a table, condition -> metric -> score, in groups that say the same in every condition."""
    groups: dict[Any, list[str]] = {}
    for metric in rows[ECG]:
        scores = [row.get(metric) or {} for row in rows.values()]
        shown = [[score.get(key) for key in ("value", "interval_95", "difference", "p_value")] for score in scores]
        scale = replace(scales.get(metric, MetricScale()), title="")
        groups.setdefault((repr(shown), scale), []).append(metric)
    return list(groups.values())


def wrong_answers(predictions: list[dict[str, Any]]) -> list[tuple[str, str, str, int]]:
    """The most frequent wrong answers with the ECG: type of the question, right answer, answer given, how often."""
    pairs = Counter((row["question_type"], row["answer"], row[ECG]) for row in predictions if row[ECG] != row["answer"])
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return [(title_of(kind), *answers, number) for (kind, *answers), number in ordered[:NUM_WRONG_ANSWERS]]


def examples(predictions: list[dict[str, Any]], number: int = NUM_EXAMPLES) -> list[dict[str, Any]]:
    """Predictions of different types and rows, if there are enough, right and wrong ones in turn."""
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = defaultdict(list)  # (type, wrong) -> them
    for row in predictions:
        groups[row["question_type"], row[ECG] != row["answer"]].append(row)
    chosen: list[dict[str, Any]] = []
    queues = [groups[key] for key in sorted(groups)]  # False sorts first: right before wrong
    while len(chosen) < number and any(queues):
        for queue in queues:
            rows = {row["row"] for row in chosen}  # rows that were shown already come last
            if queue and len(chosen) < number:
                fresh = next((place for place, row in enumerate(queue) if row["row"] not in rows), 0)
                chosen.append(queue.pop(fresh))
    return chosen


def example(
    prediction: dict[str, Any], data: Dataset, explain: Callable[[dict[str, Any], dict[str, Any]], Explanation] | None
) -> dict[str, Any]:
    """A prediction with its `lines`, what was asked and answered, and the drawn ECGs as `pictures`; one that cannot be drawn is a
    caption without `uri`, which says why.

    Args:
        explain: makes of a row with one ECG and a prediction what the answer rests on, which is then shaded.
    """
    lines = [("question", prediction["question"]), ("right answer", prediction["answer"])]
    lines += [(row.label, prediction[name]) for name, row in CONDITIONS.items() if name in prediction]
    pictures = []
    row = data[prediction["row"]]
    ecgs = ecgs_of(row)
    if explain is not None and len(ecgs) == 1:
        explanation = explain(row, prediction)
        content = io.BytesIO()
        draw(explanation, PICTURE_WIDTH).quantize(256).save(content, "PNG", optimize=True)
        caption = (
            f"The ECG of record {prediction['record_id']}, shaded where the answer rests on it. {explanation.told()}"
        )
        return {**prediction, "lines": lines, "pictures": [picture(content.getvalue(), caption, "image/png")]}
    for place, ecg in enumerate(ecgs, start=1):
        name = f"ECG {place} of {len(ecgs)}" if len(ecgs) > 1 else "The ECG"
        try:
            record = as_record(ecg)
        except (ValueError, OSError) as error:
            pictures.append({"caption": f"{name} cannot be drawn: {error}"})
            continue
        paper = ECGPaper(layout="6x2")
        seconds = record.array.shape[1] / record.sampling_rate
        height = round(PICTURE_WIDTH * page_height(paper, record.lead_names) / page_width(paper, seconds))
        content = io.BytesIO()
        draw_ecg(record, height, PICTURE_WIDTH, paper).quantize(64).save(content, "PNG", optimize=True)
        pictures.append(picture(content.getvalue(), f"{name} of record {prediction['record_id']}", "image/png"))
    return {**prediction, "lines": lines, "pictures": pictures}


def _facts(results: Mapping[str, Any]) -> list[tuple[str, Any]]:
    source, settings = results["data"], results["settings"]
    facts = [
        ("model", f"{results['model']} ({results['model_revision']})"),
        ("data", ", ".join(source["names"])),
        ("split", source["split"]),
        ("fold", source["fold"]),
        ("questions", results["num_questions"]),
        ("patients", results["num_patients"]),
        ("scored by", settings["score"]),
        ("main metric", scales_of(results)[results["main_metric"]].heading),
        ("dtype", settings["dtype"]),
        ("seed", settings["seed"]),
        ("bootstrap resamples", settings["num_resamples"]),
        ("packages", ", ".join(f"{name} {version}" for name, version in results["packages"].items())),
    ]
    unasked = results.get("suite", {}).get("left_out", {})  # of a benchmark
    facts += [("not asked", f"{what}: {number:,}") for what, number in unasked.items()]
    return [fact for fact in facts if fact[1] is not None]


def _plots(results: Mapping[str, Any], metric: str) -> dict[str, Any]:
    scale, types = scales_of(results)[metric], results["conditions"][ECG]["by_question_type"]
    caption = "how often each right answer (row) got each answer (column), with its ECG."
    unit = f", in {'points' if scale.unit == SHARE else scale.unit}" if scale.unit else ""
    direction = "" if scale.higher_is_better else "; below 0 is better"
    adds = f"What the ECG adds to {scale.title}{unit}{direction}; paired, by patient."
    compared = any(metric in rows for rows in results["ecg_minus"].values())
    return {
        "scores": picture(scores_plot(results), f"{scale.heading} by type of question and by what became of the ECG."),
        "differences": picture(differences_plot(results), adds) if compared else None,
        "confusions": [
            picture(confusion_plot(scores["closed_set"]), f"{title_of(kind)}: {caption}")
            for kind, scores in types.items()
            if "closed_set" in scores
        ],
    }


def _about_intervals(results: Mapping[str, Any]) -> str:
    """What stands in brackets, and how small a p-value can be; or why there are none."""
    patients, resamples = results["num_patients"], results["settings"]["num_resamples"]
    if patients < MIN_PATIENTS:
        return (
            f"Without intervals and p-values: the questions are about {counted(patients, 'patient')}, and fewer than {MIN_PATIENTS} "
            "do not show how patients differ."
        )
    return f"In brackets 95% intervals by patient; {counted(resamples, 'resample')} show no p below {2 / (resamples + 1):.4f}."


def write_report(
    path: Path,
    results: Mapping[str, Any],
    predictions: list[dict[str, Any]],
    data: Dataset,
    title: str | None = None,
    notice: str = "",
    pictures: Sequence[tuple[bytes, str]] = (),
    explain: Callable[[dict[str, Any], dict[str, Any]], Explanation] | None = None,
) -> None:
    """Writes a page that needs nothing beside it.

    Args:
        data: the rows that `predictions` are about, for the ECGs of the examples.
        notice: beside that it is no medical device.
        pictures: SVG and what it shows, put before the examples.
        explain: as of `example`.
    """
    loader = jinja2.FileSystemLoader(resource("training/templates"))
    environment = jinja2.Environment(loader=loader, autoescape=True)  # questions and answers may hold < and &
    scales = scales_of(results)

    def in_words(row: Mapping[str, Any], name: str, key: str = "value", sign: str = "") -> str:
        # parts of a closed set's score are shares as it is; a line ends before an interval, not within
        return scales.get(name, MetricScale()).with_interval(row, key, sign).replace(", ", ",\N{NO-BREAK SPACE}")

    environment.filters |= {"title_of": title_of, "in_words": in_words, "p_in_words": p_in_words}

    def headings(names: Sequence[str]) -> str:
        return "; ".join(scales[name].heading if name in scales else title_of(name) for name in names)

    environment.filters["headings"] = headings
    environment.filters["condition_label"] = lambda name: CONDITIONS[name].label
    metric = results["main_metric"]
    lists = results["conditions"][ECG]["metrics"].get("set_f1", {})
    page = environment.get_template(TEMPLATE).render(
        title=title or f"Evaluation of {results['model']}",
        notice=notice,
        results=results,
        facts=_facts(results),
        about_intervals=_about_intervals(results),
        conditions=CONDITIONS,
        score_tables=[(heading, rows, alike(rows, scales)) for heading, rows in score_tables(results)],
        differences=[
            (name, metrics, rows[metrics[0]])
            for name, rows in results["ecg_minus"].items()
            for metrics in alike({ECG: rows}, scales)
        ],
        not_scored=[
            (CONDITIONS[name].label if name in CONDITIONS else name, why) for name, why in results["not_scored"].items()
        ],
        metric=metric,
        scored=[name for name, row in results["conditions"].items() if metric in row["metrics"]],
        plots=_plots(results, metric),
        wrong_answers=wrong_answers(predictions),
        statements=[(key, *row) for key in ("missed", "extra") for row in lists.get(key, {}).items()],
        pictures=[picture(*content) for content in pictures],
        examples=[example(row, data, explain) for row in examples(predictions)],
    )
    write_text(path, page)
