//! Shards, mapper and contexts of the nano pair, made from a page of plain text.

use std::path::{Path, PathBuf};

use pkv_core::{Fingerprint, Policy, Seed, Split, Stop, StoreDtype};
use pkv_data::facts::WordLists;
use pkv_data::{FactContext, fact_contexts};
use pkv_eval::EvalInputs;
use pkv_extract::Extractor;
use pkv_lm::LanguageModel;
use pkv_mapper::{Mapper, MapperDims, RidgeAccumulator, StandardizationAccumulator};
use pkv_prune::{log_odds, pool_targets};
use pkv_recipe::{EvalSection, ExtractSection, FactPlace, LabelSection, MapperSection, TargetPool, Variant};
use pkv_score::Scorer;
use pkv_shard::{Example, FeatureFolders, FeatureRow, LabelRow, Row, StageDir, StageWriter};
use pkv_test_pair::{model_on, tokenizer};
use pkv_text::TextTokenizer;
use tch::{Kind, Tensor};
use tempfile::TempDir;

const TRAIN: usize = 8;
const TEST: usize = 4;
const WINDOW: usize = 260;

/// The pair, with everything that stages before the evaluation leave.
pub struct Nano {
    pub target: LanguageModel,
    pub proxy: LanguageModel,
    pub tokenizer: TextTokenizer,
    pub mapper: Mapper,
    pub contexts: Vec<FactContext>,
    pub section: EvalSection,
    pub label: LabelSection,
    pub extract: ExtractSection,
    pub run: TempDir,
}

pub const POOL: TargetPool = TargetPool { width: 3, blend: 0.5 };

impl Nano {
    /// All methods and tasks on `contexts` contexts with three facts each.
    pub fn new(contexts: usize) -> Self {
        let device = pkv_gpu::device(pkv_gpu::DeviceChoice::Auto).unwrap();
        let [target, proxy] = ["target", "proxy"].map(|which| model_on(which, device));
        let tokenizer = tokenizer();
        let section = EvalSection {
            ratios: vec![0.2, 0.05],
            answer_ratios: vec![1.0, 0.2, 0.05],
            answer_policies: vec![Policy::Pair],
            contexts,
            context_tokens: 300,
            facts_per_context: 3,
            continuation_tokens: 32,
            max_answer_tokens: 12,
            bootstrap: 200,
            ..EvalSection::default()
        };
        let (label, extract) = (LabelSection::default(), ExtractSection::default());
        let examples = examples(&tokenizer);
        let run = tempfile::tempdir().unwrap();
        let stages = Stages {
            target: &target,
            proxy: &proxy,
            tokenizer: &tokenizer,
            label: &label,
            extract: &extract,
        };
        let mapper = stages.write(run.path(), &examples);
        let test: Vec<Example> = examples.iter().filter(|e| e.split == Split::Test).cloned().collect();
        let contexts =
            fact_contexts(&test, &WordLists::built_in(), &section, FactPlace::Sentence, &tokenizer, Seed(11))
                .unwrap();
        Self { target, proxy, tokenizer, mapper, contexts, section, label, extract, run }
    }

    pub fn stage(&self, name: &str) -> PathBuf {
        self.run.path().join(name)
    }

    /// Evaluate into `out`, with the given parts of it.
    pub fn inputs<'a>(
        &'a self,
        stages: &'a [PathBuf; 3],
        contexts: &'a [FactContext],
        out: &'a Path,
    ) -> EvalInputs<'a> {
        EvalInputs {
            target: &self.target,
            proxy: Some(&self.proxy),
            hidden: None,
            tokenizer: &self.tokenizer,
            mapper: &self.mapper,
            mapper_source: "ridge".to_owned(),
            target_name: "nano-llama-target".to_owned(),
            proxy_name: Some("nano-llama-proxy".to_owned()),
            examples: &stages[0],
            labels: &stages[1],
            features: FeatureFolders::one(&stages[2]),
            fact_contexts: contexts,
            benchmarks: &[],
            section: &self.section,
            label: &self.label,
            extract: &self.extract,
            budgets: pkv_eval::Budgets::Learned(50),
            pool: POOL,
            seed: Seed(11),
            fingerprint: Fingerprint::new().with("eval", &self.section),
            base: Fingerprint::new().with("pair", "nano"),
            out,
            worker: None,
            max_failures: 1,
            stop: Stop::default(),
            warn: &|_| {},
        }
    }

    pub fn stages(&self) -> [PathBuf; 3] {
        ["examples", "labels", "features"].map(|s| self.stage(s))
    }
}

