"""Which leads and moments of an ECG an answer rests on: `elm explain MODEL RECORD --question TEXT`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from elm_ecg.ecg_drawing import LAYOUTS, ECGPaper, draw_ecg, ecg_svg, page_height, page_width
from elm_ecg.ecg_utils import ECGRecord, read_ecg
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.command_line import (
    MAX_NEW_TOKENS,
    CommandLineParser,
    add_model_options,
    add_record_options,
    printable,
    read_system_prompt,
    run_command,
    whole_number,
)
from elm_ecg.training.data.loading import ecgs_of
from elm_ecg.training.evaluation.attributions import WINDOW_SECONDS, AskedModel, Method, attribute
from elm_ecg.training.evaluation.beats import in_qrs, is_flat, level_between_beats
from elm_ecg.training.evaluation.conditions import ECG
from elm_ecg.training.files import atomic_path, write_text
from elm_ecg.training.load import limit_threads, load_elm

TENTH = 0.1
SUFFIXES = (".png", ".svg", ".json")  # of what is written
SHADE_COLOR = "#f2a93b"
WIDTH = 1600  # pixels
PAPER = ECGPaper()  # shows all leads over the whole time


@dataclass(frozen=True)
class Explanation:
    """What an answer rests on.

    Args:
        record: the part that the model reads, in millivolts.
        question, answer, method: what was asked, and how it was explained.
        probability: of the answer, its end of turn included.
        attribution: float64 [leads, samples], what each sample adds to the answer's log-likelihood; below zero, against it.
        probabilities: of the answer without the `most` and the `least` important tenth of the windows.
    """

    record: ECGRecord
    question: str
    answer: str
    method: Method
    probability: float
    attribution: np.ndarray
    probabilities: dict[str, float]

    @property
    def of_windows(self) -> np.ndarray:
        """The share of each window of `WINDOW_SECONDS` in what speaks for the answer, [leads, windows]."""
        return shares(windows(self.attribution, self.record.sampling_rate))

    @property
    def of_leads(self) -> np.ndarray:
        """The share of each lead in what speaks for the answer, [leads]: what its windows add up to, for the answer and against it."""
        return shares(self.attribution.sum(axis=1))

    def as_json(self) -> dict[str, Any]:
        """What is written: shares by lead and by time, signed sums, and the check."""
        of_windows, inside = self.of_windows, in_qrs(self.record)
        rate, leads = self.record.sampling_rate, self.record.lead_names
        of_qrs = windows(inside[None].astype(float), rate)[0] / windows(np.ones((1, len(inside))), rate)[0]
        level = level_between_beats(self.record)
        return {
            "question": self.question,
            "answer": self.answer,
            "method": self.method,
            "probability": self.probability,
            "share_by_lead": dict(zip(leads, self.of_leads.tolist(), strict=True)),
            "sum_by_lead": dict(zip(leads, self.attribution.sum(axis=1).tolist(), strict=True)),
            "window_seconds": WINDOW_SECONDS,
            "share_by_time": of_windows.sum(axis=0).tolist(),
            "share_by_lead_and_time": dict(zip(leads, of_windows.tolist(), strict=True)),
            "qrs": {"share": float((of_windows.sum(axis=0) * of_qrs).sum()), "share_of_time": float(inside.mean())},
            "check": {
                "what": "P(answer) when a tenth of the windows stand at the lead's level between beats: its mean from 60% to 80% "
                "of the time from one QRS complex to the next",
                "level_between_beats_mv": dict(zip(leads, level.tolist(), strict=True)),
                **{f"probability_without_{name}_important_tenth": p for name, p in self.probabilities.items()},
                **{
                    f"drop_without_{name}_important_tenth": self.probability - p
                    for name, p in self.probabilities.items()
                },
            },
        }

    def told(self) -> str:
        """A few sentences for people."""
        if is_flat(self.record):
            return f"{self.answer!r} has probability {self.probability:.2g}. The ECG is flat: it holds nothing that an answer could rest on, and nothing is shaded."
        of_leads = self.of_leads
        order = np.argsort(-of_leads, kind="stable")[:3]
        leads = ", ".join(
            f"{self.record.lead_names[lead]} {of_leads[lead]:.0%}" for lead in order if of_leads[lead] > 0
        )
        rests = f"it rests most on {leads}" if leads else "no lead speaks for it"
        most, least = self.probabilities["most"], self.probabilities["least"]
        return (
            f"{self.answer!r} has probability {self.probability:.2g}; {rests}. With the most important tenth of "
            f"the ECG taken away it has {most:.2g}, with the least important {least:.2g}."
        )


def shares(values: np.ndarray) -> np.ndarray:
    """What is above zero, as shares that add up to 1; all 0 where nothing is."""
    above = np.maximum(values, 0)
    return above / max(above.sum(), np.finfo(float).tiny)


def windows(values: np.ndarray, sampling_rate: float) -> np.ndarray:
    """Sums over windows of `WINDOW_SECONDS`: [leads, samples] -> [leads, windows]."""
    width = max(1, round(WINDOW_SECONDS * sampling_rate))
    return np.add.reduceat(values, np.arange(0, values.shape[1], width), axis=1)


def without(record: ECGRecord, chosen: np.ndarray) -> np.ndarray:
    """The samples of a record with the chosen windows, bool [leads, windows], at their lead's level between beats."""
    width = max(1, round(WINDOW_SECONDS * record.sampling_rate))
    of_samples = np.repeat(chosen, width, axis=1)[:, : record.array.shape[1]]
    return np.where(of_samples, level_between_beats(record)[:, None], record.array)


