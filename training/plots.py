"""Plots for people who would rather look than read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from training.files import atomic_path

# Okabe and Ito 2008: told apart by colour-blind readers too
COLOURS = {
    "ecg": "#0072B2",
    "zeroed": "#E69F00",
    "swapped": "#D55E00",
    "left_out": "#999999",
    "most_frequent": "#555555",
}
LABELS = {
    "ecg": "with its ECG",
    "zeroed": "ECG zeroed",
    "swapped": "ECG swapped",
    "left_out": "ECG left out",
    "most_frequent": "commonest answer",
}
TOKEN_SHADES = ("#cfe3f2", "#f4e6c8")


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")
    plt.close(figure)


def plot_exact_match(results: dict[str, Any], path: Path) -> None:
    """Exact match of each condition, over all with its interval and by question type, of an evaluation."""
    kinds = list(results["questions_by_type"])
    labels = [f"all\n({results['num_questions']})"]
    labels += [f"{kind.replace('_', ' ')}\n({results['questions_by_type'][kind]})" for kind in kinds]
    figure, axes = plt.subplots(figsize=(max(6.0, 1.3 * len(labels) + 1), 3.6))
    width = 0.8 / len(results["conditions"])
    for index, (condition, row) in enumerate(results["conditions"].items()):
        scores = 100 * np.array([row["exact_match"], *(row["by_question_type"][kind] for kind in kinds)])
        places = np.arange(len(labels)) + width * (index - (len(results["conditions"]) - 1) / 2)
        axes.bar(places, scores, width, color=COLOURS[condition], label=LABELS[condition])
        low, high = 100 * np.array(row["interval_95"])
        axes.errorbar(places[0], scores[0], [[scores[0] - low], [high - scores[0]]], color="black", capsize=2)
    axes.set_xticks(np.arange(len(labels)), labels)
    axes.set_ylabel("exact match, %")
    axes.set_ylim(0, 105)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=5, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _save(figure, path)


def plot_training(history: list[dict[str, float]], path: Path) -> None:
    """Training loss, and evaluation loss where there is one, from the trainer's `log_history`."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(row["step"], row[key]) for row in history if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss per answer token")
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


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
    starts = offsets[:, 0] * num_samples + offsets[:, 1]
    # pieces of tokens: one that runs on into the next lead is drawn in both
    edges = np.union1d(starts, num_samples * np.arange(num_leads + 1))
    shades = (np.searchsorted(starts, edges, side="right") - 1) % 2
    lows, highs = np.minimum(array, decoded).min(axis=1), np.maximum(array, decoded).max(axis=1)
    heights = 1.1 * np.maximum(highs - lows, max(1e-3, 0.15 * (highs - lows).max()))  # a flat lead is seen too
    centers = heights / 2 - np.cumsum(heights + 0.1 * heights.mean())

    size = (np.clip(2 * seconds, 9, 60), 0.9 * num_leads + 1.2)
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
