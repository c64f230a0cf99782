//! The channel of hidden states: its fit against least squares in f64 by another way, its values against the
//! map.

use anyhow::Result;
use pkv_core::Channel;
use pkv_extract::{Extractor, HiddenFit, HiddenProjection};
use pkv_lm::{LanguageModel, LayerView, Tap};
use pkv_recipe::{ExtractSection, LabelSection};
use pkv_score::Requests;
use pkv_test_pair::{device, model as nano_model};
use tch::{Device, Kind, Tensor};

/// What the attention of every layer reads, f64 `[tokens, hidden]`.
#[derive(Default)]
struct Inputs(Vec<Tensor>);

impl Tap for Inputs {
    fn layer(&mut self, view: &LayerView) -> Result<()> {
        self.0.push(view.normed_sm.to_kind(Kind::Double).to_device(Device::Cpu));
        Ok(())
    }
}

fn model() -> LanguageModel {
    nano_model("target", Kind::Float)
}

fn tokens(n: u32, from: u32) -> Vec<u32> {
    (0..n).map(|i| (from + i * i * 7) % 4000).collect()
}

const PREFIX: [u32; 3] = [5, 6, 7];

#[test]
fn the_map_is_the_ridge_solution_and_the_channel_its_values() {
    let _no_grad = tch::no_grad_guard();
    tch::manual_seed(3);
    let model = model();
    let shape = model.shape();
    let (layers, heads) = (shape.layers as i64, shape.kv_heads as i64);
    let contexts = [tokens(140, 11), tokens(90, 500)];
    let labels: Vec<Tensor> = contexts
        .iter()
        .map(|c| Tensor::randn([layers, heads, c.len() as i64], (Kind::Float, device())) * 3.0 - 5.0)
        .collect();
    let mut fit = HiddenFit::new(&model);
    let mut inputs: Vec<Vec<Tensor>> = (0..shape.layers).map(|_| Vec::new()).collect();
    for (context, y_lht) in contexts.iter().zip(&labels) {
        // Chunks that begin within the prefix and end anywhere.
        fit.add(&model, &PREFIX, context, 37, y_lht).unwrap();
        let ids = [&PREFIX[..], context].concat();
        let mut tap = Inputs::default();
        let mut cache = model.new_cache(ids.len());
        model.prefill_for_tap(&ids, &mut cache, ids.len(), &mut tap).unwrap();
        for (all, x_sm) in inputs.iter_mut().zip(tap.0) {
            all.push(x_sm.narrow(0, PREFIX.len() as i64, context.len() as i64));
        }
    }
    let projection = fit.solve().unwrap();
    let expected: Vec<Tensor> =
        inputs.iter().enumerate().map(|(l, x)| least_squares(x, &labels, l)).collect();

    let extract = ExtractSection {
        channels: vec![Channel::KeyNorm, Channel::HiddenLinear],
        prefill_chunk_tokens: 37,
        ..ExtractSection::default()
    };
    let features = |hidden: Option<&HiddenProjection>| {
        let requests = Requests::from_ids(vec![9], vec![9], vec![9], 2048);
        let extractor =
            Extractor::with_requests(&model, &requests, &PREFIX, &extract, &LabelSection::default());
        extractor.with_hidden(hidden)?.features(&contexts[1])
    };
    let found_pct = features(Some(&projection)).unwrap().heads_pct.to_device(Device::Cpu);
    for l in 0..layers {
        let x_sm = &inputs[l as usize][1];
        let ones = Tensor::ones([x_sm.size()[0], 1], (Kind::Double, Device::Cpu));
        let wanted_hs = Tensor::cat(&[x_sm, &ones], 1).matmul(&expected[l as usize]).transpose(0, 1);
        let found_hs = found_pct.narrow(0, l * heads, heads).select(1, 1).to_kind(Kind::Double);
        let off = (wanted_hs.clamp(-16.0, 16.0) - found_hs).abs().max().double_value(&[]);
        assert!(off < 5e-3, "layer {l}: {off}");
    }
    let error = features(None).err().expect("there is no map").to_string();
    assert!(error.contains("hidden_linear"), "{error}");
}

/// The ridge solution by an orthogonal factorization of the rows themselves, `[hidden + 1, heads]`, f64.
fn least_squares(inputs: &[Tensor], labels: &[Tensor], layer: usize) -> Tensor {
    let x = Tensor::cat(inputs, 0);
    let (n, m) = x.size2().unwrap();
    let on = (Kind::Double, Device::Cpu);
    let x = Tensor::cat(&[&x, &Tensor::ones([n, 1], on)], 1);
    let y: Vec<Tensor> = labels
        .iter()
        .map(|y_lht| y_lht.get(layer as i64).transpose(0, 1).to_kind(Kind::Double).to_device(Device::Cpu))
        .collect();
    let y = Tensor::cat(&y, 0);
    let penalty = Tensor::cat(&[Tensor::eye(m, on), Tensor::zeros([m, 1], on)], 1);
    let rows = Tensor::cat(&[x, penalty], 0);
    let wanted = Tensor::cat(&[&y, &Tensor::zeros([m, y.size()[1]], on)], 0);
    let (q, r) = Tensor::linalg_qr(&rows, "reduced");
    r.linalg_solve_triangular(&q.transpose(0, 1).matmul(&wanted), true, true, false)
}

#[test]
fn a_map_survives_its_file_and_another_model_is_refused() {
    let model = model();
    let map = HiddenProjection::random(&model.shape(), device());
    let back = HiddenProjection::from_tensors(&map.tensors(), device()).unwrap().unwrap();
    let x = Tensor::randn([4, model.shape().hidden as i64], (Kind::Float, device()));
    assert_eq!(map.layer(2, &x), back.layer(2, &x));
    assert!(HiddenProjection::from_tensors(&[], device()).unwrap().is_none());
    let narrow = pkv_core::ModelShape { hidden: 64, ..model.shape() };
    let extract = ExtractSection { channels: vec![Channel::HiddenLinear], ..ExtractSection::default() };
    let requests = Requests::from_ids(vec![9], vec![9], vec![9], 2048);
    let extractor = Extractor::with_requests(&model, &requests, &PREFIX, &extract, &LabelSection::default());
    let other = HiddenProjection::random(&narrow, device());
    let error = extractor.with_hidden(Some(&other)).err().expect("another model").to_string();
    assert!(error.contains("64") && error.contains("128"), "{error}");
}
