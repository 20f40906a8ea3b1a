"""How many chats a second `elm serve` answers: one client, then many, on records of a dataset.

    elm serve runs/quickstart/model --port 8000
    python benchmarks/serve.py --url http://127.0.0.1:8000/v1 --data runs/quickstart/data --clients 50 --seconds 60

A client asks one question after the other. A 429 is counted, and asked again after `Retry-After`; anything else but 200 is an error.
"""

import argparse
import asyncio
import json
import random
import time

import httpx2
import numpy as np
from datasets import load_from_disk


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


def main() -> None:
    """Prints a line for one client, and one for many."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="model")
    parser.add_argument("--api_key")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max_tokens", type=int, default=16)
    parser.add_argument("--stream", action="store_true")
    args = parser.parse_args()
    requests = bodies(args.data, args.model, args.max_tokens, args.stream)
    rates = []
    for clients in (1, args.clients):
        load = Load(args.url, requests, args.api_key)
        rates.append(asyncio.run(load.run(clients, args.seconds)))
        p50, p99 = np.percentile(load.seconds, [50, 99]) if load.seconds else (np.nan, np.nan)
        print(
            f"{clients} clients: {rates[-1]:.1f} answers/s, p50 {p50:.2f} s, p99 {p99:.2f} s, {load.num_busy} busy, "
            f"{len(load.errors)} errors {load.errors[:2]}, {memory_of(args.url, args.api_key):.0f} MB",
            flush=True,
        )
    print(f"{rates[1] / rates[0]:.1f} times the answers of one client")


if __name__ == "__main__":
    main()
