//! Optional part of stage 2: attention over time, in a window, with rotary positions.
//!
//! Queries are taken in blocks of one window, each against the three windows around it, so memory
//! grows with the context and not with its square. Rotary angles count from the block's own start:
//! only differences of positions matter, and small angles keep f32 exact at position 170,000.

use pkv_recipe::MapperSection;
use tch::{Device, Kind, Tensor};

use crate::layers::Linear;
use crate::params::{ParamStore, Pass};

/// Base of the rotary frequencies, the usual one.
const ROTARY_BASE: f64 = 10_000.0;

pub(crate) struct TimeAttention {
    qkv: Linear,
    output: Linear,
    heads: i64,
    window: i64,
}

impl TimeAttention {
    pub fn new(params: &mut ParamStore, section: &MapperSection, name: &str) -> Self {
        Self {
            qkv: Linear::new(params, &format!("{name}.qkv"), section.width, 3 * section.width),
            output: Linear::new(params, &format!("{name}.output"), section.width, section.width),
            heads: section.attention_heads as i64,
            window: section.attention_window as i64,
        }
    }

    /// `[b, t, m]` to `[b, t, m]`; position i attends to j with |i - j| <= window.
    pub fn forward(&self, pass: &Pass, x_btm: &Tensor) -> Tensor {
        let (b, t, m) = x_btm.size3().expect("a batch of positions");
        let e = m / self.heads;
        let qkv = self.qkv.forward(pass, x_btm).reshape([b, t, 3, self.heads, e]).permute([2, 0, 3, 1, 4]);
        let (q_bnte, k_bnte, v_bnte) = (qkv.get(0), qkv.get(1), qkv.get(2));
        let y_bnte = if t <= self.window + 1 {
            // Every position sees every other: no block, no mask.
            let turn = Rotary::new(0, t, e, x_btm.device());
            attend(&turn.apply(&q_bnte), &turn.apply(&k_bnte), &v_bnte, None)
        } else {
            self.blockwise(&q_bnte, &k_bnte, &v_bnte)
        };
        self.output.forward(pass, &y_bnte.transpose(1, 2).reshape([b, t, m]))
    }

    fn blockwise(&self, q_bnte: &Tensor, k_bnte: &Tensor, v_bnte: &Tensor) -> Tensor {
        let (b, n, t, e) = q_bnte.size4().expect("queries have four dimensions");
        let (w, device) = (self.window, q_bnte.device());
        let blocks = (t + w - 1) / w;
        let beyond = blocks * w - t;
        let q = q_bnte.constant_pad_nd([0, 0, 0, beyond]).reshape([b, n, blocks, w, e]);
        let around = |x: &Tensor| {
            x.constant_pad_nd([0, 0, w, w + beyond]).unfold(2, 3 * w, w).transpose(3, 4).contiguous()
        };
        let (k, v) = (around(k_bnte), around(v_bnte));
        let q = Rotary::new(w, w, e, device).apply(&q);
        let k = Rotary::new(0, 3 * w, e, device).apply(&k);
        let y = attend(&q, &k, &v, Some(&self.band(blocks, t, device)));
        y.reshape([b, n, blocks * w, e]).narrow(2, 0, t)
    }

    /// True where a block's query may attend: within the window and inside the context,
    /// `[blocks, w, 3 w]`. A query beyond the context still sees the context's last position.
    fn band(&self, blocks: i64, t: i64, device: Device) -> Tensor {
        let w = self.window;
        let range = |n: i64| Tensor::arange(n, (Kind::Int64, device));
        let distance = range(3 * w).unsqueeze(0) - (range(w) + w).unsqueeze(1);
        let near = distance.abs().le(w);
        let key = (range(blocks) * w - w).unsqueeze(1) + range(3 * w).unsqueeze(0);
        let inside = key.ge(0).logical_and(&key.lt(t)).unsqueeze(1);
        near.unsqueeze(0).logical_and(&inside)
    }
}

fn attend(q: &Tensor, k: &Tensor, v: &Tensor, may: Option<&Tensor>) -> Tensor {
    Tensor::scaled_dot_product_attention(q, k, v, may, 0.0, false, None, false)
}

/// Rotation of pairs (i, i + e/2) of a head by position times frequency.
struct Rotary {
    cos_te: Tensor,
    sin_te: Tensor,
}

impl Rotary {
    fn new(start: i64, positions: i64, e: i64, device: Device) -> Self {
        let frequency = |i: i64| ROTARY_BASE.powf(-2.0 * i as f64 / e as f64);
        let frequencies: Vec<f64> = (0..e / 2).map(frequency).collect();
        let angle = Tensor::arange_start(start, start + positions, (Kind::Double, Device::Cpu))
            .outer(&Tensor::from_slice(&frequencies));
        let angle_te = Tensor::cat(&[&angle, &angle], -1);
        let on_device = |x: Tensor| x.to_kind(Kind::Float).to_device(device);
        Self { cos_te: on_device(angle_te.cos()), sin_te: on_device(angle_te.sin()) }
    }

    fn apply(&self, x: &Tensor) -> Tensor {
        let half = x.size().last().copied().unwrap_or(0) / 2;
        let turned = Tensor::cat(&[&x.narrow(-1, half, half).neg(), &x.narrow(-1, 0, half)], -1);
        x * self.cos_te.to_kind(x.kind()) + turned * self.sin_te.to_kind(x.kind())
    }
}
