"""A new ELM and its processor from the command line's arguments."""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import file_exists
from peft import LoraConfig, PeftConfig, PeftModel
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig

from configuration_elm import ENCODER_CONFIGS, ELMConfig
from feature_extraction_elm import ECGFeatureExtractor
from modeling_elm import ELMForConditionalGeneration
from processing_elm import ELMProcessor
from tokenization_ecg_byte import ECGByteTokenizer
from training.arguments import ELMArguments

logger = logging.getLogger(__name__)

# our commands run the code that is installed, not the copy in a model's folder
AutoConfig.register(ELMConfig.model_type, ELMConfig)
AutoModelForCausalLM.register(ELMConfig, ELMForConditionalGeneration)
AutoFeatureExtractor.register(ELMConfig, ECGFeatureExtractor)
AutoProcessor.register(ELMConfig, ELMProcessor)

LLMS = {
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b-instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b-instruct": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "gemma-2-2b-it": "google/gemma-2-2b-it",
}
DEFAULT_ECG_TOKENIZER = Path(__file__).parent / "tokenizers" / "ptbxl_250hz"
# a token that only tokenizers of that family have -> its chat template
TEMPLATES = {
    "<|start_header_id|>": "llama3",
    "<|im_start|>": "qwen2_5",
    "<start_of_turn>": "gemma2",
}


def resolve_llm(llm: str) -> str:
    """Hub id or local folder of a language model given by its name, id or folder."""
    if llm in LLMS:
        return LLMS[llm]
    if Path(llm).is_dir():
        if not (Path(llm) / "config.json").is_file():
            raise ValueError(f"--llm {llm} is a folder without config.json; expected a saved causal language model.")
        return llm
    if llm.count("/") == 1 and not llm.startswith((".", "/", "~")):
        return llm
    raise ValueError(
        f"Unknown --llm {llm!r}; expected {', '.join(LLMS)}, a Hub id such as owner/name, or a local folder."
    )


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of the tokenizer's family, with markers round what is learnt."""
    vocabulary = tokenizer.get_vocab()
    name = next((name for token, name in TEMPLATES.items() if token in vocabulary), "default")
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text()


def build_processor(args: ELMArguments) -> ELMProcessor:
    """The language model's tokenizer with the tokens of ECGs, its chat template and a feature extractor."""
    llm = resolve_llm(args.llm)
    tokenizer = AutoTokenizer.from_pretrained(llm, padding_side="left")
    tokenizer.add_tokens([ELMProcessor.ecg_token], special_tokens=True)
    ecg_byte = None
    if args.representation == "symbolic":
        ecg_byte = ECGByteTokenizer.from_pretrained(args.ecg_tokenizer or DEFAULT_ECG_TOKENIZER)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    leads: dict[str, Any] = {} if args.lead_names is None else {"lead_names": args.lead_names}
    feature_extractor = ECGFeatureExtractor(
        sampling_rate=args.sampling_rate,
        num_samples=args.num_samples,
        normalization=args.normalization,
        truncation=args.truncation or False,
        **leads,
    )
    if ecg_byte is not None:
        if ecg_byte.sampling_rate not in (None, args.sampling_rate):
            logger.warning(
                "The ECG tokenizer was trained at %g Hz and records are taken at %g Hz: it makes more tokens of them than one "
                "trained at that rate.",
                ecg_byte.sampling_rate,
                args.sampling_rate,
            )
        names = ELMProcessor.signal_tokens(ecg_byte, feature_extractor.lead_names)
        tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
    assert args.num_ecg_tokens is not None  # set with the arguments
    num_ecg_tokens = 0 if args.architecture == "text" else args.num_ecg_tokens
    return ELMProcessor(
        feature_extractor,
        tokenizer,
        chat_template(tokenizer),
        num_ecg_tokens,
        representation=args.representation,
        ecg_byte=ecg_byte,
        max_length=getattr(AutoConfig.from_pretrained(llm), "max_position_embeddings", None),
        overflow=args.ecg_overflow,
    )


