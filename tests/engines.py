"""Exports in vLLM, in an environment of its own: ``make engines`` (minutes; not a part of ``make test``).

    python tests/engines.py PYTHON_WITH_VLLM

A causal decoder, its layers alike and not, gives its log-probabilities of a prompt; a pruned and repaired
LLaDA, which vLLM runs as an encoder only, gives its hidden states, and those times the head its logits. Every
one is compared with what the model gives here.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))

import torch
import transformers
from exports import EQUAL, NARROW, RAGGED, SOME, raw_logits
from toys import MASK, manual_plan, tokens, toy

import sinkprune as sp
from sinkprune.evidence.calibration import Calibration

CASES = {"alike": (EQUAL, NARROW), "channels differ": (EQUAL, SOME), "heads differ": (RAGGED, SOME)}
PEER = """
import sys, pathlib, torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams

def run(folder):
    ids = torch.load(folder.parent / "ids.pt")[0].tolist()
    encoder = folder.name == "llada"
    settings = dict(runner="pooling", convert="embed",
                    pooler_config={"task": "token_embed", "use_activation": False}) if encoder else dict(
                    skip_tokenizer_init=True, max_logprobs=61)
    llm = LLM(model=str(folder), trust_remote_code=True, enforce_eager=True, dtype="float32",
              model_impl="transformers", max_model_len=64, max_num_batched_tokens=64, max_num_seqs=1,
              **settings)
    if encoder:
        hidden = llm.encode([{"prompt_token_ids": ids}], pooling_task="token_embed")[0].outputs.data.float()
        return hidden @ load_file(folder / "model.safetensors")["lm_head.weight"].T
    asked = SamplingParams(max_tokens=1, prompt_logprobs=61, detokenize=False, temperature=0)
    rows = llm.generate({"prompt_token_ids": ids}, asked)[0].prompt_logprobs[1:]
    return torch.tensor([[row[i].logprob for i in range(61)] for row in rows])

if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    torch.save(run(folder), str(folder) + ".pt")
    assert "sinkprune" not in sys.modules
"""


def decoder():
    """A Llama whose heads are as wide as vLLM's CPU attention takes them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() > 1:
                tensor.normal_(std=tensor.shape[-1] ** -0.5)
    return model


def main(python: str) -> int:
    torch.set_num_threads(1)
    ids = tokens(1, 12)
    rows = tokens(24, 12, seed=3)
    calibration = Calibration(rows, rows, rows == MASK, None)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        root, expected = Path(name), {}
        for case, (heads, channels) in CASES.items():
            model = decoder()
            sp.apply(model, manual_plan(model, heads, channels), calibration=calibration)
            sp.export(model, root / case, to="vllm")
            with torch.no_grad():
                expected[case] = model(ids).logits[0, :-1].log_softmax(-1)
        model = toy(d_model=128)
        sp.apply(model, manual_plan(model, EQUAL, NARROW), calibration=calibration)
        sp.export(model, root / "llada", to="vllm", tokenizer=words())
        expected["llada"] = raw_logits(model, ids)[0]
        torch.save(ids, root / "ids.pt")
        (root / "peer.py").write_text(PEER)
        for case, values in expected.items():
            environment = os.environ | {
                "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HOME": name, "PYTHONPATH": "",
            }  # fmt: skip
            ran = subprocess.run(
                [python, "peer.py", str(root / case)],
                cwd=root,
                env=environment,
                capture_output=True,
                text=True,
            )
            if ran.returncode:
                print(f"{case}: failed\n{ran.stderr[-2000:]}")
                failed += 1
                continue
            error = ((torch.load(f"{root / case}.pt") - values).abs().max() / values.abs().max()).item()
            print(f"{case}: {error:.1e} of the scale", flush=True)
            failed += error > 1e-5
    return 1 if failed else 0


def words():
    """A tokenizer, which vLLM wants of an encoder."""
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{i}": i for i in range(61)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "t0")), eos_token="t0"
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
