"""A model behind an OpenAI-compatible address, such as vLLM or a provider has: `POST URL/chat/completions`."""

import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from elm_ecg.training.evaluation.benchmarks.baselines import Message

TIMEOUT = 300  # seconds for one answer
TRIES = 4
RETRIED = (408, 429, 500, 502, 503, 504)  # states of a server that may pass
AT_ONCE = 8  # requests
KEY_VARIABLE = "OPENAI_API_KEY"


class Endpoint:
    """A model at an address.

    Args:
        url: up to `/v1`.
        model: the name that the address has for it.
        option: that named the address, for errors.
        key_variable: of the environment, that holds the key if the address needs one.

    Raises:
        ValueError: the address is none of http or https.
    """

    def __init__(self, url: str, model: str, option: str = "endpoint", key_variable: str = KEY_VARIABLE) -> None:
        check_address(url, option)
        self.url, self.model = f"{url.rstrip('/')}/chat/completions", model
        self.option, self.key_variable = option, key_variable

    def reply_all(self, chats: list[list[Message]], max_new_tokens: int) -> list[str]:
        """The answers to some chats, asked at once, greedily."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda chat: self.reply(chat, max_new_tokens), chats))

    def reply(self, chat: list[Message], max_new_tokens: int) -> str:
        """The answer to a chat whose pictures are Pillow images.

        Raises:
            OSError: the address cannot be reached, or refuses, also after `TRIES` tries.
            ValueError: it answers with something else than a chat completion.
        """
        body = {
            "model": self.model,
            "messages": [{"role": turn["role"], "content": list(map(_part, turn["content"]))} for turn in chat],
            "max_tokens": max_new_tokens,
            "temperature": 0,
        }
        content = self._post(json.dumps(body).encode())
        try:
            return str(json.loads(content)["choices"][0]["message"]["content"] or "").strip()
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"--{self.option}: {self.url} answers {content[:200]!r}; expected a chat completion as of OpenAI's API."
            ) from error

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        for number in range(TRIES):
            # the scheme was checked above
            request = urllib.request.Request(self.url, body, headers)  # noqa: S310
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:  # noqa: S310
                    return response.read()
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}: {error.read()[:200].decode(errors='replace')}"
                if error.code not in RETRIED:
                    break
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                reason = str(getattr(error, "reason", error))
            if number < TRIES - 1:
                time.sleep(2**number)
        raise OSError(
            f"--{self.option}: {self.url} does not answer ({reason}). Is the server running, and {self.key_variable} set if it needs one?"
        )


def check_address(url: str, option: str) -> None:
    """Raises ValueError if an address is none of http or https."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"--{option} is {url}; expected an address such as http://localhost:8000/v1.")


def _part(part: Message) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    content = io.BytesIO()
    part["image"].save(content, "PNG")
    address = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": address}}
