//! Tokens, bytes and operations of each stage.

use pkv_core::{GlobalChannel, LayerSplit, Pass, Source};

use super::cost::{self, MapperCost, Repeat, ScorerWork, features, prefill, repeat, scoring};
use super::split::{TargetMemory, fullest, label_chunks, of_each, pipelined, prefill_chunks};
use super::{InferPlan, Machine, StagePlan, element_bytes, human_bytes, human_count, parameters};
use crate::{ExtractSection, ModelSection, Recipe};

/// Tokens that a chat template puts around a context or a question; models differ by a few dozen.
pub const TEMPLATE_TOKENS: usize = 48;
/// Upper bound of the number of examples of each length.
pub struct Lengths(Vec<(f64, usize)>);

impl Lengths {
    /// Each document draws one of the windows, so they are equally frequent.
    pub fn of(recipe: &Recipe) -> Self {
        let data = &recipe.data;
        let mut out = Self(Vec::new());
        out.push(data.train + data.validation, &data.window_tokens);
        match data.test_window_tokens {
            Some(window) => out.push(data.test, &[window]),
            None => out.push(data.test, &data.window_tokens),
        }
        out
    }

    pub fn push(&mut self, examples: usize, windows: &[usize]) {
        let share = examples as f64 / windows.len() as f64;
        self.0.extend(windows.iter().map(|&w| (share, w)));
    }

    /// Sum over examples of `cost(length)`.
    pub fn sum(&self, cost: impl Fn(usize) -> f64) -> f64 {
        self.0.iter().map(|&(n, length)| n * cost(length)).sum()
    }

    pub fn examples(&self) -> u64 {
        self.sum(|_| 1.0).round() as u64
    }

    pub fn tokens(&self) -> u64 {
        self.sum(|t| t as f64).round() as u64
    }

    pub fn longest(&self) -> usize {
        self.0.iter().filter(|(n, _)| *n > 0.0).map(|&(_, t)| t).max().unwrap_or(1)
    }
}

/// Weights are on the hub in bf16, whatever they are computed in.
pub fn fetch(recipe: &Recipe) -> StagePlan {
    // A model that is both is fetched once.
    let proxy = recipe.read_proxy().filter(|proxy| proxy.model != recipe.target.model).map_or(0, parameters);
    let disk_bytes = 2 * (parameters(&recipe.target) + proxy);
    StagePlan { disk_bytes, ..StagePlan::nothing("fetch") }
}

/// Token ids of four bytes; names and facts are small beside them.
pub fn prepare(lengths: &Lengths) -> StagePlan {
    StagePlan {
        examples: lengths.examples(),
        tokens: lengths.tokens(),
        disk_bytes: 4 * lengths.tokens(),
        ..StagePlan::nothing("prepare")
    }
}

pub fn label(
    recipe: &Recipe,
    lengths: &Lengths,
    machine: &Machine,
    scorer: ScorerWork,
    split: Option<&LayerSplit>,
) -> StagePlan {
    let (shape, section) = (&recipe.target.shape, &recipe.label);
    let width = element_bytes(recipe.target.dtype, machine);
    let by = Repeat::new(section, TEMPLATE_TOKENS, scorer);
    let flops = lengths.sum(|t| prefill(shape, t + TEMPLATE_TOKENS) + scoring(shape, t, &by));
    let weights = parameters(&recipe.target) * width;
    let forwards = lengths.sum(|t| (t.div_ceil(section.prefill_chunk_tokens) + by.forwards(t)) as f64);
    let longest = lengths.longest();
    let new_tokens = longest.min(section.prefill_chunk_tokens.max(by.scoring_tokens(longest)));
    let cache = (longest + TEMPLATE_TOKENS + by.scoring_tokens(longest)) * shape.kv_elements_per_token();
    let peak_bytes = weights
        + cache as u64 * width
        + cost::activation_elements(shape, new_tokens) * width
        + 4 * by.score_elements(shape, longest);
    let mut stage = StagePlan {
        examples: lengths.examples(),
        tokens: lengths.tokens(),
        disk_bytes: lengths.tokens() * shape.total_kv_heads() as u64 * section.store.bytes() as u64,
        flops,
        moved_bytes: forwards * weights as f64,
        peak_bytes,
        ..StagePlan::nothing("label")
    };
    for (_, reading) in Reading::all(recipe).filter(|(source, _)| is_beside(recipe, *source)) {
        stage.disk_bytes += reading.disk_bytes(lengths);
        stage.flops += lengths.sum(|t| reading.features_flops(recipe, t));
        let working = reading.working_bytes(longest, section.prefill_chunk_tokens, section.chunk(), machine);
        stage.peak_bytes = stage.peak_bytes.max(weights + reading.cache_bytes(longest, machine) + working);
    }
    let mut stage = stage.timed(machine, machine.efficiency.label);
    if let Some(split) = split {
        let n = split.ranges().len();
        stage.peak_bytes =
            fullest(&TargetMemory::of_label(recipe, longest, machine, scorer).devices(split, None));
        // Each context by itself: the next one's first chunk may follow at once, which is not counted on.
        let work = |t: usize| prefill(shape, t + TEMPLATE_TOKENS) + scoring(shape, t, &by);
        let turns = lengths.sum(|t| work(t) * pipelined(label_chunks(recipe, t, machine, scorer), n));
        stage.secs = stage.secs.map(|secs| secs * turns / lengths.sum(work).max(1.0));
    }
    stage
}

