"""The status page in a real browser, before a real server under real load."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from service.config.keys import Group, entry_text, new_key
from tests.browser.chromium import NARROW, WAIT_MS, WIDE, Visit, overflow, running_browser, visit
from tests.browser.scenes import HEAVY, LIGHT, ROOT, load, write_scene
from tests.support import onnx_models
from tests.support.certificates import Authority
from tests.support.onnx_models import write_model
from tests.support.server import RunningServer, running_server

MODELS = ("fraud-score", "photo-tagger", "translator")
SHOTS = ROOT / "build" / "browser"
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as running:
        yield running


@pytest.fixture(scope="module")
def server(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    repository = tmp_path_factory.mktemp("models")
    # Objectives that are kept, or broken, on a machine that does much else.
    write_scene(repository, 2000, 20)
    with running_server(repository, "--metrics-port", "0") as running:
        yield running


def address(server: RunningServer, path: str = "/") -> str:
    return f"http://127.0.0.1:{server.metrics_port}{path}"


def both(browser: Browser, url: str) -> Iterator[tuple[str, Visit]]:
    """The page on a wide screen, dark, and on a telephone, light."""
    for name, viewport, scheme in (("wide", WIDE, "dark"), ("narrow", NARROW, "light")):
        with visit(browser, url, viewport, color_scheme=scheme) as visiting:
            yield name, visiting


def shoot(page: Page, name: str) -> None:
    """Keep what it looks like, to be looked at."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def card(page: Page, model: str) -> Any:
    return page.get_by_role("article").filter(has=page.get_by_role("heading", name=model))


def test_idle(server: RunningServer, browser: Browser) -> None:
    """Every model with its version, state and objective; nothing is invented about it."""
    for name, visiting in both(browser, address(server, "/status")):
        page = visiting.open()
        expect(page.get_by_role("heading", name="Idle", level=2)).to_be_visible()
        expect(page.locator("#why")).to_have_text("Nothing was asked for in the last minute.")
        for model in MODELS:
            expect(card(page, model)).to_contain_text("version 1 · ready")
            expect(card(page, model)).to_contain_text("Nothing was asked for in the last minute.")
        expect(card(page, "fraud-score")).to_contain_text("99 % within 2 s")
        expect(card(page, "translator")).to_contain_text("no objective")
        expect(page.locator("#fresh")).to_contain_text("Live")
        assert page.title() == "○ Idle · onclock"
        assert overflow(page) == []
        shoot(page, f"idle-{name}")


@pytest.mark.timed
def test_under_load(server: RunningServer, browser: Browser, tmp_path: Path) -> None:
    """The promise is kept, and the figures are those of the load."""
    with load(server, {**LIGHT, "photo-tagger": 0.5}, tmp_path):
        for name, visiting in both(browser, address(server)):
            page = visiting.open()
            expect(card(page, "fraud-score")).to_have_attribute("data-level", re.compile("keeping|at risk"))
            expect(page.locator("#headline")).to_have_text(re.compile("Keeping the promise|At risk"))
            button = page.get_by_role("button", name="fraud-score")
            if button.get_attribute("aria-expanded") == "false":
                button.click()
            fraud = card(page, "fraud-score")
            expect(fraud.locator("dl")).to_contain_text(re.compile(r"p99\s*[\d.]+\s*ms"))
            for label in ("Load, per second", "Latency", "Where the time goes", "Batches by rows"):
                chart = fraud.get_by_role("img", name=label)
                expect(chart).to_be_visible()
                # What is drawn is said, too.
                expect(chart).to_have_attribute("aria-label", re.compile(r"\d"))
            expect(fraud.get_by_role("listitem").filter(has_text="Device")).to_contain_text("cpu")
            assert overflow(page) == []
            shoot(page, f"load-{name}")


def test_breaching(server: RunningServer, browser: Browser, tmp_path: Path) -> None:
    """Overload: which model, what became of its requests, and why."""
    with load(server, HEAVY, tmp_path):
        for name, visiting in both(browser, address(server)):
            page = visiting.open()
            expect(page.get_by_role("heading", name="Breaching the promise", level=2)).to_be_visible()
            tagger = card(page, "photo-tagger")
            expect(tagger).to_have_attribute("data-level", "breaching")
            # On a machine that other tests slow down, slowness is as good a reason.
            causes = re.compile("Breaching: (overload|execution slower than profiled|execution unsteady)")
            expect(tagger.get_by_role("button")).to_contain_text(causes)
            # The details of what is in trouble are open without being asked for.
            expect(tagger.get_by_role("button")).to_have_attribute("aria-expanded", "true")
            expect(tagger).to_contain_text("99 % is the aim.")
            expect(tagger).to_contain_text(re.compile(r"refused · (overloaded|expired|queue full)\s*[\d,]+"))
            expect(page.get_by_role("article").first).to_contain_text("photo-tagger")
            assert page.title().startswith("✕ Breaching the promise")
            assert overflow(page) == []
            shoot(page, f"breach-{name}")


