//! Jobs of Slurm: one for each stage, an array where it is done in pieces, each after the one before.
//!
//! A job that is pre-empted or reaches its time limit goes back to the queue. The ids of submitted jobs are
//! kept in the run folder.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use pkv_core::hinted;
use pkv_files::{WriteBudget, refresh, write_file};
use pkv_shard::{RunLayout, Stage};
use serde::{Deserialize, Serialize};

use crate::{GRACE_SECS, Launch, answer, is_in_pieces, tool};

/// Restarts of a job, pre-emptions among them, up to which a failure of the machine is tried again.
const RESTARTS: u32 = 10;

/// A job before it is submitted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Job {
    pub stage: &'static str,
    /// Name in the queue.
    pub name: String,
    pub workers: usize,
    pub script: String,
}

/// A job that Slurm has, or had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Submitted {
    pub stage: String,
    pub name: String,
    pub workers: usize,
    pub id: String,
}

/// The jobs of all stages, in order.
///
/// # Errors
/// A value cannot be written into a script.
pub fn jobs(launch: &Launch) -> Result<Vec<Job>> {
    let of = |&stage: &Stage| {
        let name = format!("{}-{}", launch.recipe.name, stage.name());
        let script = script(launch, stage, &name)?;
        Ok(Job { stage: stage.name(), name, workers: launch.workers(stage), script })
    };
    launch.stages.iter().map(of).collect()
}

/// A shell script that submits `jobs` as [`submit`] does, but keeps no record of them.
///
/// # Errors
/// The path of the run folder cannot be written into a script.
pub fn chain(launch: &Launch, jobs: &[Job]) -> Result<String> {
    let mut out = format!("#!/bin/bash\nset -eu\nmkdir -p {}\n", word(&launch.logs.to_string_lossy())?);
    let mut after = String::new();
    for Job { stage, script, .. } in jobs {
        let is_free = |end: &String| !script.lines().any(|line| line == end);
        let end = (0..).map(|n| format!("END{n}")).find(is_free).unwrap_or_default();
        let _ = write!(out, "\n{stage}=$(sbatch --parsable{after} <<'{end}'\n{script}{end}\n)\n");
        // `ID;CLUSTER` where there are several clusters.
        let _ = writeln!(out, "{stage}=${{{stage}%%;*}}\necho \"{stage} ${stage}\"");
        after = format!(" --dependency=afterok:\"${stage}\"");
    }
    Ok(out)
}

/// Submit `jobs`, each after the one before, and keep their ids in the run folder.
///
/// # Errors
/// Jobs of this run are in the queue; Slurm refuses one, and then none stays.
pub fn submit(launch: &Launch, jobs: &[Job]) -> Result<Vec<Submitted>> {
    const WHAT: &str = "submit to Slurm";
    let known = submitted(launch.run)?;
    let queue =
        if known.is_empty() { String::new() } else { answer("squeue", &["-h", "-o", "%F %j"], "", WHAT)? };
    // Ids begin anew where a cluster is set up anew.
    let is_queued = |job: &&Submitted| queue.lines().any(|line| line == format!("{} {}", job.id, job.name));
    let queued: Vec<&Submitted> = known.iter().filter(is_queued).collect();
    if let Some(first) = queued.first() {
        let ids: Vec<&str> = queued.iter().map(|job| job.id.as_str()).collect();
        bail!(hinted(
            format!(
                "job {} (`{}`) of `{}` is in the queue",
                first.id,
                first.stage,
                launch.run.root().display()
            ),
            format!("wait for it (`proxykv-train launch status`), or end it: `scancel {}`", ids.join(" "))
        ));
    }
    for folder in [&launch.logs, &launch.run.launch()] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
    }
    let mut submitted: Vec<Submitted> = Vec::new();
    for Job { stage, name, workers, script } in jobs {
        let after = submitted.last().map(|before| format!("--dependency=afterok:{}", before.id));
        let args: Vec<&str> = ["--parsable"].into_iter().chain(after.as_deref()).collect();
        let said = answer("sbatch", &args, script, WHAT).inspect_err(|_| cancel(&submitted))?;
        let id = said.trim().split(';').next().unwrap_or_default().to_owned();
        submitted.push(Submitted { stage: (*stage).to_owned(), name: name.clone(), workers: *workers, id });
        // Without its record, no launch and no user would know of the job.
        write_file(&record(launch.run), &serde_json::to_vec_pretty(&submitted)?, &WriteBudget::from_env())
            .inspect_err(|_| cancel(&submitted))?;
    }
    Ok(submitted)
}

/// Take jobs from the queue; why that is done is the error that the user sees.
fn cancel(submitted: &[Submitted]) {
    let ids: Vec<&str> = submitted.iter().rev().map(|job| job.id.as_str()).collect();
    if !ids.is_empty() {
        let _ = tool("scancel", &ids, "", "end what was submitted to Slurm");
    }
}

