"""The answers that are written while `elm rl` trains, with their ECG drawn, on a page that needs nothing beside it."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from elm_ecg.ecg_drawing import ECGPaper, draw_ecg, page_height, page_width
from elm_ecg.ecg_utils import as_record
from elm_ecg.training.evaluation.report import PICTURE_WIDTH, picture
from elm_ecg.training.files import resource, write_text

TEMPLATE = "answers.html.jinja"


@dataclass
class Answers:
    """The answers to one prompt.

    Args:
        row: with `prompt` and `solution`, as `Prompts.row` gives it.
        answers: of each the text, its rewards by their names, and its advantage over the others.
    """

    row: dict[str, Any]
    answers: list[tuple[str, dict[str, float], float]]


def draw_answers(path: Path, step: int, shown: Sequence[tuple[Sequence[Any], Answers]]) -> None:
    """Writes a page of the ECGs of some prompts and the answers to them.

    Args:
        step: of the optimiser, after which they were written.
        shown: the ECGs of a prompt, records or pictures, and the answers to it.
    """
    groups = []
    for ecgs, group in shown:
        name = group.row.get("record_id") or f"row {group.row['row']}"
        pictures = [_drawn(ecg, f"ECG {place} of {len(ecgs)}, {name}") for place, ecg in enumerate(ecgs, start=1)]
        rewards = list(group.answers[0][1])
        table = [
            [text, *(f"{values[reward]:.3g}" for reward in rewards), f"{advantage:+.2f}"]
            for text, values, advantage in group.answers
        ]
        groups.append(
            {"pictures": pictures, "row": group.row, "header": ["answer", *rewards, "advantage"], "table": table}
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(resource("training/templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, environment.get_template(TEMPLATE).render(step=step, groups=groups))


def _drawn(ecg: Any, caption: str) -> dict[str, str]:
    content = io.BytesIO()
    if not isinstance(ecg, Image.Image):
        record, paper = as_record(ecg), ECGPaper(layout="6x2")
        seconds = record.array.shape[1] / record.sampling_rate
        height = round(PICTURE_WIDTH * page_height(paper, record.lead_names) / page_width(paper, seconds))
        ecg = draw_ecg(record, height, PICTURE_WIDTH, paper).quantize(64)
    ecg.save(content, "PNG", optimize=True)
    return picture(content.getvalue(), caption, "image/png")
