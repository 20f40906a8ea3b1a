"""Command-line and YAML arguments of fine-tuning and evaluation, beside TRL's `SFTConfig` and `ModelConfig`."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.configuration_elm import (
    ARCHITECTURES,
    CONNECTORS,
    IMAGE_FEATURES,
    IMAGE_REPRESENTATIONS,
    REPRESENTATIONS,
    connectors_of,
    default_num_ecg_tokens,
    is_own_connector,
)
from elm_ecg.feature_extraction_elm import MISSING_LEADS, NORMALIZATIONS, TRUNCATIONS
from elm_ecg.symbolic_elm import OVERFLOWS
from elm_ecg.training.command_line import did_you_mean, read_system_prompt

logger = logging.getLogger(__name__)

# pretrained values of --encoder, the default for pictures first
VISION_BACKBONES = {
    "clip-vit-base-patch32": "openai/clip-vit-base-patch32",
    "siglip2-so400m-patch16-naflex": "google/siglip2-so400m-patch16-naflex",
    "vit-base-patch16-224-in21k": "google/vit-base-patch16-224-in21k",
}
PARTS = ["encoder", "connector", "llm"]
# values of the reference's --elm
ELMS: dict[str, tuple[str, str | None]] = {
    "llava": ("llava", "linear"),
    "linear_llava": ("llava", "linear"),
    "mlp_llava": ("llava", "mlp"),
    "fuyu": ("fuyu", "patch"),
    "base_elf": ("fuyu", "flat"),
    "patch_elf": ("fuyu", "patch"),
    "conv_elf": ("fuyu", "conv"),
    "ecg_byte": ("text", None),  # and the symbolic representation
    "text": ("text", None),
}


# what a number has to be -> whether it is so
_HOLDS: dict[str, Callable[[float], bool]] = {
    "at least 0": lambda value: 0 <= value < float("inf"),  # NaN fails too
    "at least 1": lambda value: 1 <= value < float("inf"),
    "at least 1, or -1 for none": lambda value: value == -1 or 1 <= value < float("inf"),
    "above 0": lambda value: 0 < value < float("inf"),
    "above 0 and at most 1": lambda value: 0 < value <= 1,
    "from 0 to 1": lambda value: 0 <= value <= 1,
    "at least 0 and below 0.5": lambda value: 0 <= value < 0.5,
    "at least 0 and below 1": lambda value: 0 <= value < 1,
}


def argument(default: Any, help_text: str, **metadata: Any) -> Any:
    """A field of a command's arguments, with its help and for a list the `choices` of its items."""
    of_list = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": help_text, **metadata}, **of_list)


@dataclass
class DataArguments:
    """Which chats and ECGs, and what is done to them."""

    _argument_group_name = "data"

    data: list[str] = argument(
        MISSING,  # no default: HfArgumentParser makes the option required
        "Datasets, of several a mixture: local folders (made by `elm data build` or `save_to_disk`, or of parquet or JSON "
        "Lines files) or Hub ids, with the columns `messages` and `ecg`; or keys that `elm data list` shows.",
    )
    data_weights: list[float] | None = argument(
        None,
        "Share that each of --data has among the rows, drawn by --seed until all rows of each were there once. "
        "Default: one dataset after the other.",
    )
    fold: int | None = argument(None, "Fold of datasets that have splits such as fold1_train and fold1_test.")
    ecg_root: str | None = argument(
        None,
        "Folder of the ECG files that a dataset names, or of the downloads that the reference made them of; others are not read. Default: "
        "its own, if it is local.",
    )
    data_subset: float | None = argument(None, "Use this share of the rows, in (0, 1], chosen at random by --seed.")
    perturb: Literal["noise", "zeros", "only_text"] | None = argument(
        None, "Replace every ECG by Gaussian noise or by zeros, or leave it out of the text."
    )
    system_prompt: str | None = argument(
        None,
        "System message, or a file that holds it, before each chat that begins with none; a trained model keeps it. Default: "
        "the model's own; '' for none.",
    )

    def __post_init__(self) -> None:
        self.system_prompt = read_system_prompt(self.system_prompt)
        if self.data_subset is not None and not 0 < self.data_subset <= 1:  # `not` round it all refuses NaN too
            raise ValueError(f"--data_subset is {self.data_subset}; expected a share of the rows in (0, 1].")
        weights, count = self.data_weights, len(self.data)
        if weights is not None and not (len(weights) == count and all(weight > 0 for weight in weights)):
            raise ValueError(
                f"--data_weights is {weights}; expected a positive number for each of the {count} of --data."
            )


