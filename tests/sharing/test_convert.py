import os
import re
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from reference_checkpoints import FUYU, basic_merl, checkpoint_of, fuyu, llm_weights, run, shrunk
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    Siglip2Config,
    Siglip2Model,
    ViTForMaskedImageModeling,
)

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.ecg_utils import REFERENCE_LEADS, STANDARD_LEADS
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS
from elm_ecg.training.load import load_elm
from elm_ecg.training.sharing.convert import convert_state_dict, main
from foreign_templates import PLAIN
from helpers import ROOT, golden_state_dict, run_isolated, save_tiny_llm, tiny_image_processor, tiny_vision_config
from loopback_hub import card_errors

CONNECTORS = ["linear", "mlp", "flat", "patch", "conv"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = save_tiny_llm(tmp_path_factory.mktemp("llm"), hidden_size=64)
    (folder / "chat_template.jinja").write_text(
        PLAIN.replace("'\\n'", "'<|eot_id|>'")
    )  # its own is not the reference's
    return folder


def test_full_size_encoder_gives_the_golden_tokens(shapes, shared, tmp_path, capsys):
    content = checkpoint_of(golden_state_dict(shapes["merl"]) | {"proj_t.weight": torch.ones(2)}, "module._orig_mod.")
    report = run(tmp_path / "merl.pt", content, "--encoder", "merl")
    assert (report["left_over"], report["missing"]) == ([], [])
    assert report["not_weights"] == ["optimizer_state_dict", "epoch", "step"]
    assert report["ignored"] == {"module._orig_mod.proj_t.weight": "of the pretraining, or there twice"}
    assert report["used"]["module._orig_mod.resnet.conv1.weight"] == "stem.conv.weight"
    assert "624 used, 1 not needed, 0 missing" in capsys.readouterr().out
    golden = load_file(shared / "golden/encoders.safetensors")
    model = ENCODER_MODELS["merl"].from_pretrained(tmp_path / "out").eval()
    assert (model.config.block, list(model.config.depths)) == ("bottleneck", [3, 4, 23, 3])
    with torch.no_grad():
        tokens = model(golden["input"]).last_hidden_state.transpose(1, 2)
    pooled, expected = torch.nn.functional.adaptive_avg_pool1d(tokens, 5).transpose(1, 2), golden["merl.tokens5"]
    assert (pooled - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", ["mlae", "mtae", "st_mem"])
@pytest.mark.minutes
@pytest.mark.slow
def test_other_full_size_encoders_give_the_golden_tokens(kind, shapes, shared, tmp_path):
    report = run(tmp_path / "encoder.pt", checkpoint_of(golden_state_dict(shapes[kind])), "--encoder", kind)
    assert (report["left_over"], report["missing"]) == ([], [])
    golden = load_file(shared / "golden/encoders.safetensors")
    model = ENCODER_MODELS[kind].from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        tokens = model(golden["input"]).last_hidden_state.transpose(1, 2)
    pooled, expected = torch.nn.functional.adaptive_avg_pool1d(tokens, 5).transpose(1, 2), golden[f"{kind}.tokens5"]
    assert (pooled - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", ["mlae", "mtae", "st_mem"])
def test_sizes_of_an_encoder_are_told_by_its_weights(kind, shapes, tmp_path):
    weights = shrunk(shapes[kind])
    run(tmp_path / "encoder.pt", checkpoint_of(weights), "--encoder", kind)
    model = ENCODER_MODELS[kind].from_pretrained(tmp_path / "out")
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.mlp_ratio) == (64, 1, 1, 4)
    assert (config.num_leads, config.num_samples, config.patch_size) == (12, 2500, 1 if kind == "mlae" else 100)
    assert model.dtype == torch.float32
    for name, tensor in convert_state_dict(kind, weights).items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_whole_elms_give_the_golden_features(kind, shapes, shared, llm, tmp_path):
    golden = load_file(shared / "golden/encoders.safetensors")
    llava = kind in ("linear", "mlp")
    weights = llm_weights(llm)
    elm = {"linear": "llava", "mlp": "mlp_llava", "flat": "base_elf", "patch": "fuyu", "conv": "conv_elf"}[kind]
    options = ["--llm", llm, "--elm", elm]
    if llava:  # one block of full width
        encoder = {key: shape for key, shape in shapes["st_mem"].items() if not re.search(r"block[1-9s]", key)}
        weights |= {f"encoder.{key}": tensor for key, tensor in golden_state_dict(encoder).items()}
        options += ["--encoder", "st_mem", "--num_encoder_tokens", 5]
    elif kind == "conv":
        options += ["--num_encoder_tokens", 50]
    connector = golden_state_dict(shapes[kind])
    weights |= {f"{'projection' if llava else 'project_layer'}.{key}": tensor for key, tensor in connector.items()}
    content = checkpoint_of(weights | {"loss_scale": torch.ones(1)}, "module.")
    report = run(tmp_path / "elm.pt", content, *options)
    assert (report["left_over"], report["missing"]) == (["module.loss_scale"], [])
    assert len(report["used"]) + len(report["ignored"]) + 1 == len(content["model_state_dict"])
    model, processor = load_elm(str(tmp_path / "out"))
    tokens = golden["st_mem.tokens5"]
    with torch.no_grad():
        features = model.model.connector(tokens) if llava else model.get_ecg_features(golden["input"])
    expected = load_file(shared / "golden/connectors.safetensors")[kind].reshape(features.shape)
    assert (features - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(model.lm_head.weight, weights["llm.llm.lm_head.weight"])
    extractor = processor.feature_extractor
    assert (extractor.normalization, tuple(extractor.lead_names)) == ("minmax", REFERENCE_LEADS)
    assert processor.chat_template == (ROOT / "training/templates/llama3.jinja").read_text()
    assert processor.chat_template_origin.endswith("<|end_header_id|> and <|eot_id|>, as in the reference")
    assert processor.num_ecg_tokens == (5 if llava else 1 if kind == "flat" else 50)


@pytest.mark.slow
def test_both_kinds_load_in_a_fresh_process(llm, tmp_path):
    (tmp_path / "encoder").mkdir()
    run(tmp_path / "encoder/merl.pt", checkpoint_of(basic_merl()), "--encoder", "merl", "--segment_len", 500)
    weights = llm_weights(llm) | {f"encoder.{key}": tensor for key, tensor in basic_merl().items()}
    connector = {"weight": [64, 8], "bias": [64]}
    weights |= {f"projection.projection.{key}": tensor for key, tensor in golden_state_dict(connector).items()}
    options = ["--llm", llm, "--elm", "llava", "--encoder", "merl", "--segment_len", 500, "--num_encoder_tokens", 3]
    run(tmp_path / "elm.pt", weights, *options, "--lead_names", *STANDARD_LEADS, "--dtype", "bfloat16")
    code = """
import numpy as np, torch
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForCausalLM, AutoProcessor
encoder = AutoModel.from_pretrained("encoder/out", trust_remote_code=True).eval()
extractor = AutoFeatureExtractor.from_pretrained("encoder/out", trust_remote_code=True)
print(extractor.normalization, extractor.num_samples, *extractor.lead_names[3:5])
print(encoder(torch.ones(1, 12, 500)).last_hidden_state.double().sum().item())
model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("out", trust_remote_code=True)
ecg = {"array": np.random.default_rng(0).normal(size=(12, 500)), "sampling_rate": 250}
chat = [{"role": "user", "content": [{"type": "ecg", "ecg": ecg}, {"type": "text", "text": "Rhythm?"}]}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
print(model.dtype, (inputs["input_ids"] == model.config.ecg_token_id).sum().item(), processor.feature_extractor.lead_names[3])
print(inputs["ecg_values"].min().item(), round(inputs["ecg_values"].max().item(), 3))
answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
print(answer.shape[1] > inputs["input_ids"].shape[1])
"""
    for folder, words in (("encoder/out", "`merl.pt`, a checkpoint"), ("out", "\n- 500 samples for each lead")):
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert card_errors(str(card)) == []
        assert words in card.text
        assert str(tmp_path) not in card.text
    extractor, encoded, *elm = run_isolated(code, tmp_path).splitlines()
    assert extractor == "minmax 500 aVL aVR"
    assert elm == ["torch.bfloat16 3 aVR", "0.0 1.0", "True"]
    model = ENCODER_MODELS["merl"](ENCODER_CONFIGS["merl"](block="basic", depths=[1], widths=[8])).eval()
    model.load_state_dict(convert_state_dict("merl", basic_merl()))
    expected = model(torch.ones(1, 12, 500)).last_hidden_state.double().sum().item()
    assert float(encoded) == pytest.approx(expected, rel=1e-5)


def test_lora_checkpoints_give_what_peft_gave(llm, tmp_path):
    """Of DDP and compile, with PEFT's names."""
    base = AutoModelForCausalLM.from_pretrained(llm)
    base.resize_token_embeddings(base.config.vocab_size + 1)
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    weights = {f"llm._orig_mod.llm.{key}": tensor.clone() for key, tensor in adapted.state_dict().items()}
    weights |= {key: tensor for key, tensor in fuyu(llm).items() if key.startswith("project_layer.")}
    report = run(tmp_path / "elm.pt", checkpoint_of(weights, "module."), "--llm", llm, *FUYU)
    assert (report["left_over"], report["missing"]) == ([], [])
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    ours = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert report["used"][f"module.llm._orig_mod.llm.{layer}.base_layer.weight"] == ours
    assert report["used"][f"module.llm._orig_mod.llm.{layer}.lora_A.default.weight"] == f"{ours} (merged)"
    assert any("LoRA of rank 16 has alpha 32" in line for line in report["assumed"])
    model, processor = load_elm(str(tmp_path / "out"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
        with adapted.disable_adapter():
            assert (model(input_ids=ids).logits - adapted(input_ids=ids).logits).abs().max() > 0.1
    assert processor.num_ecg_tokens == 5


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (
            "resnet.conv1.weight",
            lambda t: torch.tensor(1.0),
            r"stem\.conv\.weight of the merl weights is \[\]; expected 3",
        ),
        ("resnet.conv1.weight", lambda t: t[:0], r"is \[0, 12, 7\]; expected 3 dimensions, none of them empty"),
        ("resnet.bn1.weight", lambda t: t * torch.nan, r"stem\.norm\.weight has NaN or infinite values"),
        ("resnet.bn1.weight", lambda t: t.to(torch.int8), r"stem\.norm\.weight is of torch\.int8 .*expected floats"),
    ],
)
def test_weights_that_are_none(key, change, message, tmp_path):
    weights = basic_merl()
    weights[key] = change(weights[key])
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "merl.pt", weights, "--encoder", "merl", "--segment_len", 500)


@pytest.mark.slow
def test_changed_checkpoints_are_converted_or_refused_in_one_line(llm, tmp_path):
    """Entries that are missing, renamed, there twice, or of another shape, type or value."""
    random = np.random.default_rng(0)
    kinds = [
        (basic_merl(), ["--encoder", "merl", "--segment_len", 500]),
        (fuyu(llm), ["--llm", llm, *FUYU]),
        (llm_weights(llm, "llm."), ["--llm", llm, "--elm", "text"]),
    ]
    changes = [
        lambda t: t[..., :0] if t.ndim else t[None],
        lambda t: t.reshape(-1),
        lambda t: t[None],
        lambda t: t.T.contiguous() if t.ndim == 2 else t.reshape(-1)[:1],
        lambda t: t[:-1] if t.ndim else t.to(torch.complex64),
        lambda t: t.to(torch.int8),
        lambda t: t.double(),
        lambda t: t * torch.nan,
        lambda t: torch.tensor(1.0),
    ]
    refused = []
    for number in range(39):  # each change of each kind
        weights, options = dict(kinds[number % 3][0]), kinds[number % 3][1]
        key, other = random.choice(list(weights), 2)
        change = number % (len(changes) + 4)
        if change < len(changes):
            weights[key] = changes[change](weights[key])
        elif change == len(changes):
            del weights[key]
        elif change == len(changes) + 1:
            weights[f"module.{key}"] = weights[key]
        elif change == len(changes) + 2:
            weights[re.sub(r"\d+", str(random.integers(10**9)), key)] = weights.pop(key)
        else:
            weights[key] = weights[other]
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        try:
            run(tmp_path / "c.pt", weights, *options)
        except (ValueError, OSError) as error:
            refused.append(str(error))
    assert [message for message in refused if "\n" in message.strip()] == []
    assert 25 < len(refused) < 39


def test_blocks_that_are_missing(tmp_path):
    weights = basic_merl()
    weights["resnet.layer1.3000.conv1.weight"] = torch.ones(8, 8, 3)
    with pytest.raises(ValueError, match=r"has the index 3000, and there are .* others are missing"):
        run(tmp_path / "merl.pt", weights, "--encoder", "merl", "--segment_len", 500)


def test_lora_is_merged_in_float32(llm, tmp_path):
    """As a run of the reference holds it: a language model in bfloat16, and adapters in float32."""
    base = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.bfloat16)
    base.resize_token_embeddings(base.config.vocab_size + 1)
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    weights = {f"llm.llm.{key}": tensor.clone() for key, tensor in adapted.state_dict().items()}
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16, torch.float32}
    weights |= {key: tensor.bfloat16() for key, tensor in fuyu(llm).items() if key.startswith("project_layer.")}
    report = run(tmp_path / "elm.pt", checkpoint_of(weights), "--llm", llm, *FUYU)
    assert not any("rounded" in line for line in report["assumed"])
    model, _ = load_elm(str(tmp_path / "out"))
    ids = torch.arange(60)[None]
    with torch.no_grad():
        expected = adapted.float()(input_ids=ids).logits
        found = model(input_ids=ids).logits
    assert model.dtype == torch.float32
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    shutil.rmtree(tmp_path / "out")
    # without another type, adapters of bfloat16 alone make float32 too
    weights = {key: tensor.bfloat16() for key, tensor in weights.items()}
    report = run(tmp_path / "elm.pt", checkpoint_of(weights), "--llm", llm, *FUYU)
    assert any("all weights become torch.float32" in line for line in report["assumed"])
    shutil.rmtree(tmp_path / "out")
    report = run(tmp_path / "elm.pt", checkpoint_of(weights), "--llm", llm, *FUYU, "--dtype", "bfloat16")
    assert "LoRA is merged in float32, and the sum is then rounded to bfloat16, as --dtype says" in report["assumed"]
    assert load_elm(str(tmp_path / "out"))[0].dtype == torch.bfloat16


