//! What a run will cost, from the recipe alone: nothing is downloaded, opened or measured.
//!
//! Counts of tokens, bytes and floating-point operations follow from the shapes that the recipe
//! states; seconds follow from a [`Machine`], whose factors are measured where `machine` says so
//! and guesses elsewhere. A plan is an upper bound on tokens (documents may be shorter than their
//! window) and on bytes (shards compress); it is a forecast of time, good to a factor of about two, and
//! better with the times of a past run ([`Plan::calibrated`]).

mod calibrate;
mod cost;
mod eval;
mod human;
mod machine;
mod split;
mod stages;
mod table;
mod workers;

use serde::{Deserialize, Serialize};

use crate::{DtypeName, ModelSection, Recipe};
use eval::eval;
use stages::{Lengths, extract, features_made_anew, fetch, infer, label, prepare, target_reads, train};

pub use calibrate::PastRun;
pub use cost::{MapperCost, Repeat, ScorerWork, activation_elements, features, prefill, repeat, scoring};
pub use eval::{Answers, TaskWork};
pub use human::{human_bytes, human_count, human_flops, human_secs};
pub use machine::{Efficiency, Machine, MachineChoice};
pub use split::{DevicePlan, SplitPlan, TargetMemory, fullest, label_chunks, pipelined, prefill_chunks};
pub use stages::{PIECE_ELEMENTS, SHARED_CHUNK, TEMPLATE_TOKENS};
pub use table::aligned;
pub use workers::{Cluster, SharedStage, WorkersPlan};

/// What a recipe names and other crates know the cost of.
#[derive(Clone, Debug, Default)]
pub struct Work {
    /// Of `label.scorer`.
    pub scorer: ScorerWork,
    /// Of `eval`.
    pub tasks: Vec<TaskWork>,
}

/// The cost of every stage of a recipe on one machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub name: String,
    pub machine: Machine,
    pub target: ModelPlan,
    /// Absent if no feature comes from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<ModelPlan>,
    pub mapper: MapperPlan,
    /// A number, or `auto` and the most, which is what the stage's figures count.
    pub train_steps: String,
    /// How `label` lays the target over several GPUs, at the longest window; absent where one is enough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<SplitPlan>,
    /// GPUs over which the target would fit, where the machine has one that does not hold it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub over_more: Option<usize>,
    /// In the order they run.
    pub stages: Vec<StagePlan>,
    /// The plan of inference, at the longest window.
    pub infer: InferPlan,
    /// Stages that workers share, by the numbers of workers that were asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub workers: Vec<WorkersPlan>,
    /// Further notes, in sentences.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// One of the two models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelPlan {
    pub model: String,
    /// With input and output embeddings counted apart; models that tie them have fewer.
    pub parameters: u64,
    /// Weights in the dtype of this machine.
    pub weight_bytes: u64,
    /// Keys and values of one position.
    pub cache_bytes_per_token: u64,
}

/// The mapper that the recipe describes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MapperPlan {
    pub parameters: u64,
    /// KV heads of the sources, all layers.
    pub inputs: usize,
    /// KV heads of the target, all layers.
    pub outputs: usize,
    /// Of one position through the mapper, forward.
    pub flops_per_token: f64,
    /// Mapper over target prefill at the longest window: what it adds to serving.
    pub share_of_prefill: f64,
}

/// A context pruned by proxy and mapper, before any question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InferPlan {
    /// Tokens of the context.
    pub tokens: usize,
    /// Device memory, one model after the other.
    pub sequential_bytes: u64,
    /// Device memory, both at once on one device.
    pub streams_bytes: u64,
    /// In sequence, weights loaded.
    pub secs: f64,
    /// The target's layers over several GPUs, in sequence; empty where one is enough.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DevicePlan>,
}

/// One stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StagePlan {
    pub stage: String,
    /// Examples written (prepare, label, extract), read per run (train) or asked about (eval).
    pub examples: u64,
    /// Context tokens that pass through the stage.
    pub tokens: u64,
    /// Bytes that it leaves on disk, before compression.
    pub disk_bytes: u64,
    /// Floating-point operations, a multiply-add being two.
    pub flops: f64,
    /// Bytes read from device memory: weights once per forward, cache once per decoded token.
    pub moved_bytes: f64,
    /// Most device memory in use at once: weights, cache, activations, batch.
    pub peak_bytes: u64,
    /// Compute time plus copy time; absent where a network or a tokenizer decides.
    pub secs: Option<f64>,
    /// Whether the machine's memory holds it, where that memory is known.
    #[serde(default)]
    pub fits: Option<bool>,
    /// Dollars, where time and price are known.
    #[serde(default)]
    pub usd: Option<f64>,
}

