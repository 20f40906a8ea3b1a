import json

import numpy as np
import pytest
from transformers import CLIPImageProcessor, Siglip2ImageProcessor, ViTImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from elm_ecg.ecg_drawing import LAYOUTS, ECGPaper, draw_ecg, page_height, page_width
from elm_ecg.ecg_utils import STANDARD_LEADS, ECGRecord, as_record
from elm_ecg.image_processing_elm import ECGImageProcessor
from elm_ecg.modeling_vision_encoders import image_size
from elm_ecg.training.data.synthetic import make_record
from helpers import ROOT, TINY_VISION, every_pair, tiny_image_processor, tiny_vision_config

CLIP = {"image_processor_type": "CLIPImageProcessor"}
SIGLIP2 = {"image_processor_type": "Siglip2ImageProcessor"}
OF_ONE_SIZE = sorted(TINY_VISION.keys() - {"siglip2_vision_model"})


def ecg(index: int = 0, seconds: float = 5.0) -> ECGRecord:
    """A simulated record of twelve leads at 100 Hz."""
    return as_record(make_record(index, 1, sampling_rate=100, seconds=seconds)["ecg"])


def stacked(array: np.ndarray) -> ECGRecord:
    return ECGRecord(np.asarray(array, dtype=np.float32), 100.0, STANDARD_LEADS)


def pictures_of(processor: ECGImageProcessor, inputs) -> list[np.ndarray]:
    """What the backbone sees, as numbers of 0 to 255 [height, width, 3]: normalization and patches undone."""
    own = processor.image_processor
    mean, std = np.array(own.image_mean), np.array(own.image_std)
    if "spatial_shapes" not in inputs:
        return [255 * (values.transpose(1, 2, 0) * std + mean) for values in np.asarray(inputs["pixel_values"])]
    pictures = []
    for values, mask, (rows, columns) in zip(*map(np.asarray, inputs.values()), strict=True):
        assert mask.tolist() == [1] * (rows * columns) + [0] * (len(mask) - rows * columns)
        patches = values[mask.astype(bool)].reshape(rows, columns, own.patch_size, own.patch_size, 3)
        picture = patches.swapaxes(1, 2).reshape(rows * own.patch_size, columns * own.patch_size, 3)
        pictures.append(255 * (picture * std + mean))
    return pictures


