"""Cards of ELMs, adapters and ECG encoders, from what their runs and folders know."""

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel
from trl import ModelConfig, SFTConfig

from elm_ecg.configuration_elm import ELMConfig
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.arguments import ELMArguments
from elm_ecg.training.build import resolve_llm
from elm_ecg.training.evaluation.scores import with_interval
from elm_ecg.training.files import resource, write_text

TEMPLATES = resource("model_cards")
CARD = "README.md"
SAMPLE = "sample_ecg.npz"
PREPROCESSOR = "preprocessor_config.json"
CITATION = "@misc{elm,"
TAGS = ["ecg", "electrocardiogram"]
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "elm-ecg")
EVALUATION = "What it says without the ECG"
CITED = {"model": "an ECG-language model", "adapter": "an ECG-language model", "encoder": "an ECG encoder"}
CITED |= {"tokenizer": "an ECG-Byte tokenizer", "dataset": "questions and answers about ECGs"}
NOT_EVALUATED = "Not evaluated yet: run `elm evaluate` on it."
# of TRL's and PEFT's arguments those that say most of a run
TRAINING = ["num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio"]
TRAINING += ["weight_decay", "max_grad_norm", "optim", "bf16", "fp16", "seed"]
LORA = ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")

CHAT = """\
chat = [{{"role": "user", "content": [{ecg_part}{{"type": "text", "text": "What is the rhythm?"}}]}}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])"""


def on_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def shown(name: str) -> str:
    """A local path says nothing to a reader, and may say too much: its last part stands for it."""
    return name if on_hub(name) else Path(name).name


def use_of(
    kind: str,
    name: str,
    revision: str | None = None,
    *,
    takes_ecgs: bool = True,
    prepares: bool = False,
    num_leads: int = 12,
    split: str = "train",
) -> str:
    """How to load what the card is about: code in Markdown.

    Args:
        kind: `model`, `adapter`, `encoder`, `tokenizer` or `dataset`.
        name: of a local folder (not of a tokenizer), or with a `revision` of a repo on the Hub, which holds a simulated ECG beside.
        takes_ecgs: of a model or adapter, whether it does.
        prepares: of an encoder, whether its feature extractor is there.
        num_leads: of an encoder.
        split: of a dataset, one that it has.
    """
    local = revision is None
    pin = "" if local else ", revision=revision"
    names = f'name = "{name}"' if local else f'name, revision = "{name}", "{revision}"'
    download = f'hf_hub_download(name, "{SAMPLE}"{pin})'
    imports = [] if local or not takes_ecgs else ["from huggingface_hub import hf_hub_download"]
    trust = f"name{pin}, trust_remote_code=True"
    sample = f"ecg = {download}  # simulated sinus rhythm; yours: its file, or " if not local else "ecg = "
    sample += '{"array": array, "sampling_rate": 500, "unit": "mV"}' + ("  # [leads, samples]" if local else "")
    lines: list[str]
    if kind == "dataset":
        pin = "" if local else f', revision="{revision}"'
        lines = ["from datasets import load_dataset", "", f'data = load_dataset("{name}"{pin}, split="{split}")']
        lines += ['print(data[0]["messages"])', "```", "", "```bash", f"elm data check {name}"]
        lines += [f"elm sft --data {name} --llm qwen2.5-0.5b-instruct --output_dir runs/my_elm"]
        lines += [f"elm evaluate runs/my_elm --data {name}"]
    elif kind == "encoder" and prepares:
        lines = [*imports, "from transformers import AutoFeatureExtractor, AutoModel", "", names]
        lines += [f"feature_extractor = AutoFeatureExtractor.from_pretrained({trust})"]
        lines += [f"encoder = AutoModel.from_pretrained({trust}).eval()"]
        lines += [sample, 'ecg_values = feature_extractor(ecg, return_tensors="pt")["ecg_values"]']
        lines += ["print(encoder(ecg_values).last_hidden_state.shape)"]
    elif kind == "encoder":
        values = (
            f"torch.zeros(1, {num_leads}, encoder.config.num_samples)"
            if local
            else f'torch.from_numpy(np.load({download})["array"] / 1000).float()[None]'
        )
        lines = [*(["import numpy as np"] if not local else []), "import torch", *imports]
        lines += ["from transformers import AutoModel", "", names]
        lines += [f"encoder = AutoModel.from_pretrained({trust}).eval()"]
        lines += [f"ecg_values = {values}  # [ECGs, leads, samples]"]
        lines += ["print(encoder(ecg_values).last_hidden_state.shape)"]
    elif kind == "tokenizer":
        lines = ["import numpy as np", *imports]
        lines += ["from transformers.dynamic_module_utils import get_class_from_dynamic_module", "", names]
        lines += [
            f'ECGByteTokenizer = get_class_from_dynamic_module("tokenization_ecg_byte.ECGByteTokenizer", name{pin})'
        ]
        lines += [f"tokenizer = ECGByteTokenizer.from_pretrained(name{pin})"]
        lines += [
            f'ecg = np.load({download})["array"] / 1000  # simulated sinus rhythm; [leads, samples] in millivolts'
        ]
        lines += ["ids = tokenizer.encode(ecg)"]
        lines += ["again = tokenizer.decode(ids, *tokenizer.value_range(ecg), num_leads=len(ecg))"]
    else:
        auto_class = "AutoPeftModelForCausalLM" if kind == "adapter" else "AutoModelForCausalLM"
        of_transformers = "AutoProcessor" if kind == "adapter" else "AutoModelForCausalLM, AutoProcessor"
        lines = [*imports, *([f"from peft import {auto_class}"] if kind == "adapter" else [])]
        lines += [f"from transformers import {of_transformers}", "", names]
        lines += [f"processor = AutoProcessor.from_pretrained({trust})"]
        lines += [f"model = {auto_class}.from_pretrained({trust})"]
        lines += [sample] if takes_ecgs else []
        place = "ecg" if local else "path"
        lines += CHAT.format(ecg_part=f'{{"type": "ecg", "{place}": ecg}}, ' if takes_ecgs else "").splitlines()
    text = "```python\n" + "\n".join(lines) + "\n```"
    if kind == "model" and takes_ecgs and not local:
        text += "\n\nOr, of a file and a question:\n\n```python\n" + "\n".join(
            [
                *imports,
                "from transformers import pipeline",
                "",
                names,
                f'pipe = pipeline("ecg-question-answering", model={trust})',
                f'print(pipe({{"ecg": {download}, "question": "What is the rhythm?"}}))',
            ]
        )
        text += "\n```"
    return text


