"""Who is chosen by vLLM: nothing changes unless asked, and what is wrong is said in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from integration.engine import ENVIRONMENT, generate
from taut.cli.demo import EngineFailedError

if TYPE_CHECKING:
    from pathlib import Path

ANSWERS = """
import json
from vllm.plugins import load_general_plugins
load_general_plugins()
load_general_plugins()
from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends
from vllm.v1.attention.selector import get_attn_backend
import torch
from vllm.config import VllmConfig, set_current_vllm_config
config = VllmConfig()
if {selected!r}:
    config.attention_config.backend = Backends[{selected!r}]
with set_current_vllm_config(config):
    chosen = get_attn_backend(64, torch.float32, "auto")
print(json.dumps(dict(
    chosen=chosen.__module__ + "." + chosen.__name__,
    name=chosen.get_name(),
    overridden=sorted(member.name for member in Backends if member.is_overridden()),
)))
"""
STOCK = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"


def python(code: str, attention: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TAUT_")}
    variables |= ENVIRONMENT | environment
    if attention is not None:
        variables["TAUT_ATTENTION"] = attention
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)


def answers(attention: str | None, selected: str = "") -> dict[str, Any]:
    """What vLLM's own selector says in a process of its own."""
    process = python(ANSWERS.format(selected=selected), attention)
    assert process.returncode == 0, process.stderr[-2000:]
    answer: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return answer


def test_unset_changes_nothing() -> None:
    said = answers(None)
    assert said["chosen"] == STOCK
    # Registered, and yet the stock class is what vLLM gets.
    assert said["overridden"] == ["AMX_MLA", "CPU_ATTN", "CPU_MLA", "CUSTOM"]


def test_off_registers_nothing() -> None:
    said = answers("off")
    assert said["chosen"] == STOCK
    assert said["overridden"] == []


# test_vllm_text.test_preemption asserts that ours serves with `auto`.
@pytest.mark.parametrize("attention", ["on", pytest.param("auto", marks=pytest.mark.exhaustive)])
def test_on_and_auto_choose_ours_under_the_members_name(attention: str) -> None:
    said = answers(attention)
    assert said["chosen"] == "taut.adapters.vllm.dense.backend.TautBackend_CPU_ATTN"
    assert said["name"] == "CPU_ATTN"
    assert {"FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN", "CPU_MLA", "CUSTOM"} <= set(said["overridden"])


@pytest.mark.exhaustive  # test_vllm_serve asserts that ours serves with CUSTOM alone
def test_custom_is_ours_without_any_variable() -> None:
    assert answers(None, "CUSTOM")["chosen"] == "taut.adapters.vllm.dense.backend.TautBackend_CPU_ATTN"


def test_another_backend_by_name_is_not_ours() -> None:
    assert answers(None, "TRITON_ATTN")["chosen"] == STOCK


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TAUT_ATTENTION", "onn", "TAUT_ATTENTION=onn is not a value of this setting: did you mean on?"),
        pytest.param(  # tests/unit/test_settings.py has the message, which comes out as the one above does
            *("TAUT_ATENTION", "on", "TAUT_ATENTION is not a setting of taut: did you mean TAUT_ATTENTION?"),
            marks=pytest.mark.exhaustive,
        ),
        ("TAUT_KERNELS", "referense", "TAUT_KERNELS=referense names no kernel provider: did you mean 'reference'?"),
    ],
)
def test_a_typo_stops_with_one_clear_line(name: str, value: str, said: str) -> None:
    process = python("from vllm.plugins import load_general_plugins; load_general_plugins()", **{name: value})
    assert process.returncode != 0
    assert said in process.stderr.splitlines()[-1]


def test_a_plugin_that_cannot_load_is_loud(tmp_path: Path) -> None:
    """pluggy is missing: vLLM must not serve as if nothing had been asked for."""
    (tmp_path / "pluggy.py").write_text("raise ImportError('pluggy is broken here')")
    process = python(
        "from vllm.plugins import load_general_plugins; load_general_plugins()", "on", PYTHONPATH=str(tmp_path)
    )
    assert process.returncode != 0
    assert "pluggy is broken here" in process.stderr.splitlines()[-1]


MLA = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 512, "hidden_size": 256,
    "intermediate_size": 512, "moe_intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "routed_scaling_factor": 1.0, "norm_topk_prob": True, "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "bos_token_id": 0, "eos_token_id": 1, "num_nextn_predict_layers": 0, "torch_dtype": "float32",
}  # fmt: skip


def test_a_model_that_is_not_served(tmp_path: Path) -> None:
    """`on` stops before serving, with the reason; an MLA model is judged as a dense one is."""
    (tmp_path / "config.json").write_text(json.dumps(MLA))
    request = {"model": str(tmp_path), "prompts": None, "prompt_ids": [[5, 6, 7]], "tokens": 2}
    engine = {"load_format": "dummy", "skip_tokenizer_init": True, "kv_cache_dtype": "fp8_e5m2"}
    with pytest.raises(EngineFailedError, match="taut attention cannot serve this model: a KV cache of fp8_e5m2"):
        generate("on", request=request, **engine)
