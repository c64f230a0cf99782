//! `extract`: features of the proxy.

use anyhow::Result;
use pkv_core::{Channel, Fingerprint, Progress};
use pkv_extract::Extractor;
use pkv_score::Requests;
use pkv_shard::{Example, FeatureRow, StageDir, StageWriter};
use serde_json::json;

use super::lanes::{Lane, lanes};
use super::pump::pump;
use super::to_host::ToHost;
use super::{Outcome, prepare};
use crate::pair::{self, Found};
use crate::session::Session;

pub fn run(s: &Session) -> Result<Outcome> {
    let (target, proxy) = pair::find_both(s)?;
    let (examples, upstream) = prepare::examples(s, &target)?;
    let stage = StageDir::open(&s.run.features(), "extract", &fingerprint(s, &proxy, &upstream))?;
    if stage.is_complete() {
        return Ok(Outcome::Skipped(format!("features of {} examples match the recipe", stage.rows())));
    }
    let model = proxy.load(s)?;
    let requests = Requests::new(&proxy.tokenizer, &s.recipe.label)?;
    let (shape, prefix) = (model.shape(), proxy.tokenizer.prefix());
    let n = lanes(s.device, &shape, s.recipe.data.longest_window());

    let (done, total) = (stage.rows(), examples.len());
    let mut writer = StageWriter::<FeatureRow>::new(
        stage,
        s.recipe.data.shard_examples,
        s.recipe.extract.store,
        Some(total),
    )?;
    let mut tokens = 0;
    let compute = |lane: Lane| {
        let (requests, extract, label) = (&requests, &s.recipe.extract, &s.recipe.label);
        move |example: Example| {
            s.check_stop()?;
            lane.on(|model| {
                let extractor = Extractor::with_requests(model, requests, prefix, extract, label);
                let features = extractor.features(&example.tokens)?;
                let (heads, globals) =
                    (ToHost::begin(&features.heads_pct)?, ToHost::begin(&features.globals_ct)?);
                Ok((example.id, example.tokens.len(), heads, globals))
            })
        }
    };
    s.bar.start("extract", total, done);
    let times = pump(
        s.device,
        done..total,
        |i| examples.get(i),
        Lane::all(&model, n)?.into_iter().map(compute).collect(),
        |(id, positions, heads, globals)| {
            writer.push(FeatureRow {
                id,
                layers: shape.layers as u32,
                kv_heads: shape.kv_heads as u32,
                channels: s.recipe.extract.channels.len() as u32,
                positions: positions as u32,
                heads: heads.wait()?,
                globals: globals.wait()?,
            })?;
            tokens += positions;
            s.bar.advance(1);
            Ok(())
        },
    )?;
    s.bar.finish();
    tracing::info!("extract: {times}");
    writer.finish()?;
    Ok(Outcome::Done(times.add_to(json!({"examples": total, "tokens": tokens}))))
}

/// The features' choices: the examples, the recipe's `extract`, the proxy; and `label` if the proxy
/// repeats its context.
pub fn fingerprint(s: &Session, proxy: &Found, examples: &Fingerprint) -> Fingerprint {
    let fingerprint = Fingerprint::new()
        .with("examples", examples)
        .with("extract", &s.recipe.extract)
        .with("proxy", proxy.fingerprint(s));
    if s.recipe.extract.channels.iter().any(|c: &Channel| c.is_reconstruction()) {
        fingerprint.with("label", s.recipe.label.material())
    } else {
        fingerprint
    }
}
