//! A target that one GPU does not hold, its layers laid over several: memory of each, and the time that a
//! pipeline of chunks takes.
//!
//! Chunks of a context, and packs of its repeat, pass through the GPUs one after the other, each GPU working
//! on another one. A GPU waits while the first chunk is on its way to it and after the last has left it: of
//! `n` chunks over `k` GPUs, `n + k - 1` turns of `1 / (n k)` of the work each. An answer is decoded token by
//! token, and gains nothing.

use pkv_core::{LayerNeeds, LayerSplit, ModelShape, Source};
use serde::{Deserialize, Serialize};

use super::cost::{self, Repeat, ScorerWork};
use super::stages::{Reading, TEMPLATE_TOKENS};
use super::{Machine, element_bytes};
use crate::Recipe;

/// Caches are allocated in steps of as many positions.
const CACHE_STEP: usize = 1024;

/// A target over several GPUs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SplitPlan {
    /// Whether one GPU holds it, if its memory is known.
    pub fits_one: Option<bool>,
    /// Memory that one GPU would need for all layers.
    pub one_bytes: u64,
    pub devices: Vec<DevicePlan>,
    /// Share of the time that the GPUs work, at the longest window; the rest is the pipeline's fill.
    pub busy: f64,
}

/// What one GPU holds of the target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DevicePlan {
    /// The first layer, and the one after the last.
    pub first_layer: usize,
    pub end_layer: usize,
    /// The embedding with the first, the head with the last.
    pub weight_bytes: u64,
    pub cache_bytes: u64,
    /// What is alive while a layer works, and what is gathered from all layers.
    pub working_bytes: u64,
    pub peak_bytes: u64,
    pub fits: Option<bool>,
}

/// Memory of a target that holds a context, by where it is needed.
#[derive(Clone, Copy, Debug)]
pub struct TargetMemory {
    shape: ModelShape,
    /// Bytes of a weight, and of an element of the cache.
    width: u64,
    /// Of the cache.
    positions: usize,
    /// Alive while a layer works.
    working: u64,
    /// f32 numbers of a layer that are gathered from all layers on the last device.
    gathered: u64,
    /// Beside the target, on the last device.
    beside: u64,
}

impl TargetMemory {
    /// While a cache of `positions` is there, and nothing is at work.
    pub fn at_rest(shape: ModelShape, width: u64, positions: usize) -> Self {
        Self { shape, width, positions, working: 0, gathered: 0, beside: 0 }
    }

    /// With as many bytes alive while a layer works.
    #[must_use]
    pub const fn working(self, working: u64) -> Self {
        Self { working, ..self }
    }

    /// With as many f32 numbers of every layer that are gathered on the last device.
    #[must_use]
    pub const fn gathering(self, gathered: u64) -> Self {
        Self { gathered, ..self }
    }

    /// With as many bytes beside it on the last device.
    #[must_use]
    pub const fn beside(self, beside: u64) -> Self {
        Self { beside, ..self }
    }

    /// With as many bytes more beside it on the last device.
    #[must_use]
    pub const fn more_beside(self, more: u64) -> Self {
        Self { beside: self.beside + more, ..self }
    }

    /// In `label`, on contexts of at most `tokens`.
    pub fn of_label(recipe: &Recipe, tokens: usize, machine: &Machine, scorer: ScorerWork) -> Self {
        let (shape, section) = (recipe.target.shape, &recipe.label);
        let width = element_bytes(recipe.target.dtype, machine);
        let by = Repeat::new(section, TEMPLATE_TOKENS, scorer);
        let new = tokens.min(section.prefill_chunk_tokens.max(by.scoring_tokens(tokens)));
        let working = cost::activation_elements(&shape, new) * width + 4 * by.score_elements(&shape, tokens);
        let channels = match recipe.labels_give_features(TEMPLATE_TOKENS) {
            true => recipe.extract.of(Source::Target).channels.len(),
            false => 0,
        };
        Self::at_rest(shape, width, tokens + TEMPLATE_TOKENS)
            .working(working)
            .gathering((shape.kv_heads * tokens * channels.max(1)) as u64)
    }

    /// In `infer`, for a context of `tokens`; the proxy is beside the target's last layers.
    pub fn of_infer(recipe: &Recipe, tokens: usize, machine: &Machine) -> Self {
        let (shape, width) = (recipe.target.shape, element_bytes(recipe.target.dtype, machine));
        let new = tokens.min(recipe.label.prefill_chunk_tokens);
        let own = Reading::all(recipe).find(|(source, _)| *source == Source::Target);
        let channels = own.map_or(0, |_| recipe.extract.of(Source::Target).channels.len());
        let proxy = Reading::all(recipe).find(|(source, _)| *source == Source::Proxy);
        Self::at_rest(shape, width, tokens + TEMPLATE_TOKENS)
            .working(cost::activation_elements(&shape, new) * width)
            .gathering((shape.kv_heads * tokens * channels.max(1)) as u64)
            .beside(proxy.map_or(0, |(_, reading)| reading.weights(machine)))
    }

