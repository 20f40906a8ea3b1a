"""Reinforcement learning of an ELM with TRL: `elm rl ...`, or `accelerate launch training/rl.py ...` with several processes."""

import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.arguments import AugmentationArguments
from elm_ecg.training.checkpoints import CountEpochs
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.command_line import run_command
from elm_ecg.training.evaluation.bootstrap import difference, resampled_sums
from elm_ecg.training.features import EncoderFeatures
from elm_ecg.training.figures import rewards_plot
from elm_ecg.training.lora import freeze_new_parts
from elm_ecg.training.parser import ELMParser
from elm_ecg.training.resume import RunOptions
from elm_ecg.training.rewards import REWARDS, Reward
from elm_ecg.training.rl_arguments import LOSSES, NEEDED_HERE, OF_LOSS, REFUSED_HERE, RLArguments, RLConfig
from elm_ecg.training.rl_prompts import TAKEN, Prompts, check_answers
from elm_ecg.training.rl_trainer import CONDITIONS, ELMGRPOTrainer
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
ANSWERS = "answers"  # folder of the drawn ones
MAX_BYTES_OF_FEATURES = 2**28  # of a frozen encoder, for the ECGs of the last batches


def make_parser(prog: str = "elm rl") -> ELMParser:
    """The options of `elm rl`: ours, those of TRL's GRPOConfig and ModelConfig but for `REFUSED_HERE`, and `--config`."""
    parser = ELMParser((RLArguments, RLConfig, ModelConfig), prog=prog)
    set_common_options(parser)
    parser.set_defaults(
        # those of the reference
        loss_type="sapo",
        num_generations=4,
        temperature=0.8,
        top_p=0.95,
        max_completion_length=384,
        num_iterations=2,
        num_generations_eval=1,
        disable_dropout=True,  # answers are written without
        eval_on_start=True,  # what is gained is told by it
    )
    options: dict[str, Any] = parser._option_string_actions
    options["--learning_rate"].help = "Initial learning rate of AdamW. Default: 1e-6, and 1e-5 with --use_peft."
    options["--data"].help += " The last answer of each chat is the right one, and what stands before it is asked."
    options["--update"].help = "Parts that are trained. Default: connector and llm, and an encoder with random weights."
    options["--loss_type"].choices = LOSSES
    options["--loss_type"].help = "How rewards become a loss, see TRL's GRPOConfig; sapo as in the reference."
    options["--num_generations"].help = "Answers to each prompt, a group: each is judged beside the others."
    options["--num_generations_eval"].help = "Answers to each prompt of an evaluation."
    options["--reward_weights"].help = "Weight of each of --rewards, in their order. Default: 1 each."
    options["--max_completion_length"].help = "Tokens that an answer may have."
    options["--num_iterations"].help = "How often the answers that were written at once are trained on."
    options["--beta"].help = "Weight of the divergence from the model as it was at the start; 0 for none."
    options["--steps_per_generation"].help = "Batches that the answers written at once are cut into."
    options["--metric_for_best_model"].help = "reward, or one of --rewards, of the answers with their ECG."
    options[
        "--eval_on_start"
    ].help = "With --eval_strategy: evaluate before the first step, so that what is gained is told."
    parser.refuse(REFUSED_HERE, needed=NEEDED_HERE)
    return parser


def parse(argv: list[str] | None = None, prog: str = "elm rl") -> tuple[RLArguments, RLConfig, ModelConfig]:
    """What the command line says, checked (ValueError) as far as it can be without data and model; writes nothing."""
    parser = make_parser(prog)
    args, training_args, model_args = parser.parse_args_and_config(argv)
    settle(args, training_args, model_args, LEARNING_RATES)
    if training_args.sync_ref_model and model_args.use_peft:
        raise ValueError(
            "--sync_ref_model with --use_peft, where the model without its adapter is the one to stay near; leave one of the two out."
        )
    training_args.eval_on_start &= training_args.eval_strategy != "no"
    names, weights = [reward.name for reward in args.reward_functions], training_args.reward_weights
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"--reward_weights has {len(weights)} numbers for the {len(names)} of --rewards, {', '.join(names)}; expected one for each."
        )
    if weights is not None and not np.isfinite(weights).all():
        raise ValueError(f"--reward_weights are {', '.join(map(str, weights))}; expected finite numbers.")
    if training_args.include_num_input_tokens_seen != "no":
        raise ValueError(
            "--include_num_input_tokens_seen cannot be used: num_tokens in the log counts prompts and answers."
        )
    for option, losses in OF_LOSS.items():
        if getattr(training_args, option) != parser.presets[option] and training_args.loss_type not in losses:
            raise ValueError(
                f"--{option} changes nothing with --loss_type {training_args.loss_type}; it is for {', '.join(losses)}."
            )
    _set_metric(training_args, names)
    return args, training_args, model_args


