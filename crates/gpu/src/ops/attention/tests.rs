//! Attention in parts, by every policy, against f64.

use std::io::Write as _;

use super::*;
use pkv_test_support::attention::{self as naive, random};

/// Not 1/sqrt(16), which kernels would take by themselves.
const SCALE: f64 = 0.3;

fn with(policy: AttentionPolicy) -> Attention {
    Attention { scale: SCALE, policy }
}

#[track_caller]
fn close(what: &str, got: &Tensor, expected: &Tensor, tolerance: f64) {
    let off = (got.to_device(Device::Cpu).to_kind(Kind::Double) - expected).abs().max().double_value(&[]);
    assert!(off <= tolerance, "{what}: off by {off:e}, tolerance {tolerance:e}");
}

/// Every place that this machine has: device, kind, tolerances of outputs and log-sum-exps.
fn places() -> Vec<(Device, Kind, f64, f64)> {
    let mut places = vec![
        (Device::Cpu, Kind::Float, 1e-5, 1e-5),
        (Device::Cpu, Kind::Double, 1e-6, 1e-6),
        (Device::Cpu, Kind::BFloat16, 3e-2, 1e-2),
    ];
    if crate::cuda_count() > 0 {
        places.push((Device::Cuda(0), Kind::Float, 1e-4, 1e-4));
        places.push((Device::Cuda(0), Kind::BFloat16, 3e-2, 2e-3));
    } else {
        writeln!(std::io::stderr(), "SKIPPED: attention on CUDA").unwrap();
    }
    places
}

/// cuDNN in blocks as small as the cases, and flash alone.
fn policies() -> [AttentionPolicy; 3] {
    let blocks = |row_block, key_block| AttentionPolicy { rectangle: Rectangle::Cudnn, row_block, key_block };
    [
        AttentionPolicy { rectangle: Rectangle::Flash, ..AttentionPolicy::default() },
        blocks(64, 64),
        blocks(1, 1),
    ]
}

#[test]
fn causal_attention_over_a_cache_equals_f64() {
    for (device, kind, tolerance, lse_tolerance) in places() {
        for policy in policies() {
            for (start, s) in [(0, 1), (0, 130), (1, 1), (50, 1), (130, 7), (128, 64), (200, 150), (64, 64)] {
                let q = random(1, &[s, 6, 16], kind, device);
                let [k, v] = [2, 3]
                    .map(|seed| random(seed, &[2, start + s + 5, 16], kind, device).narrow(1, 0, start + s));
                let all = Tensor::ones([s, start + s], (Kind::Bool, Device::Cpu));
                let [out, lse] = naive::attention(&q, &k, &v, SCALE, &all.tril(start));
                let what = format!("{device:?} {kind:?} {policy:?} {start} + {s}");
                for wants in [true, false] {
                    let (got, got_lse) =
                        attend(&arranged(&q), &k, &v, start as usize, wants, &with(policy)).unwrap();
                    close(&what, &got, &out, tolerance);
                    assert_eq!(got_lse.is_some(), wants);
                    if let Some(got) = got_lse {
                        assert_eq!(got.kind(), Kind::Float);
                        close(&format!("{what}: log-sum-exp"), &got, &lse, lse_tolerance);
                    }
                }
            }
        }
    }
}

#[test]
fn squares_and_rectangle_equal_f64() {
    for (device, kind, tolerance, lse_tolerance) in places() {
        for policy in policies() {
            for (keys, lengths) in
                [(0i64, vec![9usize]), (70, vec![5]), (200, vec![70, 1, 64]), (129, vec![30; 5])]
            {
                let segments = Segments::new(lengths.iter().copied(), device).unwrap();
                let rows = lengths.iter().sum::<usize>() as i64;
                let q = random(1, &[rows, 6, 16], kind, device);
                let own = [4, 5].map(|seed| random(seed, &[rows, 2, 16], kind, device));
                let [k, v] =
                    [2, 3].map(|seed| random(seed, &[2, keys + 5, 16], kind, device).narrow(1, 0, keys));
                let own_seen = Tensor::zeros([rows, rows], (Kind::Bool, Device::Cpu));
                for range in &segments.ranges {
                    let (first, n) = (range.start as i64, range.len() as i64);
                    let block = Tensor::ones([n, n], (Kind::Bool, Device::Cpu)).tril(0);
                    own_seen.narrow(0, first, n).narrow(1, first, n).copy_(&block);
                }
                let what = format!("{device:?} {kind:?} {policy:?} {keys} keys, {lengths:?}");
                let mut part = attend_segments(&q, &own[0], &own[1], &segments, &with(policy)).unwrap();
                let heads_first = |x: &Tensor| x.transpose(0, 1);
                let [out, lse] =
                    naive::attention(&q, &heads_first(&own[0]), &heads_first(&own[1]), SCALE, &own_seen);
                close(&format!("{what}: squares"), &part.out_rqd, &out, tolerance);
                close(&format!("{what}: their log-sum-exp"), &part.lse_qr, &lse, lse_tolerance);

                add_attention(&mut part, &q, &k, &v, &with(policy)).unwrap();
                let cache_seen = Tensor::ones([rows, keys], (Kind::Bool, Device::Cpu));
                let both = |cache: &Tensor, own: &Tensor| Tensor::cat(&[cache, &heads_first(own)], 1);
                let seen = Tensor::cat(&[cache_seen, own_seen], 1);
                let [out, lse] = naive::attention(&q, &both(&k, &own[0]), &both(&v, &own[1]), SCALE, &seen);
                close(&what, &part.out_rqd, &out, tolerance);
                close(&format!("{what}: log-sum-exp"), &part.lse_qr, &lse, lse_tolerance);
            }
        }
    }
}

