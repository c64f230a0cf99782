//! Workers of a launched run, by a controller that starts, signals and counts them as Kubernetes does: they
//! make the bytes of one process.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::thread::sleep;
use std::time::Duration;

use serde_json::{Value, json};

use crate::kill::results;
use crate::sandbox::{Sandbox, assert_same};

/// Changes of the small recipe with which each worker has some seconds of work: 18 pieces.
pub const LONGER: [&str; 6] =
    ["--set", "data.train=32", "--set", "data.window_tokens=[1024]", "--set", "data.shard_examples=2"];

/// The sandbox with documents that are long enough for [`LONGER`].
pub fn sandbox() -> Sandbox {
    let s = Sandbox::new();
    let documents = crate::sandbox::documents();
    let documents: Vec<&str> = documents.split('\0').collect();
    let long: Vec<String> =
        (0..documents.len()).map(|d| documents.iter().cycle().skip(d).take(9).copied().collect()).collect();
    s.write("documents.txt", &long.join("\0"));
    s
}

/// What a run folder holds of numbers: [`results`], and every answer.
fn made(s: &Sandbox) -> BTreeMap<String, Vec<u8>> {
    let run = s.path("runs/small");
    let mut made = results(&run);
    for name in ["eval/answers.parquet", "eval/agreement.parquet"] {
        made.insert(name.to_owned(), fs::read(run.join(name)).unwrap());
    }
    made
}

/// What one process makes of it.
static WHOLE: LazyLock<BTreeMap<String, Vec<u8>>> = LazyLock::new(|| {
    let s = sandbox();
    s.run(&[&["run"], &LONGER[..]].concat()).ok();
    made(&s)
});

/// A run folder holds, byte for byte, what one process makes.
pub fn same_as_one_process(s: &Sandbox) {
    assert_same(&made(s), &WHOLE, "the workers");
}

pub fn program() -> String {
    format!("launch.program={}", env!("CARGO_BIN_EXE_proxykv-train"))
}

/// A worker of a Job, as Kubernetes starts it for one index.
struct Pod {
    index: usize,
    child: Child,
}

impl Pod {
    fn start(s: &Sandbox, job: &Value, index: usize) -> Self {
        let container = &job["spec"]["template"]["spec"]["containers"][0];
        let text =
            |value: &Value| value.as_str().unwrap().replace("$(JOB_COMPLETION_INDEX)", &index.to_string());
        // Nothing else in these commands is to be replaced.
        let words: Vec<String> = container["command"].as_array().unwrap().iter().map(text).collect();
        assert!(!words.iter().any(|word| word.contains('$')), "{words:?}");
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).current_dir(s.path("")).env("JOB_COMPLETION_INDEX", index.to_string());
        for variable in container["env"].as_array().unwrap() {
            command.env(variable["name"].as_str().unwrap(), text(&variable["value"]));
        }
        Self { index, child: command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap() }
    }

    fn signal(&self, signal: i32) {
        // SAFETY: the child was not waited for, so that the number is still its own.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }
}

/// How a Job ended, with the exit codes of its pods in order.
#[derive(Debug, PartialEq, Eq)]
struct Ended {
    complete: bool,
    codes: Vec<(usize, i32)>,
}

/// Play the Job controller: a pod for each index that is not done, the first rule of `podFailurePolicy` that
/// has its exit code, else the limit of each index. `disturb` sees the pods at work before each look.
fn control(s: &Sandbox, job: &Value, mut disturb: impl FnMut(&[Pod])) -> Ended {
    let spec = &job["spec"];
    let indexes = spec["completions"].as_u64().unwrap() as usize;
    let limit = spec["backoffLimitPerIndex"].as_u64().unwrap();
    let (mut failures, mut codes) = (vec![0; indexes], Vec::new());
    let mut pods: Vec<Pod> = (0..indexes).map(|index| Pod::start(s, job, index)).collect();
    while !pods.is_empty() {
        disturb(&pods);
        sleep(Duration::from_millis(20));
        let mut still = Vec::new();
        for mut pod in pods {
            let Some(status) = pod.child.try_wait().unwrap() else {
                still.push(pod);
                continue;
            };
            let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap());
            codes.push((pod.index, code));
            if code == 0 {
                continue;
            }
            let rules = spec["podFailurePolicy"]["rules"].as_array().unwrap();
            let has = |rule: &&Value| {
                rule["onExitCodes"]["values"].as_array().is_some_and(|v| v.contains(&json!(code)))
            };
            match rules.iter().find(has).map(|rule| rule["action"].as_str().unwrap()) {
                Some("FailJob") => {
                    still.iter().for_each(|pod| pod.signal(libc::SIGTERM));
                    for pod in &mut still {
                        pod.child.wait().unwrap();
                    }
                    return Ended { complete: false, codes };
                }
                Some("Ignore") => {}
                _ => failures[pod.index] += 1,
            }
            assert!(failures[pod.index] <= limit, "index {} failed too often: {codes:?}", pod.index);
            still.push(Pod::start(s, job, pod.index));
        }
        pods = still;
    }
    Ended { complete: true, codes }
}