/// Whether `label` takes the features of `source` from its own prefill.
fn is_beside(recipe: &Recipe, source: Source) -> bool {
    source == Source::Target && recipe.labels_give_features(TEMPLATE_TOKENS)
}

/// A model's reading of a context for features.
pub struct Reading<'a> {
    model: &'a ModelSection,
    section: ExtractSection,
    repeats: bool,
}

impl<'a> Reading<'a> {
    /// Of each source of the recipe, in its order.
    pub fn all(recipe: &'a Recipe) -> impl Iterator<Item = (Source, Self)> {
        recipe.extract.from.iter().filter_map(|&source| {
            let (model, section) = (recipe.model_of(source)?, recipe.extract.of(source));
            Some((source, Self { model, section, repeats: recipe.extract.repeats(source) }))
        })
    }

    /// Numbers of a position.
    fn per_token(&self) -> usize {
        self.model.shape.total_kv_heads() * self.section.channels.len() + self.section.globals.len()
    }

    fn disk_bytes(&self, lengths: &Lengths) -> u64 {
        lengths.tokens() * self.per_token() as u64 * self.section.store.bytes() as u64
    }

    pub fn weights(&self, machine: &Machine) -> u64 {
        parameters(self.model) * element_bytes(self.model.dtype, machine)
    }

    /// Operations that a prefill is extended by.
    fn features_flops(&self, recipe: &Recipe, t: usize) -> f64 {
        // Of features, KVzip's repeat whatever the labels are.
        let by = Repeat::new(&recipe.label, TEMPLATE_TOKENS, ScorerWork::REPEAT);
        let repeats = if self.repeats { repeat(&self.model.shape, t, &by) } else { 0.0 };
        features(&self.model.shape, &self.section, t, &by) + repeats
    }

    pub fn flops(&self, recipe: &Recipe, t: usize) -> f64 {
        prefill(&self.model.shape, t + TEMPLATE_TOKENS) + self.features_flops(recipe, t)
    }

    /// Memory beside the weights and the cache, `chunk` tokens at a time, `scoring` tokens in a scoring
    /// chunk: activations and features.
    fn working_bytes(&self, context: usize, chunk: usize, scoring: usize, machine: &Machine) -> u64 {
        let width = element_bytes(self.model.dtype, machine);
        let (shape, section) = (&self.model.shape, &self.section);
        let whole_range = section.channels.iter().any(|c| c.is_whole_range());
        // What a block's queries see at once. The kernels of a GPU hold none of it.
        let seen = match (machine.cpu, whole_range) {
            (false, _) => 0,
            (true, true) => context,
            (true, false) => section.block_tokens + section.window_tokens,
        };
        let logits = section.globals.contains(&GlobalChannel::Surprisal);
        // A block's attention, and its logits, in f32 with one temporary of the same size.
        let block = 2
            * section.block_tokens.min(context)
            * (shape.query_heads * seen + usize::from(logits) * shape.vocab);
        // Queries of a scoring chunk wait for its end, which a prefill chunk may cut off.
        let waits = context > chunk && section.channels.iter().any(|c| c.pass() == Pass::ScoringChunk);
        let waiting = if waits { scoring * shape.layers * shape.query_heads * shape.head_dim } else { 0 };
        (cost::activation_elements(shape, context.min(chunk)) + waiting as u64) * width
            + 4 * (block + context * self.per_token()) as u64
    }

