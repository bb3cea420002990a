"""A pruned model over HTTP: OpenAI-style completions, denoising steps as server-sent events, requests that
wait in one batch, and a page that shows the text filling in beside the dense model's.

    pip install "sinkprune[serve]"
    sinkprune prune tiny --out pruned/
    python examples/serve.py pruned/ --dense tiny        # http://127.0.0.1:8000

    curl localhost:8000/v1/completions -d '{"prompt": "My fellow citizens", "max_tokens": 32}'

With ``"stream": true`` a chunk's ``text`` is what has settled from the left since the last one, so
that whoever joins chunks gets the completion, and ``canvas`` is all that is written, ``░`` where a
token is still masked. A request with a seed and a temperature runs alone, so that it draws the same
each time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import sinkprune as sp
from sinkprune.generation.batches import batches_of, part_of
from sinkprune.generation.denoising import decode, encode_prompts

HOLE = "░"
BODY, WAITING = 1 << 20, 256  # bytes of a request, requests that wait, at most
FIELDS = {"model": str, "prompt": (str, list), "max_tokens": int, "steps": int, "temperature": (int, float),
          "top_p": (int, float), "seed": int, "stream": bool}  # fmt: skip


class Refused(Exception):
    """A request that can't be served: a line and a status."""

    def __init__(self, line: str, status: int = 400) -> None:
        super().__init__(line)
        self.status = status


@dataclass
class Job:
    """One prompt of a request; ``told`` gets ``(canvas, settled, done)`` after each step, or an exception."""

    prompt: str
    settings: dict[str, Any]
    told: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    dropped: bool = False

    @property
    def alone(self) -> bool:
        return self.settings.get("seed") is not None and self.settings.get("temperature", 0) > 0


