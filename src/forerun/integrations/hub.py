"""Draft heads on the Hugging Face hub: a folder of ours with a card that says what was measured.

    heads = Heads.from_pretrained("somebody/heads")
    engine = forerun.load("MODEL", drafter=heads.spec)

    Heads.from_pretrained("heads").push_to_hub("me/heads", license="apache-2.0")

huggingface_hub's own mixin keeps a config of constructor arguments and empties the folder that it
writes to; a checkpoint here is a folder already, so these are two calls of its client.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.checkpoint import TREE, Checkpoint
from forerun.errors import CheckpointError
from forerun.files import whole_folder
from forerun.sources.folder import CONFIG, WEIGHTS, brief

FILES = (CONFIG, WEIGHTS, TREE)
CARD = "README.md"
TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

Draft heads of the kind `{{ kind }}` for speculative decoding with forerun. They propose tokens of
`{{ target }}`, which checks them all in one forward pass: its text stays its own, and comes sooner.
They are of no use with another model.

| | |
|---|---|
{% for label, value in facts -%}
| {{ label }} | {{ value }} |
{% endfor %}
## Use

```bash
hf download {{ name }} --local-dir heads
forerun generate MODEL "a prompt" --drafter {{ kind }}:heads
forerun check MODEL --drafter {{ kind }}:heads
```

```python
import forerun
from forerun.integrations.hub import Heads

engine = forerun.load("MODEL", drafter=Heads.from_pretrained("{{ name }}").spec)
```

MODEL is `{{ target }}`. Speed depends on the machine: `forerun calibrate MODEL --drafter
{{ kind }}:heads` fits the tree to yours.

## Training

```json
{{ settings }}
```
"""


@dataclass(frozen=True)
class Heads:
    """Trained heads in a folder."""

    checkpoint: Checkpoint

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, revision: str | None = None, token: str | None = None
    ) -> Heads:
        """Heads of a folder, or of the hub, fetched if they are not here. Raises CheckpointError.

        revision: a branch, tag or commit of the hub. token: for private ones; None: as logged in.
        """
        folder = Path(path_or_hub_id).expanduser()
        if not folder.is_dir():
            folder = _fetched(str(path_or_hub_id), revision, token)
        return cls(checkpoints.read(folder))

    @property
    def spec(self) -> str:
        """What `forerun.load` and `--drafter` take."""
        return f"{self.checkpoint.drafter}:{self.checkpoint.folder}"

    def card(self, name: str, license: str | None = None) -> huggingface_hub.ModelCard:
        """The model card. name: on the hub. license: in the hub's words; nobody guesses one."""
        data = huggingface_hub.ModelCardData(
            license=license,
            library_name="forerun",
            pipeline_tag="text-generation",
            tags=["speculative-decoding", "draft-heads", self.checkpoint.drafter],
        )
        card: huggingface_hub.ModelCard = huggingface_hub.ModelCard.from_template(
            data,
            template_str=TEMPLATE,
            name=name,
            kind=self.checkpoint.drafter,
            target=self.checkpoint.target,
            facts=[*self._facts(), ("licence", license or "not stated")],
            settings=json.dumps(
                {name: value for name, value in self.checkpoint.training.items() if name != "figures"}, indent=1
            ),
        )
        return card

    def save_pretrained(self, folder: str | Path, name: str | None = None, license: str | None = None) -> Path:
        """Write the heads and their card to another folder. Raises CheckpointError."""
        place, own = Path(folder), self.checkpoint.folder
        if place.resolve() == own.resolve():
            raise CheckpointError(f"{place} is where these heads are: give another folder")
        try:
            with whole_folder(place) as beside:
                for file in FILES:
                    if (own / file).is_file():
                        shutil.copy(own / file, beside)
                self.card(name or place.name, license).save(beside / CARD)
                if not (own / TREE).is_file():
                    (place / TREE).unlink(missing_ok=True)  # of other heads
        except OSError as error:
            raise CheckpointError(
                f"{place} cannot be written ({brief(error)}): make room there or choose another folder"
            ) from None
        return place

    def push_to_hub(
        self, name: str, license: str | None = None, private: bool | None = None, token: str | None = None
    ) -> str:
        """Put the heads and their card on the hub, in one commit, and return its address.

        private: None: as the account has it. token: None: as logged in. Raises CheckpointError.
        """
        try:
            hub = huggingface_hub.HfApi(token=token)
            place = hub.create_repo(name, private=private, exist_ok=True).repo_id
            with tempfile.TemporaryDirectory() as folder:
                saved = self.save_pretrained(Path(folder) / "heads", place, license)
                commit = hub.upload_folder(
                    repo_id=place,
                    folder_path=saved,
                    commit_message="Heads, by forerun",
                    delete_patterns=[TREE],  # of older heads
                )
        except CheckpointError:
            raise
        except Exception as error:  # the client raises a dozen kinds that have no ancestor in common
            raise CheckpointError(
                f"{name} cannot be put on the hub ({brief(error)}): check the name, the connection, and that you are"
                " logged in (hf auth login)"
            ) from error
        return str(commit.commit_url)

    def _facts(self) -> list[tuple[str, str]]:
        """What is known of these heads; what was not recorded is not told."""
        training = self.checkpoint.training
        author = _inside(training, "data", "target")
        figures = _inside(training, "figures")
        facts = [("target", f"`{self.checkpoint.target}`")]
        if author.get("fingerprint"):
            facts.append(("fingerprint of the target", f"`{author['fingerprint']}`"))
        if training.get("preset"):
            facts.append(("preset", f"`{training['preset']}`"))
        facts += [(name.replace("_", " "), f"`{value}`") for name, value in sorted(self._shape().items())]
        if "tokens_per_step" in figures:
            facts.append(("tokens per step, projected on held-out answers", f"{figures['tokens_per_step']:.2f}"))
        head = 1
        while f"head{head}_top1" in figures:
            facts.append((f"head {head} right (first of its tokens)", f"{figures[f'head{head}_top1']:.1%}"))
            head += 1
        return facts + self._measured()

    def _shape(self) -> dict[str, Any]:
        return {name: value for name, value in self.checkpoint.architecture.items() if not isinstance(value, Mapping)}

    def _measured(self) -> list[tuple[str, str]]:
        """What `forerun calibrate` found on the machine where the tree was chosen."""
        path = self.checkpoint.folder / TREE
        found = json.loads(path.read_text()) if path.is_file() else {}
        nodes = len(found.get("paths", ()))
        chosen = next((one for one in found.get("candidates", ()) if one.get("nodes") == nodes), None)
        if chosen is None:
            return []
        return [
            ("tree", f"{nodes} nodes"),
            ("tokens per step, measured with it", f"{chosen['tokens_per_step']:.2f}"),
            ("times plain decoding, where it was calibrated", f"{found['speedup']:.2f}"),
        ]


def _inside(value: Any, *names: str) -> dict[str, Any]:
    """A mapping within mappings; empty where there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return dict(value) if isinstance(value, Mapping) else {}


def _fetched(name: str, revision: str | None, token: str | None) -> Path:
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, token=token, allow_patterns=[*FILES, CARD])
        )
    except Exception as error:  # the client raises a dozen kinds that have no ancestor in common
        raise CheckpointError(
            f"{name} is neither a folder here nor heads that the hub hands out ({brief(error)}): check the name and the"
            " connection"
        ) from error
