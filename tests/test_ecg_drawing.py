import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from elm_ecg import ecg_drawing
from elm_ecg.ecg_drawing import LAYOUTS, ECGPaper, Strip, draw_ecg, ecg_svg, page_height, page_width, strips
from elm_ecg.ecg_utils import REFERENCE_LEADS, STANDARD_LEADS, ECGRecord, as_record, select_leads

WHITE = {"background_color": "#ffffff", "major_color": "#ffffff", "minor_color": "#ffffff"}


@pytest.fixture(scope="module")
def ptbxl(shared: Path) -> np.ndarray:
    """PTB-XL records at 500 Hz, float32 [40, 12, 5000] in millivolts."""
    return np.load(shared / "data/ptbxl/raw500.npz")["ecg"][:40] / np.float32(1000)


def trace_paper(**changes) -> ECGPaper:
    """Paper on which nothing but the traces and the calibration pulses is seen, black on white."""
    return ECGPaper(**WHITE, text_color="#ffffff", **changes)


def ink_of(picture: Image.Image) -> np.ndarray:
    """How much of each pixel is black on white, [height, width]."""
    return 1 - np.asarray(picture)[..., 0] / 255


def flat_record(num_leads: int = 12, seconds: float = 10) -> ECGRecord:
    return as_record(np.zeros((num_leads, round(100 * seconds))), 100, STANDARD_LEADS[:num_leads])


def noise_record(seed: int = 0, num_leads: int = 12) -> ECGRecord:
    array = np.random.default_rng(seed).normal(scale=0.2, size=(num_leads, 1000))
    return as_record(array, 100, STANDARD_LEADS[:num_leads])


def record_with(lead: str, signal: np.ndarray, rate: float = 500) -> ECGRecord:
    """Twelve leads, of which all others are flat."""
    array = np.zeros((12, len(signal)), dtype=np.float32)
    array[STANDARD_LEADS.index(lead)] = signal
    return as_record(array, rate)


def beat(time: float, millivolts: float, rate: float = 500, seconds: float = 10) -> np.ndarray:
    """A wave as long as a QRS complex (80 ms) with its peak at `time`."""
    return millivolts * np.exp(-0.5 * ((np.arange(round(rate * seconds)) / rate - time) / 0.02) ** 2)


def place_of(paper: ECGPaper, lead: str, height: int, width: int) -> tuple[Strip, float]:
    """The first strip of a lead of a record of 10 s, and the pixels of a millimetre."""
    scale = width / page_width(paper, 10)
    page = strips(paper, STANDARD_LEADS, 10, height / scale)
    return next(strip for strip in page if strip.lead == lead), scale


def drawn_peak(ink: np.ndarray, column: float, baseline: float, scale: float, sign: int) -> tuple[float, float]:
    """Pixels from the left, and up (or down) from the baseline, to the farthest point that is drawn at about a column.

    At most 18 mm away, which is before the next row; without the half of the pen that is drawn beyond the point.
    """
    first, row = round(column) - 3, int(baseline)
    near = ink[:, first : first + 6]
    away, beside = (near[row - 1 :: -1], baseline - row) if sign > 0 else (near[row + 1 :], row + 1 - baseline)
    away = away[: int(18 * scale)]
    covered = away.sum(axis=1).clip(max=1)  # the pen is at least a pixel wide
    last = np.flatnonzero(covered > 0.02)[-1]
    tip = away[max(0, last - 1) : last + 1].sum(axis=0)
    pen = max(1, 0.35 * scale) / 2
    return first + 0.5 + tip @ np.arange(6) / tip.sum(), beside + last - 1 + covered[last - 1 : last + 1].sum() - pen


def check_peak(record: ECGRecord, lead: str, paper: ECGPaper, height: int, width: int, time: float) -> None:
    """That the peak of a lead at `time` is drawn at its time and millivolts, within a pixel."""
    strip, scale = place_of(paper, lead, height, width)
    row = record.array[record.lead_names.index(lead)]
    millivolts = float(row[round(time * record.sampling_rate)] - np.median(row))
    column = (10 + time * paper.speed) * scale
    ink = ink_of(draw_ecg(record, height, width, paper))
    found = drawn_peak(ink, column, strip.y * scale, scale, 1 if millivolts > 0 else -1)
    assert found == pytest.approx((column, abs(millivolts) * paper.gain * scale), abs=1)


