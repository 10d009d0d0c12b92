"""How published checkpoints write the shape of a model: config.json <-> our fields.

Seven families of decoders share one model.Config. A family is a row of FAMILIES: the keys of
config.json that it reads, each with its default, and the published names of our modules. KEYS says
which values each key may have. BERT and T5 are translated by the same tables.

    config_from_hf(path) -> the arguments of model.Config, as a dict
    config_to_hf(fields, dtype) -> what config.json holds

checkpoints.py reads and writes the folders. Needs torch, for the names of dtypes.

    from families import config_from_hf
    print(config_from_hf("assets/lm/config.json"))
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

# Kinds of values in JSON files
COUNT = "a positive whole number"
COUNT_OR_NULL = "a positive whole number or null"
WHOLE = "a whole number from 0"
LAYERS = "a number of layers from 1 to 10,000"
NUMBER = "a number"
POSITIVE = "a positive number"
SHARE = "a number from 0 to 1"
SWITCH = "true or false"
TEXT = "a text"
ID = "a text or a whole number"
TEXTS = "a list of at least one text"
FILES = "a text, a list of texts or null"
IDS = "a list of token ids or null"
OBJECT = "an object"
OBJECTS = "a list of objects"
ANY = "anything"  # checked where it is used
VALUE_CHECKS = {
    COUNT: lambda x: type(x) is int and x > 0,  # isinstance would accept true
    COUNT_OR_NULL: lambda x: x is None or type(x) is int and x > 0,
    WHOLE: lambda x: type(x) is int and x >= 0,
    LAYERS: lambda x: type(x) is int and 0 < x <= 10_000,
    NUMBER: lambda x: type(x) in (int, float),
    POSITIVE: lambda x: type(x) in (int, float) and 0 < x < math.inf,
    SHARE: lambda x: type(x) in (int, float) and 0 <= x <= 1,
    SWITCH: lambda x: isinstance(x, bool),
    TEXT: lambda x: isinstance(x, str),
    ID: lambda x: isinstance(x, str) or type(x) is int,
    TEXTS: lambda x: isinstance(x, list) and x and all(isinstance(text, str) for text in x),
    FILES: lambda x: x in (None, []) or isinstance(x, str) or VALUE_CHECKS[TEXTS](x),
    IDS: lambda x: x is None or isinstance(x, list) and all(type(i) is int and i >= 0 for i in x),
    OBJECT: lambda x: isinstance(x, dict),
    OBJECTS: lambda x: isinstance(x, list) and x and all(isinstance(part, dict) for part in x),
    ANY: lambda x: True,
}
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu")
KEYS = {  # each key of config.json: (the field it is copied to, its kind or supported values)
    "vocab_size": ("vocab_size", COUNT),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model"], ("dim", COUNT)),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers"], ("n_layers", LAYERS)),
    **dict.fromkeys(["num_attention_heads", "n_head", "num_heads"], ("n_heads", COUNT)),
    "num_key_value_heads": ("n_kv_heads", COUNT_OR_NULL),  # null: n_heads
    "head_dim": ("head_dim", COUNT_OR_NULL),  # null: dim / n_heads
    "d_kv": ("head_dim", COUNT),
    **dict.fromkeys(["intermediate_size", "d_ff"], ("hidden_dim", COUNT)),
    "n_inner": ("hidden_dim", COUNT_OR_NULL),  # null: 4 dim
    **dict.fromkeys(["max_position_embeddings", "n_positions"], ("max_len", COUNT)),
    **dict.fromkeys(["rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"], ("norm_eps", NUMBER)),
    **dict.fromkeys(["hidden_act", "activation_function"], ("activation", ACTIVATIONS)),
    "tie_word_embeddings": ("tied", SWITCH),
    "attention_bias": ("qkv_bias", SWITCH),  # and o_bias
    "mlp_bias": ("mlp_bias", SWITCH),
    "use_parallel_residual": ("parallel", SWITCH),
    "scale_attn_by_inverse_layer_idx": ("divide_by_depth", SWITCH),
    "rotary_pct": (None, ANY),  # see read_rope
    "use_sliding_window": (None, SWITCH),  # this one and the next three: see read_windows
    "sliding_window": (None, ANY),
    "max_window_layers": (None, WHOLE),
    "layer_types": (None, ANY),
    **dict.fromkeys(["quantization_config", "compression_config"], (None, (None,))),
    "scale_attn_weights": (None, (True,)),
    "add_cross_attention": (None, (False,)),
    "type_vocab_size": ("token_types", COUNT),
    "position_embedding_type": (None, ("absolute",)),
    "hidden_dropout_prob": ("dropout", NUMBER),
    "feed_forward_proj": (None, ("relu", "gated-gelu")),
    "relative_attention_num_buckets": ("buckets", COUNT),
    "relative_attention_max_distance": ("max_distance", COUNT),
}

REQUIRED = object()


def required(keys: str) -> dict:
    """Return {key: REQUIRED} for keys separated by spaces."""
    return dict.fromkeys(keys.split(), REQUIRED)


# Keys and their defaults
SIZE_KEYS = required(
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
    "max_position_embeddings"
)
LLAMA_KEYS = SIZE_KEYS | {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
BIAS_KEYS = {"attention_bias": False}
HEAD_KEYS = {"num_key_value_heads": None, "head_dim": None}
MISTRAL_WINDOW_KEYS = {"sliding_window": 4096, "layer_types": None}
QWEN_WINDOW_KEYS = {"use_sliding_window": False} | MISTRAL_WINDOW_KEYS | {"max_window_layers": 28}
GPT_NEOX_KEYS = SIZE_KEYS | {
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "tie_word_embeddings": False,
    "attention_bias": True,
    "use_parallel_residual": True,
    "rotary_pct": 0.25,
}
GPT2_KEYS = required("vocab_size n_embd n_layer n_head") | {
    "n_inner": None,
    "n_positions": REQUIRED,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
    "scale_attn_by_inverse_layer_idx": False,
}
# Keys of every family, supported only with these values
QUANTISED_KEYS = {"quantization_config": None, "compression_config": None}
COMMON_KEYS = QUANTISED_KEYS | {"scale_attn_weights": True, "add_cross_attention": False}
# Fields of GPT-NeoX and GPT-2: LayerNorm, not RMSNorm, and an MLP of two matrices with biases
GPT_FIELDS = {"layer_norm": True, "gated": False, "mlp_bias": True}
BERT_KEYS = SIZE_KEYS | {
    "type_vocab_size": REQUIRED,
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
}
T5_KEYS = required("vocab_size d_model num_layers num_heads d_kv d_ff") | {
    "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one model_type express a model.Config."""

    architecture: str
    defaults: dict  # key of config.json -> its default, or REQUIRED
    fixed: dict = field(default_factory=dict)  # fields in which the whole family differs from Llama
    prefix: str = "model."  # of all published tensor names but the head's
    names: dict = field(default_factory=dict)  # our module name -> the published one
    fused: str | None = None  # q, k, v in one tensor, as three "blocks" or head by head ("heads")
    eos: int | None = None  # the end token of a checkpoint whose files name none

    def hf_name(self, name: str) -> str:
        """Return the published name of one of our tensors."""
        prefix = "" if name.startswith("lm_head.") else self.prefix
        name = "." + name  # so that .norm. is replaced, and input_layernorm is not
        for ours, theirs in self.names.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        return prefix + name[1:]

    def our_name(self, name: str) -> str:
        """The inverse of `hf_name`."""
        name = "." + name.removeprefix(self.prefix)
        for ours, theirs in self.names.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
        return name[1:]


