"""The base of the ECG encoders: what each takes and gives."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_ecg_encoders import ECGEncoderConfig
from .modeling_common import CompleteModel


class ECGEncoder(CompleteModel):
    """The base of all encoders. Each implements `encode`, and `check_num_samples` if it does not read records of any length.

    `lead_mask` [batch, leads] is False for missing leads: the values in their rows are never read. Convolutions, and the time
    patches of MTAE and SigLIP, read zeros there. The tokens of MLAE and ST-MEM are leads or parts of them: those of a missing
    lead are not attended to, and are zeros in the output.
    """

    config: ECGEncoderConfig
    config_class: type[ECGEncoderConfig]  # transformers sets it to what `config` is annotated with
    base_model_prefix = "encoder"
    main_input_name = "ecg_values"  # transformers would look for input_ids
    input_modalities = "ecg"
    supports_gradient_checkpointing = True

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # of code that is not its own, transformers passes over modules that have no weights but those of their parts: such
        # code might not spare what a checkpoint has filled, as `transformers.initialization` does
        super()._initialize_weights(module)

    def prepare_ecg_values(self, ecg_values: torch.Tensor, lead_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The records in the model's dtype, zeros for missing leads; ValueError if they do not fit the configuration."""
        name, leads = type(self).__name__, self.config.num_leads
        if not ecg_values.is_floating_point():  # integers are a recorder's counts, not millivolts
            raise ValueError(
                f"{name} got ecg_values of dtype {ecg_values.dtype}; expected floating point values: "
                "convert them with ecg_values.float()."
            )
        if ecg_values.ndim != 3:
            raise ValueError(
                f"{name} got ecg_values of shape {list(ecg_values.shape)}; expected [batch, {leads} leads, samples]: "
                "give one record as ecg_values[None]."
            )
        if ecg_values.shape[1] != leads:
            raise ValueError(
                f"{name} got records of {ecg_values.shape[1]} leads; expected {leads}: "
                "select them by name, or set num_leads in the configuration."
            )
        self.check_num_samples(ecg_values.shape[2])
        return without_missing_leads(ecg_values, lead_mask).to(self.dtype)

    def check_num_samples(self, num_samples: int) -> None:
        """ValueError if the encoder does not admit records of this length."""
        if num_samples < 1:
            raise ValueError(f"{type(self).__name__} got records of 0 samples; expected at least 1: drop them.")

    def encode(self, ecg_values: torch.Tensor, lead_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        """Tokens [batch, tokens, output_size] of records as `prepare_ecg_values` gives them; `kwargs` are of the attention."""
        raise NotImplementedError

    @capture_outputs(tie_last_hidden_states=False)  # else the last block's state becomes last_hidden_state
    def forward(
        self, ecg_values: torch.Tensor, lead_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutput:
        """
        Args:
            ecg_values: float [batch, leads, samples].
            lead_mask: [batch, leads], False for missing leads; None if none is missing.

        Returns:
            `last_hidden_state` [batch, tokens, output_size], before pooling.
        """
        records = self.prepare_ecg_values(ecg_values, lead_mask)
        # reentrant checkpointing trains a block only if its input needs a gradient; compiled, every block is trained
        if self.training and self.is_activation_checkpointing and not torch.compiler.is_compiling():
            records = records.detach().requires_grad_()
        return BaseModelOutput(last_hidden_state=self.encode(records, lead_mask, **kwargs))


class TimePatchEncoder(ECGEncoder):
    """The base of encoders that cut records into patches of `patch_size` samples, of `num_samples` at most."""

    def check_num_samples(self, num_samples: int) -> None:
        """ValueError if records of this length do not make whole patches, or more of them than there are positions."""
        patch_size, most = self.config.patch_size, self.config.num_samples
        if not 0 < num_samples <= most or num_samples % patch_size:
            raise ValueError(
                f"{type(self).__name__} got records of {num_samples} samples; expected a multiple of patch_size={patch_size}, "
                f"{most} at most: cut or pad the records, or set num_samples in the configuration."
            )


def without_missing_leads(ecg_values: torch.Tensor, lead_mask: torch.Tensor | None) -> torch.Tensor:
    """The records [batch, leads, samples] with zeros where `lead_mask` [batch, leads] is False."""
    if lead_mask is None:
        return ecg_values
    if lead_mask.shape != ecg_values.shape[:2]:
        raise ValueError(
            f"The lead mask has shape {list(lead_mask.shape)}; expected {list(ecg_values.shape[:2])}, one value for each lead of each "
            "record: take ecg_lead_mask as the feature extractor gives it."
        )
    return ecg_values.masked_fill(~lead_mask.bool()[..., None], 0)  # not a product: 0 * NaN is NaN
