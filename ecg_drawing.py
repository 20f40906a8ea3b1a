"""Drawings of ECGs on ECG paper, as pictures and as SVG."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from .ecg_utils import STANDARD_LEADS, ECGRecord, canonical_lead_names

# columns of each layout; the leads fill one column after the other
LAYOUTS = {"12x1": 1, "6x2": 2, "3x4": 4}

# millimetres of paper, y downwards
MINOR_GRID, MAJOR_GRID = 1.0, 5.0
MINOR_WIDTH, MAJOR_WIDTH = 0.1, 0.25
LEFT_MARGIN, RIGHT_MARGIN, VERTICAL_MARGIN = 10.0, 5.0, 5.0
ROW_HEIGHTS = {"12x1": 20.0, "6x2": 30.0, "3x4": 30.0}  # of a page of natural height
PULSE_X, PULSE_MILLIVOLTS = (1.0, 2.0, 2.0, 7.0, 7.0, 8.0), (0.0, 0.0, 1.0, 1.0, 0.0, 0.0)
SEPARATOR = ((-7.0, -3.0), (3.0, 7.0))  # from 0 mV; leaves the trace free
TEXT_SIZE = 4.5
CAPITAL_HEIGHT = 0.72  # of text of size 1
LABEL_HEIGHT = 10.0  # over 0 mV, where the row is that high

# of what is shown beside a record: a second trace, and which of its parts are meant
OVERLAY_COLOR, SHADE_COLOR = "#d55e00", "#d7e6f5"

# pixels
MIN_GRID_SPACING = 3.0  # closer lines are noise
MIN_GRID_WIDTH = 0.6
MIN_LINE_WIDTH = 1.0
MIN_TEXT_SIZE = 9.0
MIN_ROW_HEIGHT = 10.0
MIN_STRIP_WIDTH = 24.0  # of the longest label

Lines = tuple[np.ndarray, np.ndarray]  # x [points], which never falls, and y [lines, points]


@dataclass(frozen=True)
class ECGPaper:
    """How an ECG is drawn; the defaults are the paper of most hospitals.

    Args:
        layout: `12x1`, `6x2` or `3x4`: rows x columns of twelve leads. Columns show successive parts of the time.
        rhythm_leads: leads that are drawn below over the whole time. None: lead II under the `3x4` of a record that has
            it, and no lead in the other layouts.
        speed: in mm/s.
        gain: in mm/mV.
        line_width: of the trace in mm; at least a pixel.
        trace_color, major_color, minor_color, background_color, text_color: as "#rrggbb"; major and minor are the grid
            lines every 5 mm and every 1 mm.

    Raises:
        ValueError: an argument is impossible.
    """

    layout: str = "12x1"
    rhythm_leads: tuple[str, ...] | None = None
    speed: float = 25.0
    gain: float = 10.0
    line_width: float = 0.35
    trace_color: str = "#000000"
    major_color: str = "#f0a0a0"
    minor_color: str = "#f9d8d8"
    background_color: str = "#fffafa"
    text_color: str = "#14295c"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}; expected one of {', '.join(LAYOUTS)}.")
        if self.rhythm_leads is not None:
            leads = canonical_lead_names(self.rhythm_leads) if self.rhythm_leads else ()
            object.__setattr__(self, "rhythm_leads", leads)  # a list where it comes from JSON
        for name, example in (("speed", "25 mm/s"), ("gain", "10 mm/mV"), ("line_width", "0.35 mm")):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)  # True is an int
            if not (number and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value!r}; expected a positive number, such as {example}.")
        for name in ("trace_color", "major_color", "minor_color", "background_color", "text_color"):
            value = getattr(self, name)
            if not (isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value)):
                raise ValueError(f'{name} is {value!r}; expected a colour as "#rrggbb", such as "#000000".')


class Strip(NamedTuple):
    """A lead on the paper over a part of the time.

    Args:
        lead: its name.
        x, y: millimetres from the left and from the top of the page to the time `start`, and to 0 mV.
        start, stop: seconds of the record.
    """

    lead: str
    x: float
    y: float
    start: float
    stop: float


def _rhythm_leads(paper: ECGPaper, lead_names: Sequence[str]) -> tuple[str, ...]:
    if paper.rhythm_leads is None:
        return ("II",) if paper.layout == "3x4" and "II" in lead_names and len(lead_names) > 1 else ()
    missing = [lead for lead in paper.rhythm_leads if lead not in lead_names]
    if missing:
        raise ValueError(
            f"The ECG has no rhythm lead {', '.join(missing)}: it has {', '.join(lead_names)}. Choose among these, or "
            "give rhythm_leads=() for none."
        )
    return paper.rhythm_leads


def _num_rows(paper: ECGPaper, lead_names: Sequence[str]) -> int:
    return math.ceil(len(lead_names) / LAYOUTS[paper.layout]) + len(_rhythm_leads(paper, lead_names))


def page_width(paper: ECGPaper, seconds: float) -> float:
    """Millimetres from the left to the right of the page."""
    return LEFT_MARGIN + seconds * paper.speed + RIGHT_MARGIN


def page_height(paper: ECGPaper, lead_names: Sequence[str]) -> float:
    """Millimetres from the top to the bottom of a page of natural height.

    Raises:
        ValueError: the record has not the rhythm leads.
    """
    return _num_rows(paper, lead_names) * ROW_HEIGHTS[paper.layout] + 2 * VERTICAL_MARGIN


def strips(paper: ECGPaper, lead_names: Sequence[str], seconds: float, height_mm: float) -> list[Strip]:
    """Where the leads stand on a page of that height.

    They fill column after column in the order of `STANDARD_LEADS`, whatever that of the record is; the rhythm strips
    follow. Rows share the height equally, to the nearest line of the grid. Fewer than twelve leads have fewer rows, and
    where there are fewer leads than columns, fewer columns.

    Raises:
        ValueError: the record has not the rhythm leads.
    """
    leads = sorted(lead_names, key=STANDARD_LEADS.index)
    rhythm, all_rows = _rhythm_leads(paper, leads), _num_rows(paper, leads)
    rows = all_rows - len(rhythm)
    columns = math.ceil(len(leads) / rows)  # 5 leads in 3x4: 2 rows, 3 columns
    row_height = (height_mm - 2 * VERTICAL_MARGIN) / all_rows
    middles = [VERTICAL_MARGIN + (row + 0.5) * row_height for row in range(all_rows)]
    baselines = [math.floor(middle / MINOR_GRID + 0.5) * MINOR_GRID for middle in middles]  # halves up; round(): even
    page = []
    for index, lead in enumerate(leads):
        column, row = divmod(index, rows)
        start, stop = seconds * column / columns, seconds * (column + 1) / columns
        page.append(Strip(lead, LEFT_MARGIN + start * paper.speed, baselines[row], start, stop))
    page += [Strip(lead, LEFT_MARGIN, y, 0.0, seconds) for lead, y in zip(rhythm, baselines[rows:], strict=True)]
    return page


def _traces(
    record: ECGRecord, paper: ECGPaper, page: Iterable[Strip], beside: ECGRecord | None = None
) -> Iterator[tuple[list[Strip], Lines]]:
    """Strips that stand below each other, and their signals in mm; those of `beside` against the baselines of `record`."""
    rate, num_samples = record.sampling_rate, record.array.shape[1]
    for (x, start, stop), group in groupby(page, key=lambda strip: (strip.x, strip.start, strip.stop)):
        # the sample at `stop` is the next strip's; rounding shall not move it
        first, last = math.ceil(start * rate - 1e-6), min(num_samples, math.ceil(stop * rate - 1e-6))
        if first < last:
            column = [strip for strip in group if strip.lead in record.lead_names]
            if not column:
                continue
            rows = [record.lead_names.index(strip.lead) for strip in column]
            leads = (record if beside is None else beside).array[rows, first:last]
            baselines = np.array([[strip.y] for strip in column])  # [strips, 1]; a lead's median stands there
            y = baselines - paper.gain * (leads - np.median(record.array[rows], axis=1, keepdims=True))
            yield column, (x + (np.arange(first, last) / rate - start) * paper.speed, y)


def _pulses(paper: ECGPaper, page: Iterable[Strip]) -> Lines:
    """The calibration pulse of each row, in mm."""
    rows = np.array(sorted({strip.y for strip in page}))
    return np.array(PULSE_X), rows[:, None] - paper.gain * np.array(PULSE_MILLIVOLTS)  # minus, as y runs down


def _separators(page: Iterable[Strip]) -> list[Lines]:
    """Marks between the leads of a row, in mm."""
    return [
        (np.full(2, strip.x), strip.y + np.array([ends])) for strip in page if strip.start > 0 for ends in SEPARATOR
    ]


def _labels(page: Iterable[Strip], row_height: float, text_size: float) -> list[tuple[str, float, float]]:
    """Each strip's lead, and where its name begins on its line of writing, in mm."""
    above = min(LABEL_HEIGHT, row_height / 2 - CAPITAL_HEIGHT * text_size)
    return [(strip.lead, strip.x + MINOR_GRID, strip.y - above) for strip in page]


