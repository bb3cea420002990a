"""Fast-dLLM's prefix and dual cache, plainly: one sequence, float64, every stale key and value kept in sight.

Written from the papers' and upstream code's description, without windows, cache classes or fused layers:
``K[layer]`` and ``V[layer]`` hold a row per token of the whole sequence, and a step says which rows it runs.
"""

import math

import torch

LLADA = {
    "layer": "model.transformer.blocks.{}.", "embed": "model.transformer.wte",
    "norm": "model.transformer.ln_f", "head": "model.transformer.ff_out",
    "before": "attn_norm", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out",
    "between": "ff_norm", "gate": "ff_proj", "up": "up_proj", "down": "ff_out",
}  # fmt: skip
DREAM = {
    "layer": "model.layers.{}.", "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "before": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "between": "post_attention_layernorm", "gate": "mlp.gate_proj",
    "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


class Stale:
    """A dense toy model of either family, whose heads outside ``kept`` (one list a layer) give zeros."""

    def __init__(self, model, kept=None):
        config = model.config.to_dict()
        self.shift = int(config["model_type"] == "Dream")
        self.names = DREAM if self.shift else LLADA
        self.w = {name: tensor.double() for name, tensor in model.state_dict().items()}
        keys = ("num_attention_heads", "num_key_value_heads") if self.shift else ("n_heads", "n_kv_heads")
        self.heads, self.kv_heads = (config[key] for key in keys)
        self.layers = config["num_hidden_layers" if self.shift else "n_layers"]
        self.eps, self.theta = config["rms_norm_eps"], config["rope_theta"]
        self.mask_id = config["mask_token_id"]
        self.kept = kept or [range(self.heads)] * self.layers
        self.K, self.V = [None] * self.layers, [None] * self.layers

    def linear(self, x, name):
        y = x @ self.w[name + ".weight"].T
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def norm(self, x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.w[name + ".weight"]

    def rope(self, x, positions):
        half = x.shape[1] // 2
        rate = self.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones(len(x), half, dtype=torch.float64), positions.double()[:, None] * rate)
        y = torch.complex(x[:, :half], x[:, half:]) * turn
        return torch.cat((y.real, y.imag), 1)

    def run(self, ids, rows):
        """Logits of the tokens ``rows`` of the sequence ``ids``; what is held of them is replaced."""
        rows = torch.tensor(rows)
        x = self.w[self.names["embed"] + ".weight"][torch.tensor(ids)[rows]]
        for i in range(self.layers):
            name = {role: self.names["layer"].format(i) + part for role, part in self.names.items()}
            y = self.norm(x, name["before"])
            q, k, v = (self.linear(y, name[part]) for part in "qkv")
            if self.K[i] is None:
                self.K[i], self.V[i] = k, v
            else:
                self.K[i][rows], self.V[i][rows] = k, v
            x = x + self.linear(self.attend(i, q, rows), name["o"])
            y = self.norm(x, name["between"])
            gate = self.linear(y, name["gate"])
            x = x + self.linear(gate * gate.sigmoid() * self.linear(y, name["up"]), name["down"])
        return self.linear(self.norm(x, self.names["norm"]), self.names["head"])

    def attend(self, layer, q, rows):
        width = q.shape[1] // self.heads
        out = torch.zeros_like(q)
        everywhere = torch.arange(len(self.K[layer]))
        for head in self.kept[layer]:
            mine = slice(head * width, (head + 1) * width)
            shared = head // (self.heads // self.kv_heads)
            theirs = slice(shared * width, (shared + 1) * width)
            score = self.rope(q[:, mine], rows) @ self.rope(self.K[layer][:, theirs], everywhere).T
            out[:, mine] = (score / math.sqrt(width)).softmax(-1) @ self.V[layer][:, theirs]
        return out


def stale_generate(model, prompt, *, steps, gen_length, block_length, cache, threshold=None, kept=None):
    """Temperature 0, low confidence; returns the ids after every forward, token by token as lists.

    A block's first forward runs everything and refreshes all keys and values. The later ones run the block
    (``"dual"``), or the block and all after it (``"prefix"``). Row i of a shifted model is about token i + 1,
    so its first forward commits the block's first token, and nothing else.
    """
    toy = Stale(model, kept)
    x, history = prompt + [toy.mask_id] * gen_length, []
    per_block = steps // (gen_length // block_length)
    for start in range(len(prompt), len(x), block_length):
        end, step = start + block_length, 0
        while toy.mask_id in x[start:end] and step < (block_length if threshold else per_block):
            first, last = 0, len(x)
            if step == 0 or cache is None:
                toy.K, toy.V = [None] * toy.layers, [None] * toy.layers
            else:
                first, last = start, end if cache == "dual" else len(x)
            logits = toy.run(x, list(range(first, last)))
            logits[:, toy.mask_id] = -math.inf
            sure = []
            for position in range(start, end):
                row = position - first - toy.shift
                if x[position] == toy.mask_id and row >= 0:
                    probability, token = logits[row].softmax(0).max(0)
                    sure.append((-probability.item(), position, token.item()))
            left = x[start:end].count(toy.mask_id)
            sure.sort()
            if toy.shift and cache and step == 0:
                chosen = [one for one in sure if one[1] == start]
            elif threshold:
                chosen = sure[:1] + [one for one in sure[1:] if -one[0] >= threshold]
            else:
                chosen = sure[: math.ceil(left / (per_block - step))]
            for _, position, token in chosen:
                x[position] = token
            history.append(list(x))
            step += 1
    return history


def lazy_generate(
    model, prompt, *, steps, gen_length, block_length, intervals, ratio, kept=None, compared=None
):
    """dLLM-Cache, token by token: temperature 0, low confidence; the ids after every forward.

    ``intervals``: of the prompt and of the response. ``compared``: for each layer the value heads whose
    turning decides which tokens run (default: all).
    """
    toy = Stale(model, kept)
    x, history, step, size = prompt + [toy.mask_id] * gen_length, [], 0, len(prompt)
    everything, response = list(range(len(x))), list(range(size, len(x)))
    per_block = steps // (gen_length // block_length)
    attended, fed = [None] * toy.layers, [None] * toy.layers

    def forward():
        h = toy.w[toy.names["embed"] + ".weight"][torch.tensor(x)]
        for i in range(toy.layers):
            name = {role: toy.names["layer"].format(i) + part for role, part in toy.names.items()}
            y = toy.norm(h, name["before"])
            new_v = toy.linear(y, name["v"])
            rows = everything[:size] if i == 0 or step % intervals[0] == 0 else []
            if i == 0 or step % intervals[1] == 0:
                rows = rows + response
            elif int(ratio * gen_length):
                width = new_v.shape[1] // toy.kv_heads
                heads = range(toy.kv_heads) if compared is None else compared[i]
                columns = [c for head in heads for c in range(head * width, (head + 1) * width)]
                turned = []
                for row in response:
                    a, b = new_v[row][columns], toy.V[i][row][columns]
                    turned.append(((a @ b / (a.norm() * b.norm())).item(), row))
                    toy.V[i][row] = new_v[row]
                rows = rows + [row for _, row in sorted(turned)[: int(ratio * gen_length)]]
            if step == 0:
                toy.K[i], toy.V[i] = torch.zeros_like(new_v), torch.zeros_like(new_v)
                attended[i], fed[i] = torch.zeros_like(h), torch.zeros_like(h)
            if rows:
                at = torch.tensor(rows)
                toy.K[i][at], toy.V[i][at] = toy.linear(y[at], name["k"]), new_v[at]
                out = toy.attend(i, toy.linear(y[at], name["q"]), at)
                attended[i][at] = toy.linear(out, name["o"])
            h = h + attended[i]
            if rows:
                z = toy.norm(h[at], name["between"])
                gate = toy.linear(z, name["gate"])
                fed[i][at] = toy.linear(gate * gate.sigmoid() * toy.linear(z, name["up"]), name["down"])
            h = h + fed[i]
        return toy.linear(toy.norm(h, toy.names["norm"]), toy.names["head"])

    for start in range(size, len(x), block_length):
        for turn in range(per_block):
            logits = forward()
            logits[:, toy.mask_id] = -math.inf
            sure = []
            for position in range(start, start + block_length):
                if x[position] == toy.mask_id:
                    probability, token = logits[position - toy.shift].softmax(0).max(0)
                    sure.append((-probability.item(), position, token.item()))
            for _, position, token in sorted(sure)[: math.ceil(len(sure) / (per_block - turn))]:
                x[position] = token
            history.append(list(x))
            step += 1
    return history
