"""Arguments of `elm rl`, beside TRL's `GRPOConfig` and `ModelConfig`, and which of those it refuses."""

from dataclasses import dataclass, fields

from transformers import GenerationConfig
from trl import GRPOConfig

from elm_ecg.training.arguments import ELMArguments, argument, check_numbers, json_fields
from elm_ecg.training.evaluation.arguments import check_kinds, check_shortest
from elm_ecg.training.muon import TakesMuon
from elm_ecg.training.rewards import REWARDS, Reward, load_rewards
from elm_ecg.training.trl_options import NEEDED, REFUSED

_NO_VLLM = "vLLM does not read ECGs. transformers writes the answers, and reads each prompt once for all answers to it"
_NO_TOOLS = "the answers are texts, without tools"
_WHOLE_GROUPS = "an epoch has whole groups of answers alone, so what is left over is always left out"
_COUNTED = "the loss counts its answers and tokens itself, over all processes"
_BY_NUMBER = "rows are drawn by their number. Local data are read row by row anyway, and never held whole"
_SAME_POLICY = "the answers were drawn without it, so that their probabilities would be others in training"
_DRAWN = "--draw_steps draws ECGs with the answers about them"
# options of the phases of `elm sft`
OF_PHASES = {
    "train_phase": "`elm rl` and `elm dpo` come after both phases of `elm sft`",
    "report_column": "reports are for --train_phase pretrain of `elm sft`",
    "thinking_tokens": "the tokens are the model's own, from `elm sft --thinking_tokens`",
    "explicit_thinking": "the model knows it, from `elm sft --explicit_thinking`",
    "ema_decay": "a moving average of the weights is for `elm sft` and `elm pretrain`",
}
# option -> why any value but its default is refused; beside those of `elm sft`
REFUSED_HERE: dict[str, str] = {
    **{name: why for name, why in REFUSED.items() if name in {option.name for option in fields(GRPOConfig)}},
    "lora_task_type": REFUSED["lora_task_type"],
    **{option.name: _NO_VLLM for option in fields(GRPOConfig) if "vllm" in option.name},
    **dict.fromkeys(("use_transformers_continuous_batching", "transformers_continuous_batching_config"), _NO_VLLM),
    "use_transformers_paged": _NO_VLLM,
    "cache_implementation": "the cache of a prompt is repeated for all answers to it, and grows with them",
    "max_tool_calling_iterations": _NO_TOOLS,
    "dataloader_drop_last": _WHOLE_GROUPS,
    "average_tokens_across_devices": _COUNTED,
    "label_smoothing_factor": "there are no labels. --entropy_coef keeps the answers varied",
    "neftune_noise_alpha": _SAME_POLICY,
    "auto_find_batch_size": "a smaller batch might not hold whole groups of answers. Lower --per_device_train_batch_size",
    "train_sampling_strategy": "a group of answers is of one prompt. --shuffle_dataset false keeps the order of the rows",
    "torch_compile": "answers differ in length, so that it would compile again and again",
    "torch_compile_backend": "see --torch_compile",
    "torch_compile_mode": "see --torch_compile",
    "log_multimodal": _DRAWN,
    "log_completions_hub_repo": REFUSED["push_to_hub"],
    "streaming": _BY_NUMBER,
    "shuffle_buffer": _BY_NUMBER,
    **OF_PHASES,
    "perturb": "with --eval_strategy the reward is measured with the ECG and with zeros in its place",
}
del REFUSED_HERE["shuffle_dataset"]  # TRL's sampler takes it
_OF_ADAPTIVE_ENTROPY = ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target")
NEEDED_HERE: dict[str, str] = {
    **{name: other for name, other in NEEDED.items() if name != "shuffle_buffer"},
    **dict.fromkeys(_OF_ADAPTIVE_ENTROPY, "use_adaptive_entropy"),
    **dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"), "sync_ref_model"),
    **dict.fromkeys(("sync_ref_model", "use_bias_correction_kl"), "beta"),
    **dict.fromkeys(("num_completions_to_print", "log_unique_prompts"), "log_completions"),
    "num_generations_eval": "eval_strategy",
    "eval_prompts": "eval_strategy",
}
_CLIPPED = ("grpo", "dr_grpo", "dapo", "bnpo", "luspo")
# option -> the losses that read it
OF_LOSS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("epsilon", "delta"), _CLIPPED),
    "epsilon_high": (*_CLIPPED, "cispo"),
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), ("sapo",)),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), ("vespo",)),
}
LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
# keys of --generation_kwargs that would end in other than independent samples
NOT_SAMPLED = ("do_sample", "num_beams", "num_return_sequences", "num_beam_groups", "penalty_alpha", "assistant_model")
# keys of --generation_kwargs -> the option for them, which the loss reads too
OF_OPTIONS = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    **dict.fromkeys(("max_new_tokens", "max_length"), "max_completion_length"),
}
# option -> what its number has to be
NUMBERS = {
    **dict.fromkeys(("max_completion_length", "num_iterations", "steps_per_generation"), "at least 1"),
    **dict.fromkeys(("temperature", "repetition_penalty", "sapo_temperature_neg", "sapo_temperature_pos"), "above 0"),
    **dict.fromkeys(("top_k", "beta", "epsilon", "epsilon_high"), "at least 0"),
    "top_p": "above 0 and at most 1",
    "min_p": "from 0 to 1",
}


