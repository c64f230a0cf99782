//! The fused kernel against the blocks, on the GPU, from the same 16-bit queries and keys.

use std::io::Write as _;

use pkv_core::Channel;
use pkv_extract::QueryStatistics;
use pkv_gpu::{Products, wants_lse};
use pkv_recipe::ExtractSection;
use pkv_test_support::attention::{softmax, up_to};
use tch::{Device, Kind, Tensor};

/// A GPU that has the kernels; says so where there is none.
fn hopper() -> Option<Device> {
    let device = if pkv_gpu::cuda_count() > 0 { Device::Cuda(0) } else { Device::Cpu };
    let able = wants_lse(device, Kind::BFloat16, 64);
    if !able {
        let mut to = std::io::stderr();
        writeln!(to, "SKIPPED: fused statistics need a Hopper GPU").unwrap();
    }
    able.then_some(device)
}

/// 1/sqrt(head_dim) of none of the cases.
const SCALE: f64 = 0.1;

#[test]
fn fused_statistics_equal_those_of_blocks() {
    let Some(device) = hopper() else { return };
    let all = [&Channel::PREFILL[..], &[Channel::MeanLastLayer]].concat();
    let windowed = vec![Channel::MaxWindow, Channel::MeanWindow, Channel::MaxLast, Channel::MeanLast];
    let odd = vec![Channel::MaxAll, Channel::KeyNorm, Channel::MeanLastLayer];
    for (number, (kind, heads, group, d, prefix, pieces, channels, stride)) in [
        (Kind::BFloat16, 2, 2, 64, 7, vec![1007], &all, 1),
        (Kind::BFloat16, 2, 3, 64, 3, vec![300, 200, 280], &all, 4),
        (Kind::BFloat16, 2, 2, 128, 3, vec![2, 500, 278], &windowed, 4),
        (Kind::BFloat16, 8, 4, 64, 30, vec![3030], &all, 4),
        (Kind::Half, 1, 5, 80, 9, vec![800, 709], &odd, 3),
        (Kind::BFloat16, 1, 1, 256, 0, vec![70], &all, 1),
        (Kind::BFloat16, 2, 1, 64, 3, vec![6], &all, 4),
    ]
    .into_iter()
    .enumerate()
    {
        tch::manual_seed(number as i64);
        let section = ExtractSection {
            channels: channels.clone(),
            whole_range_stride: stride,
            ..ExtractSection::default()
        };
        let total: i64 = pieces.iter().sum();
        let statistics = QueryStatistics::new(&section, prefix, total as usize - prefix);
        let random = |size: &[i64]| Tensor::randn(size, (Kind::Float, device)).to_kind(kind);
        let q_rqd = random(&[total, heads * group + 2, d]).narrow(1, 0, heads * group);
        let k_hkd = random(&[heads, total + 5, d]).narrow(1, 0, total);
        let (plain, fused) =
            (statistics.zeros(heads as usize, device), statistics.zeros(heads as usize, device));
        let mut start = 0;
        for n in pieces {
            let q_sqd = q_rqd.narrow(0, start, n);
            let k_hkd = k_hkd.narrow(1, 0, start + n);
            let of = Products { q_rqd: &q_sqd, k_hkd: &k_hkd, scale: SCALE };
            statistics.add(of, None, start as usize, &plain).unwrap();
            let seen = up_to(start, n, start + n, device);
            let lse = softmax(&q_sqd.transpose(0, 1), &k_hkd, SCALE, &seen).1.to_kind(Kind::Float);
            statistics.add(of, Some(&lse), start as usize, &fused).unwrap();
            start += n;
        }
        statistics.finish(&plain, heads as usize, group as usize).unwrap();
        statistics.finish(&fused, heads as usize, group as usize).unwrap();
        let off = (&plain - &fused).abs().max().double_value(&[]);
        assert!(off < 1e-3, "case {number}: features differ by {off:e}");
    }
}
