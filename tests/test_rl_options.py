"""Tables over every option of TRL that `elm rl` and `elm dpo` have: each is refused by its name, or changes something."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import trl
from test_trl_options import LORA, PARSED, QUANTIZATION, SHOWN, TRAINER
from trl import DPOConfig, GRPOConfig, ModelConfig

from elm_ecg.training import dpo, dpo_arguments, rl, rl_arguments
from elm_ecg.training.arguments import ELMArguments
from elm_ecg.training.rl_arguments import RLArguments

CPU = ["--data", "d", "--output_dir", "out", "--use_cpu"]
COMMANDS = {"rl": (rl, rl_arguments, GRPOConfig), "dpo": (dpo, dpo_arguments, DPOConfig)}
# beside those of `elm sft`: option -> a value other than its default, and what has to be said with it
OF_GRPO: dict[str, tuple[str, list[str]]] = {
    **dict.fromkeys(("beta", "entropy_coef", "min_p", "off_policy_mask_threshold"), ("0.5", [])),
    **dict.fromkeys(("epsilon", "epsilon_high", "delta"), ("0.5", ["--loss_type", "dapo"])),
    **dict.fromkeys(("top_p", "temperature", "repetition_penalty", "top_entropy_quantile"), ("0.5", [])),
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), ("0.5", [])),
    **dict.fromkeys(
        ("vespo_k_neg", "vespo_k_pos", "vespo_lambda_neg", "vespo_lambda_pos"), ("0.5", ["--loss_type", "vespo"])
    ),
    **dict.fromkeys(
        ("entropy_coef_delta", "entropy_coef_max", "entropy_coef_min", "entropy_target"),
        ("0.5", ["--use_adaptive_entropy"]),
    ),
    **dict.fromkeys(("cast_lm_head_to_fp32", "mask_truncated_completions", "use_adaptive_entropy"), ("true", [])),
    **dict.fromkeys(("disable_dropout", "ds3_gather_for_generation", "shuffle_dataset"), ("false", [])),
    "use_bias_correction_kl": ("false", ["--beta", "0.1"]),
    **dict.fromkeys(("log_completions",), ("true", [])),
    "log_unique_prompts": ("true", ["--log_completions"]),
    "num_completions_to_print": ("3", ["--log_completions"]),
    "chat_template_kwargs": ('{"a":1}', []),
    "generation_kwargs": ('{"typical_p":0.5}', []),
    "generation_batch_size": ("16", []),
    "steps_per_generation": ("2", []),
    "importance_sampling_level": ("sequence", []),
    "loss_type": ("dapo", []),
    "max_completion_length": ("7", []),
    "multi_objective_aggregation": ("normalize_then_sum", []),
    "num_generations": ("2", []),
    "num_generations_eval": ("2", ["--eval_strategy", "epoch"]),
    "num_iterations": ("3", []),
    "pad_to_multiple_of": ("8", []),
    "reward_weights": ("1 2 3", []),
    "router_aux_loss_coef": ("0.1", []),
    "scale_rewards": ("none", []),
    "sync_ref_model": ("true", ["--beta", "0.1"]),
    "ref_model_mixup_alpha": ("0.5", ["--beta", "0.1", "--sync_ref_model"]),
    "ref_model_sync_steps": ("5", ["--beta", "0.1", "--sync_ref_model"]),
    "top_k": ("5", []),
}
OF_DPO: dict[str, tuple[str, list[str]]] = {
    **dict.fromkeys(("beta", "discopop_tau", "f_alpha_divergence_coef", "label_smoothing", "ld_alpha"), ("0.3", [])),
    "disable_dropout": ("false", []),
    "f_divergence_type": ("js_divergence", []),
    "loss_type": ("ipo", []),
    "loss_weights": ("0.5", []),
    "max_length": ("50", []),
    "pad_to_multiple_of": ("8", []),
    "router_aux_loss_coef": ("0.1", []),
    "sync_ref_model": ("true", []),
    "ref_model_mixup_alpha": ("0.5", ["--sync_ref_model"]),
    "ref_model_sync_steps": ("5", ["--sync_ref_model"]),
    "use_weighting": ("true", []),
}
OWN = {"rl": OF_GRPO, "dpo": OF_DPO}
ELSEWHERE = {"chat_template_path", "packing", "packing_strategy", "padding_free"}  # of `elm sft` alone


def names_of(*classes: Any) -> set[str]:
    return {option.name for part in classes for option in fields(part) if option.init}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_trl_is_classified(command):
    """One that a new version brings has to be looked at: does it do what it says, where prompts have ECGs?"""
    _, arguments, config = COMMANDS[command]
    of_trl = names_of(config, ModelConfig)
    shared = {
        *TRAINER,
        *PARSED,
        *SHOWN,
        *LORA,
        *QUANTIZATION,
    } & of_trl  # what the trainer of transformers does with them
    refused = arguments.REFUSED_HERE.keys()
    honoured = (shared | OWN[command].keys()) - refused
    assert honoured | refused == of_trl | (refused & names_of(ELMArguments))
    assert OWN[command].keys() & refused == set()
    assert {*arguments.NEEDED_HERE, *arguments.NEEDED_HERE.values()} <= honoured | names_of(RLArguments)


# these do not go with another that is said at the same time
ALONE = ("generation_batch_size", "loss_type", "importance_sampling_level")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_said_is_held(command):
    module = COMMANDS[command][0]
    together: dict[tuple[str, ...], list[str]] = {}
    for name, (_, with_it) in OWN[command].items():
        together.setdefault((*with_it, *([name] if name in ALONE else [])), []).append(name)
    for names in together.values():
        with_it = OWN[command][names[0]][1]
        before = module.parse([*CPU, *with_it])[1]
        words = [word for name in names for word in (f"--{name}", *OWN[command][name][0].split())]
        said = module.parse([*CPU, *with_it, *words])[1]
        assert [name for name in names if getattr(said, name) == getattr(before, name)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_refused(command):
    module, arguments, config = COMMANDS[command]
    options = {option.name: option for part in (config, ModelConfig, RLArguments) for option in fields(part)}
    values = {"hub_strategy": "end", "local_rank": "3", "remove_unused_columns": "true", "perturb": "zeros"}
    parser = module.make_parser()
    for name, reason in arguments.REFUSED_HERE.items():
        default = options[name].default
        choices = parser._option_string_actions[f"--{name}"].choices or ()
        of_kind = {False: "true", True: "false"}[default] if isinstance(default, bool) else "7"
        value = values.get(name) or next((choice for choice in choices if choice != default), of_kind)
        with pytest.raises(ValueError, match=rf"^--{name} cannot be used: {re.escape(reason)}\.$"):
            parser.parse_args_and_config([*CPU, f"--{name}", value])


def test_trl_reads_what_is_honoured():
    """No field stands there that nobody reads."""
    folder = Path(trl.__file__).parent / "trainer"
    for command in COMMANDS:
        kind = {"rl": "grpo", "dpo": "dpo"}[command]
        text = (folder / f"{kind}_trainer.py").read_text() + (folder / f"{kind}_config.py").read_text()
        text += (folder / "callbacks.py").read_text()
        read = set(re.findall(r"\bself\.(\w+)", text)) | set(re.findall(r"\bargs\.(\w+)", text))
        assert OWN[command].keys() - read == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    module, arguments, config = COMMANDS[command]
    with pytest.raises(SystemExit, match="0"):
        module.parse(["--help-all"])
    heads = re.findall(r"^  (-.*)", capsys.readouterr().out, re.MULTILINE)
    shown = set(re.findall(r"--(\w+)", " ".join(heads)))
    assert names_of(config, ModelConfig) - arguments.REFUSED_HERE.keys() <= shown
    assert shown & arguments.REFUSED_HERE.keys() == set()
