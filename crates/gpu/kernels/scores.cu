// KVzip scores and query statistics from queries, keys and log-sum-exps; no matrix of rows x keys leaves the registers.
//
// Queries are token-major: row r of head q at q + r * q_row + q_head * q. Keys are head-major: position t of KV head h at
// k + h * k_head + t * HEAD_DIM. Log-sum-exps are [query heads, rows], in units of log 2, of logits scaled by
// 1 / sqrt(head_dim).

// A scoring chunk and the rows that repeat it.
struct Segment {
  int first_row, rows;    // of the queries
  int first_key, keys;    // cache positions of the scoring chunk
};

extern __shared__ char shared_raw[];

// The log-sum-exp of each row over the sink and its chunk, merged with `own`, that over the repeat's own keys (natural log; null
// where there are none).
//
// lse2[head][row] = log2(exp(own) + sum over sink and chunk of exp(logit)) - log2(row_weight[row])
// grid: row tiles, query heads, segments
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
row_lse(const half_t* q, const half_t* k, const float* own, const float* row_weight, float* lse2, const Segment* segments,
        int q_row, long long q_head, long long k_head, int group, int sink, int all_rows, float scale2) {
  const Segment s = segments[blockIdx.z];
  const int row0 = blockIdx.x * STATIONARY;
  if (row0 >= s.rows) return;
  const Shared shared(shared_raw);
  const int head = blockIdx.y, rows = min(STATIONARY, s.rows - row0);
  const half_t* keys = k + (head / group) * k_head;
  Stationary a;
  a.load(q + (long long)(s.first_row + row0) * q_row + head * q_head, q_row, rows);

  const int columns = sink + s.keys;
  float top[2] = {LOWEST, LOWEST}, sum[2] = {0.f, 0.f};
  auto load = [&](int i, int stage) {
    stream_tile(shared.tiles + stage * TILE_BYTES, keys, HEAD_DIM, [&](int r) {
      const int c = i * TILE + r;
      return c < columns ? c + (c < sink ? 0 : s.first_key - sink) : -1;
    });
  };
  auto fold = [&](auto value) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float peak = LOWEST;
#pragma unroll
      for (int j = 0; j < PART / 8; j++) peak = fmaxf(peak, fmaxf(value(j, h, 0), value(j, h, 1)));
      const float now = fmaxf(top[h], peak * scale2);
      float add = 0.f;
#pragma unroll
      for (int j = 0; j < PART / 8; j++)
        add += exp2_fast(fmaf(value(j, h, 0), scale2, -now)) + exp2_fast(fmaf(value(j, h, 1), scale2, -now));
      sum[h] = fmaf(sum[h], exp2_fast(top[h] - now), add);
      top[h] = now;
    }
  };
  auto use = [&](int i, int part, int, const Products& p) {
    const int left = columns - i * TILE - part * PART;
    // The last tile's columns past the end do not count.
    auto value = [&](int j, int h, int v) { return p.value[4 * j + 2 * h + v]; };
    auto inside = [&](int j, int h, int v) { return column_of(j, v) < left ? value(j, h, v) : -INFINITE; };
    if (left >= PART) fold(value);
    else fold(inside);
  };
  stream((columns + TILE - 1) / TILE, shared, a, load, use);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = row0 + row_of(h);
    const float all = row_max(top[h]);
    const float total = row_sum(sum[h] * exp2_fast(top[h] - all));
    if (row >= s.rows || threadIdx.x % 4) continue;
    const long long at = (long long)head * all_rows + s.first_row + row;
    const float mine = own ? own[at] * LOG2E : LOWEST, peak = fmaxf(all, mine);
    float lse = peak + log2f(total * exp2f(all - peak) + exp2f(mine - peak));
    if (row_weight) lse -= log2f(row_weight[s.first_row + row]);
    lse2[at] = lse;
  }
}