FAMILIES = {
    # RMSNorm, gated MLP, rope, grouped heads; biases if config.json asks for them
    "llama": Family(
        "LlamaForCausalLM", LLAMA_KEYS | BIAS_KEYS | {"mlp_bias": False} | HEAD_KEYS, eos=2
    ),
    # Llama with a sliding window
    "mistral": Family(
        "MistralForCausalLM",
        LLAMA_KEYS | HEAD_KEYS | {"num_key_value_heads": 8} | MISTRAL_WINDOW_KEYS,
        eos=2,
    ),
    # Llama with biases on q, k and v; some layers may have a window
    "qwen2": Family(
        "Qwen2ForCausalLM",
        LLAMA_KEYS | HEAD_KEYS | {"num_key_value_heads": 32} | QWEN_WINDOW_KEYS,
        fixed={"qkv_bias": True},
    ),
    # Llama with a norm on the q and k of each head; some layers may have a window
    "qwen3": Family(
        "Qwen3ForCausalLM",
        LLAMA_KEYS | BIAS_KEYS | {"num_key_value_heads": 32, "head_dim": 128} | QWEN_WINDOW_KEYS,
        fixed={"qk_norm": "head"},
    ),
    # Llama with norms after attention and MLP, and on all of q and k together
    "olmo2": Family(
        "Olmo2ForCausalLM",
        LLAMA_KEYS | {"rms_norm_eps": 1e-5} | BIAS_KEYS | HEAD_KEYS,
        fixed={"qk_norm": "width", "post_norm": True},
        eos=50279,
    ),
    # Attention and MLP side by side, rope on a part of each head, biases (Pythia is one)
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        GPT_NEOX_KEYS,
        fixed=GPT_FIELDS,
        prefix="gpt_neox.",
        names={
            "embed_tokens": "embed_in",
            "self_attn.qkv_proj": "attention.query_key_value",
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
            "norm": "final_layer_norm",
            "lm_head": "embed_out",
        },
        fused="heads",
        eos=2,
    ),
    # Learned positions, biases
    "gpt2": Family(
        "GPT2LMHeadModel",
        GPT2_KEYS,
        fixed=GPT_FIELDS | {"qkv_bias": True, "o_bias": True, "learned_positions": True},
        prefix="transformer.",
        names={
            "embed_tokens": "wte",
            "embed_positions": "wpe",
            "layers": "h",
            "input_layernorm": "ln_1",
            "self_attn.qkv_proj": "attn.c_attn",
            "self_attn.o_proj": "attn.c_proj",
            "post_attention_layernorm": "ln_2",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
            "norm": "ln_f",
        },
        fused="blocks",
        eos=50256,
    ),
}


