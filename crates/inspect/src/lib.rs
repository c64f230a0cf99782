//! `inspect`: the content of a file or folder that this program writes, as text.
//!
//! The kind is recognized by the content, never by the name; hashes are checked where a kind has
//! them. Numbers come from the crates that own the formats.

mod against;
mod files;
mod run;
mod shards;
mod weights;

use std::fmt::Write;
use std::path::Path;

use anyhow::{Result, bail};
use pkv_checkpoint::CheckpointStore;
use pkv_core::{Fingerprint, hinted};
use pkv_results::RESULTS_FILE;
use pkv_shard::{INDEX_FILE, PiecesState, RunLayout};

pub use against::against;
use run::{results, run, runs};
use shards::stage;
use weights::{checkpoint, checkpoints, export, model};

/// Describe `path`: any file or folder that this program writes, or a model.
///
/// # Errors
/// It is none of them, or what it holds is damaged.
pub fn inspect(path: &Path) -> Result<String> {
    let has = |name: &str| path.join(name).is_file();
    if path.is_file() {
        return match files::file(path)? {
            Some(text) => Ok(text),
            None => unknown(path),
        };
    }
    if !path.exists() {
        bail!(hinted(
            format!("there is no `{}`", path.display()),
            match Path::new("runs").join(path) {
                run if run.exists() =>
                    format!("did you mean `{}`? run folders are in `runs/`", run.display()),
                _ => "check the path; run folders are in `runs/`".to_owned(),
            }
        ));
    }
    if !path.is_dir() {
        bail!(hinted(format!("`{}` is a device, pipe or socket", path.display()), "pass a file or a folder"));
    }
    if has(INDEX_FILE) {
        stage(path)
    } else if RunLayout::new(path).run_json().is_file() {
        run(path)
    } else if has("state.json") {
        checkpoint(path)
    } else if has("config.json") && has("parity.safetensors") {
        export(path)
    } else if has("config.json") {
        model(path)
    } else if has(RESULTS_FILE) {
        results(&path.join(RESULTS_FILE))
    } else if PiecesState::read(path)?.is_some() {
        // Refused, with what it lacks.
        stage(path)
    } else if let Some(text) = files::folder(path)? {
        Ok(text)
    } else if let Some(text) = runs(path)? {
        Ok(text)
    } else if !CheckpointStore::read_only(path)?.folders_and_infos()?.is_empty() {
        checkpoints(path)
    } else {
        unknown(path)
    }
}

fn unknown(path: &Path) -> Result<String> {
    let hint = match path.extension().is_some_and(|e| e == "toml") {
        true => "`proxykv-train plan --resolved --recipe FILE` shows every key of a recipe",
        false => {
            "pass a run folder, a folder of them, or a file or folder in one: a shard (`.parquet`), a stage's folder, \
             a checkpoint, an export, `eval/results.json`; or a model"
        }
    };
    bail!(hinted(format!("`{}` is not an output of this program, nor a model", path.display()), hint))
}

/// Lines of `key  value`, keys aligned.
struct Lines {
    text: String,
}

impl Lines {
    fn new(title: impl AsRef<str>) -> Self {
        Self { text: format!("{}\n", title.as_ref()) }
    }

    fn add(&mut self, key: &str, value: impl std::fmt::Display) -> &mut Self {
        let _ = writeln!(self.text, "  {key:<15} {value}");
        self
    }

    /// A block of lines of its own, after an empty one.
    fn block(&mut self, title: &str) -> &mut Self {
        let _ = write!(self.text, "\n{title}\n");
        self
    }
}

