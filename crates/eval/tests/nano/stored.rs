//! What an earlier version stored is read, summed up to the same bytes, and added to.
//!
//! `tests/stored/` was written by version 0.1.0 before answers of facts and of benchmarks had one form. To
//! make it anew with another version: `PKV_STORE=<folder> cargo test -p pkv-eval --test main -- --ignored
//! make_stored`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use arrow::compute::concat_batches;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use pkv_core::{Fingerprint, NoProgress, Policy, seal};
use pkv_eval::evaluate;
use pkv_recipe::{MethodName, TaskName};
use pkv_results::{AGREEMENT_FILE, ANSWERS_FILE, CONTEXTS_FOLDER, RESULTS_FILE, Results};

use crate::benchmarks::ruler;
use crate::fixture::Nano;

const FILES: [&str; 3] = [RESULTS_FILE, ANSWERS_FILE, AGREEMENT_FILE];

fn stored() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stored")
}

/// Evaluate into `out` what `tests/stored/` holds, by `methods`.
fn run(nano: &mut Nano, methods: &[MethodName], out: &Path) -> Results {
    nano.section.methods = methods.to_vec();
    nano.section.policies = vec![Policy::Pair];
    nano.section.ratios = vec![0.2];
    nano.section.answer_ratios = vec![0.2];
    nano.section.tasks = vec![TaskName::FACTS, TaskName::PERPLEXITY, TaskName::of("ruler")];
    let stages = nano.stages();
    let count = |text: &str| Ok(nano.tokenizer.encode(text)?.len());
    let ruler = [ruler(nano, 1, &count)];
    let mut inputs = nano.inputs(&stages, &nano.contexts, out);
    inputs.benchmarks = &ruler;
    inputs.fingerprint = Fingerprint::new().with("stored", 1);
    evaluate(&inputs, &NoProgress).unwrap()
}

/// All rows of a Parquet file.
fn table(path: &Path) -> RecordBatch {
    let file = ParquetRecordBatchReaderBuilder::try_new(File::open(path).unwrap()).unwrap();
    let schema = file.schema().clone();
    let batches: Vec<RecordBatch> = file.build().unwrap().map(Result::unwrap).collect();
    concat_batches(&schema, &batches).unwrap()
}

/// Copy the three tables and the contexts of an evaluation.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in FILES {
        fs::copy(from.join(file), to.join(file)).unwrap();
    }
    for task in
        fs::read_dir(from.join(CONTEXTS_FOLDER)).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir())
    {
        let folder = to.join(CONTEXTS_FOLDER).join(task.file_name().unwrap());
        fs::create_dir_all(&folder).unwrap();
        for file in fs::read_dir(&task).unwrap().map(|e| e.unwrap().path()) {
            fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
        }
    }
}

#[test]
fn outcomes_of_an_earlier_version_are_summed_up_to_the_same_bytes_and_added_to() {
    let mut nano = Nano::new(2);
    let out = nano.stage("eval");
    copy(&stored(), &out);
    let same = [MethodName::KVZIP, MethodName::RANDOM];
    let read = Results::read(&out.join(RESULTS_FILE)).unwrap();
    // Without its tables everything is summed up again; nothing is measured.
    for file in FILES {
        fs::remove_file(out.join(file)).unwrap();
    }
    let again = run(&mut nano, &same, &out);
    assert!(again == read, "results that were read differ from those that were summed up");
    // Records hold their own hash since.
    let results = fs::read_to_string(stored().join(RESULTS_FILE)).unwrap();
    let expected = [seal(&results).into_bytes(), fs::read(stored().join(AGREEMENT_FILE)).unwrap()];
    for (file, old) in [RESULTS_FILE, AGREEMENT_FILE].into_iter().zip(expected) {
        assert!(fs::read(out.join(file)).unwrap() == old, "`{file}` is not what the earlier version wrote");
    }
    // Answers have got more columns since; those that there were hold the same.
    let (new, old) = (table(&out.join(ANSWERS_FILE)), table(&stored().join(ANSWERS_FILE)));
    assert_eq!(new.num_rows(), old.num_rows());
    for field in old.schema().fields() {
        let (new, old) = (new.column_by_name(field.name()), old.column_by_name(field.name()));
        assert_eq!(new, old, "`{}` is not what the earlier version wrote", field.name());
    }

    // Another method adds its cells and leaves the others as they were.
    let more = run(&mut nano, &[MethodName::of("streaming-llm")], &out);
    let (now, then) = (serde_json::to_value(&more).unwrap(), serde_json::to_value(&read).unwrap());
    for task in ["/labels", "/facts", "/perplexity", "/benchmarks/0"] {
        let cells = |of: &serde_json::Value| of.pointer(task).unwrap()["cells"].as_array().unwrap().clone();
        let found = cells(&now);
        assert_eq!(found.len(), 3, "{task}");
        for cell in cells(&then) {
            assert!(found.contains(&cell), "{task} lost or changed {cell}");
        }
    }
}

#[test]
#[ignore = "writes the folder of `PKV_STORE`"]
fn make_stored() {
    let to = PathBuf::from(std::env::var_os("PKV_STORE").expect("PKV_STORE names a folder"));
    let mut nano = Nano::new(2);
    let out = nano.stage("eval");
    run(&mut nano, &[MethodName::KVZIP, MethodName::RANDOM], &out);
    copy(&out, &to);
}
