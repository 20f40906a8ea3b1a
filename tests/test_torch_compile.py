"""A compiled step is one graph: at each break the GPU waits for Python."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_features import inputs_of

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from helpers import TINY_VISION, tiny_elm_config, tiny_image_elm_config

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is compiled before."""
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("ecg_part", "lora"),
    [pytest.param("mtae", True, marks=pytest.mark.minutes), ("patch", False), ("clip_vision_model", False)],
)
def test_forward_in_training_is_one_graph(ecg_part, lora):
    """With ECGs and, but for one of them, without; blocks are checkpointed, and the vision backbone is frozen."""
    torch.manual_seed(0)
    pictures = ecg_part in TINY_VISION
    config = tiny_image_elm_config(ecg_part) if pictures else tiny_elm_config(ecg_part)
    model = elm = ELMForConditionalGeneration(config)
    if lora:
        model = get_peft_model(
            elm, LoraConfig(target_modules=r".*language_model.*_proj", modules_to_save=["connector", "encoder"])
        )
    if pictures:
        elm.model.encoder.requires_grad_(False)
    elm.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    input_ids = torch.randint(1, 200, (2, 20))
    inputs = {"input_ids": input_ids, "labels": input_ids, "use_cache": False}
    placeholders = input_ids.clone()
    placeholders[:, 3 : 3 + config.num_ecg_tokens] = config.ecg_token_id
    ecgs = {"ecg_values": torch.randn(2, 12, 500)} if ecg_part == "patch" else inputs_of(ecg_part, 2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for batch in [inputs | ecgs | {"input_ids": placeholders}, inputs][: 1 if ecg_part == "patch" else 2]:
        loss = compiled(**batch).loss
        loss.backward()
        assert model.get_output_embeddings().weight.grad is not None or lora
        torch.testing.assert_close(loss, model(**batch).loss)