class TestTraces:
    @given(
        lead=st.sampled_from(STANDARD_LEADS),
        layout=st.sampled_from(list(LAYOUTS)),
        width=st.integers(224, 900),
        shape=st.sampled_from([1.0, 1.4]),
        place=st.floats(0.15, 0.85),
        millivolts=st.floats(0.5, 1.2),
        sign=st.sampled_from([-1, 1]),
    )
    def test_a_beat_is_drawn_at_its_time_and_millivolts(self, lead, layout, width, shape, place, millivolts, sign):
        paper, height = trace_paper(layout=layout, rhythm_leads=()), round(width * shape)
        strip, _ = place_of(paper, lead, height, width)
        time = round((strip.start + place * (strip.stop - strip.start)) * 500) / 500
        check_peak(record_with(lead, beat(time, sign * millivolts)), lead, paper, height, width, time)

    @pytest.mark.parametrize(("layout", "size"), [("12x1", 512), ("6x2", 512), ("3x4", 512), ("3x4", 1600)])
    def test_real_r_and_s_waves(self, ptbxl, layout, size):
        paper = trace_paper(layout=layout, rhythm_leads=())
        checked = []
        for index, lead in enumerate(STANDARD_LEADS):
            signal = ptbxl[3 * index, index] - np.median(ptbxl[3 * index, index])
            strip, _ = place_of(paper, lead, size, size)
            first, last = round(strip.start * 500) + 25, round(strip.stop * 500) - 25
            peak = first + int(np.abs(signal[first:last]).argmax())
            if 0.4 < abs(signal[peak]) < 1.6:  # clear of noise and of the next row
                check_peak(record_with(lead, signal), lead, paper, size, size, peak / 500)
                checked.append(lead)
        assert len(checked) >= 6

    @pytest.mark.parametrize("rate", [100, 360, 1000])
    def test_the_time_of_a_sample_comes_from_the_sampling_rate(self, rate):
        check_peak(record_with("II", beat(7.3, 1.0, rate), rate), "II", trace_paper(), 512, 512, 7.3)

    def test_speed_and_gain(self):
        paper = trace_paper(layout="6x2", speed=50, gain=5)
        check_peak(record_with("V3", beat(6.0, -1.5)), "V3", paper, 600, 900, 6.0)

    def test_a_line_as_a_round_pen_draws_it(self):
        record = as_record([[0, 0.1, 1.0, -0.6, 0, 0, 0.2, 0.1, 0.8, -0.8, 0, 0]], 25, ["II"])
        size, fine, line_width = 120, 8, 1.4
        scale = size / 27
        paper = trace_paper(line_width=line_width / scale)
        strip = strips(paper, ["II"], 12 / 25, size / scale)[0]
        x = (strip.x + np.arange(12)) * scale  # a millimetre a sample
        y = (strip.y - 10 * record.array[0]) * scale
        spot = (np.arange(size * fine) + 0.5) / fine
        spots = np.stack(np.meshgrid(spot, spot), axis=-1)  # [height, width, 2]
        covered = np.zeros((size * fine, size * fine), dtype=bool)
        for start, stop in zip(np.stack([x, y], 1), np.stack([x, y], 1)[1:], strict=False):
            along = ((spots - start) @ (stop - start) / ((stop - start) ** 2).sum()).clip(0, 1)
            nearest = start + along[..., None] * (stop - start)
            covered |= ((spots - nearest) ** 2).sum(-1) <= (line_width / 2) ** 2
        exact = covered.reshape(size, fine, size, fine).mean((1, 3))
        difference = (ink_of(draw_ecg(record, size, size, paper)) - exact)[:, int(9 * scale) :]
        assert np.abs(difference).max() < 0.2
        assert np.abs(difference).sum() < 0.05 * exact.sum()
        assert abs(difference.sum()) < 0.02 * exact.sum()

    @pytest.mark.parametrize("millivolts", [0.013, 0.05, -0.031])
    def test_a_shift_below_a_pixel_moves_the_ink(self, millivolts):
        signal = np.zeros(5000)
        signal[3000:] = millivolts
        strip, scale = place_of(trace_paper(), "V1", 512, 512)
        ink = ink_of(draw_ecg(record_with("V1", signal), 512, 512, trace_paper()))
        rows = slice(int(strip.y * scale) - 5, int(strip.y * scale) + 6)
        early, late = ink[rows, 200:280].mean(axis=1), ink[rows, 340:450].mean(axis=1)
        assert late.sum() == pytest.approx(1, abs=0.02)  # of one pixel in height
        centers = [(weight @ np.arange(11)) / weight.sum() for weight in (early, late)]
        assert centers[0] - centers[1] == pytest.approx(millivolts * 10 * scale, abs=0.02)
        assert ((ink[rows] > 0.05) & (ink[rows] < 0.95)).any()

    def test_a_shift_in_time_below_a_pixel_moves_the_ink(self):
        centers = []
        paper = trace_paper(rhythm_leads=())
        strip, scale = place_of(paper, "V1", 224, 224)
        for time in (5.0, 5.01):
            ink = ink_of(draw_ecg(record_with("V1", beat(time, 1.0)), 224, 224, paper))
            rows = slice(int((strip.y - 8) * scale), int((strip.y - 2) * scale))
            weight = ink[rows, 100:150].sum(axis=0)
            centers.append(weight @ np.arange(50) / weight.sum())
        assert centers[1] - centers[0] == pytest.approx(0.25 * scale, abs=0.03)

    def test_the_median_stands_on_the_baseline(self):
        record = noise_record()
        shifted = as_record(record.array + np.arange(-6, 6)[:, None] * 8, 100)
        for layout in LAYOUTS:
            pictures = [ink_of(draw_ecg(ecg, 300, 300, ECGPaper(layout))) for ecg in (record, shifted)]
            assert np.abs(pictures[0] - pictures[1]).max() < 0.02  # the shifted samples are rounded

    def test_a_spike_out_of_the_page_is_cut_off(self):
        signal = np.zeros(5000)
        spiked = signal.copy()
        spiked[2500] = 30.0
        strip, scale = place_of(trace_paper(), "V6", 256, 256)
        without, ink = (ink_of(draw_ecg(record_with("V6", s), 256, 256, trace_paper())) for s in (signal, spiked))
        column = int((strip.x + 125) * scale)
        assert (ink[: int(strip.y * scale), column - 1 : column + 2].sum(axis=1) > 0.8).all()
        assert not ink[int(strip.y * scale) + 2 :, column].any()
        elsewhere = np.abs(np.arange(256) - column) > 3
        assert (ink[:, elsewhere] == without[:, elsewhere]).all()

    def test_columns_show_successive_parts_of_the_time(self):
        for rhythm_leads in ((), ("V1",)):
            paper = trace_paper(layout="3x4", rhythm_leads=rhythm_leads)
            strip, scale = place_of(paper, "V1", 400, 400)
            flat = ink_of(draw_ecg(record_with("V1", np.zeros(5000)), 400, 400, paper))
            for time, is_seen in ((1.0, False), (6.0, True), (9.0, False)):
                change = ink_of(draw_ecg(record_with("V1", beat(time, 1.0)), 400, 400, paper)) != flat
                assert change[: int((strip.y + 5) * scale)].any() == is_seen
                assert change.any() == (is_seen or bool(rhythm_leads))


