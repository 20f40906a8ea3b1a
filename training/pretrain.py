"""Pretrains an ECG encoder: `elm pretrain ...`, or `accelerate launch training/pretrain.py ...` with several processes."""

import json
import logging
import shutil
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.configuration_ecg_pretraining import ECGPretrainingConfig
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.modeling_ecg_pretraining import ECGForPreTraining
from elm_ecg.training.arguments import RecordArguments
from elm_ecg.training.augmentation import NO_AUGMENTATION
from elm_ecg.training.build import make_encoder_config
from elm_ecg.training.checkpoints import CountEpochs, replace_model
from elm_ecg.training.command_line import did_you_mean, printable, run_command
from elm_ecg.training.data.record_rows import load_records, report_of
from elm_ecg.training.data.schema import counted
from elm_ecg.training.encoders import EXTRACTOR_OPTIONS, load_encoder, load_text_encoder
from elm_ecg.training.figures import training_plot
from elm_ecg.training.files import REPLACED, check_apart, check_output_folder, write_text
from elm_ecg.training.load import limit_threads
from elm_ecg.training.model_files import ENCODER_FOLDER, loading, model_folder
from elm_ecg.training.pretrain_arguments import PretrainArguments, make_parser
from elm_ecg.training.pretrain_collator import PretrainingCollator
from elm_ecg.training.pretrain_trainer import PretrainingTrainer
from elm_ecg.training.reconstructions import draw_reconstructions
from elm_ecg.training.resume import RunOptions, checkpoint_to_resume, fingerprint
from elm_ecg.training.run_splits import read_splits
from elm_ecg.training.sharing.cards import write_encoder_card

logger = logging.getLogger(__name__)

PICTURES = "reconstructions"
# options that a model to go on from has answered already
OF_THE_MODEL = [
    *("encoder", "encoder_config", "targets", "text_encoder", "text_pooling", "contrastive_loss", "temperature"),
    *("projection_size", "pretraining_config"),
]
OF_RECORDS = tuple(option.name for option in fields(RecordArguments))


def parse(argv: list[str] | None = None, prog: str = "elm pretrain") -> tuple[PretrainArguments, TrainingArguments]:
    """What the command line says, checked (ValueError) as far as it can be without data and model; writes nothing."""
    args, training_args = make_parser(prog).parse_args_and_config(argv)
    if args.distributed and training_args.world_size == 1:
        raise ValueError(
            "--distributed, but there is one process: start with `accelerate launch --multi_gpu training/pretrain.py ...` or "
            "`torchrun --nproc_per_node N training/pretrain.py ...`."
        )
    if args.streaming and training_args.max_steps < 1:
        raise ValueError("--streaming does not know the number of rows; set --max_steps.")
    if args.wandb and "wandb" not in training_args.report_to:
        training_args.report_to = [*training_args.report_to, "wandb"]  # a list by now, whatever was said
    for name in training_args.report_to or []:
        if name not in get_available_reporting_integrations():
            raise ValueError(f"--report_to {name}: the package {name} is not installed, or is none that reports.")
    if training_args.fp16 and training_args.device.type == "cpu":  # accelerate would ignore it there
        raise ValueError(
            "--fp16 needs a GPU, and there is none; --bf16 computes in 16 bits on a CPU too, but on most much slower."
        )
    training_args.prediction_loss_only = True  # reconstructions of all records would fill the memory
    return args, training_args


def pretrained_encoder(args: PretrainArguments) -> tuple[PreTrainedModel, ECGFeatureExtractor]:
    """The pretrained ECG encoder of `--encoder`, and the feature extractor beside it, or without one that of the options.

    Raises:
        ValueError: as `load_encoder`; or it reads pictures.
    """
    name = args.encoder
    if "/" not in name and not Path(name).exists():  # an old id of the Hub without owner is none of an ECG encoder
        raise ValueError(
            f"--encoder {name} is none of {', '.join(ENCODER_CONFIGS)}, and no folder here.{did_you_mean(name, ENCODER_CONFIGS)}"
        )
    folder, _ = model_folder(name, ["adapter_config.json", "config.json"], label="--encoder")
    has_extractor = any((folder / file).is_file() for file in ("preprocessor_config.json", "processor_config.json"))
    described = {option: getattr(args, option) for option in EXTRACTOR_OPTIONS}
    loaded = load_encoder(
        name,
        trust_remote_code=args.trust_remote_code,
        truncation=args.truncation,
        **({} if has_extractor else described),
    )
    if loaded.to_pictures is not None:
        raise ValueError(f"--encoder {name} reads pictures; expected an ECG encoder, which reads signals.")
    _warn_of_unused(args, loaded.extractor, f"--encoder {name} comes with what prepares its records")
    return loaded.model.requires_grad_(True), loaded.extractor


