"""transformers' trainer for the pretraining of ECG encoders: each part of the loss is logged."""

from collections import defaultdict
from typing import Any

import torch
from torch.utils.data import DataLoader

from elm_ecg.modeling_common import in_eval_mode
from elm_ecg.training.checkpoints import WholeCheckpoints
from elm_ecg.training.pretrain_collator import PretrainingCollator

PARTS = ("masked_loss", "contrastive_loss")  # of the output of the model


class PretrainingTrainer(WholeCheckpoints):
    """
    Args:
        cache_reports: keep what the text encoder, which is frozen, gives for each report.
        kwargs: for `WholeCheckpoints` and transformers' trainer.
    """

    def __init__(self, *, cache_reports: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        # ids of a text -> what the text encoder gives for it; None: nothing is kept
        self._texts: dict[bytes, torch.Tensor] | None = {} if cache_reports else None
        # sums of the parts of the loss, and of how many batches, since they were logged; in training and in evaluation
        self._parts: dict[str, dict[str, Any]] = {"train": defaultdict(float), "eval": defaultdict(float)}

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the trainer's, of records that are not augmented, with the same masks each time."""
        collator = self.data_collator
        assert isinstance(collator, PretrainingCollator)
        # the base class reads both as it makes the loader
        self.data_collator, drop_last = collator.for_evaluation(), self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator, self.args.dataloader_drop_last = collator, drop_last

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As the trainer's; of reports that are kept their features.

        Each is read by itself: in a batch it would be rounded by what stands beside it, and a run that is resumed would differ.
        """
        inputs = super()._prepare_inputs(inputs)
        if self._texts is None or "input_ids" not in inputs:
            return inputs
        model, features = self.accelerator.unwrap_model(self.model), []
        for ids, mask in zip(inputs.pop("input_ids"), inputs.pop("attention_mask"), strict=True):
            ids = ids[mask.bool()]  # without padding
            key = ids.cpu().numpy().tobytes()
            if key not in self._texts:
                # outside of the model's forward, which may be compiled or wrapped
                with torch.no_grad(), self.compute_loss_context_manager(), in_eval_mode(model.text_encoder):
                    self._texts[key] = model.get_text_features(ids[None])[0].float().cpu()
            features.append(self._texts[key])
        return {**inputs, "text_features": torch.stack(features).to(self.args.device)}

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; the parts of the loss are kept for the log."""
        outputs = model(**inputs)
        sums = self._parts["train" if model.training else "eval"]
        for name in PARTS:
            if outputs.get(name) is not None:
                sums[name] = sums[name] + outputs[name].detach()
                sums[f"{name}s"] += 1
        return outputs.loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch that is not trained on."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach().mean(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the trainer's, with the means of the parts where there are several."""
        mode = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        sums = self._parts[mode]
        names = [name for name in PARTS if f"{name}s" in sums]
        if len(names) > 1 and ("loss" in logs or "eval_loss" in logs):
            means = torch.stack([sums[name] / sums[f"{name}s"] for name in names])
            means = self.accelerator.reduce(means, "mean")
            prefix = "eval_" if mode == "eval" else ""
            logs = {
                **logs,
                **{f"{prefix}{name}": round(float(mean), 6) for name, mean in zip(names, means, strict=True)},
            }
        if "loss" in logs or "eval_loss" in logs:
            sums.clear()
        super().log(logs, *args, **kwargs)
