import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from peft import get_peft_model
from peft.utils import ModulesToSaveWrapper
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    Siglip2Config,
    Siglip2Model,
    ViTConfig,
    ViTModel,
)
from trl import ModelConfig

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.ecg_drawing import ECGPaper, draw_ecg
from elm_ecg.ecg_utils import as_record
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training import model_files
from elm_ecg.training.arguments import ELMArguments
from elm_ecg.training.build import build_model, build_processor, new_elm
from elm_ecg.training.data.synthetic import make_record
from elm_ecg.training.llms import LLMS, resolve_llm
from elm_ecg.training.load import limit_threads, load_elm
from elm_ecg.training.lora import freeze, lora_config
from elm_ecg.training.model_files import find_model_file
from helpers import TINY_ENCODERS, TINY_VISION, every_pair, save_tiny_llm, tiny_ecg_byte
from loopback_hub import LoopbackHub, run_on_hub


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_tiny_llm(tmp_path_factory.mktemp("llm"))


def arguments(llm, **changes) -> ELMArguments:
    symbolic = changes.get("representation") == "symbolic"
    defaults = {"encoder": "mtae", "num_samples": 500, "num_ecg_tokens": 4, "update": ["connector", "llm"]}
    if changes.get("architecture", "llava") == "llava" and not symbolic:
        defaults["encoder_config"] = json.dumps(TINY_ENCODERS.get(changes.get("encoder", "mtae")))
    return ELMArguments(data=["none"], llm=str(llm), **defaults | changes)


def build(args: ELMArguments) -> ELMForConditionalGeneration:
    return build_model(args, build_processor(args))


@pytest.mark.parametrize(("name", "hub_id"), LLMS.items())
def test_llm_by_name(name, hub_id):
    assert resolve_llm(name) == hub_id
    assert name == hub_id.split("/")[1].lower()


def test_llm_by_id_or_folder(llm):
    assert resolve_llm("owner/name") == "owner/name"
    assert resolve_llm(str(llm)) == str(llm)


@pytest.mark.parametrize("name", ["gpt-17", "./nowhere/llm", "/nowhere/llm", "a/b/c"])
def test_unknown_llm(name):
    with pytest.raises(ValueError, match=r"Unknown --llm .*llama-3\.2-1b-instruct.*local folder"):
        resolve_llm(name)


def test_unknown_encoder(llm):
    with pytest.raises(
        ValueError, match="Unknown --encoder 'resnet' for signal ECGs; expected one of merl, mlae, mtae"
    ):
        build(arguments(llm, encoder="resnet", encoder_config=None))


def test_unknown_encoder_field(llm):
    with pytest.raises(ValueError, match="MTAEConfig has no field depth, width; it has num_leads, num_samples, "):
        build(arguments(llm, encoder_config='{"depth": 1, "width": 2}'))


def test_pad_token(llm, tmp_path):
    tokenizer = build_processor(arguments(llm)).tokenizer
    assert tokenizer.pad_token == tokenizer.eos_token == "<|eot_id|>"
    own = AutoTokenizer.from_pretrained(save_tiny_llm(tmp_path, "qwen2_5"))
    own.pad_token = "<|endoftext|>"
    own.save_pretrained(tmp_path)
    assert build_processor(arguments(tmp_path)).tokenizer.pad_token == "<|endoftext|>"


def test_processor_follows_the_arguments(llm):
    changes = {"lead_names": ["II", "V5"], "sampling_rate": 100, "normalization": "minmax", "truncation": "center"}
    changes |= {"bandpass": [0.5, 40.0], "notch": 49.0, "missing_leads": "zeros"}
    processor = build_processor(arguments(llm, **changes))
    extractor = processor.feature_extractor
    assert extractor.lead_names == ["II", "V5"]
    assert (extractor.sampling_rate, extractor.num_samples) == (100, 500)
    assert (extractor.normalization, extractor.truncation) == ("minmax", "center")
    assert (extractor.bandpass, extractor.notch, extractor.missing_leads) == ([0.5, 40.0], 49.0, "zeros")
    assert processor.num_ecg_tokens == 4
    assert processor.tokenizer.encode("<signal>", add_special_tokens=False) == [processor.ecg_token_id]
    text_only = build_processor(arguments(llm, architecture="text"))
    assert text_only.num_ecg_tokens == 0