class TestDrawn:
    @pytest.mark.parametrize("model_type", TINY_VISION)
    def test_the_backbone_sees_the_drawing_unscaled(self, model_type):
        processor = tiny_image_processor(model_type)
        records = [ecg(0), ecg(1)]
        inputs = processor(records)
        assert list(inputs) == processor.model_input_names
        for record, picture in zip(records, pictures_of(processor, inputs), strict=True):
            drawn = processor.draw(record)
            np.testing.assert_allclose(picture, np.asarray(drawn), atol=1e-3)
            assert np.array_equal(drawn, draw_ecg(record, *drawn.size[::-1]))
            assert np.asarray(drawn).min() < 50 < 200 < np.asarray(drawn).max()

    @pytest.mark.parametrize("model_type", ["clip_vision_model", "vit", "dinov2"])
    def test_is_as_large_as_the_backbone_reads(self, model_type):
        height, width = image_size(tiny_vision_config(model_type))
        assert tiny_image_processor(model_type).draw(ecg()).size == (width, height)

    @pytest.mark.parametrize(
        ("layout", "max_num_patches", "seconds"), every_pair(list(LAYOUTS), [256, 512], [5.0, 10.0])
    )
    def test_siglip2_leaves_the_drawing_as_it_is(self, layout, max_num_patches, seconds):
        paper = ECGPaper(layout)
        processor = ECGImageProcessor(SIGLIP2 | {"max_num_patches": max_num_patches}, paper=paper)
        record = ecg(seconds=seconds)
        drawn, inputs = processor.draw(record), processor([record])
        width, height = drawn.size
        assert get_image_size_for_max_num_patches(height, width, 16, max_num_patches) == (height, width)
        assert inputs["spatial_shapes"].tolist() == [[height / 16, width / 16]]
        assert 0.85 * max_num_patches < inputs["pixel_attention_mask"].sum() <= max_num_patches
        # rows of patches are whole, so the page is nearly of its natural proportions
        assert width / height == pytest.approx(page_width(paper, seconds) / page_height(paper, STANDARD_LEADS), rel=0.2)
        np.testing.assert_allclose(pictures_of(processor, inputs)[0], np.asarray(drawn), atol=1e-3)

    def test_paper(self):
        paper = {"layout": "3x4", "rhythm_leads": ["V1"], "gain": 5, "trace_color": "#0000ff"}
        drawn = ECGImageProcessor(CLIP, paper=paper).draw(ecg())
        assert np.array_equal(drawn, draw_ecg(ecg(), 224, 224, ECGPaper("3x4", ("V1",), gain=5, trace_color="#0000ff")))
        assert not np.array_equal(drawn, ECGImageProcessor(CLIP).draw(ecg()))

    def test_a_short_record_is_drawn_at_the_same_scale_and_ends_where_it_ends(self):
        processor = ECGImageProcessor(CLIP | {"size": {"shortest_edge": 448}, "crop_size": 448})
        whole = ecg()
        half = ECGRecord(whole.array[:, :250], whole.sampling_rate, whole.lead_names)
        drawn, expected = (np.asarray(processor.draw(record, seconds=5.0)) for record in (half, whole))
        assert drawn.shape == expected.shape == (448, 448, 3)
        assert np.array_equal(expected, processor.draw(whole))
        end = round(448 * page_width(ECGPaper(), 2.5) / page_width(ECGPaper(), 5.0))
        assert (drawn[:, end:] == drawn[-1, -1]).all()
        assert (drawn[:, end - 1] != drawn[-1, -1]).any()  # the paper's grid
        # the medians of the leads, which stand on the baselines, differ a little
        assert abs(drawn[:, : end - 20].astype(int) - expected[:, : end - 20]).mean() < 8
        assert abs(np.roll(drawn, 8, 1)[:, : end - 20].astype(int) - expected[:, : end - 20]).mean() > 16

    @pytest.mark.parametrize("seconds", [1.0, 3.0])
    def test_a_few_seconds_take_as_much_width_as_the_leads_leave_height(self, seconds):
        """Over the whole width of 224 pixels, 2 s would leave 5 mm for each of twelve leads; they have 10."""
        processor = ECGImageProcessor({"image_processor_type": "ViTImageProcessor"})
        record = ecg()
        record = ECGRecord(record.array[:, : int(100 * seconds)], record.sampling_rate, record.lead_names)
        drawn = np.asarray(processor.draw(record))
        scale = 224 / (page_height(ECGPaper(), STANDARD_LEADS) / 2)
        width = round(scale * page_width(ECGPaper(), seconds))
        assert drawn.shape == (224, 224, 3)
        assert np.array_equal(drawn[:, :width], draw_ecg(record, 224, width))
        assert (drawn[:, width:] == drawn[-1, -1]).all()


