"""Certificates of authorities that exist for one test, and credentials made of them."""

from __future__ import annotations

from pathlib import Path

import grpc
import trustme

HOSTS = ("127.0.0.1", "localhost")


class Authority:
    """An authority, what the server has of it in `directory`, and what its clients have."""

    def __init__(self, directory: Path) -> None:
        self._authority = trustme.CA()
        self.directory = directory
        self.certificate = directory / "server.pem"
        self.key = directory / "server.key"
        self.client_ca = directory / "clients.pem"
        directory.mkdir(parents=True, exist_ok=True)
        self._authority.cert_pem.write_to_path(self.client_ca)
        self.renew()

    def renew(self) -> None:
        """Another certificate for the server, in place of the one in the files."""
        self.install(self._authority)

    def install(self, authority: trustme.CA | Authority) -> None:
        """A certificate of another authority."""
        chosen = authority._authority if isinstance(authority, Authority) else authority
        made = chosen.issue_cert(*HOSTS)
        aside = self.directory / "aside"
        for path, content in (
            (self.certificate, b"".join(blob.bytes() for blob in made.cert_chain_pems)),
            (self.key, made.private_key_pem.bytes()),
        ):
            aside.write_bytes(content)
            aside.rename(path)

    @property
    def flags(self) -> tuple[str, ...]:
        """For a server with TLS."""
        return ("--tls-certificate", str(self.certificate), "--tls-key", str(self.key))

    @property
    def root(self) -> bytes:
        """The authority's own certificate, PEM."""
        return self._authority.cert_pem.bytes()

    def credentials(self, *more: Authority) -> grpc.ChannelCredentials:
        """Of a client that trusts this authority (and others) and shows no certificate."""
        return grpc.ssl_channel_credentials(self.root + b"".join(other.root for other in more))

    def client_pair(self) -> tuple[bytes, bytes]:
        """A client's key and certificate chain, PEM."""
        made = self._authority.issue_cert("client@example.org")
        return made.private_key_pem.bytes(), b"".join(blob.bytes() for blob in made.cert_chain_pems)

    def mutual(self, server: Authority | None = None) -> grpc.ChannelCredentials:
        """Of a client with a certificate of this authority, for a server of `server` (unset: of this one)."""
        key, chain = self.client_pair()
        return grpc.ssl_channel_credentials((server or self).root, key, chain)
