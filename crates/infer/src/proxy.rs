//! The proxy's side: features of the context, and the mapper's scores if it reads no other source.
//!
//! The mapper may run beside the proxy, in a thread and a stream of its own: it then scores a window as
//! soon as the features of the window and of the mapper's reach around it are final. How early that is
//! depends on the channels ([`pkv_extract::FeatureStream`]): with the default ones nothing is final
//! before the proxy has read all, and only the target's prefill can hide the mapper.
//!
//! Dimension key: l layer, h KV head, t context position, p proxy KV head, c channel, o target KV head.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, Result, bail};
use pkv_core::{ModelShape, Stop};
use pkv_extract::{ContextFeatures, Extractor};
use pkv_gpu::Event;
use pkv_lm::LanguageModel;
use pkv_mapper::{Mapper, StitchedScores};
use pkv_recipe::plan::SHARED_CHUNK;
use pkv_recipe::{ExtractSection, LabelSection};
use pkv_score::Requests;
use tch::{Device, Tensor};

use crate::lane::Lane;
use crate::timeline::Timeline;
use crate::worker::Worker;

/// Device, streams and conditions under which a source works.
#[derive(Clone)]
pub struct Situation {
    pub timeline: Arc<Timeline>,
    /// The proxy's lane; its stream is the thread's current one while a source works.
    pub lane: Lane,
    pub stop: Stop,
}

/// Contribution of a source to the scores of a context's KV pairs.
pub enum Given {
    /// The scores: f32 `[layers, KV heads, positions]` of the target, higher means keep.
    Scores(Tensor),
    /// Features of the proxy, for a mapper that reads the target's as well
    /// ([`TargetSide`](crate::TargetSide)).
    Features(ContextFeatures),
    /// Nothing: the mapper reads the target alone.
    Nothing,
}

/// A source of scores that works before or during the target's prefill, independent of it.
pub trait ScoreSource: Send {
    /// Its device.
    fn device(&self) -> Device;

    /// Its contribution to the scores of a context, given without the prefix; finished: another stream may
    /// read it.
    ///
    /// # Errors
    /// Any failure; the regime then keeps the whole cache.
    fn score(&mut self, context: &[u32], at: &Situation) -> Result<Given>;
}

/// The source of a mapper that reads the target alone.
pub struct NoProxy(pub Device);

impl ScoreSource for NoProxy {
    fn device(&self) -> Device {
        self.0
    }

    fn score(&mut self, _: &[u32], _: &Situation) -> Result<Given> {
        Ok(Given::Nothing)
    }
}

/// Parts of the proxy's side.
pub struct ProxyParts {
    pub proxy: LanguageModel,
    /// Absent if the mapper reads the target's features as well; the proxy's are then handed over.
    pub mapper: Option<Mapper>,
    /// Tokens of the proxy's chat template before the context.
    pub prefix: Vec<u32>,
    /// Repeat requests to the proxy; only reconstruction channels need them.
    pub requests: Requests,
    /// As the mapper was trained.
    pub extract: ExtractSection,
    pub label: LabelSection,
    pub target: ModelShape,
    /// Positions that the mapper scores in one forward.
    pub window_tokens: usize,
}

/// Features of a proxy, mapped to the target's scores.
pub struct ProxyMapper {
    proxy: LanguageModel,
    prefix: Vec<u32>,
    requests: Requests,
    extract: ExtractSection,
    label: LabelSection,
    mapper: MapperSide,
    target: ModelShape,
    window_tokens: usize,
}

enum MapperSide {
    /// Elsewhere: the features are handed over.
    None,
    /// After the proxy, on its lane.
    After(Box<Mapper>),
    /// Beside it, with a lane of its own.
    Beside(Worker<Mapper>, Lane),
}

/// Message to the mapper's thread: features before this position are final once the event is reached.
type Settled = (usize, Event);

impl ProxyMapper {
    /// The mapper works one step later than the proxy.
    pub fn new(parts: ProxyParts) -> Self {
        let ProxyParts { proxy, mapper, prefix, requests, extract, label, target, window_tokens } = parts;
        let mapper = mapper.map_or(MapperSide::None, |mapper| MapperSide::After(Box::new(mapper)));
        Self { proxy, prefix, requests, extract, label, mapper, target, window_tokens }
    }

    /// Read contexts in smaller chunks, for a proxy that shares its device with a target at work: activations
    /// take less of the memory that the two compete for, and what is extracted is the same.
    pub fn sharing_device(mut self) -> Self {
        let chunk = &mut self.extract.prefill_chunk_tokens;
        *chunk = (*chunk).min(SHARED_CHUNK);
        self
    }

