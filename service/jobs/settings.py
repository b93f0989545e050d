"""How a service is set up."""

import os
from dataclasses import dataclass
from pathlib import Path

from ...spec.errors import MoeplanError

POSTGRESQL = "postgresql+psycopg"
MAX_UPLOAD = 512 * 2**20


@dataclass(frozen=True)
class Settings:
    """store: a folder (SQLite and documents in it), or postgresql+psycopg://...; documents: a folder or fsspec URL for
    documents, needed beside a database's URL.

    token: asked of every request; None: of none, on the loopback address only. max_upload: bytes of a trace.
    requests_a_minute: that change something, of one client. patience, grace: see ``Supervisor``.
    """

    store: str
    documents: str | None = None
    host: str = "127.0.0.1"
    port: int = 8321
    workers: int = 2
    token: str | None = None
    max_upload: int = MAX_UPLOAD
    max_queued: int = 1000
    requests_a_minute: int = 600
    patience: float = 15.0
    grace: float = 20.0

    @property
    def by_url(self) -> bool:
        return "://" in self.store

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)

    def check(self) -> None:
        """Raises MoeplanError for settings that do not go together."""
        if not self.store or self.documents == "":
            empty = "--documents" if self.store else "--store"
            raise MoeplanError(f"{empty} is empty: name a folder, or leave it out")
        if not self.loopback and not self.token:
            raise MoeplanError(
                f"--host {self.host}: others can reach this address, so a token is needed: --token-file FILE, or "
                "MOEPLAN_TOKEN"
            )
        if self.token is not None and not (len(self.token) >= 16 and self.token.isascii() and self.token.isprintable()):
            raise MoeplanError("the token: expected 16 printable ASCII characters or more: `openssl rand -hex 32`")
        if self.by_url and not self.store.startswith(POSTGRESQL + ":"):
            given = self.store.partition(":")[0]
            raise MoeplanError(f"--store {given}://...: expected a folder, or {POSTGRESQL}://...")
        if self.by_url and self.documents is None:
            raise MoeplanError("--store with a database: --documents says where documents go, a folder or fsspec URL")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    import ipaddress

    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def default_store() -> Path:
    """``moeplan/service`` in the user's data folder ($XDG_DATA_HOME, or ~/.local/share)."""
    given = os.environ.get("XDG_DATA_HOME")
    return (Path(given) if given else Path.home() / ".local" / "share") / "moeplan" / "service"


def read_token(path: Path | None) -> str | None:
    """From a file, else from MOEPLAN_TOKEN; None where there is neither. Raises MoeplanError."""
    if path is None:
        return os.environ.get("MOEPLAN_TOKEN") or None
    from ...spec.files import read_text

    token = read_text(path, limit=4096).strip()
    if not token:
        raise MoeplanError(f"{path}: empty, expected a token")
    return token
