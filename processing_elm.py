"""Chat and ECGs to model inputs."""

import inspect
import os
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import logging

from .chat_template_elm import ChatTemplate, TemplateError, ecgs_of
from .configuration_elm import IMAGE_REPRESENTATIONS, REPRESENTATIONS
from .ecg_utils import STANDARD_LEADS, ECGRecord
from .feature_extraction_elm import ECGFeatureExtractor, as_batch, ungrouped
from .image_processing_elm import ECGImageProcessor
from .symbolic_elm import OVERFLOWS, SymbolicECGs, signal_tokens
from .tokenization_ecg_byte import ECGByteTokenizer

logger = logging.get_logger(__name__)

# of the tokenizer; held back until the tokens of the ECGs are in the text
PADDING_KWARGS = ("padding", "max_length", "pad_to_multiple_of", "padding_side", "return_attention_mask")
# of apply_chat_template; all others are variables of the template
OF_WRITING = {"add_generation_prompt", "continue_final_message"}
NOT_OF_TEMPLATES = OF_WRITING | {"tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask"}
NOT_OF_TEMPLATES |= {"load_audio_from_video"}
WRITTEN = "{{ messages[0]['content'] }}"  # template of a text that is written already
# of from_pretrained; the ECG-Byte tokenizer is fetched from the same place
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class ELMProcessor(ProcessorMixin):
    """Turns texts and chats with any number of ECGs into the inputs of an ELM.

    Args:
        feature_extractor: prepares the records.
        tokenizer: of the language model, with the placeholder `<signal>` as one added token, and where the representation is
            `symbolic` the tokens `signal_tokens(ecg_byte)`.
        chat_template: Jinja template of any language model; one that knows no parts of type `ecg` gets `<signal>` and a newline in
            the text where each ECG stands.
        num_ecg_tokens: placeholders that each ECG takes, as in the model's config; 0 for a text-only model.
        representation: what an ECG becomes. `signal`: `ecg_values` and placeholders; `rgb`, `stacked_signal`: a picture, as
            `pixel_values`, and placeholders; `symbolic`: tokens in the text. Where the feature extractor allows missing leads, they
            are False in `ecg_lead_mask` (`signal`), not in the text (`symbolic`), on the paper with their place and name but no line
            (`rgb`), or a row of zeros like padding (`stacked_signal`: 0 mV, after zscore the mean, after minmax black).
        image_processor: makes and prepares the pictures of `rgb` and `stacked_signal`, for the model's vision backbone.
        ecg_byte: the ECG-Byte tokenizer of the `symbolic` representation.
        max_length: tokens that a text may have with its symbolic ECGs, such as the context of the language model.
        overflow: what to do with a text that has more. `error`; `downsample`: halve the sampling rate of its ECGs, again
            and again, not below 30 Hz; `drop_leads`: leave out leads of its ECGs, in the order of `DISPENSABLE_LEADS`. Text is
            never cut, and a warning is logged of what became of the ECGs.
        system_prompt: system message of the chats that begin with none; None or an empty text for no such message. It may be
            changed at any time, and is saved.
        chat_template_origin: in words, where the chat template is from and why it was taken.
        explicit_thinking: answers begin with `<think>` and a newline, which the model is given and does not write, see `ChatTemplate`.
        train_phase: that the model was trained in last: `pretrain` (reports, without chat template), `sft`, `rl` or `dpo`; None where nothing is
            known of it.
    """

    ecg_token = "<signal>"
    text_kwargs = {"padding": True}  # of `__call__`, where it gets nothing else

    def __init__(
        self,
        feature_extractor: ECGFeatureExtractor,
        tokenizer: Any,
        chat_template: str | None = None,
        num_ecg_tokens: int = 1,
        representation: str = "signal",
        image_processor: ECGImageProcessor | None = None,
        ecg_byte: ECGByteTokenizer | None = None,
        max_length: int | None = None,
        overflow: str = "error",
        system_prompt: str | None = None,
        chat_template_origin: str | None = None,
        explicit_thinking: bool = False,
        train_phase: str | None = None,
    ):
        if num_ecg_tokens < 0:
            raise ValueError(f"num_ecg_tokens is {num_ecg_tokens}; it must be at least 0.")
        if representation not in REPRESENTATIONS:
            raise ValueError(f"representation is {representation!r}; expected one of {REPRESENTATIONS}.")
        if (representation == "symbolic") != (ecg_byte is not None):
            raise ValueError(
                f"representation={representation!r} {'without' if ecg_byte is None else 'with'} an ecg_byte tokenizer; "
                "'symbolic' needs one, the others take none."
            )
        of_images = None if image_processor is None else image_processor.representation
        if of_images != (representation if representation in IMAGE_REPRESENTATIONS else None):
            raise ValueError(
                f"representation={representation!r} with {'no image_processor' if of_images is None else f'one of {of_images!r}'}; "
                f"{' and '.join(map(repr, IMAGE_REPRESENTATIONS))} need one of theirs, the others take none."
            )
        if overflow not in OVERFLOWS:
            raise ValueError(f"overflow is {overflow!r}; expected one of {OVERFLOWS}.")
        if not isinstance(system_prompt, str | None):
            raise ValueError(f"system_prompt is {system_prompt!r}; expected a text or None.")
        vocabulary = tokenizer.get_vocab()  # made anew at each call, so taken once
        if self.ecg_token not in vocabulary:
            raise ValueError(
                f"The tokenizer has no token {self.ecg_token!r}. Add it, "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': ['{self.ecg_token}']}}), and resize the "
                "model's embeddings."
            )
        if ecg_byte is not None and ecg_byte.across_leads and feature_extractor.missing_leads != "error":
            raise ValueError(
                f"missing_leads is {feature_extractor.missing_leads!r}, but this ECG-Byte tokenizer makes one sequence of all leads "
                "without their names, so that none can be left out: take missing_leads='error', or a tokenizer that keeps within "
                "leads."
            )
        self.num_ecg_tokens = num_ecg_tokens
        self.representation = representation
        self.max_length = max_length
        self.overflow = overflow
        self.system_prompt = system_prompt
        self.chat_template_origin = chat_template_origin
        self.explicit_thinking = explicit_thinking
        self.train_phase = train_phase
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)
        self.image_processor = image_processor
        self.ecg_tokenizer = ecg_byte
        self._symbols = None if ecg_byte is None else SymbolicECGs(ecg_byte, vocabulary, feature_extractor)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Without the image processor, which may be None: transformers knows no optional attributes."""
        return ["feature_extractor", "tokenizer"]

    @staticmethod
    def signal_tokens(ecg_byte: ECGByteTokenizer, lead_names: Sequence[str] = STANDARD_LEADS) -> list[str]:
        """As `symbolic_elm.signal_tokens`."""
        return signal_tokens(ecg_byte, lead_names)

    @property
    def ecg_token_id(self) -> int:
        """Id of the placeholder `<signal>`."""
        return self.tokenizer.convert_tokens_to_ids(self.ecg_token)

    @property
    def signal_token_ids(self) -> list[int]:
        """Ids of `signal_tokens`; none where ECGs are not symbolic."""
        return [] if self._symbols is None else self._symbols.token_ids

    @property
    def model_input_names(self) -> list[str]:
        """Names of what `__call__` returns: first those of the ECGs, then those of the texts."""
        if self.ecg_tokenizer is not None or not self.takes_ecgs:
            return self.tokenizer.model_input_names
        of_ecgs = self.image_processor or self.feature_extractor  # pictures replace the extractor's values
        return [*of_ecgs.model_input_names, *self.tokenizer.model_input_names]

    @property
    def takes_ecgs(self) -> bool:
        """Whether the model reads ECGs; a text-only one does not."""
        return self.ecg_tokenizer is not None or self.num_ecg_tokens > 0

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
                [leads, samples], dicts with `array`, `sampling_rate`, `lead_names` and `unit`, or paths of files. For `rgb`
                also Pillow images, such as scans. Or a list with the ECGs of each text: `[[ecg], [], [ecg, ecg]]`.
            sampling_rate, lead_names, unit: of the ECGs that do not carry their own.
            kwargs: for the tokenizer (`padding`, `padding_side`, `return_tensors`, ...).

        Returns:
            `input_ids` and `attention_mask` [batch, tokens]; of ECGs that do not stand in the text as tokens, what the feature
            extractor makes of them (`ecg_values` [number of ECGs, leads, samples], `ecg_lead_mask` where leads may be missing), or
            what the image processor makes of pictures (`pixel_values`, ...).

        Raises:
            ValueError: the placeholders and the ECGs differ in number, a text is too long for its symbolic ECGs, or as
                `ECGFeatureExtractor.prepare`.
        """
        if text is None and (ecgs is None or self.ecg_tokenizer is not None):
            raise ValueError(
                "Give text, ecgs or both."
                if ecgs is None
                else "Symbolic ECGs stand in a text; give the text too, or take processor.ecg_tokenizer.encode_batch."
            )
        merged_kwargs = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs = merged_kwargs["text_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None)  # applied last, as rows still differ in length
        # placeholders are expanded after the text is tokenized, so no offsets have to be corrected
        text_kwargs.pop("return_text_replacement_offsets", None)
        text_kwargs.pop("return_mm_token_type_ids", None)

        data: dict[str, Any] = {}
        values: Any = []
        ecgs, groups = ungrouped(ecgs)
        if groups is not None and not ecgs and text is not None:
            ecgs = None  # texts that are all without ECG
        if ecgs is not None:
            if not self.takes_ecgs:
                raise ValueError("This processor belongs to a text-only model (num_ecg_tokens=0), which takes no ECG.")
            described = {"sampling_rate": sampling_rate, "lead_names": lead_names, "unit": unit}
            if self.image_processor is not None or self.ecg_tokenizer is not None:  # from records, not padded arrays
                values = self._records(ecgs, **described)
            else:
                data.update(self.feature_extractor(self._as_batch(ecgs), **described))
                values = data["ecg_values"]  # only counted below
            if self.image_processor is not None:
                data.update(self.image_processor(values, self._seconds, self.feature_extractor.lead_names))
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            if not texts:
                raise ValueError("There is no text; give at least one.")
            counts = [one.count(self.ecg_token) for one in texts]
            if groups and groups != counts:
                raise ValueError(
                    f"The texts have {counts} {self.ecg_token} placeholders, and the groups of ECGs {groups} ECGs; give each text "
                    "a group of as many ECGs as it has placeholders."
                )
            data.update(self._tokenize(texts, counts, values, text_kwargs))
        return BatchFeature(data, tensor_type=return_tensors)

    def apply_chat_template(  # type: ignore[override]  # the rest by name
        self, conversation: Any, chat_template: str | None = None, **kwargs: Any
    ) -> Any:
        """As of transformers, for one chat or a batch, with any chat template: see `ChatTemplate`.

        Chats that do not begin with a system message get `system_prompt`. A part `{"type": "ecg"}` holds `ecg` (array, dict or
        record) or `path`, and where these lack them `sampling_rate`, `lead_names` and `unit`. Parts without data stand for the ECGs
        of `processor_kwargs={"ecgs": ...}`. `return_assistant_tokens_mask` needs no `{% generation %}` in the template.

        Raises:
            ValueError: the template does not take the chat, the answers cannot be told from the rest, or as `__call__`.
        """
        if not len(conversation):
            raise ValueError("There is no chat, or no message in it; give at least one.")
        template = self.template(chat_template)
        several = not isinstance(conversation[0], Mapping)
        chats: Any = [self._prompted(chat) for chat in (conversation if several else [conversation])]
        processor_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
        tokenize = kwargs.get("tokenize", False)
        if tokenize:
            processor_kwargs |= ecgs_of(chats)
        spans: Any = None
        return_tensors = kwargs.get("return_tensors")
        try:
            if kwargs.pop("sanitize_control_tokens", False):  # before ECGs are text: their token is no user's
                masked = kwargs.get("return_assistant_tokens_mask", False)
                chats = self.tokenizer._mark_chat_inputs(template.text, chats, None, None, {}, tokenize, masked)[0]
                processor_kwargs["sanitize_control_tokens"] = True
            chats = [template.with_texts(chat) for chat in chats]
            variables = {name: value for name, value in kwargs.items() if name not in NOT_OF_TEMPLATES}
            marks_alone = template.marks_answers and not (template.marked_prompt or template.explicit_thinking)
            if tokenize and kwargs.get("return_assistant_tokens_mask") and not marks_alone:
                spans = [template.answer_spans(chat, **variables) for chat in chats]
                kwargs |= {"return_assistant_tokens_mask": False, "return_tensors": None}
                processor_kwargs["return_offsets_mapping"] = True
            text = template.text
            if template.explicit_thinking:  # transformers gets texts that are written already
                asked = {name: kwargs.pop(name) for name in OF_WRITING if name in kwargs}
                texts = [template.render(chat, **asked, **variables) for chat in chats]
                chats, text = [[{"role": "user", "content": one}] for one in texts], WRITTEN
                kwargs = {name: value for name, value in kwargs.items() if name not in variables}
            kwargs["processor_kwargs"] = processor_kwargs
            output: Any = super().apply_chat_template(chats if several else chats[0], text, **kwargs)
        except TemplateError as error:
            raise ValueError(f"The chat template does not take the chat: {error}") from error
        if spans is not None:
            output = self._adjust_assistant_masks_indices(output, spans)
            output.convert_to_tensors(return_tensors)
        return output

    def template(self, chat_template: str | None = None) -> ChatTemplate:
        """The chat template, or another one, with the tokenizer that it writes for.

        Raises:
            ValueError: there is none.
        """
        own = self.chat_template
        if isinstance(own, dict):  # several, by name
            chat_template = own.get(chat_template or "default", chat_template)
        text = chat_template or own
        if not isinstance(text, str):
            raise ValueError("The processor has no chat template; set processor.chat_template.")
        return ChatTemplate(text, self.tokenizer, self.ecg_token, self.explicit_thinking)

    @property
    def stop_token_ids(self) -> list[int]:
        """What ends an answer: the tokens that the chat template writes behind it, and the tokenizer's end of text."""
        ends = [] if self.chat_template is None else self.template().ends_of_turn
        ids = [*self.tokenizer.convert_tokens_to_ids(ends), self.tokenizer.eos_token_id]
        return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))

    @property
    def answer_opening(self) -> str:
        """What every answer begins with and is none of it, such as the empty thinking block of Qwen3; decoded as answers are."""
        if self.chat_template is None:
            return ""
        ids = self.tokenizer(self.template().opening, add_special_tokens=False)["input_ids"]
        return self.decode(ids, skip_special_tokens=True).strip()

    @property
    def given_answer(self) -> str:
        """What of an answer stands in its prompt already, so that the model does not write it: `<think>` and a newline, or nothing."""
        return "" if self.chat_template is None else self.template().given

    def decode_answers(self, token_ids: Any) -> list[str]:
        """The answers that a model wrote [batch, tokens] as texts, without their `answer_opening` and the white space round them, and
        with what it was given of them."""
        opening, given = self.answer_opening, self.given_answer
        texts = [text.strip() for text in self.batch_decode(token_ids, skip_special_tokens=True)]
        return [
            text.removeprefix(opening).strip()
            if not given or (opening and text.startswith(opening)) or not text
            else given + text
            for text in texts
        ]

    def with_system_prompt(self, system_prompt: str | None = None) -> "ELMProcessor":
        """A processor of the same parts with another `system_prompt`; this one, if it is None."""
        if system_prompt is None:
            return self
        processor = copy(self)
        processor.system_prompt = system_prompt
        return processor

    def _prompted(self, chat: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        if not self.system_prompt or (len(chat) and chat[0]["role"] == "system"):
            return chat
        return [{"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}, *chat]

    def draw(self, ecg: Any, **described: Any) -> Image.Image:
        """The picture of an ECG that an `rgb` or `stacked_signal` model is shown.

        Args:
            ecg, described: one ECG and its `sampling_rate`, `lead_names` and `unit`, as `__call__` takes them.

        Raises:
            ValueError: the representation has no pictures, or as `ECGFeatureExtractor.prepare`.
        """
        if self.image_processor is None:
            raise ValueError(
                f"representation is {self.representation!r}; only {' and '.join(IMAGE_REPRESENTATIONS)} show ECGs as pictures."
            )
        (record,) = self._records([ecg], **described)
        if isinstance(record, Image.Image):
            return record
        return self.image_processor.draw(record, self._seconds, self.feature_extractor.lead_names)

    @property
    def _seconds(self) -> float:
        return self.feature_extractor.num_samples / self.feature_extractor.sampling_rate

    def _as_batch(self, ecgs: Any) -> list:
        batch = [ecgs] if isinstance(ecgs, Image.Image) else as_batch(ecgs)
        if self.representation != "rgb" and any(isinstance(ecg, Image.Image) for ecg in batch):
            raise ValueError(f"A picture in place of an ECG, but representation {self.representation!r} takes samples.")
        return batch

    def _records(self, ecgs: Any, **described: Any) -> list[ECGRecord | Image.Image]:
        """The ECGs as the feature extractor prepares them; pictures stay what they are."""
        batch = self._as_batch(ecgs)
        if self.representation == "stacked_signal":  # all are equally long, and have a row for each lead
            rate, leads = self.feature_extractor.sampling_rate, tuple(self.feature_extractor.lead_names)
            return [ECGRecord(array, rate, leads) for array in self.feature_extractor(batch, **described)["ecg_values"]]
        unprepared = [ecg for ecg in batch if not isinstance(ecg, Image.Image)]
        records = iter(self.feature_extractor.prepare_batch(unprepared, **described))
        return [ecg if isinstance(ecg, Image.Image) else next(records) for ecg in batch]

    def _tokenize(
        self, texts: list[str], counts: list[int], values: Any, text_kwargs: dict[str, Any]
    ) -> dict[str, list]:
        """The tokens of the texts, with those of the ECGs in place of the placeholders (`counts` of each), padded."""
        if sum(counts) != len(values):
            raise ValueError(
                f"The text has {sum(counts)} {self.ecg_token} placeholders ({counts} by sample) for {len(values)} ECGs; "
                f"write one placeholder for each ECG. Of a chat the template writes them: there no text may hold {self.ecg_token}."
            )
        if len(values) and text_kwargs.get("truncation"):
            raise ValueError("truncation would cut ECGs; shorten the text, or leave truncation out.")
        padding = {name: text_kwargs.pop(name) for name in PADDING_KWARGS if name in text_kwargs}
        columns = dict(self.tokenizer(texts, padding=False, **text_kwargs))
        encoded = [{name: column[sample] for name, column in columns.items()} for sample in range(len(texts))]
        ecg_token_id = self.ecg_token_id
        if self._symbols is None:
            tokens = [[ecg_token_id] * self.num_ecg_tokens] * len(values)  # one list many times: nothing writes to it
        else:
            tokens = self._symbols.encode(values)
        first = 0  # ECG of this sample, among those of the batch
        for sample, (row, count) in enumerate(zip(encoded, counts, strict=True)):
            own = slice(first, first + count)
            num_text_tokens = len(row["input_ids"]) - count  # placeholders give way to ECGs
            room = None if self.max_length is None else self.max_length - num_text_tokens  # for the ECGs
            if room is not None and sum(map(len, tokens[own])) > room:
                tokens[own] = self._fit(values[own], tokens[own], room, f"Text {sample} of {len(texts)}")
            places = [place for place, token_id in enumerate(row["input_ids"]) if token_id == ecg_token_id]
            for name, column in row.items():  # masks and offsets grow with the ids
                # from the last place on: those before it stay where they are
                for place, ids in reversed(list(zip(places, tokens[own], strict=True))):
                    column[place : place + 1] = ids if name == "input_ids" else [column[place]] * len(ids)
            first += count
        return self._pad(encoded, **padding)

    def _fit(self, records: list[ECGRecord], tokens: list[list[int]], room: int, name: str) -> list[list[int]]:
        """Fewer tokens for the ECGs of a text, by the rule `overflow`: at most `room` together."""
        too_long = (
            f"{name} has {sum(map(len, tokens))} tokens of {len(tokens)} ECGs and room for {max(room, 0)} beside its words "
            f"(max_length={self.max_length})"
        )
        if self._symbols is not None:  # placeholders are as many for any record
            for smaller, change in self._symbols.smaller(records, self.overflow):
                tokens = self._symbols.encode(smaller)
                if sum(map(len, tokens)) <= room:
                    logger.warning("%s: %s.", too_long, change)
                    return tokens
            what_to_do = (
                "shorten the text or the records, take a lower sampling rate or fewer leads in the feature extractor, or let the processor "
                f"do so with overflow='downsample' or 'drop_leads' (it is {self.overflow!r}; in training: --ecg_overflow)"
            )
        else:
            what_to_do = "shorten the text, show fewer ECGs, or raise max_length where the language model reads more"
        raise ValueError(f"{too_long}. Nothing is cut in silence: {what_to_do}.")

    def _pad(self, encoded: list[dict[str, list]], **padding: Any) -> dict[str, list]:
        """The columns of the batch, padded as the tokenizer pads; `offset_mapping` too, which it leaves out."""
        columns: dict[str, list] = {name: [row[name] for row in encoded] for name in encoded[0]}
        offsets = columns.pop("offset_mapping", None)
        # the tokenizer would warn that its own padding is faster, but the ECGs come after it
        warnings, key = self.tokenizer.deprecation_warnings, "Asking-to-pad-a-fast-tokenizer"
        warned, warnings[key] = warnings.get(key, False), True  # True: as if it had been given
        padded = dict(self.tokenizer.pad(columns, **padding))
        warnings[key] = warned
        if offsets is not None:
            side = padding.get("padding_side") or self.tokenizer.padding_side
            fills = [[(0, 0)] * (len(ids) - len(row)) for ids, row in zip(padded["input_ids"], offsets, strict=True)]
            pairs = zip(fills, offsets, strict=True)
            padded["offset_mapping"] = [fill + row if side == "left" else row + fill for fill, row in pairs]
        return padded

    def decode_ecg(
        self, token_ids: Any, low: float | None = None, high: float | None = None, num_samples: int | None = None
    ) -> list[dict[str, Any]]:
        """The ECGs that stand in a text as tokens, such as one that the model wrote.

        Args:
            token_ids: ids of the language model [tokens]; each run of ECG tokens is one ECG.
            low, high: millivolts of the symbols a and z; only a tokenizer with a fixed range knows them itself.
            num_samples: per lead; default: that of the feature extractor.

        Returns:
            For each ECG a dict of `array` (float32 [leads, num_samples] in millivolts, NaN where tokens are missing),
            `sampling_rate`, `lead_names` and `unit`, as the processor takes it.

        Raises:
            ValueError: the representation is not `symbolic`, the range is missing, or a lead has too many samples.
        """
        if self._symbols is None:
            raise ValueError(f"representation is {self.representation!r}; only 'symbolic' ECGs are tokens of the text.")
        return self._symbols.decode(token_ids, low, high, num_samples)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """As of transformers; the ECG-Byte tokenizer stands beside as `ecg_byte.json`."""
        files = super().save_pretrained(save_directory)  # without push_to_hub: all files go together, below
        if self.ecg_tokenizer is not None:
            files += self.ecg_tokenizer.save_pretrained(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory))), **kwargs)
        return files

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """The parts, the feature extractor of the class here: transformers would ask to trust the code saved with it."""
        extractor = ECGFeatureExtractor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return [extractor, cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs)]

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As of transformers, which does not know how the image processor and the ECG-Byte tokenizer are saved.

        Raises:
            ValueError: `processor_config.json` has a field that no ELM's processor has.
        """
        processor_dict, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        known = {"auto_map", "processor_class", *inspect.signature(cls.__init__).parameters} - {
            "self",
            "tokenizer",
            "ecg_byte",
        }
        if unknown := sorted(processor_dict.keys() - known):
            raise ValueError(
                f"processor_config.json of {pretrained_model_name_or_path} has {', '.join(unknown)}, which the processor of an ELM "
                "does not know; take it out, or load with the version that wrote it."
            )
        if isinstance(processor_dict.get("image_processor"), dict):
            processor_dict["image_processor"] = ECGImageProcessor.from_dict(processor_dict["image_processor"])
        if processor_dict.get("representation") == "symbolic":
            where = {name: value for name, value in kwargs.items() if name in HUB_KWARGS}
            processor_dict["ecg_byte"] = ECGByteTokenizer.from_pretrained(pretrained_model_name_or_path, **where)
        return processor_dict, unused

    @staticmethod
    def get_possibly_dynamic_module(module_name: str) -> Any:
        """As of transformers, for the parts of this processor alone.

        transformers would load the model that an `audio_tokenizer` in `processor_config.json` names, from wherever it says.
        """
        if module_name not in ("FeatureExtractionMixin", "PreTrainedTokenizerBase", "MistralCommonBackend"):
            raise ValueError(
                f"processor_config.json names a part {module_name} (audio_tokenizer), which the processor of an ELM does not have; "
                "take it out."
            )
        return ProcessorMixin.get_possibly_dynamic_module(module_name)

    def _multimodal_inputs_from_conversations(
        self, *args: Any, **kwargs: Any
    ) -> tuple[list, list, list, dict[str, Any]]:
        """No images, videos or audio: the ECGs of a chat are among the arguments of `__call__` by now."""
        return [], [], [], {}


ELMProcessor.register_for_auto_class()

__all__ = ["ELMProcessor"]