/// The jobs that were submitted last; none if there was no launch.
///
/// # Errors
/// Their record cannot be read.
pub fn submitted(run: &RunLayout) -> Result<Vec<Submitted>> {
    let path = record(run);
    refresh(&path)?;
    if !path.exists() {
        return Ok(Vec::new());
    }
    let damaged =
        || hinted(format!("cannot read `{}`", path.display()), "remove it: it only names jobs of Slurm");
    let text = pkv_core::read_small_text(&path).with_context(damaged)?;
    serde_json::from_str(&text).with_context(damaged)
}

fn record(run: &RunLayout) -> PathBuf {
    run.launch().join("slurm.json")
}

/// The batch script of a stage.
fn script(launch: &Launch, stage: Stage, name: &str) -> Result<String> {
    let in_pieces = is_in_pieces(stage);
    let slurm = &launch.recipe.launch.slurm;
    let log = launch.logs.to_string_lossy().into_owned();
    ensure!(
        !log.contains('\\') && !log.chars().any(char::is_control),
        hinted(
            format!("Slurm cannot write logs into {log:?}"),
            "choose `--runs` without backslash and control characters"
        )
    );
    // `%` begins a name that Slurm fills in; after a backslash it does not.
    let log = log.replace('%', "%%");
    let mut options = vec![
        format!("--job-name={name}"),
        format!("--output={log}/{}", if in_pieces { "%x-%A_%a.txt" } else { "%x-%j.txt" }),
        "--open-mode=append".to_owned(),
        "--requeue".to_owned(),
        format!("--signal=B:TERM@{GRACE_SECS}"),
        "--kill-on-invalid-dep=yes".to_owned(),
    ];
    if in_pieces {
        options.push(format!("--array=0-{}", launch.workers - 1));
    }
    if launch.gpus(stage) > 0 {
        options.push(format!("--gres=gpu:{}", launch.gpus(stage)));
    }
    for (option, value) in [
        ("partition", &slurm.partition),
        ("account", &slurm.account),
        ("qos", &slurm.qos),
        ("time", &slurm.time),
    ] {
        if !value.is_empty() {
            options.push(format!("--{option}={value}"));
        }
    }
    options.extend(slurm.options.iter().cloned());
    let mut out = String::from("#!/bin/bash\n");
    for option in &options {
        let _ = writeln!(out, "#SBATCH {}", directive(option));
    }
    for (name, value) in launch.recipe.launch.variables() {
        let _ = writeln!(out, "export {name}={}", word(value)?);
    }
    for line in &slurm.lines {
        let _ = writeln!(out, "{line}");
    }
    let words: Vec<String> = launch.command(stage).into_iter().map(word).collect::<Result<_>>()?;
    let task = if in_pieces {
        format!(" --task \"$SLURM_ARRAY_TASK_ID/{}\"", launch.workers)
    } else {
        String::new()
    };
    let after = AFTER.replace("RESTARTS", &RESTARTS.to_string());
    let _ = write!(out, "{BEFORE}{}{task} &\n{after}", words.join(" "));
    Ok(out)
}

/// Begins the part of a script that runs the worker.
const BEFORE: &str = "
# Slurm signals this shell before the time limit and when it takes the node away.
signals=0
trap 'signals=$((signals + 1)); kill -TERM $worker 2>/dev/null' TERM
";

/// Ends it. Codes are those of `FailureKind`.
const AFTER: &str = "worker=$!
# A signal ends `wait`, and the worker only after its example.
seen=-1
while [ $seen != $signals ]; do
  seen=$signals
  wait $worker
  code=$?
done
# 0: done; 1 and 2: the input is refused; 130 and 143: stopped; others: the machine failed.
again=
case $code in
  0 | 1 | 2) ;;
  130 | 143) again=yes ;;
  *) [ ${SLURM_RESTART_COUNT:-0} -lt RESTARTS ] && again=yes ;;
esac
# Back to the queue, unless scancel or a pre-emption ends this job.
if [ -n \"$again\" ] && [ \"$(squeue -h -j $SLURM_JOB_ID -o %T)\" = RUNNING ]; then
  scontrol requeue $SLURM_JOB_ID
fi
exit $code
";

/// `text` as one word of a shell.
fn word(text: &str) -> Result<String> {
    let quoted = shlex::try_quote(text);
    Ok(quoted
        .with_context(|| hinted(format!("{text:?} is no word of a shell"), "leave out the character 0"))?
        .into())
}

/// `text` as one word of a line that begins with `#SBATCH`, where `#` begins a comment.
fn directive(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.,:;/@%+=[]()*^~".contains(c);
    if text.chars().all(plain) {
        return text.to_owned();
    }
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}
