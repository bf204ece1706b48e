"""The two bases of the image, made of Debian packages: one to build on, and one to run on that has no shell.

The `Dockerfile` names images of public registries; where those cannot be reached these stand in for them. The second is
put together as distroless images are: packages unpacked, nothing of them run.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

SUITE = "bookworm"
# Python 3.11 and what it loads; what the native ingress and ONNX Runtime load; certificates; time zones.
RUN_PACKAGES = (
    *("base-files", "netbase", "media-types", "tzdata", "ca-certificates"),
    *("libc6", "libgcc-s1", "libstdc++6", "libgomp1"),
    *("libssl3", "zlib1g", "libexpat1", "libbz2-1.0", "liblzma5", "libffi8", "libuuid1", "libcrypt1", "libsqlite3-0"),
    *("libreadline8", "libncursesw6", "libtinfo6", "libdb5.3", "libnsl2", "libtirpc3", "libcom-err2"),
    *("libgssapi-krb5-2", "libkrb5-3", "libk5crypto3", "libkrb5support0", "libkeyutils1"),
    *("python3-minimal", "python3.11-minimal", "python3.11", "libpython3.11-minimal", "libpython3.11-stdlib"),
)
NOBODY = 65532
# How this machine reaches its registries also holds in the image that is built on.
OF_THIS_MACHINE = ("/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")


def build_base(name: str) -> None:
    """Import a minimal Debian as image `name`. Raises `subprocess.CalledProcessError`."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "root"
        command = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--include=ca-certificates", SUITE]
        subprocess.run([*command, str(root)], check=True)
        for path in filter(Path.exists, map(Path, OF_THIS_MACHINE)):
            shutil.copyfile(path, root / path.relative_to("/"))
        _import(root, name)


def run_base(name: str) -> None:
    """Import what the server runs on as image `name`: no shell, no package manager, a user that is not root."""
    with tempfile.TemporaryDirectory() as scratch:
        packages, root = Path(scratch) / "packages", Path(scratch) / "root"
        packages.mkdir(mode=0o755)
        Path(scratch).chmod(0o755)
        subprocess.run(["apt-get", "download", "-qq", *RUN_PACKAGES], check=True, cwd=packages)
        for directory in ("bin", "lib", "lib64", "sbin"):
            (root / "usr" / directory).mkdir(parents=True)
            (root / directory).symlink_to(f"usr/{directory}")
        for package in sorted(packages.glob("*.deb")):
            with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as content:
                unpack = ["tar", "--extract", "--keep-directory-symlink", "--directory", str(root)]
                subprocess.run(unpack, stdin=content.stdout, check=True)
        bundle = sorted((root / "usr/share/ca-certificates").rglob("*.crt"))
        (root / "etc/ssl/certs").mkdir(parents=True, exist_ok=True)
        (root / "etc/ssl/certs/ca-certificates.crt").write_text("".join(path.read_text() for path in bundle))
        (root / "etc/passwd").write_text(
            f"root:x:0:0:root:/root:/none\nnonroot:x:{NOBODY}:{NOBODY}:nonroot:/nonexistent:/none\n"
        )
        (root / "etc/group").write_text(f"root:x:0:\nnonroot:x:{NOBODY}:\n")
        (root / "tmp").mkdir(exist_ok=True)
        (root / "tmp").chmod(0o1777)
        for waste in ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian"):
            shutil.rmtree(root / waste, ignore_errors=True)
        _import(root, name)


def _import(root: Path, name: str) -> None:
    with subprocess.Popen(["tar", "--create", "--directory", str(root), "."], stdout=subprocess.PIPE) as content:
        subprocess.run(["podman", "import", "--quiet", "-", name], stdin=content.stdout, check=True)