class TestLeads:
    @staticmethod
    def read_name(ink: np.ndarray, font: ImageFont.FreeTypeFont) -> str:
        """The lead whose name looks most like the ink."""

        def cut(name_ink: np.ndarray) -> np.ndarray:
            rows, columns = np.nonzero(name_ink > 0.3)
            box = name_ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            return np.asarray(Image.fromarray((255 * box).astype(np.uint8)).resize((60, 30)), dtype=float) * (
                box.shape[1] / box.shape[0]
            )

        likeness = {}
        for name in STANDARD_LEADS:
            canvas = Image.new("L", (200, 80))
            ImageDraw.Draw(canvas).text((10, 10), name, 255, font)
            likeness[name] = -np.abs(cut(np.asarray(canvas) / 255) - cut(ink)).mean()
        return max(likeness, key=likeness.__getitem__)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_each_strip_has_its_name_on_top(self, layout):
        paper = ECGPaper(layout, **WHITE, trace_color="#ffffff", text_color="#000000")
        scale = 1600 / 265
        ink = ink_of(draw_ecg(flat_record(), 1600, 1600, paper))
        font = ImageFont.load_default(ecg_drawing.TEXT_SIZE * scale)
        for strip in strips(paper, STANDARD_LEADS, 10, 265):
            top, bottom, left, right = strip.y - 14, strip.y - 7.2, strip.x + 0.5, strip.x + 15
            label = ink[int(top * scale) : int(bottom * scale), int(left * scale) : int(right * scale)]
            assert self.read_name(label, font) == strip.lead

    @pytest.mark.parametrize("size", [224, 512])
    def test_names_are_readable_and_do_not_hide_the_trace(self, size):
        record = noise_record()
        with_names = ECGPaper(**WHITE, text_color="#0000ff")
        traces = ink_of(draw_ecg(record, size, size, trace_paper()))
        picture = np.asarray(draw_ecg(record, size, size, with_names)).astype(int)
        assert (picture[traces == 1] == 0).all()
        strip, scale = place_of(with_names, "aVR", size, size)
        blue = np.nonzero(picture[..., 2] - picture[..., 0] > 150)
        inside = (np.abs(blue[0] - (strip.y - 8) * scale) < 6) & (blue[1] < (strip.x + 1) * scale + 22)
        assert np.ptp(blue[0][inside]) >= 5  # pixels in height

    @staticmethod
    def measured(record: ECGRecord, lead: str) -> np.ndarray:
        """Millivolts over the median in each column of pixels, read off a picture 1600 pixels wide."""
        strip, scale = place_of(trace_paper(), lead, 1600, 1600)
        top, bottom = (round((strip.y + side * 10) * scale) for side in (-1, 1))
        ink = ink_of(draw_ecg(record, 1600, 1600, trace_paper()))[top:bottom, round(11 * scale) : round(259 * scale)]
        rows = np.arange(len(ink)) @ ink / ink.sum(axis=0)
        return (np.median(rows) - rows) / (10 * scale)

    @pytest.mark.parametrize("index", [0, 2, 4])
    def test_augmented_leads_follow_from_i_and_ii(self, ptbxl, index):
        """Goldberger 1942, on drawn real records: aVR is -(I + II) / 2 and aVL is I - II / 2."""
        record = as_record(ptbxl[index], 500)
        i, ii, avr, avl = (self.measured(record, lead) for lead in ("I", "II", "aVR", "aVL"))
        for drawn, law, other_law in ((avr, -(i + ii) / 2, i - ii / 2), (avl, i - ii / 2, -(i + ii) / 2)):
            error = np.abs(drawn - law - np.median(drawn - law))
            assert np.quantile(error, 0.9) < 0.017  # a pixel; what is steeper fills its column
            assert np.corrcoef(drawn, law)[0, 1] > 0.9
            assert np.corrcoef(drawn, other_law)[0, 1] < 0.8

    def test_order_of_the_layouts(self):
        rows = {
            "12x1": [[lead] for lead in STANDARD_LEADS],
            "6x2": [["I", "V1"], ["II", "V2"], ["III", "V3"], ["aVR", "V4"], ["aVL", "V5"], ["aVF", "V6"]],
            "3x4": [["I", "aVR", "V1", "V4"], ["II", "aVL", "V2", "V5"], ["III", "aVF", "V3", "V6"], ["II"]],
        }
        assert rows.keys() == LAYOUTS.keys()
        for layout, expected in rows.items():
            page = strips(ECGPaper(layout), REFERENCE_LEADS, 10, 265)
            baselines = sorted({strip.y for strip in page})
            found = [[strip.lead for strip in sorted(page, key=lambda s: s.x) if strip.y == y] for y in baselines]
            assert found == expected
            row_height = 255 / len(expected)
            assert baselines == pytest.approx([5 + (row + 0.5) * row_height for row in range(len(expected))], abs=0.5)
            for strip in page:
                assert strip.x == 10 + 25 * strip.start
                columns = 1 if strip.y == baselines[-1] and layout == "3x4" else LAYOUTS[layout]
                assert strip.stop - strip.start == 10 / columns

    def test_the_order_of_the_record_does_not_matter(self):
        record = noise_record()
        reordered = select_leads(record, REFERENCE_LEADS)
        for layout in LAYOUTS:
            assert draw_ecg(record, 224, 224, ECGPaper(layout)) == draw_ecg(reordered, 224, 224, ECGPaper(layout))

    @pytest.mark.parametrize(
        ("num_leads", "layout", "num_rows", "num_columns"),
        [(1, "3x4", 1, 1), (4, "3x4", 2, 4), (5, "3x4", 3, 3), (8, "6x2", 4, 2), (3, "12x1", 3, 1)],
    )
    def test_fewer_leads(self, num_leads, layout, num_rows, num_columns):
        names = STANDARD_LEADS[:num_leads]
        page = strips(ECGPaper(layout), names, 10, 100)
        assert [strip.lead for strip in page[:num_leads]] == list(names)
        assert len({strip.y for strip in page}) == num_rows
        assert page[0].stop == 10 / num_columns
        assert draw_ecg(noise_record(num_leads=num_leads), 224, 300, ECGPaper(layout)).size == (300, 224)

    def test_rhythm_leads(self):
        for paper, expected in (
            (ECGPaper("3x4"), ["II"]),
            (ECGPaper("3x4", rhythm_leads=()), []),
            (ECGPaper("6x2", rhythm_leads=("V1", "II")), ["V1", "II"]),
        ):
            page = strips(paper, STANDARD_LEADS, 10, 200)
            assert [strip.lead for strip in page[12:]] == expected
            assert all((strip.x, strip.start, strip.stop) == (10, 0, 10) for strip in page[12:])
        assert len(strips(ECGPaper("3x4"), ["I", "V1"], 10, 200)) == 2


