"""What an ELM answers to the questions of a split, under each condition of an evaluation.

A row is a conversation: each of its questions is asked after the right answers to those before it. What several questions of
a conversation begin with is read once, and its keys and values are kept for the next turn. So is what several rows of a batch begin with,
such as the record that they are about.
"""

import copy
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from elm_ecg.ecg_utils import as_record
from elm_ecg.modeling_elm import ECG_INPUTS, ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.data.loading import ecgs_of, notices_of, to_chat
from elm_ecg.training.evaluation.beginnings import padded_width, shared_beginnings, tokens_of
from elm_ecg.training.evaluation.conditions import CONDITIONS, ECG, Condition
from elm_ecg.training.evaluation.progress import Progress
from elm_ecg.training.evaluation.questions import Question, digest, first_rows_of_records, rows_to_swap
from elm_ecg.training.features import EncoderFeatures, digests_of
from elm_ecg.training.load import warn_if_untuned

MAX_BYTES_OF_FEATURES = 2**30  # 29,000 ECGs of ST-MEM
# that all rows of a batch write, such as "yes" and its end; those that have not ended then go on without the others
FIRST_TOKENS = 2
# options of `generate` that leave greedy writing what it is, from whatever token it goes on
OF_PLAIN_GREEDY = {
    "bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "repetition_penalty", "do_sample", "temperature", "top_k", "top_p",
    "max_length", "max_new_tokens", "output_attentions", "output_hidden_states", "transformers_version", "_from_model_config",
}  # fmt: skip


class NotFiniteError(ValueError):
    """A model gives NaN or infinity in place of scores of tokens, so that its answers mean nothing."""


class RequireFinite(LogitsProcessor):
    """Ends `generate` at the first logits that are none."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores [rows, vocabulary] as they are (NotFiniteError: a row has NaN, or no finite score at all)."""
        require_finite(scores)
        return scores


def require_finite(logits: torch.Tensor) -> None:
    """
    Args:
        logits: [..., vocabulary]; single tokens may be ruled out by minus infinity.

    Raises:
        NotFiniteError: some are NaN or infinite.
    """
    if not torch.isfinite(logits.amax(-1)).all():  # NaN and infinity are the maximum of what they stand among
        raise NotFiniteError(
            "The model gives NaN or infinity for the scores of tokens, so its answers mean nothing. Its training has diverged, its "
            "weights are damaged, or the dtype is too small for it: try dtype float32."
        )


@dataclass
class Prompt:
    """The tokens that the model reads before one answer; the first `num_ecgs` ECGs of the conversation are among them."""

    input_ids: list[int]
    num_ecgs: int


@dataclass
class Conversation:
    """The prompts of one row in the order of its turns, and the tensors of its ECGs.

    Args:
        nested: each prompt begins with all of the one before it.
        candidates: for each prompt the tokens of each candidate answer, if likelihoods are asked for.
    """

    prompts: list[Prompt]
    ecgs: dict[str, torch.Tensor]
    nested: bool = True
    candidates: list[list[list[int]]] | None = None


