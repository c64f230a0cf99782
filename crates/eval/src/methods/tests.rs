//! The registry as a whole, kvpress's scores, and a method of a test's own from start to kept pairs.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use anyhow::Result;
use pkv_core::{Channel, Fingerprint, Policy, RetentionRatio, Seed, Split, StoreDtype};
use pkv_extract::ContextFeatures;
use pkv_lm::{LanguageModel, LayerView, Tap};
use pkv_mapper::{Mapper, MapperDims, Standardization};
use pkv_prune::keep_mask;
use pkv_recipe::{EvalSection, MapperSection, MethodName, TargetPool, Variant};
use pkv_shard::{Example, ExampleRows, FeatureFolders, FeatureRow, LabelRow, Row, StageDir, StageWriter};
use pkv_test_support::files::nano;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::method::{Fit, Method, Needs, Ready, Start, Watch};
use super::training::{Setup, Target, TrainingContext, TrainingSet};
use super::view::{ContextView, Draw};
use super::{Methods, REGISTRY, check, random};
use crate::stopwatch::Stopwatch;

/// Pairs kept of `scores` `[heads, positions]` when they compete for `ratio` of all pairs.
pub fn kept(scores: &Tensor, ratio: f64) -> Vec<Vec<i64>> {
    let mask = keep_mask(scores, Policy::Pair, RetentionRatio::new(ratio).unwrap());
    (0..scores.size()[0])
        .map(|o| Vec::<i64>::try_from(mask.get(o).nonzero().flatten(0, -1)).unwrap())
        .collect()
}

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[test]
fn every_method_has_a_name_a_meaning_and_something_that_holds_it() {
    let names: BTreeSet<&str> = REGISTRY.iter().map(|m| m.name.name()).collect();
    let meanings: BTreeSet<&str> = REGISTRY.iter().map(|m| m.meaning).collect();
    assert_eq!([names.len(), meanings.len()], [REGISTRY.len(); 2], "each is another's");
    for m in REGISTRY {
        // What the table of answers calls the cache that nothing was taken from.
        assert_ne!(m.name.name(), "full");
        let kebab = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        assert!(
            m.name.name().chars().all(kebab),
            "{}: what is meant by other spellings is found by this",
            m.name
        );
        assert!(m.name.name().len() <= 24, "{}: a name fits beside a chart", m.name);
        assert!(m.meaning.len() > 20 && !m.meaning.ends_with('.'), "{}: {}", m.name, m.meaning);
        let (file, what) = m.held_by;
        let text = std::fs::read_to_string(here(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        assert!(text.contains(what), "{}: `{file}` has no {what}", m.name);
    }
    check(&EvalSection::default().methods).unwrap();
}

#[test]
fn an_unknown_name_is_refused_with_the_nearest_and_all_that_there_are() {
    let refused = |name: &str| {
        let error = check(&[MethodName::RANDOM, MethodName::new(name)]).unwrap_err();
        let hint = error.downcast_ref::<pkv_core::Hinted>().unwrap().hint().to_owned();
        (error.to_string(), hint)
    };
    let (text, hint) = refused("snapvk");
    assert_eq!(text, "`eval.methods` names `snapvk`, which is no method");
    let all: Vec<&str> = REGISTRY.iter().map(|m| m.name.name()).collect();
    assert_eq!(hint, format!("did you mean `snapkv`? methods are {}", all.join(", ")));
    assert!(refused("SnapKV").1.starts_with("did you mean `snapkv`?"));
    assert!(refused("head_prior").1.starts_with("did you mean `head-prior`?"));
    assert!(refused("keydif").1.starts_with("did you mean `keydiff`?"));
    assert!(refused("quest").1.starts_with("methods are"), "nothing is near");
}

/// Two training examples of 20 positions, and a mapper of one channel.
struct Stages {
    examples: ExampleRows,
    mapper: Mapper,
    run: TempDir,
}

const POSITIONS: usize = 20;

impl Stages {
    /// For a target of `layers` x 2 KV heads.
    fn new(layers: usize) -> Self {
        let run = tempfile::tempdir().unwrap();
        let numbers = |n: usize| (0..n).map(|i| (i % 7) as f32 / 8.0 + 0.01).collect::<Vec<f32>>();
        let id = |i: usize| format!("example-{i}");
        let example = |i: usize| Example {
            id: id(i),
            document: "page".to_owned(),
            source: "page".to_owned(),
            split: Split::Train,
            window: 0,
            start: 0,
            tokens: (0..POSITIONS as u32).map(|t| 5 + t).collect(),
            facts: Vec::new(),
        };
        let label = |i: usize| LabelRow {
            id: id(i),
            layers: layers as u32,
            kv_heads: 2,
            positions: POSITIONS as u32,
            scores: numbers(layers * 2 * POSITIONS),
        };
        let feature = |i: usize| FeatureRow {
            id: id(i),
            layers: 1,
            kv_heads: 2,
            channels: 1,
            positions: POSITIONS as u32,
            heads: numbers(2 * POSITIONS),
            globals: Vec::new(),
        };
        let dims = MapperDims { proxy_heads: 2, channels: 1, globals: 0, outputs: layers * 2 };
        let section = MapperSection { variant: Variant::Linear, ..MapperSection::default() };
        let stats = Standardization::identity(&dims);
        let mapper = Mapper::new(&section, dims, stats, Seed(1), Device::Cpu).unwrap();
        Self {
            examples: ExampleRows::open(
                &stage(run.path(), "prepare", (0..2).map(example)),
                &stage(run.path(), "label", (0..2).map(label)),
                &FeatureFolders::one(&stage(run.path(), "extract", (0..2).map(feature))),
            )
            .unwrap(),
            mapper,
            run,
        }
    }

    fn setup<'a>(&'a self, model: &'a LanguageModel, prefix: &'a [u32], chunk: usize) -> Setup<'a> {
        Setup {
            target: Target { model, prefix, prefill_chunk_tokens: chunk },
            mapper: &self.mapper,
            channels: &[Channel::MaxAll],
            pool: TargetPool { width: 1, blend: 0.0 },
            training: TrainingSet { examples: &self.examples, rows: 0..2 },
            seed: Seed(1),
            scorers: self.run.path(),
        }
    }
}

