//! Floating-point operations and elements, from shapes. A multiply-add counts as two operations.

use pkv_core::{GlobalChannel, ModelShape, Pass, PassLengths};

use crate::{ExtractSection, LabelSection, Recipe, Variant};

/// Tokens of the request to repeat, its quoted last eight tokens included, for any tokenizer seen.
const REQUEST_TOKENS: usize = 24;

/// Prefill of `t` tokens: every layer's matrices, and causal attention (half of t x t). No LM head.
pub fn prefill(shape: &ModelShape, t: usize) -> f64 {
    let t = t as f64;
    2.0 * shape.matrix_parameters() as f64 * t + 2.0 * attention_width(shape) * t * t * shape.layers as f64
}

/// Query heads x head_dim: what one score or one weighted sum costs per (row, key), in multiply-adds.
fn attention_width(shape: &ModelShape) -> f64 {
    (shape.query_heads * shape.head_dim) as f64
}

/// What a way to score computes beside the prefill of a context: each of `pkv_score` says it of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScorerWork {
    /// The context is repeated, chunk by chunk.
    pub repeats: bool,
    /// The norm of each value after W_O is computed.
    pub value_norms: bool,
    /// Tokens at the context's end that are read once more.
    pub read_again: usize,
}

impl ScorerWork {
    /// The repeat alone, as of KVzip.
    pub const REPEAT: Self = Self { repeats: true, value_norms: false, read_again: 0 };
}

impl Default for ScorerWork {
    fn default() -> Self {
        Self::REPEAT
    }
}

/// Settings of the repeat of a context.
pub struct Repeat {
    /// Tokens per scoring chunk.
    pub tokens: usize,
    request: usize,
    sink: usize,
    scorer: ScorerWork,
}

impl Repeat {
    /// `template` is the length of prefix and switch; `scorer` is that of `section`.
    pub fn new(section: &LabelSection, template: usize, scorer: ScorerWork) -> Self {
        Self {
            tokens: section.chunk(),
            request: REQUEST_TOKENS + template / 2,
            sink: section.sink_tokens(template / 2),
            scorer,
        }
    }

    /// Forwards that scoring a context of `t` tokens takes.
    pub fn forwards(&self, t: usize) -> usize {
        if self.scorer.repeats { t.div_ceil(self.tokens) } else { usize::from(self.scorer.read_again > 0) }
    }

    /// Longest input of one forward that scores a context of `t` tokens.
    pub fn scoring_tokens(&self, t: usize) -> usize {
        if self.scorer.repeats { self.new_tokens(t) } else { self.scorer.read_again.min(t) }
    }

    /// Longest input of one repeat in a context of `t` tokens.
    pub fn new_tokens(&self, t: usize) -> usize {
        self.tokens.min(t) + self.request
    }

    /// Softmax weights of one layer and scoring chunk, if they are all held at once.
    pub fn score_elements(&self, shape: &ModelShape, t: usize) -> u64 {
        let new = self.scoring_tokens(t);
        let keys = if self.scorer.repeats { self.sink + self.tokens.min(t) + new } else { t };
        (shape.query_heads * new * keys) as u64
    }
}

/// Repeating a cached context of `t` tokens chunk by chunk: forwards on top of the cache, and the
/// score products. The last layer stops after its queries and keys.
pub fn repeat(shape: &ModelShape, t: usize, by: &Repeat) -> f64 {
    let layers = shape.layers as f64;
    let last_layer_saved = shape.matrix_parameters() as f64 / layers
        - (shape.hidden * shape.head_dim * (shape.query_heads + 2 * shape.kv_heads)) as f64;
    let matrices = shape.matrix_parameters() as f64 - last_layer_saved;
    let mut total = 0.0;
    let mut start = 0;
    while start < t {
        let chunk = by.tokens.min(t - start);
        let new = (chunk + by.request) as f64;
        let over_cache = 4.0 * attention_width(shape) * new * (t as f64 + new / 2.0) * (layers - 1.0);
        let keys = by.sink as f64 + chunk as f64 + new / 2.0;
        let scores = 2.0 * attention_width(shape) * new * keys * layers;
        total += 2.0 * matrices * new + over_cache + scores;
        start += chunk;
    }
    if by.scorer.value_norms {
        total += 2.0 * attention_width(shape) * (shape.hidden * shape.layers * t) as f64;
    }
    total
}

/// Scoring a cached context of `t` tokens: its repeat, or whatever else the scorer reads.
pub fn scoring(shape: &ModelShape, t: usize, by: &Repeat) -> f64 {
    let again = by.scorer.read_again.min(t) as f64;
    let over_cache = 4.0 * attention_width(shape) * again * t as f64 * shape.layers as f64;
    let repeated = if by.scorer.repeats { repeat(shape, t, by) } else { 0.0 };
    repeated + 2.0 * shape.matrix_parameters() as f64 * again + over_cache
}