def _set_metric(training_args: RLConfig, names: list[str]) -> None:
    """`--metric_for_best_model` as the trainer calls it (ValueError: there is none of that name)."""
    metric = training_args.metric_for_best_model
    if metric is None:
        return
    metric = "reward" if metric == "loss" else metric  # what transformers has filled in
    if metric not in ("reward", *names):
        raise ValueError(
            f"--metric_for_best_model is {metric}; expected reward, or one of --rewards, {', '.join(names)}."
        )
    training_args.metric_for_best_model = f"eval_ecg_{'reward' if metric == 'reward' else f'rewards/{metric}/mean'}"
    training_args.greater_is_better = True


def numbers_of(data: Dataset, condition: str | None = None, most: int | None = None) -> Dataset:
    """The numbers of the rows, which the trainer draws from; of an evaluation at most `most`, with their `condition`: spread over all
    rows, as those of several datasets stand one behind the other."""
    number = len(data) if most is None else min(most, len(data))
    rows: dict[str, Any] = {"row": np.arange(number) * len(data) // number}
    return Dataset.from_dict(rows if condition is None else {**rows, "condition": [condition] * number})


def make_trainer(
    args: RLArguments,
    training_args: RLConfig,
    model_args: ModelConfig,
    model: ELMForConditionalGeneration,
    processor: ELMProcessor,
    splits: dict[str, Any],
    options: RunOptions,
) -> ELMGRPOTrainer:
    """TRL's trainer, which trains the parts of `--update` or a LoRA adapter."""
    parts = parts_to_train(args, model_args, model)
    changes = {option.name: getattr(args, option.name) for option in fields(AugmentationArguments)}
    collator = ELMCollator(processor, seed=training_args.seed, **changes)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = None if longest is None else longest - (training_args.max_completion_length or 0)
    template_kwargs: Any = training_args.chat_template_kwargs or {}
    prompts = {"train": Prompts(splits["train"], collator, template_kwargs, room)}
    evaluated = None
    if splits["validation"] is not None:
        plain = collator.for_evaluation()
        collators = {"ecg": plain, "zeros": replace(plain, perturb="zeros")}
        prompts |= {name: Prompts(splits["validation"], collators[name], template_kwargs, room) for name in CONDITIONS}
        evaluated = {name: numbers_of(splits["validation"], name, args.eval_prompts) for name in CONDITIONS}
    checkpoint_by_size(training_args, model)
    for reward in args.reward_functions:
        reward.context = {
            "think_given": bool(processor.given_answer),
            "max_completion_length": training_args.max_completion_length,
        }
    funcs: list[Reward] = list(args.reward_functions)
    trainer = ELMGRPOTrainer(
        options=options,
        prompts=prompts,
        processor=processor,
        draw_steps=args.draw_steps,
        draw_prompts=args.draw_prompts,
        answers_dir=Path(str(training_args.output_dir)) / ANSWERS,
        **parts,
        args=training_args,
        reward_funcs=funcs,
        train_dataset=numbers_of(splits["train"]),
        eval_dataset=evaluated,
        callbacks=[CountEpochs(collator)],
    )
    assert trainer.model is not None
    check_trainer(args, trainer, model)
    if model_args.use_peft:
        freeze_new_parts(trainer.model, args.update)
    encoder = model.model.encoder
    if args.cache_features is not None:
        trainer.features = keep_features(args.cache_features, model)
    elif encoder is not None and not (
        any(parameter.requires_grad for parameter in encoder.parameters())
        or trainer.is_fsdp_enabled  # there no process has the whole encoder
        or is_deepspeed_zero3_enabled()
    ):
        trainer.features = EncoderFeatures(model.model, max_bytes=MAX_BYTES_OF_FEATURES)
    return trainer


def train(args: RLArguments, training_args: RLConfig, model_args: ModelConfig) -> None:
    """Trains an ELM by rewards, and saves it, its processor and its card to `output_dir`."""
    options, checkpoint, splits = begin(args, training_args, model_args, check_answers)
    _check_columns(args, splits["train"])
    _check_size(training_args, len(splits["train"]))
    model, processor = build(args, training_args, model_args, options, "rl")
    trainer = make_trainer(args, training_args, model_args, model, processor, splits, options)
    rewards = ", ".join(reward.name for reward in args.reward_functions)
    answers = training_args.num_generations
    tell_size(trainer, f"{len(splits['train']):,} prompts, {answers} answers to each, rewarded for {rewards}")
    if checkpoint is None and trainer.is_world_process_zero():  # those of an earlier run
        shutil.rmtree(Path(str(training_args.output_dir)) / ANSWERS, ignore_errors=True)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.log_metrics("train", result.metrics)
    if splits["validation"] is not None and not _is_evaluated(trainer, training_args):
        trainer.evaluate()
    history: Any = trainer.state.log_history
    files = {"rewards.svg": rewards_plot(history)} if trainer.is_world_process_zero() else {}
    facts = _facts(args, training_args)
    save(trainer, args, training_args, model_args, model, processor, splits, result.metrics, "grpo", facts, files)
    if trainer.is_world_process_zero():
        print(verdict(trainer, splits["validation"]), flush=True)


def _check_columns(args: RLArguments, data: Dataset) -> None:
    """ValueError if a function of one's own would get something else under the name of a column."""
    own = next((option for option in args.rewards if ".py:" in option), None)
    if own is not None and (taken := sorted(TAKEN.intersection(data.column_names))):
        raise ValueError(
            f"The data have the column {taken[0]}, and --rewards {own} gets something else under that name, as `elm rl` and TRL say it; "
            "rename the column."
        )


def _check_size(training_args: Any, number: int) -> None:
    prompts = training_args.generation_batch_size // training_args.num_generations
    if number < prompts:
        raise ValueError(
            f"The split 'train' has {number} rows, and answers to {prompts} prompts are written at once; lower "
            "--per_device_train_batch_size, --gradient_accumulation_steps or --steps_per_generation, or raise --num_generations."
        )


def _is_evaluated(trainer: ELMGRPOTrainer, training_args: RLConfig) -> bool:
    """Whether the model as it is now was evaluated last."""
    state = trainer.state
    if training_args.load_best_model_at_end and state.best_global_step != state.global_step:
        return False  # its weights are those of an earlier step
    return state.global_step in [row["step"] for row in state.log_history if "eval_ecg_reward" in row]


def _facts(args: RLArguments, training_args: RLConfig) -> list[tuple[str, Any]]:
    """Names and values of the card's table that say most of a run of `elm rl`."""
    weights = training_args.reward_weights or [1.0] * len(args.reward_functions)
    pairs = zip(args.reward_functions, weights, strict=True)
    rewards = ", ".join(
        f"{reward.name} ({REWARDS.get(reward.name, 'metric or own function')}), weight {weight:g}"
        for reward, weight in pairs
    )
    names = ("loss_type", "num_generations", "temperature", "top_p", "max_completion_length", "num_iterations", "beta")
    return [("rewards", rewards), *((f"`{name}`", getattr(training_args, name)) for name in names)]


def verdict(trainer: ELMGRPOTrainer, data: Dataset | None) -> str:
    """What training has changed of the reward with the ECG and with zeros in its place, in words."""
    groups, skipped = sum(trainer.groups.values()), trainer.groups["skipped"]
    told = f"{skipped:,} of {groups:,} groups of answers taught nothing, as their rewards were equal."
    if not trainer.evaluated or data is None:
        return f"{told} Whether the model looks at the ECG or guesses is not known: --eval_strategy steps measures it on the split validation."
    rows = list(trainer.evaluated["ecg"])
    values = np.array([[trainer.evaluated[name][row] for name in CONDITIONS] for row in rows])  # [rows, conditions, 2]
    (ecg_first, ecg_last), (zeros_first, zeros_last) = values.mean(0)
    gains = (values[:, 0, 1] - values[:, 0, 0]) - (values[:, 1, 1] - values[:, 1, 0])
    patients = [str(data[int(row)].get("patient_id") or f"row {row}") for row in rows]
    sums = resampled_sums(np.stack([gains, np.ones_like(gains)], 1), patients)
    interval = difference(float(gains.mean()), sums[:, 0] / sums[:, 1])
    of = f"Of {len(rows)} prompts of the split validation the reward went with their ECG from {ecg_first:.3f} to {ecg_last:.3f}, with zeros "
    of += f"in its place from {zeros_first:.3f} to {zeros_last:.3f}. The difference is {gains.mean():+.3f}"
    if interval.low is None or interval.high is None:
        return f"{told} {of}; too few patients to say more."
    means = (
        "the model learns to look" if interval.low > 0 else "that it learns to look rather than to guess is not shown"
    )
    return f"{told} {of} (95% interval {interval.low:+.3f} to {interval.high:+.3f}): {means}."


def main(argv: list[str] | None = None) -> None:
    """Runs `elm rl`."""
    train(*parse(argv))


if __name__ == "__main__":  # as `accelerate launch` and `torchrun` start it
    sys.exit(run_command("elm rl", main))