def _pen(lines: Iterable[Lines], height: int, width: int, line_width: float, scale: float) -> Image.Image:
    """Mask of what a round pen covers, anti-aliased: 255 where it covers the whole pixel.

    Each column of pixels is cut into five parts side by side. In a part, what the pen covers of a line is one interval,
    whose overlap with the pixels is exact.

    Args:
        lines: in mm.
        height, width: of the mask in pixels.
        line_width: of the pen in mm; at least `MIN_LINE_WIDTH` pixels.
        scale: pixels per mm.
    """
    radius = max(MIN_LINE_WIDTH, line_width * scale) / 2
    parts = 5  # a divisor of 255: a pixel that is all covered gets exactly 255
    ink = 255 // parts  # of a pixel that is covered in one part
    reach = max(0, round(radius * parts - 0.5))  # parts that the pen covers on each side of its own
    beside = np.sqrt((radius**2 - ((np.arange(reach) + 1.5) / parts) ** 2).clip(min=0))  # where it leaves these
    half_heights = np.concatenate([beside[::-1], [radius], beside])
    # how much more ink a pixel has than the one above
    steps = np.zeros((height + 2) * width, dtype=np.int16)  # two more rows: ink at the lower edge goes there
    for x, y in lines:
        x, y = x * scale, y * scale
        part = np.floor(x * parts).astype(np.intp)
        # what the line spans in each part: its ends at the borders, and its points
        borders = np.arange(part[0], part[-1] + 2) / parts
        ends = np.stack([np.interp(borders, x, line) for line in y])
        top, bottom = np.minimum(ends[:, :-1], ends[:, 1:]), np.maximum(ends[:, :-1], ends[:, 1:])
        filled, starts = np.unique(part - part[0], return_index=True)  # x never falls: parts are in one piece
        top[:, filled] = np.minimum(top[:, filled], np.minimum.reduceat(y, starts, axis=1))
        bottom[:, filled] = np.maximum(bottom[:, filled], np.maximum.reduceat(y, starts, axis=1))
        # what the pen spans there
        first, last = part[0] - reach, part[-1] + reach + 1
        tops = np.full((len(y), last - first), np.inf)
        bottoms = -tops
        for shift, half in enumerate(half_heights):  # the pen's outline from left to right
            under = slice(shift, shift + top.shape[1])
            np.minimum(tops[:, under], top - half, out=tops[:, under])
            np.maximum(bottoms[:, under], bottom + half, out=bottoms[:, under])
        column = np.arange(first, last) // parts
        inside = (column >= 0) & (column < width)
        for edges, sign in ((tops, 1), (bottoms, -1)):  # ink begins at the top and ends at the bottom
            depth = np.rint(edges[:, inside].clip(0, height) * ink).astype(np.intp)
            row, below = np.divmod(depth, ink)
            cell = (row * width + column[inside]).ravel()
            below = below.ravel().astype(np.int16)
            np.add.at(steps, cell, sign * (ink - below))  # `+=` counts a cell that occurs twice once
            np.add.at(steps, cell + width, sign * below)
    rows = steps[: height * width].reshape(height, width)
    for above, row in pairwise(rows):
        row += above  # in place: a running sum of `steps` down the picture
    return Image.fromarray(np.minimum(rows, 255).astype(np.uint8))  # more where lines cross


