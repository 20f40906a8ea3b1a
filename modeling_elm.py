"""The ELM: an ECG encoder, a connector and a causal language model that answers questions about ECGs."""

import inspect
import os
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from .configuration_elm import IMAGE_REPRESENTATIONS, ELMConfig, is_own_connector
from .generation_elm import ELMGenerationMixin
from .modeling_common import ECG_INPUTS, attention_of, in_eval_mode, stay_frozen
from .modeling_connectors import make_connector, zero_padding
from .modeling_ecg_base import without_missing_leads
from .modeling_language_models import load_language_model, logit_scale, without_head
from .modeling_parts import ModelOfParts, load_encoder_part, make_encoder
from .modeling_vision_encoders import blank_images, encode_images
from .pipeline_elm import ECGQuestionAnsweringPipeline

ROWS_OF_HEAD = 16_384  # that are in float32 at a time; 256 MiB at a width of 4,096


def _is_trained(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _is_sharded(part: nn.Module) -> bool:
    """Whether shards of it are gathered where it runs, as FSDP and ZeRO-3 do: then no process may leave it out."""
    # by name: PyTorch may be built without what is distributed
    classes = {base.__name__ for module in part.modules() for base in type(module).__mro__}
    return is_deepspeed_zero3_enabled() or not classes.isdisjoint(("FSDPModule", "FullyShardedDataParallel"))


class ELMPreTrainedModel(ModelOfParts):
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

    def post_init(self) -> None:
        """As of transformers; of the classes that stay on one device those that are here, as FSDP looks for each of them."""
        super().post_init()
        self._no_split_modules = set(self._no_split_modules or ()) & {
            type(module).__name__ for module in self.modules()
        }

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


class ELMModel(ELMPreTrainedModel):
    """Encoder, connector and language model, without the head that predicts tokens."""

    def __init__(
        self, config: ELMConfig, encoder: PreTrainedModel | None = None, language_model: nn.Module | None = None
    ):
        super().__init__(config)
        if encoder is None and config.encoder_config is not None:  # fuyu and text have no encoder
            encoder = make_encoder(config)
        self.encoder = encoder
        # `pool` is of those of an encoder alone
        self.connector: Any = None if config.connector is None else make_connector(config)
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
        ids, words = self.config.signal_token_ids, input_ids
        if (self.config.ecg_token_id or 0) >= self.config.text_config.vocab_size:
            words = words.masked_fill(input_ids.eq(self.config.ecg_token_id or 0), 0)
        if self.signal_embeddings is None:
            return self._embed_words(words)
        of_ecgs = (input_ids >= ids.start) & (input_ids < ids.stop)  # [batch, tokens]
        words = self._embed_words(words.masked_fill(of_ecgs, 0))
        # all places are looked up in both, so that neither a graph nor which weights are used depends on where ECGs stand
        signals = self.signal_embeddings((input_ids - ids.start).clamp(0, len(ids) - 1)).to(words.dtype)
        return torch.where(of_ecgs.unsqueeze(-1), signals, words)

    def _embed_words(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeddings = self.get_input_embeddings()(input_ids)
        if self.config.text_config.model_type == "falcon_h1":  # scales the embeddings of tokens, and no others
            embeddings = embeddings * self.config.text_config.embedding_multiplier
        return embeddings

    def get_ecg_features(
        self,
        ecg_values: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        ecg_lead_mask: torch.Tensor | None = None,
        encoder_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings that stand for each ECG in the text.

        Args:
            ecg_values: [number of ECGs, leads, samples], as the feature extractor gives them.
            pixel_values, pixel_attention_mask, spatial_shapes: in place of them for a vision backbone, see `encode_images`.
            ecg_lead_mask: [number of ECGs, leads], False for missing leads. Their `ecg_values` are ignored: `ECGEncoder` tells what
                each encoder does instead; fuyu connectors read zeros.
            encoder_features: in place of all of these, what `get_encoder_features` gave for them.

        Returns:
            [number of ECGs, num_ecg_tokens, width of the language model]

        Raises:
            ValueError: the model has no ECG path, or another kind of input, or makes fewer tokens than `num_ecg_tokens`.
        """
        if self.connector is None:
            raise ValueError("This ELM is text only (architecture='text'): it has no encoder or connector for an ECG.")
        dtype = next(self.connector.parameters()).dtype  # float32 while it is trained, whatever the encoder is in
        if self.encoder is None:
            ecgs = self._checked(ecg_values)
            return self.connector(without_missing_leads(ecgs, ecg_lead_mask).to(dtype))
        if encoder_features is None:
            encoder_features = self.get_encoder_features(
                ecg_values, pixel_values, pixel_attention_mask, spatial_shapes, ecg_lead_mask
            )
        return self.connector(encoder_features.to(dtype))

    def get_encoder_features(
        self,
        ecg_values: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        ecg_lead_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the connector reads of the encoder for each ECG, which an encoder that is not trained gives again each time.

        Args:
            ecg_values and the others: as of [`get_ecg_features`].

        Returns:
            [number of ECGs, num_ecg_tokens, width of the encoder]; where the connector pools with weights of its own, all tokens
        """
        assert self.encoder is not None
        config = self.config
        if config.representation not in IMAGE_REPRESENTATIONS:
            ecgs = self._checked(ecg_values)
            return self._pooled(self.encoder(ecgs, lead_mask=ecg_lead_mask).last_hidden_state)
        pictures = self._checked(pixel_values)
        tokens = encode_images(self.encoder, config.image_features, pictures, pixel_attention_mask, spatial_shapes)
        # an embedding is one token without padding
        return self._pooled(tokens, pixel_attention_mask if config.image_features == "patches" else None)

    def _pooled(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """What the connector makes of the encoder's tokens [ECGs, tokens, width] without weights of its own."""
        pool = getattr(self.connector, "pool", zero_padding)  # somebody's own connector may have none
        return pool(tokens, mask)

    def _checked(self, ecgs: torch.Tensor | None) -> torch.Tensor:
        """The samples or pictures of ECGs, as they are (ValueError: there are none, or of another shape than the model reads)."""
        config = self.config
        reads_images = config.representation in IMAGE_REPRESENTATIONS
        if ecgs is None:
            raise ValueError(
                f"This ELM reads {config.representation!r} ECGs as {'pixel_values' if reads_images else 'ecg_values'}, which are "
                "not given. Prepare ECGs with the model's own processor."
            )
        shape = (config.num_leads, config.num_samples)
        # in silence the flat connector would take a transposed record, and MERL one of any length or rate
        if not reads_images and tuple(ecgs.shape[1:]) != shape:
            raise ValueError(
                f"ecg_values has shape {tuple(ecgs.shape)}; this model reads [ECGs, {shape[0]} leads, {shape[1]} samples]. "
                "Prepare ECGs with the model's own processor."
            )
        return ecgs

    def blank_ecg(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """One ECG of zeros as inputs of `get_ecg_features`, of the device and the dtype of `like`."""
        if self.config.representation in IMAGE_REPRESENTATIONS:
            return blank_images(self.config.encoder_config, like=like)
        return {"ecg_values": like.new_zeros(1, self.config.num_leads, self.config.num_samples)}

    def _zero_of_ecg_path(self, inputs_embeds: torch.Tensor) -> torch.Tensor | None:
        """A zero that depends on what is trained of encoder and connector; None where nothing has to run for that.

        With it a training batch without ECG has gradients for all that is trained, as DDP, FSDP and ZeRO expect of every
        process. Batch norm alone is in eval mode for the silent record, of which it must not learn: a checkpointed layer gathers its
        shards in another order than one in eval mode.
        """
        encoder_runs = self.encoder is not None and (_is_trained(self.encoder) or _is_sharded(self.encoder))
        if not (encoder_runs or _is_trained(self.connector) or _is_sharded(self.connector)):
            return None
        norms = nn.ModuleList(part for part in self.modules() if isinstance(part, nn.modules.batchnorm._NormBase))
        # one's own connector may read as many tokens as the encoder makes, and no others
        if self.encoder is not None and not encoder_runs and not is_own_connector(self.config.connector):
            width = self.config.encoder_output_size
            inputs = {"encoder_features": inputs_embeds.new_zeros(1, self.config.num_ecg_tokens, width)}
        else:
            inputs = self.blank_ecg(like=inputs_embeds)
        with in_eval_mode(norms):
            features = self.get_ecg_features(**inputs)
        return 0 * features.sum().to(inputs_embeds.device, inputs_embeds.dtype)

    def get_placeholder_mask(self, input_ids: torch.Tensor, ecg_features: torch.Tensor | None) -> torch.Tensor:
        """Where the ECG features go: a mask [batch, tokens, 1] with as many places as there are features; None are no ECGs."""
        assert self.config.ecg_token_id is not None
        mask = input_ids.eq(self.config.ecg_token_id)
        num_ecgs, tokens_per_ecg = (0, self.config.num_ecg_tokens) if ecg_features is None else ecg_features.shape[:2]
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

    def _per_layer_inputs(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        """What the layers of Gemma 3n and Gemma 4 read of the tokens [batch, tokens] beside their embeddings.

        An ECG has that of padding, as pictures have in those models, and so have tokens that their table lacks.
        """
        config = self.config.text_config
        if input_ids is None:
            raise ValueError(
                f"The layers of this language model ({config.model_type}) read the ids of the text too; give input_ids in place of "
                "inputs_embeds."
            )
        ids = self.config.signal_token_ids
        unknown = (input_ids == self.config.ecg_token_id) | (input_ids >= config.vocab_size_per_layer_input)
        unknown |= (input_ids >= ids.start) & (input_ids < ids.stop)
        language_model: Any = self.language_model
        return language_model.get_per_layer_inputs(input_ids.masked_fill(unknown, config.pad_token_id or 0))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        places_to_keep: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: [batch, tokens], with `num_ecg_tokens` placeholders where each ECG stands.
            mm_encoder_outputs: in place of ECGs their embeddings, as `pooler_output` [n, tokens, width] of `ecg`; transformers
                passes those of each part of a prompt that it reads in parts.
            inputs_embeds: [batch, tokens, width] in their place, with the embeddings of the ECGs in it.
            places_to_keep: [n], numbers of places among all batch x tokens: the last hidden state has these alone, as one row
                [1, n, width], and a head computes no others. None: all, [batch, tokens, width].
            kwargs: `ECG_INPUTS`, the ECGs of the batch in the order of their placeholders, as [`get_ecg_features`] takes them; none,
                or None, when the batch has no ECG. The others are the language model's.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if input_ids is not None:
            inputs_embeds = self.embed(input_ids)
        assert inputs_embeds is not None
        if getattr(self.config.text_config, "hidden_size_per_layer_input", None):
            kwargs["per_layer_inputs"] = self._per_layer_inputs(input_ids)
        ecg_inputs = {name: kwargs.pop(name, None) for name in ECG_INPUTS}
        ecg_features = mm_encoder_outputs["ecg"].pooler_output if mm_encoder_outputs else None
        if any(ecg_inputs[name] is not None for name in ("ecg_values", "pixel_values", "encoder_features")):
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
        elif input_ids is not None and input_ids.shape[1] > 1 and self.config.ecg_token_id is not None:
            # a placeholder without an ECG is an error; a token by itself is one that the model has written
            self.get_placeholder_mask(input_ids, None)
        if ecg_features is None and self.training and self.connector is not None:
            zero = self._zero_of_ecg_path(inputs_embeds)
            inputs_embeds = inputs_embeds if zero is None else inputs_embeds + zero
        outputs = self.language_model(inputs_embeds=inputs_embeds, **kwargs)  # never input_ids: they lack the ECGs
        if places_to_keep is not None:
            outputs.last_hidden_state = outputs.last_hidden_state.flatten(0, 1)[places_to_keep].unsqueeze(0)
        return outputs


class ELMForConditionalGeneration(ELMPreTrainedModel, ELMGenerationMixin):
    """An ELM that answers in text.

    Args:
        encoder, llm: pretrained parts to build around, as [`from_encoder_llm_pretrained`] passes them; by default
            both are made from the config, with random weights.
    """

    def __init__(self, config: ELMConfig, encoder: PreTrainedModel | None = None, llm: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = ELMModel(config, encoder=encoder, language_model=without_head(llm) if llm is not None else None)
        if llm is None:
            text_config = config.text_config
            self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=config.lm_head_bias)
        else:
            self.lm_head = llm.get_output_embeddings()  # with its weight, which may be that of the embeddings
            config.lm_head_bias = getattr(self.lm_head, "bias", None) is not None
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
        encoder: str | os.PathLike | PreTrainedModel | None = None,
        llm_kwargs: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        **config_kwargs: Any,
    ) -> "ELMForConditionalGeneration":
        """Builds an ELM around a pretrained language model; the connector starts at random.

        What is beside the language model is not in its dtype: a new part is in float32, a pretrained encoder as it was saved.

        Args:
            llm: Hub id or local folder of any causal language model; of one that reads pictures or sounds too, the text part.
            encoder: an encoder, or what `load_encoder_part` takes. None: the `encoder_config` of `config_kwargs`, with random weights.
            llm_kwargs: for `from_pretrained` of the language model (`dtype`, `revision`, `attn_implementation`, ...).
            trust_remote_code: run the code that comes with the encoder.
            config_kwargs: the other arguments of [`ELMConfig`].
        """
        llm_model = load_language_model(llm, **(llm_kwargs or {}))
        encoder_model: PreTrainedModel | None = None
        if encoder is not None:
            if not isinstance(encoder, PreTrainedModel):
                encoder = load_encoder_part(encoder, config_kwargs.get("image_features", "patches"), trust_remote_code)
            encoder_model = encoder
            config_kwargs["encoder_config"] = encoder_model.config
        text_config = llm_model.config.get_text_config()
        head, embeddings = llm_model.get_output_embeddings(), llm_model.get_input_embeddings()
        # where the language model is a part, the whole says whether they are tied
        text_config.tie_word_embeddings = getattr(head, "weight", None) is getattr(embeddings, "weight", None)
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
    def _check_same_logits(self, llm: Any) -> None:
        """ValueError if the ELM without an ECG is not its language model, or would not be once it is saved and loaded."""
        text_config, head = self.config.text_config, self.lm_head
        name = f"{type(llm).__name__} ({llm.config.model_type})"
        if type(head) is not nn.Linear or (head.in_features, head.out_features) != (
            text_config.hidden_size,
            text_config.vocab_size,
        ):
            raise ValueError(
                f"The head of {name} is {head}; an ELM has a linear one from the {text_config.hidden_size} numbers of a token's "
                f"embedding to the {text_config.vocab_size} of the vocabulary. Choose another language model."
            )
        by_cache = "past_key_values" in inspect.signature(self.model.language_model.forward).parameters
        if not by_cache or not llm._supports_default_dynamic_cache():  # of transformers' own `generate`
            raise ValueError(
                f"{name} keeps what it has read in a cache of its own, by which an ELM cannot answer. Choose another language model."
            )
        words = [word for word in range(min(9, text_config.vocab_size)) if word != self.config.ecg_token_id]  # any text
        input_ids = torch.tensor([words], device=llm.device)
        ours, theirs = self.eval()(input_ids=input_ids).logits, llm.eval()(input_ids=input_ids).logits
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"{name} does more than its embeddings, its layers and a linear head with a scale and a soft cap, so an ELM around "
                "it would not answer as it does. Choose another language model."
            )

    def compute_logits(self, hidden_states: torch.Tensor, in_float32: bool = False) -> torch.Tensor:
        """The logits [..., vocabulary] of hidden states [..., width], with scale and soft cap as the language model has them.

        Args:
            in_float32: compute them so, whatever dtype the head is in. In bfloat16 logits of 32 to 64 move in steps of 0.25. A head that
                is more than its weights, by an adapter, by quantization or as they are kept elsewhere, computes as it does, and its
                logits are cast.
        """
        config, head = self.config.text_config, self.lm_head
        if in_float32 and type(head) is nn.Linear and not head.weight.is_meta:
            hidden = hidden_states.float()
            # some rows of the head at a time, as the whole of it in float32 may take gigabytes
            parts = [F.linear(hidden, rows.float()) for rows in head.weight.split(ROWS_OF_HEAD)]
            logits = torch.cat(parts, dim=-1) + (0 if head.bias is None else head.bias.float())
        else:
            logits = head(hidden_states)
            logits = logits.float() if in_float32 else logits
        scale, softcap = logit_scale(config), getattr(config, "final_logit_softcapping", None)
        if scale != 1:  # Granite, Cohere, Falcon-H1
            logits = logits * scale
        if softcap is not None:  # Gemma
            logits = softcap * torch.tanh(logits / softcap)
        return logits

    def enable_input_require_grads(self) -> None:
        """As of transformers, for checkpointing that is reentrant; but not in a compiled model, which needs it nowhere and would be
        cut into two graphs, and not in an encoder of which nothing is trained, through which gradients would go for nothing."""

        def require_grad(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if not torch.compiler.is_compiling():
                output.requires_grad_(True)

        inputs, encoder = [self.get_input_embeddings()], self.model.encoder
        if encoder is not None and any(parameter.requires_grad for parameter in encoder.parameters()):
            with suppress(NotImplementedError):  # ECG encoders do it themselves
                inputs.append(encoder.get_input_embeddings())
        self.disable_input_require_grads()  # those of an earlier call
        self._require_grads_hooks = [module.register_forward_hook(require_grad) for module in inputs]

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
        encoder_features: torch.Tensor | None = None,
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
            encoder_features=encoder_features,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.compute_logits(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
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

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As of transformers, but for the tokens of ECGs no rows are added: PEFT asks for as many as the tokenizer has tokens."""
        if self.config.text_config.vocab_size < (new_num_tokens or 0) <= self.config.end_of_ecg_ids:
            return self.get_input_embeddings()
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)


ELMForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")  # the code is saved beside the weights

# the pipeline travels to the Hub with what this file imports
__all__ = ["ECGQuestionAnsweringPipeline", "ELMForConditionalGeneration", "ELMModel", "ELMPreTrainedModel"]
