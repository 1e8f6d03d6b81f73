// Forward passes over a tile of rows: attention, the log-sum-exp and the head-mean map.
#pragma once

#include <cmath>

#include "tiles.h"
#include "visibility.h"

namespace cdfast {
namespace CDFAST_ISA {

// Scores of all visible key tiles.
static void scores(const Problem& p, const PackedTiles& packed, int64_t pair, const RowInfo& rows,
                   int n_tiles, const Scratch& w) {
  for (int t = 0; t < n_tiles; ++t) {
    const Left q = {w.q, p.dim_pad(), 1};
    const float* k_t = packed.at(pair, w.tiles[t].index) + packed.k_t;
    product<false>(rows.n_pad, kTile, static_cast<int>(p.dim), q, k_t, kTile, w.s + t * kBlock,
                   kTile);
  }
}

// Turns one row of scores into exp(s - max s) and returns their sum; max_out is 0 in a row that
// sees nothing.
static float softmax_row(int n_tiles, float* row, float* max_out) {
  Vec largest = splat(-infinity());
  for (int t = 0; t < n_tiles; ++t) {
    for (int j = 0; j < kTile; j += kWidth) {
      const Vec s = load(row + t * kBlock + j);
      largest = s > largest ? s : largest;
    }
  }
  const float row_max = max(largest);
  *max_out = row_max == -infinity() ? 0.0f : row_max;
  const Vec shift = splat(*max_out);
  Vec total = Vec{};
  for (int t = 0; t < n_tiles; ++t) {
    Vec tile_total = Vec{};
    for (int j = 0; j < kTile; j += kWidth) {
      const Vec e = exp(load(row + t * kBlock + j) - shift);
      store(row + t * kBlock + j, e);
      tile_total += e;
    }
    total += tile_total;
  }
  return sum(total);
}

// Adds scale * row to the map's row at the tile's visual keys.
static void add_to_map(const int32_t* codes, const float* row, float scale, float* to) {
  for (int j = 0; j < kTile; j += kWidth) {
    const Vec added = load(to + j) + load(row + j) * splat(scale);
    store(to + j, load(codes + j) >= splat(0) ? added : load(to + j));
  }
}

// Adds the probabilities of one head, row_scale times w.s, to S.
static void add_head_to_map(const Problem& p, const RowTile& at, const RowInfo& rows, int n_tiles,
                            const float* row_scale, const Scratch& w) {
  for (int t = 0; t < n_tiles; ++t) {
    const KeyTile& tile = w.tiles[t];
    if (tile.slot < 0) continue;
    int32_t codes[kTile];
    key_codes(p.axis, at.sample, tile.tile, true, codes);
    for (int r = 0; r < rows.n; ++r) {
      float* to = map_row(p, at.sample, tile.slot, at.begin + r);
      if (to == nullptr || !rows.live[r]) continue;
      add_to_map(codes, w.s + t * kBlock + r * kTile, row_scale[r], to);
    }
  }
}

static void store_out(const Problem& p, const RowTile& at, const RowInfo& rows, int64_t head,
                      const float* inverse, const float* acc) {
  for (int r = 0; r < rows.n; ++r) {
    const int64_t offset = p.out.offset(at.sample, at.begin + r, head);
    if (rows.live[r]) {
      store_row(p.out, offset, p.dim, inverse[r], acc + r * p.dim_pad());
    } else {
      zero_row(p.out, offset, p.dim);
    }
  }
}

static void forward_head(const Problem& p, const PackedTiles& packed, int64_t pair, int64_t head,
                         const RowTile& at, const RowInfo& rows, int n_tiles, const Scratch& w) {
  const int pad = p.dim_pad();
  load_rows(p, p.q, at, head, p.scale, w.q);
  scores(p, packed, pair, rows, n_tiles, w);
  for (int t = 0; t < n_tiles; ++t) {
    if (!w.tiles[t].masked) continue;
    hide(p.axis, at, rows, w.tiles[t].tile, false, -infinity(), w.s + t * kBlock);
  }
  float inverse[kTile], map_scale[kTile];
  float* lse = p.lse + p.axis.row_base(at.sample, head, p.heads) + at.begin;
  for (int r = 0; r < rows.n; ++r) {
    float largest;
    const float total = softmax_row(n_tiles, w.s + r * kTile, &largest);
    inverse[r] = 1.0f / total;
    map_scale[r] = inverse[r] / static_cast<float>(p.heads);
    const double natural = static_cast<double>(largest) + ::log(static_cast<double>(total));
    lse[r] = rows.live[r] ? static_cast<float>(natural) : -infinity();
  }
  std::memset(w.acc, 0, sizeof(float) * rows.n_pad * pad);
  for (int t = 0; t < n_tiles; ++t) {
    const float* v = packed.at(pair, w.tiles[t].index) + packed.v;
    const Left probs = {w.s + t * kBlock, kTile, 1};
    product<true>(rows.n_pad, pad, kTile, probs, v, pad, w.acc, pad);
  }
  store_out(p, at, rows, head, inverse, w.acc);
  if (p.map != nullptr) add_head_to_map(p, at, rows, n_tiles, map_scale, w);
}

static void forward_rows(const Problem& p, const PackedTiles& packed, const RowTask& task,
                         const Scratch& w) {
  RowInfo rows;
  read_rows(p.axis, task.rows, &rows);
  const int n_tiles = visible_key_tiles(p.axis, task.rows, false, w.tiles);
  const int64_t group = p.group();
  for (int64_t pair = task.first_pair; pair < task.last_pair; ++pair) {
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = pair % p.kv_heads * group + g;
      forward_head(p, packed, pair, head, task.rows, rows, n_tiles, w);
    }
  }
}

static void map_rows(const Problem& p, const PackedTiles& packed, const RowTask& task,
                     const Scratch& w) {
  RowInfo rows;
  read_rows(p.axis, task.rows, &rows);
  const int n_tiles = visible_key_tiles(p.axis, task.rows, true, w.tiles);
  if (n_tiles == 0) return;
  float map_scale[kTile];
  for (float& x : map_scale) x = 1.0f / static_cast<float>(p.heads);
  const int64_t group = p.group();
  for (int64_t pair = task.first_pair; pair < task.last_pair; ++pair) {
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = pair % p.kv_heads * group + g;
      load_rows(p, p.q, task.rows, head, p.scale, w.q);
      scores(p, packed, pair, rows, n_tiles, w);
      for (int t = 0; t < n_tiles; ++t) {
        probabilities(p, task.rows, rows, head, w.tiles[t], nullptr, w.s + t * kBlock);
      }
      add_head_to_map(p, task.rows, rows, n_tiles, map_scale, w);
    }
  }
}

}  // namespace CDFAST_ISA
}  // namespace cdfast
