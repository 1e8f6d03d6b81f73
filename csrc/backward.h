// Backward passes: dq over tiles of rows, dk and dv over tiles of keys.
//
//   dS = P (dP - delta) + P G c,   c = d_loss / H,   dP = dO v^T
//   delta = sum_j P dP + c sum_v P G - d_lse        (modular: delta = 0, d_lse = -c sum_v P G)
//
// delta is summed from P and dP, so that `out` is not needed. G meets P before c: it may be as
// large as 1 / (smallest probability).
#pragma once

#include "tiles.h"
#include "visibility.h"

namespace cdfast {
namespace CDFAST_ISA {

// G of a row of a tile, or null where the row has none.
static CDFAST_INLINE const float* g_row(const Problem& p, int64_t sample, const KeyTile& tile,
                                        int position) {
  if (p.map == nullptr || p.d_loss == nullptr || tile.slot < 0) return nullptr;
  return map_row(p, sample, tile.slot, position);
}

static CDFAST_INLINE float loss_factor(const Problem& p, int64_t sample) {
  return p.d_loss == nullptr ? 0.0f : p.d_loss[sample] / static_cast<float>(p.heads);
}

// sum_j P dP of a row of one tile.
static float dot_row(const float* a, const float* b) {
  Vec total = Vec{};
  for (int j = 0; j < kTile; j += kWidth) total += load(a + j) * load(b + j);
  return sum(total);
}

static float sum_row(const float* a) {
  Vec total = Vec{};
  for (int j = 0; j < kTile; j += kWidth) total += load(a + j);
  return sum(total);
}

// Turns dP into dS in one row of one tile, P = norm * probs.
static void d_scores_row(const float* probs, float norm, const float* g, float delta, float factor,
                         float* d_probs) {
  const Vec shift = splat(delta), c = splat(factor), scale = splat(norm);
  for (int j = 0; j < kTile; j += kWidth) {
    const Vec prob = load(probs + j) * scale;
    Vec ds = prob * (load(d_probs + j) - shift);
    if (g != nullptr) ds += (prob * load(g + j)) * c;
    store(d_probs + j, ds);
  }
}

// delta of each row, and dS in place of dP.
static void d_scores(const Problem& p, const RowTile& at, const RowInfo& rows, int64_t head,
                     int n_tiles, const Scratch& w) {
  const int64_t base = p.axis.row_base(at.sample, head, p.heads) + at.begin;
  const float c = loss_factor(p, at.sample);
  for (int r = 0; r < rows.n; ++r) {
    if (!rows.live[r]) {
      p.delta[base + r] = 0;
      if (p.norm != nullptr) p.norm[base + r] = 1;
      continue;
    }
    double total = 0, plain = 0, aligned = 0;
    for (int t = 0; t < n_tiles; ++t) {
      const float* probs = w.s + t * kBlock + r * kTile;
      const float* g = g_row(p, at.sample, w.tiles[t], at.begin + r);
      total += sum_row(probs);
      if (p.d_out.data != nullptr) plain += dot_row(probs, w.dp + t * kBlock + r * kTile);
      if (g != nullptr) aligned += dot_row(probs, g);
    }
    // exp(s - lse) has the rounding of lse in common; without it rows sum to 1.
    const float norm = p.norm == nullptr ? 1.0f : static_cast<float>(1 / total);
    if (p.norm != nullptr) p.norm[base + r] = norm;
    double delta = norm * (plain + c * aligned);
    if (p.d_lse != nullptr) delta -= p.d_lse[base + r];
    p.delta[base + r] = static_cast<float>(p.modular ? 0.0 - delta : delta);
    const float shift = p.modular ? 0.0f : static_cast<float>(delta);
    for (int t = 0; t < n_tiles; ++t) {
      const float* g = g_row(p, at.sample, w.tiles[t], at.begin + r);
      const int64_t block = t * kBlock + r * kTile;
      d_scores_row(w.s + block, norm, g, shift, c, w.dp + block);
    }
  }
}

static void backward_rows_head(const Problem& p, const PackedTiles& packed, int64_t pair,
                               int64_t head, const RowTile& at, const RowInfo& rows, int n_tiles,
                               const Scratch& w) {
  const int pad = p.dim_pad(), dim = static_cast<int>(p.dim);
  load_rows(p, p.q, at, head, p.scale, w.q);
  if (p.d_out.data != nullptr) load_rows(p, p.d_out, at, head, 1.0f, w.d_o);
  for (int t = 0; t < n_tiles; ++t) {
    float* tile = packed.at(pair, w.tiles[t].index);
    float* probs = w.s + t * kBlock;
    float* d_probs = w.dp + t * kBlock;
    product<false>(rows.n_pad, kTile, dim, {w.q, pad, 1}, tile + packed.k_t, kTile, probs, kTile);
    probabilities(p, at, rows, head, w.tiles[t], nullptr, probs);
    if (p.d_out.data == nullptr) {
      std::memset(d_probs, 0, sizeof(float) * kBlock);
      continue;
    }
    product<false>(rows.n_pad, kTile, dim, {w.d_o, pad, 1}, tile + packed.v_t, kTile, d_probs,
                   kTile);
  }
  d_scores(p, at, rows, head, n_tiles, w);
  std::memset(w.acc, 0, sizeof(float) * rows.n_pad * pad);
  for (int t = 0; t < n_tiles; ++t) {
    const float* k = packed.at(pair, w.tiles[t].index) + packed.k;
    product<true>(rows.n_pad, pad, kTile, {w.dp + t * kBlock, kTile, 1}, k, pad, w.acc, pad);
  }
  for (int r = 0; r < rows.n; ++r) {
    const int64_t offset = p.dq.offset(at.sample, at.begin + r, head);
    if (rows.live[r]) {
      store_row(p.dq, offset, p.dim, p.scale, w.acc + r * pad);
    } else {
      zero_row(p.dq, offset, p.dim);
    }
  }
}

static void backward_rows(const Problem& p, const PackedTiles& packed, const RowTask& task,
                          const Scratch& w) {
  RowInfo rows;
  read_rows(p.axis, task.rows, &rows);
  const int n_tiles = visible_key_tiles(p.axis, task.rows, p.modular, w.tiles);
  const int64_t group = p.group();
  for (int64_t pair = task.first_pair; pair < task.last_pair; ++pair) {
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = pair % p.kv_heads * group + g;
      backward_rows_head(p, packed, pair, head, task.rows, rows, n_tiles, w);
    }
  }
}

// Parts of Scratch::keys for one key tile.
struct KeyScratch {
  float *k_t, *v_t, *dk, *dv;
};

static CDFAST_INLINE KeyScratch key_scratch(const Problem& p, const Scratch& w, int index) {
  const int64_t part = static_cast<int64_t>(kTile) * p.dim_pad();
  float* at = w.keys + 4 * part * index;
  return {at, at + part, at + 2 * part, at + 3 * part};
}

// Adds what the rows `at` of one head give to dk and dv of one key tile. q and dO are loaded.
static void add_rows_to_keys(const Problem& p, const RowTile& at, const RowInfo& rows, int64_t head,
                             const KeyTile& tile, const KeyScratch& keys, const Scratch& w) {
  const int pad = p.dim_pad(), dim = static_cast<int>(p.dim);
  const int64_t base = p.axis.row_base(at.sample, head, p.heads) + at.begin;
  const float c = loss_factor(p, at.sample);
  product<false>(rows.n_pad, kTile, dim, {w.q, pad, 1}, keys.k_t, kTile, w.s, kTile);
  probabilities(p, at, rows, head, tile, p.norm, w.s);
  if (p.d_out.data != nullptr) {
    product<false>(rows.n_pad, kTile, dim, {w.d_o, pad, 1}, keys.v_t, kTile, w.dp, kTile);
    product<true>(kTile, pad, rows.n_pad, {w.s, 1, kTile}, w.d_o, pad, keys.dv, pad);
  } else {
    std::memset(w.dp, 0, sizeof(float) * kBlock);
  }
  for (int r = 0; r < rows.n; ++r) {
    const float* g = g_row(p, at.sample, tile, at.begin + r);
    const float delta = p.modular || !rows.live[r] ? 0.0f : p.delta[base + r];
    d_scores_row(w.s + r * kTile, 1.0f, g, delta, c, w.dp + r * kTile);
  }
  product<true>(kTile, pad, rows.n_pad, {w.dp, 1, kTile}, w.q, pad, keys.dk, pad);
}

static void store_keys(const Problem& p, const View& x, int64_t sample, int tile, int64_t head,
                       const float* from) {
  const int begin = p.axis.begin(sample), end = p.axis.end(sample);
  const int32_t* codes = p.axis.codes + p.axis.token_base(sample);
  for (int j = 0; j < kTile; ++j) {
    const int key = tile * kTile + j;
    if (key < begin || key >= end) continue;
    const int64_t offset = x.offset(sample, key, head);
    if (codes[key] >= 0) {
      store_row(x, offset, p.dim, 1.0f, from + j * p.dim_pad());
    } else {
      zero_row(x, offset, p.dim);
    }
  }
}

// The rows of tile `row_tile` on all key tiles of the task.
static void backward_keys_rows(const Problem& p, const KeyTask& task, int64_t sample, int row_tile,
                               const Scratch& w) {
  const int64_t kv_head = task.pair % p.kv_heads, group = p.group();
  const RowTile at = row_tile_of(p.axis, sample, row_tile);
  KeyTile tiles[kKeyTiles];
  int n_tiles = 0;
  for (int tile = task.first_tile; tile < task.last_tile; ++tile) {
    const int slot = p.axis.slot_of(sample, tile);
    const Seen what = p.modular && slot < 0 ? Seen::none : seen(p.axis, at, tile);
    if (what == Seen::none) continue;
    tiles[n_tiles++] = {tile, slot, tile - task.first_tile, p.modular || what == Seen::some};
  }
  if (n_tiles == 0) return;
  RowInfo rows;
  read_rows(p.axis, at, &rows);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    load_rows(p, p.q, at, head, p.scale, w.q);
    if (p.d_out.data != nullptr) load_rows(p, p.d_out, at, head, 1.0f, w.d_o);
    for (int i = 0; i < n_tiles; ++i) {
      add_rows_to_keys(p, at, rows, head, tiles[i], key_scratch(p, w, tiles[i].index), w);
    }
  }
}

