"""Calibration rows: the masks they promise, what they refuse; and blocks run one at a time."""

import pytest
import torch
from dreams import toy_dream
from hf import build
from toys import MASK, WordTokenizer, forward_of, one_thread, tokens, toy  # noqa: F401
from upstream_twins import dream_twin, llada_twin

import sinkprune as sp
from sinkprune.evidence.calibration import BlockStream, Calibration, calibrate, linear

TEXT = tokens(300, seed=1)


@pytest.mark.parametrize("levels", [(0.15, 0.5, 0.85), (1.0,), (0.01, 0.33)], ids=str)
def test_every_row_is_masked_at_exactly_every_level(levels):
    rows = calibrate(toy(), TEXT, sequences=5, length=20, levels=levels)
    assert rows.ids.shape == rows.targets.shape == rows.masked.shape == (5 * len(levels), 20)
    assert rows.valid is None
    for part, level in enumerate(levels):
        counts = rows.masked[5 * part : 5 * part + 5].sum(1)
        assert counts.tolist() == [max(1, round(20 * level))] * 5
    assert torch.equal(rows.ids == MASK, rows.masked)
    assert torch.equal(rows.ids[~rows.masked], rows.targets[~rows.masked])


def test_windows_are_pieces_of_the_text_and_the_same_at_every_level():
    rows = calibrate(toy(), TEXT, sequences=6, length=12, levels=(0.2, 0.6))
    windows = TEXT.unfold(0, 12, 1)
    assert all((windows == row).all(1).any() for row in rows.targets)
    assert torch.equal(rows.targets[:6], rows.targets[6:])
    assert len({tuple(row.tolist()) for row in rows.targets}) > 1
    assert not torch.equal(rows.masked[0], rows.masked[1])  # each row has its own mask


def test_a_text_of_one_window_is_that_window():
    rows = calibrate(toy(), TEXT[:12], sequences=2, length=12, levels=(0.5,))
    assert torch.equal(rows.targets, TEXT[:12].expand(2, 12))


@pytest.mark.parametrize("padded", [False, True])
def test_given_rows_are_drawn_whole_and_without_repeats(padded):
    given = tokens(7, 10, seed=2)
    valid = None
    if padded:
        valid = torch.ones(7, 10, dtype=torch.long)
        valid[::2, :4] = 0
    rows = calibrate(toy(), given, attention_mask=valid, sequences=4, length=99, levels=(0.5,))
    found = [(given == row).all(1).nonzero().item() for row in rows.targets]
    assert len(set(found)) == 4
    if valid is not None:
        assert torch.equal(rows.valid, valid[found].bool())
    assert len(calibrate(toy(), given, sequences=99, levels=(0.5,)).ids) == 7


def test_padding_and_tokens_that_are_never_masked_stay_and_levels_count_the_others():
    given = tokens(6, 16, seed=3)
    given[:, 3] = given[:, 9] = 7
    valid = torch.ones_like(given, dtype=torch.bool)
    valid[2:, -5:] = False
    rows = calibrate(toy(), given, attention_mask=valid, levels=(0.5, 0.9), never_mask=(7, 8))
    free = rows.valid & (rows.targets != 7) & (rows.targets != 8)
    assert not (rows.masked & ~free).any()
    for level, part in zip((0.5, 0.9), (slice(0, 6), slice(6, 12)), strict=True):
        assert rows.masked[part].sum(1).tolist() == [round(n * level) for n in free[part].sum(1).tolist()]
    assert torch.equal(rows.valid[:6], rows.valid[6:])


def test_every_maskable_token_is_masked_as_often():
    rows = calibrate(toy(), TEXT[:10], sequences=4000, length=10, levels=(0.3,))
    share = rows.masked.double().mean(0)
    assert (share - 0.3).abs().max() < 5 * (0.3 * 0.7 / 4000) ** 0.5


def test_rows_depend_on_the_seed_alone():
    def make(seed):
        return calibrate(toy(), TEXT, sequences=3, length=10, seed=seed)

    torch.manual_seed(0)
    first = make(4)
    torch.manual_seed(1)
    again = make(4)
    assert torch.equal(again.ids, first.ids)
    assert torch.equal(again.targets, first.targets)
    assert not torch.equal(make(5).targets, first.targets)


