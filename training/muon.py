"""`--optim muon`: Muon for the matrices of the language model, AdamW for all else that is trained.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) makes the update of a matrix nearly orthogonal. That has no
meaning for vectors, and does not suit embeddings and the head, whose rows are of single tokens. The update is scaled to the size
of AdamW's (Liu et al. 2025, https://arxiv.org/abs/2502.16982), so that one learning rate and one schedule are of both.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import Trainer, TrainingArguments
from trl import SFTConfig

MUON = "muon"  # the value of --optim
# what --optim_args may say of Muon, and how it is read
OPTIONS: dict[str, Callable[[str], Any]] = {"lr": float, "weight_decay": float, "momentum": float, "adjust_lr_fn": str}


class TakesMuon:
    """For a configuration whose `optim` may be `muon` too, which transformers does not know; it stands before that of TRL."""

    if TYPE_CHECKING:  # the parser reads the types of a configuration from all of its bases
        optim: Any

    def __post_init__(self) -> None:
        muon = self.optim == MUON
        if muon:
            self.optim = TrainingArguments.optim
        super().__post_init__()  # type: ignore[misc]  # of TRL
        if muon:
            self.optim = MUON


@dataclass
class SFTConfigWithMuon(TakesMuon, SFTConfig):
    """TRL's, for `elm sft`."""


def muon_options(optim_args: str | None) -> dict[str, Any]:
    """What `--optim_args` says of Muon, such as `lr=0.002,momentum=0.9`.

    Raises:
        ValueError: it says something else.
    """
    options: dict[str, Any] = {}
    for word in (optim_args or "").replace(" ", "").split(","):
        name, _, value = word.partition("=")
        try:
            if word:
                options[name] = OPTIONS[name](value)
                torch.optim.Muon([torch.zeros(1, 1)], **options)  # refuses values
        except (KeyError, ValueError) as error:
            told = f": {error}" if isinstance(error, ValueError) else ""
            raise ValueError(
                f"--optim_args {optim_args} with --optim {MUON}: {word!r} is none of its options{told}. Expected "
                f"{', '.join(f'{option}=...' for option in OPTIONS)}, with commas between them."
            ) from error
    return options


def matrices_of(language_model: nn.Module) -> set[nn.Parameter]:
    """The parameters of a language model without head that Muon trains: [rows, columns], not of an embedding."""
    embeddings = {
        parameter
        for module in language_model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    matrices = (parameter for parameter in language_model.parameters() if parameter.ndim == 2)
    return {parameter for parameter in matrices if parameter.requires_grad and parameter not in embeddings}


class InFloat32(TorchFunctionMode):
    """What would be cast to bfloat16 in the block is cast to float32, as Muon's matrices on a CPU.

    Few CPUs compute in bfloat16. Others take 25 times as long for a product of two matrices of width 128, which was half of a
    quickstart's step.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As of PyTorch."""
        kwargs = kwargs or {}
        if func is torch.Tensor.to and kwargs.get("dtype") is torch.bfloat16:
            kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)


class MuonAdamW(torch.optim.Optimizer):
    """Both as one optimizer, so that the scheduler, clipping and checkpoints have one.

    Args:
        muon, adamw: their groups of parameters.
        muon_options, adamw_options: the settings of groups that have none of their own.
    """

    def __init__(
        self,
        muon: list[dict[str, Any]],
        adamw: list[dict[str, Any]],
        muon_options: dict[str, Any],
        adamw_options: dict[str, Any],
    ):
        self._muon = torch.optim.Muon(muon, **muon_options)  # fills in the settings of the groups
        self._adamw = torch.optim.AdamW(adamw, **adamw_options)
        groups = [(True, self._muon), (False, self._adamw)]
        super().__init__([{**group, MUON: flag} for flag, part in groups for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """As of any optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, flag in ((self._muon, True), (self._adamw, False)):
            # those of this optimizer, which a checkpoint replaces and a scheduler changes
            part.param_groups = [group for group in self.param_groups if group[MUON] == flag]
            part.state = self.state
            on_cpu = flag and any(one.device.type == "cpu" for group in part.param_groups for one in group["params"])
            with InFloat32() if on_cpu else nullcontext():
                part.step()
        return loss


class OptimizesByMuon(Trainer):
    """A trainer that knows `--optim muon`; it stands before that of transformers or TRL."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the trainer's, which does not know Muon."""
        if self.args.optim != MUON or self.optimizer is not None:
            return super().create_optimizer(model)
        model, args = model or self.model, self.args
        matrices = matrices_of(model.model.language_model)
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        decay = self.get_decay_parameter_names(model)  # no norms, no biases
        rest: dict[bool, list[Any]] = {True: [], False: []}
        for name, value in trained.items():
            if value not in matrices:
                rest[name in decay].append(value)
        muon = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        adamw = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        self.optimizer = MuonAdamW(
            [{"params": [value for value in trained.values() if value in matrices]}],
            [{"params": rest[True], "weight_decay": args.weight_decay}, {"params": rest[False], "weight_decay": 0.0}],
            muon | muon_options(args.optim_args),
            {**adamw, "fused": True},
        )
        return self.optimizer