static void backward_keys(const Problem& p, const KeyTask& task, const Scratch& w) {
  const int64_t sample = task.pair / p.kv_heads, kv_head = task.pair % p.kv_heads;
  const int64_t part = static_cast<int64_t>(kTile) * p.dim_pad();
  for (int tile = task.first_tile; tile < task.last_tile; ++tile) {
    const KeyScratch keys = key_scratch(p, w, tile - task.first_tile);
    // dk serves as staging until it is cleared.
    load_keys(p, p.k, sample, tile, kv_head, keys.dk);
    transpose(keys.dk, p.dim_pad(), p.dim, keys.k_t);
    if (p.d_out.data != nullptr) {
      load_keys(p, p.v, sample, tile, kv_head, keys.dk);
      transpose(keys.dk, p.dim_pad(), p.dim, keys.v_t);
    }
    std::memset(keys.dk, 0, 2 * part * sizeof(float));
  }
  const int last = p.axis.first_tile(sample) + p.axis.tiles_of(sample);
  for (int row_tile = task.first_tile; row_tile < last; ++row_tile) {
    backward_keys_rows(p, task, sample, row_tile, w);
  }
  for (int tile = task.first_tile; tile < task.last_tile; ++tile) {
    const KeyScratch keys = key_scratch(p, w, tile - task.first_tile);
    store_keys(p, p.dk, sample, tile, kv_head, keys.dk);
    if (p.dv.data != nullptr) store_keys(p, p.dv, sample, tile, kv_head, keys.dv);
  }
}

}  // namespace CDFAST_ISA
}  // namespace cdfast
