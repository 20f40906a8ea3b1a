"""The engine that needs no other program: the ELM itself, whose batch answers join and leave between two tokens.

transformers' `generate` writes a batch from its first token to its last, so that whoever comes in between waits for the longest answer,
and rows that have ended are computed on; its own continuous batching takes no embeddings. Here prompts that have come are read together, each
from where what was read before of its conversation ends, and then join the batch.
"""

import asyncio
import copy
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, LogitsProcessorList

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training.features import EncoderFeatures
from elm_ecg.training.serving.caches import can_merge, merge
from elm_ecg.training.serving.decoding import Answer, Batch, Part
from elm_ecg.training.serving.engine import Engine, EngineDownError, Piece, Prompt, SamplingOptions
from elm_ecg.training.serving.prefixes import Prefixes, Read, written

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_TRIALS = 2.0  # of a model that has failed


class _Request:
    """A prompt that waits for its answers, or gets them."""

    def __init__(self, prompt: Prompt, options: SamplingOptions) -> None:
        self.prompt, self.options = prompt, options
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self.is_gone = False  # nobody waits for it any more


@dataclass
class _Found:
    """A prompt with what was read of it before."""

    request: _Request
    read: Read
    cache: DynamicCache
    num_cached: int

    @property
    def num_new(self) -> int:
        return len(self.read.tokens) - self.num_cached


