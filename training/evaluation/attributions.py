"""How much each sample of an ECG adds to the likelihood of an answer, by integrated gradients or occlusion, through Captum.

What is taken away of the ECG is its beats: in their place stands each lead's level between them (`level_between_beats`).
"""

from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from elm_ecg.configuration_elm import IMAGE_REPRESENTATIONS
from elm_ecg.ecg_drawing import page_height, page_width, strips
from elm_ecg.ecg_utils import ECGRecord
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.evaluation.answers import Answerer, Conversation
from elm_ecg.training.evaluation.beats import between_beats, is_flat, level_between_beats
from elm_ecg.training.evaluation.conditions import CONDITIONS, ECG
from elm_ecg.training.evaluation.questions import Question

try:
    from captum.attr import IntegratedGradients, Occlusion
except ImportError:  # told when it is needed
    IntegratedGradients = Occlusion = None

Method = Literal["integrated_gradients", "occlusion"]
WINDOW_SECONDS = 0.1  # of a lead, that is taken away at once
STEPS = 32  # of the integral
BATCH_SIZE = 16
MAX_TOKENS = 8192  # of a batch with gradients, which take memory for every token


@dataclass
class AskedModel:
    """An ELM that is asked one question about variants of one record.

    Args:
        messages: the chat; its last message is the question.
        record: the part that the model reads, in millivolts, as `ECGFeatureExtractor.prepare(normalize=False)` gives it.
    """

    model: ELMForConditionalGeneration
    processor: ELMProcessor
    messages: list[dict[str, Any]]
    record: ECGRecord

    def __post_init__(self) -> None:
        if not self.processor.takes_ecgs:
            raise ValueError("This model is text-only: it takes no ECG, so no answer rests on one.")
        self.processor = copy(self.processor)
        extractor = copy(self.processor.feature_extractor)
        extractor.bandpass = extractor.notch = None  # the record is filtered already
        self._scale, self._offset = _normalization(extractor, self.record)
        extractor.normalization = "none"
        self.processor.feature_extractor = extractor

    @property
    def levelled(self) -> ECGRecord:
        """The record with each lead at its level between beats."""
        level = level_between_beats(self.record)
        return replace(self.record, array=np.broadcast_to(level[:, None], self.record.array.shape).copy())

    def scaled(self, arrays: np.ndarray) -> list[ECGRecord]:
        """Variants of the record [variants, leads, samples] in millivolts, normalised as it is."""
        return [replace(self.record, array=array * self._scale + self._offset) for array in arrays]

    def _answerer(self, arrays: np.ndarray, answer: str | None, **generation: Any) -> Answerer:
        rows = [{"messages": self.messages, "ecg": [ecg]} for ecg in self.scaled(arrays)]
        questions = [Question(row, len(self.messages), "", "", "", "") for row in range(len(rows))]
        candidates = None if answer is None else [[answer]] * len(rows)
        return Answerer(self.model, self.processor, rows, questions, candidates, BATCH_SIZE, generation)  # type: ignore[arg-type]

    def answer(self, max_new_tokens: int = 128) -> str:
        """What the model answers about the record."""
        return self._asked(self._answerer(self.record.array[None], None, max_new_tokens=max_new_tokens))[0]

    def log_likelihoods(self, arrays: np.ndarray, answer: str) -> np.ndarray:
        """log P(answer) about variants of the record [variants, leads, samples], in millivolts."""
        return np.array([values[0] for values in self._asked(self._answerer(arrays, answer))])

    def _asked(self, answerer: Answerer) -> list[Any]:
        values: list[Any] = [None] * len(answerer.questions)
        for number, batch in enumerate(answerer.batches):
            indices = [index for row in batch for index in row]
            for index, value in zip(indices, answerer.answer_batch(batch, CONDITIONS[ECG], number), strict=True):
                values[index] = value
        return values

    def read(self, array: np.ndarray, answer: str) -> tuple[Conversation, list[int]]:
        """The prompt about a variant of the record, with its ECG as the model reads it; and the tokens of the answer."""
        answerer = self._answerer(array[None], answer)
        (conversation,) = answerer.read(answerer.batches[0], CONDITIONS[ECG])
        assert conversation.candidates is not None
        return conversation, conversation.candidates[0][0]


def _normalization(extractor: ECGFeatureExtractor, record: ECGRecord) -> tuple[np.float32, np.float32]:
    """The factor and the summand by which a record is normalised. Its variants are normalised alike: by their own range or deviation
    what is left of them would grow."""
    if extractor.normalization == "none":
        return np.float32(1), np.float32(0)
    normalized, samples = extractor.prepare(record).array.ravel(), record.array.ravel()
    lowest, highest = samples.argmin(), samples.argmax()
    (low, high), (new_low, new_high) = (array[[lowest, highest]] for array in (samples, normalized))
    scale = (new_high - new_low) / (high - low) if high > low else np.float32(1)
    return scale, new_low - scale * low


