"""`elm demo`: a page on which an ELM is asked about ECGs, here or as a Space."""

import argparse
import html
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import SpaceCard, SpaceCardData
from packaging.requirements import Requirement
from transformers import PreTrainedModel, set_seed

from elm_ecg import ecg_utils
from elm_ecg.ecg_drawing import ECGPaper, ecg_svg, page_width
from elm_ecg.training.apps.conversation import (
    DISCLAIMER,
    ShownECG,
    add_arguments,
    read_for_model,
    stream_answer,
    user_turn,
    zeroed,
)
from elm_ecg.training.command_line import CommandLineParser, read_system_prompt

TITLE = "Ask an ECG-language model"
GRADIO_VERSION = "6.31.0"  # of Spaces
MAX_FILE_SIZE = "64mb"
MAX_QUESTION = 2000  # characters
MAX_WAITING = 16  # questions
KEPT_SECONDS = 3600  # uploaded files, and the ECGs of a page that was left
QUESTIONS = ("What is the rhythm?", "Is the QRS complex wide?", "What is the electrical axis of the heart?")
# the room goes to the paper and to the chat, on any width
CSS = """
.gradio-container {max-width: 1400px !important}
#disclaimer {border-left: 4px solid #b45309; padding: 2px 12px}
#ecgs figure {margin: 0 0 16px}
#ecgs .paper {overflow-x: auto}
#ecgs svg {display: block; width: 100%; min-width: calc(var(--mm) * 2.1px); max-width: calc(var(--mm) * 5px); height: auto}
#ecgs figcaption {margin-top: 8px}
#ecgs .none {min-height: 160px; display: grid; place-items: center; border: 1px dashed #9ca3af; border-radius: 8px}
#ecgs .error {border-left: 4px solid #b91c1c; padding: 8px 12px; overflow-wrap: anywhere}
"""
NO_ECG = '<div class="none">The ECG is drawn here.</div>'
# beside app.py and the card, what a Space is made of: the page, and what reads and draws ECGs
SPACE_MODULES = (
    "__init__.py",
    *("ecg_drawing.py", "ecg_formats.py", "ecg_formats_binary.py", "ecg_formats_xml.py", "ecg_utils.py"),
    *(f"training/{name}" for name in ("__init__.py", "command_line.py")),
    *(f"training/apps/{name}" for name in ("__init__.py", "conversation.py", "demo.py")),
)
SPACE_FOLDER = Path(__file__).parent / "space"

Turns = list[dict[str, str]]  # {"role", "content"}, as Gradio shows them