@dataclass
class RecordArguments:
    """How records are prepared."""

    _argument_group_name = "records"

    sampling_rate: int = argument(250, "Hz to which records are resampled.")
    num_samples: int = argument(2500, "Samples per lead: records are padded to it.")
    truncation: str | None = argument(
        None, "Which part of a longer record to keep. Default: a longer record is an error.", choices=TRUNCATIONS[1:]
    )
    lead_names: list[str] | None = argument(None, "Leads and their order. Default: I II III aVR aVL aVF V1 ... V6.")
    missing_leads: str = argument(
        "error",
        "Leads that a record lacks and that cannot be computed from I and II: an error, or zeros, of which the model is told.",
        choices=MISSING_LEADS,
    )
    bandpass: list[float] | None = argument(
        None, "Low and high frequency in Hz that pass, such as 0.5 40. Default: no filter."
    )
    notch: float | None = argument(None, "Hz of the mains that is taken out, 50 or 60. Default: no filter.")
    normalization: str | None = argument(
        None,
        "none keeps millivolts (default); zscore and minmax (default of stacked_signal) are computed for each record.",
        choices=NORMALIZATIONS,
    )

    @property
    def extractor_fields(self) -> dict[str, Any]:
        """The arguments of the feature extractor."""
        names = ("sampling_rate", "num_samples", "bandpass", "notch", "missing_leads")
        settings: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.lead_names is not None:
            settings["lead_names"] = self.lead_names
        # truncation False: a longer record is an error
        return {**settings, "normalization": self.normalization or "none", "truncation": self.truncation or False}


