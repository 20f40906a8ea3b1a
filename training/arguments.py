"""Command-line and YAML arguments of fine-tuning and evaluation, beside TRL's `SFTConfig` and `ModelConfig`."""

import json
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from trl import TrlParser

from elm_ecg.configuration_elm import IMAGE_REPRESENTATIONS
from elm_ecg.training.command_line import read_system_prompt

# what users of the reference type -> the option it stands for
ALIASES = {
    "data_representation": "representation",
    "elm_ckpt": "model_name_or_path",
    "encoder_ckpt": "encoder_name_or_path",
    "num_encoder_tokens": "num_ecg_tokens",
    "segment_len": "num_samples",
    "leads": "lead_names",
    "peft": "use_peft",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "optimizer": "optim",
    "llm_input_len": "max_length",
}
# pretrained values of --encoder
VISION_BACKBONES = {
    "clip-vit-base-patch32": "openai/clip-vit-base-patch32",
    "siglip2-so400m-patch16-naflex": "google/siglip2-so400m-patch16-naflex",
    "vit-base-patch16-224-in21k": "google/vit-base-patch16-224-in21k",
}
# values of the reference's --optimizer
OPTIMIZERS = {"adam": "adamw_torch", "adamw": "adamw_torch"}
# values of the reference's --elm -> architecture, connector
ELMS: dict[str, tuple[Literal["llava", "fuyu", "text"], str | None]] = {
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


@dataclass
class DataArguments:
    """Which chats and ECGs, and what is done to them."""

    data: list[str] = field(
        metadata={
            "help": "Datasets, one or several that are mixed: local folders (made by `elm data build` or `save_to_disk`, or of "
            "parquet or JSON Lines files) or Hub ids, with the columns `messages` and `ecg`; or keys of the reference's, which "
            "`elm data list` shows."
        },
    )
    data_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Share that each of --data has among the rows, drawn by --seed until all rows of each were there once. "
            "Default: one dataset after the other."
        },
    )
    fold: int | None = field(
        default=None, metadata={"help": "Fold of datasets that have splits such as fold1_train and fold1_test."}
    )
    ecg_root: str | None = field(
        default=None, metadata={"help": "Folder of the ECG files that a dataset names by relative paths."}
    )
    data_subset: float | None = field(
        default=None, metadata={"help": "Use this share of the rows, in (0, 1], chosen at random by --seed."}
    )
    perturb: Literal["noise", "zeros", "only_text"] | None = field(
        default=None,
        metadata={"help": "Replace every ECG by Gaussian noise or by zeros, or leave it out of the text."},
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message, or a file that holds it, before each chat that has none."}
    )

    def __post_init__(self) -> None:
        self.system_prompt = read_system_prompt(self.system_prompt)
        if self.data_subset is not None and not 0 < self.data_subset <= 1:
            raise ValueError(f"--data_subset is {self.data_subset}; expected a share of the rows in (0, 1].")
        if self.data_weights is not None and not (
            len(self.data_weights) == len(self.data) and all(weight > 0 for weight in self.data_weights)
        ):
            raise ValueError(
                f"--data_weights is {self.data_weights}; expected a positive number for each of the {len(self.data)} of --data."
            )


