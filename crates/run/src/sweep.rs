//! A sweep: several runs that share the outputs in which they agree.
//!
//! Examples, labels and features are addressed by their fingerprints: `shared/labels-<hash>` beside the run
//! folders, and a link to it in each run folder. A stage knows nothing of it: it opens its folder, and finds
//! it complete, to be continued, or empty. In a bucket, a link is a small object that names the output.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use pkv_core::{Fingerprint, hinted};
use pkv_files::{lock_dir, remove_there, rename_folder};
use pkv_results::RESULTS_FILE;
use pkv_shard::{INDEX_FILE, RunLayout, Stage, StageDir, StageState};
use serde::Serialize;

use crate::session::Session;
use crate::stages;

/// Folder of shared outputs, beside the run folders.
pub const SHARED: &str = "shared";

/// One run of a sweep.
#[derive(Clone, Debug)]
pub struct Member {
    pub name: String,
    pub run: RunLayout,
    /// Outputs that another run may share, in order.
    pub outputs: Vec<SharedOutput>,
}

/// An output that a run shares with all whose choices for it are the same.
#[derive(Clone, Debug)]
pub struct SharedOutput {
    pub stage: Stage,
    /// Its place in the run folder.
    pub folder: PathBuf,
    pub fingerprint: Fingerprint,
}

impl SharedOutput {
    /// Its name in [`SHARED`].
    pub fn address(&self) -> String {
        let name = self.folder.file_name().unwrap_or_default().to_string_lossy();
        format!("{name}-{}", &self.fingerprint.hash()[..16])
    }

    fn state(&self) -> Result<StageState> {
        StageDir::state(&self.folder, &self.fingerprint)
    }

    /// # Errors
    /// The index is damaged.
    pub fn is_complete(&self) -> Result<bool> {
        Ok(matches!(self.state()?, StageState::Complete(_)))
    }
}

impl Member {
    /// The run that `s` would be; nothing is written.
    ///
    /// # Errors
    /// A model or a document is absent or cannot be read.
    pub fn of(s: &Session) -> Result<Self> {
        let outputs = stages::outputs(s)
            .with_context(|| format!("cannot find out what `{}` depends on", s.recipe.name))?;
        Ok(Self { name: s.recipe.name.clone(), run: (*s.run).clone(), outputs })
    }

    /// In a working copy, bring what other machines made of it.
    ///
    /// # Errors
    /// The bucket cannot be reached.
    pub fn bring(&self) -> Result<()> {
        let outputs = self.outputs.iter().map(|output| output.folder.clone());
        let shared = self.outputs.iter().map(|output| self.shared().join(output.address()));
        let more = [self.run.hidden(), self.run.eval()];
        outputs.chain(shared).chain(more).try_for_each(|folder| pkv_files::pull(&folder))
    }

    pub fn is_evaluated(&self) -> bool {
        self.run.eval().join(RESULTS_FILE).is_file()
    }

    /// Make the run folder, and in it the links to shared outputs. What the run has made on its own becomes
    /// shared, without a copy, unless others share the same already.
    ///
    /// # Errors
    /// An output was made with other choices, another process writes it, or the disk fails.
    pub fn link(&self) -> Result<()> {
        let shared = self.shared();
        for output in &self.outputs {
            let store = shared.join(output.address());
            let context = || format!("cannot share `{}`", output.folder.display());
            let is_link = output.folder.is_symlink();
            match output.state()? {
                // Linked or made on its own: what is the same is used.
                StageState::Complete(_) | StageState::Partial(_)
                    if is_link || store.join(INDEX_FILE).exists() =>
                {
                    continue;
                }
                StageState::Complete(_) | StageState::Partial(_) => {
                    let _lock = lock_dir(&output.folder)?;
                    make(&shared)?;
                    rename_folder(&output.folder, &store)?;
                }
                _ if is_link => {
                    remove_there(&output.folder)?;
                    fs::remove_file(&output.folder).with_context(context)?;
                }
                StageState::Absent if output.folder.exists() => {
                    fs::remove_dir(&output.folder).with_context(context)?;
                }
                StageState::Absent => {}
                StageState::Stale(differences) => bail!(hinted(
                    format!(
                        "`{}` was made with other choices than this sweep's: `{}` differs",
                        output.folder.display(),
                        differences[0].0
                    ),
                    "choose another folder with `--runs`, or remove that folder"
                )),
            }
            link(&output.address(), &output.folder, &shared)?;
        }
        // Each map in it is named by its fingerprint.
        let hidden = self.run.hidden();
        if !hidden.exists() { link("hidden", &hidden, &shared) } else { Ok(()) }
    }

