import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionConfig, GPT2Config, ViTForImageClassification, ViTModel

from elm_ecg.modeling_common import attention_of, stay_frozen
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS, MERLModel
from elm_ecg.modeling_elm import ELMForConditionalGeneration, ELMModel
from elm_ecg.modeling_vision_encoders import load_vision_model, vision_model_class
from helpers import (
    TINY_VISION,
    fork_project,
    save_tiny_llm,
    tiny_elm,
    tiny_image_elm_config,
    tiny_image_processor_elm,
    tiny_processor,
    tiny_vision_config,
)

# a saved adapter answers in a fresh process as it did where it was trained
LOAD = """
import sys, torch
from elm_ecg.training.load import load_elm
model, _ = load_elm(sys.argv[1])
inputs, expected = torch.load(f"{sys.argv[1]}/expected.pt")
with torch.no_grad():
    print((model(**inputs).logits - expected).abs().max().item())
"""


def small_elm(ecg_part):
    """And its processor, and a batch."""
    torch.manual_seed(0)
    if ecg_part in TINY_VISION:
        processor = tiny_image_processor_elm(ecg_part)
        model = ELMForConditionalGeneration(tiny_image_elm_config(ecg_part, ecg_token_id=processor.ecg_token_id))
        batch = {"pixel_values": torch.randn(3, 3, 64, 64)}
    else:
        processor = tiny_processor()
        model = tiny_elm(processor, ecg_part=ecg_part)
        batch = {"ecg_values": torch.randn(3, 12, 500)}
    ids = [processor.ecg_token_id] * model.config.num_ecg_tokens + [5, 6, 7]
    return model, processor, {"input_ids": torch.tensor([ids] * 3), **batch}


def train(model, batch):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("ecg_part", ["merl", "resnet"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["model.encoder"]}], ids=["adapted", "trained in full"])
def test_a_saved_adapter_is_what_was_trained(ecg_part, options, tmp_path):
    """The running statistics of batch norm stay as they are, or are saved."""
    model, processor, batch = small_elm(ecg_part)
    model.save_pretrained(tmp_path / "base")
    targets = r".*language_model.*_proj" if options else r".*language_model.*_proj|.*encoder.*\.(conv|convolution)"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, **options))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    before = {name: value.clone() for name, value in adapted.named_buffers() if "running" in name}
    assert before
    train(adapted, batch)
    moved = [name for name, value in adapted.named_buffers() if "running" in name and not value.equal(before[name])]
    assert bool(moved) == bool(options)
    if not options:
        assert any("lora" in name and "encoder" in name for name, _ in adapted.named_parameters())
    adapted.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        torch.save((batch, adapted(**batch).logits), tmp_path / "adapter" / "expected.pt")
    process = fork_project(LOAD, str(tmp_path / "adapter")).finish()
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) < 1e-5


def test_batch_norm_without_weights_of_its_own():
    part = nn.Sequential(nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2, affine=False))
    for trained in (True, False):
        part[0].bias.requires_grad_(trained)
        stay_frozen(part.train())
        assert part[1].training == trained  # of an adapted part some is frozen
        assert part[0].training


def test_a_frozen_language_model_has_no_dropout():
    """And is checkpointed all the same, as gradients go through it to the connector."""
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.5, embd_pdrop=0.5)
    processor = tiny_processor()
    model = tiny_elm(processor, llm=config, ecg_part="patch").train()
    ids = torch.tensor([[processor.ecg_token_id] * 4 + [5, 6]])
    batch = {"input_ids": ids, "ecg_values": torch.randn(1, 12, 500)}
    assert not model(**batch).logits.equal(model(**batch).logits)
    model.model.language_model.requires_grad_(False)
    model.train()
    expected = model(**batch).logits
    assert model(**batch).logits.equal(expected)
    runs = []
    model.model.language_model.h[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable()
    model.train()
    logits = model(**batch).logits
    logits.sum().backward()
    assert len(runs) == 2
    assert model.model.connector.projection.weight.grad.abs().sum() > 0
    model.model.language_model.requires_grad_(True)
    model.train()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("ecg_part", ["merl", "st_mem", "resnet", "siglip2_vision_model"])
def test_the_encoder_takes_an_attention_implementation_where_it_has_it(ecg_part, implementation, tmp_path):
    model, _, batch = small_elm(ecg_part)
    of_encoder = model.config.encoder_config._attn_implementation
    model.save_pretrained(tmp_path)
    loaded = ELMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation)
    # which of them have it, as of transformers and of our encoders
    supported = {"st_mem": True, "siglip2_vision_model": implementation != "flex_attention"}.get(ecg_part, False)
    model.set_attn_implementation(implementation)
    for elm in (loaded, model):
        assert elm.model.language_model.config._attn_implementation == implementation
        taken = elm.model.encoder.config._attn_implementation
        assert taken == (implementation if supported or implementation == "eager" else of_encoder)
    if implementation == "sdpa" and ecg_part == "merl":
        assert loaded(**batch).logits.isfinite().all()


