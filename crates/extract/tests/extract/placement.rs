//! Features of a model whose layers are over several devices.

use pkv_core::{Channel, LayerSplit};
use pkv_extract::{ContextFeatures, Extractor, HiddenFit, HiddenProjection};
use pkv_lm::{LanguageModel, Placement};
use pkv_recipe::{ExtractSection, LabelSection};
use pkv_score::Requests;
use pkv_test_support::files::nano;
use pkv_test_support::tensors::{device_groups, difference};
use tch::{Device, Kind, Tensor};

fn context() -> Vec<u32> {
    (0..170).map(|i| 9 + i * 37 % 300).collect()
}

fn hidden(model: &LanguageModel) -> HiddenProjection {
    tch::manual_seed(3);
    let (shape, context) = (model.shape(), context());
    let size = [shape.layers as i64, shape.kv_heads as i64, context.len() as i64];
    let y_lht = Tensor::randn(size, (Kind::Float, Device::Cpu)).to_device(model.device());
    let mut fit = HiddenFit::new(model);
    fit.add(model, &[1, 2], &context, 60, &y_lht).unwrap();
    fit.solve().unwrap()
}

fn features(model: &LanguageModel, extract: &ExtractSection) -> ContextFeatures {
    let label = LabelSection { chunk_tokens: Some(50), ..LabelSection::default() };
    let requests = Requests::from_ids(vec![3, 4], vec![5], vec![6], label.chunk());
    let hidden = hidden(model);
    let extractor = Extractor::with_requests(model, &requests, &[1, 2], extract, &label);
    let extractor = extractor.with_hidden(Some(&hidden)).unwrap();
    let features = extractor.features(&context()).unwrap();
    assert_eq!(features.heads_pct.device(), model.device());
    features
}

/// All channels at the context's end, and those that are final while the model reads on.
#[test]
fn features_do_not_depend_on_where_layers_are() {
    tch::set_num_threads(1);
    let all = ExtractSection { channels: Channel::ALL.to_vec(), ..ExtractSection::default() };
    let early = [Channel::MaxWindow, Channel::KeyNorm, Channel::ValueNorm];
    let early = ExtractSection { channels: early.to_vec(), ..ExtractSection::default() };
    for (devices, tolerance) in device_groups(1e-3) {
        let whole = LanguageModel::load(&nano("target"), devices[0], Kind::Float).unwrap();
        let split = LayerSplit::even(whole.shape().layers, devices.len()).unwrap();
        let place = |_: &_| Placement::over(&devices, &split);
        let split = LanguageModel::load_over(&nano("target"), Kind::Float, place).unwrap();
        for section in [&all, &early] {
            for chunk in [1000, 45] {
                let extract = ExtractSection {
                    prefill_chunk_tokens: chunk,
                    window_tokens: 16,
                    last_queries: 9,
                    ..section.clone()
                };
                let (a, b) = (features(&whole, &extract), features(&split, &extract));
                for (a, b) in [(&a.heads_pct, &b.heads_pct), (&a.globals_ct, &b.globals_ct)] {
                    let (a, b) = (a.to_device(Device::Cpu), b.to_device(Device::Cpu));
                    let off = difference(&a, &b);
                    assert!(off <= tolerance, "{devices:?}, chunks of {chunk}: off by {off:e}");
                    assert!(tolerance > 0.0 || a.equal(&b));
                }
            }
        }
    }
}
