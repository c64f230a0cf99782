//! A run folder as the stages leave it, with numbers of the size that the tiny pair shows.

pub mod methods;

use std::fs;
use std::path::Path;

use pkv_core::Policy;
use pkv_recipe::{AnswerMatch, MethodName, Recipe};
use pkv_results::{
    AnswerCell, AnswerResults, FactSpan, HeadRecall, Interval, KeptCounts, LabelCell, LabelResults,
    MethodHeads, MethodNote, ModelName, PerplexityCell, PerplexityResults, RESULTS_VERSION, RankCell,
    Results, Timing, WorkedExample,
};
use serde_json::json;

pub const RATIOS: [f64; 8] = [0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01];
pub const ANSWER_RATIOS: [f64; 6] = [0.2, 0.1, 0.05, 0.03, 0.02, 0.01];
const LAYERS: usize = 12;
const KV_HEADS: usize = 3;

/// Percent of KVzip's kept set found at `RATIOS`, and of questions answered at `ANSWER_RATIOS`.
const MEASURED: [(MethodName, [f64; 8], [f64; 6]); 10] = [
    (
        MethodName::MAPPER,
        [94.1, 90.3, 88.0, 81.9, 81.8, 82.2, 75.6, 60.4],
        [99.8, 99.6, 97.9, 93.8, 78.1, 45.2],
    ),
    (MethodName::KVZIP, [100.0; 8], [100.0, 99.6, 98.3, 87.1, 67.5, 31.0]),
    (
        MethodName::of("kvzip-pooled"),
        [97.1, 95.0, 93.4, 92.1, 91.7, 90.8, 87.7, 79.9],
        [100.0, 99.6, 98.3, 92.9, 76.2, 43.3],
    ),
    (
        MethodName::LINEAR,
        [92.8, 88.9, 86.5, 78.6, 78.8, 79.4, 72.9, 55.2],
        [99.8, 99.6, 95.8, 86.5, 67.3, 34.6],
    ),
    (
        MethodName::of("proxy-linear"),
        [92.0, 88.0, 85.5, 76.4, 78.2, 78.4, 71.8, 54.0],
        [99.6, 99.2, 93.8, 74.8, 63.1, 31.7],
    ),
    (
        MethodName::of("iam"),
        [87.3, 82.5, 79.5, 72.7, 73.0, 74.1, 67.4, 51.1],
        [99.4, 98.1, 87.3, 75.2, 60.6, 30.8],
    ),
    (
        MethodName::HEAD_PRIOR,
        [90.9, 87.0, 84.2, 72.5, 73.9, 74.6, 59.0, 32.0],
        [99.6, 98.5, 87.3, 70.0, 22.9, 3.5],
    ),
    (
        MethodName::of("streaming-llm"),
        [52.1, 33.0, 23.4, 13.0, 7.1, 4.6, 3.2, 1.8],
        [9.6, 4.8, 2.7, 1.7, 1.0, 0.4],
    ),
    (MethodName::SNAPKV, [66.0, 50.9, 42.3, 32.0, 24.4, 19.6, 15.7, 10.9], [6.9, 3.1, 2.1, 1.5, 0.8, 0.4]),
    (MethodName::RANDOM, [50.0, 30.0, 20.0, 9.9, 5.0, 3.0, 2.0, 1.0], [6.2, 1.7, 0.4, 0.0, 0.2, 0.4]),
];

/// `x` a little off, the same on every machine.
fn jitter(i: usize) -> f64 {
    ((i * 2_654_435_761) % 1000) as f64 / 1000.0 - 0.5
}

fn around(percent: f64, half_width: f64) -> Interval {
    let mean = percent / 100.0;
    let low = (mean - half_width).max(0.0);
    Interval { mean, low, high: (mean + half_width * 0.9).min(1.0).max(mean) }
}

