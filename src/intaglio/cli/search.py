"""The commands `index`, `search` and `evaluate`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from intaglio.cli.console import (
    CommandGroup,
    Json,
    handle_errors,
    out,
    print_err,
    print_json,
    print_out,
    progress_bar,
    read_stdin,
)
from intaglio.errors import IntaglioError, printable

if TYPE_CHECKING:
    from intaglio.search import Hit, Index, TextEncoder
    from intaglio.search.milvus import MilvusIndex

_BLANKS = re.compile(r"\s+")


class IndexGroup(CommandGroup):
    """Group of the index commands; `index DOCS` is `index create DOCS`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the default command; see click."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["create", *args]
        return super().parse_args(ctx, args)


index_app = typer.Typer(
    cls=IndexGroup,
    help="Build or update a search index. `index DOCS -o INDEX` builds one (`create` may be left out).",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Where = Annotated[Path, typer.Argument(metavar="INDEX", help="Directory of the index.")]
Place = Annotated[str | None, typer.Argument(metavar="INDEX", help="Directory of the index; left out with --store.")]
Approximate = Annotated[
    bool, typer.Option("--ann", help="(dense, sparse) Search by what `index compact --ann` builds.")
]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="A Milvus collection instead of INDEX: milvus://host:port/name, or milvus:///path/file.db/name.",
    ),
]
Docs = Annotated[
    str | None,
    typer.Argument(
        metavar="DOCS",
        help="A folder (text, Markdown, reStructuredText, HTML, Python), a .jsonl or .csv file, or a datasets id.",
    ),
]
Device = Annotated[str | None, typer.Option(help="Device of the encoder: cpu, cuda, cuda:N, mps. [default: cpu]")]
Encoder = Annotated[
    str | None, typer.Option(help="New directory of the index's encoder. [default: as recorded in the index]")
]
TextField = Annotated[str, typer.Option(help="(JSONL, CSV, datasets) Field of the text.")]
IdField = Annotated[str, typer.Option(help="(JSONL, CSV, datasets) Field of the id.")]
Filter = Annotated[
    list[str] | None,
    typer.Option("--filter", help="Condition on metadata: type=md, year>=2020, title~=mask; can be repeated."),
]


