"""The passages that a frozen reader sees: a cross-encoder sorts what was retrieved, `pack` cuts it.

The re-ranker of Levine et al. (2022, section 3): BERT (Devlin et al. 2019) reads question and
passage together, with the heads and the loss of DPR's reader (Karpukhin et al. 2020).

    encoder = CrossEncoder.from_pretrained("cross-encoder/ms-marco-MiniLM-L6-v2")
    scores = encoder.score(question, [(title, text), ...])          (N,), higher is better
    packed, dropped = pack(passages, scores, budget=1024, count=tokens_of)

Needs torch, numpy and tqdm; checkpoints.py and families.py to load and save. Dimensions: B batch,
N passages, L tokens, C model width, H heads, D head width, M passages of a training question.

    python rerank.py runs/bert/model        prints what a checkpoint holds and which input it reads
"""

if __name__ == "__main__":
    import show  # before torch: it sets how threads wait

import re
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# BERT

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

    def __init__(self, c: BertConfig):
        super().__init__()
        self.n_heads, self.dropout = c.n_heads, c.dropout
        self.q_proj = nn.Linear(c.dim, c.dim)
        self.k_proj = nn.Linear(c.dim, c.dim)
        self.v_proj = nn.Linear(c.dim, c.dim)
        self.o_proj = nn.Linear(c.dim, c.dim)
        self.up_proj = nn.Linear(c.dim, c.hidden_dim)
        self.down_proj = nn.Linear(c.hidden_dim, c.dim)
        self.attention_norm = nn.LayerNorm(c.dim, c.norm_eps)
        self.mlp_norm = nn.LayerNorm(c.dim, c.norm_eps)

    def attention(self, queries: Tensor, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """queries (B, Q, C), x (B, L, C) -> (B, Q, C). attention_mask: True at real tokens."""
        q, k, v = self.q_proj(queries), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attention_mask, dropout)  # (B, H, Q, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, attention_mask: Tensor | None, length: int | None = None):
        """x (B, L, C), attention_mask (B, 1, 1, L) or None -> the first `length` states, or all."""
        queries = x[:, :length]
        y = F.dropout(self.attention(queries, x, attention_mask), self.dropout, self.training)
        x = self.attention_norm(queries + y)
        y = self.down_proj(F.gelu(self.up_proj(x)))
        return self.mlp_norm(x + F.dropout(y, self.dropout, self.training))


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
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, ids: Tensor, lengths: Tensor | None = None, token_type_ids=None, only_first=False
    ) -> Tensor:
        """ids (B, L) -> (B, L, C), or with `only_first` (B, 1, C): the state of [CLS] alone.

        lengths (B,): the real tokens of each right-padded row. token_type_ids (B, L), by default 0.
        ValueError if the texts are longer than the position embeddings.
        """
        L, most = ids.shape[1], self.config.max_len
        if L > most:
            raise ValueError(f"texts of {L} tokens exceed this BERT's {most} positions")
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(ids)
        position = torch.arange(L, device=ids.device)
        x = self.word_embeddings(ids) + self.position_embeddings(position)
        x = x + self.token_type_embeddings(token_type_ids)
        x = F.dropout(self.norm(x), self.config.dropout, self.training)
        attention_mask = None
        if lengths is not None and bool((lengths < L).any()):
            attention_mask = (position < lengths[:, None])[:, None, None]  # (B, 1, 1, L)
        for layer in self.layers:
            last = layer is self.layers[-1]
            x = layer(x, attention_mask, 1 if only_first and last else None)
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
    """Return today's published name of a tensor of BertModel.

    A file of BertFor... has `bert.` in front of the encoder's names, and DPR's three models have
    their own. The first published files call a LayerNorm's weight and bias gamma and beta.
    """
    dpr = r"(question_encoder|ctx_encoder|span_predictor\.encoder)\.bert_model"
    name = re.sub(rf"^(bert|{dpr})\.", "", name)
    for earlier, current in (("gamma", "weight"), ("beta", "bias")):
        if name.endswith(f"LayerNorm.{earlier}"):
            name = name.removesuffix(earlier) + current
    return name


