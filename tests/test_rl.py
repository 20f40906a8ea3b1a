import json
import math
import re
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import load_file
from test_families import FUYU, tiny_llm

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training import rl, run, sft
from elm_ecg.training.build import new_elm
from elm_ecg.training.data.synthetic import make_record
from elm_ecg.training.load import load_elm
from elm_ecg.training.resume import RunOptions
from elm_ecg.training.rl_sampling import DrawByRow, answer_prompts
from elm_ecg.training.rl_trainer import ELMGRPOTrainer
from helpers import (
    TINY_ENCODERS,
    fork_two,
    save_tiny_data,
    tiny_ecg_byte,
    tiny_image_elm_config,
    tiny_image_processor_elm,
    tiny_processor,
    tiny_sft,
)

REWARD = """
def vowels(completions, solution, age=None, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in texts]
"""


def tiny_rl(
    model: Path | None, data: Path, output_dir: Path, *options: str, rewards: tuple[str, ...] = ()
) -> list[str]:
    """Arguments of `elm rl` for a run of seconds; a later option overrides an earlier one."""
    args = ["--data", str(data), "--output_dir", str(output_dir), "--use_cpu", "--report_to", "none"]
    args += [] if model is None else ["--model_name_or_path", str(model)]
    args += ["--gradient_checkpointing", "false", "--batch_size", "8", "--lr", "1e-2", "--logging_steps", "1"]
    args += ["--max_completion_length", "6", "--draw_steps", "0"]
    args += ["--rewards", *(rewards or ("format", "tags", "answer")), "--save_strategy", "no", "--disable_tqdm", "true"]
    return [*args, *options]


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> str:
    """A reward that every answer has some of."""
    path = tmp_path_factory.mktemp("reward") / "mine.py"
    path.write_text(REWARD)
    return f"{path}:vowels"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_tiny_data(tmp_path_factory.mktemp("data") / "data", without_ecg=5, train=12, validation=4)


def make_elm(llm: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    parts = {"encoder": "merl", "encoder_config": TINY_ENCODERS["merl"], "num_ecg_tokens": 4} | options
    return new_elm(str(llm), sampling_rate=100, num_samples=500, **parts)


@pytest.fixture(scope="module")
def model(llm, tmp_path_factory) -> Path:
    """A tiny ELM that has learnt nothing."""
    folder = tmp_path_factory.mktemp("elm") / "elm"
    elm, processor = make_elm(llm)
    elm.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def mixed_rows(*counts: int) -> Dataset:
    """Rows with so many ECGs each."""
    rows = []
    for index, count in enumerate(counts):
        records = [make_record(10 * index + i, 0, sampling_rate=100, seconds=5.0)["ecg"] for i in range(count)]
        for record in records:
            record["array"] = record["array"].tolist()
        content = f"Row {index}: what is it?"
        turns = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": f"<answer>it is {count}</answer>"},
        ]
        rows.append({"messages": turns, "ecg": records, "record_id": str(index), "patient_id": str(index)})
    return Dataset.from_list(rows)


def make_trainer(elm: Any, processor: Any, splits: dict[str, Any], folder: Path, *options: str) -> ELMGRPOTrainer:
    args, training_args, model_args = rl.parse(tiny_rl(None, Path("d"), folder, *options))
    args.update = args.update or ["encoder", "connector", "llm"]
    options = RunOptions.of(args, training_args, model_args)
    return rl.make_trainer(args, training_args, model_args, elm, processor, {"validation": None} | splits, options)


def history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def of(folder: Path, name: str) -> list[float]:
    return [row[name] for row in history(folder) if name in row]


# what is summed


