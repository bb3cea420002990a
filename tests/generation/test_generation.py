"""The sampler against a plain re-implementation of the published LLaDA ``generate``, and its promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import MASK, WordTokenizer, one_thread, tokens, toy  # noqa: F401

import sinkprune as sp
from sinkprune.generation.denoising import encode_prompts, transfer_counts


def published_generate(model, prompt, steps, gen_length, block_length, cfg_scale=0.0):
    """One prompt, temperature 0, low-confidence remasking: token by token, as the paper's code does."""
    x = prompt + [MASK] * gen_length
    blocks, history = gen_length // block_length, []
    for block in range(blocks):
        start = len(prompt) + block * block_length
        base, remainder = divmod(block_length, steps // blocks)
        for step in range(steps // blocks):
            logits = model(torch.tensor([x])).logits[0]
            if cfg_scale:
                blind = [MASK] * len(prompt) + x[len(prompt) :]
                unconditional = model(torch.tensor([blind])).logits[0]
                logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
            proposals = []
            for position in range(start, start + block_length):
                if x[position] != MASK:
                    continue
                row = logits[position].tolist()
                row[MASK] = -math.inf
                token = max(range(len(row)), key=lambda t: row[t])
                confidence = 1 / math.fsum(math.exp(value - row[token]) for value in row)
                proposals.append((-confidence, position, token))
            for _, position, token in sorted(proposals)[: base + (step < remainder)]:
                x[position] = token
            history.append(list(x))
    return history


def constant_model(probabilities, **changes):
    """A model that predicts the same distribution whatever it reads; its last id is the mask."""
    vocabulary = len(probabilities) + 1
    model = toy(
        vocab_size=vocabulary, embedding_size=vocabulary, mask_token_id=vocabulary - 1, n_layers=1,
        include_bias=True, **changes,
    )  # fmt: skip
    head = model.model["transformer"]["ff_out"]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([*probabilities, 0.9]).log())  # likely, yet never drawn
    return model


def chi_square(counts, probabilities):
    expected = counts.sum() * torch.tensor(probabilities, dtype=torch.float64)
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.fixture(scope="module")
def model():
    return toy(n_kv_heads=2)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5], ids=["plain", "guided"])
@pytest.mark.parametrize(
    ("steps", "gen_length", "block_length"), [(12, 12, 12), (5, 12, None), (6, 12, 4), (4, 12, 3)]
)
@torch.no_grad()
def test_every_step_equals_the_published_sampler(model, steps, gen_length, block_length, cfg_scale):
    prompt = tokens(1, 7)
    expected = published_generate(
        model, prompt[0].tolist(), steps, gen_length, block_length or gen_length, cfg_scale
    )
    options = {"steps": steps, "gen_length": gen_length, "block_length": block_length}
    got = [ids[0].tolist() for ids in sp.denoise(model, prompt, cfg_scale=cfg_scale, **options)]
    assert got == expected


