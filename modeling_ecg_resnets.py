"""Convolutional ECG encoders: MERL."""

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init  # leaves alone what a checkpoint has filled
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_ecg_encoders import MERLConfig
from .modeling_ecg_base import ECGEncoder


class ResNetConv(nn.Module):
    """Convolution and batch norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm1d(out_channels)  # its shift makes a bias before it useless

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, channels, length] -> [batch, out_channels, length / stride]."""
        return self.norm(self.conv(hidden_states))


class BatchNormBlock(GradientCheckpointingLayer):
    """A block with batch norm, whose running statistics are the same with gradient checkpointing as without."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # a checkpointed block runs twice: two steps of the smaller momentum move the statistics like one of 0.1;
        # compiled, the second run leaves them
        runs_twice = self.gradient_checkpointing and not torch.compiler.is_compiling()
        momentum = 1 - math.sqrt(0.9) if runs_twice else 0.1
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = momentum  # the weight of the newest batch, as PyTorch defines it
        return super().__call__(*args, **kwargs)


class ResNetBlock(BatchNormBlock):
    """`bottleneck` (1x1, k3, 1x1) or `basic` (k3, k3) block; the stride is on the first k3 convolution."""

    def __init__(self, config: MERLConfig, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        if config.block == "bottleneck":
            out_channels = 4 * width  # the expansion of ResNet
            convs = [
                ResNetConv(in_channels, width, 1),
                ResNetConv(width, width, 3, stride),  # here as in torchvision; ResNet's paper strides one before
                ResNetConv(width, out_channels, 1),
            ]
        else:
            out_channels = width
            convs = [ResNetConv(in_channels, width, 3, stride), ResNetConv(width, width, 3)]
        self.convs = nn.ModuleList(convs)
        same_shape = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same_shape else ResNetConv(in_channels, out_channels, 1, stride)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As of `ResNetConv`."""
        residual = self.shortcut(hidden_states)
        for conv in self.convs[:-1]:
            hidden_states = conv(hidden_states).relu()
        return (self.convs[-1](hidden_states) + residual).relu()


class ResNetStage(nn.Sequential):
    """Blocks of one width; the first may halve the length."""

    def __init__(self, config: MERLConfig, in_channels: int, width: int, depth: int, stride: int) -> None:
        out_channels = 4 * width if config.block == "bottleneck" else width
        super().__init__(
            ResNetBlock(config, in_channels, width, stride),
            *(ResNetBlock(config, out_channels, width, stride=1) for _ in range(depth - 1)),
        )


class MERLModel(ECGEncoder):
    """1-D ResNet of MERL (Liu et al. 2024, arXiv 2403.06659), without max pool.

    Takes records of any length; a token stands for 2 ** (number of stages) samples, 157 tokens for 2500 samples.
    `hidden_states` are the stem's output and each stage's, [batch, channels, length].
    """

    config: MERLConfig
    _no_split_modules = ["ResNetConv", "ResNetBlock"]  # accelerate keeps each on one device
    _can_record_outputs = {"hidden_states": ResNetStage}  # and the first one's input, which is the stem's output

    def __init__(self, config: MERLConfig) -> None:
        super().__init__(config)
        channels = config.widths[0]
        self.stem = ResNetConv(config.num_leads, channels, kernel_size=7, stride=2)
        self.stages = nn.ModuleList()  # all but the first halve the length, as the stem does
        for index, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            self.stages.append(ResNetStage(config, channels, width, depth, stride=1 if index == 0 else 2))
            channels = 4 * width if config.block == "bottleneck" else width
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's ResNets

    def encode(self, ecg_values: torch.Tensor, lead_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        """A token for each place of the last stage; missing leads are zeros."""
        hidden_states = self.stem(ecg_values).relu()
        for stage in self.stages:
            hidden_states = stage(hidden_states)
        return hidden_states.transpose(1, 2)  # [batch, tokens, channels]


MERLModel.register_for_auto_class("AutoModel")  # the code is saved beside the weights

__all__ = ["MERLModel"]
