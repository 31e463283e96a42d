"""The words that name drafters: what they mean, how they nest, what drafter files may leave out,
and what is said of bad ones."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from fakes import Near, TableNetwork
from forerun.drafting import registry
from forerun.drafting.drafter import Drafter
from forerun.drafting.registry import REGISTRY, names
from forerun.drafting.several import Several
from forerun.drafting.spec import describe
from forerun.drafting.workshop import Workshop, build
from forerun.errors import DrafterError
from forerun.model import Model

LOOKUP, NONE = {"drafter": "lookup"}, {"drafter": "none"}


def small(checkpoint: str) -> dict[str, str]:
    return {"drafter": "small", "checkpoint": checkpoint}


def either(*sources: Any) -> dict[str, Any]:
    return {"drafter": "fallback", "sources": list(sources)}


def over(checkpoint: str, inner: Any) -> dict[str, Any]:
    return {"drafter": "verified", "checkpoint": checkpoint, "inner": inner}


GOOD: dict[str, Any] = {
    "none": NONE,
    "  none\n": NONE,
    "small:models/small": small("models/small"),
    "small:a:b": small("a:b"),
    "small:/an absolute/path.with dots": small("/an absolute/path.with dots"),
    "small:": {"drafter": "small"},
    "small: s ": small("s"),
    "verified:m (lookup)": over("m", LOOKUP),
    "verified:m": {"drafter": "verified", "checkpoint": "m"},
    "verified:m(lookup)": over("m", LOOKUP),
    "verified:m( lookup )": over("m", LOOKUP),
    "verified:m(small:s)": over("m", small("s")),
    "verified:m(verified:n(small:s))": over("m", over("n", small("s"))),
    "lookup | small:s": either(LOOKUP, small("s")),
    "lookup|small:s|none": either(LOOKUP, small("s"), NONE),
    "verified:m(lookup | small:s)": over("m", either(LOOKUP, small("s"))),
    "lookup | verified:m(lookup | small:s) | none": either(LOOKUP, over("m", either(LOOKUP, small("s"))), NONE),
    "verified:m(lookup | verified:n(lookup | small:s))": over(
        "m", either(LOOKUP, over("n", either(LOOKUP, small("s"))))
    ),
    '{"drafter": "small", "checkpoint": "a(b|c"}': small("a(b|c"),
    ' {"drafter": "none"} ': NONE,
}


@pytest.mark.parametrize("spec", GOOD)
def test_a_spec_means_its_description(spec: str) -> None:
    assert describe(spec) == GOOD[spec]


def test_a_description_is_taken_as_it_is_and_not_changed() -> None:
    given = {"drafter": "verified", "checkpoint": "m", "inner": "small:s"}
    assert describe(given) == given and describe(given) is not given
    assert set(REGISTRY) <= set(names())


def test_other_packages_register_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the entry point group, as name = module; the module states its METHOD as ours do."""
    point = EntryPoint("liar", "liars", "forerun.drafters")
    monkeypatch.setattr(registry, "_outside", lambda: {"liar": point})
    assert "liar" in names() and registry.method("liar").name == "liar"
    assert made({"drafter": "liar", "token": 2}).name == "liar"
    with pytest.raises(DrafterError, match="did you mean liar"):
        describe("lier")


def networks() -> dict[str, TableNetwork]:
    target = TableNetwork(4, 3)
    return {"target": target, **{name: Near(target, 0.5, seed) for seed, name in enumerate("mns")}}


def made(spec: Any, folder: Path | None = None) -> Drafter:
    """Checkpoints are known by the last part of their paths; with a folder, they must lie in it."""
    tables = networks()

    def load(path: str) -> TableNetwork:
        assert folder is None or Path(path) == folder / Path(path).name, path
        return tables[Path(path).name]

    return build(spec, Workshop(Model(tables["target"], 1), load))


