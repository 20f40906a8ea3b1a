"""Checkpoints of the reference system: read without running anything, prefixes stripped, LoRA merged."""

import pickle
import re
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

STATE_DICT = "model_state_dict"
# a moving average of the same weights, beside them
AVERAGES = ("ema_state_dict", "ema_model_state_dict", "ema")
# what torch and safetensors raise on damaged files
DAMAGE: tuple[type[Exception], ...] = (SafetensorError, struct.error, ArithmeticError, AssertionError, AttributeError)
DAMAGE += (EOFError, LookupError, MemoryError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile)


@dataclass
class Checkpoint:
    """The weights of a checkpoint file.

    Args:
        tensors: entry without the `module.` and `_orig_mod.` of DDP and of compiled models -> its tensor.
        names: the same entry -> its name in the file.
        others: what the file holds beside the weights, such as the state of the optimizer.
        average: where the file holds a moving average, its name; None if there is none.
        is_average: whether these weights are the average.
    """

    tensors: dict[str, Tensor]
    names: dict[str, str]
    others: list[str] = field(default_factory=list)
    average: str | None = None
    is_average: bool = False


def plain_key(key: str) -> str:
    """The key without the prefixes of DDP and of compiled models, wherever they stand in it."""
    return re.sub(r"(^|(?<=\.))((module|_orig_mod)\.)+", "", key)


