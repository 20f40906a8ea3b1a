"""The options of `elm convert`."""

from dataclasses import dataclass
from typing import Literal

from elm_ecg.configuration_elm import IMAGE_FEATURES, IMAGE_REPRESENTATIONS
from elm_ecg.ecg_utils import REFERENCE_LEADS
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.arguments import ModelArguments, argument

ECG_TOKENS = "signal_*"  # among --added_tokens: signal_<id> of all ids of the ECG-Byte tokenizer


@dataclass
class ConvertArguments(ModelArguments):
    """What a checkpoint does not state about the ELM or encoder that it holds. Defaults are the reference's."""

    output_dir: str = argument("", "New or empty folder that the converted model is saved in.")
    llm: str = argument("", "Language model that a whole ELM was trained with: name, Hub id or local folder.")
    lead_names: list[str] | None = argument(
        None,
        "Leads and their order that the model was trained on. Default: I II III aVL aVR aVF V1 ... V6, the reference's "
        "of MIMIC-IV and CODE-15; its PTB-XL has aVR before aVL.",
    )
    image_features: str = argument(
        "embedding", "What the connector reads of a vision backbone.", choices=list(IMAGE_FEATURES)
    )
    ecg_tokenizer: str | None = argument(
        None,
        "ECG-Byte tokenizer that a symbolic ELM was trained with: its .pkl, or what `elm tokenizer import` makes of it, a local "
        "folder or Hub id.",
    )
    num_ecg_tokens: int | None = argument(
        None,
        "Tokens of the language model that each ECG took in that run. Default: 1, the reference's; of patches the weights tell.",
    )
    added_tokens: list[str] | None = argument(
        None,
        "Tokens that the run added to the language model's, in the order of their rows; signal_* stands for all ECG tokens "
        "of a symbolic ELM. Default: those that the reference adds, told by the number of rows.",
    )
    train_phase: Literal["pretrain", "sft", "rl"] | None = argument(
        None,
        "Phase of that run. After pretrain, which has learnt reports alone, the ELM says so when it is asked. Default: not known; weights "
        "have the same names in all phases.",
    )
    explicit_thinking: bool = argument(
        False, "That run had --explicit_thinking: the ELM's answers begin with a <think> that it is given."
    )
    lora_alpha: float = argument(32.0, "Alpha of LoRA in that run.")
    use_rslora: bool = argument(False, "LoRA was scaled by the square root of its rank.")
    weights: Literal["ema", "model"] | None = argument(
        None,
        "The moving average of the weights, or the model's own. Default: the average, where the checkpoint has one.",
    )
    pretraining: bool = argument(
        False,
        "Of a checkpoint of an encoder's pretraining make the whole pretraining model, from which `elm pretrain` goes on, with the encoder "
        "alone in its folder encoder/. Default: the encoder alone.",
    )
    text_encoder: str | None = argument(
        None, "With --pretraining of merl: the text encoder that read the reports, a Hub id or local folder."
    )
    text_pooling: Literal["mean", "cls", "pooler"] = argument(
        "pooler",
        "With --text_encoder: what stood for a report, the mean of its tokens, the first, or the pooler's output.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = argument(
        None, "Type of the saved weights. Default: the widest that the checkpoint has."
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("--output_dir is missing; name a new folder for the converted model.")
        self.assumed: list[str] = []  # for the report: what neither checkpoint nor options state
        if self.lead_names is None:
            self.lead_names = list(REFERENCE_LEADS)
            self.assumed.append(
                "leads in the reference's order, I II III aVL aVR aVF V1 ... V6; of a model trained on its PTB-XL, give "
                "--lead_names I II III aVR aVL aVF V1 V2 V3 V4 V5 V6"
            )
        if self.normalization is None and self.representation == "signal" and self.elm != "ecg_byte":
            self.normalization = "minmax"  # the reference's; super would take none
        if self.representation not in IMAGE_REPRESENTATIONS:
            self.image_features = "patches"
        if self.pretraining and (self.encoder == "merl") != (self.text_encoder is not None):
            raise ValueError(
                "--pretraining --encoder merl learns from reports, and its checkpoint's text encoder is named nowhere: give it as "
                "--text_encoder (the reference's is ncbi/MedCPT-Query-Encoder), or leave --pretraining out for the encoder alone."
                if self.encoder == "merl"
                else f"--text_encoder {self.text_encoder}: the pretraining of {self.encoder} reads no reports; leave it out."
            )
        if self.text_encoder is not None and not self.pretraining:
            raise ValueError(f"--text_encoder {self.text_encoder} is for --pretraining; add that, or leave it out.")
        self.names_encoder = self.encoder is not None or self.encoder_name_or_path is not None  # before the defaults
        self.gives_num_ecg_tokens = self.num_ecg_tokens is not None
        if self.num_ecg_tokens is None:
            self.num_ecg_tokens = 1  # the reference's; super would take ours
        super().__post_init__()
        symbolic = self.representation == "symbolic"  # of --elm too, now that super has read it
        if symbolic and (self.ecg_tokenizer is None or ECG_TOKENS not in (self.added_tokens or [ECG_TOKENS])):
            raise ValueError(
                "A checkpoint of a symbolic ELM does not say which of its rows is which token. Give the run's tokenizer, its .pkl, as "
                "--ecg_tokenizer; and if you name the tokens that the run added, all of them in the order of their rows, with "
                f"{ECG_TOKENS} for those of the tokenizer: --added_tokens '{ELMProcessor.ecg_token}' '{ECG_TOKENS}' if these came last."
            )
        if self.explicit_thinking and self.train_phase == "pretrain":
            raise ValueError(
                "--explicit_thinking with --train_phase pretrain, whose reports stand in no chat; leave it out."
            )
        tokens = self.added_tokens or []
        if ECG_TOKENS in tokens and not symbolic:
            raise ValueError(f"--added_tokens {ECG_TOKENS} is for symbolic ELMs; add --elm ecg_byte, or leave it out.")
        repeated = {token for token in tokens if tokens.count(token) > 1}
        if repeated:
            raise ValueError(f"--added_tokens has {', '.join(sorted(repeated))} more than once; each has one row.")
