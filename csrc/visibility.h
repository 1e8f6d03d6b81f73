// Which key tiles a tile of rows sees, and the lists of work.
#pragma once

#include <cstdint>

#include "problem.h"

namespace cdfast {

enum class Seen { none, some, all };

// What the rows see of a key tile, by the rule of layout.py.
Seen seen(const Axis& axis, const RowTile& rows, int key_tile);

// The key tiles that the rows see; of those in slots only, where `slots_only`. Returns their
// number; `list` has room for all tiles of the sample.
int visible_key_tiles(const Axis& axis, const RowTile& rows, bool slots_only, KeyTile* list);

// The rows of a sample in one tile of its axis.
RowTile row_tile_of(const Axis& axis, int64_t sample, int tile);

}  // namespace cdfast
