"""A new ELM and its processor from the command line's arguments."""

import logging
import os
import re
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from tokenizers import AddedToken
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, get_peft_config
from trl.chat_template_utils import has_generation_markers

from elm_ecg.configuration_elm import ENCODER_CONFIGS, IMAGE_REPRESENTATIONS, ELMConfig
from elm_ecg.ecg_drawing import ECGPaper
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.image_processing_elm import ECGImageProcessor
from elm_ecg.modeling_common import some_of
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.modeling_vision_encoders import image_size, vision_config
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.tokenization_ecg_byte import FILE_NAME, ECGByteTokenizer
from elm_ecg.training.arguments import VISION_BACKBONES, ELMArguments, ELMParser, ModelArguments
from elm_ecg.training.command_line import did_you_mean
from elm_ecg.training.digest import base_of_adapter
from elm_ecg.training.files import resource
from elm_ecg.training.model_files import (
    check_config,
    check_finite,
    check_processor,
    check_weights,
    find_model_file,
    loading,
    model_folder,
)

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
# values of a stacked record that are black and white, by its normalization: millivolts, deviations, or its own range
VALUE_RANGES = {"none": (-2.0, 2.0), "zscore": (-4.0, 4.0), "minmax": (0.0, 1.0)}
SMALL_MODEL = 5_000_000  # parameters
DEFAULT_ECG_TOKENIZER = resource("training/tokenizers/ptbxl_250hz")
# a token that only tokenizers of that family have -> its chat template
TEMPLATES = {"<|start_header_id|>": "llama3", "<|im_start|>": "qwen2_5", "<start_of_turn>": "gemma2"}


def resolve_llm(llm: str) -> str:
    """Hub id or local folder of a language model given by its name, id or folder."""
    if llm in LLMS:
        return LLMS[llm]
    if Path(llm).is_dir() or (llm.count("/") == 1 and not llm.startswith((".", "/", "~"))):
        return llm
    raise ValueError(
        f"Unknown --llm {llm!r}; expected {', '.join(LLMS)}, a Hub id such as owner/name, or a local folder."
        f"{did_you_mean(llm, LLMS)}"
    )


def place_of_llm(args: ModelArguments, revision: str = "main") -> str:
    """Where `--llm` is loaded from (ValueError: nowhere)."""
    return find_model_file(resolve_llm(args.llm), ["config.json"], revision, label="--llm")[0]


def place_of_encoder(args: ModelArguments) -> str | None:
    """Where the pretrained encoder of `--encoder` is loaded from; None for a new one."""
    if args.encoder_name_or_path is None or args.architecture != "llava":
        return None
    return find_model_file(args.encoder_name_or_path, ["config.json"], label="--encoder")[0]


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of the tokenizer's family, with `{% generation %}` round what is learnt."""
    vocabulary = tokenizer.get_vocab()
    name = next((name for token, name in TEMPLATES.items() if token in vocabulary), "default")
    return resource(f"training/templates/{name}.jinja").read_text()


def set_chat_template(processor: ELMProcessor, name_or_path: str | None) -> None:
    """Gives the processor another chat template; None keeps its own.

    Args:
        name_or_path: a file of Jinja, or the folder or Hub id of a model whose tokenizer has a template.

    Raises:
        ValueError: there is no template, it cannot be rendered, does not mark the answers, or leaves ECGs out.
    """
    if name_or_path is None:
        return
    label = "--chat_template_path"
    if Path(name_or_path).is_file():
        template = Path(name_or_path).read_text(encoding="utf-8")
    else:
        place, _ = find_model_file(name_or_path, ["tokenizer_config.json"], label=label)
        template = AutoTokenizer.from_pretrained(place, trust_remote_code=False).chat_template
    if isinstance(template, dict):  # named ones
        template = template.get("default")
    if not template:
        raise ValueError(f"{label} {name_or_path} has no chat template; name a .jinja file.")
    if not has_generation_markers(template):
        raise ValueError(
            f"{label} {name_or_path} does not mark what is to be learnt; put {{% generation %}} and {{% endgeneration %}} round the "
            f"assistant's turns, as the templates in {resource('training/templates')} do."
        )
    chat = [
        {"role": "user", "content": [{"type": "ecg"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "!"}]},
    ]
    try:
        text = processor.tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"{label} {name_or_path} cannot be rendered: {error}") from error
    if processor.takes_ecgs and text.count(processor.ecg_token) != 1:
        raise ValueError(
            f"{label} {name_or_path} writes no {processor.ecg_token} for a part of type 'ecg'; add it, as the templates in "
            f"{resource('training/templates')} do."
        )
    processor.chat_template = template