def _grid(height: int, width: int, spacing: float, line_width: float, scale: float) -> Image.Image:
    """Mask as of `_pen` of the grid lines; empty where they are too close."""
    spacing, line_width = spacing * scale, max(MIN_GRID_WIDTH, line_width * scale)
    if spacing < MIN_GRID_SPACING:
        return Image.new("L", (width, height))

    def covered(length: int) -> np.ndarray:  # share of each pixel; lines are centred on multiples of `spacing`
        lines, beyond = np.divmod(np.arange(length + 1) + line_width / 2, spacing)
        return np.diff(lines * line_width + beyond.clip(max=line_width))  # of the length covered so far

    free = np.outer(1 - covered(height), 1 - covered(width))
    return Image.fromarray(np.rint(255 * (1 - free)).astype(np.uint8))


@lru_cache(maxsize=8)  # records of one shape share a page
def _page(
    paper: ECGPaper, lead_names: tuple[str, ...], seconds: float, height: int, width: int, caption: str
) -> tuple[list[Strip], Image.Image]:
    """The strips, and the picture without their traces."""
    scale = width / page_width(paper, seconds)
    height_mm = height / scale
    page = strips(paper, lead_names, seconds, height_mm)
    # a label has to fit each strip, and a square of the grid each row
    rows, strip_width = _num_rows(paper, lead_names), (page[0].stop - page[0].start) * paper.speed * scale
    least_width = math.ceil(width * MIN_STRIP_WIDTH / strip_width)
    least_height = math.ceil(2 * VERTICAL_MARGIN * scale + rows * max(MIN_ROW_HEIGHT, MAJOR_GRID * scale))
    if width < least_width or height < least_height:
        raise ValueError(
            f"A picture {height} pixels high and {width} wide is too small for {len(lead_names)} leads of {seconds:g} s "
            f"in the layout {paper.layout}; at this width it takes {least_height} pixels of height, and at least "
            f"{least_width} of width."
        )
    picture = Image.new("RGB", (width, height), paper.background_color)
    picture.paste(paper.minor_color, mask=_grid(height, width, MINOR_GRID, MINOR_WIDTH, scale))
    picture.paste(paper.major_color, mask=_grid(height, width, MAJOR_GRID, MAJOR_WIDTH, scale))
    picture.paste(paper.text_color, mask=_pen(_separators(page), height, width, paper.line_width, scale))
    picture.paste(paper.trace_color, mask=_pen([_pulses(paper, page)], height, width, paper.line_width, scale))

    text_size = max(MIN_TEXT_SIZE, TEXT_SIZE * scale)
    font, halo = ImageFont.load_default(text_size), max(1, round(text_size / 16))  # Pillow's own, none of the system
    texts = [
        *_labels(page, (height_mm - 2 * VERTICAL_MARGIN) / rows, text_size / scale),  # in mm
        (caption, MINOR_GRID, height_mm - MINOR_GRID),
    ]
    draw = ImageDraw.Draw(picture)
    for text, x, y in texts:
        place = (x * scale, y * scale)  # where the line of writing begins: anchor 'ls'
        draw.text(place, text, paper.text_color, font, "ls", stroke_width=halo, stroke_fill=paper.background_color)
    return page, picture  # cached: not to be painted on