class TestStacked:
    @pytest.mark.parametrize("model_type", TINY_VISION)
    def test_is_leads_by_samples_of_the_values_as_grey(self, model_type):
        processor = tiny_image_processor(model_type, "stacked_signal")
        array = np.random.default_rng(0).random((12, 500)).astype("float32")
        array[0, :4] = 0, 1, 0.5, 254.999 / 255
        picture = np.asarray(processor.draw(stacked(array)))
        assert picture.shape == (12, 500, 3)
        assert picture[0, :4, 0].tolist() == [0, 255, 127, 254]
        for channel in range(3):
            assert np.array_equal(picture[..., channel], (255 * array).astype(np.uint8))

    @pytest.mark.parametrize("model_type", OF_ONE_SIZE)
    def test_nothing_is_cut_off(self, model_type):
        """CLIP's own image processor would show the middle alone."""
        array = np.zeros((12, 500))
        array[:, [0, -1]] = 1
        array[5, 249:252] = 1
        processor = tiny_image_processor(model_type, "stacked_signal")
        (picture,) = pictures_of(processor, processor([stacked(array)]))
        assert picture.shape == (160, 160, 3)
        bright = picture[..., 0] > 60
        assert set(np.flatnonzero(bright.all(0))) == {0, 159}
        rows, columns = np.nonzero(bright[:, 1:-1])
        assert set(columns + 1) <= {79, 80, 81}
        assert 5 / 12 <= rows.mean() / 160 <= 6 / 12

    def test_siglip2_keeps_the_proportions(self):
        processor = ECGImageProcessor(SIGLIP2, "stacked_signal")
        for num_samples, grid in ((2500, [1, 209]), (500, [3, 85]), (100, [6, 42])):
            inputs = processor([stacked(np.random.default_rng(0).random((12, num_samples)))])
            assert inputs["spatial_shapes"].tolist() == [grid]
            assert inputs["pixel_attention_mask"].sum() == grid[0] * grid[1]
        ramp = np.tile(np.linspace(0, 1, 2500), (12, 1))
        (picture,) = pictures_of(processor, processor([stacked(ramp)]))
        assert picture.shape == (16, 209 * 16, 3)
        expected = np.linspace(0, 255, 209 * 16)[:, None]
        np.testing.assert_allclose(picture, np.broadcast_to(expected, picture.shape), atol=1.5)

    def test_range_of_millivolts(self):
        processor = ECGImageProcessor(CLIP, "stacked_signal", value_range=[-2, 2])
        array = np.zeros((12, 500))
        array[1, :5] = -3, -2, -1, 2, 9
        picture = np.asarray(processor.draw(stacked(array)))
        assert picture[1, :6, 0].tolist() == [0, 0, 63, 255, 255, 127]
        assert (picture[2:] == 127).all()


class TestImageProcessorOfTheBackbone:
    @pytest.mark.parametrize("own", [CLIPImageProcessor, ViTImageProcessor, Siglip2ImageProcessor])
    def test_same_values_as_its_own(self, own):
        """Of the same picture, by the torchvision variant too."""
        processor = ECGImageProcessor(own())
        expected = own()(processor.draw(ecg()), return_tensors="np")
        inputs = processor([ecg()])
        assert inputs.keys() == expected.keys()
        for name, values in inputs.items():
            np.testing.assert_allclose(values, expected[name], atol=1e-5)

    @pytest.mark.parametrize(
        ("own", "resample"), [(ViTImageProcessor, 2), (ViTImageProcessor, 3), (Siglip2ImageProcessor, 2)]
    )
    def test_same_values_as_its_own_where_it_scales_without_a_crop(self, own, resample):
        processor = ECGImageProcessor(own(resample=resample), "stacked_signal")
        record = stacked(np.random.default_rng(0).random((12, 500)))
        picture = processor.draw(record)
        inputs, expected = processor([record]), processor.image_processor(picture, return_tensors="np")
        for name, values in inputs.items():
            np.testing.assert_array_equal(values, expected[name])

    def test_its_own_normalization(self):
        plain, own = (
            ECGImageProcessor(CLIP | {"image_mean": [mean] * 3, "image_std": [std] * 3})([ecg()])["pixel_values"]
            for mean, std in ((0, 1), (0.5, 0.25))
        )
        np.testing.assert_allclose(own, (plain - 0.5) / 0.25, atol=1e-5)
        unscaled = ECGImageProcessor(CLIP | {"do_normalize": False, "do_rescale": False})
        assert np.array_equal(unscaled([ecg()])["pixel_values"][0].transpose(1, 2, 0), unscaled.draw(ecg()))

    @pytest.mark.parametrize(
        ("changes", "size"),
        [
            ({}, (224, 224)),
            ({"do_center_crop": False, "size": {"height": 100, "width": 300}}, (300, 100)),
            ({"do_center_crop": False, "size": {"shortest_edge": 256}}, (256, 256)),
            ({"size": {"shortest_edge": 256}, "crop_size": {"height": 192, "width": 208}}, (208, 192)),
        ],
    )
    def test_sizes(self, changes, size):
        processor = ECGImageProcessor(CLIP | changes, "stacked_signal")
        values = processor([stacked(np.zeros((12, 500)))])["pixel_values"]
        assert values.shape == (1, 3, *size[::-1])

    @pytest.mark.parametrize(
        "own",
        [
            CLIPImageProcessor(crop_size=192),
            CLIPImageProcessorPil(crop_size=192),
            CLIPImageProcessor(crop_size=192).to_dict(),
            CLIP | {"crop_size": 192},
            {"image_processor_type": "CLIPImageProcessorFast", "crop_size": 192},
        ],
        ids=["torchvision variant", "Pillow variant", "its dict", "saved dict", "dict of an old version"],
    )
    def test_forms(self, own):
        processor = ECGImageProcessor(own)
        assert type(processor.image_processor) is CLIPImageProcessorPil
        assert processor([ecg()])["pixel_values"].shape == (1, 3, 192, 192)