def encoder_config(args: ModelArguments, num_leads: int) -> PreTrainedConfig:
    """The configuration of an encoder with random weights, or of a pretrained vision backbone."""
    assert args.encoder is not None  # set with the arguments
    if args.representation in IMAGE_REPRESENTATIONS:
        if (place := place_of_encoder(args)) is not None:
            return vision_config(place)
        # of models that read text too the vision tower
        model_types = [name for name in (f"{args.encoder}_vision_model", args.encoder) if name in CONFIG_MAPPING]
        if not model_types:
            raise ValueError(
                f"Unknown --encoder {args.encoder!r} for {args.representation} ECGs; expected {', '.join(VISION_BACKBONES)}, a Hub "
                "id such as owner/name, or the model_type of a vision backbone, such as vit."
                f"{did_you_mean(args.encoder, [*VISION_BACKBONES, *CONFIG_MAPPING])}"
            )
        config_class, shape = CONFIG_MAPPING[model_types[0]], {}
    else:
        if args.encoder not in ENCODER_CONFIGS:
            raise ValueError(
                f"Unknown --encoder {args.encoder!r} for signal ECGs; expected one of {', '.join(ENCODER_CONFIGS)}. Vision "
                f"backbones read --representation {' or '.join(IMAGE_REPRESENTATIONS)}."
                f"{did_you_mean(args.encoder, ENCODER_CONFIGS)}"
            )
        config_class = ENCODER_CONFIGS[args.encoder]
        shape = {"num_leads": num_leads, "num_samples": args.num_samples}
    if unknown := args.encoder_fields.keys() - {field.name for field in fields(config_class)}:
        raise ValueError(f"--encoder_config: {config_class.__name__} has no field {', '.join(sorted(unknown))}.")
    return config_class(**{**shape, **args.encoder_fields})


def build_image_processor(args: ModelArguments, config: PreTrainedConfig) -> ECGImageProcessor:
    """The image processor of the vision backbone, for pictures of the size that the backbone reads."""
    if (place := place_of_encoder(args)) is not None:
        settings = AutoImageProcessor.from_pretrained(place, backend="pil", trust_remote_code=False).to_dict()
    else:
        names = IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type.removesuffix("_vision_model"), {})
        settings = {"image_processor_type": names.get("torchvision", "ViTImageProcessor")}  # later its Pillow variant
        height, width = image_size(config)
        settings |= {"size": {"height": height, "width": width}, "do_center_crop": False}
    if hasattr(config, "num_patches"):  # of pictures of any shape
        settings.setdefault("max_num_patches", config.num_patches)
        settings["patch_size"] = config.patch_size  # pixels; the processor cuts the picture, not the backbone
    if "size" in args.image_processor_fields:
        settings["do_center_crop"] = False  # else the size would be that of the crop
    settings = ECGImageProcessor(settings).image_processor.to_dict()  # with the defaults of its class
    if unknown := args.image_processor_fields.keys() - settings.keys():
        raise ValueError(
            f"--image_processor: {settings['image_processor_type']} has no field {', '.join(sorted(unknown))}; expected "
            f"{', '.join(settings)}."
        )
    known = [field.name for field in fields(ECGPaper)]
    if unknown := args.paper_fields.keys() - known:
        raise ValueError(f"--paper has no field {', '.join(sorted(unknown))}; expected {', '.join(known)}.")
    return ECGImageProcessor(
        {**settings, **args.image_processor_fields},
        representation=args.representation,
        paper=args.paper_fields,
        value_range=VALUE_RANGES[args.normalization or "none"],
    )


