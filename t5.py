"""The encoder of T5 (Raffel et al. 2020).

Input-dependent prompts (Levine et al. 2022, section 2) are computed from its output. It is frozen.

    encoder = T5Encoder.from_pretrained(folder)
    h = encoder(encoder.embed(ids), lengths)        (B, L) -> (B, L, C), final norm included

T5 differs from the decoder of model.py in three ways. Attention sees both directions, positions
are a learned bias on the attention scores, and the scores are not divided by sqrt(D).

Needs torch. Loading and saving a published folder needs checkpoints.py and families.py beside this
file. Dimensions as in model.py: B batch, L tokens of a text, C model width, H heads, D head width.

    python t5.py runs/encoder/model        prints what a checkpoint holds
"""

if __name__ == "__main__":
    import show  # before torch: it sets how threads wait

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

HF_NAMES = {  # our parameter: the published tensor
    "embed_tokens.weight": "shared.weight",
    "relative_attention_bias.weight": (
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    "norm.weight": "encoder.final_layer_norm.weight",
}
# A file may hold the one embedding table under several of these names. The first that is there
# counts: an output layer of its own (T5 1.1), the last name here, never stands without a table.
HF_TABLE_NAMES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
HF_TABLE_NAMES += ("lm_head.weight",)
HF_LAYER_NAMES = {  # our module of a layer: the published one of encoder.block.{i}
    "input_layernorm": "layer.0.layer_norm",
    "self_attn.q_proj": "layer.0.SelfAttention.q",
    "self_attn.k_proj": "layer.0.SelfAttention.k",
    "self_attn.v_proj": "layer.0.SelfAttention.v",
    "self_attn.o_proj": "layer.0.SelfAttention.o",
    "post_attention_layernorm": "layer.1.layer_norm",
    "mlp.gate_proj": "layer.1.DenseReluDense.wi_0",
    "mlp.up_proj": "layer.1.DenseReluDense.wi_1",  # wi if there is no gate
    "mlp.down_proj": "layer.1.DenseReluDense.wo",
}


@dataclass(frozen=True)
class T5Config:
    """The shape of a T5 encoder. families.py makes these fields from a published config.json."""

    vocab_size: int
    dim: int  # C
    n_layers: int
    n_heads: int  # H
    head_dim: int  # D; H * D need not equal C
    hidden_dim: int  # width of the MLP
    gated: bool = True  # T5 1.1 and Flan: gelu(x W0) * (x W1); the first T5: relu(x W)
    buckets: int = 32  # classes of distances; half look back, half ahead
    max_distance: int = 128  # all longer distances share the last class
    norm_eps: float = 1e-6


class T5Attention(nn.Module):
    """Multi-head attention without a scale on the scores (`initial_std` makes up for it)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.head_dim = config.head_dim
        width = config.n_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, width, bias=False)
        self.k_proj = nn.Linear(config.dim, width, bias=False)
        self.v_proj = nn.Linear(config.dim, width, bias=False)
        self.o_proj = nn.Linear(width, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, C), bias (1 | B, H, L, L) on the scores -> (B, L, C)."""
        q, k, v = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, H, L, D) -> (B, L, H D) -> (B, L, C)


