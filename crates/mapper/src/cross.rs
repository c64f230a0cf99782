//! Stage 3, head-axis cross-attention: at each position, one query per target KV head over the
//! proxy heads' tokens and the position's context token.
//!
//! Queries are learned and the same at every position, and so is what each target head reads out of a value.
//! Both fold into the key and value projections: a token gives `cross_heads` x outputs attention logits and
//! as many readings, in two matrix products over all positions at once, and a score is the attention-weighted
//! sum of readings. No query, key or value is held per position: with 12 proxy and 36 target heads this takes
//! a quarter of the time of attention followed by a layer per target head.
//!
//! Attention weights and readings of all tokens are 2 x (proxy heads + 1) x `cross_heads` x outputs
//! numbers per position: 15 kB on the tiny pair, 1.1 MB with 128 proxy and 256 target heads. They are
//! made a piece at a time, in the backward once more: training keeps the tokens, 16 kB there. On a GPU
//! in bf16 a kernel of ours (`gpu/kernels/cross.cu`) holds none of them in the forward.

use pkv_recipe::MapperSection;
use pkv_recipe::plan::PIECE_ELEMENTS;
use tch::Tensor;

use crate::layers::Linear;
use crate::params::{Param, ParamStore, Pass};
use crate::standardize::MapperDims;

pub(crate) struct Cross {
    /// The position's context as one more head token.
    context: Linear,
    token_embedding_pd: Param,
    query_noe: Param,
    key_ned: Param,
    value_ned: Param,
    /// Readout of a value by each target head; zero at the start.
    readout_noe: Param,
    heads: i64,
    scale: f64,
}

impl Cross {
    pub fn new(params: &mut ParamStore, section: &MapperSection, dims: &MapperDims) -> Self {
        let (n, d) = (section.cross_heads, section.head_width);
        let e = section.cross_width / n;
        let name = |part: &str| format!("stage3.{part}");
        Self {
            context: Linear::new(params, "stage3.context", section.width, d),
            token_embedding_pd: params.uniform(name("token_embedding"), &[dims.proxy_heads + 1, d], 0.4),
            query_noe: params.uniform(name("query"), &[n, dims.outputs, e], 1.7),
            key_ned: params.weight(name("key.weight"), &[n, e, d], d),
            value_ned: params.weight(name("value.weight"), &[n, e, d], d),
            readout_noe: params.constant(name("readout"), &[n, dims.outputs, e], 0.0),
            heads: n as i64,
            scale: (e as f64).sqrt().recip(),
        }
    }

    /// # Shapes
    /// - `heads_bptd`: head tokens of stage 1
    /// - `context_btm`: stage 2
    /// - returns `[b, t, o]`, f32
    pub fn forward(&self, pass: &Pass, heads_bptd: &Tensor, context_btm: &Tensor) -> Tensor {
        let (b, p, t, _) = heads_bptd.size4().expect("head tokens have four dimensions");
        let w = |at| &pass.weights[at];
        let context_b1td = self.context.forward(pass, context_btm).unsqueeze(1);
        let tokens_bptd =
            Tensor::cat(&[heads_bptd, &context_b1td], 1) + w(self.token_embedding_pd).unsqueeze(1);
        // [n, o, d] as [n x o, d]: what turns a token into logits, and into readings.
        let logit_rd = (w(self.query_noe).bmm(w(self.key_ned)) * self.scale).flatten(0, 1);
        let reading_rd = w(self.readout_noe).bmm(w(self.value_ned)).flatten(0, 1);
        let per_position = b * (p + 1) * logit_rd.size()[0];
        let piece = (PIECE_ELEMENTS as i64 / per_position.max(1)).clamp(1, t.max(1));
        pkv_gpu::attend_heads(&tokens_bptd, &logit_rd, &reading_rd, self.heads, piece)
    }
}
