"""Certificates and API keys of the server, and how they change while it serves.

The files are looked at every few seconds. A change that can be used is in force at once for what comes from then on;
one that cannot be used is said in the log and counted, and what was in force still is. Kubernetes replaces the files of
a secret in one step; files that are written one after the other may not fit for a moment, and are looked at again.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from service.config.keys import MAX_FILE_BYTES, Keys, parse_keys
from service.config.tls import TlsFiles
from service.errors import ConfigError, Forbidden, Unauthenticated
from service.frontend.access import Access
from service.frontend.certificates import CertificateError, Certificates

# Why a call is denied for want of a key, in the words of metrics.
DENIALS = (Unauthenticated.reason, Forbidden.reason)

log = logging.getLogger(__name__)


class SecurityError(Exception):
    """The server cannot be secured as the settings say. The message names the file."""


class Security:
    """What protects the server. `certificates` and `access` are None where the settings name no files.

    `on_reload` is told of every change: what ("certificate" or "keys"), and whether it could be used. `unrouted` says
    how many calls were refused so far, by reason: the log tells of those that were denied. Raises `SecurityError`.
    """

    def __init__(
        self,
        tls: TlsFiles | None,
        keys: Path | None,
        poll_s: float,
        on_reload: Callable[[str, bool], None] = lambda _what, _fine: None,
        unrouted: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self._keys = keys
        self._poll_s = poll_s
        self._on_reload = on_reload
        self._unrouted = unrouted
        # What the log knows of already.
        self._denied: Mapping[str, int] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._watched: list[_Watched] = []
        # What they are now comes before what is read of them: a change in between is seen.
        if tls is not None:
            self._watched.append(_Watched("certificate", tls.paths(), self._reload_certificates))
        if keys is not None:
            self._watched.append(_Watched("keys", (keys,), self._reload_keys))
        try:
            self.certificates = None if tls is None else Certificates(tls)
            self.access = None if keys is None else Access(_read_keys(keys))
        except (CertificateError, ConfigError) as error:
            raise SecurityError(str(error)) from None

    def watched(self) -> tuple[str, ...]:
        """What may change: "certificate", "keys"."""
        return tuple(watched.what for watched in self._watched)

    def start(self) -> None:
        """Look at the files from now on."""
        if self._watched:
            self._thread = threading.Thread(target=self._watch, name="security", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Look at them no more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._poll_s):
            for watched in self._watched:
                self._look(watched)
            if self.access is not None:
                self._tell_denied()

    def _tell_denied(self) -> None:
        """One line for all the calls that were denied since the last look, however many there were."""
        counts = self._unrouted()
        denied = {reason: counts.get(reason, 0) for reason in DENIALS}
        more = {reason: count - self._denied.get(reason, 0) for reason, count in denied.items()}
        self._denied = denied
        if any(more.values()):
            log.warning("calls were denied", extra=more)

    def _look(self, watched: _Watched) -> None:
        now = watched.digest()
        if now == watched.seen:
            return
        reason = ""
        try:
            watched.reload()
        except (CertificateError, ConfigError) as error:
            reason = str(error)
        if watched.digest() != now:
            return  # they are being written: whatever was read, they are looked at again
        watched.seen = now
        if reason:
            log.error("a change cannot be used", extra={"what": watched.what, "reason": reason})
        else:
            log.info("changed", extra={"what": watched.what, "files": ", ".join(map(str, watched.paths))})
        self._on_reload(watched.what, not reason)

    def _reload_certificates(self) -> None:
        assert self.certificates is not None
        self.certificates.reload()

    def _reload_keys(self) -> None:
        assert self.access is not None
        assert self._keys is not None
        self.access.update(_read_keys(self._keys))


class _Watched:
    """Files, and what they were when last looked at (`seen`)."""

    def __init__(self, what: str, paths: tuple[Path, ...], reload: Callable[[], None]) -> None:
        self.what = what
        self.paths = paths
        self.reload = reload
        self.seen = self.digest()

    def digest(self) -> str:
        """Of what is in them. That one is not there, or cannot be read, is something as well."""
        digest = hashlib.sha256()
        for path in self.paths:
            try:
                digest.update(hashlib.sha256(path.read_bytes()).digest())
            except OSError as error:
                digest.update(str(error.errno).encode())
        return digest.hexdigest()


def _read_keys(path: Path) -> Keys:
    """Raises `ConfigError`."""
    try:
        content = path.read_bytes()
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(str(path), f"has more than {MAX_FILE_BYTES >> 20} MiB")
        return parse_keys(content.decode())
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(str(path), "is not UTF-8 text") from None
    except ConfigError as error:
        if str(error).startswith(str(path)):
            raise
        raise ConfigError(str(path), str(error)) from None
