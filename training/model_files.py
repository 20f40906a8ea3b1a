"""The files of a saved model: where they lie, and what is wrong with them."""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import file_exists, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, StrictDataclassClassValidationError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForCausalLM, AutoProcessor, PreTrainedConfig

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.configuration_ecg_pretraining import ECGPretrainingConfig
from elm_ecg.configuration_elm import ELMConfig
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.modeling_common import some_of
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.modeling_parts import load_own_parts, own_encoder_class
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.digest import MODEL_FILES
from elm_ecg.training.files import read_json

# our commands run the code that is installed, not the copy in a model's folder
AutoConfig.register(ELMConfig.model_type, ELMConfig)
AutoConfig.register(ECGPretrainingConfig.model_type, ECGPretrainingConfig)
AutoModelForCausalLM.register(ELMConfig, ELMForConditionalGeneration)
AutoFeatureExtractor.register(ELMConfig, ECGFeatureExtractor)
AutoProcessor.register(ELMConfig, ELMProcessor)

ENCODER_FOLDER = "encoder"  # of the encoder alone, in the folder of a pretraining model
# keys of configurations that say how many modules of a kind there are, each with a weight of its own
MANY_LAYERS = 1000  # building these takes seconds
LAYERS = re.compile(r"(^|_)(n_layers?|num_layers|num_hidden_layers|num_\w+_layers|\w+_layers|depths?|layers)$")


def find_model_file(
    name: str, filenames: Sequence[str], revision: str = "main", label: str = "The model"
) -> tuple[str, str]:
    """Where to load a model from, and the first of the files that it has there.

    That is its local folder or its Hub id; where the Hub cannot be asked, the folder in the Hub's cache. By its id transformers
    would ask for each file anew, and try for half a minute each time.

    Raises:
        ValueError: there is no such model, or it cannot be read; says why and what to do, `label` being what `name` is.
    """
    label, local = f"{label} {name}", Path(name).exists()  # what is here is never looked for on the Hub
    try:
        for filename in filenames:
            if (Path(name) / filename).is_file() or (not local and file_exists(name, filename, revision=revision)):
                return name, filename
    except HFValidationError as error:
        raise ValueError(f"{label} is no folder here, and no id of the Hub such as owner/name.") from error
    except Exception as error:  # no network, no access, a server that fails: errors of several libraries
        for filename in filenames:
            path = try_to_load_from_cache(name, filename, revision=revision)
            if isinstance(path, str):  # may be _CACHED_NO_EXIST
                return str(Path(path).parent), filename
        reason = f"is no folder here and not in the Hub's cache, and the Hub cannot be asked. {error}"
        if isinstance(error, GatedRepoError):
            reason = f"is gated: accept its licence at https://huggingface.co/{name}, then run `hf auth login`."
        raise ValueError(f"{label} {reason}") from error
    if local:
        raise ValueError(f"{label} has no {' and no '.join(filenames)}; expected the folder of a saved model.")
    raise ValueError(
        f"{label} is no folder here, and no model on the Hub with revision {revision}; a private one needs `hf auth login`."
    )


def model_folder(
    name: str, filenames: Sequence[str], revision: str = "main", label: str = "The model"
) -> tuple[Path, str]:
    """As `find_model_file`, with the local folder of a model of the Hub, all of whose files are there."""
    place, filename = find_model_file(name, filenames, revision, label)
    if not Path(place).exists():
        place = snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES)
    return Path(place), filename


