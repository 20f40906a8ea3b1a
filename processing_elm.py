"""Chat and ECGs to model inputs."""

import os
from collections.abc import Mapping
from typing import Any

from transformers import BatchFeature, ProcessorMixin

try:
    from .ecg_utils import as_record
    from .feature_extraction_elm import ECGFeatureExtractor
except ImportError:
    if __package__:  # loaded from a Hub repo: a real error
        raise
    from ecg_utils import as_record
    from feature_extraction_elm import ECGFeatureExtractor


class ELMProcessor(ProcessorMixin):
    """Turns texts and chats with any number of ECGs into the inputs of an ELM.

    Args:
        feature_extractor: prepares the records.
        tokenizer: of the language model, with the placeholder `<signal>` as one added token.
        chat_template: Jinja template that writes one `<signal>` where each ECG stands.
        num_ecg_tokens: placeholders that each ECG takes, as in the model's config; 0 for a text-only model.
    """

    ecg_token = "<signal>"
    text_kwargs = {"padding": True}
    skip_tensor_conversion = ["text_replacement_offsets"]

    def __init__(
        self,
        feature_extractor: ECGFeatureExtractor,
        tokenizer: Any,
        chat_template: str | None = None,
        num_ecg_tokens: int = 1,
    ):
        if num_ecg_tokens < 0:
            raise ValueError(f"num_ecg_tokens is {num_ecg_tokens}; it must be at least 0.")
        if self.ecg_token not in tokenizer.get_vocab():
            raise ValueError(
                f"The tokenizer has no token {self.ecg_token!r}. Add it, "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': ['{self.ecg_token}']}}), and resize the "
                "model's embeddings."
            )
        self.num_ecg_tokens = num_ecg_tokens
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    @property
    def ecg_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.ecg_token)

    def __call__(
        self,
        text: str | list[str] | None = None,
        ecgs: Any = None,
        sampling_rate: float | None = None,
        lead_names: list[str] | None = None,
        unit: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            text: one text or a batch, with one `<signal>` where each ECG stands.
            ecgs: one ECG or a list of them, in the order in which their placeholders stand in the batch: arrays
                [leads, samples], dicts with `array`, `sampling_rate`, `lead_names` and `unit`, or paths of files.
            sampling_rate, lead_names, unit: of the ECGs that do not carry their own.
            kwargs: for the tokenizer (`padding`, `padding_side`, `return_tensors`, ...).

        Returns:
            `input_ids` and `attention_mask` [batch, tokens]; `ecg_values` [number of ECGs, leads, samples] if there
            are ECGs.

        Raises:
            ValueError: if the placeholders and the ECGs differ in number, or as the feature extractor says.
        """
        if text is None and ecgs is None:
            raise ValueError("Give text, ecgs or both.")
        merged_kwargs = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs = merged_kwargs["text_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None)
        return_offsets = text_kwargs.pop("return_text_replacement_offsets", False)
        text_kwargs.pop("return_mm_token_type_ids", None)

        data: dict[str, Any] = {}
        num_ecgs = 0
        if ecgs is not None:
            if self.num_ecg_tokens == 0:
                raise ValueError("This processor belongs to a text-only model (num_ecg_tokens=0), which takes no ECG.")
            features = self.feature_extractor(ecgs, sampling_rate=sampling_rate, lead_names=lead_names, unit=unit)
            num_ecgs = len(features["ecg_values"])
            data.update(features)
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            counts = [sample.count(self.ecg_token) for sample in texts]
            if sum(counts) != num_ecgs:
                raise ValueError(
                    f"The text has {sum(counts)} {self.ecg_token} placeholders ({counts} by sample) for {num_ecgs} ECGs; "
                    "write one placeholder for each ECG, or leave them to apply_chat_template."
                )
            texts, offsets = self.repeat_placeholders(texts)
            data.update(self.tokenizer(texts, **text_kwargs))
            if return_offsets:
                data["text_replacement_offsets"] = offsets
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def repeat_placeholders(self, text: list[str]) -> tuple[list[str], list[list[dict[str, Any]]]]:
        """Repeats each placeholder `num_ecg_tokens` times; the offsets say which characters became which."""
        replacement = self.ecg_token * self.num_ecg_tokens
        growth = len(replacement) - len(self.ecg_token)
        batch_offsets = []
        for sample in text:
            offsets: list[dict[str, Any]] = []
            start = sample.find(self.ecg_token)
            while start >= 0:
                end, new_start = start + len(self.ecg_token), start + growth * len(offsets)
                offsets.append({"span": (start, end), "new_span": (new_start, new_start + len(replacement))})
                start = sample.find(self.ecg_token, end)
            batch_offsets.append(offsets)
        return [sample.replace(self.ecg_token, replacement) for sample in text], batch_offsets

    def _multimodal_inputs_from_conversations(
        self, conversations: list[list[dict[str, Any]]], *args: Any, **kwargs: Any
    ) -> tuple[list, list, list, dict[str, Any]]:
        """The ECGs that stand in the chats, as the keyword `ecgs` of `__call__`.

        A part `{"type": "ecg"}` holds `ecg` (array, dict or record) or `path`, and what that does not say of its
        `sampling_rate`, `lead_names` and `unit`. Parts without data stand for the ECGs of
        `processor_kwargs={"ecgs": ...}`.
        """
        contents = [message["content"] for chat in conversations for message in chat if message.get("content")]
        parts = [part for content in contents if not isinstance(content, str) for part in content]
        ecg_parts = [part for part in parts if part["type"] == "ecg"]
        ecgs = [self._ecg_of(part) for part in ecg_parts]
        given = [ecg for ecg in ecgs if ecg is not None]
        if not given:
            return [], [], [], {}
        if len(given) < len(ecgs):
            raise ValueError(
                f"{len(ecgs) - len(given)} of {len(ecgs)} ECGs of the chat have no data; give each its 'ecg' or 'path', "
                'or none and all of them as processor_kwargs={"ecgs": [...]}.'
            )
        return [], [], [], {"ecgs": given}

    @staticmethod
    def _ecg_of(part: dict[str, Any]) -> Any:
        ecg = part.get("path") if part.get("ecg") is None else part["ecg"]
        described = {key: part[key] for key in ("sampling_rate", "lead_names", "unit") if part.get(key) is not None}
        if ecg is None or not described:
            return ecg
        if isinstance(ecg, (str, os.PathLike, Mapping)):  # may say some of it too
            return as_record(ecg, **described)
        return {"array": ecg, **described}


ELMProcessor.register_for_auto_class()

__all__ = ["ELMProcessor"]
