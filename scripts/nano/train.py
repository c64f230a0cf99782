"""Train the nano pair: a target of 1.6 M and a proxy of 0.4 M parameters, Llama architecture.

Both learn from the same batches what the project asks of a model: to predict text, to repeat its
context (what KVzip has a target do) and to answer questions about facts hidden in a context (what a
pruned cache must still support). The output is two folders in the transformers format.

    python3 scripts/nano/train.py tokens --documents docs.txt --tokenizer recipes/nano-llama/target --out tokens
    python3 scripts/nano/train.py train --tokens tokens --tokenizer recipes/nano-llama/target --out models

`docs.txt` is UTF-8 text, a NUL between two documents. The published pair saw 668 M tokens drawn from
documentation and dictionaries in 2,550 steps, on one H200 in 18 minutes beside a third model.

Needs torch 2.6 or newer, numpy, tokenizers, safetensors. Dimension key: B rows, T positions, H heads,
D width of a head, C width of the model.
"""

import argparse
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer

# hidden, layers, query heads, KV heads, head_dim, intermediate
SIZES = {
    "target": dict(hidden=128, layers=6, heads=4, kv_heads=2, head_dim=32, intermediate=352),
    "proxy": dict(hidden=64, layers=3, heads=2, kv_heads=1, head_dim=32, intermediate=176),
}
ROPE_THETA = 500_000.0
NORM_EPS = 1e-6
MAX_POSITIONS = 4096

# ---------------------------------------------------------------------------------------------------
# Text

# The chat template of the tokenizer, cut where text goes: before the user's, before the answer, between
# an answer and the next question.
BEGIN = "<|begin_of_text|>"
PREFIX = BEGIN + (
    "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n"
)
SWITCH = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
NEXT = "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
END = "<|eot_id|>"
REPEAT_ALL = "\n\nRepeat the previous context exactly."
REPEAT_PART = "\n\nRepeat the part of the previous context exactly, starting with"

# Fact, question, kind of value; the word lists are those of the crate `data`.
WORDS = Path(__file__).resolve().parents[2] / "crates/data/src/facts/words.json"
FACTS = [
    ("The access code for the {a} {n} is {v}.", "What is the access code for the {a} {n}?", "number"),
    (
        "One of the special magic numbers for {a}-{n} is: {v}.",
        "What is the special magic number for {a}-{n} mentioned in the provided text?",
        "number",
    ),
    ("The {a} {n} was built in the city of {v}.", "In which city was the {a} {n} built?", "city"),
    ("The owner of the {a} {n} is {v}.", "Who is the owner of the {a} {n}?", "name"),
    ("Remember that the {a} {n} opens at {v}.", "When does the {a} {n} open?", "time"),
    ("The secret word of the {a} {n} is {v}.", "What is the secret word of the {a} {n}?", "word"),
]

# What a token of a row is there for, and how much its loss counts.
TEXT, CONTEXT, REPEAT, ANSWER = range(4)


def write_tokens(documents, tokenizer, out):
    """`out.npy`: all documents' tokens, each with an end of text; `out.starts.npy`: after which a sentence begins."""
    tokenizer = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    end_of_text = tokenizer.token_to_id("<|end_of_text|>")
    texts = Path(documents).read_text(encoding="utf-8").split("\0")
    parts = []
    for i in range(0, len(texts), 2000):
        for encoding in tokenizer.encode_batch(texts[i : i + 2000], add_special_tokens=False):
            parts.append(np.array(encoding.ids + [end_of_text], np.uint16))
    tokens = np.concatenate(parts)
    # "\u010a" is a line end in the alphabet of byte-level BPE.
    ends = np.zeros(tokenizer.get_vocab_size(), bool)
    for text, index in tokenizer.get_vocab().items():
        ends[index] = text.endswith((".", "!", "?", ":", "\u010a"))
    np.save(f"{out}.npy", tokens)
    np.save(f"{out}.starts.npy", np.nonzero(ends[tokens])[0][:-1].astype(np.int64) + 1)
    print(f"{len(texts)} documents, {len(tokens)} tokens")