def _warn_of_unused(
    args: PretrainArguments, extractor: ECGFeatureExtractor, why: str, options: Iterable[str] = OF_RECORDS
) -> None:
    """Tells of `options` that were said, and are not those of a feature extractor that was saved."""
    defaults = PretrainArguments(data=args.data)
    said = [option for option in options if getattr(args, option) != getattr(defaults, option)]
    if unused := [f"--{option}" for option in said if getattr(extractor, option, None) != getattr(args, option)]:
        logger.warning("%s. Without effect: %s.", why, ", ".join(unused))


def build_model(args: PretrainArguments) -> tuple[ECGForPreTraining, ECGFeatureExtractor, Any]:
    """The model to pretrain, its feature extractor, and the tokenizer of its text encoder (None without reports)."""
    if args.model_name_or_path is not None:
        return _load_model(args)
    extractor = ECGFeatureExtractor(**args.extractor_fields)
    encoder: PreTrainedModel | None = None
    if args.encoder in ENCODER_CONFIGS:
        shape = {"num_leads": len(extractor.lead_names), "num_samples": extractor.num_samples}
        encoder_config: Any = make_encoder_config(ENCODER_CONFIGS[args.encoder], args.encoder_fields, shape)
    else:
        encoder, extractor = pretrained_encoder(args)
        encoder_config = encoder.config
    args.set_objectives(encoder_config.model_type)
    text_encoder, tokenizer = None, None
    if "contrastive" in args.objectives:
        text_encoder, tokenizer = load_text_encoder(str(args.text_encoder))
    config = ECGPretrainingConfig(
        encoder_config=encoder_config,
        text_config=None if text_encoder is None else text_encoder.config,
        objectives=args.objectives,
        mask_ratio=args.mask_ratio,
        normalize_targets=None if args.targets is None else args.targets == "standardised",
        projection_size=args.projection_size,
        contrastive_loss=args.contrastive_loss,
        temperature=args.temperature,
        text_pooling=args.text_pooling,
        contrastive_weight=args.contrastive_weight,
        **args.pretraining_fields,
    )
    return ECGForPreTraining(config, encoder=encoder, text_encoder=text_encoder), extractor, tokenizer


def _load_model(args: PretrainArguments) -> tuple[ECGForPreTraining, ECGFeatureExtractor, Any]:
    """A saved pretraining model, with what of the options may change as it goes on."""
    name = str(args.model_name_or_path)
    folder, _ = model_folder(name, ["config.json"], label="--model_name_or_path")
    with loading(folder, f"The model {name}"):
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != ECGPretrainingConfig.model_type:
            raise ValueError(
                f"it is a {kind!r} model; expected what `elm pretrain` saves. An encoder to begin with is --encoder {name}."
            )
        model = ECGForPreTraining.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
        extractor = ECGFeatureExtractor.from_pretrained(folder)
        reads = "contrastive" in model.config.objectives
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if reads else None
    _warn_of_unused(args, extractor, f"--model_name_or_path {name} is a finished model", (*OF_THE_MODEL, *OF_RECORDS))
    saved = list(model.config.objectives)
    if args.objectives and args.objectives != saved:
        raise ValueError(
            f"--objectives {' '.join(args.objectives)}, and {name} was made for {' and '.join(saved)}; leave the option out, or begin with its "
            f"encoder alone: --encoder {name}."
        )
    args.objectives = saved
    model.config.mask_ratio, model.config.contrastive_weight = args.mask_ratio, args.contrastive_weight
    return model, extractor, tokenizer


def load_splits(args: PretrainArguments, training_args: TrainingArguments) -> dict[str, Any]:
    """The records of `train`, and with `--eval_strategy` those of `validation`, else None; errors as of `read_splits`."""
    reports, seed = args.report_column if "contrastive" in args.objectives else None, training_args.seed
    return read_splits(args, training_args, lambda split: load_records(args, split, seed, reports), column="ecg")


def make_trainer(
    args: PretrainArguments,
    training_args: TrainingArguments,
    model: ECGForPreTraining,
    collator: PretrainingCollator,
    splits: dict[str, Any],
    options: RunOptions,
) -> PretrainingTrainer:
    """transformers' trainer for the parts that are trained: all but a text encoder without `--train_text_encoder`."""
    if model.text_encoder is not None:
        model.text_encoder.requires_grad_(args.train_text_encoder)
    return PretrainingTrainer(
        options=options,
        ema_decay=args.ema_decay,
        cache_reports=args.cache_reports,
        model=model,
        args=training_args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=collator,
        processing_class=collator.feature_extractor,
        callbacks=[CountEpochs(collator)],
    )


