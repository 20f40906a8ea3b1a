"""`elm serve`: ELMs behind an address that OpenAI's clients know."""

import argparse
import asyncio
import gc
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from elm_ecg.feature_extraction_elm import TRUNCATIONS
from elm_ecg.training.command_line import CommandLineParser, add_model_options, read_system_prompt, whole_number

ENGINES = ("transformers", "vllm")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SECONDS_TO_CLOSE = 30  # that clients have to read the end of their answers
SECONDS_TO_ASK = 20  # from a connection, or the answer before, until the head of a request is here


def make_parser() -> argparse.ArgumentParser:
    """The options of `elm serve`."""
    usage = "elm serve MODEL [MODEL ...] [options]"
    description = "Answers chats with ECGs over HTTP, as OpenAI's API does: any client of it can ask. Research software, not a medical device."
    parser = CommandLineParser(prog="elm serve", usage=usage, description=description)
    add = parser.add_argument
    models_help = (
        "saved ELMs or LoRA adapters: local folders or Hub ids, each with a name for clients if need be, NAME=PLACE; adapters of one "
        "base share its weights"
    )
    add("models", nargs="+", metavar="MODEL", help=models_help)
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen at; any but this machine's own needs a key; default: %(default)s",
    )
    add("--port", type=int, default=8000, help="default: %(default)s")
    key_help = (
        "that clients have to send; others of this machine see it in the list of processes: better ELM_API_KEY, or"
    )
    add("--api_key", metavar="KEY", help=key_help + " --api_key_file")
    add("--api_key_file", type=Path, metavar="FILE", help="keys that let clients in, one in each line")
    cors_help = "pages in browsers that may ask, such as https://example.org; default: none"
    add("--cors_origins", nargs="+", default=(), metavar="ORIGIN", help=cors_help)
    add("--engine", choices=ENGINES, default=ENGINES[0], help="what writes the answers; default: %(default)s")
    add("--engine_url", metavar="URL", help="of --engine vllm, such as http://127.0.0.1:8001")
    add("--engine_model", metavar="NAME", help="of the language model there; default: the only one")
    add("--engine_api_key", metavar="KEY", help="that the engine asks for; default: ELM_ENGINE_API_KEY")
    add("--max_batch_size", type=whole_number, default=32, help="answers written at once; default: %(default)s")
    add("--max_queue", type=whole_number, default=256, help="chats that may wait; more get 429; default: %(default)s")
    add("--max_seconds", type=whole_number, default=300, help="for a chat; default: %(default)s")
    add("--max_body_mb", type=whole_number, default=32, help="of a request; default: %(default)s")
    add("--max_ecgs", type=whole_number, default=8, help="of a chat; default: %(default)s")
    samples_help = "of an ECG, all leads together; default: %(default)s"
    add("--max_samples", type=whole_number, default=4_000_000, help=samples_help)
    rate_help = "of a key, or without keys of an address; default: any number"
    add("--requests_per_minute", type=whole_number, default=0, help=rate_help)
    kept_help = "megabytes of what was read of conversations, kept for their next turns; default: %(default)s"
    add("--max_kept_mb", type=whole_number, default=1024, help=kept_help)
    add("--log_requests", action="store_true", help="write the texts of chats and answers into the log; default: no")
    add_model_options(parser, 512)
    truncation_help = (
        "part that is read of a record that is longer than the model takes; default: that of its training, or an error"
    )
    add("--truncation", choices=TRUNCATIONS[1:], help=truncation_help)
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, with `api_keys`.

    Raises:
        ValueError: some do not go together, or anybody could ask.
    """
    args = make_parser().parse_args(argv)
    args.system_prompt = read_system_prompt(args.system_prompt)
    args.api_keys = [key for key in (args.api_key, os.environ.get("ELM_API_KEY")) if key]
    if args.api_key_file is not None:
        in_file = args.api_key_file.read_text(encoding="utf-8").split()
        if not in_file:
            raise ValueError(f"--api_key_file {args.api_key_file} holds no key.")
        args.api_keys += in_file
    if args.host not in LOOPBACK and not args.api_keys:
        raise ValueError(
            f"--host {args.host} lets other machines ask: give --api_key_file FILE, or ELM_API_KEY, whose key they have to send."
        )
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port is {args.port}; expected 0 to {2**16 - 1}, 0 for any that is free.")
    if (args.engine == "vllm") != (args.engine_url is not None):
        raise ValueError("--engine vllm and --engine_url URL go together; give both or neither.")
    for name in ("engine_model", "engine_api_key"):
        if getattr(args, name) is not None and args.engine != "vllm":
            raise ValueError(f"--{name} changes nothing without --engine vllm; leave it out.")
    args.engine_api_key = args.engine_api_key or os.environ.get("ELM_ENGINE_API_KEY")
    return args


def make_server(args: argparse.Namespace) -> Any:
    """The server of the options, with its models."""
    from elm_ecg.training.serving.app import Server
    from elm_ecg.training.serving.chats import Limits, ServedModel
    from elm_ecg.training.serving.guard import Rules
    from elm_ecg.training.serving.models import find_places, load_places
    from elm_ecg.training.serving.transformers_engine import TransformersEngine

    places = find_places(args.models, args.revision, args.trust_remote_code)
    if args.engine == "vllm" and len(places) > 1:
        raise ValueError(f"--engine vllm serves one model, but got {len(places)}; start a server for each.")
    limits = Limits(args.max_new_tokens, args.max_ecgs, args.max_samples)
    served: list[ServedModel] = []
    for loaded in load_places(places, args.trust_remote_code, dtype=args.dtype):
        first, _ = next(iter(loaded.processors.values()))
        engine: Any
        if args.engine == "vllm":
            from elm_ecg.training.serving.vllm_engine import VLLMEngine

            engine = VLLMEngine(loaded.model, first.tokenizer, args.engine_url, args.engine_model, args.engine_api_key)
        else:
            engine = TransformersEngine(
                loaded.model, first.tokenizer, loaded.adapters, args.max_batch_size, args.max_kept_mb * 10**6
            )
        ends = loaded.model.generation_config.eos_token_id  # type: ignore[union-attr]
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        for name, (processor, adapter) in loaded.processors.items():
            if processor.chat_template is None:
                raise ValueError(f"The model {name} has no chat template, so nobody knows how it is asked.")
            if args.truncation is not None:
                processor.feature_extractor.truncation = args.truncation
            processor = processor.with_system_prompt(args.system_prompt)
            stop_token_ids = frozenset([*ends, *processor.stop_token_ids])
            served.append(ServedModel(name, processor, engine, stop_token_ids, adapter, limits))
    order = {place.name: number for number, place in enumerate(places)}
    rules = Rules(
        api_keys=args.api_keys,
        hosts=LOOPBACK if args.host in LOOPBACK else (),
        max_body_bytes=args.max_body_mb * 10**6,
        max_seconds=args.max_seconds,
        requests_per_minute=args.requests_per_minute,
    )
    return Server(
        sorted(served, key=lambda model: order[model.name]),
        rules,
        max_queue=args.max_queue,
        max_seconds=args.max_seconds,
        cors_origins=args.cors_origins,
        log_requests=args.log_requests,
    )


def log_handler() -> logging.Handler:
    """Writes what the server says, and no other library: those of readers quote the files, and so what they hold of a patient."""
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.name.partition(".")[0] in ("asyncio", "elm_ecg", "uvicorn"))
    return handler


def run(server: Any, listener: socket.socket) -> None:
    """Answers until SIGINT or SIGTERM: then what runs is ended, and what comes is turned away. A second one ends at once."""
    import uvicorn

    from elm_ecg.training.serving.app import make_app

    class Uvicorn(uvicorn.Server):
        silent: dict[Any, float] = {}  # connections, each with its last request, since when they ask nothing

        def handle_exit(self, sig: int, frame: Any) -> None:
            if server.is_ending:
                self.should_exit = self.force_exit = True
            server.is_ending = True

        async def on_tick(self, counter: int) -> bool:
            if server.is_ending and not (server.waiting or server.running):
                self.should_exit = True
            now = time.monotonic()
            connections: Any = self.server_state.connections  # of h11
            states = [(one, one.cycle) for one in connections]
            silent = [(one, last) for one, last in states if last is None or last.response_complete]
            self.silent = {state: self.silent.get(state, now) for state in silent}
            for (connection, _), since in self.silent.items():
                if now - since > SECONDS_TO_ASK:
                    connection.transport.close()
            return await super().on_tick(counter)

    config = uvicorn.Config(
        make_app(server),
        log_config=None,
        access_log=False,
        server_header=False,
        http="h11",
        ws="none",
        timeout_graceful_shutdown=SECONDS_TO_CLOSE,
    )
    asyncio.run(Uvicorn(config).serve([listener]))


def main(argv: list[str] | None = None) -> None:
    """Loads the models, and answers until it is told to end."""
    args = parse(argv)
    sys.setswitchinterval(5e-4)  # the engine's thread gets its turn after each operation, not 5 ms later
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        listener = socket.create_server((args.host, args.port), family=family, backlog=2048)
    except OSError as error:  # before the models are loaded
        raise ValueError(f"--host {args.host} --port {args.port}: {error.strerror}; choose others.") from error
    with listener:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", handlers=[log_handler()])
        logging.getLogger("elm_ecg.training.serving").setLevel(logging.INFO)
        server = make_server(args)
        gc.collect()
        gc.freeze()  # a request of very many small parts would have all of the models looked through again and again
        host = f"[{args.host}]" if ":" in args.host else args.host
        names = ", ".join(model.name for model in server.models)
        print(f"{names} at http://{host}:{listener.getsockname()[1]}/v1; Ctrl-C ends it.", flush=True)
        try:
            run(server, listener)
        finally:
            gc.unfreeze()  # libraries look at the end for what they have left, and would tell of all that is frozen
