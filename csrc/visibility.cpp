#include "visibility.h"

#include <algorithm>

namespace cdfast {
namespace {

bool any_live(const Axis& axis, int64_t sample, int begin, int end) {
  const int32_t* codes = axis.codes + axis.token_base(sample);
  return std::any_of(codes + begin, codes + end, [](int32_t code) { return code >= 0; });
}

bool all_live(const Axis& axis, int64_t sample, int begin, int end) {
  const int32_t* codes = axis.codes + axis.token_base(sample);
  return std::all_of(codes + begin, codes + end, [](int32_t code) { return code >= 0; });
}

}  // namespace

RowTile row_tile_of(const Axis& axis, int64_t sample, int tile) {
  return {static_cast<int32_t>(sample), tile, std::max(axis.begin(sample), tile * kTile),
          std::min(axis.end(sample), (tile + 1) * kTile)};
}

Seen seen(const Axis& axis, const RowTile& rows, int key_tile) {
  const int64_t s = rows.sample;
  const int first = key_tile * kTile, end = first + kTile;
  if (first >= rows.end || end <= axis.first_live(s) || first >= axis.end_live(s)) {
    return Seen::none;
  }
  const int32_t* bounds = axis.bounds + 2 * axis.token_base(s);
  const int earliest = bounds[2 * rows.begin], latest = bounds[2 * (rows.end - 1)];
  const int end_prefix = axis.end_prefix(s);
  if (first >= end_prefix && end <= earliest) return Seen::none;
  const int first_inside = std::max(first, axis.begin(s));
  const int end_inside = std::min(end, axis.end(s));
  if (!any_live(axis, s, first_inside, end_inside)) return Seen::none;
  const bool before = end - 1 <= rows.begin && first_inside == first && end_inside == end;
  const bool in_range = end <= end_prefix || first >= latest;
  if (before && in_range && all_live(axis, s, first, end) &&
      all_live(axis, s, rows.begin, rows.end)) {
    return Seen::all;
  }
  return Seen::some;
}

int visible_key_tiles(const Axis& axis, const RowTile& rows, bool slots_only, KeyTile* list) {
  const int64_t s = rows.sample;
  int n = 0;
  for (int tile = axis.first_tile(s); tile <= rows.tile; ++tile) {
    const int slot = axis.slot_of(s, tile);
    if (slots_only && slot < 0) continue;
    const Seen what = seen(axis, rows, tile);
    if (what == Seen::none) continue;
    const int index = slots_only ? slot : tile - axis.first_tile(s);
    // In slots only entries count, and most tiles hold keys that are not visual somewhere.
    list[n++] = {tile, slot, index, slots_only || what == Seen::some};
  }
  return n;
}

}  // namespace cdfast