@pytest.mark.parametrize("encoder", TINY_ENCODERS)
def test_model_follows_the_arguments(llm, encoder):
    model = build(arguments(llm, encoder=encoder, lead_names=["I", "II", "V1", "V2"], connector="mlp"))
    assert model.config.encoder_config.model_type == encoder
    assert (model.config.num_leads, model.config.num_samples) == (4, 500)
    assert model.get_ecg_features(torch.zeros(3, 4, 500)).shape[:2] == (3, 4)


@pytest.mark.parametrize("tied", [False, True])
def test_the_language_model_stays_as_it_is(llm, tied, tmp_path):
    """No row is added, of a vocabulary with spare rows none is used."""
    llm = save_tiny_llm(tmp_path, "qwen2_5") if tied else llm
    old = AutoModelForCausalLM.from_pretrained(llm)
    model = build(arguments(llm))
    assert model.config.text_config.vocab_size == old.config.vocab_size == model.config.ecg_token_id
    assert torch.equal(model.get_input_embeddings().weight, old.get_input_embeddings().weight)
    assert torch.equal(model.lm_head.weight, old.lm_head.weight)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied


def test_pretrained_encoder(llm, tmp_path):
    encoder = ENCODER_MODELS["mtae"](ENCODER_CONFIGS["mtae"](num_samples=500, **TINY_ENCODERS["mtae"]))
    encoder.save_pretrained(tmp_path)
    model = build(arguments(llm, encoder_name_or_path=str(tmp_path), encoder_config=None))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.model.encoder.state_dict()[name], tensor), name


def test_two_encoders(llm, tmp_path):
    """`--encoder` may name the kind of a pretrained one, and no other."""
    elm = build(arguments(llm, encoder="merl"))
    kept = {tmp_path / "merl": elm.model.encoder, tmp_path / "elm": elm}
    for folder, model in kept.items():
        model.save_pretrained(folder)
        named = {"encoder_name_or_path": str(folder), "encoder_config": None}
        assert build(arguments(llm, **named, encoder="merl")).config.encoder_config.model_type == "merl"
        said = f"--encoder st_mem and --encoder_name_or_path {folder}, which is of the kind merl, name two encoders"
        with pytest.raises(ValueError, match=re.escape(said)):
            build(arguments(llm, **named, encoder="st_mem"))


@pytest.mark.parametrize("kind", ["clip", "clip_vision_model", "clip-vit-base-patch32"])
def test_kinds_of_a_backbone(llm, backbones, kind):
    named = {"encoder_name_or_path": str(backbones["clip_vision_model"][0])}
    build_processor(image_arguments(llm, **named, encoder=kind))
    with pytest.raises(ValueError, match=r"--encoder vit and .*, which is of the kind clip, name two encoders"):
        build_processor(image_arguments(llm, **named, encoder="vit"))