@dataclass
class RLConfig(TakesMuon, GRPOConfig):
    """TRL's, with errors in the words of the command line."""

    def __post_init__(self) -> None:
        check_numbers(self, NUMBERS)
        for name in ("generation_kwargs", "chat_template_kwargs"):
            setattr(self, name, json_fields(name, getattr(self, name)) or None)
        self._check_generation()
        if (self.num_generations or 0) < 2:
            raise ValueError(
                f"--num_generations is {self.num_generations}; expected at least 2: an answer is better or worse than others to "
                "the same prompt."
            )
        try:
            super().__post_init__()
        except ValueError as error:
            told = str(error)
            if "must be divisible by num_generations" in told:
                raise ValueError(
                    f"--num_generations {self.num_generations} does not divide the {self.generation_batch_size} answers that are written "
                    f"at once: --per_device_train_batch_size {self.per_device_train_batch_size} x {self.world_size} processes x "
                    f"{self.steps_per_generation} (--steps_per_generation, by default --gradient_accumulation_steps). Make that product a "
                    "multiple of it."
                ) from error
            if "used for evaluation" in told:
                raise ValueError(
                    f"--num_generations_eval {self.num_generations_eval} does not divide --per_device_eval_batch_size "
                    f"{self.per_device_eval_batch_size} x {self.world_size} processes; make that product a multiple of it."
                ) from error
            if "can not be both configured" in told:
                raise ValueError(
                    "--generation_batch_size with --steps_per_generation: each follows from the other; leave one of them out."
                ) from error
            raise

    def _check_generation(self) -> None:
        """ValueError for what `--generation_kwargs` cannot have."""
        generation = json_fields("generation_kwargs", self.generation_kwargs)
        for name in generation:
            told = f"--generation_kwargs {name}:"
            if name in NOT_SAMPLED:
                raise ValueError(
                    f"{told} the answers of a group are drawn one by one, by --temperature, --top_p, --top_k and --min_p; leave it out."
                )
            if name in OF_OPTIONS:
                raise ValueError(f"{told} say it as --{OF_OPTIONS[name]}.")
            if name not in vars(GenerationConfig()):
                raise ValueError(f"{told} transformers' GenerationConfig has no such field.")
        check_kinds("--generation_kwargs", generation)
        check_shortest("--generation_kwargs", generation, "--max_completion_length", self.max_completion_length)


@dataclass  # fields stand from the last base to the first: --data, which has no default, must lead
class RLArguments(ELMArguments):
    """All of `elm rl` that TRL does not know."""

    _argument_group_name = "reinforcement learning"

    rewards: list[str] = argument(
        ["format", "tags", "answer"],
        f"What an answer is rewarded for; all are added, by --reward_weights. {'; '.join(f'{name}: {does}' for name, does in REWARDS.items())}; "
        "any metric of `elm evaluate --metrics` by its name, of what stands within <answer>; FILE.py:function of your own, which "
        "gets prompts, completions and the columns of the rows, as TRL's reward functions do.",
    )
    eval_prompts: int = argument(
        64,
        "Rows of the split validation whose answers are rewarded at each evaluation (--eval_strategy), with the ECG and with zeros in its "
        "place.",
    )
    draw_steps: int = argument(
        50, "Every so many steps write answers with their ECG and rewards to a page in answers/; 0 for none."
    )
    draw_prompts: int = argument(2, "Prompts of each such page.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("eval_prompts", 1), ("draw_steps", 0), ("draw_prompts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}; expected at least {least}.")
        self.reward_functions: list[Reward] = load_rewards(self.rewards)  # no dataclass field, so no option
