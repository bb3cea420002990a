"""``sinkprune generate`` under caches, thresholds and other algorithms."""

import json

import pytest
from toys import one_thread  # noqa: F401

import sinkprune as sp
from sinkprune.commands.main import main

SIZES = ["--gen-length", "8", "--block-length", "4"]


def test_generate_says_how_many_forwards_and_bytes_it_took(capsys):
    arguments = ["generate", "tiny", "The Congress", *SIZES, "--threshold", "0.3", "--cache", "dual"]
    assert main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    model, tokenizer = sp.load("tiny")
    seen = []
    options = {"gen_length": 8, "block_length": 4, "threshold": 0.3, "cache": "dual"}
    text = sp.generate(model, tokenizer, "The Congress", callback=seen.append, **options)
    assert (result["text"], result["forwards"]) == (text, len(seen))
    assert result["cache_bytes"] == seen[-1].cache_bytes > 0
    assert result["cache_bytes_saved"] == 0
    assert f"{len(seen)} forwards; the cache took" in printed.err


def test_of_one_likeliest_token_any_temperature_takes_that(capsys):
    texts = []
    for limits in ([], ["--temperature", "2", "--top-k", "1"], ["--temperature", "2", "--top-p", "1e-9"]):
        assert main(["generate", "tiny", "The Congress", *SIZES, *limits, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["forwards"] == 8  # unless told otherwise, one a new token
        texts.append(result["text"])
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache", "kv"], "--cache must be None or one of block, "),
        (["--cache", "block"], "llada (LLaDA) takes the cache prefix or dual"),
        (["--threshold", "2"], "--threshold must be above 0 and at most 1, got 2.0"),
        (["--top-p", "0"], "--top-p must be above 0 and at most 1, got 0.0"),
        (["--algorithm", "best"], "--algorithm must be one of entropy, low_confidence"),
        (["--algorithm", "entropy", "--threshold", "0.9"], "needs an algorithm whose confidence"),
    ],
)
def test_options_it_cannot_use_are_one_line(capsys, arguments, message):
    assert main(["generate", "tiny", "a", *SIZES, *arguments, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert message in captured.err