class T5MLP(nn.Module):
    """down(gelu(gate(x)) * up(x)), or in the first T5 down(relu(up(x)))."""

    def __init__(self, c: T5Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.dim, c.hidden_dim, bias=False) if c.gated else None
        self.up_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.down_proj = nn.Linear(c.hidden_dim, c.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, C) -> (B, L, C)."""
        if self.gate_proj is None:
            return self.down_proj(F.relu(self.up_proj(x)))
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class T5Block(nn.Module):
    """Attention, then an MLP, each on the normed input and added to it."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.self_attn = T5Attention(config)
        self.mlp = T5MLP(config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, C), bias (1 | B, H, L, L) -> (B, L, C)."""
        x = x + self.self_attn(self.input_layernorm(x), bias)
        return x + self.mlp(self.post_attention_layernorm(x))


class T5Encoder(nn.Module):
    """T5Encoder(config) is freshly initialised. T5Encoder.from_pretrained(folder) is frozen.

    It reads any x of width C, for example a trained prompt before the embeddings.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        # Shared by all layers; the file stores it in the first one.
        self.relative_attention_bias = nn.Embedding(config.buckets, config.n_heads)
        self.layers = nn.ModuleList(T5Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=initial_std(name, parameter, config))

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, L, C)."""
        return self.embed_tokens(ids)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (B, L, C) -> (B, L, C). lengths (B,): the real tokens of each right-padded row."""
        position = torch.arange(x.shape[1], device=x.device)
        bucket = distance_bucket(position[None] - position[:, None], self.config)  # (L, L)
        bias = self.relative_attention_bias(bucket).permute(2, 0, 1)[None]  # (1, H, L, L)
        if lengths is not None:
            padding = position >= lengths[:, None, None, None]  # (B, 1, 1, L)
            bias = bias.masked_fill(padding, torch.finfo(bias.dtype).min)
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x)

    @classmethod
    def from_pretrained(cls, folder, device: str = "cpu", dtype=torch.float32) -> "T5Encoder":
        """Load the encoder of a published T5, frozen: eval mode, no parameter needs a gradient.

        A decoder in the same file is ignored. FileNotFoundError if a file is missing. ValueError if
        a key of config.json or a tensor does not fit, or if it is quantised; it names them.
        """
        from checkpoints import check_tensors, read_tensors, skip_init
        from families import t5_from_hf

        folder = Path(folder)
        tensors = read_tensors(folder / "model.safetensors")
        with torch.device("meta"), skip_init():
            encoder = cls(T5Config(**t5_from_hf(folder / "config.json")))
        tables = [tensors.pop(name) for name in HF_TABLE_NAMES if name in tensors]
        if tables:
            tensors["shared.weight"] = tables[0]
        names = encoder.hf_names()
        found = {n: t for n, t in tensors.items() if n.startswith(("shared.", "encoder."))}
        expected = {names[ours]: p.shape for ours, p in encoder.named_parameters()}
        check_tensors(found, expected, folder)
        state = {ours: tensors[theirs].to(device, dtype) for ours, theirs in names.items()}
        encoder.load_state_dict(state, assign=True)
        return encoder.requires_grad_(False).eval()

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and model.safetensors in the published format."""
        from checkpoints import write_encoder
        from families import t5_to_hf

        parameters = dict(self.named_parameters())
        tensors = {theirs: parameters[ours] for ours, theirs in self.hf_names().items()}
        write_encoder(folder, t5_to_hf(vars(self.config)), tensors, dtype)

    def hf_names(self) -> dict[str, str]:
        """Return {our parameter name: the published tensor name}."""
        names = {}
        for name, _ in self.named_parameters():
            if name in HF_NAMES:
                names[name] = HF_NAMES[name]
                continue
            _, i, module = name.removesuffix(".weight").split(".", 2)
            theirs = HF_LAYER_NAMES[module]
            if module == "mlp.up_proj" and not self.config.gated:
                theirs = theirs.replace("wi_1", "wi")
            names[name] = f"encoder.block.{i}.{theirs}.weight"
        return names


def initial_std(name: str, parameter: Tensor, config: T5Config) -> float:
    """T5's scheme: 1 / sqrt(fan-in); q_proj 1 / sqrt(fan-in * D), as scores have no scale."""
    if name == "embed_tokens.weight":
        return 1.0
    if name == "relative_attention_bias.weight":
        return config.dim**-0.5
    q_scale = config.head_dim if name.endswith(".q_proj.weight") else 1
    return (parameter.shape[1] * q_scale) ** -0.5


def distance_bucket(distance: Tensor, config: T5Config) -> Tensor:
    """The bucket of distance = key position - query position. Half of the buckets look back.

    In each half, a near distance has its own bucket. Far distances share buckets that widen
    logarithmically up to max_distance.
    """
    half = config.buckets // 2  # of one direction
    near = half // 2
    length = distance.abs()
    # 0 at the first far distance, 1 at max_distance
    fraction = (length.clamp(min=1).float() / near).log() / math.log(config.max_distance / near)
    far = (near + fraction * (half - near)).long().clamp(max=half - 1)
    return (distance > 0) * half + torch.where(length < near, length, far)


def main(argv: list[str] | None = None) -> T5Config:
    """Print what a checkpoint holds. Returns its config."""
    from show import Parser, show

    parser = Parser(prog="t5.py", description="Print what a T5 encoder's checkpoint holds.")
    parser.add_argument("folder")
    encoder = T5Encoder.from_pretrained(parser.parse_args(argv).folder)
    line = f"{encoder.config}, {sum(p.numel() for p in encoder.parameters()):,} parameters"
    show(line, result=True)
    return encoder.config


if __name__ == "__main__":
    show.run_program("t5.py", main)
