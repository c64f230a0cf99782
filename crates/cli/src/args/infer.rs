//! Arguments of `infer`, below four headings.

use std::path::PathBuf;

use clap::{Args, ValueHint};
use pkv_core::{DtypeName, Policy};
use pkv_gpu::DeviceChoice;
use pkv_infer::RegimeName;

use super::{choice, policy};
use crate::completion::values;

const CONTEXT: &str = "Context and questions";
const MODELS: &str = "Mapper and models";
const PRUNING: &str = "Pruning";
const WORK: &str = "How it computes";

/// Arguments of `infer`.
#[derive(Clone, Debug, Args)]
pub struct InferArgs {
    /// The context: a text file, or `-` for stdin.
    #[arg(help_heading = CONTEXT, long, value_name = "FILE", required_unless_present = "context_ids")]
    pub context: Option<PathBuf>,
    /// The context as a JSON list of token ids, instead of text.
    #[arg(help_heading = CONTEXT, long, value_name = "FILE", conflicts_with = "context")]
    pub context_ids: Option<PathBuf>,
    /// A question; may be repeated.
    #[arg(help_heading = CONTEXT, long = "question", value_name = "TEXT")]
    pub questions: Vec<String>,
    /// Questions as JSON lines, `{"question": "..."}` or strings; `-` for stdin, answered as they arrive, in
    /// a terminal as plain text. An invalid line is refused, and reading continues.
    #[arg(help_heading = CONTEXT, long = "questions", value_name = "FILE")]
    pub question_file: Option<PathBuf>,
    /// Answer each question from the full cache as well, after one more prefill, and print both with tokens
    /// and memory.
    #[arg(help_heading = CONTEXT, long)]
    pub compare_full: bool,
    /// Maximum length of an answer in tokens.
    #[arg(help_heading = CONTEXT, long, default_value_t = 128, value_name = "N", value_parser = at_least_one)]
    pub max_new_tokens: usize,
    /// Read special tokens that context and questions spell out, such as `<|im_end|>`, as plain text; for
    /// untrusted texts.
    #[arg(help_heading = CONTEXT, long)]
    pub special_tokens_as_text: bool,
    /// Export of the mapper (`proxykv-train export`), the run folder that contains it, or a hub repository.
    #[arg(help_heading = MODELS, long, value_name = "FOLDER_OR_REPO", add = values::run_path())]
    pub mapper: PathBuf,
    /// Target: hub name or folder [default: the one that the mapper was trained for].
    #[arg(help_heading = MODELS, long, value_name = "MODEL", value_hint = ValueHint::DirPath)]
    pub target: Option<String>,
    /// Proxy: hub name or folder [default: the one that the mapper was trained for].
    #[arg(help_heading = MODELS, long, value_name = "MODEL", value_hint = ValueHint::DirPath)]
    pub proxy: Option<String>,
    /// Dtype of the models.
    #[arg(help_heading = MODELS, long, default_value = "auto",
        value_parser = choice(&DtypeName::ALL, DtypeName::name, DtypeName::meaning))]
    pub dtype: DtypeName,
    /// Retention ratio: share of the context's KV pairs that is kept, above 0 and at most 1; `20%` means
    /// `0.2`.
    #[arg(help_heading = PRUNING, long, value_name = "RATIO", conflicts_with = "budget", default_value_t = 0.2, value_parser = share)]
    pub retain: f64,
    /// Number of tokens to keep in every KV head; for every policy but `pair-uniform` and `token`, the same
    /// total of KV pairs.
    #[arg(help_heading = PRUNING, long, value_name = "TOKENS")]
    pub budget: Option<usize>,
    /// Pruning policy: which KV pairs compete for the budget.
    #[arg(help_heading = PRUNING, long, default_value = "pair-keydiff", value_parser = policy())]
    pub policy: Policy,
    /// Keep the newest N tokens of the context in every KV head, regardless of their scores, within the
    /// budget.
    #[arg(help_heading = PRUNING, long, value_name = "N", default_value_t = 0)]
    pub keep_recent: usize,
    /// Order of proxy and target, and the devices they run on.
    #[arg(help_heading = WORK, long, default_value = "sequential",
        value_parser = choice(&RegimeName::ALL, RegimeName::name, RegimeName::meaning))]
    pub regime: RegimeName,
    /// Device of proxy and mapper with `--regime dual` [default: the GPU after the target's].
    #[arg(help_heading = WORK, long, value_name = "DEVICE", add = values::devices())]
    pub proxy_device: Option<DeviceChoice>,
    /// Run the mapper while the proxy reads, on each window of features as soon as it is final.
    #[arg(help_heading = WORK, long)]
    pub overlap: bool,
    /// Tokens per forward of the target's prefill [default: as when the mapper was trained].
    #[arg(help_heading = WORK, long, value_name = "TOKENS")]
    pub chunk_tokens: Option<usize>,
    /// Number of positions that the mapper scores in one forward pass.
    #[arg(help_heading = WORK, long, default_value_t = 16_384, value_name = "TOKENS")]
    pub window_tokens: usize,
    /// Write the phases as a trace for ui.perfetto.dev.
    #[arg(help_heading = WORK, long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
}

/// A share, as a number or in percent.
fn share(text: &str) -> Result<f64, String> {
    let text = text.trim();
    let (number, unit) = text.strip_suffix('%').map_or((text, 1.0), |percent| (percent.trim_end(), 100.0));
    let share: f64 = number.parse().map_err(|_| format!("`{text}` is no share: write `0.2` to keep 20%"))?;
    Ok(share / unit)
}

/// A number of tokens to answer with.
fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "expected a whole number, 1 or more".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_may_be_in_percent() {
        for (text, expected) in [("0.2", 0.2), ("20%", 0.2), (" 2.5 %", 0.025), ("1", 1.0), ("200%", 2.0)] {
            assert_eq!(share(text), Ok(expected), "{text}");
        }
        for text in ["", "%", "20%%", "half"] {
            assert!(share(text).unwrap_err().contains("`0.2`"), "{text}");
        }
    }
}
