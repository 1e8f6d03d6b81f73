// Tiles of rows and keys: loading, packing, masks.
#pragma once

#include "gemm.h"

namespace cdfast {
namespace CDFAST_ISA {

constexpr int kBlock = kTile * kTile;  // floats of a tile of scores
constexpr int kAhead = 4;              // rows that a copy asks for in advance
static CDFAST_INLINE float infinity() { return from_bits(0x7f800000u); }
static CDFAST_INLINE int round_up(int n, int multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

static void load_row(const View& x, int64_t offset, int64_t dim, float scale, float* to) {
  if (x.dtype == DType::f32) {
    const float* from = static_cast<const float*>(x.data) + offset;
    for (int64_t i = 0; i < dim; ++i) to[i] = from[i] * scale;
  } else if (x.dtype == DType::bf16) {
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + offset;
    for (int64_t i = 0; i < dim; ++i) to[i] = from_bf16(from[i]) * scale;
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + offset;
    for (int64_t i = 0; i < dim; ++i) to[i] = from_f16(from[i]) * scale;
  }
}

static void store_row(const View& x, int64_t offset, int64_t dim, float scale, const float* from) {
  if (x.dtype == DType::f32) {
    float* to = static_cast<float*>(x.data) + offset;
    for (int64_t i = 0; i < dim; ++i) to[i] = from[i] * scale;
  } else if (x.dtype == DType::bf16) {
    uint16_t* to = static_cast<uint16_t*>(x.data) + offset;
    for (int64_t i = 0; i < dim; ++i) to[i] = to_bf16(from[i] * scale);
  } else {
    uint16_t* to = static_cast<uint16_t*>(x.data) + offset;
    for (int64_t i = 0; i < dim; ++i) to[i] = to_f16(from[i] * scale);
  }
}

// Rows of a head lie a page or more apart in memory, where no hardware prefetch looks.
static CDFAST_INLINE void prefetch_row(const View& x, int64_t offset, int64_t dim) {
  const int64_t size = x.dtype == DType::f32 ? 4 : 2;
  const char* from = static_cast<const char*>(x.data) + offset * size;
  for (int64_t i = 0; i < dim * size; i += 64) __builtin_prefetch(from + i);
}

static void zero_row(const View& x, int64_t offset, int64_t dim) {
  const int size = x.dtype == DType::f32 ? 4 : 2;
  std::memset(static_cast<char*>(x.data) + offset * size, 0, dim * size);
}

// Rows [begin, end) of one head as (rows, dim_pad): zeros at padding, in the columns past dim and
// in the rows up to a multiple of 4.
static void load_rows(const Problem& p, const View& x, const RowTile& at, int64_t head, float scale,
                      float* to) {
  const int32_t* codes = p.axis.codes + p.axis.token_base(at.sample);
  const int pad = p.dim_pad(), n = round_up(at.end - at.begin, 4);
  for (int r = 0; r < n; ++r, to += pad) {
    const int position = at.begin + r;
    const bool live = position < at.end && codes[position] >= 0;
    const int64_t used = live ? p.dim : 0;
    if (position + kAhead < at.end) {
      prefetch_row(x, x.offset(at.sample, position + kAhead, head), p.dim);
    }
    if (live) load_row(x, x.offset(at.sample, position, head), p.dim, scale, to);
    std::memset(to + used, 0, (pad - used) * sizeof(float));
  }
}

// The 64 keys of a tile as (kTile, dim_pad): zeros at padding and outside the sample.
static void load_keys(const Problem& p, const View& x, int64_t sample, int tile, int64_t head,
                      float* to) {
  const int pad = p.dim_pad(), first = tile * kTile;
  const int begin = p.axis.begin(sample), end = p.axis.end(sample);
  const int32_t* codes = p.axis.codes + p.axis.token_base(sample);
  for (int j = 0; j < kTile; ++j, to += pad) {
    const int key = first + j;
    const bool live = key >= begin && key < end && codes[key] >= 0;
    const int64_t used = live ? p.dim : 0;
    if (key >= begin && key + kAhead < end) {
      prefetch_row(x, x.offset(sample, key + kAhead, head), p.dim);
    }
    if (live) load_row(x, x.offset(sample, key, head), p.dim, 1.0f, to);
    std::memset(to + used, 0, (pad - used) * sizeof(float));
  }
}

// (kTile, dim_pad) to (dim, kTile).
static void transpose(const float* from, int pad, int64_t dim, float* to) {
  // Sixteen channels at a time are one cache line of each key.
  for (int64_t c_0 = 0; c_0 < dim; c_0 += 16) {
    const int64_t c_1 = c_0 + 16 < dim ? c_0 + 16 : dim;
    for (int j_0 = 0; j_0 < kTile; j_0 += 16) {
      for (int64_t c = c_0; c < c_1; ++c) {
        for (int j = j_0; j < j_0 + 16; ++j) to[c * kTile + j] = from[j * pad + c];
      }
    }
  }
}

// Fills one tile of `to`; `staging` holds (kTile, dim_pad).
static void pack(const Problem& p, const PackedTiles& to, int64_t pair, int32_t tile, int32_t index,
                 float* staging) {
  const int64_t sample = pair / p.kv_heads, head = pair % p.kv_heads;
  float* at = to.at(pair, index);
  float* keys = to.k >= 0 ? at + to.k : staging;
  load_keys(p, p.k, sample, tile, head, keys);
  if (to.k_t >= 0) transpose(keys, p.dim_pad(), p.dim, at + to.k_t);
  if (to.v < 0 && to.v_t < 0) return;
  float* values = to.v >= 0 ? at + to.v : staging;
  load_keys(p, p.v, sample, tile, head, values);
  if (to.v_t >= 0) transpose(values, p.dim_pad(), p.dim, at + to.v_t);
}

// What the masks of a row tile need, read once.
struct RowInfo {
  int n, n_pad;  // rows, and rounded up to a multiple of 4
  bool live[kTile];
  int32_t begin[kTile];  // of the row's segment
};

static void read_rows(const Axis& axis, const RowTile& at, RowInfo* info) {
  const int64_t base = axis.token_base(at.sample);
  info->n = at.end - at.begin;
  info->n_pad = round_up(info->n, 4);
  for (int r = 0; r < info->n; ++r) {
    info->live[r] = axis.codes[base + at.begin + r] >= 0;
    info->begin[r] = axis.bounds[2 * (base + at.begin + r)];
  }
}

// Codes of the keys of a tile, -1 outside the sample and, if `visual_only`, at other keys.
static void key_codes(const Axis& axis, int64_t sample, int tile, bool visual_only, int32_t* to) {
  const int begin = axis.begin(sample), end = axis.end(sample);
  const int32_t* codes = axis.codes + axis.token_base(sample);
  for (int j = 0; j < kTile; ++j) {
    const int key = tile * kTile + j;
    const int32_t code = key >= begin && key < end ? codes[key] : -1;
    to[j] = visual_only && (code & 1) == 0 ? -1 : code;
  }
}

// Sets what (rows, kTile) holds of keys that a row does not see to `fill`.
static void hide(const Axis& axis, const RowTile& at, const RowInfo& rows, int tile,
                 bool visual_only, float fill, float* scores) {
  int32_t codes[kTile], position[kTile];
  key_codes(axis, at.sample, tile, visual_only, codes);
  for (int j = 0; j < kTile; ++j) position[j] = tile * kTile + j;
  const int end_prefix = axis.end_prefix(at.sample);
  const Vec hidden = splat(fill);
  for (int r = 0; r < rows.n; ++r) {
    const int32_t row = rows.live[r] ? at.begin + r : -1;
    for (int j = 0; j < kTile; j += kWidth) {
      const IntVec key = load(position + j);
      const IntVec in_range = (key < splat(end_prefix)) | (key >= splat(rows.begin[r]));
      const IntVec visible = (load(codes + j) >= splat(0)) & (key <= splat(row)) & in_range;
      float* to = scores + r * kTile + j;
      store(to, visible ? load(to) : hidden);
    }
  }
}

// Turns a tile of scores into exp(s - lse), times `norm` where given; 0 at hidden keys, in rows at
// padding and past the last.
static void probabilities(const Problem& p, const RowTile& at, const RowInfo& rows, int64_t head,
                          const KeyTile& tile, const float* norm, float* block) {
  const int64_t base = p.axis.row_base(at.sample, head, p.heads) + at.begin;
  const float* lse = p.lse + base;
  for (int r = 0; r < rows.n_pad; ++r) {
    float* row = block + r * kTile;
    if (r >= rows.n || !rows.live[r]) {
      std::memset(row, 0, kTile * sizeof(float));
      continue;
    }
    const Vec shift = splat(lse[r]);
    const Vec scale = splat(norm == nullptr ? 1.0f : norm[base + r]);
    for (int j = 0; j < kTile; j += kWidth) store(row + j, exp(load(row + j) - shift) * scale);
  }
  // Selected after the exponential: a NaN or an infinite lse must not show at a hidden key.
  if (tile.masked) hide(p.axis, at, rows, tile.tile, p.modular, 0.0f, block);
}

// Where row `position` of a slot is stored in a map, or null.
static CDFAST_INLINE float* map_row(const Problem& p, int64_t sample, int slot, int position) {
  const int64_t* panel = p.axis.panel(sample, slot);
  if (position < panel[1] || position >= panel[2]) return nullptr;
  return p.map + (panel[0] + position) * kTile;
}

}  // namespace CDFAST_ISA
}  // namespace cdfast
