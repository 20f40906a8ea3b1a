"""From the files of the reference system (ELM-Research/ELM) to ours: state dicts, and ECG-Byte tokenizers."""

import pickletools
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configuration_elm import ENCODER_CONFIGS
from modeling_ecg_encoders import ENCODER_MODELS
from tokenization_ecg_byte import FIRST_MERGE_ID, ECGByteTokenizer

# pattern at the start of the reference's key, and what takes its place; None drops the entry
Rule = tuple[str, str | Callable[[re.Match[str]], str] | None]


def _layers(reference: str, ours: str) -> list[Rule]:
    return [
        (rf"{reference}(\d+)\.attn\.norm\.", rf"{ours}.\1.norm1."),
        (rf"{reference}(\d+)\.attn\.fn\.to_qkv\.", rf"{ours}.\1.attention.qkv_proj."),
        (rf"{reference}(\d+)\.attn\.fn\.to_out\.0\.", rf"{ours}.\1.attention.out_proj."),
        (rf"{reference}(\d+)\.ff\.norm\.", rf"{ours}.\1.norm2."),
        (rf"{reference}(\d+)\.ff\.fn\.net\.0\.", rf"{ours}.\1.mlp.fc1."),
        (rf"{reference}(\d+)\.ff\.fn\.net\.3\.", rf"{ours}.\1.mlp.fc2."),
    ]


def _patch_embedding(reference: str) -> list[Rule]:
    return [
        (rf"{reference}\.1\.", "embeddings.patch_embedding.norm1."),
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
    *_patch_embedding(r"encoder\.to_patch_embedding"),
    *_layers(r"encoder\.block", "layers"),
    (r"encoder\.norm\.", "norm."),
    # of the pretraining: its decoder, and the patch embedding under a second name
    (r"mask_embedding$|to_decoder_embedding\.|decoder_\w+|to_patch_embedding\.", None),
]

RULES: dict[str, list[Rule]] = {
    "merl": _MERL,
    "mlae": _MASKED_AUTOENCODER,
    "mtae": _MASKED_AUTOENCODER,
    "st_mem": _ST_MEM,
    "linear": [(r"projection\.", "projection.")],
    "mlp": [(r"projection\.0\.", "linear_1."), (r"projection\.2\.", "linear_2.")],
    "flat": [(r"projection\.", "projection.")],
    "patch": [(r"projection\.", "projection.")],
    "conv": [(r"conv1\.", "conv1."), (r"conv2\.", "conv2."), (r"fc\.", "projection.")],
}


def _count(keys: Collection[str], pattern: str) -> int:
    """How many indices the first group of `pattern` runs through."""
    return 1 + max((int(match[1]) for key in keys if (match := re.match(pattern, key))), default=-1)


def _expected_keys(kind: str, keys: Collection[str]) -> set[str]:
    """The keys of our module, with as many blocks as `keys` have."""
    if kind not in ENCODER_MODELS:
        return {f"{target}{tensor}" for _, target in RULES[kind] for tensor in ("weight", "bias")}
    sizes: dict[str, Any]
    if kind == "merl":
        num_stages = _count(keys, r"stages\.(\d+)\.") or 1
        sizes = {
            "block": "bottleneck" if any(".convs.2." in key for key in keys) else "basic",
            "depths": [max(1, _count(keys, rf"stages\.{stage}\.(\d+)\.")) for stage in range(num_stages)],
            "widths": [64 * 2**stage for stage in range(num_stages)],
        }
    else:
        sizes = {"num_hidden_layers": _count(keys, r"layers\.(\d+)\.") or 1}
        if kind != "st_mem":
            sizes["decoder_num_hidden_layers"] = _count(keys, r"decoder_layers\.(\d+)\.") or 1
    with torch.device("meta"):
        return set(ENCODER_MODELS[kind](ENCODER_CONFIGS[kind](**sizes)).state_dict())


def _convert_key(kind: str, key: str) -> str | None:
    for pattern, target in RULES[kind]:
        if match := re.match(pattern, key):
            if target is None:
                return None
            start = match.expand(target) if isinstance(target, str) else target(match)
            return start + key[match.end() :]
    raise ValueError(
        f"Unknown key {key!r} in a state dict of kind {kind!r}; expected only keys of the reference's module: "
        "check the kind, strip the prefix under which the module stands, or drop the entry."
    )


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
    converted: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        plain = re.sub(r"(^|(?<=\.))((module|_orig_mod)\.)+", "", key)
        ours = _convert_key(kind, plain)
        if ours in converted:
            raise ValueError(f"Two entries for {plain!r} in the state dict, one of them {key!r}; drop one.")
        if ours is not None:
            converted[ours] = tensor
    if kind == "st_mem":  # ours holds the embeddings of all leads in one tensor
        name = "embeddings.lead_embeddings"
        leads = [f"{name}.{lead}" for lead in range(_count(converted, rf"{re.escape(name)}\.(\d+)$"))]
        if leads and converted.keys() >= set(leads):
            converted[name] = torch.stack([converted.pop(lead) for lead in leads])
    expected = _expected_keys(kind, converted)
    if missing := sorted(expected - converted.keys()):
        raise ValueError(
            f"The state dict has no entry for {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''} "
            f"({len(missing)} missing) of kind {kind!r}; check the kind and that the checkpoint is whole."
        )
    if unknown := sorted(converted.keys() - expected):
        raise ValueError(f"{', '.join(unknown[:5])}: no such tensors in kind {kind!r}; drop them from the state dict.")
    return converted


