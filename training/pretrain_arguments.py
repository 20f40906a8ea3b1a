"""Arguments of `elm pretrain`, beside transformers' `TrainingArguments`."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from transformers import TrainingArguments

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.configuration_ecg_pretraining import MASKED_ENCODERS, OBJECTIVES, ECGPretrainingConfig
from elm_ecg.training.arguments import (
    AugmentationArguments,
    DataArguments,
    RecordArguments,
    RunArguments,
    argument,
    json_fields,
)
from elm_ecg.training.data.record_rows import ANSWERS
from elm_ecg.training.parser import ELMParser
from elm_ecg.training.trl_options import NEEDED, REFUSED

_NO_CHATS = "an encoder is pretrained on records and their reports, not on chats"
_MASKS = "masks are drawn by --mask_ratio"
# options that `elm sft` has too, and that mean nothing without chats; the others are those of transformers that it refuses too
_REFUSED = {
    "perturb": _NO_CHATS,
    "system_prompt": _NO_CHATS,
    "augment_rgb": "an ECG encoder reads signals. --augment_ecg changes these",
    "label_smoothing_factor": "there are no labels. Leave the option out",
    "neftune_noise_alpha": "it is noise for the embeddings of words. --augment_ecg adds noise to the ECGs",
    "train_sampling_strategy": "all records are padded to --num_samples. Leave the option out",
}
REFUSED_HERE = {
    name: why for name, why in REFUSED.items() if name in {option.name for option in fields(TrainingArguments)}
}
REFUSED_HERE |= _REFUSED
# fields of the pretraining model's configuration that have an option of their own
OF_OPTIONS = ("mask_ratio", "contrastive_loss", "temperature", "contrastive_weight", "text_pooling", "projection_size")
FREE_FIELDS = [
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "projection_dropout",
    "initializer_range",
]


def _default(name: str) -> Any:
    return next(option.default for option in fields(ECGPretrainingConfig) if option.name == name)


@dataclass
class ObjectiveArguments:
    """What is pretrained, and what it learns."""

    _argument_group_name = "the encoder and what it learns"

    model_name_or_path: str | None = argument(
        None,
        "Pretraining model to go on from, with its decoder and heads: the --output_dir of an earlier run, or a Hub id.",
    )
    encoder: str = argument(
        "st_mem",
        f"Encoder: {', '.join(ENCODER_CONFIGS)} with random weights, or the folder or Hub id of a pretrained ECG encoder.",
    )
    trust_remote_code: bool = argument(False, "Run the code that comes with an encoder.")
    encoder_config: str | None = argument(  # a YAML file may also hold a mapping, see `json_fields`
        None, 'JSON with fields of the config of an encoder with random weights, such as {"num_hidden_layers": 4}.'
    )
    objectives: list[str] = argument(
        [],
        "masked: the encoder reads some patches, and a decoder reconstructs the others. contrastive: ECGs are matched with their reports. "
        f"The losses of both are added. Default: masked for {', '.join(MASKED_ENCODERS)}, contrastive for others.",
        choices=list(OBJECTIVES),
    )
    mask_ratio: float = argument(
        _default("mask_ratio"), "Share of the patches that are masked; for st_mem, in each lead."
    )
    targets: Literal["standardised", "plain"] | None = argument(
        None,
        "What the decoder reconstructs: each patch with mean 0 and standard deviation 1, or as the encoder reads it. Default: plain for mlae, whose patches are whole "
        "leads, else standardised.",
    )
    text_encoder: str | None = argument(
        None,
        "Text encoder of the reports for contrastive: folder or Hub id of any encoder of transformers, such as a BERT.",
    )
    train_text_encoder: bool = argument(False, "Train the text encoder too; else it stays as it is.")
    text_pooling: Literal["mean", "cls", "pooler"] = argument(
        _default("text_pooling"),
        "Embedding of a report: mean of its tokens, its first token (cls), or the pooler's output.",
    )
    report_column: str = argument(
        "report",
        f"Column of the reports; {ANSWERS}: the answers of the chats, as in the reference's pretrain-mimic datasets.",
    )
    max_report_tokens: int = argument(128, "Longest report in tokens; what follows is cut.")
    cache_reports: bool = argument(
        False,
        "Encode each report once and keep its embedding in memory, with a frozen text encoder: many times as fast on a CPU.",
    )
    contrastive_loss: Literal["infonce", "sigmoid"] = argument(
        _default("contrastive_loss"),
        "Loss of ECGs and reports: infonce, over the batch of all processes (MERL), or sigmoid, pair by pair (SigLIP).",
    )
    temperature: float = argument(
        _default("temperature"), "Temperature of infonce, and of the loss between two views of each ECG."
    )
    contrastive_weight: float = argument(
        _default("contrastive_weight"), "Weight of the contrastive loss beside the masked one."
    )
    projection_size: int = argument(
        _default("projection_size"), "Size of the vectors by which ECGs and reports are compared."
    )
    pretraining_config: str | None = argument(
        None, f"JSON with further fields of the pretraining model: {', '.join(FREE_FIELDS)}."
    )
    num_pictures: int = argument(
        8, "Records of the validation split, or else of train, drawn with their reconstruction; none with --streaming."
    )

    def __post_init__(self) -> None:
        self.encoder_fields = json_fields("encoder_config", self.encoder_config)  # no dataclass field, so no option
        self.pretraining_fields = json_fields("pretraining_config", self.pretraining_config)
        if unknown := self.pretraining_fields.keys() - set(FREE_FIELDS):
            options = [name for name in sorted(unknown) if name in OF_OPTIONS]
            hint = f"; --{options[0]} is an option of its own" if options else ""
            raise ValueError(
                f"--pretraining_config has no field {', '.join(sorted(unknown))}; expected {', '.join(FREE_FIELDS)}{hint}."
            )
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"--mask_ratio is {self.mask_ratio}; expected a share between 0 and 1, such as 0.75.")
        for name, least in (("max_report_tokens", 1), ("num_pictures", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}; expected at least {least}.")
        is_new = self.encoder in ENCODER_CONFIGS
        if self.encoder_fields and not is_new:
            raise ValueError(
                f"--encoder_config with the pretrained encoder {self.encoder}, whose own config stands; leave it out, or name an "
                f"encoder with random weights: {', '.join(ENCODER_CONFIGS)}."
            )
        self.objectives = [name for name in OBJECTIVES if name in self.objectives]  # each once, in one order
        if is_new and self.model_name_or_path is None:
            self.set_objectives(self.encoder)

    def set_objectives(self, encoder: str) -> None:
        """What an encoder of that `model_type` learns, where nothing was said.

        Raises:
            ValueError: an option changes nothing with the objectives, or is missing for them.
        """
        if not self.objectives:
            self.objectives = ["masked" if encoder in MASKED_ENCODERS else "contrastive"]
        if "contrastive" in self.objectives:
            if self.text_encoder is None and self.model_name_or_path is None:
                raise ValueError(
                    "--objectives contrastive needs the text encoder of the reports: name one with --text_encoder, such as "
                    "sentence-transformers/all-MiniLM-L6-v2 or ncbi/MedCPT-Query-Encoder."
                )
            if self.cache_reports and self.train_text_encoder:
                raise ValueError(
                    "--cache_reports with --train_text_encoder: what a trained text encoder gives for a report changes; leave one of the two "
                    "options out."
                )
            return
        said = [] if self.text_encoder is None else [f"--text_encoder {self.text_encoder}"]
        said += [f"--{name}" for name in ("train_text_encoder", "cache_reports") if getattr(self, name)]
        if said:
            raise ValueError(
                f"{' and '.join(said)} with --objectives {' '.join(self.objectives)}, which reads no reports; add contrastive, or leave "
                "it out."
            )


@dataclass  # fields stand from the last base to the first: --data, which has no default, must lead
class PretrainArguments(RunArguments, AugmentationArguments, RecordArguments, ObjectiveArguments, DataArguments):
    """All of `elm pretrain` that transformers does not know."""

    def __post_init__(self) -> None:
        for part in (
            DataArguments,
            ObjectiveArguments,
            AugmentationArguments,
            RunArguments,
        ):  # super() would call one alone
            part.__post_init__(self)


def make_parser(prog: str = "elm pretrain") -> ELMParser:
    """The options of `elm pretrain`: ours, those of transformers' `TrainingArguments` but for `REFUSED_HERE`, and `--config`."""
    parser = ELMParser((PretrainArguments, TrainingArguments), prog=prog)
    parser.set_defaults(
        remove_unused_columns=False,  # the collator reads them
        logging_nan_inf_filter=False,  # it would log a loss that is no number as 0
        # those of the papers (MAE, ST-MEM), with a warm-up that fits short runs too
        learning_rate=3e-4,
        adam_beta2=0.95,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        dataloader_drop_last=True,  # a last batch of two ECGs has one negative
    )
    options = parser._option_string_actions
    options["--resume_from_checkpoint"].help = "Folder of a checkpoint, or last: the newest whole one in --output_dir."
    needed = {name: other for name, other in NEEDED.items() if f"--{name}" in options and f"--{other}" in options}
    parser.refuse(REFUSED_HERE, needed=needed)
    return parser
