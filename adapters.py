"""Prompts and Connectors: what is trained around a frozen LM, its initial values, its files.

    SoftPrompt       P trained vectors in front of the text (Lester et al. 2021, "The Power of Scale
                     for Parameter-Efficient Prompt Tuning"):
                     lm(lm.embed(ids), prefix=lm.read(prompt()))
    DeepPrompt       P trained positions of the KV cache (Li & Liang 2021, "Prefix-Tuning"):
                     lm(lm.embed(ids), prefix=deep())
    PromptGenerator  computes a soft prompt from the text itself, "input-dependent prompt tuning",
                     ID-PT (Levine et al. 2022, "Standing on the Shoulders of Giant Frozen Language
                     Models", section 2):  lm(lm.embed(ids), prefix=lm.read(generator.prompts(ids)))
    Connector        a few causal layers before, after or between passes through the LM (section 4.2
                     there):  lm(connector(lm(lm.embed(ids)))) is one composition of recurse.py
    Connectors       those between more than two passes: one for all gaps, or one for each

An adapter is stored as a folder of two files, adapter_config.json and adapter_model.safetensors;
soft and deep prompts in PEFT's format. The config holds the fingerprint of the LM that the adapter
was trained on, which is checked when it is loaded.

Needs torch and tokenizers. The caller passes the LM and its layers. Saving and loading need
checkpoints.py and families.py beside this file. Dimensions as in model.py.

    python adapters.py runs/prompt_tuning      prints what an adapter folder holds
"""

if __name__ == "__main__":
    import show  # before torch: it sets how threads wait

import warnings
from pathlib import Path

import torch
import torch.nn as nn
from tokenizers import Tokenizer
from torch import Tensor


class SoftPrompt(nn.Module):
    """P trained vectors that the LM reads before the text, like token embeddings: (P, C).

    With `bos` (C,), the embedding of BOS, the prompt stands between BOS and the text: it returns
    (P + 1, C), and the text comes without a BOS. Without `bos` it stands before the text's BOS.
    """

    def __init__(self, vectors: Tensor, bos: Tensor | None = None):
        super().__init__()
        if vectors.dim() != 2:
            raise ValueError(f"prompt vectors have shape {tuple(vectors.shape)}, expected (P, C)")
        self.vectors = nn.Parameter(vectors.detach().clone().float())
        self.register_buffer("bos", None if bos is None else bos.float(), persistent=False)

    def forward(self) -> Tensor:
        if self.bos is None:
            return self.vectors
        return torch.cat([self.bos[None], self.vectors])


class DeepPrompt(nn.Module):
    """Trained keys and values of P positions, for every layer (Li & Liang 2021).

    deep() is a Prefix. At first it equals `start`, a shared prefix: lm.read(vectors) of a text, a
    soft prompt or sampled vocabulary, or noise (`random_like`).

    The trained keys are those that attention reads, after norm and rope, and the text begins at
    position P. PEFT treats its past_key_values in the same way, so both store the same numbers.

    `hidden` is the width of an MLP that computes the keys and values from P trained vectors during
    training (paper: 512, which trained more stably). Its last layer is solved by least squares, so
    that the prompt equals `start` at first. The MLP's output is stored, not the MLP.
    """

    def __init__(self, start, hidden: int | None = None):
        super().__init__()
        if start.rows != 1 or start.lengths is not None:
            raise ValueError("a deep prompt starts as a prefix of one row that is not ragged")
        self.prefix_type, self.dtype = type(start), start.layers[0][0].dtype
        kv = torch.stack([torch.cat(pair) for pair in start.layers]).detach().float()
        n, _, K, P, D = kv.shape  # layers, keys and values, heads, positions, width
        self.shape = (n, 2, K, D)
        kv = kv.permute(3, 0, 1, 2, 4).flatten(1)  # (P, n 2 K D), PEFT's layout
        self.mlp = None
        if hidden is None:
            self.keys_values = nn.Parameter(kv.clone())
            return
        if hidden < P:
            raise ValueError(f"--reparam-dim {hidden} cannot make {P} positions; at least {P}")
        self.embedding = nn.Parameter(torch.randn(P, K * D))
        last = nn.Linear(hidden, kv.shape[1])
        self.mlp = nn.Sequential(nn.Linear(K * D, hidden), nn.Tanh(), last)
        with torch.no_grad():
            features = self.mlp[:2](self.embedding)  # (P, hidden), of rank P
            last.weight.copy_((torch.linalg.pinv(features) @ kv.to(features.device)).T)
            last.bias.zero_()
        self.to(kv.device)

    def table(self) -> Tensor:
        """Keys and values as PEFT stores them, (P, layers * 2 * K * D)."""
        return self.keys_values if self.mlp is None else self.mlp(self.embedding)

    def forward(self):
        kv = self.table().to(self.dtype).unflatten(1, self.shape).permute(1, 2, 3, 0, 4)
        return self.prefix_type([(k[None], v[None]) for k, v in kv])  # each (1, K, P, D)


