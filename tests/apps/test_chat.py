import io
import json
import os
import re
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image

from elm_ecg.ecg_utils import STANDARD_LEADS, filter_ecg, read_ecg, resample
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training.apps import chat as chat_module
from elm_ecg.training.apps.chat import Chat, history_path, main, run
from elm_ecg.training.apps.conversation import PromptCache, as_message, read_for_model, stream_answer
from elm_ecg.training.command_line import printable
from elm_ecg.training.data.loading import to_chat
from foreign_templates import of_trl, processor_of
from helpers import (
    save_record,
    tiny_elm,
    tiny_elm_config,
    tiny_image_elm_config,
    tiny_image_processor_elm,
    tiny_llm_config,
    tiny_processor,
    tiny_symbolic_processor,
)


@pytest.fixture(scope="module")
def model(processor) -> ELMForConditionalGeneration:
    return tiny_elm(processor)


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("records")
    return [save_record(folder / f"rec{seed}.npz", seed=seed) for seed in range(2)]


@pytest.fixture
def chat(model, processor, tmp_path, monkeypatch) -> Chat:
    monkeypatch.chdir(tmp_path)
    return Chat(model, processor, "tiny", max_new_tokens=4)


def type_lines(monkeypatch, *lines: str | BaseException, by_hand: bool = True) -> None:
    """What the user types, or a script holds; an exception is a key such as Ctrl-C."""
    left = iter(lines)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: by_hand))

    def read(prompt: str = "") -> str:
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)


def test_what_was_read_is_said(processor, tmp_path):
    path = save_record(tmp_path / "long.npz", 5.0, [lead for lead in STANDARD_LEADS if lead not in ("III", "aVF")])
    for _ in range(2):  # each time that it is read
        ecg = read_for_model(processor, path, start=1.5)
        assert ecg.facts.startswith("leads I, II, aVR, aVL, V1, V2, V3, V4, V5, V6, 500 Hz, 5 s. ")
        assert "Derived from I and II: III, aVF." in ecg.facts
        assert "The model reads 1.5 to 3.5 s of 5 s." in ecg.facts
        assert "III, aVR, aVL or aVF differ by more than 0.05 mV" in ecg.facts  # the walks of aVR and aVL are free
    assert np.array_equal(ecg.record.array, read_ecg(path).array)
    assert np.array_equal(ecg.prepared.array, processor.feature_extractor.prepare(path, start=1.5).array)
    assert "The model reads 0 to 2 s of 5 s." in read_for_model(processor, path).facts
    assert "Longer than the 2 s that the model reads: a part of it is cut off." in read_for_model(processor, path).facts
    assert "Shorter than the 2 s that the model reads." in read_for_model(processor, path, start=4).facts


def test_faults_of_leads_are_told(processor, tmp_path):
    path = save_record(tmp_path / "flat.npz")
    with np.load(path) as members:
        array = members["array"]
        array[[6, 8]] = 0
        np.savez(path, **{**members, "array": array})
    assert " Flat: V1, V3." in read_for_model(processor, path).facts


def test_part_that_is_kept_is_that_of_the_model(tmp_path):
    path = save_record(tmp_path / "long.npz", 5.0)
    for truncation, seconds in (("center", "1.5 to 3.5 s"), ("end", "3 to 5 s")):
        processor = tiny_processor(truncation=truncation)
        ecg = read_for_model(processor, path)
        assert seconds in ecg.facts
        values = [processor.feature_extractor(one)["ecg_values"] for one in (ecg.record, str(path))]
        assert np.array_equal(*values)


