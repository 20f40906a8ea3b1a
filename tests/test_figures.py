import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from elm_ecg.training.evaluation.conditions import CONDITIONS
from elm_ecg.training.evaluation.scale import MetricScale
from elm_ecg.training.figures import (
    TOKEN_SHADES,
    confusion_plot,
    differences_plot,
    plot_tokens,
    scores_plot,
    training_plot,
)


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.fixture(autouse=True)
def figures_are_closed():
    yield
    assert plt.get_fignums() == []


def results_of(**changes) -> dict:
    """Every condition, two types of questions; of `swapped` one type has no score."""
    score, unknown = {"value": 0.5, "interval_95": [0.4, 0.7]}, {"value": None, "interval_95": None}
    row = {
        "metrics": {"exact_match": score},
        "by_question_type": {kind: {"exact_match": score} for kind in ("rate", "axis")},
    }
    conditions = dict.fromkeys(CONDITIONS, row)
    conditions["swapped"] = row | {"by_question_type": {"rate": {"exact_match": unknown}}}
    lost = {"difference": 0.25, "interval_95": [-0.1, 0.5], "p_value": 0.1}
    return {
        "conditions": conditions,
        "ecg_minus": {name: {"exact_match": lost} for name in conditions if name != "ecg"},
        "metrics": {"exact_match": MetricScale(title="exact match").to_dict()},
        "main_metric": "exact_match",
        "num_questions": 8,
        "questions_by_type": {"rate": 4, "axis": 4},
    } | changes


def test_scores():
    """Every condition has its colour, every type its row; the same results give the same bytes."""
    picture = scores_plot(results_of())
    assert picture == scores_plot(results_of())
    text = picture.decode()
    for condition in CONDITIONS.values():
        assert condition.colour.lower() in text
        assert f"<!-- {condition.label} -->" in text
    for label in ("rate (4)", "axis (4)", "all (8)"):
        assert f"<!-- {label} -->" in text


def test_types_without_the_score_are_not_plotted():
    """As of ECG-Reasoning-Benchmark, whose first score is of one type alone."""
    results = results_of()
    of_one = results["conditions"]["ecg"] | {
        "by_question_type": {"rate": {"exact_match": {"value": 1, "interval_95": None}}}
    }
    text = scores_plot(results | {"conditions": {"ecg": of_one}}).decode()
    assert "<!-- rate (4) -->" in text
    assert "<!-- axis (4) -->" not in text


def test_differences():
    text = differences_plot(results_of()).decode()
    for name in set(CONDITIONS) - {"ecg"}:
        assert f"<!-- over: {CONDITIONS[name].label} -->" in text
    results = results_of(ecg_minus={"zeroed": {"exact_match": {"difference": None, "interval_95": None}}})
    assert b"<svg" in differences_plot(results)


def test_a_metric_in_units_is_plotted_in_these():
    """Not times 100, and not on an axis that ends at 100 percent."""
    scale = MetricScale(title="error of the rate", unit="bpm", high=None, higher_is_better=False)
    results = results_of(metrics={"exact_match": scale.to_dict()})
    text = scores_plot(results).decode()
    assert "<!-- error of the rate (bpm, lower is better) -->" in text
    assert "<!-- 0.6 -->" in text  # ticks up to the interval of 0.7
    assert "<!-- 60 -->" not in text
    assert (
        "<!-- error of the rate (bpm, lower is better): difference with its ECG -->"
        in differences_plot(results).decode()
    )
    assert "<!-- 60 -->" in scores_plot(results_of()).decode()


def test_confusion():
    closed = {"labels": ["no", "yes"], "confusion_matrix": [[41, 7, 0], [9, 52, 3]]}
    text = confusion_plot(closed).decode()
    for label in ("no", "yes", "other", "41", "7", "0", "9", "52", "3"):
        assert f"<!-- {label} -->" in text


def test_training():
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}, {"train_runtime": 1}]
    both, one = training_plot(history), training_plot(history[:2])
    assert b"<!-- validation -->" in both
    assert b"<!-- validation -->" not in one
    parts = training_plot([{"step": step, "loss": 9.2, "masked_loss": 1.0} for step in (1, 2)]).decode()
    assert "<!-- its masked part -->" in parts
    assert "10^" not in parts  # a decade has plain numbers


