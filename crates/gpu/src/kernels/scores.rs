//! KVzip scores and query statistics: `kernels/scores.cu`.
//!
//! Nothing of size rows x keys leaves the registers. The definitions are the portable forms of the operators
//! that choose these kernels, `ops/scores.rs`, `ops/replay.rs` and `ops/statistics.rs`.

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use super::module::{Arg, Launch, capability, kernel};
use super::source::{Tiles, Unit, Variant};
use crate::upload;

/// Long sweeps over queries or keys. With 32 query heads of 64 and 8 KV heads, 32,768 positions, one H200:
/// 7.3 ms, against 8.0 for `NARROW` and 8.8 for two warpgroups without overlap.
pub(super) const WIDE: Tiles = Tiles { groups: 4, parts: 4, stages: 2, blocks: 1 };
/// Short sweeps, as windows are: 0.50 ms where `WIDE` takes 0.76.
pub(super) const NARROW: Tiles = Tiles { groups: 2, parts: 2, stages: 3, blocks: 2 };

/// Fit tiles to a head: 256 dimensions leave registers for two warpgroups only.
pub(super) fn tiles_for(wanted: Tiles, head_dim: u32) -> Tiles {
    if head_dim > 128 { Tiles { groups: 2, parts: 2, stages: 2, blocks: 1 } } else { wanted }
}

impl Tiles {
    fn rows(self) -> usize {
        64 * self.groups as usize
    }

    fn launch(self, head_dim: u32, grid: [usize; 3]) -> Launch {
        let width = [64, 128, 256].into_iter().find(|w| head_dim <= *w).unwrap_or(256) as usize;
        let rows = 64 * self.parts as usize;
        // The tiles are aligned to 1024 bytes.
        let shared = 1024 + self.stages as usize * (rows * width * 2 + rows * 4);
        Launch { grid, threads: 128 * self.groups as usize, shared }
    }
}

/// Can the fused kernels work on such queries? Hopper, bf16 or f16, head_dim a multiple of 8 up to 256.
pub fn has_fused_scores(device: Device, kind: Kind, head_dim: i64) -> bool {
    let Device::Cuda(gpu) = device else { return false };
    Variant::bf16(kind).is_some()
        && head_dim % 8 == 0
        && (8..=256).contains(&head_dim)
        && capability(gpu).is_ok_and(|(major, _)| major == 9)
}

/// Queries and keys whose scaled products are logits.
#[derive(Clone, Copy, Debug)]
pub struct Products<'a> {
    /// `[rows, query_heads, head_dim]`, any floating kind and device, head_dim innermost, any strides; query
    /// heads of a KV head are neighbours.
    pub q_rqd: &'a Tensor,
    /// `[kv_heads, positions, head_dim]`, same kind and device, positions contiguous.
    pub k_hkd: &'a Tensor,
    /// Scale of products of queries and keys.
    pub scale: f64,
}

/// A scoring chunk, and which query rows repeat it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScoreRows {
    pub first_row: usize,
    pub rows: usize,
    /// Cache positions of the chunk.
    pub first_key: usize,
    pub keys: usize,
}

/// Where scores go, and means if they are wanted: the mean over rows and query group of the weights whose
/// maximum is the score. Computing them takes an exponential per weight, which the maximum does without.
#[derive(Clone, Copy)]
pub struct ScoreOutput<'a> {
    /// f32 `[kv_heads, positions]`, innermost contiguous; the mean's room is the same.
    pub max_ht: &'a Tensor,
    pub mean_ht: Option<&'a Tensor>,
    /// Cache position of the outputs' position 0.
    pub first: usize,
}

