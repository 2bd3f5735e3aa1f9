"""The server: OpenAI's interface over HTTP, on an engine that computes in a thread of its own."""

import asyncio
import hmac
import json
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from litlora.console import one_line, say
from litlora.errors import UserError
from litlora.lora.live import Way
from litlora.serve.answer import Answer
from litlora.serve.answer import Request as EngineRequest
from litlora.serve.asked import Asked, Fields, Limits, Wrong, read_chat, read_completion
from litlora.serve.calls import Form, form_of
from litlora.serve.edge import KnownHosts, error_body, error_response, http_error, read_body
from litlora.serve.engine import Engine
from litlora.serve.metrics import Metrics
from litlora.serve.opening import Opened
from litlora.serve.prompt import Asker
from litlora.serve.schema import Shape, Shapes, grammar_of
from litlora.serve.written import Chat, Completion, Written

PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
"""A page reaches this server alone, and no other page can show it inside of itself."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


@dataclass(frozen=True)
class Rules:
    """What clients may do."""

    limits: Limits
    max_requests: int
    max_body: int
    api_key: str | None = None
    load_from: Path | None = None
    """Where adapters may be loaded from; None: nowhere."""
    report: Path | None = None
    """The report of the run that made the model."""
    hosts: tuple[str, ...] = LOOPBACK
    """The names that a client may have for this machine; other pages of a browser have others."""
    body_seconds: float = 60
    """Within which a body must have come: one that never ends would hold its connection for ever."""


class Computing(threading.Thread):
    """Computes all answers of an engine."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(name="engine", daemon=True)
        self.engine, self._stopping = engine, False

    def run(self) -> None:
        while not self._stopping:
            self.engine.work.wait()
            self.engine.step()

    def stop(self) -> None:
        """End the thread after the token that it computes."""
        self._stopping = True
        self.engine.work.set()
        self.join()


