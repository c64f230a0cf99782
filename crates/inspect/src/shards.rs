//! Shards, and the folders of the stages that write them.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use pkv_core::{Fingerprint, hinted};
use pkv_recipe::plan::human_bytes;
use pkv_shard::{Example, FeatureRow, INDEX_FILE, LabelRow, Row, StageDir, StageReader};

use super::{Lines, choices, short};

pub fn shard(path: &Path) -> Result<String> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stage =
        StageDir::read(dir).with_context(|| format!("cannot tell what `{}` holds", path.display()))?;
    let index = stage.index();
    let mut before = 0;
    let entry = index.shards.iter().find(|s| {
        let found = s.file == name;
        before += if found { 0 } else { s.rows };
        found
    });
    let Some(entry) = entry else {
        bail!(hinted(
            format!("`{}` does not name `{name}`", dir.join(INDEX_FILE).display()),
            "it was left by an interrupted run; the stage removes it when it goes on"
        ));
    };
    let mut out = Lines::new(format!("shard `{}` of stage `{}`", path.display(), index.stage));
    out.add("schema", index.schema_version)
        .add("rows", entry.rows)
        .add("size", human_bytes(entry.bytes))
        .add("sha256", &entry.sha256)
        .add("fingerprint", index.fingerprint.hash());
    if stage.is_complete() {
        first_row(&mut out, dir, before, &index.fingerprint)?;
    }
    Ok(out.text)
}

pub fn stage(dir: &Path) -> Result<String> {
    let stage = StageDir::read(dir)?;
    let index = stage.index();
    let mut out = Lines::new(format!("stage `{}` in `{}`", index.stage, dir.display()));
    out.add("schema", index.schema_version).add("rows", rows(&stage)).add("size", human_bytes(index.bytes()));
    choices(&mut out, &index.fingerprint);
    if stage.rows() > 0 && stage.is_complete() {
        first_row(&mut out, dir, 0, &index.fingerprint)?;
    }
    out.block("shards");
    for s in &index.shards {
        out.add(&s.file, format!("{} rows, {}, sha256 {}", s.rows, human_bytes(s.bytes), short(&s.sha256)));
    }
    stage.verify()?;
    let _ = writeln!(out.text, "  all hashes match");
    Ok(out.text)
}

/// `480, complete` or `120 of 480`.
pub fn rows(stage: &StageDir) -> String {
    match (stage.is_complete(), stage.index().rows_expected) {
        (true, _) => format!("{}, complete", stage.rows()),
        (false, Some(n)) => format!("{} of {n}", stage.rows()),
        (false, None) => format!("{}, not complete", stage.rows()),
    }
}

/// Row `i` of a complete stage, whichever rows it has.
fn first_row(out: &mut Lines, dir: &Path, i: u64, fingerprint: &Fingerprint) -> Result<()> {
    let stage = StageDir::read(dir)?;
    let first = stage.index().shards.first().map_or("", |s| s.file.as_str());
    let holds = |kind: &str| first.starts_with(&format!("{kind}-"));
    out.block(&format!("row {i}"));
    if holds(Example::FILES) {
        let row = StageReader::<Example>::open(dir)?.get(i)?;
        out.add("id", &row.id)
            .add("document", format!("{} from {}", row.document, row.source))
            .add("split", row.split.name())
            .add("tokens", format!("{}, from token {} of the document", row.tokens.len(), row.start))
            .add("begins", format!("{:?}", &row.tokens[..row.tokens.len().min(12)]))
            .add("facts", row.facts.len());
        if let Some(fact) = row.facts.first() {
            out.add("", format!("tokens {}..{}: {}", fact.start, fact.start + fact.len, fact.sentence));
        }
    } else if holds(LabelRow::FILES) {
        let row = StageReader::<LabelRow>::open(dir)?.get(i)?;
        out.add("id", &row.id)
            .add(
                "shape",
                format!("{} layers x {} KV heads x {} positions", row.layers, row.kv_heads, row.positions),
            )
            .add("scores", spread(&row.scores));
    } else if holds(FeatureRow::FILES) {
        let row = StageReader::<FeatureRow>::open(dir)?.get(i)?;
        out.add("id", &row.id).add(
            "shape",
            format!(
                "{} layers x {} KV heads x {} channels x {} positions, {} global channels",
                row.layers,
                row.kv_heads,
                row.channels,
                row.positions,
                row.global_channels()
            ),
        );
        channels(out, &row, fingerprint);
    }
    Ok(())
}

/// One line per channel, named if the fingerprint says how.
fn channels(out: &mut Lines, row: &FeatureRow, fingerprint: &Fingerprint) {
    let (channels, positions) = (row.channels as usize, row.positions as usize);
    for c in 0..channels {
        let of_channel = |head: &[f32]| head[c * positions..(c + 1) * positions].to_vec();
        let values: Vec<f32> =
            row.heads.chunks_exact((channels * positions).max(1)).flat_map(of_channel).collect();
        out.add(&channel_name(fingerprint, "channels", c), spread(&values));
    }
    for g in 0..row.global_channels() {
        out.add(
            &channel_name(fingerprint, "globals", g),
            spread(&row.globals[g * positions..(g + 1) * positions]),
        );
    }
}

/// Name of channel `i` of `channels` or `globals`, as the fingerprint has it.
pub fn channel_name(fingerprint: &Fingerprint, key: &str, i: usize) -> String {
    let name = fingerprint.get("extract").and_then(|e| e[key][i].as_str().map(str::to_owned));
    name.unwrap_or_else(|| format!("{key} {i}"))
}

/// Least, middle and largest value.
fn spread(values: &[f32]) -> String {
    let mut sorted = values.to_vec();
    sorted.sort_by(f32::total_cmp);
    match sorted.as_slice() {
        [] => "none".to_owned(),
        [first, .., last] => format!("{first:.4} to {last:.4}, median {:.4}", sorted[sorted.len() / 2]),
        [one] => format!("{one:.4}"),
    }
}
