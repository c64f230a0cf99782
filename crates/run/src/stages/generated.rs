//! Source of a stage's features: shards, or the models, which then compute a row each time it is read.
//!
//! A computed row equals the row that `extract` would store: the same extractor, the same rounding. It is
//! computed on a thread, or by workers ([`crate::feature_workers`]). Joining sources is left to the readers.

use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use anyhow::{Context, Result};
use pkv_core::{Fingerprint, Source};
use pkv_extract::{Extractor, HiddenProjection};
use pkv_gpu::MathMode;
use pkv_lm::LanguageModel;
use pkv_recipe::{ExtractSection, LabelSection};
use pkv_score::{ModelFiles, Requests};
use pkv_shard::{
    Example, FeatureFolders, FeatureRow, FeatureSource, FeaturesFrom, StageDir, StageReader, StageState,
};

use super::extract::{self, OnHost};
use super::train::Upstream;
use super::{hidden, prepare};
use crate::feature_workers::{self, MakesRows, ToMake};
use crate::pair;
use crate::session::Session;

/// Models that the stage has in memory already.
#[derive(Clone, Copy, Default)]
pub struct Loaded<'a> {
    pub target: Option<&'a LanguageModel>,
    pub proxy: Option<&'a LanguageModel>,
}

/// The features of the recipe; if it does not keep them, those that are missing are made when they are read.
///
/// # Errors
/// Missing features cannot be computed: a model, an example or a label cannot be read.
pub fn features(s: &Session, upstream: &Upstream, loaded: Loaded) -> Result<FeatureFolders> {
    let section = &s.recipe.extract;
    if !section.is_transient() {
        return Ok(s.run.feature_folders(section));
    }
    let examples = &upstream.examples;
    let find = |&source: &Source| extract::of_pair(source, &upstream.target, upstream.proxy.as_deref());
    let found = section.from.iter().map(find).collect::<Result<Vec<_>>>()?;
    let are_stored = found.iter().map(|found| is_stored(s, found, examples)).collect::<Result<Vec<_>>>()?;
    let missing: Vec<&ModelFiles> = found
        .iter()
        .zip(&are_stored)
        .filter(|(_, is_stored)| !**is_stored)
        .map(|(found, _)| *found)
        .collect();
    let mut of_workers = match s.feature_workers.as_ref().filter(|_| !missing.is_empty()) {
        Some(workers) => {
            let rows = StageReader::<Example>::open(&s.run.examples())?.len();
            let to_make = missing.iter().map(|&found| ToMake {
                found,
                rows,
                folder: s.run.features(found.role),
                made: extract::fingerprint(s, found.role, found, examples).hash(),
            });
            feature_workers::start(s, workers, &to_make.collect::<Vec<_>>())?
        }
        None => Vec::new(),
    }
    .into_iter();
    let part = |(found, is_stored): (&ModelFiles, bool)| -> Result<FeaturesFrom> {
        let folder = s.run.features(found.role);
        if is_stored {
            return Ok(FeaturesFrom::Folder(folder));
        }
        if let Some(made) = of_workers.next() {
            return Ok(FeaturesFrom::Source(made));
        }
        let model = match found.role {
            Source::Target => loaded.target,
            Source::Proxy => loaded.proxy,
        };
        let maker = Maker::new(s, found, examples, model)?;
        tracing::info!("features of the {} are made when they are read, and not stored", found.role.name());
        Ok(FeaturesFrom::Source(Arc::new(Generated::start(maker, folder)?)))
    };
    let parts = found.into_iter().zip(are_stored).map(part).collect::<Result<_>>()?;
    Ok(FeatureFolders::of(parts, section.layout()))
}

/// Whether there are complete shards of the recipe's choices.
fn is_stored(s: &Session, found: &ModelFiles, examples: &Fingerprint) -> Result<bool> {
    let folder = s.run.features(found.role);
    Ok(match StageDir::state(&folder, &extract::fingerprint(s, found.role, found, examples))? {
        StageState::Complete(_) => true,
        StageState::Stale(_) => {
            tracing::info!(
                "the features in `{}` were made with other choices: they are left alone, and new ones are made",
                folder.display()
            );
            false
        }
        StageState::Absent | StageState::Partial(_) => false,
    })
}

/// Make the features of `sources` that the process at the other end of stdin asks for, until it has gone.
///
/// # Errors
/// A model or the examples cannot be read, or stdin is no such process.
pub fn answer_stdin(s: &Session, sources: &[Source]) -> Result<()> {
    let (target, proxy) = pair::find_both(s)?;
    let (_, examples) = prepare::examples(s, &target)?;
    let maker = |&source: &Source| -> Result<(String, Maker)> {
        let found = extract::of_pair(source, &target, proxy.as_deref())?;
        let made = extract::fingerprint(s, source, found, &examples).hash();
        Ok((made, Maker::new(s, found, &examples, None)?))
    };
    let (made, makers) = sources.iter().map(maker).collect::<Result<Vec<_>>>()?.into_iter().unzip();
    let socket = std::io::stdin().as_fd().try_clone_to_owned().context("stdin is closed")?;
    feature_workers::answer(&Makers { made, makers }, socket)
}