    /// Memory while a context of `longest` tokens is read.
    fn peak_bytes(&self, recipe: &Recipe, longest: usize, machine: &Machine) -> u64 {
        let (chunk, scoring) = (recipe.extract.prefill_chunk_tokens, recipe.label.chunk());
        self.weights(machine)
            + self.cache_bytes(longest, machine)
            + self.working_bytes(longest, chunk, scoring, machine)
    }

    /// The same of the fullest device, where layers are laid over several.
    fn split_bytes(&self, recipe: &Recipe, longest: usize, machine: &Machine, split: &LayerSplit) -> u64 {
        let (chunk, scoring) = (recipe.extract.prefill_chunk_tokens, recipe.label.chunk());
        let shape = self.model.shape;
        let gathered = (shape.kv_heads * self.section.channels.len() * longest) as u64;
        let all = 4 * gathered * shape.layers as u64;
        let working = self.working_bytes(longest, chunk, scoring, machine).saturating_sub(all);
        let memory =
            TargetMemory::at_rest(shape, element_bytes(self.model.dtype, machine), longest + TEMPLATE_TOKENS);
        fullest(&memory.working(working).gathering(gathered).devices(split, None))
    }

    fn cache_bytes(&self, context: usize, machine: &Machine) -> u64 {
        (context * self.model.shape.kv_elements_per_token()) as u64 * element_bytes(self.model.dtype, machine)
    }
}

/// Contexts that a model reads for features: each once, or, where features are not kept, whenever they are
/// read.
///
/// What fits into `train.cache_gb` or is kept between validations is read once all the same: this is the
/// most.
fn feature_reads(recipe: &Recipe, lengths: &Lengths) -> Lengths {
    /// Training contexts of a pass of statistics, and of the baselines of `eval`, at most.
    const SAMPLE: usize = 512;
    if !recipe.extract.is_transient() {
        return Lengths(lengths.0.clone());
    }
    let (data, section) = (&recipe.data, &recipe.train);
    let steps = section.most_steps();
    let validations = steps.div_ceil(section.validate_every) as usize * data.validation;
    // Statistics, the ridge solution, the baselines.
    let samples = 3 * data.train.min(SAMPLE);
    let mut out = Lengths(Vec::new());
    out.push(steps as usize * section.batch + samples + validations, &data.window_tokens);
    let test = data.test_window_tokens.map(|window| vec![window]);
    out.push(data.test, test.as_ref().unwrap_or(&data.window_tokens));
    out
}

/// Cost of not storing features, in words.
pub fn features_made_anew(recipe: &Recipe, lengths: &Lengths) -> Option<String> {
    recipe.extract.is_transient().then(|| {
        let saved: u64 = Reading::all(recipe).map(|(_, reading)| reading.disk_bytes(lengths)).sum();
        format!(
            "Features are made when they are read and not stored: at most {} contexts are read for each source in place of \
             {}, and up to {} less are on disk. A context that fits into `train.cache_gb` is read once.",
            human_count(feature_reads(recipe, lengths).examples()),
            human_count(lengths.examples()),
            human_bytes(saved)
        )
    })
}

