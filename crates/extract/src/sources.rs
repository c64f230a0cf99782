//! Features of all sources of a recipe, joined into the mapper's input.
//!
//! Dimension key: p KV head (all sources, layers x heads, layer-major), c channel, t context position.

use anyhow::{Context, Result, ensure};
use pkv_core::{FeatureLayout, Source, SourceLayout};
use pkv_lm::{KvCache, LanguageModel, Tap};
use pkv_recipe::{ExtractSection, LabelSection};
use pkv_text::TextTokenizer;
use tch::Tensor;

use crate::{ContextFeatures, Extractor, HiddenProjection};

/// One extractor for each source.
pub struct SourceExtractors<'a> {
    layout: FeatureLayout,
    extractors: Vec<Extractor<'a>>,
}

impl<'a> SourceExtractors<'a> {
    /// `tokenizer` serves target and proxy alike: they share a vocabulary and the chat template's prefix.
    /// `hidden` is read by the channel of hidden states alone.
    ///
    /// # Errors
    /// The recipe takes features from a proxy and there is none, or from hidden states and there is no
    /// projection of them; the tokenizer fails on the texts of the requests.
    pub fn new(
        target: &'a LanguageModel,
        proxy: Option<&'a LanguageModel>,
        tokenizer: &TextTokenizer,
        extract: &ExtractSection,
        label: &LabelSection,
        hidden: Option<&'a HiddenProjection>,
    ) -> Result<Self> {
        let one = |&source: &Source| {
            let model = match source {
                Source::Target => target,
                Source::Proxy => {
                    proxy.context("the mapper reads features of a proxy, and no proxy was loaded")?
                }
            };
            Extractor::new(model, tokenizer, &extract.of(source), label)?.with_hidden(hidden)
        };
        Ok(Self {
            layout: extract.layout(),
            extractors: extract.from.iter().map(one).collect::<Result<_>>()?,
        })
    }

    /// Features of a context, given without the prefix, on the first source's device.
    ///
    /// # Errors
    /// The context is empty, or a model fails on it.
    pub fn features(&self, context: &[u32]) -> Result<ContextFeatures> {
        self.features_beside(context, None)
    }

    /// The target's only prefill, if it is a source: its cache, with room for `capacity` positions, and its
    /// features, which [`SourceExtractors::features_beside`] takes. `tap` sees the same forward pass.
    ///
    /// # Errors
    /// The context is empty, or the model or `tap` fails on it.
    pub fn prefill_target(
        &self,
        context: &[u32],
        capacity: usize,
        tap: &mut dyn Tap,
    ) -> Result<Option<(KvCache, ContextFeatures)>> {
        let Some(at) = self.layout.sources().iter().position(|s| s.source == Source::Target) else {
            return Ok(None);
        };
        let mut stream = self.extractors[at].stream_with_room(context, capacity)?;
        while stream
            .step_beside(tap)
            .with_context(|| format!("prefilling a context of {} tokens", context.len()))?
        {}
        Ok(Some(stream.into_cache_and_features()))
    }

    /// As [`SourceExtractors::features`], those of the target's prefill given where they are there already.
    ///
    /// # Errors
    /// As [`SourceExtractors::features`].
    pub fn features_beside(
        &self,
        context: &[u32],
        mut of_target: Option<ContextFeatures>,
    ) -> Result<ContextFeatures> {
        let one = |(extractor, source): (&Extractor, &SourceLayout)| match source.source {
            Source::Target if of_target.is_some() => of_target.take().context("the target is a source once"),
            _ => extractor.features(context),
        };
        let parts = self.extractors.iter().zip(self.layout.sources()).map(one).collect::<Result<Vec<_>>>()?;
        join_features(parts, &self.layout)
    }
}

/// Features of several sources as the mapper reads them, on the device of the first.
///
/// # Shapes
/// - `parts`: one for each source of `layout`, `[p of the source, its channels, t]` and `[globals, t]`, f32
/// - returns `[p, c, t]` and `[globals, t]` as the layout says, f32; 0 where a source lacks a channel
///
/// # Errors
/// Shapes disagree with the layout or with one another.
pub fn join_features(mut parts: Vec<ContextFeatures>, layout: &FeatureLayout) -> Result<ContextFeatures> {
    ensure!(
        parts.len() == layout.sources().len(),
        "features of {} sources, expected {}",
        parts.len(),
        layout.sources().len()
    );
    if parts.len() == 1 {
        return Ok(parts.remove(0));
    }
    let _no_grad = tch::no_grad_guard();
    let device = parts[0].heads_pct.device();
    let positions = parts[0].heads_pct.size3()?.2;
    let (mut heads, mut globals) = (Vec::new(), Vec::new());
    for (part, source) in parts.iter().zip(layout.sources()) {
        let (p, c, t) = part.heads_pct.size3()?;
        ensure!(
            (c, t) == (source.slots.len() as i64, positions),
            "features of the {} are [{p}, {c}, {t}], expected {} channels and {positions} positions",
            source.source.name(),
            source.slots.len()
        );
        let on = |x: &Tensor| x.to_device(device);
        let index = |rows: &[usize]| {
            let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
            on(&Tensor::from_slice(&rows))
        };
        let here_pct = on(&part.heads_pct);
        let all_pct = here_pct.new_zeros([p, layout.channels().len() as i64, t], (here_pct.kind(), device));
        heads.push(all_pct.index_copy(1, &index(&source.slots), &here_pct));
        globals.push(on(&part.globals_ct).index_select(0, &index(&source.globals)));
    }
    Ok(ContextFeatures { heads_pct: Tensor::cat(&heads, 0), globals_ct: Tensor::cat(&globals, 0) })
}

#[cfg(test)]
mod tests {
    use pkv_core::{Channel, GlobalChannel};
    use tch::{Device, Kind};

    use super::*;

    /// The same rows that shards join, so that training and inference see one input.
    #[test]
    fn tensors_lie_where_the_layout_says() {
        let layout = FeatureLayout::new(
            &[(Source::Target, &[Channel::KeyNorm, Channel::MaxAll]), (Source::Proxy, &[Channel::MaxAll])],
            &[GlobalChannel::Surprisal, GlobalChannel::Position],
        );
        let cpu = (Kind::Float, Device::Cpu);
        let part = |p, c, from: f64| ContextFeatures {
            heads_pct: Tensor::arange(p * c * 3, cpu).view([p, c, 3]) + from,
            globals_ct: Tensor::arange(6, cpu).view([2, 3]) + from / 10.0,
        };
        let joined = join_features(vec![part(2, 2, 100.0), part(4, 1, 500.0)], &layout).unwrap();
        assert_eq!(joined.heads_pct.size(), [6, 2, 3]);
        assert_eq!(joined.heads_pct.narrow(0, 0, 2), part(2, 2, 100.0).heads_pct);
        assert_eq!(joined.heads_pct.narrow(0, 2, 4).narrow(1, 1, 1), part(4, 1, 500.0).heads_pct);
        assert_eq!(
            joined.heads_pct.narrow(0, 2, 4).narrow(1, 0, 1).abs().sum(Kind::Float).double_value(&[]),
            0.0
        );
        assert_eq!(joined.globals_ct.size(), [3, 3]);
        assert_eq!(joined.globals_ct.get(2), part(4, 1, 500.0).globals_ct.get(0));
        let error = join_features(vec![part(2, 2, 0.0), part(4, 2, 0.0)], &layout)
            .err()
            .expect("other channels")
            .to_string();
        assert!(error.contains("proxy") && error.contains("1 channels"), "{error}");
    }
}