class CrossBlock(nn.Module):
    """Attention of 8 heads, then an MLP four times as wide: x + ADDED * f(norm(x)) each.

    Vectors x (B, P, W) attend to `inputs` (B, L, W), or to each other if there are none. (The block
    of Perceiver, Jaegle et al. 2021, where cross-attention has one head. The ID-PT paper states no
    number of heads. Its number of parameters fits an MLP of 4 W, where Perceiver IO has one of W.)
    """

    ADDED = 0.3  # factor of f, which is zero at first; x has unit scale

    def __init__(self, width: int, cross: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inputs_norm = nn.LayerNorm(width) if cross else None
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        for layer in (self.attention.out_proj, self.mlp[-1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, inputs: Tensor | None = None, padding: Tensor | None = None):
        """padding (B, L) is true where `inputs` is padding. Returns (B, P, W)."""
        q = self.norm(x)
        kv = q if inputs is None else self.inputs_norm(inputs)
        x = x + self.ADDED * self.attention(q, kv, kv, padding, need_weights=False)[0]
        return x + self.ADDED * self.mlp(x)


class PromptGenerator(nn.Module):
    """Computes a soft prompt from the text: generator(ids, lengths) -> (B, P, C), for lm.read.

    A frozen encoder of width W reads [start; text]. P learned queries read its output by
    cross-attention and go through two layers of self-attention. One linear layer projects each of
    them to the LM's width. (Paper: T5-base, p about 430, P 100 to 400. There the queries read the
    encoder's output at the text's positions only, here at those of `start` too. Starting as prompt
    tuning, GAIN and ADDED are ours.)

    encoder  t5.T5Encoder, or anything with embed(ids) and encoder(x, lengths). It is not part of
             this module, so it is neither trained nor stored, nor moved by `to`. If it has a
             function `recode`, that turns the LM's token ids of a text into the encoder's
    start    (p, W), the initial value of the encoder's own prompt, which is trained
    prompt   (P, C), the prompt of every text before training (exactly if P <= W)
    """

    GAIN = 100.0  # queries are stored divided by it: in a step of Adam they move GAIN times as far

    def __init__(self, encoder, start: Tensor, prompt: Tensor):
        super().__init__()
        prompt, width = prompt.detach().float().to(start.device), start.shape[1]
        self.encoder = [encoder]  # the list hides it from parameters()
        self.recode = getattr(encoder, "recode", None)
        self.start = nn.Parameter(start.detach().clone().float())
        self.queries = nn.Parameter(torch.randn(len(prompt), width) / self.GAIN)
        self.cross = CrossBlock(width, cross=True)
        self.layers = nn.ModuleList(CrossBlock(width) for _ in range(2))
        self.project = nn.Linear(width, prompt.shape[1])
        self.scale = prompt.square().mean().sqrt()  # root mean square; it is not trained
        nn.init.normal_(self.project.weight, std=width**-0.5)
        self.to(start.device)
        with torch.no_grad():  # solved for `prompt`; the random part has full rank, so that
            # training can leave the span of the first prompt's vectors
            y = self.GAIN * self.queries
            error = prompt / self.scale - self.project(y)
            self.project.weight += (torch.linalg.pinv(y) @ error).T

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids (B, L) of the encoder, right-padded after `lengths` (B,). Returns (B, P, C)."""
        encoder, B = self.encoder[0], len(ids)
        x = torch.cat([self.start.expand(B, -1, -1), encoder.embed(ids)], dim=1)
        lengths = lengths + len(self.start)
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        y = self.GAIN * self.queries.expand(B, -1, -1)
        y = self.cross(y, encoder(x, lengths), padding)
        for layer in self.layers:
            y = layer(y)
        return self.scale * self.project(y)

    def prompts(self, questions: list[list[int]]) -> Tensor:
        """The prompts (B, P, C) of B questions, lists of the LM's token ids."""
        rows = [self.recode(row) if self.recode else row for row in questions]
        rows = [torch.tensor(row, dtype=torch.long) for row in rows]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.start.device)
        return self(ids, torch.tensor([len(row) for row in rows], device=ids.device))


# Initialisers: plain functions that return (P, C). `table` is the LM's embedding table (V, C).
# from_vocab and from_text start at the scale of real tokens. Lester et al. (section 3.2) find that
# sampled vocabulary and class labels beat random vectors.


def random(length: int, table: Tensor, scale: float = 0.5, generator=None) -> Tensor:
    """Uniform in [-scale, scale], as in the paper, whose 0.5 fits T5's large embeddings.
    (Its released code draws from [0, scale).)"""
    return (torch.rand(length, table.shape[1], generator=generator) * 2 - 1) * scale


def from_vocab(length: int, table: Tensor, population: int = 5000, generator=None) -> Tensor:
    """Embeddings of `length` tokens, sampled without replacement from the first `population` ids.

    Those are the common tokens if the vocabulary is ordered by frequency (SentencePiece) or by
    merges (byte-level BPE). Tokens repeat only if length exceeds the population.
    """
    population = min(population, table.shape[0])
    ids = torch.empty(0, dtype=torch.long)
    while len(ids) < length:
        ids = torch.cat([ids, torch.randperm(population, generator=generator)])
    return table[ids[:length].to(table.device)].detach().float().cpu()


def from_labels(length: int, table: Tensor, tokenizer: Tokenizer, labels, generator=None) -> Tensor:
    """One vector per class label: the mean of its tokens' embeddings.

    Sampled vocabulary fills the rest. Labels beyond `length` are dropped with a warning.
    """
    if len(labels) > length:
        dropped = len(labels) - length
        warnings.warn(
            f"{len(labels)} labels for a prompt of {length}: the last {dropped} are left out",
            stacklevel=2,
        )
    means = []
    for label in labels[:length]:
        ids = token_ids(tokenizer, label, len(table))
        means.append(table[ids].detach().float().mean(0, keepdim=True).cpu())
    rest = from_vocab(length - len(means), table, generator=generator)
    return torch.cat([*means, rest])


def from_text(length: int, table: Tensor, tokenizer: Tokenizer, text, generator=None) -> Tensor:
    """Vector i is the embedding of token i of the text. A longer text is cut, and sampled
    vocabulary follows a shorter one."""
    ids = token_ids(tokenizer, text, len(table))[:length]
    rest = from_vocab(length - len(ids), table, generator=generator)
    return torch.cat([table[ids].detach().float().cpu(), rest])


def random_like(prefix, scale: float = 1.0, generator=None):
    """Keys and values from normal(0, scale) in the shape of `prefix` (P-tuning v2: scale 1)."""
    shapes = [[t.shape for t in pair] for pair in prefix.layers]
    drawn = [[torch.randn(s, generator=generator) * scale for s in pair] for pair in shapes]
    like = prefix.layers[0][0]
    return type(prefix)([(k.to(like), v.to(like)) for k, v in drawn])


def bos_vector(lm) -> Tensor:
    """The LM's embedding of BOS (C,). ValueError if it has none."""
    if lm.config.bos is None:
        raise ValueError("this LM has no BOS, so no prompt can stand after it")
    return lm.embed(torch.tensor([[lm.config.bos]], device=lm.embed_tokens.weight.device))[0, 0]


def token_ids(tokenizer: Tokenizer, text: str, vocab_size: int) -> list[int]:
    """The text's tokens without BOS or EOS. ValueError if there are none or they do not fit."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise ValueError(f"the text {text!r} has no tokens")
    if max(ids) >= vocab_size:
        token = tokenizer.id_to_token(max(ids))
        raise ValueError(
            f"the text {text!r} has the token {token!r} with the id {max(ids)}, outside the LM's "
            f"vocabulary of {vocab_size}"
        )
    return ids


class Connector(nn.Module):
    """n layers of the LM's own kind (`lm.new_layers(n)`), then an RMSNorm.

    It is called like the LM, with the same arguments: (B, T, C) -> (B, T, C), and with keep also
    its Prefix. The norm's gain starts at `scale`, so that at first the output has the root mean
    square of the vectors that it replaces. (Token embeddings are 10 to 100 times smaller than
    hidden states, and the frozen LM was not trained on larger inputs.) If `residual` is set, a
    Stack adds the output to these vectors (not in the paper).
    """

    def __init__(self, layers: nn.ModuleList, scale: float = 1.0, residual: bool = False):
        super().__init__()
        self.layers, self.residual = layers, residual
        self.norm = nn.RMSNorm(layers.config.dim, layers.config.norm_eps)
        nn.init.constant_(self.norm.weight, scale)
        self.to(next(layers.parameters()).device)

    def forward(self, x: Tensor, prefix=None, keep: bool = False, last=None):
        out = self.layers(x.to(self.norm.weight.dtype), prefix, keep, last)
        return (self.norm(out[0]), out[1]) if keep else self.norm(out)


class Connectors(nn.ModuleList):
    """The Connectors between more than two passes: a shared one, or one for each gap, in order."""

    def __init__(self, connectors: list[Connector], passes: int):
        super().__init__(connectors)
        self.passes = passes


def rms(vectors: Tensor) -> float:
    """Root mean square over all entries."""
    return vectors.detach().float().square().mean().sqrt().item()


# Files


def save_adapter(folder: str | Path, adapter: nn.Module, lm, dtype=torch.float32, **info) -> None:
    """Writes adapter_config.json and adapter_model.safetensors; `info` is added to the config.

    A prompt after BOS is stored for PEFT as P + 1 rows, BOS first, to precede texts without BOS.
    """
    from checkpoints import hash_tensors, write_json, write_tensors

    folder, named = Path(folder), dict(adapter.named_parameters())
    config = {"base_model_name_or_path": None, "fingerprint": lm.fingerprint()} | info
    config["token_dim"] = lm.config.dim
    if isinstance(adapter, (SoftPrompt, DeepPrompt)):
        rows = adapter() if isinstance(adapter, SoftPrompt) else adapter.table()
        named = {"prompt_embeddings": rows}
        config |= {"task_type": "CAUSAL_LM", "num_layers": lm.config.n_layers}
        config |= {"num_transformer_submodules": 1, "num_virtual_tokens": len(rows)}
    if isinstance(adapter, SoftPrompt):
        config |= {"peft_type": "PROMPT_TUNING", "num_attention_heads": lm.config.n_heads}
        config["placement"] = "before_bos" if adapter.bos is None else "after_bos"
    elif isinstance(adapter, DeepPrompt):
        config |= {"peft_type": "PREFIX_TUNING", "num_attention_heads": lm.config.n_kv_heads}
        config |= {"prefix_projection": False, "placement": "before_bos"}
        config["token_dim"] = kv_width(lm)
    elif isinstance(adapter, PromptGenerator):
        config |= {"peft_type": "PROMPT_GENERATOR", "scale": adapter.scale.item()}
        config["encoder"] = hash_tensors(adapter.encoder[0].state_dict())
    elif isinstance(adapter, (Connector, Connectors)):
        one = adapter if isinstance(adapter, Connector) else adapter[0]
        config |= {"peft_type": "CONNECTOR", "connector_layers": len(one.layers)}
        config["residual"] = one.residual
        if isinstance(adapter, Connectors):
            config |= {"passes": adapter.passes, "connectors": len(adapter)}
    else:
        raise TypeError(f"a {type(adapter).__name__} is not an adapter of this file")
    tensors = {name: t.detach().cpu().to(dtype).contiguous() for name, t in named.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", config)


def kv_width(lm) -> int:
    """K * D, PEFT's token_dim of a deep prompt."""
    return lm.config.n_kv_heads * lm.config.head_dim


def read_adapter_config(folder: str | Path) -> dict:
    """adapter_config.json as a dict. FileNotFoundError or ValueError names the file."""
    from families import COUNT, NUMBER, TEXT, check_keys, read_json

    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no adapter_config.json, so there is no trained adapter in this folder"
        )
    config = read_json(path)
    if "peft_type" not in config:
        raise ValueError(f"{path}: has no key peft_type")
    check_keys(path, config, {"peft_type": TEXT, "num_virtual_tokens": COUNT, "scale": NUMBER})
    return config


