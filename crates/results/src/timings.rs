//! Wall-clock times of kinds of work, summed.

use crate::results::Timing;

/// Count `timing` among others of its kind.
pub fn add(timings: &mut Vec<Timing>, timing: &Timing) {
    match timings.iter_mut().find(|t| t.what == timing.what) {
        Some(t) => {
            t.secs += timing.secs;
            t.times += timing.times;
        }
        None => timings.push(timing.clone()),
    }
}

/// Count all of `others`.
pub fn add_all(timings: &mut Vec<Timing>, others: &[Timing]) {
    others.iter().for_each(|t| add(timings, t));
}
