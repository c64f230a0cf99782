//! Mistral without a sliding window, as 7B has it from v0.2 on: Llama without biases. `modeling_mistral.py`
//! of transformers 5.2.
//!
//! v0.1 attends to the last 4,096 tokens, which is also what an absent `sliding_window` means; `null` is no
//! window.

use super::{Family, unsupported};
use crate::architecture::Architecture;

pub const FAMILY: Family = Family {
    model_type: "mistral",
    label: "Mistral",
    max_positions: 131_072,
    kv_heads: Some(8),
    head_dim: None,
    read: |keys, shape| {
        let window = match keys.0.get("sliding_window") {
            Some(window) if window.is_null() => return Architecture::plain(keys, shape),
            Some(window) => window.to_string(),
            None => "absent, which is a window of 4096 tokens".to_owned(),
        };
        Err(unsupported(format!("sliding-window attention (`sliding_window` is {window})")).into())
    },
};

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::LmConfig;

    /// Mistral-7B-Instruct-v0.3.
    fn v03() -> Value {
        json!({
            "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": null,
            "tie_word_embeddings": false, "vocab_size": 32768
        })
    }

    #[test]
    fn what_is_left_out_has_the_values_of_transformers() {
        let mut json = v03();
        let config = LmConfig::from_json(&json).unwrap();
        assert_eq!((config.shape.kv_heads, config.shape.head_dim, config.max_positions), (8, 128, 32_768));
        assert!(!config.architecture.qkv_bias && !config.architecture.output_bias && !config.tied_head);
        for key in ["num_key_value_heads", "max_position_embeddings"] {
            json.as_object_mut().unwrap().remove(key);
        }
        let config = LmConfig::from_json(&json).unwrap();
        assert_eq!((config.shape.kv_heads, config.max_positions), (8, 131_072));
        json["num_key_value_heads"] = Value::Null;
        assert_eq!(LmConfig::from_json(&json).unwrap().shape.kv_heads, 32);
    }

    #[test]
    fn a_window_is_refused() {
        let mut json = v03();
        json["sliding_window"] = json!(4096);
        let error = format!("{:#}", LmConfig::from_json(&json).unwrap_err());
        assert!(error.contains("(`sliding_window` is 4096)"), "{error}");
        json.as_object_mut().unwrap().remove("sliding_window");
        let error = format!("{:#}", LmConfig::from_json(&json).unwrap_err());
        assert!(error.contains("is absent, which is a window of 4096 tokens"), "{error}");
    }
}