# tokens of 3, 4 and 1 samples of two leads: the second runs from the first lead into the second
OFFSETS = np.array([[0, 0, 2], [0, 3, 6], [1, 3, 3]])


def tokens_axes(monkeypatch, array=None, shift=0.1, **kwargs):
    """The axes that `plot_tokens` draws into, with a decoded signal that is `shift` mV too high."""
    array = np.array([[0, 0, 0, 1.0], [2, 2, 0, 0]]) if array is None else array
    figures = []
    monkeypatch.setattr("elm_ecg.training.figures._save", lambda figure, path: figures.append(figure))
    plot_tokens(array, array + shift, OFFSETS, 2, ["I", "V1"], "plot.png", **kwargs)
    plt.close(figures[0])
    return figures[0].axes[0]


def test_tokens_have_alternating_shades_and_run_across_leads(monkeypatch):
    axes = tokens_axes(monkeypatch)
    one, other = TOKEN_SHADES
    spans = [
        (to_hex(bars.get_facecolor()[0]), path.vertices[:, 0].min(), path.vertices[:, 0].max())
        for bars in axes.collections
        for path in bars.get_paths()
    ]
    assert spans == [(one, 0, 1.5), (other, 1.5, 2), (one, 1.5, 2), (other, 0, 1.5)]


def test_tokens_lie_behind_signal_and_step_curve(monkeypatch):
    axes = tokens_axes(monkeypatch, title="three tokens")
    signal, decoded = axes.lines[:2]
    assert signal.get_xdata().tolist() == [0.25, 0.75, 1.25, 1.75]  # the middles of the samples
    assert np.allclose(decoded.get_ydata() - signal.get_ydata(), 0.1)
    assert np.allclose(signal.get_ydata() - signal.get_ydata()[0], [0, 0, 0, 1])
    assert decoded.get_drawstyle() == "steps-mid"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["I", "V1"]
    assert axes.get_title(loc="left") == "three tokens"
    assert [text.get_text() for text in axes.texts] == ["1 mV"]


def test_rows_of_tokens_do_not_overlap(monkeypatch):
    flat_and_high = np.array([[0.5] * 4, [-30, 30, 0, 0]])
    axes = tokens_axes(monkeypatch, flat_and_high)
    heights = [bars.get_paths()[0].vertices[:, 1] for bars in axes.collections]
    assert heights[0].min() > heights[2].max()
    for lead in (0, 1):
        inside = [*axes.lines[2 * lead].get_ydata(), *axes.lines[2 * lead + 1].get_ydata()]
        assert heights[2 * lead].min() < min(inside)
        assert max(inside) < heights[2 * lead].max()
    assert np.ptp(heights[0]) > 0.1 * np.ptp(heights[2])  # the flat lead is seen too


@pytest.mark.parametrize(("millivolts", "bar"), [(60, "10 mV"), (1.5, "1 mV"), (0.9, "0.1 mV"), (0.002, "0.001 mV")])
def test_scale_bar_fits_the_record(millivolts, bar, monkeypatch):
    axes = tokens_axes(monkeypatch, np.array([[0, 0, 0, millivolts], [0, 0, 0, 0]]) - 0.05, shift=0)
    (text,) = axes.texts
    assert text.get_text() == bar
    low, high = axes.lines[-1].get_ydata()
    assert high - low == pytest.approx(float(bar.split()[0]))
    assert axes.get_ylim()[0] <= low
    assert high <= axes.get_ylim()[1]


@pytest.mark.filterwarnings("error")  # Matplotlib's, of what does not fit into the figure
@pytest.mark.parametrize("array", [np.zeros((2, 4)), np.full((2, 4), 1e-5)])
def test_tokens_of_a_flat_record(array, tmp_path):
    plot_tokens(array, array, OFFSETS, 2, ["I", "V1"], tmp_path / "plot.png")
    found = pixels(tmp_path / "plot.png")
    assert all((found == list(bytes.fromhex(shade[1:]))).all(axis=-1).any() for shade in TOKEN_SHADES)


def test_tokens_as_svg(tmp_path):
    plot_tokens(np.zeros((2, 4)), np.zeros((2, 4)), OFFSETS, 2, ["I", "V1"], tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert text.rstrip().endswith("</svg>")
    assert all(shade in text for shade in TOKEN_SHADES)
