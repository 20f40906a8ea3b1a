"""Fine-tunes an ELM with TRL: `elm sft ...`, `accelerate launch training/sft.py ...` or `torchrun training/sft.py ...`."""

import json
import logging
import os
import sys
import warnings
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType, get_scheduler
from transformers.integrations import get_available_reporting_integrations, is_deepspeed_zero3_enabled
from trl import ModelConfig, SFTConfig, get_quantization_config

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.arguments import PARTS, AugmentationArguments, ELMArguments, new_elm_options
from elm_ecg.training.base_models import find_base, read_recipe, recipe_of, write_merged
from elm_ecg.training.build import build_model, build_processor
from elm_ecg.training.chat_templates import set_chat_template, stop_at_end_of_turn
from elm_ecg.training.checkpoints import CountEpochs, replace_model
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.command_line import run_command
from elm_ecg.training.data.loading import load_data
from elm_ecg.training.data.report_rows import as_reports, load_reports
from elm_ecg.training.evaluation.results import move_old_results
from elm_ecg.training.features import FOLDER, EncoderFeatures
from elm_ecg.training.files import check_output_folder, write_text
from elm_ecg.training.load import limit_threads, load_elm
from elm_ecg.training.lora import adapt_quantized, complete_head, freeze, freeze_new_parts, lora_config, set_precision
from elm_ecg.training.model_files import find_model_file
from elm_ecg.training.muon import MUON, SFTConfigWithMuon, muon_options
from elm_ecg.training.packing import ROW_TOKENS
from elm_ecg.training.parser import ELMParser
from elm_ecg.training.resume import RunOptions, checkpoint_to_resume, fingerprint
from elm_ecg.training.run_splits import read_splits
from elm_ecg.training.sharing.cards import write_model_card
from elm_ecg.training.thinking_tokens import add_rows, add_thinking_tokens, thinking_token_ids
from elm_ecg.training.trainer import ELMTrainer
from elm_ecg.training.trl_options import NEEDED, REFUSED, REFUSED_VALUES

logger = logging.getLogger(__name__)

# parts of a saved ELM that --load_in_4bit and --load_in_8bit leave as they are
NOT_QUANTIZED = ["model.encoder", "model.connector", "model.signal_embeddings", "lm_head"]
# defaults of --learning_rate: TRL's of full training, and ten times that of LoRA
LEARNING_RATES = {False: 2e-5, True: 2e-4}
CONNECTOR_LEARNING_RATE = 5e-4  # of --train_phase pretrain without the language model, as in the reference
BY_SIZE = 2  # of --gradient_checkpointing, where nothing is said; any other true value would do, None becomes False
CHECKPOINTED_FROM = 1_000_000_000  # parameters, from which on it then is true
METRICS = ("loss", "mean_token_accuracy", "entropy")  # that TRL's trainer measures of a validation split


def make_parser(prog: str = "elm sft") -> ELMParser:
    """The options of `elm sft`: ours, those of TRL's SFTConfig and ModelConfig but for `trl_options.REFUSED`, and `--config`."""
    parser = ELMParser((ELMArguments, SFTConfigWithMuon, ModelConfig), prog=prog)
    set_common_options(parser)
    parser.set_defaults(
        max_length=None,  # TRL would cut chats at 1024 tokens
        assistant_only_loss=True,  # as its labels are
    )
    options = parser._option_string_actions  # TRL's own texts are not true here: nothing is cut
    options["--max_length"].help = "Tokens that a chat may have; a longer one is an error. Default: what the LLM reads."
    options["--chat_template_path"].help = (
        "Chat template, instead of the language model's own: a .jinja file, or the folder or Hub id of a model that has one. The answers "
        "are learnt with the token that ends them, or what it marks with {%% generation %%}."
    )
    options[
        "--learning_rate"
    ].help = "Of AdamW at first. Default: 2e-5, and 2e-4 with --use_peft; 5e-4 of --train_phase pretrain without the language model."
    options["--pad_to_multiple_of"].help = "Pad batches to a multiple of so many tokens."
    options[
        "--padding_free"
    ].help = "Train on the chats of a batch as one row without padding: right for flash attention, slow with others where it gets long."
    options["--packing"].help = (
        f"Let chats of a batch share rows of at most --max_length tokens, or {ROW_TOKENS}, so that little is padded. "
        "--per_device_train_batch_size still counts chats."
    )
    options["--packing_strategy"].help = "bfd: no chat is cut."
    parser.refuse(REFUSED, REFUSED_VALUES, NEEDED)
    return parser


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


