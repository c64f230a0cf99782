//! `config.json` of a decoder-only checkpoint, parsed into what the forward pass needs.
//!
//! Reads both spellings of the hub: `rope_theta` + `rope_scaling` and `rope_parameters`,
//! `torch_dtype` and `dtype`. What the forward pass would compute wrongly is refused here, by name
//! and before any weight is read: mixtures of experts, sliding windows, quantized weights, unknown
//! architectures and rotary scalings. What one family has and another has not is read by its file
//! in `family`. Hugging Face's spellings of keys stay inside these modules.

pub(crate) mod keys;

use std::path::Path;

use anyhow::{Context, Error, Result, ensure};
use pkv_core::{Hinted, ModelShape, hinted};
use serde_json::Value;
use tch::Kind;

use crate::architecture::Architecture;
use crate::family::{self, Family, unsupported};
use crate::rope::RopeConfig;
use keys::Keys;

/// Content of a checkpoint's `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct LmConfig {
    /// `model_type`.
    pub family: &'static str,
    pub shape: ModelShape,
    pub architecture: Architecture,
    pub rope: RopeConfig,
    /// The embedding matrix is also the output matrix: `tie_word_embeddings`, false where it is absent, as in
    /// transformers' configurations of these families. [`crate::LanguageModel::load`] may find that the
    /// weights say otherwise.
    pub tied_head: bool,
    /// Positions the checkpoint was made for; longer contexts run, at the caller's risk.
    pub max_positions: usize,
    /// Dtype of the stored weights, according to the checkpoint.
    pub stored_kind: Option<Kind>,
}

/// A `config.json` has a few kilobytes; what its text names is copied into errors.
const MOST_BYTES: u64 = 16 << 20;

/// Sizes beyond all known models, which are 126 layers, 53,248 wide, of 262,208 tokens and 10,485,760
/// positions at most.
const MOST_LAYERS: usize = 1 << 12;
const MOST_WIDE: usize = 1 << 24;
const MOST_POSITIONS: usize = 1 << 30;

