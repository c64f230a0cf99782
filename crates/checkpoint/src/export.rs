//! The export: a frozen mapper that needs neither the run folder nor this program's defaults.
//!
//! `config.json` holds every choice that the weights depend on, spelt out; a later default cannot
//! change what an export means.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use pkv_core::{Fingerprint, ModelShape, Seed, Source, hinted, seal, unseal};
use pkv_files::{Published, TEMPORARY, WriteBudget, parent, remove_whole, sync_dir, write_error, write_file};
use pkv_mapper::{Mapper, MapperDims, Standardization};
use pkv_prune::HeadBudgets;
use pkv_recipe::{ExtractSection, LabelSection, LossSection, MapperSection, TrainSection, Variant};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Device, Tensor};

use crate::budgets::{self, BUDGETS_FILE};
use crate::card::{self, ModelCard};
use crate::tensors::{NamedTensors, check_file, pick, read_tensors, write_tensors};

/// Version of the export's format; 2, which is read too, held the numbers that the loss had learned beside
/// the network's.
pub const EXPORT_VERSION: u32 = 3;

const MODEL: &str = "model.safetensors";
const PARITY: &str = "parity.safetensors";
const CONFIG: &str = "config.json";
const CARD: &str = "README.md";
/// A hint that names more folders is not read.
const MOST_NAMED: usize = 8;

/// Every file of an export, but for [`BUDGETS_FILE`], which older exports lack.
pub const EXPORT_FILES: [&str; 4] = [CARD, CONFIG, MODEL, PARITY];

/// Largest difference from the parity vectors, as a share of their spread: devices round differently, while
/// another mapper is off by as much as the spread itself.
const PARITY_TOLERANCE: f64 = 1e-2;

/// `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportConfig {
    /// [`EXPORT_VERSION`] when written, or 2.
    pub schema_version: u32,
    /// Version of the program that wrote it.
    pub written_by: String,
    /// The recipe's name.
    pub name: String,
    pub target: ModelIdentity,
    /// Absent if no feature comes from it; exports of earlier versions name one all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<ModelIdentity>,
    /// The mapper's input and output sizes.
    pub dims: ExportDims,
    pub label: LabelSection,
    pub extract: ExtractSection,
    pub mapper: MapperSection,
    pub loss: LossSection,
    pub train: TrainSection,
    /// Training's fingerprint: the same choices, with those of the stages before.
    pub fingerprint: Fingerprint,
    /// Steps that the weights were trained for.
    pub step: u64,
    /// Mean validation recall at `train.best_by`.
    pub validation: Option<f64>,
    pub seed: Seed,
    /// Tokens of the longest training contexts; absent in older exports.
    #[serde(default)]
    pub trained_tokens: Option<usize>,
    /// Size and hash of the other files; filled in by [`Export::write`].
    #[serde(default)]
    pub files: BTreeMap<String, ExportFile>,
}

/// A model of the pair, as found when it was read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelIdentity {
    /// Hub name or folder.
    pub model: String,
    /// Commit, or hash of a local folder.
    pub revision: String,
    /// Dtype it ran in.
    pub dtype: String,
    pub shape: ModelShape,
    /// Of the sorted vocabulary.
    pub vocab_hash: String,
    /// Of the chat template.
    pub template_hash: String,
}

impl ModelIdentity {
    /// Whether another shape or vocabulary is not this model's: what differs, what it is here, and there.
    pub fn difference(&self, shape: &ModelShape, vocab_hash: &str) -> Option<(&'static str, String, String)> {
        if self.shape != *shape {
            return Some(("shape", self.shape.to_string(), shape.to_string()));
        }
        let other = (self.vocab_hash != vocab_hash).then(|| vocab_hash.to_owned())?;
        Some(("vocabulary", self.vocab_hash.clone(), other))
    }
}

/// [`MapperDims`], as written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportDims {
    pub proxy_heads: usize,
    pub channels: usize,
    pub globals: usize,
    pub outputs: usize,
}

impl ExportConfig {
    /// The proxy, if features come from it.
    pub fn read_proxy(&self) -> Option<&ModelIdentity> {
        self.proxy.as_ref().filter(|_| self.extract.from.contains(&Source::Proxy))
    }
}

/// Size and hash of a file in the folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportFile {
    pub bytes: u64,
    pub sha256: String,
}

/// One real context's features and what the mapper makes of them: what a port is held against.
#[derive(Debug)]
pub struct Parity {
    /// Raw features, f32 `[proxy heads, channels, positions]`.
    pub heads_pct: Tensor,
    /// f32 `[global channels, positions]`.
    pub globals_ct: Tensor,
    /// The mapper's scores, f32 `[target heads, positions]`.
    pub scores_ot: Tensor,
}

