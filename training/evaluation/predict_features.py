"""Vectors of ECGs in place of answers: what the encoder, the connector or the language model of an ELM holds of them."""

from typing import Any

import torch

from elm_ecg.modeling_elm import ECG_INPUTS, ELMForConditionalGeneration
from elm_ecg.training.evaluation.answers import Answerer, require_finite
from elm_ecg.training.evaluation.conditions import CONDITIONS, ECG


def check_features(model: ELMForConditionalGeneration, kind: str) -> None:
    """Refuses (ValueError) features of a part that the model has not.

    Args:
        kind: `encoder`, `connector` or `llm`.
    """
    config = model.config
    if kind != "llm" and getattr(model.model, kind) is None:
        raise ValueError(
            f"--features {kind}: this model of the representation {config.representation} has no {kind}; take --features llm, or of "
            "one that has a connector --features connector."
        )


def features_of(answerer: Answerer, conversations: list[list[int]], kind: str) -> list[list[float]]:
    """A vector for each question, row by row.

    - `encoder`: [width of the encoder], the mean of the tokens that the connector reads.
    - `connector`: [width of the language model], the mean of the tokens that stand for the ECG in the text.
    - `llm`: [width of the language model], its last hidden state at the last token before the answer.

    Args:
        conversations: as of `Answerer.batches`.
    """
    read = answerer.read(conversations, CONDITIONS[ECG])
    elm = answerer.model.model
    if kind != "llm":
        ecgs = _together([row.ecgs for row in read], elm.device)  # one ECG in each row
        tokens = elm.get_encoder_features(**ecgs) if kind == "encoder" else elm.get_ecg_features(**ecgs)
        vectors = tokens.float().mean(1)
    else:
        prompts = [(prompt, row.ecgs) for row in read for prompt in row.prompts]
        pad = answerer.processor.tokenizer.pad_token_id
        width = max(len(prompt.input_ids) for prompt, _ in prompts)
        # left: all rows end in a token
        ids = [[pad] * (width - len(prompt.input_ids)) + prompt.input_ids for prompt, _ in prompts]
        real = [[0] * (width - len(prompt.input_ids)) + [1] * len(prompt.input_ids) for prompt, _ in prompts]
        mask = torch.tensor(real, device=elm.device)
        own = [{name: values[: prompt.num_ecgs] for name, values in ecgs.items()} for prompt, ecgs in prompts]
        vectors = elm(
            input_ids=torch.tensor(ids, device=elm.device),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            **_together(own, elm.device),
        ).last_hidden_state[:, -1]
    require_finite(vectors)
    return vectors.float().cpu().tolist()


def _together(ecgs: list[dict[str, torch.Tensor]], device: torch.device) -> dict[str, Any]:
    """The tensors of the ECGs of several rows as those of one batch."""
    names = [name for name in ECG_INPUTS if any(name in own and len(own[name]) for own in ecgs)]
    return {name: torch.cat([own[name] for own in ecgs if name in own]).to(device) for name in names}
