"""`elm export`: what it writes is loaded in fresh processes without this project, and answers as the ELM does."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoImageProcessor, AutoModel

from elm_ecg.ecg_utils import STANDARD_LEADS
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training import cli
from elm_ecg.training.encoders import load_encoder
from elm_ecg.training.load import load_elm
from elm_ecg.training.serving.engine import Prompt
from elm_ecg.training.serving.vllm_engine import prompt_embeddings
from elm_ecg.training.sharing.push import code_of
from helpers import (
    run_isolated,
    tiny_elm_config,
    tiny_image_elm_config,
    tiny_image_processor_elm,
    tiny_llm_config,
    tiny_processor,
    tiny_symbolic_processor,
)

GRANITE = {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
RATE = {"sampling_rate": 100, "lead_names": STANDARD_LEADS, "unit": "mV"}


def llm_config(processor: Any, family: str = "default", **changes: Any) -> Any:
    """Of random weights that make much of what they read, and never end an answer by themselves."""
    changes = {"initializer_range": 0.3, "eos_token_id": 1, "head_dim": 16} | changes
    config = tiny_llm_config("default", processor.ecg_token_id, **changes)
    return config if family == "default" else CONFIG_MAPPING[family](**config.to_dict() | changes)


def signal_elm(family: str = "default", ecg_part: str = "merl", **changes: Any) -> tuple[Any, Any]:
    """The placeholder lies beyond the vocabulary."""
    processor = tiny_processor("default", sampling_rate=100)
    llm = llm_config(processor, family, **changes)
    return tiny_elm_config(ecg_part, llm=llm, ecg_token_id=processor.ecg_token_id, num_samples=500), processor


def picture_elm(representation: str, family: str, **changes: Any) -> tuple[Any, Any]:
    processor = tiny_image_processor_elm("vit", representation)
    llm = llm_config(processor, family, **changes)
    return tiny_image_elm_config("vit", representation, llm=llm, ecg_token_id=processor.ecg_token_id), processor


def symbolic_elm() -> tuple[Any, Any]:
    processor = tiny_symbolic_processor("default")
    ids = processor.signal_token_ids
    signals = {"first_signal_token_id": ids[0], "num_signal_tokens": len(ids), "representation": "symbolic"}
    llm = llm_config(processor, max_position_embeddings=8192, tie_word_embeddings=True)
    return tiny_elm_config(None, llm=llm, ecg_token_id=processor.ecg_token_id, **signals), processor


# the representations, heads that are tied or not, with a scale, embeddings with one, an adapter, experts and states
CASES: dict[str, Any] = {
    "signal": lambda: signal_elm(),
    "symbolic": symbolic_elm,
    "rgb": lambda: picture_elm("rgb", "granite", **GRANITE),
    "stacked_signal": lambda: picture_elm("stacked_signal", "gemma3_text", sliding_window=512),
    "adapter": lambda: signal_elm(ecg_part="patch"),
    "experts": lambda: signal_elm("jamba", num_experts=4, attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4),
}
SLOW = ("experts", "stacked_signal")
PARAMETERS = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]
NUM_TOKENS = 8


def chats() -> list[list[dict[str, Any]]]:
    """About none, one and two ECGs."""
    rng = np.random.default_rng(0)
    ecgs = [{"type": "ecg", "ecg": rng.normal(0, 0.3, (12, 500)).cumsum(1).astype(np.float32), **RATE} for _ in "12"]
    return [[{"role": "user", "content": [*ecgs[:number], {"type": "text", "text": "Why?"}]}] for number in range(3)]


class Exported:
    """An ELM of a case, its greedy answers, and the prompts as embeddings beside the exported language model."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        config, processor = CASES[name]()
        torch.manual_seed(0)
        model = ELMForConditionalGeneration(config).eval()
        with torch.no_grad():
            for part in (model.model.connector, model.model.signal_embeddings):
                for parameter in () if part is None else part.parameters():
                    parameter.normal_(std=0.5)
        model.save_pretrained(folder / "elm")
        processor.save_pretrained(folder / "elm")
        place = folder / "elm"
        if name == "adapter":  # on all of the language model, and a connector that is saved whole
            place = folder / "adapter"
            lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], modules_to_save=["model.connector"])
            adapted = get_peft_model(load_elm(str(folder / "elm"))[0], lora)
            with torch.no_grad():
                for weight_name, weight in adapted.named_parameters():
                    if "lora_B" in weight_name:
                        weight.normal_(std=0.2)
            adapted.save_pretrained(place)
            processor.save_pretrained(place)
        self.place = place
        self.model, self.processor = model, processor = load_elm(str(place))
        self.answers, prompts = [], {}
        for number, chat in enumerate(chats()):
            inputs = dict(
                processor.apply_chat_template(
                    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
                )
            )
            with torch.inference_mode():
                tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NUM_TOKENS)
            self.answers += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])
            ecgs = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
            prompts[str(number)] = prompt_embeddings(model, Prompt(inputs["input_ids"][0].tolist(), ecgs)).contiguous()
        assert cli.main(["export", str(place), "--part", "llm", "--output_dir", str(folder / "llm")]) == 0
        save_file(prompts, folder / "prompts.safetensors")


