"""Names of weights in the checkpoints of the reference system (ELM-Research/ELM), and ours."""

import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.modeling_common import some_of
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS
from elm_ecg.training.sharing.checkpoints import Conversion, plain_key

# pattern at the start of the reference's key, and what takes its place; None drops the entry
Rule = tuple[str, str | Callable[[re.Match[str]], str] | None]


def _layers(reference: str, ours: str) -> list[Rule]:
    """Of transformer blocks."""
    parts = {
        r"attn\.norm": "norm1",
        r"attn\.fn\.to_qkv": "attention.qkv_proj",
        r"attn\.fn\.to_out\.0": "attention.out_proj",
        r"ff\.norm": "norm2",
        r"ff\.fn\.net\.0": "mlp.fc1",
        r"ff\.fn\.net\.3": "mlp.fc2",  # between them activation and dropout, without weights
    }
    return [(rf"{reference}(\d+)\.{part}\.", rf"{ours}.\1.{name}.") for part, name in parts.items()]


def _patch_embedding(reference: str) -> list[Rule]:
    return [
        (rf"{reference}\.1\.", "embeddings.patch_embedding.norm1."),  # 0 cuts the patches, and has no weights
        (rf"{reference}\.2\.", "embeddings.patch_embedding.projection."),
        (rf"{reference}\.3\.", "embeddings.patch_embedding.norm2."),
    ]


def _resnet_conv(match: re.Match[str]) -> str:
    stage, block, part, conv = match.groups()
    return f"stages.{int(stage) - 1}.{block}.convs.{int(conv) - 1}.{'conv' if part == 'conv' else 'norm'}."


def _resnet_shortcut(match: re.Match[str]) -> str:
    stage, block, part = match.groups()
    return f"stages.{int(stage) - 1}.{block}.shortcut.{'conv' if part == '0' else 'norm'}."


_MERL: list[Rule] = [
    (r"resnet\.conv1\.", "stem.conv."),
    (r"resnet\.bn1\.", "stem.norm."),
    (r"resnet\.layer(\d+)\.(\d+)\.(conv|bn)(\d+)\.", _resnet_conv),
    (r"resnet\.layer(\d+)\.(\d+)\.shortcut\.([01])\.", _resnet_shortcut),
    (r"(?!resnet\.)", None),  # projections and text encoder of the pretraining
]

_MASKED_AUTOENCODER: list[Rule] = [
    (r"encoder\.pos_embedding$", "embeddings.positions"),
    (r"encoder\.cls_embedding$", "embeddings.cls_token"),
    *_patch_embedding("to_patch_embedding"),
    (r"encoder\.to_patch_embedding\.", None),  # the same module under a second name
    *_layers(r"encoder\.block", "layers"),
    (r"encoder\.norm\.", "norm."),
    (r"to_decoder_embedding\.", "decoder_embeddings.projection."),
    (r"decoder_pos_embed$", "decoder_embeddings.positions"),
    *_layers(r"decoder_blocks\.", "decoder_layers"),
    (r"mask_embedding$|decoder_norm\.|decoder_head\.", None),  # of the reconstruction only
]

_ST_MEM: list[Rule] = [
    (r"encoder\.pos_embedding$", "embeddings.positions"),
    (r"encoder\.sep_embedding$", "embeddings.sep_token"),
    (r"encoder\.lead_embeddings\.", "embeddings.lead_embeddings."),
    *_patch_embedding(r"(?:encoder\.)?to_patch_embedding"),
    *_layers(r"encoder\.block", "layers"),
    (r"encoder\.norm\.", "norm."),
    (r"mask_embedding$|to_decoder_embedding\.|decoder_\w+", None),  # the decoder of the pretraining
]

RULES: dict[str, list[Rule]] = {
    "merl": _MERL,
    "mlae": _MASKED_AUTOENCODER,
    "mtae": _MASKED_AUTOENCODER,
    "st_mem": _ST_MEM,
    "linear": [(r"projection\.", "projection.")],
    "mlp": [(r"projection\.0\.", "linear_1."), (r"projection\.2\.", "linear_2.")],  # 1 is the activation
    "flat": [(r"projection\.", "projection.")],
    "patch": [(r"projection\.", "projection.")],
    "conv": [(r"conv1\.", "conv1."), (r"conv2\.", "conv2."), (r"fc\.", "projection.")],
}

