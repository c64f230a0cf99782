//! Compares the numbers of two folders of one stage, made from the same examples with other settings.
//!
//! The differing keys of the recipes are listed; conclusions are left to the reader.

use std::path::Path;

use anyhow::{Result, bail, ensure};
use pkv_core::{Fingerprint, Policy, RetentionRatio, hinted};
use pkv_prune::metrics::KeptAgreement;
use pkv_recipe::EvalSection;
use pkv_shard::{FeatureRow, INDEX_FILE, LabelRow, Row, StageDir, StageReader};
use tch::Tensor;

use super::{Lines, shards::channel_name};

const HINT: &str = "pass two folders of labels, or two of features: `runs/NAME/labels`, `runs/NAME/features`";

/// Labels or features of `path` beside those of `other`, context by context.
///
/// # Errors
/// One of them is not complete or damaged, they are of different stages or examples, or of other shapes.
pub fn against(path: &Path, other: &Path) -> Result<String> {
    let reads = |stage: &StageDir, files: &str| {
        stage.index().shards.first().is_some_and(|s| s.file.starts_with(&format!("{files}-")))
    };
    for folder in [path, other] {
        ensure!(
            folder.join(INDEX_FILE).is_file(),
            hinted(format!("`{}` is no folder of labels or features", folder.display()), HINT)
        );
    }
    let (mine, theirs) = (StageDir::read(path)?, StageDir::read(other)?);
    let both = |files: &str| reads(&mine, files) && reads(&theirs, files);
    if both(LabelRow::FILES) {
        labels(path, other)
    } else if both(FeatureRow::FILES) {
        features(path, other)
    } else {
        bail!(hinted(
            format!(
                "cannot compare `{}`, made by `{}`, with `{}`, made by `{}`",
                path.display(),
                mine.index().stage,
                other.display(),
                theirs.index().stage
            ),
            HINT
        ))
    }
}

fn labels(path: &Path, other: &Path) -> Result<String> {
    let mut pairs = Pairs::<LabelRow>::open(path, other)?;
    let ratios =
        EvalSection::default().ratios.into_iter().map(RetentionRatio::new).collect::<Result<Vec<_>, _>>()?;
    let mut apart = Apart::default();
    let mut recall = vec![vec![Vec::new(); ratios.len()]; Policy::OF_SCORES.len()];
    while let Some((a, b)) = pairs.next()? {
        let shape = |r: &LabelRow| [r.layers, r.kv_heads, r.positions].map(i64::from);
        ensure!(shape(&a) == shape(&b), pairs.shapes(&a.id, &shape(&a), &shape(&b)));
        apart.add(&a.scores, &b.scores);
        let scores_lht = |r: &LabelRow| Tensor::from_slice(&r.scores).reshape(shape(r));
        let (mine, theirs) = (scores_lht(&a), scores_lht(&b));
        for (policy, of_policy) in Policy::OF_SCORES.into_iter().zip(&mut recall) {
            let agreement = KeptAgreement::at_ratios(&mine, &theirs, &theirs, policy, &ratios)?;
            for (all, agreement) in of_policy.iter_mut().zip(agreement) {
                all.push(100.0 * agreement.recall);
            }
        }
    }
    let mut out = pairs.lines("labels");
    out.add("scores", apart);
    let mut table = |what: &str, of: &dyn Fn(&[f64]) -> f64| {
        out.block(&format!("kept by both, of what `{}` keeps, %, {what}", other.display()));
        let head: String = ratios.iter().map(|r| format!("{:>7}", format!("{}%", 100.0 * r.get()))).collect();
        out.add("kept", head);
        for (policy, of_policy) in Policy::OF_SCORES.into_iter().zip(&recall) {
            let row: String = of_policy.iter().map(|v| format!("{:>7.2}", of(v))).collect();
            out.add(policy.name(), row);
        }
    };
    table("mean of the contexts", &|v| v.iter().sum::<f64>() / v.len() as f64);
    table("lowest context", &|v| v.iter().copied().fold(f64::INFINITY, f64::min));
    Ok(out.text)
}

