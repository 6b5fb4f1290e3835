"""A search page on 127.0.0.1: no script, no cookie, nothing written.

Other sites cannot read it: requests with a foreign `Host` (DNS rebinding) or `Origin` are refused, and the content
security policy allows the page's own style sheet and form only. Jinja escapes all text of documents and queries.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from intaglio.errors import IntaglioError
from intaglio.search.index import Index
from intaglio.search.results import Hit
from intaglio.search.snippets import Piece, snippet

HOST = "127.0.0.1"
PORT = 8642
MAX_K = 100
"""Most results on a page."""
MAX_SHOWN = 16
"""Most metadata fields and terms of a result."""
MAX_TARGET = 16_384
"""Most bytes of a request's target."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Shown:
    """A result as the page shows it; `terms` are matching terms with their contributions to the score."""

    id: str
    title: str
    score: float
    snippet: Sequence[Piece]
    metadata: Sequence[tuple[str, Any]] = ()
    terms: Sequence[tuple[str, float]] = ()


Search = Callable[[str, int, str], Sequence[Shown]]
"""Answer `(query, k, filter)`; `IntaglioError` is shown on the page."""


@cache
def _environment() -> Environment:
    return Environment(
        loader=ChoiceLoader([PackageLoader("intaglio.search"), PackageLoader("intaglio.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(name: str, facts: Sequence[str], search: Search, fields: Mapping[str, Sequence[str]]) -> str:
    """Return the page for the fields of its form: `q`, `k`, `filter`."""
    query, filter_, size = ((fields.get(key) or [default])[0].strip() for key, default in _DEFAULTS)
    hits: Sequence[Shown] = ()
    error, start = "", time.perf_counter()
    try:
        if not (size.isascii() and size.isdigit() and len(size) < 9 and 1 <= int(size) <= MAX_K):
            raise IntaglioError(f"the number of results is {size!r}; 1 to {MAX_K} is accepted")
        hits = search(query, int(size), filter_) if query else ()
    except IntaglioError as failure:
        error = str(failure)
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            name=name,
            facts=facts,
            query=query,
            filter=filter_,
            k=size,
            max_k=MAX_K,
            hits=hits,
            error=error,
            milliseconds=1000 * (time.perf_counter() - start),
        )
    )


_DEFAULTS = (("q", ""), ("filter", ""), ("k", "10"))


def serve(
    path: str | os.PathLike[str],
    *,
    port: int = PORT,
    encoder: str | os.PathLike[str] | None = None,
    device: str | None = None,
    ready: Callable[[str], None] = print,
) -> None:
    """Serve the search page of an index until interrupted.

    Args:
        path: directory of the index.
        port: 0 for any free port. Default 8642.
        encoder: see `Index.open`.
        device: see `Index.open`.
        ready: called with the address of the page. Default `print`.

    Raises:
        IntaglioError: the port is taken, or the index cannot be opened.
    """
    # SQLite and the encoder stay in one thread; connections have theirs, since browsers keep idle ones open.
    with ThreadPoolExecutor(1) as worker:
        index = worker.submit(Index.open, path, encoder=encoder, device=device).result()

        def answer(query: str, k: int, filter_: str) -> list[Shown]:
            return [shown(hit) for hit in index.search(query, k, filters=_conditions(filter_), explain=True)]

        try:
            facts = [*_facts(worker.submit(index.info).result()), *index.damaged]
            page = server(
                index.path.resolve().name, facts, lambda *request: worker.submit(answer, *request).result(), port
            )
            with page, suppress(KeyboardInterrupt):
                worker.submit(answer, index.path.name, 1, "").result()  # loads the encoder, compiles the kernels
                ready(f"http://{HOST}:{page.server_address[1]}/")
                page.serve_forever()
        finally:
            worker.submit(index.close).result()


def _conditions(text: str) -> list[str] | None:
    try:
        return shlex.split(text) or None
    except ValueError as error:
        raise IntaglioError(f"the filter {text!r} has an open quotation mark") from error


def _facts(info: Mapping[str, Any]) -> list[str]:
    encoder = f" with {info['encoder']['name']}" if info["encoder"] else ""
    size = f"{info['bytes']['total'] / 1e6:,.1f} MB"
    return [f"{info['documents']:,} documents", f"{info['kind']}{encoder}", size]


def shown(hit: Hit) -> Shown:
    """Return a hit as the page shows it."""
    return Shown(
        id=hit.id,
        title=hit.title or hit.id,
        score=hit.score,
        snippet=snippet(hit.text, hit.spans),
        metadata=[(name, value) for name, value in hit.metadata.items() if value != hit.id][:MAX_SHOWN],
        terms=list(hit.terms.items())[:MAX_SHOWN],
    )


def server(name: str, facts: Sequence[str], search: Search, port: int = PORT) -> ThreadingHTTPServer:
    """Return a bound server for a page; `serve_forever` runs it.

    Args:
        name: of the index, the page's title.
        facts: shown below the title.
        search: called in a thread for each request.
        port: 0 for any free port. Default 8642.

    Raises:
        IntaglioError: the port is taken.
    """

    class Handler(_Handler):
        def page(self, fields: Mapping[str, Sequence[str]]) -> str:
            return render(name, facts, search, fields)

    try:
        return _Server((HOST, port), Handler)
    except OSError as error:
        raise IntaglioError(
            f"port {port} of {HOST} cannot be used: {error.strerror}; choose another with --port"
        ) from error


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of the machine's name, which can take seconds."""
        TCPServer.server_bind(self)


class _Handler(BaseHTTPRequestHandler):
    """GET of `/` and `/style.css`; everything else is refused."""

    server_version = "intaglio"
    sys_version = ""
    timeout = 30

    def page(self, fields: Mapping[str, Sequence[str]]) -> str:
        """Return the page for the fields of its form."""
        raise NotImplementedError

    def do_GET(self) -> None:
        """Answer a request."""
        port = self.connection.getsockname()[1]
        own = {f"{HOST}:{port}", f"localhost:{port}"}
        hosts, origins = self.headers.get_all("Host") or [], self.headers.get_all("Origin") or []
        if len(hosts) != 1 or hosts[0].lower() not in own:
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST, f"this page answers requests for {HOST}:{port} only")
        elif any(origin.lower() not in {f"http://{host}" for host in own} for origin in origins):
            self._refuse(HTTPStatus.FORBIDDEN, "requests of other sites are refused")
        elif len(self.path) > MAX_TARGET:
            self._refuse(HTTPStatus.REQUEST_URI_TOO_LONG, f"the query is longer than {MAX_TARGET} bytes")
        else:
            self._answer()

    def _answer(self) -> None:
        target = urlsplit(self.path)
        if target.path == "/":
            try:
                fields = parse_qs(target.query, max_num_fields=16)
            except ValueError:
                self._refuse(HTTPStatus.BAD_REQUEST, "the request has too many fields")
                return
            self._send(HTTPStatus.OK, self.page(fields), "text/html")
        elif target.path == "/style.css":
            self._send(HTTPStatus.OK, _environment().get_template("page.css.j2").render(), "text/css")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with a line of plain text; methods other than GET arrive here."""
        if code == HTTPStatus.NOT_IMPLEMENTED:
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "only GET is accepted")
        else:
            self._refuse(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        self._send(status, sentence + "\n", "text/plain")

    def _send(self, status: HTTPStatus, text: str, kind: str) -> None:
        content = text.encode("utf-8", "replace")
        self.send_response(status)
        for key, value in {**_HEADERS, "Content-Type": f"{kind}; charset=utf-8"}.items():
            self.send_header(key, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: queries are the user's."""
