"""examples/serve.py: completions as the library writes them, steps as events, requests in one batch, 4xx."""

import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import sinkprune as sp

pytest.importorskip("starlette")
pytest.importorskip("httpx")
from starlette.testclient import TestClient

spec = importlib.util.spec_from_file_location("serve", Path(__file__).parents[1] / "examples/serve.py")
serve = importlib.util.module_from_spec(spec)
sys.modules["serve"] = serve  # where dataclasses look
spec.loader.exec_module(serve)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SMALL = {"max_tokens": 8, "steps": 4}
URL = "/v1/completions"


@pytest.fixture(scope="module")
def served():
    return {name: serve.Served(name, "tiny", "cpu", 4, 0.3) for name in ("pruned", "dense")}


@pytest.fixture(scope="module")
def client(served):
    with TestClient(serve.app(served)) as client:
        yield client


@pytest.fixture(scope="module")
def expected():
    """What ``generate`` writes after some prompts."""
    model, tokenizer = sp.load("tiny")
    end = tokenizer.eos_token_id

    def write(prompt):
        return sp.generate(model, tokenizer, prompt, steps=4, gen_length=8, stop_token_id=end)

    return write


def test_a_completion_is_what_generate_writes(client, expected):
    told = client.post(URL, json={"prompt": "The Congress", **SMALL}).json()
    assert told["choices"] == [{"index": 0, "text": expected("The Congress"), "finish_reason": "stop"}]
    assert told["object"] == "text_completion" and told["model"] == "pruned"
    both = client.post(URL, json={"prompt": ["The Congress", "My"], "model": "dense", **SMALL}).json()
    assert [choice["text"] for choice in both["choices"]] == expected(["The Congress", "My"])


def test_a_stream_shows_the_steps_and_its_chunks_make_the_completion(client, expected):
    with client.stream("POST", URL, json={"prompt": "The Congress", "stream": True, **SMALL}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == expected("The Congress")
    assert [chunk["canvas"].count("░") for chunk in chunks] == [6, 4, 2, 0, 0]
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]


def test_requests_that_wait_run_in_one_batch_and_get_their_own_text(client, served, expected):
    prompts = ["The Congress", "My fellow citizens", "War"]
    before = len(served["pruned"].batches)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(client.post, URL, json={"prompt": p, **SMALL}) for p in prompts]
        texts = [job.result().json()["choices"][0]["text"] for job in asked]
    assert texts == [expected(prompt) for prompt in prompts]
    assert max(served["pruned"].batches[before:]) > 1


def test_a_seed_draws_the_same_whoever_waits_beside_it(client):
    body = {"prompt": "The", "temperature": 2.0, "seed": 7, **SMALL}
    alone = client.post(URL, json=body).json()["choices"][0]["text"]
    with ThreadPoolExecutor(2) as pool:
        again = [pool.submit(client.post, URL, json=body) for _ in range(2)]
        assert {job.result().json()["choices"][0]["text"] for job in again} == {alone}


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        ("{", 400, "not JSON: "),
        ("[]", 400, "expected a JSON object, got a list"),
        ({}, 400, "prompt is missing"),
        ({"prompt": ""}, 400, "prompt must be a text"),
        ({"prompt": [1]}, 400, "prompt must be a text"),
        ({"prompt": "a", "best_of": 3}, 400, "unknown field 'best_of'; known: model, prompt"),
        ({"prompt": "a", "max_tokens": "8"}, 400, "max_tokens: got '8'"),
        ({"prompt": "a", "max_tokens": True}, 400, "max_tokens: got True"),
        ({"prompt": "a", "max_tokens": 0}, 400, "a prompt of 1 and max_tokens of 0 must fit"),
        ({"prompt": "a " * 600}, 400, "must fit the context of 512"),
        ({"prompt": "a", "model": "gpt"}, 404, "no model 'gpt'; there are pruned, dense"),
        ({"prompt": "a", "steps": 99}, 400, "at most max_tokens=64, got 99"),
        ({"prompt": "a", "steps": 99, "stream": True}, 400, "at most max_tokens=64, got 99"),
        ({"prompt": "a", "temperature": -1}, 400, "must be finite and at least 0"),
        ("x" * (serve.BODY + 1), 413, "a request has at most 1048576 bytes"),
    ],
    ids=str,
)
def test_a_bad_request_gets_4xx_and_one_line(client, body, status, line):
    answer = client.post(URL, content=body if isinstance(body, str) else json.dumps(body))
    error = answer.json()["error"]
    assert answer.status_code == status and line in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_the_page_and_the_list_of_models(client):
    page = client.get("/")
    assert page.status_code == 200 and '["pruned", "dense"]' in page.text and "http" not in page.text
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["pruned", "dense"]
    assert client.get("/nowhere").status_code == 404 and client.get(URL).status_code == 405
