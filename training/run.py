"""What `elm sft`, `elm rl` and `elm dpo` do alike before and after they train."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_quantization_config

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.arguments import ELMArguments, new_elm_options
from elm_ecg.training.base_models import find_base, read_recipe, recipe_of, write_merged
from elm_ecg.training.build import build_model, build_processor, place_of_encoder
from elm_ecg.training.chat_templates import set_chat_template, stop_at_end_of_turn
from elm_ecg.training.checkpoints import WholeCheckpoints, replace_model
from elm_ecg.training.data.loading import load_data
from elm_ecg.training.data.report_rows import as_reports, load_reports
from elm_ecg.training.evaluation.results import move_old_results
from elm_ecg.training.features import FOLDER, EncoderFeatures
from elm_ecg.training.files import check_apart, check_output_folder, write_text
from elm_ecg.training.llms import LLMS
from elm_ecg.training.load import limit_threads, load_elm
from elm_ecg.training.lora import adapt_quantized, freeze, lora_config, set_precision
from elm_ecg.training.model_files import find_model_file
from elm_ecg.training.muon import MUON
from elm_ecg.training.resume import RunOptions, checkpoint_to_resume, fingerprint
from elm_ecg.training.run_options import BY_SIZE
from elm_ecg.training.run_splits import read_splits
from elm_ecg.training.sharing.cards import write_model_card
from elm_ecg.training.thinking_tokens import add_rows, add_thinking_tokens

logger = logging.getLogger(__name__)

# parts of a saved ELM that --load_in_4bit and --load_in_8bit leave as they are
NOT_QUANTIZED = ["model.encoder", "model.connector", "model.signal_embeddings", "lm_head"]
CHECKPOINTED_FROM = 1_000_000_000  # parameters, from which on --gradient_checkpointing is true where nothing is said
AFTER_CHATS = ("rl", "dpo")  # phases that begin with a model that answers


def begin(
    args: ELMArguments,
    training_args: Any,
    model_args: ModelConfig,
    check: Callable[[Dataset, str], None] | None = None,
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
    llm = LLMS.get(args.llm, args.llm)  # a name is no folder, though there be one of that name
    check_apart(output_dir, data=args.data, llm=llm, encoder=args.encoder_name_or_path)
    if name is not None:
        find_model_file(name, ["adapter_config.json", "config.json"], model_args.model_revision)
    else:
        place_of_encoder(args)
    torch.manual_seed(training_args.seed)  # of the new weights; the trainer seeds again
    options = RunOptions.of(args, training_args, model_args)
    checkpoint = checkpoint_to_resume(training_args)
    if model_args.use_peft:
        check_adapter_folder(output_dir, name, checkpoint is not None)
    if checkpoint is not None:  # before the data are read and the model is built, which take long
        options.go_on(checkpoint)
    splits = load_splits(args, training_args)
    for split, data in splits.items():
        if data is not None and check is not None:
            check(data, split)
    if not args.streaming:
        options.data = fingerprint(splits["train"], texts)
    if checkpoint is not None:
        options.go_on_with(checkpoint)
    return options, checkpoint, splits


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


def build(
    args: ELMArguments, training_args: Any, model_args: ModelConfig, options: RunOptions, phase: str
) -> tuple[ELMForConditionalGeneration, ELMProcessor]:
    """The model to train and its processor, which tells from now on that it was trained in this phase."""
    model, processor = build_base(args, training_args, model_args)
    if phase in AFTER_CHATS:
        warn_of_base(args, model_args, processor)
    processor.train_phase = phase
    options.base = read_recipe(str(model.name_or_path))
    if args.system_prompt is not None:
        processor.system_prompt = args.system_prompt
    limit_threads(model, training_args.device)
    return model, processor


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


def parts_to_train(
    args: ELMArguments, model_args: ModelConfig, model: ELMForConditionalGeneration, tags: Sequence[int] = ()
) -> dict[str, Any]:
    """Freezes what is not trained; `model` and `peft_config` for TRL's trainers.

    Args:
        tags: ids of tokens whose rows LoRA trains, as of `lora_config`.
    """
    if not model_args.use_peft:
        freeze(model, args.update)
        return {"model": model, "peft_config": None}
    peft_config = lora_config(args, model_args, model, tags)  # PEFT itself freezes all that the adapter does not train
    if model_args.load_in_4bit or model_args.load_in_8bit:
        return {"model": adapt_quantized(model, peft_config, 4 if model_args.load_in_4bit else 8), "peft_config": None}
    return {"model": model, "peft_config": peft_config}


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


def tell_size(trainer: WholeCheckpoints, what: str) -> None:
    """Prints what is about to be trained on what, in a line."""
    if trainer.is_world_process_zero():
        assert trainer.model is not None
        sizes = [
            (parameter.numel(), parameter.requires_grad)
            for name, parameter in trainer.model.named_parameters()
            if ".original_module." not in name  # of what an adapter holds whole, PEFT keeps what it replaced
        ]
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
    facts: Sequence[tuple[str, Any]] = (),
    files: dict[str, bytes] | None = None,
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
            trainer.state.save_to_json(str(folder / "trainer_state.json"))  # with the losses that quickstart plots
            write_text(folder / "train_results.json", json.dumps(metrics, indent=2) + "\n")
            for name, content in (files or {}).items():
                (folder / name).write_bytes(content)
            write_model_card(folder, args, training_args, model_args, model.config, processor, splits, method, facts)
            trainer.options.save(folder)
            move_old_results(output_dir)
            replace_model(folder, output_dir)
            print(f"Saved model, processor and card to {output_dir}", flush=True)
