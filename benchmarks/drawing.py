"""Speed of drawing a simulated ECG (12 leads, 10 s at 250 Hz) on ECG paper, and of the same picture by Matplotlib.

    OMP_NUM_THREADS=1 uv run python benchmarks/drawing.py

A row is the median times of all three, taken in turn, and their ratios. Matplotlib renders with Agg to an array, in two
ways: with the grid of its axes, as most would write it, and with all grid lines as one collection and no axes, which is
the fastest. `draw_ecg` finds the paper in its cache, as from the second record of a size and length on.
"""

import argparse
from functools import partial

import numpy as np
from common import interleaved, make_rows
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from elm_ecg import ecg_drawing
from elm_ecg.ecg_drawing import LAYOUTS, ECGPaper, Strip, draw_ecg, page_width, strips
from elm_ecg.ecg_utils import ECGRecord, as_record

SIZES = (224, 512, 1600)
DPI = 100


def draw_with_matplotlib(
    record: ECGRecord, size: int, paper: ECGPaper, page: list[Strip], has_axes: bool
) -> np.ndarray:
    """The picture of `draw_ecg` with the same grid, strips, names and pulses, uint8 [size, size, 4]."""
    rate, num_samples = record.sampling_rate, record.array.shape[1]
    side = page_width(paper, num_samples / rate)
    scale = size / side  # pixels per millimetre
    points = 72 / DPI  # per pixel
    figure = Figure(figsize=(size / DPI, size / DPI), dpi=DPI, facecolor=paper.background_color)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, side), ylim=(side, 0), facecolor=paper.background_color)
    if not has_axes:
        axes.axis("off")
    for which, spacing, color, line_width in (
        ("minor", ecg_drawing.MINOR_GRID, paper.minor_color, ecg_drawing.MINOR_WIDTH),
        ("major", ecg_drawing.MAJOR_GRID, paper.major_color, ecg_drawing.MAJOR_WIDTH),
    ):
        if spacing * scale < ecg_drawing.MIN_GRID_SPACING:
            continue
        line_width = points * max(ecg_drawing.MIN_GRID_WIDTH, line_width * scale)
        if has_axes:
            for axis in (axes.xaxis, axes.yaxis):
                (axis.set_minor_locator if which == "minor" else axis.set_major_locator)(MultipleLocator(spacing))
            axes.grid(which=which, color=color, linewidth=line_width)
        else:
            places = np.arange(0, side, spacing)
            lines = [[(place, 0), (place, side)] for place in places]
            lines += [[(0, place), (side, place)] for place in places]
            axes.add_collection(LineCollection(lines, colors=color, linewidths=line_width))
    style = {
        "color": paper.trace_color,
        "linewidth": points * max(ecg_drawing.MIN_LINE_WIDTH, paper.line_width * scale),
    }
    for y in {strip.y for strip in page}:
        axes.plot(ecg_drawing.PULSE_X, y - paper.gain * np.array(ecg_drawing.PULSE_MILLIVOLTS), **style)
    text_size = points * max(ecg_drawing.MIN_TEXT_SIZE, ecg_drawing.TEXT_SIZE * scale)
    for strip in page:
        lead = record.array[record.lead_names.index(strip.lead)]
        first, last = round(strip.start * rate), round(strip.stop * rate)
        x = strip.x + (np.arange(first, last) / rate - strip.start) * paper.speed
        axes.plot(x, strip.y - paper.gain * (lead[first:last] - np.median(lead)), **style)
        axes.text(strip.x + 1, strip.y - 8, strip.lead, color=paper.text_color, fontsize=text_size)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="of each measurement; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()

    record = as_record(make_rows(1, args.seed)[0]["ecg"])
    seconds = record.array.shape[1] / record.sampling_rate
    print(
        "| layout | pixels | draw_ecg, ms | Matplotlib, ms | ratio | at its fastest, ms | ratio |\n"
        + "| --- " * 7
        + "|"
    )
    for layout in LAYOUTS:
        paper = ECGPaper(layout)
        page = strips(paper, record.lead_names, seconds, page_width(paper, seconds))
        for size in SIZES:
            by_matplotlib = partial(draw_with_matplotlib, record, size, paper, page)
            works = {
                "draw_ecg": partial(draw_ecg, record, size, size, paper),
                "Matplotlib": partial(by_matplotlib, has_axes=True),
                "at its fastest": partial(by_matplotlib, has_axes=False),
            }
            ours, usual, fastest = (1e3 * value for value in interleaved(works, args.repeats).values())
            columns = [layout, f"{size} x {size}", f"{ours:.1f}", f"{usual:.0f}", f"{usual / ours:.0f}"]
            columns += [f"{fastest:.0f}", f"{fastest / ours:.0f}"]
            print(f"| {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
