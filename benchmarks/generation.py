"""Generation speed: questions answered one by one against in batches.

    python benchmarks/generation.py
    python benchmarks/generation.py --llm qwen2.5-0.5b-instruct --encoder st_mem

Every answer has the same number of tokens, so that all sides do the same work: processor, greedy generation with cache,
decoding; on a GPU in bf16.
"""

import argparse
from functools import partial

import torch
from common import DEVICE, add_arguments, build, interleaved, make_rows

from training.data import to_chat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32], help="default: %(default)s")
    parser.add_argument("--answers", type=int, default=32, help="of a repeat; default: %(default)s")
    parser.add_argument("--new_tokens", type=int, default=16, help="of an answer; default: %(default)s")
    args = parser.parse_args()

    model, processor = build(args)
    model.eval()
    if DEVICE == "cuda":
        model.bfloat16()
    chats = [to_chat(row)[:1] for row in make_rows(args.answers, args.seed)]

    @torch.inference_mode()
    def answer(batch_size: int) -> None:
        for start in range(0, len(chats), batch_size):
            inputs = processor.apply_chat_template(
                chats[start : start + batch_size],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
            ).to(DEVICE)
            output = model.generate(
                **inputs, min_new_tokens=args.new_tokens, max_new_tokens=args.new_tokens, do_sample=False
            )
            processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    times = interleaved({str(size): partial(answer, size) for size in args.batch_sizes}, args.repeats)
    speeds = {size: len(chats) / median for size, median in times.items()}
    print(f"\n{len(chats)} answers of {args.new_tokens} tokens\n\n| batch | answers/s | ratio |\n| --- | --- | --- |")
    for size, speed in speeds.items():
        print(f"| {size} | {speed:.2f} | {speed / speeds[str(args.batch_sizes[0])]:.1f} |")


if __name__ == "__main__":
    main()