def test_an_encoder_of_an_adapter(llm, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is a LoRA adapter, .* `elm export .* --part encoder"):
        build(arguments(llm, encoder_name_or_path=str(tmp_path), encoder_config=None))


def test_pretrained_encoder_of_other_records(llm, tmp_path, caplog):
    ENCODER_MODELS["mtae"](ENCODER_CONFIGS["mtae"](num_samples=500, **TINY_ENCODERS["mtae"])).save_pretrained(tmp_path)
    ECGFeatureExtractor(125, 500, normalization="zscore", bandpass=(0.5, 40)).save_pretrained(tmp_path)
    pretrained = {"encoder_name_or_path": str(tmp_path), "encoder_config": None}
    build(arguments(llm, **pretrained, sampling_rate=125, normalization="zscore", bandpass=[0.5, 40]))
    assert "learnt from records" not in caplog.text
    build(arguments(llm, **pretrained, bandpass=[0.5, 40]))
    (told,) = [message for message in caplog.messages if "learnt from records" in message]
    assert told.endswith("--sampling_rate 125 (now 250), --normalization zscore (now none).")
    ECGFeatureExtractor(250, 500).save_pretrained(tmp_path)
    build(arguments(llm, **pretrained, bandpass=[0.5, 40]))
    assert caplog.messages[-1].endswith("Its own: no --bandpass (now 0.5 40).")  # None is no value of the option


@pytest.mark.parametrize("update", [["encoder"], ["connector"], ["llm"], ["encoder", "llm"]])
def test_freeze(llm, update):
    model = build(arguments(llm))
    freeze(model, update)
    trained = {
        "encoder": model.model.encoder.parameters(),
        "connector": model.model.connector.parameters(),
        "llm": [*model.model.language_model.parameters(), *model.lm_head.parameters()],
    }
    for part, parameters in trained.items():
        assert {parameter.requires_grad for parameter in parameters} == {part in update}


def test_frozen_encoder_stays_in_eval_mode(llm):
    model = build(arguments(llm, encoder="merl"))
    freeze(model, ["connector", "llm"])
    assert not model.train().model.encoder.training
    freeze(model, ["encoder"])
    assert model.train().model.encoder.training


def test_freeze_errors(llm):
    with pytest.raises(ValueError, match="a fuyu ELM has no encoder"):
        freeze(build(arguments(llm, architecture="fuyu")), ["encoder", "llm"])
    with pytest.raises(ValueError, match="leaves nothing to train in a text ELM"):
        freeze(build(arguments(llm, architecture="text")), ["connector"])


def test_lora_config(llm):
    args = arguments(llm, update=["connector", "llm"])
    model = build(args)
    config = lora_config(args, ModelConfig(lora_r=3), model)
    assert config.r == 3
    assert config.modules_to_save == ["model.encoder", "model.connector"]  # both are new
    assert config.trainable_token_indices is None
    adapted = [name for name, _ in model.named_modules() if re.fullmatch(config.target_modules, name)]
    assert adapted
    assert all(name.startswith("model.language_model.layers") for name in adapted)
    config = lora_config(arguments(llm, update=["encoder", "llm"]), ModelConfig(), model)
    assert config.modules_to_save == ["model.encoder", "model.connector"]
    with pytest.raises(ValueError, match="--peft adapts the language model"):
        lora_config(SimpleNamespace(update=["connector"]), ModelConfig(), model)


@pytest.fixture(scope="module")
def symbolic_args(llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ecg_byte")
    tiny_ecg_byte(across_leads=False).save_pretrained(folder)
    return arguments(llm, representation="symbolic", ecg_tokenizer=str(folder), lead_names=["I", "V1"])


def test_symbolic_processor(symbolic_args, llm):
    processor = build_processor(symbolic_args)
    assert processor.representation == "symbolic"
    assert processor.max_length == AutoConfig.from_pretrained(llm).max_position_embeddings
    assert processor.takes_ecgs
    names = processor.tokenizer.convert_ids_to_tokens(processor.signal_token_ids)
    assert names == [f"signal_{name}" for name in [*range(97, 123), *range(256, 316), "I", "V1"]]
    assert processor.tokenizer.encode("signal_97signal_300signal_V1", add_special_tokens=False) == [
        processor.signal_token_ids[place] for place in (0, 26 + 44, -1)
    ]
    assert build_processor(arguments(llm, ecg_tokenizer=None)).signal_token_ids == []


def test_ecg_tokenizer_of_another_rate(symbolic_args, llm, caplog):
    build_processor(symbolic_args)
    assert "The ECG tokenizer was trained at 100 Hz and records are taken at 250 Hz" in caplog.text
    caplog.clear()
    build_processor(arguments(llm, representation="symbolic"))
    assert "ECG tokenizer" not in caplog.text


def test_no_ecg_tokenizer(llm, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("/nowhere/tokenizer", "runs/typo"):
        with pytest.raises(ValueError, match=f"^--ecg_tokenizer {name} is no folder here"):
            build_processor(arguments(llm, representation="symbolic", ecg_tokenizer=name))


def test_default_ecg_tokenizer(llm):
    processor = build_processor(arguments(llm, representation="symbolic"))
    assert processor.ecg_tokenizer.vocab_size == 10_026
    assert processor.ecg_tokenizer.sampling_rate == processor.feature_extractor.sampling_rate == 250


def test_symbolic_model(symbolic_args, llm):
    processor = build_processor(symbolic_args)
    model = build_model(symbolic_args, processor)
    assert model.config.representation == "symbolic"
    assert model.model.connector is None
    embeddings = AutoModelForCausalLM.from_pretrained(llm).get_input_embeddings()
    assert torch.equal(model.get_input_embeddings().weight, embeddings.weight)
    ids = model.config.signal_token_ids
    assert (ids.start, list(ids)) == (processor.ecg_token_id + 1, processor.signal_token_ids)
    new, old = model.model.signal_embeddings.weight.detach(), embeddings.weight
    assert new.std(0).mean() == pytest.approx(old.std(0).mean().item(), rel=0.1)  # as far apart as words
    assert torch.pdist(new).min() > 0.5 * torch.pdist(old).min()


def test_signal_tokens_start_as_what_embeddings_give_out(symbolic_args, tmp_path):
    """Gemma's are the rows times the root of their width."""
    args = replace(symbolic_args, llm=str(save_tiny_llm(tmp_path, "gemma2")))
    model = build(args)
    words = model.get_input_embeddings()(torch.arange(200))
    assert words.std() > 4 * model.get_input_embeddings().weight.std()
    assert model.model.signal_embeddings.weight.std().item() == pytest.approx(words.std().item(), rel=0.1)


def test_a_language_model_that_has_some_of_the_tokens(symbolic_args, llm, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_tokens(["signal_100"])
    shutil.copytree(llm, tmp_path, dirs_exist_ok=True)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"--llm .* has some tokens of the ECG tokenizer already"):
        build(replace(symbolic_args, llm=str(tmp_path)))


def test_lora_of_symbolic_ecgs_trains_their_table(symbolic_args):
    model = build(symbolic_args)
    config = lora_config(symbolic_args, ModelConfig(), model)
    assert (config.modules_to_save, config.trainable_token_indices) == (["model.signal_embeddings"], None)
    freeze(model, ["connector"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["model.signal_embeddings.weight"]


# pictures of ECGs

# what the Hub's folders of the three names say, of smaller pictures
PREPROCESSORS = {
    "clip_vision_model": {
        "crop_size": 160,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 160,
    },
    "siglip2_vision_model": {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Siglip2ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_num_patches": 16,
        "patch_size": 32,
        "processor_class": "Siglip2Processor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
    },
    "vit": {
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "size": 160,
    },
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Folders of tiny pretrained backbones; CLIP and SigLIP2 with their text towers."""
    folder = tmp_path_factory.mktemp("backbones")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    models = {
        "clip_vision_model": CLIPModel(
            CLIPConfig(text_config=text, vision_config=TINY_VISION["clip_vision_model"], projection_dim=24)
        ),
        "siglip2_vision_model": Siglip2Model(
            Siglip2Config(text_config=text, vision_config=TINY_VISION["siglip2_vision_model"])
        ),
        "vit": ViTModel(ViTConfig(**TINY_VISION["vit"])),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        (folder / name / "preprocessor_config.json").write_text(json.dumps(PREPROCESSORS[name]))
    return {name: (folder / name, getattr(model, "vision_model", model)) for name, model in models.items()}


def image_arguments(llm, **changes) -> ELMArguments:
    """Of a tiny ViT with random weights, unless `changes` name an encoder."""
    defaults = {"representation": "rgb", "encoder": "vit", "encoder_config": json.dumps(TINY_VISION["vit"])}
    if {"encoder", "encoder_name_or_path"} & changes.keys():
        defaults |= {"encoder": None, "encoder_config": None}
    return arguments(llm, sampling_rate=100, **defaults | changes)


RECORD = make_record(0, 1, sampling_rate=100, seconds=5.0)["ecg"]


@pytest.mark.parametrize(
    ("name", "representation", "option"),
    every_pair(list(PREPROCESSORS), ["rgb", "stacked_signal"], ["encoder", "encoder_name_or_path"]),
)
def test_pretrained_backbone(llm, backbones, name, representation, option):
    folder, tower = backbones[name]
    args = image_arguments(llm, representation=representation, **{option: str(folder)})
    processor = build_processor(args)
    model = build_model(args, processor)
    assert model.config.encoder_config.model_type == name
    for key, tensor in model.model.encoder.state_dict().items():
        assert torch.equal(tensor, tower.state_dict()[key.removeprefix("vision_model.")]), key
    own = processor.image_processor.image_processor.to_dict()
    assert list(own["image_mean"]) == PREPROCESSORS[name]["image_mean"]
    assert own["resample"] == PREPROCESSORS[name]["resample"]
    inputs = processor(ecgs=[RECORD, RECORD], return_tensors="pt")
    assert inputs["pixel_values"].shape == ((2, 16, 32**2 * 3) if "siglip2" in name else (2, 3, 160, 160))
    assert model.get_ecg_features(**inputs).shape == (2, 4, 32)


def test_what_reads_no_pictures_is_no_backbone(llm, tmp_path):
    args = arguments(llm)
    processor = build_processor(args)
    model = build_model(args, processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model.model.encoder.save_pretrained(tmp_path / "encoder")
    for folder in (tmp_path, tmp_path / "encoder"):
        with pytest.raises(ValueError, match="reads no pictures, with --representation rgb"):
            build_processor(image_arguments(llm, encoder_name_or_path=str(folder)))
    with pytest.raises(ValueError, match="A 'llama' model reads no images"):
        build_processor(image_arguments(llm, encoder_name_or_path=str(llm)))


@pytest.mark.parametrize("representation", ["rgb", "stacked_signal"])
@pytest.mark.parametrize("model_type", TINY_VISION)
def test_backbone_with_random_weights(llm, model_type, representation):
    fields = json.dumps(TINY_VISION[model_type])
    args = image_arguments(llm, representation=representation, encoder=model_type, encoder_config=fields)
    processor = build_processor(args)
    model = build_model(args, processor)
    assert model.config.encoder_config.to_dict().items() >= TINY_VISION[model_type].items()
    inputs = processor(ecgs=[RECORD, RECORD], return_tensors="pt")
    side = 224 if model_type == "resnet" else 160  # which reads any size
    assert inputs["pixel_values"].shape == ((2, 16, 32**2 * 3) if "siglip2" in model_type else (2, 3, side, side))
    assert model.get_ecg_features(**inputs).shape == (2, 4, 32)
    name = type(processor.image_processor.image_processor).__name__
    expected = {"clip_vision_model": "CLIP", "siglip2_vision_model": "Siglip2", "vit": "ViT", "dinov2": "Bit"}
    assert name == f"{expected.get(model_type, 'ConvNext')}ImageProcessorPil"


def test_lora_of_a_backbone_whose_part_is_called_encoder_too(llm, backbones):
    """Which of them PEFT would train could not be told."""
    folder = str(backbones["clip_vision_model"][0])
    args = image_arguments(llm, encoder_name_or_path=folder, update=["encoder", "llm"])
    processor = build_processor(args)
    model = get_peft_model(build_model(args, processor), lora_config(args, ModelConfig(), build_model(args, processor)))
    trained = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    assert trained == ["base_model.model.model.encoder", "base_model.model.model.connector"]
    args = image_arguments(
        llm, encoder_name_or_path=folder, update=["encoder", "llm"], image_features="embedding", num_ecg_tokens=None
    )
    with pytest.raises(
        ValueError, match=r"PEFT cannot tell the encoder from its part model\.encoder\.vision_model\.encoder"
    ):
        lora_config(args, ModelConfig(), build_model(args, build_processor(args)))


def test_embedding_of_a_backbone(llm, backbones):
    args = image_arguments(
        llm, encoder=str(backbones["clip_vision_model"][0]), image_features="embedding", num_ecg_tokens=None
    )
    processor = build_processor(args)
    model = build_model(args, processor)
    assert processor.num_ecg_tokens == 1
    assert model.get_ecg_features(**processor(ecgs=RECORD, return_tensors="pt")).shape == (1, 1, 32)


def test_paper(llm):
    paper = {"layout": "6x2", "gain": 20, "rhythm_leads": ["V1"]}
    processor = build_processor(image_arguments(llm, paper=json.dumps(paper)))
    assert processor.image_processor.paper == ECGPaper("6x2", ("V1",), gain=20)
    drawn = draw_ecg(as_record(RECORD), 160, 160, processor.image_processor.paper)
    assert np.abs(np.asarray(processor.draw(RECORD), dtype=int) - np.asarray(drawn)).max() <= 1


@pytest.mark.parametrize(
    ("encoder", "fields", "shape"),
    [
        ("vit", {"size": {"height": 96, "width": 192}}, (3, 96, 192)),
        ("clip_vision_model", {"size": {"height": 320, "width": 320}, "resample": 0}, (3, 320, 320)),
        ("siglip2_vision_model", {"max_num_patches": 20}, (20, 32**2 * 3)),
    ],
)
def test_image_processor(llm, backbones, encoder, fields, shape):
    """Of other sizes than the backbone was made for, whose positions are interpolated."""
    args = image_arguments(
        llm, representation="stacked_signal", encoder=str(backbones[encoder][0]), image_processor=json.dumps(fields)
    )
    processor = build_processor(args)
    own = processor.image_processor.image_processor.to_dict()
    assert own.items() >= fields.items()
    assert list(own["image_mean"]) == PREPROCESSORS[encoder]["image_mean"]
    inputs = processor(ecgs=RECORD, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, *shape)
    assert build_model(args, processor).get_ecg_features(**inputs).shape == (1, 4, 32)


@pytest.mark.parametrize(("normalization", "expected"), [("none", [-2, 2]), ("zscore", [-4, 4]), ("minmax", [0, 1])])
def test_values_that_are_black_and_white(llm, normalization, expected):
    args = image_arguments(llm, representation="stacked_signal", normalization=normalization)
    assert build_processor(args).image_processor.value_range == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "merl"}, "Unknown --encoder 'merl' for rgb ECGs; expected clip-vit-base-patch32, .* such as vit"),
        ({"encoder": "resnet50"}, "Unknown --encoder 'resnet50' for rgb ECGs"),
        ({"encoder": "bert"}, "A 'bert' model reads no images"),
        ({"encoder_config": '{"depth": 1, "width": 2}'}, "--encoder_config: ViTConfig has no field depth, width"),
        ({"paper": '{"colour": "red"}'}, "--paper has no field colour; expected layout, rhythm_leads, speed"),
        ({"paper": '{"layout": "4x3"}'}, "layout is '4x3'"),
        (
            {"image_processor": '{"max_num_patches": 512}'},  # of SigLIP2
            "--image_processor: ViTImageProcessor has no field max_num_patches; expected .*image_mean",
        ),
        ({"representation": "signal"}, "Unknown --encoder 'vit' for signal ECGs; .*--representation stacked_signal or rgb"),
        ({"representation": "signal", "encoder": "clip-vit-base-patch32"}, "Unknown --encoder 'clip-vit-base-patch32' for signal"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_pictures(llm, changes, message):
    defaults = {"representation": "rgb", "encoder": "vit", "encoder_config": None}
    with pytest.raises(ValueError, match=message):
        build(arguments(llm, **defaults | changes))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda folder: load_elm(folder), "The model .* has no adapter_config.json and no config.json"),
        (lambda folder: new_elm(folder), "--llm .* has no config.json; expected the folder of a saved model"),
        (
            lambda folder: load_elm(f"{folder}/a/b"),
            "The model .* is no folder here, and no id of the Hub such as owner",
        ),
    ],
)
def test_folder_without_a_model(function, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        function(str(tmp_path))


def test_model_of_the_hub_that_cannot_be_read(monkeypatch):
    def refuse(*_, **__):
        raise GatedRepoError.__new__(GatedRepoError)  # it is made of a server's response

    monkeypatch.setattr(model_files, "file_exists", refuse)
    with pytest.raises(ValueError, match=r"--llm a/b is gated: accept its licence at .*/a/b, then run `hf auth login`"):
        new_elm("a/b")
    monkeypatch.setattr(model_files, "file_exists", lambda *_, **__: False)
    with pytest.raises(ValueError, match="--encoder c/d is no folder here, and no model on the Hub with revision main"):
        find_model_file("c/d", ["config.json"], label="--encoder")


OFFLINE = """
import sys
from huggingface_hub import constants
from elm_ecg.training.build import new_elm
from elm_ecg.training.load import load_elm
from elm_ecg.training.cli import main
sys.stderr = sys.stdout
online, _ = load_elm("user/elm")
constants.HF_HUB_OFFLINE = True
offline, processor = load_elm("user/elm")
print(processor.num_ecg_tokens, all((a == b).all() for a, b in zip(online.parameters(), offline.parameters())))
main(["chat", "user/other"])
try:
    new_elm("nowhere/else")
except ValueError as error:
    print(error)
"""


def test_a_cached_model_offline(llm, tmp_path):
    """It is found in the cache; of one that is not there one line says so."""
    model, processor = new_elm(str(llm), architecture="fuyu", num_samples=500)
    model.save_pretrained(tmp_path / "elm")
    processor.save_pretrained(tmp_path / "elm")
    with LoopbackHub() as hub:
        hub.repos["models/user/elm"] = {}
        hub.commit("models/user/elm", "main", {path.name: path.read_bytes() for path in (tmp_path / "elm").iterdir()})
        printed = run_on_hub(OFFLINE, hub, tmp_path).splitlines()[-3:]
    why = "is no folder here and not in the Hub's cache, and the Hub cannot be asked. Cannot reach http"
    assert printed[0] == "25 True"
    assert printed[1].startswith(f"elm chat: The model user/other {why}")
    assert printed[2].startswith(f"--llm nowhere/else {why}")


def test_new_elm(llm):
    options = {"connector": "mlp", "num_samples": 500, "lead_names": ("I", "II"), "encoder": "merl"}
    state = torch.get_rng_state()
    (one, processor), (other, _), (third, _) = (
        new_elm(str(llm), seed=seed, encoder_config=TINY_ENCODERS["merl"], **options) for seed in (0, 0, 1)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert (one.config.connector, one.config.encoder_config.model_type, one.dtype) == ("mlp", "merl", torch.float32)
    assert processor.feature_extractor.lead_names == ["I", "II"]
    weights = [model.model.connector.state_dict() for model in (one, other, third)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert not all(torch.equal(tensor, weights[2][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encodr": "merl"}, r"there is no option encodr\. Did you mean encoder\?"),
        ({"data": ["x"]}, "there is no option data"),
        ({"architecture": "lava"}, "architecture is 'lava'; expected one of llava, fuyu, text"),
        ({"representation": "symbolic", "normalization": "minmax"}, "normalizes millivolts"),
    ],
)
def test_options_that_new_elm_does_not_take(llm, options, message):
    with pytest.raises(ValueError, match=message):
        new_elm(str(llm), **options)


@pytest.mark.parametrize(
    ("device", "variable", "size", "threads"),
    [("cpu", None, 10, 1), ("cpu", "2", 10, 2), ("cpu", None, 10**7, 2), ("cuda", None, 10, 2)],
)
def test_threads_of_a_small_model(device, variable, size, threads, monkeypatch, capsys):
    calls: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    limit_threads(SimpleNamespace(num_parameters=lambda: size), torch.device(device))
    assert calls == ([1] if threads == 1 else [])
    assert ("one thread; OMP_NUM_THREADS sets" in capsys.readouterr().out) == (threads == 1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", None])
def test_attention_implementation_of_a_saved_elm(llm, implementation, tmp_path):
    """As of LoRA's base, which is saved and loaded again: MERL has no attention."""
    options = {"encoder_config": TINY_ENCODERS["merl"], "num_samples": 500, "attn_implementation": implementation}
    model, processor = new_elm(str(llm), encoder="merl", **options)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, _ = load_elm(str(tmp_path), attn_implementation=implementation)
    assert loaded.model.language_model.config._attn_implementation == (implementation or "sdpa")


def test_load_elm(llm, tmp_path):
    args = arguments(llm)
    processor = build_processor(args)
    model = build_model(args, processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = load_elm(str(tmp_path))
    assert isinstance(loaded, ELMForConditionalGeneration)
    assert loaded_processor.num_ecg_tokens == 4
    assert loaded_processor.chat_template == processor.chat_template
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
