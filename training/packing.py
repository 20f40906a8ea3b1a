"""Several chats in a row of a batch: `--padding_free` and `--packing`."""

import sys
from heapq import heapreplace
from itertools import accumulate
from typing import Any

import torch

# of a packed row, where nothing else is said: enough for little padding, and attention to all of a longer row takes its time
ROW_TOKENS = 256


def max_tokens_to_share(config: Any) -> int:
    """Tokens below which a row may be for its chats to share what they begin with, see `pack`; 0 where they cannot.

    Sharing takes a mask of one's own, which flash and flex attention do not read, and which a layer that sees the last tokens
    alone would read in place of that.

    Args:
        config: of the language model.
    """
    if config._attn_implementation not in ("sdpa", "eager"):
        return 0
    names = ("sliding_window", "attention_chunk_size", "window_size")  # the last one of GPT-Neo
    windows = [getattr(config, name, None) for name in names]
    return min([window for window in windows if window], default=sys.maxsize)


def common_begin(batch: dict[str, torch.Tensor], ecg_token_id: int) -> int:
    """How many tokens all chats of a batch begin with, such as a system prompt: none of an ECG, none that predicts a label, and of no
    chat all.

    Args:
        batch: padded on the right.
    """
    ids, goes_on, labels = batch["input_ids"], batch["attention_mask"].bool()[:, 1:], batch["labels"][:, 1:]
    alike = (ids == ids[:1]).all(0) & (ids[0] != ecg_token_id)  # [tokens]
    return int((alike[:-1] & goes_on.all(0) & (labels == -100).all(0)).long().cumprod(0).sum())


