"""How much a frozen encoder tells of labels, beside random weights and a plain CNN: `elm probe ENCODER --data D`.

A linear probe (logistic regression) learns from the mean over the encoder's tokens, with some of the training patients and with all.
The same encoder with random weights is probed beside it, as on many tasks it is as good (arXiv 2602.17531).
"""

import argparse
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from elm_ecg.feature_extraction_elm import NORMALIZATIONS, TRUNCATIONS
from elm_ecg.training.command_line import CommandLineParser, printable, whole_number
from elm_ecg.training.data.schema import SPLITS
from elm_ecg.training.digest import digest_of_folder
from elm_ecg.training.encoders import EXTRACTOR_OPTIONS, LoadedEncoder, load_encoder
from elm_ecg.training.evaluation.probe_data import ProbeData, draw_patients, load_records
from elm_ecg.training.evaluation.probe_features import Features, compute_features
from elm_ecg.training.evaluation.probe_models import cnn_steps, linear_probe, train_cnn
from elm_ecg.training.evaluation.probe_prompts import read_prompts, zero_shot
from elm_ecg.training.evaluation.probe_report import to_markdown, write_probe_report
from elm_ecg.training.evaluation.probe_results import (
    OTHERS,
    PROBE_SCHEMA,
    ZERO_SHOT,
    metric_of,
    save_probe,
    summarise,
    verdict,
)
from elm_ecg.training.evaluation.questions import digest
from elm_ecg.training.evaluation.results import PROBE_FILE, PROBES, REPORT_FILE, identity_of, move_old_results
from elm_ecg.training.files import check_output_folder

PACKAGES = ("elm-ecg", "torch", "transformers", "datasets", "scikit-learn")
SETTINGS = (
    "shares",
    "draws",
    "seed",
    "num_resamples",
    "label_columns",
    "min_records",
)  # options that change the results


