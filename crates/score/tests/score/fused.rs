//! The fused kernels against the plain version, on the GPU, from the same 16-bit queries and keys.

use std::io::Write as _;

use pkv_gpu::{Products, ScoreOutput, ScoreRows, fused_chunk_scores, has_fused_scores};
use pkv_score::{ChunkAttention, Weighting, chunk_scores};
use tch::{Device, Kind, Tensor};

struct Case {
    kind: Kind,
    heads: i64,
    group: i64,
    d: i64,
    prefix: usize,
    sink: usize,
    /// Rows and chunk lengths of the segments.
    segments: &'static [(usize, usize)],
    weighted: bool,
}

const CASES: &[Case] = &[
    case(Kind::BFloat16, 2, 2, 64, 7, 5, &[(300, 257), (130, 129), (1, 1), (77, 3)], false),
    case(Kind::BFloat16, 8, 4, 128, 30, 30, &[(2058, 2000), (2063, 2000), (600, 541)], false),
    case(Kind::BFloat16, 2, 3, 128, 7, 0, &[(300, 257), (130, 129)], true),
    case(Kind::BFloat16, 1, 7, 96, 4, 4, &[(65, 63), (64, 64), (63, 65)], true),
    case(Kind::BFloat16, 2, 1, 256, 0, 0, &[(100, 99), (258, 256)], false),
    case(Kind::Half, 2, 5, 80, 12, 4, &[(301, 300), (17, 1)], true),
];

#[expect(clippy::too_many_arguments, reason = "a table's row")]
const fn case(
    kind: Kind,
    heads: i64,
    group: i64,
    d: i64,
    prefix: usize,
    sink: usize,
    segments: &'static [(usize, usize)],
    weighted: bool,
) -> Case {
    Case { kind, heads, group, d, prefix, sink, segments, weighted }
}

/// 1/sqrt(head_dim) of none of the cases.
const SCALE: f64 = 0.1;

#[test]
fn fused_scores_equal_the_plain_ones() {
    let device = if pkv_gpu::cuda_count() > 0 { Device::Cuda(0) } else { Device::Cpu };
    if !has_fused_scores(device, Kind::BFloat16, 64) {
        assert!(fused_chunk_scores_refuse_a_cpu());
        writeln!(std::io::stderr(), "SKIPPED: fused scores need a Hopper GPU").unwrap();
        return;
    }
    for (number, c) in CASES.iter().enumerate() {
        let worst = worst(c, device, number as i64);
        assert!(worst < 1e-4, "case {number}: scores differ by {worst:e} of their size");
    }
}

/// The largest relative difference of scores and means over all segments.
fn worst(c: &Case, device: Device, seed: i64) -> f64 {
    tch::manual_seed(seed);
    let context: usize = c.segments.iter().map(|s| s.1).sum();
    let rows: usize = c.segments.iter().map(|s| s.0).sum();
    let random = |size: &[i64]| Tensor::randn(size, (Kind::Float, device)).to_kind(c.kind);
    let (q_heads, n) = (c.heads * c.group, rows as i64);
    // As models have them: queries are a part of a wider row, the cache has room to spare.
    let qkv = random(&[n, q_heads + 2 * c.heads, c.d]);
    let (q_rqd, k_rhd) = (qkv.narrow(1, 0, q_heads), qkv.narrow(1, q_heads, c.heads));
    let cached = (c.prefix + context) as i64;
    let k_hkd = random(&[c.heads, cached + 9, c.d]).narrow(1, 0, cached);
    let (rows_r, columns_qt) = (
        Tensor::rand([n], (Kind::Float, device)) + 0.5,
        Tensor::rand([q_heads, context as i64], (Kind::Float, device)) + 0.5,
    );

    let (mut chunks, mut own) = (Vec::new(), Vec::new());
    let (mut first_row, mut first_key) = (0, c.prefix);
    let (mut expected, mut expected_mean) = (Vec::new(), Vec::new());
    for &(rows, keys) in c.segments {
        chunks.push(ScoreRows { first_row, rows, first_key, keys });
        let part = |x: &Tensor| x.narrow(0, first_row as i64, rows as i64).transpose(0, 1);
        let (q_qsd, own_hsd) = (part(&q_rqd), part(&k_rhd));
        let spread = own_hsd.repeat_interleave_self_int(c.group, 0, None).to_kind(Kind::Float);
        let logits = q_qsd.to_kind(Kind::Float).matmul(&spread.transpose(1, 2)) * SCALE;
        let later = Tensor::ones([rows as i64; 2], (Kind::Bool, device)).triu(1);
        own.push(logits.masked_fill(&later, f64::NEG_INFINITY).logsumexp([-1i64], false));

        let all = Tensor::cat(&[&k_hkd, &own_hsd], 1);
        let at = first_key - c.prefix;
        let weighting = c.weighted.then(|| Weighting {
            rows_s: rows_r.narrow(0, first_row as i64, rows as i64),
            columns_qt: columns_qt.narrow(1, at as i64, keys as i64),
        });
        let attention = ChunkAttention {
            q_qsd: &q_qsd,
            k_hkd: &all,
            scale: SCALE,
            sink: c.sink,
            chunk: first_key..first_key + keys,
        };
        let plain = chunk_scores(&attention, weighting.as_ref(), 1 << 22).unwrap();
        expected.push(plain.max_ht);
        expected_mean.push(plain.mean_ht);
        first_row += rows;
        first_key += keys;
    }
    let room = || Tensor::full([c.heads, context as i64], f64::NAN, (Kind::Float, device));
    let (got, got_mean, got_alone) = (room(), room(), room());
    let weights = c.weighted.then_some((&rows_r, &columns_qt));
    let own = Tensor::cat(&own, 1);
    let of = Products { q_rqd: &q_rqd, k_hkd: &k_hkd, scale: SCALE };
    for (max_ht, mean_ht) in [(&got, Some(&got_mean)), (&got_alone, None)] {
        let to = ScoreOutput { max_ht, mean_ht, first: c.prefix };
        fused_chunk_scores(of, Some(&own), weights, &chunks, c.sink, to).unwrap();
    }
    assert!(got.equal(&got_alone), "the scores change with the means beside them");
    let worst = |got: &Tensor, expected: &[Tensor]| {
        let expected = Tensor::cat(expected, 1);
        let off = (got - &expected).abs() / &expected;
        // NaN is larger than any tolerance.
        if off.isnan().any().int64_value(&[]) != 0 { f64::INFINITY } else { off.max().double_value(&[]) }
    };
    worst(&got, &expected).max(worst(&got_mean, &expected_mean))
}

/// Where there is no such GPU the call is an error, not a crash.
fn fused_chunk_scores_refuse_a_cpu() -> bool {
    let x = |size: &[i64]| Tensor::zeros(size, (Kind::Float, Device::Cpu));
    let chunk = ScoreRows { first_row: 0, rows: 3, first_key: 0, keys: 2 };
    let (q, k, own, out) = (x(&[3, 2, 64]), x(&[2, 2, 64]), x(&[2, 3]), x(&[2, 2]));
    let to = ScoreOutput { max_ht: &out, mean_ht: None, first: 0 };
    let of = Products { q_rqd: &q, k_hkd: &k, scale: SCALE };
    fused_chunk_scores(of, Some(&own), None, &[chunk], 0, to).is_err()
}
