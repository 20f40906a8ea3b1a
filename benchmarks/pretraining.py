"""A step of pretraining: masked patches, reports, both, and for comparison the masked loss by an encoder that sees all patches.

    python benchmarks/pretraining.py
    python benchmarks/pretraining.py --encoders st_mem --encoder_config '{"hidden_size": 192, "num_hidden_layers": 6}'

Forward and backward of batches of simulated ECGs, 12 leads x 2,500 samples, in CPU seconds on one thread, in turn. The reports are read before, as
with --cache_reports.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from common import make_rows
from transformers import BertConfig

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.configuration_ecg_pretraining import MASKED_ENCODERS, ECGPretrainingConfig
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.modeling_ecg_pretraining import ECGForPreTraining

SMALL = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3}
TEXT = BertConfig(vocab_size=100, hidden_size=384, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)


def make_model(encoder: str, fields: dict[str, Any], objectives: list[str], mask_ratio: float) -> ECGForPreTraining:
    text = TEXT if "contrastive" in objectives else None
    config = ENCODER_CONFIGS[encoder](**fields)
    return ECGForPreTraining(
        ECGPretrainingConfig(encoder_config=config, text_config=text, objectives=objectives, mask_ratio=mask_ratio)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--encoders", nargs="+", default=["st_mem", "mtae", "mlae", "xresnet1d"], choices=ENCODER_CONFIGS
    )
    parser.add_argument("--encoder_config", type=json.loads, help="JSON with fields; default: small transformers")
    parser.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = [row["ecg"] for row in make_rows(args.batch_size, 0)]
    ecgs = ECGFeatureExtractor()(records, return_tensors="pt")["ecg_values"]
    texts = torch.randn(args.batch_size, TEXT.hidden_size)

    print("\n| encoder | masked, s | reports, s | both, s | masked and seeing nearly all, s | ratio to masked |")
    print("| --- | --- | --- | --- | --- | --- |")
    for encoder in args.encoders:
        fields = args.encoder_config or ({} if encoder == "xresnet1d" else SMALL)
        sides = {"reports": (["contrastive"], 0.75)}
        if encoder in MASKED_ENCODERS:
            # as if it saw all: one patch of each row is masked
            whole = 1 / 12 if encoder == "mlae" else 1 / 25
            sides |= {
                "masked": (["masked"], 0.75),
                "both": (["masked", "contrastive"], 0.75),
                "whole": (["masked"], whole),
            }
        times: dict[str, list[float]] = {name: [] for name in sides}
        models = {name: make_model(encoder, fields, *side).train() for name, side in sides.items()}
        for repeat in range(args.repeats + 1):
            for name, model in models.items():
                inputs = {} if name in ("masked", "whole") else {"text_features": texts}
                start = time.process_time()
                model(ecg_values=ecgs, **inputs).loss.backward()
                if repeat:  # the first one does not count
                    times[name].append(time.process_time() - start)
        medians = {name: statistics.median(values) for name, values in times.items()}
        cells = [f"{medians[name]:.2f}" if name in medians else "" for name in ("masked", "reports", "both", "whole")]
        ratio = f"{medians['whole'] / medians['masked']:.2f}" if "whole" in medians else ""
        print(f"| {' | '.join([encoder, *cells, ratio])} |", flush=True)


if __name__ == "__main__":
    main()
