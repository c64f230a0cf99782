//! IBM Granite 3.0 to 3.3: Llama with four multipliers, each 1 where its key is absent; so is the scale of
//! products of queries and keys, which is then not 1/sqrt(head_dim). `modeling_granite.py` of transformers
//! 5.2.

use super::Family;
use crate::architecture::Architecture;

pub const FAMILY: Family = Family {
    model_type: "granite",
    label: "Granite 3",
    max_positions: 2048,
    kv_heads: None,
    head_dim: None,
    read: |keys, shape| {
        let bias = keys.flag("attention_bias")?;
        Ok(Architecture {
            qkv_bias: bias,
            output_bias: bias,
            score_scale: keys.multiplier("attention_multiplier")?,
            embedding_scale: keys.multiplier("embedding_multiplier")?,
            residual_scale: keys.multiplier("residual_multiplier")?,
            logits_divisor: keys.multiplier("logits_scaling")?,
            ..Architecture::plain(keys, shape)?
        })
    },
};