def test_one_token_for_each_ecg_unless_another_number_is_said(llm, tmp_path, capsys):
    """The reference's default, which its checkpoints do not state; patches are told by the weights."""
    weights = llm_weights(llm) | {f"encoder.{key}": tensor for key, tensor in basic_merl().items()}
    connector = {"weight": [64, 8], "bias": [64]}
    weights |= {f"projection.projection.{key}": tensor for key, tensor in golden_state_dict(connector).items()}
    options = ["--llm", llm, "--elm", "llava", "--encoder", "merl", "--segment_len", 500]
    for given, expected in (([], 1), (["--num_ecg_tokens", 3], 3)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        run(tmp_path / "elm.pt", weights, *options, *given)
        assert load_elm(str(tmp_path / "out"))[1].num_ecg_tokens == expected
        told = "Assumed: 1 token for each ECG, the reference's default; give another number with --num_ecg_tokens"
        assert (told in capsys.readouterr().out) == (not given)
    shutil.rmtree(tmp_path / "out")
    report = run(tmp_path / "elm.pt", fuyu(llm), "--llm", llm, *FUYU)
    assert load_elm(str(tmp_path / "out"))[1].num_ecg_tokens == 5
    assert not any("for each ECG" in line for line in report["assumed"])


@pytest.mark.parametrize("model_type", ["clip_vision_model", "siglip2_vision_model", "vit"])
def test_vision_backbones(model_type, llm, tmp_path):
    """Weights under the names that transformers had when the reference was trained."""
    torch.manual_seed(3)
    folder = tmp_path / "backbone"
    if model_type == "vit":
        config = tiny_vision_config("vit", encoder_stride=32)
        model = ViTForMaskedImageModeling(config)
    else:
        text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        vision = tiny_vision_config(model_type).to_dict()
        if model_type == "clip_vision_model":
            model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=24))
        else:
            model = Siglip2Model(Siglip2Config(vision_config=vision, text_config=text))
    model.save_pretrained(folder)
    tiny_image_processor(model_type).image_processor.save_pretrained(folder)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "trained")  # transformers writes them under the older names
    trained = load_file(tmp_path / "trained/model.safetensors")
    older = {
        "clip_vision_model": "vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "siglip2_vision_model": "vision_model.head.attention.in_proj_weight",
        "vit": "vit.encoder.layer.0.attention.attention.query.weight",
    }
    assert older[model_type] in trained
    width = 24 if model_type == "clip_vision_model" else 32
    weights = llm_weights(llm) | {f"encoder.vision_encoder.{key}": tensor for key, tensor in trained.items()}
    weights |= {"projection.projection.weight": torch.ones(64, width), "projection.projection.bias": torch.ones(64)}
    options = ["--llm", llm, "--elm", "llava", "--encoder_name_or_path", folder, "--data_representation", "rgb"]
    report = run(tmp_path / "elm.pt", weights, *options)
    assert report["left_over"] == []
    left_out = "of the masked pretraining" if model_type == "vit" else "of the text tower"
    assert set(report["ignored"].values()) == {left_out}
    missing = [f"model.encoder.pooler.dense.{name}" for name in ("bias", "weight")]
    assert report["missing"] == (missing if model_type == "vit" else [])
    elm, processor = load_elm(str(tmp_path / "out"))
    tower = elm.model.encoder.state_dict()
    source = {"vit": getattr(model, "vit", None), "siglip2_vision_model": getattr(model, "vision_model", None)}
    source = (source.get(model_type) or model).state_dict()
    assert all(torch.equal(tensor, source[name]) for name, tensor in tower.items() if not name.startswith("pooler."))
    if model_type == "siglip2_vision_model":
        record = {"array": np.random.default_rng(0).normal(size=(12, 2500)), "sampling_rate": 250}
        inputs = processor(text="<signal>", ecgs=[record], return_tensors="pt")
        pixels = {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}
        with torch.no_grad():
            expected = model.get_image_features(**pixels).pooler_output
            found = elm.get_ecg_features(**pixels)
        connector = elm.model.connector
        torch.testing.assert_close(
            found.reshape(1, -1), connector(expected[:, None]).reshape(1, -1), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"--encoder is None; expected one of merl, mlae"),
        (["--encoder", "vit"], r"--encoder is vit; expected one of merl, mlae"),
        (["--encoder", "st_mem"], r"no entry for embeddings\.lead_embeddings, .* which a st_mem encoder needs"),
        (["--encoder", "merl", "--llm", "nowhere"], "holds no language model.*leave --llm out"),
        (["--encoder", "merl", "--lead_names", "I", "II"], "are of 12 leads, --lead_names are 2: name those"),
        (["--encoder", "merl", "--representation", "rgb"], "holds no language model.*leave --representation rgb out"),
        (["--encoder", "merl", "--train_phase", "rl"], "holds no language model.*leave --train_phase rl out"),
        (["--encoder", "merl", "--explicit_thinking"], "holds no language model.*leave --explicit_thinking out"),
    ],
)
def test_options_that_do_not_fit_an_encoder(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "merl.pt", checkpoint_of(basic_merl()), *options)
    assert [path.name for path in tmp_path.iterdir()] == ["merl.pt"]