def _shaded(
    page: Iterable[Strip],
    shades: np.ndarray,
    record: ECGRecord,
    size: tuple[int, int],
    scale: float,
    per_second: float,
    row_height: float,
) -> Image.Image:
    """Mask of the parts that are meant: 255 where a share is 1. A pixel shows that of the sample in its middle.

    Args:
        size: width and height in pixels.
        scale, per_second: pixels for a millimetre and for a second.
        row_height: in pixels.
    """
    mask = np.zeros(size[::-1], dtype=np.uint8)
    num_samples = shades.shape[1]
    for strip in page:
        if strip.lead in record.lead_names:
            left = strip.x * scale
            columns = np.arange(
                math.ceil(left), min(size[0], math.ceil(left + (strip.stop - strip.start) * per_second))
            )
            seconds = strip.start + (columns - left) / per_second
            samples = (seconds * record.sampling_rate).astype(int).clip(0, num_samples - 1)
            rows = slice(max(0, round(strip.y * scale - row_height / 2)), round(strip.y * scale + row_height / 2))
            mask[rows, columns] = np.rint(255 * shades[record.lead_names.index(strip.lead), samples])
    return Image.fromarray(mask)


def _shade_boxes(
    record: ECGRecord, paper: ECGPaper, page: Iterable[Strip], shades: np.ndarray
) -> Iterator[tuple[float, float, float, float, float]]:
    """Left, top, width and height in mm of what is shaded alike, and how strongly, in hundredths."""
    rate, high = record.sampling_rate, ROW_HEIGHTS[paper.layout]
    for strip in page:
        if strip.lead in record.lead_names:
            first, last = (
                math.ceil(strip.start * rate - 1e-6),
                min(shades.shape[1], math.ceil(strip.stop * rate - 1e-6)),
            )
            strengths = np.rint(100 * shades[record.lead_names.index(strip.lead), first:last]).astype(int)
            start = 0
            for strength, alike in groupby(strengths.tolist()):
                stop = start + len(list(alike))
                if strength:
                    left = strip.x + ((first + start) / rate - strip.start) * paper.speed
                    yield left, strip.y - high / 2, (stop - start) / rate * paper.speed, high, strength / 100
                start = stop


