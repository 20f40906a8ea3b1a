"""`transformers.pipeline` for ELMs: an ECG and a question go in, an answer comes out."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from transformers import GenerationConfig, Pipeline


class ECGQuestionAnsweringPipeline(Pipeline):
    """Answers questions about ECGs.

    ```python
    pipe = pipeline("ecg-question-answering", model="owner/name", trust_remote_code=True)
    pipe({"ecg": "record.npz", "question": "What is the rhythm?"})  # [{"answer": "..."}]
    ```

    An input is a dict with `question` and `ecg`: the path of a file, an array [leads, samples], a dict of `array`,
    `sampling_rate`, `lead_names` and `unit`, or a list of these; beside an array `sampling_rate`, `lead_names` and `unit` may stand
    in the input itself. Without `ecg` the question is asked alone. A chat, as the processor's chat template takes it, is an input too.
    Of a list of inputs the result is a list of results, and `batch_size` of them are answered at once.

    Args:
        system_prompt: system message of the chats that begin with none, in place of the processor's; "" for none.
        generate_kwargs: for `generate`, such as `{"num_beams": 4}`; `max_new_tokens` may be given alone.
    """

    model: Any
    processor: Any
    _load_processor: Any = True  # True: must be there; False: never loaded
    _load_tokenizer: Any = False
    _load_feature_extractor: Any = False
    _load_image_processor: Any = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=128)  # where neither caller nor model sets one

    def _sanitize_parameters(
        self,
        system_prompt: str | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        generation = {**(generate_kwargs or {}), **kwargs}
        if max_new_tokens is not None:
            if "max_new_tokens" in generation:
                raise ValueError("max_new_tokens is given twice, by itself and in generate_kwargs.")
            generation["max_new_tokens"] = max_new_tokens
        return {} if system_prompt is None else {"system_prompt": system_prompt}, generation, {}

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As of transformers; of an empty list an empty one, where transformers looks for its first item."""
        return [] if isinstance(inputs, (list, tuple)) and not inputs else super().__call__(inputs, *args, **kwargs)

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> Any:
        """A list of inputs, as inputs of the model."""
        inputs = self.processor.with_system_prompt(**preprocess_parameters).apply_chat_template(
            [as_chat(one) for one in input_],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},  # left: answers go on at the right end
        )
        # token ids stay integers
        return {
            name: value.to(self.model.dtype) if value.is_floating_point() else value for name, value in inputs.items()
        }

    def _forward(self, input_tensors: Any, **forward_parameters: Any) -> Any:
        prompt = input_tensors["input_ids"]
        output = self.model.generate(**input_tensors, **self._prepare_generate_kwargs(forward_parameters))
        return {"answers": output[:, prompt.shape[1] :], "num_inputs": len(prompt)}  # without the prompt

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> list[list[dict[str, str]]]:
        """The answers to each input: one, or `num_return_sequences`."""
        answers = [{"answer": text} for text in self.processor.decode_answers(model_outputs["answers"])]
        each = len(answers) // model_outputs["num_inputs"]
        return [answers[start : start + each] for start in range(0, len(answers), each)]

    def run_single(self, inputs: Any, *params: dict[str, Any]) -> list[dict[str, str]]:
        """The answers to one input."""
        return next(self.get_iterator([inputs], 0, 1, *params))  # no workers, a batch of one

    def get_iterator(
        self,
        inputs: Iterable[Any],
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[list[dict[str, str]]]:
        """Batches are made by the processor, which pads the texts and keeps the ECGs of each in order."""
        # a dataset of PyTorch ends where its length says
        items = (inputs[index] for index in range(len(inputs))) if hasattr(inputs, "__getitem__") else iter(inputs)  # type: ignore[arg-type,index]
        while batch := list(itertools.islice(items, batch_size)):  # batch by batch, as inputs may be a generator
            outputs = self.forward(self.preprocess(batch, **preprocess_params), **forward_params)
            yield from self.postprocess(outputs, **postprocess_params)


def as_chat(question: Any) -> list[dict[str, Any]]:
    """The chat of an input of the pipeline.

    Raises:
        ValueError: it is no such input.
    """
    if hasattr(question, "messages"):  # transformers made it of a list of messages
        return list(question.messages)
    expected = 'expected {"ecg": file, array or dict, "question": text}, a list of these, or a chat'
    if not isinstance(question, Mapping) or not isinstance(question.get("question"), str):
        got = f"a dict of {', '.join(map(str, question))}" if isinstance(question, Mapping) else type(question).__name__
        raise ValueError(f"The pipeline got {got}; {expected}.")
    unknown = question.keys() - {"ecg", "question", "sampling_rate", "lead_names", "unit"}
    if unknown:
        raise ValueError(f"The pipeline got {', '.join(sorted(unknown))} beside a question; {expected}.")
    ecgs = question.get("ecg")
    # nested lists of numbers are one ECG
    several = isinstance(ecgs, (list, tuple)) and not (ecgs and isinstance(ecgs[0], (list, tuple)))
    described = {key: question[key] for key in ("sampling_rate", "lead_names", "unit") if key in question}
    parts = []
    ecg_list: Any = ecgs if several else [] if ecgs is None else [ecgs]
    if several and not ecg_list:
        raise ValueError('The pipeline got an empty list of ECGs; leave "ecg" out of a question that is about none.')
    for ecg in ecg_list:
        if isinstance(ecg, (list, tuple)):
            ecg = np.asarray(ecg)  # integers stay integers, which need a unit
        place = "path" if isinstance(ecg, (str, os.PathLike)) else "ecg"
        parts.append({"type": "ecg", place: ecg, **described})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question["question"]}]}]


__all__ = ["ECGQuestionAnsweringPipeline"]
