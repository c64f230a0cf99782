//! An export and the models it is asked of: found, compared, and loaded for one context.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use pkv_checkpoint::{Export, ModelIdentity};
use pkv_core::{DtypeName, LayerNeeds, Policy, Source, Stop, hinted};
use pkv_extract::HiddenProjection;
use pkv_gpu::{device_name, devices_name, kind_on};
use pkv_hub::Hub;
use pkv_lm::{LanguageModel, Placement, RaggedCache};
use pkv_recipe::plan::{TargetMemory, activation_elements, human_bytes};
use pkv_score::{ModelFiles, Requests};
use pkv_text::TextTokenizer;
use tch::{Device, Kind};

use crate::fit::check_fit;
use crate::keep::{Budget, Keep};
use crate::proxy::{NoProxy, ProxyMapper, ProxyParts};
use crate::regime::{
    Parallel, PrefillInput, Prefilled, Regime, RegimeName, Sequential, check_devices, check_length,
};
use crate::summary::Summary;
use crate::target_side::TargetSide;

/// What is asked of an export, but for the context and the questions.
#[derive(Clone, Debug)]
pub struct Request {
    /// The mapper, as the user named it.
    pub mapper: String,
    /// Hub name or folder; the models that the mapper was made for, if absent.
    pub target: Option<String>,
    pub proxy: Option<String>,
    pub budget: Budget,
    pub policy: Policy,
    /// Newest tokens that are always kept.
    pub keep_recent: usize,
    pub regime: RegimeName,
    /// Of the target, or of its last layers, and of what prunes.
    pub device: Device,
    /// Those of the target's layers; `device` is the last.
    pub target_devices: Vec<Device>,
    /// Lay the target over further GPUs where `device` has no room for it.
    pub may_spread: bool,
    pub proxy_device: Device,
    /// Run the mapper while the proxy reads.
    pub overlap: bool,
    pub dtype: DtypeName,
    /// Special tokens in texts are plain text.
    pub special_tokens_as_text: bool,
    /// Tokens per forward of the target's prefill; as when the mapper was trained, if absent.
    pub chunk_tokens: Option<usize>,
    /// Positions that the mapper scores in one forward.
    pub window_tokens: usize,
    /// Longest answer.
    pub max_new_tokens: usize,
    /// Keep the full cache as well, after one more prefill.
    pub compare_full: bool,
}

/// An export that fits the models it is asked of; their weights are not read yet.
pub struct Opened {
    request: Request,
    export: Export,
    target: ModelFiles,
    proxy: Option<ModelFiles>,
}

/// The target with a context in its pruned cache; proxy and mapper are gone.
pub struct Ready {
    pub target: LanguageModel,
    pub tokenizer: TextTokenizer,
    pub prefilled: Prefilled,
    /// The full cache, if it was requested.
    pub whole: Option<RaggedCache>,
    /// Of the prefill; questions are still to come.
    pub summary: Summary,
    pub max_new_tokens: usize,
}

impl Opened {
    /// Open `export` and find its models.
    ///
    /// # Errors
    /// A model is absent, the mapper does not fit the pair, or the request does not fit the mapper.
    pub fn new(export: Export, request: Request) -> Result<Self> {
        check_devices(request.regime, request.device, request.proxy_device)?;
        if request.regime == RegimeName::Dual && request.device == request.proxy_device {
            tracing::warn!(
                "`--regime dual` is made for two GPUs: here target and proxy share the cores of the CPU"
            );
        }
        let (config, mapper, regime) = (export.config(), &request.mapper, request.regime);
        ensure!(
            request.policy != Policy::PairBudget || export.budgets().is_some(),
            hinted(
                format!("the mapper `{mapper}` has no head budgets, which policy `pair-budget` needs"),
                "it was exported before there were budgets: write it again with `proxykv-train export`, or use \
                 `--policy pair-uniform`"
            )
        );
        let near = export.folder();
        let mut target = find(Source::Target, request.target.as_deref(), &config.target, near)?;
        if request.special_tokens_as_text {
            target.tokenizer.read_special_tokens_as_text();
        }
        ensure!(
            request.proxy.is_none() || config.read_proxy().is_some(),
            hinted(
                format!("the mapper `{mapper}` reads the target alone: `--proxy` has no use"),
                "leave `--proxy` out"
            )
        );
        let named = request.proxy.as_deref();
        let find_proxy = |made_for| find(Source::Proxy, named, made_for, near);
        let proxy = config.read_proxy().map(find_proxy).transpose()?;
        ensure!(
            proxy.is_some() || regime == RegimeName::Sequential,
            hinted(
                format!(
                    "the mapper `{mapper}` reads the target alone: the regime `{regime}` has nothing to run beside it"
                ),
                "leave `--regime` out: the features are taken during the target's prefill"
            )
        );
        let differences = check_fit(config, &target, proxy.as_ref())
            .with_context(|| format!("cannot use the mapper `{mapper}`"))?;
        for difference in differences {
            tracing::warn!("{difference}");
        }
        Ok(Self { request, export, target, proxy })
    }

