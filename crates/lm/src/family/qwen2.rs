//! Qwen2 and Qwen2.5: Llama with a bias on queries, keys and values. `modeling_qwen2.py` of transformers 5.2.

use super::{Family, refuse_sliding_window};
use crate::architecture::Architecture;

pub const FAMILY: Family = Family {
    model_type: "qwen2",
    label: "Qwen2/2.5",
    max_positions: 32_768,
    kv_heads: Some(32),
    head_dim: None,
    read: |keys, shape| {
        refuse_sliding_window(keys, shape.layers)?;
        Ok(Architecture { qkv_bias: true, ..Architecture::plain(keys, shape)? })
    },
};
