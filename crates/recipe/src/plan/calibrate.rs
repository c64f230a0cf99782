//! A plan with the times of a past run: what a stage took over what was planned for it, times what is planned
//! for it now.
//!
//! What a machine does slower or faster than its figures say, and what no count of operations tells (small
//! kernels, a disk, a tokenizer), is in those times. A stage that the past run did not do keeps its own.

use std::cmp::Ordering;

use super::{Machine, Plan, StagePlan};

/// A past run: the seconds that its stages took, and what was planned for them.
#[derive(Clone, Debug)]
pub struct PastRun {
    /// In the words that the user named it by.
    name: String,
    stages: Vec<Took>,
}

#[derive(Clone, Debug)]
struct Took {
    stage: String,
    secs: f64,
    machine: Machine,
    planned: Option<StagePlan>,
    /// A part of `secs` that no plan counts, and what it takes now.
    apart: Option<(f64, f64)>,
}

impl PastRun {
    /// A run without stages.
    pub fn new(name: String) -> Self {
        Self { name, stages: Vec::new() }
    }

    /// A stage that took `secs`, and the plan of that run on the machine that the stage ran on.
    pub fn add(&mut self, stage: &str, secs: f64, plan: &Plan) {
        let (machine, planned) = (plan.machine.clone(), plan.stage(stage).cloned());
        self.stages.push(Took { stage: stage.to_owned(), secs, machine, planned, apart: None });
    }

    /// Of a stage that was added, `then` seconds are of work that no plan counts; now it takes `now`.
    pub fn set_apart(&mut self, stage: &str, then: f64, now: f64) {
        let took = self.stages.iter_mut().find(|took| took.stage == stage);
        // An evaluation that was continued took less than all that was measured.
        if let Some(took) = took.filter(|took| then < took.secs) {
            took.apart = Some((then, now));
        }
    }

    pub fn is_empty(&self) -> bool {
        self.stages.is_empty()
    }

    /// The machine of the stage that took longest.
    ///
    /// # Panics
    /// There is no stage.
    pub fn machine(&self) -> &Machine {
        let longest = |a: &&Took, b: &&Took| a.secs.partial_cmp(&b.secs).unwrap_or(Ordering::Equal);
        &self.stages.iter().max_by(longest).expect("a past run has a stage").machine
    }
}

impl Plan {
    /// This plan with the times of `past`.
    pub fn calibrated(mut self, past: &PastRun) -> Self {
        let (mut own, mut others) = (Vec::new(), Vec::new());
        for stage in &mut self.stages {
            let took = past.stages.iter().find(|took| took.stage == stage.stage);
            match took.and_then(|took| Some((took, secs(stage, took)?))) {
                Some((took, secs)) => {
                    stage.secs = Some(secs);
                    if took.machine.name != self.machine.name && !others.contains(&took.machine.name) {
                        others.push(took.machine.name.clone());
                    }
                }
                None if stage.secs.is_some() => own.push(format!("`{}`", stage.stage)),
                None => {}
            }
        }
        // What is not planned takes what it took: it is short.
        for took in &past.stages {
            if self.stage(&took.stage).is_none() {
                self.stages.push(StagePlan { secs: Some(took.secs), ..StagePlan::nothing(&took.stage) });
            }
        }
        let elsewhere = if others.is_empty() {
            String::new()
        } else {
            format!(", which ran on {}", others.join(" and "))
        };
        self.notes.push(format!("Times are calibrated by the run `{}`{elsewhere}.", past.name));
        if !own.is_empty() {
            self.notes.push(format!("That run has no time of {}: planned without it.", own.join(", ")));
        }
        self.with_verdicts()
    }
}

/// Seconds of `stage` by what it took.
fn secs(stage: &StagePlan, took: &Took) -> Option<f64> {
    let planned = took.planned.as_ref()?;
    match (stage.secs, planned.secs) {
        (Some(now), Some(then)) if then > 0.0 => {
            let (apart_then, apart_now) = took.apart.unwrap_or_default();
            Some(now * (took.secs - apart_then) / then + apart_now)
        }
        // Neither is planned: as much as it reads.
        (None, None) if planned.tokens > 0 && stage.tokens > 0 => {
            Some(took.secs * stage.tokens as f64 / planned.tokens as f64)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::Work;
    use super::super::tests::recipe;
    use super::*;

    fn past(took: &[(&str, f64)], machine: Machine) -> (PastRun, Plan) {
        let plan = Plan::new(&recipe(&["data.train=100", "train.steps=300"]), machine, &Work::default());
        let mut past = PastRun::new("runs/small".to_owned());
        took.iter().for_each(|(stage, secs)| past.add(stage, *secs, &plan));
        (past, plan)
    }

    #[test]
    fn times_of_a_past_run_grow_with_the_work() {
        let took = [("prepare", 2.0), ("label", 100.0), ("extract", 10.0), ("train", 50.0), ("export", 3.0)];
        let (past, planned) = past(&took, Machine::cpu(2));
        assert_eq!((past.machine(), past.is_empty()), (&Machine::cpu(2), false));
        // The same work takes the same time.
        let again = planned.calibrated(&past);
        for (name, secs) in took {
            let planned = again.stage(name).unwrap().secs.unwrap();
            assert!((planned / secs - 1.0).abs() < 1e-9, "{name}: {planned}");
        }
        let plan = Plan::new(&recipe(&[]), Machine::cpu(2), &Work::default());
        let calibrated = plan.clone().calibrated(&past);
        let secs = |plan: &Plan, name: &str| plan.stage(name).unwrap().secs;
        // 1100 contexts in place of 200.
        assert!((secs(&calibrated, "label").unwrap() / 550.0 - 1.0).abs() < 0.01);
        assert!((secs(&calibrated, "prepare").unwrap() / 11.0 - 1.0).abs() < 0.01);
        assert!(secs(&calibrated, "train").unwrap() > 4.5 * 50.0);
        // No time of it, so its own.
        assert_eq!(secs(&calibrated, "eval"), secs(&plan, "eval"));
        let text = calibrated.table();
        assert!(
            text.contains("calibrated by the run `runs/small`.") && text.contains("no time of `eval`"),
            "{text}"
        );
    }

    #[test]
    fn what_no_plan_counts_does_not_grow_with_it() {
        let (mut past, planned) = past(&[("label", 30.0)], Machine::cpu(2));
        past.set_apart("label", 20.0, 40.0);
        let secs = planned.clone().calibrated(&past).stage("label").unwrap().secs.unwrap();
        assert!((secs - 50.0).abs() < 1e-9, "{secs}");
        // More than all of it: what was measured is of several runs of the stage.
        past.stages[0].apart = None;
        past.set_apart("label", 31.0, 31.0);
        let secs = planned.calibrated(&past).stage("label").unwrap().secs.unwrap();
        assert!((secs - 30.0).abs() < 1e-9, "{secs}");
    }

    #[test]
    fn another_machine_is_said() {
        let (past, planned) = past(&[("label", 100.0)], Machine::cpu(2));
        let plan = Plan::new(&recipe(&[]), Machine::card("h100").unwrap(), &Work::default());
        let faster = plan.clone().calibrated(&past);
        assert!(faster.table().contains("which ran on 2 CPU threads, f32."), "{}", faster.table());
        let (now, then) = (plan.stage("label").unwrap().secs, planned.stage("label").unwrap().secs);
        let expected = 100.0 * now.unwrap() / then.unwrap();
        assert!((faster.stage("label").unwrap().secs.unwrap() / expected - 1.0).abs() < 1e-9);
    }
}
