//! The model that is timed, and the tokens that it reads.

use anyhow::{Context, Result};
use pkv_core::{LayerSplit, ModelShape, Seed, Source, hinted};
use pkv_gpu::{kind_on, unless_exhausted};
use pkv_hub::{Hub, Lock};
use pkv_lm::{LanguageModel, LmConfig, Placement};
use pkv_recipe::{LabelSection, ModelSection, Recipe};
use pkv_score::{ModelFiles, Requests};
use rand::Rng;
use serde_json::json;
use tch::{Device, Kind};

use crate::{Models, Setting};

/// Tokens of Llama 3's chat template before and after the user's text, and of KVzip's two requests.
/// The same numbers are in `scripts/peer/time_kvpress.py`.
const PREFIX: usize = 30;
const SWITCH: usize = 5;
const FIRST: usize = 8;
const LATER: usize = 13;

/// Models below this many parameters share their embedding with the output: so do Llama 3.2, Qwen2.5
/// to 3B and Qwen3 to 4B. It decides about memory only.
const TIED_BELOW: usize = 4_000_000_000;

/// One of the recipe's two models, not yet made.
pub struct Subject<'a> {
    pub section: &'a ModelSection,
    pub role: Source,
    pub kind: Kind,
    recipe: &'a Recipe,
    /// Of its layers.
    devices: Vec<Device>,
    random: bool,
}

impl<'a> Subject<'a> {
    /// # Errors
    /// It is the proxy, and the recipe has none.
    pub fn new(setting: &Setting<'a>, role: Source, models: Models) -> Result<Self> {
        let Setting { recipe, device, target_devices, .. } = *setting;
        let section = match role {
            Source::Target => &recipe.target,
            Source::Proxy => recipe.proxy.as_ref().with_context(|| {
                hinted(
                    "the benchmark measures a proxy, and the recipe has no section `[proxy]`",
                    "add `[proxy]` with its `model` and `[proxy.shape]`, or name feature sets of the target: `--features target`",
                )
            })?,
        };
        let (kind, random) = (kind_on(device, section.dtype), models.random_weights);
        let devices = match role {
            Source::Target => target_devices.to_vec(),
            Source::Proxy => vec![device],
        };
        Ok(Self { section, role, kind, recipe, devices, random })
    }

    /// The model, random or from its files; `None` if it does not fit.
    ///
    /// # Errors
    /// The files are absent or do not fit the recipe.
    pub fn model(&self) -> Result<Option<LanguageModel>> {
        unless_exhausted(|| {
            if self.random {
                let config = random_config(self.section)?;
                let placement = self.placement(&config.shape)?;
                return Ok(LanguageModel::random_over(config, placement, self.kind, 0));
            }
            let hub = Hub::from_env().with_lock(Lock::beside(&self.recipe.path)?);
            ModelFiles::of_recipe(&hub, self.recipe, self.role, self.section)
                .with_context(|| format!("cannot open the {} `{}`", self.role.name(), self.section.model))?
                .load(self.kind, |shape| self.placement(shape))
        })
    }

    fn placement(&self, shape: &ModelShape) -> Result<Placement> {
        match &*self.devices {
            [device] => Ok(Placement::whole(*device, shape.layers)),
            devices => Placement::over(devices, &LayerSplit::even(shape.layers, devices.len())?),
        }
    }

    /// The model where nothing can be measured without it.
    ///
    /// # Errors
    /// As of [`Subject::model`]; or it does not fit.
    pub fn needed_model(&self) -> Result<LanguageModel> {
        self.model()?.with_context(|| {
            hinted(
                format!("the {} alone does not fit into the device's memory", self.role.name()),
                "free the device of other work, or name a recipe with a smaller model",
            )
            .environment()
        })
    }

    /// `n` tokens of the vocabulary, the same ones every time.
    fn tokens(&self, n: usize) -> Vec<u32> {
        let mut rng = Seed(0).stream("bench tokens", n as u64);
        (0..n).map(|_| rng.random_range(0..self.section.shape.vocab as u32)).collect()
    }

    pub fn prefix(&self) -> Vec<u32> {
        self.tokens(PREFIX)
    }

