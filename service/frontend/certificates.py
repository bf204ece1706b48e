"""The server's certificate, its key and the authorities of clients: read, checked, and read again when they change.

Connections that are open go on with what they began with; a certificate that cannot be used changes nothing.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from service.config.tls import TlsFiles

# A chain of a dozen certificates has 20 KiB; a bundle of all public authorities 250.
MAX_BYTES = 4 << 20


class CertificateError(Exception):
    """A file cannot be used. The message names it."""


@dataclass(frozen=True, slots=True)
class Pem:
    """Their contents; `client_ca` may be empty."""

    certificate: bytes
    key: bytes
    client_ca: bytes = b""


class Certificates:
    """What is in force. Raises `CertificateError` when there is nothing to begin with."""

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self.pem, self.context = _load(files)
        # When the certificate ends, seconds since 1970; None where that is not known.
        self.end_s: int | None = None
        self._use: Callable[[bytes, bytes, bytes], int | None] = lambda _certificate, _key, _authorities: None

    def use(self, use: Callable[[bytes, bytes, bytes], int | None]) -> None:
        """Have `use` told what is in force now, and of every change. Raises what it raises."""
        self._use = use
        self.end_s = use(self.pem.certificate, self.pem.key, self.pem.client_ca)

    def reload(self) -> None:
        """Use what is in the files now. Raises `CertificateError`; then what was in force still is."""
        pem, context = _load(self.files)
        try:
            self.end_s = self._use(pem.certificate, pem.key, pem.client_ca)
        except ValueError as error:
            raise CertificateError(f"{self.files.certificate}, {self.files.key}: {error}") from None
        self.pem, self.context = pem, context

    def credentials(self) -> Any:
        """For a port of `grpc.Server`, which asks on every connection what is in force."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), self._configuration, require_client_authentication=self.files.client_ca is not None
        )

    def _configuration(self) -> Any:
        pem = self.pem
        pairs = [(pem.key, pem.certificate)]
        return grpc.ssl_server_certificate_configuration(pairs, root_certificates=pem.client_ca or None)


def _load(files: TlsFiles) -> tuple[Pem, ssl.SSLContext]:
    pem = Pem(_read(files.certificate), _read(files.key), _read(files.client_ca) if files.client_ca else b"")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(files.certificate, files.key, password=_no_passphrase)
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise CertificateError(
            f"{files.certificate}, {files.key}: expected a certificate chain in PEM, and its key in PEM without a "
            f"passphrase: {reason}"
        ) from None
    if files.client_ca is not None:
        try:
            context.load_verify_locations(files.client_ca)
        except (ssl.SSLError, OSError) as error:
            reason = getattr(error, "reason", None) or str(error)
            raise CertificateError(f"{files.client_ca}: expected certificates in PEM: {reason}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return pem, context


def _no_passphrase() -> str:
    raise ValueError("the key needs a passphrase")


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CertificateError(f"{path}: has more than {MAX_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path}: cannot be read: {error.strerror or error}") from None