def import_gradio() -> Any:
    """Gradio, which reports nothing to its makers.

    Raises:
        ImportError: it is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f'The demo needs Gradio: pip install "elm-ecg[demo]" ({error}).') from error
    return gradio


def draw(ecg: ShownECG) -> str:
    """The ECG on paper as in a hospital, to scale and of any width, with what was read below: HTML."""
    record = ecg.record
    seconds = record.array.shape[1] / record.sampling_rate
    # columns show a part of the time each, which has to hold some beats
    paper = ECGPaper(layout="3x4" if len(record.lead_names) > 6 and seconds >= 8 else "12x1")
    caption = f"{paper.speed:g} mm/s, {paper.gain:g} mm/mV, {record.sampling_rate:g} Hz"
    said = f"<b>{html.escape(ecg.name)}</b>: {html.escape(ecg.facts)}."
    width = page_width(paper, seconds)
    svg = ecg_svg(record, paper, caption)
    return f'<figure><div class="paper" style="--mm: {width:g}">{svg}</div><figcaption>{said}</figcaption></figure>'


def read_uploads(processor: Any, paths: Sequence[Path], **described: Any) -> list[ShownECG]:
    """The ECGs of uploaded files; the several files of a WFDB record are one.

    Raises:
        ValueError: a file is no ECG that the model can take, by the name under which it was uploaded; or two have one name.
    """
    names = [path.name for path in paths]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Several files are named {', '.join(twice)}; rename them, so that each can be told.")
    with tempfile.TemporaryDirectory() as folder:
        # the parts of a WFDB record name each other, and Gradio gives each a folder of its own
        files = [Path(shutil.copy(path, Path(folder) / path.name)) for path in paths]
        headers = [file for file in files if file.suffix == ".hea"]
        parts = {line.split()[0] for header in headers for line in header.read_bytes().splitlines()[1:] if line.split()}
        records = [file for file in files if os.fsencode(file.name) not in parts]
        try:
            return [read_for_model(processor, record, **described) for record in records]
        except (ValueError, OSError, ImportError) as error:
            raise ValueError(str(error).replace(f"{folder}{os.sep}", "")) from error


def _error(error: Exception) -> str:
    return f'<div class="error" role="alert"><b>This cannot be read.</b> {html.escape(str(error))}</div>'


class Page:
    """What the page does; `build_demo` says how it looks.

    Args:
        examples: names and files of records to pick.
        generation: `max_new_tokens` and `temperature` of `stream_answer`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        examples: dict[str, Path],
        system_prompt: str | None = None,
        **generation: Any,
    ) -> None:
        self.model, self.processor, self.examples = model, processor, examples
        self.system_prompt, self.generation = system_prompt, generation

    def upload(
        self,
        files: list[str] | None,
        sampling_rate: float | None = None,
        unit: str | None = None,
        lead_names: str | None = None,
        start: float | None = None,
    ) -> tuple[list[ShownECG], str]:
        """ECGs and their pictures, or none and what is wrong, as HTML; boxes that are empty say nothing."""
        if not files:
            return [], NO_ECG
        described = {
            "sampling_rate": sampling_rate or None,
            "unit": unit or None,
            "lead_names": (lead_names or "").replace(",", " ").split() or None,
            "start": start or None,
        }
        try:
            return self._shown(read_uploads(self.processor, [Path(file) for file in files], **described))
        except (ValueError, OSError) as error:
            return [], _error(error)

    def pick(self, name: str | None) -> tuple[list[ShownECG], str]:
        """As `upload`, of an example."""
        if name not in self.examples:
            return [], NO_ECG
        try:
            ecg = read_for_model(self.processor, self.examples[name])
        except (ValueError, OSError, ImportError) as error:
            return [], _error(error)
        return self._shown([replace(ecg, name=name)])

    @staticmethod
    def _shown(ecgs: list[ShownECG]) -> tuple[list[ShownECG], str]:
        return ecgs, "".join(map(draw, ecgs))

    def ask(
        self, question: str, ecgs: list[ShownECG], turns: Turns, compare: bool, compared: Turns
    ) -> Iterator[tuple[Turns, Turns]]:
        """The turns with the growing answer; with `compare`, then also the answer where the ECGs are zeroed, to the same words.

        Raises:
            ValueError: the model cannot read the question.
        """
        question = question.strip()[:MAX_QUESTION]
        if not question:
            return
        asked: Turns = [{"role": "user", "content": question}]
        for answer in self._answers(question, ecgs, turns):
            yield [*turns, *asked, {"role": "assistant", "content": answer}], compared
        if compare:
            turns_now = [*turns, *asked, {"role": "assistant", "content": answer}]
            for without in self._answers(question, [zeroed(ecg) for ecg in ecgs], turns):
                yield turns_now, [*compared, *asked, {"role": "assistant", "content": without}]

    def _answers(self, question: str, ecgs: list[ShownECG], turns: Turns) -> Iterator[str]:
        """The answer as far as it is written, again and again."""
        chat: list[dict[str, Any]] = []
        if self.system_prompt is not None:
            chat.append({"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        for turn in [*turns, {"role": "user", "content": question}]:
            if turn["role"] == "user":
                chat.append(user_turn(turn["content"], ecgs))
                ecgs = []  # before the first question
            else:
                chat.append({"role": "assistant", "content": [{"type": "text", "text": turn["content"]}]})
        answer = ""
        for piece in stream_answer(self.model, self.processor, chat, **self.generation):
            answer += piece
            yield answer
        if not answer:
            yield "(no answer)"


def build_demo(page: Page, name: str, questions: Sequence[str] = QUESTIONS) -> Any:
    """The page as Gradio `Blocks`.

    Args:
        name: of the model.
        questions: examples of what to ask.
    """
    gr = import_gradio()
    extractor = page.processor.feature_extractor
    takes = f"{len(extractor.lead_names)} leads, {extractor.num_samples / extractor.sampling_rate:g} s"

    def ask(question: str, ecgs: Any, turns: Turns, compare: bool, compared: Turns) -> Iterator[Any]:
        try:
            for now, compared_now in page.ask(question, ecgs, turns, compare, compared):
                yield "", now, now, compared_now, compared_now
        except Exception as error:  # whatever it is, it is said and the page goes on
            gr.Warning(html.escape(str(error)))
            yield question, turns, turns, compared, compared

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as demo:
        ecgs = gr.State([], time_to_live=KEPT_SECONDS)
        turns = gr.State([], time_to_live=KEPT_SECONDS)
        compared = gr.State([], time_to_live=KEPT_SECONDS)
        gr.Markdown(f"# {TITLE}\n`{name}`")
        gr.Markdown(f"**{DISCLAIMER}** Upload no record that could tell who the patient is.", elem_id="disclaimer")
        with gr.Row():
            with gr.Column(scale=2, min_width=320, visible=page.processor.takes_ecgs):
                files = gr.File(label=f"ECG files ({takes})", file_count="multiple", height=140)
                picked = gr.Radio(list(page.examples), label="Or pick a record", visible=bool(page.examples))
                with gr.Accordion("What the file does not say", open=False):
                    sampling_rate = gr.Number(label="Sampling rate, Hz", value=None, minimum=0)
                    unit = gr.Dropdown(["", "mV", "uV", "V"], label="Unit", value="")
                    lead_names = gr.Textbox(label="Leads, in order", placeholder="I II III aVR aVL aVF V1 ...")
                    start = gr.Number(label="Second at which a longer record begins", value=None, minimum=0)
                    again = gr.Button("Read again", size="sm")
            with gr.Column(scale=5, min_width=320, visible=page.processor.takes_ecgs):
                pictures = gr.HTML(NO_ECG, elem_id="ecgs", padding=False)
        with gr.Row():
            # what is said is shown as it is: "<" is less, and no tag
            look = {"height": 280, "buttons": [], "render_markdown": False}
            chatbot = gr.Chatbot(label="Answers", elem_id="answers", **look)
            chatbot_zeroed = gr.Chatbot(label="With the ECG zeroed", elem_id="zeroed", visible=False, **look)
        with gr.Row():
            question = gr.Textbox(
                placeholder="Ask about the ECG",
                show_label=False,
                container=False,
                max_length=MAX_QUESTION,
                scale=6,
                min_width=260,
                elem_id="question",
            )
            send = gr.Button("Ask", variant="primary", scale=1, min_width=80, elem_id="ask")
            stop = gr.Button("Stop", scale=1, min_width=80)
            clear = gr.Button("Clear", scale=1, min_width=80)
        compare = gr.Checkbox(
            label="Show the answer with the ECG zeroed beside it", visible=page.processor.takes_ecgs, elem_id="compare"
        )
        gr.Examples([[text] for text in questions], question, label="Questions")

        chats = [turns, chatbot, compared, chatbot_zeroed]

        def begin() -> list[Turns]:
            return [[] for _ in chats]

        described, shown = [files, sampling_rate, unit, lead_names, start], [ecgs, pictures]
        reading = [
            gr.on([files.upload, files.delete, files.clear], page.upload, described, shown, api_name="upload"),
            again.click(page.upload, described, shown, api_visibility="private"),
            picked.input(page.pick, picked, shown, api_name="pick"),
        ]
        for event, other in zip(reading, (picked, picked, files), strict=True):
            event.then(lambda: [None, *begin()], None, [other, *chats], api_visibility="private")
        answering = gr.on(
            [send.click, question.submit],
            ask,
            [question, ecgs, turns, compare, compared],
            [question, turns, chatbot, compared, chatbot_zeroed],
            api_name="ask",
            concurrency_limit=1,
            trigger_mode="once",
            show_progress="minimal",
        )
        stop.click(None, None, None, cancels=[answering], api_visibility="private")
        gr.on(
            [clear.click, chatbot.clear, chatbot_zeroed.clear],
            begin,
            None,
            chats,
            cancels=[answering],
            api_visibility="private",
        )
        compare.change(
            lambda on: gr.update(visible=on), compare, chatbot_zeroed, api_visibility="private", show_progress="hidden"
        )
    return demo


def serve(demo: Any, host: str | None = None, port: int | None = None) -> str:
    """Begins to serve the page, and returns its address; `demo.block_thread()` waits for Ctrl-C.

    Args:
        host, port: None for Gradio's own: 127.0.0.1, or what a Space says, and the first free one from 7860 on.
    """
    gr = import_gradio()
    # fonts of the reader's system: none are fetched
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, address, _ = demo.queue(max_size=MAX_WAITING).launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=MAX_FILE_SIZE,
        ssr_mode=False,
        footer_links=[],
        theme=theme,
        css=CSS,
        quiet=True,
        prevent_thread_lock=True,
    )
    return address


def example_files(paths: Sequence[Path]) -> dict[str, Path]:
    """Names of records to pick, by their files."""
    return {path.stem.replace("_", " "): path for path in paths}


def write_examples(folder: Path) -> list[Path]:
    """Writes simulated records, one of each rhythm, so that nobody's ECG has to be shared."""
    from elm_ecg.training.data.synthetic import RHYTHMS, Findings, simulate_ecg  # not in a Space, which has the files

    paths = []
    for seed, rhythm in enumerate(RHYTHMS):
        findings = Findings(rhythm=rhythm, wide_qrs=rhythm == "sinus rhythm")
        array = simulate_ecg(findings, np.random.default_rng(seed), sampling_rate=500)
        paths.append(folder / f"Simulated_{rhythm.replace(' ', '_')}.npz")
        np.savez_compressed(
            paths[-1],
            array=np.rint(1000 * array).astype(np.int16),
            sampling_rate=500,
            lead_names=ecg_utils.STANDARD_LEADS,
            unit="uV",
        )
    return paths


def write_space(folder: Path, repo_id: str, revision: str = "main", adapter: bool = False) -> None:
    """Writes a Space that shows a model of the Hub: this page, what reads and draws ECGs, simulated records, and its card.

    Args:
        folder: exists, and is empty.
        repo_id: of the model.
        revision: of the model, best a commit.
        adapter: the repo holds a LoRA adapter.
    """
    root = Path(ecg_utils.__file__).parent
    (folder / "elm_ecg" / "training" / "apps").mkdir(parents=True)
    (folder / "examples").mkdir()
    for name in SPACE_MODULES:
        shutil.copyfile(root / name, folder / "elm_ecg" / name)
    shutil.copyfile(SPACE_FOLDER / "app.py", folder / "app.py")
    write_examples(folder / "examples")
    space = {"model": repo_id, "revision": revision, "adapter": adapter}
    (folder / "space.json").write_text(json.dumps(space, indent=2) + "\n", encoding="utf-8")
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in _requirements(adapter)), encoding="utf-8")
    card_data = SpaceCardData(
        title=f"{TITLE}: {repo_id.split('/')[-1]}",
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version="3.11",
        app_file="app.py",
        license="mit",
        models=[repo_id],
        tags=["ecg", "electrocardiogram", "elm"],
        emoji="\N{ELECTRIC LIGHT BULB}",
    )
    card = SpaceCard.from_template(
        card_data, template_path=str(SPACE_FOLDER / "README.md"), model=repo_id, disclaimer=f"> **{DISCLAIMER}**"
    )
    card.save(folder / "README.md")


