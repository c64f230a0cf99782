//! What an earlier version wrote is read: `old/` holds a checkpoint and an export of one run, from
//! `old/make.sh`.

use std::fs;
use std::path::{Path, PathBuf};

use pkv_checkpoint::{
    CheckpointInfo, CheckpointStore, Contents, Export, ExportConfig, LOSS_PREFIX, ModelCard, NamedTensors,
};
use pkv_mapper::Mapper;
use tempfile::tempdir;

use crate::common::*;

fn old(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/old").join(name)
}

fn is_of_loss(tensor: &(String, tch::Tensor)) -> bool {
    tensor.0.starts_with(LOSS_PREFIX)
}

/// Parameters and standardization, by name.
fn whole(mapper: &Mapper) -> NamedTensors {
    let mut all: NamedTensors = mapper
        .parameters()
        .iter()
        .map(|(n, t)| (n.clone(), t.shallow_clone()))
        .chain(mapper.buffers())
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

#[test]
fn a_checkpoint_of_version_1_has_network_and_loss_apart() {
    let dir = tempdir().unwrap();
    let folder = dir.path().join("step-000004");
    fs::create_dir(&folder).unwrap();
    for (name, bytes) in files(&old("checkpoint-1")) {
        fs::write(folder.join(name), bytes).unwrap();
    }
    let info = CheckpointInfo::read(&folder).unwrap();
    assert_eq!(info.schema_version, 1);
    assert_eq!(info.loss, ["loss.binary_log_scale", "loss.binary_offset", "loss.global_log_scale"]);
    assert_eq!(info.network.first().map(String::as_str), Some("skip.weight"), "the mapper's order");
    cpu();
    let state = CheckpointStore::read_only(dir.path()).unwrap().latest(cpu()).unwrap().unwrap();
    assert!(state.network.len() > 20 && !state.network.iter().any(is_of_loss));
    assert_eq!((state.loss.len(), state.ema.len()), (3, state.network.len() + 3));

    // Saved again, it is of this version, and its tensors are the same bytes.
    let again = tempdir().unwrap();
    let store = CheckpointStore::open(again.path(), &info.fingerprint, 1).unwrap();
    let saved = store.save(&state).unwrap();
    let (before, after) = (files(&folder), files(&saved));
    for name in ["model.safetensors", "optimizer.safetensors"] {
        assert!(before[name] == after[name], "{name}");
    }
    assert_eq!(CheckpointInfo::read(&saved).unwrap().schema_version, 2);
    same_state(&store.latest(cpu()).unwrap().unwrap(), &state);
}

/// The export is of the checkpoint: its network is the checkpoint's average.
#[test]
fn an_export_of_version_2_is_the_same_network_without_its_loss() {
    cpu();
    let export = Export::read(&old("export-2")).unwrap();
    assert_eq!(export.config().schema_version, 2);
    assert_eq!(export.tensors().iter().filter(|t| is_of_loss(t)).count(), 3);
    export.check().unwrap();
    assert!(export.budgets().is_some());
    let mapper = export.mapper(cpu()).unwrap();

    let dir = tempdir().unwrap();
    let step = dir.path().join("step-000004");
    fs::create_dir(&step).unwrap();
    files(&old("checkpoint-1")).iter().for_each(|(name, bytes)| fs::write(step.join(name), bytes).unwrap());
    let state = CheckpointStore::read_only(dir.path()).unwrap().best(cpu()).unwrap().unwrap();
    let mut averaged: NamedTensors = state.weights();
    averaged.retain(|t| !is_of_loss(t));
    same_named(mapper.parameters(), &averaged);

    // Written again, it is of this version, and holds the network alone.
    let config = ExportConfig { schema_version: pkv_checkpoint::EXPORT_VERSION, ..export.config().clone() };
    let folder = dir.path().join("export");
    let parity = export.parity().unwrap();
    let (config, card) = (&config, &ModelCard::default());
    let contents = Contents { config, mapper: &mapper, tensors: &[], budgets: None, card, parity: &parity };
    Export::write(&folder, contents).unwrap();
    let again = Export::read(&folder).unwrap();
    assert_eq!(again.config().schema_version, 3);
    same_named(again.tensors(), &whole(&mapper));
    again.check().unwrap();
    same_named(again.mapper(cpu()).unwrap().parameters(), mapper.parameters());
}
