"""What is left of a command that is killed, or whose disk is full: `kill -9` at random moments, and disks of several sizes.

    python benchmarks/kills.py sft
    python benchmarks/kills.py push --moments 10 --disks 0 --seed 1

Each trial begins with the same files. After it, those must be as they were, or all as the undisturbed command leaves them; then
the same command must end right (of `sft` with `--resume_from_checkpoint last` where there is a checkpoint), with the same weights,
answers, rows or commit. A full disk is a tmpfs with too little room (as root on Linux; else files may not exceed a size), and the
command must end with one line that says so and names a path.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

sys.path.append(sys.path.pop(0))  # this folder has a benchmark named as the package `ecg_byte`
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import pyarrow.parquet as pq

from elm_ecg.training.data.schema import WORK
from elm_ecg.training.data.synthetic import make_record
from elm_ecg.training.resume import fault_of
from forks import Fork
from helpers import ROOT, save_tiny_data, save_tiny_llm, tiny_sft
from loopback_hub import LoopbackHub

# the command in a fresh process, which says when it is imported
CODE = """
import importlib, pathlib, sys
from elm_ecg.training import cli
started, command, *argv = sys.argv[1:]
importlib.import_module(f"elm_ecg.training.{cli.COMMANDS[command][0]}")
pathlib.Path(started).touch()
sys.exit(cli.main([command, *argv]))
"""
# with a disk of its own, which no other process sees: a tmpfs at sys.argv[1] of sys.argv[2] bytes, filled from sys.argv[3]
FULL = """
import ctypes, pathlib, resource, shutil, sys
from elm_ecg.training import cli
disk, size, filled, result, *argv = sys.argv[1:]
libc = ctypes.CDLL(None)
private = hasattr(libc, "unshare") and libc.unshare(0x00020000) == 0 and libc.mount(b"none", b"/", None, 0x44000, None) == 0
if private and libc.mount(b"tmpfs", disk.encode(), b"tmpfs", 0, f"size={size}".encode()) == 0:
    shutil.copytree(filled, disk, dirs_exist_ok=True)
else:
    shutil.copytree(filled, disk, dirs_exist_ok=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size) // 4, resource.RLIM_INFINITY))
