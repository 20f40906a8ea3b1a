"""The ELM: an ECG encoder, a connector and a causal language model that answers questions about ECGs."""

import inspect
import os
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from .configuration_elm import IMAGE_REPRESENTATIONS, ELMConfig
from .modeling_common import CompleteModel, attention_of, check_all_loaded, stay_frozen
from .modeling_connectors import CONNECTOR_MODULES
from .modeling_ecg_encoders import ENCODER_MODELS, without_missing_leads
from .modeling_vision_encoders import blank_images, encode_images, load_vision_model, vision_model_class
from .pipeline_elm import ECGQuestionAnsweringPipeline

# the tensors of a batch that hold its ECGs, one row an ECG
ECG_INPUTS = ("ecg_values", "ecg_lead_mask", "pixel_values", "pixel_attention_mask", "spatial_shapes")


def make_encoder(config: ELMConfig) -> PreTrainedModel:
    """The encoder of the config, with random weights."""
    encoder_config = config.encoder_config
    ecg_encoder = ENCODER_MODELS.get(encoder_config.model_type)
    encoder_class = ecg_encoder or vision_model_class(encoder_config, config.image_features)
    encoder_config._attn_implementation = attention_of(encoder_class, encoder_config._attn_implementation)
    return encoder_class(encoder_config)


