"""The unmodified published client by mutual TLS and with an API key, an old and the current version."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from service.config.keys import Group, entry_text, new_key
from tests.conformance.test_tritonclient import CURRENT, OLD, REQUIREMENTS
from tests.support import onnx_models
from tests.support.certificates import Authority
from tests.support.server import running_server
from tests.support.venvs import python_with

SCRIPT = Path(__file__).with_name("secured_script.py")


@pytest.mark.parametrize("version", [CURRENT, OLD])
def test_the_client_by_tls_with_a_key(version: str, tmp_path: Path) -> None:
    """Unary, asynchronous and streaming calls; without the key, or for another model, it is told so."""
    python = python_with(*REQUIREMENTS[version])
    authority, api_key = Authority(tmp_path / "tls"), new_key()
    for name in ("double", "other"):
        onnx_models.write_model(tmp_path / "models", name, onnx_models.identity(), config="max_batch_size: 8\n")
    keys = tmp_path / "keys.toml"
    keys.write_text(entry_text("shop", api_key, (Group.INFERENCE, Group.METADATA), ("double",)))
    names = ("root", "key", "chain")
    files = [tmp_path / f"client.{name}" for name in names]
    for path, content in zip(files, (authority.root, *authority.client_pair()), strict=True):
        path.write_bytes(content)
    flags = (*authority.flags, "--tls-client-ca", str(authority.client_ca), "--api-keys", str(keys))
    with running_server(tmp_path / "models", *flags, credentials=authority.mutual()) as server:
        command = [str(python), str(SCRIPT), f"localhost:{server.grpc_port}", *map(str, files), api_key]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "ok"