fn features(path: &Path, other: &Path) -> Result<String> {
    let mut pairs = Pairs::<FeatureRow>::open(path, other)?;
    let mut apart: Vec<Apart> = Vec::new();
    let mut channels = 0;
    while let Some((a, b)) = pairs.next()? {
        let shape = |r: &FeatureRow| {
            [
                r.layers as usize,
                r.kv_heads as usize,
                r.channels as usize,
                r.global_channels(),
                r.positions as usize,
            ]
        };
        ensure!(shape(&a) == shape(&b), pairs.shapes(&a.id, &shape(&a), &shape(&b)));
        let positions = (a.positions as usize).max(1);
        channels = a.channels as usize;
        apart.resize_with(channels + a.global_channels(), Apart::default);
        for (i, (x, y)) in a.heads.chunks(positions).zip(b.heads.chunks(positions)).enumerate() {
            apart[i % channels.max(1)].add(x, y);
        }
        for (i, (x, y)) in a.globals.chunks(positions).zip(b.globals.chunks(positions)).enumerate() {
            apart[channels + i].add(x, y);
        }
    }
    let mut out = pairs.lines("features");
    out.block("by channel");
    for (i, apart) in apart.into_iter().enumerate() {
        let (key, i) = if i < channels { ("channels", i) } else { ("globals", i - channels) };
        out.add(&channel_name(pairs.mine.stage().fingerprint(), key, i), apart);
    }
    Ok(out.text)
}

/// Rows of two folders, of the same example each.
struct Pairs<'a, R: Row> {
    paths: [&'a Path; 2],
    mine: StageReader<R>,
    theirs: StageReader<R>,
    at: u64,
}

impl<'a, R: Row> Pairs<'a, R> {
    fn open(path: &'a Path, other: &'a Path) -> Result<Self> {
        let (mine, theirs) = (StageReader::<R>::open(path)?, StageReader::<R>::open(other)?);
        let examples = |r: &StageReader<R>| {
            r.stage().fingerprint().get("examples").map(|e| Fingerprint::new().with("examples", e))
        };
        let differ = match (examples(&mine), examples(&theirs)) {
            (Some(a), Some(b)) => a.difference(&b),
            _ => Vec::new(),
        };
        ensure!(
            differ.is_empty() && mine.len() == theirs.len(),
            hinted(
                format!(
                    "`{}` ({} contexts) and `{}` ({}) are of different examples{}",
                    path.display(),
                    mine.len(),
                    other.display(),
                    theirs.len(),
                    changes(&differ).map_or(String::new(), |c| format!(": {c}"))
                ),
                "prepare both runs with the same `data`, manifest and seed"
            )
        );
        Ok(Self { paths: [path, other], mine, theirs, at: 0 })
    }

    fn next(&mut self) -> Result<Option<(R, R)>> {
        if self.at == self.mine.len() {
            return Ok(None);
        }
        let (a, b) = (self.mine.get(self.at)?, self.theirs.get(self.at)?);
        ensure!(
            a.id() == b.id(),
            "row {} is of `{}` in `{}`, of `{}` in `{}`",
            self.at,
            a.id(),
            self.paths[0].display(),
            b.id(),
            self.paths[1].display()
        );
        self.at += 1;
        Ok(Some((a, b)))
    }

    fn shapes(&self, id: &str, a: &[impl std::fmt::Debug], b: &[impl std::fmt::Debug]) -> String {
        let [path, other] = self.paths.map(Path::display);
        format!("`{id}` is {a:?} in `{path}` and {b:?} in `{other}`; only equal shapes can be compared")
    }

    fn lines(&self, what: &str) -> Lines {
        let [path, other] = self.paths.map(Path::display);
        let mut out = Lines::new(format!("{what} of `{path}` beside `{other}`"));
        let differ = self.mine.stage().fingerprint().difference(self.theirs.stage().fingerprint());
        out.add("contexts", self.mine.len())
            .add("differ in", changes(&differ).unwrap_or_else(|| "no choice of the recipe".to_owned()));
        out
    }
}

/// `target.dtype "bf16", "f32"; ...`; `None` if there is none.
fn changes(differ: &[(String, serde_json::Value, serde_json::Value)]) -> Option<String> {
    let all: Vec<_> = differ.iter().map(|(key, a, b)| format!("{key} {a}, {b}")).collect();
    (!all.is_empty()).then(|| all.join("; "))
}

/// Differences of two lists of numbers.
#[derive(Default)]
struct Apart {
    largest: f64,
    sum: f64,
    count: u64,
}

impl Apart {
    fn add(&mut self, a: &[f32], b: &[f32]) {
        for (x, y) in a.iter().zip(b) {
            // Equal infinities are 0 apart.
            let apart = if x == y { 0.0 } else { (f64::from(*x) - f64::from(*y)).abs() };
            // A NaN on one side is the largest difference there is.
            self.largest = if apart.is_nan() { f64::INFINITY } else { self.largest.max(apart) };
            self.sum += apart;
            self.count += 1;
        }
    }
}

impl std::fmt::Display for Apart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mean = self.sum / self.count.max(1) as f64;
        write!(f, "at most {:.1e} apart, {mean:.1e} on average", self.largest)
    }
}
