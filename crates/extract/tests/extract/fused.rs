//! The fused kernel against the blocks, on the GPU, from the same 16-bit queries and keys.

use std::io::Write as _;

use pkv_core::Channel;
use pkv_extract::{QueryStatistics, UnrunScores, fused_unrun_scores, unrun_scores};
use pkv_gpu::{Products, ScoreRows, has_fused_scores};
use pkv_recipe::ExtractSection;
use tch::{Device, Kind, Tensor};

/// A GPU that has the kernels; says so where there is none.
fn hopper() -> Option<Device> {
    let device = if pkv_gpu::cuda_count() > 0 { Device::Cuda(0) } else { Device::Cpu };
    let able = has_fused_scores(device, Kind::BFloat16, 64);
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
            let q_qsd = q_sqd.transpose(0, 1);
            statistics.add(&q_qsd, &k_hkd, SCALE, start as usize, &plain).unwrap();
            let spread = k_hkd.repeat_interleave_self_int(group, 0, None).to_kind(Kind::Float);
            let logits = q_qsd.to_kind(Kind::Float).matmul(&spread.transpose(1, 2)) * SCALE;
            let later = Tensor::ones([n, start + n], (Kind::Bool, device)).triu(start + 1);
            let lse = logits.masked_fill(&later, f64::NEG_INFINITY).logsumexp([-1i64], false);
            let of = Products { q_rqd: &q_sqd, k_hkd: &k_hkd, scale: SCALE };
            statistics.add_fused(of, &lse, start as usize, &fused).unwrap();
            start += n;
        }
        statistics.finish(&plain, heads as usize, group as usize);
        statistics.finish(&fused, heads as usize, group as usize);
        let off = (&plain - &fused).abs().max().double_value(&[]);
        assert!(off < 1e-3, "case {number}: features differ by {off:e}");
    }
}

/// Rows before, between and after the chunks' are no one's.
#[test]
fn fused_scores_of_an_unrun_replay_equal_those_of_blocks() {
    let Some(device) = hopper() else { return };
    pkv_gpu::set_tf32(false).unwrap();
    for (number, (kind, heads, group, d, rows_before, lengths)) in [
        (Kind::BFloat16, 8, 4, 128, 0, vec![2000, 2000, 192]),
        (Kind::BFloat16, 2, 2, 64, 7, vec![257, 129, 1]),
        (Kind::BFloat16, 1, 7, 96, 3, vec![64]),
        (Kind::BFloat16, 2, 1, 256, 0, vec![258, 100]),
        (Kind::Half, 2, 5, 80, 1, vec![301, 17]),
        (Kind::Half, 1, 2, 32, 4, vec![40, 40, 9]),
        (Kind::BFloat16, 1, 1, 64, 0, vec![1]),
    ]
    .into_iter()
    .enumerate()
    {
        tch::manual_seed(number as i64);
        let random = |size: &[i64]| Tensor::randn(size, (Kind::Float, device)).to_kind(kind);
        let total: i64 = lengths.iter().sum();
        // As models have them: queries are a part of a wider row.
        let q_rqd = random(&[rows_before + total + 5, heads * (group + 2), d]).narrow(1, 0, heads * group);
        let k_htd = random(&[heads, total, d]);
        let (mut chunks, mut plain, mut first) = (Vec::new(), Vec::new(), 0);
        for &n in &lengths {
            chunks.push(ScoreRows {
                first_row: (rows_before + first) as usize,
                rows: n as usize,
                first_key: first as usize,
                keys: n as usize,
            });
            let q_qsd = q_rqd.narrow(0, rows_before + first, n).transpose(0, 1);
            let k_hsd = k_htd.narrow(1, first, n).to_kind(Kind::Float);
            plain.push(unrun_scores(&q_qsd, &k_hsd, SCALE, 1 << 22).unwrap());
            first += n;
        }
        let fused =
            fused_unrun_scores(Products { q_rqd: &q_rqd, k_hkd: &k_htd, scale: SCALE }, &chunks).unwrap();
        let check = |what: &str, found: &Tensor, of: fn(&UnrunScores) -> &Tensor| {
            let expected = Tensor::cat(&plain.iter().map(of).collect::<Vec<_>>(), 1);
            let off = ((found - &expected).abs() / &expected).max().double_value(&[]);
            // NaN is not below anything.
            assert!(off < 1e-4, "case {number}: the {what} differs by {off:e} of its size");
        };
        check("maximum", &fused.max_ht, |scores| &scores.max_ht);
        check("mean", &fused.mean_ht, |scores| &scores.mean_ht);
    }
}