def explain(
    model: ELMForConditionalGeneration,
    processor: ELMProcessor,
    record: Any,
    question: str | Sequence[dict[str, Any]],
    answer: str | None = None,
    method: Method = "integrated_gradients",
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Explanation:
    """Explains an answer about one record.

    Args:
        record: in any form that `as_record` takes.
        question: or a chat about the record, whose last message is the question.
        answer: None: what the model answers.
        method: as of `attribute`.

    Raises:
        ValueError: the model takes no ECG, or not this one; or as `attribute`.
        ImportError: Captum is not installed.
    """
    prepared = processor.feature_extractor.prepare(record, normalize=False)
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
    asked = AskedModel(model.eval(), processor, messages, prepared)
    answer = asked.answer(max_new_tokens) if answer is None else answer
    attribution = attribute(asked, answer, method)
    sums = windows(attribution, prepared.sampling_rate)
    tenth = max(1, round(TENTH * sums.size))
    variants = [prepared.array]
    # the windows that add most to the answer, and those that add least, for it or against it
    for order in (np.argsort(-sums, axis=None, kind="stable"), np.argsort(np.abs(sums), axis=None, kind="stable")):
        chosen = np.zeros(sums.size, dtype=bool)
        chosen[order[:tenth]] = True
        variants.append(without(prepared, chosen.reshape(sums.shape)))
    whole, most, least = np.exp(asked.log_likelihoods(np.stack(variants), answer)).tolist()
    text = messages[-1]["content"] if isinstance(messages[-1]["content"], str) else question_of(messages[-1])
    return Explanation(prepared, text, answer, method, whole, attribution, {"most": most, "least": least})


def explain_prediction(
    model: ELMForConditionalGeneration, processor: ELMProcessor, row: dict[str, Any], prediction: dict[str, Any]
) -> Explanation:
    """Explains a prediction of `elm evaluate`, the answer with the ECG.

    Args:
        row: of the data; it has one ECG.
        prediction: has the `turn` of the row, and the answer.
    """
    (ecg,) = ecgs_of(row)
    return explain(model, processor, ecg, row["messages"][: prediction["turn"]], prediction[ECG])


def question_of(message: dict[str, Any]) -> str:
    """The words of a message that has parts."""
    return "".join(part.get("text") or "" for part in message["content"] if part["type"] == "text")


def shades_of(explanation: Explanation) -> np.ndarray:
    """How strongly each sample is shaded, [leads, samples] in [0, 1]: 1 for the window with the largest share."""
    of_windows = explanation.of_windows
    width = max(1, round(WINDOW_SECONDS * explanation.record.sampling_rate))
    strengths = of_windows / max(of_windows.max(), np.finfo(float).tiny)
    return np.repeat(strengths, width, axis=1)[:, : explanation.record.array.shape[1]]


def draw(explanation: Explanation, width: int = WIDTH, paper: ECGPaper = PAPER) -> Any:
    """The record on ECG paper, shaded where the answer rests on it, as a picture."""
    record = explanation.record
    seconds = record.array.shape[1] / record.sampling_rate
    height = round(width * page_height(paper, record.lead_names) / page_width(paper, seconds))
    caption = _caption(explanation)
    return draw_ecg(record, height, width, paper, caption, shades=shades_of(explanation), shade_color=SHADE_COLOR)


def draw_svg(explanation: Explanation, paper: ECGPaper = PAPER) -> str:
    """As `draw`, as an SVG document."""
    return ecg_svg(explanation.record, paper, _caption(explanation), shades_of(explanation), SHADE_COLOR)


def _caption(explanation: Explanation) -> str:
    shaded = "the ECG is flat" if is_flat(explanation.record) else "shaded: what it rests on"
    return f"{explanation.question} {explanation.answer} (P = {explanation.probability:.2g}); {shaded}"


def write(explanation: Explanation, output: Path, width: int = WIDTH, paper: ECGPaper = PAPER) -> list[Path]:
    """Writes `OUTPUT.png`, `OUTPUT.svg` and `OUTPUT.json`."""
    paths = [output.with_name(f"{output.name}{suffix}") for suffix in SUFFIXES]
    with atomic_path(paths[0]) as temporary:
        draw(explanation, width, paper).save(temporary, "PNG")
    write_text(paths[1], draw_svg(explanation, paper))
    write_text(paths[2], json.dumps(explanation.as_json(), ensure_ascii=False, indent=2) + "\n")
    return paths


def make_parser() -> argparse.ArgumentParser:
    """The options of `elm explain`."""
    usage = "elm explain MODEL RECORD --question TEXT [--answer TEXT] [options]"
    description = (
        "Shows which leads and moments of an ECG an answer rests on, and checks it. Research software, not a medical device: a model's "
        "reasons are no medical ones."
    )
    parser = CommandLineParser(prog="elm explain", usage=usage, description=description)
    add = parser.add_argument
    add("model", metavar="MODEL", help="saved ELM or LoRA adapter: local folder or Hub id")
    add("record", type=Path, metavar="RECORD", help="ECG file of any format of docs/reference/file_formats.md")
    add("--question", required=True, metavar="TEXT", help="asked about the record")
    add("--answer", metavar="TEXT", help="that is explained; default: the model's own")
    method_help = (
        "integrated_gradients (default) of samples, pixels or tokens, whichever the model reads; or occlusion of 0.1 s of a lead "
        "at a time, which takes longer"
    )
    add("--method", choices=get_args(Method), default="integrated_gradients", help=method_help)
    output_help = "beginning of the names of what is written, NAME.png, NAME.svg and NAME.json; default: RECORD-why"
    add("-o", "--output", type=Path, metavar="NAME", help=output_help)
    add("--start", type=float, metavar="SECOND", help="where the part that the model reads begins, of a longer record")
    layout_help = (
        "rows x columns of twelve leads; in columns each lead is shown for a part of the time; default: %(default)s"
    )
    add("--layout", choices=LAYOUTS, default=ECGPaper.layout, help=layout_help)
    add("--width", type=whole_number, default=WIDTH, metavar="PIXELS", help="of the PNG; default: %(default)s")
    add_model_options(parser, MAX_NEW_TOKENS)
    parser.set_defaults(max_new_tokens=None)  # whether it was said counts
    add_record_options(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Explains, and writes the files."""
    args = make_parser().parse_args(argv)
    if not args.question.strip():
        raise ValueError("--question has an empty text; say what is asked.")
    if args.answer is not None and not args.answer.strip():
        raise ValueError("--answer has an empty text; leave it out to explain the model's own.")
    if args.answer is not None and args.max_new_tokens is not None:
        raise ValueError("--max_new_tokens changes nothing with --answer, which is given; leave one of them out.")
    output = args.output or Path(f"{args.record.stem}-why")
    if output.suffix in SUFFIXES:  # said of one of the files
        output = output.with_suffix("")
    if not output.parent.is_dir():
        raise ValueError(f"--output is {output}; there is no folder {output.parent}.")
    record = read_ecg(args.record, args.sampling_rate, args.lead_names, args.unit)
    if args.start is not None:
        record = replace(record, metadata={**record.metadata, "start": args.start})
    model, processor = load_elm(args.model, args.revision, args.trust_remote_code, dtype=args.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]  # a wrapped method
    limit_threads(model, model.device)
    processor = processor.with_system_prompt(read_system_prompt(args.system_prompt))
    longest = args.max_new_tokens or MAX_NEW_TOKENS
    explanation = explain(model, processor, record, args.question, args.answer, args.method, longest)
    paths = write(explanation, output, args.width, ECGPaper(layout=args.layout))
    print(printable(explanation.told()))
    for notice in explanation.record.metadata["notices"]:
        print(printable(f"{args.record.name}: {notice}"), file=sys.stderr)
    print(f"In {', '.join(str(path.resolve()) for path in paths)}", flush=True)


if __name__ == "__main__":
    sys.exit(run_command("elm explain", main))
