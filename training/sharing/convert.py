"""`elm convert`: checkpoints of the reference system (ELM-Research/ELM) become folders that from_pretrained loads."""

import json
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from elm_ecg.configuration_elm import ELMConfig
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.modeling_ecg_pretraining import ECGForPreTraining
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.command_line import printable
from elm_ecg.training.files import check_output_folder, new_folder, write_text
from elm_ecg.training.llms import resolve_llm
from elm_ecg.training.markdown import CARD
from elm_ecg.training.model_files import ENCODER_FOLDER
from elm_ecg.training.parser import ELMParser
from elm_ecg.training.sharing.cards import elm_card, encoder_card
from elm_ecg.training.sharing.checkpoint_keys import convert_state_dict as convert_state_dict
from elm_ecg.training.sharing.checkpoints import Checkpoint, read_checkpoint
from elm_ecg.training.sharing.convert_arguments import ConvertArguments
from elm_ecg.training.sharing.convert_models import convert_elm, convert_encoder, llm_prefix_of
from elm_ecg.training.sharing.convert_pretraining import convert_pretraining


def card_of(
    folder: Path,
    args: ConvertArguments,
    checkpoint: str,
    config: PreTrainedConfig,
    preparation: ELMProcessor | ECGFeatureExtractor,
) -> ModelCard:
    """The card of what was converted, with what was assumed."""
    name = Path(args.output_dir).absolute().name
    source = f"Converted by `elm convert` from `{checkpoint}`, a checkpoint of ELM-Research/ELM, which does not say how it was trained."
    if not isinstance(preparation, ELMProcessor):
        return encoder_card(folder, config, name, source)
    assumed = "".join(f"\n- {line}" for line in args.assumed)
    source += f" Assumed were:\n{assumed}" if assumed else ""
    assert isinstance(config, ELMConfig)
    return elm_card(folder, config, name, preparation, resolve_llm(args.llm), source)


def weights_of(checkpoint: Checkpoint) -> str:
    """Which of the weights in a checkpoint are taken."""
    if checkpoint.average is None:
        return "the model's own, there is no moving average"
    if checkpoint.is_average:
        return f"the moving average, {checkpoint.average}; --weights model takes the model's own"
    return f"the model's own, not the moving average, {checkpoint.average}"


def parse(argv: list[str] | None = None) -> tuple[Path, ConvertArguments]:
    """The path of the checkpoint, and the options."""
    parser = ELMParser(
        ConvertArguments,
        prog="elm convert",
        description="A checkpoint of ELM-Research/ELM as a folder that from_pretrained loads.",
    )
    parser.add_argument("checkpoint", type=Path, help=".pt or .safetensors of a whole ELM, or of an ECG encoder alone")
    args, checkpoint_args = parser.parse_args_and_config(argv)
    return checkpoint_args.checkpoint, args


def main(argv: list[str] | None = None) -> None:
    """Runs `elm convert`."""
    path, args = parse(argv)
    output_dir = Path(args.output_dir).absolute()
    check_output_folder(output_dir, new=True)
    checkpoint = read_checkpoint(path, args.weights)
    model: PreTrainedModel
    preparation: ELMProcessor | ECGFeatureExtractor
    tokenizer: PreTrainedTokenizerBase | None = None
    if llm_prefix_of(checkpoint.tensors):
        if args.pretraining:
            raise ValueError("--pretraining, and the checkpoint is of a whole ELM; leave the option out.")
        model, preparation, conversion = convert_elm(args, checkpoint)
    elif args.pretraining:
        model, preparation, tokenizer, conversion = convert_pretraining(args, checkpoint)
    else:
        model, preparation, conversion = convert_encoder(args, checkpoint)
    missing = sorted(model.state_dict().keys() - conversion.tensors.keys())  # any that is needed has raised before
    names = checkpoint.names
    left_over = sorted(names[key] for key in conversion.left_over)
    report = {
        "checkpoint": path.name,
        "weights": weights_of(checkpoint),
        "not_weights": checkpoint.others,
        "assumed": args.assumed,
        "left_over": left_over,
        "missing": missing,
        "ignored": {names[key]: why for key, why in conversion.ignored.items()},
        "used": {names[key]: ours for key, ours in conversion.used.items()},
    }
    with new_folder(output_dir) as folder:  # takes its place only when all is written
        model.save_pretrained(folder)
        preparation.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        shared = folder
        if isinstance(model, ECGForPreTraining):  # the card is that of the encoder, which others use
            model, shared = model.encoder, folder / ENCODER_FOLDER
            model.save_pretrained(shared)
            preparation.save_pretrained(shared)
        card_of(shared, args, path.name, model.config, preparation).save(shared / CARD)
        write_text(folder / "conversion.json", json.dumps(report, indent=2) + "\n")
    num_used, num_ignored = len(conversion.used), len(conversion.ignored)
    print(f"{len(names):,} entries: {num_used:,} used, {num_ignored:,} not needed, {len(missing)} missing")
    for title, lines in (
        ("Weights", [report["weights"]]),
        ("Not needed", sorted(set(conversion.ignored.values()))),
        ("Not weights, left out", checkpoint.others),
        ("Left over, unknown", left_over[:10]),
        ("Missing and not needed, as in the base model", missing[:10]),
        ("Assumed", args.assumed),
    ):
        for line in lines:
            print(printable(f"{title}: {line}"))
    print(f"Saved to {output_dir}; every key is in its conversion.json", flush=True)
