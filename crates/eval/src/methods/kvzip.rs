//! KVzip's own scores: the oracle, raw and pooled.

use pkv_prune::{log_odds, pool_targets};
use pkv_recipe::MethodName;

use super::method::{Method, Needs, Ready};

pub const RAW: Method = Method {
    name: MethodName::KVZIP,
    meaning: "the oracle: attention of the target while it repeats its context; the mapper is trained on these scores",
    needs: Needs::LABELS,
    #[cfg(test)]
    held_by: ("../score/tests/score/goldens.rs", "fn nano_target"),
    start: |_| Ready::scores(|view| Ok(view.labels()?.shallow_clone())).start(),
};

/// Span-pooled as the recipe trains on them.
pub const POOLED: Method = Method {
    name: MethodName::of("kvzip-pooled"),
    meaning: "the oracle's scores, each raised towards those of its neighbours",
    needs: Needs::LABELS,
    #[cfg(test)]
    held_by: ("../prune/src/target.rs", "fn pooling_equals_a_naive_window"),
    start: |setup| {
        let pool = setup.pool;
        Ready::scores(move |view| Ok(pool_targets(&log_odds(view.labels()?), &pool))).start()
    },
};
