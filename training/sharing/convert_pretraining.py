"""Pretraining checkpoints of the reference system become `ECGForPreTraining`, the encoder with its decoder or its heads."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.configuration_ecg_pretraining import ECGPretrainingConfig
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.modeling_ecg_pretraining import ECGForPreTraining
from elm_ecg.training.encoders import load_text_encoder
from elm_ecg.training.sharing.checkpoint_keys import convert_pretraining_part, count_indices
from elm_ecg.training.sharing.checkpoints import Checkpoint, Conversion
from elm_ecg.training.sharing.convert_arguments import ConvertArguments
from elm_ecg.training.sharing.convert_models import (
    check_encoder_options,
    check_missing,
    check_tensors,
    encoder_fields,
    extractor_of,
    plain_copies,
    widest_dtype,
)

TEXT_PREFIX = "text_encoder."
# of each pretraining: weights that tell that a checkpoint is of one, and its sizes
MATRICES = {
    "merl": ["heads.projection.weight"],
    "mlae": ["decoder.head.weight"],
    "mtae": ["decoder.head.weight"],
    "st_mem": ["decoder.projection.weight", "decoder.layers.0.attention.out_proj.weight"],
}


def _of(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _pretraining_fields(args: ConvertArguments, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of the pretraining's configuration that the shapes of its converted weights tell."""
    if args.encoder == "merl":
        args.assumed.append(
            f"the text encoder's output is pooled as --text_pooling {args.text_pooling} says; temperature 0.07"
        )
        size = tensors["heads.projection.weight"].shape[0]
        return {"objectives": ["contrastive"], "text_pooling": args.text_pooling, "projection_size": size}
    targets = "as they are" if args.encoder == "mlae" else "standardised patch by patch"
    args.assumed.append(f"75% of the patches masked, targets {targets}, the reference's defaults")
    if args.encoder != "st_mem":  # the decoder is the encoder's own
        return {"objectives": ["masked"]}
    head_dim = args.encoder_fields.get("head_dim", 64)
    return {
        "objectives": ["masked"],
        "decoder_hidden_size": tensors["decoder.projection.weight"].shape[0],
        "decoder_num_hidden_layers": count_indices(tensors, r"decoder\.layers\.(\d+)\."),
        "decoder_num_attention_heads": tensors["decoder.layers.0.attention.out_proj.weight"].shape[1] // head_dim,
    }


def _check_sizes_are_told(kind: str, conversion: Conversion) -> None:
    """ValueError if the checkpoint lacks a weight that tells a size, or has one of another shape."""
    for name in MATRICES[kind]:
        tensor = conversion.tensors.get(name)
        if tensor is None:
            raise ValueError(
                f"The checkpoint has no entry for {name}, which the pretraining of {kind} needs; of a checkpoint that holds the encoder "
                "alone, leave --pretraining out."
            )
        if tensor.ndim != 2 or not tensor.numel():
            raise ValueError(f"{name} is {list(tensor.shape)}; expected two dimensions, none of them empty.")


def _sort_by_need(conversion: Conversion, model: ECGForPreTraining, text_encoder: str | None) -> None:
    """What the model does not have is left over, and what nothing gives is missing; the text encoder has weights of its own."""
    expected = model.state_dict().keys()
    for entry, ours in list(conversion.used.items()):
        if ours in expected:
            continue
        del conversion.used[entry]
        conversion.tensors.pop(ours, None)
        if ours.startswith((f"{TEXT_PREFIX}pooler.", f"{TEXT_PREFIX}embeddings.position_ids")):
            conversion.ignored[entry] = f"of the text encoder, and not read (--text_encoder {text_encoder})"
        else:
            conversion.left_over.append(entry)
    missing = expected - conversion.tensors.keys()
    conversion.missing = sorted(name for name in missing if not name.startswith(TEXT_PREFIX))


def convert_pretraining(
    args: ConvertArguments, checkpoint: Checkpoint
) -> tuple[ECGForPreTraining, ECGFeatureExtractor, PreTrainedTokenizerBase | None, Conversion]:
    """The pretraining model of a checkpoint, what prepares its records, and the tokenizer of its reports, if it reads any.

    Raises:
        ValueError: the options do not fit the checkpoint, or something is missing.
    """
    check_encoder_options(args)
    kind = str(args.encoder)
    conversion = convert_pretraining_part(kind, checkpoint.tensors)
    check_missing(conversion, f"a {kind} encoder")
    _check_sizes_are_told(kind, conversion)
    encoder_config = ENCODER_CONFIGS[kind](**encoder_fields(args, _of("encoder.", conversion.tensors)))
    text_encoder, tokenizer = (None, None) if args.text_encoder is None else load_text_encoder(args.text_encoder)
    config = ECGPretrainingConfig(
        encoder_config=encoder_config,
        text_config=None if text_encoder is None else text_encoder.config,
        **_pretraining_fields(args, conversion.tensors),
    )
    with torch.device("meta"):  # no memory for weights that are replaced at once
        model = ECGForPreTraining(config, text_encoder=text_encoder)
    _sort_by_need(conversion, model, args.text_encoder)
    check_missing(conversion, f"the pretraining of {kind}")
    check_tensors(conversion.tensors, model, "--encoder, --encoder_config, --num_samples and --text_encoder")
    dtype = widest_dtype(args, conversion.tensors)
    if text_encoder is not None:
        text_encoder.to(dtype)
        whole = {f"{TEXT_PREFIX}{name}" for name in text_encoder.state_dict()} <= conversion.tensors.keys()
        args.assumed += [] if whole else [f"the text encoder is {args.text_encoder} as it is there"]
    model.load_state_dict(
        plain_copies(conversion.tensors, dtype), assign=True, strict=False
    )  # what is missing was checked
    return model.eval(), extractor_of(args), tokenizer, conversion
