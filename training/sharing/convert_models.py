"""Checkpoints of the reference system (ELM-Research/ELM) become our models: ECG encoders, and whole ELMs."""

import re
from collections.abc import Collection
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.configuration_elm import IMAGE_REPRESENTATIONS
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.modeling_common import some_of
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.tokenization_ecg_byte import ECGByteTokenizer
from elm_ecg.training.build import build_model, build_processor
from elm_ecg.training.chat_templates import family_template
from elm_ecg.training.sharing.checkpoint_keys import PRETRAINING_RULES, convert_part, count_indices
from elm_ecg.training.sharing.checkpoints import Checkpoint, Conversion, merge_lora
from elm_ecg.training.sharing.convert_arguments import ConvertArguments
from elm_ecg.training.sharing.ecg_byte_import import read_reference_tokenizer
from elm_ecg.training.sharing.vocabulary import fit_vocabulary

# of the names of weights in a whole ELM of the reference; symbolic ones hold the language model without a wrapper
LLM_PREFIXES, PEFT_PREFIX, ENCODER_PREFIX = ("llm.llm.", "llm."), "base_model.model.", "encoder."
CONNECTOR_PREFIXES = {"llava": "projection.", "fuyu": "project_layer."}
# weights of vision models that their towers do not have, and why
NOT_OF_THE_TOWER = {
    r"text_model\.|text_projection\.|logit_scale$|logit_bias$": "of the text tower",
    r"visual_projection\.": "of the embedding, and this ELM reads patches",
    r"decoder\.|.*mask_token$": "of the masked pretraining",
    r".*position_ids$": "a constant",
}