_RECONSTRUCTION: list[Rule] = [
    (r"mask_embedding$", "decoder.mask_token"),
    (r"decoder_norm\.", "decoder.norm."),
    (r"decoder_head\.", "decoder.head."),
]
# of each encoder what its pretraining has beside it; all other entries are the encoder's
PRETRAINING_RULES: dict[str, list[Rule]] = {
    "merl": [
        (r"downconv\.", "heads.projection."),
        (r"att_pool_head\.cls_token$", "heads.attention_pool.cls_token"),
        (r"att_pool_head\.positional_embedding$", "heads.attention_pool.positions"),
        (r"att_pool_head\.mhsa\.", "heads.attention_pool.attention."),
        (r"att_pool_head\.c_proj\.", "heads.attention_pool.projection."),
        (r"linear([12])\.", r"heads.view_\1."),
        (r"proj_t\.", "heads.text_projection."),
        (r"lm_model\.", "text_encoder."),
    ],
    "mlae": _RECONSTRUCTION,
    "mtae": _RECONSTRUCTION,
    "st_mem": [
        *_RECONSTRUCTION,
        (r"to_decoder_embedding\.", "decoder.projection."),
        (r"decoder_pos_embed$", "decoder.positions"),
        *_layers(r"decoder_blocks\.", "decoder.layers"),
    ],
}


def count_indices(keys: Collection[str], pattern: str) -> int:
    """How many indices the first group of `pattern` runs through."""
    count = 1 + max((int(match[1]) for key in keys if (match := re.match(pattern, key))), default=-1)
    if count > len(keys):  # else one huge index would build as many layers
        raise ValueError(f"An entry has the index {count - 1}, and there are {len(keys)} entries: others are missing.")
    return count


def _expected_keys(kind: str, keys: Collection[str]) -> set[str]:
    """The keys of our module, with as many blocks as `keys` have."""
    if kind not in ENCODER_MODELS:
        return {f"{target}{tensor}" for _, target in RULES[kind] for tensor in ("weight", "bias")}
    sizes: dict[str, Any]
    if kind == "merl":
        num_stages = count_indices(keys, r"stages\.(\d+)\.") or 1
        sizes = {
            "block": "bottleneck" if any(".convs.2." in key for key in keys) else "basic",
            "depths": [max(1, count_indices(keys, rf"stages\.{stage}\.(\d+)\.")) for stage in range(num_stages)],
            "widths": [64 * 2**stage for stage in range(num_stages)],  # any would do: only names are compared
        }
    else:
        sizes = {"num_hidden_layers": count_indices(keys, r"layers\.(\d+)\.") or 1}  # none: one layer is missing
        if kind != "st_mem":
            sizes["decoder_num_hidden_layers"] = count_indices(keys, r"decoder_layers\.(\d+)\.") or 1
    with torch.device("meta"):  # names alone, no memory
        return set(ENCODER_MODELS[kind](ENCODER_CONFIGS[kind](**sizes)).state_dict())


def _convert_key(rules: list[Rule], key: str) -> str | None:
    """Our name of an entry; None for one that is not needed.

    Raises:
        KeyError: there is no rule for it, as the reference's module has no such entry.
    """
    for pattern, target in rules:
        if match := re.match(pattern, key):
            if target is None:
                return None
            start = match.expand(target) if isinstance(target, str) else target(match)
            return start + key[match.end() :]
    raise KeyError(key)