fn stage<R: Row>(run: &Path, name: &str, rows: impl Iterator<Item = R>) -> PathBuf {
    let dir = run.join(name);
    let stage = StageDir::open(&dir, name, &Fingerprint::new().with("stage", name)).unwrap();
    let mut writer = StageWriter::new(stage, 5, StoreDtype::F32, Some(2)).unwrap();
    rows.for_each(|row| writer.push(row).unwrap());
    writer.finish().unwrap();
    dir
}

/// Scores of `context` by `methods`, each `[layers, KV heads, positions]`.
fn scores(registry: &[Method], setup: &Setup, names: &[MethodName], context: &[u32]) -> Vec<Tensor> {
    let methods = Methods::prepare(registry, names, setup).unwrap();
    assert_eq!((methods.needs().labels, methods.needs().prefill), (false, true));
    let mut watches = methods.watches();
    let cache = setup.target.prefill(context, 0, &mut watches).unwrap();
    let shape = setup.target.model.shape();
    let view = ContextView {
        size_lht: [shape.layers as i64, shape.kv_heads as i64, context.len() as i64],
        device: Device::Cpu,
        seed: setup.seed,
        draw: Draw { task: "test", index: 3 },
        label_lht: None,
        features: None,
        prefilled: Some((&cache, setup.target.prefix.len())),
    };
    let scored = methods.score(&view, watches, &mut Stopwatch::new(Device::Cpu)).unwrap();
    assert!(scored.iter().map(|s| s.method).eq(names.iter().copied()));
    scored.into_iter().map(|s| s.scores_lht).collect()
}

fn model(name: &str) -> LanguageModel {
    let folder = match name.strip_prefix("nano-llama-") {
        Some(which) => nano(which),
        None => here("../lm/tests/goldens").join(name),
    };
    LanguageModel::load(&folder, Device::Cpu, Kind::Float).unwrap()
}

fn goldens(path: &str) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(here(path)).unwrap().into_iter().collect()
}

/// On Llama, Qwen2 (bias, YaRN) and Qwen3 (QK-norm), in one chunk and in many, with a prefix and without.
#[test]
fn training_free_methods_give_the_scores_of_kvpress() {
    let files = std::fs::read_dir(here("tests/goldens")).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<PathBuf> = files.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).collect();
    assert!(files.len() >= 2);
    for file in files {
        let name = file.file_stem().unwrap().to_str().unwrap();
        let expected = goldens(&format!("tests/goldens/{name}.safetensors"));
        assert_eq!(expected.len(), 6, "{name}");
        for (which, expected_lht) in &expected {
            let ids = &goldens(&format!("../lm/tests/goldens/{which}.safetensors"))["input_ids"];
            let ids: Vec<u32> = Vec::<i64>::try_from(ids).unwrap().into_iter().map(|id| id as u32).collect();
            let tokens = expected_lht.size()[2] as usize;
            let (target, stages) = (model(which), Stages::new(expected_lht.size()[0] as usize));
            for (prefix, chunk) in [(0, 1000), (0, 3), (7, 64)] {
                let (before, context) = ids[..tokens].split_at(prefix);
                let setup = stages.setup(&target, before, chunk);
                let method = MethodName::new(name);
                let got = scores(REGISTRY, &setup, &[method], context).remove(0);
                let wanted = expected_lht.narrow(2, prefix as i64, context.len() as i64);
                let off = ((got - &wanted).abs() / (wanted.abs() + 1e-2)).max().double_value(&[]);
                assert!(off < 2e-4, "{name}, {which}, prefix {prefix}, chunks of {chunk}: off by {off:e}");
            }
        }
    }
}