def test_the_keyboard_reaches_everything_and_updates_disturb_nobody(server: RunningServer, browser: Browser) -> None:
    """Details open with a key and stay as they were put; nodes, focus and scroll position outlive updates."""
    with visit(browser, address(server), {"width": 900, "height": 400}) as visiting:
        page = visiting.open()
        button = page.get_by_role("button", name="translator")
        for _ in range(20):
            page.keyboard.press("Tab")
            if button.evaluate("node => node === document.activeElement"):
                break
        expect(button).to_be_focused()
        before = button.get_attribute("aria-expanded")
        after = "false" if before == "true" else "true"
        page.keyboard.press("Enter")
        expect(button).to_have_attribute("aria-expanded", after)
        page.evaluate(
            """() => {
                 window.scrollTo(0, 120);
                 window.left = 0;
                 const seen = new MutationObserver((changes) => changes.forEach((change) =>
                   change.removedNodes.forEach((node) => {
                     window.left += node.nodeType === 1 && !node.isConnected;
                   })));
                 seen.observe(document.getElementById("models"), {childList: true});
                 document.querySelectorAll("article").forEach((node) => { node.seen = true; });
               }"""
        )
        asked = len(visiting.asked)
        with page.expect_response(re.compile("status.json")):
            pass
        with page.expect_response(re.compile("status.json")):
            pass
        assert len(visiting.asked) > asked
        expect(button).to_be_focused()
        expect(button).to_have_attribute("aria-expanded", after)
        assert page.evaluate("[window.left, scrollY]") == [0, 120]
        assert page.evaluate("[...document.querySelectorAll('article')].every((node) => node.seen)")
        # Another model is the most urgent one now: they change places, and still nobody is disturbed.
        names = page.locator("article .name").all_inner_texts()
        page.route(re.compile("status.json"), _other_way_round)
        expect(page.locator("article .name")).to_have_text(names[::-1])
        expect(button).to_be_focused()
        assert page.evaluate("window.left") == 0
        assert page.evaluate("[...document.querySelectorAll('article')].every((node) => node.seen)")


def _other_way_round(route: Route) -> None:
    answer = route.fetch()
    status = answer.json()
    status["models"].reverse()
    route.fulfill(response=answer, json=status)


def test_details_are_there_as_soon_as_they_are_opened(server: RunningServer, browser: Browser) -> None:
    """Not only after the next answer of the server."""
    with visit(browser, address(server), NARROW) as visiting:
        page = visiting.open()
        button = page.get_by_role("button", name="translator")
        if button.get_attribute("aria-expanded") == "true":
            button.click()
        shown = button.evaluate("node => { node.click(); return node.closest('article').innerText; }")
        for expected in ("Share in time", "Instances", "Largest batch"):
            assert expected in shown


def test_a_page_that_nobody_sees_asks_for_nothing(server: RunningServer, browser: Browser) -> None:
    """Until it is seen again."""
    with visit(browser, address(server), WIDE) as visiting:
        page = visiting.open()
        page.evaluate(
            """() => { Object.defineProperty(document, "hidden", {get: () => window.unseen, configurable: true});
                       window.unseen = true; document.dispatchEvent(new Event("visibilitychange")); }"""
        )
        page.wait_for_timeout(300)  # what was asked for before has been answered
        asked = len(visiting.asked)
        page.wait_for_timeout(4500)  # two polls would have been made
        assert len(visiting.asked) == asked
        with page.expect_response(re.compile("status.json")):
            page.evaluate("() => { window.unseen = false; document.dispatchEvent(new Event('visibilitychange')); }")