def draw_ecg(
    record: ECGRecord,
    height: int,
    width: int,
    paper: ECGPaper = ECGPaper(),  # frozen, so it may be a default
    caption: str = "",
    lead_names: tuple[str, ...] | None = None,
    beside: ECGRecord | None = None,
    shades: np.ndarray | None = None,
    shade_color: str = SHADE_COLOR,
) -> Image.Image:
    """The record on ECG paper, as an RGB picture; the same input gives the same pixels.

    The width shows the whole record: a millimetre is `width / page_width(paper, seconds)` pixels, in both directions.
    What leaves the page is cut off.

    Args:
        record: of any leads, rate and length; each lead's median stands on its baseline.
        height, width: of the picture in pixels.
        caption: at the bottom left, in one line.
        lead_names: that have a place on the page; default: those of the record. One that the record has not is named, and no
            line is drawn, as a flat one would say that the heart stands still.
        beside: another record of the same leads, rate and length, such as a reconstruction, in another colour under the trace.
        shades: [leads, samples] in [0, 1], how strongly the paper is shaded there.
        shade_color: as "#rrggbb".

    Raises:
        ValueError: the size is impossible or too small for the leads, the record has not the rhythm leads, or what is shown with it
            has another shape.
    """
    shapes = [] if beside is None else [("beside", beside.array.shape)]
    for name, shape in [*shapes, *([] if shades is None else [("shades", shades.shape)])]:
        if shape != record.array.shape:
            raise ValueError(f"{name} has the shape {shape}; expected that of the record, {record.array.shape}.")
    for name, size in (("height", height), ("width", width)):
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name} is {size!r}; expected a whole number of pixels, such as 512.")
    seconds = record.array.shape[1] / record.sampling_rate
    page, picture = _page(
        paper, lead_names or record.lead_names, seconds, height, width, " ".join(caption.splitlines())
    )
    scale = width / page_width(paper, seconds)
    if shades is not None:
        row_height = (height - 2 * VERTICAL_MARGIN * scale) / _num_rows(paper, lead_names or record.lead_names)
        mask = _shaded(page, shades, record, picture.size, scale, scale * paper.speed, row_height)
        # darkened, so that the grid is seen through it
        picture = Image.composite(
            ImageChops.multiply(picture, Image.new("RGB", picture.size, shade_color)), picture, mask
        )
    traces = [] if beside is None else [(beside, OVERLAY_COLOR)]
    for trace, color in [*traces, (record, paper.trace_color)]:
        lines = [lines for _, lines in _traces(record, paper, page, trace)]
        mask = _pen(lines, height, width, paper.line_width, scale)
        picture = Image.composite(Image.new("RGB", picture.size, color), picture, mask)
    return picture