def test_model_reads_the_filtered_record_from_any_second(tmp_path):
    """And not a part that was cut before it was filtered, whose ends are another signal's."""
    processor = tiny_processor(bandpass=[0.5, 40], notch=50, normalization="zscore")
    path = save_record(tmp_path / "long.npz", 20.0)
    record = read_ecg(path)
    whole = filter_ecg(resample(record.array, 500, 250), 250, (0.5, 40), 50)
    for start in (0, 7.3, 18):
        ecg = read_for_model(processor, path, start=start)
        part = whole[:, round(250 * start) :][:, :500]
        assert np.allclose(ecg.prepared.array, part, atol=1e-3)
        inputs = processor.apply_chat_template(
            [as_message("user", "Why?", [ecg])], tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert np.allclose(inputs["ecg_values"][0], (part - part.mean()) / part.std(), atol=5e-3)


def test_model_with_code_before_this_program(processor, records, monkeypatch):
    monkeypatch.delattr(type(processor.feature_extractor), "prepare")
    with pytest.raises(ValueError, match="save it again with the present elm-ecg"):
        read_for_model(processor, records[0])


def test_missing_leads(processor, tmp_path):
    path = save_record(tmp_path / "few.npz", leads=["I", "II", "V2"])
    with pytest.raises(ValueError, match=r"few\.npz: The ECG has no lead V1, V3, V4, V5, V6"):
        read_for_model(processor, path)
    facts = read_for_model(tiny_processor(missing_leads="zeros"), path).facts
    assert facts.endswith("Derived from I and II: III, aVR, aVL, aVF. Missing: V1, V3, V4, V5, V6.")


def test_ecg_for_a_text_only_model(records):
    with pytest.raises(ValueError, match="text-only"):
        read_for_model(tiny_processor(num_ecg_tokens=0), records[0])


def test_start_outside_the_record(processor, records):
    with pytest.raises(ValueError, match=r"rec0\.npz: start is 2 s; expected a second of the ECG, which has 2 s"):
        read_for_model(processor, records[0], start=2)


@pytest.mark.parametrize("sliding_window", [None, 32])
def test_cache_gives_the_same_answers(sliding_window, processor, records, monkeypatch):
    """An ECG in the first and one in the third turn; a sliding window may forget what would be cut back."""
    if sliding_window is None:
        model = tiny_elm(processor)
    else:
        processor = tiny_processor("gemma2")
        model = tiny_elm(processor, llm=tiny_llm_config("gemma2"))
    read: list[int] = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model,
        "forward",
        lambda *args, **kwargs: read.append(kwargs["input_ids"].shape[1]) or forward(*args, **kwargs),
    )
    ecgs = [read_for_model(processor, path) for path in records]
    cache, turns = PromptCache(), []
    for number, (question, new) in enumerate((("What?", ecgs[:1]), ("Why?", []), ("And this?", ecgs[1:]), ("So?", []))):
        turns.append(as_message("user", question, new))
        plain = "".join(stream_answer(model, processor, turns, max_new_tokens=6))
        whole = max(read)
        read.clear()
        assert "".join(stream_answer(model, processor, turns, max_new_tokens=6, cache=cache)) == plain
        if number and sliding_window is None:
            assert read[0] < 0.7 * whole  # the rest was known
        read.clear()
        turns.append({"role": "assistant", "content": [{"type": "text", "text": plain.strip()}]})


def test_closing_an_answer_stops_the_model(model, processor, monkeypatch):
    made = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: made.append(1) or forward(*args, **kwargs))
    torch.manual_seed(0)
    answer = stream_answer(model, processor, [as_message("user", "What?", [])], max_new_tokens=900, temperature=9.0)
    next(answer)  # as soon as there is a space
    answer.close()
    assert len(made) < 900


def test_errors_of_the_thread_reach_the_reader(model, processor, monkeypatch):
    def generate(**kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream_answer(model, processor, [as_message("user", "What?", [])]))


@pytest.mark.parametrize(
    ("written", "answer", "name", "settings"),
    [
        ("<think>\n\n</think>\n\nyes, it is", "yes, it is", "qwen3_training", {}),
        ("<think>\nBecause.\n</think>\n\nyes", "<think>\nBecause.\n</think>\n\nyes", "qwen3_training", {}),
        (" yes", "yes", "qwen3_training", {}),
        ("<", "<", "qwen3_training", {}),
        ("<think>\n\n</think>", "", "qwen3_training", {}),
        # what a prompt has of an answer is shown with it
        ("Because.\n</think>\nyes", "<think>\nBecause.\n</think>\nyes", "qwen3_training", {"explicit_thinking": True}),
        ("Because.\n</think>\nyes", "<think>\nBecause.\n</think>\nyes", "qwen3_5_think", {}),
        ("\n</think>\n\nyes", "yes", "qwen3_5_think", {}),
    ],
)
def test_what_the_template_writes_before_an_answer_is_not_shown(written, answer, name, settings):
    """Of Qwen3 an empty thinking block, in pieces as the model writes it."""
    qwen3 = processor_of(of_trl(name), **settings)

    class Writes:
        device, config = torch.device("cpu"), SimpleNamespace(get_text_config=lambda decoder: None)

        def generate(self, input_ids, streamer, **kwargs):
            for ids in [input_ids, *torch.tensor(qwen3.tokenizer(written)["input_ids"]).split(1)]:
                streamer.put(ids)
            streamer.end()
            return input_ids

    assert "".join(stream_answer(Writes(), qwen3, [as_message("user", "What?", [])])) == answer