@dataclass
class ModelArguments:
    """What a new ELM is made of."""

    llm: str = field(
        default="llama-3.2-1b-instruct",
        metadata={
            "help": "Language model: a name of the README's table, any Hub id of a causal LLM, or a local folder."
        },
    )
    elm: str | None = field(
        default=None,
        metadata={"choices": list(ELMS), "help": "Short for --architecture and --connector, as in the reference."},
    )
    architecture: Literal["llava", "fuyu", "text"] | None = field(
        default=None,
        metadata={
            "help": "llava (default): an ECG encoder and a connector; fuyu: a connector alone; text: the language model "
            "alone, for symbolic ECGs or none."
        },
    )
    connector: str | None = field(
        default=None,
        metadata={
            "choices": ["linear", "mlp", "flat", "patch", "conv"],
            "help": "linear (default) or mlp for llava; patch (default), flat or conv for fuyu.",
        },
    )
    representation: Literal["signal", "symbolic", "stacked_signal", "rgb"] = field(
        default="signal",
        metadata={
            "help": "What the model is shown of a record: signal, its samples; symbolic, ECG-Byte tokens of them in the text; "
            "rgb, a drawing on ECG paper; stacked_signal, a grey picture of leads x samples."
        },
    )
    ecg_tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "ECG-Byte tokenizer of the symbolic representation, made by `elm tokenizer`: local folder or Hub id. "
            "Default: the one that comes with this package."
        },
    )
    ecg_overflow: Literal["error", "downsample", "drop_leads"] = field(
        default="error",
        metadata={
            "help": "Where symbolic ECGs and text exceed the context: an error, or halve the sampling rate of the ECGs, or "
            "leave out some of their leads."
        },
    )
    encoder: str | None = field(
        default=None,
        metadata={
            "help": "Encoder of llava. With random weights: merl, mlae, mtae or st_mem (default) for signal; for rgb and "
            "stacked_signal the model_type of a Hugging Face vision backbone, such as vit. Pretrained: "
            "clip-vit-base-patch32 (their default), siglip2-so400m-patch16-naflex, vit-base-patch16-224-in21k, or any as "
            "--encoder_name_or_path."
        },
    )
    encoder_config: str | None = field(
        default=None,
        metadata={
            "help": 'JSON with fields of the config of an encoder with random weights, such as {"num_hidden_layers": 4}.'
        },
    )
    encoder_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Pretrained ECG encoder or vision backbone, Hub id or local folder; default: what --encoder says."
        },
    )
    image_features: Literal["patches", "embedding"] = field(
        default="patches",
        metadata={
            "help": "What the connector reads of a vision backbone: its patches, or its one pooled vector as the reference does."
        },
    )
    paper: str | None = field(
        default=None,
        metadata={
            "help": 'JSON with how rgb is drawn, such as {"layout": "3x4", "gain": 20, "line_width": 0.5}: the fields of '
            "ECGPaper."
        },
    )
    image_processor: str | None = field(
        default=None,
        metadata={
            "help": 'JSON with changes of the backbone\'s image processor, such as {"size": {"height": 384, "width": 384}} '
            'or, of SigLIP2, {"max_num_patches": 512}.'
        },
    )
    num_ecg_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of the language model that each ECG takes. Default: 12 for llava (49 of a picture, 1 of its "
            "embedding), 25 for patch and conv, 1 for flat."
        },
    )
    sampling_rate: int = field(default=250, metadata={"help": "Hz to which records are resampled."})
    num_samples: int = field(default=2500, metadata={"help": "Samples per lead: records are padded to it."})
    truncation: Literal["start", "center", "end"] | None = field(
        default=None,
        metadata={"help": "Which part of a longer record to keep. Default: a longer record is an error."},
    )
    lead_names: list[str] | None = field(
        default=None, metadata={"help": "Leads and their order. Default: I II III aVR aVL aVF V1 ... V6."}
    )
    missing_leads: Literal["error", "zeros"] = field(
        default="error",
        metadata={
            "help": "Leads that a record has not: an error, or zeros that the model is told of. Limb leads are derived where "
            "I and II are there."
        },
    )
    bandpass: list[float] | None = field(
        default=None,
        metadata={"help": "Low and high frequency in Hz that pass, such as 0.5 40. Default: no filter."},
    )
    notch: float | None = field(
        default=None, metadata={"help": "Hz of the mains that is taken out, 50 or 60. Default: no filter."}
    )
    normalization: Literal["none", "zscore", "minmax"] | None = field(
        default=None,
        metadata={
            "help": "none keeps millivolts (default); zscore and minmax (the reference's, default of stacked_signal) are of "
            "each record."
        },
    )

    def __post_init__(self) -> None:
        if self.elm is not None:
            self.architecture, connector = ELMS[self.elm]
            self.connector = self.connector or connector
            if self.elm == "ecg_byte":
                self.representation = "symbolic"
        if self.architecture is None:
            self.architecture = "text" if self.representation == "symbolic" else "llava"
        if self.connector is None:
            self.connector = {"llava": "linear", "fuyu": "patch", "text": None}[self.architecture]
        of_images = self.representation in IMAGE_REPRESENTATIONS
        if of_images and self.architecture != "llava":
            raise ValueError(
                f"--representation {self.representation} with --architecture {self.architecture}; pictures of ECGs need a vision "
                "backbone: leave the option out, or --elm."
            )
        if self.encoder is None:
            self.encoder = "clip-vit-base-patch32" if of_images else "st_mem"
        if self.architecture == "llava" and self.encoder_name_or_path is None:
            if "/" in self.encoder:
                self.encoder_name_or_path = self.encoder
            elif of_images:
                self.encoder_name_or_path = VISION_BACKBONES.get(self.encoder)
        if self.num_ecg_tokens is None:
            of_encoder = (1 if self.image_features == "embedding" else 49) if of_images else 12
            defaults: dict[str | None, int] = {"linear": of_encoder, "mlp": of_encoder, "patch": 25, "conv": 25}
            self.num_ecg_tokens = defaults.get(self.connector, 1)
        if self.normalization is None:
            self.normalization = "minmax" if self.representation == "stacked_signal" else "none"
        elif self.representation in ("symbolic", "rgb") and self.normalization != "none":
            does = "the ECG-Byte tokenizer normalizes" if self.representation == "symbolic" else "ECG paper shows"
            raise ValueError(
                f"--normalization {self.normalization} with --representation {self.representation}: {does} millivolts; leave "
                "the option out."
            )
        for name, representations in (
            ("ecg_tokenizer", ("symbolic",)),
            ("paper", ("rgb",)),
            ("image_processor", IMAGE_REPRESENTATIONS),
        ):
            if getattr(self, name) and self.representation not in representations:
                raise ValueError(
                    f"--{name} with --representation {self.representation}; it is for {' and '.join(representations)} ECGs."
                )
        self.encoder_fields = json_fields("encoder_config", self.encoder_config)
        if self.encoder_fields and self.encoder_name_or_path is not None:
            raise ValueError(
                f"--encoder_config with the pretrained encoder {self.encoder_name_or_path}, whose own config stands; leave it "
                "out, or name an encoder with random weights, such as --encoder vit."
            )
        self.paper_fields = json_fields("paper", self.paper)
        self.image_processor_fields = json_fields("image_processor", self.image_processor)


