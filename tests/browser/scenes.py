"""What the status page is shown: a repository, and loads that keep its promises or break them.

`python -m tests.browser.scenes [idle] [load] [breach]` takes the screenshots of docs/status-page.md. It takes ten
minutes, on a machine that does nothing else, since the charts show five.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, expect

from tests.browser.chromium import NARROW, WIDE, running_browser, visit
from tests.support import onnx_models
from tests.support.onnx_models import write_model
from tests.support.server import RunningServer, running_server

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
STOP_S = 20.0
# As long as the chart.
PICTURE_S = 300.0
MOST_BYTES = 150_000
# A machine that does something else for a moment breaks a promise for a minute.
HEADLINE_MS = 180_000


def write_scene(repository: Path, fraud_ms: int, tagger_ms: float) -> None:
    """Two models with objectives, of which `photo-tagger` takes `tagger_ms` for each request alone, and one without."""
    slo = 'parameters {{ key: "latency_slo_ms" value {{ string_value: "{}" }} }}\n'
    alone = "max_batch_size: 1\n" + slo.format(400)
    write_model(repository, "fraud-score", onnx_models.slow_for(0.5), config=slo.format(fraud_ms))
    write_model(repository, "photo-tagger", onnx_models.slow_for(tagger_ms), config=alone)
    write_model(repository, "translator", onnx_models.slow_for(2))


# What is sent: requests a second. Of a `photo-tagger` that takes 20 ms, 50 can be answered; of one of 10 ms, 100.
LIGHT = {"fraud-score": 40.0, "translator": 6.0, "photo-tagger": 4.0}
HEAVY = {"fraud-score": 20.0, "translator": 2.0, "photo-tagger": 120.0}


def scenario(address: str, rates: dict[str, float], seconds: float) -> str:
    """A scenario of our load tests. Arrivals of `translator` come in bursts."""
    lines = ["name: scene", f"server: {address}", f"duration: {seconds:g}s", "slo: 200ms", "load:"]
    for model, rate in rates.items():
        arrivals = f"kind: gamma, cv: 2, rate: {rate}" if model == "translator" else f"kind: poisson, rate: {rate}"
        lines.append(f"  - {{model: {model}, arrivals: {{{arrivals}}}}}")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def load(server: RunningServer, rates: dict[str, float], directory: Path, seconds: float = 600.0) -> Iterator[None]:
    """Our load tester at work, until the block is left."""
    file = directory / "scene.yaml"
    file.write_text(scenario(server.address, rates, seconds))
    said = directory / "load.txt"
    command = [sys.executable, "-m", "loadtests", "run", str(file), "--quiet", "--out", str(directory / "loadtests")]
    with said.open("w") as output:
        # In a session of its own, since it has workers: they all end with it.
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield
        assert process.poll() is None, f"the load ended: {said.read_text()}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_S)


def picture(browser: Browser, url: str, name: str, headline: str, width: str, opened: str = "") -> int:
    """Take one screenshot, when the page has the headline; its size, bytes.

    Of the whole page where it is wide, of what a telephone shows first (two screens) where it is narrow. `opened`: a
    model whose details are opened.
    """
    viewport = WIDE if width == "wide" else NARROW
    path = IMAGES / f"status-{name}-{width}.png"
    with visit(browser, url, viewport, device_scale_factor=1 if width == "wide" else 2) as visiting:
        page = visiting.open()
        expect(page.locator("#headline")).to_have_text(headline, timeout=HEADLINE_MS)
        if opened:
            expand(page, opened)
        height = page.evaluate("Math.ceil(document.body.getBoundingClientRect().bottom)")
        most = height if width == "wide" else min(height, 2 * viewport["height"])
        page.screenshot(path=path, full_page=True, clip={"x": 0, "y": 0, "width": viewport["width"], "height": most})
    compress(path)
    return path.stat().st_size


def expand(page: Page, model: str) -> None:
    """Open the details of a model that are closed."""
    button = page.get_by_role("button", name=model)
    if button.get_attribute("aria-expanded") == "false":
        button.click()


def compress(path: Path) -> None:
    """To a palette of 256 colours: those that cover most, exactly, and the rarer ones as well as the rest allows."""
    from PIL import Image

    with Image.open(path) as image:
        whole = image.convert("RGB")
    counted = sorted(whole.getcolors(whole.width * whole.height) or [], reverse=True)
    often = [part for _, colour in counted[:128] for part in colour]
    rare = whole.quantize(128, method=Image.Quantize.MAXCOVERAGE).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette((often + rare)[: 3 * 256])
    whole.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)


def main(wanted: Collection[str]) -> int:
    """Take the pictures of the `wanted` scenes: `idle`, `load`, `breach`."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, running_browser() as browser:
        directory = Path(temporary)
        repository = directory / "models"
        write_scene(repository, 500, 10)
        with running_server(repository, "--metrics-port", "0", "--profile-budget-ms", "500") as server:
            url = server.metrics_url.replace("/metrics", "/")

            def both(name: str, headline: str, opened: str) -> None:
                for width in ("wide", "narrow"):
                    size = picture(browser, url, name, headline, width, opened if width == "narrow" else "")
                    sys.stdout.write(f"{name} {width}: {size} bytes\n")
                    assert size < MOST_BYTES

            if "idle" in wanted:
                time.sleep(10)
                both("idle", "Idle", "")
            if wanted == {"idle"}:
                return 0
            with load(server, LIGHT, directory):
                time.sleep(PICTURE_S)
                if "load" in wanted:
                    both("load", "Keeping the promise", "fraud-score")
            if "breach" not in wanted:
                return 0
            with load(server, {**HEAVY, "photo-tagger": 250.0}, directory):
                time.sleep(PICTURE_S / 3)
                both("breach", "Breaching the promise", "photo-tagger")
    return 0


if __name__ == "__main__":
    sys.exit(main(set(sys.argv[1:]) or {"idle", "load", "breach"}))
