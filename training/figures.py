"""The plots of evaluation and training reports, as SVG, and of a record with its ECG-Byte tokens."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws without a display; before pyplot chooses a backend
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from elm_ecg.training.evaluation.conditions import CONDITIONS
from elm_ecg.training.evaluation.scale import SHARE, MetricScale, scales_of, title_of
from elm_ecg.training.files import atomic_path

TOKEN_SHADES = ("#cfe3f2", "#f4e6c8")


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _svg(figure: Any) -> bytes:
    """A figure as SVG, the same bytes each time."""
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "elm"}):  # else the ids within an SVG are random
        figure.savefig(content, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return content.getvalue()


def _bars(row: Mapping[str, Any], scale: MetricScale, key: str = "value") -> tuple[float, list[list[float]]]:
    """A score, and how far its interval reaches below and above it, as they are shown."""
    if row.get(key) is None:
        return float("nan"), [[0.0], [0.0]]
    value = scale.factor * row[key]
    low, high = (value, value) if row["interval_95"] is None else (scale.factor * end for end in row["interval_95"])
    return value, [[max(0.0, value - low)], [max(0.0, high - value)]]  # errorbar refuses lengths below 0


def scores_plot(results: Mapping[str, Any]) -> bytes:
    """SVG of the main metric under each condition with its interval, over all questions and by their type: a row for each type."""
    metric = results["main_metric"]
    scale = scales_of(results)[metric]
    conditions = {name: row for name, row in results["conditions"].items() if metric in row["metrics"]}
    # a score of a benchmark may be of some types alone
    types = {
        kind: number
        for kind, number in results["questions_by_type"].items()
        if any(metric in row["by_question_type"].get(kind, {}) for row in conditions.values())
    }
    kinds = [("all", results["num_questions"]), *types.items()]
    figure, axes = plt.subplots(figsize=(8, 1 + (0.2 * len(conditions) + 0.25) * len(kinds)))
    step = 0.8 / len(conditions)
    for index, (name, row) in enumerate(conditions.items()):
        for place, (kind, _) in enumerate(kinds):
            scores = row["metrics"] if place == 0 else row["by_question_type"].get(kind, {})
            value, reach = _bars(scores.get(metric, {}), scale)
            y = place + step * (index - (len(conditions) - 1) / 2)
            label = CONDITIONS[name].label if place == 0 else None
            axes.barh(y, value, step, color=CONDITIONS[name].colour, label=label)
            axes.errorbar(value, y, xerr=reach, color="black", capsize=1.5, linewidth=0.8)
    labels = [f"{title_of(kind)} ({number})" for kind, number in kinds]
    axes.set_yticks(range(len(kinds)), labels)
    axes.set_ylim(len(kinds) - 0.5, -0.5)  # the first at the top
    if scale.low is not None and scale.high is not None:  # bars begin at 0, and an interval at the end is seen whole
        axes.set_xlim(scale.factor * min(0, scale.low), scale.factor * 1.05 * scale.high)
    axes.set_xlabel(f"{scale.title}, %" if scale.unit == SHARE else scale.heading)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=3, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _svg(figure)


def differences_plot(results: Mapping[str, Any]) -> bytes:
    """SVG of how the answers with the ECG differ from those of each other condition, by the main metric, with its interval."""
    metric = results["main_metric"]
    scale = scales_of(results)[metric]
    gains = {name: row[metric] for name, row in results["ecg_minus"].items() if metric in row}
    figure, axes = plt.subplots(figsize=(8, 1 + 0.4 * max(1, len(gains))))
    for place, (name, row) in enumerate(gains.items()):
        value, reach = _bars(row, scale, "difference")
        axes.errorbar(value, place, xerr=reach, fmt="o", color=CONDITIONS[name].colour, capsize=3)
    axes.axvline(0, color="#777777", linewidth=0.8)
    axes.set_yticks(range(len(gains)), [f"over: {CONDITIONS[name].label}" for name in gains])
    axes.set_ylim(len(gains) - 0.5, -0.5)
    unit = "points gained" if scale.unit == SHARE else f"{scale.heading}: difference"
    axes.set_xlabel(f"{unit} with its ECG")
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def shares_plot(results: Mapping[str, Any]) -> bytes:
    """SVG of the macro AUROC of a probe against the share of the training patients, with its interval: a line for each model, and a
    level for what needs no training."""
    shares = results["settings"]["shares"]
    names = [f"{100 * share:g}%" for share in shares]
    models = {
        "encoder": ("the encoder", "#0072B2"),
        "random": ("random weights", "#999999"),
        "cnn": ("plain CNN", "#D55E00"),
    }
    figure, axes = plt.subplots(figsize=(7, 4))
    scale = MetricScale(title="AUROC")
    for index, (model, (label, colour)) in enumerate(models.items()):
        rows = [results["models"][model][f"auroc_{name}"]["macro"] for name in names]
        points = [_bars(row, scale) for row in rows]
        reach = np.array([row for _, row in points])[:, :, 0].T
        places = [share * 1.04 ** (index - 1) for share in shares]  # intervals stand beside each other
        values = [value for value, _ in points]
        axes.errorbar(places, values, yerr=reach, marker="o", markersize=4, capsize=3, color=colour, label=label)
    zero_shot = results["models"]["encoder"].get("auroc_zero_shot")
    if zero_shot is not None:
        value, ((below,), (above,)) = _bars(zero_shot["macro"], scale)
        axes.axhline(value, color="#009E73", linestyle="--", label="the encoder, by text prompts")
        axes.axhspan(value - below, value + above, color="#009E73", alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(shares, names)
    axes.minorticks_off()
    axes.set_xlabel("share of the training patients")
    axes.set_ylabel("macro AUROC, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _svg(figure)


def confusion_plot(closed: dict[str, Any]) -> bytes:
    """SVG of a confusion matrix with its counts, rows shaded by their share."""
    labels, counts = closed["labels"], np.array(closed["confusion_matrix"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # no 0 / 0 for a label without question
    rows, columns = counts.shape
    figure, axes = plt.subplots(figsize=(1.5 + 0.7 * columns, 1.2 + 0.45 * rows))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(rows, columns):
        shade = "white" if shares[row, column] > 0.6 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=shade)
    axes.set_xticks(range(columns), [*labels, "other"], rotation=35, ha="right")  # answers that are no label
    axes.set_yticks(range(rows), labels)
    axes.set_xlabel("answer given")
    axes.set_ylabel("right answer")
    return _svg(figure)


LOSSES = {
    "loss": "training",
    "masked_loss": "its masked part",
    "contrastive_loss": "its contrastive part",
    "eval_loss": "validation",
}


REWARDS = {
    "reward": "training",
    "eval_ecg_reward": "validation, with the ECG",
    "eval_zeros_reward": "validation, zeros in its place",
}


def training_plot(history: list[dict[str, float]], label: str = "loss per answer token") -> bytes:
    """SVG of the training loss, its parts and the validation loss where there are any, from the trainer's `log_history`."""
    figure, axes, losses = _curves(history, LOSSES, label)
    if losses and 0 < 10 * min(losses) < max(losses):  # within a decade a logarithmic scale has unreadable labels
        axes.set_yscale("log")
    return _svg(figure)


