"""Which form of MLA serves a batch: SGLang asks in every layer."""

from __future__ import annotations

import logging
from typing import Any

from taut.adapters.sglang import bridge, selection


def mla_form(layer: Any, forward_batch: Any) -> Any:
    """SGLang's name for the form that serves a batch.

    Absorbed, a pair of a query and a key costs Hq * (2 C + E) products; unabsorbed Hq * (D + V), but every cached key
    is projected up first, for Hq * C * (D - E + V). So prompts are unabsorbed where nothing of them is cached, and
    where enough new tokens share the projection of what is; decode, verification and captured prefills are absorbed.
    """
    prompts = forward_batch.forward_mode.is_extend_without_speculative()
    if bridge.prefill_is_captured() or not prompts or forward_batch.extend_prefix_lens_cpu is None:
        return bridge.absorbed_form(layer, forward_batch)
    form = _form_of_prompts(layer, forward_batch)
    selection.say(f"prompts are served in SGLang's form {form.name}", logging.DEBUG)
    return form


def _form_of_prompts(layer: Any, forward_batch: Any) -> Any:
    forms = bridge.mla_forms()
    new, old = forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu
    cached = sum(old)
    if not cached:
        return forms.MHA
    if layer.disable_chunked_prefix_cache:
        return bridge.absorbed_form(layer, forward_batch)
    rank, rope, value = layer.kv_lora_rank, layer.qk_rope_head_dim, layer.v_head_dim
    nope = layer.qk_nope_head_dim
    saved = (2 * rank + rope) - (nope + rope + value)
    pairs = sum(queries * keys for queries, keys in zip(new, old, strict=False))
    if pairs * saved <= cached * rank * (nope + value):
        return bridge.absorbed_form(layer, forward_batch)
    # In one shot SGLang counts the keys by lengths that the host may not know.
    if forward_batch.seq_lens_cpu is not None and cached + sum(new) <= forward_batch.get_max_chunk_capacity():
        return forms.MHA_ONE_SHOT
    # SGLang's kernel that merges chunks is for GPUs.
    return forms.MHA_CHUNKED_KV if forward_batch.seq_lens.is_cuda else bridge.absorbed_form(layer, forward_batch)