    /// The target's tokenizer.
    pub const fn tokenizer(&self) -> &TextTokenizer {
        &self.target.tokenizer
    }

    /// Refuse a context that leaves no room for questions; warn of one that is longer than those trained on,
    /// or of which the newest tokens fill the budget.
    ///
    /// # Errors
    /// It fills the target's positions.
    pub fn check_context(&self, tokens: usize) -> Result<()> {
        check_length(self.tokenizer().prefix().len() + tokens, self.target.config.max_positions)?;
        let (newest, budget) = (self.request.keep_recent, self.request.budget.positions(tokens));
        if newest >= budget && budget < tokens && newest > 0 {
            tracing::warn!(
                "the newest {newest} tokens, which are kept first, fill the budget of {budget} of {tokens} tokens: \
                 the mapper's scores choose nothing"
            );
        }
        if let Some(most) = self.trained_tokens().filter(|most| tokens > *most) {
            tracing::warn!(
                "the context has {tokens} tokens, the mapper was trained on contexts of at most {most}: what it keeps of \
                 longer ones was not learned"
            );
        }
        Ok(())
    }

    fn trained_tokens(&self) -> Option<usize> {
        let config = self.export.config();
        config.trained_tokens.or(config.train.window_tokens)
    }

    /// Load the models, read `tokens` with them, and prune.
    ///
    /// # Errors
    /// A model cannot be loaded, the target fails, or the user stopped.
    pub fn prefill(mut self, tokens: &[u32], stop: &Stop) -> Result<Ready> {
        let needs = self.needs(tokens.len());
        self.spread(&needs)?;
        let (r, config, trained_tokens) = (&self.request, self.export.config(), self.trained_tokens());
        let budgets = self.export.budgets();
        let keep = Keep { budget: r.budget, policy: r.policy, budgets, recent: r.keep_recent };
        let kind = kind_on(r.device, r.dtype);
        let target_side = self.target_side()?;
        let mut regime = self.regime(target_side.is_some())?;
        let target =
            self.target.load(kind, |shape| Placement::fitting(&r.target_devices, shape.layers, &needs))?;
        let context = PrefillInput {
            target: &target,
            prefix: self.tokenizer().prefix(),
            tokens,
            keep,
            chunk_tokens: r.chunk_tokens.unwrap_or(config.label.prefill_chunk_tokens),
            room_tokens: r.max_new_tokens,
            target_side: target_side.as_ref(),
            stop: stop.clone(),
        };
        let prefilled = regime.prefill(&context)?;
        let whole = r.compare_full.then(|| context.whole()).transpose()?;
        drop(context);
        // A mapper of the target's features waits for the prefill, on any number of devices.
        let apart = r.regime == RegimeName::Sequential && target_side.is_none();
        // Proxy and mapper have done their part; their memory is the answers', or another process's.
        drop((regime, target_side));
        if r.device.is_cuda() || r.proxy_device.is_cuda() {
            pkv_gpu::empty_cache()?;
        }
        let phases = prefilled.timeline.phases();
        let summary = Summary {
            regime: r.regime.name(),
            device: devices_name(&r.target_devices),
            proxy_device: device_name(r.proxy_device),
            dtype: if kind == Kind::BFloat16 { "bf16" } else { "f32" },
            keep: keep.to_string(),
            context_tokens: tokens.len(),
            trained_tokens,
            kept: prefilled.kept.clone(),
            prefill_secs: phases.iter().map(|p| p.end_secs).fold(0.0, f64::max),
            waited_secs: prefilled.waited_secs,
            dual_critical_secs: (apart && prefilled.fallback.is_none())
                .then(|| prefilled.timeline.dual_critical_secs()),
            phases: prefilled.timeline.totals(),
            full: None,
            questions: 0,
            refused: 0,
            answer_tokens: 0,
            decode_tokens_per_s: None,
            fallback: prefilled.fallback.as_ref().map(|e| format!("{e:#}")),
            interrupted: false,
        };
        let (tokenizer, max_new_tokens) = (self.target.tokenizer, self.request.max_new_tokens);
        Ok(Ready { target, tokenizer, prefilled, whole, summary, max_new_tokens })
    }