# 25 times the reference's file of 10,000 merges
MAX_PICKLE_BYTES = 16 * 2**20


def _load_plain_pickle(content: bytes) -> Any:
    """What a pickle of dicts with whole numbers as keys, lists, pairs, whole numbers and strings holds.

    `pickle` is not used: even without any class it can be made to crash (hashing a pair in a pair in a pair ...). Here
    no opcode calls, imports or looks up anything, and what the memo holds is never fetched, so no value stands twice
    and the work grows with the file alone.

    Raises:
        ValueError: there is any other opcode, or the file is cut or makes no sense.
    """
    stack: list[Any] = []
    marks: list[int] = []

    def pop_marked() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def set_items(items: list[Any]) -> None:
        if type(stack[-1]) is not dict or len(items) % 2 or any(type(key) is not int for key in items[::2]):
            raise ValueError("it sets items of what is no dict, or whose keys are no whole numbers")
        stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def extend(items: list[Any]) -> None:
        if type(stack[-1]) is not list:
            raise ValueError("it appends to what is no list")
        stack[-1].extend(items)

    try:
        for opcode, argument, position in pickletools.genops(content):
            match opcode.name:
                case "PROTO" | "FRAME" | "MEMOIZE" | "BINPUT" | "LONG_BINPUT":
                    pass
                case "BININT" | "BININT1" | "BININT2" | "SHORT_BINUNICODE" | "BINUNICODE":
                    stack.append(argument)
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "MARK":
                    marks.append(len(stack))
                case "SETITEMS":
                    set_items(pop_marked())
                case "SETITEM":
                    set_items([stack.pop(-2), stack.pop()])
                case "APPENDS":
                    extend(pop_marked())
                case "APPEND":
                    extend([stack.pop()])
                case "TUPLE2":
                    stack.append((stack.pop(-2), stack.pop()))
                case "STOP":
                    return stack.pop()
                case name:
                    raise ValueError(
                        f"it holds {name} at byte {position}; expected dicts, lists, pairs, whole numbers and strings "
                        "only, each written out; anything else could run code or exhaust the memory"
                    )
    except IndexError as error:
        raise ValueError("its opcodes do not fit together") from error


def _merges_of(content: Any) -> list[str]:
    """The merge strings of the reference's `(vocab, merges)`, in the order of their ids."""
    if not (isinstance(content, tuple) and isinstance(content[0], dict) and isinstance(content[1], list)):
        raise ValueError("expected a pair of a dict and a list, (vocab, merges)")
    vocab, entries = content
    for byte in range(FIRST_MERGE_ID):
        if vocab.get(byte) not in (chr(byte), f"<{byte}>"):  # the reference writes bytes above 127 as <128>
            raise ValueError(f"vocab has no single byte {chr(byte)!r} as id {byte}")
    merges = []
    for place, entry in enumerate(entries):
        symbols = entry[0] if isinstance(entry, tuple) else None
        if not (isinstance(symbols, list) and all(type(symbol) is int for symbol in symbols)):
            raise ValueError(f"merge {place} is no pair of a list of bytes and an id")
        token_id = FIRST_MERGE_ID + place
        if type(entry[1]) is not int or entry[1] != token_id:
            raise ValueError(f"merge {place} does not have the id {token_id}")
        if not all(0 <= symbol < FIRST_MERGE_ID for symbol in symbols):
            raise ValueError(f"merge {place} holds what is no byte")
        merge = "".join(map(chr, symbols))
        if vocab.get(token_id) != merge:
            raise ValueError(f"merge {place} is {merge[:40]!r}, but vocab has another string as id {token_id}")
        merges.append(merge)
    if len(vocab) != FIRST_MERGE_ID + len(merges):
        raise ValueError(f"vocab has {len(vocab)} entries; expected 256 bytes and {len(merges)} merges")
    return merges


def read_ecg_byte_pickle(path: Path) -> ECGByteTokenizer:
    """The reference's ECG-Byte tokenizer, a pickle of `(vocab: dict[int, str], merges: list[(list[int], int)])`.

    The pickle is never executed: anything but these containers is refused.

    Raises:
        ValueError: the file is no such pickle, damaged, or too large.
    """
    with path.open("rb") as file:
        content = file.read(MAX_PICKLE_BYTES + 1)
    try:
        if len(content) > MAX_PICKLE_BYTES:
            raise ValueError(f"it is larger than {MAX_PICKLE_BYTES / 2**20:g} MiB")
        return ECGByteTokenizer(_merges_of(_load_plain_pickle(content)))
    except ValueError as error:
        raise ValueError(f"{path} is no ECG-Byte tokenizer of the reference: {error}.") from error