/// A maker for each source of a worker.
struct Makers {
    made: Vec<String>,
    makers: Vec<Maker>,
}

impl MakesRows for Makers {
    fn made(&self) -> Vec<String> {
        self.made.clone()
    }

    fn row(&self, source: usize, row: u64) -> Result<FeatureRow> {
        self.makers.get(source).context("there is no such source")?.row(row)
    }
}

/// Remove the features that a complete training has read, if the recipe says so.
///
/// # Errors
/// A file cannot be removed, or another process writes the folder.
pub fn delete_used(s: &Session, upstream: &Upstream) -> Result<()> {
    if !s.recipe.extract.is_transient() {
        return Ok(());
    }
    for &source in &s.recipe.extract.from {
        let found = extract::of_pair(source, &upstream.target, upstream.proxy.as_deref())?;
        let folder = s.run.features(source);
        let fingerprint = extract::fingerprint(s, source, found, &upstream.examples);
        // Features of other choices belong to another recipe.
        if matches!(StageDir::state(&folder, &fingerprint)?, StageState::Complete(_) | StageState::Partial(_))
        {
            StageDir::clear(&folder)?;
            tracing::info!("removed the features in `{}`: the mapper is trained", folder.display());
        }
    }
    Ok(())
}

/// A row, and where it goes.
type Asked = (u64, SyncSender<Result<FeatureRow>>);

/// Rows of one source, made on a thread of their own: their bits must not depend on how many threads libtorch
/// may use where they are read. What is made ahead waits with the readers, in the queues of their batches.
#[derive(Debug)]
struct Generated {
    /// The thread ends when this is dropped.
    ask: Sender<Asked>,
    rows: u64,
    folder: PathBuf,
}

impl Generated {
    fn start(maker: Maker, folder: PathBuf) -> Result<Self> {
        let (ask, asked) = channel();
        let (rows, threads) = (maker.examples.len(), tch::get_num_threads());
        std::thread::Builder::new()
            .name("features".to_owned())
            .spawn(move || {
                tch::set_num_threads(threads);
                maker.answer(&asked);
            })
            .context("cannot start the thread that makes features")?;
        Ok(Self { ask, rows, folder })
    }
}

impl FeatureSource for Generated {
    fn rows(&self) -> u64 {
        self.rows
    }

    fn row(&self, i: u64) -> Result<FeatureRow> {
        const ENDED: &str = "the thread that makes features has ended";
        let (to, row) = sync_channel(1);
        self.ask.send((i, to)).ok().context(ENDED)?;
        row.recv().context(ENDED)?.with_context(|| format!("cannot make the features of row {i}"))
    }

    fn path(&self) -> &Path {
        &self.folder
    }
}

/// A model and all else that a row is made with.
struct Maker {
    model: LanguageModel,
    examples: StageReader<Example>,
    section: ExtractSection,
    label: LabelSection,
    requests: Requests,
    prefix: Vec<u32>,
    hidden: Option<HiddenProjection>,
}

impl Maker {
    /// Of a source's model, which is loaded if it is not given.
    fn new(
        s: &Session,
        found: &ModelFiles,
        upstream: &Fingerprint,
        model: Option<&LanguageModel>,
    ) -> Result<Self> {
        let model = model.map_or_else(|| pair::load(s, found), |model| Ok(model.share()))?;
        let examples = StageReader::<Example>::open(&s.run.examples())?;
        let hidden = match s.recipe.extract.is_fitted(found.role) {
            true => Some(hidden::fitted(s, found, &model, &examples, upstream)?),
            false => None,
        };
        Ok(Self {
            model,
            examples,
            section: s.recipe.extract.of(found.role),
            label: s.recipe.label.clone(),
            requests: Requests::new(&found.tokenizer, &s.recipe.label)?,
            prefix: found.tokenizer.prefix().to_vec(),
            hidden,
        })
    }

    fn answer(&self, asked: &Receiver<Asked>) {
        for (row, to) in asked {
            // A reader that has gone wants no answer.
            let _ = to.send(self.row(row));
        }
    }

    fn row(&self, row: u64) -> Result<FeatureRow> {
        let example = self.examples.get(row)?;
        let Self { model, requests, prefix, section, label, .. } = self;
        let extractor = Extractor::with_requests(model, requests, prefix, section, label)
            .with_hidden(self.hidden.as_ref())?;
        let features = {
            // As `extract` has it; training may be less exact.
            let _exact = MathMode::exact(model.device())?;
            extractor.features(&example.tokens)?
        };
        let on_host = OnHost::begin(&features)?;
        let row = on_host.row(example.id, &model.shape(), section.channels.len(), example.tokens.len())?;
        row.as_stored(section.store)
    }
}
