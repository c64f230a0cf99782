//! Operators of the mapper, differentiable: convolution over time and cross-attention over heads.
//!
//! Where libtorch's form is slow or needs much memory, they have their own backward pass.

use tch::Tensor;

use crate::kernels::cross_kernels;
use crate::shim::{self, Raw};

/// Dense convolution over time, centred, zeros beyond both ends.
///
/// On a CPU as a 2-D convolution of height 1, whose channels-last form takes the tensor as it lies. Forward
/// and backward of 16 x 1000 positions, width 192, kernel 5, one CPU core: 186 ms, a 1-D convolution 242 ms
/// (it copies both ways), one matrix product about twice as long. On a GPU as one matrix product each way:
/// cuDNN plans every new length anew, and hardly two batches are equally long.
///
/// # Shapes
/// - `x_rti`: `[rows, positions, in]`, f32 or bf16
/// - `weight_oik`: `[out, in, kernel]`, kernel odd; `bias_o`: `[out]`; kind and device of `x_rti`
/// - returns `[rows, positions, out]`; differentiable in all three
///
/// # Panics
/// Shapes or kinds disagree.
pub fn time_conv(x_rti: &Tensor, weight_oik: &Tensor, bias_o: &Tensor, dilation: i64) -> Tensor {
    if x_rti.device().is_cuda() {
        return one_product(x_rti, weight_oik, bias_o, dilation);
    }
    by_image(x_rti, weight_oik, bias_o, dilation)
}

pub(super) fn by_image(x_rti: &Tensor, weight_oik: &Tensor, bias_o: &Tensor, dilation: i64) -> Tensor {
    let image = x_rti.transpose(1, 2).unsqueeze(2);
    let weight = weight_oik.unsqueeze(2);
    let pad = weight_oik.size()[2] / 2 * dilation;
    let y = image.conv2d(&weight, Some(bias_o), [1, 1], [0, pad], [1, dilation], 1);
    y.squeeze_dim(2).transpose(1, 2)
}

fn one_product(x_rti: &Tensor, weight_oik: &Tensor, bias_o: &Tensor, dilation: i64) -> Tensor {
    let mut out = std::ptr::null_mut();
    // SAFETY: three tensors; `out` receives a tensor that we own.
    let code = unsafe {
        shim::pkv_time_conv(pointer(x_rti), pointer(weight_oik), pointer(bias_o), dilation, &mut out)
    };
    own(code, out, "convolution over time")
}

/// Cross-attention over heads with queries and read-outs folded into the projections:
/// sum over heads of softmax(tokens logit^T) x (tokens reading^T), then over attention heads.
///
/// Neither weights nor readings are kept for the backward, which makes them again, `piece`
/// positions at a time. On a GPU in bf16, f16 or TF32 our own kernels do it: the forward then holds
/// nothing of size p x o, and sums in f32.
///
/// # Shapes
/// - `tokens_bptd`: `[b, p, t, d]`, f32 or bf16
/// - `logit_rd`, `reading_rd`: `[attention heads x o, d]`, attention head first
/// - returns `[b, t, o]`, f32; differentiable in all three
///
/// # Panics
/// Shapes or kinds disagree.
pub fn attend_heads(
    tokens_bptd: &Tensor,
    logit_rd: &Tensor,
    reading_rd: &Tensor,
    attention_heads: i64,
    piece: i64,
) -> Tensor {
    let mut out = std::ptr::null_mut();
    // SAFETY: three tensors; `out` receives a tensor that we own.
    let code = unsafe {
        shim::pkv_attend_heads(
            pointer(tokens_bptd),
            pointer(logit_rd),
            pointer(reading_rd),
            attention_heads,
            piece.max(1),
            cross_kernels(tokens_bptd, logit_rd.size()[0]).map_or(std::ptr::null(), std::ptr::from_ref),
            &mut out,
        )
    };
    own(code, out, "cross-attention over heads")
}

fn pointer(tensor: &Tensor) -> Raw {
    tensor.as_ptr().cast_mut()
}

