"""The work that `latency.py` times: a group is a list of variants, one piece of work done in several ways."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sinkprune as sp
from sinkprune import ops
from sinkprune.generation.graphs import cuda_capture
from sinkprune.generation.samplers import transfer_counts
from sinkprune.models.llada import LLaDA, LLaDAConfig
from sinkprune.models.rotary import rotary_table
from sinkprune.planning.costs import Operation, attention_operations, mlp_operations, step_operations
from sinkprune.plans import Geometry, block_parameters, layer_sizes

REMOVED = (0.125, 0.25, 0.38, 0.5)
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 256, "n_heads": 8, "n_layers": 6, "mlp_hidden_size": 512, "vocab_size": 4096},
    "150M": {"d_model": 768, "n_heads": 12, "n_layers": 16, "mlp_hidden_size": 2048, "vocab_size": 16384},
    "LLaDA-8B": {
        "d_model": 4096, "n_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288, "vocab_size": 126464,
    },
    "Dream-7B": {
        "d_model": 3584, "n_heads": 28, "n_kv_heads": 4, "n_layers": 28, "mlp_hidden_size": 18944,
        "vocab_size": 152064, "include_qkv_bias": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One setting. ``steps`` forwards of generation (0: none) fill the second half, block by block."""

    shape: str
    dtype: torch.dtype
    batch: int
    length: int
    steps: int
    rounds: int
    block_length: int | None = None

    @property
    def new_tokens(self) -> int:
        return self.length - self.length // 2


Done = frozenset[tuple[str, str]] | set[tuple[str, str]]


class CheckFailed(RuntimeError):
    """A group's variants do not compute the same thing: no speed is reported."""


@dataclass
class Variant:
    """One way of running a group's work, and the operations that it counts for, ``times`` over."""

    name: str
    removed: float
    run: Callable[[], object]
    operations: list[Operation]
    times: int = 1
    compiled: bool = False  # its memory can't be followed operation by operation
    calls: int = 1  # how often one ``run`` does the work: a kernel's graph holds several
    backend: str = ""  # of its attention


Groups = Iterator[tuple[str, list[Variant]]]


def config_of(shape: str) -> LLaDAConfig:
    return LLaDAConfig.from_dict({**SHAPES[shape], "max_sequence_length": 16384, "mask_token_id": 1})


def geometry_of(shape: str) -> Geometry:
    with torch.device("meta"):
        return sp.adapter_for(LLaDA(config_of(shape))).geometry()


def needed_bytes(case: Case) -> int:
    """Bytes of a case on CUDA at its largest: the dense model, beside it its fused form and one pruned one
    (two where a generation is timed) with a graph's buffers each, and the public sampler's float64
    probabilities of every position."""
    geometry = geometry_of(case.shape)
    size, rows = case.dtype.itemsize, case.batch * case.length
    blocks = size * sum(
        block_parameters(geometry, *layer_sizes(geometry, layer, None))
        for layer in range(geometry.num_layers)
    )
    needed = sp.memory(geometry, None, case.batch, case.length, case.dtype)
    once = needed.activations + needed.logits
    public = rows * geometry.vocabulary * (size + 2 * 8)
    copies = 1 + (1 + (1 - 0.38) if case.steps else 1 - REMOVED[0] / 2)
    return round(needed.weights + blocks * copies + 3 * once + max(once, public))


def random_model(shape: str, device: str, dtype: torch.dtype) -> LLaDA:
    """A LLaDA of the shape with seeded random weights."""
    with torch.device("meta"):
        model = LLaDA(config_of(shape))
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_f" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0, 0.02, generator=generator)
    return model


def pruned_models(
    model: LLaDA, targets: tuple[str, ...], shares: tuple[float, ...] = (0.0, *REMOVED)
) -> Iterator[tuple[str, float, LLaDA, sp.PrunePlan]]:
    """The fused dense model and its pruned forms; heads drawn from a seed, the same share of each layer."""
    kind = "+".join(targets)
    for removed in shares:
        unit = {"unit": "parameters", "targets": targets} if "mlp" in targets else {"unit": "heads"}
        plan = sp.plan(model, criterion="random", ratio=removed, allocation="uniform", **unit)
        compact = _share(model)
        sp.apply(compact, plan)
        yield ("dense, fused" if removed == 0 else f"{kind} -{100 * removed:g}%"), removed, compact, plan