@index_app.command("create")
@handle_errors
def create(
    docs: Docs = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory of the index.")] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="bm25, dense, sparse or hybrid. [default: bm25; with --encoder, what it is]"),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="minilm, splade-tiny, or a checkpoint directory. [default: the kind's own]")
    ] = None,
    chunk: Annotated[int, typer.Option(min=0, help="Maximum characters of a chunk; 0 keeps documents whole.")] = 2000,
    language: Annotated[str, typer.Option(help="(BM25) Language of the stemmer, or none.")] = "english",
    pooling: Annotated[str | None, typer.Option(help="(encoder) mean, cls, last or splade.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="(encoder) A field of the method that trained it as key=value; can be repeated."),
    ] = None,
    query_prompt: Annotated[str | None, typer.Option(help="(encoder) Text before each query.")] = None,
    document_prompt: Annotated[str | None, typer.Option(help="(encoder) Text before each chunk.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="(encoder) Chunks in a batch.")] = None,
    text_field: TextField = "text",
    id_field: IdField = "id",
    device: Device = None,
    store: StoreUrl = None,
    json: Json = False,
) -> None:
    """Build an index of documents. If it was stopped, the same command resumes it."""
    from intaglio.cli.settings import read_settings
    from intaglio.search import Index
    from intaglio.search.encoders import resolve_encoder

    docs = _given(docs, "DOCS")
    if (output is None) == (store is None):
        raise IntaglioError("the place of the index is missing or given twice: name -o INDEX or --store URL")
    options = {
        "pooling": pooling,
        "query_prompt": query_prompt,
        "document_prompt": document_prompt,
        "batch_size": batch_size,
        "device": device,
    }
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if set_:
        import yaml

        given["fields"] = {key: yaml.safe_load(value) for key, value in read_settings(set_).items()}
    chosen: Any = kind or "bm25"
    loaded: TextEncoder | str | None = encoder
    if kind is None and encoder is not None and store is None:
        loaded, given = resolve_encoder(encoder, given), {}
        chosen = loaded.kind
    if store is not None:
        from intaglio.search.milvus import MilvusIndex

        if language != "english":
            raise IntaglioError("--language is of BM25; a Milvus store holds dense or sparse vectors")
        with MilvusIndex(store, encoder, kind=kind, chunk=chunk, create=True, **given) as collection:
            _add(collection, docs, text_field, id_field, json)
        return
    assert output is not None
    empty = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    try:
        with Index.create(
            output, kind=chosen, encoder=loaded, chunk=chunk, language=language, exist_ok=True, **given
        ) as index:
            try:
                _add(index, docs, text_field, id_field, json)
            finally:
                empty = empty and len(index) == 0
    except IntaglioError:
        if empty:  # nothing was indexed, so nothing is left
            shutil.rmtree(output, ignore_errors=True)
        raise


@index_app.command("add")
@handle_errors
def add(
    index: Place = None,
    docs: Docs = None,
    text_field: TextField = "text",
    id_field: IdField = "id",
    encoder: Encoder = None,
    device: Device = None,
    store: StoreUrl = None,
    json: Json = False,
) -> None:
    """Add documents; a known id is an update."""
    from intaglio.search import open_index

    place, docs = _place(index, docs, store)
    docs = _given(docs, "DOCS")
    with open_index(place, encoder=encoder, device=device) as opened:
        _add(opened, docs, text_field, id_field, json)


def _given(value: str | None, name: str) -> str:
    """Return an argument that must be given."""
    if value is None:
        raise IntaglioError(f"the argument {name} is missing")
    return value


def _place(index: str | None, other: str | None, store: str | None) -> tuple[str, str | None]:
    """Return the place of the index and the next argument; with --store, INDEX is left out."""
    if store is None:
        return _given(index, "INDEX"), other
    if other is not None:
        raise IntaglioError("--store takes the place of INDEX; give only one of both")
    return store, index


def _add(index: Index | MilvusIndex, docs: str, text_field: str, id_field: str, json: bool) -> None:
    with progress_bar() as progress:
        report = index.add(docs, text_field=text_field, id_field=id_field, progress=progress)
    for sentence in report.skipped:
        print_err(f"skipped: {printable(sentence)}")
    if json:
        print_json({"index": str(index.path), **vars(report), "documents": len(index)})
        return
    print_out(
        f"{index.path}: {report.added:,} added, {report.updated:,} updated, {report.unchanged:,} unchanged in "
        f"{report.seconds:.1f} s; {len(index):,} documents"
    )


@index_app.command("delete")
@handle_errors
def delete(
    index: Place = None,
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID...", help="Ids of documents.")] = None,
    filter_: Filter = None,
    store: StoreUrl = None,
    json: Json = False,
) -> None:
    """Delete documents by id or by metadata."""
    from intaglio.search import open_index

    if store is not None:
        index, ids = store, [*([index] if index else []), *(ids or [])]
    place = _given(index, "INDEX")
    if bool(ids) == bool(filter_):
        raise IntaglioError("delete takes ids of documents or --filter conditions, and exactly one of both")
    with open_index(place) as opened:
        count = opened.delete(ids or None, filters=filter_ or None)
        left = len(opened)
    if json:
        print_json({"index": place, "deleted": count, "documents": left})
        return
    print_out(f"{place}: {count:,} deleted, {left:,} documents")


@index_app.command("info")
@handle_errors
def info(
    index: Place = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every segment with its checksum.")] = False,
    store: StoreUrl = None,
    json: Json = False,
) -> None:
    """Describe an index: its kind, encoder, documents and bytes."""
    from intaglio.search import open_index

    place, extra = _place(index, None, store)
    if extra is not None:
        raise IntaglioError("--store takes the place of INDEX; give only one of both")
    with open_index(place) as opened:
        facts = opened.info(verify)
    if json:
        print_json(facts)
        return
    table = Table("", "", box=None, show_header=False)
    for name, value in _flat(facts):
        table.add_row(Text(name, style="bold"), Text(printable(value)))
    out.print(table)


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name} ")
        elif isinstance(value, list):
            rows += [(prefix + name, str(item)) for item in value]
        elif value is not None:
            rows.append((prefix + name, f"{value:,}" if isinstance(value, int) and name != "version" else str(value)))
    return rows


@index_app.command("compact")
@handle_errors
def compact(
    index: Where,
    ann: Annotated[
        bool, typer.Option("--ann", help="Build approximate indexes of segments of 20,000 chunks or more.")
    ] = False,
    json: Json = False,
) -> None:
    """Merge segments and drop deleted rows. With --ann, build approximate indexes."""
    from intaglio.search import Index

    with Index.open(index) as opened, progress_bar() as progress:
        result = opened.compact(progress, approximate=ann)
    if json:
        print_json({"index": str(index), **result})
        return
    print_out(
        f"{index}: {result['segments_before']} segments became {result['segments']}, "
        f"{result['bytes_before'] / 1e6:,.1f} MB became {result['bytes'] / 1e6:,.1f} MB"
    )
    if ann:
        print_out(f"{index}: {result['approximate']} of {result['segments']} segments have an approximate index")


@index_app.command("upgrade")
@handle_errors
def upgrade(
    index: Where,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="The new encoder: minilm or a checkpoint directory. [default: that of the upgrade under way]"
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="bt2, bct, bct_distill, naive, procrustes or reembed. [default: bt2]"),
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Queries with their documents' ids: .jsonl or .csv with query and document.")
    ] = None,
    queries: Annotated[Path | None, typer.Option(help="A query log with one query a line, instead of --pairs.")] = None,
    rate: Annotated[float | None, typer.Option(help="Maximum number of chunks to encode a second.")] = None,
    sample: Annotated[int, typer.Option(min=2, help="Chunks for the training and the report.")] = 2000,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the training.")] = 500,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of bt2 as key=value; can be repeated."),
    ] = None,
    background: Annotated[
        bool, typer.Option("--background", help="Encode documents in a process of its own, after training and report.")
    ] = False,
    device: Device = None,
    json: Json = False,
) -> None:
    """Change the encoder of an index. It stays searchable; if stopped, the same command resumes the upgrade."""
    import yaml

    from intaglio.cli.settings import read_settings
    from intaglio.search import Index
    from intaglio.search.judgements import read_pairs
    from intaglio.search.upgrade import report_table

    if pairs is not None and queries is not None:
        raise IntaglioError("upgrade takes --pairs FILE or --queries LOG, and at most one of both")
    judged = None if pairs is None else read_pairs(pairs)
    log = [] if queries is None else _queries(queries)
    fields = {key: yaml.safe_load(value) for key, value in read_settings(set_ or []).items()}
    with Index.open(index, device=device) as opened, progress_bar() as progress:
        result = opened.upgrade(
            encoder, method=method, judged=judged, queries=log, rate=rate, sample=sample, steps=steps, fields=fields,
            reencode=not background, progress=progress,
        )  # fmt: skip
    if background and result["left"]:
        result["process"] = _resume_in_background(index, rate, device)
    if json:
        print_json({"index": str(index), **result})
        return
    if result["report"]:
        out.print(report_table(result["report"]))
    print_out(
        f"{index}: {result['encoded']:,} chunks encoded in {result['seconds']:.1f} s, {result['left']:,} left"
        + (f"; process {result['process']} encodes them" if "process" in result else "")
    )


