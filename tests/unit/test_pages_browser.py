"""The pages as a reader's browser shows them: whole at every width, light and dark, and up to date."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_report_live import record
from test_serving_policy import TOKENIZER, look, model, normalizer

from fixtures.browser import PROGRAM, Browser, browser
from fixtures.report_runs import HOSTILE, make_run
from fixtures.searches import search_page
from fixtures.served import serving
from tutti.report.chinese import Language
from tutti.report.live import serve_report
from tutti.report.page import write_report
from tutti.report.served_page import served_page
from tutti.serving.client import Client
from tutti.serving.policy import Policy
from tutti.types import UserError

WIDTHS = (400, 800, 1400)
SMALLEST_TEXT = """Math.min(...[...document.querySelectorAll("svg:is([data-chart], .plot) text")].map(one => {
  const svg = one.ownerSVGElement, scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  return parseFloat(getComputedStyle(one).fontSize) * scale;
}))"""
CONTRAST = """(() => {
  const light = colour => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(one => one / 255);
    const linear = parts.map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const style = getComputedStyle(document.body);
  const pair = [style.color, style.backgroundColor].map(light).sort();
  return [light(style.backgroundColor), (pair[1] + 0.05) / (pair[0] + 0.05)];
})()"""
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with browser() as one:
        yield one


def check_looks(chrome: Browser) -> None:
    """Nothing runs out of the window, labels can be read, the reader's choice of light or dark is kept."""
    for dark in (False, True):
        for width in WIDTHS:
            chrome.look(width, dark=dark)
            assert chrome.run("document.documentElement.scrollWidth") <= width
            assert chrome.run(SMALLEST_TEXT) >= 7.5, width
            if width == 400:
                cut = "[...document.querySelectorAll('figure.wide:has(.narrow)')]"
                assert chrome.run(f"{cut}.every(one => one.scrollWidth <= one.clientWidth)"), "a row is cut"
        lightness, contrast = chrome.run(CONTRAST)
        assert (lightness < 0.05) == dark and contrast > 7
    chrome.run("document.body.focus()")
    chrome.press("Tab")
    assert chrome.run("document.activeElement !== document.body && getComputedStyle(document.activeElement)")


