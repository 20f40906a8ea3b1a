import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageChops

from elm_ecg.ecg_drawing import ECGPaper, draw_ecg, ecg_svg
from elm_ecg.ecg_utils import STANDARD_LEADS, ECGRecord, read_ecg, select_leads
from elm_ecg.training import cli
from elm_ecg.training.apps.plot import main
from helpers import ROOT

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(name: str, seconds: float, seed: int = 0) -> ECGRecord:
    """Walks of twelve leads at 250 Hz, in microvolts."""
    steps = np.random.default_rng(seed).normal(0, 30, (12, round(250 * seconds)))
    np.savez(name, array=steps.cumsum(axis=1), sampling_rate=250, lead_names=STANDARD_LEADS, unit="uV")
    return read_ecg(name)


@pytest.fixture
def record(folder) -> ECGRecord:
    return save("rec.npz", 4)


def part(record: ECGRecord, first: int, last: int) -> ECGRecord:
    return replace(record, array=record.array[:, first:last])


def same(path: str, expected: Image.Image) -> bool:
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return picture.size == expected.size and ImageChops.difference(picture, expected).getbbox() is None


def test_png_is_the_drawing(record, folder, capsys):
    main(["rec.npz"])
    assert capsys.readouterr().out == f"Picture of rec.npz in {folder / 'rec.png'}\n"
    # 15 mm of margins and 100 mm of signal; twelve rows of 20 mm and 10 mm of margins
    height = round(1600 * 250 / 115)
    assert same("rec.png", draw_ecg(record, height, 1600, caption="rec, 25 mm/s, 10 mm/mV, 250 Hz"))
    with Image.open("rec.png") as picture:
        assert picture.info["dpi"] == pytest.approx([25.4 * 1600 / 115] * 2, abs=0.1)


@pytest.mark.parametrize(
    ("options", "paper", "facts"),
    [
        (["--layout", "3x4"], {"layout": "3x4"}, "25 mm/s, 10 mm/mV"),
        (["--layout", "3x4", "--rhythm_leads"], {"layout": "3x4", "rhythm_leads": ()}, "25 mm/s, 10 mm/mV"),
        (["--layout", "6x2", "--rhythm_leads", "ii", "V1"], {"layout": "6x2", "rhythm_leads": ("II", "V1")}, "25 mm/s, 10 mm/mV"),
        (["--speed", "50"], {"speed": 50}, "50 mm/s, 10 mm/mV"),
        (["--gain", "2.5"], {"gain": 2.5}, "25 mm/s, 2.5 mm/mV"),
        (["--line_width", "1"], {"line_width": 1.0}, "25 mm/s, 10 mm/mV"),
    ],
)  # fmt: skip
def test_options_reach_the_paper(options, paper, facts, record):
    main(["rec.npz", *options, "--width", "500", "--height", "400"])
    caption = f"rec, {facts}, 250 Hz"
    assert same("rec.png", draw_ecg(record, 400, 500, ECGPaper(**paper), caption))
    assert not same("rec.png", draw_ecg(record, 400, 500, caption=caption))


def test_title(record):
    main(["rec.npz", "--title", "Patient 7", "--width", "500", "--height", "400"])
    assert same("rec.png", draw_ecg(record, 400, 500, caption="Patient 7, 25 mm/s, 10 mm/mV, 250 Hz"))


def test_leads(record):
    main(["rec.npz", "--leads", "V2", "avr", "--width", "500"])
    shown = select_leads(record, ["V2", "aVR"])
    assert same("rec.png", draw_ecg(shown, round(500 * 50 / 115), 500, caption="rec, 25 mm/s, 10 mm/mV, 250 Hz"))


def test_derived_leads():
    np.savez(
        "two.npz", array=np.random.default_rng(0).normal(0, 0.2, (2, 500)), sampling_rate=250, lead_names=["I", "II"]
    )
    main(["two.npz", "--leads", "aVF", "-o", "two.svg"])
    titles = [title.text for title in ElementTree.parse("two.svg").iter(f"{SVG}title")]
    assert titles == ["two, 25 mm/s, 10 mm/mV, 250 Hz", "aVF"]