KINDS = ("PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_GENERATOR", "CONNECTOR")


def load_adapter(folder: str | Path, lm, encoder=None) -> nn.Module:
    """The adapter in `folder`, on the LM's device, trainable. A generator needs its encoder.

    ValueError if it was trained on another base or its tensors do not fit. An adapter without a
    fingerprint (PEFT's own) loads with a warning.
    """
    from checkpoints import check_tensors, read_tensors

    config = read_adapter_config(folder)
    kind, device = config["peft_type"], lm.embed_tokens.weight.device
    if kind not in KINDS:  # checked first: another kind's width may mean something else
        raise ValueError(f"{folder}: peft_type {kind!r} is not supported; {', '.join(KINDS)} are")
    check_base(folder, config, lm)
    if kind == "PROMPT_TUNING":
        return load_soft_prompt(folder, config, lm).to(device)
    tensors = read_tensors(Path(folder) / "adapter_model.safetensors")
    if kind == "PREFIX_TUNING":
        return load_deep_prompt(folder, config, lm, tensors).to(device)
    if kind == "PROMPT_GENERATOR":
        adapter = empty_generator(folder, config, lm, tensors, encoder)
    else:
        adapter = empty_connector(folder, config, lm)
    check_tensors(tensors, {name: p.shape for name, p in adapter.named_parameters()}, folder)
    adapter.load_state_dict(tensors)
    return adapter.to(device)