def parse(argv: list[str] | None = None, prog: str = "elm sft") -> tuple[ELMArguments, SFTConfig, ModelConfig]:
    """What the command line says, checked (ValueError) as far as it can be without data and model; writes nothing."""
    args, training_args, model_args = make_parser(prog).parse_args_and_config(argv)
    if args.streaming and training_args.max_steps < 1:
        raise ValueError("--streaming does not know the number of rows; set --max_steps.")
    if args.streaming and training_args.train_sampling_strategy != "random":
        raise ValueError(
            f"--train_sampling_strategy {training_args.train_sampling_strategy} with --streaming: its rows are shuffled in "
            "--shuffle_buffer. Leave one of the two options out."
        )
    if training_args.packing and training_args.padding_free:
        raise ValueError(
            "--packing with --padding_free: the one makes rows of bounded length of a batch, the other one row. Leave one out."
        )
    metric = (training_args.metric_for_best_model or METRICS[0]).removeprefix("eval_")
    if metric not in METRICS:
        raise ValueError(
            f"--metric_for_best_model is {metric}; an evaluation while training gives {', '.join(METRICS)}."
        )
    if training_args.activation_offloading and training_args.device.type == "cpu":
        raise ValueError("--activation_offloading takes memory from a GPU, and there is none; leave it out.")
    settle(args, training_args, model_args, LEARNING_RATES, args.train_phase == "pretrain")
    return args, training_args, model_args


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
    kwargs: Any = training_args.lr_scheduler_kwargs or {}
    try:  # as the trainer will, with a few steps of nothing
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        get_scheduler(training_args.lr_scheduler_type, optimizer, 1, 2, scheduler_specific_kwargs=dict(kwargs))
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
            "of a layer; add --lora_dropout 0."
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


def load_splits(args: ELMArguments, training_args: Any) -> dict[str, Any]:
    """The chats or reports of `train`, and with `--eval_strategy` those of `validation`, else None; errors as of `read_splits`."""
    seed, num_proc = training_args.seed, getattr(training_args, "dataset_num_proc", None)  # not of every configuration
    if args.train_phase == "pretrain":
        return read_splits(
            args,
            training_args,
            lambda split: load_reports(args, split, seed, num_proc, args.report_column),
            "ecg",
            lambda part, name: as_reports(part, name, args.report_column),
        )
    return read_splits(args, training_args, lambda split: load_data(args, split, seed, num_proc))


