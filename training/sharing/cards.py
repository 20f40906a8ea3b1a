"""Cards of ELMs, adapters and ECG encoders, from what their runs and folders know; their texts are in `model_cards/`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.utils import FEATURE_EXTRACTOR_NAME
from trl import ModelConfig

from elm_ecg.configuration_ecg_pretraining import ECGPretrainingConfig
from elm_ecg.configuration_elm import ELMConfig
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS, ecg_encoder_class
from elm_ecg.own_code import own_reference
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.arguments import ELMArguments, RunArguments
from elm_ecg.training.data.schema import as_list
from elm_ecg.training.digest import digest_of_folder
from elm_ecg.training.evaluation.card import with_evaluations
from elm_ecg.training.evaluation.results import results_in, results_of
from elm_ecg.training.llms import resolve_llm
from elm_ecg.training.markdown import CARD, TAGS, citation, environment, make_card, on_hub, public_name, use_of
from elm_ecg.training.pretrain_arguments import PretrainArguments

# the arguments of TRL and PEFT that matter most to a run
TRAINING = ["num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio"]
TRAINING += ["weight_decay", "max_grad_norm", "optim", "bf16", "fp16", "seed"]  # not all are in every version
# how a model was trained (a tag of its card, but for the phase before chats), in words
METHODS = {
    "pretrain": "TRL's `SFTTrainer`, on the reports alone, before any chat.",
    "sft": "TRL's `SFTTrainer`, on the answers alone.",
    "grpo": "TRL's `GRPOTrainer`: reinforcement learning, by rewards of answers that the model writes itself.",
    "dpo": "TRL's `DPOTrainer`, on pairs of a better and a worse answer.",
}
LORA = ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")


def licence_of(folder: str) -> str | None:
    """The licence that the card of a local model names."""
    card = Path(folder) / CARD
    licence = ModelCard.load(card).data.license if card.is_file() else None
    return licence if isinstance(licence, str) else None


def count(data: Any) -> tuple[Any, Any, Any]:
    """Rows, records and patients of a split; `unknown` where the record or patient of a row is, as in the cards of datasets."""
    if not isinstance(data, Dataset):  # an IterableDataset has no length
        return "streamed", "unknown", "unknown"

    def distinct(column: str) -> str:
        if column not in data.column_names:
            return "unknown"
        values = {value for row in data[column][:] for value in as_list(row)}  # a row about several ECGs has a list
        return "unknown" if values & {None, ""} else f"{len(values):,}"

    return f"{len(data):,}", distinct("record_id"), distinct("patient_id")


def _average_rows(args: RunArguments) -> list[tuple[str, Any]]:
    return [] if args.ema_decay is None else [("moving average of the weights", args.ema_decay)]


def _training_rows(args: TrainingArguments, model_args: ModelConfig | None = None) -> list[tuple[str, Any]]:
    """Names and values of the arguments that were in force and say most of a run."""
    rows: list[tuple[str, Any]] = [
        ("batch size", args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)
    ]
    rows.append(("threads of the CPU", torch.get_num_threads()))  # sums of another order end at other weights
    rows += [(f"`{name}`", getattr(args, name)) for name in TRAINING if getattr(args, name, None) is not None]
    if model_args is not None and model_args.use_peft:
        rows += [(f"`{name}`", getattr(model_args, name)) for name in LORA]
    # of these two, the other one had no effect
    idle = "`num_train_epochs`" if args.max_steps > 0 else "`max_steps`"
    return [(name, getattr(value, "value", value)) for name, value in rows if name != idle and value is not False]


def _elm_card(
    kind: str,
    name: str,
    config: ELMConfig,
    processor: ELMProcessor,
    base: str | None,
    tags: tuple[str, ...] = (),
    datasets: list[str] | None = None,
    **facts: Any,
) -> ModelCard:
    """The card of a `model` or an `adapter`; `base` is the Hub id or folder of what it is built on, if known."""
    base_on_hub = base is not None and on_hub(base)
    metadata = ModelCardData(
        license=None if base is None or base_on_hub else licence_of(base),
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        base_model=base if base_on_hub else None,
        datasets=datasets,
        tags=[*TAGS, "elm", *tags],
    )
    unknown = {
        "pretrained_encoder": None,
        "trained": "unknown",
        "data": "unknown",
        "splits": None,
        "training": None,
        "method": None,
    }
    return make_card(
        "model.md",
        metadata,
        kind=kind,
        model_name=name,
        config=config,
        processor=processor,
        base=None if base is None else public_name(base),
        use=use_of(kind, name, takes_ecgs=processor.takes_ecgs),
        environment=environment(),
        citation=citation(name),
        **(unknown | facts),
    )


def write_model_card(
    folder: Path,
    args: ELMArguments,
    training_args: TrainingArguments,
    model_args: ModelConfig,
    config: ELMConfig,
    processor: ELMProcessor,
    splits: Mapping[str, Any],
    method: str = "sft",
    facts: Sequence[tuple[str, Any]] = (),
) -> None:
    """Writes `README.md` into the folder of a trained model or adapter.

    Args:
        splits: the data of each split, None where there was none.
        method: how it was trained, one of `METHODS`.
        facts: names and values of what else was in force.
    """
    encoder = args.encoder_name_or_path if model_args.model_name_or_path is None else None  # else it is in the ELM
    parts = [part for part in args.update if part != "connector" or config.connector is not None]  # some ELMs lack it
    card = _elm_card(
        "adapter" if model_args.use_peft else "model",
        folder.resolve().name,
        config,
        processor,
        model_args.model_name_or_path or resolve_llm(args.llm),
        ("trl", method, "lora") if model_args.use_peft else ("trl", method),
        datasets=[name for name in args.data if on_hub(name)] or None,  # the card links to the Hub alone
        pretrained_encoder=None if encoder is None else public_name(encoder),
        trained=", ".join(parts) + (" (LoRA on the language model)" if model_args.use_peft else ""),
        data=", ".join(f"`{public_name(name)}`" for name in args.data),
        splits=[(split, *count(data)) for split, data in splits.items() if data is not None],
        training=[*facts, *_training_rows(training_args, model_args), *_average_rows(args)],
        method=METHODS["pretrain" if processor.train_phase == "pretrain" else method],
    )
    card.save(folder / CARD)


def elm_card(
    folder: Path,
    config: ELMConfig,
    name: str,
    processor: ELMProcessor,
    llm: str | None = None,
    source: str = "Its folder does not say.",
) -> ModelCard:
    """The card of a model that `elm sft` has not trained, with the scores that are in its folder.

    Args:
        llm: Hub id or folder of the language model within, where it is known.
        source: where the weights are from, in whole sentences.
    """
    card = _elm_card("model", name, config, processor, llm, source=source)
    if not results_in(folder):
        return card
    found = [results for _, results in results_of(folder, digest_of_folder(folder))]
    return ModelCard(with_evaluations(str(card), found, name)) if found else card


def encoder_card(
    folder: Path,
    config: PreTrainedConfig,
    name: str,
    source: str = "Its folder does not say.",
    splits: list[tuple[Any, ...]] | None = None,
    training: list[tuple[str, Any]] | None = None,
    data: list[str] | None = None,
    reads_reports: bool = False,
) -> ModelCard:
    """The card of an ECG encoder, and of its feature extractor where one is in its folder.

    Args:
        config: of the encoder; without `num_leads` and `num_samples`, as somebody's own may be, those of the feature extractor count.
        source: where the weights are from, in whole sentences.
        splits: name, rows, records and patients of each split that it was pretrained on.
        training: names and values of what was in force then.
        data: folders or Hub ids of what it was pretrained on.
        reads_reports: whether it was pretrained on reports too.
    """
    prepares = (folder / FEATURE_EXTRACTOR_NAME).is_file()
    extractor = ECGFeatureExtractor.from_pretrained(folder) if prepares else None
    shape: Any = (getattr(config, "num_leads", None), getattr(config, "num_samples", None))
    if extractor is not None:  # one's own configuration may not say it
        shape = (len(extractor.lead_names), extractor.num_samples)
    encoder_class: Any = ecg_encoder_class(config)
    with torch.device("meta"):  # shapes alone; nothing is computed
        encoder: PreTrainedModel = encoder_class(config)
        tokens = encoder(torch.empty(1, *shape)).last_hidden_state  # [1, tokens, width]
    tags = [*TAGS, "ecg-encoder", config.model_type]
    return make_card(
        "encoder.md",
        ModelCardData(
            library_name="transformers",
            pipeline_tag="feature-extraction",
            tags=tags,
            datasets=[name for name in data or [] if on_hub(name)] or None,  # the card links to the Hub alone
        ),
        model_name=name,
        config=config,
        num_tokens=tokens.shape[1],
        width=tokens.shape[2],
        paper="[{}]({})".format(*config.paper) if config.model_type in ENCODER_MODELS else None,
        own_code=None if config.model_type in ENCODER_MODELS else own_reference(encoder_class),
        num_leads=shape[0],
        num_samples=shape[1],
        parameters=encoder.num_parameters(),
        extractor=extractor,
        source=source,
        data=", ".join(f"`{public_name(name)}`" for name in data or []),
        reads_reports=reads_reports,
        splits=splits,
        training=training,
        use=use_of("encoder", name, num_leads=shape[0], prepares=prepares),
        environment=environment(),
        citation=citation(name, "encoder"),
    )


def write_encoder_card(
    folder: Path,
    name: str,
    config: ECGPretrainingConfig,
    args: PretrainArguments,
    training_args: TrainingArguments,
    splits: Mapping[str, Any],
) -> None:
    """Writes `README.md` into the folder of an encoder that `elm pretrain` has trained.

    Args:
        name: of the run.
        splits: the records of each split, None where there were none.
    """
    begun = "random weights" if args.encoder in ENCODER_MODELS else f"the encoder `{public_name(args.encoder)}`"
    if args.model_name_or_path is not None:
        begun = f"the pretraining model `{public_name(args.model_name_or_path)}`"
    objectives = []
    if "masked" in config.objectives:
        targets = "standardised patches" if config.normalize_targets else "plain values"
        objectives.append(f"masked reconstruction ({config.mask_ratio:.0%} of the patches, {targets})")
    if "contrastive" in config.objectives:
        trained = "trained with it" if args.train_text_encoder else "as it was"
        text = public_name(args.text_encoder) if args.text_encoder else "that of the model"
        objectives.append(f"ECGs against their reports ({config.contrastive_loss}; text encoder `{text}`, {trained})")
    reads_reports = "contrastive" in config.objectives
    learnt_from = "with reports in place of labels" if reads_reports else "without labels"
    source = f"Pretrained by `elm pretrain` from {begun}, {learnt_from}: {' and '.join(objectives)}."
    card = encoder_card(
        folder,
        config.encoder_config,
        name,
        source,
        [(split, *count(data)) for split, data in splits.items() if data is not None],
        [*_training_rows(training_args), *_average_rows(args)],
        list(args.data),
        reads_reports,
    )
    card.save(folder / CARD)
