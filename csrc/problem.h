// What the CPU kernels work on: views of tensors, the tables of a layout, one call's arguments.
#pragma once

#include <cstdint>

// Sources of several instruction sets include this: a copy of a function that is not inlined could
// hold instructions that the machine lacks, and the linker keeps one copy of each.
#if defined(__GNUC__) || defined(__clang__)
#define CDFAST_INLINE __attribute__((always_inline)) inline
#else
#define CDFAST_INLINE inline
#endif

namespace cdfast {

// Key tiles, row tiles and the slots of a stored map all have this width (MAP_TILE in layout.py).
constexpr int kTile = 64;
// Key tiles whose dk and dv one task makes: q and dO are read once for all of them.
constexpr int kKeyTiles = 4;
constexpr float kFp16Scale = 32768.0f;  // FP16_SCALE in visual_map.py

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// (sample, position, head, channel) view of q, k, v and their likes; strides in elements, the last
// dimension is contiguous. Packed tensors have a sample stride of 0.
struct View {
  void* data = nullptr;
  int64_t sample = 0, token = 0, head = 0;
  DType dtype = DType::f32;

  CDFAST_INLINE int64_t offset(int64_t s, int64_t position, int64_t h) const {
    return s * sample + position * token + h * head;
  }
};

// The tables of a VisualLayout (layout.py, schedule.py); positions are on the axis of a sample.
struct Axis {
  int64_t n_samples = 0, n_tokens = 0, n_slots = 0, n_tiles = 0, map_rows = 0;
  int64_t length = 0;                   // tokens of a sample of a padded batch; 0 for a packed one
  const int32_t* samples = nullptr;     // (n_samples, 5)
  const int32_t* codes = nullptr;       // (n_tokens,)
  const int32_t* bounds = nullptr;      // (n_tokens, 2)
  const int64_t* tiles = nullptr;       // (n_samples, n_tiles, 3)
  const int32_t* entries = nullptr;     // (n_tokens,)
  const int64_t* counts = nullptr;      // (n_samples, 2)
  const int32_t* slot_tiles = nullptr;  // (n_samples, n_slots)
  const int64_t* panels = nullptr;      // (n_samples, n_slots, 3)

  CDFAST_INLINE const int32_t* sample(int64_t s) const { return samples + 5 * s; }
  CDFAST_INLINE int begin(int64_t s) const { return sample(s)[0]; }
  CDFAST_INLINE int end(int64_t s) const { return sample(s)[1]; }
  CDFAST_INLINE int first_live(int64_t s) const { return sample(s)[2]; }
  CDFAST_INLINE int end_live(int64_t s) const { return sample(s)[3]; }
  CDFAST_INLINE int end_prefix(int64_t s) const { return sample(s)[4]; }
  CDFAST_INLINE int first_tile(int64_t s) const { return begin(s) / kTile; }
  CDFAST_INLINE int tiles_of(int64_t s) const {
    return begin(s) == end(s) ? 0 : (end(s) - 1) / kTile - first_tile(s) + 1;
  }
  CDFAST_INLINE int slots_of(int64_t s) const {
    int n = 0;
    while (n < n_slots && slot_tiles[s * n_slots + n] >= 0) ++n;
    return n;
  }
  CDFAST_INLINE int slot_of(int64_t s, int tile) const {
    const int64_t* entry = tiles + 3 * (s * n_tiles + tile - first_tile(s));
    // The end of the tile's panel, and the number of slots up to it.
    return entry[1] > 0 ? static_cast<int>(entry[2]) - 1 : -1;
  }
  // The flat number of position 0 of the axis.
  CDFAST_INLINE int64_t token_base(int64_t s) const { return s * length; }
  CDFAST_INLINE bool packed() const { return length == 0; }
  // Where lse and delta, (B, H, N) or (H, total), keep position 0 of a head.
  CDFAST_INLINE int64_t row_base(int64_t s, int64_t head, int64_t n_heads) const {
    return packed() ? head * n_tokens : (s * n_heads + head) * length;
  }
  CDFAST_INLINE const int64_t* panel(int64_t s, int slot) const {
    return panels + 3 * (s * n_slots + slot);
  }
};

// Rows [begin, end) of a sample, all in one tile of the axis.
struct RowTile {
  int32_t sample, tile, begin, end;
};

struct KeyTile {
  int32_t tile;   // on the axis
  int32_t slot;   // of the map, or -1
  int32_t index;  // among the packed tiles of the sample
  bool masked;    // not every row sees every key
};

// One call. Pointers that a pass does not use are null.
struct Problem {
  Axis axis;
  int64_t heads = 0, kv_heads = 0, dim = 0;
  float scale = 1;
  int threads = 1;
  View q, k, v, out, d_out, dq, dk, dv;
  float* lse = nullptr;  // written by the attention forward, else read
  const float* d_lse = nullptr;
  float* delta = nullptr;         // written by the backward over rows, read by the one over keys
  float* norm = nullptr;          // as delta; what exp(s - lse) must be multiplied by to sum to 1
  float* map = nullptr;           // S, zeros on entry of a forward; G in a backward
  const float* d_loss = nullptr;  // (n_samples,)
  // The modular form: keys in slots only, entries only; `delta` receives the gradient of lse.
  bool modular = false;

