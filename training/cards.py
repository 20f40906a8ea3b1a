"""The card of a trained ELM, from what the run knows."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from trl import ModelConfig

from configuration_elm import ELMConfig
from processing_elm import ELMProcessor
from training.arguments import ELMArguments
from training.build import resolve_llm

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


def _on_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _shown(name: str) -> str:
    """A local path says nothing to a reader, and may say too much: its last part stands for it."""
    return name if _on_hub(name) else Path(name).name


def evaluation_text(folder: Path) -> str:
    """The scores with and without the ECG, where the model has been evaluated."""
    path = folder / "evaluation_results.json"
    if not path.is_file():
        return "Not evaluated yet: run `elm evaluate` on it."
    results: dict[str, Any] = json.loads(path.read_text())
    rows = [f"| {name} | {100 * row['exact_match']:.1f} |" for name, row in results["conditions"].items()]
    return "\n".join(["| ECG | exact match, % |", "| --- | --- |", *rows])


def write_model_card(
    folder: Path, args: ELMArguments, model_args: ModelConfig, config: ELMConfig, processor: ELMProcessor
) -> None:
    """Writes `README.md` into the folder of a trained model or adapter."""
    llm = resolve_llm(args.llm)
    adapter = model_args.use_peft
    ecg_path = {
        "llava": f"`{config.encoder_config.model_type}` encoder, `{config.connector}` connector"
        if config.encoder_config is not None
        else "",
        "fuyu": f"`{config.connector}` connector, no encoder",
        "text": "none: the model reads no ECG",
    }[config.architecture]
    auto_class = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    extractor = processor.feature_extractor
    card_data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=llm if _on_hub(llm) else None,
        datasets=[name for name in args.data if _on_hub(name)] or None,
        tags=["ecg", "electrocardiogram", "elm", "trl", "sft", *(["lora"] if adapter else [])],
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATES / "model.md"),
        model_name=folder.resolve().name,
        llm=_shown(llm),
        ecg_path=ecg_path,
        num_leads=len(extractor.lead_names),
        num_samples=extractor.num_samples,
        sampling_rate=extractor.sampling_rate,
        normalization=extractor.normalization,
        num_ecg_tokens=processor.num_ecg_tokens,
        trained=", ".join(args.update) + (" (LoRA on the language model)" if adapter else ""),
        data=", ".join(f"`{_shown(name)}`" for name in args.data),
        snippet=SNIPPET.format(
            name=folder.resolve().name,
            library="peft" if adapter else "transformers",
            auto_class=auto_class,
            load=(LOAD_ADAPTER if adapter else LOAD_MODEL).format(name=folder.resolve().name),
        ),
        evaluation=evaluation_text(folder),
    )
    card.save(folder / "README.md")
