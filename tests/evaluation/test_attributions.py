from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from elm_ecg.ecg_drawing import ECGPaper
from elm_ecg.ecg_utils import ECGRecord, as_record
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training.data.synthetic import make_record
from elm_ecg.training.evaluation import attributions
from elm_ecg.training.evaluation.attributions import AskedModel, attribute
from helpers import (
    tiny_ecg_byte,
    tiny_elm_config,
    tiny_image_elm_config,
    tiny_image_processor_elm,
    tiny_llm_config,
    tiny_processor,
    tiny_symbolic_processor,
)

CHAT = [{"role": "user", "content": "What is the rhythm?"}]
LEADS = {"lead_names": ["I", "V1", "V5"]}


def record_of(index: int = 0, leads: tuple[str, ...] = ()) -> ECGRecord:
    record = as_record(make_record(index, 0, sampling_rate=100, seconds=5.0)["ecg"])
    rows = [record.lead_names.index(lead) for lead in leads or record.lead_names]
    return replace(record, array=record.array[rows], lead_names=leads or record.lead_names)


def asked_of(representation: str) -> AskedModel:
    """A random ELM (of tokens, of three leads, as texts are slow), and a record."""
    torch.manual_seed(0)
    if representation == "symbolic":
        processor = tiny_symbolic_processor("default", tiny_ecg_byte(across_leads=False), LEADS)
        llm = tiny_llm_config("default", len(processor.tokenizer), max_position_embeddings=4096, initializer_range=0.1)
        config = tiny_elm_config(None, llm=llm, representation="symbolic", num_leads=3)
    elif representation == "signal":
        processor = tiny_processor("default", sampling_rate=100)
        llm = tiny_llm_config("default", len(processor.tokenizer), initializer_range=0.1)
        config = tiny_elm_config(llm=llm, ecg_token_id=processor.ecg_token_id)
    else:
        processor = tiny_image_processor_elm("resnet", representation)
        config = tiny_image_elm_config("resnet", representation, ecg_token_id=processor.ecg_token_id)
    model = ELMForConditionalGeneration(config).eval()
    if model.model.connector is not None:
        with torch.no_grad():
            for parameter in model.model.connector.parameters():
                parameter.normal_(std=0.3)
    leads = tuple(LEADS["lead_names"]) if representation == "symbolic" else ()
    return AskedModel(model, processor, CHAT, record_of(leads=leads))


@pytest.mark.parametrize("representation", ["signal", "rgb", "stacked_signal"])
def test_attributions_add_up_to_what_the_beats_change(representation):
    """The axiom of completeness: from the record at its level to the record, log P(answer) changes by their sum. What is left of a
    picture beside the leads' time, such as its margin, does not differ between the two."""
    asked = asked_of(representation)
    found = attribute(asked, "yes", "integrated_gradients")
    assert found.shape == asked.record.array.shape
    level, whole = asked.log_likelihoods(np.stack([asked.levelled.array, asked.record.array]), "yes")
    assert abs(whole - level) > 5e-4
    assert found.sum() == pytest.approx(whole - level, rel=0.1)


@pytest.mark.parametrize(("representation", "method"), [("signal", "occlusion"), ("symbolic", "integrated_gradients")])
def test_a_flat_record_has_nothing_to_take_away(representation, method):
    """Rounding of the likelihoods, and of leads in tokens how their runs are cut, would look like places that count."""
    asked = asked_of(representation)
    asked.record = replace(asked.record, array=np.full_like(asked.record.array, 0.1))
    assert not attribute(asked, "yes", method).any()


def test_tokens_share_what_they_add_among_their_samples():
    asked = asked_of("symbolic")
    found = attribute(asked, "yes", "integrated_gradients")
    ecg_byte: Any = asked.processor.ecg_tokenizer
    ids = ecg_byte.encode(asked.record.array)
    offsets = ecg_byte.offsets(ids, asked.record.array.shape[1])
    assert len(offsets) > 20
    for lead, first, last in offsets:
        assert len(np.unique(found[lead, first : last + 1].round(12))) == 1  # all samples of a token alike
    assert len(np.unique(found.round(12))) > len(offsets) / 2


