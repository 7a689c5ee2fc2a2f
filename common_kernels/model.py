"""What a model asks of our kernels, read from its Hugging Face config: data in, data out.

Knows no engine and imports no torch, so that a model can be judged on a machine that has neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from taut.common_kernels.problem import Problem

# Where a multimodal config keeps that of its language model, the outermost first.
NESTED = ("thinker_config", "text_config", "llm_config", "language_config")

# One quantity has several names.
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "multi_query_group_num")
HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
HEAD_DIM = ("head_dim", "attention_head_dim", "kv_channels")
WINDOW = ("sliding_window", "local_attention")

# Models that have these without a key that says so.
ENCODERS = frozenset(
    {
        "albert",
        "bert",
        "camembert",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "ernie",
        "eurobert",
        "modernbert",
        "mpnet",
        "new",
        "nomic_bert",
        "roberta",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
    }
)
ALTERNATING = frozenset({"gemma2", "gemma3", "gemma3_text", "cohere2", "gpt_oss"})
SINKS = frozenset({"gpt_oss"})

# Layer types that are no attention at all, or not ours.
NO_ATTENTION = frozenset({"linear_attention", "mamba", "conv", "recurrent", "mlp", "moe"})
SPARSE = frozenset({"compressed_sparse_attention", "heavily_compressed_attention", "indexed_attention"})
WINDOWED = frozenset({"sliding_attention", "window_attention"})


@dataclass(frozen=True)
class _Layers:
    """One kind of layer of a model: whether its keys are windowed, and its heads."""

    windowed: bool
    kv_heads: int
    head_size: int


def is_mla(config: Mapping[str, Any]) -> bool:
    """Whether a model keeps latent vectors instead of keys and values (multi-head latent attention)."""
    return text_config(config).get("kv_lora_rank") is not None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model; the dtype comes along if only the whole says it."""
    for key in NESTED:
        inner = config.get(key)
        if isinstance(inner, Mapping):
            outer = {name: config[name] for name in ("dtype", "torch_dtype") if config.get(name)}
            said = any(inner.get(name) for name in ("dtype", "torch_dtype"))
            return text_config(inner if said else {**inner, **outer})
    return config


def problems_of_model(
    config: Mapping[str, Any],
    *,
    target: str,
    dtype: str | None = None,
    cache_dtype: str | None = None,
    page_size: int = 16,
    tensor_parallel: int = 1,
) -> list[Problem]:
    """Every problem that a model's layers pose, each once, attention before what stores its keys.

    Args:
        config: the content of the model's `config.json`.
        target: what it is to run on: "cpu", "sm_90".
        dtype: of the queries, by torch's name; None for that of the config, or bfloat16 where it tells none.
        cache_dtype: of the cache; None for `dtype`.
        page_size: tokens in one page of the cache.
        tensor_parallel: over how many devices the heads are shared out.

    Raises:
        ValueError: a key is missing or has no use here; it is named.
    """
    text = text_config(config)
    if config.get("is_encoder_decoder") or text.get("is_encoder_decoder"):
        raise ValueError("is_encoder_decoder: cross attention is none of our operations")
    name = _dtype_name(dtype or text.get("dtype") or text.get("torch_dtype") or "bfloat16")
    heads = _number(text, HEADS)
    if heads % tensor_parallel:
        raise ValueError(f"{heads} query heads cannot be shared out over {tensor_parallel} devices")
    shared = Problem(
        operation="paged_attention",
        target=target,
        dtype=name,
        cache_dtype=_dtype_name(cache_dtype or name),
        q_heads=heads // tensor_parallel,
        kv_heads=1,
        head_size=0,
        value_size=0,
        page_size=page_size,
    )
    problems = _mla(text, shared) if is_mla(text) else _dense(text, shared, heads, tensor_parallel)
    return list(dict.fromkeys(problems))