@pytest.mark.parametrize(
    ("seconds", "options", "first", "last"),
    [
        (20, [], 0, 20),  # not yet too long
        (20.1, [], 0, 10),
        (25, ["--start", "4"], 4, 14),
        (25, ["--start", "5"], 5, 25),
        (25, ["--seconds", "24"], 0, 24),
        (4, ["--start", "1.2", "--seconds", "0.8"], 1.2, 2),
        (4, ["--start", "3", "--seconds", "10"], 3, 4),  # what there is
        (4, ["--seconds", "4"], 0, 4),
    ],
)
def test_part_of_a_record(seconds, options, first, last, capsys):
    record = save("rec.npz", seconds)
    main(["rec.npz", *options, "--width", "200", "--height", "500"])
    said, caption = f"{first:g} to {last:g} s of {seconds:g} s", "rec, 25 mm/s, 10 mm/mV, 250 Hz"
    whole = last - first == seconds
    assert (said in capsys.readouterr().out) is not whole
    shown = part(record, round(250 * first), round(250 * last))
    assert same("rec.png", draw_ecg(shown, 500, 200, caption=caption if whole else f"{caption}, {said}"))


def test_svg_is_the_drawing(record, folder, capsys):
    main(["rec.npz", "--layout", "3x4", "--title", "<A> & B", "-o", "out.SVG"])
    assert capsys.readouterr().out == f"Picture of rec.npz in {folder / 'out.SVG'}\n"
    caption = "<A> & B, 25 mm/s, 10 mm/mV, 250 Hz"
    assert Path("out.SVG").read_text(encoding="utf-8") == ecg_svg(record, ECGPaper("3x4"), caption)
    root = ElementTree.parse("out.SVG").getroot()
    assert (root.tag, root.get("width"), root.get("height")) == (f"{SVG}svg", "115mm", "130mm")
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts == [*STANDARD_LEADS, "II", caption]


def test_each_record_has_its_own_picture(record, folder, capsys):
    (folder / "more").mkdir()
    others = [save("more/a.npz", 4, seed=1), save("more/b.npz", 2, seed=2)]
    main(["rec.npz", "more/a.npz", "more/b.npz", "--width", "400"])
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [
        str(folder / f"{name}.png") for name in ("rec", "a", "b")
    ]
    for name, drawn, width_mm in zip(("rec", "a", "b"), [record, *others], (115, 115, 65), strict=True):
        caption = f"{name}, 25 mm/s, 10 mm/mV, 250 Hz"
        assert same(f"{name}.png", draw_ecg(drawn, round(400 * 250 / width_mm), 400, caption=caption))


def test_notices_of_each_file_each_time(folder, capsys):
    names = [["I", "II", "vx"], ["I", "II", "resp"]]
    for file, lead_names in zip(("a", "b"), names, strict=True):
        np.savez(file, array=np.zeros((3, 500)), sampling_rate=250, lead_names=lead_names)
    for _ in range(2):
        main(["a.npz", "b.npz", "--leads", "I", "III", "--width", "300"])
        assert capsys.readouterr().err.splitlines() == [
            "a.npz: Left out, as no standard lead has that name: vx.",
            "a.npz: Derived from I and II: III.",
            "b.npz: Left out, as no standard lead has that name: resp.",
            "b.npz: Derived from I and II: III.",
        ]


