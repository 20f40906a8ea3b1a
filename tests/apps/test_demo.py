import json
import os
import re
import signal
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import SpaceCard
from peft import LoraConfig, get_peft_model

from elm_ecg.ecg_drawing import ECGPaper, ecg_svg
from elm_ecg.ecg_utils import STANDARD_LEADS, read_ecg
from elm_ecg.training import cli
from elm_ecg.training.apps import conversation
from elm_ecg.training.apps import demo as demo_module
from elm_ecg.training.apps.conversation import as_message, read_for_model, stream_answer, zeroed
from elm_ecg.training.apps.demo import (
    NO_ECG,
    Page,
    as_text,
    build_demo,
    draw,
    example_files,
    serve,
    write_examples,
    write_space,
)
from helpers import run_isolated, save_record, tiny_elm, tiny_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def page(folder) -> Page:
    processor = tiny_processor()
    examples = example_files([save_record(folder / "walk_one.npz"), save_record(folder / "few.npz", leads=["I", "II"])])
    processor.system_prompt = "Be brief."
    return Page(tiny_elm(processor), processor, examples, max_new_tokens=4)


def save_wfdb(folder: Path) -> list[str]:
    """The files of a record of 2 s, each in a folder of its own, as Gradio keeps uploads."""
    wfdb = pytest.importorskip("wfdb")
    record = read_ecg(save_record(folder / "whole.npz"))
    wfdb.wrsamp(
        "walk",
        fs=500,
        units=["mV"] * 12,
        sig_name=list(record.lead_names),
        p_signal=record.array.T.astype(np.float64),
        fmt=["16"] * 12,
        write_dir=str(folder),
    )
    files = []
    for name in ("walk.hea", "walk.dat"):
        (folder / name[-3:]).mkdir()
        files.append(str((folder / name).rename(folder / name[-3:] / name)))
    return files


def test_upload_of_a_record_of_two_files(page, tmp_path):
    files = save_wfdb(tmp_path)
    ecgs, shown = page.upload(files)
    assert [ecg.name for ecg in ecgs] == ["walk.hea"]
    assert "all 12 leads, 500 Hz, 2 s" in shown
    assert shown.count("<svg") == 1
    ecgs, shown = page.upload(files[:1])
    assert not ecgs
    assert "&#x27;walk.dat&#x27; is not beside the header" in shown


def test_upload_of_several_ecgs(page, folder):
    ecgs, shown = page.upload([str(folder / "walk_one.npz"), str(save_record(folder / "two.npz", seed=1))])
    assert [ecg.name for ecg in ecgs] == ["walk_one.npz", "two.npz"]
    assert shown.count("<svg") == 2
    assert "Several files are named walk_one.npz" in page.upload([str(folder / "walk_one.npz")] * 2)[1]
    assert page.upload([]) == page.upload(None) == ([], NO_ECG)


def test_what_the_file_does_not_say(page, tmp_path):
    path = tmp_path / "bare.npy"
    np.save(path, np.rint(np.random.default_rng(0).normal(0, 100, (3, 1500))).astype(np.int16))
    ecgs, shown = page.upload([str(path)], None, "", "", None)
    assert not ecgs
    assert "no sampling rate" in shown
    zeros = Page(page.model, tiny_processor(missing_leads="zeros"), {})
    ecgs, shown = zeros.upload([str(path)], 500, "uV", "I, II V1", 1)
    assert ecgs[0].record.lead_names == ("I", "II", "V1")
    assert "The model reads 1 to 3 s of 3 s." in shown


def test_bad_upload_is_told_by_its_name(page, tmp_path):
    path = tmp_path / "bad<b>.xml"
    path.write_text("<script>alert(1)</script>")
    ecgs, shown = page.upload([str(path)])
    assert not ecgs
    assert "bad&lt;b&gt;.xml" in shown
    assert "<script>" not in shown
    assert not re.search(r"/tmp|\bpytest", shown)


def test_pick(page):
    ecgs, shown = page.pick("walk one")
    assert [ecg.name for ecg in ecgs] == ["walk one"]
    assert "<b>walk one</b>: all 12 leads" in shown
    assert "cannot be read" in page.pick("few")[1]
    assert page.pick(None) == page.pick("../etc/passwd") == ([], NO_ECG)


def test_each_reader_is_told_of_their_own_file(page, tmp_path, monkeypatch):
    """Also while another's is read, and each time."""
    names = {"mine.npz": "vx", "other.npz": "resp"}
    for name, lead in names.items():
        np.savez(tmp_path / name, array=np.zeros((13, 1000)), sampling_rate=500, lead_names=[*STANDARD_LEADS, lead])
    others = []

    def read(path, **described):
        record = read_ecg(path, **described)
        if path.name == "mine.npz":  # before this is told, another visitor comes
            others.append(page.upload([str(tmp_path / "other.npz")])[1])
        return record

    monkeypatch.setattr(conversation, "read_ecg", read)
    for _ in range(2):
        mine = page.upload([str(tmp_path / "mine.npz")])[1]
        assert "no standard lead has that name: vx." in mine
        assert "resp" not in mine
    assert len(others) == 2
    assert all("no standard lead has that name: resp." in other and "vx" not in other for other in others)