def batch_of(generator: torch.Generator, rows: int = 4, tokens: int = 5) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([5, 3, 1, 4])
    mask = (torch.arange(tokens) < lengths[:, None]).int()
    return {
        "prompt_ids": torch.zeros(rows, 2, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 2, dtype=torch.int),
        "completion_ids": torch.zeros(rows, tokens, dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.tensor([1.5, -0.5, 0.25, -1.25]),
        "old_per_token_logps": -torch.rand(rows, tokens, generator=generator),
        "ref_per_token_logps": -torch.rand(rows, tokens, generator=generator),
        "num_items_in_batch": mask.sum(),
        "pixel_values": torch.zeros(rows, dtype=torch.long),
    }


def loss_by_hand(kind: str, new: np.ndarray, batch: dict[str, np.ndarray], kept: list[int], beta: float) -> float:
    """Token by token, as the papers have it."""
    rows = []
    for row in kept:
        advantage, tokens = float(batch["advantages"][row]), []
        for place in range(int(batch["completion_mask"][row].sum())):
            ratio = math.exp(new[row, place] - batch["old_per_token_logps"][row, place])
            if kind == "sapo":
                tau = 1.0 if advantage > 0 else 1.05
                gain = 4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage
            else:
                gain = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            away = batch["ref_per_token_logps"][row, place] - new[row, place]
            tokens.append(-gain + beta * ratio * (math.exp(away) - away - 1))
        rows.append(tokens)
    if kind == "dapo":  # all tokens alike
        return sum(map(sum, rows)) / sum(map(len, rows))
    return sum(sum(tokens) / len(tokens) for tokens in rows) / len(rows)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("skipped", [[], [2, 3]])
@pytest.mark.parametrize("kind", ["sapo", "grpo", "dapo"])
def test_loss_is_that_of_the_papers(kind, skipped, beta, monkeypatch):
    """With groups of equal rewards out of it, as if they had never been in the batch."""
    generator = torch.Generator().manual_seed(1)
    batch = batch_of(generator)
    new = -torch.rand(4, 5, generator=generator)
    kept = [row for row in range(4) if row not in skipped]
    expected = loss_by_hand(kind, new.numpy(), {name: value.numpy() for name, value in batch.items()}, kept, beta)
    batch["completion_mask"][skipped] = 0
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    batch["row_factor"] = torch.tensor(4 / len(kept) if kind != "dapo" else 1.0)
    trainer = bare_trainer(kind, beta)
    monkeypatch.setattr(
        trainer, "_get_per_token_logps_and_entropies", lambda *args, **kwargs: (new, torch.zeros_like(new), None)
    )
    assert float(trainer._compute_loss(trainer.model, batch)) == pytest.approx(expected, rel=1e-5)
    assert trainer.beta == beta


def bare_trainer(kind: str, beta: float) -> Any:
    """The trainer without what only training needs."""

    trainer: Any = object.__new__(ELMGRPOTrainer)
    trainer.model = SimpleNamespace(training=True)
    args = rl.parse(tiny_rl(None, Path("d"), Path("o"), "--loss_type", kind))[1]
    trainer.accelerator = Accelerator(cpu=True)
    trainer.args, trainer.loss_type, trainer.beta = args, kind, beta
    trainer.importance_sampling_level, trainer.top_entropy_quantile = "token", 1.0
    trainer.epsilon_low = trainer.epsilon_high = args.epsilon
    trainer.off_policy_mask_threshold, trainer.use_vllm = None, False
    trainer._entropy_bonus_enabled = trainer.aux_loss_enabled = False
    trainer.current_gradient_accumulation_steps = 1
    trainer._metrics = {"train": defaultdict(list)}
    return trainer


# what is measured


@pytest.mark.parametrize(
    ("kind", "update"),
    [
        *((kind, ["connector", "llm"]) for kind in ("signal", "symbolic", "stacked_signal", "rgb")),
        ("signal", ["encoder", "connector", "llm"]),  # whose batch norm keeps the statistics that it has
    ],
)
def test_log_probabilities_are_those_of_forward(kind, update, llm, tmp_path):
    """Rows of no, one and two ECGs in one batch, one of them masked, and several answers to one prompt, which is read once; of the model
    as it is trained, and as it answers."""
    elm, processor = elm_of(kind, llm, tmp_path)
    rows = mixed_rows(1, 0, 2, 1)
    trainer = make_trainer(elm, processor, {"train": rows}, tmp_path / "out", "--update", *update)
    trainer.model.train()
    numbers = [2, 1, 0, 3, 2, 0, 2]
    prompts = [trainer.prompts["train"][number] for number in numbers]
    rng = np.random.default_rng(0)
    answers = [rng.integers(0, 100, length).tolist() for length in (3, 5, 1, 4, 2, 5, 5)]
    width, length = max(len(prompt.input_ids) for prompt in prompts), max(map(len, answers))
    ids = torch.full((len(numbers), width + length), processor.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start = width - len(prompt.input_ids)
        ids[row, start : width + len(answer)] = torch.tensor(prompt.input_ids + answer)
        mask[row, start : width + len(answer)] = 1
    mask[3, width:] = 0  # of a group with equal rewards
    read = []
    hook = elm.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    found, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, length, compute_entropy=True, pixel_values=torch.tensor(numbers)
    )
    hook.remove()
    assert found.shape == (len(numbers), length)
    assert read[-1] < mask.sum()  # beside those by which it is known that chats can share a row
    elm.eval()
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            logits = elm(input_ids=torch.tensor([prompt.input_ids + answer]), **prompt.ecgs).logits[0].float() / 0.8
        places = range(len(prompt.input_ids) - 1, len(prompt.input_ids) + len(answer) - 1)
        expected = logits.log_softmax(-1)[list(places)]
        if row == 3:
            assert not found[3].any()
            continue
        values = expected.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert torch.allclose(found[row, : len(answer)], values, atol=2e-4)
        assert torch.allclose(entropies[row, : len(answer)], -(expected.exp() * expected).sum(-1), atol=2e-4)
        assert not found[row, len(answer) :].any()
    found.sum().backward()
    if kind != "symbolic":
        assert any(
            weight.grad is not None and weight.grad.abs().sum() > 0 for weight in elm.model.connector.parameters()
        )


def test_a_prompt_that_ends_with_its_ecg(llm, tmp_path):
    """Its last token would stand before each answer, and be that of an ECG there."""
    elm, processor = make_elm(llm)
    processor.chat_template = "{% for message in messages %}{{ message['content'][-1]['text'] }}<signal>{% endfor %}"
    trainer = make_trainer(elm, processor, {"train": mixed_rows(1)}, tmp_path / "out", "--update", "connector", "llm")
    prompt = trainer.prompts["train"][0].input_ids
    assert prompt[-1] == processor.ecg_token_id
    ids = torch.tensor([[*prompt, 5, 6], [*prompt, 7, 8]])
    found = []
    for trainer._shares in (None, False):
        found.append(
            trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, torch.ones_like(ids), 2, pixel_values=torch.tensor([0, 0])
            )[0]
        )
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_rows_stay_narrower_than_a_window(llm, tmp_path):
    """Where not all answers to a prompt have room in one such row, it is read once in each of several."""
    elm, processor = make_elm(llm)
    trainer = make_trainer(elm, processor, {"train": mixed_rows(1)}, tmp_path / "out", "--update", "connector", "llm")
    prompt = trainer.prompts["train"][0].input_ids
    ids = torch.tensor([[*prompt, answer, 6, 7] for answer in range(8)])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    shapes = []
    for trainer._tokens_to_share in (
        1000,
        len(prompt) + 12,
        len(prompt),
    ):  # room for eight answers, for three, for none
        inputs, prompts, order = trainer._answers_behind_prompts(batch, [0] * 8, 3)
        shapes.append(tuple(inputs["input_ids"].shape))
        assert sorted(order) == [*range(8)]
        assert len(prompts) == len(inputs["input_ids"])
    assert shapes == [(1, len(prompt) + 31), (3, len(prompt) + 11), tuple(ids.shape)]


