//! The learning rate over the steps, and when they end.
//!
//! A number of steps: linear warm-up, then a cosine to the last step. `auto`, where the end is not known:
//! constant after the warm-up (warmup-stable-decay, MiniCPM, arXiv 2404.06395) until validation no longer
//! gains, then a decay of 1 - sqrt(share done), the best of the forms that arXiv 2405.18392 compares, whose
//! length follows from the steps done. What this depends on beside the step is in the checkpoint.

use std::f64::consts::PI;

use anyhow::{Context as _, Result};
use pkv_recipe::{AutoSteps, Steps, TrainSection};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Final learning rate, as a share of its peak; above zero, so that the last steps still have an effect.
const FLOOR: f64 = 0.01;

/// The schedule of a training.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    warmup: u64,
    peak: f64,
    /// `train.lr_cuts`.
    cuts: Vec<(u64, f64)>,
    course: Course,
}

#[derive(Clone, Debug, PartialEq)]
enum Course {
    Fixed(u64),
    Auto(AutoSteps, Waiting),
}

/// State of the validations so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Waiting {
    /// The score that a gain is measured from, its bits: decimal numbers are not read back bit for bit.
    score_bits: Option<u64>,
    /// Validations since the last gain.
    idle: u64,
    /// Steps done when the decay began.
    decay_from: Option<u64>,
}

impl Schedule {
    pub fn new(train: &TrainSection) -> Self {
        let course = match (train.steps, train.auto()) {
            (Steps::Number(steps), _) => Course::Fixed(steps),
            (_, auto) => Course::Auto(auto.unwrap_or_default(), Waiting::default()),
        };
        let mut this = Self {
            warmup: train.warmup_steps.min(train.most_steps()),
            peak: train.lr,
            cuts: train.lr_cuts.clone(),
            course,
        };
        this.stepped(0);
        this
    }

    /// Learning rate of step `step` (from 0).
    pub fn rate(&self, step: u64) -> f64 {
        let cuts = self.cuts.iter().filter(|(from, _)| *from <= step);
        cuts.fold(self.uncut(step), |rate, (_, factor)| rate * factor)
    }

    fn uncut(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let shape = match (&self.course, self.end()) {
            (Course::Fixed(steps), _) => {
                // The peak is at step `warmup`, the floor at the last step.
                let span = (steps - self.warmup).saturating_sub(1).max(1) as f64;
                let done = ((step - self.warmup) as f64 / span).min(1.0);
                0.5 * (1.0 + (PI * done).cos())
            }
            (Course::Auto(_, Waiting { decay_from: Some(from), .. }), Some(end)) if step >= *from => {
                let done = (step + 1 - from) as f64 / (end - from) as f64;
                1.0 - done.min(1.0).sqrt()
            }
            _ => 1.0,
        };
        self.peak * (FLOOR + (1.0 - FLOOR) * shape)
    }

    /// Steps of the whole training, once they are known.
    pub fn end(&self) -> Option<u64> {
        match &self.course {
            Course::Fixed(steps) => Some(*steps),
            Course::Auto(auto, waiting) => {
                let from = waiting.decay_from?;
                // At least one step of decay, and never beyond the most.
                Some(
                    (from + ((auto.decay * from as f64).ceil() as u64).max(1))
                        .min(auto.max_steps.max(from + 1)),
                )
            }
        }
    }

    /// Steps that training never exceeds.
    pub fn most(&self) -> u64 {
        match &self.course {
            Course::Fixed(steps) => *steps,
            Course::Auto(auto, _) => self.end().unwrap_or(auto.max_steps),
        }
    }

    /// Steps done when the decay began, if the steps are `auto` and it has.
    pub fn decay_from(&self) -> Option<u64> {
        match &self.course {
            Course::Fixed(_) => None,
            Course::Auto(_, waiting) => waiting.decay_from,
        }
    }

    pub fn is_done(&self, step: u64) -> bool {
        self.end().is_some_and(|end| step >= end)
    }

    /// `step` steps are done: the last at which a decay of full length fits below the most begins it.
    pub fn stepped(&mut self, step: u64) {
        if let Course::Auto(auto, waiting) = &mut self.course {
            let last = (auto.max_steps as f64 / (1.0 + auto.decay)).floor() as u64;
            if waiting.decay_from.is_none() && step >= last {
                waiting.decay_from = Some(step);
            }
        }
    }

    /// The weights after `step` steps have this validation score. True if it begins the decay.
    pub fn validated(&mut self, step: u64, score: f64) -> bool {
        let Course::Auto(auto, waiting) = &mut self.course else { return false };
        if waiting.decay_from.is_some() {
            return false;
        }
        // Small gains add up: the score to pass changes only when it is passed by enough.
        let gained = waiting.score_bits.is_none_or(|from| score > f64::from_bits(from) + auto.min_gain);
        if gained {
            (waiting.score_bits, waiting.idle) = (Some(score.to_bits()), 0);
        } else {
            waiting.idle += 1;
        }
        if waiting.idle >= auto.patience {
            waiting.decay_from = Some(step);
        }
        waiting.decay_from.is_some()
    }

    /// For a checkpoint; nothing where the step says all.
    pub fn save(&self) -> Option<Value> {
        match &self.course {
            Course::Fixed(_) => None,
            Course::Auto(_, waiting) => Some(json!(waiting)),
        }
    }