def require_captum() -> None:
    """Raises ImportError if Captum is not installed."""
    if IntegratedGradients is None:
        raise ImportError('Explanations need Captum: install it with `pip install "elm-ecg[explain]"`.')


def attribute(asked: AskedModel, answer: str, method: Method) -> np.ndarray:
    """What each sample of the record adds to log P(answer), float64 [leads, samples]; below zero where it speaks against it. Of a flat
    record all are 0.

    - `occlusion`: the drop where `WINDOW_SECONDS` of a lead are at its level between beats. Of any model.
    - `integrated_gradients` (Sundararajan et al. 2017, arXiv 1703.01365) along the way from the record at its level to the record: of
      samples for `signal`; of pixels for `rgb` and `stacked_signal`, which count to the lead and moment that is drawn there; of
      embeddings of tokens for `symbolic`, from the mean of those between the beats of the lead.

    Raises:
        ImportError: Captum is not installed.
        ValueError: the method cannot tell where in the ECG the model's inputs stand.
    """
    require_captum()
    # taking away changes nothing: what were found is rounding, or how tokens happen to cut a lead into runs
    if is_flat(asked.record):
        return np.zeros(asked.record.array.shape)
    if method == "occlusion":
        return _occlusion(asked, answer)
    representation = asked.model.config.representation
    if representation == "symbolic":
        return _of_tokens(asked, answer)
    name = "pixel_values" if representation in IMAGE_REPRESENTATIONS else "ecg_values"
    (read, tokens), (level, _) = (asked.read(record.array, answer) for record in (asked.record, asked.levelled))
    if read.ecgs[name].ndim != (4 if name == "pixel_values" else 3):
        raise ValueError("The model reads patches of a picture, whose places are not known; take --method occlusion.")
    rest = {key: values for key, values in read.ecgs.items() if key != name}
    sums = _integrate(asked.model, read.prompts[0].input_ids, tokens, read.ecgs[name], level.ecgs[name], name, rest)
    if name == "ecg_values":
        rows = [asked.processor.feature_extractor.lead_names.index(lead) for lead in asked.record.lead_names]
        return sums[rows][:, : asked.record.array.shape[1]]
    pixels = sums.sum(axis=0)  # of all colours
    return (_from_page if representation == "rgb" else _from_stack)(asked, pixels)