ANSWER = """
import json, sys
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

found = {}
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder + "/llm", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys")), info
    tokenizer = AutoTokenizer.from_pretrained(folder + "/llm")
    chat = [{"role": "user", "content": "Why?"}]
    found[folder] = {
        "class": type(model).__name__,
        "answers": [
            tokenizer.decode(model.generate(inputs_embeds=prompt.unsqueeze(0), do_sample=False, max_new_tokens=NUM_TOKENS)[0])
            for _, prompt in sorted(load_file(folder + "/prompts.safetensors").items())
        ],
        "size": max(tokenizer.get_vocab().values()) + 1,
        "vocab_size": model.config.vocab_size,
        "prompt": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
        "stop": model.generation_config.eos_token_id,
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Any:
    """Makes a case, once."""
    return functools.cache(lambda name: Exported(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def loaded(exported, request, tmp_path_factory) -> dict[str, Any]:
    """What a fresh process without this project tells of each case that is tested."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    folders = {name: str(exported(name).folder) for name in sorted({item.callspec.params["name"] for item in here})}
    code = f"import sys\nsys.argv[1:] = {[*folders.values()]!r}\n" + ANSWER.replace("NUM_TOKENS", str(NUM_TOKENS))
    found = json.loads(run_isolated(code, tmp_path_factory.mktemp("isolated")).splitlines()[-1])
    return {name: found[folder] for name, folder in folders.items()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_language_model_answers_as_the_elm(name, exported, loaded):
    found, elm = loaded[name], exported(name)
    assert found["answers"] == elm.answers
    assert len(set(elm.answers)) == 3  # the ECGs matter
    classes = {"rgb": "GraniteForCausalLM", "stacked_signal": "Gemma3ForCausalLM", "experts": "JambaForCausalLM"}
    assert found["class"] == classes.get(name, "LlamaForCausalLM")
    assert found["size"] == found["vocab_size"]  # a token of ECGs would have no row
    assert found["stop"] == elm.model.generation_config.eos_token_id
    chat = [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    assert found["prompt"] == elm.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def export(capsys, *options: Any) -> str:
    assert cli.main(["export", *map(str, options)]) == 1
    return capsys.readouterr().err


def test_encoder(exported, tmp_path):
    for name in ("signal", "rgb"):
        arguments = [str(exported(name).place), "--part", "encoder", "--output_dir", str(tmp_path / name)]
        assert cli.main(["export", *arguments]) == 0
    model, processor = exported("signal").model, exported("signal").processor
    encoder = load_encoder(str(tmp_path / "signal"))
    own_code = {"auto_map": {"AutoFeatureExtractor": "feature_extraction_elm.ECGFeatureExtractor"}}
    assert encoder.extractor.to_dict() == processor.feature_extractor.to_dict() | own_code
    assert "feature_extraction_elm.py" in code_of(
        tmp_path / "signal", "encoder"
    )  # which `elm push` shares; none is missing
    ecg = processor.feature_extractor([chats()[1][0]["content"][0]["ecg"]], **RATE, return_tensors="pt")["ecg_values"]
    with torch.no_grad():
        expected = model.model.encoder(ecg).last_hidden_state
        torch.testing.assert_close(encoder.model(ecg).last_hidden_state, expected, rtol=0, atol=0)
    code = (
        "from transformers import AutoModel, AutoFeatureExtractor\n"
        f"model = AutoModel.from_pretrained({str(tmp_path / 'signal')!r}, trust_remote_code=True)\n"
        f"extractor = AutoFeatureExtractor.from_pretrained({str(tmp_path / 'signal')!r}, trust_remote_code=True)\n"
        "print(type(model).__name__, extractor.num_samples)\n"
    )
    assert run_isolated(code, tmp_path).splitlines()[-1] == "MERLModel 500"
    assert "ecg-encoder" in (tmp_path / "signal" / "README.md").read_text()
    assert type(AutoModel.from_pretrained(tmp_path / "rgb")).__name__ == "ViTModel"
    assert dict(AutoImageProcessor.from_pretrained(tmp_path / "rgb").size) == {"height": 160, "width": 160}


def test_there_is_no_such_part(exported, tmp_path, capsys):
    for name, reads in (("symbolic", "reads text alone"), ("adapter", "puts records through its connector alone")):
        folder = exported(name).place
        told = export(capsys, folder, "--part", "encoder", "--output_dir", tmp_path / "out")
        assert f"--part encoder: the ELM {folder} has no encoder, it {reads}" in told
    assert list(tmp_path.iterdir()) == []


def test_a_text_part_without_a_class_of_its_own(tmp_path, capsys):
    processor = tiny_processor("default", sampling_rate=100)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    sizes = tiny_llm_config("default", processor.ecg_token_id, head_dim=16).to_dict() | {"rope_parameters": rope}
    config = tiny_elm_config("patch", llm=CONFIG_MAPPING["qwen3_vl_text"](**sizes), ecg_token_id=processor.ecg_token_id)
    ELMForConditionalGeneration(config).save_pretrained(tmp_path / "elm")
    processor.save_pretrained(tmp_path / "elm")
    told = export(capsys, tmp_path / "elm", "--part", "llm", "--output_dir", tmp_path / "out")
    assert "The language model is the 'qwen3_vl_text' part of a larger one" in told
    assert not (tmp_path / "out").exists()
