"""The tiny model as a folder and as engines, and its server in the process and the loop of the test that asks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from serving import CONFIG, Serving, weights, words

import forerun
from forerun.engine.engine import Engine
from forerun.engine.load import drafter_for
from forerun.serve.app import Service, app_of


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the model. Tests must not change it."""
    made = tmp_path_factory.mktemp("served") / "tiny"
    words().save_pretrained(made)
    (made / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(torch.Generator().manual_seed(0)), made / "model.safetensors", {"format": "pt"})
    return made


@pytest.fixture(scope="session")
def made(folder) -> Callable[..., Engine]:
    """An engine on the model, of its own drafter and rows."""
    plain = forerun.load(folder, dtype="fp32")

    def call(drafter: str = "hierarchy", max_rows: int = 4) -> Engine:
        return plain.beside(drafter_for(plain.target.network, drafter), max_rows)

    return call


@pytest.fixture(scope="session")
def offline(made) -> Engine:
    """Plain decoding of the same model."""
    return made("none")


@pytest.fixture
def served(made) -> Callable[..., Any]:
    """Run a test's questions against a service of its own; afterwards nothing may be left of them."""

    def call(work: Callable[[Serving], Awaitable[Any]], engine: Engine | None = None, **settings: Any) -> Any:
        service = replace(Service(engine or made(), "tiny"), **settings)
        app = app_of(service)

        async def main() -> Any:
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
            async with client, app.router.lifespan_context(app):
                found = await work(Serving(service, app.state.desk, client, app))
                while not service.engine.is_idle:
                    await asyncio.sleep(0.001)
                assert app.state.desk.is_empty
            assert service.engine.target.cache.rows == 0
            return found

        return asyncio.run(asyncio.wait_for(main(), 60))

    return call