@pytest.mark.parametrize("representation", ["rgb", "stacked_signal"])
@pytest.mark.parametrize("model_type", TINY_VISION)
def test_a_batch_is_its_ecgs_alone(model_type, representation):
    processor = tiny_image_processor(model_type, representation)
    records = [ecg(0), ecg(1), ecg(2)]
    batch = processor(records, return_tensors="pt")
    for index, record in enumerate(records):
        for name, values in processor([record], return_tensors="pt").items():
            assert batch[name][index].equal(values[0])


@pytest.mark.parametrize("model_type", TINY_VISION)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pictures_in_place_of_records(model_type, mode):
    processor = tiny_image_processor(model_type)
    scan = draw_ecg(ecg(), 300, 400).convert(mode)
    both = processor([ecg(), scan])
    assert len(both["pixel_values"]) == 2
    expected = processor([scan.convert("RGB")])
    assert np.array_equal(both["pixel_values"][1], expected["pixel_values"][0])
    if model_type != "siglip2_vision_model":
        (picture,) = pictures_of(processor, expected)
        resized = scan.convert("RGB").resize((160, 160), processor.image_processor.resample)
        np.testing.assert_allclose(picture, np.asarray(resized), atol=1e-3)


@pytest.mark.parametrize("representation", ["rgb", "stacked_signal"])
@pytest.mark.parametrize("model_type", TINY_VISION)
def test_saved_and_loaded(model_type, representation, tmp_path):
    own = tiny_image_processor(model_type).image_processor
    paper = {"layout": "6x2", "rhythm_leads": ["II", "V1"], "speed": 50.0}
    processor = ECGImageProcessor(own, representation, paper, (-1.5, 3))
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor"] == json.loads(own.to_json_string())
    assert saved["paper"].items() >= paper.items()
    assert {path.name for path in tmp_path.glob("*.py")} == {
        "configuration_elm.py",
        "configuration_ecg_encoders.py",
        "image_processing_elm.py",
        "ecg_drawing.py",
        "ecg_utils.py",
        "plain_pickle.py",
        *(path.name for path in ROOT.glob("ecg_formats*.py")),
    }
    loaded = ECGImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.paper == processor.paper
    for name, values in processor([ecg()]).items():
        assert np.array_equal(loaded([ecg()])[name], values)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"representation": "signal"}, ValueError, r"representation is 'signal'; expected one of \('stacked_signal', 'rgb'\)"),
        ({"value_range": (1, 1)}, ValueError, r"value_range is \[1, 1\]; expected the values of black and of white"),
        ({"value_range": (0, float("nan"))}, ValueError, r"value_range is \[0, nan\]"),
        ({"value_range": [1]}, ValueError, r"value_range is \[1\]"),
        ({"paper": {"layout": "4x3"}}, ValueError, "layout is '4x3'"),
        ({"image_processor": {"image_processor_type": "Bert"}}, ValueError, "image_processor_type is 'Bert'; expected an image"),
        ({"image_processor": {}}, ValueError, "image_processor_type is ''; expected an image"),
        ({"image_processor": CLIP | {"do_center_crop": False, "size": {"longest_edge": 9}}}, ValueError, "expected a height"),
        ({"layout": "3x4"}, TypeError, "ECGImageProcessor has no argument layout"),
    ],
)  # fmt: skip
def test_impossible_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ECGImageProcessor(**{"image_processor": CLIP} | arguments)


def test_no_ecg():
    with pytest.raises(ValueError, match="There is no ECG"):
        ECGImageProcessor(CLIP)([])