@pytest.mark.parametrize("cfg_scale", [0.0, 0.7], ids=["plain", "guided"])
def test_a_left_padded_batch_gives_each_prompt_what_it_gets_alone(model, cfg_scale):
    lengths, longest = [3, 8, 5], 8
    rows = [tokens(1, n, seed=n) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    valid = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    options = {"steps": 6, "gen_length": 12, "block_length": 6, "cfg_scale": cfg_scale}
    together = list(sp.denoise(model, ids, valid, **options))
    for i, row in enumerate(rows):
        alone = list(sp.denoise(model, row, **options))
        assert [x[i, longest:].tolist() for x in together] == [x[0, row.shape[1] :].tolist() for x in alone]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(blocks=st.integers(1, 4), block_length=st.integers(1, 6), data=st.data())
def test_steps_fill_block_after_block_and_never_touch_what_is_there(blocks, block_length, data):
    model = constant_model([0.5, 0.3, 0.2], max_sequence_length=40)
    per_block = data.draw(st.integers(1, block_length))
    remasking = data.draw(st.sampled_from(["low_confidence", "random"]))
    steps, gen_length = blocks * per_block, blocks * block_length
    prompt = torch.tensor([[0, 1, 2], [2, 1, 0]])
    before = torch.cat((prompt, torch.full((2, gen_length), 3)), 1)
    options = {"steps": steps, "gen_length": gen_length, "block_length": block_length, "remasking": remasking}
    counts = []
    for ids in sp.denoise(model, prompt, temperature=1.0, seed=0, **options):
        assert torch.equal(ids[before != 3], before[before != 3])
        filled = (ids[:, 3:] != 3).unflatten(1, (blocks, block_length)).sum(2)  # [B, blocks]
        open_before = filled.cumsum(1) - filled < torch.arange(blocks) * block_length
        assert not (filled.bool() & open_before).any()
        counts.append(((ids != 3) & (before == 3)).sum(1).tolist())
        before = ids
    assert len(counts) == steps
    assert (before != 3).all()
    base, extra = divmod(block_length, per_block)
    assert counts == [[base + (i < extra)] * 2 for _ in range(blocks) for i in range(per_block)]


def test_transfer_counts_are_even_and_add_up():
    assert transfer_counts(10, 4) == [3, 3, 2, 2]
    assert transfer_counts(4, 4) == [1, 1, 1, 1]


def test_a_mask_token_in_the_prompt_is_left_as_it_is(model):
    prompt = torch.tensor([[5, MASK, 7]])
    *_, final = sp.denoise(model, prompt, steps=4, gen_length=4)
    assert final[0, :3].tolist() == [5, MASK, 7]
    assert MASK not in final[0, 3:]


def test_each_yield_is_a_fresh_tensor_and_the_prompt_is_not_written_to(model):
    prompt = tokens(1, 4)
    kept = prompt.clone()
    states = list(sp.denoise(model, prompt, steps=3, gen_length=3))
    assert [(ids == MASK).sum().item() for ids in states] == [2, 1, 0]
    assert torch.equal(prompt, kept)


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"remasking": "random"}], ids=["gumbel", "random"])
def test_a_seed_decides_the_text_and_leaves_the_global_generator_alone(model, options):
    prompt, sizes = tokens(2, 4), {"steps": 6, "gen_length": 12}

    def run(seed):
        return torch.stack(list(sp.denoise(model, prompt, seed=seed, **sizes, **options)))

    state = torch.get_rng_state()
    first, again, other = run(3), run(3), run(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(11)
    unseeded = run(None)
    torch.manual_seed(11)
    assert torch.equal(run(None), unseeded)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_at_a_temperature_follow_the_softmax(temperature):
    probabilities = [0.4, 0.3, 0.15, 0.1, 0.05]
    model = constant_model(probabilities)
    *_, ids = sp.denoise(
        model, torch.zeros(64, 1, dtype=torch.long), steps=1, gen_length=63, temperature=temperature, seed=1
    )
    tempered = [p ** (1 / temperature) for p in probabilities]
    expected = [p / sum(tempered) for p in tempered]
    counts = torch.bincount(ids[:, 1:].flatten(), minlength=6).double()
    assert counts[5] == 0  # the mask token, though it is likelier than any other
    assert chi_square(counts[:5], expected) < 23.5  # 4 degrees of freedom, p = 1e-4


def test_random_remasking_commits_positions_uniformly():
    model = constant_model([0.6, 0.4])
    first = next(
        sp.denoise(
            model, torch.zeros(1000, 1, dtype=torch.long), steps=5, gen_length=5, remasking="random", seed=0
        )
    )
    counts = (first[:, 1:] != 2).sum(0).double()
    assert counts.sum() == 1000
    assert chi_square(counts, [0.2] * 5) < 23.5


@torch.no_grad()
def test_random_remasking_takes_the_most_likely_token_where_it_commits(model):
    prompt = tokens(1, 4)
    before = torch.cat((prompt, torch.full((1, 6), MASK)), 1)
    for ids in sp.denoise(model, prompt, steps=6, gen_length=6, remasking="random", seed=2):
        logits = model(before).logits
        logits[..., MASK] = -math.inf
        new = ids != before
        assert torch.equal(ids[new], logits.argmax(-1)[new])
        before = ids


def bad(change, message):
    return pytest.param(change, message, id=message.split(",")[0][:40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        bad({"prompt_ids": torch.zeros(1, 0, dtype=torch.long)}, r"P >= 1, got \(1, 0\)"),
        bad({"prompt_ids": torch.zeros(4, dtype=torch.long)}, r"with B and P >= 1, got \(4,\)"),
        bad({"attention_mask": torch.ones(1, 5)}, r"attention_mask must have shape \(1, 4\), got \(1, 5\)"),
        bad({"gen_length": 0}, "gen_length must be at least 1, got 0"),
        bad({"block_length": 5}, "block_length must divide gen_length=8, got 5"),
        bad({"block_length": 0}, "block_length must divide gen_length=8, got 0"),
        bad({"steps": 1, "block_length": 4}, "multiple of .*2 block"),
        bad({"steps": 3, "block_length": 4}, "got 3"),
        bad({"steps": 9}, "at most gen_length=8, got 9"),
        bad({"steps": 0}, "got 0"),
        bad({"remasking": "entropy"}, "remasking must be one of .*'random'.*, got 'entropy'"),
        bad({"gen_length": 61, "steps": 1}, "exceed the context of 64"),
        bad({"temperature": -0.1}, "at least 0, got -0.1 and 0.0"),
        bad({"cfg_scale": -1.0}, "at least 0, got 0.0 and -1.0"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_forward(model, monkeypatch, change, message):
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("the model ran"))
    arguments = {"prompt_ids": tokens(1, 4), "steps": 4, "gen_length": 8} | change
    with pytest.raises(ValueError, match=message):
        next(sp.denoise(model, arguments.pop("prompt_ids"), **arguments))


def test_a_config_without_a_mask_token_asks_for_one():
    model = toy(mask_token_id=None)
    with pytest.raises(ValueError, match="pass mask_token_id"):
        next(sp.denoise(model, tokens(1, 4), steps=2, gen_length=2))
    *_, with_id = sp.denoise(model, tokens(1, 4), steps=2, gen_length=2, mask_token_id=MASK)
    *_, from_config = sp.denoise(toy(), tokens(1, 4), steps=2, gen_length=2)
    assert torch.equal(with_id, from_config)


def test_a_model_of_no_known_family_is_named():
    with pytest.raises(TypeError, match=r"no adapter recognises a model of type Linear; known .*llada"):
        next(sp.denoise(torch.nn.Linear(2, 2), tokens(1, 4)))


def test_generate_returns_text_for_text_and_a_list_for_a_list(model):
    tokenizer, options = WordTokenizer(), {"steps": 4, "gen_length": 4}
    one = sp.generate(model, tokenizer, "w3 w4 w5", **options)
    both = sp.generate(model, tokenizer, ["w3 w4 w5", "w9"], **options)
    *_, ids = sp.denoise(model, torch.tensor([[3, 4, 5]]), **options)
    assert isinstance(one, str)
    assert both == [one, sp.generate(model, tokenizer, "w9", **options)]
    words = ids[0, 3:].tolist()
    assert one == tokenizer.decode(words[: words.index(0)] if 0 in words else words)


def test_generated_text_ends_at_the_end_of_text_token():
    model = constant_model([0.5, 0.5])
    tokenizer = WordTokenizer()  # id 0 ends a text
    texts = sp.generate(model, tokenizer, ["w1"] * 20, steps=1, gen_length=8, temperature=1.0, seed=0)
    *_, ids = sp.denoise(
        model, torch.ones(20, 1, dtype=torch.long), steps=1, gen_length=8, temperature=1.0, seed=0
    )
    expected = [row.tolist() for row in ids[:, 1:]]
    assert texts == [" ".join(["w1"] * (row.index(0) if 0 in row else 8)) for row in expected]


def test_prompts_are_padded_on_the_left():
    ids, valid = encode_prompts(WordTokenizer(), ["w3", "w4 w5 w6"])
    assert ids.tolist() == [[0, 0, 3], [4, 5, 6]]
    assert valid.tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("tokenizer", "prompts", "message"),
    [
        (None, ["w1"], "text prompts need a tokenizer"),
        (WordTokenizer(), [], "at least one prompt is needed, got none"),
        (WordTokenizer(), ["w1", " "], "a prompt must have at least one token, got ' '"),
    ],
)
def test_prompts_without_tokens_are_refused(tokenizer, prompts, message):
    with pytest.raises(ValueError, match=message):
        encode_prompts(tokenizer, prompts)


@pytest.mark.parametrize("row", [[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]], ids=["right", "empty", "hole"])
def test_padding_that_is_not_on_the_left_is_refused(row):
    valid = torch.tensor([[1, 1, 1, 1], row])
    with pytest.raises(ValueError, match=r"padded on the left.*rows \[1\] are not"):
        next(sp.denoise(toy(), tokens(2, 4), valid, gen_length=4, steps=4))


def test_steps_unasked_are_as_many_as_the_tokens_where_those_are_few():
    seen = []
    sp.generate(toy(), WordTokenizer(), "w1 w2", gen_length=6, callback=seen.append)
    assert len(seen) == 6
    assert len(list(sp.denoise(toy(), tokens(1, 3), gen_length=5))) == 5


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"remasking": "random"}, {"threshold": 0.5}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_write_nothing(value, options):
    model = toy()
    with torch.no_grad():
        model.model["transformer"]["ff_out"].weight.fill_(value)
    with pytest.raises(ValueError, match="NaN or infinite"):
        next(sp.denoise(model, tokens(1, 3), gen_length=4, **options))
