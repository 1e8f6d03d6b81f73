#include "layout.h"

#include <algorithm>

#include "problem.h"

namespace cdfast {
namespace {

// One sample: its tokens, and its rows of the tables.
struct Sample {
  int64_t index, n, start, base;  // tokens, axis position and flat number of the first one
  const uint8_t* visual;
  const uint8_t* live;
  const int64_t* segment;

  bool is_live(int64_t i) const { return live == nullptr || live[i] != 0; }
};

Sample sample_of(const Tokens& tokens, int64_t s) {
  const int64_t base = tokens.starts ? tokens.starts[s] : s * tokens.length;
  const int64_t n = tokens.starts ? tokens.starts[s + 1] - base : tokens.length;
  return {s,
          n,
          tokens.starts ? base : 0,
          base,
          tokens.visual + base,
          tokens.live ? tokens.live + base : nullptr,
          tokens.segment ? tokens.segment + base : nullptr};
}

// The batch view of a sample: live, visual, segment, gather and scatter.
void write_view(const Tokens& tokens, const Sample& sample, const LayoutTables& to) {
  const int64_t row = sample.index * tokens.length, rest = tokens.length - sample.n;
  for (int64_t i = 0; i < sample.n; ++i) {
    const bool live = sample.is_live(i);
    to.live[row + i] = live;
    to.visual[row + i] = live && sample.visual[i] != 0;
  }
  std::fill_n(to.live + row + sample.n, rest, uint8_t{0});
  std::fill_n(to.visual + row + sample.n, rest, uint8_t{0});
  if (sample.segment == nullptr) {
    std::fill_n(to.segment + row, tokens.length, int64_t{0});
  } else {
    for (int64_t i = 0; i < sample.n; ++i) {
      to.segment[row + i] = sample.is_live(i) ? sample.segment[i] : 0;
    }
  }
  if (to.gather == nullptr) return;
  for (int64_t i = 0; i < sample.n; ++i) {
    to.gather[row + i] = sample.base + i;
    to.scatter[sample.base + i] = row + i;
  }
  std::fill_n(to.gather + row + sample.n, rest, int64_t{0});
}

// A maximal run of tokens of one segment rank; padding belongs to the run before it.
struct Run {
  int64_t begin, end;
  int32_t rank;
};

// Ranks of the segments in order, 0 for the prefix. False if the ids are negative or decrease.
bool find_runs(const Sample& sample, std::vector<Run>* runs) {
  runs->clear();
  if (sample.segment == nullptr) {
    runs->push_back({0, sample.n, 0});
    return true;
  }
  int64_t current = 0;
  int32_t rank = 0;
  runs->push_back({0, sample.n, 0});
  for (int64_t i = 0; i < sample.n; ++i) {
    if (!sample.is_live(i) || sample.segment[i] == current) continue;
    if (sample.segment[i] < current) return false;
    current = sample.segment[i];
    ++rank;
    if (i == 0) {
      runs->back().rank = rank;
    } else {
      runs->back().end = i;
      runs->push_back({i, sample.n, rank});
    }
  }
  return true;
}

// The slots of a sample while its tokens are read in order.
struct SlotList {
  std::vector<int32_t>* tiles;
  std::vector<int64_t>* panels;
  size_t first;  // of the sample
};

// Notes a visual key whose last seeing row is before `end`.
void add_key(SlotList* slots, int32_t tile, int64_t end) {
  if (slots->tiles->size() == slots->first || slots->tiles->back() != tile) {
    slots->tiles->push_back(tile);
    slots->panels->insert(slots->panels->end(), {0, 0, 0});
  }
  int64_t& known = slots->panels->back();
  known = std::max(known, end);
}

// codes, bounds and entries of a run; returns the visual keys seen at its end.
int64_t write_run(const Sample& sample, const Run& run, int64_t first_live, int64_t end_live,
                  int64_t seen, const LayoutTables& to, int64_t* counts, SlotList* slots) {
  const int64_t begin = std::max(run.begin, first_live), end = std::min(run.end, end_live);
  const int32_t bounds[2] = {static_cast<int32_t>(sample.start + begin),
                             static_cast<int32_t>(sample.start + end)};
  const int64_t last_row = sample.start + (run.rank == 0 ? end_live : end);
  for (int64_t i = run.begin; i < run.end; ++i) {
    const int64_t token = sample.base + i;
    to.bounds[2 * token] = bounds[0];
    to.bounds[2 * token + 1] = bounds[1];
    if (!sample.is_live(i)) {
      to.codes[token] = -1;
      to.entries[token] = 0;
      continue;
    }
    const bool visual = sample.visual[i] != 0;
    seen += visual;
    to.codes[token] = 2 * run.rank + visual;
    to.entries[token] = static_cast<int32_t>(seen);
    counts[0] += seen > 0;
    counts[1] += seen;
    if (visual) add_key(slots, static_cast<int32_t>((sample.start + i) / kTile), last_row);
  }
  return seen;
}

// Panels: base, first and end of each slot of the sample, one after the other in the data.
void place_panels(int64_t first_live, const SlotList& slots, int64_t* map_rows) {
  for (size_t slot = slots.first; slot < slots.tiles->size(); ++slot) {
    int64_t* panel = slots.panels->data() + 3 * slot;
    panel[1] = std::max<int64_t>(static_cast<int64_t>((*slots.tiles)[slot]) * kTile, first_live);
    panel[0] = *map_rows - panel[1];
    *map_rows += panel[2] - panel[1];
  }
}

void read_facts(const Tokens& tokens, const Sample& sample, const std::vector<Run>& runs,
                int64_t n_live, int64_t first_live, int64_t end_live, LayoutFacts* facts) {
  facts->all_live &= n_live == tokens.length;
  // Live tokens first, then padding, over the whole row of the batch view.
  facts->padded_right &= n_live == 0 || (first_live == 0 && n_live == end_live);
  const int32_t ranks = runs.back().rank;
  facts->one_segment &= ranks <= 1;
  facts->contiguous &= n_live == end_live - first_live;
  if (sample.n > 0) {
    int32_t rank_at_first = runs.front().rank;
    for (const Run& run : runs) {
      if (n_live > 0 && run.begin <= first_live) rank_at_first = run.rank;
    }
    facts->contiguous &= ranks == rank_at_first;
  }
}

bool build_sample(const Tokens& tokens, int64_t s, const LayoutTables& to, std::vector<Run>* runs,
                  LayoutFacts* facts) {
  const Sample sample = sample_of(tokens, s);
  if (!find_runs(sample, runs)) return false;
  write_view(tokens, sample, to);
  int64_t n_live = 0, first_live = 0, end_live = 0, end_prefix = -1;
  for (const Run& run : *runs) {
    for (int64_t i = run.begin; i < run.end; ++i) {
      if (!sample.is_live(i)) continue;
      if (n_live++ == 0) first_live = i;
      end_live = i + 1;
    }
    if (run.rank == 0 && n_live > 0) end_prefix = end_live;
  }
  if (end_prefix < 0) end_prefix = first_live;
  int64_t* counts = to.counts + 2 * s;
  counts[0] = counts[1] = 0;
  SlotList slots = {&facts->slot_tiles, &facts->panels, facts->slot_tiles.size()};
  int64_t prefix = 0;
  for (const Run& run : *runs) {
    const int64_t before = run.rank == 0 ? 0 : prefix;
    const int64_t seen = write_run(sample, run, first_live, end_live, before, to, counts, &slots);
    if (run.rank == 0) prefix = seen;
  }
  place_panels(sample.start + first_live, slots, &facts->map_rows);
  const int64_t n_slots = static_cast<int64_t>(slots.tiles->size() - slots.first);
  const int64_t columns[5] = {0, sample.n, first_live, end_live, end_prefix};
  for (int c = 0; c < 5; ++c) {
    to.samples[5 * s + c] = static_cast<int32_t>(sample.start + columns[c]);
  }
  to.start[s] = sample.start;
  to.image_samples[s] = n_slots > 0;
  facts->num_image_samples += n_slots > 0;
  facts->n_slots = std::max(facts->n_slots, n_slots);
  facts->slots_before.push_back(static_cast<int64_t>(facts->slot_tiles.size()));
  const int64_t last = sample.start + std::max<int64_t>(sample.n, 1) - 1;
  facts->n_tiles = std::max(facts->n_tiles, last / kTile - sample.start / kTile + 1);
  read_facts(tokens, sample, *runs, n_live, first_live, end_live, facts);
  return true;
}

}  // namespace

LayoutFacts build_layout(const Tokens& tokens, const LayoutTables& tables) {
  LayoutFacts facts;
  facts.slots_before.push_back(0);
  std::vector<Run> runs;
  for (int64_t s = 0; s < tokens.n_samples; ++s) {
    if (!build_sample(tokens, s, tables, &runs, &facts)) {
      facts.segments_ordered = false;
      return facts;
    }
  }
  return facts;
}

void write_slots(const LayoutFacts& facts, const int64_t* start, int64_t n_samples,
                 int32_t* slot_tiles, int64_t* panels, int64_t* tiles) {
  std::fill_n(slot_tiles, n_samples * facts.n_slots, -1);
  std::fill_n(panels, n_samples * facts.n_slots * 3, 0);
  for (int64_t s = 0; s < n_samples; ++s) {
    const int64_t first = facts.slots_before[s], n = facts.slots_before[s + 1] - first;
    std::copy_n(facts.slot_tiles.data() + first, n, slot_tiles + s * facts.n_slots);
    std::copy_n(facts.panels.data() + 3 * first, 3 * n, panels + s * facts.n_slots * 3);
    int64_t slot = 0;
    for (int64_t i = 0; i < facts.n_tiles; ++i) {
      const int64_t tile = start[s] / kTile + i;
      const bool has_slot = slot < n && facts.slot_tiles[first + slot] == tile;
      const int64_t* panel = facts.panels.data() + 3 * (first + slot);
      int64_t* entry = tiles + 3 * (s * facts.n_tiles + i);
      entry[0] = has_slot ? panel[0] : 0;
      entry[1] = has_slot ? panel[2] : 0;
      slot += has_slot;
      entry[2] = slot;
    }
  }
}

}  // namespace cdfast