def test_full_context(model, processor):
    with pytest.raises(ValueError, match=r"has 1\d\d\d tokens and the model reads 1024"):
        list(stream_answer(model, processor, [as_message("user", "x" * 1100, [])]))
    assert "".join(stream_answer(model, processor, [as_message("user", "x" * 900, [])], max_new_tokens=900))


def test_temperature_draws(model, processor):
    turn = [as_message("user", "What?", [])]
    torch.manual_seed(1)
    drawn = {"".join(stream_answer(model, processor, turn, max_new_tokens=8, temperature=5.0)) for _ in range(3)}
    assert len(drawn) > 1
    greedy = {"".join(stream_answer(model, processor, turn, max_new_tokens=8)) for _ in range(2)}
    assert len(greedy) == 1


def test_conversation(chat, records, monkeypatch, capsys):
    type_lines(monkeypatch, f"/ecg {records[0]}", "What is it?", "", "Why?", "/ecg", "/quit", "not read")
    run(chat)
    out, err = capsys.readouterr()
    assert not err
    assert out.count("rec0.npz: all 12 leads, 500 Hz, 2 s.") == 2
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    kinds = [[part["type"] for part in message["content"]] for message in chat.messages]
    assert kinds == [["ecg", "text"], ["text"], ["text"], ["text"]]
    assert printable(chat.messages[1]["content"][0]["text"]) in out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/what", "There is no command /what"),
        ("/ecg none.npz", "none.npz"),
        ("/ecg bad.xml", "bad.xml"),
        ("/ecg --start soon", "argument --start: invalid float value: 'soon'"),
        ("/ecg --speed 1", "unrecognized arguments: --speed"),
        ("/ecg O'Neill.xml", "/ecg: No closing quotation; put a name that holds a quote into quotes of the other kind"),
        ("/plot", "no ECG to draw"),
        ("/save", "takes one FILE.json, but got 0 names"),
        ("/save chat.txt", "chat.txt is no .json file"),
        ("/save chat.json", "No question was answered yet"),
        ("/save none/chat.json", "there is no folder none"),
        ("/clear all", "takes no argument, but got 'all'"),
        ("What is <signal>?", "Of a chat the template writes them: there no text may hold <signal>."),
    ],
)
def test_an_error_is_a_line(chat, line, said, monkeypatch, capsys):
    Path("bad.xml").write_text("<a/>")
    type_lines(monkeypatch, line, "What is it?")
    run(chat)
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert said in error
    assert "Traceback" not in error
    assert len(chat.messages) == 2  # the chat went on


@pytest.mark.parametrize("line", ["/ecg none.npz", '/ecg "', "/ecg --speed 1", "/what", "What is <signal>?"])
def test_an_error_ends_a_script(line, chat, monkeypatch):
    """Else its next question would be answered without the ECG."""
    type_lines(monkeypatch, "First?", line, "What is it?", by_hand=False)
    with pytest.raises(ValueError, match=f"^Line 2 of standard input, {re.escape(repr(line))}: .* were not read"):
        run(chat)
    assert [turn["role"] for turn in chat.messages] == ["user", "assistant"]  # the first question alone
    type_lines(monkeypatch, "First?", KeyboardInterrupt(), "What is it?", by_hand=False)
    with pytest.raises(KeyboardInterrupt):
        run(chat)