impl Plan {
    /// Plan `recipe` on `machine`; `pkv_eval::work` knows its `work`. The target goes over several of the
    /// machine's GPUs only if one does not hold it.
    pub fn new(recipe: &Recipe, machine: Machine, work: &Work) -> Self {
        Self::over(recipe, machine, work, None)
    }

    /// As [`Plan::new`], the target over as many devices as `over` says.
    pub fn over(recipe: &Recipe, machine: Machine, work: &Work, over: Option<usize>) -> Self {
        let lengths = Lengths::of(recipe);
        let mapper_cost = MapperCost::new(recipe);
        let longest = lengths.longest();
        let target_prefill = prefill(&recipe.target.shape, longest);
        let mapper = MapperPlan {
            parameters: mapper_cost.parameters(),
            inputs: mapper_cost.heads(),
            outputs: recipe.target.shape.total_kv_heads(),
            flops_per_token: mapper_cost.forward_flops(longest) / longest as f64,
            share_of_prefill: mapper_cost.forward_flops(longest) / target_prefill,
        };
        let memory = TargetMemory::of_label(recipe, longest, &machine, work.scorer);
        let layers = memory.split(&machine, over);
        let chunks = label_chunks(recipe, longest, &machine, work.scorer);
        let over_more = memory.over_more(&machine).filter(|_| layers.is_none());
        let split = layers.as_ref().map(|split| memory.plan(split, &machine, chunks));
        let stages = vec![
            fetch(recipe),
            prepare(&lengths),
            label(recipe, &lengths, &machine, work.scorer, layers.as_ref()),
            extract(recipe, &lengths, &machine, layers.as_ref()),
            train(recipe, &lengths, &machine, &mapper_cost),
            eval(recipe, &machine, &mapper_cost, work, layers.as_ref()),
        ];
        let target = model_plan(&recipe.target, &machine);
        let proxy = recipe.read_proxy().map(|proxy| model_plan(proxy, &machine));
        let infer = infer(recipe, longest, &machine, &mapper_cost, over);
        let notes = target_reads(recipe).into_iter().chain(features_made_anew(recipe, &lengths)).collect();
        let train_steps = recipe.train.steps_in_words();
        let name = recipe.name.clone();
        let workers = Vec::new();
        Self {
            name,
            machine,
            target,
            proxy,
            mapper,
            train_steps,
            split,
            over_more,
            stages,
            infer,
            workers,
            notes,
        }
        .with_verdicts()
    }

    /// Whether each stage fits, and what it costs.
    fn with_verdicts(mut self) -> Self {
        let Machine { memory_bytes, usd_per_hour, .. } = self.machine;
        for stage in &mut self.stages {
            let memory = memory_bytes.filter(|_| stage.peak_bytes > 0);
            stage.fits = memory.map(|memory| stage.peak_bytes <= memory);
            stage.usd = stage.secs.zip(usd_per_hour).map(|(secs, usd)| secs / 3600.0 * usd);
        }
        self
    }

    /// Dollars of all stages, if the machine's price is known.
    pub fn usd(&self) -> Option<f64> {
        self.machine.usd_per_hour.map(|usd| self.secs() / 3600.0 * usd)
    }

    pub fn stage(&self, name: &str) -> Option<&StagePlan> {
        self.stages.iter().find(|s| s.stage == name)
    }

    /// Bytes that a run leaves in its folder, models and downloads left out.
    pub fn run_bytes(&self) -> u64 {
        self.stages.iter().filter(|s| s.stage != "fetch").map(|s| s.disk_bytes).sum()
    }

    /// Largest of the stages' device memory.
    pub fn peak_bytes(&self) -> u64 {
        self.stages.iter().map(|s| s.peak_bytes).max().unwrap_or(0)
    }

    /// Seconds of all stages whose time is known.
    pub fn secs(&self) -> f64 {
        self.stages.iter().filter_map(|s| s.secs).sum()
    }
}

fn model_plan(section: &ModelSection, machine: &Machine) -> ModelPlan {
    let bytes = element_bytes(section.dtype, machine);
    ModelPlan {
        model: section.model.clone(),
        parameters: parameters(section),
        weight_bytes: parameters(section) * bytes,
        cache_bytes_per_token: section.shape.kv_elements_per_token() as u64 * bytes,
    }
}

fn parameters(section: &ModelSection) -> u64 {
    let s = &section.shape;
    (s.matrix_parameters() + 2 * s.vocab * s.hidden) as u64
}