@dataclass
class ModelArguments(RecordArguments):
    """What a new ELM is made of."""

    _argument_group_name = "a new model"

    llm: str = argument(
        "llama-3.2-1b-instruct",
        "Language model: a name of docs/reference/models.md, a Hub id or a local folder. Llama, Gemma and MedGemma are gated: accept their "
        "licence on the Hub, then run `hf auth login`.",
    )
    elm: str | None = argument(
        None, "Short for --architecture and --connector, as in the reference.", choices=list(ELMS)
    )
    architecture: str | None = argument(
        None,
        "llava (default): ECG encoder and connector; fuyu: connector alone; text: neither, for symbolic ECGs or none.",
        choices=ARCHITECTURES,
    )
    connector: str | None = argument(
        None,
        f"{' or '.join(map(str, connectors_of('llava')))} for llava, {' or '.join(map(str, connectors_of('fuyu')))} for fuyu. "
        "Default: the first. FILE.py:Class is your own.",
    )
    connector_config: str | None = argument(
        None,
        'JSON with fields of the connector, such as of the perceiver {"num_hidden_layers": 3, "hidden_size": 256}.',
    )
    representation: str = argument(
        "signal",
        "What the model reads of a record: signal: its samples; symbolic: ECG-Byte tokens in the text; rgb: a drawing on "
        "ECG paper; stacked_signal: a grey picture of leads x samples.",
        choices=REPRESENTATIONS,
    )
    ecg_tokenizer: str | None = argument(
        None,
        "ECG-Byte tokenizer of symbolic ECGs: local folder or Hub id. Default: the one that comes with the package.",
    )
    ecg_overflow: str = argument(
        "error", "Symbolic ECGs that exceed the context: an error, half their rate, or fewer leads.", choices=OVERFLOWS
    )
    encoder: str | None = argument(
        None,
        f"Encoder of llava. With random weights: {', '.join(ENCODER_CONFIGS)} (default: st_mem) for signal; for rgb and "
        "stacked_signal the model_type of a vision backbone of transformers, such as vit. Pretrained: "
        f"{', '.join(VISION_BACKBONES)} (default: the first), or any as --encoder_name_or_path.",
    )
    encoder_config: str | None = argument(  # a YAML file may also hold a mapping, see `json_fields`
        None, 'JSON with fields of the config of an encoder with random weights, such as {"num_hidden_layers": 4}.'
    )
    encoder_name_or_path: str | None = argument(
        None,
        "Pretrained ECG encoder or vision backbone, Hub id or local folder, also of an ELM, or of what `elm pretrain` leaves. "
        "Default: what --encoder says. An encoder with code of its own needs --trust_remote_code.",
    )
    image_features: str = argument(
        "patches",
        "What the connector reads of a vision backbone: its patches, or its pooled vector (the reference).",
        choices=list(IMAGE_FEATURES),
    )
    paper: str | None = argument(
        None, 'JSON with fields of ECGPaper, which draws rgb, such as {"layout": "3x4", "gain": 20, "line_width": 0.5}.'
    )
    image_processor: str | None = argument(
        None,
        'JSON with changes of the backbone\'s image processor, such as {"size": {"height": 384, "width": 384}} or, '
        'of SigLIP2, {"max_num_patches": 512}.',
    )
    num_ecg_tokens: int | None = argument(
        None,
        "Tokens of the language model that each ECG takes. Default: of a picture "
        f"{IMAGE_FEATURES['patches']}, or {IMAGE_FEATURES['embedding']} of its embedding; else "
        f"{', '.join(f'{spec.num_ecg_tokens} for {name}' for name, spec in CONNECTORS.items())}.",
    )
    thinking_tokens: bool = argument(
        False,
        "Make <think>, </think>, <answer> and </answer> one token each, where the language model has none; with --use_peft their "
        "embeddings are trained too.",
    )

    def __post_init__(self) -> None:
        if self.elm is not None:
            self.architecture, connector = ELMS[self.elm]  # --elm wins over --architecture, but not over --connector
            self.connector = self.connector or connector
            if self.elm == "ecg_byte":
                self.representation = "symbolic"
        if self.architecture is None:
            self.architecture = "text" if self.representation == "symbolic" else "llava"
        if self.connector is None:
            self.connector = connectors_of(self.architecture)[0]
        self._check_connector()
        of_images = self.representation in IMAGE_REPRESENTATIONS
        if of_images and self.architecture != "llava":
            raise ValueError(
                f"--representation {self.representation} with --architecture {self.architecture}; pictures of ECGs need a vision "
                "backbone: leave the option out, or --elm."
            )
        for name in ("encoder", "encoder_config", "encoder_name_or_path"):
            if getattr(self, name) and self.architecture != "llava":  # no error: a recipe may say them
                logger.warning("--%s changes nothing: a %s ELM has no encoder.", name, self.architecture)
        self.said_encoder = self.encoder  # no dataclass field, so no option
        if self.encoder is None:
            self.encoder = next(iter(VISION_BACKBONES)) if of_images else "st_mem"
        if self.architecture == "llava" and self.encoder_name_or_path is None:
            # a Hub id or a path: no model_type has one; or a folder here
            if "/" in self.encoder or (
                self.encoder not in ENCODER_CONFIGS and Path(self.encoder, "config.json").is_file()
            ):
                self.encoder_name_or_path = self.encoder
            elif of_images:
                self.encoder_name_or_path = VISION_BACKBONES.get(self.encoder)  # None for a model_type
        if self.num_ecg_tokens is None:
            self.num_ecg_tokens = default_num_ecg_tokens(self.connector, self.representation, self.image_features)
        if self.normalization is None:
            self.normalization = "minmax" if self.representation == "stacked_signal" else "none"
        elif self.representation in ("symbolic", "rgb") and self.normalization != "none":
            does = "the ECG-Byte tokenizer normalizes" if self.representation == "symbolic" else "ECG paper shows"
            raise ValueError(
                f"--normalization {self.normalization} with --representation {self.representation}: {does} millivolts; leave "
                "the option out."
            )
        pictures, symbols = IMAGE_REPRESENTATIONS, ("symbolic",)
        special: dict[str, tuple[str, ...]] = {"ecg_tokenizer": symbols, "ecg_overflow": symbols, "paper": ("rgb",)}
        special |= {"image_processor": pictures, "image_features": pictures}
        for name, representations in special.items():
            differs = getattr(self, name) != ModelArguments.__dataclass_fields__[name].default
            if differs and self.representation not in representations:
                raise ValueError(
                    f"--{name} with --representation {self.representation}; it is for {' and '.join(representations)} ECGs."
                )
        self.encoder_fields = json_fields("encoder_config", self.encoder_config)  # no dataclass field, so no option
        if self.encoder_fields and self.encoder_name_or_path is not None:
            raise ValueError(
                f"--encoder_config with the pretrained encoder {self.encoder_name_or_path}, whose own config stands; leave it "
                "out, or name an encoder with random weights, such as --encoder vit."
            )
        self.connector_fields = json_fields("connector_config", self.connector_config)
        self.paper_fields = json_fields("paper", self.paper)
        self.image_processor_fields = json_fields("image_processor", self.image_processor)

    def _check_connector(self) -> None:
        """ValueError if `--connector` is neither a name of ours nor a class in a file, which is not loaded yet."""
        name = self.connector
        if (
            name is None or name in CONNECTORS or is_own_connector(name)
        ):  # the latter from Python, where the class is known
            return
        file, _, class_name = name.rpartition(":")
        if not (file.endswith(".py") and class_name.isidentifier()):
            raise ValueError(
                f"--connector is {name!r}; expected one of {', '.join(CONNECTORS)}, or FILE.py:Class of your own."
                f"{did_you_mean(name, CONNECTORS)}"
            )
        if not Path(file).is_file():
            raise ValueError(f"--connector {name}: there is no file {file}.")


