"""How an ELM writes: what `generate` has to know of ECGs and of ids beyond the vocabulary."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .modeling_common import ECG_INPUTS


class LogitsOfMoreIds(LogitsProcessorList):
    """Processors that look up the scores of all tokens of the prompt, such as a repetition penalty, where some have none: those
    of ECGs, whose ids lie beyond the vocabulary.

    Args:
        num_beyond: how many ids there are beyond it.
    """

    def __init__(self, processors: LogitsProcessorList, num_beyond: int):
        super().__init__(processors)
        self.num_beyond = num_beyond

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """As of transformers: [batch, tokens] and [batch, vocabulary] -> [batch, vocabulary]."""
        more: Any = nn.functional.pad(scores, (0, self.num_beyond), value=-torch.inf)
        return super().__call__(input_ids, more, **kwargs)[:, : scores.shape[1]]


class ELMGenerationMixin(GenerationMixin):
    """transformers' `generate`, for prompts with any number of ECGs each."""

    config: Any
    get_ecg_features: Any

    def prepare_inputs_for_generation(  # type: ignore[override]  # by keyword, as transformers calls it
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.Tensor | None = None,  # named here, as `generate` looks for it in the signature
        is_first_iteration: bool | None = False,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As of transformers; the ECGs go with the prompt alone, as the cache holds them then."""
        ecg_inputs = {name: kwargs.pop(name) for name in ECG_INPUTS if name in kwargs}  # transformers forwards the rest
        # transformers wants of `self` attributes that no model declares
        model_inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )
        cache = kwargs.get("past_key_values")
        # without a cache every step reads the whole prompt; the first step of a draft model does too
        if is_first_iteration or not use_cache or (cache is not None and cache.get_seq_length() == 0):
            model_inputs.update(ecg_inputs)
        return model_inputs

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """As of transformers, for prompts with ids beyond the vocabulary."""
        processors = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        num_beyond = max(0, self.config.end_of_ecg_ids - self.config.text_config.vocab_size)
        return LogitsOfMoreIds(processors, num_beyond) if processors and num_beyond else processors

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """As of transformers; what drafts from the text alone gets no ECGs, nor ids beyond the vocabulary. What it drafts is checked
        by this model, which sees the ECGs."""
        draft = kwargs.get("assistant_model")
        unread = set(ECG_INPUTS)
        if draft is not None:
            unread -= inspect.signature(draft.forward).parameters.keys()
            kwargs["model_kwargs"] = {
                name: value for name, value in kwargs["model_kwargs"].items() if name not in unread
            }
        generator: Any = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        if draft is not None and not unread:  # another ELM
            return generator
        get_candidates, vocab_size = generator.get_candidates, self.config.text_config.vocab_size

        def of_text(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
            found, logits = get_candidates(input_ids.masked_fill(input_ids.ge(vocab_size), 0), *args, **kwargs)
            return torch.cat([input_ids, found[:, input_ids.shape[1] :]], dim=1), logits

        generator.get_candidates = of_text
        return generator

    def _prefill(
        self,
        input_ids: torch.LongTensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """As of transformers; with `prefill_chunk_size` the ECGs become embeddings once, of which each chunk gets its own."""
        if generation_config.prefill_chunk_size is not None and is_first_iteration:
            ecg_inputs = {name: model_kwargs.pop(name) for name in ECG_INPUTS if model_kwargs.get(name) is not None}
            if ecg_inputs:
                features = self.get_ecg_features(**ecg_inputs)
                model_kwargs["mm_encoder_outputs"] = {"ecg": BaseModelOutputWithPooling(pooler_output=features)}
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)  # type: ignore[misc]

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Samples hold different numbers of ECGs, so each sample's group of ECGs is repeated, not each ECG."""
        ecg_inputs = {name: model_kwargs.pop(name) for name in ECG_INPUTS if model_kwargs.get(name) is not None}
        if ecg_inputs and expand_size > 1:
            if input_ids is None or input_ids.shape[1] == 0:  # empty beside inputs_embeds
                raise ValueError(
                    "Beams and several sequences need input_ids beside the ECGs, to tell which ECGs belong to which text."
                )
            placeholders: torch.Tensor = input_ids == self.config.ecg_token_id  # type: ignore[assignment]  # no bool
            sizes = (placeholders.sum(-1) // self.config.num_ecg_tokens).tolist()  # ECGs of each sample
            for name, values in ecg_inputs.items():  # in the order of repeat_interleave, which expands the texts
                ecg_inputs[name] = torch.cat([group for group in values.split(sizes) for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **ecg_inputs}