// The KVzip score of each key of each segment's chunk: the largest softmax weight over the repeat's rows and the query group;
// with MEANS also the mean over both.
//
// score[kv head][out position] = max over group, rows of exp2(logit2 - lse2) * column_weight[head][out position]
// grid: key tiles, KV heads, segments
template <bool MEANS>
__device__ __forceinline__ void column_scores(const half_t* q, const half_t* k, const float* lse2, const float* column_weight,
                                              float* score, float* mean, const Segment* segments, int q_row,
                                              long long q_head, long long k_head, int group, int all_rows, int first_out,
                                              long long score_head, float scale2) {
  const Segment s = segments[blockIdx.z];
  const int key0 = blockIdx.x * STATIONARY;
  if (key0 >= s.keys) return;
  const Shared shared(shared_raw);
  const int head = blockIdx.y, keys = min(STATIONARY, s.keys - key0);
  Stationary a;
  a.load(k + head * k_head + (long long)(s.first_key + key0) * HEAD_DIM, HEAD_DIM, keys);

  const int per_head = (s.rows + TILE - 1) / TILE;
  auto load = [&](int i, int stage) {
    const int g = head * group + i / per_head, row0 = (i % per_head) * TILE;
    stream_tile(shared.tiles + stage * TILE_BYTES, q + g * q_head, q_row,
                [&](int r) { return row0 + r < s.rows ? s.first_row + row0 + r : -1; });
    stream_column(shared.column + stage * TILE, lse2 + (long long)g * all_rows + s.first_row + row0, s.rows - row0);
  };
  float best[2] = {LOWEST, LOWEST}, top[2] = {LOWEST, LOWEST};
  float total[2] = {0.f, 0.f}, sum[2] = {0.f, 0.f};
  const int out0 = s.first_key + key0 - first_out;
  auto use = [&](int i, int part, int stage, const Products& p) {
    const float2* column = (const float2*)(shared.column + stage * TILE + part * PART);
#pragma unroll
    for (int j = 0; j < PART / 8; j++) {
      const float2 l = column[j * 4 + threadIdx.x % 4];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float x = fmaf(p.value[4 * j + 2 * h], scale2, -l.x), y = fmaf(p.value[4 * j + 2 * h + 1], scale2, -l.y);
        top[h] = fmaxf(top[h], x);
        top[h] = fmaxf(top[h], y);
        if (MEANS) sum[h] += exp2_fast(x) + exp2_fast(y);
      }
    }
    if (column_weight && part == PARTS - 1 && (i + 1) % per_head == 0) {
      const int g = head * group + i / per_head;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int key = row_of(h);
        if (key < keys) {
          const float weight = column_weight[g * score_head + out0 + key];
          best[h] = fmaxf(best[h], top[h] + log2f(weight));
          if (MEANS) total[h] = fmaf(sum[h], weight, total[h]);
        }
        top[h] = LOWEST;
        sum[h] = 0.f;
      }
    }
  };
  stream(per_head * group, shared, a, load, use);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float all = row_max(column_weight ? best[h] : top[h]);
    const float weights = MEANS ? row_sum(column_weight ? total[h] : sum[h]) : 0.f;
    const int key = row_of(h);
    if (key >= keys || threadIdx.x % 4) continue;
    const long long at = head * score_head + out0 + key;
    score[at] = exp2f(all);
    if (MEANS) mean[at] = weights / ((float)group * (float)s.rows);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
