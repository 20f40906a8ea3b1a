import json

import pytest
import torch
from huggingface_hub import ModelCard
from reference_checkpoints import basic_merl, checkpoint_of, run, shrunk
from transformers import AutoTokenizer, BertConfig, BertModel

from elm_ecg.configuration_ecg_pretraining import MASKED_ENCODERS, mask_shape
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS
from elm_ecg.modeling_ecg_pretraining import ECGForPreTraining
from elm_ecg.training.sharing.checkpoint_keys import convert_pretraining_part, convert_state_dict
from helpers import golden_state_dict, run_isolated, tiny_tokenizer
from loopback_hub import card_errors

MERL = ["--encoder", "merl", "--segment_len", 500]


@pytest.fixture(scope="module")
def shapes(shared):
    """Reference key -> shape of each pretraining module."""
    return json.loads((shared / "golden/pretraining_state_dicts.json").read_text())


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    """A small text encoder of width 64, with its tokenizer."""
    folder = tmp_path_factory.mktemp("text_encoder")
    tokenizer = tiny_tokenizer("default", pad_token="</s>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def merl(tokens=250):
    """The pretraining of a small ResNet whose tokens have width 8; heads of width 16."""
    heads = {"downconv.weight": [16, 8, 1], "downconv.bias": [16]}
    heads |= {"att_pool_head.cls_token": [1, 1, 16], "att_pool_head.positional_embedding": [1, 1 + tokens, 16]}
    heads |= {"att_pool_head.mhsa.in_proj_weight": [48, 16], "att_pool_head.mhsa.in_proj_bias": [48]}
    for name in ("att_pool_head.mhsa.out_proj", "att_pool_head.c_proj", "proj_t.2"):
        heads |= {f"{name}.weight": [16, 16], f"{name}.bias": [16]}
    heads |= {
        "linear1.weight": [16, 16],
        "linear2.weight": [16, 16],
        "proj_t.0.weight": [16, 64],
        "proj_t.0.bias": [16],
    }
    return basic_merl() | golden_state_dict(heads)


@pytest.mark.parametrize("kind", MASKED_ENCODERS)
def test_every_entry_of_the_masked_pretraining_has_its_place(kind, shapes, tmp_path, capsys):
    weights = shrunk(shapes[kind])
    report = run(tmp_path / "run.pt", checkpoint_of(weights, "module."), "--encoder", kind, "--pretraining")
    assert (report["left_over"], report["missing"]) == ([], [])
    assert all("to_patch_embedding" in name for name in report["ignored"])
    assert len(report["used"]) + len(report["ignored"]) == len(weights)
    assert report["used"]["module.mask_embedding"] == "decoder.mask_token"
    assert "75% of the patches masked" in capsys.readouterr().out
    model = ECGForPreTraining.from_pretrained(tmp_path / "out")
    assert model.config.objectives == ["masked"]
    expected = convert_pretraining_part(kind, weights).tensors
    assert expected.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    output = model(torch.randn(1, 12, 2500))
    assert output.mask.shape == (1, *mask_shape(model.config))
    assert output.loss.isfinite()


def test_the_folder_has_the_encoder_alone(shapes, tmp_path):
    weights = shrunk(shapes["st_mem"])
    run(tmp_path / "run.pt", checkpoint_of(weights), "--encoder", "st_mem", "--pretraining", "--dtype", "bfloat16")
    folder = tmp_path / "out"
    card = ModelCard.load(folder / "encoder" / "README.md")
    assert card_errors(str(card)) == []
    assert "`run.pt`, a checkpoint" in card.text
    for name in ("preprocessor_config.json", "encoder/preprocessor_config.json", "conversion.json"):
        assert (folder / name).is_file()
    code = """
import torch
from transformers import AutoFeatureExtractor, AutoModel
for folder in ("out", "out/encoder"):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    print(model.config.model_type, model.dtype, extractor.num_samples, sum(p.numel() for p in model.parameters()))
"""
    whole, alone = (line.split() for line in run_isolated(code, tmp_path).splitlines())
    assert whole[:3] == ["ecg_pretraining", "torch.bfloat16", "2500"]
    assert alone[:3] == ["st_mem", "torch.bfloat16", "2500"]
    assert int(whole[3]) > int(alone[3])
    encoder = ENCODER_MODELS["st_mem"].from_pretrained(folder / "encoder")
    for name, tensor in convert_state_dict("st_mem", weights).items():
        assert torch.equal(encoder.state_dict()[name], tensor.bfloat16())


def test_merl_with_its_text_encoder(text_encoder, tmp_path, capsys):
    weights = merl()
    options = [*MERL, "--pretraining", "--text_encoder", text_encoder]
    report = run(tmp_path / "merl.pt", checkpoint_of(weights), *options)
    assert (report["left_over"], report["ignored"]) == ([], {})
    assert len(report["used"]) == len(weights)
    assert report["missing"]
    assert all(name.startswith("text_encoder.") for name in report["missing"])
    assert any("the text encoder is" in line for line in report["assumed"])
    assert "--text_pooling pooler" in capsys.readouterr().out
    model = ECGForPreTraining.from_pretrained(tmp_path / "out").eval()
    assert (model.config.objectives, model.config.num_encoder_tokens) == (["contrastive"], 250)
    for name, tensor in BertModel.from_pretrained(text_encoder).state_dict().items():
        assert torch.equal(model.text_encoder.state_dict()[name], tensor)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = tokenizer(["sinus rhythm", "atrial fibrillation"], padding=True, return_tensors="pt")
    output = model(torch.randn(2, 12, 500), input_ids=texts.input_ids, attention_mask=texts.attention_mask)
    assert output.loss.isfinite()
    encoder = ENCODER_MODELS["merl"].from_pretrained(tmp_path / "out/encoder")
    assert torch.equal(encoder.stem.conv.weight, weights["resnet.conv1.weight"])


def test_a_text_encoder_in_the_checkpoint_is_taken(text_encoder, tmp_path):
    torch.manual_seed(1)
    trained = BertModel(BertConfig.from_pretrained(text_encoder)).state_dict()
    weights = merl() | {f"lm_model.{name}": tensor for name, tensor in trained.items()}
    weights |= {"lm_model.embeddings.position_ids": torch.arange(512)[None], "logit_scale": torch.ones(1)}
    options = [*MERL, "--pretraining", "--text_encoder", text_encoder, "--text_pooling", "mean"]
    report = run(tmp_path / "merl.pt", checkpoint_of(weights), *options)
    assert (report["left_over"], report["missing"]) == (["logit_scale"], [])
    unread = {"lm_model.embeddings.position_ids", "lm_model.pooler.dense.weight", "lm_model.pooler.dense.bias"}
    assert report["ignored"].keys() == unread
    model = ECGForPreTraining.from_pretrained(tmp_path / "out")
    for name, tensor in model.text_encoder.state_dict().items():
        assert torch.equal(tensor, trained[name])


@pytest.mark.parametrize("name", ["ema_state_dict", "ema_model_state_dict", "ema"])
def test_the_moving_average_is_taken_where_there_is_one(name, tmp_path, capsys):
    own, averaged = basic_merl(), {key: tensor + 1 for key, tensor in basic_merl().items() if "running" not in key}
    content = checkpoint_of(own, "module.") | {name: averaged}
    report = run(tmp_path / "merl.pt", content, *MERL)
    assert f"the moving average, {name}; --weights model" in report["weights"]
    assert report["weights"] in capsys.readouterr().out
    model = ENCODER_MODELS["merl"].from_pretrained(tmp_path / "out")
    assert torch.equal(model.stem.conv.weight, averaged["resnet.conv1.weight"])
    assert torch.equal(model.stem.norm.running_mean, own["resnet.bn1.running_mean"])  # which it lacks


def test_the_own_weights_where_they_are_asked_for(tmp_path):
    content = checkpoint_of(basic_merl()) | {"ema": {key: tensor + 1 for key, tensor in basic_merl().items()}}
    report = run(tmp_path / "merl.pt", content, *MERL, "--weights", "model")
    assert report["weights"] == "the model's own, not the moving average, ema"
    assert "ema" in report["not_weights"]
    model = ENCODER_MODELS["merl"].from_pretrained(tmp_path / "out")
    assert torch.equal(model.stem.conv.weight, basic_merl()["resnet.conv1.weight"])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, ["--encoder", "st_mem", "--pretraining"], "has no entry for"),
        ({"downconv.weight": None}, [*MERL, "--pretraining", "TEXT"], r"no entry for heads\.projection\.weight"),
        ({"linear1.weight": None}, [*MERL, "--pretraining", "TEXT"], r"no entry for heads\.view_1\.weight"),
        ({"downconv.weight": torch.ones(3)}, [*MERL, "--pretraining", "TEXT"], r"is \[3\]; expected two dimensions"),
        ({"att_pool_head.cls_token": torch.ones(3)}, [*MERL, "--pretraining", "TEXT"], r"is \[3\] in the file, \[16\]"),
        (
            {"proj_t.0.weight": torch.ones(16, 32)},
            [*MERL, "--pretraining", "TEXT"],
            r"\[16, 32\] in the file.*--text_encoder",
        ),
        (
            {},
            ["--encoder", "merl", "--segment_len", 250, "--pretraining", "TEXT"],
            r"\[1, 251, 16\] in the file.*--num_samples",
        ),
        ({}, [*MERL, "--pretraining"], "--text_encoder .*or leave --pretraining out"),
        ({}, [*MERL, "TEXT"], "is for --pretraining"),
        ({}, ["--encoder", "mtae", "--pretraining", "TEXT"], "the pretraining of mtae reads no reports"),
        ({}, [*MERL, "--weights", "ema"], "holds no moving average"),
        ({}, [*MERL, "--pretraining", "--text_encoder", "nowhere/at all"], "--text_encoder nowhere/at all"),
    ],
)
def test_what_does_not_fit(change, options, message, text_encoder, tmp_path):
    weights = {key: tensor for key, tensor in (merl() | change).items() if tensor is not None}
    named = [
        part for option in options for part in (["--text_encoder", text_encoder] if option == "TEXT" else [option])
    ]
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "merl.pt", weights, *named)
    assert not (tmp_path / "out").exists()