/// Contents of an export to be written.
#[derive(Clone, Copy)]
pub struct Contents<'a> {
    pub config: &'a ExportConfig,
    pub mapper: &'a Mapper,
    /// Stored with the weights: what extracting its features needs.
    pub tensors: &'a [(String, Tensor)],
    pub budgets: Option<&'a HeadBudgets>,
    pub card: &'a ModelCard,
    pub parity: &'a Parity,
}

/// An export that was read and found whole.
#[derive(Debug)]
pub struct Export {
    folder: PathBuf,
    config: ExportConfig,
    tensors: NamedTensors,
    budgets: Option<HeadBudgets>,
}

impl Parity {
    /// The mapper's scores of one context.
    ///
    /// # Shapes
    /// - `heads_pct`: raw features, `[proxy heads, channels, positions]`, f32, on the mapper's device
    /// - `globals_ct`: `[global channels, positions]`
    pub fn of(mapper: &Mapper, heads_pct: Tensor, globals_ct: Tensor) -> Self {
        let _no_grad = tch::no_grad_guard();
        let scores_ot = mapper.forward(&heads_pct.unsqueeze(0), &globals_ct.unsqueeze(0)).squeeze_dim(0);
        Self { heads_pct, globals_ct, scores_ot }
    }
}

impl Export {
    /// Write an export to `folder`, replacing one that is there; whole or not at all.
    ///
    /// # Errors
    /// The disk is full or fails: the export that was there is still there.
    pub fn write(folder: &Path, contents: Contents) -> Result<()> {
        Self::write_within(folder, contents, &WriteBudget::from_env())
    }

    /// As [`Export::write`], on a disk that has `budget` left.
    pub fn write_within(folder: &Path, contents: Contents, budget: &WriteBudget) -> Result<()> {
        let temporary = with_ending(folder, TEMPORARY);
        let context = || format!("cannot write export `{}`", folder.display());
        let result = fill(&temporary, contents, budget);
        if result.is_err() {
            // Its bytes may be what the disk lacks.
            let _ = remove_whole(&temporary);
        }
        result.with_context(context)?;
        replace(folder, &temporary).map_err(|e| write_error(folder, e)).with_context(context)
    }