def shape(drafter: Any) -> Any:
    """Names, nested as the drafters are."""
    if isinstance(drafter, Several):
        return [shape(part) for part in drafter.parts]
    if hasattr(drafter, "parts"):
        return tuple(shape(part.drafter) for part in drafter.parts)
    return {drafter.name: shape(drafter.inner)} if hasattr(drafter, "inner") else drafter.name


def test_what_is_built_is_nested_as_it_is_written() -> None:
    assert shape(made("verified:m(maxgram | verified:n(maxgram | small:s)) | small:n")) == [
        {"verified": ["maxgram", {"verified": ["maxgram", "small"]}]},
        "small",
    ]


# ---- files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints m, n and s, beside a file that will name them; and folders with the names of drafters."""
    beside = tmp_path / "models here"
    for name in ("m", "n", "s", "small", "none", "verified", "fallback"):
        (beside / name).mkdir(parents=True)
    return beside


def written(folder: Path, description: Any, name: str = "mine.json") -> str:
    path = folder / name
    path.write_text(description if isinstance(description, str) else json.dumps(description))
    return str(path)


BESIDE: list[tuple[Any, Any]] = [
    (small("s"), "small"),
    (over("m", "small:s"), {"verified": "small"}),
    (over("m", "none"), {"verified": "none"}),
    (over("m", "small: s"), {"verified": "small"}),
    (over("m", small("s")), {"verified": "small"}),
    (over("m", "verified:n(small:s)"), {"verified": {"verified": "small"}}),
    (over("m", "small:n | small:s"), {"verified": ["small", "small"]}),
    (either("small:n|verified:m(none)", "small:s"), [["small", {"verified": "none"}], "small"]),
    (either(small("n"), "none"), ["small", "none"]),
    (
        {"drafter": "cascade", "models": ["m", "n"], "last": "small:s"},
        ({"verified": ({"verified": ("small",)}, "small")}, {"verified": ("small",)}, "small"),
    ),
    (
        {"drafter": "cascade", "parts": [{"drafter": "small:s", "until": 2}, {"drafter": "maxgram", "until": 3}]},
        ("small", "maxgram"),
    ),
]


