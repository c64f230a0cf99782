//! A mapper and the pair that it is used with.

use std::collections::BTreeMap;

use pkv_checkpoint::{EXPORT_VERSION, ExportConfig, ModelIdentity};
use pkv_core::{Fingerprint, Hinted, ModelShape, Seed};
use pkv_infer::{Side, check_fit};
use pkv_lm::LmConfig;
use pkv_mapper::MapperDims;
use pkv_recipe::{ExtractSection, LabelSection, LossSection, MapperSection, TrainSection};
use pkv_test_support::files::nano;
use pkv_text::TextTokenizer;

struct Found {
    shape: ModelShape,
    tokenizer: TextTokenizer,
}

fn found(model: &str) -> Found {
    Found {
        shape: LmConfig::from_folder(&nano(model)).unwrap().shape,
        tokenizer: TextTokenizer::open(&nano(model)).unwrap(),
    }
}

fn identity(found: &Found) -> ModelIdentity {
    ModelIdentity {
        model: "nano".to_owned(),
        revision: "abc".to_owned(),
        dtype: "Float".to_owned(),
        shape: found.shape,
        vocab_hash: found.tokenizer.vocab_hash(),
        template_hash: found.tokenizer.template_hash(),
    }
}

fn config(target: &Found, proxy: &Found) -> ExportConfig {
    let extract = ExtractSection::default();
    let dims = MapperDims {
        proxy_heads: proxy.shape.total_kv_heads(),
        channels: extract.channels.len(),
        globals: extract.globals.len(),
        outputs: target.shape.total_kv_heads(),
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
    let (target, proxy) = (found("target"), found("proxy"));
    fn side(found: &Found) -> Side<'_> {
        Side { name: "nano", revision: "abc", shape: found.shape, tokenizer: &found.tokenizer }
    }
    let fits = config(&target, &proxy);
    assert!(check_fit(&fits, &side(&target), Some(&side(&proxy))).unwrap().is_empty());

    let refused = |config: &ExportConfig, part: &str| {
        let error = check_fit(config, &side(&target), Some(&side(&proxy))).unwrap_err();
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
    let error = check_fit(&fits, &side(&proxy), Some(&side(&target))).unwrap_err();
    assert!(error.to_string().contains("the shape of the target"), "{error}");

    // Other weights or another template are said, not refused.
    let mut other = fits.clone();
    other.target.revision = "def".to_owned();
    other.proxy.as_mut().unwrap().template_hash = "0".to_owned();
    let said = check_fit(&other, &side(&target), Some(&side(&proxy))).unwrap();
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[0].contains("revision abc") && said[1].contains("chat template of the proxy"), "{said:?}");
}
