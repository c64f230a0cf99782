//! Methods as a report gets them, those of the run in this folder among them.

use pkv_recipe::MethodName;
use pkv_results::{MethodInfo, Needs};

const fn info(name: MethodName, meaning: &'static str, needs: Needs) -> MethodInfo {
    MethodInfo { name, meaning, needs }
}

/// In the order of tables and charts.
pub const ALL: [MethodInfo; 10] = [
    info(MethodName::MAPPER, "the trained network", Needs::FEATURES),
    info(
        MethodName::KVZIP,
        "the oracle: attention of the target while it repeats its context",
        Needs::LABELS,
    ),
    info(
        MethodName::of("kvzip-pooled"),
        "the oracle's scores, each raised towards those of its neighbours",
        Needs::LABELS,
    ),
    info(MethodName::LINEAR, "ridge regression from all features", Needs::FEATURES),
    info(
        MethodName::of("proxy-linear"),
        "ridge regression from the one channel that is nearest to a score",
        Needs::FEATURES,
    ),
    info(MethodName::of("iam"), "scores of the source's KV head that matches best", Needs::FEATURES),
    info(
        MethodName::HEAD_PRIOR,
        "each KV head's mean training score, positions at random: a lower bound for any method",
        Needs::NOTHING,
    ),
    info(MethodName::of("streaming-llm"), "the first and the most recent positions", Needs::NOTHING),
    info(
        MethodName::SNAPKV,
        "attention of the last tokens of the context; the question is not known yet",
        Needs::PREFILL,
    ),
    info(MethodName::RANDOM, "positions and heads at random", Needs::NOTHING),
];
