"""A loop of your own: a hand-written model and sampler with its own key/value cache, pruned by their sinks.

    python examples/custom_stack.py [--prompt TEXT] [--tokens 64] [--steps 32] [--keep 5]

Of sinkprune it uses three things only: ``sp.ops``, ``sp.SinkTracker`` and ``sp.SinkPrunedAttention``.
Everything else, from the norm to the cache, is what a serving stack would have already. The weights are the
embedded model's. The cache is a prefix cache: prompt and finished blocks are computed once and not again,
which on a bidirectional model is an approximation, with pruning and without.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import sinkprune as sp
from sinkprune.planning.timing import interleaved

KeyValueCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class PrefixCache:
    """Keys after RoPE and values of the committed tokens, ``[1, heads, tokens, head_dim]`` for each layer."""

    def __init__(self, layers: int) -> None:
        self.kept: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.tokens = 0

    def layer(self, index: int, commit: bool) -> KeyValueCache:
        """What ``SinkPrunedAttention`` calls: takes the new keys and values, returns all it shall see."""

        def extend(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            past = self.kept[index]
            if past is not None:
                k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
            if commit:
                self.kept[index] = (k, v)
            return k, v

        return extend


class Stack:
    """The model: plain tensors, and one ``SinkPrunedAttention`` a layer."""

    def __init__(self, weights: dict[str, Tensor], heads: int, theta: float, eps: float) -> None:
        self.weights, self.eps = weights, eps
        self.width = weights["model.transformer.wte.weight"].shape[1]
        self.heads, self.head_dim, self.theta = heads, self.width // heads, theta
        self.layers = 1 + max(int(name.split(".")[3]) for name in weights if ".blocks." in name)
        self.attention: list[sp.SinkPrunedAttention] = []
        self.keep([list(range(heads))] * self.layers)

    def keep(self, kept_heads: list[list[int]]) -> None:
        """(Re)build the attention layers from the dense weights, with only these heads."""
        self.attention = [
            sp.SinkPrunedAttention.from_projections(
                *(self.weight(i, name) for name in ("q_proj", "k_proj", "v_proj", "attn_out")),
                head_dim=self.head_dim,
                kept_heads=kept,
            )
            for i, kept in enumerate(kept_heads)
        ]

    def weight(self, layer: int, name: str) -> Tensor:
        return self.weights[f"model.transformer.blocks.{layer}.{name}.weight"]

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), gain, self.eps)

    def forward(self, ids: Tensor, cache: PrefixCache, commit: bool = False) -> Tensor:
        """Logits ``[1, L, V]`` of the tokens that follow the cached ones."""
        first, length = cache.tokens, ids.shape[1]
        half = torch.arange(0, self.head_dim, 2) / self.head_dim
        angle = torch.arange(first, first + length)[:, None] * self.theta**-half
        cos, sin = torch.cat((angle, angle), 1).cos(), torch.cat((angle, angle), 1).sin()
        x = F.embedding(ids, self.weights["model.transformer.wte.weight"])
        for i, attention in enumerate(self.attention):
            y = self.norm(x, self.weight(i, "attn_norm"))
            x = x + attention(y, cos, sin, cache=cache.layer(i, commit))
            y = self.norm(x, self.weight(i, "ff_norm"))
            gate, up = F.linear(y, self.weight(i, "ff_proj")), F.linear(y, self.weight(i, "up_proj"))
            x = x + F.linear(F.silu(gate) * up, self.weight(i, "ff_out"))
        cache.tokens += length if commit else 0
        x = self.norm(x, self.weights["model.transformer.ln_f.weight"])
        return F.linear(x, self.weights["model.transformer.ff_out.weight"])


def sample(
    stack: Stack,
    prompt: Tensor,
    mask_id: int,
    tokens: int,
    steps: int,
    block: int,
    tracker: sp.SinkTracker | None = None,
) -> Tensor:
    """Fill ``tokens`` masks after ``prompt`` ``[1, P]``, block by block, the most confident first."""
    cache = PrefixCache(stack.layers)
    stack.forward(prompt, cache, commit=True)
    rest = torch.full((1, tokens), mask_id)  # what is not in the cache yet
    done = prompt
    while rest.shape[1]:
        for left in range(steps * block // tokens, 0, -1):
            logits = stack.forward(rest, cache)[:, :block]
            if tracker is not None:  # the observers have written this forward's masses
                tracker.end_step(num_keys=cache.tokens + rest.shape[1])
            logits[..., mask_id] = -torch.inf
            confidence, drawn = logits.softmax(-1).max(-1)
            open_ = rest[:, :block] == mask_id
            count = -(-int(open_.sum()) // left)
            chosen = confidence.masked_fill(~open_, -1).topk(count).indices
            rest = rest.scatter(1, chosen, drawn.gather(1, chosen))
        stack.forward(rest[:, :block], cache, commit=True)
        done, rest = torch.cat((done, rest[:, :block]), 1), rest[:, block:]
    return done


def watch(stack: Stack, keys: int) -> sp.SinkTracker:
    """A tracker that every attention layer of ``stack`` writes its column mass into."""
    tracker = sp.SinkTracker(stack.layers, stack.heads, batch_size=1, max_keys=keys)
    for attention, mass in zip(stack.attention, tracker.mass, strict=True):
        attention.observer = lambda call, out=mass: sp.ops.column_mass(
            call.query, call.key, call.lse, out=out
        )
    return tracker


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A hand-written stack, pruned by its sinks.")
    parser.add_argument("--prompt", default="My fellow citizens, the state of our Union")
    parser.add_argument("--tokens", type=int, default=64, help="to write; a multiple of the block of 16")
    parser.add_argument("--steps", type=int, default=32, help="forwards; a multiple of the number of blocks")
    parser.add_argument("--keep", type=int, default=5, help="heads to keep in each layer, of 8")
    options = parser.parse_args(arguments)
    block = 16
    if options.tokens < block or options.tokens % block or options.steps < options.tokens // block:
        parser.error(f"--tokens must be a multiple of {block}, and --steps at least one a block")
    if options.steps % (options.tokens // block):
        parser.error(f"--steps must be a multiple of the {options.tokens // block} blocks")
    if not 1 <= options.keep <= 8:
        parser.error("--keep must be 1 to 8")

    model, tokenizer = sp.load("tiny")  # for its weights and tokenizer; the model itself never runs
    config = model.config
    stack = Stack(model.state_dict(), config.n_heads, config.rope_theta, config.rms_norm_eps)
    prompt = torch.tensor([tokenizer.encode(options.prompt)])
    settings = (prompt, config.mask_token_id, options.tokens, options.steps, block)

    with torch.inference_mode():
        tracker = watch(stack, keys=prompt.shape[1] + options.tokens)
        dense = sample(stack, *settings, tracker=tracker)
        variance = tracker.result().position.variance[:, 0].nan_to_num()  # [layers, heads]
        stable = variance.argsort(dim=1, stable=True)[:, : options.keep]
        stack.keep([list(range(stack.heads))] * stack.layers)  # without observers, to be timed
        small = Stack(model.state_dict(), config.n_heads, config.rope_theta, config.rms_norm_eps)
        small.keep([sorted(layer.tolist()) for layer in stable])
        pruned = sample(small, *settings)
        calls = {"dense": lambda: sample(stack, *settings), "pruned": lambda: sample(small, *settings)}
        timings, ratios = interleaved(calls, repeats=3, warmup=1)

    print(f"sink position variance by head, layer 0: {[round(v, 1) for v in variance[0].tolist()]}")
    for name, ids in (("dense", dense), ("pruned", pruned)):
        text = tokenizer.decode(ids[0, prompt.shape[1] :].tolist())
        print(f"{name}: {1e3 * options.tokens / timings[name].median:.0f} tokens/s\n  {text}")
    print(f"pruned is {ratios['pruned']:.2f} times as fast")


if __name__ == "__main__":
    main()