def test_drawing_is_what_the_model_reads(page, folder):
    """At its rate, and of its leads."""
    ecg = read_for_model(page.processor, folder / "walk_one.npz")
    drawing = draw(ecg)
    assert "10 mm/mV, 250 Hz" in drawing
    assert ecg_svg(ecg.prepared, ECGPaper("12x1"), "25 mm/s, 10 mm/mV, 250 Hz") in drawing


def test_answers_grow_and_are_compared_with_the_ecg_zeroed(page):
    ecgs, _ = page.pick("walk one")
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}

    def expected(given, *said):
        chat = [system, *said, as_message("user", "Why?", [] if said else given)]
        return "".join(stream_answer(page.model, page.processor, chat, max_new_tokens=4))

    *_, (turns, compared) = page.ask(" Why? ", ecgs, [], True, [])
    asked = {"role": "user", "content": "Why?"}
    assert turns == [asked, {"role": "assistant", "content": expected(ecgs)}]
    assert compared == [asked, {"role": "assistant", "content": expected([zeroed(ecgs[0])])}]
    # the next question is about the same ECG, and to the same words where it is zeroed
    steps = list(page.ask("Why?", ecgs, turns, True, compared))
    first, answer = as_message("user", "Why?", ecgs), [{"type": "text", "text": turns[1]["content"]}]
    said = (first, {"role": "assistant", "content": answer})
    assert steps[-1][0][:2] == turns
    assert steps[-1][0][-1]["content"] == expected(None, *said)
    assert len(steps[-1][1]) == 4
    # without comparison
    *_, (more, unchanged) = page.ask("Why?", ecgs, turns, False, compared)
    assert (len(more), unchanged) == (4, compared)
    assert not list(page.ask("  ", ecgs, [], True, []))


def test_why_an_answer_was_given(page):
    pytest.importorskip("captum")
    assert page.explains
    ecgs, _ = page.pick("walk one")
    with pytest.raises(ValueError, match="read one, and ask about it"):
        page.why(ecgs, [])
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<b>so</b>"}]
    shown = page.why(ecgs, turns)
    assert "&#x27;&lt;b&gt;so&lt;/b&gt;&#x27; has probability" in shown
    assert "fill-opacity" in shown
    with pytest.raises(ValueError, match="read one, and ask about it"):
        page.why([*ecgs, *ecgs], turns)


@pytest.mark.slow
def test_served_page(page, folder, tmp_path, monkeypatch):
    gradio_client = pytest.importorskip("gradio_client", reason="needs the extra demo")
    monkeypatch.chdir(tmp_path)
    demo = build_demo(page, "tiny")
    address = serve(demo)
    try:
        assert address.startswith("http://127.0.0.1:")
        assert demo.share_url is None
        client = gradio_client.Client(address, verbose=False, analytics_enabled=False)
        shown = client.predict(
            [gradio_client.handle_file(str(folder / "walk_one.npz"))], None, "", "", None, api_name="/upload"
        )
        assert "all 12 leads, 500 Hz, 2 s" in shown
        chats = [part["props"] for part in client.config["components"] if part["type"] == "chatbot"]
        assert [chat["latex_delimiters"] for chat in chats] == [[], []]
        assert not any(chat["render_markdown"] for chat in chats)
        asked = '<img src="http://127.0.0.1:9/a.png"> <form>$$x$$'
        job = client.submit(asked, True, api_name="/ask")
        question, answers, compared = job.result(timeout=60)
        assert question == ""
        texts = json.dumps([answers, compared])
        assert "&lt;img" in texts
        assert "<" not in texts
        assert [turn["role"] for turn in answers] == [turn["role"] for turn in compared] == ["user", "assistant"]
        bad = tmp_path / "bad.xml"
        bad.write_text("<a/>")
        shown = client.predict([gradio_client.handle_file(str(bad))], None, "", "", None, api_name="/upload")
        assert "cannot be read" in shown
    finally:
        demo.close()


def test_turns_are_no_html():
    """Gradio puts them into the page as HTML, whatever it is told of Markdown."""
    turns = [{"role": "user", "content": "ST < 1 mm & <b onclick='x()'>?</b>"}]
    assert as_text(turns) == [
        {"role": "user", "content": "ST &lt; 1 mm &amp; &lt;b onclick=&#x27;x()&#x27;&gt;?&lt;/b&gt;"}
    ]
    assert "<b" in turns[0]["content"]  # what the model reads stays