/// Seconds of a second run, the first one plans.
fn timed<T>(work: impl Fn() -> T) -> (f64, T) {
    drop(work());
    crate::synchronize(Device::Cuda(0)).unwrap();
    let begun = std::time::Instant::now();
    let result = work();
    crate::synchronize(Device::Cuda(0)).unwrap();
    (begun.elapsed().as_secs_f64(), result)
}

/// What the policy is tuned by: `cargo test --release -p pkv-gpu --lib -- --ignored --nocapture
/// policies_agree`.
#[test]
#[ignore = "needs a GPU with 30 GB free"]
fn policies_agree_at_full_size_and_tell_their_speed() {
    let (device, kind) = (Device::Cuda(0), Kind::BFloat16);
    let (q_heads, heads, d) = (32, 8, 128);
    let flash = AttentionPolicy { rectangle: Rectangle::Flash, ..AttentionPolicy::default() };
    let cudnn = AttentionPolicy::default();
    let report = |what: &str, pairs: f64, a: (f64, Tensor), b: (f64, Tensor)| {
        let teraflops = |s: f64| 4.0 * pairs * (q_heads * d) as f64 / s / 1e12;
        let off = (a.1 - b.1).abs().max().double_value(&[]);
        println!(
            "{what}: flash {:.2} ms ({:.0} TFLOP/s), cuDNN {:.2} ms ({:.0} TFLOP/s), apart by {off:.1e}",
            a.0 * 1e3,
            teraflops(a.0),
            b.0 * 1e3,
            teraflops(b.0)
        );
        assert!(off < 2e-2, "{what}: the policies differ by {off}");
    };
    for keys in [8192i64, 32_768, 33_000, 131_072] {
        for rows in [2058i64, 16_464] {
            let q = random(1, &[rows, q_heads + heads, d], kind, device).narrow(1, 0, q_heads);
            let own = [4, 5].map(|seed| random(seed, &[rows, heads, d], kind, device));
            let [k, v] = [2, 3].map(|seed| random(seed, &[heads, keys, d], kind, device));
            let segments = Segments::new(vec![2058; (rows / 2058) as usize], device).unwrap();
            let (alone, _) =
                timed(|| attend_segments(&q, &own[0], &own[1], &segments, &with(flash)).unwrap().out_rqd);
            let run = |policy: AttentionPolicy| {
                timed(|| {
                    let mut part = attend_segments(&q, &own[0], &own[1], &segments, &with(policy)).unwrap();
                    add_attention(&mut part, &q, &k, &v, &with(policy)).unwrap();
                    part.out_rqd
                })
            };
            let what = format!("{rows} rows over {keys} keys, squares alone {:.2} ms", alone * 1e3);
            report(&what, (rows * keys) as f64, run(flash), run(cudnn));
        }
    }
    for (start, s) in
        [(0i64, 8192i64), (0, 32_768), (16_000, 16_000), (16_384, 16_384), (114_688, 16_384), (32_000, 768)]
    {
        let q = random(1, &[s, q_heads + heads, d], kind, device).narrow(1, 0, q_heads);
        let [k, v] = [2, 3].map(|seed| random(seed, &[heads, start + s, d], kind, device));
        let run = |policy: AttentionPolicy, wants_lse| {
            timed(|| attend(&q, &k, &v, start as usize, wants_lse, &with(policy)).unwrap().0)
        };
        let pairs = s as f64 * (start as f64 + s as f64 / 2.0);
        report(&format!("prefill {start} + {s}"), pairs, run(flash, true), run(cudnn, true));
        println!("  without log-sum-exp: {:.2} ms", run(cudnn, false).0 * 1e3);
    }
}
