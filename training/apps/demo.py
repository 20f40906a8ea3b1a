"""`elm demo`: a page on which an ELM is asked about ECGs, here or as a Space."""

import argparse
import html
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template
from packaging.requirements import Requirement
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from elm_ecg import ecg_utils
from elm_ecg.ecg_drawing import ECGPaper, ecg_svg, page_width
from elm_ecg.training.apps.conversation import (
    DISCLAIMER,
    ChatECG,
    as_message,
    load_model,
    model_parser,
    read_for_model,
    stream_answer,
    zeroed,
)
from elm_ecg.training.command_line import read_system_prompt

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
# beside app.py and the card, what a Space is made of: the page, and what draws and reads ECGs with all that it imports
SPACE_MODULES = ["__init__.py", "ecg_drawing.py", "training/__init__.py", "training/command_line.py"]
SPACE_MODULES += [
    "training/files.py",
    "training/apps/__init__.py",
    "training/apps/conversation.py",
    "training/apps/demo.py",
]
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
        raise ImportError(f"The demo needs Gradio: pip install gradio, or the extra `demo` ({error}).") from error
    return gradio


def draw(ecg: ChatECG) -> str:
    """HTML of what the model reads, on paper as in a hospital, to scale and of any width, and of the facts below."""
    record = ecg.prepared
    seconds = record.array.shape[1] / record.sampling_rate
    # columns show a part of the time each, which has to hold some beats
    paper = ECGPaper(layout="3x4" if len(record.lead_names) > 6 and seconds >= 8 else "12x1")
    caption = f"{paper.speed:g} mm/s, {paper.gain:g} mm/mV, {record.sampling_rate:g} Hz"
    facts = f"<b>{html.escape(ecg.name)}</b>: {html.escape(ecg.facts)}"
    width = page_width(paper, seconds)  # millimetres, by which the style sheet scales: 2.1 to 5 pixels each
    svg = ecg_svg(record, paper, caption)
    return f'<figure><div class="paper" style="--mm: {width:g}">{svg}</div><figcaption>{facts}</figcaption></figure>'


