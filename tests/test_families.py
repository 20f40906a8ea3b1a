"""Language models of every family in an ELM: built, trained, asked, saved and loaded."""

import copy
import functools
import json
import os
import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl.trainer.utils import add_fused_lm_head

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.modeling_language_models import load_language_model
from elm_ecg.training.evaluation.answers import Answerer
from elm_ecg.training.evaluation.questions import list_questions
from elm_ecg.training.lora import linear_layers
from elm_ecg.training.packing import keeps_apart, max_tokens_to_share
from forks import Fork
from helpers import tiny_processor

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28}
QWEN_TOWER = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 32}
QWEN_TOWER |= {"num_position_embeddings": 16}
# Qwen3-Next and Qwen3.5: a layer with a state, and one with keys and values
DELTA_NET = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16}
DELTA_NET |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300, "sliding_window": 512}
GEMMA_4 = {**PER_LAYER, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}

# what a family's smallest configuration has beside `SIZES`, or of a model that reads more than text, all of it
FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {},
    "phi3": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "olmo2": {},
    "smollm3": {},
    "apertus": {},
    "arcee": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 512},
    # heads with a scale or a bias
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere2": {"logit_scale": 0.25},
    "phi": {},
    "gptj": {"rotary_dim": 8},
    # experts, and attention with a sink
    "gpt_oss": {**EXPERTS, "intermediate_size": 32, "sliding_window": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    # layers with a state
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "nemotron_h": {**EXPERTS, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "num_hidden_layers": 4, "n_routed_experts": 4, "moe_shared_expert_intermediate_size": 32, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16},
    "granitemoehybrid": {**MAMBA, **EXPERTS, "num_local_experts": 4, "shared_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"], "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "olmo_hybrid": {**DELTA_NET, "linear_num_key_heads": 2, "linear_num_value_heads": 2},
    "lfm2_moe": {**EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "n_mamba_heads": 4, "mamba_d_state": 16, "head_dim": 32, "chunk_size": 16, "num_key_value_heads": 2, "use_mem_rope": True, "use_shared_attention_adapter": True, "adapter_rank": 4},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "embedding_multiplier": 5.6, "lm_head_multiplier": 0.5, "ssm_multipliers": [0.4, 0.25, 0.2, 0.5, 0.3]},
    "jamba": {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
    "qwen3_next": {**DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 32},
    # the text part of models that read pictures too
    "gemma3": {"text_config": {**SIZES, "sliding_window": 512}, "vision_config": {**TOWER, "patch_size": 14}, "mm_tokens_per_image": 4},
    "gemma4": {"text_config": {**SIZES, **GEMMA_4}, "vision_config": {**TOWER, "head_dim": 16, "global_head_dim": 16, "num_key_value_heads": 1, "position_embedding_size": 8}},
    "mistral3": {"text_config": {**SIZES, "model_type": "mistral"}, "vision_config": {**TOWER, "patch_size": 14, "head_dim": 16, "model_type": "pixtral"}, "tie_word_embeddings": False},
    "qwen3_vl": {"text_config": {**SIZES, "rope_parameters": MROPE}, "vision_config": {**QWEN_TOWER, "deepstack_visual_indexes": [0]}, "tie_word_embeddings": True},
    "qwen3_5": {"text_config": {**SIZES, **DELTA_NET}, "vision_config": QWEN_TOWER, "tie_word_embeddings": True},
}  # fmt: skip

FUYU = {"architecture": "fuyu", "connector": "patch", "num_samples": 500, "num_ecg_tokens": 4}


def tiny_llm(family: str):
    """In float32 and eval mode, with weights that make much of what they read."""
    of_family = FAMILIES[family]
    config = CONFIG_MAPPING[family](**of_family if "text_config" in of_family else {**SIZES, **of_family})
    known = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family != "qwen3_5"
    torch.manual_seed(0)
    llm = (AutoModelForCausalLM if known else AutoModelForMultimodalLM).from_config(config).eval()
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if parameter.ndim > 1 or "bias" in name:
                parameter.normal_(std=0.2)
    return llm


