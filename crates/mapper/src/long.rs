//! Contexts too long for one forward, or not yet known to their end: windows that overlap by the
//! mapper's reach.

use tch::{Kind, Tensor};

use crate::mapper::Mapper;

/// The scores of a context in the making, window by window as its features become final.
///
/// Each window is computed with [`Mapper::reach`] positions more on both sides, which are then
/// cut off, so the result is that of one [`Mapper::predict`] up to the order of additions. No gradient.
pub struct StitchedScores<'a> {
    mapper: &'a Mapper,
    heads_bpct: Tensor,
    globals_bct: Tensor,
    window: i64,
    /// Positions scored.
    done: i64,
    scores_bot: Tensor,
}

impl<'a> StitchedScores<'a> {
    /// # Shapes
    /// - as [`Mapper::forward`]; the features may stay on the CPU, only a window's are moved. They may
    ///   still be written after what [`Self::advance`] was given
    /// - `window`: positions that a forward yields, at least 1; a few times the reach is economical
    ///
    /// # Panics
    /// As [`Mapper::forward`].
    pub fn new(mapper: &'a Mapper, heads_bpct: &Tensor, globals_bct: &Tensor, window: usize) -> Self {
        if let Err(wrong) = mapper.dims().check_features(heads_bpct, globals_bct) {
            panic!("{wrong}");
        }
        let (b, positions) = (heads_bpct.size()[0], heads_bpct.size()[3]);
        let shape = [b, mapper.dims().outputs as i64, positions];
        Self {
            mapper,
            heads_bpct: heads_bpct.shallow_clone(),
            globals_bct: globals_bct.shallow_clone(),
            window: window.max(1) as i64,
            done: 0,
            scores_bot: Tensor::empty(shape, (Kind::Float, mapper.device())),
        }
    }

    /// First position of the next window, how many it scores, and where its features end.
    fn next(&self) -> Option<(i64, i64, i64)> {
        let positions = self.scores_bot.size()[2];
        let len = self.window.min(positions - self.done);
        let end = (self.done + len + self.mapper.reach() as i64).min(positions);
        (len > 0).then_some((self.done, len, end))
    }

    /// Is there a window to score, if the features of the first `settled` positions are final?
    pub fn ready(&self, settled: usize) -> bool {
        self.next().is_some_and(|(.., end)| end <= settled as i64)
    }

    /// Score every window whose features are final; those of the first `settled` positions are.
    ///
    /// Returns how many positions are scored.
    pub fn advance(&mut self, settled: usize) -> usize {
        let _guard = tch::no_grad_guard();
        while self.ready(settled)
            && let Some((start, len, to)) = self.next()
        {
            let from = (start - self.mapper.reach() as i64).max(0);
            let wide = |all: &Tensor| all.narrow(-1, from, to - from);
            let part_bot = self.mapper.predict(&wide(&self.heads_bpct), &wide(&self.globals_bct));
            self.scores_bot.narrow(-1, start, len).copy_(&part_bot.narrow(-1, start - from, len));
            self.done += len;
        }
        self.done as usize
    }

    /// The rest, once all features are final: f32 `[b, outputs, t]`, as [`Mapper::predict`].
    pub fn finish(mut self) -> Tensor {
        let positions = self.scores_bot.size()[2] as usize;
        self.advance(positions);
        self.scores_bot
    }
}

impl Mapper {
    /// [`Mapper::predict`] window by window, with memory that grows with `window` only.
    ///
    /// # Shapes
    /// As [`StitchedScores::new`].
    ///
    /// # Panics
    /// As [`Mapper::forward`].
    pub fn forward_long(&self, heads_bpct: &Tensor, globals_bct: &Tensor, window: usize) -> Tensor {
        StitchedScores::new(self, heads_bpct, globals_bct, window).finish()
    }
}