pub fn recipe() -> Recipe {
    let model = |name: &str, layers: usize, kv_heads: usize| {
        json!({"model": name, "shape": {
            "layers": layers, "kv_heads": kv_heads, "query_heads": 2 * kv_heads, "head_dim": 64,
            "hidden": 128 * kv_heads, "intermediate": 1024, "vocab": 4096}})
    };
    serde_json::from_value(json!({
        "name": "tiny-llama",
        "target": model("models/tiny-llama-target", LAYERS, KV_HEADS),
        "proxy": model("models/tiny-llama-proxy", 6, 2),
        "data": {
            "manifest": "data-manifests/tiny.toml", "train": 480, "validation": 100, "test": 100,
            "window_tokens": [512, 1024, 1792], "test_window_tokens": 1400},
    }))
    .unwrap()
}

pub fn results() -> Results {
    let mut labels = LabelResults { contexts: 100, positions: 140_000, ..LabelResults::default() };
    let mut facts = Vec::new();
    let mut perplexity = Vec::new();
    for (k, (method, recall, answers)) in MEASURED.into_iter().enumerate() {
        for (p, policy) in Policy::WITHOUT_KEYS.into_iter().enumerate() {
            for (i, ratio) in RATIOS.into_iter().enumerate() {
                let recall = recall[i]
                    - if method == MethodName::KVZIP {
                        0.0
                    } else {
                        3.0 * p as f64 * (1.0 - recall[i] / 110.0)
                    };
                labels.cells.push(LabelCell {
                    contexts: None,
                    method,
                    policy,
                    ratio,
                    recall: around(recall, 0.006),
                    recall_of_pair: Some(around(recall - 5.0 * p as f64, 0.006)),
                    mass: around(60.0 + 0.4 * recall, 0.004),
                    realised: ratio,
                });
            }
        }
        for (i, ratio) in ANSWER_RATIOS.into_iter().enumerate() {
            let (share, oracle) = (answers[i] / 100.0, MEASURED[1].2[i] / 100.0);
            let half = 1.96 * (share * (1.0 - share) / 300.0).sqrt();
            let accuracy = around(answers[i], half);
            facts.push(AnswerCell {
                contexts: None,
                method,
                policy: Policy::Pair,
                ratio,
                score: accuracy,
                exact_match: Some(around(0.9 * answers[i], half)),
                f1: Some(around(0.95 * answers[i], half)),
                kl: Interval {
                    mean: 2.4 * (1.0 - share),
                    low: 2.2 * (1.0 - share),
                    high: 2.6 * (1.0 - share),
                },
                flips: around(80.0 * (1.0 - share), half),
                of_kvzip: Some(Interval {
                    mean: share / oracle,
                    low: accuracy.low / oracle,
                    high: accuracy.high / oracle,
                }),
                of_full: Some(accuracy),
            });
            let excess = 0.9 * (1.0 - recall[i + 2] / 100.0) * (1.0 + 0.05 / ratio);
            perplexity.push(PerplexityCell {
                contexts: None,
                method,
                policy: Policy::Pair,
                ratio,
                nll: Interval { mean: 1.5 + excess, low: 1.45 + excess, high: 1.55 + excess },
                excess: Interval { mean: excess, low: excess * 0.92, high: excess * 1.08 },
            });
        }
        labels.ranks.push(RankCell {
            method,
            spearman: recall[7] / 92.0,
            kendall: recall[7] / 120.0 + 0.001 * k as f64,
            log_r2: Some(recall[7] / 130.0),
        });
    }
    labels.heads = Some(heads());
    Results {
        schema_version: RESULTS_VERSION,
        fingerprint: "9f3a6c".to_owned(),
        seed: 1,
        bootstrap: Some(1000),
        mapper: "checkpoint of step 1400".to_owned(),
        target: ModelName { name: "models/tiny-llama-target".to_owned(), layers: LAYERS, kv_heads: KV_HEADS },
        proxy: Some(ModelName { name: "models/tiny-llama-proxy".to_owned(), layers: 6, kv_heads: 2 }),
        notes: vec![MethodNote {
            method: MethodName::of("proxy-linear"),
            note: "the features hold no reconstruction scores; from `max_all`".to_owned(),
        }],
        labels,
        facts: Some(AnswerResults {
            made: Default::default(),
            suite: String::new(),
            task: String::new(),
            contexts: 60,
            questions: 480,
            answer_match: Some(AnswerMatch::default()),
            mean_context_tokens: None,
            cut: None,
            full: Interval { mean: 1.0, low: 1.0, high: 1.0 },
            full_exact_match: Some(Interval { mean: 0.9, low: 0.9, high: 0.9 }),
            full_f1: Some(Interval { mean: 0.95, low: 0.95, high: 0.95 }),
            cells: facts,
        }),
        perplexity: Some(PerplexityResults {
            made: Default::default(),
            contexts: 60,
            continuation_tokens: 64,
            full: Interval { mean: 1.5, low: 1.4, high: 1.6 },
            cells: perplexity,
        }),
        benchmarks: Vec::new(),
        worked_example: Some(example()),
        timings: vec![
            Timing { what: "target: prefill".to_owned(), secs: 14.1, times: 160 },
            Timing { what: "target: KVzip scores".to_owned(), secs: 40.0, times: 160 },
            Timing { what: "features".to_owned(), secs: 5.6, times: 160 },
            Timing { what: "scores: kvzip".to_owned(), secs: 0.1, times: 160 },
            Timing { what: "scores: mapper".to_owned(), secs: 2.9, times: 160 },
        ],
    }
}

