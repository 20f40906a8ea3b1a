"""The options of `elm benchmark`."""

import argparse
from pathlib import Path

from elm_ecg.training.command_line import CommandLineParser, did_you_mean, whole_number
from elm_ecg.training.data.schema import SPLITS
from elm_ecg.training.evaluation.benchmarks.endpoint import check_address
from elm_ecg.training.evaluation.benchmarks.judge import KEY_VARIABLE
from elm_ecg.training.evaluation.benchmarks.suite import Suite
from elm_ecg.training.evaluation.conditions import ASKED, CONDITIONS


def make_parser(suites: dict[str, Suite]) -> argparse.ArgumentParser:
    """The options; of suites by their names."""
    parser = CommandLineParser(
        prog="elm benchmark",
        usage="elm benchmark MODEL --suite NAME[=PLACE] ... --records PLACE ... [options]",
        description="Scores a model on published benchmarks, with the ECG and without it.",
    )
    parser.add_argument(
        "model",
        help="a saved ELM or LoRA adapter; a language model, to which --describe tells the ECG in words; a model of transformers that reads "
        "pictures, which is shown the drawn ECG: a local folder or Hub id. With --endpoint the name that the endpoint has for it",
    )
    listed = "; ".join(f"{name}, {suite.title}, {suite.paper}" for name, suite in suites.items())
    parser.add_argument(
        "--suite",
        nargs="+",
        required=True,
        metavar="NAME[=PLACE]",
        help=f"{listed}. PLACE is the folder or file of its texts; needed but for those of ecg-reasoning, which are fetched from the Hub, and ptbxl",
    )
    parser.add_argument(
        "--records",
        nargs="+",
        required=True,
        metavar="PLACE",
        help="the ECGs that the texts are about: folders of PTB-XL, MIMIC-IV-ECG and others as they are downloaded, other folders of ECG files, "
        "or archives; where two have one record, the first counts",
    )
    parser.add_argument(
        "--metadata",
        type=Path,
        metavar="FILE",
        help="a table about the records, with patient_id, where their source does not say it",
    )
    parser.add_argument(
        "--split", default="test", choices=(*SPLITS, "all"), help="of suites that have several; default: %(default)s"
    )
    parser.add_argument(
        "--show_options",
        action="store_true",
        help="tell the possible answers of ecg-qa in its questions, as its paper does for language models",
    )
    parser.add_argument(
        "--conditions",
        nargs="+",
        default=list(ASKED),
        choices=ASKED,
        metavar="NAME",
        help=f"what is shown of the ECG ({'; '.join(f'{name}, {CONDITIONS[name].description}' for name in ASKED)}); ecg is always among them. "
        "Default: all",
    )
    _add_settings(parser)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """How the questions are asked, and where the results go."""
    parser.add_argument(
        "--describe",
        action="store_true",
        help="tell the ECG in words, as measured on the signal: rate, axis and intervals",
    )
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="ask a model behind an OpenAI-compatible address, such as http://localhost:8000/v1, whose key is in OPENAI_API_KEY",
    )
    parser.add_argument(
        "--limit", type=whole_number, metavar="N", help="ask N chats of each suite, drawn at random; default: all"
    )
    parser.add_argument(
        "--batch_size", type=whole_number, default=32, help="chats answered at once; default: %(default)s"
    )
    parser.add_argument(
        "--max_new_tokens",
        type=whole_number,
        help="longest answer, in tokens, thinking included; default: what the suite needs, and 512 more of a model that thinks",
    )
    parser.add_argument(
        "--judge_url",
        metavar="URL",
        help="OpenAI-compatible address, up to /v1, of a language model that judges the reports of ecgbench and the diagnoses of ecg-grounding; its "
        f"key is read from {KEY_VARIABLE}, and its replies are kept beside the results",
    )
    parser.add_argument("--judge_model", metavar="NAME", help="that the address of --judge_url has for the model")
    parser.add_argument("--system_prompt", help="in place of the model's own; none with an empty one")
    parser.add_argument("--dtype", default="auto", help="of the model: auto, float32, bfloat16 or float16")
    parser.add_argument("--model_revision", default="main", help="branch, tag or commit of a model on the Hub")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code that comes with the model; read it before"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of random conditions, --limit and the bootstrap; default: %(default)s"
    )
    parser.add_argument(
        "--num_resamples", type=whole_number, default=2000, help="bootstrap resamples of patients; default: %(default)s"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="FOLDER",
        help="gets a folder for each suite; default: folders of these settings in MODEL/evaluation, or in ./evaluation/MODEL",
    )
    parser.add_argument(
        "--beside",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="folders of other models' results of the same suites, which get rows of the tables too",
    )


def parse(argv: list[str] | None, suites: dict[str, Suite]) -> tuple[argparse.Namespace, dict[str, str | None]]:
    """The options, and suite -> the place of its texts, None where none is named.

    Raises:
        ValueError: a suite is unknown, named twice, or has no place though it is not on the Hub; or options do not go together.
    """
    args = make_parser(suites).parse_args(argv)
    chosen: dict[str, str | None] = {}
    for word in args.suite:
        name, _, place = word.partition("=")
        if name not in suites:
            raise ValueError(
                f"--suite {name}: there is no such suite.{did_you_mean(name, suites)} Suites: {', '.join(suites)}."
            )
        if name in chosen:
            raise ValueError(f"--suite {' '.join(args.suite)} names {name} twice.")
        if place and not Path(place).exists():
            raise ValueError(f"--suite {word}: there is no file or folder {place}.")
        if not place and suites[name].hub is None and suites[name].needs_texts:
            raise ValueError(
                f"--suite {name} is not on the Hub: say where its texts are, {name}=FOLDER. See {suites[name].paper}."
            )
        chosen[name] = place or None
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}; it must be at least 0.")
    of_weights = {"dtype": "auto", "model_revision": "main", "trust_remote_code": False}
    said = [name for name, default in of_weights.items() if getattr(args, name) != default]
    if args.endpoint is not None and said:
        raise ValueError(f"--{said[0]} changes nothing at the model behind --endpoint; leave it out.")
    if args.split != "test" and not any(suites[name].has_splits for name in chosen):
        raise ValueError(f"--split {args.split}: {', '.join(chosen)} has no splits; leave it out.")
    if (args.judge_url is None) != (args.judge_model is None):
        raise ValueError("--judge_url and --judge_model go together: where a judge is asked, and which; say both.")
    if args.judge_url is not None:
        check_address(args.judge_url, "judge_url")
    if args.judge_url is not None and all(suites[name].judge_prompt is None for name in chosen):
        judged = [name for name, suite in suites.items() if suite.judge_prompt is not None]
        raise ValueError(
            f"--judge_url changes nothing: of {', '.join(chosen)} nothing is judged, but of {' and '.join(judged)}."
        )
    if args.show_options and "ecg-qa" not in chosen:
        raise ValueError("--show_options is about ecg-qa, which is none of the suites; leave it out.")
    return args, chosen