def replace_section(text: str, heading: str, body: str) -> str:
    """The card's text with another body of the section `## heading`; as it was where it has none."""
    section = re.compile(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    return (
        section.sub(lambda _: f"## {heading}\n\n{body}\n\n", text, count=1).rstrip("\n") + "\n"
        if section.search(text)
        else text
    )


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def representation_of(processor: ELMProcessor) -> str:
    """What the model is shown of an ECG, in words."""
    extractor, image_processor = processor.feature_extractor, processor.image_processor
    if image_processor is None:
        return f"`{processor.representation}`" if processor.takes_ecgs else "none"
    if processor.representation == "stacked_signal":
        low, high = image_processor.value_range
        return f"`stacked_signal`: a grey picture of leads x samples, black at {low:g} and white at {high:g}"
    paper = image_processor.paper
    height, width = image_processor.image_size(extractor.lead_names, extractor.num_samples / extractor.sampling_rate)
    return (
        f"`rgb`: a drawing on ECG paper, layout {paper.layout}, {paper.speed:g} mm/s, {paper.gain:g} mm/mV, {width} x {height} "
        "pixels"
    )


def environment(packages: tuple[str, ...] = PACKAGES) -> str:
    """The versions of the packages, each a row."""
    return table(("package", "version"), [(name, version(name)) for name in packages])


def citation(title: str, kind: str = "model", url: str | None = None) -> str:
    lines = [
        CITATION,
        f"  title = {{{title}: {CITED[kind]}}},",
        f"  howpublished = {{{url or 'Hugging Face Hub'}}},",
    ]
    others = (
        "its sources, as they ask for it above"
        if kind == "dataset"
        else "the papers of its parts and the sources of its data"
    )
    return "```bibtex\n" + "\n".join([*lines, "}"]) + f"\n```\n\nAnd {others}."


def licence_of(folder: str) -> str | None:
    """What the card of a local model says of its licence."""
    card = Path(folder) / CARD
    licence = ModelCard.load(card).data.license if card.is_file() else None
    return licence if isinstance(licence, str) else None


def count(data: Any) -> tuple[Any, Any, Any]:
    """Rows, records and patients of a split, as far as they can be known."""
    if not isinstance(data, Dataset):
        return "streamed", "unknown", "unknown"

    def distinct(column: str) -> str:
        if column not in data.column_names:
            return "unknown"
        values = [row if isinstance(row, list) else [row] for row in data[column][:]]
        return f"{len({value for row in values for value in row if value not in (None, '')}):,}"

    return f"{len(data):,}", distinct("record_id"), distinct("patient_id")


def add_evaluation(folder: Path, results: Mapping[str, Any]) -> None:
    """Writes the scores with and without the ECG into the card of `folder`, if it has one with a place for them.

    Args:
        results: what `evaluation_results.json` holds.
    """
    path = folder / CARD
    if path.is_file():
        write_text(path, with_evaluation(path.read_text(encoding="utf-8"), results, folder.resolve().name))


def with_evaluation(text: str, results: Mapping[str, Any], model_name: str) -> str:
    """A card with the scores, in its text and its metadata; as it was if it has no place for them."""
    if f"## {EVALUATION}\n" not in text:
        return text
    if not {"conditions", "data", "verdict"} <= results.keys():
        raise ValueError("evaluation_results.json has no scores of `elm evaluate`; write it anew.")
    conditions, data = results["conditions"], results["data"]
    metrics = list(dict.fromkeys(name for row in conditions.values() for name in row["metrics"]))
    rows = [
        (name, *(with_interval(row["metrics"][metric]) if metric in row["metrics"] else "" for metric in metrics))
        for name, row in conditions.items()
    ]
    split = f"split `{data['split']}`" + ("" if data.get("fold") is None else f" of fold {data['fold']}")
    sources = ", ".join(f"`{name}`" for name in data["names"])
    number = ", ".join(
        f"{results[key]:,} {key.removeprefix('num_')}" for key in ("num_questions", "num_patients") if key in results
    )
    lines = [f"{results['verdict']}\n", table(("ECG", *(name.replace("_", " ") for name in metrics)), rows)]
    lines += [f"\nIn percent, with 95% intervals by patient; {sources}, {split}{': ' + number if number else ''}."]
    if "most_frequent" in conditions:
        lines += ["`most_frequent` is the commonest answer to each question in training, without any model."]
    card = ModelCard(replace_section(text, EVALUATION, "\n".join(lines)))
    name = " + ".join(data["names"])
    metadata: Any = card.data
    metadata.model_name = metadata.model_name or model_name
    metadata.metrics = metrics
    metadata.eval_results = [
        EvalResult(
            task_type="question-answering",
            task_name="ECG question answering",
            dataset_type=name.replace(" ", ""),
            dataset_name=name,
            dataset_split=data["split"],
            dataset_args=None if data.get("fold") is None else {"fold": data["fold"]},
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=row["value"],
        )
        for metric, row in conditions["ecg"]["metrics"].items()
        if row["value"] is not None
    ]
    return str(card)


def _parts(config: ELMConfig, processor: ELMProcessor, source: str = "") -> dict[str, Any]:
    """What model and processor say of themselves, for the templates."""
    encoder, extractor = config.encoder_config, processor.feature_extractor
    ecg_path = {
        "llava": f"`{encoder.model_type}` encoder{source}, `{config.connector}` connector"
        if isinstance(encoder, PreTrainedConfig)
        else "",
        "fuyu": f"`{config.connector}` connector, no encoder",
        "text": "none: the model reads no ECG",
    }[config.architecture]
    num_ecg_tokens, normalization = str(processor.num_ecg_tokens), extractor.normalization
    if processor.ecg_tokenizer is not None:
        millivolts = processor.ecg_tokenizer.millivolt_range
        normalization = "minmax" if millivolts is None else f"{millivolts[0]:g} to {millivolts[1]:g} mV"
        num_ecg_tokens = "as many as its signal needs"
        ecg_path = f"ECG-Byte tokens in the text, {processor.ecg_tokenizer.vocab_size:,} of them in the vocabulary"
    return {
        "representation": representation_of(processor),
        "ecg_path": ecg_path,
        "num_leads": len(extractor.lead_names),
        "num_samples": extractor.num_samples,
        "sampling_rate": f"{extractor.sampling_rate:g}",
        "normalization": normalization,
        "num_ecg_tokens": num_ecg_tokens,
    }


def _training(args: SFTConfig, model_args: ModelConfig) -> str:
    rows: list[tuple[str, Any]] = [
        ("batch size", args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)
    ]
    rows += [(f"`{name}`", getattr(args, name)) for name in TRAINING if getattr(args, name, None) is not None]
    if model_args.use_peft:
        rows += [(f"`{name}`", getattr(model_args, name)) for name in LORA]
    idle = "`num_train_epochs`" if args.max_steps > 0 else "`max_steps`"
    rows = [(name, value) for name, value in rows if name != idle and value is not False]
    return "TRL's `SFTTrainer`, on the answers alone.\n\n" + table(
        ("argument", ""), [(name, getattr(value, "value", value)) for name, value in rows]
    )


def write_model_card(
    folder: Path,
    args: ELMArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    config: ELMConfig,
    processor: ELMProcessor,
    splits: Mapping[str, Any],
) -> None:
    """Writes `README.md` into the folder of a trained model or adapter.

    Args:
        splits: the data of each split, None where there was none.
    """
    start = model_args.model_name_or_path or resolve_llm(args.llm)
    adapter = model_args.use_peft
    pretrained = args.encoder_name_or_path if model_args.model_name_or_path is None else None
    name = folder.resolve().name
    card_data = ModelCardData(
        license=None if on_hub(start) else licence_of(start),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=start if on_hub(start) else None,
        datasets=[name for name in args.data if on_hub(name)] or None,
        tags=[*TAGS, "elm", "trl", "sft", *(["lora"] if adapter else [])],
    )
    counts = [(split, *count(data)) for split, data in splits.items() if data is not None]
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATES / ("adapter.md" if adapter else "model.md")),
        model_name=name,
        start=f"`{shown(start)}`",
        trained=", ".join(part for part in args.update if part != "connector" or config.connector is not None)
        + (" (LoRA on the language model)" if adapter else ""),
        data=", ".join(f"`{shown(name)}`" for name in args.data),
        use=use_of("adapter" if adapter else "model", name, takes_ecgs=processor.takes_ecgs),
        evaluation=NOT_EVALUATED,
        splits=table(("split", "rows", "records", "patients"), counts),
        training=_training(training_args, model_args),
        environment=environment(),
        citation=citation(name),
        **_parts(config, processor, "" if pretrained is None else f" of `{shown(pretrained)}`"),
    )
    card.save(folder / CARD)


