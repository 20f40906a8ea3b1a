"""`elm export`: a part of an ELM by itself, its language model or its encoder, as other programs load it."""

import argparse
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

from elm_ecg.configuration_elm import IMAGE_REPRESENTATIONS
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.command_line import CommandLineParser, printable
from elm_ecg.training.files import check_output_folder, new_folder, read_json, write_text
from elm_ecg.training.load import load_elm
from elm_ecg.training.markdown import CARD, public_name
from elm_ecg.training.sharing.cards import encoder_card


def language_model(model: ELMForConditionalGeneration) -> PreTrainedModel:
    """The language model of an ELM with its head, in its own class; it shares the weights of the ELM.

    Raises:
        ValueError: transformers has no class for it alone, as for the text part of some models that read pictures.
    """
    config = deepcopy(model.config.get_text_config())
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is None:
        raise ValueError(
            f"The language model is the {config.model_type!r} part of a larger one, and transformers has no class for that part alone; "
            "export an ELM around a language model that reads text only."
        )
    with torch.device("meta"):  # its weights are those of the ELM
        llm: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    setattr(llm, llm.base_model_prefix, model.model.language_model)
    llm.set_output_embeddings(model.lm_head)
    generation = deepcopy(model.generation_config)
    # placeholders beyond the vocabulary cannot be written anyhow
    written = [token_id for token_id in generation.suppress_tokens or [] if token_id < config.vocab_size]
    generation.suppress_tokens = written or None
    llm.generation_config = generation
    return llm.eval()


def save_language_model(model: ELMForConditionalGeneration, processor: ELMProcessor, folder: Path) -> None:
    """Saves the language model with its tokenizer, chat template and what ends its answers.

    The tokenizer is without the tokens that have no row in the vocabulary, those of ECGs: an engine that gets one as text would look
    for its embedding where there is none.

    Raises:
        ValueError: as `language_model`.
    """
    llm = language_model(model)
    llm.save_pretrained(folder)
    tokenizer = deepcopy(processor.tokenizer)
    tokenizer.chat_template = processor.chat_template
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    if path.is_file():  # of tokenizers without one, tokens cannot be taken out
        content = read_json(path)
        vocabulary = llm.config.vocab_size
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocabulary]
        write_text(path, json.dumps(content, ensure_ascii=False))


def save_encoder(model: ELMForConditionalGeneration, processor: ELMProcessor, folder: Path, name: str) -> None:
    """Saves the encoder with what prepares its records, as `elm pretrain` does; of a vision backbone with its image processor.

    Args:
        name: of the ELM, for people.

    Raises:
        ValueError: the ELM has no encoder.
    """
    encoder = model.model.encoder
    if encoder is None:
        reads = (
            "puts records through its connector alone" if model.config.architecture == "fuyu" else "reads text alone"
        )
        raise ValueError(
            f"--part encoder: the ELM {name} has no encoder, it {reads} (its architecture is {model.config.architecture}); expected one "
            "of the architecture llava."
        )
    encoder.save_pretrained(folder)
    if model.config.representation in IMAGE_REPRESENTATIONS:
        assert processor.image_processor is not None
        processor.image_processor.image_processor.save_pretrained(folder)
        return
    processor.feature_extractor.save_pretrained(folder)
    source = f"Exported by `elm export` from the ELM `{public_name(name)}`, which says how it was trained."
    encoder_card(folder, encoder.config, f"Encoder of {public_name(name)}", source).save(folder / CARD)


def make_parser() -> argparse.ArgumentParser:
    """The options of `elm export`."""
    usage = "elm export MODEL --part PART --output_dir FOLDER [options]"
    parser = CommandLineParser(prog="elm export", usage=usage, description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="saved ELM, or LoRA adapter, which is merged: local folder or Hub id")
    part_help = (
        "llm: the language model with its tokenizer, for vLLM and other engines, or transformers; encoder: the ECG "
        "encoder with its feature extractor, as `elm pretrain` saves it"
    )
    add("--part", choices=("llm", "encoder"), required=True, help=part_help)
    add("--output_dir", type=Path, required=True, metavar="FOLDER", help="new or empty folder")
    add("--revision", default="main", help="of a Hub id; default: %(default)s")
    code_help = "run the code of an encoder or connector that comes with the model; read it before"
    add("--trust_remote_code", action="store_true", help=code_help)
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="auto", help="of the weights; default: as they were saved")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs `elm export`."""
    args = make_parser().parse_args(argv)
    check_output_folder(args.output_dir, new=True)
    model, processor = load_elm(args.model, args.revision, args.trust_remote_code, dtype=args.dtype)
    with new_folder(args.output_dir) as folder:
        if args.part == "llm":
            save_language_model(model, processor, folder)
        else:
            save_encoder(model, processor, folder, args.model)
    done = {"llm": "the language model", "encoder": "the encoder"}[args.part]
    print(printable(f"Saved {done} to {args.output_dir.absolute()}"), flush=True)
