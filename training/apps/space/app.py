"""The page of this Space: the model that `space.json` names, loaded with the code that travels with it."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from elm_ecg.training.apps.demo import Page, build_demo, example_files, serve

HERE = Path(__file__).parent
space = json.loads((HERE / "space.json").read_text(encoding="utf-8"))
where = {"revision": space["revision"], "trust_remote_code": True}  # best a commit: its code stays as it is
processor = AutoProcessor.from_pretrained(space["model"], **where)
if space["adapter"]:
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(space["model"], dtype="auto", **where)
else:
    model = AutoModelForCausalLM.from_pretrained(space["model"], dtype="auto", **where)
model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
page = Page(model, processor, example_files(sorted((HERE / "examples").iterdir())))
demo = build_demo(page, space["model"])

if __name__ == "__main__":
    serve(demo)
    demo.block_thread()