fn element_bytes(dtype: DtypeName, machine: &Machine) -> u64 {
    match dtype {
        DtypeName::Bf16 => 2,
        DtypeName::F32 => 4,
        DtypeName::Auto => 2 + 2 * u64::from(machine.cpu),
    }
}

impl StagePlan {
    fn nothing(stage: &str) -> Self {
        Self {
            stage: stage.to_owned(),
            examples: 0,
            tokens: 0,
            disk_bytes: 0,
            flops: 0.0,
            moved_bytes: 0.0,
            peak_bytes: 0,
            secs: None,
            fits: None,
            usd: None,
        }
    }

    fn timed(mut self, machine: &Machine, efficiency: f64) -> Self {
        self.secs = Some(machine.secs(self.flops, efficiency, self.moved_bytes));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn recipe(overrides: &[&str]) -> Recipe {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pair.toml");
        std::fs::write(
            &path,
            r#"
name = "llama"
[target]
model = "meta-llama/Llama-3.1-8B-Instruct"
[target.shape]
layers = 32
kv_heads = 8
query_heads = 32
head_dim = 128
hidden = 4096
intermediate = 14336
vocab = 128256
[proxy]
model = "meta-llama/Llama-3.2-1B-Instruct"
[proxy.shape]
layers = 16
kv_heads = 8
query_heads = 32
head_dim = 64
hidden = 2048
intermediate = 8192
vocab = 128256
[data]
manifest = "long.toml"
train = 1000
validation = 50
test = 50
window_tokens = [2048, 8192]
"#,
        )
        .unwrap();
        let overrides: Vec<_> = overrides.iter().map(|&s| s.into()).collect();
        crate::load(&path, &overrides).unwrap()
    }

    #[test]
    fn bytes_and_tokens_follow_from_the_shapes() {
        let plan = Plan::new(&recipe(&[]), Machine::h200(), &Work::default());
        let tokens = 1100 / 2 * (2048 + 8192);
        assert_eq!(plan.stage("prepare").unwrap().tokens, tokens);
        assert_eq!(plan.stage("label").unwrap().disk_bytes, tokens * 256 * 2);
        assert_eq!(plan.stage("extract").unwrap().disk_bytes, tokens * (128 * 8 + 4) * 2);
        assert_eq!(plan.target.cache_bytes_per_token, 131_072);
        // 8.03 G parameters, no more than the untied embeddings.
        assert!((plan.target.parameters as f64 / 8.03e9 - 1.0).abs() < 0.01);
        assert_eq!(plan.stage("train").unwrap().examples, 1500 * 16);
        assert!(plan.table().contains("train   steps: 1500\n"));
        let auto = Plan::new(
            &recipe(&["train.steps=auto", "train.max_steps=700"]),
            Machine::h200(),
            &Work::default(),
        );
        assert_eq!(auto.stage("train").unwrap().examples, 700 * 16);
        assert!(auto.table().contains("train   steps: auto, at most 700\n"), "{}", auto.table());
    }

    #[test]
    fn the_memory_of_labels_is_near_the_one_measured() {
        // kvpress at 8k on an H200 peaks at 18.7 GB, its eager score block included.
        let plan = Plan::new(&recipe(&["data.window_tokens=[8192]"]), Machine::h200(), &Work::default());
        let peak = plan.stage("label").unwrap().peak_bytes as f64;
        assert!((peak / 18.7e9 - 1.0).abs() < 0.15, "{peak}");
    }

    #[test]
    fn a_card_is_slower_than_an_h200_and_may_be_too_small() {
        let plan = |machine| Plan::new(&recipe(&["data.window_tokens=[8192]"]), machine, &Work::default());
        let h200 = plan(Machine::h200());
        for name in ["h100", "a100", "l40s", "rtx4090"] {
            let card = plan(Machine::card(name).unwrap());
            assert!(card.secs() > h200.secs(), "{name}");
            assert_eq!(card.run_bytes(), h200.run_bytes(), "{name}");
        }
        let small = Machine { memory_bytes: Some(16_000_000_000), ..Machine::card("l40s").unwrap() };
        assert!(plan(small).table().contains("Stage `label` needs "));
        assert!(Machine::card("abacus").is_none());
    }

    #[test]
    fn each_stage_has_a_verdict_and_a_price_where_they_are_known() {
        let recipe = recipe(&["data.window_tokens=[8192]"]);
        let priced = Machine { usd_per_hour: Some(3.0), ..Machine::card("rtx4090").unwrap() };
        let small =
            Plan::new(&recipe, Machine { memory_bytes: Some(16_000_000_000), ..priced }, &Work::default());
        let fits = |name: &str| small.stage(name).unwrap().fits;
        assert_eq!((fits("fetch"), fits("label"), fits("extract")), (None, Some(false), Some(true)));
        let row = |text: &str, name: &str| {
            text.lines().find(|l| l.trim_start().starts_with(name)).unwrap().to_owned()
        };
        let text = small.table();
        assert!(row(&text, "stage").contains("fits") && row(&text, "stage").ends_with("cost"), "{text}");
        assert!(row(&text, "label ").contains(" no ") && row(&text, "extract").contains(" yes "), "{text}");
        let total: f64 = small.stages.iter().filter_map(|s| s.usd).sum();
        assert!((small.usd().unwrap() / total - 1.0).abs() < 1e-9);
        assert!(row(&text, "run ").ends_with(&table::dollars(total)), "{text}");
        assert!(text.contains("16.0 GB"), "{text}");
        // Neither memory nor price.
        let text = Plan::new(&recipe, Machine::cpu(2), &Work::default()).table();
        assert!(!text.contains("fits") && !text.contains("cost"), "{text}");
        assert!(text.lines().all(|line| line.len() <= 140), "{text}");
    }

    /// `bench prefill` on an H100, bf16: peak memory in GB in sequence and on streams, seconds in sequence.
    #[test]
    fn inference_is_near_what_was_measured() {
        for (tokens, sequential, streams, secs) in [
            (8192, 20.9, 21.8, 0.27),
            (32_768, 27.5, 29.9, 1.55),
            (131_072, 40.3, 46.3, 13.5),
            (170_000, 46.3, 53.7, 21.7),
        ] {
            let windows = format!("data.window_tokens=[{tokens}]");
            let infer =
                Plan::new(&recipe(&[&windows, "data.train=1"]), Machine::h200(), &Work::default()).infer;
            assert_eq!(infer.tokens, tokens);
            for (planned, measured, off) in [
                (infer.sequential_bytes as f64 / 1e9, sequential, 0.1),
                (infer.streams_bytes as f64 / 1e9, streams, 0.1),
                (infer.secs, secs, 0.25),
            ] {
                assert!(
                    (planned / measured - 1.0).abs() < off,
                    "{tokens}: {planned:.2}, measured {measured}"
                );
            }
        }
    }

    #[test]
    fn choices_that_cost_more_are_planned_as_more() {
        let base = Plan::new(&recipe(&[]), Machine::h200(), &Work::default());
        let stage = |plan: &Plan, name: &str| plan.stage(name).unwrap().clone();
        let recon =
            Plan::new(&recipe(&["extract.channels=[\"recon_log\"]"]), Machine::h200(), &Work::default());
        assert!(stage(&recon, "extract").flops > 1.5 * stage(&base, "extract").flops);
        let conv = Plan::new(&recipe(&["mapper.variant=conv"]), Machine::h200(), &Work::default());
        assert!(conv.mapper.flops_per_token < base.mapper.flops_per_token);
        assert!(stage(&conv, "train").peak_bytes < stage(&base, "train").peak_bytes);
        let cpu = Plan::new(&recipe(&[]), Machine::cpu(2), &Work::default());
        assert_eq!(cpu.target.weight_bytes, 2 * base.target.weight_bytes);
        assert!(cpu.secs() > 100.0 * base.secs());
        assert_eq!(stage(&base, "eval").flops, 0.0, "no task, no cost");
        let last = ScorerWork { repeats: false, value_norms: false, read_again: 32 };
        let work = Work { scorer: last, tasks: Vec::new() };
        let read_once = Plan::new(&recipe(&[]), Machine::h200(), &work);
        let (less, more) = (stage(&read_once, "label"), stage(&base, "label"));
        // Most of KVzip's labels is the repeat.
        assert!(less.flops < 0.6 * more.flops && less.peak_bytes < more.peak_bytes);
        assert_eq!((less.tokens, less.disk_bytes), (more.tokens, more.disk_bytes));
    }

    #[test]
    fn labels_bring_the_features_of_the_target_along() {
        let stage = |plan: &Plan, name: &str| plan.stage(name).unwrap().clone();
        let plan = |set: &[&str]| {
            let from = ["extract.from=[\"target\"]"];
            Plan::new(&recipe(&[&from[..], set].concat()), Machine::h200(), &Work::default())
        };
        let together = plan(&[]);
        let apart = plan(&["label.prefill_chunk_tokens=512"]);
        assert_eq!((stage(&together, "extract").flops, stage(&together, "extract").disk_bytes), (0.0, 0));
        assert!(stage(&apart, "extract").disk_bytes > 0);
        assert_eq!(together.run_bytes(), apart.run_bytes(), "the same is left on disk");
        let flops = |plan: &Plan| plan.stages.iter().map(|s| s.flops).sum::<f64>();
        // One prefill of 8B parameters for 1100 contexts of 5,120 tokens.
        assert!(flops(&apart) - flops(&together) > 2.0 * 7e9 * 1100.0 * 5120.0);
        assert!(together.table().contains("nothing left to make"), "{}", together.table());
        assert!(apart.table().contains("chunks of different lengths"), "{}", apart.table());
        // Longer chunks than any context are all the same.
        assert_eq!(plan(&["label.prefill_chunk_tokens=16384"]).notes, together.notes);
        let fitted = plan(&["extract.target_channels=[\"key_norm\", \"hidden_linear\"]"]);
        assert!(fitted.table().contains("fitted to the labels"), "{}", fitted.table());
        assert!(stage(&fitted, "extract").disk_bytes > 0);
    }

    #[test]
    fn a_recipe_of_one_model_is_planned_with_one() {
        // It has a `[proxy]`, which it does not read.
        let alone = recipe(&["extract.from=[\"target\"]"]);
        let plan = Plan::new(&alone, Machine::h200(), &Work::default());
        assert_eq!(plan.proxy, None);
        assert_eq!(plan, Plan::new(&Recipe { proxy: None, ..alone }, Machine::h200(), &Work::default()));
        assert_eq!(plan.stage("fetch").unwrap().disk_bytes, 2 * plan.target.parameters);
        assert!(!plan.table().contains("  proxy "), "{}", plan.table());
        assert!(Plan::new(&recipe(&[]), Machine::h200(), &Work::default()).table().contains("  proxy "));
    }

    #[test]
    fn features_that_are_not_kept_cost_reads_in_place_of_bytes() {
        let stage = |plan: &Plan, name: &str| plan.stage(name).unwrap().clone();
        let plan = |set: &[&str]| {
            let from = ["extract.from=[\"target\", \"proxy\"]"];
            Plan::new(&recipe(&[&from[..], set].concat()), Machine::h200(), &Work::default())
        };
        let kept = plan(&[]);
        let made = plan(&["extract.missing=generate", "extract.after_use=delete"]);
        let saved = 1100 / 2 * (2048 + 8192) * ((256 + 128) * 8 + 2 * 4) * 2;
        assert_eq!(kept.run_bytes() - made.run_bytes(), saved);
        // Batches, two passes of statistics and one of the baselines, validations, the test split.
        let section = recipe(&[]).train;
        let validations = section.most_steps().div_ceil(section.validate_every) * 50;
        let reads = 1500 * 16 + 3 * 512 + validations + 50;
        assert_eq!(stage(&made, "extract").examples, reads);
        assert!(stage(&made, "extract").flops > 10.0 * stage(&kept, "label").flops);
        assert!(stage(&made, "train").peak_bytes > stage(&kept, "train").peak_bytes + 18_000_000_000);
        let table = made.table();
        assert!(table.contains("made when they are read") && table.contains(&human_bytes(saved)), "{table}");
        assert!(!kept.table().contains("made when they are read"));
        // Kept once made: nothing else is planned.
        assert_eq!(plan(&["extract.missing=generate"]), kept);
    }

    #[test]
    fn the_table_names_every_stage_and_what_does_not_fit() {
        let small = Machine { memory_bytes: Some(1_000_000_000), ..Machine::h200() };
        let text = Plan::new(&recipe(&[]), small, &Work::default()).table();
        for stage in ["fetch", "prepare", "label", "extract", "train", "eval"] {
            assert!(text.lines().any(|l| l.trim_start().starts_with(stage)), "{text}");
        }
        assert!(text.contains("Stage `label` needs"), "{text}");
    }

    #[test]
    fn batches_of_few_contexts_are_as_long_as_their_shortest() {
        let tokens = |train: usize| {
            let train = format!("data.train={train}");
            let lengths = "data.window_tokens=[400, 700, 1000, 1400, 1800]";
            let plan = Plan::new(
                &recipe(&[lengths, &train, "train.batch=16", "train.steps=10"]),
                Machine::cpu(1),
                &Work::default(),
            );
            plan.stage("train").unwrap().tokens / 160
        };
        // One batch of all lengths; four of few; many.
        assert_eq!((tokens(24), tokens(72)), (400, 875));
        assert!((1050..=1060).contains(&tokens(8000)), "{}", tokens(8000));
        // Found by the fuzz target of recipes: 2 G contexts took a minute.
        assert!((1050..=1060).contains(&tokens(1 << 31)), "{}", tokens(1 << 31));
    }
}
