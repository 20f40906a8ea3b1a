"""`elm plot`: ECG files drawn on ECG paper, as PNG or SVG."""

import argparse
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from elm_ecg.ecg_drawing import LAYOUTS, ECGPaper, draw_ecg, ecg_svg, page_height, page_width
from elm_ecg.ecg_utils import ECGRecord, read_ecg, select_leads
from elm_ecg.training.command_line import CommandLineParser, add_record_options, printable, whole_number
from elm_ecg.training.files import atomic_path, write_text

DEFAULT_WIDTH = 1600  # pixels
# more is too thin to read in one picture
MAX_SECONDS = 20.0
DEFAULT_SECONDS = 10.0


def save_picture(
    path: Path, record: ECGRecord, paper: ECGPaper, caption: str, width: int = DEFAULT_WIDTH, height: int | None = None
) -> None:
    """Draws a record into a .svg, else into a PNG, which has the resolution that prints it in millimetres of paper.

    Args:
        width, height: of the PNG in pixels. None: the height of the page's own proportions.

    Raises:
        ValueError: as `draw_ecg`.
    """
    if path.suffix.lower() == ".svg":
        write_text(path, ecg_svg(record, paper, caption))
        return
    scale = width / page_width(paper, record.array.shape[1] / record.sampling_rate)  # pixels for a millimetre of paper
    if height is None:
        height = max(1, round(scale * page_height(paper, record.lead_names)))
    picture = draw_ecg(record, height, width, paper, caption)
    with atomic_path(path) as temporary:
        picture.save(temporary, "PNG", dpi=(25.4 * scale, 25.4 * scale))  # 25.4 mm are an inch


def time_span(record: ECGRecord, start: float, seconds: float | None) -> slice:
    """The samples from `start` on, in seconds, up to the end of the record.

    Args:
        seconds: None for all that follow, or for `DEFAULT_SECONDS` where these are more than `MAX_SECONDS`.

    Raises:
        ValueError: the record has no sample between them.
    """
    rate, num_samples = record.sampling_rate, record.array.shape[1]
    duration = num_samples / rate
    if not 0 <= start < duration:
        raise ValueError(f"--start is {start:g}; the record lasts {duration:g} s, and the drawing begins within it.")
    if seconds is None:
        seconds = math.inf if duration - start <= MAX_SECONDS else DEFAULT_SECONDS
    if not seconds * rate >= 1:  # NaN fails too
        raise ValueError(f"--seconds is {seconds:g}; expected at least one sample, which takes {1 / rate:g} s.")
    first = min(round(start * rate), num_samples - 1)  # a start just before the end would be rounded to it
    return slice(first, min(num_samples, first + round(min(seconds * rate, num_samples))))  # infinity cannot be rounded


def plot(path: Path, output: Path, args: argparse.Namespace, paper: ECGPaper) -> None:
    """Draws the record of a file, and prints where the picture is, and the notices about the record.

    Raises:
        ValueError: the file is no ECG, or the options do not suit it.
    """
    record = read_ecg(path, args.sampling_rate, args.lead_names, args.unit)
    if output.resolve() == path.resolve():
        raise ValueError(f"{output} is the record {path} itself; name another file with --output.")
    try:
        span = time_span(record, args.start, args.seconds)
        part = replace(record, array=record.array[:, span])
        if args.leads is not None:
            part = select_leads(part, args.leads)  # derives limb leads that the record lacks from I and II
        rate, duration = record.sampling_rate, record.array.shape[1] / record.sampling_rate
        facts = [args.title or path.stem, f"{paper.speed:g} mm/s", f"{paper.gain:g} mm/mV", f"{rate:g} Hz"]
        done = f"Picture of {path.name} in {output.resolve()}"
        if part.array.shape[1] < record.array.shape[1]:
            seconds = f"{span.start / rate:g} to {span.stop / rate:g} s of {duration:g} s"
            facts.append(seconds)
            done += f": {seconds} (--start and --seconds choose others)"
        save_picture(output, part, paper, ", ".join(facts), args.width or DEFAULT_WIDTH, args.height)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    print(printable(done), flush=True)
    for notice in part.metadata["notices"]:
        print(printable(f"{path.name}: {notice}"), file=sys.stderr, flush=True)