def tokenise(tokenizer, texts: Sequence[str], space: str = " ") -> list[list[int]]:
    """Tokenise texts without special tokens. Each begins with a space: for a byte-level tokenizer a
    name then has the same tokens everywhere. (WordPiece ignores the space.)"""
    spaced = {text: space + text if text else "" for text in texts}  # each different one once
    encoded = tokenizer.encode_batch_fast(list(spaced.values()), add_special_tokens=False)
    ids = {text: encoding.ids for text, encoding in zip(spaced, encoded)}
    return [ids[text] for text in texts]


def token_type_ids(ids: Tensor, separator: int) -> Tensor:
    """ids (B, L) -> token types (B, L): 0 up to and including the first separator, 1 after it."""
    separators = (ids == separator).long()
    return ((separators.cumsum(1) - separators) > 0).long()


def progress(items: Sequence, unit: str):
    """`items` behind a progress bar, which a terminal shows after two seconds."""
    from tqdm import tqdm

    return tqdm(items, unit=f" {unit}", delay=2, disable=not (sys.stderr and sys.stderr.isatty()))


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token lists -> ids (B, L), padded on the right, and lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True), lengths


def length_batches(rows: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    """Row numbers, longest first, in batches of at most `batch_tokens` tokens with padding."""
    batches, width = [], 0
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        if not batches or (len(batches[-1]) + 1) * width > batch_tokens:
            batches.append([])
            width = len(rows[i])
        batches[-1].append(i)
    return batches


def as_pair(passage) -> tuple[str, str]:
    """Return (title, text) of a pair, of a dict with these keys, or of a text without a title."""
    if isinstance(passage, dict):
        return passage.get("title") or "", passage["text"]
    return ("", passage) if isinstance(passage, str) else passage[:2]


# Cross-encoder


@dataclass(frozen=True)
class Format:
    """How a published cross-encoder names its tensors and lays out its input."""

    architecture: str
    model_type: str
    place: str  # in front of the encoder's names
    heads: dict[str, str]  # ours: published
    last_separator: bool  # whether [SEP] ends the input
    token_types: bool  # whether title and passage have the token type 1

    def __str__(self):
        end = " [SEP]" if self.last_separator else ""
        return f"{self.architecture}: reads [CLS] question [SEP] title [SEP] passage{end}"


POOLED = {"pooler": "bert.pooler.dense", "rank": "classifier"}
SPANS = {"span": "qa_outputs", "rank": "qa_classifier"}  # as in DPR
DPR_SPANS = {ours: f"span_predictor.{name}" for ours, name in SPANS.items()}
DPR_PLACE = "span_predictor.encoder.bert_model."
FORMATS = {  # transformers runs DPR's readers without token types; "reader" is trained here
    "classifier": Format("BertForSequenceClassification", "bert", "bert.", POOLED, True, True),
    "dpr_reader": Format("DPRReader", "dpr", DPR_PLACE, DPR_SPANS, False, False),
    "reader": Format("BertForQuestionAnswering", "bert", "bert.", SPANS, False, True),
}


def find_format(names: Collection[str]) -> str | None:
    """Return which of FORMATS has these tensor names, or None if they have no head of theirs."""
    for key, form in FORMATS.items():
        if {f"{head}.weight" for head in form.heads.values()} <= set(names):
            return key


class CrossEncoder(nn.Module):
    """Scores passages for a question: BERT reads [CLS] question [SEP] title [SEP] passage.

    format "classifier": a pooler (tanh) over [CLS], one label or two, and a [SEP] at the end. An
    empty title is left out with its [SEP]. Formats "reader" and "dpr_reader": a rank head on the
    [CLS] vector itself, start and end heads on every token, and no [SEP] at the end.

    max_len: tokens of an input; the passage is cut there. By default, the positions of the BERT.
    ValueError if `tokenizer` has no [CLS] or [SEP].
    """

    def __init__(self, bert: Bert, tokenizer, format="reader", max_len=None, labels: int = 1):
        super().__init__()
        C = bert.config.dim
        self.bert, self.tokenizer, self.format = bert, tokenizer, FORMATS[format]
        self.max_len = min(max_len or bert.config.max_len, bert.config.max_len)
        self.cls, self.sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
        if self.cls is None or self.sep is None:
            raise ValueError("the tokenizer of a cross-encoder needs the tokens [CLS] and [SEP]")
        published, sizes = self.format.heads, {"pooler": C, "span": 2, "rank": labels}
        self.heads = nn.ModuleDict({name: nn.Linear(C, sizes[name]) for name in published})
        ends = ("weight", "bias")
        self.hf_heads = {f"{h}.{end}": f"{published[h]}.{end}" for h in published for end in ends}
        for head in self.heads.values():
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def forward(self, ids: Tensor, lengths: Tensor, spans=False) -> tuple[Tensor, Tensor | None]:
        """ids (B, L), lengths (B,) -> rank logits (B,), and start and end logits (B, L, 2).

        Without `spans` the latter are None, and the last layer is computed for [CLS] alone. The
        score of a classifier with two labels is the difference of their logits.
        """
        types = token_type_ids(ids, self.sep) if self.format.token_types else None
        h = self.bert(ids, lengths, types, only_first=not spans)
        x = h[:, 0]
        if "pooler" in self.heads:
            pooled = self.heads["pooler"](x).tanh()
            x = F.dropout(pooled, self.bert.config.dropout, self.training)
        with torch.autocast(x.device.type, enabled=False):  # many scores would be equal in bf16
            logits = self.heads["rank"](x.float())
        rank = logits[:, -1] - logits[:, :-1].sum(-1)
        return rank, self.heads["span"](h) if spans else None

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise texts without special tokens; see `tokenise`."""
        return tokenise(self.tokenizer, texts)

    def layout(self, question: list[int], title: list[int], text: list[int]) -> list[int]:
        """Return the tokens of an input, at most max_len."""
        ids = [self.cls, *question, self.sep]
        if not self.format.last_separator:
            return [*ids, *title, self.sep, *text][: self.max_len]
        ids += [*title, self.sep] if title else []
        return [*ids, *text][: self.max_len - 1] + [self.sep]

    def score(self, question: str, passages: Sequence[tuple[str, str]]) -> Tensor:
        """Return a score for each passage, (N,) float32 on the CPU. Higher is better."""
        return self.score_all([question], [passages])[0]

    @torch.no_grad()
    def score_all(self, questions: Sequence[str], passages: Sequence, batch_tokens: int = 4096):
        """Score the passages of each question. Returns a list of tensors (N,).

        Inputs of all questions share batches of similar lengths. Dropout is off meanwhile.
        """
        pairs = [as_pair(passage) for some in passages for passage in some]
        titles, texts = (self.tokens([pair[i] for pair in pairs]) for i in (0, 1))
        asked = [q for q, some in zip(self.tokens(questions), passages) for _ in some]
        inputs = list(map(self.layout, asked, titles, texts))
        scores, device = torch.empty(len(inputs)), self.heads["rank"].weight.device
        training, size = self.training, batch_tokens * (16 if device.type == "cuda" else 1)
        self.eval()
        for rows in progress(length_batches(inputs, size), "batches"):
            ids, lengths = (t.to(device) for t in pad([inputs[row] for row in rows]))
            scores[rows] = self(ids, lengths)[0].float().cpu()
        self.train(training)
        return list(scores.split([len(some) for some in passages]))

    @classmethod
    def from_pretrained(cls, path_or_hub_id, device="cpu", max_len=None, new_heads=False):
        """Load a published cross-encoder, DPR reader or what `save` wrote; trainable, in eval mode.

        The names of the tensors decide on the format. A BERT without heads gets random ones of the
        format "reader": with a warning, unless `new_heads` says that the caller trains them.
        FileNotFoundError or ValueError as in Bert.from_pretrained.
        """
        from checkpoints import check_tensors, load_tokenizer, read_tensors, resolve

        folder = resolve(path_or_hub_id)
        bert = Bert.from_pretrained(folder, device)
        tokenizer = load_tokenizer(folder, bert.config.vocab_size)
        stored = read_tensors(folder / "model.safetensors")
        format = find_format(stored)
        if format is None:
            if not new_heads:
                warnings.warn(f"{folder}: an encoder alone; its new heads are random", stacklevel=2)
            return cls(bert, tokenizer, "reader", max_len).to(device).eval()
        labels = len(stored[FORMATS[format].heads["rank"] + ".weight"])
        if labels > 2:
            raise ValueError(f"{folder}: a re-ranker has one label or two, not {labels}")
        encoder = cls(bert, tokenizer, format, max_len, labels)
        names, shapes = encoder.hf_heads, encoder.heads.state_dict()
        found = {name: stored[name] for name in names.values() if name in stored}
        check_tensors(found, {names[ours]: shapes[ours].shape for ours in names}, folder)
        encoder.heads.load_state_dict({ours: found[name].float() for ours, name in names.items()})
        return encoder.to(device).eval()

    def save(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and tokenizer.json under the published names."""
        from checkpoints import atomic_write, write_encoder
        from families import bert_to_hf

        form, ours = self.format, dict(self.bert.named_parameters())
        tensors = {form.place + name: ours[n] for n, name in self.bert.hf_names().items()}
        tensors |= {self.hf_heads[n]: head for n, head in self.heads.named_parameters()}
        config = bert_to_hf(vars(self.bert.config)) | {"model_type": form.model_type}
        labels = {str(i): f"LABEL_{i}" for i in range(self.heads["rank"].out_features)}
        config |= {"architectures": [form.architecture], "id2label": labels}
        write_encoder(folder, config, tensors, torch.float32)
        with atomic_write(Path(folder) / "tokenizer.json") as path:
            self.tokenizer.save(str(path))


def reranker_loss(
    encoder: CrossEncoder, ids: Tensor, lengths: Tensor, groups: Tensor, spans: Tensor
) -> Tensor:
    """The loss of DPR's reader (Karpukhin et al. 2020, equations 3 to 5), summed over B questions.

    ids, lengths  (R, L), (R,)  the inputs of all questions
    groups        (B, M)        the rows of each question's passages, the positive first; -1: none
    spans         (B, S, 2)     first and last token of each answer in the positive's row; -1: none

    Minus the log-likelihood of choosing the positive among the M passages, minus that of the answer
    in it: the sum over its spans of P(start) * P(end), which are softmaxes over the tokens of the
    positive's row. A question without spans, and a classifier, have the first term only.
    """
    rank, logits, has_span = torch.zeros(len(ids)).to(ids.device), None, spans[..., 0].ge(0).any(1)
    for rows in loss_parts(lengths, groups):
        first = logits is None and "span" in encoder.heads  # the positives: others need no spans
        rank[rows], found = encoder(ids[rows, : lengths[rows].max()], lengths[rows], spans=first)
        logits = found if first else logits
    rank = rank[groups.clamp(min=0)].masked_fill(groups < 0, -torch.inf)  # (B, M)
    loss = -rank.log_softmax(1)[:, 0].sum()
    if logits is None or not has_span.any():
        return loss
    lengths, spans = lengths[groups[has_span, 0]], spans[has_span]
    padding = torch.arange(logits.shape[1], device=ids.device) >= lengths[:, None]
    logits = logits[has_span].float().masked_fill(padding[..., None], -torch.inf)
    logprobs = logits.log_softmax(1).gather(1, spans.clamp(min=0)).sum(-1)  # (B, S)
    return loss - logprobs.masked_fill(spans[..., 0] < 0, -torch.inf).logsumexp(1).sum()


def loss_parts(lengths: Tensor, groups: Tensor) -> list[Tensor]:
    """The rows that `reranker_loss` reads together: the positives, and others of similar length."""
    rows, n = groups[:, 1:][groups[:, 1:] >= 0], 32 if lengths.is_cuda else 16  # few: less padding
    return [groups[:, 0], *(part for part in rows[lengths[rows].argsort()].split(n) if len(part))]


# Cross-fitting and packing


def cross_fit(
    items: Sequence, train_fn: Callable, score_fn: Callable, seed: int, key: Callable = str
) -> tuple[list, list[str], object]:
    """Score training items with models that never saw them (Levine et al. 2022, section 3.1).

    A model sorts the passages of its own training questions better than those of new ones, so data
    made with such scores would not look like dev data. train_fn(items) -> model is called for half
    A, half B and all, in this order. score_fn(model, items) returns one score per item: B's model
    scores half A, and A's model half B. Items with the same `key` lie in the same half.

    Returns (the score of each item, its half "A" or "B", the model of all items, for dev and test).
    ValueError if there are fewer than two keys, or if a score is missing.
    """
    keys = list(dict.fromkeys(map(key, items)))
    if len(keys) < 2:
        raise ValueError(f"cross-fitting needs at least two questions, got {len(keys)}")
    order = np.random.default_rng(seed).permutation(len(keys))
    half_of = {keys[i]: "AB"[rank % 2] for rank, i in enumerate(order)}
    halves, scores = [half_of[key(item)] for item in items], [None] * len(items)
    rows = {half: [i for i, h in enumerate(halves) if h == half] for half in "AB"}
    models = {half: train_fn([items[i] for i in rows[half]]) for half in "AB"}
    model = train_fn(list(items))
    for half, other in ("AB", "BA"):
        found = list(score_fn(models[other], [items[i] for i in rows[half]]))
        if len(found) != len(rows[half]):
            raise ValueError(f"{len(rows[half])} items of half {half} got {len(found)} scores")
        for i, score in zip(rows[half], found):
            scores[i] = score
    return scores, halves, model


def pack(
    passages: Sequence, scores: Sequence[float], budget: int, count: Callable
) -> tuple[list, int]:
    """Fill an LM's context greedily, in descending score (Levine et al. 2022, section 3.1).

    count(passage) is its number of tokens, and `budget` the number that prompt, question and answer
    leave. A passage that does not fit is dropped; a shorter one behind it may still fit. Returns
    (packed passages, best first; number of dropped ones). ValueError if the scores are not finite
    or not as many as the passages.
    """
    values = np.array([float(score) for score in scores])
    if len(values) != len(passages) or not np.isfinite(values).all():
        raise ValueError(f"{len(passages)} passages need as many finite scores, got {values}")
    packed = []
    for row in np.argsort(-values, kind="stable"):
        tokens = count(passages[row])
        if tokens <= budget:
            packed.append(passages[row])
            budget -= tokens
    return packed, len(passages) - len(packed)


def __getattr__(name: str):
    """`from rerank import BM25` works where retrieve.py is: it stands there, to keep this short."""
    if name != "BM25":
        raise AttributeError(f"module 'rerank' has no attribute {name!r}")
    from retrieve import BM25

    return BM25


def main(argv: list[str] | None = None) -> BertConfig:
    from show import Parser, show

    from checkpoints import read_tensors, resolve

    parser = Parser(prog="rerank.py", description="Print what a BERT checkpoint holds.")
    parser.add_argument("folder")
    folder = resolve(parser.parse_args(argv).folder)
    bert = Bert.from_pretrained(folder)
    show(f"{bert.config}, {sum(p.numel() for p in bert.parameters()):,} parameters", result=True)
    format = find_format(read_tensors(folder / "model.safetensors"))
    show(str(FORMATS[format]) if format else "an encoder alone, without heads", result=True)
    return bert.config


if __name__ == "__main__":
    show.run_program("rerank.py", main)