def rewards_plot(history: list[dict[str, float]]) -> bytes:
    """SVG of the rewards of reinforcement learning, in training and in evaluation with the ECG and without it, from the trainer's
    `log_history`."""
    return _svg(_curves(history, REWARDS, "reward of an answer")[0])


def _curves(history: list[dict[str, float]], curves: dict[str, str], label: str) -> tuple[Any, Any, list[float]]:
    """A figure of the keys of `curves` that the history has, by step, its axes, and all values on it."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    values = []
    for key, name in curves.items():
        points = [(row["step"], row[key]) for row in history if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) == 1 else None)
            values += [value for _, value in points]
    axes.set_xlabel("optimiser step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    return figure, axes, values


def plot_tokens(
    array: np.ndarray,
    decoded: np.ndarray,
    offsets: np.ndarray,
    sampling_rate: float,
    lead_names: Sequence[str],
    path: Path,
    title: str = "",
) -> None:
    """A record and its ECG-Byte tokens: one row for each lead, all at one scale; the tokens as alternating shades behind
    the signal, and over it the step curve that they decode to.

    Args:
        array, decoded: [leads, samples] in millivolts.
        offsets: int [tokens, 3], as `ECGByteTokenizer.offsets` gives them.
    """
    num_leads, num_samples = array.shape
    seconds = num_samples / sampling_rate
    starts = offsets[:, 0] * num_samples + offsets[:, 1]  # in samples of all leads, one after the other
    # pieces of tokens: one that runs on into the next lead is drawn in both
    edges = np.union1d(starts, num_samples * np.arange(num_leads + 1))
    shades = (np.searchsorted(starts, edges, side="right") - 1) % 2  # by the number of the token a piece belongs to
    lows, highs = np.minimum(array, decoded).min(axis=1), np.maximum(array, decoded).max(axis=1)
    heights = 1.1 * np.maximum(highs - lows, max(1e-3, 0.15 * (highs - lows).max()))  # a flat lead is seen too
    centers = heights / 2 - np.cumsum(heights + 0.1 * heights.mean())  # in millivolts, from 0 at the top down

    size = (np.clip(2 * seconds, 9, 60), 0.9 * num_leads + 1.2)  # inches
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    # a sample stands in the middle of its interval, so that the borders of tokens lie between samples
    times = (np.arange(num_samples) + 0.5) / sampling_rate
    for lead, (center, height) in enumerate(zip(centers, heights, strict=True)):
        inside = edges // num_samples == lead
        begins, widths = edges[inside] % num_samples, np.diff(edges)[inside[:-1]]
        for shade, colour in enumerate(TOKEN_SHADES):
            spans = np.stack([begins, widths], axis=1)[shades[inside] == shade] / sampling_rate
            row = (center - height / 2, height)
            axes.broken_barh(spans, row, facecolor=colour, edgecolor="#8a8a8a", linewidth=0.25)
        baseline = center - (lows[lead] + highs[lead]) / 2
        axes.plot(times, array[lead] + baseline, color="black", linewidth=0.7)
        axes.step(times, decoded[lead] + baseline, where="mid", color="#D55E00", linewidth=0.8)
    bottom, bar = centers[-1] - heights[-1] / 2, 10.0 ** np.floor(np.log10(heights.max()))
    axes.plot([1.008 * seconds] * 2, [bottom, bottom + bar], color="black", linewidth=2, clip_on=False)
    axes.text(1.012 * seconds, bottom + bar / 2, f"{bar:g} mV", va="center")
    axes.set_xlim(0, seconds)
    axes.set_ylim(bottom, centers[0] + heights[0] / 2)
    axes.set_yticks(centers, lead_names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("seconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10)
    labels = ["signal", "decoded", "token", "next token"]
    figure.legend([*axes.lines[:2], *axes.collections[:2]], labels, ncols=4, frameon=False, loc="outside lower right")
    _save(figure, path)
