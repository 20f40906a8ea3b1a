"""From the files of the reference system (ELM-Research/ELM) to ours: `elm convert` for checkpoints, and ECG-Byte tokenizers."""

import json
import pickletools
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from elm_ecg.configuration_elm import ENCODER_CONFIGS, IMAGE_REPRESENTATIONS
from elm_ecg.ecg_utils import REFERENCE_LEADS
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.tokenization_ecg_byte import FIRST_MERGE_ID, ECGByteTokenizer
from elm_ecg.training.arguments import ELMArguments, ELMParser
from elm_ecg.training.build import build_model, build_processor, resolve_llm
from elm_ecg.training.files import new_folder, write_text
from elm_ecg.training.sharing.cards import CARD, folder_card, shown
from elm_ecg.training.sharing.checkpoints import Checkpoint, merge_lora, plain_key, read_checkpoint

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
    count = 1 + max((int(match[1]) for key in keys if (match := re.match(pattern, key))), default=-1)
    if count > len(keys):
        raise ValueError(
            f"An entry has the index {count - 1}, and there are {len(keys)} entries in all: others are missing."
        )
    return count


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
    """Our name of an entry; None for one that is not needed.

    Raises:
        KeyError: the reference's module has no such entry.
    """
    for pattern, target in RULES[kind]:
        if match := re.match(pattern, key):
            if target is None:
                return None
            start = match.expand(target) if isinstance(target, str) else target(match)
            return start + key[match.end() :]
    raise KeyError(key)