    fn shared(&self) -> PathBuf {
        self.run.root().parent().unwrap_or(Path::new("")).join(SHARED)
    }

    /// Whether this run may start while `others` run: each output that it shares with one of them is
    /// complete.
    ///
    /// # Errors
    /// An index is damaged.
    pub fn may_start_beside<'a>(&self, others: impl Iterator<Item = &'a Self>) -> Result<bool> {
        let taken: Vec<String> = others.flat_map(|m| &m.outputs).map(SharedOutput::address).collect();
        for output in &self.outputs {
            if taken.contains(&output.address()) && !output.is_complete()? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make folder `{}`", folder.display()))
}

/// Link `at`, in a run folder, to `name` in the shared folder.
fn link(name: &str, at: &Path, shared: &Path) -> Result<()> {
    make(&shared.join(name))?;
    at.parent().map_or(Ok(()), make)?;
    // Relative, so that the folder of all runs can be moved.
    pkv_files::link(&Path::new("..").join(SHARED).join(name), at)
}

/// What a sweep would do.
#[derive(Clone, Debug, Serialize)]
pub struct SweepPlan {
    pub runs: Vec<PlannedRun>,
}

/// One run of a [`SweepPlan`].
#[derive(Clone, Debug, Serialize)]
pub struct PlannedRun {
    pub name: String,
    pub folder: PathBuf,
    pub outputs: Vec<PlannedOutput>,
    /// Whether there are results; `run` checks that they are the recipe's.
    pub evaluated: bool,
}

/// One shared output of a [`PlannedRun`].
#[derive(Clone, Debug, Serialize)]
pub struct PlannedOutput {
    pub stage: &'static str,
    pub folder: String,
    /// Name in the shared folder.
    pub address: String,
    /// Rows that are there.
    pub rows: u64,
    pub complete: bool,
    /// The earlier run of this sweep that has the same.
    pub shared_with: Option<String>,
}

impl SweepPlan {
    /// Of runs in their order; nothing is written.
    ///
    /// # Errors
    /// An index is damaged.
    pub fn of(members: &[Member]) -> Result<Self> {
        let mut runs = Vec::new();
        for (i, member) in members.iter().enumerate() {
            let mut outputs = Vec::new();
            for output in &member.outputs {
                let address = output.address();
                let has_it = |m: &&Member| m.outputs.iter().any(|o| o.address() == address);
                let shared_with = members[..i].iter().find(has_it).map(|m| m.name.clone());
                let own = output.state()?;
                let store = member.shared().join(&address);
                let state = match own {
                    StageState::Complete(_) | StageState::Partial(_) => own,
                    _ => StageDir::state(&store, &output.fingerprint)?,
                };
                let (rows, complete) = match state {
                    StageState::Complete(rows) => (rows, true),
                    StageState::Partial(rows) => (rows, false),
                    StageState::Absent | StageState::Stale(_) => (0, false),
                };
                let folder = output.folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let stage = output.stage.name();
                outputs.push(PlannedOutput { stage, folder, address, rows, complete, shared_with });
            }
            let (name, folder) = (member.name.clone(), member.run.root().to_path_buf());
            runs.push(PlannedRun { name, folder, outputs, evaluated: member.is_evaluated() });
        }
        Ok(Self { runs })
    }

    /// A line for each run.
    pub fn text(&self) -> String {
        let cell = |output: &PlannedOutput| match (&output.shared_with, output.complete, output.rows) {
            (Some(name), ..) => format!("{} of {name}", output.folder),
            (None, true, _) => format!("{} are there", output.folder),
            (None, false, 0) => format!("{} to make", output.folder),
            (None, false, rows) => format!("{} to continue after {rows}", output.folder),
        };
        let line = |run: &PlannedRun| {
            let mut cells: Vec<String> = run.outputs.iter().map(cell).collect();
            let evaluated = if run.evaluated { "evaluated" } else { "to train and evaluate" };
            cells.push(evaluated.to_owned());
            format!("{:<32} {}\n", run.name, cells.join(", "))
        };
        self.runs.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pkv_core::{Split, StoreDtype};
    use pkv_shard::{Example, StageReader, StageWriter};

    fn member(runs: &Path, name: &str, labels: u64) -> Member {
        let run = RunLayout::new(runs.join(name));
        let output = |stage, folder, choice: u64| SharedOutput {
            stage,
            folder,
            fingerprint: Fingerprint::new().with("choice", choice),
        };
        let outputs =
            vec![output(Stage::Prepare, run.examples(), 1), output(Stage::Label, run.labels(), labels)];
        Member { name: name.to_owned(), run, outputs }
    }

    fn fill(output: &SharedOutput) {
        let dir = StageDir::open(&output.folder, output.stage.name(), &output.fingerprint).unwrap();
        let mut writer = StageWriter::<Example>::new(dir, 4, StoreDtype::F32, Some(1)).unwrap();
        writer
            .push(Example {
                id: "a".to_owned(),
                document: "a".to_owned(),
                source: "s".to_owned(),
                split: Split::Train,
                window: 0,
                start: 0,
                tokens: vec![1, 2],
                facts: Vec::new(),
            })
            .unwrap();
        writer.finish().unwrap();
    }

    #[test]
    fn equal_choices_are_one_folder_and_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b, c] = [("a", 1), ("b", 1), ("c", 2)].map(|(name, l)| member(dir.path(), name, l));
        let all = [a, b, c];
        let plan = SweepPlan::of(&all).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "a plan writes nothing");
        assert_eq!(plan.runs[1].outputs[1].shared_with.as_deref(), Some("a"));
        assert_eq!(plan.runs[2].outputs[1].shared_with, None);
        assert_eq!(plan.runs[2].outputs[0].shared_with.as_deref(), Some("a"));
        // What one run has made on its own becomes the others' too.
        all[0].outputs.iter().for_each(fill);
        for _ in 0..2 {
            all.iter().for_each(|m| m.link().unwrap());
        }
        assert!(all[1].outputs.iter().all(|o| o.is_complete().unwrap()));
        assert_eq!(all[0].run.labels().canonicalize().unwrap(), all[1].run.labels().canonicalize().unwrap());
        assert!(all[2].outputs[0].is_complete().unwrap() && !all[2].outputs[1].is_complete().unwrap());
        assert_eq!(StageReader::<Example>::open(&all[1].run.examples()).unwrap().len(), 1);
        assert!(SweepPlan::of(&all).unwrap().text().contains("labels to make"));
        // `a` and `b` are complete; `c` and a run like it would write one folder.
        assert!(all[1].may_start_beside([&all[0]].into_iter()).unwrap());
        let d = member(dir.path(), "d", 2);
        assert!(!d.may_start_beside([&all[2]].into_iter()).unwrap());
        // Other choices in the same sweep folder: the links move, and nothing is lost.
        let a2 = member(dir.path(), "a", 3);
        a2.link().unwrap();
        assert!(!a2.outputs[1].is_complete().unwrap() && all[1].outputs[1].is_complete().unwrap());
    }

    #[test]
    fn an_output_of_other_choices_is_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let old = member(dir.path(), "a", 1);
        old.outputs.iter().for_each(fill);
        let e = member(dir.path(), "a", 2).link().unwrap_err();
        assert!(format!("{e:#}").contains("`choice` differs"), "{e:#}");
        assert!(old.outputs[1].is_complete().unwrap());
    }
}