def test_attention_of_kernels_and_none():
    assert attention_of(MERLModel, "kernels-community/flash-attn3") is None
    assert attention_of(ENCODER_MODELS["st_mem"], "flash_attention_2") == "flash_attention_2"
    assert attention_of(MERLModel, None) is None
    clip = vision_model_class(CLIPVisionConfig(), "patches")
    assert attention_of(clip, "sdpa") == "sdpa"


def drop(folder, *names):
    """Takes weights out of the files of a saved model."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    for name in names:
        assert tensors.pop(name, None) is not None
    save_file(tensors, path, {"format": "pt"})


LACKS = "is not complete: its files lack {}. Random numbers would stand there"


class TestMissingWeights:
    def test_of_an_elm(self, tmp_path):
        model, _, _ = small_elm("merl")
        model.save_pretrained(tmp_path)
        drop(tmp_path, "lm_head.weight", "model.connector.linear_1.bias")
        with pytest.raises(ValueError, match=LACKS.format("lm_head.weight, model.connector.linear_1.bias")):
            ELMForConditionalGeneration.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match=LACKS.format("connector.linear_1.bias")):  # which has no head
            ELMModel.from_pretrained(tmp_path)

    def test_tied_ones_are_not(self, tmp_path):
        model = tiny_elm(tiny_processor(), family="qwen2_5")
        model.save_pretrained(tmp_path)
        loaded, info = ELMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()

    def test_of_an_encoder(self, tmp_path):
        small_elm("merl")[0].model.encoder.save_pretrained(tmp_path)
        drop(
            tmp_path,
            *(f"stages.{stage}.0.convs.0.norm.running_var" for stage in (0, 1)),
            "stem.norm.bias",
            "stem.norm.weight",
        )
        with pytest.raises(ValueError, match=LACKS.format("stages.0.*, stages.1.*, stem.norm.bias and 1 more")):
            MERLModel.from_pretrained(tmp_path)

    def test_of_a_language_model(self, tmp_path):
        save_tiny_llm(tmp_path)
        drop(tmp_path, "model.layers.1.mlp.up_proj.weight")
        with pytest.raises(ValueError, match=LACKS.format("model.layers.1.mlp.up_proj.weight")):
            ELMForConditionalGeneration.from_encoder_llm_pretrained(
                tmp_path, architecture="fuyu", connector="flat", ecg_token_id=7
            )
        assert AutoModelForCausalLM.from_pretrained(tmp_path)  # transformers alone warns

    def test_of_a_vision_backbone(self, tmp_path):
        """The pooler of a ViT that was saved as a classifier is missing, and never read."""
        ViTForImageClassification(tiny_vision_config("vit")).save_pretrained(tmp_path / "classifier")
        for features in ("patches", "embedding"):
            load_vision_model(tmp_path / "classifier", features)
        ViTModel(tiny_vision_config("vit")).save_pretrained(tmp_path / "cut")
        (name, *_) = (name for name in load_file(tmp_path / "cut" / "model.safetensors") if "layernorm" in name)
        drop(tmp_path / "cut", name)
        with pytest.raises(ValueError, match="is not complete: its files lack"):
            load_vision_model(tmp_path / "cut", "patches")
