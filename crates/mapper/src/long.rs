//! Contexts too long for one forward: windows that overlap by the mapper's reach.

use tch::{Kind, Tensor};

use crate::mapper::Mapper;

impl Mapper {
    /// [`Mapper::forward`] window by window, with memory that grows with `window` only.
    ///
    /// Each window is computed with [`Mapper::reach`] positions more on both sides, which are then
    /// cut off, so the result is that of one forward up to the order of additions. No gradient.
    ///
    /// # Shapes
    /// - as [`Mapper::forward`]; the features may stay on the CPU, only a window's are moved
    /// - `window`: positions that a forward yields, at least 1; a few times the reach is economical
    ///
    /// # Panics
    /// As [`Mapper::forward`].
    pub fn forward_long(&self, heads_bpct: &Tensor, globals_bct: &Tensor, window: usize) -> Tensor {
        let _guard = tch::no_grad_guard();
        let positions = heads_bpct.size().last().copied().unwrap_or(0);
        let (window, reach) = (window.max(1) as i64, self.reach() as i64);
        if positions <= window {
            return self.forward(heads_bpct, globals_bct);
        }
        let shape = [heads_bpct.size()[0], self.dims().outputs as i64, positions];
        let scores_bot = Tensor::empty(shape, (Kind::Float, self.device()));
        for start in (0..positions).step_by(window as usize) {
            let len = window.min(positions - start);
            let from = (start - reach).max(0);
            let wide = (start + len + reach).min(positions) - from;
            let part_bot =
                self.forward(&heads_bpct.narrow(-1, from, wide), &globals_bct.narrow(-1, from, wide));
            scores_bot.narrow(-1, start, len).copy_(&part_bot.narrow(-1, start - from, len));
        }
        scores_bot
    }
}