/// Overlapping windows of the page: training first, then test.
fn examples(tokenizer: &TextTokenizer) -> Vec<Example> {
    let tokens = tokenizer.encode(include_str!("text.txt")).unwrap();
    let n = TRAIN + TEST;
    let step = (tokens.len() - WINDOW) / (n - 1);
    (0..n)
        .map(|i| Example {
            id: format!("example-{i}"),
            document: format!("document-{i}"),
            source: "page".to_owned(),
            split: if i < TRAIN { Split::Train } else { Split::Test },
            window: 0,
            start: (i * step) as u64,
            tokens: tokens[i * step..i * step + WINDOW].to_vec(),
            facts: Vec::new(),
        })
        .collect()
}

struct Stages<'a> {
    target: &'a LanguageModel,
    proxy: &'a LanguageModel,
    tokenizer: &'a TextTokenizer,
    label: &'a LabelSection,
    extract: &'a ExtractSection,
}

impl Stages<'_> {
    /// Write all three stages; the mapper returned is the ridge solution on the training examples.
    fn write(&self, run: &Path, examples: &[Example]) -> Mapper {
        let _no_grad = tch::no_grad_guard();
        let scorer = Scorer::new(self.target, self.tokenizer, self.label).unwrap();
        let extractor = Extractor::new(self.proxy, self.tokenizer, self.extract, self.label).unwrap();
        let (target, proxy) = (self.target.shape(), self.proxy.shape());
        let dims = MapperDims {
            proxy_heads: proxy.total_kv_heads(),
            channels: self.extract.channels.len(),
            globals: self.extract.globals.len(),
            outputs: target.total_kv_heads(),
        };
        let (mut labels, mut features, mut seen) = (Vec::new(), Vec::new(), Vec::new());
        for e in examples {
            let scores_lht = scorer.score(&e.tokens).unwrap().max_lht;
            let f = extractor.features(&e.tokens).unwrap();
            labels.push(LabelRow {
                id: e.id.clone(),
                layers: target.layers as u32,
                kv_heads: target.kv_heads as u32,
                positions: e.tokens.len() as u32,
                scores: numbers(&scores_lht),
            });
            features.push(FeatureRow {
                id: e.id.clone(),
                layers: proxy.layers as u32,
                kv_heads: proxy.kv_heads as u32,
                channels: dims.channels as u32,
                positions: e.tokens.len() as u32,
                heads: numbers(&f.heads_pct),
                globals: numbers(&f.globals_ct),
            });
            if e.split == Split::Train {
                let y_ot = pool_targets(&log_odds(&scores_lht), &POOL).flatten(0, 1);
                seen.push((f.heads_pct.unsqueeze(0), f.globals_ct.unsqueeze(0), y_ot.unsqueeze(0)));
            }
        }
        store(&run.join("examples"), "prepare", examples.to_vec());
        store(&run.join("labels"), "label", labels);
        store(&run.join("features"), "extract", features);

        let mut moments = StandardizationAccumulator::new(dims);
        seen.iter().for_each(|(x, g, y)| moments.add(x, g, y).unwrap());
        let stats = moments.finish().unwrap();
        let section = MapperSection { variant: Variant::Linear, ..MapperSection::default() };
        let mut sums = RidgeAccumulator::new(dims, &stats, self.target.device()).unwrap();
        seen.iter().for_each(|(x, g, y)| sums.add(x, g, y).unwrap());
        let (weight, bias) = sums.solve(section.ridge).unwrap();
        let mut mapper = Mapper::new(&section, dims, stats, Seed(1), self.target.device()).unwrap();
        mapper.set_linear(&weight, &bias).unwrap();
        mapper
    }
}

/// One complete stage of `rows`, f32 so that nothing is lost to rounding.
pub fn store<R: Row>(dir: &Path, name: &str, rows: Vec<R>) {
    let stage = StageDir::open(dir, name, &Fingerprint::new().with("stage", name)).unwrap();
    let mut writer = StageWriter::new(stage, 5, StoreDtype::F32, Some(rows.len() as u64)).unwrap();
    rows.into_iter().for_each(|row| writer.push(row).unwrap());
    writer.finish().unwrap();
}

fn numbers(x: &Tensor) -> Vec<f32> {
    Vec::try_from(x.to_kind(Kind::Float).to_device(tch::Device::Cpu).flatten(0, -1).contiguous()).unwrap()
}