def build_processor(
    args: ModelArguments, revision: str = "main", ecg_byte: ECGByteTokenizer | None = None
) -> ELMProcessor:
    """The language model's tokenizer with the tokens of ECGs, its chat template, a feature extractor, and where ECGs are
    pictures an image processor.

    Args:
        revision: of the language model.
        ecg_byte: stands in for `--ecg_tokenizer`.
    """
    llm = place_of_llm(args, revision)
    # left is for `generate`; the collator pads right
    tokenizer = AutoTokenizer.from_pretrained(llm, revision=revision, padding_side="left", trust_remote_code=False)
    tokenizer.add_tokens([ELMProcessor.ecg_token], special_tokens=True)  # as a special one, decoding leaves it out
    if args.representation == "symbolic" and ecg_byte is None:
        place = args.ecg_tokenizer or str(DEFAULT_ECG_TOKENIZER)
        if not Path(place).exists():
            place, _ = find_model_file(place, [FILE_NAME], label="--ecg_tokenizer")
        ecg_byte = ECGByteTokenizer.from_pretrained(place)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # Llama has none; labels do not depend on it
    names = ("sampling_rate", "num_samples", "bandpass", "notch", "missing_leads")
    settings: dict[str, Any] = {name: getattr(args, name) for name in names}
    if args.lead_names is not None:
        settings["lead_names"] = args.lead_names
    feature_extractor = ECGFeatureExtractor(  # truncation False: a longer record is an error
        normalization=args.normalization or "none", truncation=args.truncation or False, **settings
    )
    if ecg_byte is not None:
        if ecg_byte.sampling_rate not in (None, args.sampling_rate):
            logger.warning(
                "The ECG tokenizer was trained at %g Hz and records are taken at %g Hz: it makes more tokens of them than one "
                "trained at that rate.",
                ecg_byte.sampling_rate,
                args.sampling_rate,
            )
        signals = ELMProcessor.signal_tokens(ecg_byte, feature_extractor.lead_names)
        # not special: what a model writes of them stays in the decoded text
        tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in signals])
    image_processor = None
    if args.representation in IMAGE_REPRESENTATIONS and args.architecture == "llava":
        image_processor = build_image_processor(args, encoder_config(args, len(feature_extractor.lead_names)))
    assert args.num_ecg_tokens is not None  # set with the arguments
    num_ecg_tokens = 0 if args.architecture == "text" else args.num_ecg_tokens
    return ELMProcessor(
        feature_extractor,
        tokenizer,
        chat_template(tokenizer),
        num_ecg_tokens,
        representation=args.representation,
        image_processor=image_processor,
        ecg_byte=ecg_byte,
        # tokens; None: any
        max_length=getattr(
            AutoConfig.from_pretrained(llm, revision=revision, trust_remote_code=False), "max_position_embeddings", None
        ),
        overflow=args.ecg_overflow,
    )


def build_model(args: ModelArguments, processor: ELMProcessor, **llm_kwargs: Any) -> ELMForConditionalGeneration:
    """An ELM around the pretrained language model, with embeddings for the tokens that the processor added.

    Args:
        llm_kwargs: for `from_pretrained` of the language model (`dtype`, `attn_implementation`, `revision`, ...).
    """
    num_leads = len(processor.feature_extractor.lead_names)
    names = ("architecture", "connector", "representation", "num_ecg_tokens", "image_features", "num_samples")
    config: dict[str, Any] = {name: getattr(args, name) for name in names}
    config |= {"ecg_token_id": processor.ecg_token_id, "num_leads": num_leads}
    if args.architecture == "llava" and args.encoder_name_or_path is None:
        config["encoder_config"] = encoder_config(args, num_leads)  # a pretrained one brings its own
    model = ELMForConditionalGeneration.from_encoder_llm_pretrained(
        place_of_llm(args, llm_kwargs.get("revision") or "main"),
        encoder=place_of_encoder(args),
        llm_kwargs=llm_kwargs,
        **config,
    )
    text_config = model.config.get_text_config()
    if len(processor.tokenizer) > text_config.vocab_size:  # some models keep spare rows
        log = logging.getLogger("transformers.modeling_utils")  # it explains how it draws the new rows
        level = log.level
        log.setLevel(logging.ERROR)
        model.resize_token_embeddings(len(processor.tokenizer))  # new rows near the mean, see `spread_embeddings`
        log.setLevel(level)
    if processor.ecg_tokenizer is not None:
        spread_embeddings(model, processor.signal_token_ids)
    text_config.pad_token_id = model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model


