"""The server of the pages: it reads the run's files, and writes nothing but the marks of bad chains."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlsys.errors import RlsysError
from rlsys.search.marks import chain_digest, read_marks, write_marks
from rlsys.trees import TreeFailure
from rlsys.viewer import pages
from rlsys.viewer.run_files import RunFiles

STATIC = Path(__file__).parent / "static"
_FORM_BYTES = 4096
_HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
}


LOCAL = ("127.0.0.1", "localhost", "::1")


def build(runs: Sequence[RunFiles], hosts: Sequence[str] = LOCAL) -> ASGIApp:
    """Return the application.

    Args:
        runs: one run, or two to compare.
        hosts: names under which the server may be asked; none for all. A page elsewhere could otherwise point a name of
            its own at this machine, and read the run.
    """
    viewer = _Viewer(runs)
    routes = [
        Route("/", viewer.overview),
        Route("/data.json", viewer.data),
        Route("/timeline", viewer.timeline),
        Route("/rollouts", viewer.rollouts),
        Route("/trees", viewer.trees),
        Route("/tree/{number:int}", viewer.tree),
        Route("/favicon.ico", lambda _request: Response(status_code=204)),
        Route("/mark", viewer.mark, methods=["POST"]),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    if len(runs) > 1:
        routes.append(Route("/compare", viewer.compare))
    handlers: dict[Any, Any] = {RlsysError: viewer.failed, HTTPException: viewer.failed, OSError: viewer.failed}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), hosts)


class _Viewer:
    """The handlers of the pages. They run in threads, as they read files."""

    def __init__(self, runs: Sequence[RunFiles]) -> None:
        self._runs = runs
        self._token = secrets.token_urlsafe()  # a form of another site cannot know it

    def overview(self, request: Request) -> Response:
        return self._page(request, "overview.html", "Curves", pages.overview(self._runs))

    def data(self, _request: Request) -> Response:
        return JSONResponse(pages.points(self._runs))

    def timeline(self, request: Request) -> Response:
        return self._page(request, "timeline.html", "Times", pages.times(self._run(request)), switches=True)

    def rollouts(self, request: Request) -> Response:
        order, colour = (request.query_params.get(name, "") for name in ("order", "colour"))
        go = _number(request, "go")  # a button beside the field with the version
        version = _number(request, "version") if go is None else go
        values = pages.rollouts(self._run(request), version, order, colour)
        return self._page(request, "rollouts.html", "Rollouts", values, switches=True)

    def compare(self, request: Request) -> Response:
        values = pages.compare(self._runs, _number(request, "version"), request.query_params.get("colour", ""))
        return self._page(request, "compare.html", "Compare rollouts", values)

    def trees(self, request: Request) -> Response:
        query, only = request.query_params.get("q", ""), request.query_params.get("only", "all")
        values = pages.tree_list(self._run(request), _number(request, "page") or 1, query, only)
        values["link"] = urlencode({"run": self._chosen(request), "q": query, "only": only})
        return self._page(request, "trees.html", "Trees", values, switches=True)

    def tree(self, request: Request) -> Response:
        number, node = request.path_params["number"], _number(request, "node") or 0
        values = pages.tree(self._run(request), number, self._chosen(request), node)
        return self._page(request, "tree.html", values["view"]["prompt_id"], values)

    async def mark(self, request: Request) -> Response:
        """Mark a chain as bad, or take its mark away."""
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _FORM_BYTES:
                raise HTTPException(413, "the form is too long")
        form = {name: values[0] for name, values in parse_qs(body.decode("utf-8", "replace")).items()}
        if not hmac.compare_digest(form.get("token", "").encode(), self._token.encode()):
            raise HTTPException(403, "this form is not from the present server; load the page again")
        try:
            run, number, node = (int(form[name]) for name in ("run", "tree", "node"))
            files = self._runs[run]
            place = files.trees.places[number]
        except (KeyError, ValueError, IndexError):
            raise HTTPException(400, "the form names no tree; load the page again") from None
        tree, path = files.trees.tree(number), files.trees.search_of(number).marks
        is_chain = not isinstance(tree, TreeFailure) and node in tree.answers()
        if isinstance(tree, TreeFailure) or not is_chain or chain_digest(tree, node) != form.get("digest"):
            raise HTTPException(409, "the tree has changed; load the page again")
        marks = read_marks(path)
        digests = marks.setdefault(place.prompt_id, set())
        (digests.add if form.get("bad") == "1" else digests.discard)(form["digest"])
        write_marks(path, marks)
        return RedirectResponse(f"/tree/{number}?run={run}&node={node}#n{node}", 303)

    def failed(self, request: Request, error: Exception) -> Response:
        """Say in one line why there is no page."""
        status = error.status_code if isinstance(error, HTTPException) else 422
        status = 404 if isinstance(error, pages.MissingTreeError) else status
        message = error.message if isinstance(error, RlsysError) else getattr(error, "detail", str(error))
        response = self._page(request, "message.html", "Message", {"message": message})
        response.status_code = status
        return response

    def _chosen(self, request: Request) -> int:
        return min(max(0, _number(request, "run") or 0), len(self._runs) - 1)

    def _run(self, request: Request) -> RunFiles:
        return self._runs[self._chosen(request)]

    def _page(
        self, request: Request, template: str, title: str, values: pages.Values, *, switches: bool = False
    ) -> Response:
        shared = {
            "title": title,
            "runs": self._runs,
            "chosen": self._chosen(request),
            "page": request.url.path,
            "pages": (*pages.PAGES, pages.COMPARE) if len(self._runs) > 1 else pages.PAGES,
            "switches": switches,
            "token": self._token,
        }
        return HTMLResponse(pages.environment().get_template(template).render(shared | values))


def _number(request: Request, name: str) -> int | None:
    """Return a parameter of the address as a number; None if it is none."""
    text = request.query_params.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 12 else None


class _Guard:
    """Refuses requests under other names than those of the server, and forbids pages to load anything else."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app, self._hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._hosts and _host(dict(scope["headers"]).get(b"host", b"").decode("latin-1")) not in self._hosts:
            await PlainTextResponse("this server answers to its own address alone", 421)(scope, receive, send)
            return
        await self._app(scope, receive, _with_headers(send))


def _host(value: str) -> str:
    """Return a Host header without its port."""
    return value[1:].partition("]")[0] if value.startswith("[") else value.partition(":")[0]


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *_HEADERS.items()]
        await send(message)

    return sending
