import numpy as np
import pytest
import torch
from PIL import Image

from elm_ecg.ecg_drawing import draw_ecg
from elm_ecg.ecg_utils import as_record
from elm_ecg.training.augmentation import augmented_ecg, augmented_rgb
from elm_ecg.training.data.synthetic import make_record


def test_augment_statistics():
    """Half of the ECGs are unchanged, a quarter has noise, a quarter noise and wander."""
    rng = np.random.default_rng(0)
    ecgs = rng.normal(size=(4000, 2, 100)).astype("float32")
    change = np.stack([augmented_ecg(ecg, rng) for ecg in ecgs]) - ecgs
    unchanged = abs(change).max((1, 2)) == 0
    assert unchanged.mean() == pytest.approx(0.5, abs=0.03)
    lead_difference = change[:, 0] - change[:, 1]  # the wander is the same in all leads, the noise is not
    assert (abs(lead_difference[~unchanged]).max(1) > 1e-5).all()  # none has wander alone
    assert lead_difference[~unchanged].std() == pytest.approx(0.05 * 2**0.5, rel=0.02)
    # the sine of each number of half periods in the mean of the leads: that of noise alone is 0.1 x 0.05 / sqrt(2) of it
    sines = np.sin(np.pi * np.arange(1, 6)[:, None] * np.linspace(0, 1, 100))
    fitted = change.mean(1) @ sines.T / (sines**2).sum(1) / abs(ecgs).max((1, 2))[:, None]  # [ecgs, half periods]
    largest = fitted.max(1)
    wandering = largest > 0.035
    assert wandering.mean() == pytest.approx(0.25, abs=0.03)
    assert largest[wandering] == pytest.approx(0.07, abs=0.015)
    counts = np.bincount(fitted.argmax(1)[wandering], minlength=5) / wandering.sum()
    assert counts == pytest.approx([0.2] * 5, abs=0.05)  # 1 to 5, each as often


def test_augment_leaves_its_input():
    ecg = np.ones((12, 500), dtype="float32")
    for seed in range(8):
        augmented = augmented_ecg(ecg, np.random.default_rng(seed))
        assert augmented.dtype == np.float32
    assert np.array_equal(ecg, np.ones((12, 500)))


@pytest.fixture(scope="module")
def drawing() -> Image.Image:
    return draw_ecg(as_record(make_record(0, 1, sampling_rate=100, seconds=5.0)["ecg"]), 224, 224)


def test_augmented_rgb_statistics(drawing, monkeypatch):
    """How often a drawing undergoes each of the four changes, and how large they are."""
    bounds = {"brightness_factor": (0.8, 1.2), "angle": (-5, 5), "sigma": (0, 1.5), "hue_factor": (-0.08, 0.08)}
    bounds["saturation_factor"] = (0.7, 1.3)
    seen: list[dict[str, float]] = []

    def watch(transform, picture, params):
        values = {name: params[name] for name in bounds if params.get(name) is not None}
        seen[-1].update({name: float(np.ravel(value)[0]) for name, value in values.items()})
        return picture

    for name in ("ColorJitter", "RandomRotation", "GaussianBlur"):
        monkeypatch.setattr(f"torchvision.transforms.v2.{name}.transform", watch)
    for seed in range(1500):
        seen.append({})
        augmented_rgb(drawing, np.random.default_rng(seed))
    assert all(("hue_factor" in changes) == ("saturation_factor" in changes) for changes in seen)
    assert np.mean([not changes for changes in seen]) == pytest.approx(0.4 + 0.6 / 16, abs=0.04)
    assert np.mean([len(changes) == len(bounds) for changes in seen]) == pytest.approx(0.6 / 16, abs=0.015)
    for name, (low, high) in bounds.items():
        amounts = [changes[name] for changes in seen if name in changes]
        assert len(amounts) / len(seen) == pytest.approx(0.6 * 0.5, abs=0.04), name
        margin = 0.05 * (high - low)
        assert low <= min(amounts) < low + margin, name
        assert high - margin < max(amounts) <= high, name


def test_augmented_rgb_changes_some_drawings(drawing):
    before = np.array(drawing)
    changed = [augmented_rgb(drawing, np.random.default_rng(seed)) for seed in range(60)]
    assert np.array_equal(drawing, before)  # its input is left as it is
    assert {(picture.size, picture.mode) for picture in changed} == {(drawing.size, "RGB")}
    differ = [not np.array_equal(picture, before) for picture in changed]
    assert 20 < sum(differ) < 50
    for picture in changed:
        assert np.asarray(picture).max() > 150 > 100 > np.asarray(picture).min()  # still a drawing
        assert np.array_equal(np.ravel(picture)[-3:] > 0, [True] * 3)  # no black corner
    again = [augmented_rgb(drawing, np.random.default_rng(seed)) for seed in range(60)]
    assert all(map(np.array_equal, changed, again))


def test_augmented_rgb_leaves_torch_as_it_is(drawing, monkeypatch):
    def fail(seed):
        raise AssertionError("the generators of GPUs are seeded")

    monkeypatch.setattr("torch.cuda.manual_seed_all", fail)
    state = torch.get_rng_state()
    pictures = [augmented_rgb(drawing, np.random.default_rng(seed)) for seed in range(10)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)  # nor is it asked of torch what is drawn
    again = [augmented_rgb(drawing, np.random.default_rng(seed)) for seed in range(10)]
    assert all(map(np.array_equal, pictures, again))
