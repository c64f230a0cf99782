//! One decoder layer: its weights and its two halves, up to attention and after it.
//!
//! Dimension key: s token, m hidden, q query head, h KV head, d head_dim.

use anyhow::Result;
use pkv_core::ModelShape;
use pkv_gpu::{PackedSlots, Projected, Rotation, gated_silu, rotate};
use tch::{Device, Kind, Tensor};

use crate::architecture::Architecture;
use crate::config::LmConfig;
use crate::weights::Places;

/// Weights of a layer. Matrices that read the same input are stored as one.
#[derive(Debug)]
pub(crate) struct Layer {
    shape: ModelShape,
    architecture: Architecture,
    input_norm: Tensor,
    /// `[(query_heads + 2 kv_heads) * head_dim, hidden]`: queries, keys, values.
    qkv: Tensor,
    qkv_bias: Option<Tensor>,
    /// `[query_heads + kv_heads, head_dim]`: each head's norm weight, queries then keys.
    qk_norm: Option<Tensor>,
    /// W_O `[hidden, query_heads * head_dim]`.
    pub output: Tensor,
    output_bias: Option<Tensor>,
    post_norm: Tensor,
    /// `[2 * intermediate, hidden]`: gate, up.
    gate_up: Tensor,
    down: Tensor,
}

impl Layer {
    /// Allocate, without values.
    pub fn empty(config: &LmConfig, device: Device, kind: Kind) -> Self {
        let (shape, architecture) = (config.shape, config.architecture);
        let new = |size: &[usize]| {
            let size: Vec<i64> = size.iter().map(|n| *n as i64).collect();
            Tensor::empty(size, (kind, device))
        };
        let rotated = shape.query_heads + shape.kv_heads;
        let qkv_rows = (rotated + shape.kv_heads) * shape.head_dim;
        Self {
            shape,
            architecture,
            input_norm: new(&[shape.hidden]),
            qkv: new(&[qkv_rows, shape.hidden]),
            qkv_bias: architecture.qkv_bias.then(|| new(&[qkv_rows])),
            qk_norm: architecture.qk_norm.then(|| new(&[rotated, shape.head_dim])),
            output: new(&[shape.hidden, shape.query_heads * shape.head_dim]),
            output_bias: architecture.output_bias.then(|| new(&[shape.hidden])),
            post_norm: new(&[shape.hidden]),
            gate_up: new(&[2 * shape.intermediate, shape.hidden]),
            down: new(&[shape.hidden, shape.intermediate]),
        }
    }

    /// Another handle on the same weights.
    pub fn share(&self) -> Self {
        let optional = |t: &Option<Tensor>| t.as_ref().map(Tensor::shallow_clone);
        Self {
            shape: self.shape,
            architecture: self.architecture,
            input_norm: self.input_norm.shallow_clone(),
            qkv: self.qkv.shallow_clone(),
            qkv_bias: optional(&self.qkv_bias),
            qk_norm: optional(&self.qk_norm),
            output: self.output.shallow_clone(),
            output_bias: optional(&self.output_bias),
            post_norm: self.post_norm.shallow_clone(),
            gate_up: self.gate_up.shallow_clone(),
            down: self.down.shallow_clone(),
        }
    }

    /// Name the place of every weight of layer `index` as checkpoints do.
    pub fn places(&self, index: usize, places: &mut Places) {
        let mut put = |name: &str, place: Tensor| {
            places.insert(format!("model.layers.{index}.{name}"), place);
        };
        let (d, heads, kv) = (self.shape.head_dim, self.shape.query_heads, self.shape.kv_heads);
        let part = |of: &Tensor, first: usize, n: usize| of.narrow(0, first as i64, n as i64);
        put("input_layernorm.weight", self.input_norm.shallow_clone());
        put("post_attention_layernorm.weight", self.post_norm.shallow_clone());
        for (name, first, n) in
            [("q_proj", 0, heads * d), ("k_proj", heads * d, kv * d), ("v_proj", (heads + kv) * d, kv * d)]
        {
            put(&format!("self_attn.{name}.weight"), part(&self.qkv, first, n));
            if let Some(bias) = &self.qkv_bias {
                put(&format!("self_attn.{name}.bias"), part(bias, first, n));
            }
        }
        if let Some(norm) = &self.qk_norm {
            // One row is read; `finish` copies it to the other heads.
            put("self_attn.q_norm.weight", norm.get(0));
            put("self_attn.k_norm.weight", norm.get(heads as i64));
        }
        put("self_attn.o_proj.weight", self.output.shallow_clone());
        if let Some(bias) = &self.output_bias {
            put("self_attn.o_proj.bias", bias.shallow_clone());
        }
        let wide = self.shape.intermediate;
        put("mlp.gate_proj.weight", part(&self.gate_up, 0, wide));
        put("mlp.up_proj.weight", part(&self.gate_up, wide, wide));
        put("mlp.down_proj.weight", self.down.shallow_clone());
    }

