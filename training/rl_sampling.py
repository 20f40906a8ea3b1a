"""Groups of answers to prompts: each prompt is read once, and what is drawn for an answer depends on that answer alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training.evaluation.answers import require_finite
from elm_ecg.training.sampling import DRAWING, drawn_tokens, warpers_of


class DrawByRow(LogitsProcessor):
    """Draws the next token of each row, and leaves that one alone to be taken.

    The numbers of a row are made of its seed: what is drawn does not depend on the rows beside it, on how many processes share
    them, or on what was drawn before.

    Args:
        options: of `GenerationConfig`, such as `temperature` and `top_p`.
        seeds: of each row, numbers that nobody else has.
        prompt_length: tokens before the first one that is drawn.
        max_new_tokens: how many are drawn at most.
    """

    def __init__(
        self, options: dict[str, Any], seeds: Sequence[Sequence[int]], prompt_length: int, max_new_tokens: int
    ):
        self.warpers = warpers_of(options)
        self.prompt_length = prompt_length
        draws = [np.random.default_rng(list(seed)).random(max_new_tokens) for seed in seeds]
        self.draws = torch.from_numpy(np.stack(draws))  # [rows, tokens], in [0, 1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocabulary], 0 for the token that was drawn and minus infinity for the others (NotFiniteError: a row has none)."""
        require_finite(scores)
        warped: Any = self.warpers(input_ids, scores)  # type: ignore[arg-type]
        tokens = drawn_tokens(warped, self.draws[:, input_ids.shape[1] - self.prompt_length])
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Positions of the tokens [batch, tokens] that are not padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)  # -1 where padding stands in front


@torch.no_grad()
def answer_prompts(
    model: ELMForConditionalGeneration,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    ecg_inputs: dict[str, torch.Tensor],
    of_prompt: Sequence[int],
    seeds: Sequence[Sequence[int]],
    options: dict[str, Any],
) -> torch.Tensor:
    """Answers to prompts, each of which is read once however many answers it gets.

    Args:
        input_ids, attention_mask: [prompts, tokens], padded on the left.
        ecg_inputs: `ECG_INPUTS` of all prompts, in their order.
        of_prompt: for each answer the number of its prompt.
        seeds: for each answer, as of `DrawByRow`.
        options: of `GenerationConfig`.

    Returns:
        [answers, new tokens], what follows an end of text being padding.
    """
    length = input_ids.shape[1]
    cache = DynamicCache(config=model.config.get_text_config())  # which layers have a window, or a state
    rows = torch.tensor(of_prompt, device=input_ids.device)
    if length > 1:  # `generate` has to be left one token to read
        model(
            input_ids=input_ids[:, :-1],
            attention_mask=attention_mask[:, :-1],
            position_ids=positions_of(attention_mask)[:, :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **ecg_inputs,
        )
        cache.reorder_cache(rows)  # type: ignore[arg-type]  # repeats that of each prompt for its answers
    config = GenerationConfig(**options | DRAWING, disable_compile=True)
    draw = DrawByRow(options, seeds, length, config.max_new_tokens or 0)
    output: Any = model.generate(  # type: ignore[misc]  # wants attributes that no model declares
        input_ids=input_ids[rows],
        attention_mask=attention_mask[rows],
        past_key_values=cache,
        generation_config=config,
        logits_processor=LogitsProcessorList([draw]),
    )
    return output[:, length:]
