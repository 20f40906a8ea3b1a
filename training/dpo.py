"""Teaches an ELM the better of two answers with TRL: `elm dpo ...`, or `accelerate launch training/dpo.py ...` with several processes."""

import sys
from dataclasses import fields
from typing import Any

from trl import ModelConfig

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.arguments import AugmentationArguments, ELMArguments
from elm_ecg.training.checkpoints import CountEpochs
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.command_line import run_command
from elm_ecg.training.dpo_arguments import LOSSES, NEEDED_HERE, REFUSED_HERE, PairsConfig
from elm_ecg.training.dpo_trainer import PAIR, ELMDPOTrainer, PairsCollator, check_pairs
from elm_ecg.training.figures import training_plot
from elm_ecg.training.lora import freeze_new_parts
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

# defaults of --learning_rate, of full training and of LoRA
LEARNING_RATES = {False: 1e-6, True: 1e-5}
METRICS = ("loss", "rewards/accuracies", "rewards/margins")  # of an evaluation


def make_parser(prog: str = "elm dpo") -> ELMParser:
    """The options of `elm dpo`: ours, those of TRL's DPOConfig and ModelConfig but for `REFUSED_HERE`, and `--config`."""
    parser = ELMParser((ELMArguments, PairsConfig, ModelConfig), prog=prog)
    set_common_options(parser)
    parser.set_defaults(max_length=None)  # TRL would cut chats at 1024 tokens
    options: dict[str, Any] = parser._option_string_actions
    options["--data"].help = (
        "Datasets of pairs: as of `elm sft`, but messages end with a question, and the columns chosen and rejected hold the better "
        "answer to it and the worse one."
    )
    options["--update"].help = "Parts that are trained. Default: connector and llm, and an encoder with random weights."
    options["--max_length"].help = "Tokens that a chat may have; a longer one is an error. Default: what the LLM reads."
    options["--learning_rate"].help = "Initial learning rate of AdamW. Default: 1e-6, and 1e-5 with --use_peft."
    options["--loss_type"].choices = LOSSES
    options["--beta"].help = "How near the model stays to what it was at the start: the larger the nearer."
    options["--metric_for_best_model"].help = f"{', '.join(METRICS)}, of the split validation."
    parser.refuse(REFUSED_HERE, needed=NEEDED_HERE)
    return parser


def parse(argv: list[str] | None = None, prog: str = "elm dpo") -> tuple[ELMArguments, PairsConfig, ModelConfig]:
    """What the command line says, checked (ValueError) as far as it can be without data and model; writes nothing."""
    args, training_args, model_args = make_parser(prog).parse_args_and_config(argv)
    settle(args, training_args, model_args, LEARNING_RATES)
    if training_args.sync_ref_model and model_args.use_peft:
        raise ValueError(
            "--sync_ref_model with --use_peft, where the model without its adapter is the one to stay near; leave one of the two out."
        )
    if training_args.activation_offloading and training_args.device.type == "cpu":
        raise ValueError("--activation_offloading takes memory from a GPU, and there is none; leave it out.")
    metric = (training_args.metric_for_best_model or METRICS[0]).removeprefix("eval_")
    if metric not in METRICS:
        raise ValueError(
            f"--metric_for_best_model is {metric}; an evaluation while training gives {', '.join(METRICS)}."
        )
    return args, training_args, model_args


def make_trainer(
    args: ELMArguments,
    training_args: PairsConfig,
    model_args: ModelConfig,
    model: ELMForConditionalGeneration,
    processor: ELMProcessor,
    splits: dict[str, Any],
    options: RunOptions,
) -> ELMDPOTrainer:
    """TRL's trainer, which trains the parts of `--update` or a LoRA adapter."""
    parts = parts_to_train(args, model_args, model)
    changes = {option.name: getattr(args, option.name) for option in fields(AugmentationArguments)}
    collator = ELMCollator(
        processor,
        perturb=args.perturb,
        max_length=training_args.max_length,
        pad_to_multiple_of=training_args.pad_to_multiple_of,  # type: ignore[arg-type]  # no text any more
        seed=training_args.seed,
        **changes,
    )
    checkpoint_by_size(training_args, model)
    training_args.max_length = None  # the collator has done it
    trainer = ELMDPOTrainer(
        options=options,
        **parts,
        args=training_args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=PairsCollator(collator),
        processing_class=processor,
        callbacks=[CountEpochs(collator)],
    )
    assert trainer.model is not None
    check_trainer(args, trainer, model)
    if model_args.use_peft:
        freeze_new_parts(trainer.model, args.update)
    if args.cache_features is not None:
        trainer.features = keep_features(args.cache_features, model)
    return trainer


def train(args: ELMArguments, training_args: PairsConfig, model_args: ModelConfig) -> None:
    """Trains an ELM on pairs of answers, and saves it, its processor and its card to `output_dir`."""
    options, checkpoint, splits = begin(args, training_args, model_args, check_pairs, ("messages", *PAIR))
    model, processor = build(args, training_args, model_args, options, "dpo")
    trainer = make_trainer(args, training_args, model_args, model, processor, splits, options)
    tell_size(trainer, f"{len(splits['train']):,} pairs of answers")
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.log_metrics("train", result.metrics)
    history: Any = trainer.state.log_history
    files = {"training.svg": training_plot(history, "loss")} if trainer.is_world_process_zero() else {}
    facts = [("`loss_type`", ", ".join(training_args.loss_type)), ("`beta`", training_args.beta)]
    save(trainer, args, training_args, model_args, model, processor, splits, result.metrics, "dpo", facts, files)


def main(argv: list[str] | None = None) -> None:
    """Runs `elm dpo`."""
    train(*parse(argv))


if __name__ == "__main__":  # as `accelerate launch` and `torchrun` start it
    sys.exit(run_command("elm dpo", main))