def read_uploads(read: Callable[..., ChatECG], paths: Sequence[Path], **described: Any) -> list[ChatECG]:
    """The ECGs of uploaded files; the several files of a WFDB record are one.

    Args:
        read: as `Page.read`.

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
        headers = [file for file in files if file.suffix == ".hea"]  # WFDB: a line for each signal, its file first
        parts = {line.split()[0] for header in headers for line in header.read_bytes().splitlines()[1:] if line.split()}
        records = [file for file in files if os.fsencode(file.name) not in parts]
        try:
            return [read(record, **described) for record in records]
        except (ValueError, OSError, ImportError) as error:
            raise ValueError(str(error).replace(f"{folder}{os.sep}", "")) from error  # visitors have no such folder


def _error(error: Exception) -> str:
    return f'<div class="error" role="alert"><b>This cannot be read.</b> {html.escape(str(error))}</div>'


class Page:
    """What the page does. `build_demo` makes its looks.

    Args:
        examples: names and files of records to pick.
        generation: `max_new_tokens` and `temperature` of `stream_answer`.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, examples: dict[str, Path], **generation: Any) -> None:
        self.model, self.processor, self.examples = model, processor, examples
        self.generation = generation

    @property
    def takes_ecgs(self) -> bool:
        """Whether the model reads ECGs."""
        return self.processor.takes_ecgs

    @property
    def reads(self) -> str:
        """How many leads and seconds the model reads."""
        extractor = self.processor.feature_extractor
        return f" ({len(extractor.lead_names)} leads, {extractor.num_samples / extractor.sampling_rate:g} s)"

    def read(self, path: Path, start: float | None = None, **described: Any) -> ChatECG:
        """See `read_for_model`."""
        return read_for_model(self.processor, path, start, **described)

    def answer(self, chat: list[dict[str, Any]]) -> Iterator[str]:
        """See `stream_answer`."""
        return stream_answer(self.model, self.processor, chat, **self.generation)

    def upload(
        self,
        files: list[str] | None,
        sampling_rate: float | None = None,
        unit: str | None = None,
        lead_names: str | None = None,
        start: float | None = None,
    ) -> tuple[list[ChatECG], str]:
        """ECGs and their pictures as HTML, or no ECGs and the error; empty boxes count as None."""
        if not files:
            return [], NO_ECG
        described = {
            "sampling_rate": sampling_rate or None,
            "unit": unit or None,
            "lead_names": (lead_names or "").replace(",", " ").split() or None,
            "start": start,  # 0 is a second too
        }
        try:
            ecgs = read_uploads(self.read, [Path(file) for file in files], **described)
        except (ValueError, OSError) as error:
            return [], _error(error)
        return ecgs, "".join(map(draw, ecgs))

    def pick(self, name: str | None) -> tuple[list[ChatECG], str]:
        """As `upload`, of an example."""
        if name not in self.examples:
            return [], NO_ECG
        try:
            ecg = self.read(self.examples[name])
        except (ValueError, OSError, ImportError) as error:
            return [], _error(error)
        ecg = replace(ecg, name=name)
        return [ecg], draw(ecg)

    def ask(
        self, question: str, ecgs: list[ChatECG], turns: Turns, compare: bool, compared: Turns
    ) -> Iterator[tuple[Turns, Turns]]:
        """The turns with the growing answer; with `compare`, then also the answer where the ECGs are zeroed, to the same words.

        Raises:
            ValueError: the model cannot read the question.
        """
        question = question.strip()[:MAX_QUESTION]  # programs that call the page pass by its box
        if not question:
            return
        asked: Turns = [{"role": "user", "content": question}]
        for answer in self._answers(question, ecgs, turns):
            yield [*turns, *asked, {"role": "assistant", "content": answer}], compared
        if compare:
            turns_now = [*turns, *asked, {"role": "assistant", "content": answer}]
            for without in self._answers(question, [zeroed(ecg) for ecg in ecgs], turns):
                yield turns_now, [*compared, *asked, {"role": "assistant", "content": without}]

    @property
    def explains(self) -> bool:
        """Whether answers can be explained here; in a Space they cannot, which has no training code."""
        names = ("captum", "elm_ecg.training.evaluation")
        return self.takes_ecgs and all(map(importlib.util.find_spec, names))

    def why(self, ecgs: list[ChatECG], turns: Turns) -> str:
        """HTML of what the last answer rests on.

        Raises:
            ValueError: there is no answer yet, or it is about several ECGs or none.
        """
        from elm_ecg.training.evaluation.explain import draw_svg, explain  # not in a Space

        if len(ecgs) != 1 or not turns:
            raise ValueError("An answer about one ECG can be explained: read one, and ask about it.")
        *asked, answer = turns
        model: Any = self.model  # an ELM
        explanation = explain(model, self.processor, ecgs[0].record, asked, answer["content"])
        told = f"<b>What the answer rests on</b>: {html.escape(explanation.told())}"
        return f'<figure><div class="paper">{draw_svg(explanation)}</div><figcaption>{told}</figcaption></figure>'

    def _answers(self, question: str, ecgs: list[ChatECG], turns: Turns) -> Iterator[str]:
        """The growing answer: each time all of it that is written so far."""
        chat: list[dict[str, Any]] = []
        for turn in [*turns, {"role": "user", "content": question}]:
            chat.append(as_message(turn["role"], turn["content"], ecgs))
            ecgs = []  # they stand before the first question alone
        answer = ""
        for piece in self.answer(chat):
            answer += piece
            yield answer
        if not answer:
            yield "(no answer)"


class ServedPage(Page):
    """The page of a model that `elm serve` serves.

    Args:
        served: a `ServedModel`.
        examples, generation: as of `Page`; `seed` and `system_prompt` too.
    """

    takes_ecgs = True  # as far as is known here; the server says if its model takes none
    reads = ""
    explains = False

    def __init__(self, served: Any, examples: dict[str, Path], **generation: Any) -> None:
        self.served, self.examples, self.generation = served, examples, generation

    def read(self, path: Path, start: float | None = None, **described: Any) -> ChatECG:
        """See `read_to_send`."""
        from elm_ecg.training.apps.served import read_to_send  # not in a Space

        return read_to_send(path, start, **described)

    def answer(self, chat: list[dict[str, Any]]) -> Iterator[str]:
        """See `ServedModel.answer`."""
        return self.served.answer(chat, **self.generation)


def as_text(turns: Turns) -> Turns:
    """Turns that Gradio shows as they are written: it takes texts for HTML, with pictures of other servers and forms in it."""
    return [{**turn, "content": html.escape(turn["content"])} for turn in turns]


