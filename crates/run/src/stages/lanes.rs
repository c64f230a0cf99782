//! Several contexts at once, for models so small that the GPU would wait for the host.
//!
//! A small model reads a short context in less time than the host needs to queue its kernels. Threads
//! that each queue on a CUDA stream of their own then share the GPU: they share the weights too, and a
//! context's numbers do not depend on how many there are.

use pkv_core::ModelShape;
use pkv_gpu::{Event, Stream};
use pkv_lm::{LanguageModel, Placement};

use anyhow::Result;

/// Contexts at once on a GPU whose models and contexts are small.
const LANES: usize = 4;

/// Multiply-adds of a context below which the host is the bottleneck: about a millisecond of an H100 in bf16,
/// and as long as the host needs for the kernels of a few layers.
const SMALL: usize = 400_000_000_000;

/// Number of contexts of about `tokens` tokens to process at once.
pub fn lanes(placement: &Placement, shape: &ModelShape, tokens: usize) -> usize {
    let small = shape.matrix_parameters().saturating_mul(tokens) < SMALL;
    // The streams of a lane are one device's.
    if placement.home().is_cuda() && small && !placement.is_split() { LANES } else { 1 }
}

/// One lane's stream and its handle on the model; it moves to the thread that works there.
pub struct Lane {
    pub model: LanguageModel,
    stream: Option<Stream>,
}

impl Lane {
    /// `n` lanes for `model`, which is loaded when this returns. A single one stays on the stream at hand.
    ///
    /// # Errors
    /// The driver fails.
    pub fn all(model: &LanguageModel, n: usize) -> Result<Vec<Self>> {
        for part in model.placement().parts() {
            Event::now(part.device)?.synchronize()?;
        }
        let stream = || if n > 1 { Stream::pool(model.device(), false).map(Some) } else { Ok(None) };
        (0..n).map(|_| Ok(Self { model: model.share(), stream: stream()? })).collect()
    }

    /// Do `work` on this lane's stream.
    ///
    /// # Errors
    /// Those of the work; the driver fails.
    pub fn on<R>(&self, work: impl FnOnce(&LanguageModel) -> Result<R>) -> Result<R> {
        let _guard = self.stream.map(|stream| stream.enter()).transpose()?;
        work(&self.model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pkv_core::LayerSplit;
    use tch::Device;

    #[test]
    fn only_small_work_on_a_gpu_is_done_in_lanes() {
        let tiny = ModelShape {
            layers: 12,
            kv_heads: 3,
            query_heads: 6,
            head_dim: 64,
            hidden: 384,
            intermediate: 1024,
            vocab: 4096,
        };
        let big = ModelShape { layers: 32, hidden: 4096, intermediate: 14336, ..tiny };
        let on = |device| Placement::whole(device, 12);
        assert_eq!(lanes(&on(Device::Cpu), &tiny, 1000), 1);
        assert_eq!(lanes(&on(Device::Cuda(0)), &tiny, 1000), LANES);
        assert_eq!(lanes(&on(Device::Cuda(0)), &tiny, 100_000), 1);
        assert_eq!(lanes(&on(Device::Cuda(0)), &big, 1000), 1);
        let split = LayerSplit::even(12, 2).unwrap();
        let two = Placement::over(&[Device::Cuda(0), Device::Cuda(1)], &split).unwrap();
        assert_eq!(lanes(&two, &tiny, 1000), 1, "a lane's stream is of one GPU");
    }
}
