"""Training speed: batches padded to their longest chat against batches padded to 2048 tokens.

    python benchmarks/sft.py
    python benchmarks/sft.py --llm qwen2.5-0.5b-instruct --encoder st_mem --batch_size 4

A step is what training does: collating the rows (simulated ECGs and chats), forward, backward, clipping, AdamW; on a
GPU under bf16 autocast.
"""

import argparse
from functools import partial

import torch
from common import DEVICE, add_arguments, build, interleaved, make_rows
from torch.nn.functional import pad

from elm_ecg.training.collator import ELMCollator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a repeat; default: %(default)s")
    parser.add_argument("--pad_to", type=int, default=2048, help="tokens of the other side; default: %(default)s")
    args = parser.parse_args()

    model, processor = build(args)
    model.train()
    collator = ELMCollator(processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    rows = make_rows(args.batch_size * args.steps, args.seed)
    fill = {"input_ids": processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}

    def train(pad_to: int | None) -> None:
        for start in range(0, len(rows), args.batch_size):
            batch = collator(rows[start : start + args.batch_size])
            if pad_to is not None:
                missing = pad_to - batch["input_ids"].shape[1]
                batch |= {name: pad(batch[name], (0, missing), value=value) for name, value in fill.items()}
            batch = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
            with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    lengths = collator(rows)["attention_mask"].sum(-1)
    print(f"{len(rows)} chats of {lengths.min()} to {lengths.max()} tokens, batches of {args.batch_size}")
    times = interleaved(
        {"longest of the batch": partial(train, None), "all": partial(train, args.pad_to)}, args.repeats
    )
    speeds = {name: len(rows) / median for name, median in times.items()}
    print("\n| padded to | samples/s | ratio |\n| --- | --- | --- |")
    for name, tokens in (("all", f"{args.pad_to} tokens"), ("longest of the batch", "longest of the batch")):
        print(f"| {tokens} | {speeds[name]:.2f} | {speeds[name] / speeds['all']:.1f} |")


if __name__ == "__main__":
    main()
