//! The learning rate over the steps.

use std::f64::consts::PI;

use pkv_recipe::TrainSection;

/// What the learning rate ends at, as a share of its peak: the last steps still move.
const FLOOR: f64 = 0.01;

/// Learning rate of step `step` (from 0): linear warm-up, then a cosine to 1% of the peak at the last step.
pub fn learning_rate(section: &TrainSection, step: u64) -> f64 {
    let warmup = section.warmup_steps.min(section.steps);
    if step < warmup {
        return section.lr * (step + 1) as f64 / warmup as f64;
    }
    // The peak is at step `warmup`, the floor at the last step.
    let span = (section.steps - warmup).saturating_sub(1).max(1) as f64;
    let done = ((step - warmup) as f64 / span).min(1.0);
    section.lr * (FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + (PI * done).cos()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(steps: u64, warmup_steps: u64) -> TrainSection {
        TrainSection { steps, warmup_steps, lr: 2.0, ..TrainSection::default() }
    }

    #[test]
    fn it_rises_to_the_peak_and_falls_to_one_percent() {
        let s = section(1500, 50);
        let rates: Vec<f64> = (0..1500).map(|i| learning_rate(&s, i)).collect();
        assert!((rates[0] - 0.04).abs() < 1e-12 && (rates[49] - 2.0).abs() < 1e-12);
        assert!((rates[50] - 2.0).abs() < 1e-12 && (rates[1499] - 0.02).abs() < 1e-12);
        assert!(rates[..50].is_sorted() && rates[50..].iter().rev().is_sorted());
        assert!((rates[50 + 1449 / 2] - 1.01).abs() < 0.01);
    }

    #[test]
    fn short_runs_have_rates_too() {
        for (steps, warmup) in [(1, 0), (1, 50), (2, 1), (10, 10), (5, 50)] {
            let s = section(steps, warmup);
            assert!(
                (0..steps).all(|i| (0.0..=2.0).contains(&learning_rate(&s, i)) && learning_rate(&s, i) > 0.0)
            );
        }
    }
}
