"""What `elm probe` shows of its results: tables in the terminal, and a page with a plot. All of its numbers are in the results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from elm_ecg.training.data.schema import counted
from elm_ecg.training.evaluation.bootstrap import MIN_PATIENTS, p_in_words
from elm_ecg.training.evaluation.compare import table_lines
from elm_ecg.training.evaluation.probe_results import OTHERS, metric_title
from elm_ecg.training.evaluation.report import picture
from elm_ecg.training.evaluation.scale import MetricScale
from elm_ecg.training.figures import shares_plot
from elm_ecg.training.files import resource, write_text

TEMPLATE = "probe.html.jinja"
NAMES = {"encoder": "the encoder", **OTHERS}
SCALE = MetricScale(title="AUROC")


def macro_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the macro AUROCs: a row for each model, a column for each metric."""
    metrics = list(results["metrics"])
    rows = [
        [
            NAMES[model],
            *(SCALE.with_interval(by_metric[metric]["macro"]) if metric in by_metric else "" for metric in metrics),
        ]
        for model, by_metric in results["models"].items()
    ]
    return ["", *map(metric_title, metrics)], rows


def difference_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the differences of the encoder to the other models, in points."""
    rows = [
        [
            f"the encoder, minus {NAMES[model]}",
            metric_title(metric),
            SCALE.with_interval(row, "difference", "+"),
            p_in_words(row["p_value"], row.get("p_value_at_floor", False)),
        ]
        for model, by_metric in results["encoder_minus"].items()
        for metric, row in by_metric.items()
    ]
    return ["", "metric", "difference", "p"], rows


def about_intervals(results: Mapping[str, Any]) -> str:
    """What stands in brackets, or why there is nothing."""
    patients = results["num_patients"]["test"]
    if patients < MIN_PATIENTS:
        return f"Without intervals: the test records are of {counted(patients, 'patient')}, and fewer than {MIN_PATIENTS} are too few."
    return (
        f"In brackets 95% intervals by patient, of {counted(patients, 'test patient')}; that other training patients would give other "
        "scores is not in them."
    )


def to_markdown(results: Mapping[str, Any]) -> str:
    """The tables for the terminal."""
    records = ", ".join(f"{split} {number:,}" for split, number in results["num_records"].items())
    lines = [
        f"Records: {records}. Macro AUROC over {counted(len(results['labels']), 'label')}, in percent. {about_intervals(results)}"
    ]
    lines += [f"Left out: {what}: {which}" for what, which in results["left_out"].items()]
    for header, rows in (macro_rows(results), difference_rows(results)):
        lines += ["", *table_lines(header, rows)]
    return "\n".join(lines)


def _label_tables(results: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    tables = []
    for metric in results["metrics"]:
        models = [model for model, by_metric in results["models"].items() if metric in by_metric]
        rows = [
            [
                label,
                f"{counts['train']:,}",
                f"{counts['test']:,}",
                *(SCALE.with_interval(results["models"][model][metric]["labels"][label]) for model in models),
            ]
            for label, counts in results["labels"].items()
        ]
        header = ["label", "training records", "test records", *(NAMES[model] for model in models)]
        tables.append((metric_title(metric), header, rows))
    return tables


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings, data = results["settings"], results["data"]
    facts = {
        "encoder": f"{results['model']} ({results['model_revision']})",
        "data": ", ".join(data["names"]),
        "fold": data["fold"],
        "records": ", ".join(f"{split} {number:,}" for split, number in results["num_records"].items()),
        "patients": ", ".join(f"{split} {number:,}" for split, number in results["num_patients"].items()),
        "features": "mean over the tokens of the frozen encoder, standardised",
        "probe": "logistic regression of each label; regularisation chosen on validation by macro AUROC",
        "draws of training patients": f"{settings['draws']} of each share below 1",
        "seed": settings["seed"],
        "bootstrap resamples": settings["num_resamples"],
        "packages": ", ".join(f"{name} {number}" for name, number in results["packages"].items()),
    }
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def write_probe_report(path: Path, results: Mapping[str, Any]) -> None:
    """Writes a page that needs nothing beside it."""
    loader = jinja2.FileSystemLoader(resource("training/templates"))
    environment = jinja2.Environment(loader=loader, autoescape=True)  # labels may hold < and &
    caption = "Macro AUROC against the share of the training patients, with 95% intervals by patient."
    page = environment.get_template(TEMPLATE).render(
        title=f"Probe of {results['model']}",
        results=results,
        facts=_facts(results),
        about_intervals=about_intervals(results),
        plot=picture(shares_plot(results), caption),
        tables=[macro_rows(results), difference_rows(results)],
        label_tables=_label_tables(results),
        left_out=list(results["left_out"].items()),
        prompts=[(label, "; ".join(texts)) for label, texts in results.get("prompts", {}).items()],
    )
    write_text(path, page)
