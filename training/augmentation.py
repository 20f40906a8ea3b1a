"""Random changes of ECGs in training: noise, shifts, lost leads, and of their drawings."""

import math
from dataclasses import fields, replace
from itertools import compress
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from elm_ecg.ecg_utils import ECGRecord
from elm_ecg.training.arguments import AugmentationArguments
from elm_ecg.training.evaluation.conditions import noise, zeros

# options that change ECGs in training alone, and their values outside of it
NO_AUGMENTATION: dict[str, Any] = {option.name: option.default for option in fields(AugmentationArguments)}


def augmented(record: ECGRecord, options: Any, rng: np.random.Generator, as_missing: bool = False) -> ECGRecord:
    """A record changed as the `AugmentationArguments` among the attributes of `options` say, but for `augment_rgb`.

    Args:
        as_missing: as of `with_lost_leads`.
    """
    array = record.array
    # before the shift: noise and wander are relative to the whole recording
    array = augmented_ecg(array, rng) if options.augment_ecg else array
    array = time_shifted(array, record.sampling_rate, options.time_shift, rng) if options.time_shift else array
    if options.gain_jitter:
        array = array * np.float32(rng.uniform(1 - options.gain_jitter, 1 + options.gain_jitter))
    record = replace(record, array=array)
    return with_lost_leads(record, options.lead_dropout, rng, as_missing) if options.lead_dropout else record


def perturbed(array: np.ndarray, perturb: str | None, rng: np.random.Generator) -> np.ndarray:
    """Gaussian `noise` of 1 mV or `zeros` in place of an ECG [leads, samples]; None keeps it."""
    change = {"noise": noise, "zeros": zeros}.get(perturb or "")
    return array if change is None else change(array, rng)


def augmented_ecg(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An ECG with, at probability 0.5, Gaussian noise of 0.05 standard deviations, and half of these also with a sinusoidal baseline
    wander of 0.07 times the largest amplitude with 1 to 5 half periods, as in the reference.

    Args:
        array: float32 [leads, samples]; it is left as it is.
    """
    if rng.random() < 0.5:
        return array
    changed = array + np.float32(0.05 * array.std()) * rng.standard_normal(array.shape, dtype=np.float32)
    if rng.random() < 0.5:
        half_periods = rng.integers(1, 6)  # over the whole recording
        wander = np.sin(math.pi * half_periods * np.linspace(0, 1, array.shape[1]))
        changed += (0.07 * np.abs(array).max() * wander).astype(np.float32)
    return changed


def time_shifted(array: np.ndarray, sampling_rate: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """An ECG [leads, samples] that begins up to `seconds` later, evenly distributed: its first samples are cut, half of them at
    most."""
    return array[:, min(round(rng.uniform(0, seconds) * sampling_rate), array.shape[1] // 2) :]


def with_lost_leads(
    record: ECGRecord, probability: float, rng: np.random.Generator, as_missing: bool = False
) -> ECGRecord:
    """The record with each of its leads lost at this probability, but never all.

    Args:
        as_missing: leave lost leads out, for a model that knows missing leads; limb leads come back where they can be derived.
            Else they are zeros.
    """
    kept = rng.random(len(record.array)) >= probability  # [leads]
    if not kept.any():
        kept[rng.integers(len(kept))] = True
    if as_missing:
        return replace(record, array=record.array[kept], lead_names=tuple(compress(record.lead_names, kept)))
    return replace(record, array=record.array * kept[:, None])


def augmented_rgb(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A drawn ECG changed with probability 0.6, as in the reference: then, at probability 0.5 each, in brightness (up to 20%),
    angle (up to 5 degrees), sharpness (Gaussian blur of up to 1.5 pixels), hue (up to 8%) and saturation (up to 30%).

    Args:
        picture: it is left as it is. What a rotation leaves empty takes the colour of its first pixel.
    """
    if rng.random() >= 0.6:
        return picture
    background = picture.getpixel((0, 0))
    changes = (
        v2.ColorJitter(brightness=0.2),
        v2.RandomRotation(5, interpolation=v2.InterpolationMode.BILINEAR, fill=background),
        v2.GaussianBlur(5, sigma=(1e-3, 1.5)),  # torchvision refuses 0
        v2.ColorJitter(hue=0.08, saturation=0.3),
    )
    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's generator
        torch.default_generator.manual_seed(int(rng.integers(2**63)))  # torch.manual_seed would seed those of GPUs too
        for change in changes:
            picture = v2.RandomApply([change])(picture)  # at probability 0.5, its default
    return picture
