"""How a token is drawn: what shapes its probabilities, and the token that a number of [0, 1) stands for."""

from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# keys of generation that draw a token -> their value where nothing is drawn
DRAWING: dict[str, Any] = {
    **{"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None},
    **{"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0},
}


def warpers_of(options: dict[str, Any]) -> LogitsProcessorList:
    """What shapes the probabilities that a token is drawn by, in the order of transformers."""
    found: dict[str, Any] = {name: options.get(name) for name in DRAWING}
    warpers = LogitsProcessorList()
    if found["temperature"] not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(found["temperature"]))
    if found["top_k"]:
        warpers.append(TopKLogitsWarper(found["top_k"]))
    if found["top_p"] is not None and found["top_p"] < 1.0:
        warpers.append(TopPLogitsWarper(found["top_p"]))
    if found["min_p"] is not None:
        warpers.append(MinPLogitsWarper(found["min_p"]))
    if found["typical_p"] is not None and found["typical_p"] < 1.0:
        warpers.append(TypicalLogitsWarper(found["typical_p"]))
    if found["epsilon_cutoff"]:
        warpers.append(EpsilonLogitsWarper(found["epsilon_cutoff"]))
    if found["eta_cutoff"]:
        warpers.append(EtaLogitsWarper(found["eta_cutoff"]))
    return warpers


def drawn_tokens(scores: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The tokens [rows] that numbers [rows] of [0, 1) stand for, by scores [rows, vocabulary] that are shaped already."""
    # in float64, which MPS has not, the sum over a large vocabulary is still 1
    dtype = torch.float32 if scores.device.type == "mps" else torch.float64
    cumulative = scores.to(dtype).softmax(-1).cumsum(-1)
    draws = draws.to(cumulative.device, dtype)
    # the first token at which the sum exceeds the draw; one of probability 0 never does
    tokens = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
    return tokens.clamp(max=scores.shape[1] - 1)[:, 0]