class Server:
    """Answers requests; `app` is the ASGI application."""

    def __init__(self, opened: Opened, rules: Rules) -> None:
        self.opened, self.rules, self.engine = opened, rules, opened.engine
        self.asker = Asker(self.engine.tokenizer, opened.style)
        self.metrics = Metrics()
        self._rendering = threading.Lock()  # a chat template's process answers one question at a time
        self._pending = 0
        self._started = int(time.time())

    @cached_property
    def shapes(self) -> Shapes:
        """What holds answers to JSON schemas; two threads may make it at once, and one is kept."""
        return Shapes(self.engine.tokenizer, self.asker.stop_ids)

    @cached_property
    def calls(self) -> Form | None:
        """How the model writes calls of tools, if that is known."""
        return form_of(self.opened.style.template)

    @property
    def app(self) -> Starlette:
        routes = [
            Route("/", self._page),
            Route("/report", self._report),
            Route("/health", self._health),
            Route("/metrics", self._guarded(self._metrics)),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name:path}", self._guarded(self._model)),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self._completion), methods=["POST"]),
            Route("/v1/load_lora_adapter", self._guarded(self._load), methods=["POST"]),
            Route("/v1/unload_lora_adapter", self._guarded(self._unload), methods=["POST"]),
        ]
        hosts = [Middleware(KnownHosts, names=self.rules.hosts)]
        handlers = {HTTPException: http_error}
        return Starlette(routes=routes, middleware=hosts, exception_handlers=handlers)

    # ---- the edge

    def _guarded(self, handle: Callable[[Request], Awaitable[Response]]) -> Callable:
        """An endpoint that asks for the key, and whose errors have OpenAI's form."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                return await handle(request)
            except Wrong as error:
                return error_response(error.status, str(error), error.param, error.code)
            except UserError as error:
                return error_response(400, str(error))
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                say(f"error: {one_line(''.join(traceback.format_exception_only(error)))}")
                return error_response(500, "the server failed to answer; its output says why")

        return guarded

    def _check_key(self, request: Request) -> None:
        key = self.rules.api_key
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise Wrong("the API key is missing or wrong", status=401, code="invalid_api_key")

    async def _body(self, request: Request) -> Any:
        return await read_body(request, self.rules.max_body, self.rules.body_seconds)

    # ---- endpoints

    async def _page(self, request: Request) -> Response:
        facts = {"title": self.opened.name, "needs_key": self.rules.api_key is not None}
        facts["report"] = self._shows_report
        page = await run_in_threadpool(PAGE.read_text, encoding="utf-8")
        filled = page.replace("/*FACTS*/null", json.dumps(facts).replace("<", "\\u003c"))
        return HTMLResponse(filled, headers=PAGE_HEADERS)

    @property
    def _shows_report(self) -> bool:
        """Whether the run's report can be seen: with a key, nobody could ask for it by a link."""
        return self.rules.report is not None and self.rules.api_key is None

    async def _report(self, request: Request) -> Response:
        if not self._shows_report:
            return error_response(404, "there is no report here")
        page = await run_in_threadpool(self.rules.report.read_text, encoding="utf-8")
        return HTMLResponse(page, headers=PAGE_HEADERS)

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        gauges = {"running": self.engine.num_running, "waiting": self.engine.num_waiting}
        return PlainTextResponse(self.metrics.text(gauges))

    def _names(self) -> list[str]:
        return [self.opened.name, *self.engine.adapters]

    def _described(self, name: str) -> dict[str, Any]:
        parent = None if name == self.opened.name else self.opened.name
        known = {"id": name, "object": "model", "created": self._started, "owned_by": "litlora"}
        return {**known, "parent": parent, "max_model_len": self.engine.context}

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self._names()]})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(self._described(self._known(request.path_params["name"])))

    def _known(self, name: str) -> str:
        if name not in self._names():
            there = ", ".join(self._names())
            message = f"the model {name!r} does not exist; there is {there}"
            raise Wrong(message, "model", status=404, code="model_not_found")
        return name

    async def _load(self, request: Request) -> Response:
        fields = Fields(await self._body(request))
        name, path = fields.take("lora_name", str), fields.take("lora_path", str)
        fields.done()
        if not name or not path:
            raise Wrong("lora_name and lora_path are needed")
        root = self._loads_from()
        if "\0" in path or not (place := (root / path).resolve()).is_relative_to(root.resolve()):
            raise Wrong(f"lora_path {path}: lies outside of the directory that adapters are loaded from")
        from litlora.paths import checkpoint_dir

        await run_in_threadpool(lambda: self.opened.add_adapter(name, checkpoint_dir(place)))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: Request) -> Response:
        fields = Fields(await self._body(request))
        name = fields.take("lora_name", str)
        fields.take("lora_int_id", int)
        fields.done()
        self._loads_from()
        if name not in self.engine.adapters:
            raise Wrong(f"the adapter {name!r} does not exist", "lora_name", status=404)
        await run_in_threadpool(self.engine.remove_adapter, name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    def _loads_from(self) -> Path:
        if self.rules.load_from is None:
            raise Wrong("this server was started without leave to load or unload adapters", status=403)
        return self.rules.load_from

    async def _chat(self, request: Request) -> Response:
        asked = read_chat(await self._body(request), self.rules.limits)

        def encoded() -> list[list[int]]:
            with self._rendering:
                return [self.asker.ids(asked.conversation)]

        calls = self.calls if asked.conversation.tools else None
        return await self._answered(request, asked, encoded, self.asker.stop_ids, Chat(asked, calls))

    async def _completion(self, request: Request) -> Response:
        asked = read_completion(await self._body(request), self.rules.limits)
        tokenizer = self.engine.tokenizer

        def encoded() -> list[list[int]]:
            rows = self.engine.model.config.vocab_size
            for ids in asked.prompts:
                if isinstance(ids, list) and not all(0 <= one < rows for one in ids):
                    raise Wrong(f"prompt: token ids must be from 0 to {rows - 1}", "prompt")
            return [
                tokenizer.encode(one, begin=True) if isinstance(one, str) else one for one in asked.prompts
            ]

        return await self._answered(request, asked, encoded, tokenizer.stop_ids, Completion(asked))

    # ---- answers

    async def _answered(
        self,
        request: Request,
        asked: Asked,
        encoded: Callable[[], list[list[int]]],
        stop_ids: frozenset[int],
        written: Written,
    ) -> Response:
        adapter = None if self._known(asked.model) == self.opened.name else asked.model
        count = asked.n * max(1, len(asked.prompts))
        if self._pending + count > self.rules.max_requests:
            self.metrics.add("requests_total", status=429)
            raise Wrong("too many requests; try again in a moment", status=429, code="rate_limit_exceeded")
        self._pending += count
        begun = time.perf_counter()
        serving = Serving(self, written, begun, count)
        try:
            prompts = await run_in_threadpool(encoded)
            shape = await run_in_threadpool(self._shape, asked)
            requests = [
                EngineRequest(
                    prompt=ids,
                    sampling=asked.sampling if number == 0 else asked.sampling.another(number),
                    stop_ids=stop_ids,
                    way=Way(adapter, asked.strength if adapter else 1.0),
                    shape=shape and shape.another(),
                )
                for ids in prompts
                for number in range(asked.n)
            ]
            written.tokenizer = self.engine.tokenizer
            self._begin(serving, requests, asked.model)
        except BaseException as error:
            serving.end(getattr(error, "status", 400 if isinstance(error, UserError) else 500))
            raise
        if asked.stream:
            return StreamingResponse(serving.events(), media_type="text/event-stream")
        return await serving.whole(request)

    def _begin(self, serving: "Serving", requests: list[EngineRequest], model: str) -> None:
        try:
            serving.begin(requests)
        except UserError:
            self._known(model)  # raises if the adapter was unloaded while the prompt was encoded
            raise

    def _shape(self, asked: Asked) -> Shape | None:
        if asked.schema is None:
            return None
        try:
            return self.shapes.shape(grammar_of(asked.schema))
        except UserError as error:
            raise Wrong(str(error), "response_format") from None

    def release(self, count: int) -> None:
        """So many answers are done with."""
        self._pending -= count


class Serving:
    """The answers to one request, on their way to the client."""

    def __init__(self, server: Server, written: Written, begun: float, count: int) -> None:
        self.server, self.written, self._begun, self._count = server, written, begun, count
        self.answers: list[Answer] = []
        self._more = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._ended = self._left = False

    def begin(self, requests: list[EngineRequest]) -> None:
        """Ask the engine."""
        for request in requests:
            self.answers.append(self.server.engine.submit(request, self._heard))

    def _heard(self) -> None:
        """On the thread that computes."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._more.set)

    async def tokens(self) -> AsyncIterator[tuple[int, Any]]:
        """(number of the answer, token) as they come, and (number, None) at its end."""
        open_ones, first = dict(enumerate(self.answers)), True
        try:
            while open_ones:
                self._more.clear()
                for number, answer in [*open_ones.items()]:
                    is_over = answer.ended.is_set()  # before the last tokens are taken
                    while (token := answer.take()) is not None:
                        if first:
                            self.server.metrics.observe("first_token_seconds", self._passed)
                            first = False
                        yield number, token
                    if is_over:
                        del open_ones[number]
                        yield number, None
                if open_ones:
                    await self._more.wait()
                if self._left:
                    raise ClientDisconnect
        finally:
            gone = [answer for answer in open_ones.values() if not answer.ended.is_set()]
            for answer in gone:
                answer.cancel()
            self.server.metrics.add("cancelled_total", len(gone))
            self.end(499 if gone else 200)

    @property
    def _passed(self) -> float:
        return time.perf_counter() - self._begun

    def end(self, status: int) -> None:
        """Count what was done, once."""
        if self._ended:
            return
        self._ended = True
        self.server.release(self._count)
        metrics = self.server.metrics
        metrics.add("requests_total", status=status)
        metrics.observe("request_seconds", self._passed)
        for answer in self.answers:
            metrics.add("prompt_tokens_total", len(answer.request.prompt))
            metrics.add("reused_prompt_tokens_total", answer.num_reused)
            metrics.add("answer_tokens_total", answer.num_tokens)
            if not answer.ended.is_set():
                answer.cancel()
            answer.listener = None  # it leads back here: without a circle, memory is free at once

    async def whole(self, request: Request) -> Response:
        """All answers at once. Raises ClientDisconnect if nobody waits for them any more."""
        watching = asyncio.create_task(self._watch(request))
        try:
            async for number, token in self.tokens():
                self.written.add(number, token)
        finally:
            watching.cancel()
        return JSONResponse(await run_in_threadpool(self.written.whole, self.answers))

    async def _watch(self, request: Request) -> None:
        """Notice that the client goes away; a stream notices it by itself."""
        await request.receive()  # the body is read: nothing else can come
        self._left = True
        self._more.set()

    async def events(self) -> AsyncIterator[str]:
        """The answers as server-sent events."""
        try:
            for chunk in self.written.opening(len(self.answers)):
                yield _event(chunk)
            async for number, token in self.tokens():
                self.written.add(number, token)
                for chunk in self.written.chunks(number, token, self.answers[number]):
                    yield _event(chunk)
            if self.written.asked.include_usage:
                yield _event(self.written.usage_chunk(self.answers))
            yield "data: [DONE]\n\n"
        except Exception as error:
            say(f"error: {one_line(str(error))}")
            yield _event(error_body(500, str(error) if isinstance(error, UserError) else "the server failed"))


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