def build_demo(page: Page, name: str, questions: Sequence[str] = QUESTIONS) -> Any:
    """The page as Gradio `Blocks`.

    Args:
        name: of the model.
        questions: examples of what to ask.
    """
    gr = import_gradio()

    def ask(question: str, ecgs: list[ChatECG], turns: Turns, compare: bool, compared: Turns) -> Iterator[Any]:
        try:
            for turns_now, compared_now in page.ask(question, ecgs, turns, compare, compared):
                yield "", turns_now, as_text(turns_now), compared_now, as_text(compared_now)
        except Exception as error:  # whatever it is, the visitor sees it and the page goes on
            gr.Warning(html.escape(str(error)))  # Gradio shows it as HTML
            yield question, turns, as_text(turns), compared, as_text(compared)

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as demo:
        # of each visitor alone
        ecgs, turns, compared = (gr.State([], time_to_live=KEPT_SECONDS) for _ in range(3))
        gr.Markdown(f"# {TITLE}\n`{name}`")
        gr.Markdown(f"**{DISCLAIMER}** Upload no record that could tell who the patient is.", elem_id="disclaimer")
        with gr.Row():
            with gr.Column(scale=2, min_width=320, visible=page.takes_ecgs):
                files, picked, again, *described = _record_boxes(gr, page)
            with gr.Column(scale=5, min_width=320, visible=page.takes_ecgs):
                pictures = gr.HTML(NO_ECG, elem_id="ecgs", padding=False)
        with gr.Row():
            # beside what `as_text` does: `$` is no formula either
            look = {"height": 280, "buttons": [], "render_markdown": False, "latex_delimiters": []}
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
            stop, clear = (gr.Button(label, scale=1, min_width=80) for label in ("Stop", "Clear"))
            explain = gr.Button("Why?", scale=1, min_width=80, visible=page.explains, elem_id="why")
        compare = gr.Checkbox(
            label="Show the answer with the ECG zeroed beside it", visible=page.takes_ecgs, elem_id="compare"
        )
        gr.Examples([[text] for text in questions], question, label="Questions")

        chats, private = [turns, chatbot, compared, chatbot_zeroed], {"api_visibility": "private"}
        upload = {"fn": page.upload, "inputs": [files, *described], "outputs": [ecgs, pictures]}
        # another ECG empties the other choice of a record, and the chats; `change` would fire for that too, not for visitors alone
        for event, other in (
            (gr.on([files.upload, files.delete, files.clear], **upload, api_name="upload"), picked),
            (again.click(**upload, **private), picked),
            (picked.input(page.pick, picked, [ecgs, pictures], api_name="pick"), files),
        ):
            event.then(lambda: [None, [], [], [], []], None, [other, *chats], **private)
        answering = gr.on(
            [send.click, question.submit],
            ask,
            [question, ecgs, turns, compare, compared],
            [question, *chats],
            api_name="ask",
            concurrency_limit=1,  # one model: other questions wait, MAX_WAITING of them
            trigger_mode="once",  # another click while it answers does nothing
            show_progress="minimal",
        )
        explain.click(_why(gr, page), [ecgs, turns], pictures, concurrency_limit=1, trigger_mode="once", api_name="why")
        stop.click(None, None, None, cancels=[answering], **private)
        cleared = [clear.click, chatbot.clear, chatbot_zeroed.clear]
        gr.on(cleared, lambda: [[], [], [], []], None, chats, cancels=[answering], **private)
        compare.change(lambda on: gr.update(visible=on), compare, chatbot_zeroed, show_progress="hidden", **private)
    return demo


def _why(gr: Any, page: Page) -> Any:
    """`Page.why`, which leaves the picture as it is where it fails, and tells the visitor why."""

    def why(ecgs: list[ChatECG], turns: Turns) -> Any:
        try:
            return page.why(ecgs, turns)
        except Exception as error:
            gr.Warning(html.escape(str(error)))
            return gr.skip()

    return why