def _state_dict_of(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def llm_prefix_of(tensors: Collection[str]) -> str:
    """What the names of the language model's weights begin with; empty where there are none."""
    return next((prefix for prefix in LLM_PREFIXES if any(key.startswith(prefix) for key in tensors)), "")


def encoder_fields(args: ConvertArguments, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of the encoder's configuration that the shapes of its converted weights tell.

    `--encoder_config` gives the others, such as `head_dim`, which is 64 in the reference.

    Raises:
        ValueError: the leads or samples of the options are not those of the weights.
    """
    kind, shape = str(args.encoder), {name: tensor.shape for name, tensor in tensors.items()}
    with torch.device("meta"):
        default = ENCODER_MODELS[kind](ENCODER_CONFIGS[kind]()).state_dict()  # only numbers of dimensions count here
    for name in shape.keys() & default.keys():
        if len(shape[name]) != default[name].ndim or 0 in shape[name]:
            raise ValueError(
                f"{name} of the {kind} weights is {list(shape[name])}; expected {default[name].ndim} dimensions, none of them empty."
            )
    assert args.lead_names is not None  # set with the arguments
    num_leads, num_samples = len(args.lead_names), args.num_samples
    sizes: dict[str, Any]
    if kind == "merl":
        num_leads = shape["stem.conv.weight"][1]  # [width, leads, kernel]
        stages = range(count_indices(shape, r"stages\.(\d+)\."))
        sizes = {
            "block": "bottleneck" if "stages.0.0.convs.2.conv.weight" in shape else "basic",
            "depths": [count_indices(shape, rf"stages\.{stage}\.(\d+)\.") for stage in stages],
            "widths": [shape[f"stages.{stage}.0.convs.0.conv.weight"][0] for stage in stages],
        }
    else:
        head_dim = args.encoder_fields.get("head_dim", 64)  # shapes tell heads x head_dim alone
        width, patch_values = shape["embeddings.patch_embedding.projection.weight"]  # Linear: [out, in]
        positions = shape["embeddings.positions"][1]  # [1, positions, width]
        sizes = {
            "hidden_size": width,
            "num_hidden_layers": count_indices(shape, r"layers\.(\d+)\."),
            "num_attention_heads": shape["layers.0.attention.out_proj.weight"][1] // head_dim,
            "mlp_ratio": shape["layers.0.mlp.fc1.weight"][0] // width,
        }
        if kind == "st_mem":
            # there is a separator at both ends of the patches of each lead
            num_leads, num_samples = shape["embeddings.lead_embeddings"][0], (positions - 2) * patch_values
            sizes["patch_size"] = patch_values
        else:
            sizes["decoder_hidden_size"] = shape["decoder_embeddings.projection.weight"][0]
            sizes["decoder_num_hidden_layers"] = count_indices(shape, r"decoder_layers\.(\d+)\.")
            heads = shape["decoder_layers.0.attention.out_proj.weight"][1] // head_dim
            sizes["decoder_num_attention_heads"] = heads
            parts = num_leads if kind == "mlae" else num_samples  # mlae cuts leads, mtae time
            patches = positions - 1  # the first is of CLS
            sizes["patch_size"] = max(1, parts // patches)
            if sizes["patch_size"] * patches != parts or patch_values * patches != num_leads * num_samples:
                raise ValueError(
                    f"The {kind} weights have {patches} patches of {patch_values} values, {patch_values * patches} in "
                    f"all, which is not {num_leads} leads x {num_samples} samples; give --num_samples and --lead_names of the run."
                )
    if num_leads != len(args.lead_names):
        raise ValueError(
            f"The {kind} weights are of {num_leads} leads, --lead_names are {len(args.lead_names)}: name those of the run."
        )
    if num_samples != args.num_samples:
        raise ValueError(
            f"The {kind} weights are of {num_samples} samples, --num_samples is {args.num_samples}: give {num_samples}."
        )
    return {"num_leads": num_leads, "num_samples": num_samples, **sizes, **args.encoder_fields}


def check_missing(conversion: Conversion, what: str) -> None:
    """ValueError if the checkpoint lacks weights of `what`."""
    if conversion.missing:
        left_over = f" Left over: {some_of(conversion.left_over)}." if conversion.left_over else ""
        raise ValueError(
            f"The checkpoint has no entry for {some_of(conversion.missing)}, which {what} needs.{left_over}"
        )


def check_tensors(tensors: dict[str, Tensor], model: nn.Module, hint: str) -> None:
    """Compares the weights with those of the model before they are loaded.

    Raises:
        ValueError: one has another shape than in the model, no floats where it has them, or values that are none.
    """
    for name, expected in model.state_dict().items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.shape != expected.shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)} in the file, {list(expected.shape)} in the model; check {hint}."
            )
        if expected.is_floating_point() and not tensor.is_floating_point():
            raise ValueError(f"{name} is of {tensor.dtype} in the checkpoint; expected floats, not quantized weights.")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} has NaN or infinite values in the checkpoint: it diverged, or is damaged.")


def widest_dtype(args: ConvertArguments, tensors: dict[str, Tensor]) -> torch.dtype:
    """`--dtype`, or the widest of the weights."""
    if args.dtype is not None:
        return getattr(torch, args.dtype)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    widest = reduce(torch.promote_types, dtypes or {torch.float32})  # float16 and bfloat16 make float32
    if len(dtypes) > 1:
        args.assumed.append(f"all weights become {widest}, the widest of the checkpoint; choose another with --dtype")
    return widest


def check_encoder_options(args: ConvertArguments) -> None:
    """ValueError if the options are not of an encoder alone, of a kind that the reference has."""
    if not args.names_encoder or args.encoder not in PRETRAINING_RULES:
        encoder = args.encoder if args.names_encoder else None
        raise ValueError(
            f"The checkpoint holds no language model ({LLM_PREFIXES[-1]}...), so an encoder alone, and --encoder is {encoder}; expected "
            f"one of {', '.join(PRETRAINING_RULES)}."
        )
    of_elms = {
        "--llm": args.llm,
        f"--representation {args.representation}": args.representation != "signal",
        f"--train_phase {args.train_phase}": args.train_phase,
        "--explicit_thinking": args.explicit_thinking,
    }
    if option := next((option for option, given in of_elms.items() if given), None):
        raise ValueError(f"The checkpoint holds no language model ({LLM_PREFIXES[-1]}...); leave {option} out.")


def convert_encoder(
    args: ConvertArguments, checkpoint: Checkpoint
) -> tuple[PreTrainedModel, ECGFeatureExtractor, Conversion]:
    """The ECG encoder of a checkpoint that holds it alone, and the feature extractor that prepares records as it expects.

    Raises:
        ValueError: the options do not fit the checkpoint, or something is missing.
    """
    check_encoder_options(args)
    kind = str(args.encoder)
    conversion = convert_part(kind, checkpoint.tensors)
    check_missing(conversion, f"a {kind} encoder")
    config = ENCODER_CONFIGS[kind](**encoder_fields(args, conversion.tensors))
    with torch.device("meta"):  # no memory for weights that are replaced at once
        model = ENCODER_MODELS[kind](config)
    check_tensors(conversion.tensors, model, "--encoder and --encoder_config")
    dtype = widest_dtype(args, conversion.tensors)
    model.load_state_dict(plain_copies(conversion.tensors, dtype), assign=True)  # assign: the model's own are on meta
    return model.eval(), extractor_of(args), conversion


def plain_copies(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of weights that are views of a mapped file; those of floats become `dtype`."""
    return {
        name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
        for name, tensor in tensors.items()
    }


def extractor_of(args: ConvertArguments) -> ECGFeatureExtractor:
    """The feature extractor that prepares records as an encoder alone expects."""
    assert args.lead_names is not None  # set with the arguments, as is the normalization
    return ECGFeatureExtractor(args.sampling_rate, args.num_samples, args.lead_names, args.normalization or "none")


def _convert_vision(tower: PreTrainedModel, state_dict: dict[str, Tensor]) -> Conversion:
    """A vision backbone of transformers, of whatever version: its names of then are renamed as transformers renames them."""
    part = Conversion()
    expected = tower.state_dict()
    renamings = [change for change in get_model_conversion_mapping(tower) if isinstance(change, WeightRenaming)]
    for key, tensor in state_dict.items():
        entry = key.removeprefix("vision_encoder.")
        ours = rename_source_key(entry, renamings, [], tower.base_model_prefix, expected)[0]
        why = next((why for pattern, why in NOT_OF_THE_TOWER.items() if re.match(pattern, entry)), None)
        if ours in expected and ours not in part.tensors:
            part.tensors[ours], part.used[key] = tensor, ours
        elif why is not None:  # only of what this tower lacks
            part.ignored[key] = why
        else:
            part.left_over.append(key)
    part.missing = sorted(expected.keys() - part.tensors.keys())
    return part


def _merge_llm(args: ConvertArguments, state_dict: dict[str, Tensor]) -> Conversion:
    """The language model's weights under its own names; where LoRA was merged, these are float32."""
    merged, ranks = merge_lora(_state_dict_of(PEFT_PREFIX, state_dict) or state_dict, args.lora_alpha, args.use_rslora)
    if ranks:
        args.assumed.append(
            f"LoRA of rank {', '.join(map(str, sorted(ranks)))} has alpha {args.lora_alpha:g}; give another with --lora_alpha"
        )
    return merged


def _convert_llm(model: ELMForConditionalGeneration, lora: Conversion, state_dict: dict[str, Tensor]) -> Conversion:
    """The merged weights of `state_dict` under our names."""
    part = Conversion()
    expected = model.state_dict().keys()
    body = f"{model.model.language_model.base_model_prefix}."  # "model." of most
    names: dict[str, str] = {}  # of the language model alone -> ours
    for key, tensor in lora.tensors.items():
        ours = f"model.language_model.{key.removeprefix(body)}" if key.startswith(body) else key
        if ours in expected:
            part.tensors[ours], names[key] = tensor, ours
    peft = PEFT_PREFIX if any(key.startswith(PEFT_PREFIX) for key in state_dict) else ""
    for entry, target in lora.used.items():
        key, _, merged = target.partition(" ")  # merge_lora ends those that it changed with "(merged)"
        if key in names:
            part.used[peft + entry] = f"{names[key]} {merged}".strip()
        elif key.endswith("rotary_emb.inv_freq"):  # saved by older versions of transformers
            part.ignored[peft + entry] = "a constant"
        else:
            part.left_over.append(peft + entry)
    part.ignored |= {peft + entry: why for entry, why in lora.ignored.items()}
    if peft:
        part.left_over += [key for key in state_dict if not key.startswith(peft)]
    part.missing = sorted(
        name for name in expected if name.startswith(("model.language_model.", "lm_head.")) and name not in part.tensors
    )
    return part


def _convert_signal_encoder(args: ConvertArguments, state_dict: dict[str, Tensor]) -> Conversion:
    """The encoder of an ELM that reads signals; the arguments get the sizes that its weights tell."""
    if args.encoder_name_or_path is not None:
        raise ValueError(
            "The checkpoint holds the encoder's weights; leave --encoder_name_or_path out and name its kind as --encoder."
        )
    if args.encoder not in PRETRAINING_RULES:
        raise ValueError(
            f"--encoder is {args.encoder} for signal ECGs; expected one of {', '.join(PRETRAINING_RULES)}."
        )
    part = convert_part(args.encoder, state_dict)
    check_missing(part, f"a {args.encoder} encoder")
    args.encoder_fields = encoder_fields(args, part.tensors)  # build_model makes the encoder of them
    return part


def _convert_connector(args: ConvertArguments, kind: str, state_dict: dict[str, Tensor]) -> Conversion:
    """The connector; of the patch connector the arguments get the number of tokens, which follows from its weights."""
    part = convert_part(kind, state_dict)
    check_missing(part, f"the {kind} connector ({CONNECTOR_PREFIXES[str(args.architecture)]}...)")
    if kind == "patch":
        assert args.lead_names is not None
        weight = part.tensors["projection.weight"]  # Linear: [width, values of a patch]
        if weight.ndim != 2 or not weight.numel():
            raise ValueError(
                f"projection.weight of the patch connector is {list(weight.shape)}; expected two dimensions."
            )
        patches = len(args.lead_names) * args.num_samples / weight.shape[1]
        if (args.gives_num_ecg_tokens and patches != args.num_ecg_tokens) or patches != int(patches):
            raise ValueError(
                f"The patch connector makes {patches:g} tokens of {len(args.lead_names)} leads x {args.num_samples} samples, and "
                f"--num_ecg_tokens is {args.num_ecg_tokens}; check it and --num_samples."
            )
        args.num_ecg_tokens = int(patches)
    elif kind != "flat" and args.image_features != "embedding" and not args.gives_num_ecg_tokens:
        args.assumed.append(
            f"{args.num_ecg_tokens} token for each ECG, the reference's default; give another number with --num_ecg_tokens"
        )
    return part


def _run_tokenizer(args: ConvertArguments) -> tuple[ECGByteTokenizer | None, list[int]]:
    """The ECG-Byte tokenizer of a symbolic ELM, and its ids in the order of the run's vocabulary."""
    if args.ecg_tokenizer is None:
        return None, []
    ecg_byte, ids = read_reference_tokenizer(args.ecg_tokenizer)
    if not ecg_byte.across_leads:
        raise ValueError(
            f"--ecg_tokenizer {args.ecg_tokenizer} keeps within leads, and those of the reference run on from one lead into the next; "
            "give the one that the run had."
        )
    return ecg_byte, ids


def convert_elm(
    args: ConvertArguments, checkpoint: Checkpoint
) -> tuple[ELMForConditionalGeneration, ELMProcessor, Conversion]:
    """A whole ELM: encoder, connector and language model, and the processor that they need.

    Raises:
        ValueError: the options do not fit the checkpoint, or something is missing.
    """
    tensors, conversion = checkpoint.tensors, Conversion()
    llm_prefix = llm_prefix_of(tensors)
    if not args.llm:
        raise ValueError(f"The checkpoint holds a language model ({llm_prefix}...); name the one of the run as --llm.")
    llava = args.architecture == "llava"
    if llava and not args.names_encoder:
        raise ValueError("--encoder is missing; name the one that the ELM was trained with.")
    encoder = _state_dict_of(ENCODER_PREFIX, tensors)
    reads_signals = llava and args.representation not in IMAGE_REPRESENTATIONS
    if reads_signals:
        conversion.add(_convert_signal_encoder(args, encoder), ENCODER_PREFIX, "model.encoder.")
    if args.connector is not None:
        prefix = CONNECTOR_PREFIXES[str(args.architecture)]
        part = _convert_connector(args, args.connector, _state_dict_of(prefix, tensors))
        conversion.add(part, prefix, "model.connector.")
    of_any_length = args.connector in ("patch", "conv") or (args.encoder == "merl" and reads_signals)
    if of_any_length or args.representation == "symbolic":  # else the weights tell the number of samples
        args.assumed.append(f"{args.num_samples} samples for each lead; give another number with --num_samples")

    ecg_byte, ecg_ids = _run_tokenizer(args)
    processor = build_processor(args, ecg_byte=ecg_byte)
    # it was trained with the prompts of the reference, whatever those of the language model are
    processor.chat_template, ours = family_template(processor.tokenizer)
    processor.chat_template_origin = f"{ours}, as in the reference"
    processor.train_phase, processor.explicit_thinking = args.train_phase, args.explicit_thinking
    of_llm = _state_dict_of(llm_prefix, tensors)
    merged = _merge_llm(args, of_llm)
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(llm_prefix)}
    dtype = str(widest_dtype(args, rest | merged.tensors)).removeprefix("torch.")
    if dtype != "float32" and any(target.endswith("(merged)") for target in merged.used.values()):
        args.assumed.append(f"LoRA is merged in float32, and the sum is then rounded to {dtype}, as --dtype says")
    model = build_model(args, processor, in_vocabulary=True, dtype=dtype).eval().to(getattr(torch, dtype))
    if llava and not reads_signals:  # not before: its tower is made with the model
        tower = model.model.encoder
        part = _convert_vision(tower, encoder)
        if tower.config.model_type == "vit" and args.image_features == "embedding":  # the mean of its layers
            part.missing = [name for name in part.missing if not name.startswith("pooler.")]
        check_missing(part, f"the vision tower of {args.encoder_name_or_path or args.encoder}")
        conversion.add(part, ENCODER_PREFIX, "model.encoder.")
    part = _convert_llm(model, merged, of_llm)
    fit_vocabulary(args, model, processor, part, ecg_ids)
    check_missing(part, f"--llm {args.llm}")
    conversion.add(part, llm_prefix, "")  # our names are whole already
    seen = conversion.used.keys() | conversion.ignored.keys() | set(conversion.left_over)
    conversion.left_over += [key for key in tensors if key not in seen]
    check_tensors(conversion.tensors, model, "--llm, --elm, --encoder, --num_samples and --num_ecg_tokens")
    model.load_state_dict(conversion.tensors, strict=False)  # what is missing was checked
    return model, processor, conversion
