//! Figures of the Python peer, as `scripts/peer/time_kvpress.py` prints them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use pkv_core::{ModelShape, hinted};
use serde::Deserialize;
use tch::Kind;

use crate::dtype_name;
use crate::row::{PeerTime, Row};
use crate::subject::Subject;

/// One run of the peer's script.
#[derive(Debug, Deserialize)]
pub struct Peer {
    tool: String,
    versions: BTreeMap<String, String>,
    dtype: String,
    shape: ModelShape,
    rows: Vec<PeerRow>,
}

#[derive(Debug, Deserialize)]
struct PeerRow {
    what: String,
    /// Which attention function of transformers.
    attention: String,
    context: usize,
    /// Absent if it ran out of memory.
    median_s: Option<f64>,
}

impl Peer {
    /// # Errors
    /// The file cannot be read, is not the script's, or is about another shape or dtype than `subject`.
    pub fn read(path: &Path, subject: &Subject, recipe: &Path) -> Result<Self> {
        let command = format!(
            "make it with `python3 scripts/peer/time_kvpress.py --recipe {} --role {} > {}`",
            recipe.display(),
            subject.role.name(),
            path.display()
        );
        let context = || hinted(format!("cannot use the peer's figures `{}`", path.display()), &command);
        let text = fs::read_to_string(path).with_context(context)?;
        let peer: Self = serde_json::from_str(&text).with_context(context)?;
        peer.check(&subject.section.shape, subject.kind).with_context(context)?;
        Ok(peer)
    }

    fn check(&self, shape: &ModelShape, kind: Kind) -> Result<()> {
        ensure!(
            self.shape == *shape,
            "they are of {}, the recipe's model is {}",
            long(&self.shape),
            long(shape)
        );
        let ours = dtype_name(kind);
        ensure!(self.dtype == ours, "they were measured in {}, this run is in {ours}", self.dtype);
        Ok(())
    }

    /// `kvpress 0.5.5 (torch 2.11.0, transformers 5.2.0)`.
    pub fn title(&self) -> String {
        let (own, others): (Vec<_>, Vec<_>) = self.versions.iter().partition(|(name, _)| **name == self.tool);
        let others: Vec<String> = others.iter().map(|(name, version)| format!("{name} {version}")).collect();
        let version = own.first().map_or("", |(_, version)| version);
        format!("{} {version} ({})", self.tool, others.join(", "))
    }

    /// The fastest of the peer's rows for the same work.
    pub fn find(&self, row: &Row) -> Option<PeerTime> {
        let what = match row.what {
            // What a proxy's reconstruction features cost beside its scores is next to nothing.
            "reconstruction" => "label",
            same => same,
        };
        let ours = row.measured.as_ref()?.median_s;
        let same = self.rows.iter().filter(|r| r.what == what && r.context == row.context);
        let timed = same.filter_map(|r| r.median_s.map(|secs| (secs, &r.attention)));
        let (median_s, attention) = timed.min_by(|a, b| a.0.total_cmp(&b.0))?;
        Some(PeerTime { median_s, attention: attention.clone(), ratio: median_s / ours })
    }
}

fn long(s: &ModelShape) -> String {
    format!(
        "{s}, {} query heads, hidden {}, intermediate {}, vocab {}",
        s.query_heads, s.hidden, s.intermediate, s.vocab
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::Measured;

    fn peer() -> Peer {
        serde_json::from_str(
            r#"{
                "tool": "kvpress", "versions": {"kvpress": "0.5.5", "transformers": "5.2.0", "torch": "2.11.0"},
                "device": "cpu", "dtype": "bfloat16", "family": "llama", "stubbed": [], "unavailable": {},
                "shape": {"layers": 1, "kv_heads": 1, "query_heads": 2, "head_dim": 8, "hidden": 16,
                          "intermediate": 32, "vocab": 64},
                "rows": [
                    {"what": "prefill", "attention": "sdpa", "context": 64, "repeats": 2, "median_s": 0.5, "min_s": 0.5},
                    {"what": "label", "attention": "sdpa", "context": 64, "repeats": 2, "median_s": 3.0, "min_s": 2.0},
                    {"what": "label", "attention": "flash", "context": 64, "repeats": 2, "median_s": 2.0, "min_s": 1.0},
                    {"what": "label", "attention": "sdpa", "context": 999, "error": "out of memory"}
                ]
            }"#,
        )
        .unwrap()
    }

    #[test]
    fn the_fastest_attention_counts_and_only_the_same_work() {
        let row = |what, context| {
            let measured = Measured {
                repeats: 1,
                median_s: 0.8,
                min_s: 0.8,
                tokens_per_s: 1.0,
                roofline_share: 0.1,
                peak_bytes: None,
                device_peak_bytes: Vec::new(),
            };
            Row { measured: Some(measured), ..Row::new(what, context, 1.0) }
        };
        let flash = PeerTime { median_s: 2.0, attention: "flash".to_owned(), ratio: 2.5 };
        assert_eq!(peer().find(&row("label", 64)), Some(flash.clone()));
        assert_eq!(peer().find(&row("reconstruction", 64)), Some(flash));
        assert_eq!(peer().find(&row("prefill", 64)).unwrap().ratio, 0.625);
        for (what, context) in [("label", 999), ("label", 65), ("windowed", 64)] {
            assert_eq!(peer().find(&row(what, context)), None, "{what} at {context}");
        }
        assert_eq!(peer().find(&Row::new("label", 64, 1.0)), None, "nothing of ours to compare with");
        assert_eq!(peer().title(), "kvpress 0.5.5 (torch 2.11.0, transformers 5.2.0)");
    }

    #[test]
    fn another_shape_or_dtype_is_no_peer() {
        let peer = peer();
        peer.check(&peer.shape, Kind::BFloat16).unwrap();
        let e = peer.check(&peer.shape, Kind::Float).unwrap_err().to_string();
        assert_eq!(e, "they were measured in bfloat16, this run is in float32");
        assert!(peer.check(&ModelShape { layers: 2, ..peer.shape }, Kind::BFloat16).is_err());
    }
}
