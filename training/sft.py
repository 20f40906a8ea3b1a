"""Fine-tunes an ELM with TRL: `elm sft ...`, `accelerate launch training/sft.py ...` or `torchrun training/sft.py ...`."""

import logging
import sys
from dataclasses import fields
from typing import Any

from trl import ModelConfig, SFTConfig

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.arguments import AugmentationArguments, ELMArguments
from elm_ecg.training.checkpoints import CountEpochs
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.command_line import run_command
from elm_ecg.training.lora import complete_head, freeze_new_parts
from elm_ecg.training.muon import SFTConfigWithMuon
from elm_ecg.training.packing import ROW_TOKENS, max_tokens_to_share
from elm_ecg.training.parser import ELMParser
from elm_ecg.training.resume import RunOptions
from elm_ecg.training.run import (
    begin,
    build,
    check_trainer,
    checkpoint_by_size,
    keep_features,
    parts_to_train,
    save,
    tell_size,
)
from elm_ecg.training.run_options import set_common_options, settle
from elm_ecg.training.thinking_tokens import thinking_token_ids
from elm_ecg.training.trainer import ELMTrainer
from elm_ecg.training.trl_options import NEEDED, REFUSED, REFUSED_VALUES

logger = logging.getLogger(__name__)

# defaults of --learning_rate: TRL's of full training, and ten times that of LoRA
LEARNING_RATES = {False: 2e-5, True: 2e-4}
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
    ].help = "Initial learning rate of AdamW. Default: 2e-5, and 2e-4 with --use_peft; 5e-4 of --train_phase pretrain without the language model."
    options["--pad_to_multiple_of"].help = "Pad batches to a multiple of so many tokens."
    options[
        "--padding_free"
    ].help = "Train on the chats of a batch as one row without padding: right for flash attention, slow with others where it gets long."
    options["--packing"].help = (
        f"Let chats of a batch share rows of at most --max_length tokens, or {ROW_TOKENS}, so that little is padded, and what they begin "
        "with alike, as a system prompt, is read once a row. "
        "--per_device_train_batch_size still counts chats."
    )
    options["--packing_strategy"].help = "bfd: no chat is cut."
    parser.refuse(REFUSED, REFUSED_VALUES, NEEDED)
    return parser


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
    parts = parts_to_train(args, model_args, model, thinking_token_ids(processor) if args.thinking_tokens else ())
    changes = {option.name: getattr(args, option.name) for option in fields(AugmentationArguments)}
    collator = ELMCollator(
        processor,
        perturb=args.perturb,
        max_length=training_args.max_length,
        pad_to_multiple_of=training_args.pad_to_multiple_of,  # type: ignore[arg-type]  # no text any more
        padding_free=training_args.padding_free,
        packing=training_args.packing,
        max_tokens_to_share=max_tokens_to_share(model.config.text_config),
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
        ema_decay=args.ema_decay,
        **parts,
        args=training_args,
        train_dataset=splits["train"].sources[0] if args.streaming else splits["train"],
        eval_dataset=splits["validation"],
        data_collator=collator,
        processing_class=processor,
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


def train(args: ELMArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Trains an ELM and saves it, its processor and its card to `output_dir`."""
    options, checkpoint, splits = begin(args, training_args, model_args)
    model, processor = build(args, training_args, model_args, options, args.train_phase)
    if args.train_phase == "sft":
        thinks, processor.explicit_thinking = processor.explicit_thinking, args.explicit_thinking
        if thinks and not args.explicit_thinking:
            logger.warning(
                "--model_name_or_path %s was trained with --explicit_thinking, and this run is without: its answers no longer begin with "
                "what is given.",
                model_args.model_name_or_path,
            )
    trainer = make_trainer(args, training_args, model_args, model, processor, splits, options)
    if trainer.is_world_process_zero() and args.train_phase == "sft":
        print(f"Chat template: {processor.chat_template_origin or 'that of the saved model'}")
    number = "streamed" if args.streaming else len(splits["train"])
    tell_size(trainer, f"{number} {'chats' if args.train_phase == 'sft' else 'reports'}")
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
    save(trainer, args, training_args, model_args, model, processor, splits, result.metrics, "sft")


def main(argv: list[str] | None = None) -> None:
    """Runs `elm sft`."""
    train(*parse(argv))


if __name__ == "__main__":  # as `accelerate launch` and `torchrun` start it
    sys.exit(run_command("elm sft", main))
