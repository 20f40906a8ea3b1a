"""Convolutional ECG encoders: MERL and xresnet1d."""

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init  # leaves alone what a checkpoint has filled
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_ecg_encoders import MERLConfig, ResNetConfig, XResNet1dConfig
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
    """`bottleneck` (1x1, k, 1x1) or `basic` (k, k) block, k the kernel size; the stride is on the first convolution of that."""

    def __init__(self, config: ResNetConfig, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        kernel_size = config.kernel_size
        if config.block == "bottleneck":
            out_channels = 4 * width  # the expansion of ResNet
            convs = [
                ResNetConv(in_channels, width, 1),
                ResNetConv(width, width, kernel_size, stride),  # as in torchvision; ResNet's paper strides one before
                ResNetConv(width, out_channels, 1),
            ]
        else:
            out_channels = width
            convs = [ResNetConv(in_channels, width, kernel_size, stride), ResNetConv(width, width, kernel_size)]
        self.convs = nn.ModuleList(convs)
        self.shortcut = self.make_shortcut(in_channels, out_channels, stride)

    def make_shortcut(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """What the block's input passes to be added to what the convolutions make of it."""
        if stride == 1 and in_channels == out_channels:
            return nn.Identity()
        return ResNetConv(in_channels, out_channels, 1, stride)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As of `ResNetConv`."""
        residual = self.shortcut(hidden_states)
        for conv in self.convs[:-1]:
            hidden_states = conv(hidden_states).relu()
        return (self.convs[-1](hidden_states) + residual).relu()


class XResNetBlock(ResNetBlock):
    """A block whose shortcut averages where it strides, so that it reads all samples; it begins as its shortcut alone."""

    def make_shortcut(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """The average of as many samples as the stride, then a convolution where the number of channels changes."""
        layers: list[nn.Module] = []
        if stride > 1:  # ceil_mode: of odd lengths the last sample stays, as of a convolution
            layers.append(nn.AvgPool1d(stride, ceil_mode=True))
        if in_channels != out_channels:
            layers.append(ResNetConv(in_channels, out_channels, 1))
        return nn.Sequential(*layers)


class XResNetStem(nn.Sequential):
    """Three convolutions, of which the first halves the length, and a max pool, which halves it again."""

    def __init__(self, config: XResNet1dConfig) -> None:
        width, size = config.widths[0], config.kernel_size
        half = -(-width // 2)
        super().__init__(
            ResNetConv(config.num_leads, half, size, stride=2),
            nn.ReLU(),
            ResNetConv(half, half, size),
            nn.ReLU(),
            ResNetConv(half, width, size),
            nn.MaxPool1d(
                3, stride=2, padding=1
            ),  # the ReLU behind it gives the same as one before, of half as many values
        )


class ResNetStage(nn.Sequential):
    """Blocks of one width; the first may halve the length."""

    def __init__(
        self, block: type[ResNetBlock], config: ResNetConfig, in_channels: int, width: int, depth: int, stride: int
    ) -> None:
        out_channels = 4 * width if config.block == "bottleneck" else width
        super().__init__(
            block(config, in_channels, width, stride),
            *(block(config, out_channels, width, stride=1) for _ in range(depth - 1)),
        )


class ResNetModel(ECGEncoder):
    """Base of the ResNets: a stem, and stages of which all but the first halve the length.

    Takes records of any length. `hidden_states` are the stem's output and each stage's, [batch, channels, length].
    """

    config: ResNetConfig
    _no_split_modules = ["ResNetConv", "ResNetBlock", "XResNetBlock"]  # accelerate keeps each on one device
    _can_record_outputs = {"hidden_states": ResNetStage}  # and the first one's input, which is the stem's output

    def __init__(self, config: ResNetConfig, stem: nn.Module, block: type[ResNetBlock]) -> None:
        super().__init__(config)
        self.stem = stem
        self.stages = nn.ModuleList()
        channels = config.widths[0]
        for index, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            self.stages.append(ResNetStage(block, config, channels, width, depth, stride=1 if index == 0 else 2))
            channels = 4 * width if config.block == "bottleneck" else width
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's ResNets
        elif isinstance(module, XResNetBlock):
            last: Any = module.convs[-1]
            init.zeros_(last.norm.weight)  # it is ones so far: parts come before the whole

    def encode(self, ecg_values: torch.Tensor, lead_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        """A token for each place of the last stage; missing leads are zeros."""
        hidden_states = self.stem(ecg_values).relu()
        for stage in self.stages:
            hidden_states = stage(hidden_states)
        return hidden_states.transpose(1, 2)  # [batch, tokens, channels]


class MERLModel(ResNetModel):
    """1-D ResNet of MERL (Liu et al. 2024, arXiv 2403.06659), without max pool.

    A token stands for 2 ** (number of stages) samples: 157 tokens for 2500 samples.
    """

    config: MERLConfig

    def __init__(self, config: MERLConfig) -> None:
        super().__init__(config, ResNetConv(config.num_leads, config.widths[0], kernel_size=7, stride=2), ResNetBlock)


class XResNet1dModel(ResNetModel):
    """xresnet1d (Strodthoff et al. 2020, arXiv 2004.13701): a ResNet with the stem, the shortcuts and the beginning that He et al.
    2018 (arXiv 1812.01187) found best.

    A token stands for 2 ** (1 + number of stages) samples: 79 tokens for 2500 samples.
    """

    config: XResNet1dConfig

    def __init__(self, config: XResNet1dConfig) -> None:
        super().__init__(config, XResNetStem(config), XResNetBlock)


for _model in (MERLModel, XResNet1dModel):
    _model.register_for_auto_class("AutoModel")  # the code is saved beside the weights

__all__ = ["MERLModel", "XResNet1dModel"]