class TestPage:
    @pytest.mark.parametrize(("height", "width"), [(224, 224), (512, 512), (700, 1600)])
    def test_grid_lines_stand_every_millimetre_and_five(self, height, width):
        scale = width / 265
        grids = {5: {"major_color": "#000000"}, 1: {"major_color": "#000000", "minor_color": "#000000"}}
        for spacing, colors in grids.items():
            if spacing * scale < 3:
                continue
            ink = ink_of(draw_ecg(flat_record(), height, width, ECGPaper(**WHITE | colors)))
            margin = int(4 * scale)  # in the top and right margin is nothing but the grid
            for profile in (np.median(ink[:margin], axis=0), np.median(ink[:, -margin:], axis=1)):
                lines = np.arange(1, int(len(profile) / scale / spacing)) * spacing * scale
                errors = []
                for line in lines:
                    near = np.arange(round(line - 1.5), round(line + 1.5))
                    errors.append((near + 0.5) @ profile[near] / profile[near].sum() - line)
                assert len(errors) > 20
                assert np.abs(errors).max() < 0.25  # a thin line inside a pixel is seen in its middle
                assert abs(np.mean(errors)) < 0.03

    def test_lines_closer_than_three_pixels_are_left_out(self):
        for width, minor_is_seen, major_is_seen in ((1600, True, True), (512, False, True), (150, False, False)):
            picture = draw_ecg(flat_record(), 800, width, ECGPaper(minor_color="#00ff00", major_color="#ff0000"))
            margin = np.asarray(picture).astype(int)[: int(4 * width / 265)]
            red, green, _ = np.moveaxis(margin, -1, 0)
            assert (green - red > 50).any() == minor_is_seen
            assert (red - green > 50).any() == major_is_seen

    @pytest.mark.parametrize(("layout", "num_rows"), [("12x1", 12), ("6x2", 6), ("3x4", 4)])
    @pytest.mark.parametrize("gain", [5, 10])
    def test_each_row_has_a_pulse_of_a_millivolt_and_five_millimetres(self, layout, num_rows, gain):
        paper = trace_paper(layout=layout, gain=gain)
        scale, record = 800 / 265, flat_record()
        ink = ink_of(draw_ecg(record, 800, 800, paper))
        baselines = sorted({strip.y for strip in strips(paper, STANDARD_LEADS, 10, 265)})
        assert len(baselines) == num_rows
        for baseline in baselines:
            top = baseline - gain
            middle = ink[round((top + 2) * scale) : round((baseline - 2) * scale), : int(9.5 * scale)].mean(axis=0)
            edges = [np.arange(left, left + 5) for left in np.flatnonzero(middle > 0.2)[[0, -1]] - [1, 3]]
            places = [(edge + 0.5) @ middle[edge] / middle[edge].sum() for edge in edges]
            assert places[1] - places[0] == pytest.approx(5 * scale, abs=0.25)
            roof = ink[round((top - 2) * scale) : round((top + 2) * scale), round(4 * scale) : round(6 * scale)]
            floor = ink[round((baseline - 2) * scale) : round((baseline + 2) * scale), round(50 * scale)]
            height = (
                round((baseline - 2) * scale)
                - round((top - 2) * scale)
                + np.arange(len(floor)) @ floor / floor.sum()
                - np.arange(len(roof)) @ roof.mean(axis=1) / roof.mean(axis=1).sum()
            )
            assert height == pytest.approx(gain * scale, abs=0.05)

    def test_size(self):
        assert page_width(ECGPaper(speed=50), 4) == 10 + 200 + 5
        assert page_height(ECGPaper("12x1"), STANDARD_LEADS) == 12 * 20 + 10
        assert page_height(ECGPaper("3x4"), STANDARD_LEADS) == 4 * 30 + 10
        assert page_height(ECGPaper("6x2"), STANDARD_LEADS[:3]) == 2 * 30 + 10
        for height, width in ((224, 224), (256, 512), (300, 200)):
            picture = draw_ecg(noise_record(), height, width)
            assert picture.mode == "RGB"
            assert picture.size == (width, height)

    @pytest.mark.parametrize("seconds", [0.5, 5, 60])
    def test_any_length_fills_the_width(self, seconds):
        scale = 600 / page_width(trace_paper(), seconds)
        ink = ink_of(draw_ecg(flat_record(2, seconds), 600, 600, trace_paper()))
        drawn = np.flatnonzero(ink.any(axis=0))[-1] + 1
        assert drawn == pytest.approx(600 - 5 * scale, abs=2 + 0.25 * scale)  # the last sample is at seconds - 0.01

    def test_caption_is_drawn_at_the_bottom_left(self):
        record = flat_record()
        without, with_caption = (
            np.asarray(draw_ecg(record, 512, 512, caption=caption)) for caption in ("", "25 mm/s  10 mm/mV")
        )
        rows, columns = np.nonzero((without != with_caption).any(axis=-1))
        assert rows.min() > 512 - 12
        assert columns.min() < 6
        assert 60 < columns.max() < 150
        assert draw_ecg(record, 512, 512, caption="a\nb") == draw_ecg(record, 512, 512, caption="a b")

    def test_colors(self):
        colors = {"trace_color": "#00ff60", "background_color": "#000000", "major_color": "#000000"}
        paper = ECGPaper(**colors, minor_color="#000000", text_color="#000000")
        found = np.unique(np.asarray(draw_ecg(noise_record(), 400, 400, paper)).reshape(-1, 3), axis=0)
        assert found[0].tolist() == [0, 0, 0]
        assert found[-1].tolist() == [0, 0xFF, 0x60]
        assert not found[:, 0].any()