def _record_boxes(gr: Any, page: Page) -> tuple[Any, ...]:
    """The files, the records to pick, the button that reads the files again, and the other inputs of `Page.upload`."""
    files = gr.File(label=f"ECG files{page.reads}", file_count="multiple", height=140)
    picked = gr.Radio(list(page.examples), label="Or pick a record", visible=bool(page.examples))
    with gr.Accordion("What the file does not say", open=False):
        sampling_rate = gr.Number(label="Sampling rate, Hz", value=None, minimum=0)
        unit = gr.Dropdown(["", "mV", "uV", "V"], label="Unit", value="")
        lead_names = gr.Textbox(label="Leads, in order", placeholder="I II III aVR aVL aVF V1 ...")
        start = gr.Number(label="Second at which a longer record begins", value=None, minimum=0)
        again = gr.Button("Read again", size="sm")
    return files, picked, again, sampling_rate, unit, lead_names, start


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
        share=False,  # no tunnel through a server of Gradio's makers
        max_file_size=MAX_FILE_SIZE,
        ssr_mode=False,  # rendering on the server needs Node
        footer_links=[],
        theme=theme,  # since Gradio 6 here, no longer in `Blocks`
        css=CSS,
        quiet=True,
        prevent_thread_lock=True,  # returns at once, with the address
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
        microvolts = np.rint(1000 * array).astype(np.int16)  # half the size of float32
        described: dict[str, Any] = {"sampling_rate": 500, "lead_names": ecg_utils.STANDARD_LEADS, "unit": "uV"}
        paths.append(folder / f"Simulated_{rhythm.replace(' ', '_')}.npz")
        np.savez_compressed(paths[-1], array=microvolts, **described)
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
    readers = [Path(path).name for path in get_relative_import_files(root / "ecg_drawing.py")]  # all that it imports
    for name in {*SPACE_MODULES, *readers}:
        shutil.copyfile(root / name, folder / "elm_ecg" / name)
    shutil.copyfile(SPACE_FOLDER / "app.py", folder / "app.py")
    write_examples(folder / "examples")
    space = {"model": repo_id, "revision": revision, "adapter": adapter}
    (folder / "space.json").write_text(json.dumps(space, indent=2) + "\n", encoding="utf-8")
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in _requirements(adapter)), encoding="utf-8")
    template = Template((SPACE_FOLDER / "README.md").read_text(encoding="utf-8"), keep_trailing_newline=True)
    card = template.render(title=TITLE, model=repo_id, gradio_version=GRADIO_VERSION, disclaimer=DISCLAIMER)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _requirements(adapter: bool) -> list[str]:
    """What the page imports and every file format needs, in the versions that this package asks for."""
    wanted = {"numpy", "pillow", "torch", "transformers", *(["peft"] if adapter else [])}
    lines = []
    for line in importlib.metadata.requires("elm-ecg") or []:
        requirement = Requirement(line)
        marker = str(requirement.marker or "")  # which is written with double quotes, whatever pyproject.toml has
        if (not marker and requirement.name in wanted) or marker == 'extra == "formats"':
            lines.append(f"{requirement.name}{requirement.specifier}")
    return sorted(lines)


def make_parser() -> argparse.ArgumentParser:
    """The options of `elm demo`."""
    parser = model_parser("demo", __doc__)
    host_help = "address to listen on; default: %(default)s, this machine alone. 0.0.0.0 is everybody in the network"
    parser.add_argument("--host", default="127.0.0.1", help=host_help)
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    records_help = "ECG files to pick; default: simulated ones"
    parser.add_argument("--records", type=Path, nargs="+", default=[], metavar="FILE", help=records_help)
    parser.add_argument("--questions", nargs="+", default=QUESTIONS, metavar="TEXT", help="examples of what to ask")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Serves the page until Ctrl-C."""
    from elm_ecg.training.apps.served import ServedModel, check_options  # not in a Space

    args = make_parser().parse_args(argv)
    check_options(args)
    for path in args.records:
        if not path.is_file():
            raise ValueError(f"--records: there is no file {path}.")
    with temporary_files() as folder:
        import_gradio()  # faults show before the model is loaded
        generation = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
        if args.server is None:
            model, processor, name = load_model(args)
            page = Page(model, processor, example_files(args.records or write_examples(folder)), **generation)
        else:
            served = ServedModel(args.server, args.model, args.api_key)
            generation |= {"seed": args.seed, "system_prompt": read_system_prompt(args.system_prompt)}
            name, page = (
                served.name,
                ServedPage(served, example_files(args.records or write_examples(folder)), **generation),
            )
        demo = build_demo(page, name, args.questions)
        try:
            print(f"{name} answers at {serve(demo, args.host, args.port)} until Ctrl-C.\n{DISCLAIMER}", flush=True)
            demo.block_thread()
        finally:
            demo.close(verbose=False)  # before the folder goes: nobody uploads any more


@contextmanager
def temporary_files() -> Iterator[Path]:
    """A folder for all temporary files of this process, uploads among them, which goes with the block however that ends."""
    with tempfile.TemporaryDirectory(prefix="elm-demo-", ignore_cleanup_errors=True) as folder:
        before = tempfile.tempdir, os.environ.get("GRADIO_TEMP_DIR")
        tempfile.tempdir = os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before[0]
            if before[1] is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before[1]