def test_a_failed_ecg_is_told_before_the_answer(chat, records, monkeypatch, capsys):
    type_lines(monkeypatch, "/ecg none.npz", "What is it?", "Why?", f"/ecg {records[0]}", "/ecg none.npz", "And now?")
    run(chat)
    said = capsys.readouterr().out
    assert said.count("(The last /ecg failed: you ask without an ECG.)\n") == 1
    assert said.count("(The last /ecg failed: you ask about rec0.npz.)\n") == 1
    type_lines(monkeypatch, "/ecg none.npz", f"/ecg {records[0]}", "What is it?")
    run(chat)
    assert "failed" not in capsys.readouterr().out


def test_several_ecgs_are_read_all_or_none(chat, records):
    with pytest.raises(OSError, match="none"):
        chat.command(f"/ecg {records[0]} none.npz")
    assert not chat.ecgs
    chat.command(f"/ecg {records[0]} {records[1]}")
    list(chat.ask("Are they the same?"))
    assert [part["type"] for part in chat.messages[0]["content"]] == ["ecg", "ecg", "text"]


def test_ctrl_c_stops_the_answer_alone(chat, monkeypatch, capsys):
    def stream(*args, **kwargs):
        yield "It is "
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat_module, "stream_answer", stream)
        type_lines(patch, KeyboardInterrupt(), "What is it?", "/quit")
        run(chat)
    out = capsys.readouterr().out
    assert "Ctrl-D or /quit ends the chat." in out
    assert out.endswith("It is \n(stopped)\n")
    assert chat.messages[1]["content"][0]["text"] == "It is"


def test_answers_do_not_steer_the_terminal(chat, monkeypatch, capsys):
    monkeypatch.setattr(
        chat_module, "stream_answer", lambda *args, **kwargs: (piece for piece in ["\x1b[2Jyes\n", "or no"])
    )
    type_lines(monkeypatch, "What is it?", "/quit")
    run(chat)
    assert capsys.readouterr().out == "\ufffd[2Jyes\nor no\n"


def test_records_do_not_steer_the_terminal(chat, tmp_path, capsys):
    """Neither by a lead's name, nor by that of the file, nor in errors."""
    leads = [*STANDARD_LEADS, "\x1b]0;x\x07\u202e"]
    path = save_record(tmp_path / "a\x9b2J.npz", leads=leads)
    chat.command(f"/ecg '{path}'")
    out = capsys.readouterr().out
    assert "\ufffd]0;x\ufffd\ufffd" in out
    assert not set("\x1b\x07\x9b\u202e") & set(out)


def test_clear(chat, records):
    chat.command(f"/ecg {records[0]}")
    list(chat.ask("What?"))
    chat.command("/clear")
    assert not chat.messages
    assert not chat.ecgs
    list(chat.ask("What?"))
    assert [part["type"] for part in chat.messages[0]["content"]] == ["text"]


def test_saved_chat_is_a_row(chat, records, capsys):
    chat.command(f"/ecg {records[0]}")
    list(chat.ask("What?"))
    chat.command(f"/ecg {records[1]}")
    list(chat.ask("And this?"))
    chat.command("/save chat.json")
    assert str(Path("chat.json").resolve()) in capsys.readouterr().out
    row = json.loads(Path("chat.json").read_text())
    assert row["model"] == "tiny"
    assert np.array_equal(np.float32(row["ecg"][1]["array"]), read_ecg(records[1]).array)
    for loaded in (row, load_dataset("json", data_files="chat.json", split="train", cache_dir="cache")[0]):
        again = to_chat(loaded)
        assert [[part["type"] for part in message["content"]] for message in again] == [["ecg", "text"], ["text"]] * 2
        inputs = [
            chat.processor.apply_chat_template(c, tokenize=True, return_dict=True) for c in (again, chat.messages)
        ]
        assert inputs[0]["input_ids"] == inputs[1]["input_ids"]
        assert np.allclose(inputs[0]["ecg_values"], inputs[1]["ecg_values"], atol=1e-6)


def test_saved_chat_holds_what_was_read_as_it_was_recorded(chat, tmp_path):
    path = save_record(tmp_path / "long.npz", 5.0)
    chat.command(f"/ecg {path} --start 1.5")
    chat.command(f"/ecg {path} --start 4")
    list(chat.ask("Are they the same?"))
    first, second = (np.float32(ecg["array"]) for ecg in chat.row()["ecg"])
    assert np.array_equal(first, read_ecg(path).array[:, 750:1750])
    assert np.array_equal(second, read_ecg(path).array[:, 2000:])


