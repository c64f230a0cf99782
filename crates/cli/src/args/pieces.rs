//! Arguments of the stages that several processes may share: the task, the devices, the failures.

use std::ffi::OsString;

use anyhow::Result;
use clap::Args;
use pkv_core::{FailureKind, Hinted, Task, hinted};
use pkv_gpu::{DeviceChoice, DeviceGroup, cuda_absence, cuda_count};
use pkv_run::stages::Part;
use pkv_shard::MAX_FAILURES;

use crate::completion::values;

/// The variable with the number of tasks where `JOB_COMPLETION_INDEX` has this one's.
const TASKS: &str = "PKV_TASKS";

/// What of a stage this process does.
#[derive(Clone, Debug, Args)]
pub struct PieceArgs {
    /// Make only the pieces of task K of N, counted from 0, such as `0/8` [default: of the array or the
    /// indexed job that this process is a part of, else all].
    ///
    /// A piece is a shard, or a context of `eval`; task K has those whose number leaves K when divided by N.
    /// Any number of processes, on any number of machines with one run folder, end in the same bytes as one.
    /// The process that finds every piece done completes the stage. Without `--task`, SLURM_ARRAY_TASK_ID,
    /// _COUNT, _MIN and _STEP say which task it is, or JOB_COMPLETION_INDEX and PKV_TASKS, the number of
    /// completions; `--task 0/1` does not look at them.
    #[arg(long, value_name = "K/N", conflicts_with = "redo", value_parser = task)]
    pub task: Option<Task>,
    /// Run a worker process on each of these devices, such as `cuda:0,cuda:1`, or on `all` GPUs; each takes
    /// the next free piece. `cuda:0+cuda:1,cuda:2+cuda:3` are two workers, each with the target's layers over
    /// two.
    ///
    /// A worker that dies is replaced once.
    #[arg(long, value_name = "DEVICE,...", value_parser = devices, add = values::devices())]
    pub devices: Option<Devices>,
    /// End after N failed rows in a row. A row that fails costs its shard, which is made by the next start of
    /// the command; labels and features that are made without `--task` or `--devices` end at the first one.
    #[arg(long, value_name = "N", default_value_t = MAX_FAILURES as u64,
        value_parser = clap::value_parser!(u64).range(1..))]
    pub max_failures: u64,
    /// Say on stdout what is done, for the process that started this one with `--devices`.
    #[arg(long, hide = true)]
    pub worker: bool,
}

/// A refused value with its hint.
pub(super) fn with_hint(refused: &Hinted) -> String {
    format!("{refused}\n\nhint: {}", refused.hint())
}

fn task(text: &str) -> Result<Task, String> {
    text.parse::<Task>().map_err(|e| with_hint(&e))
}

pub fn devices(text: &str) -> Result<Devices, String> {
    Devices::parse(text).map_err(|e| with_hint(&e))
}

/// Devices of `--devices`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Devices {
    All,
    Named(Vec<DeviceGroup>),
}

impl Devices {
    fn parse(text: &str) -> Result<Self, Hinted> {
        if text == "all" {
            return Ok(Self::All);
        }
        text.split(',').map(str::parse).collect::<Result<_, _>>().map(Self::Named)
    }

    /// Each of them.
    ///
    /// # Errors
    /// All GPUs are meant, and there is none.
    pub fn list(&self) -> Result<Vec<DeviceGroup>> {
        match self {
            Self::Named(devices) => Ok(devices.clone()),
            Self::All if cuda_count() > 0 => {
                Ok((0..cuda_count()).map(DeviceChoice::Cuda).map(DeviceGroup::one).collect())
            }
            Self::All => Err(hinted(
                format!("`--devices all` finds no GPU: {}", cuda_absence().unwrap_or_default()),
                "name the devices, such as `--devices cpu,cpu`, or run `proxykv-train doctor`",
            )
            .environment()
            .into()),
        }
    }
}

impl PieceArgs {
    /// This process's part of a stage.
    ///
    /// # Errors
    /// The environment names a task that there is not, or `redo` would throw away what other tasks make.
    pub fn part(&self, redo: bool) -> Result<Part> {
        let max_failures = usize::try_from(self.max_failures).unwrap_or(usize::MAX);
        if self.task.is_some() {
            return Ok(Part { task: self.task, max_failures });
        }
        let Some((task, from)) = of_environment(|name| std::env::var(name).ok())? else {
            return Ok(Part { task: None, max_failures });
        };
        if redo {
            return Err(usage(
                format!("`--redo` would throw away what other tasks make: this is task {task} by {from}"),
                "remove the stage's folder before the tasks start, or leave `--redo` out",
            )
            .into());
        }
        tracing::info!("task {task}, by {from}");
        Ok(Part { task: Some(task), max_failures })
    }
}

fn usage(message: String, hint: impl Into<String>) -> Hinted {
    hinted(message, hint).of(FailureKind::Usage)
}

