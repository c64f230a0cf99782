//! The model card of an export: what a user must know before using the mapper.

mod front;

use std::fmt::Write;

use pkv_core::{markdown, markdown_code, neutral};
use pkv_recipe::Variant;

use crate::export::ExportConfig;

pub use front::check;

/// Content of the card that is not in the export's configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelCard {
    /// Training data.
    pub data: Vec<DataSource>,
    /// Time of training and evaluation, by stage.
    pub cost: Vec<StageCost>,
    /// Results, ready to be shown.
    pub results: Vec<CardTable>,
    /// Known limits, in addition to those of every export.
    pub limits: Vec<String>,
    pub licences: Licences,
}

/// One source of documents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataSource {
    pub name: String,
    /// Training examples from it.
    pub examples: u64,
    /// SPDX name or a sentence.
    pub licence: String,
}

/// Time of one stage.
#[derive(Clone, Debug, PartialEq)]
pub struct StageCost {
    pub stage: String,
    /// Wall-clock time, all attempts together.
    pub secs: f64,
    /// The device, in words.
    pub device: String,
    /// GPUs that were held for that time.
    pub gpus: u32,
    /// Tokens that a language model read for it, each counted once; absent where none did.
    pub tokens: Option<u64>,
}

/// A table of measurements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CardTable {
    pub caption: String,
    pub columns: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

/// Whose terms apply; empty fields are shown as not stated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Licences {
    /// Of the exported weights.
    pub mapper: String,
    pub target: String,
    pub proxy: String,
}

