"""One headless Chromium for the whole folder; where there is none, its tests skip and say what to install."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from blora_compiler.page import render_page
from tests.browser.whatif_data import Analysis

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

# The narrow laptop is the width at which six cards in a row have least room.
LAPTOP, NARROW, PHONE, SMALL_PHONE = (1440, 900), (1121, 800), (390, 844), (360, 640)


def reason_to_skip(which: Callable[[str], str | None] = shutil.which) -> str | None:
    """What to install before a browser can be driven; None where nothing is missing."""
    missing = {"chromium": "apt-get install chromium", "chromedriver": "apt-get install chromium-driver"}
    advice = [command for program, command in missing.items() if which(program) is None]
    if importlib.util.find_spec("selenium") is None:
        advice.append("pip install selenium")
    return f"no browser to drive: {', '.join(advice)}" if advice else None


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    if reason := reason_to_skip():
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Both programs are named, so that selenium does not go looking for downloads.
    driver = webdriver.Chrome(options=options, service=Service(executable_path=shutil.which("chromedriver")))
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


class OpenedPage:
    """A rendered analysis in the browser, and what its tests ask of it."""

    def __init__(self, browser: Chrome, folder: Path, analysis: Analysis) -> None:
        self.browser = browser
        self.analysis = analysis
        self.path = folder / "page.html"
        self.path.write_text(render_page(analysis), encoding="utf-8")

    def open(self, fragment: str = "", size: tuple[int, int] = LAPTOP, scheme: str = "light") -> None:
        """Open afresh, so that nothing of the page before is left; `fragment` starts with `#`."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size[0] < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        self.browser.get("about:blank")
        self.browser.get(self.path.as_uri() + fragment)
        self.settle()

    def settle(self) -> None:
        """Wait until the charts of the last change are drawn."""
        self.browser.execute_async_script("blora.drawn.then(arguments[0])")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def wait_for(self, condition: str) -> None:
        """Wait until an expression of the page is true."""
        for _ in range(200):
            if self.run(f"return {condition}"):
                return
            self.run("return new Promise((done) => setTimeout(done, 50))")
        raise AssertionError(f"not so after ten seconds: {condition}")

    def select(self, side: str = "a", **change: str) -> None:
        self.run("blora.select(arguments[0], arguments[1])", change, side)
        self.settle()

    def find(self, selector: str) -> WebElement:
        return self.browser.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def numbers(self) -> list[dict[str, Any]]:
        """Every element of the page that shows a number: its path, exact value, side, derivation and text."""
        shown = self.run(
            "return [...document.querySelectorAll('[data-number]')].map(e => ({...e.dataset, text: e.textContent}))"
        )
        return [{**entry, "value": json.loads(entry["value"])} for entry in shown]

    def overflow(self) -> int:
        """By how many pixels the page is wider than its window, whose innerWidth grows with the page on a phone."""
        return self.run(
            "const {scrollWidth, clientWidth} = document.documentElement; return scrollWidth - clientWidth"
        )

    def clipped(self) -> list[str]:
        """What is wider than its card, which cuts it: the title of the card, and the text."""
        return self.run(
            "return [...document.querySelectorAll('.card *')].filter((each) =>"
            " each.getBoundingClientRect().right > each.closest('.card').getBoundingClientRect().right)"
            ".map((each) => each.closest('.card').querySelector('h3').textContent + ': ' + each.textContent)"
        )

    def state(self) -> dict[str, Any]:
        return self.run("return blora.state")


@pytest.fixture
def open_page(browser: Chrome, tmp_path: Path) -> Iterator[Callable[..., OpenedPage]]:
    """Render and open an analysis; the console must be silent when the test is over."""

    def opened(analysis: Analysis, fragment: str = "", **how: Any) -> OpenedPage:
        page = OpenedPage(browser, tmp_path, analysis)
        page.open(fragment, **how)
        return page

    browser.get_log("browser")
    yield opened
    assert browser.get_log("browser") == []