def _told(args: PretrainArguments, model: ECGForPreTraining, extractor: ECGFeatureExtractor, data: Any) -> str:
    """What is about to be trained on what, in a line."""
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    trained, total = sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)
    records = "streamed records"
    if not args.streaming:
        records = counted(len(data), "record")
        if "contrastive" in args.objectives:
            column = data.select_columns([args.report_column]) if args.report_column in data.column_names else []
            number = sum(bool(report_of(row, args.report_column)) for row in column)
            if number == 0:
                raise ValueError(f"--report_column {args.report_column}: none of the {records} has a report.")
            records += f", {number:,} with a report"
    records += f", read as {extractor.num_samples:,} samples at {extractor.sampling_rate:g} Hz"
    return f"{' and '.join(args.objectives)}: {records}; {trained:,} of {total:,} parameters trained"


def train(args: PretrainArguments, training_args: TrainingArguments) -> None:
    """Pretrains a model, and saves it, and its encoder alone with a card, to `output_dir`."""
    output_dir = Path(str(training_args.output_dir)).absolute()
    check_output_folder(output_dir)
    # a name is no folder, though there be one of that name
    encoder = None if args.encoder in ENCODER_CONFIGS else args.encoder
    replaced = (*REPLACED, ENCODER_FOLDER, PICTURES)
    check_apart(output_dir, replaced, data=args.data, encoder=encoder, text_encoder=args.text_encoder)
    torch.manual_seed(training_args.seed)  # of the new weights; the trainer seeds again
    options = RunOptions.of(args, training_args)
    checkpoint = checkpoint_to_resume(training_args)
    if checkpoint is not None:  # before the data are read and the model is built, which take long
        options.go_on(checkpoint)
    model, extractor, tokenizer = build_model(args)
    splits = load_splits(args, training_args)
    if not args.streaming:
        options.data = fingerprint(splits["train"], [args.report_column])
    if checkpoint is not None:
        options.go_on_with(checkpoint)
    limit_threads(model, training_args.device)
    changes = {name: getattr(args, name) for name in NO_AUGMENTATION if name != "augment_rgb"}
    collator = PretrainingCollator(
        model.config,
        extractor,
        tokenizer,
        None if tokenizer is None else args.report_column,
        args.max_report_tokens,
        seed=training_args.seed,
        **changes,
    )
    trainer = make_trainer(args, training_args, model, collator, splits, options)
    told = _told(args, model, extractor, splits["train"])
    if trainer.is_world_process_zero():
        print(told, flush=True)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.state.global_step == 0:  # the trainer would go on, and random weights be saved as pretrained
        batch = training_args.per_device_train_batch_size * training_args.world_size
        raise ValueError(
            f"Nothing was trained: the records do not fill one batch of {batch}. Choose a smaller --per_device_train_batch_size "
            f"than {training_args.per_device_train_batch_size}, or say --dataloader_drop_last false."
        )
    trainer.log_metrics("train", result.metrics)
    with trainer.staging(output_dir) as folder:
        trainer.save_model(str(folder))  # and the feature extractor, which is its processing_class
        trainer.accelerator.wait_for_everyone()  # of a sharded model each process writes a part
        if trainer.is_world_process_zero():
            _save_rest(folder, output_dir.name, args, trainer, collator, splits, result.metrics)
            options.save(folder)
            shutil.rmtree(output_dir / PICTURES, ignore_errors=True)  # of an earlier run, which this one may not draw
            replace_model(folder, output_dir)
            drawn = f", reconstructions in {PICTURES}/" if (output_dir / PICTURES).is_dir() else ""
            print(
                printable(
                    f"Saved the encoder to {output_dir / ENCODER_FOLDER}, the pretraining model to {output_dir}{drawn}"
                ),
                flush=True,
            )


def _save_rest(
    folder: Path,
    name: str,
    args: PretrainArguments,
    trainer: PretrainingTrainer,
    collator: PretrainingCollator,
    splits: dict[str, Any],
    metrics: dict[str, float],
) -> None:
    """All that stands beside the weights of the pretraining model: its encoder alone, plots and numbers."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if collator.tokenizer is not None:
        collator.tokenizer.save_pretrained(folder)
    encoder = folder / ENCODER_FOLDER
    model.encoder.save_pretrained(encoder)
    collator.feature_extractor.save_pretrained(encoder)
    write_encoder_card(encoder, name, model.config, args, trainer.args, splits)
    history: Any = trainer.state.log_history
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    write_text(folder / "train_results.json", json.dumps(metrics, indent=2) + "\n")
    (folder / "training.svg").write_bytes(training_plot(history, "loss"))
    if "masked" in model.config.objectives and args.num_pictures and not args.streaming:
        rows = splits["train"] if splits["validation"] is None else splits["validation"]
        rows = [rows[index] for index in range(min(args.num_pictures, len(rows)))]
        draw_reconstructions(folder / PICTURES, model, collator.for_evaluation(), rows)


def main(argv: list[str] | None = None) -> None:
    """Runs `elm pretrain`."""
    train(*parse(argv))


if __name__ == "__main__":  # as `accelerate launch` and `torchrun` start it
    sys.exit(run_command("elm pretrain", main))