class TestSameInputSamePixels:
    def test_again(self):
        record = noise_record()
        first = draw_ecg(record, 300, 400, caption="a")
        first.paste("#ff0000", (0, 0, 400, 300))  # what the caller does with a picture stays with the caller
        second = draw_ecg(record, 300, 400, caption="a")
        ecg_drawing._page.cache_clear()
        assert second == draw_ecg(as_record(record.array.copy(), 100), 300, 400, caption="a")
        assert second != first
        assert second != draw_ecg(noise_record(1), 300, 400, caption="a")

    def test_in_a_fresh_process_without_matplotlib_and_scipy(self):
        program = """
import hashlib, sys
sys.modules["matplotlib"] = sys.modules["scipy"] = None
import numpy as np
from elm_ecg.ecg_drawing import ECGPaper, draw_ecg, ecg_svg
from elm_ecg.ecg_utils import as_record
record = as_record(np.random.default_rng(0).normal(scale=0.2, size=(12, 1000)), 100)
for layout in ("12x1", "3x4"):
    paper = ECGPaper(layout)
    print(hashlib.sha256(draw_ecg(record, 224, 300, paper, "a").tobytes() + ecg_svg(record, paper).encode()).hexdigest())
"""
        root = Path(ecg_drawing.__file__).parent
        done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
        record, expected = noise_record(), []
        for layout in ("12x1", "3x4"):
            paper = ECGPaper(layout)
            content = draw_ecg(record, 224, 300, paper, "a").tobytes() + ecg_svg(record, paper).encode()
            expected.append(hashlib.sha256(content).hexdigest())
        assert done.stdout.split() == expected


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"layout": "4x3"}, "layout is '4x3'; expected one of 12x1, 6x2, 3x4"),
            ({"speed": 0}, "speed is 0; expected a positive number, such as 25 mm/s"),
            ({"speed": "25"}, "speed is '25'; expected a positive number"),
            ({"gain": -10.0}, r"gain is -10.0; expected a positive number, such as 10 mm/mV"),
            ({"gain": float("inf")}, "gain is inf; expected a positive number"),
            ({"line_width": float("nan")}, "line_width is nan; expected a positive number"),
            ({"line_width": True}, "line_width is True; expected a positive number"),
            ({"trace_color": "black"}, "trace_color is 'black'; expected a colour as \"#rrggbb\""),
            ({"text_color": "#12345"}, "text_color is '#12345'; expected a colour"),
            ({"major_color": [1, 2, 3]}, r"major_color is \[1, 2, 3\]; expected a colour"),
            ({"rhythm_leads": ("II", "V7")}, "Unknown lead 'V7'; expected one of I, II"),
            ({"rhythm_leads": "II"}, "lead_names is the string 'II'; give a list"),
            ({"rhythm_leads": ("II", "ii")}, "Lead II is named more than once"),
        ],
    )
    def test_paper(self, changes, message):
        with pytest.raises(ValueError, match=message):
            ECGPaper(**changes)

    @pytest.mark.parametrize("size", [0, -1, 2.5, "512", None])
    def test_size(self, size):
        for name, sizes in (("height", (size, 512)), ("width", (512, size))):
            with pytest.raises(ValueError, match=f"{name} is {size!r}; expected a whole number of pixels"):
                draw_ecg(flat_record(), *sizes)

    def test_a_rhythm_lead_that_the_record_has_not(self):
        paper = ECGPaper("3x4", rhythm_leads=("V1",))
        message = "The ECG has no rhythm lead V1: it has I, II. Choose among these, or give rhythm_leads="
        for work in (
            lambda: draw_ecg(flat_record(2), 512, 512, paper),
            lambda: ecg_svg(flat_record(2), paper),
            lambda: strips(paper, ("I", "II"), 10, 100),
            lambda: page_height(paper, ("I", "II")),
        ):
            with pytest.raises(ValueError, match=message):
                work()

    @pytest.mark.parametrize("layout", LAYOUTS)
    @given(width=st.integers(20, 400), seconds=st.sampled_from([0.5, 10, 60]))
    def test_a_picture_that_is_too_small(self, layout, width, seconds):
        record, paper = flat_record(seconds=seconds), ECGPaper(layout)
        with pytest.raises(ValueError, match=r"1 pixels high and .* is too small for 12 leads") as caught:
            draw_ecg(record, 1, width, paper)
        words = str(caught.value).split()
        height, least = int(words[words.index("takes") + 1]), int(words[-3])
        size = (height, width) if width >= least else (10_000, least)
        assert draw_ecg(record, *size, paper).size == size[::-1]
        with pytest.raises(ValueError, match="is too small"):
            draw_ecg(record, *((height - 1, width) if width >= least else (10_000, least - 1)), paper)