    /// The same, as a split asks for it.
    pub fn needs(&self) -> LayerNeeds {
        LayerNeeds {
            layer: self.layer_weights() + self.layer_cache() + 4 * self.gathered,
            first: self.matrix(),
            last: self.matrix() + 4 * self.gathered * self.shape.layers as u64 + self.beside,
            each: self.working,
        }
    }

    fn layer_weights(&self) -> u64 {
        (self.shape.matrix_parameters() / self.shape.layers.max(1)) as u64 * self.width
    }

    fn layer_cache(&self) -> u64 {
        let elements = 2 * self.shape.kv_heads * self.shape.head_dim;
        (elements * self.positions.next_multiple_of(CACHE_STEP)) as u64 * self.width
    }

    /// The embedding, or the head.
    fn matrix(&self) -> u64 {
        (self.shape.vocab * self.shape.hidden) as u64 * self.width
    }

    /// Of each device.
    pub fn devices(&self, split: &LayerSplit, memory: Option<u64>) -> Vec<DevicePlan> {
        let last = split.ranges().len() - 1;
        let device = |(at, range): (usize, &std::ops::Range<usize>)| {
            let layers = range.len() as u64;
            let ends = u64::from(at == 0) + u64::from(at == last);
            let weight_bytes = layers * self.layer_weights() + ends * self.matrix();
            let cache_bytes = layers * self.layer_cache();
            let rows = if at == last { self.shape.layers as u64 } else { layers };
            let beside = if at == last { self.beside } else { 0 };
            let working_bytes = self.working + 4 * self.gathered * rows + beside;
            let peak_bytes = weight_bytes + cache_bytes + working_bytes;
            DevicePlan {
                first_layer: range.start,
                end_layer: range.end,
                weight_bytes,
                cache_bytes,
                working_bytes,
                peak_bytes,
                fits: memory.map(|memory| peak_bytes <= memory),
            }
        };
        split.ranges().iter().enumerate().map(device).collect()
    }

    /// On a single device.
    pub fn on_one(&self) -> u64 {
        let whole = LayerSplit::whole(self.shape.layers);
        self.devices(&whole, None).iter().map(|device| device.peak_bytes).sum()
    }

    /// Over how many GPUs of the machine the layers go, and which; `None` if one holds them. `over` says how
    /// many where the user has said it.
    pub fn split(&self, machine: &Machine, over: Option<usize>) -> Option<LayerSplit> {
        let (layers, needs) = (self.shape.layers, self.needs());
        let of = |n: usize| {
            let n = n.min(layers);
            match of_each(machine) {
                Some(memory) => LayerSplit::fitting(layers, &needs, &vec![memory; n]).ok(),
                None => LayerSplit::even(layers, n).ok(),
            }
        };
        match (over, of_each(machine)) {
            (Some(n), _) => of(n).filter(|_| n > 1),
            (None, Some(memory)) if machine.gpus > 1 && self.on_one() > memory => {
                LayerSplit::fewest(layers, &needs, memory, machine.gpus).or_else(|| of(machine.gpus))
            }
            _ => None,
        }
    }

    /// GPUs over which it fits, where the machine has one that does not hold it.
    pub fn over_more(&self, machine: &Machine) -> Option<usize> {
        const MOST: usize = 8;
        let memory = of_each(machine).filter(|memory| machine.gpus == 1 && self.on_one() > *memory)?;
        let split = LayerSplit::fewest(self.shape.layers, &self.needs(), memory, MOST)?;
        Some(split.ranges().len())
    }

    /// The plan of a split.
    pub fn plan(&self, split: &LayerSplit, machine: &Machine, chunks: usize) -> SplitPlan {
        let n = split.ranges().len();
        SplitPlan {
            fits_one: of_each(machine).map(|memory| self.on_one() <= memory),
            one_bytes: self.on_one(),
            devices: self.devices(split, of_each(machine)),
            busy: 1.0 / (pipelined(chunks, n) * n as f64),
        }
    }
}

/// Memory of each device, if it is known; parts on a CPU share theirs.
pub fn of_each(machine: &Machine) -> Option<u64> {
    machine.memory_bytes.filter(|_| !machine.cpu)
}

impl SplitPlan {
    /// Of the fullest device.
    pub fn peak_bytes(&self) -> u64 {
        fullest(&self.devices)
    }
}

/// Memory of the fullest device.
pub fn fullest(devices: &[DevicePlan]) -> u64 {
    devices.iter().map(|device| device.peak_bytes).max().unwrap_or(0)
}

/// Time of work in `chunks` equal pieces that pass through `devices`, in units of what one device takes.
pub fn pipelined(chunks: usize, devices: usize) -> f64 {
    let (chunks, devices) = (chunks.max(1), devices.max(1));
    (chunks + devices - 1) as f64 / (chunks * devices) as f64
}

/// Chunks of `tokens` in a prefill of `size` tokens at a time; a last one of at most a quarter is read with
/// the one before.
pub fn prefill_chunks(tokens: usize, size: usize) -> usize {
    let size = size.max(1);
    1 + tokens.saturating_sub(size + size / 4).div_ceil(size)
}

