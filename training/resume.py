"""What a training run was begun with, and which of its checkpoints it can go on from."""

import hashlib
import json
import os
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from elm_ecg.training.data import records
from elm_ecg.training.digest import OPTIONS_FILE
from elm_ecg.training.files import write_text

logger = get_logger(__name__)  # of several processes the first speaks

# options that say nothing of the run itself, or are nobody else's business
NOT_KEPT = {"hub_token", "resume_from_checkpoint", "local_rank"}
# options that may differ when a run goes on, because they change what is written, shown or measured, how far it goes, or how
# fast; all others are part of what a step does, and most of them the optimizer and the scheduler have from the checkpoint
MAY_DIFFER = re.compile(
    r"output_dir|run_name|project|report_to|wandb|distributed|disable_tqdm|debug|do_(train|eval|predict)|use_cpu|max_steps"
    r"|num_train_epochs|per_device_eval_batch_size|prediction_loss_only|load_best_model_at_end|metric_for_best_model"
    r"|greater_is_better|ignore_data_skip|restore_callback_states_from_checkpoint|skip_memory_metrics|attn_implementation"
    r"|(gradient|activation)_checkpointing(_kwargs)?|activation_offloading|torch_compile\w*|torch_empty_cache_steps|use_cache"
    r"|dataset_num_proc|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor|multiprocessing_context)"
    r"|padding_free|packing(_strategy)?"
    r"|cache_features|num_pictures|num_completions_to_print|(log|logging|save|eval|hub|push|trackio|ddp|include|batch_eval|enable_jit|draw)_\w+"
)
# where these are is no matter: the fingerprint tells whether the rows are the same
OF_DATA = ("data", "ecg_root")
# names of what is read, or its folders and files, which may be written in several ways
PLACES = (
    *OF_DATA,
    "model_name_or_path",
    "llm",
    "encoder",
    "encoder_name_or_path",
    "ecg_tokenizer",
    "text_encoder",
    "chat_template_path",
    "connector",
    "rewards",
)
STREAMED = ("dataloader_num_workers",)  # beside all others: the order of a stream depends on it
FINGERPRINTED = 100  # ECGs, of all places of the data