def test_segment_of_another_length(shapes, tmp_path):
    for kind, message in (("st_mem", "of 2500 samples, --num_samples is 1250"), ("mtae", "25 patches of 1200 values")):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "e.pt", shrunk(shapes[kind]), "--encoder", kind, "--segment_len", 1250)


@pytest.mark.parametrize(
    ("drop", "options", "message"),
    [
        (None, [], r"holds a language model.*--llm"),
        (
            "project_layer.projection.bias",
            ["--llm"],
            r"no entry for projection\.bias, which the patch connector .* needs",
        ),
        ("llm.llm.lm_head.weight", ["--llm"], r"no entry for lm_head\.weight, which --llm .* needs"),
        ("llm.llm.model.norm.weight", ["--llm"], r"no entry for model\.language_model\.norm\.weight"),
        (None, ["--llm", "--num_encoder_tokens", 4], "makes 5 tokens of 12 leads x 500 samples"),
        (None, ["--llm", "--segment_len", 550], r"makes 5\.5 tokens of 12 leads x 550 samples"),
        (None, ["--llm", "--elm", "llava", "--encoder_name_or_path", "here"], "leave --encoder_name_or_path out"),
        (None, ["--llm", "--elm", "llava"], "--encoder is missing"),
        (None, ["--llm", "--elm", "llava", "--encoder", "merl"], r"no entry for stages|no entry for stem"),
        (None, ["--llm", "--elm", "conv_elf"], r"no entry for conv1\.bias"),
    ],
)
def test_what_is_missing_is_an_error_and_nothing_is_written(drop, options, message, llm, tmp_path):
    weights = fuyu(llm)
    if drop is not None:
        del weights[drop]
    options = [part for option in options for part in ((option, llm) if option == "--llm" else (option,))]
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "elm.pt", checkpoint_of(weights), *FUYU, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["elm.pt"]


