"""BERT (Devlin et al. 2019), the encoder of a re-ranker. A scoring head is not part of this file.

    bert = Bert.from_pretrained(folder)
    h = bert(ids, lengths, token_type_ids)        (B, L) -> (B, L, C); h[:, 0] belongs to [CLS]

Needs torch. Loading and saving a published folder needs checkpoints.py and families.py beside this
file. Dimensions as in model.py: B batch, L tokens of a text, C model width, H heads, D head width.

    python rerank.py runs/bert/model        prints what a checkpoint holds
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

HF_NAMES = {  # our module: the published one, where it has another name
    "norm": "LayerNorm",
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "o_proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up_proj": "intermediate.dense",
    "down_proj": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


@dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT. families.py makes these fields from a published config.json."""

    vocab_size: int
    dim: int  # C
    n_layers: int
    n_heads: int  # H
    hidden_dim: int  # width of the MLP
    max_len: int  # positions
    token_types: int = 2
    norm_eps: float = 1e-12
    dropout: float = 0.1  # while training


class BertLayer(nn.Module):
    """Attention, then an MLP. Each is added to its input, and the sum is normed."""

    def __init__(self, config: BertConfig):
        super().__init__()
        c = config
        self.n_heads, self.dropout = c.n_heads, c.dropout
        self.q_proj = nn.Linear(c.dim, c.dim)
        self.k_proj = nn.Linear(c.dim, c.dim)
        self.v_proj = nn.Linear(c.dim, c.dim)
        self.o_proj = nn.Linear(c.dim, c.dim)
        self.up_proj = nn.Linear(c.dim, c.hidden_dim)
        self.down_proj = nn.Linear(c.hidden_dim, c.dim)
        self.attention_norm = nn.LayerNorm(c.dim, c.norm_eps)
        self.mlp_norm = nn.LayerNorm(c.dim, c.norm_eps)

    def attention(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """x (B, L, C), attention_mask (B, 1, 1, L) True at real tokens -> (B, L, C)."""
        q, k, v = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attention_mask, dropout)  # (B, H, L, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        """x (B, L, C) -> (B, L, C)."""
        return self.down_proj(F.gelu(self.up_proj(x)))

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """x (B, L, C), attention_mask (B, 1, 1, L) or None -> (B, L, C)."""
        y = F.dropout(self.attention(x, attention_mask), self.dropout, self.training)
        x = self.attention_norm(x + y)
        return self.mlp_norm(x + F.dropout(self.mlp(x), self.dropout, self.training))


class Bert(nn.Module):
    """Bert(config) is freshly initialised. Bert.from_pretrained(folder) is in eval mode at first.

    The parameters of both are trainable.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        c = self.config = config
        self.word_embeddings = nn.Embedding(c.vocab_size, c.dim)
        self.position_embeddings = nn.Embedding(c.max_len, c.dim)
        self.token_type_embeddings = nn.Embedding(c.token_types, c.dim)
        self.norm = nn.LayerNorm(c.dim, c.norm_eps)
        self.layers = nn.ModuleList(BertLayer(c) for _ in range(c.n_layers))
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self, ids: Tensor, lengths: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """ids (B, L) -> (B, L, C).

        lengths (B,): the real tokens of each right-padded row. token_type_ids (B, L), by default 0.
        ValueError if the texts are longer than the position embeddings.
        """
        if ids.shape[1] > self.config.max_len:
            raise ValueError(
                f"texts of {ids.shape[1]} tokens exceed the {self.config.max_len} positions of "
                "this BERT"
            )
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(ids)
        position = torch.arange(ids.shape[1], device=ids.device)
        x = self.word_embeddings(ids) + self.position_embeddings(position)
        x = x + self.token_type_embeddings(token_type_ids)
        x = F.dropout(self.norm(x), self.config.dropout, self.training)
        attention_mask = None
        if lengths is not None:
            attention_mask = (position < lengths[:, None])[:, None, None]  # (B, 1, 1, L)
        for layer in self.layers:
            x = layer(x, attention_mask)
        return x

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> "Bert":
        """Load the encoder of a published BERT, float32, trainable, in eval mode.

        Heads in the same file are ignored. FileNotFoundError if a file is missing. ValueError if a
        key of config.json or a tensor does not fit, or if it is quantised; it names them.
        """
        from checkpoints import check_tensors, read_tensors, skip_init
        from families import bert_from_hf

        folder = Path(folder)
        stored = read_tensors(folder / "model.safetensors")
        with torch.device("meta"), skip_init():
            bert = cls(BertConfig(**bert_from_hf(folder / "config.json")))
        tensors = {current_name(name): tensor for name, tensor in stored.items()}
        tensors.pop("embeddings.position_ids", None)  # older files store 0, 1, 2, ...
        names = bert.hf_names()
        found = {n: t for n, t in tensors.items() if n.startswith(("embeddings.", "encoder."))}
        expected = {names[ours]: p.shape for ours, p in bert.named_parameters()}
        check_tensors(found, expected, folder)
        state = {ours: tensors[theirs].to(device, torch.float32) for ours, theirs in names.items()}
        bert.load_state_dict(state, assign=True)
        return bert.eval()

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and model.safetensors in the published format."""
        from checkpoints import write_encoder
        from families import bert_to_hf

        parameters = dict(self.named_parameters())
        tensors = {theirs: parameters[ours] for ours, theirs in self.hf_names().items()}
        write_encoder(folder, bert_to_hf(vars(self.config)), tensors, dtype)

    def hf_names(self) -> dict[str, str]:
        """Return {our parameter name: the published tensor name}."""
        names = {}
        for name, _ in self.named_parameters():
            *path, suffix = name.split(".")  # suffix: weight or bias
            place = f"encoder.layer.{path[1]}" if path[0] == "layers" else "embeddings"
            names[name] = f"{place}.{HF_NAMES.get(path[-1], path[-1])}.{suffix}"
        return names


def current_name(name: str) -> str:
    """Return today's published name of a tensor.

    A file of BertFor... has `bert.` in front of the encoder's names. The first published files call
    a LayerNorm's weight and bias gamma and beta.
    """
    name = name.removeprefix("bert.")
    for earlier, current in (("gamma", "weight"), ("beta", "bias")):
        if name.endswith(f"LayerNorm.{earlier}"):
            name = name.removesuffix(earlier) + current
    return name


def token_type_ids(ids: Tensor, separator: int) -> Tensor:
    """ids (B, L) -> token types (B, L): 0 up to and including the first separator, 1 after it.

    Examples: [CLS] question [SEP] title [SEP] passage, or two segments with one [SEP] between.
    """
    separators = (ids == separator).long()
    return ((separators.cumsum(1) - separators) > 0).long()


def main(argv: list[str] | None = None) -> BertConfig:
    parser = argparse.ArgumentParser(description="Print what a BERT checkpoint holds.")
    parser.add_argument("folder")
    parser.error = lambda message: parser.exit(2, f"rerank.py: {message}\n")
    bert = Bert.from_pretrained(parser.parse_args(argv).folder)
    print(f"{bert.config}, {sum(p.numel() for p in bert.parameters()):,} parameters")
    return bert.config


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"rerank.py: {error}", file=sys.stderr)
        sys.exit(2)