def test_occlusion_is_what_a_window_of_a_lead_takes_away(monkeypatch):
    monkeypatch.setattr(attributions, "WINDOW_SECONDS", 1.0)  # fewer of them
    asked = asked_of("signal")
    found = attribute(asked, "yes", "occlusion")
    array = asked.record.array.copy()
    array[1, 200:300] = asked.levelled.array[1, 200:300]
    without, whole = asked.log_likelihoods(np.stack([array, asked.record.array]), "yes")
    np.testing.assert_allclose(found[1, 200:300].sum(), whole - without, atol=1e-5)
    assert len(np.unique(found[1, 200:300])) == 1


@pytest.mark.parametrize("representation", ["rgb", "stacked_signal"])
def test_pixels_count_to_the_lead_and_moment_that_is_drawn_there(representation):
    """Of two pictures, of a record and of it with one stretch of one lead changed, the pixels that differ."""
    asked = asked_of(representation)
    processor: Any = asked.processor
    back = attributions._from_page if representation == "rgb" else attributions._from_stack
    flat = replace(asked.record, array=np.zeros_like(asked.record.array))
    for lead, first in ((0, 100), (4, 250), (11, 420)):
        array = flat.array.copy()
        array[lead, first : first + 60] = 0.4
        pictures = [
            np.asarray(processor.image_processor(one, 5.0)["pixel_values"][0])
            for one in ([flat], [replace(flat, array=array)])
        ]
        found = back(asked, np.abs(pictures[1] - pictures[0]).sum(axis=0))
        assert found[lead].sum() > 0.7 * found.sum()  # a picture of few pixels blurs the leads
        assert found[lead, first - 12 : first + 72].sum() > 0.9 * found[lead].sum()


@pytest.mark.parametrize("layout", ["12x1", "6x2", "3x4"])
def test_pixels_of_every_layout(layout):
    """Each lead gets what stands on its strip; of a layout with columns that is a part of the time."""
    asked = asked_of("rgb")
    processor: Any = asked.processor
    processor.image_processor.paper = ECGPaper(layout=layout, rhythm_leads=())
    processor.image_processor._size = (480, 400)
    found = attributions._from_page(asked, np.ones((480, 400)))
    columns = {"12x1": 1, "6x2": 2, "3x4": 4}[layout]
    shown = (found > 0).mean(axis=1)
    np.testing.assert_allclose(shown, 1 / columns, atol=0.01)
    assert found.sum() > 0.5 * 480 * 400


def test_a_filter_is_not_applied_twice():
    asked = asked_of("signal")
    processor = tiny_processor("default", sampling_rate=100, bandpass=(0.5, 40))
    raw = record_of()
    filtered = processor.feature_extractor.prepare(raw, normalize=False)
    again = AskedModel(asked.model, processor, CHAT, filtered)
    expected = processor.feature_extractor(raw)["ecg_values"][0]
    conversation, _ = again.read(filtered.array, "yes")
    np.testing.assert_allclose(conversation.ecgs["ecg_values"][0], expected, atol=1e-6)
    assert processor.feature_extractor.bandpass == [0.5, 40]  # the caller's own stays


@pytest.mark.parametrize("normalization", ["zscore", "minmax"])
def test_variants_are_normalised_as_the_record(normalization):
    """By themselves the record at its level would be as large as the record."""
    asked = asked_of("signal")
    processor = tiny_processor("default", sampling_rate=100, normalization=normalization)
    again = AskedModel(asked.model, processor, CHAT, asked.record)
    expected = processor.feature_extractor(asked.record)["ecg_values"][0]
    np.testing.assert_allclose(again.read(asked.record.array, "yes")[0].ecgs["ecg_values"][0], expected, atol=1e-5)
    level = again.read(again.levelled.array, "yes")[0].ecgs["ecg_values"][0].numpy()
    assert np.ptp(level) < 0.3 * np.ptp(expected)
    assert np.abs(level - np.median(expected, axis=1)[:, None]).max() < 0.2 * np.ptp(expected)


def test_what_cannot_be_explained(monkeypatch):
    asked = asked_of("signal")
    text_only = tiny_processor("default", num_ecg_tokens=0)
    with pytest.raises(ValueError, match="text-only"):
        AskedModel(asked.model, text_only, CHAT, asked.record)
    monkeypatch.setattr(attributions, "IntegratedGradients", None)
    with pytest.raises(ImportError, match=r'pip install "elm-ecg\[explain\]"'):
        attribute(asked, "yes", "occlusion")
