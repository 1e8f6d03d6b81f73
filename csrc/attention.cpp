#include "attention.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "buffer.h"
#include "threads.h"
#include "visibility.h"

namespace cdfast {
namespace {

// Packed tiles of this many bytes exist at a time; larger batches are worked on in parts.
constexpr int64_t kPackedBytes = 8 << 20;

enum class Pass { forward, map, backward };

int longest_sample(const Axis& axis) {
  int tiles = 0;
  for (int64_t s = 0; s < axis.n_samples; ++s) tiles = std::max(tiles, axis.tiles_of(s));
  return tiles;
}

// The scratch of all threads. Tasks find theirs by worker number.
class Workspace {
 public:
  Workspace(const Problem& p, bool keys) {
    const int64_t tile = static_cast<int64_t>(kTile) * p.dim_pad();
    const int64_t longest = longest_sample(p.axis);
    const int64_t scores = (keys ? 1 : longest) * kTile * kTile;
    const int64_t key_parts = keys ? 4 * kKeyTiles * tile : tile;
    per_thread_ = 3 * tile + 2 * scores + key_parts;
    buffer_ = std::make_unique<Buffer>(per_thread_ * p.threads);
    lists_.resize(p.threads, std::vector<KeyTile>(longest));
    for (int i = 0; i < p.threads; ++i) {
      float* at = buffer_->data() + i * per_thread_;
      float* s = at + 3 * tile;
      scratch_.push_back(
          {at, at + tile, at + 2 * tile, s, s + scores, s + 2 * scores, lists_[i].data()});
    }
  }
  const Scratch& of(int worker) const { return scratch_[worker]; }