def _dense(text: Mapping[str, Any], shared: Problem, heads: int, tensor_parallel: int) -> Iterator[Problem]:
    encoder = _is_encoder(text)
    always = {
        "non_causal" if encoder else "causal": True,
        "soft_cap": bool(text.get("attn_logit_softcapping")),
        "sinks": text.get("model_type") in SINKS,
        "alibi": _has_alibi(text, heads),
    }
    features = frozenset(feature for feature, needed in always.items() if needed)
    layers = list(_kinds_of_layers(text, heads))
    for kind in layers:
        asked = replace(
            shared,
            kv_heads=max(1, kind.kv_heads // tensor_parallel),  # where devices outnumber them, each has a copy of one
            head_size=kind.head_size,
            value_size=int(text.get("v_head_dim") or kind.head_size),
            features=features | {"window"} if kind.windowed else features,
        )
        if encoder:  # nothing is cached
            yield replace(asked, operation="ragged_attention", cache_dtype=asked.dtype, page_size=0)
            continue
        yield asked
    if not encoder:
        for kind in layers:
            yield replace(
                shared,
                operation="store_kv",
                kv_heads=max(1, kind.kv_heads // tensor_parallel),
                head_size=kind.head_size,
                value_size=int(text.get("v_head_dim") or kind.head_size),
            )


def _mla(text: Mapping[str, Any], shared: Problem) -> Iterator[Problem]:
    if text.get("index_topk") is not None:
        raise ValueError("index_topk: attention to chosen tokens (sparse MLA) is none of our operations")
    rank, rope = _number(text, ("kv_lora_rank",)), _number(text, ("qk_rope_head_dim",))
    key, value = _number(text, ("qk_nope_head_dim",)) + rope, _number(text, ("v_head_dim",))
    yield replace(
        shared,
        operation="mla_decode",
        head_size=rank + rope,
        value_size=rank,
        max_query=1,
        features=frozenset({"causal"}),
    )
    # A prompt is attended unabsorbed: new tokens among themselves, then over what is cached already, then merged.
    unabsorbed = replace(
        shared,
        operation="ragged_attention",
        cache_dtype=shared.dtype,
        kv_heads=shared.q_heads,
        head_size=key,
        value_size=value,
        page_size=0,
    )
    yield replace(unabsorbed, features=frozenset({"causal", "lse"}))
    yield replace(unabsorbed, features=frozenset({"non_causal", "lse"}))
    yield replace(unabsorbed, operation="merge", head_size=value, features=frozenset({"lse"}))
    yield replace(shared, operation="store_mla_kv", head_size=rank + rope, value_size=rank)


def _kinds_of_layers(text: Mapping[str, Any], heads: int) -> Iterator[_Layers]:
    """The kinds of attention layers, each once."""
    kv_heads, head_size = _kv_heads(text, heads), _head_size(text, heads)
    for windowed in _windows(text):
        if windowed:
            yield _Layers(True, kv_heads, head_size)
        else:  # Gemma 4: layers that see everything have heads of their own
            wide, few = text.get("global_head_dim"), text.get("num_global_key_value_heads")
            yield _Layers(False, int(few or kv_heads), int(wide or head_size))


def _windows(text: Mapping[str, Any]) -> list[bool]:
    """Whether there are layers without a sliding window (False) and with one (True), in this order."""
    window = _first(text, WINDOW) if text.get("use_sliding_window", True) else None
    types = text.get("layer_types")
    if types:
        sparse = sorted(SPARSE & set(types))
        if sparse:
            raise ValueError(f"layer_types: {', '.join(sparse)} is none of our operations")
        windows = {bool(window) and kind in WINDOWED for kind in types if kind not in NO_ATTENTION}
        if not windows:
            raise ValueError("layer_types: no layer of this model has attention")
        return sorted(windows)
    if not window:
        return [False]
    return [False, True] if _alternates(text) else [True]


def _alternates(text: Mapping[str, Any]) -> bool:
    """Whether only some layers are windowed, in a config from before `layer_types`."""
    pattern = _first(text, ("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers"))
    layers, first_windowed = text.get("num_hidden_layers"), text.get("max_window_layers")
    mixed = text.get("use_sliding_window") and first_windowed and layers and first_windowed < layers
    return bool(text.get("model_type") in ALTERNATING or (pattern and pattern != 1) or mixed)


def _kv_heads(text: Mapping[str, Any], heads: int) -> int:
    if text.get("multi_query") and not text.get("new_decoder_architecture"):  # Falcon 7B, StarCoder
        return 1
    nested = text.get("attn_config")
    found = _first({**(nested if isinstance(nested, Mapping) else {}), **text}, KV_HEADS)
    return heads if found is None else _whole(found, KV_HEADS[0])


def _head_size(text: Mapping[str, Any], heads: int) -> int:
    found = _first(text, HEAD_DIM)
    if found is not None:
        return _whole(found, HEAD_DIM[0])
    if _first(text, HIDDEN) is None:
        raise ValueError(f"the model's config has neither {HEAD_DIM[0]} nor {' nor '.join(HIDDEN)}")
    return _number(text, HIDDEN) // heads


def _is_encoder(text: Mapping[str, Any]) -> bool:
    if text.get("is_causal") is False or text.get("use_bidirectional_attention") is True:
        return True
    return text.get("model_type") in ENCODERS and not text.get("is_decoder")


def _has_alibi(text: Mapping[str, Any], heads: int) -> bool:
    nested = text.get("attn_config")
    kind, family = text.get("position_embedding_type"), text.get("model_type")
    return bool(
        family == "bloom"
        or text.get("alibi")
        or kind == "alibi"
        or (isinstance(nested, Mapping) and nested.get("alibi"))
        or (family == "baichuan" and heads == 40)  # only the 13B ones, which do not say so
    )


def _dtype_name(name: str) -> str:
    return str(name).removeprefix("torch.")


def _first(text: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of these keys that is there and not null; None if none is."""
    return next((text[name] for name in names if text.get(name) is not None), None)


def _number(text: Mapping[str, Any], names: Sequence[str]) -> int:
    found = _first(text, names)
    if found is None:
        others = f" (nor {', '.join(names[1:])})" if names[1:] else ""
        raise ValueError(f"the model's config has no {names[0]}{others}")
    return _whole(found, names[0])


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is not a whole number above 0, the same for all layers")
    return value