    /// Read the export in `folder` and compare every file with its hash.
    ///
    /// # Errors
    /// It is absent, damaged, or of another version.
    pub fn read(folder: &Path) -> Result<Self> {
        let read = || -> Result<Self> {
            let config = read_config(&folder.join(CONFIG))?;
            for (name, expected) in &config.files {
                check_file(folder, name, expected.bytes, &expected.sha256)?;
            }
            let tensors = read_tensors(&folder.join(MODEL), Device::Cpu)?;
            check_sizes(&config, &tensors)?;
            let weights = config.files.get(MODEL).map(|file| file.sha256.as_str());
            let budgets = budgets::read(folder, &config.target.shape, weights)?;
            Ok(Self { folder: folder.to_path_buf(), config, tensors, budgets })
        };
        ensure!(
            folder.exists(),
            hinted(
                format!("cannot read export `{}`: there is no such folder", folder.display()),
                format!("{}name an export, or the run folder that contains it", beside(folder))
            )
        );
        ensure!(
            !is_model(&folder.join(CONFIG)),
            hinted(
                format!("`{}` is a language model, not a mapper", folder.display()),
                "name a run folder, or the export in it that `proxykv-train export` wrote"
            )
        );
        ensure!(
            folder.is_file() || [CONFIG, MODEL, PARITY].iter().any(|name| folder.join(name).exists()),
            hinted(
                format!("cannot read export `{}`: it has none of an export's files", folder.display()),
                "name an export, or the run folder that contains it"
            )
        );
        read().with_context(|| {
            hinted(
                format!("cannot read export `{}`", folder.display()),
                "write it again: `proxykv-train export` makes it from the run's best checkpoint",
            )
        })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn config(&self) -> &ExportConfig {
        &self.config
    }

    /// SHA-256 of the file of weights and standardization: what the mapper is, wherever the export lies.
    pub fn weights_hash(&self) -> Option<&str> {
        self.config.files.get(MODEL).map(|file| file.sha256.as_str())
    }

    /// Weights and standardization, in the order of their names, on the host.
    pub fn tensors(&self) -> &NamedTensors {
        &self.tensors
    }

    /// Budgets of the policy `pair-budget`; none in older exports.
    pub const fn budgets(&self) -> Option<&HeadBudgets> {
        self.budgets.as_ref()
    }

    /// The mapper, bit for bit as it was written.
    ///
    /// # Errors
    /// The tensors do not fit the configuration.
    pub fn mapper(&self, device: Device) -> Result<Mapper> {
        let c = &self.config;
        restore_mapper(&c.mapper, c.dims.into(), &self.tensors, device).with_context(|| {
            format!("the tensors of export `{}` do not fit its `{CONFIG}`", self.folder.display())
        })
    }

    /// Whether others can use it: the weights give the parity vectors' scores, and the card can be
    /// indexed.
    ///
    /// # Errors
    /// They do not, or the card is absent or has no front matter.
    pub fn check(&self) -> Result<()> {
        let again = "write the export again: `proxykv-train export`";
        let unsound = || hinted(format!("export `{}` is not sound", self.folder.display()), again);
        let check = || -> Result<()> {
            let parity = self.parity()?;
            let found = Parity::of(&self.mapper(Device::Cpu)?, parity.heads_pct, parity.globals_ct).scores_ot;
            ensure!(
                found.size() == parity.scores_ot.size(),
                "its mapper gives scores {:?}, `{PARITY}` holds {:?}",
                found.size(),
                parity.scores_ot.size()
            );
            let off = (&found - &parity.scores_ot).abs().max().double_value(&[]);
            let allowed = PARITY_TOLERANCE * parity.scores_ot.std(false).double_value(&[]).max(1e-3);
            // Also false if a score is not a number.
            ensure!(
                off <= allowed,
                "its mapper's scores are off from those in `{PARITY}` by up to {off:.2e}, allowed are {allowed:.2e}"
            );
            let path = self.folder.join(CARD);
            let text = pkv_core::read_small_text(&path)
                .with_context(|| format!("cannot read `{}`", path.display()))?;
            card::check(&text)
                .with_context(|| format!("the model card `{}` cannot be indexed", path.display()))
        };
        check().with_context(unsound)
    }

    /// The parity vectors, on the host.
    ///
    /// # Errors
    /// The file is damaged.
    pub fn parity(&self) -> Result<Parity> {
        let tensors = read_tensors(&self.folder.join(PARITY), Device::Cpu)?;
        let get = |name| Ok::<_, anyhow::Error>(pick(&tensors, [name])?.remove(0).1);
        Ok(Parity {
            heads_pct: get("heads_pct")?,
            globals_ct: get("globals_ct")?,
            scores_ot: get("scores_ot")?,
        })
    }
}

fn fill(temporary: &Path, contents: Contents, budget: &WriteBudget) -> Result<()> {
    let Contents { config, mapper, tensors: extra, budgets, card, parity } = contents;
    remove_whole(temporary).with_context(|| format!("cannot remove `{}`", temporary.display()))?;
    fs::create_dir_all(temporary).map_err(|e| write_error(temporary, e))?;
    let mut tensors: NamedTensors =
        mapper.parameters().iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect();
    tensors.extend(mapper.buffers());
    tensors.extend(extra.iter().map(|(name, t)| (name.clone(), t.shallow_clone())));
    let parity = [
        ("heads_pct".to_owned(), parity.heads_pct.shallow_clone()),
        ("globals_ct".to_owned(), parity.globals_ct.shallow_clone()),
        ("scores_ot".to_owned(), parity.scores_ot.shallow_clone()),
    ];
    let mut config = config.clone();
    config.files.clear();
    let text = card.render(&config);
    let mut add = |name: &str, p: Published| {
        config.files.insert(name.to_owned(), ExportFile { bytes: p.bytes, sha256: p.sha256 });
    };
    let weights = write_tensors(&temporary.join(MODEL), &tensors, budget)?;
    if let Some(budgets) = budgets {
        let text = budgets::render(budgets, &config.target.shape, &weights.sha256)?;
        write_file(&temporary.join(BUDGETS_FILE), text.as_bytes(), budget)?;
    }
    add(MODEL, weights);
    add(PARITY, write_tensors(&temporary.join(PARITY), &parity, budget)?);
    write_file(&temporary.join(CARD), text.as_bytes(), budget)?;
    let text = serde_json::to_string_pretty(&config).context("cannot write the configuration as JSON")?;
    let text = seal(&text) + "\n";
    write_file(&temporary.join(CONFIG), text.as_bytes(), budget)?;
    sync_dir(temporary).map_err(|e| write_error(temporary, e))
}

/// Put `temporary` in the place of `folder`.
fn replace(folder: &Path, temporary: &Path) -> std::io::Result<()> {
    let old = with_ending(folder, ".old.tmp");
    remove_whole(&old)?;
    // Whatever is there: it may be no folder, or a link to nothing.
    match fs::rename(folder, &old) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        renamed => renamed?,
    }
    fs::rename(temporary, folder)?;
    sync_dir(parent(folder))?;
    remove_whole(&old)
}

