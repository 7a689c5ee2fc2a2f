"""What models ask for, by configs as they stand on the Hub, cut down to what matters here."""

from __future__ import annotations

from typing import Any

import pytest

from taut.common_kernels.model import is_mla, problems_of_model
from taut.common_kernels.problem import FEATURES, OPERATIONS, Problem

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}
SMOLLM2_135M = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "head_dim": 64,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
QWEN3_8B = {
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_window_layers": 36,
    "num_hidden_layers": 36,
    "sliding_window": None,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}
QWEN2_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_window_layers": 28,
    "num_hidden_layers": 28,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}
GEMMA2_9B = {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_size": 3584,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
}
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "head_dim": 256,
        "hidden_size": 2560,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "num_attention_heads": 16},
}
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "head_dim": 64,
    "hidden_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "torch_dtype": "bfloat16",
}
BERT_BASE = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "hidden_size": 768,
    "num_attention_heads": 12,
    "torch_dtype": "float32",
}
BLOOM_7B = {"model_type": "bloom", "n_embed": 4096, "hidden_size": 4096, "n_head": 32, "torch_dtype": "float16"}
MPT_7B = {
    "model_type": "mpt",
    "d_model": 4096,
    "n_heads": 32,
    "attn_config": {"alibi": True},
    "torch_dtype": "bfloat16",
}
FALCON_7B = {
    "model_type": "falcon",
    "hidden_size": 4544,
    "num_attention_heads": 71,
    "multi_query": True,
    "alibi": False,
}
QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "head_dim": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 12,
    "dtype": "bfloat16",
}
ALL = [value for name, value in globals().items() if name.isupper() and isinstance(value, dict)]


def problems(config: dict[str, Any], **how: Any) -> list[Problem]:
    return problems_of_model(config, target="sm_90", **how)


def attention(config: dict[str, Any], **how: Any) -> list[Problem]:
    return [problem for problem in problems(config, **how) if problem.operation == "paged_attention"]


def shape(problem: Problem) -> tuple[int, int, int, int]:
    return problem.q_heads, problem.kv_heads, problem.head_size, problem.value_size


@pytest.mark.parametrize("config", ALL, ids=lambda config: config["model_type"])
def test_every_problem_is_whole_and_posed_once(config: dict[str, Any]) -> None:
    found = problems(config)
    assert found
    assert len(set(found)) == len(found)
    for problem in found:
        assert problem.operation in OPERATIONS
        assert problem.features <= FEATURES
        assert problem.target == "sm_90"
        assert min(shape(problem)) > 0
        assert not problem.q_heads % problem.kv_heads


def test_llama() -> None:
    paged, store = problems(LLAMA_3_8B, page_size=32)
    assert paged == Problem(
        operation="paged_attention",
        target="sm_90",
        dtype="bfloat16",
        cache_dtype="bfloat16",
        q_heads=32,
        kv_heads=8,
        head_size=128,
        value_size=128,
        page_size=32,
        features=frozenset({"causal"}),
    )
    assert store.operation == "store_kv"
    assert shape(store) == shape(paged)


def test_smollm2() -> None:
    assert [shape(problem) for problem in problems(SMOLLM2_135M)] == [(9, 3, 64, 64)] * 2


@pytest.mark.parametrize("config", [QWEN3_8B, QWEN2_7B], ids=["qwen3", "qwen2"])
def test_a_window_that_is_not_used(config: dict[str, Any]) -> None:
    (paged,) = attention(config)
    assert paged.features == {"causal"}


def test_a_window_that_only_some_layers_use() -> None:
    some = {**QWEN2_7B, "use_sliding_window": True, "max_window_layers": 21}
    assert [paged.features for paged in attention(some)] == [{"causal"}, {"causal", "window"}]


@pytest.mark.parametrize(
    ("config", "always"), [(GEMMA2_9B, {"causal", "soft_cap"}), (GEMMA3_4B, {"causal"})], ids=["gemma2", "gemma3"]
)
def test_gemma_alternates(config: dict[str, Any], always: set[str]) -> None:
    assert [paged.features for paged in attention(config)] == [always, always | {"window"}]
    assert len([problem for problem in problems(config) if problem.operation == "store_kv"]) == 1