column_max(const half_t* q, const half_t* k, const float* lse2, const float* column_weight, float* score, float* mean,
           const Segment* segments, int q_row, long long q_head, long long k_head, int group, int all_rows, int first_out,
           long long score_head, float scale2) {
  column_scores<false>(q, k, lse2, column_weight, score, mean, segments, q_row, q_head, k_head, group, all_rows, first_out,
                       score_head, scale2);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
column_max_mean(const half_t* q, const half_t* k, const float* lse2, const float* column_weight, float* score, float* mean,
                const Segment* segments, int q_row, long long q_head, long long k_head, int group, int all_rows,
                int first_out, long long score_head, float scale2) {
  column_scores<true>(q, k, lse2, column_weight, score, mean, segments, q_row, q_head, k_head, group, all_rows, first_out,
                      score_head, scale2);
}

// Statistics of one query head and key: over all queries, those in the window, the last ones.
enum Statistic { ALL_MAX, ALL_SUM, WINDOW_MAX, WINDOW_SUM, LAST_MAX, LAST_SUM, STATISTICS };

// Maxima and sums of the softmax weights that queries pay to each key, over queries at least `near` positions later: all of
// them, those at most `window` later, and those from position `last` on. Maxima are left as log2. What is not in `want`, a
// bit per statistic, is not computed.
//
// parts[query head][statistic][position]
// Positions count from the context's begin: query row r is at first_query + r * step (negative ones are skipped), key t, of
// `end` there are, at k + (prefix + t) * HEAD_DIM. A step above 1 is for the whole range alone. The log-sum-exp of a row, a
// natural log here, is at lse + head * lse_head + r * lse_row.
// grid: key tiles (from the first), query heads
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
column_stats(const half_t* q, const half_t* k, const float* lse, float* parts, int q_row, long long q_head,
             long long k_head, int lse_row, long long lse_head, int want, int group, int rows, int first_query, int step,
             int end, int prefix, int near, int window, int last, float scale2) {
  const Shared shared(shared_raw);
  const int head = blockIdx.y, key0 = blockIdx.x * STATIONARY;
  const int keys = min(STATIONARY, end - key0);
  // Queries that may matter to some key of the tile.
  const int from_row = (max(max(first_query, 0), key0 + near) - first_query + step - 1) / step;
  const int from = first_query + from_row * step, reach = TILE * step;
  const bool whole = want & (1 << ALL_MAX | 1 << ALL_SUM), windowed = want & (1 << WINDOW_MAX | 1 << WINDOW_SUM),
             lasting = want & (1 << LAST_MAX | 1 << LAST_SUM);
  // Without the whole range: the window's tiles, then the last queries' that come after them.
  const int head_end = whole ? end : windowed ? min(end, key0 + STATIONARY + window) : from;
  const int head_tiles = max(0, (head_end - from + reach - 1) / reach);
  const int tail_from = max(from + head_tiles * reach, last);
  const int tail_tiles = lasting ? max(0, (end - tail_from + TILE - 1) / TILE) : 0;
  Stationary a;
  a.load(k + (head / group) * k_head + (long long)(prefix + key0) * HEAD_DIM, HEAD_DIM, keys);

  auto first_of = [&](int i) { return i < head_tiles ? from + i * reach : tail_from + (i - head_tiles) * TILE; };
  auto load = [&](int i, int stage) {
    const int row0 = i < head_tiles ? from_row + i * TILE : first_of(i) - first_query;
    stream_tile(shared.tiles + stage * TILE_BYTES, q + head * q_head, q_row,
                [&](int r) { return row0 + r < rows ? row0 + r : -1; });
    stream_column(shared.column + stage * TILE, lse + head * lse_head + (long long)row0 * lse_row, rows - row0, lse_row, LOG2E);
  };
  // A query in the window is not in the rest; one of the last is in one of the two as well.
  struct Sums {
    float top[2] = {LOWEST, LOWEST}, sum[2] = {0.f, 0.f};
    __device__ __forceinline__ void add(int h, float x, float weight) {
      top[h] = fmaxf(top[h], x);
      sum[h] += weight;
    }
  } rest, in_window, in_last;
  const int group_key0 = key0 + (threadIdx.x / 128) * 64; // of the warpgroup's 64 keys
  auto use = [&](int i, int part, int stage, const Products& p) {
    const float2* column = (const float2*)(shared.column + stage * TILE + part * PART);
    const int query0 = first_of(i) + part * PART * step;
    const int nearest = query0 - group_key0 - 63, farthest = query0 + (PART - 1) * step - group_key0;
    const bool has_last = lasting && query0 + PART > last;
    // Too near to all of the keys, behind the last query, or between a window and the last queries.
    if (farthest < near || query0 >= end || !(whole || has_last || (windowed && nearest <= window))) return;
    // All weights of the part belong together.
    auto add_all = [&](Sums& to) {
#pragma unroll
      for (int j = 0; j < PART / 8; j++) {
        const float2 l = column[j * 4 + threadIdx.x % 4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float x = fmaf(p.value[4 * j + 2 * h], scale2, -l.x), y = fmaf(p.value[4 * j + 2 * h + 1], scale2, -l.y);
          to.top[h] = fmaxf(to.top[h], fmaxf(x, y));
          to.sum[h] += exp2_fast(x) + exp2_fast(y);
        }
      }
    };
    if (nearest >= near && !has_last && (!windowed || nearest > window)) return add_all(rest);
    if (nearest >= near && !has_last && farthest <= window) return add_all(in_window);
#pragma unroll
    for (int j = 0; j < PART / 8; j++) {
      const float2 l = column[j * 4 + threadIdx.x % 4];
#pragma unroll
      for (int v = 0; v < 2; v++) {
        const int query = query0 + column_of(j, v) * step;
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int distance = query - key0 - row_of(h);
          const float x = distance >= near ? fmaf(p.value[4 * j + 2 * h + v], scale2, v ? -l.y : -l.x) : -INFINITE;
          const float weight = exp2_fast(x);
          if (windowed && distance <= window) in_window.add(h, x, weight);
          else rest.add(h, x, weight);
          if (query >= last) in_last.add(h, x, weight);
        }
      }
    }
  };
  stream(head_tiles + tail_tiles, shared, a, load, use);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int key = row_of(h);
    float* place = parts + (long long)head * STATISTICS * end + key0 + key;
    auto write = [&](int statistic, float x) {
      if (want >> statistic & 1 && key < keys && threadIdx.x % 4 == 0) place[(long long)statistic * end] = x;
    };
    const float window_top = row_max(in_window.top[h]), window_sum = row_sum(in_window.sum[h]);
    write(ALL_MAX, fmaxf(row_max(rest.top[h]), window_top));
    write(ALL_SUM, row_sum(rest.sum[h]) + window_sum);
    write(WINDOW_MAX, window_top);
    write(WINDOW_SUM, window_sum);
    write(LAST_MAX, row_max(in_last.top[h]));
    write(LAST_SUM, row_sum(in_last.sum[h]));
  }
}

// Where each statistic goes: a channel of `out`, -1 for nowhere.
struct Channels {
  int of[STATISTICS];
};

// Fold the statistics of the query heads of each KV head into out[kv head][channel][position]: the maximum of its weights, the
// sum of its sums. grid: positions / blockDim, KV heads
extern "C" __global__ void fold_stats(const float* parts, float* out, Channels channels, long long out_head,
                                      long long out_channel, int group, int positions) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= positions) return;
#pragma unroll
  for (int s = 0; s < STATISTICS; s++) {
    if (channels.of[s] < 0) continue;
    const bool sums = s % 2;
    float x = sums ? 0.f : LOWEST;
    for (int g = 0; g < group; g++) {
      const float y = parts[((long long)(blockIdx.y * group + g) * STATISTICS + s) * positions + t];
      x = sums ? x + y : fmaxf(x, y);
    }
    float* place = out + blockIdx.y * out_head + channels.of[s] * out_channel + t;
    *place = sums ? *place + x : fmaxf(*place, exp2f(x));
  }
}
