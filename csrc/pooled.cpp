// The authors' loss: 1 - cos of column means over visual rows, after their filter of large entries.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

#include "problem.h"
#include "threads.h"

namespace cdfast {
namespace {

// Calls body(column, at) for what a sample stores of its visual rows: the column among the slots'
// 64 each, and the place in the data of the map.
template <typename Body>
void over_visual_rows(const Axis& axis, int64_t s, const Body& body) {
  const int32_t* codes = axis.codes + axis.token_base(s);
  for (int slot = 0; slot < axis.n_slots; ++slot) {
    const int64_t* panel = axis.panel(s, slot);
    for (int64_t p = panel[1]; p < panel[2]; ++p) {
      if (codes[p] < 0 || (codes[p] & 1) == 0) continue;
      for (int j = 0; j < kTile; ++j) body(slot * kTile + j, (panel[0] + p) * kTile + j);
    }
  }
}

// mean + unbiased std over the visual x visual square, entries that are not visible included as 0.
double threshold(const Axis& axis, int64_t s, const float* x, double n_visual) {
  const double n = n_visual * n_visual;
  double sum = 0, deviation = 0, n_stored = 0;
  over_visual_rows(axis, s, [&](int, int64_t at) { sum += x[at]; });
  const double mean = sum / std::max(n, 1.0);
  over_visual_rows(axis, s, [&](int, int64_t at) {
    const double d = x[at] - mean;
    deviation += d * d;
    n_stored += 1;
  });
  // Columns of a slot that are not visual were counted, entries without a place were not.
  deviation += (n - n_stored) * mean * mean;
  return mean + std::sqrt(std::max(deviation, 0.0) / std::max(n - 1, 1.0));
}

bool is_visual(const Axis& axis, int64_t s, int64_t position) {
  const int32_t code = axis.codes[axis.token_base(s) + position];
  return code >= 0 && (code & 1) == 1;
}

void fill_map(const Axis& axis, int64_t s, float* map, float value) {
  for (int slot = 0; slot < axis.n_slots; ++slot) {
    const int64_t* panel = axis.panel(s, slot);
    std::fill_n(map + (panel[0] + panel[1]) * kTile, (panel[2] - panel[1]) * kTile, value);
  }
}

// Which entries pass the authors' filter.
struct Filter {
  const float *map, *target;
  double most_s, most_t;

  bool keeps(int64_t at) const {
    return map[at] <= most_s && target[at] <= most_t && target[at] != 0;
  }
};

// Means over the kept rows of each column, and their number, at least 1.
struct Columns {
  explicit Columns(int64_t width) : s(width), t(width), count(width) {}
  std::vector<double> s, t, count;
  double ss = 0, tt = 0, max_s = 0, max_t = 0;
};

Columns pool(const Axis& axis, int64_t s, const Filter& filter) {
  Columns columns(axis.n_slots * kTile);
  over_visual_rows(axis, s, [&](int column, int64_t at) {
    if (!filter.keeps(at)) return;
    columns.s[column] += filter.map[at];
    columns.t[column] += filter.target[at];
    columns.count[column] += 1;
  });
  for (size_t c = 0; c < columns.s.size(); ++c) {
    columns.count[c] = std::max(columns.count[c], 1.0);
    columns.s[c] /= columns.count[c];
    columns.t[c] /= columns.count[c];
    columns.ss += columns.s[c] * columns.s[c];
    columns.tt += columns.t[c] * columns.t[c];
    columns.max_s = std::max(columns.max_s, columns.s[c]);
    columns.max_t = std::max(columns.max_t, columns.t[c]);
  }
  return columns;
}

// The loss; columns.s becomes the gradient of an entry in each column.
double cosine(Columns* columns) {
  const double inverse_s = 1 / std::sqrt(columns->ss), inverse_t = 1 / std::sqrt(columns->tt);
  double loss = 0;
  for (size_t c = 0; c < columns->s.size(); ++c) {
    const double u = columns->s[c] * inverse_s - columns->t[c] * inverse_t;
    loss += u * u / 2;
  }
  for (size_t c = 0; c < columns->s.size(); ++c) {
    const double s_hat = columns->s[c] * inverse_s, u = s_hat - columns->t[c] * inverse_t;
    columns->s[c] = inverse_s * (u - loss * s_hat) / columns->count[c];
  }
  return loss;
}

// G in place of S; rows that are not visual have none.
void write_g(const Axis& axis, int64_t s, const Filter& filter, const std::vector<double>& g,
             float* map) {
  for (int slot = 0; slot < axis.n_slots; ++slot) {
    const int64_t* panel = axis.panel(s, slot);
    for (int64_t p = panel[1]; p < panel[2]; ++p) {
      const bool visual = is_visual(axis, s, p);
      for (int j = 0; j < kTile; ++j) {
        const int64_t at = (panel[0] + p) * kTile + j;
        const bool kept = visual && filter.keeps(at);
        map[at] = kept ? static_cast<float>(g[slot * kTile + j]) : 0.0f;
      }
    }
  }
}

double pooled_sample(const Axis& axis, int64_t s, float* map, const float* target) {
  double n_visual = 0;
  for (int i = axis.begin(s); i < axis.end(s); ++i) n_visual += is_visual(axis, s, i);
  if (n_visual < 2) {
    fill_map(axis, s, map, 0);
    return 0;
  }
  const Filter filter = {map, target, threshold(axis, s, map, n_visual),
                         threshold(axis, s, target, n_visual)};
  if (std::isnan(filter.most_s + filter.most_t)) {
    // A NaN fails every comparison of the filter and must still show.
    fill_map(axis, s, map, std::numeric_limits<float>::quiet_NaN());
    return std::numeric_limits<double>::quiet_NaN();
  }
  Columns columns = pool(axis, s, filter);
  if (std::min(columns.max_s, columns.max_t) < FLT_MIN) {
    // The authors' cosine is 0 where nothing survives the filter: loss 1, without a gradient.
    fill_map(axis, s, map, 0);
    return 1;
  }
  const double loss = cosine(&columns);
  write_g(axis, s, filter, columns.s, map);
  return loss;
}

}  // namespace

std::vector<double> pooled_maps(const Axis& axis, float* map, const float* target, int threads) {
  std::vector<double> losses(axis.n_samples);
  parallel_for(axis.n_samples, threads,
               [&](int64_t s, int) { losses[s] = pooled_sample(axis, s, map, target); });
  return losses;
}

}  // namespace cdfast
