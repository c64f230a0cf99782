//! The pair, its mapper, and the questions; sources that misbehave.

use anyhow::{Result, bail};
use pkv_core::{Policy, RetentionRatio, Seed, Source, Stop};
use pkv_infer::{
    Answer, Budget, Given, Keep, PrefillInput, Prefilled, ProxyMapper, ProxyParts, Question, ScoreSource,
    Situation, TargetSide, answer,
};
use pkv_lm::LanguageModel;
use pkv_mapper::{Mapper, MapperDims, Standardization};
use pkv_recipe::{ExtractSection, LabelSection, MapperSection};
use pkv_score::Requests;
use pkv_test_pair::model_on;
use tch::{Device, Kind, Tensor};

pub use pkv_test_pair::tokenizer;

pub fn device() -> Device {
    pkv_gpu::device(pkv_gpu::DeviceChoice::Auto).unwrap()
}

/// The proxy's device where it has one of its own: a second GPU if there is one, else the only device.
pub fn beside() -> Device {
    match device() {
        Device::Cuda(gpu) if pkv_gpu::cuda_count() > 1 => Device::Cuda((gpu + 1) % pkv_gpu::cuda_count()),
        only => only,
    }
}

pub fn load(model: &str) -> LanguageModel {
    model_on(model, device())
}

/// Another mapper with the same weights.
pub fn copy(mapper: &Mapper) -> Mapper {
    copy_to(mapper, mapper.device())
}

pub fn copy_to(mapper: &Mapper, device: Device) -> Mapper {
    let stats = Standardization::from_buffers(&mapper.buffers()).unwrap();
    let (section, dims) = (mapper.section(), *mapper.dims());
    let twin = Mapper::new(section, dims, stats, Seed(0), device).unwrap();
    twin.load_parameters(mapper.parameters()).unwrap();
    twin
}

/// A mapper whose scores look along time and differ from pair to pair, untrained.
pub fn random_mapper(extract: &ExtractSection) -> Mapper {
    let layout = extract.layout();
    // The nano target has 6 x 2 KV heads, its proxy 3 x 1.
    let heads = usize::from(layout.has(Source::Proxy)) * 3 + usize::from(layout.has(Source::Target)) * 12;
    let dims = MapperDims {
        proxy_heads: heads,
        channels: layout.channels().len(),
        globals: layout.globals(),
        outputs: 12,
    };
    let section =
        MapperSection { head_width: 8, width: 16, cross_width: 8, cross_heads: 2, ..Default::default() };
    let stats = Standardization::identity(&dims);
    let mapper = Mapper::new(&section, dims, stats, Seed(5), device()).unwrap();
    let _no_grad = tch::no_grad_guard();
    tch::manual_seed(11);
    for (_, parameter) in mapper.parameters() {
        // Outputs start at zero; these must not.
        let noise = parameter.randn_like() * 0.2;
        let _ = parameter.shallow_clone().g_add_(&noise);
    }
    mapper
}

/// The real source: `mapper`, and the nano proxy on its device.
pub fn source(mapper: Mapper, extract: &ExtractSection, window: usize) -> ProxyMapper {
    let device = mapper.device();
    proxy_side(Some(mapper), device, extract, window)
}

/// The proxy on `device`: with a mapper it gives scores, without one features.
pub fn proxy_side(
    mapper: Option<Mapper>,
    device: Device,
    extract: &ExtractSection,
    window: usize,
) -> ProxyMapper {
    let label = LabelSection::default();
    let tokenizer = tokenizer();
    ProxyMapper::new(ProxyParts {
        proxy: model_on("proxy", device),
        mapper,
        prefix: tokenizer.prefix().to_vec(),
        requests: Requests::new(&tokenizer, &label).unwrap(),
        extract: extract.clone(),
        label,
        target: load("target").shape(),
        window_tokens: window,
    })
}

/// A mapper that reads the target's own prefill.
pub fn target_side(mapper: &Mapper, extract: &ExtractSection, window: usize) -> TargetSide {
    let label = LabelSection::default();
    let requests = Requests::new(&tokenizer(), &label).unwrap();
    TargetSide::new(copy(mapper), extract, &label, requests, None, window)
}

pub fn keep(ratio: f64, policy: Policy) -> Keep<'static> {
    Keep { budget: Budget::Ratio(RetentionRatio::new(ratio).unwrap()), policy, budgets: None, recent: 0 }
}

/// A context as regimes take it; never stopped.
pub fn context<'a>(
    target: &'a LanguageModel,
    prefix: &'a [u32],
    tokens: &'a [u32],
    keep: Keep<'a>,
) -> PrefillInput<'a> {
    PrefillInput {
        target,
        prefix,
        tokens,
        keep,
        chunk_tokens: 128,
        room_tokens: 16,
        target_side: None,
        stop: Stop::default(),
    }
}

/// Words the small models know.
pub fn text(n: usize) -> Vec<u32> {
    let words =
        "The keeper of the tower opens the gate, counts the ships in the harbour and writes them down. ";
    let ids = tokenizer().encode(&words.repeat(1 + n / 15)).unwrap();
    assert!(ids.len() >= n);
    ids[..n].to_vec()
}

pub fn ask(target: &LanguageModel, prefilled: &mut Prefilled, question: &str) -> Result<Answer> {
    let tokenizer = tokenizer();
    let question = Question::new(question, &tokenizer, 12)?;
    answer(target, &tokenizer, &mut prefilled.cache, &question, &Stop::default(), &mut |_| Ok(()))
}

/// What a source does instead of scoring.
pub enum Misbehaviour {
    Error,
    Panic,
    NotFinite,
    WrongShape,
    /// Right scores, at once.
    Nothing,
    /// Right scores, so long after the target has done its part.
    Late(std::time::Duration),
}

pub struct Misbehaving(pub Misbehaviour);

impl ScoreSource for Misbehaving {
    fn device(&self) -> Device {
        device()
    }

    fn score(&mut self, context: &[u32], at: &Situation) -> Result<Given> {
        let scores = Tensor::arange(12 * context.len() as i64, (Kind::Float, device())).view([6, 2, -1]);
        match self.0 {
            Misbehaviour::Error => bail!("the proxy's GPU fell off the bus"),
            Misbehaviour::Panic => panic!("the proxy's GPU fell off the bus"),
            Misbehaviour::NotFinite => {
                let _ = scores.get(2).get(1).narrow(0, 0, 1).fill_(f64::NAN);
                Ok(Given::Scores(scores))
            }
            Misbehaviour::WrongShape => Ok(Given::Scores(scores.view([2, 6, -1]))),
            Misbehaviour::Nothing => Ok(Given::Scores(scores)),
            Misbehaviour::Late(time) => {
                while !at.timeline.phases().iter().any(|p| (p.lane, p.name) == ("target", "prefill")) {
                    std::thread::yield_now();
                }
                std::thread::sleep(time);
                Ok(Given::Scores(scores))
            }
        }
    }
}
