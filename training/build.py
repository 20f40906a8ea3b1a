"""A new ELM and its processor from the command line's arguments."""

import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    FeatureExtractionMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.configuration_ecg_pretraining import ECGPretrainingConfig
from elm_ecg.configuration_elm import IMAGE_REPRESENTATIONS, ELMConfig
from elm_ecg.ecg_drawing import ECGPaper
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.image_processing_elm import ECGImageProcessor
from elm_ecg.modeling_connectors import adopt_connector_class
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.modeling_parts import adopt_encoder_class
from elm_ecg.modeling_vision_encoders import image_size, vision_config, vision_model_class
from elm_ecg.own_code import load_own_class
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.tokenization_ecg_byte import FILE_NAME, ECGByteTokenizer
from elm_ecg.training.arguments import VISION_BACKBONES, ModelArguments
from elm_ecg.training.chat_templates import choose_chat_template, stop_at_end_of_turn
from elm_ecg.training.command_line import did_you_mean
from elm_ecg.training.contract import check_encoder_class, check_own_parts
from elm_ecg.training.evaluation.thinking import TAGS
from elm_ecg.training.files import read_json, resource
from elm_ecg.training.llms import place_of_llm, resolve_llm
from elm_ecg.training.model_files import ENCODER_FOLDER, find_model_file
from elm_ecg.training.parser import ELMParser
from elm_ecg.training.thinking_tokens import add_rows, add_thinking_tokens

logger = logging.getLogger(__name__)


# values of a stacked record that are black and white, by its normalization: millivolts, deviations, or its own range
VALUE_RANGES = {"none": (-2.0, 2.0), "zscore": (-4.0, 4.0), "minmax": (0.0, 1.0)}
# of a feature extractor, what the samples of a record are; how many there are, an encoder itself says
OF_RECORDS = ("sampling_rate", "lead_names", "normalization", "bandpass", "notch")
DEFAULT_ECG_TOKENIZER = resource("training/tokenizers/ptbxl_250hz")


def place_of_encoder(args: ModelArguments) -> str | None:
    """Where the pretrained encoder of `--encoder` is loaded from; None for a new one.

    That is an encoder, or an ELM that has one; of what `elm pretrain` leaves, the folder of the encoder in it.
    """
    if args.encoder_name_or_path is None or args.architecture != "llava":
        return None
    place, file = find_model_file(args.encoder_name_or_path, ["config.json", "adapter_config.json"], label="--encoder")
    if file == "adapter_config.json":
        raise ValueError(
            f"--encoder {place} is a LoRA adapter, which has its encoder partly in its base. Save that by itself with `elm export {place} --part "
            "encoder --output_dir FOLDER`, and name the FOLDER."
        )
    if (
        Path(place).is_dir()
        and read_json(Path(place) / "config.json").get("model_type") == ECGPretrainingConfig.model_type
    ):
        encoder = Path(place) / ENCODER_FOLDER
        if not (encoder / "config.json").is_file():
            raise ValueError(
                f"--encoder {place} is a pretraining model, whose encoder is missing: it has no {encoder}."
            )
        place = str(encoder)
    _check_kind(args, place)
    return place


def _check_kind(args: ModelArguments, place: str) -> None:
    """ValueError if `--encoder` was said too, and names another kind of encoder than the one that lies at `place`."""
    said = args.said_encoder
    if said in (None, args.encoder_name_or_path, *VISION_BACKBONES):  # the last may lie here as a copy
        return
    settings = PreTrainedConfig.get_config_dict(place)[0]
    kind = (settings.get("encoder_config") or settings).get("model_type")  # of an ELM, that of its encoder
    if kind in (None, ELMConfig.model_type):  # without encoder: an error when it is loaded
        return
    tower = "_vision_model"  # alone, or with its text model
    if str(said).removesuffix(tower) != kind.removesuffix(tower):
        raise ValueError(
            f"--encoder {said} and --encoder_name_or_path {args.encoder_name_or_path}, which is of the kind {kind}, name two encoders; leave "
            "one of the two out."
        )


def connector_file(args: ModelArguments) -> Path | None:
    """The file of `--connector FILE.py:Class`; None of one by its name."""
    file, _, _ = (args.connector or "").rpartition(":")
    return Path(file) if file else None