@dataclass
class AugmentationArguments:
    """Random changes of the ECGs in training."""

    _argument_group_name = "augmentation"

    augment_ecg: bool = argument(False, "Add noise and baseline wander to some of the ECGs.")
    augment_rgb: bool = argument(False, "Change brightness, colour, angle and sharpness of some of the drawn ECGs.")
    time_shift: float = argument(0.0, "Begin each recording up to this many seconds later, at most at its middle.")
    gain_jitter: float = argument(
        0.0, "Scale each recording at random, up to this share larger or smaller, such as 0.1."
    )
    lead_dropout: float = argument(
        0.0,
        "Drop each lead with this probability, but never all: it becomes zeros, or missing with --missing_leads zeros.",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.time_shift < float("inf"):  # NaN fails too
            raise ValueError(f"--time_shift is {self.time_shift}; expected seconds, at least 0.")
        for name in ("gain_jitter", "lead_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; expected a share in [0, 1).")


@dataclass
class RunArguments:
    """How a training run goes, beside what transformers and TRL know of it."""

    _argument_group_name = "training"

    streaming: bool = argument(
        False, "Read the rows as they are needed instead of caching them first; say --max_steps."
    )
    shuffle_buffer: int = argument(
        1000,
        "Rows that --streaming holds in memory and shuffles, in each data loader worker. If each record is stored once, for all its questions, "
        "keep these below 256 MB of records: of more, each is read several times.",
    )
    ema_decay: float | None = argument(
        None,
        "Keep a moving average of the weights, such as 0.999, which is what is evaluated, and saved in the end. Default: none.",
    )
    wandb: bool = argument(False, "Report to Weights & Biases, as --report_to wandb does.")
    distributed: bool = argument(False, "Insist on several processes: start with `accelerate launch` or `torchrun`.")

    def __post_init__(self) -> None:
        if self.shuffle_buffer < 1:
            raise ValueError(f"--shuffle_buffer is {self.shuffle_buffer}; expected at least 1 row.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"--ema_decay is {self.ema_decay}; expected a number between 0 and 1, such as 0.999.")


@dataclass  # fields stand from the last base to the first: --data, which has no default, must lead
class ELMArguments(RunArguments, AugmentationArguments, ModelArguments, DataArguments):
    """All of `elm sft` that TRL does not know."""

    _argument_group_name = "training"

    train_phase: Literal["sft", "pretrain", "rl"] = argument(
        "sft",
        "sft: chats, whose answers are learnt. pretrain, before it: reports, without chat template, from which the connector learns to say "
        "in words what an ECG shows. rl is `elm rl`.",
    )
    report_column: str | None = argument(
        None,
        "Column of the reports of --train_phase pretrain, of which each record has one; messages: the answers of all chats. Default: "
        "report, else text, else the answers in messages that nobody asked for.",
    )
    explicit_thinking: bool = argument(
        False,
        "Answers begin with <think>, which is given and not learnt, and which the trained model is given too. Of an answer with "
        "<answer>...</answer> `elm evaluate` scores what stands there.",
    )
    update: list[str] = argument(
        [],
        "Parts that are trained. Default: connector and llm, of --train_phase pretrain without --use_peft connector alone; and an encoder "
        "with random weights.",
        choices=PARTS,
    )
    cache_features: Literal["memory", "disk"] | None = argument(
        None,
        "Encode each ECG once and keep what a frozen encoder gives for it: in memory, which grows with the number of ECGs, or on "
        "disk below HF_HOME, where later runs with the same encoder find it.",
    )

    def __post_init__(self) -> None:
        for part in (
            DataArguments,
            ModelArguments,
            AugmentationArguments,
            RunArguments,
        ):  # super() would call one alone
            part.__post_init__(self)
        self._check_phase()
        changes = [f"--{option.name}" for option in fields(AugmentationArguments) if getattr(self, option.name)]
        changes += [f"--perturb {self.perturb}"] * (self.perturb == "noise")
        if self.cache_features and self.perturb == "only_text":
            raise ValueError(
                f"--cache_features {self.cache_features} with --perturb only_text, which leaves every ECG out; leave one of the two "
                "options out."
            )
        if self.cache_features and changes:
            raise ValueError(
                f"--cache_features {self.cache_features} with {changes[0]}: the ECGs are others in each epoch, so none is met again; "
                "leave one of the two options out."
            )

    def _check_phase(self) -> None:
        """ValueError for options that say nothing in the phase."""
        if self.train_phase == "pretrain":
            for name in ("explicit_thinking", "system_prompt"):
                if getattr(self, name):
                    raise ValueError(
                        f"--{name} with --train_phase pretrain: reports stand in no chat. Say it in the phase sft that follows."
                    )
        elif self.report_column is not None:
            raise ValueError(
                f"--report_column {self.report_column} is of --train_phase pretrain; add that, or leave the option out."
            )


def check_numbers(config: Any, numbers: Mapping[str, str]) -> None:
    """ValueError for the first option whose number is not what it has to be, one of `_HOLDS`; what is no number is left alone."""
    for name, expected in numbers.items():
        value = getattr(config, name, None)  # None too where a command has no such option
        if isinstance(value, int | float) and not _HOLDS[expected](value):
            raise ValueError(f"--{name} is {value}; expected a number {expected}.")


def json_fields(name: str, value: Any) -> dict[str, Any]:
    """The names and values of the option `name`, which is JSON on the command line and a mapping in a YAML file."""
    try:
        mapping = json.loads(value) if isinstance(value, str) else value or {}  # an empty key of YAML is None
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name} is not JSON ({error}): {value!r}.") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"--{name} is {value!r}; expected names and values of fields.")
    return mapping


def new_elm_options(args: ModelArguments) -> list[str]:
    """The options that differ from their defaults and say what a new ELM is made of."""
    defaults = ModelArguments()  # after its `__post_init__`, as `args`: None has become a value in both
    # a saved ELM can get the last too
    names = [option.name for option in fields(ModelArguments) if option.name != "thinking_tokens"]
    return [name for name in names if getattr(args, name) != getattr(defaults, name)]