status = cli.main(argv)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
shutil.copytree(disk, result)
sys.exit(status)
"""


class Command:
    """One command, its input below `work`, and what it makes of a folder."""

    name: str
    offline = True

    def __init__(self, work: Path):
        self.work = work

    def prepare(self, folder: Path) -> None:
        """Writes what is in the folder before."""

    def argv(self, folder: Path) -> list[str]:
        """Of the command that works in this folder."""
        raise NotImplementedError

    def result(self, folder: Path) -> Any:
        """What has to be the same whatever happened, or None where the command has not ended."""
        raise NotImplementedError

    def faults(self, folder: Path) -> list[str]:
        """What a killed command must not leave behind."""
        return []


class Sft(Command):
    """Six steps with a checkpoint after each, into the folder of an older model."""

    name = "sft"

    def __init__(self, work: Path):
        super().__init__(work)
        self.llm, self.data = save_tiny_llm(work / "llm"), save_tiny_data(work / "data", train=24)

    def prepare(self, folder: Path) -> None:
        """An older model."""
        argv = tiny_sft(self.llm, self.data, folder / "out", "--max_steps", "1", "--seed", "1")
        check(run(self, ["sft", *argv], folder / "started"))

    def argv(self, folder: Path) -> list[str]:
        """With the way to go on."""
        out = folder / "out"
        argv = [
            "sft",
            *tiny_sft(self.llm, self.data, out, "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "1"),
        ]
        return [*argv, *(["--resume_from_checkpoint", "last"] if list(out.glob("checkpoint-*")) else [])]

    def result(self, folder: Path) -> Any:
        """Weights and losses."""
        out = folder / "out"
        if not all((out / name).is_file() for name in ("config.json", "model.safetensors", "trainer_state.json")):
            return None
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        return digest(out / "model.safetensors"), [row["loss"] for row in history if "loss" in row]

    def faults(self, folder: Path) -> list[str]:
        """Checkpoints that are not whole."""
        return [f"{path.name}: {fault}" for path in (folder / "out").glob("checkpoint-*") if (fault := fault_of(path))]


class Evaluate(Command):
    """Answers and scores of a model, into its folder."""

    name = "evaluate"

    def __init__(self, work: Path):
        super().__init__(work)
        self.llm, self.data = save_tiny_llm(work / "llm"), save_tiny_data(work / "data", train=8, test=24)

    def prepare(self, folder: Path) -> None:
        """A model."""
        check(
            run(self, ["sft", *tiny_sft(self.llm, self.data, folder / "out", "--max_steps", "2")], folder / "started")
        )

    def argv(self, folder: Path) -> list[str]:
        """Many small batches, so that there is something to interrupt."""
        return ["evaluate", str(folder / "out"), "--data", str(self.data), "--batch_size", "2", "--max_new_tokens", "8"]

    def result(self, folder: Path) -> Any:
        """Predictions and scores, wherever they are."""
        found = sorted((folder / "out").rglob("evaluation_results.json"))
        if not found or not (predictions := sorted((folder / "out").rglob("predictions.jsonl"))):
            return None
        scores = [json.loads(path.read_text())["conditions"] for path in found]
        return [digest(path) for path in predictions], scores


class DataBuild(Command):
    """A dataset of 48 CSV files."""

    name = "data build"

    def __init__(self, work: Path):
        super().__init__(work)
        (work / "records").mkdir()
        questions = []
        for index in range(48):
            ecg = make_record(index, 0, sampling_rate=100, seconds=5.0)["ecg"]
            lines = [
                ",".join(ecg["lead_names"]),
                *(",".join(f"{v / 1000:.3f}" for v in row) for row in np.asarray(ecg["array"]).T),
            ]
            (work / "records" / f"{index:02}.csv").write_text("\n".join(lines) + "\n")
            questions.append({"record": f"{index:02}.csv", "patient_id": index, "question": "Is it?", "answer": "yes"})
        with (work / "questions.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, questions[0].keys())
            writer.writeheader()
            writer.writerows(questions)

    def argv(self, folder: Path) -> list[str]:
        """Of a new folder; one that is whole is not built again."""
        argv = ["data", "build", str(self.work / "records"), "--questions", str(self.work / "questions.csv")]
        return [*argv, "--sampling_rate", "100", "--unit", "mV", "--output_dir", str(folder / "out")]

    def result(self, folder: Path) -> Any:
        """The rows of each split."""
        if not (folder / "out").is_dir() or (folder / "out" / WORK).is_dir():
            return None
        rows = {path.name: pq.read_table(path).to_pylist() for path in sorted((folder / "out").rglob("*.parquet"))}
        return hashlib.sha256(repr(rows).encode()).hexdigest(), (folder / "out" / "README.md").is_file()


class TokenizerTrain(Command):
    """200 merges of 24 records."""

    name = "tokenizer train"

    def __init__(self, work: Path):
        super().__init__(work)
        self.data = save_tiny_data(work / "data", train=24)

    def argv(self, folder: Path) -> list[str]:
        """Of a new folder."""
        argv = ["tokenizer", "train", "--data", str(self.data), "--sampling_rate", "100", "--num_merges", "200"]
        return [*argv, "--output_dir", str(folder / "out")]

    def result(self, folder: Path) -> Any:
        """The merges, and whether there is a card."""
        path = folder / "out" / "ecg_byte.json"
        return (digest(path), (folder / "out" / "README.md").is_file()) if path.is_file() else None


class Push(Command):
    """A model onto a Hub within this process, where an older one is."""

    name = "push"
    offline = False

    def __init__(self, work: Path):
        super().__init__(work)
        self.llm, self.data = save_tiny_llm(work / "llm"), save_tiny_data(work / "data", train=8)
        self.hub = LoopbackHub().__enter__()
        self.repos: dict[str, Any] = {}

    def prepare(self, folder: Path) -> None:
        """The newer model; and the older one on the Hub."""
        for seed in ("1", "2"):
            argv = tiny_sft(self.llm, self.data, folder / "out", "--max_steps", "1", "--seed", seed)
            check(run(self, ["sft", *argv], folder / "started"))
            if seed == "1":
                check(run(self, self.argv(folder), folder / "started"))
        self.repos = deepcopy(self.hub.repos)

    def argv(self, folder: Path) -> list[str]:
        """With a licence, which a push asks for."""
        return ["push", str(folder / "out"), "--repo_id", "user/model", "--license", "mit"]

    def begin(self) -> None:
        """The Hub as it was before."""
        self.hub.repos = deepcopy(self.repos)

    def result(self, folder: Path) -> Any:
        """What is in the repository; None while it is the older model."""
        files = self.hub.repos["models/user/model"]["main"]
        return None if files == self.repos["models/user/model"]["main"] else dict(sorted(files.items()))


COMMANDS: dict[str, type[Command]] = {one.name: one for one in (Sft, Evaluate, DataBuild, TokenizerTrain, Push)}


def digest(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files of a folder, by their paths in it."""
    return {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def fork(command: Command, code: str, *arguments: str) -> Fork:
    """A fresh process that knows no Hub but that of `push`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(command.work / "hf_home")}
    environment |= (
        {"HF_HUB_OFFLINE": "1"}
        if command.offline
        else {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": command.hub.url,  # type: ignore[attr-defined]
            "HF_TOKEN": "any",
            "HF_HUB_DISABLE_XET": "1",
        }
    )
    return Fork(code, *arguments, cwd=ROOT, environment=environment, project=True)


def run(command: Command, argv: list[str], started: Path, seconds: float | None = None) -> tuple[int, str, float]:
    """Exit status, stderr and wall time of the work after the imports; killed after `seconds` of it, where given."""
    started.unlink(missing_ok=True)
    process = fork(command, CODE, str(started), *argv)
    while not started.exists():
        time.sleep(0.002)
        if (
            os.path.exists(f"/proc/{process.pid}/stat")
            and Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "Z"
        ):
            break  # it failed before
    begun = time.monotonic()
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)  # of one that has ended already, its zombie
    ended = process.finish()
    return ended.returncode, ended.stderr, time.monotonic() - begun


def check(ended: tuple[int, str, float]) -> None:
    """Stops the benchmark where a command that nothing disturbs fails."""
    if ended[0]:
        raise SystemExit(f"a command that nothing disturbed ended with {ended[0]}:\n{ended[1][-3000:]}")


def judge(command: Command, folder: Path, before: dict[str, str], expected: Any) -> list[str]:
    """What is wrong in the folder of a command that was disturbed."""
    result, now = command.result(folder), contents(folder)
    changed = [name for name in before if now.get(name) != before[name]]
    faults = command.faults(folder)
    if changed and result != expected:
        faults.append(f"neither old nor new: {', '.join(changed[:5])}")
    return faults


def again(command: Command, folder: Path, expected: Any) -> list[str]:
    """What is wrong after the same command once more."""
    if isinstance(command, DataBuild | TokenizerTrain) and command.result(folder) is not None:
        return [] if command.result(folder) == expected else ["what is there is not whole"]
    status, error, _ = run(command, command.argv(folder), folder / "started")
    if status:
        return [f"the same command ended with {status}: {error.strip().splitlines()[-1:]}"]
    return [] if command.result(folder) == expected else ["the same command gave another result"]


def kills(
    command: Command, template: Path, expected: Any, wall: float, moments: int, rng: random.Random
) -> Counter[str]:
    """Kills the command at random moments of its work, one in each of as many equal parts of it."""
    counts: Counter[str] = Counter()
    for number in range(moments):
        folder = Path(shutil.copytree(template, command.work / "trial"))
        if isinstance(command, Push):
            command.begin()
        before = contents(folder)
        seconds = wall * (number + rng.random()) / moments
        status, _, _ = run(command, command.argv(folder), folder / "started", seconds)
        done = command.result(folder) == expected
        faults = judge(command, folder, before, expected)
        counts["ended before the kill" if status == 0 else "killed, and all was done" if done else "killed"] += 1
        faults += again(command, folder, expected)
        counts["FAULTS"] += len(faults)
        for fault in faults:
            print(f"  killed after {seconds:.2f} s: {fault}", flush=True)
        shutil.rmtree(folder)
    return counts


def disks(
    command: Command, template: Path, final: Path, expected: Any, number: int, rng: random.Random
) -> Counter[str]:
    """Runs the command on disks with too little room, from none to what it needs."""
    counts: Counter[str] = Counter()
    held, needed = (sum(path.stat().st_size for path in folder.rglob("*")) for folder in (template, final))
    for place in range(number):
        disk, result = command.work / "trial", command.work / "result"
        disk.mkdir()
        if isinstance(command, Push):
            command.begin()
        room = int(max(needed - held, 1) * (place + rng.random()) / number)
        size = held + 4096 * sum(1 for _ in template.rglob("*")) + room
        ended = fork(command, FULL, str(disk), str(size), str(template), str(result), *command.argv(disk)).finish()
        lines = [line for line in ended.stderr.splitlines() if line.startswith("elm ")]
        counts["enough room" if ended.returncode == 0 else "full"] += 1
        faults = (
            judge(command, result, contents(template), expected)
            if result.is_dir()
            else [f"no result: {ended.stderr[-500:]}"]
        )
        if ended.returncode:
            told = any(text in "".join(lines) for text in ("No space left on device: /", "File too large: /"))
            if len(lines) != 1 or not told or "Traceback" in ended.stderr:
                faults.append(f"not told in one line: {lines or ended.stderr.strip().splitlines()[-3:]}")
        if result.is_dir():  # where there is room again
            shutil.rmtree(disk)
            result.rename(disk)
            faults += again(command, disk, expected)
        counts["FAULTS"] += len(faults)
        for fault in faults:
            print(f"  disk with {room:,} bytes of room: {fault}", flush=True)
        shutil.rmtree(disk, ignore_errors=True)
        shutil.rmtree(result, ignore_errors=True)
    return counts


def main() -> None:
    """Runs the trials, and ends with status 1 where there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="+", metavar="COMMAND", help=f"of `elm`: {', '.join(COMMANDS)}")
    parser.add_argument("--moments", type=int, default=30, help="at which it is killed; default: %(default)s")
    parser.add_argument("--disks", type=int, default=8, help="that are too small; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and sizes; default: %(default)s")
    args = parser.parse_args()
    args.command = " ".join(args.command)  # `data build` are two words
    if args.command not in COMMANDS:
        parser.error(f"there is no trial of {args.command}; expected one of {', '.join(COMMANDS)}")
    rng = random.Random(args.seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        command = COMMANDS[args.command](work)
        template = work / "template"
        template.mkdir()
        command.prepare(template)
        final = Path(shutil.copytree(template, work / "trial"))
        ended = run(command, command.argv(final), final / "started")
        check(ended)
        expected = command.result(final)
        final = final.rename(work / "final")
        print(f"{args.command}: {ended[2]:.1f} s of work, undisturbed", flush=True)
        if args.moments:
            counts = kills(command, template, expected, ended[2], args.moments, rng)
            print(f"kill -9: {dict(counts)}", flush=True)
        if args.disks:
            of_disks = disks(command, template, final, expected, args.disks, rng)
            print(f"full disk: {dict(of_disks)}", flush=True)
            counts += of_disks
    raise SystemExit(1 if counts["FAULTS"] else 0)


if __name__ == "__main__":
    main()