def build_model(args: ELMArguments, model_args: ModelConfig, processor: ELMProcessor) -> ELMForConditionalGeneration:
    """An ELM around the pretrained language model, with embeddings for the tokens that the processor added."""
    num_leads = len(processor.feature_extractor.lead_names)
    config: dict[str, Any] = {
        "architecture": args.architecture,
        "connector": args.connector,
        "representation": args.representation,
        "num_ecg_tokens": args.num_ecg_tokens,
        "ecg_token_id": processor.ecg_token_id,
        "num_leads": num_leads,
        "num_samples": args.num_samples,
    }
    if args.architecture == "llava" and args.encoder_name_or_path is None:
        if args.encoder not in ENCODER_CONFIGS:
            raise ValueError(f"Unknown --encoder {args.encoder!r}; expected one of {', '.join(ENCODER_CONFIGS)}.")
        encoder_class = ENCODER_CONFIGS[args.encoder]
        unknown = args.encoder_fields.keys() - {field.name for field in fields(encoder_class)}
        if unknown:
            raise ValueError(f"--encoder_config: {encoder_class.__name__} has no field {', '.join(sorted(unknown))}.")
        shape = {"num_leads": num_leads, "num_samples": args.num_samples}
        config["encoder_config"] = encoder_class(**{**shape, **args.encoder_fields})
    model = ELMForConditionalGeneration.from_encoder_llm_pretrained(
        resolve_llm(args.llm),
        encoder=args.encoder_name_or_path if args.architecture == "llava" else None,
        llm_kwargs={
            "dtype": model_args.dtype,
            "attn_implementation": model_args.attn_implementation,
            "revision": model_args.model_revision,
        },
        **config,
    )
    if len(processor.tokenizer) > model.config.text_config.vocab_size:  # some models keep spare rows
        model.resize_token_embeddings(len(processor.tokenizer))
    if processor.ecg_tokenizer is not None:
        spread_embeddings(model, processor.signal_token_ids)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model


@torch.no_grad()
def spread_embeddings(model: ELMForConditionalGeneration, token_ids: list[int]) -> None:
    """Starts tokens as far from each other as words are.

    transformers starts new ones at the mean of the old, where all ECGs are the same text; from there they part slowly at the
    learning rates of fine-tuning.
    """
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    words = weight[: min(token_ids)].float()
    means, deviations = (row.expand(len(token_ids), -1) for row in (words.mean(0), words.std(0)))
    weight[token_ids] = torch.normal(means, deviations).to(weight.dtype)


def freeze(model: ELMForConditionalGeneration, update: list[str]) -> None:
    """Leaves only the named parts (`encoder`, `connector`, `llm`) to be trained."""
    if "encoder" in update and model.model.encoder is None:
        raise ValueError(f"--update encoder: a {model.config.architecture} ELM has no encoder.")
    model.requires_grad_("llm" in update)
    for name in ("encoder", "connector"):
        part = getattr(model.model, name)
        if part is not None:
            part.requires_grad_(name in update)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--update {' '.join(update)} leaves nothing to train in a {model.config.architecture} ELM.")


def lora_config(
    args: ELMArguments, model_args: ModelConfig, model: ELMForConditionalGeneration, processor: ELMProcessor
) -> LoraConfig:
    """LoRA on the language model's linear layers; connector and encoder, where updated, and the rows of the added tokens
    in the embeddings and the head, trained in full."""
    if "llm" not in args.update:
        raise ValueError(f"--peft adapts the language model, but --update is {' '.join(args.update)}; add llm to it.")
    targets: str | list[str] | None = model_args.lora_target_modules
    if targets is None:
        layers = model.model.language_model.named_modules()
        names = {name.rsplit(".", 1)[-1] for name, layer in layers if isinstance(layer, nn.Linear | Conv1D)}
        targets = rf".*language_model\..*\.({'|'.join(sorted(names))})"
    parts = [
        name for name in ("encoder", "connector") if name in args.update and getattr(model.model, name) is not None
    ]
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    added = [processor.ecg_token_id, *processor.signal_token_ids]
    rows = {name.rsplit(".", 1)[-1]: added}
    if not model.config.tie_word_embeddings:  # else PEFT ties them
        rows["lm_head"] = added
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        target_modules=targets,
        modules_to_save=parts + (model_args.lora_modules_to_save or []) or None,
        trainable_token_indices=rows,
    )


def load_elm(
    name_or_path: str, revision: str = "main", **model_kwargs: Any
) -> tuple[ELMForConditionalGeneration, ELMProcessor]:
    """A saved ELM and its processor; a LoRA adapter is loaded on its base model and merged into it.

    Args:
        name_or_path: Hub id, or local folder of an ELM or of an adapter.
        model_kwargs: for `from_pretrained` (`dtype`, `attn_implementation`, `device_map`, ...).

    Raises:
        ValueError: if a local folder holds neither.
    """
    path = Path(name_or_path)
    if path.exists():
        is_adapter = (path / "adapter_config.json").is_file()
        if not is_adapter and not (path / "config.json").is_file():
            raise ValueError(
                f"{name_or_path} has no config.json and no adapter_config.json; expected the folder of a saved ELM or "
                "adapter."
            )
    else:
        is_adapter = file_exists(name_or_path, "adapter_config.json", revision=revision)
    processor = ELMProcessor.from_pretrained(name_or_path, revision=revision)
    if not is_adapter:
        return ELMForConditionalGeneration.from_pretrained(name_or_path, revision=revision, **model_kwargs), processor
    base_path = PeftConfig.from_pretrained(name_or_path, revision=revision).base_model_name_or_path
    if not Path(base_path).exists() and (path / "base_model").is_dir():
        base_path = path / "base_model"  # the folder was moved since it was trained
    base = ELMForConditionalGeneration.from_pretrained(base_path, **model_kwargs)
    return PeftModel.from_pretrained(base, name_or_path, revision=revision).merge_and_unload(), processor