def shared_rows(lengths: list[int], limit: int, begin: int = 0) -> list[list[int]]:
    """Which chats share a row, so that there is as little to compute as can be, padding included.

    Args:
        lengths: tokens of each chat.
        limit: tokens that a row may have; of a longer chat, as many as it has.
        begin: tokens at the begin of each chat, which a row has once.

    Returns:
        The numbers of the chats of each row.
    """
    limit = max(limit, *lengths)
    longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    best: list[list[int]] = []
    least = sys.maxsize  # tokens, padding included
    num_rows, most = max(1, -(-sum(length - begin for length in lengths) // limit)), len(lengths)
    while num_rows <= most:
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        filled = [(begin, row) for row in range(num_rows)]  # a heap, the emptiest row first
        for chat in longest_first:
            tokens, row = filled[0]
            rows[row].append(chat)
            heapreplace(filled, (tokens + lengths[chat] - begin, row))
        width = max(filled)[0]
        if width <= limit:
            if not best:
                most = min(2 * num_rows, most)  # more rows may fill more evenly, many more hardly do
            if num_rows * width < least:
                best, least = rows, num_rows * width
        num_rows += 1
    return best


def packed_width(lengths: list[int], rows: list[list[int]], begins: list[int]) -> int:
    """Tokens of the longest row of chats of these lengths, where those of a row share what they begin with."""
    return max(begin + sum(lengths[chat] - begin for chat in row) for row, begin in zip(rows, begins, strict=True))


def pack(
    batch: dict[str, torch.Tensor],
    rows: list[list[int]],
    num_ecgs: list[int],
    of_texts: list[str],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
    begins: list[int] | None = None,
) -> dict[str, torch.Tensor]:
    """A batch of padded chats with several chats in each row.

    There is no `attention_mask`: `position_ids` [rows, tokens] say which tokens see each other. They begin at 0 with each chat, from
    which transformers knows it where it keeps no cache (`use_cache=False`). Chats that share what they begin with have it once, at
    the begin of their row; the second one and those after it are without it and begin at the position behind it. That takes
    `mask_of`. A token of padding is at 0 too, as if it were a chat.

    Args:
        batch: padded on the right.
        rows: the numbers of the chats of each row.
        num_ecgs: of each chat. The ECGs come in the order of their placeholders, as the model expects them.
        of_texts: names of the columns [chats, tokens]; the others have one entry an ECG.
        begins: of each row, tokens that all its chats begin with alike; None: they share none.
    """
    lengths = batch["attention_mask"].sum(-1).tolist()
    begins = begins or [0] * len(rows)
    width = packed_width(lengths, rows, begins)
    width += -width % (pad_to_multiple_of or 1)
    columns = {name: batch[name] for name in of_texts if name in batch and name != "attention_mask"}
    columns["position_ids"] = torch.arange(max(lengths)).expand(len(lengths), -1)
    fills = {"input_ids": pad_token_id, "labels": -100}
    packed = {name: column.new_full((len(rows), width), fills.get(name, 0)) for name, column in columns.items()}
    for number, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        place = 0
        for chat in row:
            first = begin if place else 0
            end = place + lengths[chat] - first
            for name, column in columns.items():
                packed[name][number, place:end] = column[chat, first : lengths[chat]]
            packed["labels"][number, place] = -100  # the token before it is of another chat, and does not predict it
            place = end
    ends = list(accumulate(num_ecgs))
    order = [ecg for row in rows for chat in row for ecg in range(ends[chat] - num_ecgs[chat], ends[chat])]
    packed.update({name: ecgs[order] for name, ecgs in batch.items() if name not in {*columns, "attention_mask"}})
    return packed


def mask_of(position_ids: torch.Tensor, elm: Any) -> torch.Tensor:
    """What each token sees, [rows, 1, tokens, tokens], of rows in which chats share what they begin with.

    Args:
        position_ids: [rows, tokens] of `pack`.
        elm: reads them. With sdpa attention it takes True or False, with eager attention 0 or -infinity, in the dtype of its
            embeddings: some models would go on in that of the mask.
    """
    places = torch.arange(position_ids.shape[1], device=position_ids.device)
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    # of each token [rows, tokens]: where its chat's own tokens begin, and how many of its row's begin are of its chat too
    first = torch.where(begins, places, 0).cummax(dim=1).values
    shared = position_ids.gather(1, first)
    seen = (places >= first.unsqueeze(-1)) | (places < shared.unsqueeze(-1))  # [rows, tokens, tokens]
    seen &= places <= places.unsqueeze(-1)
    mask = seen.unsqueeze(1)
    if elm.config.text_config._attn_implementation == "sdpa":
        return mask
    dtype = elm.get_input_embeddings().weight.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def num_packed_tokens(position_ids: torch.Tensor) -> torch.Tensor:
    """How many tokens the chats of packed rows have, what they share counted for each, padding not; a chat has two at least."""
    last = torch.ones_like(position_ids, dtype=torch.bool)  # of its chat: the position behind it is not the next one
    last[:, :-1] = position_ids.diff(dim=1) != 1
    return ((position_ids + 1) * (last & (position_ids > 0))).sum()


@torch.no_grad()
def keeps_apart(model: Any, elm: Any, device: torch.device, one_row: bool = False, share: bool = False) -> bool:
    """Whether other words in one chat leave what the model makes of the next chat of its row as it is.

    A recurrent layer, or attention that does not look at `position_ids`, takes something of each chat into the next. The chats are of
    arbitrary tokens, without ECGs; the model stays as it was.

    Args:
        model: the ELM as the trainer calls it, which may be wrapped.
        elm: the ELM.
        device: of batches; weights may be kept elsewhere.
        one_row: whether a batch is one row; some kinds of attention tell chats apart only then.
        share: whether the chats of a row share what they begin with; then the next chat is to be as it is by itself, too.
    """
    # what a state has taken in of a chat may be too little to be seen in bfloat16
    if any(getattr(module, "_is_stateful", False) for module in elm.modules()):
        return False
    length, num_rows = 8, 1 if one_row else 2
    begin, first, other, last = torch.arange(4 * length, device=device).split(length)
    begin = begin[: length if share else 0]
    places = torch.arange(len(begin) + length, device=device)
    positions = torch.cat([places, places[len(begin) :]]).repeat(num_rows, 1)
    mask = {"attention_mask": mask_of(positions, elm)} if share else {}

    def logits(*chats: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return model(input_ids=torch.cat(chats).repeat(num_rows, 1), use_cache=False, **kwargs).logits

    training = model.training
    model.eval()
    try:
        one, two = (logits(begin, chat, last, position_ids=positions, **mask) for chat in (first, other))
        alone = logits(begin, last) if share else two
    except ValueError:  # older models unpack the two dimensions of the usual mask
        return False
    finally:
        model.train(training)

    def apart(other: torch.Tensor) -> torch.Tensor:  # how far the last chat is from another reading of it
        return (one[:, -length:] - other[:, -length:]).float().norm(dim=-1).max()

    of_chat = (one - two)[:, :-length].float().norm(dim=-1).max()
    # as small as rounding, not 0, where experts compute the tokens of both chats together
    mixed = apart(two) > 10 * torch.finfo(one.dtype).eps * of_chat
    # by itself it is of another shape, which other kernels compute, rounded to TF32 or bfloat16 though the logits may be in float32
    return bool(~mixed & (apart(alone) <= 10 * torch.finfo(torch.bfloat16).eps * of_chat))


def check_kept_apart(
    model: Any, elm: Any, device: torch.device, one_row: bool, share: bool = False, longest_row: float = 0
) -> None:
    """Raises a ValueError if the model does not keep chats apart, see `keeps_apart`.

    Args:
        longest_row: tokens that a row may have: those of `max_tokens_to_share` and more are read as if nothing were shared.
    """
    config = elm.config.text_config
    window = max_tokens_to_share(config)
    plain = not share or longest_row >= window < sys.maxsize
    kinds = ([True] if share else []) + ([False] if plain else [])
    mixing = [kind for kind in kinds if not keeps_apart(model, elm, device, one_row, kind)]
    if not mixing:
        return
    other_way = "" if one_row else "; --padding_free makes one row of a batch, which some of them keep apart"
    if mixing == [False] and share:
        other_way = (
            f" in rows of {window} tokens, its window, and more; --max_length {window - 1} and less keeps them apart"
        )
    raise ValueError(
        f"--{'padding_free' if one_row else 'packing'}: {config.model_type} with {config._attn_implementation} attention does not keep "
        f"the chats of a row apart: each would be read with those before it{other_way}. Leave the option out; "
        "--train_sampling_strategy group_by_length saves padding too."
    )