/// Chunks and packs that `label` reads of a context of `tokens`.
pub fn label_chunks(recipe: &Recipe, tokens: usize, machine: &Machine, scorer: ScorerWork) -> usize {
    let section = &recipe.label;
    let by = Repeat::new(section, TEMPLATE_TOKENS, scorer);
    let pack = (section.pack(!machine.cpu) / by.new_tokens(tokens)).max(1);
    prefill_chunks(tokens + TEMPLATE_TOKENS, section.prefill_chunk_tokens)
        + by.forwards(tokens).div_ceil(pack)
}

#[cfg(test)]
mod tests {
    use super::super::tests::recipe;
    use super::super::{Plan, Work};
    use super::*;

    /// Qwen3-32B: 64 layers, 8 KV heads, 5120 wide.
    fn large(more: &[&str]) -> Recipe {
        let shape = [
            "target.shape.layers=64",
            "target.shape.query_heads=64",
            "target.shape.hidden=5120",
            "target.shape.intermediate=25600",
            "target.shape.vocab=151936",
            "proxy.shape.vocab=151936",
            "data.window_tokens=[131072]",
        ];
        recipe(&[&shape[..], more].concat())
    }

    fn gpus(card: &str, gpus: usize) -> Machine {
        Machine { gpus, ..Machine::card(card).unwrap() }
    }

    #[test]
    fn memory_of_a_32b_over_two_gpus() {
        let plan = Plan::new(&large(&[]), gpus("h100", 2), &Work::default());
        let split = plan.split.as_ref().unwrap();
        assert_eq!(split.fits_one, Some(false));
        assert!(split.one_bytes > 100_000_000_000, "{}", split.one_bytes);
        let [a, b] = &split.devices[..] else { panic!("{:?}", split.devices) };
        assert_eq!((a.first_layer, a.end_layer, b.first_layer, b.end_layer), (0, 32, 32, 64));
        // 31.2 G parameters of layers and 0.78 G of each matrix in bf16; 4096 bytes of a layer's cache a
        // token.
        assert_eq!(a.weight_bytes, b.weight_bytes);
        assert!((a.weight_bytes as f64 / 32.8e9 - 1.0).abs() < 0.01, "{}", a.weight_bytes);
        assert_eq!(a.cache_bytes, 32 * 4096 * (131_072 + 1024));
        assert!(a.fits == Some(true) && b.fits == Some(true) && b.peak_bytes > a.peak_bytes);
        assert_eq!(plan.stage("label").unwrap().peak_bytes, split.peak_bytes());
        assert_eq!(plan.stage("label").unwrap().fits, Some(true));
        let text = plan.table();
        assert!(text.contains("layers 0 to 31") && text.contains("layers 32 to 63"), "{text}");
        assert!(text.lines().all(|line| line.len() <= 140), "{text}");
        assert!(plan.infer.devices.len() == 2 && fullest(&plan.infer.devices) < 80_000_000_000);
    }

    #[test]
    fn a_target_that_fits_is_not_split_unless_it_is_said() {
        let small = recipe(&["data.window_tokens=[8192]"]);
        assert_eq!(Plan::new(&small, gpus("h100", 4), &Work::default()).split, None);
        let one = Plan::new(&large(&[]), gpus("h100", 1), &Work::default());
        assert!(one.split.is_none() && one.stage("label").unwrap().fits == Some(false));
        assert!(one.table().contains("`--device cuda:0+cuda:1`"), "{}", one.table());
        let said = Plan::over(&small, gpus("h100", 4), &Work::default(), Some(2)).split.unwrap();
        assert_eq!((said.fits_one, said.devices.len()), (Some(true), 2));
        let of_cpu = Plan::over(&small, Machine::cpu(2), &Work::default(), Some(2)).split.unwrap();
        assert_eq!((of_cpu.fits_one, of_cpu.devices[1].fits), (None, None));
    }

    #[test]
    fn a_pipeline_waits_for_its_first_and_last_chunk() {
        assert_eq!(pipelined(1, 2), 1.0);
        assert_eq!(pipelined(4, 1), 1.0);
        assert_eq!(pipelined(3, 2), 4.0 / 6.0);
        assert!((pipelined(1000, 2) - 0.5).abs() < 0.001);
        for (tokens, size, chunks) in
            [(1, 10, 1), (12, 10, 1), (13, 10, 2), (22, 10, 2), (23, 10, 3), (9, 0, 9)]
        {
            assert_eq!(prefill_chunks(tokens, size), chunks, "{tokens} by {size}");
        }
        let secs = |over| {
            let machine = Machine { memory_bytes: None, ..gpus("h100", 2) };
            Plan::over(&large(&[]), machine, &Work::default(), over)
        };
        let (one, two) = (secs(None), secs(Some(2)));
        let label = |plan: &Plan| plan.stage("label").unwrap().secs.unwrap();
        let gain = label(&one) / label(&two);
        let busy = two.split.as_ref().unwrap().busy;
        assert!((gain - 2.0 * busy).abs() < 0.01 && (1.5..2.0).contains(&gain), "{gain}, {busy}");
        assert!(two.infer.secs < one.infer.secs);
    }
}