def convert_part(kind: str, state_dict: dict[str, Tensor]) -> Conversion:
    """An encoder or a connector; see `convert_state_dict`, which admits nothing missing or left over."""
    part = Conversion()
    # ST-MEM's patch embedding stands under two names, of which the reference fills this one last
    twice = (
        {f"encoder.{key}" for key in state_dict if key.startswith("to_patch_embedding.")} if kind == "st_mem" else set()
    )
    for key, tensor in state_dict.items():
        try:
            ours = None if key in twice else _convert_key(RULES[kind], key)
        except KeyError:
            part.left_over.append(key)
            continue
        if ours is None:
            part.ignored[key] = "of the pretraining, or there twice"
        else:
            part.tensors[ours], part.used[key] = tensor, ours
    if kind == "st_mem":  # ours holds the embeddings of all leads in one tensor
        name = "embeddings.lead_embeddings"
        leads = [f"{name}.{lead}" for lead in range(count_indices(part.tensors, rf"{re.escape(name)}\.(\d+)$"))]
        if leads and part.tensors.keys() >= set(leads):
            part.tensors[name] = torch.stack([part.tensors.pop(lead) for lead in leads])  # [leads, width]
            part.used = {entry: name if ours in leads else ours for entry, ours in part.used.items()}
    expected = _expected_keys(kind, part.tensors)
    part.missing = sorted(expected - part.tensors.keys())
    for unknown in sorted(part.tensors.keys() - expected):
        del part.tensors[unknown]
    for entry in [entry for entry, ours in part.used.items() if ours not in expected]:
        del part.used[entry]
        part.left_over.append(entry)
    return part


def convert_pretraining_part(kind: str, state_dict: dict[str, Tensor]) -> Conversion:
    """An encoder with what its pretraining has beside it, under the names of `ECGForPreTraining`; of these none is sought."""
    part, of_encoder = Conversion(), {}
    for key, tensor in state_dict.items():
        try:
            ours = str(_convert_key(PRETRAINING_RULES[kind], key))
        except KeyError:
            of_encoder[key] = tensor
        else:
            part.tensors[ours], part.used[key] = tensor, ours
    encoder = convert_part(kind, of_encoder)
    unknown = [key for key in encoder.ignored if not re.match(r"(encoder\.)?to_patch_embedding\.", key)]
    encoder.left_over += unknown  # what the encoder alone does not need
    encoder.ignored = {key: "there twice" for key in encoder.ignored if key not in unknown}
    part.add(encoder, "", "encoder.")
    for name in ("decoder.mask_token", "heads.attention_pool.cls_token"):
        if name in part.tensors:
            part.tensors[name] = part.tensors[name].flatten()  # [1, 1, width]
    if "heads.projection.weight" in part.tensors:  # a convolution of one place: [size, width, 1]
        part.tensors["heads.projection.weight"] = part.tensors["heads.projection.weight"].squeeze(-1)
    pool = ("heads.attention_pool.cls_token", "heads.attention_pool.positions")
    if part.tensors.keys() >= set(pool):
        cls_token, positions = (part.tensors[name] for name in pool)
        if (
            cls_token.shape == positions.shape[2:] and positions.shape[:1] == (1,) and positions.shape[1]
        ):  # else refused later
            part.tensors[pool[0]] = cls_token + positions[0, 0]  # the reference adds the first position twice
    return part


def convert_state_dict(kind: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's weights of an encoder or a connector, under our names.

    Args:
        kind: an encoder (`merl`, `mlae`, `mtae`, `st_mem`) or a connector (`linear`, `mlp`, `flat`, `patch`, `conv`).
        state_dict: the reference's entries, without the prefix under which an ELM holds the module. The `module.` and
            `_orig_mod.` of DDP and of compiled models are stripped.

    Returns:
        A state dict that our module loads strictly. Entries that serve the pretraining only are left out.

    Raises:
        ValueError: unknown kind, unknown key, missing key, or two entries for one tensor.
    """
    if kind not in RULES:
        raise ValueError(f"Unknown kind {kind!r}; expected one of {', '.join(RULES)}.")
    plain: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        if plain_key(key) in plain:
            raise ValueError(f"Two entries for {plain_key(key)!r} in the state dict, one of them {key!r}; drop one.")
        plain[plain_key(key)] = tensor
    part = convert_part(kind, plain)
    if part.missing:
        raise ValueError(
            f"The state dict has no entry for {some_of(part.missing)}, missing of kind {kind!r}; check the kind and that the "
            "checkpoint is whole."
        )
    if part.left_over:
        raise ValueError(
            f"Unknown key {part.left_over[0]!r} in a state dict of kind {kind!r}; expected only keys of the reference's module: "
            "check the kind, strip the prefix under which the module stands, or drop the entry."
        )
    return part.tensors
