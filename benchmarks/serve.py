"""How many chats a second `elm serve` answers: one client, then many, on records of a dataset.

    elm serve runs/quickstart/model --port 8000
    python benchmarks/serve.py --url http://127.0.0.1:8000/v1 --data runs/quickstart/data --clients 50 --seconds 300

One client asks for half a minute at most, as nothing grows with it. A client asks one question after the other. A 429 is counted, and asked again after `Retry-After`; anything else but 200 is an error.
Memory is that of the server, before the clients come and after they have gone.

The same with the language model in the stand-in for vLLM of the tests:

    elm export runs/quickstart/model --part llm --output_dir runs/quickstart/served_llm
    python tests/standin_vllm.py runs/quickstart/served_llm --port 8001
    elm serve runs/quickstart/model --port 8000 --engine vllm --engine_url http://127.0.0.1:8001

With `--damaged 2000` so many recordings of all formats are damaged, and sent one after the other: each is answered, or refused with 400,
and no refusal tells of a file of the server. What follows the OpenAPI document, and what does not, schemathesis makes up:

    schemathesis run http://127.0.0.1:8000/openapi.json --max-examples 2500 --phases fuzzing \\
        --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance
"""

import argparse
import asyncio
import base64
import json
import random
import time
from collections import Counter

import httpx2
import numpy as np
from datasets import load_from_disk
from fuzz import mutation, whole_files

LEAKS = ("Traceback", "/tmp", "site-packages", ".py")  # of which nothing may stand in an answer


def bodies(data: str, model: str, max_tokens: int, stream: bool) -> list[bytes]:
    """Requests of the first questions of a test split, with their ECGs as samples."""
    found = []
    for row in load_from_disk(data)["test"]:
        ecg = row["ecg"]
        array = np.asarray(ecg["array"]).round(4).tolist()
        samples = {"samples": array, **{name: ecg[name] for name in ("sampling_rate", "unit", "lead_names")}}
        question = next(message["content"] for message in row["messages"] if message["role"] == "user")
        text = question if isinstance(question, str) else "".join(part.get("text") or "" for part in question)
        content = [{"type": "ecg", "ecg": samples}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        found.append({"model": model, "messages": messages, "max_tokens": max_tokens, "stream": stream})
    return [json.dumps(body).encode() for body in found]


def memory_of(url: str, key: str | None) -> float:
    """Megabytes of the server, as its /metrics tell."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    text = httpx2.get(f"{url.removesuffix('/v1')}/metrics", headers=headers).text
    (line,) = [line for line in text.splitlines() if line.startswith("process_resident_memory_bytes")]
    return float(line.split()[1]) / 1e6


class Load:
    """What so many clients see for so long."""

    def __init__(self, url: str, requests: list[bytes], key: str | None) -> None:
        self.url, self.requests = url, requests
        self.headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self.seconds: list[float] = []
        self.num_busy = 0
        self.errors: list[str] = []

    async def run(self, clients: int, seconds: float) -> float:
        """Returns answers a second."""
        self.end = time.monotonic() + seconds
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(timeout=600, limits=limits, headers=self.headers) as client:
            begun = time.monotonic()
            await asyncio.gather(*(self._client(client, number) for number in range(clients)))
            return len(self.seconds) / (time.monotonic() - begun)

    async def _client(self, client: httpx2.AsyncClient, number: int) -> None:
        order = random.Random(number)
        while time.monotonic() < self.end:
            begun = time.monotonic()
            try:
                answer = await client.post(f"{self.url}/chat/completions", content=order.choice(self.requests))
            except httpx2.HTTPError as error:
                self.errors.append(repr(error))
                continue
            if answer.status_code == 429:
                self.num_busy += 1
                await asyncio.sleep(float(answer.headers["retry-after"]))
            elif answer.status_code != 200:
                self.errors.append(f"{answer.status_code} {answer.text[:200]}")
            else:
                self.seconds.append(time.monotonic() - begun)


def send_damaged(url: str, number: int, model: str, key: str | None) -> None:
    """Prints how many damaged recordings had which status, and those that are at fault."""
    statuses: Counter[int] = Counter()
    files = [file for file in whole_files() if len(file[2]) == 1]
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx2.Client(timeout=600, headers=headers) as client:
        for count in range(number):
            _, name, contents, rng = mutation(count, 0, files)
            (content,) = contents.values()
            ecg = {
                "data": base64.b64encode(content).decode(),
                **({"sampling_rate": 500.0} if rng.random() < 0.5 else {}),
            }
            chat = [{"role": "user", "content": [{"type": "ecg", "ecg": ecg}, {"type": "text", "text": "Why?"}]}]
            body = {"model": model, "messages": chat, "max_tokens": 1}
            answer = client.post(f"{url}/chat/completions", json=body)
            statuses[answer.status_code] += 1
            if answer.status_code not in (200, 400) or any(word in answer.text for word in LEAKS):
                print(f"mutation {count} of {name}: {answer.status_code} {answer.text[:300]}", flush=True)
    print(f"{number} damaged recordings: {dict(statuses)}")


def main() -> None:
    """Prints a line for one client, and one for many."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--data")
    parser.add_argument("--model", default="model")
    parser.add_argument("--api_key")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max_tokens", type=int, default=16)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--damaged", type=int, metavar="NUMBER", help="send so many damaged recordings instead")
    args = parser.parse_args()
    print(f"memory at the beginning: {memory_of(args.url, args.api_key):.0f} MB", flush=True)
    if args.damaged:
        send_damaged(args.url, args.damaged, args.model, args.api_key)
        print(f"memory at the end: {memory_of(args.url, args.api_key):.0f} MB")
        return
    if args.data is None:
        parser.error("--data is missing: the dataset whose questions are asked")
    requests = bodies(args.data, args.model, args.max_tokens, args.stream)
    rates = []
    for clients, seconds in ((1, min(args.seconds, 30)), (args.clients, args.seconds)):
        load = Load(args.url, requests, args.api_key)
        rates.append(asyncio.run(load.run(clients, seconds)))
        p50, p99 = np.percentile(load.seconds, [50, 99]) if load.seconds else (np.nan, np.nan)
        print(
            f"{clients} clients: {rates[-1]:.1f} answers/s, p50 {p50:.2f} s, p99 {p99:.2f} s, {load.num_busy} busy, "
            f"{len(load.errors)} errors {load.errors[:2]}, {memory_of(args.url, args.api_key):.0f} MB",
            flush=True,
        )
    print(f"{rates[1] / rates[0]:.1f} times the answers of one client")


if __name__ == "__main__":
    main()
