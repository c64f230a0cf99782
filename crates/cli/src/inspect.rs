//! `inspect`: what a file or folder that this program writes holds, as text.
//!
//! The kind is told by what lies there, never by the name; hashes are checked where a kind has
//! them. Numbers come from the crates that own the formats.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use pkv_checkpoint::{CheckpointInfo, CheckpointStore, Export, ExportConfig};
use pkv_core::{Fingerprint, hinted};
use pkv_eval::{RESULTS_FILE, Results};
use pkv_lm::{LmConfig, TextTokenizer};
use pkv_recipe::Method;
use pkv_recipe::plan::{human_bytes, human_count, human_secs};
use pkv_shard::{Example, FeatureRow, INDEX_FILE, LabelRow, Row, StageDir, StageReader};
use serde_json::Value;

/// Stages whose folders lie in a run folder, in order.
const STAGE_FOLDERS: [&str; 3] = ["examples", "labels", "features"];

/// Describe `path`: a shard, a stage's folder, a run folder, one checkpoint or a folder of them, an
/// export, the results of an evaluation, or a model.
///
/// # Errors
/// It is none of them, or what it holds is damaged.
pub fn inspect(path: &Path) -> Result<String> {
    let has = |name: &str| path.join(name).is_file();
    let extension = path.extension().and_then(|e| e.to_str());
    if path.is_file() {
        return match extension {
            Some("parquet") => shard(path),
            Some("json") if path.file_name().is_some_and(|n| n == RESULTS_FILE) => results(path),
            _ => unknown(path),
        };
    }
    if !path.exists() {
        bail!(hinted(
            format!("there is no `{}`", path.display()),
            "check the path; run folders are in `runs/`"
        ));
    }
    if has(INDEX_FILE) {
        stage(path)
    } else if has("run.json") {
        run(path)
    } else if has("state.json") {
        checkpoint(path)
    } else if has("config.json") && has("parity.safetensors") {
        export(path)
    } else if has("config.json") {
        model(path)
    } else if has(RESULTS_FILE) {
        results(&path.join(RESULTS_FILE))
    } else if !CheckpointStore::read_only(path)?.list()?.is_empty() {
        checkpoints(path)
    } else {
        unknown(path)
    }
}

fn unknown(path: &Path) -> Result<String> {
    bail!(hinted(
        format!("`{}` is nothing that this program writes", path.display()),
        "pass a shard (`.parquet`), a stage's folder, a run folder, a checkpoint, an export, `eval/results.json` or a model"
    ))
}

/// Lines of `key  value`, keys aligned.
struct Lines {
    text: String,
}

impl Lines {
    fn new(title: impl AsRef<str>) -> Self {
        Self { text: format!("{}\n", title.as_ref()) }
    }

    fn add(&mut self, key: &str, value: impl std::fmt::Display) -> &mut Self {
        let _ = writeln!(self.text, "  {key:<12} {value}");
        self
    }

    /// A block of lines of its own, after an empty one.
    fn block(&mut self, title: &str) -> &mut Self {
        let _ = write!(self.text, "\n{title}\n");
        self
    }
}