 private:
  int64_t per_thread_;
  std::unique_ptr<Buffer> buffer_;
  std::vector<std::vector<KeyTile>> lists_;
  std::vector<Scratch> scratch_;
};

// Pairs (sample, key head) in order, and how many packed tiles each has.
struct Pairs {
  explicit Pairs(const Problem& p, bool slots_only) : n(p.axis.n_samples * p.kv_heads) {
    for (int64_t s = 0; s < p.axis.n_samples; ++s) {
      const int tiles = slots_only ? p.axis.slots_of(s) : p.axis.tiles_of(s);
      n_tiles.insert(n_tiles.end(), p.kv_heads, tiles);
    }
  }
  int64_t n;
  std::vector<int64_t> n_tiles;
};

PackedTiles parts_of(const Problem& p, Pass pass) {
  const int64_t transposed = p.dim * kTile, plain = static_cast<int64_t>(p.dim_pad()) * kTile;
  PackedTiles tiles;
  tiles.k_t = 0;
  tiles.tile_floats = transposed;
  if (pass == Pass::forward) {
    tiles.v = tiles.tile_floats;
    tiles.tile_floats += plain;
  }
  if (pass == Pass::backward) {
    tiles.k = tiles.tile_floats;
    tiles.tile_floats += plain;
    if (p.d_out.data != nullptr) {
      tiles.v_t = tiles.tile_floats;
      tiles.tile_floats += transposed;
    }
  }
  // Tiles start at cache lines.
  tiles.tile_floats = (tiles.tile_floats + 15) / 16 * 16;
  return tiles;
}

struct PackTask {
  int64_t pair;
  int32_t tile, index;
};

std::vector<PackTask> pack_tasks(const Problem& p, const Pairs& pairs, int64_t first, int64_t last,
                                 bool slots_only) {
  std::vector<PackTask> tasks;
  for (int64_t pair = first; pair < last; ++pair) {
    const int64_t s = pair / p.kv_heads;
    for (int32_t i = 0; i < pairs.n_tiles[pair]; ++i) {
      const int tile =
          slots_only ? p.axis.slot_tiles[s * p.axis.n_slots + i] : p.axis.first_tile(s) + i;
      tasks.push_back({pair, tile, i});
    }
  }
  return tasks;
}

// Rows that share pairs [first, last): one task for all pairs of a sample where heads add up in a
// map, else one per pair. Within a pair, or for the one map, those with the most keys come first.
std::vector<RowTask> row_tasks(const Problem& p, int64_t first, int64_t last, bool together) {
  std::vector<RowTask> tasks;
  for (int64_t pair = first; pair < last;) {
    const int64_t s = pair / p.kv_heads;
    const int64_t next = together ? std::min(last, (s + 1) * p.kv_heads) : pair + 1;
    for (int i = p.axis.tiles_of(s); i-- > 0;) {
      tasks.push_back({row_tile_of(p.axis, s, p.axis.first_tile(s) + i), pair, next});
    }
    pair = next;
  }
  if (together) {
    const auto keys = [&](const RowTask& t) { return t.rows.end - p.axis.begin(t.rows.sample); };
    std::stable_sort(tasks.begin(), tasks.end(),
                     [&](const RowTask& a, const RowTask& b) { return keys(a) > keys(b); });
  }
  return tasks;
}

using RowFunction = void (*)(const Problem&, const PackedTiles&, const RowTask&, const Scratch&);

// The pairs of one part of the work, and where their packed tiles begin.
struct Part {
  int64_t first, last, n_tiles;
  std::vector<int64_t> offsets;
};

// Pairs from `first` on whose packed tiles fit kPackedBytes, at least one.
Part next_part(const Pairs& pairs, int64_t first, int64_t tile_floats) {
  const int64_t room = kPackedBytes / (4 * tile_floats);
  Part part = {first, first, 0, {}};
  while (part.last < pairs.n &&
         (part.last == first || part.n_tiles + pairs.n_tiles[part.last] <= room)) {
    part.offsets.push_back(part.n_tiles);
    part.n_tiles += pairs.n_tiles[part.last++];
  }
  return part;
}

// Runs `function` over all rows and pairs.
void over_rows(const Problem& p, const Kernels& kernels, Pass pass, RowFunction function) {
  const bool slots_only = pass == Pass::map || (pass == Pass::backward && p.modular);
  const bool together = pass != Pass::backward && p.map != nullptr;
  const Pairs pairs(p, slots_only);
  const Workspace workspace(p, false);
  PackedTiles packed = parts_of(p, pass);
  std::unique_ptr<Buffer> buffer;
  int64_t capacity = 0;
  for (int64_t first = 0; first < pairs.n;) {
    const Part part = next_part(pairs, first, packed.tile_floats);
    if (part.n_tiles > capacity) {
      buffer.reset();
      buffer = std::make_unique<Buffer>(part.n_tiles * packed.tile_floats);
      capacity = part.n_tiles;
    }
    packed.data = buffer ? buffer->data() : nullptr;
    packed.first_tile = part.offsets.data();
    packed.first_pair = first;
    const std::vector<PackTask> packs = pack_tasks(p, pairs, first, part.last, slots_only);
    parallel_for(static_cast<int64_t>(packs.size()), p.threads, [&](int64_t i, int worker) {
      kernels.pack(p, packed, packs[i].pair, packs[i].tile, packs[i].index,
                   workspace.of(worker).keys);
    });
    const std::vector<RowTask> tasks = row_tasks(p, first, part.last, together);
    parallel_for(static_cast<int64_t>(tasks.size()), p.threads, [&](int64_t i, int worker) {
      function(p, packed, tasks[i], workspace.of(worker));
    });
    first = part.last;
  }
}

}  // namespace

void attention_forward(const Problem& p, const Kernels& kernels) {
  over_rows(p, kernels, Pass::forward, kernels.forward_rows);
}

void map_forward(const Problem& p, const Kernels& kernels) {
  over_rows(p, kernels, Pass::map, kernels.map_rows);
}

void attention_backward(const Problem& p, const Kernels& kernels) {
  over_rows(p, kernels, Pass::backward, kernels.backward_rows);
  // The first keys of a sample are seen by the most rows.
  std::vector<KeyTask> tasks;
  const int longest = longest_sample(p.axis);
  for (int i = 0; i < longest; i += kKeyTiles) {
    for (int64_t pair = 0; pair < p.axis.n_samples * p.kv_heads; ++pair) {
      const int64_t s = pair / p.kv_heads;
      const int n = p.axis.tiles_of(s), first = p.axis.first_tile(s);
      if (i < n) tasks.push_back({pair, first + i, first + std::min(n, i + kKeyTiles)});
    }
  }
  const Workspace workspace(p, true);
  parallel_for(static_cast<int64_t>(tasks.size()), p.threads, [&](int64_t i, int worker) {
    kernels.backward_keys(p, tasks[i], workspace.of(worker));
  });
}

}  // namespace cdfast