def new_elm(
    llm: str, *, seed: int = 0, dtype: str = "float32", attn_implementation: str | None = None, **options: Any
) -> tuple[ELMForConditionalGeneration, ELMProcessor]:
    """A new ELM around a pretrained language model (a name of `LLMS`, Hub id or local folder), and its processor.

    Args:
        seed: of the new weights.
        options: the other fields of `ModelArguments`, such as `encoder="merl"`, `connector="mlp"`, `representation="signal"`;
            a ValueError names one that is unknown, or does not go with the others.
    """
    parser = ELMParser(ModelArguments, prog="new_elm")
    parser.set_defaults_with_config(llm=llm, **options)  # checks names and values as those of a YAML file
    (args,) = parser.parse_args_into_dataclasses([])
    processor = build_processor(args)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays; weights are drawn on the CPU
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed those of GPUs too
        return build_model(args, processor, dtype=dtype, attn_implementation=attn_implementation), processor


def limit_threads(model: PreTrainedModel, device: torch.device) -> None:
    """One thread for a small model on the CPU, unless OMP_NUM_THREADS is set: its operations are so short that threads
    wait for each other longer than they work."""
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ or model.num_parameters() >= SMALL_MODEL:
        return
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        print("A model this small runs on one thread; OMP_NUM_THREADS sets another number.", flush=True)


@torch.no_grad()
def spread_embeddings(model: ELMForConditionalGeneration, token_ids: list[int]) -> None:
    """Starts tokens as far from each other as words are.

    transformers starts new ones at the mean of the old, where all ECGs are the same text; from there they part slowly at the
    learning rates of fine-tuning.
    """
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    words = weight[: min(token_ids)].float()  # the language model's own rows
    means, deviations = (row.expand(len(token_ids), -1) for row in (words.mean(0), words.std(0)))
    weight[token_ids] = torch.normal(means, deviations).to(weight.dtype)


def freeze(model: ELMForConditionalGeneration, update: list[str]) -> None:
    """Leaves only the named parts (`encoder`, `connector`, `llm`) to be trained."""
    if "encoder" in update and model.model.encoder is None:
        raise ValueError(f"--update encoder: a {model.config.architecture} ELM has no encoder.")
    model.requires_grad_("llm" in update)  # the head too; encoder and connector follow
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
    modules, parameters = ([name for name, _ in pairs] for pairs in (model.named_modules(), model.named_parameters()))
    # of one name TRL makes a text, which PEFT takes for a regex of whole names
    targets: str | list[str] | None = model_args.lora_target_modules
    if targets in (None, "all-linear"):  # Conv1D is the linear layer of GPT-2
        layers = model.model.language_model.named_modules()
        targets = sorted({name.rsplit(".", 1)[-1] for name, layer in layers if isinstance(layer, nn.Linear | Conv1D)})
    elif isinstance(targets, str) and not any(re.fullmatch(targets, name) for name in modules):
        targets = [targets]
    if isinstance(targets, list):  # a regex: the encoder may have such names too
        _check_ends("--lora_target_modules", targets, [name for name, _ in model.model.language_model.named_modules()])
        targets = rf".*language_model\..*\.({'|'.join(map(re.escape, targets))})"
    _check_ends("--lora_target_parameters", model_args.lora_target_parameters or [], parameters)
    _check_ends("--lora_modules_to_save", model_args.lora_modules_to_save or [], modules)
    parts = [
        f"model.{name}"
        for name in ("encoder", "connector")
        if name in args.update and getattr(model.model, name) is not None
    ]
    # PEFT compares the ends of names, and many a backbone has a part that is called encoder too
    if inner := [name for name, _ in model.named_modules() if name.endswith(tuple(parts)) and name not in parts]:
        raise ValueError(
            f"--update encoder with LoRA: PEFT cannot tell the encoder from its part {inner[0]}. Train it without --use_peft, "
            "leave encoder out of --update, or take --image_features patches."
        )
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)  # embed_tokens, wte, ...
    added = [processor.ecg_token_id, *processor.signal_token_ids]
    rows = {name.rsplit(".", 1)[-1]: added}  # PEFT compares the end of a module's name
    if not model.config.tie_word_embeddings:  # else PEFT ties them
        rows["lm_head"] = added
    changes: dict[str, Any] = {
        "use_peft": True,
        "lora_target_modules": targets,
        # `or` binds last: None for no module
        "lora_modules_to_save": parts + (model_args.lora_modules_to_save or []) or None,
    }
    config = get_peft_config(replace(model_args, **changes))
    assert isinstance(config, LoraConfig)
    config.trainable_token_indices = rows
    return config


