"""Image processor of the ECG-language models: a record drawn or stacked, then through its backbone's own image processor."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches
from transformers.utils import TensorType

from .configuration_elm import IMAGE_REPRESENTATIONS
from .ecg_drawing import ECGPaper, draw_ecg, page_height, page_width
from .ecg_utils import ECGRecord


class ECGImageProcessor(BaseImageProcessor):
    """Makes the `pixel_values` of a vision backbone from records.

    `rgb` draws a record on ECG paper, in the very size that the backbone reads, so that nothing is scaled afterwards.
    `stacked_signal` makes a picture of leads x samples, the value of a sample as grey on three channels, which the backbone's
    image processor scales to its size.

    Args:
        image_processor: the backbone's own, or its dict. Nothing is cut off: where it crops, pictures are scaled to the size
            that it crops to. The Pillow variant is taken, so that pixels do not depend on what else is installed.
        representation: `rgb` or `stacked_signal`.
        paper: how `rgb` is drawn, an `ECGPaper` or a dict of its fields.
        value_range: values of a stacked record that are black and white; 0 and 1 after `minmax` normalization.

    Raises:
        ValueError: an argument is impossible.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor | Mapping[str, Any],
        representation: str = "rgb",
        paper: ECGPaper | Mapping[str, Any] | None = None,
        value_range: Sequence[float] = (0.0, 1.0),
        **kwargs: Any,
    ) -> None:
        # the base class would take a misspelt argument as an attribute; these come from saved files
        unknown = sorted(kwargs.keys() - {"auto_map", "image_processor_type"})
        if unknown:
            raise TypeError(f"ECGImageProcessor has no argument {', '.join(unknown)}.")
        if representation not in IMAGE_REPRESENTATIONS:
            raise ValueError(f"representation is {representation!r}; expected one of {IMAGE_REPRESENTATIONS}.")
        if len(value_range) != 2 or not value_range[0] < value_range[1]:
            raise ValueError(
                f"value_range is {list(value_range)}; expected the values of black and of white, such as [0, 1]."
            )
        kwargs.pop("image_processor_type", None)
        super().__init__(**kwargs)
        self.representation = representation
        self.paper = paper if isinstance(paper, ECGPaper) else ECGPaper(**(paper or {}))
        self.value_range = [float(value) for value in value_range]
        self.image_processor = _pil_image_processor(image_processor)
        self.model_input_names = self.image_processor.model_input_names
        self._size = _target_size(self.image_processor)

    def __call__(  # type: ignore[override]  # of ECGs, not of images
        self,
        ecgs: Sequence[ECGRecord | Image.Image],
        seconds: float | None = None,
        lead_names: Sequence[str] | None = None,
        return_tensors: str | TensorType | None = None,
    ) -> BatchFeature:
        """
        Args:
            ecgs: records, for `rgb` in millivolts, or pictures that stand for them.
            seconds, lead_names: as of `draw`.

        Returns:
            `pixel_values` [ECGs, channels, height, width] and what else the backbone's image processor makes: of SigLIP2
            `pixel_values` [ECGs, patches, values of a patch], `pixel_attention_mask` and `spatial_shapes`.
        """
        if not ecgs:
            raise ValueError("There is no ECG; give at least one.")
        pictures = [ecg if isinstance(ecg, Image.Image) else self.draw(ecg, seconds, lead_names) for ecg in ecgs]
        rows = [self._pixels(picture.convert("RGB")) for picture in pictures]  # scans may be grey or have alpha
        columns = {name: np.ascontiguousarray([row[name][0] for row in rows]) for name in rows[0]}  # batches of one
        return BatchFeature(columns, tensor_type=return_tensors)

    def _pixels(self, picture: Image.Image) -> BatchFeature:
        if self._size is None:  # SigLIP2, which itself resizes to its number of patches
            return self.image_processor(picture)
        height, width = self._size
        if picture.size != (width, height):
            picture = picture.resize((width, height), self.image_processor.resample)
        return self.image_processor(picture, do_resize=False, do_center_crop=False)

    def draw(
        self, record: ECGRecord, seconds: float | None = None, lead_names: Sequence[str] | None = None
    ) -> Image.Image:
        """The picture of a record that the backbone is shown, before its image processor.

        Args:
            seconds: that the page of `rgb` has room for; default: those of the record. The paper of a shorter record ends
                where it ends, at the same scale. So does that of all records where a few seconds over the whole width would
                leave no height for the leads.
            lead_names: that have a place on the page of `rgb`; default: those of the record.
        """
        if self.representation == "rgb":
            own_seconds = record.array.shape[1] / record.sampling_rate
            seconds = seconds or own_seconds
            leads = tuple(lead_names or record.lead_names)
            height, width = self.image_size(leads, seconds)
            # millimetres of paper that the picture shows at least: rows half as high as on a page of natural size
            least = page_height(self.paper, leads) / 2
            scale = min(width / page_width(self.paper, seconds), height / least)  # pixels per millimetre
            own_width = round(scale * page_width(self.paper, own_seconds))
            picture = Image.new("RGB", (width, height), self.paper.background_color)
            picture.paste(draw_ecg(record, height, own_width, self.paper, lead_names=leads))  # at the left
            return picture
        low, high = self.value_range
        grey = ((record.array - low) * (255 / (high - low))).clip(0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")  # leads high, samples wide

    def image_size(self, lead_names: Sequence[str], seconds: float) -> tuple[int, int]:
        """Height and width in pixels of a drawing."""
        if self._size is not None:
            return self._size
        height: Any = page_height(self.paper, lead_names)
        width: Any = page_width(self.paper, seconds)  # millimetres: only the ratio counts
        patches = self.image_processor.patch_size, self.image_processor.max_num_patches
        return get_image_size_for_max_num_patches(height, width, *patches)  # which leaves its result as it is

    def to_dict(self) -> dict[str, Any]:
        """What `preprocessor_config.json` holds: the arguments, the backbone's image processor as its own dict."""
        return {
            "auto_map": {"AutoImageProcessor": "image_processing_elm.ECGImageProcessor"},
            "image_processor_type": type(self).__name__,
            "image_processor": self.image_processor.to_dict(),
            "representation": self.representation,
            "paper": asdict(self.paper),
            "value_range": self.value_range,
        }


def _pil_image_processor(image_processor: BaseImageProcessor | Mapping[str, Any]) -> Any:
    fields = dict(image_processor if isinstance(image_processor, Mapping) else image_processor.to_dict())
    name = fields.pop("image_processor_type", "").removesuffix("Fast").removesuffix("Pil")  # as any variant saves it
    for class_name in (f"{name}Pil", name):
        image_processor_class = get_image_processor_class_from_name(class_name)
        if image_processor_class is not None:
            return image_processor_class(**fields)
    raise ValueError(
        f"image_processor_type is {name!r}; expected an image processor of transformers, such as ViTImageProcessor."
    )


def _target_size(image_processor: Any) -> tuple[int, int] | None:
    """Height and width of the pictures that a backbone reads; None where it reads any shape, cut into patches."""
    if getattr(image_processor, "max_num_patches", None) is not None:
        return None
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else image_processor.size
    if size is not None and size.height and size.width:
        return size.height, size.width
    if size is not None and size.shortest_edge:  # only one side is fixed: a square
        return size.shortest_edge, size.shortest_edge
    raise ValueError(f"The image processor's size is {size}; expected a height and a width in pixels.")


ECGImageProcessor.register_for_auto_class()

__all__ = ["ECGImageProcessor"]