def check_base(folder: str | Path, config: dict, lm) -> None:
    """ValueError if fingerprint or width differ from the LM's; no fingerprint is a warning."""
    width = kv_width(lm) if config["peft_type"] == "PREFIX_TUNING" else lm.config.dim
    stored, dim = config.get("fingerprint"), config.get("token_dim", width)
    if stored is None:
        warnings.warn(
            f"{folder}: carries no fingerprint, so whether it belongs to this LM is not checked",
            stacklevel=3,
        )
    elif stored != lm.fingerprint():
        differs = f"fingerprint {str(stored)[:12]}..., this LM's is {lm.fingerprint()[:12]}..."
        raise ValueError(f"{folder}: was trained on another base ({differs})")
    if dim != width:
        raise ValueError(f"{folder}: made for an LM of width {dim}, this one's is {width}")


def load_soft_prompt(folder: str | Path, config: dict, lm) -> SoftPrompt:
    """The prompt that `save_adapter` or PEFT wrote."""
    vectors, after = read_prompt(folder), is_after_bos(folder, config)
    shape, expected = tuple(vectors.shape), (config.get("num_virtual_tokens", 0), lm.config.dim)
    if shape != expected:
        raise ValueError(f"{folder}: the prompt is {shape}, not {expected}")
    return SoftPrompt(vectors[1:], bos_vector(lm)) if after else SoftPrompt(vectors)