def test_a_nested_config_is_that_of_the_language_model() -> None:
    full, windowed = attention(GEMMA3_4B)
    assert shape(full) == shape(windowed) == (8, 4, 256, 256)
    (full, _) = attention({**GEMMA3_4B, "torch_dtype": "float16"})
    assert full.dtype == "float16"  # said by the whole only


def test_mistral_is_windowed_throughout() -> None:
    (paged,) = attention(MISTRAL_7B)
    assert paged.features == {"causal", "window"}


def test_gpt_oss_has_sinks_everywhere_and_windows_in_half() -> None:
    assert [paged.features for paged in attention(GPT_OSS_20B)] == [{"causal", "sinks"}, {"causal", "sinks", "window"}]
    assert {shape(paged) for paged in attention(GPT_OSS_20B)} == {(64, 8, 64, 64)}


def test_deepseek_v3() -> None:
    assert is_mla(DEEPSEEK_V3)
    found = problems(DEEPSEEK_V3, tensor_parallel=8)
    by_operation = {problem.operation: problem for problem in found}
    assert shape(by_operation["mla_decode"]) == (16, 1, 576, 512)
    assert (by_operation["mla_decode"].max_query, by_operation["mla_decode"].page_size) == (1, 16)
    assert shape(by_operation["store_mla_kv"]) == (16, 1, 576, 512)
    ragged = [problem for problem in found if problem.operation == "ragged_attention"]
    assert {shape(problem) for problem in ragged} == {(16, 16, 192, 128)}
    assert [problem.features for problem in ragged] == [{"causal", "lse"}, {"non_causal", "lse"}]
    assert "paged_attention" not in by_operation
    assert "store_kv" not in by_operation


def test_bert_sees_both_ways_and_caches_nothing() -> None:
    (ragged,) = problems(BERT_BASE)
    assert ragged.operation == "ragged_attention"
    assert ragged.features == {"non_causal"}
    assert (ragged.page_size, ragged.dtype) == (0, "float32")
    assert shape(ragged) == (12, 12, 64, 64)


def test_bert_as_a_decoder() -> None:
    assert attention({**BERT_BASE, "is_decoder": True})


@pytest.mark.parametrize("config", [BLOOM_7B, MPT_7B], ids=["bloom", "mpt"])
def test_alibi(config: dict[str, Any]) -> None:
    (paged,) = attention(config)
    assert paged.features == {"causal", "alibi"}
    assert shape(paged) == (32, 32, 128, 128)


def test_one_key_head_for_all() -> None:
    (paged,) = attention(FALCON_7B)
    assert shape(paged) == (71, 1, 64, 64)
    assert paged.features == {"causal"}


def test_layers_without_attention_ask_for_nothing() -> None:
    (paged,) = attention(QWEN3_NEXT)
    assert shape(paged) == (16, 2, 256, 256)


def test_key_heads_are_copied_where_devices_outnumber_them() -> None:
    assert shape(attention(LLAMA_3_8B, tensor_parallel=16)[0]) == (2, 1, 128, 128)


def test_dtypes() -> None:
    assert attention(LLAMA_3_8B, dtype="torch.float16")[0].dtype == "float16"
    quantised = attention(LLAMA_3_8B, cache_dtype="float8_e4m3fn")[0]
    assert (quantised.dtype, quantised.cache_dtype) == ("bfloat16", "float8_e4m3fn")


@pytest.mark.parametrize("key", ["num_attention_heads", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"no {key}"):
        problems({name: value for name, value in DEEPSEEK_V3.items() if name != key})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_attention_heads": 8}, "neither head_dim nor hidden_size"),
        ({**LLAMA_3_8B, "num_attention_heads": [8, 16]}, "num_attention_heads="),
        ({**LLAMA_3_8B, "is_encoder_decoder": True}, "is_encoder_decoder"),
        ({**DEEPSEEK_V3, "index_topk": 2048}, "index_topk"),
        ({**LLAMA_3_8B, "layer_types": ["mamba"]}, "layer_types"),
        ({**LLAMA_3_8B, "layer_types": ["compressed_sparse_attention"]}, "layer_types"),
    ],
)
def test_what_cannot_be_told_is_said(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        problems(config)


def test_heads_that_cannot_be_shared_out() -> None:
    with pytest.raises(ValueError, match="9 query heads cannot be shared out over 2"):
        problems(SMOLLM2_135M, tensor_parallel=2)
