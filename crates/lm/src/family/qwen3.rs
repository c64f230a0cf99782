//! Qwen3: Llama with an RMS norm on queries and keys before rotary. `modeling_qwen3.py` of transformers 5.2.

use super::{Family, refuse_sliding_window};
use crate::architecture::Architecture;

pub const FAMILY: Family = Family {
    model_type: "qwen3",
    label: "Qwen3",
    max_positions: 32_768,
    kv_heads: Some(32),
    head_dim: Some(128),
    read: |keys, shape| {
        refuse_sliding_window(keys, shape.layers)?;
        let bias = keys.flag("attention_bias")?;
        let plain = Architecture::plain(keys, shape)?;
        Ok(Architecture { qkv_bias: bias, output_bias: bias, qk_norm: true, ..plain })
    },
};