fn own(code: i32, out: Raw, what: &str) -> Tensor {
    if let Err(reason) = shim::check(code) {
        panic!("{what}: {reason:#}");
    }
    // SAFETY: the shim returned 0, so `out` is a tensor on the heap that only this code frees.
    unsafe { Tensor::from_ptr(out) }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::{DeviceChoice, device, set_tf32};
    use tch::{Device, Kind};

    /// Numbers without a pattern that a shift or a swap would keep.
    fn numbers(seed: i64, shape: &[i64], on: Device) -> Tensor {
        let n: i64 = shape.iter().product();
        let x = (Tensor::arange(n, (Kind::Double, Device::Cpu)) * 12.9898 + seed as f64 * 78.233).sin();
        (x * 43_758.545_3).frac().reshape(shape).to_device(on)
    }

    /// Value and gradients of `f`, by the same random direction.
    fn both(inputs: &[Tensor], kind: Kind, f: impl Fn(&[Tensor]) -> Tensor) -> Vec<Tensor> {
        let leaves: Vec<Tensor> =
            inputs.iter().map(|x| x.to_kind(kind).copy().set_requires_grad(true)).collect();
        let y = f(&leaves);
        (&y * numbers(9, &y.size(), y.device()).to_kind(y.kind())).sum(y.kind()).backward();
        std::iter::once(y.detach()).chain(leaves.iter().map(Tensor::grad)).collect()
    }

    fn near(got: &[Tensor], expected: &[Tensor], tolerance: f64, what: &str) {
        for (i, (a, b)) in got.iter().zip(expected).enumerate() {
            assert_eq!(a.size(), b.size(), "{what} {i}");
            let off = (a.to_kind(Kind::Double) - b).abs().max().double_value(&[]);
            let scale = b.abs().max().double_value(&[]).max(1e-3);
            assert!(off <= tolerance * scale, "{what} {i}: {off:e} of {scale:e}");
        }
    }

    /// Value, then gradients of input, weight and bias, against libtorch's convolution in f64.
    #[test]
    fn the_convolution_equals_libtorchs() {
        let on = device(DeviceChoice::Auto).unwrap();
        set_tf32(false).unwrap();
        for (rows, t, from, to, kernel, dilation) in
            [(2, 11, 3, 4, 5, 2), (1, 1, 2, 2, 5, 8), (3, 4, 5, 2, 3, 1), (2, 9, 4, 4, 1, 3)]
        {
            let inputs = [
                numbers(1, &[rows, t, from], on),
                numbers(2, &[to, from, kernel], on),
                numbers(3, &[to], on),
            ];
            let expected = both(&inputs, Kind::Double, |x| {
                let pad = kernel / 2 * dilation;
                let y = x[0].transpose(1, 2).conv1d(&x[1], Some(&x[2]), [1], [pad], [dilation], 1);
                y.transpose(1, 2)
            });
            for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-5), (Kind::BFloat16, 3e-2)] {
                for form in [by_image, one_product] {
                    let got = both(&inputs, kind, |x| form(&x[0], &x[1], &x[2], dilation));
                    near(&got, &expected, tolerance, &format!("{kind:?}, {t} positions, kernel {kernel}"));
                }
            }
        }
    }

    /// Value, then gradients of tokens and both weights, against the plain formula in f64, for pieces
    /// that do and do not divide the length.
    #[test]
    fn the_cross_attention_equals_its_formula() {
        let on = device(DeviceChoice::Auto).unwrap();
        set_tf32(false).unwrap();
        let (b, p, t, d, n, o) = (2, 4, 7, 5, 3, 2);
        let inputs =
            [numbers(1, &[b, p, t, d], on), numbers(2, &[n * o, d], on) * 3.0, numbers(3, &[n * o, d], on)];
        let expected = both(&inputs, Kind::Double, |x| {
            let logits = x[0].unsqueeze(-2).multiply(&x[1]).sum_dim_intlist(-1, false, None);
            let readings = x[0].unsqueeze(-2).multiply(&x[2]).sum_dim_intlist(-1, false, None);
            let sum = (logits.softmax(1, None) * readings).sum_dim_intlist(1, false, None);
            sum.reshape([b, t, n, o]).sum_dim_intlist(2, false, None)
        });
        for piece in [1, 3, 7, 100] {
            for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 5e-2)] {
                let got = both(&inputs, kind, |x| attend_heads(&x[0], &x[1], &x[2], n, piece));
                assert_eq!(got[0].kind(), Kind::Float);
                near(&got, &expected, tolerance, &format!("{kind:?}, pieces of {piece}"));
            }
        }
    }

    /// Our kernels, for the sizes of a tiny and of a large pair, against the formula in f64 from the same
    /// rounded inputs.
    #[test]
    fn the_cross_attentions_kernels_equal_its_formula() {
        let on = device(DeviceChoice::Auto).unwrap();
        if cross_kernels(&Tensor::zeros([1, 1, 1, 32], (Kind::BFloat16, on)), 8).is_none() {
            writeln!(std::io::stderr(), "SKIPPED: the cross-attention's kernels need a GPU").unwrap();
            return;
        }
        for (b, p, t, d, n, o, piece) in [
            (2, 13, 37, 32, 4, 36, 10),
            (1, 129, 21, 32, 4, 256, 100),
            (2, 16, 9, 16, 1, 8, 9),
            (1, 7, 1, 64, 2, 20, 1),
            (3, 200, 5, 48, 2, 12, 2),
        ] {
            // Exact in all three kinds.
            let half = |x: Tensor| x.to_kind(Kind::BFloat16).to_kind(Kind::Double);
            let inputs = [
                half(numbers(1, &[b, p, t, d], on)),
                half(numbers(2, &[n * o, d], on) * 2.0),
                half(numbers(3, &[n * o, d], on)),
            ];
            let expected = both(&inputs, Kind::Double, |x| {
                let logits = x[0].matmul(&x[1].transpose(0, 1));
                let readings = x[0].matmul(&x[2].transpose(0, 1));
                let sum = (logits.softmax(1, None) * readings).sum_dim_intlist(1, false, None);
                sum.reshape([b, t, n, o]).sum_dim_intlist(2, false, None)
            });
            set_tf32(true).unwrap();
            for (kind, tolerance) in [(Kind::BFloat16, 5e-2), (Kind::Half, 1e-2), (Kind::Float, 5e-3)] {
                let got = both(&inputs, kind, |x| attend_heads(&x[0], &x[1], &x[2], n, piece));
                near(&got[..1], &expected[..1], 1e-4, &format!("{kind:?}, {p} tokens of {d}, scores"));
                near(&got, &expected, tolerance, &format!("{kind:?}, {p} tokens of {d}"));
                let _no_grad = tch::no_grad_guard();
                let plain: Vec<Tensor> = inputs.iter().map(|x| x.to_kind(kind)).collect();
                assert!(attend_heads(&plain[0], &plain[1], &plain[2], n, piece).equal(&got[0]));
            }
            set_tf32(false).unwrap();
        }
    }
}
