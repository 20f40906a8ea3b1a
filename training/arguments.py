"""Command-line and YAML arguments of fine-tuning and evaluation, beside TRL's `SFTConfig` and `ModelConfig`."""

import json
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from trl import TrlParser

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
            "help": "Datasets, one or several that are mixed: local folders (written by `save_to_disk`, or of parquet "
            "or JSON Lines files) or Hub ids, with the columns `messages` and `ecg`."
        },
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
        if self.data_subset is not None and not 0 < self.data_subset <= 1:
            raise ValueError(f"--data_subset is {self.data_subset}; expected a share of the rows in (0, 1].")


@dataclass
class ELMArguments(DataArguments):
    """What a new ELM is made of, and which of its parts are trained."""

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
    representation: Literal["signal", "symbolic"] = field(
        default="signal",
        metadata={"help": "What the model is shown of a record: its samples, or ECG-Byte tokens of them in the text."},
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
    encoder: str = field(default="st_mem", metadata={"help": "ECG encoder of llava: merl, mlae, mtae or st_mem."})
    encoder_config: str | None = field(
        default=None, metadata={"help": 'JSON with fields of the encoder\'s config, such as {"num_hidden_layers": 4}.'}
    )
    encoder_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained ECG encoder, Hub id or local folder; default: random weights."}
    )
    num_ecg_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of the language model that each ECG takes. Default: 12 for llava, 25 for patch and conv, 1 for flat."
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
    normalization: Literal["none", "zscore", "minmax"] = field(
        default="none",
        metadata={"help": "none keeps millivolts; zscore and minmax (the reference's) are of each record."},
    )
    update: list[str] = field(
        default_factory=list,
        metadata={
            "choices": ["encoder", "connector", "llm"],
            "help": "Parts that are trained. Default: connector and llm, and an encoder that starts with random weights.",
        },
    )
    augment_ecg: bool = field(
        default=False, metadata={"help": "In training, add noise and baseline wander to some of the ECGs."}
    )
    wandb: bool = field(default=False, metadata={"help": "Report to Weights & Biases, as --report_to wandb does."})
    distributed: bool = field(
        default=False,
        metadata={"help": "Insist on several processes: start with `accelerate launch` or `torchrun`."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.elm is not None:
            self.architecture, connector = ELMS[self.elm]
            self.connector = self.connector or connector
            if self.elm == "ecg_byte":
                self.representation = "symbolic"
        if self.architecture is None:
            self.architecture = "text" if self.representation == "symbolic" else "llava"
        if self.connector is None:
            self.connector = {"llava": "linear", "fuyu": "patch", "text": None}[self.architecture]
        if self.num_ecg_tokens is None:
            defaults: dict[str | None, int] = {"linear": 12, "mlp": 12, "patch": 25, "conv": 25}
            self.num_ecg_tokens = defaults.get(self.connector, 1)
        if self.representation == "symbolic" and self.normalization != "none":
            raise ValueError(
                f"--normalization {self.normalization} with symbolic ECGs: the ECG-Byte tokenizer normalizes millivolts "
                "itself, in the way it was trained with; leave the option out."
            )
        if self.representation != "symbolic" and self.ecg_tokenizer is not None:
            raise ValueError(f"--ecg_tokenizer with --representation {self.representation}; it is for symbolic ECGs.")
        try:  # a YAML file gives a mapping, the command line JSON
            given: Any = self.encoder_config or {}
            self.encoder_fields: dict[str, Any] = json.loads(given) if isinstance(given, str) else given
        except json.JSONDecodeError as error:
            raise ValueError(f"--encoder_config is not JSON ({error}): {self.encoder_config!r}.") from error
        if not isinstance(self.encoder_fields, dict):
            raise ValueError(f"--encoder_config is {self.encoder_config!r}; expected names and values of fields.")
        if not set(self.update) <= {"encoder", "connector", "llm"}:
            raise ValueError(f"--update is {self.update}; expected some of encoder, connector, llm.")


def new_elm_options(args: ELMArguments) -> list[str]:
    """The options that differ from their defaults and say what a new ELM is made of."""
    of_training = {"update", "augment_ecg", "wandb", "distributed"} | {option.name for option in fields(DataArguments)}
    defaults = ELMArguments(data=args.data)
    names = [option.name for option in fields(args) if option.name not in of_training]
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