    /// The schedule of `train`, where the checkpoint that has `extra` left it.
    ///
    /// # Errors
    /// The steps are `auto` and the checkpoint says nothing of them.
    pub fn restore(train: &TrainSection, extra: &Value) -> Result<Self> {
        let mut this = Self::new(train);
        if let Course::Auto(_, waiting) = &mut this.course {
            *waiting = serde_json::from_value(extra["schedule"].clone())
                .context("the checkpoint does not say how far `train.steps = \"auto\"` had come")?;
        }
        Ok(this)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(steps: u64, warmup_steps: u64) -> TrainSection {
        TrainSection { steps: steps.into(), warmup_steps, lr: 2.0, ..TrainSection::default() }
    }

    fn auto(max_steps: u64, patience: u64, decay: f64) -> TrainSection {
        TrainSection {
            steps: Steps::Auto,
            max_steps: Some(max_steps),
            patience: Some(patience),
            min_gain: Some(0.01),
            decay: Some(decay),
            ..section(1, 10)
        }
    }

    #[test]
    fn it_rises_to_the_peak_and_falls_to_one_percent() {
        let s = Schedule::new(&section(1500, 50));
        let rates: Vec<f64> = (0..1500).map(|i| s.rate(i)).collect();
        assert!((rates[0] - 0.04).abs() < 1e-12 && (rates[49] - 2.0).abs() < 1e-12);
        assert!((rates[50] - 2.0).abs() < 1e-12 && (rates[1499] - 0.02).abs() < 1e-12);
        assert!(rates[..50].is_sorted() && rates[50..].iter().rev().is_sorted());
        assert!((rates[50 + 1449 / 2] - 1.01).abs() < 0.01);
        assert_eq!((s.end(), s.most(), s.save()), (Some(1500), 1500, None));
    }

    #[test]
    fn cuts_add_up_from_their_steps_on() {
        let plain = Schedule::new(&section(100, 10));
        let cut = Schedule::new(&TrainSection { lr_cuts: vec![(5, 0.5), (60, 0.1)], ..section(100, 10) });
        for (step, factor) in [(0, 1.0), (4, 1.0), (5, 0.5), (59, 0.5), (60, 0.05), (99, 0.05)] {
            let off = cut.rate(step) / plain.rate(step) - factor;
            assert!(off.abs() < 1e-12, "step {step}: {off}");
        }
    }

    #[test]
    fn short_runs_have_rates_too() {
        for (steps, warmup) in [(1, 0), (1, 50), (2, 1), (10, 10), (5, 50)] {
            let s = Schedule::new(&section(steps, warmup));
            assert!((0..steps).all(|i| (0.0..=2.0).contains(&s.rate(i)) && s.rate(i) > 0.0));
        }
    }

    #[test]
    fn patience_without_a_gain_begins_a_decay_to_one_percent() {
        let mut s = Schedule::new(&auto(1000, 2, 0.25));
        assert_eq!((s.end(), s.most()), (None, 1000));
        // The rise to 0.509 is no gain by itself; together with the next it is.
        for (step, score) in [(20, 0.2), (40, 0.5), (60, 0.509), (80, 0.5101), (100, 0.3)] {
            assert!(!s.validated(step, score), "{step}");
            assert_eq!((s.end(), s.rate(step)), (None, 2.0));
        }
        assert!(s.validated(120, 0.5201), "less than a point above 0.5101");
        assert_eq!((s.decay_from(), s.end(), s.most()), (Some(120), Some(150), 150));
        let rates: Vec<f64> = (0..150).map(|i| s.rate(i)).collect();
        assert!(rates[..10].is_sorted() && rates[10..120].iter().all(|r| *r == 2.0));
        assert!(rates[119..].windows(2).all(|r| r[0] > r[1]), "{rates:?}");
        assert!((rates[149] - 0.02).abs() < 1e-12);
        // A quarter of the decay takes half of the way.
        let half = s.peak * (FLOOR + (1.0 - FLOOR) * (1.0 - (8.0f64 / 30.0).sqrt()));
        assert!((rates[127] - half).abs() < 1e-12);
        assert!(!s.is_done(149) && s.is_done(150));
        // What comes during the decay does not begin it again.
        assert!(!s.validated(140, 0.9));
        assert_eq!(s.end(), Some(150));
    }

    #[test]
    fn the_most_steps_hold_the_decay_whatever_the_gains() {
        for (most, decay) in [(1, 0.25), (2, 0.25), (7, 1.0), (100, 0.25), (1001, 0.3), (5000, 0.2)] {
            let mut s = Schedule::new(&auto(most, 3, decay));
            let mut step = 0;
            while !s.is_done(step) {
                assert!(s.rate(step) > 0.0 && step < most, "{most}: step {step}");
                step += 1;
                s.stepped(step);
                s.validated(step, step as f64);
            }
            assert!(step <= most && step + 2 >= most, "{step} of {most}");
        }
    }

    #[test]
    fn a_saved_schedule_goes_on_as_if_it_had_not_stopped() {
        let train = auto(1000, 3, 0.25);
        let scores = [0.1 + 0.2, 0.3, 0.5, 0.4, 0.5, 0.505, 0.9];
        for stop in 0..scores.len() {
            let mut whole = Schedule::new(&train);
            let mut broken = whole.clone();
            for (i, &score) in scores.iter().enumerate() {
                if i == stop {
                    let text = json!({"schedule": broken.save()}).to_string();
                    broken = Schedule::restore(&train, &serde_json::from_str(&text).unwrap()).unwrap();
                }
                let step = 20 * (i as u64 + 1);
                assert_eq!(whole.validated(step, score), broken.validated(step, score));
                assert_eq!(whole, broken);
            }
            assert_eq!(whole.decay_from(), Some(120));
        }
        assert!(Schedule::restore(&train, &json!({"window": 1})).is_err());
        assert!(Schedule::restore(&section(5, 1), &json!({"window": 1})).is_ok());
    }
}