def connector_name(args: ModelArguments) -> str | None:
    """The connector as `ELMConfig` calls it; the code of somebody's own is loaded.

    Raises:
        ValueError: there is no such file or class.
    """
    file = connector_file(args)
    if file is None:
        return args.connector
    name = str(args.connector).rpartition(":")[2]
    with loading_code(f"--connector {args.connector}"):
        connector_class: Any = load_own_class(f"{file.stem}.{name}", file.absolute().parent, trust_remote_code=True)
    if not (isinstance(connector_class, type) and issubclass(connector_class, nn.Module)):
        raise ValueError(f"--connector {args.connector}: {name} is no torch.nn.Module.")
    return adopt_connector_class(connector_class)


@contextmanager
def loading_code(label: str) -> Iterator[None]:
    """Makes one ValueError of whatever goes wrong while the block runs somebody else's code."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{label} cannot be loaded: {type(error).__name__}: {error}") from error


def encoder_config(args: ModelArguments, num_leads: int) -> PreTrainedConfig:
    """The configuration of an encoder with random weights, or of a pretrained vision backbone."""
    assert args.encoder is not None  # set with the arguments
    if args.representation in IMAGE_REPRESENTATIONS:
        if (place := place_of_encoder(args)) is not None:
            settings = PreTrainedConfig.get_config_dict(place)[0]
            kind, of_elm = settings.get("model_type"), settings.get("representation")
            if kind in ENCODER_CONFIGS or (kind == ELMConfig.model_type and of_elm not in IMAGE_REPRESENTATIONS):
                raise ValueError(
                    f"--encoder {place} reads no pictures, with --representation {args.representation}; leave the latter out, or name a vision "
                    "backbone."
                )
            config = vision_config(place)
            if kind != ELMConfig.model_type:
                vision_model_class(config, args.image_features)  # which raises where it reads no images
            return config
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
    return make_encoder_config(config_class, args.encoder_fields, shape)


def make_encoder_config(config_class: Any, encoder_fields: dict[str, Any], shape: dict[str, int]) -> PreTrainedConfig:
    """A configuration with the fields of `--encoder_config`, and of a `shape` what it has fields for."""
    known = {field.name for field in fields(config_class)} | {*inspect.signature(config_class.__init__).parameters}
    if unknown := encoder_fields.keys() - known:
        of_all = {field.name for field in fields(PreTrainedConfig)}
        raise ValueError(
            f"--encoder_config: {config_class.__name__} has no field {', '.join(sorted(unknown))}; it has "
            f"{', '.join(field.name for field in fields(config_class) if field.name not in of_all)}."
        )
    shape = {name: value for name, value in shape.items() if name in known}
    return config_class(**{**shape, **encoder_fields})


def check_given_encoder(encoder: Any, args: ModelArguments) -> None:
    """ValueError if what was given from Python is neither class nor model of an encoder, or `args` do not go with it."""
    encoder_class = encoder if isinstance(encoder, type) else type(encoder)
    if args.architecture != "llava" or args.representation != "signal":
        raise ValueError(
            f"encoder={encoder_class.__name__} with architecture={args.architecture!r} and representation={args.representation!r}; an "
            "encoder that is given as a class or model reads the samples of records: expected 'llava' and 'signal'."
        )
    if encoder_class not in ENCODER_MODELS.values():
        check_encoder_class(encoder_class)
    if encoder_class is not encoder and args.encoder_fields:
        raise ValueError(
            "encoder_config with a model as encoder, whose own config stands; leave it out, or give its class."
        )


def given_encoder(encoder: Any, args: ModelArguments, num_leads: int) -> PreTrainedModel:
    """The encoder that was given from Python, as a class or a model, and passed `check_given_encoder`."""
    encoder_class = encoder if isinstance(encoder, type) else type(encoder)
    if encoder_class is encoder:
        shape = {"num_leads": num_leads, "num_samples": args.num_samples}
        encoder = encoder_class(make_encoder_config(encoder_class.config_class, args.encoder_fields, shape))
    if encoder_class not in ENCODER_MODELS.values():
        encoder.config.auto_map = adopt_encoder_class(encoder_class)
    return encoder


def build_image_processor(args: ModelArguments, config: PreTrainedConfig) -> ECGImageProcessor:
    """The image processor of the vision backbone, for pictures of the size that the backbone reads."""
    if (place := place_of_encoder(args)) is not None:
        if PreTrainedConfig.get_config_dict(place)[0].get("model_type") == ELMConfig.model_type:
            of_elm = ELMProcessor.from_pretrained(place, trust_remote_code=False).image_processor
            settings = of_elm.image_processor.to_dict()
        else:
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
    if args.thinking_tokens:
        add_thinking_tokens(tokenizer)
    if args.representation == "symbolic" and ecg_byte is None:
        place = args.ecg_tokenizer or str(DEFAULT_ECG_TOKENIZER)
        if not Path(place).exists():
            place, _ = find_model_file(place, [FILE_NAME], label="--ecg_tokenizer")
        ecg_byte = ECGByteTokenizer.from_pretrained(place)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # Llama has none; labels do not depend on it
    feature_extractor = ECGFeatureExtractor(**args.extractor_fields)
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
    template, origin = choose_chat_template(tokenizer, resolve_llm(args.llm))
    assert args.num_ecg_tokens is not None  # set with the arguments
    num_ecg_tokens = 0 if args.architecture == "text" else args.num_ecg_tokens
    return ELMProcessor(
        feature_extractor,
        tokenizer,
        template,
        num_ecg_tokens,
        representation=args.representation,
        image_processor=image_processor,
        ecg_byte=ecg_byte,
        # tokens; None: any
        max_length=getattr(
            AutoConfig.from_pretrained(llm, revision=revision, trust_remote_code=False).get_text_config(),
            "max_position_embeddings",
            None,
        ),
        overflow=args.ecg_overflow,
        chat_template_origin=origin,
    )


def elm_fields(
    args: ModelArguments, processor: ELMProcessor, in_vocabulary: bool = False, encoder: PreTrainedModel | None = None
) -> dict[str, Any]:
    """The fields of a new ELM's configuration, without those of its pretrained parts and of an `encoder` that is there."""
    num_leads = len(processor.feature_extractor.lead_names)
    names = ("architecture", "representation", "num_ecg_tokens", "image_features", "num_samples")
    config: dict[str, Any] = {name: getattr(args, name) for name in names}
    config |= {"connector": connector_name(args), "connector_config": args.connector_fields or None}
    config |= {"ecg_token_id": processor.ecg_token_id, "num_leads": num_leads}
    ids = processor.signal_token_ids
    if ids and not in_vocabulary:
        if ids != list(range(ids[0], ids[0] + len(ids))):
            raise ValueError(
                f"--llm {args.llm} has some tokens of the ECG tokenizer already, as one that was trained with them has; expected a "
                "language model of text alone."
            )
        config |= {"first_signal_token_id": ids[0], "num_signal_tokens": len(ids)}
    if args.architecture == "llava" and args.encoder_name_or_path is None and encoder is None:
        config["encoder_config"] = encoder_config(args, num_leads)  # a pretrained one brings its own
    return config