/// KVzip scores of several scoring chunks of one layer: for each KV pair the largest softmax weight that a
/// row of its chunk's repeat pays it, over rows and query group.
///
/// The softmax of a row runs over the first `sink` cached keys, its chunk's keys, and the repeat's own keys
/// up to the row, whose log-sum-exp is `own_lse_qr`; there are no own keys without it. Products and softmax
/// are f32.
///
/// # Shapes
/// - `of`: see [`Products`]
/// - `own_lse_qr`: f32 `[query_heads, rows]`, natural log
/// - `weights`: f32 `[rows]` and `[query_heads, out positions]`, which multiply the softmax weights (KVzip+);
///   positive
/// - `out`: each f32 `[kv_heads, out positions]`, innermost contiguous; position 0 is cache position
///   `first_out`. The chunks' positions are written.
///
/// # Errors
/// Shapes or kinds disagree, [`has_fused_scores`] is false, or the driver refuses.
pub fn fused_chunk_scores(
    of: Products,
    own_lse_qr: Option<&Tensor>,
    weights: Option<(&Tensor, &Tensor)>,
    chunks: &[ScoreRows],
    sink: usize,
    to: ScoreOutput,
) -> Result<()> {
    let s = Operands::new(of, WIDE)?;
    let Products { q_rqd, k_hkd, .. } = of;
    let ScoreOutput { max_ht, mean_ht, first: first_out } = to;
    let out = max_ht.size();
    ensure!(
        own_lse_qr.is_none_or(|own| {
            own.size() == [s.query_heads as i64, s.rows as i64]
                && own.kind() == Kind::Float
                && own.is_contiguous()
        }),
        "log-sum-exps must be contiguous f32 [{}, {}], found {own_lse_qr:?}",
        s.query_heads,
        s.rows
    );
    ensure!(
        out.len() == 2
            && out[0] == s.kv_heads as i64
            && max_ht.kind() == Kind::Float
            && max_ht.stride()[1] == 1
            && max_ht.device() == q_rqd.device(),
        "room for scores must be f32 [{}, positions] on {:?}, found {:?} {out:?}",
        s.kv_heads,
        q_rqd.device(),
        max_ht.kind()
    );
    if let Some(mean_ht) = mean_ht {
        ensure!(
            mean_ht.size() == out
                && mean_ht.stride() == max_ht.stride()
                && mean_ht.kind() == Kind::Float
                && mean_ht.device() == max_ht.device(),
            "room for means is {mean_ht:?}, expected the same as for scores, {max_ht:?}"
        );
    }
    for c in chunks {
        ensure!(
            c.first_row + c.rows <= s.rows
                && c.keys > 0
                && c.rows > 0
                && first_out <= c.first_key
                && sink <= c.first_key
                && c.first_key + c.keys <= s.positions
                && c.first_key + c.keys - first_out <= out[1] as usize,
            "the chunk {c:?} does not fit {} rows, {} keys and a sink of {sink}",
            s.rows,
            s.positions
        );
    }
    let (row_weight, column_weight) = match weights {
        None => (Arg::Absent, Arg::Absent),
        Some((rows_r, columns_qt)) => {
            ensure!(
                rows_r.size() == [s.rows as i64]
                    && columns_qt.size() == [s.query_heads as i64, out[1]]
                    && [rows_r, columns_qt].iter().all(|t| t.kind() == Kind::Float && t.is_contiguous()),
                "weights must be contiguous f32 [{}] and [{}, {}], found {rows_r:?} and {columns_qt:?}",
                s.rows,
                s.query_heads,
                out[1]
            );
            // The kernel counts columns of scores and of their weights alike.
            ensure!(max_ht.stride()[0] == out[1], "with weights, room for scores must be contiguous");
            (Arg::Tensor(rows_r), Arg::Tensor(columns_qt))
        }
    };
    let device = q_rqd.device();
    let table: Vec<i32> = chunks
        .iter()
        .flat_map(|c| [c.first_row, c.rows, c.first_key, c.keys])
        .map(i32::try_from)
        .collect::<Result<_, _>>()?;
    let table = upload(&Tensor::from_slice(&table), device)?;
    let lse2 = Tensor::empty([s.query_heads as i64, s.rows as i64], (Kind::Float, device));
    let most =
        |of: fn(&ScoreRows) -> usize| chunks.iter().map(of).max().unwrap_or(0).div_ceil(s.tiles.rows());
    let (row_tiles, key_tiles) = (most(|c| c.rows), most(|c| c.keys));
    if chunks.is_empty() {
        return Ok(());
    }

    let launch = s.tiles.launch(s.head_dim, [row_tiles, s.query_heads, chunks.len()]);
    let kernel_of = |name| kernel(device, s.variant, name, launch.shared);
    // SAFETY: arguments in the kernel's order; sizes and ranges were checked above.
    unsafe {
        kernel_of("row_lse")?.launch(
            &launch,
            &[
                Arg::Tensor(q_rqd),
                Arg::Tensor(k_hkd),
                own_lse_qr.map_or(Arg::Absent, Arg::Tensor),
                row_weight,
                Arg::Tensor(&lse2),
                Arg::Tensor(&table),
                Arg::Int(s.q_row),
                Arg::Long(s.q_head),
                Arg::Long(s.k_head),
                Arg::Int(s.group()),
                Arg::Int(sink as i32),
                Arg::Int(s.rows as i32),
                Arg::Float(s.scale2),
            ],
        )?;
        kernel_of(if mean_ht.is_some() { "column_max_mean" } else { "column_max" })?.launch(
            &s.tiles.launch(s.head_dim, [key_tiles, s.kv_heads, chunks.len()]),
            &[
                Arg::Tensor(q_rqd),
                Arg::Tensor(k_hkd),
                Arg::Tensor(&lse2),
                column_weight,
                Arg::Tensor(max_ht),
                mean_ht.map_or(Arg::Absent, Arg::Tensor),
                Arg::Tensor(&table),
                Arg::Int(s.q_row),
                Arg::Long(s.q_head),
                Arg::Long(s.k_head),
                Arg::Int(s.group()),
                Arg::Int(s.rows as i32),
                Arg::Int(first_out as i32),
                Arg::Long(max_ht.stride()[0]),
                Arg::Float(s.scale2),
            ],
        )
    }
}