def folder_card(
    folder: Path,
    kind: str,
    config: PreTrainedConfig,
    name: str,
    processor: Any = None,
    llm: str | None = None,
    source: str = "Its folder does not say.",
) -> ModelCard:
    """The card of a model or encoder that `elm sft` has not trained.

    Args:
        llm: Hub id or folder of the language model within, where it is known.
        source: where the weights are from, in whole sentences.
    """
    shared = {"model_name": name, "environment": environment(), "citation": citation(name, kind)}
    if kind == "encoder":
        assert isinstance(config.num_leads, int)
        with torch.device("meta"):
            encoder: PreTrainedModel = ENCODER_MODELS[config.model_type](config)
            tokens = encoder(torch.empty(1, config.num_leads, config.num_samples)).last_hidden_state
        paper, url = config.paper
        prepares = (folder / PREPROCESSOR).is_file()
        ecg_input = f"{config.num_leads} leads, {config.num_samples} samples, in millivolts or as its training data were normalised"
        if prepares:
            extractor = ECGFeatureExtractor.from_pretrained(folder)
            ecg_input = (
                f"{', '.join(extractor.lead_names)}; {extractor.num_samples} samples at {extractor.sampling_rate:g} Hz, normalisation "
                f"`{extractor.normalization}`: what its feature extractor makes of a record"
            )
        return ModelCard.from_template(
            ModelCardData(
                library_name="transformers",
                pipeline_tag="feature-extraction",
                tags=[*TAGS, "ecg-encoder", config.model_type],
            ),
            template_path=str(TEMPLATES / "encoder.md"),
            num_tokens=tokens.shape[1],
            width=tokens.shape[2],
            num_leads=config.num_leads,
            ecg_input=ecg_input,
            model_type=config.model_type,
            paper=f"[{paper}]({url})",
            parameters=f"{encoder.num_parameters():,}",
            weights=source,
            use=use_of("encoder", name, num_leads=config.num_leads, prepares=prepares),
            **shared,
        )
    assert isinstance(config, ELMConfig)
    text_config = config.text_config
    assert isinstance(text_config, PreTrainedConfig)
    card = ModelCard.from_template(
        ModelCardData(
            license=None if llm is None or on_hub(llm) else licence_of(llm),
            library_name="transformers",
            pipeline_tag="text-generation",
            base_model=llm if llm is not None and on_hub(llm) else None,
            tags=[*TAGS, "elm"],
        ),
        template_path=str(TEMPLATES / "model.md"),
        start=f"a `{text_config.model_type}` language model" if llm is None else f"`{shown(llm)}`",
        trained="unknown",
        data="unknown",
        use=use_of("model", name, takes_ecgs=processor.takes_ecgs),
        evaluation=NOT_EVALUATED,
        splits="Unknown.",
        training=source,
        **shared,
        **_parts(config, processor),
    )
    results = folder / "evaluation_results.json"
    if results.is_file():
        return ModelCard(with_evaluation(str(card), json.loads(results.read_text(encoding="utf-8")), name))
    return card