@contextmanager
def loading(folder: Path, label: str) -> Iterator[None]:
    """Makes one line of whatever goes wrong while a model is loaded from a folder, and names the file at fault.

    Raises:
        ValueError: the block raised an error.
    """
    log = logging.getLogger("transformers.modeling_utils")  # its table of missing weights becomes an error, too
    log.addFilter(_is_error)  # with a higher level it would begin to tell of tensor parallelism
    try:
        yield
    except Exception as error:  # what damaged files bring about is of any kind
        of_class = isinstance(error, StrictDataclassClassValidationError)  # of a config; its cause says what is wrong
        text = " ".join(str(error.__cause__ if of_class else error).split())
        if "trust_remote_code" in text and "--trust_remote_code" not in text:  # of a processor or a language model
            text = "it comes with code of its own (auto_map), which `elm` does not run."
        reason = damage(folder) or (text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")
        raise ValueError(f"{label} cannot be loaded: {reason[:500]}") from error
    finally:
        log.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def damage(folder: Path) -> str | None:
    """What is wrong with a file of a model's folder, which is named; None where each can be read by itself."""
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
            return f"{path} is damaged: no JSON ({error})."
        if not isinstance(content, dict):
            return f"{path} is damaged: expected a JSON object, got {type(content).__name__}."
    for path in sorted([*folder.glob("*.jinja"), *folder.glob("*.txt")]):
        try:
            path.read_text(encoding="utf-8")
        except ValueError as error:
            return f"{path} is damaged: no text ({error})."
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path} is damaged or incomplete ({error}); copy it again."
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
        if not isinstance(weight_map, dict):
            return f"{index} is damaged: it has no weight_map."
        if missing := sorted(name for name in {*map(str, weight_map.values())} if not (folder / name).is_file()):
            return f"{index} names files that are not there: {some_of(missing)}."
    try:
        if (folder / "tokenizer.json").is_file():
            Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception
        return f"{folder / 'tokenizer.json'} is damaged: no tokenizer ({error})."
    return None