def _integrate(
    model: ELMForConditionalGeneration,
    prompt: list[int],
    tokens: list[int],
    inputs: torch.Tensor,
    baseline: torch.Tensor,
    name: str,
    rest: dict[str, torch.Tensor],
) -> np.ndarray:
    """Integrated gradients of log P(tokens | prompt) by an input of the model, of the shape of `inputs` without its first dimension.

    Args:
        inputs, baseline: [1, ...]
        name: of that argument of the model.
        rest: its other inputs.
    """
    device, dtype = model.device, model.dtype
    ids = torch.tensor([prompt + tokens[:-1]], device=device)
    following = torch.tensor(tokens, device=device)

    def forward(values: torch.Tensor) -> torch.Tensor:
        number = len(values)
        given: dict[str, Any] = {key: one.to(device).expand(number, *one.shape[1:]) for key, one in rest.items()}
        if name != "inputs_embeds":
            given["input_ids"] = ids.expand(number, -1)
        logits = model(**given, **{name: values.to(dtype)}, logits_to_keep=len(tokens)).logits
        picked = logits.float().log_softmax(-1).gather(2, following.expand(number, -1)[..., None])
        return picked[..., 0].sum(1)

    inputs, baseline = inputs.to(device).float(), baseline.to(device).float()
    sums = IntegratedGradients(forward).attribute(
        inputs,
        baseline,
        n_steps=STEPS,
        internal_batch_size=max(1, min(BATCH_SIZE, MAX_TOKENS // ids.shape[1])),
        method="gausslegendre",
    )
    if not torch.isfinite(sums).all():
        raise ValueError("The model's gradients are NaN or infinite: take --dtype float32, or --method occlusion.")
    return sums[0].double().cpu().numpy()


def _occlusion(asked: AskedModel, answer: str) -> np.ndarray:
    record = asked.record
    width = max(1, round(WINDOW_SECONDS * record.sampling_rate))

    def forward(values: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(asked.log_likelihoods(values.float().numpy(), answer))

    inputs, level = (torch.from_numpy(one.array.copy())[None] for one in (record, asked.levelled))
    sums = Occlusion(forward).attribute(
        inputs, (1, width), strides=(1, width), baselines=level, perturbations_per_eval=BATCH_SIZE
    )
    return sums[0].double().numpy() / width  # each sample of a window has the drop of the whole


def _of_tokens(asked: AskedModel, answer: str) -> np.ndarray:
    """Of a token what its embedding adds, shared equally by the samples that it stands for."""
    ecg_byte: Any = asked.processor.ecg_tokenizer
    symbols = asked.processor.signal_token_ids[: ecg_byte.vocab_size]  # behind them the names of leads
    read, tokens = asked.read(asked.record.array, answer)
    model, prompt = asked.model, read.prompts[0].input_ids
    places = np.flatnonzero(np.isin(prompt, symbols))
    shape, (ecg,) = asked.record.array.shape, asked.scaled(asked.record.array[None])
    offsets = ecg_byte.offsets(ecg_byte.encode(ecg.array), shape[1])
    if len(places) != len(offsets):
        raise ValueError(
            "The ECG is written in fewer tokens than it has, as the chat is long; take --method occlusion."
        )
    between = np.flatnonzero(between_beats(asked.record))
    # tokens with a sample between beats
    free = np.searchsorted(between, offsets[:, 1]) < np.searchsorted(between, offsets[:, 2], side="right")
    with torch.no_grad():
        embeddings = model.model.embed(torch.tensor([prompt + tokens[:-1]], device=model.device))
        baseline = embeddings.clone()
        for lead in range(shape[0]):
            of_lead = offsets[:, 0] == lead
            kept = of_lead & free if (of_lead & free).any() else of_lead
            baseline[0, places[of_lead]] = embeddings[0, places[kept]].mean(0)
    sums = _integrate(model, prompt, tokens, embeddings, baseline, "inputs_embeds", {})
    result = np.zeros(shape[0] * shape[1])  # lead after lead
    for value, (lead, first, last) in zip(sums[places].sum(axis=1), offsets, strict=True):
        start = lead * shape[1]
        result[start + first : start + last + 1] = value / (last - first + 1)
    return result.reshape(shape)


def _from_page(asked: AskedModel, pixels: np.ndarray) -> np.ndarray:
    """Of a drawing [height, width]: a pixel counts to the lead in whose row it stands, and to the moment above which it does."""
    record, processor = asked.record, asked.processor
    image_processor: Any = processor.image_processor
    paper, leads = image_processor.paper, tuple(processor.feature_extractor.lead_names)
    height, width = pixels.shape
    seconds = processor.feature_extractor.num_samples / processor.feature_extractor.sampling_rate
    # as `ECGImageProcessor.draw` places the paper
    scale = min(width / page_width(paper, seconds), height / (page_height(paper, leads) / 2))
    own_seconds = record.array.shape[1] / record.sampling_rate
    scale = round(scale * page_width(paper, own_seconds)) / page_width(paper, own_seconds)
    page = strips(paper, leads, own_seconds, height / scale)
    result = np.zeros(record.array.shape)
    baselines = np.array([strip.y for strip in page]) * scale
    rows = np.abs(np.arange(height)[:, None] + 0.5 - baselines[None]).argsort(axis=1, kind="stable")
    nearest = baselines[rows[:, 0]]  # of each row of pixels, the baseline next to it
    for strip in page:
        if strip.lead not in record.lead_names:
            continue
        samples = np.arange(int(strip.start * record.sampling_rate), int(strip.stop * record.sampling_rate))
        samples = samples[samples < record.array.shape[1]]
        left, right = strip.x * scale, (strip.x + (strip.stop - strip.start) * paper.speed) * scale
        columns = np.arange(max(0, int(left)), min(width, int(np.ceil(right))))
        of_columns = pixels[nearest == strip.y * scale][:, columns].sum(axis=0)
        moments = (columns + 0.5 - left) / (scale * paper.speed) * record.sampling_rate
        at = (samples[0] + moments).astype(int).clip(samples[0], samples[-1])
        # a pixel is wider than a sample, or narrower: its value is spread over the samples up to the next one
        result[record.lead_names.index(strip.lead)] += _spread(of_columns, at, record.array.shape[1], samples[-1] + 1)
    return result


def _spread(values: np.ndarray, at: np.ndarray, num_samples: int, stop: int) -> np.ndarray:
    """Values of places that rise, each shared by the samples up to the next place; [num_samples]."""
    result = np.zeros(num_samples)
    places, first = np.unique(at, return_index=True)
    sums = np.add.reduceat(values, first) if len(values) else values
    for value, start, end in zip(sums, places, [*places[1:], stop], strict=True):
        result[start : max(end, start + 1)] += value / max(end - start, 1)
    return result


def _from_stack(asked: AskedModel, pixels: np.ndarray) -> np.ndarray:
    """Of a picture of leads x samples that was resized: a pixel counts to what stood at its place."""
    record, extractor = asked.record, asked.processor.feature_extractor
    leads, length = list(extractor.lead_names), extractor.num_samples  # short records are padded
    rows = ((np.arange(pixels.shape[0]) + 0.5) * len(leads) / pixels.shape[0]).astype(int)
    columns = ((np.arange(pixels.shape[1]) + 0.5) * length / pixels.shape[1]).astype(int)
    of_leads = np.zeros((len(leads), pixels.shape[1]))
    np.add.at(of_leads, rows, pixels)
    spread = np.stack([_spread(of_lead, columns, length, length) for of_lead in of_leads])
    return spread[[leads.index(lead) for lead in record.lead_names], : record.array.shape[1]]
