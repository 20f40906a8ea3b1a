from pathlib import Path

import pytest
import torch

from elm_ecg.modeling_elm import ECG_INPUTS, ELMForConditionalGeneration
from elm_ecg.training import run, sft
from elm_ecg.training.features import EncoderFeatures
from helpers import (
    TINY_ENCODERS,
    TINY_VISION,
    fork_project,
    losses,
    save_tiny_data,
    tiny_elm_config,
    tiny_image_elm_config,
    tiny_image_processor_elm,
    tiny_processor,
    tiny_sft,
)

FROZEN = ["--update", "connector", "llm"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows with an ECG and without, in a validation split too."""
    return save_tiny_data(tmp_path_factory.mktemp("data") / "all", without_ecg=4, train=12, validation=4)


def make(ecg_part: str, **changes) -> ELMForConditionalGeneration:
    torch.manual_seed(0)
    pictures = ecg_part in TINY_VISION
    config = tiny_image_elm_config(ecg_part, **changes) if pictures else tiny_elm_config(ecg_part, **changes)
    return ELMForConditionalGeneration(config)


def inputs_of(ecg_part: str, num_ecgs: int = 3) -> dict[str, torch.Tensor]:
    """ECGs of a batch, as the processor of the model prepares them; of signals some leads are missing."""
    generator = torch.Generator().manual_seed(0)
    records = [torch.randn(12, 500, generator=generator).numpy() for _ in range(num_ecgs)]
    if ecg_part in TINY_VISION:
        processor = tiny_image_processor_elm(ecg_part)
        return dict(processor(ecgs=records, sampling_rate=100, return_tensors="pt"))
    inputs = dict(tiny_processor(sampling_rate=100)(ecgs=records, sampling_rate=100, return_tensors="pt"))
    return inputs | {"ecg_lead_mask": torch.tensor([[True] * 12, [False, *[True] * 11], [True] * 12])[:num_ecgs]}


@pytest.mark.parametrize("ecg_part", [*TINY_ENCODERS, *TINY_VISION])
def test_kept_features_are_those_of_the_encoder(ecg_part, monkeypatch):
    elm = make(ecg_part).train()  # in eval mode for what is kept
    inputs, features = inputs_of(ecg_part), EncoderFeatures(elm.model)
    replaced = features.replace({**inputs, "labels": 1})
    assert replaced.keys() == {"encoder_features", "labels"}
    assert elm.model.encoder.training
    with torch.no_grad():
        torch.testing.assert_close(
            elm.get_ecg_features(encoder_features=replaced["encoder_features"]),
            elm.eval().get_ecg_features(**inputs),
            atol=1e-5,
            rtol=1e-5,
        )
    assert (features.computed, features.found) == (3, 0)
    monkeypatch.setattr(elm.model, "encoder", None)  # nobody needs it any more
    turned = {name: values.flip(0) for name, values in inputs.items()}
    assert torch.equal(features.replace(turned)["encoder_features"], replaced["encoder_features"].flip(0))
    assert (features.computed, features.found) == (3, 3)


@pytest.mark.parametrize(
    ("ecg_part", "name"), [("st_mem", "ecg_lead_mask"), ("siglip2_vision_model", "spatial_shapes")]
)
def test_every_tensor_of_an_ecg_counts(ecg_part, name):
    elm, inputs = make(ecg_part), inputs_of(ecg_part, 1)
    features = EncoderFeatures(elm.model)
    features.replace(inputs)
    changed = {"ecg_lead_mask": torch.arange(12)[None] > 2, "spatial_shapes": torch.tensor([[2, 8]])}[name]
    assert not torch.equal(changed, inputs[name])
    features.replace(inputs | {name: changed})
    features.replace(inputs)
    assert (features.computed, features.found) == (2, 1)


def test_precisions_are_kept_apart():
    elm, inputs = make("mtae"), inputs_of("mtae", 1)
    features = EncoderFeatures(elm.model)
    features.replace(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        kept = [features.replace(inputs)["encoder_features"] for _ in range(2)]
        assert torch.equal(*kept)
    assert (features.computed, features.found) == (2, 1)
    elm.bfloat16()
    assert features.replace(inputs)["encoder_features"].dtype == torch.bfloat16


def test_no_more_memory_than_allowed():
    elm, inputs = make("mtae"), inputs_of("mtae")
    one, two, three = ({name: values[i : i + 1] for name, values in inputs.items()} for i in range(3))
    size = EncoderFeatures(elm.model).replace(one)["encoder_features"].nbytes
    features = EncoderFeatures(elm.model, max_bytes=2 * size)
    for ecg in (one, two, one, three, one):  # three takes the place of two
        features.replace(ecg)
    assert (features.computed, features.found, features.num_bytes) == (3, 2, 2 * size)
    features.replace(two)
    assert features.computed == 4


# on disk

FRESH = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
import torch
import test_features
from elm_ecg.training.features import EncoderFeatures
elm = test_features.make("merl")
features = EncoderFeatures(elm.model, Path(sys.argv[1]))
elm.model.encoder = None
torch.save(features.replace(test_features.inputs_of("merl"))["encoder_features"], sys.argv[2])
"""


def test_another_process_finds_them_on_disk(tmp_path):
    elm, inputs = make("merl"), inputs_of("merl")
    features = EncoderFeatures(elm.model, tmp_path / "kept")
    expected = features.replace(inputs)["encoder_features"]
    process = fork_project(FRESH, str(tmp_path / "kept"), str(tmp_path / "found.pt")).finish()
    assert process.returncode == 0, process.stderr
    assert torch.equal(torch.load(tmp_path / "found.pt"), expected)


def test_another_encoder_or_other_settings_are_not_taken_for_the_same(tmp_path):
    inputs = inputs_of("merl", 1)

    def keep(elm: ELMForConditionalGeneration) -> int:
        features = EncoderFeatures(elm.model, tmp_path)
        features.replace(inputs)
        return features.computed

    assert [keep(make("merl")), keep(make("merl"))] == [1, 0]
    assert keep(make("merl", connector="linear")) == 1
    assert keep(make("merl", num_ecg_tokens=3)) == 1
    elm = make("merl")
    statistics = next(buffer for name, buffer in elm.model.encoder.named_buffers() if name.endswith("running_var"))
    statistics[0] += 1e-3
    assert keep(elm) == 1
    elm = make("merl")
    with torch.no_grad():
        elm.lm_head.weight[0] += 1  # of no matter
    assert keep(elm) == 0


def test_a_damaged_file_is_written_anew(tmp_path):
    elm, inputs = make("merl"), inputs_of("merl", 1)
    expected = EncoderFeatures(elm.model, tmp_path).replace(inputs)["encoder_features"]
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    for damage in (b"", whole[:-100]):
        file.write_bytes(damage)
        assert torch.equal(EncoderFeatures(elm.model, tmp_path).replace(inputs)["encoder_features"], expected)
        assert file.read_bytes() == whole
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


# in training


@pytest.mark.parametrize(
    ("where", "options"),
    [("memory", ["--gradient_checkpointing"]), pytest.param("disk", ["--peft"], marks=pytest.mark.slow)],
)
def test_a_run_with_them_equals_one_without(llm, data, tmp_path, monkeypatch, capsys, where, options):
    """Also where it goes on from a checkpoint, bit by bit."""
    monkeypatch.setattr(run, "FOLDER", tmp_path / "kept")
    options = [*FROZEN, *options, "--save_strategy", "steps", "--save_steps", "4"]
    options += ["--eval_strategy", "steps", "--eval_steps", "3", "--max_steps", "6"]
    sft.main(tiny_sft(llm, data, tmp_path / "without", *options))
    assert "Features of" not in capsys.readouterr().out
    options += ["--cache_features", where]
    sft.main(tiny_sft(llm, data, tmp_path / "with", *options))
    # 9 of 12 rows have an ECG and 3 of 4, which are met in two epochs and in two evaluations
    assert "12 ECGs computed, 12 times found" in capsys.readouterr().out
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), abs=1e-6)
    more = ["--output_dir", str(tmp_path / "more"), "--resume_from_checkpoint", str(tmp_path / "with/checkpoint-4")]
    sft.main(tiny_sft(llm, data, tmp_path / "with", *options, *more))
    assert losses(tmp_path / "more") == losses(tmp_path / "with")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*FROZEN, "--augment_ecg"], "--cache_features memory with --augment_ecg: the ECGs are others in each epoch"),
        ([*FROZEN, "--augment_rgb"], "with --augment_rgb"),
        ([*FROZEN, "--time_shift", "1"], "with --time_shift"),
        ([*FROZEN, "--gain_jitter", "0.1"], "with --gain_jitter"),
        ([*FROZEN, "--lead_dropout", "0.1"], "with --lead_dropout"),
        ([*FROZEN, "--perturb", "noise"], "with --perturb noise"),
        ([*FROZEN, "--perturb", "only_text"], "with --perturb only_text, which leaves every ECG out"),
        ([], "with --update encoder connector llm: what a trained encoder gives .* Say --update connector llm"),
        (
            [*FROZEN, "--peft", "--lora_target_modules", ".*(q_proj|conv)"],
            "names model.encoder.*, which the adapter holds whole",
        ),
        (["--elm", "fuyu"], "a fuyu ELM has no encoder; leave the option out"),
    ],
)
def test_refused(llm, data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sft.main(tiny_sft(llm, data, tmp_path / "run", "--cache_features", "memory", *options))


def test_all_inputs_of_ecgs_are_replaced():
    elm = make("merl")
    batch = dict.fromkeys(ECG_INPUTS) | inputs_of("merl", 1) | {"input_ids": None}
    assert EncoderFeatures(elm.model).replace(batch).keys() == {"input_ids", "encoder_features"}
    assert EncoderFeatures(elm.model).replace({"input_ids": 1}) == {"input_ids": 1}