def build_base(
    args: ELMArguments, training_args: Any, model_args: ModelConfig
) -> tuple[ELMForConditionalGeneration, ELMProcessor]:
    """The ELM to train, a saved one (`--model_name_or_path`) or a new one, and its processor.

    LoRA leaves its base as it is, and the adapter needs it again: that of a new ELM is where other runs find it too.
    """
    kwargs: dict[str, Any] = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    template = getattr(training_args, "chat_template_path", None)  # an option of `elm sft` alone
    in_full = "llm" in args.update and not model_args.use_peft
    if in_full and model_args.dtype in ("bfloat16", "float16"):
        kwargs["dtype"] = "float32"
        logger.warning(
            "--dtype %s: all weights of the language model are trained, so they stay in float32, in which small steps are not lost. "
            "--bf16 computes in 16 bits.",
            model_args.dtype,
        )
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    name = model_args.model_name_or_path
    if name is not None:
        if unused := new_elm_options(args):
            logger.warning(
                "--model_name_or_path %s is a finished ELM: %s, of a new one, change nothing.",
                name,
                ", ".join(f"--{option}" for option in unused),
            )
        if model_args.use_peft and os.path.isdir(name):
            name = os.path.abspath(name)  # the adapter names it, for any working directory
        if quantization is not None:
            quantization.llm_int8_skip_modules = NOT_QUANTIZED  # of 4 bits too, in spite of its name
        elif kwargs["dtype"] != "auto":
            kwargs["dtype"] = "float32"  # what is trained passes through no other; what is not takes its own below
        model, processor = load_elm(name, model_args.model_revision, training_args.trust_remote_code, **kwargs)
        if args.thinking_tokens:
            _add_to_saved(model, processor, name, model_args.use_peft)
        set_chat_template(processor, template)
        stop_at_end_of_turn(model, processor)
        # an older adapter is in the weights by now, and a new one on the base of that would be without it
        files = ["adapter_config.json", "config.json"]
        if model_args.use_peft and find_model_file(name, files, model_args.model_revision)[1] == files[0]:
            if quantization is not None:
                raise ValueError(
                    f"--load_in_4bit and --load_in_8bit with --model_name_or_path {name}, an adapter, which cannot be merged into a "
                    "quantized model; leave them out."
                )
            if training_args.process_index == 0:  # which saves the adapter
                base = write_merged(model, processor, Path(str(training_args.output_dir)))
                model.name_or_path = str(base)  # PEFT writes it into the adapter's configuration
    else:
        processor = build_processor(args, model_args.model_revision)
        set_chat_template(processor, template)
        needs_base = model_args.use_peft and training_args.process_index == 0  # which saves the adapter
        if needs_base:
            recipe = recipe_of(args, processor, model_args.model_revision)
            base = find_base(recipe, processor, training_args.trust_remote_code)
        kwargs |= {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
        model = build_model(args, processor, **kwargs)
        if needs_base:
            model.name_or_path = str(base)  # PEFT writes it into the adapter's configuration
    wanted = model_args.dtype
    set_precision(
        model, args.update, model_args.use_peft, model.dtype if wanted == "auto" else getattr(torch, str(wanted))
    )
    return model, processor


def _add_to_saved(model: ELMForConditionalGeneration, processor: ELMProcessor, name: str, use_peft: bool) -> None:
    """Makes the tags of thinking tokens of a saved ELM (ValueError: it cannot have them any more)."""
    signals = processor.signal_token_ids
    new = add_thinking_tokens(processor.tokenizer)
    if new and (use_peft or signals):
        why = "its adapter would need rows that this base lacks" if use_peft else "tokens of ECGs follow its words"
        raise ValueError(
            f"--thinking_tokens with --model_name_or_path {name}, which has no {new[0]}: {why}. Say it when the ELM is new, in the phase "
            f"pretrain too{', or train this one without --use_peft' if use_peft and not signals else ''}."
        )
    add_rows(model, processor, new)


def make_trainer(
    args: ELMArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    model: ELMForConditionalGeneration,
    processor: ELMProcessor,
    splits: dict[str, Any],
    options: RunOptions,
) -> ELMTrainer:
    """TRL's trainer, which trains the parts of `--update` or a LoRA adapter."""
    tags = thinking_token_ids(processor) if args.thinking_tokens else []
    peft_config, adapted = lora_config(args, model_args, model, tags) if model_args.use_peft else None, None
    if peft_config is None:  # PEFT itself freezes all that the adapter does not train
        freeze(model, args.update)
    elif model_args.load_in_4bit or model_args.load_in_8bit:
        adapted, peft_config = adapt_quantized(model, peft_config, 4 if model_args.load_in_4bit else 8), None
    changes = {option.name: getattr(args, option.name) for option in fields(AugmentationArguments)}
    collator = ELMCollator(
        processor,
        perturb=args.perturb,
        max_length=training_args.max_length,
        pad_to_multiple_of=training_args.pad_to_multiple_of,  # type: ignore[arg-type]  # no text any more
        padding_free=training_args.padding_free,
        packing=training_args.packing,
        train_phase=args.train_phase,
        seed=training_args.seed,
        **changes,
    )
    checkpoint_by_size(training_args, model)
    # TRL would do again, or otherwise, what the collator and `build_base` have done
    training_args.max_length, training_args.assistant_only_loss, training_args.chat_template_path = None, False, None
    training_args.padding_free = training_args.packing = False
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}  # TRL would tokenize the chats, without their ECGs
    trainer = ELMTrainer(
        options=options,
        model=model if adapted is None else adapted,
        args=training_args,
        train_dataset=splits["train"].sources[0] if args.streaming else splits["train"],
        eval_dataset=splits["validation"],
        data_collator=collator,
        processing_class=processor,
        peft_config=peft_config,
        callbacks=[CountEpochs(collator)],
    )
    trainer.train_dataset = splits["train"]  # of a stream TRL checks that it is of `datasets`
    assert trainer.model is not None
    check_trainer(args, trainer, model)
    if model_args.use_peft:
        complete_head(trainer.model)
        freeze_new_parts(trainer.model, args.update)
    if args.cache_features is not None:
        trainer.features = keep_features(args.cache_features, model)
    return trainer