/// Which channel of the output each statistic goes to; `None` is not computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatisticChannels {
    pub all_max: Option<usize>,
    pub all_sum: Option<usize>,
    pub window_max: Option<usize>,
    pub window_sum: Option<usize>,
    pub last_max: Option<usize>,
    pub last_sum: Option<usize>,
}

impl StatisticChannels {
    fn is_whole(&self) -> bool {
        self.all_max.is_some() || self.all_sum.is_some()
    }

    pub(crate) fn list(&self) -> [Option<usize>; 6] {
        [self.all_max, self.all_sum, self.window_max, self.window_sum, self.last_max, self.last_sum]
    }
}

/// Which queries count for a key; positions count from the context's begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueryStatistics {
    pub channels: StatisticChannels,
    /// Cache positions before the context.
    pub prefix: usize,
    /// A query counts if it is at least this many positions later.
    pub min_distance: usize,
    /// The window's queries are at most this many positions later.
    pub window: usize,
    /// The first of the last queries.
    pub last: usize,
    /// Of the whole range, queries at multiples of this count.
    pub stride: usize,
    /// Most queries that the portable form takes at once.
    pub block_tokens: usize,
}

/// Maximum and sum of the softmax weights that new queries pay each key, folded into what `out_hct` holds.
///
/// # Shapes
/// - `of`: see [`Products`]; queries are those of cache positions `first_query..first_query + rows`, of which
///   those of the prefix are skipped, and their own keys are the last
/// - `lse_qr`: f32 `[query_heads, rows]`, any strides, natural log-sum-exp of each row over all the keys it
///   sees
/// - `out_hct`: f32 `[kv_heads, channels, context positions]`, innermost contiguous: maxima and sums so far
///
/// # Errors
/// Shapes or kinds disagree, [`has_fused_scores`] is false, or the driver refuses.
pub fn fused_query_statistics(
    of: Products,
    lse_qr: &Tensor,
    first_query: usize,
    what: &QueryStatistics,
    out_hct: &Tensor,
) -> Result<()> {
    let channels = what.channels;
    let positions = (first_query + of.q_rqd.size()[0] as usize).saturating_sub(what.prefix);
    if channels.list().iter().all(Option::is_none) || positions == 0 {
        return Ok(());
    }
    let begin = first_query as i64 - what.prefix as i64;
    let stride = what.stride.max(1) as i64;
    if stride == 1 || !channels.is_whole() {
        return sweep(of, lse_qr, Queries { begin, step: 1, positions }, channels, what, out_hct);
    }
    // Two sweeps: the nearby and last queries, all of them; then a part of all queries.
    let StatisticChannels { all_max, all_sum, .. } = channels;
    let near = StatisticChannels { all_max: None, all_sum: None, ..channels };
    if near != StatisticChannels::default() {
        sweep(of, lse_qr, Queries { begin, step: 1, positions }, near, what, out_hct)?;
    }
    let first = (begin.max(0) + stride - 1) / stride * stride;
    if first - begin >= of.q_rqd.size()[0] {
        return Ok(());
    }
    let part = |x: &Tensor, dim| x.slice(dim, first - begin, None, stride);
    sweep(
        Products { q_rqd: &part(of.q_rqd, 0), ..of },
        &part(lse_qr, 1),
        Queries { begin: first, step: stride, positions },
        StatisticChannels { all_max, all_sum, ..StatisticChannels::default() },
        what,
        out_hct,
    )
}