def _check_ends(option: str, ends: list[str], names: list[str]) -> None:
    """ValueError for what is the end of no name, which PEFT would leave out without a word."""
    for end in ends:
        if not any(f".{name}".endswith(f".{end}") for name in names):
            near = did_you_mean(end, (name.rpartition(".")[2] for name in names))
            raise ValueError(f"{option} {end}: nothing in the model is called so.{near}")


def load_elm(
    name_or_path: str, revision: str = "main", **model_kwargs: Any
) -> tuple[ELMForConditionalGeneration, ELMProcessor]:
    """A saved ELM and its processor; a LoRA adapter is loaded on its base model and merged into it.

    Args:
        name_or_path: Hub id, or local folder of an ELM or of an adapter.
        model_kwargs: for `from_pretrained` (`dtype`, `attn_implementation`, `device_map`, ...).

    Raises:
        ValueError: as `find_model_file`; or files are damaged, or do not go together, or hold too few weights, or NaN.
    """
    folder, filename = model_folder(name_or_path, ["adapter_config.json", "config.json"], revision)
    label = f"The model {name_or_path}"
    if filename == "config.json":
        model = _load_whole(folder, label, **model_kwargs)
    else:
        model = _load_adapted(folder, label, **model_kwargs)
    with loading(folder, label):
        # an adapter's folder has one too; without the last, transformers asks on standard input whether its code may run
        processor = ELMProcessor.from_pretrained(folder, trust_remote_code=False)
        check_processor(processor, model.config, model.config.get_text_config().vocab_size)
    return model, processor


def _load_whole(folder: Path, label: str, **model_kwargs: Any) -> ELMForConditionalGeneration:
    with loading(folder, label):
        check_config(folder)
        model, info = ELMForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, **model_kwargs
        )
        if unexpected := sorted(info["unexpected_keys"]):
            raise ValueError(
                f"its weights hold {some_of(unexpected)}, for which the model of config.json has no place."
            )
        check_finite(model.state_dict(), "it")
    return model


def _load_adapted(folder: Path, label: str, **model_kwargs: Any) -> ELMForConditionalGeneration:
    with loading(folder, label):
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config.base_model_name_or_path, str):
            raise ValueError(
                f"adapter_config.json does not name its base model (base_model_name_or_path is {config.base_model_name_or_path})."
            )
    base_path = base_of_adapter(folder)
    base_folder, _ = model_folder(base_path, ["config.json"], config.revision or "main", "The adapter's base")
    base = _load_whole(base_folder, f"The adapter's base {base_path}", **model_kwargs)
    # PEFT uses a name that transformers is about to change
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    with loading(folder, label), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
        warnings.filterwarnings(
            "ignore", "(?s).*copying from a non-meta parameter"
        )  # on the meta device, where none is copied
        weights = folder / "adapter_model.safetensors"
        if not weights.is_file():
            raise ValueError(f"it has no {weights.name}, the weights of the adapter.")
        try:
            model = PeftModel.from_pretrained(base, folder)
        except KeyError as error:  # of a module that is saved whole
            raise ValueError(f"{weights.name} is not complete: it lacks {error.args[0]}.") from error
        with safe_open(weights, "pt") as file:
            saved = set(file.keys())
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        if lacking := sorted(expected.keys() - saved):
            raise ValueError(f"{weights.name} is not complete: it lacks {some_of(lacking)}.")
        if unexpected := sorted(saved - expected.keys() - model.state_dict().keys()):
            raise ValueError(
                f"{weights.name} holds {some_of(unexpected)}, for which its base {base_path} has no place."
            )
        check_weights(folder, expected)
        check_finite(expected, "it")
        return model.merge_and_unload()