def checkpoint_by_size(training_args: Any, model: ELMForConditionalGeneration) -> None:
    """Settles `--gradient_checkpointing` where nothing was said."""
    if training_args.gradient_checkpointing == BY_SIZE:
        checkpointed = sum(parameter.numel() for parameter in model.parameters()) >= CHECKPOINTED_FROM
        training_args.gradient_checkpointing = training_args.activation_checkpointing = checkpointed


def check_trainer(args: ELMArguments, trainer: Any, model: ELMForConditionalGeneration) -> None:
    """Refuses (ValueError) what cannot be, as is known when the model and what is trained of it are there."""
    norms = (module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm))
    compiled = trainer.args.torch_compile and trainer.args.torch_compile_backend == "eager"
    if compiled and trainer.args.gradient_checkpointing and any(norm.weight.requires_grad for norm in norms):
        raise ValueError(
            "--torch_compile_backend eager with --gradient_checkpointing and a trained encoder with batch norm: this backend, which is "
            "for debugging, cannot compute again what counts batches. Take inductor or aot_eager, or --gradient_checkpointing false."
        )
    if args.cache_features and (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
        raise ValueError(
            f"--cache_features {args.cache_features} with FSDP or ZeRO-3, where no process has the whole encoder; train with DDP or "
            "ZeRO-2, or leave the option out."
        )
    if trainer.args.optim == MUON and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            f"--optim {MUON} with FSDP or DeepSpeed, which cut the matrices that it needs whole; train with DDP, or leave the option "
            "out."
        )


def keep_features(where: str, model: ELMForConditionalGeneration) -> EncoderFeatures:
    """Where the features of the model's encoder are kept (ValueError: it has none, or it is trained)."""
    encoder = model.model.encoder
    if encoder is None:
        raise ValueError(
            f"--cache_features {where}: a {model.config.architecture} ELM has no encoder; leave the option out."
        )
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        raise ValueError(
            f"--cache_features {where}: the encoder is trained, so what it gives for an ECG changes. Freeze it with --update "
            "connector llm, and leave it out of --lora_target_modules and --lora_modules_to_save, or leave --cache_features out."
        )
    return EncoderFeatures(model.model, FOLDER if where == "disk" else None)