class Rows:
    """Endless rows of `length` + 1 tokens with a loss weight and a purpose per token.

    A row is filled with samples: 30% plain text, 30% contexts to be repeated whole or from some place
    on, 40% contexts with facts and two to eight questions.
    """

    def __init__(self, tokens, tokenizer, length, seed):
        self.tokens = np.load(f"{tokens}.npy", mmap_mode="r")
        self.starts = np.load(f"{tokens}.starts.npy")
        self.tokenizer = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
        self.words = json.loads(WORDS.read_text())
        self.length = length
        self.random = random.Random(seed)
        self.begin, self.prefix, self.switch, self.next, self.end = map(self.encode, (BEGIN, PREFIX, SWITCH, NEXT, END))
        self.repeat_all, self.repeat_part = self.encode(REPEAT_ALL), self.encode(REPEAT_PART)
        self.empty_line = self.encode("\n\n")

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def text(self, length):
        """`length` tokens from the beginning of a random sentence."""
        start = int(self.random.choice(self.starts))
        start = max(0, min(start, len(self.tokens) - length - 1))
        return self.tokens[start : start + length].tolist()

    def value(self, kind):
        r, words = self.random, self.words
        if kind == "number":
            return "".join(str(r.randint(0, 9)) for _ in range(r.randint(4, 7)))
        if kind == "city":
            return r.choice(words["city"])
        if kind == "name":
            return r.choice(words["name"]) + " " + r.choice(words["adj"]).title()
        if kind == "time":
            return f"{r.randint(1, 12)}:{r.randint(0, 59):02d}"
        return r.choice(words["noun"]) + r.choice(words["adj"])

    def context(self, length, n_facts):
        """Text of about `length` tokens with facts at random places -> (tokens, [(fact, question, answer)])."""
        facts = []
        for _ in range(n_facts):
            fact, question, kind = self.random.choice(FACTS)
            fill = dict(a=self.random.choice(self.words["adj"]), n=self.random.choice(self.words["noun"]))
            fill["v"] = self.value(kind)
            facts.append(tuple(map(self.encode, (" " + fact.format(**fill), "\n\n" + question.format(**fill), fill["v"]))))
        body = self.text(max(length - sum(len(f[0]) for f in facts), 16))
        cuts = sorted(self.random.randrange(len(body)) for _ in facts)
        order = self.random.sample(range(n_facts), n_facts)
        out, at = [], 0
        for cut, i in zip(cuts, order):
            out += body[at:cut] + facts[i][0]
            at = cut
        return out + body[at:], facts

    def sample(self, budget):
        """One sample of at most `budget` tokens, as a list of (tokens, weight, purpose)."""
        r = self.random
        kind = r.random()
        if kind < 0.3 or budget < 160:
            length = min(budget, r.choice([256, 512, 1024, 2048]))
            return [(self.begin + self.text(max(length - 1, 1)), 1.0, TEXT)]
        if kind < 0.6:
            # Lengths are log-uniform, so that short contexts, which are learnt first, are not rare.
            length = max(24, int(min((budget - 80) // 2, math.exp(r.uniform(math.log(24), math.log(1900))))))
            context, _ = self.context(length, r.randint(0, 1 + length // 200))
            if r.random() < 0.5 or len(context) < 64:
                request, wanted = self.repeat_all, context
            else:
                cut = r.randrange(8, len(context) - 16)
                request, wanted = self.repeat_part + context[cut - 8 : cut], context[cut:]
            return [
                (self.prefix + context, 0.5, CONTEXT),
                (request + self.switch, 0.1, CONTEXT),
                (wanted + self.end, 1.0, REPEAT),
            ]
        questions = r.randint(2, 8)
        length = int(min(budget - 60 * questions, math.exp(r.uniform(math.log(64), math.log(3600)))))
        length = max(length, 48)
        context, facts = self.context(length, max(1, min(r.randint(1, 12), length // 24)))
        out = [(self.prefix + context, 0.3, CONTEXT)]
        for i in range(questions):
            _, question, answer = r.choice(facts)
            # The first question follows the context, later ones are turns of their own.
            ask = question if i == 0 else self.next + question[len(self.empty_line) :]
            out += [(ask + self.switch, 0.1, CONTEXT), (answer + self.end[:1], 3.0, ANSWER)]
        return out

    def row(self):
        tokens, weights, purposes = [], [], []
        while len(tokens) <= self.length:
            budget = self.length + 1 - len(tokens)
            for part, weight, purpose in self.sample(budget):
                tokens += part
                weights += [weight] * len(part)
                purposes += [purpose] * len(part)
        keep = slice(0, self.length + 1)
        return np.array(tokens[keep], np.int64), np.array(weights[keep], np.float32), np.array(purposes[keep], np.int8)


class Batches(torch.utils.data.IterableDataset):
    """Batches of rows; every worker draws its own."""

    def __init__(self, tokens, tokenizer, length, rows, seed):
        self.arguments = (tokens, tokenizer, length)
        self.rows, self.seed = rows, seed

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        source = Rows(*self.arguments, seed=1000 * self.seed + (worker.id if worker else 0))
        while True:
            rows = [source.row() for _ in range(self.rows)]
            yield tuple(torch.from_numpy(np.stack(column)) for column in zip(*rows))


# ---------------------------------------------------------------------------------------------------
# Model. Names of parameters are those of the transformers format.


class RmsNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), NORM_EPS)


def rotate(x_bhtd, cos_td, sin_td):
    half = x_bhtd.size(-1) // 2
    turned = torch.cat((-x_bhtd[..., half:], x_bhtd[..., :half]), -1)
    return x_bhtd * cos_td + turned * sin_td


class Attention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = size["heads"], size["kv_heads"], size["head_dim"]
        self.q_proj = nn.Linear(size["hidden"], self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(size["hidden"], self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size["hidden"], self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, size["hidden"], bias=False)

    def forward(self, x_btc, cos_td, sin_td):
        def split(y, heads):
            return y.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

        q = rotate(split(self.q_proj(x_btc), self.heads), cos_td, sin_td)
        k = rotate(split(self.k_proj(x_btc), self.kv_heads), cos_td, sin_td)
        v = split(self.v_proj(x_btc), self.kv_heads)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.gate_proj = nn.Linear(size["hidden"], size["intermediate"], bias=False)
        self.up_proj = nn.Linear(size["hidden"], size["intermediate"], bias=False)
        self.down_proj = nn.Linear(size["intermediate"], size["hidden"], bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(size["hidden"]), RmsNorm(size["hidden"])
        self.self_attn, self.mlp = Attention(size), FeedForward(size)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """A Llama whose output matrix is its embedding."""

    def __init__(self, size, vocab):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, size["hidden"])
        self.layers = nn.ModuleList(Layer(size) for _ in range(size["layers"]))
        self.norm = RmsNorm(size["hidden"])
        inverse = ROPE_THETA ** (-torch.arange(0, size["head_dim"], 2).float() / size["head_dim"])
        self.register_buffer("inverse", inverse, persistent=False)
        for name, p in self.named_parameters():
            if "embed" in name:
                nn.init.normal_(p, std=0.02)
            elif p.dim() == 2:
                # What writes to the residual stream starts small.
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=(0.3 if writes else 1.0) / math.sqrt(p.size(1)))

    def forward(self, tokens_bt, targets_bt, weights_bt):
        """-> weighted mean loss, loss per token, whether the likeliest token was right; flat over rows."""
        angles = torch.outer(torch.arange(tokens_bt.size(1), device=tokens_bt.device).float(), self.inverse)
        angles = torch.cat((angles, angles), -1)
        x = self.embed_tokens(tokens_bt).to(torch.bfloat16)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        x, targets, weights = self.norm(x).flatten(0, 1), targets_bt.flatten(), weights_bt.flatten()
        losses, right = [], []
        # In pieces: all logits of a batch at once would be gigabytes.
        for x_piece, target in zip(x.split(32_768), targets.split(32_768)):
            logits = (x_piece @ self.embed_tokens.weight.to(x.dtype).t()).float()
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            right.append(logits.argmax(-1) == target)
        losses = torch.cat(losses)
        return (losses * weights).sum() / weights.sum(), losses.detach(), torch.cat(right)


# ---------------------------------------------------------------------------------------------------
# Training


def orthogonalized(gradients):
    """Matrices with about the same directions and all singular values near 1: five Newton-Schulz steps."""
    x = gradients.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon:
    """Muon on the layers' matrices (https://kellerjordan.github.io/posts/muon), AdamW on everything else.

    Matrices of one shape are updated together.
    """

    def __init__(self, model, lr, adam_lr=3e-3, momentum=0.95, weight_decay=0.05):
        matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
        rest = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
        self.lr, self.adam_lr, self.momentum, self.weight_decay = lr, adam_lr, momentum, weight_decay
        self.groups = {}
        for p in matrices:
            self.groups.setdefault(p.shape, []).append(p)
        self.averages = {s: torch.zeros(len(ps), *s, device=ps[0].device) for s, ps in self.groups.items()}
        self.adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def step(self, scale):
        for shape, parameters in self.groups.items():
            gradients = torch.stack([p.grad for p in parameters])
            average = self.averages[shape].lerp_(gradients, 1 - self.momentum)
            updates = orthogonalized(gradients.lerp(average, self.momentum)).float()
            lr = self.lr * scale * max(1, shape[0] / shape[1]) ** 0.5
            for p, update in zip(parameters, updates):
                p.mul_(1 - lr * self.weight_decay).add_(update, alpha=-lr)
                p.grad = None
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def learning_rate(step, steps):
    """Warm-up over 40 steps, then full until 40% of the run, then linear to 2%."""
    done = step / steps
    return min(1.0, (step + 1) / 40) * (1.0 if done < 0.4 else max(0.02, 1 - (done - 0.4) / 0.6))


def save(model, size, tokenizer_folder, out):
    """A model folder in the transformers format, bf16."""
    folder, out = Path(tokenizer_folder), Path(out)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = json.loads((folder / "tokenizer_config.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{n}": p.to(torch.bfloat16).contiguous().cpu() for n, p in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=size["hidden"],
        intermediate_size=size["intermediate"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        head_dim=size["head_dim"],
        hidden_act="silu",
        rms_norm_eps=NORM_EPS,
        rope_theta=ROPE_THETA,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        attention_bias=False,
        torch_dtype="bfloat16",
        use_cache=True,
        initializer_range=0.02,
        eos_token_id=tokenizer.token_to_id(special["eos_token"]),
        bos_token_id=tokenizer.token_to_id(special["bos_token"]),
    )
    (out / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_text((folder / name).read_text())


def train(options):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(options.seed)
    vocab = Tokenizer.from_file(str(Path(options.tokenizer) / "tokenizer.json")).get_vocab_size()
    models = {name: LanguageModel(size, vocab).to(device) for name, size in SIZES.items()}
    optimizers = {name: Muon(model, options.lr) for name, model in models.items()}
    run = {name: torch.compile(m, dynamic=False) if device == "cuda" else m for name, m in models.items()}
    batches = torch.utils.data.DataLoader(
        Batches(options.tokens, options.tokenizer, options.length, options.batch, options.seed),
        batch_size=None,
        num_workers=options.workers,
        pin_memory=device == "cuda",
    )
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.jsonl", "w") as log:
        for step, batch in zip(range(options.steps), batches):
            tokens, weights, purposes = (t.to(device, non_blocking=True) for t in batch)
            purposes = purposes[:, 1:].flatten()
            for name, model in models.items():
                with torch.autocast(device, dtype=torch.bfloat16):
                    loss, losses, right = run[name](
                        tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights[:, 1:].contiguous()
                    )
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizers[name].step(learning_rate(step, options.steps))
                if step % options.log_every == 0 or step == options.steps - 1:
                    def mean(values, purpose):
                        """Over the tokens of one purpose; None if the batch has none."""
                        values = values[purposes == purpose].float()
                        return round(values.mean().item(), 4) if len(values) else None

                    record = dict(
                        step=step + 1,
                        model=name,
                        tokens=(step + 1) * options.batch * options.length,
                        loss=round(loss.item(), 4),
                        text_loss=mean(losses, TEXT),
                        repeat_accuracy=mean(right, REPEAT),
                        answer_accuracy=mean(right, ANSWER),
                    )
                    print(json.dumps(record), flush=True)
                    log.write(json.dumps(record) + "\n")
    for name, model in models.items():
        save(model, SIZES[name], options.tokenizer, out / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tokens = commands.add_parser("tokens", help="text to token ids")
    tokens.add_argument("--documents", required=True, help="UTF-8 text, a NUL between documents")
    tokens.add_argument("--tokenizer", required=True, help="folder with tokenizer.json and tokenizer_config.json")
    tokens.add_argument("--out", required=True, help="beginning of the files' names")
    training = commands.add_parser("train", help="token ids to two model folders")
    training.add_argument("--tokens", required=True, help="what `tokens --out` named")
    training.add_argument("--tokenizer", required=True)
    training.add_argument("--out", required=True)
    training.add_argument("--steps", type=int, default=2550)
    training.add_argument("--batch", type=int, default=64, help="rows per step")
    training.add_argument("--length", type=int, default=MAX_POSITIONS, help="tokens per row")
    training.add_argument("--lr", type=float, default=0.02, help="of Muon")
    training.add_argument("--workers", type=int, default=5, help="processes that make batches")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--log-every", type=int, default=50)
    options = parser.parse_args()
    if options.command == "tokens":
        write_tokens(options.documents, options.tokenizer, options.out)
    else:
        train(options)


if __name__ == "__main__":
    main()
