"""What the tutorial on serving tells to type works as printed, here with a tiny model in place of the quickstart's."""

import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from documents import TEXTS, run_blocks
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training.command_line import printable
from helpers import free_port, save_tiny_data, tiny_elm_config, tiny_llm_config, tiny_processor

TUTORIAL = TEXTS["docs/tutorials/serve.md"]


@pytest.mark.slow
@pytest.mark.minutes
def test_every_block_runs_in_order(tmp_path: Path) -> None:
    save_tiny_data(tmp_path / "runs/quickstart/data", test=15)
    processor = tiny_processor("default", sampling_rate=100)
    tokenizer = processor.tokenizer  # whose end of a text random weights write seldom
    llm = tiny_llm_config("default", len(tokenizer), initializer_range=0.3, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    model = ELMForConditionalGeneration(tiny_elm_config(llm=llm, ecg_token_id=processor.ecg_token_id))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "runs/quickstart/model")
    script = re.search(r"Save this as `ask_server.py`.*?```python\n(.*?)```", TUTORIAL, re.DOTALL)
    assert script is not None
    port = free_port()
    (tmp_path / "ask_server.py").write_text(script[1].replace("8000", port))
    try:
        _, _, answer, _, streamed, again, chat, _ = run_blocks(TUTORIAL.replace("8000", port), tmp_path)
    finally:
        if (tmp_path / "serve.pid").is_file():
            with suppress(ProcessLookupError):  # the tutorial has ended it
                os.kill(int((tmp_path / "serve.pid").read_text()), signal.SIGKILL)
    content = json.loads(answer)["choices"][0]["message"]["content"]
    assert len(content) > 50
    assert streamed == again != "\n"
    assert printable(content)[:50] in chat
