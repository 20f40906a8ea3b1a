"""Contrastive learning of ECGs and their reports: the heads, and losses over the batch of all processes."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_ecg_pretraining import NUM_POOL_HEADS, ECGPretrainingConfig


class AttentionPool(nn.Module):
    """Tokens of an ECG to one vector: a learned CLS attends to them and to itself (CLIP, arXiv 2103.00020; MERL)."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + num_tokens, width))
        self.attention = nn.MultiheadAttention(width, NUM_POOL_HEADS, batch_first=True)
        self.projection = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] -> [batch, width]; ValueError for another number of tokens than there are positions."""
        expected = self.positions.shape[1] - 1
        if tokens.shape[1] != expected:
            raise ValueError(
                f"The encoder makes {tokens.shape[1]} tokens of these records, and the contrastive head has positions for {expected}: "
                "bring all records to the length of the encoder's configuration, num_samples."
            )
        tokens = torch.cat([self.cls_token.to(tokens.dtype).expand(len(tokens), 1, -1), tokens], dim=1)
        tokens = tokens + self.positions
        return self.projection(self.attention(tokens[:, :1], tokens, tokens, need_weights=False)[0][:, 0])


class ContrastiveHeads(nn.Module):
    """Projections of ECGs and reports into one space (MERL, arXiv 2403.06659)."""

    def __init__(self, config: ECGPretrainingConfig, encoder_width: int, num_tokens: int) -> None:
        super().__init__()
        size, text_width = config.projection_size, config.text_config.hidden_size
        self.projection = nn.Linear(encoder_width, size)  # MERL's convolution of one place
        self.attention_pool = AttentionPool(num_tokens, size)
        self.view_1 = nn.Linear(size, size, bias=False)
        self.view_2 = nn.Linear(size, size, bias=False)
        self.dropout = nn.Dropout(config.projection_dropout)
        self.text_projection = nn.Sequential(nn.Linear(text_width, size), nn.GELU(), nn.Linear(size, size))
        self.sigmoid = SigmoidLoss() if config.contrastive_loss == "sigmoid" else None

    def embed_ecgs(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens [batch, tokens, encoder width] to what is compared with the report, and two views of the ECG: each [batch, size]."""
        tokens = self.projection(tokens)
        mean = tokens.mean(1)
        return self.attention_pool(tokens), self.dropout(self.view_1(mean)), self.dropout(self.view_2(mean))


class SigmoidLoss(nn.Module):
    """SigLIP's loss (arXiv 2303.15343): whether each pair of an ECG and a report belongs together."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, ecgs: torch.Tensor, texts: torch.Tensor, has_report: torch.Tensor) -> torch.Tensor:
        """As of `info_nce`: the sum over all pairs, divided by the number of reports."""
        logits = self.log_scale.exp() * F.normalize(ecgs, dim=1) @ F.normalize(texts, dim=1).T + self.bias
        signs = 2 * torch.eye(len(logits), device=logits.device) - 1  # 1 for a pair, else -1
        losses = -F.logsigmoid(signs * logits) * (has_report[:, None] & has_report)
        return losses.sum() / has_report.sum().clamp(min=1)


def info_nce(first: torch.Tensor, second: torch.Tensor, temperature: float, counted: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE (arXiv 1807.03748; 2103.00020): the sum of the cross-entropies of both directions.

    Args:
        first, second: [batch, size]; rows of one number belong together, all others are negatives. They need no unit length.
        counted: bool [batch]; other rows are neither pairs nor negatives. 0 if there are none.
    """
    logits = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / temperature
    # a finite number: of a row without any column -inf would make NaN
    logits = logits.masked_fill(~(counted[:, None] & counted), torch.finfo(logits.dtype).min)
    labels = torch.arange(len(logits), device=logits.device).masked_fill(
        ~counted, -100
    )  # which cross_entropy leaves out
    directions = [F.cross_entropy(matrix, labels, reduction="sum") for matrix in (logits, logits.T)]
    return sum(directions, logits.new_zeros(())) / counted.sum().clamp(min=1)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows [batch, size] of all processes, [processes x batch, size], through which gradients flow back to each.

    All processes have to give as many rows. Without gradients, as in evaluation, a process keeps to its own: it may then run alone.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.is_grad_enabled()):
        return rows
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows))


def contrastive_loss(
    heads: ContrastiveHeads,
    ecgs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    texts: torch.Tensor,
    has_report: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """ECG against report, and one view of the ECG against the other, in float32 over the batch of all processes.

    Each process computes the loss of the whole batch, so that the mean of their gradients, as DDP takes it, is the gradient of it.

    Args:
        ecgs: what `ContrastiveHeads.embed_ecgs` gives.
        texts: [batch, size]; rows without report are not read.
        has_report: bool [batch].
    """
    with torch.autocast(texts.device.type, enabled=False):
        columns = [part.float() for part in (*ecgs, texts)]
        # one gathering, so that its backward pass comes before any gradient that DDP reduces
        rows = gather_rows(torch.cat([*columns, has_report[:, None].float()], dim=1))
        *columns, reported = rows.split([*(part.shape[1] for part in columns), 1], dim=1)
        pooled, view_1, view_2, texts = columns
        has_report = reported[:, 0] > 0.5
        everyone = torch.ones_like(has_report)
        of_views = info_nce(view_1, view_2, temperature, everyone)
        if heads.sigmoid is not None:
            return heads.sigmoid(pooled, texts, has_report) + of_views
        return info_nce(pooled, texts, temperature, has_report) + of_views