def make_parser() -> argparse.ArgumentParser:
    """The options of `elm probe`."""
    parser = CommandLineParser(prog="elm probe", usage="elm probe ENCODER --data DATA [options]", description=__doc__)
    add = parser.add_argument
    add(
        "encoder",
        help="folder or Hub id of an ECG encoder, a pretraining model, an ELM or its adapter, or a vision backbone",
    )
    add("--revision", default="main", help="branch, tag or commit of an encoder on the Hub")
    add("--trust_remote_code", action="store_true", help="run the code that comes with an encoder")
    add(
        "--data",
        nargs="+",
        required=True,
        help="datasets with the splits train, validation and test: folders, Hub ids or keys",
    )
    add("--fold", type=int, help="fold of datasets that have splits such as fold1_train and fold1_test")
    add("--ecg_root", help="folder of the ECG files that a dataset names; default: its own, if it is local")
    add(
        "--label_columns",
        nargs="+",
        metavar="NAME",
        help="columns that say what a record has: lists or texts of names separated by semicolons, or 0 and 1; default: `labels`, or what "
        "questions with the answers yes and no ask",
    )
    add(
        "--min_records",
        type=whole_number,
        default=10,
        help="training records that a label needs, with it and without; default: 10",
    )
    add(
        "--shares",
        type=float,
        nargs="+",
        default=[0.01, 0.1, 1.0],
        help="shares of the training patients to learn from; default: 0.01 0.1 1",
    )
    add("--draws", type=whole_number, default=5, help="random draws of patients, for each share below 1; default: 5")
    add(
        "--zero_shot",
        action="store_true",
        help="require zero-shot scores by text prompts, which a contrastive encoder gets anyway",
    )
    add(
        "--prompts",
        type=Path,
        metavar="FILE.yaml",
        help="texts that stand for the labels, one or a list for each; default: their names",
    )
    add(
        "--sampling_rate",
        type=float,
        metavar="HZ",
        help="sampling rate of an encoder that has no preprocessor_config.json; the next two are for such an encoder too",
    )
    add(
        "--lead_names",
        nargs="+",
        metavar="LEAD",
        help="leads that the encoder reads, in order; default: the twelve standard ones",
    )
    add("--normalization", choices=NORMALIZATIONS, help="normalization of the records; default: none")
    add(
        "--truncation",
        choices=TRUNCATIONS[1:],
        help="part of longer records that is kept; default: as the encoder says",
    )
    add("--batch_size", type=whole_number, default=64, help="records encoded at once; default: 64")
    add("--seed", type=int, default=0, help="random seed of weights, draws, the CNN and the bootstrap; default: 0")
    add("--num_resamples", type=whole_number, default=2000, help="bootstrap resamples of patients; default: 2000")
    add(
        "--output_dir",
        type=Path,
        help="folder of the results; default: one of this data and these settings in ENCODER/probe, or ./probe",
    )
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked.

    Raises:
        ValueError: one is not as expected.
    """
    args = make_parser().parse_args(argv)
    for share in args.shares:
        if not 0 < share <= 1:  # `not` refuses NaN too
            raise ValueError(
                f"--shares has {share:g}; expected shares of the training patients, above 0 and at most 1."
            )
    if len(set(args.shares)) < len(args.shares):
        raise ValueError(f"--shares {' '.join(f'{share:g}' for share in args.shares)} names one twice.")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}; expected a whole number of at least 0.")
    args.shares = sorted(args.shares)
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Probes an encoder, writes what the module `probe_results` describes, and returns the results."""
    args = parse(argv)
    own = Path(args.encoder)
    check_output_folder(args.output_dir or (own / PROBES if own.is_dir() else Path(PROBES)))
    options = {option: getattr(args, option) for option in EXTRACTOR_OPTIONS}
    encoder = load_encoder(args.encoder, args.revision, args.trust_remote_code, args.truncation, **options)
    if encoder.pretraining is None and (args.zero_shot or args.prompts):
        said = "--prompts" if args.prompts else "--zero_shot"
        raise ValueError(
            f"{said} with {args.encoder}, which has no text encoder; expected a model of `elm pretrain` that learnt from reports."
        )
    data = load_records(args.data, args.label_columns, args.min_records, args.fold, args.ecg_root)
    prompts = None if encoder.pretraining is None else read_prompts(args.prompts, data.labels)
    drawn = draw_patients(data.splits["train"].patients, args.shares, args.draws, args.seed)
    results = _facts(args, encoder, data, prompts)
    folder = _output_folder(args, results)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    twin = encoder.with_random_weights(args.seed)
    for model in (encoder.model, twin.model, encoder.pretraining):
        if model is not None:
            model.to(device)  # type: ignore[arg-type]  # a wrapped method
    with tempfile.TemporaryDirectory() as scratch:
        features = {
            split: compute_features(encoder, twin, data.splits[split], Path(scratch), split, args.batch_size, device)
            for split in SPLITS
        }
        scores, strengths = _fit(features, data, drawn, args.seed, device)
    test = data.splits["test"]
    projected = features["test"].projected
    if prompts is not None and projected is not None:
        scores["encoder"][ZERO_SHOT] = zero_shot(encoder, projected, prompts)[None]
    digests = {split: digest([features[split].digest, _table(data, split)]) for split in SPLITS}
    results["data"] |= {
        "fingerprint": digests["test"],
        "training_fingerprint": digest([digests["train"], digests["validation"]]),
    }
    results |= summarise(scores, data.labels, test.labels, test.patients, args.num_resamples, args.seed)
    for model, by_metric in strengths.items():
        for metric, chosen in by_metric.items():
            results["models"][model][metric]["strengths"] = chosen
    results["verdict"] = verdict(results)
    records = [
        {
            "record_id": record,
            "patient_id": patient,
            "labels": [name for name, has in zip(data.labels, row, strict=True) if has == 1],
        }
        for record, patient, row in zip(test.record_ids, test.patients, test.labels, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    save_probe(folder, results, records, test.labels, scores)
    write_probe_report(folder / REPORT_FILE, results)
    print(printable(to_markdown(results)))
    print(f"\nResults, scores and report in {folder.resolve()}")
    print(printable(results["verdict"]), flush=True)
    return results


def _fit(
    features: dict[str, Features],
    data: ProbeData,
    drawn: dict[float, list[np.ndarray]],
    seed: int,
    device: torch.device,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, list[float]]]]:
    """Model -> metric -> scores [draws, records, labels]; and of the linear probes the strengths of regularisation."""
    labels = {split: records.labels for split, records in data.splits.items()}
    scores: dict[str, dict[str, np.ndarray]] = {"encoder": {}, **{model: {} for model in OTHERS}}
    strengths: dict[str, dict[str, list[float]]] = {"encoder": {}, "random": {}}
    num_fits = 2 * sum(map(len, drawn.values()))
    with tqdm(total=num_fits, desc="Linear probes", unit="probe") as bar:
        for model, by_metric in strengths.items():
            of_model = {split: features[split].of_models[model] for split in SPLITS}
            for share, draws in drawn.items():
                fits = []
                for rows in draws:
                    fits.append(linear_probe(of_model, labels, rows))
                    bar.update()
                scores[model][metric_of(share)] = np.stack([log_odds for log_odds, _ in fits])
                by_metric[metric_of(share)] = [strength for _, strength in fits]
    samples = {split: features[split].samples for split in SPLITS}
    num_steps = sum(cnn_steps(len(rows)) for draws in drawn.values() for rows in draws)
    with tqdm(total=num_steps, desc="Plain CNN", unit="step") as bar:
        for share, draws in drawn.items():
            log_odds = [train_cnn(samples, labels, rows, seed + draw, device, bar) for draw, rows in enumerate(draws)]
            scores["cnn"][metric_of(share)] = np.stack(log_odds)
    return scores, strengths


