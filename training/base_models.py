"""The base of a LoRA adapter: a new ELM of pretrained parts, written once and shared by all runs that adapt the same.

Where it is gone, `load_elm` makes it again. transformers and PEFT cannot: they look for the base before they read any code of the
adapter's folder, so the adapter's card tells it.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from copy import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import WeakFileLock
from transformers import CONFIG_MAPPING, PreTrainedConfig

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.modeling_connectors import OWN_CONNECTORS, adopt_connector_class
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.own_code import digest_of_code, load_own_class
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.arguments import ModelArguments
from elm_ecg.training.build import build_around, connector_file, elm_fields, place_of_encoder
from elm_ecg.training.digest import files_of_model, shared_bases
from elm_ecg.training.files import UNFINISHED, let_others_read_weights, naming, read_json, write_text
from elm_ecg.training.llms import place_of_llm
from elm_ecg.training.model_files import find_model_file

logger = logging.getLogger(__name__)

RECIPE_FILE = "base_model.json"
BASE_OF_ONE = "base_model"  # folder beside an adapter, of a base that no other run shares
SHARD_SIZE = "5GB"


def recipe_of(args: ModelArguments, processor: ELMProcessor, revision: str = "main") -> dict[str, Any]:
    """What the base of an adapter is made of, as JSON: `llm` and `encoder` with what they hold, `fields` of the configuration, and the
    `name` of its folder, which depends on all of that and on the processor.

    New parts are no part of it: the adapter holds them. So it does not depend on the seed, nor on `--dtype`.
    """
    places = {"llm": place_of_llm(args, revision), "encoder": place_of_encoder(args)}
    recipe: dict[str, Any] = {
        name: None if place is None else _pinned(place, revision) for name, place in places.items()
    }
    fields = elm_fields(args, processor)
    if "encoder_config" in fields:
        fields["encoder_config"] = fields["encoder_config"].to_dict()
    recipe["fields"] = json.loads(json.dumps(fields))
    if (file := connector_file(args)) is not None:
        recipe["connector"] = {
            "place": str(file.absolute()),
            "code": digest_of_code(OWN_CONNECTORS[fields["connector"]]),
        }
    # where a folder lies is no matter
    parts = [None if part is None else part if part["commit"] else part["content"] for part in map(recipe.get, places)]
    parts += [recipe["connector"]["code"]] if "connector" in recipe else []
    digest = hashlib.sha256(json.dumps([*parts, recipe["fields"]], sort_keys=True).encode())
    processor = copy(processor)
    processor.chat_template_origin = None  # names the language model's folder
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in files_of_model(Path(folder)):
            digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    recipe["name"] = digest.hexdigest()[:32]
    return recipe


def _pinned(place: str, revision: str) -> dict[str, str | None]:
    """The `place` of a model, and of a Hub id its `commit`, of a folder a digest of its `content`, weights and configuration."""
    folder = Path(place)
    if not folder.is_dir():
        config, _ = PreTrainedConfig.get_config_dict(place, revision=revision)
        return {"place": place, "commit": config.get("_commit_hash"), "content": None}
    if folder.parent.name == "snapshots":  # of the Hub's cache, read offline
        name = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        return {"place": name, "commit": folder.name, "content": None}
    digest = hashlib.sha256()
    settings = read_json(folder / "config.json")
    encoder_type = (settings.get("encoder_config") or settings).get("model_type")
    known = encoder_type in ENCODER_CONFIGS or encoder_type in CONFIG_MAPPING
    code = [] if known else [*folder.glob("*.py")]  # of somebody's own encoder, by which its weights are read
    for path in sorted([*folder.glob("*.safetensors"), *code, folder / "config.json"]):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return {"place": str(folder.absolute()), "commit": None, "content": f"sha256:{digest.hexdigest()}"}


def find_base(recipe: dict[str, Any], processor: ELMProcessor, trust_remote_code: bool = False) -> Path:
    """The folder of the base that a recipe describes, written if it is not there, in the dtype of its language model.

    Processes that look at once wait for the first.

    Raises:
        ValueError: the parts are no longer what they were.
        OSError: the folder cannot be written.
    """
    folder = shared_bases() / recipe["name"]
    if (folder / "config.json").is_file():
        return folder
    for option, part in (("--llm", recipe["llm"]), ("--encoder_name_or_path", recipe["encoder"])):
        if part is not None:
            place, _ = find_model_file(part["place"], ["config.json"], part["commit"] or "main", option)
            if _pinned(place, part["commit"] or "main") | {"place": part["place"]} != part:
                raise ValueError(
                    f"{option} {part['place']} holds other weights than those that the adapter was trained with; bring those back."
                )
    # what the adapter's own has of its training is not the base's
    processor = copy(processor)
    processor.train_phase, processor.explicit_thinking, processor.system_prompt = None, False, None

    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_suffix(".lock")):
        if (folder / "config.json").is_file():  # another process was faster
            return folder
        # what is random in it is read by nobody, and the same for all seeds
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = _build(recipe, processor, trust_remote_code)
        _write(model, processor, folder, recipe)
    logger.info("Base model of the adapter, which other runs share: %s", folder)
    return folder


def write_merged(model: ELMForConditionalGeneration, processor: ELMProcessor, output_dir: Path) -> Path:
    """The folder of a base that is an older adapter in its own base, written beside the new adapter, as it is of this run alone."""
    folder = output_dir.absolute() / BASE_OF_ONE
    _write(model, processor, folder)
    return folder


def _write(
    model: ELMForConditionalGeneration, processor: ELMProcessor, folder: Path, recipe: dict[str, Any] | None = None
) -> None:
    """Writes a base whole, in place of one that is there."""
    unfinished = folder.with_suffix(UNFINISHED)
    with naming(folder):
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        try:
            model.save_pretrained(unfinished, max_shard_size=SHARD_SIZE)
            processor.save_pretrained(unfinished)
            if recipe is not None:
                write_text(unfinished / RECIPE_FILE, json.dumps(recipe, indent=2) + "\n")
            let_others_read_weights(unfinished)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def read_recipe(name_or_path: str) -> dict[str, Any] | None:
    """The recipe of a base that `find_base` wrote; None of any other model."""
    path = Path(name_or_path) / RECIPE_FILE
    return read_json(path) if path.is_file() else None


def _build(recipe: dict[str, Any], processor: ELMProcessor, trust_remote_code: bool) -> ELMForConditionalGeneration:
    llm, encoder, connector = recipe["llm"], recipe["encoder"], recipe.get("connector")
    if connector is not None:
        file = Path(connector["place"])
        own_class = load_own_class(recipe["fields"]["connector"], file.parent, trust_remote_code)
        if digest_of_code(own_class) != connector["code"]:
            raise ValueError(
                f"--connector {file} is another than that which the adapter was trained with; bring that back."
            )
        adopt_connector_class(own_class)
    return build_around(
        llm["place"],
        None if encoder is None else encoder["place"],
        dict(recipe["fields"]),
        processor,
        trust_remote_code=trust_remote_code,
        dtype="auto",
        revision=llm["commit"] or "main",
    )
