"""The scores of an evaluation in the card of its model: a section of the text, and the metadata that the Hub shows beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from elm_ecg.training.evaluation.conditions import BASELINE, CONDITIONS, ECG
from elm_ecg.training.evaluation.results import title_of, with_interval
from elm_ecg.training.files import write_text
from elm_ecg.training.markdown import CARD, TEMPLATES, replace_section

SECTION = "What it says without the ECG"  # heading of the part of `model_cards/model.md` that is filled in here


def add_evaluation(folder: Path, results: Mapping[str, Any]) -> None:
    """Writes the scores with and without the ECG into the card of `folder`, if it has one with a place for them.

    Args:
        results: as `read_results` gives them.
    """
    path = folder / CARD
    if path.is_file():
        write_text(path, with_evaluation(path.read_text(encoding="utf-8"), results, folder.resolve().name))


def with_evaluation(text: str, results: Mapping[str, Any], model_name: str) -> str:
    """A card with the scores, in its text and its metadata; as it was if it has no place for them."""
    if f"## {SECTION}\n" not in text:
        return text
    conditions, data = results["conditions"], results["data"]
    metrics = list(dict.fromkeys(name for row in conditions.values() for name in row["metrics"]))
    section = TEMPLATES.get_template("evaluation.md").render(
        results=results, metrics=metrics, baseline=CONDITIONS[BASELINE], title_of=title_of, with_interval=with_interval
    )
    card = ModelCard(replace_section(text, SECTION, section.strip()))
    name = " + ".join(data["names"])
    metadata: Any = card.data
    metadata.model_name = metadata.model_name or model_name  # else `eval_results` cannot become the Hub's `model-index`
    metadata.metrics = metrics
    # what the Hub shows beside the card: the scores with the ECG
    metadata.eval_results = [
        EvalResult(
            task_type="question-answering",
            task_name="ECG question answering",
            dataset_type=name.replace(" ", ""),  # the Hub takes no blanks here
            dataset_name=name,
            dataset_split=data["split"],
            dataset_args=None if data.get("fold") is None else {"fold": data["fold"]},
            metric_type=metric,
            metric_name=title_of(metric),
            metric_value=row["value"],
        )
        for metric, row in conditions[ECG]["metrics"].items()
        if row["value"] is not None
    ]
    return str(card)