def _requirements(adapter: bool) -> list[str]:
    """What the page imports and every file format needs, in the versions that this package asks for."""
    wanted = {"numpy", "pillow", "torch", "transformers", *(["peft"] if adapter else [])}
    lines = []
    for line in importlib.metadata.requires("elm-ecg") or []:
        requirement = Requirement(line)
        marker = str(requirement.marker or "")
        if (not marker and requirement.name in wanted) or marker == 'extra == "formats"':
            lines.append(f"{requirement.name}{requirement.specifier}")
    return sorted(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = CommandLineParser(prog="elm demo", usage="elm demo MODEL [options]", description=f"{__doc__} {DISCLAIMER}")
    add_arguments(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address that is listened on; default: %(default)s, this machine alone. 0.0.0.0 is everybody in the network",
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument(
        "--records", type=Path, nargs="+", default=[], metavar="FILE", help="ECG files to pick; default: simulated ones"
    )
    parser.add_argument("--questions", nargs="+", default=QUESTIONS, metavar="TEXT", help="examples of what to ask")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    import_gradio()
    system_prompt = read_system_prompt(args.system_prompt)
    for path in args.records:
        if not path.is_file():
            raise ValueError(f"--records: there is no file {path}.")
    from elm_ecg.training.build import limit_threads, load_elm  # not in a Space

    set_seed(args.seed)
    model, processor = load_elm(args.model, args.revision, dtype=args.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # type: ignore[arg-type]  # a wrapped method
    limit_threads(model, model.device)
    name = Path(args.model).name if Path(args.model).exists() else args.model
    with tempfile.TemporaryDirectory() as folder:
        examples = example_files(args.records or write_examples(Path(folder)))
        generation = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
        page = Page(model, processor, examples, system_prompt, **generation)
        demo = build_demo(page, name, args.questions)
        print(f"{name} answers at {serve(demo, args.host, args.port)} until Ctrl-C.\n{DISCLAIMER}", flush=True)
        demo.block_thread()


if __name__ == "__main__":
    main()