class Built:
    """An ELM around a family's saved language model, in a folder with a batch and what it answers to it."""

    def __init__(self, family, folder):
        self.folder = folder
        self.llm = tiny_llm(family)
        self.processor = tiny_processor("default", sampling_rate=100)
        self.llm.save_pretrained(folder / "llm")
        self.model = ELMForConditionalGeneration.from_encoder_llm_pretrained(
            folder / "llm", ecg_token_id=self.processor.ecg_token_id, **FUYU
        ).eval()
        with torch.no_grad():
            for parameter in self.model.model.connector.parameters():
                parameter.normal_(std=0.5)
        ecg = [self.processor.ecg_token_id] * 4
        self.prompts = [[*ecg, 7, 8, 9, 10, *ecg], [11, 12, 13], [14, *ecg, 15, 16]]
        self.ecg_values = torch.randn(3, 12, 500, generator=torch.Generator().manual_seed(0))
        length = max(map(len, self.prompts))
        padding = [length - len(prompt) for prompt in self.prompts]
        self.batch = {
            "input_ids": torch.tensor([[0] * n + p for n, p in zip(padding, self.prompts, strict=True)]),
            "attention_mask": torch.tensor([[0] * n + [1] * (length - n) for n in padding]),
            "ecg_values": self.ecg_values,
        }
        self.batch["position_ids"] = (self.batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # as `generate` counts
        with torch.no_grad():
            self.last_logits = self.model(**self.batch).logits[:, -1]
        self.model.save_pretrained(folder / "elm")
        save_file(self.batch, folder / "batch.safetensors")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Makes the ELM of a family, once."""
    return functools.cache(lambda family: Built(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="module")
def loaded(built, request):
    """The logits of the families that are tested, as one fresh process has them."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    folders = {family: str(built(family).folder) for family in {item.callspec.params["family"] for item in here}}
    code = (
        "import json, sys, torch\n"
        "from safetensors.torch import load_file, save_file\n"
        "from elm_ecg.modeling_elm import ELMForConditionalGeneration\n"
        "for folder in json.loads(sys.argv[1]):\n"
        "    model = ELMForConditionalGeneration.from_pretrained(folder + '/elm')\n"
        "    batch = load_file(folder + '/batch.safetensors')\n"
        "    with torch.no_grad():\n"
        "        save_file({'logits': model(**batch).logits[:, -1].contiguous()}, folder + '/loaded.safetensors')\n"
    )
    cwd = built(here[0].callspec.params["family"]).folder
    process = Fork(code, json.dumps([*folders.values()]), cwd=cwd, environment=dict(os.environ), project=True).finish()
    assert process.returncode == 0, process.stderr
    return {family: load_file(f"{folder}/loaded.safetensors")["logits"] for family, folder in folders.items()}


@functools.cache
def chats() -> Dataset:
    """A conversation of three turns with two ECGs, and three of one turn about a record that is in none of the first's."""
    rng = np.random.default_rng(0)
    rows: list[dict] = []
    asked = [[("Is it?", 1), ("And the other one?", 1), ("Why", 0)], [("Rate", 1)], [("Rhythm?", 1)], [("Rat", 1)]]
    for number, turns in enumerate(asked):
        messages, ecgs = [], []
        for question, num_ecgs in turns:
            parts = [{"type": "ecg", "text": None}] * num_ecgs + [{"type": "text", "text": question}]
            ecgs += [{"array": rng.normal(size=(12, 500)).tolist(), "sampling_rate": 100, "unit": "mV"}] * num_ecgs
            answer = {"role": "assistant", "content": [{"type": "text", "text": "no"}]}
            messages += [{"role": "user", "content": parts}, answer]
        record = min(number, 1)
        rows.append({"messages": messages, "ecg": ecgs if number < 2 else rows[1]["ecg"], "record_id": str(record)})
    return Dataset.from_list(rows).with_format("numpy", columns=["ecg"], output_all_columns=True)


@pytest.mark.parametrize("family", FAMILIES)
class TestFamily:
    def test_logits_of_text_are_the_language_models(self, built, family):
        elm = built(family)
        # with other text in the place of ECGs
        batch = {"input_ids": elm.batch["input_ids"] % 64, "attention_mask": elm.batch["attention_mask"]}
        with torch.no_grad():
            expected, logits = (
                elm.llm(**batch).logits,
                elm.model(**batch, position_ids=elm.batch["position_ids"]).logits,
            )
        assert expected[:, -1].std() > 0.05  # else anything would be near it
        torch.testing.assert_close(logits[:, -1], expected[:, -1], rtol=0, atol=1e-5)
        names = [name for name, _ in elm.model.named_parameters()]
        assert not [name for name in names if re.search("vision|visual|projector", name)]

    def test_a_batch_answers_as_alone(self, built, family):
        elm = built(family)
        with torch.no_grad():
            alone = [
                elm.model(input_ids=torch.tensor([prompt]), ecg_values=ecgs).logits[0, -1]
                for prompt, ecgs in zip(elm.prompts, [elm.ecg_values[:2], None, elm.ecg_values[2:]], strict=True)
            ]
        torch.testing.assert_close(elm.last_logits, torch.stack(alone), rtol=0, atol=1e-5)
        with torch.no_grad():
            others = elm.model(**elm.batch | {"ecg_values": -elm.ecg_values}).logits[:, -1]
        assert ((others - elm.last_logits).abs().amax(-1) > 1e-3).tolist() == [True, False, True]

    def test_the_loss_of_trls_head_is_the_models(self, built, family):
        elm = built(family)
        model = copy.deepcopy(elm.model)
        labels = elm.batch["input_ids"].masked_fill(elm.batch["attention_mask"] == 0, -100)
        with torch.no_grad():
            expected = model(**elm.batch, labels=labels).loss
            add_fused_lm_head(model)
            loss = model(**elm.batch, labels=labels, fused_lm_head=True).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)

    def test_two_steps_of_training(self, built, family):
        elm = built(family)
        for lora in (False, True):
            model = copy.deepcopy(elm.model)
            if lora:
                targets = linear_layers(model.model.language_model)
                model = get_peft_model(
                    model, LoraConfig(r=4, target_modules=targets, modules_to_save=["model.connector"])
                )
            model.train()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
            losses = []
            for _ in range(2):
                loss = model(
                    **elm.batch, labels=elm.batch["input_ids"].masked_fill(elm.batch["attention_mask"] == 0, -100)
                ).loss
                loss.backward()
                learnt = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            assert losses[1] < losses[0]
            assert any("connector" in name for name in learnt)
            assert any("language_model" in name and ("lora_B" in name or not lora) for name in learnt)

    def test_chats_in_a_row_are_as_alone(self, built, family):
        """Behind what they share; but for layers with a state, which are found to mix them."""
        model = built(family).model
        with_state = set(getattr(model.config.text_config, "layer_types", None) or []) & {"linear_attention", "conv"}
        assert max_tokens_to_share(model.config.text_config) > 500
        apart = keeps_apart(model, model, model.device, share=True)
        assert apart == (not with_state and family not in ("bamba", "falcon_h1", "jamba", "nemotron_h", "zamba2"))

    @pytest.mark.parametrize("score", ["generation", "likelihood"])
    @pytest.mark.slow
    def test_evaluation_with_shared_prefixes(self, built, family, score):
        elm, rows = built(family), chats()
        questions = list_questions(rows)
        candidates = (
            None if score == "generation" else [["yes", "no"], ["a", "maybe"], ["no"], ["yes", "I do"], ["no"], ["60"]]
        )
        answers = [
            Answerer(
                elm.model,
                elm.processor,
                rows,
                questions,
                candidates,
                batch_size,
                {"max_new_tokens": 3},
                reuse_prefix=reuse,
            ).ask("ecg")[0]
            for batch_size, reuse in [(1, False), (4, True)]
        ]
        if score == "generation":
            assert answers[0] == answers[1]
        else:
            alone, shared = (torch.tensor([value for row in rows for value in row]) for rows in answers)
            torch.testing.assert_close(shared, alone, rtol=0, atol=1e-4)

    def test_loaded_in_a_fresh_process(self, built, loaded, family):
        torch.testing.assert_close(loaded[family], built(family).last_logits, rtol=0, atol=1e-6)


