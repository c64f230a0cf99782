//! Llama 3, 3.1 and 3.2: `modeling_llama.py` of transformers 5.2.

use super::Family;
use crate::architecture::Architecture;

pub const FAMILY: Family = Family {
    model_type: "llama",
    label: "Llama 3",
    max_positions: 2048,
    kv_heads: None,
    head_dim: None,
    read: |keys, shape| {
        let bias = keys.flag("attention_bias")?;
        Ok(Architecture { qkv_bias: bias, output_bias: bias, ..Architecture::plain(keys, shape)? })
    },
};
