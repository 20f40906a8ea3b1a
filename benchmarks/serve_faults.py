"""What clients of `elm serve` see while its engine, and then the server itself, are ended under load: `kill -9`, and SIGTERM.

    elm quickstart
    python benchmarks/serve_faults.py runs/quickstart/model
    python benchmarks/serve_faults.py runs/quickstart/model --engine transformers

The engine is the stand-in for vLLM of the tests. The model is a copy of a Llama-like ELM that says nearly any word, so that its answers
are long. Each client asks one question after the other, every second client streamed. A line tells of each phase what they saw, and of
what they must not see: anything but whole answers and 429 while all is up; anything but 503 with Retry-After, and streams that end
with an error, while the engine is down; ever, a half answer that looks like a whole one.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import torch

sys.path.append(sys.path.pop(0))  # this folder has a benchmark named as the package `ecg_byte`
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from elm_ecg.training.load import load_elm
from helpers import ROOT, free_port

ELM = ("-c", "import sys\nfrom elm_ecg.training import cli\nsys.exit(cli.main(sys.argv[1:]))")
WHOLE, BUSY = "whole answer", "429 with Retry-After"
DOWN, CUT = "503 with Retry-After", "stream ended by an error"
GONE = "connection lost"
UP_S = 120  # in which a process must answer


class Clients:
    """Threads that ask until they are told to stop, and what they see."""

    def __init__(self, url: str, number: int) -> None:
        self.url, self.seen, self.stopped = url, Counter[str](), threading.Event()
        self.threads = [threading.Thread(target=self._ask_on, args=(index % 2 == 0,)) for index in range(number)]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def watch(self, seconds: float) -> Counter[str]:
        """What is seen in this time."""
        self.take()
        time.sleep(seconds)
        return self.take()

    def take(self) -> Counter[str]:
        """What was seen since it was last taken."""
        seen, self.seen = self.seen, Counter()
        return seen

    def _ask_on(self, stream: bool) -> None:
        messages = [{"role": "user", "content": "Write a long story."}]
        body = {"model": "model", "messages": messages, "max_tokens": 200, "temperature": 1.5, "stream": stream}
        with httpx2.Client(timeout=UP_S) as client:
            while not self.stopped.is_set():
                try:
                    what = self._ask(client, body)
                except httpx2.TransportError:
                    what = GONE
                self.seen[what] += 1
                if what != WHOLE:
                    time.sleep(0.1)

    def _ask(self, client: httpx2.Client, body: dict[str, Any]) -> str:
        with client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
            lines = [line for line in response.read().decode().split("\n") if line]
        if response.status_code in (429, 503) and "retry-after" in response.headers:
            return BUSY if response.status_code == 429 else DOWN
        if response.status_code != 200:
            return f"{response.status_code} {' '.join(lines)[:200]}"
        if not body["stream"]:
            return WHOLE if json.loads(lines[-1])["choices"][0]["finish_reason"] else "half an answer with status 200"
        if lines and lines[-1] == "data: [DONE]":
            return WHOLE
        return CUT if lines and "error" in json.loads(lines[-1].removeprefix("data: ")) else "a stream without an end"


class Trial:
    """The processes, and the phases that have gone wrong."""

    def __init__(self, model: str, engine: str, folder: Path) -> None:
        self.model, self.folder, self.port, self.engine_port = model, folder, free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.options = []
        if engine == "vllm":
            self.options = ["--engine", "vllm", "--engine_url", f"http://127.0.0.1:{self.engine_port}"]
        self.faults = 0
        self.processes: list[subprocess.Popen] = []

    def start(self, *command: str) -> subprocess.Popen:
        log = (self.folder / "log").open("ab")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=environment)
        self.processes.append(process)
        return process

    def start_server(self) -> subprocess.Popen:
        return self.start(*ELM, "serve", self.model, "--port", self.port, *self.options)

    def start_engine(self) -> subprocess.Popen:
        return self.start(str(ROOT / "tests" / "standin_vllm.py"), str(self.folder / "llm"), "--port", self.engine_port)

    def wait_until_up(self) -> float:
        """Seconds until the server says that it and its engine answer."""
        begun = time.monotonic()
        while time.monotonic() < begun + UP_S:
            try:
                if httpx2.get(f"{self.url}/health").status_code == 200:
                    return time.monotonic() - begun
            except httpx2.TransportError:
                pass
            time.sleep(0.1)
        sys.exit(f"not up in {UP_S} s:\n{(self.folder / 'log').read_text()[-2000:]}")

    def tell(self, phase: str, seen: Counter[str], allowed: set[str], wanted: set[str]) -> None:
        wrong = {what: count for what, count in seen.items() if what not in allowed} | {
            what: 0 for what in wanted if not seen[what]
        }
        self.faults += bool(wrong)
        print(f"{phase}: {dict(seen)}{f'  WRONG: {wrong}' if wrong else ''}", flush=True)

    def run(self, clients: Clients, server: subprocess.Popen, engine: subprocess.Popen | None, seconds: float) -> None:
        up = {WHOLE, BUSY}
        self.tell("all is up", clients.watch(seconds), up, {WHOLE})
        if engine is not None:
            seen = self.during(clients, seconds, lambda: kill(engine))
            self.tell("engine killed", seen, {*up, DOWN, CUT}, {DOWN, CUT})
            self.tell("engine down", clients.watch(seconds), {DOWN}, {DOWN})
            self.start_engine()
            print(f"engine started anew: answers after {self.wait_until_up():.1f} s", flush=True)
            self.tell("engine back", clients.watch(seconds), {*up, DOWN}, {WHOLE})
        seen = self.during(clients, seconds, lambda: kill(server))
        self.tell("server killed", seen, {*up, GONE}, {GONE})
        server = self.start_server()
        print(f"server started anew: answers after {self.wait_until_up():.1f} s", flush=True)
        self.tell("server back", clients.watch(seconds), up, {WHOLE})
        seen = self.during(clients, seconds, server.terminate)
        self.tell("SIGTERM", seen, {*up, DOWN, GONE}, {WHOLE})
        status = server.wait(UP_S)
        self.faults += status != 0
        print(f"SIGTERM: the server ended with status {status}", flush=True)

    @staticmethod
    def during(clients: Clients, seconds: float, act: Callable[[], None]) -> Counter[str]:
        """What is seen around an act."""
        clients.take()
        act()
        return clients.take() + clients.watch(seconds)


def save_talkative(model: str, folder: Path) -> str:
    """A copy whose next words are nearly as likely as each other."""
    elm, processor = load_elm(model)
    with torch.no_grad():
        elm.model.language_model.norm.weight.mul_(0.1)
    elm.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def main() -> None:
    """Prints a line for each phase; ends with status 1 where clients saw what they must not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="saved ELM")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm", help="default: %(default)s")
    parser.add_argument("--clients", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=10, help="of each phase; default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(save_talkative(args.model, Path(folder) / "model"), args.engine, Path(folder))
        engine = None
        if args.engine == "vllm":
            export = ("export", trial.model, "--part", "llm", "--output_dir", f"{folder}/llm")
            subprocess.run([sys.executable, *ELM, *export], check=True, capture_output=True)
            engine = trial.start_engine()
        server = trial.start_server()
        trial.wait_until_up()
        clients = Clients(trial.url, args.clients)
        try:
            trial.run(clients, server, engine, args.seconds)
        finally:
            clients.stop()
            for process in trial.processes:
                process.kill()
    print(f"{trial.faults} phases in which clients saw what they must not")
    sys.exit(trial.faults > 0)


if __name__ == "__main__":
    main()
