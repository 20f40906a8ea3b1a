"""Options that `elm sft`, `elm rl` and `elm dpo` have alike: their defaults, their help, and what is refused before anything is read."""

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from transformers import SchedulerType, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig, SFTConfig

from elm_ecg.training.arguments import PARTS, ELMArguments, check_numbers, json_fields
from elm_ecg.training.muon import MUON, muon_options
from elm_ecg.training.parser import ELMParser

CONNECTOR_LEARNING_RATE = 5e-4  # of --train_phase pretrain without the language model, as in the reference
BY_SIZE = 2  # of --gradient_checkpointing, where nothing is said; any other true value would do, None becomes False


def set_common_options(parser: ELMParser) -> None:
    """Defaults and help of what all commands that train an ELM with TRL have."""
    # TRL and PEFT use a name that transformers is about to change
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing(_kwargs)?` is deprecated", FutureWarning)
    parser.set_defaults(
        remove_unused_columns=False,  # the collator reads them
        ddp_find_unused_parameters=True,  # one process may have a batch without ECG
        dataloader_pin_memory=torch.accelerator.is_available(),  # without one PyTorch warns of it
        bf16=None if torch.cuda.is_available() else False,  # bf16 on a CPU is slow
        logging_nan_inf_filter=False,  # it would log a loss that is no number as 0
        learning_rate=None,  # by what is trained
        gradient_checkpointing=BY_SIZE,
        lora_dropout=0.0,  # see docs/how_to/fine_tune.md
    )
    options = parser._option_string_actions
    options["--resume_from_checkpoint"].help = "Folder of a checkpoint, or last: the newest whole one in --output_dir."
    options["--optim"].choices = [*(options["--optim"].choices or ()), MUON]
    options["--optim"].help = (
        "Optimizer; muon: Muon for the matrices of the language model, AdamW for all else. --optim_args says of Muon lr=, momentum=, "
        "weight_decay= and adjust_lr_fn=, by default as of --learning_rate and --weight_decay, with updates of AdamW's size."
    )
    options["--gradient_checkpointing"].help = (
        "Keep the activations of few layers and compute the others again: less memory for a third more time. Default: for models of at "
        "least a billion parameters."
    )
    options[
        "--trust_remote_code"
    ].help = (
        "Run the code of an encoder or connector that comes with --encoder or --model_name_or_path. Read it before."
    )


def settle(
    args: ELMArguments,
    training_args: Any,
    model_args: ModelConfig,
    learning_rates: dict[bool, float],
    aligns: bool = False,
) -> None:
    """Fills in what follows from other options, and refuses (ValueError) values that would fail, or be lost, once the model is loaded.

    Args:
        training_args: of TRL; any of its configurations.
        learning_rates: the defaults, of full training and of LoRA.
        aligns: it is the phase in which the connector learns to put reports into words.
    """
    if args.distributed and training_args.world_size == 1:
        raise ValueError(
            "--distributed, but there is one process: start with `accelerate launch --multi_gpu training/sft.py ...` "
            "or `torchrun --nproc_per_node N training/sft.py ...`."
        )
    if not args.update:
        pretrained = args.encoder_name_or_path is not None or model_args.model_name_or_path is not None
        args.update = PARTS[1:] if pretrained or args.architecture != "llava" else list(PARTS)
        if aligns and not model_args.use_peft:
            args.update = args.update[:-1]  # without the language model
    if args.cache_features and "encoder" in args.update:  # that of an adapter is known once it is there
        raise ValueError(
            f"--cache_features {args.cache_features} with --update {' '.join(args.update)}: what a trained encoder gives for an ECG "
            "changes. Say --update connector llm, or leave --cache_features out."
        )
    if training_args.optim == MUON:
        _check_muon(args, training_args, model_args)
    if training_args.learning_rate is None:
        of_connector = aligns and "llm" not in args.update
        training_args.learning_rate = CONNECTOR_LEARNING_RATE if of_connector else learning_rates[model_args.use_peft]
    if args.wandb and "wandb" not in training_args.report_to:
        training_args.report_to = [*training_args.report_to, "wandb"]  # a list by now, whatever was said
    available = get_available_reporting_integrations()
    for name in training_args.report_to or []:  # a list by now
        if name not in available:
            here = f"here are {', '.join(available)} and none" if available else "none is installed here"
            raise ValueError(
                f"--report_to {name}: the package {name} is not installed, or is none that reports; {here}."
            )
    for name in ("seed", "data_seed"):
        value = getattr(training_args, name)
        if value is not None and not 0 <= value < 2**32:  # NumPy's range
            raise ValueError(f"--{name} is {value}; expected a number from 0 to {2**32 - 1}.")
    if training_args.fp16 and training_args.device.type == "cpu":  # accelerate would ignore it there
        raise ValueError("--fp16 needs a GPU, and there is none; --bf16 computes in 16 bits on a CPU too.")
    check_numbers(training_args, {"pad_to_multiple_of": "at least 1"})  # on the command line a text, as it may be auto
    kwargs = json_fields("lr_scheduler_kwargs", training_args.lr_scheduler_kwargs)
    try:  # as the trainer will, with a few steps of nothing
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        get_scheduler(training_args.lr_scheduler_type, optimizer, 1, 2, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--lr_scheduler_type {SchedulerType(training_args.lr_scheduler_type).value} does not go with --lr_scheduler_kwargs {kwargs}: {error}."
        ) from error
    if model_args.attn_implementation == "flex_attention" and training_args.device.type == "cpu":
        raise ValueError(
            "--attn_implementation flex_attention needs a GPU: PyTorch has no gradients of it on a CPU. Leave it out, or take sdpa."
        )
    if model_args.load_in_4bit or model_args.load_in_8bit:
        _check_quantization(training_args, model_args)
    if model_args.lora_target_parameters and model_args.lora_dropout:
        raise ValueError(
            f"--lora_target_parameters with --lora_dropout {model_args.lora_dropout}: PEFT has no dropout for parameters that are not "
            "of a layer; leave --lora_dropout out."
        )


def _check_muon(args: ELMArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Refuses (ValueError) `--optim muon` where there is nothing for it."""
    muon_options(training_args.optim_args)
    if "llm" not in args.update or model_args.use_peft:
        option = "--use_peft" if model_args.use_peft else f"--update {' '.join(args.update)}"
        raise ValueError(
            f"--optim {MUON} with {option}: Muon is for the language model's own matrices, which are not trained then; leave one of the "
            "two options out."
        )


def _check_quantization(training_args: SFTConfig, model_args: ModelConfig) -> None:
    """ValueError if the language model cannot be quantized as asked."""
    option = "--load_in_4bit" if model_args.load_in_4bit else "--load_in_8bit"
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{option} needs the package bitsandbytes, which is not installed: `uv sync --extra quantized` or "
            "`pip install bitsandbytes`."
        )
    if training_args.device.type not in ("cuda", "xpu", "cpu"):
        raise ValueError(
            f"{option}: bitsandbytes has no {training_args.device.type} version; leave it out, or add --use_cpu."
        )
    if model_args.load_in_4bit and model_args.dtype == "auto":
        raise ValueError("--load_in_4bit with --dtype auto: say in which it computes, --dtype bfloat16 or float32.")