def read_json(path: str | Path) -> dict:
    """Return the object in a JSON file. FileNotFoundError or ValueError names the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: no {path.name} there")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # recursion: brackets nested too deep
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__} where an object is expected")
    return value


def check_value(path: str | Path, key: str, value, allowed: str | tuple) -> None:
    """ValueError unless `value` is of a kind in VALUE_CHECKS, or one of a tuple; it names both."""
    if isinstance(allowed, str):
        if not VALUE_CHECKS[allowed](value):
            raise ValueError(f"{path}: {key} is {value!r}, not {allowed}")
    elif value not in allowed:
        supported = f"; supported: {', '.join(map(str, allowed))}"
        if len(allowed) == 1:
            supported = f" (only {allowed[0]!r})"
        raise ValueError(f"{path}: {key} {value!r} is not supported{supported}")


def check_keys(path: str | Path, record, kinds: dict, needed=()) -> None:
    """ValueError, which begins with `path`, unless `record` is an object with the needed keys, and
    its values are of `kinds`: {key: one of VALUE_CHECKS, or the supported values}."""
    check_value(path, "this", record, OBJECT)
    for key in needed:
        if key not in record:
            raise ValueError(f"{path}: the key {key!r} is missing")
    for key, kind in kinds.items():
        if key in record:
            check_value(path, key, record[key], kind)


def read_keys(path: Path, raw: dict, defaults: dict) -> tuple[dict, dict]:
    """Read and check the keys of `defaults`. Return {field: value} for those that KEYS copies to a
    field, and {key: value} for all. ValueError names a key that is missing or not supported."""
    needed = [key for key, default in defaults.items() if default is REQUIRED]
    check_keys(path, raw, {key: KEYS[key][1] for key in defaults}, needed)
    values = {key: raw.get(key, default) for key, default in defaults.items()}
    fields = {KEYS[key][0]: value for key, value in values.items() if KEYS[key][0] is not None}
    return fields, values


# Decoders


def config_from_hf(path: str | Path) -> dict:
    """Return the fields of model.Config from the config.json of one of FAMILIES. ValueError if a
    key is missing or not supported; it names the key."""
    path = Path(path)
    raw = read_json(path)
    family_name = raw.get("model_type")
    check_value(path, "model_type", family_name, tuple(FAMILIES))
    family = FAMILIES[family_name]
    fields, values = read_keys(path, raw, family.defaults | COMMON_KEYS)
    heads, dim = fields["n_heads"], fields["dim"]
    fields["hidden_dim"] = fields["hidden_dim"] or 4 * dim
    fields["n_kv_heads"] = kv_heads = fields.get("n_kv_heads") or heads
    fields["head_dim"] = head_dim = fields.get("head_dim") or dim // heads
    if heads % kv_heads or not head_dim:
        problem = f"{heads} heads of width {head_dim} cannot share {kv_heads} keys and values"
        raise ValueError(f"{path}: {problem}")
    if "attention_bias" in values:
        fields["o_bias"] = fields["qkv_bias"]
    fields |= family.fixed | {"family": family_name, "bos": raw.get("bos_token_id")}
    fields["eos"] = read_eos(path, raw, family.eos, fields["vocab_size"])
    if not fields.get("learned_positions"):
        fields |= read_rope(path, raw, fields, values.get("rotary_pct"))
    return fields | {"windows": read_windows(path, values, fields)}


def read_eos(path: Path, raw: dict, default: int | None, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that end a text.

    As in transformers, generation_config.json beside config.json decides. Without it config.json
    does, where null means none. If neither has the key, it is the family's `default`, or none if
    that is outside the vocabulary. The ids of config.json come first: training appends the first.
    """
    key, beside = "eos_token_id", path.with_name("generation_config.json")
    first = token_list(raw.get(key))
    source, ids = beside, token_list(read_json(beside).get(key)) if beside.is_file() else []
    if not ids:
        source, ids = path, first
    if not ids and key not in raw and default is not None and default < vocab_size:
        ids = [default]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(f"{source}: {key} is {token!r}, not an id from 0 to {vocab_size - 1}")
    return tuple(dict.fromkeys([token for token in first if token in ids] + ids))