/// Features of a prefilled model: queries times keys once more for every pass that a channel asks for, and
/// the LM head for surprisal. A repeat is not counted: see [`repeat`].
pub fn features(shape: &ModelShape, section: &ExtractSection, t: usize, by: &Repeat) -> f64 {
    let t_f = t as f64;
    let lengths = PassLengths {
        context: t,
        window: section.window_tokens + section.block_tokens,
        last_queries: section.last_queries,
        whole_range_stride: section.whole_range_stride,
        scoring_chunk: by.tokens,
    };
    let asked = |pass: &Pass| section.channels.iter().any(|c| c.pass() == *pass);
    let keys_per_position: f64 =
        Pass::ALL.into_iter().filter(asked).map(|pass| pass.keys_per_position(&lengths)).sum();
    let products = 2.0 * attention_width(shape) * keys_per_position * t_f * shape.layers as f64;
    let head = if section.globals.contains(&GlobalChannel::Surprisal) {
        2.0 * (shape.hidden * shape.vocab) as f64 * t_f
    } else {
        0.0
    };
    products + head
}

/// Elements alive in a forward of `new` tokens: residual, normed input, attention and feed-forward.
pub fn activation_elements(shape: &ModelShape, new: usize) -> u64 {
    let attention = shape.head_dim * (2 * shape.query_heads + 2 * shape.kv_heads);
    (new * (3 * shape.hidden + attention.max(3 * shape.intermediate))) as u64
}

/// Several rows of new tokens on top of one cached context.
pub struct Decode {
    pub rows: usize,
    /// Of each row: question and answer.
    pub new_tokens: usize,
    pub context: usize,
}

/// Every new token passes the matrices, the LM head and attention over the context.
pub fn decode(shape: &ModelShape, work: &Decode) -> f64 {
    let tokens = (work.rows * work.new_tokens) as f64;
    let keys = (work.context + work.new_tokens) as f64;
    let matrices = 2.0 * (shape.matrix_parameters() + shape.hidden * shape.vocab) as f64;
    tokens * (matrices + 4.0 * attention_width(shape) * keys * shape.layers as f64)
}

/// Sizes of the mapper as multiply-adds per position; biases and norms are left out.
pub struct MapperCost {
    heads: usize,
    outputs: usize,
    inputs: usize,
    /// Multiply-adds of a position that do not depend on the context's length.
    position: f64,
    /// Of a position per position attended to, and how many at most.
    attention: f64,
    attention_window: usize,
    parameters: u64,
}

impl MapperCost {
    pub fn new(recipe: &Recipe) -> Self {
        let m = &recipe.mapper;
        let layout = recipe.extract.layout();
        let (target, proxy) = recipe.shapes();
        let p = layout.heads(target, proxy);
        let o = target.total_kv_heads();
        let (c, g) = (layout.channels().len(), layout.globals());
        let inputs = p * c + g;
        let (d1, d, x, n) = (m.head_width, m.width, m.cross_width, m.cross_heads);
        let block = d * d * m.kernel + 2 * m.feed_forward * d * d;
        let blocks = m.dilations.len() * block + m.attention_blocks.len() * 4 * d * d;
        let skip = if m.linear_skip || m.variant == Variant::Linear { inputs * o } else { 0 };
        let (position, weights) = match m.variant {
            Variant::HybridAxial => {
                let stage1 = c * d1 + 2 * m.kernel * d1 * d1;
                let stage2 = (p * d1 + g) * d + blocks + d * o;
                // Queries and read-outs fold into what turns a token into logits and readings.
                let stage3 = d * d1 + (p + 1) * n * o * (2 * d1 + 1);
                let weights3 = d * d1 + (p + 1) * d1 + 2 * o * x + 2 * x * d1;
                (p * stage1 + stage2 + stage3, stage1 + p * d1 + stage2 + weights3)
            }
            Variant::Conv => {
                let all = inputs * d + blocks + d * o;
                (all, all)
            }
            Variant::Mlp => {
                let wide = d * m.feed_forward;
                let all = inputs * wide + wide * wide + wide * o;
                (all, all)
            }
            Variant::Linear => (0, 0),
        };
        let time_blocks = match m.variant {
            Variant::HybridAxial | Variant::Conv => m.attention_blocks.len(),
            Variant::Mlp | Variant::Linear => 0,
        };
        Self {
            heads: p,
            outputs: o,
            inputs,
            position: (position + skip) as f64,
            attention: (2 * d * time_blocks) as f64,
            attention_window: 2 * m.attention_window + 1,
            parameters: (weights + skip) as u64,
        }
    }