@dataclass
class Answerer:
    """Asks an ELM questions about the rows of `data`.

    Args:
        candidates: [questions] answers to choose from by likelihood; None: the model writes its answers.
        batch_size: conversations at once.
        generation: options of `generate`; greedy where they say nothing else.
        seed: of random conditions and of sampled answers. Batches are seeded one by one: their answers do not depend on
            which process gives them, or on what was answered before.
        reuse_prefix: keep the keys and values of a conversation for its next turn, and of what several rows begin with for all of them.

    `notices` has what reading and preparing say about the records that were read: sentence -> row and place among its ECGs.
    """

    model: ELMForConditionalGeneration
    processor: ELMProcessor
    data: Dataset
    questions: list[Question]
    candidates: list[list[str]] | None = None
    batch_size: int = 32
    generation: dict[str, Any] | None = None
    seed: int = 0
    reuse_prefix: bool = True

    def __post_init__(self) -> None:
        if self.processor.chat_template is None:
            raise ValueError(
                "The model has no chat template, so nobody knows how it is asked; save its processor with one (`elm sft` does), or "
                "put a chat_template.jinja into its folder."
            )
        warn_if_untuned(self.processor)
        # some language models ask for a penalty or for sampling, which is not greedy
        self._options = {
            "do_sample": False,
            "repetition_penalty": 1.0,
            "pad_token_id": self.processor.tokenizer.pad_token_id,
            "use_cache": True,  # for training, some are saved without
            **(self.generation or {}),
        }
        self._suffixes: dict[str, list[int]] = {}  # candidate -> its tokens
        self.notices: dict[str, set[tuple[int, int]]] = {}
        self._known: dict[Any, list[str]] = {}
        elm = self.model.model
        # the same ECG is asked about in several rows and under several conditions
        self._features = None if elm.encoder is None else EncoderFeatures(elm, max_bytes=MAX_BYTES_OF_FEATURES)
        self._others: np.ndarray | None = None  # for each row the one whose ECGs are swapped in
        rows: dict[int, list[int]] = {}
        for index, question in enumerate(self.questions):
            rows.setdefault(question.row, []).append(index)
        self._records = first_rows_of_records(self.data)
        lengths = {row: self._length(indices) for row, indices in rows.items()}
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for row, length in lengths.items():
            groups.setdefault((-len(rows[row]), self._records[row]), []).append((length, row))
        # conversations of as many turns and about one length share a batch, so little of it is padding; those about a record stay
        # together, as they begin alike
        ordered = sorted((turns, max(members), record, sorted(members)) for (turns, record), members in groups.items())
        order = [row for *_, members in ordered for _, row in members]
        size = self.batch_size
        # for each batch the questions of each of its rows
        self.batches = [[rows[row] for row in order[start : start + size]] for start in range(0, len(order), size)]

    def _length(self, indices: list[int]) -> int:
        """The characters of the prompts of a row. The last answer is not among them: the batch of a row must not depend on the
        right answer, as rounding differs by batch."""
        questions = sum(len(self.questions[i].question) for i in indices)
        return questions + sum(len(self.questions[i].answer) for i in indices[:-1])

    def ask(self, name: str, progress: Progress | None = None) -> tuple[list[Any], str | None]:
        """The answer to every question under the condition `name`; of several processes each gives its share of them.

        The batches are the same whatever the number of processes, and where an interrupted evaluation goes on: so are the answers.

        Returns:
            Texts, or where there are candidates the log-likelihood of each; and why there are none, where a row has no other
            patient's ECG to swap in, or noise does not fit the context of the model.
        """
        condition = CONDITIONS[name]
        if condition.swapped and self._others is None:
            try:
                self._others = rows_to_swap(self.data, self.seed)
            except ValueError as error:
                return [], str(error)
        if condition.random or self._options["do_sample"]:
            name = f"{name} {self.seed}"  # in `progress`: what no seed changes is asked once for all of them
        name = f"{name} {digest(self.batches)}"  # whose numbers stand there
        state = PartialState()
        kept = {} if progress is None else progress.read()
        done = {batch: answers for (of, batch), answers in kept.items() if of == name}
        state.wait_for_everyone()  # nobody adds to a file that another one reads
        mine = [batch for batch in range(len(self.batches)) if batch not in done][
            state.process_index :: state.num_processes
        ]
        answered: dict[int, list[Any]] = {}
        failure = None
        bar = tqdm(total=len(self.questions), desc=condition.label, unit="answer", disable=not state.is_main_process)
        bar.update(sum(map(len, done.values())))
        with bar:
            for batch in mine:
                try:
                    answered[batch] = self.answer_batch(self.batches[batch], condition, batch)
                except NotFiniteError:
                    raise
                except ValueError as error:
                    if condition.change is None or not condition.random:  # a fault of ours or of the data
                        raise
                    failure = str(error)  # noise cannot be compressed: as ECG-Byte tokens it may be too long
                    break
                if progress is not None:
                    progress.add(name, batch, answered[batch])
                bar.update(len(answered[batch]) * state.num_processes)  # the others are about as far
        failures = []
        for part, reason, notices in gather_object([(answered, failure, self.notices)]):  # to all processes
            done |= part
            for notice, records in notices.items():
                self.notices[notice] = self.notices.get(notice, set()) | records
            failures += [reason] * (reason is not None)
        if failures:
            return [], failures[0]
        answers: list[Any] = [None] * len(self.questions)
        for batch, conversations in enumerate(self.batches):
            indices = [index for conversation in conversations for index in conversation]  # as `answer_batch` has them
            for index, answer in zip(indices, done[batch], strict=True):
                answers[index] = answer
        return answers, None

    def answer_batch(self, conversations: list[list[int]], condition: Condition, batch: int) -> list[Any]:
        """The answers to the questions of some rows, row by row.

        Args:
            conversations: for each row the indices of its questions, in the order of its turns.
            batch: number by which what is random is drawn.
        """
        torch.manual_seed(zlib.crc32(f"{self.seed} {condition.name} {batch}".encode()))  # for sampling
        read = self.read(conversations, condition)
        one_by_one = self.candidates is None and self._options.get("num_beams", 1) > 1  # beams reorder the cache
        reuse = self.reuse_prefix and not one_by_one and all(row.nested for row in read)
        if reuse:
            cache = self._new_cache()
            reuse = _keeps_tokens(cache) and self._fits_windows(read, cache)
        with torch.inference_mode():
            if reuse:
                records = {self._records[self.questions[indices[0]].row] for indices in conversations}
                return self._of_conversations(read, sharing=len(records) < len(read))
            turns = [
                Conversation([prompt], row.ecgs, candidates=None if row.candidates is None else [row.candidates[turn]])
                for row in read
                for turn, prompt in enumerate(row.prompts)
            ]
            answers = []
            for start in range(0, len(turns), self.batch_size):
                answers += self._of_conversations(turns[start : start + self.batch_size])
            return answers

    def _fits_windows(self, rows: list[Conversation], cache: DynamicCache) -> bool:
        """Whether rows that are read turn by turn, with padding between, and their answers stay within each window of the cache."""
        windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
        written = self._options.get("max_new_tokens", math.inf)
        if self.candidates is not None:
            written = max(len(tokens) for row in rows for of_turn in row.candidates or [] for tokens in of_turn)
        width = padded_width([[len(prompt.input_ids) for prompt in row.prompts] for row in rows])
        return bool(width + written <= min(windows, default=math.inf))

    def _row(self, place: int, condition: Condition) -> dict[str, Any]:
        """A row of the data with the ECGs that are shown in place of its own."""
        row = self.data[place]
        if condition.swapped and self._others is not None and self._others[place] != place:
            row = {**row, "ecg": self.data[int(self._others[place])]["ecg"]}
        if not (condition.shows_ecg and self.processor.takes_ecgs):
            return row
        records = [as_record(ecg) for ecg in ecgs_of(row)]
        if condition.change is not None:
            rng = np.random.default_rng([self.seed, place])  # the same in whatever batch or process
            records = [replace(record, array=condition.change(record.array, rng)) for record in records]
        if condition.name == ECG:  # the others read the same records again
            for index, record in enumerate(records):
                for notice in notices_of(record, self.processor.feature_extractor, self._known):
                    self.notices.setdefault(notice, set()).add((place, index))
        return {**row, "ecg": records}

    def read(self, conversations: list[list[int]], condition: Condition) -> list[Conversation]:
        """The rows as the model reads them: each is processed once, up to its last question."""
        with_ecg = condition.shows_ecg and self.processor.takes_ecgs
        chats, turns = [], []
        for indices in conversations:
            row = self._row(self.questions[indices[0]].row, condition)
            chat = to_chat(row, with_ecg)
            turns.append([self.questions[i].turn for i in indices])
            chats.append(chat[: turns[-1][-1]])  # without the last answer
        texts = [
            self.processor.apply_chat_template(
                [chat[:turn] for turn in asked], add_generation_prompt=True, tokenize=False
            )
            for chat, asked in zip(chats, turns, strict=True)
        ]
        columns = self._process(chats)
        places = np.cumsum([0, *(_num_ecgs(chat) for chat in chats)])  # where each chat's ECGs begin in the batch
        read = []
        for place, (chat, asked, prompts) in enumerate(zip(chats, turns, texts, strict=True)):
            own = slice(places[place], places[place + 1])
            ecgs = {name: columns[name][own] for name in ECG_INPUTS if name in columns and own.stop > own.start}
            input_ids, offsets = columns["input_ids"][place], columns["offset_mapping"][place]
            ends = [tokens_of(prompt, prompts[-1], offsets) for prompt in prompts]  # None where tokens do not fit
            nested = all(end is not None for end in ends)
            if nested:
                tokens = [input_ids[:end] for end in ends]
            else:  # this tokenizer, or template, writes a turn otherwise when another follows
                tokens = self._process([chat[:turn] for turn in asked])["input_ids"]
            of_turns = [Prompt(ids, _num_ecgs(chat[:turn])) for turn, ids in zip(asked, tokens, strict=True)]
            read.append(Conversation(of_turns, ecgs, nested))
            if self.candidates is not None:
                read[-1].candidates = [
                    [self._suffix(text, chat[:turn], prompt) for text in self.candidates[index]]
                    for index, turn, prompt in zip(conversations[place], asked, prompts, strict=True)
                ]
        return read

    def _process(self, chats: list[list[dict[str, Any]]]) -> Any:
        columns: Any = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors=None,  # prompts of different lengths make no tensor
            processor_kwargs={"padding": False, "return_offsets_mapping": True},  # offsets need a fast tokenizer
        )
        for name in ECG_INPUTS:
            if name in columns:
                columns[name] = torch.as_tensor(np.asarray(columns[name]))
        return columns

    def _suffix(self, answer: str, chat: list[dict[str, Any]], prompt: str) -> list[int]:
        """The tokens that the template writes for an answer, its end of turn included."""
        if answer not in self._suffixes:  # taken to be the same behind every prompt
            turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            text: Any = self.processor.apply_chat_template([*chat, turn], tokenize=False)
            if not text.startswith(prompt) and self.processor.explicit_thinking:
                raise ValueError(
                    f"The candidate {answer!r} does not begin with <think>, with which the model begins each answer; give the thinking too, or "
                    "have the model write its answers."
                )
            if not text.startswith(prompt):
                raise ValueError(
                    "The chat template does not write an answer behind its generation prompt, so its likelihood cannot be told; "
                    "score by generation."
                )
            suffix = text[len(prompt) :].rstrip("\n")  # ChatML writes one after its end-of-turn token
            end = self.processor.template().end_of_turn
            if end is not None and end in suffix:  # Phi 3.5 writes an end of text behind it
                suffix = suffix.rpartition(end)[0] + end
            self._suffixes[answer] = self.processor.tokenizer(suffix, add_special_tokens=False)["input_ids"]
        return self._suffixes[answer]

    def _of_conversations(self, rows: list[Conversation], sharing: bool = False) -> list[Any]:
        """The answers of conversations, turn by turn for all of them at once; in the order of the rows and their turns.

        Args:
            sharing: read what several of them begin with once.
        """
        # those of most turns first: the rows that are still asked are then always the first of the tensors
        places = sorted(range(len(rows)), key=lambda place: -len(rows[place].prompts))
        answers: list[list[Any]] = [[] for _ in rows]
        device = self.model.device
        begun = [Prompt([], 0)] * len(rows)  # what was read of each
        input_ids = torch.empty((len(rows), 0), dtype=torch.long, device=device)  # [rows, tokens], longer by each turn
        mask = torch.empty_like(input_ids)
        cache: DynamicCache | None = None
        if sharing and (groups := self._groups(rows)):
            input_ids, mask, cache, begun = self._read_beginnings(rows, groups, places)
        num_turns = len(rows[places[0]].prompts)
        for turn in range(num_turns):
            active = [place for place in places if len(rows[place].prompts) > turn]
            if cache is not None and len(active) < len(input_ids):
                cache.batch_select_indices(torch.arange(len(active), device=device))  # conversations that go on
            input_ids, mask = input_ids[: len(active)], mask[: len(active)]
            new_ids, ecgs = [], []
            for place in active:
                prompt, row, before = rows[place].prompts[turn], rows[place], begun[place]
                new_ids.append(prompt.input_ids[len(before.input_ids) :])
                ecgs.append({name: values[before.num_ecgs : prompt.num_ecgs] for name, values in row.ecgs.items()})
                begun[place] = prompt
            padded, real = self._padded(new_ids)  # padding stands between the turns, where the mask hides it
            input_ids, mask = torch.cat([input_ids, padded], dim=1), torch.cat([mask, real], dim=1)
            ecg_inputs = self._ecg_inputs(ecgs)
            last = turn == num_turns - 1
            if self.candidates is not None:
                hidden, cache = self._prefill(input_ids, mask, cache, ecg_inputs, until=input_ids.shape[1])
                options = [(rows[place].candidates or [])[turn] for place in active]
                of_turn: Sequence[Any] = self._likelihoods(hidden, mask, cache, options)
            elif last and cache is None:
                of_turn = self._generate(input_ids, mask, None, ecg_inputs)
            else:  # `generate` has to be left one token to read; it writes into the cache, which the next turn needs as it is
                if cache is None or padded.shape[1] > 1:
                    _, cache = self._prefill(input_ids, mask, cache, ecg_inputs, until=input_ids.shape[1] - 1)
                of_turn = self._generate(input_ids, mask, cache if last else _copied(cache), {})
            for place, answer in zip(active, of_turn, strict=True):
                answers[place].append(answer)
        return [answer for row in answers for answer in row]

    def _groups(self, rows: list[Conversation]) -> list[tuple[int, list[int]]]:
        """Rows whose first prompts begin alike, as of `shared_beginnings`."""
        prompts = [row.prompts[0].input_ids for row in rows]
        ecgs = [tuple(digests_of(row.ecgs)[: row.prompts[0].num_ecgs]) for row in rows]
        signal = self.processor.ecg_token_id
        behind = [
            len(ids) - ids[::-1].index(signal) if of_row else 0 for ids, of_row in zip(prompts, ecgs, strict=True)
        ]
        return shared_beginnings(prompts, ecgs, behind)

    def _read_beginnings(
        self, rows: list[Conversation], groups: list[tuple[int, list[int]]], places: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor, DynamicCache, list[Prompt]]:
        """Reads what the rows of each group begin with once.

        Returns:
            Tokens and mask [rows, tokens] and the cache of all rows, in the order of `places`, and what was read of each row.
        """
        begun = [Prompt([], 0)] * len(rows)
        group_of = [0] * len(rows)
        for number, (length, members) in enumerate(groups):
            for place in members:
                prompt = rows[place].prompts[0]
                begun[place] = Prompt(prompt.input_ids[:length], prompt.num_ecgs)
                group_of[place] = number
        first = [members[0] for _, members in groups]
        input_ids, mask = self._padded([begun[place].input_ids for place in first])
        ecgs = [{name: values[: begun[place].num_ecgs] for name, values in rows[place].ecgs.items()} for place in first]
        _, cache = self._prefill(input_ids, mask, None, self._ecg_inputs(ecgs), until=input_ids.shape[1])
        of_row = torch.tensor([group_of[place] for place in places], device=mask.device)
        cache.batch_select_indices(of_row)
        return input_ids[of_row], mask[of_row], cache, begun

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [rows, tokens] and their mask, padded on the left, so that all rows end in a token."""
        width, pad = max(map(len, rows)), self.processor.tokenizer.pad_token_id
        padded = [[pad] * (width - len(ids)) + ids for ids in rows]
        real = [[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]
        return torch.tensor(padded, device=self.model.device), torch.tensor(real, device=self.model.device)

    def _ecg_inputs(self, ecgs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What the model reads of the ECGs of some rows."""
        inputs = {
            name: torch.cat([own[name] for own in ecgs if name in own]).to(self.model.device)
            for name in ECG_INPUTS
            if any(name in own and len(own[name]) for own in ecgs)
        }
        return inputs if self._features is None else self._features.replace(inputs)

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config.get_text_config())  # which layers have a window, or a state

    def _prefill(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        cache: DynamicCache | None,
        ecg_inputs: dict[str, torch.Tensor],
        until: int,
    ) -> tuple[torch.Tensor, DynamicCache]:
        """Reads the tokens that the cache does not hold yet, up to `until`; the hidden state [rows, width] of the last of them."""
        if cache is None:
            cache = self._new_cache()
        start = cache.get_seq_length()
        output = self.model.model(
            input_ids=input_ids[:, start:until],
            attention_mask=mask[:, :until],
            position_ids=_positions(mask)[:, start:until],  # without, the model counts padding too
            past_key_values=cache,
            use_cache=True,
            **ecg_inputs,
        )
        return output.last_hidden_state[:, -1], output.past_key_values

    def _generate(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        cache: DynamicCache | None,
        ecg_inputs: dict[str, torch.Tensor],
    ) -> list[str]:
        def write(ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
            options = {**self._options, **options, "logits_processor": LogitsProcessorList([RequireFinite()])}
            options["tokenizer"] = self.processor.tokenizer  # which `stop_strings` needs
            # wants attributes that no model declares
            return self.model.generate(input_ids=ids, attention_mask=mask, **options)  # type: ignore[misc, return-value]

        start, limit = input_ids.shape[1], self._options.get("max_new_tokens")
        written = self._new_cache() if cache is None else cache
        if limit is None or not self._is_plain_greedy() or not _keeps_tokens(written):
            given = {} if cache is None else {"past_key_values": cache}
            output = write(input_ids, mask, **given, **ecg_inputs)
            return self.processor.decode_answers(output[:, start:])  # `generate` gives the prompt back too
        eos = self._options.get("eos_token_id", self.model.generation_config.eos_token_id)
        ends = torch.tensor([] if eos is None else eos, dtype=torch.long, device=mask.device)
        new_tokens = torch.full((len(input_ids), limit), self._options["pad_token_id"], device=mask.device)
        rows = torch.arange(len(input_ids), device=mask.device)  # that have not ended
        number = FIRST_TOKENS
        while len(rows) and (number := min(number, start + limit - input_ids.shape[1])):
            output = write(input_ids, mask, past_key_values=written, max_new_tokens=number, **ecg_inputs)
            new_tokens[rows, : output.shape[1] - start] = output[:, start:]
            going_on = (~torch.isin(output[:, start:], ends).any(1)).nonzero()[:, 0]
            mask = nn.functional.pad(mask[going_on], (0, output.shape[1] - mask.shape[1]), value=1)
            rows, input_ids, ecg_inputs, number = rows[going_on], output[going_on], {}, 2 * number
            written.batch_select_indices(going_on)
        return self.processor.decode_answers(new_tokens)

    def _is_plain_greedy(self) -> bool:
        """Whether the next token depends on those before it alone, so that another call of `generate` can go on from there."""
        options = self.model.generation_config.to_diff_dict() | self._options
        return not options["do_sample"] and options.pop("use_cache", True) and options.keys() <= OF_PLAIN_GREEDY

    def _log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Those of the tokens that follow hidden states [..., width]: [..., vocabulary], in float32 from the head on."""
        logits = self.model.compute_logits(hidden, in_float32=True)
        require_finite(logits)
        return logits.log_softmax(-1)

    def _likelihoods(
        self, hidden: torch.Tensor, mask: torch.Tensor, cache: DynamicCache, options: list[list[list[int]]]
    ) -> list[list[float]]:
        """The log-likelihood of each candidate of each row, summed over its tokens; `hidden` [rows, width] is of the prompts' ends."""
        scores = [[0.0] * len(candidates) for candidates in options]
        first = self._log_probabilities(hidden)
        for place in range(max(map(len, options))):  # the same candidate of all rows at once, the next after it
            rows = [row for row, candidates in enumerate(options) if len(candidates) > place]
            tokens = [options[row][place] for row in rows]
            width = max(map(len, tokens))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in tokens], device=mask.device)
            real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in tokens], device=mask.device)
            where = torch.tensor(rows, device=mask.device)
            scores_of_tokens = first[where].gather(1, ids[:, :1])  # the prompt itself predicts the first token
            if width > 1:
                prefix = _copied(cache)  # the model writes the candidate into it
                prefix.reorder_cache(where)  # type: ignore[arg-type]  # the rows that have such a candidate
                whole = torch.cat([mask[where], real[:, :-1]], dim=1)  # the last token is only predicted, never read
                positions = _positions(whole)
                steps = []
                # some states go on by one token alone, as in `generate`
                step = width if _keeps_tokens(cache) else 1
                for start in range(0, width - 1, step):
                    end = min(start + step, width - 1)
                    output = self.model.model(
                        input_ids=ids[:, start:end],
                        attention_mask=whole[:, : mask.shape[1] + end],
                        position_ids=positions[:, mask.shape[1] + start : mask.shape[1] + end],
                        past_key_values=prefix,
                        use_cache=True,
                    )
                    following = self._log_probabilities(output.last_hidden_state)
                    steps.append(following.gather(2, ids[:, start + 1 : end + 1, None])[..., 0])
                following = torch.cat(steps, dim=1)
                scores_of_tokens = torch.cat([scores_of_tokens, following * real[:, 1:]], dim=1)  # padding adds 0
            for row, value in zip(rows, scores_of_tokens.double().sum(1).tolist(), strict=True):
                scores[row][place] = value
        return scores


def _keeps_tokens(cache: DynamicCache) -> bool:
    """Whether all layers keep keys and values of each token, and no state of what was read.

    Padding between turns cannot be taken out of a state again, and most read on from it by one token at a time alone.
    """
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer) for layer in cache.layers)


def _copied(cache: DynamicCache) -> DynamicCache:
    """A cache that can be written into while the other stays as it is. Keys and values of tokens are never changed in place, as more are
    joined to them in new tensors, so they are not copied; a state is."""
    if not _keeps_tokens(cache):
        return copy.deepcopy(cache)
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions of the tokens [batch, tokens] that are not padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)  # -1 where padding stands in front


def _num_ecgs(chat: list[dict[str, Any]]) -> int:
    return sum(part["type"] == "ecg" for message in chat for part in message["content"])
