"""Published checkpoint folders: reading, writing, hashing, and the hub.

A folder holds config.json, model.safetensors (or shards with an index) and a tokenizer's files.
This file turns it into plain dicts and back, and knows no model class:

    fields     the arguments of model.Config                 read_config, write_checkpoint
    tensors    {parameter name of model.LM: tensor}          read_weights, write_checkpoint

Our parameter names are Llama's published names without the leading `model.`, so Llama, Mistral,
Qwen2, Qwen3 and OLMo-2 load name for name. GPT-2 and GPT-NeoX fuse q, k and v and use other names:
`from_hf` and `to_hf` convert them; hf stands for Hugging Face's published names and layout.

Needs torch, safetensors, tokenizers and families.py; huggingface_hub only to download.

    from checkpoints import load_tokenizer, read_config
    print(read_config("assets/lm"), load_tokenizer("assets/lm").encode("Hello").ids)      # 0.1 s
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import BertProcessing, TemplateProcessing
from torch import Tensor

from families import FAMILIES, config_from_hf, config_to_hf, read_json

Shapes = dict[str, torch.Size]

# LMs


def read_config(folder: str | Path) -> dict:
    """Return the fields of model.Config.

    `tied` is False if the files hold an output table that differs from the embeddings, whatever
    config.json says. ValueError if a key is missing or not supported; it names the key.
    """
    fields = config_from_hf(Path(folder) / "config.json")
    if fields["tied"] and any(Path(folder).glob("model*.safetensors*")):
        fields["tied"] = not has_own_head(folder, fields["family"])
    return fields


def has_own_head(folder: str | Path, family_name: str) -> bool:
    """Whether the files store an output table that differs from the embeddings."""
    family, weights = FAMILIES[family_name], weight_files(folder, family_name)
    head = weights.get(family.hf_name("lm_head.weight"))
    table = weights.get(family.hf_name("embed_tokens.weight"))
    if head is None or table is None:
        return False
    head, table = map_tensor(*head), map_tensor(*table)
    return head.dtype != table.dtype or not torch.equal(head, table)


def read_weights(folder: str | Path, fields: dict, shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    """Yield (our name, tensor) for every parameter of `shapes`, {our name: shape}.

    A tensor that needs no conversion is a view of the memory-mapped file: nothing is copied, and
    processes share it. All are mapped at first. Each is read from disk when it is used, and its
    mapping is released after it. ValueError, before the first is yielded, if tensors are missing,
    unexpected, quantised or of another shape; it gives their published names.
    """
    family, weights = FAMILIES[fields["family"]], weight_files(folder, fields["family"])
    if fields["tied"]:  # some files store the table under both names, or as the head alone
        head = weights.pop(family.hf_name("lm_head.weight"), None)
        if head is not None:
            weights.setdefault(family.hf_name("embed_tokens.weight"), head)
    tensors = {name: map_tensor(*place) for name, place in weights.items()}
    # to_hf on tensors without data gives the published names and shapes.
    ours = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    expected = {name: tensor.shape for name, tensor in to_hf(ours, fields).items()}
    check_tensors(tensors, expected, folder)
    for name in expected:
        yield from from_hf({name: tensors.pop(name)}, fields).items()


def write_checkpoint(
    folder: str | Path,
    fields: dict,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    tokenizer: Tokenizer | None = None,
    replace: bool = False,
) -> None:
    """Write config.json, model.safetensors and, if given, tokenizer.json in the published format.

    They are written to {folder}.unfinished, which is then renamed. FileExistsError if `folder`
    exists. With `replace` it is removed first; a kill then leaves only {folder}.unfinished.
    """
    if Path(folder).exists() and not replace:
        raise FileExistsError(f"{folder} exists; choose another folder")
    unfinished = Path(f"{Path(folder)}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process
    try:
        write_encoder(unfinished, config_to_hf(fields, dtype), to_hf(tensors, fields), dtype)
        if tokenizer is not None:
            with atomic_write(unfinished / "tokenizer.json") as path:
                tokenizer.save(str(path))
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def from_hf(tensors: dict[str, Tensor], fields: dict) -> dict[str, Tensor]:
    """Rename and convert published tensors. All are views, except GPT-NeoX's q, k and v."""
    family, converted = FAMILIES[fields["family"]], {}
    for name, tensor in tensors.items():
        name = family.our_name(name)
        if is_conv1d(name, tensor, fields):
            tensor = tensor.t()
        if ".qkv_proj." not in name:
            converted[name] = tensor
            continue
        for proj, part in zip(("q_proj", "k_proj", "v_proj"), split_qkv(tensor, fields)):
            shape = (len(tensor) // 3, *tensor.shape[1:])
            converted[name.replace("qkv_proj", proj)] = part.reshape(shape)
    return converted


def to_hf(tensors: dict[str, Tensor], fields: dict) -> dict[str, Tensor]:
    """The inverse of `from_hf`."""
    family, converted = FAMILIES[fields["family"]], {}
    for name, tensor in tensors.items():
        if family.fused and (".k_proj." in name or ".v_proj." in name):
            continue  # stored with q
        if family.fused and ".q_proj." in name:
            qkv = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            tensor, name = fuse_qkv(qkv, fields), name.replace("q_proj", "qkv_proj")
        if is_conv1d(name, tensor, fields):
            tensor = tensor.t()
        converted[family.hf_name(name)] = tensor
    return converted


def is_conv1d(name: str, tensor: Tensor, fields: dict) -> bool:
    """Whether GPT-2 stores a tensor transposed, as (inputs, outputs): transformers' Conv1D."""
    return fields["family"] == "gpt2" and name.startswith("layers.") and tensor.dim() == 2


def split_qkv(fused: Tensor, fields: dict) -> list[Tensor]:
    """Return views of q, k and v in a fused weight or bias (3 H D, ...).

    GPT-2 stores all of q, all of k, all of v: each (H D, ...). GPT-NeoX stores q, k and v of the
    first head, then of the second: each (H, D, ...).
    """
    if FAMILIES[fields["family"]].fused == "blocks":
        return list(fused.chunk(3))
    return list(fused.unflatten(0, (fields["n_heads"], 3, -1)).unbind(1))


def fuse_qkv(qkv: list[Tensor], fields: dict) -> Tensor:
    """The inverse of `split_qkv`."""
    # torch.cat on the meta device would import torch's compiler, which takes seconds.
    fused = qkv[0].new_empty(3 * len(qkv[0]), *qkv[0].shape[1:])
    for part, tensor in zip(split_qkv(fused, fields), qkv):
        part.copy_(tensor.view_as(part))
    return fused


# Tensors in files

NOT_WEIGHTS = (  # causal masks and rotary frequencies, which older files store like weights
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)


def weight_files(folder: str | Path, family_name: str) -> dict[str, tuple[Path, str]]:
    """Return {published name: (file, name in the file)}. Some files use other names."""
    weights = {}
    for stored, path in tensor_files(folder).items():
        name = stored
        if family_name == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
            name = "transformer." + name  # a file of the bare GPT2Model has no prefix
        if family_name == "gpt_neox" and name == "lm_head.weight":
            name = "embed_out.weight"
        if not name.endswith(NOT_WEIGHTS):
            weights[name] = (path, stored)
    return weights


def tensor_files(folder: str | Path) -> dict[str, Path]:
    """Return {tensor name: its file} for model.safetensors, or for the shards that its index names.

    FileNotFoundError or ValueError if there are no weights or only pickled ones, if a file is
    corrupt, or if a shard is missing or without its tensors; it names the file.
    """
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file() or not index.is_file():
        return dict.fromkeys(sorted(read_tensors(single)), single)
    try:
        files = {name: folder / shard for name, shard in read_json(index)["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not a safetensors index ({error!r})") from None
    for path in dict.fromkeys(files.values()):
        inside = Path(os.path.normpath(folder)) in Path(os.path.normpath(path)).parents
        if not (inside and path.is_file()):
            raise FileNotFoundError(f"{index}: names {path.name}, which is not in its folder")
        lacking = {name for name in files if files[name] == path} - set(read_tensors(path))
        if lacking:
            raise ValueError(f"{path}: lacks {min(lacking)}, which {index.name} places there")
    return files


def map_tensor(path: Path, name: str) -> Tensor:
    """Return one tensor as a view of the memory-mapped file.

    Each tensor has its own mapping, so that deleting the tensor frees the memory of its pages.
    """
    with safe_open(path, framework="pt", device="cpu") as file:
        return file.get_tensor(name)


def read_tensors(path: str | Path, fingerprint: str | None = None) -> dict[str, Tensor]:
    """Return all tensors of one safetensors file, as views of the memory-mapped file.

    FileNotFoundError or ValueError names a file that is missing, pickled, corrupt or another LM's.
    """
    path = Path(path)
    if not path.is_file():
        if any(path.parent.glob("*.bin")):
            raise FileNotFoundError(
                f"{path.parent}: holds only .bin weights, which are pickles that can run code and "
                "are never read here; convert them once with safetensors.torch.save_file"
            )
        raise FileNotFoundError(f"{path.parent}: no {path.name} there")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or corrupt ({error})") from None
    if fingerprint not in (None, metadata.get("fingerprint")):
        raise ValueError(f"{path}: belongs to another LM, or to none")
    return tensors


def check_tensors(found: dict[str, Tensor], expected: Shapes, source: str | Path) -> None:
    """ValueError if tensors are quantised, missing, unexpected or of another shape.

    It names the first few. Quantised means stored in whole numbers or in 8 bits: cast to floats,
    such numbers would not be the weights.
    """
    for name, tensor in found.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            stored = f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}"
            raise ValueError(f"{source}: {stored}; quantised checkpoints are not supported")
    misshapen = [
        f"{name} is {tuple(found[name].shape)}, not {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    missing, unexpected = sorted(expected.keys() - found), sorted(found.keys() - expected)
    problems = ("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)
    reports = []
    for problem, names in problems:
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            reports.append(f"{problem}: {', '.join(names[:3])}{more}")
    if reports:
        raise ValueError(f"{source}: the tensors do not fit the config; {'; '.join(reports)}")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to, then sync that file and rename it to `path`.

    So `path` always holds a complete file, either the old one or the new one.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except SafetensorError as error:  # safetensors' own type, also if the disk is full
        raise OSError(f"{path}: cannot be written ({error})") from None
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: str | Path, value: dict) -> None:
    """Write an object as a JSON file."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_lines(path: str | Path, records: list[dict]) -> None:
    """Write objects as JSON lines."""
    with atomic_write(path) as unfinished:
        lines = [json.dumps(record) + "\n" for record in records]
        unfinished.write_text("".join(lines), encoding="utf-8")


def write_tensors(path: str | Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write {name: tensor} as a safetensors file. Give one entry of metadata: two have no order."""
    with atomic_write(path) as unfinished:
        save_file(tensors, unfinished, metadata=metadata or {"format": "pt"})


def write_prefix(folder: str | Path, layers, lengths: Tensor | None, fingerprint: str) -> None:
    """Write the (keys, values) of an LM's layers, with its fingerprint, as prefix.safetensors."""
    keys, values = (torch.stack(part).detach().cpu() for part in zip(*layers))
    tensors = {"keys": keys, "values": values}
    if lengths is not None:
        tensors["lengths"] = lengths.cpu()
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_tensors(Path(folder) / "prefix.safetensors", tensors, fingerprint=fingerprint)


def read_prefix(folder: str | Path, fingerprint: str, like: Tensor) -> tuple:
    """Return (layers, lengths) that `write_prefix` wrote, with dtype and device of `like`."""
    found = read_tensors(Path(folder) / "prefix.safetensors", fingerprint)
    layers, lengths = zip(found["keys"].to(like), found["values"].to(like)), found.get("lengths")
    return list(layers), None if lengths is None else lengths.to(like.device)


def write_encoder(folder: str | Path, config: dict, tensors: dict[str, Tensor], dtype) -> None:
    """Write config.json and model.safetensors under published names. The folder may exist."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().to(dtype).contiguous() for name, t in tensors.items()}
    write_tensors(Path(folder) / "model.safetensors", tensors)
    write_json(Path(folder) / "config.json", config)


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Hash (name, dtype, shape, bytes) of every tensor, in the order of the names: hex SHA-256."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name} {dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def hash_checkpoint(folder: str | Path) -> str:
    """Return `hash_tensors` of the tensors as the files store them."""
    files = tensor_files(folder)
    return hash_tensors({name: map_tensor(path, name) for name, path in files.items()})


class skip_init(torch.overrides.TorchFunctionMode):
    """A context in which torch.nn.init does nothing.

    A model that a checkpoint fills needs no random numbers. On the meta device, drawing them would
    also import torch's compiler, which takes seconds.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


# The hub

HUB_FILES = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
HUB_FILES += ["model*.safetensors*", "vocab.json", "merges.txt", "vocab.txt"]


def resolve(path_or_hub_id: str | Path, files: list[str] = HUB_FILES) -> Path:
    """Return the local folder of a checkpoint.

    A hub id, `owner/name` or `owner/name@revision`, is downloaded first, without pickles. Files in
    the local cache need no network. FileNotFoundError if that fails; it says why in one line.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    is_hub_id = len(path.parts) == 2 and not str(path_or_hub_id).startswith((".", "/"))
    if not is_hub_id or path.parent.exists():  # runs/x beside a folder runs is a mistyped path
        raise FileNotFoundError(f"{path}: no such checkpoint folder")
    from huggingface_hub import snapshot_download

    name, _, revision = path.as_posix().partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
    except Exception as error:  # the hub's errors and its HTTP client's share no base class
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
        raise FileNotFoundError(f"{path}: no such folder; the download failed: {reason}") from None
    if files == HUB_FILES and not any(folder.glob("model*.safetensors")):
        raise FileNotFoundError(
            f"{path}: the repository has no model.safetensors, and pickled weights (.bin) can run "
            "code and are never read here"
        )
    return folder


# Tokenizers


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Return the tokenizer of a checkpoint folder, or of one of its files.

    A folder is read from tokenizer.json, else from vocab.json with merges.txt (GPT-2's byte-level
    BPE), else from vocab.txt (BERT's WordPiece). `encode(text)` adds the special tokens that the
    published tokenizer adds: a BOS for Llama and Mistral, [CLS] and [SEP] for BERT, nothing for
    GPT-2, GPT-NeoX, Qwen and OLMo-2. Special tokens written in a text are recognised.
    ValueError if it belongs to another LM than one with `vocab_size` rows of embeddings. Its base
    vocabulary and the tokens around every text must fit. An added token that lies beyond the table,
    such as a <pad> without a row, does no harm until a text contains it, and is refused there.
    """
    path, readers = Path(path), {"vocab.json": gpt2_tokenizer, "vocab.txt": bert_tokenizer}
    if path.is_dir():
        candidates = [path / name for name in ("tokenizer.json", *readers)]
        path = next(filter(Path.is_file, candidates), candidates[0])
    if not path.is_file():
        message = f"{path}: no such tokenizer file"
        if (path.parent / "tokenizer.model").is_file():
            message += " (a SentencePiece tokenizer.model is not read, only a tokenizer.json)"
        raise FileNotFoundError(message)
    reader = readers.get(path.name)
    try:
        tokenizer = reader(path) if reader else Tokenizer.from_file(str(path))
    except (ValueError, OSError):
        raise
    except Exception as error:  # tokenizers raises bare Exception
        file_name = path.name if reader else "tokenizer.json"
        raise ValueError(f"{path}: not a {file_name} ({error})") from None
    tokenizer.no_padding()  # tokenizer.json may hold a training script's padding and truncation
    tokenizer.no_truncation()
    flag_end_token(tokenizer, path.with_name("tokenizer_config.json"))
    base = tokenizer.get_vocab(with_added_tokens=False).values()
    largest = max([*base, *tokenizer.encode("").ids], default=-1)
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"{path}: the tokenizer's ids go up to {largest}, the LM's embedding table has "
            f"{vocab_size} rows: it belongs to another LM"
        )
    return tokenizer


def flag_end_token(tokenizer: Tokenizer, settings_path: Path) -> None:
    """Make the end token that tokenizer_config.json names special, so that `decode` drops it."""
    settings = read_json(settings_path) if settings_path.is_file() else {}
    text = settings.get("eos_token")
    if isinstance(text, dict):
        text = text.get("content")
    index = tokenizer.token_to_id(text) if isinstance(text, str) else None
    if index is not None:
        added = tokenizer.get_added_tokens_decoder().get(index)
        tokenizer.add_special_tokens([added or AddedToken(text, normalized=False)])


def tokenizer_settings(folder: Path, class_name: str) -> dict:
    """Return tokenizer_config.json, {} if there is none. ValueError if it names another class."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    name = settings.get("tokenizer_class") or class_name
    if str(name).removesuffix("Fast") != class_name:
        raise ValueError(f"{path}: a {name} is read from its tokenizer.json only, which is missing")
    return settings


def gpt2_tokenizer(path: Path) -> Tokenizer:
    """Return GPT-2's byte-level BPE from vocab.json and the merges.txt beside it."""
    settings = tokenizer_settings(path.parent, "GPT2Tokenizer")
    merges = path.with_name("merges.txt")
    if not merges.is_file():
        raise FileNotFoundError(f"{merges}: missing; {path} is of no use without it")
    tokenizer = Tokenizer(models.BPE.from_file(str(path), str(merges)))
    prefix_space = bool(settings.get("add_prefix_space"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    special = {}
    for role in ("bos_token", "eos_token", "unk_token"):
        token = settings.get(role) or "<|endoftext|>"
        special[role] = token["content"] if isinstance(token, dict) else token
    known = [token for token in special.values() if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens(list(dict.fromkeys(known)))
    added = settings.get("added_tokens_decoder", {})
    for index in sorted(added, key=int):
        token = AddedToken(**{key: value for key, value in added[index].items() if key != "__type"})
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
    if settings.get("add_bos_token"):
        bos = special["bos_token"]
        tokens = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", tokens)
    return tokenizer


def bert_tokenizer(path: Path) -> Tokenizer:
    """Return BERT's WordPiece from vocab.txt, which has one token a line."""
    settings = tokenizer_settings(path.parent, "BertTokenizer")
    special = ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"]
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocab = {token: i for i, token in enumerate(lines)}
    if not vocab.keys() >= set(special):
        raise ValueError(f"{path}: not BERT's vocabulary, which has {', '.join(special)}")
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    sep, cls = ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"])
    tokenizer.post_processor = BertProcessing(sep, cls)
    tokenizer.add_special_tokens(special)
    return tokenizer
