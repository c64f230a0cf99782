//! Rotary position embedding with the scalings that long-context checkpoints use.
//!
//! Owns the frequencies; positions are the caller's, and `pkv_gpu::rotate` turns queries and keys.
//! Formulas as in Hugging Face transformers 5.2 (`modeling_rope_utils.py`), which follows the Llama
//! 3.1 reference code for `llama3` and YaRN (arXiv 2309.00071) for `yarn`.
//!
//! Dimension key: s new tokens, q query head, d head_dim.

use std::f64::consts::TAU;

use anyhow::{Context, Result, bail, ensure};
use pkv_core::hinted;
use pkv_gpu::{Movement, Rotation};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use crate::config::keys::Keys;
use crate::family::unsupported;

/// Base frequency and scaling of rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// Scaling of frequencies for contexts longer than in the first training.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Frequencies theta^(-2i/d) as they are.
    None,
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_positions: f64 },
    /// YaRN: a ramp over the dimensions, and cosine and sine scaled by `attention_factor`.
    Yarn {
        factor: f64,
        original_positions: f64,
        beta_fast: f64,
        beta_slow: f64,
        attention_factor: f64,
        truncate: bool,
    },
}

impl RopeConfig {
    /// Read `rope_theta` and `rope_scaling`, or `rope_parameters`, of a configuration. Of two places for one
    /// value, the one that transformers prefers counts (`PreTrainedConfig.convert_rope_params_to_dict` and
    /// `standardize_rope_params`).
    ///
    /// # Errors
    /// The type of scaling is unknown, or one of its numbers is missing.
    pub(crate) fn from_config(config: &Map<String, Value>, max_positions: usize) -> Result<Self> {
        let all = Keys(config);
        let empty_object = |value: &Value| value.as_object().is_some_and(Map::is_empty);
        let scaled = all.present("rope_scaling").is_some_and(|value| !empty_object(value));
        let key = if scaled { "rope_scaling" } else { "rope_parameters" };
        let empty = Map::new();
        let section = match all.present(key) {
            Some(Value::Object(section)) => section,
            Some(other) => bail!("`{key}` is {other}; expected an object"),
            None => &empty,
        };
        let within = Keys(section);
        let number = |name: &str| within.number(name).with_context(|| format!("reading `{key}`"));
        let required = |name: &str| number(name)?.with_context(|| format!("`{key}.{name}` is missing"));

        let theta = match number("rope_theta")? {
            Some(theta) => theta,
            None => all.number("rope_theta")?.unwrap_or(10_000.0),
        };
        ensure!(theta > 1.0, "`rope_theta` is {theta}; expected a number above 1");
        // Where transformers 5 writes it.
        if let Some(share) = number("partial_rotary_factor")?.filter(|share| *share != 1.0) {
            bail!(unsupported(format!(
                "partial rotary embedding (`{key}.partial_rotary_factor` is {share})"
            )));
        }
        let named = match within.present("rope_type").or_else(|| within.present("type")) {
            Some(Value::String(name)) => Some(name.as_str()),
            Some(other) => bail!("`{key}.rope_type` is {other}; expected text"),
            None => None,
        };
        // Phi-3 and models after it write it beside the section.
        let original = match all.number("original_max_position_embeddings")? {
            Some(original) => original,
            None => number("original_max_position_embeddings")?.unwrap_or(max_positions as f64),
        };
        // `or` in Python: 0 is the default too.
        let beta = |name: &str, default: f64| {
            number(name).map(|beta| beta.filter(|beta| *beta != 0.0).unwrap_or(default))
        };
        let scaling = match named {
            // A configuration per kind of layer, as models with sliding windows have it.
            None if section.values().any(Value::is_object) => {
                bail!(unknown_type("rotary embeddings that differ by layer", key))
            }
            None | Some("default") => RopeScaling::None,
            Some("llama3") => RopeScaling::Llama3 {
                factor: required("factor")?,
                low_freq_factor: required("low_freq_factor")?,
                high_freq_factor: required("high_freq_factor")?,
                original_positions: original,
            },
            Some("yarn") => {
                let factor = match number("factor")? {
                    Some(factor) => factor,
                    None => max_positions as f64 / original,
                };
                RopeScaling::Yarn {
                    factor,
                    original_positions: original,
                    beta_fast: beta("beta_fast", 32.0)?,
                    beta_slow: beta("beta_slow", 1.0)?,
                    attention_factor: match number("attention_factor")? {
                        Some(factor) => factor,
                        None => yarn_attention(factor, number("mscale")?, number("mscale_all_dim")?),
                    },
                    // `null` and 0 count as false in Python.
                    truncate: match section.get("truncate") {
                        None | Some(Value::Bool(true)) => true,
                        Some(Value::Bool(false) | Value::Null) => false,
                        Some(Value::Number(number)) => number.as_f64() != Some(0.0),
                        Some(other) => bail!("`{key}.truncate` is {other}; expected true or false"),
                    },
                }
            }
            Some(other) => bail!(unknown_type(&format!("rotary scaling `{other}`"), key)),
        };
        ensure!(
            original > 0.0,
            "`original_max_position_embeddings` is {original}; expected a number above 0"
        );
        if let RopeScaling::Llama3 { factor, .. } | RopeScaling::Yarn { factor, .. } = scaling {
            ensure!(factor >= 1.0, "`{key}.factor` is {factor}; expected 1 or more");
        }
        Ok(Self { theta, scaling })
    }

