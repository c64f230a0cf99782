//! How a method looks in charts and tables, and what it is in a sentence.

use pkv_core::Policy;
use pkv_recipe::Method;

use crate::chart::Marker;

/// Name for readers.
pub const fn label(method: Method) -> &'static str {
    match method {
        Method::Mapper => "mapper",
        Method::Kvzip => "KVzip",
        Method::KvzipPooled => "KVzip, pooled",
        Method::KvzapLinear => "KVzap-style, linear",
        Method::KvzapMlp => "KVzap-style, MLP",
        Method::Linear => "ridge, linear",
        Method::ProxyLinear => "proxy scores, linear",
        Method::Iam => "IAM-style",
        Method::HeadPrior => "head prior",
        Method::StreamingLlm => "StreamingLLM",
        Method::Snapkv => "SnapKV",
        Method::Random => "random",
    }
}

/// What it does, in a sentence without its name.
pub const fn meaning(method: Method) -> &'static str {
    match method {
        Method::Mapper => "the trained network: the proxy's attention in, the target's scores out",
        Method::Kvzip => {
            "the oracle: the target repeats its context and tells what it looked at; this is what the mapper learnt from"
        }
        Method::KvzipPooled => "the oracle's scores, each raised towards those of its neighbours",
        Method::KvzapLinear => {
            "ridge regression from the target's own hidden states, layer by layer; no proxy"
        }
        Method::KvzapMlp => "the same by a network with one hidden layer per layer of the target",
        Method::Linear => "ridge regression from all features of the proxy",
        Method::ProxyLinear => "ridge regression from the proxy's own scores",
        Method::Iam => {
            "each KV head of the target takes the scores of the proxy's KV head that it matches best"
        }
        Method::HeadPrior => {
            "each KV head's mean training score, positions at random: the floor that any claim must clear"
        }
        Method::StreamingLlm => "the first and the most recent positions",
        Method::Snapkv => "what the last tokens of the context attend to; the question is not known yet",
        Method::Random => "positions and heads at random",
    }
}

/// Class of `chart.css`.
pub fn class(method: Method) -> String {
    format!("m-{}", method.name())
}

/// Shapes differ where colours are near.
pub const fn marker(method: Method) -> Marker {
    match method {
        Method::Mapper | Method::Kvzip => Marker::Circle,
        Method::KvzipPooled => Marker::Ring,
        Method::KvzapLinear => Marker::Diamond,
        Method::KvzapMlp => Marker::TriangleDown,
        Method::Linear => Marker::Square,
        Method::ProxyLinear => Marker::TriangleUp,
        Method::Iam => Marker::TriangleDown,
        Method::HeadPrior => Marker::Diamond,
        Method::StreamingLlm => Marker::Square,
        Method::Snapkv => Marker::TriangleUp,
        Method::Random => Marker::Ring,
    }
}

/// KVzip's own scores cost what the mapper avoids: they are compared with, not competed with.
pub const fn is_oracle(method: Method) -> bool {
    matches!(method, Method::Kvzip | Method::KvzipPooled)
}

/// What a policy ranks against each other.
pub const fn policy_meaning(policy: Policy) -> &'static str {
    match policy {
        Policy::Pair => "all KV pairs of all layers and heads compete",
        Policy::PairUniform => "every layer and KV head keeps the same number of positions",
        Policy::Token => "the same positions are kept in all layers and heads",
    }
}