class Served:
    """A model and the one worker that runs it."""

    def __init__(self, name: str, source: str, device: str, batch: int, patience: float) -> None:
        self.name, self.batch, self.patience = name, batch, patience
        self.model, self.tokenizer = sp.load(source, device=device)
        if self.tokenizer is None:
            raise SystemExit(f"{source}: serving text needs a tokenizer beside the model")
        self.adapter = sp.adapter_for(self.model)
        self.mask_id = self.adapter.mask_id(None, self.tokenizer)
        self.batches: list[int] = []  # sizes of the last ones, for whoever looks

    def start(self) -> asyncio.Task[None]:
        self.waiting: asyncio.Queue[Job] = asyncio.Queue(WAITING)
        return asyncio.create_task(self._work())

    async def _work(self) -> None:
        """Take the first that waits and those that can run with it, for ever."""
        loop, left = asyncio.get_running_loop(), list[Job]()
        while True:
            first = left.pop(0) if left else await self.waiting.get()
            if not first.alone:
                await asyncio.sleep(self.patience)
            while not self.waiting.empty():
                left.append(self.waiting.get_nowait())
            like = [job for job in left if job.settings == first.settings and not first.alone]
            jobs = [job for job in (first, *like[: self.batch - 1]) if not job.dropped]
            left = [job for job in left if job not in jobs and not job.dropped]
            if jobs:
                self.batches = [*self.batches[-99:], len(jobs)]
                await asyncio.to_thread(self._run, jobs, loop)

    def _run(self, jobs: list[Job], loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: denoise, and tell every job what is written after each step."""

        def tell(job: Job, what: Any) -> None:
            loop.call_soon_threadsafe(job.told.put_nowait, what)

        try:
            ids, mask = encode_prompts(self.tokenizer, [job.prompt for job in jobs])
            for samples in batches_of(mask, len(jobs), self.adapter.block_size):
                rows, valid = (part.to(self.adapter.device) for part in part_of(ids, mask, samples))
                settings = dict(jobs[0].settings)
                last: Any = None
                for last in sp.denoise(self.model, rows, valid, mask_token_id=self.mask_id, **settings):
                    for sample, row in zip(samples, last[:, rows.shape[1] :].tolist(), strict=True):
                        tell(jobs[sample], (*self._texts(row), False))
                for sample, row in zip(samples, last[:, rows.shape[1] :].tolist(), strict=True):
                    tell(jobs[sample], (*self._texts(row), True))
        except Exception as error:  # of whatever kind: those who wait must hear of it
            for job in jobs:
                tell(job, error)

    def _texts(self, row: list[int]) -> tuple[str, str]:
        """All that is written, with holes, and what has settled from the left."""
        end = self.tokenizer.eos_token_id
        row = row[: row.index(end)] if end in row else row
        pieces: list[str] = []
        run: list[int] = []
        for token in [*row, self.mask_id]:
            if token == self.mask_id:
                pieces += [decode(self.tokenizer, run), HOLE]
                run = []
            else:
                run.append(token)
        return "".join(pieces[:-1]), pieces[0]


def checked(body: Any, served: dict[str, Served]) -> tuple[Served, list[Job], bool]:
    """The model, the jobs and whether to stream, of a request's JSON. Raises ``Refused``."""
    if not isinstance(body, dict):
        raise Refused(f"expected a JSON object, got a {type(body).__name__}")
    for name, value in body.items():
        if name not in FIELDS:
            raise Refused(f"unknown field {name!r}; known: {', '.join(FIELDS)}")
        if not isinstance(value, FIELDS[name]) or (isinstance(value, bool) and FIELDS[name] is not bool):
            raise Refused(f"{name}: got {value!r:.60}")
    name = body.get("model", next(iter(served)))
    if name not in served:
        raise Refused(f"no model {name!r}; there are {', '.join(served)}", 404)
    if "prompt" not in body:
        raise Refused("prompt is missing: a text, or a list of texts")
    prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
    if not prompts or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise Refused("prompt must be a text, or a list of texts, none empty")
    model, length = served[name], body.get("max_tokens", 64)
    context = model.adapter.geometry().context
    for prompt in prompts:
        tokens = len(model.tokenizer.encode(prompt, add_special_tokens=False))
        if length < 1 or not tokens or tokens + length > context:
            raise Refused(
                f"a prompt of {tokens} and max_tokens of {length} must fit the context of {context}"
            )
    settings = {key: body[key] for key in ("steps", "temperature", "top_p", "seed") if key in body}
    settings |= {"gen_length": length, "stop_token_id": model.tokenizer.eos_token_id}
    return model, [Job(prompt, settings) for prompt in prompts], bool(body.get("stream"))


async def told(job: Job) -> tuple[str, str, bool]:
    """What the worker says next. Raises ``Refused`` for what the sampler refuses."""
    said = await job.told.get()
    if isinstance(said, ValueError):
        raise Refused(" ".join(str(said).split()).replace("gen_length", "max_tokens"))
    if isinstance(said, Exception):
        raise Refused("the model failed", 500) from said
    return said


def reply(of: str, model: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"id": of, "object": "text_completion", "created": int(time.time()), "model": model,
            "choices": choices, **more}  # fmt: skip


async def events(of: str, model: str, jobs: list[Job], first: list[Any]) -> AsyncIterator[str]:
    """Server-sent events of all jobs, each step of each as it comes."""
    merged: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def forward(index: int, job: Job) -> None:
        said = first[index]
        while True:
            await merged.put((index, said))
            if said is None or said[2]:
                return
            try:
                said = await told(job)
            except Refused:
                said = None

    tasks = [asyncio.create_task(forward(index, job)) for index, job in enumerate(jobs)]
    sent, left = [""] * len(jobs), len(jobs)
    try:
        while left:
            index, said = await merged.get()
            canvas, settled, done = said or ("", sent[index], True)
            left -= done
            text = ""
            if settled.startswith(sent[index]) and (done or not settled.endswith("\ufffd")):
                text, sent[index] = settled[len(sent[index]) :], settled
            end = None if not done else "error" if said is None else "stop"
            choice = {"index": index, "text": text, "canvas": canvas, "finish_reason": end}
            yield f"data: {json.dumps(reply(of, model, [choice]))}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        for task, job in zip(tasks, jobs, strict=True):
            task.cancel()
            job.dropped = True


def app(served: dict[str, Served]) -> Starlette:
    """The server of these models; the first is who answers when none is named."""

    async def completions(request: Request) -> Response:
        raw = bytearray()
        async for part in request.stream():
            raw += part
            if len(raw) > BODY:
                raise Refused(f"a request has at most {BODY} bytes", 413)
        try:
            body = json.loads(raw)
        except ValueError as error:
            raise Refused(f"not JSON: {error}") from error
        model, jobs, stream = checked(body, served)
        if model.waiting.qsize() + len(jobs) > WAITING:
            raise Refused(f"{WAITING} requests wait already: try again later", 429)
        for job in jobs:
            model.waiting.put_nowait(job)
        of = f"cmpl-{uuid.uuid4().hex}"
        said = [await told(job) for job in jobs]  # a bad setting is known by now, and answered by a status
        if stream:
            return StreamingResponse(events(of, model.name, jobs, said), media_type="text/event-stream")
        for index, job in enumerate(jobs):
            while not said[index][2]:
                said[index] = await told(job)
        choices = [
            {"index": index, "text": text, "finish_reason": "stop"} for index, (text, _, _) in enumerate(said)
        ]
        return JSONResponse(reply(of, model.name, choices))

    async def models(request: Request) -> Response:
        listed = [{"id": name, "object": "model", "owned_by": "you"} for name in served]
        return JSONResponse({"object": "list", "data": listed})

    async def page(request: Request) -> Response:
        return HTMLResponse(PAGE.replace("MODELS", json.dumps(list(served))))

    async def refused(request: Request, error: Exception) -> Response:
        status = error.status if isinstance(error, Refused) else 500
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": str(error), "type": kind}}, status)

    @contextlib.asynccontextmanager
    async def running(_: Starlette) -> AsyncIterator[None]:
        workers = [model.start() for model in served.values()]
        yield
        for worker in workers:
            worker.cancel()

    routes = [
        Route("/", page),
        Route("/v1/models", models),
        Route("/v1/completions", completions, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=running, exception_handlers={Refused: refused})


PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>sinkprune</title><style>body{font:16px system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}
form{display:flex;gap:.5rem}input{flex:1;min-width:0;font:inherit;padding:.4rem}button{font:inherit}
main{display:flex;flex-wrap:wrap;gap:1rem}section{flex:1;min-width:14rem}pre{white-space:pre-wrap;
overflow-wrap:anywhere;background:#f3f5f5;padding:.8rem;min-height:8rem}</style>
<h1>Text that fills in</h1><form><input value="My fellow citizens" aria-label="prompt"><button>Write</button>
</form><main></main><script>
const names = MODELS, main = document.querySelector("main");
const parts = names.map(name => {
  const s = document.createElement("section"), h = document.createElement("h2"),
  p = document.createElement("pre"), t = document.createElement("p"); h.textContent = name; s.append(h, p, t);
  main.append(s); return [name, p, t]; });
async function write([name, pre, time], prompt) {
  const begun = performance.now();
  const answer = await fetch("v1/completions", {method: "POST",
    body: JSON.stringify({model: name, prompt, max_tokens: 64, stream: true})});
  if (!answer.ok) { pre.textContent = (await answer.json()).error.message; return; }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "";;) {
    const {value, done} = await reader.read(); if (done) break;
    const lines = (rest + value).split("\\n\\n"); rest = lines.pop();
    for (const line of lines) if (line !== "data: [DONE]")
      pre.textContent = JSON.parse(line.slice(6)).choices[0].canvas;
    time.textContent = ((performance.now() - begun) / 1000).toFixed(2) + " s";
  }
}
document.querySelector("form").onsubmit = async event => { event.preventDefault();
  const prompt = document.querySelector("input").value;
  for (const part of parts) await write(part, prompt); };
</script>"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a model over HTTP.")
    parser.add_argument("model", help="what sp.load takes")
    parser.add_argument("--dense", help="another one beside it, say the dense model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8, help="requests that run together, at most")
    parser.add_argument("--patience", type=float, default=0.01, help="seconds the first waits for others")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    sources = {"pruned": options.model} | ({"dense": options.dense} if options.dense else {})
    served = {
        name: Served(name, source, options.device, options.batch, options.patience)
        for name, source in sources.items()
    }
    import uvicorn

    uvicorn.run(app(served), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
