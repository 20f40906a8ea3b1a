"""Arguments of `elm dpo`, beside TRL's `DPOConfig` and `ModelConfig`, and which of those it refuses."""

from dataclasses import dataclass, fields

from trl import DPOConfig

from elm_ecg.training.arguments import check_numbers
from elm_ecg.training.muon import TakesMuon
from elm_ecg.training.rl_arguments import OF_PHASES
from elm_ecg.training.trl_options import NEEDED, REFUSED

_ON_THE_FLY = (
    "ECGs are prepared as they are read. --use_peft needs no second model for them: it is the one without its adapter"
)
_STORED = "rows are drawn by their number. Local data are read row by row anyway, and never held whole"
_PAIRS = "a batch is of pairs, whose answers differ in length"
# option -> why any value but its default is refused
REFUSED_HERE: dict[str, str] = {
    **{name: why for name, why in REFUSED.items() if name in {option.name for option in fields(DPOConfig)}},
    "lora_task_type": REFUSED["lora_task_type"],
    **dict.fromkeys(("precompute_ref_log_probs", "precompute_ref_batch_size"), _ON_THE_FLY),
    **dict.fromkeys(("streaming", "shuffle_buffer"), _STORED),
    **OF_PHASES,
    "padding_free": _PAIRS,
    "train_sampling_strategy": f"{_PAIRS}. Leave the option out",
    "average_tokens_across_devices": "the loss is a mean over pairs",
    "label_smoothing_factor": "--label_smoothing is the one of pairs",
    **dict.fromkeys(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        f"{_PAIRS}, so that it would compile again and again",
    ),
}
NEEDED_HERE: dict[str, str] = {
    **{name: other for name, other in NEEDED.items() if name != "shuffle_buffer"},
    **dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"), "sync_ref_model"),
}
LOSSES = (
    *(
        "sigmoid",
        "hinge",
        "ipo",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
    ),
    *("apo_down", "discopop", "sft", "sigmoid_norm"),
)


@dataclass
class PairsConfig(TakesMuon, DPOConfig):
    """TRL's, for `elm dpo`, with errors in the words of the command line."""

    def __post_init__(self) -> None:
        check_numbers(self, {"beta": "above 0", "label_smoothing": "at least 0 and below 0.5"})
        super().__post_init__()