    pub fn parameters(&self) -> u64 {
        self.parameters
    }

    /// KV heads of all sources.
    pub fn heads(&self) -> usize {
        self.heads
    }

    pub fn inputs_per_token(&self) -> usize {
        self.inputs
    }

    pub fn outputs_per_token(&self) -> usize {
        self.outputs
    }

    pub fn forward_flops(&self, t: usize) -> f64 {
        let attended = t.min(self.attention_window) as f64;
        2.0 * t as f64 * (self.position + self.attention * attended)
    }

    /// Stage 3's weights and readings per position, of every (token, cross head, target head). They
    /// pass through memory in the forward and again in the backward, and are not kept.
    pub fn attended_per_token(&self, recipe: &Recipe) -> f64 {
        match recipe.mapper.variant {
            Variant::HybridAxial => (2 * (self.heads + 1) * recipe.mapper.cross_heads * self.outputs) as f64,
            _ => 0.0,
        }
    }

    /// f32 elements per position that the backward pass needs: inputs of every matrix, norm and
    /// nonlinearity, and logits and targets of each ratio of the loss.
    pub fn saved_per_token(&self, recipe: &Recipe) -> f64 {
        let (m, p, o) = (&recipe.mapper, self.heads, self.outputs);
        let blocks = m.dilations.len() * m.width * (5 + 2 * m.feed_forward);
        let loss = o * (2 + 2 * recipe.loss.binary_ratios.len());
        let network = match m.variant {
            Variant::HybridAxial => {
                let tokens = (p + 1) * m.head_width;
                10 * tokens + blocks
            }
            Variant::Conv => blocks,
            Variant::Mlp => 4 * m.width * m.feed_forward,
            Variant::Linear => 0,
        };
        (network + loss + self.inputs) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama-3.1-8B.
    const EIGHT_B: ModelShape = ModelShape {
        layers: 32,
        kv_heads: 8,
        query_heads: 32,
        head_dim: 128,
        hidden: 4096,
        intermediate: 14336,
        vocab: 128_256,
    };

    /// Context, then the seconds at 790 TFLOP/s that a count by hand gave for a prefill, and for a
    /// prefill with KVzip scoring.
    const BY_HAND: [(usize, f64, f64); 3] = [(8192, 0.17, 0.38), (32_768, 0.94, 2.3), (131_072, 8.0, 22.0)];

    #[test]
    fn labels_of_an_8b_take_the_seconds_counted_by_hand() {
        let chunk = Repeat::new(&LabelSection::default(), 48, ScorerWork::REPEAT);
        for (t, prefill_secs, label_secs) in BY_HAND {
            let p = prefill(&EIGHT_B, t) / 790e12;
            let all = p + repeat(&EIGHT_B, t, &chunk) / 790e12;
            assert!(
                (p / prefill_secs - 1.0).abs() < 0.05,
                "prefill of {t}: {p:.3} s, expected {prefill_secs}"
            );
            assert!(
                (all / label_secs - 1.0).abs() < 0.15,
                "labels of {t}: {all:.3} s, expected {label_secs}"
            );
        }
    }

    #[test]
    fn every_chunk_pays_for_its_request_and_no_context_for_nothing() {
        let by = |tokens, scorer| Repeat { tokens, request: 24, sink: 24, scorer };
        let of = |tokens| by(tokens, ScorerWork::REPEAT);
        assert_eq!(repeat(&EIGHT_B, 0, &of(2000)), 0.0);
        assert!(repeat(&EIGHT_B, 8192, &of(50)) > repeat(&EIGHT_B, 8192, &of(2000)));
        let plus = by(2000, ScorerWork { value_norms: true, ..ScorerWork::REPEAT });
        assert!(scoring(&EIGHT_B, 8192, &plus) > scoring(&EIGHT_B, 8192, &of(2000)));
        assert_eq!(scoring(&EIGHT_B, 8192, &of(2000)), repeat(&EIGHT_B, 8192, &of(2000)));
        // 32 tokens on top of the cache, as a part of the prefill.
        let last = by(2000, ScorerWork { repeats: false, value_norms: false, read_again: 32 });
        let (share, forward) = (32.0 / 8192.0, prefill(&EIGHT_B, 8192));
        let read = scoring(&EIGHT_B, 8192, &last);
        assert!(read > share * forward && read < 2.0 * share * forward, "{read} of {forward}");
        assert_eq!((last.forwards(8192), last.scoring_tokens(20)), (1, 20));
    }
}
