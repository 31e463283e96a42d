"""CreamFL, its ablations, and what it is compared with, as data. docs/federated.md defines each in words.

The definitions of the others for two modalities are ours: their papers know one.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from forerun.errors import TrainingError


@dataclass(frozen=True)
class Method:
    """server: there is a server's model. clients: they take part. way: how their rows become one; None: they send none.
    inter, intra, regress: see `Lesson`. distils: the server learns from the aggregate. averages: weights of towers of
    one shape travel instead; multimodal: how much more those of clients with both modalities count then."""

    sense: str
    server: bool = True
    clients: bool = True
    way: str | None = "gca"
    inter: bool = False
    intra: bool = False
    regress: bool = False
    distils: bool = True
    averages: bool = False
    multimodal: float = 1.0


METHODS = {
    "creamfl": Method("both contrasts, aggregated by contrast", inter=True, intra=True),
    "no-inter": Method("CreamFL without the contrast between modalities", intra=True),
    "no-intra": Method("CreamFL without the contrast within a modality", inter=True),
    "no-contrast": Method("CreamFL without either"),
    "mean": Method("CreamFL with the mean of clients for GCA", way="mean", inter=True, intra=True),
    "server-only": Method("the public set alone", clients=False, way=None),
    "local-only": Method("every client alone", server=False, way=None, distils=False),
    "fedavg": Method("means of the weights of equal towers", way=None, distils=False, averages=True),
    "fediot": Method(
        "FedAvg, clients of both modalities count more", way=None, distils=False, averages=True, multimodal=100.0
    ),
    "fedmd": Method("clients move to their mean; no server", server=False, way="mean", regress=True, distils=False),
    "fedet": Method("the server distils from the mean, weighted by confidence", way="variance"),
    "fedgems": Method("the server distils from clients that find the pair", way="rank", regress=True),
}


def method_of(name: str) -> Method:
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(METHODS)}"
        raise TrainingError(f"there is no method {name!r}: {hint}")
    return METHODS[name]