#[test]
fn jobs_whose_workers_are_ended_make_the_bytes_of_one_process() {
    let s = sandbox();
    let program = program();
    let args = [&["launch", "k8s", "--dry-run", "--workers", "3", "--set", &program], &LONGER[..]].concat();
    let list: Value = serde_json::from_str(&s.run(&args).ok().stdout).unwrap();
    for job in list["items"].as_array().unwrap() {
        let stage = job["metadata"]["name"].as_str().unwrap().trim_start_matches("small-");
        let mut signals =
            if stage == "label" { vec![(2, libc::SIGKILL), (1, libc::SIGTERM)] } else { Vec::new() };
        let mut seen = Value::Null;
        let pieces = s.path("runs/small/labels/pieces");
        let ended = control(&s, job, |pods| {
            let begun = tasks_at_work(&pieces);
            if seen.is_null() && !begun.is_empty() {
                seen = status(&s)["stages"][1].clone();
            }
            let is_at_work = |(index, _): &&(usize, i32)| begun.contains(&format!("{index}/3"));
            let Some(&(index, signal)) = signals.last().filter(is_at_work) else { return };
            pods.iter().filter(|pod| pod.index == index).for_each(|pod| pod.signal(signal));
            signals.pop();
        });
        assert!(ended.complete && signals.is_empty(), "{stage}: {ended:?}");
        let not_done: Vec<&(usize, i32)> = ended.codes.iter().filter(|(_, code)| *code != 0).collect();
        if stage == "label" {
            assert!(not_done.contains(&&(1, 130)) && not_done.contains(&&(2, 137)), "{ended:?}");
            assert_eq!((&seen["stage"], &seen["state"]), (&json!("label"), &json!("at_work")), "{seen}");
            let number = |key: &str| seen["pieces"][key].as_u64().unwrap();
            assert_eq!((number("all"), number("rows"), number("failed")), (18, 36, 0), "{seen}");
            assert!((1..=3).contains(&number("running")) && number("done") < 18, "{seen}");
        } else {
            assert!(not_done.is_empty(), "{stage}: {ended:?}");
        }
    }
    same_as_one_process(&s);
    let stages = status(&s)["stages"].clone();
    assert!(stages.as_array().unwrap().iter().all(|stage| stage["state"] == "done"), "{stages}");
}

/// Tasks that have begun a piece of the stage whose pieces are in `folder`.
fn tasks_at_work(folder: &Path) -> Vec<String> {
    signatures(folder).iter().filter_map(|by| by["task"].as_str().map(str::to_owned)).collect()
}

/// What processes wrote into the locks of pieces.
pub fn signatures(folder: &Path) -> Vec<Value> {
    let paths = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let locks = paths.filter(|path| path.extension().is_some_and(|e| e == "lock"));
    locks.filter_map(|path| serde_json::from_slice(&fs::read(path).ok()?).ok()).collect()
}

/// What `launch status` says of the run.
fn status(s: &Sandbox) -> Value {
    let ran = s.command(&["launch", "status", "--json", "--run", "small"]).output().unwrap();
    serde_json::from_slice(&ran.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&ran.stderr)))
}

#[test]
fn a_job_whose_input_is_refused_fails_at_once() {
    let s = Sandbox::new();
    let program = program();
    let args = ["launch", "k8s", "--dry-run", "--workers", "3", "--stages", "label", "--set", &program];
    let list: Value = serde_json::from_str(&s.run(&args).ok().stdout).unwrap();
    // `prepare` has not run.
    let ended = control(&s, &list["items"][0], |_| {});
    assert!(!ended.complete && ended.codes.len() <= 3, "{ended:?}");
    assert_eq!(ended.codes[0].1, 1, "{ended:?}");
}
