//! Jobs of Kubernetes: an Indexed one for each stage, as JSON.
//!
//! Jobs have no dependencies, so that the command which launches them waits for each before it applies the
//! next one. What is applied goes on without it, and the same command takes up where the last one ended.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pkv_core::{Progress, Stop, hinted};
use pkv_shard::Stage;
use serde_json::{Map, Value, json};

use crate::{GRACE_SECS, Launch, answer, is_in_pieces};

/// Failures of one worker that are tried again; the machine's, since those of the input end the Job.
const RETRIES: u32 = 3;
/// Between two looks at a Job.
const EVERY: Duration = Duration::from_secs(3);
/// Longest name in front of the stage's: with it and a worker's index a host name has at most 63 characters.
const LONGEST_NAME: usize = 40;

/// The Jobs of all stages, in order, as a list that kubectl takes.
pub fn list(launch: &Launch) -> Value {
    let jobs: Vec<Value> = launch.stages.iter().map(|&stage| job(launch, stage)).collect();
    json!({"apiVersion": "v1", "kind": "List", "items": jobs})
}

/// Apply the Job of each stage, and wait for it before the next.
///
/// A Job that is at work already is waited for; one that has ended is replaced, whose workers find what is
/// done.
///
/// # Errors
/// kubectl refuses one, one fails, or the user stops: then the Job goes on.
pub fn run(launch: &Launch, progress: &dyn Progress, stop: &Stop) -> Result<()> {
    let namespace = &launch.recipe.launch.k8s.namespace;
    let kubectl = |args: &[&str], input: &str, what: &str| {
        let common: &[&str] = if namespace.is_empty() { &[] } else { &["--namespace", namespace] };
        answer("kubectl", &[common, args].concat(), input, what)
    };
    for &stage in &launch.stages {
        let (job, name) = (job(launch, stage), name(launch, stage));
        let what = format!("run the Job `{name}`");
        let look = || -> Result<Value> {
            let said = kubectl(&["get", "job", &name, "--ignore-not-found", "-o", "json"], "", &what)?;
            let said = if said.trim().is_empty() { "null" } else { &said };
            serde_json::from_str(said).with_context(|| format!("kubectl describes `{name}` in no JSON"))
        };
        let before = look()?;
        if ended(&before).is_some() {
            kubectl(&["delete", "job", &name, "--cascade=foreground", "--wait=true"], "", &what)?;
        }
        if before.is_null() || ended(&before).is_some() {
            kubectl(&["apply", "-f", "-"], &job.to_string(), &what)?;
        }
        let count = |job: &Value| job["status"]["succeeded"].as_u64().unwrap_or(0);
        let mut now = look()?;
        let mut done = count(&now);
        progress.start(stage.name(), launch.workers(stage) as u64, done);
        let end = loop {
            if let Some(end) = ended(&now) {
                break end;
            }
            stop.check()?;
            sleep(EVERY);
            now = look()?;
            progress.advance(count(&now).saturating_sub(done));
            done = done.max(count(&now));
        };
        progress.finish();
        if end["type"] == "Failed" {
            let why = format!(
                "{}: {}",
                end["reason"].as_str().unwrap_or("no reason given"),
                end["message"].as_str().unwrap_or("no message")
            );
            bail!(anyhow::Error::msg(why).context(hinted(
                format!("the Job `{name}` failed"),
                format!("`kubectl logs --prefix -l job-name={name}` shows why; mend it and launch again: what is done stays")
            )));
        }
    }
    Ok(())
}

/// The condition with which a Job ended.
fn ended(job: &Value) -> Option<Value> {
    let conditions = job["status"]["conditions"].as_array()?;
    let is_end = |c: &&Value| {
        c["status"] == "True" && ["Complete", "Failed"].contains(&c["type"].as_str().unwrap_or_default())
    };
    conditions.iter().find(is_end).cloned()
}

/// Name of a stage's Job: lower-case letters, digits and `-`, as Kubernetes has it.
fn name(launch: &Launch, stage: Stage) -> String {
    format!("{}-{}", run_name(launch), stage.name())
}

fn run_name(launch: &Launch) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let name: String = launch.recipe.name.chars().map(plain).take(LONGEST_NAME).collect();
    let name = name.trim_matches('-');
    // A name begins with a letter where it becomes that of a host.
    match name.chars().next() {
        Some('a'..='z') => name.to_owned(),
        Some(_) => format!("run-{name}"),
        None => "run".to_owned(),
    }
}

/// The Job of a stage.
fn job(launch: &Launch, stage: Stage) -> Value {
    let k8s = &launch.recipe.launch.k8s;
    let labels =
        json!({"app.kubernetes.io/name": "proxykv-train", "app.kubernetes.io/instance": run_name(launch)});
    let mut command: Vec<String> = launch.command(stage).into_iter().map(literal).collect();
    if is_in_pieces(stage) {
        command.extend(["--task".to_owned(), format!("$(JOB_COMPLETION_INDEX)/{}", launch.workers)]);
    }
    let environment = launch.recipe.launch.variables();
    let environment: Vec<Value> = environment.map(|(n, v)| json!({"name": n, "value": literal(v)})).collect();
    let secrets: Vec<Value> = k8s.secrets.iter().map(|name| json!({"secretRef": {"name": name}})).collect();
    let (mut requests, mut limits) = (Map::new(), Map::new());
    if !k8s.cpu.is_empty() {
        requests.insert("cpu".to_owned(), json!(k8s.cpu));
    }
    if !k8s.memory.is_empty() {
        requests.insert("memory".to_owned(), json!(k8s.memory));
        limits.insert("memory".to_owned(), json!(k8s.memory));
    }
    if launch.gpus(stage) > 0 {
        limits.insert(k8s.gpu.clone(), json!(launch.gpus(stage).to_string()));
    }
    let (mut mounts, mut volumes) = (Vec::new(), Vec::new());
    for (i, (claim, path)) in k8s.mounts().enumerate() {
        let name = format!("volume-{i}");
        mounts.push(json!({"name": name, "mountPath": path}));
        volumes.push(json!({"name": name, "persistentVolumeClaim": {"claimName": claim}}));
    }
    let selector: Map<String, Value> = k8s.selected().map(|(k, v)| (k.to_owned(), json!(v))).collect();
    let tolerated = k8s.tolerations.iter().map(|key| json!({"key": key, "operator": "Exists"}));
    let mut metadata = json!({"name": name(launch, stage), "labels": labels});
    if !k8s.namespace.is_empty() {
        metadata["namespace"] = json!(k8s.namespace);
    }
    let workers = launch.workers(stage);
    json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completionMode": "Indexed",
            "completions": workers,
            "parallelism": workers,
            "backoffLimitPerIndex": RETRIES,
            // In this order: the first rule that fits decides. Other codes count against the limit.
            "podFailurePolicy": {"rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [130, 143]}},
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1, 2]}}
            ]},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": GRACE_SECS,
                    "containers": [{
                        "name": "worker",
                        "image": k8s.image,
                        "command": command,
                        "env": environment,
                        "envFrom": secrets,
                        "resources": {"requests": requests, "limits": limits},
                        "volumeMounts": mounts
                    }],
                    "volumes": volumes,
                    "nodeSelector": selector,
                    "tolerations": tolerated.collect::<Vec<_>>()
                }
            }
        }
    })
}

/// `text` as it is: Kubernetes replaces `$(NAME)` in commands and values.
fn literal(text: &str) -> String {
    text.replace('$', "$$")
}
