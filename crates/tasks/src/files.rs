//! The files of the benchmarks' manifest, and which of them are of which task.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use pkv_core::{Fingerprint, hinted};
use serde::Serialize;

/// Files by the names of the manifest's sources.
#[derive(Default)]
pub struct Files {
    pub found: Vec<(String, Vec<PathBuf>)>,
    /// Content of the files, or commits of hub data sets.
    pub identity: Fingerprint,
}

impl Files {
    /// Inputs of a task: the files, and its `settings`.
    pub fn identity_with(&self, settings: impl Serialize) -> String {
        self.identity.clone().with("settings", settings).hash()
    }

    /// The one file of a source; `None` where the manifest has no such source.
    pub fn one(&self, name: &str) -> Result<Option<&Path>> {
        let Some((_, files)) = self.found.iter().find(|(n, _)| n == name) else { return Ok(None) };
        ensure!(
            files.len() == 1,
            hinted(
                format!("source `{name}` of the benchmarks has {} files, expected one", files.len()),
                "name a single file in the manifest of `eval.benchmark.manifest`"
            )
        );
        Ok(files.first().map(PathBuf::as_path))
    }

    /// The files of each of a suite's tasks `names`: those in `named`, or all there are. A task's shards are
    /// in order.
    ///
    /// # Errors
    /// The suite has no source, a named task no file, or a shard is absent.
    pub fn of_suite<'n>(
        &self,
        suite: &str,
        names: &[&'n str],
        named: &[&str],
        warn: &dyn Fn(&str),
    ) -> Result<Vec<(&'n str, Vec<PathBuf>)>> {
        let Some((_, files)) = self.found.iter().find(|(n, _)| n == suite) else {
            bail!(hinted(
                format!("`eval.tasks` asks for `{suite}`, whose files are not named"),
                format!("add a source `{suite}` to the manifest of `eval.benchmark.manifest`")
            ));
        };
        let mut of_tasks = Vec::new();
        for &name in names {
            if !named.is_empty() && !named.contains(&name) {
                continue;
            }
            let own: Vec<PathBuf> = files.iter().filter(|file| is_of_task(file, name)).cloned().collect();
            if own.is_empty() {
                ensure!(
                    named.is_empty(),
                    hinted(
                        format!("there is no file of `{name}` among the {} of source `{suite}`", files.len()),
                        format!(
                            "files are found by name: `{name}.jsonl`, or a folder `{name}` with Parquet files"
                        )
                    )
                );
                continue;
            }
            check_shards(&own)?;
            of_tasks.push((name, own));
        }
        let unknown: Vec<String> = files
            .iter()
            .filter(|file| !names.iter().any(|name| is_of_task(file, name)))
            .map(|file| format!("`{}`", file.display()))
            .collect();
        let some = unknown.iter().take(3).map(String::as_str).collect::<Vec<_>>().join(", ");
        ensure!(
            !of_tasks.is_empty(),
            hinted(
                format!(
                    "none of the {} files of source `{suite}` is named as one of its tasks: {some}",
                    files.len()
                ),
                format!(
                    "files are found by name: `{0}.jsonl`, or a folder `{0}`; the tasks are {1}",
                    names[0],
                    names.join(", ")
                )
            )
        );
        if named.is_empty() && !unknown.is_empty() {
            warn(&format!(
                "{} files of source `{suite}` are named as none of its tasks and are not read: {some}",
                unknown.len()
            ));
        }
        Ok(of_tasks)
    }
}

/// `trec.jsonl`, or `scbench_kv/test-00000-of-00001.parquet` as hub data sets are laid out.
fn is_of_task(file: &Path, name: &str) -> bool {
    let own = file.file_name().and_then(|n| n.to_str()).and_then(|n| n.split('.').next());
    own == Some(name) || file.parent().and_then(Path::file_name).is_some_and(|folder| folder == name)
}

