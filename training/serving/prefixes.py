"""What a model has read of conversations, kept for their next turns."""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from elm_ecg.training.features import digests_of
from elm_ecg.training.serving.caches import can_cut
from elm_ecg.training.serving.engine import Prompt

MAX_KEPT = 1000  # conversations
KeysAndValues = list[tuple[torch.Tensor, torch.Tensor] | None]  # of each layer [1, heads, tokens, width of a head]


@dataclass(frozen=True)
class Read:
    """What was read: an adapter's tokens, and the digests of the ECGs whose placeholders are among them.

    Args:
        client: for whom.
        tokens: [tokens], in place of each placeholder a number of its ECG.
    """

    client: str
    adapter: str | None
    tokens: np.ndarray
    digests: tuple[str, ...]

    @property
    def group(self) -> tuple[str, str | None, str | None]:
        """The client, the adapter and the first ECG, which conversations that have more in common than instructions share."""
        return self.client, self.adapter, self.digests[0] if self.digests else None


@dataclass(frozen=True)
class _Kept:
    read: Read
    layers: KeysAndValues
    num_bytes: int


class Prefixes:
    """The keys and values of the prompts and answers that were read last. Each client goes on from its own alone.

    One that begins as another does goes on from there. Of ECGs that is told by the digests of their content.

    Args:
        config: of the ELM.
        max_bytes: of all together; what was not asked for longest makes room. 0: none are kept.
    """

    def __init__(self, config: Any, max_bytes: int) -> None:
        self.config, self.max_bytes = config, max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[int, _Kept] = OrderedDict()  # that asked for last is last
        self._groups: defaultdict[tuple[str, str | None, str | None], set[int]] = defaultdict(set)
        self._number = 0
        self.can_keep = max_bytes > 0 and can_cut(self._new())

    def _new(self) -> DynamicCache:
        return DynamicCache(config=self.config.get_text_config(decoder=True))  # which layers have a window, or a state

    def read_of(self, prompt: Prompt) -> Read:
        """A prompt, as `find` and `keep` take it."""
        tokens = np.array(prompt.input_ids, dtype=np.int64)
        digests = tuple(digests_of(prompt.ecg_inputs))
        if digests:
            numbers = [int(digest[:15], 16) for digest in digests]  # 60 bits
            # below 0, where no token is
            tokens[tokens == self.config.ecg_token_id] = -1 - np.repeat(numbers, self.config.num_ecg_tokens)
        return Read(prompt.client, prompt.adapter, tokens, digests)

    def num_ecgs(self, tokens: np.ndarray) -> tuple[int, int]:
        """How many ECGs have all of their placeholders among the tokens of a `Read`, and how many placeholders are left over."""
        found = divmod(int((tokens < 0).sum()), self.config.num_ecg_tokens or 1)
        return found[0], found[1]

    def find(self, read: Read) -> tuple[DynamicCache, int]:
        """A cache of what was read before of this, and how many tokens of it: never the last, as the model has to read one."""
        cache, longest, found = self._new(), 0, -1
        for number in self._groups.get(read.group, ()):
            same = self._same(self._kept[number].read, read, len(read.tokens) - 1)
            if same > longest:
                longest, found = same, number
        if longest:
            self._kept.move_to_end(found)
            layer: Any
            for layer, values in zip(cache.layers, self._kept[found].layers, strict=True):
                if values is not None:
                    layer.update(*(tensor[..., :longest, :] for tensor in values))
        return cache, longest

    def _same(self, kept: Read, read: Read, limit: int) -> int:
        """How many of at most so many tokens two of a group begin with; none if they end within an ECG."""
        size = min(len(kept.tokens), limit)
        differs = kept.tokens[:size] != read.tokens[:size]
        same = int(differs.argmax()) if differs.any() else size
        num_ecgs, rest = self.num_ecgs(read.tokens[:same])
        # the numbers in their tokens are a part of the digests
        return 0 if rest or kept.digests[:num_ecgs] != read.digests[:num_ecgs] else same

    def keep(self, read: Read, layers: KeysAndValues) -> None:
        """Keeps what was read, in place of what is the beginning of it."""
        if not self.can_keep:
            return
        for number in list(self._groups[read.group]):
            kept = self._kept[number].read
            if self._same(kept, read, len(read.tokens)) == len(kept.tokens):
                self._drop(number)
        num_bytes = sum(tensor.nbytes for values in layers if values for tensor in values)
        self._number += 1
        self._kept[self._number] = _Kept(read, layers, num_bytes)
        self._groups[read.group].add(self._number)
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes or len(self._kept) > MAX_KEPT:
            self._drop(next(iter(self._kept)))

    def clear(self) -> None:
        """Forgets all."""
        self._kept.clear()
        self._groups.clear()
        self.num_bytes = 0

    def _drop(self, number: int) -> None:
        kept = self._kept.pop(number)
        self.num_bytes -= kept.num_bytes
        group = self._groups[kept.read.group]
        group.discard(number)
        if not group:
            del self._groups[kept.read.group]


def written(read: Read, token_ids: Sequence[int]) -> Read:
    """What was read, with the tokens of its answer that were read after it."""
    return Read(read.client, read.adapter, np.append(read.tokens, np.array(token_ids, dtype=np.int64)), read.digests)