def check_adapter_folder(folder: Path, base: str | None, goes_on: bool) -> None:
    """ValueError if `folder` has an adapter that a new one would replace, or is the `base` on which the new one is to be loaded."""
    if base is not None and Path(base).resolve() == folder.resolve():
        raise ValueError(
            f"--output_dir {folder} is that of --model_name_or_path, the base of the new adapter, which would be replaced by it; name "
            "another --output_dir."
        )
    if not goes_on and (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"--output_dir {folder} holds a finished adapter, which would be replaced; name another, remove that folder, or go on "
            "from its last checkpoint with --resume_from_checkpoint last."
        )


def train(args: ELMArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Trains an ELM and saves it, its processor and its card to `output_dir`."""
    check_output_folder(Path(str(training_args.output_dir)))
    if model_args.model_name_or_path is not None:
        find_model_file(
            model_args.model_name_or_path, ["adapter_config.json", "config.json"], model_args.model_revision
        )
    torch.manual_seed(training_args.seed)  # of the new weights; the trainer seeds again
    options = RunOptions.of(args, training_args, model_args)
    checkpoint = checkpoint_to_resume(training_args)
    if model_args.use_peft:
        check_adapter_folder(Path(str(training_args.output_dir)), model_args.model_name_or_path, checkpoint is not None)
    if checkpoint is not None:  # before the data are read and the model is built, which take long
        options.go_on(checkpoint)
    splits = load_splits(args, training_args)
    if not args.streaming:
        options.data = fingerprint(splits["train"])
    if checkpoint is not None:
        options.go_on_with(checkpoint)
    model, processor = build_base(args, training_args, model_args)
    options.base = read_recipe(str(model.name_or_path))
    if args.system_prompt is not None:
        processor.system_prompt = args.system_prompt
    processor.train_phase, thinks = args.train_phase, processor.explicit_thinking
    if args.train_phase == "sft":
        processor.explicit_thinking = args.explicit_thinking
        if thinks and not args.explicit_thinking:
            logger.warning(
                "--model_name_or_path %s was trained with --explicit_thinking, and this run is without: its answers no longer begin with "
                "what is given.",
                model_args.model_name_or_path,
            )
    limit_threads(model, training_args.device)
    trainer = make_trainer(args, training_args, model_args, model, processor, splits, options)
    if trainer.is_world_process_zero():
        assert trainer.model is not None
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in trainer.model.parameters()]
        total, trainable = sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
        chats = "streamed" if args.streaming else len(splits["train"])
        if args.train_phase == "sft":
            print(f"Chat template: {processor.chat_template_origin or 'that of the saved model'}")
        print(
            f"{chats} {'chats' if args.train_phase == 'sft' else 'reports'}; {trainable:,} of {total:,} parameters trained",
            flush=True,
        )

    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.log_metrics("train", result.metrics)
    if trainer.features is not None and trainer.is_world_process_zero():
        print(f"{trainer.features}, by this process of {training_args.world_size}", flush=True)
    state = trainer.state
    kept = state.best_model_checkpoint or "the last step"
    if training_args.load_best_model_at_end and not kept.endswith(f"-{state.best_global_step}"):
        logger.warning(
            "The best step, %s, was not saved: the weights are those of %s. Equal --save_steps and --eval_steps save it.",
            state.best_global_step,
            kept,
        )
    output_dir = Path(str(training_args.output_dir)).absolute()
    with trainer.staging(output_dir) as folder:
        trainer.save_model(str(folder))  # and the processor, which is its processing_class
        trainer.accelerator.wait_for_everyone()  # of a sharded model each process writes a part
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(folder / "trainer_state.json"))  # with the losses that quickstart plots
            write_text(folder / "train_results.json", json.dumps(result.metrics, indent=2) + "\n")
            write_model_card(folder, args, training_args, model_args, model.config, processor, splits)
            options.save(folder)
            move_old_results(output_dir)
            replace_model(folder, output_dir)
            print(f"Saved model, processor and card to {output_dir}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Runs `elm sft`."""
    train(*parse(argv))


if __name__ == "__main__":  # as `accelerate launch` and `torchrun` start it
    sys.exit(run_command("elm sft", main))