def test_whatever_a_model_is_called_is_shown_as_text(browser: Browser, tmp_path: Path) -> None:
    """The reason of a failed load with markup in it, a name of 255 letters; behind TLS and a key, on a telephone."""
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    long = "m" * 255
    write_model(tmp_path / "models", "broken", onnx_models.identity(), config=f'parameters {{ key: "{markup}" }}\n')
    write_model(tmp_path / "models", long, onnx_models.identity())
    keys = tmp_path / "keys.toml"
    key = new_key()
    keys.write_text(entry_text("person", key, (Group.METRICS,), ()))
    authority = Authority(tmp_path / "certificates")
    flags = ("--metrics-port", "0", "--metrics-tls", "--api-keys", str(keys), *authority.flags)
    credentials = authority.credentials()
    with running_server(tmp_path / "models", *flags, credentials=credentials) as server:
        url = address(server).replace("http:", "https:")
        options: dict[str, Any] = {"ignore_https_errors": True}
        person = {"username": "anybody", "password": key}
        with visit(browser, url, NARROW, http_credentials=person, **options) as visiting:
            page = visiting.open()
            expect(page.get_by_role("heading", name="A model failed to load", level=2)).to_be_visible()
            expect(card(page, "broken")).to_contain_text(markup)
            expect(card(page, long)).to_contain_text("version 1 · ready")
            assert page.locator("main img, main script").count() == 0
            assert overflow(page) == []
            shoot(page, "hostile-narrow")
        stranger = browser.new_context(ignore_https_errors=True)
        for path in ("/", "/status", "/status.json"):
            answer = stranger.request.get(url.removesuffix("/") + path)
            assert (answer.status, b"onclock_" in answer.body()) == (401, False)
        stranger.close()


def test_names_that_the_server_would_not_take_are_text_as_well(server: RunningServer, browser: Browser) -> None:
    """The page does not rely on it: names, versions, devices, reasons and causes with markup in them."""
    markup = '"><img src=x onerror=alert(1)>'

    def doctored(route: Any) -> None:
        status = route.fetch().json()
        status["verdict"]["text"] = status["verdict"]["cause"] = status["server"]["version"] = markup
        status["devices"][0]["name"] = status["devices"][0]["provider"] = markup
        for model in status["models"]:
            model["name"] += markup
            model["version"] = model["state"] = markup
            model["devices"] = [markup]
            model["broken"] = [{"kind": "refused", "reason": markup, "requests": 1}]
            model["batches"] = [{"rows": markup, "batches": 1}]
            model["verdict"]["text"] = model["verdict"]["cause"] = markup
        route.fulfill(json=status)

    with visit(browser, address(server), WIDE) as visiting:
        visiting.page.route("**/status.json", doctored)
        page = visiting.open()
        button = page.get_by_role("button", name=f"fraud-score{markup}")
        if button.get_attribute("aria-expanded") == "false":
            button.click()
        expect(card(page, "fraud-score")).to_contain_text(f"refused · {markup}")
        assert page.locator("img").count() == 0


def test_a_server_that_ends_and_comes_back(browser: Browser, tmp_path: Path) -> None:
    """The page says so in words, keeps what it knew, and goes on when there is an answer again."""
    write_model(tmp_path, "m", onnx_models.identity())
    with running_server(tmp_path, "--metrics-port", "0") as server:
        port = str(server.metrics_port)
        visiting = Visit(browser, address(server), NARROW)
        page = visiting.open()
        expect(card(page, "m")).to_be_visible()
    gone = page.get_by_role("alert")
    expect(gone).to_contain_text(
        re.compile(r"The server has not answered since .*What is below is from then; still trying")
    )
    expect(page.locator("#fresh")).to_have_text("No connection")
    expect(card(page, "m")).to_be_visible()
    assert page.title() == "✕ No answer · onclock"
    assert overflow(page) == []
    shoot(page, "gone-narrow")
    with running_server(tmp_path, "--metrics-port", port):
        expect(gone).to_be_hidden()
        expect(page.locator("#fresh")).to_contain_text("Live")
        assert page.title() == "○ Idle · onclock"
    visiting.context.close()
    # A browser says itself that it could not connect. There is nothing else.
    assert all("ERR_CONNECTION" in said or "ERR_EMPTY" in said for said in visiting.complaints), visiting.complaints


def test_it_can_be_left_out(tmp_path: Path) -> None:
    """`--status-page=false`: metrics and nothing else."""
    write_model(tmp_path, "m", onnx_models.identity())
    with running_server(tmp_path, "--metrics-port", "0", "--status-page=false") as server:
        for path in ("/", "/status.json"):
            with pytest.raises(urllib.error.HTTPError) as missing:
                urllib.request.urlopen(address(server, path), timeout=10)
            assert missing.value.code == 404
        with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
            assert b"onclock_build_info" in answer.read()