def _table(data: ProbeData, split: str) -> list[Any]:
    """What the records of a split are called, and what is known of them."""
    records = data.splits[split]
    return [records.record_ids, records.patients, data.labels, records.labels.tolist()]


def _name_of(encoder: str) -> str:
    """What results call an encoder: its Hub id, or its folder, of that in a run of `elm pretrain` as RUN/encoder."""
    if not Path(encoder).exists():
        return encoder
    path = Path(encoder).resolve()
    return f"{path.parent.name}/{path.name}" if path.name == "encoder" else path.name


def _facts(args: argparse.Namespace, encoder: LoadedEncoder, data: ProbeData, prompts: Any) -> dict[str, Any]:
    """What is known before anything is computed."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    extractor = encoder.extractor.to_dict()
    names = (
        "sampling_rate",
        "num_samples",
        "lead_names",
        "normalization",
        "truncation",
        "bandpass",
        "notch",
        "missing_leads",
    )
    settings |= {"pooling": "mean", "extractor": {name: extractor[name] for name in names}}
    tables = [digest(_table(data, split)) for split in SPLITS]
    settings_digest = digest([settings, args.fold, prompts, tables])
    shown = "+".join(re.sub(r"[^\w.-]+", "_", Path(name).name) for name in args.data)[:80]
    facts: dict[str, Any] = {
        "schema_version": PROBE_SCHEMA,
        "model": _name_of(args.encoder),
        "model_revision": digest_of_folder(encoder.folder),
        "model_commit": getattr(encoder.model.config, "_commit_hash", None),
        "probe": f"{shown}-{settings_digest[:8]}",
        "data": {"names": [Path(name).name for name in args.data], "split": "test", "fold": args.fold},
        "settings": settings,
        "packages": {name: version(name) for name in PACKAGES},
        "num_records": {split: len(records) for split, records in data.splits.items()},
        "num_patients": {split: len(set(records.patients)) for split, records in data.splits.items()},
        "labels": {
            label: {split: int((records.labels[:, column] == 1).sum()) for split, records in data.splits.items()}
            for column, label in enumerate(data.labels)
        },
        "left_out": data.left_out,
    }
    return facts if prompts is None else facts | {"prompts": prompts}


def _output_folder(args: argparse.Namespace, results: dict[str, Any]) -> Path:
    """Where the results go; those of other weights that are there move aside, or are not overwritten (ValueError)."""
    own = Path(args.encoder)
    if args.output_dir is None:
        if not own.is_dir():
            return Path(PROBES) / own.name / results["probe"]
        move_old_results(own, keep=results["model_revision"])
        return own / PROBES / results["probe"]
    path = args.output_dir / PROBE_FILE
    if path.is_file():
        found = identity_of(path)
        for key in ("probe", "model_revision"):
            if found.get(key) != results[key]:
                raise ValueError(
                    f"--output_dir {args.output_dir} holds the results of another probe ({found.get('probe')}, encoder "
                    f"{str(found.get('model_revision'))[:19]}), which are not overwritten: name another folder, or move them away."
                )
    return args.output_dir