def build_model(
    args: ModelArguments,
    processor: ELMProcessor,
    in_vocabulary: bool = False,
    encoder: Any = None,
    trust_remote_code: bool = False,
    **llm_kwargs: Any,
) -> ELMForConditionalGeneration:
    """An ELM around the pretrained language model, which stays as it is; tokens of symbolic ECGs get embeddings of their own.

    Args:
        in_vocabulary: leave those tokens to the vocabulary, as in the reference.
        encoder: class or instance, in place of that of `args`.
        trust_remote_code: run the code that comes with the encoder of `args`.
        llm_kwargs: for `from_pretrained` of the language model (`dtype`, `attn_implementation`, `revision`, ...).
    """
    place = place_of_llm(args, llm_kwargs.get("revision") or "main")
    if encoder is not None:
        encoder = given_encoder(encoder, args, len(processor.feature_extractor.lead_names))
    fields = elm_fields(args, processor, in_vocabulary, encoder)
    if encoder is None and (encoder := place_of_encoder(args)) is not None:
        _compare_records(encoder, processor)
    return build_around(place, encoder, fields, processor, trust_remote_code, **llm_kwargs)


def _compare_records(encoder: str, processor: ELMProcessor) -> None:
    """Warns if records are prepared otherwise than those that a pretrained encoder has learnt from, where it says so."""
    if processor.representation != "signal":
        return
    try:
        learnt = FeatureExtractionMixin.get_feature_extractor_dict(encoder)[0]
    except OSError:  # it has no feature extractor
        return
    prepared = json.loads(processor.feature_extractor.to_json_string())  # as those that were saved
    differ = [name for name in OF_RECORDS if name in learnt and learnt[name] != prepared[name]]
    if differ:
        logger.warning(
            "The encoder %s has learnt from records that were prepared otherwise, so that what it makes of these may be worth little. Its own: %s.",
            encoder,
            ", ".join(f"{_said(name, learnt[name])} (now {_word(prepared[name])})" for name in differ),
        )