pub fn extract(
    recipe: &Recipe,
    examples: &Lengths,
    machine: &Machine,
    split: Option<&LayerSplit>,
) -> StagePlan {
    let mut stage = StagePlan::nothing("extract");
    let lengths = &feature_reads(recipe, examples);
    for (source, reading) in Reading::all(recipe).filter(|(source, _)| !is_beside(recipe, *source)) {
        stage.examples = lengths.examples();
        let weights = reading.weights(machine);
        let peak = match split.filter(|_| source == Source::Target) {
            Some(split) => reading.split_bytes(recipe, lengths.longest(), machine, split),
            None => reading.peak_bytes(recipe, lengths.longest(), machine),
        };
        stage.tokens += lengths.tokens();
        if !recipe.extract.is_transient() {
            stage.disk_bytes += reading.disk_bytes(lengths);
        }
        stage.flops += lengths.sum(|t| reading.flops(recipe, t));
        stage.moved_bytes += lengths.examples() as f64 * weights as f64;
        stage.peak_bytes = stage.peak_bytes.max(peak);
    }
    // Nothing is left to time where labels bring all features along.
    if stage.examples == 0 { stage } else { stage.timed(machine, machine.efficiency.extract) }
}

/// Number of times that the target reads an example, in words, if its features are needed.
pub fn target_reads(recipe: &Recipe) -> Option<String> {
    let extract = &recipe.extract;
    if !extract.from.contains(&Source::Target) || extract.is_transient() {
        return None;
    }
    Some(if is_beside(recipe, Source::Target) {
        let left = if extract.from.contains(&Source::Proxy) { "those of the proxy" } else { "nothing" };
        format!(
            "`label` takes the target's features from its own prefill; `extract` has {left} left to make."
        )
    } else if extract.is_fitted(Source::Target) {
        "`hidden_linear` is fitted to the labels: `extract` makes the target read every example once more."
            .to_owned()
    } else {
        "`label` and `extract` prefill in chunks of different lengths: the target reads every example in both.".to_owned()
    })
}

/// Most tokens that a proxy prefills at a time beside its target on one device: of a 1B model at 32,768
/// tokens this spares 0.8 GB.
pub const SHARED_CHUNK: usize = 16_384;

/// A context of `tokens` tokens to the target's pruned cache.
/// `over` as in [`super::Plan::over`].
pub fn infer(
    recipe: &Recipe,
    tokens: usize,
    machine: &Machine,
    mapper: &MapperCost,
    over: Option<usize>,
) -> InferPlan {
    let target = &recipe.target.shape;
    let width = element_bytes(recipe.target.dtype, machine);
    let mut weights = parameters(&recipe.target) * width;
    let mut alone = (tokens + TEMPLATE_TOKENS) as u64 * target.kv_elements_per_token() as u64 * width
        + cost::activation_elements(target, tokens.min(recipe.label.prefill_chunk_tokens)) * width;
    let chunk = recipe.extract.prefill_chunk_tokens;
    let mut flops = prefill(target, tokens + TEMPLATE_TOKENS) + mapper.forward_flops(tokens);
    let (mut before, mut beside) = (0, 0);
    for (source, reading) in Reading::all(recipe) {
        match source {
            // It rides on the target's only prefill.
            Source::Target => {
                flops += reading.features_flops(recipe, tokens);
                alone += 4 * (tokens * reading.per_token()) as u64;
            }
            Source::Proxy => {
                weights += reading.weights(machine);
                flops += reading.flops(recipe, tokens);
                let bytes = |chunk| {
                    reading.cache_bytes(tokens, machine)
                        + reading.working_bytes(tokens, chunk, recipe.label.chunk(), machine)
                };
                (before, beside) = (bytes(chunk), bytes(chunk.min(SHARED_CHUNK)));
            }
        }
    }
    let secs = machine.secs(flops, machine.efficiency.label, weights as f64);
    let memory = TargetMemory::of_infer(recipe, tokens, machine);
    let Some(split) = memory.split(machine, over) else {
        let (sequential_bytes, streams_bytes) = (weights + alone.max(before), weights + alone + beside);
        return InferPlan { tokens, sequential_bytes, streams_bytes, secs, devices: Vec::new() };
    };
    let chunks = prefill_chunks(tokens + TEMPLATE_TOKENS, recipe.label.prefill_chunk_tokens);
    // The target's prefill is all that passes through the devices.
    let share = prefill(target, tokens + TEMPLATE_TOKENS) / flops;
    let devices = memory.devices(&split, of_each(machine));
    InferPlan {
        tokens,
        sequential_bytes: fullest(&devices),
        streams_bytes: fullest(&memory.more_beside(beside).devices(&split, None)),
        secs: secs * (1.0 - share + share * pipelined(chunks, split.ranges().len())),
        devices,
    }
}