def _check_archive(path: Path) -> None:
    """A zip archive as torch writes it, whose parts are mapped as they are: nothing of it may be compressed or damaged.

    Raises:
        ValueError: something is.
        zipfile.BadZipFile, OSError: it is no archive, or cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        compressed = [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]
        if compressed:
            raise ValueError(f"{compressed[0]} in it is compressed; expected an archive as torch.save writes it")
        if damaged := archive.testzip():  # reads all of it; torch compares no checksums of what it maps
            raise ValueError(f"{damaged} in it is not what its checksum says")


def _load(path: Path) -> Any:
    """What the file holds. Of pickles only tensors and plain containers are admitted, so nothing in them is executed."""
    if path.suffix == ".pkl":
        raise ValueError(
            f"{path} is a .pkl file; expected a checkpoint, .pt or .safetensors. ECG-Byte tokenizers are imported with "
            "`elm tokenizer import`."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        archive = zipfile.is_zipfile(path)  # torch writes them since 1.6; older files cannot be mapped
        if archive:
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        # torch's text goes on to say how to load it all the same, which would run the file's code
        refused = re.search(r"GLOBAL [\w.]+|Unsupported (?:operand|class) \S+", str(error))
        raise ValueError(
            f"{path} is refused: expected tensors, numbers, strings, dicts and lists alone, anything else could run code"
            f"{f' ({refused[0]})' if refused else ''}. Nothing of it was executed."
        ) from error
    except OSError:
        raise
    except DAMAGE as error:
        raise ValueError(f"{path} is no checkpoint of PyTorch or safetensors, or is damaged: {error}") from error


def read_checkpoint(path: Path, weights: str | None = None) -> Checkpoint:
    """Reads a `.pt` file of the reference, or a state dict as `.pt` or `.safetensors`.

    Args:
        weights: `ema`, a moving average (what it lacks, such as the statistics of batch norms, is the model's own), or `model`. None:
            `ema` where there is one.

    Raises:
        ValueError: the file is damaged, holds anything that could run code, no state dict, or no moving average that was asked for.
        OSError: it cannot be read.
    """
    content: Any = _load(path)
    others: list[str] = []
    average: str | None = None
    averaged: dict[Any, Any] = {}
    if isinstance(content, dict):
        average = next((name for name in AVERAGES if isinstance(content.get(name), dict)), None)
    is_average = average is not None if weights is None else weights == "ema"
    if is_average and average is None:
        raise ValueError(
            f"--weights ema, and {path} holds no moving average ({', '.join(AVERAGES)}); leave the option out for the model's own weights."
        )
    if isinstance(content, dict) and (STATE_DICT in content or average is not None):
        used = {STATE_DICT, average} if is_average else {STATE_DICT}
        others = [str(name) for name in content if name not in used]
        content, averaged = content.get(STATE_DICT), content.get(average) or {}
    if not (isinstance(content, dict) and content) and not is_average:
        raise ValueError(f"{path} holds no state dict; expected a dict of tensors, or one under {STATE_DICT!r}.")
    tensors, names = _checked(path, content or {})
    if is_average:
        nested = [name for name, value in averaged.items() if isinstance(value, dict)]
        if len(nested) == 1:  # beside the decay, for example
            others += [f"{average}.{name}" for name in averaged if name not in nested]
            averaged = averaged[nested[0]]
        try:
            of_average, names_of_average = _checked(path, averaged)
        except ValueError as error:
            raise ValueError(f"The moving average {average!r}: {error} Or take --weights model.") from error
        if of_average.pop("n_averaged", None) is not None:  # of torch's AveragedModel, a number of steps
            others.append(f"{average}.{names_of_average.pop('n_averaged')}")
        tensors, names = tensors | of_average, names | names_of_average
    return Checkpoint(tensors, names, others, average, is_average)


def _checked(path: Path, state_dict: dict[Any, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the names of a `Checkpoint`; ValueError for an entry that is no plain weight."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for name, tensor in state_dict.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise ValueError(
                f"{path}: the entry {name!r} is a {type(tensor).__name__}; expected names of tensors alone, or a state dict "
                f"under {STATE_DICT!r}."
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"{path}: {name} is sparse, quantized or without values; expected plain weights.")
        if tensor.is_floating_point() and tensor.element_size() < 2:
            raise ValueError(f"{path}: {name} is of {tensor.dtype}; expected float16, bfloat16, float32 or float64.")
        # an expanded view takes memory that its file never had
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} claims more values than the file holds.")
        key = plain_key(name)
        if key in tensors:
            raise ValueError(f"{path} has two entries for {key}: {names[key]} and {name}.")
        tensors[key], names[key] = tensor.detach(), name  # a Parameter becomes a tensor
    return tensors, names


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


def merge_lora(state_dict: dict[str, Tensor], alpha: float, use_rslora: bool = False) -> tuple[Conversion, set[int]]:
    """W + (alpha / rank) B A for every weight W that has an adapter (LoRA, arXiv 2106.09685), which becomes float32:
    bfloat16 would round most of an update away.

    Args:
        state_dict: of the adapted model, without PEFT's `base_model.model.`. One without adapters comes back as it is.
        use_rslora: the scale is alpha / sqrt(rank) (arXiv 2312.03732).

    Returns:
        The weights under the names of the model that was adapted, and the ranks of the adapters.

    Raises:
        ValueError: half of an adapter is missing or of another shape, there are several for one weight, or one of a kind that is
            not known.
    """
    merged, ranks = Conversion(), set()
    adapters: dict[str, dict[str, str]] = {}  # weight -> A or B -> entry
    for key, tensor in state_dict.items():
        if match := re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.(?!weight$)[^.]+)?(?:\.weight)?", key):
            halves = adapters.setdefault(f"{match[1]}.weight", {})  # PEFT: NAME.lora_A.ADAPTER.weight
            if match[2] in halves:
                raise ValueError(f"{match[1]} has several adapters ({halves[match[2]]}, {key}); expected one.")
            halves[match[2]] = key
        elif ".lora_" in key or ".trainable_tokens_" in key:  # DoRA's magnitudes, biases of LoRA
            raise ValueError(f"{key}: no adapter that can be merged; expected lora_A and lora_B.")
        elif re.search(r"\.original_module\.", key):
            merged.ignored[key] = "PEFT trained a copy of this module, which is used"
        else:
            name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", key).replace(".base_layer.", ".")
            if name in merged.tensors:
                raise ValueError(f"There are two entries for {name}, one of them {key}; expected one.")
            merged.tensors[name], merged.used[key] = tensor, name
    for name, halves in adapters.items():
        if halves.keys() != {"A", "B"} or name not in merged.tensors:
            raise ValueError(f"{', '.join(halves.values())}: expected lora_A, lora_B and the weight that they adapt.")
        a, b, weight = state_dict[halves["A"]], state_dict[halves["B"]], merged.tensors[name]
        update = b.float() @ a.float() if a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] else a.new_empty(0)
        if "lora_embedding_A" in halves["A"]:
            update = update.T  # A of an embedding is [rank, vocabulary], its weight [vocabulary, width]
        if update.shape != weight.shape or not a.numel():  # a rank of 0 has no scale
            raise ValueError(
                f"{halves['A']} {list(a.shape)} and {halves['B']} {list(b.shape)} do not fit {name} {list(weight.shape)}."
            )
        rank = a.shape[0]
        scale = alpha / (rank**0.5 if use_rslora else rank)
        merged.tensors[name] = weight.float() + scale * update
        merged.used |= dict.fromkeys(halves.values(), f"{name} (merged)")
        ranks.add(rank)
    return merged, ranks