/// The fingerprint's hash, and its choices one level deep.
fn choices(out: &mut Lines, fingerprint: &Fingerprint) {
    out.add("fingerprint", fingerprint.hash());
    let value = serde_json::to_value(fingerprint).unwrap_or_default();
    for (key, value) in value.as_object().into_iter().flatten() {
        let text = value.to_string();
        let cut: String = text.chars().take(100).collect();
        out.add(&format!("  {key}"), if cut.len() < text.len() { format!("{cut}...") } else { text });
    }
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use pkv_core::{Split, StoreDtype};
    use pkv_shard::{Example, FeatureRow, LabelRow, Row, StageDir, StageWriter};
    use serde_json::json;

    fn write<R: Row>(dir: &Path, stage: &str, rows: Vec<R>, fingerprint: &Fingerprint) {
        let n = rows.len() as u64;
        let stage = StageDir::open(dir, stage, fingerprint).unwrap();
        let mut writer = StageWriter::new(stage, 1, StoreDtype::F32, Some(n)).unwrap();
        for row in rows {
            writer.push(row).unwrap();
        }
        writer.finish().unwrap();
    }

    fn labels(id: &str, scores: &[f32]) -> LabelRow {
        LabelRow {
            id: id.to_owned(),
            layers: 1,
            kv_heads: 2,
            positions: scores.len() as u32 / 2,
            scores: scores.to_vec(),
        }
    }

    #[test]
    fn stages_and_their_shards_are_described() {
        let dir = tempfile::tempdir().unwrap();
        let fingerprint = Fingerprint::new().with("label", json!({"preset": "original"}));
        let rows = vec![labels("first", &[0.1, 0.2, 0.3, 0.9]), labels("second", &[0.5, 0.5])];
        write(dir.path(), "label", rows, &fingerprint);
        let text = inspect(dir.path()).unwrap();
        for part in [
            "stage `label`",
            "2, complete",
            "original",
            "1 layers x 2 KV heads x 2 positions",
            "0.1000 to 0.9000",
            "all hashes match",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        let second = StageDir::read(dir.path()).unwrap().index().shards[1].file.clone();
        let text = inspect(&dir.path().join(&second)).unwrap();
        assert!(text.contains("second") && !text.contains("first"), "{text}");
        let stray = dir.path().join("labels-00077.parquet");
        fs::write(&stray, "x").unwrap();
        assert!(inspect(&stray).unwrap_err().to_string().contains("does not name"));
        fs::write(dir.path().join(&second), "damaged").unwrap();
        assert!(inspect(dir.path()).is_err());
    }

    #[test]
    fn features_are_told_by_channel_and_examples_by_token() {
        let dir = tempfile::tempdir().unwrap();
        let fingerprint = Fingerprint::new()
            .with("extract", json!({"channels": ["max_all", "key_norm"], "globals": ["position"]}));
        let row = FeatureRow {
            id: "a".to_owned(),
            layers: 1,
            kv_heads: 2,
            channels: 2,
            positions: 1,
            heads: vec![1.0, 2.0, 3.0, 4.0],
            globals: vec![7.0],
        };
        write(&dir.path().join("features"), "extract", vec![row], &fingerprint);
        let text = inspect(&dir.path().join("features")).unwrap();
        assert!(text.contains("max_all         1.0000 to 3.0000"), "{text}");
        assert!(
            text.contains("key_norm        2.0000 to 4.0000") && text.contains("position        7.0000"),
            "{text}"
        );
        let example = Example {
            id: "doc-0".to_owned(),
            document: "doc".to_owned(),
            source: "src".to_owned(),
            split: Split::Test,
            window: 0,
            start: 5,
            tokens: vec![3, 1, 4],
            facts: Vec::new(),
        };
        write(&dir.path().join("examples"), "prepare", vec![example], &Fingerprint::new());
        let text = inspect(&dir.path().join("examples")).unwrap();
        assert!(
            text.contains("3, from token 5") && text.contains("[3, 1, 4]") && text.contains("test"),
            "{text}"
        );
    }

    #[test]
    fn two_folders_of_labels_are_compared() {
        let dir = tempfile::tempdir().unwrap();
        let made = |dtype: &str, seed: u64| {
            Fingerprint::new().with("examples", json!({"seed": seed})).with("target", json!({"dtype": dtype}))
        };
        let [a, b, other] = ["a", "b", "other"].map(|n| dir.path().join(n));
        // At half kept, two of four KV pairs: `a` keeps the last two, `b` the second and the last.
        write(&a, "label", vec![labels("x", &[0.1, 0.2, 0.3, 0.9])], &made("bf16", 1));
        write(&b, "label", vec![labels("x", &[0.1, 0.4, 0.3, 0.9])], &made("f32", 1));
        write(&other, "label", vec![labels("x", &[0.1, 0.4, 0.3, 0.9])], &made("f32", 2));
        let text = against(&a, &b).unwrap();
        for part in ["target.dtype \"bf16\", \"f32\"", "at most 2.0e-1 apart, 5.0e-2 on average"] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        let pair: Vec<_> = text.lines().filter(|l| l.trim().starts_with("pair ")).collect();
        assert!(pair.iter().all(|l| l.split_whitespace().nth(1) == Some("50.00")), "{text}");
        let same = against(&b, &b).unwrap();
        assert!(
            same.contains("no choice") && same.contains("at most 0.0e0") && same.contains(" 100.00"),
            "{same}"
        );
        let refused = format!("{:#}", against(&b, &other).unwrap_err());
        assert!(refused.contains("different examples: examples.seed 1, 2"), "{refused}");
    }

    #[test]
    fn features_are_compared_by_channel_and_not_with_labels() {
        let dir = tempfile::tempdir().unwrap();
        let choices = json!({"channels": ["max_all", "key_norm"], "globals": ["position"]});
        let row = |heads: [f32; 4]| FeatureRow {
            id: "x".to_owned(),
            layers: 1,
            kv_heads: 2,
            channels: 2,
            positions: 1,
            heads: heads.to_vec(),
            globals: vec![7.0],
        };
        let [a, b, l] = ["a", "b", "l"].map(|n| dir.path().join(n));
        let fingerprint = Fingerprint::new().with("extract", choices);
        write(&a, "extract", vec![row([1.0, 2.0, 3.0, 4.0])], &fingerprint);
        write(&b, "extract", vec![row([1.0, 2.0, 3.0, 4.5])], &fingerprint);
        write(&l, "label", vec![labels("x", &[0.1, 0.2])], &Fingerprint::new());
        let text = against(&a, &b).unwrap();
        for part in [
            "max_all         at most 0.0e0",
            "key_norm        at most 5.0e-1",
            "position        at most 0.0e0",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(against(&a, &l).unwrap_err().to_string().contains("made by `label`"));
        assert!(against(dir.path(), &a).unwrap_err().to_string().contains("no folder of labels or features"));
    }

    #[test]
    fn a_run_that_has_just_begun_is_described() {
        let dir = tempfile::tempdir().unwrap();
        let run = json!({"name": "r", "seed": 3, "stages": {"prepare": {"secs": 61.0, "summary": null}}});
        fs::write(dir.path().join("run.json"), run.to_string()).unwrap();
        write(&dir.path().join("labels"), "label", vec![labels("a", &[0.1, 0.2])], &Fingerprint::new());
        let text = inspect(dir.path()).unwrap();
        for part in [
            "run `r`",
            "examples        not there yet",
            "labels          1, complete",
            "prepare         1 min 01 s",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(text.contains("  features  ") && !text.contains("features-target"), "{text}");
        // Of sources that the recipe does not read there is no line.
        let run = json!({"name": "r", "recipe": {"extract": {"from": ["target"]}}, "stages": {}});
        fs::write(dir.path().join("run.json"), run.to_string()).unwrap();
        let text = inspect(dir.path()).unwrap();
        assert!(
            text.contains("  features-target not there yet\n") && !text.contains("  features  "),
            "{text}"
        );
    }

    #[test]
    fn a_folder_of_runs_is_a_list() {
        let dir = tempfile::tempdir().unwrap();
        for (folder, stages) in [("b", json!({"prepare": {}, "label": {}})), ("a", json!({}))] {
            fs::create_dir(dir.path().join(folder)).unwrap();
            let run = json!({"recipe_path": "recipes/x.toml", "stages": stages});
            fs::write(dir.path().join(folder).join("run.json"), run.to_string()).unwrap();
        }
        fs::create_dir(dir.path().join("logs")).unwrap();
        let text = inspect(dir.path()).unwrap();
        assert!(text.contains("a               no stage has run") && !text.contains("logs"), "{text}");
        assert!(text.contains("\n  b               stages prepare, label\n"), "{text}");
    }

    #[test]
    fn what_is_none_of_it_is_refused_with_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        let hint = |e: anyhow::Error| e.downcast_ref::<pkv_core::Hinted>().unwrap().hint().to_owned();
        assert!(hint(inspect(dir.path()).unwrap_err()).contains("a shard"));
        assert!(hint(inspect(&dir.path().join("absent")).unwrap_err()).contains("check the path"));
        let recipe = dir.path().join("x.toml");
        fs::write(&recipe, "").unwrap();
        assert!(hint(inspect(&recipe).unwrap_err()).contains("plan --resolved"));
        let lock = dir.path().join("eval.lock");
        fs::write(&lock, "").unwrap();
        assert!(inspect(&lock).unwrap().starts_with("lock that keeps a second process out"));
        let file = dir.path().join("notes.txt");
        fs::write(&file, "x").unwrap();
        assert!(inspect(&file).is_err());
    }
}