def ecg_svg(
    record: ECGRecord,
    paper: ECGPaper = ECGPaper(),
    caption: str = "",
    shades: np.ndarray | None = None,
    shade_color: str = SHADE_COLOR,
) -> str:
    """The record on ECG paper of natural height, as an SVG document in millimetres; else as `draw_ecg`.

    Raises:
        ValueError: the record has not the rhythm leads, or `shades` has another shape.
    """
    if shades is not None and shades.shape != record.array.shape:
        raise ValueError(f"shades has the shape {shades.shape}; expected that of the record, {record.array.shape}.")
    caption = " ".join(caption.splitlines())
    seconds = record.array.shape[1] / record.sampling_rate
    width, height = page_width(paper, seconds), page_height(paper, record.lead_names)
    page = strips(paper, record.lead_names, seconds, height)
    size = {"width": f"{width:g}mm", "height": f"{height:g}mm", "viewBox": f"0 0 {width:g} {height:g}"}  # unit: mm
    svg = ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size})
    ElementTree.SubElement(svg, "title").text = caption or "ECG"  # read aloud by screen readers
    ElementTree.SubElement(svg, "rect", {"width": "100%", "height": "100%", "fill": paper.background_color})

    def path(steps: str, color: str, line_width: float, lead: str = "") -> None:
        style = {"fill": "none", "stroke": color, "stroke-width": f"{line_width:g}", "stroke-linejoin": "round"}
        element = ElementTree.SubElement(svg, "path", {"d": steps, **style})
        if lead:
            ElementTree.SubElement(element, "title").text = lead  # shown under the mouse

    def polyline(x: np.ndarray, y: np.ndarray) -> str:
        return "M" + "L".join(f"{a:.3f},{b:.3f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))  # to 1 um

    if shades is not None:  # under the grid, which is seen through it
        for left, top, wide, high, strength in _shade_boxes(record, paper, page, shades):
            box = {
                name: f"{value:.3f}"
                for name, value in zip(("x", "y", "width", "height"), (left, top, wide, high), strict=True)
            }
            ElementTree.SubElement(svg, "rect", {**box, "fill": shade_color, "fill-opacity": f"{strength:.2f}"})
    for spacing, color, line_width in (
        (MINOR_GRID, paper.minor_color, MINOR_WIDTH),
        (MAJOR_GRID, paper.major_color, MAJOR_WIDTH),
    ):
        across = [f"M{spacing * index:g},0V{height:g}" for index in range(math.ceil(width / spacing) + 1)]
        down = [f"M0,{spacing * index:g}H{width:g}" for index in range(math.ceil(height / spacing) + 1)]
        path("".join(across + down), color, line_width)
    texts = [*_labels(page, ROW_HEIGHTS[paper.layout], TEXT_SIZE), (caption, MINOR_GRID, height - MINOR_GRID)]
    style = {"fill": paper.text_color, "font-family": "sans-serif", "font-size": f"{TEXT_SIZE:g}"}
    for text, left, bottom in texts:
        ElementTree.SubElement(svg, "text", {"x": f"{left:g}", "y": f"{bottom:g}", **style}).text = text
    for x, y in _separators(page):
        path(polyline(x, y[0]), paper.text_color, paper.line_width)
    x, y = _pulses(paper, page)
    for pulse in y:
        path(polyline(x, pulse), paper.trace_color, paper.line_width)
    for column, (x, y) in _traces(record, paper, page):
        for strip, line in zip(column, y, strict=True):
            path(polyline(x, line), paper.trace_color, paper.line_width, strip.lead)
    return ElementTree.tostring(svg, encoding="unicode")