/// Where the rows of a sweep lie: at context positions `begin`, `begin + step` and so on; `positions` are
/// read so far.
#[derive(Clone, Copy)]
struct Queries {
    begin: i64,
    step: i64,
    positions: usize,
}

fn sweep(
    of: Products,
    lse_qr: &Tensor,
    queries: Queries,
    channels: StatisticChannels,
    what: &QueryStatistics,
    out_hct: &Tensor,
) -> Result<()> {
    let list = channels.list();
    let Products { q_rqd, k_hkd, .. } = of;
    let s = Operands::new(of, if channels.is_whole() { WIDE } else { NARROW })?;
    let (out, positions) = (out_hct.size(), queries.positions);
    ensure!(
        lse_qr.size() == [s.query_heads as i64, s.rows as i64] && lse_qr.kind() == Kind::Float,
        "log-sum-exps must be f32 [{}, {}], found {:?} {:?}",
        s.query_heads,
        s.rows,
        lse_qr.kind(),
        lse_qr.size()
    );
    ensure!(
        out.len() == 3
            && out[0] == s.kv_heads as i64
            && out[2] >= positions as i64
            && list.iter().flatten().all(|c| (*c as i64) < out[1])
            && out_hct.kind() == Kind::Float
            && out_hct.stride()[2] == 1
            && out_hct.device() == q_rqd.device()
            && what.prefix + positions <= s.positions,
        "room for statistics is {out:?}, expected f32 [{}, channels, {positions}] for {channels:?}",
        s.kv_heads
    );
    let device = q_rqd.device();
    let lse_stride = lse_qr.stride();
    let parts = Tensor::empty([s.query_heads as i64, 6, positions as i64], (Kind::Float, device));
    let wanted = list.iter().enumerate().map(|(i, c)| i32::from(c.is_some()) << i).sum();
    let launch = s.tiles.launch(s.head_dim, [positions.div_ceil(s.tiles.rows()), s.query_heads, 1]);
    let places = list.map(|c| c.map_or(-1, |c| c as i32));
    // SAFETY: arguments in the kernels' order; sizes were checked above.
    unsafe {
        kernel(device, s.variant, "column_stats", launch.shared)?.launch(
            &launch,
            &[
                Arg::Tensor(q_rqd),
                Arg::Tensor(k_hkd),
                Arg::Tensor(lse_qr),
                Arg::Tensor(&parts),
                Arg::Int(s.q_row),
                Arg::Long(s.q_head),
                Arg::Long(s.k_head),
                Arg::Int(i32::try_from(lse_stride[1])?),
                Arg::Long(lse_stride[0]),
                Arg::Int(wanted),
                Arg::Int(s.group()),
                Arg::Int(s.rows as i32),
                Arg::Int(queries.begin as i32),
                Arg::Int(queries.step as i32),
                Arg::Int(positions as i32),
                Arg::Int(what.prefix as i32),
                Arg::Int(what.min_distance as i32),
                Arg::Int(what.window as i32),
                Arg::Int(what.last as i32),
                Arg::Float(s.scale2),
            ],
        )?;
        kernel(device, s.variant, "fold_stats", 0)?.launch(
            &Launch { grid: [positions.div_ceil(256), s.kv_heads, 1], threads: 256, shared: 0 },
            &[
                Arg::Tensor(&parts),
                Arg::Tensor(out_hct),
                Arg::Ints(&places),
                Arg::Long(out_hct.stride()[0]),
                Arg::Long(out_hct.stride()[1]),
                Arg::Int(s.group()),
                Arg::Int(positions as i32),
            ],
        )
    }
}