fn heads() -> HeadRecall {
    let grid = |f: &dyn Fn(usize) -> f64| -> Vec<Vec<f64>> {
        (0..LAYERS).map(|l| (0..KV_HEADS).map(|h| f(l * KV_HEADS + h)).collect()).collect()
    };
    let kept = grid(&|i| match i {
        17 => 0.91,
        8 | 22 => 0.33,
        0 | 35 => 0.0,
        _ => (0.04 * (1.0 + 1.8 * jitter(i))).max(0.001),
    });
    let recall = |mean: f64| -> Vec<Vec<Option<f64>>> {
        let shares = grid(&|i| (mean + 0.5 * jitter(i + 3)).clamp(0.0, 1.0));
        let hollow = |(share, kept): (&f64, &f64)| (*kept > 0.0).then_some(*share);
        shares.iter().zip(&kept).map(|(s, k)| s.iter().zip(k).map(hollow).collect()).collect()
    };
    HeadRecall {
        policy: Policy::Pair,
        ratio: 0.05,
        methods: vec![
            MethodHeads { method: MethodName::MAPPER, recall: recall(0.72), kept: kept.clone() },
            MethodHeads { method: MethodName::HEAD_PRIOR, recall: recall(0.3), kept: Vec::new() },
        ],
        kvzip_kept: kept,
    }
}

fn example() -> WorkedExample {
    let prose = "The harbour office keeps a ledger of every barge that passes the lock after dusk . \
                 Water is let in slowly , so that nothing on deck moves , and the keeper writes the hour by hand . \
                 In winter the ice is broken twice a day , and a lamp burns at each gate until the last boat is home .";
    let facts = [
        (
            "The access code for the amber compass is 48213.",
            "What is the access code for the amber compass?",
            "48213",
        ),
        (
            "The silver lantern was built in the city of Lisbon.",
            "In which city was the silver lantern built?",
            "Lisbon",
        ),
        ("Remember that the quiet archive opens at 7:45.", "When does the quiet archive open?", "7:45"),
    ];
    let mut tokens: Vec<String> = Vec::new();
    let mut spans = Vec::new();
    let words: Vec<&str> = prose.split(' ').collect();
    for i in 0.. {
        if tokens.len() > 700 {
            break;
        }
        if i == 60 || i == 290 || i == 520 {
            let (sentence, question, answer) = facts[i / 200];
            let start = tokens.len();
            for word in sentence.split_inclusive(' ') {
                let (head, tail) = word.split_at(word.len() / 2);
                tokens.extend([head, tail].iter().filter(|t| !t.is_empty()).map(|t| (*t).to_owned()));
            }
            let len = tokens.len() - start;
            spans.push(FactSpan { start, len, question: question.to_owned(), answer: answer.to_owned() });
        }
        let word = words[i % words.len()];
        tokens.push(if word == "." || word == "," { word.to_owned() } else { format!(" {word}") });
        if word == "." && i % 4 == 1 {
            tokens.push("\n\n".to_owned());
        }
    }
    let pairs = (LAYERS * KV_HEADS) as f64;
    let in_fact = |t: usize| spans.iter().any(|s| (s.start..s.start + s.len).contains(&t));
    let mut kept = Vec::new();
    for (k, (method, recall, _)) in MEASURED.into_iter().enumerate() {
        for (i, ratio) in ANSWER_RATIOS.into_iter().enumerate() {
            let focus = if method == MethodName::RANDOM { 0.0 } else { recall[i + 2] / 100.0 };
            let counts = (0..tokens.len())
                .map(|t| {
                    let wanted = if in_fact(t) { 1.0 + 7.0 * focus } else { 0.9 };
                    let sink = if t < 3 && focus > 0.0 { 9.0 } else { 0.0 };
                    (pairs * ratio * (wanted + sink) * (1.0 + 1.9 * jitter(t * 7 + k)))
                        .round()
                        .clamp(0.0, pairs) as u32
                })
                .collect();
            kept.push(KeptCounts { method, ratio, counts });
        }
    }
    WorkedExample {
        id: "harbour & lock #12".to_owned(),
        tokens,
        facts: spans,
        policy: Policy::Pair,
        pairs_per_position: pairs as u32,
        kept,
    }
}

