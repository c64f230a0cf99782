//! The nano pair as tests of several crates use it: models, tokenizer, text, and what a forward pass shows.
//!
//! A dev-dependency only. Any failure is a panic.

use std::path::Path;

use pkv_lm::{LanguageModel, LayerView, Tap};
use pkv_test_support::files::nano;
use pkv_test_support::tensors::flat;
use pkv_text::TextTokenizer;
use tch::{Device, Kind};

/// Words that the small models know.
pub const TEXT: &str = "The keeper of the northern lighthouse wrote down every ship that passed, its colours and its \
    course, and when the fog came in from the sea she rang the bell until morning. In the winter of that year no \
    ship came for eleven weeks. She counted the gulls instead, and the waves between two turns of the lamp, and \
    she wrote those down as well, because a page without a number on it seemed to her like a night without light.";

/// Where tests compute that compare numbers: the CPU, or what `PKV_TEST_DEVICE` names (`cuda`).
pub fn device() -> Device {
    let choice = std::env::var("PKV_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    // A model's f32 is exact f32 on a GPU too.
    pkv_gpu::set_tf32(false).unwrap();
    pkv_gpu::device(choice.parse().unwrap()).unwrap()
}

/// A model of the pair, `target` or `proxy`, on [`device`].
pub fn model(which: &str, kind: Kind) -> LanguageModel {
    LanguageModel::load(&nano(which), device(), kind).unwrap()
}

/// A model of the pair on `device`, in f32.
pub fn model_on(which: &str, device: Device) -> LanguageModel {
    // These matrices are too small to share, and waiting threads starve a busy machine.
    tch::set_num_threads(1);
    LanguageModel::load(&nano(which), device, Kind::Float).unwrap()
}

/// The tokenizer of both.
pub fn tokenizer() -> TextTokenizer {
    open(&nano("target"))
}

fn open(folder: &Path) -> TextTokenizer {
    TextTokenizer::open(folder).unwrap()
}

/// A model of the pair with its tokenizer.
pub struct Reader {
    pub model: LanguageModel,
    pub tokenizer: TextTokenizer,
}

impl Reader {
    /// The proxy, in f32.
    pub fn proxy() -> Self {
        Self::with(&nano("proxy"), Kind::Float)
    }

    /// The proxy in `kind` with the tokenizer of `folder`.
    pub fn with(folder: &Path, kind: Kind) -> Self {
        Self { model: model("proxy", kind), tokenizer: open(folder) }
    }

    /// The first `tokens` tokens of [`TEXT`].
    pub fn context(&self, tokens: usize) -> Vec<u32> {
        let ids = self.tokenizer.encode(TEXT).unwrap();
        assert!(ids.len() >= tokens, "the text has {} tokens", ids.len());
        ids[..tokens].to_vec()
    }
}

/// Copies what a forward pass shows of every layer, in f64.
#[derive(Default)]
pub struct Recorder {
    /// Queries `[query_heads, rows, head_dim]`, keys and values `[kv_heads, positions, head_dim]`.
    pub layers: Vec<[Vec<f64>; 3]>,
}

impl Tap for Recorder {
    fn layer(&mut self, view: &LayerView) -> anyhow::Result<()> {
        self.layers.push([flat(view.q_qsd), flat(view.k_hkd), flat(view.v_hkd)]);
        Ok(())
    }
}