def test_what_the_file_does_not_say():
    counts = np.random.default_rng(0).integers(-500, 500, (2, 1000)).astype(np.int16)
    np.save("rec.npy", counts)
    main(["rec.npy", "--sampling_rate", "500", "--unit", "uV", "--lead_names", "v1", "V2", "--width", "300"])
    record = ECGRecord(counts.astype(np.float32) / np.float32(1000), 500.0, ("V1", "V2"))
    assert same("rec.png", draw_ecg(record, round(300 * 50 / 65), 300, caption="rec, 25 mm/s, 10 mm/mV, 500 Hz"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.npz"], "There is no file nowhere.npz."),
        (["rec.npz", "-o", "rec.npz"], "--output is rec.npz; expected a file that ends with .png or .svg."),
        (["rec.npz", "-o", "picture"], "--output is picture; expected a file that ends with .png or .svg."),
        (["rec.npz", "-o", "nowhere/a.png"], "--output is nowhere/a.png; there is no folder nowhere."),
        (["rec.npz", "-o", "link.png"], "link.png is the record rec.npz itself; name another file with --output."),
        (["rec.npz", "-o", "a.svg", "--width", "500"], "--width and --height are of a PNG"),
        (["rec.npz", "-o", "a.svg", "--height", "500"], "--width and --height are of a PNG"),
        (["rec.npz", "raw.npy", "-o", "a.png"], "--output is one file, and there are 2 records"),
        (["rec.npz", "more/rec.npz"], "Several records would be drawn into rec.png; draw them one by one"),
        (["raw.npy"], "raw.npy: The ECG has no sampling rate"),
        (["rec.npz", "--sampling_rate", "500"], "leave sampling_rate out (for a file: --sampling_rate)"),
        (["rec.npz", "--start", "4"], "rec.npz: --start is 4; the record lasts 4 s, and the drawing begins within it."),
        (["rec.npz", "--start", "-1"], "--start is -1; the record lasts 4 s"),
        (["rec.npz", "--start", "nan"], "--start is nan; the record lasts 4 s"),
        (["rec.npz", "--seconds", "0"], "--seconds is 0; expected at least one sample, which takes 0.004 s."),
        (["rec.npz", "--seconds", "nan"], "--seconds is nan; expected at least one sample"),
        (["rec.npz", "--leads", "V9"], "rec.npz: Unknown lead 'V9'"),
        (["raw.npy", "--sampling_rate", "250", "--lead_names", "I", "V1", "--leads", "II"], "The ECG has no lead II"),
        (["rec.npz", "--leads", "I", "--rhythm_leads", "V1"], "rec.npz: The ECG has no rhythm lead V1"),
        (["rec.npz", "--rhythm_leads", "V9"], "Unknown lead 'V9'"),
        (["rec.npz", "--gain", "0"], "gain is 0.0; expected a positive number"),
        (["rec.npz", "--width", "20"], "rec.npz: A picture 43 pixels high and 20 wide is too small for 12 leads"),
    ],
)
def test_input_at_fault(argv, message, record, folder, capsys):
    (folder / "more").mkdir()
    save("more/rec.npz", 4)
    np.save("raw.npy", np.zeros((2, 1000)))
    Path("link.png").symlink_to("rec.npz")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert cli.main(["plot", *argv]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("elm plot: ")
    assert message in captured.err
    assert captured.out == ""
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "argv", [[], ["rec.npz", "--layout", "4x3"], ["rec.npz", "--width", "0"], ["rec.npz", "--height", "a"]]
)
def test_faulty_options(argv, record, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert capsys.readouterr().err.endswith("\nusage: elm plot RECORD [RECORD ...] [options]\n")


def test_ctrl_c_keeps_the_old_picture(record, folder, monkeypatch, capsys):
    def press(*args, **kwargs):
        raise KeyboardInterrupt

    Path("rec.png").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", press)
        assert cli.main(["plot", "rec.npz"]) == 130
    assert Path("rec.png").read_text() == "old"
    assert sorted(path.name for path in folder.iterdir()) == ["rec.npz", "rec.png"]
    assert cli.main(["plot", "rec.npz", "--width", "300"]) == 0
    with Image.open("rec.png") as picture:
        assert picture.width == 300


def test_starts_without_what_it_does_not_need(record, folder):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from training import cli; "
        "assert cli.main(['plot', 'rec.npz', '--width', '300']) == 0; "
        "assert not {'matplotlib', 'transformers', 'datasets'} & set(sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert Path("rec.png").exists()