fn metrics() -> String {
    let mut out = String::new();
    for step in (10..=1500u64).step_by(10) {
        let loss = 0.42 + 1.3 / (1.0 + step as f64 / 40.0) + 0.05 * jitter(step as usize);
        let terms = json!({"binary": loss * 0.8, "value_mse": loss * 0.2});
        out += &format!(
            "{}\n",
            json!({"step": step, "kind": "train", "loss": loss, "terms": terms, "lr": 2e-3, "gradient_norm": 0.9})
        );
        if step % 100 == 0 {
            let grown = 1.0 - (-(step as f64) / 350.0).exp();
            let recall: serde_json::Map<_, _> = RATIOS
                .iter()
                .zip(&MEASURED[0].1)
                .map(|(r, &v)| {
                    (r.to_string(), json!((v - 9.0 * (1.0 - grown) + 0.4 * jitter(step as usize)) / 100.0))
                })
                .collect();
            let line = json!({"step": step, "kind": "validation", "loss": 0.47 + 0.9 / (1.0 + step as f64 / 60.0), "best": step <= 1400, "recall": {"pair": recall}});
            out += &format!("{line}\n");
        }
    }
    out
}

/// Every part of a run below `root`.
pub fn write(root: &Path) {
    let file = |path: &str, text: &str| {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    let stage = |secs: f64, summary: serde_json::Value| json!({"secs": secs, "summary": summary});
    let run = json!({
        "name": "tiny-llama", "recipe": recipe(), "recipe_path": "recipes/tiny-llama.toml", "seed": 1,
        "tool": {"name": "proxykv-train", "version": "0.1.0", "commit": "db0f390"},
        "libtorch": "2.11.0", "device": "cpu", "threads": 2,
        "target": {"model": "models/tiny-llama-target", "revision": "local:5d41402a"},
        "proxy": {"model": "models/tiny-llama-proxy", "revision": "local:7d793037"},
        "stages": {
            "prepare": stage(3.2, json!({"examples": 680, "tokens": 742_113, "documents": 300})),
            "label": stage(1210.0, json!({"examples": 680, "tokens_per_second": 613.3})),
            "extract": stage(212.5, json!({"examples": 680})),
            "train": stage(901.0, json!({"steps": 1500, "best_step": 1400, "parameters": 1_150_000})),
            "eval": stage(505.0, json!({"questions": 480})),
        }
    });
    file("run.json", &serde_json::to_string_pretty(&run).unwrap());
    file("train/metrics.jsonl", &metrics());
    file("labels/labels-00000.parquet", &"x".repeat(53_000));
    file("features/features-00000.parquet", &"x".repeat(148_000));
    file("examples/examples-00000.parquet", &"x".repeat(3_000));
    fs::create_dir_all(root.join("eval")).unwrap();
    results().write(&root.join("eval/results.json")).unwrap();
}
