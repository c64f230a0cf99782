//! The stages of a run: their names, their order, and what each reads and writes.

use std::path::PathBuf;

use pkv_core::Source;

use crate::RunLayout;

/// A stage of `run`, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Prepare,
    Label,
    Extract,
    Train,
    Eval,
    Export,
    Report,
}

impl Stage {
    pub const ALL: [Self; 7] =
        [Self::Prepare, Self::Label, Self::Extract, Self::Train, Self::Eval, Self::Export, Self::Report];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Label => "label",
            Self::Extract => "extract",
            Self::Train => "train",
            Self::Eval => "eval",
            Self::Export => "export",
            Self::Report => "report",
        }
    }

    /// In a few words.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Prepare => "documents to token ids",
            Self::Label => "the target repeats each context: KVzip scores",
            Self::Extract => "the sources read each context: attention features",
            Self::Train => "features to scores: the mapper",
            Self::Eval => "against the labels, and answers with a pruned cache",
            Self::Export => "the frozen mapper",
            Self::Report => "the page about the run",
        }
    }

    /// Files and folders that the stage alone writes.
    pub fn writes(self, run: &RunLayout) -> Vec<PathBuf> {
        match self {
            Self::Prepare => vec![run.examples()],
            Self::Label => vec![run.labels()],
            Self::Extract => {
                vec![run.features(Source::Proxy), run.features(Source::Target), run.hidden()]
            }
            Self::Train => vec![run.checkpoints(), run.train(), run.events()],
            Self::Eval => vec![run.eval()],
            Self::Export => vec![run.export()],
            Self::Report => vec![run.report()],
        }
    }
}

impl std::str::FromStr for Stage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|stage| stage.name() == text).ok_or_else(|| format!("no stage `{text}`"))
    }
}