# language models that are refused, or need help


def test_gemma_4_without_a_token_for_padding(tmp_path):
    settings = copy.deepcopy(FAMILIES["gemma4"])
    settings["text_config"]["pad_token_id"] = None
    llm = AutoModelForMultimodalLM.from_config(CONFIG_MAPPING["gemma4"](**settings)).eval()
    llm.save_pretrained(tmp_path)
    model = ELMForConditionalGeneration.from_encoder_llm_pretrained(tmp_path, ecg_token_id=301, **FUYU)
    llm.config.text_config.pad_token_id = 0
    input_ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=input_ids).logits, llm(input_ids=input_ids).logits)


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_gemma_3n_needs_timm(tmp_path):
    """Whose weights are of no matter: it is found out before they are read."""
    CONFIG_MAPPING["gemma3n"]().save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ImportError, match=r"cannot be loaded: TimmWrapperModel requires the timm library .* `pip install timm`"
    ):
        load_language_model(tmp_path)


def test_a_cache_of_its_own_is_refused(tmp_path):
    """`generate` would give MiniMax another."""
    layers = ["linear_attention", "full_attention"]
    settings = {**SIZES, **EXPERTS, "num_local_experts": 4, "layer_types": layers, "block_size": 16}
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["minimax"](**settings)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"MiniMaxForCausalLM \(minimax\) keeps what it has read in a cache of its own"
    ):
        ELMForConditionalGeneration.from_encoder_llm_pretrained(tmp_path, ecg_token_id=301, **FUYU)
