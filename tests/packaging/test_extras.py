"""Each extra is what something asks for by name when it is missing."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from forerun.errors import ForerunError

EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def train_a_tokenizer() -> None:
    from forerun.train.tokenizer import train

    train(["text"])


def draw_a_picture() -> None:
    from forerun.plots.style import demand_matplotlib

    demand_matplotlib()


def read_a_gguf() -> None:
    from forerun.sources.gguf.head import Head

    Head.of(Path("m.gguf"))


def tell_tensorboard() -> None:
    from forerun.train.events import Events

    Events(Path("board"))


def serve() -> None:
    importlib.import_module("forerun.cli.serve").demand_packages()


def ask_a_server() -> None:
    from forerun.bench.traffic import demand_httpx

    demand_httpx()


def constrain() -> None:
    from tokenizers import Tokenizer, models

    from forerun.constraint import Constraint
    from forerun.grammar import Grammars

    Grammars(Tokenizer(models.BPE()), 1, []).matcher(Constraint.regex("a"), [])


def look_at_a_picture() -> None:
    from forerun.train.federated.folders import image

    image(Path("picture.png"), 8)


def evaluate() -> None:
    importlib.import_module("forerun.integrations.lm_eval")


ASKS: list[tuple[str, str, Callable[[], None]]] = [
    ("train", "sentencepiece", train_a_tokenizer),
    ("plots", "matplotlib", draw_a_picture),
    ("tensorboard", "tensorboardX", tell_tensorboard),
    ("gguf", "gguf", read_a_gguf),
    ("serve", "fastapi", serve),
    ("serve", "httpx", ask_a_server),
    ("grammar", "llguidance", constrain),
    ("images", "PIL", look_at_a_picture),
    ("eval", "lm_eval", evaluate),
]
NAMES = {"PIL": "pillow"}
"""Packages that are called otherwise where they are installed from."""


def test_every_extra_is_known_here() -> None:
    assert EXTRAS.keys() - {"dev", "docs"} == {extra for extra, *_ in ASKS}


@pytest.mark.parametrize(("extra", "package", "ask"), ASKS)
def test_without_its_package_the_sentence_names_the_extra(
    extra: str, package: str, ask: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [one for one in sys.modules if one.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "forerun.integrations.lm_eval", raising=False)
    with pytest.raises(ForerunError, match=rf"pip install 'forerun\[{extra}\]'"):
        ask()


@pytest.mark.parametrize(("extra", "package"), [named[:2] for named in ASKS])
def test_an_extra_brings_what_is_imported(extra: str, package: str) -> None:
    assert any(requirement.startswith(NAMES.get(package, package)) for requirement in EXTRAS[extra])
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'forerun[{extra}]'")