def check_weights(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Compares the weights in a folder's files, of which only the heads are read, with those of the model, which may be on the
    meta device.

    Raises:
        ValueError: one has another shape, or holds whole numbers where the model has floating point ones.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no dict
        for name in parts.keys() & state.keys():
            shape, expected = parts[name].get_shape(), list(state[name].shape)
            if shape != expected:
                raise ValueError(
                    f"{name} is {shape} in {path.name}, and {expected} by the config: they are of different models."
                )
        whole = [
            f"{name} ({part.get_dtype()})"
            for name, part in parts.items()
            if name in state and state[name].is_floating_point() and not part.get_dtype().startswith(("F", "BF"))
        ]
        if whole:
            raise ValueError(
                f"{path.name} holds whole numbers as weights: {some_of(whole)}; expected floating point numbers."
            )


def non_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    found = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.is_meta or tensor.dtype.itemsize < 2:  # float8 has no such test
            continue
        # a sum shows them faster than a test of each number; where it overflows, each is tested
        if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
            found.append(name)
    return found


def check_finite(tensors: Mapping[str, torch.Tensor], label: str) -> None:
    """ValueError if a weight is NaN or infinite."""
    if names := non_finite(tensors):
        raise ValueError(
            f"{label} has weights that are NaN or infinite: {some_of(names)}. Its training has failed: take an earlier "
            "checkpoint, or train again with a lower learning rate."
        )


def check_config(folder: Path, trust_remote_code: bool = False) -> None:
    """ValueError if the configuration in a folder is not of an ELM, or of one with other weights, or has code that may not run.

    It comes before the model: of sizes that somebody has changed, even the random weights may not fit into memory.
    """
    settings = PreTrainedConfig.get_config_dict(folder)[0]
    if (kind := settings.get("model_type")) != ELMConfig.model_type:
        of_ecgs = kind in ENCODER_CONFIGS or kind == ECGPretrainingConfig.model_type
        option, part = ("encoder", "an ECG encoder") if of_ecgs else ("llm", "a language model")
        raise ValueError(
            f"config.json is of a {kind!r} model, not of an ELM; `elm sft --{option} {folder}` makes one around {part}."
        )
    check_depth(folder, settings)
    if "quantization_config" not in settings:  # quantized weights have shapes of their own
        config = ELMConfig.from_pretrained(folder)
        load_own_parts(config, folder, trust_remote_code)
        with torch.device("meta"):
            model = ELMForConditionalGeneration(config)
        check_weights(folder, model.state_dict())


def is_own_encoder(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json, by its content, is of an encoder that comes with code of its own."""
    ours = {*ENCODER_CONFIGS, ELMConfig.model_type, ECGPretrainingConfig.model_type}
    return settings.get("model_type") not in ours and "AutoModel" in (settings.get("auto_map") or {})


def encoder_class_in(folder: Path, trust_remote_code: bool = False) -> Any:
    """The class of the ECG encoder in a folder; ValueError if it is somebody's own and its code is not to be run."""
    settings = read_json(folder / "config.json")
    if is_own_encoder(settings):
        return own_encoder_class(settings["auto_map"], folder, trust_remote_code)
    return ENCODER_MODELS[settings["model_type"]]


def check_depth(folder: Path, settings: Any) -> None:
    """ValueError if a configuration asks for more layers than there are weights: building millions takes hours, even without values."""
    num_weights = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            num_weights += len(file.keys())
    for name, value in _numbers(settings):
        # of few layers the names may say more than there are: Qwen2's max_window_layers is 28, however many it has
        if num_weights and LAYERS.search(name) and value > max(num_weights, MANY_LAYERS):
            raise ValueError(f"config.json says {name} {value}, and its files hold {num_weights} weights.")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """The whole numbers in JSON, of all depths, and the keys that they or their lists stand under."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _numbers(part, key)
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part, name)
    elif isinstance(value, int):
        yield name, value


def check_processor(processor: ELMProcessor, config: ELMConfig) -> None:
    """ValueError if a processor does not go with the model of a configuration."""
    extractor = processor.feature_extractor
    pairs: list[tuple[str, Any, Any]] = [("representation", processor.representation, config.representation)]
    if config.architecture != "text":
        pairs.append(("num_ecg_tokens", processor.num_ecg_tokens, config.num_ecg_tokens))
        pairs.append(("id of the ECG's placeholder", processor.ecg_token_id, config.ecg_token_id))
        if config.representation == "signal":
            pairs.append(("number of leads", len(extractor.lead_names), config.num_leads))
            pairs.append(("num_samples", extractor.num_samples, config.num_samples))
    for name, of_processor, of_model in pairs:
        if of_processor != of_model:
            raise ValueError(
                f"the processor's {name} is {of_processor}, the model's {of_model} (processor_config.json and config.json); "
                "take the processor that was saved with the model."
            )
    vocabulary, own = config.get_text_config().vocab_size, config.signal_token_ids
    if own and list(own) != processor.signal_token_ids:
        raise ValueError(
            f"the ids of the processor's ECG tokens are not {own.start} to {own.stop - 1}, as the model's are; take the processor that "
            "was saved with the model."
        )
    # special tokens may have no row: ECGs stand at placeholders, and some language models share the tokens of another that sees
    added = [
        token_id
        for token_id, token in processor.tokenizer.added_tokens_decoder.items()
        if not token.special and token_id not in own
    ]
    if (largest := max([processor.tokenizer.vocab_size - 1, *added])) >= vocabulary:
        raise ValueError(
            f"the tokenizer has {largest + 1} tokens, the model {vocabulary}; take the tokenizer that was saved with it."
        )
    if not processor.chat_template:
        raise ValueError("it has no chat template (chat_template.jinja); copy the one that was saved with it.")
    ecgs = [{"type": "ecg"}] if processor.takes_ecgs else []
    question: Any = [{"role": "user", "content": [*ecgs, {"type": "text", "text": "Rhythm?"}]}]
    try:
        prompt = processor.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: any error
        raise ValueError(f"its chat template (chat_template.jinja) fails: {error}") from error
    if prompt.count(processor.ecg_token) != len(ecgs) or "Rhythm?" not in prompt:
        raise ValueError(
            f"its chat template (chat_template.jinja) does not write the question and one {processor.ecg_token} for an ECG."
        )