fn shard(path: &Path) -> Result<String> {
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

fn stage(dir: &Path) -> Result<String> {
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
fn rows(stage: &StageDir) -> String {
    match (stage.is_complete(), stage.index().rows_expected) {
        (true, _) => format!("{}, complete", stage.rows()),
        (false, Some(n)) => format!("{} of {n}", stage.rows()),
        (false, None) => format!("{}, not complete", stage.rows()),
    }
}

/// The fingerprint's hash, and its choices one level deep.
fn choices(out: &mut Lines, fingerprint: &Fingerprint) {
    out.add("fingerprint", fingerprint.hash());
    let value = serde_json::to_value(fingerprint).unwrap_or_default();
    for (key, value) in value.as_object().into_iter().flatten() {
        let text = value.to_string();
        let cut: String = text.chars().take(100).collect();
        out.add(&format!("  {key}"), if cut.len() < text.len() { format!("{cut}...") } else { text });
    }
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
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
    let names = |key: &str, i: usize| {
        let name = fingerprint.get("extract").and_then(|e| e[key][i].as_str().map(str::to_owned));
        name.unwrap_or_else(|| format!("{key} {i}"))
    };
    let (channels, positions) = (row.channels as usize, row.positions as usize);
    for c in 0..channels {
        let of_channel = |head: &[f32]| head[c * positions..(c + 1) * positions].to_vec();
        let values: Vec<f32> =
            row.heads.chunks_exact((channels * positions).max(1)).flat_map(of_channel).collect();
        out.add(&names("channels", c), spread(&values));
    }
    for g in 0..row.global_channels() {
        out.add(&names("globals", g), spread(&row.globals[g * positions..(g + 1) * positions]));
    }
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

fn checkpoint(dir: &Path) -> Result<String> {
    let info = CheckpointInfo::read(dir)?;
    let mut out = Lines::new(format!("checkpoint `{}`", dir.display()));
    out.add("schema", info.schema_version)
        .add("step", info.step)
        .add("validation", validation(info.validation))
        .add("tensors", format!("{} trained, {} fixed", info.parameters.len(), info.buffers.len()))
        .add("average", if info.ema { "kept" } else { "none" });
    choices(&mut out, &info.fingerprint);
    out.block("files");
    for (name, file) in &info.files {
        out.add(name, format!("{}, sha256 {}", human_bytes(file.bytes), short(&file.sha256)));
    }
    Ok(out.text)
}

fn validation(value: Option<f64>) -> String {
    value.map_or_else(|| "not measured at this step".to_owned(), |v| format!("{v:.4}"))
}

fn checkpoints(dir: &Path) -> Result<String> {
    let store = CheckpointStore::read_only(dir)?;
    let mut out = Lines::new(format!("checkpoints in `{}`", dir.display()));
    for info in store.list()? {
        out.add(&format!("step {}", info.step), format!("validation {}", validation(info.validation)));
    }
    if let Some((step, value)) = store.best_validation()? {
        out.add("best", format!("step {step}, {value:.4}"));
    }
    Ok(out.text)
}

fn export(dir: &Path) -> Result<String> {
    let export = Export::read(dir)?;
    let config: &ExportConfig = export.config();
    let mut out = Lines::new(format!("export `{}` of `{}`", dir.display(), config.name));
    out.add("schema", config.schema_version).add("written by", &config.written_by);
    for (role, model) in [("target", &config.target), ("proxy", &config.proxy)] {
        out.add(role, format!("{} @ {}, {}, {}", model.model, model.revision, model.shape, model.dtype));
    }
    let d = config.dims;
    let parameters: usize = export.tensors().iter().map(|(_, t)| t.numel()).sum();
    out.add(
        "mapper",
        format!(
            "{} proxy heads x {} channels + {} globals to {} target heads",
            d.proxy_heads, d.channels, d.globals, d.outputs
        ),
    )
    .add("numbers", format!("{} in {} tensors", human_count(parameters as u64), export.tensors().len()))
    .add("step", config.step)
    .add("validation", validation(config.validation))
    .add("fingerprint", config.fingerprint.hash());
    out.block("tensors");
    for (name, tensor) in export.tensors() {
        let _ = writeln!(out.text, "  {name:<44} {:?}", tensor.size());
    }
    out.block("files");
    for (name, file) in &config.files {
        out.add(name, format!("{}, sha256 {}, matches", human_bytes(file.bytes), short(&file.sha256)));
    }
    Ok(out.text)
}

fn model(dir: &Path) -> Result<String> {
    let config = LmConfig::from_folder(dir)?;
    let mut out = Lines::new(format!("language model `{}`", dir.display()));
    let s = config.shape;
    out.add("shape", s)
        .add(
            "hidden",
            format!("{}, feed-forward {}, {} query heads", s.hidden, s.intermediate, s.query_heads),
        )
        .add("vocabulary", s.vocab);
    if let Ok(tokenizer) = TextTokenizer::open(dir) {
        out.add(
            "tokenizer",
            format!("{} tokens, vocabulary {}", tokenizer.vocab_size(), short(&tokenizer.vocab_hash())),
        )
        .add(
            "template",
            format!("prefix of {} tokens, switch of {}", tokenizer.prefix().len(), tokenizer.switch().len()),
        );
    }
    Ok(out.text)
}

fn run(dir: &Path) -> Result<String> {
    let path = dir.join("run.json");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let run: Value = serde_json::from_str(&text).with_context(|| {
        hinted(format!("`{}` is no JSON", path.display()), "remove the file; the next stage writes it again")
    })?;
    let mut out = Lines::new(format!("run `{}` in `{}`", run["name"].as_str().unwrap_or("?"), dir.display()));
    let text = |key: &str| run.pointer(key).and_then(Value::as_str).map(str::to_owned);
    for (name, key) in [
        ("recipe", "/recipe_path"),
        ("target", "/target/model"),
        ("proxy", "/proxy/model"),
        ("device", "/device"),
        ("version", "/tool/version"),
    ] {
        if let Some(value) = text(key) {
            out.add(name, value);
        }
    }
    out.add("seed", &run["seed"]);
    out.block("stages");
    for folder in STAGE_FOLDERS {
        let told = match StageDir::read(&dir.join(folder)) {
            Ok(stage) => format!("{}, {}", rows(&stage), human_bytes(stage.index().bytes())),
            Err(_) => "not there yet".to_owned(),
        };
        out.add(folder, told);
    }
    out.add("checkpoints", best_checkpoint(&dir.join("checkpoints")));
    let results = Results::read(&dir.join("eval").join(RESULTS_FILE)).ok();
    out.add("eval", results.as_ref().map_or_else(|| "not there yet".to_owned(), headline));
    for (name, file) in [("export", "export/config.json"), ("report", "report.html")] {
        out.add(
            name,
            if dir.join(file).exists() {
                dir.join(file).display().to_string()
            } else {
                "not there yet".to_owned()
            },
        );
    }
    if let Some(stages) = run["stages"].as_object() {
        out.block("times");
        for (name, record) in stages {
            out.add(name, record["secs"].as_f64().map_or_else(|| "?".to_owned(), human_secs));
        }
    }
    Ok(out.text)
}

fn best_checkpoint(dir: &Path) -> String {
    let look = || -> Result<Option<String>> {
        let store = CheckpointStore::read_only(dir)?;
        let steps: Vec<String> = store.list()?.iter().map(|c| c.step.to_string()).collect();
        let best = store.best_validation()?;
        let best = best.map_or_else(String::new, |(step, v)| format!(", best {step} with {v:.4}"));
        Ok((!steps.is_empty()).then(|| format!("steps {}{best}", steps.join(", "))))
    };
    look().ok().flatten().unwrap_or_else(|| "not there yet".to_owned())
}

/// The mapper's answers at every ratio that was measured.
fn headline(r: &Results) -> String {
    let mut parts = Vec::new();
    if let Some(facts) = &r.facts {
        let cells = facts.cells.iter().filter(|c| c.method == Method::Mapper);
        parts.extend(cells.map(|c| format!("{:.1}% at {}", 100.0 * c.accuracy.mean, c.ratio)));
    }
    if parts.is_empty() {
        format!("labels of {} contexts", r.labels.contexts)
    } else {
        format!("mapper answers {}", parts.join(", "))
    }
}

fn results(path: &Path) -> Result<String> {
    let r = Results::read(path)?;
    let mut out = Lines::new(format!("results `{}`", path.display()));
    out.add("schema", r.schema_version)
        .add("mapper", &r.mapper)
        .add("target", &r.target.name)
        .add("proxy", &r.proxy.name)
        .add("fingerprint", &r.fingerprint)
        .add("labels", format!("{} contexts, {} positions", r.labels.contexts, r.labels.positions));
    if let Some(f) = &r.facts {
        out.add(
            "facts",
            format!(
                "{} questions about {} contexts, full cache {:.1}%",
                f.questions,
                f.contexts,
                100.0 * f.full.mean
            ),
        );
    }
    if let Some(p) = &r.perplexity {
        out.add(
            "perplexity",
            format!("{} contexts, full cache {:.3} nats per token", p.contexts, p.full.mean),
        );
    }
    if let Some(f) = &r.facts {
        out.block("answers");
        for c in &f.cells {
            let at = format!(
                "{:.1}% [{:.1}, {:.1}]",
                100.0 * c.accuracy.mean,
                100.0 * c.accuracy.low,
                100.0 * c.accuracy.high
            );
            let _ =
                writeln!(out.text, "  {:<14} {:<13} {:<6} {at}", c.method.name(), c.policy.name(), c.ratio);
        }
    }
    out.block("recall");
    for c in &r.labels.cells {
        let at = format!(
            "{:.1}% [{:.1}, {:.1}]",
            100.0 * c.recall.mean,
            100.0 * c.recall.low,
            100.0 * c.recall.high
        );
        let _ = writeln!(out.text, "  {:<14} {:<13} {:<6} {at}", c.method.name(), c.policy.name(), c.ratio);
    }
    Ok(out.text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pkv_core::{Split, StoreDtype};
    use pkv_shard::StageWriter;
    use serde_json::json;

    fn write<R: Row>(dir: &Path, stage: &str, rows: Vec<R>, fingerprint: &Fingerprint) {
        let n = rows.len() as u64;
        let stage = StageDir::open(dir, stage, fingerprint).unwrap();
        let mut writer = StageWriter::new(stage, 1, StoreDtype::F32, Some(n)).unwrap();
        for row in rows {
            writer.push(row).unwrap();
        }
        writer.finish().unwrap();
    }

    fn labels(id: &str, scores: &[f32]) -> LabelRow {
        LabelRow {
            id: id.to_owned(),
            layers: 1,
            kv_heads: 2,
            positions: scores.len() as u32 / 2,
            scores: scores.to_vec(),
        }
    }

    #[test]
    fn stages_and_their_shards_are_described() {
        let dir = tempfile::tempdir().unwrap();
        let fingerprint = Fingerprint::new().with("label", json!({"preset": "original"}));
        let rows = vec![labels("first", &[0.1, 0.2, 0.3, 0.9]), labels("second", &[0.5, 0.5])];
        write(dir.path(), "label", rows, &fingerprint);
        let text = inspect(dir.path()).unwrap();
        for part in [
            "stage `label`",
            "2, complete",
            "original",
            "1 layers x 2 KV heads x 2 positions",
            "0.1000 to 0.9000",
            "all hashes match",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        let second = StageDir::read(dir.path()).unwrap().index().shards[1].file.clone();
        let text = inspect(&dir.path().join(&second)).unwrap();
        assert!(text.contains("second") && !text.contains("first"), "{text}");
        let stray = dir.path().join("labels-00077.parquet");
        fs::write(&stray, "x").unwrap();
        assert!(inspect(&stray).unwrap_err().to_string().contains("does not name"));
        fs::write(dir.path().join(&second), "damaged").unwrap();
        assert!(inspect(dir.path()).is_err());
    }

    #[test]
    fn features_are_told_by_channel_and_examples_by_token() {
        let dir = tempfile::tempdir().unwrap();
        let fingerprint = Fingerprint::new()
            .with("extract", json!({"channels": ["max_all", "key_norm"], "globals": ["position"]}));
        let row = FeatureRow {
            id: "a".to_owned(),
            layers: 1,
            kv_heads: 2,
            channels: 2,
            positions: 1,
            heads: vec![1.0, 2.0, 3.0, 4.0],
            globals: vec![7.0],
        };
        write(&dir.path().join("features"), "extract", vec![row], &fingerprint);
        let text = inspect(&dir.path().join("features")).unwrap();
        assert!(text.contains("max_all      1.0000 to 3.0000"), "{text}");
        assert!(
            text.contains("key_norm     2.0000 to 4.0000") && text.contains("position     7.0000"),
            "{text}"
        );
        let example = Example {
            id: "doc-0".to_owned(),
            document: "doc".to_owned(),
            source: "src".to_owned(),
            split: Split::Test,
            window: 0,
            start: 5,
            tokens: vec![3, 1, 4],
            facts: Vec::new(),
        };
        write(&dir.path().join("examples"), "prepare", vec![example], &Fingerprint::new());
        let text = inspect(&dir.path().join("examples")).unwrap();
        assert!(
            text.contains("3, from token 5") && text.contains("[3, 1, 4]") && text.contains("test"),
            "{text}"
        );
    }

    #[test]
    fn a_run_that_has_just_begun_is_described() {
        let dir = tempfile::tempdir().unwrap();
        let run = json!({"name": "r", "seed": 3, "stages": {"prepare": {"secs": 61.0, "summary": null}}});
        fs::write(dir.path().join("run.json"), run.to_string()).unwrap();
        write(&dir.path().join("labels"), "label", vec![labels("a", &[0.1, 0.2])], &Fingerprint::new());
        let text = inspect(dir.path()).unwrap();
        for part in
            ["run `r`", "examples     not there yet", "labels       1, complete", "prepare      1 min 01 s"]
        {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }

    #[test]
    fn what_is_none_of_it_is_refused_with_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        let hint = |e: anyhow::Error| e.downcast_ref::<pkv_core::Hinted>().unwrap().hint().to_owned();
        assert!(hint(inspect(dir.path()).unwrap_err()).contains("a shard"));
        assert!(hint(inspect(&dir.path().join("absent")).unwrap_err()).contains("check the path"));
        let file = dir.path().join("notes.txt");
        fs::write(&file, "x").unwrap();
        assert!(inspect(&file).is_err());
    }
}