class ELMPreTrainedModel(CompleteModel):
    """What transformers has to know of an ELM, with its head and without."""

    config: ELMConfig
    base_model_prefix = "model"  # the attribute of the model with a head that holds the one without
    input_modalities = ["ecg", "text"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # accelerate leaves the cache where it is
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @property
    def dtype(self) -> torch.dtype:
        """That of the language model: while it is trained, other parts may be in float32 beside it."""
        (language_model,) = (
            module for name, module in self.named_modules() if name in ("language_model", "model.language_model")
        )
        return next(weight.dtype for weight in language_model.parameters() if weight.is_floating_point())

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """As of transformers; of a name that the encoder does not support, the encoder takes its own."""
        if isinstance(attn_implementation, str) and self.config.encoder_config is not None:
            encoders: list[Any] = [
                module for module in self.modules() if getattr(module, "config", 0) is self.config.encoder_config
            ]
            of_encoder = attention_of(type(encoders[0]), attn_implementation) if encoders else None
            names = {"": attn_implementation, "text_config": attn_implementation}
            attn_implementation = names | ({} if of_encoder is None else {"encoder_config": of_encoder})
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As of transformers, with the weights under the names of the modules.

        The older names that transformers keeps for the files of some backbones are unknown to its trainer when it loads a
        checkpoint, to resume or as the best.
        """
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(*args, **kwargs)


class ELMModel(ELMPreTrainedModel):
    """Encoder, connector and language model, without the head that predicts tokens."""

    def __init__(
        self, config: ELMConfig, encoder: PreTrainedModel | None = None, language_model: nn.Module | None = None
    ):
        super().__init__(config)
        if encoder is None and config.encoder_config is not None:  # fuyu and text have no encoder
            encoder = make_encoder(config)
        self.encoder = encoder
        self.connector = CONNECTOR_MODULES[config.connector](config) if config.connector is not None else None
        self.language_model = language_model or AutoModel.from_config(config.text_config)  # without its head
        number, width = config.num_signal_tokens, config.text_config.hidden_size
        self.signal_embeddings = nn.Embedding(number, width) if number else None  # of symbolic ECGs
        self.post_init()

    def train(self, mode: bool = True) -> "ELMModel":
        """What is not trained stays in eval mode, as `stay_frozen` says."""
        super().train(mode)
        parts = [self.encoder, self.connector, self.language_model] if mode else []
        for part in parts:
            if part is not None:
                stay_frozen(part)
        return self

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of a text [batch, tokens] -> [batch, tokens, width of the language model].

        Tokens of symbolic ECGs have a table of their own. A placeholder beyond the vocabulary is as the first token: the embeddings of
        an ECG take its place.
        """
        embeddings, ids, words = self.get_input_embeddings(), self.config.signal_token_ids, input_ids
        if (self.config.ecg_token_id or 0) >= self.config.text_config.vocab_size:
            words = words.masked_fill(input_ids.eq(self.config.ecg_token_id or 0), 0)
        if self.signal_embeddings is None:
            return embeddings(words)
        of_ecgs = (input_ids >= ids.start) & (input_ids < ids.stop)  # [batch, tokens]
        words = embeddings(words.masked_fill(of_ecgs, 0))
        # all places are looked up in both, so that neither a graph nor which weights are used depends on where ECGs stand
        signals = self.signal_embeddings((input_ids - ids.start).clamp(0, len(ids) - 1)).to(words.dtype)
        return torch.where(of_ecgs.unsqueeze(-1), signals, words)

    def get_ecg_features(
        self,
        ecg_values: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        ecg_lead_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings that stand for each ECG in the text.

        Args:
            ecg_values: [number of ECGs, leads, samples], as the feature extractor gives them.
            pixel_values, pixel_attention_mask, spatial_shapes: in place of them for a vision backbone, see `encode_images`.
            ecg_lead_mask: [number of ECGs, leads], False for missing leads. Their `ecg_values` are ignored: `ECGEncoder` tells what
                each encoder does instead; fuyu connectors read zeros.

        Returns:
            [number of ECGs, num_ecg_tokens, width of the language model]

        Raises:
            ValueError: the model has no ECG path, or another kind of input, or makes fewer tokens than `num_ecg_tokens`.
        """
        config = self.config
        if self.connector is None:
            raise ValueError("This ELM is text only (architecture='text'): it has no encoder or connector for an ECG.")
        reads_images = config.representation in IMAGE_REPRESENTATIONS
        name, ecgs = ("pixel_values", pixel_values) if reads_images else ("ecg_values", ecg_values)
        if ecgs is None:
            raise ValueError(
                f"This ELM reads {config.representation!r} ECGs as {name}, which are not given. Prepare ECGs with the "
                "model's own processor."
            )
        if not reads_images:
            shape = (config.num_leads, config.num_samples)
            # in silence the flat connector would take a transposed record, and MERL one of any length or rate
            if tuple(ecgs.shape[1:]) != shape:
                raise ValueError(
                    f"ecg_values has shape {tuple(ecgs.shape)}; this model reads [ECGs, {shape[0]} leads, {shape[1]} samples]. "
                    "Prepare ECGs with the model's own processor."
                )
        dtype = next(self.connector.parameters()).dtype  # float32 while it is trained, whatever the encoder is in
        if self.encoder is None:
            return self.connector(without_missing_leads(ecgs, ecg_lead_mask).to(dtype))
        if not reads_images:
            return self.connector(self.encoder(ecgs, lead_mask=ecg_lead_mask).last_hidden_state.to(dtype))
        tokens = encode_images(self.encoder, config.image_features, ecgs, pixel_attention_mask, spatial_shapes)
        # an embedding is one token without padding
        return self.connector(tokens.to(dtype), pixel_attention_mask if config.image_features == "patches" else None)

    def _zero_of_ecg_path(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """A zero that depends on encoder and connector.

        With it a training batch without ECG has gradients for all that is trained, as DDP, FSDP and ZeRO expect of every
        process. Batch norm must not learn from the silent record that it takes, so the encoder is in eval mode for it.
        """
        if self.config.representation in IMAGE_REPRESENTATIONS:
            inputs = blank_images(self.config.encoder_config, like=inputs_embeds)
        else:
            inputs = {"ecg_values": inputs_embeds.new_zeros(1, self.config.num_leads, self.config.num_samples)}
        modules = [] if self.encoder is None else list(self.encoder.modules())
        modes = [module.training for module in modules]
        for module in modules:
            module.training = False
        features = self.get_ecg_features(**inputs)
        for module, mode in zip(modules, modes, strict=True):  # LoRA leaves some of them in eval mode
            module.training = mode
        return 0 * features.sum().to(inputs_embeds.device, inputs_embeds.dtype)

    def get_placeholder_mask(self, input_ids: torch.Tensor, ecg_features: torch.Tensor) -> torch.Tensor:
        """Where the ECG features go: a mask [batch, tokens, 1] with as many places as there are features."""
        assert self.config.ecg_token_id is not None  # of a model with a connector
        mask = input_ids.eq(self.config.ecg_token_id)
        num_ecgs, tokens_per_ecg = ecg_features.shape[:2]
        matches = mask.sum() == num_ecgs * tokens_per_ecg
        if torch.compiler.is_compiling():  # an `if` on a tensor's value breaks the graph; the GPU is not waited for
            torch._assert_async(matches, "The ECG placeholder tokens of the text are not as many as the ECGs need.")
        elif not matches:
            raise ValueError(
                f"The text has {mask.sum()} ECG placeholder tokens, but {num_ecgs} ECGs of {tokens_per_ecg} tokens "
                f"each need {num_ecgs * tokens_per_ecg}. Prepare text and ECGs together with the model's processor, "
                "and do not truncate the text after it."
            )
        return mask.unsqueeze(-1)  # `masked_scatter` repeats it over the width

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: [batch, tokens], with `num_ecg_tokens` placeholders where each ECG stands.
            mm_encoder_outputs: in place of ECGs their embeddings, as `pooler_output` [n, tokens, width] of `ecg`; transformers
                passes those of each part of a prompt that it reads in parts.
            inputs_embeds: [batch, tokens, width] in their place, with the embeddings of the ECGs in it.
            kwargs: `ECG_INPUTS`, the ECGs of the batch in the order of their placeholders, as [`get_ecg_features`] takes them; none,
                or None, when the batch has no ECG. The others are the language model's.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if input_ids is not None:
            inputs_embeds = self.embed(input_ids)
        assert inputs_embeds is not None
        ecg_inputs = {name: kwargs.pop(name, None) for name in ECG_INPUTS}
        ecg_features = mm_encoder_outputs["ecg"].pooler_output if mm_encoder_outputs else None
        if ecg_inputs["ecg_values"] is not None or ecg_inputs["pixel_values"] is not None:
            ecg_features = self.get_ecg_features(**ecg_inputs)
        if ecg_features is not None:
            if input_ids is None:
                raise ValueError(
                    "ECGs beside inputs_embeds: embeddings do not tell where the ECGs stand. Give input_ids in their place, or put the "
                    "ECGs into them yourself: `embed` gives those of a text, `get_ecg_features` those of ECGs."
                )
            ecg_features = ecg_features.to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, ecg_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, ecg_features)  # the n-th place gets the n-th token
        elif self.training and self.connector is not None:
            inputs_embeds = inputs_embeds + self._zero_of_ecg_path(inputs_embeds)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)  # never input_ids: they lack the ECGs


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


class ELMForConditionalGeneration(ELMPreTrainedModel, GenerationMixin):
    """An ELM that answers in text.

    Args:
        encoder, llm: pretrained parts to build around, as [`from_encoder_llm_pretrained`] passes them; by default
            both are made from the config, with random weights.
    """

    def __init__(self, config: ELMConfig, encoder: PreTrainedModel | None = None, llm: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = ELMModel(config, encoder=encoder, language_model=llm.base_model if llm is not None else None)
        if llm is None:
            self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        else:
            self.lm_head = llm.get_output_embeddings()  # with its weight, which may be that of the embeddings
            self.generation_config = llm.generation_config
        if config.ecg_token_id is not None:  # a placeholder stands for an ECG that was given, so none is written
            suppressed = self.generation_config.suppress_tokens or []
            # nor are signal tokens that have spare rows of the head, which mean nothing
            spare = range(
                config.signal_token_ids.start, min(config.signal_token_ids.stop, config.text_config.vocab_size)
            )
            self.generation_config.suppress_tokens = [*suppressed, config.ecg_token_id, *spare]
        # every language model has its own name for its embeddings
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}  # used where tie_word_embeddings is set
        self.post_init()

    @classmethod
    def from_encoder_llm_pretrained(
        cls,
        llm: str | os.PathLike,
        encoder: str | os.PathLike | None = None,
        llm_kwargs: dict[str, Any] | None = None,
        **config_kwargs: Any,
    ) -> "ELMForConditionalGeneration":
        """Builds an ELM around a pretrained language model; the connector starts at random.

        What is beside the language model is not in its dtype: a new part is in float32, a pretrained encoder as it was saved.

        Args:
            llm: Hub id or local folder of any causal language model.
            encoder: Hub id or local folder of a pretrained ECG encoder, or of a model whose vision tower is taken. None: the
                `encoder_config` of `config_kwargs`, with random weights.
            llm_kwargs: for `AutoModelForCausalLM.from_pretrained` (`dtype`, `revision`, `attn_implementation`, ...).
            config_kwargs: the other arguments of [`ELMConfig`].
        """
        # code beside the weights could not be saved with the ELM; transformers would ask on standard input whether to run it
        llm_kwargs = {"trust_remote_code": False} | (llm_kwargs or {})
        loaded: Any = AutoModelForCausalLM.from_pretrained(llm, output_loading_info=True, **llm_kwargs)
        llm_model, info = loaded
        check_all_loaded(llm_model, info)
        encoder_model: PreTrainedModel | None = None
        if encoder is not None:
            encoder_type = PreTrainedConfig.get_config_dict(encoder)[0].get("model_type")  # AutoConfig may lack ours
            if encoder_type in ENCODER_MODELS:
                encoder_model = ENCODER_MODELS[encoder_type].from_pretrained(encoder)
            else:
                encoder_model = load_vision_model(encoder, config_kwargs.get("image_features", "patches"))
            config_kwargs["encoder_config"] = encoder_model.config
        text_config = llm_model.config.get_text_config()
        if text_config is not llm_model.config:  # a model of several modalities keeps it within
            raise ValueError(
                f"{llm} holds a {llm_model.config.model_type!r} model, which reads more than text; expected a causal "
                "language model of text alone."
            )
        config_kwargs["attn_implementation"] = {"text_config": text_config._attn_implementation}  # None would unset it
        config = ELMConfig(text_config=text_config, **config_kwargs)
        model = cls(config, encoder=encoder_model, llm=llm_model)
        parts: list[nn.Module | None] = [model.model.encoder, model.model.connector, model.model.signal_embeddings]
        for part in parts:  # a quantized language model is where it computes
            if part is not None:
                part.to(llm_model.device)
        if not is_deepspeed_zero3_enabled():  # there no process holds the weights to run it
            model._check_same_logits(llm_model)
        return model

    @torch.no_grad()  # leaves both in eval mode, as `from_pretrained` does
    def _check_same_logits(self, llm: PreTrainedModel) -> None:
        """Without an ECG the ELM is its language model: some have a head with a bias or a scale that ours lacks."""
        input_ids = torch.arange(8, device=llm.device).unsqueeze(0) % self.config.text_config.vocab_size  # any text
        ours, theirs = self.eval()(input_ids=input_ids).logits, llm.eval()(input_ids=input_ids).logits
        has_bias = getattr(self.lm_head, "bias", None) is not None  # theirs, so the logits agree until it is saved
        if has_bias or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"{type(llm).__name__} ({llm.config.model_type}) does more to its logits than a linear head without "
                "bias and a soft cap, so an ELM around it would not answer as it does. Choose another language model."
            )

    def get_ecg_features(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See [`ELMModel.get_ecg_features`]."""
        return self.model.get_ecg_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        ecg_values: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        ecg_lead_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,  # the trainer's num_items_in_batch among them
    ) -> CausalLMOutputWithPast:
        """As [`ELMModel.forward`], and

        Args:
            labels: [batch, tokens], -100 where no loss is taken.
            logits_to_keep: how many of the last positions to compute logits for; 0 for all.
        """
        outputs = self.model(
            input_ids=input_ids,
            ecg_values=ecg_values,
            pixel_values=pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            ecg_lead_mask=ecg_lead_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        softcap = getattr(self.config.text_config, "final_logit_softcapping", None)
        if softcap is not None:  # Gemma 2
            logits = softcap * torch.tanh(logits / softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(  # shifts the labels itself: a token is scored at the place before it
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

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

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As of transformers, but for the tokens of ECGs no rows are added: PEFT asks for as many as the tokenizer has tokens."""
        if self.config.text_config.vocab_size < (new_num_tokens or 0) <= self.config.end_of_ecg_ids:
            return self.get_input_embeddings()
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

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


ELMForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")  # the code is saved beside the weights

# the pipeline travels to the Hub with what this file imports
__all__ = ["ECGQuestionAnsweringPipeline", "ELMForConditionalGeneration", "ELMModel", "ELMPreTrainedModel"]
