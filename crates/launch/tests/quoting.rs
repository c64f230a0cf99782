//! Values of a recipe reach a worker as they are, whatever a shell or Kubernetes would make of them.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use pkv_launch::{k8s, slurm};
use pkv_shard::RunLayout;
use serde_json::Value;

use crate::jobs::{demo, launch};

/// What shells, `#SBATCH` lines, here-documents, YAML or Kubernetes give a meaning.
const ODD: [&str; 14] = [
    "two words",
    "it's",
    "\"double\"",
    "$(touch hacked)",
    "`touch hacked`",
    "$HOME ${HOME} $$",
    "$(HOME) $$(HOME)",
    "a\nEND0\ntouch hacked\n",
    "back\\slash \\n",
    "; touch hacked & | > hacked",
    "# no comment",
    "*?[a-z]~ {a,b} !x",
    "",
    "ключ: [值] %j %%",
];

/// A program that writes its arguments and the variable ODD to `said`, each with a 0 after it.
const PROGRAM: &str = "#!/bin/bash\nprintf '%s\\0' \"$@\" > said\nprintf '%s\\0' \"$ODD\" >> said\nexit 1\n";

fn executable(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_batch_script_hands_values_on_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("a 'program' $(x)")).unwrap();
    executable(&at("a 'program' $(x)/p"), PROGRAM);
    for odd in ODD {
        let (mut recipe, run) = (demo(), RunLayout::new("runs/demo-nano"));
        recipe.launch.program = "./a 'program' $(x)/p".to_owned();
        recipe.launch.environment = vec![format!("ODD={odd}")];
        recipe.launch.slurm.lines = vec!["true".to_owned()];
        let launch = launch(&recipe, &run, &["--set", odd]);
        let job = slurm::jobs(&launch).unwrap().swap_remove(1);
        fs::write(at("job.sh"), &job.script).unwrap();
        let ran =
            Command::new("bash").arg("job.sh").env("SLURM_ARRAY_TASK_ID", "2").current_dir(&folder).status();
        assert_eq!(ran.unwrap().code(), Some(1), "a worker's exit code is its job's:\n{}", job.script);
        let said = fs::read_to_string(at("said")).unwrap();
        let expected = ["label", "--set", odd, "--task", "2/4", odd, ""].join("\0");
        assert_eq!(said, expected, "{odd:?}\n{}", job.script);
        assert!(!at("hacked").exists(), "{odd:?} was run");
    }
}

#[test]
fn the_chain_that_is_printed_submits_the_same_scripts() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    executable(
        &at("sbatch"),
        "#!/bin/bash\nn=$(ls sent.* 2>/dev/null | wc -l)\necho \"$@\" > args.$n\ncat > sent.$n\necho \"10$n;one\"\n",
    );
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
    for odd in ODD.into_iter().filter(|odd| !odd.contains('\n')) {
        let (mut recipe, run) = (demo(), RunLayout::new("runs/it's $(touch hacked)"));
        recipe.launch.environment = vec![format!("ODD={odd}\nEND0\nEND1\n")];
        let launch = launch(&recipe, &run, &["--set", odd]);
        let jobs = slurm::jobs(&launch).unwrap();
        fs::write(at("chain.sh"), slurm::chain(&launch, &jobs).unwrap()).unwrap();
        let ran =
            Command::new("bash").arg("chain.sh").env("PATH", &path).current_dir(&folder).output().unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        for (i, job) in jobs.iter().enumerate() {
            assert_eq!(fs::read_to_string(at(&format!("sent.{i}"))).unwrap(), job.script);
            fs::remove_file(at(&format!("sent.{i}"))).unwrap();
            let args = fs::read_to_string(at(&format!("args.{i}"))).unwrap();
            let after = if i == 0 { String::new() } else { format!(" --dependency=afterok:10{}", i - 1) };
            assert_eq!(args.trim_end(), format!("--parsable{after}"));
        }
        assert!(at("runs/it's $(touch hacked)/launch/logs").is_dir() && !at("hacked").exists());
    }
}

/// As kubelet does it: `$$` is `$`, `$(NAME)` the value of NAME, or itself where there is none.
pub fn expanded(text: &str, value_of: &dyn Fn(&str) -> Option<String>) -> String {
    let (mut out, mut rest) = (String::new(), text);
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            out.push_str(&value_of(name).unwrap_or_else(|| format!("$({name})")));
            rest = after;
        } else {
            out.push('$');
        }
    }
    out + rest
}

#[test]
fn kubernetes_hands_values_on_as_they_are() {
    for odd in ODD {
        let (mut recipe, run) = (demo(), RunLayout::new("runs/demo-nano"));
        recipe.launch.environment = vec![format!("ODD={odd}"), "HOME=/root".to_owned()];
        recipe.launch.k8s.namespace = odd.to_owned();
        let text = k8s::list(&launch(&recipe, &run, &["--set", odd])).to_string();
        let list: Value = serde_json::from_str(&text).unwrap();
        let job = &list["items"][1];
        let container = &job["spec"]["template"]["spec"]["containers"][0];
        let value_of = |name: &str| match name {
            "JOB_COMPLETION_INDEX" => Some("2".to_owned()),
            "HOME" => Some("/root".to_owned()),
            _ => None,
        };
        let words =
            container["command"].as_array().unwrap().iter().map(|w| expanded(w.as_str().unwrap(), &value_of));
        assert_eq!(
            words.collect::<Vec<_>>(),
            ["proxykv-train", "label", "--set", odd, "--task", "2/4"],
            "{odd:?}"
        );
        assert_eq!(expanded(container["env"][0]["value"].as_str().unwrap(), &value_of), odd);
        assert_eq!(job["metadata"]["namespace"].as_str().unwrap_or_default(), odd);
    }
}
