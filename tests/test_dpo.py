import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from elm_ecg.training import dpo
from elm_ecg.training.build import new_elm
from elm_ecg.training.data.synthetic import make_record
from elm_ecg.training.dpo_trainer import ELMDPOTrainer, PairsCollator, check_pairs
from elm_ecg.training.load import load_elm
from elm_ecg.training.resume import RunOptions
from helpers import TINY_ENCODERS


def pairs(number: int, earlier: bool = False) -> Dataset:
    """Rows of no, one and two ECGs in turn; `earlier`: behind another question and answer."""
    rows = []
    for index in range(number):
        records = [make_record(10 * index + i, 0, sampling_rate=100, seconds=5.0)["ecg"] for i in range(index % 3)]
        for record in records:
            record["array"] = record["array"].tolist()
        turns = [{"role": "user", "content": f"Row {index}: what is it?"}]
        if earlier:
            turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}, *turns]
        answers = {"chosen": "normal", "rejected": "this is not normal"}
        rows.append({"messages": turns, "ecg": records, "record_id": str(index), "patient_id": str(index), **answers})
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def model(llm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elm") / "elm"
    for part in make_elm(llm):
        part.save_pretrained(folder)
    return folder


def make_elm(llm: Path) -> Any:
    torch.manual_seed(0)
    encoder = {"encoder": "merl", "encoder_config": TINY_ENCODERS["merl"], "num_ecg_tokens": 4}
    return new_elm(str(llm), sampling_rate=100, num_samples=500, **encoder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "pairs"
    DatasetDict({"train": pairs(12), "validation": pairs(4)}).save_to_disk(folder)
    return folder


def tiny_dpo(model: Path | None, data: Path, output_dir: Path, *options: str) -> list[str]:
    args = ["--data", str(data), "--output_dir", str(output_dir), "--use_cpu", "--report_to", "none"]
    args += [] if model is None else ["--model_name_or_path", str(model)]
    args += ["--gradient_checkpointing", "false", "--batch_size", "4", "--lr", "1e-3", "--logging_steps", "1"]
    return [*args, "--save_strategy", "no", "--disable_tqdm", "true", *options]


def history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_loss_is_that_of_the_paper(llm, tmp_path):
    """-log sigmoid(beta ((chosen - rejected) - (chosen - rejected of the model at the start))), of the answers' tokens alone."""
    elm, processor = make_elm(llm)
    args, training_args, model_args = dpo.parse(tiny_dpo(None, Path("d"), tmp_path, "--beta", "0.5", "--update", "llm"))
    options = RunOptions.of(args, training_args, model_args)
    rows = pairs(3, earlier=True)
    splits = {"train": rows, "validation": None}
    trainer: ELMDPOTrainer = dpo.make_trainer(args, training_args, model_args, elm, processor, splits, options)
    with torch.no_grad():
        for parameter in trainer.model.lm_head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    batch = trainer.data_collator([rows[index] for index in range(3)])
    assert batch["input_ids"].shape[0] == 6
    assert len(batch["ecg_values"]) == 6  # three, for each of the two answers
    assert torch.equal(batch["ecg_values"][:3], batch["ecg_values"][3:])
    texts = [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert texts == ["normal<|eot_id|>"] * 3 + ["this is not normal<|eot_id|>"] * 3
    ecgs = {"ecg_values": batch["ecg_values"], "attention_mask": batch["attention_mask"]}

    def logps(one: Any) -> torch.Tensor:
        """Summed over the tokens of each answer, [6]."""
        with torch.no_grad():
            scores = one.eval()(input_ids=batch["input_ids"], **ecgs).logits.log_softmax(-1)
        of_tokens = scores[:, :-1].gather(2, batch["input_ids"][:, 1:, None].clamp(max=259))[..., 0]  # ids of ECGs
        return (of_tokens * batch["completion_mask"][:, 1:]).sum(1)

    new, old = (one[:3] - one[3:] for one in (logps(trainer.model), logps(trainer.ref_model)))
    expected = -torch.nn.functional.logsigmoid(0.5 * (new - old)).mean()
    assert float(trainer.compute_loss(trainer.model, batch)) == pytest.approx(float(expected), rel=1e-4)
    assert not torch.allclose(new, old)


def test_the_better_answer_becomes_more_likely(model, data, tmp_path):
    out = tmp_path / "run"
    dpo.main(tiny_dpo(model, data, out, "--max_steps", "8", "--eval_strategy", "steps", "--eval_steps", "8"))
    losses = [row["loss"] for row in history(out) if "loss" in row]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-3)  # the model is still what it was at the start
    assert losses[-1] < losses[0] - 0.1
    (evaluated,) = (row for row in history(out) if "eval_loss" in row)
    assert evaluated["eval_rewards/accuracies"] == 1
    assert evaluated["eval_rewards/margins"] > 0
    assert "TRL's `DPOTrainer`" in (out / "README.md").read_text()
    assert (out / "training.svg").is_file()
    assert load_elm(str(out))[1].train_phase == "dpo"


def test_a_trained_encoder_begins_as_the_model_it_is_compared_with(model, data, tmp_path):
    """Its batch norm has the statistics of the model, not those of a batch."""
    dpo.main(tiny_dpo(model, data, tmp_path / "run", "--max_steps", "1", "--update", "encoder", "connector", "llm"))
    (loss,) = (row["loss"] for row in history(tmp_path / "run") if "loss" in row)
    assert loss == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.slow
def test_an_adapter_resumed(model, data, tmp_path):
    options = ["--use_peft", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--augment_ecg"]
    argv = tiny_dpo(model, data, tmp_path / "run", *options)
    dpo.main(argv)
    before = [row["loss"] for row in history(tmp_path / "run") if "loss" in row]
    assert not (tmp_path / "run" / "ref").exists()
    dpo.main([*argv, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")])
    assert [row["loss"] for row in history(tmp_path / "run") if "loss" in row] == pytest.approx(before, abs=1e-6)
    load_elm(str(tmp_path / "run"))


def test_random_changes_are_alike_for_both_answers(llm):
    elm, processor = make_elm(llm)
    collator = PairsCollator(dpo.ELMCollator(processor, augment_ecg=True, gain_jitter=0.5))
    rows = [pairs(3)[index] for index in (1, 2)]
    ecgs = collator(rows)["ecg_values"]
    assert torch.equal(ecgs[:3], ecgs[3:])
    assert not torch.equal(ecgs, collator.for_evaluation()(rows)["ecg_values"])
    assert elm is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": ""}, "chosen is '', no text"),
        ({"rejected": "normal"}, "chosen and rejected are both 'normal'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages do not end with a turn of role user"),
    ],
)
def test_rows_that_are_no_pairs(change, message):
    rows = pairs(3).to_list()
    rows[1] |= change
    with pytest.raises(ValueError, match=re.escape(f"Row 1 of the split 'train', counted from 0: {message}")):
        check_pairs(Dataset.from_list(rows), "train")


def test_answers_without_the_thinking_of_the_model(llm):
    """The option that made it think is of `elm sft` alone."""
    processor = make_elm(llm)[1]
    processor.explicit_thinking = True
    said = "the data, or train it without `elm sft --explicit_thinking`."
    with pytest.raises(ValueError, match=rf"The answer 'normal' does not begin with <think>.* {re.escape(said)}"):
        PairsCollator(dpo.ELMCollator(processor))(pairs(1).to_list())


def test_data_without_pairs(model, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "build", None)
    DatasetDict({"train": pairs(2).remove_columns(["rejected"])}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=r"The split 'train' has no column rejected, but messages, ecg"):
        dpo.main(tiny_dpo(model, tmp_path / "data", tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--precompute_ref_log_probs"],
            "--precompute_ref_log_probs cannot be used: ECGs are prepared as they are read",
        ),
        (["--padding_free"], "--padding_free cannot be used"),
        (["--streaming"], "--streaming cannot be used"),
        (["--sync_ref_model", "--use_peft"], "--sync_ref_model with --use_peft"),
        (["--beta", "0"], "--beta is 0.0; expected a number above 0."),
        (["--label_smoothing", "0.7"], "--label_smoothing is 0.7; expected a number at least 0 and below 0.5."),
        (["--eval_strategy", "epoch", "--metric_for_best_model", "f1"], "--metric_for_best_model is f1; an evaluation"),
        (["--ref_model_sync_steps", "3"], "--ref_model_sync_steps changes nothing without --sync_ref_model"),
    ],
)
def test_options_that_do_not_go(options, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        dpo.parse([*tiny_dpo(None, Path("d"), tmp_path / "out"), *options])