def test_a_language_model_of_another_size(llm, tmp_path):
    other = save_tiny_llm(tmp_path / "other", hidden_size=32)
    with pytest.raises(ValueError, match=r"is \[64.*\] in the file, \[32.*\] in the model; check --llm"):
        run(tmp_path / "elm.pt", fuyu(llm), "--llm", other, *FUYU)
    assert not (tmp_path / "out").exists()


def test_options_are_those_of_a_model_alone(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert {"--llm", "--connector", "--lora_alpha"} <= set(re.findall(r"--\w+", text))
    assert not {"--data", "--update", "--augment_ecg", "--time_shift", "--wandb"} & set(re.findall(r"--\w+", text))


def test_output_dir(tmp_path):
    with pytest.raises(ValueError, match="--output_dir is missing"):
        main([str(tmp_path / "merl.pt"), "--encoder", "merl"])
    (tmp_path / "out").mkdir()
    report = run(tmp_path / "merl.pt", basic_merl(), "--encoder", "merl")  # an empty folder is taken
    assert report["not_weights"] == []
    before = (tmp_path / "out/model.safetensors").stat()
    with pytest.raises(ValueError, match="is there and not empty; name another"):
        run(tmp_path / "merl.pt", basic_merl(), "--encoder", "merl")
    assert (tmp_path / "out/model.safetensors").stat() == before


class Evil:
    """Its pickle makes the file `owned` in the working directory."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def test_a_hostile_checkpoint_executes_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"hostile\.pt is refused.*Nothing of it was executed"):
        run(tmp_path / "hostile.pt", {"model_state_dict": basic_merl(), "epoch": Evil()}, "--encoder", "merl")
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.pt"]


def test_the_widest_dtype_unless_another_is_said(llm, tmp_path):
    weights = {key: tensor.bfloat16() if key.startswith("llm.") else tensor for key, tensor in fuyu(llm).items()}
    report = run(tmp_path / "elm.pt", weights, "--llm", llm, *FUYU)
    assert any("all weights become torch.float32" in line for line in report["assumed"])
    saved = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert torch.equal(saved["model.connector.projection.weight"], weights["project_layer.projection.weight"])
    shutil.rmtree(tmp_path / "out")
    run(tmp_path / "elm.pt", weights, "--llm", llm, *FUYU, "--dtype", "bfloat16")
    saved = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_a_failure_while_saving_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left on the disk")

    monkeypatch.setattr("elm_ecg.training.sharing.convert.write_text", full)
    with pytest.raises(OSError, match="no space left"):
        run(tmp_path / "merl.pt", basic_merl(), "--encoder", "merl")
    assert [path.name for path in tmp_path.iterdir()] == ["merl.pt"]