def test_strings_are_encoded_cut_and_padded_by_the_tokenizer():
    words = [" ".join(f"w{i}" for i in range(1, n + 1)) for n in (3, 5, 9)]
    rows = calibrate(toy(), words, tokenizer=WordTokenizer(), length=6, levels=(0.5,))
    lengths = rows.valid.sum(1).tolist()
    assert sorted(lengths) == [3, 5, 6]
    for row, length in zip(rows.targets, lengths, strict=True):
        assert row.tolist() == [*range(1, length + 1), *[0] * (6 - length)]
    one = calibrate(toy(), " ".join(words), tokenizer=WordTokenizer(), sequences=2, length=17)
    assert one.targets[0].tolist() == [*range(1, 4), *range(1, 6), *range(1, 10)]
    same = calibrate(toy(), ["w1 w2", "w3 w4"], tokenizer=WordTokenizer())
    assert same.valid is None


@pytest.mark.parametrize("size", [1, 4, 100])
def test_batches_are_the_rows_in_order(size):
    given, valid = tokens(6, 9), torch.ones(6, 9, dtype=torch.bool)
    valid[3, :2] = False
    rows = calibrate(toy(), given, attention_mask=valid, levels=(0.4,))
    parts = list(rows.batches(size))
    assert max(len(part.ids) for part in parts) <= size
    for name in ("ids", "targets", "masked", "valid"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(rows, name))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (TEXT[:9], {"length": 10}, "the text has 9 tokens, fewer than one window of 10"),
        (TEXT, {"sequences": 0}, "sequences and length must be at least 1"),
        (TEXT, {"length": 0}, "sequences and length must be at least 1"),
        (TEXT, {"levels": ()}, r"levels lie in \(0, 1\], got"),
        (TEXT, {"levels": (0.5, 0.0)}, r"levels lie in \(0, 1\], got"),
        (TEXT, {"levels": (1.1,)}, r"levels lie in \(0, 1\], got"),
        (TEXT, {"levels": (float("nan"),)}, r"levels lie in \(0, 1\], got"),
        (torch.zeros(0, dtype=torch.long), {}, "ids must be integers"),
        (torch.zeros(2, 0, dtype=torch.long), {}, "ids must be integers"),
        (torch.zeros(40), {}, "ids must be integers .* got torch.float32"),
        (torch.ones(1, 2, 3, dtype=torch.long), {}, r"got torch.int64 \(1, 2, 3\)"),
        (TEXT.view(30, 10), {"attention_mask": torch.ones(30, 9)}, r"must have shape \(30, 10\), got"),
        (TEXT.view(30, 10), {"attention_mask": torch.zeros(30, 10)}, "a token that may be masked"),
        (torch.full((40,), 7), {"never_mask": (7,), "length": 10}, "a token that may be masked"),
        ("w1 w2", {}, "text needs a tokenizer; or pass ids"),
        ("", {"tokenizer": WordTokenizer()}, "fewer than one window|ids must be|at least one token"),
        ([], {"tokenizer": WordTokenizer()}, "there must be one text"),
        (["w1", ""], {"tokenizer": WordTokenizer()}, "at least one token"),
    ],
)  # fmt: skip
def test_bad_calibration_text_is_refused(text, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(toy(), text, **options)


def test_a_model_without_a_mask_token_needs_one():
    model = toy(mask_token_id=None)
    with pytest.raises(ValueError, match="names no mask token: pass mask_token_id"):
        calibrate(model, TEXT, length=10)
    rows = calibrate(model, TEXT, length=10, mask_token_id=58)
    assert (rows.ids[rows.masked] == 58).all()


MODELS = {
    "llada": lambda: toy(n_kv_heads=2), "dream": toy_dream, "live llada": llada_twin,
    "live dream": dream_twin, "bert": lambda: build("bert"),
    "modernbert": lambda: build("modernbert"), "qwen3": lambda: build("qwen3"),
}  # fmt: skip


def padded_rows(count=5, length=11):
    ids = tokens(count, length, seed=5)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :3] = valid[-1, :6] = False
    return Calibration(ids, ids, ids == MASK, valid)