/// Queries and keys as the kernels address them.
struct Operands {
    variant: Variant,
    tiles: Tiles,
    rows: usize,
    query_heads: usize,
    kv_heads: usize,
    positions: usize,
    head_dim: u32,
    /// From products to logits in units of log 2.
    scale2: f32,
    q_row: i32,
    q_head: i64,
    k_head: i64,
}

impl Operands {
    fn new(Products { q_rqd, k_hkd, scale }: Products, wanted: Tiles) -> Result<Self> {
        let (q, k) = (q_rqd.size(), k_hkd.size());
        ensure!(
            q.len() == 3 && k.len() == 3 && q[2] == k[2] && k[0] > 0 && q[1] % k[0] == 0 && q[0] > 0,
            "queries {q:?} and keys {k:?} do not fit: expected [rows, query heads, head_dim] and \
             [KV heads, positions, head_dim]"
        );
        ensure!(
            q_rqd.kind() == k_hkd.kind()
                && q_rqd.device() == k_hkd.device()
                && has_fused_scores(q_rqd.device(), q_rqd.kind(), q[2]),
            "no fused score kernel for queries {:?} {q:?} and keys {:?} on {:?}",
            q_rqd.kind(),
            k_hkd.kind(),
            q_rqd.device()
        );
        let (q_stride, k_stride) = (q_rqd.stride(), k_hkd.stride());
        ensure!(
            q_stride[2] == 1
                && k_stride[2] == 1
                && (k_stride[1] == k[2] || k[1] == 1)
                && q_stride.iter().chain(&k_stride).all(|n| n % 8 == 0 || *n == 1)
                && [q_rqd, k_hkd].iter().all(|t| (t.data_ptr() as usize).is_multiple_of(16)),
            "queries of strides {q_stride:?} or keys of strides {k_stride:?} are not in 16-byte pieces"
        );
        let Device::Cuda(gpu) = q_rqd.device() else { unreachable!("checked above") };
        let head_dim = q[2] as u32;
        let tiles = tiles_for(wanted, head_dim);
        let bf16 = Variant::bf16(q_rqd.kind()).unwrap_or(true);
        Ok(Self {
            variant: Variant { unit: Unit::Scores(tiles), head_dim, bf16, capability: capability(gpu)? },
            tiles,
            rows: q[0] as usize,
            query_heads: q[1] as usize,
            kv_heads: k[0] as usize,
            positions: k[1] as usize,
            head_dim,
            scale2: (std::f64::consts::LOG2_E * scale) as f32,
            q_row: i32::try_from(q_stride[0])?,
            q_head: q_stride[1],
            k_head: k_stride[0],
        })
    }

    fn group(&self) -> i32 {
        (self.query_heads / self.kv_heads) as i32
    }
}