def elm_of(kind: str, llm: Path, folder: Path) -> Any:
    if kind == "signal":
        return make_elm(llm)
    if kind == "symbolic":
        tiny_ecg_byte().save_pretrained(folder / "ecg_byte")
        torch.manual_seed(0)
        return new_elm(
            str(llm),
            elm="ecg_byte",
            ecg_tokenizer=str(folder / "ecg_byte"),
            sampling_rate=10,
            num_samples=50,
            lead_names=["I", "II"],
        )
    processor = tiny_image_processor_elm("siglip2_vision_model" if kind == "rgb" else "vit", kind)
    torch.manual_seed(0)
    config = tiny_image_elm_config(
        "siglip2_vision_model" if kind == "rgb" else "vit", kind, ecg_token_id=processor.ecg_token_id
    )
    return ELMForConditionalGeneration(config), processor


# what is written


def test_what_is_drawn_follows_the_probabilities():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]]).repeat(4000, 1)
    ids = torch.zeros(4000, 3, dtype=torch.long)
    for options, expected in (
        ({"temperature": 0.5}, torch.softmax(scores[0] / 0.5, -1)),
        ({"top_k": 2}, torch.softmax(torch.tensor([2.0, 1.0, *[-torch.inf] * 3]), -1)),
        ({"top_p": 0.7}, torch.softmax(torch.tensor([2.0, 1.0, *[-torch.inf] * 3]), -1)),
        ({"min_p": 0.5}, torch.tensor([1.0, 0, 0, 0, 0])),
    ):
        draw = DrawByRow(options, [[7, row] for row in range(4000)], 3, 2)
        drawn = draw(ids, scores)
        assert (drawn == 0).sum(-1).eq(1).all()  # one token is left of each row
        shares = torch.bincount(drawn.argmax(-1), minlength=5) / 4000
        assert torch.allclose(shares, expected, atol=0.03)
        # a row alone gets what it got among others
        alone = DrawByRow(options, [[7, 11]], 3, 2)
        assert alone(ids[:1], scores[:1]).argmax(-1) == drawn[11].argmax(-1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_5"])
def test_prompts_are_read_once(family, llm, tmp_path, monkeypatch):
    """The answers are those that each prompt gets alone, without a cache that is shared; qwen3_5 keeps states of what it has read."""
    elm, processor = make_elm(llm) if family == "llama" else elm_of_family(family, tmp_path)
    elm.eval()
    trainer = make_trainer(
        elm, processor, {"train": mixed_rows(1, 0, 2)}, tmp_path / "out", "--update", "connector", "llm"
    )
    prompts = [trainer.prompts["train"][number] for number in (0, 1, 2)]
    lengths = []
    forward = elm.model.forward
    monkeypatch.setattr(
        elm.model,
        "forward",
        lambda *args, **kwargs: lengths.append(kwargs["input_ids"].shape) or forward(*args, **kwargs),
    )
    trainer._of, trainer._numbers = "train", [0, 0, 1, 1, 2, 2]
    answers, _ = trainer._generate_single_turn([], None, {}, 2)
    width = max(len(prompt.input_ids) for prompt in prompts)
    assert lengths[0] == (3, width - 1)  # each prompt once
    assert set(lengths[1:]) == {(6, 1)}  # then token by token
    assert len({tuple(answer) for answer in answers}) > 3
    for place, number in enumerate(trainer._numbers):
        prompt = prompts[number]
        ids = torch.tensor([prompt.input_ids])
        found = answer_prompts(
            elm, ids, torch.ones_like(ids), prompt.ecgs, [0], [trainer._seeds()[place]], trainer.generation_kwargs
        )[0].tolist()
        assert found[: len(answers[place])] == answers[place]


def elm_of_family(family: str, folder: Path) -> Any:
    tiny_llm(family).save_pretrained(folder / "llm")
    processor = tiny_processor("default", sampling_rate=100)
    elm = ELMForConditionalGeneration.from_encoder_llm_pretrained(
        folder / "llm", ecg_token_id=processor.ecg_token_id, **FUYU
    )
    return elm, processor


# runs


@pytest.mark.slow
def test_rewards_rise_and_all_is_saved(model, data, reward, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--max_steps", "12", "--batch_size", "16", "--lr", "3e-2", "--draw_steps", "5", "--draw_prompts", "1"]
    options += ["--eval_strategy", "steps", "--eval_steps", "6", "--eval_prompts", "4"]
    rl.main(tiny_rl(model, data, out, *options, rewards=(reward,)))
    rewards = of(out, "reward")
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.1
    assert len(of(out, "eval_ecg_reward")) == len(of(out, "eval_zeros_reward")) == 3  # before, amid, after
    assert of(out, "eval_ecg_reward")[-1] > of(out, "eval_ecg_reward")[0]
    names = {"rewards/vowels/mean", "rewards/vowels/std", "reward_std", "completions/mean_length", "skipped_groups"}
    assert any(names <= row.keys() for row in history(out))
    # answers are written before each second step, the first ones of each five are drawn
    assert {path.name for path in (out / "answers").iterdir()} == {f"step-{step:06d}.html" for step in (0, 6, 10)}
    page = (out / "answers" / "step-000000.html").read_text()
    assert "data:image/png;base64," in page
    assert "vowels" in page
    assert b"validation, zeros in its place" in (out / "rewards.svg").read_bytes()
    card = (out / "README.md").read_text()
    assert "TRL's `GRPOTrainer`" in card
    assert "`num_generations`" in card
    printed = capsys.readouterr().out
    assert "Of 4 prompts of the split validation the reward went with their ECG from 0." in printed
    elm, processor = load_elm(str(out))
    assert processor.train_phase == "rl"
    assert any(
        not torch.equal(*pair) for pair in zip(elm.parameters(), load_elm(str(model))[0].parameters(), strict=True)
    )


def test_groups_with_equal_rewards_teach_nothing(model, data, tmp_path):
    """No answer of a model that has learnt nothing has tags."""
    out = tmp_path / "run"
    rl.main(tiny_rl(model, data, out, "--max_steps", "2", "--num_iterations", "1", "--weight_decay", "0"))
    assert of(out, "loss") == [0, 0]
    assert of(out, "skipped_groups") == [2, 2]
    before, after = (load_elm(str(folder))[0].state_dict() for folder in (model, out))
    assert all(
        torch.equal(before[name], after[name]) for name in before if "running" not in name and "num_b" not in name
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--loss_type", "dapo"], ["--loss_type", "grpo", "--beta", "0.1", "--use_peft"]])
def test_the_same_command_twice_and_resumed(options, model, data, reward, tmp_path):
    """Step 3 is amid the updates by the answers that step 2 has written."""
    options = [
        *options,
        "--max_steps",
        "4",
        "--save_strategy",
        "steps",
        "--save_steps",
        "3",
        "--gradient_accumulation_steps",
        "2",
    ]
    options += ["--batch_size", "4"]
    argv = tiny_rl(model, data, tmp_path / "run", *options, rewards=(reward,))
    rl.main(argv)
    first = weights(tmp_path / "run")
    rewards, loss = of(tmp_path / "run", "reward"), of(tmp_path / "run", "loss")
    assert len(rewards) == 2
    assert (tmp_path / "run" / "checkpoint-3" / "answers_0.safetensors").is_file()
    rl.main(tiny_rl(model, data, tmp_path / "again", *options, rewards=(reward,)))
    assert of(tmp_path / "again", "reward") == rewards
    again = weights(tmp_path / "again")
    assert all(torch.equal(first[name], again[name]) for name in first)
    for path in (tmp_path / "run").glob("*.safetensors"):
        path.unlink()
    (tmp_path / "run" / "adapter_config.json").unlink(missing_ok=True)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    rl.main([*argv, "--resume_from_checkpoint", str(checkpoint)])
    assert of(tmp_path / "run", "loss") == pytest.approx(loss, abs=1e-6)
    resumed = weights(tmp_path / "run")
    assert all(torch.equal(first[name], resumed[name]) for name in first)
    (checkpoint / "answers_0.safetensors").unlink()
    (tmp_path / "run" / "adapter_config.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"it lacks answers_0.safetensors, the answers that were being trained on"):
        rl.main([*argv, "--resume_from_checkpoint", str(checkpoint)])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


# what cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--num_generations", "3"],
            "--num_generations 3 does not divide the 8 answers that are written at once: --per_device",
        ),
        (["--num_generations", "1"], "--num_generations is 1; expected at least 2"),
        (["--reward_weights", "1"], "--reward_weights has 1 numbers for the 3 of --rewards, format, tags, answer"),
        (
            ["--steps_per_generation", "2", "--generation_batch_size", "8"],
            "--generation_batch_size with --steps_per_generation",
        ),
        (
            ["--eval_strategy", "epoch", "--num_generations_eval", "3"],
            "--num_generations_eval 3 does not divide --per_device_eval",
        ),
        (["--use_vllm"], "--use_vllm cannot be used: vLLM does not read ECGs"),
        (["--streaming"], "--streaming cannot be used: rows are drawn by their number"),
        (
            ["--generation_kwargs", '{"num_beams": 2}'],
            "--generation_kwargs num_beams: the answers of a group are drawn one by one",
        ),
        (["--vespo_k_pos", "1"], "--vespo_k_pos changes nothing with --loss_type sapo; it is for vespo"),
        (["--epsilon", "0.1"], "--epsilon changes nothing with --loss_type sapo; it is for grpo, dr_grpo, dapo"),
        (["--use_bias_correction_kl", "false"], "--use_bias_correction_kl changes nothing without --beta"),
        (["--sync_ref_model"], "--sync_ref_model changes nothing without --beta"),
        (["--eval_prompts", "3"], "--eval_prompts changes nothing without --eval_strategy"),
        (["--include_num_input_tokens_seen", "true"], "--include_num_input_tokens_seen cannot be used"),
        (
            ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--metric_for_best_model", "accuracy"],
            "--metric_for_best_model is accuracy; expected reward, or one of --rewards, format, tags, answer",
        ),
        (["--generation_kwargs", '{"temperature": 0.1}'], "--generation_kwargs temperature: say it as --temperature"),
        (
            ["--generation_kwargs", '{"typical": 0.1}'],
            "--generation_kwargs typical: transformers' GenerationConfig has no",
        ),
        (["--generation_kwargs", '{"typical'], "--generation_kwargs is not JSON"),
        (
            ["--generation_kwargs", '{"bos_token_id": 1.5}'],
            "--generation_kwargs bos_token_id is 1.5; expected the number",
        ),
        (
            ["--max_completion_length", "3", "--generation_kwargs", '{"min_new_tokens": 4}'],
            "--generation_kwargs min_new_tokens is 4, above --max_completion_length 3: no answer could end",
        ),
        (["--chat_template_kwargs", "thinking"], "--chat_template_kwargs is not JSON"),
        (["--temperature", "0"], "--temperature is 0.0; expected a number above 0."),
        (["--top_p", "1.5"], "--top_p is 1.5; expected a number above 0 and at most 1."),
        (["--beta", "nan"], "--beta is nan; expected a number at least 0."),
        (["--max_completion_length", "0"], "--max_completion_length is 0; expected a number at least 1."),
        (["--reward_weights", "1", "nan", "1"], "--reward_weights are 1.0, nan, 1.0; expected finite numbers."),
        (["--draw_steps", "-1"], "--draw_steps is -1; expected at least 0"),
        (["--rewards", "anwser"], "--rewards anwser: there is no such reward. Did you mean answer?"),
    ],
)
def test_options_that_do_not_go(options, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        rl.parse([*tiny_rl(None, Path("d"), tmp_path / "out"), *options])
    assert list(tmp_path.iterdir()) == []


def test_the_best_model_is_that_of_most_reward(tmp_path):
    options = ["--eval_strategy", "steps", "--save_strategy", "steps", "--load_best_model_at_end"]
    for said, expected in (
        ([], "eval_ecg_reward"),
        (["--metric_for_best_model", "tags"], "eval_ecg_rewards/tags/mean"),
    ):
        training_args = rl.parse([*tiny_rl(None, Path("d"), tmp_path), *options, *said])[1]
        assert (training_args.metric_for_best_model, training_args.greater_is_better) == (expected, True)


def test_the_verdict_is_of_the_weights_that_are_saved():
    """Those of an earlier step, if it was the best, are evaluated again."""
    for best, loads_best, told in ((6, True, True), (3, True, False), (3, False, True)):
        state = SimpleNamespace(
            best_global_step=best,
            global_step=6,
            log_history=[{"step": step, "eval_ecg_reward": 0.5} for step in (3, 6)],
        )
        options: Any = SimpleNamespace(load_best_model_at_end=loads_best)
        assert rl._is_evaluated(SimpleNamespace(state=state), options) == told  # type: ignore[arg-type]


def test_evaluated_prompts_are_of_the_whole_split():
    rows = rl.numbers_of(Dataset.from_dict({"messages": [[]] * 10}), "ecg", 4)
    assert rows["row"][:] == [0, 2, 5, 7]
    assert rl.numbers_of(rows, None, None)["row"][:] == [0, 1, 2, 3]


def no_model(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the model is loaded")


def test_data_without_answers(model, tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "build", no_model)
    question = [{"role": "user", "content": "What is it?"}]
    Dataset.from_list([{"messages": question, "ecg": None}]).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(ValueError, match=r"Row 0 of the split 'train', counted from 0, has no answer"):
        rl.main(tiny_rl(model, tmp_path / "data", tmp_path / "out"))


def test_a_column_that_a_reward_would_not_get(model, reward, tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "build", no_model)
    chat = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "yes"}]
    rows = [{"messages": chat, "ecg": None, "solution": "theirs"}] * 8
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(ValueError, match=r"have the column solution, and --rewards .* gets something else .*rename"):
        rl.main(tiny_rl(model, tmp_path / "data", tmp_path / "out", rewards=(reward,)))
    with pytest.raises(AssertionError, match="the model is loaded"):  # rewards of the project read no such column
        rl.main(tiny_rl(model, tmp_path / "data", tmp_path / "out"))


def test_more_prompts_at_once_than_there_are(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "build", no_model)
    with pytest.raises(
        ValueError, match=r"The split 'train' has 12 rows, and answers to 16 prompts are written at once"
    ):
        rl.main(tiny_rl(model, data, tmp_path / "out", "--batch_size", "64"))


def test_a_model_that_was_never_fine_tuned(model, tmp_path, caplog):
    processor = load_elm(str(model))[1]
    for name, phase, told in (
        (None, None, True),
        (model, "pretrain", True),
        (model, "sft", False),
        (model, None, False),
    ):
        caplog.clear()
        args, _, model_args = rl.parse(tiny_rl(name, Path("d"), tmp_path))
        processor.train_phase = phase
        run.warn_of_base(args, model_args, processor)
        assert ("has never been fine-tuned, so that it hardly answers questions" in caplog.text) == told


def test_thinking_that_is_given(llm, reward, tmp_path):
    """It stands in the prompt, and in the answers that are rewarded, and is not looked for among the tags."""
    elm, processor = make_elm(llm)
    processor.explicit_thinking = True
    trainer = make_trainer(elm, processor, {"train": mixed_rows(1, 0)}, tmp_path / "out", "--rewards", "tags")
    prompt = trainer.prompts["train"][0]
    assert processor.tokenizer.decode(prompt.input_ids).endswith("<think>\n")
    trainer.reward_funcs[0].function = lambda completions, think_given, **kwargs: (
        seen.append((completions[0][0]["content"], think_given)) or [0.0 for _ in completions]
    )
    seen: list[Any] = []
    trainer._generate_and_score_completions([{"row": 0}] * 4 + [{"row": 1}] * 4)
    ((text, think_given),) = seen
    assert text.startswith("<think>\n")
    assert think_given


def test_a_prompt_without_room_for_an_answer(llm, tmp_path):
    elm, processor = make_elm(llm)
    trainer = make_trainer(
        elm, processor, {"train": mixed_rows(1)}, tmp_path / "out", "--max_completion_length", "1000"
    )
    with pytest.raises(ValueError, match=r"The prompt of the record 0 has \d+ tokens, and behind it there is no room"):
        trainer.prompts["train"].keep([0])


def test_a_reward_that_fails_while_training(model, data, tmp_path):
    (tmp_path / "mine.py").write_text("def mine(**kwargs):\n    return [float('nan') for _ in kwargs['completions']]\n")
    with pytest.raises(ValueError, match=r"The reward mine gives nan for the answer"):
        rl.main(tiny_rl(model, data, tmp_path / "out", rewards=(f"{tmp_path / 'mine.py'}:mine",)))


RUNS = "import json, sys\nfrom elm_ecg.training import rl\nfor argv in json.loads(sys.argv[1]):\n    rl.main(argv)"


@pytest.mark.slow
def test_two_processes_are_one(model, data, reward, tmp_path):
    """The answers, their rewards and the loss are those of one process with twice the batch, groups that are skipped among them."""
    options = ["--max_steps", "3", "--num_iterations", "1", "--adam_epsilon", "1e-3", "--eval_strategy", "steps"]
    options += ["--eval_steps", "3", "--eval_prompts", "4", "--per_device_eval_batch_size", "2"]

    def argv(number: str, kind: str, batch: int) -> list[str]:
        own = [*options, "--loss_type", kind, "--batch_size", str(batch)]
        return tiny_rl(model, data, tmp_path / f"{number}_{kind}", *own, rewards=(reward,))

    kinds = ("sapo", "dapo")
    processes = fork_two(RUNS, json.dumps([argv("two", kind, 6) for kind in kinds]))
    for kind in kinds:
        rl.main(argv("one", kind, 12))
    ended = [process.finish() for process in processes]
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr[-3000:]
    for kind in kinds:
        for name in ("reward", "loss", "skipped_groups", "eval_ecg_reward", "eval_zeros_reward", "grad_norm"):
            one, both = (of(tmp_path / f"{number}_{kind}", name) for number in ("one", "two"))
            assert both == pytest.approx(one, abs=1e-4), name
        assert sum(of(tmp_path / f"one_{kind}", "skipped_groups")) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--beta", "0.1", "--sync_ref_model", "--ref_model_sync_steps", "1", "--loss_type", "dapo"],
        ["--loss_type", "cispo", "--epsilon_high", "5", "--mask_truncated_completions", "--log_completions"],
        [
            "--steps_per_generation",
            "4",
            "--gradient_accumulation_steps",
            "2",
            "--batch_size",
            "4",
            "--pad_to_multiple_of",
            "8",
        ],
        [
            "--update",
            "connector",
            "llm",
            "--cache_features",
            "memory",
            "--cast_lm_head_to_fp32",
            "--delta",
            "2",
            "--loss_type",
            "grpo",
        ],
        [
            *("--use_peft", "--beta", "0.1", "--bf16", "--gradient_checkpointing", "true"),
            *("--repetition_penalty", "1.1", "--eval_strategy", "steps", "--eval_steps", "2", "--eval_prompts", "2"),
        ],
        ["--augment_ecg", "--lead_dropout", "0.1", "--missing_leads", "zeros", "--dataloader_num_workers", "1"],
        *(
            pytest.param(options, marks=pytest.mark.minutes)
            for options in [
                ["--loss_type", "vespo", "--top_entropy_quantile", "0.5", "--scale_rewards", "batch"],
                [
                    "--loss_type",
                    "luspo",
                    "--importance_sampling_level",
                    "sequence",
                    "--off_policy_mask_threshold",
                    "0.5",
                ],
                ["--loss_type", "dr_grpo", "--scale_rewards", "none", "--entropy_coef", "0.01", "--optim", "muon"],
                [
                    "--loss_type",
                    "bnpo",
                    "--use_adaptive_entropy",
                    "--multi_objective_aggregation",
                    "normalize_then_sum",
                ],
                [
                    "--generation_kwargs",
                    '{"typical_p": 0.9}',
                    "--min_p",
                    "0.01",
                    "--top_k",
                    "50",
                    "--disable_dropout",
                    "false",
                ],
            ]
        ),
    ],
)
def test_options_that_train(options, model, data, reward, tmp_path):
    """Three steps, of which the later ones go on with the answers of the first or write new ones."""
    options = [*options, "--max_steps", "3", "--reward_weights", "1", "-0.5"]
    rl.main(tiny_rl(model, data, tmp_path / "run", *options, rewards=(reward, "length")))
    assert all(math.isfinite(loss) for loss in of(tmp_path / "run", "loss"))
    load_elm(str(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("command", [rl, sft])
def test_an_adapter_on_an_adapter(command, llm, data, reward, tmp_path, monkeypatch):
    """What is saved is what was trained, with what the first adapter had learnt."""
    first, second = tmp_path / "first", tmp_path / "second"
    sft.main(tiny_sft(llm, data, first, "--max_steps", "4", "--use_peft"))
    trained: list[Any] = []
    init = command.make_trainer
    monkeypatch.setattr(command, "make_trainer", lambda *args: trained.append(init(*args)) or trained[-1])
    options = ["--max_steps", "4", "--use_peft"]
    if command is rl:
        rl.main(tiny_rl(first, data, second, *options, rewards=(reward,)))
    else:
        sft.main(tiny_sft(llm, data, second, *options, "--model_name_or_path", str(first)))
    ids = torch.arange(20)[None]
    shutil.rmtree(first)
    shutil.move(second, tmp_path / "moved")
    with torch.no_grad():
        expected, found = (
            model.eval()(input_ids=ids).logits for model in (trained[0].model, load_elm(str(tmp_path / "moved"))[0])
        )
    assert torch.allclose(found, expected, atol=1e-5)