def _share(model: LLaDA) -> LLaDA:
    """A second model object over the same tensors."""
    with torch.device("meta"):
        other = LLaDA(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def model_groups(case: Case, device: str, done: Done = frozenset()) -> Groups:
    """Layer, block, step and generation, for heads and for heads + MLP.

    On CUDA one pruned model at a time lies beside the dense and the fused one, however large the card; eager
    steps and replayed graphs are groups of their own. What is ``done``, (bench, variant), is not built again.
    """
    model = random_model(case.shape, device, case.dtype)
    cuda = device == "cuda"
    ids = torch.randint(2, model.config.vocabulary_rows, (case.batch, case.length), device=device)
    for targets in (("heads",), ("heads", "mlp")):
        kind = "+".join(targets)
        ((_, _, fused, none),) = pruned_models(model, targets, (0.0,))
        if cuda:
            for removed in REMOVED:
                benches = ("layer", "block", "step", "step, graph")[1 if "mlp" in targets else 0 :]
                if not all((f"{b} ({kind})", f"{kind} -{100 * removed:g}%") in done for b in benches):
                    ((*_, compact, plan),) = pruned_models(model, targets, (removed,))
                    pair = [(0.0, fused, none), (removed, compact, plan)]
                    del compact
                    yield from _model_variants(case, device, model, kind, pair, ids)
                    del pair
                    gc.collect()  # a model and its graphs hold each other
        else:
            every = [(removed, m, plan) for _, removed, m, plan in pruned_models(model, targets, REMOVED)]
            yield from _model_variants(case, device, model, kind, [(0.0, fused, none), *every], ids)
            del every
        if "mlp" in targets and ("step (head rows)", f"{case.length} rows") not in done:
            yield "step (head rows)", head_variants(fused, case, sp.adapter_for(model).geometry(), ids)
        del fused
        gc.collect()
    if case.steps and ("generation", "as users run it") not in done:
        yield "generation", generation_variants(model, case)


def _model_variants(
    case: Case,
    device: str,
    model: LLaDA,
    kind: str,
    pruned: list[tuple[float, LLaDA, sp.PrunePlan]],
    ids: Tensor,
) -> Groups:
    """The groups of some models, the fused dense one first."""
    batch, length = case.batch, case.length
    geometry = sp.adapter_for(model).geometry()
    mid = geometry.num_layers // 2
    hidden = torch.randn(batch, length, geometry.hidden, device=device, dtype=case.dtype)
    cos, sin = model.rotary(length, torch.device(device))
    graphs: list[Variant] = []
    groups: dict[str, list[Variant]] = {"layer": [], "block": [], "step": []}
    for removed, compact, plan in pruned:
        name = f"{kind} -{100 * removed:g}%" if removed else "dense, fused"
        check_same(compact, model, plan, ids[:1, : min(length, 64)])
        block = compact.blocks[mid]
        heads, kv_heads, channels = layer_sizes(geometry, mid, plan.layers[mid])
        layer = attention_operations(geometry, heads, kv_heads, batch, length)
        feed = mlp_operations(geometry, channels, batch, length)
        step = step_operations(geometry, plan, batch, length)
        groups["layer"].append(Variant(name, removed, _layer(block.attention, hidden, cos, sin), layer))
        groups["block"].append(Variant(name, removed, _layer(block, hidden, cos, sin), layer + feed))
        groups["step"].append(Variant(name, removed, _step(compact, ids), step))
        if device == "cuda":
            graphs.append(Variant(name, removed, _graph(compact, ids), step, compiled=True))
    if kind == "heads":
        full = step_operations(geometry, None, batch, length)
        groups["step"].append(Variant("as users run it", 0.0, _user_step(model, ids), full))
    else:
        del groups["layer"]
    for bench, variants in groups.items():
        yield f"{bench} ({kind})", variants
    if graphs:
        yield f"step, graph ({kind})", graphs


def head_variants(model: LLaDA, case: Case, geometry: Geometry, ids: Tensor) -> list[Variant]:
    """The dense step with the LM head on all rows, and on those that a sampler may still fill."""
    variants = []
    for rows in (case.length, case.length // 2, case.length // 8):
        work = step_operations(geometry, None, case.batch, case.length, rows)
        chosen = slice(case.length - rows, case.length)
        variants.append(Variant(f"{rows} rows", 0.0, lambda rows=chosen: model(ids, rows=rows), work))
    return variants


def _layer(module: nn.Module | None, hidden: Tensor, cos: Tensor, sin: Tensor) -> Callable[[], object]:
    assert module is not None
    return lambda: module(hidden, cos, sin, None)


def _step(model: LLaDA, ids: Tensor) -> Callable[[], object]:
    return lambda: model(ids).logits


def _graph(model: LLaDA, ids: Tensor) -> Callable[[], object]:
    graph = sp.StepGraph(model)
    return lambda: graph(ids)


def _user_step(model: LLaDA, ids: Tensor) -> Callable[[], object]:
    """A step of the public sampler: unfused projections, then float64 probabilities of every position."""

    def run() -> Tensor:
        logits = model(ids).logits
        return torch.softmax(logits.double(), dim=-1).gather(-1, logits.argmax(-1, keepdim=True))

    return run


def generation_variants(model: LLaDA, case: Case) -> list[Variant]:
    """End to end: a prompt of half the length, the other half filled by ``steps`` forwards."""
    batch, length, steps = case.batch, case.length, case.steps
    prompt = torch.randint(2, model.config.vocabulary_rows, (batch, length // 2), device=model.device)
    geometry = sp.adapter_for(model).geometry()
    rows = case.block_length or case.new_tokens
    options = {"steps": steps, "gen_length": case.new_tokens, "block_length": rows}

    def lean(target: LLaDA, **more: Any) -> Callable[[], object]:
        return lambda: [None for _ in sp.denoise(target, prompt, **options, **more)]

    def public() -> None:
        blocks = case.new_tokens // rows
        ids = torch.cat((prompt, prompt.new_full((batch, case.new_tokens), 1)), 1)
        for block in range(blocks):
            for count in transfer_counts(rows, steps // blocks):
                logits = model(ids).logits
                drawn = logits.argmax(-1)
                confidence = logits.double().softmax(-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
                confidence[:, prompt.shape[1] + (block + 1) * rows :] = -torch.inf
                confidence = confidence.masked_fill(ids != 1, -torch.inf)
                chosen = confidence.topk(count, -1).indices
                ids = ids.scatter(1, chosen, drawn.gather(1, chosen))

    def tracked(every: int) -> Callable[[], object]:
        def run() -> None:
            with sp.track(fused, every=every):
                for _ in sp.denoise(fused, prompt, **options):
                    pass

        return run

    def papers() -> None:
        """Probabilities of every layer as a float32 matrix, summed over queries and heads at every step."""
        adapter = sp.adapter_for(fused)
        mass: list[Tensor] = []

        def observe(layer: int, call: Any) -> None:
            key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
            scores = (call.query @ key.mT * call.query.shape[-1] ** -0.5).float()
            mass.append(scores.softmax(-1).sum(2).sum(1))

        adapter.observe(observe)
        try:
            for _ in sp.denoise(fused, prompt, **options):
                mass.clear()
        finally:
            adapter.observe(None)

    def work(plan: sp.PrunePlan | None, head_rows: int) -> list[Operation]:
        return step_operations(geometry, plan, batch, length, head_rows)

    variants = []
    fused = model
    for targets in (("heads",), ("heads", "mlp")):
        shares = (0.0, 0.38) if targets == ("heads",) else (0.38,)
        for name, removed, compact, plan in pruned_models(model, targets, shares):
            if removed == 0:
                fused = compact
            variants.append(Variant(name, removed, lean(compact), work(plan, rows), steps))
            if model.device.type == "cuda":
                replayed = lean(compact, graphs=sp.StepGraph(compact))
                variants.append(
                    Variant(f"{name}, graph", removed, replayed, work(plan, rows), steps, compiled=True)
                )
    dense = work(None, rows)
    return [
        *variants,
        Variant("as users run it", 0.0, public, work(None, length), steps),
        Variant("dense, statistics every step", 0.0, tracked(1), dense, steps),
        Variant("dense, statistics every 4th", 0.0, tracked(4), dense, steps),
        Variant("dense, the paper's statistics", 0.0, papers, dense, steps),
    ]


def kernel_groups(case: Case, device: str, done: Done = frozenset()) -> Groups:
    """Attention of the kept heads, and what the statistics add, on one layer's tensors.

    On CUDA a graph of ``REPLAYS`` calls is timed: one takes less time than Python takes to launch it. Beside
    our kernel stands what PyTorch alone can do: gather the kept heads, then its fused attention.
    """
    if ("kernel: statistics", "with exact mass") in done:
        return
    config, batch, length = SHAPES[case.shape], case.batch, case.length
    heads, kv_heads = config["n_heads"], config.get("n_kv_heads", config["n_heads"])
    dim = config["d_model"] // heads
    q = torch.randn(batch, heads, length, dim, device=device, dtype=case.dtype)
    k, v = (torch.randn(batch, kv_heads, length, dim, device=device, dtype=case.dtype) for _ in range(2))

    def core(count: int, passes: float = 1, more: int = 0) -> list[Operation]:
        flops = round(passes * 4 * batch * length**2 * dim * count)
        return [Operation("core", flops, 2 * batch * length * dim * (count + kv_heads) + more)]

    variants = []
    reference, lse = sp.ops.attention(q, k, v, backend="reference")
    for removed in (0.0, *REMOVED):
        kept = list(range(heads - round(removed * heads)))
        index = torch.tensor(kept, device=device) if removed else None
        out, _ = sp.ops.attention(q, k, v, kept_heads=index, layout="compact")
        limit = 2e-2 if case.dtype != torch.float32 else 1e-4
        if not torch.allclose(out.float(), reference[:, kept].float(), atol=limit):
            raise CheckFailed(f"attention of {len(kept)} of {heads} heads differs from the reference")
        name = "dense" if not removed else f"heads -{100 * removed:g}%"
        for backend in ("auto", "sdpa") if removed and device == "cuda" else ("auto",):
            run = _attention(q, k, v, index, backend)
            if backend == "auto":
                taken = sp.ops.attention_backend(q, irregular=bool(removed))
                variants.append(_kernel(name, removed, run, core(len(kept)), device, taken))
            else:
                apart = _kernel(f"{name}, gather + SDPA", removed, run, core(len(kept)), device, "sdpa")
                variants.append(apart)
    dense = variants[0]
    yield "kernel: attention", variants

    exact = sp.ops.column_mass(q, k, lse)
    if not torch.allclose(exact.sum(-1), torch.ones_like(exact[..., 0]), atol=1e-3):
        raise CheckFailed("column mass does not sum to 1")
    again = batch * length * dim * (heads + kv_heads)
    matrix = batch * heads * length * length
    yield (
        "kernel: statistics",
        [
            dense,
            _kernel("with exact mass", 0.0, _mass(q, k, v, None), core(heads, 1.5, again), device),
            _kernel("with 1/16 mass", 0.0, _mass(q, k, v, 16), core(heads, 1 + 1 / 32), device),
            _kernel(
                "paper's way: fp32 softmax",
                0.0,
                _materialised(q, k, v),
                core(heads, 1.5, again + matrix),
                device,
            ),
        ],
    )


REPLAYS = 20


def _kernel(
    name: str,
    removed: float,
    run: Callable[[], Any],
    operations: list[Operation],
    device: str,
    backend: str = "",
) -> Variant:
    if device != "cuda":
        return Variant(name, removed, run, operations, backend=backend)

    def several() -> Any:
        for _ in range(REPLAYS - 1):
            run()
        return run()

    replayed = cuda_capture(several)[0]
    return Variant(name, removed, replayed, operations, compiled=True, calls=REPLAYS, backend=backend)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor | None, backend: str = "auto"
) -> Callable[[], object]:
    return lambda: sp.ops.attention(q, k, v, kept_heads=index, layout="compact", backend=backend)


def _mass(q: Tensor, k: Tensor, v: Tensor, sample: int | None) -> Callable[[], object]:
    def run() -> Tensor:
        _, lse = sp.ops.attention(q, k, v)
        return sp.ops.column_mass(q, k, lse, sample=sample)

    return run


def _materialised(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """SDPA, then the probabilities again as a float32 matrix, summed over queries."""
    group = q.shape[1] // k.shape[1]

    def run() -> None:
        F.scaled_dot_product_attention(q, k, v, enable_gqa=group > 1)
        wide = k.repeat_interleave(group, 1) if group > 1 else k
        scores = (q @ wide.transpose(-1, -2) * q.shape[-1] ** -0.5).float()
        scores.softmax(-1).sum(-2)

    return run


def elementwise_groups(case: Case, device: str, done: Done = frozenset()) -> Groups:
    """What lies between the matrix products: PyTorch's operations, ``torch.compile``, and on CUDA our ops."""
    geometry = geometry_of(case.shape)
    d, channels, dim = geometry.hidden, geometry.channels[0], geometry.head_dim
    rows = case.batch * case.length
    x, y = (torch.randn(case.batch, case.length, d, device=device, dtype=case.dtype) for _ in range(2))
    both = torch.randn(case.batch, case.length, 2 * channels, device=device, dtype=case.dtype)
    turning = geometry.heads[0] + geometry.kv_heads[0]
    heads = torch.randn(case.batch, case.length, turning, dim, device=device, dtype=case.dtype).transpose(
        1, 2
    )
    q, k = heads.split((geometry.heads[0], geometry.kv_heads[0]), dim=1)
    weight = torch.ones(d, device=device, dtype=case.dtype)
    cos, sin = rotary_table(torch.arange(case.length, device=device), dim, 1e4)

    def add_norm(backend: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_rms_norm(x, y, weight, 1e-5, backend=backend)

    def rotary(backend: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rope_qk(q, k, cos, sin, backend=backend)

    def swiglu(backend: str, both: Tensor) -> Tensor:
        return ops.swiglu(*both.chunk(2, dim=-1), backend=backend)

    works: list[tuple[str, Callable[..., Any], tuple[Tensor, ...], int]] = [
        ("residual + RMSNorm", add_norm, (x, y), 4 * rows * d),
        ("RoPE", rotary, (q, k), 2 * rows * turning * dim),
        ("SwiGLU", swiglu, (both,), 3 * rows * channels),
    ]
    for name, function, arguments, elements in works:
        if (f"elementwise: {name}", "eager") in done:
            continue
        eager = partial(function, "reference")
        forms = {"torch.compile": torch.compile(eager)} | (
            {"ops": partial(function, "auto")} if device == "cuda" else {}
        )
        for form, run in forms.items():
            results = (eager(*arguments), run(*arguments))
            for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
                if not torch.allclose(a.float(), b.float(), atol=2e-2, rtol=2e-2):
                    raise CheckFailed(f"{name} by {form} differs from eager")
        moved = [Operation(name, 0, elements)]
        yield (
            f"elementwise: {name}",
            [
                Variant("eager", 0.0, partial(eager, *arguments), moved),
                *(
                    Variant(form, 0.0, partial(run, *arguments), moved, compiled=form == "torch.compile")
                    for form, run in forms.items()
                ),
            ],
        )


def check_same(compact: LLaDA, dense: LLaDA, plan: sp.PrunePlan, ids: Tensor) -> None:
    """Raise ``CheckFailed`` unless the compact model computes what the masked dense one does."""
    sp.apply(dense, plan, mode="mask")
    try:
        expected, got = dense(ids).logits.float(), compact(ids).logits.float()
    finally:
        sp.restore(dense)
    limit = 1e-4 if ids.device.type == "cpu" else 5e-2
    if (worst := (expected - got).abs().max().item()) > limit * expected.abs().max().item():
        raise CheckFailed(f"compact and masked logits differ by {worst:.2e} (plan {plan.ratio})")