def _queries(path: Path) -> list[str]:
    """Return the distinct lines of a query log."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise IntaglioError(f"cannot read the queries {path}: {getattr(error, 'strerror', None) or error}") from None
    distinct = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not distinct:
        raise IntaglioError(f"the query log {path} is empty; one query a line is accepted")
    return distinct


def _resume_in_background(index: Path, rate: float | None, device: str | None) -> int:
    """Start a process that encodes what is left, and return its id; its output is in `upgrade.log` of the index."""
    command = [sys.executable, "-m", "intaglio", "index", "upgrade", str(index.absolute())]
    command += [] if rate is None else ["--rate", str(rate)]
    command += [] if device is None else ["--device", device]
    with (index / "upgrade.log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    return process.pid


@handle_errors
def search(
    index: Place = None,
    query: Annotated[str | None, typer.Argument(help="The words to search for; - reads them from stdin.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Maximum number of results.")] = 10,
    filter_: Filter = None,
    mode: Annotated[str | None, typer.Option(help="(hybrid) Use only this retriever: bm25, dense or sparse.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the terms and retrievers that contribute to each score.")
    ] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Serve a search page on 127.0.0.1.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="(--serve) Port; 0 takes a free one.")] = 8642,
    encoder: Encoder = None,
    device: Device = None,
    store: StoreUrl = None,
    ann: Approximate = False,
    json: Json = False,
) -> None:
    """Search an index, or serve a search page (--serve)."""
    place, query = _place(index, query, store)
    if serve and store:
        raise IntaglioError("--serve serves an index in a directory; --store has no page")
    if serve == (query is not None) or (serve and json):
        raise IntaglioError("search takes a query, or --serve without a query and without --json")
    from intaglio.search import open_index

    if serve:
        from intaglio.search.serve import serve as run

        run(place, port=port, encoder=encoder, device=device, ready=lambda url: print_out(f"{url} (Ctrl+C stops it)"))
        return
    words = read_stdin().strip() if query == "-" else query or ""
    with open_index(place, encoder=encoder, device=device) as opened:
        start = time.perf_counter()
        hits = opened.search(
            words,
            k,
            filters=filter_ or None,
            explain=explain,
            mode=mode,  # type: ignore[arg-type]
            approximate=ann,
        )
        milliseconds = 1000 * (time.perf_counter() - start)
        damaged = opened.damaged
    for sentence in damaged:
        print_err(f"warning: {printable(sentence)}")
    if json:
        print_json(
            {
                "index": place,
                "query": words,
                "milliseconds": milliseconds,
                "damaged": damaged,
                "hits": [vars(hit) for hit in hits],
            }
        )
        return
    if not hits:
        print_err("no document matches")
    for hit in hits:
        _print_hit(hit)


def _print_hit(hit: Hit) -> None:
    from intaglio.search.snippets import snippet

    title = f"  {printable(hit.title)}" if hit.title and hit.title != hit.id else ""
    head = Text(f"{hit.rank:>2}. ").append(printable(hit.id), style="bold")
    out.print(head.append(f"{title}  {hit.score:.4g}", style="dim"), soft_wrap=True)
    text = Text("    ")
    for piece, marked in snippet(hit.text, hit.spans, 200):
        text.append(printable(_BLANKS.sub(" ", piece)), style="bold green" if marked else "")
    out.print(text, soft_wrap=True)
    if hit.terms:
        terms = ", ".join(f"{printable(term)} {weight:.2f}" for term, weight in list(hit.terms.items())[:12])
        print_out(f"    terms: {terms}")
    for name, part in hit.parts.items() if len(hit.parts) > 1 else ():
        print_out(f"    {name}: rank {part['rank']:.0f}, score {part['score']:.4g}")


@handle_errors
def evaluate(
    indexes: Annotated[
        list[Path] | None, typer.Argument(metavar="INDEX...", help="Directories of one or more indexes.")
    ] = None,
    qrels: Annotated[
        Path | None, typer.Option(help="Relevance judgements in TREC format: query-id 0 document-id grade.")
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(help="(--qrels) Queries: .jsonl with id and text, or lines of id, tab, text.")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Queries with their documents' ids: .jsonl or .csv with query and document.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Results for each query.")] = 100,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write a report with plots to this HTML file.")
    ] = None,
    device: Device = None,
    stores: Annotated[
        list[str] | None, typer.Option("--store", metavar="URL", help="A Milvus collection; can be repeated.")
    ] = None,
    ann: Approximate = False,
    json: Json = False,
) -> None:
    """Measure retrieval on judged queries. Shows nDCG, MRR, recall, latency and bytes of one or more indexes."""
    from intaglio import atomic_io
    from intaglio.search.evaluate import evaluate as run
    from intaglio.search.evaluate import report_page, table
    from intaglio.search.judgements import read_pairs, read_qrels

    if (pairs is None) == (qrels is None) or (qrels is None) != (queries is None):
        raise IntaglioError("evaluate takes --pairs FILE, or --qrels FILE with --queries FILE")
    places: list[str | Path] = [*(indexes or []), *(stores or [])]
    if not places:
        raise IntaglioError("the argument INDEX is missing")
    judged = read_pairs(pairs) if pairs is not None else read_qrels(qrels, queries)  # type: ignore[arg-type]
    with progress_bar() as progress:
        results = [run(index, judged, k, device=device, approximate=ann, progress=progress) for index in places]
    if output is not None:
        atomic_io.write_text(output, report_page(results))
    if json:
        print_json(results)
        return
    out.print(table(results))
    if output is not None:
        print_out(f"report: {output}")
