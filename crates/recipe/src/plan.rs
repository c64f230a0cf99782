//! What a run will cost, from the recipe alone: nothing is downloaded, opened or measured.
//!
//! Counts of tokens, bytes and floating-point operations follow from the shapes that the recipe
//! states; seconds follow from a [`Machine`], whose factors are measured where `machine` says so
//! and guesses elsewhere. A plan is an upper bound on tokens (documents may be shorter than their
//! window) and on bytes (shards compress); it is a forecast of time, good to a factor of about two.

mod cost;
mod human;
mod machine;
mod table;

use pkv_core::GlobalChannel;
use serde::{Deserialize, Serialize};

use crate::{DtypeName, Method, ModelSection, Recipe, Task};
use cost::{Decode, MapperCost, Repeat, decode, features, prefill, repeat};

pub use human::{human_bytes, human_count, human_flops, human_secs};
pub use machine::{Efficiency, Machine};

/// Tokens that a chat template puts around a context or a question; models differ by a few dozen.
const TEMPLATE_TOKENS: usize = 48;
/// Tokens of a question about a planted fact.
const QUESTION_TOKENS: usize = 24;

/// The cost of every stage of a recipe on one machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub name: String,
    pub machine: Machine,
    pub target: ModelPlan,
    pub proxy: ModelPlan,
    pub mapper: MapperPlan,
    /// In the order they run.
    pub stages: Vec<StagePlan>,
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
    /// KV heads of the proxy, all layers.
    pub inputs: usize,
    /// KV heads of the target, all layers.
    pub outputs: usize,
    /// Of one position through the mapper, forward.
    pub flops_per_token: f64,
    /// Mapper over target prefill at the longest window: what it adds to serving.
    pub share_of_prefill: f64,
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
}

