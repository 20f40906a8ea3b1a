"""What `elm rl` and `elm dpo` do before and after they train, which is what `elm sft` does too."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import ModelConfig

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.arguments import ELMArguments
from elm_ecg.training.base_models import read_recipe
from elm_ecg.training.checkpoints import WholeCheckpoints, replace_model
from elm_ecg.training.evaluation.results import move_old_results
from elm_ecg.training.files import check_output_folder, write_text
from elm_ecg.training.load import limit_threads
from elm_ecg.training.lora import adapt_quantized, freeze, lora_config
from elm_ecg.training.model_files import find_model_file
from elm_ecg.training.resume import RunOptions, checkpoint_to_resume, fingerprint
from elm_ecg.training.sft import build_base, check_adapter_folder, load_splits
from elm_ecg.training.sharing.cards import write_model_card

logger = logging.getLogger(__name__)


def begin(
    args: ELMArguments,
    training_args: Any,
    model_args: ModelConfig,
    check: Callable[[Dataset, str], None],
    texts: Sequence[str] = ("messages",),
) -> tuple[RunOptions, Path | None, dict[str, Any]]:
    """The options of a run, the checkpoint that it goes on from, and its splits, before the model is loaded.

    Args:
        check: of each split and its name; raises ValueError if nothing can be learnt from it.
        texts: columns that the run learns from.

    Raises:
        ValueError: something is wrong with the folders, the checkpoint or the data.
    """
    output_dir, name = Path(str(training_args.output_dir)), model_args.model_name_or_path
    check_output_folder(output_dir)
    if name is not None:
        find_model_file(name, ["adapter_config.json", "config.json"], model_args.model_revision)
    torch.manual_seed(training_args.seed)  # of the new weights; the trainer seeds again
    options = RunOptions.of(args, training_args, model_args)
    checkpoint = checkpoint_to_resume(training_args)
    if model_args.use_peft:
        check_adapter_folder(output_dir, name, checkpoint is not None)
    if checkpoint is not None:  # before the data are read and the model is built, which take long
        options.go_on(checkpoint)
    splits = load_splits(args, training_args)
    for split, data in splits.items():
        if data is not None:
            check(data, split)
    options.data = fingerprint(splits["train"], texts)
    if checkpoint is not None:
        options.go_on_with(checkpoint)
    return options, checkpoint, splits


def build(
    args: ELMArguments, training_args: Any, model_args: ModelConfig, options: RunOptions, phase: str
) -> tuple[ELMForConditionalGeneration, ELMProcessor]:
    """The model to train and its processor, which tells from now on that it was trained in this phase."""
    model, processor = build_base(args, training_args, model_args)
    warn_of_base(args, model_args, processor)
    processor.train_phase = phase
    options.base = read_recipe(str(model.name_or_path))
    if args.system_prompt is not None:
        processor.system_prompt = args.system_prompt
    limit_threads(model, training_args.device)
    return model, processor


def warn_of_base(args: ELMArguments, model_args: ModelConfig, processor: ELMProcessor) -> None:
    """Tells of a model that has not learnt to answer yet, so that rewards and pairs of answers have little to begin with."""
    name = model_args.model_name_or_path
    if name is None:
        what = f"No --model_name_or_path: a new ELM around {args.llm} has never been fine-tuned"
    elif processor.train_phase == "pretrain":
        what = f"--model_name_or_path {name} was aligned on reports and has never been fine-tuned"
    else:
        return
    logger.warning("%s, so that it hardly answers questions. Begin with what `elm sft` has made of it.", what)


def parts_to_train(args: ELMArguments, model_args: ModelConfig, model: ELMForConditionalGeneration) -> dict[str, Any]:
    """Freezes what is not trained; `model` and `peft_config` for TRL's trainers."""
    if not model_args.use_peft:
        freeze(model, args.update)
        return {"model": model, "peft_config": None}
    peft_config = lora_config(args, model_args, model)  # PEFT itself freezes all that the adapter does not train
    if model_args.load_in_4bit or model_args.load_in_8bit:
        return {"model": adapt_quantized(model, peft_config, 4 if model_args.load_in_4bit else 8), "peft_config": None}
    return {"model": model, "peft_config": peft_config}


def tell_size(trainer: WholeCheckpoints, what: str) -> None:
    """Prints what is about to be trained on what, in a line."""
    if trainer.is_world_process_zero():
        assert trainer.model is not None
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in trainer.model.parameters()]
        total, trainable = sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
        print(f"{what}; {trainable:,} of {total:,} parameters trained", flush=True)


def save(
    trainer: WholeCheckpoints,
    args: ELMArguments,
    training_args: Any,
    model_args: ModelConfig,
    model: ELMForConditionalGeneration,
    processor: ELMProcessor,
    splits: dict[str, Any],
    metrics: dict[str, float],
    method: str,
    facts: Sequence[tuple[str, Any]],
    files: dict[str, bytes],
) -> None:
    """Saves the model, its processor, its card and what was measured to `output_dir`.

    Args:
        method, facts: as of `write_model_card`.
        files: name -> content of what else stands there.
    """
    output_dir = Path(str(training_args.output_dir)).absolute()
    with trainer.staging(output_dir) as folder:
        trainer.save_model(str(folder))  # and the processor, which is its processing_class
        trainer.accelerator.wait_for_everyone()  # of a sharded model each process writes a part
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            write_text(folder / "train_results.json", json.dumps(metrics, indent=2) + "\n")
            for name, content in files.items():
                (folder / name).write_bytes(content)
            write_model_card(folder, args, training_args, model_args, model.config, processor, splits, method, facts)
            trainer.options.save(folder)
            move_old_results(output_dir)
            replace_model(folder, output_dir)
            print(f"Saved model, processor and card to {output_dir}", flush=True)
