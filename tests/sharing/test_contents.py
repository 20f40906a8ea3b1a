import json

import pytest

from elm_ecg.training.files import resource
from elm_ecg.training.sharing.contents import check_contents, module_file, own_file
from helpers import tiny_processor

TOKEN = "hf_" + "a" * 34


def check(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    check_contents(folder, {name: folder / name})


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "adapter_config.json",
        "processor_config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "model.safetensors.index.json",
    ],
)
def test_configurations(name, tmp_path):
    """Of any depth, as a key or a text, also where escapes of JSON hide it."""
    for content, message in (
        ({"a": [{"b": f"token {TOKEN}"}]}, "has a token or key, hf_aaa"),
        ({"a": {"DOE^JANE": 1}}, r"has 'DOE\^JANE', which may be of a patient"),
        ({"a": ["Müller^Jörg"]}, r"Müller\^Jörg"),
        ({"patient_name": "Jane Doe"}, "patient_name: Jane Doe"),
        ({"a": ["/home/jane/ecgs"]}, "'/home/jane/ecgs', a folder of this machine"),
        ({"a": "of C:\\Users\\jane\\ecgs"}, "a folder of this machine"),
        ({"a": {"hub_token": "secret"}}, "has a secret in 'hub_token'"),
        ({"a": [{"API_KEY": "0123"}]}, "has a secret in 'API_KEY'"),
    ):
        with pytest.raises(ValueError, match=rf"{name}.*{message}"):
            check(tmp_path, name, json.dumps(content))
    with pytest.raises(ValueError, match="is not JSON, or damaged: the key 'a' is there twice"):
        check(tmp_path, name, '{"a": "x", "a": "y"}')
    for content in ("{", "[" * 10000 + "]" * 10000):
        with pytest.raises(ValueError, match="is not JSON, or damaged"):
            check(tmp_path, name, content)
    fine = {"eos_token": "</s>", "hub_token": None, "a": [1, "of 2014-03-12", True], "_name_or_path": "owner/name"}
    check(tmp_path, name, json.dumps(fine))


@pytest.mark.parametrize("name", ["chat_template.jinja", "modeling_mine.py", "LICENSE", "NOTICE.md"])
def test_texts(name, tmp_path):
    for content, message in (
        (f'token = "{TOKEN}"', "has a token or key"),
        ("key = 'sk-proj-abcdefghijklmnopqrst'", "has a token or key, sk-pro"),
        ("-----BEGIN RSA PRIVATE KEY-----", "has a token or key"),
        ("https://jane:secret@example.org", "has a token or key"),
        ('password = "correcthorse"', "has a password or key"),
        ("# /Users/jane/models", "a folder of this machine"),
        ("Patient name: Jane Doe", "which may be of a patient"),
    ):
        with pytest.raises(ValueError, match=rf"{name}.*{message}"):
            check(tmp_path, name, content)
    check(
        tmp_path,
        name,
        "26 Jul 2024, hf_notes_about_the_stack, https://example.org/home/x, task-specific_vocabulary_of_words",
    )


def test_words_of_a_language_model(tmp_path):
    """Among hundreds of thousands, some look like names; a token or a path is none of them. What was added is looked at."""
    tokenizer = tiny_processor().tokenizer
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"ab^cd": 900, "/home/": 901}
    content["model"]["merges"] = [["ab", "^cd"], ["xy^zz", "mrn:1"]]
    check(tmp_path, "tokenizer.json", json.dumps(content))
    content["model"]["vocab"][TOKEN] = 902
    with pytest.raises(ValueError, match=r"tokenizer\.json has a token or key"):
        check(tmp_path, "tokenizer.json", json.dumps(content))
    del content["model"]["vocab"][TOKEN]
    content["added_tokens"][0]["content"] = "DOE^JANE"
    with pytest.raises(ValueError, match=r"has 'DOE\^JANE'"):
        check(tmp_path, "tokenizer.json", json.dumps(content))
    for name, words in (
        ("merges.txt", "a b\nxy^zz mrn:1\n"),
        ("vocab.json", '{"ab^cd": 1}'),
        ("tokenizer.model", b"\xff\x00ab^cd"),
    ):
        check(tmp_path, name, words)
        with pytest.raises(ValueError, match=rf"{name} .*folder of this machine"):
            check(tmp_path, name, '{"/home/jane/x": 1}')


def test_our_own_code_is_nobodys(tmp_path):
    modules = {path.name: path for path in resource("").glob("[!_]*.py")}
    assert len(modules) > 10
    check_contents(resource(""), modules)


def test_links(tmp_path):
    """Those within the folder, and of the Hub's cache, lead to what is shared anyhow."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "abcd").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abcd")
    (snapshot / "processor_config.json").symlink_to("config.json")
    check_contents(snapshot, {name: snapshot / name for name in ("config.json", "processor_config.json")})
    assert own_file(snapshot, snapshot / "not_there.json").name == "not_there.json"
    (tmp_path / "secret.json").write_text("{}")
    (snapshot / "vocab.json").symlink_to(tmp_path / "secret.json")
    (snapshot / "data").symlink_to(tmp_path)
    for name in ("vocab.json", "data/secret.json"):
        with pytest.raises(ValueError, match=rf"{name} is a link to .*secret\.json, outside of the folder"):
            check_contents(snapshot, {name: snapshot / name})
    other = tmp_path / "run"
    other.mkdir()
    (other / "config.json").symlink_to(blobs / "abcd")
    with pytest.raises(ValueError, match="outside of the folder"):
        check_contents(other, {"config.json": other / "config.json"})


@pytest.mark.parametrize("module", ["/etc/passwd", "../secret", "a/b", "", "a.b", "C:\\x"])
def test_code_that_is_named_by_a_path(module, tmp_path):
    with pytest.raises(ValueError, match=r"names the code .*; expected a module beside it"):
        module_file(tmp_path, module, tmp_path / "config.json")
    assert module_file(tmp_path, "modeling_elm", tmp_path / "config.json") == tmp_path / "modeling_elm.py"