@pytest.mark.slow
def test_uploads_and_temporary_files_go(page, monkeypatch):
    """However the command ends: SIGTERM is a SystemExit."""
    gradio = pytest.importorskip("gradio", reason="needs the extra demo")
    places = []

    def serve_and_end(demo, *where):
        places.extend([Path(gradio.utils.get_upload_folder()), Path(tempfile.mkdtemp())])
        for place in places:
            (place / "patient.xml").write_text("<a/>")
        raise SystemExit(143)

    monkeypatch.setattr(demo_module, "load_model", lambda args: (page.model, page.processor, "tiny"))
    monkeypatch.setattr(demo_module, "serve", serve_and_end)
    before = tempfile.gettempdir(), gradio.utils.get_upload_folder()
    with pytest.raises(SystemExit, match="143"):
        demo_module.main(["tiny"])
    assert len(places) == 2
    assert not any(place.exists() for place in places)
    assert (tempfile.gettempdir(), gradio.utils.get_upload_folder()) == before


def test_without_gradio(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["demo", str(tmp_path)]) == 1
    assert "pip install gradio" in capsys.readouterr().err


def test_examples_are_simulated_records(tmp_path):
    paths = write_examples(tmp_path)
    assert list(example_files(paths))[1] == "Simulated atrial fibrillation"
    for path in paths:
        record = read_ecg(path)
        assert (record.array.shape, record.sampling_rate) == ((12, 5000), 500)


@pytest.mark.parametrize("adapter", [False, True])
def test_space(adapter, page, folder, tmp_path):
    space = tmp_path / "space"
    space.mkdir()
    write_space(space, "owner/my-elm", revision="abc123")
    card = SpaceCard.load(space / "README.md")
    assert card.data.to_dict() | {"emoji": None} == {
        "title": "Ask an ECG-language model: my-elm",
        "emoji": None,
        "sdk": "gradio",
        "sdk_version": "6.31.0",
        "python_version": "3.11",
        "app_file": "app.py",
        "license": "mit",
        "models": ["owner/my-elm"],
        "tags": ["ecg", "electrocardiogram", "elm"],
    }
    assert "not a medical device" in card.text
    requirements = (space / "requirements.txt").read_text().split()
    names = [re.split("[<>=]", line)[0] for line in requirements]
    assert names == [
        "defusedxml",
        "ecgdatakit",
        "edfio",
        "h5py",
        "numpy",
        "pillow",
        "pydicom",
        "torch",
        "transformers",
        "wfdb",
    ]
    assert json.loads((space / "space.json").read_text())["revision"] == "abc123"

    # runs without this project, with the code of the model's own folder
    model = base = tmp_path / "model"
    page.model.save_pretrained(base)
    if adapter:
        model = tmp_path / "adapter"
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=r".*language_model.*q_proj")
        get_peft_model(deepcopy(page.model), lora).save_pretrained(model)
        config = json.loads((model / "adapter_config.json").read_text())
        (model / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    page.processor.save_pretrained(model)
    (space / "space.json").write_text(json.dumps({"model": str(model), "revision": "main", "adapter": adapter}))
    code = """
import sys
from unittest.mock import MagicMock
sys.modules["gradio"] = MagicMock()  # which takes seconds to import; test_served_page has it
sys.path.insert(0, ".")
import app
assert app.__file__.endswith("space/app.py") and "transformers_modules" in type(app.model.get_base_model() if app.space["adapter"] else app.model).__module__
ecgs, shown = app.page.pick("Simulated sinus rhythm")
print("The model reads 0 to 2 s of 10 s." in shown, [turn["role"] for turn in list(app.page.ask("Why?", ecgs, [], False, []))[-1][0]])
"""
    assert run_isolated(code, space).split("\n")[-2] == "True ['user', 'assistant']"


def test_uploads_go_with_the_page(page, tmp_path, monkeypatch):
    """Also when SIGTERM ends it, which `elm` makes an exception."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(demo_module, "import_gradio", lambda: None)
    monkeypatch.setattr(demo_module, "load_model", lambda args: (page.model, page.processor, "tiny"))
    monkeypatch.setattr(demo_module, "serve", lambda *args: "http://127.0.0.1:7860")
    seen = []

    class Served:
        def block_thread(self):
            uploads = Path(os.environ["GRADIO_TEMP_DIR"]) / "upload"
            uploads.mkdir()
            (uploads / "ecg.xml").write_text("somebody's")
            seen.extend(tmp_path.rglob("ecg.xml"))
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 10)

        def close(self, verbose):
            pass

    monkeypatch.setattr(demo_module, "build_demo", lambda *args: Served())
    with pytest.raises(SystemExit, match="143"):
        cli.main(["demo", "tiny"])
    assert len(seen) == 1
    assert not list(tmp_path.iterdir())