def _said(name: str, value: Any) -> str:
    return f"no --{name}" if value is None else f"--{name} {_word(value)}"


def _word(value: Any) -> str:
    if value is None:
        return "none"
    values = value if isinstance(value, list) else [value]
    return " ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in values)


def build_around(
    llm: str,
    encoder: str | PreTrainedModel | None,
    fields: dict[str, Any],
    processor: ELMProcessor,
    trust_remote_code: bool = False,
    **llm_kwargs: Any,
) -> ELMForConditionalGeneration:
    """As `build_model`, of the pretrained parts or their places, and the `elm_fields`.

    Raises:
        ValueError: an encoder or connector of somebody's own does not do what is expected of it.
    """
    model = ELMForConditionalGeneration.from_encoder_llm_pretrained(
        llm, encoder, llm_kwargs, trust_remote_code=trust_remote_code, **fields
    )
    check_own_parts(model)
    config, extractor = model.config, processor.feature_extractor
    prepared = (len(extractor.lead_names), extractor.num_samples)
    if config.representation == "signal" and (config.num_leads, config.num_samples) != prepared:
        raise ValueError(
            f"The encoder reads records of {config.num_leads} leads x {config.num_samples} samples, and they are prepared with "
            f"{prepared[0]} x {prepared[1]}; say --num_samples {config.num_samples}, and --lead_names for as many leads."
        )
    tokens = processor.tokenizer.get_vocab()
    # those of the language model itself come before the placeholder, which is added first
    add_rows(model, processor, [tag for tag in TAGS if tokens.get(tag, -1) > processor.ecg_token_id])
    if model.config.num_signal_tokens:
        spread_embeddings(model)
    text_config = model.config.get_text_config()
    text_config.pad_token_id = model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    stop_at_end_of_turn(model, processor)
    return model


def new_elm(
    llm: str,
    *,
    encoder: Any = None,
    connector: Any = None,
    seed: int = 0,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    revision: str = "main",
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[ELMForConditionalGeneration, ELMProcessor]:
    """A new ELM around a pretrained language model (a name of `LLMS`, Hub id or local folder), and its processor.

    Args:
        encoder: a name, folder or Hub id, such as "merl"; or somebody's own: its class (new weights) or the model itself.
        connector: a name, such as "mlp", or somebody's own class.
        seed: of the new weights.
        revision: branch, tag or commit of a language model on the Hub.
        trust_remote_code: run the code that comes with an encoder in a folder or on the Hub.
        options: the other fields of `ModelArguments`, such as `representation="signal"`; a ValueError names one that is unknown, or
            does not go with the others.
    """
    parser = ELMParser(ModelArguments, prog="new_elm")
    if isinstance(connector, type):
        connector = adopt_connector_class(connector)
    named = encoder if isinstance(encoder, str) else None
    options |= {name: value for name, value in (("encoder", named), ("connector", connector)) if value is not None}
    parser.set_defaults_with_config(llm=llm, **options)  # checks names and values as those of a YAML file
    (args,) = parser.parse_args_into_dataclasses([])
    given = None if named else encoder
    if given is not None:
        check_given_encoder(given, args)
    processor = build_processor(args, revision)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays; weights are drawn on the CPU
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed those of GPUs too
        llm_kwargs: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation, "revision": revision}
        return build_model(args, processor, encoder=given, trust_remote_code=trust_remote_code, **llm_kwargs), processor


@torch.no_grad()
def spread_embeddings(model: ELMForConditionalGeneration) -> None:
    """Starts the tokens of symbolic ECGs where words are, and as far from each other.

    Near one point all ECGs would be the same text, and they would part slowly at the learning rates of fine-tuning. A word is what
    the language model's embeddings give out: some are scaled there.
    """
    weight = model.model.signal_embeddings.weight
    # rows behind the placeholder's are spare
    num_words = min(model.config.ecg_token_id, model.config.text_config.vocab_size)
    some = torch.linspace(0, num_words - 1, min(num_words, 10_000), device=weight.device).long()
    words = model.model.embed(some.unsqueeze(0))[0].float()
    weight.copy_(torch.normal(*(row.expand(len(weight), -1) for row in (words.mean(0), words.std(0)))))