class TestSVG:
    @pytest.fixture(scope="class")
    def namespace(self) -> dict[str, str]:
        return {"": "http://www.w3.org/2000/svg"}

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_has_the_same_geometry(self, layout, namespace):
        record, paper = noise_record(), ECGPaper(layout)
        root = ElementTree.fromstring(ecg_svg(record, paper, "a caption"))
        width, height = page_width(paper, 10), page_height(paper, STANDARD_LEADS)
        assert (root.get("width"), root.get("height")) == (f"{width:g}mm", f"{height:g}mm")
        assert root.get("viewBox") == f"0 0 {width:g} {height:g}"
        page = strips(paper, STANDARD_LEADS, 10, height)
        traces = [path for path in root.iterfind("path", namespace) if path.find("title", namespace) is not None]
        assert [path.findtext("title", namespaces=namespace) for path in traces] == [strip.lead for strip in page]
        for strip, path in zip(page, traces, strict=True):
            points = np.array([point.split(",") for point in path.get("d")[1:].split("L")], dtype=float)
            signal = record.array[STANDARD_LEADS.index(strip.lead)]
            part = slice(round(strip.start * 100), round(strip.stop * 100))
            assert points[:, 0] == pytest.approx(strip.x + np.arange(len(points)) / 100 * 25, abs=1e-3)
            assert points[:, 1] == pytest.approx(strip.y - 10 * (signal - np.median(signal))[part], abs=1e-3)
        names = [text for text in root.iterfind("text", namespace) if text.text != "a caption"]
        assert [text.text for text in names] == [strip.lead for strip in page]
        for strip, text in zip(page, names, strict=True):
            assert float(text.get("x")) == strip.x + 1
            assert strip.y - 12 < float(text.get("y")) < strip.y - 6

    def test_grid_and_pulse(self, namespace):
        paper = ECGPaper("3x4")
        root = ElementTree.fromstring(ecg_svg(flat_record(), paper))
        minor, major = (
            path.get("d") for path in root.iterfind("path", namespace) if path.get("stroke") in ("#f9d8d8", "#f0a0a0")
        )
        assert minor.startswith("M0,0V130M1,0V130M2,0V130")
        assert major.startswith("M0,0V130M5,0V130M10,0V130")
        assert major.endswith("M0,125H265M0,130H265")
        pulse = "M1.000,20.000L2.000,20.000L2.000,10.000L7.000,10.000L7.000,20.000L8.000,20.000"
        assert pulse in [path.get("d") for path in root.iterfind("path", namespace)]

    def test_caption_is_escaped(self, namespace):
        caption = 'P < R & "T" > <script>'
        root = ElementTree.fromstring(ecg_svg(flat_record(), ECGPaper(), caption))
        assert root.findtext("title", namespaces=namespace) == caption
        assert caption in [text.text for text in root.iterfind("text", namespace)]
        assert root.find(".//script", namespace) is None


