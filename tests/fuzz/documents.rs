//! Documents that others wrote: text, JSON lines and Parquet, compressed or not.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::ensure;
use arrow::array::{ArrayRef, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use pkv_core::NoProgress;
use pkv_hub::{Hub, HubOptions};
use pkv_recipe::Override;
use pkv_text::TextTokenizer;
use serde_json::json;

use crate::folder;
use crate::harness::Target;
use crate::sandbox::{self, Sandbox, root};

const FILES: [&str; 5] = ["a.txt", "b.jsonl", "c.jsonl.gz", "d.parquet", "e.txt.zst"];

#[test]
fn documents() {
    let dir = folder("documents");
    let text = sandbox::documents();
    let lines: String =
        text.split('\0').enumerate().map(|(i, t)| format!("{}\n", json!({"id": i, "text": t}))).collect();
    fs::write(dir.join(FILES[0]), &text).unwrap();
    fs::write(dir.join(FILES[1]), &lines).unwrap();
    let mut gzip =
        flate2::write::GzEncoder::new(File::create(dir.join(FILES[2])).unwrap(), flate2::Compression::fast());
    gzip.write_all(lines.as_bytes()).unwrap();
    gzip.finish().unwrap();
    let column: ArrayRef = Arc::new(StringArray::from_iter_values(text.split('\0').collect::<Vec<_>>()));
    let batch = RecordBatch::try_from_iter([("text", column)]).unwrap();
    let mut table =
        ArrowWriter::try_new(File::create(dir.join(FILES[3])).unwrap(), batch.schema(), None).unwrap();
    table.write(&batch).unwrap();
    table.close().unwrap();
    fs::write(dir.join(FILES[4]), zstd::stream::encode_all(text.as_bytes(), 3).unwrap()).unwrap();

    let s = Sandbox::new();
    let recipe = pkv_recipe::load(
        &s.path("recipe.toml"),
        &["data.train=2", "data.validation=1", "data.test=1"].map(Override::from),
    )
    .unwrap();
    let tokenizer = TextTokenizer::open(&root().join("recipes/nano-llama/target")).unwrap();
    let hub = Hub::new(HubOptions { cache: dir.join("cache"), offline: true, ..HubOptions::default() });
    // One at a time, so that a file that is refused hides no other.
    let read = |dir: &Path| {
        let mut refused = None;
        for name in FILES {
            let format = name.split('.').nth(1).unwrap();
            let separator = if format == "txt" { "separator = \"\\u0000\"\n" } else { "" };
            let manifest = format!(
                "description = \"one\"\n[[source]]\nname = \"s\"\nfiles = [\"{name}\"]\nformat = \"{format}\"\n{separator}licence = \"MIT\"\n"
            );
            fs::write(dir.join("manifest.toml"), manifest)?;
            let manifest = pkv_recipe::load_manifest(&dir.join("manifest.toml"))?;
            let mut examples = 0;
            let made = pkv_data::prepare(&recipe, &manifest, &hub, &tokenizer, &NoProgress, &mut |_| {
                examples += 1;
                Ok(())
            });
            match made {
                Ok(summary) => ensure!(summary.examples == examples && examples == 4, "{examples} examples"),
                Err(e) => refused = Some(e),
            }
        }
        refused.map_or(Ok(()), Err)
    };
    Target { name: "documents", folder: &dir, files: &FILES, repair: None, read: &read }.fuzz();
}