def read_prompt(folder: str | Path) -> Tensor:
    """The rows of a stored prompt, float32. ValueError if the folder holds another adapter."""
    from checkpoints import read_tensors

    tensors = read_tensors(Path(folder) / "adapter_model.safetensors")
    if set(tensors) != {"prompt_embeddings"}:
        raise ValueError(f"{folder}: not a prompt (its tensors: {', '.join(sorted(tensors)[:3])})")
    return tensors["prompt_embeddings"].float()


def is_after_bos(folder: str | Path, config: dict) -> bool:
    """Whether a soft prompt's first row is BOS. PEFT's config has no such key: the
    prompt then stands before BOS."""
    placement = config.get("placement", "before_bos")
    if placement not in ("before_bos", "after_bos"):
        raise ValueError(f"{folder}: placement {placement!r} is neither before_bos nor after_bos")
    return placement == "after_bos"


def load_deep_prompt(folder: str | Path, config: dict, lm, tensors: dict) -> DeepPrompt:
    """The deep prompt that `save_adapter` or PEFT wrote."""
    from checkpoints import check_tensors

    P, n = config.get("num_virtual_tokens", 0), lm.config.n_layers
    check_tensors(tensors, {"prompt_embeddings": (P, 2 * n * kv_width(lm))}, folder)
    with torch.no_grad():  # of this prefix only shape, type, dtype and device are used
        tokens = torch.zeros(1, P, dtype=torch.long, device=lm.embed_tokens.weight.device)
        deep = DeepPrompt(lm.read(lm.embed(tokens)))
        deep.keys_values.copy_(tensors["prompt_embeddings"])
    return deep


