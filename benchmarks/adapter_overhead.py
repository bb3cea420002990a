"""What our adapter costs a transformers model when nothing is pruned, forward against forward.

    python benchmarks/adapter_overhead.py [--rounds 40] [--batch 1] [--length 128] [--threads 1] [--json FILE]

Per family, turn by turn in one process on the CPU: the plain model, a copy of it (the control: what two
equal models differ by on this machine), one after ``apply`` of a plan that keeps everything (mask and compact
form), one whose attention goes through our function although it has nothing to do ("registered"), one with
an observer that does nothing ("observed": our attention, which also returns the log-sum-exp). Printed are
medians over rounds of a variant's time over the plain model's, taken within a round; the budget is 1.03.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import sinkprune as sp
from sinkprune.planning.timing import interleaved
from sinkprune.plans import LayerPlan, PrunePlan

SIZES = dict(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
    max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "Llama, bidirectional": ("LlamaForCausalLM", {"num_key_value_heads": 8, "is_causal": False}),
    "Qwen3, causal": ("Qwen3ForCausalLM", {"num_key_value_heads": 4, "head_dim": 32}),
    "BERT": ("BertForMaskedLM", {}),
    "ModernBERT": ("ModernBertForMaskedLM", {"cls_token_id": 1, "sep_token_id": 2}),
}


def build(name: str) -> nn.Module:
    kind, changes = FAMILIES[name]
    config_name = kind.removesuffix("ForCausalLM").removesuffix("ForMaskedLM") + "Config"
    config = getattr(transformers, config_name)(**(SIZES | changes))
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind)(config).eval()
    return model


def keep_everything(model: nn.Module) -> PrunePlan:
    geometry = sp.adapter_for(model).geometry()
    return PrunePlan(geometry, "", [LayerPlan(list(range(heads))) for heads in geometry.heads])


def variants(plain: nn.Module) -> dict[str, nn.Module]:
    found = {name: copy.deepcopy(plain) for name in ("control", "mask", "compact", "registered", "observed")}
    plan = keep_everything(plain)
    sp.apply(found["mask"], plan, mode="mask")
    sp.apply(found["compact"], plan)
    sp.adapter_for(found["observed"]).observe(lambda layer, call: None)  # which also registers our attention
    found["registered"].set_attn_implementation("sinkprune")
    return {"plain": plain, **found}


@torch.no_grad()
def measure(name: str, ids: Tensor, rounds: int) -> dict[str, float]:
    models = variants(build(name))
    mask = torch.ones_like(ids)
    expected = models["plain"](ids, attention_mask=mask).logits
    for variant, model in models.items():
        torch.testing.assert_close(
            model(ids, attention_mask=mask).logits,
            expected,
            atol=1e-4,
            rtol=0,
            msg=f"{name}: {variant} is wrong",
        )
    calls = {key: (lambda model=model: model(ids, attention_mask=mask)) for key, model in models.items()}
    timings, ratios = interleaved(calls, repeats=rounds)
    print(f"{name:22} {timings['plain'].median:7.1f} ms", end="")
    result = {key: 1 / ratio for key, ratio in ratios.items() if key != "plain"}
    print("".join(f"   {key} {value:.3f}" for key, value in result.items()), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the ratios here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, SIZES["vocab_size"], (arguments.batch, arguments.length), generator=generator)
    results = {name: measure(name, ids, arguments.rounds) for name in FAMILIES}
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({"settings": vars(arguments) | {"json": None}, **results}, indent=1)
        )


if __name__ == "__main__":
    main()
