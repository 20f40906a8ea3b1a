"""How many ECGs a second the data loader turns into pictures for a vision backbone.

    python benchmarks/images.py
    python benchmarks/images.py --num_records 512 --batch_size 16

Records of 12 leads x 2500 samples (simulated, int16 microvolts, as `datasets` holds them), each with a chat, through `datasets`,
processor and collator to tensors, with 0, 1 and 2 worker processes; each process has one thread. `signal` is the same work
without a picture.
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
from common import interleaved, make_rows
from datasets import Dataset
from torch.utils.data import DataLoader

from elm_ecg.training import sft
from elm_ecg.training.build import build_processor
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.small_llm import save_small_llm

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers are forked
BACKBONES = {
    "signal": ["--representation", "signal", "--encoder", "merl"],
    "rgb, CLIP, 224 x 224": ["--representation", "rgb", "--encoder", "clip_vision_model"],
    "rgb, augmented": ["--representation", "rgb", "--encoder", "clip_vision_model", "--augment_rgb"],
    "rgb, ViT, 512 x 512": ["--representation", "rgb", "--encoder", "vit", "--encoder_config", '{"image_size": 512}'],
    "rgb, SigLIP2, 256 patches": ["--representation", "rgb", "--encoder", "siglip2_vision_model"],
    "rgb, SigLIP2, 512 patches, 3x4": [
        *("--representation", "rgb", "--encoder", "siglip2_vision_model", "--paper", '{"layout": "3x4"}'),
        *("--image_processor", '{"max_num_patches": 512}'),
    ],
    "stacked_signal, CLIP": ["--representation", "stacked_signal", "--encoder", "clip_vision_model"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_records", type=int, default=256, help="of a repeat; default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = make_rows(args.num_records, args.seed)
    data = Dataset.from_list([{"ecg": row["ecg"], "messages": row["messages"]} for row in rows])
    data = data.with_format("numpy", columns=["ecg"], output_all_columns=True)  # as `elm sft` reads it

    def feed(collator: ELMCollator, num_workers: int) -> None:
        for _ in DataLoader(data, args.batch_size, collate_fn=collator, num_workers=num_workers):
            pass

    works = {}
    with tempfile.TemporaryDirectory() as llm:
        save_small_llm(Path(llm), [row["messages"] for row in rows], args.seed)
        for name, options in BACKBONES.items():
            elm_args, _, _ = sft.parse(["--data", "simulated", "--llm", llm, *options])
            collator = ELMCollator(build_processor(elm_args), augment_rgb=elm_args.augment_rgb)
            works |= {(name, number): partial(feed, collator, number) for number in args.workers}
    times = interleaved(works, args.repeats)
    print(f"{args.num_records} records, batches of {args.batch_size}: records a second\n")
    print("| representation |" + "".join(f" {number} workers |" for number in args.workers))
    print("| --- |" + " --- |" * len(args.workers))
    for name in BACKBONES:
        speeds = (args.num_records / times[name, number] for number in args.workers)
        print(f"| {name} |" + "".join(f" {speed:.0f} |" for speed in speeds))


if __name__ == "__main__":
    main()
