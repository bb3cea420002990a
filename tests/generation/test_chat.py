"""Chat by the tokenizer's template, several prompts, a seed, and text that fills in on a terminal."""

import io
import json
import re
import sys

import pytest

import sinkprune as sp
from sinkprune.commands.main import main

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SHORT = {"steps": 4, "gen_length": 8}
FLAGS = ["--steps", "4", "--gen-length", "8"]


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """tiny with a chat template, and its folder."""
    model, tokenizer = sp.load("tiny")
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("made") / "talker"
    sp.save(model, folder, tokenizer=tokenizer)
    return model, tokenizer, folder


def test_a_chat_goes_on_from_what_the_template_makes(talker):
    model, tokenizer, _ = talker
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    written = "system: Be brief.\nuser: Who?\nassistant:"
    expected = sp.generate(model, tokenizer, written, stop_token_id=tokenizer.eos_token_id, **SHORT)
    assert sp.chat(model, tokenizer, messages, **SHORT) == expected
    one = sp.generate(model, tokenizer, "user: Who?\nassistant:", **SHORT)
    assert sp.chat(model, tokenizer, "Who?", stop_token_id=None, **SHORT) == one
    both = sp.generate(model, tokenizer, [written, "user: Who?\nassistant:"], **SHORT)
    talks = [messages, [{"role": "user", "content": "Who?"}]]
    assert sp.chat(model, tokenizer, talks, stop_token_id=None, **SHORT) == both


def test_an_answer_ends_where_the_end_of_text_stands(talker):
    """Any token as the end: no more is run once it stands, and the text is what comes before it."""
    model, tokenizer, _ = talker
    ids = tokenizer.encode("user: Who?\nassistant:", add_special_tokens=False)
    import torch

    sizes = {"steps": 8, "gen_length": 8, "block_length": 1}
    *_, final = sp.denoise(model, torch.tensor([ids]), **sizes)
    end, steps = int(final[0, len(ids) + 2]), []
    before = final[0, len(ids) :].tolist().index(end)
    sp.chat(model, tokenizer, "Who?", stop_token_id=end, callback=steps.append, **sizes)
    assert len(steps) == before + 1 < 8


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "at least one prompt is needed"),
        ([[]], "at least one message, got none"),
        ([{"role": "user"}], "a message is {'role': str, 'content': str}, got {'role': 'user'}"),
    ],
)
def test_messages_that_are_none_are_refused(talker, messages, told):
    model, tokenizer, _ = talker
    with pytest.raises(ValueError, match=re.escape(told)):
        sp.chat(model, tokenizer, messages, **SHORT)
    with pytest.raises(ValueError, match="has no chat template"):
        sp.chat(*sp.load("tiny"), "Who?")


def test_the_command_line_chats_and_takes_several_prompts(talker, capsys):
    model, tokenizer, folder = talker
    asked = ["generate", str(folder), "Who?", "What?", "--chat", "--system", "Be brief.", *FLAGS, "--json"]
    assert main(asked) == 0
    talks = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        for text in ("Who?", "What?")
    ]
    said = json.loads(capsys.readouterr().out)
    assert said["texts"] == sp.chat(model, tokenizer, talks, **SHORT)
    assert main(["generate", "tiny", "The Congress", "My fellow", *FLAGS]) == 0
    texts = sp.generate(*sp.load("tiny"), ["The Congress", "My fellow"], **SHORT)
    assert capsys.readouterr().out == f"1. {texts[0]}\n\n2. {texts[1]}\n"
    assert main(["generate", "tiny", "a", "--system", "b", "--quiet"]) == 2
    assert "--system would be ignored: it goes before a user's message: add --chat" in capsys.readouterr().err
    assert main(["generate", "tiny", "a", "--chat", "--quiet"]) == 2
    assert "the tokenizer has no chat template" in capsys.readouterr().err


def test_a_seed_decides_what_is_drawn(capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", "tiny", "The", "--temperature", "2", "--seed", seed, *FLAGS]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_terminal_sees_the_text_fill_in(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["generate", "tiny", "The Congress", *FLAGS, "--stream"]) == 0
    drawn = re.split(r"\x1b\[\d+F\x1b\[J", sys.stderr.getvalue())
    assert [text.count("░") for text in drawn] == [6, 4, 2, 0, 0] and drawn[-1] == ""
    assert "".join(drawn[3].split()) == "".join(capsys.readouterr().out.split())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert main(["generate", "tiny", "The Congress", *FLAGS, "--stream"]) == 0
    assert sys.stderr.getvalue() == ""
