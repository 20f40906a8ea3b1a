"""An update of `elm rl`: each prompt read once for all answers to it, against once for each answer.

    python benchmarks/rl.py
    python benchmarks/rl.py --llm FOLDER_OR_ID --use_peft --update connector llm
    python benchmarks/rl.py --representation symbolic --ecg_tokenizer FOLDER --num_generations 4

Log-probabilities of answers of random tokens, and their gradients, both ways in turn in one process. What the command line has beside
the options below is given to `elm rl`. Encoders are in full size, and trained where --update does not say otherwise; features of a frozen
one are kept. Without --llm it is the quickstart's small language model, on simulated ECGs with a question of each.
"""

import argparse
import statistics
import tempfile
import time

import torch
from common import add_arguments, llm_of, make_rows
from datasets import Dataset

from elm_ecg.training import rl, run
from elm_ecg.training.resume import RunOptions
from elm_ecg.training.rl_trainer import ELMGRPOTrainer

SIDES = {"once an answer": False, "once": True}


def batch_of(trainer: ELMGRPOTrainer, num_prompts: int, length: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Prompts, padded on the left, each with a group of answers [rows, tokens], which of them are read, and the prompts' numbers."""
    prompts, group = trainer.prompts["train"], trainer.num_generations
    numbers = [number for number in range(num_prompts) for _ in range(group)]
    width = max(len(prompts[number].input_ids) for number in numbers)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (len(numbers), width + length), generator=generator)
    mask = torch.ones_like(ids)
    for row, number in enumerate(numbers):
        prompt = torch.tensor(prompts[number].input_ids)
        ids[row, width - len(prompt) : width], mask[row, : width - len(prompt)] = prompt, 0
    device = trainer.accelerator.device
    return ids.to(device), mask.to(device), torch.tensor(numbers, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--num_generations", type=int, default=8, help="answers to a prompt; default: %(default)s")
    parser.add_argument("--max_completion_length", type=int, default=48, help="tokens of each; default: %(default)s")
    parser.add_argument("--prompts", type=int, default=1, help="that are trained on at once; default: %(default)s")
    parser.set_defaults(encoder="st_mem", repeats=3)
    args, others = parser.parse_known_args()

    with tempfile.TemporaryDirectory() as folder:
        answers, length = args.prompts * args.num_generations, args.max_completion_length
        argv = ["--data", "simulated", "--llm", llm_of(args, folder), "--output_dir", folder, "--rewards", "format"]
        argv += ["--report_to", "none"]
        argv += ["--num_generations", str(args.num_generations), "--per_device_train_batch_size", str(answers)]
        argv += ["--max_completion_length", str(length), "--seed", str(args.seed)]
        if "symbolic" not in others:
            argv += ["--encoder", args.encoder]
        parsed = rl.parse([*argv, *others])
        model, processor = run.build_base(*parsed)
        rows = [{**row, "messages": row["messages"][:2]} for row in make_rows(answers, args.seed)]
        data = Dataset.from_list(rows).with_format("numpy", columns=["ecg"], output_all_columns=True)
        splits = {"train": data, "validation": None}
        trainer = rl.make_trainer(*parsed, model, processor, splits, RunOptions.of(*parsed))
        trainer.model.train()
        ids, mask, numbers = batch_of(trainer, args.prompts, length, args.seed)
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(args.repeats + 1):  # the first ones fill what is kept
            for side, shares in SIDES.items():
                trainer._shares = trainer._may_share(trainer.model) and shares
                start = time.process_time()
                logps, _, _ = trainer._get_per_token_logps_and_entropies(
                    trainer.model, ids, mask, length, pixel_values=numbers
                )
                logps.sum().backward()
                if ids.is_cuda:
                    torch.cuda.synchronize()
                seconds[side].append(time.process_time() - start)

    prompt_length = ids.shape[1] - length
    print(
        f"\n{args.prompts} prompts of at most {prompt_length} tokens, {args.num_generations} answers of {length} to each\n"
    )
    print("| prompts are read | CPU s of an update | ratio |\n| --- | --- | --- |")
    medians = {side: statistics.median(values[1:]) for side, values in seconds.items()}
    for side, median in medians.items():
        print(f"| {side} | {median:.3f} | {medians['once an answer'] / median:.2f} |")


if __name__ == "__main__":
    main()
