//! Training state that survives its process, and the frozen mapper that is handed over.
//!
//! Owns two on-disk formats and their versions: checkpoint folders, from which training continues
//! bit for bit, and the export, which needs nothing else to predict. When to save, and what a run's
//! best checkpoint is measured by, are left to `train`.

mod budgets;
mod card;
mod export;
mod state;
mod store;
mod tensors;

pub use budgets::BUDGETS_FILE;
pub use card::{CardTable, DataSource, Licences, ModelCard, StageCost};
pub use export::{
    Contents, EXPORT_FILES, EXPORT_VERSION, Export, ExportConfig, ExportDims, ExportFile, ModelIdentity,
    Parity, restore_mapper,
};
pub use state::{CHECKPOINT_VERSION, CheckpointInfo, FileHash, LOSS_PREFIX, TrainingState};
pub use store::CheckpointStore;
pub use tensors::{NamedTensors, read_tensors, write_tensors};
