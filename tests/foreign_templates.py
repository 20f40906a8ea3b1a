"""Chat templates of language models, as these come with them, and tokenizers with their control tokens."""

import re
from pathlib import Path
from typing import Any

import trl
from transformers import PreTrainedTokenizerFast

from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.processing_elm import ELMProcessor
from helpers import tiny_tokenizer

OF_TRL = Path(trl.__file__).parent / "chat_templates"
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI "
    "assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI4 = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' + message['content'] + "
    "'<|im_end|>'}}{% elif (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif "
    "(message['role'] == 'assistant') %}{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
# text ends an answer, but the last one
FALCON = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% if loop.last and message['role'] == 'assistant' %}"
    "{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
PLAIN = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
PLAIN += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"


def of_trl(name: str) -> str:
    """A template that TRL knows, or its own for training."""
    return (OF_TRL / f"{name}.jinja").read_text()


def message(role: str, *parts: Any) -> dict[str, Any]:
    """A message of texts and other parts."""
    return {
        "role": role,
        "content": [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts],
    }


def tokenizer_for(template: str, eos: str = "<eos>") -> PreTrainedTokenizerFast:
    """As `tiny_tokenizer`, with the control tokens that a chat template writes, and its template."""
    tokenizer = tiny_tokenizer("default")
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": eos})
    control_tokens = set(re.findall(r"<\|?[a-z_]+\|?>|<[|｜][^|｜<>{}\s]+[|｜]>", template)) - {"<think>"}
    tokenizer.add_tokens([*sorted(control_tokens), ELMProcessor.ecg_token], special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>"])  # as in Qwen3: not special, they stay in what is decoded
    tokenizer.chat_template = template
    return tokenizer


def processor_of(template: str, **settings: Any) -> ELMProcessor:
    """A processor of records of 2 s at 250 Hz with a chat template; pads on the left."""
    tokenizer = tokenizer_for(template)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    return ELMProcessor(ECGFeatureExtractor(num_samples=500), tokenizer, template, **{"num_ecg_tokens": 3} | settings)
