"""An ECG encoder from any place: a folder or Hub id of its own, of an ELM, or of a pretraining model; with what prepares its records."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoModel,
    AutoTokenizer,
    FeatureExtractionMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import FEATURE_EXTRACTOR_NAME

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.configuration_ecg_pretraining import ECGPretrainingConfig
from elm_ecg.configuration_elm import IMAGE_REPRESENTATIONS, ELMConfig
from elm_ecg.ecg_utils import STANDARD_LEADS, ECGRecord
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.image_processing_elm import ECGImageProcessor
from elm_ecg.modeling_common import some_of
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS
from elm_ecg.modeling_ecg_pretraining import ECGForPreTraining
from elm_ecg.modeling_vision_encoders import encode_images, load_vision_model, vision_config, vision_model_class
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.digest import CODE_FILES, MODEL_FILES
from elm_ecg.training.load import load_elm
from elm_ecg.training.model_files import (
    check_depth,
    check_finite,
    find_model_file,
    is_own_encoder,
    loading,
    model_folder,
)

EXTRACTOR_OPTIONS = ("sampling_rate", "lead_names", "normalization")  # of encoders that do not come with them


@dataclass
class LoadedEncoder:
    """An encoder, and how records become its inputs.

    Args:
        model: the encoder alone, in float32 and evaluation mode.
        extractor: makes records of the rate, length and leads that the encoder reads.
        folder: where its files are: a local folder, or that of a commit in the Hub's cache.
        to_pictures: makes the inputs of a vision backbone from records; None of an encoder of signals.
        image_features: what is read of a vision backbone, see `encode_images`.
        pretraining: the whole pretraining model where the encoder is of one that has a text encoder too, with its `tokenizer`.
    """

    model: PreTrainedModel
    extractor: ECGFeatureExtractor
    folder: Path
    to_pictures: Callable[[list[ECGRecord]], Mapping[str, torch.Tensor]] | None = None
    image_features: str = "patches"
    pretraining: Any = None
    tokenizer: Any = None

    def prepare(self, records: Sequence[ECGRecord]) -> dict[str, torch.Tensor]:
        """The inputs of the encoder for records; ValueError if one lacks a lead, or is too long."""
        if self.to_pictures is not None:
            return dict(self.to_pictures(list(records)))
        return dict(self.extractor(list(records), return_tensors="pt"))

    def features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean over the tokens that the encoder makes of each record, [records, width], without those of padding."""
        if self.to_pictures is not None:
            tokens = encode_images(self.model, self.image_features, **inputs)
            mask = inputs.get("pixel_attention_mask")
            if mask is None or self.image_features != "patches":
                return tokens.mean(dim=1)
            weights = mask.to(tokens.dtype).unsqueeze(-1)
            return (tokens * weights).sum(dim=1) / weights.sum(dim=1)
        output = self.model(inputs["ecg_values"], lead_mask=inputs.get("ecg_lead_mask"))
        states: Any = getattr(output, "last_hidden_state", None)
        if not isinstance(states, torch.Tensor) or states.ndim != 3 or len(states) != len(inputs["ecg_values"]):
            got = list(states.shape) if isinstance(states, torch.Tensor) else type(output).__name__
            raise ValueError(
                f"{type(self.model).__name__} gave {got}; expected an output whose last_hidden_state is [records, tokens, width]."
            )
        return states.mean(dim=1)

    def with_random_weights(self, seed: int) -> "LoadedEncoder":
        """The same encoder with the weights that it would have before any training."""
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays
            torch.default_generator.manual_seed(seed)
            model = type(self.model)(deepcopy(self.model.config))
        return replace(self, model=model.float().eval(), pretraining=None, tokenizer=None)


