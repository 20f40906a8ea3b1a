"""ECG-Byte: ECGs as byte-pair tokens, quickly."""

from collections.abc import Callable, Iterable, Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

@final
class Tokenizer:
    """Encodes ECGs with the merges that `train` learnt; never changes, and may be used by several threads.

    Args:
        merges: strings of at least two symbols a to z, all different; merge i has id 256 + i. A single symbol's id is its
            byte, 97 to 122.
        millivolt_range: the amplitudes, in millivolts, of the lowest and the highest symbol. None: each record's own.
        across_leads: whether a token may run from one lead into the next.
        sampling_rate: in hertz, of the records that it is for. Only kept.

    Raises:
        ValueError: a merge, the range or the sampling rate is not as said.
    """

    def __new__(
        cls,
        merges: Sequence[str],
        millivolt_range: tuple[float, float] | None = None,
        across_leads: bool = True,
        sampling_rate: float | None = None,
    ) -> Tokenizer: ...
    @staticmethod
    def from_json(text: str) -> Tokenizer:
        """Reads the content of an `ecg_byte.json`, version 1.

        Raises:
            ValueError: it is not valid JSON, has other keys, or a value that is not allowed.
        """

    @property
    def merges(self) -> list[str]: ...
    @property
    def millivolt_range(self) -> tuple[float, float] | None: ...
    @property
    def across_leads(self) -> bool: ...
    @property
    def sampling_rate(self) -> float | None: ...
    def encode(self, ecg: NDArray[np.float32]) -> NDArray[np.uint32]:
        """The ids of one ECG [leads, samples] in millivolts, float32 and C-contiguous.

        Raises:
            TypeError: it is not a float32 array [leads, samples].
            ValueError: it is not C-contiguous, empty, not finite, or its range overflows float32.
        """

    def encode_batch(
        self, ecgs: Iterable[NDArray[np.float32]], num_threads: int | None = None
    ) -> list[NDArray[np.uint32]]:
        """`encode` of each ECG, on `num_threads` threads (None: one for each core).

        Raises:
            TypeError, ValueError: as `encode`, with the number of the record where its values are at fault.
        """

    def decode(self, ids: NDArray[np.uint32], low: float, high: float) -> NDArray[np.float32]:
        """The symbols' amplitudes in millivolts, all leads in one row; symbol a stands at `low`, symbol z at `high`.

        Raises:
            TypeError: the ids are not a uint32 array [tokens].
            ValueError: an id is no token's.
        """

def train(
    records: Iterable[NDArray[np.float32]],
    num_merges: int,
    millivolt_range: tuple[float, float] | None = None,
    across_leads: bool = True,
    min_frequency: int = 2,
    progress: Callable[[int, int], object] | None = None,
) -> list[str]:
    """Learns merges by byte-pair encoding: always the most frequent pair, of equals the one with the smallest ids.

    Ends at `num_merges`, or where no pair is found `min_frequency` times. Pairs never cross from one record into the
    next, nor, without `across_leads`, from one lead into the next. The same records give the same merges.

    Args:
        records: float32 [leads, samples] in millivolts, C-contiguous.
        progress: called with the number of merges so far and the count of the last pair, at most four times a second.
            What it raises ends the training, as Ctrl-C does.

    Raises:
        TypeError, ValueError: a record is not as `Tokenizer.encode` wants it, or the range is not two finite numbers,
            low < high.
    """