def empty_generator(folder, config: dict, lm, tensors: dict, encoder) -> PromptGenerator:
    """A generator for stored tensors. ValueError unless it was trained on `encoder`."""
    from checkpoints import hash_tensors

    if encoder is None or config.get("encoder") != hash_tensors(encoder.state_dict()):
        what = "no encoder is given" if encoder is None else "the given encoder is another one"
        raise ValueError(f"{folder}: a prompt generator needs its encoder; {what}")
    # The size of a tensor that is missing does not matter: check_tensors will say so.
    start, queries = (tensors.get(name, torch.empty(1, 8)) for name in ("start", "queries"))
    generator = PromptGenerator(encoder, start, torch.ones(len(queries), lm.config.dim))
    generator.scale.fill_(config.get("scale", 1.0))
    return generator


def empty_connector(folder: str | Path, config: dict, lm) -> Connector | Connectors:
    """A Connector, or Connectors, of the shape that a config states. ValueError if it has none."""
    from families import LAYERS, check_value

    n, passes, count = (config.get(k) for k in ("connector_layers", "passes", "connectors"))
    residual = config.get("residual") is True
    check_value(folder, "connector_layers", n, LAYERS)
    fits = isinstance(passes, int) and 3 <= passes <= 10_000 and count in (1, passes - 1)
    if passes is not None and not fits:
        raise ValueError(f"{folder}: passes is {passes!r} and connectors is {count!r}")
    every = [Connector(lm.new_layers(n), residual=residual) for _ in range(count or 1)]
    return every[0] if passes is None else Connectors(every, passes)


def main(argv: list[str] | None = None) -> dict:
    """Prints an adapter folder. Returns its config."""
    from show import Parser, show

    parser = Parser(prog="adapters.py", description="Print what an adapter folder holds.")
    parser.add_argument("folder")
    args = parser.parse_args(argv)

    from checkpoints import read_tensors

    config = read_adapter_config(args.folder)
    tensors = read_tensors(Path(args.folder) / "adapter_model.safetensors")
    for key, value in config.items():
        show(f"{key:28} {value}", result=True)
    for name, tensor in tensors.items():
        show(f"{name:28} {tuple(tensor.shape)}, root mean square {rms(tensor):.4f}", result=True)
    return config


if __name__ == "__main__":
    show.run_program("adapters.py", main)
