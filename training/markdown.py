"""The Markdown of cards, from the templates in `model_cards/`. Imports no library that trains: data and tokenizers have cards too."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, ModelCard
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from elm_ecg.training.files import resource

CARD = "README.md"
SAMPLE = "sample_ecg.npz"
CITATION = "@misc{elm,"  # how that of `citation.md` begins
TAGS = ["ecg", "electrocardiogram"]
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "elm-ecg")


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


TEMPLATES = Environment(  # noqa: S701 - Markdown, in which nothing is to be escaped
    loader=FileSystemLoader(resource("model_cards")), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
TEMPLATES.globals |= {"table": table, "sample": SAMPLE}


def make_card(template: str, metadata: CardData, **facts: Any) -> ModelCard:
    """A card of a template of `model_cards/`; a fact that the template needs and does not get is an error."""
    return ModelCard(TEMPLATES.get_template(template).render(card_data=metadata.to_yaml(), **facts))


def on_hub(name: str) -> bool:
    """Whether a name is the id of a repository, not a local folder."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def public_name(name: str) -> str:
    """A Hub id as it is; only the last part of a local path, which may hold the name of a user."""
    return name if on_hub(name) else Path(name).name


def use_of(
    kind: str,
    name: str,
    revision: str | None = None,
    *,
    takes_ecgs: bool = True,
    prepares: bool = False,
    num_leads: int = 12,
    split: str = "train",
    has_chats: bool = True,
) -> str:
    """How to load what the card is about: code in Markdown.

    Args:
        kind: `model`, `adapter`, `encoder`, `tokenizer` or `dataset`.
        name: of a local folder, or with a `revision` of a repo on the Hub, which holds a simulated ECG beside.
        takes_ecgs: of a model or adapter, whether it does.
        prepares: of an encoder, whether its feature extractor is there.
        num_leads: of an encoder.
        split, has_chats: of a dataset, one that it has, and whether it has questions.
    """
    facts = {
        "takes_ecgs": takes_ecgs,
        "prepares": prepares,
        "num_leads": num_leads,
        "split": split,
        "has_chats": has_chats,
    }
    return TEMPLATES.get_template("use.md").render(kind=kind, name=name, revision=revision, **facts).strip()


def citation(title: str, kind: str = "model", url: str | None = None) -> str:
    """How to cite what the card is about, in BibTeX."""
    return TEMPLATES.get_template("citation.md").render(title=title, kind=kind, url=url)


def environment(packages: tuple[str, ...] = PACKAGES) -> str:
    """The versions of the packages, each a row of a table."""
    return table(("package", "version"), [(name, version(name)) for name in packages])


def replace_section(text: str, heading: str, body: str) -> str:
    """The card's text with another body of the section `## heading`; as it was where it has none."""
    section = re.compile(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if not section.search(text):  # below, a function keeps the backslashes of `body` as they are
        return text
    return section.sub(lambda _: f"## {heading}\n\n{body}\n\n", text, count=1).rstrip("\n") + "\n"
