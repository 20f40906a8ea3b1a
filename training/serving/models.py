"""The models of a server by their names; adapters of one base share its weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.load import (
    base_folder_of,
    limit_threads,
    load_elm,
    load_processor,
    load_whole,
    warn_if_untuned,
    with_adapter,
)
from elm_ecg.training.model_files import model_folder

FILES = ["adapter_config.json", "config.json"]


@dataclass
class Place:
    """A model of the command line.

    Args:
        name: by which clients ask for it.
        given: as the command line has it: a local folder or a Hub id.
        folder: where its files are.
        base: of an adapter the folder of its base; of any other model its own.
    """

    name: str
    given: str
    folder: Path
    base: Path

    @property
    def is_adapter(self) -> bool:
        """Whether it is one."""
        return self.folder != self.base


@dataclass
class LoadedModels:
    """A base and what is served of it.

    Args:
        adapters: the model with its adapters, which PEFT knows by the names of their places; None: there are none.
        processors: name -> the processor, and the adapter that it is of.
    """

    model: ELMForConditionalGeneration
    adapters: PeftModel | None
    processors: dict[str, tuple[ELMProcessor, str | None]]


def find_places(models: Sequence[str], revision: str, trust_remote_code: bool) -> list[Place]:
    """Where the models of a command line are.

    Args:
        models: folders or Hub ids, each of which may have a name before it: NAME=PLACE.

    Raises:
        ValueError: there is no such model, or two have one name.
    """
    places: list[Place] = []
    for model in models:
        name, mark, place = model.partition("=")
        if not mark or Path(model).exists():
            place = model
            name = Path(model).resolve().name if Path(model).exists() else model
        folder, filename = model_folder(place, FILES, revision)
        base = folder
        if filename == FILES[0]:
            base, _ = base_folder_of(folder, f"The adapter {place}", trust_remote_code)
        if name in {other.name for other in places}:
            raise ValueError(f"Two models are called {name}; give one another name: NAME={place}.")
        places.append(Place(name, place, folder, base.resolve() if base != folder else folder))
    return places


def load_places(places: Sequence[Place], trust_remote_code: bool, **model_kwargs: Any) -> list[LoadedModels]:
    """All models, those of one base together. An adapter that is alone with its base is merged into it, which is faster."""
    groups: dict[Path, list[Place]] = {}
    for place in places:
        groups.setdefault(place.base.resolve(), []).append(place)
    return [_load(group, trust_remote_code, **model_kwargs) for group in groups.values()]


def _load(group: Sequence[Place], trust_remote_code: bool, **model_kwargs: Any) -> LoadedModels:
    adapters: PeftModel | None = None
    if len(group) == 1:
        (place,) = group
        model, processor = load_elm(str(place.folder), trust_remote_code=trust_remote_code, **model_kwargs)
        processors: dict[str, tuple[ELMProcessor, str | None]] = {place.name: (processor, None)}
    else:
        base = group[0].base
        model = load_whole(base, f"The model {base}", trust_remote_code, **model_kwargs)
        processors = {}
        for place in group:
            label = f"The model {place.given}"
            adapter = f"adapter_{len(processors)}" if place.is_adapter else None  # PEFT's names hold no dots
            processors[place.name] = load_processor(place.folder, label, model), adapter
            if adapter is not None:
                adapters = with_adapter(adapters or model, place.folder, label, adapter)
        for part in (model.model.encoder, model.model.connector, model.model.signal_embeddings):
            if part is not None:
                part.to(model.dtype)  # adapters train them in float32
    for processor, _ in processors.values():
        warn_if_untuned(processor)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # type: ignore[arg-type]  # a wrapped method
    limit_threads(model, model.device)
    return LoadedModels(model, adapters, processors)
