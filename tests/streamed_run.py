"""`elm sft` that notes which records each of its training steps sees: python tests/streamed_run.py NOTES ARGUMENT ..."""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from elm_ecg.training import sft
from elm_ecg.training.collator import ELMCollator


def run(notes: Path, argv: list[str]) -> list[list[str]]:
    """The record ids of every training step of this process; also written to `notes`.RANK.json."""
    ids: dict[bytes, list[str]] = {}
    steps: list[list[str]] = []
    collate, step = ELMCollator.__call__, sft.ELMTrainer.training_step

    def noted_collate(self: ELMCollator, rows: list[dict[str, Any]]) -> Any:
        batch = collate(self, rows)
        ids[batch["ecg_values"].numpy().tobytes()] = [row["record_id"] for row in rows]
        return batch

    def noted_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(ids[inputs["ecg_values"].numpy().tobytes()])
        return step(self, model, inputs, *args, **kwargs)

    ELMCollator.__call__, sft.ELMTrainer.training_step = noted_collate, noted_step  # type: ignore[method-assign]
    try:
        sft.main(argv)
    finally:
        ELMCollator.__call__, sft.ELMTrainer.training_step = collate, step  # type: ignore[method-assign]
    notes.with_suffix(f".{os.environ.get('RANK', 0)}.json").write_text(json.dumps(steps))
    return steps


def stop_and_resume(folder: Path, argv: list[str], stop: int, end: int) -> tuple[list[list[str]], list[list[str]]]:
    """The steps after `stop` of a run up to `end`, and those of one that is stopped there and resumed."""
    whole = run(folder / "whole", [*argv, "--max_steps", str(end), "--output_dir", str(folder / "runs" / "whole")])
    parts = [
        *argv,
        "--output_dir",
        str(folder / "runs" / "parts"),
        "--save_strategy",
        "steps",
        "--save_steps",
        str(stop),
    ]
    sft.CountEpochs.on_step_end = lambda self, args, state, control, **_: setattr(  # type: ignore[attr-defined]
        control, "should_training_stop", state.global_step == stop or state.global_step == end
    )
    try:
        run(folder / "begun", [*parts, "--max_steps", str(end)])
    finally:
        del sft.CountEpochs.on_step_end  # type: ignore[attr-defined]
    resumed = run(folder / "resumed", [*parts, "--max_steps", str(end), "--resume_from_checkpoint", "last"])
    return whole[stop:], resumed


if __name__ == "__main__":
    stop_and_resume(Path(sys.argv[1]), sys.argv[4:], int(sys.argv[2]), int(sys.argv[3]))