    /// Memory of the target with its cache, by layer, and of what is beside it.
    fn needs(&self, tokens: usize) -> LayerNeeds {
        let (r, config) = (&self.request, self.export.config());
        let shape = self.target.config.shape;
        let width = |device| kind_on(device, r.dtype).elt_size_in_bytes() as u64;
        let chunk = r.chunk_tokens.unwrap_or(config.label.prefill_chunk_tokens);
        let channels = match config.extract.from.contains(&Source::Target) {
            true => config.extract.of(Source::Target).channels.len(),
            false => 1,
        };
        let proxy = self.proxy.as_ref().filter(|_| r.proxy_device == r.device).map_or(0, |proxy| {
            let shape = proxy.config.shape;
            (shape.matrix_parameters() + 2 * shape.vocab * shape.hidden) as u64 * width(r.proxy_device)
        });
        TargetMemory::at_rest(shape, width(r.device), self.tokenizer().prefix().len() + tokens)
            .working(activation_elements(&shape, tokens.min(chunk)) * width(r.device))
            .gathering((shape.kv_heads * tokens * channels) as u64)
            .beside(proxy)
            .needs()
    }

    /// Take further GPUs for the target's layers, where that is allowed and needed.
    fn spread(&mut self, needs: &LayerNeeds) -> Result<()> {
        let r = &mut self.request;
        if !r.may_spread || r.target_devices.len() > 1 {
            return Ok(());
        }
        let layers = self.target.config.shape.layers;
        let Some(devices) = pkv_lm::spread(r.device, layers, needs)? else { return Ok(()) };
        tracing::info!(
            "the target needs {} with its cache, more than {} has free: its layers go over {}",
            human_bytes(needs.of(0, 1, layers)),
            device_name(r.device),
            devices_name(&devices)
        );
        let home = devices.last().copied().unwrap_or(r.device);
        if r.proxy_device == r.device {
            r.proxy_device = home;
        }
        (r.device, r.target_devices) = (home, devices);
        Ok(())
    }

    /// The mapper beside the target, where it reads the target's features.
    fn target_side(&self) -> Result<Option<TargetSide>> {
        let (r, config) = (&self.request, self.export.config());
        if !config.extract.from.contains(&Source::Target) {
            return Ok(None);
        }
        Ok(Some(TargetSide::new(
            self.export.mapper(r.device)?,
            &config.extract,
            &config.label,
            Requests::new(self.tokenizer(), &config.label)?,
            HiddenProjection::from_tensors(self.export.tensors(), r.device)?,
            r.window_tokens,
        )))
    }

    /// The regime with the proxy, if there is one, and the mapper, unless it is the target's side.
    fn regime(&self, mapper_is_beside_target: bool) -> Result<Box<dyn Regime>> {
        let (r, config) = (&self.request, self.export.config());
        let Some(proxy) = &self.proxy else { return Ok(Box::new(Sequential::new(NoProxy(r.device)))) };
        let device = r.proxy_device;
        let source = ProxyMapper::new(ProxyParts {
            proxy: proxy
                .load(kind_on(device, r.dtype), |shape| Ok(Placement::whole(device, shape.layers)))?,
            mapper: if mapper_is_beside_target { None } else { Some(self.export.mapper(device)?) },
            prefix: proxy.tokenizer.prefix().to_vec(),
            requests: Requests::new(&proxy.tokenizer, &config.label)?,
            extract: config.extract.of(Source::Proxy),
            label: config.label.clone(),
            target: config.target.shape,
            window_tokens: r.window_tokens,
        });
        let source = if r.overlap { source.overlapped()? } else { source };
        Ok(match r.regime {
            RegimeName::Sequential => Box::new(Sequential::new(source)),
            RegimeName::Streams => Box::new(Parallel::streams(source.sharing_device())?),
            RegimeName::Dual => Box::new(Parallel::dual(source)?),
        })
    }
}

/// The model that was named, or the one that the mapper was made for: a folder of the project that the run is
/// in, wherever this process works.
fn find(role: Source, named: Option<&str>, made_for: &ModelIdentity, export: &Path) -> Result<ModelFiles> {
    let (name, revision) = match named {
        Some(name) => (name, "main"),
        None => (made_for.model.as_str(), made_for.revision.as_str()),
    };
    let export = std::path::absolute(export).unwrap_or_default();
    // `PROJECT/runs/NAME/export`.
    let above = export.ancestors().skip(1).take(3).filter(|_| named.is_none());
    let folders: Vec<&Path> = std::iter::once(Path::new("")).chain(above).collect();
    ModelFiles::find(&Hub::from_env(), role, name, revision, &folders).with_context(|| {
        let role = role.name();
        hinted(
            format!("cannot open the {role} `{name}`"),
            format!("name its folder or its hub name with `--{role}`"),
        )
    })
}