/// The task that a scheduler's variables name, and the variable.
fn of_environment(get: impl Fn(&str) -> Option<String>) -> Result<Option<(Task, &'static str)>, Hinted> {
    const HINT: &str = "say which task this is with `--task K/N`; `--task 0/1` makes all pieces here";
    let number = |name: &str| -> Result<Option<u64>, Hinted> {
        let Some(text) = get(name) else { return Ok(None) };
        let refused = || usage(format!("`{name}` is `{text}`; expected a whole number"), HINT);
        text.trim().parse().map(Some).map_err(|_| refused())
    };
    let count = |name: &str, of: &str| -> Result<u64, Hinted> {
        let absent = || usage(format!("`{of}` is set, and `{name}`, the number of tasks, is not"), HINT);
        number(name)?.ok_or_else(absent)
    };
    let task = |index, of, from| {
        let task = Task::new(index, of);
        task.map(|task| Some((task, from))).map_err(|e| usage(format!("{e} (`{from}`)"), HINT))
    };
    const SLURM: &str = "SLURM_ARRAY_TASK_ID";
    if let Some(id) = number(SLURM)? {
        let of = count("SLURM_ARRAY_TASK_COUNT", SLURM)?;
        let (least, step) = (number("SLURM_ARRAY_TASK_MIN")?, number("SLURM_ARRAY_TASK_STEP")?);
        let (least, step) = (least.unwrap_or(0), step.unwrap_or(1).max(1));
        let index = id.checked_sub(least).filter(|n| n % step == 0).map(|n| n / step);
        let odd = || usage(format!("`{SLURM}` is {id}, which is not {least} and a multiple of {step}"), HINT);
        return task(index.ok_or_else(odd)?, of, SLURM);
    }
    const INDEXED: &str = "JOB_COMPLETION_INDEX";
    match number(INDEXED)? {
        Some(index) => task(index, count(TASKS, INDEXED)?, INDEXED),
        None => Ok(None),
    }
}

/// Arguments of this command that are not a worker's; each has a value.
const NOT_PASSED: [&str; 6] = ["--devices", "--device", "--threads", "--task", "--redo", "--feature-workers"];

/// The arguments of this command that are a worker's too.
pub fn of_worker(all: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let (mut out, mut is_value) = (Vec::new(), false);
    for argument in all {
        if std::mem::take(&mut is_value) {
            continue;
        }
        let text = argument.to_string_lossy();
        match NOT_PASSED.iter().find_map(|name| text.strip_prefix(name)) {
            Some("") => is_value = true,
            Some(value) if value.starts_with('=') => {}
            _ => out.push(argument),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Option<String>, Hinted> {
        let get = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        Ok(of_environment(get)?.map(|(task, _)| task.to_string()))
    }

    #[test]
    fn schedulers_say_which_task_this_is() {
        const ID: &str = "SLURM_ARRAY_TASK_ID";
        const COUNT: &str = "SLURM_ARRAY_TASK_COUNT";
        const MIN: &str = "SLURM_ARRAY_TASK_MIN";
        const STEP: &str = "SLURM_ARRAY_TASK_STEP";
        const INDEX: &str = "JOB_COMPLETION_INDEX";
        assert_eq!(of(&[]).unwrap(), None);
        assert_eq!(of(&[(TASKS, "3")]).unwrap(), None, "no task without its number");
        for (variables, expected) in [
            (&[(ID, "2"), (COUNT, "4")][..], "2/4"),
            (&[(ID, "1"), (COUNT, "4"), (MIN, "1")], "0/4"),
            (&[(ID, "9"), (COUNT, "4"), (MIN, "3"), (STEP, "2")], "3/4"),
            (&[(INDEX, "2"), (TASKS, "3")], "2/3"),
            (&[(ID, "0"), (COUNT, "2"), (INDEX, "2"), (TASKS, "3")], "0/2"),
        ] {
            assert_eq!(of(variables).unwrap().as_deref(), Some(expected), "{variables:?}");
        }
        for (variables, part) in [
            (&[(ID, "two"), (COUNT, "4")][..], "`SLURM_ARRAY_TASK_ID` is `two`"),
            (&[(ID, "2")], "`SLURM_ARRAY_TASK_COUNT`, the number of tasks, is not"),
            (&[(ID, "2"), (COUNT, "2")], "there is no task 2 of 2"),
            (&[(ID, "1"), (COUNT, "4"), (MIN, "2")], "which is not 2 and a multiple of 1"),
            (&[(ID, "4"), (COUNT, "4"), (MIN, "1"), (STEP, "2")], "which is not 1 and a multiple of 2"),
            (&[(INDEX, "0")], "`PKV_TASKS`, the number of tasks, is not"),
            (&[(INDEX, "3"), (TASKS, "3")], "there is no task 3 of 3"),
            (&[(INDEX, "0"), (TASKS, "-1")], "`PKV_TASKS` is `-1`"),
        ] {
            let refused = of(variables).unwrap_err();
            assert_eq!(refused.kind(), FailureKind::Usage);
            assert!(refused.to_string().contains(part), "{refused}");
            assert!(refused.hint().contains("--task K/N"));
        }
    }

    #[test]
    fn devices_are_a_list_or_all() {
        use DeviceChoice::{Cpu, Cuda};
        let pair: DeviceGroup = "cuda:0+cuda:1".parse().unwrap();
        for (text, devices) in [
            ("all", Devices::All),
            ("cuda:0,cuda:3", Devices::Named([Cuda(0), Cuda(3)].map(DeviceGroup::one).into())),
            ("cpu,cpu", Devices::Named([Cpu, Cpu].map(DeviceGroup::one).into())),
            ("cuda:0+cuda:1,cuda:2", Devices::Named(vec![pair, DeviceGroup::one(Cuda(2))])),
        ] {
            assert_eq!(Devices::parse(text).unwrap(), devices);
        }
        for text in ["", "cuda:0,", "gpu", "all,cpu"] {
            assert!(Devices::parse(text).unwrap_err().to_string().contains("is no device"), "{text}");
        }
    }

    #[test]
    fn a_worker_gets_the_arguments_that_are_its_own() {
        let all = "label --devices cpu,cpu --recipe r.toml --device=cpu --set train.steps=3 --threads 2 --redo label --feature-workers 3 -v";
        let passed = of_worker(all.split(' ').map(OsString::from));
        assert_eq!(passed, ["label", "--recipe", "r.toml", "--set", "train.steps=3", "-v"]);
    }
}
