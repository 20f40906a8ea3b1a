from dataclasses import fields

import pytest

from elm_ecg.training.data.arguments import BuildArguments, in_python
from elm_ecg.training.dataset_commands import make_parser


def test_defaults_of_the_command_are_those_of_python():
    args = make_parser().parse_args(["build", "records", "--output_dir", "out"])
    assert (
        BuildArguments(**{option.name: getattr(args, option.name) for option in fields(BuildArguments)})
        == BuildArguments()
    )


def test_options_of_the_command():
    options = "--window 5 --stride 2.5 --resample 250 --sampling_rate 500 --lead_names I II --shares 0.5 0.25 0.25 --num_proc 2"
    args = make_parser().parse_args(["build", "records", "--output_dir", "out", "--sort_answers", *options.split()])
    assert [args.window, args.stride, args.resample, args.sampling_rate] == [5, 2.5, 250, 500]
    assert [args.lead_names, args.shares, args.num_proc, args.sort_answers] == [["I", "II"], [0.5, 0.25, 0.25], 2, True]


def test_one_spelling_of_the_rate_of_files(capsys):
    with pytest.raises(SystemExit, match="2"):
        make_parser().parse_args(["build", "records", "--output_dir", "out", "--sampling_rate_of_files", "100"])
    assert "--sampling_rate_of_files. Did you mean --sampling_rate?" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["sampling_rate", "resample", "window", "stride"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_not_above_0(option, value):
    with pytest.raises(ValueError, match=f"--{option} is {value}; expected a number above 0"):
        BuildArguments(**{option: value})


def test_stride_without_window():
    with pytest.raises(ValueError, match="--stride is from one window to the next"):
        BuildArguments(stride=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": 0.8}, "--shares is 0.8; expected a list"),
        ({"shares": (0.8, 0.2)}, "--shares is 0.8 0.2; expected three numbers that sum to 1"),
        ({"shares": (0.8, 0.1, "0.1")}, "expected three numbers"),
        ({"lead_names": "I II"}, "--lead_names is 'I II'; expected a list"),
        ({"question_types": "rhythm"}, "--question_types is 'rhythm'; expected a list"),
        ({"columns": "site"}, "--columns is 'site'; expected a list"),
        ({"columns": ["answer=a", "answer=b"]}, "--columns is answer=a answer=b; expected each name once"),
        ({"join_questions": "no"}, "--join_questions is 'no'; expected True or False"),
        ({"seed": "1"}, "--seed is '1'; expected a whole number of at least 0"),
        ({"num_proc": 0}, "--num_proc is 0; expected a whole number of at least 1"),
        ({"window": "10"}, "--window is 10; expected a number above 0"),
    ],
)
def test_values_of_another_kind(options, message):
    with pytest.raises(ValueError, match=message):
        BuildArguments(**options)


def test_names_of_columns():
    options = BuildArguments(columns=["question=Frage", "site", "unit=a=b"])
    assert options.names == {"question": "Frage", "site": "site", "unit": "a=b"}


def test_messages_of_python():
    said = "--shares is 1 2; see --split_by patient (--skip_unreadable), --metadata, not --metadata_of or --other."
    expected = "`shares` is 1 2; see `split_by` patient (`skip_unreadable`), `metadata`, not --metadata_of or --other."
    assert in_python(said) == expected