@pytest.mark.parametrize(("description", "expected"), BESIDE, ids=str)
def test_a_file_names_things_as_they_lie_beside_it(
    description: dict[str, Any], expected: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever form, and wherever the command runs; a folder with the name of a drafter is no drafter."""
    monkeypatch.chdir(folder.parent)
    for spec in (written(folder, description), written(folder, description).removeprefix(f"{folder.parent}/")):
        found = made(spec, folder if Path(spec).is_absolute() else Path("models here"))
        assert shape(found) == expected


def test_a_file_may_name_another_file(folder: Path) -> None:
    deep = folder / "deep"
    deep.mkdir()
    (deep / "s").mkdir()
    written(deep, {"drafter": "small", "checkpoint": "s"}, "inner.yaml")
    written(folder, {"drafter": "verified", "checkpoint": "m", "inner": "deep/inner.yaml"}, "outer.yaml")
    inner = {"drafter": "small", "checkpoint": str(deep / "s")}
    outer = describe(str(folder / "outer.yaml"))
    assert outer["checkpoint"] == str(folder / "m") and describe(outer["inner"]) == inner
    assert shape(made(f"none | {folder / 'outer.yaml'}")) == ["none", {"verified": "small"}]
    written(folder, {"drafter": "fallback", "sources": ["outer.yaml", "deep/inner.yaml | none"]}, "both.yaml")
    assert shape(made(str(folder / "both.yaml"))) == [{"verified": "small"}, ["small", "none"]]


def test_what_does_not_lie_beside_a_file_is_left_as_it_is_written(folder: Path) -> None:
    """Hub ids and absolute paths; and words that are not places at all."""
    description = {
        "drafter": "verified",
        "checkpoint": "someone/middle",
        "inner": f"lookup | small:someone/small | small:{folder / 's'}",
        "length": 3,
    }
    assert describe(written(folder, description)) == description
    tree = {"drafter": "small", "checkpoint": "s", "stopping": {"rule": "s", "m": "n"}}
    assert describe(written(folder, tree)) == {**tree, "checkpoint": str(folder / "s")}


def test_files_may_be_yaml_or_json(folder: Path) -> None:
    yaml = written(folder, "drafter: verified\ncheckpoint: m\ninner:\n  drafter: small\n  checkpoint: s\n", "a.yml")
    expected = over(str(folder / "m"), small(str(folder / "s")))
    assert describe(yaml) == expected == describe(f"  {yaml} ")
    assert describe(written(folder, {**over("m", small("s"))})) == expected


# ---- what is said of bad ones

BAD = {
    "": "a drafter has no name: write one",
    "loookup": "did you mean lookup",
    "smal:x": "did you mean small",
    "lookup |": "a drafter has no name: write one",
    "| lookup": "a drafter has no name: write one",
    "lookup | nobody": "unknown drafter 'nobody'",
    "verified:m(smal:x)": "did you mean small",
    "verified:m(lookup": r"brackets of the drafter 'verified:m\(lookup' do not match",
    "verified:m(lookup | small:s": "do not match",
    "verified:m lookup)": "do not match",
    "verified:m(a)b(c": "do not match",
    "none:m": "the drafter none has no setting 'checkpoint': it takes no settings",
    "none(lookup)": "the drafter none has no setting 'inner'",
    "lookup(none)": "the drafter lookup has no setting 'inner'",
    "small:s(lookup)": "the drafter small has no setting 'inner'",
    "small": "write small:PATH",
    "verified(lookup)": "write verified:PATH",
    "missing.yaml": "cannot read the drafter file missing.yaml: No such file",
    "{not json": "the drafter description is neither JSON nor YAML",
    '{"drafter": "nobody"}': "unknown drafter 'nobody'",
    '{"checkpoint": "m"}': "a drafter needs a name",
    '{"drafter": ["lookup"]}': "unknown drafter",
    '{"drafter": "verified", "checkpoint": "m", "inner": null}': "not None",
    '{"drafter": "verified", "checkpoint": "m", "inner": 5}': "not 5",
    '{"drafter": "verified", "checkpoint": "m", "inner": ["none"]}': r"not \['none'\]",
    '{"drafter": "verified", "checkpoint": "m", "inner": "none", "length": 0}': "length is a whole number of at least 1",  # noqa: E501
    '{"drafter": "verified", "checkpoint": "m", "inner": "none", "leniency": 0}': "leniency is a factor of at least 1",
    '{"drafter": "verified", "checkpoint": "m", "inner": "none", "leniency": "2"}': "leniency is a factor of at least 1",  # noqa: E501
}


@pytest.mark.parametrize("spec", BAD)
def test_a_bad_spec_is_refused_with_one_sentence(spec: str) -> None:
    with pytest.raises(DrafterError, match=BAD[spec]) as caught:
        made(spec)
    assert "\n" not in str(caught.value) and str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- list", "must be a mapping such as"),
        ("just words", "must be a mapping such as"),
        ("", "must be a mapping such as"),
        ("{broken", "neither JSON nor YAML"),
        ("a: [1", "neither JSON nor YAML"),
        ("drafter: small\ncheckpoint: s\n1: 2\n", "no setting 1"),
    ],
    ids=repr,
)
def test_a_bad_file_is_refused_with_one_sentence(text: str, says: str, folder: Path) -> None:
    with pytest.raises(DrafterError, match=says) as caught:
        made(written(folder, text, "bad.yaml"))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_and_a_folder_are_refused_with_one_sentence(folder: Path) -> None:
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    (folder / "folder.yaml").mkdir()
    for name, says in (("binary.yaml", "not text"), ("folder.yaml", "Is a directory")):
        with pytest.raises(DrafterError, match=f"cannot read the drafter file .*{name}: .*{says}"):
            made(str(folder / name))