/// Most elements of one logits tensor in stage 3 of the mapper; longer contexts go piece by piece. Four
/// tensors of this size live at once: 1 GB in f32, and each is work enough to fill a GPU.
pub const PIECE_ELEMENTS: u64 = 1 << 26;

/// Most batches that are looked at; more of them differ by less than a plan shows.
const MOST_BATCHES: u128 = 1 << 12;

/// Lengths of the batches of one pass over the training contexts: each is as long as its shortest context.
fn batch_lengths(recipe: &Recipe) -> Vec<usize> {
    let (data, limit) = (&recipe.data, recipe.train.window_tokens.unwrap_or(usize::MAX));
    let (contexts, windows) = (data.train.max(1), data.window_tokens.len());
    let drawn = |(i, &t): (usize, &usize)| {
        let n = contexts / windows + usize::from(i < contexts % windows);
        (t.min(limit), n as u128 * (t / t.min(limit)) as u128)
    };
    let mut lengths: Vec<(usize, u128)> = data.window_tokens.iter().enumerate().map(drawn).collect();
    lengths.sort_unstable();
    let total: u128 = lengths.iter().map(|&(_, n)| n).sum();
    let batches = (total / recipe.train.batch.max(1) as u128).clamp(1, MOST_BATCHES);
    let mut end = 0;
    for (_, n) in &mut lengths {
        end += *n;
        *n = end;
    }
    let of = |batch| lengths[lengths.partition_point(|&(_, end)| end <= batch * total / batches)].0;
    (0..batches).map(of).collect()
}

/// Forward and backward are three forwards; parameters, gradients and both moments are f32. Steps that are
/// `auto` count as their most.
pub fn train(recipe: &Recipe, lengths: &Lengths, machine: &Machine, mapper: &MapperCost) -> StagePlan {
    let (data, section) = (&recipe.data, &recipe.train);
    let batches = batch_lengths(recipe);
    let contexts = section.most_steps() as f64 * section.batch as f64;
    let mean = |cost: &dyn Fn(usize) -> f64, of: &[usize]| {
        of.iter().map(|&t| cost(t)).sum::<f64>() / of.len() as f64
    };
    let tokens = contexts * mean(&|t| t as f64, &batches);
    let forward = |t| mapper.forward_flops(t);
    // Validation is a forward over its split every `validate_every` steps; 1/3 of a training example.
    let validations = (section.most_steps() / section.validate_every) as f64 * data.validation as f64;
    let values_per_token = (mapper.inputs_per_token() + mapper.outputs_per_token()) as f64;
    let kept = (section.keep_checkpoints + 2) as u64;
    let longest = lengths.longest();
    let positions = section.batch as f64 * longest as f64;
    let attended = mapper.attended_per_token(recipe);
    // Stage 3 goes piece by piece: four tensors, each weights or readings of a piece.
    let piece = (positions * attended / 2.0).min(PIECE_ELEMENTS as f64);
    let batch_elements = positions * (values_per_token + mapper.saved_per_token(recipe)) + 4.0 * piece;
    // Models that make features are in memory beside the mapper, all of them.
    let beside: u64 = Reading::all(recipe)
        .filter(|_| recipe.extract.is_transient())
        .map(|(_, reading)| reading.peak_bytes(recipe, longest, machine))
        .sum();
    let stage = StagePlan {
        examples: contexts.round() as u64,
        tokens: tokens.round() as u64,
        disk_bytes: kept * 12 * mapper.parameters(),
        flops: 3.0 * contexts * mean(&forward, &batches) + validations * mean(&forward, &data.window_tokens),
        // Activations are written and read once each way, which bounds small mappers.
        moved_bytes: tokens
            * 4.0
            * (3.0 * values_per_token + 4.0 * (mapper.saved_per_token(recipe) + attended)),
        peak_bytes: 16 * mapper.parameters() + (4.0 * batch_elements) as u64 + beside,
        ..StagePlan::nothing("train")
    };
    stage.timed(machine, machine.efficiency.train)
}