class TransformersEngine(Engine):
    """An ELM in a thread of its own.

    Args:
        model: in eval mode, on its device.
        tokenizer: of the language model; the engine has its own copy.
        adapters: the same model with its adapters, by whose names prompts ask for them; they share its weights, and are asked one
            after the other.
        max_batch_size: answers that are written at once.
        max_kept_bytes: of what was read of conversations, and as much of the features of their ECGs.
    """

    def __init__(
        self,
        model: ELMForConditionalGeneration,
        tokenizer: Any,
        adapters: PeftModel | None = None,
        max_batch_size: int = 32,
        max_kept_bytes: int = 2**30,
    ) -> None:
        self.model, self.tokenizer, self.adapters = model, copy.deepcopy(tokenizer), adapters
        self.max_batch_size, self.max_kept_bytes = max_batch_size, max_kept_bytes
        text_config: Any = model.config.get_text_config(decoder=True)
        self.context = getattr(text_config, "max_position_embeddings", None)
        self._processing: Any = copy.deepcopy(model.generation_config)
        self._processing.update(do_sample=False, repetition_penalty=1.0, suppress_tokens=None)  # as in `elm evaluate`
        model._prepare_special_tokens(self._processing, kwargs_has_attention_mask=True, device=model.device)  # type: ignore[misc]
        self._batch = self._new_batch()
        self._prefixes = Prefixes(model.config, max_kept_bytes)
        self._features: dict[str | None, EncoderFeatures] = {}
        self._adapter: str | None = None  # that is switched on
        self._can_merge = can_merge(DynamicCache(config=text_config))
        self._waiting: deque[_Request] = deque()
        self._changed = threading.Condition()  # of those that wait
        self._is_closed, self._has_failed = False, False
        self._thread = threading.Thread(target=self._work, name="elm-engine", daemon=True)

    async def start(self) -> None:
        """Starts the thread."""
        if self.adapters is not None:
            self.adapters.base_model.disable_adapter_layers()  # type: ignore[operator]
        self._thread.start()

    async def healthy(self) -> bool:
        """Whether the thread runs, and the model has not failed since it last worked."""
        return self._thread.is_alive() and not self._has_failed

    async def close(self) -> None:
        """Ends the thread after the token that it writes."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    async def generate(self, prompt: Prompt, options: SamplingOptions) -> AsyncGenerator[Piece, None]:
        """See [`Engine.generate`]."""
        if not await self.healthy():
            raise EngineDownError("The model has failed and is tried again; ask again later.")
        request = _Request(prompt, options)
        with self._changed:
            self._waiting.append(request)
            self._changed.notify()
        try:
            ended = 0
            while ended < options.n:
                piece = await request.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                ended += piece.finish_reason is not None
                yield piece
        finally:
            request.is_gone = True

    # from here on in the engine's thread

    @torch.inference_mode()
    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._batch.answers or self._is_closed):
                    self._changed.wait()
                if self._is_closed:
                    break
                joining = self._next()
            try:
                self._round(joining)
            except Exception:  # of the device or the model: nobody knows what is left of the batch
                logger.exception("The engine has failed; its answers are lost.")
                self._fail(joining)
        self._end(EngineDownError("The server is ending."), list(self._waiting))

    def _next(self) -> list[_Request]:
        """Who joins the batch now: first come, first served. All of a batch have one adapter."""
        joining: list[_Request] = []
        number = len(self._batch.answers)
        while self._waiting:
            request = self._waiting[0]
            if not request.is_gone:
                others = number and (request.prompt.adapter != self._adapter or not self._can_merge)
                if others or (number and number + request.options.n > self.max_batch_size):
                    break
                if not number:
                    self._use(request.prompt.adapter)
                number += request.options.n
                joining.append(request)
            self._waiting.popleft()
        return joining

    def _use(self, adapter: str | None) -> None:
        if adapter == self._adapter or self.adapters is None:
            return
        if adapter is None:
            self.adapters.base_model.disable_adapter_layers()  # type: ignore[operator]
        else:
            self.adapters.base_model.enable_adapter_layers()  # type: ignore[operator]
            self.adapters.set_adapter(adapter, inference_mode=True)
        self._adapter = adapter

    def _round(self, joining: list[_Request]) -> None:
        """A token of each answer; those of new prompts too."""
        if joining:
            self._batch.join(self._read(joining))
        if not self._batch.answers:
            return
        faults = self._batch.write()
        told: list[tuple[_Request, Piece | Exception]] = [
            (self._batch.answers[row].owner, error) for row, error in faults.items()
        ]
        failed = {id(request) for request, _ in told}
        leaving = []
        for row, answer in enumerate(self._batch.answers):
            if answer.owner.is_gone or id(answer.owner) in failed:
                leaving.append(row)
                continue
            piece = answer.piece()
            if piece is not None:
                told.append((answer.owner, piece))
            if answer.finish_reason is not None:
                leaving.append(row)
                if answer.choice == 0 and self._prefixes.can_keep:
                    self._prefixes.keep(written(answer.read, answer.ids[:-1]), self._batch.read_of(row))
        self._tell(told)
        if leaving:
            self._batch.leave(leaving)
        if self._batch.answers:
            self._batch.read()

    def _read(self, requests: list[_Request]) -> list[Part]:
        """Reads prompts, those of about one length together, from where what was read before of their conversations ends."""
        found = []
        for request in requests:
            read = self._prefixes.read_of(request.prompt)
            found.append(_Found(request, read, *self._prefixes.find(read)))
        found.sort(key=lambda one: (one.num_cached > 0, one.num_new))
        groups: list[list[_Found]] = []
        for one in found:
            first = groups[-1][0] if groups else None
            if first and bool(first.num_cached) == bool(one.num_cached) and one.num_new <= 2 * first.num_new + 16:
                groups[-1].append(one)
            else:
                groups.append([one])
        return [self._read_group(group) for group in groups]

    def _read_group(self, group: list[_Found]) -> Part:
        device, cached = self.model.device, max(one.num_cached for one in group)
        cache = merge([one.cache for one in group], cached) if cached and len(group) > 1 else group[0].cache
        width = max(one.num_new for one in group)
        input_ids = torch.zeros(len(group), width, dtype=torch.long)
        mask = torch.zeros(len(group), cached + width, dtype=torch.long)
        for row, one in enumerate(group):  # padding is on the left, of what was read before and of what is new
            input_ids[row, width - one.num_new :] = torch.tensor(one.request.prompt.input_ids[one.num_cached :])
            mask[row, cached - one.num_cached : cached] = 1
            mask[row, cached + width - one.num_new :] = 1
        mask = mask.to(device)
        output = self.model(
            input_ids=input_ids.to(device),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, cached:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **self._ecg_inputs(group),
        )
        answers = [answer for one in group for answer in self._answers(one)]
        rows = [row for row, one in enumerate(group) for _ in range(one.request.options.n)]
        logits = output.logits[:, -1]
        if len(rows) > len(group):
            index = torch.tensor(rows, device=device)
            cache.reorder_cache(index)  # type: ignore[arg-type]
            mask, logits = mask[index], logits[index]
        return Part(answers, cache, mask, logits)

    def _answers(self, one: _Found) -> list[Answer]:
        request, options = one.request, one.request.options
        processors: LogitsProcessorList = self.model._get_logits_processor(
            self._processing, input_ids_seq_length=len(one.read.tokens), device=self.model.device
        )
        seed = secrets.randbits(63) if options.seed is None else options.seed % 2**64
        shared = (request, request.prompt, options, one.read, one.num_cached)
        return [Answer(*shared, choice, seed, self.tokenizer, processors) for choice in range(options.n)]

    def _ecg_inputs(self, group: list[_Found]) -> dict[str, torch.Tensor]:
        """Of the ECGs that were not read yet."""
        new: list[dict[str, torch.Tensor]] = []
        for one in group:
            held, _ = self._prefixes.num_ecgs(one.read.tokens[: one.num_cached])
            inputs = one.request.prompt.ecg_inputs
            new.append({name: values[held:] for name, values in inputs.items() if len(values) > held})
        names = dict.fromkeys(name for ecgs in new for name in ecgs)
        ecgs = {name: torch.cat([one[name] for one in new if name in one]) for name in names}
        if not ecgs or self.model.model.encoder is None:
            return {name: values.to(self.model.device) for name, values in ecgs.items()}
        if self._adapter not in self._features:  # an adapter may change the encoder
            self._features[self._adapter] = EncoderFeatures(
                self.model.model, max_bytes=self.max_kept_bytes, together=True
            )
        return self._features[self._adapter].replace(ecgs)

    def _tell(self, told: list[tuple[_Request, Piece | Exception]]) -> None:
        """Gives pieces to those who wait for them, at once: waking the event loop takes as long as a small model a token."""
        if told:
            told[0][0].loop.call_soon_threadsafe(_deliver, told)

    def _end(self, error: Exception, requests: list[_Request]) -> None:
        """Tells all of these, and those of the batch, that nothing more comes."""
        owners = {id(request): request for request in [*requests, *(answer.owner for answer in self._batch.answers)]}
        self._tell([(request, error) for request in owners.values()])
        self._batch = self._new_batch()

    def _fail(self, joining: list[_Request]) -> None:
        """After an error all begins anew; until the model works again, nobody is answered."""
        self._has_failed = True
        error = EngineDownError("The model has failed while it wrote the answer; ask again later.")
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        self._end(error, [*joining, *waiting])
        self._prefixes.clear()
        self._features.clear()
        while self._has_failed and not self._is_closed:
            try:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.model.device))
                self._has_failed = False
                logger.warning("The engine answers again.")
            except Exception:
                logger.exception("The engine has not come back.")
                time.sleep(SECONDS_BETWEEN_TRIALS)

    def _new_batch(self) -> Batch:
        return Batch(self.model, self.model.generation_config.suppress_tokens or ())  # type: ignore[union-attr]


def _deliver(told: list[tuple[_Request, Piece | Exception]]) -> None:
    for request, piece in told:
        request.pieces.put_nowait(piece)