def token_list(ids) -> list:
    """Return the ids of a key that holds one token id, a list of them or null."""
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


ORIGINAL_LEN = "original_max_position_embeddings"
ROPE_NUMBERS = {  # of each rope type, in the order of Config.rope_scaling
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL_LEN),
}


def read_rope(path: Path, raw: dict, fields: dict, rotary_pct: float | None) -> dict:
    """Return the fields of rotary position embeddings and max_len, which linear scaling multiplies.

    They are in rope_parameters or in the older rope_theta and rope_scaling (in GPT-NeoX
    rotary_emb_base and rotary_pct).
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_scaling {rope!r} is not an object")
    if any(isinstance(value, dict) for value in rope.values()):
        layers = ", ".join(rope)
        raise ValueError(f"{path}: rope_parameters of their own for {layers} are not supported")
    theta = raw.get("rotary_emb_base") or raw.get("rope_theta") or 10_000.0
    rope = {"rope_theta": theta, "rope_type": rope.get("type", "default")} | rope
    check_value(path, "rope type", rope["rope_type"], tuple(ROPE_NUMBERS))
    max_len = fields["max_len"]
    rope[ORIGINAL_LEN] = raw.get(ORIGINAL_LEN) or rope.get(ORIGINAL_LEN) or max_len
    numbers = ROPE_NUMBERS[rope["rope_type"]]
    for key in ("rope_theta", *numbers):
        check_value(path, key, rope.get(key), POSITIVE)
    if rope["rope_type"] == "linear":  # max_position_embeddings is the length before stretching
        max_len = int(max_len * rope["factor"])
    partial = raw.get("partial_rotary_factor", 1.0) if rotary_pct is None else rotary_pct
    partial = rope.get("partial_rotary_factor", partial)
    return {
        "max_len": max_len,
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": tuple(rope[key] for key in numbers),
        "rotary_dim": read_rotary_dim(path, partial, fields),
    }


def read_rotary_dim(path: Path, fraction: float, fields: dict) -> int | None:
    """How many channels of a head rope rotates, None for all. Only GPT-NeoX rotates a part."""
    family, head_dim = fields["family"], fields["head_dim"]
    in_range = VALUE_CHECKS[POSITIVE](fraction) and fraction <= 1
    if not in_range or (fraction != 1 and family != "gpt_neox"):
        problem = f"partial_rotary_factor {fraction!r} is not supported for {family}"
        raise ValueError(f"{path}: {problem}")
    rotated = int(head_dim * fraction)
    if rotated % 2 or not rotated:
        problem = f"of a head's {head_dim} channels {rotated} would be rotated by position"
        raise ValueError(f"{path}: {problem}, but rope rotates pairs")
    return None if rotated == head_dim else rotated


def read_windows(path: Path, values: dict, fields: dict) -> tuple[int | None, ...]:
    """Return the sliding window of each layer, None for a layer without one; () if none has one.

    layer_types names the layers with a window. Without layer_types, those from number
    max_window_layers on have a window. Mistral has no such key: there, all have one.
    """
    n_layers, family_name = fields["n_layers"], fields["family"]
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    if window is not None:
        check_value(path, "sliding_window", window, COUNT)
    types = values.get("layer_types")
    if not types:
        full = n_layers if window is None else min(n_layers, values.get("max_window_layers", 0))
        types = ["full_attention"] * full + ["sliding_attention"] * (n_layers - full)
    known = ("full_attention", "sliding_attention")
    fits = isinstance(types, list) and len(types) == n_layers and all(t in known for t in types)
    if not fits:
        problem = f"is not supported for {n_layers} layers of {family_name}"
        raise ValueError(f"{path}: layer_types {types!r} {problem}")
    if "sliding_attention" not in types:
        return ()
    if window is None:
        problem = "but sliding_window and use_sliding_window set no window"
        raise ValueError(f"{path}: layer_types names sliding_attention, {problem}")
    return tuple(window if name == "sliding_attention" else None for name in types)


def config_to_hf(fields: dict, dtype: torch.dtype) -> dict:
    """Return what config.json holds: the inverse of `config_from_hf`."""
    family_name, scaling = fields["family"], fields["rope_scaling"]
    family = FAMILIES[family_name]
    stretch = scaling[0] if len(scaling) == 1 else 1
    fields = fields | {"max_len": round(fields["max_len"] / stretch)}
    rotated = (fields["rotary_dim"] or fields["head_dim"]) / fields["head_dim"]
    published = {"architectures": [family.architecture], "model_type": family_name}
    values = {"rotary_pct": rotated} | windows_to_hf(fields)
    published |= keys_to_hf(family.defaults, fields, values)
    if not fields["learned_positions"]:
        theta = "rotary_emb_base" if family_name == "gpt_neox" else "rope_theta"
        published[theta] = fields["rope_theta"]
    if scaling:
        rope_type = "linear" if len(scaling) == 1 else "llama3"
        numbers = dict(zip(ROPE_NUMBERS[rope_type], scaling))
        published["rope_scaling"] = {"rope_type": rope_type} | numbers
    eos = list(fields["eos"])
    if len(eos) < 2:
        eos = eos[0] if eos else None
    published |= {"bos_token_id": fields["bos"], "eos_token_id": eos}
    return published | {"torch_dtype": str(dtype).removeprefix("torch.")}


def keys_to_hf(defaults: dict, fields: dict, values: dict) -> dict:
    """The inverse of `read_keys`, without the keys that neither dict has a value for."""
    published = {}
    for key in defaults:
        name = KEYS[key][0]
        if name in fields:
            published[key] = fields[name]
        elif key in values:
            published[key] = values[key]
    return published


def windows_to_hf(fields: dict) -> dict:
    """Return the keys that `read_windows` reads, with layer_types for max_window_layers."""
    windows = fields["windows"] or (None,) * fields["n_layers"]
    widths = [window for window in windows if window is not None]
    values = {"use_sliding_window": bool(widths), "sliding_window": widths[0] if widths else None}
    # transformers takes a Mistral with layer_types for another model.
    if fields["family"] != "mistral" or len(set(windows)) > 1:
        names = ["full_attention" if w is None else "sliding_attention" for w in windows]
        values["layer_types"] = names
    return values


# Encoders


def bert_from_hf(path: str | Path) -> dict:
    """Return the fields of rerank.BertConfig. ValueError if a key is not supported; it names it."""
    path = Path(path)
    raw = read_json(path)
    if raw.get("model_type") not in ("bert", "dpr"):  # DPR's encoders and reader are BERTs
        raise ValueError(f"{path}: model_type is neither bert nor dpr")
    fields, _ = read_keys(path, raw, BERT_KEYS | QUANTISED_KEYS)
    check_value(path, "hidden_act", fields.pop("activation"), ("gelu",))  # all that rerank.py has
    dim, heads = fields["dim"], fields["n_heads"]
    if dim % heads:
        raise ValueError(f"{path}: hidden_size {dim} is not a multiple of its {heads} heads")
    return fields


def bert_to_hf(fields: dict) -> dict:
    """Return what the config.json of a BERT holds."""
    published = {"architectures": ["BertModel"], "model_type": "bert"}
    published |= keys_to_hf(BERT_KEYS, fields, {"hidden_act": "gelu"})
    return published | {"attention_probs_dropout_prob": fields["dropout"]}


def t5_from_hf(path: str | Path) -> dict:
    """Return the fields of t5.T5Config. ValueError if a key is not supported; it names it."""
    path = Path(path)
    raw = read_json(path)
    if raw.get("model_type") not in ("t5", "mt5"):
        raise ValueError(f"{path}: model_type is neither t5 nor mt5")
    fields, values = read_keys(path, raw, T5_KEYS | QUANTISED_KEYS)
    return fields | {"gated": values["feed_forward_proj"] == "gated-gelu"}


def t5_to_hf(fields: dict) -> dict:
    """Return what the config.json of a T5 encoder holds."""
    published = {"architectures": ["T5EncoderModel"], "model_type": "t5"}
    mlp = "gated-gelu" if fields["gated"] else "relu"
    published |= keys_to_hf(T5_KEYS, fields, {"feed_forward_proj": mlp})
    return published | {"is_encoder_decoder": False}