    /// A context of `n` tokens, without the prefix.
    pub fn context(&self, n: usize) -> Vec<u32> {
        self.tokens(n)
    }

    /// Requests as long as KVzip's.
    pub fn requests(&self, label: &LabelSection) -> Requests {
        let [first, later, switch] = [FIRST, LATER, SWITCH].map(|n| self.tokens(n));
        Requests::from_ids(first, later, switch, label.chunk())
    }
}

/// Tokens of the template around a context: what plan's formulas ask for.
pub const TEMPLATE: usize = PREFIX + SWITCH;
/// Positions that prefill reads before the context.
pub const PREFIX_TOKENS: usize = PREFIX;

/// A configuration of the recipe's shape in the family that the model's name suggests.
fn random_config(section: &ModelSection) -> Result<LmConfig> {
    let name = section.model.to_lowercase();
    let family = pkv_lm::model_types().find(|f| name.contains(f)).unwrap_or("llama");
    let s = &section.shape;
    LmConfig::from_json(&json!({
        "model_type": family,
        "num_hidden_layers": s.layers,
        "num_key_value_heads": s.kv_heads,
        "num_attention_heads": s.query_heads,
        "head_dim": s.head_dim,
        "hidden_size": s.hidden,
        "intermediate_size": s.intermediate,
        "vocab_size": s.vocab,
        "rope_theta": if family == "llama" { 500_000.0 } else { 1_000_000.0 },
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1 << 18,
        "tie_word_embeddings": s.matrix_parameters() < TIED_BELOW,
        // A family may have a window where the key is absent.
        "sliding_window": null,
    }))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use pkv_core::Stop;

    use super::*;

    #[test]
    fn a_shape_and_a_name_make_a_configuration() {
        let recipe = |path: &str| {
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
            pkv_recipe::load(&root.join(path), &[]).unwrap()
        };
        for (path, family) in [
            ("llama-3.1-8b--llama-3.2-1b.toml", "llama"),
            ("qwen2.5-7b--qwen2.5-0.5b.toml", "qwen2"),
            ("qwen3-8b--qwen3-0.6b.toml", "qwen3"),
        ] {
            let recipe = recipe(path);
            let of_proxy = recipe.proxy.as_ref().unwrap();
            let (target, proxy) = (random_config(&recipe.target).unwrap(), random_config(of_proxy).unwrap());
            assert_eq!((target.family, target.shape), (family, recipe.target.shape));
            assert_eq!((proxy.family, proxy.shape), (family, of_proxy.shape));
            assert!(!target.tied_head && proxy.tied_head);
        }
        let mut named = recipe("demo-nano.toml").target;
        for family in pkv_lm::model_types() {
            named.model = format!("of/{family}");
            assert_eq!(random_config(&named).unwrap().family, family);
        }
    }

    #[test]
    fn tokens_are_of_the_vocabulary_and_always_the_same() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/demo-nano.toml");
        let recipe = pkv_recipe::load(&root, &[]).unwrap();
        let setting = Setting {
            recipe: &recipe,
            contexts: &[],
            device: Device::Cpu,
            target_devices: &[Device::Cpu],
            repeats: 1,
            most: Duration::MAX,
            stop: &Stop::default(),
        };
        let models = Models { random_weights: true, peer: None };
        let subject = Subject::new(&setting, Source::Target, models).unwrap();
        let context = subject.context(500);
        assert!(context.len() == 500 && context.iter().all(|&id| id < 4096));
        assert_eq!(context, subject.context(500));
        let requests = subject.requests(&recipe.label);
        let longer = subject.context(5000);
        assert_eq!(requests.ids(&longer, &(2000..4000)).len(), LATER + 8 + SWITCH + 2000);
        // A proxy beside the target, as `dual` has it.
        let beside = Setting { device: Device::Cuda(1), ..setting };
        assert_eq!(Subject::new(&beside, Source::Proxy, models).unwrap().devices, [Device::Cuda(1)]);
        assert_eq!(Subject::new(&beside, Source::Target, models).unwrap().devices, [Device::Cpu]);
    }
}
