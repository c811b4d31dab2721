"""The page's questions to the server: JSON in, JSON out, one function of a room behind each address.

Questions are GET, changes are POST. What the user got wrong is {"error", "field"}: a sentence, and the control that is
to blame. Its status is 200, since a browser's console is for what is broken. Anything else is logged, and told in one
line without its traceback.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app.pages import (
    adapt,
    besides,
    code,
    compare,
    cut,
    film,
    formula,
    held,
    microscope,
    opened,
    overlay,
    pair,
    past,
    questions,
    room,
    sides,
    spectra,
    take,
    train,
    walk,
    wall,
)
from app.pages.guard import strict
from app.pages.lab import Lab
from app.pages.values import check
from lora_core.errors import UserError

Question = Callable[[Lab, Mapping[str, Any]], dict[str, Any]]
GET: dict[str, Question] = {
    "boot": adapt.boot,
    "model": adapt.model,
    "data": adapt.data,
    "weights": formula.weights,
    "runs": past.runs,
    "run": train.view,
    "form": train.form,
    "film": film.film,
    "pareto": overlay.pareto,
    "compare": compare.opened,
    "dials": cut.dials,
    "held": held.curve,
    "sides": sides.others,
    "fit": sides.fit,
    "heat": spectra.heat,
    "spectrum": spectra.one,
    "microscope": microscope.look,
    "besides": besides.besides,
    "opened": opened.list_opened,
    "pair": pair.pair,
    "questions": questions.asked,
    "question": questions.answered,
    "experiments": questions.states,
    "room": room.view,
    "room-wall": wall.wall,
    "room-tasks": room.tasks,
}
POST: dict[str, Question] = {
    "open": opened.opened,
    "budget": adapt.confirm,
    "code": code.written,
    "merge": take.merge,
    "train": train.start,
    "stop": train.stop,
    "resume": train.resume,
    "walk": walk.walk,
    "walk-end": walk.end,
    "speaks": compare.speaks,
    "cut": cut.save,
    "sum": sides.summed,
    "experiment": questions.start,
    "experiment-stop": questions.stop,
    "room-step": room.step,
    "room-grid": room.set_grid,
    "room-name": room.name,
    "room-guess": room.guess,
    "room-curve": room.curve,
    "room-take": room.take,
    "room-cancel": room.cancel,
}
logger = logging.getLogger("lora_lab.page")


def routes(lab: Lab) -> list[Route]:
    """All addresses below lab/api."""
    found = [Route("/lab/api/ping", ping, methods=["GET"])]
    found += [Route(f"/lab/api/{name}", asking(lab, name, f), methods=["GET"]) for name, f in GET.items()]
    found += [Route(f"/lab/api/{name}", changing(lab, name, f), methods=["POST"]) for name, f in POST.items()]
    found.append(Route("/lab/api/adapter.zip", packing(lab), methods=["GET"]))
    found += take.routes(lab) + wall.routes(lab)
    found.append(Route("/lab/api/open-file", opening(lab), methods=["POST"]))
    return [*found, Route("/lab/api/upload", uploading(lab), methods=["POST"])]


async def ping(request: Request) -> Response:
    """Whether the server is there."""
    return reply({"here": True})


def asking(lab: Lab, name: str, question: Question) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        return await answered("GET", name, question, lab, dict(request.query_params))

    return endpoint


def changing(lab: Lab, name: str, question: Question) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        # a page of another site cannot send this type without being asked for permission first
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            return reply({"error": "JSON is expected here"}, 415)
        try:
            body = await run_in_threadpool(strict, await request.body())
        except (ValueError, RecursionError) as error:
            finite = "no finite number" in str(error)
            return reply({"error": f"a number is expected: {error}" if finite else "that is not JSON"}, 400)
        if not isinstance(body, dict):
            return reply({"error": "a JSON object is expected here"}, 400)
        return await answered("POST", name, question, lab, body)

    return endpoint


def packing(lab: Lab) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        try:
            check("GET", "adapter.zip", request.query_params)
            name, data = await run_in_threadpool(cut.packed, lab, dict(request.query_params))
        except UserError as error:
            return reply(adapt.fault(error))
        headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
        return Response(data, media_type="application/zip", headers=headers)

    return endpoint


def uploading(lab: Lab) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        if request.headers.get("content-type", "") != "application/octet-stream":
            return reply({"error": "the file itself is expected here"}, 415)
        try:
            check("GET", "upload", request.query_params)
            id, name = await lab.uploads.take(request.query_params.get("name", ""), request.stream())
        except UserError as error:
            return reply({"error": str(error), "field": "task"})
        return reply({"file": id, "name": name})

    return endpoint


def opening(lab: Lab) -> Callable[[Request], Any]:
    """One file of an adapter from elsewhere, into the set that the query names."""

    async def endpoint(request: Request) -> Response:
        if request.headers.get("content-type", "") != "application/octet-stream":
            return reply({"error": "the file itself is expected here"}, 415)
        query = request.query_params
        try:
            check("GET", "open-file", query)
            return reply({"set": await lab.sets.take(query.get("set", ""), query.get("name", ""), request.stream())})
        except UserError as error:
            return reply({"error": str(error), "field": "open"})

    return endpoint


async def answered(method: str, name: str, question: Question, lab: Lab, given: Mapping[str, Any]) -> Response:
    try:
        check(method, name, given)
        return reply(await run_in_threadpool(question, lab, given))
    except UserError as error:
        return reply(adapt.fault(error))
    except Exception as error:
        logger.exception("%s", question.__name__)
        return reply({"error": f"that did not work ({type(error).__name__}); the server's log says more"}, 500)


def reply(value: Any, status: int = 200) -> Response:
    try:
        return JSONResponse(value, status, headers={"Cache-Control": "no-store"})
    except ValueError:  # JSON has no NaN; a diverged run has
        return JSONResponse(finite(value), status, headers={"Cache-Control": "no-store"})


def finite(value: Any) -> Any:
    """Numbers that are not finite become None, all the way down."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value
