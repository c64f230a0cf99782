//! A mapper and the pair that it is used with.

use std::collections::BTreeMap;

use pkv_checkpoint::{EXPORT_VERSION, ExportConfig, ModelIdentity};
use pkv_core::{Fingerprint, Hinted, Seed, Source};
use pkv_infer::check_fit;
use pkv_lm::LmConfig;
use pkv_mapper::MapperDims;
use pkv_recipe::{ExtractSection, LabelSection, LossSection, MapperSection, TrainSection};
use pkv_score::ModelFiles;
use pkv_test_support::files::nano;
use pkv_text::TextTokenizer;

fn found(role: Source, model: &str) -> ModelFiles {
    let folder = nano(model);
    ModelFiles {
        role,
        name: "nano".to_owned(),
        revision: "abc".to_owned(),
        config: LmConfig::from_folder(&folder).unwrap(),
        tokenizer: TextTokenizer::open(&folder).unwrap(),
        folder,
    }
}

fn identity(found: &ModelFiles) -> ModelIdentity {
    ModelIdentity {
        model: "nano".to_owned(),
        revision: "abc".to_owned(),
        dtype: "Float".to_owned(),
        shape: found.config.shape,
        vocab_hash: found.tokenizer.vocab_hash(),
        template_hash: found.tokenizer.template_hash(),
    }
}

fn config(target: &ModelFiles, proxy: &ModelFiles) -> ExportConfig {
    let extract = ExtractSection::default();
    let dims = MapperDims {
        proxy_heads: proxy.config.shape.total_kv_heads(),
        channels: extract.channels.len(),
        globals: extract.globals.len(),
        outputs: target.config.shape.total_kv_heads(),
    };
    ExportConfig {
        schema_version: EXPORT_VERSION,
        written_by: "test".to_owned(),
        name: "nano".to_owned(),
        target: identity(target),
        proxy: Some(identity(proxy)),
        dims: dims.into(),
        label: LabelSection::default(),
        extract,
        mapper: MapperSection::default(),
        loss: LossSection::default(),
        train: TrainSection::default(),
        fingerprint: Fingerprint::new(),
        step: 1,
        validation: None,
        seed: Seed(0),
        trained_tokens: Some(1000),
        files: BTreeMap::new(),
    }
}

#[test]
fn a_mapper_of_another_pair_is_refused_with_what_differs() {
    let (target, proxy) = (found(Source::Target, "target"), found(Source::Proxy, "proxy"));
    let fits = config(&target, &proxy);
    assert!(check_fit(&fits, &target, Some(&proxy)).unwrap().is_empty());

    let refused = |config: &ExportConfig, part: &str| {
        let error = check_fit(config, &target, Some(&proxy)).unwrap_err();
        assert!(format!("{error:#}").contains(part), "`{part}` is not in: {error:#}");
        assert!(error.downcast_ref::<Hinted>().is_some());
    };
    let mut other = fits.clone();
    other.target.shape.layers += 1;
    refused(&other, "the shape of the target");
    let mut other = fits.clone();
    other.proxy.as_mut().unwrap().vocab_hash = "0".repeat(64);
    refused(&other, "the vocabulary of the proxy");
    let mut other = fits.clone();
    other.dims.outputs -= 1;
    refused(&other, "the mapper has 11 target KV heads");
    let mut other = fits.clone();
    other.dims.channels += 1;
    refused(&other, "9 channels");
    // Swapped by mistake.
    let swapped = (found(Source::Target, "proxy"), found(Source::Proxy, "target"));
    let error = check_fit(&fits, &swapped.0, Some(&swapped.1)).unwrap_err();
    assert!(error.to_string().contains("the shape of the target"), "{error}");

    // Other weights or another template are said, not refused.
    let mut other = fits.clone();
    other.target.revision = "def".to_owned();
    other.proxy.as_mut().unwrap().template_hash = "0".to_owned();
    let said = check_fit(&other, &target, Some(&proxy)).unwrap();
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[0].contains("revision abc") && said[1].contains("chat template of the proxy"), "{said:?}");
}