  CDFAST_INLINE int64_t group() const { return heads / kv_heads; }
  // Channels of a packed tile, a multiple of the widest vector.
  CDFAST_INLINE int dim_pad() const { return static_cast<int>((dim + 15) / 16 * 16); }
};

// Keys and values of some (sample, key head) pairs as float32 tiles, cleaned of padding.
struct PackedTiles {
  float* data = nullptr;
  int64_t tile_floats = 0;
  // Within a tile: k and v transposed, (dim, kTile), and as they are, (kTile, dim_pad); -1: absent.
  int64_t k_t = -1, v_t = -1, k = -1, v = -1;
  const int64_t* first_tile = nullptr;  // per pair from `first_pair` on
  int64_t first_pair = 0;

  CDFAST_INLINE float* at(int64_t pair, int index) const {
    return data + (first_tile[pair - first_pair] + index) * tile_floats;
  }
};

// Memory of one thread; what a pass does not use is null.
struct Scratch {
  float* q;  // (kTile, dim_pad), as d_o and acc
  float* d_o;
  float* acc;
  float* s;  // (key tiles, kTile, kTile), as dp
  float* dp;
  float* keys;     // backward_keys: k_t, v_t, dk, dv of each key tile
  KeyTile* tiles;  // one per key tile of the longest sample
};

// Which part of the work a task has: rows of one sample, and its pairs [first, last).
struct RowTask {
  RowTile rows;
  int64_t first_pair, last_pair;
};

// Keys of tiles [first_tile, last_tile) of the axis, of one pair.
struct KeyTask {
  int64_t pair;
  int32_t first_tile, last_tile;
};

// The inner loops, one set per instruction set (kernels.h). A task of each is independent of all
// others and writes its own outputs.
struct Kernels {
  const char* name;
  // Fills one packed tile; `staging` holds (kTile, dim_pad).
  void (*pack)(const Problem&, const PackedTiles&, int64_t pair, int32_t tile, int32_t index,
               float* staging);
  // out and lse, and S into the map where there is one.
  void (*forward_rows)(const Problem&, const PackedTiles&, const RowTask&, const Scratch&);
  // S from a given lse.
  void (*map_rows)(const Problem&, const PackedTiles&, const RowTask&, const Scratch&);
  // dq, and delta or the modular form's dlse.
  void (*backward_rows)(const Problem&, const PackedTiles&, const RowTask&, const Scratch&);
  // dk and dv of some key tiles.
  void (*backward_keys)(const Problem&, const KeyTask&, const Scratch&);
};

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

}  // namespace cdfast