def add_file_options(parser: argparse.ArgumentParser) -> None:
    """Options for what a file may lack and `read_ecg` needs."""
    add_record_options(parser)


def make_parser() -> argparse.ArgumentParser:
    """The options of `elm plot`."""
    usage = "elm plot RECORD [RECORD ...] [options]"
    parser = CommandLineParser(prog="elm plot", usage=usage, description=__doc__)
    formats_help = "files of any format of docs/reference/file_formats.md"
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORD", help=formats_help)
    output_help = "picture, .png or .svg, of one record; default: NAME.png in the working directory, for each record"
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=output_help)
    layout_help = "rows x columns of twelve leads; columns show successive parts of the time; default: %(default)s"
    parser.add_argument("--layout", choices=LAYOUTS, default=ECGPaper.layout, help=layout_help)
    rhythm_help = "leads drawn below over the whole time; no name for none; default: II in 3x4"
    parser.add_argument("--rhythm_leads", nargs="*", metavar="LEAD", help=rhythm_help)
    parser.add_argument("--leads", nargs="+", metavar="LEAD", help="leads that are drawn; default: those of the record")
    parser.add_argument("--start", type=float, default=0.0, metavar="SECONDS", help="default: %(default)g")
    seconds_help = f"from --start on; default: all, or the first {DEFAULT_SECONDS:g} of more than {MAX_SECONDS:g}"
    parser.add_argument("--seconds", type=float, help=seconds_help)
    parser.add_argument("--speed", type=float, default=ECGPaper.speed, help="mm/s; default: %(default)g")
    parser.add_argument("--gain", type=float, default=ECGPaper.gain, help="mm/mV; default: %(default)g")
    line_help = "of the trace, at least a pixel; default: %(default)g"
    parser.add_argument("--line_width", type=float, default=ECGPaper.line_width, metavar="MM", help=line_help)
    parser.add_argument("--title", help="in the caption, in place of the record's name")
    parser.add_argument(
        "--width", type=whole_number, metavar="PIXELS", help=f"width of a PNG; default: {DEFAULT_WIDTH}"
    )
    height_help = "height of a PNG; default: by the page's own proportions"
    parser.add_argument("--height", type=whole_number, metavar="PIXELS", help=height_help)
    add_file_options(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Draws each record into its own file."""
    args = make_parser().parse_args(argv)
    paper = ECGPaper(args.layout, args.rhythm_leads, args.speed, args.gain, args.line_width)
    outputs = [Path(f"{path.stem}.png") for path in args.records]
    if args.output is not None:
        if len(args.records) > 1:
            raise ValueError(
                f"--output is one file, and there are {len(args.records)} records; leave it out, so that each has its "
                "own, or draw them one by one."
            )
        if args.output.suffix.lower() not in (".png", ".svg"):
            raise ValueError(f"--output is {args.output}; expected a file that ends with .png or .svg.")
        if args.output.suffix.lower() == ".svg" and (args.width or args.height):
            raise ValueError("--width and --height are of a PNG; an SVG is in millimetres, scaled where it is shown.")
        if not args.output.parent.is_dir():
            raise ValueError(f"--output is {args.output}; there is no folder {args.output.parent}.")
        outputs = [args.output]
    twice = [str(output) for output, count in Counter(outputs).items() if count > 1]
    if twice:
        raise ValueError(
            f"Several records would be drawn into {', '.join(twice)}; draw them one by one, with --output."
        )
    for path, output in zip(args.records, outputs, strict=True):
        plot(path, output, args, paper)
