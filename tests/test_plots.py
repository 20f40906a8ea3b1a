import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from training.plots import COLOURS, plot_ecg, plot_exact_match, plot_training


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.fixture(autouse=True)
def figures_are_closed():
    yield
    assert plt.get_fignums() == []


def test_exact_match(tmp_path):
    row = {"exact_match": 0.5, "interval_95": [0.4, 0.7], "by_question_type": {"rate": 0.25, "axis": 0.75}}
    results = {
        "conditions": dict.fromkeys(COLOURS, row),
        "num_questions": 8,
        "questions_by_type": {"rate": 4, "axis": 4},
    }
    plot_exact_match(results, tmp_path / "plot.png")
    found = {tuple(colour) for colour in pixels(tmp_path / "plot.png").reshape(-1, 3)}
    for colour in COLOURS.values():
        assert tuple(bytes.fromhex(colour[1:])) in found


def test_training(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}, {"train_runtime": 1}]
    plot_training(history, tmp_path / "both.png")
    plot_training(history[:2], tmp_path / "one.png")
    assert (pixels(tmp_path / "both.png").shape[:2]) != (0, 0)
    assert (tmp_path / "both.png").read_bytes() != (tmp_path / "one.png").read_bytes()


def test_ecg_is_on_paper_of_25_mm_a_second(tmp_path):
    array = np.zeros((2, 500))
    plot_ecg(array, 250, ["I", "II"], tmp_path / "short.png")
    plot_ecg(np.zeros((2, 1000)), 250, ["I", "II"], tmp_path / "long.png")
    short, long = pixels(tmp_path / "short.png"), pixels(tmp_path / "long.png")
    assert short.shape[0] == long.shape[0]
    assert long.shape[1] / short.shape[1] == pytest.approx(2, rel=0.1)


def test_ecg_draws_the_signal(tmp_path):
    array = np.zeros((1, 500))
    plot_ecg(array, 250, ["I"], tmp_path / "flat.png")
    array[0, 250] = 1.0
    plot_ecg(array, 250, ["I"], tmp_path / "spike.png")
    flat, spike = (pixels(tmp_path / f"{name}.png").max(-1) < 60 for name in ("flat", "spike"))
    assert spike.any(1).sum() > flat.any(1).sum()  # ink in more rows


def test_a_name_for_each_lead(tmp_path):
    with pytest.raises(ValueError, match="shorter than argument 1"):
        plot_ecg(np.zeros((2, 100)), 100, ["I"], tmp_path / "plot.png")
    plt.close("all")