impl Plan {
    /// Plan `recipe` on `machine`.
    pub fn new(recipe: &Recipe, machine: Machine) -> Self {
        let lengths = Lengths::of(recipe);
        let mapper_cost = MapperCost::new(recipe);
        let longest = lengths.longest();
        let target_prefill = prefill(&recipe.target.shape, longest);
        let mapper = MapperPlan {
            parameters: mapper_cost.parameters(),
            inputs: recipe.proxy.shape.total_kv_heads(),
            outputs: recipe.target.shape.total_kv_heads(),
            flops_per_token: mapper_cost.forward_flops(longest) / longest as f64,
            share_of_prefill: mapper_cost.forward_flops(longest) / target_prefill,
        };
        let stages = vec![
            fetch(recipe),
            prepare(&lengths),
            label(recipe, &lengths, &machine),
            extract(recipe, &lengths, &machine),
            train(recipe, &lengths, &machine, &mapper_cost),
            eval(recipe, &machine, &mapper_cost),
        ];
        let target = model_plan(&recipe.target, &machine);
        let proxy = model_plan(&recipe.proxy, &machine);
        Self { name: recipe.name.clone(), machine, target, proxy, mapper, stages }
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

/// How many examples there are of which length, at most.
struct Lengths(Vec<(f64, usize)>);

impl Lengths {
    /// Each document draws one of the windows, so they are equally frequent.
    fn of(recipe: &Recipe) -> Self {
        let data = &recipe.data;
        let mut out = Self(Vec::new());
        out.push(data.train + data.validation, &data.window_tokens);
        match data.test_window_tokens {
            Some(window) => out.push(data.test, &[window]),
            None => out.push(data.test, &data.window_tokens),
        }
        out
    }

    fn push(&mut self, examples: usize, windows: &[usize]) {
        let share = examples as f64 / windows.len() as f64;
        self.0.extend(windows.iter().map(|&w| (share, w)));
    }

    /// Sum over examples of `cost(length)`.
    fn sum(&self, cost: impl Fn(usize) -> f64) -> f64 {
        self.0.iter().map(|&(n, length)| n * cost(length)).sum()
    }

    fn examples(&self) -> u64 {
        self.sum(|_| 1.0).round() as u64
    }

    fn tokens(&self) -> u64 {
        self.sum(|t| t as f64).round() as u64
    }

    fn longest(&self) -> usize {
        self.0.iter().filter(|(n, _)| *n > 0.0).map(|&(_, t)| t).max().unwrap_or(1)
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

/// Weights are on the hub in bf16, whatever they are computed in.
fn fetch(recipe: &Recipe) -> StagePlan {
    let disk_bytes = 2 * (parameters(&recipe.target) + parameters(&recipe.proxy));
    StagePlan { disk_bytes, ..StagePlan::nothing("fetch") }
}

/// Token ids of four bytes; names and facts are small beside them.
fn prepare(lengths: &Lengths) -> StagePlan {
    StagePlan {
        examples: lengths.examples(),
        tokens: lengths.tokens(),
        disk_bytes: 4 * lengths.tokens(),
        ..StagePlan::nothing("prepare")
    }
}

fn label(recipe: &Recipe, lengths: &Lengths, machine: &Machine) -> StagePlan {
    let (shape, section) = (&recipe.target.shape, &recipe.label);
    let width = element_bytes(recipe.target.dtype, machine);
    let chunk = Repeat::new(section, TEMPLATE_TOKENS);
    let flops = lengths.sum(|t| prefill(shape, t + TEMPLATE_TOKENS) + repeat(shape, t, &chunk));
    let weights = parameters(&recipe.target) * width;
    let forwards =
        lengths.sum(|t| (t.div_ceil(section.prefill_chunk_tokens) + t.div_ceil(chunk.tokens)) as f64);
    let longest = lengths.longest();
    let new_tokens = longest.min(section.prefill_chunk_tokens.max(chunk.new_tokens(longest)));
    let cache = (longest + TEMPLATE_TOKENS + chunk.new_tokens(longest)) * shape.kv_elements_per_token();
    let peak_bytes = weights
        + cache as u64 * width
        + cost::activation_elements(shape, new_tokens) * width
        + 4 * chunk.score_elements(shape, longest);
    let stage = StagePlan {
        examples: lengths.examples(),
        tokens: lengths.tokens(),
        disk_bytes: lengths.tokens() * shape.total_kv_heads() as u64 * section.store.bytes() as u64,
        flops,
        moved_bytes: forwards * weights as f64,
        peak_bytes,
        ..StagePlan::nothing("label")
    };
    stage.timed(machine, machine.efficiency.label)
}

fn extract(recipe: &Recipe, lengths: &Lengths, machine: &Machine) -> StagePlan {
    let (shape, section) = (&recipe.proxy.shape, &recipe.extract);
    let width = element_bytes(recipe.proxy.dtype, machine);
    let reconstruction = section.channels.iter().any(|c| c.is_reconstruction());
    let chunk = Repeat::new(&recipe.label, TEMPLATE_TOKENS);
    let flops = lengths.sum(|t| {
        let repeat = if reconstruction { repeat(shape, t, &chunk) } else { 0.0 };
        prefill(shape, t + TEMPLATE_TOKENS) + features(shape, section, t) + repeat
    });
    let weights = parameters(&recipe.proxy) * width;
    let per_token = shape.total_kv_heads() * section.channels.len() + section.globals.len();
    let longest = lengths.longest();
    let new_tokens = longest.min(section.prefill_chunk_tokens);
    let whole_range = section.channels.iter().any(|c| c.is_whole_range());
    let seen = if whole_range { longest } else { section.block_tokens + section.window_tokens };
    let logits = section.globals.contains(&GlobalChannel::Surprisal);
    // A block's attention, and its logits, in f32 with one temporary of the same size.
    let block = 2
        * section.block_tokens.min(longest)
        * (shape.query_heads * seen + usize::from(logits) * shape.vocab);
    let stage = StagePlan {
        examples: lengths.examples(),
        tokens: lengths.tokens(),
        disk_bytes: lengths.tokens() * per_token as u64 * section.store.bytes() as u64,
        flops,
        moved_bytes: lengths.examples() as f64 * weights as f64,
        peak_bytes: weights
            + (longest * shape.kv_elements_per_token()) as u64 * width
            + cost::activation_elements(shape, new_tokens) * width
            + 4 * (block + longest * per_token) as u64,
        ..StagePlan::nothing("extract")
    };
    stage.timed(machine, machine.efficiency.extract)
}

/// Forward and backward are three forwards; parameters, gradients and both moments are f32.
fn train(recipe: &Recipe, lengths: &Lengths, machine: &Machine, mapper: &MapperCost) -> StagePlan {
    let (data, section) = (&recipe.data, &recipe.train);
    let mut of_train = Lengths(Vec::new());
    of_train.push(data.train, &data.window_tokens);
    let contexts = section.steps as f64 * section.batch as f64;
    let passes = contexts / data.train as f64;
    // Validation is a forward over its split every `validate_every` steps; 1/3 of a training example.
    let validations = (section.steps / section.validate_every) as f64 * data.validation as f64;
    let forward = of_train.sum(|t| mapper.forward_flops(t)) / data.train as f64;
    let values_per_token = (mapper.inputs_per_token() + mapper.outputs_per_token()) as f64;
    let kept = (section.keep_checkpoints + 2) as u64;
    let longest = lengths.longest();
    let batch_elements =
        section.batch as f64 * longest as f64 * (values_per_token + mapper.saved_per_token(recipe));
    let stage = StagePlan {
        examples: contexts.round() as u64,
        tokens: (passes * of_train.sum(|t| t as f64)).round() as u64,
        disk_bytes: kept * 12 * mapper.parameters(),
        flops: (3.0 * contexts + validations) * forward,
        // Activations are written and read once each way, which bounds small mappers.
        moved_bytes: contexts * of_train.sum(|t| t as f64) / data.train as f64
            * 4.0
            * (3.0 * values_per_token + 4.0 * mapper.saved_per_token(recipe)),
        peak_bytes: 16 * mapper.parameters() + (4.0 * batch_elements) as u64,
        ..StagePlan::nothing("train")
    };
    stage.timed(machine, machine.efficiency.train)
}

fn eval(recipe: &Recipe, machine: &Machine, mapper: &MapperCost) -> StagePlan {
    let (section, shape) = (&recipe.eval, &recipe.target.shape);
    let width = element_bytes(recipe.target.dtype, machine);
    let weights = (parameters(&recipe.target) * width) as f64;
    let context = section.context_tokens;
    let masks = section.methods.len() * section.answer_ratios.len() * section.answer_policies.len() + 1;
    let facts = Decode {
        rows: masks * section.facts_per_context,
        new_tokens: QUESTION_TOKENS + TEMPLATE_TOKENS + section.max_answer_tokens,
        forwards: 1 + section.max_answer_tokens,
        context,
    };
    let continuation = Decode { rows: masks, new_tokens: section.continuation_tokens, forwards: 1, context };
    let mut stage = StagePlan::nothing("eval");
    let chunk = Repeat::new(&recipe.label, TEMPLATE_TOKENS);
    for (task, work) in [(Task::Facts, facts), (Task::Perplexity, continuation)] {
        if !section.tasks.contains(&task) {
            continue;
        }
        let n = section.contexts as f64;
        let scoring = prefill(shape, context) + repeat(shape, context, &chunk);
        let reading =
            prefill(&recipe.proxy.shape, context) + features(&recipe.proxy.shape, &recipe.extract, context);
        stage.examples += section.contexts as u64;
        stage.tokens += (section.contexts * context) as u64;
        stage.flops += n * (scoring + reading + mapper.forward_flops(context) + decode(shape, &work));
        let cache = (context * shape.kv_elements_per_token()) as f64 * width as f64;
        stage.moved_bytes += n * work.forwards as f64 * (weights + work.rows as f64 * cache);
        let own = (work.rows * work.new_tokens * shape.kv_elements_per_token()) as u64 * width;
        let scores = (Method::ALL.len() * context * shape.total_kv_heads() * 4) as u64;
        let attention = (work.rows * shape.query_heads * context * 4) as u64;
        stage.peak_bytes = stage.peak_bytes.max(weights as u64 + cache as u64 + own + scores + attention);
    }
    stage.timed(machine, machine.efficiency.answer)
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

    fn recipe(overrides: &[&str]) -> Recipe {
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
        let overrides: Vec<String> = overrides.iter().map(|&s| s.to_owned()).collect();
        crate::load(&path, &overrides).unwrap()
    }

    #[test]
    fn bytes_and_tokens_follow_from_the_shapes() {
        let plan = Plan::new(&recipe(&[]), Machine::h200());
        let tokens = 1100 / 2 * (2048 + 8192);
        assert_eq!(plan.stage("prepare").unwrap().tokens, tokens);
        assert_eq!(plan.stage("label").unwrap().disk_bytes, tokens * 256 * 2);
        assert_eq!(plan.stage("extract").unwrap().disk_bytes, tokens * (128 * 8 + 4) * 2);
        assert_eq!(plan.target.cache_bytes_per_token, 131_072);
        // 8.03 G parameters, no more than the untied embeddings.
        assert!((plan.target.parameters as f64 / 8.03e9 - 1.0).abs() < 0.01);
        assert_eq!(plan.stage("train").unwrap().examples, 1500 * 16);
    }

    #[test]
    fn the_memory_of_labels_is_near_the_one_measured() {
        // kvpress at 8k on an H200 peaks at 18.7 GB, its eager score block included.
        let plan = Plan::new(&recipe(&["data.window_tokens=[8192]"]), Machine::h200());
        let peak = plan.stage("label").unwrap().peak_bytes as f64;
        assert!((peak / 18.7e9 - 1.0).abs() < 0.15, "{peak}");
    }

    #[test]
    fn choices_that_cost_more_are_planned_as_more() {
        let base = Plan::new(&recipe(&[]), Machine::h200());
        let stage = |plan: &Plan, name: &str| plan.stage(name).unwrap().clone();
        let recon = Plan::new(&recipe(&["extract.channels=[\"recon_log\"]"]), Machine::h200());
        assert!(stage(&recon, "extract").flops > 1.5 * stage(&base, "extract").flops);
        let conv = Plan::new(&recipe(&["mapper.variant=conv"]), Machine::h200());
        assert!(conv.mapper.flops_per_token < base.mapper.flops_per_token);
        assert!(stage(&conv, "train").peak_bytes < stage(&base, "train").peak_bytes);
        let cpu = Plan::new(&recipe(&[]), Machine::cpu(2));
        assert_eq!(cpu.target.weight_bytes, 2 * base.target.weight_bytes);
        assert!(cpu.secs() > 100.0 * base.secs());
        let no_tasks = Plan::new(&recipe(&["eval.tasks=[]"]), Machine::h200());
        assert_eq!(stage(&no_tasks, "eval").flops, 0.0);
    }

    #[test]
    fn the_table_names_every_stage_and_what_does_not_fit() {
        let small = Machine { memory_bytes: Some(1_000_000_000), ..Machine::h200() };
        let text = Plan::new(&recipe(&[]), small).table();
        for stage in ["fetch", "prepare", "label", "extract", "train", "eval"] {
            assert!(text.lines().any(|l| l.trim_start().starts_with(stage)), "{text}");
        }
        assert!(text.contains("Stage `label` needs"), "{text}");
    }
}