    /// Let the mapper work beside the proxy: it starts on the first window of features that is final.
    ///
    /// # Errors
    /// The system has no thread left, or the GPU no stream.
    pub fn overlapped(mut self) -> Result<Self> {
        if let MapperSide::After(mapper) = self.mapper {
            let lane = Lane::beside("mapper", mapper.device())?;
            self.mapper = MapperSide::Beside(Worker::new("mapper", *mapper)?, lane);
        }
        Ok(self)
    }
}

impl ScoreSource for ProxyMapper {
    fn device(&self) -> Device {
        self.proxy.device()
    }

    fn score(&mut self, context: &[u32], at: &Situation) -> Result<Given> {
        let _no_grad = tch::no_grad_guard();
        let Self { proxy, requests, prefix, extract, label, .. } = self;
        let extractor = Extractor::with_requests(proxy, requests, prefix, extract, label);
        let scores_bot = match &self.mapper {
            MapperSide::None => return read(&extractor, context, at).map(Given::Features),
            MapperSide::After(mapper) => after(&extractor, mapper, self.window_tokens, context, at),
            MapperSide::Beside(mapper, lane) => {
                beside(&extractor, mapper, *lane, self.window_tokens, context, at)
            }
        }?;
        let ModelShape { layers, kv_heads, .. } = self.target;
        let size = [layers as i64, kv_heads as i64, context.len() as i64];
        Ok(Given::Scores(scores_bot.view(size)))
    }
}

/// The proxy's features of a context; its cache is gone afterwards.
fn read(extractor: &Extractor, context: &[u32], at: &Situation) -> Result<ContextFeatures> {
    at.timeline.time(&at.lane, "features", || {
        let mut stream = extractor.stream(context)?;
        while stream.step()? {
            at.stop.check()?;
        }
        Ok(stream.into_features())
    })
}

/// The mapper after the proxy; the proxy's cache is gone by then.
fn after(
    extractor: &Extractor,
    mapper: &Mapper,
    window: usize,
    context: &[u32],
    at: &Situation,
) -> Result<Tensor> {
    let features = read(extractor, context, at)?;
    let lane = Lane::here("mapper", at.lane.device())?;
    at.timeline.time(&lane, "scores", || {
        let (heads, globals) = (features.heads_pct.unsqueeze(0), features.globals_ct.unsqueeze(0));
        mapper.dims().check_features(&heads, &globals)?;
        Ok(mapper.forward_long(&heads, &globals, window))
    })
}

/// The mapper beside the proxy.
fn beside(
    extractor: &Extractor,
    mapper: &Worker<Mapper>,
    lane: Lane,
    window: usize,
    context: &[u32],
    at: &Situation,
) -> Result<Tensor> {
    let mut stream = extractor.stream(context)?;
    let (to_mapper, incoming) = channel::<Settled>();
    let (heads, globals) = (stream.heads_pct().unsqueeze(0), stream.globals_ct().unsqueeze(0));
    let (timeline, positions) = (Arc::clone(&at.timeline), context.len());
    let pending = mapper.start(move |mapper| {
        let _current = lane.enter()?;
        mapper.dims().check_features(&heads, &globals)?;
        let stitched = StitchedScores::new(mapper, &heads, &globals, window);
        as_they_settle(stitched, &incoming, positions, &lane, &timeline)
    });
    let read = at.timeline.time(&at.lane, "features", || {
        let mut sent = 0;
        while {
            let more = stream.step()?;
            if stream.settled() > sent {
                sent = stream.settled();
                send_settled(&to_mapper, sent, &at.lane)?;
            }
            more
        } {
            at.stop.check()?;
        }
        Ok(())
    });
    // Without a sender the mapper's thread ends; it must, because it shares the features.
    drop(to_mapper);
    let scores = pending.wait();
    read?;
    scores.context("the mapper failed")
}

fn send_settled(to_mapper: &Sender<Settled>, settled: usize, lane: &Lane) -> Result<()> {
    let mut event = Event::new(false)?;
    event.record(lane.stream())?;
    // A mapper that failed has closed the channel; its error comes when it is waited for.
    let _ = to_mapper.send((settled, event));
    Ok(())
}

fn as_they_settle(
    mut stitched: StitchedScores,
    incoming: &Receiver<Settled>,
    positions: usize,
    lane: &Lane,
    timeline: &Timeline,
) -> Result<Tensor> {
    let mut known = 0;
    for (settled, event) in incoming {
        lane.stream().wait(&event)?;
        known = settled;
        if stitched.ready(settled) {
            timeline.time(lane, "scores", || {
                stitched.advance(settled);
                Ok(())
            })?;
        }
    }
    if known < positions {
        bail!("the proxy stopped after the features of {known} of {positions} positions");
    }
    let scores = stitched.finish();
    lane.settle()?;
    Ok(scores)
}