impl LmConfig {
    /// Read `config.json` in `folder`.
    ///
    /// # Errors
    /// The file is missing or no JSON object, a key is missing or has a wrong type, or the model is
    /// one that the forward pass does not implement.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = pkv_core::read_at_most(&path, MOST_BYTES).with_context(|| {
            hinted(
                format!("reading a model's configuration from `{}`", path.display()),
                "a model folder holds `config.json`, `*.safetensors` and `tokenizer.json`; \
                 `proxykv-train fetch` downloads them",
            )
        })?;
        // What is not supported says what to do; what is wrong comes from the file.
        let again = "copy the model's own file again; it must be plain JSON: no comments, no byte order mark, no `NaN`";
        let hint = |e: Error, what: &str| {
            let what = format!("{what} `{}`", path.display());
            match e.downcast_ref::<Hinted>().is_some() || e.chain().any(|c| c.is::<Hinted>()) {
                true => e.context(what),
                false => e.context(hinted(what, again)),
            }
        };
        pkv_core::check_json(&text, &path)?;
        let json: Value = serde_json::from_slice(&text).map_err(|e| hint(e.into(), "parsing"))?;
        Self::from_json(&json).map_err(|e| hint(e, "cannot use the model of"))
    }

    /// Interpret a parsed `config.json`.
    ///
    /// # Errors
    /// As [`LmConfig::from_folder`], without the file's.
    pub fn from_json(json: &Value) -> Result<Self> {
        let keys = Keys(json.as_object().context("expected a JSON object")?);
        let family = family(&keys)?;
        refuse_unsupported(&keys)?;

        let hidden = keys.count("hidden_size")?;
        let query_heads = keys.count("num_attention_heads")?;
        let absent = |key: &str| !keys.0.contains_key(key);
        let kv_heads = match family.kv_heads.filter(|_| absent("num_key_value_heads")) {
            Some(heads) => heads,
            None => keys.count_or("num_key_value_heads", query_heads)?,
        };
        ensure!(
            query_heads.is_multiple_of(kv_heads),
            "`num_attention_heads` is {query_heads}, no multiple of `num_key_value_heads` {kv_heads}"
        );
        // Qwen3 widened its heads: head_dim is not always hidden / heads. Early configs leave it out.
        let head_dim = match (keys.present("head_dim"), family.head_dim.filter(|_| absent("head_dim"))) {
            (Some(_), _) => keys.count("head_dim")?,
            (None, Some(head_dim)) => head_dim,
            (None, None) => {
                ensure!(
                    hidden.is_multiple_of(query_heads),
                    "`hidden_size` {hidden} is no multiple of `num_attention_heads` {query_heads} \
                     and `head_dim` is not given"
                );
                hidden / query_heads
            }
        };
        ensure!(head_dim.is_multiple_of(2), "`head_dim` is {head_dim}; rotary needs an even number");
        let shape = ModelShape {
            layers: keys.count("num_hidden_layers")?,
            kv_heads,
            query_heads,
            head_dim,
            hidden,
            intermediate: keys.count("intermediate_size")?,
            vocab: keys.count("vocab_size")?,
        };
        refuse_sliding_layers(&keys, shape.layers)?;
        let max_positions = keys.count_or("max_position_embeddings", family.max_positions)?;
        for (key, found, most) in [
            ("num_hidden_layers", shape.layers, MOST_LAYERS),
            ("num_attention_heads", query_heads, MOST_WIDE),
            ("head_dim", head_dim, MOST_WIDE),
            ("hidden_size", hidden, MOST_WIDE),
            ("intermediate_size", shape.intermediate, MOST_WIDE),
            ("vocab_size", shape.vocab, MOST_WIDE),
            ("max_position_embeddings", max_positions, MOST_POSITIONS),
        ] {
            ensure!(found <= most, "`{key}` is {found}, at most {most} are supported");
        }
        Ok(Self {
            family: family.model_type,
            shape,
            architecture: family.architecture(&keys, &shape)?,
            rope: RopeConfig::from_config(keys.0, max_positions)?,
            tied_head: keys.flag("tie_word_embeddings")?,
            max_positions,
            stored_kind: stored_kind(&keys),
        })
    }

    pub fn shape(&self) -> ModelShape {
        self.shape
    }

    /// Compare with the shape that a recipe states for its `what` (`target` or `proxy`).
    ///
    /// # Errors
    /// Any dimension differs; the error names all that do.
    pub fn check_shape(&self, expected: &ModelShape, what: &str) -> Result<()> {
        let (found, want) = (&self.shape, expected);
        let differing: Vec<String> = [
            ("layers", want.layers, found.layers),
            ("kv_heads", want.kv_heads, found.kv_heads),
            ("query_heads", want.query_heads, found.query_heads),
            ("head_dim", want.head_dim, found.head_dim),
            ("hidden", want.hidden, found.hidden),
            ("intermediate", want.intermediate, found.intermediate),
            ("vocab", want.vocab, found.vocab),
        ]
        .iter()
        .filter(|(_, want, found)| want != found)
        .map(|(name, want, found)| format!("`{name}` {want} in the recipe, {found} in config.json"))
        .collect();
        ensure!(
            differing.is_empty(),
            hinted(
                format!(
                    "the {what} model is not the one that the recipe describes: {}",
                    differing.join(", ")
                ),
                format!(
                    "correct `{what}.shape` in the recipe, or point `{what}.model` at the right checkpoint"
                )
            )
        );
        Ok(())
    }
}

/// Wrappers that write their own class for that of the model within.
const WRAPPERS: [&str; 4] =
    ["OptimizedModule", "FullyShardedDataParallel", "DistributedDataParallel", "DeepSpeedEngine"];