@dataclass
class Conversion:
    """What became of the entries of a state dict.

    Args:
        tensors: our name -> weight.
        used: entry -> our name.
        ignored: entry -> why it is not needed.
        left_over: entries that are not known.
        missing: our names that no entry gives.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    left_over: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def add(self, part: "Conversion", reference: str, ours: str) -> None:
        """Takes in a part of the model, which stands under these prefixes."""
        self.tensors |= {ours + name: tensor for name, tensor in part.tensors.items()}
        self.used |= {reference + entry: ours + name for entry, name in part.used.items()}
        self.ignored |= {reference + entry: why for entry, why in part.ignored.items()}
        self.left_over += [reference + entry for entry in part.left_over]
        self.missing += [ours + name for name in part.missing]


def convert_part(kind: str, state_dict: dict[str, Tensor]) -> Conversion:
    """An encoder or a connector; see `convert_state_dict`, which admits nothing missing or left over."""
    part = Conversion()
    for key, tensor in state_dict.items():
        try:
            ours = _convert_key(kind, key)
        except KeyError:
            part.left_over.append(key)
            continue
        if ours is None:
            part.ignored[key] = "of the pretraining, or there twice"
        else:
            part.tensors[ours], part.used[key] = tensor, ours
    if kind == "st_mem":  # ours holds the embeddings of all leads in one tensor
        name = "embeddings.lead_embeddings"
        leads = [f"{name}.{lead}" for lead in range(_count(part.tensors, rf"{re.escape(name)}\.(\d+)$"))]
        if leads and part.tensors.keys() >= set(leads):
            part.tensors[name] = torch.stack([part.tensors.pop(lead) for lead in leads])
            part.used = {entry: name if ours in leads else ours for entry, ours in part.used.items()}
    expected = _expected_keys(kind, part.tensors)
    part.missing = sorted(expected - part.tensors.keys())
    for unknown in sorted(part.tensors.keys() - expected):
        del part.tensors[unknown]
    for entry in [entry for entry, ours in part.used.items() if ours not in expected]:
        del part.used[entry]
        part.left_over.append(entry)
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
            f"The state dict has no entry for {_some(part.missing)}, missing of kind {kind!r}; check the kind and that the "
            "checkpoint is whole."
        )
    if part.left_over:
        raise ValueError(
            f"Unknown key {part.left_over[0]!r} in a state dict of kind {kind!r}; expected only keys of the reference's module: "
            "check the kind, strip the prefix under which the module stands, or drop the entry."
        )
    return part.tensors


def _some(names: list[str]) -> str:
    """The first of many names, and how many there are."""
    return f"{', '.join(names[:5])}{f' ... ({len(names)} in all)' if len(names) > 5 else ''}"


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


LLM_PREFIX, PEFT_PREFIX, ENCODER_PREFIX = "llm.llm.", "base_model.model.", "encoder."
CONNECTOR_PREFIXES = {"llava": "projection.", "fuyu": "project_layer."}
ECG_TOKENS = "signal_*"  # among --added_tokens: signal_<id> of all ids of the ECG-Byte tokenizer
# of a vision model, what its tower does without
NOT_OF_THE_TOWER = {
    r"text_model\.|text_projection\.|logit_scale$|logit_bias$": "of the text tower",
    r"visual_projection\.": "of the embedding, and this ELM reads patches",
    r"decoder\.|.*mask_token$": "of the masked pretraining",
    r".*position_ids$": "a constant",
}


@dataclass
class ConvertArguments(ELMArguments):
    """What the checkpoint does not say of the ELM or encoder that it holds. Defaults are the reference's."""

    output_dir: str = field(default="", metadata={"help": "New or empty folder that the converted model is saved in."})
    llm: str = field(
        default="", metadata={"help": "Language model that a whole ELM was trained with: name, Hub id or local folder."}
    )
    lead_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Leads and their order that the model was trained on. Default: I II III aVL aVR aVF V1 ... V6, the reference's "
            "of MIMIC-IV and CODE-15; its PTB-XL has aVR before aVL."
        },
    )
    image_features: Literal["patches", "embedding"] = field(
        default="embedding", metadata={"help": "What the connector reads of a vision backbone."}
    )
    ecg_tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "ECG-Byte tokenizer that a symbolic ELM was trained with, as `elm tokenizer import` makes it: local folder or "
            "Hub id."
        },
    )
    added_tokens: list[str] = field(
        default_factory=lambda: [ELMProcessor.ecg_token],
        metadata={
            "help": "Tokens that the run added to the language model's, in the order of their rows; signal_* stands for all ECG tokens "
            "of a symbolic ELM, by id."
        },
    )
    lora_alpha: float = field(default=32.0, metadata={"help": "Of LoRA, which the checkpoint does not say."})
    use_rslora: bool = field(default=False, metadata={"help": "LoRA was scaled by the square root of its rank."})
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Of the saved weights. Default: the widest that the checkpoint has."}
    )
    # of datasets and training
    data: list[str] = field(init=False, default_factory=list)
    data_weights: list[float] | None = field(init=False, default=None)
    fold: int | None = field(init=False, default=None)
    ecg_root: str | None = field(init=False, default=None)
    data_subset: float | None = field(init=False, default=None)
    perturb: Literal["noise", "zeros", "only_text"] | None = field(init=False, default=None)
    system_prompt: str | None = field(init=False, default=None)
    ecg_overflow: Literal["error", "downsample", "drop_leads"] = field(init=False, default="error")
    update: list[str] = field(init=False, default_factory=list)
    streaming: bool = field(init=False, default=False)
    shuffle_buffer: int = field(init=False, default=1000)
    augment_ecg: bool = field(init=False, default=False)
    augment_rgb: bool = field(init=False, default=False)
    time_shift: float = field(init=False, default=0.0)
    gain_jitter: float = field(init=False, default=0.0)
    lead_dropout: float = field(init=False, default=0.0)
    wandb: bool = field(init=False, default=False)
    distributed: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("--output_dir is missing; say the folder that the converted model is saved in.")
        self.assumed: list[str] = []  # what the reader of the report should know
        if self.lead_names is None:
            self.lead_names = list(REFERENCE_LEADS)
            self.assumed.append(
                "leads in the reference's order, I II III aVL aVR aVF V1 ... V6; of a model trained on its PTB-XL, say "
                "--lead_names I II III aVR aVL aVF V1 V2 V3 V4 V5 V6"
            )
        if self.normalization is None and self.representation == "signal" and self.elm != "ecg_byte":
            self.normalization = "minmax"
        if self.representation not in IMAGE_REPRESENTATIONS:
            self.image_features = "patches"
        self.says_encoder = self.encoder is not None or self.encoder_name_or_path is not None
        self.says_num_ecg_tokens = self.num_ecg_tokens is not None
        super().__post_init__()
        symbolic = self.representation == "symbolic"
        if symbolic and (self.ecg_tokenizer is None or ECG_TOKENS not in self.added_tokens):
            raise ValueError(
                "A checkpoint of a symbolic ELM does not say which of its rows is which token. Give the run's tokenizer as "
                "--ecg_tokenizer (`elm tokenizer import` makes it of a .pkl), and all tokens that the run added, in the order of their "
                f"rows, as --added_tokens, with {ECG_TOKENS} for those of the tokenizer: --added_tokens '{ECG_TOKENS}' "
                f"'{ELMProcessor.ecg_token}' if these came first."
            )
        if not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"--lora_alpha is {self.lora_alpha}; expected a positive number.")
        if ECG_TOKENS in self.added_tokens and not symbolic:
            raise ValueError(f"--added_tokens {ECG_TOKENS} is of symbolic ELMs; say --elm ecg_byte, or leave it out.")
        repeated = {token for token in self.added_tokens if self.added_tokens.count(token) > 1}
        if repeated:
            raise ValueError(
                f"--added_tokens has {', '.join(sorted(repeated))} more than once; each token has one row."
            )


