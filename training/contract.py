"""What an encoder or connector of somebody's own has to do, tried out before an ELM is built of it (docs/how_to/own_encoder_and_connector.md)."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.configuration_elm import ELMConfig, is_own_connector
from elm_ecg.modeling_common import in_eval_mode
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.modeling_parts import own_classes
from elm_ecg.own_code import check_own_files

DOC = "see docs/how_to/own_encoder_and_connector.md"


def check_encoder_class(encoder_class: Any) -> None:
    """ValueError if the class is no `PreTrainedModel` with a configuration of its own."""
    name = getattr(encoder_class, "__name__", encoder_class)
    if not (isinstance(encoder_class, type) and issubclass(encoder_class, PreTrainedModel)):
        raise ValueError(f"The encoder {name} is no PreTrainedModel of transformers; {DOC}.")
    config_class: Any = encoder_class.config_class
    if config_class is None or config_class is PreTrainedConfig:
        raise ValueError(
            f"{name} does not name its configuration; annotate it in the class, `config: MyConfig`, a PreTrainedConfig of yours; {DOC}."
        )
    model_type = config_class.model_type
    taken = model_type in ENCODER_CONFIGS or model_type in CONFIG_MAPPING_NAMES or model_type == ELMConfig.model_type
    if not model_type or taken:
        reason = "is that of another model" if taken else "is empty"
        raise ValueError(
            f"{config_class.__name__}.model_type, {model_type!r}, {reason}; choose a name of your own, such as 'my_encoder'."
        )


def check_own_parts(model: ELMForConditionalGeneration) -> None:
    """Tries the encoder and the connector of a new ELM on records of zeros, if one of them is somebody's own.

    Raises:
        ValueError: names the class, what it did, and what is expected.
    """
    elm: Any = model.model
    own = own_classes(model.config, elm.connector)
    taken: dict[str, Path] = {path.name: path for path in Path(__file__).parents[1].glob("*.py")}
    for own_class in own:
        check_own_files(own_class, taken)
    if not own:
        return
    if isinstance(elm.encoder, PreTrainedModel) and type(elm.encoder) in own:
        _check_encoder(elm.encoder, model.config)
    _check_connector(model)


def _check_encoder(encoder: PreTrainedModel, config: ELMConfig) -> None:
    name = type(encoder).__name__
    shape = (2, config.num_leads, config.num_samples)
    records = torch.zeros(shape, dtype=encoder.dtype, device=encoder.device)
    lead_mask = torch.ones(shape[:2], dtype=torch.bool, device=encoder.device)
    lead_mask[1, -1] = False
    with in_eval_mode(encoder):
        tokens = _tokens(encoder, records, lead_mask)
        again = _tokens(encoder, records, lead_mask)
        alone = _tokens(encoder, records, None)
    for states in (tokens, alone):
        if states.ndim != 3 or states.shape[0] != 2:
            raise ValueError(
                f"{name} makes a last_hidden_state of shape {list(states.shape)} of 2 records; expected [2, tokens, width]."
            )
        if states.shape[2] != config.encoder_output_size:
            raise ValueError(
                f"{name} makes tokens of width {states.shape[2]}, and its configuration says {config.encoder_output_size}; set "
                f"{type(encoder.config).__name__}.output_size, or hidden_size where it has none, to the width of its tokens."
            )
        if not states.isfinite().all():
            raise ValueError(f"{name} makes NaN or infinity of a silent record; expected finite numbers.")
    if not torch.equal(tokens, again):
        raise ValueError(
            f"{name} makes other tokens of the same record each time, in eval mode too; leave out what is random where `self.training` is "
            "False."
        )
    _check_gradients(name, encoder, tokens)
    _check_buffers(encoder)


def _tokens(encoder: PreTrainedModel, records: torch.Tensor, lead_mask: torch.Tensor | None) -> torch.Tensor:
    name, shape = type(encoder).__name__, list(records.shape)
    masks = "without a lead_mask" if lead_mask is None else f"with a lead_mask {list(lead_mask.shape)}"
    try:
        outputs = encoder(records, lead_mask=lead_mask)
    except Exception as error:  # somebody else's code: any error
        raise ValueError(
            f"{name} fails on ecg_values {shape} {masks}: {type(error).__name__}: {error}. It has to take "
            f"forward(ecg_values, lead_mask=None); {DOC}."
        ) from error
    states = getattr(outputs, "last_hidden_state", None)
    if not isinstance(states, torch.Tensor):
        raise ValueError(
            f"{name} returns {type(outputs).__name__} without a last_hidden_state; return "
            "BaseModelOutput(last_hidden_state=tokens) of transformers.modeling_outputs."
        )
    return states


def _check_gradients(name: str, part: nn.Module, outputs: torch.Tensor) -> None:
    """ValueError if there are weights to train and none of them is reached from the outputs."""
    trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
    if trained and not _depends(outputs, trained):
        raise ValueError(
            f"No gradient reaches the weights of {name}, so it could not be trained; leave `torch.no_grad` and `detach` out of its "
            "forward. --update says what is trained."
        )


def _check_buffers(encoder: PreTrainedModel) -> None:
    """ValueError if the encoder cannot be loaded as transformers does it: built without values, which the file then gives."""
    name, saved = type(encoder).__name__, encoder.state_dict().keys()
    unsaved = {key: buffer for key, buffer in encoder.named_buffers() if key not in saved}
    try:
        with torch.device("meta"):
            twin = type(encoder)(encoder.config)
    except Exception as error:  # somebody else's code: any error
        raise ValueError(
            f"{name} cannot be built without values, as transformers does to load it: {type(error).__name__}: {error}. Leave `.item()`, "
            "`.tolist()` and loading of weights out of its __init__."
        ) from error
    if not unsaved:
        return
    twin.to_empty(device="cpu")
    for buffer in twin.buffers():
        buffer.fill_(-1)  # what is left in memory may be anything
    for module in twin.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]):
        twin.initialize_weights()
    of_twin = dict(twin.named_buffers())
    if lost := [key for key, buffer in unsaved.items() if not torch.equal(buffer.cpu(), of_twin[key])]:
        raise ValueError(
            f"{name} has buffers that are not saved, and lost when it is loaded: {', '.join(lost)}. Register them without "
            "persistent=False, or set them in _init_weights."
        )


def _check_connector(model: ELMForConditionalGeneration) -> None:
    """The connector on a silent record, behind whichever encoder it has."""
    config, elm = model.config, model.model
    connector: Any = elm.connector
    name, weights = type(connector).__name__, list(connector.parameters())
    if not weights:
        raise ValueError(
            f"The connector {name} has no weights, so it cannot be trained to speak to the language model."
        )
    saved = connector.state_dict().keys()
    if lost := [key for key, _ in connector.named_buffers() if key not in saved]:
        raise ValueError(
            f"The connector {name} has buffers that are not saved, and lost when it is loaded: {', '.join(lost)}. Register them without "
            "persistent=False."
        )
    like = torch.zeros(1, dtype=weights[0].dtype if elm.encoder is None else elm.encoder.dtype, device=model.device)
    inputs = elm.blank_ecg(like)
    try:
        with in_eval_mode(elm):
            features, again = elm.get_ecg_features(**inputs), elm.get_ecg_features(**inputs)
            read = elm.get_encoder_features(**inputs) if elm.encoder is not None else like
            pooled_with_weights = _depends(read, weights)
    except Exception as error:  # somebody else's code: any error
        if isinstance(error, ValueError) and not is_own_connector(config.connector):
            raise  # ours tell it themselves
        shape = list(inputs[next(iter(inputs))].shape)
        raise ValueError(
            f"The connector {name} fails on what it reads of one silent ECG {shape}: {type(error).__name__}: {error}. It takes "
            f"forward(encoder_features), or of a fuyu ELM forward(ecg_values); {DOC}."
        ) from error
    if pooled_with_weights:
        raise ValueError(
            f"{name}.pool has weights; what it gives is kept by --cache_features, so what is trained has to be in forward."
        )
    expected = [1, config.num_ecg_tokens, config.text_config.hidden_size]
    if not isinstance(features, torch.Tensor) or list(features.shape) != expected:
        got = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(
            f"The connector {name} makes {got} of one ECG; expected [ECGs, num_ecg_tokens, width of the language model], {expected}."
        )
    if not features.isfinite().all():
        raise ValueError(f"The connector {name} makes NaN or infinity of a silent ECG; expected finite numbers.")
    if not torch.equal(features, again):
        raise ValueError(
            f"The connector {name} makes other embeddings of the same ECG each time, in eval mode too; leave out what is random where "
            "`self.training` is False."
        )
    _check_gradients(name, connector, features)


def _depends(outputs: torch.Tensor, weights: list[nn.Parameter]) -> bool:
    weights = [weight for weight in weights if weight.requires_grad]
    if not outputs.requires_grad or not weights:
        return False
    return any(part is not None for part in torch.autograd.grad(outputs.float().sum(), weights, allow_unused=True))
