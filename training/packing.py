"""Several chats in a row of a batch: `--padding_free` and `--packing`."""

from itertools import accumulate, count
from typing import Any

import torch

from elm_ecg.configuration_elm import ELMConfig

# of a packed row, where nothing else is said: enough for little padding, and attention to all of a longer row takes its time
ROW_TOKENS = 128


def shared_rows(lengths: list[int], limit: int) -> list[list[int]]:
    """Which chats share a row: few rows, and as evenly filled as can be, so that hardly any padding is left.

    Args:
        lengths: tokens of each chat.
        limit: tokens that a row may have; of a longer chat, as many as it has.

    Returns:
        The numbers of the chats of each row.
    """
    limit = max(limit, *lengths)
    for num_rows in count(-(-sum(lengths) // limit)):
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        filled = [0] * num_rows
        for chat in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):  # the longest first
            row = filled.index(min(filled))
            rows[row].append(chat)
            filled[row] += lengths[chat]
        if max(filled) <= limit:
            return rows
    raise AssertionError("one chat a row always fits")


def pack(
    batch: dict[str, torch.Tensor],
    rows: list[list[int]],
    num_ecgs: list[int],
    of_texts: list[str],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> dict[str, torch.Tensor]:
    """A batch of padded chats with several chats in each row.

    There is no `attention_mask`: from `position_ids` [rows, tokens], which begin at 0 with each chat, transformers knows which
    tokens see each other, where it keeps no cache (`use_cache=False`). A token of padding is at 0 too, as if it were a chat.

    Args:
        batch: padded on the right.
        rows: the numbers of the chats of each row.
        num_ecgs: of each chat. The ECGs come in the order of their placeholders, as the model expects them.
        of_texts: names of the columns [chats, tokens]; the others have one entry an ECG.
    """
    lengths = batch["attention_mask"].sum(-1).tolist()
    width = max(sum(lengths[chat] for chat in row) for row in rows)
    width += -width % (pad_to_multiple_of or 1)
    columns = {name: batch[name] for name in of_texts if name in batch and name != "attention_mask"}
    columns["position_ids"] = torch.arange(max(lengths)).expand(len(lengths), -1)
    fills = {"input_ids": pad_token_id, "labels": -100}
    packed = {name: column.new_full((len(rows), width), fills.get(name, 0)) for name, column in columns.items()}
    for number, row in enumerate(rows):
        place = 0
        for chat in row:
            end = place + lengths[chat]
            for name, column in columns.items():
                packed[name][number, place:end] = column[chat, : lengths[chat]]
            packed["labels"][number, place] = -100  # the token before it is of another chat, and does not predict it
            place = end
    ends = list(accumulate(num_ecgs))
    order = [ecg for row in rows for chat in row for ecg in range(ends[chat] - num_ecgs[chat], ends[chat])]
    packed.update({name: ecgs[order] for name, ecgs in batch.items() if name not in {*columns, "attention_mask"}})
    return packed


def num_packed_tokens(position_ids: torch.Tensor) -> torch.Tensor:
    """How many tokens of packed rows are no padding; a chat has two at least."""
    return (position_ids > 0).sum() + (position_ids == 1).sum()


@torch.no_grad()
def check_kept_apart(model: Any, config: ELMConfig, device: torch.device, one_row: bool) -> None:
    """Other words in one chat must leave what the model makes of the next chat of its row as it is.

    A recurrent layer, or attention that does not look at `position_ids`, would take something of each chat into the next. The
    chats are of arbitrary tokens, without ECGs; the model stays as it was.

    Args:
        model: as the trainer calls it.
        one_row: whether a batch is one row; some kinds of attention tell chats apart only then.

    Raises:
        ValueError: the model does not keep chats apart.
    """
    length, num_rows = 8, 1 if one_row else 2
    first, other, last = torch.arange(3 * length, device=device).split(length)
    positions = torch.arange(length, device=device).repeat(num_rows, 2)
    training = model.training
    model.eval()
    one, two = (
        model(input_ids=torch.cat([chat, last]).repeat(num_rows, 1), position_ids=positions, use_cache=False).logits
        for chat in (first, other)
    )
    model.train(training)
    changes = (one - two).float().norm(dim=-1)  # [rows, tokens]
    # as small as rounding, not 0, where experts compute the tokens of both chats together
    if changes[:, length:].max() > 10 * torch.finfo(one.dtype).eps * changes[:, :length].max():
        attention = config.text_config._attn_implementation
        other_way = "" if one_row else "; --padding_free makes one row of a batch, which some of them keep apart"
        raise ValueError(
            f"--{'padding_free' if one_row else 'packing'}: {config.text_config.model_type} with {attention} attention does not keep "
            f"the chats of a row apart: each would be read with those before it{other_way}. Leave the option out; "
            "--train_sampling_strategy group_by_length saves padding too."
        )