def test_plot(chat, records, capsys):
    chat.command(f"/ecg {records[0]}")
    chat.command("/plot")
    with Image.open("rec0.png") as picture:
        assert picture.format == "PNG"
    chat.command(f"/ecg {records[1]}")
    chat.command("/plot both.svg")
    assert {path.name for path in Path().glob("*.svg")} == {"both-1.svg", "both-2.svg"}
    assert capsys.readouterr().out.count("Picture of") == 3


def test_history_is_private(monkeypatch, tmp_path):
    pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    before = os.umask(0o022)
    with chat_module._history():
        chat_module.readline.add_history("What is it?")
    os.umask(before)
    path = history_path()
    assert path == tmp_path / "state" / "elm" / "chat_history"
    assert "What is it?" in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_script_on_standard_input(model, processor, records, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    prompt = tmp_path / "system.txt"
    prompt.write_text("Be brief.\n")
    monkeypatch.chdir(tmp_path)
    script = f"/ecg {records[0]}\nWhat is it?\n/save chat.json\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(script))
    main([str(folder), "--max_new_tokens", "3", "--system_prompt", str(prompt)])
    out = capsys.readouterr().out
    assert "It reads ECGs of 12 leads and 2 s." in out
    assert "not a medical device" in out
    row = json.loads(Path("chat.json").read_text())
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][0]["content"][0]["text"] == "Be brief."


def test_script_in_another_encoding(chat, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Größe?\n".encode("latin-1")), "utf-8"))
    with pytest.raises(ValueError, match=r"^Standard input is no text in utf-8 .*; save it in that encoding"):
        run(chat)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        main([str(tmp_path)])


@pytest.mark.parametrize("representation", ["symbolic", "rgb"])
def test_other_representations(representation, records, tmp_path, monkeypatch, capsys):
    """Two questions about one ECG, as tokens in the text and as a drawing; the answers are those without a kept prefix."""
    monkeypatch.chdir(tmp_path)
    if representation == "rgb":
        processor = tiny_image_processor_elm("vit")
        config = tiny_image_elm_config("vit", llm=tiny_llm_config(vocab_size=len(processor.tokenizer)))
        config.ecg_token_id = processor.ecg_token_id
    else:
        processor = tiny_symbolic_processor()
        llm = tiny_llm_config(vocab_size=len(processor.tokenizer), max_position_embeddings=8192)
        config = tiny_elm_config(None, llm=llm, representation="symbolic")
    torch.manual_seed(0)
    chat = Chat(ELMForConditionalGeneration(config).eval(), processor, "tiny", max_new_tokens=6)
    type_lines(monkeypatch, f"/ecg {records[0]}", "Why?", "And now?", "/save chat.json", "/quit")
    run(chat)
    printed = capsys.readouterr().out
    assert "all 12 leads, 500 Hz, 2 s" in printed
    (row,) = load_dataset("json", data_files=str(tmp_path / "chat.json"), cache_dir=str(tmp_path / "cache"))["train"]
    turns = to_chat(row)
    for place in (1, 3):
        inputs = processor.apply_chat_template(
            turns[:place], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = chat.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        text = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        assert turns[place]["content"][0]["text"].strip() == text.strip()


def test_why_an_answer_was_given(chat, records, tmp_path, capsys):
    """Pictures and figures of the last answer; of a chat about one ECG alone."""
    pytest.importorskip("captum")
    with pytest.raises(ValueError, match="asked about 0"):
        chat.command("/why")
    chat.command(f"/ecg {records[0]}")
    for question in ("Fast?", "Slow?"):
        list(chat.ask(question))
    assert chat.command("/why")
    values = json.loads((tmp_path / "rec0-why.json").read_text())
    assert values["question"] == "Slow?"
    assert values["answer"] == chat.messages[-1]["content"][-1]["text"]
    assert (tmp_path / "rec0-why.png").is_file()
    assert f"has probability {values['probability']:.2g}; it rests most on" in capsys.readouterr().out
    chat.command(f"/ecg {records[1]}")
    list(chat.ask("And this?"))
    with pytest.raises(ValueError, match="asked about 2"):
        chat.command("/why other")