fn with_ending(folder: &Path, ending: &str) -> PathBuf {
    let mut name = folder.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

/// Whether that file is a language model's configuration, which says its type.
fn is_model(config: &Path) -> bool {
    let text = pkv_core::read_small_text(config).unwrap_or_default();
    serde_json::from_str::<Value>(&text)
        .is_ok_and(|value| value.get("model_type").is_some() && value.get("schema_version").is_none())
}

fn read_config(path: &Path) -> Result<ExportConfig> {
    let context = || format!("cannot read `{}`", path.display());
    let text = pkv_core::read_small_text(path).with_context(context)?;
    let mut value: Value = serde_json::from_str(&text).with_context(context)?;
    ensure!(
        value["schema_version"]
            .as_u64()
            .is_some_and(|found| found == 2 || found == u64::from(EXPORT_VERSION)),
        "expected export version 2 or {EXPORT_VERSION}, found {} in `{}`",
        value["schema_version"],
        path.display()
    );
    unseal(&mut value).with_context(context)?;
    let config: ExportConfig = serde_json::from_value(value).with_context(context)?;
    config.mapper.check().with_context(context)?;
    ensure!(
        config.proxy.is_some() || !config.extract.from.contains(&Source::Proxy),
        "the mapper of `{}` reads features of a proxy, and it names none",
        path.display()
    );
    Ok(config)
}

/// The mapper that `config` asks for is not larger than the file of its weights, before any memory is taken
/// for it.
fn check_sizes(config: &ExportConfig, tensors: &NamedTensors) -> Result<()> {
    let (m, d) = (&config.mapper, &config.dims);
    let [p, c, g, o] = [d.proxy_heads, d.channels, d.globals, d.outputs].map(|n| n as u128);
    // No product of four such sizes is out of range.
    let most = 1 << 31;
    ensure!(
        [p, c, g, o].iter().all(|&n| n <= most),
        "`dims` of its `{CONFIG}` has a size above {most}: {d:?}"
    );
    let [head, width, cross, wide] =
        [m.head_width, m.width, m.cross_width, m.width * m.feed_forward].map(|n| n as u128);
    let inputs = p * c + g;
    let blocks = (m.dilations.len() as u128) * width * width;
    // Its largest matrices alone.
    let body = match m.variant {
        Variant::HybridAxial => head * (c + head) + (p * head + g) * width + blocks + o * (width + cross),
        Variant::Conv => inputs * width + blocks + o * width,
        Variant::Mlp => inputs * wide + wide * wide + o * wide,
        Variant::Linear => 0,
    };
    let skip = if m.linear_skip || m.variant == Variant::Linear { inputs * o } else { 0 };
    let stored: u128 = tensors.iter().map(|(_, t)| t.numel() as u128).sum();
    ensure!(
        body + skip <= stored,
        "`dims` and `mapper` of its `{CONFIG}` ask for at least {} weights, `{MODEL}` holds {stored}",
        body + skip
    );
    Ok(())
}

/// A mapper with the weights and standardization that `tensors` names; tensors of other names are left alone.
///
/// # Errors
/// One is missing, or of another shape than the sections ask for.
pub fn restore_mapper(
    section: &MapperSection,
    dims: MapperDims,
    tensors: &[(String, Tensor)],
    device: Device,
) -> Result<Mapper> {
    let stats = Standardization::from_buffers(tensors)?;
    // The seed starts weights that are all overwritten.
    let mapper = Mapper::new(section, dims, stats, Seed(0), device)?;
    mapper.load_parameters(tensors)?;
    Ok(mapper)
}

impl From<ExportDims> for MapperDims {
    fn from(d: ExportDims) -> Self {
        Self { proxy_heads: d.proxy_heads, channels: d.channels, globals: d.globals, outputs: d.outputs }
    }
}

impl From<MapperDims> for ExportDims {
    fn from(d: MapperDims) -> Self {
        Self { proxy_heads: d.proxy_heads, channels: d.channels, globals: d.globals, outputs: d.outputs }
    }
}

/// What else there is where `folder` was looked for, as the beginning of a hint.
fn beside(folder: &Path) -> String {
    let Some(parent) = folder.parent().filter(|p| !p.as_os_str().is_empty()) else { return String::new() };
    let folders = parent.read_dir().into_iter().flatten().flatten().filter(|e| e.path().is_dir());
    let mut names: Vec<String> =
        folders.map(|e| format!("`{}`", parent.join(e.file_name()).display())).collect();
    names.sort();
    if names.is_empty() || names.len() > MOST_NAMED {
        return String::new();
    }
    format!("there is {}; ", names.join(", "))
}
