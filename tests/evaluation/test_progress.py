import pytest

from elm_ecg.training.evaluation.progress import Progress

ANSWERS = {("ecg", 0): ["a", "b\n\u2028c"], ("noise 1", 3): [[-1.5, -2.0]]}


@pytest.fixture
def progress(tmp_path) -> Progress:
    begun = Progress(tmp_path, ["model", "data"])
    begun.begin({"batch_size": 2})
    for (name, batch), answers in ANSWERS.items():
        begun.add(name, batch, answers)
    return begun


def test_progress(progress, tmp_path):
    with progress.path.open("a") as file:
        file.write('0123456789abcdef ["ecg", 1, ["cut')
    assert progress.read() == ANSWERS
    other = Progress(tmp_path, ["model", "data"], process=1)
    other.begin({"batch_size": 2})
    assert other.read() == ANSWERS
    assert other.path.read_text().count("\n") == 3  # the key, and whole lines alone
    for facts, settings in ((["other model", "data"], {"batch_size": 2}), (["model", "data"], {"batch_size": 3})):
        other = Progress(tmp_path, facts, process=1)
        other.begin(settings)
        assert other.read() == {}
    progress.remove()
    assert not list(tmp_path.iterdir())


def test_a_line_that_was_cut_does_not_spoil_the_next(progress):
    """As on a disk that was full for a while."""
    content = progress.path.read_bytes()
    progress.path.write_bytes(content[:-9])
    progress.add("ecg", 1, ["d"])
    (first, *_) = ANSWERS.items()
    assert progress.read() == dict([first, (("ecg", 1), ["d"])])


def test_damaged_lines_are_asked_again(progress):
    """Whatever byte is another, in the key or an answer: what is read of it was answered."""
    content = progress.path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        progress.path.write_bytes(damaged)
        found = progress.read()
        assert found.items() <= ANSWERS.items()
        assert len(found) < 2 or content[place : place + 1] == b"\n"
    progress.path.write_bytes(b"\xff\xfe\x00")
    assert progress.read() == {}
