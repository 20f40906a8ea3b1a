"""The card of a trained ELM, from what the run knows."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig
from trl import ModelConfig

from configuration_elm import ELMConfig
from processing_elm import ELMProcessor
from training.arguments import ELMArguments
from training.build import resolve_llm
from training.files import write_text

TEMPLATES = Path(__file__).resolve().parents[1] / "model_cards"

LOAD_MODEL = """\
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)"""
LOAD_ADAPTER = """\
model = AutoPeftModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)"""
SNIPPET = """\
from {library} import {auto_class}
from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
{load}
ecg = {{"array": array, "sampling_rate": 500, "unit": "mV"}}  # [leads, samples]
chat = [{{"role": "user", "content": [{{"type": "ecg", "ecg": ecg}}, {{"type": "text", "text": "What is the rhythm?"}}]}}]
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


def add_evaluation(folder: Path, results: dict[str, Any]) -> None:
    """Writes the scores with and without the ECG into the card of `folder`, if it has one with a place for them."""
    path = folder / "README.md"
    if not path.is_file():
        return
    head, heading, rest = path.read_text(encoding="utf-8").partition("## What it says without the ECG\n")
    _, next_heading, tail = rest.partition("\n## ")
    rows = [f"| {name} | {100 * row['exact_match']:.1f} |" for name, row in results["conditions"].items()]
    table = "\n".join(["| ECG | exact match, % |", "| --- | --- |", *rows])
    if heading:
        write_text(path, f"{head}{heading}\n{table}\n{next_heading}{tail}")


def write_model_card(
    folder: Path, args: ELMArguments, model_args: ModelConfig, config: ELMConfig, processor: ELMProcessor
) -> None:
    """Writes `README.md` into the folder of a trained model or adapter."""
    start = model_args.model_name_or_path or resolve_llm(args.llm)
    adapter = model_args.use_peft
    encoder = config.encoder_config
    pretrained = args.encoder_name_or_path if model_args.model_name_or_path is None else None
    source = "" if pretrained is None else f" of `{shown(pretrained)}`"
    ecg_path = {
        "llava": f"`{encoder.model_type}` encoder{source}, `{config.connector}` connector"
        if isinstance(encoder, PreTrainedConfig)
        else "",
        "fuyu": f"`{config.connector}` connector, no encoder",
        "text": "none: the model reads no ECG",
    }[config.architecture]
    extractor = processor.feature_extractor
    num_ecg_tokens, normalization = str(processor.num_ecg_tokens), extractor.normalization
    if processor.ecg_tokenizer is not None:
        millivolts = processor.ecg_tokenizer.millivolt_range
        normalization = "minmax" if millivolts is None else f"{millivolts[0]:g} to {millivolts[1]:g} mV"
        num_ecg_tokens = "as many as its signal needs"
        ecg_path = f"ECG-Byte tokens in the text, {processor.ecg_tokenizer.vocab_size:,} of them in the vocabulary"
    auto_class = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    card_data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=start if on_hub(start) else None,
        datasets=[name for name in args.data if on_hub(name)] or None,
        tags=["ecg", "electrocardiogram", "elm", "trl", "sft", *(["lora"] if adapter else [])],
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATES / "model.md"),
        model_name=folder.resolve().name,
        start=shown(start),
        representation=representation_of(processor),
        ecg_path=ecg_path,
        num_leads=len(extractor.lead_names),
        num_samples=extractor.num_samples,
        sampling_rate=f"{extractor.sampling_rate:g}",
        normalization=normalization,
        num_ecg_tokens=num_ecg_tokens,
        trained=", ".join(part for part in args.update if part != "connector" or config.connector is not None)
        + (" (LoRA on the language model)" if adapter else ""),
        data=", ".join(f"`{shown(name)}`" for name in args.data),
        snippet=SNIPPET.format(
            name=folder.resolve().name,
            library="peft" if adapter else "transformers",
            auto_class=auto_class,
            load=(LOAD_ADAPTER if adapter else LOAD_MODEL).format(name=folder.resolve().name),
        ),
        evaluation="Not evaluated yet: run `elm evaluate` on it.",
    )
    card.save(folder / "README.md")
