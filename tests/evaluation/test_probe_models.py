import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from elm_ecg.training.evaluation import probe_models
from elm_ecg.training.evaluation.probe_models import linear_probe, macro_auroc, train_cnn

SIZES = {"train": 80, "validation": 40, "test": 60}


def make(seed: int = 0, width: int = 5):
    """Features of which the first tells the first label, and none the second."""
    rng = np.random.default_rng(seed)
    features = {split: rng.normal(3, 2, (size, width)).astype(np.float32) for split, size in SIZES.items()}
    labels = {
        split: np.stack([values[:, 0] > 3, rng.random(len(values)) < 0.5], axis=1).astype(np.int8)
        for split, values in features.items()
    }
    return features, labels


def test_as_scikit_learn_has_it():
    features, labels = make()
    drawn = np.arange(0, 80, 2)
    scores, strength = linear_probe(features, labels, drawn)
    scaler = StandardScaler().fit(features["train"][drawn])
    values = {split: scaler.transform(features[split]) for split in SIZES}
    by_strength = {}
    for c in probe_models.STRENGTHS:
        models = [
            LogisticRegression(C=c, max_iter=1000).fit(values["train"][drawn], labels["train"][drawn, k])
            for k in (0, 1)
        ]
        area = np.mean(
            [
                roc_auc_score(labels["validation"][:, k], m.decision_function(values["validation"]))
                for k, m in enumerate(models)
            ]
        )
        by_strength[c] = round(float(area), 9), np.stack([m.decision_function(values["test"]) for m in models], axis=1)
    best = max(by_strength, key=lambda c: (by_strength[c][0], -c))
    assert strength == best
    assert scores == pytest.approx(by_strength[best][1], abs=0.02)
    assert roc_auc_score(labels["test"][:, 0], scores[:, 0]) > 0.95
    assert 0.3 < roc_auc_score(labels["test"][:, 1], scores[:, 1]) < 0.7


def test_unknown_labels_are_not_learnt():
    features, labels = make()
    labels["train"][:40, 0] = -1
    scores, strength = linear_probe(features, labels, np.arange(80))
    scaler = StandardScaler().fit(features["train"])
    model = LogisticRegression(C=strength, max_iter=1000)
    model.fit(scaler.transform(features["train"])[40:], labels["train"][40:, 0])
    assert scores[:, 0] == pytest.approx(model.decision_function(scaler.transform(features["test"])), abs=0.02)


def test_a_label_that_all_have_is_not_learnt():
    features, labels = make()
    labels["train"][:, 1] = 1
    scores, _ = linear_probe(features, labels, np.arange(80))
    assert (scores[:, 1] == 0).all()
    assert scores[:, 0].std() > 0


def test_constant_and_extreme_features():
    features, labels = make()
    for values in features.values():
        values[:, 1] = 7.0
    features["test"][0, 1] = 1e30  # constant in training: as it is, but within bounds
    scores, _ = linear_probe(features, labels, np.arange(80))
    assert np.isfinite(scores).all()


def test_macro_auroc():
    rng = np.random.default_rng(0)
    scores, labels = rng.random((50, 3)), rng.integers(-1, 2, (50, 3))
    known = labels != -1
    expected = np.mean([roc_auc_score(labels[known[:, k], k], scores[known[:, k], k]) for k in range(3)])
    assert macro_auroc(scores, labels) == pytest.approx(expected)
    labels[:, 0] = np.where(labels[:, 0] == 0, 1, labels[:, 0])  # none without it
    expected = np.mean([roc_auc_score(labels[known[:, k], k], scores[known[:, k], k]) for k in (1, 2)])
    assert macro_auroc(scores, labels) == pytest.approx(expected)
    assert macro_auroc(scores[:, :1], labels[:, :1]) == 0.5


def test_the_cnn_learns_from_samples(monkeypatch):
    monkeypatch.setattr(probe_models, "NUM_EPOCHS", 10)
    monkeypatch.setattr(probe_models, "MIN_STEPS", 20)
    rng = np.random.default_rng(0)
    labels = {split: rng.integers(0, 2, (size, 2)).astype(np.int8) for split, size in SIZES.items()}
    samples = {
        split: (rng.normal(0, 1, (len(truth), 2, 64)) * (0.2 + truth[:, :1, None])).astype(np.float16)
        for split, truth in labels.items()
    }
    device = torch.device("cpu")
    state = torch.random.get_rng_state()
    scores = train_cnn(samples, labels, np.arange(80), 0, device)
    assert torch.equal(torch.random.get_rng_state(), state)  # that of the caller
    assert roc_auc_score(labels["test"][:, 0], scores[:, 0]) > 0.95
    assert 0.3 < roc_auc_score(labels["test"][:, 1], scores[:, 1]) < 0.7
    assert (train_cnn(samples, labels, np.arange(80), 0, device) == scores).all()
    assert (train_cnn(samples, labels, np.arange(80), 1, device) != scores).any()
    one = train_cnn(samples, labels, np.array([3]), 0, device)  # a single record, of which batch norm learns nothing
    assert np.isfinite(one).all()