def outputs_of(model, rows, watch):
    """What the module ``watch`` gives in a forward of all rows at once."""
    seen = []
    hook = watch.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        sp.adapter_for(model).predict(rows.ids, rows.valid)
    hook.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_blocks_one_by_one_give_every_hidden_state_of_the_model(make, padding):
    model, rows = make(), padded_rows()
    if not padding:
        rows = Calibration(rows.ids, rows.targets, rows.masked)
    adapter = sp.adapter_for(model)
    seen = torch.ones_like(rows.masked) if rows.valid is None else rows.valid
    stream = BlockStream(adapter, rows, batch=2)
    for layer, block in enumerate(adapter.blocks()):
        stream.advance(layer)
        expected = outputs_of(model, rows, block)
        torch.testing.assert_close(torch.cat(stream.hidden)[seen], expected[seen], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [llada_twin, dream_twin], ids=["live llada", "live dream"])
def test_what_live_code_sees_of_padding_is_what_a_row_without_it_sees(make):
    model, rows = make(), padded_rows()
    adapter = sp.adapter_for(model)
    stream, alone = BlockStream(adapter, rows), BlockStream(adapter, Calibration(*[rows.ids[:1]] * 3))
    changed = rows.ids.masked_fill(~rows.valid, 13)
    other = BlockStream(adapter, Calibration(changed, changed, rows.masked, rows.valid))
    for layer in range(3):
        for each in (stream, alone, other):
            each.advance(layer)
    torch.testing.assert_close(stream.hidden[0][:1], alone.hidden[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(stream.hidden[0][rows.valid], other.hidden[0][rows.valid], atol=0, rtol=0)


def test_a_change_of_weights_is_seen_by_later_layers_alone():
    model, rows = toy(), padded_rows()
    stream = BlockStream(sp.adapter_for(model), rows)
    stream.advance(0)
    with torch.no_grad():
        model.blocks[0].ff_out.weight.zero_()  # too late for this layer
        model.blocks[1].ff_out.weight.zero_()
    stream.advance(1)
    stream.advance(2)
    whole = toy()
    with torch.no_grad():
        whole.blocks[1].ff_out.weight.zero_()
    expected = outputs_of(whole, rows, whole.blocks[2])
    torch.testing.assert_close(stream.hidden[0][rows.valid], expected[rows.valid], atol=1e-6, rtol=1e-5)


def test_a_visit_shows_what_reaches_a_module_and_leaves_the_hidden_states():
    model, rows = toy(), padded_rows()
    stream = BlockStream(sp.adapter_for(model), rows, batch=2)
    stream.advance(0)
    before, shown, later = [h.clone() for h in stream.hidden], [], []
    after = model.blocks[1].ff_out.register_forward_hook(lambda *args: later.append(1))
    stream.visit(1, model.blocks[1].attn_out, shown.append)
    assert not later  # the rest of the block did not run
    after.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, stream.hidden, strict=True))
    given = []
    hook = model.blocks[1].attn_out.register_forward_pre_hook(lambda m, args: given.append(args[0]))
    with torch.no_grad():
        model(rows.ids, attention_mask=rows.valid)
    hook.remove()
    torch.testing.assert_close(torch.cat(shown)[rows.valid], given[0][rows.valid], atol=1e-6, rtol=1e-5)
    assert not model.blocks[1].attn_out._forward_pre_hooks


def test_a_look_that_fails_leaves_no_hook():
    model = toy()
    stream = BlockStream(sp.adapter_for(model), padded_rows())

    def look(x):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        stream.visit(0, model.blocks[0].attn_out, look)
    assert not model.blocks[0].attn_out._forward_pre_hooks
    assert not any(block._forward_pre_hooks for block in model.blocks)


def test_only_linear_layers_in_floating_point_are_read():
    layer = torch.nn.Linear(2, 3)
    assert linear(layer) is layer
    with pytest.raises(ValueError, match="expected a linear layer in floating point, got a Embedding"):
        linear(torch.nn.Embedding(2, 3))
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="expected a linear layer"):
        linear(layer)


def test_the_blocks_also_give_the_independent_forwards_logits():
    model, rows = toy(n_kv_heads=2), padded_rows()
    stream = BlockStream(sp.adapter_for(model), rows)
    for layer in range(3):
        stream.advance(layer)
    with torch.no_grad():
        logits = model.head(model.model["transformer"]["ln_f"](stream.hidden[0]))
    expected = forward_of(model, rows.ids, rows.valid)
    torch.testing.assert_close(logits[rows.valid].double(), expected[rows.valid], atol=1e-4, rtol=1e-4)