    /// Once all places are filled: spread what checkpoints store once for all heads.
    pub fn finish(&mut self) {
        if let Some(norm) = &mut self.qk_norm {
            let heads = self.shape.query_heads as i64;
            let (q, k) = (norm.get(0).copy(), norm.get(heads).copy());
            norm.narrow(0, 0, heads).copy_(&q.expand([heads, -1], false));
            norm.narrow(0, heads, self.shape.kv_heads as i64)
                .copy_(&k.expand([self.shape.kv_heads as i64, -1], false));
        }
    }

    pub fn device(&self) -> Device {
        self.qkv.device()
    }

    /// Bytes of its weights.
    pub fn bytes(&self) -> usize {
        let optional = [&self.qkv_bias, &self.qk_norm, &self.output_bias].into_iter().flatten();
        let all = [&self.input_norm, &self.qkv, &self.output, &self.post_norm, &self.gate_up, &self.down];
        all.into_iter().chain(optional).map(bytes).sum()
    }

    /// The layer's input norm.
    pub fn normed(&self, hidden: &Tensor) -> Tensor {
        rms_norm(hidden, &self.input_norm, self.architecture.norm_eps)
    }

    /// Queries, keys and values of `normed` `[.., s, hidden]`: projected, normalized where the architecture
    /// does, rotated. With `cache` keys and values go there.
    ///
    /// # Errors
    /// A kernel fails.
    pub fn project(
        &self,
        normed: &Tensor,
        rotation: &Rotation,
        cache: Option<&PackedSlots>,
    ) -> Result<Projected> {
        let heads = (self.shape.query_heads + 2 * self.shape.kv_heads) as i64;
        let mut size = normed.size();
        size.pop();
        size.extend([heads, self.shape.head_dim as i64]);
        let qkv = normed.linear(&self.qkv, self.qkv_bias.as_ref()).view(size.as_slice());
        let norm = self.qk_norm.as_ref().map(|weight| (weight, self.architecture.norm_eps));
        rotate(&qkv, self.shape.query_heads, norm, rotation, cache)
    }

    /// The rest of the layer: output projection, residual, feed-forward, residual.
    ///
    /// # Shapes
    /// - `hidden`: `[.., s, hidden]`, the layer's input; becomes the next layer's in place
    /// - `attended`: `[.., s, query_heads, head_dim]`
    ///
    /// # Errors
    /// A kernel fails.
    pub fn finish_block(&self, hidden: Tensor, attended: &Tensor) -> Result<Tensor> {
        let size = hidden.size();
        let rows = hidden.view([-1, self.shape.hidden as i64]);
        let attended = attended.reshape([rows.size()[0], -1]);
        let mut mid = self.add(rows, &attended, &self.output);
        if let Some(bias) = &self.output_bias {
            mid += bias * self.architecture.residual_scale;
        }
        let normed = rms_norm(&mid, &self.post_norm, self.architecture.norm_eps);
        let gate_up = normed.linear::<&Tensor>(&self.gate_up, None);
        Ok(self.add(mid, &gated_silu(&gate_up)?, &self.down).view(size.as_slice()))
    }

    /// `residual` `[n, hidden]` plus the scaled product of `x` and `weight`, in place.
    fn add(&self, mut residual: Tensor, x: &Tensor, weight: &Tensor) -> Tensor {
        if self.architecture.residual_scale == 1.0 {
            // addmm adds the residual while the product is written.
            return residual.addmm_(x, &weight.tr());
        }
        residual += x.linear::<&Tensor>(weight, None) * self.architecture.residual_scale;
        residual
    }
}

/// Bytes of a tensor's elements.
pub(crate) fn bytes(t: &Tensor) -> usize {
    t.numel() * t.kind().elt_size_in_bytes()
}

/// x / sqrt(mean(x^2) + eps) * weight, statistics in f32, over the last axis.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    x.rms_norm(weight.size(), Some(weight), eps)
}