@dataclass
class RunOptions:
    """What a run was begun with, as `OPTIONS_FILE` beside its weights and in its checkpoints tells it.

    Args:
        options: every option of the command by its name, secrets left out, and how many processes there were.
        data: `rows` and `fingerprint` of the training data; None for a stream.
        started: when the run was begun; it tells the checkpoints of two runs in one folder apart.
        base: what the base of an adapter is made of, see `base_models`; None of another model, or where the base was saved before.
        working_dir: where relative paths of the options begin; "" of those that were saved without, which begin where this process is.
    """

    options: dict[str, Any]
    data: dict[str, Any] | None
    started: str
    base: dict[str, Any] | None = None
    working_dir: str = ""

    @classmethod
    def of(cls, *parts: Any) -> "RunOptions":
        """Those of a command line, in the dataclasses of its arguments, one of which is `TrainingArguments`; `data` is not known yet."""
        (training_args,) = (part for part in parts if isinstance(part, TrainingArguments))
        options = {
            option.name: getattr(part, option.name)
            for part in parts
            for option in fields(part)
            if option.name not in NOT_KEPT
        }
        options["num_processes"] = training_args.world_size
        # of `accelerate launch`, which tells them by its environment: by these a checkpoint has other files
        by_fsdp, by_deepspeed = (os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
        options["fsdp_state_dict_type"] = os.environ.get("FSDP_STATE_DICT_TYPE") if by_fsdp else None
        options["zero_stage"] = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") if by_deepspeed else None
        options = json.loads(json.dumps(options, default=_plain))  # as it will be read
        return cls(options, None, datetime.now(UTC).isoformat(), working_dir=os.getcwd())

    @classmethod
    def read(cls, folder: Path) -> "RunOptions | None":
        """Those of a checkpoint or model; None where there are none, as with other trainers.

        Raises:
            ValueError: the file is damaged.
        """
        path = folder / OPTIONS_FILE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            options, started = dict(content["options"]), str(content["started"])
            return cls(options, content["data"], started, content.get("base"), str(content.get("working_dir", "")))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def save(self, folder: Path) -> None:
        """Writes `OPTIONS_FILE`."""
        packages = {name: version(name) for name in ("elm-ecg", "torch", "transformers", "trl", "peft")}
        content = {"started": self.started, "packages": packages, "data": self.data, "options": self.options}
        content["working_dir"] = self.working_dir
        content |= {} if self.base is None else {"base": self.base}
        write_text(folder / OPTIONS_FILE, json.dumps(content, indent=2) + "\n")

    def go_on(self, checkpoint: Path) -> None:
        """Compares these options with those of the checkpoint that they go on from, and says what differs.

        Raises:
            ValueError: some of what differs would be without effect, or not go with what is saved.
        """
        saved = RunOptions.read(checkpoint)
        if saved is None:
            logger.warning("%s does not say how it was made (%s), so nothing is compared.", checkpoint, OPTIONS_FILE)
            return
        self.started = saved.started
        differ = [
            name
            for name in self.options
            if name in saved.options and not _same(name, self.options[name], saved.options[name], saved.working_dir)
        ]
        streaming = self.options["streaming"]
        same_rows = not streaming and self.data is None  # not yet known: `go_on_with` compares them
        may = {name for name in differ if MAY_DIFFER.fullmatch(name) or (same_rows and name in OF_DATA)}
        may -= set(STREAMED if streaming else ())
        refused = _told(saved.options, self.options, [name for name in differ if name not in may])
        if refused:
            raise ValueError(
                f"--resume_from_checkpoint {checkpoint}: the run was begun with {refused}. A run goes on with what it was begun "
                "with: say the same as then, or begin a new one in another --output_dir."
            )
        if may:
            logger.warning(
                "Going on from %s, which was made with %s.", checkpoint, _told(saved.options, self.options, differ)
            )

    def go_on_with(self, checkpoint: Path) -> None:
        """Compares the training data with those of the checkpoint.

        Raises:
            ValueError: they are others.
        """
        saved = RunOptions.read(checkpoint)
        if saved is not None and saved.data != self.data:
            there, here = (f"{data['rows']:,} rows" if data else "a stream" for data in (saved.data, self.data))
            raise ValueError(
                f"--resume_from_checkpoint {checkpoint}: the run was begun with other training data ({there} of --data "
                f"{_word(saved.options['data'])}; now {here} of --data {_word(self.options['data'])}, with other content). Name "
                "those data, or begin a new run in another --output_dir."
            )


def _same(name: str, one: Any, other: Any, working_dir: str) -> bool:
    """Whether two values of an option are the same: the same words, as those of a project that was moved, or for places words that lead to
    one place, the `other` from `working_dir`."""
    if one == other or name not in PLACES:
        return one == other
    ones, others = (value if isinstance(value, list) else [value] for value in (one, other))
    return len(ones) == len(others) and all(
        isinstance(here, str)
        and isinstance(there, str)
        and os.path.realpath(here) == os.path.realpath(os.path.join(working_dir, there))
        for here, there in zip(ones, others, strict=True)
    )


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else str(value)


def _word(value: Any) -> str:
    return "(nothing)" if value in (None, [], "") else " ".join(map(str, value if isinstance(value, list) else [value]))


def _told(old: Mapping[str, Any], new: Mapping[str, Any], names: Iterable[str]) -> str:
    return ", ".join(f"--{name} {_word(old[name])} (now {_word(new[name])})" for name in names)


def fingerprint(data: Dataset, texts: Iterable[str] = ("messages",)) -> dict[str, Any]:
    """Number of rows and a digest of the training data: of all chats, or other columns of `texts`, and of `FINGERPRINTED` ECGs from
    first to last row."""
    digest = hashlib.sha256()
    table = data.with_format("arrow")
    texts = [name for name in texts if name in data.column_names]
    for start in range(0, len(data) if texts else 0, 1000):  # in equal pieces, however the file is cut
        _add(digest, table.select_columns(texts)[start : start + 1000])
    if "ecg" in data.column_names:
        of_ecgs = table.select_columns(["ecg"])
        for row in np.unique(np.linspace(0, len(data) - 1, FINGERPRINTED, dtype=int)):
            ecgs = of_ecgs[int(row) : int(row) + 1]
            paths = ecgs["ecg"].to_pylist()[0]
            for path in paths if isinstance(paths, list) else [paths]:
                if records.is_stored(path):  # wherever it is
                    digest.update(records.read(path)["array"].tobytes())
                elif isinstance(path, str) and Path(path).is_file():
                    digest.update(Path(path).read_bytes())
                else:
                    _add(digest, ecgs)
    return {"rows": len(data), "fingerprint": digest.hexdigest()[:16]}


def _add(digest: Any, table: pa.Table) -> None:
    table = table.combine_chunks().replace_schema_metadata(None)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    digest.update(sink.getvalue())


def checkpoint_to_resume(training_args: TrainingArguments) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names, whole; `last` and `true` are the newest whole one of `--output_dir`.

    Raises:
        ValueError: there is none, or the one that is named cannot be resumed from.
    """
    name = training_args.resume_from_checkpoint
    if name is None or str(name).lower() == "false":
        return None
    if str(name).lower() not in ("true", "last"):  # YAML's true is a bool
        folder = Path(str(name))
        if not folder.is_dir():
            raise ValueError(f"--resume_from_checkpoint {name}: there is no such folder.")
        if fault := fault_of(folder, training_args.world_size):
            raise ValueError(f"--resume_from_checkpoint {name} cannot be resumed from: {fault}.")
        return folder
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = []
    for folder in Path(str(training_args.output_dir)).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (match := pattern.fullmatch(folder.name)) and folder.is_dir():
            fault = fault_of(folder, training_args.world_size)
            # of two runs in one folder the later one, and of that its last step
            started = "" if fault or not (options := RunOptions.read(folder)) else options.started
            found.append((fault is None, started, int(match[1]), folder, fault))
    if not found:
        raise ValueError(f"--resume_from_checkpoint: no checkpoint in {training_args.output_dir}.")
    whole, _, _, newest, fault = max(found, key=lambda one: one[:3])
    if not whole:
        raise ValueError(
            f"--resume_from_checkpoint: no checkpoint in {training_args.output_dir} is whole. {newest}: {fault}."
        )
    for _, _, _, folder, fault in sorted(found, key=lambda one: one[2]):
        if fault:
            logger.warning("%s cannot be resumed from: %s. Going on from %s.", folder, fault, newest)
    return newest


def fault_of(folder: Path, num_processes: int = 1) -> str | None:
    """Why a run cannot go on from a checkpoint, as a part of a sentence; None if it can.

    Each file is looked at without running what it holds: JSON is parsed, the header of safetensors compared with the length of
    the file, and the checksums of PyTorch's files, which are zip archives, with their content.
    """
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*"), *folder.glob("global_step*")]
    needed = [] if weights else ["model.safetensors"]
    optimizer = ["optimizer.pt", "scheduler.pt"]
    if (folder / "pytorch_model_fsdp.bin").exists():  # of FSDP with FULL_STATE_DICT
        optimizer[0] = "optimizer.bin"
    elif (folder / "pytorch_model_fsdp_0").exists():  # with SHARDED_STATE_DICT; PyTorch writes .metadata last
        optimizer[:1] = ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"]
    elif list(folder.glob("global_step*")):  # of DeepSpeed, which may have no scheduler
        optimizer = ["latest"]
    random_states = (
        ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{rank}.pth" for rank in range(num_processes)]
    )
    state = optimizer + random_states
    needed += [name for name in ("trainer_state.json", *state) if not (folder / name).is_file()]
    if len(random_states) > 1 and (folder / "rng_state.pth").is_file():
        return f"one process made it, and now there are {num_processes}"
    if num_processes == 1 and not (folder / "rng_state.pth").is_file() and list(folder.glob("rng_state_*.pth")):
        return "several processes made it, and now there is one"
    if set(state) and set(state) <= set(needed) and (folder / "trainer_state.json").is_file():
        return "it holds weights alone (--save_only_model); --model_name_or_path begins a new run from them"
    for index in folder.glob("*.safetensors.index.json"):
        shards = set((_json(index) or {}).get("weight_map", {}).values())
        needed += sorted(name for name in shards if not (folder / name).is_file())
    if needed:
        return f"it lacks {', '.join(needed)}"
    for path in sorted(folder.iterdir()):
        if fault := _fault_of_file(path):
            return f"{path.name} is damaged ({fault})"
    return None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def _fault_of_file(path: Path) -> str | None:
    size = path.stat().st_size
    if path.suffix == ".json" and _json(path) is None:
        return "no JSON"
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
            try:
                header = json.loads(file.read(min(length, size)))
                tensors = [value for name, value in header.items() if name != "__metadata__"]
                expected = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0)
            except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError):
                return "its header is no safetensors"
        return None if size == expected else f"{size:,} bytes of {expected:,}"
    if path.suffix in (".pt", ".pth", ".bin"):
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except zipfile.BadZipFile:
            return "cut short"
        return broken and f"{broken} has another checksum"
    return None
