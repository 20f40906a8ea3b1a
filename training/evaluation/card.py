"""The scores of evaluations in the card of their model: a section of the text, and the metadata that the Hub shows beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from elm_ecg.training.data.schema import counted
from elm_ecg.training.evaluation.conditions import BASELINE, CONDITIONS, ECG
from elm_ecg.training.evaluation.results import results_of
from elm_ecg.training.evaluation.scale import scales_of
from elm_ecg.training.files import write_text
from elm_ecg.training.markdown import CARD, TEMPLATES, replace_section

SECTION = "What it says without the ECG"  # heading of the part of `model_cards/model.md` that is filled in here


def add_evaluations(folder: Path, revision: str) -> None:
    """Writes the scores of the model in `folder` into its card, if it has one with a place for them.

    Args:
        revision: the digest of the model; results of other weights are left out.
    """
    path = folder / CARD
    found = [results for _, results in results_of(folder, revision)]
    if path.is_file() and found:
        write_text(path, with_evaluations(path.read_text(encoding="utf-8"), found, folder.resolve().name))


def with_evaluations(text: str, evaluations: Sequence[Mapping[str, Any]], model_name: str) -> str:
    """A card with the scores of all evaluations of a model, in its text and its metadata; as it was if it has no place for them.

    Args:
        evaluations: results as `read_results` gives them, of one or several data or settings.
    """
    if f"## {SECTION}\n" not in text:
        return text
    sections = []
    for results in evaluations:
        metrics = list(dict.fromkeys(name for row in results["conditions"].values() for name in row["metrics"]))
        section = TEMPLATES.get_template("evaluation.md").render(
            results=results, metrics=metrics, scales=scales_of(results), baseline=CONDITIONS[BASELINE], counted=counted
        )
        sections.append(section.strip())
    card = ModelCard(replace_section(text, SECTION, "\n\n".join(sections)))
    metadata: Any = card.data
    metadata.model_name = metadata.model_name or model_name  # else `eval_results` cannot become the Hub's `model-index`
    metadata.metrics = list(
        dict.fromkeys(name for results in evaluations for name in results["conditions"][ECG]["metrics"])
    )
    metadata.eval_results = [row for results in evaluations for row in _eval_results(results, len(evaluations) > 1)]
    return str(card)


def _eval_results(results: Mapping[str, Any], several: bool) -> list[EvalResult]:
    """What the Hub shows beside the card: the scores with the ECG."""
    data, scales = results["data"], scales_of(results)
    name = " + ".join(data["names"])
    return [
        EvalResult(
            task_type="question-answering",
            task_name="ECG question answering",
            dataset_type=name.replace(" ", ""),  # the Hub takes no blanks here
            dataset_name=name,
            dataset_split=data["split"],
            dataset_config=results["evaluation"] if several else None,  # else the Hub takes them for one
            dataset_args=None if data.get("fold") is None else {"fold": data["fold"]},
            metric_type=metric,
            metric_name=scales[metric].heading,
            metric_value=row["value"],
        )
        for metric, row in results["conditions"][ECG]["metrics"].items()
        if row["value"] is not None
    ]