def fetch(address: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(model(), normalizer(), TOKENIZER, warn=False)


@needs_browser
def test_the_page_of_a_server_shows_the_last_observation_and_follows(policy: Policy, chrome: Browser) -> None:
    with serving(policy, page=served_page) as (_, address):
        page = address.replace("ws:", "http:") + "/"
        chrome.open(page)
        assert chrome.run("document.querySelector('h1').textContent") == "Waiting for a robot"
        with Client(address) as client:
            images, state = look(size=20)
            chunk = client.infer({"images": images, "state": state, "prompt": HOSTILE})["actions"]
            chrome.wait("document.querySelector('h1').textContent !== 'Waiting for a robot'")
            assert HOSTILE in chrome.run("document.querySelector('h1').textContent"), "a text, not code"
            assert chrome.run("[...document.images].map(one => [one.naturalWidth, one.alt])") == [
                [20, "right, 20 x 20 pixels"],
                [20, "left, 20 x 20 pixels"],
            ]
            shown = json.loads(chrome.run("document.querySelector('svg[data-chart]').dataset.chart"))
            np.testing.assert_allclose(shown["series"][0]["ys"], chunk[:, 0], rtol=1e-3)
            check_looks(chrome)
            client.infer({"images": images, "state": state + 1000, "prompt": "close it"})
            chrome.wait("document.querySelector('h1').textContent.includes('close it')")
            assert "far outside" in chrome.run("document.querySelector('.warnings').textContent")
    assert [one for one in chrome.errors if "favicon" not in one] == []


def test_the_page_is_off_unless_asked_for_and_no_site_or_stranger_reads_it(policy: Policy) -> None:
    with serving(policy) as (_, address):
        assert fetch(address.replace("ws:", "http:") + "/")[0] == 426
    with serving(policy, page=served_page) as (_, address):
        page = address.replace("ws:", "http:") + "/"
        assert fetch(page)[0] == 200 and fetch(page + "state")[1] == "0-0-0-0-0"
        assert fetch(page, Host="robots.example:80")[0] == 403 == fetch(page + "state", Host="a.example")[0]
        assert fetch(page + "elsewhere")[0] == 426
    with serving(policy, page=served_page, token="sésame") as (_, address):
        page = address.replace("ws:", "http:") + "/"
        assert fetch(page)[0] == 401 == fetch(page, Authorization="Basic !")[0]
        assert fetch(page, Authorization="Basic bWU6c8Opc2FtZQ==")[0] == 200  # me:sésame
        assert fetch(page, Authorization="Basic bWU6c2VzYW1l")[0] == 401  # me:sesame
        with pytest.raises(UserError, match="401"):
            Client(address)


@needs_browser
def test_the_page_of_a_search_tells_its_keys_apart_and_shows_what_is_there(
    chrome: Browser, tmp_path: Path
) -> None:
    chrome.open(search_page(tmp_path).as_uri())
    check_looks(chrome)
    chrome.look(1400)
    texts = "[...document.querySelectorAll('figure.wide svg text')].map(one => one.textContent)"
    names = [text for text in chrome.run(texts) if text == "lr" or text.endswith(".share")]
    assert names == ["lr", "align.share", "recon.share", "state.share"], "no two axes have one name"
    charts = "document.querySelectorAll('svg.plot')"
    assert chrome.run(f"{charts}.length") == 7
    assert chrome.run(f"[...{charts}].every(one => one.querySelectorAll('.mark').length === 1)"), (
        "the default"
    )
    best = "[...document.querySelectorAll('svg.plot')].map(one => one.querySelectorAll('.c2').length)"
    assert set(chrome.run(best)) == {1}
    legends = "[...document.querySelectorAll('figure:has(.plot) .legend')].map(one => one.textContent)"
    assert set(chrome.run(legends)) == {"the bestto the topthe default"}, "only signs that are drawn"
    first = "document.querySelector('svg.plot [data-tip]')"
    assert "lr=" in chrome.run(f"{first}.dataset.tip")
    chrome.run(f"{first}.dispatchEvent(new PointerEvent('pointermove', {{clientX: 9, clientY: 9}}))")
    assert chrome.run("!document.querySelector('#tip').hidden")
    cells = "[...document.querySelectorAll('#trials td.text')].map(one => one.textContent)"
    assert HOSTILE in chrome.run(cells), "a text, not code"
    wide = "(() => { const box = document.querySelector('#trials .scroll');"
    assert chrome.run(wide + " return box.scrollWidth <= box.clientWidth; })()"), "no column is cut"
    chrome.open(search_page(tmp_path, trials=3, confirmed=False).as_uri())
    assert "Nothing was confirmed" in chrome.run("document.querySelector('#confirmation').textContent")
    assert [one for one in chrome.errors if "favicon" not in one] == []


@needs_browser
@pytest.mark.parametrize("language", ["en", "zh"])
def test_reports_are_whole_at_every_width(language: Language, chrome: Browser, tmp_path: Path) -> None:
    chrome.open(write_report(make_run(tmp_path / "run"), language).as_uri())
    check_looks(chrome)
    assert [one for one in chrome.errors if "favicon" not in one] == []
    title = chrome.run("document.querySelector('#success h2').textContent")
    assert title == {"en": "Success per task", "zh": "各任务的成功率"}[language]
    assert chrome.run("document.documentElement.lang") == {"en": "en", "zh": "zh-Hans"}[language]
    quotes = chrome.run("[...document.querySelectorAll('q')].map(one => one.textContent)")
    assert chrome.run("document.querySelectorAll('svg.narrow').length") > 0
    assert HOSTILE in quotes and "please push" in quotes, (
        "what comes from data stays as it is, and is no code"
    )
    heads = chrome.run("[...document.querySelectorAll('h2, nav a, .tile span')].map(one => one.textContent)")
    assert all(any("一" <= letter <= "鿿" for letter in head) == (language == "zh") for head in heads)
    chrome.run("document.querySelector('svg[data-chart]').dispatchEvent(new PointerEvent('pointermove'))")
    assert ("优化步" if language == "zh" else "optimizer step") in chrome.run(
        "document.querySelector('#tip').textContent"
    )


@needs_browser
def test_a_live_report_follows_its_run_and_keeps_what_the_reader_has_open(
    chrome: Browser, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for step in (10, 20):
        record(run, step)
    server = serve_report([run])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        chrome.open(f"http://127.0.0.1:{server.server_address[1]}/")
        chrome.run("document.querySelector('nav a').focus()")
        before = chrome.run("document.querySelector('.tiles').textContent")
        record(run, 987_654)
        chrome.wait("document.querySelector('.tiles').textContent.includes('987,654')")
        assert "987,654" not in before
        assert chrome.run("document.activeElement.matches('nav a')"), "the keyboard stays where it was"
        check_looks(chrome)
    finally:
        server.shutdown()
        server.server_close()