/// # Errors
/// Files say that they are some of more shards than there are, or are no shards of one data set: two copies
/// of a task, or its splits.
fn check_shards(files: &[PathBuf]) -> Result<()> {
    let total = |file: &PathBuf| {
        let stem = file.file_stem()?.to_str()?;
        stem.rsplit_once("-of-")?.1.parse::<usize>().ok()
    };
    let shards: Vec<usize> = files.iter().filter_map(total).collect();
    if let Some(&total) = shards.first() {
        ensure!(
            shards.len() == total,
            hinted(
                format!("`{}` is one of {total} shards, {} are named", files[0].display(), shards.len()),
                "name all shards of a task, and no other data set's, in the manifest of `eval.benchmark.manifest`"
            )
        );
    }
    // Shards differ in their numbers alone.
    let kind = |file: &Path| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        (file.parent().map(Path::to_owned), name.replace(|c: char| c.is_ascii_digit(), ""))
    };
    for (i, file) in files.iter().enumerate().skip(1) {
        ensure!(
            kind(file) == kind(&files[0]) && !files[..i].contains(file),
            hinted(
                format!(
                    "`{}` and `{}` are files of one task, and no shards of one data set",
                    files[0].display(),
                    file.display()
                ),
                "their rows would be mixed or counted twice: name one of them in the manifest of `eval.benchmark.manifest`"
            )
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_by_their_tasks_names() {
        let files = ["d/trec.jsonl", "d/trec_e.jsonl", "h/lcc/test-0.parquet", "d/other.jsonl"];
        let files = Files {
            found: vec![("longbench".to_owned(), files.map(PathBuf::from).to_vec())],
            identity: Fingerprint::new(),
        };
        let names = ["trec", "lcc", "vcsum"];
        let of =
            |named: &[&str]| files.of_suite("longbench", &names, named, &|_| {}).map_err(|e| e.to_string());
        let all = vec![
            ("trec", vec![PathBuf::from("d/trec.jsonl")]),
            ("lcc", vec![PathBuf::from("h/lcc/test-0.parquet")]),
        ];
        assert_eq!(of(&[]).unwrap(), all);
        assert_eq!(of(&["lcc"]).unwrap(), all[1..]);
        assert!(of(&["vcsum"]).unwrap_err().contains("no file of `vcsum` among the 4"));
        let none = files.of_suite("scbench", &names, &[], &|_| {}).unwrap_err().to_string();
        assert!(none.contains("files are not named"), "{none}");
        let shards = |paths: &[&str]| {
            let paths = paths.iter().map(PathBuf::from).collect();
            let files = Files { found: vec![("longbench".to_owned(), paths)], identity: Fingerprint::new() };
            let found = files.of_suite("longbench", &names, &[], &|_| {});
            found.map(|found| found[0].1.len()).map_err(|e| e.to_string())
        };
        assert_eq!(shards(&["lcc/a-00000-of-00002.parquet", "lcc/a-00001-of-00002.parquet"]), Ok(2));
        assert_eq!(
            shards(&["lcc/a-00000-of-00002.parquet"]).unwrap_err(),
            "`lcc/a-00000-of-00002.parquet` is one of 2 shards, 1 are named"
        );
        assert!(
            shards(&["scbench_kv/a.parquet"])
                .unwrap_err()
                .contains("is named as one of its tasks: `scbench_kv/a")
        );
        for other in [
            "data/lcc.jsonl",
            "lcc/train.parquet",
            "lcc/test.jsonl",
            "lcc/test.parquet",
            "2/lcc/test.parquet",
        ] {
            let error = shards(&["lcc/test.parquet", other]).unwrap_err();
            assert_eq!(
                error,
                format!(
                    "`lcc/test.parquet` and `{other}` are files of one task, and no shards of one data set"
                )
            );
        }
        assert_eq!(shards(&["lcc/0000.parquet", "lcc/0001.parquet"]), Ok(2));
        // Read by name, and then refused by what it is.
        assert_eq!(shards(&["d/trec.jsonl.gz"]), Ok(1));
        assert!(files.one("longbench").is_err() && files.one("squad").unwrap().is_none());
    }
}