def load_encoder(
    name: str, revision: str = "main", trust_remote_code: bool = False, truncation: str | None = None, **options: Any
) -> LoadedEncoder:
    """The encoder of a folder or Hub id: an ECG encoder, a vision backbone, an ELM (also a LoRA adapter), or a pretraining model.

    Args:
        trust_remote_code: run the code that an encoder of one's own comes with.
        truncation: which part of a longer record is kept; None: as the encoder's feature extractor says.
        options: `EXTRACTOR_OPTIONS` of an ECG encoder without `preprocessor_config.json`; None is not said.

    Raises:
        ValueError: as `find_model_file`; files are damaged or incomplete, or weights are NaN; there is no encoder; its feature
            extractor is missing, or does not fit it; an option is given that the encoder has a value of.
    """
    folder, filename = model_folder(name, ["adapter_config.json", "config.json"], revision, "The encoder")
    if trust_remote_code and not Path(name).exists():
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*MODEL_FILES, *CODE_FILES]))
    label = f"The encoder {name}"
    with loading(folder, label):
        settings = PreTrainedConfig.get_config_dict(folder)[0] if filename == "config.json" else {}
        model_type = settings.get("model_type", ELMConfig.model_type)
        check_depth(folder, settings)
    own_code = is_own_encoder(settings)
    if own_code and not trust_remote_code:
        raise ValueError(
            f"{label} is a {model_type!r} model, none of ours ({', '.join(ENCODER_CONFIGS)}), and comes with code of its own: read that, "
            "and if you trust it say --trust_remote_code."
        )
    options = {option: value for option, value in options.items() if value is not None}
    if model_type == ELMConfig.model_type:
        _refuse(options, label)
        encoder = _of_elm(name, revision, folder, trust_remote_code)
    else:
        with loading(folder, label):
            if model_type == ECGPretrainingConfig.model_type:
                encoder = _of_pretraining(folder, options, trust_remote_code)
            elif model_type in ENCODER_CONFIGS or own_code:
                model = _ecg_model(folder, model_type)
                encoder = LoadedEncoder(model, _extractor(folder, model.config, options), folder)
            else:
                encoder = _of_vision(folder)
                _refuse(options, "it")
            check_finite(encoder.model.state_dict(), "it")
    encoder.model.float().eval().requires_grad_(False)
    if truncation is not None:
        encoder.extractor.truncation = truncation
    return encoder