impl ModelCard {
    /// The card as Markdown, with the front matter that model hubs read.
    pub fn render(&self, config: &ExportConfig) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut out, config);
        out
    }

    fn write(&self, out: &mut String, c: &ExportConfig) -> std::fmt::Result {
        front::write(out, c, &self.licences.mapper)?;
        writeln!(out, "# {}\n", markdown(&c.name))?;
        let source = match &c.proxy {
            Some(proxy) => format!("the attention of {}", markdown_code(&proxy.model)),
            None => "its own prefill".to_owned(),
        };
        writeln!(
            out,
            "Predicts which KV pairs of {} matter, from {source}: a {} trained to reproduce \
             KVzip reconstruction scores (arXiv 2505.23416), as in ProxyKV (arXiv 2605.16360). Keep the highest \
             scores, evict the rest; the question need not be known.\n",
            markdown_code(&c.target.model),
            variant(c.mapper.variant)
        )?;
        writeln!(
            out,
            "```sh\nproxykv-train infer --mapper THIS_FOLDER_OR_REPOSITORY --context FILE --retain 0.2 --question \"...\"\n```\n\n\
             ```python\nfrom proxykv import ProxyKVPress  # scripts/python of proxykv-train\n\n\
             press = ProxyKVPress(\"THIS_FOLDER\", retention=0.2)  # for kvpress' \"kv-press-text-generation\" pipeline\n```\n"
        )?;
        writeln!(out, "## {}\n", if c.proxy.is_some() { "Pair" } else { "Model" })?;
        let head = ["", "model", "revision", "shape", "tokenizer"].map(str::to_owned).to_vec();
        let row = |role: &str, m: &crate::ModelIdentity| {
            vec![
                role.to_owned(),
                markdown_code(&m.model),
                markdown_code(&m.revision),
                m.shape.to_string(),
                markdown_code(m.vocab_hash.get(..12).unwrap_or(&m.vocab_hash)),
            ]
        };
        let proxy = c.proxy.as_ref().map(|proxy| row("proxy", proxy));
        table(out, &head, &std::iter::once(row("target", &c.target)).chain(proxy).collect::<Vec<_>>())?;

        writeln!(out, "\n## Labels\n")?;
        writeln!(
            out,
            "{}, raw scores on the log-odds scale; span-pooled for training with width {} and blend {}.",
            c.label.definition(),
            c.train.target_pool.width,
            c.train.target_pool.blend
        )?;
        writeln!(out, "\n## Features\n")?;
        writeln!(
            out,
            "{}Per position: {}. Window {} queries, minimum distance {}, last {} queries, 1 of {} \
             queries of the whole range. \
             Standardization is part of the weights: feed raw features.",
            c.extract
                .from
                .iter()
                .map(|&s| format!("Per {} KV head: {}. ", s.name(), list(c.extract.channels_of(s))))
                .collect::<String>(),
            list(&c.extract.globals),
            c.extract.window_tokens,
            c.extract.min_distance,
            c.extract.last_queries,
            c.extract.whole_range_stride
        )?;

        writeln!(out, "\n## Data\n")?;
        if self.data.is_empty() {
            writeln!(out, "Not stated.")?;
        } else {
            let head = ["source", "training examples", "licence"].map(str::to_owned).to_vec();
            let rows: Vec<_> = self
                .data
                .iter()
                .map(|d| vec![markdown(&d.name), d.examples.to_string(), markdown(&d.licence)])
                .collect();
            table(out, &head, &rows)?;
            if let Some(n) = c.train.contexts {
                writeln!(out, "\nLearnt from {n} of them, drawn by the seed.")?;
            }
        }
        writeln!(out, "\n## Training\n")?;
        let validation = c.validation.map_or("not validated".to_owned(), |v| {
            let ratios: Vec<_> = c.train.best_by.iter().map(f64::to_string).collect();
            format!(
                "{:.1}% mean recall of KVzip's kept set at {} on the validation split",
                100.0 * v,
                ratios.join(", ")
            )
        });
        let of = match c.train.auto() {
            None => format!(" of {}", c.train.most_steps()),
            Some(_) => format!(" ({})", c.train.steps_in_words()),
        };
        writeln!(
            out,
            "Step {}{of}, batches of {} contexts, AdamW with peak learning rate {}, seed {}: {validation}.",
            c.step, c.train.batch, c.train.lr, c.seed.0
        )?;

        self.write_cost(out)?;

        writeln!(out, "\n## Results\n")?;
        if self.results.is_empty() {
            writeln!(out, "Not evaluated when this export was written.")?;
        }
        for (i, t) in self.results.iter().enumerate() {
            let gap = if i > 0 { "\n" } else { "" };
            writeln!(out, "{gap}{}\n", t.caption)?;
            table(out, &t.columns, &t.rows)?;
        }

        writeln!(out, "\n## Limits\n")?;
        writeln!(
            out,
            "- For {} alone: other revisions, tokenizers or chat templates shift the features and the scores.\n\
             - Scores rank the KV pairs of one context; they are no probabilities and do not compare between contexts.\n\
             - The prefix of the chat template is not scored and must be kept.",
            if c.proxy.is_some() { "this pair" } else { "this model" }
        )?;
        for limit in &self.limits {
            writeln!(out, "- {limit}")?;
        }

        writeln!(out, "\n## Licences\n")?;
        let said = |text: &str| if text.is_empty() { "not stated".to_owned() } else { markdown(text) };
        writeln!(
            out,
            "Mapper: {}. Target: {}. {}The data's licences stand above.",
            said(&self.licences.mapper),
            said(&self.licences.target),
            c.proxy.as_ref().map_or_else(String::new, |_| format!("Proxy: {}. ", said(&self.licences.proxy)))
        )?;
        writeln!(out, "\n## Files\n")?;
        writeln!(
            out,
            "- `model.safetensors`: weights and standardization, f32\n\
             - `config.json`: every choice above, machine-readable, schema version {}\n\
             - `parity.safetensors`: raw features of one real context and the scores this export gives them",
            c.schema_version
        )
    }

    fn write_cost(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "\n## Cost\n")?;
        if self.cost.is_empty() {
            return writeln!(out, "Not recorded.");
        }
        let gpu_hours: f64 = self.cost.iter().map(|s| f64::from(s.gpus) * s.secs / 3600.0).sum();
        let hours: f64 = self.cost.iter().map(|s| s.secs / 3600.0).sum();
        writeln!(out, "{} GPU-hours ({} hours on the clock) in all.\n", short(gpu_hours), short(hours))?;
        let head = ["stage", "hours", "GPU-hours", "on", "tokens read"].map(str::to_owned).to_vec();
        let row = |s: &StageCost| {
            vec![
                s.stage.clone(),
                short(s.secs / 3600.0),
                short(f64::from(s.gpus) * s.secs / 3600.0),
                markdown(&s.device),
                s.tokens.map_or_else(|| "-".to_owned(), |n| n.to_string()),
            ]
        };
        table(out, &head, &self.cost.iter().map(row).collect::<Vec<_>>())
    }
}

/// Three digits after the point where they matter.
fn short(hours: f64) -> String {
    if hours >= 100.0 { format!("{hours:.0}") } else { format!("{hours:.3}") }
}

fn table(out: &mut String, head: &[String], rows: &[Vec<String>]) -> std::fmt::Result {
    let line = |cells: &[String]| {
        let cells: Vec<_> = cells.iter().map(|c| neutral(c).replace('\n', " ").replace('|', "\\|")).collect();
        format!("| {} |", cells.join(" | "))
    };
    writeln!(out, "{}", line(head))?;
    writeln!(out, "|{}", "---|".repeat(head.len()))?;
    rows.iter().try_for_each(|row| writeln!(out, "{}", line(row)))
}

/// Names as recipes spell them.
fn list(names: &[impl serde::Serialize]) -> String {
    let name = |n| serde_json::to_value(n).ok().and_then(|v| v.as_str().map(|s| format!("`{s}`")));
    let names: Vec<String> = names.iter().filter_map(name).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

const fn variant(v: Variant) -> &'static str {
    match v {
        Variant::HybridAxial => "three-stage HybridAxialMapper",
        Variant::Conv => "convolutional mapper",
        Variant::Mlp => "position-wise mapper",
        Variant::Linear => "linear mapper",
    }
}
