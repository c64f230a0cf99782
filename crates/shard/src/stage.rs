//! The stages of a run: their names, their order, and what each writes.

use std::path::PathBuf;

use pkv_core::Source;

use crate::RunLayout;

/// One entry per stage, in order: its name, its meaning in a few words, and the files and folders of a run
/// that it alone writes.
macro_rules! stages {
    ($($stage:ident $name:literal $meaning:literal |$run:ident| [$($writes:expr),*];)*) => {
        pkv_core::named! {
            /// A stage of `run`, in order.
            #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
            pub enum Stage {
                $(#[doc = $meaning] $stage = $name, $meaning;)*
            }
        }

        impl Stage {
            /// Files and folders that the stage alone writes.
            pub fn writes(self, run: &RunLayout) -> Vec<PathBuf> {
                match self {
                    $(Self::$stage => {
                        let $run = run;
                        vec![$($writes),*]
                    })*
                }
            }
        }
    };
}

stages! {
    Prepare "prepare" "documents to token ids" |run| [run.examples()];
    Label "label" "the target repeats each context: KVzip scores" |run| [run.labels()];
    Extract "extract" "the sources read each context: attention features"
        |run| [run.features(Source::Proxy), run.features(Source::Target), run.hidden()];
    Train "train" "features to scores: the mapper" |run| [run.checkpoints(), run.train(), run.events()];
    Eval "eval" "against the labels, and answers with a pruned cache" |run| [run.eval()];
    Export "export" "the frozen mapper" |run| [run.export()];
    Report "report" "the page about the run" |run| [run.report()];
}

impl std::str::FromStr for Stage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::named(text).ok_or_else(|| format!("no stage `{text}`"))
    }
}
