// The host scheduler: from masks, packed sequences or segments to all tables of a VisualLayout.
#pragma once

#include <cstdint>
#include <vector>

namespace cdfast {

// Tokens of a batch. Padded: starts is null, sample s has tokens [s * length, (s + 1) * length).
// Packed: sample s has tokens [starts[s], starts[s + 1]).
struct Tokens {
  int64_t n_samples = 0, length = 0, n_tokens = 0;
  const uint8_t* visual = nullptr;
  const uint8_t* live = nullptr;     // null: all live
  const int64_t* segment = nullptr;  // null: one segment
  const int64_t* starts = nullptr;
};

// Where build_layout writes; the shapes of VisualLayout and Schedule.
struct LayoutTables {
  // (n_samples, length)
  uint8_t *live, *visual;
  int64_t* segment;
  int64_t* gather;  // packed only, as scatter (n_tokens,)
  int64_t* scatter;
  // (n_samples,)
  int64_t* start;
  uint8_t* image_samples;
  int32_t* samples;  // (n_samples, 5)
  int64_t* counts;   // (n_samples, 2)
  // (n_tokens,), bounds (n_tokens, 2)
  int32_t *codes, *bounds, *entries;
};

struct LayoutFacts {
  bool segments_ordered = true;  // if not, the tables are not complete
  bool contiguous = true, one_segment = true, all_live = true, padded_right = true;
  int64_t num_image_samples = 0, map_rows = 0;
  int64_t n_slots = 0, n_tiles = 1;  // columns of slot_tiles and of tiles
  // Of each sample, one after the other: its slots and their panels.
  std::vector<int32_t> slot_tiles;
  std::vector<int64_t> panels;
  std::vector<int64_t> slots_before;  // (n_samples + 1,)
};

LayoutFacts build_layout(const Tokens& tokens, const LayoutTables& tables);

// slot_tiles (n_samples, n_slots), panels (n_samples, n_slots, 3), tiles (n_samples, n_tiles, 3).
void write_slots(const LayoutFacts& facts, const int64_t* start, int64_t n_samples,
                 int32_t* slot_tiles, int64_t* panels, int64_t* tiles);

}  // namespace cdfast