def test_paper_survives_json():
    paper = ECGPaper("6x2", rhythm_leads=["ii", "Lead V1"], speed=50)
    assert paper.rhythm_leads == ("II", "V1")
    assert ECGPaper(**json.loads(json.dumps(asdict(paper)))) == paper
    assert ECGPaper(**json.loads(json.dumps(asdict(ECGPaper())))) == ECGPaper()


class TestBeside:
    """What is shown with a record: a second trace, and which of its parts are meant."""

    def record(self):
        return as_record({"array": np.zeros((12, 500), np.float32), "sampling_rate": 100, "unit": "mV"})

    def test_a_second_trace_lies_under_the_first(self):
        record = self.record()
        plain = np.array(draw_ecg(record, 600, 500, beside=record))
        black = (np.array(draw_ecg(record, 600, 500)) < 30).all(-1)
        assert np.array_equal((plain < 30).all(-1), black)
        array = record.array.copy()
        array[3, 100:200] = 1.0  # of aVR, against its own baseline
        changed = np.array(draw_ecg(record, 600, 500, beside=replace(record, array=array)))
        rows, columns = np.nonzero((changed != plain).any(-1))
        scale = 500 / page_width(ECGPaper(), 5.0)
        assert columns.min() >= (10 + 25 * 0.99) * scale - 2
        assert columns.max() <= (10 + 25 * 2.0) * scale + 2
        assert rows.max() - rows.min() == pytest.approx(10 * scale, abs=3)  # 1 mV are 10 mm

    def test_shades(self):
        record, paper = self.record(), ECGPaper()
        shades = np.zeros((12, 500))
        shades[0, 250:] = 1.0
        shades[11, :100] = 0.5
        plain, shaded = (
            np.array(draw_ecg(record, 600, 500)).astype(int),
            np.array(draw_ecg(record, 600, 500, shades=shades)),
        )
        darker = (plain - shaded).sum(-1)  # [rows, columns]
        assert (darker >= 0).all()
        scale, height = 500 / page_width(paper, 5.0), 600 / 12
        middle = round((10 + 25 * 2.5) * scale)  # of the second 2.5
        assert (darker[20 : int(height), middle + 1 : middle + 100] > 0).mean() > 0.8
        assert not darker[: int(height), : middle - 1].any()
        assert 0 < darker[545:580, 40:60].mean() < darker[20 : int(height), middle + 1 : middle + 100].mean()

    def test_shades_of_an_svg(self):
        """A box for each stretch that is shaded alike, in the row of its lead; none where nothing is."""
        record, shades = self.record(), np.zeros((12, 500))
        shades[0, 250:] = 1.0
        shades[11, :100], shades[11, 100:200] = 0.5, 0.25
        page = ElementTree.fromstring(ecg_svg(record, shades=shades, shade_color="#123456"))
        boxes = [box.attrib for box in page.iter("{http://www.w3.org/2000/svg}rect") if box.get("fill") == "#123456"]
        found = [tuple(float(box[name]) for name in ("x", "width", "y", "height", "fill-opacity")) for box in boxes]
        # 5 s at 25 mm/s from 10 mm on, and rows of 20 mm
        assert found == [(72.5, 62.5, 5, 20, 1), (10, 25, 225, 20, 0.5), (35, 25, 225, 20, 0.25)]
        with pytest.raises(ValueError, match="shades has the shape"):
            ecg_svg(record, shades=np.zeros((12, 499)))

    def test_other_shapes(self):
        record = self.record()
        with pytest.raises(
            ValueError, match=r"shades has the shape \(12, 499\); expected that of the record, \(12, 500\)"
        ):
            draw_ecg(record, 600, 500, shades=np.zeros((12, 499)))
        with pytest.raises(ValueError, match="beside has the shape"):
            draw_ecg(record, 600, 500, beside=replace(record, array=record.array[:, 1:]))