#[test]
fn a_context_of_sinks_alone_is_kept_whole() {
    let (target, stages) = (model("arch-qwen2-bias"), Stages::new(3));
    for context in [&[5u32, 6, 7][..], &[5, 6, 7, 8], &[5, 6, 7, 8, 9]] {
        let setup = stages.setup(&target, &[], 2);
        let names = [MethodName::new("expected-attention"), MethodName::new("keydiff")];
        for got in scores(REGISTRY, &setup, &names, context) {
            assert_eq!(got.size(), [3, 2, context.len() as i64]);
            assert_ne!(got.isfinite().all().int64_value(&[]), 0, "{got}");
        }
    }
}

/// Learns how many contexts there are, looks at every layer of both prefills, and scores by it.
#[derive(Default)]
struct MadeUp {
    contexts: i64,
    layers_seen: i64,
}

struct MadeUpWatch {
    learnt: i64,
    tokens: i64,
}

impl<'a> Fit<'a> for MadeUp {
    fn tap<'t>(&'t mut self, _: &'t TrainingContext) -> Option<Box<dyn Tap + 't>> {
        struct Count<'t>(&'t mut i64);
        impl Tap for Count<'_> {
            fn layer(&mut self, _: &LayerView) -> Result<()> {
                *self.0 += 1;
                Ok(())
            }
        }
        Some(Box::new(Count(&mut self.layers_seen)))
    }

    fn add(&mut self, context: &TrainingContext) -> Result<()> {
        assert_eq!((context.tokens.len(), context.y_ot.size()), (POSITIONS, vec![6, POSITIONS as i64]));
        let ContextFeatures { heads_pct, .. } = &context.features;
        assert_eq!(heads_pct.size(), [2, 1, POSITIONS as i64]);
        self.contexts += 1;
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<Ready<'a>> {
        let learnt = 100 * self.contexts + self.layers_seen;
        Ok(Ready::watches(move || MadeUpWatch { learnt, tokens: 0 }).noted(Some("made up".to_owned())))
    }
}

impl Tap for MadeUpWatch {
    fn layer(&mut self, view: &LayerView) -> Result<()> {
        self.tokens = view.k_hkd.size()[1];
        Ok(())
    }
}

impl Watch for MadeUpWatch {
    fn scores(self: Box<Self>, view: &ContextView) -> Result<Tensor> {
        let scores_t = Tensor::arange(view.positions(), (Kind::Float, view.device));
        Ok((scores_t + (1000 * self.learnt + self.tokens) as f64).expand(view.size_lht, false))
    }
}

#[test]
fn a_method_of_ones_own_is_a_registry_line() {
    let own = [
        random::METHOD,
        Method {
            name: MethodName::of("made-up"),
            meaning: "what this test counts, later positions first",
            needs: Needs::PREFILL,
            held_by: (file!(), "struct MadeUp"),
            start: |_| Start::fit(MadeUp::default()),
        },
    ];
    let (target, stages) = (model("arch-qwen2-bias"), Stages::new(3));
    let setup = stages.setup(&target, &[5, 6], 4);
    let names = [MethodName::of("made-up"), MethodName::RANDOM];
    let both = scores(&own, &setup, &names, &[7, 8, 9, 10, 11, 12]);
    // Two contexts, each of as many chunks, each of three layers.
    let (mut done, mut chunks) = (0, 0);
    while done < 2 + POSITIONS {
        done = pkv_lm::prefill_chunk(done, 2 + POSITIONS, 4).end;
        chunks += 1;
    }
    let first = both[0].double_value(&[0, 0, 0]);
    assert_eq!(first, (1000 * (200 + 2 * 3 * chunks) + 8) as f64);
    assert_eq!(kept(&both[0].flatten(0, 1), 0.5), vec![[3, 4, 5]; 6]);
    assert_ne!(both[1].double_value(&[0, 0, 0]), both[1].double_value(&[0, 0, 1]));
    let methods = Methods::prepare(&own, &names, &setup).unwrap();
    let notes: Vec<_> = methods.notes().iter().map(|n| (n.method, n.note.as_str())).collect();
    assert_eq!(notes, [(names[0], "made up")]);
    let unknown = Methods::prepare(&own, &[MethodName::SNAPKV], &setup).err().unwrap();
    assert_eq!(unknown.to_string(), "`eval.methods` names `snapkv`, which is no method");
}

#[test]
fn without_training_examples_what_learns_is_refused_and_the_rest_is_not() {
    let (target, stages) = (model("arch-qwen2-bias"), Stages::new(3));
    let mut setup = stages.setup(&target, &[], 4);
    setup.training.rows = 0..0;
    assert!(Methods::prepare(REGISTRY, &[MethodName::SNAPKV, MethodName::RANDOM], &setup).is_ok());
    for name in ["linear", "head-prior", "iam", "kvzap-linear", "kvzap-mlp"] {
        let refused = Methods::prepare(REGISTRY, &[MethodName::new(name)], &setup).err().unwrap();
        assert_eq!(refused.to_string(), "there is no training example to fit baselines on", "{name}");
    }
}