def load_text_encoder(name: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """The text encoder of `--text_encoder`, in float32, and its tokenizer.

    Raises:
        ValueError: as `find_model_file`; files are damaged; it is a model of ECGs, or comes without tokenizer.
    """
    place, _ = find_model_file(name, ["config.json"], label="--text_encoder")
    with loading(Path(place), f"--text_encoder {name}"):
        kind = PreTrainedConfig.get_config_dict(place)[0].get("model_type")
        expected = "expected a text encoder with its tokenizer, such as ncbi/MedCPT-Query-Encoder."
        if kind in (*ENCODER_CONFIGS, ELMConfig.model_type, ECGPretrainingConfig.model_type):
            raise ValueError(f"it is a {kind!r} model, which reads ECGs; {expected}")
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one of no files
                raise ValueError("It has no words.")
        except Exception as error:  # of several libraries
            raise ValueError(f"its tokenizer cannot be read; {expected} {error}") from error
        return AutoModel.from_pretrained(place, trust_remote_code=False, dtype="float32"), tokenizer


def _of_elm(name: str, revision: str, folder: Path, trust_remote_code: bool) -> LoadedEncoder:
    elm, processor = load_elm(name, revision, trust_remote_code, dtype="auto")
    if elm.model.encoder is None:
        raise ValueError(
            f"The ELM {name} has no encoder (its architecture is {elm.config.architecture}); expected one of the architecture llava."
        )
    to_pictures = None
    if elm.config.representation in IMAGE_REPRESENTATIONS:
        to_pictures = partial(_pictures_of_elm, processor)
    features = elm.config.image_features
    return LoadedEncoder(elm.model.encoder, processor.feature_extractor, folder, to_pictures, features)


def _pictures_of_elm(processor: ELMProcessor, records: list[ECGRecord]) -> Mapping[str, torch.Tensor]:
    return processor(ecgs=records, return_tensors="pt")


def _of_pretraining(folder: Path, options: dict[str, Any], trust_remote_code: bool) -> LoadedEncoder:
    model = ECGForPreTraining.from_pretrained(
        folder, trust_remote_code=trust_remote_code, use_safetensors=True, dtype=torch.float32
    ).eval()
    check_finite(model.state_dict(), "it")
    encoder = LoadedEncoder(model.encoder, _extractor(folder, model.encoder.config, options), folder)
    if model.text_encoder is None:
        return encoder
    return replace(encoder, pretraining=model, tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def _ecg_model(folder: Path, model_type: str) -> PreTrainedModel:
    arguments: dict[str, Any] = {"output_loading_info": True, "use_safetensors": True, "dtype": torch.float32}
    if model_type in ENCODER_CONFIGS:  # the code that is installed, not the copy in its folder
        model, info = ENCODER_MODELS[model_type].from_pretrained(folder, **arguments)
    else:
        model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, **arguments)
    for keys, what in (("missing_keys", "lack"), ("unexpected_keys", "hold, without a place for it in the model,")):
        if names := sorted(info[keys]):
            raise ValueError(f"its weights {what} {some_of(names)}; take a whole copy of the model.")
    return model


def _of_vision(folder: Path) -> LoadedEncoder:
    """A vision backbone, which is shown records of 10 s on ECG paper."""
    vision_model_class(vision_config(folder), "patches")  # it reads images
    if not (folder / FEATURE_EXTRACTOR_NAME).is_file():
        raise ValueError(
            f"it is a vision backbone without image processor ({FEATURE_EXTRACTOR_NAME}), so nobody knows what pictures it reads; copy the one that "
            "was saved with it."
        )
    images = ECGImageProcessor(ImageProcessingMixin.get_image_processor_dict(folder)[0], "rgb")
    extractor = ECGFeatureExtractor()
    to_pictures = partial(_drawn, extractor, images)
    return LoadedEncoder(load_vision_model(folder, "patches"), extractor, folder, to_pictures)


def _drawn(
    extractor: ECGFeatureExtractor, images: ECGImageProcessor, records: list[ECGRecord]
) -> Mapping[str, torch.Tensor]:
    seconds = extractor.num_samples / extractor.sampling_rate
    return images(extractor.prepare_batch(records), seconds, extractor.lead_names, return_tensors="pt")


def _refuse(options: dict[str, Any], label: str) -> None:
    if options:
        named = " and ".join(f"--{option}" for option in options)
        raise ValueError(f"{label} comes with what prepares its records; leave {named} out.")


def _extractor(folder: Path, config: Any, options: dict[str, Any]) -> ECGFeatureExtractor:
    """The feature extractor that was saved with an ECG encoder, or the one that the options describe."""
    num_leads, num_samples = getattr(config, "num_leads", None), getattr(config, "num_samples", None)
    if (folder / FEATURE_EXTRACTOR_NAME).is_file():
        _refuse(options, "it")
        kind = FeatureExtractionMixin.get_feature_extractor_dict(folder)[0].get("feature_extractor_type")
        if kind != ECGFeatureExtractor.__name__:
            raise ValueError(
                f"its {FEATURE_EXTRACTOR_NAME} is of a {kind}; expected an {ECGFeatureExtractor.__name__}."
            )
        extractor = ECGFeatureExtractor.from_pretrained(folder)
    else:
        lead_names = options.get("lead_names", STANDARD_LEADS if num_leads in (None, 12) else None)
        if "sampling_rate" not in options or lead_names is None:
            lacking = "--lead_names" if "sampling_rate" in options else "--sampling_rate"
            raise ValueError(
                f"it has no {FEATURE_EXTRACTOR_NAME}, so nobody knows what records it reads; say it with {lacking}, and where they differ from "
                "the twelve standard leads and from millivolts, --lead_names and --normalization."
            )
        length = {} if num_samples is None else {"num_samples": num_samples}
        extractor = ECGFeatureExtractor(**{**options, **length, "lead_names": lead_names})
    pairs = {"leads": (len(extractor.lead_names), num_leads), "samples": (extractor.num_samples, num_samples)}
    for what, (given, expected) in pairs.items():
        if expected not in (None, given):
            raise ValueError(
                f"its records have {given} {what} by its feature extractor, and the encoder reads {expected}; take the {FEATURE_EXTRACTOR_NAME} that "
                "was saved with it, or name as many --lead_names."
            )
    return extractor
