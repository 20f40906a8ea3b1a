"""The sentence of an evaluation that says whether the model looks at the ECG, and on which comparisons that rests."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elm_ecg.training.data.schema import counted
from elm_ecg.training.evaluation.bootstrap import MIN_PATIENTS
from elm_ecg.training.evaluation.conditions import BASELINE, CONDITIONS, ECG
from elm_ecg.training.evaluation.scale import scales_of

if TYPE_CHECKING:
    from elm_ecg.training.evaluation.questions import Question

LOOKS = "the model looks at the ECG"  # as a verdict has it that is surely for the model


def gives_one_answer(questions: "Sequence[Question]", texts: Sequence[str]) -> bool:
    """Whether each question that has several right answers, by the ECG, gets one and the same answer each time.

    Questions are the same that have one template (`Question.template`); where none is asked twice with different right answers,
    all questions count as one. Scores of such answers are those of a model without ECG, whatever the model knows of it.
    """
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        groups[question.question_type, question.template or question.question].append(index)
    several = [rows for rows in groups.values() if len({questions[row].answer for row in rows}) > 1]
    if not several:
        several = [list(range(len(questions)))] if len({question.answer for question in questions}) > 1 else []
    return bool(several) and all(len({texts[row].strip() for row in rows}) == 1 for rows in several)


def verdict(results: Mapping[str, Any]) -> str:
    """The sentence, by the main metric of results."""
    metric = results["main_metric"]
    scale = scales_of(results)[metric]
    title = scale.title
    score = f"{title[0].upper()}{title[1:]} {scale.with_unit(scale.with_interval(results['conditions'][ECG]['metrics'][metric]))}"
    gains = {name: rows[metric] for name, rows in results["ecg_minus"].items() if metric in rows}
    if not gains:
        return f"{score}: nothing can be said of what the ECG adds, as there is nothing to compare with."
    if set(gains) <= {BASELINE}:  # the model itself was not asked without its ECG
        return f"{score}: it was asked with its ECG alone, so nothing can be said of whether it looks at it."
    phrases = {name: CONDITIONS[name].phrase for name in gains}
    listed = ", ".join(
        f"{scale.with_interval(row, 'difference', '+')} over {phrases[name]}" for name, row in gains.items()
    )
    score = f"{score} ({listed})"
    intervals = {name: row["interval_95"] for name, row in gains.items()}
    if None in intervals.values():
        return f"{score}: nothing can be said of what the ECG adds, as there is no interval: {_why_none(results)}."
    if metric != "auroc" and results["conditions"][ECG].get("one_answer"):
        how = "main_metric auroc" if "auroc" in results["conditions"][ECG]["metrics"] else "score likelihood"
        return (
            f"{score}: with its ECG the model gives one answer to each question, whatever the ECG, so its {title} cannot tell "
            f"whether it looks at it; ask how likely it finds the other answers, by `{how}`."
        )
    better = {name: scale.improvement(interval)[0] > 0 for name, interval in intervals.items()}  # surely
    not_better = [phrases[name] for name in gains if not better[name]]
    if not_better:
        return f"{score}, not shown to be better than with {_listed(not_better, 'or')}: by {title}, the model may not look at the ECG."
    tried = _listed([phrases[name] for name in gains], "and")
    caveat = "" if "swapped" in gains or "swapped" not in CONDITIONS else "; with another patient's it was not compared"
    return f"{score}, better than with {tried}: by {title}, {LOOKS}{caveat}."


def _why_none(results: Mapping[str, Any]) -> str:
    count = results["num_patients"]
    if count < MIN_PATIENTS:
        return f"the questions are about {counted(count, 'patient')}, and fewer than {MIN_PATIENTS} are too few"
    return "the score is undefined in too many of the resamples"


def _listed(parts: list[str], word: str) -> str:
    return f" {word} ".join(([", ".join(parts[:-1])] if parts[1:] else []) + parts[-1:])
