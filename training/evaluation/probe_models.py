"""What a probe trains: logistic regression on frozen features, and beside it a plain CNN from samples to labels."""

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import nn

from elm_ecg.training.evaluation.probe_results import UNKNOWN

# inverse strengths of regularisation, the strongest first
STRENGTHS = [10.0**power for power in range(-5, 2)]
MAX_ITERATIONS = 300
# of the CNN
BATCH_SIZE = 32
NUM_EPOCHS, MIN_STEPS, MAX_STEPS = 20, 100, 20_000
NUM_CHECKS = 10  # how often it is scored on validation; the best of these counts


def macro_auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean AUROC over the labels that some known records have and some have not; 0.5 where there is none.

    Args:
        scores, labels: [records, labels]; labels are 1, 0 or `UNKNOWN`.
    """
    areas = []
    for score, label in zip(scores.T, labels.T, strict=True):
        known = label != UNKNOWN
        if len(np.unique(label[known])) == 2:
            areas.append(roc_auc_score(label[known], score[known]))
    return float(np.mean(areas)) if areas else 0.5


def linear_probe(
    features: dict[str, np.ndarray], labels: dict[str, np.ndarray], drawn: np.ndarray
) -> tuple[np.ndarray, float]:
    """Logistic regression of each label on standardised features, with one strength of regularisation for all labels: that of the
    largest macro AUROC on validation, of equal ones the strongest.

    A label that all or none of the drawn records have cannot be learnt: its scores are all 0, an AUROC of 0.5.

    Args:
        features: split -> [records, width].
        labels: split -> [records, labels], 1, 0 or `UNKNOWN`.
        drawn: indices of the training records that it learns from; their mean and deviation standardise all.

    Returns:
        Log-odds [test records, labels], and the inverse strength that was chosen (`C` of scikit-learn).
    """
    train = np.asarray(features["train"][drawn])
    mean, std = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    scale = np.where(std > 1e-12 * np.abs(mean), std, 1).astype(np.float32)  # a constant feature becomes zeros

    def standardised(values: np.ndarray) -> np.ndarray:
        return np.clip((values - mean.astype(np.float32)) / scale, -1e3, 1e3)

    train = standardised(train)
    others = {split: standardised(np.asarray(features[split])) for split in ("validation", "test")}
    shape = (len(STRENGTHS), labels["train"].shape[1])
    scores = {split: np.zeros((*shape, len(values)), dtype=np.float32) for split, values in others.items()}
    for column, of_label in enumerate(labels["train"][drawn].T):
        known = of_label != UNKNOWN
        if len(np.unique(of_label[known])) < 2:
            continue
        model = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)
        rows = train if known.all() else train[known]
        for number, strength in enumerate(STRENGTHS):
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", ConvergenceWarning
                )  # weak regularisation, which validation does not choose
                model.set_params(C=strength).fit(rows, of_label[known])
            for split, values in others.items():
                scores[split][number, column] = model.decision_function(values)
    areas = [macro_auroc(of_strength.T, labels["validation"]) for of_strength in scores["validation"]]
    best = int(np.argmax(np.round(areas, 9)))
    return scores["test"][best].T, STRENGTHS[best]


def plain_cnn(num_leads: int, num_labels: int) -> nn.Sequential:
    """Four convolutions over time, their mean over time, and a linear layer: [records, leads, samples] to [records, labels]."""
    layers: list[nn.Module] = []
    for channels, width in pairwise((num_leads, 32, 64, 128, 128)):
        layers += [nn.Conv1d(channels, width, 7, stride=2, padding=3), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, num_labels))


def train_cnn(
    samples: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    drawn: np.ndarray,
    seed: int,
    device: torch.device,
    bar: Any = None,
) -> np.ndarray:
    """Log-odds [test records, labels] of a `plain_cnn`, as it was when its macro AUROC on validation was largest.

    It takes `NUM_EPOCHS` rounds of the drawn records, in batches of `BATCH_SIZE`, but at least `MIN_STEPS` and at most `MAX_STEPS`.

    Args:
        samples, labels, drawn: as of `linear_probe`, with [records, leads, samples] in place of features.
        bar: a progress bar of its steps, which are `cnn_steps`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = plain_cnn(samples["train"].shape[1], labels["train"].shape[1]).to(device)
        num_steps = cnn_steps(len(drawn))
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=num_steps)
        checks = set(np.linspace(0, num_steps, NUM_CHECKS + 1)[1:].round().astype(int).tolist())
        best, scores = -1.0, np.zeros((0, 0))
        order = torch.empty(0, dtype=torch.long)
        for step in range(1, num_steps + 1):
            if not len(order):
                order = torch.randperm(len(drawn))
            rows, order = drawn[order[:BATCH_SIZE].numpy()], order[BATCH_SIZE:]
            model.train(len(rows) > 1)  # batch norm learns nothing of a single record
            truth = torch.from_numpy(labels["train"][rows]).to(device)
            losses = nn.functional.binary_cross_entropy_with_logits(
                model(_batch(samples["train"], rows, device)), truth.clamp(min=0).float(), reduction="none"
            )
            known = truth != UNKNOWN
            loss = (losses * known).sum() / known.sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if bar is not None:
                bar.update()
            if step in checks:
                area = macro_auroc(_predict(model, samples["validation"], device), labels["validation"])
                if area > best:
                    best, scores = area, _predict(model, samples["test"], device)
    return scores


def cnn_steps(num_records: int) -> int:
    """How many steps `train_cnn` takes of so many records."""
    return int(np.clip(NUM_EPOCHS * -(-num_records // BATCH_SIZE), MIN_STEPS, MAX_STEPS))


def _batch(samples: np.ndarray, rows: Any, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.asarray(samples[rows], dtype=np.float32)).to(device)


@torch.no_grad()
def _predict(model: nn.Module, samples: np.ndarray, device: torch.device) -> np.ndarray:
    model.eval()
    parts = [
        model(_batch(samples, slice(start, start + 256), device)).cpu().numpy() for start in range(0, len(samples), 256)
    ]
    return np.concatenate(parts)