@dataclass
class AugmentationArguments:
    """Random changes of the ECGs in training."""

    augment_ecg: bool = field(
        default=False, metadata={"help": "In training, add noise and baseline wander to some of the ECGs."}
    )
    augment_rgb: bool = field(
        default=False,
        metadata={"help": "In training, change brightness, colour, angle and sharpness of some of the drawn ECGs."},
    )
    time_shift: float = field(
        default=0.0,
        metadata={"help": "In training, begin each recording up to so many seconds later, at most at its half."},
    )
    gain_jitter: float = field(
        default=0.0,
        metadata={"help": "In training, make each recording up to this share larger or smaller, such as 0.1."},
    )
    lead_dropout: float = field(
        default=0.0,
        metadata={
            "help": "In training, lose each lead with this probability, but never all: it is zeros, or missing with "
            "--missing_leads zeros."
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.time_shift < float("inf"):
            raise ValueError(f"--time_shift is {self.time_shift}; expected seconds, at least 0.")
        for name in ("gain_jitter", "lead_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; expected a share in [0, 1).")


@dataclass
class ELMArguments(AugmentationArguments, ModelArguments, DataArguments):
    """All of `elm sft` that TRL does not know."""

    update: list[str] = field(
        default_factory=list,
        metadata={
            "choices": ["encoder", "connector", "llm"],
            "help": "Parts that are trained. Default: connector and llm, and an encoder that starts with random weights.",
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the rows as they are needed instead of caching them first; say --max_steps."},
    )
    shuffle_buffer: int = field(
        default=1000,
        metadata={"help": "Rows that --streaming holds in memory and shuffles, in each data loader worker."},
    )
    wandb: bool = field(default=False, metadata={"help": "Report to Weights & Biases, as --report_to wandb does."})
    distributed: bool = field(
        default=False,
        metadata={"help": "Insist on several processes: start with `accelerate launch` or `torchrun`."},
    )

    def __post_init__(self) -> None:
        for part in (DataArguments, ModelArguments, AugmentationArguments):
            part.__post_init__(self)
        if self.shuffle_buffer < 1:
            raise ValueError(f"--shuffle_buffer is {self.shuffle_buffer}; expected at least 1 row.")
        if not set(self.update) <= {"encoder", "connector", "llm"}:
            raise ValueError(f"--update is {self.update}; expected some of encoder, connector, llm.")


def json_fields(name: str, given: Any) -> dict[str, Any]:
    """The names and values of the option `name`, which is JSON on the command line and a mapping in a YAML file."""
    try:
        values = json.loads(given) if isinstance(given, str) else given or {}
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name} is not JSON ({error}): {given!r}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"--{name} is {given!r}; expected names and values of fields.")
    return values


def new_elm_options(args: ModelArguments) -> list[str]:
    """The options that differ from their defaults and say what a new ELM is made of."""
    defaults = ModelArguments()
    names = [option.name for option in fields(ModelArguments)]
    return [name for name in names if getattr(args, name) != getattr(defaults, name)]


class ELMParser(TrlParser):
    """TRL's parser (dataclasses, `--config FILE.yaml`) that knows the reference's spellings too."""

    def __init__(self, dataclass_types: Any, **kwargs: Any):
        super().__init__(dataclass_types, **kwargs)
        for alias, name in ALIASES.items():
            action = self._option_string_actions.get(f"--{name}")
            if action is not None:
                self._option_string_actions[f"--{alias}"] = action
                action.option_strings = [*action.option_strings, f"--{alias}"]
                if alias == "optimizer":
                    action.type = lambda name: OPTIMIZERS.get(name, name)

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Takes the values of a YAML file, which argparse does not check as it checks the command line's."""
        values: dict[str, Any] = {}
        for key, value in config.items():
            action = self._option_string_actions.get(f"--{key}")
            if action is None:
                values[key] = value  # TRL's error
                continue
            if action.nargs == "+" and not isinstance(value, list):
                value = [value]
            for item in value if isinstance(value, list) else [value]:
                name = OPTIMIZERS.get(item, item) if action.dest == "optim" else item
                if action.choices is not None and name is not None and name not in action.choices:
                    expected = ", ".join(map(str, action.choices))
                    raise ValueError(f"{key} is {item!r} in the --config file; expected one of {expected}.")
            values[action.dest] = value
        return super().set_defaults_with_config(**values)
