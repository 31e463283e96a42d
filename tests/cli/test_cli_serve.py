"""`forerun serve`: what cannot be served is refused before anything is loaded. How it serves: tests/serve."""

from __future__ import annotations

import shutil
import socket

import pytest

pytest.importorskip("fastapi")


def test_a_port_that_is_taken(refused, tmp_path):
    """Before a model is read: this one does not exist."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in refused("serve", tmp_path / "nowhere", "--port", port)
    assert "--host" in refused("serve", tmp_path / "nowhere", "--host", "no such host")


def test_keys_that_are_none(refused, tmp_path):
    keys = tmp_path / "keys"
    assert str(keys) in refused("serve", "m", "--api-keys", keys)
    keys.write_text("\n# none\n")
    assert "holds no API keys" in refused("serve", "m", "--api-keys", keys)
    keys.write_text("one\n\nKEY TENANT more\n")
    assert "line 3" in refused("serve", "m", "--api-keys", keys)
    assert "KEY" in refused("serve", "m", "--api-key", " ")


def test_a_model_that_cannot_be_served(refused, family, tmp_path):
    assert str(tmp_path / "nowhere") in refused("serve", tmp_path / "nowhere", "--port", 0)
    bare = tmp_path / "bare"
    shutil.copytree(family / "target", bare, ignore=shutil.ignore_patterns("token*"))
    assert "no tokenizer" in refused("serve", bare, "--port", 0, "--drafter", "none")
    assert "chat template" in refused("serve", "m", "--chat-template", tmp_path / "none.jinja")
    assert "bogus" in refused("serve", "m", "--drafter", "bogus")
