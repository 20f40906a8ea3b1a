import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass
class Server:
    """An endpoint on this machine: what it was asked, the states that it answers with before it answers, and its answer to a body."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    reply: Callable[[dict[str, Any]], str] = lambda body: " Yes \n"


@pytest.fixture
def server() -> Iterator[Server]:
    of_test = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            of_test.asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            state = of_test.states.pop(0) if of_test.states else 200
            content = json.dumps({"choices": [{"message": {"content": of_test.reply(body)}}]}).encode()
            self.send_response(state)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        of_test.url = f"http://127.0.0.1:{listening.server_port}/v1"
        yield of_test
        listening.shutdown()
        thread.join()
