"""The search page: requests that it answers and refuses, escaping, and its look in a browser."""

from __future__ import annotations

import http.client
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import pytest

from intaglio.errors import IntaglioError
from intaglio.search.serve import MAX_TARGET, Shown, server
from tests.browser import browse, find_browser

SCRIPT = "<script>document.title='owned'</script>"
IMAGE = "<img src=x onerror=\"document.title='owned'\">"


def results(query: str, k: int, filter_: str) -> Sequence[Shown]:
    if filter_:
        raise IntaglioError(f"the filter {filter_!r} is not accepted")
    if query == "none":
        return []
    hostile = Shown(
        id=f"docs/{SCRIPT}.md",
        title=f"{SCRIPT} title",
        score=7.25,
        snippet=[(f"before {IMAGE} ", False), ("mask", True), (f" after {SCRIPT}", False)],
        metadata=[(SCRIPT, f'"{IMAGE}')],
        terms=[(f"{SCRIPT}mask", 1.5)],
    )
    plain = Shown(
        id="docs/attention.md",
        title="Attention masks",
        score=5.5,
        snippet=[
            ("A ", False),
            ("mask", True),
            (" hides keys from a query, so that a decoder sees no later token.", False),
        ],
        metadata=[("type", "md"), ("year", 2024)],
        terms=[("mask", 1.91), ("attention", 0.64), ("hidden", 0.2)],
    )
    return [plain, hostile][:k]


@pytest.fixture
def port() -> Iterator[int]:
    page = server(f"papers {SCRIPT}", ["2 documents", "sparse with splade-tiny", "0.1 MB"], results, port=0)
    with page:
        thread = threading.Thread(target=page.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield page.server_address[1]
        page.shutdown()
        thread.join()


def ask(
    port: int, target: str, method: str = "GET", host: str | None = None, **headers: str
) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, target, skip_host=True)
    for key, value in {"Host": host or f"127.0.0.1:{port}", **headers}.items():
        connection.putheader(key, value)
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), content


def test_the_page_lists_results_with_marks_and_weights(port: int) -> None:
    status, headers, page = ask(port, "/?q=mask&k=1")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "<mark>mask</mark> hides keys" in page
    assert "<li>attention <b>0.64</b></li>" in page
    assert "type: md · year: 2024 · score 5.5" in page
    assert "1 result in" in page
    assert "No document matches this query." in ask(port, "/?q=none")[2]
    assert 'class="hits"' not in ask(port, "/")[2]


def test_everything_is_escaped(port: int) -> None:
    status, _, page = ask(port, f"/?q={quote(SCRIPT)}")
    assert status == 200
    assert page.count("&lt;script&gt;") >= 8  # name, title, query, id, heading, snippet, metadata, term
    assert not re.search(r"<(script|img)|\bon\w+=\"", page.replace(" autofocus", ""))
    assert "style=" not in page


def test_bad_input_is_a_sentence_on_the_page(port: int) -> None:
    for target, sentence in (
        ("/?q=mask&k=0", "the number of results is &#39;0&#39;; 1 to 100 is accepted"),
        ("/?q=mask&k=1000000000000", "1 to 100 is accepted"),
        ("/?q=mask&k=²", "1 to 100 is accepted"),
        ("/?q=mask&filter=a", "the filter &#39;a&#39; is not accepted"),
    ):
        status, _, page = ask(port, quote(target, safe="/?&="))
        assert (status, sentence in page) == (200, True), target


def test_only_get_is_accepted(port: int) -> None:
    for method in ("POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"):
        status, headers, _ = ask(port, "/", method)
        assert (status, headers["Allow"]) == (405, "GET")


def test_other_paths_and_long_targets_are_refused(port: int) -> None:
    assert ask(port, "/../../etc/passwd")[0] == 404
    assert ask(port, "//127.0.0.1/")[0] == 404
    assert ask(port, "/?q=" + "a" * MAX_TARGET)[0] == 414
    assert ask(port, "/?" + "a=b&" * 20)[0] == 400


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil.example:{port}"]
)
def test_a_foreign_host_is_refused(port: int, host: str) -> None:
    status, _, text = ask(port, "/?q=mask", host=host.format(port=port))
    assert (status, "mask" in text) == (421, False)


def test_a_foreign_origin_is_refused(port: int) -> None:
    assert ask(port, "/", host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1", f"https://127.0.0.1:{port}"):
        assert ask(port, "/?q=mask", Origin=origin)[0] == 403


def test_the_policy_allows_no_script(port: int) -> None:
    for target in ("/", "/style.css", "/none"):
        headers = ask(port, target)[1]
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "script-src" not in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in headers


def test_a_port_in_use_is_refused(port: int) -> None:
    with pytest.raises(IntaglioError, match=f"port {port} of 127.0.0.1 cannot be used"):
        server("x", [], results, port)


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def chromium() -> str:
    return find_browser()


def test_hostile_text_runs_nothing_in_a_browser(port: int, chromium: str, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{port}/?q={quote('mask ' + SCRIPT)}"
    dom = browse(chromium, tmp_path / "profile", "--virtual-time-budget=2000", "--dump-dom", address)
    assert "<mark>mask</mark>" in dom
    assert "<title>owned</title>" not in dom
    assert not re.search(r"<(script|img)\b", dom)


def test_a_rebound_name_shows_nothing(port: int, chromium: str, tmp_path: Path) -> None:
    rules = "--host-resolver-rules=MAP evil.example 127.0.0.1"
    dom = browse(chromium, tmp_path / "profile", rules, "--dump-dom", f"http://evil.example:{port}/?q=mask")
    assert "<mark>" not in dom
    assert f"requests for 127.0.0.1:{port} only" in dom


def test_the_style_sheet_applies(port: int, chromium: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    picture = Path(os.environ.get("INTAGLIO_SCREENSHOT", tmp_path / "page.png"))
    browse(
        chromium,
        tmp_path / "profile",
        f"--screenshot={picture}",
        "--window-size=1000,800",
        f"http://127.0.0.1:{port}/?q=mask",
    )
    with image.open(picture) as shown:
        pixels = shown.convert("RGB")
        colours = {colour for _, colour in pixels.getcolors(1 << 24)}
    assert (0x9C, 0x45, 0x19) in colours  # the accent colour of the button, light palette