    /// Angle per position of each of the head_dim / 2 rotated pairs.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f64> {
        let half = head_dim / 2;
        let plain = |i: usize| self.theta.powf(-2.0 * i as f64 / head_dim as f64);
        match self.scaling {
            RopeScaling::None => (0..half).map(plain).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => (0
                ..half)
                .map(|i| {
                    let turns = original_positions * plain(i) / TAU;
                    let kept =
                        ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    plain(i) * (kept + (1.0 - kept) / factor)
                })
                .collect(),
            RopeScaling::Yarn { factor, original_positions, beta_fast, beta_slow, truncate, .. } => {
                // The dimension whose wavelength makes this many turns within the original length.
                let dim_of = |turns: f64| {
                    head_dim as f64 * (original_positions / (turns * TAU)).ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (dim_of(beta_fast), dim_of(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let low = low.max(0.0);
                let high = high.min(head_dim as f64 - 1.0);
                let width = if low == high { 0.001 } else { high - low };
                (0..half)
                    .map(|i| {
                        let kept = 1.0 - ((i as f64 - low) / width).clamp(0.0, 1.0);
                        plain(i) * (kept + (1.0 - kept) / factor)
                    })
                    .collect()
            }
        }
    }

    /// Factor of cosine and sine.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }
}

/// YaRN's attention temperature; `mscale` and `mscale_all_dim` as DeepSeek's configs have them.
fn yarn_attention(factor: f64, mscale: Option<f64>, mscale_all_dim: Option<f64>) -> f64 {
    let of = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    match (mscale, mscale_all_dim) {
        (Some(m), Some(all)) if m != 0.0 && all != 0.0 => of(m) / of(all),
        _ => of(1.0),
    }
}

fn unknown_type(what: &str, key: &str) -> pkv_core::Hinted {
    hinted(
        format!("{what} is not supported (`{key}`)"),
        "supported are `default`, `llama3` and `yarn`; a checkpoint that only gains length from its scaling \
         may be used without it: delete the key from a local copy of config.json",
    )
}

/// Frequencies on a device, ready to turn positions into rotations.
#[derive(Debug)]
pub(crate) struct Rope {
    frequencies_d: Tensor,
    attention_factor: f64,
    kind: Kind,
}

impl Rope {
    pub fn new(config: &RopeConfig, head_dim: usize, device: Device, kind: Kind) -> Self {
        let frequencies = config.frequencies(head_dim);
        let frequencies_d = Tensor::from_slice(&frequencies).to_kind(Kind::Float).to_device(device);
        Self { frequencies_d, attention_factor: config.attention_factor(), kind }
    }

    /// Another handle on the same frequencies.
    pub fn share(&self) -> Self {
        Self { frequencies_d: self.frequencies_d.shallow_clone(), ..*self }
    }

    /// The rotation at each of `positions`, which may be on another device.
    ///
    /// # Shapes
    /// - `positions`: f32, any shape `[..]`; exact below 2^24
    /// - returns cosine and sine; a model of bf16 or f16 rotates in f32
    pub fn at(&self, positions: &Tensor) -> Rotation {
        let positions = positions.to_device(self.frequencies_d.device());
        let angles = positions.unsqueeze(-1) * &self.frequencies_d;
        let exact = |t: Tensor| if self.attention_factor == 1.0 { t } else { t * self.attention_factor };
        Rotation::new([exact(angles.cos()), exact(angles.sin())], self.kind)
    }

    /// The move `by` positions further on. The attention factor stays out: what was rotated has it already.
    ///
    /// The angle of long distances is taken in f64, of the frequencies that [`Self::at`] uses.
    pub fn movement(&self, by: i64) -> Movement {
        let angles_d = self.frequencies_d.to_kind(Kind::Double) * by;
        let [cos_d, sin_d] = [angles_d.cos(), angles_d.sin()].map(|t| t.to_kind(Kind::Float));
        Movement::new(cos_d, sin_d)
    }

    /// The rotation at `len` positions from `start` on.
    pub fn range(&self, start: usize, len: usize) -> Rotation {
        let (start, end) = (start as i64, (start + len) as i64);
        self.at(&Tensor::arange_start(start, end, (Kind::Float, self.frequencies_d.device())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pkv_gpu::{Projected, rotate};
    use serde_json::json;

    fn config(json: Value) -> Result<RopeConfig> {
        RopeConfig::from_config(json.as_object().unwrap(), 40960)
    }

    /// Qwen3's recommended YaRN, worked out by hand: theta 1e6, 128 dimensions, 32768 positions.
    #[test]
    fn yarn_keeps_fast_dimensions_and_divides_slow_ones() {
        let rope = config(json!({
            "rope_theta": 1e6,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
        }))
        .unwrap();
        let plain = RopeConfig { theta: 1e6, scaling: RopeScaling::None }.frequencies(128);
        let scaled = rope.frequencies(128);
        // 128 ln(32768 / (32 * 2 pi)) / (2 ln 1e6) = 23.6 and 39.65: the ramp runs from 23 to 40.
        assert_eq!(scaled[..24], plain[..24]);
        for i in 40..64 {
            assert!((scaled[i] / plain[i] - 0.25).abs() < 1e-12, "dimension {i}");
        }
        let middle = 1.0 - (32.0 - 23.0) / 17.0;
        assert!((scaled[32] / plain[32] - (middle + (1.0 - middle) / 4.0)).abs() < 1e-12);
        assert!((rope.attention_factor() - 1.138_629_436_111_989).abs() < 1e-12);
    }

    #[test]
    fn llama3_divides_long_wavelengths() {
        let rope = config(json!({
            "rope_theta": 500000.0,
            "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        }))
        .unwrap();
        let plain = RopeConfig { theta: 500_000.0, scaling: RopeScaling::None }.frequencies(64);
        for (i, (scaled, plain)) in rope.frequencies(64).iter().zip(&plain).enumerate() {
            let turns = 8192.0 * plain / TAU;
            let expected = match turns {
                n if n < 1.0 => 1.0 / 32.0,
                n if n > 4.0 => 1.0,
                n => (n - 1.0) / 3.0 + (1.0 - (n - 1.0) / 3.0) / 32.0,
            };
            assert!((scaled / plain - expected).abs() < 1e-12, "dimension {i}");
        }
        assert_eq!(rope.attention_factor(), 1.0);
    }

    #[test]
    fn rotation_turns_pairs_by_their_angle() {
        let rope = RopeConfig { theta: 100.0, scaling: RopeScaling::None };
        let rotation = Rope::new(&rope, 4, Device::Cpu, Kind::Double).range(2, 2);
        // A query head, and a KV head's key and value.
        let x = Tensor::from_slice(&[1.0f64, 2.0, 3.0, 4.0]).expand([2, 3, 4], false).contiguous();
        let turned = rotate(&x, 1, None, &rotation, None).unwrap().q;
        let turned = Vec::<f64>::try_from(turned.reshape([-1])).unwrap();
        for (row, position) in [2.0f64, 3.0].iter().enumerate() {
            for (pair, frequency) in [1.0, 0.1].iter().enumerate() {
                let (sin, cos) = (position * frequency).sin_cos();
                let (a, b) = (1.0 + pair as f64, 3.0 + pair as f64);
                assert!((turned[row * 4 + pair] - (a * cos - b * sin)).abs() < 1e-6);
                assert!((turned[row * 4 + pair + 2] - (b * cos + a * sin)).abs() < 1e-6);
            }
        }
    }

    /// Angles in bf16 are off by up to 0.004 each, and so is a pair's product with them.
    #[test]
    fn half_precision_rounds_nothing_but_the_result() {
        let rope = RopeConfig { theta: 10_000.0, scaling: RopeScaling::None };
        tch::manual_seed(1);
        for kind in [Kind::BFloat16, Kind::Half] {
            let x = Tensor::randn([40, 4, 16], (Kind::Float, Device::Cpu)).to_kind(kind);
            let rotated = |in_kind| {
                let rotation = Rope::new(&rope, 16, Device::Cpu, in_kind).range(1000, 40);
                let Projected { q, k, .. } = rotate(&x.to_kind(in_kind), 2, None, &rotation, None).unwrap();
                Tensor::cat(&[q, k], 1).to_kind(kind)
            };
            assert!(rotated(kind).equal(&rotated(Kind::Float)), "{kind:?}");
        }
    }

    /// As transformers 5.24 reads them (`config.rope_parameters` after loading).
    #[test]
    fn of_two_places_for_a_value_the_one_of_transformers_counts() {
        let yarn = |more: Value| {
            let mut json = json!({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 8.0}});
            for (key, value) in more.as_object().unwrap() {
                json[key] = value.clone();
            }
            config(json).unwrap()
        };
        let original = |rope: RopeConfig| match rope.scaling {
            RopeScaling::Yarn { original_positions, .. } | RopeScaling::Llama3 { original_positions, .. } => {
                original_positions
            }
            RopeScaling::None => 0.0,
        };
        assert_eq!(original(yarn(json!({}))), 40960.0);
        assert_eq!(original(yarn(json!({"original_max_position_embeddings": 64}))), 64.0);
        let llama3 = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4});
        let mut both = llama3.clone();
        both["original_max_position_embeddings"] = json!(128);
        for (json, expected) in [
            (json!({"rope_scaling": llama3}), 40960.0),
            (json!({"rope_scaling": both}), 128.0),
            (json!({"rope_scaling": both, "original_max_position_embeddings": 32}), 32.0),
            // What 4.x wrote wins over what 5.x writes, unless it is empty.
            (json!({"rope_scaling": both, "rope_parameters": {"rope_theta": 5e5}}), 128.0),
            (json!({"rope_scaling": {}, "rope_parameters": both}), 128.0),
            (json!({"rope_scaling": null, "rope_parameters": both}), 128.0),
        ] {
            assert_eq!(original(config(json.clone()).unwrap()), expected, "{json}");
        }
        let betas =
            yarn(json!({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 0, "beta_slow": 0}}));
        let RopeScaling::Yarn { beta_fast, beta_slow, .. } = betas.scaling else { panic!("{betas:?}") };
        assert_eq!((beta_fast, beta_slow), (32.0, 1.0));
        for (value, expected) in
            [(json!(null), false), (json!(false), false), (json!(0), false), (json!(1), true)]
        {
            let rope = yarn(json!({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": value}}));
            let RopeScaling::Yarn { truncate, .. } = rope.scaling else { panic!("{rope:?}") };
            assert_eq!(truncate, expected, "{value}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let missing = config(json!({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}})).unwrap_err();
        assert_eq!(missing.to_string(), "`rope_parameters.low_freq_factor` is missing");
        assert!(config(json!({"rope_theta": 0.0})).is_err());
        assert!(config(json!({"rope_scaling": {"type": "yarn", "factor": 0.5}})).is_err());
        assert!(
            config(json!({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "false"}})).is_err()
        );
        assert_eq!(config(json!({})).unwrap().theta, 10_000.0);
    }
}
