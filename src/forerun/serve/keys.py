"""API keys, and the tenant that each of them means."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from forerun.errors import RequestError

NOBODY = ""
"""The one tenant of a server without keys."""


class Keys:
    """Who may ask. Keys are held as hashes, and compared in a time that tells nothing of them.

    given: (key, tenant); a tenant may have several keys. Without any, everybody may ask, as one tenant.
    """

    def __init__(self, given: Iterable[tuple[str, str]] = ()):
        self._tenants = {_hash(key): tenant for key, tenant in given}

    @staticmethod
    def of(single: str | None, file: Path | None) -> Keys:
        """From a key by itself, and from a file with `KEY` or `KEY TENANT` in a line (# begins a remark)."""
        found = [] if single is None else [_named([single], "the API key")]
        if file is not None:
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise RequestError(f"cannot read the API keys in {file}: {error}") from None
            told = [(number, line.split()) for number, line in enumerate(lines, 1)]
            found += [_named(words, f"{file}, line {number}") for number, words in told if words and words[0][0] != "#"]
            if not found:
                raise RequestError(f"{file} holds no API keys: write one per line, its tenant behind it")
        return Keys(found)

    @property
    def are_needed(self) -> bool:
        return bool(self._tenants)

    def tenant(self, authorization: str) -> str | None:
        """Whose key the header `Authorization` brings; None if it is nobody's."""
        if not self._tenants:
            return NOBODY
        scheme, _, key = authorization.partition(" ")
        given, found = _hash(key.strip()), None
        for known, tenant in self._tenants.items():  # all of them, whatever was found
            if hmac.compare_digest(known, given):
                found = tenant
        return found if scheme.lower() == "bearer" else None


def _named(words: list[str], where: str) -> tuple[str, str]:
    """A key and its tenant. Whoever has no name gets one that stays the same when the server is started again."""
    if len(words) > 2 or not words[0].strip():
        raise RequestError(f"{where} is no API key: write KEY, or KEY TENANT")
    return words[0], words[1] if len(words) == 2 else f"key-{_hash(words[0]).hex()[:12]}"


def _hash(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogatepass")).digest()