fn family(keys: &Keys) -> Result<&'static Family> {
    let model_type = keys.present("model_type").and_then(Value::as_str).unwrap_or("");
    let Some(family) = family::find(model_type) else {
        let what = match model_type {
            "" => "a configuration without `model_type`".to_owned(),
            other if other.contains("moe") || other == "mixtral" => {
                format!("mixture of experts (`model_type` `{other}`)")
            }
            other => format!("architecture `{other}`"),
        };
        return Err(unsupported(what).into());
    };
    let classes: Vec<&str> = keys
        .present("architectures")
        .and_then(Value::as_array)
        .map(|names| names.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    // `model_type` decides, as in transformers: training wrappers write their own names
    // (`FSDPLlamaForCausalLM`). But a classifier, reward or embedding model has the same model_type, and no
    // language head.
    let language = |name: &&str| name.ends_with("ForCausalLM") || WRAPPERS.contains(name);
    if !classes.is_empty() && !classes.iter().any(language) {
        return Err(unsupported(format!("architecture `{}` of `{model_type}`", classes.join(", "))).into());
    }
    Ok(family)
}

fn refuse_unsupported(keys: &Keys) -> Result<()> {
    if let Some(quantization) = keys.present("quantization_config") {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed method");
        return Err(hinted(
            format!("quantized weights (`quantization_config`, {method}) are not supported"),
            "use the checkpoint that this one was quantized from, in bf16, f16 or f32",
        )
        .into());
    }
    for key in ["num_experts", "num_local_experts", "n_routed_experts"] {
        if keys.present(key).and_then(Value::as_u64).is_some_and(|n| n > 1) {
            return Err(unsupported(format!("mixture of experts (`{key}` is {})", keys.0[key])).into());
        }
    }
    if let Some(act) = keys.present("hidden_act")
        && !["silu", "swish"].map(Value::from).contains(act)
    {
        let act = act.as_str().map_or_else(|| act.to_string(), str::to_owned);
        return Err(unsupported(format!("activation `{act}` (`hidden_act`)")).into());
    }
    // Embedding models made of these architectures read in both directions.
    if keys.present("is_causal") == Some(&Value::Bool(false)) {
        return Err(unsupported("attention to later tokens (`is_causal` is false)").into());
    }
    if keys.flag("mlp_bias")? {
        return Err(unsupported("a bias in the feed-forward layers (`mlp_bias`)").into());
    }
    if let Some(share) = keys.number("partial_rotary_factor")?
        && share != 1.0
    {
        return Err(
            unsupported(format!("partial rotary embedding (`partial_rotary_factor` is {share})")).into()
        );
    }
    Ok(())
}

/// Labels and features assume that every layer attends to the whole context.
fn refuse_sliding_layers(keys: &Keys, layers: usize) -> Result<()> {
    let Some(value) = keys.present("layer_types") else { return Ok(()) };
    let types: Option<Vec<&str>> =
        value.as_array().and_then(|types| types.iter().map(Value::as_str).collect());
    let types = types.with_context(|| format!("`layer_types` is {value}; expected a list of names"))?;
    ensure!(
        types.len() == layers,
        "`layer_types` has {} entries, `num_hidden_layers` is {layers}",
        types.len()
    );
    let others: Vec<&&str> = types.iter().filter(|t| **t != "full_attention").collect();
    if let Some(first) = others.first() {
        let text = format!("`{first}` in {} of {layers} layers (`layer_types`)", others.len());
        return Err(unsupported(text).into());
    }
    Ok(())
}

fn stored_kind(keys: &Keys) -> Option<Kind> {
    let name = keys.present("dtype").or_else(|| keys.present("torch_dtype"))?.as_str()?;
    match name.trim_start_matches("torch.") {
        "bfloat16" => Some(Kind::BFloat16),
        "float16" => Some(Kind::Half),
        "float32" => Some(Kind::Float),
        _ => None,
    }
}
