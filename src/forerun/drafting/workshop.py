"""From a SPEC to a drafter: what building one may need, and the building."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from forerun.drafting.drafter import Drafter
from forerun.drafting.registry import method
from forerun.drafting.spec import DEEPEST, Description, describe
from forerun.errors import DrafterError
from forerun.model import Model
from forerun.nn.network import Network


@dataclass(frozen=True)
class Workshop:
    """What building a drafter may need: the target it is for, a way to load networks beside it, a
    fingerprint of the target's tokenizer (empty if not known), by which stores of tokens are told
    from those of another one, and how many drafters this one is inside."""

    target: Model
    load: Callable[[str], Network]
    tokenizer: Callable[[], str] = str
    depth: int = 0

    def build(self, description: str | Description) -> Drafter:
        """A drafter inside a drafter."""
        if self.depth >= DEEPEST:
            raise DrafterError(f"drafters stand in one another more than {DEEPEST} deep: does a file name itself?")
        return build(description, replace(self, depth=self.depth + 1))

    def network(self, checkpoint: str | None, drafter: str) -> Network:
        """A draft network with the target's vocabulary, or a DrafterError that says why not."""
        if checkpoint is None:
            raise DrafterError(f"the drafter {drafter} needs a checkpoint: write {drafter}:PATH")
        network = self.load(checkpoint)
        if network.vocab_size != self.target.vocab_size:
            raise DrafterError(
                f"{checkpoint} has a vocabulary of {network.vocab_size} tokens and the target one of"
                f" {self.target.vocab_size}: use a drafter that shares the target's tokenizer"
            )
        return network


def build(spec: str | Description, workshop: Workshop) -> Drafter:
    """The drafter that a SPEC or description asks for."""
    settings = describe(spec)
    name = settings.pop("drafter", None)
    if name is None:
        raise DrafterError(f'a drafter needs a name: write "drafter": "lookup" or the like beside {sorted(settings)}')
    chosen = method(name)
    if not isinstance(settings.get("checkpoint", ""), str):
        raise DrafterError(f"the checkpoint of the drafter {name} is a path, not {settings['checkpoint']!r}")
    return chosen.build(workshop, chosen.checked(settings))
