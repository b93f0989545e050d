"""A rendezvous store that answers only those who know a secret, for ranks on hosts that others can reach.

torch's TCPStore serves whoever connects: anyone on the network could list and set its keys. Here every connection
begins with the challenges of ``multiprocessing.connection`` (an HMAC each way; the secret itself never travels), and
only then are requests read: an operation, a key and values as plain bytes, nothing that is unpickled. What travels
is not encrypted, and the connections that gloo or NCCL then open between ranks are theirs.
"""

import contextlib
import struct
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge

import torch.distributed as dist

from ...spec.errors import MoeplanError

LONGEST = 1 << 20
"""Bytes of a message: addresses of ranks take a few hundred."""
PATIENCE = timedelta(minutes=5)
RETRY = 0.2
_NUMBER = struct.Struct("!q")


class Server:
    """Keys and values of one run, in rank 0's process; a thread for every connection, each a daemon."""

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        try:
            self.listener = Listener((host, port), backlog=4096)
        except OSError as error:
            raise MoeplanError(f"cannot listen on {host} port {port}: {error.strerror}; choose another port") from None
        self.port = self.listener.address[1]
        self.secret, self.values, self.changed = secret, dict[str, bytes](), threading.Condition()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with connection, contextlib.suppress(EOFError, OSError, AuthenticationError, ValueError):
            deliver_challenge(connection, self.secret)
            answer_challenge(connection, self.secret)
            while True:
                operation, key, *values = (connection.recv_bytes(LONGEST) for _ in range(connection.recv_bytes(1)[0]))
                connection.send_bytes(self._answer(operation.decode(), key.decode(), values))

    def _answer(self, operation: str, key: str, values: Sequence[bytes]) -> bytes:
        with self.changed:
            if operation == "set":
                self.values[key] = values[0]
            elif operation == "add":
                total = int(self.values.get(key, b"0")) + _NUMBER.unpack(values[0])[0]
                self.values[key] = str(total).encode()
            elif operation == "delete":
                return bytes([self.values.pop(key, None) is not None])
            elif operation == "compare_set":
                expected, desired = values
                if self.values.get(key, expected) == expected and (key in self.values or not expected):
                    self.values[key] = desired
                elif key not in self.values:
                    return expected  # as TCPStore answers for a key that is not there
            elif operation == "wait":
                self.changed.wait_for(lambda: key in self.values, _NUMBER.unpack(values[0])[0] / 1000)
                return bytes([key in self.values])
            elif operation == "count":
                return str(len(self.values)).encode()
            self.changed.notify_all()
            return self.values.get(key, b"")


class SecretStore(dist.Store):
    """One rank's side. Keep a reference while the process group lives: torch holds the C++ half alone.

    Raises MoeplanError where the secret is another or nobody answers within ``timeout``.
    """

    def __init__(self, host: str, port: int, secret: bytes, timeout: timedelta = PATIENCE) -> None:
        super().__init__()
        self.patience, self.lock = timeout, threading.Lock()
        self.where = f"{host} port {port}"
        until = time.monotonic() + timeout.total_seconds()
        while True:
            try:
                self.connection = Client((host, port), authkey=secret)
                return
            except AuthenticationError:
                raise MoeplanError(f"the rendezvous at {self.where} has another secret: {ADVICE}") from None
            except (OSError, EOFError) as error:
                if time.monotonic() > until:
                    raise MoeplanError(f"no rendezvous at {self.where} within {timeout}: {error}") from None
                time.sleep(RETRY)

    def _ask(self, operation: str, key: str, *values: bytes) -> bytes:
        with self.lock:
            try:
                self.connection.send_bytes(bytes([2 + len(values)]))
                for part in (operation.encode(), key.encode(), *values):
                    self.connection.send_bytes(part)
                return self.connection.recv_bytes(LONGEST)
            except (OSError, EOFError):
                raise dist.DistNetworkError(f"connection to the rendezvous at {self.where} is lost") from None

    def set(self, key: str, value: bytes | str) -> None:
        self._ask("set", key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._ask("get", key)

    def add(self, key: str, amount: int) -> int:
        return int(self._ask("add", key, _NUMBER.pack(amount)))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return self._ask("compare_set", key, expected.encode(), desired.encode())

    def delete_key(self, key: str) -> bool:
        return self._ask("delete", key) != b"\0"

    def num_keys(self) -> int:
        return int(self._ask("count", ""))

    def check(self, keys: list[str]) -> bool:
        return all(self._ask("wait", key, _NUMBER.pack(0)) != b"\0" for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        until = time.monotonic() + (timeout or self.patience).total_seconds()
        for key in keys:
            # Short waits: each holds the connection.
            while not self._ask("wait", key, _NUMBER.pack(100))[0]:
                if time.monotonic() > until:
                    raise dist.DistStoreError(f"wait timeout at the rendezvous {self.where}: no {key}")

    def set_timeout(self, timeout: timedelta) -> None:
        self.patience = timeout

    def clone(self) -> "SecretStore":
        return self


ADVICE = "give every rank the same MOEPLAN_SECRET, such as `export MOEPLAN_SECRET=$(openssl rand -hex 32)` in the job"
