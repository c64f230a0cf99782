//! One recipe per (target, proxy) pair: TOML in, one resolved and validated run out.
//!
//! Every stage has a section and receives only that. Defaults are written once, in the section's
//! `Default`, with the reason beside each number that has one. Reading models, data or shards is
//! left to the crates that own them; no tensors here.

mod bounds;
mod files;
mod known;
mod load;
mod manifest;
mod method;
mod mistake;
mod origin;
pub mod plan;
pub mod reference;
mod resolved;
pub mod schema;
mod section;
mod task;

pub use files::{DEEPEST, toml_files};
pub use known::check_known;
pub use load::{Recipe, load, load_with_origins, profile};
pub use manifest::{Facts, Manifest, Source, SourceFormat, load_manifest};
pub use method::MethodName;
pub use origin::{Origin, Origins, Override};
pub use pkv_core::{DtypeName, StoreDtype};
pub use section::benchmark::{BenchmarkSection, SharedContext};
pub use section::data::{DataSection, SpecialTokens};
pub use section::eval::{AnswerMatch, EvalSection};
pub use section::export::ExportSection;
pub use section::extract::{AfterUse, ExtractSection, MissingFeatures};
pub use section::facts::{FactPlace, FactsSection};
pub use section::label::{LabelPreset, LabelSection, Preset, Sink};
pub use section::launch::{K8sSection, LaunchSection, SlurmSection};
pub use section::loss::{FineLoss, LossSection};
pub use section::mapper::{MapperSection, Variant};
pub use section::model::ModelSection;
pub use section::prune::PruneSection;
pub use section::steps::{AutoSteps, Steps};
pub use section::train::{TargetPool, TrainDtype, TrainSection};
pub use task::TaskName;