def _state_dict_of(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def encoder_fields(args: ConvertArguments, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of the encoder's configuration that the shapes of its converted weights tell.

    `--encoder_config` says the others, such as `head_dim`, which is 64 in the reference.

    Raises:
        ValueError: the leads or samples of the options are not those of the weights.
    """
    kind, shape = str(args.encoder), {name: tensor.shape for name, tensor in tensors.items()}
    with torch.device("meta"):
        usual = ENCODER_MODELS[kind](ENCODER_CONFIGS[kind]()).state_dict()
    for name in shape.keys() & usual.keys():
        if len(shape[name]) != usual[name].ndim or 0 in shape[name]:
            raise ValueError(
                f"{name} of the {kind} weights is {list(shape[name])}; expected {usual[name].ndim} dimensions, none of them empty."
            )
    assert args.lead_names is not None  # set with the arguments
    num_leads, num_samples = len(args.lead_names), args.num_samples
    told: dict[str, Any]
    if kind == "merl":
        num_leads = shape["stem.conv.weight"][1]
        stages = range(_count(shape, r"stages\.(\d+)\."))
        told = {
            "block": "bottleneck" if "stages.0.0.convs.2.conv.weight" in shape else "basic",
            "depths": [_count(shape, rf"stages\.{stage}\.(\d+)\.") for stage in stages],
            "widths": [shape[f"stages.{stage}.0.convs.0.conv.weight"][0] for stage in stages],
        }
    else:
        head_dim = args.encoder_fields.get("head_dim", 64)
        width, patch_values = shape["embeddings.patch_embedding.projection.weight"]
        positions = shape["embeddings.positions"][1]
        told = {
            "hidden_size": width,
            "num_hidden_layers": _count(shape, r"layers\.(\d+)\."),
            "num_attention_heads": shape["layers.0.attention.out_proj.weight"][1] // head_dim,
            "mlp_ratio": shape["layers.0.mlp.fc1.weight"][0] // width,
        }
        if kind == "st_mem":
            num_leads, num_samples = shape["embeddings.lead_embeddings"][0], (positions - 2) * patch_values
            told["patch_size"] = patch_values
        else:
            told["decoder_hidden_size"] = shape["decoder_embeddings.projection.weight"][0]
            told["decoder_num_hidden_layers"] = _count(shape, r"decoder_layers\.(\d+)\.")
            heads = shape["decoder_layers.0.attention.out_proj.weight"][1] // head_dim
            told["decoder_num_attention_heads"] = heads
            parts = num_leads if kind == "mlae" else num_samples
            told["patch_size"] = max(1, parts // (positions - 1))
            if (
                told["patch_size"] * (positions - 1) != parts
                or patch_values * (positions - 1) != num_leads * num_samples
            ):
                raise ValueError(
                    f"The {kind} weights have {positions - 1} patches of {patch_values} values, {patch_values * (positions - 1)} in "
                    f"all, which is not {num_leads} leads x {num_samples} samples; say --segment_len and --lead_names of the run."
                )
    if num_leads != len(args.lead_names):
        raise ValueError(
            f"The {kind} weights are of {num_leads} leads, and --lead_names are {len(args.lead_names)}; name those of the run."
        )
    if num_samples != args.num_samples:
        raise ValueError(
            f"The {kind} weights are of {num_samples} samples, and --segment_len is {args.num_samples}; say {num_samples}."
        )
    return {"num_leads": num_leads, "num_samples": num_samples, **told, **args.encoder_fields}


def _check_missing(conversion: Conversion, what: str) -> None:
    if conversion.missing:
        left_over = f" Left over: {_some(conversion.left_over)}." if conversion.left_over else ""
        raise ValueError(f"The checkpoint has no entry for {_some(conversion.missing)}, which {what} needs.{left_over}")


def _check_tensors(tensors: dict[str, Tensor], model: nn.Module, hint: str) -> None:
    """
    Raises:
        ValueError: one has another shape than in the model, no floats where it has them, or values that are none.
    """
    for name, expected in model.state_dict().items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.shape != expected.shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)} in the checkpoint and {list(expected.shape)} in the model; check {hint}."
            )
        if expected.is_floating_point() and not tensor.is_floating_point():
            raise ValueError(f"{name} is of {tensor.dtype} in the checkpoint; expected floats, not quantized weights.")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(
                f"{name} has NaN or infinite values in the checkpoint: its training diverged, or it is damaged."
            )


def _dtype(args: ConvertArguments, tensors: dict[str, Tensor]) -> torch.dtype:
    if args.dtype is not None:
        return getattr(torch, args.dtype)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    widest = reduce(torch.promote_types, dtypes or {torch.float32})
    if len(dtypes) > 1:
        args.assumed.append(f"all weights become {widest}, the widest of the checkpoint; --dtype says another")
    return widest


def convert_encoder(
    args: ConvertArguments, checkpoint: Checkpoint
) -> tuple[PreTrainedModel, ECGFeatureExtractor, Conversion]:
    """The ECG encoder of a checkpoint that holds it alone, and the feature extractor that prepares records as it expects.

    Raises:
        ValueError: the options do not fit the checkpoint, or something is missing.
    """
    if not args.says_encoder or args.encoder not in ENCODER_MODELS:
        given = args.encoder if args.says_encoder else None
        raise ValueError(
            f"The checkpoint holds no language model ({LLM_PREFIX}...), so an encoder alone, and --encoder is {given}; expected "
            f"one of {', '.join(ENCODER_MODELS)}."
        )
    if args.llm or args.representation != "signal":
        option = "--llm" if args.llm else f"--representation {args.representation}"
        raise ValueError(
            f"The checkpoint holds no language model ({LLM_PREFIX}...); leave {option} out if it is an encoder alone."
        )
    conversion = convert_part(args.encoder, checkpoint.tensors)
    _check_missing(conversion, f"a {args.encoder} encoder")
    config = ENCODER_CONFIGS[args.encoder](**encoder_fields(args, conversion.tensors))
    with torch.device("meta"):
        model = ENCODER_MODELS[args.encoder](config)
    _check_tensors(conversion.tensors, model, "--encoder and --encoder_config")
    dtype = _dtype(args, conversion.tensors)
    weights = {
        name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
        for name, tensor in conversion.tensors.items()
    }
    model.load_state_dict(weights, assign=True)
    assert args.lead_names is not None  # set with the arguments, as is the normalization
    feature_extractor = ECGFeatureExtractor(
        sampling_rate=args.sampling_rate,
        num_samples=args.num_samples,
        lead_names=args.lead_names,
        normalization=args.normalization or "none",
    )
    return model.eval(), feature_extractor, conversion


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
        elif why is not None:
            part.ignored[key] = why
        else:
            part.left_over.append(key)
    part.missing = sorted(expected.keys() - part.tensors.keys())
    return part


def _convert_llm(
    args: ConvertArguments, model: ELMForConditionalGeneration, state_dict: dict[str, Tensor]
) -> Conversion:
    lora = merge_lora(_state_dict_of(PEFT_PREFIX, state_dict) or state_dict, args.lora_alpha, args.use_rslora)
    if lora.ranks:
        ranks = ", ".join(map(str, sorted(lora.ranks)))
        args.assumed.append(f"LoRA of rank {ranks} has alpha {args.lora_alpha:g}; --lora_alpha says another")
    part = Conversion()
    expected = model.state_dict().keys()
    body = f"{model.model.language_model.base_model_prefix}."
    names: dict[str, str] = {}
    for key, tensor in lora.tensors.items():
        ours = f"model.language_model.{key.removeprefix(body)}" if key.startswith(body) else key
        if ours in expected:
            part.tensors[ours], names[key] = tensor, ours
    peft = PEFT_PREFIX if any(key.startswith(PEFT_PREFIX) for key in state_dict) else ""
    for entry, target in lora.used.items():
        key, _, merged = target.partition(" ")
        if key in names:
            part.used[peft + entry] = f"{names[key]} {merged}".strip()
        elif key.endswith("rotary_emb.inv_freq"):
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


def _names_of_rows(added_tokens: list[str], ecg_byte: ECGByteTokenizer | None) -> list[str]:
    """The tokens that a run added, one a row. The reference's have a row for each of the 256 bytes, of which ECGs take 26."""
    rows: list[str] = []
    for token in added_tokens:
        if token == ECG_TOKENS and ecg_byte is not None:
            rows += [f"signal_{token_id}" for token_id in range(FIRST_MERGE_ID + len(ecg_byte.merges))]
        else:
            rows.append(token)
    return rows


def _fit_vocabulary(
    args: ConvertArguments, model: ELMForConditionalGeneration, processor: ELMProcessor, part: Conversion
) -> None:
    """Gives embeddings and head of the checkpoint the rows of ours; rows that it has not stay as they are in the base model.

    Raises:
        ValueError: its rows are not those of the tokens, or it has a head of its own where ours is tied.
    """
    embeddings = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    name, head = f"{embeddings}.weight", "lm_head.weight"
    if model.config.tie_word_embeddings:
        if name in part.tensors and head in part.tensors and not torch.equal(part.tensors[name], part.tensors[head]):
            raise ValueError(
                f"The head of the checkpoint is not its embeddings, which --llm {args.llm} ties; check --llm."
            )
        known = [key for key in (name, head) if key in part.tensors][:1]
        if known:
            part.tensors[name] = part.tensors[head] = part.tensors[known[0]]
            part.missing = [key for key in part.missing if key not in (name, head)]
    first_added = processor.ecg_token_id  # the first that our processor adds, behind the language model's own
    vocabulary, symbolic = processor.tokenizer.get_vocab(), processor.ecg_tokenizer is not None
    ids = [vocabulary.get(token) for token in _names_of_rows(args.added_tokens, processor.ecg_tokenizer)]
    current = model.state_dict()
    for key in (name, head):
        if key not in part.tensors:
            continue
        theirs, ours = part.tensors[key], current[key]
        rows = len(theirs)
        if theirs.shape[1:] != ours.shape[1:]:
            continue  # an error of its own, with all shapes
        expected = first_added + len(ids)
        # fewer than the language model's own are of a smaller vocabulary, as many as ours are spare ones
        if (rows < expected and (rows > first_added or symbolic)) or (rows > expected and rows != len(ours)):
            raise ValueError(
                f"{key} has {rows} rows in the checkpoint, and --llm {args.llm} with {' '.join(args.added_tokens)} needs "
                f"{expected}; check --llm{' and --ecg_tokenizer' if symbolic else ''}, or name all tokens that the run added, in "
                "order, as --added_tokens."
            )
        fitted = ours.clone()
        fitted[: min(rows, len(ours))] = theirs[: len(ours)].to(ours.dtype)
        for place, token_id in enumerate(ids, start=first_added):
            if place < rows and token_id is not None:
                fitted[token_id] = theirs[place].to(ours.dtype)
        part.tensors[key] = fitted
        if rows < len(ours) and key == name:
            args.assumed.append(
                f"the vocabulary of the checkpoint has {rows} rows; the other {len(ours) - rows} of {len(ours)} are those of {shown(args.llm)}"
            )


def convert_elm(
    args: ConvertArguments, checkpoint: Checkpoint
) -> tuple[ELMForConditionalGeneration, ELMProcessor, Conversion]:
    """A whole ELM: encoder, connector and language model, and the processor that they need.

    Raises:
        ValueError: the options do not fit the checkpoint, or something is missing.
    """
    tensors, conversion = checkpoint.tensors, Conversion()
    if not args.llm:
        raise ValueError(f"The checkpoint holds a language model ({LLM_PREFIX}...); say which as --llm.")
    llava = args.architecture == "llava"
    if llava and not args.says_encoder:
        raise ValueError("--encoder is missing; say which the ELM was trained with.")
    encoder = _state_dict_of(ENCODER_PREFIX, tensors)
    of_ecg = llava and args.representation not in IMAGE_REPRESENTATIONS
    if of_ecg and args.encoder in ENCODER_MODELS and args.encoder_name_or_path is None:
        part = convert_part(args.encoder, encoder)
        _check_missing(part, f"a {args.encoder} encoder")
        args.encoder_fields = encoder_fields(args, part.tensors)
        conversion.add(part, ENCODER_PREFIX, "model.encoder.")
    elif of_ecg and args.encoder_name_or_path is not None:
        raise ValueError(
            "The checkpoint holds the encoder's weights; leave --encoder_name_or_path out and say its kind as --encoder."
        )
    elif of_ecg:
        raise ValueError(f"--encoder is {args.encoder} for signal ECGs; expected one of {', '.join(ENCODER_MODELS)}.")
    if args.connector is not None:
        prefix = CONNECTOR_PREFIXES[str(args.architecture)]
        part = convert_part(args.connector, _state_dict_of(prefix, tensors))
        _check_missing(part, f"the {args.connector} connector ({prefix}...)")
        conversion.add(part, prefix, "model.connector.")
        if args.connector == "patch":
            assert args.lead_names is not None
            patches = len(args.lead_names) * args.num_samples / part.tensors["projection.weight"].shape[1]
            if (args.says_num_ecg_tokens and patches != args.num_ecg_tokens) or patches != int(patches):
                raise ValueError(
                    f"The patch connector makes {patches:g} tokens of {len(args.lead_names)} leads x {args.num_samples} samples, and "
                    f"--num_encoder_tokens is {args.num_ecg_tokens}; check it and --segment_len."
                )
            args.num_ecg_tokens = int(patches)
        elif args.connector != "flat" and args.image_features != "embedding" and not args.says_num_ecg_tokens:
            args.assumed.append(f"{args.num_ecg_tokens} tokens an ECG; --num_encoder_tokens says another number")

    if args.connector in ("patch", "conv") or (args.encoder == "merl" and of_ecg) or args.representation == "symbolic":
        args.assumed.append(f"{args.num_samples} samples a lead; --segment_len says another number")
    processor = build_processor(args)
    others = [token for token in args.added_tokens if token != ECG_TOKENS]
    known = AutoTokenizer.from_pretrained(resolve_llm(args.llm)).get_vocab()
    if not_added := [token for token in others if token in known]:
        raise ValueError(
            f"--added_tokens {' '.join(not_added)}: --llm {args.llm} has it already, so that the run added no row for it; leave it out."
        )
    processor.tokenizer.add_tokens(others, special_tokens=True)
    if processor.ecg_tokenizer is not None:
        if not processor.ecg_tokenizer.across_leads:
            raise ValueError(
                f"--ecg_tokenizer {args.ecg_tokenizer} keeps within leads, and those of the reference run on from one lead into the "
                "next; give the one that the run had."
            )
        count = FIRST_MERGE_ID + len(processor.ecg_tokenizer.merges)
        args.assumed.append(
            f"rows of the added tokens in the order {' '.join(args.added_tokens)}, {ECG_TOKENS} being signal_0 to signal_{count - 1}; a "
            "wrong order is not noticed, so compare an answer with the reference's"
        )
    dtype = str(_dtype(args, tensors)).removeprefix("torch.")
    model = build_model(args, processor, dtype=dtype).eval()
    if llava and not of_ecg:
        tower = model.model.encoder
        part = _convert_vision(tower, encoder)
        if tower.config.model_type == "vit" and args.image_features == "embedding":  # the mean of its layers
            part.missing = [name for name in part.missing if not name.startswith("pooler.")]
        _check_missing(part, f"the vision tower of {args.encoder_name_or_path or args.encoder}")
        conversion.add(part, ENCODER_PREFIX, "model.encoder.")
    part = _convert_llm(args, model, _state_dict_of(LLM_PREFIX, tensors))
    _fit_vocabulary(args, model, processor, part)
    _check_missing(part, f"--llm {args.llm}")
    conversion.add(part, LLM_PREFIX, "")
    seen = conversion.used.keys() | conversion.ignored.keys() | set(conversion.left_over)
    conversion.left_over += [key for key in tensors if key not in seen]
    _check_tensors(conversion.tensors, model, "--llm, --elm, --encoder, --segment_len and --num_encoder_tokens")
    model.load_state_dict(conversion.tensors, strict=False)  # what is missing was checked
    return model, processor, conversion


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
        return folder_card(folder, "encoder", config, name, source=source)
    assumed = "".join(f"\n- {line}" for line in args.assumed)
    source += f" Assumed were:\n{assumed}" if assumed else ""
    return folder_card(folder, "model", config, name, preparation, resolve_llm(args.llm), source)


def parse(argv: list[str] | None = None) -> tuple[Path, ConvertArguments]:
    """The checkpoint, and what the command line says of it."""
    parser = ELMParser(
        ConvertArguments,
        prog="elm convert",
        description="A checkpoint of ELM-Research/ELM as a folder that from_pretrained loads.",
    )
    parser.add_argument("checkpoint", type=Path, help=".pt or .safetensors of a whole ELM, or of an ECG encoder alone")
    args, rest = parser.parse_args_and_config(argv)
    return rest.checkpoint, args


def main(argv: list[str] | None = None) -> None:
    path, args = parse(argv)
    output_dir = Path(args.output_dir).absolute()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"--output_dir {args.output_dir} is not empty; name a new folder.")
    checkpoint = read_checkpoint(path)
    model: PreTrainedModel
    preparation: ELMProcessor | ECGFeatureExtractor
    if any(key.startswith(LLM_PREFIX) for key in checkpoint.tensors):
        model, preparation, conversion = convert_elm(args, checkpoint)
    else:
        model, preparation, conversion = convert_encoder(args, checkpoint)
    missing = sorted(model.state_dict().keys() - conversion.tensors.keys())
    names = checkpoint.names
    left_over = sorted(names[key] for key in conversion.left_over)
    report = {
        "checkpoint": path.name,
        "not_weights": checkpoint.others,
        "assumed": args.assumed,
        "left_over": left_over,
        "missing": missing,
        "ignored": {names[key]: why for key, why in conversion.ignored.items()},
        "used": {names[key]: ours for key, ours in conversion.used.items()},
    }
    with new_folder(output_dir) as folder:
        model.save_pretrained(folder)
        preparation.save_pretrained(folder)
        card_of(folder, args, path.name, model.config, preparation).save(folder / CARD)
        write_text(folder / "conversion.json", json.dumps(report, indent=2) + "\n")
    print(
        f"{len(names):,} entries: {len(conversion.used):,} used, {len(conversion.ignored):,} not needed, {len(missing)} missing"
    )
    for title, lines in (
        ("Not needed", sorted(set(conversion.ignored.values()))),
        ("Not weights, left out", checkpoint.others),
        ("Left over, unknown", left_over[:10]),
        ("Missing and not needed, as in the base model", missing[:10]),
        ("Assumed", args.assumed),
    ):
        for line in lines:
            print(f"{title}: {line}")
    print(f"Saved to {output_dir}; every key is in its conversion.json", flush=True)


if __name__ == "__main__":
    main()
