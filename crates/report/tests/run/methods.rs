//! Methods as a report gets them, those of the run in this folder among them.

use pkv_recipe::MethodName;
use pkv_results::{MethodInfo, Needs};

const fn info(name: MethodName, label: &'static str, meaning: &'static str, needs: Needs) -> MethodInfo {
    MethodInfo { name, label, meaning, needs }
}

/// In the order of tables and charts.
pub const ALL: [MethodInfo; 10] = [
    info(MethodName::MAPPER, "mapper", "the trained network", Needs::FEATURES),
    info(
        MethodName::KVZIP,
        "KVzip",
        "the oracle: attention of the target while it repeats its context",
        Needs::LABELS,
    ),
    info(
        MethodName::of("kvzip-pooled"),
        "KVzip, pooled",
        "the oracle's scores, each raised towards those of its neighbours",
        Needs::LABELS,
    ),
    info(MethodName::LINEAR, "ridge, linear", "ridge regression from all features", Needs::FEATURES),
    info(
        MethodName::of("proxy-linear"),
        "one channel, linear",
        "ridge regression from the one channel that is nearest to a score",
        Needs::FEATURES,
    ),
    info(
        MethodName::of("iam"),
        "IAM-style",
        "scores of the source's KV head that matches best",
        Needs::FEATURES,
    ),
    info(
        MethodName::HEAD_PRIOR,
        "head prior",
        "each KV head's mean training score, positions at random: a lower bound for any method",
        Needs::NOTHING,
    ),
    info(
        MethodName::of("streaming-llm"),
        "StreamingLLM",
        "the first and the most recent positions",
        Needs::NOTHING,
    ),
    info(
        MethodName::SNAPKV,
        "SnapKV",
        "attention of the last tokens of the context; the question is not known yet",
        Needs::PREFILL,
    ),
    info(MethodName::RANDOM, "random", "positions and heads at random", Needs::NOTHING),
];
